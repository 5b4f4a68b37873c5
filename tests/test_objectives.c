// Objectives: the likelihood weight as one number, weightings and densities by their integrals,
// the hybrid loss against the KL of two Gaussians, score matching on linear scores with closed
// forms, energies by finite differences, contrastive divergence where its gradient is known.
#include "diffusion.h"
#include "test.h"
#include "counting.h"

enum { IS_DOUBLE = sizeof(df_real) == 8 };

// Does the context's sentence say so? It is then forgotten, and tensors go on.
static int said(df_ctx *ctx, const char *part) {
    int found = says(ctx, part);
    df_ctx_clear(ctx);
    return found;
}

// ---- the likelihood weight ----

// The expressions of MATH section 5: |lambda'|, |lambda'| (alpha/sigma)^2, 1/(sigma^2 |lambda'|),
// |lambda'| alpha^2/q^2, g^2/2; weighted errors of one pair of predictors are one number.
TEST(likelihood_weight) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_process process[8] = {df_process_vp(.1, 20), df_process_flow(), df_process_edm(80),
                             df_process_trig(.5), df_process_ve(.01, 50), df_process_cosine(),
                             df_process_subvp(.1, 20), df_process_edm(80)};
    double betas[40];
    expect(df_betas(ctx, DF_BETAS_LINEAR, .002, .4, 40, betas) == DF_OK);
    expect(df_process_table(ctx, betas, 40, &process[7]) == DF_OK); // t = j/10: knots
    for (int i = 0; i < 8; i++)
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
    expect(said(ctx, "infinite on eps"));
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
        for (int k = 0; k < 3; k++) near_abs(below[k], SEEN * (k + 1) / 4.0, 3 * sqrt((double)SEEN));
    }
    df_train_desc d = df_train_defaults();
    d.density = DF_DENSITY_LAMBDA;          // velocity of flow: lambda(1) = -inf
    expect(watch(ctx, d, 0, 10) != 0 && said(ctx, "LAMBDA draws"));
    d = df_train_defaults();
    d.weighting = DF_WEIGHT_LIKELIHOOD;
    d.density = DF_DENSITY_LOGIT_NORMAL;
    expect(watch(ctx, d, 0, 10) != 0 && said(ctx, "UNIFORM or LAMBDA"));
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

// ---- the hybrid loss ----

// A DiT whose last layer is zero but for its bias: mean and variance are numbers of a channel.
enum { DT = 4, ROWS = 32, PIXELS = 64 };
typedef struct caught { df_real *grads; size_t size; } caught;
static int catch_gradients(void *user, df_net *net, df_real *grads, size_t size) {
    caught *c = (caught *)user;
    (void)net;
    c->size = size;
    c->grads = (df_real *)realloc(c->grads, size * sizeof *grads);
    memcpy(c->grads, grads, size * sizeof *grads);
    return 0;
}
static struct { df_real x0[ROWS * PIXELS], x[ROWS * PIXELS], eps[ROWS * PIXELS], t[ROWS]; } drawn;
static df_tensor *keep_rows(void *self, const df_run *run, const df_batch *b) {
    (void)self;
    if (b->x->shape[0] == ROWS) {
        memcpy(drawn.x0, b->x0->data, sizeof drawn.x0);
        memcpy(drawn.x, b->x->data, sizeof drawn.x);
        memcpy(drawn.eps, b->target->data, sizeof drawn.eps);
        memcpy(drawn.t, b->t->data, sizeof drawn.t);
    }
    df_tensor *y = df_run_net(run, b->x, b->t, b->labels);
    return df_mse(run->ctx, df_slice(run->ctx, y, 1, 0, 1), b->target);
}

