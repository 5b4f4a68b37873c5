// fuzz_config.c: any bytes as JSON: the configuration of a UNet2DModel or a DiT (there are no
// weights, so at best the first tensor is missing), or, one time in eight, a scheduler's beside a
// tiny network that is whole.
#include "fuzz.h"

static df_buffer config, weights;

// A DiT of width 4, written by the library itself.
static void tiny(df_ctx *ctx) {
    static const char text[] = "{\"input_size\":2,\"patch_size\":1,\"in_channels\":1,\"hidden_size\":4,"
        "\"depth\":1,\"num_heads\":1,\"mlp_ratio\":1.0,\"class_dropout_prob\":0,\"num_classes\":1,"
        "\"learn_sigma\":false}";
    df_dit_desc d = df_dit_defaults();
    d.size = 2, d.patch = 1, d.in_channels = 1, d.width = 4, d.depth = 1, d.heads = 1, d.mlp_width = 4;
    d.classes = 1, d.null_class = 0, d.learn_sigma = 0;
    df_net *net = df_dit_create(ctx, &d);
    df_scope mark = df_scope_begin(ctx);
    must(net && dfi_net_export(ctx, net, DFI_NAMES_OWN, df_sink_buffer(&weights)) == DF_OK);
    must(dfi_buffer_add(ctx, &config, text, sizeof text - 1) == DF_OK);
    df_scope_end(ctx, mark, NULL);
    df_net_free(net);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    df_ctx *ctx = fuzz_context();
    if (config.data == NULL) tiny(ctx);
    size_t before = df_ctx_bytes(ctx);
    df_source bytes = df_source_memory(data, size);
    df_net *net;
    if (size % 8 == 7)
        net = df_net_load_config(ctx, df_source_memory(config.data, config.size),
                                 df_source_memory(weights.data, weights.size), &bytes);
    else net = df_net_load_config(ctx, bytes, df_source_memory("", 0), NULL);
    if (net == NULL) must_explain(ctx);
    df_net_free(net);
    must(df_ctx_bytes(ctx) == before);
    return 0;
}
