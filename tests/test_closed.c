// Closed forms: Gaussian mixtures against quadrature, finite differences and a plain evaluation
// of the formulas; distances between samples against double loops and Gaussian closed forms.
#include "diffusion.h"
#include "test.h"

enum { SHARP = sizeof(df_real) == 8 };  // finite differences need the double build
static const double TOL = SHARP ? 1e-12 : 2e-5;

static df_ctx *context(int threads) {
    df_ctx_desc desc = df_ctx_defaults();
    desc.threads = threads;
    return df_ctx_create(&desc);
}

static df_point point(double alpha, double sigma) {
    df_point p = df_point_data();
    p.t = .5;
    p.alpha = alpha;
    p.sigma = sigma;
    p.lambda = log(alpha / sigma);
    return p;
}

// ---- mixtures, and the formulas of their diffusion written as plainly as possible ----

enum { MAX_K = 3, MAX_DIM = 16 };
typedef struct Gm {
    int K, dim;
    double w[MAX_K], mean[MAX_K * MAX_DIM], S[MAX_K * MAX_DIM * MAX_DIM];
} Gm;

static Gm gm2(void) {
    static const double w[3] = {.3, .5, .2}, mean[6] = {2, 0, -1, 1.5, 0, -2};
    static const double S[12] = {.3, .1, .1, .2, .2, -.05, -.05, .4, .1, 0, 0, .1};
    Gm g;
    memset(&g, 0, sizeof g);
    g.K = 3, g.dim = 2;
    memcpy(g.w, w, sizeof w), memcpy(g.mean, mean, sizeof mean), memcpy(g.S, S, sizeof S);
    return g;
}

static Gm gm16(void) {
    Gm g;
    memset(&g, 0, sizeof g);
    g.K = 2, g.dim = 16, g.w[0] = .6, g.w[1] = .4;
    for (int k = 0; k < 16; k++) {
        g.mean[k] = .25 * (k % 2 ? -1 : 1) * (1 + k / 16.0);
        g.mean[16 + k] = -.5 + k / 16.0;
        g.S[k * 17] = .09, g.S[256 + k * 17] = .25;
    }
    return g;
}

// K components in dim dimensions, each covariance a sum of `rank` outer products.
static Gm gm_random(int K, int dim, int rank, uint64_t seed) {
    Gm g;
    memset(&g, 0, sizeof g);
    g.K = K, g.dim = dim;
    for (int k = 0; k < K; k++) {
        df_real z[MAX_DIM];
        g.w[k] = 1.0 + k;
        df_random_normal(seed, (uint64_t)k, 0, (size_t)dim, z);
        for (int i = 0; i < dim; i++) g.mean[k * dim + i] = z[i];
        for (int r = 0; r < rank; r++) {
            df_random_normal(seed, (uint64_t)k, 1 + (uint32_t)r, (size_t)dim, z);
            for (int i = 0; i < dim; i++)
                for (int j = 0; j < dim; j++)
                    g.S[(k * dim + i) * dim + j] += (double)z[i] * (double)z[j] / rank;
        }
    }
    return g;
}

static df_mixture *mixture(df_ctx *ctx, const Gm *g) {
    df_mixture *m = df_mixture_create(ctx, g->K, g->dim, g->w, g->mean, g->S);
    check(m != NULL, "no mixture: %s", df_ctx_message(ctx));
    if (m == NULL) exit(1);
    return m;
}

// Solves A z = b by elimination with pivoting; returns log |det A|.
static double solve(int n, const double *A, const double *b, double *z) {
    double M[MAX_DIM * (MAX_DIM + 1)], log_det = 0;
    int w = n + 1;
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++) M[i * w + j] = A[i * n + j];
        M[i * w + n] = b[i];
    }
    for (int c = 0; c < n; c++) {
        int p = c;
        for (int i = c; i < n; i++) if (fabs(M[i * w + c]) > fabs(M[p * w + c])) p = i;
        for (int j = 0; j < w; j++) {
            double t = M[c * w + j];
            M[c * w + j] = M[p * w + j], M[p * w + j] = t;
        }
        log_det += log(fabs(M[c * w + c]));
        for (int i = 0; i < n; i++) {
            double f = i == c ? 0 : M[i * w + c] / M[c * w + c];
            for (int j = c; j < w; j++) M[i * w + j] -= f * M[c * w + j];
        }
    }
    for (int i = 0; i < n; i++) z[i] = M[i * w + n] / M[i * w + i];
    return log_det;
}

typedef struct Plain {
    double log_p, x0[MAX_DIM], score[MAX_DIM], hessian[MAX_DIM * MAX_DIM];
} Plain;

// The golden models' formula: r_k ~ w_k N(x; alpha m_k, S_k), sum r_k (m_k + alpha C_k S_k^-1 ..),
// and score and Hessian of log p from d_k = C_k^-1 (x - M_k).
static Plain plain(const Gm *g, df_point at, const df_real *x) {
    Plain out;
    int d = g->dim;
    double r[MAX_K], u[MAX_K * MAX_DIM], inv[MAX_K * MAX_DIM * MAX_DIM],
        sum = 0, total = 0, top = -1e300;
    memset(&out, 0, sizeof out);
    for (int k = 0; k < g->K; k++) total += g->w[k];
    for (int k = 0; k < g->K; k++) {
        double C[MAX_DIM * MAX_DIM], gap[MAX_DIM], q = 0, log_det = 0;
        for (int i = 0; i < d * d; i++)
            C[i] = at.alpha * at.alpha * g->S[k * d * d + i] +
                   (i % (d + 1) ? 0 : at.sigma * at.sigma);
        for (int i = 0; i < d; i++) gap[i] = (double)x[i] - at.alpha * g->mean[k * d + i];
        log_det = solve(d, C, gap, u + k * d);
        for (int c = 0; c < d; c++) {
            double e[MAX_DIM] = {0};
            e[c] = 1;
            solve(d, C, e, inv + (k * d + c) * d);
        }
        for (int i = 0; i < d; i++) q += gap[i] * u[k * d + i];
        r[k] = log(g->w[k] / total) -
               .5 * (q + log_det + d * log(2 * 3.14159265358979323846));
        if (r[k] > top) top = r[k];
    }
    for (int k = 0; k < g->K; k++) sum += exp(r[k] - top);
    out.log_p = top + log(sum);
    for (int k = 0; k < g->K; k++) {
        r[k] = exp(r[k] - out.log_p);
        for (int i = 0; i < d; i++) {
            double Su = 0;
            for (int j = 0; j < d; j++) Su += g->S[(k * d + i) * d + j] * u[k * d + j];
            out.score[i] -= r[k] * u[k * d + i];
            out.x0[i] += r[k] * (g->mean[k * d + i] + at.alpha * Su);
            for (int j = 0; j < d; j++)
                out.hessian[i * d + j] +=
                    r[k] * (u[k * d + i] * u[k * d + j] - inv[(k * d + i) * d + j]);
        }
    }
    for (int i = 0; i < d; i++)
        for (int j = 0; j < d; j++) out.hessian[i * d + j] -= out.score[i] * out.score[j];
    return out;
}

static const double PLACES[][2] = {{1, .02},  {1, .3}, {.9, .4}, {.5, .9},
                                   {.1, .99}, {1, 8},  {.3, .7}};
