// Training: optimiser against recorded steps, weightings and densities by what the net is
// asked, the loss against its known least value, bitwise equality over threads and resuming,
// what goes wrong, failing memory, 8 gaussians.
#include "diffusion.h"
#include "test.h"
#include "counting.h"
#include "golden_nets.h"
#include <signal.h>
#include <time.h>

enum { IS_DOUBLE = sizeof(df_real) == 8 };

static df_net *small_net(df_ctx *ctx, int dim, int width, int classes) {
    df_mlp_desc d = df_mlp_defaults();
    d.dim = dim;
    d.width = width;
    d.depth = 2;
    d.embed = 16;
    d.classes = classes;
    d.time_scale = 20;
    d.seed = 3;
    return df_mlp_create(ctx, &d);
}

// ---- the optimiser by itself ----

static void real_of(const nets_case *c, const char *name, df_real *out) {
    const nets_array *a = nets_find(c, name);
    for (long i = 0; a != NULL && i < a->size; i++) out[i] = (df_real)(float)a->v[i];
    check(a != NULL, "%s: no array %s", c->name, name);
}

// Both tensors of a case in one flat array, as in a net; recorded after each of five steps.
static int adamw_case(df_ctx *ctx, const nets_case *c) {
    enum { W = 12, N = 17 };
    df_real w[N], m[N] = {0}, v[N] = {0}, g[N];
    df_adamw a;
    a.learning_rate = nets_number(c, "lr", 0);
    a.beta1 = nets_number(c, "beta1", 0);
    a.beta2 = nets_number(c, "beta2", 0);
    a.eps = nets_number(c, "eps", 0);
    a.weight_decay = nets_number(c, "weight_decay", 0);
    real_of(c, "w0", w);
    real_of(c, "b0", w + W);
    for (int k = 1; k <= 5; k++) {
        char name[4][32];
        snprintf(name[0], 32, "grad_w:%d", k);
        snprintf(name[1], 32, "grad_b:%d", k);
        snprintf(name[2], 32, "w_f64:%d", k);
        snprintf(name[3], 32, "b_f64:%d", k);
        real_of(c, name[0], g);
        real_of(c, name[1], g + W);
        for (int i = 0; i < N; i++) g[i] *= 4;         // grad_scale takes it out again
        df_adamw_step(ctx, &a, k, N, w, m, v, g, 0.25);
        near_all(w, nets_find(c, name[2])->v, W, IS_DOUBLE ? 1e-13 : 2e-6);
        near_all(w + W, nets_find(c, name[3])->v, N - W, IS_DOUBLE ? 1e-13 : 2e-6);
    }
    return 1;
}

static int clip_case(df_ctx *ctx, const nets_case *c) {
    df_real g[19], want[19];
    double norm, factor, limit = nets_number(c, "max_norm", 0);
    real_of(c, "a", g);
    real_of(c, "b", g + 12);
    factor = df_clip_factor(ctx, 19, g, limit, &norm);
    near(norm, nets_find(c, "norm")->v[0], 1e-6);
    real_of(c, "a_clipped", want);
    real_of(c, "b_clipped", want + 12);
    for (int i = 0; i < 19; i++) g[i] *= (df_real)factor;
    near_all(g, want, 19, 2e-6);
    return 1;
}

// Names that begin with ema_: "ramp" is our warm-up; "constant" our plain decay.
static int ema_case(df_ctx *ctx, const nets_case *c) {
    df_real average[6], w[6];
    double decay = nets_number(c, "decay", 0);
    int constant = strcmp(c->name, "ema_constant") == 0;
    real_of(c, "value:0", average);
    for (int k = 1; k <= 5; k++) {
        char name[32];
        double d = constant ? decay : df_ema_warmup(decay, k - 1);
        snprintf(name, sizeof name, "decay_used:%d", k);
        if (!constant) near(d, nets_find(c, name) ? nets_find(c, name)->v[0]
                                                   : nets_number(c, name, -1), 1e-15);
        snprintf(name, sizeof name, "value:%d", k);
        real_of(c, name, w);
        df_ema_step(ctx, 6, average, w, d);
        snprintf(name, sizeof name, "ema:%d", k);
        near_all(average, nets_find(c, name)->v, 6, 2e-6);
    }
    return 1;
}

TEST(recorded) {
    df_ctx *ctx = new_ctx(2, NULL);
    FILE *f = nets_open("optim/optim.txt");
    nets_case *c = (nets_case *)malloc(sizeof *c);
    int seen = 0;
    if (!check(f != NULL, "optim/optim.txt is missing")) return;
    while (nets_read(f, c)) {
        if (strncmp(c->name, "adamw", 5) == 0) seen += adamw_case(ctx, c);
        if (strcmp(c->name, "adam") == 0) seen += adamw_case(ctx, c);
        if (strncmp(c->name, "clip_grad_norm", 14) == 0) seen += clip_case(ctx, c);
        if (strcmp(c->name, "ema_ramp") == 0 || strcmp(c->name, "ema_constant") == 0)
            seen += ema_case(ctx, c);
        nets_free(c);
    }
    check(seen == 9, "%d cases", seen);
    free(c);
    fclose(f);
    df_ctx_free(ctx);
}

// A frozen parameter keeps its bits, in the average too, whatever the decay; the others train
// as if it were a constant: a net whose frozen factors are 1 goes as one without them.
static df_tensor *forward_factors(const df_run *run, df_tensor *x, df_tensor *t,
                                  const int *labels) {
    int n = df_net_count(run->net);
    (void)t, (void)labels;
    for (int i = 0; i < n; i++) x = df_mul(run->ctx, x, df_run_param(run, i));
    return x;
}
TEST(frozen) {
    static const char *const name[6] = {"f0", "a", "b", "f1", "f2", "c"};
    df_ctx *ctx = new_ctx(2, NULL);
    int two[1] = {2};
    df_real data[64], w[2][12];
    double norm[2];
    df_random_normal(4, 0, 0, 64, data);
    for (int k = 0; k < 2; k++) {
        df_train_info info;
        df_train_desc d = df_train_defaults();
        d.steps = 30;
        d.batch = 8;
        d.weight_decay = 1;
        d.learning_rate = .05;
        d.warmup = 0;
        d.clip = .5;
        d.validation = 0;
        df_net *net = df_net_create(ctx, "factors", 1, two, forward_factors, 1);
        for (int i = 0; i < 6; i++) {
            int freeze = name[i][0] == 'f';
            if (k == 1 && freeze) continue;
            int index = df_net_add(ctx, net, name[i], 1, two, DF_INIT_ONE);
            if (freeze) df_net_freeze(net, index);
        }
        size_t at = 0, size = df_net_size(net);
        if (k == 0) {
            expect(df_net_span(net, &at) == 4 && at == 2);
            at += 4;
            expect(df_net_span(net, &at) == 2 && at == 10);
            at += 2;
            expect(df_net_span(net, &at) == 0);
        } else {
            expect(df_net_span(net, &at) == 6 && at == 0);
        }
        df_trainer *tr = df_trainer_create(ctx, net, data, 32, NULL, &d);
        check(tr && df_trainer_run(tr, 0) == DF_OK, "%s", df_ctx_message(ctx));
        df_trainer_info(tr, &info);
        norm[k] = info.gradient_norm;
        for (int i = 0, j = 0; i < df_net_count(net); i++) {
            const df_param *p = df_net_param(net, i);
            const df_real *a = df_net_average(net) + p->offset;
            if (!p->frozen) memcpy(&w[k][2 * j++], df_net_weights(net) + p->offset, 2 * sizeof *a);
            else expect(a[0] == 1 && a[1] == 1 && df_net_weights(net)[p->offset] == 1);
        }
        expect(size == (k == 0 ? 12 : 6) && df_net_trained(net) == 6);
        df_trainer_free(tr);
        for (int i = 0; i < df_net_count(net); i++) df_net_freeze(net, i);
        expect(df_trainer_create(ctx, net, data, 32, NULL, &d) == NULL && says(ctx, "to train"));
        df_net_free(net);
    }
    near_all(w[0], w[1], 6, IS_DOUBLE ? 1e-13 : 1e-6);
    near_rel(norm[0], norm[1], IS_DOUBLE ? 1e-12 : 1e-5);
    expect(fabs((double)w[0][0] - 1) > .05);
    size_t at = 0;
    expect(df_net_span(NULL, &at) == 0);
    df_ctx_free(ctx);
}

// Long arrays: against double loops, and the same bits on any number of threads.
TEST(optimiser_threads) {
    enum { N = 100003 };
    df_real *a[3], *w[3], *m[3], *v[3], *g = (df_real *)malloc(N * sizeof *g);
    double norm[3], factor[3], sum = 0;
    df_adamw s = {1e-2, .9, .99, 1e-8, .1};
    df_random_normal(1, 1, 1, N, g);
    for (int i = 0; i < 3; i++) {
        df_ctx *ctx = new_ctx(i + 1, NULL);
        df_real **list[4] = {&a[i], &w[i], &m[i], &v[i]};
        for (int j = 0; j < 4; j++) *list[j] = (df_real *)calloc(N, sizeof *g);
        df_random_normal(2, 1, 1, N, w[i]);
        factor[i] = df_clip_factor(ctx, N, g, 1, &norm[i]);
        for (int k = 1; k < 4; k++) {
            df_adamw_step(ctx, &s, k, N, w[i], m[i], v[i], g, factor[i]);
            df_ema_step(ctx, N, a[i], w[i], df_ema_warmup(.999, k));
        }
        expect(norm[i] == norm[0]);
        same_bits(w[i], w[0], N * sizeof *g);
        same_bits(a[i], a[0], N * sizeof *g);
        near(df_clip_factor(ctx, N, g, 0, NULL), 1, 0);
        near(df_clip_factor(ctx, N, g, 1e6, NULL), 1, 0);
        df_ctx_free(ctx);
    }
    for (int i = 0; i < N; i++) sum += (double)g[i] * (double)g[i];
    near_rel(norm[0], sqrt(sum), 1e-6);
    near_rel(factor[0], 1 / (norm[0] + 1e-6), 1e-12);
    near(df_ema_warmup(.9, 1000), .9, 0);
    near(df_ema_warmup(.999, 1), 2.0 / 11, 1e-15);
    for (int i = 0; i < 3; i++) free(a[i]), free(w[i]), free(m[i]), free(v[i]);
    free(g);
}

// ---- what the net is asked ----

