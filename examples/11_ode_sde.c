// 11_ode_sde: one family, dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dW, from the ODE
// (eta = 0) to the reverse SDE (1) and beyond.
//
//   You learn    that all eta have the same marginals at every t, though paths differ: smooth
//                ones for 0, then rougher and rougher; and that noise forgets a wrong start,
//                on data N(0, C) by ((C + rho_0^2)/(C + rho_1^2))^(eta^2/2), rho =
//                sigma/alpha, while the ODE carries it to the end.
//   It takes     five seconds.
//   Out come     ode_sde.png, and distances to the exact marginals, roughness of paths, and
//                what is left of a wrong start, beside theory's. Exits 1 if they disagree.
//
//   build/11_ode_sde [--sample-steps N] [--n N] [--seed N] [--picture FILE] [--list]
#define DIFFUSION_DOUBLE
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "draw.h"
#include "options.h"

enum { ETAS = 4, TIMES = 4, PATHS = 7, CELLS = 160, BINS = 80 };
static const double etas[ETAS] = { 0, 0.5, 1, 2 }, times[TIMES] = { 0, 0.1, 0.25, 1 };
static const double w[2] = { 0.35, 0.65 }, mu[2] = { -1.3, 0.7 }, var[2] = { 0.08, 0.12 };
static const double C = 0.04, shift = 1, valley = -0.45;
static const char *const names[ETAS] = { "eta = 0: the ODE", "eta = 0.5",
                                         "eta = 1: the reverse SDE", "eta = 2" };
static df_ctx *ctx;
static df_process path;
static int n, steps;
static df_real *walks[ETAS], *pushed[ETAS], *quiet[ETAS], *finer[ETAS]; // [steps + 1, rows]

static int silence(void *user, const df_noise_query *q, df_real *out) {
    (void)user;
    memset(out, 0, (size_t)q->n * (size_t)q->dim * sizeof *out);
    return 0;
}
// rows samples of p_1, moved by `from`, walk to the data; one alone starts at `from` and
// meets no noise. Their path, or NULL.
static df_real *walk(const df_mixture *data, double eta, double from, int rows, int N,
                     uint64_t seed) {
    df_mixture_view view = { data, path, DF_X0 };
    df_model model = df_mixture_model(&view);
    df_sample_desc d = df_sample_defaults();
    df_point one = df_process_at(&path, 1);
    size_t points = (size_t)N + 1, size = (size_t)rows;
    df_real *all = (df_real *)malloc((points + 1) * size * sizeof *all);
    if (all == NULL) return NULL;
    df_real *x = all + points * size;
    d.method = "dpmpp_2m_sde", d.eta = eta, d.eta_in = DF_ETA_FAMILY, d.steps = N;
    d.start = DF_START_GIVEN, d.seed = seed + 1, d.trajectory = all;
    if (rows == 1) d.noise.fill = silence;
    df_result result = df_mixture_sample(ctx, data, &one, seed, 0, rows, x);
    for (int i = 0; i < rows; i++) x[i] = rows > 1 ? x[i] + from : from;
    if (result == DF_OK && df_sample(ctx, &model, &d, x, rows) == DF_OK) return all;
    free(all);
    return NULL;
}

// P(x_t < x) and the density, exactly.
static double law(double x, double t, int density) {
    df_point p = df_process_at(&path, t);
    double sum = 0;
    for (int k = 0; k < 2; k++) {
        double v = p.alpha * p.alpha * var[k] + p.sigma * p.sigma, d = x - p.alpha * mu[k];
        sum += w[k] * (density ? exp(-d * d / v / 2) / sqrt(2 * DFI_PI * v)
                               : erfc(-d / sqrt(2 * v)) / 2);
    }
    return sum;
}
static const df_real *row_at(const df_real *all, double t) {
    return all + (size_t)(steps * (1 - t) + 0.5) * (size_t)n;
}
// W_1 of x [n] to the law at t: the integral of |F_n - F|. *want: its mean if x is drawn from
// the law, n large.
static double distance(const df_real *x, double t, double *want) {
    enum { GRID = 4000 };
    static int count[GRID];
    const double h = 12.0 / GRID;
    double sum = *want = 0, seen = 0;
    memset(count, 0, sizeof count);
    for (int i = 0; i < n; i++) count[(int)draw_clamp(ceil((x[i] + 6) / h), 0, GRID - 1)]++;
    for (int k = 0; k < GRID; k++) {
        double F = law(k * h - 6, t, 0);
        seen += count[k];
        sum += h * fabs(seen / n - F), *want += h * sqrt(2 / DFI_PI * F * (1 - F) / n);
    }
    return sum;
}

