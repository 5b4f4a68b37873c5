// What papers claim, as checks: first-order solvers are one, DDPM is Euler-Maruyama up to h^2,
// conditional and marginal losses have one gradient, the eta family's moments in closed form,
// what guidance does to Gaussians, and diffusion of word embeddings with an exact denoiser.
#include "diffusion.h"
#include "test.h"

#define DOUBLE_BUILD (sizeof(df_real) == 8)

static df_ctx *ctx;
static double tol(double of_double, double of_float) {
    return DOUBLE_BUILD ? of_double : of_float;
}

// One Gaussian, one dimension.
static df_mixture *gaussian(double mean, double variance) {
    double one = 1;
    return df_mixture_create(ctx, 1, 1, &one, &mean, &variance);
}
// Three of them.
static df_mixture *three_bumps(void) {
    static const double w[3] = {.3, .5, .2}, mean[3] = {-1.2, .3, 1.5}, var[3] = {.1, .15, .08};
    return df_mixture_create(ctx, 3, 1, w, mean, var);
}
static void run(const df_model *m, const df_sample_desc *d, df_real *x, int n) {
    check(df_sample(ctx, m, d, x, n) == DF_OK, "%s: %s", d->method, df_ctx_message(ctx));
}
static df_mixture_view view_of(const df_mixture *m, df_process p, df_prediction prediction) {
    df_mixture_view v;
    v.mixture = m;
    v.process = p;
    v.prediction = prediction;
    return v;
}

// ---- first-order solvers (Song 2021 eq. 12; Lu 2022a eq. 3.7; Lu 2022b eq. 10) ----

// The mixture of the tests below: three anisotropic Gaussians in the plane.
static df_mixture *plane_mixture(void) {
    static const double w[3] = {.3, .5, .2}, mean[6] = {2, 0, -1, 1.5, 0, -2};
    static const double cov[12] = {.3, .1, .1, .2, .2, -.05, -.05, .4, .1, 0, 0, .1};
    return df_mixture_create(ctx, 3, 2, w, mean, cov);
}
// VP, t from 1 to .01, lambda in N equal steps, from N(0, I).
static df_sample_desc table_run(const char *method, int order, int N) {
    df_sample_desc d = df_sample_defaults();
    d.method = method;
    d.order = order;
    d.steps = N;
    d.grid = "lambda";
    d.t_min = .01;
    d.end = DF_END_T_MIN;
    d.eta = df_sampler_find(ctx, method)->eta_max > 0 ? 0 : -1;
    return d;
}

TEST(first_order_solvers_are_one) {
    // Three formulas by hand, three ways through the library: one trajectory. 3a.
    enum { N = 25, n = 16 };
    static df_real path[3][(N + 1) * n * 2];
    df_mixture *gm = plane_mixture();
    df_process p = df_process_vp(.1, 20);
    df_mixture_view v = view_of(gm, p, DF_EPS);
    df_model model = df_mixture_model(&v);
    df_point grid[N + 1];
    double hand[3][2 * n], off[3] = {0, 0, 0}, most = 0;
    int points = 0;
    static const struct { const char *method; int order; } rows[3] = {
        {"ddim", 0}, {"dpm_solver_2", 1}, {"dpmpp_2m", 1}}; // predict eps, eps, x_0
    for (int k = 0; k < 3; k++) {
        df_sample_desc d = table_run(rows[k].method, rows[k].order, N);
        df_real x[2 * n];
        d.trajectory = path[k];
        run(&model, &d, x, n);
        if (k == 0) df_grid(ctx, &p, &d, grid, N + 1, &points);
    }
    expect(points == N + 1);
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < 2 * n; i++) hand[k][i] = (double)path[0][i];
    for (int j = 0; j < N; j++) {
        df_point s = grid[j], t = grid[j + 1];
        double h = t.lambda - s.lambda;
        double abar_s = s.alpha * s.alpha, abar_t = t.alpha * t.alpha;
        for (int k = 0; k < 3; k++) {
            df_real x[2 * n], e[2 * n];
            double time[n];
            for (int i = 0; i < 2 * n; i++) x[i] = (df_real)hand[k][i], time[i / 2] = s.t;
            expect(df_model_ask(ctx, &model, DF_ASK_PREDICT, time, n, x, NULL, NULL, e) == DF_OK);
            for (int i = 0; i < 2 * n; i++) {
                double X = hand[k][i], eps = (double)e[i], x0 = (X - s.sigma * eps) / s.alpha;
                hand[k][i] =
                    k == 0 ? sqrt(abar_t) * (X - sqrt(1 - abar_s) * eps) / sqrt(abar_s) +
                                 sqrt(1 - abar_t) * eps
                    : k == 1 ? t.alpha / s.alpha * X - t.sigma * expm1(h) * eps
                             : t.sigma / s.sigma * X - t.alpha * expm1(-h) * x0;
                for (int a = 0; a < 3; a++) // the hand's path against the library's
                    off[k] = fmax(off[k], fabs(hand[k][i] - (double)path[a][(j + 1) * 2 * n + i]));
                most = fmax(most, fabs(hand[k][i]));
            }
        }
    }
    for (int k = 0; k < 3; k++)
        check(off[k] < tol(1e-12, 2e-5) * most, "formula %d: off by %g of %g", k, off[k], most);
    df_mixture_free(gm);
}

