// Sampling: the machine and what is random or odd in it. Langevin dynamics, predictor-
// corrector, restarts and learned variances by exact moments; every row bit for bit however
// a batch is cut; a sweep for silent NaN; noise sources; published constants of diffusers'
// own tests; adaptive and parallel methods; hooks, errors, memory.
#include "diffusion.h"
#include "golden.h"
#include "test.h"
#include "counting.h"

#define SHARP (sizeof(df_real) == 8)
enum { ANY = 6 }; // standard errors allowed: a false alarm in 5e8

static df_ctx *ctx;
static double tol(double of_double, double of_float) {
    return SHARP ? of_double : of_float;
}

// ---- models ----

// Independent elements N(mean, var): every row of the plane, its JVP and the log density.
typedef struct gauss {
    double mean, var;
    df_prediction prediction;
    int calls, rows;
} gauss;
static int gauss_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    gauss *g = (gauss *)self;
    (void)c;
    g->calls++;
    g->rows += q->n;
    for (int i = 0; i < q->n; i++) {
        double a = q->alpha[i], s = q->sigma[i], V = a * a * g->var + s * s, row[2], x0,
               eps;
        const df_real *x = q->x + (size_t)i * (size_t)q->dim;
        int density = q->ask == DF_ASK_LOG_DENSITY;
        row[0] = g->prediction == DF_X0 ? 1 : g->prediction == DF_V ? -s : 0;
        row[1] = g->prediction == DF_EPS ? 1 : g->prediction == DF_V ? a : 0;
        if (g->prediction == DF_SCORE) row[1] = -1 / s;
        if (density) out[i] = 0;
        for (int j = 0; j < q->dim; j++) {
            double e = (double)x[j] - a * g->mean;
            if (q->ask == DF_ASK_MAP) { // the flow keeps (x - mean)/deviation
                double b = q->alpha_to[i],
                       W = b * b * g->var + q->sigma_to[i] * q->sigma_to[i];
                out[i * q->dim + j] = (df_real)(b * g->mean + sqrt(W / V) * e);
                continue;
            }
            if (q->ask == DF_ASK_JVP)
                e = (double)q->v[(size_t)i * (size_t)q->dim + (size_t)j];
            if (density) {
                out[i] -= (df_real)(.5 * e * e / V + .5 * log(2 * 3.14159265358979 * V));
                continue;
            }
            x0 = a * g->var / V * e + (q->ask == DF_ASK_JVP ? 0 : g->mean);
            eps = s * e / V;
            out[(size_t)i * (size_t)q->dim + (size_t)j] =
                (df_real)(row[0] * x0 + row[1] * eps);
        }
    }
    return 0;
}
static df_model gauss_model(gauss *g, double mean, double var, df_process p,
                            df_prediction prediction, int dim) {
    df_model m = df_model_defaults();
    memset(g, 0, sizeof *g);
    g->mean = mean;
    g->var = var;
    g->prediction = prediction;
    m.predict = gauss_predict;
    m.self = g;
    m.dim = dim;
    m.process = p;
    m.prediction = prediction;
    m.answers = DF_ASK_PREDICT | DF_ASK_JVP | DF_ASK_LOG_DENSITY | DF_ASK_MAP;
    return m;
}

// The mixture of golden.h behind DF_X0 or DF_V.
typedef struct mix {
    golden_mixture g;
    df_prediction prediction;
    int calls;
} mix;
static int mix_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    mix *m = (mix *)self;
    (void)c;
    m->calls++;
    for (int i = 0; i < q->n; i++) {
        double x[GOLDEN_DIM], x0[GOLDEN_DIM], a = q->alpha[i], s = q->sigma[i];
        for (int j = 0; j < q->dim; j++) x[j] = (double)q->x[i * q->dim + j];
        golden_posterior(&m->g, a, s, x, x0);
        for (int j = 0; j < q->dim; j++)
            out[i * q->dim + j] =
                (df_real)(m->prediction == DF_X0 ? x0[j]
                                                 : a * (x[j] - a * x0[j]) / s - s * x0[j]);
    }
    return 0;
}
static df_model mix_model(mix *m, df_process p, df_prediction prediction) {
    df_model model = df_model_defaults();
    memset(m, 0, sizeof *m);
    m->g = golden_gm2();
    m->prediction = prediction;
    model.predict = mix_predict;
    model.self = m;
    model.dim = 2;
    model.process = p;
    model.prediction = prediction;
    return model;
}

static df_process table_process(int T, double b0, double b1) {
    static double betas[1100];
    df_process p = df_process_vp(.1, 20);
    df_betas(ctx, DF_BETAS_LINEAR, b0, b1, T, betas);
    expect(df_process_table(ctx, betas, T, &p) == DF_OK);
    return p;
}

// df_sample, which must succeed.
static int sample(df_ctx *c, const df_model *m, const df_sample_desc *d, df_real *x,
                  int n) {
    return check(df_sample(c, m, d, x, n) == DF_OK, "%s: %s", d->method,
                 df_ctx_message(c));
}

// ---- exact moments: an affine sampler fed with unit impulses ----

// Sample 0 gets no noise at all, sample j > 0 a one in draw j - 1: N draws, N + 1 samples.
static int impulse(void *user, const df_noise_query *q, df_real *out) {
    int *draws = (int *)user;
    if ((int)q->draw >= *draws) *draws = (int)q->draw + 1;
    for (int i = 0; i < q->n; i++) out[i] = (df_real)(i == (int)q->draw + 1);
    return 0;
}
typedef struct moment {
    double mean, var;
} moment;
// Mean and variance of a one-dimensional result with at most n - 1 draws; a given start is
// `start` for all.
static moment moments(df_sample_desc d, const df_model *m, int n, double start) {
    df_real *x = (df_real *)malloc((size_t)n * sizeof *x);
    moment got = {0, 0};
    int draws = 0;
    d.noise.fill = impulse;
    d.noise.user = &draws;
    for (int i = 0; i < n; i++) x[i] = (df_real)start;
    sample(ctx, m, &d, x, n);
    check(draws < n, "%s: %d draws for %d samples", d.method, draws, n);
    got.mean = (double)x[0];
    for (int j = 1; j < n; j++)
        got.var += ((double)x[j] - got.mean) * ((double)x[j] - got.mean);
    free(x);
    return got;
}

// ---- Langevin dynamics: the clock stopped ----

static df_sample_desc stopped(const char *method, int steps, double h) {
    df_sample_desc d = df_sample_defaults();
    d.method = method;
    d.steps = steps;
    d.t_max = .5;
    d.langevin_step = h;
    d.start = DF_START_GIVEN;
    return d;
}

TEST(langevin_is_unadjusted) {
    // N(0, 1) on VP is N(0, 1) at every t; N(.7, .04) is N(.7 alpha, V).
    df_process p = df_process_vp(.1, 20);
    df_point at = df_process_at(&p, .5);
    double h = .5, V = at.alpha * at.alpha * .04 + at.sigma * at.sigma, var = 0, mean = 3;
    df_sample_desc d = stopped("langevin", 120, h);
    gauss g;
    df_model m = gauss_model(&g, 0, 1, p, DF_EPS, 1);
    moment got = moments(d, &m, 130, 3);
    near(got.var, 1 / (1 - h / 2), tol(1e-10, 1e-5));
    near_abs(got.mean, 0, 1e-10);
    expect(g.calls == 120);
    for (int k = 1; k <= 3; k++) { // on the way there
        d.steps = k;
        got = moments(d, &m, 10, 3);
        var = (1 - h) * (1 - h) * var + 2 * h;
        mean *= 1 - h;
        near(got.var, var, tol(1e-13, 1e-6));
        near(got.mean, mean, tol(1e-13, 1e-6));
    }
    // its own step is 2 r^2 sigma^2
    m = gauss_model(&g, .7, .04, p, DF_X0, 1);
    d = stopped("langevin", 900, 0);
    d.snr = .3;
    got = moments(d, &m, 910, 3);
    near(got.var, V / (1 - .09 * at.sigma * at.sigma / V), tol(1e-10, 1e-5));
    near(got.mean, .7 * at.alpha, tol(1e-10, 1e-5));
    // noise_scale counts: variance times its square
    d.noise_scale = .5;
    got = moments(d, &m, 910, 3);
    near(got.var, .25 * V / (1 - .09 * at.sigma * at.sigma / V), tol(1e-10, 1e-5));
}

TEST(baoab_has_no_bias_in_x) {
    static const double steps[3] = {.5, 1.5, 1};
    static const double frictions[3] = {1, 1, .3};
    df_process p = df_process_vp(.1, 20);
    gauss g;
    df_model m = gauss_model(&g, 0, 1, p, DF_V, 1);
    for (int k = 0; k < 3; k++) {
        df_point at = df_process_at(&p, .5); // where `stopped` stands
        double h = steps[k], c = exp(-frictions[k] * h / at.sigma);
        df_sample_desc d = stopped("baoab", 200, h);
        // variances and covariance of x and p, from p = N(0, 1): by hand
        double xx = 0, xp = 0, pp = 1;
        moment got;
        d.friction = frictions[k];
        got = moments(d, &m, 210, 2);
        near(got.var, 1, tol(1e-10, 2e-5));
        near_abs(got.mean, 0, tol(1e-10, 1e-6));
        for (int step = 1; step <= 4; step++) {
            double kick = step == 1 ? h / 2 : h, drift = h / 2 * (1 + c), f;
            d.steps = step;
            got = moments(d, &m, 10, 2);
            pp += -2 * kick * xp + kick * kick * xx; // p -= kick x
            xp -= kick * xx;
            f = sqrt(1 - c * c); // x += drift p + h/2 f z; p = c p + f z
            xx += 2 * drift * xp + drift * drift * pp + h * h / 4 * f * f;
            xp = c * (xp + drift * pp) + h / 2 * f * f;
            pp = c * c * pp + f * f;
            near(got.var, xx, tol(1e-13, 1e-6));
        }
    }
    { // its own step is sqrt 2 r sigma: one step from x = 1 without noise
        df_point at = df_process_at(&p, .5);
        double h = sqrt(2.0) * .16 * at.sigma;
        moment got = moments(stopped("baoab", 1, 0), &m, 10, 1);
        near(got.mean, 1 - h / 2 * h / 2 * (1 + exp(-h / at.sigma)), tol(1e-14, 1e-6));
    }
}

// Mean of f over samples is `want` for a variable of standard deviation `deviation`.
static void mean_is(const char *what, double sum, int n, double want, double deviation) {
    double z = (sum / n - want) / deviation * sqrt((double)n);
    check(fabs(z) < ANY, "%s: %g, want %g: %.1f standard errors", what, sum / n, want, z);
}

TEST(mala_is_exact) {
    enum { N = 40000 };
    static df_real x[N];
    int n = test_short() ? 4000 : N;
    gauss g;
    df_model m = gauss_model(&g, 0, 1, df_process_vp(.1, 20), DF_SCORE, 1);
    for (int far = 0; far < 2; far++) {
        // h = 1.5: without the test the variance would become 4
        df_sample_desc d = stopped("mala", far ? 60 : 8, 1.5);
        double sum[4] = {0, 0, 0, 0};
        d.seed = 11 + (uint64_t)far;
        for (int i = 0; i < n; i++) {
            df_random_normal(1234, (uint64_t)i, 0, 1, &x[i]);
            if (far) x[i] = 3;
        }
        g.calls = 0;
        sample(ctx, &m, &d, x, n);
        expect(g.calls == 4 * d.steps);
        for (int i = 0; i < n; i++) {
            double v = (double)x[i];
            sum[0] += v;
            sum[1] += v * v;
            sum[2] += v * v * v * v;
            sum[3] += fabs(v) < .5;
        }
        mean_is("x", sum[0], n, 0, 1);
        mean_is("x^2", sum[1], n, 1, sqrt(2.0));
        mean_is("x^4", sum[2], n, 3, sqrt(96.0));
        mean_is("|x| < .5", sum[3], n, erf(.5 / sqrt(2.0)), .486);
    }
}

TEST(mala_on_a_mixture) {
    enum { N = 12000 };
    static df_real x[2 * N], y[2 * N];
    int n = test_short() ? 1500 : N;
    golden_mixture gm = golden_gm2();
    double cov[12];
    df_process p = df_process_vp(.1, 20);
    df_point at = df_process_at(&p, .25);
    df_sample_desc d = stopped("mala", 12, .35);
    df_mixture_view view;
    df_mixture *made;
    df_model m;
    for (int k = 0; k < 3; k++) memcpy(cov + 4 * k, gm.cov[k], 4 * sizeof(double));
    {
        double mean[6] = {2, 0, -1, 1.5, 0, -2};
        made = df_mixture_create(ctx, 3, 2, gm.w, mean, cov);
    }
    view.mixture = made;
    view.process = p;
    view.prediction = DF_EPS;
    m = df_mixture_model(&view);
    d.t_max = .25;
    for (int far = 0; far < 2; far++) {
        double a[6] = {0, 0, 0, 0, 0, 0}, b[6] = {0, 0, 0, 0, 0, 0}, aa[6], bb[6];
        memset(aa, 0, sizeof aa);
        memset(bb, 0, sizeof bb);
        expect(df_mixture_sample(ctx, made, &at, 5, 0, n, y) == DF_OK);
        expect(df_mixture_sample(ctx, made, &at, 6, 0, n, x) == DF_OK);
        for (int i = 0; far && i < 2 * n; i++) x[i] = (df_real)(i % 2 ? -2.5 : 2.5);
        d.steps = far ? 150 : 12;
        if (far && test_short()) break;
        sample(ctx, &m, &d, x, far ? n / 6 : n);
        for (int who = 0; who < 2; who++) {
            int count = who == 0 && far ? n / 6 : n;
            for (int i = 0; i < count; i++) {
                double u = (double)(who ? y : x)[2 * i],
                       v = (double)(who ? y : x)[2 * i + 1];
                double f[6];
                f[0] = u;
                f[1] = v;
                f[2] = u * u;
                f[3] = v * v;
                f[4] = u > .5 && v < .5; // one component's place
                f[5] = u * v;
                for (int k = 0; k < 6; k++) {
                    (who ? b : a)[k] += f[k] / count;
                    (who ? bb : aa)[k] += f[k] * f[k] / count;
                }
            }
        }
        for (int k = 0; k < 6; k++) { // two samples; the chain's own is n or n / 6
            double se =
                (aa[k] - a[k] * a[k]) / (far ? n / 6 : n) + (bb[k] - b[k] * b[k]) / n;
            check(fabs(a[k] - b[k]) < ANY * sqrt(se),
                  "far %d, f%d: %g, exact sample %g, se %g", far, k, a[k], b[k], sqrt(se));
        }
    }
    df_mixture_free(made);
}

TEST(annealed_langevin_as_published) {
    // Song & Ermon: 50 levels 10 .. .01, 100 steps a level, epsilon 2e-5; data N(0, .25)
    enum { L = 50, T = 100 };
    int levels = test_short() ? 8 : (int)L, per = test_short() ? 10 : (int)T;
    double points[L], var = 100, last = .01, r2 = 2e-5 / (4 * last * last);
    df_process p = df_process_edm(20);
    df_sample_desc d = df_sample_defaults();
    gauss g;
    df_model m = gauss_model(&g, 0, .25, p, DF_EPS, 1);
    moment got;
    for (int i = 0; i < levels; i++) points[i] = 10 * pow(.001, (double)i / (levels - 1));
    d.method = "annealed_langevin";
    d.points = points;
    d.points_count = levels;
    d.points_in = DF_POINTS_RHO;
    d.snr = sqrt(r2);
    d.corrections = per;
    got = moments(d, &m, levels * per + 4, 0);
    for (int i = 0; i < levels; i++)
        for (int k = 0; k < per; k++) { // x += a/2 score + sqrt(a) z
            double a = 2e-5 * points[i] * points[i] / (last * last);
            double keep = 1 - a / 2 / (.25 + points[i] * points[i]);
            var = keep * keep * var + a;
        }
    near(got.var, var, tol(1e-9, 1e-4));
    near_abs(got.mean, 0, 1e-12);
    expect(g.calls == levels * per);
    if (!test_short()) {
        near_abs(got.var, .2539, 5e-5);
        near_abs(.25 + last * last, .2501, 1e-9);
    }
    // between levels y = x/alpha stands still; under COMPAT_SCORE_SDE x does, and there is
    // no step at the last level
    p = df_process_vp(.1, 20);
    for (int k = 0; k < 2; k++) {
        double t[3] = {.9, .5, .2}, alpha[3], mean = 2;
        m = gauss_model(&g, .7, .04, p, DF_EPS, 1);
        d.points = t;
        d.points_count = 3;
        d.points_in = DF_POINTS_T;
        d.start = DF_START_GIVEN;
        d.corrections = 0; // one step a level
        d.compat = k ? DF_COMPAT_SCORE_SDE : 0;
        got = moments(d, &m, 10, 2);
        for (int i = 0; i < 3; i++) alpha[i] = df_process_at(&p, t[i]).alpha;
        var = 0;
        for (int i = 0; i < 3 - k; i++) {
            df_point q = df_process_at(&p, t[i]);
            double h = 2 * r2 * q.sigma * q.sigma,
                   c = k || i == 2 ? 1 : alpha[i + 1] / alpha[i];
            double V = q.alpha * q.alpha * .04 + q.sigma * q.sigma;
            mean = c * (mean - h / V * (mean - .7 * q.alpha));
            var = c * c * ((1 - h / V) * (1 - h / V) * var + 2 * h);
        }
        near(got.mean, mean, tol(1e-13, 1e-5));
        near(got.var, var, tol(1e-13, 1e-5));
    }
}

