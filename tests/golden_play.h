// golden_play.h: plays one recorded case. A mapper (golden_diffusers.h, golden_libraries.h)
// fills a plan: which process, grid and settings of ours are what the library did; the rest
// is the same for all of them.
#ifndef DF_TEST_GOLDEN_PLAY_H
#define DF_TEST_GOLDEN_PLAY_H
#include "diffusion.h"
#include "golden.h"
#include "test.h"

#define DOUBLE_BUILD (sizeof(df_real) == 8)
enum { GOLDEN_POINTS = 1100 };

static df_ctx *ctx;

typedef struct golden_plan {
    df_sample_desc d;
    df_process process;
    df_prediction prediction; // of the model
    df_learned learned;       // ... and of the variance behind it
    int guided;               // learned variances as guided-diffusion's cases have them
    double points[GOLDEN_POINTS];
    double start_factor;      // x at the start = this times x_T (or x_unit)
    double end_factor;        // x_final = our x times this
    int at_calls;             // the model is evaluated at model_calls' alpha and sigma, in order
    int draws_per_step;       // of recorded draws without noise_step; 0: in order, as drawn
    int calls_per_step;       // noise_step counts calls of the library: so many make a step
    int last_draw;            // of a step's draws the last one counts
    int first_draw;           // recorded draws to leave out at the beginning
    // MAP answers: c_skip x + c_out x_0, coefficients from this function; NULL: the exact map of a
    // straight line through x_0 and eps, to where the map goes
    void (*skip_out)(const struct golden_plan *p, const df_query *q, int row, double c[2]);
    double skip_number;       // for skip_out
    double clip_x0, clip_map; // > 0: MAP answers clip x_0 first, or their result
    // called on x after our run, before it is compared; or NULL
    void (*finish)(const struct golden_plan *p, const golden_case *c, df_real *x);
    df_model model;           // filled in by golden_run, for finish to go on with
    const char *why_not;      // a case that is not matched: the reason
} golden_plan;

// The grid as a list, in the given unit.
static inline void golden_grid(golden_plan *p, int count, df_points unit) {
    p->d.points_count = count;
    p->d.points_in = unit;
}

// ---- the model: the mixture's posterior mean, in any prediction ----

typedef struct golden_model {
    golden_mixture g;
    const golden_plan *plan;
    const golden_array *calls; // used where plan->at_calls
    int asked;
} golden_model;

static int golden_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    golden_model *m = (golden_model *)self;
    const golden_plan *p = m->plan;
    int dim = q->dim, width = p->learned != DF_LEARNED_NONE && q->ask == DF_ASK_PREDICT ? 2 : 1;
    (void)c;
    for (int i = 0; i < q->n; i++) {
        double x[GOLDEN_DIM], x0[GOLDEN_DIM], row[2], alpha = q->alpha[i], sigma = q->sigma[i];
        if (p->at_calls && m->calls) {
            if (m->asked >= m->calls->rows) return 78;
            alpha = m->calls->v[3 * m->asked + 1];
            sigma = m->calls->v[3 * m->asked + 2];
        }
        for (int j = 0; j < dim; j++) x[j] = (double)q->x[i * dim + j];
        golden_posterior(&m->g, alpha, sigma, x, x0);
        golden_row(ctx, &p->process, p->prediction, q->t[i], alpha, sigma, row);
        for (int j = 0; j < dim; j++) {
            double eps = (x[j] - alpha * x0[j]) / sigma, v;
            df_real *o = &out[i * dim * width + j];
            *o = (df_real)(row[0] * x0[j] + row[1] * eps);
            if (q->ask == DF_ASK_MAP) {
                double k[2] = {0, 0};
                if (p->skip_out) p->skip_out(p, q, i, k);
                if (p->clip_x0 > 0) x0[j] = fmax(-p->clip_x0, fmin(p->clip_x0, x0[j]));
                *o = (df_real)(p->skip_out ? k[0] * x[j] + k[1] * x0[j]
                                           : q->alpha_to[i] * x0[j] + q->sigma_to[i] * eps);
                if (p->clip_map > 0)
                    *o = (df_real)fmax(-p->clip_map, fmin(p->clip_map, (double)*o));
            }
            if (width == 1) continue;
            v = p->learned == DF_LEARNED_RANGE      ? tanh(x[j] / 2)
                : p->learned == DF_LEARNED_VARIANCE ? .001 * (1.5 + tanh(x[j]))
                                                    : -4 + tanh(x[j]);
            o[dim] = (df_real)v;
        }
    }
    m->asked++;
    return 0;
}