// E[x_0 | x] of that mixture where alpha = 1, by Bayes' rule in plain double.
static void plain_x0(double sigma, const double *x, double *x0) {
    static const double w[3] = {.3, .5, .2}, mean[3][2] = {{2, 0}, {-1, 1.5}, {0, -2}};
    static const double cov[3][3] = {{.3, .1, .2}, {.2, -.05, .4}, {.1, 0, .1}}; // xx, xy, yy
    double log_p[3], at[3][2], most = -1e300, sum = 0;
    for (int k = 0; k < 3; k++) {
        double A = cov[k][0] + sigma * sigma, B = cov[k][1], C = cov[k][2] + sigma * sigma;
        double det = A * C - B * B, u = x[0] - mean[k][0], v = x[1] - mean[k][1];
        double p = (C * u - B * v) / det, q = (A * v - B * u) / det;
        log_p[k] = log(w[k]) - .5 * log(det) - .5 * (u * p + v * q);
        at[k][0] = mean[k][0] + cov[k][0] * p + cov[k][1] * q;
        at[k][1] = mean[k][1] + cov[k][1] * p + cov[k][2] * q;
        most = fmax(most, log_p[k]);
    }
    x0[0] = x0[1] = 0;
    for (int k = 0; k < 3; k++) {
        double r = exp(log_p[k] - most);
        sum += r;
        for (int j = 0; j < 2; j++) x0[j] += r * at[k][j];
    }
    for (int j = 0; j < 2; j++) x0[j] /= sum;
}
// y = x/alpha from rho_1 to rho_0 along dy/d rho = (y - x_0)/rho, N steps equal in log rho: by
// Euler's rule in rho, which is DDIM, or by the midpoint rule in log rho.
static void plain_path(double rho1, double rho0, int N, int midpoint, double *y) {
    for (int i = 0; i < N; i++) {
        double a = rho1 * pow(rho0 / rho1, i / (double)N), h = log(rho0 / rho1) / N, x0[2], m[2];
        double b = a * exp(h);
        plain_x0(a, y, x0);
        for (int j = 0; j < 2 && midpoint; j++) m[j] = y[j] + .5 * h * (y[j] - x0[j]);
        if (midpoint) plain_x0(a * exp(h / 2), m, x0);
        for (int j = 0; j < 2; j++)
            y[j] += midpoint ? h * (m[j] - x0[j]) : (b / a - 1) * (y[j] - x0[j]);
    }
}

TEST(ddims_errors_by_hand) {
    // Root mean square distance to the ODE's end, DDIM against RK4 in 400 steps: the same from the
    // same starts by the formulas above, Euler against extrapolated midpoints, but for what the
    // ends are apart. Then the slope of order 1, late: a few starts near the border of two bumps
    // make most of the error and come to order 1 last (ratios 1.6 and 3 at N = 160 and 320).
    enum { LOT = 512, HAND = 128, RUNS = 8 };
    static df_real start[LOT], exact[LOT], x[LOT];
    static double end[HAND];
    df_mixture *gm = plane_mixture();
    df_process p = df_process_vp(.1, 20);
    df_mixture_view v = view_of(gm, p, DF_X0);
    df_model model = df_mixture_model(&v);
    df_sample_desc d = table_run("rk4", 0, 400);
    df_point from = df_process_at(&p, 1), to = df_process_at(&p, .01);
    double rho1 = from.sigma / from.alpha, rho0 = to.sigma / to.alpha, all[RUNS];
    double same = tol(1e-7, 2e-5);
    df_random_normal(0, 0, 0, LOT, start);
    memcpy(exact, start, sizeof exact);
    d.start = DF_START_GIVEN;
    run(&model, &d, exact, LOT / 2);
    for (int i = 0; i < HAND; i += 2) {
        double y[2][2];
        for (int k = 0; k < 2; k++) {
            for (int j = 0; j < 2; j++) y[k][j] = (double)start[i + j] / from.alpha;
            plain_path(rho1, rho0, 2000 << k, 1, y[k]);
        }
        for (int j = 0; j < 2; j++) end[i + j] = to.alpha * (4 * y[1][j] - y[0][j]) / 3;
        for (int j = 0; j < 2; j++) near_abs((double)exact[i + j], end[i + j], same);
    }
    for (int k = 0; k < RUNS; k++) {
        double hand = 0, few = 0;
        all[k] = 0;
        d = table_run("ddim", 0, 10 << k);
        d.start = DF_START_GIVEN;
        memcpy(x, start, sizeof x);
        run(&model, &d, x, LOT / 2);
        for (int i = 0; i < HAND; i += 2) {
            double y[2];
            for (int j = 0; j < 2; j++) y[j] = (double)start[i + j] / from.alpha;
            plain_path(rho1, rho0, 10 << k, 0, y);
            for (int j = 0; j < 2; j++) {
                hand += pow(to.alpha * y[j] - end[i + j], 2) * 2 / HAND;
                few += pow((double)x[i + j] - (double)exact[i + j], 2) * 2 / HAND;
            }
        }
        near_abs(sqrt(few), sqrt(hand), same);
        for (int i = 0; i < LOT; i++) all[k] += pow((double)x[i] - (double)exact[i], 2) * 2 / LOT;
        all[k] = sqrt(all[k]);
    }
    near_abs(log(all[RUNS - 2] / all[RUNS - 1]) / log(2.0), 1, .15);
    df_mixture_free(gm);
}

// ---- DDPM is Euler-Maruyama (arXiv 2605.22586, theorem 7.7) ----

// A one for sample 1, nothing for sample 0.
static int one_impulse(void *user, const df_noise_query *q, df_real *out) {
    (void)user;
    for (int i = 0; i < q->n; i++) out[i] = (df_real)(q->first_sample + (uint64_t)i == 1);
    return 0;
}
// One step from x at t to t - dt: mean and variance of where it goes. dt >= t: to the data.
static void one_step(const char *method, const df_model *m, double t, double dt, double x,
                     double *got) {
    double points[2];
    df_real y[2];
    df_sample_desc d = df_sample_defaults();
    points[0] = t;
    points[1] = t - dt;
    d.method = method;
    d.points = points;
    d.points_count = 2;
    d.start = DF_START_GIVEN;
    d.noise.fill = one_impulse;
    y[0] = y[1] = (df_real)x;
    run(m, &d, y, 2);
    got[0] = (double)y[0];
    got[1] = ((double)y[1] - (double)y[0]) * ((double)y[1] - (double)y[0]);
}

