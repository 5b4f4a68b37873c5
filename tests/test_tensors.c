// Tensors: every operation against a plain formula, its gradient and tangent against finite
// differences, both against recorded layers of PyTorch; scopes, sticky errors, threads, memory.
#include "diffusion.h"
#include "golden_nets.h"
#include "test.h"

#ifdef DIFFUSION_DOUBLE
enum { DOUBLE = 1 };
#else
enum { DOUBLE = 0 };
#endif

static df_ctx *make_ctx(int threads) {
    df_ctx_desc d = df_ctx_defaults();
    d.threads = threads;
    return df_ctx_create(&d);
}

// ---- every operation as a row of one table ----

typedef df_tensor *(*build_fn)(df_ctx *c, df_tensor **in);
typedef struct op_case {
    const char *name;
    build_fn build;
    int count;                       // inputs
    int ndim[3], shape[3][5];
    double low, high;                // range of the inputs' elements
} op_case;

#define BUILD(name, expr)                                                                  \
    static df_tensor *build_##name(df_ctx *c, df_tensor **in) {                            \
        df_tensor *x = in[0], *y = in[1], *z = in[2];                                      \
        (void)x, (void)y, (void)z;                                                         \
        return expr;                                                                       \
    }
static const int order3[3] = {2, 0, 1}, order4[4] = {0, 2, 1, 3}, order5[5] = {4, 1, 3, 0, 2};
static const int order2[2] = {1, 0};
static const int reshape3[3] = {2, -1, 3}, stretch4[4] = {2, 3, 4, 5}, stretch2[2] = {3, 4};
static const int ids[6] = {3, 0, -1, 3, 1, 3}, targets[4] = {2, -1, 0, 4};

BUILD(add, df_add(c, x, y))
BUILD(sub, df_sub(c, x, y))
BUILD(mul, df_mul(c, x, y))
BUILD(div, df_div(c, x, y))
BUILD(affine, df_affine(c, x, -1.5, 0.25))
BUILD(scale, df_scale(c, x, 3))
BUILD(square, df_square(c, x))
BUILD(exp, df_exp(c, x))
BUILD(log, df_log(c, x))
BUILD(sqrt, df_sqrt(c, x))
BUILD(sin, df_sin(c, x))
BUILD(cos, df_cos(c, x))
BUILD(tanh, df_tanh(c, x))
BUILD(sigmoid, df_sigmoid(c, x))
BUILD(silu, df_silu(c, x))
BUILD(gelu, df_gelu(c, x))
BUILD(gelu_tanh, df_gelu_tanh(c, x))
BUILD(erf, df_erf(c, x))
BUILD(relu, df_relu(c, x))
BUILD(step, df_add(c, df_step(c, x), x))
BUILD(softplus, df_softplus(c, x))
BUILD(sum, df_sum(c, x))
BUILD(mean, df_mean(c, x))
BUILD(sum_first, df_sum_axis(c, x, 0, 0))
BUILD(sum_middle, df_sum_axis(c, x, 1, 1))
BUILD(sum_last, df_sum_axis(c, x, -1, 0))
BUILD(mean_axis, df_mean_axis(c, x, -2, 0))
BUILD(reshape, df_square(c, df_reshape(c, x, 3, reshape3)))
BUILD(broadcast4, df_broadcast(c, x, 4, stretch4))
BUILD(broadcast2, df_broadcast(c, x, 2, stretch2))
BUILD(permute2, df_permute(c, x, order2))
BUILD(permute3, df_permute(c, x, order3))
BUILD(permute4, df_permute(c, x, order4))
BUILD(permute5, df_permute(c, x, order5))
BUILD(concat0, df_concat(c, x, y, 0))
BUILD(concat1, df_concat(c, x, y, 1))
BUILD(concat_last, df_concat(c, x, y, -1))
BUILD(slice0, df_slice(c, x, 0, 1, 2))
BUILD(slice1, df_slice(c, x, 1, 1, 3))
BUILD(slice_last, df_slice(c, x, -1, 2, 1))
BUILD(pad, df_pad2d(c, x, 1, 0, 2, 3))
BUILD(matmul, df_matmul(c, x, y, 0, 0))
BUILD(matmul_ta, df_matmul(c, x, y, 1, 0))
BUILD(matmul_tb, df_matmul(c, x, y, 0, 1))
BUILD(matmul_tt, df_matmul(c, x, y, 1, 1))
BUILD(linear, df_linear(c, x, y, z))
BUILD(linear_plain, df_linear(c, x, y, NULL))
BUILD(conv, df_conv2d(c, x, y, z, 1, 1))
BUILD(conv_plain, df_conv2d(c, x, y, NULL, 1, 0))
BUILD(conv_stride, df_conv2d(c, x, y, z, 2, 1))
BUILD(conv_wide, df_conv2d(c, x, y, z, 3, 2))
BUILD(conv_far, df_conv2d(c, x, y, NULL, 1, 5))
BUILD(upsample, df_upsample2x(c, x))
BUILD(pool, df_avg_pool2x2(c, x))
BUILD(group_norm, df_group_norm(c, x, y, z, 2, 1e-2))
BUILD(group_norm_plain, df_group_norm(c, x, NULL, NULL, 3, 1e-2))
BUILD(group_norm_bias, df_group_norm(c, x, NULL, y, 1, 1e-2))
BUILD(layer_norm, df_layer_norm(c, x, y, z, 1e-2))
BUILD(layer_norm_plain, df_layer_norm(c, x, NULL, NULL, 1e-2))
BUILD(rms_norm, df_rms_norm(c, x, y, 1e-2))
BUILD(softmax, df_softmax(c, x))
BUILD(log_softmax, df_log_softmax(c, x))
BUILD(attention, df_attention(c, x, y, z, 0))
BUILD(attention_causal, df_attention(c, x, y, z, 1))
BUILD(rotary, df_rotary(c, x, 100))
BUILD(embedding, df_embedding(c, x, ids, 6))
BUILD(sinusoidal, df_sinusoidal(c, x, 6, 50, 0, 1))
BUILD(sinusoidal_odd, df_sinusoidal(c, x, 7, 50, 1, 0))
BUILD(dropout, df_dropout(c, x, 0.4, 5, 6, 7))
BUILD(cross_entropy, df_cross_entropy(c, x, targets))
BUILD(mse, df_mse(c, x, y))
BUILD(shared, df_mul(c, df_matmul(c, x, x, 0, 1), df_matmul(c, x, x, 0, 1)))

