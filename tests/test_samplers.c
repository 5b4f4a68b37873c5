// Samplers and guidance: process invariance, orders of convergence, exact moments by noise
// impulses, recorded trajectories of published libraries, bitwise equality, errors.
#include "diffusion.h"
#include "golden.h"
#include "test.h"
#include <limits.h>

#define DOUBLE_BUILD (sizeof(df_real) == 8)

static df_ctx *ctx;

// ---- the model of these tests: a mixture's posterior mean, in any prediction ----

typedef struct mix {
    golden_mixture g;
    df_process process;
    df_prediction prediction;
    int calls, rows, most_rows;
} mix;


static int mix_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    mix *m = (mix *)self;
    (void)c;
    m->calls++;
    m->rows += q->n;
    if (q->n > m->most_rows) m->most_rows = q->n;
    for (int i = 0; i < q->n; i++) {
        double x[GOLDEN_DIM], x0[GOLDEN_DIM], row[2];
        for (int j = 0; j < q->dim; j++) x[j] = (double)q->x[i * q->dim + j];
        golden_posterior(&m->g, q->alpha[i], q->sigma[i], x, x0);
        golden_row(ctx, &m->process, m->prediction, q->t[i], q->alpha[i], q->sigma[i],
                   row);
        for (int j = 0; j < q->dim; j++) {
            double eps = (x[j] - q->alpha[i] * x0[j]) / q->sigma[i];
            out[i * q->dim + j] = (df_real)(row[0] * x0[j] + row[1] * eps);
        }
    }
    return 0;
}
static df_model mix_model(mix *m, golden_mixture g, df_process p,
                          df_prediction prediction) {
    df_model model = df_model_defaults();
    memset(m, 0, sizeof *m);
    m->g = g;
    m->process = p;
    m->prediction = prediction;
    model.predict = mix_predict;
    model.self = m;
    model.dim = g.dim;
    model.process = p;
    model.prediction = prediction;
    return model;
}
// One dimension, N(mean, variance).
static golden_mixture gaussian(double mean, double variance) {
    golden_mixture g;
    memset(&g, 0, sizeof g);
    g.K = g.dim = 1;
    g.w[0] = 1;
    g.mean[0][0] = mean;
    g.cov[0][0] = variance;
    return g;
}

enum { PROCESSES = 8 };
static df_process process_of(int i) {
    double betas[1000];
    df_process table = df_process_vp(.1, 20);
    switch (i) {
    case 0: return df_process_vp(.1, 20);
    case 1: return df_process_cosine();
    case 2: return df_process_ve(.01, 50);
    case 3: return df_process_edm(80);
    case 4: return df_process_subvp(.1, 20);
    case 5: return df_process_flow();
    case 6: return df_process_trig(.5);
    }
    df_betas(ctx, DF_BETAS_LINEAR, 1e-4, .02, 1000, betas);
    expect(df_process_table(ctx, betas, 1000, &table) == DF_OK);
    return table;
}

enum { POINTS = 8 }; // samples of most tests
static void start_r(double *r) {
    for (int i = 0; i < 2 * POINTS; i++) r[i] = sin(1.7 * i + .3) * 1.4;
}

// lambda from -3 to 3 in N equal steps.
static void lambda_grid(df_sample_desc *d, double *points, int N) {
    for (int i = 0; i <= N; i++) points[i] = -3 + 6.0 * i / N;
    d->points = points;
    d->points_count = N + 1;
    d->points_in = DF_POINTS_LAMBDA;
    d->start = DF_START_GIVEN;
}

static df_variance run_variance; // of ddpm in run_r
// Runs over the lambda grid from r = x/(alpha + sigma), gives r at the end.
static df_result run_r(const char *method, double eta, df_process p,
                       df_prediction prediction, int N, double *r) {
    static double points[1025];
    df_sample_desc d = df_sample_defaults();
    df_point first = df_process_at_lambda(&p, -3), last = df_process_at_lambda(&p, 3);
    df_real x[2 * POINTS];
    df_result result;
    mix m;
    df_model model = mix_model(&m, golden_gm2(), p, prediction);
    lambda_grid(&d, points, N);
    d.method = method;
    d.eta = eta;
    d.variance = run_variance;
    for (int i = 0; i < 2 * POINTS; i++)
        x[i] = (df_real)(r[i] * (first.alpha + first.sigma));
    result = df_sample(ctx, &model, &d, x, POINTS);
    check(result == DF_OK, "%s: %s", method, df_ctx_message(ctx));
    for (int i = 0; i < 2 * POINTS; i++) r[i] = (double)x[i] / (last.alpha + last.sigma);
    return result;
}

TEST(one_path_on_every_process) {
    static const struct {
        const char *method;
        double eta;
    } rows[] = {{"euler", -1}, {"heun", -1}, {"ddim", 0},
                {"ddim", .5},  {"ddim", 1},  {"ddpm", -1},
                {"ddpm", -1}};
    for (int k = 0; k < 7; k++) {
        double want[2 * POINTS], r[2 * POINTS];
        run_variance = k == 6 ? DF_VARIANCE_LARGE : DF_VARIANCE_SMALL;
        start_r(want);
        run_r(rows[k].method, rows[k].eta, process_of(0), DF_EPS, 20, want);
        for (int p = 1; p < PROCESSES; p++) {
            start_r(r);
            run_r(rows[k].method, rows[k].eta, process_of(p), DF_EPS, 20, r);
            near_all(r, want, 2 * POINTS, DOUBLE_BUILD ? 1e-12 : 2e-5);
        }
    }
    run_variance = DF_VARIANCE_SMALL;
}

TEST(one_end_for_every_prediction) {
    static const char *methods[] = {"euler", "heun", "ddpm", "euler_t", "euler_maruyama"};
    for (int k = 0; k < 5; k++)
        for (int p = 0; p < PROCESSES; p += 5) {
            double want[2 * POINTS], r[2 * POINTS];
            start_r(want);
            run_r(methods[k], -1, process_of(p), DF_EPS, 12, want);
            for (int a = 1; a < DF_PREDICTION_COUNT; a++) {
                start_r(r);
                run_r(methods[k], -1, process_of(p), (df_prediction)a, 12, r);
                near_all(r, want, 2 * POINTS, DOUBLE_BUILD ? 1e-9 : 1e-4);
            }
        }
}

TEST(euler_is_ddim_and_ddim_1_is_ddpm) {
    for (int p = 0; p < PROCESSES; p++) {
        double a[2 * POINTS], b[2 * POINTS];
        start_r(a);
        start_r(b);
        run_r("euler", -1, process_of(p), DF_X0, 15, a);
        run_r("ddim", -1, process_of(p), DF_X0, 15, b);
        same_bits(a, b, sizeof a);
        start_r(a);
        start_r(b);
        run_r("ddim", 1, process_of(p), DF_X0, 15, a);
        run_r("ddpm", -1, process_of(p), DF_X0, 15, b);
        near_all(a, b, 2 * POINTS, DOUBLE_BUILD ? 1e-12 : 2e-5);
    }
}

// ---- orders ----

TEST(orders_of_convergence) {
    static const struct {
        const char *method;
        int process;
        double order;
    } rows[] = {{"ddim", 0, 1},    {"euler", 3, 1},   {"euler", 5, 1}, {"euler_t", 0, 1},
                {"euler_t", 5, 1}, {"euler_t", 6, 1}, {"heun", 0, 2},  {"heun", 3, 2},
                {"heun", 4, 2},    {"heun", 5, 2}};
    double exact[2 * POINTS];
    if (!DOUBLE_BUILD) return; // float rounding hides the slopes
    start_r(exact);
    for (int i = 0; i < 2 * POINTS; i++) exact[i] *= 1 + exp(3.0);
    golden_ode(exact, POINTS, -3, 3, 2000);
    for (int k = 0; k < 10; k++) {
        double error[3] = {0, 0, 0};
        const df_sampler_row *row = df_sampler_find(ctx, rows[k].method);
        expect(row != NULL && row->order == (int)rows[k].order);
        for (int j = 0; j < 3; j++) {
            double r[2 * POINTS];
            start_r(r);
            run_r(rows[k].method, -1, process_of(rows[k].process), DF_V, 160 << j, r);
            for (int i = 0; i < 2 * POINTS; i++) {
                double e = r[i] * (1 + exp(-3.0)) - exact[i];
                error[j] += e * e;
            }
        }
        for (int j = 0; j < 2; j++) {
            double slope = .5 * log2(error[j] / error[j + 1]);
            check(fabs(slope - rows[k].order) < .15, "%s on process %d, N = %d: slope %g",
                  rows[k].method, rows[k].process, 160 << j, slope);
        }
    }
}

// ---- exact moments: an affine sampler fed with unit impulses ----

// Sample 0 gets no noise at all, sample j > 0 a one in draw j - 1: N draws, N + 1 samples.
static int impulse(void *user, const df_noise_query *q, df_real *out) {
    int *draws = (int *)user;
    if ((int)q->draw >= *draws) *draws = (int)q->draw + 1;
    for (int i = 0; i < q->n; i++)
        out[i] = (df_real)(q->first_sample + (uint64_t)i == (uint64_t)q->draw + 1);
    return 0;
}
// Mean and variance of the result on data N(mean, variance), one-dimensional.
static void moments(df_sample_desc d, df_process p, double mean, double variance,
                    double *got) {
    df_real x[1026];
    int draws = 0, n = 2 * d.steps + 4;
    mix m;
    df_model model = mix_model(&m, gaussian(mean, variance), p, DF_X0);
    d.noise.fill = impulse;
    d.noise.user = &draws;
    check(df_sample(ctx, &model, &d, x, n) == DF_OK, "%s", df_ctx_message(ctx));
    expect(draws < n);
    got[0] = (double)x[0];
    got[1] = 0;
    for (int j = 1; j < n; j++)
        got[1] += ((double)x[j] - got[0]) * ((double)x[j] - got[0]);
}