// Nichol & Dhariwal's L_vlb times T from betas, in the papers' own words: posterior, KL.
static double vlb_by_hand(const double *betas, int range, double y, double v) {
    double abar[DT + 1] = {1}, tilde[DT + 1] = {0}, sum = 0;
    for (int i = 1; i <= DT; i++) abar[i] = abar[i - 1] * (1 - betas[i - 1]);
    for (int i = 1; i <= DT; i++)
        tilde[i] = betas[i - 1] * (1 - abar[i - 1]) / (1 - abar[i]);
    for (int r = 0; r < ROWS; r++) {
        int i = (int)drawn.t[r] + 1;
        double beta = betas[i - 1], f = (v + 1) / 2, least = i == 1 ? tilde[2] : tilde[i];
        double log_v = range ? f * log(beta) + (1 - f) * log(least) : v;
        for (int k = r * PIXELS; k < (r + 1) * PIXELS; k++) {
            double x = (double)drawn.x[k], x0 = (double)drawn.x0[k];
            double guess = (x - sqrt(1 - abar[i]) * y) / sqrt(abar[i]);
            double to_x0 = sqrt(abar[i - 1]) * beta / (1 - abar[i]);
            double to_x = sqrt(1 - beta) * (1 - abar[i - 1]) / (1 - abar[i]);
            double d = to_x0 * x0 + to_x * x - (to_x0 * guess + to_x * x);
            if (i == 1) sum += .5 * (log(2 * acos(-1)) + log_v + pow(x0 - guess, 2) / exp(log_v));
            else sum += .5 * log(exp(log_v) / tilde[i]) +
                        (tilde[i] + d * d) / (2 * exp(log_v)) - .5;
        }
    }
    return DT * sum / (ROWS * PIXELS);
}

TEST(hybrid) {
    df_ctx *ctx = new_ctx(2, NULL);
    static df_real data[ROWS * PIXELS];
    double betas[DT] = {.01, .05, .2, .4}, mean = .3, rest = .4;
    df_random_normal(3, 0, 0, ROWS * PIXELS, data);
    for (int range = 0; range < 2; range++) {
        double loss[2];
        caught c[3];
        memset(c, 0, sizeof c);
        for (int k = 0; k < 3; k++) {              // plain; with vlb; an objective that looks
            df_dit_desc dit = df_dit_defaults();
            df_train_desc d = df_train_defaults();
            df_train_info info;
            dit.in_channels = 1, dit.size = 8, dit.width = 16, dit.depth = 1, dit.heads = 2;
            df_net *net = df_dit_create(ctx, &dit);
            const df_param *p = df_net_param(net, df_net_find(net, "final_layer.linear.bias"));
            for (size_t i = 0; i < p->size; i++)
                df_net_weights(net)[p->offset + i] = (df_real)(i % 2 ? rest : mean);
            expect(df_process_table(ctx, betas, DT, &d.card.process) == DF_OK);
            d.card.prediction = DF_EPS;
            d.card.time = df_time_index(DT);
            d.card.learned = range ? DF_LEARNED_RANGE : DF_LEARNED_LOG_VARIANCE;
            d.density = DF_DENSITY_INDEX;
            d.scaling = DF_SCALING_NONE;
            d.validation = d.learning_rate = 0;
            d.batch = d.rows = ROWS;
            d.vlb = k == 1 ? .1 : 0;
            d.objective = k == 2 ? keep_rows : NULL;
            d.on_gradients = catch_gradients, d.user = &c[k];
            df_trainer *tr = df_trainer_create(ctx, net, data, ROWS, NULL, &d);
            check(tr && df_trainer_run(tr, 1) == DF_OK, "%s", df_ctx_message(ctx));
            df_trainer_info(tr, &info);
            if (k < 2) loss[k] = info.loss;
            df_trainer_free(tr);
            if (k == 2) {
                double m = (double)(df_real)mean, v = (double)(df_real)rest, h = 1e-5, slope = 0;
                near_rel(loss[1] - loss[0], .1 * vlb_by_hand(betas, range, m, v),
                         IS_DOUBLE ? 1e-11 : 2e-5);
                for (size_t i = 0; i < p->size; i++) {     // patches of 2 x 2: 8 numbers
                    size_t at = p->offset + i;
                    if (i % 2) slope += (double)c[1].grads[at];
                    if (i % 2) expect((double)c[0].grads[at] == 0);
                    else expect(c[0].grads[at] == c[1].grads[at] && c[0].grads[at] != 0);
                }
                near_rel(slope, .1 * (vlb_by_hand(betas, range, m, v + h) -
                                      vlb_by_hand(betas, range, m, v - h)) / (2 * h),
                         IS_DOUBLE ? 1e-7 : 1e-3);
                d.vlb = .1, d.objective = NULL, d.density = DF_DENSITY_UNIFORM;
                expect(df_trainer_create(ctx, net, data, ROWS, NULL, &d) == NULL);
                expect(said(ctx, "density INDEX"));
                d.density = DF_DENSITY_INDEX, betas[DT - 1] = 1;
                expect(df_process_table(ctx, betas, DT, &d.card.process) == DF_OK);
                expect(df_trainer_create(ctx, net, data, ROWS, NULL, &d) == NULL);
                expect(said(ctx, "do not determine"));
                betas[DT - 1] = .4;
            }
            df_net_free(net);
        }
        for (int k = 0; k < 3; k++) free(c[k].grads);
    }
    df_ctx_free(ctx);
}

