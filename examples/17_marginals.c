// 17_marginals: conditional paths are simple, what a model learns is their mean; the densities
// they make up obey the Fokker-Planck equation.
//
//   You learn    why straight conditional paths give bent trajectories; that a grid, particles
//                and a formula tell one density; how schedules differ; local, global scores.
//   It takes     two seconds.
//   Out come     marginals.png, and each figure beside theory's. Exits 1 if they disagree.
//
//   build/17_marginals [--n N] [--seed N] [--picture FILE]
#define DIFFUSION_DOUBLE
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "draw.h"
#include "line.h"
#include "options.h"

enum { PATHS = 16, STEPS = 200, CELLS = 400, TIMES = 4, WALKS = 1000, BINS = 50 };
static const line_law points = { { 0.5, 0.5 }, { -1, 1 }, { 0, 0 } };
static const line_law bumps = { { 0.35, 0.65 }, { -1.3, 0.7 }, { 0.08, 0.12 } };
static const double times[TIMES] = { 0, 0.1, 0.25, 1 }, edge = 5;
static df_ctx *ctx;
static df_process vp;
static df_point at[TIMES];                       // times on vp
static df_real bent[(STEPS + 1) * PATHS];        // trajectories of the marginal velocity
static double grid[TIMES][CELLS];                // Fokker-Planck's densities
static df_real *particles;                       // [TIMES + 2, n]
static int n, wrong;

// A line of the table, with its verdict.
static void row(const char *what, int j, double found, double theory, double allowed) {
    int bad = !(fabs(found - theory) <= allowed);
    printf("t = %-4g  %-50s %11.4e %11.4e%s\n", times[j], what, found, theory, bad ? "  WRONG" : "");
    wrong += bad;
}

// Trajectories of rectified flow onto two points keep their order, so each stays at its
// quantile of p_t: the largest distance from there up to t = .05, and from the chord.
static void bending(void) {
    df_mixture *two = df_mixture_create(ctx, 2, 1, points.w, points.mean, points.var);
    df_mixture_view view = { two, df_process_flow(), DF_VELOCITY };
    df_model model = df_mixture_model(&view);
    df_sample_desc d = df_sample_defaults();
    double most = 0, bend = 0;
    df_real x[PATHS];
    d.method = "rk4_t", d.steps = STEPS, d.start = DF_START_GIVEN, d.trajectory = bent;
    for (int i = 0; i < PATHS; i++) x[i] = 4.8 * (i + 0.5) / PATHS - 2.4;
    if (df_sample(ctx, &model, &d, x, PATHS) != DF_OK) most = HUGE_VAL;
    for (int k = 0; k < PATHS * STEPS; k++) {
        df_point p = df_process_at(&view.process, 1 - (double)(k / PATHS) / STEPS);
        df_point one = df_process_at(&view.process, 1);
        double F = line_below(&points, bent[k % PATHS], &one), start = bent[k % PATHS];
        double off = (line_below(&points, bent[k], &p) - F) / line_density(&points, bent[k], &p);
        most = fmax(most, p.t > 0.05 ? fabs(off) : 0);
        bend = fmax(bend, fabs(bent[k] - p.t * start - (1 - p.t) * x[k % PATHS]));
    }
    printf("trajectories of the mean velocity bend from their chords by up to %.3f\n", bend);
    row("from the quantiles that they keep, all t > .05", 0, most, 0, 1e-5);
    df_mixture_free(two);
}

// dp/dt = -d/dx (f x p) + g^2/2 d^2p/dx^2 in k finite volumes, explicit Euler with dt below
// dx^2/g^2, error of order dx^2. L1 to the exact shares at `times`. Returns the mass.
static double fokker_planck(int k, double *far) {
    double dx = 2 * edge / k, p[CELLS] = { 0 }, flow[CELLS + 1] = { 0 }, mass = 0;
    int steps = (int)(50 / dx / dx);             // none passes the ends: flow 0
    for (int i = 0; i < k; i++) p[i] = line_share(&bumps, i, k, edge, &at[0]) / dx;
    for (int j = 0, s = 0; j < TIMES; j++) {
        for (; s < (int)(times[j] * steps + 0.5); s++) {
            double beta = vp.a + (vp.b - vp.a) * (s + 0.5) / steps;   // f = -beta/2, g^2 = beta
            for (int i = 1; i < k; i++)
                flow[i] = beta / 2 * ((edge - i * dx) * (p[i - 1] + p[i]) / 2 - (p[i] - p[i - 1]) / dx);
            for (int i = 0; i < k; i++) p[i] -= (flow[i + 1] - flow[i]) / dx / steps;
        }
        far[j] = 0, memcpy(grid[j], p, sizeof p);
        for (int i = 0; i < k; i++)
            far[j] += fabs(p[i] * dx - line_share(&bumps, i, k, edge, &at[j]));
    }
    for (int i = 0; i < k; i++) mass += p[i] * dx;
    return mass;
}

