// Foundations: errors, allocator hooks, step memory, Philox, noise's moments, workers, tasks,
// cancel. Reaches the private functions, so it carries its own implementation.
#define DIFFUSION_IMPLEMENTATION
#define DIFFUSION_STATIC
#include "diffusion.h"
#include "test.h"

// ---- a counting allocator that can fail at the k-th call ----
typedef struct { long calls, live, fail_at; size_t bytes; int wrong; } counting;
static void *count_alloc(void *user, size_t size, size_t align) {
    counting *c = (counting *)user;
    unsigned char *p;
    if (++c->calls == c->fail_at) return NULL;
    if (posix_memalign((void **)&p, align, size + align) != 0) return NULL;
    memcpy(p, &size, sizeof size);
    c->live++, c->bytes += size;
    return p + align;
}
static void count_free(void *user, void *ptr, size_t size, size_t align) {
    counting *c = (counting *)user;
    unsigned char *p = (unsigned char *)ptr - align;
    size_t was;
    memcpy(&was, p, sizeof was);
    c->wrong += was != size;
    c->live--, c->bytes -= size;
    free(p);
}

static char logged[600];
static void keep_log(void *user, df_log_level level, const char *text) {
    (void)user;
    if (level == DF_LOG_ERROR) snprintf(logged, sizeof logged, "%s", text);
}

static int order_of_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static df_ctx *ctx_with(int threads, counting *c) {
    df_ctx_desc d = df_ctx_defaults();
    d.threads = threads;
    d.log.message = keep_log;
    if (c != NULL) d.alloc.alloc = count_alloc, d.alloc.free = count_free, d.alloc.user = c;
    return df_ctx_create(&d);
}

TEST(context) {
    df_ctx_desc d = df_ctx_defaults();
    df_ctx *ctx = df_ctx_create(NULL);
    expect(ctx != NULL && df_ctx_error(ctx) == DF_OK && df_ctx_message(ctx)[0] == 0);
    expect(df_ctx_threads(ctx) >= 1);
    expect(df_version() == DF_VERSION);
    same_text(df_precision(), DF_REAL_NAME);
    expect(df_ctx_peak_bytes(ctx) >= df_ctx_bytes(ctx));
    df_ctx_free(ctx);
    df_ctx_free(NULL);
    d.cookie = 0;
    expect(df_ctx_create(&d) == NULL);
    d = df_ctx_defaults();
    d.threads = -1;
    d.log.message = keep_log;
    expect(df_ctx_create(&d) == NULL);
    expect(strstr(logged, "threads") != NULL);
    d = df_ctx_defaults();
    d.alloc.alloc = count_alloc;
    d.log.message = keep_log;
    expect(df_ctx_create(&d) == NULL);
    expect(strstr(logged, "both alloc and free") != NULL);
    d = df_ctx_defaults();
    d.max_isa = DF_ISA_PLAIN;
    ctx = df_ctx_create(&d);
    same_text(df_ctx_isa(ctx), "plain");
    df_ctx_free(ctx);
}

TEST(errors_stick_for_tensors_only) {
    df_ctx *ctx = ctx_with(1, NULL);
    expect(dfi_fail(ctx, DF_ERR_ARGUMENT, "f: %d is odd", 3) == DF_ERR_ARGUMENT);
    same_text(df_ctx_message(ctx), "f: 3 is odd");
    same_text(logged, "f: 3 is odd");
    expect(df_ctx_error(ctx) == DF_ERR_ARGUMENT && dfi_stuck(ctx) == DF_OK);
    expect(dfi_fail_tensor(ctx, DF_ERR_SHAPE, "g: first") == NULL);
    expect(dfi_fail_tensor(ctx, DF_ERR_MEMORY, "g: second") == NULL);   // does not replace
    same_text(df_ctx_message(ctx), "g: first");
    dfi_fail(ctx, DF_ERR_IO, "h: between");
    same_text(df_ctx_message(ctx), "h: between");
    expect(dfi_stuck(ctx) == DF_ERR_SHAPE);                             // puts the sentence back
    same_text(df_ctx_message(ctx), "g: first");
    df_ctx_clear(ctx);
    expect(dfi_stuck(ctx) == DF_OK && df_ctx_error(ctx) == DF_OK);
    expect(dfi_fail(NULL, DF_ERR_IO, "no context") == DF_ERR_IO);
    same_text(df_result_name(DF_ERR_MEMORY), "no memory");
    same_text(df_result_name(DF_CANCELLED), "cancelled");
    same_text(df_result_name(42), "a callback's failure");
    df_ctx_free(ctx);
}

