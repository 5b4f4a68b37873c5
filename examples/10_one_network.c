// 10_one_network: one trained network, read in every coordinate: as a prediction of eps, x_0,
// the score, the velocity, v, EDM's F, the straight line.
//
//   You learn    that predictions are coordinates: a model made of the net by one linear map
//                (the plane) has another loss, and draws the same samples. That the losses
//                differ by a weight alone, and that in likelihood (|lambda'| alpha^2/det^2)
//                all of them are one curve: what is trained is the weight, not the name.
//   It takes     about 20 seconds on two cores, training in double, to see equal numbers.
//   Out come     one_network.png, and for each reading its loss, the same weighted, and how
//                far its samples are from the net's own. Exits 1 if weighted losses differ
//                by more than 1e-10 of their size, or samples by more than 1e-11.
//
//   build/10_one_network [--data moons|8gaussians|...] [--steps N] [--sample-steps N] [--n N]
//       [--seed N] [--threads N] [--picture FILE]
#define DIFFUSION_DOUBLE
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "data.h"
#include "draw.h"
#include "options.h"
enum { READINGS = DF_PREDICTION_COUNT, TIMES = 40, SHOWN = 9, ROWS = 2000 };
static const double equal_loss = 1e-10, equal_points = 1e-11;

static df_ctx *ctx;
static int on_train(void *user, const df_train_info *info) {
    progress((progress_bar *)user, (long)info->step, (long)info->steps, "loss", info->loss);
    return 0;
}

// The network's own v, answered as something else: as[0] is the net's model, as[1] this one.
static int answer(void *self, df_ctx *c, const df_query *q, df_real *out) {
    const df_model *as = (const df_model *)self;
    int result = as[0].predict(as[0].self, c, q, out);
    return result != DF_OK ? result :
           df_plane_convert(c, &as[0].process, as[0].prediction, as[1].prediction, q->t,
                            q->n, q->dim, q->x, out, out);
}

static df_net *train(const options *o, const data_set *d) {
    df_mlp_desc m = df_mlp_defaults();
    df_train_desc t = df_train_defaults();
    progress_bar bar = progress_begin("training");
    m.width = 64, m.depth = 2, m.embed = 32, m.time_scale = 8, m.seed = o->seed;
    t.card.process = df_process_vp(0.1, 20), t.card.prediction = DF_V;
    t.card.time = df_time_log_sigma(0.25), t.density = DF_DENSITY_LAMBDA;
    t.steps = o->steps, t.learning_rate = 8e-3, t.weight_decay = 0, t.seed = o->seed;
    t.ema = 0.995, t.batch = 64, t.on_step = on_train, t.user = &bar;
    df_net *net = df_mlp_create(ctx, &m);
    df_trainer *tr = df_trainer_create(ctx, net, d->x, d->n / 2, NULL, &t);
    int bad = tr == NULL || df_trainer_run(tr, 0) != DF_OK;
    df_trainer_free(tr);
    if (bad) df_net_free(net), net = NULL;
    return net;
}

// E|answer - target|^2 of a reading at one time, on points and noise that are always the
// same; and the likelihood weight there.
static int loss_at(const df_model *m, double t, const df_real *data, double *loss, double *w) {
    static df_real x0[2 * ROWS], x[2 * ROWS], eps[2 * ROWS], y[2 * ROWS];
    static double times[ROWS];
    df_point at = df_process_at(&m->process, t);
    double row[2];
    df_random_normal(1, 0, 9, 2 * ROWS, eps), *loss = 0;
    for (int i = 0; i < 2 * ROWS; i++) {
        x0[i] = (data[i] - m->mean[0]) / m->scale[0];
        times[i / 2] = t, x[i] = at.alpha * x0[i] + at.sigma * eps[i];
    }
    int bad = df_model_ask(ctx, m, DF_ASK_PREDICT, times, ROWS, x, NULL, NULL, y) ||
              df_plane_row(ctx, &m->process, m->prediction, &at, row) ||
              df_likelihood_weight(ctx, &m->process, m->prediction, t, w);
    for (int i = 0; !bad && i < 2 * ROWS; i++)
        *loss += pow(y[i] - row[0] * x0[i] - row[1] * eps[i], 2) / ROWS;
    return bad;
}

