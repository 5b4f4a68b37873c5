// golden_checkpoints.h: recorded checkpoints of UNet2DModel and DiT. Each folder is loaded, run,
// differentiated and written again; sampling loops and short trainings are repeated. Tolerances
// are those of the recordings' README, relative to the largest number s of an array.
#ifndef DF_TEST_GOLDEN_CHECKPOINTS_H
#define DF_TEST_GOLDEN_CHECKPOINTS_H
#include "golden_nets.h"

static int nets_cases;

static const char *nets_root(void) {
    const char *golden = getenv("GOLDEN");
    return golden && golden[0] ? golden : "tests/golden";
}
static inline double nets_largest(const nets_array *a) {
    double s = 0;
    for (long i = 0; i < a->size; i++) s = fmax(s, fabs(a->v[i]));
    return s;
}
static inline df_tensor *nets_tensor(const nets_array *a) {
    df_tensor *x = df_tensor_new(ctx, a->ndim, a->shape);
    for (long i = 0; x && i < a->size; i++) x->data[i] = (df_real)a->v[i];
    return x;
}
// The array of this name, in float64 where that was recorded.
static inline const nets_array *nets_best(const nets_case *c, const char *name) {
    char full[160];
    snprintf(full, sizeof full, "%s_f64", name);
    return nets_find(c, full) ? nets_find(c, full) : nets_find(c, name);
}
// Largest |got - a| over the first `size` numbers.
static inline double nets_off(const nets_array *a, const df_real *got, long size) {
    double off = 0;
    for (long i = 0; i < size; i++) {
        off = fmax(off, fabs((double)got[i] - a->v[i]));
        if (!(off < HUGE_VAL)) return HUGE_VAL;
    }
    return off;
}
static inline void nets_near(const nets_case *c, const nets_array *a, const df_real *got,
                             double tolerance) {
    double s = nets_largest(a), off = nets_off(a, got, a->size);
    check(off <= tolerance * s, "%s: %s is off by %g of %g", c->name, a->name, off, s);
}

// The recording of a case, and its folder; NULL if there is none.
static FILE *nets_recording(const char *kind, const char *name, char folder[300]) {
    char path[400];
    snprintf(folder, 300, "%s/nets/%s/%s", nets_root(), kind, name);
    snprintf(path, sizeof path, "%s/golden.txt", folder);
    df_ctx_clear(ctx);
    return fopen(path, "r");
}

// ---- a network's outputs, stages and gradients ----

// Zero in exact arithmetic, so rounding noise: a key's bias, and one that a norm with one channel
// a group removes again.
static inline int nets_noise(const char *name, double l2, double most) {
    return strstr(name, "to_k.bias") || strstr(name, "key.bias") || strstr(name, "qkv.bias") ||
           (strstr(name, "conv1.bias") && l2 < 1e-4 * most);
}
// Gradients of every parameter: those recorded whole, and all by their norm and sum.
static void nets_gradients(const nets_case *c, const df_net *net, const df_real *grads) {
    double most = 0;
    for (size_t i = 0; i < df_net_size(net); i++) most = fmax(most, fabs((double)grads[i]));
    for (int k = 0; k < df_net_count(net); k++) {
        const df_param *p = df_net_param(net, k);
        const df_real *g = grads + p->offset;
        char key[160], old[128];
        double sum = 0, square = 0, l2, want;
        snprintf(old, sizeof old, "grad:%s", p->name);
        const nets_array *whole = nets_best(c, old);
        if (whole) {
            double s = nets_noise(p->name, nets_largest(whole), most) ? most : nets_largest(whole);
            double off = nets_off(whole, g, whole->size);
            check(off <= 2e-4 * s, "%s: %s is off by %g of %g", c->name, old, off, s);
        }
        snprintf(key, sizeof key, "gradstat:%s", p->name);
        const char *text = nets_text(c, key);
        if (sscanf(text, "%lf %lf", &l2, &want) != 2) continue;
        for (size_t i = 0; i < p->size; i++) sum += (double)g[i], square += (double)g[i] * (double)g[i];
        double room = nets_noise(p->name, l2, most) ? 2e-4 * most * sqrt((double)p->size) : 2e-4 * l2;
        check(fabs(sqrt(square) - l2) <= room, "%s: %s: norm %g, wanted %g", c->name, key,
              sqrt(square), l2);
        check(fabs(sum - want) <= room * sqrt((double)p->size), "%s: %s: sum %g, wanted %g", c->name,
              key, sum, want);
    }
}

