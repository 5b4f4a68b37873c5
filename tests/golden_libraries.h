// golden_libraries.h: what k-diffusion, EDM, DPM-Solver, UniPC, guided-diffusion,
// consistency_models and score_sde did, in our settings; and their schedules.
#ifndef DF_TEST_GOLDEN_LIBRARIES_H
#define DF_TEST_GOLDEN_LIBRARIES_H
#include "golden_play.h"

static int lib_starts(const char *text, const char *with) {
    return strncmp(text, with, strlen(with)) == 0;
}

static void lib_list(golden_plan *p, df_points unit, int count, const double *values) {
    memcpy(p->points, values, (size_t)count * sizeof(double));
    golden_grid(p, count, unit);
}

// The word of `key` looked up in a list of pairs; NULL: not there.
static const char *lib_word(const golden_case *c, const char *key,
                            const char *const (*pairs)[2], int count) {
    for (int i = 0; i < count; i++)
        if (golden_is(c, key, pairs[i][0])) return pairs[i][1];
    return NULL;
}

static df_prediction lib_prediction(const golden_case *c) {
    static const struct {
        const char *name;
        df_prediction prediction;
    } map[] = {{"epsilon", DF_EPS},
               {"sample", DF_X0},
               {"v_prediction", DF_V},
               {"score", DF_SCORE}};
    for (int i = 0; i < 4; i++)
        if (golden_is(c, "prediction", map[i].name)) return map[i].prediction;
    return golden_is(c, "model_mean_type", "START_X") ? DF_X0 : DF_EPS;
}

// A method that decides by its errors may decide otherwise in float.
static int lib_adaptive(const golden_case *c, golden_plan *p) {
    if (DOUBLE_BUILD) golden_run(c, p, 0);
    return 1;
}

// A method of the caller's own, as a row for df_sample_desc.row.
static df_sampler_row lib_row(df_stage_fn stage, df_prediction wants, int evaluations) {
    df_sampler_row row;
    memset(&row, 0, sizeof row);
    row.name = "the caller's";
    row.evaluations = evaluations;
    row.to_sigma0 = 1;
    row.corrector = -1;
    row.wants = wants;
    row.asks = DF_ASK_PREDICT;
    row.buffers = 2;
    row.stage = stage;
    return row;
}

// The same plan once more, on our own grid from t_max to t_min.
static void lib_own_grid(const golden_case *c, golden_plan *p, const char *grid, int steps,
                         double t_max, double t_min, df_end end) {
    p->d.points = NULL;
    p->d.points_count = 0;
    p->d.grid = grid;
    p->d.steps = steps;
    p->d.t_max = t_max;
    p->d.t_min = t_min;
    p->d.end = end;
    golden_run(c, p, 0);
}

// ---- k-diffusion, consistency_models: sigma/alpha lists on alpha = 1 ----

typedef struct lib_rho_method {
    const char *function, *method;
    int draws;     // in each step
    int corrected; // 1: third order lacks a factor 2
} lib_rho_method;
static const lib_rho_method lib_rho_methods[] = {
    {"sample_euler", "euler", 1, 0},
    {"sample_heun", "heun", 1, 0},
    {"sample_dpm_2", "dpm_2", 1, 0},
    {"sample_lms", "lms", 0, 0},
    {"sample_euler_ancestral", "euler_ancestral", 1, 0},
    {"sample_dpm_2_ancestral", "dpm_2_ancestral", 1, 0},
    {"sample_dpmpp_2s_ancestral", "dpmpp_2s_ancestral", 1, 0},
    {"sample_dpmpp_sde", "dpmpp_sde", 2, 0},
    {"sample_dpmpp_2m", "dpmpp_2m", 0, 0},
    {"sample_dpmpp_2m_sde", "dpmpp_2m_sde", 1, 0},
    {"sample_dpmpp_3m_sde", "dpmpp_3m_sde", 1, 1},
    {"sample_dpm", "dpm_2", 1, 0}, // a row of its own, below
    {"sample_dpm_fast", "dpm_fast", 0, 0},
    {"sample_dpm_adaptive", "dpm_adaptive", 0, 0},
    {"sample_progdist", "euler", 0, 0}, // without the step to 0
    {"sample_onestep", "consistency", 0, 0},
    {"stochastic_iterative_sampler", "consistency", 1, 0}};

// The mixture's posterior mean stands in for a consistency model.
static void lib_mean_as_map(const golden_plan *p, const df_query *q, int row,
                            double c[2]) {
    (void)p, (void)q, (void)row;
    c[1] = 1;
}

// The questions asked, and the end, as a list.
static void lib_calls_rho(const golden_case *c, golden_plan *p, double end) {
    const golden_array *calls = golden_find(c, "model_calls");
    for (int i = 0; i < calls->rows; i++) p->points[i] = calls->v[3 * i + 2];
    p->points[calls->rows] = end;
    golden_grid(p, calls->rows + 1, DF_POINTS_RHO);
}