TEST(predictor_corrector_by_hand) {
    df_process p = df_process_vp(.1, 20);
    for (int k = 0; k < 3; k++) {
        enum { N = 7 };
        df_sample_desc d = df_sample_defaults();
        df_point grid[N + 1];
        gauss g;
        df_model m = gauss_model(&g, .7, .04, p, k == 2 ? DF_SCORE : DF_V, 1);
        double mean = 0, var, h;
        moment got;
        int count, each = k == 0 ? 1 : 2;
        d.method =
            k == 2 ? "euler" : "predictor_corrector"; // any method may have a corrector
        d.steps = N;
        d.end = DF_END_T_MIN;
        d.t_min = .05;
        d.corrections = k == 0 ? 0 : each;
        d.langevin_step = k == 1 ? .02 : 0;
        d.snr = .25;
        got = moments(d, &m, 64, 0);
        expect(df_grid(ctx, &p, &d, grid, N + 1, &count) == DF_OK && count == N + 1);
        check(g.calls == N * (1 + each), "%d calls", g.calls);
        var = grid[0].sigma * grid[0].sigma;
        for (int i = 0; i < N; i++) {
            df_point a = grid[i], b = grid[i + 1];
            double V = a.alpha * a.alpha * .04 + a.sigma * a.sigma, r, s2, keep, add,
                   noise;
            h = k == 1 ? .02 : 2 * .0625 * a.sigma * a.sigma;
            for (int j = 0; j < each; j++) {
                mean += h / V * (.7 * a.alpha - mean);
                var = (1 - h / V) * (1 - h / V) * var + 2 * h;
            }
            r = a.alpha / b.alpha; // the forward step b -> a is x_a = r x_b + sqrt(s2) z
            s2 = a.sigma * a.sigma - r * r * b.sigma * b.sigma;
            keep = 2 - r - s2 / V;
            add = s2 / V * .7 * a.alpha;
            noise = s2;
            if (k == 2) { // euler: x_b = alpha_b x0 + sigma_b eps
                double x0 = a.alpha * .04 / V, eps = a.sigma / V;
                keep = b.alpha * x0 + b.sigma * eps;
                add = b.alpha * .7 - keep * .7 * a.alpha;
                noise = 0;
            }
            mean = keep * mean + add;
            var = keep * keep * var + noise;
        }
        near(got.mean, mean, tol(1e-13, 1e-5));
        near(got.var, var, tol(1e-13, 1e-5));
    }
}

// One step with recorded noise against the formula, for every rule of the step's length.
TEST(langevin_norms_one_step) {
    enum { N = 4, DIM = 3 };
    static const unsigned modes[5] = {0, DF_COMPAT_NORM_SAMPLE, DF_COMPAT_NORM_BATCH,
                                      DF_COMPAT_SCORE_SDE,
                                      DF_COMPAT_NORM_BATCH | DF_COMPAT_SCORE_SDE};
    df_process p = table_process(20, .01, .3);
    df_point at = df_process_at(&p, .5), before = df_process_at(&p, .45);
    gauss g;
    df_model m = gauss_model(&g, .3, .5, p, DF_SCORE, DIM);
    double V = at.alpha * at.alpha * .5 + at.sigma * at.sigma;
    df_real z[N * DIM], x[N * DIM], start[N * DIM];
    df_random_normal(3, 0, 0, N * DIM, z);
    df_random_normal(4, 0, 0, N * DIM, start);
    for (int k = 0; k < 5; k++) {
        df_replay replay;
        df_sample_desc d = stopped("langevin", 1, 0);
        double norm_s[N], norm_z[N], sum_s = 0, sum_z = 0;
        replay.draws = z;
        replay.count = 1;
        replay.used = 0;
        replay.size = N * DIM;
        d.noise = df_noise_replay(&replay);
        d.compat = modes[k];
        memcpy(x, start, sizeof x);
        sample(ctx, &m, &d, x, N);
        for (int i = 0; i < N; i++) {
            double s = 0, n = 0;
            for (int j = 0; j < DIM; j++) {
                double score = -((double)start[i * DIM + j] - at.alpha * .3) / V;
                s += score * score;
                n += (double)z[i * DIM + j] * (double)z[i * DIM + j];
            }
            sum_s += norm_s[i] = sqrt(s);
            sum_z += norm_z[i] = sqrt(n);
        }
        for (int i = 0; i < N; i++) {
            double sigma = k == 1             ? norm_z[i] / norm_s[i]
                           : k == 2 || k == 4 ? sum_z / sum_s
                                              : at.sigma;
            double h = 2 * .16 * .16 * sigma * sigma;
            if (k >= 3) h *= pow(at.alpha / before.alpha, 2);
            for (int j = 0; j < DIM; j++) {
                double s = (double)start[i * DIM + j], score = -(s - at.alpha * .3) / V;
                near(x[i * DIM + j], s + h * score + sqrt(2 * h) * (double)z[i * DIM + j],
                     tol(1e-13, 1e-6));
            }
        }
    }
}

TEST(langevin_norms_and_their_bias) {
    // E x^2 of N(0, I) under the rules of the norms. In the stationary state of the rule by
    // samples E 1/|x|^2 = 1/((1 + r^2)(dim + 2)) exactly, where N(0, I) has 1/(dim - 2);
    // by the batch the variance is 1 + r^2.
    static const int dims[3] = {16, 3, 16}, counts[3] = {1500, 3000, 8000};
    static const int steps[3] = {250, 900, 40};
    static df_real x[130000];
    for (int k = 0; k < 3; k++) {
        int dim = dims[k], n = counts[k], batch = k == 2;
        df_sample_desc d = stopped("langevin", steps[k], 0);
        gauss g;
        df_model m = gauss_model(&g, 0, 1, df_process_vp(.1, 20), DF_SCORE, dim);
        double sum = 0, inverse = 0, squared = 0;
        if (test_short() && k < 2) continue;
        d.compat = batch ? DF_COMPAT_NORM_BATCH : DF_COMPAT_NORM_SAMPLE;
        for (int i = 0; i < n * dim; i += dim)
            df_random_normal(77, (uint64_t)i, 0, (size_t)dim, x + i);
        sample(ctx, &m, &d, x, n);
        for (int i = 0; i < n; i++) {
            double r2 = 0;
            for (int j = 0; j < dim; j++)
                r2 += (double)x[i * dim + j] * (double)x[i * dim + j];
            sum += r2 / dim / n;
            inverse += 1 / r2 / n;
            squared += 1 / r2 / r2 / n;
        }
        if (batch) {
            near_abs(sum, 1 + .16 * .16, ANY * sqrt(2.0 / (n * dim)));
            check(sum > 1.016 && sum < 1.036, "E x^2 = %g", sum);
            continue;
        }
        // published: 1.30 (16), 4.9 (3)
        if (k == 0) near_abs(sum, 1.30, .05);
        if (k == 1) check(sum > 4.2 && sum < 5.7, "E x^2 = %g", sum);
        if (k == 0)
            near_abs(inverse, 1 / (1.0256 * (dim + 2)),
                     ANY * sqrt((squared - inverse * inverse) / n));
    }
}

// ---- restarts ----

TEST(the_grid_of_restarts) {
    for (int k = 0; k < 3; k++) {
        enum { N = 12, K = 3, M = 4 };
        df_process p = k == 0   ? df_process_edm(80)
                       : k == 1 ? df_process_vp(.1, 20)
                                : df_process_flow();
        df_sample_desc d = df_sample_defaults();
        df_point plain[N + 2], got[N + 2 + K * (M + 1)];
        int count, more, at = 0;
        double low, high = .3;
        d.steps = N;
        d.grid = "karras";
        d.t_max = .99;
        expect(df_grid(ctx, &p, &d, plain, N + 2, &count) == DF_OK);
        d.restarts = K;
        expect(df_grid(ctx, &p, &d, got, N + 2 + K * (M + 1), &more) == DF_OK);
        expect(more == count + K * (M + 1));
        while (plain[at].sigma / plain[at].alpha > .06) at++;
        low = plain[at].sigma / plain[at].alpha;
        for (int i = 0; i < more; i++) {
            double want; // sigma/alpha
            int j = i - at - 1, round = j / (M + 1), place = j % (M + 1);
            if (i <= at)
                want = plain[i].sigma / plain[i].alpha;
            else if (round < K) // M steps down as EDM spaces them: M + 1 points
                want = pow(pow(high, 1 / 7.0) +
                               (pow(low, 1 / 7.0) - pow(high, 1 / 7.0)) * place / M,
                           7);
            else
                want = plain[i - K * (M + 1)].sigma / plain[i - K * (M + 1)].alpha;
            near(got[i].sigma / got[i].alpha, want, 1e-9);
            if (i <= at || round >= K) {
                df_point same = plain[i <= at ? i : i - K * (M + 1)];
                same_bits(&got[i], &same, sizeof same);
            }
        }
        expect(df_grid(ctx, &p, &d, got, more - 1, &more) == DF_ERR_ARGUMENT);
        df_ctx_clear(ctx);
    }
}

TEST(restart_by_hand) {
    // Heun in rho on N(.7, .04), y = x/alpha; a jump up adds sqrt(b^2 - a^2) of noise.
    for (int k = 0; k < 4; k++) {
        enum { N = 9, MOST = 40 };
        df_process p = k == 1 ? df_process_edm(20) : df_process_vp(.1, 20);
        df_sample_desc d = df_sample_defaults();
        df_point grid[MOST];
        gauss g;
        df_model m = gauss_model(&g, .7, .04, p, DF_EPS, 1);
        double mean = 0, var, jump = k == 2 ? 1.25 : 1;
        moment got;
        int count, calls = 0;
        d.method = k == 3 ? "heun" : "restart";
        d.steps = N;
        d.grid = "karras";
        d.restart_min = .1;
        d.restart_max = .8;
        d.restart_steps = 3;
        d.restarts = k == 3 ? 3 : 0; // restart's own are 2
        d.noise_scale = jump;
        got = moments(d, &m, 16, 0);
        d.restarts = k == 3 ? 3 : 2;
        expect(df_grid(ctx, &p, &d, grid, MOST, &count) == DF_OK);
        mean = 0;
        var = pow(grid[0].sigma / grid[0].alpha, 2);
        for (int i = 0; i + 1 < count; i++) {
            double a = grid[i].sigma / grid[i].alpha,
                   b = grid[i + 1].sigma / grid[i + 1].alpha;
            double da = a / (.04 + a * a), db = b / (.04 + b * b), keep; // d = da (y - .7)
            if (b > a) {
                var += jump * jump * (b * b - a * a);
                continue;
            }
            keep = b > 0 ? 1 + (b - a) / 2 * (da + db * (1 + (b - a) * da))
                         : 1 + (b - a) * da;
            calls += b > 0 ? 2 : 1;
            mean = .7 + keep * (mean - .7);
            var *= keep * keep;
        }
        near(got.mean, mean, tol(1e-12, 1e-4));
        near(got.var, var, tol(1e-12, 1e-4));
        check(g.calls == calls, "%d calls, want %d", g.calls, calls);
    }
}

TEST(restart_on_a_mixture) {
    // few steps: what heun leaves wrong, restarts mend or leave as it is
    enum { N = 4000 };
    static df_real x[2 * N], exact[2 * N];
    static const double mean[6] = {2, 0, -1, 1.5, 0, -2};
    int n = test_short() ? 600 : N;
    df_process p = df_process_edm(20);
    df_point data = df_point_data();
    golden_mixture gm = golden_gm2();
    double cov[12], distance[2];
    df_mixture *made;
    for (int k = 0; k < 3; k++) memcpy(cov + 4 * k, gm.cov[k], 4 * sizeof(double));
    made = df_mixture_create(ctx, 3, 2, gm.w, mean, cov);
    expect(made && df_mixture_sample(ctx, made, &data, 3, 0, n, exact) == DF_OK);
    for (int k = 0; k < 2; k++) {
        mix self;
        df_model m = mix_model(&self, p, DF_X0);
        df_sample_desc d = df_sample_defaults();
        d.method = k ? "restart" : "heun";
        d.steps = 7;
        d.grid = "karras";
        d.restarts = k ? 3 : 0;
        d.restart_min = .15;
        d.restart_max = 1.2;
        d.restart_steps = 4;
        sample(ctx, &m, &d, x, n);
        expect(df_sliced_wasserstein(ctx, x, n, exact, n, 2, 64, 1, &distance[k]) ==
               DF_OK);
    }
    if (getenv("SAMPLING_VERBOSE"))
        printf("heun %g, restart %g\n", distance[0], distance[1]);
    check(distance[1] < distance[0] + .02 && distance[1] < (test_short() ? .3 : .12),
          "heun %g, restart %g", distance[0], distance[1]);
    df_mixture_free(made);
}

TEST(eta_acts_inside_its_window) {
    enum { N = 10 };
    df_process p = df_process_vp(.1, 20);
    df_sample_desc d = df_sample_defaults();
    df_point grid[N + 1];
    gauss g;
    df_model m = gauss_model(&g, .7, .04, p, DF_V, 1);
    double mean = 0, var;
    moment got;
    int count, acted = 0;
    d.method = "exponential";
    d.steps = N;
    d.grid = "lambda";
    d.end = DF_END_T_MIN;
    d.eta = 1.2;
    d.eta_min = .2;
    d.eta_max = 3;
    got = moments(d, &m, N + 4, 0);
    expect(df_grid(ctx, &p, &d, grid, N + 1, &count) == DF_OK);
    var = grid[0].sigma * grid[0].sigma;
    for (int i = 0; i < N; i++) {
        df_point a = grid[i], b = grid[i + 1];
        double rho = a.sigma / a.alpha, h = b.lambda - a.lambda;
        double e = rho >= .2 && rho <= 3 ? 1.44 : 0, gain, keep, x0;
        acted += e > 0;
        gain = a.alpha * .04 / (a.alpha * a.alpha * .04 + a.sigma * a.sigma);
        x0 = -b.alpha * expm1(-(1 + e) * h);
        keep = b.sigma / a.sigma * exp(-e * h) + x0 * gain;
        mean = keep * mean + x0 * (.7 - gain * .7 * a.alpha);
        var = keep * keep * var - b.sigma * b.sigma * expm1(-2 * e * h);
    }
    expect(acted > 1 && acted < N - 2);
    near(got.mean, mean, tol(1e-12, 1e-5));
    near(got.var, var, tol(1e-12, 1e-5));
}

TEST(history_ends_at_a_restart) {
    // dpmpp_2m after a jump begins anew, at order 1: two runs that differ only before it
    // and meet at the same x after it would be one; by hand on N(0, 1), EDM, alpha = 1.
    df_process p = df_process_edm(20);
    df_sample_desc d = df_sample_defaults();
    df_point grid[32];
    gauss g;
    df_model m = gauss_model(&g, 0, 1, p, DF_X0, 1);
    double x[16], old[16], var = 0;
    moment got;
    int count, known = 0, n = 5, draw = 1;
    d.method = "dpmpp_2m";
    d.steps = 8;
    d.grid = "lambda";
    d.end = DF_END_T_MIN;
    d.t_min = .005;
    d.restarts = 2;
    d.restart_min = .3;
    d.restart_max = 2;
    d.final = DF_FINAL_KEEP;
    got = moments(d, &m, n, 0);
    expect(df_grid(ctx, &p, &d, grid, 32, &count) == DF_OK);
    for (int j = 0; j < n; j++) x[j] = j == 1 ? 20 : 0;
    for (int i = 0; i + 1 < count; i++) {
        double a = grid[i].sigma, b = grid[i + 1].sigma, h = log(a / b), r;
        if (b > a) {
            x[++draw] += sqrt(b * b - a * a);
            known = 0;
            continue;
        }
        r = known ? log(grid[i - 1].sigma / a) / h : 1;
        for (int j = 0; j < n; j++) {
            double x0 = x[j] / (1 + a * a), D = x0;
            if (known) D += (x0 - old[j]) / (2 * r);
            old[j] = x0;
            x[j] = b / a * x[j] - expm1(-h) * D;
        }
        known = 1;
    }
    for (int j = 1; j < n; j++) var += x[j] * x[j];
    near(got.var, var, tol(1e-12, 1e-5));
}

// ---- bit for bit ----

