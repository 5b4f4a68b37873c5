// Networks by one walk: the token transformer and the UNet along a trajectory against plain
// loops in double, their gradients by finite differences, names, files, errors; what a net
// costs against figures counted by hand.
#include "diffusion.h"
#include "test.h"
#include "counting.h"

enum { IS_DOUBLE = sizeof(df_real) == 8 };
static const double TINY = sizeof(df_real) == 8 ? 1e-12 : 2e-5;

// Every weight at random: what starts at zero would hide mistakes.
static void stir(df_net *net, uint64_t seed) {
    df_real *w = df_net_weights(net);
    df_random_normal(seed, 1, 1, df_net_size(net), w);
    for (size_t i = 0; i < df_net_size(net); i++) w[i] = (df_real)(0.3 * (double)w[i]);
}
static const df_real *weight(const df_net *net, const char *format, ...) {
    char name[200];
    va_list ap;
    va_start(ap, format);
    vsnprintf(name, sizeof name, format, ap);
    va_end(ap);
    int i = df_net_find(net, name);
    if (!check(i >= 0, "no parameter %s", name)) exit(1);
    return df_run_defaults(NULL, net).weights + df_net_param(net, i)->offset;
}

// y [rows, out] = x [rows, in] W^T + b, b may be NULL.
static void affine(const double *x, int rows, int in, int out, const df_real *W, const df_real *b,
                   double *y) {
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < out; o++) {
            double s = b ? (double)b[o] : 0;
            for (int i = 0; i < in; i++) s += x[r * in + i] * (double)W[o * in + i];
            y[r * out + o] = s;
        }
}
static double silu(double x) { return x / (1 + exp(-x)); }
static double mish(double x) { return x * tanh(log1p(exp(x))); }
static double gelu_tanh(double x) {
    return 0.5 * x * (1 + tanh(sqrt(2 / acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

// ---- the token transformer ----

static df_transformer_desc small_transformer(int variant) {
    df_transformer_desc d = df_transformer_defaults();
    d.vocab = 7, d.length = 5, d.width = 8, d.heads = 2, d.depth = 2, d.mlp_width = 12;
    d.cond_width = 6, d.seed = 3;
    d.time = variant & 1, d.rms = variant >> 1 & 1, d.classes = variant & 4 ? 3 : 0;
    d.null_class = variant != 5;
    return d;
}

// w norm(x) (1 + scale) + shift of [T, D]; m NULL: no modulation.
static void norm(const df_transformer_desc *d, const double *x, const df_real *w, const double *m,
                 double *y) {
    int D = d->width;
    for (int t = 0; t < d->length; t++) {
        double mean = 0, square = 0;
        for (int i = 0; i < D; i++) mean += x[t * D + i] / D;
        if (d->rms) mean = 0;
        for (int i = 0; i < D; i++) square += pow(x[t * D + i] - mean, 2) / D;
        for (int i = 0; i < D; i++) {
            y[t * D + i] = (x[t * D + i] - mean) / sqrt(square + 1e-5) * (double)w[i];
            if (m) y[t * D + i] = y[t * D + i] * (1 + m[D + i]) + m[i];
        }
    }
}
static void turn(double *x, int t, int dim) {
    for (int k = 0; k < dim / 2; k++) {
        double a = t * pow(10000, -2.0 * k / dim), u = x[k], v = x[k + dim / 2];
        x[k] = u * cos(a) - v * sin(a);
        x[k + dim / 2] = v * cos(a) + u * sin(a);
    }
}
// qkv [T, 3D] -> softmax(q k^T / sqrt dim) v [T, D]
static void attend(const df_transformer_desc *d, double *qkv, double *y) {
    int T = d->length, D = d->width, H = d->heads, dim = D / H;
    for (int t = 0; t < T; t++)
        for (int h = 0; h < 2 * H; h++) turn(qkv + t * 3 * D + h * dim, t, dim);
    for (int h = 0; h < H; h++)
        for (int t = 0; t < T; t++) {
            double p[16], sum = 0;
            for (int s = 0; s < T; s++) {
                double dot = 0;
                for (int i = 0; i < dim; i++)
                    dot += qkv[t * 3 * D + h * dim + i] * qkv[s * 3 * D + D + h * dim + i];
                sum += p[s] = exp(dot / sqrt(dim));
            }
            for (int i = 0; i < dim; i++) {
                double v = 0;
                for (int s = 0; s < T; s++) v += p[s] / sum * qkv[s * 3 * D + 2 * D + h * dim + i];
                y[t * D + h * dim + i] = v;
            }
        }
}
static void naive_transformer(const df_net *net, const df_transformer_desc *d, const int *tokens,
                              double t, int label, double *logits) {
    int T = d->length, D = d->width, K = d->cond_width, has = d->time || d->classes;
    double x[64], y[64], z[256], e[256], c[16] = {0}, m[64], g[64];
    for (int i = 0; i < T * D; i++)
        x[i] = (double)weight(net, "vocab_embed.embedding")[tokens[i / D] * D + i % D];
    if (d->time) {
        for (int k = 0; k < 128; k++) {
            e[k] = cos(t * pow(10000, -k / 128.0));
            e[128 + k] = sin(t * pow(10000, -k / 128.0));
        }
        affine(e, 1, 256, K, weight(net, "sigma_map.mlp.0.weight"),
               weight(net, "sigma_map.mlp.0.bias"), g);
        for (int k = 0; k < K; k++) g[k] = silu(g[k]);
        affine(g, 1, K, K, weight(net, "sigma_map.mlp.2.weight"),
               weight(net, "sigma_map.mlp.2.bias"), c);
    }
    int row = label >= 0 ? label : d->null_class ? d->classes : -1;
    for (int k = 0; k < K && d->classes > 0 && row >= 0; k++)
        c[k] += (double)weight(net, "cond_map.embedding_table.weight")[row * K + k];
    for (int k = 0; k < K; k++) c[k] = silu(c[k]);
    for (int b = 0; b < d->depth; b++) {
        if (has)
            affine(c, 1, K, 6 * D, weight(net, "blocks.%d.adaLN_modulation.weight", b),
                   weight(net, "blocks.%d.adaLN_modulation.bias", b), m);
        norm(d, x, weight(net, "blocks.%d.norm1.weight", b), has ? m : NULL, y);
        affine(y, T, D, 3 * D, weight(net, "blocks.%d.attn_qkv.weight", b), NULL, z);
        attend(d, z, y);
        affine(y, T, D, D, weight(net, "blocks.%d.attn_out.weight", b), NULL, z);
        for (int i = 0; i < T * D; i++) x[i] += z[i] * (has ? m[2 * D + i % D] : 1);
        norm(d, x, weight(net, "blocks.%d.norm2.weight", b), has ? m + 3 * D : NULL, y);
        affine(y, T, D, d->mlp_width, weight(net, "blocks.%d.mlp.0.weight", b),
               weight(net, "blocks.%d.mlp.0.bias", b), z);
        for (int i = 0; i < T * d->mlp_width; i++) z[i] = gelu_tanh(z[i]);
        affine(z, T, d->mlp_width, D, weight(net, "blocks.%d.mlp.2.weight", b),
               weight(net, "blocks.%d.mlp.2.bias", b), y);
        for (int i = 0; i < T * D; i++) x[i] += y[i] * (has ? m[5 * D + i % D] : 1);
    }
    if (has)
        affine(c, 1, K, 2 * D, weight(net, "output_layer.adaLN_modulation.weight"),
               weight(net, "output_layer.adaLN_modulation.bias"), m);
    norm(d, x, weight(net, "output_layer.norm_final.weight"), has ? m : NULL, y);
    affine(y, T, D, d->vocab, weight(net, "output_layer.linear.weight"),
           weight(net, "output_layer.linear.bias"), logits);
}

TEST(transformer_forward) {
    df_ctx *ctx = new_ctx(2, NULL);
    enum { N = 3, T = 5, V = 7 };
    int tokens[N * T], labels[N] = {2, -1, 0}, shape[2] = {N, T};
    df_real t[N] = {(df_real).25, 3, (df_real)7.5}, x[N * T];
    double want[N * T * V];
    for (int i = 0; i < N * T; i++) tokens[i] = i * i * 5 % V, x[i] = (df_real)tokens[i];
    for (int variant = 0; variant < 8; variant++) {
        df_transformer_desc d = small_transformer(variant);
        df_net *net = df_transformer_create(ctx, &d);
        if (!check(net != NULL, "%s", df_ctx_message(ctx))) break;
        expect(df_net_vocab(net) == V && df_net_dim(net) == T && df_net_classes(net) == d.classes);
        df_run run = df_run_defaults(ctx, net);
        df_tensor *y = df_run_tokens(&run, tokens, N, NULL, NULL);    // adaLN-Zero, linear zero
        for (int i = 0; y != NULL && i < N * T * V; i++) want[i] = 0;
        if (check(y != NULL, "%s", df_ctx_message(ctx))) near_all(y->data, want, N * T * V, 0);
        stir(net, (uint64_t)variant);
        const int *said = d.classes ? labels : NULL;
        df_tensor *time = df_tensor_copy(ctx, 1, shape, t);
        for (int i = 0; i < N; i++)
            naive_transformer(net, &d, tokens + i * T, (double)t[i], said ? said[i] : -1,
                              want + i * T * V);
        y = df_run_tokens(&run, tokens, N, time, said);
        if (check(y != NULL, "%s", df_ctx_message(ctx))) {
            expect(y->ndim == 3 && y->shape[0] == N && y->shape[1] == T && y->shape[2] == V);
            near_all(y->data, want, N * T * V, TINY);
            df_tensor *same = df_run_net(&run, df_tensor_copy(ctx, 2, shape, x), time, said);
            same_bits(y->data, same->data, sizeof(df_real) * N * T * V);
            df_tensor *alone = df_run_tokens(&run, tokens + T, 1, df_slice(ctx, time, 0, 1, 1),
                                             said ? said + 1 : NULL);
            same_bits(y->data + T * V, alone->data, sizeof(df_real) * T * V);
        }
        df_net_free(net);
    }
    df_ctx_free(ctx);
}

TEST(transformer_names) {
    static const struct { const char *name; int ndim, a, b; } want[] = {
        {"vocab_embed.embedding", 2, 7, 8}, {"sigma_map.mlp.0.weight", 2, 6, 256},
        {"sigma_map.mlp.0.bias", 1, 6, 1}, {"sigma_map.mlp.2.weight", 2, 6, 6},
        {"sigma_map.mlp.2.bias", 1, 6, 1}, {"blocks.0.adaLN_modulation.weight", 2, 48, 6},
        {"blocks.0.adaLN_modulation.bias", 1, 48, 1}, {"blocks.0.norm1.weight", 1, 8, 1},
        {"blocks.0.attn_qkv.weight", 2, 24, 8}, {"blocks.0.attn_out.weight", 2, 8, 8},
        {"blocks.0.norm2.weight", 1, 8, 1}, {"blocks.0.mlp.0.weight", 2, 32, 8},
        {"blocks.0.mlp.0.bias", 1, 32, 1}, {"blocks.0.mlp.2.weight", 2, 8, 32},
        {"blocks.0.mlp.2.bias", 1, 8, 1}, {"output_layer.adaLN_modulation.weight", 2, 16, 6},
        {"output_layer.adaLN_modulation.bias", 1, 16, 1},
        {"output_layer.norm_final.weight", 1, 8, 1}, {"output_layer.linear.weight", 2, 7, 8},
        {"output_layer.linear.bias", 1, 7, 1}};
    enum { COUNT = sizeof want / sizeof *want };
    df_ctx *ctx = new_ctx(1, NULL);
    df_transformer_desc d = small_transformer(1);
    d.depth = 1, d.mlp_width = 0;
    df_net *net = df_transformer_create(ctx, &d);
    expect(df_net_count(net) == COUNT);
    for (int i = 0; i < COUNT; i++) {
        const df_param *p = df_net_param(net, df_net_find(net, want[i].name));
        check(p && p->ndim == want[i].ndim && p->shape[0] == want[i].a && p->shape[1] == want[i].b,
              "%s", want[i].name);
    }
    df_net_free(net);
    d.time = 0;
    net = df_transformer_create(ctx, &d);
    expect(df_net_count(net) == COUNT - 8 && df_net_find(net, "sigma_map.mlp.0.weight") < 0);
    df_net_free(net);
    df_ctx_free(ctx);
}

// ---- the UNet along a trajectory ----

static df_unet1d_desc small_unet1d(int variant) {
    df_unet1d_desc d = df_unet1d_defaults();
    d.channels = 3, d.length = 8, d.embed = 6, d.seed = 4, d.groups = 4;
    d.width[0] = 8, d.width[1] = 12, d.width[2] = 8;
    d.kernel = variant & 1 ? 5 : 3, d.predict_scale = variant >> 1 & 1;
    d.condition = variant & 4 ? 4 : 0;
    d.levels = variant == 7 ? 1 : 3;
    return d;
}

// All trajectories here are [C, T]. Zeros outside.
static void conv(const double *x, int in, int T, int out, int kernel, int stride,
                 const df_real *w, const df_real *b, double *y) {
    int pad = kernel / 2, To = (T + 2 * pad - kernel) / stride + 1;
    for (int o = 0; o < out; o++)
        for (int t = 0; t < To; t++) {
            double s = (double)b[o];
            for (int i = 0; i < in; i++)
                for (int k = 0; k < kernel; k++) {
                    int at = t * stride + k - pad;
                    if (at >= 0 && at < T) s += (double)w[(o * in + i) * kernel + k] * x[i * T + at];
                }
            y[o * To + t] = s;
        }
}
static void conv_transposed(const double *x, int C, int T, const df_real *w, const df_real *b,
                            double *y) {
    for (int o = 0; o < C; o++) {
        for (int t = 0; t < 2 * T; t++) y[o * 2 * T + t] = (double)b[o];
        for (int i = 0; i < C; i++)
            for (int t = 0; t < T; t++)
                for (int k = 0; k < 4; k++) {
                    int at = 2 * t + k - 1;
                    if (at >= 0 && at < 2 * T)
                        y[o * 2 * T + at] += (double)w[(i * C + o) * 4 + k] * x[i * T + t];
                }
    }
}
static void conv_block(const df_net *net, const char *name, const double *x, int in, int T,
                       int out, int kernel, int groups, double *y) {
    int run = out / groups * T;
    conv(x, in, T, out, kernel, 1, weight(net, "%s.block.0.weight", name),
         weight(net, "%s.block.0.bias", name), y);
    for (int g = 0; g < groups; g++) {
        double mean = 0, square = 0, *z = y + g * run;
        for (int i = 0; i < run; i++) mean += z[i] / run;
        for (int i = 0; i < run; i++) square += pow(z[i] - mean, 2) / run;
        for (int i = 0; i < run; i++) {
            int c = g * (out / groups) + i / T;
            z[i] = (z[i] - mean) / sqrt(square + 1e-5) *
                   (double)weight(net, "%s.block.1.weight", name)[c] +
                   (double)weight(net, "%s.block.1.bias", name)[c];
            z[i] = mish(z[i]);
        }
    }
}
static void residual(const df_net *net, const df_unet1d_desc *d, const char *name, double *x,
                     int in, int T, int out, const double *cond) {
    double h[1000], y[1000], e[64];
    char part[100];
    int K = d->embed + d->condition;
    snprintf(part, sizeof part, "%s.blocks.0", name);
    conv_block(net, part, x, in, T, out, d->kernel, d->groups, h);
    affine(cond, 1, K, d->predict_scale ? 2 * out : out,
           weight(net, "%s.cond_encoder.1.weight", name),
           weight(net, "%s.cond_encoder.1.bias", name), e);
    for (int i = 0; i < out * T; i++)
        h[i] = d->predict_scale ? h[i] * e[i / T] + e[out + i / T] : h[i] + e[i / T];
    snprintf(part, sizeof part, "%s.blocks.1", name);
    conv_block(net, part, h, out, T, out, d->kernel, d->groups, y);
    if (in != out)
        conv(x, in, T, out, 1, 1, weight(net, "%s.residual_conv.weight", name),
             weight(net, "%s.residual_conv.bias", name), h);
    else memcpy(h, x, (size_t)(out * T) * sizeof *h);
    for (int i = 0; i < out * T; i++) x[i] = y[i] + h[i];
}
static void naive_unet1d(const df_net *net, const df_unet1d_desc *d, const double *sample,
                         double t, const double *condition, double *out) {
    double x[1000], y[1000], skip[8][300], e[64], g[64], cond[64];
    int E = d->embed, C = d->channels, T = d->length, L = d->levels;
    char name[100];
    for (int k = 0; k < E / 2; k++) {
        double a = t * exp(-log(10000) * k / (E / 2 - 1));
        e[k] = sin(a), e[E / 2 + k] = cos(a);
    }
    affine(e, 1, E, 4 * E, weight(net, "diffusion_step_encoder.1.weight"),
           weight(net, "diffusion_step_encoder.1.bias"), g);
    for (int k = 0; k < 4 * E; k++) g[k] = mish(g[k]);
    affine(g, 1, 4 * E, E, weight(net, "diffusion_step_encoder.3.weight"),
           weight(net, "diffusion_step_encoder.3.bias"), cond);
    for (int k = 0; k < d->condition; k++) cond[E + k] = condition[k];
    for (int k = 0; k < E + d->condition; k++) cond[k] = mish(cond[k]);
    for (int i = 0; i < C * T; i++) x[i] = sample[i % T * C + i / T];
    for (int l = 0; l < L; l++) {
        for (int k = 0; k < 2; k++) {
            snprintf(name, sizeof name, "down_modules.%d.%d", l, k);
            residual(net, d, name, x, C, T, d->width[l], cond);
            C = d->width[l];
        }
        memcpy(skip[l], x, (size_t)(C * T) * sizeof *x);
        if (l == L - 1) break;
        conv(x, C, T, C, 3, 2, weight(net, "down_modules.%d.2.conv.weight", l),
             weight(net, "down_modules.%d.2.conv.bias", l), y);
        T /= 2;
        memcpy(x, y, (size_t)(C * T) * sizeof *x);
    }
    residual(net, d, "mid_modules.0", x, C, T, C, cond);
    residual(net, d, "mid_modules.1", x, C, T, C, cond);
    for (int i = 0, l = L - 1; l > 0; i++, l--) {
        memcpy(x + C * T, skip[l], (size_t)(C * T) * sizeof *x);
        C *= 2;
        for (int k = 0; k < 2; k++) {
            snprintf(name, sizeof name, "up_modules.%d.%d", i, k);
            residual(net, d, name, x, C, T, d->width[l - 1], cond);
            C = d->width[l - 1];
        }
        conv_transposed(x, C, T, weight(net, "up_modules.%d.2.conv.weight", i),
                        weight(net, "up_modules.%d.2.conv.bias", i), y);
        T *= 2;
        memcpy(x, y, (size_t)(C * T) * sizeof *x);
    }
    conv_block(net, "final_conv.0", x, C, T, C, d->kernel, 8, y);
    conv(y, C, T, d->channels, 1, 1, weight(net, "final_conv.1.weight"),
         weight(net, "final_conv.1.bias"), x);
    for (int i = 0; i < d->channels * T; i++) out[i] = x[i % d->channels * T + i / d->channels];
}

TEST(unet1d_forward) {
    df_ctx *ctx = new_ctx(2, NULL);
    enum { N = 3, DIM = 24, K = 4 };
    df_real x[N * DIM], t[N] = {0, 17, (df_real)62.5}, c[N * K];
    double want[N * DIM], xd[N * DIM], cd[N * K];
    int shape[3] = {N, 8, 3}, wide[2] = {N, K};
    df_random_normal(5, 1, 1, N * DIM, x);
    df_random_normal(5, 2, 1, N * K, c);
    for (int i = 0; i < N * DIM; i++) xd[i] = (double)x[i];
    for (int i = 0; i < N * K; i++) cd[i] = (double)c[i];
    for (int variant = 0; variant < 8; variant++) {
        df_unet1d_desc d = small_unet1d(variant);
        df_net *net = df_unet1d_create(ctx, &d);
        if (!check(net != NULL, "%s", df_ctx_message(ctx))) break;
        expect(df_net_condition(net) == d.condition && df_net_dim(net) == DIM);
        stir(net, (uint64_t)variant);
        df_run run = df_run_defaults(ctx, net);
        if (d.condition) run.condition = df_tensor_copy(ctx, 2, wide, c);
        for (int i = 0; i < N; i++)
            naive_unet1d(net, &d, xd + i * DIM, (double)t[i], cd + i * K, want + i * DIM);
        df_tensor *in = df_tensor_copy(ctx, 3, shape, x), *time = df_tensor_copy(ctx, 1, shape, t);
        df_tensor *y = df_run_net(&run, in, time, NULL), *alone;
        if (check(y != NULL, "%s", df_ctx_message(ctx))) {
            near_all(y->data, want, N * DIM, TINY);
            if (d.condition) run.condition = df_slice(ctx, run.condition, 0, 1, 1);
            alone = df_run_net(&run, df_slice(ctx, in, 0, 1, 1), df_slice(ctx, time, 0, 1, 1),
                               NULL);
            same_bits(y->data + DIM, alone->data, DIM * sizeof(df_real));
        }
        df_net_free(net);
    }
    df_ctx_free(ctx);
}

TEST(unet1d_names) {
    static const struct { const char *name; int ndim, a, b, c; } want[] = {
        {"diffusion_step_encoder.1.weight", 2, 1024, 256, 1},
        {"diffusion_step_encoder.3.weight", 2, 256, 1024, 1},
        {"down_modules.0.0.blocks.0.block.0.weight", 3, 256, 2, 5},
        {"down_modules.0.0.blocks.0.block.1.weight", 1, 256, 1, 1},
        {"down_modules.0.0.blocks.1.block.0.weight", 3, 256, 256, 5},
        {"down_modules.0.0.cond_encoder.1.weight", 2, 512, 276, 1},
        {"down_modules.0.0.residual_conv.weight", 3, 256, 2, 1},
        {"down_modules.0.2.conv.weight", 3, 256, 256, 3},
        {"mid_modules.1.blocks.1.block.0.bias", 1, 1024, 1, 1},
        {"up_modules.0.0.blocks.0.block.0.weight", 3, 512, 2048, 5},
        {"up_modules.1.0.residual_conv.weight", 3, 256, 1024, 1},
        {"up_modules.1.2.conv.weight", 3, 256, 256, 4},
        {"final_conv.0.block.0.weight", 3, 256, 256, 5},
        {"final_conv.1.weight", 3, 2, 256, 1}};
    df_ctx *ctx = new_ctx(1, NULL);
    df_unet1d_desc d = df_unet1d_defaults();
    d.condition = 20;
    df_net *net = df_unet1d_create(ctx, &d);
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        const df_param *p = df_net_param(net, df_net_find(net, want[i].name));
        check(p && p->ndim == want[i].ndim && p->shape[0] == want[i].a &&
                  p->shape[1] == want[i].b && p->shape[2] == want[i].c, "%s", want[i].name);
    }
    expect(df_net_find(net, "down_modules.2.2.conv.weight") < 0);
    expect(df_net_find(net, "down_modules.0.1.residual_conv.weight") < 0);
    // counted by hand: a block's numbers from its channels, then the rest
    size_t all = 256 * 1024 + 1024 + 1024 * 256 + 256;
    static const int blocks[10][2] = {{2, 256}, {256, 256}, {256, 512}, {512, 512}, {512, 1024},
                                      {1024, 1024}, {1024, 1024}, {1024, 1024}, {0, 0}, {0, 0}};
    static const int up[4][2] = {{2048, 512}, {512, 512}, {1024, 256}, {256, 256}};
    for (int i = 0; i < 12; i++) {
        size_t a = (size_t)(i < 8 ? blocks[i][0] : up[i - 8][0]);
        size_t b = (size_t)(i < 8 ? blocks[i][1] : up[i - 8][1]);
        all += (a + b) * b * 5 + 2 * 3 * b + 2 * b * 277 + (a != b ? a * b + b : 0);
    }
    all += 256 * 256 * 3 + 256 + 512 * 512 * 3 + 512;              // halvings
    all += 512 * 512 * 4 + 512 + 256 * 256 * 4 + 256;              // doublings
    all += 256 * 256 * 5 + 3 * 256 + 2 * 256 + 2;
    check(df_net_size(net) == all, "%zu parameters, %zu by hand", df_net_size(net), all);
    df_net_free(net);
    df_ctx_free(ctx);
}

// ---- both ----

// Net `which` (0: transformer, 1: UNet) with one of the variants, stirred.
static df_net *make(df_ctx *ctx, int which, int variant) {
    df_transformer_desc a = small_transformer(variant);
    df_unet1d_desc b = small_unet1d(variant);
    df_net *net = which ? df_unet1d_create(ctx, &b) : df_transformer_create(ctx, &a);
    if (net != NULL) stir(net, 7);
    return net;
}
static df_tensor *run_small(df_ctx *ctx, const df_net *net, df_real *grads) {
    static const int tokens[10] = {0, 6, 3, 3, 1, 5, 2, 4, 6, 0}, labels[2] = {1, -1};
    int shape[3] = {2, 8, 3}, wide[2] = {2, 0};
    df_real x[48], t[2] = {(df_real)1.5, 12}, c[8];
    df_run run = df_run_defaults(ctx, net);
    run.grads = grads;
    df_tensor *time = df_tensor_copy(ctx, 1, shape, t);
    if (df_net_vocab(net) > 0)
        return df_run_tokens(&run, tokens, 2, time, df_net_classes(net) ? labels : NULL);
    df_random_normal(2, 1, 1, 48, x);
    df_random_normal(2, 2, 1, 8, c);
    wide[1] = df_net_condition(net);
    if (wide[1] > 0) run.condition = df_tensor_copy(ctx, 2, wide, c);
    return df_run_net(&run, df_tensor_copy(ctx, 3, shape, x), time, NULL);
}

// d <r, net> / d parameters, by central differences at every third parameter or so.
TEST(gradients) {
    if (!IS_DOUBLE) return;
    static const int variants[5][2] = {{0, 5}, {0, 2}, {0, 7}, {1, 6}, {1, 1}};
    for (int v = 0; v < 5; v++) {
        df_ctx *ctx = new_ctx(1, NULL);
        df_net *net = make(ctx, variants[v][0], variants[v][1]);
        size_t size = df_net_size(net), step = test_short() ? 97 : 3;
        df_real *grads = (df_real *)calloc(size, sizeof *grads), *w = df_net_weights(net);
        double *want = (double *)calloc(size, sizeof *want), h = 1e-5;
        df_real r[80];
        df_random_normal(1, 2, 1, 80, r);
        df_record_begin(ctx);
        df_tensor *y = run_small(ctx, net, grads);
        df_tensor *loss = df_sum(ctx, df_mul(ctx, y, df_tensor_copy(ctx, y->ndim, y->shape, r)));
        check(df_backward(ctx, loss) == DF_OK, "%s", df_ctx_message(ctx));
        df_record_end(ctx);
        for (size_t i = 0; i < size; i++) {
            if (i % step != 0) {
                grads[i] = 0;
                continue;
            }
            double keep = (double)w[i];
            for (int sign = -1; sign < 2; sign += 2) {
                df_scope s = df_scope_begin(ctx);
                w[i] = (df_real)(keep + sign * h);
                y = run_small(ctx, net, NULL);
                for (size_t k = 0; k < y->size; k++)
                    want[i] += sign * (double)y->data[k] * (double)r[k] / (2 * h);
                df_scope_end(ctx, s, NULL);
            }
            w[i] = (df_real)keep;
        }
        near_all(grads, want, size, 1e-7);
        free(grads);
        free(want);
        df_net_free(net);
        df_ctx_free(ctx);
    }
}

// The UNet answers a sampler, products with its Jacobian included, with its condition.
TEST(unet1d_model) {
    df_ctx *ctx = new_ctx(2, NULL);
    df_net *net = make(ctx, 1, 6);
    df_model m = df_net_model(net);
    df_real x[48], v[48], jv[48], up[48], down[48], xs[48], c[8];
    double t[2] = {.2, .7}, fd[48], h = IS_DOUBLE ? 1e-5 : 4e-3;
    df_random_normal(1, 1, 1, 48, x);
    df_random_normal(1, 2, 1, 48, v);
    df_random_normal(1, 3, 1, 8, c);
    expect(m.dim == 24);
    for (int i = 0; i < 48; i++) xs[i] = x[i] + (df_real)h * v[i];
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, 2, xs, NULL, NULL, up) == DF_OK);
    for (int i = 0; i < 48; i++) xs[i] = x[i] - (df_real)h * v[i];
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, 2, xs, NULL, NULL, down) == DF_OK);
    for (int i = 0; i < 48; i++) fd[i] = ((double)up[i] - (double)down[i]) / (2 * h);
    expect(df_model_ask(ctx, &m, DF_ASK_JVP, t, 2, x, v, NULL, jv) == DF_OK);
    near_all(jv, fd, 48, IS_DOUBLE ? 1e-8 : 2e-3);
    df_sample_desc s = df_sample_defaults();
    s.steps = 4, s.condition = c, s.condition_stride = 4, s.seed = 3;
    check(df_sample(ctx, &m, &s, up, 2) == DF_OK, "%s", df_ctx_message(ctx));
    c[4] += 1;                                       // the second sample's alone
    expect(df_sample(ctx, &m, &s, down, 2) == DF_OK);
    same_bits(up, down, 24 * sizeof *up);
    expect(memcmp(up + 24, down + 24, 24 * sizeof *up) != 0);
    df_net_free(net);
    df_ctx_free(ctx);
}

