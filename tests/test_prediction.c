// The plane: every prediction from every other on every process up to both ends, against
// x_0 and eps themselves and the papers' formulas; and the question asked of a model.
#include "diffusion.h"
#include "test.h"
#include <float.h>

enum { KINDS = 9, ROWS = DF_PREDICTION_COUNT };
static const double pi = 3.14159265358979323846;
static df_ctx *ctx;
static df_process paths[KINDS];

static void make_paths(void) {
    double betas[100];
    paths[0] = df_process_vp(0.1, 20);
    paths[1] = df_process_cosine();
    paths[2] = df_process_ve(0.01, 50);
    paths[3] = df_process_edm(80);
    paths[4] = df_process_subvp(0.1, 20);
    paths[5] = df_process_flow();
    paths[6] = df_process_trig(0.5);
    df_betas(ctx, DF_BETAS_LINEAR, 1e-3, 0.2, 100, betas);
    expect(df_process_table(ctx, betas, 100, &paths[7]) == DF_OK);
    expect(df_betas_zero_snr(ctx, 100, betas) == DF_OK);
    expect(df_process_table(ctx, betas, 100, &paths[8]) == DF_OK);
}

static double map_error(const df_process *p, int from, int to, const df_point *at,
                        double *scale) {
    static const double x0 = 0.83, eps = -1.27;
    double cx, cp, r[2], q[2], x = at->alpha * x0 + at->sigma * eps, a, b;
    if (df_plane_map(ctx, p, (df_prediction)from, (df_prediction)to, at, &cx, &cp) !=
            DF_OK ||
        df_plane_row(ctx, p, (df_prediction)from, at, r) != DF_OK ||
        df_plane_row(ctx, p, (df_prediction)to, at, q) != DF_OK)
        return -1;
    a = r[0] * x0 + r[1] * eps;
    b = q[0] * x0 + q[1] * eps;
    // the size of the terms that were added, in both directions of the conversion
    *scale = fabs(cx) * (fabs(at->alpha * x0) + fabs(at->sigma * eps)) +
             fabs(cp) * (fabs(r[0] * x0) + fabs(r[1] * eps)) + fabs(q[0] * x0) +
             fabs(q[1] * eps);
    return fabs(cx * x + cp * a - b);
}

static double times[200];
static int make_times(void) {
    int n = 0;
    for (double t = 1e-10; t < 0.02; t *= 10) times[n++] = t, times[n++] = 1 - t;
    for (int i = 1; i < 60; i++) times[n++] = i / 60.0 + 1e-4;
    times[n++] = 0;
    times[n++] = 1;
    return n;
}

// Every pair on every process: the conversion gives the right vector within rounding times
// the condition number, and back again; where it says SINGULAR it is not for nothing.
TEST(pairs) {
    int n = make_times();
    for (int k = 0; k < KINDS; k++)
        for (int i = 0; i < n; i++) {
            df_point at = df_process_at(&paths[k], times[i]);
            for (int from = 0; from < ROWS; from++)
                for (int to = 0; to < ROWS; to++) {
                    double scale = 0, error, cx, cp, bx, bp;
                    df_result there = df_plane_map(ctx, &paths[k], (df_prediction)from,
                                                   (df_prediction)to, &at, &cx, &cp);
                    df_result back = df_plane_map(ctx, &paths[k], (df_prediction)to,
                                                  (df_prediction)from, &at, &bx, &bp);
                    if (there != DF_OK) {
                        expect(there == DF_ERR_SINGULAR && from != to);
                        check(times[i] < 1e-3 || times[i] > 0.999, "SINGULAR at t = %g",
                              times[i]);
                        continue;
                    }
                    if (from == to) { expect(cx == 0 && cp == 1); continue; }
                    error = map_error(&paths[k], from, to, &at, &scale);
                    check(error >= 0 && error <= 64 * DBL_EPSILON * scale,
                          "%s from %s on %s at %.17g: off by %g, terms %g",
                          df_prediction_name((df_prediction)to),
                          df_prediction_name((df_prediction)from),
                          df_process_name(&paths[k]), times[i], error, scale);
                    if (back != DF_OK) continue;
                    // to = cx x + cp from, from = bx x + bp to: cp bp = 1, bx + bp cx = 0
                    near(cp * bp, 1, 64 * DBL_EPSILON);
                    check(fabs(bx + bp * cx) <=
                              64 * DBL_EPSILON * (fabs(bx) + fabs(bp * cx) + fabs(bp)),
                          "%s <-> %s on %s at %.17g",
                          df_prediction_name((df_prediction)to),
                          df_prediction_name((df_prediction)from),
                          df_process_name(&paths[k]), times[i]);
                }
        }
}