// Cheap and nonlinear at any dimension, each row for itself: predictions, maps, densities.
static int wave_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    size_t dim = (size_t)q->dim, width = dim;
    if (self != NULL && q->ask == DF_ASK_PREDICT) width *= 2; // a variance behind it
    (void)c;
    for (int i = 0; i < q->n; i++) {
        double shift = q->labels ? .1 * q->labels[i] : 0, sum = 0;
        const df_real *x = q->x + (size_t)i * dim;
        shift += .01 * (double)((q->first_sample + (uint64_t)(i % q->samples)) % 7);
        shift += .1 * (double)q->t_model[i] - (q->t_to ? .2 * q->t_to[i] : 0);
        if (q->condition)
            shift +=
                .3 * (double)q->condition[(size_t)(i % q->samples) * q->condition_stride];
        if (q->ask == DF_ASK_LOG_DENSITY) {
            for (size_t j = 0; j < dim; j++) sum -= .5 * (double)x[j] * (double)x[j];
            out[i] = (df_real)(sum / (double)dim);
            continue;
        }
        for (size_t j = 0; j < dim; j++) {
            double v = (double)x[j];
            out[(size_t)i * width + j] = (df_real)(v / (1 + v * v) + shift);
            if (width > dim) out[(size_t)i * width + dim + j] = (df_real)(shift - .2 * v);
        }
    }
    return 0;
}
static df_model wave_model(int dim) {
    df_model m = df_model_defaults();
    m.predict = wave_predict;
    m.dim = dim;
    m.process = df_process_vp(.1, 20);
    m.prediction = DF_V;
    m.answers = DF_ASK_PREDICT | DF_ASK_MAP | DF_ASK_LOG_DENSITY;
    return m;
}

// Statistics for dpm_solver_v3, made up.
enum { V3_POINTS = 4 };
static df_v3_statistics made_up(int dim) {
    static double numbers[V3_POINTS + 3 * V3_POINTS * 37];
    df_v3_statistics e;
    int size = V3_POINTS * dim;
    e.count = V3_POINTS;
    e.dim = dim;
    e.lambda = numbers;
    e.l = numbers + V3_POINTS;
    e.s = e.l + size;
    e.b = e.s + size;
    for (int i = 0; i < V3_POINTS; i++) e.lambda[i] = -6 + 4.0 * i;
    for (int i = 0; i < size; i++) {
        e.l[i] = .5 + .4 * sin(.7 * i);
        e.s[i] = .2 * cos(.3 * i);
        e.b[i] = .1 * sin(1.1 * i);
    }
    return e;
}

// A descriptor under which this row runs on this process.
static df_sample_desc usable(const df_sampler_row *row, const df_process *p) {
    df_sample_desc d = df_sample_defaults();
    d.method = row->name;
    if (!row->to_sigma0 || (row->clock == DF_CLOCK_T && p->kind == DF_PROCESS_VE))
        d.end = DF_END_T_MIN;
    if (!row->from_alpha0 && df_process_at(p, 1).alpha <= 0) d.t_max = .99;
    d.restart_min = 1;
    d.restart_max = 2;
    return d;
}

// The loop turned inside out.
static void stepped(df_ctx *c, const df_model *m, const df_sample_desc *d, df_real *x,
                    int n) {
    df_sampler *s = df_sampler_create(c, m, d, x, n);
    df_query q, again;
    df_real *out = NULL;
    int room = 0;
    if (!check(s != NULL, "%s: %s", d->method, df_ctx_message(c))) return;
    while (df_sampler_next(s, &q)) {
        if (q.n > room) {
            free(out);
            room = q.n;
            out = (df_real *)malloc((size_t)room * (size_t)q.dim * 2 * sizeof *out);
        }
        expect(df_sampler_next(s, &again) && again.x == q.x && again.n == q.n);
        m->predict(m->self, c, &q, out);
        if (df_sampler_answer(s, out) != DF_OK) break;
    }
    free(out);
    check(df_sampler_result(s) == DF_OK, "%s: %s", d->method, df_ctx_message(c));
    df_sampler_free(s);
}

// Equal samples, bit for bit; names what differs.
static void same_run(const char *how, const df_sample_desc *d, int dim,
                     const df_real *want, const df_real *got, int n) {
    for (int i = 0; i < n; i++)
        if (memcmp(want + (size_t)i * dim, got + (size_t)i * dim,
                   (size_t)dim * sizeof *got)) {
            check(0, "%s, dim %d: sample %d differs %s", d->method, dim, i, how);
            return;
        }
    check(1, "equal");
}

enum { BIT_SAMPLES = 64, BIT_SIZE = 200000 };
// One descriptor in every way there is to run it.
static void every_way(df_model m, df_sample_desc d, int n) {
    static df_real whole[BIT_SIZE], part[BIT_SIZE], condition[2 * BIT_SAMPLES];
    static const int cuts[6] = {1, 5, 2, 17, 8, 31};
    int labels[BIT_SAMPLES], dim = m.dim;
    size_t bytes = (size_t)n * (size_t)dim * sizeof *whole;
    for (int i = 0; i < n; i++) {
        labels[i] = i % 3;
        condition[2 * i] = (df_real)sin(i + .5);
    }
    if (d.labels) d.labels = labels; // asked for by any pointer
    if (d.condition) {
        d.condition = condition;
        d.condition_stride = 2;
    }
    d.seed = 99;
    d.first_sample = 1000;
    for (int i = 0; i < n * dim; i++) whole[i] = (df_real)(.5 * sin(.37 * i));
    memcpy(part, whole, bytes);
    if (!sample(ctx, &m, &d, whole, n)) return;
    for (int threads = 1; threads <= 4; threads++) {
        df_ctx *c = new_ctx(threads, NULL);
        df_model cut = m;
        cut.max_batch = threads == 2 ? 5 : threads == 4 ? 1 + n / 3 : 0;
        for (int i = 0; i < n * dim; i++) part[i] = (df_real)(.5 * sin(.37 * i));
        sample(c, &cut, &d, part, n);
        same_run(threads == 2 ? "in questions of 5 on 2 threads" : "on other threads", &d,
                 dim, whole, part, n);
        df_ctx_free(c);
    }
    for (int i = 0; i < n * dim; i++) part[i] = (df_real)(.5 * sin(.37 * i));
    stepped(ctx, &m, &d, part, n);
    same_run("stepped", &d, dim, whole, part, n);
    for (int alone = 0; alone < 2; alone++) {
        memset(part, 0, bytes);
        for (int at = 0, k = 0, piece; at < n; at += piece, k++) {
            df_sample_desc e = d;
            piece = alone ? 1 : cuts[k % 6];
            if (piece > n - at) piece = n - at;
            e.first_sample += (uint64_t)at;
            if (e.labels) e.labels += at;
            if (e.condition) e.condition += 2 * at;
            for (int i = 0; i < piece * dim; i++)
                part[at * dim + i] = (df_real)(.5 * sin(.37 * (at * dim + i)));
            sample(ctx, &m, &e, part + at * dim, piece);
        }
        same_run(alone ? "alone" : "in pieces", &d, dim, whole, part, n);
    }
}

TEST(every_row_bit_for_bit) {
    static const int dims[2] = {3, 37};
    int count;
    const df_sampler_row *rows = df_sampler_rows(&count);
    expect(count >= 44);
    for (int k = 0; k < count; k++)
        for (int j = 0; j < 2; j++) {
            df_model m = wave_model(dims[j]);
            df_sample_desc d = usable(&rows[k], &m.process);
            df_v3_statistics v3 = made_up(dims[j]);
            d.statistics = &v3;
            d.steps = 6;
            expect(!rows[k].batch_coupled);
            every_way(m, d, j ? 19 : BIT_SAMPLES);
        }
}

enum { BIT_SETTINGS = 28 };
static df_sample_desc setting(int k, df_model *m) {
    static const int any_label = 0;
    static const df_real any_condition = 0;
    static const char *const methods[BIT_SETTINGS] = {"heun",         "euler",
                                                      "ddim",         "dpmpp_2m",
                                                      "heun",         "dpmpp_3m",
                                                      "ddpm",         "ddim",
                                                      "dpm_solver_2", "dpmpp_2m_sde",
                                                      "unipc",        "sa_solver",
                                                      "deis",         "euler_ancestral",
                                                      "dpmpp_sde",    "exponential",
                                                      "paradigms",    "rk45",
                                                      "dpm_adaptive", "ddim",
                                                      "plms",         "mala",
                                                      "baoab",        "consistency",
                                                      "paradigms",    "euler_ancestral",
                                                      "ddpm",         "ddim"};
    df_sample_desc d = usable(df_sampler_find(ctx, methods[k]), &m->process);
    d.steps = 7;
    if (k % 3 == 0) d.labels = &any_label;
    if (k % 3 == 1 || k == 24) d.condition = &any_condition;
    if (k % 5 == 2) m->input_sigma_data = .5;
    switch (k) {
    case 0: d.churn = 3; break;
    case 1:
        d.churn = 2;
        d.compat = DF_COMPAT_CHURN_LATE;
        break;
    case 2: d.corrections = 2; break;
    case 3:
        d.corrections = 1;
        d.compat = DF_COMPAT_NORM_SAMPLE;
        break;
    case 4: d.restarts = 2; break;
    case 5: d.restarts = 1; break;
    case 6: d.threshold = .9; break;
    case 7: d.threshold = .7; break;
    case 8: d.clip = .8; break;
    case 9: d.clip = .8; break;
    case 10: d.order = 3; break;
    case 11: d.order = 3; break;
    case 12: d.order = 4; break;
    case 13:
    case 14:
    case 15: d.noise = df_noise_brownian(); break;
    case 16: d.window = 3; break;
    case 17: d.rtol = d.atol = 1e-3; break;
    case 18: d.eta = 1; break;
    case 19:
        d.clip = .5;
        d.eta = .6;
        d.compat = DF_COMPAT_KEEP_EPS;
        break;
    case 20: d.start = DF_START_DATA; break;
    case 21: d.snr = .5; break;
    case 22: d.langevin_step = .4; break;
    case 23: d.eta = .5; break;
    case 24: d.window = 100; break;
    case 25:
        d.noise = df_noise_brownian();
        d.corrections = 1;
        break;
    case 26:
    case 27:
        m->self = m; // anything but NULL
        m->learned = k == 26 ? DF_LEARNED_RANGE : DF_LEARNED_VARIANCE;
    }
    return d;
}

TEST(every_setting_bit_for_bit) {
    for (int k = 0; k < BIT_SETTINGS; k++) {
        df_model m = wave_model(k % 2 ? 37 : 3);
        df_sample_desc d = setting(k, &m);
        every_way(m, d, k % 2 ? 13 : BIT_SAMPLES);
    }
}

TEST(large_arrays_bit_for_bit) {
    static const char *const methods[6] = {"ddpm", "heun",      "dpmpp_2m",
                                           "rk45", "paradigms", "mala"};
    for (int k = 0; k < 6; k++) {
        df_model m = wave_model(test_short() ? 17000 : 40000);
        df_sample_desc d = usable(df_sampler_find(ctx, methods[k]), &m.process);
        d.steps = k == 4 ? 3 : 2;
        d.window = 2;
        d.rtol = d.atol = .1;
        if (k == 0) d.clip = 1;
        if (k == 1) d.churn = 1;
        if (k == 2) d.threshold = .95;
        every_way(m, d, 3);
    }
}

TEST(coupled_modes_say_so_by_acting_so) {
    // by the batch's norm, a neighbour is felt; by the sample's it is not
    for (int k = 0; k < 2; k++) {
        df_model m = wave_model(3);
        df_sample_desc d = stopped("langevin", 3, 0);
        df_real two[6] = {1, 0, -1, 3, 2, 1}, one[3] = {1, 0, -1};
        d.compat = k ? DF_COMPAT_NORM_BATCH : DF_COMPAT_NORM_SAMPLE;
        sample(ctx, &m, &d, two, 2);
        sample(ctx, &m, &d, one, 1);
        expect((memcmp(two, one, sizeof one) != 0) == k);
    }
}

// ---- sweep: never a silent NaN ----

// Two round Gaussians at +-mean, weights a half: x_0 = gain x + pull tanh. Answers
// everything but Jacobians; MAP by one step of ddim.
typedef struct pair {
    df_prediction prediction;
    int asked_at_data;
} pair;
static int pair_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    static const double mean[2] = {1.5, -.5}, v = .1;
    pair *p = (pair *)self;
    (void)c;
    for (int i = 0; i < q->n; i++) {
        double a = q->alpha[i], s = q->sigma[i], V = a * a * v + s * s, dot = 0, r2 = 0, w;
        const df_real *x = q->x + i * q->dim;
        for (int j = 0; j < 2; j++) {
            dot += a * mean[j] * (double)x[j];
            r2 += (double)x[j] * (double)x[j] + a * a * mean[j] * mean[j];
        }
        w = tanh(dot / V);
        if (q->ask == DF_ASK_LOG_DENSITY) {
            out[i] = (df_real)(-.5 * r2 / V - log(V) + fabs(dot / V) +
                               log1p(exp(-2 * fabs(dot / V))));
            continue;
        }
        p->asked_at_data += s <= 0;
        for (int j = 0; j < 2; j++) {
            double x0 = a * v / V * (double)x[j] + s * s / V * mean[j] * w;
            double eps = (s / V) * ((double)x[j] - a * mean[j] * w);
            out[i * q->dim + j] =
                (df_real)(p->prediction == DF_X0 ? x0 : a * eps - s * x0);
            if (q->ask == DF_ASK_MAP)
                out[i * q->dim + j] =
                    (df_real)(q->alpha_to[i] * x0 + q->sigma_to[i] * eps);
        }
    }
    return 0;
}

// By the bits: comparisons may be compiled away.
static int finite_bits(df_real x) {
    double wide = (double)x;
    uint64_t bits;
    memcpy(&bits, &wide, sizeof bits);
    return ((bits >> 52) & 0x7ff) != 0x7ff;
}

enum { SWEEP_CHOICES = 22 };
// Choice k of what a row can be told; 0 if it cannot be told that.
static int choose(int k, const df_sampler_row *row, df_sample_desc *d) {
    int multistep = row->corrector >= 0;
    int plain =
        row->asks == DF_ASK_PREDICT && row->clock != DF_CLOCK_STOPPED && !row->whole;
    switch (k) {
    case 0: return 1;
    case 1:
    case 2:
    case 3:
    case 4: d->order = k; return k <= row->most_order;
    case 5:
    case 6:
    case 7:
        d->final = k == 5 ? DF_FINAL_KEEP : k == 6 ? DF_FINAL_EULER : DF_FINAL_LOWER;
        d->order = row->most_order > 2 ? 3 : 0;
        return row->most_order > 0;
    case 8:
    case 9:
    case 10:
        d->slope = k == 8 ? DF_SLOPE_EXACT : k == 9 ? DF_SLOPE_BH1 : DF_SLOPE_BH2;
        return row->slope != DF_SLOPE_OWN;
    case 11:
    case 12: d->predicts = k == 11 ? DF_X0 : DF_EPS; return row->slope != DF_SLOPE_OWN;
    case 13: d->corrector = 0; return multistep;
    case 14:
        d->corrector = 3;
        d->order = 2;
        return multistep;
    case 15:
        d->eta = .7;
        d->eta_in = DF_ETA_FAMILY;
        return row->eta_max > 0 && row->eta_in != DF_ETA_OWN;
    case 16:
        d->eta = 1;
        d->eta_in = DF_ETA_DDIM;
        return row->eta_max > 0 && row->eta_in != DF_ETA_OWN;
    case 17:
        d->eta = 1;
        d->eta_in = DF_ETA_STRAIGHT;
        return row->eta_max > 0 && row->eta_in != DF_ETA_OWN;
    case 18:
        d->eta = .5;
        d->eta_in = DF_ETA_LINEAR;
        return row->eta_max > 0 && row->eta_in != DF_ETA_OWN;
    case 19: d->corrections = 1; return plain;
    case 20:
        d->predicts = DF_EPS;
        d->order = 3;
        d->corrector = multistep ? 4 : -1;
        return row->slope != DF_SLOPE_OWN && row->most_order >= 3;
    }
    d->compat = DF_COMPAT_HALF_D2 | DF_COMPAT_SIGN_D2 | DF_COMPAT_BLOCK_HALF;
    d->order = 3;
    return row->most_order >= 3;
}

typedef struct tally {
    long runs, fine, wild;
} tally;
static void sweep_one(const df_sampler_row *row, const df_process *p, df_sample_desc d,
                      tally *t) {
    pair self;
    df_model m = df_model_defaults();
    df_real x[4] = {(df_real).3, (df_real)-1.2, (df_real).8, (df_real)1.1};
    df_result r;
    self.prediction = t->runs % 2 ? DF_X0 : DF_V;
    self.asked_at_data = 0;
    m.predict = pair_predict;
    m.self = &self;
    m.dim = 2;
    m.process = *p;
    m.prediction = self.prediction;
    m.answers = DF_ASK_PREDICT | DF_ASK_MAP | DF_ASK_LOG_DENSITY;
    df_ctx_clear(ctx);
    r = df_sample(ctx, &m, &d, x, 2);
    t->runs++;
    if (r != DF_OK) {
        check(strlen(df_ctx_message(ctx)) > 20 && r != DF_ERR_NONFINITE,
              "%s on %s, %s, N = %d: %d \"%s\"", row->name, df_process_name(p), d.grid,
              d.steps, r, df_ctx_message(ctx));
        return;
    }
    t->fine++;
    check(self.asked_at_data == 0, "%s asks at sigma = 0", row->name);
    for (int i = 0; i < 4; i++) {
        if (!check(finite_bits(x[i]), "%s on %s, %s, N = %d: a silent %g", row->name,
                   df_process_name(p), d.grid, d.steps, (double)x[i]))
            return;
        // few steps may overshoot, Langevin stays as wide as p_t
        if (row->to_sigma0 && d.steps >= 8 && fabs((double)x[i]) > 30) {
            t->wild++;
            return;
        }
    }
}

