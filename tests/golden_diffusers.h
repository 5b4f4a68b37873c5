// golden_diffusers.h: what diffusers' schedulers did, in our settings.
#ifndef DF_TEST_GOLDEN_DIFFUSERS_H
#define DF_TEST_GOLDEN_DIFFUSERS_H
#include "golden_play.h"

static inline int golden_on(const golden_case *c, const char *key) {
    return golden_is(c, key, "1");
}

// The model's own prediction. A float eps holds x_0 to 6e-8 sigma/alpha only: where that is
// no digit to compare, the float build is told x_0. (Not where eps is read elsewhere, in churn.)
static void golden_set_prediction(const golden_case *c, golden_plan *p) {
    const golden_array *calls = golden_find(c, "model_calls");
    const char *text = golden_text(c, "prediction");
    p->prediction = strcmp(text, "sample") == 0         ? DF_X0
                    : strcmp(text, "v_prediction") == 0 ? DF_V
                    : strcmp(text, "epsilon") == 0      ? DF_EPS
                                                        : DF_VELOCITY;
    if (!DOUBLE_BUILD && p->prediction == DF_EPS && calls && calls->v[1] < .1 * calls->v[2] &&
        golden_number(c, "step.s_churn", 0) <= 0)
        p->prediction = DF_X0;
}

// What is cut: x_0 by a constant, or by a quantile of each sample.
static void golden_set_cut(const golden_case *c, golden_plan *p) {
    if (golden_on(c, "config.thresholding")) {
        p->d.threshold = golden_number(c, "config.dynamic_thresholding_ratio", .995);
        p->d.threshold_max = golden_number(c, "config.sample_max_value", 1);
        p->d.threshold_min = fmin(1, p->d.threshold_max);
    } else if (golden_on(c, "config.clip_sample"))
        p->d.clip = golden_number(c, "config.clip_sample_range", 1);
}

// ---- tables of betas ----

// The betas: df_betas, or the kind that only diffusers has.
static int golden_betas(const golden_case *c, int T, double *betas) {
    const char *kind = golden_text(c, *golden_text(c, "T") ? "beta_schedule"
                                                           : "config.beta_schedule");
    double b0 = golden_number(c, "config.beta_start", golden_number(c, "beta_start", 0));
    double b1 = golden_number(c, "config.beta_end", golden_number(c, "beta_end", 0));
    if (strcmp(kind, "laplace") == 0) {
        double before = 1; // abar = snr/(1 + snr), whose root they call abar
        for (int i = 0; i <= T; i++) {
            double t = (double)i / T, u = t - .5, sign = u > 0 ? 1 : u < 0 ? -1 : 0;
            double snr = exp(.5 * sign * log(1 - 2 * fabs(u) + 1e-6)), now;
            now = sqrt(snr / (1 + snr));
            if (i > 0) betas[i - 1] = fmin(1 - now / before, .999);
            before = now;
        }
        return 1;
    }
    return df_betas(ctx,
                    strcmp(kind, "scaled_linear") == 0       ? DF_BETAS_SCALED_LINEAR
                    : strcmp(kind, "squaredcos_cap_v2") == 0 ? DF_BETAS_COSINE
                    : strcmp(kind, "sigmoid") == 0           ? DF_BETAS_SIGMOID
                                                             : DF_BETAS_LINEAR,
                    b0, b1, T, betas) == DF_OK;
}

// CogVideoX divides the signal to noise ratio of the whole table by s:
// abar' = abar/(s + (1 - s) abar).
static void golden_shift_betas(double s, int T, double *betas) {
    double abar = 1, before = 1;
    for (int i = 0; i < T; i++) {
        double now;
        abar *= 1 - betas[i];
        now = abar / (s + (1 - s) * abar);
        betas[i] = 1 - now / before;
        before = now;
    }
}

static int golden_set_table(const golden_case *c, golden_plan *p) {
    static double betas[1000];
    int T = (int)golden_number(c, "config.num_train_timesteps", golden_number(c, "T", 1000));
    if (T < 1 || T > 1000 || !golden_betas(c, T, betas)) return 0;
    golden_shift_betas(golden_number(c, "config.snr_shift_scale", 1), T, betas);
    if (golden_on(c, "config.rescale_betas_zero_snr")) df_betas_zero_snr(ctx, T, betas);
    if (df_process_table(ctx, betas, T, &p->process) != DF_OK) return 0;
    golden_set_prediction(c, p);
    golden_set_cut(c, p);
    return T;
}

