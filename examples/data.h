// data.h: data for the examples: point clouds made here or read from a CSV file, images made
// here (sprites); images.h reads those of files. Include it after diffusion.h.
// Files are not trusted: a reader either fills a data_set or prints one sentence with the
// file's name on stderr and returns -1.
#ifndef DATA_H
#define DATA_H
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct data_set {
    df_real *x;              // [n, dim]
    int *labels;             // [n], or NULL
    int n, dim;
    int c, h, w;             // images: dim = c h w, [c, h, w], values in [-1, 1]
    int classes;
} data_set;

static inline void data_free(data_set *d) {
    free(d->x);
    free(d->labels);
    memset(d, 0, sizeof *d);
}

static inline int data_fail(const char *name, const char *why) {
    fprintf(stderr, "%s: %s\n", name, why);
    return -1;
}

// Room for n samples of dim numbers; dim and n from outside have been checked.
static inline int data_alloc(data_set *d, int n, int dim, int labelled) {
    memset(d, 0, sizeof *d);
    d->x = (df_real *)malloc((size_t)n * (size_t)dim * sizeof *d->x);
    if (labelled) d->labels = (int *)malloc((size_t)n * sizeof *d->labels);
    if (d->x == NULL || (labelled && d->labels == NULL)) {
        data_free(d);
        return data_fail("data", "not enough memory");
    }
    d->n = n, d->dim = dim;
    return 0;
}

// ---- point clouds in the plane --------------------------------------------------------

static inline void data_moons(const double u[4], const double z[2], double *x) {
    double angle = 3.14159265358979 * u[1], second = u[0] < 0.5;
    x[0] = second ? 1 - cos(angle) : cos(angle);
    x[1] = second ? 0.5 - sin(angle) : sin(angle);
    for (int k = 0; k < 2; k++) x[k] = 2 * (x[k] - (k ? 0.25 : 0.5)) + 0.12 * z[k];
}
static inline void data_8gaussians(const double u[4], const double z[2], double *x) {
    double angle = 0.785398163397448 * floor(8 * u[0]);
    x[0] = 2.82842712474619 * cos(angle) + 0.353553390593274 * z[0];
    x[1] = 2.82842712474619 * sin(angle) + 0.353553390593274 * z[1];
}
static inline void data_checkerboard(const double u[4], const double z[2], double *x) {
    double column = floor(4 * u[0]), row = 2 * floor(2 * u[2]) + fmod(column, 2);
    (void)z;
    x[0] = 2 * (column + u[1]) - 4;
    x[1] = 2 * (row + u[3]) - 4;
}
static inline void data_swissroll(const double u[4], const double z[2], double *x) {
    double angle = 4.71238898038469 * (1 + 2 * u[0]);
    x[0] = 0.28 * angle * cos(angle) + 0.1 * z[0];
    x[1] = 0.28 * angle * sin(angle) + 0.1 * z[1];
}

typedef struct data_cloud {
    const char *name;
    void (*point)(const double u[4], const double z[2], double *x);
} data_cloud;
static const data_cloud data_clouds[] = {
    { "moons", data_moons }, { "8gaussians", data_8gaussians },
    { "checkerboard", data_checkerboard }, { "swissroll", data_swissroll }
};
enum { DATA_CLOUDS = 4 };

// n points of a named cloud; 1 if there is no cloud of that name.
static inline int data_points(data_set *d, const char *name, int n, uint64_t seed) {
    const data_cloud *cloud = NULL;
    for (int i = 0; i < DATA_CLOUDS; i++)
        if (strcmp(name, data_clouds[i].name) == 0) cloud = &data_clouds[i];
    if (cloud == NULL) return 1;
    if (data_alloc(d, n, 2, 0) != 0) return -1;
    for (int i = 0; i < n; i++) {
        double u[4], z[2], x[2];
        df_real zr[2];
        df_random_uniform(seed, (uint64_t)i, 0, 4, u);
        df_random_normal(seed, (uint64_t)i, 1, 2, zr);
        z[0] = (double)zr[0], z[1] = (double)zr[1];
        cloud->point(u, z, x);
        d->x[2 * i] = (df_real)x[0], d->x[2 * i + 1] = (df_real)x[1];
    }
    return 0;
}