// A net that answers w x with w = 0, hence 0, and keeps what it saw.
enum { SEEN = 40000 };
static struct { df_ctx *ctx; int n; df_real x[SEEN], t[SEEN]; int label[SEEN]; } seen;
static df_tensor *forward_spy(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    if (x == NULL) return NULL;
    // a trainer measures a net in a context of its own: not looked at
    for (int i = 0; run->ctx == seen.ctx && i < x->shape[0] && seen.n < SEEN; i++, seen.n++) {
        seen.x[seen.n] = x->data[(size_t)i * x->size / (size_t)x->shape[0]];
        seen.t[seen.n] = t->data[i];
        seen.label[seen.n] = labels != NULL ? labels[i] : -2;
    }
    return df_mul(run->ctx, x, df_run_param(run, 0));
}
static df_net *spy_net(df_ctx *ctx, int dim) {
    int one[1] = {1};
    df_net *net = df_net_create(ctx, "spy", 1, &dim, forward_spy, 0);
    if (net != NULL && df_net_add(ctx, net, "w", 1, one, DF_INIT_ZERO) < 0) return NULL;
    seen.n = 0;
    seen.ctx = ctx;
    return net;
}

// Held-out loss at one time t on data 0: w b^2 E eps^2, the same draws for every weighting.
static double loss_at(df_ctx *ctx, const df_card *card, df_weighting weighting, double t) {
    static df_real zeros[200];
    df_train_desc d = df_train_defaults();
    double loss = -1;
    d.card = *card;
    d.weighting = weighting;
    d.t_min = t;
    d.t_max = t + 1e-9;
    d.validation = .9;
    d.scaling = DF_SCALING_NONE;
    df_net *net = spy_net(ctx, 1);
    df_trainer *tr = df_trainer_create(ctx, net, zeros, 200, NULL, &d);
    check(tr != NULL && df_trainer_validate(tr, &loss) == DF_OK, "%s", df_ctx_message(ctx));
    df_trainer_free(tr);
    df_net_free(net);
    return loss;
}

// The ratio of two weightings' losses is the weight: a weight on x_0 times (d x_0/d pred)^2.
TEST(weightings) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_process process[5] = {df_process_vp(.1, 20), df_process_flow(), df_process_edm(80),
                             df_process_trig(.5), df_process_ve(.01, 50)};
    static const double times[4] = {.08, .3, .6, .9};
    for (int i = 0; i < 5; i++)
        for (int k = 0; k < DF_PREDICTION_COUNT; k++)
            for (int j = 0; j < 4; j++) {
                df_card c = df_card_defaults();
                double t = times[j], cx, cp, sd;
                c.process = process[i];
                c.prediction = (df_prediction)k;
                if (k == DF_VELOCITY) c.clock = df_time_affine(-3, 1);
                df_point at = df_process_at(&c.process, t);
                double snr = at.alpha * at.alpha / (at.sigma * at.sigma), most = snr < 5 ? snr : 5;
                sd = c.process.sigma_data;
                // on the prediction's own terms: a row b = 0 gives no loss on data 0
                expect(df_plane_map(ctx, &c.process, c.prediction, DF_X0, &at, &cx, &cp) == 0);
                if (k == DF_VELOCITY) cp *= -3;
                if (k == DF_X0) continue;
                double uniform = loss_at(ctx, &c, DF_WEIGHT_UNIFORM, t);
                double min_snr = loss_at(ctx, &c, DF_WEIGHT_MIN_SNR, t) / uniform;
                double edm = loss_at(ctx, &c, DF_WEIGHT_EDM, t) / uniform;
                near_rel(min_snr, most * cp * cp, 2e-5);
                near_rel(edm, (1 / snr + sd * sd) * snr / (sd * sd) * cp * cp, 2e-5);
                if (k == DF_EPS) near_rel(min_snr, most / snr, 2e-5);
                if (k == DF_V && i == 0) near_rel(min_snr, most / (snr + 1), 2e-5);
                if (k == DF_EDM_F) near_rel(edm, 1, 2e-5);
            }
    df_ctx_free(ctx);
}

// The target itself: at one t, loss of the zero net = mean (a x_0 + b eps)^2, sign and clock
// by the net asked with data of one value.
TEST(targets) {
    df_ctx *ctx = new_ctx(1, NULL);
    enum { N = 20000 };
    df_real *data = (df_real *)malloc(N * sizeof *data);
    for (int i = 0; i < N; i++) data[i] = 2;
    for (int k = 0; k < DF_PREDICTION_COUNT; k++) {
        df_train_desc d = df_train_defaults();
        double row[2], loss, rate = 1, t = .4;
        d.card.process = df_process_vp(.1, 20);
        d.card.prediction = (df_prediction)k;
        d.card.time = df_time_log_sigma(.25);
        d.card.input_sigma_data = k == DF_EDM_F ? .5 : 0;
        if (k == DF_VELOCITY) d.card.clock = df_time_affine(rate = -2, 1);
        d.t_min = t;
        d.t_max = t + 1e-9;
        d.validation = .98;
        d.scaling = DF_SCALING_NONE;
        df_net *net = spy_net(ctx, 1);
        df_trainer *tr = df_trainer_create(ctx, net, data, N, NULL, &d);
        if (!check(tr != NULL && df_trainer_validate(tr, &loss) == DF_OK, "%s",
                   df_ctx_message(ctx))) continue;
        df_point at = df_process_at(&d.card.process, t);
        expect(df_plane_row(ctx, &d.card.process, d.card.prediction, &at, row) == DF_OK);
        double a = row[0] / rate, b = row[1] / rate;
        // E = 4 a^2 + b^2, its deviation over n sqrt(16 a^2 b^2 + 2 b^4)
        near_abs(loss, 4 * a * a + b * b,
                 1e-5 + 6 * sqrt((16 * a * a * b * b + 2 * b * b * b * b) / seen.n));
        double c = k == DF_EDM_F ? 1 / sqrt(at.alpha * at.alpha * .25 + at.sigma * at.sigma) : 1;
        double mean = 0, square = 0;
        for (int i = 0; i < seen.n; i++) mean += (double)seen.x[i] / seen.n;
        for (int i = 0; i < seen.n; i++) square += pow((double)seen.x[i] - mean, 2) / seen.n;
        near_abs(mean, 2 * c * at.alpha, 6 * c * at.sigma / sqrt(seen.n));
        near_rel(square, c * c * at.sigma * at.sigma, 6 * sqrt(2.0 / seen.n));
        near(seen.t[0], .25 * log(at.sigma / at.alpha), 1e-6);
        // held-out draws are not those of training
        double held = (double)seen.x[0];
        seen.n = 0;
        expect(df_trainer_run(tr, 1) == DF_OK && fabs((double)seen.x[0] - held) > 1e-4);
        df_trainer_free(tr);
        df_net_free(net);
    }
    free(data);
    df_ctx_free(ctx);
}

// Times by their density; 6 standard deviations everywhere.
TEST(densities) {
    df_ctx *ctx = new_ctx(2, NULL);
    enum { N = 30000, T = 10 };
    df_real *data = (df_real *)calloc(N, sizeof *data);
    for (int k = 0; k < 6; k++) {
        df_train_desc d = df_train_defaults();
        double loss, mean = 0, square = 0, want_mean, want_var, fourth = 3;
        double betas[T];
        long count[T + 1] = {0};
        d.validation = .99;
        d.batch = 1000;
        d.scaling = DF_SCALING_NONE;
        d.density = (df_density)(k % 4);
        d.density_mean = d.density == DF_DENSITY_LOG_NORMAL ? -1.2 : .5;
        d.density_std = 1.2;
        if (k == 4) d.t_min = .2, d.t_max = .6;
        if (k == 5) d.t_min = .3, d.t_max = .7;         // logit-normal, clipped
        if (d.density == DF_DENSITY_LOG_NORMAL) d.card.process = df_process_edm(80);
        if (d.density == DF_DENSITY_LOG_NORMAL) d.card.prediction = DF_EDM_F;
        if (d.density == DF_DENSITY_INDEX) {
            expect(df_betas(ctx, DF_BETAS_LINEAR, .001, .2, T, betas) == DF_OK);
            expect(df_process_table(ctx, betas, T, &d.card.process) == DF_OK);
            d.card.prediction = DF_EPS;
            d.card.time = df_time_index(T);
        }
        df_net *net = spy_net(ctx, 1);
        df_trainer *tr = df_trainer_create(ctx, net, data, N, NULL, &d);
        if (!check(tr != NULL && df_trainer_validate(tr, &loss) == DF_OK, "%s",
                   df_ctx_message(ctx))) continue;
        expect(seen.n == (int)(.99 * N));
        double least = k == 4 ? .2 : k == 5 ? .3 : 0, most = k == 4 ? .6 : k == 5 ? .7 : 1;
        long ends = 0;
        for (int i = 0; i < seen.n; i++) {
            double t = (double)seen.t[i], u = t;
            if (k == 1) u = log(t / (1 - t));
            if (k == 2) u = log(80 * t);
            if (k == 3) {
                expect(t == floor(t) && t >= 0 && t < T);
                count[t >= 0 && t < T ? (int)t : T]++;
            }
            else if (t < least - 1e-7 || t > most + 1e-7) ends = -N;
            if (k == 5) ends += t <= least + 1e-7 || t >= most - 1e-7;
            mean += u / seen.n;
            square += u * u / seen.n;
        }
        square -= mean * mean;
        want_mean = k == 0 ? .5 : k == 1 ? .5 : k == 2 ? -1.2 : k == 3 ? (T - 1) / 2.0 : .4;
        want_var = k == 0 ? 1 / 12.0 : k < 3 ? 1.44 : k == 3 ? (T * T - 1) / 12.0 : .16 / 12;
        if (k == 0 || k >= 3) fourth = 1.8;
        if (k == 5) {
            // P(logit t outside (logit .3, logit .7)), N(.5, 1.2^2)
            double z = log(.7 / .3), p = .5 * erfc((z - .5) / 1.2 / sqrt(2)) +
                                         .5 * erfc((z + .5) / 1.2 / sqrt(2));
            near_abs((double)ends / seen.n, p, 6 * sqrt(p * (1 - p) / seen.n));
        } else {
            expect(ends == 0);
            near_abs(mean, want_mean, 6 * sqrt(want_var / seen.n));
            near_rel(square, want_var, 6 * sqrt((fourth - 1) / seen.n));
        }
        for (int i = 0; k == 3 && i < T; i++)
            near_abs((double)count[i], seen.n / (double)T, 6 * sqrt(seen.n * .09));
        df_trainer_free(tr);
        df_net_free(net);
    }
    free(data);
    df_ctx_free(ctx);
}

