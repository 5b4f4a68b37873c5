// 05_checkpoint: sample from a network that others trained, or from one of your own.
//
//   You learn    that a checkpoint is weights and a card: what the network predicts, of which
//                process, in which time. With the card any sampler takes any network. A start
//                from a picture (img2img), and a hook that puts known pixels back (inpainting).
//   It takes     seconds for small networks.
//   Out come     checkpoint.png, a sheet of samples, and their mean and deviation; or how far
//                they are from the picture given, and that the pixels kept are its own. Exits
//                1 if they are not, or if something failed.
//
//   build/05_checkpoint [FOLDER | FILE] [--method ddim] [--sample-steps N] [--grid NAME]
//       [--class N] [--guidance S] [--clip C] [--n N] [--export FOLDER]
//       [--img2img PICTURE --strength S] [--inpaint PICTURE --mask PICTURE]
//   FOLDER holds a UNet2DModel, DiTTransformer2DModel or DiT: config.json, weights, and
//   scheduler_config.json if there is one; FILE is what df_net_save wrote, as 02_images does.
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "data.h"
#include "draw.h"
#include "images.h"
#include "inpaint.h"
#include "options.h"

typedef struct settings {
    const char *grid, *img2img, *inpaint, *mask, *shape, *export_to;
    double guidance, strength, clip;
    int label, describe;
} settings;

static int failed(df_ctx *ctx) {
    fprintf(stderr, "%s\n", df_ctx_message(ctx));
    return 1;
}

static int on_step(void *user, const df_step_info *info) {
    progress(&((inpainting *)user)->bar, info->step, info->steps, "", (double)NAN);
    return 0;
}

// Mean and deviation; from a picture: distance; kept pixels must be its own.
static int measure(const options *o, int dim, const inpainting *p, int kept, const df_real *x) {
    double sum = 0, square = 0, away = 0, worst = 0;
    for (int i = 0; i < o->n * dim; i++) {
        double v = (double)x[i], d = v - (p->known ? (double)p->known[i % dim] : 0);
        sum += v, square += v * v, away += d * d;
        if (kept && p->free_part[i % dim] == 0) worst = fmax(worst, fabs(d));
    }
    double n = (double)o->n * dim, mean = sum / n;
    printf("%d samples by %s in %d steps: mean %.4f, deviation %.4f\n", o->n, o->method,
           o->sample_steps, mean, sqrt(square / n - mean * mean));
    if (p->known) printf("root mean square distance from the picture: %.4f\n", sqrt(away / n));
    if (kept) printf("kept pixels differ from the picture's by at most %.1e\n", worst);
    return kept && !(worst < 1e-4);
}

static int sample(df_ctx *ctx, const options *o, const settings *e, const df_net *net,
                  const int shape[3], inpainting *p, df_real *x, int *labels) {
    const char *titles[2] = { o->method, "given" };
    const df_real *sheets[2] = { x, p->known };
    df_model model = df_net_model(net), guided = model;
    df_guidance guidance = df_guidance_defaults();
    guidance.model = &model, guidance.scale = e->guidance;
    df_sample_desc s = df_sample_defaults();
    int classes = df_net_classes(net), n[2] = { o->n, p->known != NULL };
    int most = shape[2] < 96 ? 10 : 2, columns = o->n < most ? o->n : most;
    for (int i = 0; i < o->n; i++) {
        labels[i] = e->label >= 0 ? e->label : classes > 0 ? i % classes : -1;
        if (e->img2img)
            memcpy(x + (size_t)i * (size_t)model.dim, p->known, (size_t)model.dim * sizeof *x);
    }
    if (classes > 0 && e->guidance != 1) guided = df_guidance_model(&guidance);
    s.method = o->method, s.steps = o->sample_steps, s.seed = o->seed, s.labels = labels;
    s.grid = e->grid, s.clip = e->clip, s.on_step = on_step, s.user = p;
    if (!df_sampler_find(ctx, o->method)->from_alpha0 &&
        !(df_process_at(&model.process, 1).alpha > 0)) s.t_max = 0.999;
    if (e->img2img) s.start = DF_START_DATA, s.t_max = e->strength;
    if (e->inpaint) s.edit = inpaint_edit;
    p->model = &model, p->bar = progress_begin("sampling");
    if (df_sample(ctx, &guided, &s, x, o->n) != DF_OK) return failed(ctx);
    if (measure(o, model.dim, p, e->inpaint != NULL, x) != 0) return 1;
    return images_sheets(o->picture, shape, 96, columns, o->n, 1 + n[1], titles, sheets, n);
}

