// 03_samplers: every sampler of the registry, its error against the questions it asks.
//
//   You learn    what a sampler costs, and what order buys: twice the steps make the error
//                2^order smaller; what noise, and Langevin dynamics, do beside that.
//   It takes     10 to 20 seconds.
//   Out come     samplers.png; a table, its slopes beside theory's. On the default data,
//                whose exact answer is known, exits 1 if a slope is off by more than 0.3
//                (no less: in float slopes end at errors of 4e-6, so steps must stay long).
//
//   build/03_samplers [--list] [--method NAME] [--sample-steps N] [--load FILE] [--n N]
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "data.h"
#include "draw.h"
#include "options.h"

enum { BUDGETS = 5, ASKS = 192, ROWS = 100, TRACKED = 9, FEW = 8, FINE = 128 };
static const double tolerance = 0.3, least = 4e-6, langevin_time = 4;

typedef struct result {
    const df_sampler_row *row;
    df_real curve[BUDGETS][2];                   // questions, error
    double slope, seconds;
} result;
static int on_step(void *asked, const df_step_info *info) {
    *(df_real *)asked = (df_real)info->evaluations;
    return 0;
}

// A run of about so many questions; of adaptive methods, to 1 + j digits.
static df_sample_desc plan(const data_trial *t, const df_sampler_row *r, int asks, int j) {
    int steps = r->evaluations > 0 ? asks / r->evaluations : asks;
    df_sample_desc d = data_run(&t->start, &t->end, r->name, steps > 1 ? steps : 1);
    d.final = DF_FINAL_KEEP, d.seed = 2, d.statistics = t->statistics;
    if (is_adaptive(r)) d.rtol = d.atol = pow(10, -1 - j);
    if (!r->to_sigma0) d.snr = 0.5;              // annealed: each level forgets half
    if (r->clock == DF_CLOCK_STOPPED)            // N steps of 2 (snr sigma)^2: one length
        d.snr = sqrt(langevin_time / 2 / d.steps) / t->start.sigma;
    return d;
}

static int measure(const data_trial *t, const options *o, result *r) {
    int half = family_of(r->row) < FAMILY_NOISY, n = half ? t->n / 2 : t->n;
    r->slope = (double)NAN;
    for (int j = 0; j < BUDGETS; j++) {
        df_sample_desc d = plan(t, r->row, o->sample_steps >> (BUDGETS - 1 - j), j);
        double began = progress_seconds(), error;
        d.on_step = on_step, d.user = &r->curve[j][0];
        if (data_trial_go(t, &d, n) != DF_OK) return -1;
        r->seconds = progress_seconds() - began;
        r->curve[j][1] = (df_real)(error = data_trial_error(t, half));
        if (j > 0 && error > least) r->slope = log2((double)r->curve[j - 1][1] / error);
    }
    return 0;
}

// Start-up steps may hold the order down; a corrector of one more node raises it (UniPC).
static int print(const result *r, int judge) {
    int low = r->row->start_order, high = r->row->order + (r->row->corrector == 1), wrong;
    printf("  %-19s", r->row->name);
    for (int j = 0; j < BUDGETS; j++) printf(" %8.1e", (double)r->curve[j][1]);
    printf("%6.0f%7.0f", (double)r->curve[BUDGETS - 1][0], 1000 * r->seconds);
    wrong = judge && (r->slope < low - tolerance || r->slope > high + tolerance);
    if (family_of(r->row) < FAMILY_NOISY && !is_adaptive(r->row))
        printf(low < high ? "%8.2f  %d to %d" : "%8.2f  %d", r->slope, low, high);
    printf(wrong ? "  WRONG\n" : "\n");
    return wrong;
}

