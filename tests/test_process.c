// Paths, tables, native times and grids: closed forms of the papers, finite differences of
// the path itself, both ends, the inverse, and schedules and grids recorded from diffusers
// (58eb52c), guided-diffusion (22e0df8) and k-diffusion (4601bf0) in float64.
#include "diffusion.h"
#include "test.h"
#include <float.h>

enum { KINDS = 12, ALL = 63, TABLE = 7, ZERO_SNR, SIGMA_TABLE, LOG_TABLE, ZERO_TABLE };
static const double pi = 3.14159265358979323846;
static df_ctx *ctx;
static df_process paths[KINDS];          // the eight kinds, then tables read in other ways

static const char *name_of(int k) {
    static const char *const tables[] = { "table", "zero-SNR table", "sigma table",
                                          "log-sigma table", "zero-SNR sigma table" };
    return k < TABLE ? df_process_name(&paths[k]) : tables[k - TABLE];
}
static int is_table(int k) { return k >= TABLE; }
// alpha(1) = 0
static int to_noise(int k) {
    return k == DF_PROCESS_COSINE || k == DF_PROCESS_FLOW || k == DF_PROCESS_TRIG ||
           k == ZERO_SNR || k == ZERO_TABLE;
}
static int is_inf(double x) { return x > DBL_MAX; }

static void make_paths(void) {
    double betas[40];
    paths[0] = df_process_vp(0.1, 20);
    paths[1] = df_process_cosine();
    paths[2] = df_process_ve(0.01, 50);
    paths[3] = df_process_edm(80);
    paths[4] = df_process_subvp(0.1, 20);
    paths[5] = df_process_flow();
    paths[6] = df_process_trig(0.5);
    df_betas(ctx, DF_BETAS_LINEAR, 2e-3, 0.4, 40, betas);
    expect(df_process_table(ctx, betas, 40, &paths[TABLE]) == DF_OK);
    expect(df_betas_zero_snr(ctx, 40, betas) == DF_OK);
    expect(df_process_table(ctx, betas, 40, &paths[ZERO_SNR]) == DF_OK);
    paths[SIGMA_TABLE] = paths[LOG_TABLE] = paths[TABLE];
    paths[ZERO_TABLE] = paths[ZERO_SNR];
    paths[SIGMA_TABLE].interp = paths[ZERO_TABLE].interp = DF_INTERP_SIGMA;
    paths[LOG_TABLE].interp = DF_INTERP_LOG_SIGMA;
    for (int k = 0; k < KINDS; k++) expect(df_process_check(ctx, &paths[k]) == DF_OK);
}

// ---- closed forms, written as in the papers ----

TEST(formulas) {
    const double ts[] = { 1e-3, 0.01, 0.1, 0.3, 0.5, 0.77, 0.95, 0.999 };
    for (int i = 0; i < 8; i++) {
        double t = ts[i], B = 0.1 * t + 19.9 * t * t / 2, beta = 0.1 + 19.9 * t;
        double phi0 = 0.008 / 1.008 * pi / 2, phi = (t + 0.008) / 1.008 * pi / 2;
        double al[7], si[7], f[7], g2[7];
        al[0] = exp(-B / 2), si[0] = sqrt(1 - exp(-B)), f[0] = -beta / 2, g2[0] = beta;
        al[1] = cos(phi) / cos(phi0), si[1] = sqrt(1 - al[1] * al[1]);
        f[1] = -tan(phi) * pi / 2 / 1.008, g2[1] = -2 * f[1];
        al[2] = 1, si[2] = 0.01 * pow(5000, t), f[2] = 0,
        g2[2] = si[2] * si[2] * 2 * log(5000);
        al[3] = 1, si[3] = 80 * t, f[3] = 0, g2[3] = 2 * 6400 * t;
        al[4] = al[0], si[4] = 1 - exp(-B), f[4] = f[0], g2[4] = beta * (1 - exp(-2 * B));
        al[5] = 1 - t, si[5] = t, f[5] = -1 / (1 - t), g2[5] = 2 * t / (1 - t);
        al[6] = cos(pi * t / 2), si[6] = 0.5 * sin(pi * t / 2);
        f[6] = -pi / 2 * tan(pi * t / 2), g2[6] = 0.25 * pi * tan(pi * t / 2);
        for (int k = 0; k < TABLE; k++) {
            df_point q = df_process_at(&paths[k], t);
            df_rates d;
            expect(df_process_rates(ctx, &paths[k], t, ALL, &d) == DF_OK);
            near_rel(q.t, t, 0);
            near_rel(q.alpha, al[k], 2e-13);
            near_rel(q.sigma, si[k], 2e-11);
            near(q.lambda, log(al[k] / si[k]), 2e-11);
            near_rel(d.f, f[k], 2e-12);
            near_rel(d.g2, g2[k], 2e-11);
        }
    }
}

// Digits at the ends that the textbook forms lose.
TEST(ends_digits) {
    for (double t = 1e-12; t < 1e-3; t *= 10) {
        double b = 0.1 * t + 9.95 * t * t;
        df_point vp = df_process_at(&paths[0], t), cosine = df_process_at(&paths[1], t);
        double c = pi / 2 / 1.008, x = c * t;
        near_rel(vp.sigma, sqrt(b * (1 - b / 2 * (1 - b / 3))), 1e-12);
        near_rel(vp.lambda, -b / 2 - log(vp.sigma), 1e-15);
        // sin x, sin(x + y) by their series in x
        near_rel(cosine.sigma * cosine.sigma * pow(cos(0.008 * c), 2),
                 (x - x * x * x / 6) *
                     (sin(0.016 * c) * cos(x) + cos(0.016 * c) * (x - x * x * x / 6)),
                 1e-12);
        near_rel(df_process_at(&paths[5], t).lambda,
                 -t * (1 + t * (0.5 + t * (1 / 3.0 + t * (0.25 + t * 0.2)))) - log(t),
                 1e-15);
    }
    for (int k = 10; k <= 53; k++) {           // 1 - t = 2^-k exactly
        double u = ldexp(1.0, -k), c = pi / 2 / 1.008;
        near_rel(df_process_at(&paths[5], 1 - u).lambda, log(u) - log1p(-u), 1e-15);
        near_rel(df_process_at(&paths[6], 1 - u).alpha, sin(pi / 2 * u), 1e-15);
        near_rel(df_process_at(&paths[1], 1 - u).alpha, sin(c * u) / sin(c), 1e-15);
        near(df_process_at(&paths[1], 1 - u).lambda,
             log(sin(c * u) / sin(c)) + 0.5 * pow(sin(c * u) / sin(c), 2), 1e-6 * u);
        near_rel(df_process_at(&paths[ZERO_SNR], 1 - u).alpha,
                 df_process_at(&paths[ZERO_SNR], 1 - 0.5 / 40).alpha * 80 * u, 1e-14);
    }
}

