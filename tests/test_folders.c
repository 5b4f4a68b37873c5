// Networks as folders of others: configurations, names, hostile files; and what UNet and DiT
// promise as models. Numbers of real checkpoints are compared in test_golden.
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "test.h"
#include "counting.h"

static df_ctx *ctx;

static df_unet_desc small_unet(void) {
    df_unet_desc d = df_unet_defaults();
    d.in_channels = d.out_channels = 1, d.height = 8, d.width = 4, d.levels = 2, d.layers = 1;
    d.channels[0] = 4, d.channels[1] = 8, d.groups = 2, d.head_dim = 4, d.classes = 3, d.seed = 5;
    d.down[0] = DF_UNET_PLAIN, d.down[1] = DF_UNET_ATTENTION;
    d.up[0] = DF_UNET_ATTENTION, d.up[1] = DF_UNET_PLAIN;
    return d;
}
static df_dit_desc small_dit(void) {
    df_dit_desc d = df_dit_defaults();
    d.in_channels = 1, d.size = 4, d.patch = 2, d.width = 8, d.depth = 2, d.heads = 2, d.classes = 3;
    d.learn_sigma = 0, d.seed = 6;
    return d;
}
// Every weight something: gates that start at 0 would hide what stands behind them.
static df_net *stirred(df_net *net) {
    for (int i = 0; net && i < df_net_count(net); i++) {
        const df_param *p = df_net_param(net, i);
        df_real z[4096];
        if (p->frozen || p->size > 4096) continue;
        df_random_normal(77, (uint64_t)i, 0, p->size, z);
        for (size_t k = 0; k < p->size; k++) df_net_weights(net)[p->offset + k] += (df_real).2 * z[k];
    }
    return net;
}
// Answers of n rows at t = .3, .4, ...
static int answer(df_ctx *c, const df_net *net, int n, int first, df_real *out) {
    df_model m = df_net_model(net);
    df_real x[512];
    double t[8];
    int labels[8], dim = df_net_dim(net);
    for (int r = 0; r < n; r++) {
        t[r] = .3 + .1 * (first + r);
        labels[r] = (first + r) % 4 - 1;
        for (int i = 0; i < dim; i++) x[r * dim + i] = (df_real)sin(1 + i + 3.7 * (first + r));
    }
    return df_model_ask(c, &m, DF_ASK_PREDICT, t, n, x, NULL, labels, out);
}

TEST(benchmark_networks) {
    df_unet_desc u = df_unet_defaults();
    df_dit_desc d = df_dit_defaults();
    u.in_channels = u.out_channels = 1, u.levels = 3, u.head_dim = 0;
    u.channels[0] = 64, u.channels[1] = u.channels[2] = 128;
    u.down[1] = u.up[1] = DF_UNET_PLAIN, u.down[2] = u.up[0] = DF_UNET_ATTENTION, u.up[2] = DF_UNET_PLAIN;
    df_net *net = df_unet_create(ctx, &u);
    expect(net && df_net_trained(net) == 6469889);
    df_net_free(net);
    d.in_channels = 1, d.width = 192, d.depth = 6, d.heads = 3, d.classes = 10, d.learn_sigma = 0;
    net = df_dit_create(ctx, &d);
    expect(net && df_net_trained(net) == 4162948);
    expect(net && df_net_size(net) == 4162948 + 256 * 192); // the table of positions
    df_net_free(net);
    // the published counts of ddpm-cifar10-32 and of the class's own defaults
    u = df_unet_defaults();
    u.channels[0] = 128, u.channels[1] = u.channels[2] = u.channels[3] = 256, u.head_dim = 0;
    for (int i = 0; i < 4; i++) u.down[i] = i == 1, u.up[i] = i == 2;
    net = df_unet_create(ctx, &u);
    expect(net && df_net_trained(net) == 35746307 && df_net_count(net) == 328);
    df_net_free(net);
}

static void refused(const char *what, df_net *net, const char *word, const char *second) {
    check(net == NULL && strstr(df_ctx_message(ctx), word) && strstr(df_ctx_message(ctx), second),
          "%s: %s", what, net ? "was taken" : df_ctx_message(ctx));
    df_net_free(net);
    df_ctx_clear(ctx);
}