// The samples in a random order that depends on the seed alone: a file may be sorted.
static inline void data_shuffle(data_set *d, uint64_t seed) {
    for (int i = d->n - 1; i > 0; i--) {
        double u;
        df_random_uniform(seed, (uint64_t)i, 2, 1, &u);
        int j = (int)(u * (i + 1));
        df_real *a = d->x + (size_t)i * (size_t)d->dim, *b = d->x + (size_t)j * (size_t)d->dim;
        for (int k = 0; k < d->dim; k++) {
            df_real keep = a[k];
            a[k] = b[k], b[k] = keep;
        }
        if (d->labels) {
            int keep = d->labels[i];
            d->labels[i] = d->labels[j], d->labels[j] = keep;
        }
    }
}

// ---- reading files ----------------------------------------------------------------------

// The whole of a file ("-": standard input) in memory that grows with what is really there,
// with a 0 behind. At most `limit` bytes.
static inline char *data_slurp(const char *path, size_t limit, size_t *size) {
    int piped = strcmp(path, "-") == 0;
    FILE *f = piped ? stdin : fopen(path, "rb");
    size_t room = 1 << 16, used = 0;
    char *bytes = (char *)malloc(room + 1), *more;
    if (f == NULL) data_fail(path, strerror(errno));
    while (f != NULL && bytes != NULL) {
        size_t got = fread(bytes + used, 1, room - used, f);
        used += got;
        if (got == 0) break;
        if (used < room) continue;
        more = room < limit ? (char *)realloc(bytes, (room *= 2) + 1) : NULL;
        if (more == NULL) {
            data_fail(path, room >= limit ? "is too large for this program" : "no memory");
            break;
        }
        bytes = more;
    }
    int bad = f == NULL || bytes == NULL || !feof(f);
    if (f != NULL && ferror(f)) data_fail(path, strerror(errno));
    if (f != NULL && !piped) fclose(f);
    if (bad) {
        free(bytes);
        return NULL;
    }
    bytes[used] = 0;
    *size = used;
    return bytes;
}

// One line's numbers into row [room]; how many, or -1 at a field that is no finite number
// (column says which). Fields are separated by commas, semicolons, blanks or tabs.
static inline int data_fields(const char *line, const char *end, double *row, int room,
                              int *column) {
    int n = 0;
    while (line < end) {
        char *after;
        double v;
        while (line < end && strchr(" \t\r", *line)) line++;
        if (line == end) break;
        *column = n + 1;
        v = strtod(line, &after);
        if (after == line || after > end || !(fabs(v) <= 1e30) || n == room) return -1;
        row[n++] = v;
        for (line = after; line < end && strchr(" \t\r", *line); line++) { }
        if (line < end && strchr(",;", *line)) line++;
        else if (line < end && line == after) return -1;
    }
    return n;
}

// Points from a CSV file: one a line, any dimension up to 1024; a first line of words is a
// header. Empty lines and lines that begin with # are passed over.
static inline int data_csv(data_set *d, const char *path) {
    enum { COLUMNS = 1024 };
    static const char *const say[3] = {
        "line %d, column %d is not a finite number\n",
        "line %d has %d numbers, the first has %d\n",
        "holds %d points: at least 20 are needed\n"
    };
    size_t size, lines = 1;
    double row[COLUMNS];
    int dim = 0, n = 0, number = 0, bad = -1, a = 0, b = 0, column = 0;
    char *text = data_slurp(path, (size_t)1 << 30, &size), *at, *stop, *end;
    memset(d, 0, sizeof *d);
    if (text == NULL) return -1;
    for (size_t i = 0; i < size; i++) lines += text[i] == '\n';
    for (at = text, end = text + size; at < end && bad < 0; at = stop + 1) {
        stop = (char *)memchr(at, '\n', (size_t)(end - at));
        if (stop == NULL) stop = end;
        *stop = 0;
        number++;
        int got = *at == '#' ? 0 : data_fields(at, stop, row, COLUMNS, &column);
        if (got == 0 || (got < 0 && dim == 0 && number == 1 && column == 1)) continue;
        if (got < 0) bad = 0, a = number, b = column;
        else if (dim != 0 && got != dim) bad = 1, a = number, b = got;
        if (bad >= 0) break;
        if (dim == 0 && data_alloc(d, (int)lines, dim = got, 0) != 0) break;
        for (int k = 0; k < dim; k++) d->x[(size_t)n * (size_t)dim + (size_t)k] = (df_real)row[k];
        n++;
    }
    d->n = n;
    if (bad < 0 && n < 20 && (dim == 0 || d->x != NULL)) bad = 2, a = n;
    if (bad >= 0) {
        fprintf(stderr, "%s: ", path);
        fprintf(stderr, say[bad], a, b, dim);
    }
    free(text);
    if (bad < 0 && d->x != NULL) return 0;
    data_free(d);
    return -1;
}