TEST(files) {
    df_ctx *ctx = new_ctx(1, NULL);
    for (int which = 0; which < 2; which++)
        for (int variant = 4; variant < 8; variant++) {
            df_net *net = make(ctx, which, variant), *back;
            df_buffer b, again;
            memset(&b, 0, sizeof b);
            memset(&again, 0, sizeof again);
            check(df_net_save(ctx, net, df_sink_buffer(&b)) == DF_OK, "%s", df_ctx_message(ctx));
            back = df_net_load(ctx, df_source_memory(b.data, b.size));
            if (check(back != NULL, "%s", df_ctx_message(ctx))) {
                df_tensor *y = run_small(ctx, net, NULL), *z = run_small(ctx, back, NULL);
                same_bits(y->data, z->data, y->size * sizeof(df_real));
                expect(df_net_vocab(back) == df_net_vocab(net));
                expect(df_net_save(ctx, back, df_sink_buffer(&again)) == DF_OK);
                expect(b.size == again.size && memcmp(b.data, again.data, b.size) == 0);
            }
            df_buffer_free(ctx, &b);
            df_buffer_free(ctx, &again);
            df_net_free(net);
            df_net_free(back);
        }
    df_ctx_free(ctx);
}

TEST(refused) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_transformer_desc a = df_transformer_defaults();
    df_unet1d_desc b = df_unet1d_defaults();
    a.heads = 3;
    expect(df_transformer_create(ctx, &a) == NULL && says(ctx, "width 256") && says(ctx, "3 heads"));
    a.heads = 256;                                   // one feature for each head
    expect(df_transformer_create(ctx, &a) == NULL && says(ctx, "even"));
    a = df_transformer_defaults(), a.vocab = 0;
    expect(df_transformer_create(ctx, &a) == NULL && says(ctx, "vocab is 0"));
    a.cookie = 0;
    expect(df_transformer_create(ctx, &a) == NULL && says(ctx, "defaults"));
    expect(df_transformer_create(NULL, NULL) == NULL && df_unet1d_create(NULL, NULL) == NULL);
    b.length = 18;
    expect(df_unet1d_create(ctx, &b) == NULL && says(ctx, "16 and 20"));
    b = df_unet1d_defaults(), b.kernel = 4;
    expect(df_unet1d_create(ctx, &b) == NULL && says(ctx, "kernel 4 odd"));
    b = df_unet1d_defaults(), b.embed = 7;
    expect(df_unet1d_create(ctx, &b) == NULL && says(ctx, "embed 7"));
    b = df_unet1d_defaults(), b.width[1] = 100;
    expect(df_unet1d_create(ctx, &b) == NULL && says(ctx, "level 1 has 100 channels"));
    b = df_unet1d_defaults(), b.groups = 4, b.width[0] = 20;
    expect(df_unet1d_create(ctx, &b) == NULL && says(ctx, "which 8 groups"));
    b = df_unet1d_defaults(), b.levels = 9;
    expect(df_unet1d_create(ctx, &b) == NULL && says(ctx, "levels is 9"));
    // tokens that are none
    static const double wrong[4] = {-1, 7, 2.5, NAN};
    df_net *net = make(ctx, 0, 0);
    df_run run = df_run_defaults(ctx, net);
    int shape[2] = {1, 5}, tokens[5] = {0, 1, 7, 2, 3};
    for (int i = 0; i < 4; i++) {
        df_tensor *x = df_tensor_new(ctx, 2, shape);
        x->data[3] = (df_real)wrong[i];
        expect(df_run_net(&run, x, df_tensor_new(ctx, 1, shape), NULL) == NULL);
        expect(df_ctx_error(ctx) == DF_ERR_ARGUMENT && says(ctx, "token 3 of row 0"));
        df_ctx_clear(ctx);
    }
    expect(df_run_tokens(&run, tokens, 1, NULL, NULL) == NULL && says(ctx, "from 0 to 6"));
    df_ctx_clear(ctx);
    df_model m = df_net_model(net);
    df_real x[5] = {0};
    double t[1] = {.5};
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, t, 1, x, NULL, NULL, x) == DF_ERR_UNSUPPORTED);
    expect(says(ctx, "df_run_tokens"));
    df_net_free(net);
    net = make(ctx, 1, 0);
    run = df_run_defaults(ctx, net);
    expect(df_run_tokens(&run, tokens, 1, NULL, NULL) == NULL && says(ctx, "not tokens"));
    df_ctx_clear(ctx);
    df_net_free(net);
    df_ctx_free(ctx);
}