// ---- objectives asked by hand ----

// A net that answers A x + c, in two dimensions.
static df_tensor *forward_linear(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    (void)t, (void)labels;
    return df_run_linear(run, 0, x);
}
static df_net *linear_net(df_ctx *ctx, const df_card *card, const double A[4], const double c[2]) {
    int two = 2;
    df_net *net = df_net_create(ctx, "linear", 1, &two, forward_linear, 0);
    if (net == NULL || df_layer_linear(ctx, net, "A", 2, 2, DF_INIT_ZERO) < 0) return NULL;
    for (int i = 0; i < 6; i++)
        df_net_weights(net)[i] = (df_real)(i < 4 ? A[i] : c[i - 4]);
    df_net_set_card(ctx, net, card);
    return net;
}

// Points whose noise has exact moments: each point of data with eps = +-sqrt(2) e_1, e_2.
enum { N = 12, DIM = 2 };
typedef struct rows { df_real x0[N * DIM], x[N * DIM], target[N * DIM], t[N], w[N]; double in; } rows;
static void fill(rows *b, const df_card *card, double t) {
    df_point at = df_process_at(&card->process, t);
    double row[2], native, s = card->input_sigma_data;
    df_plane_row(NULL, &card->process, card->prediction, &at, row);
    df_time_at(NULL, &card->process, &card->time, &at, &native, NULL);
    b->in = s > 0 ? 1 / hypot(at.alpha * s, at.sigma) : 1;
    df_random_normal(11, 0, 0, N / 4 * DIM, b->x0);
    for (int i = N / 4 * DIM; i < N * DIM; i++) b->x0[i] = b->x0[i % (N / 4 * DIM)];
    for (int r = 0; r < N; r++)
        for (int j = 0; j < DIM; j++) {
            int i = r * DIM + j, kind = r / (N / 4);
            double eps = kind % 2 == j ? (kind < 2 ? sqrt(2) : -sqrt(2)) : 0;
            b->x[i] = (df_real)(b->in * (at.alpha * (double)b->x0[i] + at.sigma * eps));
            b->target[i] = (df_real)(row[0] * (double)b->x0[i] + row[1] * eps);
            b->t[r] = (df_real)native;
            b->w[r] = 1;
        }
}
// Loss, and, unless grads is NULL, its gradient.
static double ask(df_ctx *ctx, df_net *net, df_objective_fn f, void *self, rows *b,
                  df_real *grads) {
    int shape[2] = {N, DIM};
    df_batch batch;
    df_run run = df_run_defaults(ctx, net);
    memset(&batch, 0, sizeof batch);
    run.weights = df_net_weights(net);
    run.grads = grads;
    run.seed = 5;
    if (grads != NULL) memset(grads, 0, df_net_size(net) * sizeof *grads);
    df_scope scope = df_scope_begin(ctx);
    if (grads != NULL) df_record_begin(ctx);
    batch.x0 = df_tensor_borrow(ctx, 2, shape, b->x0, NULL);
    batch.x = df_tensor_borrow(ctx, 2, shape, b->x, NULL);
    batch.target = df_tensor_borrow(ctx, 2, shape, b->target, NULL);
    batch.t = df_tensor_borrow(ctx, 1, shape, b->t, NULL);
    batch.weight = df_tensor_borrow(ctx, 1, shape, b->w, NULL);
    batch.first = 100, batch.stride = 3, batch.draw = 40;
    df_tensor *loss = f(self, &run, &batch);
    double value = loss != NULL ? (double)loss->data[0] : NAN;
    if (grads != NULL) df_backward(ctx, loss), df_record_end(ctx);
    df_scope_end(ctx, scope, NULL);
    return value;
}
// Probe or noise k of row r in such a batch.
static void draw(int r, int k, df_real v[DIM]) {
    df_random_normal(5, 100 + 3 * (uint64_t)r, 40 + (uint32_t)k, DIM, v);
}
static df_tensor *denoise(void *self, const df_run *run, const df_batch *b) {
    (void)self;
    return df_scale(run->ctx, df_mse(run->ctx, df_run_net(run, b->x, b->t, b->labels), b->target),
                    DIM / 2.0);
}
static const double tight = IS_DOUBLE ? 1e-12 : 2e-5;