// In df_real: x_0 and eps as vectors, there and back, within 64 epsilon of the condition
// number.
TEST(round_trip) {
    enum { N = 6, DIM = 5 };
    df_real eps_r = sizeof(df_real) == 4 ? (df_real)FLT_EPSILON : (df_real)DBL_EPSILON;
    df_real x[N * DIM], a[N * DIM], b[N * DIM], c[N * DIM], x0[N * DIM], e[N * DIM];
    double t[N] = { 0.02, 0.02, 0.3, 0.6, 0.6, 0.97 };
    df_random_normal(7, 0, 0, N * DIM, x0);
    df_random_normal(7, 1, 0, N * DIM, e);
    for (int k = 0; k < KINDS; k++)
        for (int from = 0; from < ROWS; from++)
            for (int to = 0; to < ROWS; to++) {
                for (int i = 0; i < N * DIM; i++) {
                    double row[2];
                    df_point at = df_process_at(&paths[k], t[i / DIM]);
                    expect(df_plane_row(ctx, &paths[k], (df_prediction)from, &at, row) ==
                           DF_OK);
                    x[i] = (df_real)(at.alpha * (double)x0[i] + at.sigma * (double)e[i]);
                    a[i] = (df_real)(row[0] * (double)x0[i] + row[1] * (double)e[i]);
                    b[i] = a[i];
                }
                expect(df_plane_convert(ctx, &paths[k], (df_prediction)from,
                                        (df_prediction)to, t, N, DIM, x, a, c) == DF_OK);
                expect(df_plane_convert(ctx, &paths[k], (df_prediction)from,
                                        (df_prediction)to, t, N, DIM, x, b,
                                        b) == DF_OK); // in place
                same_bits(b, c, sizeof b);
                expect(df_plane_convert(ctx, &paths[k], (df_prediction)to,
                                        (df_prediction)from, t, N, DIM, x, c, b) == DF_OK);
                for (int i = 0; i < N * DIM; i++) {
                    double cx, cp, bx, bp, size;
                    df_point at = df_process_at(&paths[k], t[i / DIM]);
                    df_plane_map(ctx, &paths[k], (df_prediction)from, (df_prediction)to,
                                 &at, &cx, &cp);
                    df_plane_map(ctx, &paths[k], (df_prediction)to, (df_prediction)from,
                                 &at, &bx, &bp);
                    size = (fabs(bx) + fabs(bp * cx)) * fabs((double)x[i]) +
                           fabs((double)a[i]);
                    near_abs((double)b[i], (double)a[i], 64 * (double)eps_r * size);
                    near_abs((double)c[i], cx * (double)x[i] + cp * (double)a[i],
                             4 * (double)eps_r *
                                 (fabs(cx * (double)x[i]) + fabs(cp * (double)a[i])));
                }
            }
}