// dpm_fast with eta: block b of up to three questions aims below where it is to end; returns
// the noise that brings it up. Each block is a call of its own.
static double lib_fast_block(const golden_case *c, golden_plan *p, int b) {
    const golden_array *calls = golden_find(c, "model_calls");
    double least = golden_number(c, "sigma_min", 0),
           most = golden_number(c, "sigma_max", 0);
    double eta = golden_number(c, "opt.eta", 0);
    int blocks = calls->rows / 3 + 1,
        n = calls->rows - 3 * b < 3 ? calls->rows - 3 * b : 3;
    double from = most * pow(least / most, b / (double)blocks);
    double to = most * pow(least / most, (b + 1) / (double)blocks);
    double up = fmin(to, eta * to * sqrt(1 - to * to / (from * from)));
    double aim = fmax(sqrt(to * to - up * up), least);
    for (int i = 0; i < n; i++) p->points[i] = calls->v[3 * (3 * b + i) + 2];
    p->points[n] = aim;
    golden_grid(p, n + 1, DF_POINTS_RHO);
    p->d.points = p->points;
    p->d.order = n;
    p->d.final = DF_FINAL_KEEP; // no shorter block at the end of this one
    p->d.eta = 0;
    return sqrt(fmax(to * to - aim * aim, 0));
}
static void lib_fast_rest(const golden_plan *p, const golden_case *c, df_real *x) {
    const golden_array *calls = golden_find(c, "model_calls"),
                       *noise = golden_find(c, "noise");
    golden_plan block = *p;
    int size = 8 * noise->cols;
    for (int b = 0; 3 * b < calls->rows; b++) {
        double up = lib_fast_block(c, &block, b);
        if (b > 0) // the first is done
            check(df_sample(ctx, &block.model, &block.d, x, 8) == DF_OK, "%s: %s", c->name,
                  df_ctx_message(ctx));
        for (int i = 0; i < size; i++) x[i] += (df_real)(up * noise->v[b * size + i]);
    }
}

// consistency_models' dpm: the middle of a step in rho^(1/3), the second slope in rho.
static df_next lib_middle_stage(df_stage *s) {
    double a = s->from.sigma / s->from.alpha, b = s->to.sigma / s->to.alpha, c[2] = {1, 0};
    double middle = pow((cbrt(a) + cbrt(b)) / 2, 3);
    df_point at = df_process_at_rho(s->process, middle);
    const df_real *in[2];
    in[0] = s->x;
    in[1] = s->answer;
    c[1] = s->call == 1 ? middle - a : b - a;
    df_stage_combine(s, s->call == 1 ? s->buffer[0] : s->x, 2, c, in);
    return s->call == 1 ? df_stage_ask(s, &at, s->buffer[0]) : DF_NEXT_STEP;
}

static int lib_kdiffusion(const golden_case *c, golden_plan *p) {
    static const char *const grids[][2] = {{"karras", "karras"},
                                           {"exponential", "lambda"},
                                           {"polyexponential", "polyexponential"}};
    const golden_array *sigmas = golden_find(c, "sigmas"),
                       *calls = golden_find(c, "model_calls");
    const lib_rho_method *m = NULL;
    df_sampler_row middle = lib_row(lib_middle_stage, DF_EPS, 2);
    const char *grid = lib_word(c, "grid", grids, 3);
    double least = golden_number(c, "sigma_min", 0),
           most = golden_number(c, "sigma_max", 0);
    for (size_t i = 0; i < sizeof lib_rho_methods / sizeof *m; i++)
        if (golden_is(c, "function", lib_rho_methods[i].function)) m = &lib_rho_methods[i];
    if (m == NULL || calls == NULL) return 0;
    if (golden_is(c, "function", "sample_dpm")) p->d.row = &middle;
    p->d.method = m->method;
    p->draws_per_step = m->draws;
    p->d.compat = m->corrected ? DF_COMPAT_HALF_D2 : 0;
    if (m->draws == 2) p->d.compat |= DF_COMPAT_STAGE_NOISE;
    p->prediction = lib_prediction(c);
    p->d.final = DF_FINAL_KEEP;
    p->d.churn = golden_number(c, "opt.s_churn", 0);
    p->d.churn_min = golden_number(c, "opt.s_tmin", 0);
    p->d.churn_max = golden_number(c, "opt.s_tmax", HUGE_VAL);
    p->d.noise_scale = golden_number(c, "opt.s_noise", 1);
    p->d.eta = golden_number(c, "opt.eta", -1);
    p->d.order = (int)golden_number(c, "opt.order", 0);
    p->d.ratio = golden_number(c, "opt.r", 0);
    if (golden_is(c, "opt.solver_type", "heun")) p->d.slope = DF_SLOPE_EXACT;
    if (strcmp(m->method, "dpm_adaptive") == 0) {
        p->points[0] = most;
        p->points[1] = least;
        golden_grid(p, 2, DF_POINTS_RHO);
        p->d.order = (int)golden_number(c, "order", 3);
        p->d.compat = DF_COMPAT_ERROR_BATCH;
        return lib_adaptive(c, p);
    }
    if (strcmp(m->method, "consistency") == 0) {
        p->skip_out = lib_mean_as_map;
        lib_calls_rho(c, p, least);
    } else if (sigmas == NULL) { // dpm_fast
        p->d.final = DF_FINAL_OWN;
        lib_calls_rho(c, p, least);
        if (p->d.eta > 0) {
            lib_fast_block(c, p, 0);
            p->finish = lib_fast_rest;
        }
    } else {
        int last = golden_is(c, "function", "sample_progdist"); // leaves out the 0
        lib_list(p, DF_POINTS_RHO, sigmas->cols - last, sigmas->v);
    }
    golden_run(c, p, 0);
    if (grid == NULL) return 1;
    p->d.grid_rho = golden_is(c, "grid", "polyexponential") ? 1.3 : 0;
    lib_own_grid(c, p, grid, sigmas->cols - 1, most / 10000, least / 10000, DF_END_DATA);
    return 1;
}

