// Kernels: every kernel of every instruction set against its plain twin at odd sizes, the
// elementary functions against the C library in double, sums against exact ones; and bit for
// bit: an element's result wherever it stands, a product however it is cut, transposed,
// batched or threaded. Reaches the private functions, so it carries its own implementation.
#define DIFFUSION_IMPLEMENTATION
#define DIFFUSION_STATIC
#include "diffusion.h"
#include "test.h"

#define COUNT(a) (sizeof(a) / sizeof *(a))
#define EPS (sizeof(df_real) == 4 ? 1.1920929e-7 : 2.220446049250313e-16)

static const size_t sizes[] = {0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 257, 1000, 1023};
enum { MOST = 1023, SLACK = 64 };

static uint32_t state = 1;
static double uniform(double from, double to) {
    state = state * 1664525u + 1013904223u;
    return from + (to - from) * (double)(state >> 8) / 16777216.0;
}
static void fill(df_real *x, size_t n, double from, double to) {
    for (size_t i = 0; i < n; i++) x[i] = (df_real)uniform(from, to);
}

// The tables that this machine runs, plain first.
static const dfi_kernels *tables[8];
static int table_count;
static void find_tables(void) {
    for (int isa = DF_ISA_PLAIN; isa <= DF_ISA_NEON; isa++) {
        const dfi_kernels *k = dfi_kernels_select((df_isa)isa);
        if (table_count == 0 || tables[table_count - 1] != k) tables[table_count++] = k;
    }
}
#define EACH_TABLE(k) for (int t_ = 0; t_ < table_count; t_++) \
    for (const dfi_kernels *k = tables[t_]; k != NULL; k = NULL)

// |a - b| <= tol * max(floor, |b|) everywhere; NaN fails.
static void close_to(const char *what, const dfi_kernels *k, size_t n, const df_real *a,
                     const df_real *b, double tol, double floor_) {
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]), at = fmax(floor_, fabs((double)b[i]));
        if (!(d <= tol * at)) {
            check(0, "%s %s n=%zu: [%zu] = %.9g, want %.9g", k->name, what, n, i, (double)a[i],
                  (double)b[i]);
            return;
        }
    }
    expect(1);
}

static df_ctx *ctx_with(int threads, df_isa isa) {
    df_ctx_desc d = df_ctx_defaults();
    d.threads = threads;
    d.max_isa = isa;
    return df_ctx_create(&d);
}

TEST(selection) {
    same_text(dfi_kernels_select(DF_ISA_PLAIN)->name, "plain");
    expect(dfi_kernels_select(DF_ISA_PLAIN)->isa == DF_ISA_PLAIN);
    for (int isa = DF_ISA_PLAIN; isa <= DF_ISA_NEON; isa++) {
        int got = (int)dfi_kernels_select((df_isa)isa)->isa;
        check(got <= isa, "asked for at most %d, got %d", isa, got);
    }
#if defined(DIFFUSION_DOUBLE) || defined(DIFFUSION_NO_SIMD)
    expect(dfi_kernels_select(DF_ISA_NEON)->isa == DF_ISA_PLAIN);
#elif defined(__x86_64__) && defined(__GNUC__)
    expect(dfi_kernels_select(DF_ISA_SSE2)->isa == DF_ISA_SSE2);
#elif defined(__aarch64__) && defined(__GNUC__)
    expect(dfi_kernels_select(DF_ISA_NEON)->isa == DF_ISA_NEON);
#endif
}

// ---- functions of one element ----

typedef struct { const char *name; int id; double from, to, tol, floor_, back; } unary_case;
// Relative error bounds in EPS (1 ulp is 0.5 to 1 of it), below `floor_` absolute. gelu's
// tails are small differences of large arguments, so their error counts against 1.
static const unary_case unaries[] = {
    {"exp", DFI_EXP, -87, 88, 2, 1e-45, 3},       {"log", DFI_LOG, 1e-6, 1e6, 2, 1e-9, 2},
    {"log", DFI_LOG, 0.5, 2, 2, 1e-9, 2},         {"sqrt", DFI_SQRT, 1e-4, 1e6, 1, 1e-45, 2},
    {"sin", DFI_SIN, -1000, 1000, 2, 1, 3},       {"cos", DFI_COS, -1000, 1000, 2, 1, 3},
    {"sin", DFI_SIN, -3, 3, 2, 1e-3, 3},          {"tanh", DFI_TANH, -12, 12, 3, 1e-9, 6},
    {"tanh", DFI_TANH, -0.7, 0.7, 3, 1e-9, 6},    {"sigmoid", DFI_SIGMOID, -87, 90, 4, 1e-45, 6},
    {"silu", DFI_SILU, -87, 90, 5, 1e-45, 6},     {"gelu_tanh", DFI_GELU_TANH, -90, 90, 4, 1, 8},
    {"gelu_tanh", DFI_GELU_TANH, -4, 4, 4, 1, 8}, {"gelu_erf", DFI_GELU_ERF, -90, 90, 4, 1, 8},
    {"gelu_erf", DFI_GELU_ERF, -4, 4, 4, 1, 8},   {"erf", DFI_ERF, -5, 5, 3, 1e-9, 8},
    {"erf", DFI_ERF, -90, 90, 3, 1e-9, 8},        {"relu", DFI_RELU, -3, 3, 0, 1, 0},
    {"step", DFI_STEP, -3, 3, 0, 1, 0},           {"softplus", DFI_SOFTPLUS, -87, 90, 4, 1e-45, 4},
};

