// golden.h: reads recorded trajectories of published samplers (files of "case ... end"),
// and holds the model they were recorded on, the posterior mean of a Gaussian mixture.
//
//     golden_case c;
//     FILE *f = golden_open("diffusers_ddim.txt");
//     while (golden_read(f, &c)) { ... golden_find(&c, "x_T") ...; golden_free(&c); }
//
// A case is key-value lines and arrays "array NAME ROWS COLS" followed by numbers.
#ifndef DF_TEST_GOLDEN_H
#define DF_TEST_GOLDEN_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GOLDEN_KEYS = 64, GOLDEN_ARRAYS = 16, GOLDEN_LINE = 1024, GOLDEN_DIM = 16 };

typedef struct golden_array {
    char name[48];
    int rows, cols;
    double *v; // [rows, cols]
} golden_array;
typedef struct golden_case {
    char name[128];
    int keys, arrays;
    char key[GOLDEN_KEYS][64], value[GOLDEN_KEYS][256];
    golden_array array[GOLDEN_ARRAYS];
} golden_case;

// The folder: $GOLDEN, else tests/golden beside the working directory or this file.
static inline FILE *golden_open(const char *file) {
    const char *dirs[4] = {getenv("GOLDEN"), "tests/golden", "golden", "../tests/golden"};
    for (int i = 0; i < 4; i++) {
        char path[GOLDEN_LINE];
        FILE *f;
        if (dirs[i] == NULL || dirs[i][0] == 0) continue;
        snprintf(path, sizeof path, "%s/%s", dirs[i], file);
        f = fopen(path, "r");
        if (f != NULL || i == 0) return f;
    }
    return NULL;
}

static inline void golden_free(golden_case *c) {
    for (int i = 0; i < c->arrays; i++) free(c->array[i].v);
    c->arrays = 0;
}

// One array after its head line; 0 if the file is cut short.
static inline int golden_numbers(FILE *f, golden_array *a) {
    size_t n = (size_t)a->rows * (size_t)a->cols;
    a->v = (double *)malloc((n + 1) * sizeof(double));
    for (size_t i = 0; i < n; i++)
        if (fscanf(f, "%lf", &a->v[i]) != 1) return 0;
    return 1;
}

// The next case; 0 at the end of the file.
static inline int golden_read(FILE *f, golden_case *c) {
    char line[GOLDEN_LINE];
    memset(c, 0, sizeof *c);
    while (fgets(line, sizeof line, f)) {
        char *blank;
        line[strcspn(line, "\r\n")] = 0;
        blank = strchr(line, ' ');
        if (strncmp(line, "case ", 5) == 0)
            snprintf(c->name, sizeof c->name, "%.120s", line + 5);
        else if (strcmp(line, "end") == 0)
            return 1;
        else if (strncmp(line, "array ", 6) == 0 && c->arrays < GOLDEN_ARRAYS) {
            golden_array *a = &c->array[c->arrays++];
            if (sscanf(line, "array %47s %d %d", a->name, &a->rows, &a->cols) != 3 ||
                !golden_numbers(f, a)) {
                golden_free(c);
                return 0;
            }
        } else if (blank && c->keys < GOLDEN_KEYS) {
            *blank = 0;
            snprintf(c->key[c->keys], sizeof c->key[0], "%.60s", line);
            snprintf(c->value[c->keys++], sizeof c->value[0], "%.250s", blank + 1);
        }
    }
    golden_free(c);
    return 0;
}

static inline const golden_array *golden_find(const golden_case *c, const char *name) {
    for (int i = 0; i < c->arrays; i++)
        if (strcmp(c->array[i].name, name) == 0) return &c->array[i];
    return NULL;
}
static inline const char *golden_text(const golden_case *c, const char *key) {
    for (int i = 0; i < c->keys; i++)
        if (strcmp(c->key[i], key) == 0) return c->value[i];
    return "";
}
static inline int golden_is(const golden_case *c, const char *key, const char *value) {
    return strcmp(golden_text(c, key), value) == 0;
}
static inline double golden_number(const golden_case *c, const char *key, double missing) {
    const char *text = golden_text(c, key);
    return *text && strcmp(text, "none") != 0 ? atof(text) : missing;
}

// ---- the models ----

typedef struct golden_mixture {
    int K, dim;
    double w[3], mean[3][GOLDEN_DIM], cov[3][GOLDEN_DIM * GOLDEN_DIM];
} golden_mixture;

static inline golden_mixture golden_gm2(void) {
    static const double w[3] = {.3, .5, .2};
    static const double mean[3][2] = {{2, 0}, {-1, 1.5}, {0, -2}};
    static const double cov[3][4] = {
        {.3, .1, .1, .2}, {.2, -.05, -.05, .4}, {.1, 0, 0, .1}};
    golden_mixture m;
    memset(&m, 0, sizeof m);
    m.K = 3;
    m.dim = 2;
    for (int k = 0; k < 3; k++) {
        m.w[k] = w[k];
        memcpy(m.mean[k], mean[k], sizeof mean[k]);
        memcpy(m.cov[k], cov[k], sizeof cov[k]);
    }
    return m;
}
static inline golden_mixture golden_gm16(void) {
    golden_mixture m;
    memset(&m, 0, sizeof m);
    m.K = 2;
    m.dim = 16;
    m.w[0] = .6;
    m.w[1] = .4;
    for (int i = 0; i < 16; i++) {
        m.mean[0][i] = .25 * (i % 2 ? -1 : 1) * (1 + i / 16.0);
        m.mean[1][i] = -.5 + i / 16.0;
        m.cov[0][i * 17] = .09;
        m.cov[1][i * 17] = .25;
    }
    return m;
}