// Each stage's numbers, of the first sample, stand somewhere on the tape.
static void nets_stages(const nets_case *c, const df_tensor *last) {
    for (int k = 0; k < c->arrays; k++) {
        const nets_array *a = &c->array[k];
        double best = HUGE_VAL, s = nets_largest(a);
        if (strncmp(a->name, "stage:", 6) != 0) continue;
        // there the features of labels, which are no tensors of ours, were recorded last
        if (strcmp(c->name, "class_timestep") == 0 && strstr(a->name, "time_proj")) continue;
        for (const df_tensor *y = last; y; y = y->before)
            if ((long)y->size >= a->size && y->shape[0] * a->size == (long)y->size * a->shape[0])
                best = fmin(best, nets_off(a, y->data, a->size));
        check(best <= 2e-5 * s, "%s: %s: nothing on the tape is nearer than %g of %g", c->name,
              a->name, best, s);
    }
}

// One forward and backward pass against a recording.
static void nets_pass(const nets_case *c, df_net *net) {
    const nets_array *x = nets_find(c, "x"), *t = nets_find(c, "timesteps"), *r = nets_find(c, "r");
    const nets_array *l = nets_find(c, "class_labels"), *y = nets_best(c, "output");
    int labels[64], n;
    df_run run = df_run_defaults(ctx, net);
    if (!check(x && t && y && x->shape[0] <= 64, "%s: arrays are missing", c->name)) return;
    n = x->shape[0];
    for (int i = 0; i < n; i++) labels[i] = l ? (int)l->v[i] : -1;
    run.grads = (df_real *)calloc(df_net_size(net), sizeof(df_real));
    df_record_begin(ctx);
    df_tensor *in = df_tensor_need_grad(ctx, nets_tensor(x));
    df_tensor *time = df_tensor_need_grad(ctx, nets_tensor(t)); // so its features are on the tape
    df_tensor *out = df_run_net(&run, in, time, l ? labels : NULL);
    if (check(out != NULL, "%s: %s", c->name, df_ctx_message(ctx))) {
        nets_near(c, y, out->data, 2e-5);
        nets_stages(c, out);
        if (r && nets_best(c, "grad_x")) {
            df_backward(ctx, df_sum(ctx, df_mul(ctx, out, nets_tensor(r))));
            nets_near(c, nets_best(c, "grad_x"), in->grad, 2e-4);
            nets_gradients(c, net, run.grads);
        }
    }
    df_record_end(ctx);
    df_ctx_clear(ctx);
    free(run.grads);
}

// forward_with_cfg: rows of the first half, once with their labels, once without.
static void nets_guided(const nets_case *c, df_net *net) {
    const nets_array *x = nets_find(c, "x"), *t = nets_find(c, "timesteps");
    const nets_array *l = nets_find(c, "class_labels"), *y = nets_best(c, "output");
    df_model model = df_net_model(net);
    df_guidance guidance = df_guidance_defaults();
    guidance.model = &model, guidance.scale = nets_number(c, "cfg_scale", 1);
    int n = x->shape[0] / 2, labels[32], dim = df_net_dim(net);
    double time[32];
    df_real *in = (df_real *)calloc((size_t)x->size, sizeof *in);
    df_real *out = (df_real *)calloc((size_t)y->size, sizeof *out);
    guidance.guided = 3 * x->shape[2] * x->shape[3];
    df_model guided = df_guidance_model(&guidance);
    for (int i = 0; i < n; i++) {
        labels[i] = (int)l->v[i];
        time[i] = (t->v[i] + 1) / df_net_card(net)->process.table_size;
    }
    for (int i = 0; i < n * dim; i++) in[i] = (df_real)x->v[i];
    int fine = df_model_ask(ctx, &guided, DF_ASK_PREDICT, time, n, in, NULL, labels, out) == DF_OK;
    if (check(fine, "%s: %s", c->name, df_ctx_message(ctx))) {
        double off = nets_off(y, out, y->size / 2), s = nets_largest(y);
        check(off <= 2e-5 * s, "%s: output is off by %g of %g", c->name, off, s);
    }
    free(in);
    free(out);
}

// ---- written and read again ----