static void picture(const options *o, const data_set *d, df_real *const *x,
                    df_real (*curve)[READINGS][2 * TIMES], const char *const *names) {
    double range[4], over_t[4] = { 0, 1, 1e-3, 1e4 };
    unsigned colours[READINGS];
    draw_canvas c;
    if (draw_open(&c, 1210, 960) != 0) return;
    draw_range(d->x, d->n, 2, 1, range);
    for (int k = -1; k < READINGS; k++) {
        int at = k + 1, n = o->n < 3000 ? o->n : 3000;
        unsigned colour = k < 0 ? DRAW_TEXT : (colours[k] = draw_palette(k));
        draw_panel p = draw_frame(&c, 10 + at % 4 * 300, 10 + at / 4 * 290, 290, 280,
                                  k < 0 ? "data" : names[k], range, 4);
        draw_scatter(&p, k < 0 ? d->x : x[k], n, 2, 1.3, colour, 0.5);
    }
    for (int w = 0; w < 2; w++) {
        const char *title = w ? "in likelihood: one curve, seven times" : "losses: seven curves";
        draw_panel p = draw_frame_log(&c, 10 + w * 600, 600, 590, 350, title, over_t, 6, 0, 1);
        for (int k = 0; k < READINGS; k++)
            if (w == 0) draw_polyline(&p, curve[0][k], TIMES, 2, 2.2, colours[k], 1);
        for (int i = 0; w == 1 && i + 1 < TIMES; i++)  // each stretch from another reading
            draw_polyline(&p, curve[1][i % READINGS] + 2 * i, 2, 2, 3, colours[i % READINGS], 1);
        draw_axes(&p, "t", w ? "w E|error|^2" : "E|error|^2");
        draw_legend(&p, READINGS, names, colours);
    }
    draw_save(&c, o->picture), draw_close(&c);
}

static int lesson(const options *o, const data_set *d, const df_net *net) {
    static df_real curve[2][READINGS][2 * TIMES], *x[READINGS];
    static df_model as[READINGS][2];
    static const char *names[READINGS];
    int bad = 0;
    printf("read as    loss at t = .24    in likelihood     off, any t   samples off\n");
    for (int k = 0; k < READINGS; k++) {
        df_sample_desc s = df_sample_defaults();
        double off = 0, far = 0, loss, w;
        as[k][0] = as[k][1] = df_net_model(net);
        df_model *m = &as[k][1];
        m->prediction = (df_prediction)k, m->predict = answer, m->self = as[k];
        names[k] = df_prediction_name(m->prediction);
        for (int i = 0; i < TIMES; i++) {
            double t = 0.02 + 0.96 * i / (TIMES - 1);
            bad |= loss_at(m, t, d->x + d->n, &loss, &w);
            curve[0][k][2 * i] = curve[1][k][2 * i] = t, curve[0][k][2 * i + 1] = loss;
            curve[1][k][2 * i + 1] = w * loss;
            off = fmax(off, fabs(w * loss / curve[1][0][2 * i + 1] - 1));
        }
        s.method = "dpmpp_2m", s.grid = "lambda", s.steps = o->sample_steps, s.seed = o->seed;
        x[k] = (df_real *)malloc((size_t)o->n * 2 * sizeof(df_real));
        bad |= x[k] == NULL || df_sample(ctx, m, &s, x[k], o->n) != DF_OK;
        for (int i = 0; !bad && i < 2 * o->n; i++) far = fmax(far, fabs(x[k][i] - x[0][i]));
        printf("%-9s %16.6f %18.13f %12.1e %12.1e\n", names[k],
               curve[0][k][2 * SHOWN + 1], curve[1][k][2 * SHOWN + 1], off, far);
        if (bad) fprintf(stderr, "%s\n", df_ctx_message(ctx));
        if (off > equal_loss || far > equal_points) bad = 1, printf("  which is WRONG\n");
    }
    if (!bad) picture(o, d, x, curve, names);
    for (int k = 0; k < READINGS; k++) free(x[k]);
    return bad;
}

int main(int argc, char **argv) {
    options o = options_defaults(argv[0], "one_network", "moons", 10000, 20, 3000);
    df_ctx_desc c = df_ctx_defaults();
    data_set d;
    o.without = "--method --load --save --csv";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    c.threads = o.threads, ctx = df_ctx_create(&c);
    int bad = data_points(&d, o.data, 10000, o.seed);
    df_net *net = bad ? NULL : train(&o, &d);
    if (net == NULL) fprintf(stderr, "%s\n", bad == 1 ? "no such data" : df_ctx_message(ctx));
    bad = net == NULL || lesson(&o, &d, net);
    df_net_free(net), df_ctx_free(ctx), data_free(&d);
    return bad;
}