TEST(wrong_descriptors) {
    df_unet_desc u = small_unet();
    df_dit_desc d = small_dit();
    u.levels = 4, u.height = 30;
    u.channels[2] = u.channels[3] = 8;
    u.down[2] = u.down[3] = u.up[2] = u.up[3] = 0;
    refused("a size that cannot be halved", df_unet_create(ctx, &u), "24", "32");
    u = small_unet(), u.width = 1;
    refused("a size too small", df_unet_create(ctx, &u), "width 1", "2");
    u = small_unet(), u.groups = 3;
    refused("groups", df_unet_create(ctx, &u), "4 channels", "3 groups");
    u = small_unet(), u.head_dim = 9;
    refused("head_dim", df_unet_create(ctx, &u), "head_dim 9", "8");
    u = small_unet(), u.down[1] = 7;
    refused("a block", df_unet_create(ctx, &u), "down", "7");
    u = small_unet(), u.in_channels = 64, u.height = u.width = 8192;
    refused("a sample of 2^32 elements", df_unet_create(ctx, &u), "[64,8192,8192]", "2^31");
    u = small_unet(), u.center_input = -3;
    refused("a flag", df_unet_create(ctx, &u), "center_input", "-3");
    u = small_unet(), u.cookie = 0;
    refused("no defaults", df_unet_create(ctx, &u), "df_unet_create", "defaults");
    d.size = 5;
    refused("patches", df_dit_create(ctx, &d), "5", "4 and 6");
    d = small_dit(), d.heads = 3;
    refused("heads", df_dit_create(ctx, &d), "width 8", "3 heads");
}

// ---- as models ----

static df_net *make(int which) {
    df_unet_desc u = small_unet();
    df_dit_desc d = small_dit();
    u.null_class = 1;
    if (which == 1) u.null_class = 0, u.scale_shift = 1, u.down[0] = u.up[1] = DF_UNET_RESNET;
    if (which == 3) d.learn_sigma = 1, d.diffusers = 1;
    return stirred(which < 2 ? df_unet_create(ctx, &u) : df_dit_create(ctx, &d));
}

// A file whose metadata has `lie` in place of `truth`, its header as long as it then is.
static void lying(const df_buffer *file, const char *truth, const char *lie, const char *word, const char *second) {
    size_t old = strlen(truth), size = strlen(lie), at = 8, header = 0;
    unsigned char *bytes = (unsigned char *)malloc(file->size + size);
    for (int i = 7; i >= 0; i--) header = header << 8 | file->data[i];
    while (at + old < file->size && memcmp(file->data + at, truth, old) != 0) at++;
    if (check(at + old < 8 + header, "%s is not in the file", truth)) {
        memcpy(bytes, file->data, at);
        memcpy(bytes + at, lie, size);
        memcpy(bytes + at + size, file->data + at + old, file->size - at - old);
        header += size - old;
        for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)(header >> 8 * i);
        refused(lie, df_net_load(ctx, df_source_memory(bytes, file->size + size - old)), word, second);
    }
    free(bytes);
}

// Conditions narrower than a net's, and files that lie about them or about the shape.
TEST(conditions_are_checked) {
    df_mlp_desc m = df_mlp_defaults();
    df_real x[2] = {0}, few[10] = {0};
    df_sample_desc d = df_sample_defaults();
    df_buffer file = {NULL, 0, 0};
    m.condition = 1000, m.width = 4, m.depth = 0;
    df_net *net = df_mlp_create(ctx, &m);
    df_model model = df_net_model(net);
    d.condition = few, d.condition_stride = 10;
    expect(df_sample(ctx, &model, &d, x, 1) == DF_ERR_SHAPE);
    check(strstr(df_ctx_message(ctx), "1000") != NULL, "%s", df_ctx_message(ctx));
    df_net_free(net);
    net = make(2);
    expect(df_net_save(ctx, net, df_sink_buffer(&file)) == DF_OK);
    lying(&file, "\"condition\":\"0\"", "\"condition\":\"-2\"", "'condition' is not in [0, 2^20]", "df_net_load");
    lying(&file, "\"condition\":\"0\"", "\"condition\":\"-\"", "condition", "numbers");
    lying(&file, "\"shape\":\"1 4 4\"", "\"shape\":\"4 4 1\"", "[4,4,1]", "[1,4,4]");
    lying(&file, "\"shape\":\"1 4 4\"", "\"shape\":\"16\"", "[16]", "[1,4,4]");
    df_buffer_free(ctx, &file);
    df_net_free(net);
}