enum { PLACE_COUNT = sizeof PLACES / sizeof PLACES[0] };

// ---- mixtures ----

TEST(density_integrates_to_one) { // the trapezoidal rule is exact to rounding on Gaussians
    df_ctx *ctx = context(1);
    Gm g = gm2();
    df_mixture *m = mixture(ctx, &g);
    enum { N = 257 };
    df_real *x = (df_real *)malloc(N * N * 2 * sizeof(df_real));
    double *log_p = (double *)malloc(N * N * sizeof(double)), h = 1.0 / 16;
    df_point at = point(.8, .5);
    double sum = 0, mean = 0;
    for (int i = 0; i < N * N; i++) {
        x[2 * i] = (df_real)((i % N - N / 2) * h);
        x[2 * i + 1] = (df_real)((i / N - N / 2) * h);
    }
    expect(df_mixture_log_density(ctx, m, &at, N * N, x, log_p) == DF_OK);
    for (int i = 0; i < N * N; i++) {
        sum += exp(log_p[i]) * h * h;
        mean += exp(log_p[i]) * h * h * (double)x[2 * i];
    }
    near(sum, 1, 1e-12);
    near(mean, .8 * (.3 * 2 - .5), 1e-12);
    free(x), free(log_p), df_mixture_free(m), df_ctx_free(ctx);
}

static void against_plain(Gm g, uint64_t seed) {
    df_ctx *ctx = context(1);
    df_mixture *m = mixture(ctx, &g);
    enum { N = 20 };
    int d = g.dim;
    df_real x[N * MAX_DIM], mean[N * MAX_DIM], score[N * MAX_DIM];
    df_real *cov = (df_real *)malloc((size_t)(N * d * d) * sizeof(df_real));
    double log_p[N];
    for (int p = 0; p < PLACE_COUNT; p++) {
        df_point at = point(PLACES[p][0], PLACES[p][1]);
        double s2 = at.sigma * at.sigma, c = s2 / (at.alpha * at.alpha);
        expect(df_mixture_sample(ctx, m, &at, seed, 0, N, x) == DF_OK);
        for (int i = 0; i < d; i++) x[i] *= 4;     // one row far out
        expect(df_mixture_log_density(ctx, m, &at, N, x, log_p) == DF_OK);
        expect(df_mixture_score(ctx, m, &at, N, x, score) == DF_OK);
        expect(df_mixture_posterior(ctx, m, &at, N, x, mean, cov) == DF_OK);
        for (int n = 0; n < N; n++) {
            Plain want = plain(&g, at, x + n * d);
            double C[MAX_DIM * MAX_DIM], tweedie[MAX_DIM], far = 1;
            // errors of a plain inverse grow with the condition of C_k, at most 1/sigma^2 here
            double tol = TOL * fmax(1, .01 / s2);
            near(log_p[n], want.log_p, 1e-11 * fmax(1, .01 / s2));
            near_all(score + n * d, want.score, d, tol);
            near_all(mean + n * d, want.x0, d, tol);
            // Tweedie: E[x_0|x] = (x + sigma^2 s)/alpha; Cov = sigma^2/alpha^2 (I + sigma^2 H)
            for (int i = 0; i < d; i++)
                tweedie[i] =
                    ((double)x[n * d + i] + s2 * (double)score[n * d + i]) / at.alpha;
            near_all(mean + n * d, tweedie, d, TOL * fmax(1, 10 * at.sigma / at.alpha));
            for (int i = 0; i < d * d; i++)
                C[i] = c * ((i % (d + 1) ? 0 : 1) + s2 * want.hessian[i]);
            // 1 + sigma^2 H cancels terms as large as |x|^2/sigma^2
            for (int i = 0; i < d; i++)
                far += (double)x[n * d + i] * (double)x[n * d + i] / s2;
            near_all(cov + n * d * d, C, d * d, TOL * fmax(1, c * far));
        }
    }
    free(cov), df_mixture_free(m), df_ctx_free(ctx);
}

TEST(gm2_against_plain_formulas) { against_plain(gm2(), 1); }
TEST(gm16_against_plain_formulas) { against_plain(gm16(), 2); }
TEST(full_covariances_against_plain_formulas) { against_plain(gm_random(3, 7, 9, 5), 3); }
TEST(rank_deficient_against_plain_formulas) { against_plain(gm_random(2, 6, 3, 6), 4); }
TEST(one_component_against_plain_formulas) { against_plain(gm_random(1, 1, 1, 7), 5); }

TEST(score_is_the_gradient) {
    if (!SHARP) { expect(1); return; }
    df_ctx *ctx = context(1);
    Gm g = gm_random(3, 4, 6, 11);
    df_mixture *m = mixture(ctx, &g);
    for (int p = 1; p < PLACE_COUNT; p++) {
        df_point at = point(PLACES[p][0], PLACES[p][1]);
        df_real x[4], y[16], s[4];
        double l[4], h = 1e-3, fd[4];
        df_mixture_sample(ctx, m, &at, 3, (uint64_t)p, 1, x);
        for (int i = 0; i < 4; i++) {
            static const double step[4] = {-2, -1, 1, 2};
            for (int k = 0; k < 4; k++) {
                memcpy(y + 4 * k, x, sizeof x);
                y[4 * k + i] += (df_real)(step[k] * h);
            }
            df_mixture_log_density(ctx, m, &at, 4, y, l);
            fd[i] = ((l[0] - l[3]) + 8 * (l[2] - l[1])) / (12 * h);
        }
        df_mixture_score(ctx, m, &at, 1, x, s);
        near_all(s, fd, 4, 1e-8);
    }
    df_mixture_free(m), df_ctx_free(ctx);
}

// E[x_0|x] and Cov[x_0|x] from Bayes' rule alone: weights p_0(x_0) N(x; alpha x_0, sigma^2).
TEST(posterior_by_quadrature) {
    df_ctx *ctx = context(1);
    Gm g = gm2();
    df_mixture *m = mixture(ctx, &g);
    enum { N = 257 };
    static const double xs[4][2] = {{.5, .25}, {-1, 1}, {0, 0}, {2, -1.5}};
    df_real *x0 = (df_real *)malloc(N * N * 2 * sizeof(df_real));
    double *log_p = (double *)malloc(N * N * sizeof(double)), h = 1.0 / 16;
    df_point data = df_point_data();
    for (int i = 0; i < N * N; i++) {
        x0[2 * i] = (df_real)((i % N - N / 2) * h);
        x0[2 * i + 1] = (df_real)((i / N - N / 2) * h);
    }
    expect(df_mixture_log_density(ctx, m, &data, N * N, x0, log_p) == DF_OK);
    for (int p = 1; p < 5; p++)
        for (int q = 0; q < 4; q++) {
            df_point at = point(PLACES[p][0], PLACES[p][1]);
            df_real x[2] = {(df_real)xs[q][0], (df_real)xs[q][1]}, mean[2], cov[4];
            double w = 0, a = 0, b = 0, aa = 0, ab = 0, bb = 0;
            for (int i = 0; i < N * N; i++) {
                double u = x0[2 * i], v = x0[2 * i + 1];
                double e = xs[q][0] - at.alpha * u, f = xs[q][1] - at.alpha * v;
                double c = exp(log_p[i] - .5 * (e * e + f * f) / (at.sigma * at.sigma));
                w += c, a += c * u, b += c * v, aa += c * u * u, ab += c * u * v,
                    bb += c * v * v;
            }
            double want[2] = {a / w, b / w};
            double C[4] = {aa / w - a * a / w / w, ab / w - a * b / w / w, 0,
                           bb / w - b * b / w / w};
            C[2] = C[1];
            expect(df_mixture_posterior(ctx, m, &at, 1, x, mean, cov) == DF_OK);
            near_all(mean, want, 2, SHARP ? 1e-10 : 1e-6);
            near_all(cov, C, 4, SHARP ? 1e-10 : 1e-6);
        }
    free(x0), free(log_p), df_mixture_free(m), df_ctx_free(ctx);
}

