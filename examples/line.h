// line.h: two Gaussians on a line, for the examples that compare samples, grids and the exact
// law at every t. Include it after diffusion.h (double) and draw.h.
#ifndef LINE_H
#define LINE_H
#include <math.h>

typedef struct line_law { double w[2], mean[2], var[2]; } line_law;
#define LINE_PI 3.14159265358979323846

// The density of component k at a point of the path, and that of both.
static inline double line_part(const line_law *l, int k, double x, const df_point *p) {
    double v = p->alpha * p->alpha * l->var[k] + p->sigma * p->sigma;
    double d = x - p->alpha * l->mean[k];
    return exp(-d * d / v / 2) / sqrt(2 * LINE_PI * v);
}
static inline double line_density(const line_law *l, double x, const df_point *p) {
    return l->w[0] * line_part(l, 0, x, p) + l->w[1] * line_part(l, 1, x, p);
}
// P(x_t < x).
static inline double line_below(const line_law *l, double x, const df_point *p) {
    double sum = 0;
    for (int k = 0; k < 2; k++) {
        double v = p->alpha * p->alpha * l->var[k] + p->sigma * p->sigma;
        sum += l->w[k] / 2 * erfc((p->alpha * l->mean[k] - x) / sqrt(2 * v));
    }
    return sum;
}
// W_1 of x [n] to the law: the integral of |F_n - F| over [-6, 6]. *want: its mean if x is
// drawn from the law, n large.
static inline double line_distance(const line_law *l, const df_real *x, int n, const df_point *p,
                                   double *want) {
    enum { GRID = 4000 };
    int count[GRID] = { 0 };
    double h = 12.0 / GRID, sum = 0, seen = 0;
    *want = 0;
    for (int i = 0; i < n; i++)
        count[(int)draw_clamp(ceil(((double)x[i] + 6) / h), 0, GRID - 1)]++;
    for (int k = 0; k < GRID; k++) {
        double F = line_below(l, k * h - 6, p);
        seen += count[k];
        sum += h * fabs(seen / n - F), *want += h * sqrt(2 / LINE_PI * F * (1 - F) / n);
    }
    return sum;
}
// A histogram of x [n] on the height `base`, and the exact density over it.
static inline void line_ridge(const draw_panel *p, const line_law *l, const df_real *x, int n,
                              const df_point *at, double base, unsigned colour) {
    enum { BINS = 80, CELLS = 200 };
    double bins[BINS] = { 0 }, lo = p->range[0], wide = p->range[1] - lo, y = draw_py(p, base);
    draw_real curve[2 * CELLS];
    for (int i = 0; i < n; i++) {
        double bin = ((double)x[i] - lo) / wide * BINS;
        if (bin >= 0 && bin < BINS) bins[(int)bin] += BINS / wide / n;
    }
    for (int k = 0; k < BINS; k++) {
        double from = draw_px(p, lo + wide * k / BINS), top = draw_py(p, base + bins[k]);
        draw_rect(p->c, from, top, draw_px(p, lo + wide * (k + 1) / BINS) - from, y - top, colour,
                  0.45);
    }
    for (int k = 0; k < CELLS; k++) {
        double v = lo + wide * (k + 0.5) / CELLS;
        curve[2 * k] = (draw_real)v;
        curve[2 * k + 1] = (draw_real)(base + line_density(l, v, at));
    }
    draw_polyline(p, curve, CELLS, 2, 1.6, DRAW_INK, 1);
}
#endif