// ---- EDM ----

// The published discretisations of EDM's ablation (Karras et al. 2022, table 1) into sigma
// [N + 1], and beta of the VP that goes from sigma_max to sigma_min in the same time.
typedef struct lib_ablation {
    double beta_min, beta_d;
    int ve, scaled; // what the clock is, for the row below
} lib_ablation;

static lib_ablation lib_edm_sigmas(const char *rule, int N, double *sigma) {
    int vp = strcmp(rule, "vp") == 0, ve = strcmp(rule, "ve") == 0;
    double least = vp ? sqrt(expm1(19.9 / 2 * 1e-6 + .1 * 1e-3)) : ve ? .02 : .002;
    double most = vp ? sqrt(expm1(19.9 / 2 + .1)) : ve ? 100 : 80;
    double u[1001] = {0}, half_pi = 2 * atan(1.0);
    int low = 1000, high = 0;
    lib_ablation a = {0, 0, 0, 0};
    if (strcmp(rule, "iddpm") == 0) most = 81;
    a.beta_d = 2 * (log1p(least * least) / 1e-3 - log1p(most * most)) / (1e-3 - 1);
    a.beta_min = log1p(most * most) - .5 * a.beta_d;
    for (int j = 1000; j > 0; j--) { // iddpm: a table, then every so many of it
        double before = sin(half_pi * (j - 1) / 1008), here = sin(half_pi * j / 1008);
        u[j - 1] = sqrt((u[j] * u[j] + 1) / fmax(pow(before / here, 2), .001) - 1);
    }
    for (int j = 0; j <= 1000; j++) {
        if (u[j] < least || u[j] > most) continue;
        if (j < low) low = j;
        high = j;
    }
    for (int i = 0; i < N; i++) {
        double f = i / (double)(N - 1), t = 1 + f * (1e-3 - 1);
        double root = pow(most, 1 / 7.0) + f * (pow(least, 1 / 7.0) - pow(most, 1 / 7.0));
        sigma[i] = vp   ? sqrt(expm1(a.beta_d / 2 * t * t + a.beta_min * t))
                   : ve ? most * pow(least / most, f)
                   : strcmp(rule, "iddpm") == 0 ? u[low + (int)rint((high - low) * f)]
                                                : pow(root, 7);
    }
    sigma[N] = 0;
    return a;
}

// Euler and Heun in the clocks that none of our processes has (sigma^2; VP's t where alpha is
// 1, or where beta_min is below 0), as a row of the user's:
//     dx/dc = (rho'/rho + alpha'/alpha) x - rho' alpha/rho x_0,   rho = sigma/alpha.
static lib_ablation lib_clock;

static double lib_clock_at(double rho) {
    const lib_ablation *a = &lib_clock;
    if (a->ve || rho <= 0) return rho * rho;
    return (sqrt(a->beta_min * a->beta_min + 2 * a->beta_d * log1p(rho * rho)) -
            a->beta_min) /
           a->beta_d;
}
static df_next lib_clock_stage(df_stage *s) {
    const lib_ablation *a = &lib_clock;
    double alpha = s->at.alpha, rho = s->at.sigma / alpha, rate, c[4], dc;
    int heun = s->row->evaluations == 2 && s->to.sigma > 0;
    const df_real *in[4];
    df_real *slope = s->buffer[0], *there = s->buffer[1];
    rate = a->ve ? .5 / rho
                 : .5 * (a->beta_min + a->beta_d * lib_clock_at(rho)) * (rho + 1 / rho);
    dc = lib_clock_at(s->to.sigma / s->to.alpha) -
         lib_clock_at(s->from.sigma / s->from.alpha);
    c[0] = rate / rho - (a->scaled ? rho * rate * alpha * alpha : 0);
    c[1] = -rate * alpha / rho;
    in[0] = s->call == 1 ? s->x : there;
    in[1] = s->answer;
    if (s->call == 2) { // x + dc/2 (slope + slope there)
        c[2] = 1;
        in[2] = slope;
        df_stage_combine(s, slope, 3, c, in);
    } else
        df_stage_combine(s, slope, 2, c, in);
    c[0] = 1;
    c[1] = s->call == 2 ? dc / 2 : dc;
    in[0] = s->x;
    in[1] = slope;
    df_stage_combine(s, heun && s->call == 1 ? there : s->x, 2, c, in);
    return heun && s->call == 1 ? df_stage_ask(s, &s->to, there) : DF_NEXT_STEP;
}

