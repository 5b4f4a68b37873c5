// line.h: two Gaussians on a line, their law at every t and pictures of it, for the examples
// that compare samples, grids and formulas. Include it after diffusion.h and draw.h.
#ifndef LINE_H
#define LINE_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

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
// L1 of what k cells between -edge and edge hold to what the law puts there; *want: its mean
// for shares of n exact samples.
static inline double line_l1(const line_law *l, const double *held, int k, double edge,
                             const df_point *p, int n, double *want) {
    double sum = 0;
    *want = 0;
    for (int i = 0; i < k; i++) {
        double q = line_below(l, 2 * edge * (i + 1) / k - edge, p) -
                   line_below(l, 2 * edge * i / k - edge, p);
        sum += fabs(held[i] - q), *want += sqrt(2 / LINE_PI * q * (1 - q) / n);
    }
    return sum;
}
// The score at x; part: those of the two components, which it is the mean of, weighted by how
// likely x is theirs.
static inline double line_score(const line_law *l, double x, const df_point *p, double part[2]) {
    double sum = 0;
    for (int k = 0; k < 2; k++) {
        double v = p->alpha * p->alpha * l->var[k] + p->sigma * p->sigma;
        part[k] = (p->alpha * l->mean[k] - x) / v;
        sum += l->w[k] * line_part(l, k, x, p) / line_density(l, x, p) * part[k];
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
// The curve of y [n] over all of a panel.
static inline void line_curve(const draw_panel *p, const double *y, int n, double width,
                              unsigned colour) {
    draw_real *xy = (draw_real *)malloc(2 * (size_t)n * sizeof *xy);
    for (int i = 0; i < n && xy; i++) {
        xy[2 * i] = (draw_real)(p->range[0] + (p->range[1] - p->range[0]) * (i + 0.5) / n);
        xy[2 * i + 1] = (draw_real)y[i];
    }
    if (xy) draw_polyline(p, xy, n, 2, width, colour, 0.95);
    free(xy);
}
// A histogram of x [n] on the height `base`, and the exact density over it.
static inline void line_ridge(const draw_panel *p, const line_law *l, const df_real *x, int n,
                              const df_point *at, double base, unsigned colour) {
    enum { BINS = 80, CELLS = 200 };
    double bins[BINS] = { 0 }, lo = p->range[0], wide = p->range[1] - lo, y = draw_py(p, base);
    double curve[CELLS];
    for (int i = 0; i < n; i++) {
        double bin = ((double)x[i] - lo) / wide * BINS;
        if (bin >= 0 && bin < BINS) bins[(int)bin] += BINS / wide / n;
    }
    for (int k = 0; k < BINS; k++) {
        double from = draw_px(p, lo + wide * k / BINS), top = draw_py(p, base + bins[k]);
        draw_rect(p->c, from, top, draw_px(p, lo + wide * (k + 1) / BINS) - from, y - top, colour,
                  0.45);
    }
    for (int k = 0; k < CELLS; k++)
        curve[k] = base + line_density(l, lo + wide * (k + 0.5) / CELLS, at);
    line_curve(p, curve, CELLS, 1.6, DRAW_INK);
}
// The height of ridge j, and a panel of ridges, one a point: rows [count] of samples [n].
static inline double line_base(int j) { return j ? j + 0.35 : 0; }
static inline draw_panel line_ridges(draw_canvas *c, double x, double y, double w, double h,
                                     const char *title, const line_law *l, int count,
                                     const df_real *const *rows, int n, const df_point *at,
                                     unsigned colour) {
    double range[4] = { -2.8, 2.8, -0.05, 0 };
    range[3] = line_base(count - 1) + 0.55;
    draw_panel p = draw_frame(c, x, y, w, h, title, range, 0);
    for (int j = 0; j < count; j++) {
        char text[32];
        snprintf(text, sizeof text, "t = %g", at[j].t);
        line_ridge(&p, l, rows[j], n, &at[j], line_base(j), colour);
        draw_text(c, p.x + 8, draw_py(&p, line_base(j) + 0.16), text, 9, 0, 1, DRAW_TEXT);
    }
    return p;
}
// The schedules of all processes but tables, three panels side by side.
static inline void line_schedules(draw_canvas *c, double x, double y, double w, double h) {
    enum { KINDS = 7, CELLS = 400 };
    const double side[3][4] = { { 0, 1, 0, 1.05 }, { 0, 1, 1e-3, 100 }, { 0, 1, -20, 20 } };
    const char *const titles[3] = { "alpha", "sigma", "log SNR" };
    const df_process kinds[KINDS] = { df_process_vp(0.1, 20), df_process_cosine(),
        df_process_ve(0.01, 50), df_process_edm(80), df_process_subvp(0.1, 20),
        df_process_flow(), df_process_trig(1) };
    const char *names[KINDS];
    unsigned colours[KINDS];
    for (int q = 0; q < 3; q++) {
        draw_panel p = draw_frame_log(c, x + q * (w + 5) / 3, y, (w - 10) / 3, h, titles[q],
                                      side[q], 5, 0, q == 1);
        for (int k = 0; k < KINDS; k++) {
            double v[CELLS];
            names[k] = df_process_name(&kinds[k]), colours[k] = draw_palette(k);
            for (int i = 0; i < CELLS; i++) {
                df_point a = df_process_at(&kinds[k], (i + 0.5) / CELLS);
                v[i] = q == 0 ? a.alpha : q == 1 ? a.sigma : 2 * a.lambda;
            }
            line_curve(&p, v, CELLS, 1.8, colours[k]);
        }
        if (q == 2) draw_legend(&p, KINDS, names, colours);
    }
}
// The score at a point of the path and those of the two components.
static inline void line_scores(draw_canvas *c, double x, double y, double w, double h,
                               const line_law *l, const df_point *at) {
    enum { CELLS = 400 };
    const char *const names[3] = { "of the mixture", "of the left bump", "of the right one" };
    const unsigned colours[3] = { draw_palette(0), draw_palette(1), draw_palette(2) };
    const double range[4] = { -2.5, 2.5, -9, 9 };
    char title[60];
    snprintf(title, sizeof title, "score at t = %g, global and local", at->t);
    draw_panel p = draw_frame(c, x, y, w, h, title, range, 6);
    for (int k = 0; k < 3; k++) {
        double v[CELLS], part[2];
        for (int i = 0; i < CELLS; i++) {
            double all = line_score(l, 5.0 * (i + 0.5) / CELLS - 2.5, at, part);
            v[i] = k ? part[k - 1] : all;
        }
        line_curve(&p, v, CELLS, k ? 1.4 : 3, colours[k]);
    }
    draw_axes(&p, "x", ""), draw_legend(&p, 3, names, colours);
}
#endif