// A net of one's own over tokens: logits from a table, of the right shape or not.
static df_tensor *forward_table(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    int ids[4], shape[3] = {-1, 2, 3}, flat[2] = {-1, 3};
    (void)t, (void)labels;
    for (int i = 0; i < 4; i++) ids[i] = (int)x->data[i];
    df_tensor *y = df_run_embedding(run, 0, ids, 4);
    return df_reshape(run->ctx, y, df_net_get(run->net, 0) ? 2 : 3,
                      df_net_get(run->net, 0) ? flat : shape);
}
TEST(own_tokens) {
    df_ctx *ctx = new_ctx(1, NULL);
    int two[1] = {2}, tokens[4] = {2, 0, 1, 1};
    df_net *net = df_net_create(ctx, "own", 1, two, forward_table, 1);
    expect(df_layer_embedding(ctx, net, "table", 3, 3, DF_INIT_NORMAL) == 0);
    df_net_set_vocab(net, 3);
    df_run run = df_run_defaults(ctx, net);
    df_tensor *y = df_run_tokens(&run, tokens, 2, NULL, NULL);
    if (check(y != NULL, "%s", df_ctx_message(ctx)))
        same_bits(y->data, df_net_weights(net) + 6, 3 * sizeof(df_real));
    df_net_set(net, 0, 1);
    expect(df_run_tokens(&run, tokens, 2, NULL, NULL) == NULL && says(ctx, "vocabulary"));
    df_net_free(net);
    df_ctx_free(ctx);
}