// ---- its noise ----

typedef struct golden_noise {
    const golden_plan *plan;
    const golden_array *noise, *step;
    int used, last_step, in_step;
} golden_noise;

// The recorded draw: the k-th of this step (`step` lists the step of each, or there are
// draws_per_step in each), or simply the next one.
static int golden_draw(void *user, const df_noise_query *q, df_real *out) {
    golden_noise *r = (golden_noise *)user;
    int draw = r->plan->first_draw + r->used++, rows = q->n, k;
    if (q->step != r->last_step) r->in_step = 0;
    r->last_step = q->step;
    k = r->in_step++;
    if (r->step) {
        int calls = r->plan->calls_per_step > 0 ? r->plan->calls_per_step : 1;
        draw = -1;
        for (int i = 0; i < r->step->cols && (draw < 0 || r->plan->last_draw); i++)
            if ((int)r->step->v[i] / calls == q->step && (r->plan->last_draw || k-- == 0))
                draw = i;
    } else if (r->plan->draws_per_step > 0)
        draw = r->plan->first_draw + q->step * r->plan->draws_per_step + k;
    if (r->noise == NULL || draw < 0 || (draw + 1) * rows > r->noise->rows) return 77;
    for (int i = 0; i < rows * q->dim; i++)
        out[i] = (df_real)r->noise->v[draw * rows * q->dim + i];
    return 0;
}

// ---- one case ----

// A mapper's plan before it knows anything.
static inline void golden_plan_init(golden_plan *p) {
    memset(p, 0, sizeof *p);
    p->d = df_sample_defaults();
    p->d.start = DF_START_GIVEN;
    p->process = df_process_edm(10000);
    p->prediction = DF_EPS;
    p->start_factor = p->end_factor = 1;
    p->d.points_in = DF_POINTS_RHO;
}

// Plays the plan against x_final; `tolerance` 0: the build's own (1e-9, or 2e-5 in float,
// of the largest |x_final|).
static void golden_run(const golden_case *c, golden_plan *p, double tolerance) {
    const golden_array *start = golden_find(c, "x_T"), *end = golden_find(c, "x_final");
    golden_array first;
    golden_model self;
    golden_noise noise;
    df_model model = df_model_defaults();
    df_real x[8 * GOLDEN_DIM];
    double most = 0, off = 0;
    int size;
    if (start == NULL) start = golden_find(c, "x_unit");
    if (start == NULL && p->first_draw == 1 && golden_find(c, "noise")) {
        first = *golden_find(c, "noise"); // the first draw is the start
        first.rows = 8;
        start = &first;
    }
    if (!check(start && end && start->rows <= 8, "%s: no x_T or x_final", c->name)) return;
    memset(&self, 0, sizeof self);
    self.g = golden_is(c, "model", "gm16") ? golden_gm16() : golden_gm2();
    self.plan = p;
    self.calls = golden_find(c, "model_calls");
    memset(&noise, 0, sizeof noise);
    noise.plan = p;
    noise.noise = golden_find(c, "noise");
    noise.step = golden_find(c, "noise_step");
    noise.last_step = -2;
    p->d.noise.fill = golden_draw;
    p->d.noise.user = &noise;
    if (p->d.points_count > 0) p->d.points = p->points;
    model.predict = golden_predict;
    model.self = &self;
    model.dim = self.g.dim;
    model.process = p->process;
    model.prediction = p->prediction;
    model.learned = p->learned;
    model.answers |= DF_ASK_MAP;
    size = start->rows * start->cols;
    for (int i = 0; i < size; i++) x[i] = (df_real)(p->start_factor * start->v[i]);
    p->model = model;
    df_ctx_clear(ctx);
    if (!check(df_sample(ctx, &model, &p->d, x, start->rows) == DF_OK, "%s: %s", c->name,
               df_ctx_message(ctx)))
        return;
    if (p->finish) p->finish(p, c, x);
    for (int i = 0; i < size; i++) {
        most = fmax(most, fabs(end->v[i]));
        off = fmax(off, fabs(p->end_factor * (double)x[i] - end->v[i]));
        if (!(off < HUGE_VAL)) off = HUGE_VAL;
    }
    if (tolerance <= 0) tolerance = DOUBLE_BUILD ? 1e-9 : 2e-5;
    check(off <= tolerance * fmax(most, 1), "%s: off by %g of %g", c->name, off, most);
}
#endif