TEST(rows_and_threads) {
    for (int which = 0; which < 4; which++) {
        df_real all[1024], one[256];
        df_net *net = make(which);
        df_card card = df_card_defaults();
        int width = df_net_dim(net) * (which == 3 ? 2 : 1);
        card.learned = which == 3 ? DF_LEARNED_RANGE : DF_LEARNED_NONE;
        expect(df_net_set_card(ctx, net, &card) == DF_OK);
        expect(answer(ctx, net, 4, 0, all) == DF_OK);
        for (int r = 0; r < 4; r++) {
            expect(answer(ctx, net, 1, r, one) == DF_OK);
            check(memcmp(one, all + r * width, (size_t)width * sizeof *one) == 0,
                  "network %d: row %d differs alone", which, r);
        }
        for (int threads = 2; threads <= 4; threads++) {
            df_real again[1024];
            df_ctx_desc d = df_ctx_defaults();
            d.threads = threads;
            df_ctx *c = df_ctx_create(&d);
            expect(answer(c, net, 4, 0, again) == DF_OK);
            check(memcmp(again, all, (size_t)(4 * width) * sizeof *all) == 0,
                  "network %d: %d threads differ", which, threads);
            df_ctx_free(c);
        }
        df_net_free(net);
    }
}

// -1 is the table's last row where there is one, nothing where there is none.
TEST(no_label) {
    df_unet_desc u = small_unet();
    df_real with[64], row[64], zero[64];
    df_card card = df_card_defaults();
    double t = .5;
    df_real x[64] = {0};
    int none = -1, last = 3;
    x[3] = 1;
    u.null_class = 1;
    df_net *net = stirred(df_unet_create(ctx, &u));
    df_net_set_card(ctx, net, &card);
    df_model m = df_net_model(net);
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, &t, 1, x, NULL, &none, with) == DF_OK);
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, &t, 1, x, NULL, &last, row) == DF_OK);
    same_bits(with, row, 32 * sizeof *row);
    const df_param *table = df_net_param(net, df_net_find(net, "class_embedding.weight"));
    memset(df_net_weights(net) + table->offset, 0, table->size * sizeof(df_real));
    expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, &t, 1, x, NULL, &none, zero) == DF_OK);
    check(memcmp(zero, row, 32 * sizeof *row) != 0, "the row for no label is not read");
    df_net_free(net);
}

// The condition takes the place of the class's embedding: a row of a table, given as it is.
TEST(condition_as_class) {
    df_unet_desc u = small_unet();
    df_real x[64] = {0}, a[64], b[64];
    df_net *table = stirred(df_unet_create(ctx, &u));
    u.class_kind = DF_UNET_CLASS_IDENTITY, u.classes = 0;
    df_net *given = df_unet_create(ctx, &u);
    expect(df_net_condition(given) == 16);
    for (int i = 0; i < df_net_count(given); i++) {
        const df_param *p = df_net_param(given, i);
        const df_param *q = df_net_param(table, df_net_find(table, p->name));
        memcpy(df_net_weights(given) + p->offset, df_net_weights(table) + q->offset, p->size * sizeof *a);
    }
    const df_param *rows = df_net_param(table, df_net_find(table, "class_embedding.weight"));
    df_model m = df_net_model(table), g = df_net_model(given);
    df_sample_desc d = df_sample_defaults();
    int label = 2;
    memcpy(a, x, sizeof x), memcpy(b, x, sizeof x);
    a[5] = b[5] = 1;
    d.steps = 2, d.t_max = .9, d.start = DF_START_GIVEN, d.labels = &label;
    expect(df_sample(ctx, &m, &d, a, 1) == DF_OK);
    d.labels = NULL;
    d.condition = df_net_weights(table) + rows->offset + 2 * 16;
    expect(df_sample(ctx, &g, &d, b, 1) == DF_OK);
    same_bits(a, b, 32 * sizeof *a);
    expect(df_sample(ctx, &m, &d, a, 1) == DF_ERR_UNSUPPORTED);
    df_ctx_clear(ctx);
    df_net_free(table);
    df_net_free(given);
}