// Rows are told apart by their value (t so small that x_t is the row): every epoch walks all
// that is not held out, once, in an order of its own; labels stay with rows or drop out.
TEST(epochs) {
    df_ctx *ctx = new_ctx(3, NULL);
    enum { N = 500, HELD = 50, KEPT = N - HELD, B = 64 };
    df_real data[N];
    int labels[N], times[N] = {0}, order[2][KEPT], moved = 0, dropped = 0;
    for (int i = 0; i < N; i++) data[i] = (df_real)i, labels[i] = 7 * i;
    df_train_desc d = df_train_defaults();
    d.t_min = 0;
    d.t_max = 1e-5;
    d.batch = B;
    d.validation = .1;
    d.scaling = DF_SCALING_NONE;
    d.label_dropout = .25;
    d.validate_every = 0;
    d.learning_rate = 0;
    df_net *net = spy_net(ctx, 1);
    df_trainer *tr = df_trainer_create(ctx, net, data, N, labels, &d);
    expect(tr != NULL && df_trainer_run(tr, 2 * KEPT / B + 1) == DF_OK);
    expect(seen.n >= 2 * KEPT);
    for (int i = 0; i < 2 * KEPT; i++) {
        int row = (int)floor((double)seen.x[i] + .5);
        times[row]++;
        order[i / KEPT][i % KEPT] = row;
        if (seen.label[i] == -1) dropped++;
        else expect(seen.label[i] == 7 * row);
        if (i == KEPT - 1)
            for (int j = 0; j < N; j++) expect(times[j] <= 1);
    }
    for (int i = 0; i < KEPT; i++) moved += order[0][i] != order[1][i];
    expect(moved > KEPT * 9 / 10);
    near_abs(dropped, .25 * 2 * KEPT, 6 * sqrt(2 * KEPT * .25 * .75));
    int held = 0;
    double loss;
    for (int i = 0; i < N; i++) held += times[i] == 0, expect(times[i] == 0 || times[i] == 2);
    expect(held == HELD);
    seen.n = 0;
    expect(df_trainer_validate(tr, &loss) == DF_OK && seen.n == HELD);
    for (int i = 0; i < HELD; i++) {
        int row = (int)floor((double)seen.x[i] + .5);
        expect(times[row] == 0 && seen.label[i] == 7 * row);
    }
    df_trainer_free(tr);
    df_net_free(net);
    df_ctx_free(ctx);
}

TEST(scaling) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_real data[8] = {1, 10, 2, 10, 3, 10, 6, 10};
    for (int k = 0; k < 3; k++) {
        df_train_desc d = df_train_defaults();
        d.scaling = (df_scaling)k;
        d.validation = 0;
        df_net *net = small_net(ctx, 2, 8, 0);
        df_trainer *tr = df_trainer_create(ctx, net, data, 4, NULL, &d);
        df_model m = df_net_model(net);
        expect(tr != NULL && m.scaling_size == k);
        if (k == 1) {              // of 1, 2, 3, 6 and four 10
            near(m.mean[0], 6.5, 1e-15);
            near(m.scale[0], sqrt(450 / 8.0 - 42.25), 1e-14);
        }
        if (k == 2) {
            near(m.mean[0], 3, 1e-15);
            near(m.scale[0], sqrt(3.5), 1e-15);
            near(m.mean[1], 10, 1e-15);
            near(m.scale[1], 1, 0);        // a constant column keeps its size
        }
        df_trainer_free(tr);
        df_net_free(net);
    }
    df_ctx_free(ctx);
}

// ---- the least loss ----

// On N(0, 1) and rectified flow E[eps - x_0 | x_t] = x_t (2t-1)/(2t^2-2t+1), and what is left
// of the loss is int dt/(2t^2-2t+1) = pi/2. The exact answer as a net has the loss on the same
// held-out draws that the trained one is measured by.
static df_tensor *forward_exact(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    df_ctx *ctx = run->ctx;
    int column[2] = {x != NULL ? x->shape[0] : 1, 1};
    (void)labels;
    t = df_reshape(ctx, t, 2, column);
    df_tensor *q = df_affine(ctx, df_sub(ctx, df_square(ctx, t), t), 2, 1);
    return df_add(ctx, df_mul(ctx, x, df_div(ctx, df_affine(ctx, t, 2, -1), q)),
                  df_mul(ctx, x, df_run_param(run, 0)));
}

TEST(least_loss) {
    df_ctx *ctx = new_ctx(2, NULL);
    enum { N = 20000 };
    df_real *data = (df_real *)malloc(N * sizeof *data);
    df_train_desc d = df_train_defaults();
    double exact, trained, before;
    int one[1] = {1};
    df_random_normal(1, 1, 1, N, data);
    for (int i = 0; i < N; i++) data[i] = 3 + 2 * data[i];
    d.validation = .5;
    d.validate_every = 0;
    d.batch = 128;
    d.steps = 800;
    d.learning_rate = 3e-3;
    d.warmup = 20;
    d.ema = .99;
    df_net *best = df_net_create(ctx, "exact", 1, one, forward_exact, 0);
    df_net_add(ctx, best, "w", 1, one, DF_INIT_ZERO);
    df_trainer *tr = df_trainer_create(ctx, best, data, N, NULL, &d);
    expect(df_trainer_validate(tr, &exact) == DF_OK);
    df_trainer_free(tr);
    near_abs(exact, 1.5707963267948966, 6 * 2.5 / sqrt(N / 2.0));
    df_net *net = small_net(ctx, 1, 32, 0);
    tr = df_trainer_create(ctx, net, data, N, NULL, &d);
    expect(df_trainer_validate(tr, &before) == DF_OK);
    check(df_trainer_run(tr, 0) == DF_OK, "%s", df_ctx_message(ctx));
    expect(df_trainer_validate(tr, &trained) == DF_OK);
    // cross terms with the noise have deviation 2 sqrt(excess / n)
    check(before > 1.7 && trained - exact < .01 && trained - exact > -.005,
          "loss %.4f at the start, %.4f trained, %.4f at best", before, trained, exact);
    df_train_info info;
    expect(df_trainer_info(tr, &info) == DF_OK);
    expect(info.step == 800 && info.steps == 800 && info.gradient_norm > 0);
    near_abs(info.loss, exact, .25);
    near_rel(info.learning_rate, 3e-5, .01);
    expect(info.validation < 0);
    df_trainer_free(tr);
    df_net_free(net);
    df_net_free(best);
    free(data);
    df_ctx_free(ctx);
}

// ---- bit for bit ----

typedef struct watch {
    int calls, stop_at, code;
    double loss[64], validation[64];
    df_trainer *tr;              // saved into `file` in the middle of the second report
    df_buffer *file;
} watch;
static int on_step(void *user, const df_train_info *info) {
    watch *w = (watch *)user;
    if (w->calls < 64) {
        w->loss[w->calls] = info->loss;
        w->validation[w->calls] = info->validation;
    }
    if (w->calls == 1 && w->file != NULL)
        expect(df_trainer_save(w->tr, df_sink_buffer(w->file)) == DF_OK);
    return ++w->calls == w->stop_at ? w->code : 0;
}

enum { ROWS = 300 };
static void ring_data(df_real *data, int *labels) {
    for (int i = 0; i < ROWS; i++) {
        labels[i] = i % 4;
        df_random_normal(9, (uint64_t)i, 0, 2, data + 2 * i);
        data[2 * i + i % 2] += i % 4 > 1 ? 5 : -5;
    }
}
static df_train_desc train_desc(watch *w) {
    df_train_desc d = df_train_defaults();
    memset(w, 0, sizeof *w);
    d.batch = 37;
    d.steps = 40;
    d.warmup = 7;
    d.validation = .2;
    d.validate_every = 15;
    d.report = 6;
    d.label_dropout = .1;
    d.on_step = on_step;
    d.user = w;
    return d;
}

// One trainer with its context, net and data; `where` tells two apart.
typedef struct setup {
    df_ctx *ctx;
    df_net *net;
    df_trainer *tr;
    df_real data[2 * ROWS];
    int labels[ROWS];
    watch w;
    df_train_desc d;
} setup;
static setup *begin(int threads) {
    setup *s = (setup *)calloc(1, sizeof *s);
    s->ctx = new_ctx(threads, NULL);
    s->net = small_net(s->ctx, 2, 24, 4);
    s->d = train_desc(&s->w);
    ring_data(s->data, s->labels);
    return s;
}
static setup *ready(int threads) {
    setup *s = begin(threads);
    s->tr = df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d);
    check(s->tr != NULL, "%s", df_ctx_message(s->ctx));
    return s;
}
static void end(setup *s) {
    df_trainer_free(s->tr);
    df_net_free(s->net);
    df_ctx_free(s->ctx);
    free(s);
}
// Everything a run depends on, as bytes: weights, average, moments, counters, losses.
static df_buffer state(setup *s) {
    df_buffer b;
    memset(&b, 0, sizeof b);
    check(df_trainer_save(s->tr, df_sink_buffer(&b)) == DF_OK, "%s", df_ctx_message(s->ctx));
    return b;
}
static void same_state(setup *a, setup *b) {
    df_buffer x = state(a), y = state(b);
    expect(x.size == y.size && x.size > 1000 && memcmp(x.data, y.data, x.size) == 0);
    df_buffer_free(a->ctx, &x);
    df_buffer_free(b->ctx, &y);
}

TEST(threads) {
    setup *s[3];
    for (int i = 0; i < 3; i++) {
        s[i] = ready(i + 1);
        check(df_trainer_run(s[i]->tr, 30) == DF_OK, "%s", df_ctx_message(s[i]->ctx));
        expect(s[i]->w.calls == 5 && s[i]->w.validation[4] > 0);
        same_bits(s[i]->w.loss, s[0]->w.loss, sizeof s[i]->w.loss);
        same_bits(s[i]->w.validation, s[0]->w.validation, sizeof s[i]->w.validation);
        same_state(s[i], s[0]);
    }
    expect(memcmp(df_net_average(s[0]->net), df_net_weights(s[0]->net), 64) != 0);
    for (int i = 0; i < 3; i++) end(s[i]);
}

