// 07_policy: a robot's controller draws whole ways around an obstacle, as it was shown some.
//
//   You learn    to condition a net on what the robot sees; a training loop of your own; why
//                a policy is sampled: the mean of two good ways, which regression learns
//                and one step of Euler from the noise gives, is a collision.
//   It takes     about a minute on two cores.
//   Out come     policy.png and how many trajectories arrive without touching, for tasks not
//                seen in training. Exits 1 below 95 %, or a quarter on either side.
//
//   build/07_policy [--steps N] [--n N] [--method NAME] [--sample-steps N] [--seed N] ...
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include "draw.h"
#include "options.h"

enum { T = 16, DIM = 2 * T, SEEN = 6, DEMOS = 4096, BATCH = 64, SHOWN = 4, EACH = 24 };
static const double radius = 0.3, at_least = 0.95, pi = 3.14159265358979;
static const char *const names[3] = {"demonstrations", "samples", "one step: mean"};

// Task i of a seed: start, goal and obstacle, seen [6]; take number `take` at it, x [T, 2], a
// bow over the straight line with its top beside the obstacle, on the side a coin says.
static void demonstrate(uint64_t seed, uint64_t i, int take, df_real *seen, df_real *x) {
    double u[3], coin[2];
    df_random_uniform(seed, i, 0, 3, u);
    df_random_uniform(seed, i, 1 + (uint32_t)take, 2, coin);
    double y0 = u[0] - 0.5, rise = u[1] - u[0], q = 0.35 + 0.3 * u[2], bend = log(0.5) / log(q);
    double h = (coin[1] < 0.5 ? -1 : 1) * (0.42 + 0.1 * coin[0]) / sqrt(4 + rise * rise);
    seen[0] = -1, seen[1] = (df_real)y0, seen[2] = 1, seen[3] = (df_real)(y0 + rise);
    seen[4] = (df_real)(2 * q - 1), seen[5] = (df_real)(y0 + q * rise);
    for (int k = 0; k < T; k++, x += 2) {
        double s = k / (T - 1.0), bow = h * sin(pi * pow(s, bend));
        x[0] = (df_real)(2 * s - 1 - bow * rise), x[1] = (df_real)(y0 + s * rise + 2 * bow);
    }
}

// Side on which a trajectory passes: 1 left, -1 right; 0: it starts or ends elsewhere, or touches.
static int side_of(const df_real *seen, const df_real *x) {
    double least = 10, side = 0;
    if (hypot(x[0] - seen[0], x[1] - seen[1]) > 0.05) return 0;
    if (hypot(x[DIM - 2] - seen[2], x[DIM - 1] - seen[3]) > 0.05) return 0;
    for (int k = 0; k < 10 * (T - 1); k++) {         // ten looks between two points
        const df_real *p = x + k / 10 * 2;
        double u = k % 10 / 10.0, px = (1 - u) * p[0] + u * p[2] - seen[4];
        double py = (1 - u) * p[1] + u * p[3] - seen[5], far = hypot(px, py);
        if (far < least) least = far, side = 2 * py - (seen[3] - seen[1]) * px;
    }
    return least < radius ? 0 : side > 0 ? 1 : -1;
}

// Descends E |net(x_t, t, seen) - x_0|^2, x_t = (1 - t) x_0 + t eps; leaves the average.
static df_result train(df_ctx *ctx, const options *o, df_net *net) {
    static df_real xt[BATCH * DIM], x0[BATCH * DIM], seen[BATCH * SEEN], t[BATCH];
    const int shape[3] = {BATCH, T, 2}, wide[2] = {BATCH, SEEN};
    size_t size = df_net_size(net);
    df_real *g = (df_real *)calloc(4 * size, sizeof *g), *w = df_net_weights(net);
    df_adamw adamw = {0, 0.9, 0.999, 1e-8, 0.01};
    df_run run = df_run_defaults(ctx, net);
    df_result result = g != NULL ? DF_OK : DF_ERR_MEMORY;
    progress_bar bar = progress_begin("training");
    for (int step = 1; step <= o->steps && result == DF_OK; step++) {
        for (int r = 0; r < BATCH; r++) {
            uint64_t draw = (uint64_t)step * BATCH + (uint64_t)r;
            double u[2];
            df_random_uniform(o->seed + 1, draw, 0, 2, u);
            df_random_normal(o->seed + 1, draw, 1, DIM, xt + r * DIM);
            demonstrate(o->seed, (uint64_t)(u[0] * DEMOS), 0, seen + r * SEEN, x0 + r * DIM);
            t[r] = (df_real)(100 * u[1]);            // native time, as the card says
            for (int i = r * DIM; i < (r + 1) * DIM; i++)
                xt[i] = (df_real)((1 - u[1]) * x0[i] + u[1] * xt[i]);
        }
        run.grads = (df_real *)memset(g, 0, size * sizeof *g);
        df_scope scope = df_scope_begin(ctx);
        df_record_begin(ctx);
        run.condition = df_tensor_copy(ctx, 2, wide, seen);
        df_tensor *y = df_run_net(&run, df_tensor_copy(ctx, 3, shape, xt),
                                  df_tensor_copy(ctx, 1, shape, t), NULL);
        y = df_mse(ctx, y, df_tensor_copy(ctx, 3, shape, x0));
        result = df_backward(ctx, y);
        progress(&bar, step, o->steps, "loss", result == DF_OK ? (double)y->data[0] : 0);
        df_record_end(ctx);
        df_scope_end(ctx, scope, NULL);
        adamw.learning_rate = 1e-3 * fmin(step / 50.0, 1 + cos(pi * step / (o->steps + 1)));
        df_adamw_step(ctx, &adamw, step, size, w, g + size, g + 2 * size, g,
                      df_clip_factor(ctx, size, g, 1, NULL));
        df_ema_step(ctx, size, g + 3 * size, w, df_ema_warmup(0.99, step - 1));
    }
    if (result == DF_OK) memcpy(w, g + 3 * size, size * sizeof *w);
    free(g);
    return result;
}