TEST(ddpm_is_euler_maruyama_to_second_order) {
    // With h the step's integral of beta, s the score, E = beta dt where Euler sits:
    //   DDPM mean e^(h/2) (x + (1 - e^-h) s), variance (1 - e^-h) sigma_t^2/sigma_s^2;
    //   Euler's   x + E (x/2 + s), variance E = h + beta' dt^2/2 + ...
    // so (DDPM - Euler)/h^2 -> x/8 - beta'/(2 beta^2) (x/2 + s) for the mean, and
    // -1/2 - abar/sigma^2 - beta'/(2 beta^2) for the variance; the rest falls as h.
    if (!DOUBLE_BUILD) return; // differences of h^2
    df_mixture *gm = three_bumps();
    for (int c = 0; c < 2; c++)
        for (int k = 0; k < 3; k++) {
            double b0 = c ? .1 : 6, b1 = c ? 20 : 6, t = .4 + .2 * k, x = .8 - .5 * k;
            df_process p = df_process_vp(b0, b1);
            df_mixture_view v = view_of(gm, p, DF_EPS);
            df_model model = df_mixture_model(&v);
            df_point at = df_process_at(&p, t);
            double beta = b0 + (b1 - b0) * t, rest = (b1 - b0) / (2 * beta * beta);
            double off[2][3], limit[2];
            df_real xr = (df_real)x, s;
            expect(df_mixture_score(ctx, gm, &at, 1, &xr, &s) == DF_OK);
            limit[0] = x / 8 - rest * (x / 2 + (double)s);
            limit[1] = -.5 - at.alpha * at.alpha / (at.sigma * at.sigma) - rest;
            for (int j = 0; j < 3; j++) {
                double dt = .004 / (1 << j), ddpm[2], em[2];
                df_point to = df_process_at(&p, t - dt);
                double h = 2 * log(to.alpha / at.alpha);
                one_step("ddpm", &model, t, dt, x, ddpm);
                one_step("euler_maruyama", &model, t, dt, x, em);
                near(ddpm[0], exp(h / 2) * (x - expm1(-h) * (double)s), 1e-12);
                near(ddpm[1], -expm1(-h) * to.sigma * to.sigma / at.sigma / at.sigma, 1e-12);
                near(em[1], beta * dt, 1e-12);
                for (int q = 0; q < 2; q++) off[q][j] = (ddpm[q] - em[q]) / (h * h) - limit[q];
            }
            for (int q = 0; q < 2; q++)
                for (int j = 0; j < 2; j++)
                    check(fabs(off[q][j] / off[q][j + 1] - 2) < .2,
                          "beta %g .. %g, t %g, %s: (DDPM - EM)/h^2 off its limit %g by %g, %g",
                          b0, b1, t, q ? "variance" : "mean", limit[q], off[q][j], off[q][j + 1]);
        }
    df_mixture_free(gm);
}

TEST(the_last_ddpm_step_adds_no_noise) {
    // btilde_1 = 0: into the data point the posterior's variance is (1 - abar_0) ... = 0, and
    // the mean is E[x_0 | x_1]; on any process.
    df_mixture *gm = three_bumps();
    df_process p[3];
    p[0] = df_process_vp(.1, 20), p[1] = df_process_flow(), p[2] = df_process_edm(80);
    for (int k = 0; k < 3; k++) {
        df_mixture_view v = view_of(gm, p[k], DF_X0);
        df_model model = df_mixture_model(&v);
        df_point at = df_process_at(&p[k], .01);
        df_real x = (df_real).4, want;
        double got[2];
        expect(df_mixture_posterior(ctx, gm, &at, 1, &x, &want, NULL) == DF_OK);
        one_step("ddpm", &model, .01, .01, .4, got);
        near(got[0], (double)want, tol(1e-12, 1e-6));
        expect(got[1] == 0);
    }
    df_mixture_free(gm);
}

// ---- conditional and marginal losses (Lipman 2023, theorem 2; Vincent 2011) ----

// Gradient of sum_i w_i (net(x_i, t) - target_i)^2 in all weights of a net: [size] into grads,
// the loss returned. Rows in pieces, for memory's sake.
static double weighted(df_net *net, double t, int n, const df_real *x, const df_real *target,
                       const df_real *w, df_real *grads) {
    double loss = 0;
    enum { PIECE = 1024 };
    for (int from = 0; from < n; from += PIECE) {
        int rows = n - from < PIECE ? n - from : PIECE, shape[2];
        df_run r = df_run_defaults(ctx, net);
        df_scope scope = df_scope_begin(ctx);
        shape[0] = rows;
        shape[1] = 1;
        r.weights = df_net_weights(net);
        r.grads = grads;
        df_record_begin(ctx);
        df_tensor *y = df_run_net(&r, df_tensor_copy(ctx, 2, shape, x + from),
                                  df_tensor_fill(ctx, 1, shape, t), NULL);
        df_tensor *e = df_square(ctx, df_sub(ctx, y, df_tensor_copy(ctx, 2, shape, target + from)));
        df_tensor *sum = df_sum(ctx, df_mul(ctx, e, df_tensor_copy(ctx, 2, shape, w + from)));
        check(df_backward(ctx, sum) == DF_OK, "%s", df_ctx_message(ctx));
        loss += sum ? (double)sum->data[0] : 0;
        df_record_end(ctx);
        df_scope_end(ctx, scope, NULL);
    }
    return loss;
}