// The papers' own formulas.
TEST(published) {
    double cx, cp, row[2];
    for (double s = 0.05; s < 1; s += 0.05) {
        df_point f = df_process_at(&paths[5], s), v = df_process_at(&paths[0], s);
        df_point e = df_process_at(&paths[3], s / 10);
        double sd = 0.5, sg = e.sigma, root = sqrt(sd * sd + sg * sg);
        // rectified flow r = (1-s) r_0 + s eps (arXiv 2604.10465, table 4): eps = r +
        // (1-s) v, score = -((1-s) v + r)/s, x_0 = r - s v, v = -(s score + r)/(1-s)
        df_plane_map(ctx, &paths[5], DF_VELOCITY, DF_EPS, &f, &cx, &cp);
        near(cx, 1, 1e-15), near(cp, 1 - s, 1e-15);
        df_plane_map(ctx, &paths[5], DF_VELOCITY, DF_SCORE, &f, &cx, &cp);
        near(cx, -1 / s, 1e-15), near(cp, -(1 - s) / s, 1e-15);
        df_plane_map(ctx, &paths[5], DF_VELOCITY, DF_X0, &f, &cx, &cp);
        near(cx, 1, 1e-15), near(cp, -s, 1e-15);
        df_plane_map(ctx, &paths[5], DF_SCORE, DF_VELOCITY, &f, &cx, &cp);
        near(cx, -1 / (1 - s), 1e-15), near(cp, -s / (1 - s), 1e-15);
        // VP (Ho et al. 2020, eq. 15; Salimans & Ho 2022, app. D): x_0 = (x - sigma
        // eps)/alpha, x_0 = alpha x - sigma v, eps = sigma x + alpha v; velocity = -beta/2
        // (x + score)
        df_plane_map(ctx, &paths[0], DF_EPS, DF_X0, &v, &cx, &cp);
        near_rel(cx, 1 / v.alpha, 1e-15), near_rel(cp, -v.sigma / v.alpha, 1e-15);
        df_plane_map(ctx, &paths[0], DF_V, DF_X0, &v, &cx, &cp);
        near(cx, v.alpha, 1e-15), near(cp, -v.sigma, 1e-15);
        df_plane_map(ctx, &paths[0], DF_V, DF_EPS, &v, &cx, &cp);
        near(cx, v.sigma, 1e-15), near(cp, v.alpha, 1e-15);
        df_plane_map(ctx, &paths[0], DF_SCORE, DF_VELOCITY, &v, &cx, &cp);
        near(cx, -(0.1 + 19.9 * s) / 2, 1e-14), near(cp, -(0.1 + 19.9 * s) / 2, 1e-14);
        // VE: score = (x_0 - x)/sigma^2
        df_plane_map(ctx, &paths[3], DF_X0, DF_SCORE, &e, &cx, &cp);
        near_rel(cx, -1 / (sg * sg), 1e-15), near_rel(cp, 1 / (sg * sg), 1e-15);
        // EDM: D = c_skip x + c_out F
        df_plane_map(ctx, &paths[3], DF_EDM_F, DF_X0, &e, &cx, &cp);
        near_rel(cx, sd * sd / (sd * sd + sg * sg), 1e-14),
            near_rel(cp, sg * sd / root, 1e-14);
        // trig flow (Lu & Song 2024): x_0 = cos x - sin sigma_d F with dx/d(angle) =
        // sigma_d F
        v = df_process_at(&paths[6], s);
        df_plane_map(ctx, &paths[6], DF_VELOCITY, DF_X0, &v, &cx, &cp);
        near(cx, cos(pi * s / 2), 1e-15), near(cp, -sin(pi * s / 2) * 2 / pi, 1e-15);
    }
    df_point at = df_process_at(&paths[3], 0.01);
    expect(df_plane_row(ctx, &paths[3], DF_SCORE, &at, row) == DF_OK);
    expect(row[0] == 0 && fabs(row[1] + 1 / 0.8) < 1e-15);
    expect(df_plane_row(ctx, &paths[3], DF_EDM_F, &at, row) == DF_OK);
    near(row[0], 0.8 / 0.5 / sqrt(0.25 + 0.64), 1e-15);
    near(row[1], -0.5 / sqrt(0.25 + 0.64), 1e-15);
    // on any process the density's velocity is f x - g^2/2 score
    for (int k = 0; k < KINDS; k++) {
        df_rates d;
        at = df_process_at(&paths[k], 0.4321);
        expect(df_process_rates(ctx, &paths[k], 0.4321, DF_RATE_F | DF_RATE_G2, &d) ==
               DF_OK);
        df_plane_map(ctx, &paths[k], DF_SCORE, DF_VELOCITY, &at, &cx, &cp);
        near(cx, d.f, 1e-13), near(cp, -d.g2 / 2, 1e-13);
    }
}

// What the ends answer: 0 fine, 1 SINGULAR. Rows from, columns to: eps x_0 score velocity
// v F straight.
static void end_table(int k, double t, const char *const want[ROWS]) {
    df_point at = df_process_at(&paths[k], t);
    for (int from = 0; from < ROWS; from++)
        for (int to = 0; to < ROWS; to++) {
            double cx, cp;
            df_result result = df_plane_map(ctx, &paths[k], (df_prediction)from,
                                            (df_prediction)to, &at, &cx, &cp);
            check(result == (want[from][to] == '1' ? DF_ERR_SINGULAR : DF_OK),
                  "%s from %s on %s at t = %g: %s", df_prediction_name((df_prediction)to),
                  df_prediction_name((df_prediction)from), df_process_name(&paths[k]), t,
                  df_result_name(result));
            expect(fabs(cx) <= DBL_MAX && fabs(cp) <= DBL_MAX);
        }
}