// 40 steps straight, against 20, a file, and 20 more on another number of threads.
// An objective that says again what the denoising loss is trains to the same bits; its own
// noise is the item's, however a batch is cut.
typedef struct asked {
    int calls, bad;
    double sum;
    df_real first[4];
} asked;
static df_tensor *denoise_again(void *self, const df_run *run, const df_batch *b) {
    asked *a = (asked *)self;
    df_ctx *ctx = run->ctx;
    df_tensor *z = df_batch_normal(run, b, 0, 3), *again = df_batch_normal(run, b, 0, 3);
    if (z == NULL || again == NULL) return NULL;
    a->bad += z->ndim != 2 || z->shape[1] != 3 || memcmp(z->data, again->data, 12) != 0;
    a->bad += df_batch_normal(run, b, 1, 3)->data[0] == z->data[0];
    for (size_t i = 0; i < z->size; i++) a->sum += (double)z->data[i];
    if (a->calls++ == 0) memcpy(a->first, b->x0->data, sizeof a->first);
    // x = alpha x_0 + sigma eps, target eps - x_0 on the path alpha = 1 - t, sigma = t
    for (size_t i = 0; i < b->x->size; i++) {
        double t = (double)b->t->data[i / 2], x0 = (double)b->x0->data[i];
        double eps = (double)b->target->data[i] + x0;
        a->bad += !(fabs((1 - t) * x0 + t * eps - (double)b->x->data[i]) < 1e-5);
    }
    return df_mse(ctx, df_run_net(run, b->x, b->t, b->labels), b->target);
}
static df_tensor *two_numbers(void *self, const df_run *run, const df_batch *b) {
    (void)self;
    return df_run_net(run, b->x, b->t, b->labels);
}
static int model_of_77(void *self, df_ctx *ctx, const df_query *q, df_real *out) {
    (void)ctx;
    memset(out, 0, (size_t)(q->n * q->dim) * sizeof *out);
    return *(const int *)self ? 77 : 0;
}
static df_tensor *asks_a_model(void *self, const df_run *run, const df_batch *b) {
    df_model m = df_model_defaults();
    df_real out[2];
    double t = .5;
    m.predict = model_of_77, m.self = self, m.dim = 2;
    if (df_model_ask(run->ctx, &m, DF_ASK_PREDICT, &t, 1, b->x->data, NULL, NULL, out) != DF_OK)
        return NULL;
    return df_mse(run->ctx, df_run_net(run, b->x, b->t, b->labels), b->target);
}
TEST(objective_of_your_own) {
    asked a[2];
    setup *plain = ready(2);
    expect(df_trainer_run(plain->tr, 30) == DF_OK);
    memset(a, 0, sizeof a);
    for (int i = 0; i < 2; i++) {
        setup *s = begin(1);
        s->d.objective = denoise_again;
        s->d.objective_self = &a[i];
        s->d.rows = i == 0 ? 37 : 5;
        s->d.validation = i == 0 ? .2 : 0;
        s->tr = df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d);
        check(s->tr != NULL, "%s", df_ctx_message(s->ctx));
        memset(&a[i], 0, sizeof a[i]);
        expect(df_trainer_run(s->tr, i == 0 ? 30 : 1) == DF_OK);
        check(a[i].calls > 0 && a[i].bad == 0, "%d bad of %d", a[i].bad, a[i].calls);
        if (i == 0) {
            same_bits(df_net_weights(s->net), df_net_weights(plain->net),
                      df_net_size(s->net) * sizeof(df_real));
            same_bits(s->w.loss, plain->w.loss, sizeof s->w.loss);
            same_bits(s->w.validation, plain->w.validation, sizeof s->w.validation);
        }
        end(s);
    }
    for (int i = 0; i < 2; i++) {              // one step, whole and in parts of 5
        setup *s = begin(1);
        s->d.objective = denoise_again;
        s->d.objective_self = &a[i];
        s->d.rows = i == 0 ? 37 : 5;
        s->d.scaling = DF_SCALING_NONE;
        s->tr = df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d);
        memset(&a[i], 0, sizeof a[i]);
        expect(df_trainer_run(s->tr, 1) == DF_OK);
        int found = 0;
        for (int r = 0; r < ROWS; r++)
            found += memcmp(s->data + 2 * r, a[i].first, 2 * sizeof(df_real)) == 0;
        expect(found == 1 && a[i].calls == (i == 0 ? 1 : 8));
        end(s);
    }
    near(a[0].sum, a[1].sum, 1e-12);
    same_bits(a[0].first, a[1].first, sizeof a[0].first);
    setup *s = begin(1);
    s->d.objective = two_numbers;
    s->tr = df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d);
    expect(s->tr == NULL && strstr(df_ctx_message(s->ctx), "objective made 2 numbers") != NULL);
    end(s);
    for (int late = 0; late < 2; late++) {     // one that asks a model, which fails with 77
        int fails = !late;
        s = begin(1);
        s->d.objective = asks_a_model;
        s->d.objective_self = &fails;
        s->tr = df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d);
        expect((s->tr != NULL) == late);
        fails = 1;
        if (late) expect(df_trainer_run(s->tr, 1) == 77);
        expect(df_ctx_error(s->ctx) == 77);
        check(strstr(df_ctx_message(s->ctx), "predict returned 77") != NULL, "%s",
              df_ctx_message(s->ctx));
        end(s);
    }
    end(plain);
}

TEST(resume) {
    setup *whole = ready(1), *first = ready(2), *second = ready(3);
    expect(df_trainer_run(whole->tr, 0) == DF_OK);
    expect(df_trainer_run(first->tr, 20) == DF_OK);
    df_buffer b = state(first);
    df_net_weights(second->net)[0] = 77;       // all comes from the file
    check(df_trainer_load(second->tr, df_source_memory(b.data, b.size)) == DF_OK, "%s",
          df_ctx_message(second->ctx));
    same_state(first, second);
    expect(df_trainer_run(second->tr, 1000) == DF_OK);         // stops at the end: 40
    same_state(whole, second);
    expect(whole->w.calls == 7 && first->w.calls == 3 && second->w.calls == 4);
    same_bits(whole->w.loss, first->w.loss, 3 * sizeof(double));
    same_bits(whole->w.loss + 3, second->w.loss, 4 * sizeof(double));
    same_bits(whole->w.validation + 3, second->w.validation, 4 * sizeof(double));
    expect(df_trainer_run(second->tr, 0) == DF_OK);            // nothing left to do
    same_state(whole, second);
    // steps one by one; then from a file that was written in the middle of a report
    setup *single = ready(2);
    df_buffer middle;
    memset(&middle, 0, sizeof middle);
    single->w.tr = single->tr;
    single->w.file = &middle;
    for (int i = 0; i < 40; i++) expect(df_trainer_run(single->tr, 1) == DF_OK);
    same_state(whole, single);
    single->w.file = NULL;
    check(df_trainer_load(single->tr, df_source_memory(middle.data, middle.size)) == DF_OK, "%s",
          df_ctx_message(single->ctx));
    df_train_info info;
    df_trainer_info(single->tr, &info);
    expect(info.step == 12);
    expect(df_trainer_run(single->tr, 0) == DF_OK);
    same_state(whole, single);
    df_buffer_free(single->ctx, &middle);
    // the checkpoint is a net's as well
    df_net *net = df_net_load(whole->ctx, df_source_memory(b.data, b.size));
    if (check(net != NULL, "%s", df_ctx_message(whole->ctx))) {
        same_bits(df_net_average(net), df_net_average(first->net),
                  df_net_size(net) * sizeof(df_real));
        expect(df_net_model(net).scaling_size == 1);
    }
    df_net_free(net);
    df_buffer_free(first->ctx, &b);
    end(whole);
    end(first);
    end(second);
    end(single);
}

TEST(refused) {
    static const char *const why[] = {"train.settings", "train.settings", "train.loss",
                                      "train.data", "train.data", "train.data", "'clock'",
                                      "config", "adam.w"};
    setup *from = ready(1);
    expect(df_trainer_run(from->tr, 3) == DF_OK);
    df_buffer b = state(from);
    for (int i = 0; i < 9; i++) {
        setup *s = begin(1);
        if (i == 0) s->d.learning_rate *= 2;
        if (i == 1) s->d.seed = 4;
        if (i == 2) s->d.weighting = DF_WEIGHT_MIN_SNR;
        if (i == 3) s->data[11] += 1;
        if (i == 4) s->labels[7] = 3 - s->labels[7];
        if (i == 6) s->d.card.clock = df_time_affine(-1, 1);
        if (i == 7) df_net_free(s->net), s->net = small_net(s->ctx, 2, 16, 4);
        s->tr = df_trainer_create(s->ctx, s->net, s->data, i == 5 ? ROWS - 1 : ROWS, s->labels,
                                  &s->d);
        if (i == 8)
            for (size_t j = 0; j + 8 < b.size; j++)
                if (memcmp(b.data + j, "\"adam.v\"", 8) == 0) memcpy(b.data + j, "\"adam.w\"", 8);
        df_buffer before = state(s), after;
        expect(df_trainer_load(s->tr, df_source_memory(b.data, b.size)) == DF_ERR_FORMAT);
        check(says(s->ctx, why[i]) && says(s->ctx, "df_trainer_load"), "%d: %s", i,
              df_ctx_message(s->ctx));
        after = state(s);                          // nothing was touched
        expect(before.size == after.size && !memcmp(before.data, after.data, after.size));
        df_buffer_free(s->ctx, &before);
        df_buffer_free(s->ctx, &after);
        end(s);
    }
    df_buffer_free(from->ctx, &b);
    end(from);
}

// ---- a batch in parts ----

// Two convolutions and a skip on [2,8,8]; the first is told the time by a bias of its own.
static df_tensor *forward_conv(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    df_ctx *ctx = run->ctx;
    int column[4] = {x != NULL ? x->shape[0] : 1, 1, 1, 1};
    (void)labels;
    df_tensor *time = df_mul(ctx, df_reshape(ctx, t, 4, column), df_run_param(run, 6));
    df_tensor *h = df_silu(ctx, df_add(ctx, df_run_conv2d(run, 0, x, 1, 1), time));
    h = df_silu(ctx, df_run_conv2d(run, 2, h, 1, 1));
    return df_add(ctx, x, df_run_conv2d(run, 4, h, 1, 1));
}
static df_net *conv_net(df_ctx *ctx, int width) {
    int shape[3] = {2, 8, 8}, bias[3] = {width, 1, 1};
    df_net *net = df_net_create(ctx, "conv", 3, shape, forward_conv, 5);
    df_layer_conv2d(ctx, net, "a", 2, width, 3, DF_INIT_FAN_IN);
    df_layer_conv2d(ctx, net, "b", width, width, 3, DF_INIT_FAN_IN);
    df_layer_conv2d(ctx, net, "c", width, 2, 3, DF_INIT_FAN_IN);
    df_net_add(ctx, net, "time", 3, bias, DF_INIT_NORMAL_02);
    return net;
}
enum { CONV_ROWS = 50, CONV_DIM = 2 * 8 * 8 };

// The gradients of the first step, and losses of a short run whose rate is 0.
typedef struct caught { int calls; df_real *grads; size_t size; int stop; } caught;
static int catch_gradients(void *user, df_net *net, df_real *grads, size_t size) {
    caught *c = (caught *)user;
    expect(size == df_net_size(net));
    if (c->calls++ == 0) {
        c->grads = (df_real *)malloc(size * sizeof *grads);
        c->size = size;
        memcpy(c->grads, grads, size * sizeof *grads);
    }
    return c->stop;
}
typedef struct conv_run { caught c; double loss, held; df_train_info info; } conv_run;
static conv_run conv_train(int threads, df_train_desc d, const df_real *data) {
    conv_run r;
    df_ctx *ctx = new_ctx(threads, NULL);
    df_net *net = conv_net(ctx, 6);
    memset(&r, 0, sizeof r);
    d.on_gradients = catch_gradients;
    d.user = &r.c;
    df_trainer *tr = df_trainer_create(ctx, net, data, CONV_ROWS, NULL, &d);
    check(tr && df_trainer_run(tr, 1) == DF_OK, "%s", df_ctx_message(ctx));
    df_trainer_info(tr, &r.info);
    check(df_trainer_validate(tr, &r.held) == DF_OK, "%s", df_ctx_message(ctx));
    r.loss = r.info.loss;
    df_trainer_free(tr);
    df_net_free(net);
    df_ctx_free(ctx);
    return r;
}
static df_train_desc conv_desc(df_real *data) {
    df_train_desc d = df_train_defaults();
    df_random_normal(8, 0, 0, CONV_ROWS * CONV_DIM, data);
    d.batch = 12;
    d.validation = .5;
    d.learning_rate = 0;
    d.card.prediction = DF_EPS;
    d.weighting = DF_WEIGHT_MIN_SNR;       // a weight that differs from row to row
    return d;
}