TEST(no_division_at_the_ends) {
    df_ctx *ctx = context(1);
    Gm g = gm2();
    df_mixture *m = mixture(ctx, &g);
    df_point noise = point(0, 1.5), data = df_point_data();
    df_real x[4] = {(df_real).5, (df_real)-2, (df_real)1.25, (df_real)0}, mean[4], cov[8],
            s[4];
    // alpha = 0: x says nothing, the posterior is the prior
    double want[2] = {0, 0}, C[4] = {0, 0, 0, 0}, zero[8] = {0};
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < 2; i++) {
            want[i] += g.w[k] * g.mean[2 * k + i];
            for (int j = 0; j < 2; j++)
                C[2 * i + j] += g.w[k] * (g.S[4 * k + 2 * i + j] +
                                          g.mean[2 * k + i] * g.mean[2 * k + j]);
        }
    for (int i = 0; i < 4; i++) C[i] -= want[i / 2] * want[i % 2];
    expect(df_mixture_posterior(ctx, m, &noise, 2, x, mean, cov) == DF_OK);
    near_all(mean, want, 2, TOL);
    near_all(mean + 2, want, 2, TOL);
    near_all(cov, C, 4, TOL);
    near_all(cov + 4, C, 4, TOL);
    expect(df_mixture_score(ctx, m, &noise, 2, x, s) == DF_OK);
    for (int i = 0; i < 4; i++) near(s[i], -(double)x[i] / 2.25, TOL);
    // sigma = 0: x is the data
    expect(df_mixture_posterior(ctx, m, &data, 2, x, mean, cov) == DF_OK);
    near_all(mean, x, 4, TOL);
    near_all(cov, zero, 8, TOL);
    expect(df_mixture_score(ctx, m, &data, 1, x, s) == DF_OK);
    near_all(s, plain(&g, data, x).score, 2, TOL);
    df_mixture_free(m), df_ctx_free(ctx);
}

TEST(singular_covariances) {
    df_ctx *ctx = context(1);
    // one direction only: E[x_0|x] = mu + u (alpha u.(x - M))/(alpha^2 |u|^2 + sigma^2)
    const double w = 1, u[3] = {1, -2, .5}, mu[3] = {.5, 0, 1}, alpha = .8, sigma = 1e-3;
    double S[9], dot = 0, uu = 0;
    df_real x[3] = {(df_real).7, (df_real)-1, (df_real).3}, mean[3], s[3];
    df_point at = point(alpha, sigma), data = df_point_data();
    for (int i = 0; i < 9; i++) S[i] = u[i / 3] * u[i % 3];
    for (int i = 0; i < 3; i++)
        dot += u[i] * ((double)x[i] - alpha * mu[i]), uu += u[i] * u[i];
    df_mixture *m = df_mixture_create(ctx, 1, 3, &w, mu, S);
    expect(df_mixture_posterior(ctx, m, &at, 1, x, mean, NULL) == DF_OK);
    for (int i = 0; i < 3; i++)
        near(mean[i], mu[i] + u[i] * alpha * dot / (alpha * alpha * uu + sigma * sigma),
             TOL);
    // rounding in the eigenvalues must not pass for a density: at sigma = 0 there is none
    expect(df_mixture_score(ctx, m, &data, 1, x, s) == DF_ERR_SINGULAR);
    expect(strstr(df_ctx_message(ctx), "component 0") != NULL);
    df_mixture *m2;
    for (uint64_t seed = 0; seed < 20; seed++) {
        Gm g = gm_random(1, 4 + (int)seed % 5, 3 + (int)seed % 5, 100 + seed);
        df_real z[MAX_DIM] = {0}, out[MAX_DIM];
        m2 = mixture(ctx, &g);
        expect(df_mixture_score(ctx, m2, &data, 1, z, out) == DF_ERR_SINGULAR);
        df_mixture_free(m2);
    }
    // samples of the data stay on the line
    df_real y[30];
    expect(df_mixture_sample(ctx, m, &data, 0, 0, 10, y) == DF_OK);
    for (int i = 0; i < 10; i++) {
        double along = ((double)y[3 * i] - mu[0]) / u[0];
        for (int j = 0; j < 3; j++) near(y[3 * i + j], mu[j] + along * u[j], TOL);
    }
    df_mixture_free(m);
    // two points at +-1: E[x_0|x] = tanh(alpha x/sigma^2), Cov = 1 - tanh^2
    const double half[2] = {1, 1}, ends[2] = {-1, 1}, none[2] = {0, 0};
    df_real cov[1];
    m = df_mixture_create(ctx, 2, 1, half, ends, none);
    at = point(.6, .8);
    expect(df_mixture_posterior(ctx, m, &at, 1, x, mean, cov) == DF_OK);
    double th = tanh(.6 * (double)x[0] / .64);
    near(mean[0], th, TOL);
    near(cov[0], 1 - th * th, TOL);
    df_mixture_free(m), df_ctx_free(ctx);
}

// At alpha = 0 the posterior covariance of one component is S itself, put together again from
// its eigenvectors; tiny variances of a diagonal S are kept whatever the largest is.
TEST(eigenvectors_give_the_covariance_back) {
    df_ctx *ctx = context(1);
    for (int rank = 1; rank <= 20; rank += 6) {
        Gm g = gm_random(1, 16, rank, 40 + (uint64_t)rank);
        df_mixture *m = mixture(ctx, &g);
        df_point at = point(0, 1);
        df_real x[16] = {0}, mean[16], cov[256];
        expect(df_mixture_posterior(ctx, m, &at, 1, x, mean, cov) == DF_OK);
        near_all(cov, g.S, 256, SHARP ? 1e-14 : 1e-6);
        df_mixture_free(m);
    }
    const double w = 1, mean[2] = {0, 0}, S[4] = {1, 0, 0, 1e-24};
    df_point data = df_point_data();
    df_real x[2] = {1, (df_real)1e-12}, s[2];
    df_mixture *m = df_mixture_create(ctx, 1, 2, &w, mean, S);
    expect(df_mixture_score(ctx, m, &data, 1, x, s) == DF_OK);
    near_rel(s[0], -1, 1e-6);
    near_rel(s[1], -1e12, 1e-6);
    df_mixture_free(m), df_ctx_free(ctx);
}

