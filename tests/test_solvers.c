// The solvers' mathematics: one path on every process, one end for every prediction, orders of
// convergence with exact and with their own history, exact moments of the stochastic ones.
#include "diffusion.h"
#include "golden.h"
#include "test.h"

#define DOUBLE_BUILD (sizeof(df_real) == 8)
enum { PROCESSES = 8, POINTS = 6, MOST = 2100 };

static df_ctx *ctx;

// ---- the model: a mixture's posterior mean, in any row of the plane; maps are exact lines ----

typedef struct mix {
    golden_mixture g;
    df_process process;
    df_prediction prediction;
} mix;

static int mix_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    mix *m = (mix *)self;
    (void)c;
    for (int i = 0; i < q->n; i++) {
        double x[GOLDEN_DIM], x0[GOLDEN_DIM], row[2];
        for (int j = 0; j < q->dim; j++) x[j] = (double)q->x[i * q->dim + j];
        golden_posterior(&m->g, q->alpha[i], q->sigma[i], x, x0);
        golden_row(ctx, &m->process, m->prediction, q->t[i], q->alpha[i], q->sigma[i],
                   row);
        if (q->ask == DF_ASK_MAP) row[0] = q->alpha_to[i], row[1] = q->sigma_to[i];
        for (int j = 0; j < q->dim; j++) {
            double eps = (x[j] - q->alpha[i] * x0[j]) / q->sigma[i];
            out[i * q->dim + j] = (df_real)(row[0] * x0[j] + row[1] * eps);
        }
    }
    return 0;
}
static df_model mix_model(mix *m, golden_mixture g, df_process p, df_prediction prediction) {
    df_model model = df_model_defaults();
    memset(m, 0, sizeof *m);
    m->g = g;
    m->process = p;
    m->prediction = prediction;
    model.predict = mix_predict;
    model.self = m;
    model.dim = g.dim;
    model.process = p;
    model.prediction = prediction;
    model.answers |= DF_ASK_MAP;
    return model;
}
static golden_mixture gaussian(double mean, double variance) {
    golden_mixture g;
    memset(&g, 0, sizeof g);
    g.K = g.dim = 1;
    g.w[0] = 1;
    g.mean[0][0] = mean;
    g.cov[0][0] = variance;
    return g;
}
static df_process process_of(int i) {
    double betas[1000];
    df_process table = df_process_vp(.1, 20);
    switch (i) {
    case 0: return df_process_vp(.1, 20);
    case 1: return df_process_cosine();
    case 2: return df_process_ve(.001, 50);
    case 3: return df_process_edm(80);
    case 4: return df_process_subvp(.1, 20);
    case 5: return df_process_flow();
    case 6: return df_process_trig(.5);
    }
    df_betas(ctx, DF_BETAS_LINEAR, 1e-4, .02, 1000, betas);
    expect(df_process_table(ctx, betas, 1000, &table) == DF_OK);
    return table;
}

// ---- a setting: a row and what is not its own ----

typedef struct setting {
    const df_sampler_row *row;
    df_sample_desc d;
    double order;       // what it converges with, exact history; 0: none
    char name[96];
} setting;

static df_v3_statistics *statistics; // smooth, made by hand
static df_v3_statistics v3_by_hand(void) {
    df_v3_statistics e;
    // l from 1 to .1, s from 0 to .3, b from 0 to .2 between lambda -6 and 6, two dims
    static double lambda[2] = {-6, 6}, l[4] = {1, .9, .1, .2}, s[4] = {0, .1, .3, -.2};
    static double b[4] = {0, .1, .2, -.1};
    e.count = 2;
    e.dim = 2;
    e.lambda = lambda;
    e.l = l;
    e.s = s;
    e.b = b;
    return e;
}

static setting base(const df_sampler_row *row) {
    setting s;
    memset(&s, 0, sizeof s);
    s.row = row;
    s.d = df_sample_defaults();
    s.d.method = row->name;
    s.d.final = DF_FINAL_KEEP;
    s.d.statistics = statistics;
    s.order = row->stochastic ? 0 : row->order + (row->corrector == 1);
    snprintf(s.name, sizeof s.name, "%s", row->name);
    return s;
}
static void say(setting *s, const char *what, double number) {
    size_t used = strlen(s->name);
    snprintf(s->name + used, sizeof s->name - used, ", %s %g", what, number);
}

