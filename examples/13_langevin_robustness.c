// 13_langevin_robustness: a score that is wrong where almost nothing lies ruins Langevin dynamics,
// and does nothing to diffusion (Cao, Chen, Sridharan, Wu 2026).
//
//   You learn    to spoil a model on purpose (df_flaw_model), how a well of mass 1e-50 holds every
//                chain that begins in it and how long (e^(c d)), why chains must not begin at the
//                training data, and what Girsanov's theorem promises a reverse SDE.
//   It takes     40 seconds of one core.
//   Out come     langevin_robustness.png and the paper's numbers beside theory's. Exits 1 if fewer
//                than .99 of chains are trapped, fewer than .995 reach the mode by the true score,
//                diffusion under the same error misses the mean by more than the error allows (1 %
//                from d = 5 on), or theorem 7's chains do otherwise than it says.
//
//   build/13_langevin_robustness [--sample-steps N] [--n N] [--seed N] [--picture FILE] [--list]
#include "diffusion.h"
#include "draw.h"
#include "laboratory.h"
#include "options.h"

enum { CHAINS = 400, DIMS = 5, TIMES = 6, POINTS = 200, HIGH = 100 };
static lab l;
static int wrong;
static df_real x[LAB_CHAINS * HIGH], curve[6][2 * TIMES];   // (d, value): see picture

static void claim(int holds) { wrong += !holds, printf(holds ? "\n" : "   WRONG\n"); }

// A ball of mass 1e-3 .. 1e-49 about the origin where the score leads to the origin.
static void theorem_1(const options *o) {
    static const int dims[DIMS] = { 2, 5, 10, 20, 50 };
    printf("theorem 1: N(7, I), score -2 x in |x| < 4 sqrt d; %d chains from N(0, I), time 30\n"
           "   d   its mass  error eps  trapped  exact score reaches  diffusion's mean/7, TV <\n",
           CHAINS);
    for (int k = 0; k < DIMS; k++) {
        int d = dims[k];
        double mean = 0, mass, eps = lab_ball(d, 1, &mass), root = sqrt(d), out[2];
        df_sample_desc s = df_sample_defaults();
        lab_set(&l, d, df_process_edm(.1), 7, .99, 2, 4, 5);        // p_t = N(7, I)
        for (int exact = 0; exact < 2; exact++) {
            df_random_normal(o->seed, 1, (uint32_t)k, (size_t)(CHAINS * d), x);
            l.far = (exact ? 5 : 4) * root, l.patient = !exact;
            out[exact] = lab_langevin(&l, exact ? &l.truth : &l.flawed, x, CHAINS, 3000, .01, 1);
        }
        lab_set(&l, d, df_process_vp(.1, 20), 7, 1, 2, 4, 5);       // ... at most eps at each t
        l.flaw.norm = lab_ball_at, l.flaw.user = &l, l.flaw.limit = eps;
        s.method = "ddpm", s.grid = "lambda", s.steps = o->sample_steps, s.end = DF_END_T_MIN;
        s.seed = o->seed;
        wrong += df_sample(l.ctx, &l.flawed, &s, x, o->n) != DF_OK;
        for (int i = 0; i < o->n * d; i++) mean += (double)x[i] / (7.0 * o->n * d);
        double bound = fmin(1, sqrt(eps * eps * 10.05 / 4));        // Girsanov, Pinsker
        printf("  %2d  %9.1e  %9.1e  %7.4f  %19.4f  %18.4f, %.1e", d, mass, eps, 1 - out[0], out[1],
               mean, bound);
        claim(out[0] <= .01 && out[0] >= 0 && out[1] >= .995 &&
              fabs(mean - 1) < fmax(.01, 2 * eps / (7 * root)));
        double y[4] = { 1 - out[0] - mass, bound, eps, mass };      // the ball tells them apart
        for (int i = 0; i < 4; i++)
            curve[i][2 * k] = (df_real)d, curve[i][2 * k + 1] = (df_real)log10(y[i]);
    }
}

// How long a smaller well holds: e^(c d). Steps see the edge .58 of their noise too late.
static void escape_times(void) {
    printf("time to 1.1 sqrt d in a well, c = (a - 1 - log a)/2 = .27, a = 2 1.1^2: theory\n");
    for (int k = 0; k < TIMES; k++) {
        int d = 2 * k + 2;
        double h = .005, R = 1.1 * sqrt(d), want = lab_escape(d, R + .5826 * sqrt(2 * h)), sum = 0;
        lab_set(&l, d, df_process_edm(.1), 7, .99, 2, 1.3, 1.7);
        memset(x, 0, sizeof x);
        l.far = R, l.patient = 0;
        wrong += lab_langevin(&l, &l.flawed, x, CHAINS, 100000, h, 2) < 1;
        for (int i = 0; i < CHAINS; i++) sum += h * ((double)l.out[i] - 1) / CHAINS;
        printf("  d %2d: %6.2f  %6.2f; to 4 sqrt d %.0e", d, sum, want, lab_escape(d, 4 * sqrt(d)));
        claim(fabs(sum / want - 1) < .25);                          // 5 standard errors
        curve[4][2 * k] = curve[5][2 * k] = (df_real)d;
        curve[4][2 * k + 1] = (df_real)sum, curve[5][2 * k + 1] = (df_real)want;
    }
}

