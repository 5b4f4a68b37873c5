// 18_price_list: what a sample costs: autoencoders, a coupling flow, and diffusion (flow
// matching) by several samplers with more and more questions, on the same 8 Gaussians.
//
//   You learn    to buy quality with questions (NFE): one pass of a VAE or a flow is what it
//                is; diffusion with one question is worse than both, with more it is better,
//                and the sampler matters where few are asked.
//   It takes     a minute and a half of one core, which two share.
//   Out come     price_list.png and the table: sliced W2 to fresh data, milliseconds for 1,000
//                samples, memory. Exits 1 if diffusion's best is not nearer to the data than
//                VAE and flow, or more questions do not help.
//
//   build/18_price_list [--steps N] [--n N] [--seed N] [--threads N] [--picture FILE]
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "draw.h"
#include "options.h"

enum { NETS = 4, SAMPLERS = 4, PRICES = 6, TRAINED = 40000, SHOWN = 5000 };
static const char *const names[NETS] = { "VAE", "VAE, 3 levels", "coupling flow", "diffusion" };
static const char *const methods[SAMPLERS] = { "euler", "heun_t", "dpmpp_2m", "euler_ancestral" };
static const int prices[PRICES] = { 1, 2, 4, 8, 16, 32 };
static df_ctx *ctx;
static progress_bar bar;
static df_real *x, *fresh, *out;                 // [n, 2] room for TRAINED
static df_real shown[NETS + 1][2 * SHOWN];       // samples for the picture; the data last

static int count(void *asked, const df_step_info *s) { return *(int *)asked = s->evaluations, 0; }
static df_net *train(int k, const options *o, size_t *memory) {
    df_vae_desc v = df_vae_defaults();
    df_coupling_desc f = df_coupling_defaults();
    df_mlp_desc m = df_mlp_defaults();
    df_train_desc d = df_train_defaults();
    df_train_info info = { 0, 0, 0, 0, 0, 0, 0, 0, 0 };
    v.levels = k ? 3 : 1, v.width = f.width = 64, m.width = 128, m.depth = 3, m.embed = 64;
    v.seed = f.seed = m.seed = d.seed = o->seed;
    if (k < 2) d.objective = df_objective_elbo;
    if (k == 2) d.objective = df_objective_flow_likelihood;
    d.steps = o->steps, d.validation = 0, d.on_step = progress_on_step, d.user = &bar, d.weight_decay = 0;
    df_net *net = k < 2 ? df_vae_create(ctx, &v) : k < 3 ? df_coupling_create(ctx, &f)
                                                         : df_mlp_create(ctx, &m);
    df_trainer *trainer = df_trainer_create(ctx, net, x, TRAINED, NULL, &d);
    bar = progress_begin(names[k]);
    int ok = trainer && df_trainer_run(trainer, 0) == DF_OK && !df_trainer_info(trainer, &info);
    *memory = info.memory;
    df_trainer_free(trainer);
    if (!ok) df_net_free(net), net = NULL;
    return net;
}

// Distance of n samples; method NULL: in one pass. A context of its own tells the memory.
static double price(int k, const df_net *net, const char *method, int nfe, const options *o,
                    size_t memory, int *asked) {
    df_ctx_desc c = df_ctx_defaults();
    df_sample_desc s = df_sample_defaults();
    df_model model = df_net_model(net);
    double distance = -1, spent;
    uint64_t seed = o->seed + 1;
    df_ctx *own = (c.threads = o->threads, df_ctx_create(&c));
    const df_sampler_row *r = method ? df_sampler_find(own, method) : NULL;
    int bad, two = r && r->evaluations == 2;
    s.method = method, s.seed = seed, s.steps = two ? nfe / 2 + 1 : nfe;
    s.on_step = count, s.user = asked, *asked = 1;
    if (r && !r->from_alpha0) s.t_max = 0.999;
    bar = progress_begin("");
    if (method) bad = df_sample(own, &model, &s, out, o->n) != DF_OK;
    else if (k < 2) bad = df_vae_sample(own, net, seed, 0, o->n, out) != DF_OK;
    else bad = df_coupling_sample(own, net, seed, 0, o->n, out) != DF_OK;
    spent = progress_seconds() - bar.start;
    if (!bad) df_sliced_wasserstein(ctx, out, o->n, fresh, o->n, 2, 200, 1, &distance);
    printf("%-14s %-16s %4d %8.4f %10.2f %10.1f %10.1f\n", names[k], method ? method : "one pass",
           *asked, distance, 1e6 * spent / o->n,
           (double)df_ctx_peak_bytes(own) / 1e6, (double)memory / 1e6);
    fflush(stdout);
    df_ctx_free(own);
    return distance;
}