TEST(ends) {
    static const char *const noise[ROWS] = {"0101111", "0000000", "0101111", "0000000",
                                            "0000000", "0000000", "0000000"};
    static const char *const vp0[ROWS] = {"0011000", "1011111", "1101111", "1110111",
                                          "0011000", "0011000", "0011000"};
    static const char *const flow0[ROWS] = {"0010000", "1011111", "1101111", "0010000",
                                            "0010000", "0010000", "0010000"};
    static const char *const open[ROWS] = {"0000000", "0000000", "0000000", "0000000",
                                           "0000000", "0000000", "0000000"};
    static const int to_noise[4] = {1, 5, 6, 8}, steep[4] = {0, 1, 7, 8},
                     plain[4] = {3, 4, 5, 6};
    for (int i = 0; i < 4; i++) {
        end_table(to_noise[i], 1, noise);
        end_table(steep[i], 0, vp0);
        end_table(plain[i], 0, flow0);
    }
    end_table(0, 1, open);
    end_table(2, 0, open);
    end_table(2, 1, open);
    end_table(3, 1, open);
    end_table(4, 1, open);
    end_table(7, 1, open);
}

// Close to the ends: RF at t = 1 - 1e-6 and the score at sigma = 1e-5 work, in float too;
// past the scalar's digits it is an error with a sentence that helps.
TEST(near_ends) {
    double cx, cp, far = sizeof(df_real) == 4 ? 1e-8 : 1e-17,
                   ok = sizeof(df_real) == 4 ? 1e-6 : 1e-14;
    df_point at = df_process_at(&paths[5], 1 - 1e-6);
    expect(df_plane_map(ctx, &paths[5], DF_EPS, DF_X0, &at, &cx, &cp) == DF_OK);
    near_rel(cx, 1e6, 1e-9);
    at = df_process_at(&paths[5], 1e-5);
    for (int i = 0; i < ROWS; i++) {
        expect(df_plane_map(ctx, &paths[5], (df_prediction)i, DF_SCORE, &at, &cx, &cp) ==
               DF_OK);
        expect(df_plane_map(ctx, &paths[5], DF_SCORE, (df_prediction)i, &at, &cx, &cp) ==
               DF_OK);
    }
    at = df_process_at_lambda(&paths[5], log(ok));
    expect(df_plane_map(ctx, &paths[5], DF_EPS, DF_X0, &at, &cx, &cp) == DF_OK);
    at = df_process_at_lambda(&paths[5], log(far));
    expect(df_plane_map(ctx, &paths[5], DF_EPS, DF_X0, &at, &cx, &cp) == DF_ERR_SINGULAR);
    at = df_process_at(&paths[3], far / 80);
    expect(df_plane_map(ctx, &paths[3], DF_X0, DF_EPS, &at, &cx, &cp) == DF_ERR_SINGULAR);
    expect(strstr(df_ctx_message(ctx), "x_0") && strstr(df_ctx_message(ctx), "eps") &&
           strstr(df_ctx_message(ctx), "edm") && strstr(df_ctx_message(ctx), "t_min"));
    expect(df_plane_map(ctx, &paths[3], DF_EPS, DF_X0, &at, &cx, &cp) == DF_OK);
    at = df_process_at(&paths[5], 1);
    df_plane_map(ctx, &paths[5], DF_EPS, DF_X0, &at, &cx, &cp);
    expect(strstr(df_ctx_message(ctx), "flow") && strstr(df_ctx_message(ctx), "t_max"));
    expect(df_plane_map(ctx, &paths[5], DF_EPS, DF_SCORE, &at, &cx, &cp) == DF_OK &&
           cp == -1 && cx == 0);
    expect(df_plane_map(ctx, &paths[5], (df_prediction)9, DF_X0, &at, &cx, &cp) ==
           DF_ERR_ARGUMENT);
    expect(df_plane_map(ctx, &paths[5], DF_EPS, (df_prediction)-1, &at, &cx, &cp) ==
           DF_ERR_ARGUMENT);
    expect(df_plane_map(ctx, &paths[5], DF_EPS, DF_X0, NULL, &cx, &cp) == DF_ERR_ARGUMENT);
    expect(df_plane_map(ctx, &paths[5], DF_EPS, DF_X0, &at, NULL, &cp) == DF_ERR_ARGUMENT);
    at = df_process_at(&paths[5], nan(""));
    expect(df_plane_map(ctx, &paths[5], DF_EPS, DF_EPS, &at, &cx, &cp) ==
           DF_ERR_NONFINITE);
}