TEST(moments_of_the_exponential_family) {
    // VP, uniform lambda, t from 1 to 1e-3, start N(0, 1), data N(.7, .04): errors.
    static const double eta0[5] = {-.00698, -.00365, -.00187, -.00095, -.00048};
    static const double eta1[5] = {-.0121, -.0068, -.0036, -.0019, -.0009};
    df_process p = df_process_vp(.1, 20);
    df_point end = df_process_at(&p, 1e-3);
    double want = end.alpha * end.alpha * .04 + end.sigma * end.sigma;
    for (int k = 0; k < 5; k++) {
        df_sample_desc d = df_sample_defaults();
        double got[2], ddpm[2];
        d.steps = 25 << k;
        d.grid = "lambda";
        d.t_min = 1e-3;
        d.end = DF_END_T_MIN;
        d.method = "ddim";
        moments(d, p, .7, .04, got);
        near_abs(got[1] - want, eta0[k], 2e-5);
        near_abs(got[0] - end.alpha * .7, -9e-4, 1e-4);
        d.eta = 1;
        moments(d, p, .7, .04, got);
        near_abs(got[1] - want, eta1[k], 6e-5);
        near_abs(got[0] - end.alpha * .7, -1.2e-6, 1e-6);
        d.eta = -1;
        d.method = "ddpm";
        moments(d, p, .7, .04, ddpm);
        near_all(ddpm, got, 2, DOUBLE_BUILD ? 1e-12 : 1e-5);
    }
}

TEST(moments_of_ddpm_large) {
    // By hand: q(x_t | x_s, x_0 = E[x_0|x_s]) is affine in x_s.
    df_process p = df_process_flow();
    df_sample_desc d = df_sample_defaults();
    double got[2], M = .7, C = .04, mean = 0, var = 1;
    enum { N = 9 };
    d.method = "ddpm";
    d.steps = N;
    d.variance = DF_VARIANCE_LARGE;
    moments(d, p, M, C, got);
    for (int i = 0; i < N; i++) {
        double s = 1 - (double)i / (int)N, t = 1 - (double)(i + 1) / (int)N;
        double as = 1 - s, at = 1 - t;
        double gain = as * C / (as * as * C + s * s);    // x0 = M + gain (x - as M)
        double step = s * s - as * as / at / at * t * t; // sigma_{s|t}^2
        double large = step * (at * at + t * t) / (as * as + s * s);
        double a = as / at * t * t / s / s, b = at * step / s / s;
        mean = a * mean + b * (M + gain * (mean - as * M));
        var = (a + b * gain) * (a + b * gain) * var + (i + 1 < N ? large : 0);
    }
    near(got[0], mean, DOUBLE_BUILD ? 1e-13 : 1e-5);
    near(got[1], var, DOUBLE_BUILD ? 1e-13 : 1e-5);
    // On data N(0, 1) LARGE is the exact posterior: the variance is right at every t.
    d.end = DF_END_T_MIN;
    d.t_min = .2;
    moments(d, p, 0, 1, got);
    near(got[0], 0, 1e-12);
    near(got[1], .8 * .8 + .2 * .2, DOUBLE_BUILD ? 1e-13 : 1e-5);
}

TEST(moments_of_euler_maruyama) {
    df_process p = df_process_vp(.1, 20);
    static const double etas[3] = {0, 1, 1.5};
    for (int e = 0; e < 3; e++) {
        double error[2] = {0, 0}, eta = etas[e];
        for (int k = 0; k < 2; k++) {
            int N = 200 << k;
            df_sample_desc d = df_sample_defaults();
            double got[2], mean = 0, var = 0;
            df_point last = df_process_at(&p, .01);
            d.method = "euler_maruyama";
            d.eta = eta;
            d.steps = N;
            d.t_min = .01;
            d.end = DF_END_T_MIN;
            moments(d, p, .7, .04, got);
            for (int i = 0; i < N; i++) {
                double h = (1 - .01) / N, t = 1 - i * h, beta = .1 + 19.9 * t;
                double A = exp(-.25 * 19.9 * t * t - .05 * t), S2 = 1 - A * A;
                double c = A * A * .04 + S2, k2 = .5 * (1 + eta * eta) * beta * h;
                if (i == 0) var = S2;
                // f = -beta/2, g^2 = beta, score = -(x - A mean)/c
                var = pow(1 + .5 * beta * h - k2 / c, 2) * var + eta * eta * beta * h;
                mean = (1 + .5 * beta * h - k2 / c) * mean + k2 / c * A * .7;
            }
            near(got[0], mean, DOUBLE_BUILD ? 1e-11 : 1e-4);
            near(got[1], var, DOUBLE_BUILD ? 1e-11 : 1e-4);
            error[k] = var - (last.alpha * last.alpha * .04 + last.sigma * last.sigma);
        }
        check(error[0] / error[1] > 1.7 && error[0] / error[1] < 2.4,
              "weak order 1: eta %g, errors %g %g", eta, error[0], error[1]);
    }
}

TEST(edm_churn_moments) {
    // Heun on N(0, .25), sigma 80 .. .002, rho 7: variances without and with churn.
    static const int steps[4] = {10, 18, 40, 80};
    static const double plain[4] = {.3719, .2784, .2549, .2512};
    static const double churn[4] = {.4745, .3163, .2691, .2581};
    df_process p = df_process_edm(160); // room for the churned sigma above 80
    for (int k = 0; k < 4; k++) {
        df_sample_desc d = df_sample_defaults();
        double got[2];
        d.method = "heun";
        d.grid = "karras";
        d.steps = steps[k];
        d.t_max = 80.0 / 160;
        d.t_min = .002 / 160;
        moments(d, p, 0, .25, got);
        near_abs(got[1], plain[k], 6e-5);
        d.churn = 40;
        d.churn_min = .05;
        d.churn_max = 50;
        moments(d, p, 0, .25, got);
        near_abs(got[1], churn[k], 6e-5);
    }
}

TEST(churn_is_the_forward_kernel_on_every_process) {
    // The same rho grid and draws: r agrees, so the kernel scales x as it should.
    double rho[11], want = 0;
    for (int i = 0; i < 11; i++) rho[i] = i < 10 ? 10 * pow(.5, i) : 0;
    for (int k = 0; k < PROCESSES; k++) {
        df_process p = process_of(k);
        df_sample_desc d = df_sample_defaults();
        df_real x = (df_real).3;
        df_point first = df_process_at_rho(&p, 10);
        mix m;
        df_model model = mix_model(&m, gaussian(.7, .04), p, DF_X0);
        x = (df_real)((double)x * first.alpha);
        d.method = "euler";
        d.points = rho;
        d.points_count = 11;
        d.points_in = DF_POINTS_RHO;
        d.start = DF_START_GIVEN;
        d.churn = 3;
        check(df_sample(ctx, &model, &d, &x, 1) == DF_OK, "%s", df_ctx_message(ctx));
        if (k == 0) want = (double)x;
        near(x, want, DOUBLE_BUILD ? 1e-10 : 1e-4);
    }
}

// ---- bit for bit ----

