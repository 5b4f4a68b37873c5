// 01_points: learn a distribution of points, sample from it, measure how far the samples are.
//
//   You learn    the whole of a diffusion model in one page: a process (rectified flow), a
//                network that predicts its velocity, a trainer, a sampler, a checkpoint.
//   It takes     about 15 seconds on two cores with the default settings.
//   Out come     points.png (data, samples, the samples' trajectories), points.safetensors,
//                and the distance of samples to held-out data beside its floor: the same
//                distance between two draws of the data. Exits 1 if something failed.
//
//   build/01_points [--data moons|8gaussians|checkerboard|swissroll|FILE.csv] [--steps N]
//       [--method ddim] [--sample-steps N] [--n SAMPLES] [--seed N] [--threads N]
//       [--load FILE] [--save FILE] [--picture FILE] [--csv FILE]
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "data.h"
#include "draw.h"
#include "options.h"

enum { TRACKED = 160 };      // trajectories drawn

static progress_bar bar;
static int on_train(void *user, const df_train_info *info) {
    (void)user;
    progress(&bar, (long)info->step, (long)info->steps, "loss", info->loss);
    return 0;
}

// Keeps where the first samples stand (step 0: the noise they start from), in the data's
// units: path [TRACKED, steps + 1, 2].
typedef struct tracks { df_real *path; int steps; const df_model *model; } tracks;
static int on_sample(void *user, const df_step_info *info) {
    const tracks *t = (const tracks *)user;
    const df_model *m = t->model;
    for (int i = 0; i < TRACKED && i < info->n; i++)
        for (int k = 0; k < 2 && k < m->dim; k++) {
            int j = m->scaling_size == 1 ? 0 : k;
            t->path[(i * (t->steps + 1) + info->step) * 2 + k] =
                (df_real)(m->mean[j] + m->scale[j] * (double)info->x[i * m->dim + k]);
        }
    return 0;
}
static int failed(df_ctx *ctx) {
    fprintf(stderr, "%s\n", df_ctx_message(ctx));
    return 1;
}

// Data from a name or a file, cut into a part to learn from and a part held out.
static int load_data(data_set *d, const char *name, uint64_t seed, int *train) {
    int result = data_points(d, name, 40000, seed);
    if (result == 1) result = data_csv(d, name);
    if (result != 0) return 1;
    data_shuffle(d, seed);
    *train = d->n - d->n / 2;
    return 0;
}

static df_net *train(df_ctx *ctx, const options *o, const data_set *d, int n) {
    df_mlp_desc m = df_mlp_defaults();
    df_train_desc t = df_train_defaults();
    m.dim = d->dim, m.width = 128, m.depth = 3, m.seed = o->seed;
    t.steps = o->steps, t.batch = 512, t.learning_rate = 2e-3, t.seed = o->seed;
    t.on_step = on_train;
    df_net *net = df_mlp_create(ctx, &m);
    df_trainer *trainer = net ? df_trainer_create(ctx, net, d->x, n, NULL, &t) : NULL;
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

static void picture(const options *o, const data_set *d, const df_real *x, const tracks *t) {
    draw_canvas c;
    double range[4];
    int shown = o->n < 6000 ? o->n : 6000, half = d->n < shown ? d->n : shown;
    if (draw_open(&c, 1320, 460) != 0) return;
    draw_range(d->x, half, d->dim, 1, range);
    draw_panel a = draw_frame(&c, 10, 10, 420, 440, "data", range, 5);
    draw_scatter(&a, d->x, half, d->dim, 1.3, draw_palette(0), 0.5);
    draw_panel b = draw_frame(&c, 450, 10, 420, 440, "samples", range, 5);
    draw_scatter(&b, x, shown, d->dim, 1.3, draw_palette(1), 0.5);
    draw_panel p = draw_frame(&c, 890, 10, 420, 440, "trajectories, noise to data", range, 5);
    for (int i = 0; i < TRACKED && i < o->n; i++) {
        const df_real *path = t->path + (size_t)i * (size_t)(t->steps + 1) * 2;
        draw_polyline(&p, path, t->steps + 1, 2, 1, draw_palette(1), 0.35);
        draw_scatter(&p, path, 1, 2, 1.6, DRAW_TEXT, 0.7);
        draw_scatter(&p, path + 2 * t->steps, 1, 2, 1.8, draw_palette(0), 0.9);
    }
    draw_save(&c, o->picture);
    draw_close(&c);
}

static int sample(df_ctx *ctx, const options *o, const data_set *d, int n, const df_net *net) {
    df_model model = df_net_model(net);
    df_sample_desc s = df_sample_defaults();
    tracks t = { NULL, o->sample_steps, &model };
    double distance = 0, floor = 0;
    int held = d->n - n, result = 1, compare = o->n < held ? o->n : held;
    const df_real *fresh = d->x + (size_t)n * (size_t)d->dim;
    df_real *x = (df_real *)malloc((size_t)o->n * (size_t)d->dim * sizeof *x);
    t.path = (df_real *)calloc((size_t)TRACKED * (size_t)(t.steps + 1) * 2, sizeof *x);
    s.method = o->method, s.steps = o->sample_steps, s.seed = o->seed + 1;
    if (!df_sampler_find(ctx, o->method)->from_alpha0) s.t_max = 0.999;   // flow: alpha(1) = 0
    s.on_step = on_sample, s.user = &t;
    if (model.dim != d->dim)
        fprintf(stderr, "%s: makes points of %d numbers, the data has %d\n", o->load, model.dim,
                d->dim);
    else if (x == NULL || t.path == NULL)
        fprintf(stderr, "01_points: no memory for %d samples\n", o->n);
    else if (df_sample(ctx, &model, &s, x, o->n) != DF_OK ||
             df_sliced_wasserstein(ctx, x, compare, fresh, held, d->dim, 200, 1, &distance) ||
             df_sliced_wasserstein(ctx, d->x, compare, fresh, held, d->dim, 200, 1, &floor))
        failed(ctx);
    else result = 0;
    if (result == 0) {
        printf("%d samples by %s in %d steps: sliced W2 to %d held-out points %.4f (between two"
               " draws of the data: %.4f)\n", o->n, s.method, s.steps, held, distance, floor);
        picture(o, d, x, &t);
        if (o->csv) result = options_csv(o->csv, x, o->n, d->dim);
    }
    free(x);
    free(t.path);
    return result;
}

int main(int argc, char **argv) {
    options o = options_defaults(argv[0], "points", "moons", 6000, 64, 20000);
    data_set d;
    df_ctx_desc c = df_ctx_defaults();
    int n = 0, result = 1;
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    if (load_data(&d, o.data, o.seed, &n) != 0) return 1;
    c.threads = o.threads;
    df_ctx *ctx = df_ctx_create(&c);
    if (ctx == NULL) return data_fail("01_points", "no memory") != 0;
    printf("%s: %d points of %d numbers\n", o.data, d.n, d.dim);
    df_net *net = NULL;
    if (df_sampler_find(ctx, o.method) != NULL)      // before the training, not after it
        net = o.load ? df_net_load(ctx, df_source_path(o.load)) : train(ctx, &o, &d, n);
    result = net != NULL ? sample(ctx, &o, &d, n, net) : failed(ctx);
    df_net_free(net);
    df_ctx_free(ctx);
    data_free(&d);
    return result;
}