// ---- what a net costs ----

typedef struct lines { int count, stop; double parameters, flops, bytes; char last[400]; } lines;
static int on_line(void *user, const char *text) {
    lines *l = (lines *)user;
    double p, f, b;
    if (++l->count == l->stop) return 77;
    snprintf(l->last, sizeof l->last, "%s", text);
    size_t end = strlen(text);
    if (end > 34 && sscanf(text + end - 33, "%lf %lf %lf", &p, &f, &b) == 3)
        l->parameters += p, l->flops += f, l->bytes += b;
    return 0;
}
// Sums of the lines are twice the last line, which is the sum.
static df_net_cost cost_of(df_ctx *ctx, const df_net *net) {
    df_net_cost c, again;
    lines l;
    memset(&l, 0, sizeof l);
    check(df_net_describe(ctx, net, &c, on_line, &l) == DF_OK, "%s", df_ctx_message(ctx));
    expect(df_net_describe(ctx, net, &again, NULL, NULL) == DF_OK);
    same_bits(&c, &again, sizeof c);
    expect(c.parameters == df_net_size(net) && c.trained == df_net_trained(net));
    near(l.parameters, 2 * (double)c.parameters, 0);
    near_abs(l.flops, 2 * c.flops / 1e6, 1e-3 * l.count);
    near_abs(l.bytes, 2 * (double)c.activations / 1e3, 0.1 * l.count);
    expect(strncmp(l.last, "all ", 4) == 0);
    return c;
}

