// 17_marginals: simple paths, their mean that a model learns, and the densities they make up.
//
//   You learn    why straight conditional paths give bent trajectories; that the Fokker-Planck
//                equation on a grid, particles and a formula tell one density; how schedules
//                differ; that the score is a mean of local ones.
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
static double grid[TIMES][CELLS];                // Fokker-Planck's cells
static df_real *particles;                       // [TIMES + 2, n]
static int n, wrong;

static void row(const char *what, int j, double found, double theory, double allowed) {
    int bad = !(fabs(found - theory) <= allowed);
    printf("t = %-4g  %-50s %11.4e %11.4e", times[j], what, found, theory);
    puts(bad ? "  WRONG" : ""), wrong += bad;
}

// Trajectories of rectified flow onto two points keep their order, so each stays at its
// quantile of p_t: the largest distance from there up to t = .05, and from the chord.
static void bending(void) {
    df_mixture *two = df_mixture_create(ctx, 2, 1, points.w, points.mean, points.var);
    df_mixture_view view = { two, df_process_flow(), DF_VELOCITY };
    df_model model = df_mixture_model(&view);
    df_sample_desc d = df_sample_defaults();
    df_real most = 0, bend = 0, x[PATHS];
    d.method = "rk4_t", d.steps = STEPS, d.start = DF_START_GIVEN, d.trajectory = bent;
    for (int i = 0; i < PATHS; i++) x[i] = 4.8 * (i + 0.5) / PATHS - 2.4;
    if (df_sample(ctx, &model, &d, x, PATHS) != DF_OK) most = HUGE_VAL;
    for (int k = 0; k < PATHS * STEPS; k++) {
        df_point p = df_process_at(&view.process, 1 - (double)(k / PATHS) / STEPS);
        double start = bent[k % PATHS], F = erfc(-start / sqrt(2)) / 2;
        double off = (line_below(&points, bent[k], &p) - F) / line_density(&points, bent[k], &p);
        most = fmax(most, p.t > 0.05 ? fabs(off) : 0);
        bend = fmax(bend, fabs(bent[k] - p.t * start - (1 - p.t) * x[k % PATHS]));
    }
    printf("trajectories bend from their chords by up to %-16.3f   found      theory\n", bend);
    row("their distance from quantiles, all t > .05", 0, most, 0, 1e-5);
    df_mixture_free(two);
}

// dp/dt = -d/dx (f x p) + g^2/2 d^2p/dx^2 in k finite volumes, explicit Euler with dt below
// dx^2/g^2, error of order dx^2. L1 to the formula at `times`. Returns the mass that is lost.
static double fokker_planck(int k, double *far) {
    double dx = 2 * edge / k, flow[CELLS + 1] = { 0 }, p[CELLS] = { 0 }, lost = 1, unused;
    int steps = (int)(50 / dx / dx);             // nothing flows through the ends
    for (int i = 0; i < k; i++)                  // p: what a cell holds
        p[i] = line_below(&bumps, (i + 1) * dx - edge, at) - line_below(&bumps, i * dx - edge, at);
    for (int j = 0, s = 0; j < TIMES; j++) {
        for (; s < (int)(times[j] * steps + 0.5); s++) {
            double c = (vp.a + (vp.b - vp.a) * (s + 0.5) / steps) / 2 / dx;  // beta/(2 dx)
            for (int i = 1; i < k; i++)          // f = -beta/2, g^2 = beta
                flow[i] = c * ((edge - i * dx) / 2 * (p[i - 1] + p[i]) + (p[i - 1] - p[i]) / dx);
            for (int i = 0; i < k; i++) p[i] -= (flow[i + 1] - flow[i]) / steps;
        }
        far[j] = line_l1(&bumps, p, k, edge, &at[j], 1, &unused), memcpy(grid[j], p, sizeof p);
    }
    for (int i = 0; i < k; i++) lost -= p[i];
    return lost;
}

// n particles of the forward SDE by Euler and Maruyama; L1 of their shares in bins, beside
// its mean for exact samples; allowed: once in 10^6 more (McDiarmid), and a bias of 1/WALKS.
static void walk(const df_mixture *data, uint64_t seed) {
    df_real *x = particles + TIMES * n, *z = x + n;
    df_mixture_sample(ctx, data, &at[0], seed, 0, n, x);
    for (int k = 0, j = 0; j < TIMES; j++) {
        double bins[BINS] = { 0 }, want;
        for (; k < (int)(times[j] * WALKS + 0.5); k++) {
            double b = (vp.a + (vp.b - vp.a) * (k + 0.5) / WALKS) / WALKS;   // beta dt
            df_random_normal(seed, 1, (uint32_t)k + 1, (size_t)n, z);
            for (int i = 0; i < n; i++) x[i] += sqrt(b) * z[i] - b / 2 * x[i];
        }
        memcpy(particles + j * n, x, (size_t)n * sizeof *x);
        for (int i = 0; i < n; i++)
            bins[(int)draw_clamp((x[i] / edge + 1) / 2 * BINS, 0, BINS - 1)] += 1.0 / n;
        double far = line_l1(&bumps, bins, BINS, edge, &at[j], n, &want);
        row("particles: L1 to it; of exact samples", j, far, want, 5.26 / sqrt(n) + 10.0 / WALKS);
    }
}

static void picture(const char *file) {
    double plane[4] = { 0, 1, -2.6, 2.6 }, y[STEPS + 1];
    const df_real *rows[TIMES];
    draw_canvas c;
    if (draw_open(&c, 1420, 1000) != 0) return;
    draw_panel p = draw_frame(&c, 10, 10, 690, 485, "paths; black: of their mean", plane, 5);
    for (int i = 0; i < 90; i++) {
        df_real line[4] = { 0, points.mean[i % 2], 1, 0 };
        df_random_normal(1, (uint64_t)i, 0, 1, line + 3);
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
        dot[1] = line_base(i / CELLS) + grid[i / CELLS][i % CELLS] * CELLS / edge / 2;
        draw_scatter(&p, dot, 1, 2, 3, draw_palette(3), 1);
    }
    line_schedules(&c, 10, 505, 690, 485);
    line_scores(&c, 715, 505, 690, 485, &bumps, &at[1]);
    draw_save(&c, file), draw_close(&c);
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
    bending();
    row("Fokker-Planck, 200 cells: mass lost", 3, fokker_planck(CELLS / 2, far[0]), 0, 1e-12);
    row("... 400 cells", 3, fokker_planck(CELLS, far[1]), 0, 1e-12);
    for (int j = 1; j < TIMES; j++)              // of order 2
        row("... L1 to it; 1/4 of 200 cells'", j, far[1][j], far[0][j] / 4, far[0][j] / 100);
    walk(data, o.seed);
    for (df_real x = -4, s; x < 4; x += 0.1) {
        if (df_mixture_score(ctx, data, &at[1], 1, &x, &s) != DF_OK) most = HUGE_VAL;
        most = fmax(most, fabs(s - line_score(&bumps, x, &at[1], part)));
    }
    row("global score from the mean of local ones", 1, most, 0, 1e-12);
    picture(o.picture), free(particles), df_mixture_free(data), df_ctx_free(ctx);
    return wrong > 0;
}