TEST(far_away_nothing_underflows) {
    df_ctx *ctx = context(1);
    Gm g = gm2();
    df_mixture *m = mixture(ctx, &g);
    df_point at = point(1, .01);
    df_real x[2] = {(df_real)1e4, (df_real)1e4}, s[2];
    double l;
    expect(df_mixture_log_density(ctx, m, &at, 1, x, &l) == DF_OK);
    near_rel(l, plain(&g, at, x).log_p, 1e-12);
    expect(df_mixture_score(ctx, m, &at, 1, x, s) == DF_OK);
    near_all(s, plain(&g, at, x).score, 2, TOL);
    if (SHARP) {  // 1e200 squared is no number
        x[0] = (df_real)1e100 * (df_real)1e100;
        expect(df_mixture_score(ctx, m, &at, 1, x, s) == DF_ERR_NONFINITE);
        expect(df_mixture_log_density(ctx, m, &at, 1, x, &l) == DF_ERR_NONFINITE);
        expect(strstr(df_ctx_message(ctx), "row (or direction) 0 lies so far out") != NULL);
    }
    df_mixture_free(m), df_ctx_free(ctx);
}

// ---- samples ----

TEST(sample_moments) {  // 6 standard errors, 15 checks: false alarms below 1e-7
    df_ctx *ctx = context(2);
    Gm g = gm2();
    df_mixture *m = mixture(ctx, &g);
    enum { N = 100000 };
    df_real *x = (df_real *)malloc(N * 2 * sizeof(df_real));
    static const double at_[3][2] = {{1, 0}, {.6, .8}, {0, 3}};
    for (int p = 0; p < 3; p++) {
        df_point at = point(at_[p][0], at_[p][1]);
        expect(df_mixture_sample(ctx, m, &at, 77, 0, N, x) == DF_OK);
        for (int f = 0; f < 5; f++) {  // E x, E y, E xx, E xy, E yy
            double want = 0, sum = 0, sq = 0;
            for (int k = 0; k < 3; k++) {
                const double *S = g.S + 4 * k;
                double M[2], C[4];
                for (int i = 0; i < 2; i++) M[i] = at.alpha * g.mean[2 * k + i];
                for (int i = 0; i < 4; i++)
                    C[i] = at.alpha * at.alpha * S[i] + (i % 3 ? 0 : at.sigma * at.sigma);
                want += g.w[k] * (f < 2 ? M[f] : f == 2 ? C[0] + M[0] * M[0] : f == 3 ?
                                  C[1] + M[0] * M[1] : C[3] + M[1] * M[1]);
            }
            for (int i = 0; i < N; i++) {
                double a = x[2 * i], b = x[2 * i + 1];
                double v = f == 0   ? a
                           : f == 1 ? b
                           : f == 2 ? a * a
                           : f == 3 ? a * b
                                    : b * b;
                sum += v, sq += v * v;
            }
            double mean = sum / N, se = sqrt((sq / N - mean * mean) / N);
            check(fabs(mean - want) < 6 * se,
                  "moment %d at (%g, %g): %g, want %g, error %.2f se", f, at.alpha,
                  at.sigma, mean, want, (mean - want) / se);
        }
    }
    free(x), df_mixture_free(m), df_ctx_free(ctx);
}

TEST(ring_of_eight) {
    df_ctx *ctx = context(1);
    df_mixture *m = df_mixture_ring(ctx, 8, 2 * sqrt(2.0), sqrt(.125));
    enum { N = 40000 };
    df_real *x = (df_real *)malloc(N * 2 * sizeof(df_real));
    df_point data = df_point_data();
    int count[8] = {0};
    double r2 = 0, r4 = 0, log_p;
    expect(df_mixture_sample(ctx, m, &data, 5, 0, N, x) == DF_OK);
    for (int i = 0; i < N; i++) {
        double a = x[2 * i], b = x[2 * i + 1],
               angle = atan2(b, a) / 0.785398163397448309616;
        count[(int)floor(angle + 8.5) % 8]++;
        r2 += (a * a + b * b) / N, r4 += (a * a + b * b) * (a * a + b * b) / N;
    }
    for (int k = 0; k < 8; k++)  // each is N/8 within 6 deviations; symmetric leaks cancel
        check(abs(count[k] - N / 8) < 6 * sqrt(N * 7 / 64.0), "component %d: %d of %d", k,
              count[k], N);
    check(fabs(r2 - 8.25) < 6 * sqrt((r4 - r2 * r2) / N), "E r^2 = %g, want 8.25", r2);
    // far components are 6 deviations off or more: the density at a centre is 1/8 of one's
    df_real centre[2] = {0, (df_real)(2 * sqrt(2.0))};
    df_mixture_log_density(ctx, m, &data, 1, centre, &log_p);
    near(log_p, -log(8 * 2 * 3.14159265358979323846 * .125), 1e-6);
    expect(df_mixture_ring(ctx, 0, 1, 1) == NULL);
    expect(df_mixture_ring(ctx, 3, 1, (double)NAN) == NULL);
    free(x), df_mixture_free(m), df_ctx_free(ctx);
}

// ---- the model ----

static int ask(df_ctx *ctx, const df_model *model, df_ask what, const df_point *at, int n,
               int dim, const df_real *x, const df_real *v, df_real *out) {
    df_query q;
    double t[64], alpha[64], sigma[64];
    memset(&q, 0, sizeof q);
    for (int i = 0; i < n; i++) t[i] = at->t, alpha[i] = at->alpha, sigma[i] = at->sigma;
    q.ask = what, q.n = n, q.dim = dim, q.x = x, q.v = v, q.t = t, q.alpha = alpha,
    q.sigma = sigma;
    q.same_time = 1, q.samples = n, q.step = -1;
    return model->predict(model->self, ctx, &q, out);
}

// Every prediction at many points: a E[x_0|x] + b E[eps|x] with the row of the plane.
TEST(model_answers_every_prediction) {
    df_ctx *ctx = context(1);
    Gm g = gm_random(3, 4, 6, 21);
    df_mixture_view view = {mixture(ctx, &g), df_process_vp(.1, 20), DF_EPS};
    df_process paths[4] = {df_process_vp(.1, 20), df_process_flow(), df_process_edm(80),
                           df_process_trig(.5)};
    static const double ts[] = {.01, .2, .5, .9, .99};
    for (int p = 0; p < 4; p++)
        for (int k = 0; k < DF_PREDICTION_COUNT; k++)
            for (int i = 0; i < 5; i++) {
                view.process = paths[p], view.prediction = (df_prediction)k;
                df_model model = df_mixture_model(&view);
                df_point at = df_process_at(&paths[p], ts[i]);
                df_real x[4], got[4], log_p;
                double row[2], want[4];
                expect(model.dim == 4 && model.prediction == (df_prediction)k);
                df_mixture_sample(ctx, view.mixture, &at, 9, (uint64_t)i, 1, x);
                expect(ask(ctx, &model, DF_ASK_PREDICT, &at, 1, 4, x, NULL, got) == DF_OK);
                expect(df_plane_row(ctx, &paths[p], (df_prediction)k, &at, row) == DF_OK);
                Plain ref = plain(&g, at, x);
                for (int j = 0; j < 4; j++)
                    want[j] = row[0] * ref.x0[j] - row[1] * at.sigma * ref.score[j];
                near_all(got, want, 4, 100 * TOL);
                expect(ask(ctx, &model, DF_ASK_LOG_DENSITY, &at, 1, 4, x, NULL, &log_p) ==
                       DF_OK);
                near(log_p, ref.log_p, SHARP ? 1e-10 : 1e-5);
            }
    df_mixture_free((df_mixture *)view.mixture), df_ctx_free(ctx);
}