// ---- the question ----

// A model that is linear in what it is given: answer = m[row of label + 1] x, and
// remembers.
typedef struct toy {
    int calls, rows, fail, poison;
    double sign;
    df_query last;
    double t_model[8], alpha[8], sigma[8], seen_x[8], seen_v[8];
} toy;

static int toy_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    toy *m = (toy *)self;
    (void)c;
    m->last = *q;
    for (int i = 0; i < q->n; i++) {
        const df_real *in =
            q->ask == DF_ASK_PREDICT || q->ask == DF_ASK_LOG_DENSITY ? q->x : q->v;
        int row = m->rows + i;
        double factor = m->sign * (q->labels ? 3 + q->labels[i] : 3);
        if (row < 8) {
            m->t_model[row] = (double)q->t_model[i];
            m->alpha[row] = q->alpha[i];
            m->sigma[row] = q->sigma[i];
            m->seen_x[row] = (double)q->x[i * q->dim];
            m->seen_v[row] = q->v ? (double)q->v[i * q->dim] : 0;
        }
        if (q->ask == DF_ASK_LOG_DENSITY) out[i] = (df_real)((double)in[i * q->dim] + 100);
        else for (int j = 0; j < q->dim; j++)
            out[i * q->dim + j] = (df_real)(factor * (double)in[i * q->dim + j]);
    }
    if (m->poison >= m->rows && m->poison < m->rows + q->n)
        out[(m->poison - m->rows) * q->dim + 1] = (df_real)nan("");
    m->rows += q->n;
    return m->fail && ++m->calls == m->fail ? 77 : m->fail ? 0 : (m->calls++, 0);
}

static df_model toy_model(toy *m, const df_process *p) {
    df_model d = df_model_defaults();
    memset(m, 0, sizeof *m);
    m->poison = -1;
    m->sign = 1;
    d.predict = toy_predict;
    d.self = m;
    d.dim = 3;
    d.process = *p;
    d.prediction = DF_EPS;
    d.answers = DF_ASK_PREDICT | DF_ASK_JVP | DF_ASK_VJP | DF_ASK_LOG_DENSITY;
    return d;
}

static void clear(toy *m) { m->calls = m->rows = 0; }

TEST(ask) {
    toy m;
    df_model d = toy_model(&m, &paths[3]);
    double t[5] = { 0.1, 0.1, 0.2, 0.3, 0.3 };
    const int labels[5] = { -1, 0, 1, 2, 3 };
    df_real x[15], v[15], out[15],
        tol = sizeof(df_real) == 4 ? (df_real)4e-7 : (df_real)1e-15;
    df_random_normal(1, 0, 0, 15, x);
    df_random_normal(1, 1, 0, 15, v);
    d.time = df_time_log_sigma(0.25);
    expect(df_model_ask(ctx, &d, DF_ASK_PREDICT, t, 5, x, v, labels, out) == DF_OK);
    expect(m.calls == 1 && m.last.n == 5 && m.last.samples == 5 && m.last.dim == 3);
    expect(m.last.first_sample == 0 && m.last.step == -1 && m.last.same_time == 0 &&
           !m.last.v);
    expect(m.last.condition == NULL && m.last.labels == labels && m.last.x == x);
    for (int i = 0; i < 5; i++) {
        near(m.t_model[i], log(80 * t[i]) / 4, (double)tol);
        near(m.sigma[i], 80 * t[i], 1e-15);
        expect(m.alpha[i] == 1);
        for (int j = 0; j < 3; j++)
            near((double)out[3 * i + j], (3 + labels[i]) * (double)x[3 * i + j],
                 (double)tol);
    }
    d.max_batch = 2;                           // 2 + 2 + 1
    clear(&m);
    expect(df_model_ask(ctx, &d, DF_ASK_PREDICT, t, 5, x, NULL, labels, v) == DF_OK);
    expect(m.calls == 3 && m.last.n == 1 && m.last.first_sample == 4);
    expect(m.last.labels == labels + 4 && m.last.t == t + 4 && m.last.x == x + 12);
    same_bits(out, v, sizeof out);
    expect(m.rows == 5 && m.t_model[3] == m.t_model[4] && m.t_model[2] != m.t_model[3]);
    expect(df_model_ask(ctx, &d, DF_ASK_PREDICT, t + 3, 2, x, NULL, labels, v) == DF_OK);
    expect(m.last.same_time == 1 && m.last.n == 2);
}

