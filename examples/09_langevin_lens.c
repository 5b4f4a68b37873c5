// 09_langevin_lens: a step of Langevin dynamics is a step that noises and a step that denoises.
//
//   You learn    that dx = k score dt + sqrt(2 k) dW leaves p alone and falls apart into halves,
//                three numbers each on any process; the second alone is diffusion's sampler.
//   It takes     six seconds.
//   Out come     langevin_lens.png: each half and their sum on VP, VE and flow, particles over
//                the density where they should be. Exits 1 if the sum is not Langevin's step, an
//                order is not theory's, or particles end off p_t by more than sampling noise.
//
//   build/09_langevin_lens [--sample-steps N] [--n N] [--seed N] [--picture FILE] [--list]
#define DIFFUSION_DOUBLE
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "draw.h"
#include "options.h"

enum { PATHS = 3, SHOWN = 7, COLUMNS = 240, ROWS = 160, BINS = 24 };
static const char *const names[PATHS] = { "VP", "VE", "flow" }, *const titles[PATHS][3] = {
    { "VP. noise: the forward half", "VP. denoise: the reverse half", "VP. both: Langevin on p_t" },
    { "VE, the same", "", "" }, { "flow, the same", "", "" } };
static const double low[PATHS] = { 0, .01, .01 }, high[PATHS] = { 1, 1, .97 }, fixed = .4;
static df_ctx *ctx;
static df_process path[PATHS];
static df_mixture *data;
static int wrong;

static void claim(int holds) { wrong += !holds, printf(holds ? "\n" : "   WRONG\n"); }

// The three numbers of dynamics k (0 forward, 1 reverse, 2 their sum) at t.
static df_drift drift(const df_process *p, double t, double eta, int k) {
    df_drift a = { 0, 0, 0 }, b = a;
    wrong += df_drift_forward(ctx, p, t, &a) || df_drift_reverse(ctx, p, t, eta, &b);
    return k == 0 ? a : k == 1 ? b : df_drift_sum(a, b);
}

// The paper's table 3, rows and clocks: VP with beta = 1, VE per sigma, flow.
static void table(void) {
    df_process p[3] = { df_process_vp(1, 1), df_process_edm(80), df_process_flow() };
    const double t = .6, clocks[4] = { 1, .5, 80 * t, t / (1 - t) };
    printf("(a, b, c) of dx = (a x + b score) dt + c dW at t = .6: noise, denoise, sum\n");
    for (int k = 0; k < 4; k++) {
        int i = k > 1 ? k - 1 : 0, sde = k == 0;          // VP is there as SDE and as ODE
        df_drift d = { 0, 0, 0 };
        printf("  %-4s %s, the paper's clock %4.3g:", names[i], sde ? "SDE" : "ODE", clocks[k]);
        for (int h = 0; h < 3; h++) {
            d = df_drift_per(drift(&p[i], t, sde, h), i == 1 ? 80 : 1);
            printf(" (%.2g, %.3g, %.3g)", d.x_factor, d.score, d.noise);
        }
        claim(fabs(d.x_factor) + fabs(d.score / clocks[k] - 1) < 1e-12 &&
              fabs(d.noise * d.noise / clocks[k] - 2) < 1e-12);
    }
}

// One Euler step on N(*m, *v) when the score is N(M, V)'s, which is affine: exact moments.
static void moments(df_drift d, double h, double M, double V, double *m, double *v) {
    double gain = 1 + (d.x_factor - d.score / V) * h;
    *m = gain * *m + d.score * M / V * h, *v = gain * gain * *v + d.noise * d.noise * h;
}

// Data N(1, .25), beta 1, T = 8: p_.5, noise by h, back by h; from N(0, 1) the whole way back.
static void identity_and_duality(void) {
    df_process p = df_process_vp(8, 8);
    df_point half = df_process_at(&p, .5 / 8), at;
    double V = 1 - .75 * pow(half.alpha, 2), off[4] = { .00603, .0412, 0, 0 };   // are known
    printf("noise and back: the mean's error (order h^2); from T to 0: the variance's (h)\n");
    for (int k = 0; k < 4; k++) {
        double h = .1 / (1 << k), keep = exp(-h / 2), m = 0, v = 1;
        for (int N = 100 << k, i = N; i > 0; i--) {
            at = df_process_at(&p, i / (double)N);
            moments(drift(&p, at.t, 1, 1), 1.0 / N, at.alpha, 1 - .75 * pow(at.alpha, 2), &m, &v);
        }
        off[3] = v - .25, m = half.alpha * keep, v = V * keep * keep + 1 - keep * keep;
        moments(drift(&p, half.t, 1, 1), h / 8, half.alpha, V, &m, &v);
        off[2] = m - half.alpha;
        printf("  h = %.4f: %.5f    N = %3d: %.4f", h, off[2], 100 << k, off[3]);
        claim(k ? fabs(off[0] / off[2] - 4) < .3 && fabs(off[1] / off[3] - 2) < .15
                : fabs(off[0] - off[2]) < 1e-5 && fabs(off[1] - off[3]) < 6e-5);
        off[0] = off[2], off[1] = off[3];
    }
}

