// bench: one JSON line per case and thread count, each in a process of its own so that peak
// memory is that case's. `bench CASE THREADS` runs one: gemm, mlp_train, mlp_sample,
// unet_train, unet_sample, dit_train, dit_sample, step, cold.
//
//   gemm        C = A B for eight shapes. Where OpenBLAS is installed both are timed in turn,
//               and the line has its rate and our part of it.
//   mlp_train   the residual MLP of 297,218 parameters, batch 1024: T = 1000 linear betas,
//               noise prediction, AdamW, no average: one step.
//   mlp_sample  one evaluation of it at batch 1024 and a DDIM update: a step of 50.
//   unet_train  the UNet of 6,469,889 parameters on 32 images of 1x32x32: the same work and
//               an average of decay 0.999: one step. dit_train: the transformer of 4,162,948,
//               batch 16, with labels.
//   unet_sample, dit_sample  one evaluation at batch 16 and a DDIM update: a step of 50.
//   step        a step of dpmpp_2m, 8 samples of 12,288, a model that costs nothing and
//               answers x_0, v or eps; beside three axpy over such arrays, in turn.
//   cold        a new process: context, network, 16 samples in 10 steps, exit.
// Medians; a ratio of two programs means something only when both ran on the same quiet
// machine within the same minutes.
#define _GNU_SOURCE
#define DIFFUSION_IMPLEMENTATION
#define DIFFUSION_STATIC
#include "diffusion.h"
#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

enum { RUNS = 15 };
typedef struct timing { double ms[RUNS]; } timing;

static double now_ms(void) {
    struct timeval t;
    gettimeofday(&t, NULL);
    return 1e3 * (double)t.tv_sec + 1e-3 * (double)t.tv_usec;
}
static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(timing *t) {
    qsort(t->ms, RUNS, sizeof t->ms[0], ascending);
    return t->ms[RUNS / 2];
}
static void emit(const char *name, int threads, timing *t, const char *more) {
    struct rusage use;
    double m = median(t);
    getrusage(RUSAGE_SELF, &use);
    printf("{\"bench\": \"%s\", \"peer\": \"diffusion.h\", \"threads\": %d, \"iters\": %d, "
           "\"median_ms\": %.4f, \"min_ms\": %.4f, \"max_ms\": %.4f, \"peak_rss_mib\": %.1f%s}\n",
           name, threads, RUNS, m, t->ms[0], t->ms[RUNS - 1], (double)use.ru_maxrss / 1024, more);
    fflush(stdout);
}
static df_ctx *context(int threads) {
    df_ctx_desc d = df_ctx_defaults();
    d.threads = threads;
    return df_ctx_create(&d);
}
static df_card ddpm_card(df_ctx *ctx) {
    static double betas[1000];
    df_card card = df_card_defaults();
    df_betas(ctx, DF_BETAS_LINEAR, 1e-4, 0.02, 1000, betas);
    df_process_table(ctx, betas, 1000, &card.process);
    card.prediction = DF_EPS;
    card.time = df_time_index(1000);
    return card;
}

// ---- gemm -------------------------------------------------------------------------------

typedef void (*sgemm)(int, int, int, int, int, int, float, const float *, int, const float *,
                      int, float, float *, int);
static sgemm openblas(int threads) {
    void *lib;
    void (*set)(int);
    sgemm f = NULL;
    unsetenv("OPENBLAS_CORETYPE");       // a foreign core type would halve its rate
    unsetenv("OPENBLAS_L2_SIZE");
    lib = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (lib == NULL) return NULL;
    *(void **)&f = dlsym(lib, "cblas_sgemm");
    *(void **)&set = dlsym(lib, "openblas_set_num_threads");
    if (set != NULL) set(threads);
    return f;
}

