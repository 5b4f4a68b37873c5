// 14_score_matching: the score of data, learnt in three ways, and an energy whose slope it is.
//
//   You learn    that denoising, implicit (Hyvarinen) and sliced score matching have one
//                minimum, and what each costs; that nets of the score at every noise level
//                sample by annealed Langevin (NCSN); that an energy-based model learns the
//                landscape itself, by denoising or by contrastive divergence.
//   It takes     about a minute on two cores.
//   Out come     score_matching.png, and for each way the error of its score (of p_t, part
//                of the score's size), ms a step, samples' distance to data beside its floor,
//                nats by which energies are off (root mean square). Exits 1 if a score is off by
//                more than 25 % (sliced 32, energies 10, 45), samples .25, energies .35, .45.
//
//   build/14_score_matching [--steps N] [--sample-steps N] [--n N] [--seed N] [--threads N]
//       [--picture FILE]
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "data.h"
#include "draw.h"
#include "options.h"
enum { WAYS = 5, POINTS = 20000, TEST = 4000, GRID = 90 };
static const char *const names[WAYS] = { "denoising", "implicit", "sliced", "energy, denoising",
                                         "energy, contrastive" };
static const double energy_sigma = 0.4, edge = 3.6, most_off[WAYS] = { .25, .25, .32, .1, .45 },
                    most[WAYS] = { .25, .25, .25, .35, .45 };       // distance, nats

static df_ctx *ctx;
static df_mixture *truth;
static df_process path;
static df_real *data;        // [POINTS, 2]
static int on_train(void *user, const df_train_info *info) {
    progress((progress_bar *)user, (long)info->step, (long)info->steps, "loss", info->loss);
    return 0;
}

// Ways 0 to 2: eps at all noise levels, hence the score; 3 and 4: an energy at one of them.
static df_net *train(const options *o, int way, double *milliseconds) {
    static const df_objective_fn objective[WAYS] = { NULL, df_objective_implicit,
        df_objective_sliced, df_objective_energy, df_objective_contrastive };
    df_mlp_desc m = df_mlp_defaults();
    df_train_desc t = df_train_defaults();
    df_objective_desc chain = df_objective_defaults();
    progress_bar bar = progress_begin(names[way]);
    m.width = 96, m.depth = 2, m.embed = 32, m.time_scale = 8, m.seed = o->seed;
    t.card.process = path, t.card.prediction = way < 3 ? DF_EPS : DF_SCORE;
    t.card.time = df_time_log_sigma(0.25), t.card.input_sigma_data = 1.5;
    if (way > 2) t.t_min = df_process_at_rho(&path, energy_sigma).t, t.t_max = t.t_min + 1e-6;
    chain.steps = 10, chain.step = 0.03;
    t.objective = objective[way], t.objective_self = way == 4 ? &chain : NULL;
    t.scaling = DF_SCALING_NONE, t.validation = 0, t.seed = o->seed, t.weight_decay = 0;
    t.batch = 128, t.learning_rate = way == 4 ? 2e-3 : 5e-3, t.ema = 0.995;
    t.steps = o->steps, t.on_step = on_train, t.user = &bar;
    df_net *net = df_mlp_create(ctx, &m);
    df_trainer *tr = df_trainer_create(ctx, net, data, POINTS, NULL, &t);
    double start = progress_seconds();
    int bad = tr == NULL || df_trainer_run(tr, 0) != DF_OK;
    *milliseconds = 1e3 * (progress_seconds() - start) / (double)t.steps;
    df_trainer_free(tr);
    if (bad) df_net_free(net);
    return bad ? NULL : net;
}

// |s - grad log p_t| / |grad log p_t| in L2(p_t); of an energy also the deviation of -E - log p_t.
static int measure(const df_model *m, double *error, double *nats) {
    static df_real x[2 * TEST], answer[2 * TEST], score[2 * TEST], energy[TEST];
    static double t[TEST], log_p[TEST];
    df_point at = df_process_at_rho(&path, energy_sigma);
    double cx, cp, sum = 0, off = 0, mean = 0, square = 0;
    for (int i = 0; i < TEST; i++) t[i] = at.t;
    int bad = df_mixture_sample(ctx, truth, &at, 77, 0, TEST, x) ||
              df_mixture_score(ctx, truth, &at, TEST, x, score) ||
              df_mixture_log_density(ctx, truth, &at, TEST, x, log_p) ||
              df_plane_map(ctx, &path, m->prediction, DF_SCORE, &at, &cx, &cp) ||
              df_model_ask(ctx, m, DF_ASK_PREDICT, t, TEST, x, NULL, NULL, answer);
    if (!bad && m->answers & DF_ASK_LOG_DENSITY)
        bad = df_model_ask(ctx, m, DF_ASK_LOG_DENSITY, t, TEST, x, NULL, NULL, energy);
    for (int i = 0; !bad && i < 2 * TEST; i++) {
        double e = i % 2 ? 0 : ((double)energy[i / 2] - log_p[i / 2]) / TEST;
        off += pow(cx * (double)x[i] + cp * (double)answer[i] - (double)score[i], 2);
        sum += pow((double)score[i], 2), mean += e, square += e * e * TEST;
    }
    *error = sqrt(off / sum), *nats = sqrt(fmax(square - mean * mean, 0));
    return bad;
}