// One row: name, inputs, shapes, range.
#define B(name) #name, build_##name
static const op_case op_cases[] = {
    {B(affine), 1, {3}, {{2, 3, 2}}, -2, 2},
    {B(scale), 1, {0}, {{0}}, -2, 2},
    {B(square), 1, {2}, {{3, 5}}, -2, 2},
    {B(exp), 1, {2}, {{3, 7}}, -2, 2},
    {B(log), 1, {2}, {{3, 7}}, 0.5, 2},
    {B(sqrt), 1, {2}, {{3, 7}}, 0.5, 2},
    {B(sin), 1, {1}, {{19}}, -4, 4},
    {B(cos), 1, {1}, {{19}}, -4, 4},
    {B(tanh), 1, {1}, {{19}}, -3, 3},
    {B(sigmoid), 1, {1}, {{19}}, -4, 4},
    {B(silu), 1, {1}, {{19}}, -4, 4},
    {B(gelu), 1, {1}, {{19}}, -3, 3},
    {B(gelu_tanh), 1, {1}, {{19}}, -3, 3},
    {B(erf), 1, {1}, {{19}}, -2, 2},
    {B(relu), 1, {1}, {{19}}, -3, 3},
    {B(step), 1, {1}, {{19}}, -3, 3},
    {B(softplus), 1, {1}, {{19}}, -4, 4},
    {B(sum), 1, {3}, {{2, 3, 4}}, -2, 2},
    {B(mean), 1, {5}, {{2, 1, 3, 2, 2}}, -2, 2},
    {B(sum_first), 1, {3}, {{3, 2, 4}}, -2, 2},
    {B(sum_middle), 1, {3}, {{3, 2, 4}}, -2, 2},
    {B(sum_last), 1, {3}, {{3, 2, 4}}, -2, 2},
    {B(mean_axis), 1, {5}, {{2, 2, 1, 3, 2}}, -2, 2},
    {B(reshape), 1, {2}, {{4, 6}}, -2, 2},
    {B(broadcast4), 1, {3}, {{3, 1, 5}}, -2, 2},
    {B(broadcast2), 1, {0}, {{0}}, -2, 2},
    {B(permute2), 1, {2}, {{4, 7}}, -2, 2},
    {B(permute3), 1, {3}, {{2, 3, 4}}, -2, 2},
    {B(permute4), 1, {4}, {{2, 3, 2, 3}}, -2, 2},
    {B(permute5), 1, {5}, {{2, 1, 3, 2, 3}}, -2, 2},
    {B(concat0), 2, {2, 2}, {{2, 3}, {4, 3}}, -2, 2},
    {B(concat1), 2, {4, 4}, {{2, 1, 2, 3}, {2, 3, 2, 3}}, -2, 2},
    {B(concat_last), 2, {3, 3}, {{2, 3, 2}, {2, 3, 3}}, -2, 2},
    {B(slice0), 1, {2}, {{4, 3}}, -2, 2},
    {B(slice1), 1, {3}, {{2, 5, 2}}, -2, 2},
    {B(slice_last), 1, {4}, {{2, 1, 2, 4}}, -2, 2},
    {B(pad), 1, {4}, {{2, 2, 2, 3}}, -2, 2},
    {B(matmul), 2, {2, 2}, {{3, 5}, {5, 4}}, -1, 1},
    {B(matmul), 2, {4, 4}, {{2, 3, 2, 5}, {2, 3, 5, 2}}, -1, 1},
    {B(matmul), 2, {3, 2}, {{2, 3, 4}, {4, 2}}, -1, 1},
    {B(matmul), 2, {2, 3}, {{3, 4}, {2, 4, 2}}, -1, 1},
    {B(matmul), 2, {5, 3}, {{2, 1, 3, 2, 2}, {1, 2, 3}}, -1, 1},
    {B(matmul), 2, {4, 4}, {{2, 1, 2, 3}, {1, 2, 3, 2}}, -1, 1},
    {B(matmul_ta), 2, {3, 2}, {{2, 3, 4}, {3, 2}}, -1, 1},
    {B(matmul_ta), 2, {3, 3}, {{2, 3, 4}, {2, 3, 3}}, -1, 1},
    {B(matmul_tb), 2, {3, 2}, {{2, 3, 4}, {2, 4}}, -1, 1},
    {B(matmul_tb), 2, {3, 3}, {{1, 3, 4}, {2, 2, 4}}, -1, 1},
    {B(matmul_tt), 2, {2, 3}, {{3, 2}, {2, 4, 3}}, -1, 1},
    {B(matmul_tt), 2, {4, 3}, {{2, 2, 3, 2}, {2, 4, 3}}, -1, 1},
    {B(linear), 3, {2, 2, 1}, {{3, 4}, {5, 4}, {5}}, -1, 1},
    {B(linear), 3, {1, 2, 1}, {{4}, {1, 4}, {1}}, -1, 1},
    {B(linear_plain), 2, {3, 2}, {{2, 3, 3}, {4, 3}}, -1, 1},
    {B(conv), 3, {4, 4, 1}, {{2, 2, 3, 4}, {3, 2, 3, 3}, {3}}, -1, 1},
    {B(conv), 3, {4, 4, 1}, {{1, 1, 1, 1}, {2, 1, 3, 3}, {2}}, -1, 1},
    {B(conv_plain), 2, {4, 4}, {{2, 3, 2, 3}, {2, 3, 1, 1}}, -1, 1},
    {B(conv_plain), 2, {4, 4}, {{2, 2, 3, 4}, {2, 2, 2, 3}}, -1, 1},
    {B(conv_stride), 3, {4, 4, 1}, {{2, 2, 4, 5}, {2, 2, 3, 3}, {2}}, -1, 1},
    {B(conv_stride), 3, {4, 4, 1}, {{1, 2, 3, 4}, {2, 2, 1, 1}, {2}}, -1, 1},
    {B(conv_wide), 3, {4, 4, 1}, {{1, 2, 5, 4}, {2, 2, 2, 3}, {2}}, -1, 1},
    {B(conv_far), 2, {4, 4}, {{1, 1, 1, 2}, {1, 1, 8, 9}}, -1, 1},
    {B(upsample), 1, {4}, {{2, 1, 2, 3}}, -1, 1},
    {B(pool), 1, {4}, {{2, 1, 2, 6}}, -1, 1},
    {B(group_norm), 3, {4, 1, 1}, {{2, 4, 2, 3}, {4}, {4}}, -1, 2},
    {B(group_norm), 3, {2, 1, 1}, {{3, 6}, {6}, {6}}, -1, 2},
    {B(group_norm_plain), 1, {3}, {{2, 3, 4}}, -1, 2},
    {B(group_norm_bias), 2, {3, 1}, {{2, 3, 4}, {3}}, -1, 2},
    {B(layer_norm), 3, {3, 1, 1}, {{2, 3, 5}, {5}, {5}}, -1, 2},
    {B(layer_norm_plain), 1, {1}, {{7}}, -1, 2},
    {B(rms_norm), 2, {2, 1}, {{3, 5}, {5}}, -1, 2},
    {B(softmax), 1, {2}, {{3, 5}}, -2, 2},
    {B(softmax), 1, {4}, {{2, 1, 2, 3}}, -2, 2},
    {B(log_softmax), 1, {2}, {{3, 5}}, -2, 2},
    {B(attention), 3, {4, 4, 4}, {{1, 2, 3, 2}, {1, 2, 4, 2}, {1, 2, 4, 2}}, -1, 1},
    {B(attention_causal), 3, {4, 4, 4}, {{2, 1, 4, 2}, {2, 1, 3, 2}, {2, 1, 3, 2}}, -1, 1},
    {B(rotary), 1, {4}, {{1, 2, 3, 4}}, -1, 1},
    {B(embedding), 1, {2}, {{4, 3}}, -1, 1},
    {B(sinusoidal), 1, {1}, {{4}}, -3, 3},
    {B(sinusoidal_odd), 1, {1}, {{3}}, -3, 3},
    {B(dropout), 1, {2}, {{4, 5}}, -1, 1},
    {B(cross_entropy), 1, {2}, {{4, 5}}, -2, 2},
    {B(mse), 2, {2, 2}, {{3, 4}, {3, 4}}, -1, 1},
    {B(shared), 1, {2}, {{3, 2}}, -1, 1},
};
enum { OP_CASES = sizeof op_cases / sizeof *op_cases };
static const struct { int ndim[2], shape[2][5]; } broadcasts[] = {
    {{0, 0}, {{0}, {0}}},
    {{1, 0}, {{3}, {0}}},
    {{0, 2}, {{0}, {2, 3}}},
    {{2, 2}, {{3, 4}, {3, 4}}},
    {{2, 1}, {{2, 3}, {3}}},
    {{1, 2}, {{3}, {2, 3}}},
    {{2, 2}, {{2, 3}, {2, 1}}},
    {{4, 3}, {{2, 3, 2, 2}, {3, 1, 1}}},
    {{4, 2}, {{2, 2, 2, 3}, {2, 1}}},
    {{3, 3}, {{2, 1, 3}, {1, 4, 1}}},
    {{4, 4}, {{2, 3, 1, 1}, {2, 3, 2, 2}}},
    {{4, 3}, {{2, 3, 1, 2}, {3, 4, 1}}},
    {{5, 5}, {{2, 1, 2, 1, 2}, {1, 3, 1, 2, 1}}},
    {{5, 5}, {{2, 1, 3, 1, 2}, {2, 2, 3, 2, 2}}},
    {{1, 1}, {{1}, {5}}},
    {{2, 2}, {{1, 1}, {1, 4}}},
};
enum { BROADCASTS = sizeof broadcasts / sizeof *broadcasts };

