// 16_likelihood: how probable is this point? The ODE's density beside the truth, and bits.
//
//   You learn    what log p costs, by digits; what a random probe in place of the exact
//                divergence does, and a prior that is not the data's end; bits per dimension.
//   It takes     three seconds; two minutes more on two cores with --images.
//   Out come     likelihood.png, a table. Exits 1 if log p with the exact trace, or along
//                sampling, is off by 1e-4, or single probes by 6 standard errors of the mean.
//
//   build/16_likelihood [--n N] [--images t10k-images [--load FILE]]     (unpacked by zcat)
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "data.h"
#include "draw.h"
#include "images.h"
#include "options.h"
#include "train_images.h"

enum { SIDE = 90, ROWS = 7, SIGNS = 3, GAUSSIAN, PRIOR, ALONG, HELD = 16 };
static df_ctx *ctx;
static df_mixture *mixture;

// The prior is the mixture's own density at the noise end.
static int own_prior(void *user, const df_point *at, int n, const df_real *x, double *out) {
    return df_mixture_log_density(ctx, (const df_mixture *)user, at, n, x, out);
}

// A row for each way to have log p, which goes to `found` [ROWS, n], the truth to `want` [n].
static int table(const df_model *m, const options *o, df_real *x, double *want, double *found) {
    static const char *const rows[ROWS] = { "exact trace, to 1e-2", "exact trace, to 1e-4",
        "exact trace, to 1e-6", "one probe of signs", "one Gaussian probe",
        "exact, prior N(0, sigma^2)", "along sampling, and after" };
    int wrong = 0, asked = 0;
    df_point at = df_process_at(&m->process, df_process_t_min(&m->process));
    df_likelihood_desc d = df_likelihood_defaults();
    df_result r = df_mixture_sample(ctx, mixture, &at, o->seed, 0, o->n, x);
    if (r == DF_OK) r = df_mixture_log_density(ctx, mixture, &at, o->n, x, want);
    d.walk.seed = o->seed, d.evaluations = &asked, d.user = mixture;
    for (int k = 0; k < ROWS; k++) {
        double mean = 0, square = 0, most = 0, *got = found + k * o->n;
        double *truth = k == ALONG ? found : want;       // row 0 is of no use any more
        int probe = k == SIGNS || k == GAUSSIAN;
        d.walk.rtol = d.walk.atol = k < 2 ? pow(10, -2 - 2 * k) : 1e-6;
        d.trace = probe ? (df_trace)(k - SIGNS + 1) : DF_TRACE_EXACT;
        d.log_prior = k == PRIOR ? NULL : own_prior;
        if (k == ALONG && !r) r = df_sample_likelihood(ctx, m, &d, x, o->n, truth);
        if (r == DF_OK) r = df_log_likelihood(ctx, m, &d, x, o->n, got);
        for (int i = 0; i < o->n; i++) {
            double e = r == DF_OK ? got[i] - truth[i] : INFINITY;
            mean += e / o->n, square += e * e / o->n, most = fmax(most, fabs(e));
        }
        double deviation = sqrt(fmax(square - mean * mean, 0));
        int bad = k != PRIOR && k > 1 && most > 1e-4; // float's
        if (probe) bad = !(fabs(mean) <= 6 * deviation / sqrt(o->n));
        printf("  %-5s %-27s %8d %11.1e %11.1e %11.1e%s\n", df_process_name(&m->process),
               rows[k], asked, mean, deviation, most, bad ? "  WRONG" : "");
        wrong += bad;
    }
    return wrong;
}

// log p of the plane by the ODE, and probes over the truth.
static void picture(const options *o, const df_model *m, const double *want,
                    const double *found) {
    const char *const names[2] = { "Gaussian probe", "probe of signs" };
    const unsigned ink[2] = { 0xe08214, 0x2166ac };
    static df_real grid[2 * SIDE * SIDE], heat[SIDE * SIDE];
    static double log_p[SIDE * SIDE];
    const double plane[4] = { -3.6, 3.6, -3.6, 3.6 }, nats[4] = { -7.5, 1.5, -7.5, 1.5 };
    draw_canvas c;
    if (draw_open(&c, 1060, 520) != 0) return;
    for (int k = 0; k < 2 * SIDE * SIDE; k++)
        grid[k] = (df_real)(((k % 2 ? k / 2 / SIDE : k / 2 % SIDE) + 0.5) * 7.2 / SIDE - 3.6);
    df_log_likelihood(ctx, m, NULL, grid, SIDE * SIDE, log_p);
    for (int k = 0; k < SIDE * SIDE; k++) heat[k] = (df_real)log_p[k];
    draw_panel p = draw_frame(&c, 10, 10, 510, 500, "log p by the ODE, -12 to -1", plane, 5);
    draw_heat(&p, heat, SIDE, SIDE, -12, -1);
    p = draw_frame(&c, 540, 10, 510, 500, "log p with one probe over the truth", nats, 5);
    draw_axes(&p, "true, nats", "found, nats");
    draw_line(&c, p.x, p.y + p.h, p.x + p.w, p.y, 1.5, DRAW_INK, 1);
    for (int i = 0; i < 2 * o->n; i++) {
        const double *y = found + (GAUSSIAN - i % 2) * o->n;
        df_real xy[2] = { (df_real)want[i / 2], (df_real)y[i / 2] };
        draw_scatter(&p, xy, 1, 2, 2.8, ink[i % 2], 0.7);
    }
    draw_legend(&p, 2, names, ink);
    draw_save(&c, o->picture), draw_close(&c);
}

