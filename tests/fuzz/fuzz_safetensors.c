// fuzz_safetensors.c: any bytes as a safetensors file. What opens must be consistent: names are
// found, tensors can be read or are refused in words, and written again they read the same.
#include "fuzz.h"

// Reads tensor i; what could be read is written to memory and compared.
static void read_one(df_ctx *ctx, const df_safetensors *f, int i) {
    const df_file_tensor *t = df_safetensors_at(f, i);
    df_save_tensor save = {NULL, DF_DTYPE_F64, 0, {0}, NULL, 0};
    df_buffer buffer = {NULL, 0, 0};
    df_safetensors *again;
    df_real *a, *b;
    int shape[8];
    must(df_safetensors_find(f, t->name) == t);
    for (int j = 0; j < t->ndim; j++) {
        if (t->shape[j] > 1000000) return;
        shape[j] = (int)t->shape[j];
    }
    a = (df_real *)malloc(t->count * sizeof *a + 1);
    b = (df_real *)malloc(t->count * sizeof *b + 1);
    if (df_safetensors_read(ctx, f, t->name, t->ndim, shape, a) == DF_OK && t->ndim <= DF_AXES) {
        save.name = t->name;
        save.ndim = t->ndim;
        memcpy(save.shape, shape, (size_t)t->ndim * sizeof *shape);
        save.data = a;
        must(df_safetensors_write(ctx, df_sink_buffer(&buffer), &save, 1, NULL, 0) == DF_OK);
        again = df_safetensors_open(ctx, df_source_memory(buffer.data, buffer.size));
        must(again != NULL);
        must(df_safetensors_read(ctx, again, t->name, t->ndim, shape, b) == DF_OK);
        must(memcmp(a, b, t->count * sizeof *a) == 0);
        df_safetensors_close(again);
        df_buffer_free(ctx, &buffer);
    } else {
        must(df_ctx_message(ctx)[0] != 0 || t->ndim > DF_AXES);
    }
    free(a);
    free(b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    df_ctx *ctx = fuzz_context();
    df_safetensors *f;
    size_t before;
    before = df_ctx_bytes(ctx);
    f = df_safetensors_open(ctx, df_source_memory(data, size));
    if (f != NULL) {
        for (int i = 0; i < df_safetensors_count(f) && i < 50; i++) read_one(ctx, f, i);
        (void)df_safetensors_metadata(f, "format");
    } else {
        must_explain(ctx);
    }
    df_safetensors_close(f);
    must(df_ctx_bytes(ctx) == before);
    return 0;
}