// Guidance of the first of three elements: that one guided, the others the labelled model's.
TEST(guided_elements) {
    df_mlp_desc m = df_mlp_defaults();
    df_guidance g = df_guidance_defaults();
    df_real x[3] = {1, -1, 2}, cond[3], bare[3], out[3];
    double t = .5;
    int label = 1, none = -1;
    m.dim = 3, m.width = 8, m.classes = 2;
    df_net *net = df_mlp_create(ctx, &m);
    df_model model = df_net_model(net);
    g.model = &model, g.scale = 4, g.guided = 1;
    df_model guided = df_guidance_model(&g);
    expect(df_model_ask(ctx, &model, DF_ASK_PREDICT, &t, 1, x, NULL, &label, cond) == DF_OK);
    expect(df_model_ask(ctx, &model, DF_ASK_PREDICT, &t, 1, x, NULL, &none, bare) == DF_OK);
    expect(df_model_ask(ctx, &guided, DF_ASK_PREDICT, &t, 1, x, NULL, &label, out) == DF_OK);
    near(out[0], bare[0] + 4 * (cond[0] - bare[0]), 1e-6);
    same_bits(out + 1, cond + 1, 2 * sizeof *out);
    expect((guided.answers & DF_ASK_VJP) == 0);
    for (g.guided = -1; g.guided <= 4; g.guided += 5)
        expect(df_model_ask(ctx, &guided, DF_ASK_PREDICT, &t, 1, x, NULL, &label, out) == DF_ERR_ARGUMENT);
    df_ctx_clear(ctx);
    df_net_free(net);
}

// How created nets begin where libraries have their own ways.
TEST(beginnings) {
    df_dit_desc d = small_dit();
    df_unet_desc u = small_unet();
    double most = 0, square = 0, bound = sqrt(6. / (4 + 384));
    d.width = 384;
    df_net *net = df_dit_create(ctx, &d);
    const df_param *p = df_net_param(net, df_net_find(net, "x_embedder.proj.weight"));
    for (size_t i = 0; i < p->size; i++) most = fmax(most, fabs((double)df_net_weights(net)[p->offset + i]));
    check(most <= bound * 1.000001 && most > .98 * bound, "patches begin within %g, wanted %g", most, bound);
    df_net_free(net);
    u.time = DF_UNET_FOURIER, u.channels[0] = 512, u.channels[1] = 512;
    net = df_unet_create(ctx, &u);
    p = df_net_param(net, df_net_find(net, "time_proj.weight"));
    for (size_t i = 0; i < p->size; i++) square += pow((double)df_net_weights(net)[p->offset + i], 2);
    near(sqrt(square / 512) / 16, 1, .15); // 5 standard deviations
    expect(p->frozen);
    df_net_free(net);
}

// Whole times to rounding; others are refused.
TEST(times_of_a_table) {
    df_unet_desc u = small_unet();
    df_real x[32] = {0}, t[1], *rows;
    int shape[4] = {1, 1, 8, 4}, one = 1;
    u.time = DF_UNET_LEARNED, u.time_rows = 30, u.classes = 0;
    df_net *net = stirred(df_unet_create(ctx, &u));
    df_run run = df_run_defaults(ctx, net);
    rows = NULL;
    for (int k = 0; k < 4; k++) {
        static const double times[4] = {28, 27.9999999, 27.9, 30};
        df_scope mark = df_scope_begin(ctx);
        t[0] = (df_real)times[k];
        df_tensor *y = df_run_net(&run, df_tensor_copy(ctx, 4, shape, x), df_tensor_copy(ctx, 1, &one, t), NULL);
        check((y != NULL) == (k < 2), "time %g", times[k]);
        if (k == 0 && y) rows = (df_real *)malloc(32 * sizeof *rows), memcpy(rows, y->data, 32 * sizeof *rows);
        if (k == 1 && y && rows) same_bits(rows, y->data, 32 * sizeof *rows);
        df_scope_end(ctx, mark, NULL);
        df_ctx_clear(ctx);
    }
    free(rows);
    df_net_free(net);
}