// Every row, every order, slope, corrector, interpolated prediction, eta convention, with
// churn, restarts and corrections: all that goes with it. Returns how many.
enum { SETTINGS = 3000 };
static setting settings[SETTINGS];
static int setting_count;
static setting *add(setting s) {
    if (!check(setting_count < SETTINGS, "too many settings")) return &settings[0];
    settings[setting_count] = s;
    return &settings[setting_count++];
}
static void add_row(const df_sampler_row *row) {
    int multistep = row->corrector >= 0, most = row->most_order > 0 ? row->most_order : 1;
    if (row->clock == DF_CLOCK_STOPPED) return;
    if (strcmp(row->name, "dpm_adaptive") == 0 || strcmp(row->name, "rk45") == 0) most = 1;
    add(base(row));
    for (int order = 1; order <= most; order++)
        for (int slope = 0; slope <= DF_SLOPE_BH2; slope++)
            for (int predicts = -1; predicts <= DF_X0; predicts++)
                for (int corrector = -1; corrector <= (multistep ? order + 1 : -1); corrector++) {
                    setting s = base(row);
                    int blocks = row->slope != DF_SLOPE_OWN, own;
                    if (!blocks && (slope > 0 || predicts >= 0 || most == 1)) continue;
                    if (row->slope == DF_SLOPE_OWN && slope > 0) continue;
                    if (slope > 0 && slope != DF_SLOPE_EXACT && order != 2 && corrector != 2)
                        continue; // it does not act
                    s.d.order = order;
                    s.d.slope = (df_slope)slope;
                    s.d.predicts = predicts;
                    s.d.corrector = corrector;
                    say(&s, "order", order);
                    if (slope) say(&s, "slope", slope);
                    if (predicts >= 0) say(&s, "predicts", predicts);
                    if (corrector >= 0) say(&s, "corrector", corrector);
                    own = row->corrector > 0 ? order + (row->corrector == 1) : 0;
                    if (corrector < 0) corrector = multistep ? own : -1;
                    // k nodes make order k, and a corrected value starts the next step; odd
                    // pairs of orders and the fourth are seen by polynomials, below
                    s.order = s.d.corrector > 0 || order > 3 ? 0 : corrector > 0 ? corrector : order;
                    if (s.d.corrector < 0) corrector = -1;
                    if (row->stochastic) s.order = 0;
                    add(s);
                }
    if (row->eta_max > 0 && row->eta_in != DF_ETA_OWN)
        for (int in = DF_ETA_FAMILY; in <= DF_ETA_STRAIGHT; in++) {
            setting s = base(row);
            s.d.eta = .6;
            s.d.eta_in = (df_eta)in;
            s.order = 0;
            say(&s, "eta .6 of kind", in);
            add(s);
        }
    if (!row->whole && row->asks == DF_ASK_PREDICT) {
        setting s = base(row);
        s.order = 0;
        s.d.corrections = 2;
        say(&s, "corrections", 2);
        add(s);
        s = base(row);
        s.order = 0;
        s.d.restarts = 2;
        say(&s, "restarts", 2);
        add(s);
    }
    if (!row->stochastic && !row->whole && row->asks == DF_ASK_PREDICT) {
        setting s = base(row);
        s.order = 0;
        s.d.churn = 3;
        s.d.noise_scale = 1.1;
        say(&s, "churn", 3);
        add(s);
    }
}

static void start_r(double *r) {
    for (int i = 0; i < 2 * POINTS; i++) r[i] = sin(1.7 * i + .3) * 1.4;
}

// lambda from `low` to 3 in N equal steps behind `before` more of the same length.
static double lambda_points[MOST + 8];
static void lambda_grid(df_sample_desc *d, int N, int before) {
    for (int i = 0; i <= N + before; i++) lambda_points[i] = -3 + 6.0 * (i - before) / N;
    d->points = lambda_points;
    d->points_count = N + before + 1;
    d->points_in = DF_POINTS_LAMBDA;
    d->start = DF_START_GIVEN;
}

// Runs a setting over lambda -3 .. 3 in N steps from r = x/(alpha + sigma), gives r at the end.
static df_result run_r(const setting *s, df_process p, df_prediction prediction, int N,
                       double *r) {
    df_sample_desc d = s->d;
    df_point first = df_process_at_lambda(&p, -3), last = df_process_at_lambda(&p, 3);
    df_real x[2 * POINTS];
    df_result result;
    mix m;
    df_model model = mix_model(&m, golden_gm2(), p, prediction);
    lambda_grid(&d, N, 0);
    for (int i = 0; i < 2 * POINTS; i++) x[i] = (df_real)(r[i] * (first.alpha + first.sigma));
    df_ctx_clear(ctx);
    result = df_sample(ctx, &model, &d, x, POINTS);
    check(result == DF_OK, "%s on %s: %s", s->name, df_process_name(&p), df_ctx_message(ctx));
    for (int i = 0; i < 2 * POINTS; i++) r[i] = (double)x[i] / (last.alpha + last.sigma);
    return result;
}

static double apart(const double *a, const double *b) {
    double most = 0, off = 0;
    for (int i = 0; i < 2 * POINTS; i++) {
        most = fmax(most, fabs(b[i]));
        off = fmax(off, fabs(a[i] - b[i]));
        if (!(off < HUGE_VAL)) return HUGE_VAL;
    }
    return off / fmax(1, most);
}