TEST(model_at_the_ends) {
    df_ctx *ctx = context(1);
    Gm g = gm2();
    df_mixture_view view = {mixture(ctx, &g), df_process_flow(), DF_EPS};
    df_model model = df_mixture_model(&view);
    df_real x[2] = {(df_real).5, (df_real)-1}, out[2];
    df_point data = df_process_at(&view.process, 0),
             noise = df_process_at(&view.process, 1);
    expect(ask(ctx, &model, DF_ASK_PREDICT, &data, 1, 2, x, NULL, out) == DF_OK);
    near(out[0], 0, 1e-15), near(out[1], 0, 1e-15); // E[eps|x] is 0 where x is x_0
    expect(ask(ctx, &model, DF_ASK_PREDICT, &noise, 1, 2, x, NULL, out) == DF_OK);
    near_all(out, x, 2, TOL);                                // and x where x is noise
    view.prediction = DF_VELOCITY;
    expect(ask(ctx, &model, DF_ASK_PREDICT, &noise, 1, 2, x, NULL, out) == DF_OK);
    near(out[0], .5 - .1, TOL), near(out[1], -1 - .35, TOL); // eps - E x_0
    view.prediction = DF_SCORE; // whose row is infinite at sigma = 0
    expect(ask(ctx, &model, DF_ASK_PREDICT, &data, 1, 2, x, NULL, out) == DF_OK);
    near_all(out, plain(&g, data, x).score, 2, TOL);
    expect(ask(ctx, &model, DF_ASK_PREDICT, &data, 1, 3, x, NULL, out) == DF_ERR_ARGUMENT);
    expect(ask(ctx, &model, DF_ASK_JVP, &data, 1, 2, x, NULL, out) == DF_ERR_ARGUMENT);
    expect(df_mixture_model(NULL).predict == NULL);
    df_mixture_free((df_mixture *)view.mixture), df_ctx_free(ctx);
}

// The whole Jacobian by differences of the prediction; JVP is J v, VJP is J^T v.
TEST(jvp_and_vjp) {
    if (!SHARP) { expect(1); return; }
    df_ctx *ctx = context(1);
    enum { D = 4 };
    Gm mixtures[2];
    mixtures[0] = gm_random(3, D, 6, 31), mixtures[1] = gm_random(3, D, 2, 32);
    for (int c = 0; c < 2; c++)
        for (int k = 0; k < DF_PREDICTION_COUNT; k++)
            for (int i = 0; i < 4; i++) {
                static const double ts[] = {.05, .4, .8, .999};
                df_mixture_view view = {mixture(ctx, &mixtures[c]), df_process_flow(),
                                        (df_prediction)k};
                df_model model = df_mixture_model(&view);
                df_point at = df_process_at(&view.process, ts[i]);
                df_real x[D], v[D], y[4 * D], f[4 * D], jv[D], vj[D];
                double J[D * D], want[D], tnaw[D], h = 1e-3 * at.sigma, scale = 1;
                static const double step[4] = {-2, -1, 1, 2};
                df_mixture_sample(ctx, view.mixture, &at, 19, (uint64_t)i, 1, x);
                df_random_normal(20, (uint64_t)i, 0, D, v);
                for (int j = 0; j < D; j++) {
                    for (int s = 0; s < 4; s++) {
                        memcpy(y + D * s, x, sizeof x);
                        y[D * s + j] += (df_real)(step[s] * h);
                    }
                    expect(ask(ctx, &model, DF_ASK_PREDICT, &at, 4, D, y, NULL, f) ==
                           DF_OK);
                    for (int r = 0; r < D; r++) {
                        J[r * D + j] = (double)((f[r] - f[3 * D + r]) +
                                                8 * (f[2 * D + r] - f[D + r])) /
                                       (12 * h);
                        scale = fmax(scale, fabs(J[r * D + j]));
                    }
                }
                for (int r = 0; r < D; r++) {
                    want[r] = tnaw[r] = 0;
                    for (int j = 0; j < D; j++) {
                        want[r] += J[r * D + j] * (double)v[j];
                        tnaw[r] += J[j * D + r] * (double)v[j];
                    }
                }
                expect(ask(ctx, &model, DF_ASK_JVP, &at, 1, D, x, v, jv) == DF_OK);
                expect(ask(ctx, &model, DF_ASK_VJP, &at, 1, D, x, v, vj) == DF_OK);
                for (int r = 0; r < D; r++) {
                    near_abs(jv[r], want[r], 1e-8 * scale);
                    near_abs(vj[r], tnaw[r], 1e-8 * scale);
                }
                df_mixture_free((df_mixture *)view.mixture);
            }
    df_ctx_free(ctx);
}

// The Jacobian of E[x_0|x] is alpha/sigma^2 Cov[x_0|x], down to sigma = 0 where it is I/alpha.
TEST(jacobian_is_the_covariance) {
    df_ctx *ctx = context(1);
    Gm g = gm2();
    df_mixture_view view = {mixture(ctx, &g), df_process_vp(.1, 20), DF_X0};
    df_model model = df_mixture_model(&view);
    df_real x[2] = {(df_real).3, (df_real).4}, v[2] = {1, -2}, jv[2], mean[2], C[4];
    static const double at_[][2] = {{1, .05}, {.7, .7}, {.01, 1}, {0, 1}, {.5, 0}};
    for (int i = 0; i < 5; i++) {
        df_point at = point(at_[i][0], at_[i][1]);
        double want[2] = {2, -4};
        expect(df_mixture_posterior(ctx, view.mixture, &at, 1, x, mean, C) == DF_OK);
        expect(ask(ctx, &model, DF_ASK_JVP, &at, 1, 2, x, v, jv) == DF_OK);
        for (int r = 0; r < 2 && at.sigma > 0; r++)
            want[r] =
                at.alpha / (at.sigma * at.sigma) * (double)(C[2 * r] - 2 * C[2 * r + 1]);
        near_all(jv, want, 2, SHARP ? 1e-11 : 1e-3);
    }
    df_mixture_free((df_mixture *)view.mixture), df_ctx_free(ctx);
}

// ---- the same bits for any number of threads, any split, any neighbours ----

