// Networks: parameters and their start, the MLP against plain loops, gradients and products
// by finite differences, nets as models, checkpoints, hostile files, threads, failing memory.
#include "diffusion.h"
#include "test.h"
#include "counting.h"
#include <pthread.h>

enum { IS_DOUBLE = sizeof(df_real) == 8 };
static const double TINY = sizeof(df_real) == 8 ? 1e-12 : 2e-5;

static df_mlp_desc small_desc(void) {
    df_mlp_desc d = df_mlp_defaults();
    d.width = 9;
    d.depth = 2;
    d.embed = 6;
    d.classes = 3;
    d.seed = 5;
    d.time_scale = 4;
    return d;
}

// ---- parameters ----

TEST(mlp_parameters) {
    static const struct { const char *name; int ndim, a, b; } want[] = {
        {"inp.weight", 2, 256, 130}, {"inp.bias", 1, 256, 1}, {"hid.0.weight", 2, 256, 256},
        {"hid.0.bias", 1, 256, 1}, {"hid.1.weight", 2, 256, 256}, {"hid.1.bias", 1, 256, 1},
        {"hid.2.weight", 2, 256, 256}, {"hid.2.bias", 1, 256, 1}, {"hid.3.weight", 2, 256, 256},
        {"hid.3.bias", 1, 256, 1}, {"out.weight", 2, 2, 256}, {"out.bias", 1, 2, 1}};
    df_ctx *ctx = new_ctx(1, NULL);
    df_net *net = df_mlp_create(ctx, NULL);
    size_t at = 0;
    expect(df_net_size(net) == 297218);
    expect(df_net_count(net) == 12);
    for (int i = 0; i < 12; i++) {
        const df_param *p = df_net_param(net, i);
        same_text(p->name, want[i].name);
        check(p->ndim == want[i].ndim && p->shape[0] == want[i].a && p->shape[1] == want[i].b,
              "%s has shape [%d, %d]", p->name, p->shape[0], p->shape[1]);
        expect(p->offset == at && p->size == (size_t)want[i].a * (size_t)want[i].b);
        expect(df_net_find(net, want[i].name) == i);
        at += p->size;
    }
    expect(df_net_find(net, "inp") == -1 && df_net_param(net, 12) == NULL);
    expect(df_net_dim(net) == 2 && df_net_classes(net) == 0 && df_net_average(net) == NULL);
    same_text(df_net_kind(net), "mlp");
    df_net_free(net);
    df_net_free(NULL);
    df_ctx_free(ctx);
}

// PyTorch's start: uniform within 1/sqrt(fan_in), also of the biases. Labels come last and
// move nothing else; another seed moves everything.
TEST(start) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_mlp_desc d = df_mlp_defaults();
    df_net *a = df_mlp_create(ctx, &d), *b, *c;
    d.classes = 10;
    b = df_mlp_create(ctx, &d);
    d.seed = 1;
    c = df_mlp_create(ctx, &d);
    const df_real *w = df_net_weights(a);
    expect(df_net_size(b) == 297218 + 10 * 128 && df_net_classes(b) == 10);
    same_text(df_net_param(b, 12)->name, "label.weight");
    same_bits(w, df_net_weights(b), df_net_size(a) * sizeof *w);
    for (int i = 0; i < df_net_count(a); i++) {
        const df_param *p = df_net_param(a, i);
        double fan = i < 2 ? 130 : 256, bound = 1 / sqrt(fan), most = 0, square = 0;
        for (size_t j = 0; j < p->size; j++) {
            double x = (double)w[p->offset + j];
            most = fabs(x) > most ? fabs(x) : most;
            square += x * x;
        }
        check(most <= bound * (1 + 1e-6) && (p->size < 200 || most > 0.97 * bound),
              "%s reaches %g, bound %g", p->name, most, bound);
        if (p->size > 1000)    // E x^2 = bound^2/3, its deviation over n .894/sqrt(n) of that
            near_rel(square / (double)p->size, bound * bound / 3, 6 * 0.894 / sqrt((double)p->size));
    }
    expect(memcmp(w, df_net_weights(c), 100 * sizeof *w) != 0);
    const df_param *label = df_net_param(b, 12);
    double mean = 0, square = 0;
    for (size_t j = 0; j < label->size; j++) {
        double x = (double)df_net_weights(b)[label->offset + j];
        mean += x / (double)label->size;
        square += x * x / (double)label->size;
    }
    near_abs(mean, 0, 6 / sqrt(1280.0));
    near_abs(square, 1, 6 * sqrt(2 / 1280.0));
    df_net_free(a);
    df_net_free(b);
    df_net_free(c);
    df_ctx_free(ctx);
}

static df_tensor *forward_same(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    (void)t, (void)labels;
    return df_mul(run->ctx, x, df_run_param(run, 0));
}

TEST(adding) {
    df_ctx *ctx = new_ctx(1, NULL);
    int one[1] = {1}, shape[4] = {6, 4, 3, 3}, bad[2] = {3, 0}, big[3] = {1 << 20, 1 << 20, 1};
    df_net *net = df_net_create(ctx, "own", 1, one, forward_same, 7);
    expect(df_net_add(ctx, net, "one", 1, one, DF_INIT_ONE) == 0);
    expect(df_net_weights(net)[0] == 1);
    expect(df_net_add(ctx, net, "x", 4, shape, DF_INIT_XAVIER) == 1);
    const df_param *p = df_net_param(net, 1);
    double bound = sqrt(6.0 / (9 * 10)), most = 0;
    for (size_t j = 0; j < p->size; j++) {
        double x = fabs((double)df_net_weights(net)[p->offset + j]);
        most = x > most ? x : most;
    }
    expect(most <= bound * (1 + 1e-6) && most > 0.95 * bound);
    expect(df_layer_linear(ctx, net, "lin", 4, 6, DF_INIT_NORMAL_02) == 2);
    expect(df_layer_norm_affine(ctx, net, "norm", 5) == 4);
    p = df_net_param(net, 4);
    expect(df_net_weights(net)[p->offset + 4] == 1 && df_net_weights(net)[p->offset + 5] == 0);
    expect(df_layer_conv2d(ctx, net, "conv", 4, 6, 3, DF_INIT_ZERO) == 6);
    p = df_net_param(net, 6);
    expect(p->ndim == 4 && p->shape[0] == 6 && p->shape[1] == 4 && p->shape[3] == 3);
    df_net_set(net, 63, 42);
    df_net_set(net, 64, 1);
    expect(df_net_get(net, 63) == 42 && df_net_get(net, 64) == 0 && df_net_get(net, -1) == 0);
    expect(df_net_add(ctx, net, "one", 1, one, DF_INIT_ONE) == -1 && says(ctx, "'one' already"));
    expect(df_net_add(ctx, net, "", 1, one, DF_INIT_ONE) == -1);
    expect(df_net_add(ctx, net, "average.x", 1, one, DF_INIT_ONE) == -1 && says(ctx, "average."));
    expect(df_net_add(ctx, net, "b", 2, bad, DF_INIT_ONE) == -1 && says(ctx, "'b'"));
    expect(df_net_add(ctx, net, "b", 3, big, DF_INIT_ONE) == -1);
    expect(df_net_add(ctx, net, "b", 6, big, DF_INIT_ONE) == -1);
    expect(df_net_create(ctx, "mlp", 1, one, forward_same, 0) == NULL && says(ctx, "'mlp'"));
    expect(df_net_create(ctx, "own", 4, shape, forward_same, 0) == NULL);
    expect(df_net_create(ctx, "own", 2, bad, forward_same, 0) == NULL);
    expect(df_net_create(ctx, "own", 1, one, NULL, 0) == NULL);
    df_mlp_desc d = df_mlp_defaults();
    d.embed = 7;
    expect(df_mlp_create(ctx, &d) == NULL && says(ctx, "embed 7"));
    memset(&d, 0, sizeof d);
    expect(df_mlp_create(ctx, &d) == NULL);
    df_net_free(net);
    df_ctx_free(ctx);
}