enum { X0S = 73, EPSES = 69, XS = 320, WEIGHTS = 2000 };
// By quadrature, trapezoids on Gaussians (errors below e^-60): the conditional loss over x_0
// and eps with target a x_0 + b eps, and the marginal one over x_t with target E[. | x_t].
static void both_losses(df_net *net, const df_mixture *gm, df_process p, df_prediction q,
                        double t, double loss[2], df_real *grads) {
    static df_real x[X0S * EPSES], target[X0S * EPSES], w[X0S * EPSES], mean[XS];
    df_point at = df_process_at(&p, t), data = df_point_data();
    double row[2], reach = 1, log_p;
    int n = 0;
    expect(df_plane_row(ctx, &p, q, &at, row) == DF_OK);
    data.sigma = 0;
    for (int i = 0; i < X0S; i++) {
        double x0 = 7.2 * i / (X0S - 1) - 3.6;
        df_real at0 = (df_real)x0;
        expect(df_mixture_log_density(ctx, gm, &data, 1, &at0, &log_p) == DF_OK);
        for (int j = 0; j < EPSES; j++, n++) {
            double eps = 17.0 * j / (EPSES - 1) - 8.5;
            x[n] = (df_real)(at.alpha * x0 + at.sigma * eps);
            target[n] = (df_real)(row[0] * x0 + row[1] * eps);
            w[n] = (df_real)(exp(log_p - eps * eps / 2) / sqrt(8 * atan(1.0)) *
                             (7.2 / (X0S - 1)) * (17.0 / (EPSES - 1)));
        }
    }
    loss[0] = weighted(net, t, n, x, target, w, grads);
    reach = at.alpha * 2.6 + 8.5 * sqrt(at.alpha * at.alpha * .15 + at.sigma * at.sigma);
    for (int i = 0; i < XS; i++) x[i] = (df_real)(reach * (2.0 * i / (XS - 1) - 1));
    expect(df_mixture_posterior(ctx, gm, &at, XS, x, mean, NULL) == DF_OK);
    for (int i = 0; i < XS; i++) {
        double m = (double)mean[i], e = ((double)x[i] - at.alpha * m) / at.sigma;
        expect(df_mixture_log_density(ctx, gm, &at, 1, x + i, &log_p) == DF_OK);
        target[i] = (df_real)(row[0] * m + row[1] * e);
        w[i] = (df_real)(exp(log_p) * 2 * reach / (XS - 1));
    }
    loss[1] = weighted(net, t, XS, x, target, w, grads + df_net_size(net));
}

TEST(conditional_and_marginal_gradients_are_equal) {
    // Flow matching (VELOCITY), denoising score matching (SCORE), and all other rows; the
    // losses differ by E Var[a x_0 + b eps | x_t], the same for every net.
    static df_real grads[2 * WEIGHTS];
    df_mixture *gm = three_bumps();
    df_process p[3];
    p[0] = df_process_flow(), p[1] = df_process_vp(.1, 20), p[2] = df_process_edm(3);
    for (int k = 0; k < 3; k++)
        for (int q = 0; q < DF_PREDICTION_COUNT; q++) {
            double t = .25 + .2 * k, gap[2];
            for (int seed = 0; seed < 2; seed++) {
                df_mlp_desc m = df_mlp_defaults();
                double loss[2], most = 0;
                m.dim = 1, m.width = 16, m.depth = 1, m.embed = 4, m.seed = (uint64_t)seed;
                df_net *net = df_mlp_create(ctx, &m);
                if (!check(net != NULL && df_net_size(net) <= WEIGHTS, "net")) return;
                memset(grads, 0, sizeof grads);
                size_t size = df_net_size(net);
                both_losses(net, gm, p[k], (df_prediction)q, t, loss, grads);
                near_all(grads, grads + size, size, tol(1e-10, 1e-5));
                for (size_t i = 0; i < size; i++) most = fmax(most, fabs((double)grads[i]));
                check(most > .01, "gradient %g", most); // there is something to agree on
                gap[seed] = loss[0] - loss[1];
                df_net_free(net);
            }
            check(gap[0] > .01 || q == DF_EDM_F, "gap %g", gap[0]);
            near(gap[0], gap[1], tol(1e-10, 1e-5));
        }
    df_mixture_free(gm);
}

// ---- the eta family in closed form ----

// Sample 0 gets no noise, sample j > 0 a one in draw j - 1.
static int impulse(void *user, const df_noise_query *q, df_real *out) {
    (void)user;
    for (int i = 0; i < q->n; i++)
        out[i] = (df_real)(q->first_sample + (uint64_t)i == (uint64_t)q->draw + 1);
    return 0;
}
enum { DRAWS = 1700 };
// Mean and variance of what an affine sampler makes of N + 1 draws (start NOISE).
static void moments(const df_model *m, df_sample_desc d, double *got) {
    static df_real x[DRAWS];
    int n = d.steps + 2;
    d.noise.fill = impulse;
    run(m, &d, x, n);
    got[0] = (double)x[0];
    got[1] = 0;
    for (int j = 1; j < n; j++) got[1] += ((double)x[j] - got[0]) * ((double)x[j] - got[0]);
}