TEST(threads_and_splits) {
    enum { N = 203, D = 6 };
    df_ctx *one = context(1), *many = context(5);
    Gm g = gm_random(3, D, 8, 51);
    df_mixture *m = mixture(one, &g);
    df_point at = point(.7, .6);
    df_real a[N * D], b[N * D], x[N * D], ca[N * D * D], cb[N * D * D];
    double la[N], lb[N], da, db;
    expect(df_mixture_sample(one, m, &at, 3, 0, N, x) == DF_OK);
    expect(df_mixture_sample(many, m, &at, 3, 0, N, b) == DF_OK);
    same_bits(x, b, sizeof x);
    expect(df_mixture_sample(one, m, &at, 3, 100, 7, b) == DF_OK);
    same_bits(x + 100 * D, b, 7 * D * sizeof(df_real));
    df_mixture_posterior(one, m, &at, N, x, a, ca),
        df_mixture_posterior(many, m, &at, N, x, b, cb);
    same_bits(a, b, sizeof a), same_bits(ca, cb, sizeof ca);
    df_mixture_log_density(one, m, &at, N, x, la),
        df_mixture_log_density(many, m, &at, N, x, lb);
    same_bits(la, lb, sizeof la);
    df_mixture_score(one, m, &at, N, x, a);
    for (int i = 0; i < N; i += 29)
        df_mixture_score(many, m, &at, N - i < 29 ? N - i : 29, x + i * D, b + i * D);
    same_bits(a, b, sizeof a);
    for (int d = 0; d < 3; d++) {
        df_ctx *c[2] = {one, many};
        double *out[2] = {&da, &db};
        for (int k = 0; k < 2; k++)
            expect((d == 0 ? df_sliced_wasserstein(c[k], x, 150, a, N, D, 17, 4, out[k]) :
                    d == 1 ? df_energy_distance(c[k], x, 150, a, N, D, out[k]) :
                    df_mmd(c[k], x, 150, a, N, D, 1.5, out[k])) == DF_OK);
        same_bits(&da, &db, sizeof da);
    }
    df_mixture_free(m), df_ctx_free(one), df_ctx_free(many);
}

// Rows at points of their own, as a sampler that mixes times asks: each as if it were alone.
TEST(rows_at_different_points) {
    df_ctx *ctx = context(2);
    enum { N = 40 };
    Gm g = gm2();
    df_mixture_view view = {mixture(ctx, &g), df_process_flow(), DF_VELOCITY};
    df_model model = df_mixture_model(&view);
    df_query q;
    double t[N], alpha[N], sigma[N];
    df_real x[N * 2], out[N * 2], alone[2];
    memset(&q, 0, sizeof q);
    df_random_normal(1, 2, 3, N * 2, x);
    for (int i = 0; i < N; i++) {
        df_point at = df_process_at(&view.process, i % 3 ? (i + 1.0) / (N + 1) : .5);
        t[i] = at.t, alpha[i] = at.alpha, sigma[i] = at.sigma;
    }
    q.ask = DF_ASK_PREDICT, q.n = N, q.dim = 2, q.x = x, q.t = t, q.alpha = alpha,
    q.sigma = sigma;
    q.samples = N;
    expect(model.predict(model.self, ctx, &q, out) == DF_OK);
    for (int i = 0; i < N; i++) {
        df_point at = df_process_at(&view.process, t[i]);
        ask(ctx, &model, DF_ASK_PREDICT, &at, 1, 2, x + 2 * i, NULL, alone);
        same_bits(out + 2 * i, alone, sizeof alone);
    }
    // neighbours that share only alpha or only sigma (eps has the row (0, 1) anywhere)
    view.prediction = DF_EPS;
    model = df_mixture_model(&view);
    for (int i = 0; i < N; i++) alpha[i] = i & 1 ? .25 : .75, sigma[i] = i & 2 ? .5 : 1;
    expect(model.predict(model.self, ctx, &q, out) == DF_OK);
    for (int i = 0; i < N; i++) {
        df_point at = point(alpha[i], sigma[i]);
        Plain want = plain(&g, at, x + 2 * i);
        for (int j = 0; j < 2; j++) near(out[2 * i + j], -sigma[i] * want.score[j], TOL);
    }
    df_mixture_free((df_mixture *)view.mixture), df_ctx_free(ctx);
}

// ---- distances ----

static double sliced(df_ctx *ctx, const df_real *a, int na, const df_real *b, int nb,
                     int dim, int projections) {
    double out = -1;
    check(df_sliced_wasserstein(ctx, a, na, b, nb, dim, projections, 3, &out) == DF_OK,
          "%s", df_ctx_message(ctx));
    return out;
}

TEST(sliced_wasserstein_of_shifts) {
    df_ctx *ctx = context(2);
    enum { N = 100, D = 3 };
    df_real a[N * D], b[N * D], zero[D] = {0}, e[D];
    double sum = 0, one = 0;
    df_random_normal(1, 0, 0, N * D, a);
    // along a direction theta a shift by s moves all quantiles by s . theta; over the axes the
    // squares of the unit shifts add up to |theta|^2 = 1 for whatever directions were drawn
    for (int k = 0; k < D; k++) {
        for (int i = 0; i < N * D; i++) b[i] = a[i] + (df_real)(i % D == k);
        double moved = sliced(ctx, a, N, b, N, D, 50);
        sum += moved * moved;
        memset(e, 0, sizeof e), e[k] = 1;
        near(moved, sliced(ctx, zero, 1, e, 1, D, 50), TOL);
        if (k == 0) one = moved;
    }
    near(sum, 1, 1e-6);
    // and each is 1/dim in the mean: (theta . e)^2 has the variance 2 (d-1)/(d^2 (d+2))
    memset(e, 0, sizeof e), e[0] = 1;
    double many = sliced(ctx, zero, 1, e, 1, D, 20000);
    check(fabs(many * many - 1.0 / D) <
              6 * sqrt(2.0 * (D - 1) / (D * D * (D + 2)) / 20000),
          "%g", many * many);
    for (int i = 0; i < D; i++) e[i] = 0;
    e[0] = 8;
    near_rel(sliced(ctx, zero, 1, e, 1, D, 50), 8 * one, 1e-5);
    near(sliced(ctx, a, N, a, N, D, 50), 0, 1e-300);
    df_ctx_free(ctx);
}

static int by_value(const void *a, const void *b) {
    double x = *(const df_real *)a, y = *(const df_real *)b;
    return (x > y) - (x < y);
}

TEST(
    sliced_wasserstein_of_different_sizes) { // on a line: W_2 by a sum over na nb equal parts
    df_ctx *ctx = context(1);
    static const int sizes[][2] = {{1, 1},   {7, 5},  {5, 7},    {6, 4},
                                   {100, 1}, {3, 64}, {33, 129}, {200, 200}};
    df_real a[200], b[200];
    for (int s = 0; s < 8; s++) {
        int na = sizes[s][0], nb = sizes[s][1];
        double sum = 0, got;
        df_random_normal(2, (uint64_t)s, 0, (size_t)na, a);
        df_random_normal(2, (uint64_t)s, 1, (size_t)nb, b);
        for (int j = 0; j < nb; j++) b[j] = 2 * b[j] + 1;
        if (s == 7)
            for (int j = 0; j < nb; j++) b[j] = (df_real)floor((double)b[j]); // many ties
        got = sliced(ctx, a, na, b, nb, 1, 3);
        near(got, sliced(ctx, b, nb, a, na, 1, 3), 1e-12);
        qsort(a, (size_t)na, sizeof a[0], by_value),
            qsort(b, (size_t)nb, sizeof b[0], by_value);
        for (int u = 0; u < na * nb; u++) {
            double gap = (double)a[u / nb] - (double)b[u / na];
            sum += gap * gap / ((double)na * nb);
        }
        near(got, sqrt(sum), 1e-12);
        // order does not matter; each point twice is the same distribution
        df_real twice[400];
        for (int i = 0; i < na; i++) twice[2 * na - 1 - i] = twice[i] = a[i];
        near(sliced(ctx, twice, 2 * na, b, nb, 1, 3), got, 1e-12);
    }
    df_ctx_free(ctx);
}