TEST(allocator_hooks_balance) {
    counting c = { 0, 0, 0, 0, 0 };
    df_ctx *ctx = ctx_with(2, &c);
    df_scope mark = dfi_scratch_mark(ctx);
    void *p = dfi_new(ctx, 1000);
    expect(((uintptr_t)p & 63) == 0);
    expect(dfi_new_owned(ctx, 77) != NULL);
    for (int i = 0; i < 100; i++) expect(((uintptr_t)dfi_scratch(ctx, (size_t)(i * 997)) & 63) == 0);
    expect(df_ctx_bytes(ctx) == c.bytes);
    dfi_scratch_release(ctx, mark);
    dfi_delete(ctx, p, 1000);
    dfi_delete(ctx, NULL, 5);
    df_ctx_free(ctx);
    expect(c.live == 0 && c.bytes == 0 && c.wrong == 0 && c.calls > 3);
}

TEST(memory_failure_is_an_error) {
    counting c = { 0, 0, 0, 0, 0 };
    df_ctx *ctx = ctx_with(1, &c);
    c.fail_at = c.calls + 1;
    expect(dfi_new(ctx, 100) == NULL && df_ctx_error(ctx) == DF_ERR_MEMORY);
    expect(strstr(df_ctx_message(ctx), "no memory") != NULL);
    c.fail_at = c.calls + 1;
    expect(dfi_scratch(ctx, 100) == NULL);
    expect(dfi_scratch(ctx, 100) != NULL);                              // and it recovers
    expect(dfi_scratch(ctx, SIZE_MAX) == NULL && dfi_scratch(ctx, SIZE_MAX - 3) == NULL);
    expect(dfi_new(ctx, SIZE_MAX) == NULL);
    expect(dfi_mul(SIZE_MAX / 2, 3) == SIZE_MAX && dfi_plus(SIZE_MAX, 1) == SIZE_MAX);
    expect(dfi_mul(6, 7) == 42 && dfi_plus(6, 7) == 13 && dfi_mul(0, 7) == 0 && dfi_mul(7, 0) == 0);
    df_ctx_free(ctx);
    c.fail_at = c.calls + 1;
    expect(ctx_with(1, &c) == NULL);
    expect(c.live == 0);
}

TEST(step_memory_is_a_stack) {
    df_ctx *ctx = ctx_with(1, NULL);
    df_scope outer = dfi_scratch_mark(ctx), inner;
    char *a = (char *)dfi_scratch(ctx, 100), *b, *again;
    size_t bytes;
    memset(a, 1, 100);
    inner = dfi_scratch_mark(ctx);
    b = (char *)dfi_scratch(ctx, 1000000);                              // needs a further block
    memset(b, 2, 1000000);
    expect(dfi_scratch_after(ctx, inner, b) && !dfi_scratch_after(ctx, inner, a));
    expect(dfi_scratch_after(ctx, outer, a) && dfi_scratch_after(ctx, outer, b));
    expect(!dfi_scratch_after(ctx, outer, &outer));
    bytes = df_ctx_bytes(ctx);
    for (int i = 0; i < 50; i++) {                                      // released memory serves again
        dfi_scratch_release(ctx, inner);
        again = (char *)dfi_scratch(ctx, 1000000);
        expect(again == b);
        expect(dfi_scratch(ctx, 0) != NULL);
    }
    expect(df_ctx_bytes(ctx) == bytes && a[99] == 1);
    dfi_scratch_release(ctx, outer);
    expect(dfi_scratch(ctx, 100) == (void *)a);
    df_ctx_free(ctx);
}

// Known answers of Random123's kat_vectors for philox4x32-10.
TEST(philox_known_answers) {
    static const uint32_t want[3][4] = {
        { 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 },
        { 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd },
        { 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 }
    };
    uint32_t b[4];
    df_random_bits(0, 0, 0, 0, b);
    same_bits(b, want[0], 16);
    df_random_bits(UINT64_MAX, UINT64_MAX, UINT32_MAX, UINT32_MAX, b);
    same_bits(b, want[1], 16);
    // counter 243f6a88 85a308d3 13198a2e 03707344, key a4093822 299f31d0
    df_random_bits(0x299f31d0a4093822u, 0x0370734413198a2eu, 0x85a308d3u, 0x243f6a88u, b);
    same_bits(b, want[2], 16);
}