// Exactly 1 and 0 where the process says so, and clamping beyond.
TEST(ends) {
    for (int k = 0; k < KINDS; k++) {
        df_point data = df_process_at(&paths[k], 0), noise = df_process_at(&paths[k], 1);
        double far = k % 2 ? 7 : HUGE_VAL;
        df_point below = df_process_at(&paths[k], -far),
                 above = df_process_at(&paths[k], far);
        if (k == DF_PROCESS_VE) {
            expect(data.alpha == 1 && data.sigma == 0.01 && noise.sigma == 50);
            near(data.lambda, log(100), 1e-15);
        } else {
            check(data.t == 0 && data.alpha == 1 && data.sigma == 0 && is_inf(data.lambda),
                  "%s at 0: %g %g %g", name_of(k), data.alpha, data.sigma, data.lambda);
        }
        if (to_noise(k))
            check(noise.alpha == 0 && is_inf(-noise.lambda) && noise.t == 1 &&
                  fabs(noise.sigma / (k == DF_PROCESS_TRIG ? 0.5 : 1) - 1) < 3e-16,
                  "%s at 1: %g %g %g", name_of(k), noise.alpha, noise.sigma, noise.lambda);
        else
            near(noise.lambda, log(noise.alpha / noise.sigma), 1e-15);
        same_bits(&data, &below, sizeof data);
        same_bits(&noise, &above, sizeof noise);
    }
    df_point d = df_point_data();
    expect(d.t == 0 && d.alpha == 1 && d.sigma == 0 && is_inf(d.lambda));
    near(df_process_at(&paths[0], 1).alpha, exp(-20.1 / 4), 1e-15);
    expect(df_process_at(&paths[3], 1).sigma == 80);
}

// ---- derivatives ----

typedef double (*value_fn)(const df_point *q);
static double get_alpha(const df_point *q) { return q->alpha; }
static double get_sigma(const df_point *q) { return q->sigma; }
static double get_sigma2(const df_point *q) { return q->sigma * q->sigma; }
static double get_lambda(const df_point *q) { return q->lambda; }

// Central difference of order 8; *noise: what rounding of the values makes of it.
static double slope_at(const df_process *p, value_fn value, double t, double h,
                       double *noise) {
    static const double c[4] = { 4.0 / 5, -1.0 / 5, 4.0 / 105, -1.0 / 280 };
    double sum = 0, size = 0;
    for (int i = 1; i <= 4; i++) {
        df_point a = df_process_at(p, t + i * h), b = df_process_at(p, t - i * h);
        sum += c[i - 1] * (value(&a) - value(&b));
        size += fabs(c[i - 1]) * (fabs(value(&a)) + fabs(value(&b)));
    }
    *noise = 4 * DBL_EPSILON * (size + 1e-300) / h;
    return sum / h;
}

static void slope_near(int k, const char *what, double t, double got, value_fn value,
                       double h) {
    double noise, want = slope_at(&paths[k], value, t, h, &noise);
    check(fabs(got - want) <= 2e-9 * fabs(want) + noise,
          "%s: %s at t = %.17g is %.15g, difference "
          "says %.15g (noise %.2g)",
          name_of(k), what, t, got, want, noise);
}

static double room_at(int k, double t) {
    double room = t < 1 - t ? t : 1 - t;
    if (is_table(k)) {                         // stay within one piece
        double s = t * 40, w = s - floor(s);
        room = fmin(room, fmin(w, 1 - w) / 40);
    }
    return room;
}

TEST(differences) {
    for (int k = 0; k < KINDS; k++) {
        for (int i = 0; i < 60; i++) {
            double u = (i + 0.37) / 60, t = i < 12 ? pow(10, -6 + 0.5 * i) : u, room, h;
            df_rates d;
            if (i >= 50) t = 1 - pow(10, -(i - 49) / 2.0);
            if (is_table(k) && room_at(k, t) < 1e-3 * t) t -= 0.3 / 40;    // off the knots
            room = room_at(k, t);
            h = 0.02 * room;
            expect(df_process_rates(ctx, &paths[k], t, ALL, &d) == DF_OK);
            slope_near(k, "alpha'", t, d.alpha, get_alpha, h);
            slope_near(k, "sigma'", t, d.sigma, get_sigma, h);
            slope_near(k, "(sigma^2)'", t,
                       d.g2 + 2 * d.f * pow(df_process_at(&paths[k], t).sigma, 2),
                       get_sigma2, h);
            slope_near(k, "lambda'", t, d.lambda, get_lambda, h);
        }
    }
}

// W, f, g^2, lambda' tied to each other; single requests equal the same field of all.
TEST(identities) {
    for (int k = 0; k < KINDS; k++) {
        for (int i = 0; i <= 100; i++) {
            double t = i < 20 ? pow(10, -9 + i * 0.45) : i / 100.0 - 1e-7;
            df_point q = df_process_at(&paths[k], t);
            df_rates d, one;
            expect(df_process_rates(ctx, &paths[k], t, ALL, &d) == DF_OK);
            near_rel(d.w, -q.alpha * q.sigma * d.lambda, 4e-15);
            near_rel(d.g2, -2 * q.sigma * q.sigma * d.lambda, 4e-15);
            near_rel(d.g2, 2 * q.sigma * d.w / q.alpha, 4e-15);
            near_rel(d.f, d.alpha / q.alpha, 4e-15);
            near_rel(d.w, q.alpha * d.sigma - q.sigma * d.alpha, 4e-15);
            check(d.alpha <= 0 && d.sigma >= 0 && d.lambda < 0, "%s: signs at t = %g",
                  name_of(k), t);
            for (int bit = 0; bit < 6; bit++) {
                const double *a = &d.alpha, *b = &one.alpha;
                expect(df_process_rates(ctx, &paths[k], t, 1u << bit, &one) == DF_OK);
                for (int j = 0; j < 6; j++) expect(b[j] == (j == bit ? a[j] : 0));
            }
        }
    }
}