// On a linear score J = tr A + mean |A x + c|^2/2. Its gradient is denoising's, the moments of
// the noise being exact; at the moments of x it is 0, and J = -tr(C^-1)/2: -d/(2v) for C = v I.
TEST(implicit) {
    df_ctx *ctx = new_ctx(1, NULL);
    static rows b;
    df_card card = df_card_defaults();
    double A[4] = {-.8, .3, -.1, -1.2}, c[2] = {.2, -.4}, C[4] = {0}, m[2] = {0}, gap[2];
    df_real grads[2][6];
    card.prediction = DF_SCORE;
    fill(&b, &card, .4);
    df_net *net = linear_net(ctx, &card, A, c);
    for (int k = 0; k < 2; k++) {
        double want = A[0] + A[3];
        for (int r = 0; r < N; r++)
            for (int j = 0; j < 2; j++)
                want += pow(A[2 * j] * (double)b.x[2 * r] + A[2 * j + 1] * (double)b.x[2 * r + 1] +
                            c[j], 2) / (2 * N);
        double J = ask(ctx, net, df_objective_implicit, NULL, &b, grads[0]);
        near(J, want, tight);
        gap[k] = J - ask(ctx, net, denoise, NULL, &b, grads[1]);
        near_all(grads[0], grads[1], 6, tight);
        A[1] = .7, A[2] = .5, c[0] = -1;
        for (int i = 0; i < 6; i++) df_net_weights(net)[i] = (df_real)(i < 4 ? A[i] : c[i - 4]);
    }
    near(gap[0], gap[1], tight);
    for (int r = 0; r < N; r++)
        for (int i = 0; i < 2; i++) m[i] += (double)b.x[2 * r + i] / N;
    for (int r = 0; r < N; r++)
        for (int i = 0; i < 4; i++)
            C[i] += ((double)b.x[2 * r + i / 2] - m[i / 2]) * ((double)b.x[2 * r + i % 2] - m[i % 2]) / N;
    double det = C[0] * C[3] - C[1] * C[2];
    double best[6] = {-C[3] / det, C[1] / det, C[2] / det, -C[0] / det, 0, 0};
    for (int j = 0; j < 2; j++) best[4 + j] = -(best[2 * j] * m[0] + best[2 * j + 1] * m[1]);
    for (int i = 0; i < 6; i++) df_net_weights(net)[i] = (df_real)best[i];
    near(ask(ctx, net, df_objective_implicit, NULL, &b, grads[0]), (best[0] + best[3]) / 2, tight);
    for (int i = 0; i < 6; i++) near_abs((double)grads[0][i], 0, 4 * tight);
    for (int r = 0; r < N; r++) b.w[r] = 3;
    near(ask(ctx, net, df_objective_implicit, NULL, &b, NULL), 1.5 * (best[0] + best[3]), tight);
    df_net_free(net);
    df_ctx_free(ctx);
}