// Derivatives in x: forward and reverse mode against differences.
TEST(derivatives) {
    if (sizeof(df_real) == sizeof(float)) return;
    for (int which = 0; which < 3; which++) {
        df_net *net = make(which);
        df_model m = df_net_model(net);
        int dim = df_net_dim(net), label = 1;
        df_real x[64], v[64], u[64], y[2][64], jvp[64], vjp[64];
        double t = .5, h = 1e-5, forward = 0, reverse = 0;
        for (int i = 0; i < dim; i++)
            x[i] = (df_real)sin(i), v[i] = (df_real)cos(3 * i), u[i] = (df_real)cos(2 * i + 1);
        expect(df_model_ask(ctx, &m, DF_ASK_JVP, &t, 1, x, v, &label, jvp) == DF_OK);
        expect(df_model_ask(ctx, &m, DF_ASK_VJP, &t, 1, x, u, &label, vjp) == DF_OK);
        for (int side = 0; side < 2; side++) {
            df_real moved[64];
            for (int i = 0; i < dim; i++) moved[i] = x[i] + (df_real)(side ? h : -h) * v[i];
            expect(df_model_ask(ctx, &m, DF_ASK_PREDICT, &t, 1, moved, NULL, &label, y[side]) == DF_OK);
        }
        for (int i = 0; i < dim; i++) {
            near(jvp[i], (y[1][i] - y[0][i]) / (2 * h), 1e-6);
            forward += (double)(u[i] * jvp[i]), reverse += (double)(vjp[i] * v[i]);
        }
        near(forward, reverse, 1e-11);
        df_net_free(net);
    }
}

// ---- checkpoints and folders ----

TEST(written_and_read) {
    for (int which = 0; which < 4; which++) {
        df_net *net = make(which), *again, *folder;
        df_buffer buffer = {NULL, 0, 0};
        df_real a[1024], b[1024];
        df_card card = df_card_defaults();
        double betas[3] = {.1, .2, .3};
        char path[64];
        int width = df_net_dim(net) * (which == 3 ? 2 : 1);
        expect(df_process_table(ctx, betas, 3, &card.process) == DF_OK);
        card.prediction = DF_V, card.time = df_time_index(3);
        card.learned = which == 3 ? DF_LEARNED_RANGE : DF_LEARNED_NONE;
        expect(df_net_set_card(ctx, net, &card) == DF_OK);
        expect(df_net_save(ctx, net, df_sink_buffer(&buffer)) == DF_OK);
        again = df_net_load(ctx, df_source_memory(buffer.data, buffer.size));
        df_buffer_free(ctx, &buffer);
        snprintf(path, sizeof path, "build/test_folder_%d_%s", which, df_precision());
        check(df_net_save_folder(ctx, net, path) == DF_OK, "%s", df_ctx_message(ctx));
        folder = df_net_load_folder(ctx, path);
        if (!check(again && folder, "network %d: %s", which, df_ctx_message(ctx))) continue;
        expect(answer(ctx, net, 4, 0, a) == DF_OK && answer(ctx, again, 4, 0, b) == DF_OK);
        check(memcmp(a, b, (size_t)(4 * width) * sizeof *a) == 0, "network %d: other answers", which);
        expect(df_net_card(folder)->prediction == DF_V && df_net_card(folder)->process.table_size == 3);
        near(df_net_card(folder)->process.log_abar[2], df_net_card(net)->process.log_abar[2], 1e-14);
        // a folder holds float32
        expect(answer(ctx, folder, 4, 0, b) == DF_OK);
        near_all(b, a, 4 * width, 1e-5);
        df_net_free(net), df_net_free(again), df_net_free(folder);
    }
}

// A card that no scheduler has, and scaling, come back; what could not is refused.
TEST(cards_of_our_own) {
    df_net *net = make(0), *again;
    double mean = 5, scale = 7, each[2][64];
    df_card card = df_card_defaults();
    card.process = df_process_edm(80), card.prediction = DF_EDM_F, card.time = df_time_log_sigma(.25);
    card.input_sigma_data = .5;
    expect(df_net_set_card(ctx, net, &card) == DF_OK && df_net_set_scaling(ctx, net, 1, &mean, &scale) == DF_OK);
    expect(df_net_save_folder(ctx, net, "build/test_folder_card") == DF_OK);
    again = df_net_load_folder(ctx, "build/test_folder_card");
    if (check(again != NULL, "%s", df_ctx_message(ctx))) {
        df_model m = df_net_model(again);
        expect(m.process.kind == DF_PROCESS_EDM && m.prediction == DF_EDM_F && m.time.kind == DF_TIME_LOG_SIGMA);
        near(m.input_sigma_data, .5, 0);
        expect(m.scaling_size == 1);
        near(m.mean[0], 5, 0), near(m.scale[0], 7, 0);
    }
    df_net_free(again);
    for (int i = 0; i < 64; i++) each[0][i] = i, each[1][i] = 1 + i;
    expect(df_net_set_scaling(ctx, net, 32, each[0], each[1]) == DF_OK);
    expect(df_net_save_folder(ctx, net, "build/test_folder_card") == DF_ERR_UNSUPPORTED);
    expect(strstr(df_ctx_message(ctx), "each dimension") != NULL);
    df_net_free(net);
    df_dit_desc d = small_dit();
    d.diffusers = 1, d.null_class = 0;
    net = df_dit_create(ctx, &d);
    expect(df_net_save_folder(ctx, net, "build/test_folder_card") == DF_ERR_UNSUPPORTED);
    df_net_free(net);
    df_ctx_clear(ctx);
}