// ---- sprites ----------------------------------------------------------------------------

// 1 inside a shape of a class around (0, 0), radius r: disc, square, triangle, cross, ring.
static inline int data_inside(int shape, double x, double y, double r) {
    double a = fabs(x), b = fabs(y), q = sqrt(x * x + y * y);
    switch (shape) {
    case 0: return q < r;
    case 1: return a < 0.85 * r && b < 0.85 * r;
    case 2: return y < 0.8 * r && y > -r && a < 0.55 * (y + r);
    case 3: return (a < 0.3 * r && b < r) || (b < 0.3 * r && a < r);
    default: return q < r && q > 0.55 * r;
    }
}
enum { DATA_SHAPES = 5 };

// n grey sprites of side x side pixels, labelled by shape; place and size vary, edges are
// smooth (4 x 4 points a pixel).
static inline int data_sprites(data_set *d, int n, int side, uint64_t seed) {
    if (data_alloc(d, n, side * side, 1) != 0) return -1;
    d->c = 1, d->h = d->w = side, d->classes = DATA_SHAPES;
    for (int i = 0; i < n; i++) {
        double u[4], r, cx, cy;
        df_random_uniform(seed, (uint64_t)i, 0, 4, u);
        d->labels[i] = (int)(u[0] * DATA_SHAPES);
        r = side * (0.26 + 0.12 * u[1]);
        cx = side / 2.0 + (side / 2.0 - r - 0.5) * (2 * u[2] - 1);
        cy = side / 2.0 + (side / 2.0 - r - 0.5) * (2 * u[3] - 1);
        for (int p = 0; p < side * side; p++) {
            int hits = 0;
            for (int q = 0; q < 16; q++)
                hits += data_inside(d->labels[i], p % side + (q % 4 + 0.5) / 4 - cx,
                                    p / side + (q / 4 + 0.5) / 4 - cy, r);
            d->x[(size_t)i * (size_t)d->dim + (size_t)p] = (df_real)(hits / 8.0 - 1);
        }
    }
    return 0;
}

// ---- trials of samplers ----------------------------------------------------------------

// A model in its own units: the exact one of a Gaussian mixture in the plane on rectified
// flow, or a checkpoint.
typedef struct data_model {
    df_ctx *ctx;
    df_model model;
    df_mixture *mixture;     // NULL: the model is a net
    df_mixture_view view;
    df_net *net;
} data_model;

static inline void data_model_close(data_model *m) {
    df_mixture_free(m->mixture);
    df_net_free(m->net);
    df_ctx_free(m->ctx);
}

// From a checkpoint, or for NULL the mixture. 0, or -1: the context says why.
static inline int data_model_open(data_model *m, const char *load, int threads) {
    static const double weights[3] = { 0.4, 0.35, 0.25 };
    static const double means[6] = { -1.2, -0.6, 1.1, -0.3, 0.1, 1.2 };
    static const double covariances[12] = { 0.3, 0.1, 0.1, 0.2, 0.2, -0.08, -0.08, 0.3,
                                            0.25, 0, 0, 0.15 };
    df_ctx_desc c = df_ctx_defaults();
    c.threads = threads;
    memset(m, 0, sizeof *m);
    m->ctx = df_ctx_create(&c);
    if (load) m->net = df_net_load(m->ctx, df_source_path(load));
    else m->mixture = df_mixture_create(m->ctx, 3, 2, weights, means, covariances);
    if (m->net == NULL && m->mixture == NULL) return -1;
    m->view.mixture = m->mixture;
    m->view.process = df_process_flow();
    m->view.prediction = DF_VELOCITY;
    m->model = load ? df_net_model(m->net) : df_mixture_model(&m->view);
    m->model.mean = m->model.scale = NULL;
    return 0;
}

