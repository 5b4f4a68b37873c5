// Relatives of diffusion: autoencoders against linear-Gaussian closed forms and quadrature,
// coupling flows against Jacobians and grids, the neural ODE against a known flow, all
// gradients by differences; checkpoints, training, descriptors, failing memory.
#include "diffusion.h"
#include "test.h"
#include "counting.h"

enum { IS_DOUBLE = sizeof(df_real) == 8 };
static const double TINY = sizeof(df_real) == 8 ? 1e-12 : 2e-5, PI = 3.14159265358979323846;

static df_ctx *ctx;

static void set(df_net *net, const char *name, int element, double value) {
    const df_param *p = df_net_param(net, df_net_find(net, name));
    if (check(p != NULL && element < (int)p->size, "no %s[%d]", name, element))
        df_net_weights(net)[p->offset + (size_t)element] = (df_real)value;
}
static void scramble(df_net *net, double deviation) {
    df_real *w = df_net_weights(net);
    df_random_normal(77, 0, 0, df_net_size(net), w);
    for (size_t i = 0; i < df_net_size(net); i++) w[i] = (df_real)(deviation * (double)w[i]);
}
static df_tensor *rows(int n, int width, const df_real *x) {
    int shape[2] = {n, width};
    return df_tensor_copy(ctx, 2, shape, x);
}
static double log_normal(double x, double mean, double variance) {
    return -.5 * log(2 * PI * variance) - (x - mean) * (x - mean) / (2 * variance);
}
static df_vae_desc small_vae(int levels) {
    df_vae_desc d = df_vae_defaults();
    d.dim = 3, d.width = 5, d.depth = 1, d.levels = levels, d.seed = 4;
    d.latent[1] = 3;
    return d;
}
// A linear VAE of 1-D data, p(z_{i-1}|z_i) = N(a[i] z_i, v[i]), i = 1 .. L, with its exact
// posterior as encoder: from the variances C_i of z_i, q(z_i|z_{i-1}) = N(a C_i/C_{i-1}
// z_{i-1}, v C_i/C_{i-1}). Returns C_0, the variance of x.
static double linear_vae(df_net **net, int levels, const double *a, const double *v) {
    df_vae_desc d = df_vae_defaults();
    double C[DF_VAE_LEVELS + 1];
    char name[64];
    d.dim = 1, d.depth = 0, d.levels = levels;
    for (int i = 0; i < levels; i++) d.latent[i] = 1;
    *net = df_vae_create(ctx, &d);
    C[levels] = 1;
    for (int i = levels; i >= 1; i--) C[i - 1] = a[i] * a[i] * C[i] + v[i];
    for (int i = 1; i <= levels; i++) {
        snprintf(name, sizeof name, "enc.%d.0.weight", i);
        set(*net, name, 0, a[i] * C[i] / C[i - 1]), set(*net, name, 1, 0);
        snprintf(name, sizeof name, "enc.%d.0.bias", i);
        set(*net, name, 0, 0), set(*net, name, 1, log(v[i] * C[i] / C[i - 1]));
        snprintf(name, sizeof name, "dec.%d.0.weight", i);
        set(*net, name, 0, a[i]);
        if (i > 1) set(*net, name, 1, 0);
        snprintf(name, sizeof name, "dec.%d.0.bias", i);
        set(*net, name, 0, 0);
        if (i > 1) set(*net, name, 1, log(v[i]));
    }
    set(*net, "dec.log_variance", 0, log(v[1]));
    return C[0];
}
// E ELBO of each row where it is a quadratic form of the noise, exactly: the mean over all
// signs of noise 1. `loss` receives its mean as a graph.
static void mean_elbo(const df_run *run, const df_real *x, int n, double *out, df_tensor **loss) {
    int dim = df_net_dim(run->net), m = df_vae_latents(run->net);
    df_real noise[64 * 8];
    for (int i = 0; i < n; i++) out[i] = 0;
    for (int s = 0; s < 1 << m; s++) {
        for (int i = 0; i < n * m; i++) noise[i] = (df_real)(s >> i % m & 1 ? 1 : -1);
        df_tensor *y = df_vae_elbo(run, rows(n, dim, x), rows(n, m, noise), NULL);
        if (!check(y != NULL && y->ndim == 1 && y->shape[0] == n, "%s", df_ctx_message(ctx)))
            return;
        for (int i = 0; i < n; i++) out[i] += (double)y->data[i] / (1 << m);
        if (loss) *loss = *loss ? df_add(ctx, *loss, df_mean(ctx, y)) : df_mean(ctx, y);
    }
}

// ---- autoencoders ----

// The data of the source's check 1g has variance 4.01. Any split 4.01 = w^2 + s^2 with its
// posterior is an optimum (probabilistic PCA, Tipping & Bishop 1999): the bound is tight, and
// flat for data of that variance.
TEST(linear_vae_is_exact) {
    static const df_real x[4] = {(df_real)2.1, (df_real)-2.1, (df_real)1.9, (df_real)-1.9};
    static const double deviations[3] = {.1, 1, 1.9};
    for (int k = 0; k < 3; k++) {
        double s2 = deviations[k] * deviations[k], a[2] = {0, sqrt(4.01 - s2)}, v[2] = {0, s2};
        double elbo[4];
        df_net *net;
        near(linear_vae(&net, 1, a, v), 4.01, 1e-12);
        df_real grads[16] = {0};
        df_run run = df_run_defaults(ctx, net);
        df_tensor *loss = NULL;
        run.grads = grads;
        df_record_begin(ctx);
        mean_elbo(&run, x, 4, elbo, &loss);
        expect(df_backward(ctx, loss) == DF_OK);
        df_record_end(ctx);
        // the rounding of what cancels: x^2/s^2 = 441 at s = .1
        double tol = IS_DOUBLE ? 1e-11 : 3e-4;
        for (int i = 0; i < 4; i++) near(elbo[i], log_normal((double)x[i], 0, 4.01), tol);
        for (size_t i = 0; i < df_net_size(net); i++)
            near((double)grads[i], 0, IS_DOUBLE ? 1e-10 : 3e-3);
        // elsewhere the bound is lower, by the encoder's miss: KL = (m'-m)^2/(2 v) for a mean
        // that is off
        set(net, "enc.1.0.bias", 0, .3);
        double off[4];
        run.grads = NULL;
        mean_elbo(&run, x, 4, off, NULL);
        for (int i = 0; i < 4; i++) near(elbo[i] - off[i], .09 / (2 * s2 / 4.01), 30 * tol);
        df_net_free(net);
    }
}