// A text as config.json, with no weights.
static void config(const char *text, const char *word, const char *second) {
    df_net *net = df_net_load_config(ctx, df_source_memory(text, strlen(text)), df_source_memory("", 0), NULL);
    refused(text, net, word, second);
}
#define UNET "{\"_class_name\":\"UNet2DModel\","
TEST(configurations) {
    config(UNET "\"act_fn\":\"gelu\"}", "act_fn", "\"gelu\"");
    config(UNET "\"norm_eps\":null}", "norm_eps", "null");
    config(UNET "\"sprockets\":[1,{\"a\":2}]}", "sprockets", "[1,{\"a\":2}]");
    config(UNET "\"down_block_types\":[\"SkipDownBlock2D\"]}", "down_block_types", "SkipDownBlock2D");
    config(UNET "\"layers_per_block\":1.5}", "layers_per_block", "1.5");
    config(UNET "\"layers_per_block\":1e99}", "layers_per_block", "1e99");
    config(UNET "\"freq_shift\":1,\"freq_shift\":1}", "freq_shift", "twice");
    config(UNET "\"block_out_channels\":[32,64],\"up_block_types\":[\"UpBlock2D\"]}", "up_block_types", "1");
    config(UNET "\"block_out_channels\":[32,32,32,32,32,32,32,32,32]}", "block_out_channels", "[32");
    config(UNET "\"sample_size\":[8,9,10]}", "sample_size", "[8,9,10]");
    config(UNET "\"sample_size\":30}", "30", "32");
    config(UNET "\"sample_size\":32} x", "follows", "JSON");
    config("{\"_class_name\":\"UNet2DConditionModel\"}", "_class_name", "UNet2DConditionModel");
    config("{\"hidden_size\":96,\"num_heads\":5}", "96", "5 heads");
    config("{\"depth\":28,\"mlp_ratio\":-1}", "mlp_ratio", "-1");
    config("{\"_class_name\":\"DiTTransformer2DModel\",\"norm_type\":\"ada_norm\"}", "norm_type", "ada_norm");
    config("{\"_class_name\":\"DiTTransformer2DModel\",\"out_channels\":5}", "out_channels", "5");
    config("[]", "JSON", "'{'");
    config("", "0 bytes", "configuration");
    static char vast[(1 << 20) + 1];
    memset(vast, ' ', sizeof vast);
    refused("a vast configuration", df_net_load_config(ctx, df_source_memory(vast, sizeof vast), df_source_memory("", 0),
                                                       NULL), "more than 1048576 bytes", "(memory)");
    config(UNET "\"norm_eps\":1e-5,\"dropout\":0,\"sample_size\":[65536,2]}", "height", "65536");
    // keys that say nothing are no reason to refuse: the missing weights are
    config(UNET "\"_name_or_path\":\"x\",\"decay\":null,\"fancy\":false}", "safetensors", "(memory)");
    static char deep[200];
    memset(deep, '[', 150);
    memcpy(deep, UNET "\"a\":", strlen(UNET) + 4);
    config(deep, "deep", "JSON");
}