TEST(pairs_against_a_double_loop) {
    df_ctx *ctx = context(2);
    static const int sizes[][3] = {{2, 2, 1},   {2, 3, 5},     {33, 64, 3},
                                   {65, 32, 2}, {131, 100, 3}, {64, 97, 20}};
    df_real a[131 * 20], b[131 * 20];
    for (int s = 0; s < 6; s++) {
        int n[2] = {sizes[s][0], sizes[s][1]}, d = sizes[s][2];
        double sum[2][3] = {{0, 0, 0}, {0, 0, 0}}, h = 1.7, got;
        df_random_normal(3, (uint64_t)s, 0, (size_t)(n[0] * d), a);
        df_random_normal(3, (uint64_t)s, 1, (size_t)(n[1] * d), b);
        for (int i = 0; i < n[1] * d; i++) b[i] += 1;
        for (int c = 0; c < 3; c++) {  // ab, aa, bb
            const df_real *x = c == 2 ? b : a, *y = c == 1 ? a : b;
            int nx = n[c == 2], ny = n[c != 1];
            for (int i = 0; i < nx; i++)
                for (int j = 0; j < ny; j++) {
                    double q = 0;
                    if (c > 0 && i == j) continue;
                    for (int k = 0; k < d; k++) {
                        double gap = (double)x[i * d + k] - (double)y[j * d + k];
                        q += gap * gap;
                    }
                    double pairs = c == 0 ? (double)nx * ny : (double)nx * (nx - 1);
                    sum[0][c] += sqrt(q) / pairs,
                        sum[1][c] += exp(-q / (2 * h * h)) / pairs;
                }
        }
        expect(df_energy_distance(ctx, a, n[0], b, n[1], d, &got) == DF_OK);
        near(got, 2 * sum[0][0] - sum[0][1] - sum[0][2], 1e-12);
        expect(df_mmd(ctx, a, n[0], b, n[1], d, h, &got) == DF_OK);
        near(got, sum[1][1] + sum[1][2] - 2 * sum[1][0], 1e-12);
        // against itself the pairs (i, i) count between the samples, not within one
        expect(df_energy_distance(ctx, a, n[0], a, n[0], d, &got) == DF_OK);
        near(got, -2 * sum[0][1] / n[0], 1e-12);
    }
    df_ctx_free(ctx);
}

// Unbiased means: the average over many samples of three and four is the population's value.
// N(0,1) and N(m,1): X - Y ~ N(m,2), E|X-Y| = 2/sqrt(pi) exp(-m^2/4) + m erf(m/2), and
// E exp(-(X-Y)^2/(2h^2)) = h/sqrt(h^2+2) exp(-m^2/(2(h^2+2))). 6 standard errors: 4e-9 a check.
TEST(pairs_are_unbiased) {
    df_ctx *ctx = context(1);
    int runs = test_short() ? 2000 : 20000;
    double m = 1, h = .8, s = h * h + 2, pi = 3.14159265358979323846;
    double want[2] = {2 * (2 / sqrt(pi) * exp(-m * m / 4) + m * erf(m / 2)) - 4 / sqrt(pi),
                      2 * h / sqrt(s) * (1 - exp(-m * m / (2 * s)))};
    for (int which = 0; which < 2; which++) {
        double sum = 0, sq = 0;
        for (int r = 0; r < runs; r++) {
            df_real a[3], b[4];
            double got = 0;
            df_random_normal(4, (uint64_t)r, 0, 3, a),
                df_random_normal(4, (uint64_t)r, 1, 4, b);
            for (int i = 0; i < 4; i++) b[i] += (df_real)m;
            if (which == 0) df_energy_distance(ctx, a, 3, b, 4, 1, &got);
            else df_mmd(ctx, a, 3, b, 4, 1, h, &got);
            sum += got, sq += got * got;
        }
        double mean = sum / runs, se = sqrt((sq / runs - mean * mean) / runs);
        check(fabs(mean - want[which]) < 6 * se, "distance %d: %g, want %g +- %g", which,
              mean, want[which], se);
    }
    df_ctx_free(ctx);
}

// ---- failures ----

static void refused(df_ctx *ctx, df_mixture *m, df_result code, const char *part) {
    check(m == NULL && df_ctx_error(ctx) == code &&
              strstr(df_ctx_message(ctx), part) != NULL,
          "%d: \"%s\" should hold \"%s\"", df_ctx_error(ctx), df_ctx_message(ctx), part);
    if (m != NULL) df_mixture_free(m);
    df_ctx_clear(ctx);
}

TEST(refused_mixtures) {
    df_ctx *ctx = context(1);
    Gm g = gm2(), b;
    size_t before = df_ctx_bytes(ctx), after;
    refused(ctx, df_mixture_create(ctx, 0, 2, g.w, g.mean, g.S), DF_ERR_ARGUMENT, "K = 0");
    refused(ctx, df_mixture_create(ctx, 3, -1, g.w, g.mean, g.S), DF_ERR_ARGUMENT,
            "dim = -1");
    refused(ctx, df_mixture_create(ctx, 3, 2, NULL, g.mean, g.S), DF_ERR_ARGUMENT, "NULL");
    b = g, b.w[1] = 0;
    refused(ctx, df_mixture_create(ctx, 3, 2, b.w, b.mean, b.S), DF_ERR_ARGUMENT,
            "component 1: weight not above 0: 0");
    b = g, b.mean[3] = NAN;
    refused(ctx, df_mixture_create(ctx, 3, 2, b.w, b.mean, b.S), DF_ERR_NONFINITE,
            "component 1: sum of numbers nan");
    b = g, b.S[10] = INFINITY;
    refused(ctx, df_mixture_create(ctx, 3, 2, b.w, b.mean, b.S), DF_ERR_NONFINITE,
            "component 2: sum of numbers inf");
    b = g, b.S[5] = .05;
    refused(ctx, df_mixture_create(ctx, 3, 2, b.w, b.mean, b.S), DF_ERR_ARGUMENT,
            "component 1: S not symmetric");
    b = g, b.S[5] = b.S[6] = .4;  // eigenvalues .3 +- sqrt(.01 + .16)
    refused(ctx, df_mixture_create(ctx, 3, 2, b.w, b.mean, b.S), DF_ERR_ARGUMENT,
            "component 1: S has eigenvalue -0.112311");
    refused(ctx, df_mixture_create(ctx, 2147483647, 2147483647, g.w, g.mean, g.S),
            DF_ERR_MEMORY, "no memory");
    after = df_ctx_bytes(ctx);
    for (int i = 0; i < 10; i++) df_mixture_create(ctx, 3, 2, b.w, b.mean, b.S);
    check(df_ctx_bytes(ctx) == after && before <= after, "refused mixtures keep %zu bytes",
          df_ctx_bytes(ctx) - after);
    df_ctx_free(ctx);
}