TEST(sweep) {
    int count, grids;
    const df_sampler_row *rows = df_sampler_rows(&count);
    const char *const *names = df_grid_names(&grids);
    df_v3_statistics v3 = made_up(2);
    df_process processes[5];
    tally t = {0, 0, 0};
    processes[0] = df_process_vp(.1, 20);
    processes[1] = df_process_flow();
    processes[2] = df_process_edm(80);
    processes[3] = df_process_ve(.01, 50);
    processes[4] = table_process(100, 1e-3, .2);
    for (int k = 0; k < count; k++)
        for (int g = 0; g < grids; g++)
            for (int p = 0; p < 5; p++) {
                int choice = k + g + p;
                if (g >= 5 && p != 4) continue; // entries of a table
                for (int N = 1; N <= 40; N++) {
                    df_sample_desc d = usable(&rows[k], &processes[p]), e;
                    int dear = rows[k].whole || rows[k].evaluations > 3;
                    if (dear && N > 8 && N % 8) continue;
                    if (test_short() && N > 5 && N % 11) continue;
                    d.steps = N;
                    d.grid = names[g];
                    d.statistics = &v3;
                    if (N % 3 == 2) d.end = DF_END_T_MIN;
                    if (g > 1 && p == 1 && N % 5)
                        d.t_max = .99; // rules that divide lambda
                    sweep_one(&rows[k], &processes[p], d, &t);
                    for (int c = 0; c < (test_long() ? (int)SWEEP_CHOICES : 1 + N % 2); c++) {
                        do // and some of what it can be told, in turn
                            e = d;
                        while (!choose(++choice % SWEEP_CHOICES, &rows[k], &e));
                        sweep_one(&rows[k], &processes[p], e, &t);
                    }
                }
            }
    check(t.fine > .95 * (double)t.runs, "%ld of %ld runs succeeded", t.fine, t.runs);
    check(t.wild < .01 * (double)t.fine, "%ld of %ld results above 30", t.wild, t.fine);
    if (getenv("SAMPLING_VERBOSE"))
        printf("%ld runs, %ld fine, %ld wild\n", t.runs, t.fine, t.wild);
    df_ctx_clear(ctx);
}

// ---- noise sources ----

static df_noise_query stretch(uint64_t seed, uint64_t first, int n, int dim, double a,
                              double b) {
    df_noise_query q;
    df_process flow = df_process_flow(); // there s = sigma/(alpha + sigma) is t
    memset(&q, 0, sizeof q);
    q.seed = seed;
    q.first_sample = first;
    q.n = n;
    q.dim = dim;
    q.draw = 1;
    q.from = df_process_at(&flow, a);
    q.to = df_process_at(&flow, b);
    return q;
}
static void brownian(uint64_t seed, int n, int dim, double a, double b, df_real *out) {
    df_noise noise = df_noise_brownian();
    df_noise_query q = stretch(seed, 0, n, dim, a, b);
    expect(noise.fill(noise.user, &q, out) == 0);
}

TEST(brownian_increments) {
    // down the path from 1 to 0; each stretch a unit normal, no two alike
    enum { CUTS = 7, DIM = 5, N = 4000, SIZE = N * DIM };
    static const double s[CUTS + 1] = {1, .7, .69, .5, .25, .125, 1e-5, 0};
    static df_real w[CUTS][SIZE], two[SIZE];
    int n = test_short() ? 500 : N, size = n * DIM;
    for (int k = 0; k < CUTS; k++) {
        double sum = 0, square = 0, fourth = 0;
        brownian(7, n, DIM, s[k], s[k + 1], w[k]);
        for (int i = 0; i < size; i++) {
            double v = (double)w[k][i];
            sum += v;
            square += v * v;
            fourth += v * v * v * v;
        }
        mean_is("increment", sum, size, 0, 1);
        mean_is("its square", square, size, 1, sqrt(2.0));
        mean_is("its fourth power", fourth, size, 3, sqrt(96.0));
    }
    for (int k = 0; k < CUTS; k++)
        for (int j = 0; j < k; j++) {
            double sum = 0;
            for (int i = 0; i < size; i++) sum += (double)w[k][i] * (double)w[j][i];
            mean_is("two stretches", sum, size, 0, 1);
        }
    for (int shift = 1; shift <= DIM;
         shift++) { // elements and samples have their own paths
        double sum = 0;
        for (int i = 0; i + shift < size; i++)
            sum += (double)w[2][i] * (double)w[2][i + shift];
        mean_is("two elements", sum, size - shift, 0, 1);
    }
    for (int k = 0; k + 1 < CUTS; k++) { // increments add up
        double ab = s[k] - s[k + 1], bc = s[k + 1] - s[k + 2];
        brownian(7, n, DIM, s[k], s[k + 2], two);
        for (int i = 0; i < size; i += 17) {
            double sum = sqrt(ab) * (double)w[k][i] + sqrt(bc) * (double)w[k + 1][i];
            near_abs(sqrt(ab + bc) * (double)two[i], sum, tol(1e-12, 1e-6));
        }
    }
    // the way up is the way down, with the sign of the path
    brownian(7, n, DIM, s[4], s[3], two);
    for (int i = 0; i < size; i += 17) near_abs(two[i], -(double)w[3][i], 0);
    // another seed: another path. A stretch of no length is an ordinary draw.
    brownian(8, n, DIM, s[1], s[2], two);
    {
        double sum = 0;
        df_real z[DIM];
        for (int i = 0; i < size; i++) sum += (double)two[i] * (double)w[1][i];
        mean_is("two seeds", sum, size, 0, 1);
        brownian(8, 3, DIM, .4, .4, two);
        df_random_normal(8, 2, 1, DIM, z);
        same_bits(two + 2 * DIM, z, sizeof z);
    }
}

// Noise that is not of the path must not come from the path: the Langevin steps of one
// step, of a level, of trials of all lengths, and jumps up again have their own draws.
typedef struct seen {
    int draws;
    df_real first[64];
} seen;
static int watch_noise(void *user, const df_noise_query *q, df_real *out) {
    seen *s = (seen *)user;
    df_noise noise = df_noise_brownian();
    int r = noise.fill(noise.user, q, out);
    if (s->draws < 64) s->first[s->draws] = out[0];
    s->draws++;
    return r;
}
TEST(brownian_draws_are_independent) {
    static const char *const methods[6] = {"predictor_corrector", "annealed_langevin",
                                           "dpm_adaptive",        "restart",
                                           "dpmpp_sde",           "mala"};
    for (int k = 0; k < 6; k++) {
        df_real x[2] = {1, 1};
        seen s;
        df_sample_desc d;
        df_model m = wave_model(2);
        memset(&s, 0, sizeof s);
        d = usable(df_sampler_find(ctx, methods[k]), &m.process);
        d.steps = 8;
        if (k < 2) d.corrections = 3;
        if (k == 2) d.eta = 1;
        if (k == 3) d.restarts = 3;
        d.noise.fill = watch_noise;
        d.noise.user = &s;
        sample(ctx, &m, &d, x, 1);
        expect(s.draws > 3);
        for (int i = 0; i < s.draws && i < 64; i++)
            for (int j = 0; j < i; j++)
                if (!check((double)s.first[i] - (double)s.first[j] != 0,
                           "%s: draws %d and %d are the same", methods[k], j, i))
                    i = j = 64;
    }
}

TEST(one_brownian_path_for_any_number_of_steps) {
    static const char *const methods[3] = {"exponential", "euler_ancestral",
                                           "dpmpp_2m_sde"};
    enum { N = 40 };
    for (int k = 0; k < 3; k++) {
        df_real x[3][2 * N];
        double near_by = 0, apart = 0, finer = 0;
        mix self;
        df_model m = mix_model(&self, df_process_vp(.1, 20), DF_X0);
        for (int run = 0; run < 3; run++) {
            df_sample_desc d = df_sample_defaults();
            d.method = methods[k];
            d.steps = run == 0 ? 64 : 256;
            d.grid = "lambda";
            d.end = DF_END_T_MIN;
            d.seed = run < 2 ? 1 : 2;
            d.noise = df_noise_brownian();
            sample(ctx, &m, &d, x[run], N);
        }
        for (int i = 0; i < 2 * N; i++) {
            near_by += pow((double)x[0][i] - (double)x[1][i], 2);
            apart += pow((double)x[1][i] - (double)x[2][i], 2);
        }
        check(near_by < .05 * apart, "%s: %g apart along one path, %g on two", methods[k],
              sqrt(near_by), sqrt(apart));
        for (int run = 0; run < 2; run++) { // and closer still from 256 to 1024
            df_sample_desc d = df_sample_defaults();
            d.method = methods[k];
            d.steps = run == 0 ? 256 : 1024;
            d.grid = "lambda";
            d.end = DF_END_T_MIN;
            d.seed = 1;
            d.noise = df_noise_brownian();
            sample(ctx, &m, &d, x[run], N / 4);
        }
        for (int i = 0; i < N / 2; i++) finer += pow((double)x[0][i] - (double)x[1][i], 2);
        check(4 * finer < .6 * near_by, "%s: %g, then %g", methods[k], sqrt(near_by),
              sqrt(4 * finer));
    }
}

TEST(replayed_noise) {
    df_real draws[4 * 6], x[6], y[6];
    df_replay r;
    df_sample_desc d = df_sample_defaults();
    df_model m = wave_model(3);
    for (int draw = 0; draw < 4; draw++)
        for (int i = 0; i < 2; i++)
            df_random_normal(5, 40 + (uint64_t)i, (uint32_t)draw, 3,
                             draws + 6 * draw + 3 * i);
    r.draws = draws;
    r.count = 4;
    r.used = 0;
    r.size = 6;
    d.method = "ddpm";
    d.steps = 4; // the last step draws nothing
    d.seed = 5;
    d.first_sample = 40;
    sample(ctx, &m, &d, x, 2);
    d.noise = df_noise_replay(&r);
    sample(ctx, &m, &d, y, 2);
    same_bits(x, y, sizeof x);
    expect(r.used == 4);
    expect(df_sample(ctx, &m, &d, y, 2) != DF_OK && says(ctx, "draw 5 of 2 x 3")); // used up
    r.used = 0;
    d.steps = 5;
    expect(df_sample(ctx, &m, &d, y, 2) != DF_OK && says(ctx, "there are 4 of 6 each"));
    expect(df_sample(ctx, &m, &d, y, 1) != DF_OK && says(ctx, "of 1 x 3"));
    df_ctx_clear(ctx);
}

// ---- torch.randn on a CPU ----

static void torch_is(uint64_t seed, int skip, int n, const double *want) {
    df_torch_random random;
    df_real x[64];
    df_torch_seed(&random, seed);
    if (skip) df_torch_randn(&random, (size_t)skip, x);
    df_torch_randn(&random, (size_t)n, x);
    for (int i = 0; i < n; i++) near(x[i], want[i], 1e-6);
}
TEST(torch_random_numbers) {
    static const double five[5] = {1.54099607, -.293428898, -2.17878938, .568431258,
                                   -1.08452237};
    static const double after5[3] = {-1.39859545, .403346837, .838026345};
    static const double after16[3] = {-.719257593, -.403343529, -.596635342};
    static const double sixteen[16] = {-1.12583983, -1.1523602,  -.250578582, -.433878809,
                                       .848710358,  .692009151,  -.31601277,  -2.11521935,
                                       .322274923,  -1.26333475, .349983186,  .30813393,
                                       .119841509,  1.2376579,   1.11677718,  -.247278154};
    static const double twenty[20] = {-1.12583983, -1.1523602,  -.250578582, -.433878809,
                                      .598839462,  -1.55509508, -.34136039,  1.85300612,
                                      .468096405,  -.157712445, 1.44366014,  .266049415,
                                      1.38936615,  1.58633423,  .946298361,  -.843676746,
                                      .931826591,  1.25900924,  2.00498056,  .0537369028};
    df_torch_random random;
    df_real x[2][20];
    torch_is(0, 0, 5, five);
    torch_is(0, 5, 3, after5);
    torch_is(0, 0, 16, sixteen);
    torch_is(0, 16, 3, after16);
    torch_is(0, 0, 20, twenty);
    // any cut below 16 is the same stream
    df_torch_seed(&random, 123);
    df_torch_randn(&random, 15, x[0]);
    df_torch_seed(&random, 123);
    for (int i = 0; i < 15; i++) df_torch_randn(&random, 1, x[1] + i);
    same_bits(x[0], x[1], 15 * sizeof(df_real));
}

// ---- published constants: sums and means in the tests of diffusers' own schedulers ----
// Their dummy sample is k/768 in [4, 3, 8, 8], their dummy model x t/(t + 1) of the index t.
// Covered: DDPM, DDIM, DDIM inverse (whose model sees the time a step ends at), PNDM (eps),
// DPM-Solver multistep and singlestep, DEIS, UniPC, Euler, Euler ancestral, Heun, KDPM2,
// KDPM2 ancestral, LMS, LCM, TCD, EDM-Euler, CM. Not: PNDM with v (it adds up v itself),
// SA-Solver, DPM-SDE (its noise is a library's). Those scaled as VE write the scaled input
// over the sample there: `scaled`.

typedef struct published {
    const char *name, *method;
    int T; // table
    double beta0, beta1;
    int spacing; // of SPACE_...
    int N, from; // steps, and the first that is taken (noise added there)
    int last;    // where it ends: -1 the data, 0 entry 0
    df_prediction prediction;
    int scaled; // x itself is scaled at every point
    double clip;
    unsigned compat;
    double want;  // sum of |x|, or the mean if below 1.5
    double slack; // relative
} published;
enum {
    SPACE_ALL,
    SPACE_LEADING,
    SPACE_LINSPACE,
    SPACE_ROUND,
    SPACE_KARRAS,
    SPACE_LU,
    SPACE_KARRAS0,
    SPACE_LCM,
    SPACE_BACK
};

typedef struct dummy {
    df_prediction prediction;
    int scaled, rounds, calls, step, lcm,
        later; // later: asked with the time of so many on
} dummy;
static int dummy_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    dummy *d = (dummy *)self;
    double a = q->alpha[0], s = q->sigma[0], t = (double)q->t_model[0], f, scale = 1;
    (void)c;
    d->calls = q->step == d->step ? d->calls + 1 : 0;
    d->step = q->step;
    if (d->rounds) t = rint(t);
    t += d->later;
    f = t / (t + 1);
    // theirs is y = x/alpha; at a second question within a step it is scaled by alpha
    if (d->scaled && d->calls == 0) scale = 1 / a;
    for (int i = 0; i < q->n * q->dim; i++) {
        double x = (double)q->x[i] * scale, y = f * x;
        // ... and v is then read as if the sample were what was asked
        if (d->scaled && d->calls > 0 && d->prediction == DF_V) y += s * (a - 1) / a * x;
        if (q->ask == DF_ASK_MAP) {
            double u = 10 * t, x0 = ((double)q->x[i] - s * f * (double)q->x[i]) / a;
            y = d->lcm ? .25 / (u * u + .25) * (double)q->x[i] + u / sqrt(u * u + .25) * x0
                       : q->alpha_to[0] * x0 + q->sigma_to[0] * f * (double)q->x[i];
        }
        out[i] = (df_real)y;
    }
    return 0;
}
// At every point of the list x becomes x/sqrt(rho^2 + 1) = x alpha.
static int scale_state(void *user, const df_step_info *info, df_real *x) {
    (void)user;
    for (int i = 0; i < info->n * info->dim; i++)
        x[i] = (df_real)((double)x[i] * info->at.alpha);
    return 0;
}

