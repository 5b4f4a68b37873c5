// laboratory.h: what 13_langevin_robustness needs beside its lesson: the true model, chains that
// are watched, a net that memorises, the paper's integrals, the picture. After diffusion.h.
#ifndef LABORATORY_H
#define LABORATORY_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "draw.h"

enum { LAB_CHAINS = 4096, LAB_DIMS = 5, LAB_TIMES = 6, LAB_FEW = 400 };
typedef struct lab {
    df_ctx *ctx;
    int dim;
    double mean, var;        // data: N(mean, var I)
    double far;              // how far from the origin counts as out
    int patient;             // 0: the run ends when all chains have been out
    double clip;             // > 0: Langevin dynamics holds x_0 within
    float out[LAB_CHAINS];   // the step at which a chain was first out, from 1; 0: never
    df_flaw flaw;
    df_model truth, flawed;
    df_real curve[6][2 * LAB_TIMES];      // (d, value), and of section 4's chains (correlation
    df_real pairs[3][2 * LAB_FEW];        // with the start, distance): see lab_picture
} lab;

// The true score in the guise of eps: a user's own model.
static inline int lab_predict(void *self, df_ctx *ctx, const df_query *q, df_real *out) {
    const lab *l = (const lab *)self;
    (void)ctx;
    for (int i = 0; i < q->n * q->dim; i++) {
        double a = q->alpha[i / q->dim], s = q->sigma[i / q->dim];
        out[i] = (df_real)(s * ((double)q->x[i] - a * l->mean) / (a * a * l->var + s * s));
    }
    return 0;
}

// Data of dim numbers on a process, and a model with wells of these radii times sqrt(dim).
static inline void lab_set(lab *l, int dim, df_process p, double mean, double var, double pull,
                           double inner, double outer) {
    l->dim = dim, l->mean = mean, l->var = var, l->clip = 0;
    l->truth = df_model_defaults();
    l->truth.predict = lab_predict, l->truth.self = l, l->truth.dim = dim;
    l->truth.process = p, l->truth.prediction = DF_EPS;
    l->flaw = df_flaw_defaults();
    l->flaw.model = &l->truth, l->flaw.pull = pull;
    l->flaw.inner = inner * sqrt(dim), l->flaw.outer = outer * sqrt(dim);
    l->flawed = df_flaw_model(&l->flaw);
}

static inline int lab_watch(void *user, const df_step_info *info) {
    lab *l = (lab *)user;
    int waiting = 0;
    for (int i = 0; i < info->n; i++) {
        double square = 0;
        for (int j = 0; j < l->dim; j++) square += pow((double)info->x[i * l->dim + j], 2);
        if (l->out[i] <= 0 && square >= l->far * l->far) l->out[i] = (float)(info->step + 1);
        waiting += l->out[i] <= 0;
    }
    return !l->patient && waiting == 0;
}

// Langevin dynamics where the process ends, t = 1, from x [n, dim]; the fraction that was ever out.
static inline double lab_langevin(lab *l, const df_model *m, df_real *x, int n, int steps,
                                  double h, uint64_t seed) {
    df_sample_desc d = df_sample_defaults();
    int out = 0, result;
    d.method = "langevin", d.steps = steps, d.langevin_step = h, d.start = DF_START_GIVEN;
    d.seed = seed, d.on_step = lab_watch, d.user = l, d.clip = l->clip;
    memset(l->out, 0, sizeof l->out);
    result = df_sample(l->ctx, m, &d, x, n);
    if (result < 0) fprintf(stderr, "%s\n", df_ctx_message(l->ctx));
    for (int i = 0; i < n; i++) out += l->out[i] > 0;
    return result < 0 ? -1 : out / (double)n;
}

// Theorem 1's error (pull 2, radii 4 and 5) where p_t = N(7 alpha, I): (E |b|^2)^(1/2), and the
// mass of the ball: integrals over x's part along the mean and the length of the rest.
static inline double lab_ball(int dim, double alpha, double *mass) {
    enum { N = 120 };
    double root = sqrt(dim), R = 5 * root, A = 7 * alpha * root, sum = 0;
    double chi = (1 - .5 * (dim - 1)) * log(2.0) - lgamma(.5 * (dim - 1)) - .5 * log(6.283185307);
    *mass = 0;
    for (int i = 0; i < 2 * N; i++)
        for (int k = 0; k < N; k++) {
            double x = R * ((i + .5) / N - 1), r = R * (k + .5) / N, far = hypot(x, r) / root;
            double log_p = chi + (dim - 2) * log(r) - r * r / 2 - .5 * (x - A) * (x - A);
            double hold = fmin(fmax(5 - far, 0), 1), p = exp(log_p) * R / N * R / N;
            sum += p * hold * hold * ((x + A) * (x + A) + r * r);     // -2 x - (A - x)
            *mass += far < 5 ? p : 0;
        }
    return sqrt(sum);
}
static inline int lab_ball_at(void *user, df_ctx *ctx, const df_point *at, double *out) {
    double mass;
    (void)ctx;
    *out = lab_ball(((const lab *)user)->dim, at->alpha, &mass);
    return 0;
}