// Which rates are infinite at which end, and the finite ones there by one-sided limits.
TEST(singular) {
    enum { A = DF_RATE_ALPHA, S = DF_RATE_SIGMA, L = DF_RATE_LAMBDA, F = DF_RATE_F,
           G = DF_RATE_G2, W = DF_RATE_W };
    static const unsigned bad[KINDS][2] = {     // at t = 0, at t = 1
        { S | L | W, 0 },                       // vp
        { S | L | W, L | F | G },               // cosine
        { 0, 0 },                               // ve
        { L, 0 },                               // edm
        { L, 0 },                               // subvp
        { L, L | F | G },                       // flow
        { L, L | F | G },                       // trig
        { S | L | W, 0 },                       // table
        { S | L | W, L | F | G },               // zero-SNR table
        { L, 0 },                               // sigma linear
        { S | L | W, 0 },                       // log sigma linear
        { L, L | F | G }                        // zero-SNR, sigma linear
    };
    for (int k = 0; k < KINDS; k++)
        for (int end = 0; end < 2; end++) {
            double near_end = end ? 1 - 1e-9 : 1e-13;
            df_rates close, d;
            unsigned fine = ALL & ~bad[k][end];
            const double *a = &d.alpha, *b = &close.alpha;
            for (int bit = 0; bit < 6; bit++) {
                df_result want = bad[k][end] >> bit & 1 ? DF_ERR_SINGULAR : DF_OK;
                check(df_process_rates(ctx, &paths[k], end, 1u << bit, &d) == want,
                      "%s: rate %d at t = %d should be %s", name_of(k), bit, end,
                      df_result_name(want));
                check(df_process_rates(NULL, &paths[k], end, 1u << bit, &d) == want,
                      "without ctx");
            }
            expect(df_process_rates(ctx, &paths[k], end, fine, &d) == DF_OK);
            expect(df_process_rates(ctx, &paths[k], near_end, ALL, &close) == DF_OK);
            for (int bit = 0; bit < 6; bit++)
                if (fine >> bit & 1)
                    check(fabs(a[bit] - b[bit]) <= 1e-6 * (fabs(b[bit]) + 0.01),
                          "%s: rate %d at t = %d is %g, nearby %g", name_of(k), bit, end,
                          a[bit], b[bit]);
        }
    df_rates d;
    df_process_rates(ctx, &paths[0], 0, G | F, &d);
    near_rel(d.g2, 0.1, 1e-15);                // beta_min
    near_rel(d.f, -0.05, 1e-15);
    df_ctx_clear(ctx);
    expect(df_process_rates(ctx, &paths[5], 1, F, &d) == DF_ERR_SINGULAR);
    expect(strstr(df_ctx_message(ctx), "flow") && strstr(df_ctx_message(ctx), "f of"));
    expect(df_process_rates(ctx, &paths[5], 0.0 / 1 + nan(""), F, &d) == DF_ERR_NONFINITE);
    expect(df_process_rates(ctx, &paths[5], 0.5, F, NULL) == DF_ERR_ARGUMENT);
}

// ---- the inverse ----

static df_point round_trip(int k, double lambda) {
    df_point q = df_process_at_lambda(&paths[k], lambda),
             back = df_process_at(&paths[k], q.t);
    df_rates d;
    check(q.lambda == lambda, "%s: lambda %.17g came back %.17g", name_of(k), lambda,
          q.lambda);
    near_rel(q.sigma, q.alpha * exp(-lambda), 4e-16 + 2e-16 * fabs(lambda));
    if (df_process_rates(ctx, &paths[k], q.t, DF_RATE_LAMBDA, &d) == DF_OK) {
        // t is rounded to DBL_EPSILON; lambda then moves by lambda' times that
        double slack = 4e-15 + DBL_EPSILON * (fabs(lambda) + 2 * fabs(d.lambda) * q.t);
        check(fabs(back.lambda - lambda) <= slack,
              "%s: lambda %.17g -> t %.17g -> %.17g (allowed %g)", name_of(k), lambda, q.t,
              back.lambda, slack);
        near_rel(back.alpha, q.alpha, 3e-15 + slack);
        near_rel(back.sigma, q.sigma, 3e-15 + slack);
    }
    return q;
}

TEST(inverse) {
    for (int k = 0; k < KINDS; k++) {
        double low = to_noise(k) ? -30 : df_process_at(&paths[k], 1).lambda;
        double high = k == DF_PROCESS_VE ? log(100) : 300, before = 2;
        for (int i = 1; i < 400; i++) {
            double u = i / 400.0,
                   lambda = low + (i < 300 ? fmin(30, high) - low : high - low) * u;
            df_point q;
            if (i >= 300 && high < 100) continue;
            if (i == 300) before = 2;
            q = round_trip(k, lambda);
            check(q.t < before, "%s: t rises at lambda %g", name_of(k), lambda);
            before = q.t;
            // the same by rho
            df_point r = df_process_at_rho(&paths[k], exp(-lambda));
            near(r.lambda, lambda, 1e-15);
            if (fabs(lambda) < 30) near_rel(r.sigma / r.alpha, exp(-lambda), 3e-14);
        }
        for (double t = 1e-10; t < 1;
             t = t < 0.02 ? t * 3 : t + 0.0191) { // t -> lambda -> t
            df_point q = df_process_at(&paths[k], t);
            df_rates d;                        // lambda is rounded to DBL_EPSILON |lambda|
            expect(df_process_rates(ctx, &paths[k], t, DF_RATE_LAMBDA, &d) == DF_OK);
            near_abs(df_process_at_lambda(&paths[k], q.lambda).t, t,
                     4e-15 * t + 2 * DBL_EPSILON * (fabs(q.lambda) + 1) / fabs(d.lambda));
        }
    }
}

// 1e-12 in lambda over the whole range, where t in double can carry it at all.
TEST(inverse_far) {
    static const double lambdas[] = { -650, -36, -5, -1e-12, 0, 1e-12, 3, 40, 200, 340 };
    for (int k = 0; k < KINDS; k++)
        for (int i = 0; i < 10; i++) {
            df_point q = df_process_at_lambda(&paths[k], lambdas[i]),
                     end = df_process_at(&paths[k], 1);
            if (!to_noise(k) && lambdas[i] <= end.lambda) {
                same_bits(&q, &end, sizeof q);
            } else if (k == DF_PROCESS_VE && lambdas[i] >= log(100)) {
                expect(q.t == 0 && q.sigma == 0.01);
            } else {
                expect(q.lambda == lambdas[i]);
                near(log(q.alpha) - log(q.sigma), lambdas[i], 1e-15);
                expect(q.t >= 0 && q.t <= 1);
                if (lambdas[i] > -30 && q.t > 1e-300)
                    near(df_process_at(&paths[k], q.t).lambda, lambdas[i], 1e-12);
            }
        }
    for (int k = 0; k < KINDS; k++) {          // both infinities and rho's ends
        df_point data = df_point_data(), noise = df_process_at(&paths[k], 1);
        df_point a = df_process_at_lambda(&paths[k], HUGE_VAL),
                 b = df_process_at_rho(&paths[k], 0);
        df_point c = df_process_at_lambda(&paths[k], -HUGE_VAL),
                 d = df_process_at_rho(&paths[k], HUGE_VAL);
        same_bits(&a, &data, sizeof a);
        same_bits(&b, &data, sizeof a);
        same_bits(&c, &noise, sizeof a);
        same_bits(&d, &noise, sizeof a);
        a = df_process_at_lambda(&paths[k], -800);     // sigma/alpha leaves the double
        b = df_process_at_lambda(&paths[k], 800);
        c = df_process_at(&paths[k], 0);
        same_bits(&a, &noise, sizeof a);
        same_bits(&b, &c, sizeof a);
    }
}