TEST(cost_of_mlp) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_mlp_desc d = df_mlp_defaults();
    d.dim = 3, d.width = 10, d.depth = 2, d.embed = 8, d.classes = 4;
    df_net *net = df_mlp_create(ctx, &d);
    df_net_cost c = cost_of(ctx, net);
    near(c.flops, 2 * (11 * 10 + 2 * 10 * 10 + 10 * 3), 0);
    // t scaled 1, angles 4, sines 4, cosines 4, side by side 8, the label 8 and their sum 8,
    // x beside 11; linear and SiLU 20; twice linear, SiLU, sum 60; 3
    expect(c.activations == (1 + 3 * 4 + 3 * 8 + 11 + 20 + 60 + 3) * sizeof(df_real));
    lines l;
    memset(&l, 0, sizeof l);
    l.stop = 3;
    expect(df_net_describe(ctx, net, NULL, on_line, &l) == 77 && l.count == 3);
    df_net_free(net);
    expect(df_net_describe(ctx, NULL, NULL, NULL, NULL) == DF_ERR_ARGUMENT);
    df_ctx_free(ctx);
}

// A graph that is being recorded is left as it is.
TEST(cost_beside_a_tape) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_net *net = df_mlp_create(ctx, NULL);
    int one[1] = {1};
    df_real value[1] = {3}, grad[1] = {0};
    df_record_begin(ctx);
    df_tensor *y = df_square(ctx, df_tensor_borrow(ctx, 1, one, value, grad));
    cost_of(ctx, net);
    expect(df_backward(ctx, df_sum(ctx, y)) == DF_OK);
    near(grad[0], 6, 0);
    df_net_free(net);
    df_ctx_free(ctx);
}

