// counting.h: an allocator that counts what lives and fails at a chosen call, a context made
// with it, and a look at the context's message. Include it after diffusion.h and test.h.
#ifndef DF_COUNTING_H
#define DF_COUNTING_H
typedef struct counter { long live, calls, fail_at; } counter;
static inline void *count_alloc(void *user, size_t size, size_t align) {
    counter *c = (counter *)user;
    void *p = NULL;
    if (++c->calls == c->fail_at || posix_memalign(&p, align < 8 ? 8 : align, size ? size : 1))
        return NULL;
    c->live += (long)size;
    return p;
}
static inline void count_free(void *user, void *p, size_t size, size_t align) {
    (void)align;
    ((counter *)user)->live -= (long)size;
    free(p);
}
static inline df_ctx *new_ctx(int threads, counter *c) {
    df_ctx_desc d = df_ctx_defaults();
    d.threads = threads;
    if (c != NULL) {
        d.alloc.alloc = count_alloc;
        d.alloc.free = count_free;
        d.alloc.user = c;
    }
    return df_ctx_create(&d);
}
static inline int says(const df_ctx *ctx, const char *part) {
    if (strstr(df_ctx_message(ctx), part) != NULL) return 1;
    printf("message: %s\n", df_ctx_message(ctx));
    return 0;
}
#endif