TEST(ask_scaled) {
    toy m;
    df_model d = toy_model(&m, &paths[6]);
    double t[5] = { 0.1, 0.1, 0.2, 0.3, 1 };
    df_real x[15], v[15], out[15], keep[15], density[5];
    double tol = sizeof(df_real) == 4 ? 1e-6 : 4e-15;
    df_random_normal(2, 0, 0, 15, x);
    df_random_normal(2, 1, 0, 15, v);
    memcpy(keep, x, sizeof x);
    d.input_sigma_data = 0.7;
    for (int most = 0; most < 4; most++)
        for (int a = 0; a < 4; a++) {
            df_ask ask = (df_ask)(1 << a);
            df_real *to = ask == DF_ASK_LOG_DENSITY ? density : out;
            d.max_batch = most;
            clear(&m);
            expect(df_model_ask(ctx, &d, ask, t, 5, x, v, NULL, to) == DF_OK);
            for (int i = 0; i < 5; i++) {
                double al = cos(pi * t[i] / 2), si = 0.5 * sin(pi * t[i] / 2);
                double c = 1 / sqrt(al * al * 0.49 + si * si);
                near(m.seen_x[i], c * (double)x[3 * i], tol);
                // JVP's direction is scaled on the way in, VJP's answer on the way out
                if (ask == DF_ASK_JVP) near(m.seen_v[i], c * (double)v[3 * i], tol);
                if (ask == DF_ASK_VJP) near(m.seen_v[i], (double)v[3 * i], 0);
                if (ask == DF_ASK_LOG_DENSITY) {
                    near((double)density[i], 100 + c * (double)x[3 * i], tol);
                    continue;
                }
                for (int j = 0; j < 3; j++)
                    near((double)out[3 * i + j],
                         3 * c * (double)(ask == DF_ASK_PREDICT ? x : v)[3 * i + j],
                         4 * tol);
            }
            same_bits(x, keep, sizeof x);
        }
}

TEST(ask_fails) {
    toy m;
    df_model d = toy_model(&m, &paths[5]);
    double t[4] = { 0.1, 0.2, 0.3, 0.4 }, bad[4] = { 0.1, 0.2, 0.3, 0 };
    df_real x[12] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 }, out[12];
    bad[3] = nan("");
    d.max_batch = 2;
    m.poison = 3;                              // row 3 is in the second question
    expect(df_model_ask(ctx, &d, DF_ASK_PREDICT, t, 4, x, NULL, NULL, out) ==
           DF_ERR_NONFINITE);
    expect(strstr(df_ctx_message(ctx), "row 3, element 1") &&
           strstr(df_ctx_message(ctx), "nan"));
    d = toy_model(&m, &paths[5]);
    d.max_batch = 1;
    m.fail = 3;
    expect(df_model_ask(ctx, &d, DF_ASK_PREDICT, t, 4, x, NULL, NULL, out) == 77 &&
           m.rows == 3);
    d = toy_model(&m, &paths[5]);
    d.answers = DF_ASK_PREDICT;
    expect(df_model_ask(ctx, &d, DF_ASK_JVP, t, 4, x, x, NULL, out) == DF_ERR_UNSUPPORTED);
    expect(strstr(df_ctx_message(ctx), "JVP") != NULL);
    expect(df_model_ask(ctx, &d, (df_ask)3, t, 4, x, x, NULL, out) == DF_ERR_UNSUPPORTED);
    expect(m.rows == 0);
    d.answers = DF_ASK_PREDICT | DF_ASK_VJP;
    expect(df_model_ask(ctx, &d, DF_ASK_VJP, t, 4, x, NULL, NULL, out) == DF_ERR_ARGUMENT);
    expect(df_model_ask(ctx, &d, DF_ASK_PREDICT, bad, 4, x, NULL, NULL, out) ==
           DF_ERR_NONFINITE);
    expect(df_model_ask(ctx, &d, DF_ASK_PREDICT, t, 0, x, NULL, NULL, out) ==
           DF_ERR_ARGUMENT);
    expect(df_model_ask(ctx, &d, DF_ASK_PREDICT, NULL, 4, x, NULL, NULL, out) ==
           DF_ERR_ARGUMENT);
    expect(df_model_ask(ctx, NULL, DF_ASK_PREDICT, t, 4, x, NULL, NULL, out) ==
           DF_ERR_ARGUMENT);
    d.dim = 0;
    expect(df_model_ask(ctx, &d, DF_ASK_PREDICT, t, 4, x, NULL, NULL, out) ==
           DF_ERR_ARGUMENT);
    d.dim = 3;
    d.cookie = 1;
    expect(df_model_ask(ctx, &d, DF_ASK_PREDICT, t, 4, x, NULL, NULL, out) ==
           DF_ERR_ARGUMENT);
    d = toy_model(&m, &paths[5]);
    d.time = df_time_sigma();                  // infinite at t = 1 of a flow
    bad[3] = 1;
    expect(df_model_ask(ctx, &d, DF_ASK_PREDICT, bad, 4, x, NULL, NULL, out) ==
           DF_ERR_SINGULAR);
    d.time = df_time_own();
    d.process = df_process_vp(-1, 20);
    expect(df_model_ask(ctx, &d, DF_ASK_PREDICT, t, 4, x, NULL, NULL, out) ==
           DF_ERR_ARGUMENT);
}