// The benchmark's networks: products counted from their tables of layers.
static double conv_flops(int in, int out, int kernel, int side) {
    return 2.0 * in * out * kernel * kernel * side * side;
}
TEST(cost_of_unet) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_unet_desc d = df_unet_defaults();
    static const int channels[3] = {64, 128, 128};
    d.in_channels = d.out_channels = 1, d.levels = 3, d.head_dim = 0;
    for (int i = 0; i < 3; i++) {
        d.channels[i] = channels[i];
        d.down[i] = i == 2 ? DF_UNET_ATTENTION : DF_UNET_PLAIN;
        d.up[i] = i == 0 ? DF_UNET_ATTENTION : DF_UNET_PLAIN;
    }
    df_net *net = df_unet_create(ctx, &d);
    df_net_cost c = cost_of(ctx, net);
    expect(c.parameters == 6469889);
    // blocks: in, out, side; each two 3x3, time 256 -> out, 1x1 where in and out differ
    static const int blocks[17][3] = {
        {64, 64, 32}, {64, 64, 32}, {64, 128, 16}, {128, 128, 16}, {128, 128, 8}, {128, 128, 8},
        {128, 128, 8}, {128, 128, 8}, {256, 128, 8}, {256, 128, 8}, {256, 128, 8},
        {256, 128, 16}, {256, 128, 16}, {192, 128, 16}, {192, 64, 32}, {128, 64, 32},
        {128, 64, 32}};
    double want = conv_flops(1, 64, 3, 32) + conv_flops(64, 1, 3, 32);
    want += 2.0 * (64 * 256 + 256 * 256);
    for (int i = 0; i < 17; i++) {
        int in = blocks[i][0], out = blocks[i][1], side = blocks[i][2];
        want += conv_flops(in, out, 3, side) + conv_flops(out, out, 3, side) + 2.0 * 256 * out;
        if (in != out) want += conv_flops(in, out, 1, side);
    }
    want += conv_flops(64, 64, 3, 16) + conv_flops(128, 128, 3, 8);         // halvings
    want += conv_flops(128, 128, 3, 16) + conv_flops(128, 128, 3, 32);      // doublings
    want += 6 * (4 * 2.0 * 128 * 128 * 64 + 2 * 2.0 * 64 * 64 * 128);       // attention
    near_rel(c.flops, want, 1e-12);
    double kept = (double)c.activations / sizeof(df_real);
    check(kept > 4e6 && kept < 1e7, "%g values kept", kept);
    df_net_free(net);
    df_ctx_free(ctx);
}