static int lib_edm(const golden_case *c, golden_plan *p) {
    const char *rule = golden_text(c, "opt.discretization");
    const char *schedule = golden_text(c, "opt.schedule");
    int N = (int)golden_number(c, "N", 18), euler = golden_is(c, "opt.solver", "euler");
    int vp = strcmp(schedule, "vp") == 0, ve = strcmp(schedule, "ve") == 0;
    lib_ablation a = lib_edm_sigmas(*rule ? rule : "edm", N, p->points);
    df_sampler_row row = lib_row(lib_clock_stage, DF_X0, euler ? 1 : 2);
    golden_grid(p, N + 1, DF_POINTS_RHO);
    a.ve = ve;
    a.scaled = golden_is(c, "opt.scaling", "vp");
    p->d.method = euler ? "euler" : "heun";
    p->d.ratio = euler ? 0 : golden_number(c, "opt.alpha", 0);
    p->prediction = DF_X0;
    p->draws_per_step = 1;
    p->d.churn = golden_number(c, "opt.S_churn", 0);
    p->d.churn_min = golden_number(c, "opt.S_min", 0);
    p->d.churn_max = golden_number(c, "opt.S_max", HUGE_VAL);
    p->d.noise_scale = golden_number(c, "opt.S_noise", 1);
    p->start_factor = p->points[0];
    if (a.scaled) p->start_factor /= sqrt(1 + p->points[0] * p->points[0]);
    if (a.scaled && a.beta_min > 0) {
        p->process = df_process_vp(a.beta_min, a.beta_min + a.beta_d);
        p->d.method = euler ? "euler_t" : "heun_t";
    } else if (ve && euler) {
        p->d.method = "reverse_diffusion"; // eta 0 is Euler's step in sigma^2
        p->d.eta = 0;
    } else if (ve || vp) {
        if (a.scaled) p->process = df_process_cosine();
        lib_clock = a;
        p->d.row = &row;
    }
    golden_run(c, p, 0);
    if (*rule == 0 && *schedule == 0)
        lib_own_grid(c, p, "karras", N, .008, .002e-4, DF_END_DATA);
    return 1;
}

// ---- DPM-Solver, UniPC: t on VP, or on a table of log alpha linear between entries ----

// Sets the process; returns its smallest t.
static double lib_vp(const golden_case *c, golden_plan *p) {
    static double betas[1000];
    const char *schedule = golden_text(c, "schedule");
    int T = (int)golden_number(c, "total_N", 1000),
        root = strstr(schedule, "sqrt") != NULL;
    df_betas_kind kind = root                         ? DF_BETAS_SCALED_LINEAR
                         : strstr(schedule, "cosine") ? DF_BETAS_COSINE
                                                      : DF_BETAS_LINEAR;
    p->process = df_process_vp(.1, 20);
    if (strstr(schedule, "continuous")) return golden_number(c, "opt.t_end", 1.0 / T);
    check(df_betas(ctx, kind, root ? .00085 : 1e-4, root ? .012 : .02, 1000, betas) ==
                  DF_OK &&
              df_process_table(ctx, betas, T, &p->process) == DF_OK,
          "%s: %s", c->name, df_ctx_message(ctx));
    return 1.0 / T;
}

// x0 at the end: one more step, to the data.
static void lib_denoise(const golden_plan *p, const golden_case *c, df_real *x) {
    df_sample_desc d = p->d;
    double last[2] = {0, 0};
    last[0] = p->points[d.points_count - 1];
    d.method = "ddim";
    d.points = last;
    d.points_count = 2;
    d.order = 0;
    d.predicts = -1;
    d.slope = DF_SLOPE_OWN;
    check(df_sample(ctx, &p->model, &d, x, 8) == DF_OK, "%s: %s", c->name,
          df_ctx_message(ctx));
}