// What ddpm (variance LARGE) makes of N(mean, I) on VP with a score off by eps at each of its
// times. Its transitions are the true ones but for eps: mean off by (1/r - r) b, variance 1 - r^2,
// r = alpha_t/alpha_s for a step t -> s. Hence KL(true paths | its) = eps^2/2 sum (1/r^2 - 1) of
// the score, plus KL(p_T | N(0, sigma_T^2 I)) of the start, and TV <= sqrt(KL/2) (Pinsker), to p
// where the run ends. With the exact score only the start is off, and its mean and variance
// reach the end by the factor alpha_T/alpha of the noise. shift: how far an error of size eps in
// one direction moves the mean, sum (1/r - r) eps alpha_s/alpha; 2 eps if steps are short.
typedef struct lab_end { double kl_score, kl_start, mean, var, shift; } lab_end;
static inline int lab_ddpm(const lab *l, const df_sample_desc *d, double eps, lab_end *out) {
    df_point at[1001];
    int count;
    if (df_grid(l->ctx, &l->truth.process, d, at, 1001, &count) != DF_OK) return -1;
    double a = at[0].alpha * at[0].alpha, end = at[count - 1].alpha;
    out->kl_start = .5 * l->dim * ((1 + l->mean * l->mean) * a / (1 - a) + log1p(-a));
    out->mean = l->mean * (end - a / end), out->var = 1 - a * a / (end * end);
    out->kl_score = out->shift = 0;
    for (int i = 1; i < count; i++) {
        double r = at[i - 1].alpha / at[i].alpha;
        out->kl_score += .5 * eps * eps * (1 / (r * r) - 1);
        out->shift += eps * (1 / r - r) * at[i].alpha / end;
    }
    return 0;
}

// Samples x [n, dim]: mean and variance of all numbers, and how many lie within `radius`.
static inline int lab_moments(const df_real *x, int n, int dim, double radius, double *mean,
                              double *var) {
    int inside = 0;
    *mean = *var = 0;
    for (int i = 0; i < n; i++) {
        double square = 0, sum = 0;
        for (int j = 0; j < dim; j++, x++) sum += (double)*x, square += (double)*x * (double)*x;
        *mean += sum / n / dim, *var += square / n / dim, inside += square < radius * radius;
    }
    *var -= *mean * *mean;
    return inside;
}

// count numbers of N(mean, var).
static inline void lab_normal(uint64_t seed, uint64_t stream, int count, double mean, double var,
                              df_real *out) {
    df_random_normal(seed, stream, 0, (size_t)count, out);
    for (int i = 0; i < count; i++) out[i] = (df_real)(mean + sqrt(var) * (double)out[i]);
}

// Chains x [n, dim] after their starts: means of the distance to the nearest of the points, over
// sqrt(dim), of the correlation with the start (about `mean`), and how many lie within `radius`
// sqrt(dim) of a point. pairs [n, 2] or NULL: correlation and distance of each.
typedef struct lab_memory { double nearest, corr; int held; } lab_memory;
static inline lab_memory lab_recall(const lab *l, const df_real *x, const df_real *from, int n,
                                    const df_real *points, int count, double radius,
                                    df_real *pairs) {
    lab_memory m = { 0, 0, 0 };
    for (int i = 0; i < n; i++, x += l->dim, from += l->dim) {
        double ab = 0, aa = 1e-9, bb = 1e-9, nearest = 1e99;
        for (int p = 0; p < count; p++) {
            double square = 0;
            for (int j = 0; j < l->dim; j++)
                square += pow((double)x[j] - (double)points[p * l->dim + j], 2);
            nearest = fmin(nearest, sqrt(square / l->dim));
        }
        for (int j = 0; j < l->dim; j++) {
            double a = (double)x[j] - l->mean, b = (double)from[j] - l->mean;
            ab += a * b, aa += a * a, bb += b * b;
        }
        m.nearest += nearest / n, m.corr += ab / sqrt(aa * bb) / n, m.held += nearest <= radius;
        if (pairs == NULL) continue;
        pairs[2 * i] = (df_real)(ab / sqrt(aa * bb)), pairs[2 * i + 1] = (df_real)nearest;
    }
    return m;
}

