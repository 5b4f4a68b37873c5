// train_images.h: what 02_images and its like share: a network of three kinds for images, a
// training run that can be stopped and taken up again, sheets of samples. Include it after
// diffusion.h, data.h, draw.h, images.h, options.h.
#ifndef TRAIN_IMAGES_H
#define TRAIN_IMAGES_H
#include <signal.h>

// The command line beyond options.h.
typedef struct image_options {
    const char *net, *labels, *shape, *predict, *log, *checkpoint;
    int width, levels, batch, rows, flip, resume, checkpoint_every, grid_every;
    double rate, ema, dropout, guidance;
    char default_checkpoint[512];
    option_own own[19];
} image_options;

static inline void image_options_defaults(image_options *i, options *o) {
    const option_own own[] = {
        OPTION_TEXT("--labels", "FILE", "an IDX file of labels", &i->labels),
        OPTION_TEXT("--shape", "C,H,W", "of raw floats; to which a folder's pictures are cut, "
                    "else 3,32,32", &i->shape),
        OPTION_FLAG("--flip", "mirror images, or do not, by chance", &i->flip),
        OPTION_TEXT("--net", "NAME", "unet, dit or mlp", &i->net),
        OPTION_WHOLE("--width", "N", "its channels: unet N, 2N, 2N; dit 4N; mlp 16N", &i->width,
                     8, 1024),
        OPTION_WHOLE("--levels", "N", "sizes of a unet, each half the last", &i->levels, 1, 8),
        OPTION_TEXT("--predict", "NAME", "x_0, velocity, eps, v; or as suits the net",
                    &i->predict),
        OPTION_WHOLE("--batch", "N", "images of one step", &i->batch, 1, 65536),
        OPTION_WHOLE("--rows", "N", "images at once, a batch is the sum of such parts; 0: all",
                     &i->rows, 0, 65536),
        OPTION_REAL("--rate", "R", "learning rate", &i->rate, 1e-8, 1),
        OPTION_REAL("--ema", "D", "decay of the averaged weights; 0: none", &i->ema, 0, 0.99999),
        OPTION_REAL("--dropout", "P", "part of the labels left out, for guidance", &i->dropout, 0,
                    1),
        OPTION_REAL("--guidance", "S", "of classifier-free guidance; 1: off", &i->guidance, -100,
                    100),
        OPTION_TEXT("--checkpoint", "FILE", "where the trainer's state goes", &i->checkpoint),
        OPTION_WHOLE("--checkpoint-every", "N", "steps; 0: only when stopped by Ctrl-C",
                     &i->checkpoint_every, 0, 1e9),
        OPTION_FLAG("--resume", "go on from the trainer's state", &i->resume),
        OPTION_WHOLE("--grid-every", "N", "steps between sheets of samples; 0: none",
                     &i->grid_every, 0, 1e9),
        OPTION_TEXT("--log", "FILE", "loss, rates and speed as CSV", &i->log),
    };
    memset(i, 0, sizeof *i);
    i->net = "unet", i->width = 16, i->levels = 3, i->batch = 32;
    i->rate = 2e-3, i->ema = 0.999, i->dropout = 0.1, i->guidance = 1.5;
    memcpy(i->own, own, sizeof own);
    o->own = i->own, o->owns = (int)(sizeof own / sizeof *own);
}

static inline df_prediction image_prediction(const char *name) {
    int k = 0;
    while (k < DF_PREDICTION_COUNT && strcmp(name, df_prediction_name((df_prediction)k))) k++;
    return (df_prediction)k;
}

// Names that depend on others; what is wrong is said before the work, not after it.
static inline int image_options_check(image_options *i, const options *o) {
    options_beside(o->save, ".resume", i->default_checkpoint, sizeof i->default_checkpoint);
    if (i->checkpoint == NULL) i->checkpoint = i->default_checkpoint;
    if (strcmp(i->net, "unet") && strcmp(i->net, "dit") && strcmp(i->net, "mlp")) {
        fprintf(stderr, "--net %s: unet, dit or mlp is needed\n", i->net);
        return -1;
    }
    if (i->predict && image_prediction(i->predict) == DF_PREDICTION_COUNT) {
        fprintf(stderr, "--predict %s: x_0, velocity, eps or v is needed\n", i->predict);
        return -1;
    }
    if (o->load != NULL) return 0;
    if (!i->resume && options_writable(i->checkpoint) != 0) return -1;
    return i->log ? options_writable(i->log) : 0;
}