// Solves S y = d by Cholesky, S [n, n]; returns -1/2 (log det S + d^T y).
static inline double golden_solve(int n, double *S, const double *d, double *y) {
    double log_det = 0, quadratic = 0;
    for (int i = 0; i < n; i++) {
        for (int j = 0; j <= i; j++) {
            double s = S[i * n + j];
            for (int k = 0; k < j; k++) s -= S[i * n + k] * S[j * n + k];
            S[i * n + j] = i == j ? sqrt(s) : s / S[j * n + j];
        }
        log_det += 2 * log(S[i * n + i]);
    }
    for (int i = 0; i < n; i++) {
        y[i] = d[i];
        for (int k = 0; k < i; k++) y[i] -= S[i * n + k] * y[k];
        y[i] /= S[i * n + i];
    }
    for (int i = n - 1; i >= 0; i--) {
        for (int k = i + 1; k < n; k++) y[i] -= S[k * n + i] * y[k];
        y[i] /= S[i * n + i];
    }
    for (int i = 0; i < n; i++) quadratic += d[i] * y[i];
    return -.5 * (log_det + quadratic);
}

// E[x_0 | x] = sum_k r_k (m_k + alpha C_k S_k^-1 (x - alpha m_k)),
// S_k = alpha^2 C_k + sigma^2 I.
static inline void golden_posterior(const golden_mixture *m, double alpha, double sigma,
                                    const double *x, double *x0) {
    double mean[3][GOLDEN_DIM], log_r[3], most = -HUGE_VAL, sum = 0;
    int n = m->dim;
    for (int k = 0; k < m->K; k++) {
        double S[GOLDEN_DIM * GOLDEN_DIM], d[GOLDEN_DIM], y[GOLDEN_DIM];
        for (int i = 0; i < n * n; i++) S[i] = alpha * alpha * m->cov[k][i];
        for (int i = 0; i < n; i++) S[i * (n + 1)] += sigma * sigma;
        for (int i = 0; i < n; i++) d[i] = x[i] - alpha * m->mean[k][i];
        log_r[k] = log(m->w[k]) + golden_solve(n, S, d, y);
        for (int i = 0; i < n; i++) {
            mean[k][i] = m->mean[k][i];
            for (int j = 0; j < n; j++) mean[k][i] += alpha * m->cov[k][i * n + j] * y[j];
        }
        if (log_r[k] > most) most = log_r[k];
    }
    for (int i = 0; i < n; i++) x0[i] = 0;
    for (int k = 0; k < m->K; k++) {
        double r = exp(log_r[k] - most);
        sum += r;
        for (int i = 0; i < n; i++) x0[i] += r * mean[k][i];
    }
    for (int i = 0; i < n; i++) x0[i] /= sum;
}

// The row (a, b) of a prediction, written out here once more, not asked from the library.
static inline void golden_row(df_ctx *ctx, const df_process *p, df_prediction prediction,
                              double t, double alpha, double sigma, double row[2]) {
    double s = p->sigma_data, q = sqrt(alpha * alpha * s * s + sigma * sigma);
    df_rates rates;
    row[0] = row[1] = 0;
    if (prediction == DF_EPS) row[1] = 1;
    if (prediction == DF_X0) row[0] = 1;
    if (prediction == DF_SCORE) row[1] = -1 / sigma;
    if (prediction == DF_V) row[0] = -sigma, row[1] = alpha;
    if (prediction == DF_STRAIGHT) row[0] = -1, row[1] = 1;
    if (prediction == DF_EDM_F) row[0] = sigma / s / q, row[1] = -alpha * s / q;
    if (prediction == DF_VELOCITY &&
        df_process_rates(ctx, p, t, DF_RATE_ALPHA | DF_RATE_SIGMA, &rates) == DF_OK)
        row[0] = rates.alpha, row[1] = rates.sigma;
}

// n points y [n, 2] of gm2 along dy/d lambda = x_0 - y, y = x/alpha, by RK4 from lambda = a to b.
static inline void golden_ode(double *y, int n, double a, double b, int steps) {
    static const double at[4] = {0, .5, .5, 1}, weight[4] = {1, 2, 2, 1};
    golden_mixture g = golden_gm2();
    double h = (b - a) / steps;
    for (int s = 0; s < steps; s++)
        for (int i = 0; i < n; i++) {
            double k[2] = {0, 0}, sum[2] = {0, 0};
            for (int j = 0; j < 4; j++) {
                double rho = exp(-(a + h * (s + at[j]))), z[2], x0[2];
                for (int e = 0; e < 2; e++) z[e] = y[2 * i + e] + h * at[j] * k[e];
                golden_posterior(&g, 1, rho, z, x0);
                for (int e = 0; e < 2; e++) sum[e] += weight[j] * (k[e] = x0[e] - z[e]);
            }
            for (int e = 0; e < 2; e++) y[2 * i + e] += h / 6 * sum[e];
        }
}
#endif
