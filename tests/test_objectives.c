// Objectives: the likelihood weight as one number, weightings and densities by their integrals,
// the hybrid loss against the KL of two Gaussians, score matching on linear scores with closed
// forms, energies by finite differences, contrastive divergence where its gradient is known.
#include "diffusion.h"
#include "test.h"
#include "counting.h"

enum { IS_DOUBLE = sizeof(df_real) == 8 };

// ---- the likelihood weight ----

// The expressions of MATH section 5: |lambda'|, |lambda'| (alpha/sigma)^2, 1/(sigma^2 |lambda'|),
// |lambda'| alpha^2/q^2, g^2/2; weighted errors of one pair of predictors are one number.
TEST(likelihood_weight) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_process process[6] = {df_process_vp(.1, 20), df_process_flow(), df_process_edm(80),
                             df_process_trig(.5), df_process_ve(.01, 50), df_process_cosine()};
    for (int i = 0; i < 6; i++)
        for (int j = 1; j < 10; j++) {
            const df_process *p = &process[i];
            double t = j / 10.0, w[DF_PREDICTION_COUNT], first = 0, error = .37;
            df_point at = df_process_at(p, t);
            df_rates r;
            expect(df_process_rates(ctx, p, t, DF_RATE_LAMBDA | DF_RATE_G2, &r) == DF_OK);
            for (int k = 0; k < DF_PREDICTION_COUNT; k++) {
                double cx, cp;
                expect(df_likelihood_weight(ctx, p, (df_prediction)k, t, &w[k]) == DF_OK);
                // an error of x_0 by .37 is one of the prediction by .37/cp
                expect(df_plane_map(ctx, p, (df_prediction)k, DF_X0, &at, &cx, &cp) == DF_OK);
                double loss = w[k] * pow(error / cp, 2);
                if (k == 0) first = loss;
                near_rel(loss, first, 1e-12);
            }
            double rate = fabs(r.lambda), q = at.alpha * at.alpha + at.sigma * at.sigma;
            near_rel(w[DF_EPS], rate, 1e-12);
            near_rel(w[DF_X0], rate * pow(at.alpha / at.sigma, 2), 1e-12);
            near_rel(w[DF_VELOCITY], 1 / (at.sigma * at.sigma * rate), 1e-12);
            near_rel(w[DF_V], rate * pow(at.alpha / q, 2), 1e-12);
            near_rel(w[DF_SCORE], r.g2 / 2, 1e-12);
        }
    double w;
    expect(df_likelihood_weight(ctx, &process[1], DF_VELOCITY, 1, &w) == DF_OK && w == 0);
    expect(df_likelihood_weight(ctx, &process[1], DF_EPS, 1, &w) == DF_ERR_SINGULAR);
    expect(says(ctx, "infinite on eps"));
    expect(df_likelihood_weight(ctx, &process[0], DF_EPS, 0, &w) == DF_ERR_SINGULAR);
    expect(df_likelihood_weight(ctx, &process[1], DF_X0, 0, &w) == DF_ERR_SINGULAR);
    expect(df_likelihood_weight(ctx, &process[0], DF_EPS, .5, NULL) == DF_ERR_ARGUMENT);
    df_ctx_free(ctx);
}

// ---- weightings and densities ----