// A trial between two points: samples [n, dim] of p at `start`; `flowed`, where the ODE
// takes their first half; `exact`, others, of p at `end`; and room x for a run. floor: the
// sliced W2 between two exact sets. A net's p is what its ODE makes of noise. statistics:
// what dpm_solver_v3 wants to know.
typedef struct data_trial {
    const data_model *m;
    df_point start, end;
    df_real *from, *flowed, *exact, *x;
    df_v3_statistics *statistics;
    double floor;
    int n, dim;
} data_trial;

// A run from one point to another on a grid uniform in lambda, x given.
static inline df_sample_desc data_run(const df_point *from, const df_point *to,
                                      const char *method, int steps) {
    df_sample_desc d = df_sample_defaults();
    d.method = method, d.steps = steps, d.grid = "lambda", d.start = DF_START_GIVEN;
    d.t_max = from->t, d.t_min = to->t, d.end = DF_END_T_MIN;
    return d;
}
// All but exactly along the model's ODE: x [n, dim].
static inline int data_flow(const data_model *m, const df_point *from, const df_point *to,
                            df_real *x, int n) {
    df_sample_desc d = data_run(from, to, "rk4", 256);
    return from->t > to->t ? df_sample(m->ctx, &m->model, &d, x, n) : DF_OK;
}
static inline int data_draw(const data_trial *t, const df_point *at, uint64_t seed,
                            df_real *x) {
    const data_model *m = t->m;
    df_point noise = df_process_at_lambda(&m->model.process, -3);
    if (m->mixture) return df_mixture_sample(m->ctx, m->mixture, at, seed, 0, t->n, x);
    size_t size = (size_t)t->n * (size_t)t->dim;
    df_random_normal(seed, 0, 0, size, x);
    for (size_t i = 0; i < size; i++) x[i] *= (df_real)noise.sigma;
    return data_flow(m, &noise, at, x, t->n);
}

// Runs the first n samples from the start, in x.
static inline int data_trial_go(const data_trial *t, const df_sample_desc *d, int n) {
    memcpy(t->x, t->from, (size_t)n * (size_t)t->dim * sizeof *t->x);
    return df_sample(t->m->ctx, &t->m->model, d, t->x, n);
}

// Of the first half of x: its root mean square distance from `flowed`. Of all of it: its
// sliced W2 to `exact`; negative: failed.
static inline double data_trial_error(const data_trial *t, int half) {
    double sum = 0, w = 0;
    for (size_t i = 0; half && i < (size_t)(t->n / 2) * (size_t)t->dim; i++)
        sum += pow((double)t->x[i] - (double)t->flowed[i], 2);
    if (half) return sqrt(sum / (t->n / 2));
    return df_sliced_wasserstein(t->m->ctx, t->x, t->n, t->exact, t->n, t->dim, 50, 1, &w)
               ? -1 : w;
}

// Between two values of lambda. 0, or -1: the context says why.
static inline int data_trial_open(data_trial *t, const data_model *m, double start,
                                  double end, uint64_t seed, int n) {
    size_t size = (size_t)n * (size_t)m->model.dim;
    df_sample_desc d;
    memset(t, 0, sizeof *t);
    t->start = df_process_at_lambda(&m->model.process, start);
    t->end = df_process_at_lambda(&m->model.process, end);
    t->m = m, t->n = n, t->dim = m->model.dim;
    t->from = (df_real *)malloc(4 * size * sizeof *t->from);
    if (t->from == NULL) return data_fail("data_trial_open", "not enough memory");
    t->flowed = t->from + size, t->exact = t->flowed + size, t->x = t->exact + size;
    if (data_draw(t, &t->start, seed, t->from) != DF_OK ||
        data_draw(t, &t->end, seed + 1, t->exact) != DF_OK ||
        data_draw(t, &t->end, seed + 2, t->x) != DF_OK) return -1;
    memcpy(t->flowed, t->from, size * sizeof *t->from);
    t->floor = data_trial_error(t, 0);
    if (start >= end) return 0;
    d = data_run(&t->start, &t->end, "ddim", 24);
    t->statistics = df_v3_estimate(m->ctx, &m->model, &d, n < 2000 ? n : 2000);
    if (t->statistics == NULL) return -1;
    return data_flow(m, &t->start, &t->end, t->flowed, n / 2) != DF_OK ? -1 : 0;
}
static inline void data_trial_close(data_trial *t) {
    free(t->from);
    if (t->statistics) df_v3_free(t->m->ctx, t->statistics);
}
#endif