// A model with a few transcendental operations a number, cheap at any dimension.
static int wave_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    (void)self;
    (void)c;
    for (int i = 0; q->ask == DF_ASK_LOG_DENSITY && i < q->n; i++)
        out[i] = (df_real)(-.5 * (double)q->x[(size_t)i * (size_t)q->dim]);
    for (int i = 0; q->ask != DF_ASK_LOG_DENSITY && i < q->n; i++) {
        double shift = q->labels ? .1 * q->labels[i] : 0;
        for (int j = 0; j < q->dim; j++) {
            double x = (double)q->x[(size_t)i * (size_t)q->dim + (size_t)j];
            out[(size_t)i * (size_t)q->dim + (size_t)j] =
                (df_real)(x / (1 + x * x) + shift + .1 * (double)q->t_model[i]);
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
    m.answers |= DF_ASK_MAP | DF_ASK_LOG_DENSITY;
    return m;
}
static df_ctx *context(int threads) {
    df_ctx_desc d = df_ctx_defaults();
    d.threads = threads;
    return df_ctx_create(&d);
}

TEST(alone_in_pieces_and_on_threads) {
    enum { N = 13, DIM = 4111 };
    static df_real whole[N * DIM], part[N * DIM];
    static const struct {
        const char *method;
        double eta, churn, clip;
    } rows[] = {{"ddpm", -1, 0, 0},
                {"ddim", .7, 0, .9},
                {"heun", -1, 4, 0},
                {"euler_maruyama", 1, 0, 0}};
    for (int k = 0; k < 4; k++) {
        df_model m = wave_model(DIM);
        df_sample_desc d = df_sample_defaults();
        int labels[N];
        for (int i = 0; i < N; i++) labels[i] = i % 3;
        d.method = rows[k].method;
        d.eta = rows[k].eta;
        d.churn = rows[k].churn;
        d.clip = rows[k].clip;
        d.steps = 4;
        d.seed = 99;
        d.first_sample = 1000;
        d.labels = labels;
        d.end = DF_END_T_MIN;
        expect(df_sample(ctx, &m, &d, whole, N) == DF_OK);
        for (int threads = 1; threads <= 3; threads++) {
            df_ctx *c = context(threads);
            memset(part, 0, sizeof part);
            m.max_batch = threads == 2 ? 5 : 0;
            expect(df_sample(c, &m, &d, part, N) == DF_OK);
            same_bits(whole, part, sizeof whole);
            df_ctx_free(c);
        }
        memset(part, 0, sizeof part);
        for (int at = 0, piece = 1; at < N; at += piece, piece++) {
            df_sample_desc e = d;
            if (piece > N - at) piece = N - at;
            e.first_sample = d.first_sample + (uint64_t)at;
            e.labels = labels + at;
            expect(df_sample(ctx, &m, &e, part + at * DIM, piece) == DF_OK);
        }
        same_bits(whole, part, sizeof whole);
    }
}

TEST(ask_and_answer_is_the_whole_loop) {
    int count;
    const df_sampler_row *rows = df_sampler_rows(&count);
    for (int k = 0; k < count; k++) {
        df_real a[2 * POINTS], b[2 * POINTS], out[2 * POINTS * 8];
        df_sample_desc d = df_sample_defaults();
        df_model m = wave_model(2);
        df_sampler *s;
        df_query q, again;
        char name[32];
        int step, steps, evaluations, asked = 0, all = rows[k].whole ? 1 : strcmp(rows[k].name, "restart") ? 7 : 17;
        if (strcmp(rows[k].name, "dpm_solver_v3") == 0) continue; // wants statistics
        snprintf(name, sizeof name, "%s", rows[k].name);
        d.method = name;
        if (!rows[k].to_sigma0) d.end = DF_END_T_MIN;
        d.restart_min = 1;
        d.restart_max = 20;
        d.steps = 7;
        d.seed = 3;
        m.input_sigma_data = .5;
        expect(df_sample(ctx, &m, &d, a, POINTS) == DF_OK);
        s = df_sampler_create(ctx, &m, &d, b, POINTS);
        expect(s != NULL);
        memset(name, '?', sizeof name);                       // strings are not borrowed
        expect(df_sampler_answer(s, out) == DF_ERR_ARGUMENT); // no question yet
        while (df_sampler_next(s, &q)) {
            expect(df_sampler_next(s, &again) && memcmp(&q, &again, sizeof q) == 0);
            expect(q.n % POINTS == 0 && q.dim == 2 && q.samples == POINTS);
            if (!rows[k].whole) expect(q.n == POINTS && q.same_time);
            wave_predict(NULL, ctx, &q, out);
            expect(df_sampler_answer(s, out) == DF_OK);
            asked++;
        }
        df_sampler_progress(s, &step, &steps, &evaluations);
        expect(step == all && steps == all && evaluations == asked);
        expect(df_sampler_result(s) == DF_OK && df_sampler_next(s, &q) == 0);
        same_bits(a, b, sizeof a);
        df_sampler_free(s);
    }
}

TEST(input_scale_and_native_time_reach_the_model) {
    df_real x[2] = {1, -2};
    df_sample_desc d = df_sample_defaults();
    df_model m = wave_model(2);
    df_sampler *s;
    df_query q;
    double points[2] = {2, .5};
    m.process = df_process_edm(80);
    m.prediction = DF_EDM_F;
    m.time = df_time_log_sigma(.25);
    m.input_sigma_data = .5;
    d.start = DF_START_GIVEN;
    d.points = points;
    d.points_count = 2;
    d.points_in = DF_POINTS_RHO;
    s = df_sampler_create(ctx, &m, &d, x, 1);
    expect(s != NULL && df_sampler_next(s, &q) == 1);
    near(q.t_model[0], log(2.0) / 4, 1e-6);
    near(q.sigma[0], 2, 1e-12);
    near(q.x[1], -2 / sqrt(.25 + 4), 1e-6);
    df_sampler_free(s);
}

// ---- the registry tells the truth ----

typedef struct counter {
    int draws;
} counter;
static int count_noise(void *user, const df_noise_query *q, df_real *out) {
    counter *c = (counter *)user;
    c->draws += q->step >= 0;
    for (int i = 0; i < q->n * q->dim; i++) out[i] = (df_real)(.1 * (i + 1));
    return 0;
}
static int no_data_end(void *self, df_ctx *c, const df_query *q, df_real *out) {
    check(q->sigma[0] > 0, "asked at sigma = 0");
    return mix_predict(self, c, q, out);
}

// What a row says of itself: which ends it can touch, how often it asks, whether it draws. Maps
// and densities are answered by stand-ins.
static int mix_all(void *self, df_ctx *c, const df_query *q, df_real *out) {
    if (q->ask == DF_ASK_LOG_DENSITY) return wave_predict(NULL, c, q, out);
    ((mix *)self)->prediction = q->ask == DF_ASK_MAP ? DF_X0 : DF_V;
    return no_data_end(self, c, q, out);
}
TEST(rows_say_what_is_so) {
    int count;
    const df_sampler_row *rows = df_sampler_rows(&count);
    expect(count >= 50);
    for (int k = 0; k < count; k++)
        for (int p = 0; p < PROCESSES; p++) {
            const df_sampler_row *row = &rows[k];
            df_process process = process_of(p);
            df_sample_desc d = df_sample_defaults();
            df_real x[4];
            counter c = {0};
            df_point first = df_process_at(&process, 1);
            int stopped = row->clock == DF_CLOCK_STOPPED, asks;
            // VE's data point is no t of its own, and neither rule knows steps in t to it
            int t = row->wants == DF_VELOCITY || strcmp(row->name, "euler_maruyama") == 0 ||
                    strcmp(row->name, "deis_t") == 0 || strcmp(row->name, "pndm") == 0 ||
                    strcmp(row->name, "tcd") == 0 || row->clock == DF_CLOCK_T;
            int jump = process.kind == DF_PROCESS_VE && t;
            int singular = first.alpha <= 0 && !stopped;
            df_result want =
                (singular && !row->from_alpha0) || (jump && row->to_sigma0) ? DF_ERR_ARGUMENT : DF_OK;
            mix m;
            df_model model = mix_model(&m, golden_gm2(), process, DF_V);
            if (strcmp(row->name, "dpm_solver_v3") == 0) continue; // wants statistics
            model.predict = mix_all;
            model.answers |= DF_ASK_MAP | DF_ASK_LOG_DENSITY;
            d.method = row->name;
            d.steps = 6;
            d.noise.fill = count_noise;
            d.noise.user = &c;
            if (!row->to_sigma0 && !stopped) d.end = DF_END_T_MIN;
            d.restart_min = 1;
            d.restart_max = 20;
            check(df_sample(ctx, &model, &d, x, 2) == want, "%s on %s: %s", row->name,
                  df_process_name(&process), df_ctx_message(ctx));
            if (want != DF_OK) {
                check(strstr(df_ctx_message(ctx), row->name) != NULL, "%s",
                      df_ctx_message(ctx));
                continue;
            }
            // methods of two and four questions ask one into sigma = 0; start-ups ask more
            asks = row->evaluations * d.steps;
            if (row->to_sigma0 && strcmp(row->name, "predictor_corrector") != 0)
                asks -= row->evaluations - 1;
            if (strcmp(row->name, "plms") == 0) asks += 1;
            if (strcmp(row->name, "pndm") == 0) asks += 9;
            if (row->start_order > 2 && row->corrector == 0 && !row->stochastic)
                asks += 1; // dpmpp_3m
            if (strcmp(row->name, "annealed_langevin") == 0) asks += 1; // at the last level
            if (strcmp(row->name, "restart") == 0) asks = m.calls; // two restarts more
            if (singular && row->evaluations == 2) asks = m.calls;
            if (!row->whole)
                check(m.calls == asks || strcmp(row->name, "mala") == 0, "%s on %s: %d, not %d",
                      row->name, df_process_name(&process), m.calls, asks);
            check((c.draws > 0) == (row->stochastic != 0), "%s: %d draws", row->name,
                  c.draws);
            if (row->evaluations == 1) check(!row->evaluates_end, "%s", row->name);
            for (int i = 0; i < 4; i++) expect(fabs((double)x[i]) < 1e3);
        }
}

TEST(names) {
    const df_sampler_row *row = df_sampler_find(ctx, "k_heun");
    expect(row != NULL && row == df_sampler_find(NULL, "heun"));
    expect(df_sampler_find(ctx, "edm") == row);
    expect(df_sampler_find(ctx, "euler") != df_sampler_find(ctx, "euler_t"));
    expect(df_sampler_find(ctx, "ddmp") == NULL);
    check(strstr(df_ctx_message(ctx), "\"ddmp\"") && strstr(df_ctx_message(ctx), "ddpm") &&
              strstr(df_ctx_message(ctx), "ddim"),
          "%s", df_ctx_message(ctx));
    expect(df_sampler_find(ctx, "") == NULL);
    expect(df_sampler_find(ctx, NULL) == NULL);
    expect(df_sampler_find(ctx, "k_") == NULL &&
           df_sampler_find(ctx, "euler_discrete k_euler") == NULL);
}

// A row of one's own: the midpoint rule in rho, with a buffer for the middle point.
static df_next midpoint(df_stage *s) {
    double a = s->from.sigma / s->from.alpha, b = s->to.sigma / s->to.alpha;
    const df_real *arrays[2];
    double c[2];
    arrays[0] = s->x;
    arrays[1] = s->answer;
    if (s->call == 1) {
        df_point middle = df_process_at_rho(s->process, .5 * (a + b));
        c[0] = middle.alpha / s->from.alpha;
        c[1] = middle.alpha * .5 * (b - a);
        df_stage_combine(s, s->buffer[0], 2, c, arrays);
        return df_stage_ask(s, &middle, s->buffer[0]);
    }
    c[0] = s->to.alpha / s->from.alpha;
    c[1] = s->to.alpha * (b - a);
    df_stage_combine(s, s->x, 2, c, arrays);
    s->number[0]++;
    return DF_NEXT_STEP;
}
static df_next never_asks(df_stage *s) {
    (void)s;
    return DF_NEXT_ASK;
}
static df_next fails(df_stage *s) {
    (void)s;
    return DF_NEXT_FAIL;
}

TEST(a_row_of_ones_own) {
    df_sampler_row row;
    double error[2] = {0, 0}, exact[2 * POINTS], points[641];
    df_process p = df_process_edm(80);
    df_sample_desc d = df_sample_defaults();
    df_real x[2 * POINTS];
    mix m;
    df_model model = mix_model(&m, golden_gm2(), p, DF_EPS);
    memset(&row, 0, sizeof row);
    row.name = "midpoint of my own";
    row.wants = DF_EPS;
    row.buffers = 1;
    row.stage = midpoint;
    start_r(exact);
    for (int i = 0; i < 2 * POINTS; i++) exact[i] *= 1 + exp(3.0);
    golden_ode(exact, POINTS, -3, 3, 2000);
    for (int k = 0; k < 2; k++) {
        double r[2 * POINTS];
        lambda_grid(&d, points, 320 << k);
        d.row = &row;
        start_r(r);
        for (int i = 0; i < 2 * POINTS; i++) x[i] = (df_real)(r[i] * (1 + exp(3.0)));
        check(df_sample(ctx, &model, &d, x, POINTS) == DF_OK, "%s", df_ctx_message(ctx));
        for (int i = 0; i < 2 * POINTS; i++) error[k] += pow((double)x[i] - exact[i], 2);
    }
    if (DOUBLE_BUILD) near_abs(.5 * log2(error[0] / error[1]), 2, .15);
    df_ctx_clear(ctx);
    row.stage = never_asks;
    expect(df_sample(ctx, &model, &d, x, POINTS) == DF_ERR_UNSUPPORTED);
    df_ctx_clear(ctx);
    row.stage = fails;
    expect(df_sample(ctx, &model, &d, x, POINTS) == DF_ERR_UNSUPPORTED);
    row.buffers = DF_BUFFERS + 1;
    expect(df_sample(ctx, &model, &d, x, POINTS) == DF_ERR_ARGUMENT);
}

// ---- starts, ends, callbacks ----

typedef struct watch {
    int calls, stop_at, code, cancel_at;
    double first[4], x0[4];
    df_point at;
} watch;
static int watching(void *user, const df_step_info *info) {
    watch *w = (watch *)user;
    expect(info->step == w->calls && info->n == 2 && info->dim == 2);
    expect((info->x0 == NULL) == (info->step == 0));
    if (info->step == 0)
        for (int i = 0; i < 4; i++) w->first[i] = (double)info->x[i];
    if (info->x0)
        for (int i = 0; i < 4; i++) w->x0[i] = (double)info->x0[i];
    w->at = info->at;
    if (w->calls == w->cancel_at) df_ctx_cancel(ctx);
    return w->calls++ == w->stop_at ? w->code : 0;
}
static int failing_noise(void *user, const df_noise_query *q, df_real *out) {
    (void)user;
    for (int i = 0; i < q->n * q->dim; i++) out[i] = 0;
    return q->draw == 2 ? 43 : 0;
}
static int failing_model(void *self, df_ctx *c, const df_query *q, df_real *out) {
    return q->step == 3 ? 44 : wave_predict(self, c, q, out);
}

TEST(starts) {
    df_process p = df_process_vp(.1, 20);
    static const double mean[2] = {1, -1}, scale[2] = {2, .5};
    df_real z[4], x[4];
    for (int kind = 0; kind < 3; kind++) {
        df_sample_desc d = df_sample_defaults();
        df_point first = df_process_at(&p, .6);
        watch w = {0, -1, 0, -1, {0}, {0}, {0, 0, 0, 0}};
        mix m;
        df_model model = mix_model(&m, golden_gm2(), p, DF_EPS);
        model.mean = mean;
        model.scale = scale;
        model.scaling_size = 2;
        d.start = (df_start)kind;
        d.t_max = .6;
        d.seed = 5;
        d.first_sample = 7;
        d.steps = 3;
        d.on_step = watching;
        d.user = &w;
        df_random_normal(5, 7, 0, 2, z);
        df_random_normal(5, 8, 0, 2, z + 2);
        for (int i = 0; i < 4; i++) x[i] = (df_real)(i + 1);
        expect(df_sample(ctx, &model, &d, x, 2) == DF_OK);
        expect(w.calls == 4 && w.at.sigma == 0);
        for (int i = 0; i < 4; i++) {
            double data = ((i + 1) - mean[i % 2]) / scale[i % 2],
                   noise = first.sigma * (double)z[i];
            near(w.first[i],
                 kind == 0   ? noise
                 : kind == 1 ? i + 1
                             : first.alpha * data + noise,
                 1e-6);
            // a step into sigma = 0 ends at the last x_0, and leaves in the data's units
            near(x[i], mean[i % 2] + scale[i % 2] * w.x0[i], 1e-6);
        }
    }
}

TEST(callbacks_and_cancel) {
    df_real x[4];
    df_model m = wave_model(2);
    df_sample_desc d = df_sample_defaults();
    watch w = {0, 2, 42, -1, {0}, {0}, {0, 0, 0, 0}};
    d.steps = 9;
    d.on_step = watching;
    d.user = &w;
    expect(df_sample(ctx, &m, &d, x, 2) == 42);
    expect(w.calls == 3);
    memset(&w, 0, sizeof w);
    w.stop_at = -1;
    w.cancel_at = 4;
    expect(df_sample(ctx, &m, &d, x, 2) == DF_CANCELLED);
    expect(w.calls == 5 && df_ctx_error(ctx) == DF_CANCELLED);
    df_ctx_clear(ctx);
    d.on_step = NULL;
    expect(df_sample(ctx, &m, &d, x, 2) == DF_OK);
    d.method = "ddpm";
    d.noise.fill = failing_noise;
    expect(df_sample(ctx, &m, &d, x, 2) == 43);
    d.noise.fill = NULL;
    m.predict = failing_model;
    expect(df_sample(ctx, &m, &d, x, 2) == 44);
}

TEST(clip_and_preview) {
    static const char *methods[] = {"ddim", "heun", "euler_t", "ddpm"};
    for (int k = 0; k < 4; k++) {
        df_real x[4];
        df_sample_desc d = df_sample_defaults();
        watch w = {0, -1, 0, -1, {0}, {0}, {0, 0, 0, 0}};
        int clipped = 0;
        mix m;
        df_model model = mix_model(&m, golden_gm2(), df_process_vp(.1, 20), DF_EPS);
        d.method = methods[k];
        d.steps = 8;
        d.clip = .5;
        d.on_step = watching;
        d.user = &w;
        expect(df_sample(ctx, &model, &d, x, 2) == DF_OK);
        for (int i = 0; i < 4; i++) {
            expect(fabs(w.x0[i]) <= .5);
            clipped += fabs(w.x0[i]) >= .5;
            if (k != 2) near(x[i], w.x0[i], 1e-6);
        }
        expect(clipped > 0);
    }
}

// Every row of every question says whose sample it is, however it was cut or stacked.
static int check_samples(void *self, df_ctx *c, const df_query *q, df_real *out) {
    uint64_t base = *(const uint64_t *)self;
    expect(q->samples >= 1 && q->samples <= 7 && q->n % q->samples == 0);
    for (int i = 0; i < q->n; i++) {
        uint64_t sample = q->first_sample + (uint64_t)(i % q->samples);
        expect(q->labels[i] == -1 || base + (uint64_t)q->labels[i] == sample);
    }
    return wave_predict(NULL, c, q, out);
}

TEST(questions_name_their_samples) {
    static const int sizes[4] = {0, 3, 7, 14};
    uint64_t base = 40;
    int labels[7];
    for (int i = 0; i < 7; i++) labels[i] = i;
    for (int k = 0; k < 8; k++) {
        df_real x[14];
        df_model m = wave_model(2), guided;
        df_sample_desc d = df_sample_defaults();
        df_guidance g = df_guidance_defaults();
        m.predict = check_samples;
        m.self = &base;
        m.max_batch = sizes[k % 4];
        g.model = &m;
        g.uncond = NULL;
        g.scale = 2;
        guided = df_guidance_model(&g);
        d.labels = labels;
        d.first_sample = base;
        d.steps = 2;
        expect(df_sample(ctx, k < 4 ? &m : &guided, &d, x, 7) == DF_OK);
    }
}

// ---- NaN, wrong use ----

static int bad_answer(void *self, df_ctx *c, const df_query *q, df_real *out) {
    wave_predict(self, c, q, out);
    if (q->step == 2) out[5 * q->dim + 1] = (df_real) * (double *)self;
    return 0;
}

TEST(nan_from_the_model_is_found) {
    double bad[2];
    bad[0] = strtod("nan", NULL);
    bad[1] = strtod("-inf", NULL);
    for (int k = 0; k < 2; k++)
        for (int clip = 0; clip < 2; clip++) {
            df_real x[2 * POINTS];
            df_model m = wave_model(2);
            df_sample_desc d = df_sample_defaults();
            m.predict = bad_answer;
            m.self = &bad[k];
            d.steps = 10;
            d.clip = clip;
            d.first_sample = 2;
            expect(df_sample(ctx, &m, &d, x, POINTS) == DF_ERR_NONFINITE);
            check(strstr(df_ctx_message(ctx), k ? "answered -inf at step 3 of 10"
                                                : "answered nan at step 3 of 10") &&
                      strstr(df_ctx_message(ctx), "sample 7, element 1"),
                  "%s", df_ctx_message(ctx));
            x[3] = (df_real)bad[k];
            d.start = DF_START_GIVEN;
            expect(df_sample(ctx, &m, &d, x, POINTS) == DF_ERR_NONFINITE);
            check(strstr(df_ctx_message(ctx), "sample 3, element 1") != NULL, "%s",
                  df_ctx_message(ctx));
        }
}

TEST(nan_far_inside_a_large_array) {
    enum { N = 3, DIM = 40000 };
    static df_real x[N * DIM];
    df_model m = wave_model(DIM);
    df_sample_desc d = df_sample_defaults();
    for (int threads = 1; threads <= 3; threads++) {
        df_ctx *c = context(threads);
        for (int i = 0; i < N * DIM; i++) x[i] = 1;
        x[2 * DIM + 31234] = x[2 * DIM + 39999] = (df_real)strtod("nan", NULL);
        d.start = DF_START_GIVEN;
        expect(df_sample(c, &m, &d, x, N) == DF_ERR_NONFINITE);
        check(strstr(df_ctx_message(c), "sample 2, element 31234") != NULL, "%s",
              df_ctx_message(c));
        df_ctx_free(c);
    }
}

TEST(wrong_use_is_a_sentence) {
    enum { CASES = 26 };
    static const char *const say[CASES] = {"ddpm, ddim",
                                           "steps is 0",
                                           "points_count is 1",
                                           "grid",
                                           "eta is 2",
                                           "rk4, eta 0: this method has no eta",
                                           "eta is nan",
                                           "belong to ddpm",
                                           "variance is 7",
                                           "churn is -1",
                                           "noise_scale",
                                           "churn_min",
                                           "draws its own",
                                           "draws its own",
                                           "clip",
                                           "start",
                                           "df_sample_defaults",
                                           "x is NULL",
                                           "n = 0",
                                           "dim is 0",
                                           "df_model_defaults",
                                           "heun cannot start where alpha = 0",
                                           "euler_maruyama walks t",
                                           "scaling_size",
                                           "predict",
                                           "must fall"};
    double points[3] = {.9, .95, 0};
    for (int k = 0; k < CASES; k++) {
        df_real x[4];
        df_sample_desc d = df_sample_defaults();
        df_model m = wave_model(2);
        df_real *px = x;
        int n = 2;
        static const double one = 1;
        switch (k) {
        case 0: d.method = "ddxx"; break;
        case 1: d.steps = 0; break;
        case 2:
            d.points = points;
            d.points_count = 1;
            break;
        case 3: d.grid = "no such rule"; break;
        case 4: d.eta = 2; break;
        case 5:
            d.method = "rk4";
            d.eta = 0;
            break;
        case 6: d.eta = strtod("nan", NULL); break;
        case 7: d.variance = DF_VARIANCE_LARGE; break;
        case 8: d.variance = (df_variance)7; break;
        case 9: d.churn = -1; break;
        case 10: d.noise_scale = strtod("inf", NULL); break;
        case 11:
            d.churn_min = 2;
            d.churn_max = 1;
            break;
        case 12:
            d.churn = 1;
            d.method = "ddpm";
            break;
        case 13:
            d.churn = 1;
            d.eta = .5;
            break;
        case 14: d.clip = -1; break;
        case 15: d.start = (df_start)3; break;
        case 16: d.cookie = 0; break;
        case 17: px = NULL; break;
        case 18: n = 0; break;
        case 19: m.dim = 0; break;
        case 20: m.cookie = 0; break;
        case 21:
            m.process = df_process_flow();
            d.method = "heun";
            break;
        case 22:
            m.process = df_process_ve(.01, 50);
            d.method = "euler_maruyama";
            break;
        case 23:
            m.scale = &one;
            m.scaling_size = 3;
            break;
        case 24: m.predict = NULL; break;
        case 25:
            d.points = points;
            d.points_count = 3;
            break;
        }
        df_ctx_clear(ctx);
        check(df_sample(ctx, &m, &d, px, n) == DF_ERR_ARGUMENT, "case %d passed", k);
        check(strstr(df_ctx_message(ctx), say[k]) != NULL, "case %d: %s", k,
              df_ctx_message(ctx));
    }
    df_ctx_clear(ctx);
    expect(df_sampler_create(NULL, NULL, NULL, NULL, 0) == NULL);
    expect(df_sampler_result(NULL) == DF_ERR_ARGUMENT);
    df_sampler_free(NULL);
}

TEST(singular_ends) {
    // alpha = 0: x_0 is not in eps, but in v and velocity
    df_real x[4];
    df_sample_desc d = df_sample_defaults();
    mix m;
    df_model model = mix_model(&m, golden_gm2(), df_process_flow(), DF_EPS);
    d.steps = 5;
    expect(df_sample(ctx, &model, &d, x, 2) == DF_ERR_SINGULAR);
    check(strstr(df_ctx_message(ctx), "ddim, step 1 of 5") != NULL, "%s",
          df_ctx_message(ctx));
    model = mix_model(&m, golden_gm2(), df_process_flow(), DF_VELOCITY);
    expect(df_sample(ctx, &model, &d, x, 2) == DF_OK);
    // f and g^2 of flow are infinite at t = 1; just below all is well
    d.method = "euler_maruyama";
    d.t_max = .999;
    expect(df_sample(ctx, &model, &d, x, 2) == DF_OK);
}

// ---- a host's mistakes: each ends in a code and a sentence ----

static int says(const char *part) {
    int found = strstr(df_ctx_message(ctx), part) != NULL;
    if (!found) printf("\"%s\" is not in \"%s\"\n", part, df_ctx_message(ctx));
    return found;
}

static df_next names_itself(df_stage *s) {
    expect(strlen(s->row->name) == 63 && strspn(s->row->name, "n") == 63);
    expect(strcmp(s->row->aliases, "") == 0 && strcmp(s->row->source, "") == 0);
    expect(s->desc->method == s->row->name);
    return DF_NEXT_STEP;
}
TEST(a_row_may_go_after_create) {
    char name[80], words[8] = "w";
    df_real x[2], out[2] = {0, 0};
    df_sample_desc d = df_sample_defaults();
    df_model m = wave_model(2);
    df_sampler_row row;
    df_sampler *s;
    df_query q;
    memset(&row, 0, sizeof row);
    memset(name, 'n', sizeof name);
    name[70] = 0;
    row.name = name;
    row.aliases = row.source = words;
    row.to_sigma0 = row.from_alpha0 = 1;
    row.stage = names_itself;
    d.row = &row;
    d.steps = 1;
    s = df_sampler_create(ctx, &m, &d, x, 1);
    memset(name, '?', sizeof name);
    memset(words, '?', sizeof words);
    memset(&row, 0, sizeof row);
    expect(s != NULL && df_sampler_next(s, &q) == 1);
    expect(df_sampler_answer(s, out) == DF_OK);
    df_sampler_free(s);
}

TEST(numbers_of_steps) {
    static const int counts[5] = {INT_MIN, 0, 1, 1000002, INT_MAX};
    static const double points[2] = {.9, .1};
    df_real x[2];
    df_point grid[4];
    int count;
    df_model m = wave_model(2);
    for (int k = 0; k < 5; k++) {
        df_sample_desc d = df_sample_defaults();
        d.points = points;
        d.points_count = counts[k];
        expect(df_sample(ctx, &m, &d, x, 1) == DF_ERR_ARGUMENT);
        expect(says("points_count is ") && says("wants 2 .. 1000001"));
        expect(df_grid(ctx, &m.process, &d, grid, 4, &count) == DF_ERR_ARGUMENT);
        d.points = NULL;
        d.steps = counts[k] - (counts[k] == 1);
        expect(df_sample(ctx, &m, &d, x, 1) == DF_ERR_ARGUMENT);
        expect(says("steps is ") && says("wants 1 .. 1000000"));
    }
}

// Calls its own sampler from every callback; depth would grow without end.
static struct {
    df_sampler *s;
    int depth, calls;
} again;
static void call_again(void) {
    df_query q;
    df_real out[2] = {0, 0};
    if (!check(again.depth == 0, "called within itself")) return;
    again.depth++;
    again.calls++;
    df_ctx_clear(ctx);
    expect(df_sampler_next(again.s, &q) == 0 && says("within a callback"));
    df_ctx_clear(ctx);
    expect(df_sampler_answer(again.s, out) == DF_ERR_ARGUMENT && says("within a"));
    df_ctx_clear(ctx);
    again.depth--;
}
static int step_again(void *user, const df_step_info *info) {
    (void)user;
    (void)info;
    call_again();
    return 0;
}
static int noise_again(void *user, const df_noise_query *q, df_real *out) {
    (void)user;
    for (int i = 0; i < q->n * q->dim; i++) out[i] = 0;
    call_again();
    return 0;
}
static df_next stage_again(df_stage *s) {
    df_next next = s->call == 1 ? df_stage_ask(s, &s->from, s->x) : DF_NEXT_STEP;
    call_again();
    return next;
}
TEST(callbacks_do_not_recurse) {
    df_real x[2], out[2] = {0, 0};
    df_sample_desc d = df_sample_defaults();
    df_model m = wave_model(2);
    df_sampler_row row = *df_sampler_find(ctx, "ddim");
    df_query q;
    row.stage = stage_again;
    d.row = &row;
    d.steps = 2;
    d.on_step = step_again;
    d.noise.fill = noise_again;
    again.depth = again.calls = 0;
    again.s = df_sampler_create(ctx, &m, &d, x, 1);
    while (df_sampler_next(again.s, &q)) expect(df_sampler_answer(again.s, out) == DF_OK);
    expect(df_sampler_result(again.s) == DF_OK);
    check(again.calls == 1 + 3 + 4, "%d calls", again.calls); // noise, on_step, stage
    df_sampler_free(again.s);
}

static df_next combines_null(df_stage *s) {
    const df_real *a[1];
    double one = 1;
    a[0] = s->number[1] > 0 ? s->x : NULL;
    df_stage_combine(s, s->x, 1, &one, a);
    df_stage_ask(s, &s->to, s->x);
    return DF_NEXT_STEP;
}
static df_next combines_into_null(df_stage *s) {
    const df_real *a[1];
    double one = 1;
    a[0] = s->x;
    df_stage_combine(s, s->buffer[0], 1, &one, a);
    return DF_NEXT_STEP;
}
static df_next noise_into_null(df_stage *s) {
    df_stage_noise(s, s->buffer[0]);
    return DF_NEXT_STEP;
}
static df_next asks_null(df_stage *s) { return df_stage_ask(s, &s->to, s->buffer[0]); }
static df_next loses_answer(df_stage *s) {
    s->answer = s->buffer[0];
    return DF_NEXT_STEP;
}
TEST(a_row_with_too_few_buffers) {
    static const df_stage_fn stages[5] = {combines_null, combines_into_null,
                                          noise_into_null, asks_null, loses_answer};
    static const char *const say[5] = {"df_stage_combine", "df_stage_combine",
                                       "df_stage_noise", "df_stage_ask", "`answer`"};
    for (int k = 0; k < 5; k++) {
        df_real x[2], out[2] = {0, 0};
        df_sample_desc d = df_sample_defaults();
        df_model m = wave_model(2);
        df_sampler_row row = *df_sampler_find(ctx, "ddim");
        df_sampler *s;
        df_query q;
        row.buffers = 0;
        row.stage = stages[k];
        d.row = &row;
        d.steps = 3;
        d.t_max = .9;
        s = df_sampler_create(ctx, &m, &d, x, 1);
        expect(s != NULL && df_sampler_next(s, &q) == 1);
        expect(df_sampler_answer(s, out) == DF_ERR_ARGUMENT && says("more buffers"));
        expect(says(say[k]));
        expect(df_sampler_next(s, &q) == 0 && df_sampler_result(s) == DF_ERR_ARGUMENT);
        df_sampler_free(s);
    }
}

// What a stage or a row may not do, each with its sentence.
static df_next combines_nine(df_stage *s) {
    const df_real *a[9];
    double c[9];
    for (int j = 0; j < 9; j++) a[j] = s->answer, c[j] = 1;
    df_stage_combine(s, s->x, 9, c, a);
    return DF_NEXT_STEP;
}
static df_next asks_density(df_stage *s) {
    return s->call == 1 ? df_stage_ask_density(s, &s->from, s->x) : DF_NEXT_STEP;
}
static df_next asks_about_its_answer(df_stage *s) {
    return df_stage_ask(s, &s->from, s->answer);
}
TEST(rows_that_cannot_be) {
    static const struct { const char *method, *say; } rows[] = {
        {"heun", "wants buffers 2"}, {"ddpm", "wants buffers 1"}, {"lms", "most_order 4"},
        {"ddim", "asks 8"}, {"ddim", "count must be 1 .. 8"}, {"ddim", "does not answer that"},
        {"ddim", "which the model writes to"}};
    static const df_stage_fn stages[3] = {combines_nine, asks_density, asks_about_its_answer};
    for (int k = 0; k < 7; k++) {
        df_real x[2] = {0, 0};
        df_sample_desc d = df_sample_defaults();
        df_model m = wave_model(2);
        df_sampler_row row = *df_sampler_find(ctx, rows[k].method);
        m.answers = DF_ASK_PREDICT;
        if (k < 2) row.buffers = 0;
        if (k == 2) row.most_order = 8;
        if (k == 3) row.asks = DF_ASK_LOG_DENSITY;
        if (k > 3) row.stage = stages[k - 4];
        d.row = &row;
        d.steps = 3;
        d.t_max = .9;
        df_ctx_clear(ctx);
        check(df_sample(ctx, &m, &d, x, 1) == DF_ERR_ARGUMENT && says(rows[k].say), "%d", k);
    }
    df_ctx_clear(ctx);
}

// Rooms that a caller sizes by what it was told.
TEST(rooms_are_as_told) {
    static const double t[3] = {.9, .5, .2};
    for (int k = 0; k < 2; k++) { // "restart" makes its own jumps: df_grid says so
        df_sample_desc d = df_sample_defaults();
        df_model m = wave_model(2);
        df_point grid[80];
        df_real x[2], path[80 * 2];
        int count = 0;
        m.process = df_process_vp(.1, 20);
        d.method = k ? "restart" : "heun";
        d.steps = 20;
        d.grid = "karras";
        d.end = DF_END_T_MIN;
        d.t_max = .9;
        expect(df_grid(ctx, &m.process, &d, grid, 80, &count) == DF_OK);
        expect(count == (k ? 21 + 2 * (d.restart_steps + 1) : 20 + 1) || count == 20 + 10 * k);
        for (int i = 0; i < 160; i++) path[i] = 77;
        d.trajectory = path;
        check(df_sample(ctx, &m, &d, x, 1) == DF_OK, "%s", df_ctx_message(ctx));
        expect(path[2 * count - 1] == x[1] && path[2 * count] == 77);
    }
    { // a list of points where the clock stands still
        df_sample_desc d = df_sample_defaults();
        df_model m = wave_model(2);
        df_real x[2];
        d.method = "langevin";
        d.points = t;
        d.points_count = 3;
        expect(df_sample(ctx, &m, &d, x, 1) == DF_ERR_ARGUMENT && says("leave points NULL"));
        d.method = "dpmpp_2s";
        d.compat = DF_COMPAT_STEP_BACK;
        expect(df_sample(ctx, &m, &d, x, 1) == DF_ERR_ARGUMENT && says("STEP_BACK"));
        df_ctx_clear(ctx);
    }
}

// A NaN in the noise is not the model's fault.
static int nan_noise(void *user, const df_noise_query *q, df_real *out) {
    (void)user;
    for (int i = 0; i < q->n * q->dim; i++) out[i] = (df_real)(q->draw == 2 && i == 3 ? NAN : .1);
    return 0;
}
TEST(nan_is_blamed_on_whose_it_is) {
    df_sample_desc d = df_sample_defaults();
    df_model m = wave_model(2);
    df_real x[6];
    d.method = "exponential";
    d.noise.fill = nan_noise;
    expect(df_sample(ctx, &m, &d, x, 3) == DF_ERR_NONFINITE);
    expect(says("x became nan") && says("sample 1, element 1"));
    df_ctx_clear(ctx);
}

TEST(numbers_of_the_model) {
    double bad[3], two[2] = {1, 1}, big = 1e308;
    bad[0] = strtod("nan", NULL);
    bad[1] = strtod("inf", NULL);
    bad[2] = 0;
    for (int k = 0; k < 17; k++) {
        df_real x[2];
        df_sample_desc d = df_sample_defaults();
        df_model m = wave_model(2);
        const char *say = k < 5 ? "scale[1] is" : k < 8 ? "input_sigma_data" : "time";
        two[1] = bad[k < 3 ? k : k < 5 ? k - 3 : 0];
        m.scaling_size = 2;
        if (k < 3) m.scale = two;
        else if (k < 5) m.mean = two;
        else if (k < 7) m.input_sigma_data = bad[k - 5];
        else if (k < 8) m.input_sigma_data = -1;
        else if (k < 11) m.time.a = bad[k - 8];
        else if (k < 12) m.time = df_time_log_sigma(0);
        else if (k < 13) m.time.kind = (df_time_kind)7;
        else if (k < 14) m.time.b = bad[0];
        else {
            m.prediction = DF_VELOCITY;
            m.clock.a = bad[k - 14];
            say = "clock";
        }
        check(df_sample(ctx, &m, &d, x, 1) == DF_ERR_ARGUMENT && says(say), "case %d", k);
        check(df_sampler_create(ctx, &m, &d, x, 1) == NULL, "case %d", k);
    }
    // finite numbers that overflow in the last step of all
    for (int k = 0; k < 2; k++) {
        df_real x[2] = {30, 30};
        df_sample_desc d = df_sample_defaults();
        df_model m = wave_model(2);
        double mean = k ? big : 0, scale = big;
        m.mean = &mean;
        m.scale = &scale;
        m.scaling_size = 1;
        d.method = "heun";
        d.end = DF_END_T_MIN;
        d.steps = 3;
        d.t_min = .9;
        d.start = DF_START_GIVEN;
        expect(df_sample(ctx, &m, &d, x, 1) == DF_ERR_NONFINITE);
        expect(says("data's units became inf at step 3 of 3"));
    }
}

// Its graph fails, and it says 0.
static int careless_model(void *self, df_ctx *c, const df_query *q, df_real *out) {
    int two = 2, three = 3;
    df_tensor *a = df_tensor_fill(c, 1, &two, 0), *b = df_tensor_fill(c, 1, &three, 0);
    df_tensor *sum = df_add(c, a, b);
    (void)self;
    expect(sum == NULL);
    for (int i = 0; i < q->n * q->dim; i++) out[i] = 0;
    return 0;
}
TEST(a_failed_graph_is_a_failed_answer) {
    df_real x[6] = {0, 0, 0, 0, 0, 0}, out[6];
    double t[3] = {.5, .5, .5};
    df_model m = wave_model(2);
    df_sample_desc d = df_sample_defaults();
    m.predict = careless_model;
    for (int k = 0; k < 2; k++) {
        m.max_batch = k;
        df_ctx_clear(ctx);
        expect(df_sample(ctx, &m, &d, x, 3) == DF_ERR_SHAPE && says("df_add"));
        df_ctx_clear(ctx);
        expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, 3, x, NULL, NULL, out) ==
                   DF_ERR_SHAPE &&
               says("df_add"));
    }
    df_ctx_clear(ctx);
}