static void bench_gemm(int threads) {
    static const int shapes[8][3] = {
        { 1024, 1024, 1024 }, { 256, 256, 256 }, { 128, 512, 512 }, { 64, 1024, 1152 },
        { 256, 1024, 1152 }, { 128, 16384, 1152 }, { 1024, 256, 256 }, { 2048, 2048, 2048 }
    };
    df_ctx *ctx = context(threads);
    sgemm peer = sizeof(df_real) == 4 ? openblas(threads) : NULL;
    for (int s = 0; s < 8; s++) {
        int M = shapes[s][0], N = shapes[s][1], K = shapes[s][2];
        double flop = 2.0 * M * N * K;
        size_t a = (size_t)M * (size_t)K, b = (size_t)K * (size_t)N, c = (size_t)M * (size_t)N;
        df_real *A = (df_real *)dfi_new(ctx, a * sizeof *A);
        df_real *B = (df_real *)dfi_new(ctx, b * sizeof *A);
        df_real *C = (df_real *)dfi_new(ctx, c * sizeof *A);
        timing t, p;
        char more[200] = "";
        df_random_normal(1, 0, 0, a, A);
        df_random_normal(1, 1, 0, b, B);
        for (int r = 0; r < 2 * RUNS; r++) {     // ours and theirs in turn
            int calls = 0, theirs = r % 2;
            double start = now_ms(), t0 = start;
            if (theirs && peer == NULL) continue;
            do {                                 // the first 20 ms wake workers and processors
                if (now_ms() - start < 20) t0 = now_ms(), calls = 0;
                if (theirs)
                    peer(101, 111, 111, M, N, K, 1, (const float *)(void *)A, K,
                         (const float *)(void *)B, N, 0, (float *)(void *)C, N);
                else
                    dfi_gemm(ctx, 0, 0, (size_t)M, (size_t)N, (size_t)K, A, (size_t)K, B,
                             (size_t)N, 0, C, (size_t)N);
                calls++;
            } while (now_ms() - start < 50);
            (theirs ? &p : &t)->ms[r / 2] = (now_ms() - t0) / calls;
            if (peer != NULL) usleep(60000);     // its idle workers spin for some 25 ms
        }
        snprintf(more, sizeof more, ", \"M\": %d, \"N\": %d, \"K\": %d, \"gflops_median\": %.1f",
                 M, N, K, 1e-6 * flop / median(&t));
        if (peer != NULL)
            snprintf(more + strlen(more), sizeof more - strlen(more),
                     ", \"openblas_gflops\": %.1f, \"of_openblas\": %.3f",
                     1e-6 * flop / median(&p), median(&p) / median(&t));
        emit("gemm", threads, &t, more);
        dfi_delete(ctx, A, a * sizeof *A);
        dfi_delete(ctx, B, b * sizeof *A);
        dfi_delete(ctx, C, c * sizeof *A);
    }
    df_ctx_free(ctx);
}

// ---- networks ---------------------------------------------------------------------------

// The networks of the peers' benchmark; native time is the index 0 .. 999 itself.
static df_net *bench_net(df_ctx *ctx, const char *kind) {
    if (strncmp(kind, "mlp", 3) == 0) {
        df_mlp_desc m = df_mlp_defaults();
        m.time_scale = 1;
        return df_mlp_create(ctx, &m);
    }
    if (strncmp(kind, "unet", 4) == 0) {
        df_unet_desc u = df_unet_defaults();
        u.in_channels = u.out_channels = 1;
        u.levels = 3;
        u.channels[0] = 64, u.channels[1] = u.channels[2] = 128;
        u.down[0] = u.down[1] = u.up[1] = u.up[2] = DF_UNET_PLAIN;
        u.down[2] = u.up[0] = DF_UNET_ATTENTION;
        u.head_dim = 0;
        return df_unet_create(ctx, &u);
    }
    df_dit_desc d = df_dit_defaults();
    df_net *net;
    d.in_channels = 1, d.width = 192, d.depth = 6, d.heads = 3, d.classes = 10;
    d.learn_sigma = 0;
    net = df_dit_create(ctx, &d);
    // layers that start at 0 would time products with zeros
    for (int i = 0; net != NULL && i < df_net_count(net); i++) {
        const df_param *p = df_net_param(net, i);
        df_real *w = df_net_weights(net) + p->offset;
        if (p->frozen || w[0] != 0) continue;
        df_random_normal(7, (uint64_t)i, 0, p->size, w);
        for (size_t k = 0; k < p->size; k++) w[k] *= (df_real).05;
    }
    return net;
}