static void picture(const options *o, double floor, const df_real one[NETS][2],
                    df_real curve[SAMPLERS][2 * PRICES]) {
    static const double near[4] = { -4.4, 4.4, -4.4, 4.4 };
    const char *label[SAMPLERS + NETS] = { methods[0], methods[1], methods[2], methods[3],
                                           names[0], names[1], names[2], "floor: data to data" };
    double range[4] = { 0.9, 36, floor / 2, 4 };
    unsigned colour[SAMPLERS + NETS];
    df_real line[4] = { (df_real)0.9, (df_real)floor, 36, (df_real)floor };
    draw_canvas c;
    if (draw_open(&c, 1320, 560) != 0) return;
    for (int i = 0; i < 8; i++) colour[i] = i < 7 ? draw_palette(i) : DRAW_TEXT;
    draw_panel p = draw_frame_log(&c, 10, 10, 740, 540, "quality and its price", range, 6, 1, 1);
    draw_polyline(&p, line, 2, 2, 1.5, DRAW_TEXT, 0.8);
    for (int m = 0; m < SAMPLERS; m++) {
        draw_polyline(&p, curve[m], PRICES, 2, 2, colour[m], 0.9);
        draw_scatter(&p, curve[m], PRICES, 2, 3.5, colour[m], 1);
    }
    for (int k = 0; k < 3; k++) draw_scatter(&p, one[k], 1, 2, 7, colour[SAMPLERS + k], 1);
    draw_legend(&p, SAMPLERS + NETS, label, colour);
    draw_axes(&p, "questions to the net", "sliced W2 to the data");
    for (int k = 0; k < 4; k++) {
        static const int from[4] = { 0, 2, 3, NETS };
        p = draw_frame(&c, 765 + 275 * (k % 2), 10 + 272 * (k / 2), 270, 268,
                       k == 3 ? "data" : k == 2 ? "dpmpp_2m, 32" : names[from[k]], near, 0);
        draw_scatter(&p, shown[from[k]], SHOWN < o->n ? SHOWN : o->n, 2, 1.1,
                     k == 3 ? DRAW_TEXT : draw_palette(k == 2 ? 2 : SAMPLERS + from[k]), 0.5);
    }
    draw_save(&c, o->picture), draw_close(&c);
}

int main(int argc, char **argv) {
    options o = options_defaults(argv[0], "price_list", "", 3000, 0, 20000);
    df_ctx_desc c = df_ctx_defaults();
    df_point here = { 0, 1, 0, INFINITY };
    df_real one[NETS][2], curve[SAMPLERS][2 * PRICES];
    double floor = 0, rival = 1e9, best = 1e9, d = 0;
    int asked;
    size_t memory = 0, bytes = sizeof(df_real) * 2;
    o.without = "--data --method --sample-steps --load --save --csv --list";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    c.threads = o.threads, ctx = df_ctx_create(&c);
    df_mixture *data = df_mixture_ring(ctx, 8, 2 * sqrt(2), sqrt(0.125));
    x = (df_real *)malloc(bytes * TRAINED), fresh = (df_real *)malloc(bytes * (size_t)o.n);
    out = (df_real *)malloc(bytes * (size_t)o.n);
    int wrong = !data || !x || !fresh || !out ||
                df_mixture_sample(ctx, data, &here, o.seed, 0, TRAINED, x) ||
                df_mixture_sample(ctx, data, &here, o.seed, TRAINED, o.n, fresh) ||
                df_mixture_sample(ctx, data, &here, o.seed, TRAINED + (uint64_t)o.n, o.n, out) ||
                df_sliced_wasserstein(ctx, out, o.n, fresh, o.n, 2, 200, 1, &floor);
    printf("%d samples; data to data %.4f\n                                 NFE       W2  ms/1000"
           "    MB, sampled, trained\n", o.n, floor);
    for (int k = 0; k < NETS && !wrong; k++) {
        df_net *net = train(k, &o, &memory);
        wrong = net == NULL;
        for (int m = 0; m < (k < 3 ? 1 : SAMPLERS) && !wrong; m++)
            for (int i = 0; i < (k < 3 ? 1 : PRICES) && !wrong; i++) {
                d = price(k, net, k < 3 ? NULL : methods[m], prices[i], &o, memory, &asked);
                df_real *to = k < 3 ? one[k] : curve[m] + 2 * i;
                to[0] = (df_real)asked, to[1] = (df_real)d, wrong = d < 0;
                if (k < 3) rival = fmin(rival, d);
                else best = fmin(best, d);
                if (k < 3 || (m == 2 && i == PRICES - 1))
                    memcpy(shown[k], out, bytes * (size_t)(o.n < SHOWN ? o.n : SHOWN));
            }
        df_net_free(net);
    }
    for (int m = 0; m < SAMPLERS && !wrong; m++) wrong = curve[m][2 * PRICES - 1] > curve[m][3] / 2;
    if (wrong || best > rival) wrong = 1, fprintf(stderr, "off: %s\n", df_ctx_message(ctx));
    else memcpy(shown[NETS], fresh, bytes * (size_t)(o.n < SHOWN ? o.n : SHOWN));
    if (!wrong) picture(&o, floor, one, curve);
    free(x), free(fresh), free(out), df_mixture_free(data), df_ctx_free(ctx);
    return wrong;
}