// Added over parts, also of unequal size, gradient and loss are those of the whole batch; the
// same bits on any number of threads.
TEST(parts_of_a_batch) {
    static const int rows[5] = {0, 12, 5, 1, 4};
    df_real data[CONV_ROWS * CONV_DIM];
    df_train_desc d = conv_desc(data);
    conv_run whole = conv_train(1, d, data);
    expect(whole.held > 0 && whole.info.gradient_norm > 1e-3);
    for (int i = 0; i < 5; i++) {
        conv_run r[2];
        d.rows = rows[i];
        for (int k = 0; k < 2; k++) r[k] = conv_train(k + 1, d, data);
        near_rel(r[0].loss, whole.loss, IS_DOUBLE ? 1e-13 : 1e-6);
        near_rel(r[0].held, whole.held, IS_DOUBLE ? 1e-13 : 1e-6);
        near_rel(r[0].info.gradient_norm, whole.info.gradient_norm, IS_DOUBLE ? 1e-12 : 1e-5);
        for (size_t j = 0; j < whole.c.size; j++)
            near_abs((double)r[0].c.grads[j], (double)whole.c.grads[j],
                     (IS_DOUBLE ? 1e-13 : 1e-6) * whole.info.gradient_norm);
        same_bits(r[0].c.grads, r[1].c.grads, r[0].c.size * sizeof(df_real));
        expect(r[0].held == r[1].held && r[0].loss == r[1].loss);
        if (i < 2) same_bits(r[0].c.grads, whole.c.grads, r[0].c.size * sizeof(df_real));
        for (int k = 0; k < 2; k++) free(r[k].c.grads);
    }
    free(whole.c.grads);
}

// A net that is told two numbers a row beside its label, and looks whether they belong there:
// rows of data are told apart by their first value, as t is nearly 0.
static struct { df_ctx *ctx; int n, dropped, mirrored, training; uint64_t draw; } told;
enum { TOLD_ROWS = 400, TOLD_DIM = 6 };                // rows of [1,2,3]: r, r+.1 ... r+.5
static df_tensor *forward_told(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    (void)t;
    for (int i = 0; run->ctx == told.ctx && x != NULL && i < x->shape[0]; i++) {
        const df_real *row = x->data + (size_t)i * TOLD_DIM;
        int r = (int)floor((double)row[0] + .001), flip = (double)row[0] - r > .05, good = 1;
        int label = labels != NULL ? labels[i] : -2;
        const df_real *c = run->condition != NULL ? run->condition->data + 2 * i : NULL;
        for (int j = 0; j < TOLD_DIM; j++) {
            int k = flip ? j + 2 - 2 * (j % 3) : j;
            good &= fabs((double)row[j] - r - .1 * k) < .01;
        }
        if (c == NULL) good = 0;
        else if (label == -1) good &= c[0] == 0 && c[1] == 0;
        else good &= label == 3 * r && c[0] == r + 1 && c[1] == -r;
        check(good, "row %d, label %d: x begins %g %g %g, told %g %g", r, label, (double)row[0],
              (double)row[1], (double)row[2], c ? (double)c[0] : NAN, c ? (double)c[1] : NAN);
        told.n++;
        told.dropped += label == -1;
        told.mirrored += flip;
        told.training += run->training;
    }
    if (run->ctx == told.ctx && run->training) {
        expect(run->draw != told.draw);                // dropout is drawn anew for each part
        told.draw = run->draw;
    }
    return df_mul(run->ctx, x, df_run_param(run, 0));
}
static df_net *told_net(df_ctx *ctx, int condition) {
    int one[1] = {1}, shape[3] = {1, 2, 3};
    df_net *net = df_net_create(ctx, "told", 3, shape, forward_told, 0);
    df_net_add(ctx, net, "w", 1, one, DF_INIT_ZERO);
    df_net_set_condition(net, condition);
    memset(&told, 0, sizeof told);
    told.ctx = ctx;
    told.draw = UINT64_MAX;
    return net;
}

TEST(condition_and_flip) {
    df_ctx *ctx = new_ctx(2, NULL);
    df_net *net = told_net(ctx, 2);
    static df_real data[TOLD_ROWS * TOLD_DIM], condition[2 * TOLD_ROWS];
    int labels[TOLD_ROWS], n = 40 * 50;
    double loss;
    df_train_desc d = df_train_defaults();
    df_buffer file;
    memset(&file, 0, sizeof file);
    for (int r = 0; r < TOLD_ROWS; r++) {
        for (int j = 0; j < TOLD_DIM; j++) data[r * TOLD_DIM + j] = (df_real)(r + .1 * j);
        labels[r] = 3 * r;
        condition[2 * r] = (df_real)(r + 1);
        condition[2 * r + 1] = (df_real)-r;
    }
    d.t_min = 0;
    d.t_max = 1e-6;
    d.scaling = DF_SCALING_NONE;
    d.learning_rate = 0;
    d.batch = 50;
    d.rows = 20;                           // 20, 20 and 10
    d.steps = 40;
    d.validate_every = 0;
    d.label_dropout = .3;
    d.flip = .4;
    d.condition = condition;
    df_trainer *tr = df_trainer_create(ctx, net, data, TOLD_ROWS, labels, &d);
    check(tr && df_trainer_run(tr, 0) == DF_OK, "%s", df_ctx_message(ctx));
    expect(told.n == n && told.training == n);
    near_abs(told.dropped, .3 * n, 6 * sqrt(n * .3 * .7));
    near_abs(told.mirrored, .4 * n, 6 * sqrt(n * .4 * .6));
    told.n = told.dropped = told.mirrored = told.training = 0;
    expect(df_trainer_validate(tr, &loss) == DF_OK && told.n == TOLD_ROWS / 20);
    expect(told.dropped == 0 && told.mirrored == 0 && told.training == 0);
    // another condition is another run; NaN in one is found
    expect(df_trainer_save(tr, df_sink_buffer(&file)) == DF_OK);
    condition[11] += 1;
    expect(df_trainer_load(tr, df_source_memory(file.data, file.size)) == DF_ERR_FORMAT);
    expect(says(ctx, "train.data"));
    condition[11] = (df_real)NAN;
    expect(df_trainer_create(ctx, net, data, TOLD_ROWS, labels, &d) == NULL);
    expect(says(ctx, "condition") && says(ctx, "nan in row 5, element 1"));
    df_buffer_free(ctx, &file);
    df_trainer_free(tr);
    df_net_free(net);
    net = told_net(ctx, 0);
    told.ctx = NULL;
    expect(df_trainer_create(ctx, net, data, TOLD_ROWS, labels, &d) == NULL);
    expect(says(ctx, "takes 0 numbers"));
    d.condition = NULL;
    tr = df_trainer_create(ctx, net, data, TOLD_ROWS, labels, &d);
    check(tr != NULL, "%s", df_ctx_message(ctx));
    df_trainer_free(tr);
    df_net_free(net);
    df_ctx_free(ctx);
}

// A condition is learnt from: y = c x trained on rows that are c times one pattern.
TEST(condition_is_learnt) {
    df_ctx *ctx = new_ctx(2, NULL);
    enum { N = 2000 };
    df_real *data = (df_real *)malloc(2 * N * sizeof *data);
    df_real *c = (df_real *)malloc(N * sizeof *c);
    double loss[2];
    df_random_normal(6, 0, 0, N, c);
    for (int i = 0; i < N; i++) data[2 * i] = c[i], data[2 * i + 1] = 2 * c[i];
    for (int k = 0; k < 2; k++) {
        df_mlp_desc md = df_mlp_defaults();
        df_train_desc d = df_train_defaults();
        md.width = 32;
        md.depth = 2;
        md.embed = 16;
        md.condition = 1;
        md.time_scale = 20;
        d.steps = 300;
        d.batch = 64;
        d.validate_every = 0;
        d.condition = k == 0 ? c : NULL;       // NULL: zeros, of which nothing is learnt
        df_net *net = df_mlp_create(ctx, &md);
        df_trainer *tr = df_trainer_create(ctx, net, data, N, NULL, &d);
        check(tr && df_trainer_run(tr, 0) == DF_OK && df_trainer_validate(tr, &loss[k]) == DF_OK,
              "%s", df_ctx_message(ctx));
        df_trainer_free(tr);
        df_net_free(net);
    }
    check(loss[0] < .3 * loss[1], "loss %.3f told, %.3f not", loss[0], loss[1]);
    free(data);
    free(c);
    df_ctx_free(ctx);
}

// A net that says a variance too learns the first half of its channels: its loss is that of
// the net without (both begin as 0), no gradient reaches the second half.
TEST(first_half) {
    static df_real data[32 * 128];
    df_ctx *ctx = new_ctx(2, NULL);
    double loss[2];
    df_random_normal(3, 0, 0, 32 * 128, data);
    for (int k = 0; k < 2; k++) {
        df_dit_desc dit = df_dit_defaults();
        df_train_desc d = df_train_defaults();
        df_train_info info;
        caught c;
        dit.in_channels = 2;
        dit.size = 8;
        dit.width = 32;
        dit.depth = 1;
        dit.heads = 2;
        dit.learn_sigma = k;
        df_net *net = df_dit_create(ctx, &dit);
        memset(&c, 0, sizeof c);
        d.batch = 8;
        d.learning_rate = 0;
        d.validation = 0;
        d.card.learned = k ? DF_LEARNED_NONE : DF_LEARNED_RANGE;
        d.on_gradients = catch_gradients;
        d.user = &c;
        expect(df_trainer_create(ctx, net, data, 32, NULL, &d) == NULL && says(ctx, "of 2"));
        d.card.learned = k ? DF_LEARNED_RANGE : DF_LEARNED_NONE;
        df_trainer *tr = df_trainer_create(ctx, net, data, 32, NULL, &d);
        check(tr && df_trainer_run(tr, 1) == DF_OK, "%s", df_ctx_message(ctx));
        df_trainer_info(tr, &info);
        loss[k] = info.loss;
        const df_param *p = df_net_param(net, df_net_find(net, "final_layer.linear.bias"));
        int channels = k ? 4 : 2;                      // of the data's, then the variance's
        if (check(p != NULL && c.grads != NULL, "no gradient"))
            for (size_t i = 0; i < p->size; i++)
                expect((c.grads[p->offset + i] != 0) == ((int)i % channels < 2));
        free(c.grads);
        df_trainer_free(tr);
        df_net_free(net);
    }
    expect(loss[0] == loss[1] && loss[0] > .5);
    df_ctx_free(ctx);
}