// The same score said as every other prediction, on every process, with c_in: the same J. And
// with probes, by the probes.
TEST(any_prediction) {
    df_ctx *ctx = new_ctx(1, NULL);
    static rows b, base;
    const double A[4] = {-.8, .3, -.1, -1.2}, c[2] = {.2, -.4}, none[2] = {0, 0};
    df_process process[3] = {df_process_vp(.1, 20), df_process_flow(), df_process_edm(4)};
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < DF_PREDICTION_COUNT; k++) {
            df_card card = df_card_defaults();
            double t = .3, cx, cp, B[4], shift[2], want, J, probed = 0;
            card.process = process[i];
            card.prediction = DF_SCORE;
            fill(&base, &card, t);
            df_net *net = linear_net(ctx, &card, A, c);
            want = ask(ctx, net, df_objective_implicit, NULL, &base, NULL);
            df_net_free(net);
            df_point at = df_process_at(&card.process, t);
            expect(df_plane_map(ctx, &card.process, (df_prediction)k, DF_SCORE, &at, &cx, &cp) == 0);
            card.prediction = (df_prediction)k;
            card.input_sigma_data = .5;
            card.time = df_time_log_sigma(.25);
            if (k == DF_VELOCITY) card.clock = df_time_affine(-2, 1), cp *= -2;
            fill(&b, &card, t);
            for (int j = 0; j < 4; j++) B[j] = (A[j] - (j % 3 == 0 ? cx : 0)) / (cp * b.in);
            for (int j = 0; j < 2; j++) shift[j] = c[j] / cp;
            net = linear_net(ctx, &card, B, shift);
            J = ask(ctx, net, df_objective_implicit, NULL, &b, NULL);
            near(J * cp * cp, want, IS_DOUBLE ? 1e-11 : 2e-4);   // the weight is on its error
            df_objective_desc by = df_objective_defaults();
            int probes = by.probes = 3;
            df_real v[2];
            for (int r = 0; r < N; r++)
                for (int p = 0; p < probes; p++) {
                    draw(r, p, v);
                    for (int j = 0; j < 4; j++)
                        probed += b.in * B[j] * (double)v[j / 2] * (double)v[j % 2] / (N * probes);
                }
            probed = J + (probed - b.in * (B[0] + B[3])) / cp;
            near(ask(ctx, net, df_objective_sliced, &by, &b, NULL), probed,
                 IS_DOUBLE ? 1e-11 : 2e-4);
            df_net_free(net);
        }
    // 12 x 4000 probes: v^T A v has mean tr A, deviation sqrt 2 |(A + A^T)/2|
    df_card card = df_card_defaults();
    df_objective_desc by = df_objective_defaults();
    int probes = by.probes = 4000;
    double norm = sqrt(A[0] * A[0] + A[3] * A[3] + .5 * pow(A[1] + A[2], 2));
    card.prediction = DF_SCORE;
    fill(&b, &card, .4);
    df_net *net = linear_net(ctx, &card, A, none);
    near_abs(ask(ctx, net, df_objective_sliced, &by, &b, NULL),
             ask(ctx, net, df_objective_implicit, NULL, &b, NULL),
             6 * sqrt(2.0 / (N * probes)) * norm);
    by.probes = -1;
    expect(isnan(ask(ctx, net, df_objective_sliced, &by, &b, NULL)) && said(ctx, "-1 probes"));
    expect(isnan(ask(ctx, net, df_objective_sliced, &probes, &b, NULL))); // no descriptor
    expect(said(ctx, "want a descriptor of df_objective_defaults"));
    by.probes = 1;
    near(ask(ctx, net, df_objective_sliced, NULL, &b, NULL),
         ask(ctx, net, df_objective_sliced, &by, &b, NULL), 0);
    df_net_free(net);
    df_ctx_free(ctx);
}

// ---- energies ----

static df_net *energy_net(df_ctx *ctx, int scaled, df_card *card) {
    df_mlp_desc d = df_mlp_defaults();
    *card = df_card_defaults();
    card->process = df_process_edm(2);
    card->prediction = DF_SCORE;
    card->time = df_time_log_sigma(.25);
    card->input_sigma_data = scaled ? .5 : 0;
    d.width = 12, d.depth = 1, d.embed = 8, d.time_scale = 5, d.seed = 4;
    df_net *net = df_mlp_create(ctx, &d);
    if (net != NULL) df_net_set_card(ctx, net, card);
    return net;
}