static int lib_solver(const golden_case *c, golden_plan *p, int unipc) {
    static const char *const rules[][2] = {{"time_uniform", "uniform"},
                                           {"logSNR", "lambda"},
                                           {"time_quadratic", "quadratic"}};
    const golden_array *t = golden_find(c, "timesteps"),
                       *calls = golden_find(c, "model_calls");
    const char *method = golden_text(c, "opt.method"), *grid;
    int noise = golden_is(c, "algorithm_type", "dpmsolver") ||
                golden_is(c, "algorithm_type", "noise_prediction");
    int N = calls->rows, lower = !golden_is(c, "opt.lower_order_final", "0"), block;
    double t_min = lib_vp(c, p);
    grid = lib_word(c, "opt.skip_type", rules, 3);
    block = lib_starts(method, "singlestep");
    p->prediction = lib_prediction(c);
    p->d.predicts = noise ? DF_EPS : DF_X0;
    p->d.order = (int)golden_number(c, "opt.order", 2);
    if (strcmp(method, "adaptive") == 0) {
        p->d.method = "dpm_adaptive";
        p->d.compat = DF_COMPAT_ERROR_MOST;
        p->points[0] = 1;
        p->points[1] = t_min;
        golden_grid(p, 2, DF_POINTS_T);
        return lib_adaptive(c, p);
    }
    if (unipc) {
        p->d.method = "unipc";
        p->d.slope = golden_is(c, "variant", "bh1")   ? DF_SLOPE_BH1
                     : golden_is(c, "variant", "bh2") ? DF_SLOPE_BH2
                                                      : DF_SLOPE_EXACT;
        p->d.final = lower ? DF_FINAL_LOWER : DF_FINAL_KEEP;
    } else if (block) {
        p->d.method = noise ? "dpm_solver_3" : "dpmpp_3s";
        p->d.final = strcmp(method, "singlestep") == 0 ? DF_FINAL_OWN : DF_FINAL_KEEP;
    } else {
        p->d.method = "dpmpp_2m";
        p->d.final = lower && N < 10 ? DF_FINAL_LOWER : DF_FINAL_KEEP;
        p->d.compat = p->d.order > 2 ? DF_COMPAT_HALF_D2 : 0;
    }
    if (!unipc)
        p->d.slope =
            golden_is(c, "opt.solver_type", "taylor") ? DF_SLOPE_EXACT : DF_SLOPE_BH2;
    p->d.threshold = golden_number(c, "thr.dynamic_thresholding_ratio", 0);
    p->d.threshold_min = golden_number(c, "thr.thresholding_max_val", 1);
    if (golden_is(c, "opt.denoise_to_zero", "1")) p->finish = lib_denoise, N--;
    if (golden_is(c, "function", "DPM_Solver.inverse")) { // the list backwards
        p->d.inverse = 1;
        p->points[0] = 1;
        for (int i = 0; i < N; i++) p->points[N - i] = calls->v[3 * i];
        p->points[N] = t_min;
        golden_grid(p, N + 1, DF_POINTS_T);
    } else if (t)
        lib_list(p, DF_POINTS_T, t->cols, t->v);
    else {
        for (int i = 0; i < N; i++) p->points[i] = calls->v[3 * i];
        p->points[N] = t_min;
        golden_grid(p, N + 1, DF_POINTS_T);
    }
    golden_run(c, p, 0);
    if (t && grid && p->finish == NULL)
        lib_own_grid(c, p, grid, N, 1, t_min, DF_END_T_MIN);
    return 1;
}

// ---- guided-diffusion: the respaced table itself, every entry a step ----

static int lib_guided(const golden_case *c, golden_plan *p) {
    const golden_array *betas = golden_find(c, "betas");
    const char *variance = golden_text(c, "model_var_type");
    int ddim = golden_is(c, "function", "ddim_sample_loop"), N = betas ? betas->cols : 0;
    if (N == 0 || !check(df_process_table(ctx, betas->v, N, &p->process) == DF_OK,
                         "%s: %s", c->name, df_ctx_message(ctx)))
        return 0;
    for (int i = 0; i <= N; i++) p->points[i] = (double)(N - i) / N;
    golden_grid(p, N + 1, DF_POINTS_T);
    p->d.method = ddim ? "ddim" : "ddpm";
    p->d.eta = golden_number(c, "opt.eta", -1);
    p->d.clip = golden_number(c, "clip_denoised", 0);
    p->prediction = lib_prediction(c);
    p->draws_per_step = 1;
    if (strcmp(variance, "FIXED_LARGE") == 0 && !ddim) p->d.variance = DF_VARIANCE_LARGE;
    if (strcmp(variance, "LEARNED") == 0) p->learned = DF_LEARNED_LOG_VARIANCE;
    if (strcmp(variance, "LEARNED_RANGE") == 0) p->learned = DF_LEARNED_RANGE;
    golden_run(c, p, 0);
    return 1;
}

// ---- score_sde ----
// The network is asked at the continuous t, the step goes along a table whose entry is t's
// whole part: so the model answers at the recorded alpha and sigma, and the grid is the table.

static df_process lib_sde(const golden_case *c) {
    if (golden_is(c, "sde", "ve")) return df_process_ve(.01, 50);
    return golden_is(c, "sde", "subvp") ? df_process_subvp(.1, 20) : df_process_vp(.1, 20);
}