// All numbers of one check: inputs, their tangents, weights r of the result.
enum { MOST = 512 };
typedef struct op_data {
    df_real x[3][MOST], t[3][MOST], r[MOST];
    size_t size[3];
} op_data;
static size_t shape_size(int ndim, const int *shape) {
    size_t n = 1;
    for (int i = 0; i < ndim; i++) n *= (size_t)shape[i];
    return n;
}
static void fill_uniform(uint64_t stream, double low, double high, size_t n, df_real *x) {
    double u[MOST];
    df_random_uniform(11, stream, 0, n, u);
    for (size_t i = 0; i < n; i++) {
        double v = low + (high - low) * u[i];
        x[i] = (df_real)(fabs(v) < 0.05 ? 0.05 : v);    // away from 0, the kink of relu
    }
}
static void op_fill(const op_case *o, op_data *d, uint64_t stream) {
    for (int i = 0; i < o->count; i++) {
        d->size[i] = shape_size(o->ndim[i], o->shape[i]);
        fill_uniform(stream * 8 + (uint64_t)i, o->low, o->high, d->size[i], d->x[i]);
        fill_uniform(stream * 8 + 3 + (uint64_t)i, -1, 1, d->size[i], d->t[i]);
    }
    fill_uniform(stream * 8 + 7, -1, 1, MOST, d->r);
}
// Builds y from the data; tangents of the inputs in `moving` (bits). leaves are returned.
static df_tensor *op_build(df_ctx *c, const op_case *o, op_data *d, int moving, int grads,
                           df_tensor **in, df_tensor **tangents) {
    in[0] = in[1] = in[2] = NULL;
    for (int i = 0; i < o->count; i++) {
        in[i] = df_tensor_copy(c, o->ndim[i], o->shape[i], d->x[i]);
        if (grads) df_tensor_need_grad(c, in[i]);
        tangents[i] = NULL;
        if (!(moving & 1 << i)) continue;
        tangents[i] = df_tensor_copy(c, o->ndim[i], o->shape[i], d->t[i]);
        if (grads) df_tensor_need_grad(c, tangents[i]);
        df_set_tangent(c, in[i], tangents[i]);
    }
    return o->build(c, in);
}
static df_tensor *weighed(df_ctx *c, df_tensor *y, df_real *r) {
    return y ? df_sum(c, df_mul(c, y, df_tensor_copy(c, y->ndim, y->shape, r))) : NULL;
}
// <r, y> or, if moving, <r, y'>.
static double op_value(df_ctx *c, const op_case *o, op_data *d, int moving) {
    df_tensor *in[3], *t[3], *y;
    df_scope s = df_scope_begin(c);
    double v = 0;
    y = op_build(c, o, d, moving, 0, in, t);
    if (y && moving) y = y->tangent;
    for (size_t i = 0; y && i < y->size; i++) v += (double)y->data[i] * (double)d->r[i];
    df_scope_end(c, s, NULL);
    return v;
}
// d op_value / d x[input][at] by a five-point stencil: error h^4.
static double op_slope(df_ctx *c, const op_case *o, op_data *d, int moving, df_real *at) {
    static const double w[4] = {1, -8, 8, -1}, s[4] = {-2, -1, 1, 2};
    df_real keep = *at;
    double h = 2e-3, v = 0;
    for (int i = 0; i < 4; i++) {
        *at = keep + (df_real)(s[i] * h);
        v += w[i] * op_value(c, o, d, moving);
    }
    *at = keep;
    return v / (12 * h);
}
static double dot(const df_real *a, const df_real *b, size_t n) {
    double s = 0;
    for (size_t i = 0; i < n; i++) s += (double)a[i] * (double)b[i];
    return s;
}

// Gradients of <r,y> and, reverse over forward, of <r,y'>, against differences; reverse and
// forward mode agree on <r, y'> = sum <gradient, t>, for every subset of moving inputs.
static void op_check(df_ctx *c, const op_case *o, uint64_t stream) {
    op_data d;
    double tol = DOUBLE ? 1e-7 : 2e-4;
    op_fill(o, &d, stream);
    for (int moving = 0; moving < 1 << o->count; moving++) {
        df_tensor *in[3], *t[3], *y, *loss;
        df_scope s = df_scope_begin(c);
        df_record_begin(c);
        y = op_build(c, o, &d, moving, 1, in, t);
        if (!check(y != NULL, "%s: %s", o->name, df_ctx_message(c))) {
            df_ctx_clear(c);
            df_record_end(c);
            return;
        }
        if (!check(y->size <= MOST, "%s: room", o->name)) return;
        if (moving && y->tangent == NULL) {
            check(0, "%s: no tangent, moving %d", o->name, moving);
            df_record_end(c);
            continue;
        }
        if (moving) expect(y->tangent->ndim == y->ndim &&
                           memcmp(y->tangent->shape, y->shape, sizeof y->shape) == 0);
        df_backward(c, weighed(c, y, d.r));
        expect(df_ctx_error(c) == DF_OK);
        double along = 0;
        df_real first[3][MOST];
        for (int i = 0; i < o->count; i++) {
            memcpy(first[i], in[i]->grad, d.size[i] * sizeof(df_real));
            if (moving & 1 << i) along += dot(first[i], d.t[i], d.size[i]);
            memset(in[i]->grad, 0, d.size[i] * sizeof(df_real));
        }
        if (moving) {
            double v = dot(y->tangent->data, d.r, y->size);
            check(fabs(v - along) <= tol * (1 + fabs(v)), "%s: moving %d, <r,y'> = %.12g, "
                  "<g,t> = %.12g", o->name, moving, v, along);
            loss = weighed(c, y->tangent, d.r);
            for (int i = 0; i < o->count; i++)
                if (t[i]) memset(t[i]->grad, 0, d.size[i] * sizeof(df_real));
            df_backward(c, loss);
            expect(df_ctx_error(c) == DF_OK);
            for (int i = 0; i < o->count; i++)   // linear in t: its gradient is the first one
                if (t[i]) near_all(t[i]->grad, first[i], d.size[i], tol);
        }
        if (DOUBLE && (moving == 0 || moving == (1 << o->count) - 1))
            for (int i = 0; i < o->count; i++)
                for (size_t k = 0; k < d.size[i]; k++) {
                    double g = moving ? (double)in[i]->grad[k] : (double)first[i][k];
                    double fd;
                    df_record_end(c);
                    fd = op_slope(c, o, &d, moving, &d.x[i][k]);
                    check(fabs(g - fd) <= tol * (1 + fabs(fd)), "%s: input %d, element %d, "
                          "moving %d: gradient %.12g, difference %.12g", o->name, i, (int)k,
                          moving, g, fd);
                }
        df_record_end(c);
        df_scope_end(c, s, NULL);
    }
    expect(df_ctx_error(c) == DF_OK);
}

TEST(derivatives) {
    df_ctx *c = make_ctx(1);
    for (int i = 0; i < OP_CASES; i++) op_check(c, &op_cases[i], (uint64_t)i);
    df_ctx_free(c);
}
TEST(derivatives_broadcast) {
    static const build_fn ops[4] = {build_add, build_sub, build_mul, build_div};
    static const char *const names[4] = {"add", "sub", "mul", "div"};
    df_ctx *c = make_ctx(1);
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < BROADCASTS; i++) {
            op_case o;
            memset(&o, 0, sizeof o);
            o.name = names[k];
            o.build = ops[k];
            o.count = 2;
            for (int j = 0; j < 2; j++) {
                o.ndim[j] = broadcasts[i].ndim[j];
                memcpy(o.shape[j], broadcasts[i].shape[j], sizeof o.shape[j]);
            }
            o.low = 0.5, o.high = 2;
            op_check(c, &o, (uint64_t)(100 + i));
        }
    df_ctx_free(c);
}

// ---- values against plain formulas ----

static double plain_gelu(double x) { return 0.5 * x * erfc(-x * sqrt(0.5)); }
static double plain_sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double plain_unary(int k, double x) {
    switch (k) {
    case 0: return exp(x);
    case 1: return log(x);
    case 2: return sqrt(x);
    case 3: return sin(x);
    case 4: return cos(x);
    case 5: return tanh(x);
    case 6: return plain_sigmoid(x);
    case 7: return x * plain_sigmoid(x);
    case 8: return plain_gelu(x);
    case 9: return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case 10: return erf(x);
    case 11: return x > 0 ? x : 0;
    case 12: return x > 0;
    case 13: return log1p(exp(x));
    case 14: return x * x;
    case 15: return -2.5 * x + 0.5;
    default: return 3 * x;
    }
}
static df_tensor *build_affine2(df_ctx *c, df_tensor **in) { return df_affine(c, in[0], -2.5, 0.5); }
TEST(unary_values) {
    static const build_fn ops[17] = {
        build_exp, build_log, build_sqrt, build_sin, build_cos, build_tanh, build_sigmoid,
        build_silu, build_gelu, build_gelu_tanh, build_erf, build_relu, NULL, build_softplus,
        build_square, build_affine2, build_scale
    };
    df_ctx *c = make_ctx(1);
    df_real x[37];
    int n = 37;
    for (int k = 0; k < 17; k++) {
        df_tensor *in[3] = {NULL, NULL, NULL}, *y;
        df_scope s = df_scope_begin(c);
        for (int i = 0; i < n; i++) x[i] = (df_real)(k == 1 || k == 2 ? 0.1 * i + 0.1 : 0.4 * i - 7);
        in[0] = df_tensor_copy(c, 1, &n, x);
        y = ops[k] ? ops[k](c, in) : df_step(c, in[0]);
        for (int i = 0; i < n && y; i++)
            near(y->data[i], plain_unary(k, (double)x[i]), DOUBLE ? 1e-14 : 2e-6);
        df_scope_end(c, s, NULL);
    }
    df_ctx_free(c);
}