// Bits per dimension of the last HELD images, unseen in training. The bound ends where sigma is
// half a level: below, a net that knows of no levels pays for each unit of lambda.
static int bits(const options *o, const image_options *i, data_set *d) {
    int size = d->n * d->dim, from = size - HELD * d->dim, bad;
    unsigned char *levels = (unsigned char *)malloc((size_t)size);
    df_real raw[HELD * 784];
    double nats[2 * HELD], mean[2] = { 0, 0 };
    df_net *net = NULL;
    df_likelihood_desc l = df_likelihood_defaults();
    df_bound_desc b = df_bound_defaults();
    l.trace = DF_TRACE_RADEMACHER, l.walk.rtol = l.walk.atol = 1e-3;
    b.continuous = 1, b.draws = 100, b.levels = 256, b.walk.t_max = .999, b.walk.t_min = .004;
    if (levels == NULL || d->n < 2 * HELD || d->dim > 784) return free(levels), 1;
    memcpy(raw, d->x + from, (size_t)(size - from) * sizeof *raw);
    for (int k = 0; k < size; k++) levels[k] = (unsigned char)lround(127.5 * (d->x[k] + 1.0));
    df_dequantize(o->seed, 0, d->n, d->dim, levels, -1, 1, d->x);
    if (o->load) net = df_net_load(ctx, df_source_path(o->load));
    else image_train(ctx, o, i, d, d->n - HELD, &net);
    df_model m = net ? df_net_model(net) : df_model_defaults();
    bad = net == NULL || image_fits(o, d, net) != 0 ||
          df_log_likelihood(ctx, &m, &l, d->x + from, HELD, nats) != DF_OK ||
          df_variational_bound(ctx, &m, &b, raw, HELD, nats + HELD) != DF_OK;
    for (int k = 0; k < 2 * HELD && !bad; k++)
        mean[k / HELD] += df_bits_per_dim(nats[k], d->dim, k < HELD ? 2 / 256.0 : 1) / HELD;
    if (!bad)
        printf("bits a dimension: ODE, one probe, levels dequantised %.3f; continuous bound, "
               "levels decoded %.3f\n", mean[0], mean[1]);
    df_net_free(net), free(levels);
    return bad;
}

int main(int argc, char **argv) {
    static const double w[3] = { .3, .5, .2 }, means[6] = { 2, 0, -1, 1.5, 0, -2 };
    static const double S[12] = { .3, .1, .1, .2, .2, -.05, -.05, .4, .1, 0, 0, .1 };
    options o = options_defaults(argv[0], "likelihood", "", 400, 0, 300);
    image_options i;
    data_set d = { NULL, NULL, 0, 0, 0, 0, 0, 0 };
    const char *images = NULL;
    image_options_defaults(&i, &o);
    i.own[o.owns++] = (option_own)OPTION_TEXT("--images", "FILE", "IDX images", &images);
    o.without = "--data --method --sample-steps --csv --threads";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    if (images && image_options_check(&i, &o) != 0) return 2;
    image_catch(ctx = df_ctx_create(NULL));
    mixture = df_mixture_create(ctx, 3, 2, w, means, S);
    df_real *x = (df_real *)malloc(2 * (size_t)o.n * sizeof *x);
    double *want = (double *)malloc((1 + ROWS) * (size_t)o.n * sizeof *want);
    int wrong = mixture == NULL || x == NULL || want == NULL;
    printf("  log p in nats %29s  mean error   deviation     largest\n", "questions");
    for (int k = 0; k < 3 && !wrong; k++) {
        df_mixture_view view = { mixture, df_process_flow(), k ? DF_EPS : DF_VELOCITY };
        if (k > 0) view.process = k == 1 ? df_process_edm(80) : df_process_vp(.1, 20);
        df_model m = df_mixture_model(&view);
        wrong += table(&m, &o, x, want, want + o.n);
        if (k == 2) picture(&o, &m, want, want + o.n);
    }
    o.data = images;
    if (images && !wrong) wrong = image_data(&d, &o, &i, 0, 60000) != 0 || bits(&o, &i, &d);
    if (wrong) fprintf(stderr, "%s\n", df_ctx_message(ctx));
    data_free(&d), free(x), free(want), df_mixture_free(mixture), df_ctx_free(ctx);
    return wrong > 0;
}