// ---- forward and gradients ----

// The MLP as loops over one row, all in double.
static void naive(const df_net *net, const df_mlp_desc *d, const double *x, double t, int label,
                  double *y) {
    const df_real *w = df_run_defaults(NULL, net).weights;
    double h[512], g[512], in[512];
    int half = d->embed / 2, n = d->dim + d->embed;
    for (int i = 0; i < d->dim; i++) in[i] = x[i];
    for (int k = 0; k < half; k++) {
        double f = pow(d->period, -(double)k / half), a = t * d->time_scale * f;
        in[d->dim + k] = cos(a);
        in[d->dim + half + k] = sin(a);
    }
    for (int k = 0; k < d->embed && label >= 0; k++) {
        const df_param *p = df_net_param(net, df_net_find(net, "label.weight"));
        in[d->dim + k] += (double)w[p->offset + (size_t)(label * d->embed + k)];
    }
    for (int l = 0; l <= d->depth + 1; l++) {
        const df_real *W = w + df_net_param(net, 2 * l)->offset;
        const df_real *b = w + df_net_param(net, 2 * l + 1)->offset;
        int rows = l <= d->depth ? d->width : d->dim, cols = l == 0 ? n : d->width;
        for (int i = 0; i < rows; i++) {
            double s = (double)b[i];
            for (int j = 0; j < cols; j++) s += (double)W[i * cols + j] * (l == 0 ? in[j] : h[j]);
            g[i] = l <= d->depth ? s / (1 + exp(-s)) : s;
            if (l > 0 && l <= d->depth) g[i] += h[i];
        }
        memcpy(h, g, (size_t)rows * sizeof *h);
    }
    memcpy(y, h, (size_t)d->dim * sizeof *y);
}

TEST(mlp_forward) {
    df_ctx *ctx = new_ctx(2, NULL);
    for (int small = 0; small < 2; small++) {
        df_mlp_desc d = small ? small_desc() : df_mlp_defaults();
        enum { N = 5 };
        df_real x[2 * N], y[2 * N];
        double t[N], want[2 * N], xd[2 * N];
        int labels[N] = {0, -1, 2, 1, -1};
        df_net *net = df_mlp_create(ctx, &d);
        df_model m = df_net_model(net);
        df_random_normal(1, 2, 3, 2 * N, x);
        for (int i = 0; i < N; i++) {
            t[i] = (double)(df_real)(0.05 + 0.19 * i);
            for (int j = 0; j < 2; j++) xd[2 * i + j] = (double)x[2 * i + j];
            naive(net, &d, xd + 2 * i, t[i], small ? labels[i] : -1, want + 2 * i);
        }
        expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, x, NULL, small ? labels : NULL, y) == 0);
        near_all(y, want, 2 * N, small ? TINY : 5 * TINY + (IS_DOUBLE ? 0 : 1e-4));
        df_net_free(net);
    }
    df_ctx_free(ctx);
}

// d <r, net(x)> / d parameters, every one, by central differences.
TEST(mlp_gradients) {
    if (!IS_DOUBLE) return;
    df_ctx *ctx = new_ctx(1, NULL);
    df_mlp_desc d = small_desc();
    df_net *net = df_mlp_create(ctx, &d);
    enum { N = 3 };
    int shape[2] = {N, 2}, labels[N] = {2, -1, 0};
    df_real x[2 * N], r[2 * N], t[N] = {(df_real).2, (df_real).5, (df_real).9};
    size_t size = df_net_size(net);
    df_real *grads = (df_real *)calloc(size, sizeof *grads), *w = df_net_weights(net);
    double *want = (double *)calloc(size, sizeof *want);
    df_random_normal(1, 1, 1, 2 * N, x);
    df_random_normal(1, 2, 1, 2 * N, r);
    df_run run = df_run_defaults(ctx, net);
    for (size_t i = 0; i <= 2 * size; i++) {       // 0: backward; then each weight up and down
        size_t at = (i - 1) / 2;
        double h = i % 2 ? 1e-5 : -1e-5, keep = 0;
        run.grads = i == 0 ? grads : NULL;
        if (i > 0) keep = (double)w[at], w[at] += (df_real)h;
        df_scope s = df_scope_begin(ctx);
        if (i == 0) df_record_begin(ctx);
        df_tensor *y = df_run_net(&run, df_tensor_copy(ctx, 2, shape, x),
                                  df_tensor_copy(ctx, 1, shape, t), labels);
        df_tensor *loss = df_sum(ctx, df_mul(ctx, y, df_tensor_copy(ctx, 2, shape, r)));
        if (i == 0) expect(df_backward(ctx, loss) == DF_OK);
        else want[at] += (double)loss->data[0] / (2 * h), w[at] = (df_real)keep;
        if (i == 0) df_record_end(ctx);
        df_scope_end(ctx, s, NULL);
    }
    expect(df_ctx_error(ctx) == DF_OK);
    near_all(grads, want, size, 1e-8);
    free(grads);
    free(want);
    df_net_free(net);
    df_ctx_free(ctx);
}