// ---- schedulers with a list of sigma/alpha ----

// The list. Inner values named twice (Heun) are one point; a last value named twice is a
// step of no length, for which ours is as short as it may be.
static int golden_set_list(const golden_case *c, golden_plan *p) {
    const golden_array *s = golden_find(c, "sigmas");
    int flow = golden_is(c, "coords", "flow") || golden_on(c, "config.use_flow_sigmas"), n = 0;
    int last = s ? s->cols - 1 : 0;
    if (s == NULL || s->cols > GOLDEN_POINTS) return 0;
    p->d.inverse = s->v[0] < s->v[last]; // from the data: theirs rises
    p->process = flow                           ? df_process_flow()
                 : golden_is(c, "coords", "vp") ? df_process_cosine()
                                                : df_process_edm(10000);
    for (int i = 0; i <= last; i++) {
        double now = s->v[p->d.inverse ? last - i : i], before = n > 0 ? p->points[n - 1] : 0;
        if (n == 0 || now < before * (1 - 1e-13)) p->points[n++] = now;
        else if (i == last && now > 0) p->points[n++] = before * (1 - 4e-14);
    }
    golden_grid(p, n, flow ? DF_POINTS_T : DF_POINTS_RHO);
    golden_set_prediction(c, p);
    golden_set_cut(c, p);
    return 1;
}

// The grid rule of ours that means their list, if it ends at the data, or NULL.
static const char *golden_rule(const golden_case *c, const golden_plan *p) {
    const golden_array *s = golden_find(c, "sigmas");
    const char *schedule = golden_text(c, "config.sigma_schedule");
    if (s->v[s->cols - 1] > 0 || p->d.points_in != DF_POINTS_RHO || p->d.inverse) return NULL;
    if (golden_on(c, "config.use_karras_sigmas") || strcmp(schedule, "karras") == 0)
        return "karras";
    if (golden_on(c, "config.use_exponential_sigmas") || strcmp(schedule, "exponential") == 0)
        return "lambda";
    if (golden_is(c, "coords", "vp") && golden_is(c, "config.timestep_spacing", "trailing") &&
        !golden_on(c, "config.use_beta_sigmas") && !golden_on(c, "config.use_lu_lambdas") &&
        !golden_on(c, "config.rescale_betas_zero_snr")) // theirs then starts at 2^-24
        return "trailing";
    return NULL;
}

// Plays the list; then by the rule's name: on the table itself, or, where alpha is 1, between
// the list's ends.
static int golden_play_list(const golden_case *c, golden_plan *p) {
    static golden_plan own;
    own = *p;
    golden_run(c, p, 0);
    own.d.grid = golden_rule(c, p);
    if (own.d.grid == NULL) return 1;
    own.d.steps = p->d.points_count - 1;
    own.d.points_count = 0;
    if (golden_is(c, "coords", "vp")) {
        golden_set_table(c, &own);
    } else {
        own.d.t_max = df_process_at_rho(&own.process, p->points[0]).t;
        own.d.t_min = df_process_at_rho(&own.process, p->points[own.d.steps - 1]).t;
    }
    golden_run(c, &own, 0);
    return 1;
}

// Euler, Heun, KDPM2, LMS, DPMSolverSDE, EDMEuler.
static int golden_sigmas(const golden_case *c, golden_plan *p) {
    if (!golden_set_list(c, p)) return 0;
    p->d.churn = golden_number(c, "step.s_churn", 0);
    p->d.churn_min = golden_number(c, "step.s_tmin", 0);
    p->d.churn_max = golden_number(c, "step.s_tmax", HUGE_VAL);
    p->d.noise_scale = golden_number(c, "step.s_noise", 1);
    p->d.order = (int)golden_number(c, "step.order", 0);
    p->calls_per_step = strncmp(p->d.method, "dpm", 3) == 0 ? 2 : 1;
    if (p->d.churn > 0) p->d.compat |= DF_COMPAT_CHURN_LATE;
    if (strcmp(p->d.method, "dpmpp_sde") == 0) p->d.compat |= DF_COMPAT_STAGE_NOISE;
    if (golden_is(c, "class", "EDMEulerScheduler")) {
        p->process.sigma_data = golden_number(c, "config.sigma_data", .5);
        p->prediction = DF_EDM_F;
    }
    if (golden_is(c, "config.interpolation_type", "log_linear"))
        p->d.points_count--; // its 0 is never reached
    return golden_play_list(c, p);
}