static char *nets_slurp(const char *folder, const char *file) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    FILE *f = fopen(path, "rb");
    char *text = (char *)calloc(1, 1 << 20);
    if (f) text[fread(text, 1, (1 << 20) - 1, f)] = 0;
    if (f) fclose(f);
    return text;
}
// JSON without blanks, numbers as numbers: what two writers of one object agree on.
static void nets_squeeze(char *text) {
    char *out = text;
    for (char *in = text; *in;) {
        char *end;
        int quoted = out > text && (out[-1] == ':' || out[-1] == '[' || out[-1] == ',');
        double v = quoted && strchr("-0123456789", *in) ? strtod(in, &end) : (end = in, 0.0);
        if (end > in) out += sprintf(out, "%.9g", v), in = end;
        else if (strchr(" \n\r\t", *in)) in++;
        else *out++ = *in++;
    }
    *out = 0;
}

// The folder that we write has the peer's keys, shapes and configuration; read again, it is the
// same network.
static void nets_round(const char *name, const char *folder, const char *file, df_net *net) {
    char out[64], path[512];
    snprintf(out, sizeof out, "build/golden_%s_%d", df_net_kind(net), DOUBLE_BUILD);
    if (!check(df_net_save_folder(ctx, net, out) == DF_OK, "%s: %s", name, df_ctx_message(ctx)))
        return;
    char *mine = nets_slurp(out, "config.json"), *theirs = nets_slurp(folder, "config.json");
    nets_squeeze(mine), nets_squeeze(theirs);
    check(strcmp(mine, theirs) == 0, "%s: config.json differs:\n%s\n%s", name, mine, theirs);
    free(mine), free(theirs);
    df_net *again = df_net_load_folder(ctx, out);
    check(again && df_net_size(again) == df_net_size(net) &&
          memcmp(df_net_weights(again), df_net_weights(net), df_net_size(net) * sizeof(df_real)) == 0,
          "%s: another network after writing and reading", name);
    df_net_free(again);
    snprintf(path, sizeof path, "%s/%s", folder, file);
    df_safetensors *a = df_safetensors_open(ctx, df_source_path(path));
    snprintf(path, sizeof path, "%s/%s", out, file);
    df_safetensors *b = df_safetensors_open(ctx, df_source_path(path));
    check(a && b && df_safetensors_count(a) == df_safetensors_count(b), "%s: other tensors", name);
    for (int i = 0; a && b && i < df_safetensors_count(a); i++) {
        const df_file_tensor *t = df_safetensors_at(a, i), *u = df_safetensors_find(b, t->name);
        int old = strstr(name, "legacy") != NULL; // is written with today's names
        check(old || (u && u->ndim == t->ndim &&
                      memcmp(u->shape, t->shape, (size_t)t->ndim * sizeof *t->shape) == 0),
              "%s: %s is not written as it was", name, t->name);
    }
    df_safetensors_close(a);
    df_safetensors_close(b);
}

static void nets_folder(const char *kind, const char *name) {
    static nets_case c;
    char folder[300];
    const char *file = strcmp(kind, "unet") == 0 ? "diffusion_pytorch_model.safetensors"
                                                 : "model.safetensors";
    FILE *f = nets_recording(kind, name, folder);
    if (f == NULL) return;
    df_net *net = df_net_load_folder(ctx, folder);
    if (check(net != NULL, "%s: %s", name, df_ctx_message(ctx))) {
        while (nets_read(f, &c)) {
            if (nets_text(&c, "cfg_scale")[0]) nets_guided(&c, net);
            else nets_pass(&c, net);
            nets_free(&c);
            nets_cases++;
        }
        nets_round(name, folder, file, net);
    }
    df_net_free(net);
    fclose(f);
}

// ---- sampling loops ----

typedef struct nets_noise_source { const nets_case *c; } nets_noise_source;
static int nets_draw(void *user, const df_noise_query *q, df_real *out) {
    char name[32];
    snprintf(name, sizeof name, "noise:%d", q->step);
    const nets_array *a = nets_find(((nets_noise_source *)user)->c, name);
    if (a == NULL || a->size < (long)q->n * q->dim) return 77;
    for (long i = 0; i < (long)q->n * q->dim; i++) out[i] = (df_real)a->v[i];
    return 0;
}