// The table of N steps, down to just above the data if the last noise is to stay.
static void lib_sde_table(const golden_case *c, golden_plan *p, int N, int clean) {
    double betas[1000];
    if (golden_is(c, "sde", "ve")) {
        p->process = df_process_edm(10000);
        for (int i = 0; i < N; i++)
            p->points[N - 1 - i] = .01 * pow(5000, i / (double)(N - 1));
        p->points[N] = clean ? 0 : 1e-9;
        golden_grid(p, N + 1, DF_POINTS_RHO);
        return;
    }
    df_betas(ctx, DF_BETAS_LINEAR, .1 / N, 20.0 / N, N, betas);
    check(df_process_table(ctx, betas, N, &p->process) == DF_OK, "%s: %s", c->name,
          df_ctx_message(ctx));
    for (int i = 0; i < N; i++) p->points[i] = (N - i) / (double)N;
    p->points[N] = clean ? 0 : 1e-13;
    golden_grid(p, N + 1, DF_POINTS_T);
}

// A corrector whose step takes sigma at the continuous t and alpha at the table's entry while
// the predictor does the reverse: a Langevin step of its own, between the steps.
typedef struct lib_between {
    golden_plan *plan;
    const golden_case *c;
} lib_between;
static int lib_correct(void *user, const df_step_info *info, df_real *x) {
    const lib_between *b = (const lib_between *)user;
    const golden_array *t = golden_find(b->c, "timesteps");
    df_sample_desc d = b->plan->d;
    df_model model = b->plan->model;
    int N = t->cols, ve = golden_is(b->c, "sde", "ve");
    double beta = ve ? 0 : (.1 + (20 - .1) * (N - 1 - info->step) / (N - 1)) / N;
    if (info->step == N) return 0;
    model.process = lib_sde(b->c);
    d.method = "langevin";
    d.points = NULL;
    d.steps = 1;
    d.t_max = t->v[info->step];
    d.snr *= sqrt(1 - beta);
    d.compat &= ~(unsigned)DF_COMPAT_DT;
    if (golden_is(b->c, "corrector", "langevin")) d.compat |= DF_COMPAT_NORM_BATCH;
    d.eta = -1;
    d.edit = NULL;
    return df_sample(ctx, &model, &d, x, info->n);
}

static int lib_pc(const golden_case *c, golden_plan *p) {
    static const char *const predictors[][2] = {{"euler_maruyama", "euler_maruyama"},
                                                {"reverse_diffusion", "reverse_diffusion"},
                                                {"ancestral_sampling", "ddpm"},
                                                {"none", "annealed_langevin"}};
    const golden_array *t = golden_find(c, "timesteps");
    int N = t->cols, ve = golden_is(c, "sde", "ve"), sub = golden_is(c, "sde", "subvp");
    int clean = golden_is(c, "denoise", "1"),
        langevin = golden_is(c, "corrector", "langevin");
    lib_between between;
    p->d.method = lib_word(c, "predictor", predictors, 4);
    if (p->d.method == NULL) return 0;
    if (strcmp(p->d.method, "annealed_langevin") == 0) clean = 0;
    if (sub || strcmp(p->d.method, "euler_maruyama") == 0) {
        p->d.method = "euler_maruyama"; // sub-VP's own reverse diffusion is that
        p->d.compat = DF_COMPAT_DT;
        p->process = lib_sde(c);
        lib_list(p, DF_POINTS_T, N, t->v);
        p->points[N] = clean ? 0 : .5 * t->v[N - 1];
        golden_grid(p, N + 1, DF_POINTS_T);
    } else
        lib_sde_table(c, p, N, clean);
    p->at_calls = 1;
    p->prediction = DF_SCORE;
    p->first_draw = 1;
    p->start_factor = ve ? 50 : 1;
    p->d.snr = golden_number(c, "snr", .16);
    if (golden_is(c, "corrector", "ald") ||
        (langevin && !ve && p->d.compat & DF_COMPAT_DT)) {
        between.plan = p;
        between.c = c;
        p->d.edit = lib_correct;
        p->d.user = &between;
    } else if (langevin) {
        p->d.corrections = 1;
        p->d.compat |= DF_COMPAT_SCORE_SDE | DF_COMPAT_NORM_BATCH;
    }
    if (golden_is(c, "probability_flow", "1")) p->d.eta = 0;
    if (strcmp(p->d.method, "ddpm") == 0 && !ve) p->d.variance = DF_VARIANCE_LARGE;
    golden_run(c, p, 0);
    return 1;
}

// One step of the table of 1000 from t = eps to the data, the score still that of t.
static void lib_ode_denoise(const golden_plan *p, const golden_case *c, df_real *x) {
    golden_model *self = (golden_model *)p->model.self;
    golden_plan one = *p;
    df_point at = df_process_at(&p->process, golden_number(c, "eps", 1e-3));
    double call[3];
    golden_array calls;
    memset(&calls, 0, sizeof calls);
    call[0] = at.t;
    call[1] = at.alpha;
    call[2] = at.sigma;
    calls.rows = 1;
    calls.cols = 3;
    calls.v = call;
    lib_sde_table(c, &one, 1000, 1);
    one.d.method = "reverse_diffusion";
    one.d.points = one.points + 999;
    one.d.points_count = 2;
    one.prediction = one.model.prediction = DF_SCORE;
    one.at_calls = 1;
    one.model.process = one.process;
    one.d.rtol = one.d.atol = 0;
    one.d.eta = -1;
    one.d.noise_scale = 1;
    self->plan = &one;
    self->calls = &calls;
    self->asked = 0;
    check(df_sample(ctx, &one.model, &one.d, x, 8) == DF_OK, "%s: %s", c->name,
          df_ctx_message(ctx));
}