// The same in 3 dimensions: x = W z + s eps, columns of W orthogonal so that the posterior is
// diagonal: q = N(w_k.x/m_k, s^2/m_k), m_k = |w_k|^2 + s^2. C has eigenvalue m_k along w_k and
// s^2 across.
// Two narrow modes, .5 N(-2, .1^2) + .5 N(2, .1^2). The best a linear VAE can be is the
// Gaussian of the same variance, 4.01, which lacks log(sqrt(4.01/.01)/2) = 2.304 nats;
// diffusion with the exact score moves quantiles onto quantiles: W1 is the mean distance.
static double two_modes_quantile(double u) {
    double low = -3, high = 3;
    for (int i = 0; i < 60; i++) {
        double x = (low + high) / 2, below = (erfc((-2 - x) / .1 / sqrt(2)) +
                                              erfc((2 - x) / .1 / sqrt(2))) / 4;
        *(below < u ? &low : &high) = x;
    }
    return low;
}
TEST(two_modes) {
    enum { N = 2001 };
    static df_real x[N];
    double weight[2] = {.5, .5}, mean[2] = {-2, 2}, S[2] = {.01, .01}, v[2] = {0, .5}, a[2], w1 = 0;
    double entropy = log(2) + .5 * log(2 * PI * .01) + .5;    // the modes are 40 deviations apart
    df_net *net;
    a[1] = sqrt(4.01 - v[1]);
    near(linear_vae(&net, 1, a, v), 4.01, 1e-12);
    double elbo = 0;                          // E over the data by the Gaussian's second moment
    df_run run = df_run_defaults(ctx, net);
    for (int sign = -1; sign <= 1; sign += 2) {
        df_real at[2] = {(df_real)sqrt(4.01), -(df_real)sqrt(4.01)}, noise = (df_real)sign;
        df_tensor *one = df_vae_elbo(&run, rows(1, 1, at), rows(1, 1, &noise), NULL);
        elbo += one != NULL ? (double)one->data[0] / 2 : 0;
    }
    near(-entropy - elbo, 2.304, 5e-4);
    expect(-entropy - elbo > 1);
    df_net_free(net);
    df_mixture *m = df_mixture_create(ctx, 2, 1, weight, mean, S);
    df_mixture_view view = {m, df_process_vp(.1, 20), DF_EPS};
    df_model model = df_mixture_model(&view);
    df_sample_desc d = df_sample_defaults();
    d.method = "dpmpp_2m", d.steps = 100, d.grid = "lambda", d.start = DF_START_GIVEN;
    for (int i = 0; i < N; i++) {             // quantiles of N(0, 1), by bisection
        double u = (i + .5) / N, low = -6, high = 6;
        for (int k = 0; k < 60; k++) {
            double c = (low + high) / 2;
            *(erfc(-c / sqrt(2)) / 2 < u ? &low : &high) = c;
        }
        x[i] = (df_real)low;
    }
    check(df_sample(ctx, &model, &d, x, N) == DF_OK, "%s", df_ctx_message(ctx));
    for (int i = 0; i < N; i++) w1 += fabs((double)x[i] - two_modes_quantile((i + .5) / N)) / N;
    check(w1 < .02, "W1 = %g", w1);
    df_mixture_free(m);
}

TEST(probabilistic_pca) {
    static const double W[3][2] = {{2, .3}, {1, -.6}, {0, .4}};      // w_1.w_2 = 0
    df_vae_desc d = df_vae_defaults();
    double s2 = .49, m[2] = {5 + s2, .61 + s2}, elbo[5], norm[2] = {5, .61};
    d.dim = 3, d.depth = 0, d.deviation = .7;
    df_net *net = df_vae_create(ctx, &d);
    expect(net != NULL && df_net_find(net, "dec.log_variance") < 0);
    scramble(net, 0);
    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < 3; i++) {
            set(net, "dec.1.0.weight", 2 * i + k, W[i][k]);
            set(net, "enc.1.0.weight", 3 * k + i, W[i][k] / m[k]);
        }
        set(net, "enc.1.0.bias", 2 + k, log(s2 / m[k]));
    }
    df_real x[15];
    df_random_normal(3, 0, 0, 15, x);
    df_run run = df_run_defaults(ctx, net);
    mean_elbo(&run, x, 5, elbo, NULL);
    for (int r = 0; r < 5; r++) {
        double square = 0, form = 0, log_det = log(m[0]) + log(m[1]) + log(s2);
        for (int i = 0; i < 3; i++) square += (double)(x[3 * r + i] * x[3 * r + i]);
        for (int k = 0; k < 2; k++) {
            double dot = 0;
            for (int i = 0; i < 3; i++) dot += W[i][k] * (double)x[3 * r + i];
            form += dot * dot / norm[k] * (1 / m[k] - 1 / s2);
        }
        form += square / s2;
        near(elbo[r], -.5 * (3 * log(2 * PI) + log_det + form), 10 * TINY);
    }
    df_net_free(net);
}

