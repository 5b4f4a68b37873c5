// grid.h: a density on the line, kept as logarithms on a grid, and what a Gaussian step makes
// of it. Sums on a grid of smooth densities are exact but for the tails. Include after
// diffusion.h.
#ifndef GRID_H
#define GRID_H
#include <math.h>
#include <string.h>

enum { GRID = 4801 };
typedef struct grid_density {
    df_real x[GRID];         // equally spaced
    double log_p[GRID];
} grid_density;

static inline void grid_span(grid_density *g, double half) {
    for (int i = 0; i < GRID; i++) g->x[i] = (df_real)(half * (2.0 * i / (GRID - 1) - 1));
}
// N(0, 1) on -half .. half
static inline void grid_normal(grid_density *g, double half) {
    grid_span(g, half);
    for (int i = 0; i < GRID; i++)
        g->log_p[i] = -0.5 * (double)(g->x[i] * g->x[i]) - 0.918938533204673;
}
// p(x) = integral of p(z) N(x; mean(z), variance(z)) dz for x in -half .. half. reach: only z
// whose mean lies that near are looked at (then mean must rise with z), INFINITY: all.
static inline void grid_step(grid_density *g, const double *mean, const double *variance,
                             double half, double reach) {
    static double term[GRID], weight[GRID];
    double h = (double)(g->x[1] - g->x[0]);
    for (int j = 0; j < GRID; j++)
        weight[j] = g->log_p[j] + log(h) - 0.918938533204673 - 0.5 * log(variance[j]);
    grid_span(g, half);
    for (int i = 0, from = 0, to = 0; i < GRID; i++) {
        double x = (double)g->x[i], most = -1e300, sum = 0;
        while (from < GRID - 1 && mean[from] < x - reach) from++;
        while (to < GRID && mean[to] < x + reach) to++;
        for (int j = from; j < to; j++) {
            double e = x - mean[j];
            term[j] = weight[j] - e * e / (2 * variance[j]);
            most = term[j] > most ? term[j] : most;
        }
        for (int j = from; j < to; j++) sum += term[j] > most - 40 ? exp(term[j] - most) : 0;
        g->log_p[i] = sum > 0 ? most + log(sum) : -1e5;
    }
}
// KL(p || g) of log p on the same grid; least: no density of g below e^least
static inline double grid_kl(const grid_density *g, const double *log_p, double least) {
    double sum = 0, h = (double)(g->x[1] - g->x[0]);
    for (int i = 0; i < GRID; i++)
        sum += h * exp(log_p[i]) * (log_p[i] - fmax(g->log_p[i], least));
    return sum;
}
#endif