TEST(the_prior_is_forgotten_by_the_sde_alone) {
    // N(M, C) on VP from N(0, 1), lambda uniform to t = 1e-3. A step takes deviations from
    // alpha M to (sigma_t/sigma_s e^(-eta^2 h) + alpha_t (1 - e^(-(1+eta^2) h)) alpha_s C/c_s)
    // of them; the limit of the product is, with y = x/alpha and g^2/alpha^2 dt = d rho^2,
    //   mean error = -M alpha_end [(C + rho_end^2)/(C + rho_1^2)]^((1 + eta^2)/2).
    // Figures: variance errors at N = 25 and 400, the mean's (recorded; eta 0 and 1 at every N
    // are in test_samplers.c).
    static const struct { double eta, var25, var400, mean, digits; } rows[4] = {
        {0, -.00698, -.00048, -9e-4, 5e-5}, {.5, 0, 0, -1.7e-4, 1e-5},
        {1, -.0121, -.0009, -1.2e-6, 5e-8}, {2, -.0197, -.0023, -1e-14, 1e-14}};
    const double M = .7, C = .04;
    df_mixture *gm = gaussian(M, C);
    df_process p = df_process_vp(.1, 20);
    df_mixture_view v = view_of(gm, p, DF_X0);
    df_model model = df_mixture_model(&v);
    for (int k = 0; k < 4; k++) {
        double eta2 = rows[k].eta * rows[k].eta, error[6], bias[6];
        double rho1 = 1, rho0 = 1, limit = 1;
        for (int j = 0; j < 6; j++) {
            df_sample_desc d = df_sample_defaults();
            static df_point grid[DRAWS];
            double got[2], gain = 1, var = 1;
            int points;
            d.method = "exponential";
            d.eta = rows[k].eta;
            d.eta_in = DF_ETA_FAMILY;
            d.steps = 25 << j;
            d.grid = "lambda";
            d.t_min = 1e-3;
            d.end = DF_END_T_MIN;
            moments(&model, d, got);
            expect(df_grid(ctx, &p, &d, grid, DRAWS, &points) == DF_OK);
            df_point end = grid[points - 1];
            var = grid[0].sigma * grid[0].sigma; // what fresh noise has
            for (int i = 0; i + 1 < points; i++) {
                df_point s = grid[i], t = grid[i + 1];
                double h = t.lambda - s.lambda, c = s.alpha * s.alpha * C + s.sigma * s.sigma;
                double a = t.sigma / s.sigma * exp(-eta2 * h) -
                           t.alpha * expm1(-(1 + eta2) * h) * s.alpha * C / c;
                gain *= a;
                var = a * a * var - t.sigma * t.sigma * expm1(-2 * eta2 * h);
            }
            near(got[0], M * (end.alpha - grid[0].alpha * gain), tol(1e-13, 1e-5));
            near(got[1], var, tol(1e-13, 1e-5));
            // from here on by hand: 1e-14 is below a float's last digit
            error[j] = var - end.alpha * end.alpha * C - end.sigma * end.sigma;
            rho1 = grid[0].sigma / grid[0].alpha, rho0 = end.sigma / end.alpha;
            limit = -M * end.alpha * pow((C + rho0 * rho0) / (C + rho1 * rho1), (1 + eta2) / 2);
            bias[j] = log(-M * grid[0].alpha * gain / limit);
        }
        if (rows[k].var25 < 0) near_abs(error[0], rows[k].var25, 6e-5);
        if (rows[k].var25 < 0) near_abs(error[4], rows[k].var400, 6e-5);
        near_abs(limit, rows[k].mean, rows[k].digits);
        for (int j = 3; j < 5; j++) { // both of order 1; with eta 1 a step's mean is exact
            int fine = rows[k].eta == 1 ? fabs(bias[j]) < 1e-12
                                        : fabs(bias[j] / bias[j + 1] - 2) < .2;
            check(fine, "eta %g: log of mean error over its limit %g, %g", rows[k].eta, bias[j],
                  bias[j + 1]);
            check(fabs(error[j] / error[j + 1] - 2) < .2, "eta %g: variance errors %g, %g",
                  rows[k].eta, error[j], error[j + 1]);
        }
    }
    df_mixture_free(gm);
}

// ---- guidance on Gaussians: three laws of one score ----

// N(0, 1) for label 1, N(0, 2) for -1.
static int labelled_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    (void)self, (void)c;
    for (int i = 0; i < q->n; i++) {
        double C = q->labels != NULL && q->labels[i] == 1 ? 1 : 2, s = q->sigma[i];
        out[i] = (df_real)(s * (double)q->x[i] / (C + s * s)); // eps = -sigma score, alpha = 1
    }
    return 0;
}

TEST(guidance_is_not_tilting) {
    // VE, sigma^2 = t, scale g = 3. From T = infinity the ODE ends with variance 2^(1-g) = .25
    // (test_samplers.c), the SDE with (2 - 2^(2-2g))/(2g-1) = .3875; both differ from that of
    // the tilted density p_c^g p^(1-g), 2/(g+1) = .5, which Langevin dynamics on the same
    // score has.
    enum { N = 800 };
    static double points[N + 1];
    static int labels[N + 2];
    df_model model = df_model_defaults(), guided;
    df_guidance g = df_guidance_defaults();
    df_sample_desc d = df_sample_defaults();
    double got[2], error[2];
    model.predict = labelled_predict;
    model.dim = 1;
    model.process = df_process_edm(1000);
    model.prediction = DF_EPS;
    g.model = &model;
    g.scale = 3;
    guided = df_guidance_model(&g);
    for (int i = 0; i < N + 2; i++) labels[i] = 1;
    d.labels = labels;
    d.points_in = DF_POINTS_RHO;
    d.points = points;
    for (int k = 0; k < 2; k++) {
        int n = N / 2 << k;
        for (int i = 0; i < n; i++) points[i] = 1000 * pow(1e-6, i / (n - 1.0));
        points[n] = 0;
        d.points_count = n + 1, d.steps = n;
        d.method = "dpmpp_2m_sde", d.eta = 1; // weak order 2
        moments(&guided, d, got);
        near_abs(got[0], 0, 1e-12);
        error[k] = got[1] - .3875;
    }
    // order 2; extrapolated there remain h^3 and what T = 1e6, sigma_min^2 = 1e-6 leave
    check(fabs(4 * error[1] - error[0]) / 3 < tol(5e-6, 2e-4) && fabs(error[0]) < 4e-4,
          "SDE: off .3875 by %g, %g", error[0], error[1]);
    // Langevin at sigma = 1e-3 with step h: variance v/(1 - h/(2 v)), v = .5 up to 1e-6.
    d.points = NULL, d.points_count = 0, d.points_in = DF_POINTS_T;
    d.method = "langevin", d.steps = 600, d.t_max = 1e-6, d.langevin_step = .05, d.eta = -1;
    moments(&guided, d, got);
    near(got[1], .5 / (1 - .05 / (2 * .5)), tol(1e-5, 1e-4));
    // and at scale 1 all of them are the conditional model's, bit for bit
    static df_real x[2][N + 2];
    g.scale = 1;
    guided = df_guidance_model(&g);
    d = df_sample_defaults();
    d.labels = labels, d.method = "ddpm", d.steps = 30;
    run(&model, &d, x[0], N);
    run(&guided, &d, x[1], N);
    same_bits(x[0], x[1], sizeof x[0]);
}

