// 02_images: learn a distribution of small grey images, sample new ones.
//
//   You learn    that images are points of many dimensions: the program is 01_points over
//                again; what it saves, it can load; labels, and classifier-free guidance.
//   It takes     one to two minutes on two cores with the embedded sprites.
//   Out come     images.png (data above, samples below), images.safetensors, and the distance
//                of samples to held-out images beside its floor. Exits 1 if something failed.
//
//   build/02_images [FILE | -] [--steps N] [--method ddim] [--sample-steps N] [--n SAMPLES]
//       [--seed N] [--threads N] [--load FILE] [--save FILE] [--picture FILE]
//   FILE is an IDX file of images (MNIST's format); from a compressed one:
//   zcat train-images-idx3-ubyte.gz | build/02_images -
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "data.h"
#include "draw.h"
#include "options.h"

enum { COLUMNS = 20, ROWS = 5, SIDE = 16, MOST = 60000 };
static const double guidance_scale = 1.5;

static progress_bar bar;
static int on_train(void *user, const df_train_info *info) {
    (void)user;
    progress(&bar, (long)info->step, (long)info->steps, "loss", info->loss);
    return 0;
}
static int on_sample(void *user, const df_step_info *info) {
    (void)user;
    progress(&bar, info->step, info->steps, "", (double)NAN);
    return 0;
}

static int failed(df_ctx *ctx) {
    fprintf(stderr, "%s\n", df_ctx_message(ctx));
    return 1;
}

static df_net *train(df_ctx *ctx, const options *o, const data_set *d, int n) {
    df_mlp_desc m = df_mlp_defaults();
    df_train_desc t = df_train_defaults();
    m.dim = d->dim, m.width = 512, m.depth = 4, m.seed = o->seed, m.classes = d->classes;
    t.steps = o->steps, t.batch = 256, t.seed = o->seed;
    t.label_dropout = d->classes > 0 ? 0.1 : 0;
    t.card.prediction = DF_X0;               // pixels: the picture is easier than the noise
    t.weighting = DF_WEIGHT_MIN_SNR;
    t.on_step = on_train, t.report = 20;
    df_net *net = df_mlp_create(ctx, &m);
    df_trainer *trainer = net ? df_trainer_create(ctx, net, d->x, n, d->labels, &t) : NULL;
    bar = progress_begin("training");
    int ok = trainer != NULL && df_trainer_run(trainer, 0) == DF_OK;
    df_trainer_free(trainer);
    if (ok && df_net_save(ctx, net, df_sink_path(o->save)) == DF_OK) {
        printf("wrote %s\n", o->save);
        return net;
    }
    df_net_free(net);
    return NULL;
}

static void picture(const options *o, const data_set *d, const df_real *x) {
    draw_canvas c;
    int scale = d->w < 48 ? 48 / d->w : 1, shown = COLUMNS * ROWS;
    int high = ROWS * (d->h * scale + 3), wide = COLUMNS * (d->w * scale + 3);
    if (draw_open(&c, wide + 33, 2 * high + 96) != 0) return;
    draw_text(&c, 18, 20, "data", 1.15 * c.text, 0, 1.4, DRAW_INK);
    draw_images(&c, 18, 38, d->x, shown < d->n ? shown : d->n, 1, d->h, d->w, COLUMNS, scale,
                3, -1, 1);
    draw_text(&c, 18, high + 62, "samples", 1.15 * c.text, 0, 1.4, DRAW_INK);
    draw_images(&c, 18, high + 80, x, shown < o->n ? shown : o->n, 1, d->h, d->w, COLUMNS,
                scale, 3, -1, 1);
    draw_save(&c, o->picture);
    draw_close(&c);
}

static int sample(df_ctx *ctx, const options *o, const data_set *d, int n, const df_net *net) {
    df_model model = df_net_model(net), guided;
    df_guidance guidance = { &model, NULL, guidance_scale, 0 };
    df_sample_desc s = df_sample_defaults();
    double distance = 0, floor = 0;
    int held = d->n - n, result = 1, compare = o->n < held ? o->n : held;
    const df_real *fresh = d->x + (size_t)n * (size_t)d->dim;
    df_real *x = (df_real *)malloc((size_t)o->n * (size_t)d->dim * sizeof *x);
    int *labels = (int *)malloc((size_t)o->n * sizeof *labels), classes = df_net_classes(net);
    guided = classes > 0 ? df_guidance_model(&guidance) : model;
    for (int i = 0; labels != NULL && i < o->n; i++) labels[i] = classes ? i % classes : -1;
    s.method = o->method, s.steps = o->sample_steps, s.seed = o->seed + 1;
    if (!df_sampler_find(ctx, o->method)->from_alpha0) s.t_max = 0.999;   // flow: alpha(1) = 0
    s.labels = labels, s.on_step = on_sample;
    bar = progress_begin("sampling");
    if (model.dim != d->dim)
        fprintf(stderr, "%s: makes images of %d pixels, the data has %d\n", o->load, model.dim,
                d->dim);
    else if (x == NULL || labels == NULL)
        fprintf(stderr, "02_images: no memory for %d samples\n", o->n);
    else if (df_sample(ctx, &guided, &s, x, o->n) != DF_OK ||
             df_sliced_wasserstein(ctx, x, compare, fresh, held, d->dim, 200, 1, &distance) ||
             df_sliced_wasserstein(ctx, d->x, compare, fresh, held, d->dim, 200, 1, &floor))
        failed(ctx);
    else result = 0;
    if (result == 0) {
        printf("%d samples by %s in %d steps: sliced W2 to %d held-out images %.4f (between two"
               " draws of the data: %.4f)\n", o->n, s.method, s.steps, held, distance, floor);
        picture(o, d, x);
        if (o->csv) result = options_csv(o->csv, x, o->n, d->dim);
    }
    free(x);
    free(labels);
    return result;
}

int main(int argc, char **argv) {
    options o = options_defaults(argv[0], "images", "sprites", 3000, 50, 500);
    data_set d;
    df_ctx_desc c = df_ctx_defaults();
    int result = options_read(&o, argc, argv);
    if (result != 0) return o.help ? 0 : 2;
    if (strcmp(o.data, "sprites") == 0) result = data_sprites(&d, 20000, SIDE, o.seed);
    else result = data_idx(&d, o.data, MOST);
    if (result != 0) return 1;
    data_shuffle(&d, o.seed);
    c.threads = o.threads;
    df_ctx *ctx = df_ctx_create(&c);
    if (ctx == NULL) return data_fail("02_images", "no memory") != 0;
    int n = d.n - d.n / 10;
    printf("%s: %d images of %d x %d\n", o.data, d.n, d.h, d.w);
    df_net *net = NULL;
    if (df_sampler_find(ctx, o.method) != NULL)      // before the training, not after it
        net = o.load ? df_net_load(ctx, df_source_path(o.load)) : train(ctx, &o, &d, n);
    result = net != NULL ? sample(ctx, &o, &d, n, net) : failed(ctx);
    df_net_free(net);
    df_ctx_free(ctx);
    data_free(&d);
    return result;
}