static int refuses(void *self, df_ctx *c, const df_query *q, df_real *out) {
    (void)self;
    (void)c;
    (void)q;
    (void)out;
    return 45;
}
static int step_fails(void *user, const df_step_info *info) {
    (void)user;
    return info->step == 2 ? 42 : 0;
}
TEST(a_callbacks_failure_has_a_sentence) {
    df_real x[4], out[4];
    double t[2] = {.5, .5};
    for (int k = 0; k < 10; k++) {
        df_model m = wave_model(2);
        df_sample_desc d = df_sample_defaults();
        df_sampler_row row = *df_sampler_find(NULL, "ddpm");
        df_result r, want;
        df_ctx_clear(ctx);
        if (k % 2) df_sampler_find(ctx, "an earlier error");
        d.method = "ddpm";
        d.steps = 9;
        if (k / 2 == 0) m.predict = failing_model;
        if (k / 2 == 1) d.on_step = step_fails;
        if (k / 2 == 2) d.noise.fill = failing_noise;
        if (k / 2 == 3) d.row = &row, row.stage = fails;
        want = k / 2 == 0   ? 44
               : k / 2 == 1 ? 42
               : k / 2 == 2 ? 43
               : k / 2 == 3 ? DF_ERR_UNSUPPORTED
                            : 45;
        if (k / 2 == 4) {
            m.predict = refuses;
            r = df_model_ask(ctx, &m, DF_ASK_PREDICT, t, 2, x, NULL, NULL, out);
        } else
            r = df_sample(ctx, &m, &d, x, 2);
        check(r == want && df_ctx_error(ctx) == want, "%d: %d, %d", k, r, want);
        expect(says(k / 2 == 0   ? "df_sample: predict returned 44 at step 4 of 9"
                    : k / 2 == 1 ? "df_sample: on_step returned 42 at step 2 of 9"
                    : k / 2 == 2 ? "df_sample: noise.fill returned 43 at step 2 of 9"
                    : k / 2 == 3 ? "did not say why"
                                 : "df_model_ask: predict returned"));
        expect(strstr(df_ctx_message(ctx), "an earlier error") == NULL);
    }
    // success leaves an earlier error as it was
    df_model m = wave_model(2);
    df_sample_desc d = df_sample_defaults();
    df_sampler_find(ctx, "an earlier error");
    expect(df_sample(ctx, &m, &d, x, 2) == DF_OK);
    expect(df_ctx_error(ctx) == DF_ERR_ARGUMENT && says("an earlier error"));
    df_ctx_clear(ctx);
}

