// fuzz.h: what the fuzzers share. A context whose allocations have exact sizes, so that the
// address sanitizer sees one byte too far, and a limit; each input must leave no byte behind.
#ifndef DF_FUZZ_H
#define DF_FUZZ_H
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"

static void *exact_alloc(void *user, size_t size, size_t align) {
    void *p;
    (void)user;
    return size < (size_t)1 << 28 && posix_memalign(&p, align, size) == 0 ? p : NULL;
}
static void exact_free(void *user, void *ptr, size_t size, size_t align) {
    (void)user; (void)size; (void)align;
    free(ptr);
}
static void must(int ok) { if (!ok) __builtin_trap(); }

static df_ctx *fuzz_context(void) {
    static df_ctx *ctx;
    if (ctx == NULL) {
        df_ctx_desc d = df_ctx_defaults();
        d.threads = 1;
        d.alloc.alloc = exact_alloc;
        d.alloc.free = exact_free;
        ctx = df_ctx_create(&d);
    }
    df_ctx_clear(ctx);
    return ctx;
}
// What fails says so in words.
static void must_explain(const df_ctx *ctx) {
    df_result r = df_ctx_error(ctx);
    must(r == DF_ERR_FORMAT || r == DF_ERR_MEMORY || r == DF_ERR_ARGUMENT ||
         r == DF_ERR_NONFINITE || r == DF_ERR_UNSUPPORTED || r == DF_ERR_SHAPE);
    must(df_ctx_message(ctx)[0] != 0);
}
#endif