// Steps in one measurement and rows of a step: the MLP's is short.
typedef struct load { int train, images, batch, steps; } load;
static load load_of(const char *name) {
    load l;
    l.train = strstr(name, "train") != NULL;
    l.images = strncmp(name, "mlp", 3) != 0;
    l.batch = !l.images ? 1024 : l.train && name[0] == 'u' ? 32 : 16;
    l.steps = l.train ? (l.images ? 1 : 20) : (l.images ? 5 : 50);
    return l;
}
static void emit_net(const char *name, int threads, timing *t, df_ctx *ctx, df_net *net) {
    char more[120];
    snprintf(more, sizeof more, ", \"batch\": %d, \"params\": %zu, \"ctx_peak_mib\": %.1f",
             load_of(name).batch, df_net_trained(net),
             (double)df_ctx_peak_bytes(ctx) / (1 << 20));
    emit(name, threads, t, more);
}

static void bench_train(const char *name, int threads) {
    static df_real data[32 * 1024];
    static int labels[32];
    const load l = load_of(name);
    df_ctx *ctx = context(threads);
    df_net *net = bench_net(ctx, name);
    df_train_desc d = df_train_defaults();
    df_trainer *trainer;
    timing t;
    for (int i = 0; i < 32; i++) labels[i] = i % 10;
    df_random_normal(1, 0, 0, (size_t)l.batch * (size_t)df_net_dim(net), data);
    d.card = ddpm_card(ctx);
    d.density = DF_DENSITY_INDEX;
    d.scaling = DF_SCALING_NONE;
    d.batch = l.batch, d.steps = 1000000, d.warmup = 0, d.final_rate = 1, d.clip = 0;
    d.learning_rate = l.images ? 1e-4 : 1e-3, d.ema = l.images ? .999 : 0;
    d.ema_warmup = 0, d.validation = 0, d.validate_every = 0;
    trainer = df_trainer_create(ctx, net, data, l.batch, name[0] == 'd' ? labels : NULL, &d);
    for (int r = -1; r < RUNS; r++) {
        double t0 = now_ms();
        if (df_trainer_run(trainer, l.steps) != DF_OK)
            fprintf(stderr, "%s\n", df_ctx_message(ctx));
        if (r >= 0) t.ms[r] = (now_ms() - t0) / l.steps;
    }
    emit_net(name, threads, &t, ctx, net);
    df_trainer_free(trainer);
    df_net_free(net);
    df_ctx_free(ctx);
}

static void sample(df_ctx *ctx, const df_net *net, df_real *x, int n, int steps,
                   const int *labels) {
    df_model model = df_net_model(net);
    df_sample_desc d = df_sample_defaults();
    d.grid = "leading", d.steps = steps, d.labels = labels;
    if (df_sample(ctx, &model, &d, x, n) != DF_OK) fprintf(stderr, "%s\n", df_ctx_message(ctx));
}

static void bench_sample(const char *name, int threads) {
    static df_real x[16 * 1024];
    static int labels[16];
    const load l = load_of(name);
    df_ctx *ctx = context(threads);
    df_net *net = bench_net(ctx, name);
    df_card card = ddpm_card(ctx);
    timing t;
    for (int i = 0; i < 16; i++) labels[i] = i % 10;
    df_net_set_card(ctx, net, &card);
    for (int r = -1; r < RUNS; r++) {
        double t0 = now_ms();
        sample(ctx, net, x, l.batch, l.steps, name[0] == 'd' ? labels : NULL);
        if (r >= 0) t.ms[r] = (now_ms() - t0) / l.steps;
    }
    emit_net(name, threads, &t, ctx, net);
    df_net_free(net);
    df_ctx_free(ctx);
}