// What the multistep and singlestep solvers share. lower_order_final acts below `few` steps.
// CosineDPMSolverMultistep has one type only, an SDE.
static int golden_set_solver(const golden_case *c, golden_plan *p, unsigned compat3, int few) {
    const char *type = golden_text(c, "config.algorithm_type");
    if (!golden_set_list(c, p)) return 0;
    p->d.order = (int)golden_number(c, "config.solver_order", 2);
    p->d.final = golden_on(c, "config.euler_at_final") ? DF_FINAL_EULER : DF_FINAL_KEEP;
    if (golden_on(c, "config.lower_order_final") && golden_number(c, "N", 0) < few)
        p->d.final = DF_FINAL_LOWER;
    if (strcmp(type, "deis") == 0) return 1;
    p->d.slope = golden_is(c, "config.solver_type", "heun") ? DF_SLOPE_EXACT : DF_SLOPE_BH2;
    if (*type && strstr(type, "++") == NULL) p->d.predicts = DF_EPS;
    if (p->d.order > 2) p->d.compat |= compat3;
    if (*type && strncmp(type, "sde", 3) != 0) return 1;
    p->d.eta = 1;
    p->d.eta_in = DF_ETA_FAMILY;
    if (p->d.order > 2) p->d.compat |= DF_COMPAT_SIGN_D2;
    return 1;
}
static int golden_multistep(const golden_case *c, golden_plan *p) {
    return golden_set_solver(c, p, DF_COMPAT_HALF_D2, 15) && golden_play_list(c, p);
}
static int golden_singlestep(const golden_case *c, golden_plan *p) {
    if (!golden_set_solver(c, p, DF_COMPAT_BLOCK_HALF, 1000)) return 0;
    p->d.compat |= DF_COMPAT_STAGE_NOISE;
    return golden_play_list(c, p);
}

// UniPC whose corrector leaves some steps alone: these go without, and what ours would have
// remembered for a corrector is put in its place.
static unsigned golden_uncorrected;
static df_next golden_unipc_stage(df_stage *s) {
    const df_sample_desc *desc = s->desc;
    df_sample_desc without = *desc;
    df_real *oldest;
    df_next next;
    if (s->step == 0 || !(golden_uncorrected >> (s->step - 1) & 1))
        return df_sampler_find(NULL, "unipc")->stage(s);
    without.corrector = 0;
    s->desc = &without;
    next = df_sampler_find(NULL, "unipc")->stage(s);
    s->desc = desc;
    oldest = s->answer; // order 2: one answer was kept, the other was handed back
    s->answer = s->buffer[1];
    s->buffer[1] = oldest;
    return next;
}

static int golden_unipc(const golden_case *c, golden_plan *p) {
    static df_sampler_row row;
    const char *off = golden_text(c, "config.disable_corrector");
    if (!golden_set_list(c, p)) return 0;
    golden_uncorrected = 0;
    for (; *off && strcmp(off, "none") != 0; off += strcspn(off, " "), off += *off == ' ')
        golden_uncorrected |= 1u << atoi(off);
    if (golden_uncorrected && golden_number(c, "config.solver_order", 2) != 2) return 0;
    row = *df_sampler_find(ctx, "unipc");
    row.stage = golden_unipc_stage;
    if (golden_uncorrected) p->d.row = &row;
    p->d.order = (int)golden_number(c, "config.solver_order", 2);
    p->d.slope = golden_is(c, "config.solver_type", "bh1") ? DF_SLOPE_BH1 : DF_SLOPE_BH2;
    if (golden_is(c, "config.predict_x0", "0")) p->d.predicts = DF_EPS;
    p->d.final = golden_on(c, "config.lower_order_final") ? DF_FINAL_LOWER : DF_FINAL_KEEP;
    return golden_play_list(c, p);
}

