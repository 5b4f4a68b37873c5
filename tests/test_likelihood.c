// Likelihoods: the change of variables against a mixture's exact log density, on every process
// and prediction and for a user's model; Hutchinson's estimate by its exact moments; the
// variational bound term by term, against closed forms on Gaussian data; bits and levels.
#include "diffusion.h"
#include "test.h"
#include "counting.h"

#define SHARP (sizeof(df_real) == 8)
static const double PI = 3.14159265358979323846;
enum { Z = 6 };                 // standard errors allowed: a false alarm in 5e8

static df_ctx *ctx;
static df_mixture *gmm;

// MATH.md, section 5.
static df_mixture *three(void) {
    static const double w[3] = {.3, .5, .2}, mean[6] = {2, 0, -1, 1.5, 0, -2};
    static const double S[12] = {.3, .1, .1, .2, .2, -.05, -.05, .4, .1, 0, 0, .1};
    return df_mixture_create(ctx, 3, 2, w, mean, S);
}

static int exact_prior(void *user, const df_point *at, int n, const df_real *x, double *out) {
    return df_mixture_log_density(ctx, (const df_mixture *)user, at, n, x, out);
}

// Tight, with the exact density of the mixture at the noise end.
static df_likelihood_desc tight(void) {
    df_likelihood_desc d = df_likelihood_defaults();
    d.walk.rtol = d.walk.atol = SHARP ? 1e-9 : 1e-6;
    d.log_prior = exact_prior;
    d.user = gmm;
    return d;
}

enum { CASES = 8 };
static df_process process_of(int k) {
    static double betas[1000];
    df_process p[CASES];
    p[0] = df_process_vp(.1, 20);
    p[1] = df_process_edm(80);
    p[2] = df_process_flow();
    p[3] = df_process_subvp(.1, 20);
    p[4] = df_process_ve(.01, 50);
    p[5] = df_process_cosine();
    p[6] = df_process_trig(.5);
    if (k == 7) {
        df_betas(ctx, DF_BETAS_LINEAR, 1e-4, .02, 1000, betas);
        df_process_table(ctx, betas, 1000, &p[7]);
    }
    return p[k];
}

// Points of the data noised as at `at`, and their exact log density.
static void points(const df_point *at, uint64_t seed, int n, df_real *x, double *log_p) {
    expect(df_mixture_sample(ctx, gmm, at, seed, 0, n, x) == DF_OK);
    expect(df_mixture_log_density(ctx, gmm, at, n, x, log_p) == DF_OK);
}

static double worst(int n, const double *a, const double *b) {
    double most = 0;
    for (int i = 0; i < n; i++) most = fmax(most, fabs(a[i] - b[i]));
    return most;
}

TEST(exact_trace_on_every_process_and_prediction) {
    // Tolerances of 1e-9 leave about 1e-9 in a hundred steps; 1e-6 is the claim. In float
    // every one of a few hundred questions adds a rounding of 6e-8 of |x|, log p and div.
    static const df_prediction what[] = { DF_EPS, DF_X0, DF_V, DF_VELOCITY, DF_SCORE, DF_EDM_F,
                                          DF_STRAIGHT };
    enum { N = 12 };
    for (int k = 0; k < CASES; k++)
        for (int j = 0; j < 7; j++) {
            df_mixture_view view = { gmm, process_of(k), what[j] };
            df_model m = df_mixture_model(&view);
            df_likelihood_desc d = tight();
            df_point at = df_process_at(&view.process, df_process_t_min(&view.process));
            double want[N], got[N], off;
            df_real x[2 * N];
            // eps and the score know nothing of x_0 where alpha = 0
            if (df_process_at(&view.process, 1).alpha < 1e-9) d.walk.t_max = .999;
            points(&at, (uint64_t)k, N, x, want);
            check(df_log_likelihood(ctx, &m, &d, x, N, got) == DF_OK, "%s %s: %s",
                  df_process_name(&view.process), df_prediction_name(what[j]),
                  df_ctx_message(ctx));
            off = worst(N, got, want);
            check(off <= (SHARP ? 1e-6 : 1e-4), "%s %s: off by %g",
                  df_process_name(&view.process), df_prediction_name(what[j]), off);
        }
}

TEST(from_pure_noise) {
    // alpha = 0 at t = 1: the exact density there is N(0, I), the default prior.
    for (int k = 2; k < 7; k += 3) {
        df_mixture_view view = { gmm, process_of(k), DF_V };
        df_model m = df_mixture_model(&view);
        df_likelihood_desc d = tight();
        df_point at = df_process_at(&view.process, 1e-3);
        double want[20], got[20];
        df_real x[40];
        d.log_prior = NULL;
        points(&at, 5, 20, x, want);
        check(df_log_likelihood(ctx, &m, &d, x, 20, got) == DF_OK, "%s", df_ctx_message(ctx));
        check(worst(20, got, want) <= (SHARP ? 1e-6 : 1e-4), "%s: off by %g",
              df_process_name(&view.process), worst(20, got, want));
    }
}

TEST(prior_mismatch_apart) {
    // With N(0, sigma^2 I) the error is log N - log p_T at x_T, pointwise. Exact data ends in
    // p_T exactly, so that its deviation can be had from draws of p_T without the ODE: 2.3e-3
    // (VP), 4.5e-3 (EDM) [V]. The standard error of a deviation over n is its size times
    // sqrt((kurtosis - 1)/(4 n)), here at most sqrt(5/n) for a kurtosis below 20.
    static const double sizes[2] = { 2.3e-3, 4.5e-3 };
    enum { N = 300, MANY = 20000 };
    static df_real x[2 * MANY], latent[2 * N];
    static double log_p[MANY], normal[MANY];
    for (int k = 0; k < 2; k++) {
        df_mixture_view view = { gmm, process_of(k), DF_EPS };
        df_model m = df_mixture_model(&view);
        df_likelihood_desc d = tight();
        df_point at = df_process_at(&view.process, k ? 2.5e-5 : 1e-3);
        df_point end = df_process_at(&view.process, 1);
        double want[N], exact[N], got[N], prior[2][N], sum = 0, square = 0, over300 = 0;
        points(&end, 77, MANY, x, log_p);
        for (int i = 0; i < MANY; i++) {
            double s2 = end.sigma * end.sigma, r2 = pow((double)x[2 * i], 2) +
                                                    pow((double)x[2 * i + 1], 2);
            normal[i] = -.5 * r2 / s2 - log(2 * PI * s2) - log_p[i];
            sum += normal[i] / MANY;
            square += normal[i] * normal[i] / MANY;
        }
        square = sqrt(square - sum * sum);
        check(fabs(square - sizes[k]) <= .05 * sizes[k] + Z * square * sqrt(5.0 / MANY),
              "deviation %g, %g in the sheet", square, sizes[k]);
        points(&at, 9, N, x, want);
        d.prior = prior[0];
        d.latent = latent;
        expect(df_log_likelihood(ctx, &m, &d, x, N, exact) == DF_OK);
        d.log_prior = NULL;
        d.prior = prior[1];
        expect(df_log_likelihood(ctx, &m, &d, x, N, got) == DF_OK);
        for (int i = 0; i < N; i++) {
            double off = got[i] - want[i];
            near(got[i] - exact[i], prior[1][i] - prior[0][i], 1e-12);
            over300 += off * off / N;
        }
        over300 = sqrt(over300);
        check(over300 <= square * (1 + Z * sqrt(5.0 / N)) + fabs(sum) + (SHARP ? 0 : 1e-4) &&
              over300 > .3 * square, "root mean square over 300 points %g, deviation %g",
              over300, square);
        expect(df_mixture_log_density(ctx, gmm, &end, N, latent, exact) == DF_OK);
        near_all(prior[0], exact, N, 1e-12);
    }
}