// One lambda on every process: x/(alpha + sigma) of the same (x_0, eps) is one number, to
// the last digits, whatever t rounds to (trig's sigma is in units of the data: the same
// rho).
TEST(invariance) {
    for (double lambda = -3.9; lambda < 4.6; lambda += 0.1) {
        double share = 1 / (1 + exp(-lambda));
        for (int k = 0; k < KINDS; k++) {
            df_point q = df_process_at_lambda(&paths[k], lambda);
            if (!to_noise(k) && lambda <= df_process_at(&paths[k], 1).lambda) continue;
            near_rel(q.alpha / (q.alpha + q.sigma), share, 2e-15);
        }
    }
}

// ---- tables ----

static const int entries[11] = { 0, 1, 9, 99, 249, 499, 749, 899, 989, 998, 999 };
static const struct {
    const char *name;
    df_betas_kind kind;
    double b0, b1;
    int zero_snr;
    double abar[11];
} recorded[] = {
    {"linear",
     DF_BETAS_LINEAR,
     1e-4,
     0.02,
     0,
     {0.99990000000000001, 0.99978009207207208, 0.99810520478583442, 0.89701814567495997,
      0.52408537382536058, 0.078587242881778235, 0.003350550438936774,
      0.00027520591190339843, 4.9348602996124958e-05, 4.118193638138445e-05,
      4.0358297653756761e-05}},
    {"scaled_linear",
     DF_BETAS_SCALED_LINEAR,
     0.00085,
     0.012,
     0,
     {0.99914999999999998, 0.99829602783845139, 0.99132108853456224, 0.89546277349500158,
      0.67543241372512419, 0.27766965045646774, 0.056623491598269737, 0.014298676888235705,
      0.005253850945496916, 0.0047166988998757504, 0.004660098513077241}},
    {"squaredcos_cap_v2",
     DF_BETAS_COSINE,
     0,
     0,
     0,
     {0.99995871577517803, 0.99991257592736782, 0.99936871840165831, 0.9720927371139696,
      0.84701216132690504, 0.49384359044063819, 0.14427210238573596, 0.024091724140085889,
      0.00024285722793500623, 2.4287669070348544e-06, 2.4287669070348567e-09}},
    {"sigmoid",
     DF_BETAS_SIGMOID,
     1e-4,
     0.02,
     0,
     {0.99985079479918293, 0.99970101881945361, 0.99848142192080636, 0.98074929882537831,
      0.90374466540093401, 0.30193105660219516, 0.0057321988861174858,
      0.00029634826873296903, 4.8540087937167442e-05, 4.0489620005559898e-05,
      3.9681819905332079e-05}},
    {"linear, zero SNR",
     DF_BETAS_LINEAR,
     1e-4,
     0.02,
     1,
     {0.99990000000000023, 0.99977932543315329, 0.99809373449002226, 0.89637830982666966,
      0.52153334069877033, 0.076028750547114776, 0.0026895216999216339,
      0.00010613044060415661, 4.5742882007482292e-07, 4.2132624650880733e-09, 0}},
    {"scaled_linear, zero SNR",
     DF_BETAS_SCALED_LINEAR,
     0.00085,
     0.012,
     1,
     {0.99914999999999998, 0.99823344614018228, 0.99074844151131802, 0.88808589479431821,
      0.65418900653860335, 0.24235916655614534, 0.033171482831862664,
      0.0030330723706475447, 2.0500584228578225e-05, 1.9678880566211582e-07, 0}}};

static df_process recorded_table(int r) {
    static double betas[1000];
    df_process p = df_process_flow();
    expect(df_betas(ctx, recorded[r].kind, recorded[r].b0, recorded[r].b1, 1000, betas) ==
           DF_OK);
    if (recorded[r].zero_snr) expect(df_betas_zero_snr(ctx, 1000, betas) == DF_OK);
    if (recorded[r].zero_snr) expect(betas[999] == 1);
    expect(df_process_table(ctx, betas, 1000, &p) == DF_OK);
    return p;
}

TEST(schedules) {
    for (int r = 0; r < 6; r++) {
        df_process p = recorded_table(r);
        df_time index = df_time_index(1000);
        for (int i = 0; i < 11; i++) {
            df_point q = df_process_at(&p, (entries[i] + 1) / 1000.0);
            double native, rate, want = recorded[r].abar[i];
            check(fabs(q.alpha * q.alpha - want) <= 4e-13 * want,
                  "%s: abar[%d] = %.17g, recorded "
                  "%.17g",
                  recorded[r].name, entries[i], q.alpha * q.alpha, want);
            near_rel(q.sigma * q.sigma, 1 - want, 3e-11);
            expect(df_time_at(ctx, &p, &index, &q, &native, &rate) == DF_OK);
            near(native, entries[i], 1e-15);
            expect(rate == 1000);
        }
    }
}

// Between the entries: log abar, sigma/alpha or its logarithm linear.
TEST(between) {
    df_process p = recorded_table(1);
    static const double index[5] = {999, 749.25, 499.5, 249.75,
                                    0}; // diffusers Euler, N = 5
    static const double rho[5] = {14.614641229333635, 4.0860880354712394,
                                  1.615582510161246, 0.69515042770591107,
                                  0.029167158151720367};
    static const double karras[10] = {999,
                                      951.38727166626461,
                                      897.54285313111563,
                                      835.65802089906606,
                                      762.99247494625706,
                                      675.14140190255227,
                                      564.7216124300428,
                                      420.86996779921651,
                                      245.44821382751496,
                                      99.000000000000114}; // sigma -> index by log sigma
    static const double sigmas[10] = {
        157.40728081040749,  98.408547274564157, 59.478748102853025, 34.572779937897963,
        19.199848246464999,  10.102140401326476, 4.9812365419748286, 2.2684110111814109,
        0.93497716439613265, 0.33882834898350778};
    df_point a, b, m;
    p.interp = DF_INTERP_SIGMA;
    for (int i = 0; i < 5; i++) {
        df_point q = df_process_at(&p, (index[i] + 1) / 1000);
        near_rel(q.sigma / q.alpha, rho[i], 2e-12);
        near_rel(q.alpha * q.alpha + q.sigma * q.sigma, 1, 1e-15);
    }
    // the first half of the first piece: sigma/alpha linear from 0 at the data
    near_rel(df_process_at(&p, 0.0005).sigma / df_process_at(&p, 0.0005).alpha, rho[4] / 2,
             1e-12);
    p = recorded_table(0);
    p.interp = DF_INTERP_LOG_SIGMA;
    for (int i = 0; i < 10; i++)
        near_rel(1000 * df_process_at_rho(&p, sigmas[i]).t - 1, karras[i], 2e-12);
    a = df_process_at(&p, 0.4);
    b = df_process_at(&p, 0.401);
    m = df_process_at(&p, 0.4005);
    near(m.lambda, (a.lambda + b.lambda) / 2, 1e-13);
    p.interp = DF_INTERP_LOG_ABAR;
    m = df_process_at(&p, 0.4005);
    near_rel(m.alpha * m.alpha, a.alpha * b.alpha, 1e-14);
    m = df_process_at(&p, 0.00025);            // from abar(0) = 1
    near_rel(m.alpha * m.alpha, pow(0.9999, 0.25), 1e-15);
    near_rel(m.sigma * m.sigma, -expm1(0.25 * log1p(-1e-4)), 1e-12);
}