// tau is 1 at the times 200 .. 800: here, at the sigmas of those steps.
static int golden_sa(const golden_case *c, golden_plan *p) {
    const golden_array *t = golden_find(c, "timesteps"), *s = golden_find(c, "sigmas");
    if (t == NULL || !golden_set_list(c, p)) return 0;
    p->d.order = (int)golden_number(c, "config.predictor_order", 2);
    p->d.corrector = (int)golden_number(c, "config.corrector_order", 2);
    p->d.eta = 1;
    if (strstr(c->name, "tau0")) p->d.eta = 0;
    else if (strstr(c->name, "tau1") == NULL) {
        p->d.eta_min = HUGE_VAL;
        p->d.eta_max = 0;
        for (int i = 0; i < t->cols; i++) {
            if (t->v[i] < 200 || t->v[i] > 800) continue;
            p->d.eta_min = fmin(p->d.eta_min, s->v[i] * (1 - 1e-9));
            p->d.eta_max = fmax(p->d.eta_max, s->v[i] * (1 + 1e-9));
        }
        if (p->d.eta_max <= 0) p->d.eta = 0;
    }
    if (golden_is(c, "config.algorithm_type", "noise_prediction")) p->d.predicts = DF_EPS;
    p->d.final = golden_on(c, "config.lower_order_final") ? DF_FINAL_LOWER : DF_FINAL_KEEP;
    return golden_play_list(c, p);
}

// ---- schedulers that walk entries of the table ----

// Entries of the table, ending at `last`, an entry or -1, the data. Where that is the last
// one's own, their step has no length and ours hardly any.
static void golden_entries(golden_plan *p, int T, int N, const double *entry, double last) {
    for (int i = 0; i < N; i++) p->points[i] = (entry[i] + 1) / T;
    p->points[N] = (last + 1) / T;
    if (N > 0 && p->points[N] >= p->points[N - 1]) p->points[N] = p->points[N - 1] * (1 - 1e-12);
    golden_grid(p, N + 1, DF_POINTS_T);
}

// The same by the name of our rule, if the list is one of those.
static void golden_play_table(const golden_case *c, golden_plan *p) {
    static golden_plan own;
    static df_point grid[GOLDEN_POINTS];
    int count = 0, same = *golden_text(c, "config.timestep_spacing") != 0;
    own = *p;
    golden_run(c, p, 0);
    own.d.grid = golden_text(c, "config.timestep_spacing");
    own.d.grid_offset = (int)golden_number(c, "config.steps_offset", 0);
    own.d.points_count = 0;
    own.d.steps = p->d.points_count - 1;
    if (!same || df_grid(ctx, &own.process, &own.d, grid, GOLDEN_POINTS, &count) != DF_OK) return;
    same = count == p->d.points_count;
    for (int i = 0; i < count && same; i++)
        same = fabs(grid[i].t - own.points[i]) < 1e-12;
    if (same) golden_run(c, &own, 0);
}

static int golden_ddpm(const golden_case *c, golden_plan *p) {
    const golden_array *t = golden_find(c, "timesteps");
    const char *variance = golden_text(c, "config.variance_type");
    int T = golden_set_table(c, p);
    if (T == 0 || t == NULL) return 0;
    golden_entries(p, T, t->cols, t->v, -1);
    if (strcmp(variance, "fixed_large") == 0) p->d.variance = DF_VARIANCE_LARGE;
    if (strcmp(variance, "learned") == 0) p->learned = DF_LEARNED_VARIANCE;
    if (strcmp(variance, "learned_range") == 0) p->learned = DF_LEARNED_RANGE;
    if (t->v[t->cols - 1] > 0) p->d.compat |= DF_COMPAT_LAST_NOISE;
    golden_play_table(c, p);
    return 1;
}

// The step is T/N entries long, on the list or not.
static int golden_ddim(const golden_case *c, golden_plan *p) {
    const golden_array *t = golden_find(c, "timesteps");
    int T = golden_set_table(c, p), N = t ? t->cols : 0, gap, last;
    if (T == 0 || N < 1) return 0;
    gap = T / N;
    last = golden_on(c, "config.set_alpha_to_one") ? -1 : 0;
    if (t->v[N - 1] - gap >= 0) last = (int)t->v[N - 1] - gap;
    golden_entries(p, T, N, t->v, last);
    for (int i = 0; i + 1 < N; i++)
        if (t->v[i] - gap != t->v[i + 1]) p->d.compat |= DF_COMPAT_STEP_BACK;
    if (!golden_on(c, "step.use_clipped_model_output")) p->d.compat |= DF_COMPAT_KEEP_EPS;
    p->d.eta = golden_number(c, "step.eta", 0);
    golden_play_table(c, p);
    return 1;
}

