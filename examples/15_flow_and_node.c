// 15_flow_and_node: three ways to an exact likelihood: a coupling flow, a neural ODE trained
// through its solver, the same kind of net trained by flow matching.
//
//   You learn    that all three come near the entropy of 8 Gaussians, 2.839 nats; what each
//                step of training costs: the neural ODE solves its equation with divergence
//                for each batch, flow matching asks the net once; and what a likelihood costs
//                afterwards: one pass, or some hundred questions.
//   It takes     a minute and a half of one core, which two share.
//   Out come     flow_and_node.png and the table. Exits 1 if flow matching is not within .1
//                nat of the entropy, another .3, or two solvers disagree by .01.
//
//   build/15_flow_and_node [--steps N] [--n N] [--seed N] [--threads N] [--picture FILE]
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "draw.h"
#include "options.h"

enum { WAYS = 3, TRAINED = 40000, SIDE = 120 };
static const char *const names[WAYS] = { "coupling flow", "neural ODE", "flow matching" };
static const double steps_of[WAYS] = { 1, 0.3, 2 };          // times --steps
static const double allowed[WAYS] = { 0.3, 0.3, 0.1 }, entropy = 2.839, half = 4.2;
static df_ctx *ctx;
static df_mixture *data;
static df_objective_desc node;
static progress_bar bar;
static const df_point here = { 0, 1, 0, INFINITY };
static df_real image[1 + WAYS][SIDE * SIDE];                 // densities, the truth first

static df_net *train(int way, const df_real *x, const options *o, double *seconds) {
    df_coupling_desc f = df_coupling_defaults();
    df_mlp_desc m = df_mlp_defaults();
    df_train_desc d = df_train_defaults();
    f.width = 64, f.seed = m.seed = d.seed = o->seed;
    m.width = way == 1 ? 64 : 128, m.depth = way == 1 ? 2 : 3, m.embed = 8;
    m.time_scale = 4;                            // a field that changes slowly needs few steps
    if (way == 0) d.objective = df_objective_flow_likelihood;
    if (way == 1) d.objective = df_objective_node, d.objective_self = &node;
    d.steps = (int64_t)(o->steps * steps_of[way]);
    d.scaling = DF_SCALING_NONE, d.on_step = progress_on_step, d.user = &bar;
    d.weight_decay = 0, d.validation = 0, d.ema = 0.99, d.warmup = 50;
    d.learning_rate = way == 1 ? 5e-3 : 2e-3, d.report = 10;
    df_net *net = way == 0 ? df_coupling_create(ctx, &f) : df_mlp_create(ctx, &m);
    df_trainer *trainer = df_trainer_create(ctx, net, x, TRAINED, NULL, &d);
    bar = progress_begin(names[way]);
    int ok = trainer != NULL && df_trainer_run(trainer, 0) == DF_OK;
    *seconds = progress_seconds() - bar.start;
    df_trainer_free(trainer);
    if (!ok) df_net_free(net), net = NULL;
    return net;
}

// log p of x [n, 2]: by the flow, or by RK4 in so many steps.
static int log_density(const df_net *net, const df_real *x, int n, int steps, double *out) {
    df_run run = df_run_defaults(ctx, net);
    for (int i = 0, shape[2] = { 0, 2 }; i < n; i += shape[0]) {
        df_scope scope = df_scope_begin(ctx);
        shape[0] = n - i < 2000 ? n - i : 2000;
        df_tensor *y = df_tensor_copy(ctx, 2, shape, x + 2 * i);
        y = steps ? df_node_log_density(&run, steps, y, NULL, NULL)
                  : df_coupling_log_density(&run, y);
        for (int k = 0; y && k < shape[0]; k++) out[i + k] = (double)y->data[k];
        df_scope_end(ctx, scope, NULL);
        if (y == NULL) return 1;
    }
    return 0;
}