// ---- random probes ----

// Gaussian data: the Jacobians of the whole path share eigenvectors, so that the estimate's
// error is v^T A v - tr A with A = int J ds = Q diag(c) Q^T, c the logarithm of how much the
// path stretches each axis: exact, draw by draw.
static void gaussian_probe(df_trace trace, double correlation) {
    static const double w[1] = { 1 }, mean[2] = { .5, -.3 };
    double S[4] = { .3, correlation, correlation, .3 }, c[2], A[3];
    df_mixture *one = df_mixture_create(ctx, 1, 2, w, mean, S);
    df_mixture_view view = { one, df_process_vp(.1, 20), DF_EPS };
    df_model m = df_mixture_model(&view);
    df_likelihood_desc d = tight();
    df_point a = df_process_at(&view.process, 1e-3), b = df_process_at(&view.process, 1);
    double exact[8], got[8];
    df_real x[16];
    d.user = one;
    d.walk.seed = 42, d.walk.first_sample = 1000000000000ull;
    expect(df_mixture_sample(ctx, one, &a, 3, 0, 8, x) == DF_OK);
    expect(df_mixture_log_density(ctx, one, &a, 8, x, exact) == DF_OK);
    d.trace = trace;
    d.probes = 3;                            // odd: signs cannot cancel
    expect(df_log_likelihood(ctx, &m, &d, x, 8, got) == DF_OK);
    for (int k = 0; k < 2; k++) {
        double v = .3 + (k ? -correlation : correlation);
        c[k] = log(sqrt(b.alpha * b.alpha * v + b.sigma * b.sigma) / (b.alpha + b.sigma)) -
               log(sqrt(a.alpha * a.alpha * v + a.sigma * a.sigma) / (a.alpha + a.sigma));
    }
    if (fabs(correlation) > 0) A[0] = A[2] = (c[0] + c[1]) / 2, A[1] = (c[0] - c[1]) / 2;
    else A[0] = c[0], A[2] = c[1], A[1] = 0;
    for (int i = 0; i < 8; i++) {
        double off = 0;
        for (uint32_t k = 0; k < 3; k++) {
            df_real v[2];
            df_random_normal(42, 1000000000000ull + (uint64_t)i, 0x20000000u + k, 2, v);
            for (int j = 0; j < 2 && trace == DF_TRACE_RADEMACHER; j++)
                v[j] = v[j] < 0 ? (df_real)-1 : (df_real)1;
            off += 1 / 3.0 * ((double)(v[0] * v[0] - 1) * A[0] + 2 * (double)(v[0] * v[1]) * A[1] +
                         (double)(v[1] * v[1] - 1) * A[2]);
        }
        near(got[i], exact[i] + off, SHARP ? 1e-7 : 1e-4);
        if (trace == DF_TRACE_GAUSSIAN || fabs(correlation) > 0) expect(fabs(off) > 1e-6);
        else near_abs(off, 0, 0);            // J is diagonal: signs are exact
    }
    df_mixture_free(one);
}
TEST(probes_on_gaussian_data) {
    gaussian_probe(DF_TRACE_RADEMACHER, 0);
    gaussian_probe(DF_TRACE_RADEMACHER, .2);
    gaussian_probe(DF_TRACE_GAUSSIAN, 0);
    gaussian_probe(DF_TRACE_GAUSSIAN, .2);
}

TEST(probes_on_the_mixture) {
    // One probe: the mean error over 300 points within Z of its standard errors. 64 probes: the
    // root mean square falls by 8; both are estimates over 300 points, good to a tenth.
    enum { N = 300 };
    static df_real x[2 * N];
    double want[N], got[N], rms[2][2];
    for (int g = 0; g < 2; g++)
        for (int many = 0; many < 2; many++) {
            df_mixture_view view = { gmm, df_process_vp(.1, 20), DF_EPS };
            df_model m = df_mixture_model(&view);
            df_likelihood_desc d = tight();
            df_point at = df_process_at(&view.process, 1e-3);
            double sum = 0, square = 0;
            d.walk.rtol = d.walk.atol = 1e-5;
            d.trace = g ? DF_TRACE_GAUSSIAN : DF_TRACE_RADEMACHER;
            d.probes = many ? 64 : 1;
            points(&at, 4, N, x, want);
            expect(df_log_likelihood(ctx, &m, &d, x, N, got) == DF_OK);
            for (int i = 0; i < N; i++) {
                double off = got[i] - want[i];
                sum += off / N;
                square += off * off / N;
            }
            rms[g][many] = sqrt(square);
            check(fabs(sum) <= Z * sqrt(square / N), "mean error %g, standard error %g", sum,
                  sqrt(square / N));
        }
    for (int g = 0; g < 2; g++)
        check(rms[g][0] / rms[g][1] > 5 && rms[g][0] / rms[g][1] < 12,
              "1 probe %g, 64 probes %g", rms[g][0], rms[g][1]);
    // 2 |A|^2 against 2 (|A|^2 - sum of A_jj^2)
    check(rms[1][0] > rms[0][0], "Gaussian %g, signs %g", rms[1][0], rms[0][0]);
}

// ---- a model of one's own ----

// The mixture behind EDM's front: x and v come scaled by c_in, the time is log(sigma)/4. Or a
// flow whose clock runs the other way. Counts what it is asked.
typedef struct own { df_mixture_view view; int flow, asked, jvps; double broken; } own;
static int own_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    own *o = (own *)self;
    df_model m = df_mixture_model(&o->view);
    size_t size = (size_t)q->n * (size_t)q->dim;
    df_real *x = (df_real *)malloc(2 * size * sizeof *x), *v = x + size;
    df_query inner = *q;
    int r;
    for (size_t i = 0; i < size; i++) {
        size_t row = i / (size_t)q->dim;
        double scale = o->flow ? 1 : 1 / sqrt(.25 + q->sigma[row] * q->sigma[row]);
        double t = o->flow ? 1 - (double)q->t_model[row] : exp(4 * (double)q->t_model[row]) / 80;
        if (fabs(t - q->t[row]) > 1e-4) o->broken = t;
        x[i] = (df_real)((double)q->x[i] / scale);
        if (q->v) v[i] = (df_real)((double)q->v[i] / scale);
    }
    inner.x = x;
    inner.v = q->v ? v : NULL;
    r = m.predict(m.self, c, &inner, out);
    for (size_t i = 0; o->flow && i < size; i++) out[i] = -out[i];
    o->asked++;
    o->jvps += q->ask == DF_ASK_JVP;
    free(x);
    return r;
}
static df_model own_model(own *o, int flow, unsigned answers) {
    df_model m = df_model_defaults();
    memset(o, 0, sizeof *o);
    o->view.mixture = gmm;
    o->view.process = m.process = flow ? df_process_flow() : df_process_edm(80);
    o->view.prediction = m.prediction = flow ? DF_VELOCITY : DF_EDM_F;
    o->flow = flow;
    m.predict = own_predict, m.self = o, m.dim = 2, m.answers = answers;
    m.time = flow ? df_time_affine(-1, 1) : df_time_log_sigma(.25);
    if (flow) m.clock = df_time_affine(-1, 1);
    else m.input_sigma_data = .5;
    return m;
}