// A linear hierarchy is a Markov chain; run backwards it is one too: with those encoders the
// bound is tight on any number of levels.
TEST(linear_hierarchy_is_exact) {
    static const double a[6] = {0, .8, -1.2, .5, 2, 1.1}, v[6] = {0, .5, .3, 1.4, .2, .9};
    static const df_real x[3] = {(df_real).4, (df_real)-1.7, 3};
    for (int levels = 1; levels <= 5; levels += 2) {
        double elbo[3];
        df_net *net;
        double C = linear_vae(&net, levels, a, v);
        df_run run = df_run_defaults(ctx, net);
        mean_elbo(&run, x, 3, elbo, NULL);
        for (int i = 0; i < 3; i++) near(elbo[i], log_normal((double)x[i], 0, C), 20 * TINY);
        int t[1] = {3};
        df_tensor *y = df_run_net(&run, rows(3, 1, x), df_tensor_new(ctx, 1, t), NULL);
        // up and down by means: each level's factor is a^2 C_i/C_{i-1}
        double factor = 1, up = 1;
        for (int i = levels; i >= 1; i--) {
            double below = a[i] * a[i] * up + v[i];
            factor *= a[i] * a[i] * up / below;
            up = below;
        }
        for (int i = 0; i < 3; i++) near((double)y->data[i], factor * (double)x[i], TINY);
        df_net_free(net);
    }
}

// Parts, written out in double from what encode and decode say.
TEST(parts_of_the_bound) {
    df_vae_desc d = small_vae(2);
    df_net *net = df_vae_create(ctx, &d);
    enum { N = 4 };
    df_real x[3 * N], noise[5 * N];
    df_random_normal(1, 0, 0, 3 * N, x);
    df_random_normal(1, 1, 0, 5 * N, noise);
    scramble(net, .4);
    expect(df_vae_latents(net) == 5);
    df_run run = df_run_defaults(ctx, net);
    df_tensor *parts = NULL, *lv1, *lv2, *pl0, *pl1;
    df_tensor *elbo = df_vae_elbo(&run, rows(N, 3, x), rows(N, 5, noise), &parts);
    df_tensor *m1 = df_vae_encode(&run, 1, rows(N, 3, x), &lv1);
    df_real z1[2 * N], z2[3 * N];
    for (int i = 0; i < 2 * N; i++)
        z1[i] = (df_real)((double)m1->data[i] +
                          exp((double)lv1->data[i] / 2) * (double)noise[i / 2 * 5 + i % 2]);
    df_tensor *m2 = df_vae_encode(&run, 2, rows(N, 2, z1), &lv2);
    for (int i = 0; i < 3 * N; i++)
        z2[i] = (df_real)((double)m2->data[i] +
                          exp((double)lv2->data[i] / 2) * (double)noise[i / 3 * 5 + 2 + i % 3]);
    df_tensor *p1 = df_vae_decode(&run, 2, rows(N, 3, z2), &pl1);
    df_tensor *p0 = df_vae_decode(&run, 1, rows(N, 2, z1), &pl0);
    expect(parts->shape[0] == N && parts->shape[1] == 3);
    for (int r = 0; r < N; r++) {
        double want[3] = {0, 0, 0};
        for (int k = 0; k < 3; k++) {
            int i = 3 * r + k;
            double m = (double)m2->data[i], l = (double)lv2->data[i];
            want[0] += log_normal((double)x[i], (double)p0->data[i], exp((double)pl0->data[i]));
            want[2] += .5 * (m * m + exp(l) - 1 - l);        // KL(N(m, e^l) || N(0, 1))
        }
        for (int k = 0; k < 2; k++) {
            int i = 2 * r + k;
            want[1] -= .5 * (log(2 * PI) + 1 + (double)lv1->data[i]);
            want[1] -= log_normal((double)z1[i], (double)p1->data[i], exp((double)pl1->data[i]));
        }
        near_all(parts->data + 3 * r, want, 3, 5 * TINY);
        near((double)elbo->data[r], want[0] - want[1] - want[2], 10 * TINY);
    }
    df_net_free(net);
}

// In one dimension all integrals are sums on a grid: E ELBO + KL(q(z|x) || p(z|x)) = log p(x).
TEST(gap_is_the_posterior_kl) {
    enum { N = 1601 };
    df_vae_desc d = df_vae_defaults();
    d.dim = 1, d.latent[0] = 1, d.width = 6, d.depth = 2;
    df_net *net = df_vae_create(ctx, &d);
    scramble(net, .7);
    df_run run = df_run_defaults(ctx, net);
    static df_real z[N], noise[N], xs[N];
    double h = 16. / (N - 1);
    for (int k = 0; k < 3; k++) {
        df_real x = (df_real)(1.3 * k - 1);
        double p = 0, bound = 0, kl = 0;
        df_tensor *lv, *q = df_vae_encode(&run, 1, rows(1, 1, &x), &lv), *plv;
        double m = (double)q->data[0], s = exp((double)lv->data[0] / 2);
        for (int i = 0; i < N; i++) {
            noise[i] = (df_real)(-8 + h * i), xs[i] = x;
            z[i] = (df_real)(-8 + h * i);
        }
        df_tensor *y = df_vae_decode(&run, 1, rows(N, 1, z), &plv);
        for (int i = 0; i < N; i++)
            p += h * exp(log_normal((double)z[i], 0, 1) +
                         log_normal((double)x, (double)y->data[i], exp((double)plv->data[i])));
        df_tensor *e = df_vae_elbo(&run, rows(N, 1, xs), rows(N, 1, noise), NULL);
        for (int i = 0; i < N; i++) z[i] = (df_real)(m + s * (double)noise[i]);
        y = df_vae_decode(&run, 1, rows(N, 1, z), &plv);
        for (int i = 0; i < N; i++) {
            double weight = h * exp(log_normal((double)noise[i], 0, 1));
            double joint = log_normal((double)z[i], 0, 1) +
                           log_normal((double)x, (double)y->data[i], exp((double)plv->data[i]));
            bound += weight * (double)e->data[i];
            kl += weight * (log_normal((double)z[i], m, s * s) - joint + log(p));
        }
        check(kl > 1e-3, "kl %g", kl);
        near(bound + kl, log(p), IS_DOUBLE ? 1e-10 : 1e-5);
    }
    df_net_free(net);
}