// The model's score is the slope of its log density; the objective is denoising of that score,
// exactly or along its probes; its gradient by differences.
TEST(energy) {
    df_ctx *ctx = new_ctx(2, NULL);
    static rows b;
    for (int scaled = 0; scaled < 2; scaled++) {
        df_card card;
        df_net *net = energy_net(ctx, scaled, &card);
        df_model m = df_energy_model(net), f = df_net_model(net);
        df_real x[N * DIM], score[N * DIM], up[N], down[N], answer[N * DIM], far[N * DIM];
        double t[N], h = IS_DOUBLE ? 1e-5 : 1e-2, want = 0, probed = 0;
        df_objective_desc by = df_objective_defaults();
        int probes = by.probes = 3;
        fill(&b, &card, .3);
        for (int r = 0; r < N; r++) t[r] = .3, b.w[r] = (df_real)(1 + r);
        for (int i = 0; i < N * DIM; i++) x[i] = b.x[i] / (df_real)b.in;
        expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, x, NULL, NULL, score) == DF_OK);
        expect(df_model_ask(ctx, &m, DF_ASK_LOG_DENSITY, t, N, x, NULL, NULL, up) == DF_OK);
        expect(df_model_ask(ctx, &f, DF_ASK_PREDICT, t, N, x, NULL, NULL, answer) == DF_OK);
        for (int r = 0; r < N; r++)
            near((double)up[r], -.5 * (pow((double)answer[2 * r], 2) + pow((double)answer[2 * r + 1], 2)),
                 tight);
        for (int j = 0; j < DIM; j++) {
            for (int k = 0; k < 2; k++) {
                memcpy(far, x, sizeof x);
                for (int r = 0; r < N; r++) far[r * DIM + j] += (df_real)(k ? -h : h);
                df_model_ask(ctx, &m, DF_ASK_LOG_DENSITY, t, N, far, NULL, NULL, k ? down : up);
            }
            for (int r = 0; r < N; r++)
                near((double)score[r * DIM + j], ((double)up[r] - (double)down[r]) / (2 * h),
                     IS_DOUBLE ? 1e-8 : 1e-3);
        }
        for (int i = 0; i < N * DIM; i++)
            want += (double)b.w[i / DIM] * pow((double)score[i] - (double)b.target[i], 2) / (N * DIM);
        near_rel(ask(ctx, net, df_objective_energy, NULL, &b, NULL), want, IS_DOUBLE ? 1e-12 : 1e-4);
        for (int r = 0; r < N; r++)
            for (int p = 0; p < probes; p++) {
                df_real v[DIM];
                double e = 0;
                draw(r, p, v);
                for (int j = 0; j < DIM; j++)
                    e += (double)v[j] * ((double)score[r * DIM + j] - (double)b.target[r * DIM + j]);
                probed += (double)b.w[r] * e * e / (N * DIM * probes);
            }
        near_rel(ask(ctx, net, df_objective_energy, &by, &b, NULL), probed,
                 IS_DOUBLE ? 1e-12 : 1e-4);
        size_t size = df_net_size(net);
        df_real *grads = (df_real *)malloc(size * sizeof *grads), *w = df_net_weights(net);
        ask(ctx, net, df_objective_energy, NULL, &b, grads);
        for (size_t i = 0; IS_DOUBLE && i < size; i += 5) {
            df_real keep = w[i];
            w[i] = keep + (df_real)1e-5;
            double slope = ask(ctx, net, df_objective_energy, NULL, &b, NULL);
            w[i] = keep - (df_real)1e-5;
            slope -= ask(ctx, net, df_objective_energy, NULL, &b, NULL);
            w[i] = keep;
            near((double)grads[i], slope / 2e-5, 1e-6);
        }
        expect(df_model_ask(ctx, &m, DF_ASK_VJP, t, N, x, x, NULL, far) == DF_ERR_UNSUPPORTED);
        card.prediction = DF_EPS;
        expect(df_net_set_card(ctx, net, &card) == DF_OK);
        m = df_energy_model(net);
        expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, x, NULL, NULL, far) != DF_OK);
        expect(said(ctx, "whose card says score, not eps"));
        expect(isnan(ask(ctx, net, df_objective_energy, NULL, &b, NULL)) && said(ctx, "want score"));
        free(grads);
        df_net_free(net);
    }
    df_ctx_free(ctx);
}