// Two machines in one process: the first hands its gradients over and stops before its step,
// the second takes the mean with its own, the first does that step again with the mean.
enum { GIVE, MEAN, TAKE };
typedef struct machine {
    int turn;
    df_real *exchange;
    df_ctx *ctx;
    df_net *net;
    df_trainer *tr;
} machine;
static int exchange(void *user, df_net *net, df_real *grads, size_t size) {
    machine *m = (machine *)user;
    expect(net == m->net);
    for (size_t i = 0; i < size; i++) {
        if (m->turn == GIVE) m->exchange[i] = grads[i];
        if (m->turn == MEAN) m->exchange[i] = (m->exchange[i] + grads[i]) / 2;
        if (m->turn != GIVE) grads[i] = m->exchange[i];
    }
    return m->turn == GIVE ? 77 : 0;
}
TEST(two_machines) {
    static df_real data[CONV_ROWS * CONV_DIM], shared[10000];
    machine m[3];
    df_train_info info[3];
    df_buffer b;
    memset(&b, 0, sizeof b);
    for (int i = 0; i < 3; i++) {                      // the third is one machine alone
        df_train_desc d = conv_desc(data);
        d.learning_rate = 1e-3;
        d.warmup = 0;
        d.adam_eps = 1e-3;                             // rounding stays rounding
        d.validation = .1;                             // 45 rows: 8 x 12 walks them twice
        d.flip = .5;
        d.steps = 8;
        d.validate_every = 4;
        d.batch = i < 2 ? 6 : 12;
        d.rows = i < 2 ? 4 : 0;
        d.part = i % 2;
        d.parts = i < 2 ? 2 : 1;
        d.on_gradients = i < 2 ? exchange : NULL;
        d.user = &m[i];
        m[i].exchange = shared;
        m[i].ctx = new_ctx(i + 1, NULL);
        m[i].net = conv_net(m[i].ctx, 6);
        m[i].tr = df_trainer_create(m[i].ctx, m[i].net, data, CONV_ROWS, NULL, &d);
        check(m[i].tr != NULL, "%s", df_ctx_message(m[i].ctx));
    }
    size_t size = df_net_size(m[0].net) * sizeof(df_real);
    df_real *before = (df_real *)malloc(size);
    for (int k = 0; k < 8; k++) {
        memcpy(before, df_net_weights(m[0].net), size);
        m[0].turn = GIVE;
        expect(df_trainer_run(m[0].tr, 1) == 77 && says(m[0].ctx, "on_gradients returned 77"));
        same_bits(df_net_weights(m[0].net), before, size);
        m[1].turn = MEAN;
        m[0].turn = TAKE;
        for (int i = 1; i >= 0; i--)
            check(df_trainer_run(m[i].tr, 1) == DF_OK, "%s", df_ctx_message(m[i].ctx));
    }
    expect(df_trainer_run(m[2].tr, 0) == DF_OK);
    for (int i = 0; i < 3; i++) df_trainer_info(m[i].tr, &info[i]);
    same_bits(df_net_weights(m[0].net), df_net_weights(m[1].net), size);
    same_bits(df_net_average(m[0].net), df_net_average(m[1].net), size);
    expect(memcmp(df_net_weights(m[0].net), before, size) != 0);
    near_all(df_net_weights(m[0].net), df_net_weights(m[2].net), df_net_size(m[2].net),
             IS_DOUBLE ? 1e-12 : 2e-6);
    near_rel(info[0].gradient_norm, info[2].gradient_norm, IS_DOUBLE ? 1e-10 : 1e-4);
    near_rel(info[0].validation, info[2].validation, IS_DOUBLE ? 1e-10 : 1e-4);
    near_rel((info[0].loss + info[1].loss) / 2, info[2].loss, IS_DOUBLE ? 1e-10 : 1e-5);
    expect(fabs(info[0].loss - info[1].loss) > 1e-4);
    // one machine's checkpoint serves the other, not one that is alone
    expect(df_trainer_save(m[0].tr, df_sink_buffer(&b)) == DF_OK);
    df_net_weights(m[1].net)[3] = 5;
    check(df_trainer_load(m[1].tr, df_source_memory(b.data, b.size)) == DF_OK, "%s",
          df_ctx_message(m[1].ctx));
    same_bits(df_net_weights(m[0].net), df_net_weights(m[1].net), size);
    expect(df_trainer_load(m[2].tr, df_source_memory(b.data, b.size)) == DF_ERR_FORMAT);
    df_buffer_free(m[0].ctx, &b);
    for (int i = 0; i < 3; i++) {
        df_trainer_free(m[i].tr);
        df_net_free(m[i].net);
        df_ctx_free(m[i].ctx);
    }
    free(before);
}

// As many rows at once as fit: a batch that would take gigabytes stays below a limit, and what
// training takes is known before its first step.
TEST(memory) {
    for (int k = 0; k < (test_short() || IS_DOUBLE ? 3 : 4); k++) {
        df_ctx *ctx = new_ctx(2, NULL);
        df_real *data = (df_real *)calloc(CONV_ROWS, CONV_DIM * sizeof *data);
        df_train_desc d = df_train_defaults();
        df_train_info info;
        df_net *net;
        if (k < 2) {
            df_mlp_desc md = df_mlp_defaults();
            md.dim = CONV_DIM;
            net = df_mlp_create(ctx, &md);
        } else {
            net = conv_net(ctx, k == 2 ? 16 : 64);
        }
        d.batch = k == 3 ? 2000 : k == 1 ? 1000 : 100;
        d.validation = .5;
        d.report = 1;
        df_trainer *tr = df_trainer_create(ctx, net, data, CONV_ROWS, NULL, &d);
        check(tr != NULL && df_trainer_info(tr, &info) == DF_OK, "%s", df_ctx_message(ctx));
        size_t before = df_ctx_peak_bytes(ctx), memory = info.memory;
        check(df_trainer_run(tr, 1) == DF_OK, "%s", df_ctx_message(ctx));
        df_trainer_info(tr, &info);
        expect(info.memory == memory && before < memory);
        double held = (double)df_ctx_peak_bytes(ctx) +
                      2 * (double)(df_net_size(net) * sizeof(df_real));
        near_rel((double)memory, held, .3);
        if (k == 3) check(held < 350e6, "%.0f MiB", held / 1048576);
        df_trainer_free(tr);
        df_net_free(net);
        df_ctx_free(ctx);
        free(data);
    }
}

// ---- what goes wrong ----

TEST(nonfinite) {
    setup *s = begin(2);
    s->data[2 * 17 + 1] = (df_real)NAN;
    expect(df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d) == NULL);
    expect(df_ctx_error(s->ctx) == DF_ERR_NONFINITE && says(s->ctx, "nan in row 17, element 1"));
    s->data[2 * 17 + 1] = (df_real)INFINITY;
    expect(df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d) == NULL);
    expect(says(s->ctx, "inf in row 17, element 1"));
    expect(df_net_average(s->net) == NULL);
    end(s);

    s = ready(2);
    expect(df_trainer_run(s->tr, 5) == DF_OK);
    const df_param *p = df_net_param(s->net, df_net_find(s->net, "hid.1.weight"));
    df_real *w = df_net_weights(s->net), keep = w[p->offset + 5];
    w[p->offset + 5] = (df_real)NAN;
    expect(df_trainer_run(s->tr, 0) == DF_ERR_NONFINITE);
    expect(says(s->ctx, "step 6") && says(s->ctx, "element 5 of 'hid.1.weight'"));
    df_buffer b;
    memset(&b, 0, sizeof b);
    expect(df_trainer_save(s->tr, df_sink_buffer(&b)) == DF_ERR_NONFINITE);
    w[p->offset + 5] = keep;                       // and on it goes
    check(df_trainer_run(s->tr, 0) == DF_OK, "%s", df_ctx_message(s->ctx));
    setup *straight = ready(1);
    expect(df_trainer_run(straight->tr, 0) == DF_OK);
    same_state(s, straight);
    df_buffer_free(s->ctx, &b);
    end(s);
    end(straight);
}

// A learning rate out of all reason: the run stops at the step whose loss or gradient is too
// large to be a number, the weights are those that step started from.
TEST(exploding) {
    setup *s = begin(1);
    df_result result = DF_OK;
    s->d.learning_rate = 1e10;
    s->d.weight_decay = 0;
    s->d.warmup = 0;
    s->d.validate_every = 0;
    s->tr = df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d);
    size_t size = df_net_size(s->net) * sizeof(df_real);
    df_real *before = (df_real *)malloc(size);
    for (int i = 0; i < 40 && result == DF_OK; i++) {
        memcpy(before, df_net_weights(s->net), size);
        result = df_trainer_run(s->tr, 1);
    }
    if (!IS_DOUBLE || result != DF_OK) {           // double may live through 40 such steps
        df_train_info info;
        char step[32];
        df_trainer_info(s->tr, &info);
        snprintf(step, sizeof step, "step %d:", (int)info.step + 1);
        expect(result == DF_ERR_NONFINITE && says(s->ctx, step) && says(s->ctx, "learning_rate"));
        same_bits(df_net_weights(s->net), before, size);
        for (size_t i = 0; i < df_net_size(s->net); i++)
            if (!(fabs((double)before[i]) < 1e13)) expect(0 && "weights are finite");
    }
    free(before);
    end(s);
}

TEST(descriptor) {
    setup *s = begin(1);
    df_net *before = small_net(s->ctx, 2, 24, 4);
    for (int i = 0; i < 27; i++) {
        static const char *const say[] = {
            "df_train_defaults", "batch", "steps", "learning_rate", "learning_rate", "warmup",
            "final_rate", "beta1", "beta2", "adam_eps", "weight_decay", "ema", "validation",
            "label_dropout", "report", "t_min", "t_max", "INDEX", "t_min = 0", "t_max = 1",
            "label 9 of data row 4", "rows", "parts", "part is 2", "flip", "3 axes",
            "takes 0 numbers"};
        df_train_desc d = s->d;
        switch (i) {
        case 0: d.cookie = 0; break;
        case 1: d.batch = 0; break;
        case 2: d.steps = 0; break;
        case 3: d.learning_rate = -1; break;
        case 4: d.learning_rate = NAN; break;
        case 5: d.warmup = -1; break;
        case 6: d.final_rate = 2; break;
        case 7: d.beta1 = 1; break;
        case 8: d.beta2 = -.1; break;
        case 9: d.adam_eps = 0; break;
        case 10: d.weight_decay = 1e5; break;      // 1 - lr wd < 0: weights would swing
        case 11: d.ema = 1; break;
        case 12: d.validation = 1; break;
        case 13: d.label_dropout = 1.5; break;
        case 14: d.report = 0; break;
        case 15: d.t_min = .6, d.t_max = .5; break;
        case 16: d.t_max = 1.5; break;
        case 17: d.density = DF_DENSITY_INDEX; break;
        case 18: d.t_min = 0, d.card.prediction = DF_SCORE; break;     // -eps/sigma at sigma = 0
        case 19: d.card.time = df_time_sigma(); break;                 // infinite at alpha = 0
        case 20: s->labels[4] = 9; break;
        case 21: s->labels[4] = 0, d.rows = -1; break;
        case 22: d.parts = 0; break;
        case 23: d.parts = d.part = 2; break;
        case 24: d.flip = 1.1; break;
        case 25: d.flip = .5; break;                                   // points have no sides
        case 26: d.condition = s->data; break;
        }
        df_trainer *tr = df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &d);
        check(tr == NULL && says(s->ctx, say[i]), "case %d (%s): %s", i, say[i],
              df_ctx_message(s->ctx));
        df_trainer_free(tr);
    }
    same_bits(df_net_weights(s->net), df_net_weights(before), df_net_size(before) * sizeof(df_real));
    expect(df_net_average(s->net) == NULL && df_net_model(s->net).scaling_size == 0);
    df_net_free(before);
    df_trainer_free(NULL);
    end(s);
    // the default t_min of a score stays away from 0; no row held out is said
    s = begin(1);
    double loss;
    s->d.card.prediction = DF_SCORE;
    s->d.validation = 0;
    s->tr = df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d);
    expect(s->tr != NULL && df_trainer_run(s->tr, 2) == DF_OK);
    expect(df_trainer_validate(s->tr, &loss) == DF_ERR_UNSUPPORTED);
    end(s);
}