// ---- diffusion of embeddings (arXiv 2605.22586, section 9) ----

// A vocabulary with an orthonormal, frozen embedding E; the next word given the last one; of
// a prompt, which stays clean, only its last word matters. A response of R words is R rows of
// E, noised with abar = 1 - sqrt t. In units of lambda_E, the root mean square of E's entries,
// the noise is N(0, I). The denoiser is exact: forward and backward sums over a chain whose
// words are seen through x_k = alpha e_k/lambda_E + sigma eps.
enum { V = 16, R = 4, P = 2, DIM = R * V, TABLE = 200 };
typedef struct language {
    double E[V][V], next[V][V];
    double lambda_E;
    df_process process;
} language;

static int nearest(const language *l, const double *x) { // argmax of the logits E^T x
    int best = 0;
    double most = -1e300;
    for (int v = 0; v < V; v++) {
        double dot = 0;
        for (int j = 0; j < V; j++) dot += l->E[v][j] * x[j];
        if (dot > most) most = dot, best = v;
    }
    return best;
}
static int language_predict(void *self, df_ctx *c, const df_query *q, df_real *out) {
    const language *l = (const language *)self;
    (void)c;
    for (int i = 0; i < q->n; i++) {
        double see[R][V], ahead[R + 1][V], behind[V], a = q->alpha[i], s = q->sigma[i];
        double prompt[V], state[V];
        const df_real *x = q->x + i * DIM;
        const df_real *cond = q->condition + (size_t)(i % q->samples) * q->condition_stride;
        for (int j = 0; j < V; j++) prompt[j] = (double)cond[(P - 1) * V + j];
        int last = nearest(l, prompt);
        for (int k = 0; k < R; k++) {
            double most = -1e300;
            for (int v = 0; v < V; v++) {
                see[k][v] = 0;
                for (int j = 0; j < V; j++) see[k][v] += l->E[v][j] * (double)x[k * V + j];
                see[k][v] *= a / (s * s * l->lambda_E);
                most = fmax(most, see[k][v]);
            }
            for (int v = 0; v < V; v++) see[k][v] = exp(see[k][v] - most);
        }
        for (int v = 0; v < V; v++) ahead[R][v] = 1;
        for (int k = R - 1; k > 0; k--) { // ahead[k][u]: words k .. R-1 given that k-1 is u
            double sum = 0;
            for (int u = 0; u < V; u++) {
                ahead[k][u] = 0;
                for (int v = 0; v < V; v++)
                    ahead[k][u] += l->next[u][v] * see[k][v] * ahead[k + 1][v];
                sum += ahead[k][u];
            }
            for (int u = 0; u < V; u++) ahead[k][u] /= sum;
        }
        for (int v = 0; v < V; v++) behind[v] = v == last;
        for (int k = 0; k < R; k++) {
            double sum = 0, all = 0;
            for (int v = 0; v < V; v++) {
                state[v] = 0;
                for (int u = 0; u < V; u++) state[v] += behind[u] * l->next[u][v];
                state[v] *= see[k][v];
                sum += state[v];
                all += state[v] * ahead[k + 1][v];
            }
            for (int v = 0; v < V; v++) behind[v] = state[v] / sum;
            for (int j = 0; j < V; j++) {
                double mean = 0;
                for (int v = 0; v < V; v++) mean += state[v] * ahead[k + 1][v] / all * l->E[v][j];
                out[i * DIM + k * V + j] = (df_real)(mean / l->lambda_E);
            }
        }
    }
    return 0;
}
static const double chance[3] = {.6, .3, .1}; // of three words that may follow another
static df_model language_model(language *l) {
    static const double zero = 0;
    df_model m = df_model_defaults();
    double betas[TABLE], before = 1, sum = 0;
    memset(l, 0, sizeof *l);
    for (int v = 0; v < V; v++) { // Gram and Schmidt on random rows
        df_real z[V];
        df_random_normal(11, (uint64_t)v, 0, V, z);
        for (int j = 0; j < V; j++) l->E[v][j] = (double)z[j];
        for (int twice = 0; twice < 2; twice++)
            for (int u = 0; u <= v; u++) {
                double dot = 0;
                for (int j = 0; j < V; j++) dot += l->E[u][j] * l->E[v][j];
                for (int j = 0; j < V; j++)
                    l->E[v][j] = u < v ? l->E[v][j] - dot * l->E[u][j] : l->E[v][j] / sqrt(dot);
            }
        for (int k = 0; k < 3; k++) l->next[v][(5 * v + 3 + k * (k + 2)) % V] = chance[k];
    }
    for (int v = 0; v < V; v++)
        for (int j = 0; j < V; j++) sum += l->E[v][j] * l->E[v][j] / (V * V);
    l->lambda_E = sqrt(sum);
    for (int i = 0; i < TABLE; i++) {
        double abar = 1 - sqrt((i + 1.0) / TABLE);
        betas[i] = 1 - abar / before; // the last is 1: no signal at t = 1
        before = abar;
    }
    check(df_process_table(ctx, betas, TABLE, &l->process) == DF_OK, "%s", df_ctx_message(ctx));
    m.predict = language_predict;
    m.self = l;
    m.dim = DIM;
    m.process = l->process;
    m.prediction = DF_X0;
    m.mean = &zero, m.scale = &l->lambda_E, m.scaling_size = 1; // samples in E's own units
    return m;
}

