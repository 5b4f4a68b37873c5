// 08_digits: do samples show what was asked for? A second network reads them.
//
//   You learn    a measure of samples that needs no eyes: how many of those asked to be of a
//                class are read as that class; and (reader.h) a network of your own from
//                layers, with its loss, gradient and optimiser by hand.
//   It takes     three minutes on two cores with the embedded sprites; about 15 with MNIST's
//                10,000 test images, a batch of 64 and 2500 steps.
//   Out come     digits.png (data, samples), digits.safetensors, the part of held-out images
//                and of samples that the reader reads right. Exits 1 if that is below 96 % of
//                the one or 90 % of the other.
//
//   build/08_digits [FILE --labels FILE] [--load FILE] [--reader-steps N] [...]
//   The options are those of 02_images. MNIST, from files unpacked by zcat:
//   build/08_digits t10k-images --labels t10k-labels --batch 64 --steps 2500 --n 1000
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "data.h"
#include "draw.h"
#include "images.h"
#include "options.h"
#include "reader.h"
#include "train_images.h"

enum { SIDE = 16, MOST = 60000 };
static const double held_out_wanted = 0.96, samples_wanted = 0.90;

static int failed(df_ctx *ctx) {
    fprintf(stderr, "%s\n", df_ctx_message(ctx));
    return 1;
}

// What part of the samples is read as the class asked for; their sheet.
static double measure(df_ctx *ctx, const options *o, const image_options *i, const data_set *d,
                      const df_net *reader, const df_net *net) {
    static const char *const titles[2] = { "data", "samples" };
    int n = o->n - o->n % d->classes, shape[3] = { d->c, d->h, d->w }, all = -1;
    df_real *x = (df_real *)malloc((size_t)n * (size_t)d->dim * sizeof *x);
    int *labels = (int *)malloc((size_t)n * sizeof *labels), right[256] = { 0 };
    progress_bar bar = progress_begin("sampling");
    if (x == NULL || labels == NULL) {
        data_fail("08_digits", "no memory for so many samples");
    } else if (image_sample(ctx, net, o, i, d->classes, n, &bar, x) != DF_OK) {
        failed(ctx);
    } else {
        const df_real *sheets[2] = { d->x, x };
        int shown[2] = { d->n, n };
        for (int k = 0; k < n; k++) labels[k] = k % d->classes;
        all = reader_right(ctx, reader, d, x, labels, n, right);
        printf("read as the class asked for:");
        for (int k = 0; k < d->classes; k++)
            printf(" %d: %.0f %%", k, 100.0 * right[k] * d->classes / n);
        printf("\n");
        if (images_sheets(o->picture, shape, 48, image_columns(d->classes), IMAGE_ROWS, 2,
                          titles, sheets, shown) != 0) all = -1;
    }
    free(x);
    free(labels);
    return (double)all / n;
}

// The reader, judged on images held out from the n-th on; then the samples, judged by it.
static int judge(df_ctx *ctx, const options *o, const image_options *i, const data_set *d,
                 int n, int reader_steps, const df_net *net) {
    df_net *reader = reader_train(ctx, d, n, reader_steps, o->seed);
    int held = d->n - n, right = -1;
    if (reader != NULL)
        right = reader_right(ctx, reader, d, d->x + (size_t)n * (size_t)d->dim, d->labels + n,
                             held, NULL);
    if (right < 0) {
        df_net_free(reader);
        return failed(ctx);
    }
    double part = (double)right / held, samples = measure(ctx, o, i, d, reader, net);
    printf("the reader, of %lu parameters, reads %.1f %% of %d held-out images right (wanted: "
           "%.0f %%)\nand %.1f %% of %d samples as the class asked for (wanted: %.0f %%)\n",
           (unsigned long)df_net_size(reader), 100 * part, held, 100 * held_out_wanted,
           100 * samples, o->n - o->n % d->classes, 100 * samples_wanted);
    df_net_free(reader);
    return part >= held_out_wanted && samples >= samples_wanted ? 0 : 1;
}

int main(int argc, char **argv) {
    options o = options_defaults(argv[0], "digits", "sprites", 1600, 25, 500);
    image_options i;
    data_set d;
    df_ctx_desc c = df_ctx_defaults();
    int reader_steps = 1500;
    image_options_defaults(&i, &o);
    i.own[o.owns++] = (option_own)OPTION_WHOLE("--reader-steps", "N", "training steps of the "
                                               "reader", &reader_steps, 1, 1000000);
    o.method = "dpmpp_2m", i.guidance = 2;
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    if (image_options_check(&i, &o) != 0) return 2;
    if (image_data(&d, &o, &i, SIDE, MOST) != 0) return 1;
    if (d.classes < 2 || d.h % 4 != 0 || d.w % 4 != 0 || o.n < d.classes) {
        data_free(&d);
        return data_fail(o.data, "images with labels are needed, of sizes that 4 divides") != 0;
    }
    c.threads = o.threads;
    df_ctx *ctx = df_ctx_create(&c);
    if (ctx == NULL) return data_fail("08_digits", "no memory") != 0;
    image_catch(ctx);
    int n = d.n - d.n / 10;
    df_net *net = NULL;
    int result = image_load_or_train(ctx, &o, &i, &d, n, &net);
    if (result == 0) result = judge(ctx, &o, &i, &d, n, reader_steps, net);
    df_net_free(net);
    df_ctx_free(ctx);
    data_free(&d);
    return result;
}
