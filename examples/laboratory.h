// laboratory.h: what 13_langevin_robustness needs beside its lesson: the true model, chains that
// are watched, and the paper's integrals. Include it after diffusion.h.
#ifndef LABORATORY_H
#define LABORATORY_H
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { LAB_CHAINS = 4096 };
typedef struct lab {
    df_ctx *ctx;
    int dim;
    double mean, var;        // data: N(mean, var I)
    double far;              // how far from the origin counts as out
    int patient;             // 0: the run ends when all chains have been out
    float out[LAB_CHAINS];   // the step at which a chain was first out, from 1; 0: never
    df_flaw flaw;
    df_model truth, flawed;
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
    l->dim = dim, l->mean = mean, l->var = var;
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

// Langevin dynamics where the process ends, from x [n, dim]; the fraction that was ever out.
static inline double lab_langevin(lab *l, const df_model *m, df_real *x, int n, int steps,
                                  double h, uint64_t seed) {
    df_sample_desc d = df_sample_defaults();
    int out = 0, result;
    d.method = "langevin", d.steps = steps, d.langevin_step = h, d.start = DF_START_GIVEN;
    d.seed = seed, d.on_step = lab_watch, d.user = l;
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
#endif