TEST(cost_of_dit) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_dit_desc d = df_dit_defaults();
    d.in_channels = 1, d.width = 192, d.depth = 6, d.heads = 3, d.classes = 10, d.learn_sigma = 0;
    df_net *net = df_dit_create(ctx, &d);
    df_net_cost c = cost_of(ctx, net);
    double T = 256, D = 192;
    expect(c.trained == 4162948 && c.parameters == 4162948 + 256 * 192);
    double block = 12 * D * D * T + 2 * T * T * D + 6 * D * D;
    near_rel(c.flops, 2 * (4 * D * T + 256 * D + D * D + 6 * block + 2 * D * D + 4 * D * T), 1e-12);
    df_net_free(net);
    df_ctx_free(ctx);
}

TEST(cost_of_walks) {
    df_ctx *ctx = new_ctx(1, NULL);
    df_net *net = make(ctx, 0, 5);                   // T 5, D 8, inner 12, cond 6, vocab 7
    df_net_cost c = cost_of(ctx, net);
    double block = 5 * (4 * 64 + 2 * 8 * 12) + 2 * 25 * 8 + 6 * 48;
    near(c.flops, 2 * (256 * 6 + 36 + 2 * block + 6 * 16 + 5 * 8 * 7), 0);
    df_net_free(net);
    net = make(ctx, 0, 0);                           // no time: no modulation
    c = cost_of(ctx, net);
    near(c.flops, 2 * (2 * (5 * (4 * 64 + 2 * 8 * 12) + 2 * 25 * 8) + 5 * 8 * 7), 0);
    df_net_free(net);
    net = make(ctx, 1, 7);                           // one level: 3 -> 8, kernel 5, T 8
    c = cost_of(ctx, net);
    near(c.flops, 2 * (6 * 24 + 24 * 6 + 8 * (3 * 8 * 5 + 7 * 64 * 5 + 3 * 8) + 4 * 10 * 16 +
                       8 * (64 * 5 + 8 * 3)), 0);
    df_net_free(net);
    net = make(ctx, 1, 0);                           // 8, 12, 8 at T 8, 4, 2, kernel 3
    c = cost_of(ctx, net);
    double want = 6 * 24 + 24 * 6;
    static const int blocks[12][3] = {{3, 8, 8}, {8, 8, 8}, {8, 12, 4}, {12, 12, 4}, {12, 8, 2},
                                      {8, 8, 2}, {8, 8, 2}, {8, 8, 2}, {16, 12, 2}, {12, 12, 2},
                                      {24, 8, 4}, {8, 8, 4}};
    for (int i = 0; i < 12; i++) {
        int a = blocks[i][0], b = blocks[i][1], T = blocks[i][2];
        want += T * 3 * (a * b + b * b) + 6 * b + (a != b ? T * a * b : 0);
    }
    want += 4 * 3 * 64 + 2 * 3 * 144 + 2 * 4 * 144 + 4 * 4 * 64 + 8 * (3 * 64 + 8 * 3);
    near(c.flops, 2 * want, 0);
    df_net_free(net);
    df_ctx_free(ctx);
}