// A host's workers that count what they are given.
static void count_tasks(void *user, int count, void (*task)(void *arg, int index),
                        void *arg) {
    int *most = (int *)user;
    if (count > *most) *most = count;
    for (int i = count - 1; i >= 0; i--) task(arg, i);
}
TEST(noise_comes_in_large_tasks) {
    enum { N = 1003, DIM = 9 };
    static df_real a[N * DIM], b[N * DIM];
    int most = 0;
    df_ctx_desc c = df_ctx_defaults();
    df_model m = wave_model(DIM);
    df_sample_desc d = df_sample_defaults();
    df_ctx *hosted;
    c.tasks.run = count_tasks;
    c.tasks.user = &most;
    c.tasks.workers = 2;
    hosted = df_ctx_create(&c);
    expect(hosted != NULL);
    d.method = "ddpm";
    d.steps = 2;
    expect(df_sample(ctx, &m, &d, a, N) == DF_OK);
    expect(df_sample(hosted, &m, &d, b, N) == DF_OK);
    same_bits(a, b, sizeof a);
    check(most == 3, "%d tasks", most); // 9027 numbers, 456 rows a task
    df_ctx_free(hosted);
}

TEST(null_is_an_answer_to_nothing) {
    df_real x[2];
    df_sample_desc d = df_sample_defaults();
    df_model m = wave_model(2);
    df_sampler *s = df_sampler_create(ctx, &m, &d, x, 1);
    df_query q;
    int rounds = 0, step = 7, steps = 7, evaluations = 7;
    while (rounds < 10 && df_sampler_next(s, &q)) {
        expect(df_sampler_answer(s, NULL) == DF_ERR_ARGUMENT && says("out is NULL"));
        rounds++;
    }
    expect(rounds == 1 && df_sampler_result(s) == DF_ERR_ARGUMENT);
    df_sampler_free(s);
    df_sampler_progress(NULL, &step, &steps, &evaluations);
    expect(step == 0 && steps == 0 && evaluations == 0);
    df_sampler_progress(NULL, NULL, NULL, NULL);
    m = df_guidance_model(NULL);
    expect(df_sample(ctx, &m, &d, x, 1) == DF_ERR_ARGUMENT && says("dim is 0"));
}