TEST(the_denoiser_of_embeddings_is_exact) {
    // Against all 81 responses that may follow a prompt, as a mixture of points.
    enum { ALL = 81, n = 12 };
    static double means[ALL * DIM], covariances[(size_t)ALL * DIM * DIM];
    double w[ALL], time[n];
    static df_real x[n * DIM], want[n * DIM], got[n * DIM];
    language l;
    df_model m = language_model(&l);
    near(l.lambda_E, .25, 1e-12);
    df_real prompt[P * V];
    for (int j = 0; j < P * V; j++) prompt[j] = (df_real)l.E[7][j % V];
    for (int a = 0; a < ALL; a++) {
        int word = 7, code = a;
        w[a] = 1;
        for (int k = 0; k < R; k++, code /= 3) {
            int choice = code % 3;
            w[a] *= chance[choice];
            word = (5 * word + 3 + choice * (choice + 2)) % V;
            for (int j = 0; j < V; j++) means[a * DIM + k * V + j] = l.E[word][j] / l.lambda_E;
        }
    }
    df_mixture *gm = df_mixture_create(ctx, ALL, DIM, w, means, covariances);
    if (!check(gm != NULL, "%s", df_ctx_message(ctx))) return;
    for (int k = 0; k < 4; k++) {
        static const double times[4] = {.02, .2, .6, .95};
        df_point at = df_process_at(&l.process, times[k]);
        df_query q;
        double alpha[n], sigma[n];
        near_abs(at.alpha * at.alpha, 1 - sqrt(times[k]), 1e-12); // knots of the table
        df_mixture_sample(ctx, gm, &at, 3, 0, n, x);
        df_mixture_posterior(ctx, gm, &at, n, x, want, NULL);
        for (int i = 0; i < n; i++) time[i] = at.t, alpha[i] = at.alpha, sigma[i] = at.sigma;
        memset(&q, 0, sizeof q);
        q.ask = DF_ASK_PREDICT, q.n = q.samples = n, q.dim = DIM, q.x = x, q.condition = prompt;
        q.t = time, q.alpha = alpha, q.sigma = sigma;
        expect(m.predict(m.self, ctx, &q, got) == 0);
        near_all(got, want, n * DIM, tol(1e-10, 1e-5));
    }
    df_mixture_free(gm);
}

TEST(embeddings_decode_to_what_may_follow) {
    // DDIM with eta 0, .5, 1 from pure noise: every word of a response must be one that may
    // follow the word before it (.95 is asked), stand at its embedding, and come as often as
    // it should (6 deviations of n = 600 binomial draws, three words, three eta: < 1e-7).
    enum { n = 600 };
    static df_real prompt[n * P * V], x[n * DIM], from[n * DIM];
    language l;
    df_model m = language_model(&l);
    for (int i = 0; i < n * P * V; i++) {
        int word = i / V % P ? i / (P * V) % V : 0; // the first word says nothing
        prompt[i] = (df_real)l.E[word][i % V];
    }
    for (int k = 0; k < 4; k++) { // the last: from noised data, not from noise
        df_sample_desc d = df_sample_defaults();
        int legal = 0, same = 0, count[3] = {0, 0, 0};
        double far = 0;
        d.steps = 50;
        d.eta = k < 3 ? .5 * k : 0;
        d.seed = (uint64_t)k;
        d.condition = prompt;
        d.condition_stride = P * V;
        if (k == 3) d.start = DF_START_DATA, d.t_max = .16, d.steps = 32;
        memcpy(from, x, sizeof x);
        run(&m, &d, x, n);
        for (int i = 0; i < n; i++) {
            int last = i % V;
            for (int w = 0; w < R; w++) {
                double y[V], at[V], off = 0;
                for (int j = 0; j < V; j++) y[j] = (double)x[i * DIM + w * V + j];
                for (int j = 0; j < V; j++) at[j] = (double)from[i * DIM + w * V + j];
                int word = nearest(&l, y);
                for (int j = 0; j < V; j++) off += (y[j] - l.E[word][j]) * (y[j] - l.E[word][j]);
                far = fmax(far, sqrt(off));
                legal += l.next[last][word] > 0;
                for (int c = 0; c < 3 && w == 0; c++) count[c] += l.next[last][word] == chance[c];
                if (k == 3) same += word == nearest(&l, at);
                last = word;
            }
        }
        check(legal >= .95 * n * R, "eta %g: %d of %d words may stand there", d.eta, legal, n * R);
        check(far < .1, "eta %g: %g from a word's embedding", d.eta, far);
        for (int c = 0; c < 3; c++)
            check(fabs(count[c] - n * chance[c]) < 6 * sqrt(n * chance[c] * (1 - chance[c])),
                  "eta %g: %d of %d, want %g", d.eta, count[c], n, n * chance[c]);
        if (k == 3) check(same >= .95 * n * R, "%d of %d words came back", same, n * R);
    }
}