static double reference(int id, double t) {
    double tail = 0.5 * erfc(-t / sqrt(2.0)), pi = 3.14159265358979323846;
    switch (id) {
    case DFI_EXP: return exp(t);
    case DFI_LOG: return log(t);
    case DFI_SQRT: return sqrt(t);
    case DFI_SIN: return sin(t);
    case DFI_COS: return cos(t);
    case DFI_TANH: return tanh(t);
    case DFI_SIGMOID: return 1 / (1 + exp(-t));
    case DFI_SILU: return t / (1 + exp(-t));
    case DFI_GELU_TANH: return 0.5 * t * (1 + tanh(sqrt(2 / pi) * (t + 0.044715 * t * t * t)));
    case DFI_GELU_ERF: return t * tail;
    case DFI_ERF: return erf(t);
    case DFI_RELU: return fmax(t, 0);
    case DFI_STEP: return t > 0;
    default: return fmax(t, 0) + log1p(exp(-fabs(t)));
    }
}

TEST(functions) {
    enum { N = 20001 };
    static df_real x[N], y[N], dy[N], dx[N], one[N];
    for (size_t c = 0; c < COUNT(unaries); c++) {
        const unary_case *u = &unaries[c];
        for (int i = 0; i < N; i++) {
            x[i] = (df_real)(u->from + (u->to - u->from) * i / (N - 1));
            one[i] = 1;
        }
        EACH_TABLE(k) {
            double worst = 0, worst_back = 0, at = 0, at_back = 0;
            k->unary[u->id](N, x, y);
            for (int i = 0; i < N; i++) {
                double want = reference(u->id, (double)x[i]);
                double e = fabs((double)y[i] - want) / fmax(u->floor_, fabs(want)) / EPS;
                if (!(e <= worst)) worst = e, at = (double)x[i];
            }
            check(worst <= u->tol, "%s %s(%.9g) is off by %.3g eps, allowed %.3g", k->name,
                  u->name, at, worst, u->tol);
            // the slope against a central difference of the reference, in double
            for (int i = 0; i < N; i++) dx[i] = 2, dy[i] = 0.5;
            k->unary_back[u->id](N, x, y, dy, dx);
            for (int i = 0; i < N; i++) {
                double t = (double)x[i], h = 1e-5 * fmax(1e-5, fmin(1, fabs(t)));
                double slope = (reference(u->id, t + h) - reference(u->id, t - h)) / (2 * h);
                if (fabs(t) <= h) continue;                       // the corner of relu, step
                double e = fabs((double)dx[i] - 2 - 0.5 * slope) / fmax(1, fabs(slope));
                if (!(e <= worst_back)) worst_back = e, at_back = t;
            }
            check(worst_back <= 2e-6, "%s %s'(%.9g) is off by %.3g", k->name, u->name, at_back,
                  worst_back);
            // and, finer, against the plain twin
            memset(dx, 0, sizeof dx);
            k->unary_back[u->id](N, x, y, one, dx);
            memset(dy, 0, sizeof dy);
            tables[0]->unary_back[u->id](N, x, y, one, dy);
            close_to(u->name, k, N, dx, dy, u->back * EPS, 1);
        }
    }
}

