// reader.h: a network that reads images: which class is this? Written from layers, with loss,
// gradient and optimiser by hand, beside the trainer that does all that for denoisers. Include
// it after diffusion.h, data.h, progress.h.
#ifndef READER_H
#define READER_H

enum { READ_AT_ONCE = 64 };

// Two convolutions, each followed by ReLU and a halving, and a layer on top: logits [B,
// classes]. Height and width must be multiples of 4.
static inline df_tensor *reader_forward(const df_run *run, df_tensor *x, df_tensor *t,
                                        const int *labels) {
    df_ctx *ctx = run->ctx;
    int flat[2] = { -1, df_net_get(run->net, 3) };
    (void)t, (void)labels;
    x = df_relu(ctx, df_run_conv2d(run, df_net_get(run->net, 0), x, 1, 1));
    x = df_avg_pool2x2(ctx, x);
    x = df_relu(ctx, df_run_conv2d(run, df_net_get(run->net, 1), x, 1, 1));
    x = df_avg_pool2x2(ctx, x);
    return df_run_linear(run, df_net_get(run->net, 2), df_reshape(ctx, x, 2, flat));
}

static inline df_net *reader_create(df_ctx *ctx, const data_set *d, uint64_t seed) {
    int shape[3] = { d->c, d->h, d->w }, flat = 32 * (d->h / 4) * (d->w / 4);
    df_net *net = df_net_create(ctx, "reader", 3, shape, reader_forward, seed);
    if (net == NULL) return NULL;
    df_net_set(net, 0, df_layer_conv2d(ctx, net, "conv1", d->c, 16, 3, DF_INIT_FAN_IN));
    df_net_set(net, 1, df_layer_conv2d(ctx, net, "conv2", 16, 32, 3, DF_INIT_FAN_IN));
    df_net_set(net, 2, df_layer_linear(ctx, net, "top", flat, d->classes, DF_INIT_FAN_IN));
    df_net_set(net, 3, flat);
    if (df_ctx_error(ctx) == DF_OK) return net;
    df_net_free(net);
    return NULL;
}

// How many of x [n, c, h, w] are read as `labels`: the most likely class is that. right
// [classes], or NULL, counts them by class. < 0: failed.
static inline int reader_right(df_ctx *ctx, const df_net *net, const data_set *d,
                               const df_real *x, const int *labels, int n, int *right) {
    df_run run = df_run_defaults(ctx, net);
    int sum = 0;
    for (int from = 0; from < n; from += READ_AT_ONCE) {
        int shape[4] = { n - from < READ_AT_ONCE ? n - from : READ_AT_ONCE, d->c, d->h, d->w };
        df_scope scope = df_scope_begin(ctx);
        df_tensor *in = df_tensor_copy(ctx, 4, shape, x + (size_t)from * (size_t)d->dim);
        df_tensor *y = reader_forward(&run, in, NULL, NULL);
        for (int i = 0; y != NULL && i < shape[0]; i++) {
            int best = 0;
            for (int k = 1; k < d->classes; k++)
                if (y->data[i * d->classes + k] > y->data[i * d->classes + best]) best = k;
            sum += best == labels[from + i];
            if (right) right[labels[from + i]] += best == labels[from + i];
        }
        df_scope_end(ctx, scope, NULL);
        if (y == NULL) return -1;
    }
    return sum;
}

// Step number `step` (from 1) of AdamW on the mean cross-entropy of rows drawn from the first
// n. m, v, g [size]: moments and gradients.
static inline df_result reader_step(df_ctx *ctx, df_net *net, const data_set *d, int n,
                                    int step, const df_adamw *adamw, df_real *m, df_real *v,
                                    df_real *g) {
    int shape[4] = { READ_AT_ONCE, d->c, d->h, d->w }, labels[READ_AT_ONCE];
    size_t size = df_net_size(net);
    double u[READ_AT_ONCE];
    df_run run = df_run_defaults(ctx, net);
    df_scope scope = df_scope_begin(ctx);
    df_tensor *x = df_tensor_new(ctx, 4, shape);
    df_random_uniform(1, (uint64_t)step, 0, READ_AT_ONCE, u);
    for (int i = 0; x != NULL && i < READ_AT_ONCE; i++) {
        int row = (int)(u[i] * n);
        labels[i] = d->labels[row];
        memcpy(x->data + (size_t)i * (size_t)d->dim, d->x + (size_t)row * (size_t)d->dim,
               (size_t)d->dim * sizeof *x->data);
    }
    memset(g, 0, size * sizeof *g);
    run.weights = df_net_weights(net), run.grads = g, run.training = 1;
    df_record_begin(ctx);
    df_tensor *y = reader_forward(&run, x, NULL, NULL);
    df_result result = df_backward(ctx, df_mean(ctx, df_cross_entropy(ctx, y, labels)));
    df_record_end(ctx);
    df_scope_end(ctx, scope, NULL);
    if (result == DF_OK) df_adamw_step(ctx, adamw, step, size, df_net_weights(net), m, v, g, 1);
    return result;
}

// A reader of the first n images; NULL on failure, the context says why.
static inline df_net *reader_train(df_ctx *ctx, const data_set *d, int n, int steps,
                                   uint64_t seed) {
    df_adamw adamw = { 2e-3, 0.9, 0.999, 1e-8, 0.01 };
    df_net *net = reader_create(ctx, d, seed);
    size_t size = net ? df_net_size(net) : 0;
    df_real *room = (df_real *)calloc(3 * size + 1, sizeof *room);
    df_result result = net && room ? DF_OK : DF_ERR_MEMORY;
    progress_bar bar = progress_begin("the reader");
    for (int step = 1; result == DF_OK && step <= steps; step++) {
        adamw.learning_rate = 2e-3 * (1 - (double)(step - 1) / steps);
        result = reader_step(ctx, net, d, n, step, &adamw, room, room + size, room + 2 * size);
        progress(&bar, step, steps, "", (double)NAN);
    }
    free(room);
    if (result == DF_OK) return net;
    df_net_free(net);
    return NULL;
}
#endif