TEST(own_model_with_and_without_jvp) {
    for (int flow = 0; flow < 2; flow++)
        for (int jvp = 0; jvp < 2; jvp++) {
            own o;
            df_model m = own_model(&o, flow, DF_ASK_PREDICT | (jvp ? (unsigned)DF_ASK_JVP : 0u));
            df_likelihood_desc d = tight();
            df_point at = df_process_at(&m.process, flow ? .05 : .1 / 80);
            double want[12], got[12];
            int evaluations = 0;
            df_real x[24];
            d.walk.t_min = at.t;
            d.evaluations = &evaluations;
            if (!SHARP) d.walk.rtol = d.walk.atol = 1e-4;
            points(&at, 6, 12, x, want);
            expect(df_log_likelihood(ctx, &m, &d, x, 12, got) == DF_OK);
            // Differences are good to cbrt(epsilon)^2: 4e-11 and, in float, 2e-5 of each of
            // the Jacobian's entries, whose integral is of size log 100.
            check(worst(12, got, want) <= (SHARP ? 1e-6 : 5e-3), "flow %d, jvp %d: off by %g",
                  flow, jvp, worst(12, got, want));
            check(o.broken == 0, "asked at another time, %g", o.broken);
            expect(o.jvps == (jvp ? 2 * evaluations : 0));
            expect(o.asked == evaluations * (jvp ? 3 : 5) && evaluations % 7 == 0);
        }
}

TEST(scaling) {
    // data = mean + scale x: the density in the data's units is divided by the scale.
    static const double mean[2] = { 3, -1 }, scale[2] = { 2, .25 };
    for (int size = 1; size <= 2; size++) {
        df_mixture_view view = { gmm, df_process_vp(.1, 20), DF_EPS };
        df_model m = df_mixture_model(&view);
        df_likelihood_desc d = tight();
        df_point at = df_process_at(&view.process, 1e-3);
        double want[8], got[8], back[8];
        df_real x[16], y[16];
        points(&at, 8, 8, x, want);
        m.mean = mean, m.scale = scale, m.scaling_size = size;
        for (int i = 0; i < 16; i++)
            y[i] = (df_real)(mean[i % size] + scale[i % size] * (double)x[i]);
        for (int i = 0; i < 8; i++) want[i] -= log(scale[0]) + log(scale[size - 1]);
        expect(df_log_likelihood(ctx, &m, &d, y, 8, got) == DF_OK);
        near_all(got, want, 8, SHARP ? 1e-7 : 1e-4);
        expect(df_sample_likelihood(ctx, &m, &d, y, 8, back) == DF_OK);
        expect(df_log_likelihood(ctx, &m, &d, y, 8, got) == DF_OK);
        near_all(got, back, 8, SHARP ? 1e-7 : 1e-4);
    }
}

// ---- batches, directions, methods ----

TEST(batches_do_not_show) {
    static const int cuts[3][7] = { { 1, 1, 1, 1, 1, 1, 1 }, { 3, 4 }, { 2, 5 } };
    for (int trace = 0; trace < 3; trace++) {
        df_mixture_view view = { gmm, df_process_edm(80), DF_EDM_F };
        df_model m = df_mixture_model(&view);
        df_likelihood_desc d = df_likelihood_defaults();
        df_real x[14], latent[14], part[14];
        double all[7], got[7], log_p[7];
        df_point at = df_process_at(&view.process, 1e-4);
        points(&at, 21, 7, x, log_p);
        d.trace = (df_trace)trace;
        d.walk.seed = 5;
        for (int cut = -1; cut < 4; cut++) {
            m.max_batch = cut == 3 ? 2 : 0;
            for (int k = 0, from = 0; from < 7; k++) {
                int n = cut < 0 || cut == 3 ? 7 : cuts[cut][k];
                d.latent = (cut < 0 ? latent : part) + 2 * from;
                d.walk.first_sample = 100 + (uint64_t)from;
                expect(df_log_likelihood(ctx, &m, &d, x + 2 * from, n,
                                         (cut < 0 ? all : got) + from) == DF_OK);
                from += n;
            }
            if (cut < 0) continue;
            same_bits(all, got, sizeof all);
            same_bits(latent, part, sizeof latent);
        }
        d.walk.first_sample = 101;           // other samples have other probes
        expect(df_log_likelihood(ctx, &m, &d, x, 7, got) == DF_OK);
        expect((memcmp(all, got, sizeof all) == 0) == (trace == DF_TRACE_EXACT));
    }
}

static int fill_noise(void *user, const df_noise_query *q, df_real *out) {
    if (user != NULL) return 77;
    for (int i = 0; i < q->n; i++)
        df_random_normal(q->seed + 1, q->first_sample + (uint64_t)i, q->draw, (size_t)q->dim,
                         out + i * q->dim);
    return 0;
}

TEST(along_sampling) {
    // log p of samples as they are made: the mixture's own, and what is found afterwards; the
    // samples are df_sample's, for methods of fixed steps to rounding.
    enum { N = 16 };
    for (int k = 0; k < 4; k++) {
        df_mixture_view view = { gmm, process_of(k), DF_V };
        df_model m = df_mixture_model(&view);
        df_likelihood_desc d = tight();
        df_point at = df_process_at(&view.process, df_process_t_min(&view.process));
        df_real x[2 * N], y[2 * N], after_x[2 * N];
        double got[N], want[N], after[N];
        d.walk.seed = 11;
        expect(df_sample_likelihood(ctx, &m, &d, x, N, got) == DF_OK);
        expect(df_mixture_log_density(ctx, gmm, &at, N, x, want) == DF_OK);
        near_all(got, want, N, SHARP ? 1e-7 : 1e-4);
        expect(df_log_likelihood(ctx, &m, &d, x, N, after) == DF_OK);
        near_all(got, after, N, SHARP ? 1e-7 : 1e-4);
        d.walk.method = "heun";
        if (k == 2) d.walk.t_max = .999;     // heun walks rho
        check(df_sample_likelihood(ctx, &m, &d, x, N, got) == DF_OK, "%s", df_ctx_message(ctx));
        expect(df_sample(ctx, &m, &d.walk, y, N) == DF_OK);
        near_all(x, y, 2 * N, SHARP ? 1e-11 : 1e-3);
        df_noise hook = { fill_noise, NULL };          // from a source of one's own
        d.walk.noise = hook;
        expect(df_sample_likelihood(ctx, &m, &d, after_x, N, after) == DF_OK);
        expect(df_sample(ctx, &m, &d.walk, y, N) == DF_OK);
        near_all(after_x, y, 2 * N, SHARP ? 1e-11 : 1e-3);
        check(fabs((double)(x[0] - y[0])) > 1e-3, "the source is not asked");
        d.walk.noise.user = &d;
        expect(df_sample_likelihood(ctx, &m, &d, after_x, N, after) == 77);
        expect(says(ctx, "noise.fill returned 77"));
        d.walk.noise.fill = NULL;
        d.walk.start = DF_START_GIVEN;       // the same noise, given
        for (int i = 0; i < N; i++) {
            df_random_normal(11, (uint64_t)i, 0, 2, y + 2 * i);
            for (int j = 0; j < 2; j++)
                y[2 * i + j] = (df_real)(df_process_at(&view.process, d.walk.t_max).sigma *
                                         (double)y[2 * i + j]);
        }
        expect(df_sample_likelihood(ctx, &m, &d, y, N, after) == DF_OK);
        near_all(y, x, 2 * N, SHARP ? 1e-12 : 1e-4);
        near_all(after, got, N, SHARP ? 1e-11 : 1e-3);
    }
}