// y[i] = a[i] op b[i] by an index over five axes, 1 stretching.
TEST(broadcast_values) {
    df_ctx *c = make_ctx(1);
    for (int k = 0; k < BROADCASTS; k++)
        for (int op = 0; op < 4; op++) {
            int pad[2][5], most[5], n = 1;
            df_tensor *t[2], *y;
            df_real x[2][MOST];
            df_scope s = df_scope_begin(c);
            for (int j = 0; j < 2; j++) {
                int ndim = broadcasts[k].ndim[j];
                for (int i = 0; i < 5; i++)
                    pad[j][i] = i < 5 - ndim ? 1 : broadcasts[k].shape[j][i - (5 - ndim)];
                fill_uniform((uint64_t)(40 + j), 0.5, 2, shape_size(5, pad[j]), x[j]);
                t[j] = df_tensor_copy(c, ndim, broadcasts[k].shape[j], x[j]);
            }
            for (int i = 0; i < 5; i++) {
                most[i] = pad[0][i] > pad[1][i] ? pad[0][i] : pad[1][i];
                n *= most[i];
            }
            y = op == 0 ? df_add(c, t[0], t[1]) : op == 1 ? df_sub(c, t[0], t[1]) :
                op == 2 ? df_mul(c, t[0], t[1]) : df_div(c, t[0], t[1]);
            expect(y && (int)y->size == n);
            for (int i = 0; y && i < n; i++) {
                int at[2] = {0, 0}, rest = i, step[2] = {1, 1};
                for (int axis = 4; axis >= 0; rest /= most[axis], axis--)
                    for (int j = 0; j < 2; j++) {
                        at[j] += (pad[j][axis] == 1 ? 0 : rest % most[axis]) * step[j];
                        step[j] *= pad[j][axis];
                    }
                df_real a = x[0][at[0]], b = x[1][at[1]];
                df_real want = op == 0 ? a + b : op == 1 ? a - b : op == 2 ? a * b : a / b;
                near(y->data[i], want, DOUBLE ? 1e-15 : 1e-6);
            }
            df_scope_end(c, s, NULL);
        }
    df_ctx_free(c);
}

TEST(shape_values) {
    df_ctx *c = make_ctx(1);
    int shape[4] = {2, 3, 4, 5}, order[4] = {2, 0, 3, 1}, flat[2] = {6, -1};
    df_real v[120];
    df_tensor *x, *y;
    for (int i = 0; i < 120; i++) v[i] = (df_real)(i * 7 % 31);
    x = df_tensor_copy(c, 4, shape, v);
    y = df_permute(c, x, order);                     // y[c,a,d,b] = x[a,b,c,d]
    for (int i = 0; i < 120; i++) {
        int b = i % 3, d = i / 3 % 5, a = i / 15 % 2, k = i / 30;
        expect(y->data[i] == v[((a * 3 + b) * 4 + k) * 5 + d]);
    }
    expect(y->shape[0] == 4 && y->shape[1] == 2 && y->shape[2] == 5 && y->shape[3] == 3);
    y = df_reshape(c, x, 2, flat);
    expect(y->ndim == 2 && y->shape[1] == 20 && y->data == x->data);
    y = df_slice(c, x, -2, 1, 2);
    for (int i = 0; i < 60; i++)
        expect(y->data[i] == v[i / 10 * 20 + (i / 5 % 2 + 1) * 5 + i % 5]);
    y = df_concat(c, y, x, 2);
    for (int i = 0; i < 180; i++) {
        int p = i / 30, r = i / 5 % 6, d = i % 5;
        expect(y->data[i] == v[p * 20 + (r < 2 ? r + 1 : r - 2) * 5 + d]);
    }
    y = df_pad2d(c, x, 1, 2, 0, 3);                  // [2,3,7,8]
    for (int i = 0; i < 336; i++) {
        int p = i / 56, h = i / 8 % 7 - 1, w = i % 8;
        expect(y->data[i] == (h >= 0 && h < 4 && w < 5 ? v[p * 20 + h * 5 + w] : 0));
    }
    y = df_sum_axis(c, x, 1, 0);
    expect(y->ndim == 3 && y->shape[1] == 4);
    for (int i = 0; i < 40; i++) {
        int a = i / 20, r = i % 20;
        expect(y->data[i] == v[a * 60 + r] + v[a * 60 + 20 + r] + v[a * 60 + 40 + r]);
    }
    y = df_upsample2x(c, x);
    for (int i = 0; i < 480; i++) expect(y->data[i] == v[i / 80 * 20 + i / 10 % 8 / 2 * 5 + i % 10 / 2]);
    y = df_avg_pool2x2(c, y);
    same_bits(y->data, v, sizeof v);
    y = df_mean(c, x);
    expect(y->ndim == 0 && y->size == 1);
    double s = 0;
    for (int i = 0; i < 120; i++) s += (double)v[i];
    near(y->data[0], s / 120, 1e-6);
    df_ctx_free(c);
}

// Products of every form of the table against the triple loop; rotary against its formula.
TEST(product_values) {
    df_ctx *c = make_ctx(1);
    for (int i = 0; i < OP_CASES; i++) {
        const op_case *o = &op_cases[i];
        op_data d;
        df_tensor *in[3], *t[3], *y;
        int ta = strncmp(o->name, "matmul_t", 8) == 0 && o->name[8] != 'b';
        int tb = strcmp(o->name, "matmul_tb") == 0 || strcmp(o->name, "matmul_tt") == 0;
        if (strncmp(o->name, "matmul", 6) != 0) continue;
        op_fill(o, &d, (uint64_t)i);
        y = op_build(c, o, &d, 0, 0, in, t);
        int n = y->shape[y->ndim - 1], m = y->shape[y->ndim - 2];
        int k = in[0]->shape[in[0]->ndim - (ta ? 2 : 1)];
        for (int e = 0; e < (int)y->size; e++) {
            int batch = e / (n * m), r = e / n % m, q = e % n, at[2] = {0, 0}, step[2] = {1, 1};
            for (int axis = 3; axis <= y->ndim; axis++) {   // leading axes, from the last
                int len = y->shape[y->ndim - axis];
                for (int j = 0; j < 2; j++) {
                    int own = axis <= in[j]->ndim ? in[j]->shape[in[j]->ndim - axis] : 1;
                    at[j] += (own == 1 ? 0 : batch % len) * step[j];
                    step[j] *= own;
                }
                batch /= len;
            }
            double s = 0;
            for (int p = 0; p < k; p++)
                s += (double)d.x[0][at[0] * m * k + (ta ? p * m + r : r * k + p)] *
                     (double)d.x[1][at[1] * n * k + (tb ? q * k + p : p * n + q)];
            near(y->data[e], s, DOUBLE ? 1e-14 : 2e-6);
        }
    }
    int shape[4] = {1, 1, 3, 4};
    df_real v[12];
    fill_uniform(9, -1, 1, 12, v);
    df_tensor *y = df_rotary(c, df_tensor_copy(c, 4, shape, v), 100);
    for (int i = 0; i < 12; i++) {
        int p = i / 4, k = i % 2, low = i % 4 < 2;
        double angle = p * pow(100, -k / 2.0), a = v[p * 4 + k], b = v[p * 4 + k + 2];
        near(y->data[i], low ? a * cos(angle) - b * sin(angle) : b * cos(angle) + a * sin(angle),
             DOUBLE ? 1e-14 : 1e-6);
    }
    df_ctx_free(c);
}

// Columns cut into parts: a convolution too large for one part against the direct sum.
TEST(conv_parts) {
    df_ctx *c = make_ctx(2);
    int xs[4] = {1, 24, 61, 47}, ws[4] = {2, 24, 5, 3}, bs[1] = {2}, stride = 2, pad = 2;
    df_tensor *x, *w, *b, *y;
    df_record_begin(c);
    x = df_tensor_need_grad(c, df_tensor_new(c, 4, xs));
    w = df_tensor_need_grad(c, df_tensor_new(c, 4, ws));
    b = df_tensor_need_grad(c, df_tensor_new(c, 1, bs));
    df_random_normal(1, 0, 0, x->size, x->data);
    df_random_normal(1, 1, 0, w->size, w->data);
    df_random_normal(1, 2, 0, b->size, b->data);
    for (int big = 0; big < 2; big++, stride = 1) {  // 1: result rows in several parts
        int Ho = (61 + 2 * pad - 5) / stride + 1, Wo = (47 + 2 * pad - 3) / stride + 1;
        double worst = 0, dw = 0, dx = 0, db = 0;
        y = df_conv2d(c, x, w, b, stride, pad);
        expect(y->shape[2] == Ho && y->shape[3] == Wo);
        memset(x->grad, 0, x->size * sizeof(df_real));
        memset(w->grad, 0, w->size * sizeof(df_real));
        memset(b->grad, 0, b->size * sizeof(df_real));
        df_backward(c, df_sum(c, df_square(c, y)));
        for (int o = 0; o < 2; o++)
            for (int p = 0; p < Ho * Wo; p++) {
                double s = (double)b->data[o], g;
                for (int k = 0; k < 24 * 15; k++) {
                    int iy = p / Wo * stride + k / 3 % 5 - pad, ix = p % Wo * stride + k % 3 - pad;
                    if (iy < 0 || iy >= 61 || ix < 0 || ix >= 47) continue;
                    s += (double)w->data[o * 360 + k] * (double)x->data[(k / 15 * 61 + iy) * 47 + ix];
                }
                worst = fmax(worst, fabs(s - (double)y->data[o * Ho * Wo + p]));
                g = 2 * s;
                db += o == 1 ? g : 0;
                // d/dw[1, 7, 1, 2] and d/dx[3, 20, 10]
                int iy = p / Wo * stride + 1 - pad, ix = p % Wo * stride + 2 - pad;
                if (o == 1 && iy >= 0 && iy < 61 && ix >= 0 && ix < 47)
                    dw += g * (double)x->data[(7 * 61 + iy) * 47 + ix];
                int ki = 20 + pad - p / Wo * stride, kj = 10 + pad - p % Wo * stride;
                if (ki >= 0 && ki < 5 && kj >= 0 && kj < 3)
                    dx += g * (double)w->data[o * 360 + 45 + ki * 3 + kj];
            }
        expect(worst < (DOUBLE ? 1e-12 : 1e-4));
        near_abs(w->grad[360 + 7 * 15 + 5], dw, DOUBLE ? 1e-9 : 0.05);
        near_abs(x->grad[(3 * 61 + 20) * 47 + 10], dx, DOUBLE ? 1e-10 : 5e-3);
        near_abs(b->grad[1], db, DOUBLE ? 1e-9 : 0.05);
    }
    df_record_end(c);
    df_ctx_free(c);
}