enum { DUMMY_N = 4, DUMMY_DIM = 192, DUMMY = DUMMY_N * DUMMY_DIM };
static const published figures[] = {
    {"DDPM", "ddpm", 1000, 1e-4, .02, SPACE_ALL, 1000, 0, -1, DF_EPS, 0, 1, 0, 258.9606, 1e-4},
    {"DDPM v", "ddpm", 1000, 1e-4, .02, SPACE_ALL, 1000, 0, -1, DF_V, 0, 1, 0, 202.0296, 1e-4},
    {"DDPM noised", "ddpm", 1000, 1e-4, .02, SPACE_ALL, 1000, 998, -1, DF_EPS, 0, 1, 0,
     387.9466, 1e-4},
    {"DDIM", "ddim", 1000, 1e-4, .02, SPACE_LEADING, 10, 0, -1, DF_EPS, 0, 1,
     DF_COMPAT_KEEP_EPS, 172.0067, 1e-4},
    {"DDIM v", "ddim", 1000, 1e-4, .02, SPACE_LEADING, 10, 0, -1, DF_V, 0, 1,
     DF_COMPAT_KEEP_EPS, 52.5302, 1e-4},
    {"DDIM one", "ddim", 1000, .01, .02, SPACE_LEADING, 10, 0, -1, DF_EPS, 0, 1,
     DF_COMPAT_KEEP_EPS, 149.8295, 1e-4},
    {"DDIM not one", "ddim", 1000, .01, .02, SPACE_LEADING, 10, 0, 0, DF_EPS, 0, 1,
     DF_COMPAT_KEEP_EPS, 149.0784, 1e-4},
    {"DDIM noised", "ddim", 1000, 1e-4, .02, SPACE_LEADING, 10, 8, -1, DF_EPS, 0, 1,
     DF_COMPAT_KEEP_EPS, 354.5418, 1e-4},
    {"PNDM", "pndm", 1000, 1e-4, .02, SPACE_LEADING, 10, 0, 0, DF_EPS, 0, 0, 0, 198.1318,
     1e-4},
    {"PNDM one", "pndm", 1000, .01, .02, SPACE_LEADING, 10, 0, -1, DF_EPS, 0, 0, 0, 230.0399,
     1e-4},
    {"PNDM not one", "pndm", 1000, .01, .02, SPACE_LEADING, 10, 0, 0, DF_EPS, 0, 0, 0,
     186.9482, 1e-4},
    {"DPM", "dpmpp_2m", 1000, 1e-4, .02, SPACE_ROUND, 10, 0, 0, DF_EPS, 0, 0, 0, .3301, 3e-4},
    {"DPM v", "dpmpp_2m", 1000, 1e-4, .02, SPACE_ROUND, 10, 0, 0, DF_V, 0, 0, 0, .2251, 3e-4},
    {"DPM v karras", "dpmpp_2m", 1000, 1e-4, .02, SPACE_KARRAS, 10, 0, 0, DF_V, 0, 0, 0,
     .2096, 2.5e-3},
    {"DPM v lu", "dpmpp_2m", 1000, 1e-4, .02, SPACE_LU, 10, 0, 0, DF_V, 0, 0, 0, .1554, 1e-3},
    {"DPM threshold", "dpmpp_2m", 1000, 1e-4, .02, SPACE_ROUND, 10, 0, 0, DF_EPS, 0, 0, 0,
     1.1364, 1e-4},
    {"DPM single", "dpmpp_2s", 1000, 1e-4, .02, SPACE_ROUND, 10, 0, 0, DF_EPS, 0, 0, 0, .2791,
     3e-4},
    {"DPM single v", "dpmpp_2s", 1000, 1e-4, .02, SPACE_ROUND, 10, 0, 0, DF_V, 0, 0, 0, .1453,
     4e-4},
    {"DEIS", "deis", 1000, 1e-4, .02, SPACE_ROUND, 10, 0, 0, DF_EPS, 0, 0, 0, .23916, 1e-4},
    {"DEIS v", "deis", 1000, 1e-4, .02, SPACE_ROUND, 10, 0, 0, DF_V, 0, 0, 0, .091, 2e-3},
    {"DEIS noised", "deis", 1000, 1e-4, .02, SPACE_ROUND, 10, 8, 0, DF_EPS, 0, 0, 0, 315.3016,
     1e-4},
    {"UniPC", "unipc", 1000, 1e-4, .02, SPACE_ROUND, 10, 0, 0, DF_EPS, 0, 0, 0, .2464, 3e-4},
    {"UniPC v", "unipc", 1000, 1e-4, .02, SPACE_ROUND, 10, 0, 0, DF_V, 0, 0, 0, .1014, 6e-4},
    {"UniPC noised", "unipc", 1000, 1e-4, .02, SPACE_ROUND, 10, 8, 0, DF_EPS, 0, 0, 0,
     315.5757, 1e-4},
    {"Euler", "euler", 1100, 1e-4, .02, SPACE_LINSPACE, 10, 0, -1, DF_EPS, 1, 0, 0, 10.0807,
     1e-3},
    {"Euler karras", "euler", 1100, 1e-4, .02, SPACE_KARRAS0, 10, 0, -1, DF_EPS, 1, 0, 0,
     124.523, 1e-3},
    {"Euler ancestral", "euler_ancestral", 1100, 1e-4, .02, SPACE_LINSPACE, 10, 0, -1, DF_EPS,
     1, 0, 0, 152.3192, 1e-4},
    {"Euler ancestral v", "euler_ancestral", 1100, 1e-4, .02, SPACE_LINSPACE, 10, 0, -1, DF_V,
     1, 0, 0, 108.4439, 1e-4},
    {"Euler ancestral noised", "euler_ancestral", 1100, 1e-4, .02, SPACE_LINSPACE, 10, 8, -1,
     DF_EPS, 1, 0, 0, 56163.0508, 1e-4},
    {"Heun", "heun", 1100, 1e-4, .02, SPACE_LINSPACE, 10, 0, -1, DF_EPS, 1, 0, 0, .1233, 2e-2},
    {"KDPM2", "dpm_2", 1100, 1e-4, .02, SPACE_LINSPACE, 10, 0, -1, DF_EPS, 1, 0, 0, 20.4125,
     1e-3},
    {"KDPM2 noised", "dpm_2", 1100, 1e-4, .02, SPACE_LINSPACE, 10, 8, -1, DF_EPS, 1, 0, 0,
     70408.4062, 1e-4},
    {"KDPM2 ancestral", "dpm_2_ancestral", 1100, 1e-4, .02, SPACE_LINSPACE, 10, 0, -1, DF_EPS,
     1, 0, 0, 13979.9433, 1e-4},
    {"KDPM2 ancestral v", "dpm_2_ancestral", 1100, 1e-4, .02, SPACE_LINSPACE, 10, 0, -1, DF_V,
     1, 0, 0, 331.8133, 1e-4},
    {"KDPM2 ancestral noised", "dpm_2_ancestral", 1100, 1e-4, .02, SPACE_LINSPACE, 10, 8, -1,
     DF_EPS, 1, 0, 0, 93087.3437, 1e-4},
    {"LMS", "lms", 1100, 1e-4, .02, SPACE_LINSPACE, 10, 0, -1, DF_EPS, 1, 0, 0, 1006.388, 1e-4},
    {"LMS karras", "lms", 1100, 1e-4, .02, SPACE_KARRAS0, 10, 0, -1, DF_EPS, 1, 0, 0, 3812.9927,
     1e-3},
    {"LCM one step", "consistency", 1000, 8.5e-4, .012, SPACE_LCM, 1, 0, -1, DF_EPS, 0, 0, 0,
     18.7097, 1e-4},
    {"LCM", "consistency", 1000, 8.5e-4, .012, SPACE_LCM, 10, 0, -1, DF_EPS, 0, 0, 0, 197.7616,
     1e-4},
    {"TCD one step", "tcd", 1000, 8.5e-4, .012, SPACE_LCM, 1, 0, 0, DF_EPS, 0, 0, 0, 29.8715,
     1e-4},
    {"TCD", "tcd", 1000, 8.5e-4, .012, SPACE_LCM, 10, 0, 0, DF_EPS, 0, 0, 0, 181.204, 1e-4},
    {"DDIM inverse", "ddim", 1000, 1e-4, .02, SPACE_BACK, 10, 0, 0, DF_EPS, 0, 1,
     DF_COMPAT_KEEP_EPS, 671.6816, 1e-4},
    {"DDIM inverse v", "ddim", 1000, 1e-4, .02, SPACE_BACK, 10, 0, 0, DF_V, 0, 1,
     DF_COMPAT_KEEP_EPS, 1394.2185, 1e-4},
};

// Their list of points as ours: returns how many.
static int dummy_points(const published *f, const df_process *p, df_sample_desc *d,
                        double *points) {
    int n = 0, T = f->T, gap = T / f->N;
    double low = df_process_at(p, 1.0 / T).lambda, high = df_process_at(p, 1).lambda;
    for (int i = 0; i < f->N; i++) {
        double u = f->N > 1 ? (double)i / (f->N - 1) : 0, entry = 0, rho = 0;
        if (f->spacing == SPACE_ALL) entry = T - 1 - i;
        if (f->spacing == SPACE_LEADING || f->spacing == SPACE_BACK)
            entry = (f->N - 1 - i) * gap;
        if (f->spacing == SPACE_LINSPACE) entry = (T - 1) * (1 - u);
        if (f->spacing == SPACE_ROUND) entry = rint((T - 1) * (1 - (double)i / f->N));
        if (f->spacing == SPACE_LCM) // of 50 entries, the last first
            entry = 20 * (50 - floor((double)i * 50 / f->N)) - 1;
        if (f->spacing == SPACE_KARRAS || f->spacing == SPACE_KARRAS0)
            rho = pow(exp(-high / 7) + u * (exp(-low / 7) - exp(-high / 7)), 7);
        if (f->spacing == SPACE_LU) rho = exp(-high + u * (high - low));
        if (i < f->from) continue;
        points[n++] = rho > 0 ? rho : (entry + 1) / T;
        if (rho > 0) d->points_in = DF_POINTS_RHO;
    }
    if (f->spacing == SPACE_BACK) return n;
    if (f->last < 0)
        points[n++] = 0;
    else if (d->points_in == DF_POINTS_T && points[n - 1] > 1.0 / T)
        points[n++] = 1.0 / T;
    return n;
}

static void play_figure(const published *f) {
    static df_real x[DUMMY];
    double points[1002], sum = 0, start = 1;
    df_sample_desc d = df_sample_defaults();
    df_model m = df_model_defaults();
    df_torch_random random;
    df_point first;
    dummy self;
    df_process p = f->beta0 < 9e-4 && f->beta0 > 8e-4
                       ? df_process_vp(.1, 20)
                       : table_process(f->T, f->beta0, f->beta1);
    if (f->spacing == SPACE_LCM) {
        double betas[1000];
        df_betas(ctx, DF_BETAS_SCALED_LINEAR, f->beta0, f->beta1, f->T, betas);
        expect(df_process_table(ctx, betas, f->T, &p) == DF_OK);
    }
    p.interp =
        f->spacing == SPACE_KARRAS0 || f->spacing == SPACE_KARRAS || f->spacing == SPACE_LU
            ? DF_INTERP_LOG_SIGMA
            : DF_INTERP_SIGMA;
    memset(&self, 0, sizeof self);
    self.step = -2;
    self.scaled = f->scaled;
    self.rounds = f->spacing == SPACE_KARRAS || f->spacing == SPACE_LU;
    self.prediction = f->prediction;
    self.later = f->spacing == SPACE_BACK ? 100 : 0;
    self.lcm = strncmp(f->name, "LCM", 3) == 0;
    m.predict = dummy_predict;
    m.self = &self;
    m.dim = DUMMY_DIM;
    m.process = p;
    m.prediction = f->prediction;
    m.time = df_time_index(f->T);
    m.answers = DF_ASK_PREDICT | DF_ASK_MAP;
    d.method = f->method;
    d.points = points;
    d.points_count = dummy_points(f, &p, &d, points);
    if (f->spacing == SPACE_BACK) { // from entry 0 up; its first step ends there: x alpha
        d.inverse = 1;
        start = df_process_at(&p, points[d.points_count - 1]).alpha;
    }
    d.start = DF_START_GIVEN;
    d.clip = f->clip;
    d.compat = f->compat;
    d.final =
        strstr(f->name, "DPM") && !strstr(f->name, "KDPM") ? DF_FINAL_KEEP : DF_FINAL_OWN;
    if (strcmp(f->method, "tcd") == 0) d.eta = 0;
    if (strstr(f->name, "threshold")) { // their clamp(min = 1, max = .5) gives .5
        d.threshold = .87;
        d.threshold_min = d.threshold_max = .5;
    }
    if (f->scaled) d.edit = scale_state;
    df_torch_seed(&random, 0);
    d.noise = df_noise_torch(&random);
    first = d.points_in == DF_POINTS_RHO ? df_process_at_rho(&p, points[0])
                                         : df_process_at(&p, points[0]);
    for (int b = 0; b < DUMMY_N; b++)
        for (int j = 0; j < DUMMY_DIM; j++) {
            int k = DUMMY_N * j + b;
            double v = start * k / DUMMY, noise = (double)(DUMMY - 1 - k) / DUMMY;
            if (f->scaled && !f->from) v *= first.sigma; // y = rho v
            if (f->from && !f->scaled) v = first.alpha * v + first.sigma * noise;
            if (f->from && f->scaled) {
                df_point top = df_process_at(&p, 1);
                v = first.alpha * top.sigma / top.alpha * v + first.sigma * noise;
            }
            x[b * DUMMY_DIM + j] = (df_real)v;
        }
    if (!sample(ctx, &m, &d, x, DUMMY_N)) return;
    for (int i = 0; i < DUMMY; i++) sum += fabs((double)x[i]);
    if (f->want < 1.5 && strcmp(f->name, "Heun") != 0) sum /= DUMMY;
    if (getenv("SAMPLING_VERBOSE"))
        printf("%-24s %12.6f %12.6f  off by %.1e\n", f->name, sum, f->want,
               sum / f->want - 1);
    check(fabs(sum - f->want) <= f->slack * f->want, "%s: %.6f, published %g", f->name,
          sum, f->want);
}

// F of EDM; or the map of consistency models, made of it.
static int dummy_edm(void *self, df_ctx *c, const df_query *q, df_real *out) {
    double s = q->sigma[0], t = (double)q->t_model[0], f, skip, scale;
    int cm = q->ask == DF_ASK_MAP;
    (void)self;
    (void)c;
    if (cm) t = 250 * log(s);
    f = t / (t + 1);
    skip = .25 / ((s - .002) * (s - .002) + .25);
    scale = (s - .002) * .5 / sqrt(s * s + .25);
    for (int i = 0; i < q->n * q->dim; i++) {
        double x = (double)q->x[i], y = f * x;
        if (cm) {
            y = skip * x + scale * f * x / sqrt(s * s + .25);
            y = y > 1 ? 1 : y < -1 ? -1 : y;
        }
        out[i] = (df_real)y;
    }
    return 0;
}
static void edm_figure(const char *name, int N, double want) {
    static df_real x[DUMMY];
    df_sample_desc d = df_sample_defaults();
    df_model m = df_model_defaults();
    df_torch_random random;
    double points[11], sum = 0, start = N > 2 ? sqrt(80.0 * 80 + 1) : 80;
    m.predict = dummy_edm;
    m.dim = DUMMY_DIM;
    m.process = df_process_edm(80);
    m.prediction = N > 2 ? DF_EDM_F : DF_X0;
    m.time = df_time_log_sigma(.25);
    m.input_sigma_data = N > 2 ? .5 : 0;
    m.answers = DF_ASK_PREDICT | DF_ASK_MAP;
    for (int i = 0; i < N; i++) { // EDM's sigmas; the second of two is entry 106 of 200
        double u = N > 2 ? i / 9.0 : .53 * i;
        points[i] = pow(pow(80, 1 / 7.0) + u * (pow(.002, 1 / 7.0) - pow(80, 1 / 7.0)), 7);
    }
    points[N] = N > 2 ? 0 : .002;
    d.method = N > 2 ? "euler" : "consistency";
    d.points = points;
    d.points_count = N + 1;
    d.points_in = DF_POINTS_RHO;
    d.start = DF_START_GIVEN;
    df_torch_seed(&random, 0);
    d.noise = df_noise_torch(&random);
    for (int b = 0; b < DUMMY_N; b++)
        for (int j = 0; j < DUMMY_DIM; j++)
            x[b * DUMMY_DIM + j] = (df_real)(start * (DUMMY_N * j + b) / DUMMY);
    if (!sample(ctx, &m, &d, x, DUMMY_N)) return;
    for (int i = 0; i < DUMMY; i++) sum += fabs((double)x[i]);
    if (getenv("SAMPLING_VERBOSE"))
        printf("%-24s %12.6f %12.6f  off by %.1e\n", name, sum, want, sum / want - 1);
    check(fabs(sum - want) < 1e-4 * want, "%s: %.6f, published %g", name, sum, want);
}

TEST(published_figures) {
    for (size_t i = 0; i < sizeof figures / sizeof figures[0]; i++)
        play_figure(&figures[i]);
    edm_figure("EDM-Euler", 10, 34.1855);
    edm_figure("CM one step", 1, 192.7614);
    edm_figure("CM", 2, 347.6357);
}

// ---- adaptive and parallel ----