TEST(any_ode_method_with_its_order) {
    // log p is one more coordinate: the error falls as the method's order says. lambda in
    // [-3, 3], as section 6 has it; slopes in double only.
    static const struct { const char *method; int steps; double order; } cases[] = {
        { "ddim", 640, 1 }, { "heun", 320, 2 }, { "dpmpp_2m", 640, 2 }, { "rk4", 160, 4 }
    };
    for (int k = 0; k < 4; k++) {
        df_mixture_view view = { gmm, df_process_vp(.1, 20), DF_EPS };
        df_model m = df_mixture_model(&view);
        df_likelihood_desc d = tight();
        df_point from = df_process_at_lambda(&view.process, -3);
        df_point at = df_process_at_lambda(&view.process, 3);
        double off[2], want[12], got[12], slope;
        df_real x[24];
        points(&at, 31, 12, x, want);
        d.walk.t_max = from.t, d.walk.t_min = at.t;
        d.walk.method = cases[k].method, d.walk.grid = "lambda";
        for (int half = 0; half < 2; half++) {
            d.walk.steps = cases[k].steps << half;
            expect(df_log_likelihood(ctx, &m, &d, x, 12, got) == DF_OK);
            off[half] = 0;
            for (int i = 0; i < 12; i++) off[half] += fabs(got[i] - want[i]);
        }
        slope = log(off[0] / off[1]) / log(2.0);
        if (SHARP)
            check(fabs(slope - cases[k].order) < .15, "%s: order %.3f", cases[k].method, slope);
        else check(off[1] < 1, "%s: off by %g", cases[k].method, off[1]);
    }
}

// ---- bits and levels ----

TEST(bits_per_dimension) {
    // A uniform distribution over 256 levels costs 8 bits, whatever the units.
    near(df_bits_per_dim(0, 784, 1 / 256.0), 8, 1e-14);            // density 1 on [0, 1]
    near(df_bits_per_dim(-784 * log(2.0), 784, 2 / 256.0), 8, 1e-14);   // 1/2 on [-1, 1]
    near(df_bits_per_dim(-3 * log(2.0), 3, 1), 1, 1e-14);
    near(df_bits_per_dim(0, 784, 2 / 256.0), 7, 1e-14);
    near(df_bits_per_dim(-10, 10, 1 / 256.0) - df_bits_per_dim(0, 10, 1 / 256.0),
         1 / log(2.0), 1e-14);
}

TEST(dequantisation) {
    enum { N = 64, DIM = 77 };
    static unsigned char k[N * DIM];
    static df_real x[N * DIM], y[N * DIM], part[DIM];
    double sum = 0, square = 0;
    for (int i = 0; i < N * DIM; i++) k[i] = (unsigned char)(i * 37 % 256);
    df_dequantize(9, 50, N, DIM, k, -1, 1, x);
    df_dequantize(9, 50, N, DIM, k, -1, 1, y);
    same_bits(x, y, sizeof x);
    df_dequantize(9, 53, 1, DIM, k + 3 * DIM, -1, 1, part);
    same_bits(part, x + 3 * DIM, sizeof part);
    df_dequantize(10, 50, N, DIM, k, -1, 1, y);
    expect(memcmp(x, y, sizeof x) != 0);
    for (int i = 0; i < N * DIM; i++) {
        double u = ((double)x[i] + 1) * 128 - k[i];          // uniform on (0, 1)
        check(u > -1e-4 && u < 1 + 1e-4, "level %d became %g", k[i], (double)x[i]);
        sum += u / (N * DIM);
        square += u * u / (N * DIM);
    }
    check(fabs(sum - .5) < Z * sqrt(1 / 12.0 / (N * DIM)), "mean %g", sum);
    check(fabs(square - 1 / 3.0) < Z * sqrt(4 / 45.0 / (N * DIM)), "E u^2 %g", square);
}

// ---- the variational bound ----

// Elements N(mean, var) that know x_0 exactly, and a variance behind it if `learned`, which is
// a function of x.
enum { DIM = 3 };
typedef struct gauss { double mean, var; } gauss;
static double behind(df_learned kind, double x) {
    return kind == DF_LEARNED_VARIANCE ? .01 + .001 * x * x : .3 * sin(x) - (kind == 2 ? 4 : 0);
}
static double posterior_mean(const gauss *g, double alpha, double sigma, double x) {
    return g->mean + alpha * g->var / (alpha * alpha * g->var + sigma * sigma) *
                         (x - alpha * g->mean);
}
typedef struct gauss_self { gauss g; df_learned learned; long asked, broken; } gauss_self;
static int gauss_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    gauss_self *g = (gauss_self *)self;
    size_t dim = (size_t)q->dim, width = g->learned != DF_LEARNED_NONE ? 2 * dim : dim;
    (void)c;
    for (size_t i = 0; i < (size_t)q->n; i++)
        for (size_t j = 0; j < dim; j++) {
            double x = (double)q->x[i * dim + j];
            out[i * width + j] =
                (df_real)posterior_mean(&g->g, q->alpha[i], q->sigma[i], x);
            if (width > dim) out[i * width + dim + j] = (df_real)behind(g->learned, x);
        }
    if (++g->asked == g->broken) out[0] = (df_real)NAN;
    return 0;
}
static df_model gauss_model(gauss_self *self, df_process p, df_learned learned) {
    df_model m = df_model_defaults();
    memset(self, 0, sizeof *self);
    self->g.mean = .4, self->g.var = .3, self->learned = learned;
    m.predict = gauss_predict, m.self = self, m.dim = DIM;
    m.process = p, m.prediction = DF_X0, m.learned = learned;
    return m;
}

// One element of one term by Bayes' rule: q(x_t|x_s, x_0) is the product of N(alpha_t x_0,
// sigma_t^2) and of what x_s says of x_t. Its variance with x_0 predicted for x_0, or LARGE.
typedef struct bayes { double mean[2], small, large; } bayes;
static bayes posterior(df_point s, df_point t, double xs, double x0, double predicted) {
    double a = s.alpha / t.alpha, st = s.sigma * s.sigma - a * a * t.sigma * t.sigma;
    double V = (t.alpha * t.alpha + t.sigma * t.sigma) / (s.alpha * s.alpha + s.sigma * s.sigma);
    bayes b;
    b.small = 1 / (1 / (t.sigma * t.sigma) + a * a / st);
    b.large = st * V;
    for (int k = 0; k < 2; k++)
        b.mean[k] = b.small * (t.alpha * (k ? predicted : x0) / (t.sigma * t.sigma) + a * xs / st);
    return b;
}
static double kl(double m0, double v0, double m1, double v1) {
    return .5 * (log(v1 / v0) + (v0 + (m0 - m1) * (m0 - m1)) / v1 - 1);
}
static double snr(df_point q) { return pow(q.alpha / q.sigma, 2); }
static double phi(double x) { return .5 * erfc(-x / sqrt(2.0)); }