// A net that answers g x with one weight g, and an objective that keeps what it is given.
static df_tensor *forward_gain(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    (void)t, (void)labels;
    return df_mul(run->ctx, x, df_run_param(run, 0));
}
static df_net *gain_net(df_ctx *ctx, int dim, double g) {
    int one[1] = {1};
    df_net *net = df_net_create(ctx, "gain", 1, &dim, forward_gain, 0);
    if (net == NULL || df_net_add(ctx, net, "g", 1, one, DF_INIT_ZERO) < 0) return NULL;
    df_net_weights(net)[0] = (df_real)g;
    return net;
}
enum { SEEN = 40000 };
static struct { df_ctx *ctx; int n; double t[SEEN], w[SEEN], error[SEEN]; } seen;
static df_tensor *look(void *self, const df_run *run, const df_batch *b) {
    (void)self;
    df_tensor *y = df_run_net(run, b->x, b->t, b->labels);
    for (int r = 0; run->ctx == seen.ctx && r < b->t->shape[0] && seen.n < SEEN; r++, seen.n++) {
        seen.t[seen.n] = (double)b->t->data[r];
        seen.w[seen.n] = (double)b->weight->data[r];
        seen.error[seen.n] = pow((double)y->data[r] - (double)b->target->data[r], 2);
    }
    return df_mse(run->ctx, y, b->target);
}
// What a trainer of net g x, in one dimension, draws for n items; 0, or why not is in ctx.
static int watch(df_ctx *ctx, df_train_desc d, double g, int n) {
    static df_real data[SEEN];
    df_random_normal(7, 0, 0, SEEN, data);
    df_net *net = gain_net(ctx, 1, g);
    d.scaling = DF_SCALING_NONE;
    d.objective = look;
    d.validation = 0;
    d.batch = d.rows = n / 10;
    d.steps = 10;
    d.learning_rate = d.ema = 0;
    seen.ctx = ctx, seen.n = 0;
    df_trainer *tr = df_trainer_create(ctx, net, data, SEEN, NULL, &d);
    seen.n = 0;
    int bad = tr == NULL || df_trainer_run(tr, 0) != DF_OK;
    df_trainer_free(tr);
    df_net_free(net);
    return bad;
}

TEST(weights) {
    df_ctx *ctx = new_ctx(2, NULL);
    df_process process[4] = {df_process_vp(.1, 20), df_process_flow(), df_process_edm(80),
                             df_process_trig(.5)};
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < DF_PREDICTION_COUNT; k++)
            for (int kind = DF_WEIGHT_P2; kind <= DF_WEIGHT_SIGMOID; kind++)
                for (int by_lambda = 0; by_lambda < 2; by_lambda++) {
                    df_train_desc d = df_train_defaults();
                    d.card.process = process[i];
                    d.card.prediction = (df_prediction)k;
                    d.card.clock = df_time_affine(-3, 1);
                    d.weighting = (df_weighting)kind;
                    d.density = by_lambda ? DF_DENSITY_LAMBDA : DF_DENSITY_UNIFORM;
                    d.t_min = .1, d.t_max = .9;
                    d.p2_gamma = .5, d.sigmoid_bias = -1;
                    check(watch(ctx, d, 0, 20) == 0, "%s", df_ctx_message(ctx));
                    for (int s = 0; s < 20; s++) {
                        double t = seen.t[s], w, cx, cp, snr, want;
                        df_point at = df_process_at(&d.card.process, t);
                        snr = pow(at.alpha / at.sigma, 2);
                        df_likelihood_weight(ctx, &d.card.process, (df_prediction)k, t, &w);
                        df_plane_map(ctx, &d.card.process, (df_prediction)k, DF_EPS, &at, &cx, &cp);
                        double clock = k == DF_VELOCITY ? 9 : 1, q = 1 / .8, w_eps;
                        df_likelihood_weight(ctx, &d.card.process, DF_EPS, t, &w_eps);
                        if (by_lambda)      // density of t: |lambda'| over the range
                            q = w_eps / (df_process_at(&d.card.process, .1).lambda -
                                         df_process_at(&d.card.process, .9).lambda);
                        want = w / q;
                        if (kind == DF_WEIGHT_SIGMOID) want /= 1 + exp(log(snr) + 1);
                        if (kind == DF_WEIGHT_P2) want = cp * cp / sqrt(1 + snr);
                        near_rel(seen.w[s], want * clock, IS_DOUBLE ? 1e-10 : 2e-5);
                        if (k == DF_EPS && by_lambda && kind == DF_WEIGHT_LIKELIHOOD)
                            near_rel(seen.w[s], seen.w[0], 1e-7);
                    }
                }
    // the ends: P2 of x_0 where sigma = 0 is (sigma/alpha)^2 (1 + SNR) = 1/alpha^2 or so
    df_train_desc d = df_train_defaults();
    d.weighting = DF_WEIGHT_P2;
    d.card.prediction = DF_X0;
    d.t_min = 0, d.t_max = 1e-12;
    expect(watch(ctx, d, 0, 10) == 0 && fabs(seen.w[0] - 1) < 1e-9);
    d.card.prediction = DF_EPS;
    d.t_min = 1 - 1e-12, d.t_max = 1;
    expect(watch(ctx, d, 0, 10) == 0 && fabs(seen.w[0] - 1) < 1e-9);
    df_ctx_free(ctx);
}