// At a knot the piece on the data side, though k/T rounds.
TEST(knots) {
    for (int T = 1; T <= 60; T++) {
        double betas[60];
        df_process p = df_process_flow();
        for (int i = 0; i < T; i++) betas[i] = 0.01 + 0.005 * (i % 7);
        expect(df_process_table(ctx, betas, T, &p) == DF_OK);
        for (int k = 1; k <= T; k++) {
            df_rates d;
            double t = (double)k / T;
            expect(df_process_rates(ctx, &p, t, DF_RATE_F | DF_RATE_G2, &d) == DF_OK);
            near_rel(d.f, 0.5 * T * log1p(-betas[k - 1]), 1e-11);
            near_rel(d.g2, -T * log1p(-betas[k - 1]), 1e-11);
        }
    }
}

TEST(table_arguments) {
    double betas[4] = { 0.1, 0.2, 0.3, 1 };
    df_process p = df_process_flow(), q;
    expect(df_process_table(ctx, betas, 4, &p) == DF_OK);
    betas[3] = 0.5;                            // a copy was kept
    expect(df_process_at(&p, 1).alpha == 0);
    q = p;
    betas[1] = 1;
    expect(df_process_table(ctx, betas, 4, &p) == DF_ERR_ARGUMENT);
    expect(strstr(df_ctx_message(ctx), "betas[1]") != NULL);
    betas[1] = -0.1;
    expect(df_process_table(ctx, betas, 4, &p) == DF_ERR_ARGUMENT);
    betas[1] = nan("");
    expect(df_process_table(ctx, betas, 4, &p) == DF_ERR_ARGUMENT);
    expect(df_betas_zero_snr(ctx, 4, betas) == DF_ERR_ARGUMENT);
    betas[1] = 0.2;
    expect(df_process_table(ctx, betas, 0, &p) == DF_ERR_ARGUMENT);
    expect(df_process_table(ctx, NULL, 4, &p) == DF_ERR_ARGUMENT);
    same_bits(&p, &q, sizeof p);               // failures left it alone
    betas[0] = betas[1] = betas[2] = betas[3] = 0;
    expect(df_process_table(ctx, betas, 4, &p) == DF_ERR_ARGUMENT);
    expect(df_betas(ctx, DF_BETAS_LINEAR, 0.1, 1.5, 4, betas) == DF_ERR_ARGUMENT);
    expect(df_betas(NULL, DF_BETAS_LINEAR, 0.1, 0.2, 0, betas) == DF_ERR_ARGUMENT);
    expect(df_betas(NULL, DF_BETAS_LINEAR, 0.1, 0.2, 1, betas) == DF_OK &&
           betas[0] == 0.1);
    expect(df_betas_zero_snr(NULL, 1, betas) == DF_ERR_ARGUMENT);
}

TEST(parameters) {
    df_process p;
    expect((p = df_process_vp(0, 20), df_process_check(ctx, &p)) == DF_ERR_ARGUMENT);
    expect((p = df_process_vp(0.1, nan("")), df_process_check(ctx, &p)) ==
           DF_ERR_ARGUMENT);
    expect((p = df_process_vp(0.1, 4000), df_process_check(ctx, &p)) == DF_ERR_ARGUMENT);
    expect((p = df_process_ve(1, 0.5), df_process_check(ctx, &p)) == DF_ERR_ARGUMENT);
    expect((p = df_process_edm(-1), df_process_check(ctx, &p)) == DF_ERR_ARGUMENT);
    expect((p = df_process_trig(0), df_process_check(ctx, &p)) == DF_ERR_ARGUMENT);
    p.kind = (df_process_kind)99;
    expect(df_process_check(ctx, &p) == DF_ERR_ARGUMENT);
    expect(df_process_at(&p, 0.5).alpha != df_process_at(&p, 0.5).alpha);
    same_text(df_process_name(&p), "unknown");
    p = df_process_flow();
    p.kind = DF_PROCESS_TABLE;
    expect(df_process_check(ctx, &p) == DF_ERR_ARGUMENT);
    expect(df_process_check(ctx, NULL) == DF_ERR_ARGUMENT);
    expect(df_process_t_min(&paths[0]) == 1e-3 && df_process_t_min(&paths[2]) == 0);
    near_rel(df_process_t_min(&paths[3]) * 80, 0.002, 1e-15);
    near_rel(df_process_t_min(&paths[TABLE]), 1.0 / 40, 1e-15);
}

// ---- native times ----

TEST(times) {
    const df_time maps[] = { df_time_own(), df_time_affine(1000, 0), df_time_affine(-1, 1),
                             df_time_affine(pi / 2, 0), df_time_index(40), df_time_sigma(),
                             df_time_log_sigma(0.25) };
    for (int k = 0; k < KINDS; k++)
        for (int m = 0; m < 7; m++)
            for (double t = 0.0137; t < 1; t += 0.0731) {
                df_point q = df_process_at(&paths[k], t), back;
                double native, rate, h = 0.02 * room_at(k, t), c[2], sum;
                expect(df_time_at(ctx, &paths[k], &maps[m], &q, &native, &rate) == DF_OK);
                back = df_time_point(&paths[k], &maps[m], native);
                near_rel(back.t, t, 2e-13);
                sum = 0; // d native/dt, central difference of order 8
                for (int i = 1; i <= 4; i++) {
                    static const double w[4] = {4.0 / 5, -1.0 / 5, 4.0 / 105, -1.0 / 280};
                    for (int side = 0; side < 2; side++) {
                        df_point r = df_process_at(&paths[k], t + (side ? -i : i) * h);
                        expect(df_time_at(ctx, &paths[k], &maps[m], &r, &c[side], NULL) ==
                               DF_OK);
                    }
                    sum += w[i - 1] * (c[0] - c[1]) / h;
                }
                check(fabs(rate - sum) <=
                          1e-8 * fabs(sum) + 1e-14 * (fabs(native) + 1) / h,
                      "%s, time %d at %g: rate %.12g, difference %.12g", name_of(k), m, t,
                      rate, sum);
            }
}