// The network that a recording names; its scheduler's configuration, if there is one.
static df_net *nets_named(const nets_case *c, const char *folder) {
    char path[3][700];
    snprintf(path[0], sizeof path[0], "%s/%s", folder, nets_text(c, "config"));
    snprintf(path[1], sizeof path[1], "%s/%s", folder, nets_text(c, "weights"));
    snprintf(path[2], sizeof path[2], "%s/%s", folder, nets_text(c, "scheduler_config"));
    df_source scheduler = df_source_path(path[2]);
    df_net *net = df_net_load_config(ctx, df_source_path(path[0]), df_source_path(path[1]),
                                     nets_text(c, "scheduler_config")[0] ? &scheduler : NULL);
    check(net != NULL, "%s: %s", c->name, df_ctx_message(ctx));
    return net;
}

// A recording of one case, and its network; NULL if there is none, or it cannot be read.
static df_net *nets_begin(const char *kind, const char *name, nets_case *c, char folder[300]) {
    FILE *f = nets_recording(kind, name, folder);
    if (f == NULL) return NULL;
    int fine = check(nets_read(f, c), "%s cannot be read", folder);
    fclose(f);
    df_net *net = fine ? nets_named(c, folder) : NULL;
    nets_cases += net != NULL;
    return net;
}

// What the recording's keys and its scheduler's configuration say.
static void nets_settings(const nets_case *c, const char *folder, const df_net *net,
                          df_sample_desc *d, double *points) {
    const nets_array *t = nets_find(c, "timesteps");
    double T = df_net_card(net)->process.table_size;
    char *config = nets_slurp(folder, nets_text(c, "scheduler_config"));
    nets_squeeze(config);
    d->steps = (int)t->size;
    for (int i = 0; i < d->steps; i++) points[i] = (t->v[i] + 1) / T;
    points[d->steps] = strstr(config, "\"set_alpha_to_one\":false") ? 1 / T : 0;
    d->points = points, d->points_count = d->steps + 1, d->points_in = DF_POINTS_T;
    d->end = points[d->steps] > 0 ? DF_END_T_MIN : DF_END_DATA;
    d->method = strcmp(nets_text(c, "sampler"), "ddpm") == 0 ? "ddpm" : "ddim";
    d->eta = strcmp(d->method, "ddim") == 0 ? nets_number(c, "eta", 0) : -1;
    d->clip = strstr(config, "\"clip_sample\":true") || nets_number(c, "clip_denoised", 0) > 0;
    if (strstr(config, "\"clip_sample\":true")) d->compat = DF_COMPAT_KEEP_EPS;
    free(config);
}

static void nets_sample(const char *name) {
    static nets_case c;
    char folder[300];
    double points[64];
    df_real *x, *path_x;
    nets_noise_source source = {&c};
    df_net *net = nets_begin("sample", name, &c, folder);
    if (net == NULL) return;
    const nets_array *first = nets_find(&c, "x_T"), *l = nets_find(&c, "class_labels");
    // with guidance the second half of all rows only serves the peer's way to compute it
    int n = first->shape[0] / (nets_number(&c, "cfg_scale", 0) > 0 ? 2 : 1);
    int dim = df_net_dim(net), labels[32];
    df_sample_desc d = df_sample_defaults();
    df_model plain = df_net_model(net), model = plain;
    df_guidance guidance = df_guidance_defaults();
    guidance.model = &plain, guidance.scale = nets_number(&c, "cfg_scale", 0);
    guidance.guided = 3 * first->shape[3] * first->shape[2];
    if (guidance.scale > 0) model = df_guidance_model(&guidance);
    nets_settings(&c, folder, net, &d, points);
    for (int i = 0; i < n && l; i++) labels[i] = (int)l->v[i];
    d.labels = l ? labels : NULL;
    d.start = DF_START_GIVEN;
    d.noise.fill = nets_draw, d.noise.user = &source;
    x = (df_real *)calloc((size_t)(n * dim), sizeof *x);
    path_x = (df_real *)calloc((size_t)((d.steps + 1) * n * dim), sizeof *path_x);
    d.trajectory = path_x;
    for (int i = 0; i < n * dim; i++) x[i] = (df_real)first->v[i];
    double room = fmax(10 * nets_number(&c, "max_diff_f32_f64", 0),
                       2e-5 * nets_number(&c, "max_abs_sample", 1));
    if (check(df_sample(ctx, &model, &d, x, n) == DF_OK, "%s: %s", name, df_ctx_message(ctx))) {
        for (int k = 1; k <= d.steps; k++) {
            char key[32];
            snprintf(key, sizeof key, "x:%d", k);
            const nets_array *a = nets_find(&c, key);
            double off = a ? nets_off(a, path_x + (long)k * n * dim, (long)n * dim) : HUGE_VAL;
            check(off <= room, "%s: %s is off by %g, room %g", name, key, off, room);
        }
        double off = nets_off(nets_find(&c, "final_f64"), x, (long)n * dim);
        check(off <= room, "%s: the end is off by %g, room %g", name, off, room);
    }
    free(x), free(path_x);
    df_net_free(net);
    nets_free(&c);
}