// CogVideoXDPM: dpmpp_2m as an SDE on the shifted table. Its second draw in a step counts.
static int golden_cogvideox_dpm(const golden_case *c, golden_plan *p) {
    const golden_array *t = golden_find(c, "timesteps");
    int T = golden_set_table(c, p);
    if (T == 0 || t == NULL) return 0;
    golden_entries(p, T, t->cols, t->v, -1);
    p->d.eta = 1;
    p->d.eta_in = DF_ETA_FAMILY;
    p->d.final = DF_FINAL_KEEP;
    p->last_draw = 1;
    golden_play_table(c, p);
    return 1;
}

// From the data up: each of their steps begins T/N entries below its own time, the first at
// entry 0 if that is below all.
static int golden_ddim_inverse(const golden_case *c, golden_plan *p) {
    const golden_array *t = golden_find(c, "timesteps");
    int T = golden_set_table(c, p), N = t ? t->cols : 0;
    double entry[64];
    if (T == 0 || N < 1 || N > 64) return 0;
    for (int i = 0; i < N; i++) entry[i] = t->v[N - 1 - i];
    N -= entry[N - 1] <= 0; // a step of no length
    golden_entries(p, T, N, entry, fmax(t->v[0] - T / t->cols, 0));
    p->d.inverse = 1;
    golden_run(c, p, 0);
    return 1;
}

// PNDM adds up the model's own predictions and turns the sum into eps at the step's start: of
// v that is another method. As the weights' sum is 1, our step with slopes v becomes theirs
// by x_t -> alpha_s x_t + ((1 - alpha_s) alpha_t/alpha_s + alpha_t sigma_s d rho) x_s. And off
// the list (linspace), its second try at the first step goes T/N entries to the next point.
static int golden_pndm_gap;
static df_next golden_pndm_stage(df_stage *s) {
    const df_sampler_row *mine = s->row, *ours = df_sampler_find(NULL, mine->name);
    df_point a = s->from, b;
    df_real *kept = s->buffer[ours->buffers], *out;
    const df_real *in[2];
    double c[2];
    df_next next;
    if (s->call == 2 && s->step == 0 && golden_pndm_gap > 0) {
        s->to = s->grid[1];
        s->from = df_process_at(s->process,
                                s->to.t + (double)golden_pndm_gap / s->process->table_size);
    }
    if (s->call == 1) memcpy(kept, s->x, (size_t)s->n * (size_t)s->dim * sizeof *s->x);
    s->row = ours;
    next = ours->stage(s);
    s->row = mine;
    if (next == DF_NEXT_ASK && golden_pndm_gap > 0) return df_stage_ask(s, &s->grid[1], s->asked);
    if (mine->wants != DF_V) return next;
    b = next == DF_NEXT_ASK ? s->at : s->to;
    out = next == DF_NEXT_ASK ? s->buffer[3] : s->x;
    c[0] = a.alpha;
    c[1] = (1 - a.alpha) * b.alpha / a.alpha +
           b.alpha * a.sigma * (b.sigma / b.alpha - a.sigma / a.alpha);
    in[0] = out;
    in[1] = kept;
    df_stage_combine(s, out, 2, c, in);
    return next;
}

// The times they list name points that are asked about twice, and middles.
static int golden_pndm(const golden_case *c, golden_plan *p) {
    static df_sampler_row row;
    const golden_array *t = golden_find(c, "timesteps");
    int T = golden_set_table(c, p), N = (int)golden_number(c, "N", 0), n = 0, gap, last;
    int skip = golden_on(c, "config.skip_prk_steps");
    double entry[64] = {0};
    if (T == 0 || t == NULL || N < 1 || N > 64) return 0;
    gap = T / N;
    for (int i = 0; i < t->cols && n < 64; i++)
        if (skip ? i != 1 : i >= 12 || i % 4 == 0) entry[n++] = t->v[i];
    last = entry[n - 1] - gap < 0 ? 0 : (int)entry[n - 1] - gap;
    golden_entries(p, T, n, entry, last);
    for (int i = 0; i + 1 < n; i++)
        if (entry[i] - gap != entry[i + 1]) p->d.compat |= DF_COMPAT_STEP_BACK;
    p->d.method = skip ? "plms" : "pndm";
    golden_pndm_gap = p->d.compat & DF_COMPAT_STEP_BACK ? gap : 0;
    row = *df_sampler_find(ctx, p->d.method);
    row.stage = golden_pndm_stage;
    row.buffers++;
    if (p->prediction == DF_V) row.wants = DF_V;
    if (p->prediction == DF_V || golden_pndm_gap > 0) p->d.row = &row;
    golden_play_table(c, p);
    return 1;
}