TEST(times_singular) {
    df_time sigma = df_time_sigma(), logs = df_time_log_sigma(0.25),
            none = df_time_affine(0, 1);
    df_point data = df_point_data(), noise = df_process_at(&paths[5], 1);
    double native, rate;
    expect(df_time_at(ctx, &paths[5], &sigma, &noise, &native, NULL) == DF_ERR_SINGULAR);
    expect(df_time_at(ctx, &paths[5], &logs, &noise, &native, NULL) == DF_ERR_SINGULAR);
    expect(df_time_at(ctx, &paths[5], &logs, &data, &native, NULL) == DF_ERR_SINGULAR);
    expect(df_time_at(ctx, &paths[5], &sigma, &data, &native, &rate) == DF_OK);
    expect(native == 0 && rate == 1);
    expect(df_time_at(ctx, &paths[0], &sigma, &data, &native, NULL) == DF_OK);
    expect(df_time_at(ctx, &paths[0], &sigma, &data, &native, &rate) == DF_ERR_SINGULAR);
    expect(df_time_at(ctx, &paths[0], &none, &data, &native, NULL) == DF_ERR_ARGUMENT);
    data = df_process_at(&paths[3], 0.5);      // EDM's c_noise
    expect(df_time_at(ctx, &paths[3], &logs, &data, &native, &rate) == DF_OK);
    near(native, log(40) / 4, 1e-15);
    near(rate, 0.5, 1e-15);
}

// ---- grids ----

static df_point grid[1002];
static int grid_count;
static df_result make_grid(const df_process *p, const df_sample_desc *d) {
    grid_count = -1;
    return df_grid(ctx, p, d, grid, 1002, &grid_count);
}

static void grid_rho(const char *what, const double *rho, int n, double tol) {
    check(grid_count == n, "%s: %d points, want %d", what, grid_count, n);
    for (int i = 0; i < n && grid_count == n; i++) {
        double got = grid[i].sigma / grid[i].alpha;
        check(fabs(got - rho[i]) <= tol * rho[i], "%s: rho[%d] = %.17g, recorded %.17g",
              what, i, got, rho[i]);
    }
}

TEST(grid_karras) {
    static const double karras[] = {14.6,
                                    9.1068127507460996,
                                    5.4897455837438516,
                                    3.1812420497808214,
                                    1.7603485724883645,
                                    0.92225631906445082,
                                    0.45239238474390164,
                                    0.20469151245757042,
                                    0.083679569121855771,
                                    0.03,
                                    0};
    static const double karras3[] = { 14.6, 6.9760835907467698, 2.6132901565188837,
        0.6013516440315535, 0.03, 0 };
    static const double expo[] = {14.6,
                                  7.3412762504832942,
                                  3.6913929442404152,
                                  1.8561325584077921,
                                  0.93331382662930951,
                                  0.46929552258092005,
                                  0.23597452564256541,
                                  0.11865439594649498,
                                  0.059662650614893474,
                                  0.03,
                                  0};
    static const double poly[] = {14.6,
                                  6.0651646282209217,
                                  2.6025837016221254,
                                  1.157245252633776,
                                  0.53540060009166868,
                                  0.25914038288225871,
                                  0.13223941812032289,
                                  0.072015080094455411,
                                  0.042812633064331931,
                                  0.03,
                                  0};
    static const double vp[] = { 152.1669702839464, 17.049122558968051, 3.422244762572157,
        0.95752648223752135, 0.010485992786706403 };
    static const double first[] = { 14.6, 0 };
    df_process edm = df_process_edm(14.6);
    df_sample_desc d = df_sample_defaults();
    d.grid = "karras";
    d.steps = 10;
    d.t_min = 0.03 / 14.6;
    expect(make_grid(&edm, &d) == DF_OK);
    grid_rho("karras", karras, 11, 1e-13);
    d.grid = "lambda";
    expect(make_grid(&edm, &d) == DF_OK);
    grid_rho("lambda", expo, 11, 1e-13);
    d.grid = "exponential";
    expect(make_grid(&edm, &d) == DF_OK);
    grid_rho("exponential", expo, 11, 1e-13);
    d.grid = "polyexponential";                // its own exponent is 1
    expect(make_grid(&edm, &d) == DF_OK);
    grid_rho("polyexponential 1", expo, 11, 1e-13);
    d.grid_rho = 1.3;
    expect(make_grid(&edm, &d) == DF_OK);
    grid_rho("polyexponential 1.3", poly, 11, 1e-13);
    d.grid = "karras";
    d.grid_rho = 3;
    d.steps = 5;
    expect(make_grid(&edm, &d) == DF_OK);
    grid_rho("karras 3", karras3, 6, 1e-13);
    d.steps = 1;
    expect(make_grid(&edm, &d) == DF_OK);
    grid_rho("karras, one step", first, 2, 1e-13);
    d.steps = 9;                               // to t_min, without the data point
    d.grid_rho = 0;
    d.end = DF_END_T_MIN;
    expect(make_grid(&edm, &d) == DF_OK);
    grid_rho("karras to t_min", karras, 10, 1e-13);
    d.grid = "uniform";                        // k-diffusion's get_sigmas_vp
    d.steps = 4;
    d.t_min = 1e-3;
    expect(make_grid(&paths[0], &d) == DF_OK);
    grid_rho("vp", vp, 5, 1e-12);               // recorded as sqrt(exp(x) - 1): eps/rho^2
}