// The images named, shuffled: sprites of side x side, or at most `most` from files.
static inline int image_data(data_set *d, const options *o, const image_options *i, int side,
                             int most) {
    int shape[3], result;
    if (i->shape && images_shape(i->shape, shape) != 0) return -1;
    if (strcmp(o->data, "sprites") == 0) result = data_sprites(d, 20000, side, o->seed);
    else result = images_read(d, o->data, i->labels, i->shape ? shape : NULL, most);
    if (result != 0) return -1;
    data_shuffle(d, o->seed);
    printf("%s: %d images, %d x %d x %d, %d classes\n", o->data, d->n, d->c, d->h, d->w,
           d->classes);
    return 0;
}

// A net that was loaded must be one for such images. 0, or -1 and a sentence.
static inline int image_fits(const options *o, const data_set *d, const df_net *net) {
    if (df_net_dim(net) == d->dim) return 0;
    fprintf(stderr, "%s: makes images of %d numbers, the data has %d\n", o->load,
            df_net_dim(net), d->dim);
    return -1;
}

// ---- Ctrl-C -------------------------------------------------------------------------------

static df_ctx *image_cancelled;                  // whom it asks to stop
static inline void image_on_signal(int number) {
    df_ctx_cancel(image_cancelled);
    signal(number, SIG_DFL);                     // a second one ends the program at once
}
static inline void image_catch(df_ctx *ctx) {
    image_cancelled = ctx;
    signal(SIGINT, image_on_signal);
    signal(SIGTERM, image_on_signal);
}

// ---- the network -----------------------------------------------------------------------------

// UNet and DiT count time from 0 to 1000, as their sinusoids want.
static inline df_net *image_net(df_ctx *ctx, const image_options *i, const data_set *d,
                                uint64_t seed) {
    if (strcmp(i->net, "unet") == 0) {
        df_unet_desc u = df_unet_defaults();
        u.in_channels = u.out_channels = d->c, u.height = d->h, u.width = d->w;
        u.levels = i->levels, u.layers = 1, u.groups = 8, u.head_dim = 0;
        for (int k = 0; k < u.levels; k++) {     // attention at the coarsest size alone
            int last = k == u.levels - 1;
            u.channels[k] = i->width * (k ? 2 : 1);
            u.down[k] = last ? DF_UNET_ATTENTION : DF_UNET_PLAIN;
            u.up[u.levels - 1 - k] = u.down[k];
        }
        u.classes = d->classes, u.null_class = d->classes > 0, u.seed = seed;
        return df_unet_create(ctx, &u);
    }
    if (strcmp(i->net, "dit") == 0) {
        df_dit_desc t = df_dit_defaults();
        t.in_channels = d->c, t.size = d->h == d->w ? d->h : 0;
        t.patch = d->h % 4 == 0 && d->h > 16 ? 4 : 2, t.learn_sigma = 0;
        t.width = 4 * i->width, t.depth = 4, t.heads = 4;
        t.classes = d->classes > 0 ? d->classes : 1, t.seed = seed;
        return df_dit_create(ctx, &t);
    }
    df_mlp_desc m = df_mlp_defaults();
    m.dim = d->dim, m.width = 16 * i->width, m.seed = seed, m.classes = d->classes;
    return df_mlp_create(ctx, &m);
}

static inline df_train_desc image_training(const options *o, const image_options *i,
                                           const data_set *d) {
    df_train_desc t = df_train_defaults();
    t.steps = o->steps, t.batch = i->batch, t.seed = o->seed;
    t.learning_rate = i->rate, t.ema = i->ema, t.rows = i->rows;
    t.flip = i->flip ? 0.5 : 0;
    t.label_dropout = d->classes > 0 ? i->dropout : 0;
    t.report = 20;
    // To an MLP pixels are a point in no order, and the picture is easier than the noise.
    int mlp = strcmp(i->net, "mlp") == 0;
    t.card.prediction = i->predict ? image_prediction(i->predict) : mlp ? DF_X0 : DF_VELOCITY;
    if (t.card.prediction == DF_X0) t.weighting = DF_WEIGHT_MIN_SNR;
    if (!mlp) t.card.time = df_time_affine(1000, 0);
    return t;
}