// Luo et al. 2023's boundary scalings at the entry.
static void golden_lcm_scalings(const golden_plan *p, const df_query *q, int row,
                                double c[2]) {
    double t = (q->t[row] * p->process.table_size - 1) * p->skip_number;
    c[0] = .25 / (t * t + .25);
    c[1] = t / sqrt(t * t + .25);
}
static int golden_lcm(const golden_case *c, golden_plan *p) {
    const golden_array *t = golden_find(c, "timesteps");
    int T = golden_set_table(c, p);
    if (T == 0 || t == NULL) return 0;
    golden_entries(p, T, t->cols, t->v, -1);
    p->clip_x0 = p->d.clip;
    p->d.clip = 0;
    p->skip_out = golden_lcm_scalings;
    p->skip_number = golden_number(c, "config.timestep_scaling", 10);
    golden_run(c, p, 0);
    return 1;
}
static int golden_tcd(const golden_case *c, golden_plan *p) {
    const golden_array *t = golden_find(c, "timesteps");
    int T = golden_set_table(c, p);
    if (T == 0 || t == NULL) return 0;
    golden_entries(p, T, t->cols, t->v, 0);
    p->d.eta = golden_number(c, "step.eta", .3);
    golden_run(c, p, 0);
    return 1;
}

// RePaint: one step of ours at a time, coordinate 0 put back by `edit`, and between them
// their way up again, entry by entry. A step's one draw serves both parts.
static struct golden_paint {
    const golden_array *known, *noise, *t;
    int T, gap, draw;
} golden_paint;
static double golden_paint_noise(int i) {
    int size = 8 * golden_paint.noise->cols;
    return golden_paint.noise->v[golden_paint.draw * size + i];
}
static int golden_paint_draw(void *user, const df_noise_query *q, df_real *out) {
    (void)user;
    for (int i = 0; i < q->n * q->dim; i++) out[i] = (df_real)golden_paint_noise(i);
    return 0;
}
static int golden_paint_edit(void *user, const df_step_info *info, df_real *x) {
    (void)user;
    for (int i = 0; info->step > 0 && i < info->n * info->dim; i += info->dim)
        x[i] = (df_real)(info->at.alpha * golden_paint.known->v[i] +
                         info->at.sigma * golden_paint_noise(i));
    return 0;
}
static void golden_paint_rest(const golden_plan *p, const golden_case *c, df_real *x) {
    const golden_array *t = golden_paint.t;
    df_sample_desc d = p->d;
    d.noise.fill = golden_paint_draw;
    golden_paint.draw = 1;
    for (int k = 1; k < t->cols; k++) {
        double points[2];
        points[0] = (t->v[k] + 1) / golden_paint.T;
        points[1] = fmax(points[0] - (double)golden_paint.gap / golden_paint.T, 0);
        d.points = points;
        if (t->v[k] < t->v[k - 1]) {
            check(df_sample(ctx, &p->model, &d, x, 8) == DF_OK, "%s: %s", c->name,
                  df_ctx_message(ctx));
            golden_paint.draw++;
            continue;
        }
        for (int i = 0; i < golden_paint.gap; i++, golden_paint.draw++) {
            df_point q = df_process_at(&p->process, (t->v[k - 1] + i + 1) / golden_paint.T);
            df_point b = df_process_at(&p->process, (t->v[k - 1] + i) / golden_paint.T);
            double a = q.alpha / b.alpha;
            for (int j = 0; j < 8 * p->model.dim; j++)
                x[j] = (df_real)(a * (double)x[j] + sqrt(1 - a * a) * golden_paint_noise(j));
        }
    }
}
static int golden_repaint(const golden_case *c, golden_plan *p) {
    int T = golden_set_table(c, p), N = (int)golden_number(c, "N", 1);
    golden_paint.known = golden_find(c, "known");
    golden_paint.noise = golden_find(c, "noise");
    golden_paint.t = golden_find(c, "timesteps");
    golden_paint.T = T;
    golden_paint.gap = T / N;
    golden_paint.draw = 0;
    if (T == 0 || golden_paint.t == NULL || golden_paint.noise == NULL) return 0;
    golden_entries(p, T, 1, golden_paint.t->v, golden_paint.t->v[0] - T / N);
    p->d.eta = golden_number(c, "eta", 0);
    p->d.edit = golden_paint_edit;
    p->finish = golden_paint_rest;
    golden_run(c, p, 0);
    return 1;
}