TEST(grid_table) {
    static const int linspace20[] = {999, 946, 894, 841, 789, 736, 684, 631, 578, 526,
                                     473, 421, 368, 315, 263, 210, 158, 105, 53,  0};
    static const int linspace5[] = { 999, 749, 500, 250, 0 };
    static const int leading5[] = { 800, 600, 400, 200, 0 };
    static const int offset5[] = { 801, 601, 401, 201, 1 };
    static const int leading7[] = { 852, 710, 568, 426, 284, 142, 0 };
    static const int trailing5[] = { 999, 799, 599, 399, 199 };
    static const int trailing7[] = { 999, 856, 713, 570, 428, 285, 142 };
    static const struct { const char *rule; int N, offset; const int *index; } lists[] = {
        { "linspace", 20, 0, linspace20 }, { "linspace", 5, 0, linspace5 },
        { "leading", 5, 0, leading5 },     { "leading", 5, 1, offset5 },
        { "trailing", 5, 0, trailing5 },   { "trailing", 7, 0, trailing7 },
        { "leading", 7, 0, leading7 }
    };
    df_process p = recorded_table(1), tiny;
    df_sample_desc d = df_sample_defaults();
    double betas[10];
    for (int l = 0; l < 7; l++)
        for (int end = 0; end < 2; end++) {
            int N = lists[l].N, zero = lists[l].index[N - 1] == 0;
            d.grid = lists[l].rule;
            d.steps = N;
            d.grid_offset = lists[l].offset;
            d.end = end ? DF_END_T_MIN : DF_END_DATA;
            expect(make_grid(&p, &d) == DF_OK);
            if (!check(grid_count == N + (end && zero ? 0 : 1), "%s: %d points",
                       lists[l].rule, grid_count))
                continue;
            for (int i = 0; i < N; i++)
                check(fabs(1000 * grid[i].t - 1 - lists[l].index[i]) < 1e-9,
                      "%s %d: [%d] = %.12g, want %d", lists[l].rule, N, i,
                      1000 * grid[i].t - 1, lists[l].index[i]);
            if (!end) expect(grid[N].sigma == 0 && grid[N].alpha == 1);
            else expect(fabs(grid[grid_count - 1].t - 1e-3) < 1e-15);
        }
    d.grid = "linspace";                       // a half: 4.5 rounds to even
    d.steps = 3;
    d.end = DF_END_DATA;
    df_betas(ctx, DF_BETAS_LINEAR, 0.1, 0.3, 10, betas);
    expect(df_process_table(ctx, betas, 10, &tiny) == DF_OK);
    expect(make_grid(&tiny, &d) == DF_OK);
    near(10 * grid[1].t - 1, 4, 1e-15);
    d.grid = "leading";
    d.steps = 10;
    d.grid_offset = 1;                         // index 10 of 10
    expect(make_grid(&tiny, &d) == DF_ERR_ARGUMENT);
    d.grid_offset = 0;
    d.steps = 11;
    expect(make_grid(&tiny, &d) == DF_ERR_ARGUMENT);
    d.steps = 5;
    d.t_max = 0.5;
    expect(make_grid(&tiny, &d) == DF_ERR_ARGUMENT);
    d.t_max = 1;
    expect(make_grid(&paths[5], &d) == DF_ERR_ARGUMENT);
    expect(strstr(df_ctx_message(ctx), "flow") != NULL);
}

TEST(grid_uniform) {
    df_sample_desc d = df_sample_defaults();
    d.steps = 8;
    for (int k = 0; k < KINDS; k++)
        for (int quad = 0; quad < 2; quad++) {
            double top = quad ? sqrt(0.9) : 0.9, u;
            int ve = k == DF_PROCESS_VE;
            d.grid = quad ? "quadratic" : "uniform";
            d.t_max = 0.9;
            d.end = DF_END_DATA;
            d.t_min = -1;
            expect(make_grid(&paths[k], &d) == DF_OK);
            expect(grid_count == 9 && grid[8].sigma == 0 && is_inf(grid[8].lambda));
            for (int i = 0; i < 8; i++) {
                u = top * (1 - i / (ve ? 7.0 : 8.0));
                near(grid[i].t, quad ? u * u : u, 1e-15);
            }
            if (ve) expect(grid[7].sigma == 0.01);
            d.end = DF_END_T_MIN;
            d.t_min = 0.1;
            expect(make_grid(&paths[k], &d) == DF_OK && grid_count == 9);
            for (int i = 0; i <= 8; i++) {
                double low = quad ? sqrt(0.1) : 0.1;
                u = top + (low - top) * i / 8;
                near(grid[i].t, quad ? u * u : u, 1e-15);
            }
        }
    d.steps = 1;
    d.t_max = 1;
    d.end = DF_END_DATA;
    expect(make_grid(&paths[5], &d) == DF_OK && grid_count == 2 && grid[0].alpha == 0);
}

TEST(grid_shift) {
    static const double mini[] = {1,
                                  0.98969072164948457,
                                  0.9767441860465117,
                                  0.96,
                                  0.9375,
                                  0.90566037735849059,
                                  0.8571428571428571,
                                  0.77419354838709675,
                                  0.6,
                                  0};
    static const double euler[] = {1,
                                   0.90035906642728902,
                                   0.7511210762331838,
                                   0.50298507462686581,
                                   0.0089285714285714298,
                                   0};
    double points[6], low = 3 * 0.001 / 1.002;
    df_sample_desc d = df_sample_defaults();
    df_process trig = df_process_trig(0.5);
    d.shift = 12;                              // diffusers MiniMaxH3
    d.steps = 9;
    expect(make_grid(&paths[5], &d) == DF_OK && grid_count == 10);
    for (int i = 0; i < 10; i++) near(grid[i].t, mini[i], 1e-14);
    d.shift = 3; // FlowMatchEuler, which shifts its bounds as well
    for (int i = 0; i < 5; i++) points[i] = 1 + (low - 1) * i / 4;
    points[5] = 0;
    d.points = points;
    d.points_count = 6;
    expect(make_grid(&paths[5], &d) == DF_OK && grid_count == 6);
    for (int i = 0; i < 6; i++) near(grid[i].t, euler[i], 1e-14);
    d.points = NULL;
    d.compat = DF_COMPAT_DOUBLE_SHIFT;         // ... and by name
    d.steps = 5;
    d.t_min = .001;
    expect(make_grid(&paths[5], &d) == DF_OK && grid_count == 6);
    for (int i = 0; i < 6; i++) near(grid[i].t, euler[i], 1e-14);
    d.compat = 0;
    d.steps = 9;
    d.t_min = -1;
    expect(make_grid(&trig, &d) == DF_OK);     // any process: sigma/alpha times s
    for (int i = 1; i < 9; i++)
        near_rel(grid[i].sigma / grid[i].alpha, 3 * 0.5 * tan(pi / 2 * (1 - i / 9.0)),
                 1e-13);
    expect(make_grid(&paths[0], &d) == DF_ERR_ARGUMENT);       // past VP's noise end
    expect(strstr(df_ctx_message(ctx), "t_max") != NULL);
    d.t_max = 0.85;
    expect(make_grid(&paths[0], &d) == DF_OK && grid[0].t > 0.85);
    d.end = DF_END_T_MIN;                      // the last point stays
    d.t_min = 0.01;
    d.t_max = 1;
    expect(make_grid(&paths[5], &d) == DF_OK && grid_count == 10 && grid[9].t == 0.01);
    d.shift = 0;
    expect(make_grid(&paths[5], &d) == DF_ERR_ARGUMENT);
}