static void picture(const options *o, df_real *const x[3], const df_real *seen) {
    const double range[4] = {-1.25, 1.25, -1.05, 1.05};
    draw_canvas c;
    if (draw_open(&c, SHOWN * 330 + 20, 3 * 290 + 20) != 0) return;
    for (int k = 0; k < 3 * SHOWN; k++) {
        const df_real *s = seen + k % SHOWN * EACH * SEEN;
        int left = 10 + k % SHOWN * 330, top = 10 + k / SHOWN * 290;
        draw_panel p = draw_frame(&c, left, top, 320, 280, names[k / SHOWN], range, 0);
        draw_scatter(&p, s + 4, 1, 2, radius * 320 / 2.5, DRAW_AXIS, 1);
        for (int i = 0; i < EACH; i++) {             // colour: left, right, failed
            const df_real *path = x[k / SHOWN] + (k % SHOWN * EACH + i) * DIM;
            draw_polyline(&p, path, T, 2, 1.5, draw_palette((4 - side_of(s, path)) % 4), 0.7);
        }
        draw_scatter(&p, s, 2, 2, 5, DRAW_INK, 1);
    }
    draw_save(&c, o->picture), draw_close(&c);
}

// Trajectories for four tasks, 24 each, then for one task each. 0 if the samples do well.
static int judge(df_ctx *ctx, const options *o, const df_net *net) {
    int n = o->n < SHOWN * EACH ? SHOWN * EACH : o->n, count[3][3] = {{0}}, failed = 0;
    df_model model = df_net_model(net);
    df_sample_desc s = df_sample_defaults();
    df_real *x[3], *seen = (df_real *)malloc((size_t)n * (3 * DIM + SEEN) * sizeof *seen);
    s.condition = seen, s.condition_stride = SEEN, s.seed = o->seed + 3;
    for (int k = 0; k < 3 && seen != NULL && !failed; k++) {
        x[k] = seen + n * SEEN + k * n * DIM;
        for (int i = 0; i < n && k == 0; i++)
            demonstrate(o->seed + 2, (uint64_t)(i < SHOWN * EACH ? i / EACH : i), i % EACH,
                        seen + i * SEEN, x[0] + i * DIM);
        s.method = k == 1 ? o->method : "euler", s.steps = k == 1 ? o->sample_steps : 1;
        failed = k > 0 && df_sample(ctx, &model, &s, x[k], n) != DF_OK;
        for (int i = 0; i < n; i++) count[k][1 + side_of(seen + i * SEEN, x[k] + i * DIM)]++;
        printf("%-14s %5.1f %% arrive, %4.1f %% left, %4.1f %% right of the obstacle\n", names[k],
               100 - 100.0 * count[k][1] / n, 100.0 * count[k][2] / n, 100.0 * count[k][0] / n);
    }
    if (seen != NULL && !failed) picture(o, x, seen);
    free(seen);
    return n - count[1][1] < at_least * n || 4 * count[1][0] < n || 4 * count[1][2] < n;
}

int main(int argc, char **argv) {
    options o = options_defaults(argv[0], "policy", "", 800, 16, 1000);
    df_unet1d_desc d = df_unet1d_defaults();
    df_ctx_desc c = df_ctx_defaults();
    df_card card = df_card_defaults();
    o.without = "--data --load --save --csv";
    if (options_read(&o, argc, argv) != 0) return o.help ? 0 : 2;
    d.channels = 2, d.length = T, d.condition = SEEN, d.embed = 64, d.seed = o.seed;
    d.width[0] = 32, d.width[1] = 64, d.width[2] = 128;
    card.prediction = DF_X0, card.time = df_time_affine(100, 0), c.threads = o.threads;
    df_ctx *ctx = df_ctx_create(&c);
    df_net *net = df_unet1d_create(ctx, &d);
    int wrong = !net || !df_sampler_find(ctx, o.method) || df_net_set_card(ctx, net, &card) ||
                train(ctx, &o, net) != DF_OK || judge(ctx, &o, net);
    if (ctx != NULL && df_ctx_error(ctx) != DF_OK) fprintf(stderr, "%s\n", df_ctx_message(ctx));
    df_net_free(net), df_ctx_free(ctx);
    return wrong;
}