static int cancel_at(void *user, const df_train_info *info) {
    if (info->step == 12) df_ctx_cancel((df_ctx *)user);
    return 0;
}

// Ctrl-C between two parts of a batch: that step is not done, the trainer can be saved, and
// what goes on from the file, here or elsewhere, is the run that was not interrupted.
static df_ctx *interrupted;
static int parts_left;
static void on_signal(int number) {
    (void)number;
    df_ctx_cancel(interrupted);
}
static df_tensor *forward_signal(const df_run *run, df_tensor *x, df_tensor *t,
                                 const int *labels) {
    if (run->ctx == interrupted && run->training && --parts_left == 0) raise(SIGINT);
    return forward_conv(run, x, t, labels);
}
TEST(interrupted_by_signal) {
    static df_real data[CONV_ROWS * CONV_DIM];
    df_ctx *ctx = new_ctx(2, NULL);
    df_net *net[3];
    df_trainer *tr[3];
    df_buffer file[4];
    df_train_desc d = conv_desc(data);
    df_train_info info;
    memset(file, 0, sizeof file);
    d.rows = 5;                                        // parts of 5, 5 and 2
    d.learning_rate = 1e-3;
    d.steps = 6;
    void (*old)(int) = signal(SIGINT, on_signal);
    for (int i = 0; i < 3; i++) {
        net[i] = conv_net(ctx, 4);
        tr[i] = df_trainer_create(ctx, net[i], data, CONV_ROWS, NULL, &d);
    }
    int shape[3] = {2, 8, 8};
    df_net *own = df_net_create(ctx, "conv", 3, shape, forward_signal, 5);
    for (int i = 0; i < df_net_count(net[0]); i++) {
        const df_param *p = df_net_param(net[0], i);
        df_net_add(ctx, own, p->name, p->ndim, p->shape, DF_INIT_ZERO);
    }
    memcpy(df_net_weights(own), df_net_weights(net[0]), df_net_size(own) * sizeof(df_real));
    df_trainer *stopped = df_trainer_create(ctx, own, data, CONV_ROWS, NULL, &d);
    interrupted = ctx;
    parts_left = 2 * 3 + 2;                            // in the second part of the third step
    expect(df_trainer_run(tr[0], 0) == DF_OK);
    expect(df_trainer_run(stopped, 0) == DF_CANCELLED && says(ctx, "after step 2 of 6"));
    df_trainer_info(stopped, &info);
    expect(info.step == 2);
    expect(df_trainer_run(tr[1], 2) == DF_OK);
    same_bits(df_net_weights(own), df_net_weights(net[1]), df_net_size(own) * sizeof(df_real));
    expect(df_trainer_save(stopped, df_sink_buffer(&file[0])) == DF_OK);
    check(df_trainer_load(tr[2], df_source_memory(file[0].data, file[0].size)) == DF_OK, "%s",
          df_ctx_message(ctx));
    expect(df_trainer_run(tr[2], 0) == DF_OK && df_trainer_run(stopped, 0) == DF_OK);
    expect(df_trainer_save(tr[0], df_sink_buffer(&file[1])) == DF_OK);
    expect(df_trainer_save(tr[2], df_sink_buffer(&file[2])) == DF_OK);
    expect(df_trainer_save(stopped, df_sink_buffer(&file[3])) == DF_OK);
    for (int i = 2; i < 4; i++)
        expect(file[i].size == file[1].size &&
               memcmp(file[i].data, file[1].data, file[1].size) == 0);
    signal(SIGINT, old);
    interrupted = NULL;
    for (int i = 0; i < 3; i++) df_trainer_free(tr[i]), df_net_free(net[i]);
    for (int i = 0; i < 4; i++) df_buffer_free(ctx, &file[i]);
    df_trainer_free(stopped);
    df_net_free(own);
    df_ctx_free(ctx);
}

// Before a run nothing is known of its speed; in it, rows a second and time left agree.
static int clocked(void *user, const df_train_info *info) {
    double *worst = (double *)user;
    double left = info->rows_per_second * info->seconds_left;
    if (info->step < info->steps)
        worst[0] = fmax(worst[0], fabs(left / (37.0 * (double)(info->steps - info->step)) - 1));
    worst[1] = fmax(worst[1], info->rows_per_second);
    return 0;
}
TEST(clock) {
    setup *s = begin(1);
    double worst[2] = {0, 0}, start;
    struct timespec now;
    df_train_info info;
    s->d.on_step = clocked;
    s->d.user = worst;
    s->tr = df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d);
    df_trainer_info(s->tr, &info);
    expect(info.rows_per_second == 0 && info.seconds_left < 0);
    timespec_get(&now, TIME_UTC);
    start = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    expect(df_trainer_run(s->tr, 0) == DF_OK);
    df_trainer_info(s->tr, &info);
    timespec_get(&now, TIME_UTC);
    double took = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec - start;
    expect(worst[0] < 1e-9 && worst[1] > 0);
    check(info.rows_per_second >= 40 * 37 / took * .9, "%g rows/s in %g s",
          info.rows_per_second, took);
    end(s);
}

TEST(stopping) {
    setup *s = begin(2), *straight = ready(1);
    s->d.on_step = cancel_at;
    s->d.user = s->ctx;
    s->tr = df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d);
    expect(df_trainer_run(s->tr, 0) == DF_CANCELLED && says(s->ctx, "after step 12"));
    check(df_trainer_run(s->tr, 0) == DF_OK, "%s", df_ctx_message(s->ctx));
    expect(df_trainer_run(straight->tr, 0) == DF_OK);
    same_state(s, straight);
    end(s);
    s = ready(1);
    s->w.stop_at = 2;
    s->w.code = 4711;
    expect(df_trainer_run(s->tr, 0) == 4711 && df_ctx_error(s->ctx) == 4711);
    expect(df_trainer_run(s->tr, 0) == DF_OK);
    same_state(s, straight);
    end(s);
    end(straight);
}

// After the first steps nothing is allocated any more.
TEST(no_allocation) {
    counter c = {0, 0, 0};
    df_ctx *ctx = new_ctx(1, &c);
    df_net *net = small_net(ctx, 2, 24, 4);
    watch w;
    df_train_desc d = train_desc(&w);
    df_real data[2 * ROWS];
    int labels[ROWS];
    long calls;
    ring_data(data, labels);
    df_trainer *tr = df_trainer_create(ctx, net, data, ROWS, labels, &d);
    expect(df_trainer_run(tr, 2) == DF_OK);
    calls = c.calls;
    expect(df_trainer_run(tr, 0) == DF_OK);
    check(c.calls == calls, "%ld allocations in 38 steps", c.calls - calls);
    df_trainer_free(tr);
    df_net_free(net);
    df_ctx_free(ctx);
    expect(c.live == 0);
}

// Create, two steps, save, load, sample: the first failure, or DF_OK.
static df_result whole_chain(df_ctx *ctx) {
    df_real data[2 * ROWS], x[6];
    int labels[ROWS];
    double betas[10];
    watch w;
    df_train_desc d = train_desc(&w);
    df_sample_desc sd = df_sample_defaults();
    df_buffer b;
    df_net *net = small_net(ctx, 2, 8, 4), *back = NULL;
    df_trainer *tr = NULL;
    df_result result = net == NULL ? df_ctx_error(ctx) : DF_OK;
    memset(&b, 0, sizeof b);
    ring_data(data, labels);
    d.steps = d.validate_every = d.report = 2;
    d.card.prediction = DF_EPS;
    d.weighting = DF_WEIGHT_MIN_SNR;
    d.density = DF_DENSITY_INDEX;
    d.card.time = df_time_index(10);
    sd.steps = 2;
    if (!result) result = df_betas(ctx, DF_BETAS_LINEAR, .01, .3, 10, betas);
    if (!result) result = df_process_table(ctx, betas, 10, &d.card.process);
    if (!result && !(tr = df_trainer_create(ctx, net, data, ROWS, labels, &d)))
        result = df_ctx_error(ctx);
    if (!result) result = df_trainer_run(tr, 0);
    if (!result) result = df_trainer_save(tr, df_sink_buffer(&b));
    if (!result) result = df_trainer_load(tr, df_source_memory(b.data, b.size));
    if (!result && !(back = df_net_load(ctx, df_source_memory(b.data, b.size))))
        result = df_ctx_error(ctx);
    if (!result) {
        df_model m = df_net_model(back);
        result = df_sample(ctx, &m, &sd, x, 3);
    }
    df_buffer_free(ctx, &b);
    df_trainer_free(tr);
    df_net_free(net);
    df_net_free(back);
    return result;
}

TEST(failing_memory) {
    long calls = 0;
    for (long at = 0; at <= calls; at++) {
        counter c = {0, 0, at};
        df_ctx *ctx = new_ctx(1, &c);
        df_result result = ctx == NULL ? (df_result)DF_ERR_MEMORY : whole_chain(ctx);
        if (at == 0) calls = c.calls;
        check(result == (at == 0 ? DF_OK : DF_ERR_MEMORY), "call %ld of %ld failing: %s: %s", at,
              calls, df_result_name(result), ctx ? df_ctx_message(ctx) : "no context");
        df_ctx_free(ctx);
        check(c.live == 0, "call %ld failing: %ld bytes lost", at, c.live);
    }
    expect(calls > 30);
}