// Each allocation failing in turn: an error, and nothing is lost.
static df_result whole(df_ctx *ctx) {
    df_result result = DF_OK;
    df_net_cost c;
    for (int which = 0; which < 2 && result == DF_OK; which++) {
        df_net *net = make(ctx, which, 5);
        if (net == NULL) return df_ctx_error(ctx);
        df_real *grads = (df_real *)calloc(df_net_size(net), sizeof *grads);
        df_scope s = df_scope_begin(ctx);
        df_record_begin(ctx);
        result = df_backward(ctx, df_sum(ctx, run_small(ctx, net, grads)));
        df_record_end(ctx);
        df_scope_end(ctx, s, NULL);
        if (result == DF_OK) result = df_net_describe(ctx, net, &c, NULL, NULL);
        df_net_free(net);
        free(grads);
    }
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

int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN(transformer_forward);
    RUN(transformer_names);
    RUN(unet1d_forward);
    RUN(unet1d_names);
    RUN(gradients);
    RUN(unet1d_model);
    RUN(files);
    RUN(refused);
    RUN(own_tokens);
    RUN(cost_of_mlp);
    RUN(cost_beside_a_tape);
    RUN(cost_of_unet);
    RUN(cost_of_dit);
    RUN(cost_of_walks);
    RUN(failing_memory);
    return test_end();
}
