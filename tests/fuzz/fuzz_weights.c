// fuzz_weights.c: any bytes as the weights of a network whose configuration is known: a UNet with
// the old names of attentions, a DiT, or DiTTransformer2DModel, which repeats its embeddings. The
// first byte says which.
#include "fuzz.h"

enum { KINDS = 3 };
static df_buffer config[KINDS];

static df_net *tiny(df_ctx *ctx, int kind) {
    df_unet_desc u = df_unet_defaults();
    df_dit_desc d = df_dit_defaults();
    u.in_channels = u.out_channels = 1, u.height = u.width = 2, u.levels = 1, u.channels[0] = 4;
    u.down[0] = u.up[0] = DF_UNET_ATTENTION, u.layers = 1, u.groups = 1, u.head_dim = 0;
    u.classes = 2, u.null_class = 1;
    d.size = 2, d.patch = 1, d.in_channels = 1, d.width = 4, d.depth = 2, d.heads = 1;
    d.classes = 1, d.null_class = 1, d.learn_sigma = 0, d.diffusers = kind == 2;
    return kind == 0 ? df_unet_create(ctx, &u) : df_dit_create(ctx, &d);
}
static df_buffer weights(df_ctx *ctx, int kind) {
    static const dfi_naming naming[KINDS] = {DFI_NAMES_OLD, DFI_NAMES_OWN, DFI_NAMES_DIFFUSERS};
    df_buffer bytes = {NULL, 0, 0};
    df_net *net = tiny(ctx, kind);
    df_scope mark = df_scope_begin(ctx);
    must(net && dfi_net_export(ctx, net, naming[kind], df_sink_buffer(&bytes)) == DF_OK);
    if (config[kind].data == NULL) must(dfi_net_config(ctx, net, &config[kind]) == DF_OK);
    df_scope_end(ctx, mark, NULL);
    df_net_free(net);
    return bytes;
}
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    df_ctx *ctx = fuzz_context();
    for (int kind = 0; kind < KINDS; kind++) {
        df_buffer bytes = weights(ctx, kind);
        for (int i = 1; i < *argc; i++)
            if (strncmp((*argv)[i], "--seeds=", 8) == 0) {
                char path[600];
                snprintf(path, sizeof path, "%s/%d", (*argv)[i] + 8, kind);
                FILE *f = fopen(path, "wb");
                must(f && fputc(kind, f) == kind);
                must(fwrite(bytes.data, 1, bytes.size, f) == bytes.size && fclose(f) == 0);
                if (kind == KINDS - 1) exit(0);
            }
        df_buffer_free(ctx, &bytes);
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    df_ctx *ctx = fuzz_context();
    size_t before = df_ctx_bytes(ctx);
    if (size == 0) return 0;
    int kind = data[0] % KINDS;
    df_source c = df_source_memory(config[kind].data, config[kind].size);
    df_net *net = df_net_load_config(ctx, c, df_source_memory(data + 1, size - 1), NULL);
    if (net == NULL) must_explain(ctx);
    df_net_free(net);
    must(df_ctx_bytes(ctx) == before);
    return 0;
}