static int lib_ode(const golden_case *c, golden_plan *p) {
    p->process = lib_sde(c);
    p->points[0] = 1;
    p->points[1] = golden_number(c, "eps", 1e-3);
    golden_grid(p, 2, DF_POINTS_T);
    p->d.method = "rk45";
    p->d.rtol = p->d.atol = 1e-11;
    if (golden_is(c, "denoise", "1")) p->finish = lib_ode_denoise;
    return lib_adaptive(c, p);
}

// ---- schedules: not played, compared ----

static void lib_same(const golden_case *c, const char *array, const double *ours, int n) {
    const golden_array *theirs = golden_find(c, array);
    double off = 0;
    if (theirs == NULL) return;
    for (int i = 0; i < n; i++)
        off = fmax(off, fabs(ours[i] - theirs->v[i]) / fmax(1e-3, fabs(theirs->v[i])));
    check(theirs->cols == n && off <= 1e-11, "%s: %s of %d, not %d, off by %g", c->name,
          array, theirs->cols, n, off);
}

// Rows of one ddpm step: x = 1 alone, x_0 = 1 alone, noise = 1 alone.
static int lib_unit_predict(void *self, df_ctx *k, const df_query *q, df_real *out) {
    (void)self, (void)k;
    for (int i = 0; i < q->n; i++) out[i] = (df_real)(i == 1);
    return 0;
}
static int lib_unit_noise(void *user, const df_noise_query *q, df_real *out) {
    (void)user;
    for (int i = 0; i < q->n; i++) out[i] = (df_real)(i == 2);
    return 0;
}

// guided-diffusion's posterior coefficients: what our ddpm does to unit rows.
static void lib_coefficients(const golden_case *c, const df_process *p) {
    static const char *const names[] = {"posterior_mean_coef2", "posterior_mean_coef1",
                                        "posterior_log_variance_clipped"};
    df_sample_desc d = df_sample_defaults();
    df_model m = df_model_defaults();
    double points[2], off = 0;
    if (golden_find(c, names[2]) == NULL) return;
    d.method = "ddpm";
    d.start = DF_START_GIVEN;
    d.points = points;
    d.points_count = 2;
    d.noise.fill = lib_unit_noise;
    m.process = *p;
    m.prediction = DF_X0;
    m.predict = lib_unit_predict;
    m.dim = 1;
    for (int i = 0; i < p->table_size; i++) {
        df_real x[3] = {1, 0, 0};
        points[0] = (i + 1) / (double)p->table_size;
        points[1] = i / (double)p->table_size;
        check(df_sample(ctx, &m, &d, x, 3) == DF_OK, "%s: %s", c->name,
              df_ctx_message(ctx));
        for (int k = 0; k < 3; k++) {
            double want = golden_find(c, names[k])->v[i];
            if (k == 2) want = i > 0 ? exp(.5 * want) : 0; // theirs draws none at i = 0
            off = fmax(off, fabs((double)x[k] - want));
        }
    }
    check(off < (DOUBLE_BUILD ? 1e-12 : 1e-6), "%s: coefficients off by %g", c->name, off);
}

// betas and abar of a schedule; those that are not kinds of ours from their abar(t).
static int lib_betas(const golden_case *c) {
    static const struct {
        const char *name;
        df_betas_kind kind;
    } kinds[] = {{"linear", DF_BETAS_LINEAR},
                 {"scaled_linear", DF_BETAS_SCALED_LINEAR},
                 {"cosine", DF_BETAS_COSINE},
                 {"squaredcos_cap_v2", DF_BETAS_COSINE},
                 {"sigmoid", DF_BETAS_SIGMOID}};
    static double betas[1000], abar[1000];
    const char *schedule = golden_text(c, "schedule");
    int T = (int)golden_number(c, "T", 0), known = 0;
    double scale = *schedule ? 1000.0 / T : 1; // guided-diffusion's
    df_process p;
    if (T < 1 || T > 1000) return 0;
    if (*schedule == 0) schedule = golden_text(c, "beta_schedule");
    for (int i = 0; i < 5; i++) {
        if (strcmp(schedule, kinds[i].name) != 0) continue;
        known = df_betas(ctx, kinds[i].kind, golden_number(c, "beta_start", scale * 1e-4),
                         golden_number(c, "beta_end", scale * .02), T, betas) == DF_OK;
    }
    for (int i = 0; !known && i < T; i++) {
        double f[2];
        for (int j = 0; j < 2; j++) {
            double t = (i + j) / (double)T, l = .5 * log(1 - 2 * fabs(.5 - t) + 1e-6);
            double snr = exp(t > .5 ? l : -l);
            f[j] = strcmp(schedule, "laplace") == 0 ? sqrt(snr / (1 + snr)) : exp(-12 * t);
        }
        betas[i] = fmin(1 - f[1] / f[0], .999);
    }
    lib_same(c, "betas", betas, T);
    if (golden_is(c, "rescale_betas_zero_snr", "1")) df_betas_zero_snr(ctx, T, betas);
    if (!check(df_process_table(ctx, betas, T, &p) == DF_OK, "%s: %s", c->name,
               df_ctx_message(ctx)))
        return 1;
    for (int i = 0; i < T; i++)
        abar[i] = pow(df_process_at(&p, (i + 1) / (double)T).alpha, 2);
    lib_same(c, "alphas_cumprod", abar, T);
    lib_coefficients(c, &p);
    return 1;
}