// The integer ln, cos, sin against libm; and the normal numbers themselves are fixed for ever.
TEST(normal_numbers) {
    double worst_ln = 0, worst_circle = 0, sum = 0, sum2 = 0, sum4 = 0, beyond = 0;
    df_real z[4], five[5];
    const int n = 4000000;
    df_real *all = (df_real *)malloc(sizeof(df_real) * (size_t)n);
    for (uint32_t i = 0; i < 400000; i++) {
        uint32_t w = i * 2654435761u;
        int64_t c, s;
        double angle = 2 * DFI_PI * w / 4294967296.0;
        dfi_cos_sin(w, &c, &s);
        worst_circle = fmax(worst_circle, fabs((double)c / 1073741824.0 - cos(angle)));
        worst_circle = fmax(worst_circle, fabs((double)s / 1073741824.0 - sin(angle)));
        worst_ln = fmax(worst_ln, fabs((double)dfi_minus_log(w) / 1073741824.0
                                       + log((w + 0.5) / 4294967296.0)));
    }
    check(worst_ln < 1e-8, "ln is off by %g", worst_ln);
    check(worst_circle < 1e-8, "cos and sin are off by %g", worst_circle);
    expect(dfi_minus_log(UINT32_MAX) >= 0);
    df_random_normal(1, 2, 3, 4, z);
    df_random_normal(1, 2, 3, 5, five);
    same_bits(z, five, sizeof z);                                       // a prefix is a prefix
    // libm's Box-Muller on the same bits, by an independent program
    near_abs((double)z[0], -0.344980578809, 5e-8);
    near_abs((double)z[1], 0.234405059311, 5e-8);
    near_abs((double)z[2], -1.439000627437, 5e-8);
    near_abs((double)z[3], 1.610290296845, 5e-8);
    df_random_normal(5, 6, 7, (size_t)n, all);
    for (int i = 0; i < n; i++) {
        double x = (double)all[i];
        sum += x, sum2 += x * x, sum4 += x * x * x * x, beyond += fabs(x) > 3;
    }
    // six standard errors: a false alarm once in 5e8
    near_abs(sum / n, 0.0, 6 * sqrt(1.0 / n));
    near_abs(sum2 / n, 1.0, 6 * sqrt(2.0 / n));
    near_abs(sum4 / n, 3.0, 6 * sqrt(96.0 / n));
    near_abs(beyond / n, 0.0026997961, 6 * sqrt(0.0027 / n));
    free(all);
}

TEST(uniform_numbers) {
    double u[1001], mean = 0;
    df_random_uniform(3, 1, 4, 1001, u);
    for (int i = 0; i < 1001; i++) {
        expect(u[i] > 0 && u[i] < 1);
        mean += u[i] / 1001;
    }
    near_abs(mean, 0.5, 6 * sqrt(1.0 / 12 / 1001));
}

// Every task exactly once, over any number of workers and very many short jobs.
typedef struct { int *hits; double *out; } hits;
static void hit(void *arg, int i) {
    hits *h = (hits *)arg;
    __atomic_fetch_add(&h->hits[i], 1, __ATOMIC_RELAXED);
    h->out[i] = i * 0.5;
}
TEST(workers) {
    int hit_count[1000];
    double out[1000];
    hits h;
    h.hits = hit_count, h.out = out;
    for (int threads = 1; threads <= 4; threads++) {
        df_ctx *ctx = ctx_with(threads, NULL);
        int jobs = test_short() ? 200 : 3000;
        for (int j = 0; j < jobs; j++) {
            int count = j % 1000, bad = 0;
            memset(hit_count, 0, sizeof hit_count);
            memset(out, 0, sizeof out);
            dfi_parallel(ctx, count, hit, &h);
            for (int i = 0; i < 1000; i++)
                bad += hit_count[i] != (i < count) || (i < count && out[i] != i * 0.5);
            expect(bad == 0);
        }
        df_ctx_free(ctx);
    }
}

static int host_runs;
static void host_run(void *user, int count, void (*task)(void *arg, int index), void *arg) {
    (void)user;
    host_runs++;
    for (int i = count - 1; i >= 0; i--) task(arg, i);
}
TEST(host_tasks) {
    df_ctx_desc d = df_ctx_defaults();
    int hit_count[10] = { 0 };
    double out[10];
    hits h;
    df_ctx *ctx;
    h.hits = hit_count, h.out = out;
    d.tasks.run = host_run;
    expect(df_ctx_create(&d) == NULL);                                  // workers not given
    d.tasks.workers = 3;
    ctx = df_ctx_create(&d);
    expect(df_ctx_threads(ctx) == 3);
    dfi_parallel(ctx, 10, hit, &h);
    expect(host_runs == 1);
    for (int i = 0; i < 10; i++) expect(hit_count[i] == 1);
    df_ctx_free(ctx);
}