TEST(adaptive_methods_keep_their_tolerance) {
    enum { N = 8 };
    static const char *const methods[3] = {"rk45", "dpm_adaptive", "dpm_adaptive"};
    double points[2] = {-3, 3}, exact[2 * N];
    for (int i = 0; i < 2 * N; i++) exact[i] = sin(1.7 * i + .3) * 1.4 * (1 + exp(3.0));
    golden_ode(exact, N, -3, 3, 1500);
    for (int k = 0; k < 3; k++)
        for (int p = 0; p < 3; p++) {
            df_process process = p == 0   ? df_process_vp(.1, 20)
                                 : p == 1 ? df_process_flow()
                                          : df_process_edm(80);
            df_point first = df_process_at_lambda(&process, -3);
            df_point last = df_process_at_lambda(&process, 3);
            double before = HUGE_VAL;
            int asked = 0;
            for (int t = 0; t < (SHARP ? 3 : 2); t++) {
                df_real x[2 * N];
                double asks_for = pow(10, k == 0 ? -3 - 2 * t : -2 - 1.5 * t), error = 0;
                mix self;
                df_model m = mix_model(&self, process, DF_V);
                df_sample_desc d = df_sample_defaults();
                d.method = methods[k];
                if (k == 2) d.order = 2;
                d.points = points;
                d.points_count = 2;
                d.points_in = DF_POINTS_LAMBDA;
                d.start = DF_START_GIVEN;
                d.rtol = d.atol = asks_for;
                for (int i = 0; i < 2 * N; i++)
                    x[i] =
                        (df_real)(sin(1.7 * i + .3) * 1.4 * (first.alpha + first.sigma));
                if (!sample(ctx, &m, &d, x, N)) continue;
                for (int i = 0; i < 2 * N; i++)
                    error = fmax(error, fabs((double)x[i] / last.alpha - exact[i]));
                if (getenv("SAMPLING_VERBOSE"))
                    printf("%s %d on %s: %.0e: %.2e, %d asked\n", methods[k], d.order,
                           df_process_name(&process), asks_for, error, self.calls);
                check(error < tol(30, 100) * asks_for, "%s on %s, %g asked for: error %g",
                      methods[k], df_process_name(&process), asks_for, error);
                check(error < .5 * before && self.calls > asked,
                      "%s on %s, %g asked for: %g, then %g with %d questions", methods[k],
                      df_process_name(&process), asks_for, before, error, self.calls);
                before = error;
                asked = self.calls;
            }
        }
}

TEST(a_tolerance_that_cannot_be_kept) {
    static const char *const methods[3] = {"rk45", "dpm_adaptive", "dpm_adaptive"};
    df_process p = df_process_vp(.1, 20);
    df_point a = df_process_at(&p, 1), b = df_process_at(&p, 1e-3);
    double V = a.alpha * a.alpha * .04 + a.sigma * a.sigma;
    double W = b.alpha * b.alpha * .04 + b.sigma * b.sigma;
    for (int k = 0; k < 3; k++) {
        df_real x[1] = {1};
        gauss g;
        df_model m = gauss_model(&g, .7, .04, p, DF_V, 1);
        df_sample_desc d = df_sample_defaults();
        df_result r;
        d.method = methods[k];
        d.order = k == 2 ? 2 : 0;
        d.end = DF_END_T_MIN;
        d.start = DF_START_GIVEN;
        d.rtol = d.atol = 1e-300;
        r = df_sample(ctx, &m, &d, x, 1);
        if (!SHARP && r == DF_OK) { // both results may be one and the same float all along
            near(x[0], .7 * b.alpha + sqrt(W / V) * (1 - .7 * a.alpha), 1e-3);
            continue;
        }
        check(r == DF_ERR_ARGUMENT, "%s: %d, %d questions", methods[k], r, g.calls);
        expect(says(ctx, "100000 trials"));
        df_ctx_clear(ctx);
    }
}

TEST(paradigms_is_ddim) {
    enum { N = 64, POINTS = 6 };
    static const int windows[4] = {1, 4, 16, 100};
    static const double atols[3] = {1e-2, 1e-4, 1e-6};
    for (int p = 0; p < 2; p++) {
        df_process process = p ? df_process_flow() : df_process_vp(.1, 20);
        df_real want[2 * POINTS], x[2 * POINTS];
        df_sample_desc d = df_sample_defaults();
        mix self;
        df_model m = mix_model(&self, process, DF_V);
        d.steps = N;
        d.seed = 4;
        sample(ctx, &m, &d, want, POINTS);
        d.method = "paradigms";
        for (int k = 0; k < 4; k++)
            for (int t = 0; t < 3; t++) {
                double most = 0, allowed = fmax(atols[t], tol(0, 2e-5));
                d.window = windows[k];
                d.atol = atols[t];
                self.calls = 0;
                sample(ctx, &m, &d, x, POINTS);
                for (int i = 0; i < 2 * POINTS; i++)
                    most = fmax(most, fabs((double)x[i] - (double)want[i]));
                if (getenv("SAMPLING_VERBOSE"))
                    printf("window %d, atol %g: %g, %d asked\n", d.window, d.atol, most,
                           self.calls);
                check(most <= (k ? allowed : tol(1e-12, 2e-5)),
                      "window %d, atol %g: off by %g", d.window, d.atol, most);
                check(self.calls <= N + 1, "window %d: %d questions", d.window,
                      self.calls);
                // looser, or wider: fewer
                if (k == 1)
                    check(self.calls < N - 4 * (2 - t), "%d questions", self.calls);
                if (k >= 2 && t == 0)
                    check(self.calls < N / 2, "%d questions", self.calls);
            }
    }
}

// ---- variances ----

TEST(analytic_variance_is_exact_on_gaussians) {
    enum { N = 12, DIM = 40, SAMPLES = 2500 };
    static df_real data[DIM * SAMPLES];
    int n = test_short() ? 300 : SAMPLES, count;
    double eps2[N], closed[N], mean = 0, var, small_var, M = .7, C = .04;
    df_point grid[N + 1];
    df_process p = df_process_vp(.1, 20);
    df_sample_desc d = df_sample_defaults();
    gauss g;
    df_model m = gauss_model(&g, M, C, p, DF_V, DIM);
    moment got;
    d.method = "ddpm";
    d.steps = N;
    d.seed = 3;
    d.end = DF_END_T_MIN;
    d.t_min = .05;
    for (int i = 0; i < n; i++) {
        df_random_normal(9, (uint64_t)i, 0, DIM, data + DIM * i);
        for (int j = 0; j < DIM; j++)
            data[DIM * i + j] = (df_real)(M + sqrt(C) * (double)data[DIM * i + j]);
    }
    expect(df_grid(ctx, &p, &d, grid, N + 1, &count) == DF_OK && count == N + 1);
    expect(df_sample_eps2(ctx, &m, &d, data, n, eps2) == DF_OK);
    for (int i = 0; i < N; i++) {
        double a = grid[i].alpha, s = grid[i].sigma;
        closed[i] = s * s / (a * a * C + s * s);
        near_rel(eps2[i], closed[i], ANY * sqrt(2.0 / (n * DIM)));
    }
    { // in pieces it is the mean of the pieces, as draws are keyed by the sample
        double half[2][N];
        df_sample_desc e = d;
        expect(df_sample_eps2(ctx, &m, &e, data, n / 2, half[0]) == DF_OK);
        e.first_sample = (uint64_t)(n / 2);
        expect(df_sample_eps2(ctx, &m, &e, data + n / 2 * DIM, n / 2, half[1]) == DF_OK);
        for (int i = 0; i < N; i++)
            near(.5 * (half[0][i] + half[1][i]), eps2[i], tol(1e-12, 1e-5));
    }
    d.variance = DF_VARIANCE_ANALYTIC;
    d.eps2 = closed;
    m = gauss_model(&g, M, C, p, DF_V, 1);
    got = moments(d, &m, N + 4, 0);
    var = small_var = grid[0].sigma * grid[0].sigma;
    for (int i = 0; i < N; i++) {
        df_point a = grid[i], b = grid[i + 1];
        double r = a.alpha / b.alpha, s2 = a.sigma * a.sigma - r * r * b.sigma * b.sigma;
        double x = r * pow(b.sigma / a.sigma, 2), x0 = b.alpha * s2 / (a.sigma * a.sigma);
        double V = a.alpha * a.alpha * C + a.sigma * a.sigma, gain = a.alpha * C / V;
        double least = s2 * pow(b.sigma / a.sigma, 2);
        // Cov[x_0|x] = C sigma^2/V goes through x0
        mean = x * mean + x0 * (M + gain * (mean - a.alpha * M));
        var = pow(x + x0 * gain, 2) * var + least + x0 * x0 * C * a.sigma * a.sigma / V;
        small_var = pow(x + x0 * gain, 2) * small_var + least;
    }
    near(got.mean, mean, tol(1e-12, 1e-5));
    near(got.var, var, tol(1e-12, 1e-5));
    { // and that is p_t itself, up to the start
        double a = grid[N].alpha, s = grid[N].sigma;
        near_rel(got.var, a * a * C + s * s, 1e-4);
        expect(fabs(small_var - var) > .02 * var);
    }
    d.variance = DF_VARIANCE_SMALL;
    got = moments(d, &m, N + 4, 0);
    near(got.var, small_var, tol(1e-12, 1e-5));
}

// gauss_predict with a variance behind it: of step q->step, from a list.
typedef struct teller {
    gauss g;
    df_learned kind;
    const double *small, *large; // by step
    double say;                  // RANGE; or the part of large in a variance told outright
    int by_label;                // label 1 is told `large`, others `small`
} teller;
static int teller_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    teller *t = (teller *)self;
    size_t dim = (size_t)q->dim;
    int r = gauss_predict(&t->g, c, q, out);
    if (t->kind == DF_LEARNED_NONE || q->ask != DF_ASK_PREDICT) return r;
    for (int i = q->n - 1; i >= 0; i--) {
        df_real *row = out + 2 * dim * (size_t)i;
        double low = t->small[q->step], high = t->large[q->step];
        double v = low + t->say * (high - low);
        if (t->by_label) v = q->labels[i] == 1 ? high : low;
        if (t->kind == DF_LEARNED_LOG_VARIANCE) v = log(v > 0 ? v : 1e-300);
        if (t->kind == DF_LEARNED_RANGE) v = 2 * t->say - 1;
        memmove(row, out + dim * (size_t)i, dim * sizeof *out);
        for (size_t j = 0; j < dim; j++) row[dim + j] = (df_real)v;
    }
    return r;
}

TEST(learned_variances) {
    enum { N = 7, DIM = 3, SAMPLES = 5 };
    df_process p = df_process_vp(.1, 20);
    double small[N], large[N];
    df_real want[DIM * SAMPLES], x[DIM * SAMPLES];
    df_point grid[N + 1];
    df_sample_desc d = df_sample_defaults();
    teller t;
    df_model m = gauss_model(&t.g, .7, .04, p, DF_EPS, DIM);
    int count;
    d.method = "ddpm";
    d.steps = N;
    d.seed = 21;
    expect(df_grid(ctx, &p, &d, grid, N + 1, &count) == DF_OK);
    for (int i = 0; i < N; i++) { // beta and beta-tilde of the step: VP
        double r = grid[i].alpha / grid[i + 1].alpha, s = grid[i].sigma,
               e = grid[i + 1].sigma;
        large[i] = s * s - r * r * e * e;
        small[i] = large[i] * e * e / s / s;
    }
    m.predict = teller_predict;
    m.self = &t;
    t.small = small;
    t.large = large;
    t.by_label = 0;
    for (int k = 0; k < 8; k++) {
        t.kind = DF_LEARNED_NONE;
        m.learned = DF_LEARNED_NONE;
        d.variance = k % 2 ? DF_VARIANCE_LARGE : DF_VARIANCE_SMALL;
        sample(ctx, &m, &d, want, SAMPLES);
        m.learned = t.kind = k < 2   ? DF_LEARNED_VARIANCE
                             : k < 4 ? DF_LEARNED_LOG_VARIANCE
                                     : DF_LEARNED_RANGE;
        t.say = k % 2;
        m.max_batch = k >= 6 ? 2 : 0;
        d.variance = DF_VARIANCE_OWN;
        sample(ctx, &m, &d, x, SAMPLES);
        near_all(x, want, DIM * SAMPLES, tol(1e-12, 1e-5));
        d.variance =
            k % 2 ? DF_VARIANCE_LARGE : DF_VARIANCE_SMALL; // its word is not asked for
        t.say = .3;
        sample(ctx, &m, &d, x, SAMPLES);
        same_bits(x, want, sizeof x);
    }
    m.max_batch = 0;
    // half of the way in the logarithm
    d.variance = DF_VARIANCE_OWN;
    t.kind = m.learned = DF_LEARNED_RANGE;
    t.say = .5;
    sample(ctx, &m, &d, x, SAMPLES);
    for (int i = 0; i < N; i++) small[i] = sqrt(small[i] * large[i]);
    t.kind = m.learned = DF_LEARNED_VARIANCE;
    t.say = 0;
    sample(ctx, &m, &d, want, SAMPLES);
    near_all(x, want, DIM * SAMPLES, tol(1e-12, 1e-5));
    { // other methods take the prediction alone
        static const char *const methods[4] = {"ddim", "heun", "dpmpp_2m", "paradigms"};
        for (int k = 0; k < 4; k++) {
            d.method = methods[k];
            d.t_max = .99;
            d.start = DF_START_NOISE;
            t.kind = m.learned = DF_LEARNED_NONE;
            sample(ctx, &m, &d, want, SAMPLES);
            t.kind = m.learned = DF_LEARNED_LOG_VARIANCE;
            sample(ctx, &m, &d, x, SAMPLES);
            same_bits(x, want, sizeof x);
        }
    }
    { // under guidance the variance is the label's
        static const int labels[SAMPLES] = {1, 1, 1, 1, 1};
        df_guidance guide = df_guidance_defaults();
        df_model guided;
        d.method = "ddpm";
        d.t_max = 1;
        expect(df_grid(ctx, &p, &d, grid, N + 1, &count) == DF_OK);
        t.kind = m.learned = DF_LEARNED_NONE;
        d.variance = DF_VARIANCE_LARGE;
        sample(ctx, &m, &d, want, SAMPLES);
        d.variance = DF_VARIANCE_OWN;
        t.kind = m.learned = DF_LEARNED_VARIANCE;
        t.by_label = 1;
        d.labels = labels;
        for (int k = 0; k < 4; k++) {
            m.stackable = k % 2;
            m.max_batch = k == 3 ? 3 : 0;
            guide.model = &m;
            guide.uncond = NULL;
            guide.scale = k == 2 ? 1 : 2.5;
            guided = df_guidance_model(&guide);
            sample(ctx, &guided, &d, x, SAMPLES);
            near_all(x, want, DIM * SAMPLES, tol(1e-12, 2e-5));
        }
    }
}

// ---- maps ----

TEST(maps_by_hand) {
    // Each step goes by the exact flow of N(.7, .04) to its target, then up to t by fresh
    // noise. Targets: the end; (1 - eta) t, on a table an entry; t itself.
    static const char *const methods[6] = {"consistency", "tcd",      "tcd",
                                           "flow_map",    "flow_map", "tcd"};
    static const double etas[6] = {-1, -1, -1, -1, .5, 1};
    for (int k = 0; k < 6; k++) {
        enum { N = 5, T = 50 };
        df_process p = k == 2 ? table_process(T, .002, .3) : df_process_vp(.1, 20);
        df_sample_desc d = df_sample_defaults();
        df_point grid[N + 1];
        gauss g;
        df_model m = gauss_model(&g, .7, .04, p, DF_V, 1);
        double mean = 2, var = 0,
               eta = etas[k] >= 0 ? etas[k]
                     : k == 0     ? 1
                     : k < 3      ? .3
                                  : 0;
        moment got;
        int count;
        d.method = methods[k];
        d.steps = N;
        d.eta = etas[k];
        d.t_max = k == 2 ? 1 : .9;
        d.start = DF_START_GIVEN;
        if (k == 1) d.end = DF_END_T_MIN, d.t_min = .1;
        got = moments(d, &m, N + 4, 2);
        expect(g.calls == N);
        expect(df_grid(ctx, &p, &d, grid, N + 1, &count) == DF_OK && count == N + 1);
        for (int i = 0; i < N; i++) {
            df_point a = grid[i], b = grid[i + 1], u = b;
            double t = (1 - eta) * b.t, V, W, c;
            if (k == 2) t = (floor(.7 * (T * b.t - 1) + 1e-6) + 1) / T;
            if (eta > 0 && (t <= grid[N].t || i == N - 1))
                u = grid[N];
            else if (eta > 0)
                u = df_process_at(&p, t);
            V = a.alpha * a.alpha * .04 + a.sigma * a.sigma;
            W = u.alpha * u.alpha * .04 + u.sigma * u.sigma;
            c = b.alpha / u.alpha;
            mean = c * (.7 * u.alpha + sqrt(W / V) * (mean - .7 * a.alpha));
            var = c * c * (W / V * var - u.sigma * u.sigma) + b.sigma * b.sigma;
        }
        near(got.mean, mean, tol(1e-12, 1e-5));
        near(got.var, var, tol(1e-12, 1e-5));
    }
}

// ---- inverse ----