// Inference keeps one block's temporaries, however deep the net.
TEST(memory_of_inference) {
    size_t peak[2];
    for (int deep = 0; deep < 2; deep++) {
        df_ctx *ctx = new_ctx(1, NULL);
        df_mlp_desc d = df_mlp_defaults();
        d.width = 64;
        d.depth = deep ? 40 : 3;
        df_net *net = df_mlp_create(ctx, &d);
        df_model m = df_net_model(net);
        enum { N = 1000 };
        df_real *x = (df_real *)calloc(2 * N, sizeof *x);
        double *t = (double *)calloc(N, sizeof *t);
        expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, x, NULL, NULL, x) == DF_OK);
        peak[deep] = df_ctx_peak_bytes(ctx);
        free(x);
        free(t);
        df_net_free(net);
        df_ctx_free(ctx);
    }
    check(peak[0] == peak[1], "peak %zu bytes at depth 3, %zu at depth 40", peak[0], peak[1]);
}

// ---- a net as a model ----

TEST(jvp_vjp) {
    df_ctx *ctx = new_ctx(2, NULL);
    df_mlp_desc d = small_desc();
    df_net *net = df_mlp_create(ctx, &d);
    df_model m = df_net_model(net);
    enum { N = 4 };
    df_real x[2 * N], v[2 * N], u[2 * N], jv[2 * N], uj[2 * N], up[2 * N], down[2 * N], xs[2 * N];
    double t[N] = {.1, .4, .6, .9}, fd[2 * N], h = IS_DOUBLE ? 1e-5 : 4e-3;
    int labels[N] = {0, 1, 2, -1};
    df_random_normal(3, 1, 1, 2 * N, x);
    df_random_normal(3, 2, 1, 2 * N, v);
    df_random_normal(3, 3, 1, 2 * N, u);
    expect((m.answers & (DF_ASK_JVP | DF_ASK_VJP)) == (DF_ASK_JVP | DF_ASK_VJP));
    expect(df_model_ask(ctx, &m, DF_ASK_JVP, t, N, x, v, labels, jv) == DF_OK);
    expect(df_model_ask(ctx, &m, DF_ASK_VJP, t, N, x, u, labels, uj) == DF_OK);
    for (int i = 0; i < 2 * N; i++) xs[i] = x[i] + (df_real)h * v[i];
    df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, xs, NULL, labels, up);
    for (int i = 0; i < 2 * N; i++) xs[i] = x[i] - (df_real)h * v[i];
    df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, xs, NULL, labels, down);
    for (int i = 0; i < 2 * N; i++) fd[i] = ((double)up[i] - (double)down[i]) / (2 * h);
    near_all(jv, fd, 2 * N, IS_DOUBLE ? 1e-8 : 2e-4);
    for (int i = 0; i < N; i++)        // <u, J v> = <u J, v>, row by row
        near((double)u[2 * i] * (double)jv[2 * i] + (double)u[2 * i + 1] * (double)jv[2 * i + 1],
             (double)uj[2 * i] * (double)v[2 * i] + (double)uj[2 * i + 1] * (double)v[2 * i + 1],
             IS_DOUBLE ? 1e-13 : 1e-5);
    // A question in the middle of a recording leaves its tape alone.
    int two[1] = {2};
    df_real values[2] = {3, 4}, grad[2] = {0, 0};
    df_record_begin(ctx);
    df_tensor *leaf = df_tensor_borrow(ctx, 1, two, values, grad), *sq = df_square(ctx, leaf);
    expect(df_model_ask(ctx, &m, DF_ASK_VJP, t, N, x, u, labels, up) == DF_OK);
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, x, NULL, labels, down) == DF_OK);
    same_bits(up, uj, sizeof up);
    expect(df_backward(ctx, df_sum(ctx, sq)) == DF_OK);
    df_record_end(ctx);
    near(grad[0], 6, 0);
    near(grad[1], 8, 0);
    // The scale c_in stands between x and the net: df_model_ask minds the chain rule.
    df_card card = df_card_defaults();
    card.process = df_process_edm(80);
    card.prediction = DF_EDM_F;
    card.time = df_time_log_sigma(.25);
    card.input_sigma_data = .5;
    expect(df_net_set_card(ctx, net, &card) == DF_OK);
    m = df_net_model(net);
    near(m.input_sigma_data, .5, 0);
    for (int i = 0; i < 2 * N; i++) xs[i] = x[i] + (df_real)(100 * h) * v[i];
    df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, xs, NULL, labels, up);
    for (int i = 0; i < 2 * N; i++) xs[i] = x[i] - (df_real)(100 * h) * v[i];
    df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, xs, NULL, labels, down);
    for (int i = 0; i < 2 * N; i++) fd[i] = ((double)up[i] - (double)down[i]) / (200 * h);
    expect(df_model_ask(ctx, &m, DF_ASK_JVP, t, N, x, v, labels, jv) == DF_OK);
    near_all(jv, fd, 2 * N, IS_DOUBLE ? 1e-6 : 5e-3);
    df_net_free(net);
    df_ctx_free(ctx);
}