// A net that fails does so when its trainer is made, with its own sentence; it stays as it was
// and the context goes on.
static df_tensor *forward_wrong(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    int shape[2] = {3, 5};
    (void)t, (void)labels;
    x = df_mul(run->ctx, x, df_run_param(run, 0));
    return x == NULL || x->shape[0] < 2 ? x : df_reshape(run->ctx, x, 2, shape);
}
TEST(net_that_fails) {
    counter c = {0, 0, 0};
    df_ctx *ctx = new_ctx(1, &c);
    df_real data[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    int one[1] = {1}, two[1] = {2};
    df_net *net = df_net_create(ctx, "wrong", 1, two, forward_wrong, 0);
    df_net_add(ctx, net, "w", 1, one, DF_INIT_ZERO);
    long live = c.live;
    expect(df_trainer_create(ctx, net, data, 4, NULL, NULL) == NULL);
    expect(df_ctx_error(ctx) == DF_ERR_SHAPE && says(ctx, "df_reshape"));
    expect(df_net_average(net) == NULL && df_tensor_new(ctx, 1, one) != NULL);
    expect(df_net_add(ctx, net, "more", 1, one, DF_INIT_ZERO) == 1);
    check(c.live < live + 100000, "%ld bytes are kept", c.live - live);
    df_net_free(net);
    df_ctx_free(ctx);
    expect(c.live == 0);
}

TEST(null_arguments) {
    setup *s = begin(1);
    df_buffer b;
    df_train_info info;
    double loss;
    df_real w = 1, m = 0, v = 0, g = 1;
    char first[512];
    memset(&b, 0, sizeof b);
    expect(df_trainer_create(NULL, s->net, s->data, ROWS, NULL, &s->d) == NULL);
    expect(df_trainer_create(s->ctx, NULL, s->data, ROWS, NULL, &s->d) == NULL);
    expect(df_ctx_error(s->ctx) == DF_ERR_ARGUMENT && says(s->ctx, "df_trainer_create"));
    df_mlp_desc bad = df_mlp_defaults();
    bad.embed = 7;
    df_net *none = df_mlp_create(s->ctx, &bad);
    snprintf(first, sizeof first, "%s", df_ctx_message(s->ctx));
    expect(df_trainer_create(s->ctx, none, s->data, ROWS, NULL, &s->d) == NULL);
    same_text(df_ctx_message(s->ctx), first);
    expect(df_trainer_run(NULL, 0) == DF_ERR_ARGUMENT);
    expect(df_trainer_info(NULL, &info) == DF_ERR_ARGUMENT);
    expect(df_trainer_validate(NULL, &loss) == DF_ERR_ARGUMENT);
    expect(df_trainer_save(NULL, df_sink_buffer(&b)) == DF_ERR_ARGUMENT);
    expect(df_trainer_load(NULL, df_source_memory("x", 1)) == DF_ERR_ARGUMENT);
    df_adamw_step(s->ctx, NULL, 1, 1, &w, &m, &v, &g, 1);
    expect(w == 1 && m == 0);
    end(s);
}

// Also without an average a net keeps the size that its trainer has arrays for.
TEST(sealed) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_real data[64];
    df_train_desc d = df_train_defaults();
    int shape[1] = {100000};
    d.ema = 0;
    d.steps = 2;
    d.batch = 4;
    for (int i = 0; i < 64; i++) data[i] = (df_real)i;
    df_net *net = spy_net(ctx, 2);
    expect(df_net_count(net) > 0);
    df_trainer *tr = df_trainer_create(ctx, net, data, 32, NULL, &d);
    size_t size = df_net_size(net);
    expect(tr != NULL && df_net_average(net) == NULL);
    expect(df_net_add(ctx, net, "late", 1, shape, DF_INIT_ZERO) == -1);
    expect(says(ctx, "'late'") && df_net_size(net) == size);
    expect(df_trainer_run(tr, 0) == DF_OK);
    df_trainer_free(tr);
    df_net_free(net);
    df_ctx_free(ctx);
}

// Memory that is short once: the run stops before its step and goes on later, bit for bit.
TEST(short_of_memory_once) {
    setup *whole = ready(1);
    expect(df_trainer_run(whole->tr, 2) == DF_OK);
    for (int held = 0; held < 2; held++) {
        int failures = 0;
        for (int at = 1; at < 50; at++) {
            counter c = {0, 0, 0};
            setup *s = begin(1);
            df_net_free(s->net);
            df_ctx_free(s->ctx);
            s->ctx = new_ctx(1, &c);
            s->net = small_net(s->ctx, 2, held ? 256 : 24, 4);
            s->tr = df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d);
            double loss = -1;
            c.fail_at = c.calls + at;
            df_result result =
                held ? df_trainer_validate(s->tr, &loss) : df_trainer_run(s->tr, 2);
            failures += result != DF_OK;
            if (result != DF_OK) {
                df_train_info info;
                expect(result == DF_ERR_MEMORY && says(s->ctx, "no memory"));
                df_trainer_info(s->tr, &info);
                if (held) result = df_trainer_validate(s->tr, &loss);
                else result = df_trainer_run(s->tr, 2 - info.step);
                check(result == DF_OK, "%d: %s", at, df_ctx_message(s->ctx));
                if (!held) same_state(s, whole);
                result = DF_ERR_MEMORY;
            }
            end(s);
            if (result == DF_OK) break;
        }
        check(failures > 0 && failures < 49, "%d failures", failures);
    }
    end(whole);
}

// A tape of the user's is not touched: the trainer asks for its end.
TEST(recording) {
    setup *s = ready(1);
    df_real x = 3, grad = 0;
    double loss;
    df_record_begin(s->ctx);
    df_tensor *a = df_tensor_borrow(s->ctx, 0, NULL, &x, &grad), *y = df_square(s->ctx, a);
    expect(df_trainer_run(s->tr, 1) == DF_ERR_ARGUMENT && says(s->ctx, "end the recording first"));
    expect(df_trainer_validate(s->tr, &loss) == DF_ERR_ARGUMENT);
    expect(df_backward(s->ctx, y) == DF_OK);
    near(grad, 6, 1e-6);
    df_record_end(s->ctx);
    expect(df_trainer_run(s->tr, 1) == DF_OK);
    end(s);
}

// on_step hands on what a function of the library said: the sentence stays.
static int save_badly(void *user, const df_train_info *info) {
    setup *s = (setup *)user;
    df_buffer b;
    (void)info;
    memset(&b, 0, sizeof b);
    df_net_weights(s->net)[3] = (df_real)NAN;
    df_result result = df_net_save(s->ctx, s->net, df_sink_buffer(&b));
    df_buffer_free(s->ctx, &b);
    return result;
}
TEST(sentence_of_on_step) {
    setup *s = begin(1);
    s->d.on_step = save_badly;
    s->d.user = s;
    s->d.report = 1;
    s->tr = df_trainer_create(s->ctx, s->net, s->data, ROWS, s->labels, &s->d);
    expect(df_trainer_run(s->tr, 0) == DF_ERR_NONFINITE);
    expect(says(s->ctx, "df_net_save: element 3"));
    end(s);
}

// ---- 8 gaussians ----

static double seconds(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// Rectified flow on 8 gaussians (radius 2 sqrt 2, deviation sqrt(1/8)), 64 Euler steps, against
// fresh draws of the distribution: sliced W_2, and the share within 3 deviations of a mode.
static void eight_gaussians(int width, int batch, int64_t steps, double rate, int n, int Euler,
                            double most, double least) {
    enum { DATA = 100000 };
    df_ctx *ctx = new_ctx(2, NULL);
    df_mixture *mixture = df_mixture_ring(ctx, 8, 2 * sqrt(2.0), sqrt(.125));
    df_point data_point = df_point_data();
    df_mlp_desc md = df_mlp_defaults();
    df_train_desc d = df_train_defaults();
    df_sample_desc sd = df_sample_defaults();
    df_real *x = (df_real *)malloc(2 * DATA * sizeof *x), *y = (df_real *)malloc(2 * DATA * sizeof *y);
    double distance = 9, start = seconds();
    int inside = 0;
    md.width = width;
    d.batch = batch;
    d.steps = steps;
    d.learning_rate = rate;
    d.validation = .01;
    expect(df_mixture_sample(ctx, mixture, &data_point, 1, 0, DATA, x) == DF_OK);
    df_net *net = df_mlp_create(ctx, &md);
    df_trainer *tr = df_trainer_create(ctx, net, x, DATA, NULL, &d);
    check(tr != NULL && df_trainer_run(tr, 0) == DF_OK, "%s", df_ctx_message(ctx));
    double took = seconds() - start;
    df_model m = df_net_model(net);
    sd.method = "euler_t";
    sd.steps = Euler;
    sd.seed = 5;
    check(df_sample(ctx, &m, &sd, x, n) == DF_OK, "%s", df_ctx_message(ctx));
    expect(df_mixture_sample(ctx, mixture, &data_point, 2, 0, n, y) == DF_OK);
    expect(df_sliced_wasserstein(ctx, x, n, y, n, 2, 200, 3, &distance) == DF_OK);
    for (int i = 0; i < n; i++) {
        double nearest = 1e9;
        for (int k = 0; k < 8; k++) {
            double angle = .25 * 3.14159265358979 * k;
            double u = (double)x[2 * i] - 2 * sqrt(2.0) * cos(angle);
            double v = (double)x[2 * i + 1] - 2 * sqrt(2.0) * sin(angle);
            nearest = fmin(nearest, u * u + v * v);
        }
        inside += nearest < 9 * .125;
    }
    printf("  8 gaussians: %.1f s of training, sliced W2 %.4f, inside %.4f\n", took, distance,
           (double)inside / n);
    check(distance < most, "sliced W2 %.4f, want below %.3f", distance, most);
    check(inside > least * n, "inside %.4f, want above %.3f", (double)inside / n, least);
    free(x);
    free(y);
    df_trainer_free(tr);
    df_net_free(net);
    df_mixture_free(mixture);
    df_ctx_free(ctx);
}

TEST(eight_gaussians_short) {
    if (test_short()) return;
    eight_gaussians(64, 256, IS_DOUBLE ? 600 : 2000, 3e-3, 5000, 32, IS_DOUBLE ? .3 : .2,
                    IS_DOUBLE ? .75 : .85);
}

TEST(eight_gaussians_long) {
    if (!test_long() || IS_DOUBLE) return;
    eight_gaussians(256, 256, 6000, 2e-3, 50000, 64, .06, .97);
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN(recorded);
    RUN(frozen);
    RUN(optimiser_threads);
    RUN(weightings);
    RUN(targets);
    RUN(densities);
    RUN(epochs);
    RUN(scaling);
    RUN(least_loss);
    RUN(threads);
    RUN(objective_of_your_own);
    RUN(resume);
    RUN(refused);
    RUN(parts_of_a_batch);
    RUN(condition_and_flip);
    RUN(condition_is_learnt);
    RUN(first_half);
    RUN(two_machines);
    RUN(memory);
    RUN(nonfinite);
    RUN(exploding);
    RUN(descriptor);
    RUN(interrupted_by_signal);
    RUN(clock);
    RUN(stopping);
    RUN(no_allocation);
    RUN(failing_memory);
    RUN(net_that_fails);
    RUN(null_arguments);
    RUN(sealed);
    RUN(short_of_memory_once);
    RUN(recording);
    RUN(sentence_of_on_step);
    RUN(eight_gaussians_short);
    RUN(eight_gaussians_long);
    return test_end();
}
