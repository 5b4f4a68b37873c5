// fuzz_checkpoint.c: any bytes as a checkpoint of our own. What loads can be asked and written.
#include "fuzz.h"

static int seed_sink(void *user, const void *data, size_t size) {
    return fwrite(data, 1, size, (FILE *)user) == size ? 0 : 1;
}
// `fuzz_checkpoint -seeds=folder`: networks small enough to be mutated well.
static void seed(df_ctx *ctx, const char *folder, const char *name, df_net *net) {
    char path[600];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    must(net != NULL && f != NULL && df_net_save(ctx, net, df_sink_hooks(seed_sink, f)) == DF_OK);
    fclose(f);
    df_net_free(net);
}
static void seeds(const char *folder) {
    df_ctx *ctx = fuzz_context();
    df_mlp_desc m = df_mlp_defaults();
    df_unet_desc u = df_unet_defaults();
    df_dit_desc d = df_dit_defaults();
    df_vae_desc v = df_vae_defaults();
    df_coupling_desc c = df_coupling_defaults();
    double betas[2] = {.1, .2};
    df_card card = df_card_defaults();
    m.width = 1, m.depth = 1, m.embed = 2, m.classes = 1, m.condition = 1;
    u.in_channels = u.out_channels = 1, u.height = u.width = 2, u.levels = 1, u.channels[0] = 4;
    u.down[0] = u.up[0] = DF_UNET_PLAIN, u.layers = 1, u.groups = 1, u.head_dim = 0, u.mid_attention = 0;
    d.size = 2, d.patch = 1, d.in_channels = 1, d.width = 4, d.depth = 1, d.heads = 1, d.mlp_width = 4;
    d.classes = 1, d.null_class = 0;
    v.width = v.depth = 1, v.levels = 2, c.width = c.depth = 1, c.layers = 2;
    seed(ctx, folder, "vae", df_vae_create(ctx, &v));
    seed(ctx, folder, "coupling", df_coupling_create(ctx, &c));
    seed(ctx, folder, "mlp", df_mlp_create(ctx, &m));
    seed(ctx, folder, "unet", df_unet_create(ctx, &u));
    df_net *dit = df_dit_create(ctx, &d);
    must(df_process_table(ctx, betas, 2, &card.process) == DF_OK);
    card.learned = DF_LEARNED_RANGE;
    must(df_net_set_card(ctx, dit, &card) == DF_OK);
    seed(ctx, folder, "dit", dit);
}
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    for (int i = 1; i < *argc; i++)
        if (strncmp((*argv)[i], "--seeds=", 8) == 0) seeds((*argv)[i] + 8), exit(0);
    return 0;
}

// One step of training on two rows, with conditions.
static void train(df_ctx *ctx, df_net *net) {
    df_train_desc d = df_train_defaults();
    df_real x[128] = {1}, condition[128] = {0};
    d.card = *df_net_card(net);
    d.batch = 2, d.steps = 1, d.validation = 0, d.scaling = DF_SCALING_NONE;
    d.condition = df_net_condition(net) > 0 && df_net_condition(net) <= 64 ? condition : NULL;
    df_trainer *trainer = df_trainer_create(ctx, net, x, 2, NULL, &d);
    if (trainer == NULL || df_trainer_run(trainer, 0) != DF_OK) must(df_ctx_message(ctx)[0] != 0);
    df_trainer_free(trainer);
}
static void ask(df_ctx *ctx, df_net *net) {
    df_real x[64] = {0}, out[128];
    if (df_net_dim(net) > 64 || df_net_size(net) > 20000) return;
    if (df_net_dim(net) % 2 == 0) train(ctx, net);
    df_model m = df_net_model(net);
    double t = df_process_t_min(&m.process);
    if (df_model_ask(ctx, &m, DF_ASK_PREDICT, &t, 1, x, NULL, NULL, out) != DF_OK)
        must(df_ctx_message(ctx)[0] != 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    df_ctx *ctx = fuzz_context();
    size_t before = df_ctx_bytes(ctx);
    df_net *net = df_net_load(ctx, df_source_memory(data, size));
    df_buffer buffer = {NULL, 0, 0};
    if (net == NULL) must_explain(ctx);
    else {
        must(df_net_save(ctx, net, df_sink_buffer(&buffer)) == DF_OK);
        df_buffer_free(ctx, &buffer);
        ask(ctx, net);
    }
    df_net_free(net);
    must(df_ctx_bytes(ctx) == before || net != NULL); // step memory may have grown by asking
    return 0;
}