// ---- velocities (arXiv 2605.22586, theorem 1.2 and lemma 1.3) ----

TEST(conditional_velocity_in_three_forms) {
    // u = (alpha' - alpha sigma'/sigma) x_0 + sigma'/sigma x = f x - g^2/2 grad log p(x | x_0),
    // and is what the plane makes of (x, x_0).
    df_process p[7];
    p[0] = df_process_vp(.1, 20), p[1] = df_process_cosine(), p[2] = df_process_ve(.01, 50);
    p[3] = df_process_edm(80), p[4] = df_process_subvp(.1, 20), p[5] = df_process_flow();
    p[6] = df_process_trig(.5);
    for (int k = 0; k < 7; k++)
        for (int j = 1; j < 10; j++) {
            double cx, cp, x = 1.3, x0 = -.4, t = j / 10.0;
            df_point a = df_process_at(&p[k], t);
            df_rates r;
            unsigned want = DF_RATE_ALPHA | DF_RATE_SIGMA | DF_RATE_F | DF_RATE_G2;
            expect(df_process_rates(ctx, &p[k], t, want, &r) == DF_OK);
            expect(df_plane_map(ctx, &p[k], DF_X0, DF_VELOCITY, &a, &cx, &cp) == DF_OK);
            double u = (r.alpha - a.alpha * r.sigma / a.sigma) * x0 + r.sigma / a.sigma * x;
            double s = -(x - a.alpha * x0) / (a.sigma * a.sigma);
            near(cx * x + cp * x0, u, 1e-11);
            near(r.f * x - r.g2 / 2 * s, u, 1e-11);
        }
}

// ---- Schroedinger's bridge between Gaussians (MATH.md, section 5) ----

TEST(static_bridge_of_gaussians) {
    // Of all couplings of N(0, a^2) and N(0, b^2) the one that Brownian motion of variance S is
    // nearest to has covariance (sqrt(4 a^2 b^2 + S^2) - S)/2. Sinkhorn's iteration on a grid,
    // which knows of no Gaussians: sums on grids this fine are integrals to 1e-15, the tails
    // beyond 7 deviations have 1e-10, and each iteration leaves corr^2 = .78 of the error.
    // Half of the coupling is a denoiser: given y, x is what the model of data N(0, v) says at
    // sigma^2 = S, v not a^2 but such that x has variance a^2 over all y.
    enum { SIDE = 141 };
    static double K[SIDE][SIDE]; // K[i][j] from x_i to y_j
    const double a = 1, b = 2, S = .5;
    double u[SIDE], v[SIDE], p[SIDE], q[SIDE], x[SIDE], y[SIDE], covariance = 0;
    double want = (sqrt(4 * a * a * b * b + S * S) - S) / 2, slope = want / (b * b);
    for (int i = 0; i < SIDE; i++) {
        double z = 7 * (2.0 * i / (SIDE - 1) - 1);
        x[i] = a * z, y[i] = b * z;
        p[i] = q[i] = exp(-z * z / 2) / sqrt(8 * atan(1.0)) * 14 / (SIDE - 1);
        v[i] = 1;
    }
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) K[i][j] = exp(-(x[i] - y[j]) * (x[i] - y[j]) / (2 * S));
    for (int k = 0; k < 120; k++) {
        for (int i = 0; i < SIDE; i++) {
            double sum = 0;
            for (int j = 0; j < SIDE; j++) sum += K[i][j] * v[j];
            u[i] = p[i] / sum;
        }
        for (int j = 0; j < SIDE; j++) {
            double sum = 0;
            for (int i = 0; i < SIDE; i++) sum += K[i][j] * u[i];
            v[j] = q[j] / sum;
        }
    }
    df_mixture *data = gaussian(0, S * slope / (1 - slope));
    df_process edm = df_process_edm(80);
    df_point at = df_process_at_rho(&edm, sqrt(S));
    for (int j = 0; j < SIDE; j++) {
        double mean = 0, square = 0;
        df_real given = (df_real)y[j], m, C;
        for (int i = 0; i < SIDE; i++) {
            mean += K[i][j] * u[i] * v[j] / q[j] * x[i];
            square += K[i][j] * u[i] * v[j] / q[j] * x[i] * x[i];
        }
        covariance += q[j] * mean * y[j];
        if (fabs(y[j]) > 5 * b) continue; // next to the grid's end
        expect(df_mixture_posterior(ctx, data, &at, 1, &given, &m, &C) == DF_OK);
        near((double)m, mean, tol(1e-6, 1e-5));
        near((double)C, square - mean * mean, tol(1e-6, 1e-5));
        near((double)C + slope * slope * b * b, a * a, tol(1e-12, 1e-6));
    }
    near(covariance, want, 1e-8);
    near_abs(want, 1.76556, 5e-6); // the sheet's; its grid had 1.76543
    df_mixture_free(data);
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    ctx = df_ctx_create(NULL);
    RUN(first_order_solvers_are_one);
    RUN(ddims_errors_by_hand);
    RUN(ddpm_is_euler_maruyama_to_second_order);
    RUN(the_last_ddpm_step_adds_no_noise);
    RUN(conditional_and_marginal_gradients_are_equal);
    RUN(the_prior_is_forgotten_by_the_sde_alone);
    RUN(guidance_is_not_tilting);
    RUN(the_denoiser_of_embeddings_is_exact);
    RUN(embeddings_decode_to_what_may_follow);
    RUN(conditional_velocity_in_three_forms);
    RUN(static_bridge_of_gaussians);
    df_ctx_free(ctx);
    return test_end();
}