TEST(cancel_is_seen_once) {
    df_ctx *ctx = ctx_with(1, NULL);
    expect(!dfi_cancelled(ctx));
    df_ctx_cancel(ctx);
    expect(dfi_cancelled(ctx) && !dfi_cancelled(ctx));
    df_ctx_cancel(ctx);
    df_ctx_clear(ctx);
    expect(!dfi_cancelled(ctx));
    df_ctx_free(ctx);
}

// The manual's SYNOPSIS, with every allocation failing in turn, and without a context at all:
// errors with sentences, never a crash, nothing lost.
static df_result synopsis(df_ctx *ctx, const df_real *x, int n, df_real *y) {
    df_mlp_desc m = df_mlp_defaults();
    df_train_desc t = df_train_defaults();
    df_sample_desc s = df_sample_defaults();
    m.width = 8, m.depth = 1, m.embed = 8;
    t.batch = 8, t.steps = 2;
    s.steps = 2;
    df_net *net = df_mlp_create(ctx, &m);
    df_trainer *trainer = df_trainer_create(ctx, net, x, n, NULL, &t);
    df_result result = df_ctx_error(ctx);
    if (result == DF_OK) result = df_trainer_run(trainer, 0);
    if (result == DF_OK) {
        df_model model = df_net_model(net);
        result = df_sample(ctx, &model, &s, y, 5);
    }
    if (result != DF_OK) expect(df_ctx_message(ctx)[0] != 0);
    df_trainer_free(trainer);
    df_net_free(net);
    df_ctx_free(ctx);
    return result;
}
TEST(synopsis_without_memory) {
    df_real x[80], y[10];
    df_result result = DF_ERR_MEMORY;
    df_random_normal(1, 2, 3, 80, x);
    expect(synopsis(NULL, x, 40, y) != DF_OK);
    for (long k = 1; k < 400 && result != DF_OK; k++) {
        counting c = { 0, 0, k, 0, 0 };
        df_ctx *ctx = ctx_with(1, &c);
        result = synopsis(ctx, x, 40, y);
        check(result == DF_OK || result == DF_ERR_MEMORY, "allocation %ld: %d", k, result);
        expect(c.live == 0 && c.wrong == 0);
    }
    expect(result == DF_OK);
}

TEST(without_a_context) {
    double d, w = 1, mean = 0, cov = 1;
    df_real a[4] = { 0, 1, 2, 3 };
    df_ctx_clear(NULL);
    df_ctx_cancel(NULL);
    expect(df_ctx_bytes(NULL) == 0 && df_ctx_peak_bytes(NULL) == 0 && df_ctx_threads(NULL) == 0);
    expect(df_ctx_isa(NULL)[0] == 0);
    df_scope_end(NULL, df_scope_begin(NULL), NULL);
    df_record_begin(NULL);
    df_record_end(NULL);
    expect(df_energy_distance(NULL, a, 2, a, 2, 2, &d) != DF_OK);
    expect(df_mmd(NULL, a, 2, a, 2, 2, 1, &d) != DF_OK);
    expect(df_sliced_wasserstein(NULL, a, 2, a, 2, 2, 5, 0, &d) != DF_OK);
    expect(df_mixture_create(NULL, 1, 1, &w, &mean, &cov) == NULL);
}

TEST(sorting) {
    double x[101];
    for (int i = 0; i < 101; i++) x[i] = (i * 37) % 101;
    dfi_sort(x, 101, sizeof x[0], order_of_doubles);
    for (int i = 0; i < 101; i++) expect(x[i] == i);
    dfi_sort(x, 0, sizeof x[0], order_of_doubles);
    dfi_sort(x, 1, sizeof x[0], order_of_doubles);
}

TEST(nonfinite_bits) {
    const double bad[3] = { (double)NAN, (double)INFINITY, -(double)INFINITY };
    const double good[6] = { 0, -0.0, 1e308, -1e308, 5e-324, 1 };
    static const char *const names[3] = { "nan", "inf", "-inf" };
    for (int i = 0; i < 3; i++) expect(dfi_nonfinite(bad[i]));
    for (int i = 0; i < 3; i++) same_text(dfi_nonfinite_name(bad[i]), names[i]);
    for (int i = 0; i < 6; i++) expect(!dfi_nonfinite(good[i]));
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    RUN(context);
    RUN(errors_stick_for_tensors_only);
    RUN(allocator_hooks_balance);
    RUN(memory_failure_is_an_error);
    RUN(step_memory_is_a_stack);
    RUN(philox_known_answers);
    RUN(normal_numbers);
    RUN(uniform_numbers);
    RUN(workers);
    RUN(host_tasks);
    RUN(cancel_is_seen_once);
    RUN(synopsis_without_memory);
    RUN(without_a_context);
    RUN(sorting);
    RUN(nonfinite_bits);
    return test_end();
}