// Attention in parts, heads at a time and queries of one head at a time, against the same
// composed of products: values, gradients, and every bit with more threads.
TEST(attention_parts) {
    static const int sizes[3][4] = {{2, 3, 350, 350}, {1, 2, 900, 700}, {2, 1, 3, 5}};
    for (int s = 0; s < 3; s++) for (int causal = 0; causal < 2; causal++) {
        int T = sizes[s][2], S = sizes[s][3], w2[2] = {T, S};
        int q4[4] = {sizes[s][0], sizes[s][1], T, 4}, k4[4] = {q4[0], q4[1], S, 4};
        df_ctx *ctx[3] = {make_ctx(1), make_ctx(3), make_ctx(2)};
        df_tensor *y[3], *in[3][3];
        for (int way = 0; way < 3; way++) {
            df_ctx *c = ctx[way];
            df_tensor *z, *w = df_tensor_new(c, 4, q4), *mask = df_tensor_new(c, 2, w2);
            df_record_begin(c);
            for (int i = 0; i < 3; i++) {
                z = df_tensor_new(c, 4, i ? k4 : q4);
                df_random_normal(1, (uint64_t)i, 0, z->size, z->data);
                in[way][i] = df_tensor_need_grad(c, z);
            }
            df_random_normal(2, 0, 0, w->size, w->data);
            for (int i = 0; causal && i < T * S; i++)
                if (i % S > i / S) mask->data[i] = (df_real)-1e30;
            z = df_matmul(c, df_scale(c, in[way][0], 0.5), in[way][1], 0, 1);
            z = df_softmax(c, df_add(c, z, mask));
            y[way] = way == 2 ? df_matmul(c, z, in[way][2], 0, 0)
                   : df_attention(c, in[way][0], in[way][1], in[way][2], causal);
            expect(df_backward(c, df_sum(c, df_mul(c, w, y[way]))) == DF_OK);
        }
        near_all(y[0]->data, y[2]->data, y[0]->size, DOUBLE ? 1e-14 : 3e-6);
        expect(memcmp(y[0]->data, y[1]->data, y[0]->size * sizeof(df_real)) == 0);
        for (int i = 0; i < 3; i++) {
            size_t n = in[0][i]->size;
            near_all(in[0][i]->grad, in[2][i]->grad, n, DOUBLE ? 1e-13 : 1e-5);
            expect(memcmp(in[0][i]->grad, in[1][i]->grad, n * sizeof(df_real)) == 0);
        }
        for (int way = 0; way < 3; way++) df_ctx_free(ctx[way]);
    }
}

// Far from 0 values and slopes stay finite: activations at +-90, softmax of large scores,
// a causal mask.
TEST(extremes) {
    df_ctx *c = make_ctx(1);
    static const build_fn ops[7] = {build_silu, build_gelu, build_gelu_tanh, build_sigmoid,
                                    build_tanh, build_softplus, build_erf};
    static const double at[9] = {-1000, -90, -40, -1e-30, 0, 1e-30, 40, 90, 1000};
    df_real v[9];
    int n = 9;
    for (int i = 0; i < 9; i++) v[i] = (df_real)at[i];
    for (int k = 0; k < 7; k++) {
        df_tensor *in[3] = {NULL, NULL, NULL}, *y;
        int far = k < 3 ? 8 : 9;                     // slopes composed up to 90
        df_record_begin(c);
        in[0] = df_tensor_need_grad(c, df_tensor_copy(c, 1, &far, v + (k < 3)));
        df_set_tangent(c, in[0], df_tensor_fill(c, 1, &far, 1));
        y = ops[k](c, in);
        df_backward(c, df_sum(c, y));
        for (int i = 0; i < far; i++) {
            double x = (double)in[0]->data[i], slope = (double)in[0]->grad[i];
            if (k < 3) near(y->data[i], x > 20 ? x : x < -20 ? 0 : x / 2, 1e-12);
            expect(fabs((double)y->data[i]) <= fabs(x) + 1);
            expect(slope >= -0.2 && slope <= 1.2);
            near(y->tangent->data[i], slope, 1e-5);
        }
        df_record_end(c);
    }
    df_tensor *x = df_tensor_copy(c, 1, &n, v), *y = df_softmax(c, x);
    near(y->data[8], 1, 1e-7);
    expect((double)y->data[0] == 0 && (double)y->data[7] == 0);
    y = df_log_softmax(c, x);
    near(y->data[0], -2000, 1e-6);
    int shape[4] = {1, 1, 4, 4};
    df_tensor *q = df_tensor_fill(c, 4, shape, 30), *e = df_tensor_new(c, 4, shape);
    for (int i = 0; i < 4; i++) e->data[5 * i] = 1;  // v = identity shows the weights
    y = df_attention(c, q, q, e, 1);
    for (int i = 0; i < 16; i++)
        near_abs(y->data[i], i % 4 <= i / 4 ? 1.0 / (i / 4 + 1) : 0, 1e-6);
    df_ctx_free(c);
}

TEST(dropout_mask) {
    df_ctx *c = make_ctx(1);
    int n = 1000, zeros = 0;
    double u[1000];
    df_tensor *x = df_tensor_fill(c, 1, &n, 3), *y = df_dropout(c, x, 0.25, 1, 2, 3);
    df_random_uniform(1, 2, 3, 1000, u);
    for (int i = 0; i < n; i++) {
        near(y->data[i], u[i] < 0.25 ? 0 : 4, 1e-6);
        zeros += (double)y->data[i] == 0;
    }
    expect(zeros > 180 && zeros < 320);              // 5 sigma
    expect(df_dropout(c, x, 0, 1, 2, 3) == x);
    df_ctx_free(c);
}

// ---- recorded layers ----