// N(0, I) in 100 dimensions, wells at the training data alone: memorised.
static void theorem_7(const options *o) {
    static df_real points[POINTS * HIGH], from[CHAINS * HIGH];
    static const char *const starts[3] = { "training data", "fresh data", "N(0, 2 I)" };
    printf("theorem 7: N(0, I), d = 100, 200 memorised points; by start, time 1\n");
    df_random_normal(o->seed, 2, 0, POINTS * HIGH, points);
    lab_set(&l, HIGH, df_process_edm(.1), 0, .99, 1000, .12, .16);
    l.flaw.points = points, l.flaw.count = POINTS, l.patient = 1;
    for (int k = 0; k < 3; k++) {
        int n = k == 1 ? CHAINS : k ? 100 : POINTS, trapped = 0;
        double corr = 0, want = k == 1 ? exp(-1) : k ? 1 / sqrt(1 + .5 * (exp(2) - 1)) : 1;
        df_random_normal(o->seed, (uint64_t)(3 + k), 0, (size_t)n * HIGH, from);
        for (int i = 0; k == 2 && i < n * HIGH; i++) from[i] *= (df_real)sqrt(2);
        if (k == 0) memcpy(from, points, sizeof points);
        memcpy(x, from, sizeof from);
        wrong += lab_langevin(&l, &l.flawed, x, n, 5000, 2e-4, o->seed) < 0;
        for (int i = 0; i < n; i++) {
            double s[4] = { 0, 0, 1e-9, 1e9 };
            for (int p = 0; p < POINTS; p++, s[0] = 0) {
                for (int j = 0; j < HIGH; j++)
                    s[0] += pow((double)x[i * HIGH + j] - (double)points[p * HIGH + j], 2);
                s[3] = fmin(s[3], s[0]);
            }
            trapped += s[3] <= .16 * .16 * HIGH;
            for (int j = 0; j < HIGH; j++) {
                double a = (double)x[i * HIGH + j], b = (double)from[i * HIGH + j];
                s[0] += a * b, s[1] += a * a, s[2] += b * b;
            }
            corr += s[0] / sqrt(s[1] * s[2]) / n;
        }
        printf("  %-13s: trapped %3d of %3d, correlation with the start %.3f, theory %.3f",
               starts[k], trapped, n, corr, want);
        claim(trapped == (k ? 0 : n) && fabs(corr - want) < .03);
    }
}

int main(int argc, char **argv) {
    static const char *const names[6] = { "Langevin dynamics: TV at least",
        "diffusion: TV at most", "error of the score, L2", "mass of the ball",
        "Langevin dynamics", "theory" };
    const unsigned colours[6] = { draw_palette(3), draw_palette(1), draw_palette(0),
                                  draw_palette(2), draw_palette(3), DRAW_TEXT };
    double range[4] = { 0, 52, -52, 22 }, times[4] = { 0, 13, .3, 30 };
    options o = options_defaults(argv[0], "langevin_robustness", "", 0, 60, 4000);
    draw_canvas c;
    o.without = "--data --steps --method --threads --load --save --csv";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    if (o.n > LAB_CHAINS) o.n = LAB_CHAINS;
    l.ctx = df_ctx_create(NULL);
    if (l.ctx == NULL || draw_open(&c, 1200, 460) != 0) return 1;
    theorem_1(&o), escape_times(), theorem_7(&o);
    draw_panel q = draw_frame(&c, 10, 10, 680, 440, "theorem 1: powers of ten", range, 6);
    for (int i = 0; i < 4; i++) {
        draw_polyline(&q, curve[i], DIMS, 2, i == 1 ? 5 : 2, colours[i], i == 1 ? .5 : 1);
        draw_scatter(&q, curve[i], DIMS, 2, 3.5, colours[i], 1);
    }
    draw_axes(&q, "d", "log10"), draw_legend(&q, 4, names, colours);
    q = draw_frame_log(&c, 700, 10, 490, 440, "time to leave a small well", times, 6, 0, 1);
    draw_polyline(&q, curve[5], TIMES, 2, 1.5, DRAW_TEXT, 1);
    draw_scatter(&q, curve[4], TIMES, 2, 3.5, colours[4], 1);
    draw_axes(&q, "d", "time"), draw_legend(&q, 2, names + 4, colours + 4);
    draw_save(&c, o.picture), draw_close(&c);
    df_ctx_free(l.ctx);
    return wrong > 0;
}