TEST(schedulers) {
    static const char *const texts[] = {"{\"beta_schedule\":\"linear\",\"beta_start\":2}", "{\"num_train_timesteps\":0}",
        "{\"prediction_type\":\"flow\"}", "{\"num_train_timesteps\":1e9}", "{\"trained_betas\":[0.1,2]}",
        "{\"_class_name\":\"FlowMatchEulerDiscreteScheduler\"}", "{\"_class_name\":\"ScoreSdeVeScheduler\"}"};
    static const char *const words[] = {"beta", "num_train_timesteps", "prediction_type", "num_train_timesteps",
                                        "trained_betas", "FlowMatch", "ScoreSdeVe"};
    df_net *net = make(0); // a table's card is its scheduler's to say
    df_buffer text = {NULL, 0, 0}, weights = {NULL, 0, 0};
    double betas[3] = {.1, .2, .3};
    df_card card = df_card_defaults();
    expect(df_process_table(ctx, betas, 3, &card.process) == DF_OK);
    card.prediction = DF_EPS, card.time = df_time_index(3);
    expect(df_net_set_card(ctx, net, &card) == DF_OK);
    df_scope mark = df_scope_begin(ctx);
    expect(dfi_net_config(ctx, net, &text) == DF_OK);
    expect(dfi_net_export(ctx, net, DFI_NAMES_OWN, df_sink_buffer(&weights)) == DF_OK);
    for (int i = 0; i < 7; i++) {
        df_source s = df_source_memory(texts[i], strlen(texts[i]));
        refused(texts[i], df_net_load_config(ctx, df_source_memory(text.data, text.size),
                                             df_source_memory(weights.data, weights.size), &s), words[i], "");
    }
    df_scope_end(ctx, mark, NULL);
    df_buffer_free(ctx, &text), df_buffer_free(ctx, &weights);
    df_net_free(net);
}

// Weights that do not fit: each tensor missing, renamed, of another shape or type.
TEST(hostile_weights) {
    for (int which = 0; which < 4; which += 3) {
        df_net *net = make(which);
        df_buffer text = {NULL, 0, 0}, weights = {NULL, 0, 0};
        df_scope mark = df_scope_begin(ctx);
        expect(dfi_net_config(ctx, net, &text) == DF_OK);
        expect(dfi_net_export(ctx, net, which ? DFI_NAMES_DIFFUSERS : DFI_NAMES_OWN,
                              df_sink_buffer(&weights)) == DF_OK);
        df_scope_end(ctx, mark, NULL);
        for (size_t cut = 0; cut < weights.size; cut += cut < 200 ? 1 : 97)
            refused("cut", df_net_load_config(ctx, df_source_memory(text.data, text.size),
                                              df_source_memory(weights.data, cut), NULL), "(memory)", "");
        for (size_t cut = 0; cut < text.size - 2; cut++)
            refused("cut", df_net_load_config(ctx, df_source_memory(text.data, cut),
                                              df_source_memory(weights.data, weights.size), NULL), "(memory)", "");
        df_safetensors *f = df_safetensors_open(ctx, df_source_memory(weights.data, weights.size));
        for (int i = 0; i < df_safetensors_count(f); i++) {
            const char *name = df_safetensors_at(f, i)->name;
            char *bytes = (char *)malloc(weights.size), *at = NULL;
            memcpy(bytes, weights.data, weights.size);
            for (size_t k = 8; k + strlen(name) + 2 < weights.size && !at; k++)
                if (bytes[k] == '"' && memcmp(bytes + k + 1, name, strlen(name)) == 0 &&
                    bytes[k + 1 + strlen(name)] == '"') at = bytes + k + 1;
            at[0] = 'Z';
            refused(name, df_net_load_config(ctx, df_source_memory(text.data, text.size),
                                             df_source_memory(bytes, weights.size), NULL), name + 1, "");
            free(bytes);
        }
        df_safetensors_close(f);
        df_buffer_free(ctx, &text), df_buffer_free(ctx, &weights);
        df_net_free(net);
    }
}