static df_tensor *golden_leaf(df_ctx *c, const nets_case *g, const char *name) {
    const nets_array *a = nets_find(g, name);
    df_tensor *x = a ? df_tensor_new(c, a->ndim, a->shape) : NULL;
    for (long i = 0; x && i < a->size; i++) x->data[i] = (df_real)(float)a->v[i];  // recorded as float
    return x ? df_tensor_need_grad(c, x) : NULL;
}
// The layer a case names; in[] are the leaves "x w b" or "q k v" or "a b".
static df_tensor *golden_layer(df_ctx *c, const nets_case *g, df_tensor **in) {
    const char *name = g->name;
    double eps = nets_number(g, "eps", 0), shift = nets_number(g, "freq_shift", 0);
    int stride = (int)nets_number(g, "stride", 1), pad = (int)nets_number(g, "padding", 0);
    int dim = (int)nets_number(g, "dim", 0), at[64], used = 0;
    const nets_array *index = nets_find(g, *name == 'e' ? "idx" : "target");
    for (long i = 0; index && i < index->size; i++) {
        at[i] = index->v[i] < 0 ? -1 : (int)index->v[i];
        used += at[i] >= 0;
    }
    if (strncmp(name, "linear", 6) == 0) return df_linear(c, in[0], in[1], in[2]);
    if (strncmp(name, "conv2d", 6) == 0) {
        df_tensor *x = in[0];
        if (strstr(name, "asym")) x = df_pad2d(c, x, 0, 1, 0, 1);
        return df_conv2d(c, x, in[1], in[2], stride, pad);
    }
    if (strncmp(name, "group_norm", 10) == 0)
        return df_group_norm(c, in[0], in[1], in[2], (int)nets_number(g, "groups", 0), eps);
    if (strncmp(name, "layer_norm", 10) == 0) return df_layer_norm(c, in[0], in[1], in[2], eps);
    if (strcmp(name, "silu") == 0) return df_silu(c, in[0]);
    if (strcmp(name, "gelu_erf") == 0) return df_gelu(c, in[0]);
    if (strcmp(name, "gelu_tanh") == 0) return df_gelu_tanh(c, in[0]);
    if (strncmp(name, "softmax", 7) == 0) return df_softmax(c, in[0]);
    if (strncmp(name, "log_softmax", 11) == 0) return df_log_softmax(c, in[0]);
    if (strncmp(name, "attention", 9) == 0)
        return df_attention(c, in[0], in[1], in[2], nets_number(g, "causal", 0) > 0);
    if (strcmp(name, "avg_pool2x2") == 0) return df_avg_pool2x2(c, in[0]);
    if (strcmp(name, "concat_channels") == 0) return df_concat(c, in[0], in[1], 1);
    if (strcmp(name, "embedding") == 0) return df_embedding(c, in[1], at, (int)index->size);
    if (strcmp(name, "mse_mean") == 0) return df_mse(c, in[0], in[1]);
    if (strcmp(name, "mse_sum") == 0) return df_sum(c, df_square(c, df_sub(c, in[0], in[1])));
    if (strncmp(name, "cross_entropy", 13) == 0) {
        df_tensor *y = df_cross_entropy(c, in[0], at);
        return strcmp(nets_text(g, "reduction"), "mean") == 0 ?
               df_scale(c, df_sum(c, y), 1.0 / used) : y;
    }
    if (strncmp(name, "timestep", 8) == 0)
        return df_sinusoidal(c, in[0], dim, 10000, nets_number(g, "flip_sin_to_cos", 0) > 0, shift);
    if (strncmp(name, "dit_timestep", 12) == 0) return df_sinusoidal(c, in[0], dim, 10000, 1, 0);
    return NULL;
}
static void golden_check(df_ctx *c, const nets_case *g) {
    static const char *const names[] = {"x w b", "q k v", "a b", "t"};
    const nets_array *y64 = nets_find(g, "y_f64"), *want = y64 ? y64 : nets_find(g, "y");
    const nets_array *r = nets_find(g, "r");
    df_tensor *in[3] = {NULL, NULL, NULL}, *y, *loss;
    df_scope s = df_scope_begin(c);
    char part[8], grad[16];
    int set = strncmp(g->name, "attention", 9) == 0 ? 1 : strstr(g->name, "timestep") ? 3 :
              nets_find(g, "a") ? 2 : 0;
    df_record_begin(c);
    for (int i = 0; names[set][2 * i - (i > 0)] && 2 * i < (int)strlen(names[set]); i++) {
        snprintf(part, sizeof part, "%c", names[set][2 * i]);
        in[i] = golden_leaf(c, g, part);
    }
    y = golden_layer(c, g, in);
    if (!check(y && want && (long)y->size == want->size, "%s: %s", g->name, df_ctx_message(c))) {
        df_record_end(c);
        return;
    }
    near_all(y->data, want->v, want->size, y64 ? DOUBLE ? 1e-12 : 1e-5 : 1e-4);
    if (y64) {
        loss = y;
        if (r) {
            df_tensor *weights = df_tensor_new(c, y->ndim, y->shape);
            for (long i = 0; i < r->size; i++) weights->data[i] = (df_real)(float)r->v[i];
            loss = df_sum(c, df_mul(c, y, weights));
        }
        expect(df_backward(c, loss) == DF_OK);
        for (int i = 0; i < 3; i++) {
            const nets_array *wanted;
            double most = 0;
            if (in[i] == NULL) continue;
            snprintf(grad, sizeof grad, "grad:%c", names[set][2 * i]);
            wanted = nets_find(g, grad);
            if (!check(wanted && (long)in[i]->size == wanted->size, "%s %s", g->name, grad)) continue;
            for (long k = 0; k < wanted->size; k++) most = fmax(most, fabs(wanted->v[k]));
            for (long k = 0; k < wanted->size; k++)  // recorded as float
                check(fabs((double)in[i]->grad[k] - wanted->v[k]) <=
                      (DOUBLE ? 6e-8 : 1e-5) * most + (DOUBLE ? 1e-12 : 1e-6),
                      "%s %s[%ld] = %.12g, want %.12g", g->name, grad, k,
                      (double)in[i]->grad[k], wanted->v[k]);
        }
    }
    df_record_end(c);
    df_scope_end(c, s, NULL);
}
TEST(golden_layers) {
    static nets_case g;
    df_ctx *c = make_ctx(1);
    FILE *f = nets_open("layers/layers.txt");
    int count = 0;
    if (!check(f != NULL, "tests/golden/nets/layers/layers.txt is missing")) return;
    for (; nets_read(f, &g); count++) {
        golden_check(c, &g);
        nets_free(&g);
    }
    expect(count == 47);
    fclose(f);
    df_ctx_free(c);
}

// ---- errors ----

static int bad_case(df_ctx *c, int k, const char **name, df_tensor **out) {
    int s23[2] = {2, 3}, s34[2] = {3, 4}, s4[4] = {2, 4, 3, 5}, w4[4] = {2, 3, 3, 3}, n5 = 5, zero = 0;
    int big[4] = {1, 4, 9, 9}, twice[2] = {0, 0}, five[6] = {1, 1, 1, 1, 1, 1}, huge[3] = {1 << 30, 1 << 30, 1 << 30};
    int s231[3] = {2, 3, 1}, index = 7, below = -2, odd[2] = {-1, 4};
    df_real v[6] = {0, 0, 0, 0, 0, 0};
    df_tensor *a = df_tensor_new(c, 2, s23), *b = df_tensor_new(c, 2, s34);
    df_tensor *x = df_tensor_new(c, 4, s4), *w = df_tensor_new(c, 4, w4), *o = df_tensor_new(c, 4, big);
    df_tensor *v5 = df_tensor_new(c, 1, &n5), *one = df_tensor_number(c, 1);
    switch (k) {
#define BAD(i, f, call) case i: *name = #f; *out = call; return 1;
    BAD(0, df_add, df_add(c, a, b))
    BAD(1, df_sub, df_sub(c, a, b))
    BAD(2, df_mul, df_mul(c, a, b))
    BAD(3, df_div, df_div(c, a, b))
    BAD(4, df_sum_axis, df_sum_axis(c, a, 2, 0))
    BAD(5, df_mean_axis, df_mean_axis(c, one, 0, 0))
    BAD(6, df_reshape, df_reshape(c, a, 2, s34))
    BAD(7, df_reshape, df_reshape(c, a, 2, odd))
    BAD(8, df_broadcast, df_broadcast(c, a, 2, s34))
    BAD(9, df_permute, df_permute(c, a, twice))
    BAD(10, df_concat, df_concat(c, a, b, 0))
    BAD(11, df_concat, df_concat(c, a, b, -3))
    BAD(12, df_slice, df_slice(c, a, 1, 2, 2))
    BAD(13, df_pad2d, df_pad2d(c, a, 1, 1, 1, 1))
    BAD(14, df_pad2d, df_pad2d(c, x, 1, 1, -1, 1))
    BAD(15, df_matmul, df_matmul(c, a, b, 1, 0))
    BAD(16, df_matmul, df_matmul(c, v5, b, 0, 0))
    BAD(17, df_linear, df_linear(c, a, b, NULL))
    BAD(18, df_linear, df_linear(c, b, df_tensor_new(c, 2, (s23[1] = 4, s23)), v5))
    BAD(19, df_conv2d, df_conv2d(c, x, w, NULL, 1, 1))
    BAD(20, df_conv2d, df_conv2d(c, a, w, NULL, 1, 1))
    BAD(21, df_conv2d, df_conv2d(c, x, o, NULL, 1, 0))
    BAD(22, df_conv2d, df_conv2d(c, x, x, v5, 1, 0))
    BAD(23, df_conv2d, df_conv2d(c, x, x, NULL, 0, 0))
    BAD(24, df_upsample2x, df_upsample2x(c, a))
    BAD(25, df_avg_pool2x2, df_avg_pool2x2(c, x))
    BAD(26, df_group_norm, df_group_norm(c, x, NULL, NULL, 3, 1e-5))
    BAD(27, df_group_norm, df_group_norm(c, x, v5, NULL, 2, 1e-5))
    BAD(28, df_layer_norm, df_layer_norm(c, a, v5, NULL, 1e-5))
    BAD(29, df_rms_norm, df_rms_norm(c, one, NULL, 1e-5))
    BAD(30, df_softmax, df_softmax(c, one))
    BAD(31, df_log_softmax, df_log_softmax(c, one))
    BAD(32, df_attention, df_attention(c, x, w, w, 0))
    BAD(33, df_attention, df_attention(c, x, x, w, 0))
    BAD(34, df_rotary, df_rotary(c, x, 100))
    BAD(35, df_embedding, df_embedding(c, a, &index, 1))
    BAD(36, df_embedding, df_embedding(c, a, &below, 1))
    BAD(37, df_embedding, df_embedding(c, v5, &zero, 1))
    BAD(38, df_sinusoidal, df_sinusoidal(c, a, 8, 100, 0, 0))
    BAD(39, df_sinusoidal, df_sinusoidal(c, v5, 2, 100, 0, 1))
    BAD(40, df_dropout, df_dropout(c, a, 1, 0, 0, 0))
    BAD(41, df_cross_entropy, df_cross_entropy(c, a, s23))
    BAD(42, df_mse, df_mse(c, a, b))
    BAD(43, df_tensor_fill, df_tensor_new(c, 6, five))
    BAD(44, df_tensor_fill, df_tensor_new(c, 1, &zero))
    BAD(45, df_tensor_borrow, df_tensor_borrow(c, 1, &n5, NULL, NULL))
    BAD(46, df_tensor_copy, df_tensor_copy(c, 1, &below, v))
    BAD(47, df_exp, df_exp(c, NULL))
    BAD(48, df_add, df_add(c, a, NULL))
    BAD(49, df_tensor_fill, df_tensor_new(c, 3, huge))
    BAD(50, df_detach, df_detach(c, NULL))
    BAD(51, df_cross_entropy, df_cross_entropy(c, x, s23))
    BAD(52, df_embedding, df_embedding(c, a, NULL, 3))
    BAD(53, df_set_tangent, (df_set_tangent(c, a, b) == DF_ERR_SHAPE ? (df_tensor *)NULL : a))
    BAD(54, df_conv2d, df_conv2d(c, x, x, NULL, 1, -1))
    BAD(55, df_mse, df_mse(c, a, df_reshape(c, a, 3, s231)))
#undef BAD
    default: return 0;
    }
}
TEST(sticky_errors) {
    df_ctx *c = make_ctx(1);
    for (int k = 0;; k++) {
        df_scope s = df_scope_begin(c);
        const char *name = NULL;
        df_tensor *out = NULL;
        char first[600];
        int code;
        if (!bad_case(c, k, &name, &out)) break;
        code = df_ctx_error(c);
        check(out == NULL, "%d %s returned a tensor", k, name);
        check(code != DF_OK && strncmp(df_ctx_message(c), name, strlen(name)) == 0,
              "%d %s: code %d, \"%s\"", k, name, code, df_ctx_message(c));
        snprintf(first, sizeof first, "%s", df_ctx_message(c));
        expect(df_tensor_number(c, 1) == NULL);      // does nothing now
        expect(df_exp(c, NULL) == NULL && df_add(c, NULL, NULL) == NULL);
        expect(df_backward(c, NULL) == code);
        same_text(df_ctx_message(c), first);
        expect(df_ctx_error(c) == code);
        df_ctx_clear(c);
        expect(df_tensor_number(c, 1) != NULL && df_ctx_error(c) == DF_OK);
        df_scope_end(c, s, NULL);
    }
    int s3[3] = {8, 3, 32}, s2[2] = {4, 5};
    df_tensor *x = df_tensor_new(c, 3, s3), *y = df_tensor_new(c, 2, s2);
    df_add(c, x, y);
    same_text(df_ctx_message(c), "df_add: a [8,3,32] and b [4,5] do not broadcast");
    df_ctx_clear(c);
    int x4[4] = {8, 3, 32, 32}, w4[4] = {64, 4, 3, 3};
    df_conv2d(c, df_tensor_new(c, 4, x4), df_tensor_new(c, 4, w4), NULL, 1, 1);
    same_text(df_ctx_message(c), "df_conv2d: x [8,3,32,32] has 3 channels, weight [64,4,3,3] wants 4");
    df_ctx_clear(c);
    expect(df_backward(c, x) == DF_ERR_SHAPE);
    df_ctx_clear(c);
    expect(df_backward(c, df_sum(c, x)) == DF_ERR_ARGUMENT);       // not recording
    df_ctx_clear(c);
    df_record_begin(c);
    expect(df_backward(c, df_sum(c, x)) == DF_ERR_ARGUMENT);       // nothing needs it
    df_record_end(c);
    df_ctx_free(c);
}