// n particles of the forward SDE by Euler and Maruyama; L1 of their shares in bins, beside
// its mean for exact samples; allowed: once in 10^6 more (McDiarmid), and a bias of 1/WALKS.
static void walk(const df_mixture *data, uint64_t seed) {
    df_real *x = particles + TIMES * n, *z = x + n;
    df_mixture_sample(ctx, data, &at[0], seed, 0, n, x);
    for (int k = 0, j = 0; j < TIMES; j++) {
        double bins[BINS] = { 0 }, far = 0, want = 0;
        for (; k < (int)(times[j] * WALKS + 0.5); k++) {
            double beta = vp.a + (vp.b - vp.a) * (k + 0.5) / WALKS;
            df_random_normal(seed, 1, (uint32_t)k + 1, (size_t)n, z);
            for (int i = 0; i < n; i++) x[i] += sqrt(beta / WALKS) * z[i] - beta / 2 * x[i] / WALKS;
        }
        memcpy(particles + j * n, x, (size_t)n * sizeof *x);
        for (int i = 0; i < n; i++)
            bins[(int)draw_clamp((x[i] / edge + 1) / 2 * BINS, 0, BINS - 1)] += 1.0 / n;
        for (int b = 0; b < BINS; b++) {
            double q = line_share(&bumps, b, BINS, edge, &at[j]);
            far += fabs(bins[b] - q), want += sqrt(2 / LINE_PI * q * (1 - q) / n);
        }
        row("particles: L1 to it, that of exact samples", j, far, want, 5.26 / sqrt(n) + 10.0 / WALKS);
    }
}

static void picture(const char *file) {
    static const double plane[4] = { 0, 1, -2.6, 2.6 }, field[4] = { -2.5, 2.5, -9, 9 };
    static const char *const who[3] = { "of the mixture", "of the left bump", "of the right one" };
    const unsigned colours[3] = { draw_palette(0), draw_palette(1), draw_palette(2) };
    const df_real *rows[TIMES];
    df_real noise[90];
    double y[CELLS];
    draw_canvas c;
    if (draw_open(&c, 1420, 1000) != 0) return;
    draw_panel p = draw_frame(&c, 10, 10, 690, 485, "paths to one point or the other, and those of "
                              "their mean velocity", plane, 5);
    df_random_normal(1, 0, 0, 90, noise);
    for (int i = 0; i < 90; i++) {
        df_real line[4] = { 0, points.mean[i % 2], 1, noise[i] };
        draw_polyline(&p, line, 2, 2, 1.2, draw_palette(i % 2), 0.4);
    }
    for (int i = 0; i < PATHS; i++) {
        for (int j = 0; j <= STEPS; j++) y[j] = bent[(STEPS - j) * PATHS + i];
        line_curve(&p, y, STEPS + 1, 2, DRAW_INK);
    }
    draw_axes(&p, "t", "x");
    for (int j = 0; j < TIMES; j++) rows[j] = particles + j * n;
    p = line_ridges(&c, 715, 10, 690, 485, "p(x, t): particles (bars), a grid (dots), the formula",
                    &bumps, TIMES, rows, n, at, draw_palette(5));
    for (int i = 0; i < CELLS * TIMES; i += 5) {
        df_real dot[2] = { edge * (i % CELLS * 2 + 1) / CELLS - edge, 0 };
        dot[1] = line_base(i / CELLS) + grid[i / CELLS][i % CELLS];
        draw_scatter(&p, dot, 1, 2, 3, draw_palette(3), 1);
    }
    line_schedules(&c, 10, 505, 690, 485);
    p = draw_frame(&c, 715, 505, 690, 485, "score at t = 0.1, global and local", field, 6);
    for (int k = 0; k < 3; k++) {
        for (int i = 0; i < CELLS; i++) {
            double part[2], all = line_score(&bumps, 5.0 * (i + 0.5) / CELLS - 2.5, &at[1], part);
            y[i] = k ? part[k - 1] : all;
        }
        line_curve(&p, y, CELLS, k ? 1.4 : 3, colours[k]);
    }
    draw_axes(&p, "x", ""), draw_legend(&p, 3, who, colours), draw_save(&c, file), draw_close(&c);
}

int main(int argc, char **argv) {
    options o = options_defaults(argv[0], "marginals", "", 0, 0, 20000);
    o.without = "--data --steps --method --threads --load --save --csv --sample-steps --list";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    n = o.n < 1000000 ? o.n : 1000000, ctx = df_ctx_create(NULL), vp = df_process_vp(0.1, 20);
    for (int k = 0; k < TIMES; k++) at[k] = df_process_at(&vp, times[k]);
    double far[2][TIMES], part[2], most = 0;
    df_mixture *data = df_mixture_create(ctx, 2, 1, bumps.w, bumps.mean, bumps.var);
    particles = (df_real *)malloc((TIMES + 2) * (size_t)n * sizeof *particles);
    if (!data || !particles) return fprintf(stderr, "17_marginals: no memory\n"), 1;
    printf("%-60s %11s %11s\n", "", "found", "theory");
    bending();
    row("Fokker-Planck, 200 cells: mass", 3, fokker_planck(CELLS / 2, far[0]), 1, 1e-12);
    row("... 400 cells", 3, fokker_planck(CELLS, far[1]), 1, 1e-12);
    for (int j = 1; j < TIMES; j++)     // of order 2
        row("... L1 to the formula, a quarter of 200 cells'", j, far[1][j], far[0][j] / 4, far[0][j] / 100);
    walk(data, o.seed);
    for (df_real x = -4, s; x < 4; x += 0.1) {
        if (df_mixture_score(ctx, data, &at[1], 1, &x, &s) != DF_OK) most = HUGE_VAL;
        most = fmax(most, fabs(s - line_score(&bumps, x, &at[1], part)));
    }
    row("global score from the mean of local ones", 1, most, 0, 1e-12);
    picture(o.picture), free(particles), df_mixture_free(data), df_ctx_free(ctx);
    return wrong > 0;
}
