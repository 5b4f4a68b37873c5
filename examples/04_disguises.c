// 04_disguises: one path, seven disguises: VP, cosine, VE, EDM, sub-VP, flow, trig, each
// with another prediction.
//
//   You learn    that in r = x/(alpha + sigma) over s = sigma/(alpha + sigma) every one is
//                rectified flow: samplers that walk rho = sigma/alpha take one path on all
//                of them, to the last bits, noise and all; samplers that walk t do not.
//   It takes     two seconds.
//   Out come     disguises.png, and how far paths part. Exits 1 if a sampler in rho makes
//                them part by more than 1e-12 (1e-8 if it chooses its steps itself, which
//                rounding moves), or one in t by less than 1e-10.
//
//   build/04_disguises [--sample-steps N] [--n N] [--seed N] [--picture FILE] [--list]
#define DIFFUSION_DOUBLE
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "data.h"
#include "draw.h"
#include "options.h"

enum { PROCESSES = 7, SHOWN = 9, EXTRA = 64 };   // EXTRA: room for steps that restart adds
static const double same = 1e-12, nearly = 1e-8, apart = 1e-10;

static df_ctx *ctx;
static df_mixture_view as[PROCESSES];            // the disguises
static df_real *seen[PROCESSES];                 // t, x, s, r on a run: [n, room, 4]
static df_v3_statistics *statistics;             // dpm_solver_v3's, of the first process
static int n, room, points;
static uint64_t seed;

static int on_step(void *user, const df_step_info *info) {
    df_real *at = (df_real *)user + 4 * info->step;
    double scale = info->at.alpha + info->at.sigma;
    for (int i = 0; i < n && info->step < room; i++, at += 4 * room) {
        at[0] = info->at.t, at[1] = info->x[i];
        at[2] = info->at.sigma / scale, at[3] = info->x[i] / scale;
    }
    points = info->step + 1;
    return 0;
}

// A sampler on process p, lambda from -3 to 3, from n values of r between -2.4 and 2.4.
static int run(const char *method, int steps, int p) {
    df_model model = df_mixture_model(&as[p]);
    df_point start = df_process_at_lambda(&model.process, -3);
    df_point end = df_process_at_lambda(&model.process, 3);
    df_sample_desc d = data_run(&start, &end, method, steps);
    df_real *x = seen[p] + 4 * n * room;         // the path's last row is room for x
    if (statistics == NULL) statistics = df_v3_estimate(ctx, &model, &d, n);
    for (int i = 0; i < n; i++)
        x[i] = (start.alpha + start.sigma) * (4.8 * (i + 0.5) / n - 2.4);
    d.on_step = on_step, d.user = seen[p], d.seed = seed, d.statistics = statistics;
    return df_sample(ctx, &model, &d, x, n);
}

// The largest distance of any process's r from the first one's, over all steps; negative:
// the sampler cannot run, the context says why.
static double parting(const char *method, int steps) {
    double most = 0;
    for (int p = 0; p < PROCESSES; p++) {
        if (run(method, steps, p) != DF_OK) return -1;
        for (int k = 3; k < 4 * n * room; k += 4)
            if (k / 4 % room < points) most = fmax(most, fabs(seen[p][k] - seen[0][k]));
    }
    return most;
}

static int table(int steps) {
    int count, wrong = 0;
    const df_sampler_row *rows = df_sampler_rows(&count);
    printf("largest distance in r, %d and %d steps, of samplers\n", steps, 4 * steps);
    for (int k = 0; k < 2 * count; k++) {
        const df_sampler_row *r = &rows[k % count];
        int t = k / count;
        if (k % count == 0) printf("in %s\n", t ? "t: parted" : "rho: one path");
        if (r->clock != (t ? DF_CLOCK_T : DF_CLOCK_RHO) || r->asks == DF_ASK_MAP) continue;
        double far = parting(r->name, steps);
        int bad = t ? steps > 1 && far < apart : far > (is_adaptive(r) ? nearly : same);
        wrong += bad;
        if (far < 0) printf("  (%s)\n", df_ctx_message(ctx));
        else printf("  %-19s %8.1e %8.1e%s%s\n", r->name, far, parting(r->name, 4 * steps),
                    r->stochastic ? "  noise" : "", bad ? "  WRONG" : "");
    }
    return wrong;
}