TEST(one_path_on_every_process) {
    int compared = 0, parted = 0;
    for (int k = 0; k < setting_count; k++) {
        const setting *s = &settings[k];
        double want[2 * POINTS], r[2 * POINTS], most = 0;
        start_r(want);
        run_r(s, process_of(0), DF_V, 14, want);
        for (int p = 1; p < PROCESSES; p++) {
            double off;
            start_r(r);
            run_r(s, process_of(p), DF_V, 14, r);
            off = apart(r, want);
            most = fmax(most, off);
            if (s->row->clock == DF_CLOCK_RHO) {
                check(off < (DOUBLE_BUILD ? 1e-12 : 2e-4), "%s on process %d: off by %g", s->name,
                      p, off);
                compared++;
            }
        }
        if (s->row->clock != DF_CLOCK_RHO) {
            // order 1 of deis_t, as where churn begins it anew, is Euler's step, for all the same
            check(most > 1e-5 || s->d.order == 1 || s->d.churn > 0, "%s walks t, yet agrees to %g", s->name, most);
            parted++;
        }
    }
    check(compared > 1000 && parted > 20, "%d and %d", compared, parted);
}

TEST(one_end_for_every_prediction) {
    for (int k = 0; k < setting_count; k++)
        for (int p = 0; p < PROCESSES; p += 5) {
            const setting *s = &settings[k];
            double want[2 * POINTS], r[2 * POINTS];
            start_r(want);
            run_r(s, process_of(p), DF_EPS, 9, want);
            for (int a = 1; a < DF_PREDICTION_COUNT; a++) {
                double off;
                start_r(r);
                run_r(s, process_of(p), (df_prediction)a, 9, r);
                off = apart(r, want);
                check(off < (DOUBLE_BUILD ? 1e-9 : 2e-3), "%s, prediction %d: off by %g", s->name,
                      a, off);
            }
        }
}

// ---- orders ----

// dpm_solver_2, dpm_solver_3, dpmpp_2s, dpmpp_3s: several steps of the grid are one.
static int in_blocks(const df_sampler_row *row) {
    return row->slope == DF_SLOPE_BH2 && row->corrector < 0;
}

enum { BEFORE = 4 };
typedef struct history {
    double y[BEFORE + 1][2 * POINTS]; // exact, at lambda = -3 - (BEFORE - i) h
} history;
// The first steps' results are replaced by the exact flow: exact history at lambda = -3. A
// corrector goes over such a step again, and its own start is of low order; there the steps
// before -3 are 64 times shorter, so that this error does not show.
static int exact_history(void *user, const df_step_info *info, df_real *x) {
    history *h = (history *)user;
    if (info->step <= BEFORE)
        for (int i = 0; i < 2 * POINTS; i++)
            x[i] = (df_real)(info->at.alpha * h->y[info->step][i]);
    return 0;
}

static double end_exact[2 * POINTS]; // y at lambda = 3
static history exact_before[2][3];   // steps of h, or of h/64; N = 168, 336, 672
static double before_length(int j, int corrects) { return 6.0 / (168 << j) / (corrects ? 64 : 1); }
static void exact_all(void) {
    double start[2 * POINTS];
    start_r(start);
    for (int i = 0; i < 2 * POINTS; i++) start[i] *= 1 + exp(3.0);
    memcpy(end_exact, start, sizeof start);
    golden_ode(end_exact, POINTS, -3, 3, 24000);
    for (int c = 0; c < 2; c++)
        for (int j = 0; j < 3; j++)
            for (int i = 0; i <= BEFORE; i++) {
                double *y = exact_before[c][j].y[i];
                memcpy(y, start, sizeof start);
                golden_ode(y, POINTS, -3, -3 - before_length(j, c) * (BEFORE - i), 600);
            }
}

// RMS error at the end with N = 168 << j steps.
// A block of `order` steps is one step of its method.
static double error_at(const setting *s, df_process p, int j, int own_start) {
    df_sample_desc d = s->d;
    df_real x[2 * POINTS];
    double sum = 0;
    int before = own_start ? 0 : BEFORE, N = 168 << j;
    int corrects = d.corrector > 0 || (d.corrector < 0 && s->row->corrector > 0);
    mix m;
    df_model model = mix_model(&m, golden_gm2(), p, DF_V);
    df_point first = df_process_at_lambda(&p, -3 - before_length(j, corrects) * before);
    df_point last = df_process_at_lambda(&p, 3);
    if (in_blocks(s->row)) N *= d.order > 0 ? d.order : s->row->order;
    lambda_grid(&d, N, before);
    for (int i = 0; i < before; i++)
        lambda_points[i] = -3 - before_length(j, corrects) * (before - i);
    if (!own_start) {
        d.edit = exact_history;
        d.user = &exact_before[corrects][j];
    }
    for (int i = 0; i < 2 * POINTS; i++)
        x[i] = (df_real)(first.alpha * exact_before[corrects][j].y[BEFORE - before][i]);
    df_ctx_clear(ctx);
    check(df_sample(ctx, &model, &d, x, POINTS) == DF_OK, "%s: %s", s->name,
          df_ctx_message(ctx));
    for (int i = 0; i < 2 * POINTS; i++) {
        double e = (double)x[i] / last.alpha - end_exact[i];
        sum += e * e;
    }
    return sqrt(sum / (2 * POINTS));
}