// log p_t, or -E, on a square, less its largest value.
static void landscape(draw_canvas *c, int column, const char *title, const df_model *m) {
    static df_real x[2 * GRID * GRID], v[GRID * GRID];
    static double t[GRID * GRID], log_p[GRID * GRID];
    double range[4] = { -edge, edge, -edge, edge }, most = -1e30;
    df_point at = df_process_at_rho(&path, energy_sigma);
    for (int i = 0; i < GRID * GRID; i++) {
        t[i] = at.t, x[2 * i] = (df_real)(edge * (2 * (i % GRID + 0.5) / GRID - 1));
        x[2 * i + 1] = (df_real)(edge * (2 * (i / GRID + 0.5) / GRID - 1));
    }
    if (m) df_model_ask(ctx, m, DF_ASK_LOG_DENSITY, t, GRID * GRID, x, NULL, NULL, v);
    else df_mixture_log_density(ctx, truth, &at, GRID * GRID, x, log_p);
    for (int i = 0; i < GRID * GRID; i++)
        most = fmax(most, (double)(v[i] = m ? v[i] : (df_real)log_p[i]));
    draw_panel p = draw_frame(c, 10 + 400 * column, 420, 390, 390, title, range, 4);
    draw_heat(&p, v, GRID, GRID, most - 8, most);
}

static int lesson(const options *o, draw_canvas *c) {
    double range[4] = { -edge, edge, -edge, edge }, ms, error = 0, nats = 0, far = 0, floor = 0;
    size_t bytes = 2 * (size_t)o->n * sizeof(df_real);
    df_real *x = (df_real *)malloc(bytes), *fresh = (df_real *)malloc(bytes);
    df_point start = df_point_data();
    int bad = !x || !fresh || df_mixture_sample(ctx, truth, &start, 5, 0, o->n, fresh), wrong = 0;
    if (!bad) df_sliced_wasserstein(ctx, fresh, o->n, data, o->n, 2, 64, 1, &floor);
    printf("%22sscore off  ms/step  samples (floor %.3f), nats off\n", "", floor);
    for (int way = 0; way < WAYS && !bad; way++) {
        df_sample_desc s = df_sample_defaults();
        df_net *net = train(o, way, &ms);
        df_model m = way < 3 ? df_net_model(net) : df_energy_model(net);
        bad = net == NULL || measure(&m, &error, &nats);
        s.method = "annealed_langevin", s.grid = "uniform", s.steps = o->sample_steps;
        s.corrections = 5, s.snr = 0.2, s.end = DF_END_T_MIN, s.seed = o->seed;
        if (!bad && way < 3) bad = df_sample(ctx, &m, &s, x, o->n) != DF_OK;
        if (!bad && way < 3) df_sliced_wasserstein(ctx, fresh, o->n, x, o->n, 2, 64, 1, &far);
        if (!bad) printf(way < 3 ? "%-20s %9.4f %9.2f %9.3f\n" : "%-20s %9.4f %9.2f %25.3f\n",
                         names[way], error, ms, way < 3 ? far : nats);
        if (!bad && way > 2) landscape(c, way - 2, names[way], &m);
        wrong |= error > most_off[way] || (way < 3 ? far : nats) > most[way];
        draw_panel p = draw_frame(c, 10 + 400 * way, 10, 390, 390, names[way], range, 4);
        if (way < 3 && !bad) draw_scatter(&p, x, o->n < 4000 ? o->n : 4000, 2, 1.4,
                                          draw_palette(way), 0.5);
        df_net_free(net);
    }
    landscape(c, 0, "log p_t, the truth", NULL), free(x), free(fresh);
    if (bad) fprintf(stderr, "%s\n", df_ctx_message(ctx));
    else if (wrong) printf("WRONG: see the bounds in the head of this program\n");
    return bad || wrong;
}

int main(int argc, char **argv) {
    options o = options_defaults(argv[0], "score_matching", "", 2500, 60, 10000);
    df_ctx_desc d = df_ctx_defaults();
    draw_canvas c;
    o.without = "--data --method --load --save --csv";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    d.threads = o.threads, ctx = df_ctx_create(&d), path = df_process_ve(0.05, 5);
    truth = df_mixture_ring(ctx, 5, 2, 0.25);
    data = (df_real *)malloc(2 * POINTS * sizeof *data);
    df_point clean = df_point_data();
    int bad = !truth || !data || draw_open(&c, 1210, 830) != 0 ||
              df_mixture_sample(ctx, truth, &clean, o.seed, 0, POINTS, data) != DF_OK;
    if (!bad) bad = lesson(&o, &c), draw_save(&c, o.picture), draw_close(&c);
    free(data), df_mixture_free(truth), df_ctx_free(ctx);
    return bad;
}