// ---- every allocation failing in turn ----

typedef struct quota {
    long left;
} quota;
static void *quota_alloc(void *user, size_t size, size_t align) {
    quota *q = (quota *)user;
    char *base, *p;
    if (q->left-- <= 0 || size > (size_t)1 << 30) return NULL;
    base = (char *)malloc(size + align + sizeof base);
    if (base == NULL) return NULL;
    p = base + sizeof base;
    p += (align - (uintptr_t)p % align) % align;
    memcpy(p - sizeof base, &base, sizeof base); // where free finds it
    return p;
}
static void quota_free(void *user, void *ptr, size_t size, size_t align) {
    char *base;
    (void)user;
    (void)size;
    (void)align;
    if (ptr == NULL) return;
    memcpy(&base, (char *)ptr - sizeof base, sizeof base);
    free(base);
}

TEST(out_of_memory) {
    df_ctx_desc c = df_ctx_defaults();
    quota q = {1000};
    df_ctx *small;
    df_real x[2 * POINTS];
    df_model m = wave_model(2), guided;
    df_sample_desc d = df_sample_defaults();
    int labels[POINTS] = {0}, failed = 0;
    df_guidance g = df_guidance_defaults();
    size_t before;
    g.model = &m;
    g.uncond = NULL;
    g.scale = 2;
    guided = df_guidance_model(&g);
    c.threads = 1;
    c.alloc.alloc = quota_alloc;
    c.alloc.free = quota_free;
    c.alloc.user = &q;
    small = df_ctx_create(&c);
    expect(small != NULL);
    d.labels = labels;
    d.steps = 3;
    before = df_ctx_bytes(small);
    for (q.left = 0; failed < 100; failed++) {
        long had = q.left;
        df_result r = df_sample(small, &guided, &d, x, POINTS);
        if (r == DF_OK) break;
        check(r == DF_ERR_MEMORY, "%d: %s", r, df_ctx_message(small));
        q.left = had + 1;
    }
    check(failed >= 2 && failed < 100, "%d failures", failed);
    q.left = 1000;
    d.labels = NULL;
    expect(df_sample(small, &m, &d, x, POINTS) == DF_OK);
    expect(df_ctx_bytes(small) >= before);
    m.dim = 0x7fffffff;
    expect(df_sample(small, &m, &d, x, 0x7fffffff) == DF_ERR_MEMORY);
    df_ctx_free(small);
}