// at_least: the start's error is of this order, but may not show yet.
static void check_order(const setting *s, int p, double order, int own_start, int at_least) {
    double error[3], slope;
    for (int j = 0; j < 3; j++) error[j] = error_at(s, process_of(p), j, own_start);
    for (int j = 0; j < 2; j++) {
        slope = log2(error[j] / error[j + 1]);
        if (error[j + 1] < 3e-11) continue; // rounding
        check(fabs(slope - order) < .15 || (at_least && slope > order),
              "%s on process %d, N = %d: slope %.3f, want %g (%g %g)", s->name, p, 168 << j,
              slope, order, error[j], error[j + 1]);
    }
}

TEST(orders_with_exact_history) {
    if (!DOUBLE_BUILD) return; // float rounding hides the slopes
    for (int k = 0; k < setting_count; k++) {
        const setting *s = &settings[k];
        int rho = s->row->clock == DF_CLOCK_RHO;
        if (s->order <= 0 || s->row->whole || s->row->asks != DF_ASK_PREDICT) continue;
        for (int p = 0; p < PROCESSES; p++) {
            // the same path on every process: two of them will do
            if (rho && p != 3 && p != 5) continue;
            // a table's clock t is only piecewise smooth
            if (!rho && p == 7) continue;
            // blocks need no history, and would be out of step with it
            check_order(s, p, s->order, in_blocks(s->row), 0);
        }
    }
}

TEST(orders_with_their_own_start) {
    int count;
    const df_sampler_row *rows = df_sampler_rows(&count);
    if (!DOUBLE_BUILD) return;
    for (int k = 0; k < count; k++) {
        setting s = base(&rows[k]);
        if (s.row->stochastic || s.row->order < 1 || s.row->whole ||
            s.row->asks != DF_ASK_PREDICT)
            continue;
        check_order(&s, 5, s.row->start_order, 1, s.row->start_order < s.order);
    }
    // the published third order with history: its second difference lacks a factor 2
    setting s = base(df_sampler_find(ctx, "dpmpp_3m"));
    s.d.compat = DF_COMPAT_HALF_D2;
    say(&s, "half D2", 1);
    check_order(&s, 5, 2, 0, 0);
}

// ---- exact on polynomials: the order, without asymptotics ----

// x_0 (or eps) = lambda^degree whatever x is: the integrals are then exact up to degree k - 1.
typedef struct power { int degree, eps; } power;
static int power_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    const power *p = (const power *)self;
    (void)c;
    for (int i = 0; i < q->n; i++)
        out[i] = (df_real)pow(log(q->alpha[i] / q->sigma[i]), p->degree);
    return 0;
}
// y(b) from y(a): dy/dl = l^q - y, or dy/dl = -e^-l l^q; by Simpson, 4000 parts.
static double power_flow(const power *p, double y, double a, double b) {
    double h = (b - a) / 4000, sum = 0;
    for (int i = 0; i <= 8000; i++) {
        double l = a + i * h / 2, w = i == 0 || i == 8000 ? 1 : i % 2 ? 4 : 2;
        sum += w * h / 6 * pow(l, p->degree) * (p->eps ? -exp(-l) : exp(l - b));
    }
    return (p->eps ? y : exp(a - b) * y) + sum;
}
static int power_history(void *user, const df_step_info *info, df_real *x) {
    const double *y = (const double *)user;
    if (info->step <= BEFORE) x[0] = (df_real)(info->at.alpha * y[info->step]);
    return 0;
}
// x after one uncorrected step (N = 1), or two, the first corrected (N = 2), from exact history
// on an uneven grid; what it should be in *want.
static double power_run(const setting *s, power *p, int N, double *want) {
    static const double grid[BEFORE + 3] = {-.9, -.7, -.55, -.2, 0, .3, .7};
    double y[BEFORE + 3];
    df_sample_desc d = s->d;
    df_model m = df_model_defaults();
    df_real x;
    for (int i = 0; i < BEFORE + 3; i++) y[i] = power_flow(p, 1.3, -.9, grid[i]);
    m.predict = power_predict;
    m.self = p;
    m.dim = 1;
    m.process = df_process_edm(80);
    m.prediction = p->eps ? DF_EPS : DF_X0;
    d.points = grid;
    d.points_count = BEFORE + 1 + N;
    d.points_in = DF_POINTS_LAMBDA;
    d.start = DF_START_GIVEN;
    d.edit = power_history;
    d.user = y;
    x = (df_real)y[0];
    check(df_sample(ctx, &m, &d, &x, 1) == DF_OK, "%s: %s", s->name, df_ctx_message(ctx));
    *want = y[BEFORE + N];
    return (double)x;
}
TEST(exact_on_polynomials) {
    int tried = 0;
    if (!DOUBLE_BUILD) return;
    for (int k = 0; k < setting_count; k++) {
        const setting *s = &settings[k];
        int order = s->d.order > 0 ? s->d.order : s->row->order;
        int eps = s->d.predicts >= 0 ? s->d.predicts == DF_EPS : s->row->wants == DF_EPS;
        int slope = (int)(s->d.slope ? s->d.slope : s->row->slope);
        if (s->row->corrector < 0 || s->row->stochastic || s->d.eta > 0 || s->d.churn > 0 ||
            s->d.restarts > 0 || s->d.corrections > 0 || s->d.corrector > 0 ||
            (s->d.corrector < 0 && s->row->corrector > 0) || order < 1)
            continue;
        // order p integrates degree p - 1, and not p; two nodes with another slope only degree 0
        for (int degree = 0; degree <= order; degree++) {
            double want, got;
            power p;
            int exact = degree < (order == 2 && slope != DF_SLOPE_EXACT ? 1 : order);
            p.degree = degree;
            p.eps = eps;
            got = power_run(s, &p, 1, &want);
            if (exact) check(fabs(got - want) < 1e-12, "%s, degree %d: %g", s->name, degree, got - want);
            else check(fabs(got - want) > 1e-6, "%s, degree %d: too good", s->name, degree);
            tried++;
        }
    }
    check(tried > 60, "%d tried", tried);
}