// ---- training ----

typedef struct nets_training {
    df_real *grads, *m, *v, *average;
} nets_training;

// Optimiser and average over what is trained: frozen tables lie in between.
static void nets_update(const nets_case *c, df_net *net, nets_training *s, int step, double factor) {
    df_adamw a = {nets_number(c, "lr", 0), nets_number(c, "beta1", 0), nets_number(c, "beta2", 0),
                  nets_number(c, "eps", 0), nets_number(c, "weight_decay", 0)};
    df_real *w = df_net_weights(net);
    for (int k = 0; k < df_net_count(net); k++) {
        const df_param *p = df_net_param(net, k);
        size_t o = p->offset;
        if (p->frozen) continue;
        df_adamw_step(ctx, &a, step, p->size, w + o, s->m + o, s->v + o, s->grads + o, factor);
        df_ema_step(ctx, p->size, s->average + o, w + o, nets_number(c, "ema_decay", 0));
    }
}

static double nets_loss(const nets_case *c, df_net *net, df_real *grads, int step) {
    const nets_array *data = nets_find(c, "data"), *index = nets_find(c, "index");
    const nets_array *noise = nets_find(c, "noise"), *t = nets_find(c, "timesteps");
    const nets_array *abar = nets_find(c, "alphas_cumprod_at_timesteps");
    const nets_array *l = nets_find(c, "class_labels");
    int n = index->shape[1], dim = df_net_dim(net), labels[32];
    df_run run = df_run_defaults(ctx, net);
    run.weights = df_net_weights(net), run.grads = grads;
    df_record_begin(ctx);
    df_tensor *x = df_tensor_new(ctx, noise->ndim - 1, noise->shape + 1);
    df_tensor *eps = df_tensor_new(ctx, noise->ndim - 1, noise->shape + 1);
    df_tensor *time = df_tensor_new(ctx, 1, &n);
    for (int r = 0; time && r < n; r++) {
        int k = step * n + r;
        double a = sqrt(abar->v[k]), b = sqrt(1 - abar->v[k]);
        labels[r] = l ? (int)l->v[k] : -1;
        time->data[r] = (df_real)t->v[k];
        for (int i = 0; i < dim; i++) {
            double e = noise->v[(long)k * dim + i], x0 = data->v[(long)index->v[k] * dim + i];
            eps->data[r * dim + i] = (df_real)e;
            x->data[r * dim + i] = (df_real)(a * x0 + b * e);
        }
    }
    df_tensor *loss = df_mse(ctx, df_run_net(&run, x, time, l ? labels : NULL), eps);
    double value = loss ? (double)loss->data[0] : HUGE_VAL;
    check(df_backward(ctx, loss) == DF_OK, "%s: %s", c->name, df_ctx_message(ctx));
    df_record_end(ctx);
    return value;
}