// What is exact or infinite, and arguments far outside: no NaN, no Inf in a slope.
TEST(function_limits) {
    const df_real inf = (df_real)HUGE_VAL, big = (df_real)(sizeof(df_real) == 4 ? 3e38 : 1e308);
    const df_real xs[] = {0, -0.0, (df_real)-90, 90, -1000, 1000, -big, big, (df_real)1e-30,
                          (df_real)-1e-30, -40, 40, (df_real)-0.625, 88, -104};
    enum { N = COUNT(xs) };
    df_real y[N], dy[N], dx[N];
    EACH_TABLE(k) {
        for (int id = 0; id < DFI_UNARY_COUNT; id++) {
            int partial = id == DFI_EXP || id == DFI_LOG || id == DFI_SQRT;
            if (partial) continue;
            k->unary[id](N, xs, y);
            check(k->nonfinite(N, y) == N, "%s function %d at %g", k->name, id,
                  (double)xs[k->nonfinite(N, y) % N]);
            for (int i = 0; i < N; i++) dy[i] = 1, dx[i] = 0;
            k->unary_back[id](N, xs, y, dy, dx);
            check(k->nonfinite(N, dx) == N, "%s slope of function %d at %g", k->name, id,
                  (double)xs[k->nonfinite(N, dx) % N]);
        }
        const df_real e[] = {0, -inf, inf, -1000, 1000, 1};
        k->unary[DFI_EXP](6, e, y);
        expect(y[0] == 1 && y[1] == 0 && dfi_nonfinite((double)y[2]) && y[2] > 0);
        expect(y[3] == 0 && y[4] == y[2]);
        const df_real l[] = {1, 0, -1, inf, (df_real)1e-40, (df_real)1e-37};
        k->unary[DFI_LOG](6, l, y);
        expect(y[0] == 0 && dfi_nonfinite((double)y[1]) && y[1] < 0);
        expect(dfi_nonfinite((double)y[2]) && dfi_nonfinite((double)y[3]) && y[3] > 0);
        near(y[4], log((double)l[4]), 3e-7);
        near(y[5], log((double)l[5]), 3e-7);
        df_real nan = inf - inf;
        const int keep[] = {DFI_EXP, DFI_LOG, DFI_SQRT, DFI_SIN, DFI_TANH, DFI_SIGMOID, DFI_SILU,
                            DFI_GELU_TANH, DFI_GELU_ERF, DFI_ERF};
        memcpy(&nan, &y[2], sizeof nan);                          // made at run time by log(-1)
        for (size_t i = 0; i < COUNT(keep); i++) {
            k->unary[keep[i]](1, &nan, y);
            check(dfi_nonfinite((double)y[0]), "%s function %d loses NaN", k->name, keep[i]);
        }
        k->unary[DFI_GELU_TANH](1, &xs[2], y);
        expect(y[0] == 0);
        k->unary[DFI_GELU_ERF](1, &xs[2], y);
        expect(y[0] == 0);
        k->unary[DFI_TANH](2, &xs[6], y);
        expect(y[0] == -1 && y[1] == 1);
    }
}

// ---- element-wise kernels: against plain, and the same wherever an element stands ----

typedef struct { df_real a[MOST + SLACK], b[MOST + SLACK], c[MOST + SLACK], d[MOST + SLACK]; } arrays;
enum { ELEMENTWISE = DFI_BINARY_COUNT * 4 + 2 * DFI_UNARY_COUNT + 4 + 6 };

// Kernel number `which` on n elements from `at` on; w is in and out.
static void run_elementwise(const dfi_kernels *k, int which, size_t n, const arrays *in, size_t at,
                            arrays *w) {
    const df_real *a = in->a + at, *b = in->b + at, *c = in->c + at;
    df_real *d = w->d + at;
    size_t sa = (size_t)which & 1, sb = (size_t)which >> 1 & 1;
    const df_real *pa = sa ? a : in->a, *pb = sb ? b : in->b;
    if (which < DFI_BINARY_COUNT * 4) { k->binary[which / 4](n, pa, sa, pb, sb, d); return; }
    which -= DFI_BINARY_COUNT * 4;
    if (which < DFI_UNARY_COUNT) { k->unary[which](n, b, d); return; }
    which -= DFI_UNARY_COUNT;
    if (which < DFI_UNARY_COUNT) { k->unary_back[which](n, b, c, a, d); return; }
    which -= DFI_UNARY_COUNT;
    if (which < 4) { k->muladd(n, pa, sa, pb, sb, d); return; }
    if (which == 4) k->affine(n, (df_real)1.7, a, (df_real)0.3, d);
    if (which == 5) k->axpy(n, (df_real)-1.3, a, d);
    if (which == 6) k->ema(n, d, a, 0.99);
    if (which == 7) {
        const double weights[3] = {0.3, -1.25, 1e-3};
        const df_real *terms[3];
        terms[0] = a, terms[1] = d, terms[2] = b;
        k->combine(n, 3, weights, terms, d);
    }
    if (which > 7) {
        const double weights[2] = {1.25, -0.3};
        const df_real *terms[2];
        terms[0] = d, terms[1] = b;
        expect(k->convert(n, which - 7, weights, terms, d));
    }
}