// ---- exact moments: an affine sampler fed with unit impulses ----

// Sample 0 gets no noise, sample j > 1 a one in draw j - 1 (sample 1 starts one deviation off).
static int impulse(void *user, const df_noise_query *q, df_real *out) {
    int *draws = (int *)user;
    if ((int)q->draw >= *draws) *draws = (int)q->draw + 1;
    for (int i = 0; i < q->n; i++)
        out[i] = (df_real)(q->first_sample + (uint64_t)i == (uint64_t)q->draw + 2);
    return 0;
}
enum { IMPULSES = 1400 };
static const double data_mean = .7, data_var = .04;
// Mean and variance at the end, data N(.7, .04), from the exact law at lambda = -3.
static void moments(const setting *s, df_process p, int N, double *got) {
    static df_real x[IMPULSES];
    df_sample_desc d = s->d;
    df_point a = df_process_at_lambda(&p, -3);
    int draws = 0, n = 2 * N + 4;
    mix m;
    df_model model = mix_model(&m, gaussian(data_mean, data_var), p, DF_X0);
    lambda_grid(&d, N, 0);
    for (int i = 0; i < n; i++) x[i] = (df_real)(a.alpha * data_mean);
    x[1] += (df_real)sqrt(a.alpha * a.alpha * data_var + a.sigma * a.sigma);
    d.noise.fill = impulse;
    d.noise.user = &draws;
    check(df_sample(ctx, &model, &d, x, n) == DF_OK, "%s: %s", s->name, df_ctx_message(ctx));
    expect(draws < n - 1);
    got[0] = (double)x[0];
    got[1] = 0;
    for (int j = 1; j < n; j++) got[1] += ((double)x[j] - got[0]) * ((double)x[j] - got[0]);
}