TEST(there_and_back) {
    enum { POINTS = 8 };
    static const char *const methods[4] = {"ddim", "heun", "euler_t", "dpmpp_2m"};
    static const double least[4] = {.85, 1.8, .85, .85}, mean = 3, scale = 2;
    for (int k = 0; k < 4; k++) {
        double error[2] = {0, 0};
        for (int j = 0; j < 2; j++) {
            df_real x[2 * POINTS], start[2 * POINTS];
            df_sample_desc d = df_sample_defaults();
            mix self;
            df_model m = mix_model(&self, df_process_vp(.1, 20), DF_V);
            d.method = methods[k];
            d.steps = (k == 1 ? 60 : 500) << j;
            d.grid = k == 2 ? "uniform" : "lambda";
            d.t_max = .9;
            d.t_min = .02;
            d.end = DF_END_T_MIN;
            d.start = DF_START_GIVEN;
            d.inverse = 1;
            for (int i = 0; i < 2 * POINTS; i++)
                start[i] = x[i] = (df_real)(1.2 * sin(2.1 * i));
            // data has units, noise has none
            for (int i = 0; k == 1 && i < 2 * POINTS; i++)
                x[i] = start[i] = (df_real)(mean + scale * (double)start[i]);
            m.mean = k == 1 ? &mean : NULL;
            m.scale = k == 1 ? &scale : NULL;
            m.scaling_size = 1;
            sample(ctx, &m, &d, x, POINTS);
            for (int i = 0; i < 2 * POINTS; i++) // it went somewhere
                error[j] += pow((double)x[i] - (double)start[i], 2);
            expect(error[j] > 1);
            if (k == 1) expect(fabs((double)x[0]) < 3 && (double)start[1] > 4.5);
            error[j] = 0;
            d.inverse = 0;
            sample(ctx, &m, &d, x, POINTS);
            for (int i = 0; i < 2 * POINTS; i++)
                error[j] += pow((double)x[i] - (double)start[i], 2);
        }
        check(error[0] < .1, "%s: %g", methods[k], error[0]);
        if (SHARP)
            check(.5 * log2(error[0] / error[1]) > least[k], "%s: %g, then %g", methods[k],
                  sqrt(error[0]), sqrt(error[1]));
    }
}

TEST(inverse_noise_is_the_flows) {
    // On a Gaussian the flow multiplies by sqrt(V_t/V_s).
    df_process p = df_process_vp(.1, 20);
    df_sample_desc d = df_sample_defaults();
    df_point a, b;
    gauss g;
    df_model m = gauss_model(&g, 0, .25, p, DF_EPS, 1);
    df_real x[1] = {(df_real).4};
    double want;
    d.method = "heun";
    d.grid = "lambda";
    d.steps = 200;
    d.t_max = .95;
    d.t_min = .01;
    d.end = DF_END_T_MIN;
    d.start = DF_START_GIVEN;
    d.inverse = 1;
    a = df_process_at(&p, .01);
    b = df_process_at(&p, .95);
    want = .4 * sqrt((b.alpha * b.alpha * .25 + b.sigma * b.sigma) /
                     (a.alpha * a.alpha * .25 + a.sigma * a.sigma));
    sample(ctx, &m, &d, x, 1);
    near(x[0], want, 3e-4);
}

// ---- hooks ----

typedef struct hooks {
    int calls, steps;
    df_real kept[64 * 4], told[64 * 4]; // x after edit, and as on_step saw it
    double known;
    int wrong;
} hooks;
static int paint(void *user, const df_step_info *info, df_real *x) {
    hooks *h = (hooks *)user;
    expect(info->x == x);
    for (int i = 0; i < info->n; i++)
        x[i * info->dim] = (df_real)(info->at.alpha * h->known + .5 * info->at.sigma);
    memcpy(h->kept + 4 * info->step, x, 4 * sizeof *x);
    return 0;
}
static int tell(void *user, const df_step_info *info) {
    hooks *h = (hooks *)user;
    expect(info->step == h->calls);
    memcpy(h->told + 4 * h->calls++, info->x, 4 * sizeof(df_real));
    h->steps = info->steps;
    return 0;
}
static int sees_painting(void *self, df_ctx *c, const df_query *q, df_real *out) {
    hooks *h = (hooks *)self;
    gauss g;
    if (memcmp(q->x, h->kept + 4 * q->step, 4 * sizeof(df_real)) != 0) h->wrong++;
    gauss_model(&g, 0, 1, df_process_flow(), DF_X0, 2);
    return gauss_predict(&g, c, q, out);
}

TEST(edit_paints_and_all_see_it) {
    static const char *const methods[4] = {"ddim", "ddpm", "dpmpp_2m", "euler_ancestral"};
    for (int k = 0; k < 4; k++) {
        static const double mean[2] = {10, 20}, scale[2] = {3, .5};
        df_real x[4], trajectory[64 * 4];
        hooks h;
        df_sample_desc d = df_sample_defaults();
        df_model m = df_model_defaults();
        memset(&h, 0, sizeof h);
        h.known = .625;
        m.predict = sees_painting;
        m.self = &h;
        m.dim = 2;
        m.process = df_process_vp(.1, 20);
        m.prediction = DF_X0;
        m.mean = mean;
        m.scale = scale;
        m.scaling_size = 2;
        d.method = methods[k];
        d.steps = 11;
        d.edit = paint;
        d.on_step = tell;
        d.user = &h;
        d.trajectory = trajectory;
        if (k == 2) {
            d.restarts = 2;
            d.restart_min = .8;
            d.restart_max = 3;
        }
        sample(ctx, &m, &d, x, 2);
        check(h.wrong == 0, "%s: %d questions without the painting", methods[k], h.wrong);
        expect(h.steps == 11 + (k == 2 ? 2 * 5 : 0) && h.calls == h.steps + 1);
        same_bits(h.kept, h.told, (size_t)h.calls * 4 * sizeof(df_real));
        same_bits(trajectory, h.told, (size_t)h.calls * 4 * sizeof(df_real));
        for (int i = 0; i < 2; i++) { // the data's units, at the very end only
            near(x[2 * i], 10 + 3 * .625, 1e-6);
            near(trajectory[4 * h.steps + 2 * i], .625, 1e-7);
            near(x[2 * i + 1], 20 + .5 * (double)trajectory[4 * h.steps + 2 * i + 1],
                 1e-6);
        }
    }
}

static int fails_late(void *user, const df_step_info *info, df_real *x) {
    (void)user;
    x[0] = 0;
    return info->step == 3 ? 46 : 0;
}
TEST(edit_may_fail) {
    df_real x[4];
    df_model m = wave_model(2);
    df_sample_desc d = df_sample_defaults();
    d.steps = 6;
    d.edit = fails_late;
    expect(df_sample(ctx, &m, &d, x, 2) == 46);
    expect(df_ctx_error(ctx) == 46 && says(ctx, "edit returned 46 at step 3 of 6"));
    df_ctx_clear(ctx);
}

// Answers with what it holds.
static int fixed_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    (void)c;
    memcpy(out, self, (size_t)q->n * (size_t)q->dim * sizeof *out);
    return 0;
}

TEST(dynamic_thresholding_by_hand) {
    enum { DIM = 5 };
    // |x_0| sorted: .25 .5 1.5 2 4; quantile .8 at place 3.2: 2 + .2 * 2 = 2.4
    static const double x0[2][DIM] = {{.5, -4, 2, .25, -1.5}, {.1, -.2, .3, -.4, .5}};
    static const double q[6] = {.8, .8, .8, 1, .5, .8}, low[6] = {1, 1, 3, 1, 1, .1};
    static const double high[6] = {1e9, 2, 1e9, 1e9, 1e9, 1e9};
    static const double cut[6][2] = {{2.4, 1}, {2, 1},   {3, 3},
                                     {4, 1},   {1.5, 1}, {2.4, .42}};
    for (int k = 0; k < 6; k++)
        for (int method = 0; method < 2; method++) {
            df_real held[2 * DIM], x[2 * DIM];
            df_sample_desc d = df_sample_defaults();
            df_model m = df_model_defaults();
            double points[2] = {.5, 0};
            for (int i = 0; i < 2 * DIM; i++) held[i] = (df_real)x0[i / DIM][i % DIM];
            for (int i = 0; i < 2 * DIM; i++) x[i] = (df_real)(.1 * i);
            m.predict = fixed_predict;
            m.self = held;
            m.dim = DIM;
            m.process = df_process_vp(.1, 20);
            m.prediction = DF_X0;
            d.method = method ? "heun" : "ddim";
            d.points = points;
            d.points_count = 2;
            d.start = DF_START_GIVEN;
            d.threshold = q[k];
            d.threshold_min = low[k];
            d.threshold_max = high[k];
            sample(ctx, &m, &d, x, 2);
            for (int i = 0; i < 2 * DIM; i++) {
                double s = cut[k][i / DIM], v = x0[i / DIM][i % DIM];
                near(x[i], fmax(-s, fmin(s, v)) / s, tol(1e-14, 3e-6));
            }
        }
}

TEST(clipping_with_and_without_a_new_eps) {
    df_process p = df_process_vp(.1, 20);
    double points[2] = {.6, .2};
    df_point a = df_process_at(&p, .6), b = df_process_at(&p, .2);
    for (int k = 0; k < 4; k++) {
        df_real held[3], x[3];
        static const double x0[3] = {2, -.5, -3}, start[3] = {1, .3, -.4};
        double eta = k >= 2 ? .6 : 0, h = b.lambda - a.lambda, shat;
        df_sample_desc d = df_sample_defaults();
        df_model m = df_model_defaults();
        for (int i = 0; i < 3; i++) {
            held[i] = (df_real)x0[i];
            x[i] = (df_real)start[i];
        }
        m.predict = fixed_predict;
        m.self = held;
        m.dim = 3;
        m.process = p;
        m.prediction = DF_X0;
        d.points = points;
        d.points_count = 2;
        d.start = DF_START_GIVEN;
        d.clip = 1;
        d.eta = eta;
        d.noise_scale = 0;
        d.compat = k % 2 ? DF_COMPAT_KEEP_EPS : 0;
        sample(ctx, &m, &d, x, 1);
        shat = eta * b.sigma * sqrt(-expm1(-2 * h));
        for (int i = 0; i < 3; i++) {
            double cut = fmax(-1, fmin(1, x0[i]));
            double eps = (start[i] - a.alpha * (k % 2 ? x0[i] : cut)) / a.sigma;
            near(x[i], b.alpha * cut + sqrt(b.sigma * b.sigma - shat * shat) * eps,
                 tol(1e-13, 2e-6));
        }
    }
}

TEST(noise_scale_of_every_row) {
    // Affine model, same draws: x - x(no noise) grows as the scale.
    int count;
    const df_sampler_row *rows = df_sampler_rows(&count);
    int tried = 0;
    for (int k = 0; k < count; k++) {
        df_real x[3][4];
        gauss g;
        df_model m = gauss_model(&g, .7, .3, df_process_vp(.1, 20), DF_V, 2);
        df_sample_desc d = usable(&rows[k], &m.process);
        if (!rows[k].stochastic || rows[k].asks != DF_ASK_PREDICT) continue;
        if (strcmp(rows[k].name, "mala") == 0) continue; // accepts by its own noise
        tried++;
        d.steps = 9;
        d.seed = 8;
        for (int j = 0; j < 3; j++) {
            d.noise_scale = j * .75;
            for (int i = 0; i < 4; i++) x[j][i] = 1;
            sample(ctx, &m, &d, x[j], 2);
        }
        for (int i = 0; i < 4; i++) {
            double one = (double)x[1][i] - (double)x[0][i];
            check(fabs(one) > 1e-4, "%s: no noise", rows[k].name);
            near((double)x[2][i] - (double)x[0][i], 2 * one, tol(1e-11, 1e-4));
        }
    }
    check(tried >= 14, "%d rows", tried);
}

// ---- statistics of dpm_solver_v3 ----

TEST(v3_statistics_of_a_gaussian) {
    enum { N = 20, DIM = 3 };
    for (int k = 0; k < 4; k++) { // JVP, then differences; VP, then flow, where alpha = 0
        df_process p = k / 2 ? df_process_flow() : df_process_vp(.1, 20);
        df_sample_desc d = df_sample_defaults();
        df_point grid[N + 1];
        gauss g;
        df_model m = gauss_model(&g, .3, .5, p, DF_V, DIM);
        df_v3_statistics *e;
        int count, first = k / 2;
        if (k % 2) m.answers &= ~(unsigned)DF_ASK_JVP;
        d.steps = N;
        d.end = DF_END_T_MIN;
        d.t_min = .01;
        expect(df_grid(ctx, &p, &d, grid, N + 1, &count) == DF_OK);
        e = df_v3_estimate(ctx, &m, &d, 40);
        if (!check(e != NULL, "%s", df_ctx_message(ctx))) continue;
        expect(e->count == N + 1 - first && e->dim == DIM);
        for (int i = 0; i < e->count; i++) {
            df_point q = grid[first + i];
            double V = q.alpha * q.alpha * .5 + q.sigma * q.sigma;
            near(e->lambda[i], q.lambda, 1e-12);
            for (int j = 0; j < DIM; j++) {
                near(e->l[i * DIM + j], q.sigma * q.sigma / V,
                     k % 2 ? tol(1e-6, 2e-2) : tol(1e-12, 1e-5));
                check(fabs(e->s[i * DIM + j]) <= 1 &&
                          finite_bits((df_real)e->b[i * DIM + j]),
                      "s %g, b %g", e->s[i * DIM + j], e->b[i * DIM + j]);
            }
        }
        df_v3_free(ctx, e);
    }
}

TEST(v3_on_a_gaussian) {
    // With the linear part exact and s, b what is left, dpm_solver_v3 has nothing to see: its
    // error is the tables', and of second order. The flow multiplies by sqrt(W/V).
    df_process p = df_process_vp(.1, 20);
    df_sample_desc d = df_sample_defaults();
    df_point a = df_process_at(&p, .98), b = df_process_at(&p, .01);
    double V = a.alpha * a.alpha * .5 + a.sigma * a.sigma, off[3] = {0, 0, 0};
    double W = b.alpha * b.alpha * .5 + b.sigma * b.sigma;
    gauss g;
    df_model m = gauss_model(&g, .3, .5, p, DF_V, 2);
    d.grid = "lambda";
    d.t_max = .98;
    d.t_min = .01;
    d.end = DF_END_T_MIN;
    for (int k = 0; k < 3; k++) {
        df_real x[2] = {1, -2};
        df_v3_statistics *e;
        d.steps = k == 1 ? 50 : 200;
        d.start = DF_START_NOISE;
        e = df_v3_estimate(ctx, &m, &d, 40);
        if (!check(e != NULL, "%s", df_ctx_message(ctx))) return;
        d.method = k == 0 ? "dpmpp_2m" : "dpm_solver_v3";
        d.steps = 10;
        d.start = DF_START_GIVEN;
        d.statistics = e;
        sample(ctx, &m, &d, x, 1);
        for (int j = 0; j < 2; j++)
            off[k] += fabs((double)x[j] - .3 * b.alpha -
                           sqrt(W / V) * ((j ? -2 : 1) - .3 * a.alpha));
        df_v3_free(ctx, e);
    }
    if (getenv("SAMPLING_VERBOSE"))
        printf("2m %g, v3 of 50 %g, of 200 %g\n", off[0], off[1], off[2]);
    check(off[2] < .01 * off[0], "dpm_solver_v3 off by %g, dpmpp_2m by %g", off[2],
          off[0]);
    if (SHARP) check(off[2] < off[1] / 10, "of 50 points %g, of 200 %g", off[1], off[2]);
}

// Labels shift the answers: statistics and eps2 must be asked with them.
static int labelled(void *self, df_ctx *c, const df_query *q, df_real *out) {
    if (q->labels == NULL) return 51;
    return gauss_predict(self, c, q, out);
}
TEST(measuring_asks_with_labels) {
    static const int labels[6] = {1, 2, 1, 2, 1, 2};
    double out[5];
    df_real data[12] = {0};
    gauss g;
    df_model m = gauss_model(&g, 0, 1, df_process_vp(.1, 20), DF_V, 2);
    df_sample_desc d = df_sample_defaults();
    df_v3_statistics *e;
    m.predict = labelled;
    m.answers = DF_ASK_PREDICT;
    d.steps = 5;
    d.labels = labels;
    e = df_v3_estimate(ctx, &m, &d, 6);
    check(e != NULL, "%s", df_ctx_message(ctx));
    df_v3_free(ctx, e);
    check(df_sample_eps2(ctx, &m, &d, data, 6, out) == DF_OK, "%s", df_ctx_message(ctx));
    df_ctx_clear(ctx);
}
TEST(measuring_needs_no_start) {
    // what only sampling knows is left aside: the same statistics
    gauss g;
    df_model m = gauss_model(&g, .3, .5, df_process_vp(.1, 20), DF_V, 2);
    df_sample_desc d = df_sample_defaults();
    df_v3_statistics *want, *got;
    d.steps = 8;
    want = df_v3_estimate(ctx, &m, &d, 10);
    expect(want != NULL);
    for (int k = 0; want && k < 4; k++) {
        df_sample_desc e = d;
        if (k == 0) e.start = DF_START_GIVEN;
        if (k == 1) e.corrections = 2;
        if (k == 2) e.churn = 3;
        if (k == 3) e.method = "ddpm", e.variance = DF_VARIANCE_LARGE;
        got = df_v3_estimate(ctx, &m, &e, 10);
        if (check(got != NULL, "%d: %s", k, df_ctx_message(ctx)))
            near_all(got->b, want->b, want->count * want->dim, 1e-9);
        df_v3_free(ctx, got);
    }
    df_v3_free(ctx, want);
    df_ctx_clear(ctx);
}

// ---- wrong use ----