// The divergence of a net's answer: exact against JVPs, one probe against its own, and its
// gradient through the tape (weights, and x that is itself recorded) by differences.
static df_tensor *divergence_loss(const df_run *run, df_real *x, const df_real *t, int *labels,
                                  const df_real *probe, df_real *grad, df_tensor **y) {
    int shape[2] = {4, 2};
    df_ctx *ctx = run->ctx;
    df_tensor *at = df_tanh(ctx, df_tensor_borrow(ctx, 2, shape, x, grad));
    df_tensor *v = probe ? df_tensor_copy(ctx, 2, shape, probe) : NULL;
    df_tensor *div = df_run_divergence(run, at, df_tensor_copy(ctx, 1, shape, t), labels, v, y);
    df_tensor *r = df_tensor_copy(ctx, 1, shape, x);
    return df_sum(ctx, df_mul(ctx, df_detach(ctx, r), df_square(ctx, div)));
}
static df_tensor *forward_itself(const df_run *run, df_tensor *x, df_tensor *t,
                               const int *labels) {
    (void)run, (void)t, (void)labels;
    return x;
}
TEST(divergence) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_mlp_desc d = small_desc();
    df_net *net = df_mlp_create(ctx, &d);
    df_model m = df_net_model(net);
    enum { N = 4 };
    df_real x[2 * N], v[2 * N], e[2 * N], jv[2 * N], y0[2 * N], tt[N];
    double t[N] = {.1, .4, .6, .9}, want[N] = {0}, probed[N];
    int labels[N] = {0, 1, 2, -1}, shape[2] = {N, 2};
    df_random_normal(3, 1, 1, 2 * N, x);
    df_random_normal(3, 2, 1, 2 * N, v);
    for (int i = 0; i < N; i++) tt[i] = (df_real)t[i];
    for (int k = 0; k < 3; k++) {              // e_0, e_1, v
        for (int i = 0; i < 2 * N; i++) e[i] = k == 2 ? v[i] : (df_real)(i % 2 == k);
        expect(df_model_ask(ctx, &m, DF_ASK_JVP, t, N, x, e, labels, jv) == DF_OK);
        for (int i = 0; i < N; i++) {
            double part = (double)(e[2 * i] * jv[2 * i] + e[2 * i + 1] * jv[2 * i + 1]);
            if (k == 2) probed[i] = part;
            else want[i] += part;
        }
    }
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, x, NULL, labels, y0) == DF_OK);
    df_run run = df_run_defaults(ctx, net);
    for (int k = 0; k < 2; k++) {
        df_tensor *y = NULL, *at = df_tensor_copy(ctx, 2, shape, x);
        df_tensor *div = df_run_divergence(&run, at, df_tensor_copy(ctx, 1, shape, tt), labels,
                                           k ? df_tensor_copy(ctx, 2, shape, v) : NULL, &y);
        check(div != NULL && y != NULL, "%s", df_ctx_message(ctx));
        near_all(div->data, k ? probed : want, N, IS_DOUBLE ? 1e-13 : 1e-5);
        same_bits(y->data, y0, sizeof y0);
        expect(y->tangent == NULL && at->tangent == NULL && div->ndim == 1);
    }
    int two = 2;                               // an answer that is x itself
    df_net *same = df_net_create(ctx, "same", 1, &two, forward_itself, 0);
    df_run itself = df_run_defaults(ctx, same);
    for (int k = 0; k < 2; k++) {
        df_tensor *y = NULL, *at = df_tensor_copy(ctx, 2, shape, x);
        df_tensor *div = df_run_divergence(&itself, at, df_tensor_copy(ctx, 1, shape, tt), NULL,
                                           k ? df_tensor_copy(ctx, 2, shape, v) : NULL, &y);
        if (!check(div != NULL && y == at, "%s", df_ctx_message(ctx))) continue;
        for (int i = 0; i < N; i++)
            near((double)div->data[i],
                 k ? (double)(v[2 * i] * v[2 * i] + v[2 * i + 1] * v[2 * i + 1]) : 2,
                 IS_DOUBLE ? 1e-13 : 1e-5);
        expect(at->tangent == NULL);
    }
    df_net_free(same);
    df_tensor *moving = df_tensor_copy(ctx, 2, shape, x);
    df_set_tangent(ctx, moving, df_tensor_copy(ctx, 2, shape, v));
    expect(df_run_divergence(&run, moving, df_tensor_copy(ctx, 1, shape, tt), labels, NULL,
                             NULL) == NULL);
    expect(strstr(df_ctx_message(ctx), "df_run_divergence") != NULL);
    df_ctx_clear(ctx);
    for (int k = 0; IS_DOUBLE && k < 2; k++) {
        size_t size = df_net_size(net);
        df_real *grads = (df_real *)calloc(size + 2 * N, sizeof *grads), *w = df_net_weights(net);
        run.grads = grads;
        df_record_begin(ctx);
        df_tensor *loss = divergence_loss(&run, x, tt, labels, k ? v : NULL, grads + size, NULL);
        expect(df_backward(ctx, loss) == DF_OK);
        df_record_end(ctx);
        run.grads = NULL;
        for (size_t i = 0; i < size; i += i < 40 ? 1 : 7) {
            double up, down, keep = (double)w[i], h = 1e-5;
            w[i] = (df_real)(keep + h);
            up = (double)divergence_loss(&run, x, tt, labels, k ? v : NULL, NULL, NULL)->data[0];
            w[i] = (df_real)(keep - h);
            down = (double)divergence_loss(&run, x, tt, labels, k ? v : NULL, NULL, NULL)->data[0];
            w[i] = (df_real)keep;
            near((double)grads[i], (up - down) / (2 * h), 1e-7);
        }
        for (int i = N; i < 2 * N; i++) {      // of x: the first N are the loss's weights too
            df_real keep = x[i];
            x[i] = keep + (df_real)1e-5;
            double up = (double)divergence_loss(&run, x, tt, labels, k ? v : NULL, NULL,
                                                NULL)->data[0];
            x[i] = keep - (df_real)1e-5;
            up -= (double)divergence_loss(&run, x, tt, labels, k ? v : NULL, NULL, NULL)->data[0];
            x[i] = keep;
            near((double)grads[size + (size_t)i], up / 2e-5, 1e-7);
        }
        free(grads);
    }
    df_net_free(net);
    df_ctx_free(ctx);
}

TEST(questions) {
    df_ctx *ctx = new_ctx(2, NULL);
    df_mlp_desc d = small_desc();
    df_net *net = df_mlp_create(ctx, &d);
    df_model m = df_net_model(net);
    enum { N = 37 };
    df_real x[2 * N], whole[2 * N], parts[2 * N];
    double t[N];
    int labels[N], bad[1] = {3};
    df_random_normal(3, 1, 1, 2 * N, x);
    for (int i = 0; i < N; i++) t[i] = (i + .5) / N, labels[i] = i % 4 - 1;
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, x, NULL, labels, whole) == DF_OK);
    m.max_batch = 5;
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, x, NULL, labels, parts) == DF_OK);
    same_bits(whole, parts, sizeof whole);
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, 1, x, NULL, bad, parts) == DF_ERR_ARGUMENT);
    expect(says(ctx, "label 3"));
    expect(df_model_ask(ctx, &m, DF_ASK_LOG_DENSITY, t, 1, x, NULL, NULL, parts) != DF_OK);
    // a wrong question does not stick
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, x, NULL, labels, parts) == DF_OK);
    same_bits(whole, parts, sizeof whole);
    // all -1 is no labels
    for (int i = 0; i < N; i++) labels[i] = -1;
    df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, x, NULL, labels, whole);
    df_model_ask(ctx, &m, DF_ASK_PREDICT, t, N, x, NULL, NULL, parts);
    near_all(whole, parts, 2 * N, TINY);
    // shapes that do not fit are tensor errors
    int shape[2] = {4, 3};
    df_run run = df_run_defaults(ctx, net);
    expect(df_run_net(&run, df_tensor_fill(ctx, 2, shape, 0), df_tensor_fill(ctx, 1, shape, 0),
                      NULL) == NULL);
    expect(df_ctx_error(ctx) == DF_ERR_SHAPE);
    expect(df_run_param(&run, 0) == NULL || df_ctx_error(ctx) == DF_ERR_SHAPE);
    df_ctx_clear(ctx);
    expect(df_run_param(&run, 99) == NULL && says(ctx, "99"));
    df_net_free(net);
    df_ctx_free(ctx);
}