TEST(weak_orders) {
    // The exponential family with one node is of weak order 1 for any eta, 2m and 3m are of
    // order 2 (with the published 3m's half D2 too), and a corrector with noise. An ancestral
    // step is an ODE's, then the exact forward kernel: the weak order is the ODE's order. The
    // two draws of dpmpp_sde make order 2 along one path only.
    static const struct { const char *name; int eta_in; double eta; unsigned compat; double order; }
        rows[] = {{"exponential", 1, .5, 0, 1}, {"exponential", 1, 1, 0, 1},
                  {"exponential", 1, 1.5, 0, 1}, {"exponential", 2, .5, 0, 1},
                  {"exponential", 3, .5, 0, 1}, {"exponential", 4, .5, 0, 1},
                  {"ddpm", 0, -1, 0, 1}, {"ddim", 0, .5, 0, 1}, {"euler_ancestral", 0, 1, 0, 1},
                  {"euler_ancestral", 0, .5, 0, 1}, {"euler_ancestral", 4, .5, 0, 1},
                  {"dpm_2_ancestral", 0, 1, 0, 2}, {"dpmpp_2s_ancestral", 0, 1, 0, 2},
                  {"dpmpp_2s", 1, 1, 0, 2}, {"dpmpp_2s", 1, 1, DF_COMPAT_STAGE_NOISE, 1},
                  {"dpmpp_sde", 0, 1, 0, 2}, {"dpmpp_sde", 0, 1, DF_COMPAT_STAGE_NOISE, 1},
                  {"dpmpp_2m_sde", 0, 1, 0, 2},
                  {"dpmpp_2m_sde", 0, .5, 0, 2}, {"dpmpp_2m_sde", 1, 1.2, 0, 2},
                  {"dpmpp_3m_sde", 0, 1, 0, 2}, {"dpmpp_3m_sde", 0, 1, DF_COMPAT_HALF_D2, 2},
                  {"sa_solver", 0, 1, 0, 2}, {"reverse_diffusion", 0, 1, 0, 1},
                  {"euler_maruyama", 0, 1, 0, 1}, {"er_sde", 0, -1, 0, 3}};
    if (!DOUBLE_BUILD) return;
    for (size_t k = 0; k < sizeof rows / sizeof rows[0]; k++)
        for (int process = 0; process < 6; process += 5) {
            setting s = base(df_sampler_find(ctx, rows[k].name));
            df_process p = process_of(process);
            df_point end = df_process_at_lambda(&p, 3);
            double want = end.alpha * end.alpha * data_var + end.sigma * end.sigma, e[3], got[2];
            s.d.eta = rows[k].eta;
            s.d.eta_in = (df_eta)rows[k].eta_in;
            s.d.compat = rows[k].compat;
            for (int j = 0; j < 3; j++) {
                moments(&s, p, 160 << j, got);
                e[j] = fabs(got[1] - want);
            }
            for (int j = 0; j < 2; j++)
                check(fabs(log2(e[j] / e[j + 1]) - rows[k].order) < .15 ||
                          (rows[k].order > 2 && e[j] / e[j + 1] > 8), // er_sde: 3 and better
                      "%s, eta %g of kind %d on process %d, N = %d: slope %.3f, want %g (%g %g)",
                      s.name, rows[k].eta, rows[k].eta_in, process, 160 << j,
                      log2(e[j] / e[j + 1]), rows[k].order, e[j], e[j + 1]);
        }
}

// One step of h = .3 with eta = .5 in three conventions: the noise's deviation over sigma_t.
TEST(one_eta_three_conventions) {
    static const double want[3] = {.373, .336, .509};
    static const df_eta in[3] = {DF_ETA_FAMILY, DF_ETA_DDIM, DF_ETA_LINEAR};
    static const double points[2] = {0, .3};
    df_process p = df_process_vp(.1, 20);
    df_point end = df_process_at_lambda(&p, .3);
    for (int k = 0; k < 3; k++) {
        df_sample_desc d = df_sample_defaults();
        df_real x[3] = {1, 1, 1};
        int draws = 0;
        mix m;
        df_model model = mix_model(&m, gaussian(data_mean, data_var), p, DF_X0);
        d.method = "exponential";
        d.eta = .5;
        d.eta_in = in[k];
        d.points = points;
        d.points_count = 2;
        d.points_in = DF_POINTS_LAMBDA;
        d.start = DF_START_GIVEN;
        d.noise.fill = impulse;
        d.noise.user = &draws;
        expect(df_sample(ctx, &model, &d, x, 3) == DF_OK);
        near_abs(fabs((double)x[2] - (double)x[0]) / end.sigma, want[k], 5e-4);
    }
}

// ---- what is done to x between steps reaches the end ----

static int nudge(void *user, const df_step_info *info, df_real *x) {
    if (info->step == *(int *)user)
        for (int i = 0; i < info->n * info->dim; i++) x[i] += (df_real).1;
    return 0;
}
TEST(an_edit_is_kept) {
    // A corrector must not put back what its step began with: x moves by .1 after step 15 of
    // 20, and the ends lie as far apart as without corrector.
    static const char *const methods[4] = {"dpmpp_2m", "dpmpp_3m", "unipc", "sa_solver"};
    double far[4];
    for (int k = 0; k < 4; k++) {
        setting s = base(df_sampler_find(ctx, methods[k]));
        double r[2][2 * POINTS];
        int at = 15;
        s.d.eta = 0;
        for (int edited = 0; edited < 2; edited++) {
            if (edited) s.d.edit = nudge, s.d.user = &at;
            start_r(r[edited]);
            run_r(&s, process_of(5), DF_X0, 20, r[edited]);
        }
        far[k] = apart(r[0], r[1]);
        check(far[k] > .8 * far[0] && far[k] < 1.25 * far[0], "%s moves by %g, dpmpp_2m by %g",
              methods[k], far[k], far[0]);
    }
}