TEST(elementwise) {
    static arrays in, plain, tuned, other;
    size_t bytes = sizeof in.d;
    fill(in.a, COUNT(in.a), -2, 2);
    fill(in.b, COUNT(in.b), 0.1, 3);
    fill(in.c, COUNT(in.c), 0.5, 2);
    fill(in.d, COUNT(in.d), -2, 2);
    EACH_TABLE(k) {
        for (int which = 0; which < ELEMENTWISE; which++) {
            char name[32];
            snprintf(name, sizeof name, "element-wise %d", which);
            for (size_t s = 0; s < COUNT(sizes); s++) {
                size_t n = sizes[s];
                plain = in, tuned = in;
                run_elementwise(tables[0], which, n, &in, 0, &plain);
                run_elementwise(k, which, n, &in, 0, &tuned);
                close_to(name, k, n, tuned.d, plain.d, 8 * EPS, 4);
                check(memcmp(tuned.d + n, in.d + n, bytes - n * sizeof(df_real)) == 0,
                      "%s %s n=%zu writes past the end", k->name, name, n);
                for (size_t shift = 1; shift < 5; shift += 2) {   // cut in two, off alignment
                    size_t cut = n < shift ? n : shift;
                    other = in;
                    run_elementwise(k, which, cut, &in, 0, &other);
                    run_elementwise(k, which, n - cut, &in, cut, &other);
                    check(memcmp(other.d, tuned.d, bytes) == 0, "%s %s n=%zu: cut at %zu differs",
                          k->name, name, n, cut);
                }
            }
        }
    }
}

TEST(adamw) {
    enum { N = MOST };
    static df_real in[4][N], p[4][N], t[4][N];
    fill(in[0], N, -1, 1), fill(in[1], N, -1, 1), fill(in[2], N, 0, 1), fill(in[3], N, -3, 3);
    in[2][5] = 0, in[3][5] = 0, in[1][5] = 0;                     // no gradient so far: no step
    EACH_TABLE(k) {
        for (size_t s = 0; s < COUNT(sizes); s++) {
            size_t n = sizes[s];
            double b1 = 0.9, b2 = 0.999, c1 = 1 - b1 * b1, c2 = 1 - b2 * b2, lr = 1e-2, wd = 0.1;
            memcpy(p, in, sizeof p), memcpy(t, in, sizeof t);
            k->adamw(n, t[0], t[1], t[2], t[3], 0.5, lr, b1, b2, 1e-8, wd, c1, c2);
            for (size_t i = 0; i < n; i++) {                      // in double, from the paper
                double g = 0.5 * (double)in[3][i], m = b1 * (double)in[1][i] + (1 - b1) * g;
                double v = b2 * (double)in[2][i] + (1 - b2) * g * g;
                double w = (double)in[0][i] * (1 - lr * wd);
                p[0][i] = (df_real)(w - lr * (m / c1) / (sqrt(v / c2) + 1e-8));
                p[1][i] = (df_real)m, p[2][i] = (df_real)v;
            }
            for (int j = 0; j < 4; j++) close_to("adamw", k, n, t[j], p[j], 4 * EPS, 1);
            if (n > 5) near(t[0][5], (double)in[0][5] * (1 - lr * wd), 2 * EPS);
        }
    }
}

// ---- reductions ----

TEST(reductions) {
    static df_real a[MOST + SLACK], b[MOST + SLACK], x[MOST + SLACK], y[MOST + SLACK];
    fill(a, MOST, -2, 3);
    fill(b, MOST, -1, 1);
    EACH_TABLE(k) {
        for (size_t s = 0; s < COUNT(sizes); s++) {
            size_t n = sizes[s];
            double sum = 0, dot = 0, most = -HUGE_VAL, mean, var = 0, m, v;
            for (size_t i = 0; i < n; i++) {
                sum += (double)a[i], dot += (double)a[i] * (double)b[i];
                most = fmax(most, (double)a[i]);
            }
            mean = n > 0 ? sum / (double)n : 0;
            for (size_t i = 0; i < n; i++) var += ((double)a[i] - mean) * ((double)a[i] - mean);
            if (n > 0) var /= (double)n;
            near_abs(k->sum(n, a), sum, 1e-11);
            near_abs(k->dot(n, a, b), dot, 1e-11);
            expect((double)k->max(n, a) == most);
            k->moments(n, a, &m, &v);
            near(m, mean, 1e-12);
            near(v, var, 1e-12);
            // reads nothing behind the end: what stands there changes no bit
            memcpy(x, a, sizeof x), memcpy(y, b, sizeof y);
            for (size_t i = n; i < COUNT(x); i++) x[i] = y[i] = (df_real)1e30;
            expect(k->sum(n, x) == k->sum(n, a) && k->dot(n, x, y) == k->dot(n, a, b));
            expect(k->max(n, x) == k->max(n, a));
        }
    }
}

TEST(sum_is_exact) {
    enum { N = 1000000 };
    df_real *x = (df_real *)malloc(N * sizeof *x);
    double sum = 0, square = 0, mean, var;
    for (int i = 0; i < N; i++) {
        x[i] = (df_real)(100 + uniform(0, 1));
        sum += (double)x[i], square += (double)x[i] * (double)x[i];
    }
    EACH_TABLE(k) {
        near_rel(k->sum(N, x), sum, 1e-12);
        near_rel(k->dot(N, x, x), square, 1e-12);
        k->moments(N, x, &mean, &var);
        near_rel(mean, sum / N, 1e-12);
        near_rel(var, 1.0 / 12, 2e-3);                            // of N uniform draws
    }
    free(x);
}