// All terms of one sample in plain double, drawn with the same noise. On a table the decoder's
// SMALL is that of the step before, elsewhere it is LARGE.
static void plain_terms(const gauss_self *g, const df_bound_desc *d, int table,
                        const df_point *grid, int T, uint64_t sample, const df_real *x,
                        double *terms) {
    for (int k = 0; k <= T; k++) terms[k] = 0;
    for (int j = 0; j < DIM; j++) {
        double x0 = (double)x[j];
        terms[0] += kl(grid[0].alpha * x0, grid[0].sigma * grid[0].sigma, 0,
                       grid[0].sigma * grid[0].sigma);
        for (int k = 0; k < T * d->draws; k++) {
            df_point s = grid[k / d->draws], t = grid[k / d->draws + 1];
            df_learned kind = d->walk.variance == DF_VARIANCE_OWN ? g->learned : DF_LEARNED_NONE;
            int last = k / d->draws == T - 1;
            double xs, p, v, term, low, high, l;
            df_real z[DIM];
            bayes b;
            df_random_normal(d->walk.seed, d->walk.first_sample + sample, 1 + (uint32_t)k, DIM, z);
            xs = (double)(df_real)(s.alpha * x0 + s.sigma * (double)z[j]);
            p = posterior_mean(&g->g, s.alpha, s.sigma, xs);
            if (last) {
                b.large = s.sigma * s.sigma / (s.alpha * s.alpha + s.sigma * s.sigma);
                b.small = T > 1 ? posterior(grid[T - 2], s, 0, 0, 0).small : b.large;
            } else b = posterior(s, t, xs, x0, p);
            v = d->walk.variance == DF_VARIANCE_LARGE || (last && !table) ? b.large : b.small;
            l = behind(kind, xs);
            if (kind == DF_LEARNED_VARIANCE) v = l;
            if (kind == DF_LEARNED_LOG_VARIANCE) v = exp(l);
            if (kind == DF_LEARNED_RANGE)
                v = pow(b.large, (l + 1) / 2) * pow(b.small, (1 - l) / 2);
            if (!last) term = kl(b.mean[0], b.small, b.mean[1], v);
            else if (d->levels == 0) term = .5 * (log(2 * PI * v) + (x0 - p) * (x0 - p) / v);
            else {
                double half = .5 * (d->high - d->low) / (d->levels - 1);
                low = x0 - half < d->low ? 0 : phi((x0 - half - p) / sqrt(v));
                high = x0 + half > d->high ? 1 : phi((x0 + half - p) / sqrt(v));
                term = -log(high - low);
            }
            terms[1 + k / d->draws] += term / d->draws;
        }
    }
}

TEST(bound_term_by_term) {
    static const df_variance variances[3] = { DF_VARIANCE_OWN, DF_VARIANCE_SMALL,
                                              DF_VARIANCE_LARGE };
    enum { N = 5, T = 12 };
    for (int k = 0; k < CASES; k++)
        for (int run = 0; run < 8; run++) {
            gauss_self self;
            df_model m = gauss_model(&self, process_of(k), (df_learned)(run % 4));
            df_bound_desc d = df_bound_defaults();
            df_point grid[T + 1];
            df_real x[N * DIM];
            double terms[N * (T + 1)], want[T + 1], out[N], one;
            int count = 0;
            d.walk.steps = T, d.walk.seed = 3, d.walk.first_sample = 70;
            d.walk.variance = variances[run % 4 ? 0 : 1 + run / 4];
            if (k == 2 && run % 2) d.walk.t_max = .99;
            d.draws = 1 + run % 3;
            d.levels = run < 4 ? 0 : 21;
            d.terms = terms;
            expect(df_grid(ctx, &m.process, &d.walk, grid, T + 1, &count) == DF_OK);
            for (int i = 0; i < N * DIM; i++)
                x[i] = (df_real)(run < 4 ? sin(i) : -1 + .1 * (i * 7 % 21));
            check(df_variational_bound(ctx, &m, &d, x, N, out) == DF_OK, "%s",
                  df_ctx_message(ctx));
            for (int i = 0; i < N; i++) {
                int points = count - 1;
                plain_terms(&self, &d, k == 7, grid, points, (uint64_t)i, x + DIM * i, want);
                for (int j = 0; j <= points; j++)
                    check(fabs(terms[i * (points + 1) + j] - want[j]) <=
                              (SHARP ? 1e-9 : 2e-3) * fmax(1, fabs(want[j])),
                          "%s, run %d, sample %d, term %d: %.12g, want %.12g",
                          df_process_name(&m.process), run, i, j, terms[i * (points + 1) + j],
                          want[j]);
                one = 0;
                for (int j = 0; j <= points; j++) one -= terms[i * (points + 1) + j];
                near(out[i], one, 1e-12);
            }
            d.terms = NULL;                      // a sample alone has the same bits
            d.walk.first_sample = 72;
            expect(df_variational_bound(ctx, &m, &d, x + 2 * DIM, 1, &one) == DF_OK);
            same_bits(&one, &out[2], sizeof one);
        }
}

TEST(continuous_integral_by_its_draws) {
    // Draw 0x38000000 + k places lambda, no other's (0x30000000 is what dequantises the data),
    // draw 1 + k noises.
    enum { N = 3, DRAWS = 4 };
    gauss_self self;
    df_model m = gauss_model(&self, df_process_vp(.1, 20), DF_LEARNED_NONE);
    df_bound_desc d = df_bound_defaults();
    df_real x[N * DIM];
    double terms[3 * N], out[N];
    df_point low = df_process_at(&m.process, .9), high = df_process_at(&m.process, .01);
    d.continuous = 1, d.draws = DRAWS, d.terms = terms;
    d.walk.seed = 8, d.walk.first_sample = 20, d.walk.t_max = .9, d.walk.t_min = .01;
    for (int i = 0; i < N * DIM; i++) x[i] = (df_real)sin(i);
    expect(df_variational_bound(ctx, &m, &d, x, N, out) == DF_OK);
    for (int i = 0; i < N; i++) {
        double want = 0, part = (high.lambda - low.lambda) / DRAWS, u;
        for (uint32_t k = 0; k < DRAWS; k++) {
            df_real z[DIM];
            df_point at;
            df_random_uniform(8, 20 + (uint64_t)i, 0x38000000u + k, 1, &u);
            df_random_normal(8, 20 + (uint64_t)i, 1 + k, DIM, z);
            at = df_process_at_lambda(&m.process, low.lambda + (k + u) * part);
            for (int j = 0; j < DIM; j++) {
                double x0 = (double)x[i * DIM + j], xs = at.alpha * x0 + at.sigma * (double)z[j];
                want += part * snr(at) *
                        pow(x0 - posterior_mean(&self.g, at.alpha, at.sigma, xs), 2);
            }
        }
        near(terms[3 * i + 1], want, SHARP ? 1e-9 : 2e-3);
    }
}