// ---- guidance ----

typedef struct pair {
    mix cond, uncond;
    int calls, most;
} pair;
// Label 1: the conditional Gaussian; else the other.
static int pair_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    pair *p = (pair *)self;
    p->calls++;
    if (q->n > p->most) p->most = q->n;
    for (int i = 0; i < q->n; i++) {
        df_query one = *q;
        one.n = one.samples = 1;
        one.x = q->x + i * q->dim;
        one.t = q->t + i;
        one.alpha = q->alpha + i;
        one.sigma = q->sigma + i;
        mix_predict(q->labels && q->labels[i] == 1 ? &p->cond : &p->uncond, c, &one,
                    out + i * q->dim);
    }
    return 0;
}
static df_model pair_model(pair *p, df_process process, double cond, double uncond) {
    df_model m = mix_model(&p->uncond, gaussian(0, uncond), process, DF_EPS);
    mix_model(&p->cond, gaussian(0, cond), process, DF_EPS);
    p->calls = p->most = 0;
    m.predict = pair_predict;
    m.self = p;
    return m;
}

TEST(guidance_off_stacked_and_split) {
    df_process process = df_process_vp(.1, 20);
    static const int labels[5] = {1, 1, 0, 1, 1};
    df_real want[5], x[5];
    pair p;
    df_model model = pair_model(&p, process, 1, 2), guided, alone;
    df_sample_desc d = df_sample_defaults();
    df_guidance g = df_guidance_defaults();
    g.model = &model;
    g.scale = 1;
    guided = df_guidance_model(&g);
    d.labels = labels;
    d.steps = 6;
    // scale 1 is the conditional model, one question a step
    expect(df_sample(ctx, &model, &d, want, 5) == DF_OK);
    p.calls = 0;
    expect(df_sample(ctx, &guided, &d, x, 5) == DF_OK && p.calls == 6);
    same_bits(x, want, sizeof x);
    // scale 0 the unconditional one
    d.labels = NULL;
    expect(df_sample(ctx, &model, &d, want, 5) == DF_OK);
    d.labels = labels;
    g.scale = 0;
    p.calls = 0;
    expect(df_sample(ctx, &guided, &d, x, 5) == DF_OK && p.calls == 6);
    same_bits(x, want, sizeof x);
    // stacked: one question of 10 rows; apart: two of 5; cut by max_batch: the same bits
    g.scale = 3.5;
    p.calls = p.most = 0;
    expect(df_sample(ctx, &guided, &d, want, 5) == DF_OK);
    expect(p.calls == 6 && p.most == 10);
    for (int k = 0; k < 4; k++) {
        model.stackable = k != 0;
        model.max_batch = k == 1 ? 9 : k == 2 ? 3 : 0;
        guided = df_guidance_model(&g);
        if (k == 3) guided.max_batch = 2;
        p.calls = p.most = 0;
        expect(df_sample(ctx, &guided, &d, x, 5) == DF_OK);
        check(p.calls == (k < 2    ? 12
                          : k == 2 ? 24
                                   : 18) &&
                  p.most == (k < 2    ? 5
                             : k == 2 ? 3
                                      : 4),
              "%d: %d calls of %d", k, p.calls, p.most);
        same_bits(x, want, sizeof x);
    }
    // another model as the unconditional one
    alone = mix_model(&p.uncond, gaussian(0, 2), process, DF_EPS);
    g.uncond = &alone;
    guided = df_guidance_model(&g);
    expect(df_sample(ctx, &guided, &d, x, 5) == DF_OK);
    same_bits(x, want, sizeof x);
}