TEST(grid_points) {
    df_sample_desc d = df_sample_defaults();
    double t[4] = {1, 0.5, 0.25, 0}, rho[4] = {50, 3, 0.01, 0},
           lambda[3] = {-3, 1, HUGE_VAL};
    d.points = t;
    d.points_count = 4;
    expect(make_grid(&paths[5], &d) == DF_OK && grid_count == 4);
    expect(grid[0].alpha == 0 && grid[1].t == 0.5 && grid[3].sigma == 0);
    expect(make_grid(&paths[2], &d) == DF_OK && grid[3].sigma == 0);
    d.end = DF_END_T_MIN;                      // VE: t = 0 is sigma_min then
    expect(make_grid(&paths[2], &d) == DF_OK && grid[3].sigma == 0.01);
    d.end = DF_END_DATA;
    d.points = rho;
    d.points_in = DF_POINTS_RHO;
    expect(make_grid(&paths[2], &d) == DF_OK && grid[0].t == 1 && grid[3].sigma == 0);
    near_rel(grid[1].sigma, 3, 1e-15);
    rho[0] = (float)50.000002;                 // a list kept in float
    expect(make_grid(&paths[2], &d) == DF_OK && grid[0].sigma == 50);
    rho[0] = 50.1;
    expect(make_grid(&paths[2], &d) == DF_ERR_ARGUMENT);
    rho[0] = 50;
    rho[2] = 0.009;                            // below sigma_min and not the data point
    expect(make_grid(&paths[2], &d) == DF_ERR_ARGUMENT);
    rho[2] = 3;                                // does not fall
    expect(make_grid(&paths[2], &d) == DF_ERR_ARGUMENT);
    expect(strstr(df_ctx_message(ctx), "point 2") != NULL);
    rho[2] = -1;
    expect(make_grid(&paths[2], &d) == DF_ERR_ARGUMENT);
    rho[2] = nan("");
    expect(make_grid(&paths[2], &d) == DF_ERR_ARGUMENT);
    rho[2] = 0.01;
    rho[0] = HUGE_VAL;                         // pure noise, where there is any
    expect(make_grid(&paths[2], &d) == DF_ERR_ARGUMENT);
    expect(make_grid(&paths[5], &d) == DF_OK && grid[0].alpha == 0);
    d.points = lambda;
    d.points_count = 3;
    d.points_in = DF_POINTS_LAMBDA;
    expect(make_grid(&paths[0], &d) == DF_OK && grid[1].lambda == 1 && grid[2].sigma == 0);
    lambda[0] = -45;                           // t is 1 twice
    lambda[1] = -40;
    expect(make_grid(&paths[5], &d) == DF_ERR_ARGUMENT);
    lambda[1] = 1;
    expect(make_grid(&paths[5], &d) == DF_OK);
    lambda[0] = -6;
    expect(make_grid(&paths[0], &d) == DF_ERR_ARGUMENT);
    d.points = t;
    d.points_in = DF_POINTS_T;
    t[0] = 1.1;
    expect(make_grid(&paths[5], &d) == DF_ERR_ARGUMENT);
    t[0] = 1;
    d.points_count = 1;
    expect(make_grid(&paths[5], &d) == DF_ERR_ARGUMENT);
}

TEST(grid_arguments) {
    df_sample_desc d = df_sample_defaults(), none;
    int count, names;
    const char *const *rules = df_grid_names(&names);
    expect(names == 8);
    for (int i = 0; i < names; i++) { // every name is known; a table takes them all
        d.grid = rules[i];
        d.steps = 41;                          // more than there are entries
        check(make_grid(&paths[TABLE], &d) == (i < 5 ? DF_OK : DF_ERR_ARGUMENT), "%s: %s",
              rules[i], df_ctx_message(ctx));
        d.steps = 40;
        check(make_grid(&paths[TABLE], &d) == DF_OK, "%s: %s", rules[i],
              df_ctx_message(ctx));
    }
    d.steps = 50;
    d.grid = "carrots";
    expect(make_grid(&paths[0], &d) == DF_ERR_ARGUMENT);
    expect(strstr(df_ctx_message(ctx), "carrots") &&
           strstr(df_ctx_message(ctx), "karras"));
    d.grid = "karras";
    expect(make_grid(&paths[5], &d) == DF_ERR_ARGUMENT); // sigma/alpha infinite at t = 1
    expect(strstr(df_ctx_message(ctx), "t_max") != NULL);
    d.t_max = 0.999;
    expect(make_grid(&paths[5], &d) == DF_OK);
    d.t_min = 0;                               // cannot divide down to sigma = 0
    expect(make_grid(&paths[5], &d) == DF_ERR_ARGUMENT);
    d.t_min = 0.9991;
    expect(make_grid(&paths[5], &d) == DF_ERR_ARGUMENT);
    d = df_sample_defaults();
    expect(df_grid(ctx, &paths[0], &d, grid, 51, &count) == DF_OK && count == 51);
    expect(df_grid(ctx, &paths[0], &d, grid, 50, &count) == DF_ERR_ARGUMENT);
    expect(df_grid(NULL, &paths[0], &d, grid, 50, &count) == DF_ERR_ARGUMENT);
    d.steps = 0;
    expect(make_grid(&paths[0], &d) == DF_ERR_ARGUMENT);
    d.steps = 5;
    d.t_max = 1.5;
    expect(make_grid(&paths[0], &d) == DF_ERR_ARGUMENT);
    d.t_max = nan("");
    expect(make_grid(&paths[0], &d) == DF_ERR_ARGUMENT);
    d.t_max = 1;
    d.t_min = nan("");
    expect(make_grid(&paths[0], &d) == DF_ERR_ARGUMENT);
    memset(&none, 0, sizeof none);
    expect(make_grid(&paths[0], &none) == DF_ERR_ARGUMENT);
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    ctx = df_ctx_create(NULL);
    make_paths();
    RUN(formulas);
    RUN(ends_digits);
    RUN(ends);
    RUN(differences);
    RUN(identities);
    RUN(singular);
    RUN(inverse);
    RUN(inverse_far);
    RUN(invariance);
    RUN(schedules);
    RUN(between);
    RUN(knots);
    RUN(table_arguments);
    RUN(parameters);
    RUN(times);
    RUN(times_singular);
    RUN(grid_karras);
    RUN(grid_table);
    RUN(grid_uniform);
    RUN(grid_shift);
    RUN(grid_points);
    RUN(grid_arguments);
    df_ctx_free(ctx);
    return test_end();
}