static void nets_train(const char *name) {
    static nets_case c;
    char folder[300], key[160];
    nets_training s;
    df_net *net = nets_begin("train", name, &c, folder);
    if (net == NULL) return;
    size_t size = df_net_size(net);
    s.grads = (df_real *)calloc(4 * size, sizeof(df_real));
    s.m = s.grads + size, s.v = s.m + size, s.average = s.v + size;
    memcpy(s.average, df_net_weights(net), size * sizeof(df_real));
    for (int step = 0; step < (int)nets_number(&c, "steps", 0); step++) {
        double norm;
        memset(s.grads, 0, size * sizeof(df_real));
        double loss = nets_loss(&c, net, s.grads, step);
        double factor = df_clip_factor(ctx, size, s.grads, nets_number(&c, "max_grad_norm", 0), &norm);
        near_rel(loss, nets_best(&c, "losses")->v[step], 2e-5);
        near_rel(norm, nets_best(&c, "grad_norms")->v[step], 2e-4);
        nets_update(&c, net, &s, step + 1, factor);
    }
    int found = 0;
    for (int k = 0; k < df_net_count(net); k++) {
        const df_param *p = df_net_param(net, k);
        snprintf(key, sizeof key, "final:%s", p->name);
        const nets_array *a = nets_find(&c, key);
        found += a != NULL;
        snprintf(key, sizeof key, "final_f64:%s", p->name);
        if (nets_find(&c, key)) a = nets_find(&c, key);
        double off = a ? nets_off(a, df_net_weights(net) + p->offset, a->size) : 0;
        check(off <= 5e-5, "%s: %s is off by %g", name, key, off);
        snprintf(key, sizeof key, "ema:%s", p->name);
        a = nets_find(&c, key);
        found += a != NULL;
        off = a ? nets_off(a, s.average + p->offset, a->size) : 0;
        check(off <= 5e-5, "%s: %s is off by %g", name, key, off);
    }
    check(found == 6, "%s: %d of five final parameters and one average", name, found);
    free(s.grads);
    df_net_free(net);
    nets_free(&c);
}

// ---- torch's generators ----

static double nets_double(df_torch_random *random) {
    uint64_t high = df_torch_bits(random), low = df_torch_bits(random);
    return (double)((high << 32 | low) & ((UINT64_C(1) << 53) - 1)) / 9007199254740992.0;
}
// randn of 16 or more float64: Box & Muller on (j, j + 8) of each 16, the last 16 drawn anew where
// they are not whole.
static void nets_normal_double(df_torch_random *g, int n, double *x) {
    for (int i = 0; i < n; i++) x[i] = nets_double(g);
    for (int at = 0; at < n; at += 16) {
        if (at + 16 > n) {
            at = n - 16;
            for (int i = at; i < n; i++) x[i] = nets_double(g);
        }
        for (int j = at; j < at + 8; j++) {
            double radius = sqrt(-2 * log(1 - x[j])), angle = 6.283185307179586 * x[j + 8];
            x[j] = radius * cos(angle), x[j + 8] = radius * sin(angle);
        }
    }
}
// One case: each array begins anew from the seed. In either build randn is that of float32.
static void nets_generators(const nets_case *c) {
    static df_real x[4096];
    static double order[4096];
    df_torch_random g;
    uint64_t seed = (uint64_t)nets_number(c, "seed", 0);
    int size = (int)nets_number(c, "size", 0), stored = (int)nets_number(c, "stored", 0);
    const nets_array *normal = nets_find(c, "randn");
    if (!check(normal && size <= 4096, "%s cannot be read", c->name)) return;
    df_torch_seed(&g, seed);
    df_torch_randn(&g, (size_t)size, x);
    near_all(x, normal->v, stored, 1e-6);
    for (int k = 0; k < 2; k++) {
        const nets_array *more = nets_find(c, k ? "third_randn_after" : "second_randn_3_after_randn");
        if (more == NULL) continue;
        df_torch_randn(&g, k ? (size_t)size : 3, x);
        near_all(x, more->v, more->size, 1e-6);
    }
    df_torch_seed(&g, seed);
    if (size >= 16) {
        nets_normal_double(&g, size, order);
        near_all(order, nets_find(c, "randn_double")->v, stored, 1e-12);
    }
    df_torch_seed(&g, seed);
    for (int i = 0; i < stored; i++)
        near_abs((df_torch_bits(&g) & 0xffffffu) / 16777216.0, nets_find(c, "rand")->v[i], 1e-9);
    df_torch_seed(&g, seed);
    for (int i = 0; i < stored; i++) near_abs(nets_double(&g), nets_find(c, "rand_double")->v[i], 1e-16);
    df_torch_seed(&g, seed);
    for (int i = 0; i < stored; i++)
        expect(df_torch_bits(&g) % 1000 == (uint32_t)nets_find(c, "randint_1000")->v[i]);
    df_torch_seed(&g, seed);
    for (int i = 0; i < size; i++) order[i] = i;
    for (int i = 0; i < size - 1; i++) {
        int j = i + (int)(df_torch_bits(&g) % (uint32_t)(size - i));
        double keep = order[i];
        order[i] = order[j], order[j] = keep;
    }
    near_all(order, nets_find(c, "randperm")->v, stored, 1e-9);
}
#endif