TEST(churn_begins_history_anew) {
    // Final variance with churn goes to the data's, and never wild. Of the methods that take
    // Euler's step after churn at first order.
    static const char *const methods[] = {"heun", "dpmpp_2m", "dpmpp_3m", "unipc",
                                          "lms",  "deis",     "ipndm",    "dpm_solver_3"};
    df_process p = df_process_edm(80);
    df_point end = df_process_at_lambda(&p, 3);
    double want = data_var + end.sigma * end.sigma;
    for (size_t k = 0; k < sizeof methods / sizeof *methods; k++) {
        setting s = base(df_sampler_find(ctx, methods[k]));
        double got[2], e[2];
        s.d.churn = 40;
        for (int j = 0; j < 2; j++) {
            moments(&s, p, 160 << j, got);
            e[j] = fabs(got[1] / want - 1);
        }
        check(e[0] < .2 && (e[1] < .6 * e[0] || e[1] < .01), "%s: off by %g, then %g", s.name,
              e[0], e[1]);
    }
}

// Churn, restarts and Langevin steps own no stretch of the Brownian path.
typedef struct stretches { int none, some; } stretches;
static int count_stretches(void *user, const df_noise_query *q, df_real *out) {
    stretches *c = (stretches *)user;
    if (q->from.lambda == q->to.lambda) c->none++;
    else c->some++;
    return df_random_normal(q->seed, q->first_sample, q->draw, (size_t)(q->n * q->dim), out), 0;
}
TEST(churn_has_no_stretch) {
    for (int k = 0; k < 3; k++) {
        setting s = base(df_sampler_find(ctx, k == 2 ? "exponential" : "heun"));
        stretches c = {0, 0};
        double r[2 * POINTS];
        s.d.noise.fill = count_stretches;
        s.d.noise.user = &c;
        if (k == 0) s.d.churn = 5;
        if (k == 1) s.d.corrections = 1;
        start_r(r);
        run_r(&s, process_of(0), DF_X0, 10, r);
        check(k < 2 ? c.none >= 9 && c.some == 0 : c.none == 0 && c.some >= 9, "%d: %d, %d", k,
              c.none, c.some);
    }
}

TEST(eta_of_steps_in_t) {
    // reverse_diffusion and euler_maruyama: eta 4 of the linear kind is the family's 2, a
    // window without points is the ODE
    for (int k = 0; k < 2; k++) {
        double r[4][2 * POINTS];
        for (int j = 0; j < 4; j++) {
            setting s = base(df_sampler_find(ctx, k ? "euler_maruyama" : "reverse_diffusion"));
            s.d.eta = j == 0 ? 4 : j == 1 ? 2 : j == 2 ? 1 : 0;
            s.d.eta_in = j == 0 ? DF_ETA_LINEAR : DF_ETA_FAMILY;
            if (j == 2) s.d.eta_max = 1e-9;
            start_r(r[j]);
            run_r(&s, process_of(0), DF_X0, 40, r[j]);
        }
        expect(apart(r[0], r[1]) < (DOUBLE_BUILD ? 1e-12 : 1e-3));
        expect(apart(r[2], r[3]) < (DOUBLE_BUILD ? 1e-12 : 1e-4));
        expect(apart(r[1], r[3]) > .01);
    }
    { // into sigma = 0 as well
        double end[2];
        for (int j = 0; j < 2; j++) {
            df_sample_desc d = df_sample_defaults();
            df_real x[1] = {(df_real).8};
            mix m;
            df_model model = mix_model(&m, gaussian(data_mean, data_var), process_of(0), DF_X0);
            d.method = "reverse_diffusion";
            d.steps = 1;
            d.t_max = .5;
            d.start = DF_START_GIVEN;
            d.eta = j ? 2 : 4;
            d.eta_in = j ? DF_ETA_FAMILY : DF_ETA_LINEAR;
            expect(df_sample(ctx, &model, &d, x, 1) == DF_OK);
            end[j] = (double)x[0];
        }
        near(end[0], end[1], 1e-6);
    }
}

TEST(gradient_estimation_by_hand) {
    // two steps on alpha = 1: x += (rho_1 - rho_0) eps_0, then (rho_2 - rho_1) (2 eps_1 - eps_0)
    static const double rho[3] = {3, 1.2, .4};
    df_sample_desc d = df_sample_defaults();
    df_real x[1] = {(df_real)1.3};
    double y = 1.3, eps[2];
    mix m;
    df_model model = mix_model(&m, gaussian(data_mean, data_var), process_of(3), DF_X0);
    d.method = "gradient_estimation";
    d.points = rho, d.points_count = 3, d.points_in = DF_POINTS_RHO;
    d.start = DF_START_GIVEN;
    expect(df_sample(ctx, &model, &d, x, 1) == DF_OK);
    for (int k = 0; k < 2; k++) {
        eps[k] = rho[k] * (y - data_mean) / (data_var + rho[k] * rho[k]);
        y += (rho[k + 1] - rho[k]) * (k ? 2 * eps[1] - eps[0] : eps[0]);
    }
    near(x[0], y, DOUBLE_BUILD ? 1e-12 : 1e-6);
}