// Curves, and a few trajectories of few questions over exact ones.
static void picture(const data_trial *t, const options *o, const result *r, int count) {
    static const char *const some[] = { "rk4", "ddim", "dpmpp_2m", "ddpm" };
    static const unsigned ink[] = { 0xD3D9E0, 0xE07B39, 0x3B6FB6, 0x4C9F70 };
    double range[4] = { o->sample_steps / 40.0, 1.2 * o->sample_steps, 0, 2 };
    const df_real *curve[ROWS];
    const char *name[ROWS];
    char label[64];
    int n = t->n < TRACKED ? t->n : TRACKED, dim = t->dim;
    df_real *path = (df_real *)malloc((size_t)((FINE + 1) * n * dim) * sizeof *path);
    draw_canvas c;
    if (path == NULL || draw_open(&c, 1560, 1110) != 0) return;
    snprintf(label, sizeof label, "sliced W2; of exact samples %.2g", t->floor);
    for (int f = 0, i = 0, k; f < FAMILY_MAPS; f++, i = k) {
        int noisy = f >= FAMILY_NOISY;
        for (k = i; k < count && family_of(r[k].row) == f; k++)
            name[k] = r[k].row->name, curve[k] = r[k].curve[0];
        range[2] = noisy ? 0.02 : 2e-7;
        draw_panel p = draw_curves(&c, 10 + 520 * (f % 3), 10 + 370 * (f / 3), 505, 350,
                                   160, family_names[f], range, noisy ? 0 : 4, k - i,
                                   BUDGETS, name + i, curve + i);
        draw_axes(&p, "questions", noisy ? label : "RMS error; slopes 1 to 4");
    }
    range[0] = range[2] = -2.2, range[1] = range[3] = 2.2;
    draw_panel q = draw_frame(&c, 1050, 750, 345, 350, "8 questions over exact", range, 5);
    for (int k = 0; k < 4; k++) {
        df_sample_desc d = plan(t, df_sampler_find(NULL, some[k]), k ? FEW : 4 * FINE, 0);
        d.trajectory = path;
        if (data_trial_go(t, &d, n) != DF_OK) break;
        for (int i = 0; i < (k < 3 ? n : 1); i++)
            draw_polyline(&q, path + i * dim, d.steps + 1, n * dim, k ? 1 : 6, ink[k], 1);
    }
    draw_scatter(&q, t->from, n, dim, 2.5, DRAW_TEXT, 1);
    draw_legend(&q, 3, some + 1, ink + 1);
    draw_save(&c, o->picture);
    draw_close(&c), free(path);
}

int main(int argc, char **argv) {
    options o = options_defaults(argv[0], "samplers", "", 0, ASKS, 2000);
    data_model m;
    static data_trial t[2];  // from noise to data; and where Langevin dynamics stays
    result r[ROWS];
    int all, count = 0, bad, wrong = 0;
    const df_sampler_row *rows = df_sampler_rows(&all), *one = NULL;
    o.without = "--data --steps --save --csv", o.method = "all";
    o.counts = "questions a sampler asks, at most";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    bad = data_model_open(&m, o.load, o.threads) != 0 ||
          (strcmp(o.method, "all") && (one = df_sampler_find(m.ctx, o.method)) == NULL) ||
          data_trial_open(&t[0], &m, -3, 3, o.seed, o.n) != 0 ||
          data_trial_open(&t[1], &m, 0, 0, o.seed, o.n) != 0;
    for (int k = 0; k < all * FAMILIES && !bad; k++) {   // by family; who cannot says why
        const df_sampler_row *row = &rows[k % all];
        if ((one && one != row) || family_of(row) != k / all) continue;
        df_sample_desc d = plan(&t[0], row, ASKS, 0);
        d.start = DF_START_NOISE;
        if (df_sample(m.ctx, &m.model, &d, t[0].x, 1) == DF_OK) r[count++].row = row;
        else printf("%s\n", df_ctx_message(m.ctx));
        df_ctx_clear(m.ctx);
    }
    progress_bar bar = progress_begin("sampling");
    for (int i = 0; i < count && !bad; i++) {
        bad = measure(&t[r[i].row->clock == DF_CLOCK_STOPPED], &o, &r[i]) != 0;
        progress(&bar, i + 1, count, "", (double)NAN);
    }
    if (!bad)
        printf("errors after %d .. %d questions: RMS distance; with noise sliced W2, %.3f "
               "between\nexact samples; questions, milliseconds; slope, theory\n",
               o.sample_steps / 16, o.sample_steps, t[0].floor);
    for (int i = 0; i < count && !bad; i++) {
        int f = family_of(r[i].row), judge = f < FAMILY_NOISY && !is_adaptive(r[i].row);
        if (i == 0 || f != family_of(r[i - 1].row)) printf("%s\n", family_names[f]);
        wrong += print(&r[i], judge && o.load == NULL && o.sample_steps >= ASKS);
    }
    if (bad) fprintf(stderr, "%s\n", df_ctx_message(m.ctx));
    else if (count > 0) picture(&t[0], &o, r, count);
    data_trial_close(&t[0]), data_trial_close(&t[1]);
    data_model_close(&m);
    return bad || wrong > 0 || count == 0;
}