// ---- scopes ----

TEST(scopes) {
    df_ctx *c = make_ctx(1);
    int n = 5000, few = 8;
    df_tensor *x = df_tensor_fill(c, 1, &n, 1), *y, *z;
    df_scope s = df_scope_begin(c), inner;
    for (int i = 0; i < 10; i++) y = df_affine(c, x, 1, i);
    y = df_scope_end(c, s, y);                       // the last of ten moves down
    expect((double)y->data[0] == 10 && (double)y->data[n - 1] == 10 && y->ndim == 1);
    z = df_tensor_new(c, 1, &n);                     // memory after y is free again
    for (int i = 0; i < n; i++) expect((double)y->data[i] == 10);
    s = df_scope_begin(c);
    z = df_scope_end(c, s, df_reshape(c, y, 1, &n)); // shares data older than the scope
    expect(z->data == y->data && z->size == y->size);
    s = df_scope_begin(c);
    expect(df_scope_end(c, s, y) == y);              // older itself
    expect(df_scope_end(c, df_scope_begin(c), NULL) == NULL);
    s = df_scope_begin(c);                           // a view of inner data takes the data along
    z = df_scope_end(c, s, df_reshape(c, df_affine(c, df_affine(c, y, 2, 0), 1, 1), 1, &n));
    expect((double)z->data[0] == 21 && (double)z->data[n - 1] == 21);
    s = df_scope_begin(c);                           // nested, with tangents in both orders
    y = df_affine(c, y, 1, 1);
    inner = df_scope_begin(c);
    df_tensor *t = df_affine(c, y, 3, 0), *w = df_affine(c, y, 5, 0);
    df_set_tangent(c, w, t);
    w = df_scope_end(c, inner, w);
    expect((double)w->data[7] == 55 && (double)w->tangent->data[7] == 33);
    inner = df_scope_begin(c);
    df_affine(c, w, 1, 0);
    w = df_mul(c, w, w);
    w = df_scope_end(c, inner, w);
    expect((double)w->data[n - 1] == 3025 && (double)w->tangent->data[n - 1] == 2 * 55 * 33);
    w = df_scope_end(c, s, w);
    expect((double)w->data[0] == 3025 && (double)w->tangent->data[0] == 2 * 55 * 33);
    s = df_scope_begin(c);                           // one array behind both
    t = df_tensor_fill(c, 1, &few, 4);
    z = df_reshape(c, t, 1, &few);
    df_set_tangent(c, z, t);
    z = df_scope_end(c, s, z);
    expect(z->size == 8 && z->tangent->data == z->data);
    expect((double)z->data[0] == 4 && (double)z->data[7] == 4);
    s = df_scope_begin(c);
    df_set_tangent(c, w, w);                         // its own tangent
    z = df_affine(c, w, 2, 0);
    z = df_scope_end(c, s, z);
    expect((double)z->tangent->data[n - 1] == 6050);
    df_ctx_free(c);
}
// Twenty blocks of nine operations: with scopes each leaves one array, without nine. Recording
// keeps them all. (Step memory may hold twice what is used.)
static size_t peak_of(int scoped, int recording, df_real *last) {
    df_ctx *c = make_ctx(1);
    int n = 100000;
    df_tensor *x = df_tensor_need_grad(c, df_tensor_fill(c, 1, &n, 1)), *y = x;
    size_t peak;
    if (recording) df_record_begin(c);
    for (int i = 0; i < 20; i++) {
        df_scope s = df_scope_begin(c);
        for (int k = 0; k < 4; k++) y = df_affine(c, df_affine(c, y, 1, -0.1), 1, 0.1);
        y = df_affine(c, y, 0.9, 0.1);
        if (scoped) y = df_scope_end(c, s, y);
    }
    *last = y->data[n - 1];
    if (recording) {
        expect(df_backward(c, df_mean(c, y)) == DF_OK);
        expect((double)x->grad[0] > 0 && x->grad[0] == x->grad[n - 1]);
    }
    peak = df_ctx_peak_bytes(c);
    df_ctx_free(c);
    return peak;
}
TEST(scope_peak) {
    df_real v[3];
    size_t one = 100000 * sizeof(df_real), with = peak_of(1, 0, v), without = peak_of(0, 0, v + 1);
    size_t recorded = peak_of(1, 1, v + 2);
    expect(v[0] == v[1] && v[0] == v[2]);
    check(with < 62 * one, "%.1f arrays at most with scopes", (double)with / (double)one);
    expect(without > 180 * one && recorded > 360 * one);
}

// ---- the tape ----