// Draws: the same in parts, in the data's units; linear parameters give N(0, C). Of 20,000
// draws mean and variance lie within 5 of their own standard deviations but once in 10^6.
TEST(vae_samples) {
    enum { N = 20000 };
    static const double a[4] = {0, .8, -1.2, .5}, v[4] = {0, .5, .3, 1.4};
    static df_real x[N], y[N];
    double shift = 3, stretch = 2, mean = 0, square = 0;
    df_net *net;
    double C = linear_vae(&net, 3, a, v);
    expect(df_vae_sample(ctx, net, 9, 0, N, x) == DF_OK);
    for (int i = 0; i < N; i++) mean += (double)x[i] / N, square += (double)(x[i] * x[i]) / N;
    near(mean, 0, 5 * sqrt(C / N));
    near_abs(square, C, 5 * C * sqrt(2. / N));
    expect(df_vae_sample(ctx, net, 9, 0, 3, y) == DF_OK);
    expect(df_vae_sample(ctx, net, 9, 3, N - 3, y + 3) == DF_OK);
    same_bits(x, y, sizeof x);
    df_net_set_scaling(ctx, net, 1, &shift, &stretch);
    expect(df_vae_sample(ctx, net, 9, 0, N, y) == DF_OK);
    for (int i = 0; i < N; i++) x[i] = (df_real)(3 + 2 * (double)x[i]);
    near_all(y, x, N, TINY);
    df_net_free(net);
}

// ---- coupling flows ----

static df_net *small_coupling(int dim, int layers) {
    df_coupling_desc d = df_coupling_defaults();
    d.dim = dim, d.width = 6, d.depth = 1, d.layers = layers;
    return df_coupling_create(ctx, &d);
}
static double determinant(int n, double *a) {
    double det = 1;
    for (int k = 0; k < n; k++) {
        int pivot = k;
        for (int i = k; i < n; i++)
            if (fabs(a[i * n + k]) > fabs(a[pivot * n + k])) pivot = i;
        for (int j = 0; j < n && pivot != k; j++) {
            double keep = a[k * n + j];
            a[k * n + j] = a[pivot * n + j], a[pivot * n + j] = keep;
        }
        det *= pivot != k ? -a[k * n + k] : a[k * n + k];
        for (int i = k + 1; i < n; i++)
            for (int j = n - 1; j >= k; j--)
                a[i * n + j] -= a[i * n + k] / a[k * n + k] * a[k * n + j];
    }
    return det;
}
TEST(coupling_inverts) {
    for (int dim = 2; dim <= 5; dim++) {
        enum { N = 7 };
        df_net *net = small_coupling(dim, 5);
        df_real x[5 * N];
        int t[1] = {N};
        df_random_normal(2, 0, 0, 5 * N, x);
        df_run run = df_run_defaults(ctx, net);
        df_tensor *z = df_run_net(&run, rows(N, dim, x), df_tensor_new(ctx, 1, t), NULL);
        same_bits(z->data, x, sizeof(df_real) * (size_t)(dim * N));      // starts as identity
        scramble(net, .6);
        z = df_run_net(&run, rows(N, dim, x), df_tensor_new(ctx, 1, t), NULL);
        double moved = 0;
        for (int i = 0; i < N * dim; i++) moved = fmax(moved, fabs((double)(z->data[i] - x[i])));
        expect(moved > .3);
        df_tensor *back = df_coupling_inverse(&run, z);
        near_all(back->data, x, N * dim, 20 * TINY);
        df_tensor *lp = df_coupling_log_density(&run, rows(N, dim, x));
        expect(lp->ndim == 1 && lp->shape[0] == N);
        for (int r = 0; IS_DOUBLE && r < N; r++) {     // log |det| by central differences
            double J[25], want = 0, e = 1e-5;
            for (int j = 0; j < dim; j++) {
                df_real up[5], down[5];
                memcpy(up, x + dim * r, sizeof(df_real) * (size_t)dim);
                memcpy(down, up, sizeof up);
                up[j] += (df_real)e, down[j] -= (df_real)e;
                int one[1] = {1};
                df_tensor *u = df_run_net(&run, rows(1, dim, up), df_tensor_new(ctx, 1, one),
                                          NULL);
                df_tensor *l = df_run_net(&run, rows(1, dim, down), df_tensor_new(ctx, 1, one),
                                          NULL);
                for (int i = 0; i < dim; i++)
                    J[i * dim + j] = (double)(u->data[i] - l->data[i]) / (2 * e);
                want += log_normal((double)z->data[dim * r + j], 0, 1);
            }
            near((double)lp->data[r], want + log(fabs(determinant(dim, J))), 1e-7);
        }
        df_net_free(net);
    }
}
// The trapezoid rule of a smooth density with thin tails: its error is the tails' alone.
TEST(coupling_integrates_to_one) {
    enum { SIDE = 401 };
    df_coupling_desc d = df_coupling_defaults();
    d.width = 6, d.depth = 1, d.layers = 4, d.scale = .4;
    df_net *net = df_coupling_create(ctx, &d);
    scramble(net, .5);
    df_run run = df_run_defaults(ctx, net);
    df_real *x = (df_real *)malloc(sizeof(df_real) * 2 * SIDE * SIDE);
    double sum = 0, h = 40. / (SIDE - 1);
    for (int i = 0; i < SIDE * SIDE; i++) {
        x[2 * i] = (df_real)(-20 + h * (i / SIDE));
        x[2 * i + 1] = (df_real)(-20 + h * (i % SIDE));
    }
    df_tensor *lp = df_coupling_log_density(&run, rows(SIDE * SIDE, 2, x));
    for (int i = 0; i < SIDE * SIDE; i++) sum += h * h * exp((double)lp->data[i]);
    near(sum, 1, IS_DOUBLE ? 1e-8 : 1e-5);
    free(x);
    df_net_free(net);
}
// scale bounds every layer: weights however large stretch by at most e^scale.
TEST(coupling_is_bounded) {
    df_net *net = small_coupling(2, 3);
    df_real x[2] = {(df_real).3, (df_real)-.2};
    scramble(net, 1000);
    for (int l = 0; l < 3; l++) {              // no shift
        char name[32];
        snprintf(name, sizeof name, "layer.%d.1.weight", l);
        for (int k = 0; k < 6; k++) set(net, name, 6 + k, 0);
        snprintf(name, sizeof name, "layer.%d.1.bias", l);
        set(net, name, 1, 0);
    }
    df_run run = df_run_defaults(ctx, net);
    df_tensor *back = df_coupling_inverse(&run, rows(1, 2, x));
    for (int k = 0; k < 2; k++) expect(fabs((double)back->data[k]) <= exp(4.0001));
    df_net_free(net);
}
TEST(coupling_samples) {
    enum { N = 5000 };
    static df_real x[2 * N], y[2 * N], z[2 * N];
    double shift[2] = {3, -1}, stretch[2] = {2, .5}, mean[2] = {0}, square[2] = {0};
    df_net *net = small_coupling(2, 4);
    scramble(net, .5);
    df_net_set_scaling(ctx, net, 2, shift, stretch);
    expect(df_coupling_sample(ctx, net, 5, 10, N, x) == DF_OK);
    expect(df_coupling_sample(ctx, net, 5, 10, 7, y) == DF_OK);
    expect(df_coupling_sample(ctx, net, 5, 17, N - 7, y + 14) == DF_OK);
    same_bits(x, y, sizeof x);
    // sent back they are N(0, 1): 5 standard deviations, as above
    for (int i = 0; i < 2 * N; i++)
        y[i] = (df_real)(((double)x[i] - shift[i % 2]) / stretch[i % 2]);
    df_run run = df_run_defaults(ctx, net);
    int t[1] = {N};
    df_tensor *back = df_run_net(&run, rows(N, 2, y), df_tensor_new(ctx, 1, t), NULL);
    memcpy(z, back->data, sizeof z);
    for (int i = 0; i < 2 * N; i++) {
        mean[i % 2] += (double)z[i] / N, square[i % 2] += (double)(z[i] * z[i]) / N;
    }
    for (int k = 0; k < 2; k++) {
        near(mean[k], 0, 5 / sqrt(N)), near(square[k], 1, 5 * sqrt(2. / N));
    }
    df_net_free(net);
}