TEST(bound_of_scaled_data) {
    // In other units the density is divided by the scale; levels keep their probability.
    static const double mean = 3, scale = 4;
    gauss_self self;
    df_model m = gauss_model(&self, df_process_vp(.1, 20), DF_LEARNED_NONE);
    df_bound_desc d = df_bound_defaults();
    df_real x[DIM] = { (df_real)-.5, (df_real)1, (df_real).25 }, y[DIM];
    for (int j = 0; j < DIM; j++) y[j] = (df_real)(mean + scale * (double)x[j]);
    for (int k = 0; k < 2; k++) {
        double a, b;
        d.levels = k ? 9 : 0, d.low = -1, d.high = 1;
        m.mean = m.scale = NULL;
        expect(df_variational_bound(ctx, &m, &d, x, 1, &a) == DF_OK);
        m.mean = &mean, m.scale = &scale, m.scaling_size = 1;
        d.low = mean - scale, d.high = mean + scale;
        expect(df_variational_bound(ctx, &m, &d, y, 1, &b) == DF_OK);
        near(b, a - (k ? 0 : DIM * log(scale)), SHARP ? 1e-10 : 1e-4);
    }
}

TEST(far_levels_on_both_sides) {
    // A model that is sure of 0, and data nine deviations away: as improbable on either side,
    // though one of them is a difference of numbers next to 1.
    gauss_self self;
    df_model m = gauss_model(&self, df_process_vp(.1, 20), DF_LEARNED_NONE);
    df_bound_desc d = df_bound_defaults();
    df_point at = df_process_at(&m.process, .05);
    double terms[2][2], out, V = at.alpha * at.alpha + at.sigma * at.sigma, want = 0;
    self.g.mean = 0, self.g.var = 1e-15;
    d.walk.steps = 1, d.walk.t_max = .05, d.levels = 41, d.low = -2, d.high = 2;
    for (int k = 0; k < 2; k++) {
        df_real x[DIM];
        for (int j = 0; j < DIM; j++) x[j] = (df_real)(k ? 1.5 : -1.5);
        d.terms = terms[k];
        expect(df_variational_bound(ctx, &m, &d, x, 1, &out) == DF_OK);
    }
    for (int j = 0; j < DIM; j++)
        want -= log(phi(-1.45 * sqrt(V) / at.sigma) - phi(-1.55 * sqrt(V) / at.sigma));
    check(want / DIM > 37, "mass e^-%g is no test", want / DIM);   // below epsilon
    near(terms[0][1], want, SHARP ? 1e-9 : 1e-4);
    near(terms[1][1], want, SHARP ? 1e-9 : 1e-4);
}

// What the terms are on average for data N(mean, var) and the exact posterior mean, whose
// error has the posterior's variance.
static double post(const gauss *g, df_point q) {
    return g->var * q.sigma * q.sigma / (q.alpha * q.alpha * g->var + q.sigma * q.sigma);
}

TEST(bound_on_average) {
    // Discrete, SMALL: each KL is half the fall of SNR times the posterior's variance (Kingma
    // et al. 2021, eq. 13). Continuous: int |eps error|^2 d lambda = log(1 + var SNR)/2 between
    // the ends. Means over n = 20000 samples, a false alarm in 5e8.
    enum { N = 20000, T = 8 };
    static df_real x[N * DIM];
    static double terms[N * (T + 1)], out[N];
    for (int run = 0; run < 2; run++) {
        gauss_self self;
        df_model m = gauss_model(&self, df_process_vp(.1, 20), DF_LEARNED_NONE);
        df_bound_desc d = df_bound_defaults();
        df_point grid[T + 1], end;
        double want[T + 1], v;
        int columns = run ? 3 : T + 1, count;
        d.walk.steps = T, d.walk.seed = 1, d.continuous = run, d.terms = terms, d.draws = 1;
        for (int i = 0; i < N; i++) {
            df_random_normal(2, (uint64_t)i, 0, DIM, x + i * DIM);
            for (int j = 0; j < DIM; j++)
                x[i * DIM + j] = (df_real)(.4 + sqrt(.3) * (double)x[i * DIM + j]);
        }
        if (run) d.walk.t_min = .01, d.walk.end = DF_END_T_MIN;
        expect(df_grid(ctx, &m.process, &d.walk, grid, T + 1, &count) == DF_OK);
        expect(df_variational_bound(ctx, &m, &d, x, N, out) == DF_OK);
        want[0] = .5 * DIM * snr(grid[0]) * (.16 + .3);
        for (int k = 1; k < T; k++)
            want[k] = .5 * DIM * (snr(grid[k]) - snr(grid[k - 1])) * post(&self.g, grid[k - 1]);
        end = run ? df_process_at(&m.process, .01) : grid[T - 1];
        if (run)
            want[1] = .5 * DIM * log((1 + .3 * snr(end)) / (1 + .3 * snr(grid[0])));
        v = end.sigma * end.sigma;                           // LARGE
        want[columns - 1] = .5 * DIM * (log(2 * PI * v) + post(&self.g, end) / v);
        for (int k = 0; k < columns; k++) {
            double sum = 0, square = 0, error;
            for (int i = 0; i < N; i++) {
                sum += terms[i * columns + k] / N;
                square += pow(terms[i * columns + k], 2) / N;
            }
            error = sqrt((square - sum * sum) / N);
            check(fabs(sum - want[k]) <= Z * error + 1e-12, "run %d, term %d: %g +- %g, want %g",
                  run, k, sum, error, want[k]);
            check(error < .02 * fabs(want[k]) + 1e-6, "term %d: error %g is no test of %g", k,
                  error, want[k]);
        }
        // all of it: the bound cannot beat the entropy, and continuous comes close to it
        if (run) {
            double entropy = .5 * DIM * log(2 * PI * exp(1.0) * .3), all = 0;
            for (int k = 0; k < 3; k++) all += want[k];
            check(all > entropy && all < entropy + .01, "bound %g, entropy %g", all, entropy);
        }
    }
}