static int refused(const char *part, df_result want, const df_model *m,
                   const df_sample_desc *d) {
    df_real x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    df_result r;
    df_sampler *s;
    df_ctx_clear(ctx);
    r = df_sample(ctx, m, d, x, 2);
    if (!check(r == want, "\"%s\": %d, want %d", part, r, want)) return 0;
    if (!check(strstr(df_ctx_message(ctx), part) != NULL, "\"%s\" is not in: %s", part,
               df_ctx_message(ctx)))
        return 0;
    s = df_sampler_create(ctx, m, d, x, 2);
    check(s == NULL, "\"%s\": df_sampler_create took it", part);
    df_sampler_free(s);
    return 1;
}

TEST(wrong_settings_are_sentences) {
    df_process table = table_process(100, 1e-3, .2);
    double nan = strtod("nan", NULL), inf = strtod("inf", NULL);
    for (int k = 0; k < 62; k++) {
        df_model m = wave_model(2);
        df_sample_desc d = df_sample_defaults();
        df_v3_statistics v3 = made_up(3);
        double eps2[12], ends[2] = {.9, 0};
        df_process flow = df_process_flow();
        const char *say = NULL;
        df_result want = DF_ERR_ARGUMENT;
        d.steps = 12;
        if (k >= 36 && k <= 42) d.inverse = 1, d.start = DF_START_GIVEN;
        if (k == 60) { // eps2 is of N steps
            d.method = "ddpm";
            d.variance = DF_VARIANCE_ANALYTIC;
            d.eps2 = eps2;
            d.restart_max = 2;
            m.process = table;
        }
        if (k == 44 || k == 45) m.answers = DF_ASK_PREDICT, want = DF_ERR_UNSUPPORTED;
        switch (k) {
        case 0: d.method = "dpmpp_2m", d.order = 3, d.steps = 1, say = "steps 1, order 3: takes"; break;
        case 1: d.method = "dpmpp_2m", d.order = 5, say = "order 5"; break;
        case 2: d.method = "heun", d.t_max = .9, d.order = 2, say = "order 2"; break;
        case 3: d.method = "dpmpp_2m", d.order = -1, say = "order -1"; break;
        case 4: d.method = "heun", d.corrector = 2, say = "corrector 2: "; break;
        case 5: d.method = "unipc", d.corrector = 6, say = "corrector is 6"; break;
        case 6: d.method = "heun", d.predicts = DF_X0, say = "predicts 1: "; break;
        case 7: d.method = "dpmpp_2m", d.predicts = DF_V, say = "predicts is 4"; break;
        case 8: d.method = "heun", d.slope = DF_SLOPE_BH2, say = "slope 3: "; break;
        case 9: d.method = "dpmpp_2m", d.slope = (df_slope)4, say = "slope is 4"; break;
        case 10: d.method = "dpmpp_2m", d.final = (df_final)4, say = "final is 4"; break;
        case 11: d.method = "dpmpp_2m", d.ratio = .5, say = "ratio"; break;
        case 12: d.method = "heun", d.ratio = 1.5, say = "ratio is 1.5"; break;
        case 13: d.method = "heun", d.ratio = -.5, say = "ratio is -0.5"; break;
        case 14: d.eta_in = (df_eta)5, say = "eta_in is 5"; break;
        case 15: d.method = "ddpm", d.eta_in = DF_ETA_FAMILY, say = "eta_in 1,"; break;
        case 16: d.method = "rk4", d.eta = .5, say = "eta 0.5: "; break;
        case 17: d.eta = 1.5, say = "eta is 1.5"; break;
        case 18: d.eta = 1.5, d.eta_in = DF_ETA_STRAIGHT, say = "eta is 1.5"; break;
        case 19: d.eta_min = 2, d.eta_max = 1, say = "eta_min 2"; break;
        case 20: d.eta_max = nan, say = "eta_max is nan"; break;
        case 21: d.threshold = 1.5, say = "threshold is 1.5"; break;
        case 22: d.threshold = -.5, say = "threshold is -0.5"; break;
        case 23: d.threshold = .9, d.clip = 1, say = "clip 1, threshold 0.9: "; break;
        case 24: d.threshold_min = 3, d.threshold_max = 2, say = "threshold_min 3"; break;
        case 25: d.restarts = 1, d.restart_min = .3, d.restart_max = .2, say = "restart_min 0.3, restart_max 0.2"; break;
        case 26: d.restarts = 1, d.restart_steps = 0, say = "restart_steps is 0"; break;
        case 27: d.restarts = -1, say = "restarts is -1"; break;
        case 28: d.restarts = 1, d.restart_max = inf, say = "restart_max is inf"; break;
        case 29: d.restarts = 300000, say = "300000 restarts"; break;
        case 30: d.corrections = -2, say = "corrections is -2"; break;
        case 31: d.method = "langevin", d.corrections = 1, say = "corrections 1"; break;
        case 32: d.method = "rk45", d.churn = 1, say = "churn 1"; break;
        case 33: d.method = "consistency", d.restarts = 1, d.eta = 0, say = "restarts 1,"; break;
        case 34: d.method = "paradigms", d.window = 0, say = "window is 0"; break;
        case 35: d.inverse = 1, d.end = DF_END_T_MIN, say = "start GIVEN"; break;
        case 36: d.eta = .5, say = "eta 0.5"; break;
        case 37: d.method = "ddpm", say = "ddpm"; break;
        case 38: d.churn = 2, say = "churn 2"; break;
        case 39: d.restarts = 2, say = "restarts 2"; break;
        case 40: d.corrections = 3, say = "corrections 3"; break;
        case 41: d.method = "langevin", say = "langevin"; break;
        case 42: say = "data point"; break;
        case 43: d.compat = 1u << 20, say = "compat is 1048576"; break;
        case 44: d.method = "mala", say = "log density"; break;
        case 45: d.method = "consistency", say = "maps"; break;
        case 46: d.method = "dpm_solver_v3", say = "statistics of dim 2"; break;
        case 47: d.method = "dpm_solver_v3", d.statistics = &v3, say = "of dim 2"; break;
        case 48: d.method = "mala", d.compat = DF_COMPAT_NORM_BATCH, say = "COMPAT_NORM"; break;
        case 49: d.method = "baoab", d.compat = DF_COMPAT_NORM_SAMPLE, say = "COMPAT_NORM"; break;
        case 50: d.method = "ddpm", d.variance = DF_VARIANCE_ANALYTIC, say = "eps2"; break;
        case 51: d.variance = DF_VARIANCE_ANALYTIC, say = "belong to ddpm"; break;
        case 52: m.learned = (df_learned)4, say = "`learned` is 4"; break;
        case 53: d.method = "langevin", d.t_max = 1.5, say = "t_max is 1.5"; break;
        case 54: d.snr = nan, say = "snr is nan"; break;
        case 55: d.langevin_step = -1, say = "langevin_step is -1"; break;
        case 56: d.friction = -1, say = "friction is -1"; break;
        case 57: d.rtol = inf, say = "rtol is inf"; break;
        case 58: d.method = "rk45", d.points = ends, d.points_count = 2, say = "rk45"; break;
        case 59: d.method = "dpmpp_2s", d.predicts = 0, m.process = flow, say = "alpha = 0"; break;
        case 60: d.restarts = 1, d.restart_min = 1, say = "12 steps, but 17"; break;
        case 61: d.method = "mala", d.noise_scale = .5, say = "noise_scale 0.5, clip 0"; break;
        }
        refused(say, want, &m, &d);
    }
    df_ctx_clear(ctx);
}

TEST(unknown_names_and_grids) {
    df_model m = wave_model(2);
    df_sample_desc d = df_sample_defaults();
    df_process table = table_process(20, .01, .3);
    d.method = "hoin";
    refused("heun", DF_ERR_ARGUMENT, &m, &d);
    d.method = "dpm_solver_v4";
    refused("dpm_solver_v3", DF_ERR_ARGUMENT, &m, &d);
    d.method = "ddim";
    d.grid = "karas";
    refused("karras", DF_ERR_ARGUMENT, &m, &d);
    m.process = table; // one entry is no path
    d.grid = "leading";
    d.steps = 1;
    d.end = DF_END_T_MIN;
    refused("one point", DF_ERR_ARGUMENT, &m, &d);
    df_ctx_clear(ctx);
}

TEST(measuring_wrongly) {
    df_model m = wave_model(2), silent = m;
    df_sample_desc d = df_sample_defaults(), bad = d;
    df_real data[4] = {0, 0, 0, 0};
    double out[64];
    silent.predict = NULL;
    bad.cookie = 0;
    d.steps = 6;
    expect(df_sample_eps2(NULL, &m, &d, data, 2, out) == DF_ERR_ARGUMENT);
    expect(df_sample_eps2(ctx, NULL, &d, data, 2, out) == DF_ERR_ARGUMENT);
    expect(df_sample_eps2(ctx, &silent, &d, data, 2, out) == DF_ERR_ARGUMENT &&
           says(ctx, "eps2"));
    expect(df_sample_eps2(ctx, &m, &bad, data, 2, out) == DF_ERR_ARGUMENT);
    expect(df_sample_eps2(ctx, &m, NULL, data, 2, out) == DF_ERR_ARGUMENT);
    expect(df_sample_eps2(ctx, &m, &d, NULL, 2, out) == DF_ERR_ARGUMENT &&
           says(ctx, "x or out"));
    expect(df_sample_eps2(ctx, &m, &d, data, 2, NULL) == DF_ERR_ARGUMENT);
    expect(df_sample_eps2(ctx, &m, &d, data, 0, out) == DF_ERR_ARGUMENT &&
           says(ctx, "n = 0"));
    d.steps = 0;
    expect(df_sample_eps2(ctx, &m, &d, data, 2, out) == DF_ERR_ARGUMENT &&
           says(ctx, "0 steps"));
    expect(df_v3_estimate(ctx, &m, &d, 4) == NULL && says(ctx, "0 steps"));
    d.steps = 6;
    d.grid = "no such";
    expect(df_sample_eps2(ctx, &m, &d, data, 2, out) == DF_ERR_ARGUMENT &&
           says(ctx, "no such"));
    expect(df_v3_estimate(ctx, &m, &d, 4) == NULL && says(ctx, "no such"));
    d.grid = "uniform";
    expect(df_v3_estimate(NULL, &m, &d, 4) == NULL &&
           df_v3_estimate(ctx, NULL, &d, 4) == NULL);
    expect(df_v3_estimate(ctx, &m, NULL, 4) == NULL &&
           df_v3_estimate(ctx, &m, &bad, 4) == NULL);
    expect(df_v3_estimate(ctx, &silent, &d, 4) == NULL &&
           df_v3_estimate(ctx, &m, &d, 0) == NULL);
    d.steps = 2;
    expect(df_v3_estimate(ctx, &m, &d, 4) == NULL && says(ctx, "wants 3 or more"));
    df_v3_free(ctx, NULL);
    df_v3_free(NULL, NULL);
    df_ctx_clear(ctx);
}

// A model that refuses its k-th question.
typedef struct refuser {
    gauss g;
    int left;
} refuser;
static int refuses(void *self, df_ctx *c, const df_query *q, df_real *out) {
    refuser *r = (refuser *)self;
    return r->left-- == 0 ? 53 : gauss_predict(&r->g, c, q, out);
}
TEST(measuring_a_model_that_refuses) {
    for (int k = 0; k < 2; k++)
        for (int at = 0, done = 0; !done && at < 100; at++) {
            counter c = {0, 0, 0};
            df_ctx *mine = new_ctx(1, &c);
            refuser r;
            df_model m = gauss_model(&r.g, .3, .5, df_process_vp(.1, 20), DF_V, 2);
            df_sample_desc d = df_sample_defaults();
            df_real data[4] = {0, 0, 0, 0};
            double out[5];
            df_v3_statistics *e = NULL;
            df_result result;
            r.left = at;
            m.predict = refuses;
            m.self = &r;
            d.steps = 5;
            if (k == 0) {
                e = df_v3_estimate(mine, &m, &d, 3);
                result = e ? DF_OK : df_ctx_error(mine);
            } else
                result = df_sample_eps2(mine, &m, &d, data, 2, out);
            done = result == DF_OK;
            if (!done) expect(result == 53 && says(mine, "predict returned 53"));
            expect(!done || at == (k ? 5 : 5 + 2 * 5));
            df_v3_free(mine, e);
            df_ctx_free(mine);
            check(c.live == 0, "question %d: %ld bytes leaked", at, c.live);
        }
}

// ---- every allocation failing in turn ----

TEST(memory_that_runs_out) {
    enum { CASES = 8 };
    static const char *const what[CASES] = {"df_v3_estimate",
                                            "df_v3_estimate by differences",
                                            "df_sample_eps2",
                                            "thresholding",
                                            "paradigms",
                                            "learned variance",
                                            "restarts and corrections",
                                            "rk45"};
    df_real data[12];
    for (int i = 0; i < 12; i++) data[i] = (df_real)(.1 * i);
    for (int k = 0; k < CASES; k++) {
        int done = 0, failed = 0;
        for (long at = 1; !done && at < 200; at++) {
            counter c = {0, 0, 0};
            df_ctx *mine = new_ctx(2, &c);
            gauss g;
            df_model m = k < 3 ? gauss_model(&g, .3, .5, df_process_vp(.1, 20), DF_V, 3)
                               : wave_model(3);
            df_sample_desc d = df_sample_defaults();
            df_real x[12];
            double out[8];
            df_result r = DF_OK;
            df_v3_statistics *e = NULL;
            int labels[4] = {0, 1, 2, 0};
            if (!check(mine != NULL, "no context")) return;
            d.steps = 8;
            d.labels = k == 4 ? labels : NULL;
            if (k == 1) m.answers = DF_ASK_PREDICT;
            if (k == 3) d.threshold = .9;
            if (k == 4) d.method = "paradigms";
            if (k == 5) d.method = "ddpm", m.learned = DF_LEARNED_RANGE, m.self = &d;
            if (k == 6)
                d.restarts = d.corrections = 1, d.restart_min = 1, d.restart_max = 2;
            if (k == 7) d.method = "rk45", m.input_sigma_data = .5;
            c.calls = 0;
            c.fail_at = at;
            if (k < 2) {
                e = df_v3_estimate(mine, &m, &d, 4);
                if (e == NULL) r = df_ctx_error(mine);
                expect((e == NULL) == (r != DF_OK));
            } else if (k == 2)
                r = df_sample_eps2(mine, &m, &d, data, 4, out);
            else
                r = df_sample(mine, &m, &d, x, 4);
            done = r == DF_OK;
            failed += !done;
            if (!done)
                check(r == DF_ERR_MEMORY && strstr(df_ctx_message(mine), "memory"),
                      "%s, allocation %ld: %d \"%s\"", what[k], at, r,
                      df_ctx_message(mine));
            c.fail_at = 0;
            df_v3_free(mine, e);
            df_ctx_free(mine);
            check(c.live == 0, "%s, allocation %ld: %ld bytes leaked", what[k], at,
                  c.live);
        }
        check(done && failed >= 1, "%s: %d failures", what[k], failed);
    }
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    ctx = new_ctx(2, NULL);
    RUN(langevin_is_unadjusted);
    RUN(baoab_has_no_bias_in_x);
    RUN(mala_is_exact);
    RUN(mala_on_a_mixture);
    RUN(annealed_langevin_as_published);
    RUN(predictor_corrector_by_hand);
    RUN(langevin_norms_one_step);
    RUN(langevin_norms_and_their_bias);
    RUN(the_grid_of_restarts);
    RUN(restart_by_hand);
    RUN(restart_on_a_mixture);
    RUN(eta_acts_inside_its_window);
    RUN(history_ends_at_a_restart);
    RUN(every_row_bit_for_bit);
    RUN(every_setting_bit_for_bit);
    RUN(large_arrays_bit_for_bit);
    RUN(coupled_modes_say_so_by_acting_so);
    RUN(sweep);
    RUN(brownian_increments);
    RUN(brownian_draws_are_independent);
    RUN(one_brownian_path_for_any_number_of_steps);
    RUN(replayed_noise);
    RUN(torch_random_numbers);
    RUN(published_figures);
    RUN(adaptive_methods_keep_their_tolerance);
    RUN(a_tolerance_that_cannot_be_kept);
    RUN(paradigms_is_ddim);
    RUN(analytic_variance_is_exact_on_gaussians);
    RUN(learned_variances);
    RUN(maps_by_hand);
    RUN(there_and_back);
    RUN(inverse_noise_is_the_flows);
    RUN(edit_paints_and_all_see_it);
    RUN(edit_may_fail);
    RUN(dynamic_thresholding_by_hand);
    RUN(clipping_with_and_without_a_new_eps);
    RUN(noise_scale_of_every_row);
    RUN(v3_statistics_of_a_gaussian);
    RUN(v3_on_a_gaussian);
    RUN(measuring_asks_with_labels);
    RUN(measuring_needs_no_start);
    RUN(wrong_settings_are_sentences);
    RUN(unknown_names_and_grids);
    RUN(measuring_wrongly);
    RUN(measuring_a_model_that_refuses);
    RUN(memory_that_runs_out);
    df_ctx_free(ctx);
    return test_end();
}