// ---- samples -----------------------------------------------------------------------------------

static inline int image_on_sample(void *user, const df_step_info *info) {
    if (user) progress((progress_bar *)user, info->step, info->steps, "", (double)NAN);
    return 0;
}

// n samples of the classes in turn: x [n, dim].
static inline df_result image_sample(df_ctx *ctx, const df_net *net, const options *o,
                                     const image_options *i, int classes, int n,
                                     progress_bar *bar, df_real *x) {
    df_model model = df_net_model(net), guided = model;
    df_guidance guidance = df_guidance_defaults();
    guidance.model = &model, guidance.scale = i->guidance;
    df_sample_desc s = df_sample_defaults();
    const df_sampler_row *row = df_sampler_find(ctx, o->method);
    int *labels = (int *)malloc((size_t)n * sizeof *labels);
    if (row == NULL || labels == NULL) {
        free(labels);
        return row == NULL ? DF_ERR_ARGUMENT : DF_ERR_MEMORY;
    }
    for (int k = 0; k < n; k++) labels[k] = classes > 0 ? k % classes : -1;
    if (classes > 0 && i->guidance != 1) guided = df_guidance_model(&guidance);
    s.method = o->method, s.steps = o->sample_steps, s.seed = o->seed + 1, s.labels = labels;
    if (!row->from_alpha0 && model.process.kind == DF_PROCESS_FLOW) s.t_max = 0.999;
    s.on_step = image_on_sample, s.user = bar;
    df_result result = df_sample(ctx, &guided, &s, x, n);
    free(labels);
    return result;
}

enum { IMAGE_COLUMNS = 20, IMAGE_ROWS = 5 };

// Columns of a sheet of n: the classes stand below each other.
static inline int image_columns(int classes) {
    if (classes < 2 || classes > IMAGE_COLUMNS) return IMAGE_COLUMNS;
    return IMAGE_COLUMNS - IMAGE_COLUMNS % classes;
}

// A sheet of samples during training, beside the picture: images_step500.png.
static inline df_result image_grid(df_ctx *ctx, const df_net *net, const options *o,
                                   const image_options *i, const data_set *d, long step) {
    int n = IMAGE_ROWS * image_columns(d->classes), classes = d->classes;
    char path[512], ending[48], title[48];
    const char *titles[1] = { title };
    df_real *x = (df_real *)malloc((size_t)n * (size_t)d->dim * sizeof *x);
    df_result result = x ? image_sample(ctx, net, o, i, classes, n, NULL, x) : DF_ERR_MEMORY;
    snprintf(ending, sizeof ending, "_step%ld.png", step);
    snprintf(title, sizeof title, "samples after %ld steps", step);
    options_beside(o->picture, ending, path, sizeof path);
    const df_real *sheet[1] = { x };
    const int shape[3] = { d->c, d->h, d->w };
    if (result == DF_OK)
        images_sheets(path, shape, 48, image_columns(classes), IMAGE_ROWS, 1, titles, sheet,
                      &n);
    free(x);
    return result;
}

// ---- training ------------------------------------------------------------------------------------

static inline long image_next(long step, long every, long end) {
    return every > 0 && (step / every + 1) * every < end ? (step / every + 1) * every : end;
}

static inline void image_log(FILE *log, const df_train_info *t, double speed) {
    if (log == NULL) return;
    fprintf(log, "%ld,%.6g,", (long)t->step, t->loss);
    if (t->validation >= 0) fprintf(log, "%.6g", t->validation);
    fprintf(log, ",%.6g,%.6g,%.4g\n", t->gradient_norm, t->learning_rate, speed);
    fflush(log);
}