// The transforms of 3x3 convolutions: against the plain ones; the second and third as the
// transposes they are said to be; nothing written beside the places asked for.
TEST(winograd_transforms) {
    enum { PLANE = 300, STEP = 320 };
    static df_real x[4 * PLANE], v[16 * STEP], w[16 * STEP], y[4 * PLANE], z[4 * PLANE];
    const size_t counts[] = {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 20, 31, 33, 136, 272};
    fill(x, COUNT(x), -1, 1);
    EACH_TABLE(k) for (size_t c = 0; c < COUNT(counts); c++) {
        size_t n = counts[c];
        for (size_t i = 0; i < COUNT(v); i++) v[i] = w[i] = (df_real)i;
        const size_t phases[4] = {2 * PLANE, 5, PLANE, 1}, block[4] = {4 * STEP, 8 * STEP, STEP, 2 * STEP};
        for (int back = 0; back < 2; back++) {
            k->winograd(back ? DFI_WINO_BACK : DFI_WINO_IN, n, x, phases, v, STEP);
            dfi_winograd_plain(back ? DFI_WINO_BACK : DFI_WINO_IN, n, x, phases, w, STEP);
            close_to("winograd in, back", k, COUNT(v), v, w, 0, 1);
        }
        fill(v, COUNT(v), -1, 1);
        fill(y, COUNT(y), -1, 1);
        memcpy(z, y, sizeof y);
        k->winograd(DFI_WINO_OUT, n, v, block, y, PLANE);
        dfi_winograd_plain(DFI_WINO_OUT, n, v, block, z, PLANE);
        close_to("winograd out", k, COUNT(y), y, z, 0, 1);
        // <A^T v, x> = <v, A x>
        double left = 0, right = 0;
        for (size_t i = 0; i < n; i++) {
            for (size_t p = 0; p < 4; p++) left += (double)y[p * PLANE + i] * (double)x[p * PLANE + i];
            for (size_t p = 0; p < 16; p++) right += (double)v[p * STEP + i] * (double)w[p * STEP + i];
        }
        near_abs(left, right, 40 * EPS * (double)n);
        fill(y, COUNT(y), -1, 1);
        memcpy(z, y, sizeof y);
        k->split(n, v, y, y + PLANE), dfi_split_plain(n, v, z, z + PLANE);
        k->merge(n, x, x + PLANE, y + 2 * PLANE), dfi_merge_plain(n, x, x + PLANE, z + 2 * PLANE);
        same_bits(y, z, sizeof y);
    }
}

// The convolution against its definition, at sizes that are cut into rows and into samples.
TEST(winograd) {
    static const dfi_image images[] = {{1, 16, 16, 2, 2}, {3, 16, 18, 4, 4}, {2, 19, 16, 5, 7},
                                       {5, 33, 16, 8, 8}, {1, 16, 40, 9, 32}, {2, 17, 64, 31, 40},
                                       {1, 16, 16, 3, 300}};
    for (int t = 0; t < table_count; t++) for (size_t i = 0; i < COUNT(images); i++) {
        const dfi_image s = images[i];
        df_ctx *ctx = ctx_with(2, tables[t]->isa);
        size_t HW = s.H * s.W, nx = s.B * s.C * HW, ny = s.B * s.O * HW, nw = s.O * s.C * 9;
        df_real *x = (df_real *)calloc(3 * (nx + ny + nw), sizeof *x), *y = x + nx, *w = y + ny;
        df_real *dx = w + nw, *want = dx + nx, *dy = want + ny, *dw = dy + ny, *dwant = dw + nw;
        df_real *dxwant = dwant + nw;
        fill(x, nx, -1, 1), fill(w, nw, -1, 1), fill(dy, ny, -1, 1);
        for (size_t b = 0; b < s.B; b++) for (size_t o = 0; o < s.O; o++)
            for (size_t c = 0; c < s.C; c++) for (size_t k = 0; k < 9; k++)
                for (size_t p = 0; p < HW; p++) {
                    size_t row = p / s.W + k / 3 - 1, col = p % s.W + k % 3 - 1;
                    if (row >= s.H || col >= s.W) continue;
                    size_t ix = (b * s.C + c) * HW + row * s.W + col, iy = (b * s.O + o) * HW + p;
                    size_t iw = (o * s.C + c) * 9 + k;
                    want[iy] += w[iw] * x[ix];
                    dwant[iw] += dy[iy] * x[ix];
                    dxwant[ix] += dy[iy] * w[iw];
                }
        expect(dfi_wino_fits(&s));
        expect(dfi_wino_conv(ctx, &s, 0, x, w, y) == DF_OK);
        expect(dfi_wino_conv(ctx, &s, 1, dy, w, dx) == DF_OK);
        expect(dfi_wino_weights(ctx, &s, x, dy, dw) == DF_OK);
        // sums of so many random terms
        close_to("y", tables[t], ny, y, want, 16 * EPS * sqrt(9.0 * (double)s.C), 1);
        close_to("dx", tables[t], nx, dx, dxwant, 16 * EPS * sqrt(9.0 * (double)s.O), 1);
        close_to("dw", tables[t], nw, dw, dwant, 16 * EPS * sqrt((double)(s.B * HW) + 9), 1);
        free(x);
        df_ctx_free(ctx);
    }
}