TEST(bound_with_many_steps_is_the_continuous_one) {
    // All terms on average. The KLs of T steps in lambda are a left sum of the integral, prior
    // and decoder are the same, so that the sum of all is off the continuous bound, and this off
    // the entropy by less than .01, by what falls as 1/T: were the decoder's variance to narrow
    // with the steps, the bound would get worse with T. Means over N samples.
    enum { N = 400, MOST = 800 };
    gauss g = { .4, .3 };
    df_process p = df_process_vp(.1, 20);
    df_point first = df_process_at(&p, 1), end = df_process_at(&p, .01);
    double entropy = .5 * log(2 * PI * exp(1.0) * .3), off[4], v = end.sigma * end.sigma;
    double ends = .5 * snr(first) * (.16 + .3) + .5 * (log(2 * PI * v) + post(&g, end) / v);
    double integral = .5 * log((1 + .3 * snr(end)) / (1 + .3 * snr(first)));
    gauss_self self;
    df_model m = gauss_model(&self, p, DF_LEARNED_NONE);
    for (int k = 0; k < 4; k++) {                // T = 50, 200, 800, and continuous
        int T = 50 << 2 * k, count;
        static df_point grid[MOST + 2];
        static df_real x[DIM * N];
        static double out[N];
        df_bound_desc d = df_bound_defaults();
        double want = ends, mean = 0, square = 0;
        d.walk.steps = T, d.walk.grid = "lambda", d.walk.end = DF_END_T_MIN, d.walk.t_min = .01;
        if (k == 3) d.walk.steps = 1, d.continuous = 1, d.draws = 50, want += integral;
        expect(df_grid(ctx, &p, &d.walk, grid, MOST + 2, &count) == DF_OK);
        for (int j = 1; j < count && k < 3; j++)
            want += .5 * (snr(grid[j]) - snr(grid[j - 1])) * post(&g, grid[j - 1]);
        off[k] = want - integral - ends;
        for (int i = 0; i < N; i++) {
            df_random_normal(5, (uint64_t)i, 0, DIM, x + i * DIM);
            for (int j = 0; j < DIM; j++)
                x[i * DIM + j] = (df_real)(.4 + sqrt(.3) * (double)x[i * DIM + j]);
        }
        expect(df_variational_bound(ctx, &m, &d, x, N, out) == DF_OK);
        for (int i = 0; i < N; i++)
            mean -= out[i] / DIM / N, square += pow(out[i] / DIM, 2) / N;
        check(fabs(mean - want) <= Z * sqrt((square - mean * mean) / N),
              "T = %d: bound %g, want %g +- %g", T, mean, want,
              sqrt((square - mean * mean) / N));
        check(want - off[k] > entropy && want - off[k] < entropy + .01, "bound %g, entropy %g",
              want - off[k], entropy);
    }
    for (int k = 0; k < 2; k++)
        check(off[k] > 0 && fabs(off[k] / off[k + 1] - 4) < .4, "off by %g, %g", off[k],
              off[k + 1]);
    near_abs(off[3], 0, 1e-15);
}

// ---- the KL identity, MATH.md check 1a ----

// KL(p_t || q_t) and the integrand of its fall for Gaussians: E_p |score p - score q|^2 g^2/2.
static double kl_at(const df_process *p, double t) {
    df_point a = df_process_at(p, t);
    double s2 = a.sigma * a.sigma, a2 = a.alpha * a.alpha;
    return kl(a.alpha, a2 * .25 + s2, -.5 * a.alpha, a2 * 2 + s2);
}
static double fisher_at(const df_process *p, double t) {
    // scores are -(x - m)/v: the mean square of their difference under p, by its moments
    df_point a = df_process_at(p, t);
    df_rates r;
    double s2 = a.sigma * a.sigma, a2 = a.alpha * a.alpha, v0 = a2 * .25 + s2, v1 = a2 * 2 + s2;
    double slope = 1 / v1 - 1 / v0, at_mean = 1.5 * a.alpha / v1;
    expect(df_process_rates(ctx, p, t, DF_RATE_G2, &r) == DF_OK);
    return .5 * r.g2 * (at_mean * at_mean + slope * slope * v0);
}
TEST(kl_falls_by_the_fisher_divergence) {
    // OU: beta = 1 in tau = 60 t. The figures are of MATH.md [V].
    df_process p = df_process_vp(60, 60);
    double h = 1e-4 / 60, t = .7 / 60, sum = 0;
    near(fisher_at(&p, t) / 60, .5180696, 1e-7);
    near(-(kl_at(&p, t + h) - kl_at(&p, t - h)) / (2 * h) / 60, .5180696, 1e-6);
    near(kl_at(&p, 0), 1.1647207708, 1e-9);
    for (int k = 0; k <= 6000; k++) {            // Simpson's rule
        double w = k == 0 || k == 6000 ? 1 : k % 2 ? 4 : 2;
        sum += w * fisher_at(&p, k / 6000.0) / 18000;
    }
    near(sum, 1.1647207708, 1e-6);
}

// ---- what goes wrong ----

static int no_prior(void *user, const df_point *at, int n, const df_real *x, double *out) {
    (void)at, (void)x;
    for (int i = 0; i < n; i++) out[i] = i == 1 ? NAN : 0;
    return *(int *)user;
}

TEST(wrong_arguments) {
    df_mixture_view view = { gmm, df_process_vp(.1, 20), DF_EPS };
    df_model m = df_mixture_model(&view), none = df_model_defaults();
    df_real x[6] = { 0 }, bad[6] = { 0 };
    double out[3], same = 7, eps2[2] = { .5, .5 };
    int code = 5;
    df_likelihood_desc d;
    df_bound_desc b;
    bad[3] = (df_real)NAN;
#define LIKELIHOOD(change, wanted, words) do { d = df_likelihood_defaults(); \
    out[0] = same; change; \
    check(df_log_likelihood(ctx, &m, &d, x, 3, out) == (wanted), "%s", #change); \
    expect(says(ctx, words)); expect(out[0] == same); } while (0)
    LIKELIHOOD(d.cookie = 0, DF_ERR_ARGUMENT, "df_likelihood_defaults");
    LIKELIHOOD(d.walk.cookie = 0, DF_ERR_ARGUMENT, "df_likelihood_defaults");
    LIKELIHOOD(d.trace = (df_trace)3, DF_ERR_ARGUMENT, "trace 3");
    LIKELIHOOD(d.probes = 0, DF_ERR_ARGUMENT, "probes 0");
    LIKELIHOOD(d.walk.clip = 1, DF_ERR_ARGUMENT, "clip 1");
    LIKELIHOOD(d.walk.threshold = .9, DF_ERR_ARGUMENT, "threshold");
    LIKELIHOOD(d.walk.start = DF_START_DATA, DF_ERR_ARGUMENT, "start 2");
    LIKELIHOOD(d.walk.method = "ddpm", DF_ERR_ARGUMENT, "ODE");
    LIKELIHOOD(d.walk.method = "no such", DF_ERR_ARGUMENT, "nearest names");
    LIKELIHOOD(d.walk.churn = 1; d.walk.method = "heun", DF_ERR_ARGUMENT, "churn");
    LIKELIHOOD(d.walk.steps = 0, DF_ERR_ARGUMENT, "df_log_likelihood");
    LIKELIHOOD(d.walk.steps = 1000001, DF_ERR_ARGUMENT, "1000001 steps");
    LIKELIHOOD(d.walk.steps = 2147483647, DF_ERR_ARGUMENT, "1 to 1000000 steps");
    LIKELIHOOD(d.walk.t_max = 2, DF_ERR_ARGUMENT, "t_max");
    LIKELIHOOD(d.walk.end = DF_END_DATA, DF_ERR_ARGUMENT, "sigma = 0");
    LIKELIHOOD(d.log_prior = no_prior; d.user = &code, 5, "log_prior returned 5");
    code = 0;
    LIKELIHOOD(d.log_prior = no_prior; d.user = &code, DF_ERR_NONFINITE, "sample 1");
    d = df_likelihood_defaults();
    d.walk.method = "euler_ancestral";
    expect(df_sample_likelihood(ctx, &m, &d, x, 3, out) == DF_ERR_ARGUMENT && says(ctx, "ODE"));
    expect(df_log_likelihood(ctx, &m, NULL, bad, 3, out) == DF_ERR_NONFINITE);
    expect(says(ctx, "sample 1"));
    expect(df_log_likelihood(ctx, &m, NULL, x, 0, out) == DF_ERR_ARGUMENT);
    expect(df_log_likelihood(ctx, &m, NULL, NULL, 3, out) == DF_ERR_ARGUMENT);
    expect(df_log_likelihood(ctx, &m, NULL, x, 3, NULL) == DF_ERR_ARGUMENT);
    expect(df_log_likelihood(ctx, NULL, NULL, x, 3, out) == DF_ERR_ARGUMENT);
    expect(df_log_likelihood(ctx, &none, NULL, x, 3, out) == DF_ERR_ARGUMENT);
    expect(df_log_likelihood(NULL, &m, NULL, x, 3, out) == DF_ERR_ARGUMENT);
#define BOUND(change, wanted, words) do { b = df_bound_defaults(); change; \
    check(df_variational_bound(ctx, &m, &b, x, 3, out) == (wanted), "%s", #change); \
    expect(says(ctx, words)); } while (0)
    BOUND(b.cookie = 0, DF_ERR_ARGUMENT, "df_bound_defaults");
    BOUND(b.draws = 0, DF_ERR_ARGUMENT, "draws 0");
    BOUND(b.draws = 2147483647, DF_ERR_ARGUMENT, "at most 2^29"); // draws would repeat
    BOUND(b.levels = 1, DF_ERR_ARGUMENT, "levels 1");
    BOUND(b.levels = 256; b.low = 1, DF_ERR_ARGUMENT, "from 1 to 1");
    BOUND(b.walk.steps = 0, DF_ERR_ARGUMENT, "0 steps");
    BOUND(b.walk.variance = DF_VARIANCE_ANALYTIC, DF_ERR_ARGUMENT, "eps2");
    BOUND(b.walk.grid = "no such", DF_ERR_ARGUMENT, "no grid");
    // eps2 ends one point before a grid that does not end at the data
    BOUND(b.walk.variance = DF_VARIANCE_ANALYTIC; b.walk.eps2 = eps2; b.walk.steps = 2;
          b.walk.end = DF_END_T_MIN, DF_ERR_ARGUMENT, "eps2 of 2 steps, but the grid 3");
    view.process = m.process = df_process_flow(), view.prediction = m.prediction = DF_X0;
    BOUND(b.continuous = 1, DF_ERR_SINGULAR, "lambda is infinite");
    expect(df_variational_bound(ctx, &m, NULL, bad, 3, out) == DF_ERR_NONFINITE);
    expect(df_variational_bound(NULL, &m, NULL, x, 3, out) == DF_ERR_ARGUMENT);
}