TEST(tape) {
    df_ctx *c = make_ctx(1);
    df_real w[2] = {3, 4}, g[2] = {10, 20};
    int n = 2;
    df_tensor *p, *q, *loss;
    df_record_begin(c);
    p = df_tensor_borrow(c, 1, &n, w, g);
    q = df_tensor_borrow(c, 1, &n, w, NULL);
    loss = df_sum(c, df_mul(c, p, df_detach(c, df_square(c, p))));
    expect(df_backward(c, loss) == DF_OK);
    expect((double)g[0] == 19 && (double)g[1] == 36);        // added: w^2 by the detached factor
    expect(df_backward(c, loss) == DF_OK);           // again: intermediates start anew
    expect((double)g[0] == 28 && (double)g[1] == 52);
    expect(q->grad == NULL && !df_square(c, q)->needs_grad);
    expect(c != NULL && df_backward(c, p) == DF_ERR_SHAPE);
    df_ctx_clear(c);
    df_record_end(c);
    expect(!df_square(c, p)->needs_grad);            // not recording: no tape
    df_ctx_free(c);
}

// ---- threads, batches, memory ----

// A small network with every kind of layer; its loss's gradients are appended to out.
enum { NET_C = 16, NET_S = 16, NET_DIM = NET_C * NET_S * NET_S };
static df_tensor *small_net(df_ctx *c, df_tensor *x, df_real *weights, df_real *grads) {
    int B = x ? x->shape[0] : 1, conv[4] = {NET_C, NET_C, 3, 3}, vec[1] = {NET_C};
    int tokens[4] = {B, 1, NET_C, NET_S * NET_S}, order[4] = {0, 1, 3, 2}, lin[2] = {NET_C, NET_C};
    int image[4] = {B, NET_C, NET_S, NET_S};
    df_tensor *w = df_tensor_borrow(c, 4, conv, weights, grads);
    df_tensor *l = df_tensor_borrow(c, 2, lin, weights, grads);
    df_tensor *v = df_tensor_borrow(c, 1, vec, weights + 300, grads ? grads + 300 : NULL), *h, *t;
    h = df_conv2d(c, x, w, v, 1, 1);
    h = df_silu(c, df_group_norm(c, h, v, v, 4, 1e-5));
    h = df_conv2d(c, df_upsample2x(c, h), w, NULL, 2, 1);
    h = df_add(c, df_avg_pool2x2(c, df_upsample2x(c, h)), x);
    t = df_permute(c, df_reshape(c, h, 4, tokens), order);
    t = df_layer_norm(c, df_linear(c, t, l, v), v, v, 1e-6);
    t = df_add(c, t, df_attention(c, t, df_linear(c, t, l, NULL), t, 0));
    t = df_gelu(c, df_rms_norm(c, t, v, 1e-6));
    h = df_add(c, h, df_reshape(c, df_permute(c, t, order), 4, image));
    h = df_add(c, h, df_mean_axis(c, df_mean_axis(c, h, 2, 1), 1, 1));
    return df_add(c, df_mul(c, h, h), df_sum_axis(c, df_softmax(c, h), -1, 1));
}
static void fill_net(df_real *weights, df_real *x, int B) {
    df_random_normal(1, 0, 0, NET_C * NET_C * 9, weights);
    for (int i = 0; i < NET_C * NET_C * 9; i++) weights[i] *= (df_real)0.1;
    for (int i = 0; i < B; i++) df_random_normal(2, (uint64_t)i, 0, NET_DIM, x + i * NET_DIM);
}
enum { NET_W = NET_C * NET_C * 9, NET_B = 9 };
static df_real net_w[NET_W], net_x[NET_B * NET_DIM], net_y[2][NET_B * NET_DIM], net_g[4][NET_W];
static df_real net_dx[4][NET_B * NET_DIM], net_t[4][NET_B * NET_DIM];

TEST(threads_same_bits) {
    static const int threads[4] = {1, 2, 3, 7};
    fill_net(net_w, net_x, NET_B);
    for (int k = 0; k < 4; k++) {
        df_ctx *c = make_ctx(threads[k]);
        int shape[4] = {NET_B, NET_C, NET_S, NET_S};
        df_tensor *x, *y;
        memset(net_g[k], 0, sizeof net_g[k]);
        df_record_begin(c);
        x = df_tensor_borrow(c, 4, shape, net_x, net_dx[k]);
        memset(net_dx[k], 0, sizeof net_dx[k]);
        df_set_tangent(c, x, df_tensor_borrow(c, 4, shape, net_x, NULL));
        y = small_net(c, x, net_w, net_g[k]);
        expect(df_backward(c, df_mean(c, df_mul(c, y, y->tangent))) == DF_OK);
        memcpy(net_t[k], y->tangent->data, sizeof net_t[k]);
        df_record_end(c);
        df_ctx_free(c);
        if (k == 0) continue;
        same_bits(net_g[k], net_g[0], sizeof net_g[0]);
        same_bits(net_dx[k], net_dx[0], sizeof net_dx[0]);
        same_bits(net_t[k], net_t[0], sizeof net_t[0]);
    }
}
TEST(batches_same_bits) {
    df_ctx *c = make_ctx(2);
    static const int parts[2][4] = {{9, 0, 0, 0}, {1, 3, 5, 0}};
    fill_net(net_w, net_x, NET_B);
    for (int k = 0; k < 2; k++)
        for (int p = 0, at = 0; parts[k][p]; at += parts[k][p++]) {
            int shape[4] = {parts[k][p], NET_C, NET_S, NET_S};
            df_scope s = df_scope_begin(c);
            df_tensor *y = small_net(c, df_tensor_borrow(c, 4, shape, net_x + at * NET_DIM, NULL),
                                     net_w, NULL);
            memcpy(net_y[k] + at * NET_DIM, y->data, y->size * sizeof(df_real));
            df_scope_end(c, s, NULL);
        }
    same_bits(net_y[0], net_y[1], sizeof net_y[0]);
    // vectors of points, as an MLP sees them
    int w[2] = {33, 50}, wide[2] = {64, 50}, row[2] = {1, 50};
    df_tensor *weight = df_tensor_borrow(c, 2, w, net_w, NULL);
    df_tensor *all = df_silu(c, df_linear(c, df_tensor_borrow(c, 2, wide, net_x, NULL), weight, NULL));
    for (int i = 0; i < 64; i++) {
        df_tensor *one = df_tensor_borrow(c, 2, row, net_x + i * 50, NULL);
        one = df_silu(c, df_linear(c, one, weight, NULL));
        same_bits(one->data, all->data + i * 33, 33 * sizeof(df_real));
    }
    df_ctx_free(c);
}

// An allocator that says no to every request from the k-th on, and counts what is out.
typedef struct meter { long left, out; } meter;
static void *meter_alloc(void *user, size_t size, size_t align) {
    meter *m = (meter *)user;
    char *raw = m->left-- > 0 ? (char *)malloc(size + align) : NULL, *p = raw;
    if (raw == NULL) return NULL;
    p += align - (uintptr_t)raw % align;
    p[-1] = (char)(p - raw);
    m->out++;
    return p;
}
static void meter_free(void *user, void *ptr, size_t size, size_t align) {
    (void)size, (void)align;
    ((meter *)user)->out--;
    free((char *)ptr - ((char *)ptr)[-1]);
}
TEST(out_of_memory) {
    int done = 0, failures = 0;
    fill_net(net_w, net_x, 2);
    for (long k = 0; !done && k < 100; k++) {
        meter m;
        df_ctx_desc d = df_ctx_defaults();
        int shape[4] = {2, NET_C, NET_S, NET_S};
        df_tensor *x, *y;
        df_ctx *c;
        m.left = k, m.out = 0;
        d.threads = 2;
        d.alloc.alloc = meter_alloc, d.alloc.free = meter_free, d.alloc.user = &m;
        c = df_ctx_create(&d);
        if (c == NULL) continue;
        df_record_begin(c);
        x = df_tensor_borrow(c, 4, shape, net_x, net_dx[0]);
        y = small_net(c, x, net_w, net_g[0]);
        df_backward(c, df_mean(c, y));
        done = df_ctx_error(c) == DF_OK;
        if (!done) {
            failures++;
            expect(df_ctx_error(c) == DF_ERR_MEMORY);
            expect(df_tensor_number(c, 1) == NULL);
        }
        df_record_end(c);
        m.left = 1000;                               // memory is back: the context goes on
        df_ctx_clear(c);
        x = df_tensor_borrow(c, 4, shape, net_x, NULL);
        expect(small_net(c, x, net_w, NULL) != NULL);
        df_ctx_free(c);
        expect(m.out == 0);
    }
    expect(done && failures >= 5);
}
int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN(derivatives);
    RUN(derivatives_broadcast);
    RUN(unary_values);
    RUN(broadcast_values);
    RUN(shape_values);
    RUN(product_values);
    RUN(conv_parts);
    RUN(attention_parts);
    RUN(extremes);
    RUN(dropout_mask);
    RUN(golden_layers);
    RUN(sticky_errors);
    RUN(scopes);
    RUN(scope_peak);
    RUN(tape);
    RUN(threads_same_bits);
    RUN(batches_same_bits);
    RUN(out_of_memory);
    return test_end();
}