// ---- flows, consistency models and others ----

// Flow matching: sigma is t. Heun walks t, as its slope is the velocity.
static int golden_flow(const golden_case *c, golden_plan *p) {
    static golden_plan own;
    double shift = golden_number(c, "config.shift", golden_number(c, "shift", 1));
    if (!golden_set_list(c, p)) return 0;
    if (golden_on(c, "config.stochastic_sampling")) p->d.method = "consistency";
    if (golden_is(c, "class", "LTXEulerAncestralRFScheduler")) {
        p->d.eta = golden_number(c, "config.eta", golden_number(c, "eta", 1));
        p->d.eta_in = DF_ETA_STRAIGHT;
        p->d.noise_scale = golden_number(c, "config.s_noise", golden_number(c, "s_noise", 1));
    }
    own = *p;
    golden_run(c, p, 0);
    if (strstr(c->name, "FlowMap") || strstr(c->name, "MiniMax")) { // t uniform, then shifted
        own.d.steps = own.d.points_count - 1;
        own.d.points_count = 0;
        own.d.grid = "uniform";
        own.d.shift = shift;
        golden_run(c, &own, 0);
    }
    return 1;
}

// Their F is such that c_skip x + c_out F is the posterior mean.
static void golden_whole_x0(const golden_plan *p, const df_query *q, int row, double c[2]) {
    (void)p, (void)q, (void)row;
    c[0] = 0;
    c[1] = 1;
}
static int golden_consistency(const golden_case *c, golden_plan *p) {
    if (!golden_set_list(c, p)) return 0;
    p->skip_out = golden_whole_x0;
    p->clip_map = golden_on(c, "config.clip_denoised") ? 1 : 0;
    golden_run(c, p, 0);
    return 1;
}

// Angles; the first one is 1.57080, a little more than pi/2.
static int golden_scm(const golden_case *c, golden_plan *p) {
    const golden_array *t = golden_find(c, "timesteps");
    if (t == NULL) return 0;
    p->process = df_process_trig(golden_number(c, "config.sigma_data", .5));
    p->prediction = DF_V;
    for (int i = 0; i < t->cols; i++) p->points[i] = fmin(2 * t->v[i] / 3.14159265358979323846, 1);
    golden_grid(p, t->cols, DF_POINTS_T);
    p->skip_out = golden_whole_x0;
    p->at_calls = 1;
    golden_run(c, p, 0);
    return 1;
}

// The model is asked at sigmas a little off the steps' own.
static int golden_score_sde_ve(const golden_case *c, golden_plan *p) {
    const golden_array *s = golden_find(c, "discrete_sigmas");
    if (s == NULL) return 0;
    for (int i = 0; i < s->cols; i++) p->points[i] = s->v[s->cols - 1 - i];
    p->points[s->cols] = 0;
    golden_grid(p, s->cols + 1, DF_POINTS_RHO);
    p->prediction = DF_SCORE;
    p->at_calls = 1;
    p->d.corrections = (int)golden_number(c, "correct_steps", 1);
    p->d.snr = golden_number(c, "snr", .15);
    p->d.compat = DF_COMPAT_NORM_BATCH;
    golden_run(c, p, 0);
    return 1;
}