// A whole run by question and answer, the answer a constant array: microseconds of one step,
// the first ones left out.
enum { STEP_N = 8, STEP_DIM = 12288, STEP_SIZE = STEP_N * STEP_DIM, STEP_STEPS = 100 };
static double step_ms(df_ctx *ctx, df_prediction prediction, df_real *x, const df_real *out) {
    df_model m = df_model_defaults();
    df_sample_desc d = df_sample_defaults();
    df_sampler *s;
    df_query q;
    int asked = 0;
    double start = 0, ms;
    m.dim = STEP_DIM;
    m.process = df_process_vp(.1, 20);
    m.prediction = prediction;
    d.method = "dpmpp_2m";
    d.steps = STEP_STEPS;
    d.t_max = .99; // eps needs alpha > 0
    s = df_sampler_create(ctx, &m, &d, x, STEP_N);
    while (df_sampler_next(s, &q)) {
        if (asked++ == 5) start = now_ms();
        df_sampler_answer(s, out);
    }
    ms = (now_ms() - start) / (asked - 5);
    if (df_sampler_result(s) != DF_OK) fprintf(stderr, "%s\n", df_ctx_message(ctx));
    df_sampler_free(s);
    return ms;
}
static void bench_step(int threads) {
    static df_real x[STEP_SIZE], a[STEP_SIZE], b[STEP_SIZE], c[STEP_SIZE], out[STEP_SIZE];
    static const df_prediction kinds[3] = { DF_X0, DF_V, DF_EPS };
    df_ctx *ctx = context(threads);
    for (int i = 0; i < STEP_SIZE; i++) out[i] = (df_real)(.3 * (i * 7919 % 100) / 100 - .1);
    for (int k = 0; k < 3; k++) {
        timing t, axpy, ratio;
        char more[160];
        for (int r = -1; r < RUNS; r++) {
            double step = step_ms(ctx, kinds[k], x, out), start = now_ms(), three;
            for (int i = 0; i < STEP_STEPS; i++) {
                ctx->k->axpy(STEP_SIZE, (df_real).999, a, x);
                ctx->k->axpy(STEP_SIZE, (df_real)-.3, b, x);
                ctx->k->axpy(STEP_SIZE, (df_real).1, c, x);
            }
            three = (now_ms() - start) / STEP_STEPS;
            if (r >= 0) t.ms[r] = step, axpy.ms[r] = three, ratio.ms[r] = step / three;
        }
        snprintf(more, sizeof more, ", \"answers\": \"%s\", \"three_axpy_ms\": %.4f, "
                 "\"ratio\": %.2f", df_prediction_name(kinds[k]), median(&axpy), median(&ratio));
        emit("step", threads, &t, more);
    }
    df_ctx_free(ctx);
}

static void cold_child(int threads) {
    static df_real x[32];
    df_ctx *ctx = context(threads);
    df_net *net = bench_net(ctx, "mlp");
    df_card card = ddpm_card(ctx);
    df_net_set_card(ctx, net, &card);
    sample(ctx, net, x, 16, 10, NULL);
    df_net_free(net);
    df_ctx_free(ctx);
}

// ---- processes --------------------------------------------------------------------------

static int spawn(const char *self, const char *what, int threads) {
    char number[16];
    int status = -1;
    pid_t child;
    fflush(NULL);
    child = fork();
    if (child == 0) {
        snprintf(number, sizeof number, "%d", threads);
        execl(self, self, what, number, (char *)NULL);
        _exit(127);
    }
    if (child < 0 || waitpid(child, &status, 0) != child) return 1;
    return status != 0;
}

static void bench_cold(const char *self, int threads) {
    timing t;
    for (int r = -1; r < RUNS; r++) {
        double t0 = now_ms();
        spawn(self, "cold_child", threads);
        if (r >= 0) t.ms[r] = now_ms() - t0;
    }
    emit("cold", threads, &t, ", \"net\": \"mlp\"");
}

int main(int argc, char **argv) {
    static const char *const cases[] = { "gemm", "mlp_train", "mlp_sample", "unet_train",
                                         "unet_sample", "dit_train", "dit_sample", "step",
                                         "cold" };
    const char *name = argc > 1 ? argv[1] : "";
    int threads = argc > 2 ? atoi(argv[2]) : 0, bad = 0;
    if (argc < 3) {
        for (int c = 0; c < 9; c++)
            for (threads = 1; threads <= 2; threads++)
                if (argc < 2 || strcmp(name, cases[c]) == 0)
                    bad |= spawn(argv[0], cases[c], threads);
    } else if (strcmp(name, "gemm") == 0) bench_gemm(threads);
    else if (strstr(name, "_train") != NULL) bench_train(name, threads);
    else if (strstr(name, "_sample") != NULL) bench_sample(name, threads);
    else if (strcmp(name, "step") == 0) bench_step(threads);
    else if (strcmp(name, "cold") == 0) bench_cold(argv[0], threads);
    else if (strcmp(name, "cold_child") == 0) cold_child(threads);
    else return fprintf(stderr, "bench: no case named %s\n", name), 2;
    return bad;
}