// ---- cards and checkpoints ----

static df_card make_card(df_ctx *ctx, int i) {
    df_card c = df_card_defaults();
    double betas[50];
    switch (i) {
    case 1:
        c.process = df_process_vp(0.1, 20);
        c.prediction = DF_EPS;
        c.time = df_time_affine(999, 1.0 / 3);
        break;
    case 2:
        c.process = df_process_edm(80);
        c.process.sigma_data = 0.7;
        c.prediction = DF_EDM_F;
        c.time = df_time_log_sigma(0.25);
        c.input_sigma_data = 0.7;
        break;
    case 3:
        expect(df_betas(ctx, DF_BETAS_LINEAR, 1e-4, .02, 50, betas) == DF_OK);
        expect(df_betas_zero_snr(ctx, 50, betas) == DF_OK);
        expect(df_process_table(ctx, betas, 50, &c.process) == DF_OK);
        c.process.interp = DF_INTERP_LOG_SIGMA;
        c.prediction = DF_V;
        c.time = df_time_index(50);
        break;
    case 4:
        c.process = df_process_trig(0.5);
        c.prediction = DF_X0;
        break;
    default: c.clock = df_time_affine(-1, 1); break;
    }
    return c;
}

static df_result into(df_ctx *ctx, const df_net *net, df_buffer *b) {
    memset(b, 0, sizeof *b);
    return df_net_save(ctx, net, df_sink_buffer(b));
}

TEST(save_load) {
    df_ctx *ctx = new_ctx(2, NULL);
    for (int i = 0; i < 5; i++) {
        df_mlp_desc d = small_desc();
        df_net *net = df_mlp_create(ctx, &d), *back;
        df_card card = make_card(ctx, i);
        double mean[2] = {1.0 / 3, -2e-7}, scale[2] = {0.1, 3e5};
        df_buffer b, c;
        memset(&c, 0, sizeof c);
        expect(df_net_set_card(ctx, net, &card) == DF_OK);
        expect(df_net_set_scaling(ctx, net, i % 3, mean, scale) == DF_OK);
        check(into(ctx, net, &b) == DF_OK, "%s", df_ctx_message(ctx));
        back = df_net_load(ctx, df_source_memory(b.data, b.size));
        if (!check(back != NULL, "%s", df_ctx_message(ctx))) continue;
        same_bits(df_net_weights(net), df_net_weights(back), df_net_size(net) * sizeof(df_real));
        const df_card *k = df_net_card(back);
        expect(k->process.kind == card.process.kind && k->prediction == card.prediction);
        expect(k->process.a == card.process.a && k->process.b == card.process.b);
        expect(k->process.sigma_data == card.process.sigma_data);
        expect(k->process.interp == card.process.interp);
        expect(k->time.kind == card.time.kind && k->time.a == card.time.a &&
               k->time.b == card.time.b && k->clock.a == card.clock.a);
        expect(k->input_sigma_data == card.input_sigma_data);
        if (i == 3) {
            expect(k->process.log_abar != card.process.log_abar && k->process.table_size == 50);
            same_bits(k->process.log_abar, card.process.log_abar, 50 * sizeof(double));
        }
        df_model m = df_net_model(net), n = df_net_model(back);
        expect(n.scaling_size == i % 3);
        if (i % 3) {
            same_bits(n.mean, mean, sizeof(double) * (size_t)(i % 3));
            same_bits(n.scale, scale, sizeof(double) * (size_t)(i % 3));
        }
        // the second file is the first, and so are the samples
        expect(into(ctx, back, &c) == DF_OK);
        expect(b.size == c.size && memcmp(b.data, c.data, b.size) == 0);
        if (i == 0 || i == 1 || i == 4) {
            df_sample_desc s = df_sample_defaults();
            df_real x[40], y[40];
            int labels[20];
            for (int j = 0; j < 20; j++) labels[j] = j % 3;
            s.steps = 5;
            s.labels = labels;
            check(df_sample(ctx, &m, &s, x, 20) == DF_OK, "%s", df_ctx_message(ctx));
            expect(df_sample(ctx, &n, &s, y, 20) == DF_OK);
            same_bits(x, y, sizeof x);
        }
        df_buffer_free(ctx, &b);
        df_buffer_free(ctx, &c);
        df_net_free(net);
        df_net_free(back);
    }
    df_ctx_free(ctx);
}

// A net of one's own: convolutions on [2,4,4], filled by df_net_load_into.
static df_tensor *forward_conv(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    df_ctx *ctx = run->ctx;
    const df_net *net = run->net;
    (void)t, (void)labels;
    df_tensor *h = df_run_conv2d(run, df_net_get(net, 0), x, 1, 1);
    h = df_silu(ctx, df_run_group_norm(run, df_net_get(net, 1), h, 2, 1e-5));
    return df_run_conv2d(run, df_net_get(net, 2), h, 1, 1);
}
static df_net *conv_net(df_ctx *ctx, int channels, uint64_t seed) {
    int shape[3] = {2, 4, 4};
    df_net *net = df_net_create(ctx, "conv", 3, shape, forward_conv, seed);
    if (net == NULL) return NULL;
    df_net_set(net, 0, df_layer_conv2d(ctx, net, "a", 2, channels, 3, DF_INIT_FAN_IN));
    df_net_set(net, 1, df_layer_norm_affine(ctx, net, "n", channels));
    df_net_set(net, 2, df_layer_conv2d(ctx, net, "b", channels, 2, 3, DF_INIT_XAVIER));
    for (int i = 0; i < 3; i++)
        if (df_net_get(net, i) < 0) {
            df_net_free(net);
            return NULL;
        }
    return net;
}