TEST(there_and_back) {
    // Down the ODE and up again, in the data's own units; every method that adapts too.
    static const char *const methods[4] = {"rk4", "dpm_adaptive", "rk45", "dpmpp_3m"};
    static const double mean = 1, scale = 2;
    for (int k = 0; k < 4; k++) {
        df_sample_desc d = df_sample_defaults();
        df_real x[2 * POINTS], start[2 * POINTS];
        mix m;
        df_model model = mix_model(&m, golden_gm2(), df_process_vp(.1, 20), DF_V);
        model.mean = &mean, model.scale = &scale, model.scaling_size = 1;
        d.method = methods[k];
        d.steps = 400;
        d.grid = "lambda";
        d.end = DF_END_T_MIN;
        d.start = DF_START_GIVEN;
        d.rtol = d.atol = 1e-7;
        d.t_max = .9, d.t_min = .01;
        for (int i = 0; i < 2 * POINTS; i++) x[i] = start[i] = (df_real)sin(1.7 * i + .3);
        check(df_sample(ctx, &model, &d, x, POINTS) == DF_OK, "%s", df_ctx_message(ctx));
        d.inverse = 1;
        check(df_sample(ctx, &model, &d, x, POINTS) == DF_OK, "%s", df_ctx_message(ctx));
        for (int i = 0; i < 2 * POINTS; i++)
            near_abs((double)x[i], (double)start[i], DOUBLE_BUILD ? 2e-4 : 5e-3);
        df_ctx_clear(ctx);
    }
}

TEST(adaptive_into_the_data) {
    // rtol decides, not `steps`: with the defaults the end is the ODE's own
    double r[2][2 * POINTS];
    for (int k = 0; k < 4; k++) {
        static const char *const methods[4] = {"rk4", "rk45", "rk45", "dpm_adaptive"};
        df_sample_desc d = df_sample_defaults();
        df_real x[2 * POINTS];
        mix m;
        df_model model = mix_model(&m, golden_gm2(), df_process_vp(.1, 20), DF_V);
        d.method = methods[k];
        d.start = DF_START_GIVEN;
        d.steps = k == 0 ? 200 : k == 1 ? 1 : 50;
        if (k == 0) d.grid = "lambda";
        if (k == 3) d.rtol = d.atol = 1e-4;
        for (int i = 0; i < 2 * POINTS; i++) x[i] = (df_real)sin(1.7 * i + .3);
        check(df_sample(ctx, &model, &d, x, POINTS) == DF_OK, "%s", df_ctx_message(ctx));
        for (int i = 0; i < 2 * POINTS; i++) r[k > 0][i] = (double)x[i];
        if (k > 0)
            check(apart(r[1], r[0]) < 2e-3, "%s, %d steps: off by %g", methods[k], d.steps,
                  apart(r[1], r[0]));
    }
}

TEST(settings_that_would_be_silent) {
    static const char *const say[] = {"restart_max is 1e+09", "noise_scale 2", "order 1",
                                      "eta_max 1"};
    for (int k = 0; k < 4; k++) {
        static const char *const methods[] = {"restart", "mala", "dpm_adaptive", "consistency"};
        df_sample_desc d = df_sample_defaults();
        df_real x[2] = {0, 0};
        mix m;
        df_model model = mix_model(&m, gaussian(0, 1), df_process_flow(), DF_V);
        model.answers |= DF_ASK_LOG_DENSITY;
        model.dim = 1;
        d.method = methods[k];
        d.t_max = .9;
        if (k == 0) d.restart_max = 1e9;
        if (k == 1) d.noise_scale = 2;
        if (k == 2) d.order = 1;
        if (k == 3) d.eta_max = 1;
        check(df_sample(ctx, &model, &d, x, 1) == DF_ERR_ARGUMENT, "%s", methods[k]);
        check(strstr(df_ctx_message(ctx), say[k]) != NULL, "%s", df_ctx_message(ctx));
        df_ctx_clear(ctx);
    }
}

int main(int argc, char **argv) {
    int count;
    static df_v3_statistics by_hand;
    test_begin(argc, argv);
    ctx = df_ctx_create(NULL);
    by_hand = v3_by_hand();
    statistics = &by_hand;
    const df_sampler_row *rows = df_sampler_rows(&count);
    for (int k = 0; k < count; k++) add_row(&rows[k]);
    exact_all();
    RUN(one_path_on_every_process);
    RUN(one_end_for_every_prediction);
    RUN(orders_with_exact_history);
    RUN(orders_with_their_own_start);
    RUN(exact_on_polynomials);
    RUN(weak_orders);
    RUN(one_eta_three_conventions);
    RUN(an_edit_is_kept);
    RUN(churn_begins_history_anew);
    RUN(churn_has_no_stretch);
    RUN(eta_of_steps_in_t);
    RUN(gradient_estimation_by_hand);
    RUN(there_and_back);
    RUN(adaptive_into_the_data);
    RUN(settings_that_would_be_silent);
    df_ctx_free(ctx);
    return test_end();
}