// ---- the neural ODE ----

// Gaussian to Gaussian along the flow's own path: deviations s_t = sqrt((1-t)^2 s_0^2 + t^2),
// v = (s_t'/s_t) x in a turned frame, so that x(1) = R (R^T x/s_0) and div v = sum s'/s.
static const double s0[2] = {.4, 2.5}, turn[2] = {.8, .6};
static df_tensor *linear_field(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    df_ctx *c = run->ctx;
    int two[2] = {2, 2};
    double time = (double)t->data[0], map[2][2] = {{0}};
    (void)labels;
    if (df_net_get(run->net, 0)) time = df_net_get(run->net, 0) == 1 ? time / 1000 : 1 - time;
    for (int k = 0; k < 2; k++) {
        double s2 = (1 - time) * (1 - time) * s0[k] * s0[k] + time * time;
        double rate = (time - (1 - time) * s0[k] * s0[k]) / s2;
        double axis[2] = {k ? -turn[1] : turn[0], k ? turn[0] : turn[1]};
        if (df_net_get(run->net, 0) == 2) rate = -rate;        // dx/d(1 - t)
        for (int i = 0; i < 4; i++) map[i / 2][i % 2] += rate * axis[i / 2] * axis[i % 2];
    }
    df_real values[4];
    for (int i = 0; i < 4; i++) values[i] = (df_real)map[i / 2][i % 2];
    return df_matmul(c, x, df_tensor_copy(c, 2, two, values), 0, 0);
}
static double gaussian_log(const df_real *x) {
    double a = turn[0] * (double)x[0] + turn[1] * (double)x[1];
    double b = -turn[1] * (double)x[0] + turn[0] * (double)x[1];
    return log_normal(a, 0, s0[0] * s0[0]) + log_normal(b, 0, s0[1] * s0[1]);
}
static df_net *linear_net(int kind) {
    int dim = 2;
    df_card card = df_card_defaults();
    df_net *net = df_net_create(ctx, "linear field", 1, &dim, linear_field, 0);
    df_net_add(ctx, net, "unused", 1, &dim, DF_INIT_ZERO);
    df_net_set(net, 0, kind);
    if (kind == 1) card.time = df_time_affine(1000, 0);
    if (kind == 2) card.time = card.clock = df_time_affine(-1, 1);
    expect(df_net_set_card(ctx, net, &card) == DF_OK);
    return net;
}
TEST(node_of_a_known_flow) {
    enum { N = 5 };
    df_real x[2 * N], plain[N] = {0};
    df_random_normal(6, 0, 0, 2 * N, x);
    for (int kind = 0; kind < 3; kind++) {     // our time; 1000 t; 1 - t, dx/d(1 - t)
        df_net *net = linear_net(kind);
        df_run run = df_run_defaults(ctx, net);
        double error[5] = {0};
        for (int k = 0; k < 5; k++) {
            df_tensor *lp = df_node_log_density(&run, 16 << k, rows(N, 2, x), NULL, NULL);
            if (!check(lp != NULL, "%s", df_ctx_message(ctx))) return;
            expect(lp->ndim == 1 && lp->shape[0] == N);
            for (int i = 0; i < N; i++)
                error[k] = fmax(error[k], fabs((double)lp->data[i] - gaussian_log(x + 2 * i)));
            if (k == 0 && kind == 0) memcpy(plain, lp->data, sizeof plain);
            if (k == 0) near_all(lp->data, plain, N, TINY);
        }
        // the order from the last halving, where the next term of the error is a tenth
        double order = log2(error[3] / error[4]);
        check(!IS_DOUBLE || fabs(order - 4) < .2, "order %g", order);
        check(error[4] < (IS_DOUBLE ? 1e-9 : 1e-4), "%g", error[4]);
        // the chapter on likelihood walks the same ODE from t_min on, an error of order t_min
        df_model model = df_net_model(net);
        df_likelihood_desc l = df_likelihood_defaults();
        double log_p;
        l.walk.t_min = 1e-6;
        for (int i = 0; i < N; i++) {          // one by one: the field reads the first time
            check(df_log_likelihood(ctx, &model, &l, x + 2 * i, 1, &log_p) == DF_OK, "%s",
                  df_ctx_message(ctx));
            near(log_p, gaussian_log(x + 2 * i), 1e-3);
        }
        df_net_free(net);
    }
}
// Probes do not move the path, so the mean over all signs is the exact trace.
TEST(node_probe) {
    enum { N = 4 };
    df_mlp_desc m = df_mlp_defaults();
    m.width = 7, m.depth = 1, m.embed = 4, m.time_scale = 3, m.classes = 2;
    df_net *net = df_mlp_create(ctx, &m);
    df_run run = df_run_defaults(ctx, net);
    df_objective_desc d = df_objective_defaults();
    df_real x[2 * N], v[2 * N];
    double sum[N] = {0};
    int labels[N] = {0, 1, -1, 0};
    df_random_normal(6, 0, 0, 2 * N, x);
    d.steps = 3;
    df_tensor *exact = df_node_log_density(&run, d.steps, rows(N, 2, x), labels, NULL);
    for (int s = 0; s < 4; s++) {
        for (int i = 0; i < 2 * N; i++) v[i] = (df_real)(s >> i % 2 & 1 ? 1 : -1);
        df_tensor *y = df_node_log_density(&run, d.steps, rows(N, 2, x), labels, rows(N, 2, v));
        for (int i = 0; i < N; i++) sum[i] += (double)y->data[i] / 4;
    }
    near_all(sum, exact->data, N, TINY);
    // the objective's probes are the signs of the batch's own draw 0
    df_batch b;
    memset(&b, 0, sizeof b);
    b.x0 = rows(N, 2, x), b.labels = labels, b.stride = 1, d.probes = 1;
    df_tensor *signs = df_batch_normal(&run, &b, 0, 2);
    int up = 0;
    for (int i = 0; i < 2 * N; i++) up += signs->data[i] > 0;
    expect(up > 0 && up < 2 * N);
    for (int i = 0; i < 2 * N; i++) v[i] = (df_real)(signs->data[i] < 0 ? -1 : 1);
    df_tensor *hand = df_mean(ctx, df_node_log_density(&run, d.steps, b.x0, labels, rows(N, 2, v)));
    near(-(double)hand->data[0], (double)df_objective_node(&d, &run, &b)->data[0], TINY);
    df_tensor *other = df_node_log_density(&run, d.steps, rows(N, 2, x), NULL, NULL);
    expect(fabs((double)(other->data[0] - exact->data[0])) > 1e-4);
    df_net_free(net);
}

