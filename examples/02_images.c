// 02_images: learn a distribution of images, sample new ones.
//
//   You learn    that images are points of many dimensions: the program is 01_points over
//                again, with a network that knows of neighbourhood (UNet, DiT) or does not
//                (MLP); labels, and classifier-free guidance; long runs: averaged weights,
//                checkpoints, a log, Ctrl-C and --resume.
//   It takes     about two minutes on two cores with the embedded sprites.
//   Out come     images.png (data above, samples below), images.safetensors, and the distance
//                of samples to held-out images beside its floor. Exits 1 if something failed,
//                130 if it was stopped.
//
//   build/02_images [FILE | FOLDER | -] [--labels FILE] [--net unet|dit|mlp] [--steps N]
//       [--method dpmpp_2m] [--sample-steps N] [--guidance S] [--grid-every N] [--log FILE] ...
//   FILE is an IDX file of images (MNIST's format), or raw floats with --shape C,H,W; a folder
//   holds PNG or JPEG pictures, or folders of them, one for each class. --help tells the rest.
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "data.h"
#include "draw.h"
#include "images.h"
#include "options.h"
#include "train_images.h"

enum { SIDE = 16, MOST = 60000 };

static int failed(df_ctx *ctx) {
    fprintf(stderr, "%s\n", df_ctx_message(ctx));
    return df_ctx_error(ctx) == DF_CANCELLED ? 130 : 1;
}

// Draws samples, measures how far they are from images that were held out, shows both.
static int sample(df_ctx *ctx, const options *o, const image_options *i, const data_set *d,
                  int n, const df_net *net) {
    static const char *const titles[2] = { "data", "samples" };
    double distance = 0, floor = 0;
    int held = d->n - n, compare = o->n < held ? o->n : held, result = 0;
    int classes = df_net_classes(net) < d->classes ? df_net_classes(net) : d->classes;
    const df_real *fresh = d->x + (size_t)n * (size_t)d->dim, *sheets[2];
    df_real *x = (df_real *)malloc((size_t)o->n * (size_t)d->dim * sizeof *x);
    progress_bar bar = progress_begin("sampling");
    if (x == NULL) return data_fail("02_images", "no memory for so many samples") != 0;
    if (image_sample(ctx, net, o, i, classes, o->n, &bar, x) != DF_OK ||
        df_sliced_wasserstein(ctx, x, compare, fresh, held, d->dim, 200, 1, &distance) ||
        df_sliced_wasserstein(ctx, d->x, compare, fresh, held, d->dim, 200, 1, &floor)) {
        result = failed(ctx);
    } else {
        int shown[2] = { n, o->n }, shape[3] = { d->c, d->h, d->w };
        printf("%d samples by %s in %d steps: sliced W2 to %d held-out images %.4f (between two"
               " draws of the data: %.4f)\n", o->n, o->method, o->sample_steps, held, distance,
               floor);
        sheets[0] = d->x, sheets[1] = x;
        result = images_sheets(o->picture, shape, 48, image_columns(d->classes), IMAGE_ROWS,
                               2, titles, sheets, shown) != 0;
        if (o->csv && result == 0) result = options_csv(o->csv, x, o->n, d->dim);
    }
    free(x);
    return result;
}

int main(int argc, char **argv) {
    options o = options_defaults(argv[0], "images", "sprites", 1600, 25, 200);
    image_options i;
    data_set d;
    df_ctx_desc c = df_ctx_defaults();
    image_options_defaults(&i, &o);
    o.method = "dpmpp_2m";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    if (image_options_check(&i, &o) != 0) return 2;
    if (image_data(&d, &o, &i, SIDE, MOST) != 0) return 1;
    c.threads = o.threads;
    df_ctx *ctx = df_ctx_create(&c);
    if (ctx == NULL) return data_fail("02_images", "no memory") != 0;
    image_catch(ctx);
    int n = d.n - d.n / 10;
    df_net *net = NULL;
    int result = image_load_or_train(ctx, &o, &i, &d, n, &net);
    if (result == 0) result = sample(ctx, &o, &i, &d, n, net);
    df_net_free(net);
    df_ctx_free(ctx);
    data_free(&d);
    return result;
}