TEST(own_kind) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_net *a = conv_net(ctx, 4, 1), *b = conv_net(ctx, 4, 2), *other = conv_net(ctx, 6, 2);
    df_real x[96], y[96], z[96], *keep = df_net_weights(b);
    double t[3] = {.1, .5, .9}, mean = 2, scale = 3;
    df_model m = df_net_model(a);
    df_buffer file;
    expect(m.dim == 32);
    df_random_normal(1, 1, 1, 96, x);
    check(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, 3, x, NULL, NULL, y) == DF_OK, "%s",
          df_ctx_message(ctx));
    df_net_set_scaling(ctx, a, 1, &mean, &scale);
    expect(into(ctx, a, &file) == DF_OK);
    df_source s = df_source_memory(file.data, file.size);
    expect(df_net_load(ctx, s) == NULL && df_ctx_error(ctx) == DF_ERR_FORMAT);
    expect(says(ctx, "'conv'") && says(ctx, "df_net_load_into"));
    expect(df_net_load_into(ctx, other, s) == DF_ERR_FORMAT);
    check(df_net_load_into(ctx, b, s) == DF_OK, "%s", df_ctx_message(ctx));
    expect(df_net_weights(b) == keep);
    m = df_net_model(b);
    expect(m.scaling_size == 1 && m.mean[0] == 2 && m.scale[0] == 3);
    m.scaling_size = 0;
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, 3, x, NULL, NULL, z) == DF_OK);
    same_bits(y, z, sizeof y);
    df_net_set(b, 5, 1);               // another configuration is another network
    expect(df_net_load_into(ctx, b, s) == DF_ERR_FORMAT);
    df_buffer_free(ctx, &file);
    df_net_free(a);
    df_net_free(b);
    df_net_free(other);
    df_ctx_free(ctx);
}

// Files whose header was altered: each is refused with a sentence that names the place, or is
// the very same file. `put` is as long as `find`.
TEST(hostile) {
    static const struct { const char *find, *put, *say; } row[] = {
        {"\"diffusion.h net 1\"", "\"diffusion.h net 2\"", "format"},
        {"\"mlp\"", "\"mlq\"", "'mlq'"},
        {"\"kind\"", "\"kinb\"", "kind"},
        {"\"shape\":\"2\"", "\"shape\":\"3\"", "inp.weight"},
        {"\"shape\":\"2\"", "\"shape\":\"0\"", "shape"},
        {"\"shape\":\"2\"", "\"shape\":\"x\"", "shape"},
        {"\"classes\":\"3\"", "\"classes\":\"4\"", "label.weight"},
        {"\"classes\":\"3\"", "\"classes\":\"0\"", "label.weight"},
        {"\"9 2 6\"", "\"8 2 6\"", "inp.weight"},
        {"\"9 2 6\"", "\"9 3 6\"", "hid.2.weight"},
        {"\"9 2 6\"", "\"9 1 6\"", "hid.1"},
        {"\"9 2 6\"", "\"9 2 7\"", "embed"},
        {"\"9 2 6\"", "\"9 2  \"", "embed"},
        {"\"9 2 6\"", "\"9e9 2\"", "config"},
        {"\"9 2 6\"", "\"9 2.5\"", "config"},
        {"\"4 10000 0 0\"", "\"0 10000 0 0\"", "time_scale"},
        {"\"4 10000 0 0\"", "\"4 10000 0 x\"", "numbers"},
        {"\"4 10000 0 0\"", "\"4 1e999 0 0\"", "numbers"},
        {"\"process\":\"table\"", "\"process\":\"tabla\"", "process"},
        {"\"prediction\":\"v\"", "\"prediction\":\"w\"", "prediction"},
        {"\"clock\":\"affine 1 0\"", "\"clock\":\"affine 0 0\"", "card"},
        {"\"clock\":\"affine 1 0\"", "\"clock\":\"affine 1  \"", "clock"},
        {"\"clock\":\"affine 1 0\"", "\"clock\":\"affina 1 0\"", "clock"},
        {"\"input_sigma_data\":\"0\"", "\"input_sigma_data\":\"-\"", "input_sigma_data"},
        {"\"process.log_abar\"", "\"process.log_abaz\"", "process.log_abaz"},
        {"\"data.mean\"", "\"data.meam\"", "data.meam"},
        {"\"out.bias\"", "\"out.bia2\"", "out.bias"},
        {"\"average.hid.0.bias\"", "\"average.hid.0.bia2\"", "average.hid.0.bias"},
        {"\"average.inp.weight\"", "\"averagf.inp.weight\"", "average"},
    };
    df_ctx *ctx = new_ctx(1, NULL);
    df_mlp_desc d = small_desc();
    df_net *net = df_mlp_create(ctx, &d), *into_net = df_mlp_create(ctx, &d);
    df_card card = make_card(ctx, 3);
    df_train_desc td = df_train_defaults();
    df_real data[8] = {1, 2, 3, 4, 5, 6, 7, 9};
    df_buffer b;
    card.process.interp = DF_INTERP_LOG_ABAR;
    td.batch = 4;
    td.card = card;
    df_trainer *tr = df_trainer_create(ctx, net, data, 4, NULL, &td);   // makes an average
    if (!check(tr != NULL, "%s", df_ctx_message(ctx))) return;
    expect(df_net_average(net) != NULL);
    expect(df_net_add(ctx, net, "late", 1, &d.dim, DF_INIT_ONE) == -1 && says(ctx, "trained"));
    df_trainer_free(tr);
    expect(into(ctx, net, &b) == DF_OK);
    size_t header = 8 + (size_t)b.data[0] + 256u * b.data[1] + 65536u * b.data[2];
    unsigned char *copy = (unsigned char *)malloc(b.size);
    size_t size = df_net_size(net) * sizeof(df_real);
    df_real *before = (df_real *)malloc(size);
    memcpy(before, df_net_weights(into_net), size);
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        size_t length = strlen(row[i].find), at = 8;
        memcpy(copy, b.data, b.size);
        while (at + length < header && memcmp(copy + at, row[i].find, length) != 0) at++;
        if (!check(at + length < header, "%s is not in the header:\n%.*s", row[i].find,
                   (int)header - 8, (const char *)b.data + 8)) continue;
        expect(strlen(row[i].put) == length);
        memcpy(copy + at, row[i].put, length);
        df_source s = df_source_memory(copy, b.size);
        s.name = "bad.safetensors";
        df_net *back = df_net_load(ctx, s);
        check(back == NULL && df_ctx_error(ctx) == DF_ERR_FORMAT && says(ctx, row[i].say) &&
              says(ctx, "bad.safetensors"), "%s: %s", row[i].put, df_ctx_message(ctx));
        df_net_free(back);
        expect(df_net_load_into(ctx, into_net, s) == DF_ERR_FORMAT);
        same_bits(df_net_weights(into_net), before, size);
    }
    for (size_t cut = 0; cut < b.size; cut += cut < header ? 13 : 501) {
        df_net *back = df_net_load(ctx, df_source_memory(b.data, cut));
        check(back == NULL, "a file cut to %zu bytes was taken", cut);
        df_net_free(back);
    }
    expect(df_net_load(ctx, df_source_path("/no/such/file")) == NULL);
    expect(df_ctx_error(ctx) == DF_ERR_IO && says(ctx, "/no/such/file"));
    // NaN in the weights is neither written nor read
    df_net_weights(net)[3] = (df_real)NAN;
    df_buffer c;
    expect(into(ctx, net, &c) == DF_ERR_NONFINITE && says(ctx, "'inp.weight'") && says(ctx, "3"));
    df_buffer_free(ctx, &c);
    memset(b.data + b.size - 4, 0xff, 4);
    expect(df_net_load(ctx, df_source_memory(b.data, b.size)) == NULL);
    free(copy);
    free(before);
    df_buffer_free(ctx, &b);
    df_net_free(net);
    df_net_free(into_net);
    df_ctx_free(ctx);
}