// A net's eps where the process ends, at one noise level, learnt from n samples of N(mean, var I)
// and `copies` copies of each of the points; NULL if it fails.
static inline int lab_on_train(void *user, const df_train_info *info) {
    progress((progress_bar *)user, (long)info->step, (long)info->steps, "loss", info->loss);
    return 0;
}
static inline df_net *lab_learn(const lab *l, const df_real *points, int count, int copies, int n,
                                int steps, uint64_t seed) {
    size_t dim = (size_t)l->dim, rows = (size_t)n + (size_t)count * (size_t)copies;
    df_real *data = (df_real *)malloc(rows * dim * sizeof *data);
    df_mlp_desc m = df_mlp_defaults();
    df_train_desc t = df_train_defaults();
    progress_bar bar = progress_begin("learning");
    m.dim = l->dim, m.width = 256, m.depth = 2, m.embed = 2, m.seed = seed;
    t.card.process = l->truth.process, t.card.prediction = DF_EPS;
    t.card.time = df_time_log_sigma(.25), t.card.input_sigma_data = sqrt(l->var);
    t.t_min = 1 - 1e-6, t.scaling = DF_SCALING_NONE, t.validation = 0, t.ema = 0;
    t.weight_decay = 0, t.steps = steps, t.seed = seed, t.on_step = lab_on_train, t.user = &bar;
    if (data == NULL) return NULL;
    lab_normal(seed, 20, n * l->dim, l->mean, l->var, data);
    for (size_t i = 0; i < (size_t)copies; i++)
        memcpy(data + ((size_t)n + i * (size_t)count) * dim, points,
               (size_t)count * dim * sizeof *data);
    df_net *net = df_mlp_create(l->ctx, &m);
    df_trainer *tr = df_trainer_create(l->ctx, net, data, (int)rows, NULL, &t);
    int bad = tr == NULL || df_trainer_run(tr, 0) != DF_OK;
    if (bad) fprintf(stderr, "%s\n", df_ctx_message(l->ctx)), df_net_free(net);
    df_trainer_free(tr), free(data);
    return bad ? NULL : net;
}

// Mean time that dx = -2 x dt + sqrt 2 dW takes from 0 to |x| = R: int_0^R int_0^y p(z)/p(y) dz dy,
// p(r) = r^(dim-1) e^(-r^2).
static inline double lab_escape(int dim, double R) {
    enum { N = 4000 };
    double below = 0, time = 0;
    for (int i = 0; i < N; i++) {
        double y = R * (i + .5) / N, log_p = (dim - 1) * log(y) - y * y;
        below += .5 * exp(log_p) * R / N, time += below * exp(-log_p) * R / N;
        below += .5 * exp(log_p) * R / N;
    }
    return time;
}
// Powers of ten, times to leave, and where section 4's chains (kinds: their starts) are.
static inline void lab_picture(const lab *l, draw_canvas *c, const char *const kinds[3]) {
    static const char *const names[6] = { "Langevin dynamics: TV at least",
        "diffusion: TV at most", "error of the score, L2", "mass of the ball",
        "Langevin dynamics", "theory" };
    const unsigned colours[6] = { draw_palette(3), draw_palette(1), draw_palette(0),
                                  draw_palette(2), draw_palette(3), DRAW_TEXT };
    double range[4] = { 0, 52, -52, 22 }, times[4] = { 0, 13, .3, 30 }, at[4] = { -.7, 1.3, 0, 3 };
    draw_panel q = draw_frame(c, 10, 10, 580, 440, "theorem 1: powers of ten", range, 6);
    for (int i = 0; i < 4; i++) {
        draw_polyline(&q, l->curve[i], LAB_DIMS, 2, i == 1 ? 5 : 2, colours[i], i == 1 ? .5 : 1);
        draw_scatter(&q, l->curve[i], LAB_DIMS, 2, 3.5, colours[i], 1);
    }
    draw_axes(&q, "d", "log10"), draw_legend(&q, 4, names, colours);
    q = draw_frame_log(c, 600, 10, 440, 440, "time to leave a small well", times, 6, 0, 1);
    draw_polyline(&q, l->curve[5], LAB_TIMES, 2, 1.5, DRAW_TEXT, 1);
    draw_scatter(&q, l->curve[4], LAB_TIMES, 2, 3.5, colours[4], 1);
    draw_axes(&q, "d", "time"), draw_legend(&q, 2, names + 4, colours + 4);
    q = draw_frame(c, 1050, 10, 440, 440, "section 4: chains of a learnt score", at, 5);
    for (int k = 2; k >= 0; k--) draw_scatter(&q, l->pairs[k], LAB_FEW, 2, 2, colours[k], .5);
    draw_axes(&q, "correlation with the start", "to the nearest point");
    draw_legend(&q, 3, kinds, colours);
}
#endif