TEST(colsum) {
    static df_real x[70 * 75], y[80], want[80];
    const size_t cols[] = {1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 65, 70}, rows[] = {0, 1, 2, 5, 70};
    fill(x, COUNT(x), -1, 1);
    EACH_TABLE(k) for (size_t c = 0; c < COUNT(cols); c++) for (size_t r = 0; r < COUNT(rows); r++) {
        for (size_t j = 0; j < COUNT(y); j++) {
            double s = 0;
            for (size_t i = 0; i < rows[r] && j < cols[c]; i++) s += (double)x[i * 75 + j];
            y[j] = (df_real)j;
            want[j] = (df_real)((double)j + s);
        }
        k->colsum(rows[r], cols[c], 75, x, y);
        close_to("colsum", k, COUNT(y), y, want, 2 * EPS, 1);
        // a column's sum does not depend on its neighbours
        df_real alone = (df_real)(cols[c] - 1);
        k->colsum(rows[r], 1, 75, x + cols[c] - 1, &alone);
        same_bits(&alone, &y[cols[c] - 1], sizeof alone);
    }
}

TEST(nonfinite) {
    static df_real x[MOST], y[MOST];
    df_real zero = 0, inf = (df_real)HUGE_VAL, bad[3];
    EACH_TABLE(k) {
        k->unary[DFI_LOG](1, &zero, &bad[0]);                     // -inf, made at run time
        bad[1] = inf;
        memcpy(&bad[2], &bad[0], sizeof inf);
        ((unsigned char *)&bad[2])[0] |= 1;                       // a NaN with its lowest bit only
        fill(x, MOST, -2, 2);
        x[3] = (df_real)(sizeof(df_real) == 4 ? 3.4e38 : 1.7e308), x[4] = (df_real)1e-42, x[5] = 0;
        for (size_t s = 0; s < COUNT(sizes); s++) expect(k->nonfinite(sizes[s], x) == sizes[s]);
        for (size_t i = 0; i < MOST; i++) {
            df_real keep = x[i];
            x[i] = bad[i % 3];
            size_t at = k->nonfinite(MOST, x), before = k->nonfinite(i, x);
            check(at == i && before == i, "%s nonfinite at %zu: %zu, before %zu", k->name, i, at, before);
            for (int count = 1; count <= 2; count++) {
                const double c[2] = {.5, -1};
                const df_real *terms[2];
                terms[0] = terms[1] = x;
                check(!k->convert(MOST, count, c, terms, y) && k->convert(i, count, c, terms, y),
                      "%s convert at %zu", k->name, i);
            }
            x[i] = keep;
        }
    }
}

// ---- softmax ----

TEST(softmax) {
    static df_real x[MOST], y[MOST], z[MOST], dy[MOST], dx[MOST], want[MOST];
    for (size_t i = 0; i < MOST; i++)                             // so that x - max is exact
        x[i] = (df_real)(floor(uniform(-20, 20) * 1024) / 1024);
    fill(dy, MOST, -1, 1);
    EACH_TABLE(k) for (size_t s = 1; s < COUNT(sizes); s++) {
        size_t n = sizes[s];
        double m = -HUGE_VAL, sum = 0, total = 0;
        for (size_t i = 0; i < n; i++) m = fmax(m, (double)x[i]);
        for (size_t i = 0; i < n; i++) sum += exp((double)x[i] - m);
        k->softmax(n, x, y);
        for (size_t i = 0; i < n; i++) want[i] = (df_real)(exp((double)x[i] - m) / sum);
        close_to("softmax", k, n, y, want, 4 * EPS, 1e-45);
        for (size_t i = 0; i < n; i++) total += (double)y[i];
        near(total, 1, (4 + sqrt((double)n)) * EPS);
        memcpy(z, x, sizeof z);
        k->softmax(n, z, z);                                      // in place
        same_bits(z, y, n * sizeof *z);
        k->log_softmax(n, x, z);
        for (size_t i = 0; i < n; i++) dx[i] = x[i] - (df_real)m;
        for (size_t i = 0; i < n; i++) want[i] = (df_real)((double)dx[i] - log(sum));
        close_to("log_softmax", k, n, z, want, 3 * EPS, 1);
        // backward: dx_i = sum_j dy_j d y_j / d x_i
        double dot = 0, all = 0;
        for (size_t i = 0; i < n; i++) dot += (double)y[i] * (double)dy[i], all += (double)dy[i];
        for (size_t i = 0; i < n; i++) dx[i] = 1;
        k->softmax_back(n, y, dy, dx);
        for (size_t i = 0; i < n; i++) want[i] = (df_real)(1 + (double)y[i] * ((double)dy[i] - dot));
        close_to("softmax_back", k, n, dx, want, 4 * EPS, 1);
        for (size_t i = 0; i < n; i++) dx[i] = 1;
        k->log_softmax_back(n, z, dy, dx);
        for (size_t i = 0; i < n; i++) want[i] = (df_real)(1 + (double)dy[i] - exp((double)z[i]) * all);
        close_to("log_softmax_back", k, n, dx, want, 8 * EPS, 4);
    }
}