TEST(cards) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_net *net = df_mlp_create(ctx, NULL);
    df_card c = df_card_defaults(), table;
    double m[2] = {0, NAN}, s[2] = {1, 0}, one[2] = {1, 1};
    c.process = df_process_vp(-1, 20);
    expect(df_net_set_card(ctx, net, &c) == DF_ERR_ARGUMENT);
    c = df_card_defaults();
    c.prediction = (df_prediction)17;
    expect(df_net_set_card(ctx, net, &c) == DF_ERR_ARGUMENT && says(ctx, "17"));
    c = df_card_defaults();
    c.time.a = 0;
    expect(df_net_set_card(ctx, net, &c) == DF_ERR_ARGUMENT && says(ctx, "time"));
    c = df_card_defaults();
    c.input_sigma_data = INFINITY;
    expect(df_net_set_card(ctx, net, &c) == DF_ERR_ARGUMENT);
    expect(df_net_card(net)->process.kind == DF_PROCESS_FLOW);
    table = make_card(ctx, 3);
    expect(df_net_set_card(ctx, net, &table) == DF_OK);
    expect(df_net_set_card(ctx, net, df_net_card(net)) == DF_OK);      // its own card
    same_bits(df_net_card(net)->process.log_abar, table.process.log_abar, 50 * sizeof(double));
    expect(df_net_set_scaling(ctx, net, 3, one, one) == DF_ERR_ARGUMENT);
    expect(df_net_set_scaling(ctx, net, 2, m, one) == DF_ERR_ARGUMENT);
    expect(df_net_set_scaling(ctx, net, 2, one, s) == DF_ERR_ARGUMENT && says(ctx, "element 1"));
    expect(df_net_set_scaling(ctx, net, 2, one, one) == DF_OK);
    expect(df_net_set_scaling(ctx, net, 0, NULL, NULL) == DF_OK);
    expect(df_net_model(net).mean == NULL);
    df_net_free(net);
    df_ctx_free(ctx);
}

// ---- threads, memory ----

typedef struct worker {
    const df_net *net;
    uint64_t first;
    df_real x[200];
    int result;
} worker;
static void *work(void *arg) {
    worker *w = (worker *)arg;
    df_ctx *ctx = new_ctx(1, NULL);
    df_model m = df_net_model(w->net);
    df_sample_desc s = df_sample_defaults();
    s.steps = 8;
    s.first_sample = w->first;
    w->result = df_sample(ctx, &m, &s, w->x, 100);
    df_ctx_free(ctx);
    return NULL;
}

// One const net, two contexts in two threads, against one context alone.
TEST(shared_by_threads) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_mlp_desc d = small_desc();
    d.width = 40;
    df_net *net = df_mlp_create(ctx, &d);
    static worker w[2];
    pthread_t thread[2];
    df_real x[400];
    df_model m = df_net_model(net);
    df_sample_desc s = df_sample_defaults();
    for (int i = 0; i < 2; i++) {
        w[i].net = net;
        w[i].first = (uint64_t)(100 * i);
        expect(pthread_create(&thread[i], NULL, work, &w[i]) == 0);
    }
    for (int i = 0; i < 2; i++) pthread_join(thread[i], NULL);
    s.steps = 8;
    check(df_sample(ctx, &m, &s, x, 200) == DF_OK, "%s", df_ctx_message(ctx));
    for (int i = 0; i < 2; i++) {
        expect(w[i].result == DF_OK);
        same_bits(w[i].x, x + 200 * i, sizeof w[i].x);
    }
    df_net_free(net);
    df_ctx_free(ctx);
}

// Make, save, load, sample, both products: the first failure, or DF_OK.
static df_result whole(df_ctx *ctx) {
    df_mlp_desc d = small_desc();
    df_net *net = df_mlp_create(ctx, &d), *back = NULL, *own = conv_net(ctx, 2, 1);
    df_buffer b, c;
    df_real x[6] = {1, 2, 3, 4, 5, 6}, y[6];
    double t[3] = {.2, .4, .6}, mean = 0, scale = 2;
    df_sample_desc s = df_sample_defaults();
    df_result result = net == NULL || own == NULL ? df_ctx_error(ctx) : DF_OK;
    memset(&b, 0, sizeof b);
    memset(&c, 0, sizeof c);
    s.steps = 2;
    if (!result) result = df_net_set_scaling(ctx, net, 1, &mean, &scale);
    if (!result) result = df_net_save(ctx, net, df_sink_buffer(&b));
    if (!result) {
        back = df_net_load(ctx, df_source_memory(b.data, b.size));
        if (back == NULL) result = df_ctx_error(ctx);
    }
    if (!result) result = df_net_save(ctx, own, df_sink_buffer(&c));
    if (!result) result = df_net_load_into(ctx, own, df_source_memory(c.data, c.size));
    if (!result) {
        df_model m = df_net_model(back);
        result = df_sample(ctx, &m, &s, x, 3);
        if (!result) result = df_model_ask(ctx, &m, DF_ASK_JVP, t, 3, x, x, NULL, y);
        if (!result) result = df_model_ask(ctx, &m, DF_ASK_VJP, t, 3, x, x, NULL, y);
    }
    df_buffer_free(ctx, &b);
    df_buffer_free(ctx, &c);
    df_net_free(net);
    df_net_free(back);
    df_net_free(own);
    return result;
}

TEST(failing_memory) {
    long calls = 0;
    for (long at = 0; at <= calls; at++) {
        counter c = {0, 0, at};
        df_ctx *ctx = new_ctx(1, &c);
        df_result result = ctx == NULL ? (df_result)DF_ERR_MEMORY : whole(ctx);
        if (at == 0) calls = c.calls;
        check(result == (at == 0 ? DF_OK : DF_ERR_MEMORY), "call %ld of %ld failing: %s: %s", at,
              calls, df_result_name(result), ctx ? df_ctx_message(ctx) : "no context");
        df_ctx_free(ctx);
        check(c.live == 0, "call %ld failing: %ld bytes lost", at, c.live);
    }
    expect(calls > 30);
}

