// Likelihoods: the change of variables against a mixture's exact log density, on every process
// and prediction and for a user's model; Hutchinson's estimate by its exact moments; the
// variational bound term by term, against closed forms on Gaussian data; bits and levels.
#include "diffusion.h"
#include "test.h"
#include "counting.h"

#define SHARP (sizeof(df_real) == 8)
static const double PI = 3.14159265358979323846;

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
    static const df_prediction what[] = { DF_EPS, DF_X0, DF_V, DF_VELOCITY, DF_SCORE, DF_EDM_F,
                                          DF_STRAIGHT };
    enum { N = 12 };
    for (int k = 0; k < CASES; k++)
        for (int j = 0; j < 7; j++) {
            df_mixture_view view = { gmm, process_of(k), what[j] };
            df_model m = df_mixture_model(&view);
            df_likelihood_desc d = tight();
            df_point at = df_process_at(&view.process, df_process_t_min(&view.process));
            double want[N], got[N], prior[N], off;
            df_real x[2 * N];
            // eps and the score know nothing of x_0 where alpha = 0
            if (df_process_at(&view.process, 1).alpha < 1e-9) d.walk.t_max = .999;
            d.prior = prior;
            points(&at, (uint64_t)k, N, x, want);
            check(df_log_likelihood(ctx, &m, &d, x, N, got) == DF_OK, "%s %s: %s",
                  df_process_name(&view.process), df_prediction_name(what[j]),
                  df_ctx_message(ctx));
            off = worst(N, got, want);
            if (getenv("SHOW")) printf("%s %s %g\n", df_process_name(&view.process), df_prediction_name(what[j]), off);
            check(off <= (SHARP ? 1e-6 : 1e-2), "%s %s: off by %g",
                  df_process_name(&view.process), df_prediction_name(what[j]), off);
        }
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    ctx = new_ctx(2, NULL);
    gmm = three();
    RUN(exact_trace_on_every_process_and_prediction);
    df_mixture_free(gmm);
    df_ctx_free(ctx);
    return test_end();
}