// E of f = x is c_in^2 |x|^2/2, of a constant 0: grad E = c_in^2 x, or none.
static df_tensor *forward_odd(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    (void)t, (void)labels;
    return df_net_get(run->net, 0) ? df_tensor_new(run->ctx, x->ndim, x->shape) : x;
}
TEST(energy_of_odd_nets) {
    df_ctx *ctx = new_ctx(1, NULL);
    static rows b;
    df_card card = df_card_defaults();
    int dim = DIM;
    df_objective_desc by = df_objective_defaults();
    by.probes = 3;
    card.process = df_process_edm(2);
    card.prediction = DF_SCORE;
    card.input_sigma_data = .5;
    for (int kind = 0; kind < 2; kind++) {
        df_net *net = df_net_create(ctx, "odd", 1, &dim, forward_odd, 0);
        df_net_set(net, 0, kind);
        expect(df_net_set_card(ctx, net, &card) == DF_OK);
        fill(&b, &card, .3);
        double want = 0, got = ask(ctx, net, df_objective_energy, NULL, &b, NULL);
        for (int r = 0; r < N; r++)
            for (int j = 0; j < DIM; j++) {
                double x = (double)b.x[r * DIM + j];
                want += (double)b.w[r] / (N * DIM) *
                        pow((double)b.target[r * DIM + j] + (kind ? 0 : b.in * x), 2);
            }
        near(got, want, tight);
        expect(ask(ctx, net, df_objective_energy, &by, &b, NULL) > 0);
        df_net_free(net);
    }
    df_ctx_free(ctx);
}

// Where a variance is learned the answer has twice the channels: no energy, no divergence.
TEST(other_channels) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_dit_desc d = df_dit_defaults();
    df_card card = df_card_defaults();
    static df_real zero[8];
    int shape[4] = {2, 1, 2, 2};
    df_batch b;
    d.in_channels = d.patch = d.depth = d.heads = d.classes = 1, d.size = 2, d.width = 4;
    df_net *net = df_dit_create(ctx, &d);
    card.prediction = DF_SCORE, card.learned = DF_LEARNED_RANGE;
    check(net && df_net_set_card(ctx, net, &card) == DF_OK, "%s", df_ctx_message(ctx));
    df_run run = df_run_defaults(ctx, net);
    memset(&b, 0, sizeof b);
    b.x = b.x0 = b.target = df_tensor_copy(ctx, 4, shape, zero);
    b.t = b.weight = df_tensor_fill(ctx, 1, shape, .5);
    expect(df_objective_energy(NULL, &run, &b) == NULL);
    expect(said(ctx, "df_objective_energy: net 'dit' makes 2 channels"));
    expect(df_objective_implicit(NULL, &run, &b) == NULL);
    expect(said(ctx, "df_run_divergence: net 'dit' makes 2 channels"));
    df_net_free(net);
    df_ctx_free(ctx);
}