// What theory says is left at t of a start wrong by `shift`, data N(0, C).
static double left_at(double t, double eta) {
    df_point a = df_process_at(&path, t), b = df_process_at(&path, 1);
    double c = C + pow(a.sigma / a.alpha, 2), c1 = C + pow(b.sigma / b.alpha, 2);
    return shift * a.alpha / b.alpha * pow(c / c1, (1 + eta * eta) / 2);
}

static int numbers(void) {
    double want, start = -4;
    int wrong = 0;
    while (law(start, 1, 0) < law(valley, 0, 0)) start += 1e-4; // the ODE ends in the valley
    printf("%d steps, %d samples; theory below. W1 to the exact law; sum of squared steps; of a\n"
           "start wrong by %g: what is left on data N(0, %g), and the share right of the valley\n"
           " eta  W1, t = 0 t = 0.1  t = 0.25   t = 1    steps^2     left       share\n",
           steps, n, shift, C);
    for (int e = 0; e < ETAS; e++) {
        double e2 = etas[e] * etas[e], h = path.b / steps / 2, sum = 0, noise = 0, right = 0;
        double left = quiet[e][steps], less = finer[e][4 * steps], theory = left_at(0, etas[e]);
        double share = 1 - (e ? law(valley, 0, 0) : law(start - shift, 1, 0));
        int bad = 0;
        printf("%4g", etas[e]);
        for (int k = 0; k < TIMES; k++) { // exact samples: not once in 10^7 times above this
            double far = distance(row_at(walks[e], times[k]), times[k], &want);
            bad |= far > want + 5.8 * 1.2 / sqrt(n); // 1.2: above p_t's deviation
            printf("%10.4f", far);
        }
        for (int j = 0; j < steps; j++) {
            df_point s = df_process_at(&path, 1 - (double)j / steps);
            df_point t = df_process_at(&path, 1 - (j + 1.0) / steps);
            const df_real *x = walks[e] + (size_t)j * (size_t)n;
            for (int i = 0; i < n; i++) sum += pow(x[n + i] - x[i], 2) / n;
            if (j + 1 < steps) noise -= t.sigma * t.sigma * expm1(-2 * e2 * (t.lambda - s.lambda));
        }
        // drift adds its square: of noise, eta^2 h parts; of data, what the ODE has
        bad |= sum < 0.98 * noise || sum > 1.02 * noise * (1 + e2 * h) + 5.0 / steps;
        bad |= !(fabs(log(less / theory)) < fabs(log(left / theory)) / 3 + 1e-9); // order 1, 2
        for (int i = 0; i < n; i++) right += (double)(row_at(pushed[e], 0)[i] > valley) / n;
        bad |= e != 1 && fabs(right - share) > 5.8 * sqrt(share * (1 - share) / n) + 1.0 / steps;
        printf("%11.4f %12.4e%9.4f%s\n    ", sum, left, right, bad ? "  WRONG" : "");
        for (int k = 0; k < TIMES; k++) distance(walks[e], times[k], &want), printf("%10.4f", want);
        printf("%11.4f %12.4e", noise, theory);
        if (e == 1) printf("   (between)\n");
        else printf("%9.4f\n", share);
        wrong += bad;
    }
    return wrong;
}

// A histogram of x [n] on the line y = base, and the exact density at t over it.
static void ridge(const draw_panel *p, const df_real *x, double t, double base, unsigned colour) {
    double bins[BINS] = { 0 }, width = (p->range[1] - p->range[0]) / BINS, y0 = draw_py(p, base);
    df_real curve[2 * CELLS];
    for (int i = 0; i < n; i++) {
        double at = (x[i] - p->range[0]) / width;
        if (at >= 0 && at < BINS) bins[(int)at] += 1 / (n * width);
    }
    for (int k = 0; k < BINS; k++) {
        double top = draw_py(p, base + bins[k]), from = draw_px(p, p->range[0] + k * width);
        draw_rect(p->c, from, top, draw_px(p, p->range[0] + (k + 1) * width) - from, y0 - top,
                  colour, 0.45);
    }
    for (int k = 0; k < CELLS; k++) {
        curve[2 * k] = p->range[0] + (p->range[1] - p->range[0]) * (k + 0.5) / CELLS;
        curve[2 * k + 1] = base + law(curve[2 * k], t, 1);
    }
    draw_polyline(p, curve, CELLS, 2, 1.6, DRAW_INK, 1);
}