// diffusers repeats the embeddings in every block: so are they written; others are refused.
TEST(repeated_embeddings) {
    static const char *const parts[5] = {"timestep_embedder.linear_1.weight", "timestep_embedder.linear_1.bias",
        "timestep_embedder.linear_2.weight", "timestep_embedder.linear_2.bias",
        "class_embedder.embedding_table.weight"};
    df_net *net = make(3);
    df_buffer text = {NULL, 0, 0}, weights = {NULL, 0, 0};
    char key[200];
    df_scope mark = df_scope_begin(ctx);
    expect(dfi_net_config(ctx, net, &text) == DF_OK);
    expect(dfi_net_export(ctx, net, DFI_NAMES_DIFFUSERS, df_sink_buffer(&weights)) == DF_OK);
    df_scope_end(ctx, mark, NULL);
    for (int wrong = -1; wrong < 5; wrong++) {
        df_safetensors *f = df_safetensors_open(ctx, df_source_memory(weights.data, weights.size));
        snprintf(key, sizeof key, "transformer_blocks.1.norm1.emb.%s", parts[wrong < 0 ? 0 : wrong]);
        const df_file_tensor *t = df_safetensors_find(f, key);
        if (!check(t != NULL, "%s is not written", key)) continue;
        size_t at = (size_t)(t->bytes - f->bytes.data) + 4 * (t->count - 1);
        df_safetensors_close(f);
        weights.data[at] ^= wrong < 0 ? 0 : 1;
        df_net *again = df_net_load_config(ctx, df_source_memory(text.data, text.size),
                                           df_source_memory(weights.data, weights.size), NULL);
        weights.data[at] ^= wrong < 0 ? 0 : 1;
        if (wrong >= 0) refused(key, again, key, "block 0");
        else check(again != NULL, "%s", df_ctx_message(ctx));
        if (wrong < 0) df_net_free(again);
    }
    df_buffer_free(ctx, &text), df_buffer_free(ctx, &weights);
    df_net_free(net);
}

// Every allocation fails in turn: an error that says memory, and nothing left behind.
TEST(failing_memory) {
    static const char *const kinds[3] = {"unet", "dit", "diffusers"};
    df_buffer text[3] = {{NULL, 0, 0}, {NULL, 0, 0}, {NULL, 0, 0}}, weights[3] = {{NULL, 0, 0}, {NULL, 0, 0}, {NULL, 0, 0}};
    df_scope mark = df_scope_begin(ctx);
    for (int i = 0; i < 3; i++) {
        df_net *net = make(i + (i > 0));
        expect(dfi_net_config(ctx, net, &text[i]) == DF_OK);
        expect(dfi_net_export(ctx, net, i == 2 ? DFI_NAMES_DIFFUSERS : DFI_NAMES_OWN, df_sink_buffer(&weights[i])) ==
               DF_OK);
        df_net_free(net);
    }
    df_scope_end(ctx, mark, NULL);
    for (int i = 0; i < 3; i++) {
        int done = 0;
        for (long fail = 2; !done && fail < 2000; fail += fail < 40 ? 1 : 7) {
            counter count = {0, 0, fail};
            df_real y[1024];
            df_ctx *c = new_ctx(1, &count);
            df_source s = df_source_memory("{\"trained_betas\":[0.1,0.2,0.3]}", 31);
            df_net *net = df_net_load_config(c, df_source_memory(text[i].data, text[i].size),
                                             df_source_memory(weights[i].data, weights[i].size), &s);
            int fine = net != NULL && answer(c, net, 2, 1, y) == DF_OK && df_net_save_folder(c, net, "build/test_memory") == DF_OK;
            done = count.calls < fail;
            check(fine == done, "%s: allocation %ld of %ld: %s", kinds[i], fail, count.calls, df_ctx_message(c));
            check(fine || df_ctx_error(c) == DF_ERR_MEMORY, "%s: allocation %ld: %s", kinds[i], fail, df_ctx_message(c));
            df_net_free(net);
            df_ctx_free(c);
            check(count.live == 0, "%s: allocation %ld: %ld bytes are left", kinds[i], fail, count.live);
        }
        check(done, "%s: never enough memory", kinds[i]);
        df_buffer_free(ctx, &text[i]), df_buffer_free(ctx, &weights[i]);
    }
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    ctx = df_ctx_create(NULL);
    RUN(benchmark_networks);
    RUN(wrong_descriptors);
    RUN(conditions_are_checked);
    RUN(rows_and_threads);
    RUN(no_label);
    RUN(condition_as_class);
    RUN(derivatives);
    RUN(guided_elements);
    RUN(beginnings);
    RUN(times_of_a_table);
    RUN(written_and_read);
    RUN(cards_of_our_own);
    RUN(configurations);
    RUN(schedulers);
    RUN(hostile_weights);
    RUN(repeated_embeddings);
    RUN(failing_memory);
    df_ctx_free(ctx);
    return test_end();
}