// ---- all: gradients, training, checkpoints, errors ----

static df_objective_desc node;
static struct way { const char *name; df_objective_fn objective; void *self; } ways[] = {
    {"vae", df_objective_elbo, NULL}, {"hierarchy", df_objective_elbo, NULL},
    {"coupling", df_objective_flow_likelihood, NULL}, {"node", df_objective_node, NULL},
    {"node, probed", df_objective_node, &node}};
enum { WAYS = 5 };
static df_net *way_net(df_ctx *c, int way) {
    df_vae_desc v = small_vae(1 + way);
    df_coupling_desc f = df_coupling_defaults();
    df_mlp_desc m = df_mlp_defaults();
    f.dim = 3, f.width = 5, f.depth = 2, f.layers = 3;
    m.dim = 3, m.width = 6, m.depth = 1, m.embed = 4, m.time_scale = 3;
    node = df_objective_defaults(), node.steps = 3, node.probes = 1;
    return way < 2 ? df_vae_create(c, &v) : way == 2 ? df_coupling_create(c, &f)
                                                     : df_mlp_create(c, &m);
}
static double way_loss(const df_run *run, int way, const df_real *x, df_tensor **graph) {
    df_batch b;
    df_scope mark = df_scope_begin(ctx);
    memset(&b, 0, sizeof b);
    b.x0 = rows(4, 3, x), b.first = 11, b.stride = 2;
    df_tensor *loss = ways[way].objective(ways[way].self, run, &b);
    double value = check(loss && loss->size == 1, "%s", df_ctx_message(ctx)) ?
                   (double)loss->data[0] : 0;
    if (graph) *graph = loss;
    else df_scope_end(ctx, mark, NULL);
    return value;
}
TEST(gradients) {
    if (!IS_DOUBLE) return;
    df_real x[12];
    df_random_normal(8, 0, 0, 12, x);
    for (int way = 0; way < WAYS; way++) {
        df_net *net = way_net(ctx, way);
        scramble(net, .4);
        df_real *w = df_net_weights(net);
        size_t size = df_net_size(net);
        df_real *grads = (df_real *)calloc(size, sizeof *grads);
        df_run run = df_run_defaults(ctx, net);
        df_tensor *loss;
        run.grads = grads, run.seed = 3;
        df_record_begin(ctx);
        way_loss(&run, way, x, &loss);
        expect(df_backward(ctx, loss) == DF_OK);
        df_record_end(ctx);
        run.grads = NULL;
        for (size_t i = 0; i < size; i += way < 3 ? 1 : 3) {
            df_real keep = w[i];
            w[i] = keep + (df_real)1e-5;
            double up = way_loss(&run, way, x, NULL);
            w[i] = keep - (df_real)1e-5;
            up -= way_loss(&run, way, x, NULL);
            w[i] = keep;
            check(fabs((double)grads[i] - up / 2e-5) < 1e-7 * fmax(1, fabs((double)grads[i])),
                  "%s: weight %d: %.12g, by differences %.12g", ways[way].name, (int)i,
                  (double)grads[i], up / 2e-5);
        }
        free(grads);
        df_net_free(net);
    }
}