// Runs to the end, from one event (report, checkpoint, sheet) to the next. 0; or 1: failed,
// the context says why; or 130: stopped by Ctrl-C, the state is saved.
static inline int image_run(df_ctx *ctx, df_trainer *trainer, const df_net *net,
                            const options *o, const image_options *i, const data_set *d) {
    df_train_info t;
    df_result result = i->resume ? df_trainer_load(trainer, df_source_path(i->checkpoint))
                                 : (df_result)DF_OK;
    FILE *log = i->log ? fopen(i->log, i->resume ? "a" : "w") : NULL;
    progress_bar bar = progress_begin("training");
    df_trainer_info(trainer, &t);
    bar.from = (long)t.step, bar.per_step = i->batch, bar.unit = "images";
    if (i->resume && result == DF_OK)
        printf("%s: goes on from step %ld\n", i->checkpoint, bar.from);
    if (log && !i->resume) fprintf(log, "step,loss,validation,gradient_norm,learning_rate,"
                                   "images_per_second\n");
    while (result == DF_OK && t.step < t.steps) {
        long step = (long)t.step, next = image_next(step, 20, (long)t.steps);
        next = image_next(step, i->checkpoint_every, next);
        next = image_next(step, i->grid_every, next);
        result = df_trainer_run(trainer, next - step);
        df_trainer_info(trainer, &t);
        step = (long)t.step;
        if (result != DF_OK) break;
        progress(&bar, step, (long)t.steps, "loss", t.loss);
        if (step % 20 == 0 || step == t.steps) image_log(log, &t, progress_rate(&bar, step));
        if (i->checkpoint_every > 0 && step % i->checkpoint_every == 0)
            result = df_trainer_save(trainer, df_sink_path(i->checkpoint));
        if (result == DF_OK && i->grid_every > 0 && step % i->grid_every == 0)
            result = image_grid(ctx, net, o, i, d, step);
    }
    if (log && fclose(log) != 0) fprintf(stderr, "%s: cannot be written\n", i->log);
    if (result != DF_CANCELLED) return result != DF_OK;
    df_ctx_clear(ctx);
    if (df_trainer_save(trainer, df_sink_path(i->checkpoint)) != DF_OK) return 1;
    fprintf(stderr, "\nstopped after step %ld of %ld; to go on: the same command with "
            "--resume\n", (long)t.step, (long)t.steps);
    return 130;
}

// Trains on the first n images. 0, 1 or 130, as image_run; *out then is the net, saved.
static inline int image_train(df_ctx *ctx, const options *o, const image_options *i,
                              const data_set *d, int n, df_net **out) {
    df_train_desc t = image_training(o, i, d);
    df_net *net = image_net(ctx, i, d, o->seed);
    df_trainer *trainer = net ? df_trainer_create(ctx, net, d->x, n, d->labels, &t) : NULL;
    int result = 1;
    if (trainer != NULL) {
        df_train_info info;
        df_trainer_info(trainer, &info);
        printf("%s of %lu parameters; training will hold %.0f MiB\n", i->net,
               (unsigned long)df_net_size(net), (double)info.memory / (1 << 20));
        fflush(stdout);
        result = image_run(ctx, trainer, net, o, i, d);
    }
    df_trainer_free(trainer);
    if (result == 0 && df_net_save(ctx, net, df_sink_path(o->save)) != DF_OK) result = 1;
    if (result == 0) {
        printf("wrote %s\n", o->save);
        remove(i->checkpoint);                   // of no use any more
        *out = net;
    } else {
        df_net_free(net);
    }
    return result;
}

// The net, from a file or by training. 0, 1 or 130; what went wrong is said.
static inline int image_load_or_train(df_ctx *ctx, const options *o, const image_options *i,
                                      const data_set *d, int n, df_net **out) {
    int result = 1;
    if (df_sampler_find(ctx, o->method) != NULL) {   // before the training, not after it
        if (o->load == NULL) result = image_train(ctx, o, i, d, n, out);
        else if ((*out = df_net_load(ctx, df_source_path(o->load))) != NULL)
            return image_fits(o, d, *out) != 0;
    }
    if (result == 1) fprintf(stderr, "%s\n", df_ctx_message(ctx));
    return result;
}
#endif