// Left x over t, each process in its own coordinates; right r over s of all seven: above,
// every step is drawn from another one's path.
static void picture(const options *o) {
    static const char *const some[4] = { "dpmpp_2m", "ddpm", "euler_t", "euler_maruyama" };
    double unit[4] = { 0, 1, -3, 3 }, range[4];
    draw_canvas c;
    char title[80];
    if (draw_open(&c, 1490, 930) != 0) return;
    n = n < SHOWN ? n : SHOWN, room = o->sample_steps + 1;
    for (int k = 0; k < 4 && parting(some[k], o->sample_steps) >= 0; k++) {
        snprintf(title, sizeof title, "%s: seven %s", some[k], k < 2 ? "in one" : "paths");
        int x = 560 + 465 * (k % 2), y = 10 + 460 * (k / 2);
        draw_panel q = draw_frame(&c, x, y, 455, 450, title, unit, 5);
        draw_axes(&q, "s = sigma/(alpha + sigma)", "r = x/(alpha + sigma)");
        for (int i = 0; i < n * PROCESSES; i++) {
            int p = i % PROCESSES;
            const df_real *path = seen[p] + 4 * (i / PROCESSES) * room;
            if (k % 2 && i / PROCESSES % 2) continue;
            for (int j = p; k < 2 && j < o->sample_steps; j += PROCESSES)
                draw_polyline(&q, path + 4 * j + 2, 2, 4, 3, draw_palette(p), 1);
            if (k > 1) draw_polyline(&q, path + 2, room, 4, 1.4, draw_palette(p), 1);
        }
        for (int p = 0; p < PROCESSES && k == 0; p++) {
            const char *name = df_process_name(&as[p].process);
            draw_range(seen[p], n * room, 4, 0, range);
            snprintf(title, sizeof title, "%s, %s: x over t", name,
                     df_prediction_name(as[p].prediction));
            x = 10 + p % 2 * 270, y = 10 + p / 2 * 230;
            q = draw_frame(&c, x, y, 265, 222, title, range, 4);
            for (int i = 0; i < n; i++)
                draw_polyline(&q, seen[p] + 4 * i * room, room, 4, 2, draw_palette(p), 1);
        }
    }
    draw_save(&c, o->picture);
    draw_close(&c);
}

int main(int argc, char **argv) {
    static const double weights[3] = { 0.3, 0.45, 0.25 }, means[3] = { -1.5, 0.2, 1.6 };
    static const double variances[3] = { 0.12, 0.15, 0.08 };
    static const df_prediction predictions[PROCESSES] = {
        DF_EPS, DF_V, DF_SCORE, DF_EDM_F, DF_X0, DF_VELOCITY, DF_STRAIGHT };
    const df_process processes[PROCESSES] = {
        df_process_vp(0.1, 20), df_process_cosine(), df_process_ve(1e-4, 50),
        df_process_edm(80), df_process_subvp(0.1, 20), df_process_flow(),
        df_process_trig(0.5) };
    options o = options_defaults(argv[0], "disguises", "", 0, 24, 60);
    o.without = "--data --steps --method --threads --load --save --csv";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    ctx = df_ctx_create(NULL);
    df_mixture *mixture = df_mixture_create(ctx, 3, 1, weights, means, variances);
    int wrong = mixture == NULL || (double)o.n * o.sample_steps > 1e7;
    n = o.n, seed = o.seed, room = 4 * o.sample_steps + EXTRA;
    for (int p = 0; p < PROCESSES; p++) {
        df_mixture_view view = { mixture, processes[p], predictions[p] };
        as[p] = view;
        seen[p] = (df_real *)calloc((size_t)n * (size_t)(4 * room + 1), sizeof *seen[p]);
        wrong |= seen[p] == NULL;
    }
    if (wrong) fprintf(stderr, "04_disguises: no memory for %d paths so long\n", n);
    else wrong = table(o.sample_steps), picture(&o);
    for (int p = 0; p < PROCESSES; p++) free(seen[p]);
    df_v3_free(ctx, statistics), df_mixture_free(mixture), df_ctx_free(ctx);
    return wrong > 0;
}