TEST(guidance_errors) {
    df_process process = df_process_vp(.1, 20);
    static const int labels[1] = {1};
    static const char *const say[7] = {"labels",   "dim 1, uncond 2", "process",
                                       "predicts", "native times",    "scale is nan",
                                       "samples of 1, model has dim 2"};
    for (int k = 0; k < 7; k++) {
        df_real x[1];
        pair p;
        df_model model = pair_model(&p, process, 1, 2), other = model, guided;
        df_sample_desc d = df_sample_defaults();
        df_guidance g = df_guidance_defaults();
        g.model = &model;
        g.uncond = k == 0 ? NULL : &other;
        g.scale = k == 5 ? strtod("nan", NULL) : 3;
        d.labels = k == 0 ? NULL : labels;
        if (k == 1) other.dim = 2;
        if (k == 2) other.process = df_process_flow();
        if (k == 3) other.prediction = DF_V;
        if (k == 4) other.time = df_time_affine(1000, 0);
        guided = df_guidance_model(&g);
        if (k == 6) model.dim = other.dim = 2; // since
        expect(df_sample(ctx, &guided, &d, x, 1) == DF_ERR_ARGUMENT);
        check(strstr(df_ctx_message(ctx), say[k]) != NULL, "%d: %s", k,
              df_ctx_message(ctx));
    }
}

TEST(guidance_wants_one_table) {
    double betas[50];
    df_process linear, cosine;
    mix a, b;
    df_real x[4] = {0, 0, 0, 0};
    df_sample_desc d = df_sample_defaults();
    df_guidance g = df_guidance_defaults();
    df_betas(ctx, DF_BETAS_LINEAR, 1e-3, .2, 50, betas);
    df_process_table(ctx, betas, 50, &linear);
    df_betas(ctx, DF_BETAS_COSINE, 0, 0, 50, betas);
    df_process_table(ctx, betas, 50, &cosine);
    df_model m = mix_model(&a, golden_gm2(), linear, DF_EPS);
    df_model n = mix_model(&b, golden_gm2(), cosine, DF_EPS), guided;
    g.model = &m, g.uncond = &n, g.scale = 2;
    guided = df_guidance_model(&g);
    d.steps = 5;
    expect(df_sample(ctx, &guided, &d, x, 2) == DF_ERR_ARGUMENT);
    check(strstr(df_ctx_message(ctx), "tables") != NULL, "%s", df_ctx_message(ctx));
    n.process = linear;
    expect(df_sample(ctx, &guided, &d, x, 2) == DF_OK);
    const double scale = 2, mean = 0;
    n.scale = &scale, n.mean = &mean, n.scaling_size = 1;
    expect(df_sample(ctx, &guided, &d, x, 2) == DF_ERR_ARGUMENT);
    check(strstr(df_ctx_message(ctx), "data scaling") != NULL, "%s", df_ctx_message(ctx));
}
TEST(guidance_on_gaussians) {
    // VE, cond N(0, 1), uncond N(0, 2) at t = 0, sigma^2 = t, scale 3: the marginal
    // variances are v_c = 1 + t and v_u = 2 + t; dx/dt = x/2 (3/v_c - 2/v_u), whence
    // var(0)/var(T) = (v_c(0)/v_c(T))^3 (v_u(T)/v_u(0))^2; T to infinity: 2^(1-3) = .25.
    df_process process = df_process_edm(1e4);
    static const int label = 1;
    double points[2001], before = 1e4;
    df_real x = 1;
    pair p;
    df_model model = pair_model(&p, process, 1, 2), guided;
    df_sample_desc d = df_sample_defaults();
    df_guidance g = df_guidance_defaults();
    g.model = &model;
    g.uncond = NULL;
    g.scale = 3;
    guided = df_guidance_model(&g);
    for (int i = 0; i <= 2000; i++)
        points[i] = i < 2000 ? before * pow(1e-7, i / 1999.0) : 0;
    d.points = points;
    d.points_count = 2001;
    d.points_in = DF_POINTS_RHO;
    d.method = "heun";
    d.start = DF_START_GIVEN;
    d.labels = &label;
    x = (df_real)before; // one standard deviation
    expect(df_sample(ctx, &guided, &d, &x, 1) == DF_OK);
    near(x * x, .25, DOUBLE_BUILD ? 2e-5 : 1e-3);
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    ctx = context(2);
    RUN(one_path_on_every_process);
    RUN(one_end_for_every_prediction);
    RUN(euler_is_ddim_and_ddim_1_is_ddpm);
    RUN(orders_of_convergence);
    RUN(moments_of_the_exponential_family);
    RUN(moments_of_ddpm_large);
    RUN(moments_of_euler_maruyama);
    RUN(edm_churn_moments);
    RUN(churn_is_the_forward_kernel_on_every_process);
    RUN(alone_in_pieces_and_on_threads);
    RUN(ask_and_answer_is_the_whole_loop);
    RUN(input_scale_and_native_time_reach_the_model);
    RUN(rows_say_what_is_so);
    RUN(names);
    RUN(a_row_of_ones_own);
    RUN(starts);
    RUN(callbacks_and_cancel);
    RUN(clip_and_preview);
    RUN(questions_name_their_samples);
    RUN(nan_from_the_model_is_found);
    RUN(nan_far_inside_a_large_array);
    RUN(wrong_use_is_a_sentence);
    RUN(singular_ends);
    RUN(a_row_may_go_after_create);
    RUN(numbers_of_steps);
    RUN(callbacks_do_not_recurse);
    RUN(a_row_with_too_few_buffers);
    RUN(rows_that_cannot_be);
    RUN(rooms_are_as_told);
    RUN(nan_is_blamed_on_whose_it_is);
    RUN(numbers_of_the_model);
    RUN(a_failed_graph_is_a_failed_answer);
    RUN(a_callbacks_failure_has_a_sentence);
    RUN(noise_comes_in_large_tasks);
    RUN(null_is_an_answer_to_nothing);
    RUN(out_of_memory);
    RUN(guidance_off_stacked_and_split);
    RUN(guidance_errors);
    RUN(guidance_wants_one_table);
    RUN(guidance_on_gaussians);
    df_ctx_free(ctx);
    return test_end();
}