static int print(void *user, const char *line) {
    (void)user;
    return puts(line) < 0;
}

// Reads the checkpoint, and says what its card says.
static df_net *load(df_ctx *ctx, const options *o) {
    df_net *net = images_is_folder(o->data) ? df_net_load_folder(ctx, o->data)
                                            : df_net_load(ctx, df_source_path(o->data));
    if (net == NULL) return NULL;
    const df_card *card = df_net_card(net);
    printf("%s: %s of %lu parameters, predicts %s of process %s\n", o->data, df_net_kind(net),
           (unsigned long)df_net_size(net), df_prediction_name(card->prediction),
           df_process_name(&card->process));
    return net;
}

int main(int argc, char **argv) {
    settings e = { "uniform", NULL, NULL, NULL, NULL, NULL, 1, 0.6, 0, -1, 0 };
    const option_own own[] = {
        OPTION_TEXT("--grid", "NAME", "how steps are spaced: karras, trailing, ...", &e.grid),
        OPTION_WHOLE("--class", "N", "one class; -1: all in turn", &e.label, -1, 1e6),
        OPTION_REAL("--guidance", "S", "of classifier-free guidance", &e.guidance, -100, 100),
        OPTION_REAL("--clip", "C", "x_0 is cut to [-C, C]; 0: not", &e.clip, 0, 1e6),
        OPTION_TEXT("--img2img", "PICTURE", "begin with it ...", &e.img2img),
        OPTION_REAL("--strength", "S", "... noised to this t", &e.strength, 1e-3, 1),
        OPTION_TEXT("--inpaint", "PICTURE", "keep it where the mask is black ...", &e.inpaint),
        OPTION_TEXT("--mask", "PICTURE", "... and make it anew where it is white", &e.mask),
        OPTION_TEXT("--shape", "C,H,W", "of the images, if not square", &e.shape),
        OPTION_FLAG("--describe", "layers, shapes, parameters, cost", &e.describe),
        OPTION_TEXT("--export", "FOLDER", "write the net for diffusers or DiT", &e.export_to),
    };
    options o = options_defaults(argv[0], "checkpoint", "", 1, 50, 16);
    options images = options_defaults(argv[0], "images", "", 1, 1, 1);       // of 02_images
    o.without = "--steps --load --save --csv", o.learns = "folder or file of the checkpoint";
    o.data = images.default_save, o.own = own, o.owns = (int)(sizeof own / sizeof *own);
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    if ((e.inpaint != NULL) != (e.mask != NULL) || (e.inpaint && e.img2img))
        return data_fail("--inpaint", "goes with --mask, and not with --img2img"), 2;
    inpainting p = { NULL, NULL, NULL, NULL, o.seed + 1, progress_begin("") };
    const char *file = e.inpaint ? e.inpaint : e.img2img;
    int shape[3], result = 1;
    df_ctx_desc c = df_ctx_defaults();
    c.threads = o.threads;
    df_ctx *ctx = df_ctx_create(&c);
    df_net *net = df_sampler_find(ctx, o.method) ? load(ctx, &o) : NULL;
    if (net == NULL) {
        failed(ctx);
    } else if (e.describe && df_net_describe(ctx, net, NULL, print, NULL) != DF_OK) {
        failed(ctx);
    } else if (images_shape_of(net, e.shape, shape) == 0 &&
               inpaint_read(&p, file, e.mask, shape) == 0) {
        df_real *x = (df_real *)malloc((size_t)o.n * (size_t)df_net_dim(net) * sizeof *x);
        int *labels = (int *)malloc((size_t)o.n * sizeof *labels);
        if (x == NULL || labels == NULL) data_fail(o.data, "no memory for so many samples");
        else result = sample(ctx, &o, &e, net, shape, &p, x, labels) != 0;
        free(x);
        free(labels);
    }
    if (result == 0 && e.export_to) {
        if (df_net_save_folder(ctx, net, e.export_to) != DF_OK) result = failed(ctx);
        else printf("wrote %s\n", e.export_to);
    }
    free(p.known);
    df_net_free(net);
    df_ctx_free(ctx);
    return result;
}