// ---- the matrix product ----

typedef struct { size_t M, N, K; } product;
static const product products[] = {
    {1, 1, 1}, {2, 2, 3}, {3, 5, 7}, {4, 16, 9}, {5, 17, 33}, {12, 32, 64}, {13, 33, 65}, {25, 1, 40},
    {40, 2, 31}, {1, 70, 20}, {2, 100, 17}, {11, 31, 255}, {24, 64, 256}, {37, 50, 257}, {30, 49, 530},
    {97, 103, 12}, {500, 9, 5}, {7, 400, 3}, {3, 4, 0},
};

TEST(gemm) {
    for (int t = 0; t < table_count; t++) {
        df_ctx *ctx = ctx_with(1, tables[t]->isa);
        for (size_t p = 0; p < COUNT(products); p++) for (int mode = 0; mode < 8; mode++) {
            size_t M = products[p].M, N = products[p].N, K = products[p].K;
            int ta = mode & 1, tb = mode >> 1 & 1, add = mode >> 2;
            size_t lda = (ta ? M : K) + 3, ldb = (tb ? K : N) + 2, ldc = N + 5;
            size_t na = lda * (ta ? K : M) + 1, nb = ldb * (tb ? N : K) + 1, nc = ldc * M;
            df_real *A = (df_real *)malloc(na * sizeof *A), *B = (df_real *)malloc(nb * sizeof *B);
            df_real *C = (df_real *)malloc(nc * sizeof *C), *D = (df_real *)malloc(nc * sizeof *D);
            fill(A, na, -1, 1), fill(B, nb, -1, 1), fill(C, nc, -1, 1);
            memcpy(D, C, nc * sizeof *C);
            for (size_t i = 0; i < M; i++) for (size_t j = 0; j < N; j++) {
                double s = add ? (double)C[i * ldc + j] : 0;
                for (size_t k = 0; k < K; k++)
                    s += (double)(ta ? A[k * lda + i] : A[i * lda + k])
                         * (double)(tb ? B[j * ldb + k] : B[k * ldb + j]);
                D[i * ldc + j] = (df_real)s;
            }
            expect(dfi_gemm(ctx, ta, tb, M, N, K, A, lda, B, ldb, add, C, ldc) == DF_OK);
            // sums of K random terms: rounding errors grow like sqrt(K), 6 deviations allowed
            close_to("gemm", tables[t], nc, C, D, 6 * EPS * sqrt((double)K + 1), 1);
            free(A), free(B), free(C), free(D);
        }
        df_ctx_free(ctx);
    }
}