// sigma/alpha of our grids.
static int lib_sigmas(const golden_case *c) {
    static const char *const rules[][2] = {
        {"get_sigmas_karras", "karras"},
        {"get_sigmas_exponential", "lambda"},
        {"get_sigmas_polyexponential", "polyexponential"},
        {"get_sigmas_vp", "uniform"}};
    df_process p = df_process_edm(10000);
    df_sample_desc d = df_sample_defaults();
    df_point grid[32];
    double sigma[32];
    int N = (int)golden_number(c, "N", 0), count = 0;
    d.grid = lib_word(c, "function", rules, 4);
    if (d.grid == NULL || N < 1 || N > 30) return 0;
    d.grid_rho = golden_number(c, "rho", 0);
    d.t_max = golden_number(c, "sigma_max", 1) / 10000;
    d.t_min = golden_number(c, "sigma_min", 1) / 10000;
    d.steps = N;
    if (strcmp(d.grid, "uniform") == 0) { // VP's t from 1 to 1e-3, N points; then 0
        p = df_process_vp(.1, 20);
        d.t_max = 1;
        d.t_min = 1e-3;
        d.end = DF_END_T_MIN;
        d.steps = N - 1;
    }
    check(df_grid(ctx, &p, &d, grid, 32, &count) == DF_OK, "%s: %s", c->name,
          df_ctx_message(ctx));
    for (int i = 0; i < count; i++) sigma[i] = grid[i].sigma / grid[i].alpha;
    if (d.end == DF_END_T_MIN) sigma[count++] = 0;
    lib_same(c, "sigmas", sigma, count);
    return 1;
}

// guided-diffusion's respacing: each of its sections is our "linspace" of a table of its own;
// "ddimN" our "leading".
static int lib_respace(const golden_case *c) {
    static df_point grid[1001];
    static double betas[1000], index[1000];
    const char *counts = golden_text(c, "section_counts");
    int ddim = lib_starts(counts, "ddim"), T = (int)golden_number(c, "T", 0);
    int sections = 0, at = 0, n = 0;
    double count[8];
    char *rest = NULL;
    for (const char *text = counts + (ddim ? 4 : 0); sections < 8; text = rest) {
        count[sections] = strtod(text, &rest);
        if (rest == text) break;
        sections++;
    }
    if (T < 1 || T > 1000 || sections < 1) return 0;
    for (int i = 0; i < sections; i++) {
        int size = T / sections + (i < T % sections), got;
        df_process p;
        df_sample_desc d = df_sample_defaults();
        d.grid = ddim ? "leading" : "linspace";
        d.steps = (int)count[i];
        df_betas(ctx, DF_BETAS_LINEAR, 1e-4, .02, size, betas);
        if (!check(df_process_table(ctx, betas, size, &p) == DF_OK &&
                       df_grid(ctx, &p, &d, grid, 1001, &got) == DF_OK,
                   "%s: %s", c->name, df_ctx_message(ctx)))
            return 1;
        for (int j = got - 2; j >= 0; j--) index[n++] = at + rint(grid[j].t * size - 1);
        at += size;
    }
    lib_same(c, "timesteps", index, n);
    return 1;
}

// Fills the plan and plays the case; 0: not one of these.
static int golden_libraries(const golden_case *c, golden_plan *p) {
    const char *name = c->name;
    if (lib_starts(name, "kdiff/") || lib_starts(name, "cm/")) return lib_kdiffusion(c, p);
    if (lib_starts(name, "edm/")) return lib_edm(c, p);
    if (lib_starts(name, "dpmsolver/")) return lib_solver(c, p, 0);
    if (lib_starts(name, "unipc/")) return lib_solver(c, p, 1);
    if (lib_starts(name, "guided/")) return lib_guided(c, p);
    if (lib_starts(name, "grid/kdiff/")) return lib_sigmas(c);
    if (lib_starts(name, "schedule/")) return lib_betas(c);
    if (lib_starts(name, "respace/")) return lib_respace(c);
    if (golden_is(c, "function", "get_pc_sampler")) return lib_pc(c, p);
    if (golden_is(c, "function", "get_ode_sampler")) return lib_ode(c, p);
    return 0;
}
#endif