// lambda is uniform between its ends: its quantiles, mean and variance (6 deviations).
TEST(lambda_density) {
    df_ctx *ctx = new_ctx(2, NULL);
    for (int i = 0; i < 3; i++) {
        df_train_desc d = df_train_defaults();
        d.card.process = i == 0 ? df_process_vp(.1, 20) : i == 1 ? df_process_flow()
                                                                 : df_process_cosine();
        d.card.prediction = DF_EPS;
        d.density = DF_DENSITY_LAMBDA;
        if (i > 0) d.t_max = .95;
        check(watch(ctx, d, 0, SEEN) == 0, "%s", df_ctx_message(ctx));
        double t_min = df_process_t_min(&d.card.process), mean = 0, square = 0;
        double high = df_process_at(&d.card.process, t_min).lambda;
        double low = df_process_at(&d.card.process, d.t_max).lambda;
        int below[3] = {0, 0, 0}, out = 0;
        for (int s = 0; s < SEEN; s++) {
            double l = df_process_at(&d.card.process, seen.t[s]).lambda;
            double u = (l - low) / (high - low);
            for (int k = 0; k < 3; k++) below[k] += u < (k + 1) / 4.0;
            out += u < -1e-4 || u > 1.0001;
            mean += u / SEEN, square += u * u / SEEN;
        }
        expect(out == 0 && seen.n == SEEN);
        near_abs(mean, .5, 6 * sqrt(1 / 12.0 / SEEN));
        near_abs(square - mean * mean, 1 / 12.0, 6 * sqrt(1 / 180.0 / SEEN));
        for (int k = 0; k < 3; k++) near_abs(below[k], SEEN * (k + 1) / 4.0, 3 * sqrt(SEEN));
    }
    df_train_desc d = df_train_defaults();
    d.density = DF_DENSITY_LAMBDA;          // velocity of flow: lambda(1) = -inf
    expect(watch(ctx, d, 0, 10) != 0 && says(ctx, "LAMBDA draws"));
    d = df_train_defaults();
    d.weighting = DF_WEIGHT_LIKELIHOOD;
    d.density = DF_DENSITY_LOGIT_NORMAL;
    expect(watch(ctx, d, 0, 10) != 0 && says(ctx, "UNIFORM or LAMBDA"));
    df_ctx_free(ctx);
}

// int |lambda'| E|g x - eps|^2 dt for data N(0, 1) on VP, where x ~ N(0, 1) and E x eps = sigma:
// E = g^2 - 2 g sigma + 1, over lambda. Both densities estimate it; LAMBDA's variance is lower.
TEST(importance) {
    df_ctx *ctx = new_ctx(2, NULL);
    double mean[2], var[2], want = 0, g = .4;
    df_train_desc d = df_train_defaults();
    d.card.process = df_process_vp(.1, 20);
    d.card.prediction = DF_EPS;
    d.weighting = DF_WEIGHT_LIKELIHOOD;
    d.t_min = 1e-3;
    enum { N = 4000 };
    double high = df_process_at(&d.card.process, d.t_min).lambda;
    double low = df_process_at(&d.card.process, d.t_max).lambda;
    for (int i = 0; i < N; i++) {           // the midpoint rule over lambda: 1e-7
        df_point at = df_process_at_lambda(&d.card.process, low + (high - low) * (i + .5) / N);
        want += (high - low) / N * (g * g - 2 * g * at.sigma + 1);
    }
    for (int k = 0; k < 2; k++) {
        d.density = k ? DF_DENSITY_LAMBDA : DF_DENSITY_UNIFORM;
        check(watch(ctx, d, g, SEEN) == 0, "%s", df_ctx_message(ctx));
        mean[k] = var[k] = 0;
        for (int s = 0; s < SEEN; s++) mean[k] += seen.w[s] * seen.error[s] / SEEN;
        for (int s = 0; s < SEEN; s++)
            var[k] += pow(seen.w[s] * seen.error[s] - mean[k], 2) / SEEN;
        near_abs(mean[k], want, 6 * sqrt(var[k] / SEEN));
    }
    check(var[1] < .3 * var[0], "variance %g by lambda, %g uniform", var[1], var[0]);
    df_ctx_free(ctx);
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN(likelihood_weight);
    RUN(weights);
    RUN(lambda_density);
    RUN(importance);
    return test_end();
}