// p_t of process i, or of the fixed t, in columns; each by its own peak.
static void density(const draw_panel *q, int i, int stands) {
    static double heat[ROWS * COLUMNS], grid[ROWS], log_p[ROWS];
    for (int a = 0; a < COLUMNS; a++) {
        double t = stands ? fixed : low[i] + (high[i] - low[i]) * (a + .5) / COLUMNS, top = -1e9;
        df_point at = df_process_at(&path[i], t);
        for (int b = 0; b < ROWS; b++) grid[b] = -4 + 8 * (b + .5) / ROWS;
        df_mixture_log_density(ctx, data, &at, ROWS, grid, log_p);
        for (int b = 0; b < ROWS; b++) top = log_p[b] > top ? log_p[b] : top;
        for (int b = 0; b < ROWS; b++) heat[b * COLUMNS + a] = exp(log_p[b] - top);
    }
    draw_heat(q, heat, COLUMNS, ROWS, 0, 1.25);
}

// Particles of process i under dynamics k, drawn; their total variation from p_t at the end.
static double particles(draw_canvas *c, int i, int k, const options *o) {
    int n = o->n, steps = o->sample_steps;
    double from = k == 1 ? high[i] : k == 2 ? fixed : low[i], range[4] = { 0, 1, -4, 4 };
    double h = (high[i] - low[i]) / steps, error = 1, t = from;
    double *x = (double *)malloc((size_t)n * 4 * sizeof *x), *s = x + n, *z = s + n, *y = z + n;
    df_point at = df_process_at(&path[i], from);
    draw_panel q = draw_frame(c, 10 + 470 * k, 10 + 300 * i, 460, 292, titles[i][k], range, 5);
    if (x == NULL || df_mixture_sample(ctx, data, &at, o->seed, 0, n, x) != DF_OK) return 1;
    density(&q, i, k == 2);
    for (int j = 0; j < steps; j++, at = df_process_at(&path[i], t += k > 1 ? 0 : k ? -h : h)) {
        df_drift d = drift(&path[i], t, 1, k);
        double u = j / (double)steps, v = u + 1.0 / steps;
        wrong += df_mixture_score(ctx, data, &at, n, x, s) != DF_OK;
        df_random_normal(o->seed, (uint64_t)(100 + i), (uint32_t)(3 * j + k), (size_t)n, z);
        memcpy(y, x, (size_t)n * sizeof *x);
        df_drift_step(ctx, &d, h, (size_t)n, s, z, x);
        for (int r = 0; r < SHOWN && r < n; r++) {
            double line[4] = { k == 1 ? 1 - u : u, y[r], k == 1 ? 1 - v : v, x[r] };
            draw_polyline(&q, line, 2, 2, 1.1, DRAW_PAPER, 1);
        }
    }
    wrong += df_mixture_sample(ctx, data, &at, o->seed + 1, 0, n, y) ||
             df_total_variation(ctx, x, n, y, n, 1, -4, 4, BINS, &error);
    draw_axes(&q, k == 2 ? "Langevin's time" : k ? "t, walked from right to left" : "t", "x");
    free(x);
    return error;
}

int main(int argc, char **argv) {
    static const double weights[2] = { .4, .6 }, means[2] = { -1.3, 1.1 }, vars[2] = { .06, .12 };
    options o = options_defaults(argv[0], "langevin_lens", "", 0, 1000, 4000);
    draw_canvas c;
    o.without = "--data --steps --method --threads --load --save --csv";
    o.counts = "steps of Euler and Maruyama";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    ctx = df_ctx_create(NULL);
    data = df_mixture_create(ctx, 2, 1, weights, means, vars);
    path[0] = df_process_vp(.1, 12), path[1] = df_process_edm(2.2), path[2] = df_process_flow();
    if (data == NULL || draw_open(&c, 1420, 915) != 0) return 1;
    table(), identity_and_duality();
    printf("total variation of particles from p_t where they end: noise, denoise, both\n");
    for (int i = 0; i < PATHS; i++) {
        double off = 0;
        printf("  %-5s", names[i]);
        for (int k = 0; k < 3; k++) {
            double e = particles(&c, i, k, &o);
            printf("  %.3f", e), off = fmax(off, e);
        }
        claim(off < .02 + 1.5 * sqrt(BINS / (3.14159 * o.n)));     // steps, two finite samples
    }
    draw_save(&c, o.picture), draw_close(&c);
    df_mixture_free(data), df_ctx_free(ctx);
    return wrong > 0;
}