// Through the trainer: the same on any number of threads, better than at the start; then
// through a file, with the average.
TEST(training_and_files) {
    enum { ROWS = 200 };
    df_real data[3 * ROWS];
    df_random_normal(8, 1, 0, 3 * ROWS, data);
    for (int i = 0; i < 3 * ROWS; i++)
        data[i] = (df_real)(i % 3 * .5 + (i % 3 == 2 ? .2 : 1.5) * (double)data[i]);
    for (int way = 0; way < WAYS; way++) {
        df_train_info info[2][2];
        df_ctx *both[2] = {new_ctx(1, NULL), new_ctx(3, NULL)};
        df_net *net[2];
        for (int k = 0; k < 2; k++) {
            df_train_desc d = df_train_defaults();
            d.objective = ways[way].objective, d.objective_self = ways[way].self;
            d.batch = 50, d.steps = 60, d.report = 10, d.warmup = 5, d.learning_rate = 1e-2;
            d.ema = .9, d.weight_decay = 0;
            net[k] = way_net(both[k], way);
            df_trainer *tr = df_trainer_create(both[k], net[k], data, ROWS, NULL, &d);
            if (!check(tr != NULL, "%s", df_ctx_message(both[k]))) return;
            expect(df_trainer_run(tr, 10) == DF_OK);
            df_trainer_info(tr, &info[k][0]);
            expect(df_trainer_run(tr, 0) == DF_OK);
            df_trainer_info(tr, &info[k][1]);
            df_trainer_free(tr);
        }
        same_bits(df_net_weights(net[0]), df_net_weights(net[1]),
                  df_net_size(net[0]) * sizeof(df_real));
        check(info[0][1].loss < info[0][0].loss - .02, "%s: loss %g, then %g", ways[way].name,
              info[0][0].loss, info[0][1].loss);
        df_buffer b;
        memset(&b, 0, sizeof b);
        expect(df_net_save(both[0], net[0], df_sink_buffer(&b)) == DF_OK);
        df_net *again = df_net_load(both[0], df_source_memory(b.data, b.size));
        if (check(again != NULL, "%s", df_ctx_message(both[0]))) {
            same_text(df_net_kind(again), df_net_kind(net[0]));
            same_bits(df_net_average(again), df_net_average(net[0]),
                      df_net_size(again) * sizeof(df_real));
            df_run one = df_run_defaults(ctx, net[0]), two = df_run_defaults(ctx, again);
            expect(way_loss(&one, way, data, NULL) == way_loss(&two, way, data, NULL));
        }
        scramble(net[1], 1);
        expect(df_net_load_into(both[1], net[1], df_source_memory(b.data, b.size)) == DF_OK);
        same_bits(df_net_weights(net[0]), df_net_weights(net[1]),
                  df_net_size(net[0]) * sizeof(df_real));
        df_net_free(again);
        df_buffer_free(both[0], &b);
        for (int k = 0; k < 2; k++) df_net_free(net[k]), df_ctx_free(both[k]);
    }
}

static df_tensor *forward_own(const df_run *run, df_tensor *x, df_tensor *t, const int *labels) {
    (void)run, (void)t, (void)labels;
    return x;
}