// E = (g c_in x)^2/2: the chain is x += -h k x + sqrt(2h) z with k = (g c_in)^2, done again
// here; loss and gradient in g are those of its end.
TEST(contrastive) {
    df_ctx *ctx = new_ctx(1, NULL);
    static rows b;
    for (int kind = 0; kind < 4; kind++) {
        df_card card = df_card_defaults();
        df_objective_desc d = df_objective_defaults();
        double g = 1.3, low = 0, high = 0;
        df_real grad[1];
        card.process = df_process_edm(2);
        card.prediction = DF_SCORE;
        card.input_sigma_data = kind % 2 ? .5 : 0;
        d.from_noise = kind / 2;
        d.steps = 7, d.step = .03;
        fill(&b, &card, .3);
        df_net *net = gain_net(ctx, DIM, g);
        df_net_set_card(ctx, net, &card);
        double k = pow((double)(df_real)g * b.in, 2);
        df_point at = df_process_at(&card.process, .3);
        for (int r = 0; r < N; r++) {
            df_real z[DIM];
            double x[DIM];
            for (int s = 0; s <= d.steps; s++) {
                draw(r, s, z);
                for (int j = 0; j < DIM; j++) {
                    if (s == 0) x[j] = d.from_noise ? hypot(at.alpha, at.sigma) * (double)z[j]
                                                    : (double)b.x[r * DIM + j] / b.in;
                    else x[j] += -d.step * k * x[j] + sqrt(2 * d.step) * (double)z[j];
                }
            }
            for (int j = 0; j < DIM; j++) {
                low += k * pow((double)b.x[r * DIM + j] / b.in, 2) / (2 * N);
                high += k * x[j] * x[j] / (2 * N);
            }
        }
        near(ask(ctx, net, df_objective_contrastive, &d, &b, grad), low - high, tight);
        near((double)grad[0], 2 * (low - high) / g, 4 * tight);
        d.step = 0;
        expect(isnan(ask(ctx, net, df_objective_contrastive, &d, &b, NULL)) && said(ctx, "step above 0"));
        d.step = .1, d.probes = 1;
        expect(isnan(ask(ctx, net, df_objective_contrastive, &d, &b, NULL)) && said(ctx, "probes 0 to 0"));
        df_net_free(net);
    }
    df_ctx_free(ctx);
}

// In the trainer: the variance of a Gaussian, from an energy ten times too narrow, while the
// average stays behind. Langevin's own variance is v/(1 - h/(2v)), so g^2 = 1/v less h/2 in
// truth's place; data noised to t = .05 of flow has v = .95^2 v_0 + .05^2.
TEST(contrastive_trains) {
    df_ctx *ctx = new_ctx(2, NULL);
    enum { ROW = 4096 };
    static df_real data[ROW * DIM];
    df_random_normal(2, 0, 0, ROW * DIM, data);
    for (int from_noise = 0; from_noise < 2; from_noise++) {
        df_train_desc d = df_train_defaults();
        df_objective_desc cd = df_objective_defaults();
        double v = 0;
        for (int i = 0; i < ROW * DIM; i++) v += pow((double)data[i], 2) / (ROW * DIM);
        v = .95 * .95 * v + .05 * .05;
        df_net *net = gain_net(ctx, DIM, sqrt(10 / v));
        cd.from_noise = from_noise;
        cd.steps = 10, cd.step = .1;
        d.card.prediction = DF_SCORE;
        d.t_min = .05, d.t_max = .05 + 1e-9;
        d.scaling = DF_SCALING_NONE;
        d.objective = df_objective_contrastive, d.objective_self = &cd;
        d.batch = 512, d.steps = 400, d.learning_rate = .03, d.validation = d.weight_decay = 0;
        d.ema = .9999, d.ema_warmup = 0;
        df_trainer *tr = df_trainer_create(ctx, net, data, ROW, NULL, &d);
        check(tr && df_trainer_run(tr, 0) == DF_OK, "%s", df_ctx_message(ctx));
        // where the chain keeps the variance v: (1 - h k)^2 v + 2 h = v, k = 1/v + h k^2/2
        double k = pow((double)df_net_weights(net)[0], 2), h = cd.step, want = 1 / v;
        for (int i = 0; i < 50; i++) want = 1 / v + h * want * want / 2;
        near_rel(k, want, .05);
        df_trainer_free(tr);
        df_net_free(net);
    }
    df_ctx_free(ctx);
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN(likelihood_weight);
    RUN(weights);
    RUN(lambda_density);
    RUN(importance);
    RUN(hybrid);
    RUN(implicit);
    RUN(any_prediction);
    RUN(energy);
    RUN(energy_of_odd_nets);
    RUN(other_channels);
    RUN(contrastive);
    RUN(contrastive_trains);
    return test_end();
}