static void picture(const char *file) {
    static df_real heat[CELLS * CELLS];
    df_real *line = (df_real *)malloc(2 * ((size_t)steps + 1) * sizeof *line);
    const double field[4] = { 0, 1, -2.8, 2.8 }, stack[4] = { -2.8, 2.8, -0.05, 3.9 };
    const double pair[4] = { -2.8, 2.8, 0, 1.45 }, fall[4] = { 0, 1, 1e-13, 3 };
    unsigned colours[ETAS];
    draw_canvas c;
    char text[40];
    if (line == NULL || draw_open(&c, 1500, 1130) != 0) return free(line);
    for (int k = 0; k < CELLS * CELLS; k++)
        heat[k] = law(-2.8 + 5.6 * (k / CELLS + 0.5) / CELLS, (k % CELLS + 0.5) / CELLS, 1);
    draw_panel last = draw_frame_log(&c, 10, 770, 735, 350, "what is left of a wrong start, data "
                                     "N(0, 0.04): found, and theory (dots)", fall, 7, 0, 1);
    for (int e = 0; e < ETAS; e++) {
        colours[e] = draw_palette(e);
        draw_panel p = draw_frame(&c, 10 + 372 * e, 10, 364, 375, names[e], field, 5);
        draw_heat(&p, heat, CELLS, CELLS, 0, 0.8);
        for (int i = 0; i <= PATHS; i++) { // the last: the wrong start, for below
            for (int j = 0; j <= steps; j++) {
                line[2 * j] = 1 - (double)j / steps;
                line[2 * j + 1] = i < PATHS ? walks[e][(size_t)j * (size_t)n + (size_t)i] : quiet[e][j];
            }
            draw_polyline(i < PATHS ? &p : &last, line, steps + 1, 2, i < PATHS ? 1.2 : 2,
                          i < PATHS ? DRAW_PAPER : colours[e], 0.95);
        }
        if (e == 0) draw_axes(&p, "t", "x");
        for (int k = 0; k <= 20; k++)
            draw_disc(&c, draw_px(&last, k / 20.0), draw_py(&last, left_at(k / 20.0, etas[e])), 3.2,
                      colours[e], 1);
        p = draw_frame(&c, 10 + 372 * e, 395, 364, 365, "its marginals, and the exact density", stack, 0);
        for (int k = 0; k < TIMES; k++) {
            snprintf(text, sizeof text, "t = %g", times[k]);
            ridge(&p, row_at(walks[e], times[k]), times[k], k ? k + 0.35 : 0, colours[e]);
            draw_text(&c, p.x + 8, draw_py(&p, (k ? k + 0.35 : 0) + 0.16), text, 9, 0, 1, DRAW_TEXT);
        }
        if (e % 2) continue;
        snprintf(text, sizeof text, "start moved by %g: eta = %g", shift, etas[e / 2 * 2]);
        p = draw_frame(&c, 754 + 372 * (e / 2), 770, 364, 350, text, pair, 5);
        ridge(&p, row_at(pushed[e], 0), 0, 0, colours[e]);
    }
    draw_axes(&last, "t", "");
    draw_legend(&last, ETAS, names, colours);
    draw_save(&c, file), draw_close(&c), free(line);
}

int main(int argc, char **argv) {
    options o = options_defaults(argv[0], "ode_sde", "", 0, 300, 8000);
    o.without = "--data --steps --method --threads --load --save --csv";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    const double unit = 1, zero = 0;
    int wrong = o.sample_steps < 50 || (double)o.n * o.sample_steps > 2e7;
    n = o.n, steps = o.sample_steps;
    ctx = df_ctx_create(NULL), path = df_process_vp(0.1, 20);
    df_mixture *bumps = df_mixture_create(ctx, 2, 1, w, mu, var);
    df_mixture *gauss = df_mixture_create(ctx, 1, 1, &unit, &zero, &C);
    progress_bar bar = progress_begin("walking");
    for (int e = 0; e < ETAS && !wrong; e++) {
        walks[e] = walk(bumps, etas[e], 0, n, steps, o.seed);
        pushed[e] = walk(bumps, etas[e], shift, n, steps, o.seed + 2);
        quiet[e] = walk(gauss, etas[e], shift, 1, steps, 0);
        finer[e] = walk(gauss, etas[e], shift, 1, 4 * steps, 0);
        wrong = !walks[e] || !pushed[e] || !quiet[e] || !finer[e];
        progress(&bar, e + 1, ETAS, "eta", etas[e]);
    }
    if (wrong) fprintf(stderr, "11_ode_sde: %s\n", df_ctx_error(ctx) ? df_ctx_message(ctx)
                       : "from 50 steps on; no memory for so many");
    else wrong = numbers(), picture(o.picture);
    for (int e = 0; e < ETAS; e++) free(walks[e]), free(pushed[e]), free(quiet[e]), free(finer[e]);
    df_mixture_free(bumps), df_mixture_free(gauss), df_ctx_free(ctx);
    return wrong > 0;
}