// A velocity may be told in another clock: the same network sampled alike whichever way
// its answer is declared.
TEST(clock) {
    toy m;
    df_model d = toy_model(&m, &paths[5]);
    df_sample_desc s = df_sample_defaults();
    df_real x[4][12];
    double tol = sizeof(df_real) == 4 ? 3e-6 : 1e-14;
    s.steps = 4;
    s.start = DF_START_GIVEN;
    s.t_max = 0.9;
    for (int i = 0; i < 4; i++) df_random_normal(3, 0, 0, 12, x[i]);
    d.prediction = DF_VELOCITY;
    expect(df_sample(ctx, &d, &s, x[0], 4) == DF_OK);
    m.sign = -1;                               // dx/d(1 - t)
    d.clock = df_time_affine(-1, 1);
    expect(df_sample(ctx, &d, &s, x[1], 4) == DF_OK);
    near_all(x[1], x[0], 12, tol);
    m.sign = 1e-3;                             // dx/d(1000 t)
    d.clock = df_time_affine(1000, 0);
    expect(df_sample(ctx, &d, &s, x[2], 4) == DF_OK);
    near_all(x[2], x[0], 12, tol);
    expect(fabs((double)(x[0][0] - x[3][0])) > 0.1);           // and it moved
    for (int i = 0; i < 2; i++) df_random_normal(3, 0, 0, 12, x[i]);
    d = toy_model(&m, &paths[3]);              // dx/d sigma of EDM is eps
    m.sign = 0.01;
    expect(df_sample(ctx, &d, &s, x[0], 4) == DF_OK);
    d.prediction = DF_VELOCITY;
    d.clock = df_time_sigma();
    expect(df_sample(ctx, &d, &s, x[1], 4) == DF_OK);
    near_all(x[1], x[0], 12, tol);
}

TEST(defaults) {
    df_model d = df_model_defaults();
    expect(d.process.kind == DF_PROCESS_FLOW && d.prediction == DF_VELOCITY &&
           d.answers == DF_ASK_PREDICT);
    expect(d.time.kind == DF_TIME_AFFINE && d.time.a == 1 && d.time.b == 0 &&
           d.clock.a == 1);
    expect(d.stackable == 1 && d.null_label == -1 && d.max_batch == 0 &&
           d.input_sigma_data == 0);
    expect(!d.predict && !d.mean && !d.scale && d.scaling_size == 0);
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    ctx = df_ctx_create(NULL);
    make_paths();
    RUN(pairs);
    RUN(round_trip);
    RUN(published);
    RUN(ends);
    RUN(near_ends);
    RUN(ask);
    RUN(ask_scaled);
    RUN(ask_fails);
    RUN(clock);
    RUN(defaults);
    df_ctx_free(ctx);
    return test_end();
}