// IPNDM begins where alpha = 0, and takes x_0 = 0 there: a step before our method's own.
static df_next golden_ipndm_stage(df_stage *s) {
    double c = s->to.sigma;
    df_real *eps = s->answer;
    const df_real *a = eps;
    if (s->from.alpha > 0) return df_sampler_find(NULL, "ipndm")->stage(s);
    df_stage_combine(s, s->x, 1, &c, &a);
    s->answer = s->buffer[0];
    s->buffer[0] = eps;
    return DF_NEXT_STEP;
}
static int golden_ipndm(const golden_case *c, golden_plan *p) {
    static df_sampler_row row;
    int N = (int)golden_number(c, "N", 1);
    row = *df_sampler_find(ctx, "ipndm");
    row.stage = golden_ipndm_stage;
    row.from_alpha0 = 1;
    p->process = df_process_cosine();
    p->prediction = DF_V;
    for (int i = 0; i <= N; i++) { // sin^2 of equal angles is their sigma
        double sigma = pow(sin((N - i) * 3.14159265358979323846 / 2 / N), 2);
        p->points[i] = i > 0 ? sigma / sqrt(1 - sigma * sigma) : HUGE_VAL;
    }
    golden_grid(p, N + 1, DF_POINTS_RHO);
    p->d.row = &row;
    golden_run(c, p, 0);
    return 1;
}

typedef struct golden_scheduler {
    const char *name, *method;
    int (*map)(const golden_case *c, golden_plan *p);
} golden_scheduler;
static const golden_scheduler golden_schedulers[] = {
    {"EulerDiscrete", "euler", golden_sigmas},
    {"EulerAncestralDiscrete", "euler_ancestral", golden_sigmas},
    {"HeunDiscrete", "heun", golden_sigmas},
    {"KDPM2Discrete", "dpm_2", golden_sigmas},
    {"KDPM2AncestralDiscrete", "dpm_2_ancestral", golden_sigmas},
    {"LMSDiscrete", "lms", golden_sigmas},
    {"DPMSolverSDE", "dpmpp_sde", golden_sigmas},
    {"EDMEuler", "euler", golden_sigmas},
    {"DPMSolverMultistep", "dpmpp_2m", golden_multistep},
    {"EDMDPMSolverMultistep", "dpmpp_2m", golden_multistep},
    {"CosineDPMSolverMultistep", "dpmpp_2m", golden_multistep},
    {"DPMSolverSinglestep", "dpmpp_2s", golden_singlestep},
    {"DEISMultistep", "deis", golden_multistep},
    {"UniPCMultistep", "unipc", golden_unipc},
    {"SASolver", "sa_solver", golden_sa},
    {"DDPM", "ddpm", golden_ddpm},
    {"UnCLIP", "ddpm", golden_ddpm},
    {"DDIM", "ddim", golden_ddim},
    {"CogVideoXDDIM", "ddim", golden_ddim},
    {"CogVideoXDPM", "dpmpp_2m", golden_cogvideox_dpm},
    {"DPMSolverMultistepInverse", "dpmpp_2m", golden_multistep},
    {"DDIMInverse", "ddim", golden_ddim_inverse},
    {"PNDM", "plms", golden_pndm},
    {"LCM", "consistency", golden_lcm},
    {"TCD", "tcd", golden_tcd},
    {"RePaint", "ddim", golden_repaint},
    {"FlowMatchEulerDiscrete", "euler", golden_flow},
    {"FlowMatchHeunDiscrete", "heun_t", golden_flow},
    {"FlowMatchLCM", "consistency", golden_flow},
    {"FlowMapEulerDiscrete", "flow_map", golden_flow},
    {"LTXEulerAncestralRF", "euler_ancestral", golden_flow},
    {"MiniMaxH3", "euler", golden_flow},
    {"CMStochasticIterative", "consistency", golden_consistency},
    {"SCM", "consistency", golden_scm},
    {"ScoreSdeVe", "reverse_diffusion", golden_score_sde_ve},
    {"IPNDM", "ipndm", golden_ipndm},
};

// Fills the plan and plays the case; 0: not one of diffusers'.
static int golden_diffusers(const golden_case *c, golden_plan *p) {
    const char *name = golden_text(c, "class"), *end = strstr(name, "Scheduler");
    size_t length = end ? (size_t)(end - name) : strlen(name);
    if (strncmp(c->name, "diffusers/", 10) != 0) return 0;
    for (size_t i = 0; i < sizeof golden_schedulers / sizeof golden_schedulers[0]; i++) {
        const golden_scheduler *s = &golden_schedulers[i];
        if (strlen(s->name) != length || strncmp(s->name, name, length) != 0) continue;
        p->d.method = s->method;
        return s->map(c, p);
    }
    return 0;
}
#endif