TEST(refused_questions) {
    df_ctx *ctx = context(1);
    Gm g = gm2();
    df_mixture *m = mixture(ctx, &g);
    df_point at = point(1, 1), bad = point(1, -1);
    df_real x[6] = {0, 1, 2, 3, 4, 5}, out[6];
    double d;
    expect(df_mixture_score(ctx, NULL, &at, 3, x, out) == DF_ERR_ARGUMENT);
    expect(df_mixture_score(ctx, m, NULL, 3, x, out) == DF_ERR_ARGUMENT);
    expect(df_mixture_score(ctx, m, &at, -1, x, out) == DF_ERR_ARGUMENT);
    expect(df_mixture_score(ctx, m, &at, 3, NULL, out) == DF_ERR_ARGUMENT);
    expect(df_mixture_posterior(ctx, m, &at, 3, x, NULL, NULL) == DF_ERR_ARGUMENT);
    expect(df_mixture_log_density(ctx, m, &at, 3, x, NULL) == DF_ERR_ARGUMENT);
    expect(df_mixture_sample(ctx, m, &at, 0, 0, 3, NULL) == DF_ERR_ARGUMENT);
    expect(df_mixture_score(ctx, m, &bad, 3, x, out) == DF_ERR_ARGUMENT);
    expect(df_mixture_sample(ctx, m, &bad, 0, 0, 3, out) == DF_ERR_ARGUMENT);
    expect(df_mixture_score(ctx, m, &at, 0, NULL, NULL) == DF_OK);
    x[3] = (df_real)NAN;
    expect(df_mixture_score(ctx, m, &at, 3, x, out) == DF_ERR_NONFINITE);
    check(strstr(df_ctx_message(ctx), "nan in row 1, element 1") != NULL, "%s",
          df_ctx_message(ctx));
    expect(df_mixture_score(ctx, m, &at, 1, x, out) == DF_OK);
    expect(df_sliced_wasserstein(ctx, x, 3, out, 1, 2, 5, 0, &d) == DF_ERR_NONFINITE);
    expect(df_energy_distance(ctx, out, 2, x, 3, 2, &d) == DF_ERR_NONFINITE);
    expect(strstr(df_ctx_message(ctx), "b [3,2] is nan in row 1, element 1") != NULL);
    x[3] = 0;
    expect(df_sliced_wasserstein(ctx, x, 0, x, 1, 2, 5, 0, &d) == DF_ERR_ARGUMENT);
    expect(df_sliced_wasserstein(ctx, x, 3, x, 3, 2, 0, 0, &d) == DF_ERR_ARGUMENT);
    expect(df_energy_distance(ctx, x, 1, x, 3, 2, &d) == DF_ERR_ARGUMENT);
    expect(df_mmd(ctx, x, 3, x, 3, 2, 0, &d) == DF_ERR_ARGUMENT);
    expect(df_mmd(ctx, x, 3, x, 3, 2, -1, &d) == DF_ERR_ARGUMENT);
    expect(df_mmd(ctx, x, 3, x, 3, 2, NAN, &d) == DF_ERR_ARGUMENT);
    df_mixture_free(m), df_mixture_free(NULL), df_ctx_free(ctx);
}

typedef struct Counter { int left; long live; } Counter;

static void *counted_alloc(void *user, size_t size, size_t align) {
    Counter *c = (Counter *)user;
    void *p = NULL;
    if (c->left-- <= 0 || posix_memalign(&p, align < sizeof p ? sizeof p : align, size))
        return NULL;
    c->live++;
    return p;
}

static void counted_free(void *user, void *ptr, size_t size, size_t align) {
    (void)size, (void)align;
    ((Counter *)user)->live--;
    free(ptr);
}

// Every function with the allocator failing at the first, second, ... request: what it has taken
// comes back, and the mixture, made in another context, serves again.
TEST(allocations_fail_in_turn) {
    enum { N = 6000, D = 16, CALLS = 9 };
    Gm g = gm_random(3, D, 20, 61);
    df_ctx *other = context(1);
    df_mixture_view view = {mixture(other, &g), df_process_flow(), DF_VELOCITY};
    df_model model = df_mixture_model(&view);
    df_real *x = (df_real *)calloc(N * D, sizeof(df_real)),
            *y = (df_real *)malloc(N * D * sizeof(df_real));
    df_point at = point(.5, .5);
    for (int call = 0; call < CALLS; call++) {
        int refusals = 0, result = DF_ERR_MEMORY;
        for (int fail = 0; fail < 20 && result != DF_OK; fail++) {
            Counter counter = {1000, 0};
            df_ctx_desc desc = df_ctx_defaults();
            df_mixture *made = NULL;
            double d;
            desc.threads = 1;
            desc.alloc.alloc = counted_alloc, desc.alloc.free = counted_free,
            desc.alloc.user = &counter;
            df_ctx *ctx = df_ctx_create(&desc);
            counter.left = fail;
            switch (call) {
            case 0: made = df_mixture_create(ctx, 3, D, g.w, g.mean, g.S); break;
            case 1: made = df_mixture_ring(ctx, 900, 1, 1); break;
            case 2:
                result = df_mixture_sample(ctx, view.mixture, &at, 0, 0, 300, x);
                break;
            case 3: result = df_mixture_score(ctx, view.mixture, &at, 300, x, y); break;
            case 4:
                result =
                    df_mixture_posterior(ctx, view.mixture, &at, 300, x, y, y + 300 * D);
                break;
            case 5:
                result = ask(ctx, &model, DF_ASK_LOG_DENSITY, &at, 60, D, x, NULL, y);
                break;
            case 6: result = df_sliced_wasserstein(ctx, x, N, x, 99, D, 3, 0, &d); break;
            case 7: result = df_energy_distance(ctx, x, 300, x, 99, D, &d); break;
            default: result = df_mmd(ctx, x, 300, x, 99, D, 1, &d); break;
            }
            if (call < 2) result = made != NULL ? DF_OK : df_ctx_error(ctx);
            check(result == DF_OK || result == DF_ERR_MEMORY, "call %d: %d, %s", call,
                  result, df_ctx_message(ctx));
            refusals += result != DF_OK;
            df_mixture_free(made), df_ctx_free(ctx);
            check(counter.live == 0, "call %d: %ld allocations left", call, counter.live);
        }
        check(result == DF_OK && refusals >= (call == 1 ? 2 : 1),
              "call %d: %d refusals", call, refusals);
    }
    df_mixture_free((df_mixture *)view.mixture), df_ctx_free(other);
    free(x), free(y);
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN(density_integrates_to_one);
    RUN(gm2_against_plain_formulas);
    RUN(gm16_against_plain_formulas);
    RUN(full_covariances_against_plain_formulas);
    RUN(rank_deficient_against_plain_formulas);
    RUN(one_component_against_plain_formulas);
    RUN(score_is_the_gradient);
    RUN(posterior_by_quadrature);
    RUN(no_division_at_the_ends);
    RUN(singular_covariances);
    RUN(eigenvectors_give_the_covariance_back);
    RUN(far_away_nothing_underflows);
    RUN(sample_moments);
    RUN(ring_of_eight);
    RUN(model_answers_every_prediction);
    RUN(model_at_the_ends);
    RUN(jvp_and_vjp);
    RUN(jacobian_is_the_covariance);
    RUN(threads_and_splits);
    RUN(rows_at_different_points);
    RUN(sliced_wasserstein_of_shifts);
    RUN(sliced_wasserstein_of_different_sizes);
    RUN(pairs_against_a_double_loop);
    RUN(pairs_are_unbiased);
    RUN(refused_mixtures);
    RUN(refused_questions);
    RUN(allocations_fail_in_turn);
    return test_end();
}