// What could not be made is handed on: an error or nothing, and the first sentence stays.
TEST(null_arguments) {
    df_ctx *ctx = new_ctx(1, NULL);
    int one[1] = {1};
    double number = 1;
    df_card card = df_card_defaults();
    df_buffer b;
    memset(&b, 0, sizeof b);
    df_sink sink = df_sink_buffer(&b);
    df_source source = df_source_memory("x", 1);
    df_net *net = df_mlp_create(ctx, NULL);
    expect(df_mlp_create(NULL, NULL) == NULL && df_net_load(NULL, source) == NULL);
    expect(df_net_create(NULL, "own", 1, one, forward_same, 0) == NULL);
    expect(df_net_create(ctx, "own", 1, NULL, forward_same, 0) == NULL);
    expect(df_net_save(NULL, net, sink) == DF_ERR_ARGUMENT);
    expect(df_net_load_into(NULL, net, source) == DF_ERR_ARGUMENT);
    expect(df_net_set_card(ctx, net, NULL) == DF_ERR_ARGUMENT && says(ctx, "card is NULL"));
    expect(df_net_set_scaling(ctx, net, 1, NULL, &number) == DF_ERR_ARGUMENT);
    expect(df_net_set_scaling(ctx, net, 1, &number, NULL) == DF_ERR_ARGUMENT);
    expect(df_net_set_scaling(ctx, net, 0, NULL, NULL) == DF_OK);
    df_net *own = df_net_create(ctx, "own", 1, one, forward_same, 0);
    expect(df_net_add(ctx, own, "w", 1, NULL, DF_INIT_ONE) == -1 && says(ctx, "'w'"));
    df_ctx_clear(ctx);
    expect(df_net_save(ctx, NULL, sink) == DF_ERR_ARGUMENT && says(ctx, "df_net_save"));
    df_ctx_clear(ctx);
    expect(df_net_load_into(ctx, NULL, source) == DF_ERR_ARGUMENT && says(ctx, "load_into"));
    df_ctx_clear(ctx);
    expect(df_net_add(ctx, NULL, "w", 1, one, DF_INIT_ONE) == -1 && says(ctx, "is NULL"));
    expect(df_net_set_card(ctx, NULL, &card) == DF_ERR_ARGUMENT);
    expect(df_net_set_scaling(ctx, NULL, 1, &number, &number) == DF_ERR_ARGUMENT);
    df_net_set(NULL, 0, 1);
    expect(df_net_load(ctx, source) == NULL);
    char first[512];
    snprintf(first, sizeof first, "%s", df_ctx_message(ctx));
    expect(df_net_save(ctx, NULL, sink) == df_ctx_error(ctx) && df_ctx_error(ctx) < 0);
    same_text(df_ctx_message(ctx), first);
    df_model m = df_net_model(NULL);
    expect(m.predict == NULL && m.dim == df_model_defaults().dim);
    df_net_free(net);
    df_net_free(own);
    df_ctx_free(ctx);
}

// A kind that is built in is complete: its forward pass trusts its slots and its parameters.
TEST(sealed) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_mlp_desc d = small_desc();
    df_net *net = df_mlp_create(ctx, &d), *back;
    df_buffer b;
    memset(&b, 0, sizeof b);
    expect(df_net_save(ctx, net, df_sink_buffer(&b)) == DF_OK);
    back = df_net_load(ctx, df_source_memory(b.data, b.size));
    for (int i = 0; i < 2; i++) {
        df_net *x = i == 0 ? net : back;
        int depth = df_net_get(x, 1), count = df_net_count(x);
        df_net_set(x, 1, 50);
        expect(depth == 2 && df_net_get(x, 1) == depth);
        expect(df_layer_linear(ctx, x, "more", 400, 400, DF_INIT_ONE) == -1);
        expect(says(ctx, "built in"));
        expect(df_net_count(x) == count);
        expect(df_net_load_into(ctx, x, df_source_memory(b.data, b.size)) == DF_OK);
    }
    df_buffer_free(ctx, &b);
    df_net_free(net);
    df_net_free(back);
    df_ctx_free(ctx);
}

// Memory that is short once: the question fails, the next one is answered, and tensors work,
// although nobody cleared anything.
TEST(short_of_memory_once) {
    enum { N = 500 };
    static df_real x[2 * N];
    df_sample_desc s = df_sample_defaults();
    df_mlp_desc d = small_desc();
    int failures = 0;
    d.width = 64;
    s.steps = 2;
    for (int at = 1; at < 50; at++) {
        counter c = {0, 0, 0};
        df_ctx *ctx = new_ctx(1, &c);
        df_net *net = df_mlp_create(ctx, &d);
        df_model m = df_net_model(net);
        int shape[1] = {2};
        c.fail_at = c.calls + at;
        df_result result = df_sample(ctx, &m, &s, x, N);
        if (result != DF_OK) {
            failures++;
            expect(result == DF_ERR_MEMORY && df_ctx_error(ctx) == DF_ERR_MEMORY);
            expect(says(ctx, "no memory"));
            expect(df_tensor_copy(ctx, 1, shape, x) != NULL);
            check(df_sample(ctx, &m, &s, x, N) == DF_OK, "%d: %s", at, df_ctx_message(ctx));
        }
        df_net_free(net);
        df_ctx_free(ctx);
        if (result == DF_OK) break;
    }
    check(failures > 3 && failures < 49, "%d failures", failures);
}

TEST(condition) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_net *net = df_mlp_create(ctx, NULL);
    df_model m = df_net_model(net);
    df_sample_desc s = df_sample_defaults();
    df_real x[2], condition[3] = {1, 2, 3};
    s.steps = 2;
    s.condition = condition;
    expect(df_sample(ctx, &m, &s, x, 1) == DF_ERR_UNSUPPORTED && says(ctx, "condition"));
    s.condition = NULL;
    expect(df_sample(ctx, &m, &s, x, 1) == DF_OK);
    df_net_free(net);
    df_ctx_free(ctx);
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN(mlp_parameters);
    RUN(start);
    RUN(adding);
    RUN(mlp_forward);
    RUN(mlp_gradients);
    RUN(memory_of_inference);
    RUN(jvp_vjp);
    RUN(divergence);
    RUN(questions);
    RUN(save_load);
    RUN(own_kind);
    RUN(hostile);
    RUN(cards);
    RUN(shared_by_threads);
    RUN(failing_memory);
    RUN(null_arguments);
    RUN(sealed);
    RUN(short_of_memory_once);
    RUN(condition);
    return test_end();
}