TEST(refused) {
    df_real x[8] = {0};
    df_tensor *parts = NULL;
    df_vae_desc v;
    df_coupling_desc f;
    memset(&v, 0, sizeof v), memset(&f, 0, sizeof f);
    expect(df_vae_create(NULL, NULL) == NULL && df_coupling_create(NULL, NULL) == NULL);
    expect(df_vae_create(ctx, &v) == NULL && says(ctx, "defaults"));
    expect(df_coupling_create(ctx, &f) == NULL && says(ctx, "defaults"));
#define REFUSED(kind, d, change, part) do { d = df_##kind##_defaults(); change; \
        expect(df_##kind##_create(ctx, &d) == NULL && says(ctx, part)); } while (0)
    REFUSED(vae, v, v.dim = 0, "dim in [1, 2^20]");
    REFUSED(vae, v, v.levels = 9, "layers 9");
    REFUSED(vae, v, v.levels = 0, "layers 0");
    REFUSED(vae, v, v.width = 0, "width 0");
    REFUSED(vae, v, v.depth = -1, "depth -1");
    REFUSED(vae, v, (v.levels = 2, v.latent[1] = 0), "latent[1] is 0");
    REFUSED(vae, v, v.deviation = -.1, "deviation -0.1");
    REFUSED(vae, v, v.deviation = (double)NAN, "deviation");
    REFUSED(coupling, f, f.dim = 1, "dim 1");
    REFUSED(coupling, f, f.layers = 1025, "layers 1025");
    REFUSED(coupling, f, f.scale = -1, "scale -1");
    REFUSED(coupling, f, f.width = 1 << 17, "width 131072");
    df_net *vae = df_vae_create(ctx, NULL), *flow = df_coupling_create(ctx, NULL);
    df_mlp_desc small = df_mlp_defaults();
    small.width = 4, small.depth = 0, small.embed = 2;
    df_net *mlp = df_mlp_create(ctx, &small);
    df_run rv = df_run_defaults(ctx, vae), rf = df_run_defaults(ctx, flow);
    df_run rm = df_run_defaults(ctx, mlp);
    df_objective_desc n = df_objective_defaults();
    df_batch b;
#define STUCK(call, part) do { expect((call) == NULL && says(ctx, part)); df_ctx_clear(ctx); \
    } while (0)
    STUCK(df_vae_elbo(&rv, rows(2, 3, x), rows(2, 2, x), &parts), "[B, 2]");
    STUCK(df_vae_elbo(&rv, rows(2, 2, x), rows(2, 3, x), NULL), "[B, 2]");
    STUCK(df_vae_elbo(&rf, rows(2, 2, x), rows(2, 2, x), NULL), "net 'coupling'");
    STUCK(df_vae_encode(&rv, 2, rows(2, 2, x), NULL), "level 2, want 1 to 1");
    STUCK(df_vae_encode(&rf, 1, rows(2, 2, x), NULL), "kind 'vae'");
    STUCK(df_vae_decode(&rv, 0, rows(2, 2, x), NULL), "level 0");
    STUCK(df_vae_decode(&rv, 1, rows(2, 3, x), NULL), "[B, 2]");
    STUCK(df_coupling_log_density(&rv, rows(2, 2, x)), "kind 'coupling'");
    STUCK(df_coupling_log_density(&rf, rows(2, 4, x)), "[B, 2]");
    STUCK(df_coupling_inverse(&rm, rows(2, 2, x)), "net 'mlp'");
    STUCK(df_node_log_density(&rm, 0, rows(2, 2, x), NULL, NULL), "steps = 0");
    STUCK(df_node_log_density(&rm, 4, rows(1, 3, x), NULL, NULL), "3 elements");
    memset(&b, 0, sizeof b);
    b.x0 = rows(2, 2, x), n.probes = 2;
    STUCK(df_objective_node(&n, &rm, &b), "df_objective_node: 2 probes");
    n.probes = 0, n.cookie = 0;
    STUCK(df_objective_node(&n, &rm, &b), "df_objective_defaults");
    df_card card = df_card_defaults();
    card.prediction = DF_X0;
    expect(df_net_set_card(ctx, mlp, &card) == DF_OK);
    STUCK(df_node_log_density(&rm, 4, rows(2, 2, x), NULL, NULL), "velocity of flow");
    expect(df_vae_latents(mlp) == 0 && df_vae_latents(flow) == 0 && df_vae_latents(vae) == 2);
    int one = 1;                               // a net of one's own keeps any numbers there
    df_net *own = df_net_create(ctx, "own", 1, &one, forward_own, 0);
    for (int i = 0; i < 16; i++) df_net_set(own, i, 2147483647);
    expect(df_vae_latents(own) == 0);
    df_net_free(own);
    df_tensor *lv = rows(2, 2, x), *answer = lv; // what is not made is NULL, and nothing silent
    parts = lv;
    STUCK(df_vae_encode(&rv, 1, NULL, &lv), "df_vae_encode: an input is NULL");
    STUCK(df_vae_elbo(&rv, rows(2, 2, x), NULL, &parts), "df_vae_elbo: an input is NULL");
    STUCK(df_run_divergence(&rm, rows(2, 2, x), NULL, NULL, NULL, &answer), "input is NULL");
    expect(lv == NULL && parts == NULL && answer == NULL);
    STUCK(df_coupling_inverse(&rf, NULL), "df_coupling_inverse: an input is NULL");
    STUCK(df_node_log_density(&rm, 4, NULL, NULL, NULL), "an input is NULL");
    STUCK(df_run_net(&rm, NULL, NULL, NULL), "df_run_net: an input is NULL");
    expect(df_vae_sample(ctx, flow, 0, 0, 1, x) == DF_ERR_ARGUMENT && says(ctx, "kind 'vae'"));
    expect(df_vae_sample(ctx, vae, 0, 0, -1, x) == DF_ERR_ARGUMENT && says(ctx, "n = -1"));
    expect(df_vae_sample(ctx, vae, 0, 0, 1, NULL) == DF_ERR_ARGUMENT);
    expect(df_vae_sample(ctx, NULL, 0, 0, 1, x) == DF_ERR_ARGUMENT);
    expect(df_coupling_sample(NULL, flow, 0, 0, 1, x) == DF_ERR_ARGUMENT);
    df_net_weights(flow)[0] = (df_real)NAN;
    expect(df_coupling_sample(ctx, flow, 0, 0, 2, x) == DF_ERR_NONFINITE);
    df_ctx_clear(ctx);
    df_net_free(vae), df_net_free(flow), df_net_free(mlp);
}

// Any allocation may fail: an error, nothing lost.
TEST(failing_memory) {
    static df_real x[12], out[12];
    for (int way = 0; way < WAYS; way++) {
        int done = 0;
        for (long k = 1; !done && k < 400; k++) {
            counter c = {0, 0, k};
            df_ctx *mine = new_ctx(1, &c);
            if (mine == NULL) continue;
            df_net *net = way_net(mine, way);
            df_result result = net != NULL ? DF_OK : df_ctx_error(mine);
            if (net != NULL) {
                int shape[2] = {4, 3};
                df_run run = df_run_defaults(mine, net);
                df_batch b;
                memset(&b, 0, sizeof b);
                b.x0 = df_tensor_copy(mine, 2, shape, x), b.stride = 1;
                df_tensor *loss = ways[way].objective(ways[way].self, &run, &b);
                expect((loss != NULL) == (df_ctx_error(mine) == DF_OK));
                df_ctx_clear(mine);
                result = loss != NULL ? DF_OK : DF_ERR_MEMORY;
                if (way < 3 && result == DF_OK)
                    result = way == 2 ? df_coupling_sample(mine, net, 0, 0, 4, out)
                                      : df_vae_sample(mine, net, 0, 0, 4, out);
            }
            check(result == DF_OK || result == DF_ERR_MEMORY, "%d at %ld", result, k);
            done = c.calls < k;
            expect(done ? result == DF_OK : result != DF_OK);
            df_net_free(net);
            df_ctx_free(mine);
            check(c.live == 0, "%ld bytes live at %ld", c.live, k);
        }
        expect(done);
    }
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    ctx = new_ctx(2, NULL);
    RUN(linear_vae_is_exact);
    RUN(two_modes);
    RUN(probabilistic_pca);
    RUN(linear_hierarchy_is_exact);
    RUN(parts_of_the_bound);
    RUN(gap_is_the_posterior_kl);
    RUN(vae_samples);
    RUN(coupling_inverts);
    RUN(coupling_integrates_to_one);
    RUN(coupling_is_bounded);
    RUN(coupling_samples);
    RUN(node_of_a_known_flow);
    RUN(node_probe);
    RUN(gradients);
    RUN(training_and_files);
    RUN(refused);
    RUN(failing_memory);
    df_ctx_free(ctx);
    return test_end();
}