// Row i, or column j, of a large product is the small product, to the bit; so is any number
// of threads, and each matrix of a batch.
TEST(gemm_bits) {
    enum { M = 150, N = 140, K = 600, BATCH = 5 };
    size_t na = (size_t)M * K, nb = (size_t)K * N, nc = (size_t)M * N;
    df_real *A = (df_real *)malloc(BATCH * na * sizeof *A), *B = (df_real *)malloc(BATCH * nb * sizeof *B);
    df_real *C = (df_real *)malloc(BATCH * nc * sizeof *C), *D = (df_real *)malloc(BATCH * nc * sizeof *D);
    df_real *At = (df_real *)malloc(na * sizeof *A), *Bt = (df_real *)malloc(nb * sizeof *B);
    fill(A, BATCH * na, -1, 1), fill(B, BATCH * nb, -1, 1);
    for (size_t i = 0; i < M; i++) for (size_t k = 0; k < K; k++) At[k * M + i] = A[i * K + k];
    for (size_t k = 0; k < K; k++) for (size_t j = 0; j < N; j++) Bt[j * K + k] = B[k * N + j];
    for (int t = 0; t < table_count; t++) {
        df_ctx *ctx = ctx_with(1, tables[t]->isa);
        dfi_gemm(ctx, 0, 0, M, N, K, A, K, B, N, 0, C, N);
        for (int mode = 1; mode < 4; mode++) {
            int ta = mode & 1, tb = mode >> 1;
            dfi_gemm(ctx, ta, tb, M, N, K, ta ? At : A, ta ? M : K, tb ? Bt : B, tb ? K : N, 0, D, N);
            same_bits(C, D, nc * sizeof *C);
        }
        const size_t heights[] = {1, 2, 3, 4, 5, 9, 12, 13, 31}, widths[] = {1, 2, 5, 8, 15, 16, 17, 33, 47};
        for (size_t h = 0; h < COUNT(heights); h++) for (size_t w = 0; w < COUNT(widths); w++) {
            size_t m = heights[h], n = widths[w], i0 = (h * 29 + w) % (M - m), j0 = (w * 37 + h) % (N - n);
            dfi_gemm(ctx, 0, (int)(h & 1), m, n, K, A + i0 * K, K, h & 1 ? Bt + j0 * K : B + j0,
                     h & 1 ? K : N, 0, D, n);
            int same = 1;
            for (size_t i = 0; i < m; i++)
                same &= memcmp(D + i * n, C + (i0 + i) * N + j0, n * sizeof *C) == 0;
            check(same, "%s: block %zu x %zu at (%zu, %zu) differs", tables[t]->name, m, n, i0, j0);
        }
        for (size_t b = 0; b < BATCH; b++)
            dfi_gemm(ctx, 0, 0, M, N, K, A + b * na, K, B + b * nb, N, 0, C + b * nc, N);
        for (int threads = 1; threads <= 5; threads += threads < 3 ? 1 : 2) {
            df_ctx *many = ctx_with(threads, tables[t]->isa);
            for (size_t batch = 1; batch <= BATCH; batch += 2) {
                memset(D, 0, BATCH * nc * sizeof *D);
                dfi_gemm_batch(many, 0, 0, batch, M, N, K, A, K, na, B, N, nb, 0, D, N, nc);
                check(memcmp(C, D, batch * nc * sizeof *C) == 0, "%s: %d threads, batch of %zu differ",
                      tables[t]->name, threads, batch);
            }
            df_ctx_free(many);
        }
        // one B for all, C on top of what is there: two calls add as one more term does
        for (size_t b = 0; b < BATCH; b++) {
            memcpy(D + b * nc, C, nc * sizeof *C);
            dfi_gemm(ctx, 0, 0, M, N, K, A + b * na, K, B, N, 1, D + b * nc, N);
        }
        df_real *E = (df_real *)malloc(BATCH * nc * sizeof *E);
        for (size_t b = 0; b < BATCH; b++) memcpy(E + b * nc, C, nc * sizeof *C);
        dfi_gemm_batch(ctx, 0, 0, BATCH, M, N, K, A, K, na, B, N, 0, 1, E, N, nc);
        same_bits(D, E, BATCH * nc * sizeof *C);
        free(E);
        df_ctx_free(ctx);
    }
    free(A), free(B), free(C), free(D), free(At), free(Bt);
}

static int refuse;
static void *mean_alloc(void *user, size_t size, size_t align) {
    void *p = NULL;
    (void)user;
    if (refuse || posix_memalign(&p, align, size) != 0) return NULL;
    return p;
}
static void mean_free(void *user, void *ptr, size_t size, size_t align) {
    (void)user, (void)size, (void)align;
    free(ptr);
}
TEST(gemm_memory) {
    df_ctx_desc d = df_ctx_defaults();
    d.alloc.alloc = mean_alloc, d.alloc.free = mean_free;
    d.threads = 1;
    df_ctx *ctx = df_ctx_create(&d);
    enum { S = 700 };
    df_real *x = (df_real *)calloc(S * S, sizeof *x), *y = (df_real *)calloc(S * S, sizeof *y);
    refuse = 1;
    expect(dfi_gemm(ctx, 0, 0, S, S, S, x, S, x, S, 0, y, S) == DF_ERR_MEMORY);
    expect(df_ctx_error(ctx) == DF_ERR_MEMORY);
    refuse = 0;
    expect(dfi_gemm(ctx, 0, 0, S, S, S, x, S, x, S, 0, y, S) == DF_OK);
    df_ctx_free(ctx);
    free(x), free(y);
}

int main(int argc, char **argv) {
    find_tables();
    test_begin(argc, argv);
    RUN(selection);
    RUN(functions);
    RUN(function_limits);
    RUN(elementwise);
    RUN(adamw);
    RUN(reductions);
    RUN(sum_is_exact);
    RUN(colsum);
    RUN(winograd_transforms);
    RUN(winograd);
    RUN(nonfinite);
    RUN(softmax);
    RUN(gemm);
    RUN(gemm_bits);
    RUN(gemm_memory);
    return test_end();
}