// One row of the table; 1: something failed or does not hold.
static int row(int way, const df_net *net, double seconds, const df_real *x, int n,
               const double *truth, const options *o, double *out) {
    static df_real grid[2 * SIDE * SIDE];
    static double p[SIDE * SIDE];
    double nll = 0, gap = 0, apart = 0, trained = o->steps * steps_of[way];
    df_likelihood_desc l = df_likelihood_defaults();
    df_model model = df_net_model(net);
    int asked = 1;
    l.evaluations = &asked, l.walk.rtol = l.walk.atol = 1e-3;
    double start = progress_seconds();
    if (way == 0 ? log_density(net, x, n, 0, out) != 0
                 : df_log_likelihood(ctx, &model, &l, x, n, out) != DF_OK) return 1;
    double spent = progress_seconds() - start;
    for (int i = 0; i < n; i++) nll -= out[i] / n, gap += (truth[i] - out[i]) / n;
    if (way > 0 && log_density(net, x, n, 64, out) != 0) return 1;
    for (int i = 0; i < n && way > 0; i++) apart += out[i] / n;
    for (int i = 0; i < SIDE * SIDE; i++) {
        grid[2 * i] = (df_real)(half * (2 * (i % SIDE + 0.5) / SIDE - 1));
        grid[2 * i + 1] = (df_real)(half * (2 * (i / SIDE + 0.5) / SIDE - 1));
    }
    df_mixture_log_density(ctx, data, &here, SIDE * SIDE, grid, p);
    for (int i = 0; i < SIDE * SIDE; i++) image[0][i] = (df_real)exp(p[i]);
    if (log_density(net, grid, SIDE * SIDE, way ? 24 : 0, p) != 0) return 1;
    for (int i = 0; i < SIDE * SIDE; i++) image[1 + way][i] = (df_real)exp(p[i]);
    int wrong = !(gap < allowed[way] && gap > -0.02) || (way > 0 && fabs(apart + nll) > 0.01);
    printf("%-14s %8.3f %8.3f %9.0f %9.1f %8.2f %10d %9.1f%s\n", names[way], nll, gap, trained,
           seconds, 1e3 * seconds / trained, asked, 1e6 * spent / n, wrong ? "  WRONG" : "");
    fflush(stdout);
    return wrong;
}

int main(int argc, char **argv) {
    options o = options_defaults(argv[0], "flow_and_node", "", 2000, 0, 2000);
    df_ctx_desc c = df_ctx_defaults();
    draw_canvas canvas;
    double range[4] = { -half, half, -half, half }, seconds = 0, exact = 0;
    o.without = "--data --method --sample-steps --load --save --csv --list";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    c.threads = o.threads, ctx = df_ctx_create(&c);
    data = df_mixture_ring(ctx, 8, 2 * sqrt(2), sqrt(0.125));
    node = df_objective_defaults(), node.steps = 5;
    df_real *x = (df_real *)malloc((size_t)(TRAINED + o.n) * 2 * sizeof *x);
    double *truth = (double *)malloc((size_t)o.n * 2 * sizeof *truth);
    const df_real *held = x + 2 * TRAINED;
    int wrong = x == NULL || truth == NULL || data == NULL ||
                df_mixture_sample(ctx, data, &here, o.seed, 0, TRAINED + o.n, x) ||
                df_mixture_log_density(ctx, data, &here, o.n, held, truth);
    for (int i = 0; i < o.n && !wrong; i++) exact -= truth[i] / o.n;
    printf("entropy %.3f; of the %d held out %.3f. nll - that is KL(data || model)\n"
           "                    nll       KL     steps   seconds  ms/step  questions us/sample\n",
           entropy, o.n, exact);
    for (int way = 0; way < WAYS && !wrong; way++) {
        df_net *net = train(way, x, &o, &seconds);
        wrong = !net || row(way, net, seconds, held, o.n, truth, &o, truth + o.n);
        df_net_free(net);
    }
    if (wrong) fprintf(stderr, "15_flow_and_node: off, or failed: %s\n", df_ctx_message(ctx));
    if (!wrong && draw_open(&canvas, 1260, 340) == 0) {
        for (int k = 0; k <= WAYS; k++) {
            draw_panel p = draw_frame(&canvas, 10 + 312 * k, 10, 304, 320,
                                      k ? names[k - 1] : "8 Gaussians", range, 0);
            draw_heat(&p, image[k], SIDE, SIDE, 0, 0.16);
        }
        draw_save(&canvas, o.picture), draw_close(&canvas);
    }
    free(x), free(truth), df_mixture_free(data), df_ctx_free(ctx);
    return wrong > 0;
}