TEST(nan_from_the_model) {
    for (int k = 0; k < 2; k++) {
        gauss_self self;
        df_model m = gauss_model(&self, df_process_vp(.1, 20), DF_LEARNED_NONE);
        df_real x[2 * DIM] = { 0 };
        double out[2];
        self.broken = 9;
        expect((k ? df_log_likelihood(ctx, &m, NULL, x, 2, out)
                  : df_variational_bound(ctx, &m, NULL, x, 2, out)) == DF_ERR_NONFINITE);
        expect(says(ctx, "row 0, element 0"));
        expect(self.asked == 9);
    }
}

TEST(analytic_variance_is_the_better_bound) {
    // eps2 measured, the analytic variance is the best of all isotropic ones (Bao et al. 2022).
    enum { N = 2000, T = 6 };
    static df_real x[N * DIM];
    static double out[N];
    double eps2[T], mean[3] = { 0, 0, 0 };
    gauss_self self;
    df_model m = gauss_model(&self, df_process_vp(.1, 20), DF_LEARNED_NONE);
    df_bound_desc d = df_bound_defaults();
    for (int i = 0; i < N; i++) {
        df_random_normal(2, (uint64_t)i, 0, DIM, x + i * DIM);
        for (int j = 0; j < DIM; j++)
            x[i * DIM + j] = (df_real)(.4 + sqrt(.3) * (double)x[i * DIM + j]);
    }
    d.walk.steps = T;
    expect(df_sample_eps2(ctx, &m, &d.walk, x, N, eps2) == DF_OK);
    d.walk.eps2 = eps2;
    for (int k = 0; k < 3; k++) {
        d.walk.variance = (df_variance)(DF_VARIANCE_SMALL + k);
        expect(df_variational_bound(ctx, &m, &d, x, N, out) == DF_OK);
        for (int i = 0; i < N; i++) mean[k] += out[i] / N;
    }
    check(mean[2] > mean[0] && mean[2] > mean[1], "small %g, large %g, analytic %g", mean[0],
          mean[1], mean[2]);
}

TEST(every_allocation_failing) {
    for (int what = 0; what < 3; what++)
        for (long fail = 1, done = 0; !done && fail < 100; fail++) {
            counter c = { 0, 0, 0 };
            df_ctx *small = new_ctx(1, &c);
            gauss_self self;
            df_model m = gauss_model(&self, df_process_vp(.1, 20), DF_LEARNED_NONE);
            df_likelihood_desc d = df_likelihood_defaults();
            // large enough that not all fits into the first block of step memory
            enum { N = 900 };
            static df_real x[N * DIM];
            static double out[N];
            df_result r;
            d.walk.method = "heun", d.walk.steps = 2;
            c.fail_at = c.calls + fail;
            r = what == 0   ? df_variational_bound(small, &m, NULL, x, N, out)
                : what == 1 ? df_log_likelihood(small, &m, &d, x, N, out)
                            : df_sample_likelihood(small, &m, &d, x, N, out);
            done = r == DF_OK;
            check(done || r == DF_ERR_MEMORY, "allocation %ld: %s", fail, df_ctx_message(small));
            if (done) check(fail > 2, "only %ld allocations", fail - 1);
            c.fail_at = 0;
            df_ctx_clear(small);
            r = what == 0 ? df_variational_bound(small, &m, NULL, x, N, out)
                          : df_log_likelihood(small, &m, &d, x, N, out);
            check(r == DF_OK, "afterwards: %s", df_ctx_message(small));
            df_ctx_free(small);
            expect(c.live == 0);
        }
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    ctx = new_ctx(2, NULL);
    gmm = three();
    RUN(exact_trace_on_every_process_and_prediction);
    RUN(from_pure_noise);
    RUN(prior_mismatch_apart);
    RUN(probes_on_gaussian_data);
    RUN(probes_on_the_mixture);
    RUN(own_model_with_and_without_jvp);
    RUN(scaling);
    RUN(batches_do_not_show);
    RUN(along_sampling);
    RUN(any_ode_method_with_its_order);
    RUN(bits_per_dimension);
    RUN(dequantisation);
    RUN(bound_term_by_term);
    RUN(continuous_integral_by_its_draws);
    RUN(bound_of_scaled_data);
    RUN(far_levels_on_both_sides);
    RUN(bound_on_average);
    RUN(bound_with_many_steps_is_the_continuous_one);
    RUN(kl_falls_by_the_fisher_divergence);
    RUN(wrong_arguments);
    RUN(nan_from_the_model);
    RUN(analytic_variance_is_the_better_bound);
    RUN(every_allocation_failing);
    df_mixture_free(gmm);
    df_ctx_free(ctx);
    return test_end();
}
