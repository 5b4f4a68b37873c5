/* diffusion.h - v0.1.0 - diffusion models in one C header
   SPDX-License-Identifier: MIT OR Unlicense

   Tensor mathematics with gradients, noise processes, networks, training, samplers,
   guidance, checkpoints and closed forms: C99 that is also C++11, no dependency but the C
   library. It is meant to be used, and to be read from top to bottom.

   =====================================================================================
   // >>manual
   =====================================================================================

   DO THIS
     #define DIFFUSION_IMPLEMENTATION      in exactly one C or C++ file,
     #include "diffusion.h"                everywhere.
     cc -O2 prog.c -lm                     (-lpthread too where the C library wants it)

   SYNOPSIS
     // Learn 10,000 points of the plane, draw 500 new ones. x, y [n, 2].
     #define DIFFUSION_IMPLEMENTATION
     #include "diffusion.h"
     int learn(const float *x, int n, float *y)
     {
         df_ctx *ctx = df_ctx_create(NULL);
         df_mlp_desc m = df_mlp_defaults();
         df_train_desc t = df_train_defaults();
         df_sample_desc s = df_sample_defaults();
         df_net *net = df_mlp_create(ctx, &m);
         df_trainer *trainer = df_trainer_create(ctx, net, x, n, NULL, &t);
         int result = df_ctx_error(ctx);
         if (result == DF_OK) result = df_trainer_run(trainer, 0);
         if (result == DF_OK) {
             df_model model = df_net_model(net);
             result = df_sample(ctx, &model, &s, y, 500);
         }
         if (result != DF_OK) puts(df_ctx_message(ctx));
         df_trainer_free(trainer);
         df_net_free(net);
         df_ctx_free(ctx);
         return result;
     }

   CONTENTS (search for the marks)
     >>manual          what you are reading
     >>api             types and functions
     >>private         what the chapters share with each other
     >>foundations     errors, memory, random numbers, workers
     >>process         alpha, sigma, lambda; tables; native times; grids
     >>prediction      the plane of predictions
     >>samplers        ancestral, ODE and SDE samplers; registry; asking; the machine
     >>guidance        classifier-free guidance
     >>likelihood      log p by the ODE; the variational bound; bits per dimension
     >>tensors         values; each operation forward, backward, tangent
     >>networks        layers; MLP, UNet, DiT and others; checkpoints of nets
     >>training        objectives, weightings, AdamW, moving average, trainer
     >>relatives       autoencoders and flows, what diffusion is compared with
     >>files           sources, sinks, JSON, safetensors; folders of diffusers and DiT
     >>closed forms    Gaussian mixtures at every t; distances between samples
     >>laboratory      models that are wrong by a known amount; what comes of it
     >>kernels         the engine room: plain loops, then the tuned ones

   FIVE IDEAS
     One path      Every process is x_t = alpha(t) x_0 + sigma(t) eps, t = 0 the data,
                   t = 1 the noise. VP, VE, EDM, flow, ... are only alpha and sigma.
     One plane     Every prediction is a row (a, b), meaning a x_0 + b eps. With x_t it
                   is a 2 x 2 system; one solver turns any into any other.
     One clock     Samplers walk points (t, alpha, sigma, lambda = log alpha/sigma). What
                   walks lambda or rho = sigma/alpha gives one trajectory on every
                   process, from the same r = x/(alpha + sigma).
     One question  A model answers "here is x at these points: what do you predict?".
                   Networks, closed forms, your code, guidance: one type.
     Every claim runs: each formula is tested against something known exactly.

   TASKS
     train on an array            df_mlp_create, df_trainer_create, df_trainer_run
     sample                       df_net_model, df_sample
     sample your own network      fill a df_model (predict, self, dim, process, prediction,
                                  time), df_sample; or the ask/answer loop, below
     train on pictures            df_unet_create or df_dit_create instead
     keep and load                df_net_save, df_net_load; to resume, df_trainer_...
     run a checkpoint of others   df_net_load_folder: UNet2DModel, DiT; df_net_save_folder
     see the noise schedule       df_process_at, df_process_rates, df_grid
     convert predictions          df_plane_convert, df_plane_map
     guide by class               label_dropout in training, df_guidance_model
     train for likelihood         DF_WEIGHT_LIKELIHOOD, DF_DENSITY_LAMBDA
     train by another loss        df_train_desc.objective: yours, or df_objective_...
     an energy; contrastively     df_energy_model; df_objective_energy, _contrastive
     choose a sampler             below; df_sampler_rows lists all
     write a sampler              df_sampler_row with a stage function, desc.row
     keep part of an image        df_sample_desc.edit (inpainting); start DATA (img2img)
     encode data as noise         df_sample_desc.inverse (DDIM inversion, any ODE method)
     write a network              df_net_create, df_layer_..., df_run_...
     logits of tokens             df_transformer_create, df_run_tokens
     draw a robot's trajectories  df_unet1d_create, df_sample_desc.condition
     layers, flops, memory        df_net_describe
     differentiate                df_record_begin, df_backward; df_set_tangent
     log p of data, or samples    df_log_likelihood, df_sample_likelihood
     bits per dimension           df_dequantize, df_bits_per_dim, df_variational_bound
     compare with an autoencoder  df_vae_create, df_vae_elbo, df_vae_sample
     ... with a coupling flow     df_coupling_create, df_coupling_log_density
     ... with a neural ODE        df_node_log_density, df_objective_node
     compare samples              df_sliced_wasserstein, df_energy_distance, df_mmd
     test against the truth       df_mixture_create, df_mixture_model
     spoil a score on purpose     df_flaw_model; df_score_error, df_path_kl
     noising and denoising steps  df_drift_forward, df_drift_reverse, df_drift_step

   SAMPLERS, by the names the libraries know
     10 to 20 questions    unipc, dpmpp_2m, dpmpp_3m, deis, sa_solver; grid "karras" or
                           "lambda"
     exact ODE             rk45 or dpm_adaptive to a tolerance; heun, rk4 by steps
     with fresh noise      euler_ancestral, dpmpp_2m_sde, dpmpp_sde, er_sde; ddpm with as
                           many steps as training had
     rectified flow        any: euler is flow matching's Euler step there
     a distilled model     consistency (lcm, cm, scm), tcd, flow_map, if it answers maps
     many cores, few rows  paradigms asks many steps of one sample at once
     correction            corrections (predictor-corrector), churn, restarts go with all
   order, corrector, slope, predicts, eta and eta_in tune them; compat brings back what a
   library does where it differs from what is right.

   THE LOOP, TURNED INSIDE OUT
   A host that may not block in a callback (a game, a GPU queue, a browser) keeps the loop:
     df_sampler *s = df_sampler_create(ctx, &model, &desc, x, n);   // model.predict unused
     df_query q;
     while (df_sampler_next(s, &q)) {       // q.x [q.n, q.dim] at q.t_model [q.n]
         my_network(&q, out);               // frames may pass here
         df_sampler_answer(s, out);
     }
     if (df_sampler_result(s) != DF_OK) puts(df_ctx_message(ctx));
     df_sampler_free(s);
   It gives bit for bit what df_sample gives.

   YOUR NETWORK BEHIND OUR SAMPLERS
     df_model m = df_model_defaults();
     m.predict = my_predict, m.self = my_net, m.dim = 3 * 64 * 64;
     m.process = df_process_...; m.prediction = DF_EPS; m.time = df_time_index(1000);
   What usual models mean, in our words:
     DDPM, Stable Diffusion   process table; EPS or V; time index(T)
     score_sde VP             process vp(.1, 20); EPS (its get_score_fn: SCORE); time
                              affine(999, 0)
     EDM                      process edm(80), sigma_data .5; EDM_F; time log_sigma(.25);
                              input_sigma_data .5
     Stable Diffusion 3, Flux process flow; VELOCITY; time affine(1000, 0)
     flow_matching (t=1 data) process flow; VELOCITY; time and clock affine(-1, 1)
     TrigFlow (sCM)           process trig(s_d); VELOCITY, of the output times s_d; time
                              and clock affine(pi/2, 0); input_sigma_data s_d
   A velocity is dx/d(clock); ours is dx/dt with t towards noise, so clock 1 - t flips the
   sign.

   CONVENTIONS
     df_noun_verb functions, df_noun types, DF_NOUN constants; dfi_ is private.
     Samples are [n, dim] arrays of df_real, row by row. Images [B,C,H,W], tokens [B,T,C],
     last axis contiguous, as in PyTorch. Weights of linear layers are [out, in].
     Descriptors come from df_..._defaults() with real values, not magic zeros; any other
     is refused. API comments give each field's default in [brackets].
     Labels are ints; -1 is none.
     t_model is the model's native time (an index, a sigma, ...); t is always ours.

   ERRORS
   Functions return a df_result (0 fine, DF_ERR_... negative) or NULL;
   df_ctx_message has a sentence with the numbers. Tensor operations are sticky: after the
   first failure they do nothing and pass NULL on, so a graph is checked once, at its end;
   df_ctx_clear resumes. Your callback's own non-zero result comes back unchanged. Nothing
   here aborts, exits or prints. NaN and Inf that enter or arise are errors that say where,
   found by their bits, also under -Ofast.

   MEMORY
   All of it comes through df_alloc, on the context's own thread. Tensors and
   scratch live in step memory, a stack: df_scope_begin ... y = df_scope_end(scope, y)
   releases all but y. df_ctx_bytes and df_ctx_peak_bytes tell how much. Sizes are checked
   before they are multiplied.

   LIFETIMES
     thing                owned by        made of / borrows, until when
     df_ctx               you             its hooks' user pointers, until it is freed
     df_tensor            its context     until its scope ends; df_tensor_borrow: your data
     df_process           a value         table: memory of its context (df_process_table),
                                          or of the net whose card it is
     df_model             a value         self, mean, scale and a table until its last use
     df_net               you             the allocator's user pointer; it may outlive its
                                          context and be shared, const
     df_energy_model      a value         its net, until its last use
     df_trainer           you             net, data, labels, condition, objective_self,
                                          context, until it is freed
     df_sampler           you             x, labels, condition, hooks, context; rest copied
     df_guidance          you             its models, until the guided model's last use
     df_flaw              you             its model, points, direction: likewise
     df_mixture           you             its context; df_mixture_view: the mixture
     df_safetensors       you             its context; nothing of the source
     strings in descriptors               copied or looked up during the call

   THREADS
   A context, and what was made from it, is used by one thread at a time; contexts
   share nothing but const nets. Inside, a context has workers (df_ctx_desc.threads) or
   your task system (df_tasks). df_ctx_cancel may be called from anywhere.

   RANDOMNESS AND DETERMINISM
   Random numbers are Philox 4x32-10, keyed by (seed, sample,
   draw), and the same on every machine, bit for bit. Results of sampling are bitwise equal
   for any number of threads and any split into batches, whole or stepped; results of
   training for any number of threads and any save and resume. That holds for one binary on
   one instruction set: FMA and vector width change last bits, and so do compilers. The
   noise source is a hook (df_noise).

   PRECISION
   df_real is float; with DIFFUSION_DOUBLE, double and plain kernels, for
   checking formulas. Step coefficients, closed forms, reductions over samples are double
   in both.

   INSTRUCTION SETS
   Plain `cc -O2` gets all of them: the kernels are compiled for SSE2,
   AVX2+FMA and AVX-512, or NEON, and chosen at run time. df_ctx_isa says which;
   df_ctx_desc.max_isa clamps.

   CONFIGURATION, define before including                         where
     DIFFUSION_IMPLEMENTATION  compile the bodies too           in one file
     DIFFUSION_STATIC      every function static                in that file
     DIFFUSION_DOUBLE      df_real is double                    everywhere the same
     DIFFUSION_NO_SIMD     plain kernels only                   in that file
     DIFFUSION_NO_THREADS  no workers (df_tasks still works)    in that file
     DIFFUSION_NO_STDIO    paths are refused; memory and hooks work (snprintf
                           still comes from stdio.h)            in that file
     DIFFUSION_ASSERT(x)   check internal invariants by this    in that file
     DIFFUSION_FILE        this file's name, if you renamed it: it includes itself once for
                           each instruction set ["diffusion.h"] in that file

   LIMITS
   int counts samples and elements of one sample. Workers need POSIX threads and GCC
   or Clang; elsewhere give df_tasks, or run on one. Without GCC's vector extensions the
   plain kernels run. A context's step memory shrinks only when the context is freed.

   GLOSSARY
     alpha, sigma   signal and noise factors of x_t           rho      sigma/alpha
     lambda         log alpha/sigma, half the log SNR         eps      the noise, N(0, 1)
     score          grad log p_t(x)                           velocity dx/dt of the ODE
     v              alpha eps - sigma x_0                     F        EDM's network output
     NFE            questions a sampler asks per sample       eta      noise a step adds
     JVP, VJP       Jacobian times vector, vector times Jacobian
     card           what a net predicts, of which process, in which time
*/
#ifndef DIFFUSION_H
#define DIFFUSION_H

/* =====================================================================================
   // >>api: types and functions, in the order of the chapters
   ===================================================================================== */
#include <stddef.h>
#include <stdint.h>

#define DF_VERSION_MAJOR 0
#define DF_VERSION_MINOR 1
#define DF_VERSION_PATCH 0
#define DF_VERSION (DF_VERSION_MAJOR * 10000 + DF_VERSION_MINOR * 100 + DF_VERSION_PATCH)

#ifndef DF_API               /* or your own: dllexport, visibility */
#ifdef DIFFUSION_STATIC
#if defined(__GNUC__) || defined(__clang__)
#define DF_API static __attribute__((unused))
#else
#define DF_API static
#endif
#else
#define DF_API extern
#endif
#endif

/* The scalar of samples, weights and tensors. Step coefficients are double in both builds.
   The functions that such work begins with carry another link name in the double build, so
   that an object made for one precision does not link with a user of the other. */
#ifdef DIFFUSION_DOUBLE
typedef double df_real;
#define DF_REAL_NAME "double"
#define df_ctx_create df_ctx_create_double
#define df_model_defaults df_model_defaults_double
#define df_sample df_sample_double
#define df_sampler_create df_sampler_create_double
#define df_tensor_copy df_tensor_copy_double
#define df_mlp_create df_mlp_create_double
#define df_net_load df_net_load_double
#define df_trainer_create df_trainer_create_double
#else
typedef float df_real;
#define DF_REAL_NAME "float"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- foundations: results, hooks, context ------------------------------------------ */

/* What functions return. 0 is fine; a callback's own failure comes back unchanged. */
typedef int df_result;
enum {
    DF_OK = 0,
    DF_ERR_ARGUMENT = -1,    /* a value outside its documented range, an unknown name */
    DF_ERR_MEMORY = -2,      /* the allocator said no, or a size overflows */
    DF_ERR_SHAPE = -3,       /* tensors that do not fit together */
    DF_ERR_SINGULAR = -4,    /* a quantity that is infinite or undefined at this point */
    DF_ERR_NONFINITE = -5,   /* NaN or Inf came in or arose; the message says where */
    DF_ERR_IO = -6,          /* a file cannot be opened, read or written */
    DF_ERR_FORMAT = -7,      /* a file is not what it should be */
    DF_ERR_UNSUPPORTED = -8, /* a valid request that this object cannot answer */
    DF_CANCELLED = -9        /* df_ctx_cancel was called */
};

/* The context: error state, step memory, workers, hooks. One thread at a time uses a
   context and what was made from it; different contexts share nothing but const nets. */
typedef struct df_ctx df_ctx;

/* Memory comes from here only. `size` bytes aligned to `align` (a power of two, at most
   64); NULL says no. free gets back what alloc was asked for. Called on the context's own
   thread; nets keep a copy, so `user` must outlive them too. */
typedef struct df_alloc {
    void *(*alloc)(void *user, size_t size, size_t align);
    void (*free)(void *user, void *ptr, size_t size, size_t align);
    void *user;
} df_alloc;

typedef enum df_log_level { DF_LOG_ERROR, DF_LOG_WARNING } df_log_level;

/* Sentences without a final newline: every error, and warnings (workers that could not be
   started). NULL: silence. */
typedef struct df_logger {
    void (*message)(void *user, df_log_level level, const char *text);
    void *user;
} df_logger;

/* A host's own task system. run calls task(arg, 0) .. task(arg, count-1), each exactly
   once, in any order, on any threads, and returns when all are done. NULL: our own
   workers. */
typedef struct df_tasks {
    void (*run)(void *user, int count, void (*task)(void *arg, int index), void *arg);
    void *user;
    int workers;             /* how many tasks run at once, 1 .. 1024 */
} df_tasks;

/* Instruction sets of the tuned kernels, in rising order within an architecture. */
typedef enum df_isa {
    DF_ISA_PLAIN, DF_ISA_SSE2, DF_ISA_AVX2, DF_ISA_AVX512, DF_ISA_NEON
} df_isa;

typedef struct df_ctx_desc {
    uint32_t cookie;         /* set by df_ctx_defaults */
    int threads;             /* workers, the caller included, at most 1024; 0: one per
                                processor [0] */
    df_isa max_isa;          /* best kernels to use, if the machine has them [NEON] */
    df_alloc alloc;          /* [malloc and free] */
    df_logger log;           /* [silence] */
    df_tasks tasks;          /* [own workers, started at the first use] */
} df_ctx_desc;

DF_API df_ctx_desc df_ctx_defaults(void);
/* A new context, or NULL: no memory, or a wrong descriptor (the log hook hears which,
   unless df_ctx_defaults did not make it). desc may be NULL: the defaults. */
DF_API df_ctx *df_ctx_create(const df_ctx_desc *desc);
/* Frees the context and all it owns: step memory, tables of betas, workers. Trainers,
   samplers, mixtures and opened files have their own free and must be freed first; nets
   may outlive it. NULL is fine. */
DF_API void df_ctx_free(df_ctx *ctx);
/* Code and sentence of the last failure ("" if none). The sentence stays until the next
   one. A NULL context, which is what df_ctx_create gives without memory, says so. */
DF_API df_result df_ctx_error(const df_ctx *ctx);
DF_API const char *df_ctx_message(const df_ctx *ctx);
/* Forgets the error, the stuck state of tensor operations, and a cancel request. */
DF_API void df_ctx_clear(df_ctx *ctx);
/* Asks df_sample or df_trainer_run to stop with DF_CANCELLED at its next step. A request
   that came too late is kept and stops the next run; df_ctx_clear forgets it. The one
   function that any thread or a signal handler may call. */
DF_API void df_ctx_cancel(df_ctx *ctx);
/* Bytes the context holds now, and the most it has held; nets are not counted. */
DF_API size_t df_ctx_bytes(const df_ctx *ctx);
DF_API size_t df_ctx_peak_bytes(const df_ctx *ctx);
DF_API int df_ctx_threads(const df_ctx *ctx);
/* "plain", "sse2", "avx2", "avx512", "neon" */
DF_API const char *df_ctx_isa(const df_ctx *ctx);
/* DF_VERSION and precision of the implementation, to compare with the header's. */
DF_API int df_version(void);
DF_API const char *df_precision(void);              /* "float" or "double" */
DF_API const char *df_result_name(df_result result);

/* ---- foundations: random numbers ---------------------------------------------------- */

/* Philox 4x32-10 (Salmon et al. 2011): four random words for a key and a counter, no
   state. Every draw of this library is keyed by (seed, sample, draw), so that sample i of
   seed s is the same alone, in any batch, resumed or not, on every machine. */
DF_API void df_random_bits(uint64_t seed, uint64_t sample, uint32_t draw, uint32_t block,
                           uint32_t bits[4]);
/* n numbers of stream (seed, sample, draw): N(0,1) by Box-Muller in integer arithmetic
   (the same bits on every machine), or uniform on (0,1). out [n]. */
DF_API void df_random_normal(uint64_t seed, uint64_t sample, uint32_t draw, size_t n,
                             df_real *out);
DF_API void df_random_uniform(uint64_t seed, uint64_t sample, uint32_t draw, size_t n,
                              double *out);

/* ---- process: x_t = alpha(t) x_0 + sigma(t) eps, t in [0,1], 0 data, 1 noise -------- */

typedef enum df_process_kind {
    DF_PROCESS_VP, DF_PROCESS_COSINE, DF_PROCESS_VE, DF_PROCESS_EDM, DF_PROCESS_SUBVP,
    DF_PROCESS_FLOW, DF_PROCESS_TRIG, DF_PROCESS_TABLE, DF_PROCESS_COUNT
} df_process_kind;

/* How a table is read between its entries. */
typedef enum df_interp {
    DF_INTERP_LOG_ABAR,      /* log abar linear (default) */
    DF_INTERP_SIGMA,         /* sigma/alpha linear, as diffusers' Euler family does */
    DF_INTERP_LOG_SIGMA      /* log(sigma/alpha) linear, as k-diffusion does */
} df_interp;

/* A value: copy it freely. Only a table points elsewhere (memory of its context or
   net). */
typedef struct df_process {
    df_process_kind kind;
    double a, b;             /* VP, sub-VP: beta_min, beta_max; VE: sigma_min, sigma_max;
                                EDM: -, sigma_max */
    double sigma_data;       /* standard deviation of the data, for EDM's F and trig [.5;
                                trig: given] */
    const double *log_abar;  /* table: [T] log of abar_1 .. abar_T, not increasing; -inf
                                last if zero SNR */
    int table_size;          /* T */
    df_interp interp;
} df_process;

/* One place on a process's path. lambda = log(alpha/sigma): +inf at the data, -inf at pure
   noise. */
typedef struct df_point { double t, alpha, sigma, lambda; } df_point;

/* VP: log alpha = -(b-a) t^2/4 - a t/2, sigma^2 = 1 - alpha^2 (Song et al. 2021, eq. 33).
   Betas above 0, their sum below 1200; so below. df_process_check tells. */
DF_API df_process df_process_vp(double beta_min, double beta_max);
/* alpha = cos(phi)/cos(phi_0), phi = (t+.008)/1.008 pi/2 (Nichol & Dhariwal 2021, eq.
   17). */
DF_API df_process df_process_cosine(void);
/* alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t, 0 < sigma_min < sigma_max: ends at
   sigma_min, not at the data. */
DF_API df_process df_process_ve(double sigma_min, double sigma_max);
/* alpha = 1, sigma = sigma_max t, sigma_max > 0 (Karras et al. 2022). */
DF_API df_process df_process_edm(double sigma_max);
/* alpha of VP, sigma = 1 - alpha^2 (Song et al. 2021, eq. 29). */
DF_API df_process df_process_subvp(double beta_min, double beta_max);
/* Rectified flow: alpha = 1-t, sigma = t (Liu et al. 2023; Lipman et al. 2023). */
DF_API df_process df_process_flow(void);
/* TrigFlow: alpha = cos(pi t/2), sigma = sigma_data sin(pi t/2), sigma_data > 0 (Lu & Song
   2024). */
DF_API df_process df_process_trig(double sigma_data);
/* A DDPM table beta_1 .. beta_T (Ho et al. 2020): abar_i = prod (1-beta), t = i/T, abar(0)
   = 1; index (0-based, as libraries count) = T t - 1. betas [T] in [0,1), the last may be
   1 (zero terminal SNR); the context keeps a copy. Errors: ARGUMENT, MEMORY. */
DF_API df_result df_process_table(df_ctx *ctx, const double *betas, int T,
                                  df_process *out);

typedef enum df_betas_kind {
    DF_BETAS_LINEAR,         /* linspace(b0, b1) (Ho et al. 2020) */
    DF_BETAS_SCALED_LINEAR,  /* linspace(sqrt b0, sqrt b1)^2 (latent diffusion) */
    DF_BETAS_COSINE,         /* min(1 - abar((i+1)/T)/abar(i/T), .999); b0, b1 unused */
    DF_BETAS_SIGMOID         /* b0 + (b1-b0) sigmoid(linspace(-6, 6)) (GeoDiff) */
} df_betas_kind;
/* Fills betas [T]. Errors: ARGUMENT. ctx may be NULL here and in the process and
   prediction functions below (not df_process_table and df_plane_convert): then only the
   code tells. */
DF_API df_result df_betas(df_ctx *ctx, df_betas_kind kind, double b0, double b1, int T,
                          double *betas);
/* Rescales betas [T] so that abar_T = 0: sqrt(abar) shifted and scaled (Lin et al. 2023,
   alg. 1). */
DF_API df_result df_betas_zero_snr(df_ctx *ctx, int T, double *betas);

/* The point at t, which is clamped to [0,1]. */
DF_API df_point df_process_at(const df_process *p, double t);
/* The point with this lambda, or with this sigma/alpha (0: the data point); a value
   outside the process's range gives the nearer end. */
DF_API df_point df_process_at_lambda(const df_process *p, double lambda);
DF_API df_point df_process_at_rho(const df_process *p, double rho);
/* alpha = 1, sigma = 0, lambda = +inf, t = 0: any grid may end there, VE's included. */
DF_API df_point df_point_data(void);
DF_API const char *df_process_name(const df_process *p);
/* OK, or what is wrong with the parameters (ARGUMENT). */
DF_API df_result df_process_check(df_ctx *ctx, const df_process *p);

enum {
    DF_RATE_ALPHA = 1, DF_RATE_SIGMA = 2, DF_RATE_LAMBDA = 4,
    DF_RATE_F = 8, DF_RATE_G2 = 16, DF_RATE_W = 32
};
/* Derivatives in t and what is made of them. */
typedef struct df_rates {
    double alpha, sigma, lambda; /* alpha', sigma', lambda' */
    double f;                    /* alpha'/alpha: drift f(t) x of the forward SDE */
    double g2;                   /* (sigma^2)' - 2 f sigma^2 = -2 sigma^2 lambda': its
                                    g(t)^2 */
    double w;                    /* alpha sigma' - sigma alpha' = -alpha sigma lambda' */
} df_rates;
/* The rates named in `want` (DF_RATE_... or-ed), the others 0. Closed forms, both ends
   included; SINGULAR where one that is wanted is infinite (sigma' of VP at t = 0, f of
   flow at t = 1, ...). On a table at a knot: the piece on the data side. */
DF_API df_result df_process_rates(df_ctx *ctx, const df_process *p, double t,
                                  unsigned want, df_rates *out);

/* A native time: how a model or a paper counts, declared as a map from our t.
   AFFINE a t + b: T t - 1 (table index), pi t/2 (trig angle), 1 - t (t=1 is data), 1000 t,
   ... SIGMA sigma/alpha;  LOG_SIGMA a log(sigma/alpha): EDM's c_noise with a = 1/4. */
typedef enum df_time_kind {
    DF_TIME_AFFINE, DF_TIME_SIGMA, DF_TIME_LOG_SIGMA
} df_time_kind;
typedef struct df_time { df_time_kind kind; double a, b; } df_time;
DF_API df_time df_time_own(void);                    /* t itself */
DF_API df_time df_time_affine(double a, double b);
DF_API df_time df_time_index(int T);                 /* T t - 1 */
DF_API df_time df_time_sigma(void);
DF_API df_time df_time_log_sigma(double a);
/* The native time at a point and its derivative d native/dt (rate may be NULL). SINGULAR
   where either is infinite. */
DF_API df_result df_time_at(df_ctx *ctx, const df_process *p, const df_time *time,
                            const df_point *at, double *native, double *rate);
/* The point at a native time. */
DF_API df_point df_time_point(const df_process *p, const df_time *time, double native);

/* ---- process: the Langevin lens ----------------------------------------------------- */

/* dx = (x_factor x + score grad log p_t) dt + noise dW at one time, in three numbers for
   any process (Zheng & Lan 2026, table 3). dt > 0 the way the dynamics runs. */
typedef struct df_drift { double x_factor, score, noise; } df_drift;
/* The half that noises, (f, 0, g): takes p_t to p_{t+dt}. SINGULAR where f or g is. */
DF_API df_result df_drift_forward(df_ctx *ctx, const df_process *p, double t,
                                  df_drift *out);
/* The half that denoises, (-f, (1 + eta^2)/2 g^2, eta g): takes p_t to p_{t-dt}. eta >= 0:
   0 is the ODE, 1 the reverse SDE. */
DF_API df_result df_drift_reverse(df_ctx *ctx, const df_process *p, double t, double eta,
                                  df_drift *out);
/* Both at once, each with its own noise: drifts add, and variances. Of the two halves it
   is (0, k, sqrt(2 k)), k = (1 + eta^2)/2 g^2: Langevin dynamics on p_t, of clock k dt. */
DF_API df_drift df_drift_sum(df_drift a, df_drift b);
/* The same for each unit of a clock that runs at rate = d clock/dt, of either sign, not 0
   (df_time_at): a drift goes by 1/|rate|, noise by its root. */
DF_API df_drift df_drift_per(df_drift drift, double rate);
/* One step of Euler and Maruyama: x += (x_factor x + score s) h + noise sqrt(h) z, h >= 0;
   x, s, z [size]. s or z may be NULL where its number is 0. NONFINITE: x as it was if the
   drift is so, else as it came out. */
DF_API df_result df_drift_step(df_ctx *ctx, const df_drift *drift, double h, size_t size,
                               const df_real *s, const df_real *z, df_real *x);
/* The place of another process with the same sigma/alpha, and factor = (alpha' + sigma')
   /(alpha + sigma), by which x goes there: x/(alpha + sigma) stays (table 2, all pairs).
   The data point goes to the data point. ARGUMENT where `to` has no such place. */
DF_API df_result df_process_carry(df_ctx *ctx, const df_process *to, const df_point *from,
                                  df_point *out, double *factor);

/* ---- prediction: one plane ---------------------------------------------------------- */

/* A prediction is a row (a, b), meaning a x_0 + b eps. */
typedef enum df_prediction {
    DF_EPS,                  /* (0, 1) */
    DF_X0,                   /* (1, 0) */
    DF_SCORE,                /* (0, -1/sigma): grad log p_t */
    DF_VELOCITY,             /* (alpha', sigma'): dx/dt, t towards noise */
    DF_V,                    /* (-sigma, alpha) (Salimans & Ho 2022) */
    DF_EDM_F,                /* (sigma/s_d, -alpha s_d)/sqrt(alpha^2 s_d^2 + sigma^2)
                                (Karras et al. 2022) */
    DF_STRAIGHT,             /* (-1, 1): eps - x_0, the velocity of r = x/(alpha+sigma) in
                                s = sigma/(alpha+sigma), rectified flow's on any process */
    DF_PREDICTION_COUNT
} df_prediction;
DF_API const char *df_prediction_name(df_prediction prediction);
/* row[0] = a, row[1] = b at a point. SINGULAR where the row is infinite. */
DF_API df_result df_plane_row(df_ctx *ctx, const df_process *p, df_prediction prediction,
                              const df_point *at, double row[2]);
/* Coefficients of any conversion: to = cx x + cp from. SINGULAR where x and `from` do not
   determine `to` (alpha = 0 for eps, sigma = 0 for x_0, ...), or so badly that its terms
   would be 1/epsilon of df_real times the result. */
DF_API df_result df_plane_map(df_ctx *ctx, const df_process *p, df_prediction from,
                              df_prediction to, const df_point *at, double *cx,
                              double *cp);
/* The conversion applied: x, in, out [n, dim], t [n]; out may be in. */
DF_API df_result df_plane_convert(df_ctx *ctx, const df_process *p, df_prediction from,
                                  df_prediction to, const double *t, int n, int dim,
                                  const df_real *x, const df_real *in, df_real *out);

/* ---- models: one question ----------------------------------------------------------- */

typedef enum df_ask {
    DF_ASK_PREDICT = 1,      /* out [n, dim]: the prediction */
    DF_ASK_JVP = 2,          /* out [n, dim]: (d prediction/dx) v, row by row */
    DF_ASK_VJP = 4,          /* out [n, dim]: v^T (d prediction/dx) */
    DF_ASK_LOG_DENSITY = 8,  /* out [n]: log p_t(x) */
    DF_ASK_MAP = 16          /* out [n, dim]: where the flow takes x at t_to (consistency
                                models, t_to = 0 or the grid's end; CTM, MeanFlow: any) */
} df_ask;

/* What stands behind the prediction in each row of an answer to PREDICT, which then is
   [n, 2 dim]: the variance of ddpm's noise, element by element. */
typedef enum df_learned {
    DF_LEARNED_NONE,         /* nothing: rows are [dim] */
    DF_LEARNED_VARIANCE,
    DF_LEARNED_LOG_VARIANCE,
    DF_LEARNED_RANGE         /* v: log variance (v + 1)/2 of the way from SMALL to LARGE
                                (Nichol & Dhariwal 2021, eq. 15; DiT) */
} df_learned;

/* "Here is x at these points: what do you predict?" Every pointer is valid for the call
   only. */
typedef struct df_query {
    df_ask ask;
    int n, dim;
    const df_real *x;        /* [n, dim], times the model's input scale if it has one */
    const df_real *v;        /* [n, dim] for JVP and VJP, else NULL */
    const double *t;         /* [n] our time */
    const double *alpha;     /* [n] */
    const double *sigma;     /* [n] */
    const df_real *t_model;  /* [n] the model's native time */
    const double *t_to;      /* [n] MAP: our time to go to, else NULL */
    const double *alpha_to, *sigma_to;    /* [n] there */
    const df_real *t_model_to;            /* [n] */
    int same_time;           /* 1: all rows stand at the same point */
    uint64_t first_sample;   /* index of row 0's sample; row r is sample first + r mod
                                samples */
    int samples;             /* n, or n/2 for a stacked question of guidance */
    int step;                /* sampler's step from 0, or -1 */
    const int *labels;       /* [n], -1 none; NULL: no labels at all */
    const df_real *condition;      /* NULL, or that of sample i (row r: i = r mod samples)
                                      at condition + i * condition_stride: a net reads
                                      df_net_condition(net) numbers there */
    size_t condition_stride;       /* elements; 0: one condition for all rows */
} df_query;

/* Answers q into out. Runs on the caller's thread. 0 is fine; anything else ends the work
   and comes back unchanged. */
typedef int (*df_predict_fn)(void *self, df_ctx *ctx, const df_query *q, df_real *out);

/* A network, a closed form, a user's code, guidance over other models: all are this. */
typedef struct df_model {
    uint32_t cookie;         /* set by df_model_defaults */
    df_predict_fn predict;   /* may be NULL where only the ask/answer loop is used */
    void *self;              /* handed to predict; must outlive the model's use */
    int dim;                 /* elements of one sample */
    unsigned answers;        /* DF_ASK_... or-ed [PREDICT] */
    df_process process;      /* [flow] */
    df_prediction prediction;      /* [velocity] */
    df_time time;            /* what t_model holds [our t] */
    df_time clock;           /* the clock of its velocity: dx/d clock; 1-t flips the sign
                                [our t] */
    double input_sigma_data; /* s > 0: x is scaled by 1/sqrt(alpha^2 s^2 + sigma^2), EDM's
                                c_in; 0 off [0] */
    int max_batch;           /* most rows of one question; 0: any [0] */
    int stackable;           /* 1: a question may hold a sample twice, with other labels
                                [1] */
    df_learned learned;      /* PREDICT's rows hold a variance too [NONE] */
    int null_label;          /* the label that means "no class" in classifier-free guidance
                                [-1] */
    /* the model's data = mean + scale * x, applied where samples enter or leave; NULL:
       none. Arrays of 1 (scaling_size 1) or dim elements that must outlive the model. */
    const double *mean;
    const double *scale;
    int scaling_size;
} df_model;
DF_API df_model df_model_defaults(void);
/* Asks a model at given times: fills the query (native time, input scale), splits by
   max_batch. x, v [n, dim], t [n], labels [n] or NULL, out as `ask` says, in the model's
   own prediction. Not MAP, whose questions come from samplers. */
DF_API df_result df_model_ask(df_ctx *ctx, const df_model *model, df_ask ask,
                              const double *t,
                              int n, const df_real *x, const df_real *v, const int *labels,
                              df_real *out);

/* ---- samplers ----------------------------------------------------------------------- */

typedef struct df_sample_desc df_sample_desc;
typedef struct df_stage df_stage;

/* One draw of a sampler, n samples of dim numbers: out [n, dim]. */
typedef struct df_noise_query {
    uint64_t seed, first_sample;
    uint32_t draw;           /* 0: the start; 1, 2, ... in the order a sampler draws */
    int step;                /* -1 at the start */
    int n, dim;
    df_point from, to;       /* the stretch of the path this noise belongs to */
} df_noise_query;
/* Where noise comes from. Failure comes back unchanged. NULL: df_random_normal. */
typedef struct df_noise {
    int (*fill)(void *user, const df_noise_query *q, df_real *out);
    void *user;
} df_noise;

/* Noise sources to put into df_sample_desc.noise; each borrows what it is made of. */
/* One Brownian path W(s) for each sample, s = sigma/(alpha + sigma) in [0, 1], by midpoint
   bridges down to 2^-32: the noise of a stretch is its increment over the root of its
   length. The same path whatever the number of steps; ancestral methods and the family's
   converge along it. Two draws of one stretch are the same; Langevin steps, churn and
   restarts have none, theirs are ordinary draws. */
DF_API df_noise df_noise_brownian(void);
/* Recorded draws: draws [count, size], size = n dim, the start (unless given) first. More
   than count, or of another size: an error. used: 0 at first, and to play them again. */
typedef struct df_replay {
    const df_real *draws;
    int count, used;
    size_t size;
} df_replay;
DF_API df_noise df_noise_replay(df_replay *replay);
/* What torch.randn draws on a CPU, call after call: the same numbers as a script in
   PyTorch with manual_seed. Batch-coupled, as there. */
typedef struct df_torch_random {
    uint32_t state[624];     /* MT19937 (Matsumoto & Nishimura 1998) */
    int at;
    int spare;               /* 1: `kept` is a number not handed out yet */
    double kept;
} df_torch_random;
DF_API void df_torch_seed(df_torch_random *random, uint64_t seed);
DF_API void df_torch_randn(df_torch_random *random, size_t n, df_real *out);
/* The 32 bits under all of torch's numbers: rand is their lowest 24 over 2^24, randint(n)
   their rest modulo n, randperm swaps i and i + bits mod (n - i). */
DF_API uint32_t df_torch_bits(df_torch_random *random);
DF_API df_noise df_noise_torch(df_torch_random *random);

typedef struct df_step_info {
    int step, steps;         /* finished steps (0: the start), and all */
    df_point at;             /* where x now stands */
    int n, dim;
    const df_real *x;        /* [n, dim] in the model's coordinates */
    const df_real *x0;       /* [n, dim] the last estimate of x_0; NULL at step 0 */
    int evaluations;         /* questions so far; guidance asks its models twice for one */
} df_step_info;

typedef enum df_start {
    DF_START_NOISE,          /* fresh noise sigma(t_max) z; the mean, alpha E[x_0],
                                is left out */
    DF_START_GIVEN,          /* x holds the state at the grid's first point, in the model's
                                units */
    DF_START_DATA            /* x holds data: noised to t_max first (img2img) */
} df_start;
typedef enum df_end {
    DF_END_DATA,             /* the grid's last point is the data point */
    DF_END_T_MIN             /* ... is t_min */
} df_end;
typedef enum df_points { DF_POINTS_T, DF_POINTS_RHO, DF_POINTS_LAMBDA } df_points;

/* Standard deviation of ddpm's noise. */
typedef enum df_variance {
    DF_VARIANCE_OWN,         /* the model's, if it predicts one; else SMALL */
    DF_VARIANCE_SMALL,       /* the posterior's (fixed_small), right for one point */
    DF_VARIANCE_LARGE,       /* beta's (fixed_large), right for N(0, I) */
    DF_VARIANCE_ANALYTIC     /* the best of all for this model (Bao et al. 2022, theorem
                                1), from df_sample_desc.eps2 */
} df_variance;
/* What eta counts. All are turned into keep = e^-(eta^2 h) of the family, the part of the
   old noise that a step keeps, h = lambda_t - lambda_s. */
typedef enum df_eta {
    DF_ETA_OWN,              /* the method's own convention */
    DF_ETA_FAMILY,           /* e^-(eta^2 h): 1 the reverse SDE; SA-Solver's tau */
    DF_ETA_DDIM,             /* keep^2 = 1 - eta^2 (1 - e^-2h): DDIM, k-diffusion's
                                ancestral steps, which aim below t and so draw less where
                                that lies below the process's end (VE); at most 1 */
    DF_ETA_LINEAR,           /* e^-(eta h): k-diffusion's 2m_sde, 3m_sde */
    DF_ETA_STRAIGHT          /* towards s_t + eta (s_t/s_s - 1) s_t, s = sigma/(alpha +
                                sigma): ancestral steps on rectified flow; at most 1 */
} df_eta;
/* The weight of the slope in formulas of two nodes, z = h (ODE). EXACT is the integral of
   the line through them; the others differ at third order. */
typedef enum df_slope {
    DF_SLOPE_OWN,            /* the method's own */
    DF_SLOPE_EXACT,          /* phi_2: "heun", "taylor", "vary_coeff" of the libraries */
    DF_SLOPE_BH1,            /* z/2 (UniPC's bh1; SA-Solver) */
    DF_SLOPE_BH2             /* (1 - e^-z)/2 ("midpoint", "dpmsolver", bh2) */
} df_slope;
/* Orders of the last steps of methods with history. Into sigma = 0 order 1, always. */
typedef enum df_final {
    DF_FINAL_OWN,            /* LOWER below 15 steps and for unipc, else KEEP */
    DF_FINAL_KEEP,
    DF_FINAL_EULER,          /* the last step is of order 1 */
    DF_FINAL_LOWER           /* at most the number of steps left */
} df_final;

/* Where libraries differ from what is right, or from what can be split into batches, and
   their figures are wanted all the same. Or-ed into df_sample_desc.compat. */
enum {
    /* Third order with history: the second difference without its factor 2, hence order 2
       (DPM-Solver's code, diffusers, k-diffusion 3m_sde). */
    DF_COMPAT_HALF_D2 = 1,
    /* sde-dpmsolver++ of order 3: its term's 1/2 has the wrong sign (diffusers). */
    DF_COMPAT_SIGN_D2 = 2,
    /* Third order in blocks: the middle stage takes 1/2 for phi_2 (diffusers). */
    DF_COMPAT_BLOCK_HALF = 4,
    /* Churn after the question: the answer at sigma is read as if given at sigma_hat
       (diffusers' Euler, EDMEuler). */
    DF_COMPAT_CHURN_LATE = 8,
    /* A step of length T/N, in whole entries, whatever the grid (diffusers' DDIM, PNDM;
       issues 11347, 12633). */
    DF_COMPAT_STEP_BACK = 16,
    /* ddim: x_0 is clipped, eps is not (diffusers without use_clipped_model_output). */
    DF_COMPAT_KEEP_EPS = 32,
    /* euler_maruyama: dt = 1/N whatever the grid (score_sde). */
    DF_COMPAT_DT = 64,
    /* Langevin steps 2 (snr |z|/|score|)^2 by norms of each sample, or by their mean over
       the batch (score_sde, diffusers' ScoreSdeVe: batch-coupled). */
    DF_COMPAT_NORM_SAMPLE = 128,
    DF_COMPAT_NORM_BATCH = 256,
    /* ... times alpha^2 of the table's entry over that of the one before (score_sde VP);
       annealed_langevin leaves x as it is between levels and does not step at the last. */
    DF_COMPAT_SCORE_SDE = 512,
    /* Adaptive steps for the whole batch at once: error as its root mean square
       (k-diffusion), or as the largest sample's, with DPM-Solver's step rule. Coupled. */
    DF_COMPAT_ERROR_BATCH = 1024,
    DF_COMPAT_ERROR_MOST = 2048,
    /* ddpm: noise in the step into sigma = 0 too (diffusers, LARGE and learned, where the
       last entry asked is not 0; RANGE then begins at a variance of 1e-20). */
    DF_COMPAT_LAST_NOISE = 4096,
    /* df_grid: t_min is shifted before the points are set, and they are shifted again, so
       that the last step begins far above t_min (diffusers' FlowMatchEuler). */
    DF_COMPAT_DOUBLE_SHIFT = 8192,
    /* Noise drawn on the way to a point inside a step is no part of the noise at its end
       (k-diffusion's dpmpp_sde with independent draws, diffusers' singlestep): order 1. */
    DF_COMPAT_STAGE_NOISE = 16384
};

/* What sampling needs to know. df_sample_defaults gives the values in brackets. */
struct df_sample_desc {
    uint32_t cookie;
    const char *method;      /* a sampler's name or alias ["ddim"] */
    const struct df_sampler_row *row; /* a sampler of your own instead [NULL] */
    int steps;               /* N, at least 1; adaptive methods take what they need [50] */
    /* the grid: see df_grid */
    const char *grid;        /* a rule's name ["uniform"] */
    double grid_rho;         /* exponent of karras and polyexponential; 0: the rule's own,
                                7 and 1 [0] */
    int grid_offset;         /* added to table indices by "leading" [0] */
    double shift;            /* resolution shift: sigma/alpha times this [1] */
    double t_max, t_min;     /* t_min: of rules that cannot reach the data, and of end =
                                T_MIN; < 0: df_process_t_min [1, -1] */
    df_end end;              /* [DATA] */
    const double *points;    /* a grid of your own, decreasing towards the data [NULL] */
    int points_count;        /* N + 1 */
    df_points points_in;     /* their unit: t, sigma/alpha or lambda [T] */
    int inverse;             /* 1: the grid backwards, from data (given in x, in the data's
                                units, as x_t at its last point, which must have sigma >
                                0) to noise, in the model's; ODE methods and start GIVEN
                                [0] */
    int restarts;            /* K > 0 (0 is 2 for the method "restart"): after the first
                                point at or below restart_min, K times back up to
                                restart_max by fresh noise and down again in restart_steps
                                (Xu et al. 2023, alg. 1) [0] */
    int restart_steps;       /* [4] */
    double restart_min, restart_max;  /* in sigma/alpha [.06, .3] */
    /* the method */
    int order;               /* of methods that have several: up to the row's most_order
                                and the number of steps; 0: its own [0] */
    int corrector;           /* nodes of the corrector (UniPC of order p: p + 1), the new
                                one counted, at most 5; 0 none, < 0 the method's own [-1]
                                */
    int predicts;            /* what is taken as a polynomial between steps: DF_X0, DF_EPS
                                (methods with a slope, dpm_adaptive); < 0: its own [-1] */
    df_slope slope;          /* [OWN] */
    df_final final;          /* [OWN] */
    double ratio;            /* where two-stage methods ask inside a step, in (0, 1]; 0
                                the method's own [0] */
    double eta;              /* fresh noise, see the row's eta, eta_in; < 0: own [-1] */
    df_eta eta_in;           /* what eta counts [OWN] */
    double eta_min, eta_max; /* eta acts where sigma/alpha lies inside [0, DBL_MAX] */
    df_variance variance;    /* of "ddpm" [OWN] */
    const double *eps2;      /* [steps] E|eps|^2/dim at the points asked, for ANALYTIC; as
                                df_sample_eps2 measures it, borrowed [NULL] */
    double churn;            /* noise added back before a step of an ODE sampler: gamma =
                                churn over all steps of the run, at most sqrt 2 - 1 (Karras
                                et al. 2022); methods with history begin anew there [0] */
    double churn_min, churn_max;   /* where, in sigma/alpha [0, DBL_MAX] */
    double noise_scale;      /* S_noise: all noise but the start's times this [1] */
    int corrections;         /* Langevin steps before each step (predictor-corrector), and
                                at each level of annealed_langevin, the last one too [0,
                                there 1] */
    double snr;              /* r: Langevin steps of 2 r^2 sigma^2 (Song et al. 2021, alg.
                                4 and 5, without norms) [.16] */
    double langevin_step; /* > 0: this step instead, in units of x^2 (baoab: time) [0] */
    double friction;         /* of baoab, of whose time sigma is the unit [1] */
    double rtol, atol;       /* of adaptive methods and paradigms, atol where alpha + sigma
                                = 1; 0: their own, .05 and .0078, rk45 1e-5 both,
                                paradigms atol 1e-3 and no rtol [0, 0] */
    int window;              /* of paradigms: points asked at once, at least 1 [8] */
    double clip;             /* > 0: x_0 is clipped to [-clip, clip], eps anew [0] */
    double threshold;        /* > 0: dynamic thresholding (Saharia et al. 2022): s = this
                                quantile of |x_0| in each sample, held between ... [0] */
    double threshold_min, threshold_max;  /* ...; x_0 = clip(x_0, -s, s)/s [1, DBL_MAX] */
    unsigned compat;         /* DF_COMPAT_... [0] */
    const struct df_v3_statistics *statistics;  /* of dpm_solver_v3, borrowed [NULL] */
    /* which samples */
    df_start start;          /* [NOISE] */
    uint64_t seed;           /* [0] */
    uint64_t first_sample;   /* sample i of this call is sample first_sample + i of the
                                seed [0] */
    df_noise noise;          /* [Philox] */
    const int *labels;       /* [n] or NULL, borrowed */
    const df_real *condition;      /* see df_query, borrowed */
    size_t condition_stride;
    /* at the start (step 0) and after each step; not 0 ends the work and comes back */
    int (*on_step)(void *user, const df_step_info *info);
    /* the same, and may change x [n, dim]: inpainting puts the known part back, noised to
       info->at. Before on_step. Inside a block (dpm_solver_2, _3, dpmpp_2s, _3s) x is a
       stage of a longer step, and what is done to it there is lost with it. */
    int (*edit)(void *user, const df_step_info *info, df_real *x);
    void *user;
    df_real *trajectory;     /* [points of df_grid, n, dim] receives x at the start and
                                after each step, in the model's coordinates (adaptive
                                methods and paradigms are one step; Langevin dynamics has
                                steps + 1 points); borrowed [NULL] */
};
DF_API df_sample_desc df_sample_defaults(void);

/* Where grids end when they may not touch the data: t with sigma/alpha about .002 (EDM),
   1e-3 (VP, sub-VP, cosine, flow, trig), 0 (VE), 1/T (table). */
DF_API double df_process_t_min(const df_process *p);
/* The points a descriptor means, decreasing in t, from t_max to the data point (or t_min).
     "uniform"          t equally spaced
     "quadratic"        sqrt t equally spaced
     "lambda"           lambda equally spaced (also called "exponential")
     "karras"           (sigma/alpha)^(1/rho) equally spaced (Karras et al. 2022, eq. 5)
     "polyexponential"  ((log rho - log rho_min)/range)^(1/p) equally spaced
     "linspace", "leading", "trailing"   indices of a table, as diffusers' DDPM spaces them
   A rule that can reach the data point itself does so in N steps; the others take N points
   down to t_min and add it. Index rules need t_max = 1 and N <= T; with end = T_MIN they
   add entry 0 unless it is there. The shift leaves pure noise and the last point where
   they are; a list of your own is shifted too. out [capacity], count = points, N + 1 but
   for that case. Errors: ARGUMENT (unknown rule, a list that does not decrease,
   sigma/alpha infinite at t_max where the rule needs it). */
DF_API df_result df_grid(df_ctx *ctx, const df_process *p, const df_sample_desc *desc,
                         df_point *out, int capacity, int *count);
DF_API const char *const *df_grid_names(int *count);

/* n samples: x [n, dim]. The whole loop over the sampler below. Samples leave in the
   data's units (df_model's mean and scale undone). Errors: any of those below; NONFINITE
   when the model answers NaN or Inf (which step, which sample). On failure x holds the
   state that was reached, in the model's units; after a wrong argument it is as it was.
   desc may be NULL: the defaults. Callbacks
   run on the caller's thread and may use the context, for another df_sample too; they may
   not free what is in use. */
DF_API df_result df_sample(df_ctx *ctx, const df_model *model, const df_sample_desc *desc,
                           df_real *x, int n);

/* The same loop turned inside out, for hosts that cannot block in a callback. The sampler
   borrows x, the context and what the descriptor borrows; it copies model, descriptor,
   names. */
typedef struct df_sampler df_sampler;
DF_API df_sampler *df_sampler_create(df_ctx *ctx, const df_model *model,
                                     const df_sample_desc *desc, df_real *x, int n);
/* 1: q is a question, answer it; 0: finished, or failed (df_sampler_result tells). q and
   what it points to stay valid until the answer. Asking again before answering repeats the
   question. */
DF_API int df_sampler_next(df_sampler *s, df_query *q);
/* The answer to the last question: PREDICT [q.n, q.dim] in the model's prediction, or
   [q.n, 2, q.dim] with a variance behind each row if model.learned; MAP [q.n, q.dim]
   samples; LOG_DENSITY [q.n]. NULL ends the run. q.n may exceed max_batch, which is not
   applied here. */
DF_API df_result df_sampler_answer(df_sampler *s, const df_real *out);
DF_API df_result df_sampler_result(const df_sampler *s);
/* Steps done, all steps and questions asked so far (each may be NULL). */
DF_API void df_sampler_progress(const df_sampler *s, int *step, int *steps,
                                int *evaluations);
DF_API void df_sampler_free(df_sampler *s);

/* The registry: a sampler is a row and one short stage function. Public, for menus. */
typedef enum df_clock {
    DF_CLOCK_RHO,    /* walks lambda or sigma/alpha: one path on every process */
    DF_CLOCK_T,      /* walks t, or x in its own units: differs between processes */
    DF_CLOCK_STOPPED /* stays at t_max: Langevin dynamics on p_t for `steps` steps;
                                no grid, no data end */
} df_clock;
enum { DF_BUFFERS = 8, DF_STAGE_NUMBERS = 16, DF_PAST = 4, DF_OWN = 12 };
typedef enum df_next { DF_NEXT_ASK, DF_NEXT_STEP, DF_NEXT_FAIL } df_next;
typedef df_next (*df_stage_fn)(df_stage *s);
typedef struct df_sampler_row {
    const char *name;
    const char *aliases;     /* separated by blanks */
    const char *source;      /* paper */
    df_clock clock;
    int order;               /* what `order` 0 means; of ODE methods the global order of
                                accuracy with exact history, to which unipc's corrector
                                adds one; 0: no method of fixed order */
    int start_order;         /* ... with its own start-up and corrector; of stochastic
                                methods the weak order */
    int evaluations;         /* questions per step (into sigma = 0: one) without start-up
                                and last level; 0: adaptive */
    int stochastic;          /* draws noise (with default settings) */
    int from_alpha0;         /* may start where alpha = 0 */
    int to_sigma0;           /* may end where sigma = 0 */
    int evaluates_end;       /* asks at the step's end (not at sigma = 0) */
    int batch_coupled;       /* a sample depends on its neighbours in the batch: never
                                here, but under compat NORM_BATCH, ERROR_BATCH, ERROR_MOST
                                */
    int most_order;          /* orders 1 .. most_order can be asked for; 0: it has one */
    double eta, eta_max;     /* its own eta, and the most it takes; 0, 0: it has none */
    df_eta eta_in;           /* its own convention; OWN: it has none */
    int ancestral;           /* eta by going down further, then up by fresh noise */
    df_prediction wants;     /* what answers are converted to */
    df_ask asks;             /* its first question: PREDICT (or 0) or MAP */
    int whole;               /* takes the whole grid as one step */
    int buffers;             /* [n, dim] arrays it needs, at most DF_BUFFERS */
    int corrector;           /* its own, see the descriptor; -1: it has none */
    df_slope slope;          /* its own; OWN: it has no such choice */
    double ratio;            /* its own; 0: it has none */
    df_stage_fn stage;
} df_sampler_row;
DF_API const df_sampler_row *df_sampler_rows(int *count);
/* By name or alias; NULL if unknown (ctx, unless NULL, then holds a sentence with the
   nearest names). */
DF_API const df_sampler_row *df_sampler_find(df_ctx *ctx, const char *name);

/* What a stage function sees. Before its first call in a step the library has asked at
   (x, from); the function combines, then says DF_NEXT_STEP (x now stands at `to`), or sets
   up a further question with df_stage_ask and says DF_NEXT_ASK. */
struct df_stage {
    df_ctx *ctx;
    const df_sample_desc *desc;    /* the row's own values where the user left them open */
    const df_process *process;
    const df_sampler_row *row;
    int n, dim;
    int step, steps;         /* this step, from 0, and their number */
    int call;                /* answers seen in this step: 1, 2, ... */
    df_point from, to;       /* the step's ends (from: after churn; to: before the noise of
                                ancestral methods) */
    df_point at;             /* where the last question was asked */
    const df_point *grid;    /* [points + 1] all of it */
    int points;
    df_point past[DF_PAST];  /* where the steps before this one began, the last first */
    int known;               /* ... how many of them, unbroken by a restart */
    df_real *x;              /* [n, dim] the state */
    const df_real *asked;    /* [rows, dim] the array the last question was about */
    df_real *answer;         /* [rows, dim] the answer, as row->wants; LOG_DENSITY [n] */
    df_real *variance;       /* [n, dim] what the model says of it, or NULL */
    df_real *unclipped;      /* [n, dim] x_0 before clipping, under COMPAT_KEEP_EPS */
    df_real *buffer[DF_BUFFERS];          /* [n, dim], kept from step to step; NULL from
                                             row->buffers on */
    double number[DF_STAGE_NUMBERS];      /* kept from step to step, 0 at the start */
    double *own;             /* [n, DF_OWN] numbers of each sample, 0 at the start */
    df_point *each;          /* [rows] where each row of df_stage_ask_each stands */
    int rows;                /* most of them: n, or n desc->window for paradigms */
    df_real *wide[2];        /* [rows + n, dim] for paradigms, else NULL */
};
/* Next question: the model at `at` on array x ([n, dim], s->x or a buffer). */
DF_API df_next df_stage_ask(df_stage *s, const df_point *at, const df_real *x);
/* ... each row at its own point, s->each [rows], x [rows, dim]; rows a multiple of n. */
DF_API df_next df_stage_ask_each(df_stage *s, int rows, const df_real *x);
/* ... the map of x from `at` to `to`: answered with a sample there. */
DF_API df_next df_stage_ask_map(df_stage *s, const df_point *at, const df_point *to,
                                const df_real *x);
/* ... log p_t(x): answer [n]. */
DF_API df_next df_stage_ask_density(df_stage *s, const df_point *at, const df_real *x);
/* out = sum_j c[j] a[j], count <= 8 arrays [n, dim]; out may be among them. */
DF_API void df_stage_combine(df_stage *s, df_real *out, int count, const double *c,
                             const df_real *const *a);
/* Fresh noise times noise_scale into out [n, dim]. Not 0: say DF_NEXT_FAIL. */
DF_API df_result df_stage_noise(df_stage *s, df_real *out);
/* Rates of the process at a point, with the sampler's name in the error. */
DF_API df_result df_stage_rates(df_stage *s, const df_point *at, unsigned want,
                                df_rates *out);

/* E|eps|^2/dim over data x [n, dim], in the data's units, noised to each point that `desc`
   asks at: out [steps], for DF_VARIANCE_ANALYTIC. */
DF_API df_result df_sample_eps2(df_ctx *ctx, const df_model *model,
                                const df_sample_desc *desc, const df_real *x, int n,
                                double *out);
/* DPM-Solver-v3's model statistics (Zheng et al. 2023, eq. 5, 8, 11): l, s, b [count, dim]
   at lambda [count], rising. Measured along n trajectories of the ODE with the
   descriptor's grid; the divergence by JVP where the model answers it, else by central
   differences; labels and condition are those of n samples. NULL on failure. */
typedef struct df_v3_statistics {
    int count, dim;
    double *lambda;          /* [count] */
    double *l, *s, *b;       /* [count, dim] */
} df_v3_statistics;
DF_API df_v3_statistics *df_v3_estimate(df_ctx *ctx, const df_model *model,
                                        const df_sample_desc *desc, int n);
DF_API void df_v3_free(df_ctx *ctx, df_v3_statistics *statistics);

/* ---- guidance ----------------------------------------------------------------------- */

/* Classifier-free guidance (Ho & Salimans 2022) as a model made of a model:
   out = uncond + scale (cond - uncond), in the model's own prediction; scale 1 is off and
   costs one evaluation. cond asks with the query's labels, uncond with null_label, or
   another model (same dim, process, prediction, times) without labels. Beside "1 is off"
   libraries use "0 is off" with s = scale - 1. */
typedef struct df_guidance {
    uint32_t cookie;
    const df_model *model;   /* must outlive the guidance, and that the guided model */
    const df_model *uncond;  /* NULL: `model` with null_label, the condition as it is. For
                                a net taught with a condition give the model itself: it is
                                then asked with neither label nor condition, as
                                label_dropout taught it [NULL] */
    double scale;            /* [1] */
    int guided;              /* leading elements of each answer that are guided, the others
                                are cond's; 0: all. DiT guides 3 channels, even of 4. A
                                learned variance is cond's, uncond's for scale 0 [0] */
} df_guidance;
DF_API df_guidance df_guidance_defaults(void);
/* The guided model. Where model may be stacked and its max_batch allows, one question of
   2n rows. */
DF_API df_model df_guidance_model(df_guidance *guidance);

/* ---- likelihood --------------------------------------------------------------------- */

/* How the divergence of the ODE's field is had, from the model's JVPs (central differences
   of its predictions, if it answers none). */
typedef enum df_trace {
    DF_TRACE_EXACT,          /* sum_j e_j^T J e_j: dim JVPs for each prediction */
    DF_TRACE_RADEMACHER,     /* mean of v^T J v over `probes` vectors of random signs
                                (Hutchinson 1989); exact where J is diagonal */
    DF_TRACE_GAUSSIAN        /* ... of N(0, I) numbers (Skilling 1989) */
} df_trace;

typedef struct df_likelihood_desc {
    uint32_t cookie;
    df_sample_desc walk;     /* how the ODE is walked, seed and first_sample of the probes,
                                labels, condition: any method without noise; no clip or
                                threshold. Its x (on_step, edit, trajectory) has dim + 1
                                numbers: at (alpha, sigma) the last one is (alpha + sigma)
                                times what log p of r = x/(alpha + sigma) has gained since
                                the start [of df_sample_defaults, but rk45, end T_MIN] */
    df_trace trace;          /* [EXACT] */
    int probes;              /* vectors a sample, fixed along its path [1] */
    /* log p of x [n, dim], in the model's units, at the noise end `at`, into out [n]; not
       0 ends the work and comes back. NULL: N(0, sigma^2 I), as samplers start, whatever
       of the data may be left there */
    int (*log_prior)(void *user, const df_point *at, int n, const df_real *x, double *out);
    void *user;
    df_real *latent;         /* [n, dim] x at the noise end, the model's units [NULL] */
    double *prior;           /* [n] log_prior there [NULL] */
    int *evaluations;        /* predictions asked for, each with its JVPs [NULL] */
} df_likelihood_desc;
DF_API df_likelihood_desc df_likelihood_defaults(void);
/* log p(x) in nats, of x [n, dim] in the data's units, into out [n]: the density of what
   the ODE brings from the prior to t_min, where sigma is small but not 0,
       log p(x) = log prior(x_T) + int div(dx/dt) dt
   (Chen et al. 2018; Song et al. 2021, eq. 39, 40), for every process and prediction.
   Tolerances are walk.rtol and atol [1e-5]. A sample gets the same bits alone, in a batch
   and split. desc may be NULL: the defaults. Errors: df_sample's; NONFINITE (which
   sample); ARGUMENT. */
DF_API df_result df_log_likelihood(df_ctx *ctx, const df_model *model,
                                   const df_likelihood_desc *desc, const df_real *x, int n,
                                   double *out);
/* The other way: samples into x [n, dim], from fresh noise (df_sample's, by walk.noise) or
   from x as given (walk.start GIVEN, the model's units), with their log p(x) into out. */
DF_API df_result df_sample_likelihood(df_ctx *ctx, const df_model *model,
                                      const df_likelihood_desc *desc, df_real *x, int n,
                                      double *out);

/* The evidence lower bound, term by term. */
typedef struct df_bound_desc {
    uint32_t cookie;
    df_sample_desc walk;     /* the grid (its points of sigma > 0: x_T .. x_1), `variance`
                                and eps2, seed, first_sample, labels, condition; nothing
                                else [df_sample_defaults: 50 steps, uniform, end DATA] */
    int continuous;          /* 1: T = infinity, between the grid's ends [0] */
    int draws;               /* noises for each term and sample; continuous: points of
                                lambda, one in each of so many equal parts [1] */
    int levels;              /* > 1: data are low + k (high - low)/(levels - 1), and x_1 is
                                decoded to one of these; 0: to a density [0] */
    double low, high;        /* [-1, 1] */
    double *terms;           /* [n, T + 1], or [n, 3] if continuous: see below [NULL] */
} df_bound_desc;
DF_API df_bound_desc df_bound_defaults(void);
/* log p(x) >= out - noise of the draws, in nats; x [n, dim] in the data's units, out [n] =
   minus the sum of its terms (and of log scale, if x has a density):
     prior    KL(q(x_T|x) || N(0, sigma_T^2 I)) = alpha_T^2 |x|^2/(2 sigma_T^2)
     T - 1    KL(q(x_{i-1}|x_i, x) || p(x_{i-1}|x_i)), i from T down, p having x_0
              predicted and ddpm's variance: small, large, learned, analytic
     decoder  -log p(x|x_1): N(x_0 predicted, v), or its mass between the middles to x's
              neighbours, the outer levels taking all beyond. v is LARGE (VP: beta_1) for
              SMALL too, but on a table SMALL is that of the step before, as in DDPM, if
              there is one: about sigma_1^2 (1 - e^(-2h)), h its step in lambda, and where
              steps may be short that is far less than the error of x_0, about sigma_1^2
   (Ho et al. 2020, eq. 5, 13; Nichol & Dhariwal 2021). continuous: prior, int |eps - eps
   predicted|^2 d lambda, decoder with LARGE (Kingma et al. 2021, eq. 15; their log SNR is
   2 lambda). Noise: draw 1 + (term - 1) draws + k of the sample, term 0 the prior; where
   in its part lambda k lies: draw 0x38000000 + k. Errors:
   ARGUMENT; SINGULAR (lambda infinite at t_max if continuous); NONFINITE (which sample);
   those of df_grid and df_model_ask. */
DF_API df_result df_variational_bound(df_ctx *ctx, const df_model *model,
                                      const df_bound_desc *desc, const df_real *x, int n,
                                      double *out);

/* Bits per dimension of log p in nats: -nats/(dim ln 2) - log2(bin). bin: the width of a
   level in the data's units, 1/256 on [0, 1] (8 bits more), 2/256 on [-1, 1] (7); 1 for
   what is a probability already (a bound with levels). */
DF_API double df_bits_per_dim(double nats, int dim, double bin);
/* Levels k [n, dim] of 0 .. 255 to low + (k + u) w, w = (high - low)/256, u uniform on (0,
   1): log P(k) >= E log p of that + dim log w, df_bits_per_dim's bin (Theis et al. 2016).
   Stream (seed, first + i, draw 0x30000000). */
DF_API void df_dequantize(uint64_t seed, uint64_t first, int n, int dim,
                          const unsigned char *levels, double low, double high,
                          df_real *out);

/* ---- tensors ------------------------------------------------------------------------ */

#define DF_AXES 5

/* A contiguous array of up to 5 axes, last axis fastest, PyTorch's order: images
   [B,C,H,W], tokens [B,T,C]. Lives in its context's step memory until the scope it was
   made in ends. */
typedef struct df_tensor df_tensor;
struct df_tensor {
    df_real *data;           /* [size] */
    df_real *grad;           /* [size] d loss/d this, after df_backward; NULL if none was
                                asked for */
    df_tensor *tangent;      /* forward mode: its tangent, or NULL for zero */
    size_t size;             /* product of shape */
    int ndim;                /* 0 (a number) .. 5 */
    int shape[DF_AXES];      /* entries from ndim on are 1 */
    int needs_grad;
    /* the tape: how it was made (private) */
    const struct dfi_op *op;
    df_tensor *in[3];
    df_tensor *before;       /* the tensor recorded before this one */
    int arg[8];
    double number[2];
    const void *extra;
};

/* Tensor operations are sticky: after a failure they do nothing and return NULL, and NULL
   in is NULL out, so that a graph is checked once, at its end (df_ctx_error). df_ctx_clear
   resumes. Shapes broadcast as in NumPy: aligned at the last axis, 1 stretches. */

/* Step memory is a stack. A scope's end releases all that was made in it but y (NULL:
   nothing is kept), values and tangent, which moves: use the pointer returned. While
   recording, scopes keep everything. */
typedef struct df_scope { void *block; size_t used; } df_scope;
DF_API df_scope df_scope_begin(df_ctx *ctx);
DF_API df_tensor *df_scope_end(df_ctx *ctx, df_scope scope, df_tensor *y);

/* Recording. Between begin and end every operation on a tensor that needs a gradient goes
   on the tape. backward fills the gradients of all of them; loss must be one number. */
DF_API void df_record_begin(df_ctx *ctx);
DF_API df_result df_backward(df_ctx *ctx, df_tensor *loss);
DF_API void df_record_end(df_ctx *ctx);
/* Forward mode: df_set_tangent gives x a tangent; what is computed from x has one, itself
   recorded, so that its gradient can be taken (reverse over forward). NULL removes it. */
DF_API df_result df_set_tangent(df_ctx *ctx, df_tensor *x, df_tensor *tangent);

/* Made from nothing: zeros, a constant, a copy, one number; a leaf that borrows `data`
   and, if grad is not NULL, adds its gradient there (weights). shape [ndim]. */
DF_API df_tensor *df_tensor_new(df_ctx *ctx, int ndim, const int *shape);
DF_API df_tensor *df_tensor_fill(df_ctx *ctx, int ndim, const int *shape, double value);
DF_API df_tensor *df_tensor_copy(df_ctx *ctx, int ndim, const int *shape,
                                 const df_real *data);
DF_API df_tensor *df_tensor_number(df_ctx *ctx, double value);
DF_API df_tensor *df_tensor_borrow(df_ctx *ctx, int ndim, const int *shape, df_real *data,
                                   df_real *grad);
/* Asks for the gradient of a leaf. */
DF_API df_tensor *df_tensor_need_grad(df_ctx *ctx, df_tensor *x);
/* The same values, not on the tape and without tangent. */
DF_API df_tensor *df_detach(df_ctx *ctx, df_tensor *x);

/* Element by element, broadcasting. */
DF_API df_tensor *df_add(df_ctx *ctx, df_tensor *a, df_tensor *b);
DF_API df_tensor *df_sub(df_ctx *ctx, df_tensor *a, df_tensor *b);
DF_API df_tensor *df_mul(df_ctx *ctx, df_tensor *a, df_tensor *b);
DF_API df_tensor *df_div(df_ctx *ctx, df_tensor *a, df_tensor *b);
/* a x + b */
DF_API df_tensor *df_affine(df_ctx *ctx, df_tensor *x, double a, double b);
DF_API df_tensor *df_scale(df_ctx *ctx, df_tensor *x, double a);               /* a x */
DF_API df_tensor *df_square(df_ctx *ctx, df_tensor *x);
DF_API df_tensor *df_exp(df_ctx *ctx, df_tensor *x);
DF_API df_tensor *df_log(df_ctx *ctx, df_tensor *x);
DF_API df_tensor *df_sqrt(df_ctx *ctx, df_tensor *x);
DF_API df_tensor *df_sin(df_ctx *ctx, df_tensor *x);
DF_API df_tensor *df_cos(df_ctx *ctx, df_tensor *x);
DF_API df_tensor *df_tanh(df_ctx *ctx, df_tensor *x);
DF_API df_tensor *df_sigmoid(df_ctx *ctx, df_tensor *x);
/* x sigmoid(x) */
DF_API df_tensor *df_silu(df_ctx *ctx, df_tensor *x);
/* x Phi(x) */
DF_API df_tensor *df_gelu(df_ctx *ctx, df_tensor *x);
/* tanh approximation */
DF_API df_tensor *df_gelu_tanh(df_ctx *ctx, df_tensor *x);
DF_API df_tensor *df_erf(df_ctx *ctx, df_tensor *x);
DF_API df_tensor *df_relu(df_ctx *ctx, df_tensor *x);
/* 1 where x > 0, else 0 */
DF_API df_tensor *df_step(df_ctx *ctx, df_tensor *x);
/* log(1 + e^x) */
DF_API df_tensor *df_softplus(df_ctx *ctx, df_tensor *x);

/* Sums. axis may count from the end (-1 the last); keep: the axis stays with length 1. */
/* one number */
DF_API df_tensor *df_sum(df_ctx *ctx, df_tensor *x);
DF_API df_tensor *df_mean(df_ctx *ctx, df_tensor *x);
DF_API df_tensor *df_sum_axis(df_ctx *ctx, df_tensor *x, int axis, int keep);
DF_API df_tensor *df_mean_axis(df_ctx *ctx, df_tensor *x, int axis, int keep);

/* Shapes. reshape shares the data; one entry of shape may be -1. permute copies: axis i of
   the result is axis order[i] of x. slice: [start, start+length) of an axis. pad: zeros
   around H and W of [B,C,H,W]. broadcast stretches to a shape. */
DF_API df_tensor *df_reshape(df_ctx *ctx, df_tensor *x, int ndim, const int *shape);
DF_API df_tensor *df_broadcast(df_ctx *ctx, df_tensor *x, int ndim, const int *shape);
DF_API df_tensor *df_permute(df_ctx *ctx, df_tensor *x, const int *order);
DF_API df_tensor *df_concat(df_ctx *ctx, df_tensor *a, df_tensor *b, int axis);
DF_API df_tensor *df_slice(df_ctx *ctx, df_tensor *x, int axis, int start, int length);
DF_API df_tensor *df_pad2d(df_ctx *ctx, df_tensor *x, int top, int bottom, int left,
                           int right);

/* op(a) op(b) over the last two axes, leading axes broadcast; ta, tb transpose. */
DF_API df_tensor *df_matmul(df_ctx *ctx, df_tensor *a, df_tensor *b, int ta, int tb);
/* x [..., in], weight [out, in], bias [out] or NULL -> [..., out]. */
DF_API df_tensor *df_linear(df_ctx *ctx, df_tensor *x, df_tensor *weight, df_tensor *bias);
/* x [B,C,H,W], weight [O,C,kh,kw], bias [O] or NULL -> [B,O,(H+2 pad-kh)/stride+1,
   ...]. */
DF_API df_tensor *df_conv2d(df_ctx *ctx, df_tensor *x, df_tensor *weight, df_tensor *bias,
                            int stride, int pad);
/* [B,C,H,W], nearest */
DF_API df_tensor *df_upsample2x(df_ctx *ctx, df_tensor *x);
/* [B,C,H,W], even H and W */
DF_API df_tensor *df_avg_pool2x2(df_ctx *ctx, df_tensor *x);
/* x [B,C,...]: each of `groups` runs of channels has mean 0, variance 1, then weight [C],
   bias [C] (NULL: none) (Wu & He 2018). */
DF_API df_tensor *df_group_norm(df_ctx *ctx, df_tensor *x, df_tensor *weight,
                                df_tensor *bias,
                                int groups, double eps);
/* Over the last axis C; weight, bias [C] or NULL. rms_norm divides by the root mean
   square. */
DF_API df_tensor *df_layer_norm(df_ctx *ctx, df_tensor *x, df_tensor *weight,
                                df_tensor *bias, double eps);
DF_API df_tensor *df_rms_norm(df_ctx *ctx, df_tensor *x, df_tensor *weight, double eps);
/* last axis */
DF_API df_tensor *df_softmax(df_ctx *ctx, df_tensor *x);
DF_API df_tensor *df_log_softmax(df_ctx *ctx, df_tensor *x);
/* softmax(q k^T / sqrt(D)) v: q [B,H,T,D], k, v [B,H,S,D]; causal: token t sees s <= t. */
DF_API df_tensor *df_attention(df_ctx *ctx, df_tensor *q, df_tensor *k, df_tensor *v,
                               int causal);
/* Rotary positions on the last axis of [B,H,T,D], halves paired (x_i, x_{i+D/2}), angle
   t base^(-2i/D) (Su et al. 2021, who pair neighbours; halves are LLaMA's). */
DF_API df_tensor *df_rotary(df_ctx *ctx, df_tensor *x, double base);
/* Rows ids[i] of table [V,C] -> [n,C]; an id of -1 gives zeros. */
DF_API df_tensor *df_embedding(df_ctx *ctx, df_tensor *table, const int *ids, int n);
/* t [B] -> [B, dim]: [sin(t f_k), cos(t f_k)] (cos first if cos_first), with f_k =
   period^(-k/(half-shift)), k < half = dim/2; an odd dim ends with 0 (after Vaswani et al.
   2017, who interleave; side by side as in DDPM; shift is diffusers' freq_shift). */
DF_API df_tensor *df_sinusoidal(df_ctx *ctx, df_tensor *t, int dim, double period,
                                int cos_first,
                                double shift);
/* x with probability p of each element being 0, the rest scaled by 1/(1-p); stream (seed,
   sample, draw). */
DF_API df_tensor *df_dropout(df_ctx *ctx, df_tensor *x, double p, uint64_t seed,
                             uint64_t sample, uint32_t draw);
/* Losses. cross_entropy: logits [n,V], targets [n] (-1: ignored) -> [n]. mse: mean of
   squares -> number. */
DF_API df_tensor *df_cross_entropy(df_ctx *ctx, df_tensor *logits, const int *targets);
DF_API df_tensor *df_mse(df_ctx *ctx, df_tensor *a, df_tensor *b);

/* ---- files: where bytes come from and go to ----------------------------------------- */

/* A source of bytes: a path, memory, or hooks. Values; strings and memory are borrowed for
   the call that takes them. read returns how many bytes it gave, 0 at the end or on
   failure. */
typedef struct df_source {
    const char *path;        /* not NULL: a file */
    const void *memory;      /* else not NULL: `size` bytes */
    size_t size;
    size_t (*read)(void *user, void *buffer, size_t size); /* else: called until it returns
                                                              0 */
    void *user;
    const char *name;        /* what error messages call it; NULL: the path */
} df_source;
DF_API df_source df_source_path(const char *path);
DF_API df_source df_source_memory(const void *memory, size_t size);
DF_API df_source df_source_hooks(size_t (*read)(void *user, void *buffer, size_t size),
                                 void *user);

/* Bytes in memory from a sink; free with df_buffer_free on the same context. Start with
   zeros. */
typedef struct df_buffer { unsigned char *data; size_t size, capacity; } df_buffer;
DF_API void df_buffer_free(df_ctx *ctx, df_buffer *buffer);

/* A sink of bytes. A path is replaced whole: written beside, flushed to the disk, renamed,
   so that a kill at any moment leaves the old file or the new one. write returns 0 if it
   took all. */
typedef struct df_sink {
    const char *path;
    df_buffer *buffer;       /* else not NULL: appended to */
    int (*write)(void *user, const void *data, size_t size);
    void *user;
} df_sink;
DF_API df_sink df_sink_path(const char *path);
DF_API df_sink df_sink_buffer(df_buffer *buffer);
DF_API df_sink df_sink_hooks(int (*write)(void *user, const void *data, size_t size),
                             void *user);

/* safetensors: u64 header length, JSON header, little-endian data. Input is hostile: every
   size, offset, type and name is checked before use. */
typedef enum df_dtype {
    DF_DTYPE_F32, DF_DTYPE_F64, DF_DTYPE_F16, DF_DTYPE_BF16, DF_DTYPE_I64, DF_DTYPE_I32,
    DF_DTYPE_U8, DF_DTYPE_COUNT
} df_dtype;
typedef struct df_file_tensor {
    const char *name;
    df_dtype dtype;
    int ndim;                /* 0 .. 8 */
    uint64_t shape[8];
    size_t count;            /* product of shape */
    const unsigned char *bytes;    /* little-endian, no alignment promised */
} df_file_tensor;
typedef struct df_safetensors df_safetensors;
/* Reads and checks a whole file. NULL on failure: IO, FORMAT, MEMORY; the message names
   the file and the key. */
DF_API df_safetensors *df_safetensors_open(df_ctx *ctx, df_source source);
DF_API void df_safetensors_close(df_safetensors *file);
DF_API int df_safetensors_count(const df_safetensors *file);
DF_API const df_file_tensor *df_safetensors_at(const df_safetensors *file, int index);
DF_API const df_file_tensor *df_safetensors_find(const df_safetensors *file,
                                                 const char *name);
/* or NULL */
DF_API const char *df_safetensors_metadata(const df_safetensors *file, const char *key);
/* Tensor `name` of exactly this shape, widened or narrowed to df_real, into out. Errors:
   FORMAT (missing, wrong shape or type: the message has both), NONFINITE (NaN or Inf:
   which element). */
DF_API df_result df_safetensors_read(df_ctx *ctx, const df_safetensors *file,
                                     const char *name,
                                     int ndim, const int *shape, df_real *out);
typedef struct df_save_tensor {
    const char *name;
    df_dtype dtype;          /* F32 or F64: what the file holds */
    int ndim;
    int shape[DF_AXES];
    const void *data;        /* df_real */
    int data_is_double;      /* 1: `data` is double whatever df_real is */
} df_save_tensor;
typedef struct df_save_text { const char *key, *value; } df_save_text;
DF_API df_result df_safetensors_write(df_ctx *ctx, df_sink sink,
                                      const df_save_tensor *tensors, int count,
                                      const df_save_text *metadata, int metadata_count);

/* ---- networks ----------------------------------------------------------------------- */

/* A net owns its weights (one array, all parameters in order), their moving average if
   training made one, and a card that says what it predicts, of which process, in which
   time, of data scaled how: enough to sample it. Const nets may be used by several
   contexts at once. */
typedef struct df_net df_net;

typedef struct df_param {
    const char *name;
    int ndim;
    int shape[DF_AXES];
    size_t offset, size;     /* elements within the net's weights */
    int frozen;              /* a table that belongs to the net and is not trained */
} df_param;

typedef enum df_init {       /* how a parameter starts */
    DF_INIT_ZERO, DF_INIT_ONE,
    DF_INIT_FAN_IN,          /* uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's for
                                linear and conv */
    DF_INIT_XAVIER,          /* uniform(+-sqrt(6/(fan_in + fan_out))) (Glorot & Bengio
                                2010) */
    DF_INIT_NORMAL,          /* N(0, 1), PyTorch's embedding */
    DF_INIT_NORMAL_02        /* N(0, .02^2) */
} df_init;

/* One forward pass: which weights, and where their gradients are added. */
typedef struct df_run {
    df_ctx *ctx;
    const df_net *net;
    const df_real *weights;  /* the net's, or its average */
    df_real *grads;          /* same layout, added to by df_backward; NULL: none */
    df_tensor *condition;    /* [B, df_net_condition(net)], or NULL: zeros */
    int training;            /* 1: dropout acts */
    uint64_t seed, draw;     /* of dropout */
} df_run;
/* The average where there is one, no gradients. */
DF_API df_run df_run_defaults(df_ctx *ctx, const df_net *net);

/* A network's body: x [B, shape...], t [B] in the net's native time, labels [B] or NULL ->
   prediction, same shape as x (the nets built in may have other channels, as where a
   variance is learned). */
typedef df_tensor *(*df_forward_fn)(const df_run *run, df_tensor *x, df_tensor *t,
                    const int *labels);

/* div_x of a net's answer, tr(d answer/dx), [B]: exactly, by one tangent for each element
   of a sample, where probe is NULL; else v^T (d answer/dx) v with v = probe [B, shape...],
   whose mean is the divergence where E v v^T = 1 (Hutchinson 1989). y (or NULL) receives
   the answer, NULL on failure. On the tape, so that it may stand in a loss; x must have no
   tangent. */
DF_API df_tensor *df_run_divergence(const df_run *run, df_tensor *x, df_tensor *t,
                                    const int *labels, df_tensor *probe, df_tensor **y);

/* A net of your own: make it, add layers, keep the returned indices in `config`. shape
   [ndim <= 3] of one sample. NULL on failure. */
DF_API df_net *df_net_create(df_ctx *ctx, const char *kind, int ndim, const int *shape,
                             df_forward_fn forward, uint64_t seed);
DF_API void df_net_free(df_net *net);
/* Adds a parameter, filled by `init` (fan_in, fan_out from its shape: [out, in, ...]);
   returns its index, or -1. Names are unique. */
DF_API int df_net_add(df_ctx *ctx, df_net *net, const char *name, int ndim,
                      const int *shape, df_init init);
/* Keeps a parameter as it is: no gradient, no decay, no average. Say it before
   df_trainer_create, and again after loading: checkpoints do not hold it. */
DF_API void df_net_freeze(df_net *net, int index);
/* A net of your own that reads run->condition: how many numbers a sample has there. */
DF_API void df_net_set_condition(df_net *net, int size);
/* A net of your own whose samples are tokens: its forward pass turns them, whole numbers
   [B, shape...], into logits [B, shape..., vocab]. */
DF_API void df_net_set_vocab(df_net *net, int vocab);
/* A slot for one integer of the network's own, such as a width or a parameter's index. */
DF_API void df_net_set(df_net *net, int slot, int value);      /* slot in [0, 64) */
DF_API int df_net_get(const df_net *net, int slot);

/* Layers: "name.weight", "name.bias" are added; returns the weight's index (bias: the
   next). */
DF_API int df_layer_linear(df_ctx *ctx, df_net *net, const char *name, int in, int out,
                           df_init init);
DF_API int df_layer_conv2d(df_ctx *ctx, df_net *net, const char *name, int in, int out,
                           int kernel, df_init init);
DF_API int df_layer_norm_affine(df_ctx *ctx, df_net *net, const char *name, int channels);
DF_API int df_layer_embedding(df_ctx *ctx, df_net *net, const char *name, int rows,
                              int dim, df_init init);
/* ... and run. */
DF_API df_tensor *df_run_param(const df_run *run, int index);
DF_API df_tensor *df_run_linear(const df_run *run, int index, df_tensor *x);
DF_API df_tensor *df_run_conv2d(const df_run *run, int index, df_tensor *x, int stride,
                                int pad);
DF_API df_tensor *df_run_group_norm(const df_run *run, int index, df_tensor *x, int groups,
                                    double eps);
DF_API df_tensor *df_run_layer_norm(const df_run *run, int index, df_tensor *x,
                                    double eps);
DF_API df_tensor *df_run_embedding(const df_run *run, int index, const int *ids, int n);
/* The whole network. */
DF_API df_tensor *df_run_net(const df_run *run, df_tensor *x, df_tensor *t,
                             const int *labels);
/* A net of tokens: tokens [n, shape...], t [n] or NULL (zeros) -> logits [n, shape...,
   vocab]. The same as df_run_net of them as numbers; df_net_model does not answer. */
DF_API df_tensor *df_run_tokens(const df_run *run, const int *tokens, int n, df_tensor *t,
                                const int *labels);

/* Residual MLP on points: h = SiLU(Linear([x, emb(t) + label])), depth times h +=
   SiLU(Linear(h)), Linear. emb: sinusoidal [cos,
       sin] of the native time times time_scale. */
typedef struct df_mlp_desc {
    uint32_t cookie;
    int dim;                 /* elements of a sample, 1 .. 2^20 [2] */
    int width;               /* 1 .. 65536 [256] */
    int depth;               /* residual layers, 0 .. 4096 [4] */
    int embed;               /* time embedding, even, 2 .. 65536 [128] */
    double time_scale;       /* native time is multiplied by this: 1000 for t in [0,1]
                                [1000] */
    double period;           /* longest period / (2 pi) of the embedding [10000] */
    int classes;             /* labels 0 .. classes-1; 0: none [0] */
    int condition;           /* numbers that stand beside x, 0 .. 2^20 [0] */
    uint64_t seed;           /* of the initial weights [0] */
} df_mlp_desc;
DF_API df_mlp_desc df_mlp_defaults(void);
DF_API df_net *df_mlp_create(df_ctx *ctx, const df_mlp_desc *desc);

/* UNet of denoising diffusion (Ho et al. 2020; Dhariwal & Nichol 2021), equal to
   diffusers' UNet2DModel, whose configuration's keys are the fields. x [B, in_channels,
   height, width]: conv_in; down the levels, each some residual blocks and a halving; a
   middle; up again, each block seeing what the way down left at its size. height and width
   must halve levels-1 times. It, as all nets below, sees t as indices up to 1000: on t in
   [0, 1] give it card.time = df_time_affine(1000, 0). */
#define DF_UNET_LEVELS 8
typedef enum df_unet_block {
    DF_UNET_PLAIN,           /* DownBlock2D, UpBlock2D: a convolution resamples */
    DF_UNET_ATTENTION,       /* AttnDownBlock2D, AttnUpBlock2D */
    DF_UNET_RESNET           /* ResnetDownsampleBlock2D, ResnetUpsampleBlock2D: a residual
                                block resamples */
} df_unet_block;
typedef enum df_unet_time {
    DF_UNET_POSITIONAL,      /* sinusoids of t */
    DF_UNET_FOURIER,         /* of 2 pi w log t, w fixed; the output is divided by t (Song
                                et al. 2021, NCSN++) */
    DF_UNET_LEARNED          /* a table, one row for each whole t */
} df_unet_time;
typedef enum df_unet_class {
    DF_UNET_CLASS_TABLE,     /* a row for each class is added to the time's embedding */
    DF_UNET_CLASS_TIMESTEP,  /* the label goes through sinusoids and an MLP, as t does; -1
                                adds nothing */
    DF_UNET_CLASS_IDENTITY   /* the condition is the embedding */
} df_unet_class;
typedef struct df_unet_desc {
    uint32_t cookie;
    uint64_t seed;           /* of the initial weights [0] */
    int in_channels, out_channels;      /* [3, 3] */
    int height, width;       /* sample_size [32, 32] */
    int levels;              /* 1 .. 8 [4] */
    int channels[DF_UNET_LEVELS];       /* block_out_channels [224, 448, 672, 896] */
    int down[DF_UNET_LEVELS];           /* df_unet_block, from the finest level on
                                           [PLAIN, then ATTENTION] */
    int up[DF_UNET_LEVELS];  /* from the coarsest on [ATTENTION, last PLAIN] */
    int layers;              /* layers_per_block; up blocks have one more [2] */
    int head_dim;            /* attention_head_dim; 0 (null): one head [8] */
    int groups;              /* norm_num_groups [32] */
    int attn_groups;         /* attn_norm_num_groups: of the middle's attention; 0 (null):
                                groups, or with scale_shift no norm at all [0] */
    int scale_shift;         /* resnet_time_scale_shift: the time scales and shifts [0] */
    int mid_attention;       /* add_attention [1] */
    int center_input;        /* center_input_sample: 2x - 1 [0] */
    int time;                /* df_unet_time [POSITIONAL] */
    int flip_sin_to_cos;     /* cosines first [1] */
    int freq_shift;          /* [0] */
    int time_dim;            /* time_embedding_dim; 0 (null): 4 channels[0] [0] */
    int time_rows;           /* num_train_timesteps, of a learned table [0] */
    int downsample_padding;  /* 1, or 0: zeros right and bottom alone [1] */
    int downsample_resnet, upsample_resnet;  /* downsample_type, upsample_type of ATTENTION
                                blocks: "resnet" [0] */
    int class_kind;          /* df_unet_class [TABLE] */
    int classes;             /* labels 0 .. classes-1; 0: none [0] */
    int null_class;          /* the table's last row is for "no class", label -1, as
                                training with label dropout wants; its row is not one of
                                `classes`. Without, -1 adds nothing [0] */
    double eps;              /* norm_eps [1e-5] */
    double mid_scale;        /* mid_block_scale_factor: divides [1] */
    double dropout;          /* [0] */
} df_unet_desc;
DF_API df_unet_desc df_unet_defaults(void);
DF_API df_net *df_unet_create(df_ctx *ctx, const df_unet_desc *desc);

/* Diffusion transformer (Peebles & Xie 2023), equal to facebookresearch/DiT: x in patches,
   a fixed table of positions, blocks whose norms are scaled, shifted and gated by the time
   and the class (adaLN-Zero). Labels 0 .. classes-1; -1 is the table's last row, if
   null_class. */
typedef struct df_dit_desc {
    uint32_t cookie;
    uint64_t seed;           /* of the initial weights [0] */
    int in_channels;         /* [4] */
    int size;                /* height and width [32] */
    int patch;               /* divides size [2] */
    int width;               /* hidden_size, a multiple of 4 and of heads [1152] */
    int depth, heads;        /* [28, 16] */
    int mlp_width;           /* of the blocks' inner layers; 0: 4 width [0] */
    int classes;             /* at least 1 [1000] */
    int null_class;          /* class_dropout_prob > 0 [1] */
    int learn_sigma;         /* twice the channels: the second half is v of LEARNED_RANGE
                                [1] */
    int diffusers;           /* DiTTransformer2DModel's arithmetic: frequencies of t
                                10000^(-k/127), not /128; eps 1e-5, not 1e-6, before the
                                MLPs [0] */
} df_dit_desc;
DF_API df_dit_desc df_dit_defaults(void);
DF_API df_net *df_dit_create(df_ctx *ctx, const df_dit_desc *desc);

/* Transformer over tokens, no mask of the future, for discrete diffusion, with the weight
   names of MDLM (Sahoo et al. 2024), SEDD and their kin: vocab_embed.embedding;
   sigma_map.mlp.0, .2 (time), cond_map.embedding_table (class, added as DiT does);
   blocks.i.norm1, attn_qkv, attn_out, norm2, mlp.0, mlp.2, adaLN_modulation;
   output_layer.norm_final, linear, adaLN_modulation. Rotary positions; blocks scaled,
   shifted and gated by time and class, if there is either (adaLN-Zero), else plain
   pre-norm blocks. */
typedef struct df_transformer_desc {
    uint32_t cookie;
    uint64_t seed;           /* of the initial weights [0] */
    int vocab;               /* tokens 0 .. vocab-1, a mask counts [257] */
    int length;              /* tokens of a sample [128] */
    int width, depth, heads; /* width/heads is even [256, 4, 4] */
    int mlp_width;           /* of the blocks' inner layers; 0: 4 width [0] */
    int cond_width;          /* of the features of time and class [128] */
    int time;                /* 1: t is seen, as the native time that it is; 0: not [1] */
    int rms;                 /* RMS norm in place of layer norm [0] */
    int classes;             /* labels 0 .. classes-1; 0: none [0] */
    int null_class;          /* the class table's last row is for label -1 [1] */
} df_transformer_desc;
DF_API df_transformer_desc df_transformer_defaults(void);
DF_API df_net *df_transformer_create(df_ctx *ctx, const df_transformer_desc *desc);

/* UNet along a trajectory of actions, equal to diffusion policies' ConditionalUnet1D (Chi
   et al. 2023) with its weight names. x [B, length, channels]; the condition (what the
   robot sees, its goal) and t enter each block, which they shift and scale (FiLM). length
   must halve levels-1 times. */
typedef struct df_unet1d_desc {
    uint32_t cookie;
    uint64_t seed;           /* of the initial weights [0] */
    int channels;            /* input_dim: numbers of one action [2] */
    int length;              /* actions of a sample [16] */
    int condition;           /* global_cond_dim; 0: none [0] */
    int embed;               /* diffusion_step_embed_dim, even [256] */
    int levels;              /* 1 .. 8 [3] */
    int width[DF_UNET_LEVELS];          /* down_dims [256, 512, 1024] */
    int kernel;              /* kernel_size, odd [5] */
    int groups;              /* n_groups; the last block has 8 whatever this is [8] */
    int predict_scale;       /* cond_predict_scale: the condition scales, too [1] */
} df_unet1d_desc;
DF_API df_unet1d_desc df_unet1d_defaults(void);
DF_API df_net *df_unet1d_create(df_ctx *ctx, const df_unet1d_desc *desc);

DF_API const char *df_net_kind(const df_net *net);
DF_API int df_net_dim(const df_net *net);
DF_API int df_net_classes(const df_net *net);
DF_API int df_net_condition(const df_net *net);                /* numbers a sample, or 0 */
DF_API int df_net_vocab(const df_net *net);                    /* 0: no net of tokens */
DF_API size_t df_net_size(const df_net *net);                  /* elements in all */
DF_API size_t df_net_trained(const df_net *net);               /* ... not frozen */
DF_API int df_net_count(const df_net *net);                    /* named parameters */
DF_API const df_param *df_net_param(const df_net *net, int index);
DF_API int df_net_find(const df_net *net, const char *name);   /* index or -1 */
DF_API df_real *df_net_weights(df_net *net);
DF_API df_real *df_net_average(df_net *net);                   /* NULL if there is none */

/* What a net costs: from one sample, run and recorded. */
typedef struct df_net_cost {
    size_t parameters, trained;
    double flops;            /* of a forward pass: 2 for each product summed in linear
                                layers, convolutions, matrix products; backward: twice */
    size_t activations;      /* bytes of results that recording keeps for backward, which
                                wants as many again for their gradients */
} df_net_cost;
/* Fills cost, and calls line (either may be NULL) with a table: of each layer the name,
   kind, shape of result, parameters, Mflop, kB kept (what follows without parameters
   counts with it). Another value of line than 0 ends it and comes back. */
DF_API df_result df_net_describe(df_ctx *ctx, const df_net *net, df_net_cost *cost,
                                 int (*line)(void *user, const char *text), void *user);

/* What the net was trained to say. df_trainer_create writes it; set it for weights from
   elsewhere. */
typedef struct df_card {
    df_process process;
    df_prediction prediction;
    df_time time, clock;
    double input_sigma_data;
    df_learned learned;      /* for nets with twice the data's channels */
} df_card;
DF_API df_card df_card_defaults(void);                         /* as df_model_defaults */
/* copies a table */
DF_API df_result df_net_set_card(df_ctx *ctx, df_net *net, const df_card *card);
DF_API const df_card *df_net_card(const df_net *net);
/* Data scaling kept with the net: data = mean + scale x; size 1 or dim, 0 none. */
DF_API df_result df_net_set_scaling(df_ctx *ctx, df_net *net, int size, const double *mean,
                                    const double *scale);

/* The net as a model (its average, if any); answers PREDICT, JVP, VJP. The net must
   outlive it; take it anew after a trainer was made for the net, a file loaded into it, or
   its card or scaling set. */
DF_API df_model df_net_model(const df_net *net);
/* A checkpoint: safetensors with weights, "average.*", card and scaling. load makes nets
   of the kinds built in; for a net of your own, create it and use df_net_load_into. */
DF_API df_result df_net_save(df_ctx *ctx, const df_net *net, df_sink sink);
DF_API df_net *df_net_load(df_ctx *ctx, df_source source);
DF_API df_result df_net_load_into(df_ctx *ctx, df_net *net, df_source source);

/* Folders of others: config.json and the weights of a diffusers UNet2DModel or
   DiTTransformer2DModel (diffusion_pytorch_model.safetensors), or the arguments and
   weights of facebookresearch/DiT (model.safetensors). The scheduler_config.json beside
   them, or in ../scheduler, becomes the card, if the weights did not bring one of ours;
   without one it says eps, linear betas .0001 to .02, T = 1000. An unknown key or value is
   an error that names both. Errors: IO, FORMAT (file and key), MEMORY. */
DF_API df_net *df_net_load_folder(df_ctx *ctx, const char *folder);
/* The same from anywhere; scheduler may be NULL. */
DF_API df_net *df_net_load_config(df_ctx *ctx, df_source config, df_source weights,
                                  const df_source *scheduler);
/* Writes what their own libraries write, the averaged weights if there are any. A net of
   kind "dit" gets the names of its descriptor's `diffusers`. A card of a table becomes
   scheduler_config.json; another one, and the data's scaling, stand beside the weights for
   us alone (others will see scaled data), and an old scheduler_config.json goes. Makes the
   folder where POSIX lets it. */
DF_API df_result df_net_save_folder(df_ctx *ctx, const df_net *net, const char *folder);

/* ---- training ----------------------------------------------------------------------- */

typedef enum df_weighting {
    DF_WEIGHT_UNIFORM,       /* 1 on the net's own prediction */
    DF_WEIGHT_MIN_SNR,       /* min(alpha^2/sigma^2, gamma) on x_0 (Hang et al. 2023) */
    DF_WEIGHT_EDM,           /* (sigma^2/alpha^2 + s_d^2)/(sigma s_d/alpha)^2 on x_0
                                (Karras et al. 2022, table 1); s_d is the process's
                                sigma_data: set it to 1 for data that scaling makes 1 */
    DF_WEIGHT_P2,            /* (1 + alpha^2/sigma^2)^-gamma on eps (Choi et al. 2022) */
    DF_WEIGHT_LIKELIHOOD,    /* df_likelihood_weight over the density of t: the loss is its
                                integral over [t_min, t_max], a bound on -log p/dim but
                                for a constant, whichever density draws t: UNIFORM, or
                                LAMBDA with less variance (Song et al. 2021,
                                arXiv:2101.09258; Kingma et al. 2021) */
    DF_WEIGHT_SIGMOID        /* that times sigmoid(b - log SNR), log SNR = 2 lambda: the
                                loss is 1/2 int sigmoid |eps error|^2/dim d log SNR, with
                                the weight on eps, per unit of log SNR (Kingma & Gao 2023;
                                Hoogeboom et al. 2024) */
} df_weighting;
/* What one unit of t at time t costs in likelihood: w on the prediction's squared error,
   summed over elements, with KL(p_0 | q_0) <= int w E|error|^2 dt + KL(p_1 | q_1). Of the
   plane's row (a, b), with W = alpha sigma' - sigma alpha', lambda' = -W/(alpha sigma):
     w = |lambda'| alpha^2/det^2 = W alpha/(sigma det^2),   det = alpha b - sigma a,
   which is g^2/2 on the score (Song et al. 2021, arXiv:2101.09258, theorem 1), |lambda'|
   on eps, alpha/(sigma W) on velocity. SINGULAR where it or the row is infinite. */
DF_API df_result df_likelihood_weight(df_ctx *ctx, const df_process *p,
                                      df_prediction prediction, double t, double *w);
typedef enum df_density {
    DF_DENSITY_UNIFORM,      /* t uniform on [t_min, t_max] */
    DF_DENSITY_LOGIT_NORMAL, /* logit t ~ N(mean, std^2) (Esser et al. 2024); this and the
                                next: draws outside [t_min, t_max] move to its end */
    DF_DENSITY_LOG_NORMAL,   /* log sigma/alpha ~ N(mean, std^2) (Karras et al. 2022: -1.2,
                                1.2); on flow the same as LOGIT_NORMAL */
    DF_DENSITY_INDEX,        /* a table's entries, each as likely (Ho et al. 2020);
                                t_min and t_max play no part */
    DF_DENSITY_LAMBDA        /* lambda uniform between its values at t_min and t_max, both
                                finite: LIKELIHOOD is constant on eps then */
} df_density;
typedef enum df_scaling { DF_SCALING_NONE, DF_SCALING_GLOBAL, DF_SCALING_EACH } df_scaling;

/* What a loss of your own is made of: the rows that the denoising loss would take. */
typedef struct df_batch {
    df_tensor *x0;           /* [B, shape...] rows of data, scaled */
    df_tensor *x;            /* [B, shape...] noised: c_in (alpha x_0 + sigma eps) */
    df_tensor *t;            /* [B] in the card's time */
    df_tensor *target;       /* [B, shape...] what a net of that card should say there */
    df_tensor *weight;       /* [B] of its squared error */
    const int *labels;       /* [B] or NULL */
    uint64_t first, stride;  /* row r is item first + r stride of the run's seed ... */
    uint32_t draw;           /* ... whose draws from this one on are the loss's own */
} df_batch;
/* The loss as one number on the tape, the mean over the batch's rows; run has weights,
   gradients and the rows' conditions. Work in run->ctx: df_trainer_create calls it for one
   row and for two, in a context of its own. NULL on failure: what the context says then,
   of a model that was asked too, is what the trainer says. */
typedef df_tensor *(*df_objective_fn)(void *self, const df_run *run,
                                      const df_batch *batch);
/* Noise for a loss: N(0, 1) [B, width], of the batch's own draw number `draw` (from 0). */
DF_API df_tensor *df_batch_normal(const df_run *run, const df_batch *batch, uint32_t draw,
                                  int width);

typedef struct df_train_info {
    int64_t step, steps;
    double loss;             /* mean over the last `report` steps */
    double validation;       /* last held-out loss of the averaged weights; -1 before the
                                first (a loss of your own may be below 0 too) */
    double gradient_norm;    /* before clipping */
    double learning_rate;
    double seconds_left;     /* estimate; < 0 without a clock */
    double rows_per_second;  /* of this machine, since df_trainer_run was called; 0 without
                                a clock */
    size_t memory;           /* bytes that training holds at its peak, the net's included:
                                weights, average, moments, gradients, rows, activations;
                                known before the first step */
} df_train_info;

typedef struct df_train_desc {
    uint32_t cookie;
    df_card card;            /* process, prediction, time ... [flow, velocity, t] */
    df_weighting weighting;  /* [UNIFORM] */
    double snr_gamma;        /* of MIN_SNR [5] */
    double p2_gamma;         /* of P2 [1] */
    double sigmoid_bias;     /* b of SIGMOID [2] */
    double vlb;              /* > 0: learns the variance too, by this times the bound's T
                                terms, in nats per element, added to the loss (hybrid:
                                Nichol & Dhariwal 2021, eq. 16, .001). For card.learned
                                LOG_VARIANCE or RANGE, a table and density INDEX [0] */
    df_density density;      /* [UNIFORM] */
    double density_mean, density_std;   /* [0, 1] */
    double t_min, t_max;     /* t_min < 0: df_process_t_min, or 0 where the target is
                                finite there [-1, 1] */
    df_scaling scaling;      /* data to mean 0, deviation 1: not, by one number, each
                                dimension [GLOBAL] */
    int batch;               /* [256] */
    int rows;                /* of a batch, at once: the gradients of its parts are added;
                                0: so many that a part's activations and their gradients
                                stay below 256 MiB. Results depend on it in their last
                                bits, masks of dropout altogether, and weights whose
                                gradient is 0 but for rounding (a key's bias) drift [0] */
    int64_t steps;           /* [5000] */
    double learning_rate;    /* [2e-3] */
    int64_t warmup;          /* steps of linear rise [100] */
    double final_rate;       /* cosine decay to this fraction; 1: constant [.01] */
    double beta1, beta2, adam_eps, weight_decay;   /* [.9, .999, 1e-8, .01] */
    double clip;             /* most gradient norm; 0: off [1] */
    double ema;              /* decay of the average; 0: off [.999] */
    int ema_warmup;          /* decay 0 at first, then min(ema, (1+n)/(10+n)) [1] */
    double validation;       /* fraction held out [.05] */
    int64_t validate_every;  /* steps; 0: never [500] */
    double label_dropout;    /* probability of label -1 and a condition of zeros, for
                                classifier-free guidance [0] */
    const df_real *condition;      /* [n, df_net_condition(net)], borrowed; NULL: zeros
                                [NULL] */
    double flip;             /* probability that a row of 3 axes is mirrored in its last
                                (images left to right); not where held out [0] */
    int part, parts;         /* of `parts` machines this is number `part`, from 0: it takes
                                every parts-th row of a batch of parts x batch [0, 1] */
    df_objective_fn objective;     /* the loss instead of the denoising one and vlb
                                      [NULL] */
    void *objective_self;    /* handed to it; must outlive the trainer [NULL] */
    uint64_t seed;           /* order of data, times, noise [0] */
    int64_t report;          /* steps between calls of on_step [50] */
    int (*on_step)(void *user, const df_train_info *info);     /* not 0 ends the run, comes
                                                                  back unchanged */
    /* Called when a batch's gradients are complete, before clipping and the optimiser,
       with grads [df_net_size] to read and write (0 where frozen): here several machines
       average theirs. Not 0 ends the run, comes back unchanged; weights as before the
       step. */
    int (*on_gradients)(void *user, df_net *net, df_real *grads, size_t size);
    void *user;
} df_train_desc;
DF_API df_train_desc df_train_defaults(void);

/* What the objectives below take as their self; NULL: the defaults. */
typedef struct df_objective_desc {
    uint32_t cookie;
    int probes;              /* random vectors a row; 0: exact. sliced wants one or more
                                and takes 0 for 1; node at most 1 [0] */
    int steps;               /* contrastive: of Langevin, node: of RK4; 1 .. 10000 [20] */
    double step;             /* contrastive: h, in units of x^2, above 0 [.01] */
    int from_noise;          /* contrastive [0] */
} df_objective_desc;
DF_API df_objective_desc df_objective_defaults(void);
/* Objectives for df_train_desc.objective; the batch's weight counts in all but the last.
   A score net learns grad log p_t without a target (any prediction: its score is meant):
     J = E w (div s + |s|^2/2),   s the score at x_t (Hyvarinen 2005)
   is E w |s - grad log p_t|^2/2, dim/2 times the denoising loss, but for a constant (w
   is the weight as it counts on the score): -d/(2v) at best for N(0, v I) and w = 1.
   implicit: the exact divergence, dim forward passes. sliced: probes v ~ N(0, I), v^T
   (ds/dx) v (Song et al. 2019, arXiv:1905.07088, eq. 8: reduced variance). Errors:
   SINGULAR where the score is infinite. */
DF_API df_tensor *df_objective_implicit(void *self, const df_run *run,
                                        const df_batch *batch);
DF_API df_tensor *df_objective_sliced(void *self, const df_run *run,
                                      const df_batch *batch);

/* An energy-based model of any net f whose card says it predicts the score: E(x, t) =
   |f(c_in x, t)|^2/2, p_t = e^-E/Z, score -grad E = -c_in J^T f. The model answers PREDICT
   (two passes forward, one back) and LOG_DENSITY, -E without log Z: what MALA wants. */
DF_API df_model df_energy_model(const df_net *net);
/* Denoising score matching of -grad E (Vincent 2011), E w |target + grad E|^2/dim, by
   forward mode, which is on the tape: v^T grad E = c_in f^T J v, v all unit vectors
   (exact) or probes N(0, I). */
DF_API df_tensor *df_objective_energy(void *self, const df_run *run,
                                      const df_batch *batch);
/* Contrastive divergence (Hinton 2002): E(x_t) - E(x_neg), whose gradient is that of -log
   p_t where x_neg ~ p_t: `steps` Langevin steps x += h score + sqrt(2h) z from x_t (CD-k),
   or from noise N(0, alpha^2 + sigma^2) (short-run: Nijkamp et al. 2019). It levels off at
   0 and says little of progress. */
DF_API df_tensor *df_objective_contrastive(void *self, const df_run *run,
                                           const df_batch *batch);

typedef struct df_trainer df_trainer;
/* Trains net on data [n, dim] with labels [n] or NULL; all three are borrowed. Writes card
   and scaling into the net. A net that makes twice the channels (card.learned) learns the
   first half. One row and two are tried, so a net that fails does so here. Errors:
   ARGUMENT, MEMORY, NONFINITE (which row of data), the net's own. */
DF_API df_trainer *df_trainer_create(df_ctx *ctx, df_net *net, const df_real *data, int n,
                                     const int *labels, const df_train_desc *desc);
DF_API void df_trainer_free(df_trainer *trainer);
/* `steps` more steps, at most to the descriptor's end; 0: to the end. loss = E w |net -
   target|^2/dim, x_t = alpha x_0 + sigma eps. Errors: NONFINITE (loss or gradient at which
   step; weights as before it; run again the step is the same: lower the rate), MEMORY,
   CANCELLED, a callback's own. After any of them, and inside on_step, it may be saved.

   Several machines: each makes a trainer of the same net, data and descriptor but for
   `part`, and on_gradients puts the mean over all machines into grads. Weights then go, to
   rounding, as on one machine with parts x batch (but for masks of dropout, and weights
   without a true gradient, see rows), and a checkpoint of one serves all. Losses reported
   are each machine's own. */
DF_API df_result df_trainer_run(df_trainer *trainer, int64_t steps);
DF_API df_result df_trainer_info(const df_trainer *trainer, df_train_info *info);
/* Mean loss on the held-out part, fixed times and noise. */
DF_API df_result df_trainer_validate(df_trainer *trainer, double *loss);
/* A checkpoint as df_net_save's with the optimiser beside: load and run gives bit for bit
   what an uninterrupted run gives. The trainer must have been made with the same net, data
   and descriptor (FORMAT otherwise). */
DF_API df_result df_trainer_save(df_trainer *trainer, df_sink sink);
DF_API df_result df_trainer_load(df_trainer *trainer, df_source source);

/* The optimiser by itself, for loops of your own: flat arrays as a net's weights [size].
   Where parameters are frozen, AdamW and the average walk from span to span of the others
     for (size_t at = 0, n; (n = df_net_span(net, &at)) > 0; at += n)
         df_adamw_step(ctx, &adamw, step, n, w + at, m + at, v + at, g + at, factor);
   and the norm goes over all of g: nobody adds to a frozen gradient, so it is 0. */
/* The first span of trained weights at or after *at: moves *at to it and returns its
   length, 0 if there is none. */
DF_API size_t df_net_span(const df_net *net, size_t *at);
typedef struct df_adamw { double learning_rate, beta1, beta2, eps,
    weight_decay; } df_adamw;
/* Step number `step` (from 1); gradients are multiplied by grad_scale first. */
DF_API void df_adamw_step(df_ctx *ctx, const df_adamw *adamw, int64_t step, size_t size,
                          df_real *w, df_real *m, df_real *v, const df_real *g,
                              double grad_scale);
/* L2 norm, and the factor min(1, limit/(norm + 1e-6)) that clips it (1 if limit is 0). */
DF_API double df_clip_factor(df_ctx *ctx, size_t size, const df_real *g, double limit,
                             double *norm);
/* average = decay average + (1 - decay) w; the decay of step n under warm-up: 0 for n = 0,
   then min(decay, (1+n)/(10+n)), as diffusers' EMAModel. */
DF_API void df_ema_step(df_ctx *ctx, size_t size, df_real *average, const df_real *w,
                        double decay);
DF_API double df_ema_warmup(double decay, int64_t n);

/* ---- relatives ---------------------------------------------------------------------- */

/* What diffusion is compared with. Both are nets: they train (with the objective that
   stands below each), average, save and load as the others do. Samples have one axis; log
   densities are in nats, of data as the net sees it: under a trainer's scaling log p(data)
   = log p(x) - sum log scale. df_net_model of them is no denoiser. */

/* A variational autoencoder (Kingma & Welling 2014), or a Markovian hierarchy of them:
     q(z_1..z_L|x) = prod q(z_i|z_{i-1}), z_0 = x,  p(x, z_1..z_L) = p(z_L) prod
   p(z_{i-1}|z_i), p(z_L) = N(0, 1). All are Gaussians with diagonal covariance, mean and
   log variance by an MLP each, but p(x|z_1), which has one variance. Parameters:
   enc.i.layer, dec.i.layer, dec.log_variance. df_run_net is x encoded to the top and
   decoded again, by means. */
#define DF_VAE_LEVELS 8
typedef struct df_vae_desc {
    uint32_t cookie;
    uint64_t seed;           /* of the initial weights [0] */
    int dim;                 /* elements of a sample, 1 .. 2^20 [2] */
    int width;               /* of the hidden layers, 1 .. 65536 [128] */
    int depth;               /* hidden layers of each MLP, 0 .. 64; 0: linear maps [2] */
    int levels;              /* L, 1 .. 8; 1 is the VAE [1] */
    int latent[DF_VAE_LEVELS];     /* numbers of z_1, z_2, ..., 1 .. 2^20 [2 each] */
    double deviation;        /* of p(x|z_1); 0: learned, from 1/e on: a wide one may make
                                the encoder say nothing, for ever [0] */
} df_vae_desc;
DF_API df_vae_desc df_vae_defaults(void);
DF_API df_net *df_vae_create(df_ctx *ctx, const df_vae_desc *desc);
/* Numbers of z_1 .. z_L together; 0 of other kinds of nets. */
DF_API int df_vae_latents(const df_net *net);
/* Mean, and log variance, of q(z_i|z_{i-1}) and of p(z_{i-1}|z_i); level i from 1, below
   z_{i-1} [B, its numbers], above z_i. */
DF_API df_tensor *df_vae_encode(const df_run *run, int level, df_tensor *below,
                                df_tensor **log_variance);
DF_API df_tensor *df_vae_decode(const df_run *run, int level, df_tensor *above,
                                df_tensor **log_variance);
/* The evidence lower bound on log p(x), [B], at z_i = mean + deviation noise of q with
   noise N(0, 1) [B, latents], level 1 first (reparametrisation). parts (or NULL) receives
   [B, 1 + L]: log p(x|z_1), then what each level costs, log q(z_i|z_{i-1})/p(z_i|z_{i+1});
   of the top the KL in closed form, of the others q's entropy in closed form, because
   z_{i+1} is drawn from z_i. ELBO = the first minus the others. log p(x) - E ELBO =
   KL(q(z|x) || p(z|x)). */
DF_API df_tensor *df_vae_elbo(const df_run *run, df_tensor *x, df_tensor *noise,
                              df_tensor **parts);
/* A df_objective_fn: -ELBO of the data, one draw for each row. self is not used. */
DF_API df_tensor *df_objective_elbo(void *self, const df_run *run, const df_batch *batch);
/* Samples first .. first+n-1, in the data's units: out [n, dim]. */
DF_API df_result df_vae_sample(df_ctx *ctx, const df_net *net, uint64_t seed,
                               uint64_t first, int n, df_real *out);

/* A flow of affine couplings (Dinh et al. 2017, RealNVP): each layer keeps one half of x
   and moves the other by what an MLP says of the kept one,
     y_b = x_b e^s + t,   s = scale tanh(..), t = ..(x_a),   log |dy/dx| = sum s,
   halves in turn; the last one is N(0, 1). Starts as the identity. df_run_net is x to the
   noise. Parameters: layer.i.j, j the MLP's layer. */
typedef struct df_coupling_desc {
    uint32_t cookie;
    uint64_t seed;           /* of the initial weights [0] */
    int dim;                 /* elements of a sample, 2 .. 2^20 [2] */
    int width, depth;        /* of each MLP, as df_vae_desc's [128, 2] */
    int layers;              /* 1 .. 1024; both halves move from 2 on [8] */
    double scale;            /* most |s|: no layer stretches by more than e^scale [2] */
} df_coupling_desc;
DF_API df_coupling_desc df_coupling_defaults(void);
DF_API df_net *df_coupling_create(df_ctx *ctx, const df_coupling_desc *desc);
/* log p(x) = log N(z; 0, 1) + log |dz/dx|, exact, on the tape: x [B, dim] -> [B]. */
DF_API df_tensor *df_coupling_log_density(const df_run *run, df_tensor *x);
/* Noise to x: the inverse of df_run_net. */
DF_API df_tensor *df_coupling_inverse(const df_run *run, df_tensor *z);
/* A df_objective_fn: -log p(data). self is not used. */
DF_API df_tensor *df_objective_flow_likelihood(void *self, const df_run *run,
                                               const df_batch *batch);
DF_API df_result df_coupling_sample(df_ctx *ctx, const df_net *net, uint64_t seed,
                                    uint64_t first, int n, df_real *out);

/* A neural ODE as a flow (Chen et al. 2018; Grathwohl et al. 2019, FFJORD): any net whose
   card says velocity on the process flow. dx/dt = v(x, t) from the data at t = 0 to N(0,
   1) at t = 1, d log p/dt = -div v along it, both by RK4 in equal steps. What the solver
   computed is differentiated (discretise, then optimise). Trained, it is a velocity model
   as flow matching makes them: df_net_model, df_sample. */
/* log p(x) = log N(x(1); 0, 1) + int_0^1 div v dt, [B], on the tape; steps 1 .. 10000;
   probe as of df_run_divergence, NULL: exact. */
DF_API df_tensor *df_node_log_density(const df_run *run, int steps, df_tensor *x,
                                      const int *labels, df_tensor *probe);
/* A df_objective_fn: -log p(data); self is a df_objective_desc: steps, and a probe of
   random signs (Rademacher's), the same at all steps of a sample. */
DF_API df_tensor *df_objective_node(void *self, const df_run *run, const df_batch *batch);

/* ---- closed forms ------------------------------------------------------------------- */

/* A Gaussian mixture p_0 = sum_k w_k N(mu_k, S_k). On any process p_t is again one:
   M_k = alpha mu_k, C_k = alpha^2 S_k + sigma^2 I. All sums in double. */
typedef struct df_mixture df_mixture;
/* weights [K] > 0 (normalised), means [K, dim], covariances [K, dim, dim], symmetric and
   positive semi-definite to 1e-12 of their largest entry. All copied. NULL on failure. */
DF_API df_mixture *df_mixture_create(df_ctx *ctx, int K, int dim, const double *weights,
                                     const double *means, const double *covariances);
DF_API void df_mixture_free(df_mixture *mixture);
/* K equal Gaussians on a circle; 8, 2 sqrt 2, sqrt(1/8) is the test distribution
   "8 gaussians" in FFJORD's scaling. */
DF_API df_mixture *df_mixture_ring(df_ctx *ctx, int K, double radius, double deviation);
/* At a point of a path, for x [n, dim]: log p_t [n]; score [n, dim]; E[x_0|x] [n, dim];
   Cov[x_0|x] [n, dim, dim]. SINGULAR where a C_k is not positive definite (alpha = 0 for
   the posterior is fine: it is the prior's). Thread-safe for a const mixture with own
   contexts. */
DF_API df_result df_mixture_log_density(df_ctx *ctx, const df_mixture *m,
                                        const df_point *at, int n, const df_real *x,
                                        double *out);
DF_API df_result df_mixture_score(df_ctx *ctx, const df_mixture *m, const df_point *at,
                                  int n, const df_real *x, df_real *out);
DF_API df_result df_mixture_posterior(df_ctx *ctx, const df_mixture *m,
                                      const df_point *at, int n, const df_real *x,
                                      df_real *mean, df_real *covariance /* or NULL */);
/* Samples first .. first+n-1 of p_t: x [n, dim]; its draws are no sampler's, so that one
   seed may serve both. */
DF_API df_result df_mixture_sample(df_ctx *ctx, const df_mixture *m, const df_point *at,
                                   uint64_t seed,
                                   uint64_t first, int n, df_real *x);
/* The exact model of this data on a process; answers PREDICT, JVP, VJP, LOG_DENSITY. The
   view holds what the model asks of; it must outlive the model, and the mixture both. */
typedef struct df_mixture_view {
    const df_mixture *mixture;
    df_process process;
    df_prediction prediction;
} df_mixture_view;
DF_API df_model df_mixture_model(df_mixture_view *view);

/* Distances between samples a [na, dim], b [nb, dim], in double. */
/* sqrt of the mean, over `projections` random directions, of the squared W_2 in one
   dimension. */
DF_API df_result df_sliced_wasserstein(df_ctx *ctx, const df_real *a, int na,
                                       const df_real *b, int nb,
                                       int dim, int projections, uint64_t seed,
                                       double *out);
/* 2 E|a-b| - E|a-a'| - E|b-b'| (Szekely & Rizzo 2013), and MMD^2 with the kernel
   exp(-|x-y|^2/(2 bandwidth^2)), both unbiased (no sample is paired with itself), hence
   sometimes negative; na, nb at least 2; cost (na + nb)^2 dim/2. */
DF_API df_result df_energy_distance(df_ctx *ctx, const df_real *a, int na,
                                    const df_real *b, int nb, int dim, double *out);
DF_API df_result df_mmd(df_ctx *ctx, const df_real *a, int na, const df_real *b, int nb,
                        int dim, double bandwidth, double *out);
/* Total variation, sum |p_i - q_i|/2 over the cells of a histogram: dim 1 or 2, `bins`
   from lo to hi on each axis, the outer ones reaching to infinity. Cells can only hide a
   difference; few samples feign one, on average up to sqrt(cells (1/na + 1/nb)/(2 pi)). */
DF_API df_result df_total_variation(df_ctx *ctx, const df_real *a, int na,
                                    const df_real *b, int nb, int dim, double lo,
                                    double hi, int bins, double *out);

/* ---- laboratory --------------------------------------------------------------------- */

typedef enum df_flaw_kind {
    DF_FLAW_WELLS,           /* s^ = -pull (x - c) within `inner` of the nearest point c, s
                                from `outer` on, mixed linearly in |x - c| between (Cao et
                                al. 2026: theorem 1, one point, radii 4 and 5 sqrt dim;
                                theorem 7, the training data, .12 and .16 sqrt dim) */
    DF_FLAW_CONSTANT,        /* s^ = s + size u, |u| = 1: `direction` */
    DF_FLAW_ISOTROPIC,       /* ... u at random for each sample, the same at all times */
    DF_FLAW_COUNT
} df_flaw_kind;
/* What is wrong with a score: s^ = s + b. */
typedef struct df_flaw {
    uint32_t cookie;
    const df_model *model;   /* must outlive the flaw, and that the flawed model */
    df_flaw_kind kind;       /* [WELLS] */
    const df_real *points;   /* of WELLS: [count, dim], borrowed; NULL: the origin
                                [NULL] */
    int count;
    double pull;             /* >= 0 [2] */
    double inner, outer;     /* 0 <= inner < outer, in units of x_t at every t [4, 5] */
    double size;             /* of the others [0] */
    const df_real *direction;      /* [dim], any length but 0, borrowed; NULL: that of
                                      (1, ..., 1) [NULL] */
    uint64_t seed;           /* of ISOTROPIC [0] */
    /* |b_t|, the L^p size of the error over p_t, p as you like: df_score_error measures
       it, or a formula. Given this, b_t is multiplied by min(1, limit/|b_t|), so that the
       score is within `limit` at every t. 0 is fine, else the code comes back [NULL] */
    int (*norm)(void *user, df_ctx *ctx, const df_point *at, double *out);
    void *user;
    double limit;            /* [0] */
    df_learned learned;      /* its model's, put here by df_flaw_model */
} df_flaw;
DF_API df_flaw df_flaw_defaults(void);
/* The flawed model: same process and prediction, answers PREDICT. SINGULAR where alpha = 0
   and the prediction is not eps or score: x alone is the score there. ARGUMENT if the
   flaw's model has another dim or learned variance since. */
DF_API df_model df_flaw_model(df_flaw *flaw);
/* (E |s_model - s_truth|^p)^(1/p) over x [n, dim], samples of p_t in the model's units; p
   > 0. Two models of one dim, their processes with the same alpha and sigma at t (so
   below). Of the descriptor count first_sample, labels, condition; NULL: the defaults. */
DF_API df_result df_score_error(df_ctx *ctx, const df_model *truth, const df_model *model,
                                const df_sample_desc *desc, double t, const df_real *x,
                                int n, double p, double *out);

/* KL divergence from the paths of `truth`'s reverse SDE to those of `model`'s, both begun
   in p_(t_max), by Girsanov's theorem (Song et al. 2021b; Chen et al. 2023):
       ((1 + eta^2)/2)^2/eta^2  1/2 int g^2 E_(p_t) |s_model - s_truth|^2 dt
   p_t: data x [n, dim], in the data's units, noised. KL between the ends is at most that.
   Of the descriptor count the grid (midpoint rule in lambda; end T_MIN, alpha > 0), eta of
   the family (> 0; < 0: 1), seed, first_sample, labels, condition. One number whatever the
   process, as 1/2 g^2 |s|^2 dt = |eps|^2 |d lambda|. desc NULL: the defaults, but end
   T_MIN. */
DF_API df_result df_path_kl(df_ctx *ctx, const df_model *truth, const df_model *model,
                            const df_sample_desc *desc, const df_real *x, int n,
                            double *out);

#ifdef __cplusplus
}
#endif

#endif /* DIFFUSION_H */
/* ======================================================================================
   Implementation. Stands outside the include guard, with a once-guard of its own, so that
   a header which included the declarations first does not hide it.
   ===================================================================================== */
#if defined(DIFFUSION_IMPLEMENTATION) && !defined(DFI_IMPLEMENTED)
#define DFI_IMPLEMENTED

/* -------------------------------------------------------------------------------------
   // >>private: what the chapters share with each other
   ------------------------------------------------------------------------------------- */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DFI_PI 3.14159265358979323846
#define DFI_ALIGN 64           /* bytes; one cache line, one AVX-512 vector */
#define DFI_MESSAGE 512        /* bytes of an error sentence, the final 0 included */

#if defined(__GNUC__) || defined(__clang__)
/* cold: what leads to an error is compiled for size, which also compiles faster */
#define DFI_PRINTF(at, from) __attribute__((format(printf, at, from), cold))
#define DFI_INLINE static inline __attribute__((always_inline, unused))
#else
#define DFI_PRINTF(at, from)
#define DFI_INLINE static inline
#endif

#ifdef DIFFUSION_ASSERT
#define DFI_ASSERT(x) DIFFUSION_ASSERT(x)
#else
#define DFI_ASSERT(x) ((void)0)
#endif

/* ---- kernels (chapter 14): one constant table for each instruction set ---- */

/* y = f(x) for one array. The derivative of STEP counts as 0 everywhere. */
enum {
    DFI_EXP, DFI_LOG, DFI_SQRT, DFI_SIN, DFI_COS, DFI_TANH, DFI_SIGMOID, DFI_SILU,
    DFI_GELU_TANH, DFI_GELU_ERF, DFI_ERF, DFI_RELU, DFI_STEP, DFI_SOFTPLUS, DFI_UNARY_COUNT
};
enum { DFI_ADD, DFI_SUB, DFI_MUL, DFI_DIV, DFI_BINARY_COUNT };

/* B^T (4 to 4), A^T (4 to 2) and its transpose (2 to 4). */
enum { DFI_WINO_IN, DFI_WINO_OUT, DFI_WINO_BACK };

#define DFI_TERMS 8            /* most terms of a linear combination */

/* All arrays are contiguous and need no alignment. Element-wise kernels compute each
   element the same way wherever it stands (a tail runs the vector code on a padded copy),
   so that a result never depends on how an array was cut. Reductions depend on n and the
   values only. */
typedef struct dfi_kernels {
    const char *name;          /* "plain", "sse2", "avx2", "avx512", "neon" */
    df_isa isa;

    /* y[i] = a[i * sa] op b[i * sb], sa and sb in {0, 1} */
    void (*binary[DFI_BINARY_COUNT])(size_t n, const df_real *a, size_t sa,
                                     const df_real *b, size_t sb, df_real *y);
    /* y = f(x);  dx += f'(x) dy, with y = f(x) at hand */
    void (*unary[DFI_UNARY_COUNT])(size_t n, const df_real *x, df_real *y);
    void (*unary_back[DFI_UNARY_COUNT])(size_t n, const df_real *x, const df_real *y,
                                        const df_real *dy, df_real *dx);
    void (*affine)(size_t n, df_real a, const df_real *x, df_real b, df_real *y); /* y = a
                                                                                     x + b
                                                                                     */
    void (*axpy)(size_t n, df_real a, const df_real *x, df_real *y);              /* y += a
                                                                                     x */
    /* y[i] += a[i * sa] * b[i * sb] */
    void (*muladd)(size_t n, const df_real *a, size_t sa, const df_real *b, size_t sb,
                   df_real *y);
    /* y = sum_j c[j] * x[j], j = 0 .. count-1 <= DFI_TERMS; y may be one of the x. Exact
       to a rounding of the scalar for each term. */
    void (*combine)(size_t n, int count, const double *c, const df_real *const *x,
                    df_real *y);
    /* the same of one or two terms, for whom a rounding of each as it stands is small
       enough; true if all of x[0] was finite */
    int (*convert)(size_t n, int count, const double *c, const df_real *const *x,
                   df_real *y);

    double (*sum)(size_t n, const df_real *x);
    double (*dot)(size_t n, const df_real *a, const df_real *b);
    df_real (*max)(size_t n, const df_real *x);
    /* y[j] += sum_i x[i * stride + j], i < rows, j < cols */
    void (*colsum)(size_t rows, size_t cols, size_t stride, const df_real *x, df_real *y);
    /* mean and variance (divided by n, two passes) of one row */
    void (*moments)(size_t n, const df_real *x, double *mean, double *variance);
    size_t (*nonfinite)(size_t n, const df_real *x);     /* index of the first NaN or Inf,
                                                            or n */

    /* one row: y = softmax(x);  dx += y (dy - <y, dy>) */
    void (*softmax)(size_t n, const df_real *x, df_real *y);
    void (*softmax_back)(size_t n, const df_real *y, const df_real *dy, df_real *dx);
    /* one row: y = x - log sum exp x;  dx += dy - exp(y) sum dy */
    void (*log_softmax)(size_t n, const df_real *x, df_real *y);
    void (*log_softmax_back)(size_t n, const df_real *y, const df_real *dy, df_real *dx);

    /* A transform of 3x3 convolutions (chapter 14) at n places: for each a square of 2 or
       4, d[a][b] = x[a % 2 s[0] + a / 2 s[1] + b % 2 s[2] + b / 2 s[3] + i], becomes
       another, T d T^T, whose k-th number is y[k step + i] */
    void (*winograd)(int kind, size_t n, const df_real *x, const size_t s[4], df_real *y,
                     size_t step);
    /* n pairs: even[i], odd[i] = x[2i], x[2i + 1];  y[2i], y[2i + 1] += even[i], odd[i] */
    void (*split)(size_t n, const df_real *x, df_real *even, df_real *odd);
    void (*merge)(size_t n, const df_real *even, const df_real *odd, df_real *y);

    /* AdamW: w *= 1 - lr wd; m, v moving averages of scale*g and its square;
       w -= lr/(1-b1^t) m / (sqrt(v)/sqrt(1-b2^t) + eps), the corrections given as c1,
       c2 */
    void (*adamw)(size_t n, df_real *w, df_real *m, df_real *v, const df_real *g, double
    scale,
                  double lr, double b1, double b2, double eps, double wd, double c1,
                      double c2);
    void (*ema)(size_t n, df_real *average, const df_real *w, double decay); /* a = d a +
                                                                                (1-d) w */

    const struct dfi_micro *micro;      /* the matrix product's innermost loop */
} dfi_kernels;

/* C[M,N] (+)= op(A) op(B), row-major with leading dimensions lda, ldb, ldc (elements).
   ta: A is stored [K,M]; tb: B is stored [N,K]. accumulate: C += instead of C =. Runs on
   the context's workers; the order of summation over K depends on K alone. */
static df_result dfi_gemm(df_ctx *ctx, int ta, int tb, size_t M, size_t N, size_t K,
                          const df_real *A, size_t lda, const df_real *B, size_t ldb,
                          int accumulate, df_real *C, size_t ldc);
/* `batch` products, matrix b of each at A + b*sa, B + b*sb, C + b*sc (sa or sb may be
   0) */
static df_result dfi_gemm_batch(df_ctx *ctx, int ta, int tb, size_t batch, size_t M,
                                size_t N,
                                size_t K, const df_real *A, size_t lda, size_t sa,
                                const df_real *B, size_t ldb, size_t sb, int accumulate,
                                df_real *C, size_t ldc, size_t sc);
/* y += conv(x, w), 3x3, stride 1, pad 1: x [B,C,H,W], w [O,C,3,3]; back: y += its
   transpose, x [B,O,H,W] and y [B,C,H,W].  dw += the gradient of w. dfi_wino_fits: worth
   it for such channels and widths. */
typedef struct dfi_image { size_t B, C, O, H, W; } dfi_image;
static int dfi_wino_fits(const dfi_image *s);
static df_result dfi_wino_conv(df_ctx *ctx, const dfi_image *s, int back,
                               const df_real *x, const df_real *w, df_real *y);
static df_result dfi_wino_weights(df_ctx *ctx, const dfi_image *s, const df_real *x,
                                  const df_real *dy, df_real *dw);
/* Eigenvalues of a symmetric a [n, n] onto its diagonal, eigenvectors into the rows of q;
   entries below `tiny` count as 0. Returns 0 where a was diagonal: then they are exact. */
static int dfi_jacobi(size_t n, double tiny, double *a, double *q);
/* y = Q x, or back: Q^T x; `axis` [d, d] holds Q^T, as dfi_jacobi leaves it. */
static void dfi_turn(size_t d, const double *axis, int back, const double *x, double *y);
/* The best table this machine can run, at most `max_isa`. */
static const dfi_kernels *dfi_kernels_select(df_isa max_isa);

/* ---- foundations (chapter 1) ---- */

/* Step memory is a chain of blocks; a tensor or scratch array is cut from the current
   one. */
typedef struct dfi_block {
    struct dfi_block *next;
    size_t capacity;           /* bytes behind this header */
    size_t used;
    size_t size;               /* of the whole allocation */
} dfi_block;

/* memory that lives as long as the context (tables of betas) */
typedef struct dfi_owned {
    struct dfi_owned *next;
    size_t size;
} dfi_owned;

struct dfi_pool;

struct df_ctx {
    df_alloc alloc;
    df_logger log;
    df_tasks tasks;
    int threads;
    const dfi_kernels *k;
    int cancel;                /* written from anywhere: __atomic access only */
    df_result code;
    df_result stuck;           /* first failure of a tensor operation since df_ctx_clear */
    char message[DFI_MESSAGE];
    char stuck_message[DFI_MESSAGE];
    size_t bytes, peak;
    dfi_block *first, *block;  /* step memory: all blocks, the current one */
    dfi_owned *owned;
    int recording;             /* df_record_begin .. _end */
    int no_tangent;            /* > 0 while a tangent is being composed */
    df_tensor *tape;           /* last recorded tensor */
    struct dfi_pool *pool;
};

/* Sets the context's error (ctx may be NULL) and returns `code`. */
static df_result dfi_fail(df_ctx *ctx, df_result code, const char *format,
                          ...) DFI_PRINTF(3, 4);
/* The same, and makes tensor operations stick; returns NULL. */
static df_tensor *dfi_fail_tensor(df_ctx *ctx, df_result code, const char *format,
                                  ...) DFI_PRINTF(3, 4);
/* If stuck: puts the stuck sentence back and returns its code, else DF_OK. */
static df_result dfi_stuck(df_ctx *ctx);

/* Zeroed memory of the context's allocator, DFI_ALIGN aligned. NULL sets DF_ERR_MEMORY. */
static void *dfi_new(df_ctx *ctx, size_t size);
static void dfi_delete(df_ctx *ctx, void *ptr, size_t size);       /* ptr may be NULL */
/* The same by hooks alone, for objects that outlive contexts (nets). No error is set. */
static void *dfi_new_by(const df_alloc *alloc, size_t size);
static void dfi_delete_by(const df_alloc *alloc, void *ptr, size_t size);
/* Zeroed memory freed with the context. */
static void *dfi_new_owned(df_ctx *ctx, size_t size);
/* a * b, a + b, or SIZE_MAX if that overflows (no allocation of SIZE_MAX succeeds). */
static size_t dfi_mul(size_t a, size_t b);
static size_t dfi_plus(size_t a, size_t b);

/* Step memory, not zeroed, DFI_ALIGN aligned. NULL sets DF_ERR_MEMORY. Released by
   scopes. */
static void *dfi_scratch(df_ctx *ctx, size_t bytes);
static df_scope dfi_scratch_mark(df_ctx *ctx);
/* also while recording */
static void dfi_scratch_release(df_ctx *ctx, df_scope mark);
/* made since mark? */
static int dfi_scratch_after(df_ctx *ctx, df_scope mark, const void *ptr);

/* fn(arg, 0) .. fn(arg, count-1) on the workers; returns when all are done. */
static void dfi_parallel(df_ctx *ctx, int count, void (*fn)(void *arg, int index),
                         void *arg);
static int dfi_cancelled(df_ctx *ctx);

/* Rows that do not see each other: fn computes one in `room` doubles of memory and returns
   a number, finite if all went well. */
typedef struct dfi_rows {
    double (*fn)(const void *job, size_t row, double *memory);
    const void *job;
    size_t n, room, tasks;
    double *result, *memory;           /* [n] or NULL, [tasks, room] */
} dfi_rows;
/* Runs the rows on the workers; sum: of their numbers, added in one order whoever made
   them. NONFINITE, with the row, where one is not finite. */
static df_result dfi_rows_run(df_ctx *ctx, const char *who, dfi_rows r, double *sum);
/* Refuses NaN and Inf in an array [n, width]; x may be NULL. */
static df_result dfi_rows_finite(df_ctx *ctx, const char *who, const char *what, size_t n,
                                 size_t width, const df_real *x);
/* As qsort, in place and n log n always; and numbers, ascending, spare [n]. */
static void dfi_sort(void *base, size_t count, size_t size,
                     int (*order)(const void *a, const void *b));
static void dfi_merge_sort(size_t n, double *x, double *spare);

/* NaN or Inf, by the bits: comparisons vanish under -Ofast. */
static int dfi_nonfinite(double x);
/* "nan", "inf" or "-inf" of a number that dfi_nonfinite flags. */
static const char *dfi_nonfinite_name(double x);

/* A copy of a string by the context's allocator. */
static char *dfi_strdup(df_ctx *ctx, const char *s);

#define DFI_COOKIE 0xd1ff5e01u /* marks a descriptor made by its df_..._defaults */

/* ---- process (chapter 2) ---- */
/* c_in, 1 if off */
static double dfi_model_scale(const df_model *m, const df_point *at);
/* to = cx x + cp answer for a model's own answer (prediction and clock). */
static df_result dfi_model_map(df_ctx *ctx, const df_model *m, df_prediction to,
                               const df_point *at,
                               double *cx, double *cp);

/* =====================================================================================
   // >>foundations: errors, memory, random numbers, workers

   Nothing here knows about diffusion. Four promises are kept in this chapter: the library
   never aborts or prints, it takes memory only through hooks, its random numbers are
   functions of (seed, sample, draw) and of nothing else, and it works on as many threads
   as it is given without any result depending on how many those are.
   ===================================================================================== */
#ifndef DIFFUSION_NO_THREADS
#if (defined(__unix__) || defined(__APPLE__)) && (defined(__GNUC__) || defined(__clang__))
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#define DFI_THREADS 1
#endif
#endif
#ifndef DFI_THREADS
#define DFI_THREADS 0
#endif

/* ---- bits ---- */

/* The exponent field of a NaN or Inf is all ones. memcpy keeps -Ofast from assuming that
   no such number exists. */
static int dfi_nonfinite(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return ((bits >> 52) & 0x7ff) == 0x7ff;
}

static const char *dfi_nonfinite_name(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits << 12) != 0) return "nan";
    return (bits >> 63) != 0 ? "-inf" : "inf";
}

/* Sizes saturate: SIZE_MAX stands for "does not fit", and no allocator can serve it. */
static size_t dfi_mul(size_t a, size_t b) {
    return b != 0 && a > SIZE_MAX / b ? SIZE_MAX : a * b;
}

static size_t dfi_plus(size_t a, size_t b) {
    return a > SIZE_MAX - b ? SIZE_MAX : a + b;
}

/* ---- errors ---- */

static void dfi_log(const df_ctx *ctx, df_log_level level, const char *text) {
    if (ctx->log.message != NULL) ctx->log.message(ctx->log.user, level, text);
}

static void dfi_set_error(df_ctx *ctx, df_result code, const char *format, va_list args) {
    char text[DFI_MESSAGE];    /* an argument may be the old message itself */
    vsnprintf(text, sizeof text, format, args);
    memcpy(ctx->message, text, sizeof text);
    ctx->code = code;
    dfi_log(ctx, DF_LOG_ERROR, ctx->message);
}

static df_result dfi_fail(df_ctx *ctx, df_result code, const char *format, ...) {
    va_list args;
    if (ctx == NULL) return code;
    va_start(args, format);
    dfi_set_error(ctx, code, format, args);
    va_end(args);
    return code;
}

static df_tensor *dfi_fail_tensor(df_ctx *ctx, df_result code, const char *format, ...) {
    va_list args;
    if (ctx->stuck != DF_OK) return NULL;
    va_start(args, format);
    dfi_set_error(ctx, code, format, args);
    va_end(args);
    ctx->stuck = code;
    memcpy(ctx->stuck_message, ctx->message, sizeof ctx->message);
    return NULL;
}

static df_result dfi_stuck(df_ctx *ctx) {
    if (ctx->stuck == DF_OK) return DF_OK;
    ctx->code = ctx->stuck;
    memcpy(ctx->message, ctx->stuck_message, sizeof ctx->message);
    return ctx->stuck;
}

DF_API df_result df_ctx_error(const df_ctx *ctx) {
    return ctx ? ctx->code : (df_result)DF_ERR_MEMORY;
}
DF_API const char *df_ctx_message(const df_ctx *ctx) {
    return ctx ? ctx->message : "there is no context: df_ctx_create gave NULL";
}

DF_API void df_ctx_clear(df_ctx *ctx) {
    if (ctx == NULL) return;
    ctx->code = ctx->stuck = DF_OK;
    ctx->message[0] = ctx->stuck_message[0] = 0;
#if defined(__GNUC__) || defined(__clang__)
    __atomic_store_n(&ctx->cancel, 0, __ATOMIC_RELAXED);
#else
    ctx->cancel = 0;
#endif
}

DF_API const char *df_result_name(df_result result) {
    static const char *const names[] = {
        "ok", "wrong argument", "no memory", "shapes do not fit", "singular", "not finite",
        "input/output", "wrong format", "unsupported", "cancelled"
    };
    if (result > 0 || result < DF_CANCELLED) return "a callback's failure";
    return names[-result];
}

DF_API void df_ctx_cancel(df_ctx *ctx) {
    if (ctx == NULL) return;
#if defined(__GNUC__) || defined(__clang__)
    __atomic_store_n(&ctx->cancel, 1, __ATOMIC_RELAXED);
#else
    *(volatile int *)&ctx->cancel = 1;
#endif
}

/* Reports a cancel request once: the next piece of work starts afresh. */
static int dfi_cancelled(df_ctx *ctx) {
#if defined(__GNUC__) || defined(__clang__)
    return __atomic_exchange_n(&ctx->cancel, 0, __ATOMIC_RELAXED);
#else
    int was = *(volatile int *)&ctx->cancel;
    if (was) *(volatile int *)&ctx->cancel = 0;
    return was;
#endif
}

/* ---- memory from the host ---- */

/* malloc promises 16 bytes at most. We ask for `align` more, round up, and keep the
   distance to the true start in the byte before the result; aligned_alloc is missing from
   C99. */
static void *dfi_malloc(void *user, size_t size, size_t align) {
    unsigned char *raw, *aligned;
    (void)user;
    if (size > SIZE_MAX - align) return NULL;
    raw = (unsigned char *)malloc(size + align);
    if (raw == NULL) return NULL;
    aligned = raw + (align - (uintptr_t)raw % align);
    aligned[-1] = (unsigned char)(aligned - raw);     /* 1 .. align <= 64 */
    return aligned;
}

static void dfi_malloc_free(void *user, void *ptr, size_t size, size_t align) {
    unsigned char *aligned = (unsigned char *)ptr;
    (void)user, (void)size, (void)align;
    free(aligned - aligned[-1]);
}

static void *dfi_new_by(const df_alloc *alloc, size_t size) {
    void *ptr = size == SIZE_MAX ? NULL : alloc->alloc(alloc->user, size, DFI_ALIGN);
    if (ptr != NULL) memset(ptr, 0, size);
    return ptr;
}

static void dfi_delete_by(const df_alloc *alloc, void *ptr, size_t size) {
    if (ptr != NULL) alloc->free(alloc->user, ptr, size, DFI_ALIGN);
}

/* Every byte of a context passes here, so that it can be counted. Not zeroed: step memory
   would pay for it. */
static void *dfi_take(df_ctx *ctx, size_t size) {
    void *ptr = NULL;
    if (size != SIZE_MAX) ptr = ctx->alloc.alloc(ctx->alloc.user, size, DFI_ALIGN);
    if (ptr == NULL) {
        dfi_fail(ctx, DF_ERR_MEMORY, "no memory: %.6g MiB asked for, %.6g MiB in use",
                 (double)size / 1048576.0, (double)ctx->bytes / 1048576.0);
        return NULL;
    }
    ctx->bytes += size;
    if (ctx->bytes > ctx->peak) ctx->peak = ctx->bytes;
    return ptr;
}

static void *dfi_new(df_ctx *ctx, size_t size) {
    void *ptr = dfi_take(ctx, size);
    if (ptr != NULL) memset(ptr, 0, size);
    return ptr;
}

static void dfi_delete(df_ctx *ctx, void *ptr, size_t size) {
    if (ptr == NULL) return;
    DFI_ASSERT(ctx->bytes >= size);
    ctx->alloc.free(ctx->alloc.user, ptr, size, DFI_ALIGN);
    ctx->bytes -= size;
}

static void *dfi_new_owned(df_ctx *ctx, size_t size) {
    size_t total = dfi_plus(DFI_ALIGN, size);
    dfi_owned *o = (dfi_owned *)dfi_new(ctx, total);
    if (o == NULL) return NULL;
    o->size = total;
    o->next = ctx->owned;
    ctx->owned = o;
    return (unsigned char *)o + DFI_ALIGN;
}

static char *dfi_strdup(df_ctx *ctx, const char *s) {
    size_t size = strlen(s) + 1;
    char *copy = (char *)dfi_new(ctx, size);
    if (copy != NULL) memcpy(copy, s, size);
    return copy;
}

/* ---- step memory ----
   A stack made of blocks. Cutting from the current block is an addition; when it is full
   the next one follows, twice the size of all before, so that after a step or two
   everything fits in few blocks. Releasing to a mark keeps the blocks for the next
   step. */

enum { DFI_FIRST_BLOCK = 1 << 16 };    /* bytes; a small host pays for what it uses */
#define DFI_BLOCK_HEAD (((sizeof(dfi_block) + DFI_ALIGN - 1) / DFI_ALIGN) * DFI_ALIGN)

static unsigned char *dfi_block_data(dfi_block *b) {
    return (unsigned char *)b + DFI_BLOCK_HEAD;
}

/* Makes a block that holds at least `bytes` the current one. Blocks behind the current one
   are empty: the first that is large enough is moved up, else a new one is put there. */
static dfi_block *dfi_block_next(df_ctx *ctx, size_t bytes) {
    dfi_block **link = ctx->block != NULL ? &ctx->block->next : &ctx->first;
    dfi_block **spare = link, *b;
    size_t total = 0, want;
    while (*spare != NULL && (*spare)->capacity < bytes) spare = &(*spare)->next;
    if (*spare != NULL) {
        b = *spare;
        *spare = b->next;
    } else {
        for (b = ctx->first; b != NULL; b = b->next) total = dfi_plus(total, b->capacity);
        want = total > bytes ? total : bytes;
        if (want < DFI_FIRST_BLOCK) want = DFI_FIRST_BLOCK;
        b = (dfi_block *)dfi_take(ctx, dfi_plus(DFI_BLOCK_HEAD, want));
        if (b == NULL) return NULL;
        b->capacity = want;
        b->size = DFI_BLOCK_HEAD + want;
    }
    b->used = 0;
    b->next = *link;
    *link = b;
    ctx->block = b;
    return b;
}

static void *dfi_scratch(df_ctx *ctx, size_t bytes) {
    dfi_block *b = ctx->block;
    size_t rounded = dfi_plus(bytes, DFI_ALIGN - 1);
    void *ptr;
    if (rounded != SIZE_MAX) rounded = rounded / DFI_ALIGN * DFI_ALIGN;
    if (b == NULL || rounded > b->capacity - b->used) {
        b = dfi_block_next(ctx, rounded);
        if (b == NULL) return NULL;
    }
    ptr = dfi_block_data(b) + b->used;
    b->used += rounded;
    return ptr;
}

static df_scope dfi_scratch_mark(df_ctx *ctx) {
    df_scope mark;
    mark.block = ctx->block;
    mark.used = ctx->block != NULL ? ctx->block->used : 0;
    return mark;
}

static void dfi_scratch_release(df_ctx *ctx, df_scope mark) {
    ctx->block = (dfi_block *)mark.block;
    DFI_ASSERT(ctx->block == NULL || mark.used <= ctx->block->used);
    if (ctx->block != NULL) ctx->block->used = mark.used;
}

static int dfi_scratch_after(df_ctx *ctx, df_scope mark, const void *ptr) {
    dfi_block *b = mark.block != NULL ? (dfi_block *)mark.block : ctx->first;
    uintptr_t p = (uintptr_t)ptr;      /* numbers: strangers' pointers do not compare */
    size_t from = mark.block != NULL ? mark.used : 0;
    for (; b != NULL; b = b->next, from = 0) {
        uintptr_t data = (uintptr_t)dfi_block_data(b);
        if (p >= data + from && p < data + b->used) return 1;
        if (b == ctx->block) break;
    }
    return 0;
}

static void dfi_scratch_free(df_ctx *ctx) {
    while (ctx->first != NULL) {
        dfi_block *b = ctx->first;
        ctx->first = b->next;
        dfi_delete(ctx, b, b->size);
    }
    ctx->block = NULL;
}

/* ---- random numbers ----
   Philox 4x32-10: ten rounds of two 32x32 -> 64 bit products on a 128-bit counter, keyed
   by 64 bits (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2,
   3"). Counter: {block, draw, sample low, sample high}; key: seed. */
DF_API void df_random_bits(uint64_t seed, uint64_t sample, uint32_t draw, uint32_t block,
                           uint32_t bits[4]) {
    uint32_t c0 = block, c1 = draw, c2 = (uint32_t)sample, c3 = (uint32_t)(sample >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    int round;
    for (round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;     /* golden ratio and sqrt 3 - 1, as fractions of 2^32 */
        k1 += 0xBB67AE85u;
    }
    bits[0] = c0, bits[1] = c1, bits[2] = c2, bits[3] = c3;
}

/* Normal numbers are made by Box & Muller (1958): with r = sqrt(-2 ln u), r cos(theta) and
   r sin(theta). libm's ln, cos and sin differ between machines in the last bit, and
   compilers fuse products and sums as they like; so both are computed here in integers
   with 30 fractional bits (Q30, error below 1e-8), which no compiler may change (>> of a
   negative number rounds down on all we know, and by C++20's word). sqrt and one product
   of doubles are exact to rounding everywhere. */

/* -ln((word + 1/2) / 2^32) in Q30, at least 0. With v = 2 word + 1 = 2^top (1 + f):
   (33 - top) ln 2 - ln(1 + f), and ln(1 + f) by its Chebyshev interpolant on [0, 1]. */
static int64_t dfi_minus_log(uint32_t word) {
    static const int32_t c[11] = {
        0, 1073741577, -536860845, 357751363, -267061634, 207787834, -156057253, 101743012,
        -50520772, 16165559, -2427725
    };
    uint64_t v = 2 * (uint64_t)word + 1;
    int64_t f, ln = c[10], result;
    int top = 32, k;
    while ((v >> top) == 0) top--;
    f = (int64_t)((v << (32 - top)) & 0xffffffffu);                    /* Q32 */
    for (k = 9; k >= 0; k--) ln = c[k] + ((ln * f) >> 32);
    result = (33 - top) * (int64_t)744261118 - ln;                     /* ln 2 in Q30 */
    return result > 0 ? result : 0;
}

/* cos and sin of 2 pi word / 2^32 in Q30. The circle is cut in quarters around 0, 1/4,
   1/2, 3/4; within one, y in [-1, 1) stands for [-pi/4, pi/4), and Taylor's series in y^2
   serve. */
static void dfi_cos_sin(uint32_t word, int64_t *cosine, int64_t *sine) {
    static const int32_t s[6] = { 843314857, -86699834, 2674041, -39273, 336, -2 };
    static const int32_t c[6] = { 1073741824, -331168970, 17023473, -350031, 3856, -26 };
    uint32_t turned = word + 0x20000000u;                              /* + 1/8 turn */
    int64_t y = (int64_t)(turned & 0x3fffffffu) - 0x20000000;          /* Q29 */
    int64_t y2 = (y * y) >> 26;                                        /* Q32 */
    int64_t a = s[5], b = c[5];
    int k;
    for (k = 4; k >= 0; k--) {
        a = s[k] + ((a * y2) >> 32);
        b = c[k] + ((b * y2) >> 32);
    }
    a = (a * y) >> 29;
    switch (turned >> 30) {
    case 0: *cosine = b, *sine = a; break;
    case 1: *cosine = -a, *sine = b; break;
    case 2: *cosine = -b, *sine = -a; break;
    default: *cosine = a, *sine = -b; break;
    }
}

/* Four normal numbers from one block of bits. */
static void dfi_normal4(const uint32_t bits[4], double out[4]) {
    int pair;
    for (pair = 0; pair < 2; pair++) {
        double r = sqrt((double)(2 * dfi_minus_log(bits[2 * pair])) / 1073741824.0);
        int64_t cosine, sine;
        dfi_cos_sin(bits[2 * pair + 1], &cosine, &sine);
        out[2 * pair] = r * ((double)cosine / 1073741824.0);
        out[2 * pair + 1] = r * ((double)sine / 1073741824.0);
    }
}

DF_API void df_random_normal(uint64_t seed, uint64_t sample, uint32_t draw, size_t n,
                             df_real *out) {
    size_t i;
    for (i = 0; i < n; i += 4) {
        uint32_t bits[4];
        double four[4];
        size_t j;
        df_random_bits(seed, sample, draw, (uint32_t)(i / 4), bits);
        dfi_normal4(bits, four);
        for (j = 0; j < 4 && i + j < n; j++) out[i + j] = (df_real)four[j];
    }
}

DF_API void df_random_uniform(uint64_t seed, uint64_t sample, uint32_t draw, size_t n,
                              double *out) {
    size_t i;
    for (i = 0; i < n; i += 4) {
        uint32_t bits[4];
        size_t j;
        df_random_bits(seed, sample, draw, (uint32_t)(i / 4), bits);
        for (j = 0; j < 4 && i + j < n; j++)
            out[i + j] = ((double)bits[j] + 0.5) / 4294967296.0;
    }
}

/* ---- noise sources of samplers ---- */

/* A Brownian path: W(0) = 0, W(1) one draw, and between two known points the midpoint is
   their mean plus a draw of variance a quarter of their distance (Levy 1948). Draws are
   keyed by level and place, four elements at a time, so that any point can be found alone:
   nothing is stored, and the path is the same whoever asks. w [4] at s in [0, 1]. */
static void dfi_brownian4(uint64_t seed, uint64_t sample, uint32_t block, double s,
                          double w[4]) {
    double low[4] = { 0, 0, 0, 0 }, high[4], z[4], left = 0, length = 1;
    uint32_t bits[4], place = 0;
    df_random_bits(seed ^ UINT64_C(0xb40b40b40b40b40b), sample, 0, block, bits);
    dfi_normal4(bits, high);
    for (int level = 1; level <= 32; level++) {
        double middle = left + length / 2;
        df_random_bits(seed + (uint64_t)level * UINT64_C(0x9e3779b97f4a7c15), sample,
                       place, block, bits);
        dfi_normal4(bits, z);
        length /= 2;
        place *= 2;
        for (int e = 0; e < 4; e++)
            z[e] = (low[e] + high[e]) / 2 + sqrt(length / 2) * z[e];
        if (s < middle) {
            memcpy(high, z, sizeof z);
        } else {
            memcpy(low, z, sizeof z);
            left = middle;
            place++;
        }
    }
    for (int e = 0; e < 4; e++) w[e] = low[e] + (high[e] - low[e]) * (s - left) / length;
}

/* The increment over the stretch, s = sigma/(alpha+sigma), over the root of its length. A
   stretch of no length (the start, a stopped clock) is an ordinary draw. */
static int dfi_brownian_fill(void *user, const df_noise_query *q, df_real *out) {
    double a = q->from.sigma / (q->from.alpha + q->from.sigma);
    double b = q->to.sigma / (q->to.alpha + q->to.sigma), length = fabs(a - b);
    (void)user;
    for (int i = 0; i < q->n; i++) {
        uint64_t sample = q->first_sample + (uint64_t)i;
        df_real *row = out + (size_t)i * (size_t)q->dim;
        if (!(length > 0)) df_random_normal(q->seed, sample, q->draw, (size_t)q->dim, row);
        for (int j = 0; j < q->dim && length > 0; j += 4) {
            double wa[4], wb[4];
            dfi_brownian4(q->seed, sample, (uint32_t)j / 4, a, wa);
            dfi_brownian4(q->seed, sample, (uint32_t)j / 4, b, wb);
            for (int e = 0; e < 4 && j + e < q->dim; e++)
                row[j + e] = (df_real)((wa[e] - wb[e]) / sqrt(length));
        }
    }
    return DF_OK;
}

static df_noise dfi_noise_make(int (*fill)(void *, const df_noise_query *, df_real *),
                               void *user) {
    df_noise noise;
    noise.fill = fill;
    noise.user = user;
    return noise;
}
DF_API df_noise df_noise_brownian(void) { return dfi_noise_make(dfi_brownian_fill, NULL); }

static int dfi_replay_fill(void *user, const df_noise_query *q, df_real *out) {
    df_replay *r = (df_replay *)user;
    size_t size = (size_t)q->n * (size_t)q->dim;
    if (r->draws == NULL || r->used < 0 || r->used >= r->count || r->size != size)
        return DF_ERR_ARGUMENT;
    memcpy(out, r->draws + (size_t)r->used++ * size, size * sizeof *out);
    return DF_OK;
}
DF_API df_noise df_noise_replay(df_replay *replay) {
    return dfi_noise_make(dfi_replay_fill, replay);
}

/* PyTorch's generator on a CPU: the Mersenne twister MT19937 (Matsumoto & Nishimura 1998),
   seeded as init_genrand does. */
DF_API void df_torch_seed(df_torch_random *random, uint64_t seed) {
    random->state[0] = (uint32_t)seed;
    for (uint32_t i = 1; i < 624; i++) {
        uint32_t x = random->state[i - 1];
        random->state[i] = 1812433253u * (x ^ (x >> 30)) + i;
    }
    random->at = 624;
    random->spare = 0;
    random->kept = 0;
}

DF_API uint32_t df_torch_bits(df_torch_random *random) {
    uint32_t *s = random->state, y;
    if (random->at >= 624 || random->at < 0) {
        for (int i = 0; i < 624; i++) {
            y = (s[i] & 0x80000000u) | (s[(i + 1) % 624] & 0x7fffffffu);
            s[i] = s[(i + 397) % 624] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0);
        }
        random->at = 0;
    }
    y = s[random->at++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

/* 53 bits of two words, for fewer than 16 numbers: Box & Muller one by one, the second of
   a pair kept for the next call. */
static double dfi_torch_one(df_torch_random *random) {
    double u[2], r;
    if (random->spare) {
        random->spare = 0;
        return random->kept;
    }
    for (int i = 0; i < 2; i++) {
        uint64_t high = df_torch_bits(random), low = df_torch_bits(random);
        u[i] =
            (double)((high << 32 | low) & UINT64_C(0x1fffffffffffff)) / 9007199254740992.0;
    }
    r = sqrt(-2 * log1p(-u[1]));
    random->kept = r * sin(2 * DFI_PI * u[0]);
    random->spare = 1;
    return r * cos(2 * DFI_PI * u[0]);
}

/* From 16 numbers on: all uniform ones first, of 24 bits; then blocks of 16, where number
   j and j + 8 make a pair. The last 16 are drawn anew if the blocks are not even. */
DF_API void df_torch_randn(df_torch_random *random, size_t n, df_real *out) {
    for (size_t i = 0; n < 16 && i < n; i++) out[i] = (df_real)dfi_torch_one(random);
    for (size_t i = 0; n >= 16 && i < n; i++)
        out[i] = (df_real)(df_torch_bits(random) & 0xffffffu) / (df_real)16777216;
    for (size_t at = 0; n >= 16 && at < n; at += 16) {
        if (n - at < 16) {
            at = n - 16;
            for (size_t i = at; i < n; i++)
                out[i] = (df_real)(df_torch_bits(random) & 0xffffffu) / (df_real)16777216;
        }
        for (size_t j = at; j < at + 8; j++) {
            double r = sqrt(-2 * log(1 - (double)out[j]));
            double angle = 2 * DFI_PI * (double)out[j + 8];
            out[j] = (df_real)(r * cos(angle));
            out[j + 8] = (df_real)(r * sin(angle));
        }
    }
}
static int dfi_torch_fill(void *user, const df_noise_query *q, df_real *out) {
    df_torch_randn((df_torch_random *)user, (size_t)q->n * (size_t)q->dim, out);
    return DF_OK;
}
DF_API df_noise df_noise_torch(df_torch_random *random) {
    return dfi_noise_make(dfi_torch_fill, random);
}

/* ---- workers ----
   One job at a time: tasks 0 .. count-1. `ticket` holds the job's number (high half) and
   how many tasks are still to be taken (low half); taking one is a compare-and-swap, which
   fails if the job has changed meanwhile, so a late worker can never touch a job that is
   over. Between jobs workers spin for some microseconds, since graphs come as bursts of
   short jobs, then sleep. */
#if DFI_THREADS

typedef struct dfi_pool {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t *thread;
    int threads;               /* workers beside the caller */
    int sleepers, stop;        /* __atomic */
    uint64_t ticket;           /* __atomic: job << 32 | tasks left */
    int done;                  /* __atomic: tasks finished */
    int count;
    void (*fn)(void *arg, int index);
    void *arg;
} dfi_pool;

enum { DFI_SPINS = 4000 };     /* about 40 microseconds of pauses */

DFI_INLINE void dfi_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Takes and runs one task; 0 if none is left. */
static int dfi_pool_work(dfi_pool *p) {
    uint64_t ticket = __atomic_load_n(&p->ticket, __ATOMIC_ACQUIRE);
    while ((uint32_t)ticket != 0) {
        if (__atomic_compare_exchange_n(&p->ticket, &ticket, ticket - 1, 0,
                                        __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
            p->fn(p->arg, p->count - (int)(uint32_t)ticket);
            __atomic_fetch_add(&p->done, 1, __ATOMIC_RELEASE);
            return 1;
        }
    }
    return 0;
}

static void dfi_pool_sleep(dfi_pool *p) {
    pthread_mutex_lock(&p->lock);
    __atomic_fetch_add(&p->sleepers, 1, __ATOMIC_SEQ_CST);
    while ((uint32_t)__atomic_load_n(&p->ticket, __ATOMIC_SEQ_CST) == 0 &&
           !__atomic_load_n(&p->stop, __ATOMIC_SEQ_CST))
        pthread_cond_wait(&p->wake, &p->lock);
    __atomic_fetch_sub(&p->sleepers, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&p->lock);
}

static void *dfi_pool_main(void *arg) {
    dfi_pool *p = (dfi_pool *)arg;
    int idle = 0;
    while (!__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE)) {
        if (dfi_pool_work(p)) {
            idle = 0;
        } else if (++idle < DFI_SPINS) {
            dfi_pause();
        } else {
            dfi_pool_sleep(p);
            idle = 0;
        }
    }
    return NULL;
}

static void dfi_pool_wake(dfi_pool *p) {
    if (__atomic_load_n(&p->sleepers, __ATOMIC_SEQ_CST) == 0) return;
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

static void dfi_pool_free(df_ctx *ctx) {
    dfi_pool *p = (dfi_pool *)ctx->pool;
    int i;
    if (p == NULL) return;
    __atomic_store_n(&p->stop, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (i = 0; i < p->threads; i++) pthread_join(p->thread[i], NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    dfi_delete(ctx, p, sizeof *p + (size_t)ctx->threads * sizeof *p->thread);
    ctx->pool = NULL;
}

/* Started at the first parallel work. Without memory or threads the caller works alone:
   slower, never wrong, so no error. */
static dfi_pool *dfi_pool_get(df_ctx *ctx) {
    dfi_pool *p = (dfi_pool *)ctx->pool;
    size_t size = sizeof *p + (size_t)ctx->threads * sizeof *p->thread;
    if (p != NULL) return p;
    p = (dfi_pool *)ctx->alloc.alloc(ctx->alloc.user, size, DFI_ALIGN);
    if (p == NULL) return NULL;
    memset(p, 0, size);
    ctx->bytes += size;
    if (ctx->bytes > ctx->peak) ctx->peak = ctx->bytes;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->thread = (pthread_t *)(p + 1);
    while (p->threads < ctx->threads - 1 &&
           pthread_create(&p->thread[p->threads], NULL, dfi_pool_main, p) == 0)
        p->threads++;
    if (p->threads < ctx->threads - 1)
        dfi_log(ctx, DF_LOG_WARNING, "df_ctx: not all workers could be started");
    ctx->pool = p;
    return p;
}

static void dfi_pool_run(dfi_pool *p, int count, void (*fn)(void *arg, int index),
                         void *arg) {
    uint64_t job = (__atomic_load_n(&p->ticket, __ATOMIC_RELAXED) >> 32) + 1;
    int spins = 0;
    p->fn = fn, p->arg = arg, p->count = count;
    __atomic_store_n(&p->done, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&p->ticket, (job << 32) | (uint64_t)(uint32_t)count,
                     __ATOMIC_SEQ_CST);
    dfi_pool_wake(p);
    while (dfi_pool_work(p)) { }
    while (__atomic_load_n(&p->done, __ATOMIC_ACQUIRE) != count) {
        if (++spins < DFI_SPINS) dfi_pause();
        else sched_yield();
    }
}

static int dfi_processors(void) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > 256 ? 256 : (int)n;
}

#else

static void dfi_pool_free(df_ctx *ctx) { (void)ctx; }
static int dfi_processors(void) { return 1; }

#endif

static void dfi_parallel(df_ctx *ctx, int count, void (*fn)(void *arg, int index),
                         void *arg) {
    int i;
    if (count > 1 && ctx->threads > 1) {
        if (ctx->tasks.run != NULL) {
            ctx->tasks.run(ctx->tasks.user, count, fn, arg);
            return;
        }
#if DFI_THREADS
        {
            dfi_pool *pool = dfi_pool_get(ctx);
            if (pool != NULL) {
                dfi_pool_run(pool, count, fn, arg);
                return;
            }
        }
#endif
    }
    for (i = 0; i < count; i++) fn(arg, i);
}

static void dfi_rows_task(void *arg, int index) {
    const dfi_rows *r = (const dfi_rows *)arg;
    for (size_t i = (size_t)index; i < r->n; i += r->tasks)
        r->result[i] = r->fn(r->job, i, r->memory + (size_t)index * r->room);
}

/* sum: of the numbers, added in the same order whoever made them. */
static df_result dfi_rows_run(df_ctx *ctx, const char *who, dfi_rows r, double *sum) {
    df_scope mark = dfi_scratch_mark(ctx);
    size_t i;
    r.tasks = (size_t)ctx->threads < r.n ? (size_t)ctx->threads : r.n;
    i = dfi_plus(r.n, dfi_mul(r.tasks, r.room));
    r.memory = (double *)dfi_scratch(ctx, dfi_mul(i, sizeof(double)));
    if (r.memory == NULL) return DF_ERR_MEMORY;
    if (r.result == NULL) r.result = r.memory + r.tasks * r.room;
    dfi_parallel(ctx, (int)r.tasks, dfi_rows_task, &r);
    for (i = 0, *sum = 0.0; i < r.n && !dfi_nonfinite(*sum); i++) *sum += r.result[i];
    dfi_scratch_release(ctx, mark);
    if (!dfi_nonfinite(*sum)) return DF_OK;
    return dfi_fail(ctx, DF_ERR_NONFINITE, "%s: row (or direction) %d lies so far out "
                    "that squared distances overflow", who, (int)i - 1);
}

/* Refuses NaN and Inf in an array [n, width]. */
static df_result dfi_rows_finite(df_ctx *ctx, const char *who, const char *what, size_t n,
                                 size_t width, const df_real *x) {
    size_t size = dfi_mul(n, width), at = x != NULL ? ctx->k->nonfinite(size, x) : size;
    if (at == size) return DF_OK;
    return dfi_fail(ctx, DF_ERR_NONFINITE, "%s: %s [%d,%d] is %s in row %d, element %d",
                    who, what, (int)n, (int)width, dfi_nonfinite_name((double)x[at]),
                    (int)(at / width), (int)(at % width));
}

/* qsort's job by heap sort (Williams 1964): qsort may take memory behind the host's back,
   and may be quadratic on hostile input. */
static void dfi_swap(unsigned char *a, unsigned char *b, size_t size) {
    while (size-- > 0) {
        unsigned char keep = a[size];
        a[size] = b[size];
        b[size] = keep;
    }
}

static void dfi_sift(unsigned char *base, size_t root, size_t count, size_t size,
                     int (*order)(const void *a, const void *b)) {
    size_t child;
    while ((child = 2 * root + 1) < count) {
        if (child + 1 < count && order(base + child * size, base + (child + 1) * size) < 0)
            child++;
        if (order(base + root * size, base + child * size) >= 0) return;
        dfi_swap(base + root * size, base + child * size, size);
        root = child;
    }
}

static void dfi_sort(void *base, size_t count, size_t size,
                     int (*order)(const void *a, const void *b)) {
    unsigned char *b = (unsigned char *)base;
    for (size_t i = count / 2; i-- > 0;) dfi_sift(b, i, count, size, order);
    for (size_t end = count; end-- > 1;) {
        dfi_swap(b, b + end * size, size);
        dfi_sift(b, 0, end, size, order);
    }
}

/* Merges runs of 1, 2, 4, ... numbers (Knuth, vol. 3, sec. 5.2.4). */
static void dfi_merge_sort(size_t n, double *x, double *spare) {
    for (size_t run = 1; run < n; run *= 2) {
        for (size_t from = 0; from < n; from += 2 * run) {
            size_t half = from + run < n ? from + run : n, i = from, j = half;
            size_t end = half + run < n ? half + run : n;
            for (size_t k = from; k < end; k++)
                spare[k] = j == end || (i < half && x[i] <= x[j]) ? x[i++] : x[j++];
        }
        memcpy(x, spare, n * sizeof *x);
    }
}

/* ---- context ---- */

DF_API df_ctx_desc df_ctx_defaults(void) {
    df_ctx_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.max_isa = DF_ISA_NEON;
    return d;
}

/* The sentence for a context that never came to be: there is only the log hook to tell. */
static df_ctx *dfi_ctx_refuse(const df_ctx_desc *desc, const char *text) {
    if (desc->cookie == DFI_COOKIE && desc->log.message != NULL)
        desc->log.message(desc->log.user, DF_LOG_ERROR, text);
    return NULL;
}

DF_API df_ctx *df_ctx_create(const df_ctx_desc *desc) {
    df_ctx_desc d = desc != NULL ? *desc : df_ctx_defaults();
    df_ctx *ctx;
    if (d.cookie != DFI_COOKIE)
        return dfi_ctx_refuse(&d,
                "df_ctx_create: start the descriptor with df_ctx_defaults()");
    if ((d.alloc.alloc == NULL) != (d.alloc.free == NULL))
        return dfi_ctx_refuse(&d, "df_ctx_create: give both alloc and free, or neither");
    if (d.threads < 0 || d.threads > 1024 ||
        (d.tasks.run != NULL && (d.tasks.workers < 1 || d.tasks.workers > 1024)))
        return dfi_ctx_refuse(&d, "df_ctx_create: threads 0 .. 1024, workers 1 .. 1024");
    if (d.alloc.alloc == NULL) {
        d.alloc.alloc = dfi_malloc;
        d.alloc.free = dfi_malloc_free;
    }
    ctx = (df_ctx *)dfi_new_by(&d.alloc, sizeof *ctx);
    if (ctx == NULL) return dfi_ctx_refuse(&d, "df_ctx_create: no memory");
    ctx->alloc = d.alloc;
    ctx->log = d.log;
    ctx->tasks = d.tasks;
    ctx->threads = d.tasks.run != NULL ? d.tasks.workers
                 : d.threads > 0 ? d.threads : dfi_processors();
    ctx->k = dfi_kernels_select(d.max_isa);
    ctx->bytes = ctx->peak = sizeof *ctx;
    return ctx;
}

DF_API void df_ctx_free(df_ctx *ctx) {
    df_alloc alloc;
    if (ctx == NULL) return;
    dfi_pool_free(ctx);
    dfi_scratch_free(ctx);
    while (ctx->owned != NULL) {
        dfi_owned *o = ctx->owned;
        ctx->owned = o->next;
        dfi_delete(ctx, o, o->size);
    }
    alloc = ctx->alloc;        /* the context goes back by hooks that it holds itself */
    dfi_delete_by(&alloc, ctx, sizeof *ctx);
}

DF_API size_t df_ctx_bytes(const df_ctx *ctx) { return ctx ? ctx->bytes : 0; }
DF_API size_t df_ctx_peak_bytes(const df_ctx *ctx) { return ctx ? ctx->peak : 0; }
DF_API int df_ctx_threads(const df_ctx *ctx) { return ctx ? ctx->threads : 0; }
DF_API const char *df_ctx_isa(const df_ctx *ctx) { return ctx ? ctx->k->name : ""; }
DF_API int df_version(void) { return DF_VERSION; }
DF_API const char *df_precision(void) { return DF_REAL_NAME; }

/* Processes, samplers, guidance, and further down networks, training, files and closed
   forms leave most arithmetic to tensors and kernels. gcc need not spend its time on them:
   a fifth of the whole at -O2. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#pragma GCC push_options
#pragma GCC optimize("O1")
#endif

/* -------------------------------------------------------------------------------------
   // >>process: alpha, sigma, lambda; tables of betas; native times; grids

   Every Gaussian process here is a path x_t = alpha(t) x_0 + sigma(t) eps, eps ~ N(0, I),
   t = 0 the data, t = 1 the noise. Two functions of t say all:
       lambda = log(alpha/sigma)                   half the log signal-to-noise ratio
       f   = alpha'/alpha                          drift of the SDE dx = f x dt + g dW
       g^2 = (sigma^2)' - 2 f sigma^2 = -2 sigma^2 lambda'   noise (Kingma et al. 2021)
       w   = alpha sigma' - sigma alpha' = -alpha sigma lambda'   (the Wronskian)
   x has mean m = alpha x_0 and variance V = sigma^2; those of the SDE obey m' = f m and
   V' = 2 f V + g^2, hence f and g^2. alpha falls and sigma rises, so the differences above
   add terms of one sign: no digits are lost, and only alpha, sigma, alpha', sigma' and
   (sigma^2)' need a closed form. The last one is there because sigma' of VP is infinite at
   the data while (sigma^2)' is not. Four functions (dfi_path_...) hold all formulas of the
   kinds; the rest is the same for every one of them.
   ------------------------------------------------------------------------------------- */

/* Infinity and NaN by their bits: -Ofast takes licence with literals and comparisons. */
static double dfi_infinity(int negative) {
    uint64_t bits = negative ? UINT64_C(0xfff0000000000000) : UINT64_C(0x7ff0000000000000);
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static int dfi_is_nan(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & UINT64_C(0x7fffffffffffffff)) > UINT64_C(0x7ff0000000000000);
}

/* (0, inf): the strictly positive, finite numbers. */
static int dfi_positive(double x) { return !dfi_nonfinite(x) && x > 0; }

/* 1 - t, which -Ofast shall not multiply out: c (1 - t) is 0 at t = 1, c - c t is not. */
static double dfi_from_noise(double t) {
    volatile double u = 1 - t;
    return u;
}

/* The logarithms apart: the ratio itself may leave the double's range. */
static df_point dfi_point(double t, double alpha, double sigma) {
    int inside = alpha > 0 && sigma > 0;
    double lambda = inside ? log(alpha) - log(sigma) : dfi_infinity(sigma > 0);
    df_point q = { t, sigma > 0 ? alpha : 1, sigma > 0 ? sigma : 0, lambda };
    return q;
}

DF_API df_point df_point_data(void) { return dfi_point(0, 1, 0); }

/* For a t that is none, or no process at all; whoever can say so reports it. */
static df_point dfi_point_nan(void) {
    double x = nan("");
    df_point q = { x, x, x, x };
    return q;
}

/* Where alpha^2 + sigma^2 = 1: the point with log alpha = l <= 0, or sigma/alpha = rho. */
static df_point dfi_vp_point(double t, double l) {
    return dfi_point(t, exp(l), sqrt(-expm1(2 * l)));
}
static df_point dfi_rho_point(double t, double rho) {
    return dfi_point(t, 1 / hypot(1.0, rho), rho / hypot(1.0, rho));
}

/* Derivatives at a point: alpha', sigma' (perhaps infinite), (sigma^2)'. */
typedef struct dfi_speeds { double alpha, sigma, sigma2; } dfi_speeds;

/* Where sigma' is finite: (sigma^2)' = 2 sigma sigma'. */
static dfi_speeds dfi_speeds_of(const df_point *at, double alpha_rate, double sigma_rate) {
    dfi_speeds d = { alpha_rate, sigma_rate, 2 * at->sigma * sigma_rate };
    return d;
}

/* Where alpha^2 + sigma^2 = 1: (sigma^2)' = -2 alpha alpha' and sigma' = (sigma^2)'/(2
   sigma), infinite at sigma = 0. */
static dfi_speeds dfi_vp_speeds(const df_point *at, double alpha_rate) {
    double squared = -2 * at->alpha * alpha_rate;
    double rate = at->sigma > 0 ? 0.5 * squared / at->sigma : dfi_infinity(0);
    dfi_speeds d = { alpha_rate, rate, squared };
    return d;
}

/* ---- a table of betas ----
   Ho et al. 2020: x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) z, hence alpha_k^2 =
   abar_k = prod_{i <= k} (1 - beta_i) and sigma_k^2 = 1 - abar_k. Knot k stands at t =
   k/T, the data at k = 0; libraries count entries from 0, so their index is T t - 1. A
   network is asked at the entries it was trained on; what stands between matters to
   solvers that choose their own times, and there libraries differ (df_interp).
   Between two knots one quantity is linear: a + (b - a) w, w = T t - k in [0, 1]. The
   piece before an entry abar_T = 0 (zero terminal SNR) takes alpha itself, because the
   others are infinite there; the one from the data cannot take log rho = -inf and stays
   with log abar. */

enum { DFI_INTERP_ALPHA = DF_INTERP_LOG_SIGMA + 1 };
typedef struct dfi_piece {
    int line;                  /* what is linear: a df_interp, or alpha */
    double a, b;               /* its values at the two knots */
} dfi_piece;

/* log abar; rho = sqrt(1/abar - 1); log rho; alpha = sqrt(abar) */
static double dfi_piece_value(int line, double log_abar) {
    switch (line) {
    case DF_INTERP_LOG_ABAR: return log_abar;
    case DF_INTERP_SIGMA: return sqrt(expm1(-log_abar));
    case DF_INTERP_LOG_SIGMA: return 0.5 * log(expm1(-log_abar));
    default: return dfi_nonfinite(log_abar) ? 0 : exp(0.5 * log_abar);
    }
}

/* The piece from knot k to k + 1. */
static dfi_piece dfi_table_piece(const df_process *p, int k) {
    double low = k > 0 ? p->log_abar[k - 1] : 0, high = p->log_abar[k];
    dfi_piece piece;
    piece.line = (int)p->interp;
    if (piece.line == DF_INTERP_LOG_SIGMA && low >= 0) piece.line = DF_INTERP_LOG_ABAR;
    if (dfi_nonfinite(high)) piece.line = DFI_INTERP_ALPHA;
    piece.a = dfi_piece_value(piece.line, low);
    piece.b = dfi_piece_value(piece.line, high);
    return piece;
}

/* The piece (k/T, (k+1)/T] that holds t. k/T rounds, so a T t within two roundings of a
   whole number is that knot; it belongs to the piece on its data side. */
static dfi_piece dfi_table_find(const df_process *p, double t, double *w) {
    double s = t * p->table_size, k;
    if (fabs(s - rint(s)) <= 2 * DBL_EPSILON * s) s = rint(s);
    k = s > 1 ? ceil(s) - 1 : 0;
    *w = s - k;
    return dfi_table_piece(p, (int)k);
}

static df_point dfi_table_at(const df_process *p, double t) {
    double w, value, alpha;
    dfi_piece piece = dfi_table_find(p, t, &w);
    value = piece.a + (piece.b - piece.a) * w;
    if (piece.line == DF_INTERP_LOG_ABAR) return dfi_vp_point(t, 0.5 * value);
    if (piece.line == DF_INTERP_SIGMA) return dfi_rho_point(t, value);
    if (piece.line == DF_INTERP_LOG_SIGMA) return dfi_rho_point(t, exp(value));
    /* T (1 - t) keeps the digits of 1 - w */
    alpha = fmin(1, piece.a * p->table_size * dfi_from_noise(t));
    return dfi_point(t, alpha, sqrt((1 - alpha) * (1 + alpha)));
}

/* Where rho is the line, alpha = (1 + rho^2)^{-1/2}: alpha' = -rho alpha^3 rho', sigma' =
   alpha^3 rho', rho = sigma/alpha. */
static dfi_speeds dfi_table_speeds(const df_process *p, const df_point *at) {
    double w, rate, alpha = at->alpha;
    dfi_piece piece = dfi_table_find(p, at->t, &w);
    rate = (piece.b - piece.a) * p->table_size;
    if (piece.line == DFI_INTERP_ALPHA) return dfi_vp_speeds(at, rate);  /* alpha' */
    if (piece.line == DF_INTERP_LOG_ABAR) return dfi_vp_speeds(at, 0.5 * rate * alpha);
    if (piece.line == DF_INTERP_LOG_SIGMA) rate *= at->sigma / alpha;  /* rho' */
    rate *= alpha * alpha;
    return dfi_speeds_of(at, -at->sigma * rate, alpha * rate);
}

/* log abar = -log(1 + rho^2) falls along the table, so bisection finds the piece; its line
   is then solved for w. */
static double dfi_table_time(const df_process *p, double rho) {
    double l = -log1p(rho * rho), w = 0;
    int low = 0, high = p->table_size - 1;
    dfi_piece piece;
    while (low < high) {                       /* the first entry at most l */
        int middle = low + (high - low) / 2;
        if (p->log_abar[middle] <= l) high = middle;
        else low = middle + 1;
    }
    piece = dfi_table_piece(p, low);
    if (fabs(piece.b - piece.a) > 0)
        w = (dfi_piece_value(piece.line, l) - piece.a) / (piece.b - piece.a);
    return (low + fmin(fmax(w, 0), 1)) / p->table_size;
}

/* ---- the other kinds ----
   VP (Song et al. 2021): the limit of DDPM's chain is dx = -beta/2 x dt + sqrt(beta) dW,
     beta(t) = a + (b - a) t. Its mean decays as log alpha = -1/2 int_0^t beta, and
     alpha^2 + sigma^2 = 1: data of unit variance keeps it ("variance preserving"). Near
     the data sigma ~ sqrt(a t), so sigma' is infinite there, while g^2 = beta is a.
   Sub-VP (there too): less noise at equal alpha, sigma = 1 - alpha^2, g^2 = beta (1 -
     alpha^4). rho = 1/alpha - alpha = -2 sinh(log alpha).
   Cosine (Nichol & Dhariwal 2021): alpha = cos(phi)/cos(phi_0), phi = c (t + .008), c =
     pi/2/1.008, variance preserving. The linear beta destroys the image too early; this
     alpha^2 falls about linearly over the middle. phi_0 keeps a table's first betas up.
     sigma^2 = sin(phi - phi_0) sin(phi + phi_0)/cos^2 phi_0 subtracts nothing.
   VE (Song et al. 2021, eq. 30, 31) and EDM (Karras et al. 2022): alpha = 1, nothing
   shrinks.
     VE walks sigma geometrically from sigma_min, never 0, to sigma_max; EDM takes sigma
     itself as time, t = sigma/sigma_max, and does reach the data.
   Flow (Liu et al. 2023): the straight line (1 - t) x_0 + t eps. Trig (Lu & Song 2024):
     the circle cos x_0 + sin (s_d eps), whose radius is the data's deviation s_d.
   Cosine, flow and trig end in pure noise: f and g^2 are infinite at t = 1. */

#define DFI_COSINE_S 0.008
#define DFI_COSINE_C (0.5 * DFI_PI / (1 + DFI_COSINE_S))

/* VP's t from (b - a)/4 t^2 + a/2 t = c = -log alpha. The textbook root subtracts nearly
   equal numbers for small c; multiplied by its conjugate it does not. */
static double dfi_beta_time(const df_process *p, double c) {
    double disc = p->a * p->a + 4 * (p->b - p->a) * c;
    return 4 * c / (p->a + sqrt(disc > 0 ? disc : 0));
}

/* Cosines of the complement, cos(c t) = sin(c (1 - t)), are exactly 0 at t = 1; VE is
   written from the nearer end, exact at both. */
static df_point dfi_path_at(const df_process *p, double t) {
    double l = -0.25 * t * (2 * p->a + (p->b - p->a) * t);     /* log alpha of VP */
    double u = dfi_from_noise(t), w = 0.5 * DFI_PI, c = DFI_COSINE_C, product;
    switch (p->kind) {
    case DF_PROCESS_VP: return dfi_vp_point(t, l);
    case DF_PROCESS_SUBVP: return dfi_point(t, exp(l), -expm1(2 * l));
    case DF_PROCESS_COSINE:
        product = sin(c * t) * sin(c * (t + 2 * DFI_COSINE_S));
        return dfi_point(t, sin(c * u) / sin(c), sqrt(product) / sin(c));
    case DF_PROCESS_VE:
        return dfi_point(t, 1, t < 0.5 ? p->a * pow(p->b / p->a, t)
                                       : p->b * pow(p->a / p->b, u));
    case DF_PROCESS_EDM: return dfi_point(t, 1, p->b * t);
    case DF_PROCESS_FLOW: return dfi_point(t, u, t);
    case DF_PROCESS_TRIG: return dfi_point(t, sin(w * u), p->sigma_data * sin(w * t));
    default: return dfi_table_at(p, t);
    }
}

static dfi_speeds dfi_path_speeds(const df_process *p, const df_point *at) {
    double decay = -0.5 * (p->a + (p->b - p->a) * at->t) * at->alpha;
    double w = 0.5 * DFI_PI, c = DFI_COSINE_C, s = p->sigma_data;
    switch (p->kind) {
    case DF_PROCESS_VP: return dfi_vp_speeds(at, decay);
    case DF_PROCESS_SUBVP: return dfi_speeds_of(at, decay, -2 * at->alpha * decay);
    case DF_PROCESS_COSINE:
        return dfi_vp_speeds(at, -c * sin(c * (at->t + DFI_COSINE_S)) / sin(c));
    case DF_PROCESS_VE: return dfi_speeds_of(at, 0, at->sigma * log(p->b / p->a));
    case DF_PROCESS_EDM: return dfi_speeds_of(at, 0, p->b);
    case DF_PROCESS_FLOW: return dfi_speeds_of(at, -1, 1);
    case DF_PROCESS_TRIG: return dfi_speeds_of(at, -w * at->sigma / s, w * s * at->alpha);
    default: return dfi_table_speeds(p, at);
    }
}

/* The inverse, where rho = sigma/alpha is given: alpha first, t last. */
static double dfi_path_alpha(const df_process *p, double rho) {
    if (p->kind == DF_PROCESS_VE || p->kind == DF_PROCESS_EDM) return 1;
    if (p->kind == DF_PROCESS_FLOW) return 1 / (1 + rho);
    if (p->kind == DF_PROCESS_SUBVP) return 1 / (0.5 * rho + hypot(1.0, 0.5 * rho));
    return 1 / hypot(1.0, p->kind == DF_PROCESS_TRIG ? rho / p->sigma_data : rho);
}

/* phi - phi_0 by its sine and cosine; sin^2 phi = sin^2 phi_0 + sigma^2 cos^2 phi_0. */
static double dfi_cosine_time(double alpha, double sigma) {
    double c = DFI_COSINE_C, sin0 = sin(c * DFI_COSINE_S), cos0 = sin(c);
    double over = sigma * cos0, cosp = alpha * cos0, sinp = hypot(sin0, over);
    return atan2(over * over / (sinp * cos0 + cosp * sin0), cosp * cos0 + sinp * sin0) / c;
}

static double dfi_path_time(const df_process *p, double rho, double alpha) {
    switch (p->kind) {
    case DF_PROCESS_VP: return dfi_beta_time(p, 0.5 * log1p(rho * rho));
    case DF_PROCESS_SUBVP: return dfi_beta_time(p, asinh(0.5 * rho));  /* -log alpha */
    case DF_PROCESS_COSINE: return dfi_cosine_time(alpha, rho * alpha);
    case DF_PROCESS_VE: return log(rho / p->a) / log(p->b / p->a);
    case DF_PROCESS_EDM: return rho / p->b;
    case DF_PROCESS_FLOW: return rho * alpha;
    case DF_PROCESS_TRIG: return atan(rho / p->sigma_data) / (0.5 * DFI_PI);
    default: return dfi_table_time(p, rho);
    }
}

/* ---- what is built on them ---- */

/* Can this process be looked at? */
static int dfi_process_known(const df_process *p) {
    if (!p || (unsigned)p->kind >= (unsigned)DF_PROCESS_COUNT) return 0;
    return p->kind != DF_PROCESS_TABLE || (p->log_abar && p->table_size > 0);
}

static df_process dfi_path(df_process_kind kind, double a, double b, double s_d) {
    df_process p = { kind, a, b, s_d, NULL, 0, DF_INTERP_LOG_ABAR };
    return p;
}

DF_API df_process df_process_vp(double beta_min, double beta_max) {
    return dfi_path(DF_PROCESS_VP, beta_min, beta_max, .5);
}
DF_API df_process df_process_cosine(void) { return dfi_path(DF_PROCESS_COSINE, 0, 0, .5); }
DF_API df_process df_process_ve(double sigma_min, double sigma_max) {
    return dfi_path(DF_PROCESS_VE, sigma_min, sigma_max, .5);
}
DF_API df_process df_process_edm(double sigma_max) {
    return dfi_path(DF_PROCESS_EDM, 0, sigma_max, .5);
}
DF_API df_process df_process_subvp(double beta_min, double beta_max) {
    return dfi_path(DF_PROCESS_SUBVP, beta_min, beta_max, .5);
}
DF_API df_process df_process_flow(void) { return dfi_path(DF_PROCESS_FLOW, 0, 0, .5); }
DF_API df_process df_process_trig(double sigma_data) {
    return dfi_path(DF_PROCESS_TRIG, 0, 0, sigma_data);
}

DF_API const char *df_process_name(const df_process *p) {
    static const char *const names[DF_PROCESS_COUNT] = { "vp", "cosine", "ve", "edm",
        "subvp", "flow", "trig", "table" };
    int known = p && (unsigned)p->kind < (unsigned)DF_PROCESS_COUNT;
    return known ? names[p->kind] : "unknown";
}

/* What df_process_table makes: log abar falls from 0, and only its end may be -inf. */
static int dfi_table_fine(const df_process *p) {
    int last = p->table_size - 1;
    if (!dfi_process_known(p) || (unsigned)p->interp > (unsigned)DF_INTERP_LOG_SIGMA)
        return 0;
    for (int i = 0; i <= last; i++) {
        double l = p->log_abar[i], before = i > 0 ? p->log_abar[i - 1] : 0;
        if (dfi_is_nan(l) || l > before || (i < last && dfi_nonfinite(l))) return 0;
    }
    return p->log_abar[last] < 0;
}

/* NULL, or the ranges wanted: so wide that nothing under- or overflows inside them. */
static const char *dfi_process_wrong(const df_process *p) {
    int a = dfi_positive(p->a), b = dfi_positive(p->b);
    if (!dfi_positive(p->sigma_data)) return "sigma_data > 0";
    switch (p->kind) {
    case DF_PROCESS_VP:                        /* alpha(1) = e^{-(a + b)/4} */
    case DF_PROCESS_SUBVP:
        return a && b && p->a + p->b < 1200 ? NULL : "beta_min, beta_max > 0, sum < 1200";
    case DF_PROCESS_VE: return a && b && p->a < p->b ? NULL : "0 < sigma_min < sigma_max";
    case DF_PROCESS_EDM: return b ? NULL : "sigma_max > 0";
    case DF_PROCESS_TABLE:
        return dfi_table_fine(p) ? NULL : "log abar falling from 0, -inf at the end alone";
    default: return NULL;
    }
}

DF_API df_result df_process_check(df_ctx *ctx, const df_process *p) {
    const char *want;
    if (!p || (unsigned)p->kind >= (unsigned)DF_PROCESS_COUNT)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_process_check: NULL or an unknown kind");
    want = dfi_process_wrong(p);
    if (!want) return DF_OK;
    return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_process_check: %s with a = %g, b = %g, "
                    "sigma_data = %g, a table of %d: want %s",
                    df_process_name(p), p->a, p->b, p->sigma_data, p->table_size, want);
}

DF_API df_point df_process_at(const df_process *p, double t) {
    if (!dfi_process_known(p) || dfi_is_nan(t)) return dfi_point_nan();
    return dfi_path_at(p, t >= 1 ? 1 : t > 0 ? t : 0);
}

/* Between the ends rho = e^{-lambda} gives alpha and sigma directly, t comes last. So two
   processes asked for one lambda agree in rho to the last digits, whatever t rounds to.
   Beyond |lambda| = 700 alpha or sigma underflows. */
DF_API df_point df_process_at_lambda(const df_process *p, double lambda) {
    df_point q, noise = df_process_at(p, 1), data = df_process_at(p, 0);
    double rho = exp(-lambda);
    if (!dfi_process_known(p) || dfi_is_nan(lambda)) return dfi_point_nan();
    if (lambda < -700 || lambda <= noise.lambda) return noise;
    if (dfi_nonfinite(lambda)) return df_point_data();  /* VE too */
    if (lambda > 700 || lambda >= data.lambda) return data;
    q.alpha = dfi_path_alpha(p, rho);
    q.sigma = rho * q.alpha;
    q.lambda = lambda;
    q.t = fmin(fmax(dfi_path_time(p, rho, q.alpha), 0), 1);
    return q;
}

DF_API df_point df_process_at_rho(const df_process *p, double rho) {
    if (dfi_is_nan(rho)) return dfi_point_nan();
    return rho > 0 ? df_process_at_lambda(p, -log(rho)) : df_point_data();
}

/* ---- making tables ----
   log abar is kept, not abar: sums of log(1 - beta) carry the first entries, where abar is
   close to 1 and sigma^2 = -expm1(log abar) small, and the last, where abar is tiny. */

static df_result dfi_betas_check(df_ctx *ctx, const char *who, const double *betas, int T,
                                 int least) {
    int i = 0, given = betas && T >= least;
    while (given && i < T && betas[i] >= 0 && betas[i] < 1 && !dfi_nonfinite(betas[i]))
        i++;
    if (given && (i == T || (i == T - 1 && betas[i] >= 1 && betas[i] <= 1))) return DF_OK;
    return dfi_fail(ctx, DF_ERR_ARGUMENT,
                    "%s: T = %d, betas[%d] = %g: want T >= %d betas in [0, 1), 1 only as "
                    "the last", who, T, i, given ? betas[i] : 0, least);
}

DF_API df_result df_process_table(df_ctx *ctx, const double *betas, int T,
                                  df_process *out) {
    df_process p = dfi_path(DF_PROCESS_TABLE, 0, 0, .5);
    df_result result = dfi_betas_check(ctx, "df_process_table", betas, T, 1);
    double *log_abar, sum = 0;
    if (result != DF_OK) return result;
    if (!ctx || !out)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_process_table: ctx or out is NULL");
    log_abar = (double *)dfi_new_owned(ctx, dfi_mul((size_t)T, sizeof *log_abar));
    if (!log_abar) return DF_ERR_MEMORY;
    for (int i = 0; i < T; i++) {              /* log abar_i = sum log(1 - beta) */
        sum = betas[i] < 1 ? sum + log1p(-betas[i]) : dfi_infinity(1);
        log_abar[i] = sum;
    }
    p.log_abar = log_abar;
    p.table_size = T;
    result = df_process_check(ctx, &p);
    if (result == DF_OK) *out = p;
    return result;
}

DF_API df_result df_betas(df_ctx *ctx, df_betas_kind kind, double b0, double b1, int T,
                          double *betas) {
    int inside = dfi_positive(b0) && dfi_positive(b1) && b0 < 1 && b1 < 1;
    int fine = inside || kind == DF_BETAS_COSINE;
    double c = DFI_COSINE_C;
    if (!betas || T < 1 || (unsigned)kind > (unsigned)DF_BETAS_SIGMOID || !fine)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_betas: kind %d, T = %d, b0 = %g, b1 = %g: want an array, a "
                        "df_betas_kind, T >= 1 and 0 < b0, b1 < 1", (int)kind, T, b0, b1);
    for (int i = 0; i < T; i++) {
        double u = T > 1 ? (double)i / (T - 1) : 0, beta = b0 + (b1 - b0) * u;
        if (kind == DF_BETAS_SCALED_LINEAR)
            beta = pow(sqrt(b0) + (sqrt(b1) - sqrt(b0)) * u, 2);
        if (kind == DF_BETAS_SIGMOID) beta = b0 + (b1 - b0) / (1 + exp(6 - 12 * u));
        if (kind == DF_BETAS_COSINE)           /* abar of this entry over the one before */
            beta = 1 - pow(sin(c * (T - 1 - i) / T) / sin(c * (T - i) / T), 2);
        betas[i] = kind == DF_BETAS_COSINE ? fmin(beta, 0.999) : beta;
    }
    return DF_OK;
}

/* Lin et al. 2023, alg. 1: r_i = sqrt(abar_i) becomes (r_i - r_T) r_1/(r_1 - r_T), so r_1
   stays and r_T is 0. The factor drops out of the later betas: beta_i = 1 - q^2 with
   q = (r_i - r_T)/(r_{i-1} - r_T), and 1 - q = (r_{i-1} - r_i)/(r_{i-1} - r_T), where
   r_{i-1} - r_i = r_{i-1} beta/(1 + sqrt(1 - beta)): small betas keep their digits. */
DF_API df_result df_betas_zero_snr(df_ctx *ctx, int T, double *betas) {
    df_result result = dfi_betas_check(ctx, "df_betas_zero_snr", betas, T, 2);
    double last = 1, r;
    if (result != DF_OK) return result;
    for (int i = 0; i < T; i++) last *= sqrt(1 - betas[i]);  /* r_T */
    r = sqrt(1 - betas[0]);                    /* r_1, then r_{i-1} */
    if (r <= last)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_betas_zero_snr: want betas above 0");
    for (int i = 1; i < T; i++) {
        double root = sqrt(1 - betas[i]), fall = r * betas[i] / (1 + root);
        double loss = i == T - 1 ? 1 : fall / (r - last);      /* 1 - q */
        betas[i] = loss * (2 - loss);
        r *= root;
    }
    return DF_OK;
}

/* ---- rates ----
   Everything from the closed forms. An infinite quantity is never computed: which ones
   are follows from sigma = 0, alpha = 0 and an infinite sigma'. */

static df_result dfi_singular(df_ctx *ctx, const char *who, const char *what,
                              const df_process *p, const df_point *at) {
    return dfi_fail(ctx, DF_ERR_SINGULAR,
                    "%s: %s of %s is infinite at t = %g (alpha = %g, sigma = %g): stay %s",
                    who, what, df_process_name(p), at->t, at->alpha, at->sigma,
                    at->alpha > 0 ? "above t = 0 (t_min)" : "below t = 1 (t_max)");
}

/* Is there a process and a point to speak about? */
static df_result dfi_point_check(df_ctx *ctx, const char *who, const df_process *p,
                                 const df_point *at) {
    if (!dfi_process_known(p)) return df_process_check(ctx, p);
    if (!at) return dfi_fail(ctx, DF_ERR_ARGUMENT, "%s: no point (NULL)", who);
    if (dfi_nonfinite(at->t) || dfi_nonfinite(at->alpha) || dfi_nonfinite(at->sigma))
        return dfi_fail(ctx, DF_ERR_NONFINITE, "%s: t = %g, alpha = %g, sigma = %g on %s",
                        who, at->t, at->alpha, at->sigma, df_process_name(p));
    return DF_OK;
}

/* The rates at a point of the path, from its own alpha and sigma rather than from t, which
   may be rounded (df_process_at_lambda). `who` asks, for the sentence. */
static df_result dfi_rates_at(df_ctx *ctx, const char *who, const df_process *p,
                              const df_point *at, unsigned want, df_rates *out) {
    static const char *const names[] = { "alpha'", "sigma'", "lambda'", "f", "g^2", "W" };
    double alpha = at->alpha, sigma = at->sigma;
    dfi_speeds d = dfi_path_speeds(p, at);
    unsigned infinite = dfi_nonfinite(d.sigma) ? DF_RATE_SIGMA | DF_RATE_W : 0;
    if (sigma <= 0) infinite |= DF_RATE_LAMBDA;
    if (alpha <= 0) infinite |= DF_RATE_LAMBDA | DF_RATE_F | DF_RATE_G2;
    memset(out, 0, sizeof *out);
    for (int i = 0; i < 6; i++)
        if (infinite & want & 1u << i) return dfi_singular(ctx, who, names[i], p, at);
    if (want & DF_RATE_ALPHA) out->alpha = d.alpha;
    if (want & DF_RATE_SIGMA) out->sigma = d.sigma;
    if (want & DF_RATE_LAMBDA) out->lambda = d.alpha / alpha - d.sigma / sigma;
    if (want & DF_RATE_F) out->f = d.alpha / alpha;  /* drift of the SDE */
    if (want & DF_RATE_G2) out->g2 = d.sigma2 - 2 * d.alpha / alpha * sigma * sigma;
    if (want & DF_RATE_W) out->w = alpha * d.sigma - sigma * d.alpha;
    return DF_OK;
}

DF_API df_result df_process_rates(df_ctx *ctx, const df_process *p, double t,
                                  unsigned want, df_rates *out) {
    df_point at = df_process_at(p, t);
    df_result result = dfi_point_check(ctx, "df_process_rates", p, &at);
    if (!out) return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_process_rates: out is NULL");
    if (result != DF_OK) return result;
    return dfi_rates_at(ctx, "df_process_rates", p, &at, want, out);
}

/* ---- native times ----
   A network has its own way to tell time: the index of a table (0 .. 999), 1000 t, EDM's
   log(sigma)/4, an angle, or flows that count from noise to data. Each is a map of our t,
   given with its derivative, because a velocity is per unit of somebody's time:
       dx/dt = (dx/d native) (d native/dt). */

static df_time dfi_time(df_time_kind kind, double a, double b) {
    df_time time = { kind, a, b };
    return time;
}
DF_API df_time df_time_own(void) { return dfi_time(DF_TIME_AFFINE, 1, 0); }
DF_API df_time df_time_index(int T) { return dfi_time(DF_TIME_AFFINE, T, -1); }
DF_API df_time df_time_affine(double a, double b) {
    return dfi_time(DF_TIME_AFFINE, a, b);
}
DF_API df_time df_time_sigma(void) { return dfi_time(DF_TIME_SIGMA, 1, 0); }
DF_API df_time df_time_log_sigma(double a) { return dfi_time(DF_TIME_LOG_SIGMA, a, 0); }

/* d(sigma/alpha)/dt = W/alpha^2,  d log(sigma/alpha)/dt = -lambda'. */
DF_API df_result df_time_at(df_ctx *ctx, const df_process *p, const df_time *time,
                            const df_point *at, double *native, double *rate) {
    df_result result = dfi_point_check(ctx, "df_time_at", p, at);
    int logs = time && time->kind == DF_TIME_LOG_SIGMA;
    df_rates d;
    if (result != DF_OK) return result;
    if (!native || !time)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_time_at: time or native is NULL");
    if (dfi_nonfinite(time->a) || dfi_nonfinite(time->b) || !(fabs(time->a) > 0))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_time_at: a = %g, b = %g: want finite "
                        "numbers, a not 0", time->a, time->b);
    if (time->kind == DF_TIME_AFFINE) {
        *native = time->a * at->t + time->b;
        if (rate) *rate = time->a;
        return DF_OK;
    }
    if (at->alpha <= 0 || (logs && at->sigma <= 0))
        return dfi_singular(ctx, "df_time_at", logs ? "log(sigma/alpha)" : "sigma/alpha",
                            p, at);
    *native = logs ? -time->a * at->lambda : at->sigma / at->alpha;
    if (!rate) return DF_OK;                   /* it may be infinite where native is not */
    result = dfi_rates_at(ctx, "df_time_at", p, at, logs ? DF_RATE_LAMBDA : DF_RATE_W, &d);
    *rate = logs ? -time->a * d.lambda : d.w / (at->alpha * at->alpha);
    return result;
}

DF_API df_point df_time_point(const df_process *p, const df_time *time, double native) {
    if (time->kind == DF_TIME_SIGMA) return df_process_at_rho(p, native);
    if (time->kind == DF_TIME_LOG_SIGMA) return df_process_at_lambda(p, -native / time->a);
    return df_process_at(p, (native - time->b) / time->a);
}

/* ---- grids: where a sampler stops on its way from t_max to the data ----
   The error of a step depends on how far the score bends in it, and that is uneven in
   every clock. Equal steps of t follow the training times; equal steps of lambda suit
   exponential integrators (Lu et al. 2022); Karras et al. take equal steps of rho^{1/7},
   between the two. lambda cannot reach sigma = 0, and Karras et al. stop at sigma_min too:
   there the rule ends at t_min, and one last step goes to the data. */

typedef struct dfi_grid {
    df_ctx *ctx;
    const df_process *p;
    const df_sample_desc *d;
    df_point *out;             /* [capacity] */
    int count;                 /* points so far */
    const char *name;          /* of the rule, as the user wrote it */
    const struct dfi_grid_rule *rule;
} dfi_grid;

/* A rule takes equal steps of a power of a clock, or lists entries of a table. */
enum { DFI_RULE_LINSPACE = DF_POINTS_LAMBDA + 1, DFI_RULE_LEADING, DFI_RULE_TRAILING };
enum { DFI_GRID_RULES = 8 };
static const char *const dfi_grid_rule_names[DFI_GRID_RULES] = { "uniform", "quadratic",
    "lambda", "karras", "polyexponential", "linspace", "leading", "trailing" };
static const struct dfi_grid_rule {
    const char *aliases;
    int clock;                 /* a df_points, or one of the lists */
    double power;              /* clock^{1/power} is divided */
    int tunable;               /* grid_rho takes the place of power */
} dfi_grid_rules[DFI_GRID_RULES] = {
    { "linear time_uniform", DF_POINTS_T, 1, 0 },
    { "quad time_quadratic", DF_POINTS_T, 2, 0 },      /* Song, Meng & Ermon 2021 */
    { "exponential logsnr", DF_POINTS_LAMBDA, 1, 0 },
    { "edm", DF_POINTS_RHO, 7, 1 },                    /* Karras et al. 2022, eq. 5 */
    { "", DF_POINTS_LAMBDA, 1, 1 },                    /* k-diffusion */
    { "", DFI_RULE_LINSPACE, 0, 0 }, { "", DFI_RULE_LEADING, 0, 0 },
    { "", DFI_RULE_TRAILING, 0, 0 } };

DF_API const char *const *df_grid_names(int *count) {
    if (count) *count = DFI_GRID_RULES;
    return dfi_grid_rule_names;
}

/* Is `word` the name, or one of the aliases, which blanks separate? */
static int dfi_named(const char *word, const char *name, const char *aliases) {
    size_t n = strlen(word);
    if (n == 0 || strcmp(word, name) == 0) return n > 0;
    for (const char *a = aliases; (a = strstr(a, word)) != NULL; a += n)
        if ((a == aliases || a[-1] == ' ') && (a[n] == ' ' || a[n] == 0)) return 1;
    return 0;
}

/* The usual places to stop short of the data: EDM's sigma = .002; 1e-3 in score_sde; a
   table's first entry. VE needs none, its t = 0 is sigma_min. */
DF_API double df_process_t_min(const df_process *p) {
    if (!dfi_process_known(p) || p->kind == DF_PROCESS_VE) return 0;
    if (p->kind == DF_PROCESS_EDM) return fmin(0.002 / p->b, 0.5);
    return p->kind == DF_PROCESS_TABLE ? 1.0 / p->table_size : 1e-3;
}

static double dfi_clock(int clock, const df_point *q) {
    if (clock == DF_POINTS_RHO) return q->sigma / q->alpha;
    return clock == DF_POINTS_T ? q->t : q->lambda;
}
static df_point dfi_clock_point(const df_process *p, int clock, double value) {
    if (clock == DF_POINTS_RHO) return df_process_at_rho(p, value);
    return clock == DF_POINTS_T ? df_process_at(p, value) : df_process_at_lambda(p, value);
}

/* c(u) = (a^{1/r} + (b^{1/r} - a^{1/r}) u)^r on the clock's stretch from a to b; lambda,
   which may be negative, takes k-diffusion's c = b + (a - b) (1 - u)^r. */
static df_point dfi_grid_place(const dfi_grid *g, const df_point *first,
                               const df_point *last, double u) {
    int clock = g->rule->clock;
    double a = dfi_clock(clock, first), b = dfi_clock(clock, last), root;
    double r = g->rule->tunable && g->d->grid_rho > 0 ? g->d->grid_rho : g->rule->power;
    if (clock == DF_POINTS_LAMBDA)
        return df_process_at_lambda(g->p, b + (a - b) * pow(1 - u, r));
    root = pow(a, 1 / r);
    return dfi_clock_point(g->p, clock, pow(root + (pow(b, 1 / r) - root) * u, r));
}

/* A rule divides the stretch down to the data in N steps if it can; otherwise its N points
   end at t_min, and the data point is one more. */
static df_result dfi_grid_divide(dfi_grid *g) {
    int any = g->rule->clock == DF_POINTS_T, data = g->d->end == DF_END_DATA;
    int twice = (g->d->compat & DF_COMPAT_DOUBLE_SHIFT) != 0;
    int reaches = data && any && !twice && df_process_at(g->p, 0).sigma <= 0;
    int M = data && !reaches ? g->d->steps : g->d->steps + 1;  /* points the rule sets */
    double t_min = g->d->t_min < 0 ? df_process_t_min(g->p) : g->d->t_min;
    df_point first = df_process_at(g->p, g->d->t_max);
    df_point last = df_process_at(g->p, reaches ? 0 : t_min);
    if (twice && last.alpha > 0)
        last = df_process_at_rho(g->p, g->d->shift * last.sigma / last.alpha);
    if (M > 1 && (last.t >= first.t || (!any && (first.alpha <= 0 || last.sigma <= 0))))
        return dfi_fail(g->ctx, DF_ERR_ARGUMENT, "df_grid: \"%s\" cannot divide %s from "
                        "t_max = %g, lambda = %g, to t_min = %g, %g: want 1 > t_max > "
                        "t_min > 0, or \"uniform\"", g->name, df_process_name(g->p),
                        first.t, first.lambda, last.t, last.lambda);
    g->out[0] = first;
    for (int i = 1; i < M - 1; i++)
        g->out[i] = dfi_grid_place(g, &first, &last, i / (double)(M - 1));
    if (M > 1) g->out[M - 1] = last;
    g->count = M;
    if (data && !reaches) g->out[g->count++] = df_point_data();  /* the last step */
    return DF_OK;
}

/* The i-th of N entries as diffusers' DDPM spaces them, with numpy's rounding (half to
   even) and, in trailing, arange's step: second entry - first. */
static double dfi_grid_index(int list, int T, int N, int i, int offset) {
    if (list == DFI_RULE_LEADING) return (double)(N - 1 - i) * (T / N) + offset;
    if (list == DFI_RULE_TRAILING) return rint(T + i * ((T - T / (double)N) - T)) - 1;
    return N > 1 ? rint((N - 1 - i) * ((T - 1) / (double)(N - 1))) : 0;
}

/* N entries of a table, then the data point; or entry 0, unless it is there already. */
static df_result dfi_grid_entries(dfi_grid *g) {
    int T = g->p->table_size, N = g->d->steps;
    int list = g->rule->clock, offset = g->d->grid_offset;
    double most = dfi_grid_index(list, T, N, 0, offset);
    double least = dfi_grid_index(list, T, N, N - 1, offset);
    if (N > T || g->d->t_max < 1 || least < 0 || most >= T)
        return dfi_fail(g->ctx, DF_ERR_ARGUMENT, "df_grid: \"%s\" lists N = %d entries %g "
                        ".. %g, t_max = %g: want a table of T >= N, entries 0 .. T-1, "
                        "t_max 1, but %s has T = %d; \"uniform\" needs no table", g->name,
                        N, most, least, g->d->t_max, df_process_name(g->p), T);
    for (g->count = 0; g->count < N; g->count++)
        g->out[g->count] =
            df_process_at(g->p, (dfi_grid_index(list, T, N, g->count, offset) + 1) / T);
    if (g->d->end == DF_END_DATA) g->out[g->count++] = df_point_data();
    else if (least > 0) g->out[g->count++] = df_process_at(g->p, 1.0 / T);
    return DF_OK;
}

/* The user's own points; their number decides N. A point that does not give back the value
   it was made from lies outside the process; but lists are often kept in float, so one
   that passes an end by 1e-6 means that end. */
static df_result dfi_grid_list(dfi_grid *g) {
    int clock = (int)g->d->points_in, count = g->d->points_count, bad;
    for (int i = 0; i < count; i++) {
        double value = g->d->points[i];
        df_point q = dfi_clock_point(g->p, clock, value);
        bad = fabs(dfi_clock(clock, &q) - value) > 1e-6 * (1 + fabs(value));
        if (dfi_nonfinite(value))              /* a pure end, where there is one */
            bad = dfi_is_nan(value) || clock == DF_POINTS_T || !dfi_nonfinite(q.lambda);
        if (bad)
            return dfi_fail(g->ctx, DF_ERR_ARGUMENT,
                            "df_grid: points[%d] = %g lies outside %s, nearest is t = %g, "
                            "lambda = %g", i, value, df_process_name(g->p), q.t, q.lambda);
        /* VE's t = 0 is sigma_min: the data point too, if the grid is to end there */
        if (i == count - 1 && clock == DF_POINTS_T && q.t <= 0 && g->d->end == DF_END_DATA)
            q = df_point_data();
        g->out[g->count++] = q;
    }
    return DF_OK;
}

/* Resolution shift (Hoogeboom et al. 2023; Esser et al. 2024, eq. 23): s sigma/alpha;
   on flow t -> s t/(1 + (s-1) t). Pure noise stays that; the last point stays in place. */
static df_result dfi_grid_shift(dfi_grid *g) {
    double shift = g->d->shift;
    for (int i = 0; i + 1 < g->count && fabs(shift - 1) > 0; i++) {
        df_point *q = &g->out[i], from = *q;
        double lambda = q->lambda - log(shift);
        if (q->alpha <= 0 || q->sigma <= 0) continue;
        *q = df_process_at_lambda(g->p, lambda);
        if (fabs(q->lambda - lambda) > 1e-9 * (1 + fabs(lambda)))
            return dfi_fail(g->ctx, DF_ERR_ARGUMENT,
                            "df_grid: shift = %g takes point %d (t = %g) to lambda = %g, "
                            "%s ends at %g: lower t_max, or shift less", shift, i, from.t,
                            lambda, df_process_name(g->p), q->lambda);
    }
    return DF_OK;
}

/* t and sigma/alpha fall from point to point, the latter compared by cross products since
   alpha may be 0; only VE's last stretch, sigma_min to the data, stands at one t. */
static df_result dfi_grid_falls(const dfi_grid *g) {
    for (int i = 1; i < g->count; i++) {
        const df_point *q = &g->out[i], *before = q - 1;
        int t_falls = q->t < before->t || (q->sigma <= 0 && q->t <= before->t);
        if (!t_falls || q->sigma * before->alpha >= before->sigma * q->alpha)
            return dfi_fail(g->ctx, DF_ERR_ARGUMENT, "df_grid: must fall, but point %d "
                            "has t = %.9g, lambda = %.9g after %.9g, %.9g: fewer steps or "
                            "another grid", i, q->t, q->lambda, before->t, before->lambda);
    }
    return DF_OK;
}

/* N as a descriptor says it. */
static int dfi_steps_asked(const df_sample_desc *d) {
    return d->points ? d->points_count - (d->points_count > 0) : d->steps;
}

/* What a descriptor says about the grid, looked at before anything is computed. */
static df_result dfi_grid_check(df_ctx *ctx, const df_sample_desc *d, int capacity) {
    int N = dfi_steps_asked(d);
    int fine_t = d->points || (dfi_positive(d->t_max) && d->t_max <= 1);
    int fine_in = (unsigned)d->points_in <= (unsigned)DF_POINTS_LAMBDA;
    if (N >= 1 && N < capacity && fine_in && fine_t && d->t_min < 1 && d->grid_rho >= 0 &&
        dfi_positive(d->shift) && !dfi_nonfinite(d->t_min) && !dfi_nonfinite(d->grid_rho))
        return DF_OK;
    return dfi_fail(ctx, DF_ERR_ARGUMENT,
                    "df_grid: N = %d, capacity %d, points_in %d, t_max %g, t_min %g, "
                    "shift %g, grid_rho %g: want 1 <= N < capacity, a df_points, t_max in "
                    "(0, 1], t_min < 1, shift > 0, grid_rho >= 0", N, capacity,
                    (int)d->points_in, d->t_max, d->t_min, d->shift, d->grid_rho);
}

static df_result dfi_grid_restart(dfi_grid *g, int capacity);  /* of restarting methods */
DF_API df_result df_grid(df_ctx *ctx, const df_process *p, const df_sample_desc *desc,
                         df_point *out, int capacity, int *count) {
    dfi_grid g = { ctx, p, desc, out, 0, "NULL", NULL };
    df_result result = df_process_check(ctx, p);
    if (result == DF_OK && (!out || !count || !desc || desc->cookie != DFI_COOKIE))
        result = dfi_fail(ctx, DF_ERR_ARGUMENT, "df_grid: want out and count, and a "
                          "descriptor made by df_sample_defaults");
    if (result == DF_OK) result = dfi_grid_check(ctx, desc, capacity);
    if (result != DF_OK) return result;
    if (desc->grid) g.name = desc->grid;
    for (int i = 0; i < DFI_GRID_RULES; i++)
        if (dfi_named(g.name, dfi_grid_rule_names[i], dfi_grid_rules[i].aliases))
            g.rule = &dfi_grid_rules[i];
    if (!g.rule && !desc->points)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_grid: no grid is called \"%s\", but: "
                        "uniform, quadratic, lambda, karras, polyexponential, linspace, "
                        "leading, trailing", g.name);
    if (desc->points) result = dfi_grid_list(&g);
    else if (g.rule->clock > DF_POINTS_LAMBDA) result = dfi_grid_entries(&g);
    else result = dfi_grid_divide(&g);
    if (result == DF_OK && g.count < 2)         /* entry 0 is both first and last */
        result = dfi_fail(ctx, DF_ERR_ARGUMENT, "df_grid: \"%s\" with N = %d gives one "
                          "point, t = %g: take more steps, or end = DF_END_DATA", g.name,
                          desc->steps, out[0].t);
    if (result == DF_OK) result = dfi_grid_shift(&g);
    if (result == DF_OK) result = dfi_grid_falls(&g);
    if (result == DF_OK) result = dfi_grid_restart(&g, capacity);
    for (int i = 0, j = g.count - 1; desc->inverse && i < j; i++, j--) {
        df_point swap = out[i];
        out[i] = out[j];
        out[j] = swap;
    }
    if (result == DF_OK) *count = g.count;
    return result;
}

/* ---- the Langevin lens ----
   Langevin dynamics dx = k grad log p dt + sqrt(2 k) dW leaves p alone, and what leaves it
   alone can be taken apart into a half that noises and one that denoises (Zheng & Lan
   2026). With the rates f and g^2 of a path, any eta and times that run forward,
       forward   dx =  f x dt                            +     g dW       p_t to p_{t+dt}
       reverse   dx = -f x dt + (1+eta^2)/2 g^2 score dt + eta g dW'      p_t to p_{t-dt}
       both      dx =           (1+eta^2)/2 g^2 score dt + sqrt(1+eta^2) g dW''
   f drops out; the noise is what Langevin's clock k = (1+eta^2)/2 g^2 wants, sqrt(2 k).
   So sampling is Langevin dynamics whose target moves, as it only takes the second half.
   Their table 3 is this formula per unit of a paper's own clock:
       VP, beta 1, SDE    -x/2 dt + dW                        k = 1
       VP, beta 1, ODE    -x/2 dt + dW                        k = 1/2
       VE in sigma        sqrt(2 sigma) dW                    k = sigma
       flow               -x/(1-s) ds + sqrt(2s/(1-s)) dW     k = s/(1-s), the last two ODE
   */
DF_API df_result df_drift_forward(df_ctx *ctx, const df_process *p, double t,
                                  df_drift *out) {
    df_rates d;
    df_result result = df_process_rates(ctx, p, t, DF_RATE_F | DF_RATE_G2, &d);
    if (!out) return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_drift_forward: out is NULL");
    if (result != DF_OK) return result;
    out->x_factor = d.f;
    out->score = 0;
    out->noise = sqrt(d.g2);
    return DF_OK;
}

DF_API df_result df_drift_reverse(df_ctx *ctx, const df_process *p, double t, double eta,
                                  df_drift *out) {
    df_result result;
    if (dfi_nonfinite(eta) || eta < 0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_drift_reverse: eta %g, want >= 0", eta);
    result = df_drift_forward(ctx, p, t, out);
    if (result != DF_OK) return result;
    out->x_factor = -out->x_factor;
    out->score = (1 + eta * eta) / 2 * out->noise * out->noise;
    out->noise *= eta;
    return DF_OK;
}

DF_API df_drift df_drift_sum(df_drift a, df_drift b) {
    a.x_factor += b.x_factor;
    a.score += b.score;
    a.noise = hypot(a.noise, b.noise);
    return a;
}

DF_API df_drift df_drift_per(df_drift drift, double rate) {
    drift.x_factor /= fabs(rate);
    drift.score /= fabs(rate);
    drift.noise /= sqrt(fabs(rate));
    return drift;
}

DF_API df_result df_drift_step(df_ctx *ctx, const df_drift *d, double h, size_t size,
                               const df_real *s, const df_real *z, df_real *x) {
    const df_real *a[3] = { x, s ? s : x, z ? z : x };
    double c[3] = { 1, 0, 0 };
    if (!ctx || !d || !x || dfi_nonfinite(h) || h < 0 || (!s && fabs(d->score) > 0) ||
        (!z && fabs(d->noise) > 0))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_drift_step: h = %g, want >= 0, and ctx, "
                        "drift, x, s (but for score 0), z (but for noise 0)", h);
    c[0] += d->x_factor * h;
    c[1] = d->score * h;
    c[2] = d->noise * sqrt(h);
    if (dfi_nonfinite(c[0]) || dfi_nonfinite(c[1]) || dfi_nonfinite(c[2]))
        return dfi_fail(ctx, DF_ERR_NONFINITE, "df_drift_step: the drift (%g, %g, %g) "
                        "times h = %g is not finite", d->x_factor, d->score, d->noise, h);
    ctx->k->combine(size, 3, c, a, x);
    return dfi_rows_finite(ctx, "df_drift_step", "x", 1, size, x);
}

DF_API df_result df_process_carry(df_ctx *ctx, const df_process *to, const df_point *from,
                                  df_point *out, double *factor) {
    df_result result = dfi_point_check(ctx, "df_process_carry", to, from);
    if (result != DF_OK) return result;
    if (!out || !factor || from->alpha + from->sigma <= 0 || dfi_is_nan(from->lambda))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_process_carry: want alpha + sigma > 0, "
                        "lambda no NaN, out and factor not NULL");
    *out = df_process_at_lambda(to, from->lambda);
    if (fabs(out->sigma * from->alpha - from->sigma * out->alpha) >
        1e-9 * (out->alpha + out->sigma) * (from->alpha + from->sigma))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_process_carry: lambda = %g lies outside "
                        "%s, which ends at %g", from->lambda, df_process_name(to),
                        out->lambda);
    *factor = (out->alpha + out->sigma) / (from->alpha + from->sigma);
    return DF_OK;
}

/* -------------------------------------------------------------------------------------
   // >>prediction: one plane, every prediction from every other

   At one time x_t = alpha x_0 + sigma eps, so every vector a network may be trained to
   predict is a x_0 + b eps for some row (a, b): eps itself, x_0, the score -eps/sigma, the
   velocity dx/dt, v, EDM's F. Two different rows fix x_0 and eps, hence any third:
       [ x    ]   [ alpha  sigma ] [ x_0 ]
       [ from ] = [   a      b   ] [ eps ],      det = alpha b - sigma a,
       to = a2 x_0 + b2 eps = cx x + cp from,
       cx = (a2 b - b2 a)/det,   cp = (alpha b2 - sigma a2)/det = det(to)/det(from).
   One solver, and no formula for any particular pair (Kingma & Gao 2023 tabulate them).
   det = 0 says that `from` is x over again: eps at alpha = 0, x_0 at sigma = 0.

   A trained network says E[a x_0 + b eps | x_t]. x_t is given, so the expectation passes
   through the linear system, and the same map converts the means. The score has a row
   since E[-eps/sigma | x_t] = grad log p_t(x_t) (Vincent 2011).

       prediction   row (a, b)                      det                 singular where
       eps          (0, 1)                          alpha               alpha = 0
       x_0          (1, 0)                          -sigma              sigma = 0
       score        (0, -1/sigma)                   -alpha/sigma        both ends
       velocity     (alpha', sigma')                w                   sigma' infinite
       v            (-sigma, alpha)                 alpha^2 + sigma^2   never
       EDM's F      (sigma/s_d, -alpha s_d)/root    -root/s_d           never
       straight     (-1, 1)                         alpha + sigma       never
   with root = sqrt(alpha^2 s_d^2 + sigma^2). Next to a singular end the map exists, but
   magnifies the network's error and the scalar's rounding alike, which is why v and F were
   invented; the answer there is an error, never Inf.
   ------------------------------------------------------------------------------------- */

/* What df_real can carry: coefficients are double, the vectors they multiply are not. */
#ifdef DIFFUSION_DOUBLE
#define DFI_REAL_EPSILON DBL_EPSILON
#define DFI_REAL_MOST DBL_MAX
#else
#define DFI_REAL_EPSILON FLT_EPSILON
#define DFI_REAL_MOST FLT_MAX
#endif

DF_API const char *df_prediction_name(df_prediction prediction) {
    static const char *const names[DF_PREDICTION_COUNT] = { "eps", "x_0", "score",
        "velocity", "v", "edm_f", "straight" };
    int known = (unsigned)prediction < (unsigned)DF_PREDICTION_COUNT;
    return known ? names[prediction] : "unknown";
}

/* Is there a process, a prediction and a point to speak about? */
static df_result dfi_plane_check(df_ctx *ctx, const char *who, const df_process *p,
                                 df_prediction prediction, const df_point *at) {
    df_result result = dfi_point_check(ctx, who, p, at);
    if (result != DF_OK) return result;
    if ((unsigned)prediction >= (unsigned)DF_PREDICTION_COUNT)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "%s: prediction %d is not one of the %d",
                        who, (int)prediction, (int)DF_PREDICTION_COUNT);
    if (prediction == DF_EDM_F && !dfi_positive(p->sigma_data))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "%s: edm_f wants the process's sigma_data "
                        "above 0, not %g", who, p->sigma_data);
    return DF_OK;
}

/* The rows themselves. A row is singular where it is infinite: the score at sigma = 0, the
   velocity where sigma' is. */
DF_API df_result df_plane_row(df_ctx *ctx, const df_process *p, df_prediction prediction,
                              const df_point *at, double row[2]) {
    df_result result = dfi_plane_check(ctx, "df_plane_row", p, prediction, at);
    double a = 0, b = 0, root;
    dfi_speeds d;
    if (result != DF_OK) return result;
    switch (prediction) {
    case DF_EPS:
        /* the noise itself (Ho et al. 2020): nearly x at the noise end, so x_0 suffers */
        b = 1;
        break;
    case DF_X0:
        /* the clean sample, E[x_0 | x_t] once trained: nearly x at the data end */
        a = 1;
        break;
    case DF_SCORE:
        /* grad log p(x_t | x_0) = -(x_t - alpha x_0)/sigma^2 (Vincent 2011) */
        if (at->sigma <= 0) return dfi_singular(ctx, "df_plane_row", "score", p, at);
        b = -1 / at->sigma;
        break;
    case DF_VELOCITY:
        /* dx/dt at fixed x_0 and eps (Lipman et al. 2023) */
        d = dfi_path_speeds(p, at);
        if (dfi_nonfinite(d.sigma))
            return dfi_singular(ctx, "df_plane_row", "velocity", p, at);
        a = d.alpha;
        b = d.sigma;
        break;
    case DF_V:
        /* v = alpha eps - sigma x_0, at a right angle to x, so that both x_0 and eps are
           well determined at every t (Salimans & Ho 2022, app. D) */
        a = -at->sigma;
        b = at->alpha;
        break;
    case DF_STRAIGHT:
        /* the line from x_0 to eps (Liu et al. 2023), of length 1 in s */
        a = -1;
        b = 1;
        break;
    default:
        /* F = (x_0 - c_skip x)/c_out (Karras et al. 2022, table 1): of unit variance for
           data of deviation s_d, and uncorrelated with x. hypot: sigma^2 may underflow. */
        root = hypot(at->alpha * p->sigma_data, at->sigma);
        a = at->sigma / p->sigma_data / root;
        b = -at->alpha * p->sigma_data / root;
        break;
    }
    row[0] = a;
    row[1] = b;
    return DF_OK;
}

/* Where the answer drowns: cx x and cp from may be large and opposite, and rounding errors
   of the scalar then grow by the condition number
       (|cx| |row of x| + |cp| |row of from|) / |row of to|,
   which has no units. Past 1/epsilon of df_real no digit is left, an error like det = 0
   itself. x_0 from eps: about 2 sigma/alpha, so a flow may go up to t = 1 - 3e-7 in float;
   the score at sigma = 1e-5 is a large number, but a sharp one. */
static int dfi_plane_drowns(const df_point *at, const double from[2], const double to[2],
                            double cx, double cp) {
    double terms, size = hypot(to[0], to[1]);
    if (dfi_nonfinite(cx) || dfi_nonfinite(cp)) return 1;
    if (fabs(cx) > DFI_REAL_MOST || fabs(cp) > DFI_REAL_MOST) return 1;
    terms = fabs(cx) * hypot(at->alpha, at->sigma) + fabs(cp) * hypot(from[0], from[1]);
    return dfi_nonfinite(terms) || terms * DFI_REAL_EPSILON > size;
}

/* The solver of this chapter's head. One thing needs no x at all: a row parallel to `from`
   is a multiple of it, at alpha = 0 too (score = -eps/sigma). */
DF_API df_result df_plane_map(df_ctx *ctx, const df_process *p, df_prediction from,
                              df_prediction to, const df_point *at, double *cx,
                              double *cp) {
    double r[2] = { 0, 0 }, q[2] = { 0, 0 }, det, turn;
    df_result result;
    if (!cx || !cp)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_plane_map: cx or cp is NULL");
    *cx = 0;
    *cp = 1;
    if (from == to) return dfi_plane_check(ctx, "df_plane_map", p, from, at);
    result = df_plane_row(ctx, p, from, at, r);
    if (result == DF_OK) result = df_plane_row(ctx, p, to, at, q);
    if (result != DF_OK) return result;
    det = at->alpha * r[1] - at->sigma * r[0];
    turn = q[0] * r[1] - q[1] * r[0];
    if (fabs(turn) <= 0) {                     /* parallel (eps, score): x is not needed */
        *cp = fabs(r[0]) > fabs(r[1]) ? q[0] / r[0] : q[1] / r[1];
    } else if (fabs(det) > 0) {
        *cx = turn / det;
        *cp = (at->alpha * q[1] - at->sigma * q[0]) / det;
    }
    if ((fabs(turn) <= 0 || fabs(det) > 0) && !dfi_plane_drowns(at, r, q, *cx, *cp))
        return DF_OK;
    return dfi_fail(ctx, DF_ERR_SINGULAR,
                    "df_plane_map: x and %s do not determine %s on %s at t = %.9g (alpha "
                    "= %g, sigma = %g): %s, or let the model predict v",
                    df_prediction_name(from), df_prediction_name(to), df_process_name(p),
                    at->t, at->alpha, at->sigma,
                    at->alpha < at->sigma ? "start below this t (t_max)"
                                          : "end above this t (t_min)");
}

/* How many rows from `row` on stand at the same t. */
static int dfi_same_times(const double *t, int row, int n) {
    int end = row + 1;
    while (end < n && memcmp(&t[end], &t[row], sizeof *t) == 0) end++;
    return end - row;
}

/* Rows at one time share their two coefficients and go through the kernel together. */
DF_API df_result df_plane_convert(df_ctx *ctx, const df_process *p, df_prediction from,
                                  df_prediction to, const double *t, int n, int dim,
                                  const df_real *x, const df_real *in, df_real *out) {
    if (!ctx || !t || !x || !in || !out || n < 0 || dim < 1)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_plane_convert: [n, dim] = [%d, %d]; "
                        "ctx, t, x, in and out must be given", n, dim);
    for (int row = 0, rows; row < n; row += rows) {
        size_t first = (size_t)row * (size_t)dim;
        df_point at = df_process_at(p, t[row]);
        const df_real *terms[2] = { x + first, in + first };
        double c[2];
        df_result result = df_plane_map(ctx, p, from, to, &at, &c[0], &c[1]);
        if (result != DF_OK) return result;
        rows = dfi_same_times(t, row, n);
        ctx->k->combine((size_t)rows * (size_t)dim, 2, c, terms, out + first);
    }
    return DF_OK;
}

/* -------------------------------------------------------------------------------------
   // >>samplers: from noise to data in N steps

   A model that predicts x_0 (or eps, or any row of the plane) at every point of the path
   carries noise back to data, along one family of paths with the same p_t at every t:
       dx = [f x - (1 + eta^2)/2 g^2 grad log p_t(x)] dt + eta g dW,      dt < 0
   eta = 0 is the probability flow ODE, eta = 1 the reverse SDE (Song et al. 2021, eq. 13
   and 6); what eta adds is Langevin dynamics, which leaves p_t alone. The ODE is dx/dt =
   alpha' E[x_0|x] + sigma' E[eps|x]. Three clocks make it a plain quadrature:
       y = x/alpha,          rho = sigma/alpha:            dy/d rho = eps
       y = x/(alpha+sigma),  s   = sigma/(alpha+sigma):    dy/d s   = eps - x_0
       y = x,                t:                            dy/d t   = velocity
   The first two have forgotten the process: a sampler that walks rho, s or lambda = -log
   rho takes the same path on every process. s stays finite at both ends.

   A sampler walks a grid of points s = from -> t = to with lambda rising (h = lambda_t -
   lambda_s > 0). The machine below asks the model, puts the answer into the plane's row
   that the sampler wants, and calls the sampler's stage function, which combines arrays
   and says "step" or "ask again". A sampler is such a function and one row of the
   registry. A stage may exchange the pointers `answer` and buffer[i]: history without a
   copy. What `answer` points to holds nothing from one step to the next.
   ------------------------------------------------------------------------------------- */

/* ---- fresh noise ----
   Over a step the family keeps e^{-eta^2 h} of the noise that is in x and draws the rest:
   of sigma_t eps, keep sigma_t is the old one's and sqrt(1 - keep^2) sigma_t fresh. keep =
   1 is DDIM, keep = 0 draws all of it anew. Every other eta is a way to name that number;
   here `extra` = eta^2 h, keep = e^-extra. Ancestral methods do the same in two moves: by
   the ODE down to sigma = keep sigma_t, where alpha is alpha_t, and up again by the
   forward kernel; exact if the ODE's step is, whatever its method: its order is their weak
   order. */

static df_result dfi_stage_wrong(df_stage *stage, const char *why);
static df_learned dfi_stage_learned(const df_stage *s);
static df_next dfi_stage_dpm_adaptive(df_stage *s);

static double dfi_straight_time(const df_point *q) {
    return q->sigma / (q->alpha + q->sigma);
}

static size_t dfi_stage_size(const df_stage *s) { return (size_t)s->n * (size_t)s->dim; }

/* Where sample i stands in an array [n, dim]; its own numbers. */
static size_t dfi_row_at(const df_stage *s, int i) { return (size_t)i * (size_t)s->dim; }
static double *dfi_own(const df_stage *s, int i) { return s->own + (size_t)i * DF_OWN; }

/* The answer goes to buffer[i], in exchange for what is there. */
static void dfi_keep(df_stage *s, int i) {
    df_real *old = s->buffer[i];
    s->buffer[i] = s->answer;
    s->answer = old;
}

/* out = a x + b y */
static void dfi_two(df_stage *s, df_real *out, double a, const df_real *x, double b,
                    const df_real *y) {
    const double c[2] = { a, b };
    const df_real *const in[2] = { x, y };
    df_stage_combine(s, out, 2, c, in);
}

/* A draw of no stretch of the path: Langevin steps, trials of each sample's own length. */
static df_result dfi_noise_apart(df_stage *s, df_real *out) {
    df_point to = s->to;
    df_result r;
    s->to = s->from;
    r = df_stage_noise(s, out);
    s->to = to;
    return r;
}

/* Does eta act in a step from here? */
static int dfi_eta_acts(const df_stage *s, const df_point *from) {
    double rho = from->alpha > 0 ? from->sigma / from->alpha : DBL_MAX;
    return s->desc->eta > 0 && rho >= s->desc->eta_min && rho <= s->desc->eta_max;
}

static double dfi_extra(const df_stage *s, const df_point *from, const df_point *to) {
    double eta = s->desc->eta, h = to->lambda - from->lambda, a, b;
    if (!dfi_eta_acts(s, from) || to->sigma <= 0) return 0;
    switch (s->desc->eta_in) {
    case DF_ETA_FAMILY: return eta * eta * h;
    case DF_ETA_LINEAR: return eta * h;
    case DF_ETA_DDIM: return -0.5 * log1p(eta * eta * expm1(-2 * h));
    default: /* the point below t on the straight line */
        b = dfi_straight_time(to);
        a = b * (1 + (b / dfi_straight_time(from) - 1) * eta);
        return log(b / (1 - b)) - log(a / (1 - a));
    }
}

/* eta^2 of the SDE's own step, for methods that take that in t; into sigma = 0, where h is
   infinite, as given. */
static double dfi_eta2(const df_stage *s) {
    double eta = s->desc->eta;
    if (s->to.sigma > 0)
        return dfi_extra(s, &s->from, &s->to) / (s->to.lambda - s->from.lambda);
    if (!dfi_eta_acts(s, &s->from)) return 0;
    return s->desc->eta_in == DF_ETA_LINEAR ? eta : eta * eta;
}

/* ---- exponential steps: the linear part exactly, the model a polynomial ----
   In lambda the family reads (Lu et al. 2022; Gonzalez et al. 2023; Xue et al. 2023)
       x_t = sigma_t/sigma_s e^{-extra} x_s + alpha_t z int_0^1 e^{-z(1-v)} x_0(v) dv
             + sigma_t sqrt(1 - e^{-2 extra}) noise,                  z = h + extra,
   v = (lambda - lambda_s)/h, or with eps in place of x_0
       x_t = alpha_t/alpha_s x_s + (1 + eta^2) sigma_t z int_0^1 e^{-z(1-v)} eps(v) dv
             + eta sigma_t sqrt(e^{2h} - 1) noise,                    z = -h.
   (the second for eta constant over the step; elsewhere eta^2 is extra/h). With x_0 held
   at its last value the first is DDIM, ddpm, DPM-Solver++(1), with eps it is
   DPM-Solver-1, the same where eta = 0. Take instead the polynomial through k known values
   (of earlier steps, of points inside the step, or of its end, for a corrector): this is
   the k-th order multistep, singlestep, UniPC, SA, DEIS, each a choice of nodes. */

enum { DFI_NODES = 5 };

/* phi_k(z) = int_0^1 e^{(1-v) z} v^{k-1}/(k-1)! dv, phi_0 = e^z, phi_k = (phi_{k-1} -
   1/(k-1)!)/z (Hochbruck & Ostermann 2010, eq. 2.10); near 0 its series sum z^j/(j+k)!. */
static double dfi_phi(int k, double z) {
    double term = 1, sum = 0;
    if (k == 0) return exp(z);
    for (int j = 2; j < k + (fabs(z) < 1); j++) term /= j;   /* 1/k!, or 1/(k-1)! */
    if (fabs(z) >= 1) return ((k > 1 ? dfi_phi(k - 1, z) : exp(z)) - term) / z;
    for (int j = 1; j < 20; term *= z / (j++ + k)) sum += term;
    return sum;
}

/* w_j = int_0^1 p(v) L_j(v) dv for the Lagrange polynomials L_j of k nodes v, given the
   moments of p: moment[q] = int_0^1 p(v) v^q dv. */
static void dfi_weights(int k, const double *v, const double *moment, double *w) {
    for (int j = 0; j < k; j++) {
        double poly[DFI_NODES] = { 1, 0, 0, 0, 0 }, below = 1;
        int degree = 0;
        for (int m = 0; m < k; m++) {
            if (m == j) continue;
            below *= v[j] - v[m];
            for (int q = ++degree; q > 0; q--) poly[q] = poly[q - 1] - v[m] * poly[q];
            poly[0] *= -v[m];                   /* poly (v - v_m) */
        }
        w[j] = 0;
        for (int q = 0; q < k; q++) w[j] += poly[q] * moment[q] / below;
    }
}

/* x_t = x x_s + sum_j m[j] (answer at node j) + z noise. */
typedef struct dfi_step { double x, z, m[DFI_NODES]; } dfi_step;

/* The step's coefficients; what is taken as the polynomial is row->wants, x_0 or eps. Two
   nodes may take another slope than the line's (df_slope). */
static dfi_step dfi_exponential(const df_stage *s, const df_point *from,
                                const df_point *to, int k, const df_point *node,
                                df_slope slope) {
    dfi_step step = { 0, 0, { 0, 0, 0, 0, 0 } };
    int noise = s->row->wants == DF_EPS, other;
    double extra = s->row->ancestral ? 0 : dfi_extra(s, from, to);
    double h = to->lambda - from->lambda;
    double e = extra > 0 ? extra / h : 0, z = noise ? -h : h + extra;      /* e: eta^2 */
    double scale = noise ? (1 + e) * to->sigma : to->alpha, v[DFI_NODES], c, m[DFI_NODES];
    double whole = noise ? (1 + e) * (to->sigma - to->alpha * from->sigma / from->alpha)
                         : -to->alpha * expm1(-z);       /* scale z int p */
    step.x = noise ? to->alpha / from->alpha : to->sigma / from->sigma * exp(-extra);
    if (extra > 0)
        step.z = to->sigma * sqrt(noise ? e * expm1(2 * h) : -expm1(-2 * extra));
    step.m[0] = whole;
    if (k < 2) return step;
    for (int j = 0; j < k; j++) v[j] = (node[j].lambda - from->lambda) / h;
    if (k == 2 && slope != DF_SLOPE_EXACT) {
        other = fabs(v[0]) > fabs(v[1]) ? 0 : 1;         /* the node that is not v = 0 */
        c = slope == DF_SLOPE_BH1 ? scale * z : whole;
        step.m[other] = 0.5 * c / v[other];
        step.m[1 - other] = whole - step.m[other];
        return step;
    }
    c = 1;
    for (int q = 0; q < k; c *= ++q) m[q] = c * dfi_phi(q + 1, -z);        /* q! phi */
    if (k > 2 && s->desc->compat & DF_COMPAT_HALF_D2) m[2] *= 0.5;
    if (k > 2 && s->desc->compat & DF_COMPAT_SIGN_D2)
        m[2] -= (s->desc->compat & DF_COMPAT_HALF_D2 ? 1 : 2) / z;
    dfi_weights(k, v, m, step.m);
    for (int j = 0; j < k; j++) step.m[j] *= scale * z;
    return step;
}

/* x = step.x base + sum_j m[j] answer[j] + z noise, fresh noise drawn into `noise` first
   if `draw`. */
static df_next dfi_stage_take(df_stage *s, const dfi_step *step, df_real *out,
                              const df_real *base, int k, const df_real *const *answer,
                              df_real *noise, int draw) {
    double c[DFI_NODES + 2];
    const df_real *a[DFI_NODES + 2];
    int count = k + 1;
    c[0] = step->x;
    a[0] = base;
    memcpy(c + 1, step->m, (size_t)k * sizeof *c);
    memcpy(a + 1, answer, (size_t)k * sizeof *a);
    if (step->z > 0) {
        if (draw && df_stage_noise(s, noise) != DF_OK) return DF_NEXT_FAIL;
        c[count] = step->z;
        a[count++] = noise;
    }
    df_stage_combine(s, out, count, c, a);
    return DF_NEXT_STEP;
}

/* The noise of a step that asks inside: what x got on the way to the last point is carried
   on by the SDE's linear part, and fresh noise joins it, so that all points of the step
   stand on one path. In `carried`, of unit variance, for a step of noise z; before: of the
   last point, 0 at the first. */
static df_result dfi_noise_carry(df_stage *s, double z, double before, df_real *carried,
                                 df_real *fresh) {
    dfi_step one = dfi_exponential(s, &s->from, &s->to, 1, NULL, DF_SLOPE_EXACT);
    double root = hypot(one.x * before, one.z);
    int anew = before <= 0 || s->desc->compat & DF_COMPAT_STAGE_NOISE;
    df_result r = z > 0 ? df_stage_noise(s, anew ? carried : fresh) : DF_OK;
    if (r == DF_OK && z > 0 && !anew)
        dfi_two(s, carried, one.x * before / root, carried, one.z / root, fresh);
    return r;
}

/* x = a x + b answer, and with noise c z: what one-answer samplers end with. The noise is
   not drawn where it would count nothing. */
static df_next dfi_stage_finish(df_stage *s, double a, double b, double c) {
    dfi_step step = { a, c, { b, 0, 0, 0, 0 } };
    const df_real *answer = s->answer;
    return dfi_stage_take(s, &step, s->x, s->x, 1, &answer, s->buffer[0], 1);
}

/* The answer becomes the newest of `depth` remembered ones, in buffer[0]. */
static void dfi_remember(df_stage *s, int depth) {
    df_real *oldest = depth > 0 ? s->buffer[depth - 1] : s->answer;
    for (int i = depth - 1; i > 0; i--) s->buffer[i] = s->buffer[i - 1];
    if (depth > 0) s->buffer[0] = s->answer;
    s->answer = oldest;
}

/* ---- ancestral ---- */

/* ddpm: draws from the posterior q(x_t | x_s, x_0) at the predicted x_0 (Ho et al. 2020,
   eq. 7; for any alpha and sigma: Kingma et al. 2021, app. A). With alpha_st =
   alpha_s/alpha_t and sigma_st^2 = sigma_s^2 - alpha_st^2 sigma_t^2 (VP: beta of the step)
     mean     = alpha_st (sigma_t/sigma_s)^2 x + alpha_t (sigma_st/sigma_s)^2 x_0
     variance = (sigma_st sigma_t/sigma_s)^2   SMALL: right if the data is one point
                sigma_st^2 V_t/V_s             LARGE: right if the data is N(0, I)
                SMALL + (alpha_t sigma_st^2/(alpha_s sigma_s))^2 (1 - E|eps|^2/dim)
                                               ANALYTIC (Bao et al. 2022, theorem 1)
   with V = alpha^2 + sigma^2 (VP: 1, LARGE is beta), and none of it into sigma_t = 0.
   Their s and t are exchanged here: s is where the step starts. */
typedef struct dfi_posterior { double x, x0, small, large; } dfi_posterior;
static dfi_posterior dfi_posterior_of(const df_point *from, const df_point *to) {
    double ratio = from->alpha / to->alpha, back = to->sigma / from->sigma;
    double var =
        fmax(from->sigma * from->sigma - ratio * ratio * to->sigma * to->sigma, 0);
    double V = hypot(to->alpha, to->sigma) / hypot(from->alpha, from->sigma);
    dfi_posterior p = { ratio * back * back, to->alpha * var / (from->sigma * from->sigma),
                        var * back * back, var * V * V };
    return p;
}

/* Without a variance of the model's; k counts steps from 0. */
static double dfi_posterior_variance(const df_sample_desc *d, const dfi_posterior *p,
                                     const df_point *from, int k) {
    double gain = from->alpha > 0 ? p->x0 * from->sigma / from->alpha : 0;
    if (d->variance == DF_VARIANCE_LARGE) return p->large;
    if (d->variance != DF_VARIANCE_ANALYTIC) return p->small;
    return p->small + gain * gain * fmax(1 - d->eps2[k], 0);
}

/* The standard deviation that the number v of a model's answer means. */
static double dfi_learned_deviation(df_learned kind, double v, double small,
                                    double large) {
    double f = 0.5 * (v + 1);
    if (kind == DF_LEARNED_RANGE) v = f * log(large) + (1 - f) * log(small);
    return kind == DF_LEARNED_VARIANCE ? sqrt(fmax(v, 0)) : exp(0.5 * v);
}

/* A variance the model predicts, element by element: noise *= its standard deviation. */
static void dfi_learned_noise(df_stage *s, const dfi_posterior *p, df_learned kind) {
    size_t size = (size_t)s->n * (size_t)s->dim;
    double small = fmax(p->small, s->desc->compat & DF_COMPAT_LAST_NOISE ? 1e-20 : 0);
    for (size_t i = 0; i < size; i++)
        s->buffer[0][i] = (df_real)((double)s->buffer[0][i] *
            dfi_learned_deviation(kind, (double)s->variance[i], small, p->large));
}

static df_next dfi_stage_ddpm(df_stage *s) {
    dfi_posterior p = dfi_posterior_of(&s->from, &s->to);
    df_learned learned = dfi_stage_learned(s);
    dfi_step step = { p.x, 0, { p.x0, 0, 0, 0, 0 } };
    const df_real *answer = s->answer;
    int last = s->to.sigma <= 0 && !(s->desc->compat & DF_COMPAT_LAST_NOISE);
    step.z = last ? 0 : learned != DF_LEARNED_NONE ? 1 : sqrt(
        dfi_posterior_variance(s->desc, &p, &s->from, s->step));
    if (step.z > 0 && df_stage_noise(s, s->buffer[0]) != DF_OK) return DF_NEXT_FAIL;
    if (step.z > 0 && learned != DF_LEARNED_NONE) dfi_learned_noise(s, &p, learned);
    return dfi_stage_take(s, &step, s->x, s->x, 1, &answer, s->buffer[0], 0);
}

/* ddim (Song, Meng & Ermon 2021, eq. 12, 16): the predicted x_0 and eps set together again
   at t, a part shat of the noise fresh:
     x_t = alpha_t x_0 + sqrt(sigma_t^2 - shat^2) eps + shat z
     shat = eta sigma_t sqrt(1 - e^-2h),   e^-h = alpha_s sigma_t/(alpha_t sigma_s)
   which is the exponential step with one node: sqrt(sigma_t^2 - shat^2) is keep sigma_t.
   eta = 1 is ddpm with SMALL variance, on every process. euler is the same with eta = 0:
   the line through y = x/alpha with slope eps meets x_0 at rho = 0. */
static df_next dfi_stage_ddim(df_stage *s) {
    dfi_step step = dfi_exponential(s, &s->from, &s->to, 1, NULL, DF_SLOPE_EXACT);
    const df_real *const answer[2] = { s->answer, s->unclipped };
    int k = s->unclipped ? 2 : 1;
    if (s->unclipped) { /* eps = (x - alpha_s x_0)/sigma_s as it was */
        step.m[1] = step.m[0] - s->to.alpha;
        step.m[0] = s->to.alpha;
    }
    return dfi_stage_take(s, &step, s->x, s->x, k, answer, s->buffer[0], 1);
}

/* ---- with history: dpmpp_2m, dpmpp_3m, their SDE forms, deis, unipc, sa_solver ----
   The polynomial through the answers at this step's start and before it: Adams's methods,
   for the exponential's weights. A corrector (Zhao et al. 2023; Xue et al. 2023) takes the
   last step again once the answer at its end is there, one more node: Adams & Moulton's
   method without a question of its own. Base and noise are the same both times, so x moves
   by the difference of the answers' weights, and keeps what was done to it in between. A
   first step of order 1 makes the whole second order; dpmpp_3m takes a second-order step
   there, with one question at the middle. */

/* The order of this step: what history and the steps left allow. */
static int dfi_order_now(const df_stage *s, int order, int known, int left) {
    df_final final = s->desc->final;
    if (final == DF_FINAL_OWN)
        final = s->steps < 15 || s->row->corrector == 1 ? DF_FINAL_LOWER : DF_FINAL_KEEP;
    if (final == DF_FINAL_EULER && left == 1) order = 1;
    if (final == DF_FINAL_LOWER && order > left) order = left;
    return order < known ? order : known;
}

/* Answers kept from one step to the next, for this step's nodes and the corrector's, and
   for a corrector all that the last step took. */
static int dfi_history(const df_sample_desc *d) {
    if (d->corrector <= 0) return d->order - 1;
    return d->order > d->corrector - 1 ? d->order : d->corrector - 1;
}

/* The last step again: node 0 is its end, where x stands now. number[] holds how many
   answers that step took, and their weights. */
static df_next dfi_correct(df_stage *s) {
    int left = s->steps - s->step + 2, known = s->known, k, taken = (int)s->number[0];
    const df_real *answer[DFI_NODES];
    df_point node[DFI_NODES];
    dfi_step step;
    while (s->past[known - 1].alpha <= 0) known--;       /* pure noise is no node */
    k = dfi_order_now(s, s->desc->corrector, known + 1, left);
    for (int j = 0; j < k || j < taken + 1; j++) {
        if (j < k) node[j] = j > 0 ? s->past[j - 1] : s->from;
        answer[j] = j > 0 ? s->buffer[j - 1] : s->answer;
    }
    step = dfi_exponential(s, &s->past[0], &s->from, k, node, s->desc->slope);
    for (int j = 0; j < taken; j++) step.m[j + 1] -= s->number[j + 1];
    step.x = 1, step.z = 0;
    if (k < taken + 1) k = taken + 1;
    return dfi_stage_take(s, &step, s->x, s->x, k, answer, NULL, 0);
}

/* The second-order first step of dpmpp_3m: asks at the middle, then the line through both
   answers (DPM-Solver++(2S)). The first of them is remembered. */
static df_next dfi_start_third(df_stage *s) {
    df_point middle = df_process_at_lambda(s->process,
                                           0.5 * (s->from.lambda + s->to.lambda));
    const df_point node[2] = { s->from, middle };
    const df_real *first = s->call == 1 ? s->answer : s->buffer[0];
    const df_real *const answer[2] = { first, s->answer };
    df_real *spare = s->buffer[2];
    dfi_step step;
    if (s->call == 1) {
        step = dfi_exponential(s, &s->from, &middle, 1, node, DF_SLOPE_EXACT);
        dfi_stage_take(s, &step, spare, s->x, 1, answer, NULL, 0);
        dfi_remember(s, 2);
        return df_stage_ask(s, &middle, spare);
    }
    step = dfi_exponential(s, &s->from, &s->to, 2, node, DF_SLOPE_EXACT);
    return dfi_stage_take(s, &step, s->x, s->x, 2, answer, NULL, 0);
}

static df_next dfi_stage_multistep(df_stage *s) {
    int depth = dfi_history(s->desc), known = 1, corrects = s->desc->corrector > 0, k;
    const df_real *answer[DFI_NODES];
    df_point node[DFI_NODES];
    dfi_step step;
    if (s->row->start_order > 2 && s->row->corrector == 0 && s->desc->order > 2 &&
        !corrects && (s->known == 0 || s->past[0].alpha <= 0) && s->from.alpha > 0 &&
        s->to.sigma > 0 && s->desc->eta <= 0 && !(s->desc->compat & DF_COMPAT_HALF_D2))
        return dfi_start_third(s);
    if (corrects && s->known > 0 && s->past[0].alpha > 0) dfi_correct(s);
    while (known <= s->known && known < DFI_NODES - 1 && s->past[known - 1].alpha > 0)
        known++;
    k = dfi_order_now(s, s->desc->order, known, s->steps - s->step);
    if (s->to.sigma <= 0 || s->from.alpha <= 0) k = 1;   /* h is infinite */
    node[0] = s->from;
    answer[0] = s->answer;
    for (int j = 1; j < k; j++) {
        node[j] = s->past[j - 1];
        answer[j] = s->buffer[j - 1];
    }
    step = dfi_exponential(s, &s->from, &s->to, k, node, s->desc->slope);
    s->number[0] = k;
    for (int j = 0; j < k; j++) s->number[j + 1] = step.m[j];
    if (dfi_stage_take(s, &step, s->x, s->x, k, answer, s->buffer[depth], 1) !=
        DF_NEXT_STEP)
        return DF_NEXT_FAIL;
    dfi_remember(s, depth);
    return DF_NEXT_STEP;
}

/* ---- in blocks: dpm_solver_2, dpm_solver_3, dpmpp_2s, dpmpp_3s ----
   The singlestep solvers of Lu et al. 2022, one question a grid step: a block of `order`
   steps starts anew from its first point, and the points inside it are the stages of one
   Runge-Kutta method, taken with rising order. Their places are the grid's, so that a list
   of one's own gives any r_1, r_2; on a grid uniform in lambda they are 1/2 or 1/3, 2/3. A
   third-order block ends with the nodes (0, r_2), as theirs, or with all three (EXACT,
   their "taylor"). */

/* Where step i stands in its block: place (0 ..), and the block's size. The steps left
   over at the end make a shorter block; into sigma = 0 goes a block of one. Each restart
   begins anew. */
static int dfi_block_place(const df_stage *s, int *size) {
    int alone = s->grid[0].alpha <= 0;          /* the first step's h is infinite */
    int begin = s->step, end = s->step + 1, jumps = s->desc->restarts > 0;
    int p = s->desc->order, into0, shorter = s->desc->final == DF_FINAL_LOWER, N, i, rest;
    while (begin > 0 && !(jumps && s->grid[begin - 1].lambda > s->grid[begin].lambda))
        begin--;
    while (end < s->points && !(jumps && s->grid[end].lambda > s->grid[end + 1].lambda))
        end++;
    if (begin > 0) alone = 0;
    N = end - begin - alone, i = s->step - begin - alone, rest = N % p;
    into0 = s->grid[end].sigma <= 0;
    if (i < 0) {
        *size = 1;
        return 0;
    }
    if (s->desc->final == DF_FINAL_OWN) shorter = p > 2;
    if (rest == 0 && p > 1 && (into0 || shorter)) rest = p;
    *size = p;
    if (i < N - rest) return i % p;
    i -= N - rest;
    if (rest == p || (into0 && rest > 1)) {     /* the last one alone */
        *size = i < rest - 1 ? rest - 1 : 1;
        return i < rest - 1 ? i : 0;
    }
    *size = rest;
    return i;
}

static df_next dfi_stage_block(df_stage *s) {
    int size, place = dfi_block_place(s, &size), k = place + 1;
    df_slope slope = s->desc->slope;
    const df_real *answer[3];
    df_point node[3], start = place > 0 ? s->past[place - 1] : s->from;
    dfi_step step;
    if (place == 0) memcpy(s->buffer[0], s->x, dfi_stage_size(s) * sizeof *s->x);
    for (int j = 0; j <= place; j++) {          /* the block's answers, the oldest first */
        node[j] = j < place ? s->past[place - 1 - j] : s->from;
        answer[j] = j < place ? s->buffer[1 + j] : s->answer;
    }
    if (place == 2 && slope != DF_SLOPE_EXACT) {
        node[1] = node[2];
        answer[1] = answer[2];
        k = 2;
    }
    if (size == 3 && (place == 2 || !(s->desc->compat & DF_COMPAT_BLOCK_HALF)))
        slope = DF_SLOPE_EXACT;
    step = dfi_exponential(s, &start, &s->to, k, node, slope);
    if (dfi_noise_carry(s, step.z, place > 0 ? s->number[0] : 0, s->buffer[3],
                        s->buffer[4]) != DF_OK)
        return DF_NEXT_FAIL;
    s->number[0] = step.z;
    dfi_stage_take(s, &step, s->x, s->buffer[0], k, answer, s->buffer[3], 0);
    if (place < 2) dfi_keep(s, 1 + place);      /* for the block's rest */
    return DF_NEXT_STEP;
}

/* ---- two stages on the lambda clock: dpmpp_2s_ancestral, dpmpp_sde ----
   Ask at `ratio` of the step in lambda, then step with D = (1 - 1/(2r)) D_s + 1/(2r) D_r
   (Lu et al. 2022; k-diffusion). dpmpp_sde draws noise on the way to both. Buffers: the
   noise, the first answer, the state inside, fresh noise. */
static df_next dfi_stage_two(df_stage *s) {
    double r = s->desc->ratio, h = s->to.lambda - s->from.lambda;
    const df_real *first = s->call == 1 ? s->answer : s->buffer[1];
    const df_real *const answer[2] = { first, s->answer };
    df_point from = s->from, to = s->to, inner;
    df_next next;
    dfi_step step;
    if (to.sigma <= 0 || from.alpha <= 0) return dfi_stage_ddim(s);
    inner = df_process_at_lambda(s->process, from.lambda + r * h);
    if (s->call == 1) {
        step = dfi_exponential(s, &from, &inner, 1, NULL, DF_SLOPE_EXACT);
        s->to = inner;                          /* the stretch of this draw */
        next = dfi_stage_take(s, &step, s->buffer[2], s->x, 1, answer, s->buffer[0], 1);
        s->to = to;
        if (next != DF_NEXT_STEP) return next;
        s->number[0] = step.z;
        dfi_keep(s, 1);
        return df_stage_ask(s, &inner, s->buffer[2]);
    }
    step = dfi_exponential(s, &from, &to, 1, NULL, DF_SLOPE_EXACT);
    step.m[1] = step.m[0] / (2 * r);
    step.m[0] -= step.m[1];
    if (!(s->desc->compat & DF_COMPAT_STAGE_NOISE)) s->from = inner;
    if (dfi_noise_carry(s, step.z, s->number[0], s->buffer[0], s->buffer[3]) != DF_OK)
        return DF_NEXT_FAIL;
    s->from = from;
    return dfi_stage_take(s, &step, s->x, s->x, 2, answer, s->buffer[0], 0);
}

/* ---- Runge-Kutta: heun, midpoint, ralston, dpm_2, rk4 and their forms in t ----
   In the clock c of row->wants (eps: rho; straight: s; velocity: t) the ODE is dy/dc =
   answer, y = x/scale, so the textbook's methods apply as they are. The step into sigma =
   0 stays Euler's, whose end is x_0 itself; the answer there need not exist. */

static double dfi_ode_scale(const df_stage *s, const df_point *q) {
    if (s->row->wants == DF_VELOCITY) return 1;
    return s->row->wants == DF_EPS ? q->alpha : q->alpha + q->sigma;
}
static double dfi_ode_clock(const df_stage *s, const df_point *q) {
    if (s->row->wants == DF_VELOCITY) return q->t;
    return s->row->wants == DF_EPS ? q->sigma / q->alpha : dfi_straight_time(q);
}
static df_point dfi_ode_point(const df_stage *s, double clock) {
    if (s->row->wants == DF_VELOCITY) return df_process_at(s->process, clock);
    if (s->row->wants == DF_EPS) return df_process_at_rho(s->process, clock);
    return clock < 1 ? df_process_at_rho(s->process, clock / (1 - clock))
                     : df_process_at(s->process, 1);
}

/* out at point q = scale_q (x/scale_from + dc sum_j b[j] slope[j]). */
static df_next dfi_ode_state(df_stage *s, const df_point *q, double dc, int count,
                             const double *b, const df_real *const *slope, df_real *out) {
    double c[DFI_TERMS], scale = dfi_ode_scale(s, q);
    const df_real *a[DFI_TERMS];
    c[0] = scale / dfi_ode_scale(s, &s->from);
    a[0] = s->x;
    for (int j = 0; j < count; j++) {
        c[j + 1] = scale * dc * b[j];
        a[j + 1] = slope[j];
    }
    df_stage_combine(s, out, count + 1, c, a);
    return DF_NEXT_STEP;
}

/* Two stages: asks at the fraction a of the step, then weights 1 - 1/(2a), 1/(2a) (heun
   a = 1, ralston 2/3, midpoint 1/2). dpm_2 (Karras et al. 2022; k-diffusion) takes the
   second answer alone, at the geometric mean of the two rho: ratio 0. */
static df_next dfi_stage_rk2(df_stage *s) {
    double from = dfi_ode_clock(s, &s->from), to = dfi_ode_clock(s, &s->to);
    double a = s->desc->ratio, dc = to - from, b[2] = { 1, 0 };
    const df_real *const slope[2] = { s->call == 1 ? s->answer : s->buffer[0], s->answer };
    df_point inner = s->to;
    if (s->to.sigma <= 0) return dfi_ode_state(s, &s->to, dc, 1, b, slope, s->x);
    if (a <= 0) inner = dfi_ode_point(s, sqrt(from * to));
    else if (a < 1) inner = dfi_ode_point(s, from + a * dc);
    if (s->call == 1) {
        dfi_ode_state(s, &inner, dfi_ode_clock(s, &inner) - from, 1, b, slope,
                      s->buffer[1]);
        dfi_remember(s, 1);
        return df_stage_ask(s, &inner, s->buffer[1]);
    }
    b[1] = a > 0 ? 1 / (2 * a) : 1;
    b[0] = 1 - b[1];
    return dfi_ode_state(s, &s->to, dc, 2, b, slope, s->x);
}

/* The classical fourth order (Kutta 1901): slopes at 0, 1/2, 1/2, 1, weights 1 2 2 1. */
static df_next dfi_stage_rk4(df_stage *s) {
    static const double sixth[4] = { 1 / 6.0, 1 / 3.0, 1 / 3.0, 1 / 6.0 }, one = 1;
    double from = dfi_ode_clock(s, &s->from), dc = dfi_ode_clock(s, &s->to) - from;
    double part = s->call < 3 ? 0.5 : 1;
    df_real **k = s->buffer;
    const df_real *const slope[4] = { k[0], k[1], k[2], s->answer };
    df_point inner = s->to;
    if (s->to.sigma <= 0) return dfi_ode_state(s, &s->to, dc, 1, &one, &slope[3], s->x);
    if (s->call == 4) return dfi_ode_state(s, &s->to, dc, 4, sixth, slope, s->x);
    if (part < 1) inner = dfi_ode_point(s, from + part * dc);
    dfi_ode_state(s, &inner, part * dc, 1, &one, &slope[3], s->buffer[3]);
    dfi_keep(s, s->call - 1);
    return df_stage_ask(s, &inner, s->buffer[3]);
}

/* euler_t: x += (t - s) u in plain time, u = dx/dt the velocity. Where alpha and sigma are
   both linear in t (flow, EDM) this is euler, and so ddim, to rounding; elsewhere it
   differs. Finite wherever u is. */
static df_next dfi_stage_euler_t(df_stage *s) {
    return dfi_stage_finish(s, 1, s->to.t - s->from.t, 0);
}

/* ---- Adams methods on eps: lms, ipndm, plms, pndm, gradient_estimation, deis_t ----
   y = x/alpha moves by int eps d rho. lms integrates the polynomial in rho through the
   last four answers exactly; the others take Adams-Bashforth's weights of equal steps (Liu
   et al. 2022), as if rho were linear in the step's number, which leaves order 2. */

/* x to `to` with slopes: the remembered answers, the newest first, weights b [k]. */
static df_next dfi_adams(df_stage *s, int k, const double *b, int depth) {
    double dc = dfi_ode_clock(s, &s->to) - dfi_ode_clock(s, &s->from);
    const df_real *slope[4];
    for (int j = 0; j < k; j++) slope[j] = j > 0 ? s->buffer[j - 1] : s->answer;
    dfi_ode_state(s, &s->to, dc, k, b, slope, s->x);
    dfi_remember(s, depth);
    return DF_NEXT_STEP;
}

static df_next dfi_stage_lms(df_stage *s) {
    static const double moment[4] = { 1, 1 / 2.0, 1 / 3.0, 1 / 4.0 };
    double from = dfi_ode_clock(s, &s->from), dc = dfi_ode_clock(s, &s->to) - from;
    double v[4] = { 0, 0, 0, 0 }, b[4];
    int k = s->desc->order < s->known + 1 ? s->desc->order : s->known + 1;
    for (int j = 1; j < k; j++) v[j] = (dfi_ode_clock(s, &s->past[j - 1]) - from) / dc;
    dfi_weights(k, v, moment, b);
    return dfi_adams(s, k, b, s->desc->order - 1);
}

/* Gauss-Legendre quadrature on [0, 1], point i of 8. */
static double dfi_gauss8(int i, double *weight) {
    static const double node[4] = {.1834346424956498, .5255324099163290, .7966664774136267,
                                   .9602898564975363};
    static const double half[4] = {.1813418916891810, .1568533229389436, .1111905172266873,
                                   .0506142681451881};
    *weight = half[i % 4];
    return .5 * (1 + (i < 4 ? node[i] : -node[i - 4]));
}

/* tAB-DEIS (Zhang & Chen 2023): the polynomial is one in t. moment[q] = int (d rho/dt) v^q
   dt/dc by Gauss-Legendre, d rho/dt = w/alpha^2. */
static df_next dfi_stage_deis_t(df_stage *s) {
    double dt = s->to.t - s->from.t, v[4] = {0, 0, 0, 0}, moment[4] = {1, 0, 0, 0}, b[4];
    double dc = dfi_ode_clock(s, &s->to) - dfi_ode_clock(s, &s->from);
    int k = s->desc->order < s->known + 1 ? s->desc->order : s->known + 1;
    if (s->to.sigma <= 0) k = 1;
    for (int i = 0; k > 1 && i < 8; i++) {
        double power, u = dfi_gauss8(i, &power);
        df_point q = df_process_at(s->process, s->from.t + u * dt);
        df_rates rates;
        if (df_stage_rates(s, &q, DF_RATE_W, &rates) != DF_OK) return DF_NEXT_FAIL;
        power *= rates.w / (q.alpha * q.alpha) * dt / dc;
        if (i == 0) moment[0] = 0;
        for (int j = 0; j < k; j++, power *= u) moment[j] += power;
    }
    for (int j = k - 1; j >= 0; j--) moment[j] /= moment[0];      /* whose value is 1 */
    for (int j = 1; j < k; j++) v[j] = (s->past[j - 1].t - s->from.t) / dt;
    dfi_weights(k, v, moment, b);
    return dfi_adams(s, k, b, s->desc->order - 1);
}

/* plms begins with a step of the trapezium rule, pndm with three of Runge-Kutta's, their
   middle in t (Liu et al. 2022, alg. 2); ipndm with none. begins: questions of such a
   step, or 0. Buffers: three answers, the state inside, two slopes of Runge-Kutta's. */
static df_next dfi_plms(df_stage *s, int begins) {
    static const double adams[4][4] = {
        { 1, 0, 0, 0 }, { 1.5, -.5, 0, 0 }, { 23 / 12.0, -16 / 12.0, 5 / 12.0, 0 },
        { 55 / 24.0, -59 / 24.0, 37 / 24.0, -9 / 24.0 } };
    static const double half[2] = { .5, .5 };
    static const double sixth[4] = { 1 / 6.0, 1 / 3.0, 1 / 3.0, 1 / 6.0 };
    const double *end = begins == 2 ? half : sixth;
    double from = dfi_ode_clock(s, &s->from), dc = dfi_ode_clock(s, &s->to) - from;
    int known = s->known < 3 ? s->known : 3, call = s->call;
    const df_real *slope[4];
    df_point inner = s->to;
    if (begins == 0 || s->to.sigma <= 0) return dfi_adams(s, known + 1, adams[known], 3);
    slope[0] = call == 1 ? s->answer : s->buffer[0];
    for (int j = 1; j < 4; j++) slope[j] = j < call - 1 ? s->buffer[3 + j] : s->answer;
    if (call == begins) return dfi_ode_state(s, &s->to, dc, begins, end, slope, s->x);
    if (begins == 4 && call < 3)
        inner = df_process_at(s->process, .5 * (s->from.t + s->to.t));
    dfi_ode_state(s, &inner, dfi_ode_clock(s, &inner) - from, 1, adams[0],
                  &slope[call - 1], s->buffer[3]);
    if (call == 1) dfi_remember(s, 3);
    else dfi_keep(s, 2 + call);
    return df_stage_ask(s, &inner, s->buffer[3]);
}
static df_next dfi_stage_plms(df_stage *s) { return dfi_plms(s, s->known == 0 ? 2 : 0); }
static df_next dfi_stage_pndm(df_stage *s) { return dfi_plms(s, s->known < 3 ? 4 : 0); }
static df_next dfi_stage_ipndm(df_stage *s) { return dfi_plms(s, 0); }

/* Gradient estimation (Permenter & Yuan 2024): the noise is read as 2 eps - eps of
   the step before, a projection that overshoots. Of first order. */
static df_next dfi_stage_gradient(df_stage *s) {
    static const double b[2][2] = { { 1, 0 }, { 2, -1 } };
    return dfi_adams(s, s->known > 0 ? 2 : 1, b[s->known > 0], 1);
}

/* ---- adaptive: rk45, dpm_adaptive ----
   Each sample has a clock and a step of its own, so that it takes the same path alone and
   in a batch; one that has arrived waits. A trial step has a result and a cruder one; err,
   their difference over atol + rtol |x|, root mean square, decides. The last point, where
   sigma = 0, is reached by one step of Euler's from the point before it. */

enum { DFI_WHERE, DFI_LENGTH, DFI_ERR, DFI_ERR_BEFORE, DFI_ARRIVED, DFI_FROM, DFI_GOOD };
enum { DFI_MOST_TRIALS = 100000 };

/* Where the adaptive part ends, in the grid; is there a step of Euler's behind it? */
static int dfi_adaptive_last(const df_stage *s) {
    return s->grid[s->points].sigma <= 0 && s->points > 1;
}
static const df_point *dfi_adaptive_end(const df_stage *s) {
    return &s->grid[s->points - dfi_adaptive_last(s)];
}

/* How far a trial goes from where its sample stands. */
static double dfi_adaptive_go(const double *own, double end) {
    double rest = end - own[DFI_WHERE];
    return fabs(own[DFI_LENGTH]) < fabs(rest) ? own[DFI_LENGTH] : rest;
}

/* Before the first trial. */
static void dfi_adaptive_begin(df_stage *s, double from, double length) {
    for (int i = 0; i < s->n; i++) {
        double *own = dfi_own(s, i);
        own[DFI_WHERE] = from;
        own[DFI_LENGTH] = length;
        own[DFI_ERR_BEFORE] = 1;
    }
}

/* One row of a combination. */
static void dfi_row_combine(df_stage *s, int row, df_real *out, int count, const double *c,
                            const df_real *const *a) {
    size_t dim = (size_t)s->dim, at = dfi_row_at(s, row);
    const df_real *part[DFI_TERMS];
    for (int j = 0; j < count; j++) part[j] = a[j] + at;
    s->ctx->k->combine(dim, count, c, part, out + at);
}

/* The next trial's first question, for all rows at their own points; or the end. */
static df_next dfi_adaptive_ask(df_stage *s) {
    int open = 0, lambda = s->row->stage == dfi_stage_dpm_adaptive;
    for (int i = 0; i < s->n; i++) {
        double *own = dfi_own(s, i), at = own[DFI_WHERE];
        open += own[DFI_ARRIVED] <= 0;
        s->each[i] = own[DFI_ARRIVED] > 0 ? *dfi_adaptive_end(s)
                     : lambda             ? df_process_at_lambda(s->process, at)
                                          : dfi_ode_point(s, at);
    }
    s->number[0] = 0;
    if (open > 0 && ++s->number[1] > (int)DFI_MOST_TRIALS) {
        dfi_stage_wrong(s, "the adaptive step does not reach the end in 100000 trials; "
                        "ask for less accuracy (rtol, atol), or end at a larger t_min");
        return DF_NEXT_FAIL;
    }
    if (open > 0) return df_stage_ask_each(s, s->n, s->x);
    if (!dfi_adaptive_last(s)) return DF_NEXT_STEP;
    s->from = *dfi_adaptive_end(s);
    s->number[2] = 1;                           /* Euler's step remains */
    return df_stage_ask(s, &s->from, s->x);
}

/* Root mean square of (a - b)/tolerance into own of each sample. The tolerance is atol S +
   rtol max(|a|, |b|), S = alpha + sigma at each: the same on every process. The coupled
   modes take what they publish, max(atol, rtol max(|a|, |before|)). */
static void dfi_adaptive_error(df_stage *s, const df_real *a, const df_real *b,
                               const df_real *before) {
    size_t dim = (size_t)s->dim;
    int hard = (s->desc->compat & (DF_COMPAT_ERROR_BATCH | DF_COMPAT_ERROR_MOST)) != 0;
    double rtol = s->desc->rtol;
    for (int i = 0; i < s->n; i++) {
        double sum = 0, atol = s->desc->atol;
        if (!hard) atol *= s->each[i].alpha + s->each[i].sigma;
        for (size_t j = (size_t)i * dim; j < ((size_t)i + 1) * dim; j++) {
            double other = fabs((double)(hard ? before : b)[j]);
            double size = rtol * fmax(fabs((double)a[j]), other);
            double e = (double)a[j] - (double)b[j];
            e /= hard ? fmax(atol, size) : atol + size;
            sum += e * e;
        }
        dfi_own(s, i)[DFI_ERR] = sqrt(sum / (double)dim);
    }
}

/* Accept, and the next step's length: the PI rule (Soederlind 2002), or what the coupled
   modes do: k-diffusion's (I control, smooth limit), DPM-Solver's. */
static int dfi_adaptive_rule(const df_stage *s, double *own, double err, double order) {
    double factor, before = fmax(own[DFI_ERR_BEFORE], 1e-2);
    int good = err <= 1;
    if (s->desc->compat & DF_COMPAT_ERROR_BATCH) {
        factor = 1 + atan(pow(1 / (err + 1e-8), 1 / order) - 1);
        good = factor >= .81;
    } else if (s->desc->compat & DF_COMPAT_ERROR_MOST) {
        factor = .9 * pow(err, -1 / order);
    } else {
        factor = .9 * pow(err, -.7 / order) * pow(before, .4 / order);
        factor = fmin(fmax(factor, .2), good ? 2 : 1);  /* err 0 may be luck */
    }
    own[DFI_LENGTH] *= factor;
    if (fabs(own[DFI_LENGTH]) < 1e-12)          /* shorter, it would not move the clock */
        own[DFI_LENGTH] = own[DFI_LENGTH] < 0 ? -1e-12 : 1e-12;
    if (good) own[DFI_ERR_BEFORE] = err;
    return good;
}

/* Judges the trial of every sample: x becomes `result` where it is good enough, `before`
   (unless NULL) what `crude` said there. */
static void dfi_adaptive_judge(df_stage *s, const df_real *result, const df_real *crude,
                               df_real *before, double order, double end) {
    size_t bytes = (size_t)s->dim * sizeof *s->x;
    double close = s->row->stage == dfi_stage_dpm_adaptive ? 1e-5 : 1e-12;  /* theirs */
    int batch = (s->desc->compat & DF_COMPAT_ERROR_BATCH) != 0;
    int largest = (s->desc->compat & DF_COMPAT_ERROR_MOST) != 0;
    double sum = 0, most = 0;
    for (int i = 0; i < s->n; i++) {
        double err = dfi_own(s, i)[DFI_ERR];
        sum += err * err / s->n;
        most = fmax(most, err);
    }
    for (int i = 0; i < s->n; i++) {
        double *own = dfi_own(s, i), err = own[DFI_ERR];
        double go = dfi_adaptive_go(own, end);
        size_t at = dfi_row_at(s, i);
        own[DFI_GOOD] = 0;
        if (own[DFI_ARRIVED] > 0) continue;
        if (batch) err = sqrt(sum);
        if (largest) err = most;
        if (largest || (err > 1 && !batch)) own[DFI_LENGTH] = go;  /* what was tried */
        own[DFI_FROM] = own[DFI_WHERE];
        own[DFI_GOOD] = dfi_adaptive_rule(s, own, fmax(err, 1e-10), order);
        if (own[DFI_GOOD] <= 0) continue;
        own[DFI_WHERE] += go;
        own[DFI_ARRIVED] = fabs(end - own[DFI_WHERE]) <= close * fmin(1, fabs(end));
        memcpy(s->x + at, result + at, bytes);
        if (before) memcpy(before + at, crude + at, bytes);
    }
}

/* rk45: Dormand & Prince 1980 in the clock s, order 5 with an error of order 4. */
static const double dfi_dp_a[7][7] = {
    { 0, 0, 0, 0, 0, 0, 0 },
    { 1 / 5.0, 0, 0, 0, 0, 0, 0 },
    { 3 / 40.0, 9 / 40.0, 0, 0, 0, 0, 0 },
    { 44 / 45.0, -56 / 15.0, 32 / 9.0, 0, 0, 0, 0 },
    { 19372 / 6561.0, -25360 / 2187.0, 64448 / 6561.0, -212 / 729.0, 0, 0, 0 },
    { 9017 / 3168.0, -355 / 33.0, 46732 / 5247.0, 49 / 176.0, -5103 / 18656.0, 0, 0 },
    { 35 / 384.0, 0, 500 / 1113.0, 125 / 192.0, -2187 / 6784.0, 11 / 84.0, 0 } };
static const double dfi_dp_c[7] = { 0, .2, .3, .8, 8 / 9.0, 1, 1 };
static const double dfi_dp_crude[7] = { 5179 / 57600.0, 0, 7571 / 16695.0, 393 / 640.0,
                                        -92097 / 339200.0, 187 / 2100.0, 1 / 40.0 };

/* After k answers: the state for the next question into buffer[6], or for k = 7 the cruder
   result into buffer[7]. */
static void dfi_dp_state(df_stage *s, int k, double end) {
    const double *b = k < 7 ? dfi_dp_a[k] : dfi_dp_crude;
    const df_real *a[DFI_TERMS];
    a[0] = s->x;
    for (int j = 0; j < 7; j++) a[j + 1] = j < 6 ? s->buffer[j] : s->answer;
    for (int i = 0; i < s->n; i++) {
        double *own = dfi_own(s, i), go = dfi_adaptive_go(own, end), c[DFI_TERMS];
        df_point from = dfi_ode_point(s, own[DFI_WHERE]);
        df_point q = dfi_ode_point(s, own[DFI_WHERE] + go * dfi_dp_c[k < 7 ? k : 6]);
        double scale = dfi_ode_scale(s, &q);
        c[0] = scale / dfi_ode_scale(s, &from);
        for (int j = 0; j < 7; j++) c[j + 1] = scale * go * b[j];
        if (k < 7) s->each[i] = q;
        dfi_row_combine(s, i, s->buffer[k < 7 ? 6 : 7], k < 7 ? k + 1 : 8, c, a);
    }
}

static df_next dfi_stage_rk45(df_stage *s) {
    double end = dfi_ode_clock(s, dfi_adaptive_end(s)), from = dfi_ode_clock(s, &s->from);
    double to = dfi_ode_clock(s, &s->to), one = 1;
    int k = (int)s->number[0];
    const df_real *answer = s->answer;
    if (s->number[2] > 0)
        return dfi_ode_state(s, &s->to, to - from, 1, &one, &answer, s->x);
    if (s->call == 1) dfi_adaptive_begin(s, from, .02 * (end - from));
    if (k < 6) dfi_keep(s, k);
    s->number[0] = ++k;
    dfi_dp_state(s, k, end);
    if (k < 7) return df_stage_ask_each(s, s->n, s->buffer[6]);
    dfi_adaptive_error(s, s->buffer[6], s->buffer[7], s->x);
    dfi_adaptive_judge(s, s->buffer[6], NULL, NULL, 5, end);
    return dfi_adaptive_ask(s);
}

/* dpm_adaptive (Lu et al. 2022, alg. 3 with k-diffusion's constants): DPM-Solver-2 judged
   by -1, or -3 by -2, in lambda. An ancestral eta aims below, then adds noise. */

/* The trial of sample i: node[0] its start, node[1], node[2] inside; where it aims. */
static df_point dfi_dpm_trial(const df_stage *s, int i, double go, df_point *node) {
    const double *own = dfi_own(s, i);
    double l = own[own[DFI_GOOD] > 0 ? DFI_FROM : DFI_WHERE], below;
    df_point to = df_process_at_lambda(s->process, l + go), aim = to;
    double r = s->desc->order > 2 ? 1 / 3.0 : 0.5;
    node[0] = df_process_at_lambda(s->process, l);
    if (s->desc->eta > 0) {
        below = to.lambda + dfi_extra(s, &node[0], &to);
        aim = df_process_at_lambda(s->process, fmin(dfi_adaptive_end(s)->lambda, below));
    }
    node[1] = df_process_at_lambda(s->process, l + r * (aim.lambda - l));
    node[2] = df_process_at_lambda(s->process, l + 2 * r * (aim.lambda - l));
    return aim;
}

/* A step of one sample through k answers, which stand behind x in a. */
static void dfi_row_step(df_stage *s, int i, df_real *out, int k, const dfi_step *step,
                         const df_real *const *a) {
    const double c[3] = { step->x, step->m[0], step->m[1] };
    dfi_row_combine(s, i, out, k + 1, c, a);
}

/* With fresh noise from where a good trial aimed up to where it was to end. */
static df_next dfi_dpm_noise(df_stage *s) {
    const df_real *const a[2] = { s->x, s->buffer[5] };
    df_point node[3], aim, to;
    double c[2];
    int any = !(s->desc->compat & (DF_COMPAT_ERROR_BATCH | DF_COMPAT_ERROR_MOST));
    for (int i = 0; i < s->n; i++) any |= dfi_own(s, i)[DFI_GOOD] > 0;
    if (!any || s->desc->eta <= 0) return DF_NEXT_STEP;
    if (dfi_noise_apart(s, s->buffer[5]) != DF_OK) return DF_NEXT_FAIL;
    for (int i = 0; i < s->n; i++) {
        const double *own = dfi_own(s, i);
        if (own[DFI_GOOD] <= 0) continue;
        aim = dfi_dpm_trial(s, i, own[DFI_WHERE] - own[DFI_FROM], node);
        to = df_process_at_lambda(s->process, own[DFI_WHERE]);
        c[0] = to.alpha / aim.alpha;
        c[1] = sqrt(fmax(to.sigma * to.sigma - pow(aim.sigma * c[0], 2), 0));
        dfi_row_combine(s, i, s->x, 2, c, a);
    }
    return DF_NEXT_STEP;
}

/* All rows combine the same arrays: x, the first answer and the newest; for the cruder
   result, which is of one order less, the second one. */
static df_next dfi_stage_dpm_adaptive(df_stage *s) {
    int k = (int)s->number[0] + 1, order = s->desc->order, last = k == order;
    double end = dfi_adaptive_end(s)->lambda;
    const df_real *first = k > 1 ? s->buffer[0] : s->answer;
    const df_real *const trial[3] = { s->x, first, s->answer };
    const df_real *const crude[3] = { s->x, first, s->buffer[1] };
    if (s->number[2] > 0) return dfi_stage_ddim(s);
    if (s->call == 1) {
        dfi_adaptive_begin(s, s->from.lambda, end < s->from.lambda ? -0.05 : 0.05);
        memcpy(s->buffer[4], s->x, dfi_stage_size(s) * sizeof *s->x);
    }
    for (int i = 0; i < s->n; i++) {
        double *own = dfi_own(s, i);
        df_point node[3], two[2], aim;
        dfi_step step;
        own[DFI_GOOD] = 0;
        s->each[i] = *dfi_adaptive_end(s);
        if (own[DFI_ARRIVED] > 0) {             /* it waits: no step, no error */
            size_t at = dfi_row_at(s, i), bytes = (size_t)s->dim * sizeof *s->x;
            memcpy(s->buffer[2] + at, s->x + at, bytes);
            memcpy(s->buffer[3] + at, s->x + at, bytes);
            continue;
        }
        aim = dfi_dpm_trial(s, i, dfi_adaptive_go(own, end), node);
        s->each[i] = last ? aim : node[k];
        two[0] = node[0];
        two[1] = node[k - 1];
        step = dfi_exponential(s, node, &s->each[i], k > 1 ? 2 : 1, two,
                               order == 2 ? DF_SLOPE_BH2 : DF_SLOPE_EXACT);
        dfi_row_step(s, i, s->buffer[2], k > 1 ? 2 : 1, &step, trial);
        if (!last) continue;
        step = dfi_exponential(s, node, &aim, order - 1, node, DF_SLOPE_BH2);
        dfi_row_step(s, i, s->buffer[3], order - 1, &step, crude);
    }
    s->number[0] = k;
    if (!last) {
        dfi_keep(s, k - 1);
        return df_stage_ask_each(s, s->n, s->buffer[2]);
    }
    dfi_adaptive_error(s, s->buffer[3], s->buffer[2], s->buffer[4]);
    dfi_adaptive_judge(s, s->buffer[2], s->buffer[3], s->buffer[4],
                       s->desc->eta > 0 ? 1.5 : order, end);
    if (dfi_dpm_noise(s) != DF_NEXT_STEP) return DF_NEXT_FAIL;
    return dfi_adaptive_ask(s);
}

/* ---- SDE, one question a step: euler_maruyama, reverse_diffusion, er_sde ---- */

/* euler_maruyama: one Euler step of the family's SDE at the head of this chapter, over dt
   = s - t > 0:  x_t = x - [f x - (1 + eta^2)/2 g^2 score] dt + eta g sqrt(dt) z. Its noise
   would stand unremoved in the result of a step into sigma = 0, which is therefore taken
   without (as Song et al. 2021 end with the mean). */
static df_next dfi_stage_euler_maruyama(df_stage *s) {
    double dt = s->from.t - s->to.t, eta2 = dfi_eta2(s);
    df_rates rates;
    if (s->desc->compat & DF_COMPAT_DT) dt = 1.0 / s->points;
    if (df_stage_rates(s, &s->from, DF_RATE_F | DF_RATE_G2, &rates) != DF_OK)
        return DF_NEXT_FAIL;
    return dfi_stage_finish(s, 1 - rates.f * dt, .5 * (1 + eta2) * rates.g2 * dt,
                            s->to.sigma > 0 ? sqrt(eta2 * rates.g2 * dt) : 0);
}

/* reverse_diffusion (Song et al. 2021, app. E): the forward step t -> s is x_s = a x_t +
   sqrt(b) z exactly, a = alpha_s/alpha_t, b = sigma_s^2 - a^2 sigma_t^2; its drift and
   noise are reversed as they stand: x_t = (2 - a) x + (1 + eta^2)/2 b score + eta sqrt(b)
   z. */
static df_next dfi_stage_reverse(df_stage *s) {
    double a = s->from.alpha / s->to.alpha, eta2 = dfi_eta2(s);
    double b = fmax(s->from.sigma * s->from.sigma - a * a * s->to.sigma * s->to.sigma, 0);
    return dfi_stage_finish(s, 2 - a, .5 * (1 + eta2) * b,
                            s->to.sigma > 0 ? sqrt(eta2 * b) : 0);
}

/* er_sde (Cui et al. 2023): in y = x/alpha and rho the noise that a step keeps is
   psi(rho_t) rho_s/(psi(rho_s) rho_t), psi = rho (e^{rho^.3} + 10), a choice made for
   images, and
     y_t = r y_s + int_t^s psi_t psi'/psi^2 x_0(rho) d rho + sqrt(rho_t^2 - r^2 rho_s^2) z,
   r = psi_t/psi_s, x_0 the polynomial in rho through three answers. Integrating by parts
   leaves int v^{q-1}/psi, v = (rho - rho_s)/(rho_t - rho_s), found by Gauss-Legendre in
   log rho (theirs: 200 rectangles, and a backward difference for the first derivative). */
static double dfi_er_psi(double rho) { return rho * (exp(pow(rho, .3)) + 10); }
static df_next dfi_stage_er_sde(df_stage *s) {
    double a = s->from.sigma / s->from.alpha, b = s->to.sigma / s->to.alpha, scale, r;
    double moment[3] = { 1, 0, 0 }, v[3] = { 0, 0, 0 };
    const df_real *answer[3];
    int k = s->known + 1 < s->desc->order ? s->known + 1 : s->desc->order;
    dfi_step step = { 0, 0, { 0, 0, 0, 0, 0 } };
    if (s->to.sigma <= 0 || s->from.alpha <= 0) return dfi_stage_ddim(s);
    r = dfi_er_psi(b) / dfi_er_psi(a);
    for (int i = 0; i < 8; i++) { /* moment[q] = q psi_t int v^{q-1}/psi dv */
        double w, u = dfi_gauss8(i, &w);
        double rho = a * pow(b / a, u), x = (rho - a) / (b - a);
        w *= log(b / a) * rho / (b - a) / dfi_er_psi(rho);
        for (int q = 1; q < 3; q++, w *= x) moment[q] += q * dfi_er_psi(b) * w;
    }
    moment[0] = 1 - r;
    for (int q = 1; q < 3; q++) moment[q] = 1 - moment[q];
    for (int j = 0; j < k; j++) {
        answer[j] = j > 0 ? s->buffer[j - 1] : s->answer;
        if (j > 0) v[j] = (s->past[j - 1].sigma / s->past[j - 1].alpha - a) / (b - a);
        if (j > 0 && s->past[j - 1].alpha <= 0) k = j;
    }
    scale = s->to.alpha;
    dfi_weights(k, v, moment, step.m);
    for (int j = 0; j < k; j++) step.m[j] *= scale;
    step.x = scale * r / s->from.alpha;
    step.z = scale * sqrt(fmax(b * b - r * r * a * a, 0));
    if (dfi_stage_take(s, &step, s->x, s->x, k, answer, s->buffer[2], 1) != DF_NEXT_STEP)
        return DF_NEXT_FAIL;
    dfi_remember(s, 2);
    return DF_NEXT_STEP;
}

/* ---- Langevin: the family with the clock stopped ----
   dx = grad log p dt + sqrt 2 dW leaves p alone. A step of length h, at one t:
     x += h score + sqrt(2 h) z                (unadjusted; variance of N(0,1) 1/(1 - h/2))
   h is 2 r^2 sigma_t^2, r the signal-to-noise ratio of the step: what Song et al. 2021,
   alg. 4 and 5 mean, whose norms |z|/|score| estimate sigma_t, and badly where dim is
   small. */

/* ... of row i, from score and noise [n, dim]. */
static double dfi_langevin_length(const df_stage *s, int i, const df_real *score,
                                  const df_real *noise) {
    int batch = (s->desc->compat & DF_COMPAT_NORM_BATCH) != 0, table;
    int norms = batch || (s->desc->compat & DF_COMPAT_NORM_SAMPLE), dim = s->dim;
    double sigma = s->at.sigma, h = s->desc->langevin_step, g = 0, z = 0;
    df_point next;
    if (h > 0) return h;
    for (int r = batch ? 0 : i; norms && r < (batch ? s->n : i + 1); r++) {
        size_t row = (size_t)r * (size_t)dim;
        g += sqrt(s->ctx->k->dot((size_t)dim, score + row, score + row));
        z += sqrt(s->ctx->k->dot((size_t)dim, noise + row, noise + row));
    }
    if (norms) sigma = g > 0 ? z / g : 0;
    h = 2 * s->desc->snr * s->desc->snr * sigma * sigma;
    table = s->process->kind == DF_PROCESS_TABLE && s->desc->compat & DF_COMPAT_SCORE_SDE;
    if (!table) return h;
    next = df_process_at(s->process, s->at.t - 1.0 / s->process->table_size);
    return h * pow(s->at.alpha / next.alpha, 2);
}

/* out = x + h answer + sqrt(2 h) noise, row by row. */
static void dfi_langevin_move(df_stage *s, df_real *out, const df_real *noise) {
    int batch = (s->desc->compat & DF_COMPAT_NORM_BATCH) != 0;     /* one length for all */
    double c[3] = { 1, 0, 0 };
    const df_real *const a[3] = { s->x, s->answer, noise };
    for (int i = 0; i < s->n; i++) {
        if (i == 0 || !batch) c[1] = dfi_langevin_length(s, i, s->answer, noise);
        c[2] = sqrt(2 * c[1]);
        dfi_row_combine(s, i, out, 3, c, a);
    }
}

static df_next dfi_stage_ula(df_stage *s) {
    if (df_stage_noise(s, s->buffer[0]) != DF_OK) return DF_NEXT_FAIL;
    dfi_langevin_move(s, s->x, s->buffer[0]);
    return DF_NEXT_STEP;
}

/* annealed_langevin (Song & Ermon 2019, alg. 1): some steps at each level of the grid, the
   last too, between which y = x/alpha stays. Their epsilon is 4 r^2 sigma_L^2. */
static df_next dfi_stage_annealed(df_stage *s) {
    int most = s->desc->corrections > 0 ? s->desc->corrections : 1;
    double c = s->from.alpha > 0 ? s->to.alpha / s->from.alpha : 1;
    const df_real *x = s->x;
    if (dfi_noise_apart(s, s->buffer[0]) != DF_OK) return DF_NEXT_FAIL;
    dfi_langevin_move(s, s->x, s->buffer[0]);
    if (s->call % most != 0) return df_stage_ask(s, s->call < most ? &s->from : &s->to, x);
    if (s->call > most || s->desc->compat & DF_COMPAT_SCORE_SDE) return DF_NEXT_STEP;
    df_stage_combine(s, s->x, 1, &c, &x);
    return s->step + 1 < s->steps ? DF_NEXT_STEP : df_stage_ask(s, &s->to, x);
}

/* log q(b | a) of the unadjusted step from a with score g, less what cancels; one row. */
static double dfi_mala_log_q(size_t dim, const df_real *a, const df_real *g,
                             const df_real *b, double h) {
    double sum = 0;
    for (size_t j = 0; j < dim; j++) {
        double e = (double)b[j] - (double)a[j] - h * (double)g[j];
        sum += e * e;
    }
    return -sum / (4 * h);
}

/* mala: the unadjusted step proposes y; taken with probability min(1, p(y) q(x|y)/(p(x)
   q(y|x))) it is exact for any h (Besag 1994; Roberts & Tweedie 1996). Its uniform number
   is Phi of a normal one. Buffers: noise, y, score at x; own numbers: log p of x, of y. */
static df_next dfi_stage_mala(df_stage *s) {
    size_t dim = (size_t)s->dim;
    df_real *noise = s->buffer[0], *y = s->buffer[1];
    if (s->call == 1) {
        if (df_stage_noise(s, noise) != DF_OK) return DF_NEXT_FAIL;
        dfi_langevin_move(s, y, noise);
        dfi_keep(s, 2);
        return df_stage_ask_density(s, &s->from, s->x);
    }
    if (s->call < 4) {
        for (int i = 0; i < s->n; i++) dfi_own(s, i)[s->call - 2] = (double)s->answer[i];
        return s->call == 2 ? df_stage_ask_density(s, &s->from, y)
                            : df_stage_ask(s, &s->from, y);
    }
    if (df_stage_noise(s, noise) != DF_OK) return DF_NEXT_FAIL;
    for (int i = 0; i < s->n; i++) {
        size_t at = dfi_row_at(s, i);
        const df_real *score = s->buffer[2] + at;
        double *own = dfi_own(s, i), h = dfi_langevin_length(s, i, NULL, NULL);
        double u = 0.5 * erfc((double)noise[at] / sqrt(2.0)), log_a = own[1] - own[0];
        log_a += dfi_mala_log_q(dim, y + at, s->answer + at, s->x + at, h);
        log_a -= dfi_mala_log_q(dim, s->x + at, score, y + at, h);
        if (log(u) < log_a) memcpy(s->x + at, y + at, dim * sizeof *y);
    }
    return DF_NEXT_STEP;
}

/* baoab: underdamped, dx = p dt, dp = (score - gamma p) dt + sqrt(2 gamma) dW, gamma =
   friction/sigma, split into kick, drift, friction, drift, kick (Leimkuhler & Matthews
   2013): x of a Gaussian has the right variance for every h below 2 of its standard
   deviations, where it is stable. The last kick of a step and the first of the next share
   a score; it is given here at once. Buffer 0 is p, 1 the noise. */
static df_next dfi_stage_baoab(df_stage *s) {
    double h = s->desc->langevin_step > 0 ? s->desc->langevin_step
                                          : sqrt(2.0) * s->desc->snr * s->at.sigma;
    double keep = exp(-s->desc->friction * h / s->at.sigma), fresh = sqrt(1 - keep * keep);
    const double c[3] = { 1, h / 2 * (1 + keep), h / 2 * fresh };
    df_real *p = s->buffer[0], *noise = s->buffer[1];
    const df_real *const a[3] = { s->x, p, noise };
    int first = s->step == 0;
    if (first && df_stage_noise(s, p) != DF_OK) return DF_NEXT_FAIL;
    if (df_stage_noise(s, noise) != DF_OK) return DF_NEXT_FAIL;
    dfi_two(s, p, 1, p, first ? h / 2 : h, s->answer);             /* B B */
    df_stage_combine(s, s->x, 3, c, a);                            /* A O A of x */
    dfi_two(s, p, keep, p, fresh, noise);                          /* O of p */
    return DF_NEXT_STEP;
}

/* ---- few steps: consistency, tcd, flow_map ----
   A model that answers the map question carries x along the flow to any later point, or to
   the end. The map aims at t_s = (1 - eta) t (Zheng et al. 2024; CTM's gamma of Kim et al.
   2024 is sqrt(1 - gamma^2) t), the end of the grid for eta = 1 (Song et al. 2023, alg.
   1), and the exact forward kernel brings x up to t. Between 0 and 1 that walks t. On a
   table the target is an entry, which is what models know. */
static df_point dfi_map_target(const df_stage *s) {
    const df_point *end = &s->grid[s->points];
    double t = (1 - s->desc->eta) * s->to.t, T = s->process->table_size;
    if (s->desc->eta <= 0) return s->to;
    if (s->to.sigma <= end->sigma || s->desc->eta >= 1) return *end;
    if (s->process->kind == DF_PROCESS_TABLE)
        t = (floor((1 - s->desc->eta) * (T * s->to.t - 1) + 1e-9) + 1) / T;
    return t > end->t ? df_process_at(s->process, t) : *end;
}
static df_next dfi_stage_map(df_stage *s) {
    df_point target = dfi_map_target(s);
    double c = s->to.alpha / target.alpha, before = c * c * target.sigma * target.sigma;
    double z = sqrt(fmax(s->to.sigma * s->to.sigma - before, 0));
    return dfi_stage_finish(s, 0, c, s->to.sigma <= s->grid[s->points].sigma ? 0 : z);
}

/* ---- paradigms (Shih et al. 2023): many steps asked at once ----
   Picard's iteration on Euler's sum in the clock s, y = x/(alpha+sigma),
     y_{j+1} = y_b + sum_{i=b}^{j} (s_{i+1} - s_i) slope(y_i),
   over a window of W points from b on, asked in one question. What has stopped changing is
   done, at least one point each time, for it is exact; each sample slides a window of its
   own. The result is ddim's to the tolerance. wide[0] [W + 1, n, dim] holds y of the
   points b .. b + W, wide[1] the x that are asked. */
static df_real *dfi_window(df_stage *s, int w, int i) {
    return s->wide[0] + dfi_row_at(s, w * s->n + i);
}
/* out = scale y for one sample, scale taking y to x at q. */
static void dfi_window_x(df_stage *s, const df_point *q, int w, int i, df_real *out) {
    const df_real *y = dfi_window(s, w, i);
    double scale = dfi_ode_scale(s, q);
    s->ctx->k->combine((size_t)s->dim, 1, &scale, &y, out);
}
static df_next dfi_paradigms_ask(df_stage *s) {
    int open = 0;
    for (int r = 0; r < s->rows; r++) {
        int base = (int)*dfi_own(s, r % s->n), at = base + r / s->n;
        open |= base < s->points;
        s->each[r] = s->grid[at < s->points ? at : s->points - 1];
        dfi_window_x(s, &s->each[r], r / s->n, r % s->n, s->wide[1] + dfi_row_at(s, r));
    }
    if (open) return df_stage_ask_each(s, s->rows, s->wide[1]);
    for (int i = 0; i < s->n; i++) dfi_window_x(s, &s->to, 0, i, s->x + dfi_row_at(s, i));
    return DF_NEXT_STEP;
}

/* Sample i: the sum from its slopes; returns how many points are done. */
static int dfi_paradigms_sum(df_stage *s, int i, int base, int W) {
    size_t dim = (size_t)s->dim;
    double tolerance = .1 * s->desc->atol;
    int done = 0;
    for (int w = 0; w < W && base + w < s->points; w++) {
        const df_point *q = &s->grid[base + w];
        df_real *now = dfi_window(s, w + 1, i), *old = s->wide[1] + dfi_row_at(s, i);
        const df_real *slope = s->answer + dfi_row_at(s, w * s->n + i);
        const df_real *const a[2] = { dfi_window(s, w, i), slope };
        const double c[2] = { 1, dfi_straight_time(q + 1) - dfi_straight_time(q) };
        double error = 0;
        memcpy(old, now, dim * sizeof *now);
        s->ctx->k->combine(dim, 2, c, a, now);
        for (size_t j = 0; j < dim; j++) error += pow((double)now[j] - (double)old[j], 2);
        if (w == done && (w == 0 || sqrt(error / (double)dim) <= tolerance)) done++;
    }
    return done;
}
static df_next dfi_stage_paradigms(df_stage *s) {
    size_t dim = (size_t)s->dim;
    int W = s->rows / s->n;
    for (int r = 0; s->call == 1 && r < s->rows + s->n; r++) {
        int i = r % s->n, at = r / s->n < s->points ? r / s->n : s->points;
        size_t row = dfi_row_at(s, i);          /* the first guess: one straight line */
        const df_real *const a[2] = { s->x + row, s->answer + row };
        double ahead = dfi_straight_time(&s->grid[at]) - dfi_straight_time(&s->from);
        const double c[2] = { 1 / dfi_ode_scale(s, &s->from), ahead };
        s->ctx->k->combine(dim, 2, c, a, dfi_window(s, r / s->n, i));
    }
    for (int i = 0; s->call > 1 && i < s->n; i++) {
        int base = (int)*dfi_own(s, i), done;
        if (base >= s->points) continue;
        done = dfi_paradigms_sum(s, i, base, W);
        *dfi_own(s, i) = base + done;
        for (int w = 0; w <= W; w++) /* the rest begins as the last value known */
            memmove(dfi_window(s, w, i), dfi_window(s, w + done < W ? w + done : W, i),
                    dim * sizeof *s->x);
    }
    return dfi_paradigms_ask(s);
}

/* ---- dpm_solver_v3 (Zheng et al. 2023) ----
   y = x/alpha obeys dy/d lambda = x_0 - y. Split off the part that is linear in y as the
   model sees it, l, and let s, b say how the rest moves by itself, element by element:
     dy/d lambda = -l y - f,   f = (1 - l) y - x_0,   f' = s f + b + what is left to see.
   l = 1, s = b = 0 is DPM-Solver++; the statistics make what is left smallest. With L, S,
   B the integrals of l, s, e^{-S} b from lambda_s on, g = e^{-S} f - B is the polynomial,
   and
     y_t = e^{-L_t} (y - int e^{L+S} (g + B) d lambda).
   Buffers: x_0 of the two steps before, then their y, then spare. */
typedef struct dfi_v3 { double l, s, b; } dfi_v3;

/* The statistics of element j at lambda: linear between the measured ones; *k: where it
   was found last. */
static dfi_v3 dfi_v3_at(const df_v3_statistics *e, double lambda, int j, int *k) {
    size_t a, b;
    double w = 0;
    dfi_v3 v;
    while (*k + 2 < e->count && e->lambda[*k + 1] < lambda) ++*k;
    a = b = (size_t)*k * (size_t)e->dim + (size_t)j;
    if (e->count > 1) {
        b += (size_t)e->dim;
        w = (lambda - e->lambda[*k]) / (e->lambda[*k + 1] - e->lambda[*k]);
        w = fmin(fmax(w, 0), 1);
    }
    v.l = e->l[a] + w * (e->l[b] - e->l[a]);
    v.s = e->s[a] + w * (e->s[b] - e->s[a]);
    v.b = e->b[a] + w * (e->b[b] - e->b[a]);
    return v;
}

/* From lambda = from to `to` in Simpson's steps: L, S, B at its end, and the integrals of
   e^{L+S} v^q and e^{L+S} B in v = (lambda - from)/(to - from). */
typedef struct dfi_v3_path { double L, S, B, moment[3], drift; } dfi_v3_path;
static dfi_v3_path dfi_v3_walk(const df_v3_statistics *e, int j, double from, double to) {
    const int parts = 16;
    dfi_v3_path p = { 0, 0, 0, { 0, 0, 0 }, 0 };
    double h = (to - from) / parts;
    int k = 0;
    dfi_v3 a = dfi_v3_at(e, from, j, &k);
    for (int i = 0; i < parts; i++) {
        dfi_v3 m, b;
        double L[3], S[3], B[3], f0, f1, f2;
        if (h < 0) k = 0;
        m = dfi_v3_at(e, from + (i + .5) * h, j, &k);
        if (h < 0) k = 0;
        b = dfi_v3_at(e, from + (i + 1) * h, j, &k);
        L[0] = p.L, L[1] = p.L + h / 24 * (5 * a.l + 8 * m.l - b.l);
        S[0] = p.S, S[1] = p.S + h / 24 * (5 * a.s + 8 * m.s - b.s);
        L[2] = p.L + h / 6 * (a.l + 4 * m.l + b.l);
        S[2] = p.S + h / 6 * (a.s + 4 * m.s + b.s);
        f0 = exp(-S[0]) * a.b, f1 = exp(-S[1]) * m.b, f2 = exp(-S[2]) * b.b;
        B[0] = p.B, B[1] = p.B + h / 24 * (5 * f0 + 8 * f1 - f2);
        B[2] = p.B + h / 6 * (f0 + 4 * f1 + f2);
        for (int n = 0; n < 3; n++) {
            double v = (i + .5 * n) / parts, w = (n == 1 ? 4 : 1) / (6.0 * parts);
            w *= exp(L[n] + S[n]);
            p.drift += w * B[n];
            for (int q = 0; q < 3; q++, w *= v) p.moment[q] += w;
        }
        p.L = L[2], p.S = S[2], p.B = B[2];
        a = b;
    }
    return p;
}

static df_next dfi_stage_v3(df_stage *s) {
    const df_v3_statistics *e = s->desc->statistics;
    double ls = s->from.lambda, h = s->to.lambda - ls, v[3] = { 0, 0, 0 };
    int k = dfi_order_now(s, s->desc->order, s->known + 1, s->steps - s->step), hint;
    size_t size = dfi_stage_size(s);
    df_real *x0 = s->answer, *oldest = s->buffer[3];
    if (s->to.sigma <= 0 || s->from.alpha <= 0) k = 0;
    for (int m = 1; m < k; m++) {
        if (s->past[m - 1].alpha <= 0) k = m;
        else v[m] = (s->past[m - 1].lambda - ls) / h;
    }
    for (size_t i = 0; s->from.alpha > 0 && i < size; i++)  /* y, kept with its x_0 */
        s->buffer[4][i] = (df_real)((double)s->x[i] / s->from.alpha);
    if (k == 0) dfi_stage_ddim(s);
    for (int j = 0; k > 0 && j < s->dim; j++) {
        dfi_v3_path path = dfi_v3_walk(e, j, ls, s->to.lambda), back[3];
        double l[3], w[3], keep = exp(-path.L);
        for (int m = 0; m < k; m++) {
            hint = 0;
            l[m] = dfi_v3_at(e, ls + v[m] * h, j, &hint).l;
            if (m > 0) back[m] = dfi_v3_walk(e, j, ls, ls + v[m] * h);
        }
        back[0].S = back[0].B = 0;
        dfi_weights(k, v, path.moment, w);
        for (size_t at = (size_t)j; at < size; at += (size_t)s->dim) {
            double now = (double)s->x[at] / s->from.alpha, sum = path.drift;
            for (int m = 0; m < k; m++) {
                double y = m > 0 ? (double)s->buffer[1 + m][at] : now;
                double f = (1 - l[m]) * y - (double)(m > 0 ? s->buffer[m - 1] : x0)[at];
                sum += w[m] * (exp(-back[m].S) * f - back[m].B);
            }
            s->x[at] = (df_real)(s->to.alpha * keep * (now - h * sum));
        }
    }
    dfi_remember(s, 2);
    s->buffer[3] = s->buffer[2];
    s->buffer[2] = s->buffer[4];
    s->buffer[4] = oldest;
    return DF_NEXT_STEP;
}

/* ---- the registry ---- */

/* restart, predictor_corrector: known by these names, and settings of any method. Of the
   two the corrector comes first, as in the authors' code. */
static df_next dfi_stage_restart(df_stage *s) { return dfi_stage_rk2(s); }
static df_next dfi_stage_pc(df_stage *s) { return dfi_stage_reverse(s); }

#define DFI_RHO DF_CLOCK_RHO
#define DFI_T DF_CLOCK_T
#define DFI_STOPPED DF_CLOCK_STOPPED
/* name, aliases, paper;
   clock, order, order with its own start-up, questions a step; stochastic, from alpha = 0,
   to sigma = 0, asks at the end, batch-coupled; most order; eta: its own, the most, what
   it counts, ancestral?; then what it asks. The macros fill in the rest of a row: */
#define DFI_NO_ETA 0, 0, DF_ETA_OWN, 0
#define DFI_ETA(own) own, DBL_MAX, DF_ETA_FAMILY, 0
#define DFI_LINEAR(own) own, DBL_MAX, DF_ETA_LINEAR, 0
#define DFI_DDIM(own) own, 1, DF_ETA_DDIM, 0
#define DFI_ANCESTRAL(own) own, 1, DF_ETA_DDIM, 1
/* wanted row, question, whole?; buffers, corrector, slope, ratio; stage */
#define DFI_ROW(wants, asks, whole, buffers, corrector, slope, ratio, stage)              \
    DF_##wants, DF_ASK_##asks, whole, buffers, corrector, DF_SLOPE_##slope, ratio,        \
        dfi_stage_##stage
#define DFI_EACH(wants, buffers, stage, ratio)                                            \
    DFI_ROW(wants, PREDICT, 0, buffers, -1, OWN, ratio, stage)
#define DFI_WHOLE(wants, buffers, stage)                                                  \
    DFI_ROW(wants, PREDICT, 1, buffers, -1, OWN, 0, stage)
#define DFI_MULTI(wants, corrector, slope)                                                \
    DFI_ROW(wants, PREDICT, 0, 6, corrector, slope, 0, multistep)
#define DFI_BLOCK(wants) DFI_ROW(wants, PREDICT, 0, 5, -1, BH2, 0, block)
#define DFI_MAP DFI_ROW(X0, MAP, 0, 1, -1, OWN, 0, map)
static const df_sampler_row dfi_sampler_rows[] = {
    /* ancestral */
    {"ddpm", "ancestral", "Ho et al. 2020",
     DFI_RHO, 1, 1, 1, 1, 1, 1, 0, 0, 0, DFI_NO_ETA, DFI_EACH(X0, 1, ddpm, 0)},
    {"ddim", "", "Song, Meng & Ermon 2021",
     DFI_RHO, 1, 1, 1, 0, 1, 1, 0, 0, 0, DFI_DDIM(0), DFI_EACH(X0, 1, ddim, 0)},
    /* ODE, one step */
    {"euler", "k_euler euler_discrete dpm_solver_1 dpmpp_1", "Karras et al. 2022, alg. 1",
     DFI_RHO, 1, 1, 1, 0, 1, 1, 0, 0, 0, DFI_ANCESTRAL(0), DFI_EACH(X0, 1, ddim, 0)},
    {"heun", "k_heun edm", "Karras et al. 2022, alg. 1 and 2",
     DFI_RHO, 2, 2, 2, 0, 0, 1, 1, 0, 0, DFI_ANCESTRAL(0), DFI_EACH(EPS, 2, rk2, 1)},
    {"midpoint", "", "Runge 1895",
     DFI_RHO, 2, 2, 2, 0, 0, 1, 0, 0, 0, DFI_ANCESTRAL(0), DFI_EACH(EPS, 2, rk2, .5)},
    {"ralston", "", "Ralston 1962",
     DFI_RHO, 2, 2, 2, 0, 0, 1, 0, 0, 0, DFI_ANCESTRAL(0), DFI_EACH(EPS, 2, rk2, 2 / 3.)},
    {"rk4", "", "Kutta 1901",
     DFI_RHO, 4, 4, 4, 0, 1, 1, 1, 0, 0, DFI_NO_ETA, DFI_EACH(STRAIGHT, 4, rk4, 0)},
    {"dpm_2", "k_dpm_2 kdpm2 dpm2", "Karras et al. 2022; k-diffusion",
     DFI_RHO, 2, 2, 2, 0, 0, 1, 0, 0, 0, DFI_ANCESTRAL(0), DFI_EACH(EPS, 2, rk2, 0)},
    {"dpm_solver_2", "dpm_solver", "Lu et al. 2022a, alg. 1",
     DFI_RHO, 2, 2, 1, 0, 0, 1, 0, 0, 3, DFI_ETA(0), DFI_BLOCK(EPS)},
    {"dpm_solver_3", "dpm_fast", "Lu et al. 2022a, alg. 2",
     DFI_RHO, 3, 3, 1, 0, 0, 1, 0, 0, 3, DFI_ETA(0), DFI_BLOCK(EPS)},
    {"dpmpp_2s", "dpm_solver++_2s", "Lu et al. 2022b, alg. 1",
     DFI_RHO, 2, 2, 1, 0, 1, 1, 0, 0, 3, DFI_ETA(0), DFI_BLOCK(X0)},
    {"dpmpp_3s", "dpm_solver++_3s", "Lu et al. 2022b",
     DFI_RHO, 3, 3, 1, 0, 1, 1, 0, 0, 3, DFI_ETA(0), DFI_BLOCK(X0)},
    {"rk45", "dopri5 dormand_prince", "Dormand & Prince 1980; Song et al. 2021",
     DFI_RHO, 0, 0, 0, 0, 1, 1, 1, 0, 0, DFI_NO_ETA, DFI_WHOLE(STRAIGHT, 8, rk45)},
    {"dpm_adaptive", "k_dpm_adaptive", "Lu et al. 2022a, alg. 3; k-diffusion",
     DFI_RHO, 3, 3, 0, 0, 0, 1, 0, 0, 3, DFI_ANCESTRAL(0),
     DFI_WHOLE(EPS, 6, dpm_adaptive)},
    {"euler_t", "flow_euler", "Lipman et al. 2023; Liu et al. 2023",
     DFI_T, 1, 1, 1, 0, 1, 1, 0, 0, 0, DFI_NO_ETA, DFI_EACH(VELOCITY, 0, euler_t, 0)},
    {"heun_t", "flow_heun", "Heun 1900",
     DFI_T, 2, 2, 2, 0, 1, 1, 1, 0, 0, DFI_NO_ETA, DFI_EACH(VELOCITY, 2, rk2, 1)},
    {"rk4_t", "", "Kutta 1901",
     DFI_T, 4, 4, 4, 0, 1, 1, 1, 0, 0, DFI_NO_ETA, DFI_EACH(VELOCITY, 4, rk4, 0)},
    /* ODE, with history */
    {"lms", "k_lms", "Katherine Crowson 2022, k-diffusion",
     DFI_RHO, 4, 2, 1, 0, 0, 1, 0, 0, 4, DFI_NO_ETA, DFI_EACH(EPS, 3, lms, 0)},
    {"plms", "", "Liu et al. 2022, as Stable Diffusion starts it",
     DFI_RHO, 2, 2, 1, 0, 0, 1, 0, 0, 0, DFI_NO_ETA, DFI_EACH(EPS, 4, plms, 0)},
    {"pndm", "", "Liu et al. 2022, alg. 2",
     DFI_T, 2, 2, 1, 0, 0, 1, 0, 0, 0, DFI_NO_ETA, DFI_EACH(EPS, 6, pndm, 0)},
    {"ipndm", "", "Zhang & Chen 2023",
     DFI_RHO, 2, 2, 1, 0, 0, 1, 0, 0, 0, DFI_NO_ETA, DFI_EACH(EPS, 3, ipndm, 0)},
    {"deis", "deis_multistep", "Zhang & Chen 2023, rho-AB in log rho",
     DFI_RHO, 2, 2, 1, 0, 0, 1, 0, 0, 4, DFI_ETA(0), DFI_MULTI(EPS, 0, EXACT)},
    {"deis_t", "tab_deis", "Zhang & Chen 2023, tAB",
     DFI_T, 3, 2, 1, 0, 0, 1, 0, 0, 4, DFI_NO_ETA, DFI_EACH(EPS, 3, deis_t, 0)},
    {"dpmpp_2m", "dpm_solver++ dpmsolver++ dpm++2m k_dpmpp_2m", "Lu et al. 2022b, alg. 2",
     DFI_RHO, 2, 2, 1, 0, 1, 1, 0, 0, 4, DFI_ETA(0), DFI_MULTI(X0, 0, BH2)},
    {"dpmpp_3m", "", "Lu et al. 2022b, with the factor 2",
     DFI_RHO, 3, 3, 1, 0, 1, 1, 0, 0, 4, DFI_ETA(0), DFI_MULTI(X0, 0, EXACT)},
    {"unipc", "uni_pc uni_pc_bh2", "Zhao et al. 2023",
     DFI_RHO, 2, 3, 1, 0, 1, 1, 0, 0, 4, DFI_ETA(0), DFI_MULTI(X0, 1, BH2)},
    {"dpm_solver_v3", "", "Zheng et al. 2023",
     DFI_RHO, 3, 2, 1, 0, 1, 1, 0, 0, 3, DFI_NO_ETA, DFI_EACH(X0, 5, v3, 0)},
    {"res_multistep", "res_2m", "Zhang et al. 2023, RES",
     DFI_RHO, 2, 2, 1, 0, 1, 1, 0, 0, 4, DFI_ANCESTRAL(0), DFI_MULTI(X0, 0, EXACT)},
    {"gradient_estimation", "ge", "Permenter & Yuan 2024",
     DFI_RHO, 1, 1, 1, 0, 0, 1, 0, 0, 0, DFI_NO_ETA, DFI_EACH(EPS, 1, gradient, 0)},
    /* SDE */
    {"euler_maruyama", "em", "Maruyama 1955; Song et al. 2021, eq. 6",
     DFI_T, 1, 1, 1, 1, 0, 1, 0, 0, 0, DFI_ETA(1), DFI_EACH(SCORE, 1, euler_maruyama, 0)},
    {"reverse_diffusion", "rd", "Song et al. 2021, app. E",
     DFI_T, 1, 1, 1, 1, 0, 1, 0, 0, 0, DFI_ETA(1), DFI_EACH(SCORE, 1, reverse, 0)},
    {"predictor_corrector", "pc", "Song et al. 2021, alg. 1",
     DFI_T, 1, 1, 2, 1, 0, 1, 0, 0, 0, DFI_ETA(1), DFI_EACH(SCORE, 1, pc, 0)},
    {"exponential", "sde sde_dpmpp_1", "Gonzalez et al. 2023; the family, exactly",
     DFI_RHO, 1, 1, 1, 1, 1, 1, 0, 0, 0, DFI_ETA(1), DFI_EACH(X0, 1, ddim, 0)},
    {"euler_ancestral", "euler_a k_euler_ancestral k_euler_a", "Crowson 2022, k-diffusion",
     DFI_RHO, 1, 1, 1, 1, 1, 1, 0, 0, 0, DFI_ANCESTRAL(1), DFI_EACH(X0, 1, ddim, 0)},
    {"dpm_2_ancestral", "dpm_2_a dpm2_a kdpm2_ancestral", "Crowson 2022, k-diffusion",
     DFI_RHO, 2, 2, 2, 1, 0, 1, 0, 0, 0, DFI_ANCESTRAL(1), DFI_EACH(EPS, 2, rk2, 0)},
    {"dpmpp_2s_ancestral", "dpmpp_2s_a dpm++2s_a", "Lu et al. 2022b; k-diffusion",
     DFI_RHO, 2, 2, 2, 1, 1, 1, 0, 0, 0, DFI_ANCESTRAL(1), DFI_EACH(X0, 4, two, .5)},
    {"dpmpp_sde", "k_dpmpp_sde dpm_solver_sde", "Lu et al. 2022b; k-diffusion",
     DFI_RHO, 2, 2, 2, 1, 1, 1, 0, 0, 0, DFI_DDIM(1), DFI_EACH(X0, 4, two, .5)},
    {"dpmpp_2m_sde", "k_dpmpp_2m_sde sde-dpmsolver++", "Lu et al. 2022b; k-diffusion",
     DFI_RHO, 2, 2, 1, 1, 1, 1, 0, 0, 4, DFI_LINEAR(1), DFI_MULTI(X0, 0, BH2)},
    {"dpmpp_3m_sde", "k_dpmpp_3m_sde", "Lu et al. 2022b; k-diffusion",
     DFI_RHO, 3, 2, 1, 1, 1, 1, 0, 0, 4, DFI_LINEAR(1), DFI_MULTI(X0, 0, EXACT)},
    {"sa_solver", "sa", "Xue et al. 2023",
     DFI_RHO, 2, 2, 1, 1, 1, 1, 0, 0, 4, DFI_ETA(1), DFI_MULTI(X0, 2, BH1)},
    {"er_sde", "", "Cui et al. 2023",
     DFI_RHO, 3, 2, 1, 1, 1, 1, 0, 0, 3, DFI_NO_ETA, DFI_EACH(X0, 3, er_sde, 0)},
    {"restart", "", "Xu et al. 2023",
     DFI_RHO, 0, 0, 2, 1, 0, 1, 1, 0, 0, DFI_NO_ETA, DFI_EACH(EPS, 2, restart, 1)},
    /* Langevin */
    {"langevin", "ula unadjusted_langevin", "Parisi 1981; Roberts & Tweedie 1996",
     DFI_STOPPED, 0, 0, 1, 1, 0, 0, 0, 0, 0, DFI_NO_ETA, DFI_EACH(SCORE, 1, ula, 0)},
    {"mala", "metropolis_adjusted_langevin", "Besag 1994; Roberts & Tweedie 1996",
     DFI_STOPPED, 0, 0, 4, 1, 0, 0, 0, 0, 0, DFI_NO_ETA, DFI_EACH(SCORE, 3, mala, 0)},
    {"baoab", "underdamped_langevin", "Leimkuhler & Matthews 2013",
     DFI_STOPPED, 0, 0, 1, 1, 0, 0, 0, 0, 0, DFI_NO_ETA, DFI_EACH(SCORE, 2, baoab, 0)},
    {"annealed_langevin", "ncsn", "Song & Ermon 2019, alg. 1",
     DFI_RHO, 0, 0, 1, 1, 0, 0, 0, 0, 0, DFI_NO_ETA, DFI_EACH(SCORE, 1, annealed, 0)},
    /* few steps, of maps */
    {"consistency", "lcm cm scm consistency_multistep",
     "Song et al. 2023; Luo et al. 2023",
     DFI_RHO, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, DF_ETA_OWN, 0, DFI_MAP},
    {"tcd", "", "Zheng et al. 2024",
     DFI_T, 0, 0, 1, 1, 1, 1, 0, 0, 0, .3, 1, DF_ETA_OWN, 0, DFI_MAP},
    {"flow_map", "ctm meanflow", "Kim et al. 2024; Geng et al. 2025",
     DFI_RHO, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 1, DF_ETA_OWN, 0, DFI_MAP},
    /* parallel */
    {"paradigms", "parallel", "Shih et al. 2023",
     DFI_RHO, 1, 1, 0, 0, 1, 1, 0, 0, 0, DFI_NO_ETA, DFI_WHOLE(STRAIGHT, 0, paradigms)},
};
enum { DFI_SAMPLER_ROWS = (int)(sizeof dfi_sampler_rows / sizeof dfi_sampler_rows[0]) };

DF_API const df_sampler_row *df_sampler_rows(int *count) {
    if (count) *count = DFI_SAMPLER_ROWS;
    return dfi_sampler_rows;
}

/* Letters to insert, delete or change to make one word of the other (Levenshtein 1966). */
static int dfi_edit_distance(const char *a, const char *b) {
    int row[33];
    int n = (int)strlen(b);
    if (n > 32) n = 32;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1] && i < 128; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int change = diagonal + (a[i - 1] != b[j - 1]);
            int least = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            diagonal = row[j];
            row[j] = change < least ? change : least;
        }
    }
    return row[n];
}

/* Exact names and aliases; else the three names with the fewest letters to change. */
DF_API const df_sampler_row *df_sampler_find(df_ctx *ctx, const char *name) {
    const df_sampler_row *rows = dfi_sampler_rows;
    int best[3] = {-1, -1, -1}, distance[3] = {0, 0, 0};
    if (name == NULL) {
        dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sampler_find: the name is NULL");
        return NULL;
    }
    for (int i = 0; i < DFI_SAMPLER_ROWS; i++) {
        int d = dfi_edit_distance(name, rows[i].name), at = 3;
        if (dfi_named(name, rows[i].name, rows[i].aliases)) return &rows[i];
        for (; at > 0 && (best[at - 1] < 0 || d < distance[at - 1]); at--) {
            if (at == 3) continue;              /* the third falls out */
            best[at] = best[at - 1];
            distance[at] = distance[at - 1];
        }
        if (at == 3) continue;
        best[at] = i;
        distance[at] = d;
    }
    dfi_fail(ctx, DF_ERR_ARGUMENT,
             "df_sampler_find: no sampler \"%.64s\"; the nearest names are %s, %s, %s",
             name, rows[best[0]].name, rows[best[1]].name, rows[best[2]].name);
    return NULL;
}

/* ---- one pass over arrays ---- */

/* out = sum_j c[j] in[j], then clipped, while `check` is searched for NaN and Inf; and in
   the same pass `then`, over arrays that are still in the nearest cache: a step costs
   reading its arrays from memory, not arithmetic. Blocks of a few thousand elements; parts
   of a large array go to the workers. Elements do not see each other, so cuts do not show
   in the result. */
#define DFI_SWEEP_BLOCK ((size_t)2048)
#define DFI_SWEEP_PART  ((size_t)131072)
#define DFI_SWEEP_PARTS 64
typedef struct dfi_sweep {
    const dfi_kernels *k;
    size_t size, part;
    int count;
    double c[DFI_TERMS];
    const df_real *in[DFI_TERMS];
    df_real *out;
    double clip;                 /* 0: off */
    int brief;                   /* the kernel `convert` will do */
    const df_real *check;        /* [size], or NULL */
    const struct dfi_sweep *then;        /* of the same size, or NULL */
    size_t bad[DFI_SWEEP_PARTS]; /* of each part: first NaN or Inf in `check`, or size */
} dfi_sweep;

/* NaN passes both comparisons and stays; it was reported before. */
static void dfi_clip(size_t n, df_real limit, df_real *x) {
    for (size_t i = 0; i < n; i++) {
        df_real v = x[i] > limit ? limit : x[i];
        x[i] = v < -limit ? -limit : v;
    }
}

/* One block; returns the first bad element of `check` in it, or n. A conversion looks for
   it on its way; what it was remains where it is kept. */
static size_t dfi_sweep_block(const dfi_sweep *w, const dfi_kernels *k, size_t at,
                              size_t n) {
    const df_real *in[DFI_TERMS], *check = w->check ? w->check + at : NULL;
    int along = w->brief && w->check == w->in[0] && w->check != w->out;
    size_t bad = check && !along ? k->nonfinite(n, check) : n;
    if (w->count == 0 || bad < n) return bad;
    for (int j = 0; j < w->count; j++) in[j] = w->in[j] + at;
    if (!w->brief) k->combine(n, w->count, w->c, in, w->out + at);
    else if (!k->convert(n, w->count, w->c, in, w->out + at) && along)
        return k->nonfinite(n, check);
    if (w->clip > 0) dfi_clip(n, (df_real)w->clip, w->out + at);
    return n;
}

static void dfi_sweep_part(void *arg, int index) {
    dfi_sweep *w = (dfi_sweep *)arg;
    size_t begin = (size_t)index * w->part;
    size_t end = w->size - begin < w->part ? w->size : begin + w->part;
    w->bad[index] = w->size;
    for (size_t at = begin; at < end; at += DFI_SWEEP_BLOCK) {
        size_t n = end - at < DFI_SWEEP_BLOCK ? end - at : DFI_SWEEP_BLOCK;
        size_t bad = dfi_sweep_block(w, w->k, at, n);
        if (bad < n) {
            w->bad[index] = at + bad; /* `check` is as it was, for the error to name */
            return;
        }
        if (w->then) dfi_sweep_block(w->then, w->k, at, n);
    }
}

/* Runs the pass; returns the first bad element of `check`, or size. */
static size_t dfi_sweep_run(df_ctx *ctx, dfi_sweep *w) {
    size_t parts = w->size / DFI_SWEEP_PART, bad = w->size;
    if (parts > DFI_SWEEP_PARTS) parts = DFI_SWEEP_PARTS;
    if (parts < 1 || ctx->threads < 2) parts = 1;
    w->k = ctx->k;
    w->part = (w->size + parts - 1) / parts;
    w->part += (DFI_ALIGN - w->part % DFI_ALIGN) % DFI_ALIGN;
    parts = (w->size + w->part - 1) / w->part;
    if (parts < 2) dfi_sweep_part(w, 0);
    else dfi_parallel(ctx, (int)parts, dfi_sweep_part, w);
    for (size_t i = 0; i < parts && bad == w->size; i++) bad = w->bad[i];
    return bad;
}

static void dfi_sweep_set(dfi_sweep *w, size_t size, df_real *out, int count,
                          const double *c, const df_real *const *a) {
    memset(w, 0, offsetof(dfi_sweep, bad));
    w->size = size;
    w->count = count < DFI_TERMS ? count : DFI_TERMS;
    for (int j = 0; j < w->count; j++) {
        w->c[j] = c[j];
        w->in[j] = a[j];
    }
    w->out = out;
}

/* First NaN or Inf of x [size], or size. */
static size_t dfi_nonfinite_at(df_ctx *ctx, size_t size, const df_real *x) {
    dfi_sweep w;
    dfi_sweep_set(&w, size, NULL, 0, NULL, NULL);
    w.check = x;
    return dfi_sweep_run(ctx, &w);
}

/* out = sum_j c[j] a[j] over whole arrays. */
static void dfi_combine(df_ctx *ctx, size_t size, df_real *out, int count, const double *c,
                        const df_real *const *a) {
    dfi_sweep w;
    dfi_sweep_set(&w, size, out, count, c, a);
    dfi_sweep_run(ctx, &w);
}

/* ---- asking a model at given times ----
   A model may live in other units than the sampler: its own time, x scaled to unit
   variance, at most so many rows at once. All of that is undone here, in one place, so
   that networks, closed forms and users' callbacks answer one and the same question. The
   samplers fill their own query, all rows at one point of the grid; df_model_ask is for
   everyone else, and its rows may stand at different times, as in training and
   likelihoods. The answer stays in the model's own prediction: df_plane_convert, or
   dfi_model_map where its clock is another's, carries it on. */

/* A predict whose tensor operations failed may say 0 all the same: the context knows. */
static df_result dfi_predict(df_ctx *ctx, const df_model *model, const df_query *q,
                             df_real *out) {
    df_result before = ctx->stuck, r = model->predict(model->self, ctx, q, out);
    return r != DF_OK || before != DF_OK ? r : dfi_stuck(ctx);
}

/* After a callback that returned r, with ctx->code set to 0 before the call (it was
   `before`). Its own code comes back as it is; the context gets a sentence of that code,
   unless the callback left one. steps 0: no step is named. */
static df_result dfi_returned(df_ctx *ctx, df_result before, df_result r, const char *what,
                              int step, int steps) {
    char where[48] = "";
    int said;
    if (r == DF_OK) {
        if (ctx->code == DF_OK) ctx->code = before;
        return r;
    }
    if (ctx->code == DF_OK && ctx->stuck == r) dfi_stuck(ctx);
    if (ctx->code == r) return r;
    if (steps > 0) snprintf(where, sizeof where, " at step %d of %d", step, steps);
    said = ctx->code != DF_OK;
    return dfi_fail(ctx, r, "%s returned %d%s%s%s", what, r, where, said ? ": " : "",
                    said ? ctx->message : "");
}

/* Numbers in one row of an answer. */
static size_t dfi_answer_width(const df_model *m, df_ask ask) {
    if (ask == DF_ASK_LOG_DENSITY) return 1;
    return (size_t)m->dim *
           (ask == DF_ASK_PREDICT && m->learned != DF_LEARNED_NONE ? 2 : 1);
}

/* Asks in questions of at most max_batch rows. Row r is sample first + r mod samples, so a
   question that holds the samples twice (guidance) is also cut where they begin again. */
static df_result dfi_ask(df_ctx *ctx, const df_model *model, const df_query *q,
                         df_real *out) {
    size_t dim = (size_t)q->dim, width = dfi_answer_width(model, q->ask);
    int most = model->max_batch; /* 0: any */
    if (most <= 0 || q->n <= most) return dfi_predict(ctx, model, q, out);
    for (int at = 0; at < q->n;) {
        int inside = q->samples > 0 ? at % q->samples : at;
        int rows = q->n - at < most ? q->n - at : most;
        if (q->samples > 0 && rows > q->samples - inside) rows = q->samples - inside;
        df_query part = *q;
        df_result r;
        part.n = part.samples = rows;
        part.first_sample = q->first_sample + (uint64_t)inside;
        part.x = q->x + (size_t)at * dim;
        if (q->v) part.v = q->v + (size_t)at * dim;
        part.t = q->t + at;
        part.alpha = q->alpha + at;
        part.sigma = q->sigma + at;
        part.t_model = q->t_model + at;
        if (q->t_to) {
            part.t_to = q->t_to + at;
            part.alpha_to = q->alpha_to + at;
            part.sigma_to = q->sigma_to + at;
            part.t_model_to = q->t_model_to + at;
        }
        if (q->labels) part.labels = q->labels + at;
        if (q->condition)
            part.condition = q->condition + (size_t)inside * q->condition_stride;
        r = dfi_predict(ctx, model, &part, out + (size_t)at * width);
        if (r != DF_OK) return r;
        at += rows;
    }
    return DF_OK;
}

/* A rectified flow's velocity, told in our t. Whoever fills in predict, self and dim has a
   model; the rest says how the network was trained. */
DF_API df_model df_model_defaults(void) {
    df_model m;
    memset(&m, 0, sizeof m);
    m.cookie = DFI_COOKIE;
    m.answers = DF_ASK_PREDICT;
    m.process = df_process_flow();
    m.prediction = DF_VELOCITY;
    m.time = df_time_own();
    m.clock = df_time_own();
    m.stackable = 1;
    m.null_label = -1;
    return m;
}

/* c_in = 1/sqrt(alpha^2 s^2 + sigma^2): x of unit variance for data of deviation s (Karras
   et al. 2022, table 1, there with alpha = 1). */
static double dfi_model_scale(const df_model *m, const df_point *at) {
    if (m->input_sigma_data <= 0) return 1;
    return 1 / hypot(at->alpha * m->input_sigma_data, at->sigma);
}

/* A velocity model's answer is dx/d clock, so dx/dt = answer (d clock/dt). */
static df_result dfi_model_map(df_ctx *ctx, const df_model *m, df_prediction to,
                               const df_point *at, double *cx, double *cp) {
    double clock, rate;
    df_result result = df_plane_map(ctx, &m->process, m->prediction, to, at, cx, cp);
    if (result != DF_OK || m->prediction != DF_VELOCITY) return result;
    result = df_time_at(ctx, &m->process, &m->clock, at, &clock, &rate);
    if (result == DF_OK) *cp *= rate;
    return result;
}

/* NULL for anything but one of the five. */
static const char *dfi_ask_name(df_ask ask) {
    switch (ask) {
    case DF_ASK_MAP: return "MAP";
    case DF_ASK_PREDICT: return "PREDICT";
    case DF_ASK_JVP: return "JVP";
    case DF_ASK_VJP: return "VJP";
    case DF_ASK_LOG_DENSITY: return "LOG_DENSITY";
    default: return NULL;
    }
}

/* Everything that can be wrong with a question before it is asked. */
static df_result dfi_ask_check(df_ctx *ctx, const df_model *m, const df_query *q,
                               const df_real *out) {
    const char *name = dfi_ask_name(q->ask);
    if (!ctx || !m || !q->t || !q->x || !out)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_model_ask: ctx, model, t, x and out must be given");
    if (m->cookie != DFI_COOKIE || !m->predict || m->dim < 1 || q->n < 1)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_model_ask: n = %d, the model's dim = "
                        "%d, predict %s: want a model of df_model_defaults, both above 0, "
                        "and predict", q->n, m->dim, m->predict ? "given" : "NULL");
    if (dfi_nonfinite(m->input_sigma_data))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_model_ask: input_sigma_data is %s",
                        dfi_nonfinite_name(m->input_sigma_data));
    if (!name || q->ask == DF_ASK_MAP || !(m->answers & (unsigned)q->ask))
        return dfi_fail(ctx, DF_ERR_UNSUPPORTED, "df_model_ask: this model does not "
                        "answer %s (ask = %d, its `answers` = %u)", name ? name : "that",
                        (int)q->ask, m->answers);
    if (!q->v && (q->ask == DF_ASK_JVP || q->ask == DF_ASK_VJP))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_model_ask: %s wants v", name);
    return df_process_check(ctx, &m->process);
}

/* out[r] = c[r] in[r], one call where the factors agree. */
static void dfi_scale_rows(df_ctx *ctx, int n, int dim, const double *c, const df_real *in,
                           df_real *out) {
    for (int row = 0, rows; row < n; row += rows) {
        size_t first = (size_t)row * (size_t)dim;
        const df_real *from = in + first;
        rows = dfi_same_times(c, row, n);
        dfi_combine(ctx, (size_t)rows * (size_t)dim, out + first, 1, c + row, &from);
    }
}

/* Of rows at each[0 .. n-1] (step 1), or all at each[0] (step 0): t, alpha, sigma and
   input scale into c [4, n], the model's own time into t_model [n]. *same: one point for
   all. Without a context a time that is infinite is told as 0. */
static df_result dfi_row_times(df_ctx *ctx, const df_model *m, size_t n,
                               const df_point *each, int step, double *c,
                               df_real *t_model, int *same) {
    double native = 0, scale = 1;
    *same = 1;
    for (size_t i = 0; i < n; i++) {
        const df_point *q = each + (step ? i : 0);
        if (i == 0 || (step && memcmp(q, q - 1, sizeof *q) != 0)) {
            df_result r = df_time_at(ctx, &m->process, &m->time, q, &native, NULL);
            if (r != DF_OK && ctx) return r;
            if (r != DF_OK) native = 0;
            scale = dfi_model_scale(m, q);
            *same &= i == 0;
        }
        c[i] = q->t;
        c[n + i] = q->alpha;
        c[2 * n + i] = q->sigma;
        c[3 * n + i] = scale;
        t_model[i] = (df_real)native;
    }
    return DF_OK;
}

/* In scratch memory: alpha, sigma, native time of each row for q, the input scale in
   *scale. */
static df_result dfi_ask_times(df_ctx *ctx, const df_model *m, df_query *q,
                               double **scale) {
    size_t n = (size_t)q->n;
    df_point *each = (df_point *)dfi_scratch(ctx, dfi_mul(sizeof *each, n));
    double *c = (double *)dfi_scratch(ctx, dfi_mul(4 * sizeof *c, n));
    df_real *t_model = (df_real *)dfi_scratch(ctx, dfi_mul(sizeof *t_model, n));
    if (!each || !c || !t_model) return DF_ERR_MEMORY;
    for (size_t i = 0; i < n; i++) each[i] = df_process_at(&m->process, q->t[i]);
    q->alpha = c + n;
    q->sigma = c + 2 * n;
    q->t_model = t_model;
    *scale = c + 3 * n;
    return dfi_row_times(ctx, m, n, each, 1, c, t_model, &q->same_time);
}

/* A scaled copy of `in` [n, dim], or NULL. */
static const df_real *dfi_ask_scaled(df_ctx *ctx, const df_query *q, const double *scale,
                                     const df_real *in) {
    size_t size = dfi_mul((size_t)q->n, (size_t)q->dim);
    df_real *out = (df_real *)dfi_scratch(ctx, dfi_mul(size, sizeof(df_real)));
    if (out) dfi_scale_rows(ctx, q->n, q->dim, scale, in, out);
    return out;
}

/* The chain rule for y = F(c x): (dy/dx) v = F' (c v) and v^T dy/dx = c (v^T F'). So JVP
   scales its v, VJP its answer. */
static df_result dfi_ask_rows(df_ctx *ctx, const df_model *m, df_query *q, df_real *out) {
    size_t width = dfi_answer_width(m, q->ask);
    size_t total = (size_t)q->n * width, bad;
    int scaled = m->input_sigma_data > 0;
    double *scale;
    df_result result = dfi_ask_times(ctx, m, q, &scale), before;
    if (result != DF_OK) return result;
    if (scaled) q->x = dfi_ask_scaled(ctx, q, scale, q->x);
    if (scaled && q->ask == DF_ASK_JVP) q->v = dfi_ask_scaled(ctx, q, scale, q->v);
    if (!q->x || (q->ask == DF_ASK_JVP && !q->v)) return DF_ERR_MEMORY;
    before = ctx->code;
    ctx->code = DF_OK;
    result = dfi_ask(ctx, m, q, out);
    result = dfi_returned(ctx, before, result, "df_model_ask: predict", 0, 0);
    if (result != DF_OK) return result;
    if (scaled && q->ask == DF_ASK_VJP) dfi_scale_rows(ctx, q->n, q->dim, scale, out, out);
    bad = ctx->k->nonfinite(total, out);
    if (bad == total) return DF_OK;
    return dfi_fail(ctx, DF_ERR_NONFINITE, "df_model_ask: the model answered %s in row "
                    "%llu, element %llu, at t = %g", dfi_nonfinite_name((double)out[bad]),
                    (unsigned long long)(bad / width), (unsigned long long)(bad % width),
                    q->t[bad / width]);
}

/* Row r is sample r, and no step of a sampler. All memory of the question is scratch,
   released here. */
static df_result dfi_ask_checked(df_ctx *ctx, const df_model *m, df_query *q,
                                 df_real *out) {
    df_result result = dfi_ask_check(ctx, m, q, out);
    df_scope mark;
    if (result != DF_OK) return result;
    mark = dfi_scratch_mark(ctx);
    if (q->samples == 0) q->samples = q->n;
    q->dim = m->dim;
    q->step = -1;
    result = dfi_ask_rows(ctx, m, q, out);
    dfi_scratch_release(ctx, mark);
    return result;
}

DF_API df_result df_model_ask(df_ctx *ctx, const df_model *model, df_ask ask,
                              const double *t, int n, const df_real *x, const df_real *v,
                              const int *labels, df_real *out) {
    df_query q;
    memset(&q, 0, sizeof q);
    q.ask = ask;
    q.n = n;
    q.x = x;
    q.v = ask == DF_ASK_JVP || ask == DF_ASK_VJP ? v : NULL;
    q.t = t;
    q.labels = labels;
    return dfi_ask_checked(ctx, model, &q, out);
}

/* ---- the machine: a sampler's state ---- */

/* NEW: x is not set up. READY: a question is due. ASKED: it is out, its answer is awaited.
   DONE: finished, or failed with `result`. */
enum dfi_phase { DFI_PHASE_NEW, DFI_PHASE_READY, DFI_PHASE_ASKED, DFI_PHASE_DONE };

struct df_sampler {
    df_stage stage; /* first, so that a stage's helpers find the sampler again */
    df_model model;
    df_sample_desc desc; /* strings and lists gone, the row's own values filled in */
    df_sampler_row row;
    char name[64];             /* of a user's row, cut to fit */
    size_t bytes;              /* of the one allocation that holds all of this */
    size_t size;               /* n dim */
    df_point *grid;            /* [points + 1] */
    double *t;                 /* [8, rows] of the question: t, alpha, sigma, input scale;
                                  the same of where a map goes */
    df_real *t_model;          /* [2, rows] */
    df_real *input; /* [rows, dim] x times c_in; NULL: the model takes x itself */
    df_real *preview;          /* [n, dim] x_0 for on_step; NULL: nobody looks */
    df_real *raw;              /* [n, 2 dim] answers that hold a variance, or NULL */
    df_real *spare;            /* [n, dim] noise of corrections and of late churn */
    int *labels;               /* [rows] where rows > n and there are labels, or NULL */
    df_query query;
    df_ask ask;                /* what the next question asks, of so many rows, and to
                                  where a map goes */
    int rows;
    df_point aim;
    enum dfi_phase phase;
    int correction;            /* Langevin steps still to do before this step */
    int late;                  /* churn is due once the answer is there */
    int waits; /* `pending`, the conversion of the last answer, is to be done
                                  in one pass with the stage's first combination */
    dfi_sweep pending;
    int steady;    /* its stage is of ours and reads arrays by combining only */
    int busy;      /* within df_sampler_next or _answer: callbacks may not call them */
    uint32_t draw; /* of the next noise */
    int evaluations;
    df_result result;
};

DF_API df_sample_desc df_sample_defaults(void) {
    df_sample_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.method = "ddim";
    d.steps = 50;
    d.grid = "uniform";
    d.shift = 1;
    d.t_max = 1;
    d.t_min = -1;
    d.end = DF_END_DATA;
    d.points_in = DF_POINTS_T;
    d.restart_steps = 4;
    d.restart_min = .06;
    d.restart_max = .3;
    d.corrector = d.predicts = -1;
    d.eta = -1;
    d.eta_max = d.churn_max = d.threshold_max = DBL_MAX;
    d.noise_scale = d.friction = d.threshold_min = 1;
    d.snr = .16;
    d.window = 8;
    d.start = DF_START_NOISE;
    return d;
}

/* ---- what a stage function may call ---- */

/* The usual reason for an array that is not there. */
#define DFI_STAGE_HINT "; does the stage use more buffers than its row has?"

/* A stage function knows its df_stage only; it is the sampler's first member. */
static df_sampler *dfi_sampler_of(df_stage *stage) { return (df_sampler *)(void *)stage; }

/* Ends the run with a sentence that says where it stood; `why` may be the context's. */
static df_result dfi_sampler_fail(df_sampler *s, df_result code, const char *why) {
    const df_stage *st = &s->stage;
    char copy[DFI_MESSAGE];
    snprintf(copy, sizeof copy, "%s", why);
    s->phase = DFI_PHASE_DONE;
    s->result = dfi_fail(st->ctx, code, "df_sample: %s, step %d of %d (t = %g): %s",
                         s->row.name, st->step + 1, st->steps, st->at.t, copy);
    return s->result;
}

/* The same for NaN and Inf: which number of which array, its rows `width` wide. */
static df_result dfi_sampler_nonfinite(df_sampler *s, const char *what, const df_real *x,
                                       size_t at, size_t width) {
    df_stage *st = &s->stage;
    int step = st->step < st->steps ? st->step + 1 : st->steps;
    s->phase = DFI_PHASE_DONE;
    s->result = dfi_fail(st->ctx, DF_ERR_NONFINITE, "df_sample: %s %s at step %d of %d (t "
                         "= %g), sample %llu, element %llu", what,
                         dfi_nonfinite_name((double)x[at]), step, st->steps, st->at.t,
                         (unsigned long long)(s->desc.first_sample +
                                              at / width % (size_t)st->n),
                         (unsigned long long)(at % width));
    return s->result;
}

/* Is x without them? */
static df_result dfi_sampler_finite(df_sampler *s, const char *what) {
    size_t bad = dfi_nonfinite_at(s->stage.ctx, s->size, s->stage.x);
    if (bad == s->size) return DF_OK;
    return dfi_sampler_nonfinite(s, what, s->stage.x, bad, (size_t)s->stage.dim);
}

/* The model's, or was it asked about such an x? */
static df_result dfi_sampler_answered(df_sampler *s, const df_real *out, size_t at,
                                      size_t width) {
    size_t dim = (size_t)s->stage.dim, size = (size_t)s->rows * dim;
    size_t bad = dfi_nonfinite_at(s->stage.ctx, size, s->stage.asked);
    if (bad < size) return dfi_sampler_nonfinite(s, "x became", s->stage.asked, bad, dim);
    return dfi_sampler_nonfinite(s, "the model answered", out, at, width);
}

/* A stage goes on after a helper failed, since not every helper can tell it: the first
   failure stays, and no helper starts the run anew. */
static df_result dfi_stage_wrong(df_stage *stage, const char *why) {
    df_sampler *s = dfi_sampler_of(stage);
    return s->result != DF_OK ? s->result : dfi_sampler_fail(s, DF_ERR_ARGUMENT, why);
}

/* The pending conversion, and after it, block by block, `then`. */
static void dfi_sampler_settle(df_sampler *s, const dfi_sweep *then) {
    size_t bad;
    s->waits = 0;
    s->pending.then = then;
    bad = dfi_sweep_run(s->stage.ctx, &s->pending);
    if (bad < s->size)
        dfi_sampler_answered(s, s->pending.check, bad, (size_t)s->stage.dim);
}

/* A question about x, whose rows stand at s->each; at NULL or x NULL is a mistake. */
static df_next dfi_stage_ask(df_stage *s, df_ask ask, int rows, const df_point *at,
                             const df_real *x) {
    df_sampler *sampler = dfi_sampler_of(s);
    const char *wrong = NULL;
    if (sampler->result != DF_OK) return DF_NEXT_FAIL;
    if (at == NULL || x == NULL || rows < 1 || rows > s->rows || rows % s->n != 0)
        wrong = "df_stage_ask: the point or x is NULL, or too many rows" DFI_STAGE_HINT;
    else if (x == s->answer)
        wrong = "df_stage_ask: x is `answer`, which the model writes to";
    else if (sampler->model.predict && !(sampler->model.answers & (unsigned)ask))
        wrong = "df_stage_ask: the model does not answer that; see `answers`";
    if (wrong) {
        dfi_stage_wrong(s, wrong);
        return DF_NEXT_FAIL;
    }
    s->at = *at;
    s->asked = x;
    sampler->ask = ask;
    sampler->rows = rows;
    sampler->phase = DFI_PHASE_READY;
    return DF_NEXT_ASK;
}
/* All samples at one point. */
static df_next dfi_stage_ask_at(df_stage *s, df_ask ask, const df_point *at,
                                const df_real *x) {
    for (int r = 0; at && r < s->n; r++) s->each[r] = *at;
    return dfi_stage_ask(s, ask, s->n, at, x);
}
DF_API df_next df_stage_ask(df_stage *s, const df_point *at, const df_real *x) {
    return dfi_stage_ask_at(s, DF_ASK_PREDICT, at, x);
}
DF_API df_next df_stage_ask_each(df_stage *s, int rows, const df_real *x) {
    return dfi_stage_ask(s, DF_ASK_PREDICT, rows, &s->each[0], x);
}
DF_API df_next df_stage_ask_map(df_stage *s, const df_point *at, const df_point *to,
                                const df_real *x) {
    if (to) dfi_sampler_of(s)->aim = *to;
    return dfi_stage_ask_at(s, DF_ASK_MAP, to ? at : NULL, x);
}
DF_API df_next df_stage_ask_density(df_stage *s, const df_point *at, const df_real *x) {
    return dfi_stage_ask_at(s, DF_ASK_LOG_DENSITY, at, x);
}

static df_learned dfi_stage_learned(const df_stage *s) {
    if (s->desc->variance != DF_VARIANCE_OWN) return DF_LEARNED_NONE;
    return ((const df_sampler *)(const void *)s)->model.learned;
}

DF_API void df_stage_combine(df_stage *s, df_real *out, int count, const double *c,
                             const df_real *const *a) {
    df_sampler *sampler = dfi_sampler_of(s);
    int missing = out == NULL || c == NULL || a == NULL;
    dfi_sweep w;
    for (int j = 0; j < count && j < DFI_TERMS && !missing; j++) missing = a[j] == NULL;
    if (missing) dfi_stage_wrong(s, "df_stage_combine: an array is NULL" DFI_STAGE_HINT);
    else if (count < 1 || count > DFI_TERMS)
        dfi_stage_wrong(s, "df_stage_combine: count must be 1 .. 8");
    if (sampler->result != DF_OK) return;
    dfi_sweep_set(&w, sampler->size, out, count, c, a);
    if (sampler->waits) dfi_sampler_settle(sampler, &w);
    else dfi_sweep_run(s->ctx, &w);
}

DF_API df_result df_stage_rates(df_stage *s, const df_point *at, unsigned want,
                                df_rates *out) {
    df_result r;
    if (at == NULL || out == NULL)
        return dfi_stage_wrong(s, "df_stage_rates: the point or out is NULL");
    r = df_process_rates(s->ctx, s->process, at->t, want, out);
    return r == DF_OK ? r : dfi_sampler_fail(dfi_sampler_of(s), r, s->ctx->message);
}

/* Each row is a stream of its own, so that rows may be made anywhere. A task makes about
   4096 numbers or more: less is not worth waking a worker. */
enum { DFI_NOISE_TASK = 4096 };
typedef struct dfi_noise_job {
    const df_noise_query *q;
    size_t rows;                 /* of one task */
    df_real *out;
} dfi_noise_job;
static void dfi_noise_task(void *arg, int task) {
    const dfi_noise_job *j = (const dfi_noise_job *)arg;
    size_t row = (size_t)task * j->rows, end = row + j->rows, dim = (size_t)j->q->dim;
    if (end > (size_t)j->q->n) end = (size_t)j->q->n;
    for (; row < end; row++)
        df_random_normal(j->q->seed, j->q->first_sample + row, j->q->draw, dim,
                         j->out + row * dim);
}

/* The next draw of every sample, keyed by the sample, not by its place in the batch. */
static df_result dfi_sampler_noise(df_sampler *s, int step, df_point from, df_point to,
                                   df_real *out) {
    const df_noise *noise = &s->desc.noise;
    df_stage *st = &s->stage;
    df_ctx *ctx = st->ctx;
    df_noise_query q = { s->desc.seed, s->desc.first_sample, s->draw++, step, st->n,
                         st->dim, from, to };
    dfi_noise_job job = { &q, ((size_t)DFI_NOISE_TASK + (size_t)st->dim - 1) /
                                  (size_t)st->dim, out };
    df_result before = ctx->code;
    if (!noise->fill) {
        dfi_parallel(ctx, (int)(((size_t)st->n + job.rows - 1) / job.rows), dfi_noise_task,
                     &job);
        return DF_OK;
    }
    ctx->code = DF_OK;
    s->result = noise->fill(noise->user, &q, out);
    dfi_returned(ctx, before, s->result, "df_sample: noise.fill", st->step + 1, st->steps);
    if (s->result != DF_OK && noise->fill == dfi_replay_fill) {
        const df_replay *r = (const df_replay *)noise->user;
        dfi_fail(ctx, s->result, "df_noise_replay: draw %d of %d x %d numbers is wanted, "
                 "but there are %d of %llu each", r->used + 1, st->n, st->dim, r->count,
                 (unsigned long long)r->size);
    }
    if (s->result != DF_OK) s->phase = DFI_PHASE_DONE;
    return s->result;
}

DF_API df_result df_stage_noise(df_stage *s, df_real *out) {
    double scale = s->desc->noise_scale;
    const df_real *noise = out;
    df_result r;
    if (out == NULL || dfi_sampler_of(s)->result != DF_OK)
        return dfi_stage_wrong(s, "df_stage_noise: out is NULL" DFI_STAGE_HINT);
    r = dfi_sampler_noise(dfi_sampler_of(s), s->step, s->from, s->to, out);
    if (r == DF_OK && fabs(scale - 1) > 0)
        dfi_combine(s->ctx, dfi_sampler_of(s)->size, out, 1, &scale, &noise);
    return r;
}

/* ---- create: check, allocate once ---- */

/* Names of the samplers that can do what one cannot, for its error. column: 0 start at
   alpha = 0, 1 end at sigma = 0. */
static const char *dfi_sampler_names(int column, char *out, size_t capacity) {
    size_t used = 0;
    for (int i = 0; i < DFI_SAMPLER_ROWS; i++) {
        const df_sampler_row *row = &dfi_sampler_rows[i];
        int can = column ? row->to_sigma0 : row->from_alpha0;
        if (can && used + strlen(row->name) + 3 <= capacity)
            used += (size_t)snprintf(out + used, capacity - used, "%s%s",
                                     used > 0 ? ", " : "", row->name);
    }
    return out;
}

/* The numbers of a model that enter every sample: NaN here would leave as data. Of native
   times SIGMA alone has no factor to be 0. */
static df_result dfi_sample_check_numbers(df_ctx *ctx, const df_model *m) {
    for (int i = 0; i < (m->prediction == DF_VELOCITY ? 2 : 1); i++) {
        const df_time *t = i ? &m->clock : &m->time;
        int known = (unsigned)t->kind <= (unsigned)DF_TIME_LOG_SIGMA;
        if (!known || dfi_nonfinite(t->a) || dfi_nonfinite(t->b) ||
            (t->kind != DF_TIME_SIGMA && !(fabs(t->a) > 0)))
            return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: the model's %s has kind %d, "
                            "a = %g, b = %g: wants a df_time_kind and finite numbers, a "
                            "not 0", i ? "clock" : "time", (int)t->kind, t->a, t->b);
    }
    if (dfi_nonfinite(m->input_sigma_data) || m->input_sigma_data < 0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: the model's input_sigma_data is "
                        "%g, wants a finite number >= 0 (0: off)", m->input_sigma_data);
    for (int i = 0; (m->mean || m->scale) && i < m->scaling_size; i++) {
        double mean = m->mean ? m->mean[i] : 0, scale = m->scale ? m->scale[i] : 1;
        if (dfi_nonfinite(mean) || dfi_nonfinite(scale) || !(scale > 0))
            return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: the model's mean[%d] is %g, "
                            "scale[%d] is %g: wants finite numbers, scale > 0", i, mean,
                            i, scale);
    }
    return DF_OK;
}

/* What a wrong model, row or setting says: the number found and the one wanted. */
static df_result dfi_sample_check_model(df_ctx *ctx, const df_model *m, const df_real *x,
                                        int n) {
    df_result r;
    if (m == NULL || m->cookie != DFI_COOKIE)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: the model was not made by "
                        "df_model_defaults or one of the functions that return a model");
    if (x == NULL || n < 1 || m->dim < 1)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: %s, n = %d, the model's dim is "
                        "%d: wants x [n, dim] with both at least 1",
                        x ? "x given" : "x is NULL", n, m->dim);
    if ((m->mean || m->scale) && m->scaling_size != 1 && m->scaling_size != m->dim)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: the model's scaling_size is %d, "
                        "must be 1 or its dim %d", m->scaling_size, m->dim);
    if ((unsigned)m->learned > (unsigned)DF_LEARNED_RANGE)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: the model's `learned` is %d, "
                        "unknown", (int)m->learned);
    r = dfi_sample_check_numbers(ctx, m);
    return r != DF_OK ? r : df_process_check(ctx, &m->process);
}

static df_result dfi_sample_check_row(df_ctx *ctx, const df_sampler_row *row) {
    if (!row->name || !row->stage || (unsigned)row->buffers > (unsigned)DF_BUFFERS ||
        (unsigned)row->wants >= (unsigned)DF_PREDICTION_COUNT ||
        (row->asks != DF_ASK_PREDICT && row->asks != DF_ASK_MAP) ||
        (unsigned)row->clock > (unsigned)DF_CLOCK_STOPPED || row->most_order < 0 ||
        (unsigned)row->slope > (unsigned)DF_SLOPE_BH2 ||
        (unsigned)row->eta_in > (unsigned)DF_ETA_STRAIGHT)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: row %.64s with %s stage wants "
                        "%d, asks %d (PREDICT or MAP), clock %d, most_order %d, slope %d, "
                        "eta_in %d, buffers %d (at most %d): one is unknown",
                        row->name ? row->name : "NULL", row->stage ? "a" : "no",
                        (int)row->wants, (int)row->asks, (int)row->clock, row->most_order,
                        (int)row->slope, (int)row->eta_in, row->buffers, DF_BUFFERS);
    for (int i = 0; i < DFI_SAMPLER_ROWS; i++) {
        const df_sampler_row *own = &dfi_sampler_rows[i];
        if (own->stage == row->stage &&
            (row->buffers < own->buffers || row->most_order > own->most_order ||
             row->whole != own->whole || row->asks != own->asks))
            return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: row %.64s has %s's stage, "
                            "which wants buffers %d, most_order %d, whole %d, asks %d",
                            row->name, own->name, own->buffers, own->most_order,
                            own->whole, (int)own->asks);
    }
    return DF_OK;
}

static int dfi_adapts(const df_sampler_row *row) {
    return row->stage == dfi_stage_rk45 || row->stage == dfi_stage_dpm_adaptive;
}

/* Numbers of a descriptor, each a double, an int or an enumeration: the least and the most
   it may be, whatever the method. */
#define DFI_SETTING(name)                                                                 \
    #name, offsetof(df_sample_desc, name), sizeof(((df_sample_desc *)NULL)->name)
#define DFI_ANY (-DBL_MAX), DBL_MAX
#define DFI_OPEN (-DBL_MAX)    /* as the most: no limit, it may be infinite */
static const struct dfi_setting {
    const char *name;
    size_t at, size;
    double least, most;
} dfi_settings[] = {
    { DFI_SETTING(steps), DFI_ANY }, { DFI_SETTING(inverse), DFI_ANY },
    { DFI_SETTING(end), 0, DF_END_T_MIN }, { DFI_SETTING(start), 0, DF_START_DATA },
    { DFI_SETTING(restarts), 0, INT_MAX }, { DFI_SETTING(restart_steps), 1, INT_MAX },
    { DFI_SETTING(restart_min), DBL_MIN, DBL_MAX },
    { DFI_SETTING(restart_max), DBL_MIN, DBL_MAX },
    { DFI_SETTING(order), DFI_ANY }, { DFI_SETTING(corrector), -DBL_MAX, DFI_NODES },
    { DFI_SETTING(predicts), -DBL_MAX, DF_X0 }, { DFI_SETTING(ratio), 0, 1 },
    { DFI_SETTING(slope), 0, DF_SLOPE_BH2 }, { DFI_SETTING(final), 0, DF_FINAL_LOWER },
    { DFI_SETTING(eta), DFI_ANY }, { DFI_SETTING(eta_in), 0, DF_ETA_STRAIGHT },
    { DFI_SETTING(eta_min), -DBL_MAX, DFI_OPEN },
    { DFI_SETTING(eta_max), -DBL_MAX, DFI_OPEN },
    { DFI_SETTING(variance), 0, DF_VARIANCE_ANALYTIC },
    { DFI_SETTING(churn), 0, DBL_MAX }, { DFI_SETTING(churn_min), -DBL_MAX, DFI_OPEN },
    { DFI_SETTING(churn_max), -DBL_MAX, DFI_OPEN },
    { DFI_SETTING(noise_scale), 0, DBL_MAX }, { DFI_SETTING(corrections), 0, INT_MAX },
    { DFI_SETTING(snr), 0, DBL_MAX }, { DFI_SETTING(langevin_step), 0, DBL_MAX },
    { DFI_SETTING(friction), 0, DBL_MAX }, { DFI_SETTING(rtol), 0, DBL_MAX },
    { DFI_SETTING(atol), 0, DBL_MAX }, { DFI_SETTING(window), 1, INT_MAX },
    { DFI_SETTING(clip), 0, DBL_MAX }, { DFI_SETTING(threshold), 0, 1 },
    { DFI_SETTING(threshold_min), 0, DBL_MAX },
    { DFI_SETTING(threshold_max), 0, DFI_OPEN },
    { DFI_SETTING(compat), 0, 2 * DF_COMPAT_STAGE_NOISE - 1 },
};
enum { DFI_SETTINGS = (int)(sizeof dfi_settings / sizeof dfi_settings[0]) };

static double dfi_setting_value(const df_sample_desc *d, const struct dfi_setting *set) {
    double number;
    int whole = 0;
    const char *at = (const char *)d + set->at;
    if (set->size != sizeof number) memcpy(&whole, at, set->size);
    else memcpy(&number, at, sizeof number);
    return set->size != sizeof number ? whole : number;
}

/* Each setting by itself. */
static df_result dfi_sample_check_settings(df_ctx *ctx, const df_sample_desc *d) {
    for (int i = 0; i < DFI_SETTINGS; i++) {
        const struct dfi_setting *set = &dfi_settings[i];
        double x = dfi_setting_value(d, set);
        int open = set->most <= DFI_OPEN;
        if (open ? dfi_is_nan(x) : dfi_nonfinite(x))
            return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: %s is %.9g, wants a "
                            "%snumber", set->name, x, open ? "" : "finite ");
        if (x < set->least || (!open && x > set->most))
            return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: %s is %.9g, wants at %s "
                            "%.9g", set->name, x, x < set->least ? "least" : "most",
                            x < set->least ? set->least : set->most);
    }
    return DF_OK;
}
#undef DFI_SETTING
#undef DFI_ANY
#undef DFI_OPEN

/* What must not be said together: what speaks of the settings named in `about`, whose
   values the sentence tells. */
typedef struct dfi_rule {
    int wrong;
    const char *about, *say;
} dfi_rule;
static df_result dfi_sample_refuse(df_ctx *ctx, const df_sample_desc *d,
                                   const df_sampler_row *row, const dfi_rule *rule) {
    char values[256] = "";
    size_t used = 0;
    for (int i = 0; i < DFI_SETTINGS; i++)
        if (dfi_named(dfi_settings[i].name, "", rule->about) && used < sizeof values)
            used += (size_t)snprintf(values + used, sizeof values - used, ", %s %.9g",
                                     dfi_settings[i].name,
                                     dfi_setting_value(d, &dfi_settings[i]));
    return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: %s%s: %s", row->name, values,
                    rule->say);
}

static int dfi_v3_fine(const df_v3_statistics *e, int dim) {
    size_t size = e && e->dim == dim && e->count > 0 ? (size_t)e->count * (size_t)dim : 0;
    if (size == 0 || !e->lambda || !e->l || !e->s || !e->b) return 0;
    for (int i = 0; i < e->count; i++)
        if (dfi_nonfinite(e->lambda[i]) || (i > 0 && e->lambda[i] <= e->lambda[i - 1]))
            return 0;
    for (size_t i = 0; i < size; i++)
        if (dfi_nonfinite(e->l[i]) || dfi_nonfinite(e->s[i]) || dfi_nonfinite(e->b[i]))
            return 0;
    return 1;
}

/* Settings together and with their method. Churn belongs to ODE samplers: on top of a
   sampler's own noise it would count twice; and only an ODE can be walked backwards. */
static df_result dfi_sample_check_method(df_ctx *ctx, const df_sample_desc *d,
                                         const df_sampler_row *row) {
    df_stage_fn f = row->stage;
    int noisy = (row->stochastic && (d->eta < 0 || row->eta_max <= 0)) || d->eta > 0;
    int predicts = row->asks == DF_ASK_PREDICT && row->clock != DF_CLOCK_STOPPED;
    int extra = d->churn > 0 || d->restarts > 0 || d->corrections > 0;
    int norms = (int)d->compat & (DF_COMPAT_NORM_SAMPLE | DF_COMPAT_NORM_BATCH);
    int back = (int)d->compat & DF_COMPAT_STEP_BACK, slope = row->slope != DF_SLOPE_OWN;
    const dfi_rule rules[] = {
        { d->churn_min > d->churn_max || d->eta_min > d->eta_max,
          "churn_min churn_max eta_min eta_max", "want min <= max" },
        { d->threshold_min > d->threshold_max, "threshold_min threshold_max",
          "want min <= max" },
        { d->restart_min >= d->restart_max, "restart_min restart_max", "want min < max" },
        { d->threshold > 0 && d->clip > 0, "clip threshold",
          "both cut x_0; leave one of them 0" },
        { d->eta >= 0 && row->eta_max <= 0, "eta", "this method has no eta; leave it -1" },
        { row->eta_in == DF_ETA_OWN &&
          (d->eta_in != DF_ETA_OWN || d->eta_min > 0 || d->eta_max < DBL_MAX),
          "eta_in eta_min eta_max", "this method has no eta of the family; leave them 0 "
          "(OWN), 0 and DBL_MAX" },
        { d->corrector > 0 && row->corrector < 0, "corrector",
          "this method has none; leave it 0 or -1" },
        { d->predicts >= 0 && !slope && f != dfi_stage_dpm_adaptive, "predicts",
          "this method has no such choice; leave it -1" },
        { d->slope != DF_SLOPE_OWN && !slope, "slope",
          "this method has no such choice; leave it 0 (OWN)" },
        { d->ratio > 0 && row->ratio <= 0, "ratio",
          "its steps hold no point to choose, this method has no use for it; leave it 0" },
        { d->variance > DF_VARIANCE_SMALL && f != dfi_stage_ddpm && !d->row, "variance",
          "LARGE and ANALYTIC belong to ddpm; leave it 0 (OWN)" },
        { d->variance == DF_VARIANCE_ANALYTIC && !d->eps2, "variance",
          "ANALYTIC wants eps2; measure it with df_sample_eps2" },
        { extra && (!predicts || row->whole), "churn restarts corrections",
          "this method does not go step by step along the ODE; leave them 0" },
        { d->churn > 0 && noisy, "eta churn",
          "this method draws its own noise, churn is for the ODE's; set one of them 0" },
        { d->points && row->clock == DF_CLOCK_STOPPED, "steps",
          "stays at t_max and has no grid: leave points NULL, set t_max and steps" },
        { d->inverse && (noisy || extra || !predicts || d->start != DF_START_GIVEN),
          "inverse eta churn restarts corrections start", "inverse walks an ODE from x as "
          "given: use an ODE method without noise, and start GIVEN (1)" },
        { back && (f == dfi_stage_block || row->whole || d->restarts > 0 || d->inverse),
          "compat restarts inverse", "COMPAT_STEP_BACK ends steps off the grid, which "
          "blocks, adaptive methods, restarts and inverse cannot take; leave it away" },
        { d->order > d->steps && d->steps > 0 && !d->points && !dfi_adapts(row),
          "order steps", "takes at least as many steps; lower the order or raise steps" },
        { norms && (f == dfi_stage_mala || f == dfi_stage_baoab), "compat",
          "this method takes steps of a fixed length; leave COMPAT_NORM_... away" },
        { f == dfi_stage_mala && (d->noise_scale != 1 || d->clip > 0 || d->threshold > 0),
          "noise_scale clip threshold", "mala is exact for 1, 0, 0 alone" },
    };
    for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++)
        if (rules[i].wrong) return dfi_sample_refuse(ctx, d, row, &rules[i]);
    return DF_OK;
}

/* Bounds that a row sets (eta is a fraction of the noise in some conventions), and what it
   asks of the model. */
static df_result dfi_sample_check_bounds(df_ctx *ctx, const df_model *m,
                                         const df_sample_desc *d,
                                         const df_sampler_row *row) {
    df_eta in = d->eta_in == DF_ETA_OWN ? row->eta_in : d->eta_in;
    double most = in == DF_ETA_OWN ? row->eta_max
                  : in == DF_ETA_DDIM || in == DF_ETA_STRAIGHT ? 1 : DBL_MAX;
    int least = row->stage == dfi_stage_dpm_adaptive ? 2 : 1;  /* 1 has no judge */
    unsigned mala = row->stage == dfi_stage_mala ? DF_ASK_LOG_DENSITY : 0;
    unsigned missing = ((unsigned)row->asks | mala) & ~m->answers;
    if (d->eta > most)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: eta is %g, %s wants it in [0, "
                        "%g], or -1 for its own", d->eta, row->name, most);
    if (d->order != 0 && (d->order < least || d->order > row->most_order))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: order %d is none of %s's, %d .. "
                        "%d; 0 is its own", d->order, row->name,
                        row->most_order > 0 ? least : 0, row->most_order);
    if (row->stage == dfi_stage_v3 && !dfi_v3_fine(d->statistics, m->dim))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: dpm_solver_v3 wants statistics "
                        "of dim %d, finite, lambda rising; measure them with "
                        "df_v3_estimate", m->dim);
    if (missing && m->predict)
        return dfi_fail(ctx, DF_ERR_UNSUPPORTED, "df_sample: %s asks for %s, which this "
                        "model does not answer (its `answers` = %u); set the flag if it "
                        "does, or use another method", row->name,
                        missing & (unsigned)DF_ASK_MAP       ? "maps"
                        : missing & (unsigned)DF_ASK_PREDICT ? "predictions"
                                                             : "the log density",
                        m->answers);
    return DF_OK;
}

/* The method of that name restarts twice by itself. */
static int dfi_restarts(const df_sample_desc *d) {
    const df_sampler_row *row = d->row ? d->row : df_sampler_find(NULL, d->method);
    return d->restarts == 0 && row && row->stage == dfi_stage_restart ? 2 : d->restarts;
}

/* Restart (Xu et al. 2023, alg. 1): from the first point at or below restart_min, K times
   up to restart_max and down again in M steps spaced as karras; the grid rises K times. */
static df_result dfi_grid_restart(dfi_grid *g, int capacity) {
    int M = g->d->restart_steps, at = 0, K = dfi_restarts(g->d), more = K * (M + 1);
    double top = pow(g->d->restart_max, 1 / 7.0), low;
    df_point *q = g->out;
    if (K <= 0) return DF_OK;
    while (at < g->count && q[at].sigma > g->d->restart_min * q[at].alpha) at++;
    if (at > 0 && at < g->count && q[at].sigma <= 0) at--;
    if (at == 0 || at == g->count || g->count + more > capacity ||
        q[at].sigma >= g->d->restart_max * q[at].alpha ||
        q[0].sigma < g->d->restart_max * q[0].alpha)
        return dfi_fail(g->ctx, DF_ERR_ARGUMENT, "df_grid: restart_max is %g, restart_min "
                        "%g: want some of the %d points, the first at sigma/alpha = %g, "
                        "on both sides of each: take more steps, or lower restart_max",
                        g->d->restart_max, g->d->restart_min, g->count,
                        q[0].sigma / q[0].alpha);
    memmove(q + at + 1 + more, q + at + 1, (size_t)(g->count - at - 1) * sizeof *q);
    low = pow(q[at].sigma / q[at].alpha, 1 / 7.0);
    for (int k = 0; k < more; k++)
        q[at + 1 + k] = k % (M + 1) == M ? q[at] : df_process_at_rho(
            g->p, pow(top + (low - top) * (k % (M + 1)) / M, 7));
    g->count += more;
    return DF_OK;
}

/* What the user left open becomes the row's own. */
static void dfi_sample_resolve(df_sample_desc *d, df_sampler_row *row) {
    int rk45 = row->stage == dfi_stage_rk45;
    if (d->eta < 0) d->eta = row->eta;
    if (d->eta_in == DF_ETA_OWN) d->eta_in = row->eta_in;
    if (d->order <= 0) d->order = row->order > 0 ? row->order : 1;
    if (d->slope == DF_SLOPE_OWN) d->slope = row->slope;
    if (d->ratio <= 0) d->ratio = row->ratio;
    if (d->corrector < 0)
        d->corrector = row->corrector <= 0 ? 0 : d->order + (row->corrector == 1);
    if (d->predicts >= 0) row->wants = (df_prediction)d->predicts;
    if (row->wants == DF_EPS && row->slope != DF_SLOPE_OWN) {
        row->from_alpha0 = 0;                   /* alpha_t/alpha_s is infinite there */
        if (d->slope == DF_SLOPE_BH1 && row->corrector == 2) d->slope = DF_SLOPE_EXACT;
    }
    if (row->stage == dfi_stage_multistep) row->buffers = dfi_history(d) + 1;
    d->restarts = dfi_restarts(d);
    if (row->stage == dfi_stage_pc && d->corrections == 0) d->corrections = 1;
    if (d->rtol <= 0) d->rtol = rk45 ? 1e-5 : .05;
    if (d->atol <= 0)
        d->atol = rk45 ? 1e-5 : row->stage == dfi_stage_paradigms ? 1e-3 : .0078;
    if (d->compat & (DF_COMPAT_NORM_BATCH | DF_COMPAT_ERROR_BATCH | DF_COMPAT_ERROR_MOST))
        row->batch_coupled = 1;
}

/* Can the sampler touch the grid's ends? Infinite there: r and rho for a method in rho, f
   and g^2 for one in t. On VE the data point lies beyond t = 0, where sigma = sigma_min: a
   jump in sigma at no change of t, which a method in t would not see. */
static df_result dfi_sample_check_ends(df_ctx *ctx, const df_process *p,
                                       const df_sampler_row *row, const df_point *grid,
                                       int steps) {
    char names[192];
    const df_point *first = &grid[0], *last = &grid[steps];
    int into0 = last->sigma <= 0;
    if (row->clock == DF_CLOCK_STOPPED && first->sigma > 0) return DF_OK;
    if (first->sigma <= 0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: cannot start at the data point, "
                        "where sigma = 0; set end = DF_END_T_MIN, or t_max > 0");
    if (last->alpha <= 0 && row->wants != DF_STRAIGHT)   /* s is finite there */
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: %s inverse cannot reach t = %g, "
                        "where alpha = 0; set t_max = .999, or use rk45", row->name,
                        last->t);
    if (first->alpha <= 0 && !row->from_alpha0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: %s cannot start where alpha = 0 "
                        "(%s at t = %g); set t_max = .999, or use one of %s", row->name,
                        df_process_name(p), first->t,
                        dfi_sampler_names(0, names, sizeof names));
    if (into0 && !row->to_sigma0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: %s cannot end where sigma = 0; "
                        "set end = DF_END_T_MIN, or use one of %s", row->name,
                        dfi_sampler_names(1, names, sizeof names));
    if (into0 && steps < 2 && dfi_adapts(row))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: %s adapts its steps down to the "
                        "point before sigma = 0, and a list of two points has none, nor a "
                        "t_min of 0 or above t_max; give one more, or end = DF_END_T_MIN",
                        row->name);
    if (into0 && row->clock == DF_CLOCK_T && grid[steps - 1].t <= last->t)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: %s walks t, and on %s the data "
                        "point lies at no t of its own (sigma = %g at t = 0); set end = "
                        "DF_END_T_MIN", row->name, df_process_name(p),
                        grid[steps - 1].sigma);
    return DF_OK;
}

/* Pieces of one allocation, on cache lines: measured (base NULL), then handed out. */
typedef struct dfi_cut {
    char *base;
    size_t used;
} dfi_cut;
static void *dfi_cut_take(dfi_cut *cut, size_t bytes) {
    size_t at = cut->used, whole = (bytes + DFI_ALIGN - 1) / DFI_ALIGN * DFI_ALIGN;
    cut->used = bytes > SIZE_MAX / 2 ? SIZE_MAX : dfi_plus(at, whole);
    return cut->base ? cut->base + at : NULL;
}
static df_real *dfi_cut_array(dfi_cut *cut, const df_sampler *s, size_t rows) {
    size_t size = dfi_mul(rows, dfi_mul((size_t)s->stage.dim, sizeof(df_real)));
    return rows > 0 ? (df_real *)dfi_cut_take(cut, size) : NULL;
}

/* One allocation, so one failure to handle and one free. Arrays a run does not need
   (scaled input, preview) are not there. Returns the bytes. */
static size_t dfi_sampler_layout(df_sampler *s, char *base) {
    const df_sample_desc *d = &s->desc;
    size_t n = (size_t)s->stage.n, rows = (size_t)s->stage.rows;
    int learned = s->model.learned != DF_LEARNED_NONE;
    int wide = s->row.stage == dfi_stage_paradigms;
    int cuts = d->clip > 0 || d->threshold > 0;
    int keeps_eps = d->compat & DF_COMPAT_KEEP_EPS && cuts && s->row.wants == DF_X0 &&
                    s->row.stage == dfi_stage_ddim;
    dfi_cut cut = { base, 0 };
    dfi_cut_take(&cut, sizeof *s);
    s->grid = (df_point *)dfi_cut_take(
        &cut, dfi_mul((size_t)s->stage.points + 1, sizeof(df_point)));
    s->t = (double *)dfi_cut_take(&cut, dfi_mul(rows, 8 * sizeof(double)));
    s->t_model = (df_real *)dfi_cut_take(&cut, dfi_mul(rows, 2 * sizeof(df_real)));
    s->stage.each = (df_point *)dfi_cut_take(&cut, dfi_mul(rows, sizeof(df_point)));
    s->stage.own = (double *)dfi_cut_take(&cut, dfi_mul(n, DF_OWN * sizeof(double)));
    s->stage.answer = dfi_cut_array(&cut, s, rows);
    s->input = dfi_cut_array(&cut, s, s->model.input_sigma_data > 0 ? rows : 0);
    s->preview = dfi_cut_array(&cut, s, d->on_step || d->edit ? n : 0);
    s->raw = dfi_cut_array(&cut, s, learned ? 2 * rows : 0);
    s->stage.variance = dfi_cut_array(&cut, s, learned ? n : 0);
    s->stage.unclipped = dfi_cut_array(&cut, s, keeps_eps ? n : 0);
    s->spare = dfi_cut_array(&cut, s, d->corrections > 0 || d->churn > 0 ? n : 0);
    if (rows > n && d->labels)
        s->labels = (int *)dfi_cut_take(&cut, dfi_mul(rows, sizeof(int)));
    for (int i = 0; i < 2; i++)
        s->stage.wide[i] = dfi_cut_array(&cut, s, wide ? rows + n : 0);
    for (int i = 0; i < s->row.buffers; i++)
        s->stage.buffer[i] = dfi_cut_array(&cut, s, n);
    return cut.used;
}

DF_API void df_sampler_free(df_sampler *s) {
    if (s) dfi_delete(s->stage.ctx, s, s->bytes);
}

enum { DFI_MOST_STEPS = 1000000 };

/* Adaptive methods take as many steps as they need down to t_min, and one into the data
   (Song et al. 2021): of the grid they want its ends alone. Returns its points. */
static int dfi_adaptive_grid(const df_process *p, const df_sample_desc *d, df_point *grid,
                             int count) {
    df_point least = df_process_at(p, d->t_min < 0 ? df_process_t_min(p) : d->t_min);
    int inner = grid[count - 1].sigma <= 0 && least.sigma > 0 &&
                least.lambda > grid[0].lambda;
    grid[1 + inner] = grid[count - 1];
    if (inner) grid[1] = least;
    return 2 + inner;
}

/* Everything but the arrays, in a sampler on the stack. */
static df_result dfi_sampler_fill(df_sampler *s, df_ctx *ctx, const df_model *model,
                                  const df_sample_desc *d, df_real *x, int n) {
    const df_sampler_row *row = d->row;
    df_stage *st = &s->stage;
    df_result r = dfi_sample_check_model(ctx, model, x, n);
    int steps = dfi_steps_asked(d), more, window;
    if (d->cookie != DFI_COOKIE)
        r = dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: the descriptor was not made by "
                     "df_sample_defaults");
    if (r == DF_OK && row == NULL && (row = df_sampler_find(ctx, d->method)) == NULL)
        r = DF_ERR_ARGUMENT;
    if (r != DF_OK) return r;
    memset(s, 0, sizeof *s);
    s->model = *model;
    s->desc = *d;
    s->row = *row;
    row = &s->row;
    if ((int)s->row.asks == 0) s->row.asks = DF_ASK_PREDICT;
    r = dfi_sample_check_row(ctx, row);
    if (r == DF_OK) r = dfi_sample_check_settings(ctx, d);
    if (r == DF_OK) r = dfi_sample_check_method(ctx, d, row);
    if (r == DF_OK) r = dfi_sample_check_bounds(ctx, model, d, row);
    if (r != DF_OK) return r;
    if (steps < 1 || steps > DFI_MOST_STEPS)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: %s is %d, wants %d .. %d",
                        d->points ? "points_count" : "steps",
                        d->points ? d->points_count : d->steps, d->points ? 2 : 1,
                        DFI_MOST_STEPS + (d->points ? 1 : 0));
    dfi_sample_resolve(&s->desc, &s->row);
    s->steady = d->row == NULL && row->asks == DF_ASK_PREDICT && !row->whole &&
                row->clock != DF_CLOCK_STOPPED && row->stage != dfi_stage_v3 &&
                row->stage != dfi_stage_annealed;
    if (s->desc.restarts > (DFI_MOST_STEPS - steps) / (s->desc.restart_steps + 1))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: %d restarts of %d steps are "
                        "more than %d steps in all", s->desc.restarts,
                        s->desc.restart_steps, DFI_MOST_STEPS);
    more = 1 + s->desc.restarts * (s->desc.restart_steps + 1);
    window = s->desc.window < steps + more ? s->desc.window : steps + more;
    s->size = dfi_mul((size_t)n, (size_t)model->dim);
    st->ctx = ctx;
    st->n = st->rows = n;
    if (row->stage == dfi_stage_paradigms)
        st->rows = n > INT_MAX / window ? INT_MAX / n * n : n * window;
    st->dim = model->dim;
    st->points = steps + more + dfi_adapts(row);         /* room; the grid says */
    st->x = x;
    return DF_OK;
}

/* Nothing of the caller's is kept by pointer where it may go: strings, lists, its row. */
static void dfi_sampler_own(df_sampler *s) {
    if (s->desc.row) {
        snprintf(s->name, sizeof s->name, "%s", s->row.name);
        s->row.name = s->name;
        s->row.aliases = s->row.source = "";
    }
    s->desc.method = s->row.name;
    s->desc.row = NULL;
    s->desc.grid = NULL;
    s->desc.points = NULL;
    s->stage.desc = &s->desc;
    s->stage.process = &s->model.process;
    s->stage.row = &s->row;
    s->stage.grid = s->grid;
}

/* The grid, in the sampler's own memory, and whether the method can touch its ends. A
   stopped clock has one point; who takes the whole grid takes it as one step. */
static df_result dfi_sampler_grid(df_sampler *s, df_sample_desc *d) {
    df_stage *st = &s->stage;
    const df_process *p = &s->model.process;
    int count = st->points + 1, steps = dfi_steps_asked(d);
    df_result r = DF_OK;
    d->restarts = s->desc.restarts;
    if (s->row.clock == DF_CLOCK_STOPPED) {
        if (dfi_nonfinite(d->t_max) || d->t_max < 0 || d->t_max > 1)
            return dfi_fail(st->ctx, DF_ERR_ARGUMENT, "df_sample: t_max is %g, wants the "
                            "t in [0, 1] at which %s runs", d->t_max, s->row.name);
        count = d->steps + 1;
        for (int i = 0; i < count; i++) s->grid[i] = df_process_at(p, d->t_max);
    } else {
        r = df_grid(st->ctx, p, d, s->grid, count, &count);
    }
    if (r == DF_OK && dfi_adapts(&s->row) && d->points == NULL)
        count = dfi_adaptive_grid(p, d, s->grid, count);
    if (r == DF_OK) r = dfi_sample_check_ends(st->ctx, p, &s->row, s->grid, count - 1);
    if (r == DF_OK && s->desc.variance == DF_VARIANCE_ANALYTIC && count - 1 > steps)
        r = dfi_fail(st->ctx, DF_ERR_ARGUMENT, "df_sample: variance ANALYTIC has eps2 of "
                     "the grid's own %d steps, but %d are to be done: no restarts, and a "
                     "grid of N steps", steps, count - 1);
    st->points = count - 1;
    st->steps = s->row.whole ? 1 : st->points;
    st->at = s->grid[0];
    return r;
}

/* Checks come first and allocate nothing. */
DF_API df_sampler *df_sampler_create(df_ctx *ctx, const df_model *model,
                                     const df_sample_desc *desc, df_real *x, int n) {
    df_sampler plan, *s;
    df_sample_desc d = desc ? *desc : df_sample_defaults();
    if (ctx == NULL || dfi_sampler_fill(&plan, ctx, model, &d, x, n) != DF_OK) return NULL;
    plan.bytes = dfi_sampler_layout(&plan, NULL);
    s = (df_sampler *)dfi_new(ctx, plan.bytes);
    if (s == NULL) return NULL;
    *s = plan;
    dfi_sampler_layout(s, (char *)(void *)s);
    if (dfi_sampler_grid(s, &d) == DF_OK) {
        dfi_sampler_own(s);
        return s;
    }
    df_sampler_free(s);
    return NULL;
}

/* ---- the loop ---- */

/* data = mean + scale x and back, each of 1 or dim elements (NULL: 0 and 1). */
static void dfi_rescale(const df_model *m, size_t size, df_real *x, int to_data) {
    if (m->mean == NULL && m->scale == NULL) return;
    for (size_t i = 0; i < size; i++) {
        size_t j = m->scaling_size == 1 ? 0 : i % (size_t)m->dim;
        double mean = m->mean ? m->mean[j] : 0, scale = m->scale ? m->scale[j] : 1;
        double v = (double)x[i];
        x[i] = (df_real)(to_data ? mean + scale * v : (v - mean) / scale);
    }
}

/* x at the grid's first point: sigma z (the process's own prior: its mean, alpha E[x_0],
   is left out), the caller's own x, or alpha data + sigma z. The start is draw 0, so the
   same seed starts the same sample whatever the method. */
static df_result dfi_sampler_start(df_sampler *s) {
    df_stage *st = &s->stage;
    df_point at = s->grid[0];
    const df_real *noise = s->desc.start == DF_START_DATA ? st->answer : st->x;
    if (s->desc.start == DF_START_DATA || s->desc.inverse)
        dfi_rescale(&s->model, s->size, st->x, 0);
    if (s->desc.start != DF_START_GIVEN &&
        dfi_sampler_noise(s, -1, at, at, (df_real *)noise) != DF_OK)
        return s->result;
    if (s->desc.start == DF_START_NOISE) df_stage_combine(st, st->x, 1, &at.sigma, &noise);
    if (s->desc.start == DF_START_DATA)
        dfi_two(st, st->x, at.sigma, noise, at.alpha, st->x);
    return dfi_sampler_finite(s, "the start x holds");
}

/* x at `from` goes up to `to`, where sigma/alpha is larger, by the exact forward kernel:
     x = (alpha_t/alpha_s) x + sqrt(sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2) z
   Churn, the last part of ancestral steps and restarts all are this; `stretch` is where
   the noise's part of the path begins, `to` itself for a draw that has none. */
static df_result dfi_sampler_renoise(df_sampler *s, df_point from, df_point to,
                                     const df_point *stretch, df_real *noise) {
    df_stage *st = &s->stage;
    double c = to.alpha / from.alpha;
    double z = sqrt(fmax(to.sigma * to.sigma - c * c * from.sigma * from.sigma, 0));
    if (dfi_sampler_noise(s, st->step, *stretch, to, noise) != DF_OK) return s->result;
    dfi_two(st, st->x, c, st->x, z * s->desc.noise_scale, noise);
    return DF_OK;
}

/* Inside a block x is a stage of a longer step: nothing may be added to it. */
static int dfi_sampler_inside(const df_sampler *s) {
    int size;
    return s->row.stage == dfi_stage_block && dfi_block_place(&s->stage, &size) > 0;
}

/* Churn (Karras et al. 2022, alg. 2): up from rho to rho_hat = (1 + gamma) rho, at most
   the process's end; the step then starts there. */
static df_result dfi_sampler_churn(df_sampler *s) {
    df_stage *st = &s->stage;
    double gamma = fmin(s->desc.churn / st->steps, sqrt(2.0) - 1), rho;
    df_point hat, from = st->from;
    s->late = 0;
    if (gamma <= 0 || from.alpha <= 0 || dfi_sampler_inside(s)) return DF_OK;
    rho = from.sigma / from.alpha;
    if (!(rho >= s->desc.churn_min && rho <= s->desc.churn_max)) return DF_OK;
    hat = df_process_at_rho(st->process, rho * (1 + gamma));
    if (hat.sigma / hat.alpha <= rho) return DF_OK;
    st->known = 0;                              /* its answers were another path's */
    s->late = (s->desc.compat & DF_COMPAT_CHURN_LATE) != 0;
    if (s->late) return DF_OK;
    st->from = hat;
    return dfi_sampler_renoise(s, from, hat, &hat, s->spare);
}

/* The first question of a step is always about x at `from`. */
static df_result dfi_sampler_open(df_sampler *s) {
    df_stage *st = &s->stage;
    if (s->row.asks == DF_ASK_MAP) s->aim = dfi_map_target(st);
    dfi_stage_ask_at(st, s->row.asks, &st->from, st->x);
    return s->result;
}

/* Where this step is to end: the next point; T/N entries down as diffusers' DDIM counts;
   or further down, if the method is ancestral and adds noise afterwards. */
static df_point dfi_sampler_aim(const df_sampler *s) {
    const df_stage *st = &s->stage;
    df_point to = s->grid[s->row.whole ? st->points : st->step + 1];
    int T = st->process->table_size;
    double extra, index = T * st->from.t - 1 - T / st->points;
    if (s->desc.compat & DF_COMPAT_STEP_BACK && T > 0) to = st->grid[st->points];
    if (s->desc.compat & DF_COMPAT_STEP_BACK && T > 0 && index >= 0)
        to = df_process_at(st->process, (index + 1) / T);
    if (!s->row.ancestral || s->row.whole) return to;
    extra = dfi_extra(st, &st->from, &to);
    return extra > 0 ? df_process_at_lambda(st->process, to.lambda + extra) : to;
}

static df_result dfi_sampler_tell(df_sampler *s);

/* Step number stage.step: jumps up (restarts) first, then its ends, churn, and the first
   question, or the first of the corrections before it. A stage sees the point after churn
   as its `from` and need not know of churn. */
static df_result dfi_sampler_begin(df_sampler *s) {
    df_stage *st = &s->stage;
    const df_point *q = &s->grid[st->step];
    while (s->desc.restarts > 0 && q[1].sigma * q->alpha > q->sigma * q[1].alpha) {
        if (dfi_sampler_renoise(s, q[0], q[1], &q[1], st->answer) != DF_OK)
            return s->result;
        st->known = 0;
        st->step++;
        st->at = *++q;
        if (dfi_sampler_tell(s) != DF_OK) return s->result;
    }
    st->from = *q;
    st->call = 0;
    if (dfi_sampler_churn(s) != DF_OK) return s->result;
    st->to = dfi_sampler_aim(s);
    if (s->row.stage != dfi_stage_annealed && !dfi_sampler_inside(s))
        s->correction = s->desc.corrections;
    return dfi_sampler_open(s);
}

/* The question about stage.asked, its rows at stage.each, in the model's own time and
   input scale. Row r is sample r mod n. */
static df_result dfi_sampler_question(df_sampler *s) {
    df_stage *st = &s->stage;
    df_query *q = &s->query;
    size_t rows = (size_t)s->rows;
    double *t = s->t, *to = t + 4 * rows;
    df_result r;
    int same;
    memset(q, 0, sizeof *q);
    r = dfi_row_times(st->ctx, &s->model, rows, st->each, 1, t, s->t_model, &q->same_time);
    if (r != DF_OK) return dfi_sampler_fail(s, r, st->ctx->message);
    if (s->input)
        dfi_scale_rows(st->ctx, s->rows, st->dim, t + 3 * rows, st->asked, s->input);
    q->ask = s->ask;
    q->n = s->rows;
    q->samples = st->n;
    q->dim = st->dim;
    q->x = s->input ? s->input : st->asked;
    q->t = t;
    q->alpha = t + rows;
    q->sigma = t + 2 * rows;
    q->t_model = s->t_model;
    if (s->ask == DF_ASK_MAP) {
        dfi_row_times(NULL, &s->model, rows, &s->aim, 0, to, s->t_model + rows, &same);
        q->t_to = to;
        q->alpha_to = to + rows;
        q->sigma_to = to + 2 * rows;
        q->t_model_to = s->t_model + rows;
    }
    q->first_sample = s->desc.first_sample;
    q->step = st->step;
    for (int i = 0; s->labels && i < s->rows; i++)
        s->labels[i] = s->desc.labels[i % st->n];
    q->labels = s->labels ? s->labels : s->desc.labels;
    q->condition = s->desc.condition;
    q->condition_stride = s->desc.condition_stride;
    return DF_OK;
}

/* Dynamic thresholding (Saharia et al. 2022, app. C): x_0 of one sample is cut at the
   quantile s of its own |x_0|, at least threshold_min, and divided by it. */
static df_result dfi_sampler_threshold(df_sampler *s, df_real *x) {
    size_t dim = (size_t)s->stage.dim, low;
    df_scope mark = dfi_scratch_mark(s->stage.ctx);
    double *sorted = (double *)dfi_scratch(s->stage.ctx, dfi_mul(dim, 2 * sizeof(double)));
    double place = s->desc.threshold * (double)(dim - 1), cut;
    if (sorted == NULL) return dfi_sampler_fail(s, DF_ERR_MEMORY, s->stage.ctx->message);
    for (size_t i = 0; i < dim; i++) sorted[i] = fabs((double)x[i]);
    dfi_merge_sort(dim, sorted, sorted + dim);
    low = (size_t)place;
    cut = sorted[low];
    if (low + 1 < dim) cut += (place - (double)low) * (sorted[low + 1] - cut);
    dfi_scratch_release(s->stage.ctx, mark);
    cut = fmin(fmax(cut, s->desc.threshold_min), s->desc.threshold_max);
    for (size_t i = 0; i < dim && cut > 0; i++)
        x[i] = (df_real)(fmin(fmax((double)x[i], -cut), cut) / cut);
    return DF_OK;
}

/* One pass of a conversion cx x + cp in over rows from `row` on, into out, left pending if
   it waits; the first NaN or Inf of `check` among them. Where x does
   not enter it is not read, and where nothing changes nothing is written. x_0 from eps
   near pure noise has an error of sigma/alpha roundings, but alpha_t x_0 is what enters x:
   they matter in steps that make alpha much larger. */
static size_t dfi_sampler_map(df_sampler *s, int row, int rows, double cx, double cp,
                              const df_real *in, const df_real *check, double clip,
                              df_real *out) {
    size_t at = dfi_row_at(&s->stage, row), size = dfi_row_at(&s->stage, rows);
    int count = cx == 0 ? (cp == 1 && clip <= 0 && in == out ? 0 : 1) : 2;
    const df_real *const a[2] = { in + at, s->stage.asked + at };
    const double c[2] = { cp, cx };
    dfi_sweep *w = &s->pending;
    dfi_sweep_set(w, size, out + at, count, c, a);
    w->check = check ? check + at : NULL;
    w->clip = clip;
    w->brief = s->stage.to.alpha < 2 * s->stage.from.alpha;
    return s->waits ? size : dfi_sweep_run(s->stage.ctx, w);
}

/* May the conversion wait for the stage's first combination? Where the stage touches
   arrays through df_stage_combine alone, and nobody else looks. */
static int dfi_sampler_waits(const df_sampler *s, int rows) {
    return s->steady && rows == s->stage.n && rows == s->rows && s->correction == 0 &&
           !s->preview && !s->stage.unclipped && !s->raw;
}

/* Rows at one point: the model's answer becomes `wants` in stage.answer (`out` may be that
   very array); cutting goes through x_0, and what is wanted is derived from that again. */
static df_result dfi_sampler_convert(df_sampler *s, int row, int rows, const df_real *out,
                                     df_prediction wants) {
    df_stage *st = &s->stage;
    const df_point *at = &st->each[row];
    int cuts = s->desc.clip > 0 || s->desc.threshold > 0;
    size_t bad, first = dfi_row_at(st, row), size = dfi_row_at(st, rows);
    df_prediction to = cuts ? DF_X0 : wants;
    double cx, cp, px, pp;
    df_result r = dfi_model_map(st->ctx, &s->model, to, at, &cx, &cp);
    if (r != DF_OK) return dfi_sampler_fail(s, r, st->ctx->message);
    if (s->preview && to != DF_X0 && row + rows <= st->n &&
        dfi_model_map(NULL, &s->model, DF_X0, at, &px, &pp) == DF_OK)
        dfi_sampler_map(s, row, rows, px, pp, out, NULL, 0, s->preview);
    if (st->unclipped) dfi_sampler_map(s, row, rows, cx, cp, out, NULL, 0, st->unclipped);
    s->waits = !cuts && dfi_sampler_waits(s, rows);
    bad = dfi_sampler_map(s, row, rows, cx, cp, out, out, s->desc.clip, st->answer);
    if (bad < size) return dfi_sampler_answered(s, out, first + bad, (size_t)st->dim);
    for (int i = row; s->desc.threshold > 0 && i < row + rows; i++)
        if (dfi_sampler_threshold(s, st->answer + dfi_row_at(st, i)) != DF_OK)
            return s->result;
    if (s->preview && to == DF_X0 && row + rows <= st->n)
        memcpy(s->preview + first, st->answer + first, size * sizeof(df_real));
    if (to == wants) return DF_OK;
    r = df_plane_map(st->ctx, &s->model.process, DF_X0, wants, at, &cx, &cp);
    if (r != DF_OK) return dfi_sampler_fail(s, r, st->ctx->message);
    dfi_sampler_map(s, row, rows, cx, cp, st->answer, NULL, 0, st->answer);
    return DF_OK;
}

/* A prediction with a variance behind it, row by row: the two apart. */
static const df_real *dfi_sampler_split(df_sampler *s, const df_real *out) {
    size_t dim = (size_t)s->stage.dim;
    for (size_t r = 0; r < (size_t)s->rows; r++) {
        if (r < (size_t)s->stage.n)
            memcpy(s->stage.variance + r * dim, out + (2 * r + 1) * dim,
                   dim * sizeof *out);
        memcpy(s->stage.answer + r * dim, out + 2 * r * dim, dim * sizeof *out);
    }
    return s->stage.answer;
}

/* An answer arrives: predictions are converted, maps and densities taken as they are. */
static df_result dfi_sampler_take(df_sampler *s, const df_real *out) {
    df_stage *st = &s->stage;
    size_t size = (size_t)s->rows * (s->ask == DF_ASK_LOG_DENSITY ? 1 : (size_t)st->dim),
           bad;
    df_point hat;
    if (s->ask != DF_ASK_PREDICT) {
        bad = dfi_nonfinite_at(st->ctx, size, out);
        if (bad < size) return dfi_sampler_answered(s, out, bad, size / (size_t)s->rows);
        if (out != st->answer) memcpy(st->answer, out, size * sizeof *out);
        if (s->preview && s->ask == DF_ASK_MAP)
            memcpy(s->preview, out, size * sizeof *out);
        return DF_OK;
    }
    if (s->raw) {
        bad = dfi_nonfinite_at(st->ctx, 2 * size, out);
        if (bad < 2 * size) return dfi_sampler_answered(s, out, bad, 2 * (size_t)st->dim);
        out = dfi_sampler_split(s, out);
    }
    if (s->late && st->call == 0 && s->correction == 0) {
        hat = df_process_at_rho(st->process, st->from.sigma / st->from.alpha *
                                (1 + fmin(s->desc.churn / st->steps, sqrt(2.0) - 1)));
        if (dfi_sampler_renoise(s, st->from, hat, &hat, s->spare) != DF_OK)
            return s->result;
        st->at = st->from = hat;
        st->to = dfi_sampler_aim(s);
        for (int r = 0; r < st->n; r++) st->each[r] = hat;
    }
    for (int row = 0, rows; row < s->rows; row += rows) {
        for (rows = 1; row + rows < s->rows; rows++)
            if (memcmp(&st->each[row + rows], &st->each[row], sizeof(df_point)) != 0)
                break;
        if (dfi_sampler_convert(s, row, rows, out,
                                s->correction > 0 ? DF_SCORE : s->row.wants) != DF_OK)
            return s->result;
    }
    return DF_OK;
}

/* x stands at stage.at after stage.step steps (0: the start, no x_0 yet): edit, record,
   on_step. A callback's own code ends the run and comes back as it is. */
static df_result dfi_sampler_tell(df_sampler *s) {
    df_stage *st = &s->stage;
    df_step_info info = { st->step, st->steps, st->at, st->n, st->dim, st->x,
                          st->step > 0 ? s->preview : NULL, s->evaluations };
    df_result before = st->ctx->code;
    st->ctx->code = DF_OK;
    if (s->desc.edit) {
        s->result = s->desc.edit(s->desc.user, &info, st->x);
        dfi_returned(st->ctx, before, s->result, "df_sample: edit", st->step, st->steps);
    }
    if (s->desc.trajectory && s->result == DF_OK)
        memcpy(s->desc.trajectory + (size_t)st->step * s->size, st->x,
               s->size * sizeof(df_real));
    if (s->desc.on_step && s->result == DF_OK) {
        s->result = s->desc.on_step(s->desc.user, &info);
        dfi_returned(st->ctx, before, s->result, "df_sample: on_step", st->step,
                     st->steps);
    }
    if (st->ctx->code == DF_OK) st->ctx->code = before;
    if (s->result != DF_OK) s->phase = DFI_PHASE_DONE;
    return s->result;
}

/* x stands at stage.to, from where ancestral methods go up again: remember the step's
   start, tell, then the next step, or the end, where samples take the data's units. A NaN
   or Inf of the sampler's own making is found here at the latest. */
static df_result dfi_sampler_stepped(df_sampler *s) {
    df_stage *st = &s->stage;
    const df_point *next = &s->grid[s->row.whole ? st->points : st->step + 1];
    if (s->row.ancestral && !s->row.whole && st->to.lambda > next->lambda &&
        dfi_sampler_renoise(s, st->to, *next, &st->from, st->answer) != DF_OK)
        return s->result;
    st->at = st->to = *next;
    for (int i = DF_PAST - 1; i > 0; i--) st->past[i] = st->past[i - 1];
    st->past[0] = st->from;
    if (st->known < DF_PAST) st->known++;
    if (st->step + 1 == st->steps && dfi_sampler_finite(s, "x became") != DF_OK)
        return s->result;
    st->step++;
    if (dfi_sampler_tell(s) != DF_OK) return s->result;
    if (st->step < st->steps) return dfi_sampler_begin(s);
    s->phase = DFI_PHASE_DONE;
    if (!s->desc.inverse) dfi_rescale(&s->model, s->size, st->x, 1);
    return dfi_sampler_finite(s, "x in the data's units became");
}

/* Has a callback of this very sampler called `who`? It would recurse without end. */
static int dfi_sampler_busy(df_sampler *s, const char *who) {
    if (s->busy)
        dfi_fail(s->stage.ctx, DF_ERR_ARGUMENT, "%s: called from within a callback of the "
                 "same sampler; return from it first", who);
    return s->busy;
}

/* The start is made here and not in df_sampler_create, so that a failing noise hook can be
   told from a wrong argument. Cancelling is seen between questions. */
static int dfi_sampler_next(df_sampler *s, df_query *q) {
    if (dfi_cancelled(s->stage.ctx)) {
        dfi_sampler_fail(s, DF_CANCELLED, "cancelled");
        return 0;
    }
    if (s->phase == DFI_PHASE_NEW &&
        (dfi_sampler_start(s) != DF_OK || dfi_sampler_tell(s) != DF_OK ||
         dfi_sampler_begin(s) != DF_OK))
        return 0;
    if (s->phase == DFI_PHASE_READY) {
        if (dfi_sampler_question(s) != DF_OK) return 0;
        s->phase = DFI_PHASE_ASKED;
    }
    *q = s->query;
    return 1;
}

DF_API int df_sampler_next(df_sampler *s, df_query *q) {
    int open;
    if (s == NULL || q == NULL || dfi_sampler_busy(s, "df_sampler_next") ||
        s->phase == DFI_PHASE_DONE)
        return 0;
    s->busy = 1;
    open = dfi_sampler_next(s, q);
    s->busy = 0;
    return open;
}

/* The stage is called and what it says decides. A helper that failed within it has left
   its code in `result`, which goes before all. */
static df_result dfi_sampler_stage(df_sampler *s) {
    df_stage *st = &s->stage;
    df_ctx *ctx = st->ctx;
    df_result before = ctx->code;
    df_next next;
    ctx->code = DF_OK; /* an earlier error is not the stage's */
    st->call++;
    next = s->row.stage(st);
    if (s->waits && s->result == DF_OK) dfi_sampler_settle(s, NULL);
    if (s->result != DF_OK) return s->result;
    if (next == DF_NEXT_STEP || next == DF_NEXT_ASK) {
        if (ctx->code == DF_OK) ctx->code = before;
        if (st->answer == NULL || st->asked == NULL)
            return dfi_stage_wrong(st, "`answer` or `asked` is NULL" DFI_STAGE_HINT);
        if (next == DF_NEXT_STEP) return dfi_sampler_stepped(s);
        if (s->phase == DFI_PHASE_READY) return DF_OK;
        return dfi_sampler_fail(s, DF_ERR_UNSUPPORTED,
                                "the stage asks without df_stage_ask");
    }
    if (ctx->code != DF_OK) return dfi_sampler_fail(s, ctx->code, ctx->message);
    return dfi_sampler_fail(s, DF_ERR_UNSUPPORTED, "the stage failed and did not say why");
}

/* The answer was a correction's: a Langevin step at `from`, the next question there. */
static df_result dfi_sampler_correct(df_sampler *s) {
    df_stage *st = &s->stage;
    if (dfi_noise_apart(st, s->spare) != DF_OK) return s->result;
    dfi_langevin_move(st, st->x, s->spare);
    s->correction--;
    return dfi_sampler_open(s);
}

/* One answer: converted, counted, handed to the stage. No answer ends the run, or a loop
   over df_sampler_next would see the same question for ever. */
DF_API df_result df_sampler_answer(df_sampler *s, const df_real *out) {
    if (s == NULL || dfi_sampler_busy(s, "df_sampler_answer")) return DF_ERR_ARGUMENT;
    if (s->phase == DFI_PHASE_DONE && s->result != DF_OK) return s->result;
    if (s->phase != DFI_PHASE_ASKED)
        return dfi_fail(s->stage.ctx, DF_ERR_ARGUMENT, "df_sampler_answer: no question is "
                        "open; call df_sampler_next first");
    if (out == NULL)
        return dfi_sampler_fail(s, DF_ERR_ARGUMENT, "df_sampler_answer: out is NULL");
    s->busy = 1;
    if (dfi_sampler_take(s, out) == DF_OK) {
        s->evaluations++;
        if (s->correction > 0) dfi_sampler_correct(s);
        else dfi_sampler_stage(s);
    }
    s->busy = 0;
    return s->result;
}

DF_API df_result df_sampler_result(const df_sampler *s) {
    return s ? s->result : DF_ERR_ARGUMENT;
}

DF_API void df_sampler_progress(const df_sampler *s, int *step, int *steps,
                                int *evaluations) {
    if (step) *step = s ? s->stage.step : 0;
    if (steps) *steps = s ? s->stage.steps : 0;
    if (evaluations) *evaluations = s ? s->evaluations : 0;
}

/* The model writes into stage.answer itself and is converted there: no array between. */
DF_API df_result df_sample(df_ctx *ctx, const df_model *model, const df_sample_desc *desc,
                           df_real *x, int n) {
    df_sampler *s = df_sampler_create(ctx, model, desc, x, n);
    df_result r, before;
    df_real *out;
    df_query q;
    if (s == NULL) return ctx ? ctx->code : DF_ERR_ARGUMENT;
    if (s->model.predict == NULL) {
        df_sampler_free(s);
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample: the model has no predict "
                        "function; give it one, or answer the questions of "
                        "df_sampler_next");
    }
    while (df_sampler_next(s, &q)) {
        before = ctx->code;
        ctx->code = DF_OK;
        out = s->raw ? s->raw : s->stage.answer;
        r = dfi_ask(ctx, &s->model, &q, out);
        r = dfi_returned(ctx, before, r, "df_sample: predict", q.step + 1, s->stage.steps);
        if (r != DF_OK) s->result = r;
        if (r != DF_OK || df_sampler_answer(s, out) != DF_OK) break;
    }
    r = df_sampler_result(s);
    df_sampler_free(s);
    return r;
}

/* ---- what some methods want to be measured first ---- */

/* A question about x [n, dim] with what a descriptor says of its samples. */
static df_query dfi_query_of(const df_sample_desc *d, int n, const df_real *x) {
    df_query q;
    memset(&q, 0, sizeof q);
    q.ask = DF_ASK_PREDICT;
    q.n = n;
    q.x = x;
    q.first_sample = d->first_sample;
    q.labels = d->labels;
    q.condition = d->condition;
    q.condition_stride = d->condition_stride;
    return q;
}

/* A model's answers as another row of the plane: out [n, dim] = `to` for row i at each[i]
   (step 1) or all at each[0] (step 0); of JVP the derivative of that along q.v. What
   stands behind a prediction goes to `behind` [n, dim], unless NULL. */
static df_result dfi_ask_as(df_ctx *ctx, const df_model *m, df_query q, df_prediction to,
                            const df_point *each, int step, df_real *behind,
                            df_real *out) {
    size_t dim = (size_t)m->dim, n = (size_t)q.n, width = dfi_answer_width(m, q.ask);
    df_scope mark = dfi_scratch_mark(ctx);
    double *t = (double *)dfi_scratch(ctx, dfi_mul(n, sizeof *t)), c[2];
    df_real *raw = (df_real *)dfi_scratch(ctx, dfi_mul(dfi_mul(n, width), sizeof *raw));
    const df_real *x = q.ask == DF_ASK_JVP ? q.v : q.x;
    df_result r = t && raw ? DF_OK : DF_ERR_MEMORY;
    for (size_t i = 0; r == DF_OK && i < n; i++) t[i] = each[step ? i : 0].t;
    q.t = t;
    if (r == DF_OK) r = dfi_ask_checked(ctx, m, &q, raw);
    for (size_t i = 0; r == DF_OK && width > dim && i < n; i++) {
        if (behind) memcpy(behind + i * dim, raw + i * width + dim, dim * sizeof *raw);
        memmove(raw + i * dim, raw + i * width, dim * sizeof *raw);
    }
    for (int row = 0, rows; r == DF_OK && row < q.n; row += rows) {
        const df_real *const a[2] = { x + (size_t)row * dim, raw + (size_t)row * dim };
        rows = dfi_same_times(t, row, q.n);
        r = dfi_model_map(ctx, m, to, &each[step ? row : 0], &c[0], &c[1]);
        if (r == DF_OK)
            ctx->k->combine((size_t)rows * dim, 2, c, a, out + (size_t)row * dim);
    }
    dfi_scratch_release(ctx, mark);
    return r;
}

/* (d to/dx) q.v: by JVP where the model answers it, else by central differences. */
static df_result dfi_ask_jvp(df_ctx *ctx, const df_model *m, df_query q, df_prediction to,
                             const df_point *each, int step, df_real *out) {
    size_t dim = (size_t)m->dim, size = dfi_mul((size_t)q.n, dim);
    const df_real *x = q.x, *v = q.v;
    df_scope mark = dfi_scratch_mark(ctx);
    df_real *near, *back;
    df_result r = DF_OK;
    q.ask = m->answers & DF_ASK_JVP ? DF_ASK_JVP : DF_ASK_PREDICT;
    if (q.ask == DF_ASK_JVP) return dfi_ask_as(ctx, m, q, to, each, step, NULL, out);
    near = (df_real *)dfi_scratch(ctx, dfi_mul(size, 2 * sizeof *near));
    if (near == NULL) return DF_ERR_MEMORY;
    back = near + size;
    q.x = near;
    q.v = NULL;
    for (int side = 0; side < 3 && r == DF_OK; side++) {
        for (size_t i = 0; i < size; i++) {
            const df_point *at = &each[step ? i / dim : 0];
            double e = cbrt((double)DFI_REAL_EPSILON) * hypot(at->alpha, at->sigma);
            double moved = (double)x[i] + (side ? -e : e) * (double)v[i];
            if (side < 2) near[i] = (df_real)moved;
            else out[i] = (df_real)(((double)out[i] - (double)back[i]) / (2 * e));
        }
        if (side < 2) r = dfi_ask_as(ctx, m, q, to, each, step, NULL, side ? back : out);
    }
    dfi_scratch_release(ctx, mark);
    return r;
}

static df_result dfi_measure_check(df_ctx *ctx, const char *who, const df_model *m,
                                   const df_sample_desc *d, int n) {
    int steps = d ? dfi_steps_asked(d) : 0;
    if (ctx && m && m->cookie == DFI_COOKIE && m->predict && m->dim > 0 && n > 0 && d &&
        d->cookie == DFI_COOKIE && steps > 0 && steps <= DFI_MOST_STEPS)
        return DF_OK;
    return dfi_fail(ctx, DF_ERR_ARGUMENT, "%s: n = %d, %d steps: wants a context, a model "
                    "of df_model_defaults with predict and dim, n > 0, and a descriptor "
                    "of df_sample_defaults", who, n, steps);
}

/* The grid that a descriptor asks for, in scratch, noise first, for what only measures
   along it: no restarts, not inverse. NULL on failure. */
static df_point *dfi_grid_plain(df_ctx *ctx, const df_model *m, const df_sample_desc *d,
                                int *count) {
    df_sample_desc plain = *d;
    int most = dfi_steps_asked(d) + 2;
    df_point *grid = (df_point *)dfi_scratch(ctx, dfi_mul((size_t)most, sizeof *grid));
    plain.inverse = plain.restarts = 0;
    if (grid == NULL || df_grid(ctx, &m->process, &plain, grid, most, count) != DF_OK)
        return NULL;
    return grid;
}

/* Data x [n, dim], in its own units, noised to a point by draw number `draw`: y [n, dim],
   with the noise behind it. */
static void dfi_noise_to(df_ctx *ctx, const df_model *m, const df_sample_desc *d,
                         const df_point *at, uint32_t draw, int n, const df_real *x,
                         df_real *y) {
    size_t dim = (size_t)m->dim, size = (size_t)n * dim;
    const double c[2] = { at->sigma, at->alpha };
    const df_real *const a[2] = { y + size, y };
    memcpy(y, x, size * sizeof *y);
    dfi_rescale(m, size, y, 0);
    for (size_t i = 0; i < (size_t)n; i++)
        df_random_normal(d->seed, d->first_sample + i, draw, dim, y + size + i * dim);
    ctx->k->combine(size, 2, c, a, y);
}

/* Bao et al. 2022, their Gamma_n: at each point x_t = alpha x_0 + sigma z of the data, the
   mean of |eps|^2/dim, which is 1 for a model that knows nothing. */
DF_API df_result df_sample_eps2(df_ctx *ctx, const df_model *model,
                                const df_sample_desc *desc, const df_real *x, int n,
                                double *out) {
    df_result r = dfi_measure_check(ctx, "df_sample_eps2", model, desc, n);
    int steps = r == DF_OK ? dfi_steps_asked(desc) : 0, count;
    df_scope mark;
    df_point *grid = NULL;
    df_real *y;
    size_t size;
    if (r == DF_OK && (!x || !out))
        r = dfi_fail(ctx, DF_ERR_ARGUMENT, "df_sample_eps2: x or out is NULL");
    if (r != DF_OK) return r;
    size = dfi_mul((size_t)n, (size_t)model->dim);
    mark = dfi_scratch_mark(ctx);
    y = (df_real *)dfi_scratch(ctx, dfi_mul(size, 2 * sizeof *y));
    if (y != NULL) grid = dfi_grid_plain(ctx, model, desc, &count);
    if (grid == NULL) r = ctx->code;
    for (int k = 0; r == DF_OK && k + 1 < count && k < steps; k++) {
        dfi_noise_to(ctx, model, desc, &grid[k], (uint32_t)k + 1, n, x, y);
        out[k] = 1;                             /* at pure noise eps is x: |eps|^2 = dim */
        if (grid[k].alpha <= 0) continue;
        r = dfi_ask_as(ctx, model, dfi_query_of(desc, n, y), DF_EPS, &grid[k], 0, NULL, y);
        if (r == DF_OK) out[k] = ctx->k->dot(size, y, y) / (double)size;
    }
    dfi_scratch_release(ctx, mark);
    return r;
}

DF_API void df_v3_free(df_ctx *ctx, df_v3_statistics *e) {
    size_t numbers;
    if (ctx == NULL || e == NULL) return;
    numbers = dfi_mul((size_t)e->count, 1 + 3 * (size_t)e->dim);
    dfi_delete(ctx, e, dfi_plus(sizeof *e, dfi_mul(numbers, sizeof(double))));
}

static df_v3_statistics *dfi_v3_new(df_ctx *ctx, int count, int dim) {
    size_t numbers = dfi_mul((size_t)count, 1 + 3 * (size_t)dim);
    df_v3_statistics *e = (df_v3_statistics *)dfi_new(
        ctx, dfi_plus(sizeof *e, dfi_mul(numbers, sizeof(double))));
    if (e == NULL) return NULL;
    e->count = count;
    e->dim = dim;
    e->lambda = (double *)(void *)(e + 1);
    e->l = e->lambda + count;
    e->s = e->l + (size_t)count * (size_t)dim;
    e->b = e->s + (size_t)count * (size_t)dim;
    return e;
}

/* Normal numbers to random signs. */
static void dfi_signs(size_t n, df_real *v) {
    for (size_t i = 0; i < n; i++) v[i] = v[i] < 0 ? (df_real)-1 : (df_real)1;
}

/* l of one point: the mean over samples of v (sigma d eps/dx v), v of random signs; sigma
   eps = x - alpha x_0, so it is 1 - alpha v (J v), J = d x_0/dx. x0, v, jv: [n, dim]. */
static df_result dfi_v3_linear(df_ctx *ctx, const df_model *m, const df_point *q, int n,
                               const df_real *x, const df_sample_desc *d, uint32_t draw,
                               df_real *v, df_real *jv, double *l) {
    size_t dim = (size_t)m->dim, size = (size_t)n * dim;
    df_query ask = dfi_query_of(d, n, x);
    df_result r;
    for (size_t i = 0; i < (size_t)n; i++)
        df_random_normal(d->seed, d->first_sample + i, draw | 0x40000000u, dim,
                         v + i * dim);
    dfi_signs(size, v);
    ask.v = v;
    r = dfi_ask_jvp(ctx, m, ask, DF_X0, q, 0, jv);
    for (size_t j = 0; r == DF_OK && j < dim; j++) {
        l[j] = 1;
        for (size_t i = j; i < size; i += dim)
            l[j] -= q->alpha * (double)v[i] * (double)jv[i] / n;
    }
    return r;
}

/* s, b of point k, from f = (1 - l) y - x_0 there and at the points around it: the line
   that predicts df/d lambda from f best (Zheng et al. 2023, eq. 11). Near pure noise f
   hardly varies and any slope would do: a ridge of 1 % of x_0's own variance keeps s small
   there, and its time scale is no shorter than one unit of lambda. */
static void dfi_v3_regress(df_v3_statistics *e, int k, const df_point *grid, int n,
                           const df_real *x, const df_real *x0) {
    size_t dim = (size_t)e->dim, size = (size_t)n * dim;
    int low = k > 0 ? k - 1 : k, high = k + 1 < e->count ? k + 1 : k;
    double dl = grid[high].lambda - grid[low].lambda;
    for (size_t j = 0; j < dim; j++) {
        double f1 = 0, d1 = 0, ff = 0, fd = 0, s;
        const df_real *end = x0 + ((size_t)e->count - 1) * size;
        double m1 = 0, m2 = 0;
        for (size_t i = j; i < size; i += dim) {
            double f[3];
            for (int p = 0; p < 3; p++) {
                int at = p == 0 ? low : p == 1 ? k : high;
                double l = 1 - e->l[(size_t)at * dim + j];
                f[p] = l * (double)x[(size_t)at * size + i] / grid[at].alpha -
                       (double)x0[(size_t)at * size + i];
            }
            f1 += f[1] / n;
            d1 += (f[2] - f[0]) / dl / n;
            ff += f[1] * f[1] / n;
            fd += f[1] * (f[2] - f[0]) / dl / n;
            m1 += (double)end[i] / n;
            m2 += (double)end[i] * (double)end[i] / n;
        }
        s = (fd - f1 * d1) / (ff - f1 * f1 + .01 * (m2 - m1 * m1) + 1e-30);
        s = fmin(fmax(s, -1), 1);
        e->s[(size_t)k * dim + j] = s;
        e->b[(size_t)k * dim + j] = d1 - s * f1;
    }
}

/* Along ddim's trajectories of n samples, at the grid's points inside (0, inf). */
DF_API df_v3_statistics *df_v3_estimate(df_ctx *ctx, const df_model *model,
                                        const df_sample_desc *desc, int n) {
    df_result r = dfi_measure_check(ctx, "df_v3_estimate", model, desc, n);
    int steps = r == DF_OK ? dfi_steps_asked(desc) : 0, count = 0, first, last;
    size_t size = r == DF_OK ? dfi_mul((size_t)n, (size_t)model->dim) : 0, all;
    df_v3_statistics *e = NULL;
    df_sample_desc d;
    df_model plain;
    df_point *grid = NULL;
    df_real *x, *x0, *spare;
    df_scope mark;
    if (r != DF_OK) return NULL;
    mark = dfi_scratch_mark(ctx);
    all = dfi_mul(dfi_mul((size_t)steps + 2, size), sizeof(df_real));
    x = (df_real *)dfi_scratch(ctx, all);
    x0 = (df_real *)dfi_scratch(ctx, all);
    spare = (df_real *)dfi_scratch(ctx, dfi_mul(2 * sizeof *spare, size));
    d = *desc;                                  /* its grid, seed and labels; plain ddim */
    d.method = "ddim", d.row = NULL, d.statistics = NULL;
    d.order = d.inverse = d.restarts = d.corrections = 0;
    d.eta = d.corrector = d.predicts = -1, d.ratio = d.churn = 0;
    d.slope = DF_SLOPE_OWN, d.eta_in = DF_ETA_OWN, d.variance = DF_VARIANCE_OWN;
    d.start = DF_START_NOISE, d.on_step = NULL, d.edit = NULL, d.trajectory = x;
    if (x && x0 && spare) grid = dfi_grid_plain(ctx, model, &d, &count);
    if (grid == NULL) r = ctx->code;
    plain = *model;
    plain.mean = plain.scale = NULL;
    if (r == DF_OK) r = df_sample(ctx, &plain, &d, spare, n);
    first = r == DF_OK && grid[0].alpha <= 0, last = count - 1;
    if (r == DF_OK && grid[last].sigma <= 0) last--;
    if (r == DF_OK && last - first < 2)
        r = dfi_fail(ctx, DF_ERR_ARGUMENT, "df_v3_estimate: %d points inside the path, "
                     "wants 3 or more; raise steps", last - first + 1);
    if (r == DF_OK && (e = dfi_v3_new(ctx, last - first + 1, model->dim)) == NULL)
        r = DF_ERR_MEMORY;
    for (int k = 0; r == DF_OK && k < e->count; k++) {
        const df_point *q = &grid[first + k];
        const df_real *at = x + (size_t)(first + k) * size;
        e->lambda[k] = q->lambda;
        r = dfi_ask_as(ctx, model, dfi_query_of(&d, n, at), DF_X0, q, 0, NULL,
                       x0 + (size_t)(first + k) * size);
        if (r == DF_OK)
            r = dfi_v3_linear(ctx, model, q, n, at, &d, (uint32_t)k, spare, spare + size,
                              e->l + (size_t)k * (size_t)model->dim);
    }
    for (int k = 0; r == DF_OK && k < e->count; k++)
        dfi_v3_regress(e, k, grid + first, n, x + (size_t)first * size,
                       x0 + (size_t)first * size);
    dfi_scratch_release(ctx, mark);
    if (r == DF_OK) return e;
    df_v3_free(ctx, e);
    return NULL;
}
/* -------------------------------------------------------------------------------------
   // >>guidance: samples that are more like their label

   Bayes' rule gives the score of p(x) p(c|x)^scale as grad log p(x) + scale grad log
   p(c|x). With grad log p(c|x) = grad log p(x|c) - grad log p(x), one network that was
   also trained without labels gives both parts (classifier-free guidance, Ho & Salimans
   2022, eq. 6, whose 1 + w is scale):
       out = uncond + scale (cond - uncond)
   Every row of the plane is affine in x_0 with the same x, and the weights sum to one: the
   formula is the same for eps, x_0, velocity, v, so that answers are combined as they
   come. scale 1 is the conditional model, 0 the unconditional, above 1 the contrast is
   enlarged. The result is not the tilted distribution p(x) p(c|x)^scale at t = 0:
   diffusing and tilting do not commute; on Gaussians the difference is computed in the
   tests.

   Guidance is itself a model: it asks other models and combines their answers.
   ------------------------------------------------------------------------------------- */

/* Equal arrays, NULL equal to NULL only. */
static int dfi_same_numbers(const double *a, const double *b, int n) {
    if (a == NULL || b == NULL || n < 1) return a == b;
    return memcmp(a, b, (size_t)n * sizeof *a) == 0;
}

/* Two models may answer one question only if they would be asked the same. */
static df_result dfi_guidance_check(df_ctx *ctx, const df_guidance *g, const df_query *q) {
    const df_model *a = g->model, *b = g->uncond;
    const char *what = NULL;
    if (g->cookie != DFI_COOKIE || a == NULL || a->predict == NULL ||
        (b && b->predict == NULL))
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_guidance: a model is missing or has no predict, or "
                        "df_guidance_defaults did not make it");
    if (dfi_nonfinite(g->scale))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_guidance: scale is %s",
                        dfi_nonfinite_name(g->scale));
    if (g->guided < 0 || g->guided > a->dim || (g->guided > 0 && q->ask == DF_ASK_VJP))
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_guidance: guided is %d, wanted 0 (all) to the model's %d, and "
                        "0 for VJP", g->guided, a->dim);
    if (a->dim != q->dim || (b && b->dim != a->dim))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_guidance: asked about samples of %d, "
                        "model has dim %d, uncond %d", q->dim, a->dim,
                        b ? b->dim : a->dim);
    if (b && a->process.kind != b->process.kind)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_guidance: model is of process %s, uncond of %s",
                        df_process_name(&a->process), df_process_name(&b->process));
    if (b && b->prediction != a->prediction)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_guidance: model predicts %s, uncond %s",
                        df_prediction_name(a->prediction),
                        df_prediction_name(b->prediction));
    if (b &&
        (a->time.kind != b->time.kind || a->time.a != b->time.a || a->time.b != b->time.b))
        what = "native times";
    if (b && a->prediction == DF_VELOCITY &&
        (a->clock.kind != b->clock.kind || a->clock.a != b->clock.a ||
         a->clock.b != b->clock.b))
        what = "clocks of velocity";
    if (b && a->input_sigma_data != b->input_sigma_data) what = "input scales";
    if (b && a->learned != b->learned) what = "learned variances";
    if (b && (a->process.a != b->process.a || a->process.b != b->process.b ||
              a->process.sigma_data != b->process.sigma_data ||
              a->process.interp != b->process.interp ||
              a->process.table_size != b->process.table_size))
        what = "process parameters";
    if (b && what == NULL && a->process.kind == DF_PROCESS_TABLE &&
        memcmp(a->process.log_abar, b->process.log_abar,
               (size_t)a->process.table_size * sizeof(double)) != 0)
        what = "tables";
    if (b && (a->scaling_size != b->scaling_size ||
              !dfi_same_numbers(a->mean, b->mean, a->scaling_size) ||
              !dfi_same_numbers(a->scale, b->scale, a->scaling_size)))
        what = "data scaling";
    if (what)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_guidance: model and uncond differ in their %s", what);
    if (b == NULL && q->labels == NULL && g->scale != 1)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_guidance: scale %g needs labels in the question or "
                        "an unconditional model",
                        g->scale);
    return DF_OK;
}

/* in [n] twice: out [2n]. */
static void dfi_repeat(const double *in, int n, double *out) {
    memcpy(out, in, (size_t)n * sizeof *in);
    memcpy(out + n, in, (size_t)n * sizeof *in);
}

/* Both questions as one of 2n rows, labelled first: out [2n, dim]. */
static df_result dfi_guidance_stacked(df_ctx *ctx, const df_model *m, const df_query *q,
                                      df_real *out) {
    size_t n = (size_t)q->n, row = dfi_mul((size_t)q->dim, sizeof(df_real)),
           all = dfi_mul(n, row);
    int vectors = q->v != NULL;
    char *x = (char *)dfi_scratch(ctx, dfi_mul(dfi_mul(2, all), (size_t)(1 + vectors)));
    double *points = (double *)dfi_scratch(ctx, dfi_mul(n, 6 * sizeof(double)));
    df_real *t_model = (df_real *)dfi_scratch(ctx, dfi_mul(n, 2 * sizeof(df_real)));
    int *labels = (int *)dfi_scratch(ctx, dfi_mul(n, 2 * sizeof(int)));
    df_query two = *q;
    if (!x || !points || !t_model || !labels) return DF_ERR_MEMORY;
    for (int half = 0; half < 2; half++) {
        size_t at = (size_t)half * n;
        memcpy(x + at * row, q->x, all);
        if (vectors) memcpy(x + (2 * n + at) * row, q->v, all);
        memcpy(t_model + at, q->t_model, n * sizeof *t_model);
        for (size_t i = 0; i < n; i++)
            labels[at + i] = half ? m->null_label : q->labels[i];
    }
    dfi_repeat(q->t, q->n, points);
    dfi_repeat(q->alpha, q->n, points + 2 * n);
    dfi_repeat(q->sigma, q->n, points + 4 * n);
    two.n = 2 * q->n;
    two.x = (const df_real *)(const void *)x;
    if (vectors) two.v = (const df_real *)(const void *)(x + 2 * n * row);
    two.t = points;
    two.alpha = points + 2 * n;
    two.sigma = points + 4 * n;
    two.t_model = t_model;
    two.labels = labels;
    return dfi_ask(ctx, m, &two, out);
}

/* The question without its class: null labels, or another model that knows none. */
static df_result dfi_guidance_uncond(df_ctx *ctx, const df_guidance *g, const df_query *q,
                                     df_real *out) {
    df_query bare = *q;
    int *labels;
    if (g->uncond) {
        bare.labels = NULL;
        bare.condition = NULL;
        bare.condition_stride = 0;
        return dfi_ask(ctx, g->uncond, &bare, out);
    }
    labels = (int *)dfi_scratch(ctx, dfi_mul((size_t)q->n, sizeof(int)));
    if (labels == NULL) return DF_ERR_MEMORY;
    for (int i = 0; i < q->n; i++) labels[i] = g->model->null_label;
    bare.labels = labels;
    return dfi_ask(ctx, g->model, &bare, out);
}

/* Asks both ways and combines. One question where the model can take it; each row of a
   batch is answered alone, so this changes no digit. */
static df_result dfi_guidance_both(df_ctx *ctx, const df_guidance *g, const df_query *q,
                                   df_real *out) {
    const df_model *m = g->model;
    size_t dim = (size_t)q->dim, width = dfi_answer_width(m, q->ask);
    size_t size = dfi_mul((size_t)q->n, width);
    int each_has_condition = q->condition && q->condition_stride > 0;
    int stack = !g->uncond && m->stackable && q->n <= INT_MAX / 2 && !each_has_condition &&
                (m->max_batch <= 0 || q->n <= m->max_batch / 2);
    df_real *answers =
        (df_real *)dfi_scratch(ctx, dfi_mul(dfi_mul(size, 2), sizeof(df_real)));
    const df_real *a[2];
    double c[2];
    df_result r;
    if (answers == NULL) return DF_ERR_MEMORY;
    if (stack)
        r = dfi_guidance_stacked(ctx, m, q, answers);
    else {
        r = dfi_ask(ctx, m, q, answers);
        if (r == DF_OK) r = dfi_guidance_uncond(ctx, g, q, answers + size);
    }
    if (r != DF_OK) return r;
    c[0] = g->scale;
    c[1] = 1 - g->scale;
    a[0] = answers;
    a[1] = answers + size;
    dfi_combine(ctx, size, out, 2, c, a);
    if (g->guided > 0 && (size_t)g->guided < dim) dim = (size_t)g->guided;
    for (size_t i = 0; width > dim && i < (size_t)q->n; i++) /* so is a variance */
        memcpy(out + i * width + dim, answers + i * width + dim,
               (width - dim) * sizeof *out);
    return DF_OK;
}

static int dfi_guidance_predict(void *self, df_ctx *ctx, const df_query *q, df_real *out) {
    const df_guidance *g = (const df_guidance *)self;
    df_result r = dfi_guidance_check(ctx, g, q);
    df_scope mark;
    if (r != DF_OK) return r;
    if (g->scale == 1) return dfi_ask(ctx, g->model, q, out);
    mark = dfi_scratch_mark(ctx);
    r = g->scale == 0 && g->guided == 0 ? dfi_guidance_uncond(ctx, g, q, out)
                      : dfi_guidance_both(ctx, g, q, out);
    dfi_scratch_release(ctx, mark);
    return r;
}

DF_API df_guidance df_guidance_defaults(void) {
    df_guidance g;
    memset(&g, 0, sizeof g);
    g.cookie = DFI_COOKIE;
    g.scale = 1;
    return g;
}

DF_API df_model df_guidance_model(df_guidance *guidance) {
    int made = guidance && guidance->cookie == DFI_COOKIE && guidance->model;
    df_model m = made ? *guidance->model : df_model_defaults();
    unsigned linear =
        DF_ASK_PREDICT | DF_ASK_JVP | DF_ASK_VJP; /* combine as predictions do */
    if (guidance == NULL) return m; /* of dim 0: refused, with a sentence, where used */
    m.predict = dfi_guidance_predict;
    m.self = guidance;
    /* what is guided is part of an answer to PREDICT and JVP; VJP's is of x's kind */
    if (guidance->guided != 0) linear &= ~(unsigned)DF_ASK_VJP;
    m.answers &= guidance->uncond ? linear & guidance->uncond->answers : linear;
    m.max_batch = 0; /* each model's own limit is kept when it is asked */
    return m;
}

/* -------------------------------------------------------------------------------------
   // >>likelihood: how probable is this sample?

   The probability flow carries p_t along, so it has a density that can be computed. Along
   dx/dt = u(x) a small volume grows at the rate div u, and what it holds stays:
       d log p_t(x_t)/dt = -div u(x_t)
   (the instantaneous change of variables, Chen et al. 2018). Carried to the noise end,
   where the density is the prior's, that gives log p of any x (Song et al. 2021, eq. 39).
   The divergence is the trace of a Jacobian: dim JVPs, or E v^T J v for random v with
   E v v^T = I (Hutchinson 1989; Grathwohl et al. 2019), of which one v is unbiased.

   In r = x/(alpha + sigma) and s = sigma/(alpha + sigma) the field is eps - x_0 for every
   process. l = log p(r) gained since the start is one more coordinate, of field -div: a
   sample of dim + 1 numbers, which any ODE sampler of the registry carries, either way.
   log p(x) is log p(r) - dim log(alpha + sigma).

   Without the ODE, x_T .. x_1 as latent variables of a hierarchical VAE with a fixed
   encoder give a bound (Ho et al. 2020), which holds for the ancestral sampler.
   ------------------------------------------------------------------------------------- */

enum {
    DFI_DRAW_PROBE = 0x20000000, DFI_DRAW_LEVEL = 0x30000000, DFI_DRAW_LAMBDA = 0x38000000
};

DF_API df_likelihood_desc df_likelihood_defaults(void) {
    df_likelihood_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.walk = df_sample_defaults();
    d.walk.method = "rk45";
    d.walk.end = DF_END_T_MIN;
    d.trace = DF_TRACE_EXACT;
    d.probes = 1;
    return d;
}

/* The model of dim + 1 numbers. */
typedef struct dfi_carried {
    const df_model *model;
    const df_likelihood_desc *desc;
    int evaluations;
} dfi_carried;

/* Direction number k for sample i: v [dim]. */
static void dfi_probe(const df_likelihood_desc *d, uint64_t sample, int k, size_t dim,
                      df_real *v) {
    if (d->trace == DF_TRACE_EXACT) {
        memset(v, 0, dim * sizeof *v);
        v[k] = 1;
        return;
    }
    df_random_normal(d->walk.seed, d->walk.first_sample + sample,
                     (uint32_t)DFI_DRAW_PROBE + (uint32_t)k, dim, v);
    if (d->trace == DF_TRACE_RADEMACHER) dfi_signs(dim, v);
}

/* out [n, dim + 1]: eps - x_0, and minus its divergence in r: d/dr is (alpha + sigma)
   d/dx. x is without its last numbers here; v, y: room for [n, dim]. */
static df_result dfi_carried_ask(dfi_carried *c, df_ctx *ctx, df_query q,
                                 const df_point *each, df_real *v, df_real *y,
                                 double *trace, df_real *out) {
    const df_likelihood_desc *d = c->desc;
    size_t dim = (size_t)c->model->dim, n = (size_t)q.n;
    int exact = d->trace == DF_TRACE_EXACT, probes = exact ? (int)dim : d->probes;
    df_result r = dfi_ask_as(ctx, c->model, q, DF_STRAIGHT, each, 1, NULL, y);
    c->evaluations++;
    for (size_t i = 0; r == DF_OK && i < n; i++) {
        memcpy(out + i * (dim + 1), y + i * dim, dim * sizeof *y);
        trace[i] = 0;
    }
    q.v = v;
    for (int k = 0; r == DF_OK && k < probes; k++) {
        for (size_t i = 0; i < n; i++)
            dfi_probe(d, i % (size_t)q.samples, k, dim, v + i * dim);
        r = dfi_ask_jvp(ctx, c->model, q, DF_STRAIGHT, each, 1, y);
        for (size_t i = 0; r == DF_OK && i < n; i++)
            trace[i] += ctx->k->dot(dim, v + i * dim, y + i * dim) / (exact ? 1 : probes);
    }
    for (size_t i = 0; r == DF_OK && i < n; i++)
        out[i * (dim + 1) + dim] = (df_real)(-(each[i].alpha + each[i].sigma) * trace[i]);
    return r;
}

static int dfi_carried_predict(void *self, df_ctx *ctx, const df_query *q, df_real *out) {
    dfi_carried *c = (dfi_carried *)self;
    size_t dim = (size_t)c->model->dim, n = (size_t)q->n, size = dfi_mul(n, dim);
    df_scope mark = dfi_scratch_mark(ctx);
    df_point *each = (df_point *)dfi_scratch(ctx, dfi_mul(n, sizeof *each));
    double *trace = (double *)dfi_scratch(ctx, dfi_mul(n, sizeof *trace));
    df_real *x = (df_real *)dfi_scratch(ctx, dfi_mul(size, 3 * sizeof *x));
    df_result r = each && trace && x ? DF_OK : DF_ERR_MEMORY;
    df_query inner = *q;
    for (size_t i = 0; r == DF_OK && i < n; i++) {
        each[i] = df_process_at(&c->model->process, q->t[i]);
        memcpy(x + i * dim, q->x + i * (dim + 1), dim * sizeof *x);
    }
    inner.x = x;
    if (r == DF_OK)
        r = dfi_carried_ask(c, ctx, inner, each, x + size, x + 2 * size, trace, out);
    dfi_scratch_release(ctx, mark);
    return r;
}

/* log prior of z [n, dim] at the noise end: the caller's, or N(0, sigma^2 I). */
static df_result dfi_log_prior(df_ctx *ctx, const df_likelihood_desc *d,
                               const df_point *at, size_t n, size_t dim, const df_real *z,
                               double *out) {
    df_result before = ctx->code, r = DF_OK;
    double s2 = at->sigma * at->sigma;
    for (size_t i = 0; !d->log_prior && i < n; i++)
        out[i] = -.5 * (ctx->k->dot(dim, z + i * dim, z + i * dim) / s2 +
                        (double)dim * log(2 * DFI_PI * s2));
    if (d->log_prior) {
        ctx->code = DF_OK;
        r = d->log_prior(d->user, at, (int)n, z, out);
        r = dfi_returned(ctx, before, r, "df_likelihood_desc: log_prior", 0, 0);
    }
    for (size_t i = 0; r == DF_OK && i < n; i++)
        if (dfi_nonfinite(out[i]))
            r = dfi_fail(ctx, DF_ERR_NONFINITE, "df_likelihood_desc: the log prior of "
                         "sample %llu is %s", (unsigned long long)i,
                         dfi_nonfinite_name(out[i]));
    return r;
}

/* What data = mean + scale x adds to the log density of x, negative. */
static double dfi_log_scale(const df_model *m) {
    double sum = 0;
    for (int j = 0; m->scale && j < m->dim; j++)
        sum += log(m->scale[m->scaling_size == 1 ? 0 : j]);
    return sum;
}

/* The sampler's own checks of an ODE walked back say what may be walked forth as well. */
static df_result dfi_likelihood_check(df_ctx *ctx, const df_model *m,
                                      const df_likelihood_desc *d, const df_real *x, int n,
                                      const double *out) {
    df_sample_desc w = d->walk;
    const df_sampler_row *row = w.row;
    int steps = dfi_steps_asked(&w);
    df_result r;
    if (d->cookie != DFI_COOKIE || w.cookie != DFI_COOKIE || !m || m->dim == INT_MAX ||
        !m->predict || !out || (unsigned)d->trace > (unsigned)DF_TRACE_GAUSSIAN ||
        d->probes < 1 || d->probes >= DFI_DRAW_LEVEL - DFI_DRAW_PROBE || w.clip > 0 ||
        w.threshold > 0 || w.start == DF_START_DATA || steps < 1 || steps > DFI_MOST_STEPS)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_log_likelihood: %d steps, trace %d, "
                        "probes %d, start %d, clip %g, threshold %g: want a descriptor of "
                        "df_likelihood_defaults, a model that predicts, out, 1 to %d "
                        "steps, a df_trace, probes >= 1, start NOISE or GIVEN, no clip, "
                        "no threshold", steps, (int)d->trace, d->probes, (int)w.start,
                        w.clip, w.threshold, DFI_MOST_STEPS);
    r = dfi_sample_check_model(ctx, m, x, n);
    if (r == DF_OK && !row && !(row = df_sampler_find(ctx, w.method))) r = DF_ERR_ARGUMENT;
    w.inverse = 1;
    w.start = DF_START_GIVEN;
    return r == DF_OK ? dfi_sample_check_method(ctx, &w, row) : r;
}

/* Both directions: z [n, dim] in the model's units from one end of the grid to the other,
   y [n, dim + 1] with l behind it; log p into out. */
static df_result dfi_likelihood_walk(df_ctx *ctx, const df_model *m,
                                     const df_likelihood_desc *d, const df_point *noise,
                                     const df_point *data, size_t n, df_real *z,
                                     df_real *y, double *out) {
    size_t dim = (size_t)m->dim, wide = dim + 1, row = dim * sizeof *z;
    int back = d->walk.inverse;                  /* from data to noise */
    dfi_carried c = { m, d, 0 };
    df_model carried = df_model_defaults();
    double gain, ends = (double)dim * (log(noise->alpha + noise->sigma) -
                                       log(data->alpha + data->sigma)) - dfi_log_scale(m);
    const df_point *end = back ? noise : data;
    df_result r = back ? DF_OK : dfi_log_prior(ctx, d, noise, n, dim, z, out);
    carried.predict = dfi_carried_predict;
    carried.self = &c;
    carried.dim = (int)wide;
    carried.process = m->process;
    carried.prediction = DF_STRAIGHT;
    for (size_t i = 0; i < n; i++) {
        memcpy(y + i * wide, z + i * dim, row);
        y[i * wide + dim] = 0;
    }
    if (r == DF_OK && !back && d->latent) memcpy(d->latent, z, n * row);
    if (r == DF_OK) r = df_sample(ctx, &carried, &d->walk, y, (int)n);
    for (size_t i = 0; r == DF_OK && i < n; i++) memcpy(z + i * dim, y + i * wide, row);
    if (r == DF_OK && back) r = dfi_log_prior(ctx, d, noise, n, dim, z, out);
    if (r != DF_OK) return r;
    if (back && d->latent) memcpy(d->latent, z, n * row);
    if (d->prior) memcpy(d->prior, out, n * sizeof *out);
    if (d->evaluations) *d->evaluations = c.evaluations;
    for (size_t i = 0; i < n; i++) {
        gain = (double)y[i * wide + dim] / (end->alpha + end->sigma);
        out[i] += ends + (back ? -gain : gain);
    }
    return DF_OK;
}

/* z [n, dim] at the noise end, from the walk's noise as df_sample starts: draw 0. */
static df_result dfi_likelihood_start(df_ctx *ctx, const df_sample_desc *w, df_point at,
                                      int n, int dim, df_real *z) {
    df_noise_query q = { w->seed, w->first_sample, 0, -1, n, dim, at, at };
    df_result before = ctx->code, r = DF_OK;
    for (size_t i = 0; !w->noise.fill && i < (size_t)n; i++)
        df_random_normal(w->seed, w->first_sample + i, 0, (size_t)dim,
                         z + i * (size_t)dim);
    if (w->noise.fill) {
        ctx->code = DF_OK;
        r = w->noise.fill(w->noise.user, &q, z);
        r = dfi_returned(ctx, before, r, "df_sample_likelihood: noise.fill", 0, 0);
    }
    if (r == DF_OK)
        ctx->k->affine((size_t)n * (size_t)dim, (df_real)at.sigma, z, 0, z);
    return r;
}

static df_result dfi_likelihood(df_ctx *ctx, const df_model *m,
                                const df_likelihood_desc *desc, const df_real *x,
                                df_real *samples, int n, double *out) {
    df_likelihood_desc d = desc ? *desc : df_likelihood_defaults();
    df_scope mark;
    df_result r;
    size_t size;
    df_point *grid;
    df_real *z, *y;
    double *log_p;
    int count;
    if (ctx == NULL) return DF_ERR_ARGUMENT;
    r = dfi_likelihood_check(ctx, m, &d, x, n, out);
    if (r != DF_OK) return r;
    size = dfi_mul((size_t)n, (size_t)m->dim);
    mark = dfi_scratch_mark(ctx);
    z = (df_real *)dfi_scratch(ctx, dfi_mul(size, sizeof *z));
    y = (df_real *)dfi_scratch(ctx, dfi_mul(dfi_plus(size, (size_t)n), sizeof *y));
    log_p = (double *)dfi_scratch(ctx, dfi_mul((size_t)n, sizeof *log_p));
    grid = z && y && log_p ? dfi_grid_plain(ctx, m, &d.walk, &count) : NULL;
    if (grid == NULL) r = ctx->code;
    d.walk.restarts = 0;
    if (r == DF_OK && samples && d.walk.start == DF_START_NOISE)
        r = dfi_likelihood_start(ctx, &d.walk, grid[0], n, m->dim, z);
    else if (r == DF_OK) memcpy(z, x, size * sizeof *z);
    d.walk.inverse = samples == NULL;
    d.walk.start = DF_START_GIVEN;
    if (r == DF_OK && !samples) dfi_rescale(m, size, z, 0);
    if (r == DF_OK)
        r = dfi_likelihood_walk(ctx, m, &d, &grid[0], &grid[count - 1], (size_t)n, z, y,
                                log_p);
    if (r == DF_OK && samples) dfi_rescale(m, size, z, 1);
    if (r == DF_OK && samples) memcpy(samples, z, size * sizeof *z);
    if (r == DF_OK) memcpy(out, log_p, (size_t)n * sizeof *out);
    dfi_scratch_release(ctx, mark);
    return r;
}

DF_API df_result df_log_likelihood(df_ctx *ctx, const df_model *model,
                                   const df_likelihood_desc *desc, const df_real *x, int n,
                                   double *out) {
    return dfi_likelihood(ctx, model, desc, x, NULL, n, out);
}
DF_API df_result df_sample_likelihood(df_ctx *ctx, const df_model *model,
                                      const df_likelihood_desc *desc, df_real *x, int n,
                                      double *out) {
    return dfi_likelihood(ctx, model, desc, x, x, n, out);
}

/* ---- the variational bound ---- */

DF_API df_bound_desc df_bound_defaults(void) {
    df_bound_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.walk = df_sample_defaults();
    d.draws = 1;
    d.low = -1;
    d.high = 1;
    return d;
}

typedef struct dfi_bound {
    df_ctx *ctx;
    const df_model *m;
    const df_bound_desc *d;
    size_t n, dim, points;     /* points: T */
    df_point *grid;            /* [T + 1] noise to data */
    df_point *each;            /* [n] where the rows of a question stand */
    df_real *x, *y, *answer, *behind;      /* [n, dim] data in the model's units, noised,
                                              x_0 predicted, a variance behind that */
    double *term;              /* [n] */
} dfi_bound;

/* x_0 from x noised to each[i] by draw number `draw`. */
static df_result dfi_bound_ask(dfi_bound *b, size_t draw) {
    size_t dim = b->dim;
    df_query q = dfi_query_of(&b->d->walk, (int)b->n, b->y);
    for (size_t i = 0; i < b->n; i++) {
        const double c[2] = { b->each[i].sigma, b->each[i].alpha };
        const df_real *const a[2] = { b->y + i * dim, b->x + i * dim };
        df_random_normal(b->d->walk.seed, b->d->walk.first_sample + i, (uint32_t)draw, dim,
                         b->y + i * dim);
        b->ctx->k->combine(dim, 2, c, a, b->y + i * dim);
    }
    return dfi_ask_as(b->ctx, b->m, q, DF_X0, b->each, 1, b->behind, b->answer);
}

/* -log of a normal's density at e, or of its mass from `from` to `to`, which stand at that
   distance from its mean; far out at most 708. */
static double dfi_minus_log_normal(double e, double v) {
    return .5 * (e * e / v + log(2 * DFI_PI * v));
}
static double dfi_minus_log_mass(double from, double to, double v) {
    double root = sqrt(2 * v), flip = from > 0 ? -1 : 1;     /* the tail that is small */
    double p = .5 * fabs(erfc(-flip * to / root) - erfc(-flip * from / root));
    return -log(fmax(p, DBL_MIN));
}

/* One element of the decoder's term, e = x - x_0 predicted. Levels are narrower in the
   model's units, where x is. */
static double dfi_bound_decode(const dfi_bound *b, size_t j, double x, double e,
                               double v) {
    const df_bound_desc *d = b->d;
    double width = (d->high - d->low) / (d->levels - 1), scale = 1, k;
    size_t at = b->m->scaling_size == 1 ? 0 : j;
    if (d->levels < 2) return dfi_minus_log_normal(e, v);
    if (b->m->scale) scale = b->m->scale[at];
    k = ((b->m->mean ? b->m->mean[at] : 0) + scale * x - d->low) / width;
    return dfi_minus_log_mass(k < .5 ? -1e100 : e - .5 * width / scale,
                              k > d->levels - 1.5 ? 1e100 : e + .5 * width / scale, v);
}

/* Adds the term of step k of the grid to term [n]: KL of two normals whose means differ by
   p.x0 (x_0 - x_0 predicted), or the decoder's. */
static void dfi_bound_step(dfi_bound *b, size_t k, df_point from, df_point to) {
    const df_sample_desc *w = &b->d->walk;
    int own = w->variance == DF_VARIANCE_OWN && !b->d->continuous, last = to.sigma <= 0;
    int large = b->d->continuous || (last && w->variance != DF_VARIANCE_ANALYTIC &&
                                     b->m->process.kind != DF_PROCESS_TABLE);
    df_learned kind = own ? b->m->learned : DF_LEARNED_NONE;
    dfi_posterior p = dfi_posterior_of(&from, &to);
    double q, v;
    if (last && w->variance != DF_VARIANCE_ANALYTIC)
        p.small = k > 0 ? dfi_posterior_of(&b->grid[k - 1], &from).small : p.large;
    q = p.small;
    v = large ? p.large : dfi_posterior_variance(w, &p, &from, (int)k);
    for (size_t i = 0; i < b->n * b->dim; i++) {
        double e = (double)b->x[i] - (double)b->answer[i], d = p.x0 * e;
        if (kind != DF_LEARNED_NONE)
            v = pow(dfi_learned_deviation(kind, (double)b->behind[i], q, p.large), 2);
        v = fmax(v, DBL_MIN);
        b->term[i / b->dim] +=
            last ? dfi_bound_decode(b, i % b->dim, (double)b->x[i], e, v)
                 : .5 * (log(v / q) + (q + d * d) / v - 1);
    }
}

/* The continuous integral, whose part k holds one lambda: |eps - eps predicted| is |x_0 -
   x_0 predicted| alpha/sigma. */
static df_result dfi_bound_part(dfi_bound *b, int k) {
    const df_bound_desc *d = b->d;
    double low = b->grid[0].lambda, u;
    double part = (b->grid[b->points - 1].lambda - low) / d->draws;
    df_result r;
    for (size_t i = 0; i < b->n; i++) {
        df_random_uniform(d->walk.seed, d->walk.first_sample + i,
                          (uint32_t)DFI_DRAW_LAMBDA + (uint32_t)k, 1, &u);
        b->each[i] = df_process_at_lambda(&b->m->process, low + (k + u) * part);
    }
    r = dfi_bound_ask(b, 1 + (size_t)k);
    for (size_t i = 0; r == DF_OK && i < b->n * b->dim; i++) {
        const df_point *at = &b->each[i / b->dim];
        double e = ((double)b->x[i] - (double)b->answer[i]) * at->alpha / at->sigma;
        b->term[i / b->dim] += part * d->draws * e * e;
    }
    return r;
}

/* All draws of one term, their mean into term [n]; term 0 is the prior's. */
static df_result dfi_bound_term(dfi_bound *b, size_t term, size_t terms) {
    df_point from = b->grid[term > 0 ? term - 1 : 0], to = df_point_data();
    size_t draws = (size_t)b->d->draws;
    df_result r = DF_OK;
    if (b->d->continuous && term == 2) from = b->grid[b->points - 1];
    else if (term + 1 < terms) to = b->grid[term];
    for (size_t i = 0; i < b->n; i++) {
        const df_real *x = b->x + i * b->dim;
        b->each[i] = from;
        b->term[i] = term > 0 ? 0 : .5 * (double)draws * b->ctx->k->dot(b->dim, x, x) *
                                    pow(from.alpha / from.sigma, 2);
    }
    for (size_t k = 0; term > 0 && r == DF_OK && k < draws; k++) {
        if (b->d->continuous && term == 1) {
            r = dfi_bound_part(b, (int)k);
            continue;
        }
        r = dfi_bound_ask(b, 1 + (term - 1) * draws + k);
        if (r == DF_OK) dfi_bound_step(b, term - 1, from, to);
    }
    for (size_t i = 0; i < b->n; i++) b->term[i] /= (double)draws;
    return r;
}

/* The grid, without a data point at its end, and all arrays. */
static df_result dfi_bound_set(dfi_bound *b, const df_real *x) {
    size_t size = dfi_mul(b->n, b->dim), steps = (size_t)dfi_steps_asked(&b->d->walk);
    df_ctx *ctx = b->ctx;
    df_sample_desc w = b->d->walk;
    int count;
    df_result r = DF_OK;
    if (b->d->continuous) w.end = DF_END_T_MIN;
    b->each = (df_point *)dfi_scratch(ctx, dfi_mul(b->n, sizeof *b->each));
    b->x = (df_real *)dfi_scratch(ctx, dfi_mul(size, 4 * sizeof *b->x));
    b->term = (double *)dfi_scratch(ctx, dfi_mul(b->n, sizeof *b->term));
    if (!b->each || !b->x || !b->term) return DF_ERR_MEMORY;
    if ((b->grid = dfi_grid_plain(ctx, b->m, &w, &count)) == NULL) return ctx->code;
    b->y = b->x + size;
    b->answer = b->x + 2 * size;
    b->behind = b->x + 3 * size;
    memcpy(b->x, x, size * sizeof *x);
    dfi_rescale(b->m, size, b->x, 0);
    b->points = (size_t)count - (b->grid[count - 1].sigma <= 0);
    if (b->points > steps && !b->d->continuous && w.variance == DF_VARIANCE_ANALYTIC)
        r = dfi_fail(ctx, DF_ERR_ARGUMENT, "df_variational_bound: variance ANALYTIC has "
                     "eps2 of %d steps, but the grid %d points of sigma > 0: end it at "
                     "the data", (int)steps, (int)b->points);
    if (r == DF_OK && b->d->continuous && b->grid[0].alpha <= 0)
        r = dfi_fail(ctx, DF_ERR_SINGULAR, "df_variational_bound: lambda is infinite at t "
                     "= %g of %s; lower walk.t_max", b->grid[0].t,
                     df_process_name(&b->m->process));
    return r;
}

static df_result dfi_bound_check(df_ctx *ctx, const df_model *m, const df_bound_desc *d,
                                 const df_real *x, int n, const double *out) {
    int steps = dfi_steps_asked(&d->walk), levels = d->levels;
    df_result r;
    if (d->cookie != DFI_COOKIE || d->walk.cookie != DFI_COOKIE || !out || d->draws < 1 ||
        steps < 1 || steps > DFI_MOST_STEPS || levels == 1 || levels < 0 ||
        dfi_mul((size_t)steps + 1, (size_t)d->draws) >= DFI_DRAW_PROBE ||
        (levels > 0 && !(d->low < d->high)) || dfi_nonfinite(d->high - d->low) ||
        (unsigned)d->walk.variance > (unsigned)DF_VARIANCE_ANALYTIC ||
        (d->walk.variance == DF_VARIANCE_ANALYTIC && !d->walk.eps2))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_variational_bound: %d steps, draws %d, "
                        "levels %d from %g to %g, variance %d: want a descriptor of "
                        "df_bound_defaults, out, at least one step and draw, at most 2^29 "
                        "in all, levels 0 or from 2 on, rising, eps2 for ANALYTIC",
                        steps, d->draws, levels,
                        d->low, d->high, (int)d->walk.variance);
    r = dfi_sample_check_model(ctx, m, x, n);
    return r != DF_OK ? r : dfi_rows_finite(ctx, "df_variational_bound", "x", (size_t)n,
                                            (size_t)m->dim, x);
}

DF_API df_result df_variational_bound(df_ctx *ctx, const df_model *model,
                                      const df_bound_desc *desc, const df_real *x, int n,
                                      double *out) {
    df_bound_desc d = desc ? *desc : df_bound_defaults();
    dfi_bound b;
    size_t terms = 3;
    df_scope mark;
    df_result r;
    if (ctx == NULL) return DF_ERR_ARGUMENT;
    r = dfi_bound_check(ctx, model, &d, x, n, out);
    if (r != DF_OK) return r;
    memset(&b, 0, sizeof b);
    b.ctx = ctx, b.m = model, b.d = &d, b.n = (size_t)n, b.dim = (size_t)model->dim;
    mark = dfi_scratch_mark(ctx);
    r = dfi_bound_set(&b, x);
    if (!d.continuous) terms = b.points + 1;
    for (size_t i = 0; i < b.n; i++) out[i] = d.levels > 0 ? 0 : -dfi_log_scale(model);
    for (size_t k = 0; r == DF_OK && k < terms; k++) {
        r = dfi_bound_term(&b, k, terms);
        for (size_t i = 0; r == DF_OK && i < b.n; i++) {
            out[i] -= b.term[i];
            if (d.terms) d.terms[i * terms + k] = b.term[i];
            if (dfi_nonfinite(out[i]))
                r = dfi_fail(ctx, DF_ERR_NONFINITE, "df_variational_bound: term %llu of "
                             "sample %llu is %s", (unsigned long long)k,
                             (unsigned long long)i, dfi_nonfinite_name(b.term[i]));
        }
    }
    dfi_scratch_release(ctx, mark);
    return r;
}

/* ---- levels and bits ---- */

DF_API double df_bits_per_dim(double nats, int dim, double bin) {
    return (-nats / dim - log(bin)) / log(2.0);
}

DF_API void df_dequantize(uint64_t seed, uint64_t first, int n, int dim,
                          const unsigned char *levels, double low, double high,
                          df_real *out) {
    uint32_t bits[4] = { 0, 0, 0, 0 };
    for (int i = 0; i < n; i++)
        for (int j = 0; j < dim; j++) {
            double u;
            if (j % 4 == 0)
                df_random_bits(seed, first + (uint64_t)i, DFI_DRAW_LEVEL, (uint32_t)j / 4,
                               bits);
            u = (bits[j % 4] + .5) / 4294967296.0;
            *out++ = (df_real)(low + (*levels++ + u) * (high - low) / 256);
        }
}

#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#pragma GCC pop_options
#endif

/* =====================================================================================
   // >>tensors: values, reverse mode, forward mode

   A network is a composition y = f_n(... f_1(x)), and the chain rule can be walked from
   either end (Linnainmaa 1970; Griewank & Walther 2008). Reverse mode carries the gradient
   of one number L back: dx += (dy/dx)^T dy, where dx stands for dL/dx; every operation is
   put on a tape as it runs, and df_backward walks the tape from its end. Forward mode
   carries a direction along: x' = v gives y' = (dy/dx) v. A tangent is composed of this
   chapter's own operations, so it is on the tape too and has a gradient itself: score
   matching and flow maps train through such derivatives.

   Each operation is one paragraph: its backward, quoting the forward line ("forward was:
   ..."; dx = g always means "g is added to x's gradient"), its tangent, its forward. What
   is composed of other operations needs neither. Loops are cut into pieces for the workers
   only along independent outputs and sums run in an order that the shapes alone decide, so
   that no result depends on the number of threads, and row i of a batch comes out the
   same, to the bit, in any batch.
   ===================================================================================== */

/* How an operation is differentiated. backward adds to the gradients of those of y's
   inputs that want one; tangent composes y' from the inputs' tangents, of which NULL means
   zero. A failure of either sticks to the context. */
typedef struct dfi_op {
    const char *name;
    void (*backward)(df_ctx *ctx, df_tensor *y);
    df_tensor *(*tangent)(df_ctx *ctx, df_tensor *y);
} dfi_op;

/* ---- shapes, errors, memory ---- */

enum { DFI_SHAPE_TEXT = 64 };  /* "[2147483647,...]" five times */

/* "[8,3,32,32]" into text; returns text. */
static const char *dfi_shape_text(int ndim, const int *shape, char text[DFI_SHAPE_TEXT]) {
    size_t at = 0;
    for (int i = 0; i < ndim && at < DFI_SHAPE_TEXT; i++)
        at += (size_t)snprintf(text + at, DFI_SHAPE_TEXT - at, "%c%d", i ? ',' : '[',
                               shape[i]);
    snprintf(text + (at < DFI_SHAPE_TEXT - 2 ? at : DFI_SHAPE_TEXT - 2), 3,
             ndim > 0 ? "]" : "[]");
    return text;
}
/* "name: a [2,3] and b [4] <why>" */
static df_tensor *dfi_bad_shapes(df_ctx *ctx, const char *name, const char *a_name,
                                 const df_tensor *a, const char *b_name,
                                 const df_tensor *b, const char *why) {
    char s[DFI_SHAPE_TEXT], t[DFI_SHAPE_TEXT];
    return dfi_fail_tensor(ctx, DF_ERR_SHAPE, "%s: %s %s and %s %s %s", name, a_name,
                           dfi_shape_text(a->ndim, a->shape, s), b_name,
                           dfi_shape_text(b->ndim, b->shape, t), why);
}
/* "name: x [2,3] <why>" */
static df_tensor *dfi_bad_shape(df_ctx *ctx, const char *name, const char *x_name,
                                const df_tensor *x, const char *why) {
    char s[DFI_SHAPE_TEXT];
    return dfi_fail_tensor(ctx, DF_ERR_SHAPE, "%s: %s %s %s", name, x_name,
                           dfi_shape_text(x->ndim, x->shape, s), why);
}
/* Makes the context's last error (out of memory, as a rule) the one that sticks. */
static df_tensor *dfi_stick(df_ctx *ctx) {
    if (ctx->stuck != DF_OK) return NULL;
    ctx->stuck = ctx->code;
    memcpy(ctx->stuck_message, ctx->message, sizeof ctx->message);
    return NULL;
}
/* 1 if an operation must not run: after a failure, or without its inputs. A NULL that no
   failure explains is a mistake of the caller's. */
static int dfi_blocked(df_ctx *ctx, const char *name, const void *a, const void *b) {
    if (ctx == NULL || dfi_stuck(ctx) != DF_OK) return 1;
    if (a != NULL && b != NULL) return 0;
    dfi_fail_tensor(ctx, DF_ERR_ARGUMENT, "%s: an input is NULL", name);
    return 1;
}
/* Step memory for n numbers; NULL, and stuck, without. */
static df_real *dfi_reals(df_ctx *ctx, size_t n) {
    df_real *p = (df_real *)dfi_scratch(ctx, dfi_mul(n, sizeof(df_real)));
    if (p == NULL) dfi_stick(ctx);
    return p;
}
/* A tensor of this shape over `data`, or, if that is NULL, over memory of its own that is
   not filled yet. NULL after a failure, if the shape is none, or without memory. */
static df_tensor *dfi_tensor_make(df_ctx *ctx, const char *name, int ndim,
                                  const int *shape, df_real *data) {
    char text[DFI_SHAPE_TEXT];
    df_tensor *y;
    size_t size = 1;
    if (ctx == NULL || dfi_stuck(ctx) != DF_OK) return NULL;
    if (ndim < 0 || ndim > DF_AXES || (ndim > 0 && shape == NULL))
        return dfi_fail_tensor(ctx, DF_ERR_SHAPE, "%s: %d axes, wanted 0 to %d", name,
                               ndim, DF_AXES);
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 1)
            return dfi_fail_tensor(ctx, DF_ERR_SHAPE, "%s: shape %s has an axis below 1",
                                   name, dfi_shape_text(ndim, shape, text));
        size = dfi_mul(size, (size_t)shape[i]);
    }
    if (size > SIZE_MAX / 8 / sizeof(df_real))          /* room for sums of a few sizes */
        return dfi_fail_tensor(ctx, DF_ERR_MEMORY, "%s: no memory for shape %s",
                               name, dfi_shape_text(ndim, shape, text));
    y = (df_tensor *)dfi_scratch(ctx, sizeof *y);
    if (y == NULL) return dfi_stick(ctx);
    memset(y, 0, sizeof *y);
    y->ndim = ndim;
    y->size = size;
    for (int i = 0; i < DF_AXES; i++) y->shape[i] = i < ndim ? shape[i] : 1;
    y->data = data != NULL ? data : dfi_reals(ctx, size);
    return y->data != NULL ? y : NULL;
}
/* ... of x's shape; NULL also if x is. */
static df_tensor *dfi_tensor_like(df_ctx *ctx, const char *name, const df_tensor *x) {
    if (dfi_blocked(ctx, name, x, x)) return NULL;
    return dfi_tensor_make(ctx, name, x->ndim, x->shape, NULL);
}

static int dfi_same_shape(const df_tensor *a, const df_tensor *b) {
    return a->ndim == b->ndim && memcmp(a->shape, b->shape, sizeof a->shape) == 0;
}
/* The axis counted from the front, or -1 with an error. */
static int dfi_axis(df_ctx *ctx, const char *name, const df_tensor *x, int axis) {
    char s[DFI_SHAPE_TEXT];
    int i = axis < 0 ? axis + x->ndim : axis;
    if (i >= 0 && i < x->ndim) return i;
    dfi_fail_tensor(ctx, DF_ERR_SHAPE, "%s: x %s has no axis %d", name,
                    dfi_shape_text(x->ndim, x->shape, s), axis);
    return -1;
}
/* Elements behind an axis: the distance of its neighbours. */
static size_t dfi_inner(const df_tensor *x, int axis) {
    size_t n = 1;
    for (int i = axis + 1; i < x->ndim; i++) n *= (size_t)x->shape[i];
    return n;
}

/* ---- finishing an operation; the tape ---- */

/* Every operation ends here: y = op(a, b, c) goes on the tape if a gradient is wanted of
   it, then its tangent is composed, of recorded operations, from the inputs' tangents. A
   tangent has no tangent of its own: no_tangent ends the recursion. */
static df_tensor *dfi_finish(df_ctx *ctx, df_tensor *y, const dfi_op *op, df_tensor *a,
                             df_tensor *b, df_tensor *c) {
    int need = 0, moving = 0, recorded;
    if (ctx->stuck != DF_OK) return NULL;
    y->op = op;
    y->in[0] = a, y->in[1] = b, y->in[2] = c;
    for (int i = 0; i < 3; i++) {
        need |= y->in[i] != NULL && y->in[i]->needs_grad;
        moving |= y->in[i] != NULL && y->in[i]->tangent != NULL;
    }
    recorded = ctx->recording && need;
    if (recorded) {
        y->needs_grad = 1;
        y->before = ctx->tape;
        ctx->tape = y;
    }
    if (moving && ctx->no_tangent == 0) {
        df_tensor *tangent;
        ctx->no_tangent++;
        tangent = op->tangent(ctx, y);
        ctx->no_tangent--;
        if (dfi_stuck(ctx) != DF_OK) return NULL;
        y->tangent = tangent;
    }
    if (!recorded) {           /* inputs may be gone before y is */
        y->op = NULL;
        y->in[0] = y->in[1] = y->in[2] = NULL;
    }
    return y;
}
/* Where the gradient of input i is added, or NULL if nobody wants it. df_backward has made
   room for it. */
static df_real *dfi_grad(const df_tensor *y, int i) {
    return y->in[i] != NULL && y->in[i]->needs_grad ? y->in[i]->grad : NULL;
}

DF_API void df_record_begin(df_ctx *ctx) {
    if (ctx == NULL) return;
    ctx->recording = 1;
    ctx->tape = NULL;
}
DF_API void df_record_end(df_ctx *ctx) {
    if (ctx == NULL) return;
    ctx->recording = 0;
    ctx->tape = NULL;
}
/* Gradients are made when first added to; 0 without memory. */
static int dfi_make_grad(df_ctx *ctx, df_tensor *x) {
    if (x == NULL || !x->needs_grad || x->grad != NULL) return 1;
    x->grad = dfi_reals(ctx, x->size);
    if (x->grad == NULL) return 0;
    memset(x->grad, 0, x->size * sizeof(df_real));
    return 1;
}

/* dL/dL = 1; then each recorded operation, last first, passes its gradient on. What is
   used several times receives the sum over its uses, dx = sum_y (dy/dx)^T dy, complete
   when its own turn comes, as all uses were recorded after it. A second backward over the
   same tape starts anew for what was recorded; leaves go on adding. */
DF_API df_result df_backward(df_ctx *ctx, df_tensor *loss) {
    char s[DFI_SHAPE_TEXT];
    if (dfi_blocked(ctx, "df_backward", loss, loss))
        return ctx == NULL ? DF_ERR_ARGUMENT : ctx->stuck;
    if (loss->size != 1)
        return dfi_fail(ctx, DF_ERR_SHAPE, "df_backward: loss %s is not one number",
                        dfi_shape_text(loss->ndim, loss->shape, s));
    if (!ctx->recording || !loss->needs_grad)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, ctx->recording ?
                        "df_backward: loss depends on nothing that needs a gradient" :
                        "df_backward: nothing is recorded; call df_record_begin first");
    for (df_tensor *y = loss; y != NULL; y = y->before)
        if (y->op && y->grad) memset(y->grad, 0, y->size * sizeof(df_real));
    if (!dfi_make_grad(ctx, loss)) return ctx->stuck;
    loss->grad[0] += 1;
    for (df_tensor *y = loss; y != NULL; y = y->before) {
        df_scope mark;
        if (y->op == NULL || y->grad == NULL) continue;
        for (int i = 0; i < 3; i++)
            if (!dfi_make_grad(ctx, y->in[i])) return ctx->stuck;
        mark = dfi_scratch_mark(ctx);
        y->op->backward(ctx, y);
        dfi_scratch_release(ctx, mark);
        if (ctx->stuck != DF_OK) return ctx->stuck;
    }
    return DF_OK;
}

/* No operation: the tangent hangs on x until it is replaced. */
DF_API df_result df_set_tangent(df_ctx *ctx, df_tensor *x, df_tensor *tangent) {
    if (dfi_blocked(ctx, "df_set_tangent", x, x))
        return ctx == NULL ? DF_ERR_ARGUMENT : ctx->stuck;
    if (tangent != NULL && !dfi_same_shape(x, tangent)) {
        dfi_bad_shapes(ctx, "df_set_tangent", "x", x, "tangent", tangent, "differ");
        return ctx->stuck;
    }
    x->tangent = tangent;
    return DF_OK;
}

/* ---- scopes ---- */

DF_API df_scope df_scope_begin(df_ctx *ctx) {
    df_scope none = { NULL, 0 };
    return ctx != NULL ? dfi_scratch_mark(ctx) : none;
}

/* One piece of memory that survives the end of a scope. */
typedef struct dfi_move { void *from, *to; size_t bytes; } dfi_move;

/* 1 if p was cut from step memory before q. */
static int dfi_cut_before(df_ctx *ctx, const void *p, const void *q) {
    for (dfi_block *b = ctx->first; b != NULL; b = b->next) {
        uintptr_t data = (uintptr_t)dfi_block_data(b), end = data + b->used;
        int has_p = (uintptr_t)p >= data && (uintptr_t)p < end;
        int has_q = (uintptr_t)q >= data && (uintptr_t)q < end;
        if (has_p || has_q) return has_p && (!has_q || (uintptr_t)p < (uintptr_t)q);
    }
    return 0;
}
/* Adds a piece to the list, in the order in which the stack holds them, if it was made
   since the mark; returns the new length. */
static int dfi_move_add(df_ctx *ctx, df_scope mark, dfi_move *list, int count, void *from,
                        size_t bytes) {
    int i = count;
    if (from == NULL || !dfi_scratch_after(ctx, mark, from)) return count;
    for (int j = 0; j < count; j++)
        if (list[j].from == from) return count;
    for (; i > 0 && dfi_cut_before(ctx, from, list[i - 1].from); i--)
        list[i] = list[i - 1];
    list[i].from = list[i].to = from;
    list[i].bytes = bytes;
    return count + 1;
}
static void *dfi_moved(const dfi_move *list, int count, void *p) {
    for (int i = 0; i < count; i++)
        if (list[i].from == p) return list[i].to;
    return p;
}

/* y, its data and its tangent move down to the mark, lowest piece first: a piece never
   lands above where it was, so none is overwritten before its turn and there is always
   room. What is older than the scope (reshaped, borrowed) stays where it is. */
DF_API df_tensor *df_scope_end(df_ctx *ctx, df_scope scope, df_tensor *y) {
    dfi_move list[4];
    df_tensor *part[2];
    int count = 0;
    if (ctx == NULL || ctx->recording) return y;
    part[0] = y;
    part[1] = y != NULL ? y->tangent : NULL;
    for (int i = 0; i < 2 && part[i] != NULL; i++) {
        size_t bytes = part[i]->size * sizeof(df_real);
        count = dfi_move_add(ctx, scope, list, count, part[i], sizeof *y);
        count = dfi_move_add(ctx, scope, list, count, part[i]->data, bytes);
        if (dfi_scratch_after(ctx, scope, part[i]->grad)) part[i]->grad = NULL;
        part[i]->needs_grad = part[i]->grad != NULL;
        part[i]->op = NULL;
        part[i]->before = part[i]->in[0] = part[i]->in[1] = part[i]->in[2] = NULL;
        if (i == 1) part[1]->tangent = NULL;
    }
    dfi_scratch_release(ctx, scope);
    for (int i = 0; i < count; i++) {
        list[i].to = dfi_scratch(ctx, list[i].bytes);
        if (list[i].to == NULL) return dfi_stick(ctx);
        memmove(list[i].to, list[i].from, list[i].bytes);
    }
    for (int i = 0; i < 2 && part[i] != NULL; i++) {
        part[i] = (df_tensor *)dfi_moved(list, count, part[i]);
        part[i]->data = (df_real *)dfi_moved(list, count, part[i]->data);
    }
    if (y != NULL) part[0]->tangent = part[1];
    return part[0];
}

/* ---- made from nothing ---- */

DF_API df_tensor *df_tensor_fill(df_ctx *ctx, int ndim, const int *shape, double value) {
    df_tensor *y = dfi_tensor_make(ctx, "df_tensor_fill", ndim, shape, NULL);
    for (size_t i = 0; y != NULL && i < y->size; i++) y->data[i] = (df_real)value;
    return y;
}
DF_API df_tensor *df_tensor_new(df_ctx *ctx, int ndim, const int *shape) {
    return df_tensor_fill(ctx, ndim, shape, 0);
}
DF_API df_tensor *df_tensor_number(df_ctx *ctx, double value) {
    return df_tensor_fill(ctx, 0, NULL, value);
}
DF_API df_tensor *df_tensor_copy(df_ctx *ctx, int ndim, const int *shape,
                                 const df_real *data) {
    df_tensor *y;
    if (dfi_blocked(ctx, "df_tensor_copy", data, data)) return NULL;
    y = dfi_tensor_make(ctx, "df_tensor_copy", ndim, shape, NULL);
    if (y != NULL) memcpy(y->data, data, y->size * sizeof(df_real));
    return y;
}
DF_API df_tensor *df_tensor_borrow(df_ctx *ctx, int ndim, const int *shape, df_real *data,
                                   df_real *grad) {
    df_tensor *y;
    if (dfi_blocked(ctx, "df_tensor_borrow", data, data)) return NULL;
    y = dfi_tensor_make(ctx, "df_tensor_borrow", ndim, shape, data);
    if (y == NULL) return NULL;
    y->grad = grad;
    y->needs_grad = grad != NULL;
    return y;
}
/* The gradient is there at once: it reads 0 where the loss does not reach the leaf. */
DF_API df_tensor *df_tensor_need_grad(df_ctx *ctx, df_tensor *x) {
    if (dfi_blocked(ctx, "df_tensor_need_grad", x, x)) return NULL;
    x->needs_grad = 1;
    return dfi_make_grad(ctx, x) ? x : NULL;
}
/* A new leaf over x's data: what comes after it cannot see what x was made of. */
DF_API df_tensor *df_detach(df_ctx *ctx, df_tensor *x) {
    if (dfi_blocked(ctx, "df_detach", x, x)) return NULL;
    return df_tensor_borrow(ctx, x->ndim, x->shape, x->data, NULL);
}

/* ---- loops: pieces for the workers, strides for broadcasting ---- */

enum { DFI_GRAIN = 16384 };    /* elements of a piece: some microseconds of work */

/* Calls fn(arg, from, to) for pieces of [0, n), `cost` elements of work each. The pieces
   depend on n and cost alone. */
typedef struct dfi_split_job {
    void (*fn)(void *arg, size_t from, size_t to);
    void *arg;
    size_t n, piece;
} dfi_split_job;
static void dfi_split_task(void *arg, int index) {
    const dfi_split_job *s = (const dfi_split_job *)arg;
    size_t from = (size_t)index * s->piece;
    s->fn(s->arg, from, s->n - from < s->piece ? s->n : from + s->piece);
}
static void dfi_split(df_ctx *ctx, size_t n, size_t cost,
                      void (*fn)(void *arg, size_t from, size_t to), void *arg) {
    dfi_split_job s;
    s.fn = fn, s.arg = arg, s.n = n;
    s.piece = cost < DFI_GRAIN ? DFI_GRAIN / (cost > 0 ? cost : 1) : 1;
    while (n / s.piece >= INT_MAX) s.piece *= 2;
    dfi_parallel(ctx, (int)((n + s.piece - 1) / s.piece), dfi_split_task, &s);
}

/* A walk over all elements of one contiguous tensor, in order, and over two others beside
   it by steps: 0 where they are stretched. Axes that can be walked as one are merged, so
   that same shapes become one long run, a row vector two axes, a number one axis. */
typedef struct dfi_walk {
    int axes;
    size_t len[DF_AXES];
    size_t step[2][DF_AXES];
} dfi_walk;
static dfi_walk dfi_walk_merge(int ndim, const int *shape, const size_t *a_step,
                               const size_t *b_step) {
    dfi_walk w;
    memset(&w, 0, sizeof w);
    for (int i = 0; i < ndim; i++) {
        size_t len = (size_t)shape[i], s = a_step[i], t = b_step ? b_step[i] : 0;
        int p = w.axes - 1;
        if (len == 1) continue;
        if (p >= 0 && w.step[0][p] == s * len && w.step[1][p] == t * len) {
            w.len[p] *= len;
        } else {
            p = w.axes++;
            w.len[p] = len;
        }
        w.step[0][p] = s, w.step[1][p] = t;
    }
    if (w.axes == 0) w.len[w.axes++] = 1;
    return w;
}
/* Steps of x, aligned at the last axis, along the axes of `big`; NULL: a number. */
static void dfi_walk_steps(const df_tensor *big, const df_tensor *x, size_t *step) {
    size_t n = 1;
    for (int i = big->ndim - 1, j = x ? x->ndim - 1 : -1; i >= 0; i--, j--) {
        int len = j >= 0 ? x->shape[j] : 1;
        step[i] = len == 1 ? 0 : n;
        n *= (size_t)len;
    }
}
static dfi_walk dfi_walk_over(const df_tensor *big, const df_tensor *a,
                              const df_tensor *b) {
    size_t step[2][DF_AXES];
    dfi_walk_steps(big, a, step[0]);
    dfi_walk_steps(big, b, step[1]);
    return dfi_walk_merge(big->ndim, big->shape, step[0], step[1]);
}
/* Where the two others stand when the walk is at element i. */
static void dfi_walk_at(const dfi_walk *w, size_t i, size_t at[2]) {
    at[0] = at[1] = 0;
    for (int k = w->axes - 1; k >= 0; k--) {
        size_t here = k > 0 ? i % w->len[k] : i;
        at[0] += here * w->step[0][k];
        at[1] += here * w->step[1][k];
        i /= w->len[k];
    }
}
/* How many of the elements [from, to) lie in one run along the walk's last axis. */
static size_t dfi_walk_run(const dfi_walk *w, size_t from, size_t to) {
    size_t rest = w->len[w->axes - 1] - from % w->len[w->axes - 1];
    return rest < to - from ? rest : to - from;
}

/* What the pieces of one loop share; each operation uses what it needs. */
typedef struct dfi_job {
    const dfi_kernels *k;
    int kind;
    size_t n;                  /* length of a row */
    df_real number[2];
    dfi_walk walk;
    const df_real *a, *b, *c;
    df_real *y;
} dfi_job;
static dfi_job dfi_job_of(df_ctx *ctx, int kind, const df_real *a, const df_real *b,
                          df_real *y) {
    dfi_job j;
    memset(&j, 0, sizeof j);
    j.k = ctx->k, j.kind = kind;
    j.a = a, j.b = b, j.y = y;
    return j;
}

/* y = a op b, or y += a b, along a walk over y; a and b are stretched to y's shape, which
   may be told apart from the numbers. */
enum { DFI_MULADD = DFI_BINARY_COUNT };

static void dfi_binary_piece(void *arg, size_t from, size_t to) {
    const dfi_job *j = (const dfi_job *)arg;
    int last = j->walk.axes - 1;
    size_t sa = j->walk.step[0][last], sb = j->walk.step[1][last], at[2];
    for (size_t n; from < to; from += n) {
        n = dfi_walk_run(&j->walk, from, to);
        dfi_walk_at(&j->walk, from, at);
        if (j->kind == DFI_MULADD)
            j->k->muladd(n, j->a + at[0], sa, j->b + at[1], sb, j->y + from);
        else
            j->k->binary[j->kind](n, j->a + at[0], sa, j->b + at[1], sb, j->y + from);
    }
}
static void dfi_binary_run(df_ctx *ctx, int kind, const df_tensor *a_shape,
                           const df_real *a, const df_tensor *b_shape, const df_real *b,
                           const df_tensor *y_shape, df_real *y) {
    dfi_job j = dfi_job_of(ctx, kind, a, b, y);
    j.walk = dfi_walk_over(y_shape, a_shape, b_shape);
    dfi_split(ctx, y_shape->size, 1, dfi_binary_piece, &j);
}
/* y = x, or y += x, x stretched to y's shape: the product with 1, which changes no bit. */
static void dfi_spread(df_ctx *ctx, int add, const df_tensor *x_shape, const df_real *x,
                       const df_tensor *y_shape, df_real *y) {
    const df_real one = 1;
    const int kind = add ? (int)DFI_MULADD : (int)DFI_MUL;
    dfi_binary_run(ctx, kind, x_shape, x, NULL, &one, y_shape, y);
}
/* The sum of a large tensor over the axes along which a small one is stretched. Each
   output adds its own terms in the order in which they lie in memory: a place of the kept
   axes names the output, a place of the summed ones (`over`) a block of `rows` terms,
   `stride` apart. Where the last axis is summed a block is one run; else neighbouring
   outputs are summed together, column by column. */
typedef struct dfi_sums {
    const dfi_kernels *k;
    dfi_walk kept, over;       /* steps in the large tensor; `over` without the rows */
    size_t rows, stride, blocks;
    const df_real *a;
    df_real *y;
} dfi_sums;
static void dfi_sum_piece(void *arg, size_t from, size_t to) {
    const dfi_sums *s = (const dfi_sums *)arg;
    size_t at[2], block[2];
    for (size_t n = 1; from < to; from += n) {
        if (s->stride > 1) n = dfi_walk_run(&s->kept, from, to);
        dfi_walk_at(&s->kept, from, at);
        for (size_t i = 0; i < s->blocks; i++) {
            const df_real *a = s->a + at[0];
            dfi_walk_at(&s->over, i, block);
            a += block[0];
            if (s->stride == 1) s->y[from] += (df_real)s->k->sum(s->rows, a);
            else s->k->colsum(s->rows, n, s->stride, a, s->y + from);
        }
    }
}
/* small += the sum of big. Workers take outputs, of columns at least 256 at a time. */
static void dfi_sum_to(df_ctx *ctx, const df_tensor *big_shape, const df_real *big,
                       const df_tensor *small_shape, df_real *small_) {
    dfi_walk w = dfi_walk_over(big_shape, small_shape, NULL);
    size_t inner = big_shape->size, terms = inner / small_shape->size;
    dfi_sums s;
    if (terms == 1) {
        dfi_spread(ctx, 1, big_shape, big, big_shape, small_);
        return;
    }
    memset(&s, 0, sizeof s);
    s.k = ctx->k, s.a = big, s.y = small_;
    for (int i = 0; i < w.axes; i++) {
        dfi_walk *part = w.step[0][i] != 0 ? &s.kept : &s.over;
        inner /= w.len[i];
        part->len[part->axes] = w.len[i];
        part->step[0][part->axes++] = inner;
    }
    s.over.axes--;
    s.rows = s.over.len[s.over.axes], s.stride = s.over.step[0][s.over.axes];
    s.blocks = terms / s.rows;
    if (s.stride > 1 && terms > DFI_GRAIN / 256) terms = DFI_GRAIN / 256;
    dfi_split(ctx, small_shape->size, terms, dfi_sum_piece, &s);
}

/* Numbers move, or are added, between an array walked in order and the places in another
   that the walk's steps give: reading collects from those places, writing puts there. */
enum { DFI_READ = 0, DFI_WRITE = 1, DFI_PLUS = 2 };

static void dfi_strided_piece(void *arg, size_t from, size_t to) {
    const dfi_job *j = (const dfi_job *)arg;
    int writes = j->kind & DFI_WRITE, adds = j->kind & DFI_PLUS;
    size_t step = j->walk.step[0][j->walk.axes - 1], at[2];
    size_t sa = writes ? 1 : step, sy = writes ? step : 1;
    for (size_t n; from < to; from += n) {
        n = dfi_walk_run(&j->walk, from, to);
        dfi_walk_at(&j->walk, from, at);
        const df_real *a = j->a + (writes ? from : at[0]);
        df_real *y = j->y + (writes ? at[0] : from);
        if (step == 1 && adds) j->k->axpy(n, 1, a, y);
        else if (step == 1) memcpy(y, a, n * sizeof *y);
        else if (adds) for (size_t i = 0; i < n; i++) y[i * sy] += a[i * sa];
        else for (size_t i = 0; i < n; i++) y[i * sy] = a[i * sa];
    }
}
static void dfi_strided(df_ctx *ctx, int kind, const df_tensor *walked,
                        const size_t step[DF_AXES], const df_real *a, df_real *y) {
    dfi_job j = dfi_job_of(ctx, kind, a, NULL, y);
    j.walk = dfi_walk_merge(walked->ndim, walked->shape, step, NULL);
    dfi_split(ctx, walked->size, 1, dfi_strided_piece, &j);
}
/* A box and its place in a larger tensor, where its first element stands at `corner`
   (NULL: the origin). */
static void dfi_box(df_ctx *ctx, int kind, const df_tensor *box, const df_tensor *whole,
                    const int *corner, const df_real *a, df_real *y) {
    size_t step[DF_AXES] = {0}, offset = 0;
    for (int i = 0; i < box->ndim; i++) {
        step[i] = dfi_inner(whole, i);
        if (corner != NULL) offset += (size_t)corner[i] * step[i];
    }
    if (kind & DFI_WRITE) y += offset;
    else a += offset;
    dfi_strided(ctx, kind, box, step, a, y);
}

/* The sum of two tangents of which either may be NULL, that is zero. */
static df_tensor *dfi_both(df_ctx *ctx, df_tensor *a, df_tensor *b) {
    return a != NULL && b != NULL ? df_add(ctx, a, b) : a != NULL ? a : b;
}
/* t stretched to y's shape; NULL stays NULL. */
static df_tensor *dfi_stretch(df_ctx *ctx, df_tensor *t, const df_tensor *y) {
    if (t == NULL || dfi_same_shape(t, y)) return t;
    return df_broadcast(ctx, t, y->ndim, y->shape);
}

/* ---- y = a op b, element by element, broadcasting ---- */

/* What a and b stretch to; 0 if they do not fit. */
static int dfi_broadcast_shape(const df_tensor *a, const df_tensor *b, int *ndim,
                               int shape[DF_AXES]) {
    *ndim = a->ndim > b->ndim ? a->ndim : b->ndim;
    for (int i = 1; i <= *ndim; i++) {
        int m = i <= a->ndim ? a->shape[a->ndim - i] : 1;
        int n = i <= b->ndim ? b->shape[b->ndim - i] : 1;
        if (m != n && m != 1 && n != 1) return 0;
        shape[*ndim - i] = m == 1 ? n : m;
    }
    return 1;
}

/* forward was: y =   a + b      a - b      a b          a / b
             da =     dy         dy         dy b         dy / b
             db =     dy        -dy         dy a        -dy y / b
             y' =   a' + b'    a' - b'    a' b + a b'   (a' - y b') / b
   each gradient summed over the axes along which its operand was stretched. A minus is
   brought into a sum by turning db around before and after. */
static void dfi_binary_back(df_ctx *ctx, df_tensor *y) {
    int kind = y->arg[0];
    for (int side = 0; side < 2; side++) {
        df_tensor *x = y->in[side], *z = y->in[kind == DFI_MUL ? 1 - side : 1];
        df_real *dx = dfi_grad(y, side), *g = y->grad;
        int minus = side == 1 && (kind == DFI_SUB || kind == DFI_DIV);
        int same = x->size == y->size, fused = same && kind == DFI_MUL;
        const df_real sign = minus ? -1 : 1;
        if (dx == NULL) continue;
        if (kind == DFI_DIV || (kind == DFI_MUL && !fused)) {
            g = dfi_reals(ctx, y->size);
            if (g == NULL) return;
            dfi_binary_run(ctx, kind, y, y->grad, z, z->data, y, g);
            if (minus) dfi_binary_run(ctx, DFI_MUL, y, g, y, y->data, y, g);
        }
        if (same) {
            dfi_binary_run(ctx, DFI_MULADD, y, g, fused ? z : NULL,
                           fused ? z->data : &sign, y, dx);
            continue;
        }
        if (minus) ctx->k->affine(x->size, -1, dx, 0, dx);
        dfi_sum_to(ctx, y, g, x, dx);
        if (minus) ctx->k->affine(x->size, -1, dx, 0, dx);
    }
}
static df_tensor *dfi_binary_tangent(df_ctx *ctx, df_tensor *y) {
    df_tensor *a = y->in[0], *b = y->in[1], *p = a->tangent, *q = b->tangent;
    int kind = y->arg[0];
    if (p != NULL && kind == DFI_MUL) p = df_mul(ctx, p, b);
    if (p != NULL && kind == DFI_DIV) p = df_div(ctx, p, b);
    if (q != NULL && kind == DFI_MUL) q = df_mul(ctx, a, q);
    if (q != NULL && kind == DFI_DIV) q = df_div(ctx, df_mul(ctx, y, q), b);
    if (q != NULL && (kind == DFI_SUB || kind == DFI_DIV)) q = df_scale(ctx, q, -1);
    return dfi_stretch(ctx, dfi_both(ctx, p, q), y);
}
static const dfi_op dfi_op_binary = {"binary", dfi_binary_back, dfi_binary_tangent};
static df_tensor *dfi_binary(df_ctx *ctx, const char *name, int kind, df_tensor *a,
                             df_tensor *b) {
    int ndim, shape[DF_AXES];
    df_tensor *y;
    if (dfi_blocked(ctx, name, a, b)) return NULL;
    if (!dfi_broadcast_shape(a, b, &ndim, shape))
        return dfi_bad_shapes(ctx, name, "a", a, "b", b, "do not broadcast");
    y = dfi_tensor_make(ctx, name, ndim, shape, NULL);
    if (y == NULL) return NULL;
    y->arg[0] = kind;
    dfi_binary_run(ctx, kind, a, a->data, b, b->data, y, y->data);
    return dfi_finish(ctx, y, &dfi_op_binary, a, b, NULL);
}
#define DFI_BINARY_API(name, kind)                                                        \
    DF_API df_tensor *name(df_ctx *ctx, df_tensor *a, df_tensor *b) {                     \
        return dfi_binary(ctx, #name, kind, a, b);                                        \
    }
DFI_BINARY_API(df_add, DFI_ADD)
DFI_BINARY_API(df_sub, DFI_SUB)
DFI_BINARY_API(df_mul, DFI_MUL)
DFI_BINARY_API(df_div, DFI_DIV)
#undef DFI_BINARY_API

/* ---- y = a x + b and y = f(x), element by element ---- */

/* forward was: y = a x + b      y = f(x)
             dx = a dy         dx = f'(x) dy
             y' = a x'         y' = f'(x) x'
   A kernel knows f, another dx from x, y and dy. For the tangent f' is written once more
   in recorded operations, as it needs a derivative of its own there. */
enum { DFI_AFFINE = DFI_UNARY_COUNT };

static void dfi_map_piece(void *arg, size_t from, size_t to) {
    const dfi_job *j = (const dfi_job *)arg;
    const df_real *a = j->a + from;
    df_real *y = j->y + from;
    size_t n = to - from;
    if (j->kind == DFI_AFFINE) j->k->affine(n, j->number[0], a, j->number[1], y);
    else if (j->c == NULL) j->k->unary[j->kind](n, a, y);
    else j->k->unary_back[j->kind](n, a, j->b + from, j->c + from, y);
}
static df_tensor *dfi_map(df_ctx *ctx, const dfi_op *op, int kind, df_tensor *x, double a,
                          double b) {
    dfi_job j;
    df_tensor *y = dfi_tensor_like(ctx, op->name, x);
    if (y == NULL) return NULL;
    y->arg[0] = kind, y->number[0] = a;
    j = dfi_job_of(ctx, kind, x->data, NULL, y->data);
    j.number[0] = (df_real)a, j.number[1] = (df_real)b;
    dfi_split(ctx, y->size, 1, dfi_map_piece, &j);
    return dfi_finish(ctx, y, op, x, NULL, NULL);
}
static void dfi_affine_back(df_ctx *ctx, df_tensor *y) {
    const df_real a = (df_real)y->number[0];
    dfi_binary_run(ctx, DFI_MULADD, y, y->grad, NULL, &a, y, y->in[0]->grad);
}
static df_tensor *dfi_affine_tangent(df_ctx *ctx, df_tensor *y) {
    return df_scale(ctx, y->in[0]->tangent, y->number[0]);
}
static const dfi_op dfi_op_affine = {"df_affine", dfi_affine_back, dfi_affine_tangent};
DF_API df_tensor *df_affine(df_ctx *ctx, df_tensor *x, double a, double b) {
    return dfi_map(ctx, &dfi_op_affine, DFI_AFFINE, x, a, b);
}
DF_API df_tensor *df_scale(df_ctx *ctx, df_tensor *x, double a) {
    return df_affine(ctx, x, a, 0);
}
DF_API df_tensor *df_square(df_ctx *ctx, df_tensor *x) { return df_mul(ctx, x, x); }

static void dfi_unary_back(df_ctx *ctx, df_tensor *y) {
    dfi_job j = dfi_job_of(ctx, y->arg[0], y->in[0]->data, y->data, y->in[0]->grad);
    j.c = y->grad;
    dfi_split(ctx, y->size, 1, dfi_map_piece, &j);
}

/* y = x s, s = sigmoid(u(x)):  y' = s + y (1 - s) u', for SiLU with u = x (Elfwing
   et al. 2018), ... */
static df_tensor *dfi_silu_slope(df_ctx *ctx, df_tensor *x, df_tensor *y) {
    df_tensor *s = df_sigmoid(ctx, x);
    return df_add(ctx, s, df_mul(ctx, y, df_affine(ctx, s, -1, 1)));
}
/* ... and for the tanh form of GELU (Hendrycks & Gimpel 2016), as (1 + tanh z)/2 =
   sigmoid(2z): u = 2c (x + a x^3), u' = 2c (1 + 3a x^2), c = sqrt(2/pi), a = 0.044715. */
static df_tensor *dfi_gelu_tanh_slope(df_ctx *ctx, df_tensor *x, df_tensor *y) {
    const double c2 = 2 * sqrt(2 / DFI_PI), a = 0.044715;
    df_tensor *x2 = df_square(ctx, x);
    df_tensor *s = df_sigmoid(ctx, df_mul(ctx, x, df_affine(ctx, x2, c2 * a, c2)));
    df_tensor *rest = df_mul(ctx, y, df_affine(ctx, s, -1, 1));
    return df_add(ctx, s, df_mul(ctx, rest, df_affine(ctx, x2, 3 * c2 * a, c2)));
}
/* y = x Phi(x), Phi(x) = (1 + erf(x/sqrt 2))/2:  y' = Phi + x exp(-x^2/2)/sqrt(2 pi) */
static df_tensor *dfi_gelu_slope(df_ctx *ctx, df_tensor *x) {
    df_tensor *e = df_erf(ctx, df_scale(ctx, x, sqrt(0.5)));
    df_tensor *phi = df_exp(ctx, df_scale(ctx, df_square(ctx, x), -0.5));
    phi = df_mul(ctx, x, df_scale(ctx, phi, 1 / sqrt(2 * DFI_PI)));
    return df_add(ctx, df_affine(ctx, e, 0.5, 0.5), phi);
}

/* Name, kernel, and f'(x) in terms of x and y = f(x). Where y makes it cheaper it is
   used: exp' = y, sqrt' = 1/2y, tanh' = 1 - y^2, sigmoid' = y (1 - y); softplus' =
   sigmoid; erf' = 2/sqrt(pi) exp(-x^2); relu' is the step, whose own derivative counts as
   0. */
#define DFI_UNARY(f, kind, slope)                                                         \
    static df_tensor *dfi_##f##_tangent(df_ctx *c, df_tensor *y) {                        \
        df_tensor *x = y->in[0];                                                          \
        return df_mul(c, slope, x->tangent);                                              \
    }                                                                                     \
    static const dfi_op dfi_op_##f = {"df_" #f, dfi_unary_back, dfi_##f##_tangent};       \
    DF_API df_tensor *df_##f(df_ctx *c, df_tensor *x) {                                   \
        return dfi_map(c, &dfi_op_##f, kind, x, 0, 0);                                    \
    }
DFI_UNARY(exp, DFI_EXP, y)
DFI_UNARY(log, DFI_LOG, df_div(c, df_tensor_number(c, 1), x))
DFI_UNARY(sqrt, DFI_SQRT, df_div(c, df_tensor_number(c, 0.5), y))
DFI_UNARY(sin, DFI_SIN, df_cos(c, x))
DFI_UNARY(cos, DFI_COS, df_scale(c, df_sin(c, x), -1))
DFI_UNARY(tanh, DFI_TANH, df_affine(c, df_square(c, y), -1, 1))
DFI_UNARY(sigmoid, DFI_SIGMOID, df_mul(c, y, df_affine(c, y, -1, 1)))
DFI_UNARY(silu, DFI_SILU, dfi_silu_slope(c, x, y))
DFI_UNARY(gelu, DFI_GELU_ERF, dfi_gelu_slope(c, x))
DFI_UNARY(gelu_tanh, DFI_GELU_TANH, dfi_gelu_tanh_slope(c, x, y))
DFI_UNARY(erf, DFI_ERF, df_scale(c, df_exp(c, df_mul(c, x, df_scale(c, x, -1))),
                                 2 / sqrt(DFI_PI)))
DFI_UNARY(relu, DFI_RELU, df_step(c, x))
DFI_UNARY(step, DFI_STEP, df_tensor_number(c, 0))
DFI_UNARY(softplus, DFI_SOFTPLUS, df_sigmoid(c, x))
#undef DFI_UNARY

/* ---- stretching, sums, other shapes ---- */

/* forward was: y = x stretched     y = x summed        y = x in another shape, sharing
             dx = dy summed        dx = dy stretched      its data; dx = dy
             y' = x' stretched     y' = x' summed         y' = x' in that shape
   Three linear maps, told apart by size; a stretching and a sum are each other's
   transpose. */
static df_tensor *dfi_sum(df_ctx *ctx, const char *name, df_tensor *x, int ndim,
                          const int *shape);

static void dfi_shape_back(df_ctx *ctx, df_tensor *y) {
    df_tensor *x = y->in[0];
    if (y->size < x->size) dfi_spread(ctx, 1, y, y->grad, x, x->grad);
    else dfi_sum_to(ctx, y, y->grad, x, x->grad);
}
static df_tensor *dfi_shape_tangent(df_ctx *ctx, df_tensor *y) {
    df_tensor *t = y->in[0]->tangent;
    if (y->size < t->size) return dfi_sum(ctx, "df_sum", t, y->ndim, y->shape);
    if (y->size > t->size) return df_broadcast(ctx, t, y->ndim, y->shape);
    return df_reshape(ctx, t, y->ndim, y->shape);
}
static const dfi_op dfi_op_shape = {"shape", dfi_shape_back, dfi_shape_tangent};
DF_API df_tensor *df_broadcast(df_ctx *ctx, df_tensor *x, int ndim, const int *shape) {
    int fit_ndim, fit[DF_AXES];
    df_tensor *y;
    if (dfi_blocked(ctx, "df_broadcast", x, x)) return NULL;
    y = dfi_tensor_make(ctx, "df_broadcast", ndim, shape, NULL);
    if (y == NULL) return NULL;
    if (!dfi_broadcast_shape(x, y, &fit_ndim, fit) || fit_ndim != ndim ||
        memcmp(fit, y->shape, (size_t)ndim * sizeof *fit) != 0)
        return dfi_bad_shapes(ctx, "df_broadcast", "x", x, "shape", y, "do not fit");
    dfi_spread(ctx, 0, x, x->data, y, y->data);
    return dfi_finish(ctx, y, &dfi_op_shape, x, NULL, NULL);
}
DF_API df_tensor *df_reshape(df_ctx *ctx, df_tensor *x, int ndim, const int *shape) {
    int full[DF_AXES] = {1, 1, 1, 1, 1}, open = -1;
    size_t known = 1;
    df_tensor *y;
    if (dfi_blocked(ctx, "df_reshape", x, x)) return NULL;
    for (int i = 0; i < ndim && i < DF_AXES && shape != NULL; i++) {
        full[i] = shape[i];
        if (shape[i] == -1 && open < 0) open = i;
        else if (shape[i] > 0) known = dfi_mul(known, (size_t)shape[i]);
    }
    if (open >= 0 && x->size % known == 0 && x->size / known <= INT_MAX)
        full[open] = (int)(x->size / known);
    else if (open >= 0)
        return dfi_bad_shape(ctx, "df_reshape", "x", x, "leaves no whole number for -1");
    y = dfi_tensor_make(ctx, "df_reshape", ndim, shape != NULL ? full : NULL, x->data);
    if (y == NULL) return NULL;
    if (y->size != x->size)
        return dfi_bad_shapes(ctx, "df_reshape", "x", x, "shape", y, "differ in size");
    return dfi_finish(ctx, y, &dfi_op_shape, x, NULL, NULL);
}
/* The sum to a shape that stretches to x's. */
static df_tensor *dfi_sum(df_ctx *ctx, const char *name, df_tensor *x, int ndim,
                          const int *shape) {
    df_tensor *y;
    if (dfi_blocked(ctx, name, x, x)) return NULL;
    y = df_tensor_new(ctx, ndim, shape);
    if (y == NULL) return NULL;
    dfi_sum_to(ctx, x, x->data, y, y->data);
    return dfi_finish(ctx, y, &dfi_op_shape, x, NULL, NULL);
}
DF_API df_tensor *df_sum(df_ctx *ctx, df_tensor *x) {
    return dfi_sum(ctx, "df_sum", x, 0, NULL);
}
DF_API df_tensor *df_mean(df_ctx *ctx, df_tensor *x) {
    df_tensor *y = dfi_sum(ctx, "df_mean", x, 0, NULL);
    return y != NULL ? df_scale(ctx, y, 1 / (double)x->size) : NULL;
}
/* Composed: y = sum_i x[.., i, ..], or <x[.., i, ..]>, so that each dx = dy or dy/n;
   unless it is kept, the axis goes. */
static df_tensor *dfi_sum_axis(df_ctx *ctx, const char *name, df_tensor *x, int axis,
                               int keep, int mean) {
    int shape[DF_AXES], n;
    df_tensor *y;
    if (dfi_blocked(ctx, name, x, x)) return NULL;
    axis = dfi_axis(ctx, name, x, axis);
    if (axis < 0) return NULL;
    memcpy(shape, x->shape, sizeof shape);
    n = shape[axis];
    shape[axis] = 1;
    y = dfi_sum(ctx, name, x, x->ndim, shape);
    if (y != NULL && mean) y = df_scale(ctx, y, 1.0 / n);
    if (y == NULL || keep) return y;
    for (int i = axis; i < DF_AXES - 1; i++) shape[i] = shape[i + 1];
    return df_reshape(ctx, y, x->ndim - 1, shape);
}
DF_API df_tensor *df_sum_axis(df_ctx *ctx, df_tensor *x, int axis, int keep) {
    return dfi_sum_axis(ctx, "df_sum_axis", x, axis, keep, 0);
}
DF_API df_tensor *df_mean_axis(df_ctx *ctx, df_tensor *x, int axis, int keep) {
    return dfi_sum_axis(ctx, "df_mean_axis", x, axis, keep, 1);
}

/* ---- boxes, axes ---- */

/* Concatenation and padding place one or two boxes in a larger tensor, a at the origin, b
   with its first element at `corner`:
   forward was: y[box of a] = a, y[box of b] = b, 0 elsewhere
             da = dy[box of a], db = dy[box of b]
             y' = a' and b' placed the same; where one is missing, 0 */
static df_tensor *dfi_arrange(df_ctx *ctx, const char *name, int ndim, const int *shape,
                            df_tensor *a, df_tensor *b, const int *corner);

static void dfi_arrange_back(df_ctx *ctx, df_tensor *y) {
    for (int i = 0; i < 2; i++)
        if (dfi_grad(y, i))
            dfi_box(ctx, DFI_READ | DFI_PLUS, y->in[i], y, i ? y->arg : NULL, y->grad,
                    dfi_grad(y, i));
}
static df_tensor *dfi_arrange_tangent(df_ctx *ctx, df_tensor *y) {
    df_tensor *a = y->in[0] ? y->in[0]->tangent : NULL;
    return dfi_arrange(ctx, "df_concat", y->ndim, y->shape, a, y->in[1]->tangent, y->arg);
}
static const dfi_op dfi_op_arrange = {"arrange", dfi_arrange_back, dfi_arrange_tangent};
static df_tensor *dfi_arrange(df_ctx *ctx, const char *name, int ndim, const int *shape,
                            df_tensor *a, df_tensor *b, const int *corner) {
    size_t placed = (a ? a->size : 0) + (b ? b->size : 0);
    df_tensor *y = dfi_tensor_make(ctx, name, ndim, shape, NULL);
    if (y == NULL) return NULL;
    if (placed < y->size) memset(y->data, 0, y->size * sizeof(df_real));
    memcpy(y->arg, corner, DF_AXES * sizeof *corner);
    if (a) dfi_box(ctx, DFI_WRITE, a, y, NULL, a->data, y->data);
    if (b) dfi_box(ctx, DFI_WRITE, b, y, corner, b->data, y->data);
    return dfi_finish(ctx, y, &dfi_op_arrange, a, b, NULL);
}
DF_API df_tensor *df_concat(df_ctx *ctx, df_tensor *a, df_tensor *b, int axis) {
    int shape[DF_AXES], corner[DF_AXES] = {0}, fits;
    if (dfi_blocked(ctx, "df_concat", a, b)) return NULL;
    axis = dfi_axis(ctx, "df_concat", a, axis);
    if (axis < 0) return NULL;
    memcpy(shape, a->shape, sizeof shape);
    fits = a->ndim == b->ndim && shape[axis] <= INT_MAX - b->shape[axis];
    shape[axis] = b->shape[axis];
    if (!fits || memcmp(shape, b->shape, sizeof shape) != 0)
        return dfi_bad_shapes(ctx, "df_concat", "a", a, "b", b, "differ beside the axis");
    corner[axis] = a->shape[axis];
    shape[axis] += a->shape[axis];
    return dfi_arrange(ctx, "df_concat", a->ndim, shape, a, b, corner);
}
DF_API df_tensor *df_pad2d(df_ctx *ctx, df_tensor *x, int top, int bottom, int left,
                           int right) {
    const int most = INT_MAX / 4;
    int margin[4], shape[DF_AXES], corner[DF_AXES] = {0};
    if (dfi_blocked(ctx, "df_pad2d", x, x)) return NULL;
    if (x->ndim != 4 || x->shape[2] > most || x->shape[3] > most)
        return dfi_bad_shape(ctx, "df_pad2d", "x", x, "is not [B,C,H,W]");
    margin[0] = top, margin[1] = bottom, margin[2] = left, margin[3] = right;
    memcpy(shape, x->shape, sizeof shape);
    for (int i = 0; i < 4; i++) {
        if (margin[i] < 0 || margin[i] > most)
            return dfi_fail_tensor(ctx, DF_ERR_ARGUMENT, "df_pad2d: margin %d is %d, "
                                   "wanted 0 or more", i, margin[i]);
        shape[2 + i / 2] += margin[i];
    }
    corner[2] = top, corner[3] = left;
    return dfi_arrange(ctx, "df_pad2d", 4, shape, NULL, x, corner);
}

/* forward was: y = x[..., start : start + length, ...]
             dx[..., start : start + length, ...] = dy
             y' = x'[..., start : start + length, ...] */
static void dfi_slice_back(df_ctx *ctx, df_tensor *y) {
    df_tensor *x = y->in[0];
    dfi_box(ctx, DFI_WRITE | DFI_PLUS, y, x, y->arg, y->grad, x->grad);
}
static df_tensor *dfi_slice_tangent(df_ctx *ctx, df_tensor *y) {
    int axis = y->arg[DF_AXES];
    return df_slice(ctx, y->in[0]->tangent, axis, y->arg[axis], y->shape[axis]);
}
static const dfi_op dfi_op_slice = {"df_slice", dfi_slice_back, dfi_slice_tangent};
DF_API df_tensor *df_slice(df_ctx *ctx, df_tensor *x, int axis, int start, int length) {
    char s[DFI_SHAPE_TEXT];
    int shape[DF_AXES];
    df_tensor *y;
    if (dfi_blocked(ctx, "df_slice", x, x)) return NULL;
    axis = dfi_axis(ctx, "df_slice", x, axis);
    if (axis < 0) return NULL;
    if (start < 0 || length < 1 || start > x->shape[axis] - length)
        return dfi_fail_tensor(ctx, DF_ERR_SHAPE,
                               "df_slice: x %s, axis %d has no %d elements from %d on",
                               dfi_shape_text(x->ndim, x->shape, s), axis, length, start);
    memcpy(shape, x->shape, sizeof shape);
    shape[axis] = length;
    y = dfi_tensor_make(ctx, "df_slice", x->ndim, shape, NULL);
    if (y == NULL) return NULL;
    y->arg[axis] = start, y->arg[DF_AXES] = axis;
    dfi_box(ctx, DFI_READ, y, x, y->arg, x->data, y->data);
    return dfi_finish(ctx, y, &dfi_op_slice, x, NULL, NULL);
}

/* forward was: y[i] = x[p(i)], p another order of the axes
             dx[p(i)] = dy[i], that is dx[j] = dy[p^-1(j)], read in x's order
             y'[i] = x'[p(i)] */
static void dfi_permute_back(df_ctx *ctx, df_tensor *y) {
    size_t step[DF_AXES] = {0};
    for (int i = 0; i < y->ndim; i++) step[y->arg[i]] = dfi_inner(y, i);
    dfi_strided(ctx, DFI_READ | DFI_PLUS, y->in[0], step, y->grad, y->in[0]->grad);
}
static df_tensor *dfi_permute_tangent(df_ctx *ctx, df_tensor *y) {
    return df_permute(ctx, y->in[0]->tangent, y->arg);
}
static const dfi_op dfi_op_permute = {"df_permute", dfi_permute_back, dfi_permute_tangent};
DF_API df_tensor *df_permute(df_ctx *ctx, df_tensor *x, const int *order) {
    int shape[DF_AXES], seen = 0;
    size_t step[DF_AXES] = {0};
    df_tensor *y;
    if (dfi_blocked(ctx, "df_permute", x, order)) return NULL;
    for (int i = 0; i < x->ndim; i++) {
        if (order[i] < 0 || order[i] >= x->ndim || (seen & (1 << order[i])) != 0)
            return dfi_fail_tensor(ctx, DF_ERR_ARGUMENT,
                                   "df_permute: order[%d] = %d, wanted 0 to %d once each",
                                   i, order[i], x->ndim - 1);
        seen |= 1 << order[i];
        shape[i] = x->shape[order[i]];
        step[i] = dfi_inner(x, order[i]);
    }
    y = dfi_tensor_make(ctx, "df_permute", x->ndim, shape, NULL);
    if (y == NULL) return NULL;
    for (int i = 0; i < x->ndim; i++) y->arg[i] = order[i];
    dfi_strided(ctx, DFI_READ, y, step, x->data, y->data);
    return dfi_finish(ctx, y, &dfi_op_permute, x, NULL, NULL);
}

/* ---- matrix products ---- */

/* A stored matrix, rows `ld` apart, as an operand: t reads it transposed. The next one of
   a batch stands `step` behind it. */
typedef struct dfi_matrix {
    const df_real *at;
    size_t ld, step;
    int t;
} dfi_matrix;
static dfi_matrix dfi_matrix_of(const df_real *at, size_t ld, size_t step, int t) {
    dfi_matrix m;
    m.at = at, m.ld = ld, m.step = step, m.t = t;
    return m;
}
static dfi_matrix dfi_transposed(dfi_matrix m) {
    m.t = !m.t;
    return m;
}
/* C (+)= A B for n matrices of M x K and K x N; a failure sticks. */
static void dfi_product(df_ctx *ctx, size_t n, size_t M, size_t N, size_t K, dfi_matrix a,
                        dfi_matrix b, int add, df_real *c, size_t ldc, size_t step) {
    if (dfi_gemm_batch(ctx, a.t, b.t, n, M, N, K, a.at, a.ld, a.step, b.at, b.ld, b.step,
                       add, c, ldc, step) != DF_OK) dfi_stick(ctx);
}

/* Y = A B for every place of the leading axes, A and B as stored or transposed. Where B is
   one matrix for all, the rows of all A are one tall matrix. */
typedef struct dfi_products {
    int t[2];
    size_t M, N, K, batch;
    dfi_walk walk;             /* over the leading axes; steps count matrices */
} dfi_products;
static dfi_products dfi_products_of(const df_tensor *a, const df_tensor *b,
                                    const df_tensor *y) {
    dfi_products p;
    df_tensor la = *a, lb = *b, ly = *y;
    p.t[0] = y->arg[0], p.t[1] = y->arg[1];
    p.M = (size_t)y->shape[y->ndim - 2];
    p.N = (size_t)y->shape[y->ndim - 1];
    p.K = (size_t)a->shape[a->ndim - (p.t[0] ? 2 : 1)];
    if (b->ndim == 2 && !p.t[0]) {
        p.M = y->size / p.N;
        ly.ndim = la.ndim = lb.ndim = 2;
    }
    p.batch = y->size / (p.M * p.N);
    la.ndim -= 2, lb.ndim -= 2, ly.ndim -= 2;
    p.walk = dfi_walk_over(&ly, &la, &lb);
    return p;
}
/* A (side 0) or B of place i, and by its step of the places after it on the last axis. */
static dfi_matrix dfi_operand(const dfi_products *p, int side, const df_tensor *x,
                              size_t i) {
    size_t rows = side ? p->K : p->M, cols = side ? p->N : p->K, at[2];
    size_t step = p->walk.step[side][p->walk.axes - 1] * rows * cols;
    dfi_walk_at(&p->walk, i, at);
    return dfi_matrix_of(x->data + at[side] * rows * cols, p->t[side] ? rows : cols, step,
                         p->t[side]);
}

/* forward was: Y = A B + c, the row c on each row
             dA = dY B^T, dB = A^T dY, dc = the sum of dY's rows
             Y' = A' B + c' + A B'
   Places that share a matrix add to its gradient one after the other. Where A is stored
   transposed, so is its gradient: (dY B^T)^T = B dY^T. */
static void dfi_matmul_back(df_ctx *ctx, df_tensor *y) {
    dfi_products p = dfi_products_of(y->in[0], y->in[1], y);
    size_t M = p.M, N = p.N, K = p.K, last = (size_t)p.walk.axes - 1, n;
    for (int side = 0; side < 2; side++) {
        df_real *d = dfi_grad(y, side);
        n = p.walk.step[side][last] ? p.walk.len[last] : 1;
        for (size_t i = 0; d != NULL && i < p.batch; i += n) {
            dfi_matrix dy = dfi_matrix_of(y->grad + i * M * N, N, M * N, 0);
            dfi_matrix x = dfi_operand(&p, side, y->in[side], i);
            dfi_matrix z = dfi_transposed(dfi_operand(&p, 1 - side, y->in[1 - side], i));
            dfi_matrix left = side ? z : dy, right = side ? dy : z;
            size_t rows = side ? K : M, cols = side ? N : K, inner = side ? M : N;
            df_real *to = d + (x.at - y->in[side]->data);
            if (x.t)
                dfi_product(ctx, n, cols, rows, inner, dfi_transposed(right),
                            dfi_transposed(left), 1, to, rows, x.step);
            else dfi_product(ctx, n, rows, cols, inner, left, right, 1, to, cols, x.step);
        }
    }
    if (dfi_grad(y, 2)) dfi_sum_to(ctx, y, y->grad, y->in[2], dfi_grad(y, 2));
}
static df_tensor *dfi_matmul_tangent(df_ctx *ctx, df_tensor *y) {
    df_tensor *a = y->in[0], *b = y->in[1], *c = y->in[2] ? y->in[2]->tangent : NULL;
    df_tensor *p = NULL, *q = NULL;
    if (a->tangent) p = df_matmul(ctx, a->tangent, b, y->arg[0], y->arg[1]);
    if (b->tangent) q = df_matmul(ctx, a, b->tangent, y->arg[0], y->arg[1]);
    return dfi_stretch(ctx, dfi_both(ctx, dfi_both(ctx, p, q), c), y);
}
static const dfi_op dfi_op_matmul = {"df_matmul", dfi_matmul_back, dfi_matmul_tangent};
static df_tensor *dfi_multiply(df_ctx *ctx, const char *name, df_tensor *a, df_tensor *b,
                               df_tensor *c, int ta, int tb) {
    int shape[DF_AXES], ndim;
    size_t run;
    dfi_products p;
    df_tensor *y, la, lb;
    if (dfi_blocked(ctx, name, a, b)) return NULL;
    if (a->ndim < 2 || b->ndim < 2)
        return dfi_bad_shapes(ctx, name, "a", a, "b", b, "must have 2 axes each");
    la = *a, lb = *b;
    la.ndim -= 2, lb.ndim -= 2;
    if (a->shape[a->ndim - (ta ? 2 : 1)] != b->shape[b->ndim - (tb ? 1 : 2)] ||
        !dfi_broadcast_shape(&la, &lb, &ndim, shape))
        return dfi_bad_shapes(ctx, name, ta ? "a^T" : "a", a, tb ? "b^T" : "b", b,
                              "do not multiply");
    shape[ndim] = a->shape[a->ndim - (ta ? 1 : 2)];
    shape[ndim + 1] = b->shape[b->ndim - (tb ? 2 : 1)];
    y = dfi_tensor_make(ctx, name, ndim + 2, shape, NULL);
    if (y == NULL) return NULL;
    y->arg[0] = ta, y->arg[1] = tb;
    if (c) dfi_spread(ctx, 0, c, c->data, y, y->data);
    p = dfi_products_of(a, b, y);
    run = p.walk.len[p.walk.axes - 1];
    for (size_t i = 0; i < p.batch; i += run)
        dfi_product(ctx, run, p.M, p.N, p.K, dfi_operand(&p, 0, a, i),
                    dfi_operand(&p, 1, b, i), c != NULL, y->data + i * p.M * p.N, p.N,
                    p.M * p.N);
    return dfi_finish(ctx, y, &dfi_op_matmul, a, b, c);
}
DF_API df_tensor *df_matmul(df_ctx *ctx, df_tensor *a, df_tensor *b, int ta, int tb) {
    return dfi_multiply(ctx, "df_matmul", a, b, NULL, ta != 0, tb != 0);
}

/* Y = X W^T + b, the product above: dX = dY W, dW = dY^T X, db = the sum of dY's rows.
   One vector x is a matrix of one row. */
DF_API df_tensor *df_linear(df_ctx *ctx, df_tensor *x, df_tensor *weight,
                            df_tensor *bias) {
    int row[2] = {1, -1};
    df_tensor *y;
    if (dfi_blocked(ctx, "df_linear", x, weight)) return NULL;
    if (x->ndim < 1 || weight->ndim != 2 || x->shape[x->ndim - 1] != weight->shape[1])
        return dfi_bad_shapes(ctx, "df_linear", "x", x, "weight", weight,
                              "do not fit: x [...,in], weight [out,in]");
    if (bias != NULL && (bias->ndim != 1 || bias->shape[0] != weight->shape[0]))
        return dfi_bad_shapes(ctx, "df_linear", "weight", weight, "bias", bias,
                              "do not fit: weight [out,in], bias [out]");
    if (x->ndim > 1) return dfi_multiply(ctx, "df_linear", x, weight, bias, 0, 1);
    y = dfi_multiply(ctx, "df_linear", df_reshape(ctx, x, 2, row), weight, bias, 0, 1);
    return y != NULL ? df_reshape(ctx, y, 1, weight->shape) : NULL;
}

/* ---- images ---- */

/* forward was: y[b] = W col(x[b]) + bias
             dW = sum_b dy[b] col(x[b])^T
             dx[b] = the columns of W^T dy[b], each put back to where it was read
             dbias = sum_b sum_p dy[b, :, p]
             y' = conv(x', W) + bias' + conv(x, W')
   where column p of col holds the C kh kw values that output pixel p looks at (Chellapilla
   et al. 2006). Columns are made for some samples at a time, or, if an image is large, for
   some of its rows: as much as stays in the cache. How much depends on one sample's shape
   alone. A 1x1 kernel needs no columns: they are x. Most 3x3 kernels go another way, by
   fewer products: dfi_wino_conv. */
typedef struct dfi_conv {
    size_t B, C, H, W, O, kh, kw, stride, pad, Ho, Wo;
    size_t K, P;               /* height of a column, pixels of the result */
    dfi_image image;           /* B, C, O, H, W once more */
    int fewer;                 /* by dfi_wino_conv */
    int direct;                /* columns are x itself */
    int back;                  /* columns go to dx instead of coming from x */
    size_t samples, rows;      /* how much of the result at a time */
    size_t b, row, n_samples, n_rows;  /* the current part ... */
    size_t pixels, at;         /* ... has so many pixels, the first here in y */
    const df_real *x;
    df_real *columns, *dx;
} dfi_conv;
enum { DFI_COLUMNS = 1 << 19 };    /* elements: 2 MiB of float */

/* Sizes, and room for the columns; 0 without memory. */
static int dfi_conv_begin(df_ctx *ctx, dfi_conv *c, const df_tensor *x, const df_tensor *w,
                          const df_tensor *y) {
    memset(c, 0, sizeof *c);
    c->B = (size_t)x->shape[0], c->C = (size_t)x->shape[1];
    c->H = (size_t)x->shape[2], c->W = (size_t)x->shape[3];
    c->O = (size_t)w->shape[0], c->kh = (size_t)w->shape[2], c->kw = (size_t)w->shape[3];
    c->Ho = (size_t)y->shape[2], c->Wo = (size_t)y->shape[3];
    c->stride = (size_t)y->arg[0], c->pad = (size_t)y->arg[1];
    c->K = c->C * c->kh * c->kw, c->P = c->Ho * c->Wo;
    c->x = x->data;
    c->direct = c->kh == 1 && c->kw == 1 && c->stride == 1 && c->pad == 0;
    c->samples = c->B, c->rows = c->Ho;
    c->image.B = c->B, c->image.C = c->C, c->image.O = c->O;
    c->image.H = c->H, c->image.W = c->W;
    c->fewer = c->kh == 3 && c->kw == 3 && c->stride == 1 && c->pad == 1 &&
               dfi_wino_fits(&c->image);
    if (c->direct || c->fewer) return 1;
    c->rows = DFI_COLUMNS / dfi_mul(c->K, c->Wo);
    c->rows = c->rows < 1 ? 1 : c->rows < c->Ho ? c->rows : c->Ho;
    c->samples = c->rows < c->Ho ? 1 : DFI_COLUMNS / dfi_mul(c->K, c->P);
    c->samples = c->samples < 1 ? 1 : c->samples < c->B ? c->samples : c->B;
    c->columns = dfi_reals(ctx, dfi_mul(dfi_mul(c->samples, c->K), c->rows * c->Wo));
    return c->columns != NULL;
}
/* Moves on to the next part; 0 at the end. */
static int dfi_conv_next(dfi_conv *c) {
    c->row += c->n_rows;
    if (c->row == c->Ho) c->row = 0;
    if (c->row == 0) c->b += c->n_samples;
    if (c->b == c->B) return 0;
    c->n_samples = c->B - c->b < c->samples ? c->B - c->b : c->samples;
    c->n_rows = c->Ho - c->row < c->rows ? c->Ho - c->row : c->rows;
    c->pixels = c->n_rows * c->Wo;
    c->at = c->b * c->O * c->P + c->row * c->Wo;
    return 1;
}
/* Output columns [*lo, *hi) of one kernel column read inside x; the rest read zeros. */
static void dfi_conv_inside(const dfi_conv *c, size_t kj, size_t *lo, size_t *hi) {
    size_t end = c->W + c->pad;            /* ox stride + kj in [pad, end) */
    *lo = kj >= c->pad ? 0 : (c->pad - kj + c->stride - 1) / c->stride;
    *hi = end > kj ? (end - kj + c->stride - 1) / c->stride : 0;
    if (*hi > c->Wo) *hi = c->Wo;
    if (*lo > *hi) *lo = *hi;
}
/* Channels [from, to), counted over the part's samples. For each tap of the kernel the
   columns have one row of output pixels: a copy of x shifted by the tap, zeros outside. On
   the way back these rows are added to dx instead. All taps of a channel belong to one
   task, so that no two tasks add to the same pixel. */
static void dfi_conv_piece(void *arg, size_t from, size_t to) {
    const dfi_conv *c = (const dfi_conv *)arg;
    size_t lo, hi, taps = c->kh * c->kw;
    for (size_t i = from * taps; i < to * taps; i++) {
        size_t ki = i % taps / c->kw, kj = i % c->kw;
        size_t plane = (c->b * c->C + i / taps) * c->H * c->W;
        df_real *col = c->columns + i * c->pixels;
        dfi_conv_inside(c, kj, &lo, &hi);
        for (size_t oy = 0; oy < c->n_rows; oy++, col += c->Wo) {
            size_t iy = (c->row + oy) * c->stride + ki, n = 0, at = plane;    /* + pad */
            if (iy >= c->pad && iy < c->H + c->pad && hi > lo) {
                at += (iy - c->pad) * c->W + lo * c->stride + kj - c->pad;
                n = hi - lo;
            }
            if (c->back) {
                for (size_t k = 0; k < n; k++) c->dx[at + k * c->stride] += col[lo + k];
                continue;
            }
            if (n < c->Wo) memset(col, 0, c->Wo * sizeof *col);
            if (c->stride == 1) memcpy(col + lo, c->x + at, n * sizeof *col);
            else for (size_t k = 0; k < n; k++) col[lo + k] = c->x[at + k * c->stride];
        }
    }
}
static void dfi_conv_run(df_ctx *ctx, dfi_conv *c, int back) {
    c->back = back;
    dfi_split(ctx, c->n_samples * c->C, c->kh * c->kw * c->pixels, dfi_conv_piece, c);
}
/* The current part's columns, sample after sample; made anew for the backward pass, which
   costs less than the memory they would take: kh kw times x. */
static dfi_matrix dfi_conv_columns(df_ctx *ctx, dfi_conv *c) {
    if (!c->direct) dfi_conv_run(ctx, c, 0);
    return dfi_matrix_of(c->direct ? c->x : c->columns, c->pixels, c->K * c->pixels, 0);
}
static void dfi_conv_back(df_ctx *ctx, df_tensor *y) {
    df_tensor *w = y->in[1], channel;
    df_real *dx = dfi_grad(y, 0), *dw = dfi_grad(y, 1), *db = dfi_grad(y, 2);
    dfi_conv c;
    if (!dfi_conv_begin(ctx, &c, y->in[0], w, y)) return;
    if (c.fewer && dw && dfi_wino_weights(ctx, &c.image, c.x, y->grad, dw) != DF_OK)
        dfi_stick(ctx);
    if (c.fewer && dx &&
        dfi_wino_conv(ctx, &c.image, 1, y->grad, w->data, dx) != DF_OK)
        dfi_stick(ctx);
    for (c.dx = dx; !c.fewer && dfi_conv_next(&c);) {
        dfi_matrix dy = dfi_matrix_of(y->grad + c.at, c.P, c.O * c.P, 0);
        if (dw != NULL) {
            dfi_matrix g = dy, col = dfi_conv_columns(ctx, &c);
            for (size_t i = 0; i < c.n_samples; i++, g.at += g.step, col.at += col.step)
                if (dfi_gemm(ctx, 0, 1, c.O, c.K, c.pixels, g.at, g.ld, col.at, col.ld, 1,
                             dw, c.K) != DF_OK) dfi_stick(ctx);
        }
        if (dx == NULL) continue;
        dfi_product(ctx, c.n_samples, c.K, c.pixels, c.O,
                    dfi_matrix_of(w->data, c.K, 0, 1), dy, c.direct,
                    c.direct ? dx : c.columns, c.pixels, c.K * c.pixels);
        if (!c.direct) dfi_conv_run(ctx, &c, 1);
    }
    if (db == NULL) return;
    channel = *y->in[2];
    channel.ndim = 3;          /* [O,1,1] beside the image */
    dfi_sum_to(ctx, y, y->grad, &channel, db);
}
static df_tensor *dfi_conv_tangent(df_ctx *ctx, df_tensor *y) {
    df_tensor *x = y->in[0], *w = y->in[1], *b = y->in[2] ? y->in[2]->tangent : NULL;
    df_tensor *p = NULL, *q = NULL;
    const int channel[3] = {y->shape[1], 1, 1};
    if (x->tangent) p = df_conv2d(ctx, x->tangent, w, NULL, y->arg[0], y->arg[1]);
    if (w->tangent) q = df_conv2d(ctx, x, w->tangent, NULL, y->arg[0], y->arg[1]);
    if (b != NULL) b = df_reshape(ctx, b, 3, channel);
    return dfi_stretch(ctx, dfi_both(ctx, dfi_both(ctx, p, q), b), y);
}
static const dfi_op dfi_op_conv = {"df_conv2d", dfi_conv_back, dfi_conv_tangent};
/* The result, not yet filled: Ho = (H + 2 pad - kh) / stride + 1, Wo alike; NULL if the
   operands do not fit. */
static df_tensor *dfi_conv_result(df_ctx *ctx, const df_tensor *x, const df_tensor *w,
                                  const df_tensor *bias, int stride, int pad) {
    char why[80], s[DFI_SHAPE_TEXT], t[DFI_SHAPE_TEXT];
    int shape[4];
    if (x->ndim != 4 || w->ndim != 4)
        return dfi_bad_shapes(ctx, "df_conv2d", "x", x, "weight", w,
                              "do not fit: x [B,C,H,W], weight [O,C,kh,kw]");
    if (x->shape[1] != w->shape[1])
        return dfi_fail_tensor(ctx, DF_ERR_SHAPE,
                               "df_conv2d: x %s has %d channels, weight %s wants %d",
                               dfi_shape_text(4, x->shape, s), x->shape[1],
                               dfi_shape_text(4, w->shape, t), w->shape[1]);
    if (bias != NULL && (bias->ndim != 1 || bias->shape[0] != w->shape[0]))
        return dfi_bad_shapes(ctx, "df_conv2d", "weight", w, "bias", bias, "do not fit");
    if (stride < 1 || pad < 0 || pad > INT_MAX / 4)
        return dfi_fail_tensor(ctx, DF_ERR_ARGUMENT, "df_conv2d: stride %d, pad %d; "
                               "wanted 1 or more, 0 or more", stride, pad);
    shape[0] = x->shape[0], shape[1] = w->shape[0];
    for (int i = 2; i < 4; i++) {
        int64_t room = (int64_t)x->shape[i] + 2 * (int64_t)pad - w->shape[i];
        if (room < 0 || room / stride >= INT_MAX) {
            snprintf(why, sizeof why, "and pad %d leave no room for the kernel", pad);
            return dfi_bad_shapes(ctx, "df_conv2d", "x", x, "weight", w, why);
        }
        shape[i] = (int)(room / stride) + 1;
    }
    return dfi_tensor_make(ctx, "df_conv2d", 4, shape, NULL);
}

DF_API df_tensor *df_conv2d(df_ctx *ctx, df_tensor *x, df_tensor *weight, df_tensor *bias,
                            int stride, int pad) {
    dfi_conv c;
    df_scope mark;
    df_tensor *y;
    if (dfi_blocked(ctx, "df_conv2d", x, weight)) return NULL;
    y = dfi_conv_result(ctx, x, weight, bias, stride, pad);
    if (y == NULL) return NULL;
    y->arg[0] = stride, y->arg[1] = pad;
    if (bias != NULL) {
        df_tensor channel = *bias;
        channel.ndim = 3;      /* [O,1,1] beside the image */
        dfi_spread(ctx, 0, &channel, bias->data, y, y->data);
    }
    mark = dfi_scratch_mark(ctx);
    if (!dfi_conv_begin(ctx, &c, x, weight, y)) return NULL;
    if (c.fewer && bias == NULL) memset(y->data, 0, y->size * sizeof(df_real));
    if (c.fewer && dfi_wino_conv(ctx, &c.image, 0, c.x, weight->data, y->data) != DF_OK)
        return dfi_stick(ctx);
    while (!c.fewer && dfi_conv_next(&c))
        dfi_product(ctx, c.n_samples, c.O, c.pixels, c.K,
                    dfi_matrix_of(weight->data, c.K, 0, 0), dfi_conv_columns(ctx, &c),
                    bias != NULL, y->data + c.at, c.P, c.O * c.P);
    dfi_scratch_release(ctx, mark);
    return dfi_finish(ctx, y, &dfi_op_conv, x, weight, bias);
}

/* Between planes of 2H x 2W and H x W, each the other's transpose:
   forward was: y[2i + k, 2j + l] = x[i, j]         y[i, j] = sum_kl x[2i + k, 2j + l]
             dx[i, j] = sum_kl dy[2i + k, 2j + l]  dx[2i + k, 2j + l] = dy[i, j]
   with k, l in {0, 1}; y' is the same of x'. For each k, l: one walk over the coarse
   planes beside the fine ones. */
static void dfi_fours(df_ctx *ctx, int kind, const df_tensor *coarse, const df_real *a,
                      df_real *y) {
    size_t step[DF_AXES] = {0}, w = (size_t)coarse->shape[3];
    for (int i = 0; i < 4; i++) step[i] = (i < 3 ? 4 : 2) * dfi_inner(coarse, i);
    for (size_t i = 0; i < 4; i++) {
        size_t at = i / 2 * 2 * w + i % 2;
        if (kind & DFI_WRITE) dfi_strided(ctx, kind, coarse, step, a, y + at);
        else dfi_strided(ctx, kind, coarse, step, a + at, y);
    }
}
static void dfi_resize_back(df_ctx *ctx, df_tensor *y) {
    df_tensor *x = y->in[0];
    if (y->arg[0]) dfi_fours(ctx, DFI_WRITE | DFI_PLUS, y, y->grad, x->grad);
    else dfi_fours(ctx, DFI_READ | DFI_PLUS, x, y->grad, x->grad);
}
static df_tensor *dfi_resize(df_ctx *ctx, const char *name, df_tensor *x, int pool);
static df_tensor *dfi_resize_tangent(df_ctx *ctx, df_tensor *y) {
    return dfi_resize(ctx, "resize", y->in[0]->tangent, y->arg[0]);
}
static const dfi_op dfi_op_resize = {"resize", dfi_resize_back, dfi_resize_tangent};
static df_tensor *dfi_resize(df_ctx *ctx, const char *name, df_tensor *x, int pool) {
    int shape[DF_AXES], fits;
    df_tensor *y;
    if (dfi_blocked(ctx, name, x, x)) return NULL;
    fits = x->ndim == 4;
    memcpy(shape, x->shape, sizeof shape);
    for (int i = 2; i < 4; i++) {
        fits &= pool ? shape[i] % 2 == 0 : shape[i] <= INT_MAX / 2;
        shape[i] = pool ? shape[i] / 2 : fits ? shape[i] * 2 : 1;
    }
    if (!fits)
        return dfi_bad_shape(ctx, name, "x", x, pool ?
                             "is not [B,C,H,W] with even H and W" : "is not [B,C,H,W]");
    y = df_tensor_new(ctx, 4, shape);
    if (y == NULL) return NULL;
    y->arg[0] = pool;
    if (pool) dfi_fours(ctx, DFI_READ | DFI_PLUS, y, x->data, y->data);
    else dfi_fours(ctx, DFI_WRITE, x, x->data, y->data);
    return dfi_finish(ctx, y, &dfi_op_resize, x, NULL, NULL);
}
DF_API df_tensor *df_upsample2x(df_ctx *ctx, df_tensor *x) {
    return dfi_resize(ctx, "df_upsample2x", x, 0);
}
DF_API df_tensor *df_avg_pool2x2(df_ctx *ctx, df_tensor *x) {
    df_tensor *y = dfi_resize(ctx, "df_avg_pool2x2", x, 1);
    return y != NULL ? df_scale(ctx, y, 0.25) : NULL;
}

/* ---- normalisation ---- */

/* Group, layer and RMS norm are one operation on x seen as [N, C, S]: group g of sample n
   is one run of C/groups S numbers, with mean m and variance v (Wu & He 2018; layer norm
   is one group with S = 1, Ba et al. 2016; RMS norm has m = 0, Zhang & Sennrich 2019).
   With h = (x - m) r, r = 1/sqrt(v + eps), and <.> the mean over a run,
   forward was: y = w_c h + b_c
             dx = r (g - <g> - h <g h>),  g = w_c dy   (without <g> if m = 0 by definition)
             dw_c = sum of dy h,  db_c = sum of dy
             y' = w h' + w' h + b',  h' = r (x' - <x'> - h <h x'>) */
typedef struct dfi_norm {
    const dfi_kernels *k;
    size_t N, C, S, groups, cg;    /* cg = C/groups */
    size_t len;                /* of a run: cg S */
    int rms;
    double eps;
    double *stats;             /* m and r of each run: [N, groups, 2] */
    const df_real *x, *w, *b, *dy;
    df_real *y, *dx, *dw;
    df_real *rows;             /* g, then dy h, of each run */
} dfi_norm;
static dfi_norm dfi_norm_of(df_ctx *ctx, const df_tensor *y, const df_tensor *x,
                            const df_tensor *w, const df_tensor *b) {
    dfi_norm n;
    memset(&n, 0, sizeof n);
    n.k = ctx->k;
    n.C = (size_t)y->arg[0], n.groups = (size_t)y->arg[1], n.rms = y->arg[2];
    n.S = (size_t)y->arg[3];
    n.N = x->size / (n.C * n.S);
    n.cg = n.C / n.groups;
    n.len = n.cg * n.S;
    n.eps = y->number[0];
    n.stats = (double *)y->extra;
    n.x = x->data, n.y = y->data;
    n.w = w != NULL ? w->data : NULL;
    n.b = b != NULL ? b->data : NULL;
    return n;
}

/* y = w_c x + b_c for one run; with S = 1 the channels lie side by side: whole rows. */
static void dfi_norm_channels(const dfi_norm *n, size_t run, const df_real *x,
                              const df_real *b, df_real *y) {
    size_t c0 = run % n->groups * n->cg;
    if (n->S == 1) {
        if (n->w) n->k->binary[DFI_MUL](n->len, x, 1, n->w + c0, 1, y);
        if (b) n->k->binary[DFI_ADD](n->len, n->w ? y : x, 1, b + c0, 1, y);
        return;
    }
    for (size_t c = 0; c < n->cg && (n->w || b); c++)
        n->k->affine(n->S, n->w ? n->w[c0 + c] : 1, x + c * n->S, b ? b[c0 + c] : 0,
                     y + c * n->S);
}
/* y of runs [from, to) */
static void dfi_norm_piece(void *arg, size_t from, size_t to) {
    const dfi_norm *n = (const dfi_norm *)arg;
    for (size_t i = from; i < to; i++) {
        const df_real *x = n->x + i * n->len;
        df_real *y = n->y + i * n->len;
        double m = 0, v, r;
        if (n->rms) v = n->k->dot(n->len, x, x) / (double)n->len;
        else n->k->moments(n->len, x, &m, &v);
        r = 1 / sqrt(v + n->eps);
        n->stats[2 * i] = m, n->stats[2 * i + 1] = r;
        n->k->affine(n->len, (df_real)r, x, (df_real)(-m * r), y);
        dfi_norm_channels(n, i, y, n->b, y);
    }
}
/* dx of runs [from, to), and dy h for dw. In x instead of h, <g h> = r (<g x> - m <g>),
     dx = r g - (r^2 <g h>) x + (m r^2 <g h> - r <g>). */
static void dfi_norm_back_piece(void *arg, size_t from, size_t to) {
    const dfi_norm *n = (const dfi_norm *)arg;
    for (size_t i = from; i < to; i++) {
        const df_real *x = n->x + i * n->len, *dy = n->dy + i * n->len, *g = dy;
        df_real *row = n->rows + i * n->len, *dx = n->dx + i * n->len;
        double m = n->stats[2 * i], r = n->stats[2 * i + 1];
        if (n->dx) {
            double mean_g, a;
            if (n->w) {
                dfi_norm_channels(n, i, dy, NULL, row);
                g = row;
            }
            mean_g = n->k->sum(n->len, g) / (double)n->len;
            a = r * r * r * (n->k->dot(n->len, g, x) / (double)n->len - m * mean_g);
            n->k->axpy(n->len, (df_real)r, g, dx);
            n->k->axpy(n->len, (df_real)-a, x, dx);
            n->k->affine(n->len, 1, dx, (df_real)(m * a - (n->rms ? 0 : r * mean_g)), dx);
        }
        if (n->dw == NULL) continue;
        n->k->affine(n->len, (df_real)r, x, (df_real)(-m * r), row);
        n->k->binary[DFI_MUL](n->len, row, 1, dy, 1, row);
    }
}
static void dfi_norm_back(df_ctx *ctx, df_tensor *y) {
    dfi_norm n = dfi_norm_of(ctx, y, y->in[0], y->in[1], y->in[2]);
    df_tensor all = *y, channels = *y;     /* [N, C, S] and [C, 1] */
    n.dy = y->grad;
    n.dx = dfi_grad(y, 0), n.dw = dfi_grad(y, 1);
    n.rows = dfi_reals(ctx, y->size);
    if (n.rows == NULL) return;
    dfi_split(ctx, n.N * n.groups, n.len, dfi_norm_back_piece, &n);
    all.ndim = 3, channels.ndim = 2, channels.size = n.C;
    all.shape[0] = (int)n.N, all.shape[1] = (int)n.C, all.shape[2] = (int)n.S;
    channels.shape[0] = (int)n.C, channels.shape[1] = 1;
    if (n.dw) dfi_sum_to(ctx, &all, n.rows, &channels, n.dw);
    if (dfi_grad(y, 2)) dfi_sum_to(ctx, &all, n.dy, &channels, dfi_grad(y, 2));
}
/* The tangent is that of the same y composed of recorded operations. */
static df_tensor *dfi_norm_tangent(df_ctx *ctx, df_tensor *y) {
    df_tensor *h = y->in[0], *w = y->in[1], *b = y->in[2], *v;
    int C = y->arg[0], S = y->arg[3], N = (int)(y->size / ((size_t)C * (size_t)S));
    const int runs[2] = {N * y->arg[1], -1}, full[3] = {N, C, S}, channel[2] = {C, 1};
    ctx->no_tangent--;
    h = df_reshape(ctx, h, 2, runs);
    if (!y->arg[2]) h = df_sub(ctx, h, df_mean_axis(ctx, h, 1, 1));
    v = df_mean_axis(ctx, df_square(ctx, h), 1, 1);
    h = df_div(ctx, h, df_sqrt(ctx, df_affine(ctx, v, 1, y->number[0])));
    h = df_reshape(ctx, h, 3, full);
    if (w != NULL) h = df_mul(ctx, h, df_reshape(ctx, w, 2, channel));
    if (b != NULL) h = df_add(ctx, h, df_reshape(ctx, b, 2, channel));
    h = df_reshape(ctx, h, y->ndim, y->shape);
    ctx->no_tangent++;
    return h != NULL ? h->tangent : NULL;
}
static const dfi_op dfi_op_norm = {"norm", dfi_norm_back, dfi_norm_tangent};
/* x as [N, C, S]: by group C is its second axis and S all behind, else C is its last one;
   weight, bias [C] or NULL. */
static df_tensor *dfi_normalise(df_ctx *ctx, const char *name, df_tensor *x, df_tensor *w,
                                df_tensor *b, int by_group, int groups, int rms,
                                double eps) {
    df_tensor *y, *affine[2];
    int C, axis;
    size_t S;
    dfi_norm n;
    if (dfi_blocked(ctx, name, x, x)) return NULL;
    axis = by_group ? 1 : x->ndim - 1;
    if (axis < 0 || axis >= x->ndim)
        return dfi_bad_shape(ctx, name, "x", x, by_group ? "is not [B,C,...]" :
                             "is not [...,C]");
    C = x->shape[axis];
    S = dfi_inner(x, axis);
    affine[0] = w, affine[1] = b;
    for (int i = 0; i < 2; i++)
        if (affine[i] != NULL && (affine[i]->ndim != 1 || affine[i]->shape[0] != C))
            return dfi_bad_shapes(ctx, name, "x", x, i ? "bias" : "weight", affine[i],
                                  "differ in channels");
    if (groups < 1 || C % groups != 0 || !(eps >= 0))
        return dfi_fail_tensor(ctx, DF_ERR_ARGUMENT, "%s: %d channels do not part into %d "
                               "groups, or eps %g is below 0", name, C, groups, eps);
    if (S > INT_MAX || x->size / S > INT_MAX)
        return dfi_bad_shape(ctx, name, "x", x, "is too large");
    y = dfi_tensor_like(ctx, name, x);
    if (y == NULL) return NULL;
    y->arg[0] = C, y->arg[1] = groups, y->arg[2] = rms, y->arg[3] = (int)S;
    y->number[0] = eps;
    n = dfi_norm_of(ctx, y, x, w, b);
    n.stats = (double *)dfi_scratch(ctx, n.N * n.groups * 2 * sizeof *n.stats);
    if (n.stats == NULL) return dfi_stick(ctx);
    y->extra = n.stats;
    dfi_split(ctx, n.N * n.groups, n.len, dfi_norm_piece, &n);
    return dfi_finish(ctx, y, &dfi_op_norm, x, w, b);
}
DF_API df_tensor *df_group_norm(df_ctx *ctx, df_tensor *x, df_tensor *weight,
                                df_tensor *bias, int groups, double eps) {
    return dfi_normalise(ctx, "df_group_norm", x, weight, bias, 1, groups, 0, eps);
}
DF_API df_tensor *df_layer_norm(df_ctx *ctx, df_tensor *x, df_tensor *weight,
                                df_tensor *bias, double eps) {
    return dfi_normalise(ctx, "df_layer_norm", x, weight, bias, 0, 1, 0, eps);
}
DF_API df_tensor *df_rms_norm(df_ctx *ctx, df_tensor *x, df_tensor *weight, double eps) {
    return dfi_normalise(ctx, "df_rms_norm", x, weight, NULL, 0, 1, 1, eps);
}

/* ---- softmax, attention ---- */

/* Along the last axis, with <.,.> the dot product of two rows,
   forward was: y = e^x / sum e^x            forward was: y = x - log sum e^x
             dx = y (dy - <y, dy>)                     dx = dy - e^y sum dy
             y' = y (x' - <y, x'>)                     y' = x' - <e^y, x'>
   Here rows [from, to): forward, or, if dy is given (b), backward. */
static void dfi_softmax_piece(void *arg, size_t from, size_t to) {
    const dfi_job *j = (const dfi_job *)arg;
    const dfi_kernels *k = j->k;
    const df_real *dy = j->b;
    size_t n = j->n;
    for (size_t i = from * n; i < to * n; i += n)
        if (dy == NULL) (j->kind ? k->log_softmax : k->softmax)(n, j->a + i, j->y + i);
        else (j->kind ? k->log_softmax_back : k->softmax_back)(n, j->a + i, dy + i,
                                                               j->y + i);
}
static void dfi_softmax_run(df_ctx *ctx, const df_tensor *y, const df_real *a,
                            const df_real *dy, df_real *to) {
    dfi_job j = dfi_job_of(ctx, y->arg[0], a, dy, to);
    j.n = (size_t)y->shape[y->ndim - 1];
    dfi_split(ctx, y->size / j.n, j.n, dfi_softmax_piece, &j);
}
static void dfi_softmax_back(df_ctx *ctx, df_tensor *y) {
    dfi_softmax_run(ctx, y, y->data, y->grad, y->in[0]->grad);
}
static df_tensor *dfi_softmax_tangent(df_ctx *ctx, df_tensor *y) {
    df_tensor *t = y->in[0]->tangent, *p = y->arg[0] ? df_exp(ctx, y) : y;
    t = df_sub(ctx, t, df_sum_axis(ctx, df_mul(ctx, p, t), -1, 1));
    return y->arg[0] ? t : df_mul(ctx, y, t);
}
static const dfi_op dfi_op_softmax = {"softmax", dfi_softmax_back, dfi_softmax_tangent};
static df_tensor *dfi_softmax(df_ctx *ctx, const char *name, df_tensor *x, int log_of) {
    df_tensor *y = dfi_tensor_like(ctx, name, x);
    if (y == NULL) return NULL;
    if (x->ndim < 1) return dfi_bad_shape(ctx, name, "x", x, "has no last axis");
    y->arg[0] = log_of;
    dfi_softmax_run(ctx, y, x->data, NULL, y->data);
    return dfi_finish(ctx, y, &dfi_op_softmax, x, NULL, NULL);
}
DF_API df_tensor *df_softmax(df_ctx *ctx, df_tensor *x) {
    return dfi_softmax(ctx, "df_softmax", x, 0);
}
DF_API df_tensor *df_log_softmax(df_ctx *ctx, df_tensor *x) {
    return dfi_softmax(ctx, "df_log_softmax", x, 1);
}

/* softmax(Q K^T) V (Vaswani et al. 2017, eq. 1), Q scaled already; for each head, with
   <.,.> the dot product of two rows,
   forward was: Y = P V with P = softmax(Q K^T)
             dV = P^T dY, dQ = dZ K, dK = dZ^T Q
             with dZ = P (dP - <P, dP>), dP = dY V^T
   P is never whole: it is made for some heads at a time, or some of one head's queries,
   and anew for the backward pass, which has one product more for that. */
typedef struct dfi_scores {
    const dfi_kernels *k;
    size_t S, row, rows;       /* keys; of each head so many queries from `row` on */
    int causal;
    df_real *p, *dp;           /* [heads, rows, S]; dp NULL: forward */
} dfi_scores;
/* Rows [from, to) of P, or of dZ in dP's place. */
static void dfi_scores_piece(void *arg, size_t from, size_t to) {
    const dfi_scores *s = (const dfi_scores *)arg;
    for (size_t i = from; i < to; i++) {
        size_t seen = s->causal ? s->row + i % s->rows + 1 : s->S;
        df_real *p = s->p + i * s->S, *dp = s->dp != NULL ? s->dp + i * s->S : NULL;
        if (seen > s->S) seen = s->S;
        if (dp == NULL) {
            s->k->softmax(seen, p, p);
            memset(p + seen, 0, (s->S - seen) * sizeof *p);
            continue;
        }
        s->k->affine(s->S, 1, dp, (df_real)-s->k->dot(s->S, p, dp), dp);
        s->k->binary[DFI_MUL](s->S, p, 1, dp, 1, dp);
    }
}
/* The parts one after the other: in each n heads, r queries. */
static void dfi_attend(df_ctx *ctx, const df_tensor *y, int back) {
    const df_tensor *k = y->in[1], *v = y->in[2];
    const size_t T = (size_t)y->shape[2], S = (size_t)k->shape[2], D = (size_t)y->shape[3];
    const size_t N = y->size / (T * D), most = DFI_COLUMNS / 2;
    size_t rows = most / S < 1 ? 1 : most / S < T ? most / S : T;
    size_t heads = most / (rows * S), n, r;
    df_real *dq = back ? dfi_grad(y, 0) : NULL, *dk = back ? dfi_grad(y, 1) : NULL;
    df_real *dv = back ? dfi_grad(y, 2) : NULL, *p, *dp = NULL;
    df_scope mark = dfi_scratch_mark(ctx);
    heads = rows < T || heads < 1 ? 1 : heads < N ? heads : N;
    p = dfi_reals(ctx, dfi_mul(heads * rows, S));
    if (back) dp = dfi_reals(ctx, dfi_mul(heads * rows, S));
    for (size_t i = 0; i < N * T && ctx->stuck == DF_OK; i += n * r) {
        size_t row = i % T, at = i * D, keys = i / T * S * D;
        dfi_matrix Q = dfi_matrix_of(y->in[0]->data + at, D, T * D, 0), dY = Q;
        dfi_matrix K = dfi_matrix_of(k->data + keys, D, S * D, 0), V = K, P, dZ;
        dfi_scores s = {ctx->k, S, row, 0, y->arg[0], p, NULL};
        n = N - i / T < heads ? N - i / T : heads;
        s.rows = r = T - row < rows ? T - row : rows;
        P = dZ = dfi_matrix_of(p, S, r * S, 0);
        V.at = v->data + keys, dZ.at = dp;
        dfi_product(ctx, n, r, S, D, Q, dfi_transposed(K), 0, p, S, r * S);
        dfi_split(ctx, n * r, S, dfi_scores_piece, &s);
        if (!back) dfi_product(ctx, n, r, D, S, P, V, 0, y->data + at, D, T * D);
        if (!back) continue;
        dY.at = y->grad + at, s.dp = dp;
        P.t = dZ.t = 1;
        if (dv) dfi_product(ctx, n, S, D, r, P, dY, 1, dv + keys, D, S * D);
        dfi_product(ctx, n, r, S, D, dY, dfi_transposed(V), 0, dp, S, r * S);
        dfi_split(ctx, n * r, S, dfi_scores_piece, &s);
        if (dk) dfi_product(ctx, n, S, D, r, dZ, Q, 1, dk + keys, D, S * D);
        dZ.t = 0;
        if (dq) dfi_product(ctx, n, r, D, S, dZ, K, 1, dq + at, D, T * D);
    }
    dfi_scratch_release(ctx, mark);
}
static void dfi_attention_back(df_ctx *ctx, df_tensor *y) { dfi_attend(ctx, y, 1); }
/* The tangent is that of the same y composed of recorded operations. What must not be seen
   gets -1e30, not -infinity: no difference of infinities can arise. */
static df_tensor *dfi_attention_tangent(df_ctx *ctx, df_tensor *y) {
    df_tensor *v = y->in[2], *scores, *mask;
    ctx->no_tangent--;
    scores = df_matmul(ctx, y->in[0], y->in[1], 0, 1);
    if (y->arg[0] && scores != NULL) {
        mask = df_tensor_new(ctx, 2, scores->shape + 2);
        for (size_t i = 0, S = (size_t)scores->shape[3]; mask && i < mask->size; i++)
            if (i % S > i / S) mask->data[i] = (df_real)-1e30;
        scores = df_add(ctx, scores, mask);
    }
    y = df_matmul(ctx, df_softmax(ctx, scores), v, 0, 0);
    ctx->no_tangent++;
    return y != NULL ? y->tangent : NULL;
}
static const dfi_op dfi_op_attention = {"df_attention", dfi_attention_back,
                                        dfi_attention_tangent};
DF_API df_tensor *df_attention(df_ctx *ctx, df_tensor *q, df_tensor *k, df_tensor *v,
                               int causal) {
    df_tensor *y;
    if (dfi_blocked(ctx, "df_attention", q, k)) return NULL;
    if (dfi_blocked(ctx, "df_attention", q, v)) return NULL;
    if (q->ndim != 4 || k->ndim != 4 || q->shape[0] != k->shape[0] ||
        q->shape[1] != k->shape[1] || q->shape[3] != k->shape[3])
        return dfi_bad_shapes(ctx, "df_attention", "q", q, "k", k,
                              "do not fit: q [B,H,T,D], k [B,H,S,D]");
    if (!dfi_same_shape(k, v))
        return dfi_bad_shapes(ctx, "df_attention", "k", k, "v", v, "differ");
    q = df_scale(ctx, q, 1 / sqrt((double)q->shape[3]));
    y = dfi_tensor_like(ctx, "df_attention", q);
    if (y == NULL) return NULL;
    y->arg[0] = causal != 0;
    y->in[0] = q, y->in[1] = k, y->in[2] = v;
    dfi_attend(ctx, y, 0);
    return dfi_finish(ctx, y, &dfi_op_attention, q, k, v);
}

/* Composed: at position t the pair (x1, x2) turns by t base^(-2k/D), k < D/2, to
   (x1 cos - x2 sin, x2 cos + x1 sin). */
DF_API df_tensor *df_rotary(df_ctx *ctx, df_tensor *x, double base) {
    df_tensor *x1, *x2, *cosine, *sine;
    int shape[2], half;
    if (dfi_blocked(ctx, "df_rotary", x, x)) return NULL;
    if (x->ndim < 2 || x->shape[x->ndim - 1] % 2 != 0 || !(base > 0))
        return dfi_bad_shape(ctx, "df_rotary", "x", x,
                             "is not [...,T,D] with even D, or base is not above 0");
    half = x->shape[x->ndim - 1] / 2;
    shape[0] = x->shape[x->ndim - 2], shape[1] = half;
    cosine = df_tensor_new(ctx, 2, shape);
    sine = df_tensor_new(ctx, 2, shape);
    for (size_t i = 0; sine != NULL && i < sine->size; i++) {
        size_t t = i / (size_t)half, k = i % (size_t)half;
        double angle = (double)t * pow(base, -(double)k / half);
        cosine->data[i] = (df_real)cos(angle);
        sine->data[i] = (df_real)sin(angle);
    }
    x1 = df_slice(ctx, x, -1, 0, half);
    x2 = df_slice(ctx, x, -1, half, half);
    return df_concat(ctx, df_sub(ctx, df_mul(ctx, x1, cosine), df_mul(ctx, x2, sine)),
                     df_add(ctx, df_mul(ctx, x2, cosine), df_mul(ctx, x1, sine)), -1);
}

/* ---- looking up; embeddings of time ---- */

/* forward was: y[i] = table[ids[i]], zeros for -1
             dtable[ids[i]] = dy[i], one after the other, as rows may repeat
             y'[i] = table'[ids[i]] */
static void dfi_lookup_back(df_ctx *ctx, df_tensor *y) {
    const int *ids = (const int *)y->extra;
    size_t C = (size_t)y->shape[1];
    for (size_t i = 0; i < (size_t)y->shape[0]; i++)
        if (ids[i] >= 0)
            ctx->k->axpy(C, 1, y->grad + i * C, y->in[0]->grad + (size_t)ids[i] * C);
}
static df_tensor *dfi_lookup_tangent(df_ctx *ctx, df_tensor *y) {
    return df_embedding(ctx, y->in[0]->tangent, (const int *)y->extra, y->shape[0]);
}
static const dfi_op dfi_op_lookup = {"df_embedding", dfi_lookup_back, dfi_lookup_tangent};
/* A copy in step memory of n indices, each -1 or below `limit`; NULL with an error. */
static int *dfi_indices(df_ctx *ctx, const char *name, const int *ids, int n, int limit) {
    int *copy;
    if (dfi_blocked(ctx, name, ids, ids)) return NULL;
    if (n < 1) dfi_fail_tensor(ctx, DF_ERR_ARGUMENT, "%s: no indices", name);
    for (int i = 0; i < n; i++)
        if (ids[i] < -1 || ids[i] >= limit)
            dfi_fail_tensor(ctx, DF_ERR_ARGUMENT, "%s: index %d is %d, wanted -1 to %d",
                            name, i, ids[i], limit - 1);
    if (ctx->stuck != DF_OK) return NULL;
    copy = (int *)dfi_scratch(ctx, dfi_mul((size_t)n, sizeof *copy));
    if (copy == NULL) dfi_stick(ctx);
    else memcpy(copy, ids, (size_t)n * sizeof *copy);
    return copy;
}

DF_API df_tensor *df_embedding(df_ctx *ctx, df_tensor *table, const int *ids, int n) {
    int shape[2];
    size_t C;
    df_tensor *y;
    if (dfi_blocked(ctx, "df_embedding", table, table)) return NULL;
    if (table->ndim != 2)
        return dfi_bad_shape(ctx, "df_embedding", "table", table, "is not [rows,dim]");
    ids = dfi_indices(ctx, "df_embedding", ids, n, table->shape[0]);
    if (ids == NULL) return NULL;
    shape[0] = n, shape[1] = table->shape[1];
    y = df_tensor_new(ctx, 2, shape);
    if (y == NULL) return NULL;
    y->extra = ids;
    C = (size_t)table->shape[1];
    for (size_t i = 0; i < (size_t)n; i++)
        if (ids[i] >= 0)
            memcpy(y->data + i * C, table->data + (size_t)ids[i] * C, C * sizeof *y->data);
    return dfi_finish(ctx, y, &dfi_op_lookup, table, NULL, NULL);
}

/* Composed, so that it has a derivative in t: sine and cosine of t f_k, side by side. In
   float the last bit of f_k moves the angle by 1e-4 at t = 1000. */
DF_API df_tensor *df_sinusoidal(df_ctx *ctx, df_tensor *t, int dim, double period,
                                int cos_first, double shift) {
    int half = dim / 2, shape[2];
    df_tensor *f, *angle, *y, *sine, *cosine;
    if (dfi_blocked(ctx, "df_sinusoidal", t, t)) return NULL;
    if (t->ndim != 1) return dfi_bad_shape(ctx, "df_sinusoidal", "t", t, "is not [B]");
    if (dim < 2 || !(period > 0) || !(half - shift > 0))
        return dfi_fail_tensor(ctx, DF_ERR_ARGUMENT, "df_sinusoidal: dim %d, period %g, "
                               "shift %g; wanted dim >= 2, period > 0, shift < dim/2", dim,
                               period, shift);
    f = df_tensor_new(ctx, 1, &half);
    for (int k = 0; f != NULL && k < half; k++)
        f->data[k] = (df_real)exp(-log(period) * k / (half - shift));
    shape[0] = t->shape[0], shape[1] = 1;
    angle = df_mul(ctx, df_reshape(ctx, t, 2, shape), f);
    sine = df_sin(ctx, angle);
    cosine = df_cos(ctx, angle);
    y = cos_first ? df_concat(ctx, cosine, sine, 1) : df_concat(ctx, sine, cosine, 1);
    return dim % 2 ? df_concat(ctx, y, df_tensor_new(ctx, 2, shape), 1) : y;
}

/* Composed: y = x mask, dx = dy mask, with a constant mask of zeros and 1/(1-p), whose
   mean is 1 (Srivastava et al. 2014). */
DF_API df_tensor *df_dropout(df_ctx *ctx, df_tensor *x, double p, uint64_t seed,
                             uint64_t sample, uint32_t draw) {
    df_tensor *mask;
    df_scope mark;
    double *u;
    if (dfi_blocked(ctx, "df_dropout", x, x)) return NULL;
    if (!(p >= 0 && p < 1))
        return dfi_fail_tensor(ctx, DF_ERR_ARGUMENT,
                               "df_dropout: p = %g, wanted 0 <= p < 1", p);
    if (p == 0) return x;
    mask = dfi_tensor_like(ctx, "df_dropout", x);
    if (mask == NULL) return NULL;
    mark = dfi_scratch_mark(ctx);
    u = (double *)dfi_scratch(ctx, dfi_mul(x->size, sizeof *u));
    if (u == NULL) return dfi_stick(ctx);
    df_random_uniform(seed, sample, draw, x->size, u);
    for (size_t i = 0; i < x->size; i++)
        mask->data[i] = (df_real)(u[i] < p ? 0 : 1 / (1 - p));
    dfi_scratch_release(ctx, mark);
    return df_mul(ctx, x, mask);
}

/* ---- losses: composed ---- */

/* y_i = -log softmax(x)[i, target_i], 0 for -1; dx[i, v] = (softmax(x)[i, v] - [v =
   target_i]) dy_i. Composed: row i V + target_i of the logarithms seen as a table with
   rows of one number. */
DF_API df_tensor *df_cross_entropy(df_ctx *ctx, df_tensor *logits, const int *targets) {
    int n, V, column[2] = {-1, 1}, *ids;
    df_tensor *y;
    if (dfi_blocked(ctx, "df_cross_entropy", logits, logits)) return NULL;
    if (logits->ndim != 2)
        return dfi_bad_shape(ctx, "df_cross_entropy", "logits", logits, "is not [n,V]");
    n = logits->shape[0], V = logits->shape[1];
    ids = dfi_indices(ctx, "df_cross_entropy", targets, n, V);
    y = ids != NULL ? df_reshape(ctx, df_log_softmax(ctx, logits), 2, column) : NULL;
    for (int i = 0; y != NULL && i < n; i++)
        if (ids[i] >= 0) ids[i] += i * V;
    y = y != NULL ? df_embedding(ctx, y, ids, n) : NULL;
    return y != NULL ? df_scale(ctx, df_reshape(ctx, y, 1, &n), -1) : NULL;
}

/* y = <(a - b)^2>, the mean over all n elements: da = 2 (a - b) dy/n, db = -da. */
DF_API df_tensor *df_mse(df_ctx *ctx, df_tensor *a, df_tensor *b) {
    if (dfi_blocked(ctx, "df_mse", a, b)) return NULL;
    if (!dfi_same_shape(a, b))
        return dfi_bad_shapes(ctx, "df_mse", "a", a, "b", b, "differ");
    return df_mean(ctx, df_square(ctx, df_sub(ctx, a, b)));
}

/* Lightly compiled, as from `>>process` to guidance, and for the same reason. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#pragma GCC push_options
#pragma GCC optimize("O1")
#endif

/* =====================================================================================
   // >>networks: parameters, layers; MLP, UNet, DiT; checkpoints

   A network answers one question: what is in x_t at time t? It is a function

       prediction = f(x_t, t, label; w),    x_t [B, shape...], t [B], label [B],

   built from the operations of the tensor chapter. Here stands what all networks share: a
   table of named parameters that lie one after the other in one array w (so an optimiser
   sees a flat vector), the layers that read them, and the card that says how w was
   trained, without which a file of weights can be misread but not used. Names and layouts
   are PyTorch's ("hid.0.weight", [out, in]), so that weights travel.

   A network built in is a row of a table: its name, a function that checks a few numbers
   of configuration, and one walk over its layers, which adds their parameters or runs
   them. Loading a file is the same walk, with the parameters read instead of drawn. The
   first row is a residual MLP for points. For pictures there are the UNet of Ho et al.
   (2020), convolutions at falling and rising sizes, and the diffusion transformer of
   Peebles & Xie (2023), attention among patches: both with the names, the layouts and, to
   rounding, the numbers of the libraries that people train them in.
   ===================================================================================== */

enum { DFI_NET_SLOTS = 64, DFI_NET_NUMBERS = 4, DFI_NET_NAME = 200 };
enum { DFI_NET_LIVE = 3 << 19 }; /* elements of the widest tensors of one question */

/* First word of `draw` in Philox keys: the chapter's draws never meet a sampler's. */
#define DFI_DRAW_INIT 0x80000000u

typedef struct dfi_net_kind dfi_net_kind;

/* Which names a file's tensors have, beside our own. */
typedef enum dfi_naming {
    DFI_NAMES_OWN,      /* UNet2DModel's and DiT's own names */
    DFI_NAMES_OLD,      /* UNet2DModel before its attentions were renamed */
    DFI_NAMES_DIFFUSERS /* DiTTransformer2DModel's */
} dfi_naming;

struct df_net {
    df_alloc alloc; /* a net outlives the context it was made with */
    char *kind;
    const dfi_net_kind *row; /* NULL: a user's own kind */
    df_forward_fn forward;
    int ndim, dim, shape[3]; /* one sample */
    int outputs;             /* first axis of a prediction: shape[0], or twice that */
    int classes;             /* -1: a user's own kind, which knows for itself */
    int null_class;          /* 1: label `classes` says "none", as -1 does */
    int condition;           /* numbers of a sample's condition, or 0 */
    int vocab;               /* samples are tokens and predictions logits, or 0 */
    int rows;                /* most samples of one question: memory stays bounded */
    uint64_t seed;
    int config[DFI_NET_SLOTS];
    double number[DFI_NET_NUMBERS];
    df_param *param;
    int count, room; /* parameters, and places in the table */
    df_real *weights;
    size_t size, capacity; /* elements */
    df_real *average;      /* [size] or NULL */
    df_card card;
    double *log_abar; /* [card.process.table_size]: the card's table, own copy */
    int scaling_size;
    double *scaling;            /* [2 scaling_size]: means, then scales */
    int sealed; /* complete: built in, or a trainer's arrays have its size */
    dfi_naming naming;
    const df_safetensors *from; /* while loading: parameters are read from here */
};

/* ---- making a net ------------------------------------------------------------------ */

/* A copy of `size` bytes by the net's hooks; NULL sets the error. */
static void *dfi_net_copy(df_ctx *ctx, const df_net *net, const void *data, size_t size) {
    void *copy = dfi_new_by(&net->alloc, size);
    if (copy == NULL) {
        dfi_fail(ctx, DF_ERR_MEMORY, "no memory for %.0f bytes of a net", (double)size);
        return NULL;
    }
    if (data != NULL) memcpy(copy, data, size);
    return copy;
}

/* Shape and product of a sample or a parameter: every axis at least 1, less than 2^31
   elements in all. 0 if not. */
static int dfi_net_elements(int ndim, const int *shape) {
    size_t size = 1;
    for (int i = 0; i < ndim; i++)
        size = shape == NULL || shape[i] < 1 ? SIZE_MAX : dfi_mul(size, (size_t)shape[i]);
    return size > INT_MAX ? 0 : (int)size;
}

/* A net without parameters; `row` is NULL for a user's own kind. Its memory comes from the
   context's hooks but is not the context's: a net may be trained in one and sampled in
   many. */
static df_net *dfi_net_make(df_ctx *ctx, const char *kind, int ndim, const int *shape,
                            const dfi_net_kind *row, df_forward_fn forward,
                            uint64_t seed) {
    df_net *net = (df_net *)dfi_new_by(&ctx->alloc, sizeof *net);
    if (net == NULL) {
        dfi_fail(ctx, DF_ERR_MEMORY, "no memory for a net");
        return NULL;
    }
    net->alloc = ctx->alloc;
    net->row = row;
    net->forward = forward;
    net->ndim = ndim;
    net->dim = dfi_net_elements(ndim, shape);
    for (int i = 0; i < ndim; i++) net->shape[i] = shape[i];
    net->outputs = shape[0];
    net->rows = 256;
    net->classes = row != NULL ? 0 : -1;
    net->seed = seed;
    net->card = df_card_defaults();
    net->kind = (char *)dfi_net_copy(ctx, net, kind, strlen(kind) + 1);
    if (net->kind == NULL) {
        df_net_free(net);
        return NULL;
    }
    return net;
}

DF_API void df_net_free(df_net *net) {
    if (net == NULL) return;
    df_alloc a = net->alloc;
    for (int i = 0; i < net->count; i++)
        dfi_delete_by(&a, (void *)(uintptr_t)net->param[i].name,
                      strlen(net->param[i].name) + 1);
    dfi_delete_by(&a, net->param, (size_t)net->room * sizeof *net->param);
    dfi_delete_by(&a, net->weights, net->capacity * sizeof(df_real));
    dfi_delete_by(&a, net->average, net->size * sizeof(df_real));
    dfi_delete_by(&a, net->log_abar,
                  (size_t)net->card.process.table_size * sizeof(double));
    dfi_delete_by(&a, net->scaling, 2 * (size_t)net->scaling_size * sizeof(double));
    if (net->kind != NULL) dfi_delete_by(&a, net->kind, strlen(net->kind) + 1);
    dfi_delete_by(&a, net, sizeof *net);
}

/* A net that could not be made, handed on: the sentence that said why stays, if there is
   one. */
static df_result dfi_net_missing(df_ctx *ctx, const df_net *net, const char *function) {
    if (net != NULL) return DF_OK;
    if (ctx == NULL) return DF_ERR_ARGUMENT;
    if (ctx->code != DF_OK) return ctx->code;
    return dfi_fail(ctx, DF_ERR_ARGUMENT, "%s: the net is NULL", function);
}

/* ---- parameters -------------------------------------------------------------------- */

/* Fills a new parameter. Keyed by the net's seed and the parameter's index, so that adding
   a layer at the end leaves the others as they were. */
static void dfi_net_draw(const df_net *net, int index, df_init init, double fan_in,
                         double fan_out) {
    const df_param *p = &net->param[index];
    df_real *w = net->weights + p->offset;
    uint64_t stream = (uint64_t)index;
    if (init == DF_INIT_NORMAL || init == DF_INIT_NORMAL_02) {
        double deviation = init == DF_INIT_NORMAL ? 1.0 : 0.02;
        df_random_normal(net->seed, stream, DFI_DRAW_INIT, p->size, w);
        for (size_t i = 0; i < p->size; i++) w[i] = (df_real)(deviation * (double)w[i]);
    } else if (init == DF_INIT_FAN_IN || init == DF_INIT_XAVIER) {
        double bound =
            init == DF_INIT_FAN_IN ? 1 / sqrt(fan_in) : sqrt(6 / (fan_in + fan_out));
        double u[64];
        for (size_t i = 0; i < p->size; i += 64) {
            size_t n = p->size - i < 64 ? p->size - i : 64;
            df_random_uniform(net->seed, stream, DFI_DRAW_INIT + (uint32_t)(i / 64), n, u);
            for (size_t j = 0; j < n; j++) w[i + j] = (df_real)(bound * (2 * u[j] - 1));
        }
    } else {
        for (size_t i = 0; i < p->size; i++) w[i] = (df_real)(init == DF_INIT_ONE ? 1 : 0);
    }
}

/* Room for one more parameter of `size` elements: both arrays grow by half. */
static df_result dfi_net_grow(df_ctx *ctx, df_net *net, size_t size) {
    size_t need = dfi_plus(net->size, size);
    if (net->count == net->room) {
        int room = net->room * 2 + 8;
        df_param *table =
            (df_param *)dfi_net_copy(ctx, net, NULL, dfi_mul((size_t)room, sizeof *table));
        if (table == NULL) return DF_ERR_MEMORY;
        if (net->count > 0) memcpy(table, net->param, (size_t)net->count * sizeof *table);
        dfi_delete_by(&net->alloc, net->param, (size_t)net->room * sizeof *table);
        net->param = table;
        net->room = room;
    }
    if (need > net->capacity) {
        size_t capacity = dfi_plus(need, net->size / 2);
        df_real *w = (df_real *)dfi_net_copy(ctx, net, NULL, dfi_mul(capacity, sizeof *w));
        if (w == NULL) return DF_ERR_MEMORY;
        if (net->size > 0) memcpy(w, net->weights, net->size * sizeof *w);
        dfi_delete_by(&net->alloc, net->weights, net->capacity * sizeof *w);
        net->weights = w;
        net->capacity = capacity;
    }
    return DF_OK;
}

/* Names become keys of a checkpoint, so they may not look like its other keys. */
static int dfi_net_name_ok(df_ctx *ctx, const df_net *net, const char *name) {
    static const char *const reserved[] = {"average.", "adam.", "process.", "data."};
    size_t length = name != NULL ? strlen(name) : 0;
    if (length == 0 || length >= DFI_NET_NAME) {
        dfi_fail(ctx, DF_ERR_ARGUMENT,
                 "df_net_add: a name has 1 to %d characters, not %.0f", DFI_NET_NAME - 1,
                 (double)length);
        return 0;
    }
    for (int i = 0; i < 4; i++)
        if (strncmp(name, reserved[i], strlen(reserved[i])) == 0) {
            dfi_fail(ctx, DF_ERR_ARGUMENT,
                     "df_net_add: '%s': names may not begin with '%s'", name, reserved[i]);
            return 0;
        }
    if (df_net_find(net, name) >= 0) {
        dfi_fail(ctx, DF_ERR_ARGUMENT, "df_net_add: there is a parameter '%s' already",
                 name);
        return 0;
    }
    return 1;
}

/* What others call parts of our names. %c: q, k and v are parts of one parameter of ours,
   one after the other along its first axis. */
static const struct {
    dfi_naming naming;
    const char *ours, *theirs;
} dfi_renamed[] = {
    {DFI_NAMES_OLD, ".to_q.", ".query."},
    {DFI_NAMES_OLD, ".to_k.", ".key."},
    {DFI_NAMES_OLD, ".to_v.", ".value."},
    {DFI_NAMES_OLD, ".to_out.0.", ".proj_attn."},
    {DFI_NAMES_DIFFUSERS, "x_embedder.proj", "pos_embed.proj"},
    {DFI_NAMES_DIFFUSERS, "t_embedder.mlp.0",
     "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"},
    {DFI_NAMES_DIFFUSERS, "t_embedder.mlp.2",
     "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2"},
    {DFI_NAMES_DIFFUSERS, "y_embedder", "transformer_blocks.0.norm1.emb.class_embedder"},
    {DFI_NAMES_DIFFUSERS, ".attn.qkv", ".attn1.to_%c"},
    {DFI_NAMES_DIFFUSERS, ".attn.proj", ".attn1.to_out.0"},
    {DFI_NAMES_DIFFUSERS, ".mlp.fc1", ".ff.net.0.proj"},
    {DFI_NAMES_DIFFUSERS, ".mlp.fc2", ".ff.net.2"},
    {DFI_NAMES_DIFFUSERS, "final_layer.adaLN_modulation.1", "proj_out_1"},
    {DFI_NAMES_DIFFUSERS, "final_layer.linear", "proj_out_2"},
    {DFI_NAMES_DIFFUSERS, ".adaLN_modulation.1", ".norm1.linear"},
};

/* Part `part` of a parameter as its file calls it, into key; returns how many parts there
   are: 1, 3, or 0 for what the file does not hold. */
static int dfi_net_key(dfi_naming naming, const char *name, int part,
                       char key[DFI_NET_NAME + 64]) {
    size_t count = sizeof dfi_renamed / sizeof *dfi_renamed, row = 0;
    const char *at = NULL, *front = "";
    snprintf(key, DFI_NET_NAME + 64, "%s", name);
    if (naming == DFI_NAMES_OWN) return 1;
    if (naming == DFI_NAMES_DIFFUSERS && strcmp(name, "pos_embed") == 0) return 0;
    if (naming == DFI_NAMES_DIFFUSERS && strncmp(name, "blocks.", 7) == 0)
        front = "transformer_";
    while (row < count && (dfi_renamed[row].naming != naming ||
                           (at = strstr(name, dfi_renamed[row].ours)) == NULL))
        row++;
    const char *ours = at ? dfi_renamed[row].ours : "";
    const char *theirs = at ? dfi_renamed[row].theirs : "";
    if (at == NULL) at = name + strlen(name);
    snprintf(key, DFI_NET_NAME + 64, "%s%.*s%s%s", front, (int)(at - name), name, theirs,
             at + strlen(ours));
    char *letter = strchr(key, '%');
    if (letter == NULL) return 1;
    *letter = "qkv"[part];
    memmove(letter + 1, letter + 2, strlen(letter + 2) + 1);
    return 3;
}

/* Reads a parameter from the net's file; out NULL: looks only whether it has it, with the
   right size (the sentence of a failure has both shapes). */
static df_result dfi_net_fetch(df_ctx *ctx, const df_net *net, const char *name, int ndim,
                               const int *shape, df_real *out) {
    char key[DFI_NET_NAME + 64];
    int parts = dfi_net_key(net->naming, name, 0, key), piece[DF_AXES];
    size_t size = 1;
    if (parts == 0) return DF_OK;
    for (int i = 0; i < ndim; i++) {
        piece[i] = i == 0 ? shape[i] / parts : shape[i];
        size *= (size_t)piece[i];
    }
    for (int part = 0; part < parts; part++) {
        dfi_net_key(net->naming, name, part, key);
        const df_file_tensor *t = df_safetensors_find(net->from, key);
        if (out == NULL && t != NULL && t->count == size) continue;
        df_result result = df_safetensors_read(ctx, net->from, key, ndim, piece,
                                               out ? out + (size_t)part * size : NULL);
        if (result != DF_OK) return result;
    }
    return DF_OK;
}

/* The one way in which a parameter comes to be: appended to table and array, then drawn,
   or read if the net is made from a file. */
static int dfi_net_add(df_ctx *ctx, df_net *net, const char *name, int ndim,
                       const int *shape, df_init init, double fan_in, double fan_out) {
    int elements = ndim < 1 || ndim > DF_AXES ? 0 : dfi_net_elements(ndim, shape);
    if (dfi_net_missing(ctx, net, "df_net_add") != DF_OK) return -1;
    if (!dfi_net_name_ok(ctx, net, name)) return -1;
    if (elements == 0 || net->size + (size_t)elements > INT_MAX) {
        dfi_fail(ctx, DF_ERR_ARGUMENT,
                 "df_net_add: '%s': 1 to %d axes, each at least 1, and fewer than 2^31 "
                 "elements in the whole net",
                 name, DF_AXES);
        return -1;
    }
    if (net->sealed || net->average != NULL) {
        dfi_fail(ctx, DF_ERR_ARGUMENT,
                 "df_net_add: '%s': net '%s' is built in, being trained or trained: add "
                 "layers to a net of df_net_create, all before df_trainer_create",
                 name, net->kind);
        return -1;
    }
    /* A file proves its sizes before memory is taken for them. */
    if (net->from != NULL && dfi_net_fetch(ctx, net, name, ndim, shape, NULL) != DF_OK)
        return -1;
    if (dfi_net_grow(ctx, net, (size_t)elements) != DF_OK) return -1;
    char *copy = (char *)dfi_net_copy(ctx, net, name, strlen(name) + 1);
    if (copy == NULL) return -1;
    df_param *p = &net->param[net->count];
    p->name = copy;
    p->ndim = ndim;
    for (int i = 0; i < DF_AXES; i++) p->shape[i] = i < ndim ? shape[i] : 1;
    p->offset = net->size;
    p->size = (size_t)elements;
    p->frozen = 0;
    net->size += p->size;
    net->count++;
    if (net->from == NULL)
        dfi_net_draw(net, net->count - 1, init, fan_in, fan_out);
    else if (dfi_net_fetch(ctx, net, name, ndim, shape, net->weights + p->offset))
        return -1;
    return net->count - 1;
}

DF_API int df_net_add(df_ctx *ctx, df_net *net, const char *name, int ndim,
                      const int *shape, df_init init) {
    double area = 1, in = 1, out = 1;
    if (ndim >= 1 && ndim <= DF_AXES && shape != NULL) {
        for (int i = 2; i < ndim; i++) area *= shape[i];
        out = shape[0] * area;
        in = ndim == 1 ? out : shape[1] * area;
    }
    return dfi_net_add(ctx, net, name, ndim, shape, init, in, out);
}

static const dfi_net_kind *dfi_net_kind_find(const char *name);
DF_API df_net *df_net_create(df_ctx *ctx, const char *kind, int ndim, const int *shape,
                             df_forward_fn forward, uint64_t seed) {
    if (ctx == NULL) return NULL;
    if (kind == NULL || kind[0] == 0 || strlen(kind) >= DFI_NET_NAME ||
        dfi_net_kind_find(kind) != NULL) {
        dfi_fail(ctx, DF_ERR_ARGUMENT,
                 "df_net_create: kind '%.64s' is empty, too long or the name of a net "
                 "that is built in: choose another",
                 kind != NULL ? kind : "");
        return NULL;
    }
    if (ndim < 1 || ndim > 3 || dfi_net_elements(ndim, shape) == 0 || forward == NULL) {
        dfi_fail(ctx, DF_ERR_ARGUMENT,
                 "df_net_create: '%s': a sample has 1 to 3 axes (here %d), each at least "
                 "1, and forward may not be NULL",
                 kind, ndim);
        return NULL;
    }
    return dfi_net_make(ctx, kind, ndim, shape, NULL, forward, seed);
}

/* Integers, so that a checkpoint can keep them without knowing what they mean:
   widths, numbers of heads, indices of parameters. The slots of a kind built in are its
   own: its forward pass trusts them. */
DF_API void df_net_set(df_net *net, int slot, int value) {
    if (net == NULL || net->row != NULL) return;
    if (slot >= 0 && slot < DFI_NET_SLOTS) net->config[slot] = value;
}
DF_API int df_net_get(const df_net *net, int slot) {
    return slot >= 0 && slot < DFI_NET_SLOTS ? net->config[slot] : 0;
}

/* Reading a net from outside. */
DF_API const char *df_net_kind(const df_net *net) { return net->kind; }
DF_API int df_net_dim(const df_net *net) { return net->dim; }
DF_API int df_net_classes(const df_net *net) {
    return net->classes > 0 ? net->classes : 0;
}
DF_API int df_net_condition(const df_net *net) { return net->condition; }
DF_API void df_net_set_condition(df_net *net, int size) {
    if (net != NULL && net->row == NULL && size >= 0) net->condition = size;
}
DF_API int df_net_vocab(const df_net *net) { return net->vocab; }
DF_API void df_net_set_vocab(df_net *net, int vocab) {
    if (net != NULL && net->row == NULL && vocab >= 0) net->vocab = vocab;
}
DF_API void df_net_freeze(df_net *net, int index) {
    if (net != NULL && index >= 0 && index < net->count) net->param[index].frozen = 1;
}
DF_API size_t df_net_size(const df_net *net) { return net->size; }
DF_API size_t df_net_trained(const df_net *net) {
    size_t size = 0;
    for (int i = 0; i < net->count; i++)
        if (!net->param[i].frozen) size += net->param[i].size;
    return size;
}
DF_API int df_net_count(const df_net *net) { return net->count; }
DF_API const df_param *df_net_param(const df_net *net, int index) {
    return index >= 0 && index < net->count ? &net->param[index] : NULL;
}
DF_API int df_net_find(const df_net *net, const char *name) {
    for (int i = 0; i < net->count; i++)
        if (strcmp(net->param[i].name, name) == 0) return i;
    return -1;
}
DF_API df_real *df_net_weights(df_net *net) { return net->weights; }
DF_API df_real *df_net_average(df_net *net) { return net->average; }

/* ---- layers ------------------------------------------------------------------------ */

/* "name.part", and a bias for a weight: uniform with the weight's bound where that is
   drawn by fan-in (as PyTorch does), else zero. */
static int dfi_layer_part(df_ctx *ctx, df_net *net, const char *name, const char *part,
                          int ndim, const int *shape, df_init init, double in,
                          double out) {
    char full[DFI_NET_NAME];
    int length = snprintf(full, sizeof full, "%s.%s", name, part);
    if (length < 0 || length >= (int)sizeof full) {
        dfi_fail(ctx, DF_ERR_ARGUMENT, "the name of a layer, '%.40s...', is too long",
                 name);
        return -1;
    }
    return dfi_net_add(ctx, net, full, ndim, shape, init, in, out);
}

/* Weight [out, in, area...] and bias [out]. */
static int dfi_layer_affine(df_ctx *ctx, df_net *net, const char *name, int ndim,
                            const int *shape, df_init init) {
    double area = 1;
    for (int i = 2; i < ndim; i++) area *= shape[i];
    double in = shape[1] * area, out = shape[0] * area;
    df_init bias = init == DF_INIT_FAN_IN ? DF_INIT_FAN_IN : DF_INIT_ZERO;
    int index = dfi_layer_part(ctx, net, name, "weight", ndim, shape, init, in, out);
    if (index < 0 || dfi_layer_part(ctx, net, name, "bias", 1, shape, bias, in, out) < 0)
        return -1;
    return index;
}

DF_API int df_layer_linear(df_ctx *ctx, df_net *net, const char *name, int in, int out,
                           df_init init) {
    int shape[2];
    shape[0] = out;
    shape[1] = in;
    return dfi_layer_affine(ctx, net, name, 2, shape, init);
}

DF_API int df_layer_conv2d(df_ctx *ctx, df_net *net, const char *name, int in, int out,
                           int kernel, df_init init) {
    int shape[4];
    shape[0] = out;
    shape[1] = in;
    shape[2] = shape[3] = kernel;
    return dfi_layer_affine(ctx, net, name, 4, shape, init);
}

DF_API int df_layer_norm_affine(df_ctx *ctx, df_net *net, const char *name, int channels) {
    int index = dfi_layer_part(ctx, net, name, "weight", 1, &channels, DF_INIT_ONE, 1, 1);
    if (index < 0 ||
        dfi_layer_part(ctx, net, name, "bias", 1, &channels, DF_INIT_ZERO, 1, 1) < 0)
        return -1;
    return index;
}

DF_API int df_layer_embedding(df_ctx *ctx, df_net *net, const char *name, int rows,
                              int dim, df_init init) {
    int shape[2];
    shape[0] = rows;
    shape[1] = dim;
    return dfi_layer_part(ctx, net, name, "weight", 2, shape, init, dim, rows);
}

/* ---- running ----------------------------------------------------------------------- */

/* A run is a value, made for one pass: the net stays const, and what differs between
   training and use (which weights, whether gradients are wanted) stands in the run. */
DF_API df_run df_run_defaults(df_ctx *ctx, const df_net *net) {
    df_run run;
    memset(&run, 0, sizeof run);
    run.ctx = ctx;
    run.net = net;
    run.weights = net->average != NULL ? net->average : net->weights;
    return run;
}

/* A parameter as a leaf of the graph. It borrows the weights, which nothing writes to: the
   cast only meets the field's type. */
DF_API df_tensor *df_run_param(const df_run *run, int index) {
    const df_param *p = df_net_param(run->net, index);
    if (p == NULL)
        return dfi_fail_tensor(
            run->ctx, DF_ERR_ARGUMENT,
            "df_run_param: %d is not an index of the net's %d parameters", index,
            run->net->count);
    return df_tensor_borrow(run->ctx, p->ndim, p->shape,
                            (df_real *)(uintptr_t)(run->weights + p->offset),
                            run->grads != NULL && !p->frozen ? run->grads + p->offset
                                                             : NULL);
}

DF_API df_tensor *df_run_linear(const df_run *run, int index, df_tensor *x) {
    return df_linear(run->ctx, x, df_run_param(run, index), df_run_param(run, index + 1));
}
DF_API df_tensor *df_run_conv2d(const df_run *run, int index, df_tensor *x, int stride,
                                int pad) {
    return df_conv2d(run->ctx, x, df_run_param(run, index), df_run_param(run, index + 1),
                     stride, pad);
}
DF_API df_tensor *df_run_group_norm(const df_run *run, int index, df_tensor *x, int groups,
                                    double eps) {
    return df_group_norm(run->ctx, x, df_run_param(run, index),
                         df_run_param(run, index + 1), groups, eps);
}
DF_API df_tensor *df_run_layer_norm(const df_run *run, int index, df_tensor *x,
                                    double eps) {
    return df_layer_norm(run->ctx, x, df_run_param(run, index),
                         df_run_param(run, index + 1), eps);
}
DF_API df_tensor *df_run_embedding(const df_run *run, int index, const int *ids, int n) {
    return df_embedding(run->ctx, df_run_param(run, index), ids, n);
}

/* What the run is conditioned on, [n, condition]: zeros where it was not said. */
static df_tensor *dfi_run_condition(const df_run *run, int n) {
    int shape[2];
    shape[0] = n;
    shape[1] = run->net->condition;
    return run->condition ? run->condition : df_tensor_new(run->ctx, 2, shape);
}

/* First label that is neither -1 nor a class, or n. A user's own kind (classes -1) looks
   at its labels itself. */
static int dfi_net_bad_label(const df_net *net, int n, const int *labels) {
    if (labels == NULL || net->classes < 0) return n;
    for (int i = 0; i < n; i++)
        if (labels[i] < -1 || labels[i] >= net->classes + net->null_class) return i;
    return n;
}

/* Checks what goes in and what comes out, so that a forward pass need not. Its temporaries
   end with its scope; under recording all stay, because backward reads them. */
DF_API df_tensor *df_run_net(const df_run *run, df_tensor *x, df_tensor *t,
                             const int *labels) {
    const df_net *net = run->net;
    df_ctx *ctx = run->ctx;
    if (dfi_blocked(ctx, "df_run_net", x, t)) return NULL;
    int fits = x->ndim == net->ndim + 1 && t->ndim == 1 && t->shape[0] == x->shape[0];
    for (int i = 0; fits && i < net->ndim; i++) fits = x->shape[i + 1] == net->shape[i];
    if (!fits)
        return dfi_fail_tensor(ctx, DF_ERR_SHAPE,
                               "df_run_net: x has %d axes and %.0f elements; net '%s' "
                               "wants [B, sample of %d] and t [B]",
                               x->ndim, (double)x->size, net->kind, net->dim);
    int n = x->shape[0], bad = dfi_net_bad_label(net, n, labels);
    if (bad < n)
        return dfi_fail_tensor(
            ctx, DF_ERR_ARGUMENT,
            "df_run_net: label %d of row %d: net '%s' knows 0 to %d, and -1 for none",
            labels[bad], bad, net->kind, net->classes - 1);
    if (run->condition != NULL &&
        (run->condition->ndim != 2 || run->condition->shape[0] != n ||
         run->condition->shape[1] != net->condition))
        return dfi_fail_tensor(ctx, DF_ERR_SHAPE,
                               "df_run_net: the condition has %d axes and %.0f elements; "
                               "net '%s' wants [%d, %d]",
                               run->condition->ndim, (double)run->condition->size,
                               net->kind, n, net->condition);
    df_scope scope = df_scope_begin(ctx);
    df_tensor *y = df_scope_end(ctx, scope, net->forward(run, x, t, labels));
    if (y == NULL) {
        if (dfi_stuck(ctx) != DF_OK) return NULL;
        return dfi_fail_tensor(ctx, DF_ERR_ARGUMENT,
                               "df_run_net: the forward pass of net '%s' returned NULL",
                               net->kind);
    }
    fits = y->ndim == x->ndim + (net->vocab > 0) && y->shape[0] == n &&
           y->shape[1] == net->outputs;
    for (int i = 2; fits && i < x->ndim; i++) fits = y->shape[i] == x->shape[i];
    if (net->vocab > 0) fits = fits && y->shape[x->ndim] == net->vocab;
    if (!fits)
        return dfi_fail_tensor(ctx, DF_ERR_SHAPE,
                               "df_run_net: net '%s' made %.0f elements of %d axes from x "
                               "with %.0f of %d: it must keep the shape%s",
                               net->kind, (double)y->size, y->ndim, (double)x->size,
                               x->ndim, net->vocab ? ", with the vocabulary behind" : "");
    return y;
}

/* Tokens travel as numbers, which df_real holds exactly up to 2^24. */
DF_API df_tensor *df_run_tokens(const df_run *run, const int *tokens, int n, df_tensor *t,
                                const int *labels) {
    const df_net *net = run->net;
    df_ctx *ctx = run->ctx;
    int shape[4];
    shape[0] = n;
    for (int i = 0; i < net->ndim; i++) shape[i + 1] = net->shape[i];
    if (dfi_blocked(ctx, "df_run_tokens", tokens, tokens)) return NULL;
    if (net->vocab == 0)
        return dfi_fail_tensor(ctx, DF_ERR_ARGUMENT,
                               "df_run_tokens: samples of net '%s' are not tokens",
                               net->kind);
    df_tensor *x = df_tensor_new(ctx, net->ndim + 1, shape);
    for (size_t i = 0; x != NULL && i < x->size; i++) x->data[i] = (df_real)tokens[i];
    return df_run_net(run, x, t != NULL ? t : df_tensor_new(ctx, 1, &n), labels);
}

/* Has the answer a channel for each of x? Else the tensors stick. */
static int dfi_run_square(const df_run *run, const char *who) {
    const df_net *net = run->net;
    if (net->outputs == net->shape[0] && net->vocab == 0) return 1;
    dfi_fail_tensor(run->ctx, DF_ERR_SHAPE,
                    "%s: net '%s' makes %d channels (vocabulary %d) of %d: wants as many",
                    who, net->kind, net->outputs, net->vocab, net->shape[0]);
    return 0;
}

/* Sums over each row of x [n, ...]: [n]. */
static df_tensor *dfi_row_sums(df_ctx *ctx, int dim, df_tensor *x) {
    int flat[2] = {-1, 0};
    flat[1] = dim;
    return df_sum_axis(ctx, df_reshape(ctx, x, 2, flat), 1, 0);
}
/* Rows of e_k, shaped as x. */
static df_tensor *dfi_unit(df_ctx *ctx, int dim, int k, const df_tensor *x) {
    df_tensor *v = df_tensor_new(ctx, x->ndim, x->shape);
    for (size_t at = (size_t)k; v != NULL && at < v->size; at += (size_t)dim)
        v->data[at] = 1;
    return v;
}

/* Forward mode along e_1 .. e_dim, or along the probe: sum of v * (d answer/dx v). */
DF_API df_tensor *df_run_divergence(const df_run *run, df_tensor *x, df_tensor *t,
                                    const int *labels, df_tensor *probe, df_tensor **y) {
    df_ctx *ctx = run->ctx;
    int dim = run->net->dim;
    df_tensor *sum = NULL, *answer = NULL;
    if (y != NULL) *y = NULL;
    if (dfi_blocked(ctx, "df_run_divergence", x, t) ||
        !dfi_run_square(run, "df_run_divergence"))
        return NULL;
    if (x->tangent != NULL || x->size % (size_t)dim != 0)
        return dfi_fail_tensor(ctx, DF_ERR_ARGUMENT,
                               "df_run_divergence: x has %.0f elements, samples %d; it "
                               "must have no tangent of its own",
                               (double)x->size, dim);
    for (int i = 0; i < (probe != NULL ? 1 : dim); i++) {
        df_tensor *v = probe != NULL ? probe : dfi_unit(ctx, dim, i, x);
        if (v == NULL || df_set_tangent(ctx, x, v) != DF_OK) return NULL;
        answer = df_run_net(run, x, t, labels);
        df_tensor *along = answer ? answer->tangent : NULL; /* the answer may be x */
        x->tangent = NULL;
        if (answer == NULL) return NULL;
        df_tensor *part = along ? df_mul(ctx, v, along)
                                : df_tensor_new(ctx, x->ndim, x->shape);
        sum = sum != NULL ? df_add(ctx, sum, part) : part;
        answer->tangent = NULL;
    }
    if (y != NULL) *y = answer;
    return dfi_row_sums(ctx, dim, sum);
}

/* ---- one walk: a network is written once -------------------------------------------- */

/* A walk over the layers builds the network and runs it. While it builds, operations do
   nothing (their context is NULL, and of NULL comes NULL) and each layer adds its
   parameters; while it runs, each layer takes the next ones. So names, order and sizes
   cannot part from the arithmetic. */
typedef struct dfi_pass {
    df_ctx *ctx;       /* of the operations; NULL while building */
    const df_run *run; /* NULL while building */
    const df_net *net;
    df_ctx *maker;   /* building: memory and errors */
    df_net *grows;   /* building: gets the parameters */
    int at, failed;  /* the next parameter; building went wrong */
    char prefix[96]; /* of the names of layers, building */
} dfi_pass;

static dfi_pass dfi_pass_run(const df_run *run) {
    dfi_pass w;
    memset(&w, 0, sizeof w);
    w.ctx = run->ctx;
    w.run = run;
    w.net = run->net;
    return w;
}
static dfi_pass dfi_pass_build(df_ctx *ctx, df_net *net) {
    dfi_pass w;
    memset(&w, 0, sizeof w);
    w.net = w.grows = net;
    w.maker = ctx;
    return w;
}
/* Names from here on begin with this: "down_blocks.0.resnets.1.". */
static void dfi_pass_into(dfi_pass *w, const char *format, int i, int j) {
    if (w->run == NULL) snprintf(w->prefix, sizeof w->prefix, format, i, j);
}

/* kernel > 0: conv2d; 0: linear; else one of these. */
enum { DFI_PASS_NORM = -1, DFI_PASS_TABLE = -2, DFI_PASS_ROW = -3 };

/* Index of the layer's first parameter. */
static int dfi_pass_layer(dfi_pass *w, const char *name, int in, int out, int kernel,
                          df_init init) {
    char full[DFI_NET_NAME];
    int index = w->at, made;
    w->at += kernel == DFI_PASS_TABLE || kernel == DFI_PASS_ROW ? 1 : 2;
    if (w->run != NULL || w->failed) return index;
    snprintf(full, sizeof full, "%s%s", w->prefix, name);
    if (kernel == DFI_PASS_NORM)
        made = df_layer_norm_affine(w->maker, w->grows, full, in);
    else if (kernel == DFI_PASS_TABLE)
        made = df_layer_embedding(w->maker, w->grows, full, in, out, init);
    else if (kernel == DFI_PASS_ROW)
        made = df_net_add(w->maker, w->grows, full, 1, &in, init);
    else if (kernel == 0)
        made = df_layer_linear(w->maker, w->grows, full, in, out, init);
    else
        made = df_layer_conv2d(w->maker, w->grows, full, in, out, kernel, init);
    w->failed = made != index;
    return index;
}
static df_tensor *dfi_pass_linear(dfi_pass *w, const char *name, df_tensor *x, int in,
                                  int out, df_init init) {
    int index = dfi_pass_layer(w, name, in, out, 0, init);
    return w->run ? df_run_linear(w->run, index, x) : NULL;
}
static df_tensor *dfi_pass_conv(dfi_pass *w, const char *name, df_tensor *x, int in,
                                int out, int kernel, int stride, int pad, df_init init) {
    int index = dfi_pass_layer(w, name, in, out, kernel, init);
    return w->run ? df_run_conv2d(w->run, index, x, stride, pad) : NULL;
}
static df_tensor *dfi_pass_group_norm(dfi_pass *w, const char *name, df_tensor *x,
                                      int channels, int groups, double eps) {
    int index = dfi_pass_layer(w, name, channels, 0, DFI_PASS_NORM, DF_INIT_ONE);
    return w->run ? df_run_group_norm(w->run, index, x, groups, eps) : NULL;
}
static df_tensor *dfi_pass_lookup(dfi_pass *w, const char *name, const int *ids, int n,
                                  int rows, int width, df_init init) {
    int index = dfi_pass_layer(w, name, rows, width, DFI_PASS_TABLE, init);
    return w->run ? df_run_embedding(w->run, index, ids, n) : NULL;
}
/* linear_2(SiLU(linear_1(x))): how t, and labels that are numbers, become features. */
static df_tensor *dfi_pass_features(dfi_pass *w, const char *first, const char *second,
                                    df_tensor *x, int in, int out, df_init init) {
    df_tensor *h = df_silu(w->ctx, dfi_pass_linear(w, first, x, in, out, init));
    return dfi_pass_linear(w, second, h, out, out, init);
}

/* A parameter that was drawn, times `scale`. */
static void dfi_pass_scale(dfi_pass *w, int index, double scale) {
    if (w->grows == NULL || w->failed || w->grows->from != NULL) return;
    const df_param *p = &w->grows->param[index];
    for (size_t i = 0; i < p->size; i++)
        w->grows->weights[p->offset + i] *= (df_real)scale;
}
/* ... and never trained. */
static void dfi_pass_fixed(dfi_pass *w, int index, double scale) {
    if (w->grows == NULL || w->failed) return;
    dfi_pass_scale(w, index, scale);
    df_net_freeze(w->grows, index);
}

/* Integers as numbers, [n]. */
static df_tensor *dfi_whole_numbers(df_ctx *ctx, const int *values, int n) {
    df_tensor *y = df_tensor_new(ctx, 1, &n);
    for (int i = 0; y != NULL && i < n; i++) y->data[i] = (df_real)values[i];
    return y;
}
/* Labels with the table's last row for "none"; where there is no such row, -1, which adds
   nothing. NULL: nobody has a label. Step memory. */
static const int *dfi_pass_labels(dfi_pass *w, const int *labels, int n, int null_row) {
    int *copy = w->ctx ? (int *)dfi_scratch(w->ctx, (size_t)n * sizeof *copy) : NULL;
    for (int i = 0; copy != NULL && i < n; i++)
        copy[i] = labels == NULL || labels[i] < 0 ? null_row : labels[i];
    if (w->ctx && copy == NULL) dfi_stick(w->ctx);
    return copy;
}

struct dfi_net_kind {
    const char *name;
    /* checks the configuration, and sets what follows from it */
    df_result (*configure)(df_ctx *ctx, df_net *net);
    df_tensor *(*walk)(dfi_pass *w, df_tensor *x, df_tensor *t, const int *labels);
};
static df_tensor *dfi_net_forward(const df_run *run, df_tensor *x, df_tensor *t,
                                  const int *labels) {
    dfi_pass w = dfi_pass_run(run);
    return run->net->row->walk(&w, x, t, labels);
}
/* What a descriptor or a file says is checked here, then the parameters are added. */
static df_result dfi_net_build(df_ctx *ctx, df_net *net) {
    dfi_pass w = dfi_pass_build(ctx, net);
    char shape[DFI_SHAPE_TEXT];
    if (net->row->configure(ctx, net) != DF_OK) return ctx->code;
    if (net->dim == 0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "%s: a sample of %s: each at least 1, fewer than 2^31 in all",
                        net->kind, dfi_shape_text(net->ndim, net->shape, shape));
    net->row->walk(&w, NULL, NULL, NULL);
    return w.failed ? ctx->code : (df_result)DF_OK;
}
/* Most samples of one question, where the widest tensors have `elements` for each. */
static int dfi_net_rows(double elements) {
    double rows = floor((double)DFI_NET_LIVE / elements);
    return rows > 2 ? (int)rows : 2;
}

/* A net from a descriptor whose integers and numbers become the configuration, from which
   dfi_net_build makes the rest, as it does for a file. Points into the descriptor. */
typedef struct dfi_net_plan {
    const char *kind;
    uint32_t cookie;
    uint64_t seed;
    int ndim, shape[3];
    const int *ints;
    size_t ints_size; /* bytes */
    const double *numbers;
    size_t numbers_size;        /* bytes */
    int classes, condition;     /* where they are no part of the configuration */
    const df_safetensors *from; /* not NULL: parameters are read, by these names */
    dfi_naming naming;
} dfi_net_plan;
static const dfi_net_kind *dfi_net_kind_find(const char *name);
static df_net *dfi_net_new(df_ctx *ctx, const dfi_net_plan *plan) {
    const dfi_net_kind *row = dfi_net_kind_find(plan->kind);
    if (ctx == NULL) return NULL;
    if (plan->cookie != DFI_COOKIE) {
        dfi_fail(ctx, DF_ERR_ARGUMENT,
                 "df_%s_create: start the descriptor with df_%s_defaults", row->name,
                 row->name);
        return NULL;
    }
    df_net *net = dfi_net_make(ctx, row->name, plan->ndim, plan->shape, row,
                               dfi_net_forward, plan->seed);
    if (net == NULL) return NULL;
    net->classes = plan->classes;
    net->condition = plan->condition;
    memcpy(net->config, plan->ints, plan->ints_size);
    if (plan->numbers_size > 0) memcpy(net->number, plan->numbers, plan->numbers_size);
    net->from = plan->from;
    net->naming = plan->naming;
    if (dfi_net_build(ctx, net) != DF_OK) {
        df_net_free(net);
        return NULL;
    }
    net->from = NULL;
    net->sealed = 1;
    return net;
}
/* Whether the net's shape is its configuration's: a file says both. */
static int dfi_net_shaped(df_ctx *ctx, const df_net *net, const dfi_net_plan *plan) {
    char is[DFI_SHAPE_TEXT], wants[DFI_SHAPE_TEXT];
    if (net->ndim == plan->ndim &&
        memcmp(net->shape, plan->shape, (size_t)net->ndim * sizeof *net->shape) == 0)
        return 1;
    dfi_fail(ctx, DF_ERR_ARGUMENT, "%s: the shape is %s, the configuration wants %s",
             net->kind, dfi_shape_text(net->ndim, net->shape, is),
             dfi_shape_text(plan->ndim, plan->shape, wants));
    return 0;
}

/* ---- the residual MLP -------------------------------------------------------------- */

/* config: the descriptor's width, depth, embed; number: time_scale, period. The parameters
   in order: inp, hid.0 .. hid.D-1, out, and the table of labels last, so that it moves no
   other. */
enum { DFI_MLP_WIDTH, DFI_MLP_DEPTH, DFI_MLP_EMBED };
enum { DFI_MLP_TIME_SCALE, DFI_MLP_PERIOD };

/* c = [cos(s t f_k), sin(s t f_k)] + E[label],  f_k = period^(-k/half)
   h = SiLU(W_in [x, c, condition] + b_in);  D times: h += SiLU(W_i h + b_i);
   y = W_out h + b_out */
static df_tensor *dfi_mlp_walk(dfi_pass *w, df_tensor *x, df_tensor *t,
                               const int *labels) {
    df_ctx *c = w->ctx;
    const df_net *net = w->net;
    int width = net->config[DFI_MLP_WIDTH], embed = net->config[DFI_MLP_EMBED];
    int in = net->dim + embed + net->condition, n = x != NULL ? x->shape[0] : 1;
    df_scope scope = df_scope_begin(c); /* ended after each layer: only h stays */
    df_tensor *h, *e = df_scale(c, t, net->number[DFI_MLP_TIME_SCALE]);
    e = df_sinusoidal(c, e, embed, net->number[DFI_MLP_PERIOD], 1, 0);
    if (labels != NULL && net->classes > 0)
        e = df_add(c, e, df_run_embedding(w->run, net->count - 1, labels, n));
    if (c != NULL && net->condition > 0)
        e = df_concat(c, e, dfi_run_condition(w->run, n), 1);
    h = dfi_pass_linear(w, "inp", df_concat(c, x, e, 1), in, width, DF_INIT_FAN_IN);
    h = df_scope_end(c, scope, df_silu(c, h));
    for (int i = 0; i < net->config[DFI_MLP_DEPTH]; i++) {
        dfi_pass_into(w, "hid.%d", i, 0);
        e = dfi_pass_linear(w, "", h, width, width, DF_INIT_FAN_IN);
        h = df_scope_end(c, scope, df_add(c, h, df_silu(c, e)));
    }
    dfi_pass_into(w, "", 0, 0);
    h = dfi_pass_linear(w, "out", h, width, net->dim, DF_INIT_FAN_IN);
    if (net->classes > 0)
        dfi_pass_layer(w, "label", net->classes, embed, DFI_PASS_TABLE, DF_INIT_NORMAL);
    return h;
}

/* The bounds keep products of two of them well inside a size_t and an index inside an
   int. */
static df_result dfi_mlp_configure(df_ctx *ctx, df_net *net) {
    int width = net->config[DFI_MLP_WIDTH], depth = net->config[DFI_MLP_DEPTH];
    int embed = net->config[DFI_MLP_EMBED], dim = net->shape[0];
    double scale = net->number[DFI_MLP_TIME_SCALE], period = net->number[DFI_MLP_PERIOD];
    net->rows = 4096;
    if (net->ndim != 1 || dim < 1 || dim > 1 << 20 || width < 1 || width > 1 << 16 ||
        depth < 0 || depth > 1 << 12 || embed < 2 || embed > 1 << 16 || embed % 2 != 0 ||
        net->classes < 0 || net->classes > 1 << 20 || net->condition < 0 ||
        net->condition > 1 << 20)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "mlp: dim %d, width %d, depth %d, embed %d, classes %d, condition "
                        "%d: want dim in [1, 2^20], width in [1, 65536], depth in [0, "
                        "4096], embed even in [2, 65536], the others in [0, 2^20]",
                        dim, width, depth, embed, net->classes, net->condition);
    if (dfi_nonfinite(scale) || scale == 0 || dfi_nonfinite(period) || period < 1)
        return dfi_fail(
            ctx, DF_ERR_ARGUMENT,
            "mlp: time_scale %g must be a number other than 0, period %g at least 1",
            scale, period);
    return DF_OK;
}

DF_API df_mlp_desc df_mlp_defaults(void) {
    df_mlp_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.dim = 2;
    d.width = 256;
    d.depth = 4;
    d.embed = 128;
    d.time_scale = 1000;
    d.period = 10000;
    return d;
}

DF_API df_net *df_mlp_create(df_ctx *ctx, const df_mlp_desc *desc) {
    const df_mlp_desc d = desc != NULL ? *desc : df_mlp_defaults();
    dfi_net_plan plan = {"mlp", d.cookie, d.seed, 1, {d.dim}, &d.width, 3 * sizeof(int),
                         &d.time_scale, 2 * sizeof(double), d.classes, d.condition, NULL,
                         DFI_NAMES_OWN};
    return dfi_net_new(ctx, &plan);
}

/* ---- the UNet ---------------------------------------------------------------------- */

/* The descriptor's integers are the configuration's slots, its doubles the numbers. */
#define DFI_UNET_INTS                                                                     \
    (offsetof(df_unet_desc, null_class) + sizeof(int) -                                   \
     offsetof(df_unet_desc, in_channels))
static df_unet_desc dfi_unet_of(const df_net *net) {
    df_unet_desc d = df_unet_defaults();
    memcpy(&d.in_channels, net->config, DFI_UNET_INTS);
    memcpy(&d.eps, net->number, 3 * sizeof(double));
    return d;
}
static dfi_net_plan dfi_unet_plan(const df_unet_desc *d) {
    dfi_net_plan plan = {"unet", d->cookie, d->seed, 3,
                         {d->in_channels, d->height, d->width}, &d->in_channels,
                         DFI_UNET_INTS, &d->eps, 3 * sizeof(double), 0, 0, NULL,
                         DFI_NAMES_OWN};
    return plan;
}

typedef struct dfi_unet {
    dfi_pass *w;
    df_unet_desc d;
    df_tensor *emb; /* [B, time_dim] SiLU of time and class */
    int time_dim;
    uint32_t dropped; /* dropouts so far: each has draws of its own */
} dfi_unet;

static df_tensor *dfi_unet_dropout(dfi_unet *u, df_tensor *x) {
    const df_run *run = u->w->run;
    if (run == NULL || !run->training || !(u->d.dropout > 0)) return x;
    return df_dropout(u->w->ctx, x, u->d.dropout, run->seed, run->draw,
                      DFI_DRAW_INIT + 0x100 + u->dropped++);
}

/* Nearest neighbour twice the size, mean of 2x2 half the size, or (0) as it is. */
static df_tensor *dfi_unet_resize(dfi_unet *u, df_tensor *x, int resize) {
    if (resize == 0) return x;
    return resize > 0 ? df_upsample2x(u->w->ctx, x) : df_avg_pool2x2(u->w->ctx, x);
}

/* [B, C] over the pixels of [B, C, H, W]. */
static df_tensor *dfi_unet_over(df_ctx *c, df_tensor *x, int channels) {
    int shape[4] = {-1, 0, 1, 1};
    shape[1] = channels;
    return df_reshape(c, x, 4, shape);
}

/* ResnetBlock2D:  h = conv1(SiLU(norm1(x)));  h += W SiLU(emb)
                   y = (x + conv2(SiLU(norm2(h)))) / scale
   With scale_shift: norm2(h) (1 + s) + b, where [s, b] = W SiLU(emb). x passes a 1x1
   convolution where the channels change. All at twice or half the size if asked to. */
static df_tensor *dfi_unet_resnet(dfi_unet *u, df_tensor *x, int in, int out, int resize,
                                  double scale) {
    dfi_pass *w = u->w;
    df_ctx *c = w->ctx;
    const df_unet_desc *d = &u->d;
    df_scope scope = df_scope_begin(c);
    df_tensor *skip = dfi_unet_resize(u, x, resize), *h, *t;
    df_scope inner = df_scope_begin(c); /* only what convolutions make outlives it */
    h = df_silu(c, dfi_pass_group_norm(w, "norm1", x, in, d->groups, d->eps));
    h = dfi_unet_resize(u, h, resize);
    h = df_scope_end(c, inner,
                     dfi_pass_conv(w, "conv1", h, in, out, 3, 1, 1, DF_INIT_FAN_IN));
    t = dfi_pass_linear(w, "time_emb_proj", u->emb, u->time_dim,
                        d->scale_shift ? 2 * out : out, DF_INIT_FAN_IN);
    if (!d->scale_shift) h = df_add(c, h, dfi_unet_over(c, t, out));
    h = dfi_pass_group_norm(w, "norm2", h, out, d->groups, d->eps);
    if (d->scale_shift) {
        df_tensor *s = dfi_unet_over(c, df_slice(c, t, 1, 0, out), out);
        df_tensor *b = dfi_unet_over(c, df_slice(c, t, 1, out, out), out);
        h = df_add(c, df_mul(c, h, df_affine(c, s, 1, 1)), b);
    }
    h = dfi_unet_dropout(u, df_silu(c, h));
    h = df_scope_end(c, inner,
                     dfi_pass_conv(w, "conv2", h, out, out, 3, 1, 1, DF_INIT_FAN_IN));
    if (in != out)
        skip = dfi_pass_conv(w, "conv_shortcut", skip, in, out, 1, 1, 0, DF_INIT_FAN_IN);
    h = df_add(c, skip, h);
    return df_scope_end(c, scope, scale != 1 ? df_scale(c, h, 1 / scale) : h);
}

/* [B, T, heads dim] <-> [B, heads, T, dim] */
static df_tensor *dfi_heads_apart(df_ctx *c, df_tensor *x, int tokens, int heads,
                                  int dim) {
    static const int order[4] = {0, 2, 1, 3};
    int shape[4] = {-1, 0, 0, 0};
    shape[1] = tokens, shape[2] = heads, shape[3] = dim;
    return df_permute(c, df_reshape(c, x, 4, shape), order);
}
static df_tensor *dfi_heads_joined(df_ctx *c, df_tensor *x, int tokens, int width) {
    static const int order[4] = {0, 2, 1, 3};
    int shape[3] = {-1, 0, 0};
    shape[1] = tokens, shape[2] = width;
    return df_reshape(c, df_permute(c, x, order), 3, shape);
}

/* y = (x + W_o attention(W_q z, W_k z, W_v z)) / scale, z = norm(x) as [B, H W, C]. */
static df_tensor *dfi_unet_attention(dfi_unet *u, df_tensor *x, int channels, int tokens,
                                     int groups, double scale) {
    static const int order[3] = {0, 2, 1};
    static const char *const names[3] = {"to_q", "to_k", "to_v"};
    dfi_pass *w = u->w;
    df_ctx *c = w->ctx;
    int dim = u->d.head_dim > 0 ? u->d.head_dim : channels, heads = channels / dim;
    int flat[3] = {-1, 0, 0}, image[4];
    df_scope scope = df_scope_begin(c);
    df_tensor *z = x, *part[3], *y;
    flat[1] = channels, flat[2] = tokens;
    if (groups > 0)
        z = dfi_pass_group_norm(w, "group_norm", z, channels, groups, u->d.eps);
    z = df_permute(c, df_reshape(c, z, 3, flat), order);
    for (int i = 0; i < 3; i++) {
        y = dfi_pass_linear(w, names[i], z, channels, heads * dim, DF_INIT_FAN_IN);
        part[i] = dfi_heads_apart(c, y, tokens, heads, dim);
    }
    y = df_attention(c, part[0], part[1], part[2], 0);
    y = dfi_heads_joined(c, y, tokens, heads * dim);
    y = dfi_pass_linear(w, "to_out.0", y, heads * dim, channels, DF_INIT_FAN_IN);
    for (int i = 0; i < 4; i++) image[i] = x != NULL ? x->shape[i] : 1;
    y = df_add(c, x, df_reshape(c, df_permute(c, y, order), 4, image));
    return df_scope_end(c, scope, scale != 1 ? df_scale(c, y, 1 / scale) : y);
}

/* A whole time below `rows` (indices come from times, so not to the last bit), or `rows`,
   which df_embedding refuses. */
static int dfi_whole(df_real t, int rows) {
    double whole = floor((double)t + 0.5);
    int fits = fabs((double)t - whole) < 1e-3 && whole >= 0 && whole < rows;
    return fits ? (int)whole : rows;
}
/* Rows of a learned table for whole t. */
static df_tensor *dfi_unet_time_rows(dfi_unet *u, int index, df_tensor *t) {
    df_ctx *c = u->w->ctx;
    int n = t != NULL ? t->shape[0] : 0, rows = u->d.time_rows;
    int *ids = t != NULL ? (int *)dfi_scratch(c, (size_t)n * sizeof *ids) : NULL;
    for (int i = 0; ids != NULL && i < n; i++)
        ids[i] = dfi_whole(t->data[i], rows);
    return t != NULL ? df_run_embedding(u->w->run, index, ids, n) : NULL;
}

/* Features of t, or of labels as numbers, which share the table: [B, C0 or 2 C0]. */
static df_tensor *dfi_unet_sinusoids(dfi_unet *u, df_tensor *t, int index) {
    df_ctx *c = u->w->ctx;
    const df_unet_desc *d = &u->d;
    int column[2] = {-1, 1};
    if (c == NULL) return NULL;
    if (d->time == DF_UNET_LEARNED) return dfi_unet_time_rows(u, index, t);
    if (d->time == DF_UNET_POSITIONAL)
        return df_sinusoidal(c, t, d->channels[0], 10000, d->flip_sin_to_cos,
                             d->freq_shift);
    df_tensor *angle = df_mul(c, df_reshape(c, df_log(c, t), 2, column),
                              df_scale(c, df_run_param(u->w->run, index), 2 * DFI_PI));
    return df_concat(c, df_sin(c, angle), df_cos(c, angle), 1);
}

/* Features of labels, 0 where there is none. */
static df_tensor *dfi_unet_labelled(df_ctx *c, df_tensor *y, const int *labels, int n) {
    int column[2] = {0, 1};
    column[0] = n;
    df_tensor *mask = df_tensor_new(c, 2, column);
    for (int i = 0; mask != NULL && i < n; i++)
        mask->data[i] = labels != NULL && labels[i] >= 0 ? 1 : 0;
    return df_mul(c, y, mask);
}

/* SiLU(MLP(sinusoids of t) + class) */
static void dfi_unet_embed(dfi_unet *u, df_tensor *t, const int *labels, int n) {
    df_ctx *c = u->w->ctx;
    const df_unet_desc *d = &u->d;
    int in = d->channels[0] * (d->time == DF_UNET_FOURIER ? 2 : 1), index = 0;
    if (d->time == DF_UNET_LEARNED)
        index = dfi_pass_layer(u->w, "time_proj", d->time_rows, d->channels[0],
                               DFI_PASS_TABLE, DF_INIT_NORMAL);
    if (d->time == DF_UNET_FOURIER)
        index = dfi_pass_layer(u->w, "time_proj.weight", d->channels[0], 0, DFI_PASS_ROW,
                               DF_INIT_NORMAL);
    if (d->time == DF_UNET_FOURIER) dfi_pass_fixed(u->w, index, 16);
    df_tensor *e = dfi_unet_sinusoids(u, t, index), *y = NULL;
    e = dfi_pass_features(u->w, "time_embedding.linear_1", "time_embedding.linear_2", e,
                          in, u->time_dim, DF_INIT_FAN_IN);
    if (d->class_kind == DF_UNET_CLASS_TABLE && d->classes > 0) {
        labels = dfi_pass_labels(u->w, labels, n, d->null_class ? d->classes : -1);
        y = dfi_pass_lookup(u->w, "class_embedding", labels, n,
                            d->classes + d->null_class, u->time_dim, DF_INIT_NORMAL);
    } else if (d->class_kind == DF_UNET_CLASS_TIMESTEP) {
        const int *numbers = dfi_pass_labels(u->w, labels, n, 0);
        y = dfi_unet_sinusoids(u, c ? dfi_whole_numbers(c, numbers, n) : NULL, index);
        y = dfi_pass_features(u->w, "class_embedding.linear_1",
                              "class_embedding.linear_2", y, in, u->time_dim,
                              DF_INIT_FAN_IN);
        y = dfi_unet_labelled(c, y, labels, n);
    } else if (d->class_kind == DF_UNET_CLASS_IDENTITY && c != NULL)
        y = dfi_run_condition(u->w->run, n);
    u->emb = df_silu(c, y != NULL ? df_add(c, e, y) : e);
}

/* Half the size by a convolution of stride 2. Padding 0 of diffusers is zeros right and
   bottom, TensorFlow's "same". */
static df_tensor *dfi_unet_halve(dfi_unet *u, df_tensor *x, int channels, int block) {
    int pad = u->d.downsample_padding;
    if (block == DF_UNET_RESNET || (block == DF_UNET_ATTENTION && u->d.downsample_resnet))
        return dfi_unet_resnet(u, x, channels, channels, -1, 1);
    if (pad == 0) x = df_pad2d(u->w->ctx, x, 0, 1, 0, 1);
    return dfi_pass_conv(u->w, "conv", x, channels, channels, 3, 2, pad, DF_INIT_FAN_IN);
}
static df_tensor *dfi_unet_double(dfi_unet *u, df_tensor *x, int channels, int block) {
    if (block == DF_UNET_RESNET || (block == DF_UNET_ATTENTION && u->d.upsample_resnet))
        return dfi_unet_resnet(u, x, channels, channels, 1, 1);
    df_scope scope = df_scope_begin(u->w->ctx);
    x = df_upsample2x(u->w->ctx, x);
    x = dfi_pass_conv(u->w, "conv", x, channels, channels, 3, 1, 1, DF_INIT_FAN_IN);
    return df_scope_end(u->w->ctx, scope, x);
}

/* What the way down leaves for the way up: conv_in, each block's output, each halving. */
enum { DFI_UNET_LAYERS = 16, DFI_UNET_SKIPS = DF_UNET_LEVELS * (DFI_UNET_LAYERS + 1) + 1 };
typedef struct dfi_unet_skips {
    df_tensor *x[DFI_UNET_SKIPS];
    int channels[DFI_UNET_SKIPS], count;
} dfi_unet_skips;
static df_tensor *dfi_unet_keep(dfi_unet_skips *s, df_tensor *x, int channels) {
    s->x[s->count] = x;
    s->channels[s->count++] = channels;
    return x;
}

static df_tensor *dfi_unet_down(dfi_unet *u, df_tensor *h, int *tokens,
                                dfi_unet_skips *s) {
    const df_unet_desc *d = &u->d;
    int C = d->channels[0];
    for (int i = 0; i < d->levels; i++) {
        for (int j = 0; j < d->layers; j++) {
            df_scope scope = df_scope_begin(u->w->ctx);
            dfi_pass_into(u->w, "down_blocks.%d.resnets.%d.", i, j);
            h = dfi_unet_resnet(u, h, C, d->channels[i], 0, 1);
            C = d->channels[i];
            dfi_pass_into(u->w, "down_blocks.%d.attentions.%d.", i, j);
            if (d->down[i] == DF_UNET_ATTENTION)
                h = dfi_unet_attention(u, h, C, *tokens, d->groups, 1);
            h = dfi_unet_keep(s, df_scope_end(u->w->ctx, scope, h), C);
        }
        if (i == d->levels - 1) break;
        dfi_pass_into(u->w, "down_blocks.%d.downsamplers.0.", i, 0);
        h = dfi_unet_keep(s, dfi_unet_halve(u, h, C, d->down[i]), C);
        *tokens /= 4;
    }
    return h;
}

static df_tensor *dfi_unet_middle(dfi_unet *u, df_tensor *h, int tokens) {
    const df_unet_desc *d = &u->d;
    int C = d->channels[d->levels - 1], groups = d->attn_groups;
    if (groups == 0 && !d->scale_shift) groups = d->groups;
    dfi_pass_into(u->w, "mid_block.resnets.0.", 0, 0);
    h = dfi_unet_resnet(u, h, C, C, 0, d->mid_scale);
    dfi_pass_into(u->w, "mid_block.attentions.0.", 0, 0);
    if (d->mid_attention) h = dfi_unet_attention(u, h, C, tokens, groups, d->mid_scale);
    dfi_pass_into(u->w, "mid_block.resnets.1.", 0, 0);
    return dfi_unet_resnet(u, h, C, C, 0, d->mid_scale);
}

static df_tensor *dfi_unet_up(dfi_unet *u, df_tensor *h, int tokens, dfi_unet_skips *s) {
    const df_unet_desc *d = &u->d;
    int C = d->channels[d->levels - 1];
    df_scope scope = df_scope_begin(u->w->ctx);
    for (int i = 0; i < d->levels; i++) {
        int out = d->channels[d->levels - 1 - i];
        for (int j = 0; j <= d->layers; j++) {
            dfi_pass_into(u->w, "up_blocks.%d.resnets.%d.", i, j);
            int skip = s->channels[--s->count];
            h = df_concat(u->w->ctx, h, s->x[s->count], 1);
            h = dfi_unet_resnet(u, h, C + skip, out, 0, 1);
            C = out;
            dfi_pass_into(u->w, "up_blocks.%d.attentions.%d.", i, j);
            if (d->up[i] == DF_UNET_ATTENTION)
                h = dfi_unet_attention(u, h, C, tokens, d->groups, 1);
            h = df_scope_end(u->w->ctx, scope, h);
        }
        if (i == d->levels - 1) break;
        dfi_pass_into(u->w, "up_blocks.%d.upsamplers.0.", i, 0);
        h = df_scope_end(u->w->ctx, scope, dfi_unet_double(u, h, C, d->up[i]));
        tokens *= 4;
    }
    return h;
}

static df_tensor *dfi_unet_walk(dfi_pass *w, df_tensor *x, df_tensor *t,
                                const int *labels) {
    df_ctx *c = w->ctx;
    dfi_unet u;
    dfi_unet_skips skips;
    memset(&u, 0, sizeof u);
    u.w = w;
    u.d = dfi_unet_of(w->net);
    const df_unet_desc *d = &u.d;
    int tokens = d->height * d->width, C = d->channels[0], column[4] = {-1, 1, 1, 1};
    u.time_dim = d->time_dim > 0 ? d->time_dim : 4 * C;
    skips.count = 0;
    if (d->center_input) x = df_affine(c, x, 2, -1);
    dfi_unet_embed(&u, t, labels, x != NULL ? x->shape[0] : 1);
    df_tensor *h =
        dfi_pass_conv(w, "conv_in", x, d->in_channels, C, 3, 1, 1, DF_INIT_FAN_IN);
    h = dfi_unet_down(&u, dfi_unet_keep(&skips, h, C), &tokens, &skips);
    h = dfi_unet_middle(&u, h, tokens);
    h = dfi_unet_up(&u, h, tokens, &skips);
    dfi_pass_into(w, "", 0, 0);
    h = df_silu(c, dfi_pass_group_norm(w, "conv_norm_out", h, C, d->groups, d->eps));
    h = dfi_pass_conv(w, "conv_out", h, C, d->out_channels, 3, 1, 1, DF_INIT_FAN_IN);
    if (d->time == DF_UNET_FOURIER) h = df_div(c, h, df_reshape(c, t, 4, column));
    return h;
}

/* The nearest sizes that halve `halvings` times. */
static df_result dfi_unet_size(df_ctx *ctx, const char *what, int size, int halvings) {
    int unit = 1 << halvings, below = size / unit * unit;
    if (size % unit == 0) return DF_OK;
    if (below == 0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "%s %d cannot be halved %d times: the nearest size that can is %d",
                        what, size, halvings, unit);
    return dfi_fail(ctx, DF_ERR_ARGUMENT,
                    "%s %d cannot be halved %d times: the nearest sizes that can are %d "
                    "and %d",
                    what, size, halvings, below, below + unit);
}

/* Whether `size` lies in [least, most]; the error names the field and both. */
static int dfi_net_range(df_ctx *ctx, const char *field, int value, int least, int most) {
    if (value >= least && value <= most) return 1;
    dfi_fail(ctx, DF_ERR_ARGUMENT, "%s is %d, wanted %d to %d", field, value, least, most);
    return 0;
}

/* Fields of a descriptor that are integers, with what they may be. */
typedef struct dfi_range {
    const char *field; /* NULL ends the list */
    size_t at;
    int least, most;
} dfi_range;
static int dfi_net_ranges(df_ctx *ctx, const dfi_range *r, const void *desc) {
    int fine = 1, value;
    for (; fine && r->field != NULL; r++) {
        memcpy(&value, (const char *)desc + r->at, sizeof value);
        fine = dfi_net_range(ctx, r->field, value, r->least, r->most);
    }
    return fine;
}

#define DFI_RANGE(kind, field, least, most)                                               \
    {#kind ": " #field, offsetof(df_##kind##_desc, field), least, most}
static const dfi_range dfi_unet_ranges[] = {
    DFI_RANGE(unet, in_channels, 1, 4096),
    DFI_RANGE(unet, out_channels, 1, 4096),
    DFI_RANGE(unet, height, 1, 8192),
    DFI_RANGE(unet, width, 1, 8192),
    DFI_RANGE(unet, levels, 1, DF_UNET_LEVELS),
    DFI_RANGE(unet, layers, 1, DFI_UNET_LAYERS),
    DFI_RANGE(unet, head_dim, 0, 1 << 14),
    DFI_RANGE(unet, groups, 1, 1 << 14),
    DFI_RANGE(unet, attn_groups, 0, 1 << 14),
    DFI_RANGE(unet, time, 0, DF_UNET_LEARNED),
    DFI_RANGE(unet, freq_shift, 0, 1 << 14),
    DFI_RANGE(unet, time_dim, 0, 1 << 16),
    DFI_RANGE(unet, downsample_padding, 0, 1),
    DFI_RANGE(unet, class_kind, 0, DF_UNET_CLASS_IDENTITY),
    DFI_RANGE(unet, classes, 0, 1 << 20),
    DFI_RANGE(unet, scale_shift, 0, 1),
    DFI_RANGE(unet, mid_attention, 0, 1),
    DFI_RANGE(unet, center_input, 0, 1),
    DFI_RANGE(unet, flip_sin_to_cos, 0, 1),
    DFI_RANGE(unet, downsample_resnet, 0, 1),
    DFI_RANGE(unet, upsample_resnet, 0, 1),
    {NULL, 0, 0, 0}};

/* Ranges, in which sums of channels and the pixels of a level fit an int (what may not,
   the elements of a sample or a parameter, dfi_net_elements counts); then what must divide
   what. */
static df_result dfi_unet_check(df_ctx *ctx, const df_unet_desc *d) {
    if (!dfi_net_ranges(ctx, dfi_unet_ranges, d) ||
        !dfi_net_range(ctx, "unet: time_rows", d->time_rows, d->time == DF_UNET_LEARNED,
                       1 << 20) ||
        !dfi_net_range(ctx, "unet: null_class", d->null_class, 0, d->classes > 0) ||
        dfi_unet_size(ctx, "unet: height", d->height, d->levels - 1) ||
        dfi_unet_size(ctx, "unet: width", d->width, d->levels - 1))
        return ctx->code;
    for (int i = 0; i < d->levels; i++) {
        int C = d->channels[i], mid = i == d->levels - 1;
        int attends = d->down[i] == DF_UNET_ATTENTION || (mid && d->mid_attention) ||
                      d->up[d->levels - 1 - i] == DF_UNET_ATTENTION;
        if (!dfi_net_range(ctx, "unet: channels of a level", C, 1, 1 << 14) ||
            !dfi_net_range(ctx, "unet: a block of `down`", d->down[i], 0,
                           DF_UNET_RESNET) ||
            !dfi_net_range(ctx, "unet: a block of `up`", d->up[i], 0, DF_UNET_RESNET))
            return ctx->code;
        if (C % d->groups != 0 || (mid && d->attn_groups && C % d->attn_groups != 0))
            return dfi_fail(
                ctx, DF_ERR_ARGUMENT,
                "unet: level %d has %d channels, which %d groups do not divide", i, C,
                C % d->groups ? d->groups : d->attn_groups);
        if (attends && d->head_dim > C)
            return dfi_fail(ctx, DF_ERR_ARGUMENT,
                            "unet: head_dim %d is more than the %d "
                            "channels of level %d",
                            d->head_dim, C, i);
    }
    if (d->time == DF_UNET_POSITIONAL && d->freq_shift >= d->channels[0] / 2)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "unet: freq_shift %d for %d sinusoids: wanted less than half the "
                        "channels of level 0",
                        d->freq_shift, d->channels[0]);
    if (!dfi_positive(d->eps) || !dfi_positive(d->mid_scale) ||
        !(d->dropout >= 0 && d->dropout < 1))
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "unet: eps %g and mid_scale %g must be above "
                        "0, dropout %g in [0, 1)",
                        d->eps, d->mid_scale, d->dropout);
    return DF_OK;
}

static df_result dfi_unet_configure(df_ctx *ctx, df_net *net) {
    df_unet_desc d = dfi_unet_of(net);
    double widest = 1;
    dfi_net_plan plan = dfi_unet_plan(&d);
    if (dfi_unet_check(ctx, &d) || !dfi_net_shaped(ctx, net, &plan)) return ctx->code;
    net->outputs = d.out_channels;
    net->classes = d.classes;
    net->null_class = d.null_class;
    net->condition = 0;
    if (d.class_kind == DF_UNET_CLASS_TIMESTEP) net->classes = 1 << 20;
    if (d.class_kind == DF_UNET_CLASS_IDENTITY)
        net->condition = d.time_dim > 0 ? d.time_dim : 4 * d.channels[0];
    for (int i = 0; i < d.levels; i++) {
        int C = d.channels[i] + d.channels[i + 1 < d.levels ? i + 1 : i];
        widest = fmax(widest, (double)C * (d.height >> i) * (d.width >> i));
    }
    net->rows = dfi_net_rows(widest);
    return DF_OK;
}

DF_API df_unet_desc df_unet_defaults(void) {
    df_unet_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.in_channels = d.out_channels = 3;
    d.height = d.width = 32;
    d.levels = 4;
    for (int i = 0; i < 4; i++) {
        d.channels[i] = 224 * (i + 1);
        d.down[i] = i > 0 ? DF_UNET_ATTENTION : DF_UNET_PLAIN;
        d.up[i] = i < 3 ? DF_UNET_ATTENTION : DF_UNET_PLAIN;
    }
    d.layers = 2;
    d.head_dim = 8;
    d.groups = 32;
    d.mid_attention = 1;
    d.flip_sin_to_cos = 1;
    d.downsample_padding = 1;
    d.eps = 1e-5;
    d.mid_scale = 1;
    return d;
}

DF_API df_net *df_unet_create(df_ctx *ctx, const df_unet_desc *desc) {
    const df_unet_desc d = desc != NULL ? *desc : df_unet_defaults();
    dfi_net_plan plan = dfi_unet_plan(&d);
    return dfi_net_new(ctx, &plan);
}

/* ---- the diffusion transformer ----------------------------------------------------- */

#define DFI_DIT_INTS                                                                      \
    (offsetof(df_dit_desc, diffusers) + sizeof(int) - offsetof(df_dit_desc, in_channels))
static df_dit_desc dfi_dit_of(const df_net *net) {
    df_dit_desc d = df_dit_defaults();
    memcpy(&d.in_channels, net->config, DFI_DIT_INTS);
    return d;
}
static dfi_net_plan dfi_dit_plan(const df_dit_desc *d) {
    dfi_net_plan plan = {"dit", d->cookie, d->seed, 3, {d->in_channels, d->size, d->size},
                         &d->in_channels, DFI_DIT_INTS, NULL, 0, 0, 0, NULL,
                         DFI_NAMES_OWN};
    return plan;
}

/* Positions of a g x g grid, [g g, width]: the first half of the features from the column,
   the second from the row, each half sin(p f_k), then cos(p f_k), with
   f_k = 10000^(-k/(width/4)). */
static void dfi_dit_positions(int g, int width, df_real *out) {
    int quarter = width / 4;
    for (int k = 0; k < width; k++) {
        double f = pow(10000, -(double)(k % quarter) / quarter);
        for (int token = 0; token < g * g; token++) {
            double angle = f * (k < 2 * quarter ? token % g : token / g);
            out[(size_t)token * (size_t)width + (size_t)k] =
                (df_real)(k / quarter % 2 == 0 ? sin(angle) : cos(angle));
        }
    }
}
/* The table of positions, [1, g g, width], the last parameter: read where a file has it,
   never trained. Last, because then a file has proved the width by everything else. */
static void dfi_dit_table(dfi_pass *w, const df_dit_desc *d) {
    int g = d->size / d->patch, shape[3] = {1, 0, 0}, index = w->at++;
    df_net *net = w->grows;
    if (net == NULL || w->failed) return;
    shape[1] = g * g, shape[2] = d->width;
    w->failed = df_net_add(w->maker, net, "pos_embed", 3, shape, DF_INIT_ZERO) != index;
    if (w->failed) return;
    df_net_freeze(net, index);
    if (net->from == NULL || net->naming == DFI_NAMES_DIFFUSERS)
        dfi_dit_positions(g, d->width, net->weights + net->param[index].offset);
}

/* Part i of the modulation [B, parts width] as [B, 1, width]. */
static df_tensor *dfi_dit_part(df_ctx *c, df_tensor *m, int i, int width) {
    int shape[3] = {-1, 1, 0};
    shape[2] = width;
    return df_reshape(c, df_slice(c, m, 1, i * width, width), 3, shape);
}
/* x (1 + scale) + shift, shift and scale being parts i and i + 1 of m; ... of norm(x). */
static df_tensor *dfi_dit_shift(df_ctx *c, df_tensor *x, df_tensor *m, int i, int width) {
    df_tensor *scale = df_affine(c, dfi_dit_part(c, m, i + 1, width), 1, 1);
    return df_add(c, df_mul(c, x, scale), dfi_dit_part(c, m, i, width));
}
static df_tensor *dfi_dit_modulate(df_ctx *c, df_tensor *x, df_tensor *m, int i, int width,
                                   double eps) {
    return dfi_dit_shift(c, df_layer_norm(c, x, NULL, NULL, eps), m, i, width);
}

/* x += gate attention(norm(x) (1 + scale) + shift), then the same of an MLP; the six from
   c by one linear layer that starts at 0, so that each block starts as the identity. */
static df_tensor *dfi_dit_block(dfi_pass *w, const df_dit_desc *d, df_tensor *x,
                                df_tensor *cond, int tokens) {
    df_ctx *c = w->ctx;
    int D = d->width, inner = d->mlp_width > 0 ? d->mlp_width : 4 * D;
    df_tensor *part[3], *y;
    df_tensor *m = dfi_pass_linear(w, "adaLN_modulation.1", cond, D, 6 * D, DF_INIT_ZERO);
    df_scope scope = df_scope_begin(c);
    y = dfi_dit_modulate(c, x, m, 0, D, 1e-6);
    y = dfi_pass_linear(w, "attn.qkv", y, D, 3 * D, DF_INIT_XAVIER);
    for (int i = 0; i < 3; i++)
        part[i] = dfi_heads_apart(c, df_slice(c, y, 2, i * D, D), tokens, d->heads,
                                  D / d->heads);
    y = df_attention(c, part[0], part[1], part[2], 0);
    y = dfi_pass_linear(w, "attn.proj", dfi_heads_joined(c, y, tokens, D), D, D,
                        DF_INIT_XAVIER);
    x = df_scope_end(c, scope, df_add(c, x, df_mul(c, dfi_dit_part(c, m, 2, D), y)));
    y = dfi_dit_modulate(c, x, m, 3, D, d->diffusers ? 1e-5 : 1e-6);
    y = dfi_pass_linear(w, "mlp.fc1", y, D, inner, DF_INIT_XAVIER);
    y = dfi_pass_linear(w, "mlp.fc2", df_gelu_tanh(c, y), inner, D, DF_INIT_XAVIER);
    return df_scope_end(c, scope, df_add(c, x, df_mul(c, dfi_dit_part(c, m, 5, D), y)));
}

/* [B, g g, p p C], the features of a token ordered (row, column, channel), as pictures
   [B, C, g p, g p]: rows of tokens become rows of pixels, then channels go in front. */
static df_tensor *dfi_dit_picture(df_ctx *c, df_tensor *x, int g, int p, int channels) {
    static const int rows[4] = {0, 2, 1, 3}, front[4] = {0, 3, 1, 2};
    int shape[4] = {-1, 0, 0, 0};
    shape[1] = g, shape[2] = p, shape[3] = p * channels;
    x = df_permute(c, df_reshape(c, x, 4, shape), rows);
    shape[1] = shape[2] = g * p, shape[3] = channels;
    return df_permute(c, df_reshape(c, x, 4, shape), front);
}

static df_tensor *dfi_dit_walk(dfi_pass *w, df_tensor *x, df_tensor *t,
                               const int *labels) {
    static const int order[3] = {0, 2, 1};
    df_dit_desc d = dfi_dit_of(w->net);
    df_ctx *c = w->ctx;
    int D = d.width, g = d.size / d.patch, tokens = g * g, flat[3] = {-1, 0, 0};
    int n = x != NULL ? x->shape[0] : 1, out = d.in_channels * (d.learn_sigma ? 2 : 1);
    flat[1] = D, flat[2] = tokens;
    df_tensor *table = w->run ? df_run_param(w->run, w->net->count - 1) : NULL;
    df_tensor *h = dfi_pass_conv(w, "x_embedder.proj", x, d.in_channels, D, d.patch,
                                 d.patch, 0, DF_INIT_XAVIER);
    /* DiT draws it as the linear layer that it is: of p p C numbers, without p p for D */
    double taps = (double)d.in_channels * d.patch * d.patch;
    dfi_pass_scale(w, 0, sqrt((taps + (double)D * d.patch * d.patch) / (taps + D)));
    h = df_add(c, df_permute(c, df_reshape(c, h, 3, flat), order), table);
    df_tensor *e = df_sinusoidal(c, t, 256, 10000, 1, d.diffusers ? 1 : 0);
    e = dfi_pass_features(w, "t_embedder.mlp.0", "t_embedder.mlp.2", e, 256, D,
                          DF_INIT_NORMAL_02);
    labels = dfi_pass_labels(w, labels, n, d.null_class ? d.classes : -1);
    e = df_add(c, e,
               dfi_pass_lookup(w, "y_embedder.embedding_table", labels, n,
                               d.classes + d.null_class, D, DF_INIT_NORMAL_02));
    e = df_silu(c, e);
    df_scope scope = df_scope_begin(c);
    for (int i = 0; i < d.depth; i++) {
        dfi_pass_into(w, "blocks.%d.", i, 0);
        h = df_scope_end(c, scope, dfi_dit_block(w, &d, h, e, tokens));
    }
    dfi_pass_into(w, "final_layer.", 0, 0);
    df_tensor *m = dfi_pass_linear(w, "adaLN_modulation.1", e, D, 2 * D, DF_INIT_ZERO);
    h = dfi_dit_modulate(c, h, m, 0, D, 1e-6);
    h = dfi_pass_linear(w, "linear", h, D, d.patch * d.patch * out, DF_INIT_ZERO);
    dfi_pass_into(w, "", 0, 0);
    dfi_dit_table(w, &d);
    return dfi_dit_picture(c, h, g, d.patch, out);
}

static const dfi_range dfi_dit_ranges[] = {
    DFI_RANGE(dit, in_channels, 1, 4096),
    DFI_RANGE(dit, size, 1, 4096),
    DFI_RANGE(dit, patch, 1, 64),
    DFI_RANGE(dit, width, 4, 1 << 14),
    DFI_RANGE(dit, depth, 1, 1 << 10),
    DFI_RANGE(dit, heads, 1, 1 << 12),
    DFI_RANGE(dit, mlp_width, 0, 1 << 16),
    DFI_RANGE(dit, classes, 1, 1 << 20),
    DFI_RANGE(dit, null_class, 0, 1),
    DFI_RANGE(dit, learn_sigma, 0, 1),
    DFI_RANGE(dit, diffusers, 0, 1),
    {NULL, 0, 0, 0}};

static df_result dfi_dit_check(df_ctx *ctx, const df_dit_desc *d) {
    if (!dfi_net_ranges(ctx, dfi_dit_ranges, d)) return ctx->code;
    if (d->size % d->patch != 0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "dit: size %d is not cut by patches of %d: the "
                        "nearest sizes that are: %d and %d",
                        d->size, d->patch, d->size / d->patch * d->patch,
                        (d->size / d->patch + 1) * d->patch);
    if (d->width % 4 != 0 || d->width % d->heads != 0 || d->size / d->patch > 256)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "dit: width %d must be a multiple of 4 and of "
                        "the %d heads, and a side have at most 256 patches, not %d",
                        d->width, d->heads, d->size / d->patch);
    return DF_OK;
}

static df_result dfi_dit_configure(df_ctx *ctx, df_net *net) {
    df_dit_desc d = dfi_dit_of(net);
    dfi_net_plan plan = dfi_dit_plan(&d);
    if (dfi_dit_check(ctx, &d) || !dfi_net_shaped(ctx, net, &plan)) return ctx->code;
    net->outputs = d.in_channels * (d.learn_sigma ? 2 : 1);
    net->classes = d.classes;
    net->null_class = d.null_class;
    net->condition = 0;
    if (d.learn_sigma) net->card.learned = DF_LEARNED_RANGE;
    net->rows = dfi_net_rows(2.0 * (d.size / d.patch) * (d.size / d.patch) * d.width);
    return DF_OK;
}

DF_API df_dit_desc df_dit_defaults(void) {
    df_dit_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.in_channels = 4;
    d.size = 32;
    d.patch = 2;
    d.width = 1152;
    d.depth = 28;
    d.heads = 16;
    d.classes = 1000;
    d.null_class = 1;
    d.learn_sigma = 1;
    return d;
}

DF_API df_net *df_dit_create(df_ctx *ctx, const df_dit_desc *desc) {
    const df_dit_desc d = desc != NULL ? *desc : df_dit_defaults();
    dfi_net_plan plan = dfi_dit_plan(&d);
    return dfi_net_new(ctx, &plan);
}

/* ---- the token transformer ---------------------------------------------------------- */

#define DFI_TRANSFORMER_INTS                                                              \
    (offsetof(df_transformer_desc, null_class) + sizeof(int) -                            \
     offsetof(df_transformer_desc, vocab))
static df_transformer_desc dfi_transformer_of(const df_net *net) {
    df_transformer_desc d = df_transformer_defaults();
    memcpy(&d.vocab, net->config, DFI_TRANSFORMER_INTS);
    return d;
}
static dfi_net_plan dfi_transformer_plan(const df_transformer_desc *d) {
    dfi_net_plan plan = {"transformer", d->cookie, d->seed, 1, {d->length}, &d->vocab,
                         DFI_TRANSFORMER_INTS, NULL, 0, 0, 0, NULL, DFI_NAMES_OWN};
    return plan;
}

/* A parameter with no bias beside it, under its full name. */
static df_tensor *dfi_pass_param(dfi_pass *w, const char *name, int ndim, const int *shape,
                                 df_init init) {
    char full[DFI_NET_NAME];
    int index = w->at++;
    if (w->run != NULL) return df_run_param(w->run, index);
    snprintf(full, sizeof full, "%s%s", w->prefix, name);
    if (!w->failed)
        w->failed = df_net_add(w->maker, w->grows, full, ndim, shape, init) != index;
    return NULL;
}
static df_tensor *dfi_pass_matrix(dfi_pass *w, const char *name, df_tensor *x, int in,
                                  int out) {
    int shape[2];
    shape[0] = out, shape[1] = in;
    return df_linear(w->ctx, x, dfi_pass_param(w, name, 2, shape, DF_INIT_FAN_IN), NULL);
}

/* Whole numbers of x as indices; anything else is refused. Step memory. */
static const int *dfi_transformer_ids(df_ctx *c, const df_tensor *x, int vocab) {
    int *ids = (int *)dfi_scratch(c, dfi_mul(x->size, sizeof *ids));
    if (ids == NULL) dfi_stick(c);
    for (size_t i = 0; ids != NULL && i < x->size; i++) {
        double v = (double)x->data[i];
        ids[i] = v >= 0 && v < vocab ? (int)v : -1;
        if (ids[i] >= 0 && (double)ids[i] == v) continue;
        dfi_fail_tensor(c, DF_ERR_ARGUMENT,
                        "transformer: token %.0f of row %.0f is %g, wanted a whole number "
                        "from 0 to %d",
                        (double)(i % (size_t)x->shape[1]),
                        (double)(i / (size_t)x->shape[1]), v, vocab - 1);
        return NULL;
    }
    return ids;
}

/* w norm(x), then, where blocks are conditioned, parts i and i + 1 of m. */
static df_tensor *dfi_transformer_norm(dfi_pass *w, const df_transformer_desc *d,
                                       const char *name, df_tensor *x, df_tensor *m,
                                       int i) {
    df_tensor *weight = dfi_pass_param(w, name, 1, &d->width, DF_INIT_ONE);
    x = d->rms ? df_rms_norm(w->ctx, x, weight, 1e-5)
               : df_layer_norm(w->ctx, x, weight, NULL, 1e-5);
    return m != NULL ? dfi_dit_shift(w->ctx, x, m, i, d->width) : x;
}
/* x + gate y */
static df_tensor *dfi_transformer_add(df_ctx *c, df_tensor *x, df_tensor *m, int i,
                                      df_tensor *y) {
    if (m != NULL) y = df_mul(c, dfi_dit_part(c, m, i, y ? y->shape[2] : 1), y);
    return df_add(c, x, y);
}

/* The DiT's block, with weights in its norms, none beside the attention's matrices, and
   queries and keys turned by their positions: as one tensor, so that angles are computed
   once. */
static df_tensor *dfi_transformer_block(dfi_pass *w, const df_transformer_desc *d,
                                        df_tensor *x, df_tensor *cond) {
    df_ctx *c = w->ctx;
    int D = d->width, H = d->heads, T = d->length, dim = D / H;
    int inner = d->mlp_width > 0 ? d->mlp_width : 4 * D;
    df_tensor *m = NULL, *y, *both, *v;
    if (d->time || d->classes > 0)
        m = dfi_pass_linear(w, "adaLN_modulation", cond, d->cond_width, 6 * D,
                            DF_INIT_ZERO);
    df_scope scope = df_scope_begin(c);
    y = dfi_transformer_norm(w, d, "norm1.weight", x, m, 0);
    y = dfi_pass_matrix(w, "attn_qkv.weight", y, D, 3 * D);
    both = dfi_heads_apart(c, df_slice(c, y, 2, 0, 2 * D), T, 2 * H, dim);
    both = df_rotary(c, both, 10000);
    v = dfi_heads_apart(c, df_slice(c, y, 2, 2 * D, D), T, H, dim);
    y = df_attention(c, df_slice(c, both, 1, 0, H), df_slice(c, both, 1, H, H), v, 0);
    y = dfi_pass_matrix(w, "attn_out.weight", dfi_heads_joined(c, y, T, D), D, D);
    x = df_scope_end(c, scope, dfi_transformer_add(c, x, m, 2, y));
    y = dfi_transformer_norm(w, d, "norm2.weight", x, m, 3);
    y = dfi_pass_linear(w, "mlp.0", y, D, inner, DF_INIT_FAN_IN);
    y = dfi_pass_linear(w, "mlp.2", df_gelu_tanh(c, y), inner, D, DF_INIT_FAN_IN);
    return df_scope_end(c, scope, dfi_transformer_add(c, x, m, 5, y));
}

/* SiLU(MLP(sinusoids of t) + class), what there is of it. */
static df_tensor *dfi_transformer_cond(dfi_pass *w, const df_transformer_desc *d,
                                       df_tensor *t, const int *labels, int n) {
    df_tensor *e = NULL, *y = NULL;
    if (d->time)
        e = dfi_pass_features(w, "sigma_map.mlp.0", "sigma_map.mlp.2",
                              df_sinusoidal(w->ctx, t, 256, 10000, 1, 0), 256,
                              d->cond_width, DF_INIT_FAN_IN);
    if (d->classes > 0) {
        labels = dfi_pass_labels(w, labels, n, d->null_class ? d->classes : -1);
        y = dfi_pass_lookup(w, "cond_map.embedding_table", labels, n,
                            d->classes + d->null_class, d->cond_width, DF_INIT_NORMAL);
        e = d->time ? df_add(w->ctx, e, y) : y;
    }
    return e != NULL ? df_silu(w->ctx, e) : NULL;
}

static df_tensor *dfi_transformer_walk(dfi_pass *w, df_tensor *x, df_tensor *t,
                                       const int *labels) {
    df_transformer_desc d = dfi_transformer_of(w->net);
    df_ctx *c = w->ctx;
    int table[2], flat[3] = {-1, 0, 0}, n = x != NULL ? x->shape[0] : 1;
    table[0] = d.vocab, table[1] = flat[2] = d.width, flat[1] = d.length;
    df_tensor *m = NULL;
    df_tensor *h = dfi_pass_param(w, "vocab_embed.embedding", 2, table, DF_INIT_FAN_IN);
    if (x != NULL)
        h = df_embedding(c, h, dfi_transformer_ids(c, x, d.vocab), n * d.length);
    h = df_reshape(c, h, 3, flat);
    df_tensor *cond = dfi_transformer_cond(w, &d, t, labels, n);
    df_scope scope = df_scope_begin(c);
    for (int i = 0; i < d.depth; i++) {
        dfi_pass_into(w, "blocks.%d.", i, 0);
        h = df_scope_end(c, scope, dfi_transformer_block(w, &d, h, cond));
    }
    dfi_pass_into(w, "output_layer.", 0, 0);
    if (d.time || d.classes > 0)
        m = dfi_pass_linear(w, "adaLN_modulation", cond, d.cond_width, 2 * d.width,
                            DF_INIT_ZERO);
    h = dfi_transformer_norm(w, &d, "norm_final.weight", h, m, 0);
    h = dfi_pass_linear(w, "linear", h, d.width, d.vocab, DF_INIT_ZERO);
    return h;
}

static const dfi_range dfi_transformer_ranges[] = {
    DFI_RANGE(transformer, vocab, 1, 1 << 20),
    DFI_RANGE(transformer, length, 1, 1 << 16),
    DFI_RANGE(transformer, width, 2, 1 << 14),
    DFI_RANGE(transformer, depth, 1, 1 << 10),
    DFI_RANGE(transformer, heads, 1, 1 << 12),
    DFI_RANGE(transformer, mlp_width, 0, 1 << 16),
    DFI_RANGE(transformer, cond_width, 1, 1 << 14),
    DFI_RANGE(transformer, time, 0, 1),
    DFI_RANGE(transformer, rms, 0, 1),
    DFI_RANGE(transformer, classes, 0, 1 << 20),
    DFI_RANGE(transformer, null_class, 0, 1),
    {NULL, 0, 0, 0}};

static df_result dfi_transformer_check(df_ctx *ctx, const df_transformer_desc *d) {
    if (!dfi_net_ranges(ctx, dfi_transformer_ranges, d)) return ctx->code;
    if (d->width % (2 * d->heads) != 0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "transformer: width %d does not give each of %d heads an even "
                        "number of features",
                        d->width, d->heads);
    return DF_OK;
}

static df_result dfi_transformer_configure(df_ctx *ctx, df_net *net) {
    df_transformer_desc d = dfi_transformer_of(net);
    dfi_net_plan plan = dfi_transformer_plan(&d);
    if (dfi_transformer_check(ctx, &d) || !dfi_net_shaped(ctx, net, &plan))
        return ctx->code;
    net->null_class = d.classes > 0 && d.null_class;
    net->classes = d.classes;
    net->condition = 0;
    net->vocab = d.vocab;
    net->rows = dfi_net_rows(d.length * fmax(d.vocab, 3 * d.width));
    return DF_OK;
}

DF_API df_transformer_desc df_transformer_defaults(void) {
    df_transformer_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.vocab = 257;
    d.length = 128;
    d.width = 256;
    d.depth = d.heads = 4;
    d.cond_width = 128;
    d.time = d.null_class = 1;
    return d;
}

DF_API df_net *df_transformer_create(df_ctx *ctx, const df_transformer_desc *desc) {
    const df_transformer_desc d = desc != NULL ? *desc : df_transformer_defaults();
    dfi_net_plan plan = dfi_transformer_plan(&d);
    return dfi_net_new(ctx, &plan);
}

/* ---- the UNet along a trajectory ---------------------------------------------------- */

#define DFI_UNET1D_INTS                                                                   \
    (offsetof(df_unet1d_desc, predict_scale) + sizeof(int) -                              \
     offsetof(df_unet1d_desc, channels))
static df_unet1d_desc dfi_unet1d_of(const df_net *net) {
    df_unet1d_desc d = df_unet1d_defaults();
    memcpy(&d.channels, net->config, DFI_UNET1D_INTS);
    return d;
}
static dfi_net_plan dfi_unet1d_plan(const df_unet1d_desc *d) {
    dfi_net_plan plan = {"unet1d", d->cookie, d->seed, 2, {d->length, d->channels},
                         &d->channels, DFI_UNET1D_INTS, NULL, 0, 0, 0, NULL,
                         DFI_NAMES_OWN};
    return plan;
}

typedef struct dfi_unet1d {
    dfi_pass *w;
    df_unet1d_desc d;
    df_tensor *cond; /* [B, embed + condition] Mish of both */
} dfi_unet1d;

/* x tanh(log(1 + e^x)) (Misra 2020) */
static df_tensor *dfi_mish(df_ctx *c, df_tensor *x) {
    return df_mul(c, x, df_tanh(c, df_softplus(c, x)));
}

/* Weight [a, b, kernel] and bias [a], PyTorch's Conv1d and ConvTranspose1d. */
static df_tensor *dfi_pass_conv1d_weight(dfi_pass *w, const char *name, int a, int b,
                                         int kernel, df_tensor **bias) {
    char full[DFI_NET_NAME];
    int index = w->at, shape[3];
    w->at += 2;
    shape[0] = a, shape[1] = b, shape[2] = kernel;
    *bias = w->run != NULL ? df_run_param(w->run, index + 1) : NULL;
    if (w->run != NULL) return df_run_param(w->run, index);
    snprintf(full, sizeof full, "%s%s", w->prefix, name);
    if (!w->failed)
        w->failed =
            dfi_layer_affine(w->maker, w->grows, full, 3, shape, DF_INIT_FAN_IN) != index;
    return NULL;
}
/* Trajectories lie as images of one row, [B, C, 1, T]; for the convolution all are rows of
   one image [1, C, B, T], so that it is one product with many columns, not B with few
   (a stride would skip samples: there they are not). Zeros at both ends keep T. */
static df_tensor *dfi_pass_conv1d(dfi_pass *w, const char *name, df_tensor *x, int in,
                                  int out, int kernel, int stride) {
    static const int swap[4] = {2, 1, 0, 3};
    df_ctx *c = w->ctx;
    df_tensor *bias, *weight = dfi_pass_conv1d_weight(w, name, out, in, kernel, &bias);
    df_scope scope = df_scope_begin(c);
    int row[4] = {0, 0, 1, 0};
    row[0] = out, row[1] = in, row[3] = kernel;
    if (stride == 1) x = df_permute(c, x, swap);
    if (kernel > 1) x = df_pad2d(c, x, 0, 0, kernel / 2, kernel / 2);
    x = df_conv2d(c, x, df_reshape(c, weight, 4, row), bias, stride, 0);
    return df_scope_end(c, scope, stride == 1 ? df_permute(c, x, swap) : x);
}

/* Row k of z [B, C, 4, T], moved by one place to the right, left or (0) not, as a column
   [B, C, T, 1]. */
static df_tensor *dfi_unet1d_tap(df_ctx *c, df_tensor *z, int k, int move, int channels,
                                 int T) {
    int column[4] = {-1, 0, 0, 1};
    column[1] = channels, column[2] = T;
    z = df_slice(c, z, 2, k, 1);
    if (move != 0)
        z = df_slice(c, df_pad2d(c, z, 0, 0, move > 0, move < 0), 3, move < 0, T);
    return df_reshape(c, z, 4, column);
}
/* Twice the length: ConvTranspose1d(4, stride 2, padding 1), where x_i adds w_k x_i to
   place 2i + k - 1. With z_k = w_k x, one product,
       y[2m] = z_1[m] + z_3[m - 1],   y[2m + 1] = z_2[m] + z_0[m + 1]. */
static df_tensor *dfi_unet1d_double(dfi_pass *w, df_tensor *x, int channels, int T) {
    df_ctx *c = w->ctx;
    df_tensor *bias, *weight, *z, *even, *odd;
    weight = dfi_pass_conv1d_weight(w, "conv", channels, channels, 4, &bias);
    df_scope scope = df_scope_begin(c);
    int flat[3] = {-1, 0, 0}, four[4] = {-1, 0, 4, 0}, row[4] = {-1, 0, 1, 0};
    int channel[3] = {0, 1, 1};
    flat[1] = four[1] = row[1] = channel[0] = channels;
    flat[2] = four[3] = T, row[3] = 2 * T;
    int taps[2];
    taps[0] = channels, taps[1] = 4 * channels;
    z = df_matmul(c, df_reshape(c, weight, 2, taps), df_reshape(c, x, 3, flat), 1, 0);
    z = df_reshape(c, z, 4, four);
    even = df_add(c, dfi_unet1d_tap(c, z, 1, 0, channels, T),
                  dfi_unet1d_tap(c, z, 3, 1, channels, T));
    odd = df_add(c, dfi_unet1d_tap(c, z, 2, 0, channels, T),
                 dfi_unet1d_tap(c, z, 0, -1, channels, T));
    z = df_reshape(c, df_concat(c, even, odd, 3), 4, row);
    return df_scope_end(c, scope, df_add(c, z, df_reshape(c, bias, 3, channel)));
}

/* Conv1dBlock: Mish(norm(conv(x))). */
static df_tensor *dfi_unet1d_conv(dfi_unet1d *u, const char *conv, const char *norm,
                                  df_tensor *x, int in, int out, int groups) {
    x = dfi_pass_conv1d(u->w, conv, x, in, out, u->d.kernel, 1);
    return dfi_mish(u->w->ctx, dfi_pass_group_norm(u->w, norm, x, out, groups, 1e-5));
}
/* h = block_0(x);  h = s h + b, [s, b] = W Mish([t, condition]);  y = x + block_1(h).
   x passes a 1x1 convolution where the channels change. */
static df_tensor *dfi_unet1d_block(dfi_unet1d *u, df_tensor *x, int in, int out) {
    dfi_pass *w = u->w;
    df_ctx *c = w->ctx;
    int scales = u->d.predict_scale, G = u->d.groups;
    df_scope scope = df_scope_begin(c);
    df_tensor *h =
        dfi_unet1d_conv(u, "blocks.0.block.0", "blocks.0.block.1", x, in, out, G);
    df_tensor *e =
        dfi_pass_linear(w, "cond_encoder.1", u->cond, u->d.embed + u->d.condition,
                        out << scales, DF_INIT_FAN_IN);
    if (scales) {
        h = df_mul(c, h, dfi_unet_over(c, df_slice(c, e, 1, 0, out), out));
        e = df_slice(c, e, 1, out, out);
    }
    h = df_add(c, h, dfi_unet_over(c, e, out));
    h = dfi_unet1d_conv(u, "blocks.1.block.0", "blocks.1.block.1", h, out, out, G);
    if (in != out) x = dfi_pass_conv1d(w, "residual_conv", x, in, out, 1, 1);
    return df_scope_end(c, scope, df_add(c, h, x));
}

/* Mish([MLP(sinusoids of t), condition]): each block begins with this Mish. */
static df_tensor *dfi_unet1d_cond(dfi_unet1d *u, df_tensor *t) {
    df_ctx *c = u->w->ctx;
    int E = u->d.embed;
    df_tensor *e = df_sinusoidal(c, t, E, 10000, 0, 1);
    e = dfi_pass_linear(u->w, "diffusion_step_encoder.1", e, E, 4 * E, DF_INIT_FAN_IN);
    e = dfi_pass_linear(u->w, "diffusion_step_encoder.3", dfi_mish(c, e), 4 * E, E,
                        DF_INIT_FAN_IN);
    if (u->d.condition > 0 && c != NULL && t != NULL)
        e = df_concat(c, e, dfi_run_condition(u->w->run, t->shape[0]), 1);
    return dfi_mish(c, e);
}

/* Two blocks, "down_modules.i.0." and ".1.". */
static df_tensor *dfi_unet1d_pair(dfi_unet1d *u, const char *first, const char *second,
                                  int i, df_tensor *x, int in, int out) {
    dfi_pass_into(u->w, first, i, 0);
    x = dfi_unet1d_block(u, x, in, out);
    dfi_pass_into(u->w, second, i, 0);
    return dfi_unet1d_block(u, x, out, out);
}

/* Unlike the image's UNet, a level leaves its result, not its halving, for the way up, and
   the finest level none. */
static df_tensor *dfi_unet1d_walk(dfi_pass *w, df_tensor *x, df_tensor *t,
                                  const int *labels) {
    static const int turned[3] = {0, 2, 1};
    dfi_unet1d u;
    u.w = w, u.d = dfi_unet1d_of(w->net);
    const df_unet1d_desc *d = &u.d;
    df_ctx *c = w->ctx;
    df_tensor *skip[DF_UNET_LEVELS], *h;
    int C = d->channels, T = d->length, row[4] = {-1, 0, 1, 0}, back[3] = {-1, 0, 0};
    row[1] = back[1] = C, row[3] = back[2] = T;
    (void)labels;
    u.cond = dfi_unet1d_cond(&u, t);
    h = df_reshape(c, df_permute(c, x, turned), 4, row);
    for (int i = 0; i < d->levels; i++, C = d->width[i - 1]) {
        df_scope scope = df_scope_begin(c);
        h = dfi_unet1d_pair(&u, "down_modules.%d.0.", "down_modules.%d.1.", i, h, C,
                            d->width[i]);
        skip[i] = h = df_scope_end(c, scope, h);
        if (i == d->levels - 1) continue;
        dfi_pass_into(w, "down_modules.%d.2.", i, 0);
        h = dfi_pass_conv1d(w, "conv", h, d->width[i], d->width[i], 3, 2);
        T /= 2;
    }
    df_scope scope = df_scope_begin(c);
    h = dfi_unet1d_pair(&u, "mid_modules.0.", "mid_modules.1.", 0, h, C, C);
    for (int i = 0; i < d->levels - 1; i++, T *= 2) {
        int level = d->levels - 1 - i, out = d->width[level - 1];
        h = df_concat(c, h, skip[level], 1);
        h = dfi_unet1d_pair(&u, "up_modules.%d.0.", "up_modules.%d.1.", i, h, 2 * C, out);
        C = out;
        dfi_pass_into(w, "up_modules.%d.2.", i, 0);
        h = df_scope_end(c, scope, dfi_unet1d_double(w, h, C, T));
    }
    dfi_pass_into(w, "", 0, 0);
    h = dfi_unet1d_conv(&u, "final_conv.0.block.0", "final_conv.0.block.1", h, C, C, 8);
    h = dfi_pass_conv1d(w, "final_conv.1", h, C, d->channels, 1, 1);
    return df_permute(c, df_reshape(c, h, 3, back), turned);
}

static const dfi_range dfi_unet1d_ranges[] = {
    DFI_RANGE(unet1d, channels, 1, 1 << 14),
    DFI_RANGE(unet1d, length, 1, 1 << 16),
    DFI_RANGE(unet1d, condition, 0, 1 << 20),
    DFI_RANGE(unet1d, embed, 4, 1 << 14),
    DFI_RANGE(unet1d, levels, 1, DF_UNET_LEVELS),
    DFI_RANGE(unet1d, kernel, 1, 255),
    DFI_RANGE(unet1d, groups, 1, 1 << 14),
    DFI_RANGE(unet1d, predict_scale, 0, 1),
    {NULL, 0, 0, 0}};
#undef DFI_RANGE

static df_result dfi_unet1d_check(df_ctx *ctx, const df_unet1d_desc *d) {
    if (!dfi_net_ranges(ctx, dfi_unet1d_ranges, d) ||
        dfi_unet_size(ctx, "unet1d: length", d->length, d->levels - 1))
        return ctx->code;
    if (d->embed % 2 != 0 || d->kernel % 2 == 0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "unet1d: embed %d must be even, kernel %d odd", d->embed,
                        d->kernel);
    for (int i = 0; i < d->levels; i++) {
        int C = d->width[i], G = i == 0 && C % d->groups == 0 ? 8 : d->groups;
        if (!dfi_net_range(ctx, "unet1d: width of a level", C, 1, 1 << 14))
            return ctx->code;
        if (C % G != 0)
            return dfi_fail(ctx, DF_ERR_ARGUMENT,
                            "unet1d: level %d has %d channels, which %d groups do not "
                            "divide",
                            i, C, G);
    }
    return DF_OK;
}

static df_result dfi_unet1d_configure(df_ctx *ctx, df_net *net) {
    df_unet1d_desc d = dfi_unet1d_of(net);
    double widest = 1;
    dfi_net_plan plan = dfi_unet1d_plan(&d);
    if (dfi_unet1d_check(ctx, &d) || !dfi_net_shaped(ctx, net, &plan)) return ctx->code;
    net->condition = d.condition;
    for (int i = 0; i < d.levels; i++)
        widest = fmax(widest, 2.0 * d.width[i] * (d.length >> i));
    net->rows = dfi_net_rows(widest);
    return DF_OK;
}

DF_API df_unet1d_desc df_unet1d_defaults(void) {
    df_unet1d_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.channels = 2;
    d.length = 16;
    d.embed = 256;
    d.levels = 3;
    for (int i = 0; i < 3; i++) d.width[i] = 256 << i;
    d.kernel = 5;
    d.groups = 8;
    d.predict_scale = 1;
    return d;
}

DF_API df_net *df_unet1d_create(df_ctx *ctx, const df_unet1d_desc *desc) {
    const df_unet1d_desc d = desc != NULL ? *desc : df_unet1d_defaults();
    dfi_net_plan plan = dfi_unet1d_plan(&d);
    return dfi_net_new(ctx, &plan);
}

/* All kinds that df_net_load knows; the last two from `>>relatives`. */
static df_result dfi_vae_configure(df_ctx *ctx, df_net *net);
static df_tensor *dfi_vae_walk(dfi_pass *w, df_tensor *x, df_tensor *t, const int *labels);
static df_result dfi_coupling_configure(df_ctx *ctx, df_net *net);
static df_tensor *dfi_coupling_walk(dfi_pass *w, df_tensor *x, df_tensor *t,
                                    const int *labels);
static const dfi_net_kind dfi_net_kinds[] = {
    {"mlp", dfi_mlp_configure, dfi_mlp_walk},
    {"unet", dfi_unet_configure, dfi_unet_walk},
    {"dit", dfi_dit_configure, dfi_dit_walk},
    {"transformer", dfi_transformer_configure, dfi_transformer_walk},
    {"unet1d", dfi_unet1d_configure, dfi_unet1d_walk},
    {"vae", dfi_vae_configure, dfi_vae_walk},
    {"coupling", dfi_coupling_configure, dfi_coupling_walk},
};

static const dfi_net_kind *dfi_net_kind_find(const char *name) {
    for (size_t i = 0; i < sizeof dfi_net_kinds / sizeof *dfi_net_kinds; i++)
        if (strcmp(dfi_net_kinds[i].name, name) == 0) return &dfi_net_kinds[i];
    return NULL;
}

/* ---- what a net costs --------------------------------------------------------------- */

/* One line of the table: a layer, or a product without parameters, and what follows. */
typedef struct dfi_cost_line {
    char name[DFI_NET_NAME], shape[DFI_SHAPE_TEXT];
    const char *op;
    size_t parameters, bytes;
    double flops;
} dfi_cost_line;

typedef struct dfi_costs {
    const df_run *run;
    char *seen; /* [parameters] counted already */
    dfi_cost_line at;
    int (*line)(void *user, const char *text);
    void *user;
    int result; /* of `line` */
} dfi_costs;

/* 2 K for each element of a product whose sums have K terms; attention is two products. */
static double dfi_op_flops(const df_tensor *y) {
    const df_tensor *a = y->in[0], *b = y->in[1];
    double terms = 0;
    if (y->op == &dfi_op_matmul) terms = a->shape[a->ndim - (y->arg[0] ? 2 : 1)];
    if (y->op == &dfi_op_conv) terms = (double)(b->size / (size_t)b->shape[0]);
    if (y->op == &dfi_op_attention) terms = 2.0 * b->shape[2];
    return 2 * terms * (double)y->size;
}
/* Which parameter a tensor is, reshaped or not; or -1. */
static int dfi_cost_param(const df_run *run, const df_tensor *x) {
    for (int i = 0; x != NULL && i < run->net->count; i++)
        if (x->data == run->weights + run->net->param[i].offset) return i;
    return -1;
}

static void dfi_cost_flush(dfi_costs *s) {
    char text[2 * DFI_NET_NAME];
    dfi_cost_line *a = &s->at;
    if (a->op != NULL && s->line != NULL && s->result == 0) {
        snprintf(text, sizeof text, "%-46.200s %-9s %-16s %10.0f %11.3f %10.1f", a->name,
                 a->op, a->shape, (double)a->parameters, a->flops / 1e6,
                 (double)a->bytes / 1e3);
        s->result = s->line(s->user, text);
    }
    memset(a, 0, sizeof *a);
}

/* Reshaped tensors share what they show; weights are not counted as results. */
static void dfi_cost_of(dfi_costs *s, const df_tensor *y, df_net_cost *sum) {
    int first = -1, param;
    size_t parameters = 0, bytes = y->size * sizeof(df_real);
    double flops = dfi_op_flops(y);
    if (y->in[0] != NULL && y->data == y->in[0]->data) return;
    for (int i = 0; i < 3; i++) {
        if ((param = dfi_cost_param(s->run, y->in[i])) < 0) continue;
        if (first < 0) first = param;
        if (!s->seen[param]) parameters += s->run->net->param[param].size;
        s->seen[param] = 1;
    }
    if (first >= 0 || flops > 0 || s->at.op == NULL) {
        static const char *const signs[DFI_BINARY_COUNT] = {"add", "sub", "mul", "div"};
        const char *op = strncmp(y->op->name, "df_", 3) ? y->op->name : y->op->name + 3;
        if (y->op == &dfi_op_binary) op = signs[y->arg[0]];
        dfi_cost_flush(s);
        snprintf(s->at.name, sizeof s->at.name, "%s",
                 first >= 0 ? s->run->net->param[first].name : "");
        size_t stem = strlen(s->at.name);
        if (stem > 7 && strcmp(s->at.name + stem - 7, ".weight") == 0)
            s->at.name[stem - 7] = 0;
        s->at.op = first >= 0 && y->op == &dfi_op_matmul ? "linear" : op;
        dfi_shape_text(y->ndim, y->shape, s->at.shape);
    }
    s->at.parameters += parameters;
    s->at.flops += flops;
    s->at.bytes += bytes;
    sum->flops += flops;
    sum->activations += bytes;
}

/* Head of the table, its lines in the order in which they ran, what no line had, sums. */
static void dfi_cost_table(dfi_costs *s, df_tensor **tape, size_t count,
                           df_net_cost *sum) {
    char text[2 * DFI_NET_NAME];
    const df_net *net = s->run->net;
    size_t rest = 0;
    if (s->line != NULL) {
        snprintf(text, sizeof text, "%-46.40s %-9s %-16s %10s %11s %10s", net->kind, "",
                 "result", "parameters", "Mflop", "kB");
        s->result = s->line(s->user, text);
    }
    for (size_t i = count; i-- > 0;) dfi_cost_of(s, tape[i], sum);
    dfi_cost_flush(s);
    for (int i = 0; i < net->count; i++)
        if (!s->seen[i]) rest += net->param[i].size;
    if (rest > 0) s->at.op = "", s->at.parameters = rest;
    snprintf(s->at.name, sizeof s->at.name, "%s", "fixed, or not read for this sample");
    dfi_cost_flush(s);
    s->at.op = "", s->at.parameters = sum->parameters;
    s->at.flops = sum->flops, s->at.bytes = sum->activations;
    snprintf(s->at.name, sizeof s->at.name, "%s", "all");
    dfi_cost_flush(s);
}

/* One sample of ones is run and recorded, and the tape read. Gradients need a place that
   marks them as wanted: the weights themselves, for nothing goes back. */
static df_result dfi_describe(df_ctx *ctx, const df_net *net, dfi_costs *s,
                              df_net_cost *sum) {
    df_run run = df_run_defaults(ctx, net);
    int shape[4] = {1, 1, 1, 1}, label[1] = {0};
    size_t count = 0;
    run.weights = run.grads = net->weights;
    run.training = 1;
    for (int i = 0; i < net->ndim; i++) shape[i + 1] = net->shape[i];
    double value = net->vocab == 1 ? 0 : 1; /* tokens are whole */
    df_tensor *x = df_tensor_fill(ctx, net->ndim + 1, shape, value);
    df_tensor *t = df_tensor_fill(ctx, 1, shape, 0);
    x = df_tensor_need_grad(ctx, x), t = df_tensor_need_grad(ctx, t);
    df_run_net(&run, x, t, net->classes > 0 ? label : NULL);
    if (dfi_stuck(ctx) != DF_OK) return ctx->code;
    for (df_tensor *y = ctx->tape; y != NULL; y = y->before) count++;
    df_tensor **tape = (df_tensor **)dfi_scratch(ctx, dfi_mul(count + 1, sizeof *tape));
    s->run = &run;
    s->seen = (char *)dfi_scratch(ctx, (size_t)net->count + 1);
    if (tape == NULL || s->seen == NULL) return DF_ERR_MEMORY;
    memset(s->seen, 0, (size_t)net->count + 1);
    count = 0;
    for (df_tensor *y = ctx->tape; y != NULL; y = y->before) tape[count++] = y;
    dfi_cost_table(s, tape, count, sum);
    return (df_result)s->result;
}

DF_API df_result df_net_describe(df_ctx *ctx, const df_net *net, df_net_cost *cost,
                                 int (*line)(void *user, const char *text), void *user) {
    df_net_cost sum;
    dfi_costs s;
    memset(&sum, 0, sizeof sum);
    memset(&s, 0, sizeof s);
    s.line = line, s.user = user;
    df_result result = dfi_net_missing(ctx, net, "df_net_describe");
    if (result != DF_OK) return result;
    sum.parameters = df_net_size(net), sum.trained = df_net_trained(net);
    if (dfi_stuck(ctx) != DF_OK) return ctx->code;
    int recording = ctx->recording; /* a graph that is being recorded waits */
    df_tensor *tape = ctx->tape;
    df_scope mark = dfi_scratch_mark(ctx);
    df_record_begin(ctx);
    result = dfi_describe(ctx, net, &s, &sum);
    dfi_scratch_release(ctx, mark);
    ctx->recording = recording;
    ctx->tape = tape;
    if (result != DF_OK) ctx->stuck = DF_OK; /* it stuck here: not the user's tensors */
    if (cost != NULL) *cost = sum;
    return result;
}

/* ---- the card: what the weights mean ----------------------------------------------- */

DF_API df_card df_card_defaults(void) {
    df_card card;
    memset(&card, 0, sizeof card);
    card.process = df_process_flow();
    card.prediction = DF_VELOCITY;
    card.time = df_time_own();
    card.clock = df_time_own();
    return card;
}

/* An affine map with slope 0 says nothing about time, and log sigma times 0 neither. */
static int dfi_time_ok(const df_time *time) {
    if (time->kind == DF_TIME_SIGMA) return 1;
    return (time->kind == DF_TIME_AFFINE || time->kind == DF_TIME_LOG_SIGMA) &&
           !dfi_nonfinite(time->a) && !dfi_nonfinite(time->b) && time->a != 0;
}

static df_result dfi_card_check(df_ctx *ctx, const df_card *card) {
    df_result result = df_process_check(ctx, &card->process);
    if (result != DF_OK) return result;
    if ((int)card->prediction < 0 || card->prediction >= DF_PREDICTION_COUNT)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "card: prediction %d is not a df_prediction",
                        (int)card->prediction);
    if ((int)card->learned < 0 || card->learned > DF_LEARNED_RANGE)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "card: learned %d is not a df_learned",
                        (int)card->learned);
    if (!dfi_time_ok(&card->time) || !dfi_time_ok(&card->clock))
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "card: time (%d: %g, %g) or clock (%d: %g, %g) is not a map of "
                        "time: a must be a number other than 0",
                        (int)card->time.kind, card->time.a, card->time.b,
                        (int)card->clock.kind, card->clock.a, card->clock.b);
    if (dfi_nonfinite(card->input_sigma_data) || card->input_sigma_data < 0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "card: input_sigma_data %g must be at least 0",
                        card->input_sigma_data);
    return DF_OK;
}

/* The new table is copied before the old one goes: the card may be the net's own. */
DF_API df_result df_net_set_card(df_ctx *ctx, df_net *net, const df_card *card) {
    double *table = NULL;
    df_card mine;
    df_result result = dfi_net_missing(ctx, net, "df_net_set_card");
    if (result == DF_OK && card == NULL)
        result = dfi_fail(ctx, DF_ERR_ARGUMENT, "df_net_set_card: card is NULL");
    if (result == DF_OK) result = dfi_card_check(ctx, card);
    if (result != DF_OK) return result;
    mine = *card;
    if (card->process.kind == DF_PROCESS_TABLE) {
        table = (double *)dfi_net_copy(ctx, net, card->process.log_abar,
                                       (size_t)card->process.table_size * sizeof(double));
        if (table == NULL) return DF_ERR_MEMORY;
    } else {
        mine.process.table_size = 0;
    }
    mine.process.log_abar = table;
    dfi_delete_by(&net->alloc, net->log_abar,
                  (size_t)net->card.process.table_size * sizeof(double));
    net->log_abar = table;
    net->card = mine;
    return DF_OK;
}
DF_API const df_card *df_net_card(const df_net *net) { return &net->card; }

DF_API df_result df_net_set_scaling(df_ctx *ctx, df_net *net, int size, const double *mean,
                                    const double *scale) {
    double *both = NULL;
    df_result missing = dfi_net_missing(ctx, net, "df_net_set_scaling");
    if (missing != DF_OK) return missing;
    if (size > 0 && (mean == NULL || scale == NULL))
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_net_set_scaling: size %d wants mean and scale, one is NULL",
                        size);
    if (size != 0 && size != 1 && size != net->dim)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_net_set_scaling: size %d is not 0, 1 or the net's %d", size,
                        net->dim);
    for (int i = 0; i < size; i++)
        if (dfi_nonfinite(mean[i]) || dfi_nonfinite(scale[i]) || scale[i] <= 0)
            return dfi_fail(ctx, DF_ERR_ARGUMENT,
                            "df_net_set_scaling: element %d has mean %g, scale %g; scale "
                            "must be above 0",
                            i, mean[i], scale[i]);
    if (size > 0) {
        both = (double *)dfi_net_copy(ctx, net, NULL,
                                      dfi_mul(2 * (size_t)size, sizeof(double)));
        if (both == NULL) return DF_ERR_MEMORY;
        memcpy(both, mean, (size_t)size * sizeof(double));
        memcpy(both + size, scale, (size_t)size * sizeof(double));
    }
    dfi_delete_by(&net->alloc, net->scaling,
                  2 * (size_t)net->scaling_size * sizeof(double));
    net->scaling = both;
    net->scaling_size = size;
    return DF_OK;
}

/* ---- a net as a model -------------------------------------------------------------- */

/* The condition of the question's rows, [n, K]; NULL if there is none. */
static df_tensor *dfi_net_condition(const df_net *net, df_ctx *ctx, const df_query *q) {
    int shape[2];
    shape[0] = q->n;
    shape[1] = net->condition;
    if (q->condition == NULL) return NULL;
    df_tensor *c = df_tensor_new(ctx, 2, shape);
    for (int r = 0; c != NULL && r < q->n; r++)
        memcpy(c->data + (size_t)r * (size_t)net->condition,
               q->condition + (size_t)(r % q->samples) * q->condition_stride,
               (size_t)net->condition * sizeof(df_real));
    return c;
}

/* PREDICT runs the net. JVP gives x the tangent v: J v = d/de f(x + e v) at e = 0. VJP
   asks for the gradient of <f(x), v> in x. */
static df_result dfi_net_answer_in(const df_net *net, df_ctx *ctx, const df_query *q,
                                   df_real *out) {
    int shape[4], rows[1];
    shape[0] = rows[0] = q->n;
    for (int i = 0; i < net->ndim; i++) shape[i + 1] = net->shape[i];
    df_run run = df_run_defaults(ctx, net);
    df_tensor *x = df_tensor_copy(ctx, net->ndim + 1, shape, q->x);
    df_tensor *t = df_tensor_copy(ctx, 1, rows, q->t_model);
    df_tensor *v = q->v != NULL ? df_tensor_copy(ctx, net->ndim + 1, shape, q->v) : NULL;
    const df_real *found = NULL;
    run.condition = dfi_net_condition(net, ctx, q);
    if (q->ask == DF_ASK_VJP) {
        x = df_tensor_need_grad(ctx, x);
        df_backward(ctx, df_sum(ctx, df_mul(ctx, df_run_net(&run, x, t, q->labels), v)));
        if (x != NULL) found = x->grad;
    } else {
        if (q->ask == DF_ASK_JVP) df_set_tangent(ctx, x, v);
        df_tensor *y = df_run_net(&run, x, t, q->labels);
        if (y != NULL && q->ask == DF_ASK_JVP) y = y->tangent;
        if (y != NULL) found = y->data;
    }
    if (dfi_stuck(ctx) != DF_OK) return ctx->code;
    size_t bytes = (size_t)q->n * (size_t)q->dim * sizeof(df_real);
    if (net->outputs != net->shape[0]) bytes *= 2;
    if (found != NULL)
        memcpy(out, found, bytes);
    else
        memset(out, 0, bytes); /* an answer that does not depend on x */
    return DF_OK;
}

/* A wrong question is an ordinary error, said before any tensor operation could stick. */
static int dfi_net_answer(void *self, df_ctx *ctx, const df_query *q, df_real *out) {
    const df_net *net = (const df_net *)self;
    int bad = dfi_net_bad_label(net, q->n, q->labels);
    if (q->dim != net->dim)
        return dfi_fail(ctx, DF_ERR_SHAPE,
                        "net '%s': asked about %d elements a sample, it has %d", net->kind,
                        q->dim, net->dim);
    if (net->vocab > 0)
        return dfi_fail(ctx, DF_ERR_UNSUPPORTED,
                        "net '%s': its samples are tokens: ask it by df_run_tokens",
                        net->kind);
    if (net->outputs != net->shape[0] * (net->card.learned ? 2 : 1))
        return dfi_fail(ctx, DF_ERR_UNSUPPORTED,
                        "net '%s': makes %d channels of %d: a model makes as many, or "
                        "twice as many where its card says what is learned",
                        net->kind, net->outputs, net->shape[0]);
    if (q->ask != DF_ASK_PREDICT &&
        ((q->ask != DF_ASK_JVP && q->ask != DF_ASK_VJP) || !q->v))
        return dfi_fail(
            ctx, DF_ERR_UNSUPPORTED,
            "net '%s': answers PREDICT, and JVP and VJP with a v; asked for %d", net->kind,
            (int)q->ask);
    if (q->condition != NULL && net->condition == 0)
        return dfi_fail(ctx, DF_ERR_UNSUPPORTED,
                        "net '%s': takes labels, no condition", net->kind);
    if (q->condition != NULL && q->condition_stride > 0 &&
        q->condition_stride < (size_t)net->condition)
        return dfi_fail(ctx, DF_ERR_SHAPE,
                        "net '%s': a condition_stride of %.0f, conditions of %d numbers",
                        net->kind, (double)q->condition_stride, net->condition);
    if (bad < q->n)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "net '%s': label %d of row %d: it knows 0 to %d, and -1 for none",
                        net->kind, q->labels[bad], bad, net->classes - 1);
    if (dfi_stuck(ctx) != DF_OK) return ctx->code;
    /* A question may come while a graph is being recorded: that tape waits. */
    int recording = ctx->recording;
    df_tensor *tape = ctx->tape;
    df_scope mark = dfi_scratch_mark(ctx);
    if (recording) df_record_end(ctx);
    if (q->ask == DF_ASK_VJP) df_record_begin(ctx);
    df_result result = dfi_net_answer_in(net, ctx, q, out);
    if (q->ask == DF_ASK_VJP) df_record_end(ctx);
    dfi_scratch_release(ctx, mark);
    ctx->recording = recording;
    ctx->tape = tape;
    if (result != DF_OK) ctx->stuck = DF_OK; /* it stuck here: not the user's tensors */
    return result;
}

DF_API df_model df_net_model(const df_net *net) {
    df_model m = df_model_defaults();
    if (net == NULL) return m;
    m.predict = dfi_net_answer;
    m.self = (void *)(uintptr_t)net; /* only read */
    m.dim = net->dim;
    m.answers = DF_ASK_PREDICT;
    if (net->outputs == net->shape[0]) m.answers |= DF_ASK_JVP | DF_ASK_VJP;
    m.learned = net->card.learned;
    m.process = net->card.process;
    m.prediction = net->card.prediction;
    m.time = net->card.time;
    m.clock = net->card.clock;
    m.input_sigma_data = net->card.input_sigma_data;
    m.max_batch = net->rows;
    m.scaling_size = net->scaling_size;
    m.mean = net->scaling;
    m.scale = net->scaling_size > 0 ? net->scaling + net->scaling_size : NULL;
    return m;
}

/* ---- checkpoints --------------------------------------------------------------------

   A safetensors file: the parameters by name, "average.NAME" if there is an average,
   "process.log_abar" for a table, "data.mean" and "data.scale" for the scaling, and
   strings:

     format  "diffusion.h net 1"       kind, shape, classes, condition, config, numbers:
     which network
     process, process.parameters (a b sigma_data interp), prediction, time and clock
     (kind a b), input_sigma_data, learned: the card

   Lists are separated by blanks, 17 digits give back the same double. */

/* From `>>files`: numbers are read and sources named in one way everywhere. */
static const char *dfi_json_number_end(const char *s, const char *end);
static double dfi_decimal(const char *text, size_t size);
static const char *dfi_source_name(const df_source *source);

static const char *const dfi_net_format = "diffusion.h net 1";
#define DFI_NET_ZERO_SNR -1e300 /* in files, which hold finite numbers only: log 0 */
static const char *const dfi_time_names[] = {"affine", "sigma", "log_sigma"};

enum { DFI_TEXT_ITEMS = 24, DFI_TEXT_BYTES = 4096 };

/* Metadata under construction. */
typedef struct dfi_texts {
    df_save_text item[DFI_TEXT_ITEMS];
    int count;
    size_t used;
    char bytes[DFI_TEXT_BYTES];
} dfi_texts;

static dfi_texts *dfi_texts_new(df_ctx *ctx) {
    dfi_texts *s = (dfi_texts *)dfi_scratch(ctx, sizeof *s);
    if (s == NULL) return NULL;
    s->count = 0;
    s->used = 0;
    return s;
}

/* Some locales print a comma in numbers; no list holds one otherwise. */
static void dfi_text_add(dfi_texts *s, const char *key, const char *format, ...)
    DFI_PRINTF(3, 4);
static void dfi_text_add(dfi_texts *s, const char *key, const char *format, ...) {
    size_t room = sizeof s->bytes - s->used;
    char *value = s->bytes + s->used;
    va_list args;
    va_start(args, format);
    int length = vsnprintf(value, room, format, args);
    va_end(args);
    if (length < 0 || (size_t)length >= room || s->count == DFI_TEXT_ITEMS) return;
    for (char *c = value; *c != 0; c++)
        if (*c == ',' && strcmp(format, "%s") != 0) *c = '.';
    s->item[s->count].key = key;
    s->item[s->count].value = value;
    s->count++;
    s->used += (size_t)length + 1;
}

/* "3 28 28": a list of integers. */
static void dfi_text_ints(dfi_texts *s, const char *key, int count, const int *values) {
    char list[DFI_NET_SLOTS * 12 + 1];
    size_t used = 0;
    list[0] = 0;
    for (int i = 0; i < count; i++)
        used +=
            (size_t)snprintf(list + used, sizeof list - used, i ? " %d" : "%d", values[i]);
    dfi_text_add(s, key, "%s", list);
}

/* Everything about a net that is not an array. */
static void dfi_net_texts(const df_net *net, dfi_texts *s) {
    const df_card *c = &net->card;
    const df_process *p = &c->process;
    int slots = DFI_NET_SLOTS, learned = (int)c->learned;
    while (slots > 0 && net->config[slots - 1] == 0) slots--;
    dfi_text_add(s, "format", "%s", dfi_net_format);
    dfi_text_add(s, "kind", "%s", net->kind);
    dfi_text_ints(s, "shape", net->ndim, net->shape);
    dfi_text_ints(s, "classes", 1, &net->classes);
    dfi_text_ints(s, "config", slots, net->config);
    dfi_text_add(s, "numbers", "%.17g %.17g %.17g %.17g", net->number[0], net->number[1],
                 net->number[2], net->number[3]);
    dfi_text_add(s, "process", "%s", df_process_name(p));
    dfi_text_add(s, "process.parameters", "%.17g %.17g %.17g %d", p->a, p->b,
                 p->sigma_data, (int)p->interp);
    dfi_text_add(s, "prediction", "%s", df_prediction_name(c->prediction));
    dfi_text_add(s, "time", "%s %.17g %.17g", dfi_time_names[c->time.kind], c->time.a,
                 c->time.b);
    dfi_text_add(s, "clock", "%s %.17g %.17g", dfi_time_names[c->clock.kind], c->clock.a,
                 c->clock.b);
    dfi_text_add(s, "input_sigma_data", "%.17g", c->input_sigma_data);
    dfi_text_ints(s, "learned", 1, &learned);
    dfi_text_ints(s, "condition", 1, &net->condition);
}

static void dfi_save_add(df_save_tensor *t, const char *name, int ndim, const int *shape,
                         const void *data, int is_double) {
    t->name = name;
    t->dtype =
        is_double || sizeof(df_real) == sizeof(double) ? DF_DTYPE_F64 : DF_DTYPE_F32;
    t->ndim = ndim;
    for (int i = 0; i < DF_AXES; i++) t->shape[i] = i < ndim ? shape[i] : 1;
    t->data = data;
    t->data_is_double = is_double;
}

/* First parameter of `w` with a NaN or Inf: its index and element; or -1. */
static int dfi_net_nonfinite(const df_ctx *ctx, const df_net *net, const df_real *w,
                             size_t *element) {
    for (int i = 0; i < net->count; i++) {
        const df_param *p = &net->param[i];
        *element = ctx->k->nonfinite(p->size, w + p->offset);
        if (*element < p->size) return i;
    }
    return -1;
}

/* A file with NaN in it could not be loaded again, so it is not written. */
static df_result dfi_net_finite(df_ctx *ctx, const df_net *net, const char *function) {
    size_t element = 0;
    for (int pass = 0; pass < 2; pass++) {
        const df_real *w = pass == 0 ? net->weights : net->average;
        int bad = w != NULL ? dfi_net_nonfinite(ctx, net, w, &element) : -1;
        if (bad >= 0)
            return dfi_fail(
                ctx, DF_ERR_NONFINITE, "%s: element %.0f of %s'%s' is %s", function,
                (double)element, pass == 0 ? "" : "the average of ", net->param[bad].name,
                dfi_nonfinite_name((double)w[net->param[bad].offset + element]));
    }
    return DF_OK;
}

/* Net, and the tensors and strings that a trainer adds. */
static df_result dfi_net_write(df_ctx *ctx, const df_net *net, df_sink sink, dfi_texts *s,
                               const df_save_tensor *more, int more_count) {
    size_t params = (size_t)net->count, count = 0;
    df_save_tensor *list = (df_save_tensor *)dfi_scratch(
        ctx, dfi_mul(2 * params + 3 + (size_t)more_count, sizeof *list));
    char *names = (char *)dfi_scratch(ctx, dfi_mul(params + 1, DFI_NET_NAME + 16));
    if (list == NULL || names == NULL) return DF_ERR_MEMORY;
    for (size_t i = 0; i < params; i++) {
        const df_param *p = &net->param[i];
        dfi_save_add(&list[count++], p->name, p->ndim, p->shape, net->weights + p->offset,
                     0);
        if (net->average == NULL) continue;
        snprintf(names, DFI_NET_NAME + 16, "average.%s", p->name);
        dfi_save_add(&list[count++], names, p->ndim, p->shape, net->average + p->offset,
                     0);
        names += DFI_NET_NAME + 16;
    }
    if (net->log_abar != NULL) {
        int T = net->card.process.table_size;
        double *table = (double *)dfi_scratch(ctx, (size_t)T * sizeof *table);
        if (table == NULL) return DF_ERR_MEMORY;
        for (int i = 0; i < T; i++)
            table[i] =
                dfi_nonfinite(net->log_abar[i]) ? DFI_NET_ZERO_SNR : net->log_abar[i];
        dfi_save_add(&list[count++], "process.log_abar", 1, &net->card.process.table_size,
                     table, 1);
    }
    if (net->scaling_size > 0) {
        dfi_save_add(&list[count++], "data.mean", 1, &net->scaling_size, net->scaling, 1);
        dfi_save_add(&list[count++], "data.scale", 1, &net->scaling_size,
                     net->scaling + net->scaling_size, 1);
    }
    for (int i = 0; i < more_count; i++) list[count++] = more[i];
    dfi_net_texts(net, s);
    return df_safetensors_write(ctx, sink, list, (int)count, s->item, s->count);
}

DF_API df_result df_net_save(df_ctx *ctx, const df_net *net, df_sink sink) {
    if (ctx == NULL) return DF_ERR_ARGUMENT;
    df_result result = dfi_net_missing(ctx, net, "df_net_save");
    if (result == DF_OK) result = dfi_net_finite(ctx, net, "df_net_save");
    if (result != DF_OK) return result;
    df_scope mark = dfi_scratch_mark(ctx);
    dfi_texts *s = dfi_texts_new(ctx);
    result =
        s != NULL ? dfi_net_write(ctx, net, sink, s, NULL, 0) : (df_result)DF_ERR_MEMORY;
    dfi_scratch_release(ctx, mark);
    return result;
}

/* ---- reading: the file is hostile until it has proved otherwise ---- */

typedef struct dfi_net_file {
    df_ctx *ctx;
    const char *function, *name; /* for messages: "df_net_load: a.safetensors: ..." */
    df_safetensors *file;
} dfi_net_file;

static dfi_net_file dfi_net_open(df_ctx *ctx, const char *function, df_source source) {
    dfi_net_file f;
    f.ctx = ctx;
    f.function = function;
    f.name = dfi_source_name(&source);
    f.file = df_safetensors_open(ctx, source);
    return f;
}

static df_result dfi_net_bad(const dfi_net_file *f, const char *key, const char *what) {
    return dfi_fail(f->ctx, DF_ERR_FORMAT, "%s: %.200s: '%s' %s", f->function, f->name,
                    key, what);
}

static const char *dfi_net_text(const dfi_net_file *f, const char *key) {
    const char *text = df_safetensors_metadata(f->file, key);
    if (text == NULL) dfi_net_bad(f, key, "is missing among the metadata");
    return text;
}

/* A number at *text, which moves behind it and the blanks that follow; 0 if there is
   none. */
static int dfi_text_number(const char **text, double *value) {
    const char *end = dfi_json_number_end(*text, *text + strlen(*text));
    if (end == NULL || end - *text > 63 || (*end != 0 && *end != ' ')) return 0;
    *value = dfi_decimal(*text, (size_t)(end - *text));
    *text = end + strspn(end, " ");
    return !dfi_nonfinite(*value);
}

/* The numbers of a string, at most `most`; how many, or -1 if it holds anything else. */
static int dfi_text_list(const char *text, int most, double *values) {
    int count = 0;
    while (*text != 0)
        if (count == most || !dfi_text_number(&text, &values[count++])) return -1;
    return count;
}

/* Key `key` as `least` to `most` numbers; how many, or -1 and an error. */
static int dfi_net_numbers(const dfi_net_file *f, const char *key, int least, int most,
                           double *values) {
    const char *text = dfi_net_text(f, key);
    int count = text != NULL ? dfi_text_list(text, most, values) : -1;
    if (text != NULL && count < least) {
        dfi_net_bad(f, key, "among the metadata is not the list of numbers it should be");
        return -1;
    }
    return count;
}

static int dfi_net_ints(const dfi_net_file *f, const char *key, int least, int most,
                        int *values) {
    double numbers[DFI_NET_SLOTS];
    int count = dfi_net_numbers(f, key, least, most, numbers);
    for (int i = 0; i < count; i++) {
        if (numbers[i] != floor(numbers[i]) || fabs(numbers[i]) > INT_MAX) {
            dfi_net_bad(f, key,
                        "among the metadata holds a number that is not an integer");
            return -1;
        }
        values[i] = (int)numbers[i];
    }
    return count;
}

/* Index of the key's text among `count` names, or -1 and an error. */
static int dfi_net_choice(const dfi_net_file *f, const char *key, const char *text,
                          int count, const char *(*name)(int)) {
    for (int i = 0; text != NULL && i < count; i++)
        if (strcmp(text, name(i)) == 0) return i;
    if (text != NULL) dfi_net_bad(f, key, "names something that is not known here");
    return -1;
}
static const char *dfi_process_name_of(int kind) {
    df_process p = df_process_flow();
    p.kind = (df_process_kind)kind;
    return df_process_name(&p);
}
static const char *dfi_prediction_name_of(int i) {
    return df_prediction_name((df_prediction)i);
}

static df_result dfi_net_read_time(const dfi_net_file *f, const char *key, df_time *out) {
    const char *text = dfi_net_text(f, key);
    double ab[2];
    if (text == NULL) return f->ctx->code;
    for (int i = 0; i < 3; i++) {
        size_t length = strlen(dfi_time_names[i]);
        if (strncmp(text, dfi_time_names[i], length) == 0 && text[length] == ' ' &&
            dfi_text_list(text + length + 1, 2, ab) == 2) {
            out->kind = (df_time_kind)i;
            out->a = ab[0];
            out->b = ab[1];
            return DF_OK;
        }
    }
    return dfi_net_bad(f, key, "among the metadata is not a kind of time and two numbers");
}

/* Tensor `name` as doubles, all of them: F64 [n], n in [1, 2^24]. NULL with *n = 0 if
   there is none, NULL with *n = -1 on failure. Step memory. */
static double *dfi_net_doubles(const dfi_net_file *f, const char *name, int *n) {
    const df_file_tensor *t = df_safetensors_find(f->file, name);
    *n = 0;
    if (t == NULL) return NULL;
    *n = -1;
    if (t->dtype != DF_DTYPE_F64 || t->ndim != 1 || t->count < 1 || t->count > 1u << 24) {
        dfi_net_bad(f, name, "is not an F64 tensor of one axis");
        return NULL;
    }
    double *values = (double *)dfi_scratch(f->ctx, t->count * sizeof *values);
    if (values == NULL) return NULL;
    for (size_t i = 0; i < t->count; i++) {
        uint64_t bits = 0;
        for (int j = 7; j >= 0; j--) bits = bits << 8 | t->bytes[8 * i + (size_t)j];
        memcpy(&values[i], &bits, sizeof bits);
        if (values[i] <= DFI_NET_ZERO_SNR) values[i] = dfi_infinity(1);
    }
    *n = (int)t->count;
    return values;
}

/* The card, each part by name; df_net_set_card then judges the numbers. */
static df_result dfi_net_read_card(const dfi_net_file *f, df_net *net) {
    df_card card = df_card_defaults();
    double numbers[4];
    const char *text = dfi_net_text(f, "process");
    int kind = dfi_net_choice(f, "process", text, DF_PROCESS_COUNT, dfi_process_name_of);
    if (kind < 0 || dfi_net_numbers(f, "process.parameters", 4, 4, numbers) < 0)
        return f->ctx->code;
    if (numbers[3] != floor(numbers[3]) || numbers[3] < 0 ||
        numbers[3] > (double)(int)DF_INTERP_LOG_SIGMA)
        return dfi_net_bad(f, "process.parameters",
                           "has an interpolation that is not known");
    card.process.kind = (df_process_kind)kind;
    card.process.a = numbers[0];
    card.process.b = numbers[1];
    card.process.sigma_data = numbers[2];
    card.process.interp = (df_interp)(int)numbers[3];
    text = dfi_net_text(f, "prediction");
    int prediction =
        dfi_net_choice(f, "prediction", text, DF_PREDICTION_COUNT, dfi_prediction_name_of);
    if (prediction < 0 || dfi_net_read_time(f, "time", &card.time) ||
        dfi_net_read_time(f, "clock", &card.clock) ||
        dfi_net_numbers(f, "input_sigma_data", 1, 1, &card.input_sigma_data) < 0)
        return f->ctx->code;
    card.prediction = (df_prediction)prediction;
    int n, learned;
    if (dfi_net_ints(f, "learned", 1, 1, &learned) < 0) return f->ctx->code;
    if (learned < 0 || learned > (int)DF_LEARNED_RANGE)
        return dfi_net_bad(f, "learned", "is not in [0, 3]");
    card.learned = (df_learned)learned;
    card.process.log_abar = dfi_net_doubles(f, "process.log_abar", &n);
    if (n < 0) return f->ctx->code;
    if ((n > 0) != (kind == DF_PROCESS_TABLE))
        return dfi_net_bad(f, "process.log_abar",
                           "must be there for a table, and only then");
    card.process.table_size = n;
    if (df_net_set_card(f->ctx, net, &card) == DF_OK) return DF_OK;
    return f->ctx->code == DF_ERR_MEMORY
               ? (df_result)DF_ERR_MEMORY
               : dfi_net_bad(f, "process",
                             "or another part of the card has a value out of range");
}

/* Both or none, of one element or of a sample's number. */
static df_result dfi_net_read_scaling(const dfi_net_file *f, df_net *net) {
    int n, m = 0;
    double *mean = dfi_net_doubles(f, "data.mean", &n);
    double *scale = n < 0 ? NULL : dfi_net_doubles(f, "data.scale", &m);
    if (n < 0 || m < 0) return f->ctx->code;
    if (n != m || (n != 0 && n != 1 && n != net->dim))
        return dfi_net_bad(
            f, "data.mean",
            "and 'data.scale' are not both of 1 element or of a sample's number");
    if (df_net_set_scaling(f->ctx, net, n, mean, scale) == DF_OK) return DF_OK;
    return f->ctx->code == DF_ERR_MEMORY
               ? (df_result)DF_ERR_MEMORY
               : dfi_net_bad(f, "data.scale", "or 'data.mean' has a value out of range");
}

/* The average is there for all parameters or for none; the first one tells. */
static df_result dfi_net_read_average(const dfi_net_file *f, df_net *net) {
    char name[DFI_NET_NAME + 16];
    snprintf(name, sizeof name, "average.%s", net->param[0].name);
    if (df_safetensors_find(f->file, name) == NULL) return DF_OK;
    net->average = (df_real *)dfi_net_copy(f->ctx, net, NULL, net->size * sizeof(df_real));
    if (net->average == NULL) return DF_ERR_MEMORY;
    for (int i = 0; i < net->count; i++) {
        const df_param *p = &net->param[i];
        snprintf(name, sizeof name, "average.%s", p->name);
        if (df_safetensors_read(f->ctx, f->file, name, p->ndim, p->shape,
                                net->average + p->offset))
            return f->ctx->code;
    }
    return DF_OK;
}

/* A tensor that nothing asked for means that the file is of another network. */
static df_result dfi_net_strangers(const dfi_net_file *f, const df_net *net) {
    static const char *const known[] = {"process.log_abar", "data.mean", "data.scale",
                                        "adam.m", "adam.v"};
    int count = df_safetensors_count(f->file);
    for (int i = 0; i < count; i++) {
        const char *name = df_safetensors_at(f->file, i)->name;
        const char *plain = strncmp(name, "average.", 8) == 0 ? name + 8 : name;
        int found =
            (plain == name || net->average != NULL) && df_net_find(net, plain) >= 0;
        for (int j = 0; !found && j < 5; j++) found = strcmp(name, known[j]) == 0;
        if (!found)
            return dfi_fail(f->ctx, DF_ERR_FORMAT,
                            "%s: %.160s: tensor '%.160s' is no part of net '%.40s'",
                            f->function, f->name, name, net->kind);
    }
    return DF_OK;
}

/* Adds the parameters: those of a kind built in, or of the user's net `like`. */
static df_result dfi_net_fill(const dfi_net_file *f, df_net *net, const df_net *like) {
    df_result result = DF_OK;
    net->from = f->file;
    if (net->row != NULL) result = dfi_net_build(f->ctx, net);
    for (int i = 0; net->row == NULL && result == DF_OK && i < like->count; i++) {
        const df_param *p = &like->param[i];
        if (dfi_net_add(f->ctx, net, p->name, p->ndim, p->shape, DF_INIT_ZERO, 1, 1) < 0)
            result = f->ctx->code;
    }
    net->from = NULL;
    net->sealed = net->row != NULL;
    if (result == DF_OK && net->count == 0)
        return dfi_net_bad(f, "kind", "has no parameters");
    if (result == DF_OK && like != NULL &&
        (net->count != like->count || net->size != like->size))
        return dfi_net_bad(f, "kind", "has other parameters than the net to be filled");
    if (result != DF_ERR_ARGUMENT) return result;
    return dfi_fail(f->ctx, DF_ERR_FORMAT, "%s: %.200s: %.240s", f->function, f->name,
                    f->ctx->message);
}

/* The net that the file holds, of a kind built in if `like` is NULL, else as `like`. */
static df_net *dfi_net_read(const dfi_net_file *f, const df_net *like) {
    int shape[3], config[DFI_NET_SLOTS], classes, condition, ndim;
    double number[DFI_NET_NUMBERS];
    const char *format = dfi_net_text(f, "format"), *kind;
    if (format == NULL) return NULL;
    if (strcmp(format, dfi_net_format) != 0) {
        dfi_net_bad(f, "format", "among the metadata is not 'diffusion.h net 1'");
        return NULL;
    }
    memset(config, 0, sizeof config);
    if ((kind = dfi_net_text(f, "kind")) == NULL ||
        (ndim = dfi_net_ints(f, "shape", 1, 3, shape)) < 0 ||
        dfi_net_ints(f, "classes", 1, 1, &classes) < 0 ||
        dfi_net_ints(f, "condition", 1, 1, &condition) < 0 ||
        (condition < 0 || condition > 1 << 20
             ? dfi_net_bad(f, "condition", "is not in [0, 2^20]") : (df_result)DF_OK) ||
        dfi_net_ints(f, "config", 0, DFI_NET_SLOTS, config) < 0 ||
        dfi_net_numbers(f, "numbers", DFI_NET_NUMBERS, DFI_NET_NUMBERS, number) < 0)
        return NULL;
    const dfi_net_kind *row = like != NULL ? like->row : dfi_net_kind_find(kind);
    int same = row != NULL && strcmp(row->name, kind) == 0;
    if (like != NULL)
        same = strcmp(kind, like->kind) == 0 && ndim == like->ndim &&
               classes == like->classes && condition == like->condition &&
               memcmp(shape, like->shape, (size_t)ndim * sizeof *shape) == 0 &&
               memcmp(config, like->config, sizeof config) == 0 &&
               memcmp(number, like->number, sizeof number) == 0;
    if (!same || dfi_net_elements(ndim, shape) == 0) {
        dfi_fail(f->ctx, DF_ERR_FORMAT,
                 like != NULL ? "%s: %.160s: kind '%.40s', shape, classes, config or "
                                "numbers are not those of the net to be filled"
                              : "%s: %.160s: kind '%.40s' is not built in (make the net, "
                                "then use df_net_load_into), or its shape is out of range",
                 f->function, f->name, kind);
        return NULL;
    }
    df_net *net = dfi_net_make(f->ctx, kind, ndim, shape, row,
                               like != NULL ? like->forward : dfi_net_forward, 0);
    if (net == NULL) return NULL;
    net->classes = classes;
    net->condition = condition;
    memcpy(net->config, config, sizeof config);
    memcpy(net->number, number, sizeof number);
    if (dfi_net_fill(f, net, like) || dfi_net_read_average(f, net) ||
        dfi_net_strangers(f, net) || dfi_net_read_card(f, net) ||
        dfi_net_read_scaling(f, net)) {
        df_net_free(net);
        return NULL;
    }
    return net;
}

DF_API df_net *df_net_load(df_ctx *ctx, df_source source) {
    if (ctx == NULL) return NULL;
    dfi_net_file f = dfi_net_open(ctx, "df_net_load", source);
    if (f.file == NULL) return NULL;
    df_scope mark = dfi_scratch_mark(ctx);
    df_net *net = dfi_net_read(&f, NULL);
    dfi_scratch_release(ctx, mark);
    df_safetensors_close(f.file);
    return net;
}

/* Moves what was loaded into `net`, whose weights stay where they are, and frees the
   rest. */
static void dfi_net_take(df_net *net, df_net *loaded) {
    df_card card = net->card;
    double *log_abar = net->log_abar, *scaling = net->scaling;
    int scaling_size = net->scaling_size;
    memcpy(net->weights, loaded->weights, net->size * sizeof(df_real));
    if (net->average != NULL && loaded->average != NULL) {
        memcpy(net->average, loaded->average, net->size * sizeof(df_real));
    } else {
        df_real *average = net->average;
        net->average = loaded->average;
        loaded->average = average;
    }
    net->card = loaded->card;
    net->log_abar = loaded->log_abar;
    net->scaling = loaded->scaling;
    net->scaling_size = loaded->scaling_size;
    loaded->card = card;
    loaded->log_abar = log_abar;
    loaded->scaling = scaling;
    loaded->scaling_size = scaling_size;
    df_net_free(loaded);
}

/* The file is read into a net of its own first: a bad one leaves `net` as it was. */
DF_API df_result df_net_load_into(df_ctx *ctx, df_net *net, df_source source) {
    if (ctx == NULL) return DF_ERR_ARGUMENT;
    df_result missing = dfi_net_missing(ctx, net, "df_net_load_into");
    if (missing != DF_OK) return missing;
    dfi_net_file f = dfi_net_open(ctx, "df_net_load_into", source);
    if (f.file == NULL) return ctx->code;
    df_scope mark = dfi_scratch_mark(ctx);
    df_net *loaded = dfi_net_read(&f, net);
    dfi_scratch_release(ctx, mark);
    df_safetensors_close(f.file);
    if (loaded == NULL) return ctx->code;
    dfi_net_take(net, loaded);
    return DF_OK;
}

/* =====================================================================================
   // >>training: loss, optimiser, average, trainer

   Draw a row of data x_0, a time t and noise eps; form x_t = alpha x_0 + sigma eps; ask
   the net and punish the square of what is wrong:

       loss = E_{x_0, t, eps} w(t) |net(x_t, t) - (a x_0 + b eps)|^2 / dim,

   with the row (a, b) of the plane for the net's prediction (Ho et al. 2020, eq. 14;
   Lipman et al. 2023, eq. 9). Its minimiser at each (x_t, t) is the conditional mean of
   the target, whatever w > 0 and the density of t are: they only share out effort. Maximum
   likelihood is w = |lambda'| on eps with t uniform (Kingma & Gao 2023). The score needs
   no target: its divergence says as much (Hyvarinen 2005). An energy's slope is a score.

   A trainer is a function of (data, descriptor, step) and nothing else: the row, time and
   noise of item k = (step batch + row) parts + part are keyed by the seed and k. So a
   resumed run goes on bit for bit, on any number of threads, as sums are cut by size and
   never by worker; and n machines (parts) walk the items of one with n times the batch.
   ===================================================================================== */
#include <time.h>

/* What Philox draws are for; beside those of `>>networks`. */
enum { DFI_DRAW_TIME, DFI_DRAW_LABEL, DFI_DRAW_EPS, DFI_DRAW_FLIP, DFI_DRAW_OWN = 16 };
#define DFI_DRAW_TRAIN 0x90000000u
#define DFI_DRAW_HELD  0x91000000u
#define DFI_DRAW_ORDER 0x92000000u

enum {
    DFI_TRAIN_ROWS = 16,      /* rows that one task draws */
    DFI_TRAIN_SLICES = 64,    /* partial sums of a norm */
    DFI_TRAIN_CHUNK = 1 << 14, /* elements that one task updates */
    DFI_TRAIN_BYTES = 1 << 28 /* what the graph of a part of a batch may take */
};

struct df_trainer {
    df_ctx *ctx;
    df_net *net;
    df_train_desc desc;
    const df_real *data;    /* [n, dim] borrowed, in its own units */
    const int *labels;      /* [n] or NULL, borrowed */
    int n, dim, held, kept; /* rows in all, held out, trained on */
    size_t reals_size, ints_size; /* bytes of the two allocations, at m and at order */
    size_t graph;                 /* ... of step memory for one part's graph */
    int *order;    /* [n] a permutation: the first `held` rows are held out */
    int *walk;     /* [kept] the epoch's permutation of the others */
    double lambda[2]; /* at t_min and t_max */
    int64_t epoch; /* which epoch `walk` belongs to; -1: none yet */
    df_real *m, *v, *grads; /* [net size] moments of AdamW; gradients of this step */
    df_real *x, *target;    /* [desc.rows, dim]: one part of a batch */
    df_real *x0;            /* ... without noise, for an objective; else NULL */
    df_real *condition;     /* [desc.rows, df_net_condition(net)] */
    df_real *t, *w;         /* [desc.rows] native times, weights */
    int *rows, *row_labels; /* [desc.rows] */
    int64_t step;    /* steps done */
    double loss_sum; /* since the last report */
    int64_t loss_count;
    double loss, validation, norm, rate; /* as last reported */
    double started; /* clock and step at which df_trainer_run was called */
    int64_t started_at;
};

/* ---- optimiser: AdamW, clipping, average ------------------------------------------- */

/* A range of elements by itself: the cut into tasks is free for AdamW and the average. */
typedef struct dfi_flat_job {
    const dfi_kernels *k;
    const df_adamw *adamw;
    size_t size;
    df_real *w, *m, *v;
    const df_real *g;
    double scale, c1, c2; /* scale: of gradients, or the average's decay */
} dfi_flat_job;

static void dfi_flat_run(df_ctx *ctx, dfi_flat_job *j, void (*task)(void *, int)) {
    dfi_parallel(ctx, (int)((j->size + DFI_TRAIN_CHUNK - 1) / DFI_TRAIN_CHUNK), task, j);
}

static size_t dfi_flat_range(const dfi_flat_job *j, int index, size_t *at) {
    *at = (size_t)index * DFI_TRAIN_CHUNK;
    return j->size - *at < DFI_TRAIN_CHUNK ? j->size - *at : (size_t)DFI_TRAIN_CHUNK;
}

static void dfi_adamw_task(void *arg, int index) {
    const dfi_flat_job *j = (const dfi_flat_job *)arg;
    const df_adamw *a = j->adamw;
    size_t at, n = dfi_flat_range(j, index, &at);
    j->k->adamw(n, j->w + at, j->m + at, j->v + at, j->g + at, j->scale, a->learning_rate,
                a->beta1, a->beta2, a->eps, a->weight_decay, j->c1, j->c2);
}

/* m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, both divided by 1 - b^t because they start
   at 0; w -= lr (m / (sqrt v + eps) + wd w) (Kingma & Ba 2015; Loshchilov & Hutter
   2019). */
DF_API void df_adamw_step(df_ctx *ctx, const df_adamw *adamw, int64_t step, size_t size,
                          df_real *w, df_real *m, df_real *v, const df_real *g,
                          double grad_scale) {
    if (ctx == NULL || adamw == NULL) return;
    double c1 = 1 - pow(adamw->beta1, (double)step);
    double c2 = 1 - pow(adamw->beta2, (double)step);
    dfi_flat_job j = {ctx->k, adamw, size, w, m, v, g, grad_scale, c1, c2};
    dfi_flat_run(ctx, &j, dfi_adamw_task);
}

static void dfi_ema_task(void *arg, int index) {
    const dfi_flat_job *j = (const dfi_flat_job *)arg;
    size_t at, n = dfi_flat_range(j, index, &at);
    j->k->ema(n, j->w + at, j->g + at, j->scale);
}

DF_API void df_ema_step(df_ctx *ctx, size_t size, df_real *average, const df_real *w,
                        double decay) {
    if (ctx == NULL) return;
    dfi_flat_job j = {ctx->k, NULL, size, average, NULL, NULL, w, decay, 0, 0};
    dfi_flat_run(ctx, &j, dfi_ema_task);
}

DF_API size_t df_net_span(const df_net *net, size_t *at) {
    size_t size = 0;
    for (int i = 0; net != NULL && i < net->count; i++) {
        const df_param *p = &net->param[i];
        if (p->offset < *at) continue;
        if (p->frozen && size > 0) break;
        if (p->frozen) continue;
        if (size == 0) *at = p->offset;
        size += p->size;
    }
    return size;
}

typedef struct dfi_norm_job {
    const dfi_kernels *k;
    size_t size, slice;
    const df_real *g;
    double sum[DFI_TRAIN_SLICES];
} dfi_norm_job;

static void dfi_norm_task(void *arg, int index) {
    dfi_norm_job *j = (dfi_norm_job *)arg;
    size_t at = (size_t)index * j->slice;
    if (at >= j->size) return;
    size_t n = j->size - at < j->slice ? j->size - at : j->slice;
    j->sum[index] = j->k->dot(n, j->g + at, j->g + at);
}

/* The slices depend on the size alone and are added in order. The factor's 1e-6 is
   PyTorch's (clip_grad_norm_; Pascanu et al. 2013). */
DF_API double df_clip_factor(df_ctx *ctx, size_t size, const df_real *g, double limit,
                             double *norm) {
    dfi_norm_job j;
    double sum = 0;
    memset(&j, 0, sizeof j);
    j.k = ctx->k;
    j.size = size;
    j.slice = size / DFI_TRAIN_SLICES + 1;
    j.g = g;
    dfi_parallel(ctx, DFI_TRAIN_SLICES, dfi_norm_task, &j);
    for (int i = 0; i < DFI_TRAIN_SLICES; i++) sum += j.sum[i];
    sum = sqrt(sum);
    if (norm != NULL) *norm = sum;
    return limit > 0 && sum + 1e-6 > limit ? limit / (sum + 1e-6) : 1.0;
}

/* The first step's decay is 0, as in diffusers' EMAModel: initial weights are
   forgotten. */
DF_API double df_ema_warmup(double decay, int64_t n) {
    double ramp = n <= 0 ? 0 : (1.0 + (double)n) / (10.0 + (double)n);
    return ramp < decay ? ramp : decay;
}

/* ---- the loss at one time ---------------------------------------------------------- */

typedef struct dfi_train_point {
    double alpha, sigma;  /* x_t = alpha x_0 + sigma eps */
    double a, b;          /* target = a x_0 + b eps */
    double scale, native; /* c_in and the time that the net is given */
    double W;             /* alpha sigma' - sigma alpha', where the weight asks for it */
    double weight;
} dfi_train_point;

/* |lambda'| alpha^2/det^2, finite where only lambda' is not. */
static double dfi_likelihood_on(double alpha, double sigma, double a, double b, double W) {
    double det = alpha * b - sigma * a;
    return W * alpha / (sigma * det * det);
}

DF_API df_result df_likelihood_weight(df_ctx *ctx, const df_process *p,
                                      df_prediction prediction, double t, double *w) {
    double row[2];
    df_rates rates;
    if (p == NULL || w == NULL)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_likelihood_weight: NULL is given");
    df_result result = df_process_rates(ctx, p, t, DF_RATE_W, &rates);
    if (result != DF_OK) return result;
    df_point at = df_process_at(p, t);
    result = df_plane_row(ctx, p, prediction, &at, row);
    if (result != DF_OK) return result;
    *w = dfi_likelihood_on(at.alpha, at.sigma, row[0], row[1], rates.w);
    if (!dfi_nonfinite(*w)) return DF_OK;
    return dfi_fail(ctx, DF_ERR_SINGULAR,
                    "df_likelihood_weight: infinite on %s of %s at t = %g",
                    df_prediction_name(prediction), df_process_name(p), at.t);
}

/* A weight w_0 on |x_0 error|^2 is w_0 (d x_0/d prediction)^2 on the prediction's error.
   From (x_t, prediction) = [[alpha, sigma], [a, b]] (x_0, eps): d x_0/d prediction =
   -sigma/det, det = alpha b - sigma a. With A = alpha/det, S = sigma/det the weightings
   are

     min-SNR  min(alpha^2/sigma^2, gamma) S^2   = min(A^2, gamma S^2)
     EDM      (rho^2 + s_d^2)/(rho s_d)^2 S^2   = A^2 + S^2/s_d^2   (rho = sigma/alpha)

   and stay finite where a factor does not: A = 1/b where a = 0 (eps at alpha = 0), S =
   -1/a where b = 0 (x_0 at sigma = 0). EDM's weight of EDM's own F is 1 everywhere. A^2
   turns weights on eps, such as P2's (sigma^2/q)^gamma, q = alpha^2 + sigma^2, of which
   A sigma = S alpha. |lambda'| over LAMBDA's density is the range of lambda. */
static double dfi_train_weight(const df_trainer *tr, const dfi_train_point *p) {
    const df_train_desc *d = &tr->desc;
    double det = p->alpha * p->b - p->sigma * p->a, huge = 1e150;
    double A = p->a == 0 ? 1 / p->b : det == 0 ? huge : p->alpha / det;
    double S = p->b == 0 ? -1 / p->a : det == 0 ? huge : p->sigma / det;
    double sd = d->card.process.sigma_data;
    double q = p->alpha * p->alpha + p->sigma * p->sigma, g = d->p2_gamma, w;
    if (d->weighting == DF_WEIGHT_UNIFORM) return 1;
    if (d->weighting == DF_WEIGHT_MIN_SNR) return fmin(A * A, d->snr_gamma * S * S);
    if (d->weighting == DF_WEIGHT_EDM) return A * A + S * S / (sd * sd);
    if (d->weighting == DF_WEIGHT_P2 && p->alpha < p->sigma)
        return A * A * pow(p->sigma * p->sigma / q, g);
    if (d->weighting == DF_WEIGHT_P2)
        return pow(A * A, 1 - g) * pow(S * S * p->alpha * p->alpha / q, g);
    w = (d->t_max - d->t_min) * dfi_likelihood_on(p->alpha, p->sigma, p->a, p->b, p->W);
    if (d->density == DF_DENSITY_LAMBDA) w = (tr->lambda[0] - tr->lambda[1]) * A * A;
    if (d->weighting == DF_WEIGHT_LIKELIHOOD) return w;
    return w / (1 + exp(-d->sigmoid_bias) * pow(p->alpha / p->sigma, 2));
}

/* All numbers of one time. ctx may be NULL, so that workers may call it: then only the
   code tells. A velocity against another clock c is dx/dc = (dx/dt) / (dc/dt). */
static df_result dfi_train_at(df_ctx *ctx, const df_trainer *tr, const df_model *model,
                              double t, dfi_train_point *out) {
    const df_card *card = &tr->desc.card;
    const df_process *p = &model->process;
    df_point at = df_process_at(p, t);
    double row[2], clock, rate = 1;
    int uses_w = tr->desc.weighting >= DF_WEIGHT_LIKELIHOOD;
    int by_lambda = tr->desc.density == DF_DENSITY_LAMBDA;
    df_rates rates;
    memset(&rates, 0, sizeof rates);
    df_result result = df_plane_row(ctx, p, card->prediction, &at, row);
    if (result == DF_OK && uses_w && !by_lambda)
        result = df_process_rates(ctx, p, t, DF_RATE_W, &rates);
    if (result == DF_OK && card->prediction == DF_VELOCITY)
        result = df_time_at(ctx, p, &card->clock, &at, &clock, &rate);
    if (result == DF_OK) result = df_time_at(ctx, p, &card->time, &at, &out->native, NULL);
    if (result != DF_OK) return result;
    out->alpha = at.alpha;
    out->sigma = at.sigma;
    out->a = row[0] / rate;
    out->b = row[1] / rate;
    out->scale = dfi_model_scale(model, &at);
    out->W = rates.w;
    out->weight = dfi_train_weight(tr, out);
    if (dfi_nonfinite(out->a) || dfi_nonfinite(out->b) || dfi_nonfinite(out->scale) ||
        (by_lambda && dfi_nonfinite(at.lambda)) || dfi_nonfinite(out->weight) ||
        out->weight > 1e30 || dfi_nonfinite(out->native))
        return dfi_fail(ctx, DF_ERR_SINGULAR,
                        "at t = %g the target %g x_0 + %g eps, its weight %g, the native "
                        "time %g%s is infinite",
                        t, out->a, out->b, out->weight, out->native,
                        by_lambda ? " or lambda, which density LAMBDA draws," : "");
    return DF_OK;
}

/* The time of item `item`, by the descriptor's density. */
static double dfi_train_time(const df_trainer *tr, const df_process *p, uint64_t item,
                             uint32_t draw) {
    const df_train_desc *d = &tr->desc;
    double u, t, g;
    df_real z;
    if (d->density == DF_DENSITY_UNIFORM || d->density == DF_DENSITY_INDEX) {
        df_random_uniform(d->seed, item, draw, 1, &u);
        if (d->density == DF_DENSITY_INDEX)
            return (floor(u * p->table_size) + 1) / p->table_size;
        return d->t_min + u * (d->t_max - d->t_min);
    }
    if (d->density == DF_DENSITY_LAMBDA) {
        df_random_uniform(d->seed, item, draw, 1, &u);
        t = df_process_at_lambda(p, tr->lambda[0] + u * (tr->lambda[1] - tr->lambda[0])).t;
        return t < d->t_min ? d->t_min : t > d->t_max ? d->t_max : t;
    }
    df_random_normal(d->seed, item, draw, 1, &z);
    g = d->density_mean + d->density_std * (double)z;
    t = d->density == DF_DENSITY_LOG_NORMAL ? df_process_at_lambda(p, -g).t
                                            : 1 / (1 + exp(-g));
    return t < d->t_min ? d->t_min : t > d->t_max ? d->t_max : t;
}

/* ---- a batch ----------------------------------------------------------------------- */

/* Fisher-Yates. Stream (seed, sample, DFI_DRAW_ORDER). */
static void dfi_shuffle(uint64_t seed, uint64_t sample, int n, int *list) {
    uint32_t bits[4];
    for (int i = n - 1, block = 0; i > 0; i--) {
        if ((n - 1 - i) % 4 == 0)
            df_random_bits(seed, sample, DFI_DRAW_ORDER, (uint32_t)block++, bits);
        int j = (int)(((uint64_t)bits[(n - 1 - i) % 4] * (uint64_t)(i + 1)) >> 32);
        int swap = list[i];
        list[i] = list[j];
        list[j] = swap;
    }
}

/* The row of data that item k trains on: epoch k / kept walks all rows in an order of its
   own. A batch that reaches the end of an epoch goes on into the next: none is short. */
static int dfi_train_row(df_trainer *tr, int64_t k) {
    int64_t epoch = k / tr->kept;
    if (epoch != tr->epoch) {
        memcpy(tr->walk, tr->order + tr->held, (size_t)tr->kept * sizeof(int));
        dfi_shuffle(tr->desc.seed, (uint64_t)epoch + 1, tr->kept, tr->walk);
        tr->epoch = epoch;
    }
    return tr->walk[k % tr->kept];
}

typedef struct dfi_batch_job {
    df_trainer *tr;
    df_model model;
    int64_t first;  /* item of row 0 */
    int64_t stride; /* from row to row */
    uint32_t draw;  /* DFI_DRAW_TRAIN or DFI_DRAW_HELD */
    int count;
} dfi_batch_job;

/* Does what happens to an item with probability p? Never to one that is held out. */
static int dfi_batch_chance(const dfi_batch_job *j, uint64_t item, uint32_t draw,
                            double p) {
    double u;
    if (j->draw == DFI_DRAW_HELD || !(p > 0)) return 0;
    df_random_uniform(j->tr->desc.seed, item, j->draw + draw, 1, &u);
    return u < p;
}

/* Label and condition of row r, or none. */
static void dfi_batch_condition(dfi_batch_job *j, uint64_t item, int r) {
    df_trainer *tr = j->tr;
    int drop = dfi_batch_chance(j, item, DFI_DRAW_LABEL, tr->desc.label_dropout);
    const df_real *from = tr->desc.condition;
    size_t K = (size_t)tr->net->condition;
    df_real *to = tr->condition + (size_t)r * K;
    tr->row_labels[r] = tr->labels != NULL && !drop ? tr->labels[tr->rows[r]] : -1;
    if (from == NULL) return;
    if (drop) memset(to, 0, K * sizeof *to);
    else memcpy(to, from + (size_t)tr->rows[r] * K, K * sizeof *to);
}

/* Row r: time, noise, label; x = c_in (alpha x_0 + sigma eps), target = a x_0 + b eps. The
   noise is drawn into target's place. */
static df_result dfi_batch_row(df_ctx *ctx, dfi_batch_job *j, int r) {
    df_trainer *tr = j->tr;
    const df_net *net = tr->net;
    uint64_t item = (uint64_t)(j->first + r * j->stride);
    size_t width = (size_t)net->shape[net->ndim - 1];
    size_t dim = (size_t)tr->dim;
    const df_real *data = tr->data + (size_t)tr->rows[r] * dim;
    df_real *x = tr->x + (size_t)r * dim, *target = tr->target + (size_t)r * dim;
    int step = net->scaling_size > 1;
    int flip = dfi_batch_chance(j, item, DFI_DRAW_FLIP, tr->desc.flip);
    dfi_train_point p;
    double t = dfi_train_time(tr, &j->model.process, item, j->draw + DFI_DRAW_TIME);
    df_result result = dfi_train_at(ctx, tr, &j->model, t, &p);
    if (result != DF_OK) return result;
    df_random_normal(tr->desc.seed, item, j->draw + DFI_DRAW_EPS, dim, target);
    for (size_t i = 0; i < dim; i++) {
        double x0 = (double)data[flip ? i + width - 1 - 2 * (i % width) : i];
        double eps = (double)target[i];
        if (net->scaling_size > 0) {
            const double *s = net->scaling + (step ? i : 0);
            x0 = (x0 - s[0]) / s[net->scaling_size];
        }
        if (tr->x0 != NULL) tr->x0[(size_t)r * dim + i] = (df_real)x0;
        x[i] = (df_real)(p.scale * (p.alpha * x0 + p.sigma * eps));
        target[i] = (df_real)(p.a * x0 + p.b * eps);
    }
    tr->t[r] = (df_real)p.native;
    tr->w[r] = (df_real)p.weight;
    dfi_batch_condition(j, item, r);
    return DF_OK;
}

static void dfi_batch_task(void *arg, int index) {
    dfi_batch_job *j = (dfi_batch_job *)arg;
    int first = index * DFI_TRAIN_ROWS;
    for (int r = first; r < j->count && r < first + DFI_TRAIN_ROWS; r++)
        if (dfi_batch_row(NULL, j, r) != DF_OK) j->tr->rows[r] = -1 - j->tr->rows[r];
}

/* Rows for items from `first` on: the machine's own, or held out. Workers have no context
   to write a sentence to: they mark a row whose time is singular by a negative index, and
   it is met again here. */
static df_result dfi_batch_fill(df_trainer *tr, int64_t first, uint32_t draw, int count) {
    dfi_batch_job j;
    j.tr = tr;
    j.model = df_net_model(tr->net);
    j.first = first;
    j.stride = draw == DFI_DRAW_HELD ? 1 : tr->desc.parts;
    j.draw = draw;
    j.count = count;
    for (int r = 0; r < count; r++)
        tr->rows[r] = draw == DFI_DRAW_HELD ? tr->order[first + r]
                                            : dfi_train_row(tr, first + r * j.stride);
    dfi_parallel(tr->ctx, (count + DFI_TRAIN_ROWS - 1) / DFI_TRAIN_ROWS, dfi_batch_task,
                 &j);
    for (int r = 0; r < count; r++)
        if (tr->rows[r] < 0) {
            tr->rows[r] = -1 - tr->rows[r];
            return dfi_batch_row(tr->ctx, &j, r);
        }
    return DF_OK;
}

/* A number for each row, as it broadcasts over samples of x: zeros, to be filled. */
static df_tensor *dfi_column(df_ctx *ctx, const df_tensor *x) {
    int shape[4] = {1, 1, 1, 1};
    if (x != NULL) shape[0] = x->shape[0];
    return x != NULL ? df_tensor_new(ctx, x->ndim, shape) : NULL;
}

/* Where row r of a batch stands. */
static df_point dfi_batch_point(const df_model *m, const df_batch *b, int r) {
    return df_time_point(&m->process, &m->time, (double)b->t->data[r]);
}

/* The bound's terms (Ho et al. 2020, eq. 5), one drawn for each row, times T, in nats per
   element: KL of the posterior at the entry before, N(mean, SMALL), from the net's N(mean
   + e, V), per element 1/2 (log V - log SMALL + (SMALL + e^2)/V - 1). The net's mean is
   held fixed, so that V alone learns. e = (d mean/d x_0) (d x_0/d prediction) (y -
   target). At the first entry, whose posterior is a point, it is -log N(x_0; mean, V), and
   RANGE goes from the second entry's SMALL (Nichol & Dhariwal 2021, section 3.1). */
static df_tensor *dfi_vlb(const df_trainer *tr, const df_batch *b, df_tensor *y,
                          df_tensor *v) {
    df_ctx *ctx = tr->ctx;
    df_model m = df_net_model(tr->net);
    int T = m.process.table_size;
    df_tensor *c[5]; /* log V = c0 v + c1; c2 = SMALL, c3 = (e/(y - target))^2, c4 rest */
    for (int i = 0; i < 5; i++) c[i] = dfi_column(ctx, b->x);
    for (int r = 0; c[4] != NULL && r < b->x->shape[0]; r++) {
        df_point at = dfi_batch_point(&m, b, r), to;
        double index = fmin(fmax(floor(T * at.t + .5), 1), T);
        at = df_process_at(&m.process, index / T);
        to = df_process_at(&m.process, (index - 1) / T);
        dfi_posterior q = dfi_posterior_of(&at, &to);
        double small = q.small, cx, cp;
        if (index < 2) to = df_process_at(&m.process, 2.0 / T);
        if (index < 2) small = dfi_posterior_of(&to, &at).small;
        if (dfi_model_map(ctx, &m, DF_X0, &at, &cx, &cp) != DF_OK)
            return dfi_fail_tensor(ctx, ctx->code, "%s", ctx->message);
        int range = m.learned == DF_LEARNED_RANGE;
        c[0]->data[r] = (df_real)(range ? .5 * log(q.large / small) : 1);
        c[1]->data[r] = (df_real)(range ? .5 * log(q.large * small) : 0);
        c[2]->data[r] = (df_real)q.small;
        c[3]->data[r] = (df_real)(q.x0 * q.x0 * cp * cp);
        c[4]->data[r] = (df_real)(index < 2 ? log(2 * DFI_PI) : -1 - log(small));
    }
    df_tensor *log_v = df_add(ctx, df_mul(ctx, c[0], v), c[1]);
    df_tensor *e2 = df_square(ctx, df_sub(ctx, df_detach(ctx, y), b->target));
    df_tensor *square = df_add(ctx, df_mul(ctx, e2, c[3]), c[2]);
    df_tensor *over_v = df_mul(ctx, square, df_exp(ctx, df_scale(ctx, log_v, -1)));
    df_tensor *sum = df_add(ctx, df_add(ctx, log_v, c[4]), over_v);
    return df_scale(ctx, df_mean(ctx, sum), .5 * T);
}

/* mean over elements of w (net - target)^2, as a graph. What a net says of a variance is
   asked about by vlb alone. */
static df_tensor *dfi_denoising_loss(const df_trainer *tr, const df_run *run,
                                     const df_batch *b) {
    df_ctx *ctx = run->ctx;
    int column[4] = {-1, 1, 1, 1}, C = tr->net->shape[0];
    df_tensor *y = df_run_net(run, b->x, b->t, b->labels), *v = NULL, *loss;
    if (tr->desc.vlb > 0) v = df_slice(ctx, y, 1, C, C);
    if (tr->net->outputs != C) y = df_slice(ctx, y, 1, 0, C);
    if (tr->desc.weighting == DF_WEIGHT_UNIFORM) {
        loss = df_mse(ctx, y, b->target);
    } else {
        df_tensor *w = df_reshape(ctx, b->weight, tr->net->ndim + 1, column);
        loss = df_mean(ctx, df_mul(ctx, df_square(ctx, df_sub(ctx, y, b->target)), w));
    }
    if (!(tr->desc.vlb > 0)) return loss;
    return df_add(ctx, loss, df_scale(ctx, dfi_vlb(tr, b, y, v), tr->desc.vlb));
}

/* N(0, 1) [rows, width], row r of sample first + r stride. */
static df_tensor *dfi_normal_rows(df_ctx *ctx, uint64_t seed, uint64_t first,
                                  uint64_t stride, uint32_t draw, int rows, int width) {
    int shape[2];
    shape[0] = rows, shape[1] = width;
    df_tensor *z = df_tensor_new(ctx, 2, shape);
    for (int r = 0; z != NULL && r < rows; r++)
        df_random_normal(seed, first + (uint64_t)r * stride, draw, (size_t)width,
                         z->data + (size_t)r * (size_t)width);
    return z;
}
DF_API df_tensor *df_batch_normal(const df_run *run, const df_batch *batch, uint32_t draw,
                                  int width) {
    if (dfi_stuck(run->ctx) != DF_OK || batch->x0 == NULL) return NULL;
    return dfi_normal_rows(run->ctx, run->seed, batch->first, batch->stride,
                           batch->draw + draw, batch->x0->shape[0], width);
}

/* ---- objectives: score matching without a target, energies -------------------------- */

/* Direction k of `probes` drawn ones, or, if there are none, e_k; shaped as the batch. */
static df_tensor *dfi_batch_probe(const df_run *run, const df_batch *b, int probes,
                                  int k) {
    int dim = run->net->dim;
    if (probes < 1) return dfi_unit(run->ctx, dim, k, b->x);
    return df_reshape(run->ctx, df_batch_normal(run, b, (uint32_t)k, dim), b->x->ndim,
                      b->x->shape);
}

/* With s = cx x + cp y of the net's answer y to c_in x: div s = dim cx + cp c_in div y,
   whose first part needs no probes. A weight on |y error|^2 is w/cp^2 on the score's. */
static df_tensor *dfi_implicit(const df_run *run, const df_batch *b, int probes) {
    df_ctx *ctx = run->ctx;
    df_model m = df_net_model(run->net);
    df_tensor *c[2], *rest[3], *y = NULL, *div = NULL;
    if (dfi_stuck(ctx) != DF_OK) return NULL;
    for (int i = 0; i < 2; i++) c[i] = dfi_column(ctx, b->x);
    for (int i = 0; i < 3; i++) rest[i] = df_tensor_new(ctx, 1, b->x->shape);
    for (int r = 0; rest[2] != NULL && r < b->x->shape[0]; r++) {
        df_point at = dfi_batch_point(&m, b, r);
        double cx, cp, in = dfi_model_scale(&m, &at);
        if (dfi_model_map(ctx, &m, DF_SCORE, &at, &cx, &cp) != DF_OK)
            return dfi_fail_tensor(ctx, ctx->code, "%s", ctx->message);
        c[0]->data[r] = (df_real)(cx / in);
        c[1]->data[r] = (df_real)cp;
        rest[0]->data[r] = (df_real)(m.dim * cx);
        rest[1]->data[r] = (df_real)(cp * in / (probes > 0 ? probes : 1));
        rest[2]->data[r] = (df_real)((double)b->weight->data[r] / (cp * cp));
    }
    for (int k = 0; k < (probes > 0 ? probes : 1); k++) {
        df_tensor *v = probes > 0 ? dfi_batch_probe(run, b, probes, k) : NULL;
        df_tensor *one = df_run_divergence(run, b->x, b->t, b->labels, v, &y);
        div = k > 0 ? df_add(ctx, div, one) : one;
    }
    df_tensor *score = df_add(ctx, df_mul(ctx, c[0], b->x), df_mul(ctx, c[1], y));
    df_tensor *half = df_scale(ctx, dfi_row_sums(ctx, m.dim, df_square(ctx, score)), .5);
    div = df_add(ctx, df_mul(ctx, rest[1], div), rest[0]);
    return df_mean(ctx, df_mul(ctx, rest[2], df_add(ctx, div, half)));
}

DF_API df_objective_desc df_objective_defaults(void) {
    df_objective_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.steps = 20;
    d.step = .01;
    return d;
}

/* An objective's self; without its cookie, and stuck, if it is none. */
static df_objective_desc dfi_objective(df_ctx *ctx, const char *who, const void *self,
                                       int most_probes) {
    df_objective_desc d = df_objective_defaults();
    if (self != NULL) d.cookie = *(const uint32_t *)self;
    if (self != NULL && d.cookie == DFI_COOKIE) d = *(const df_objective_desc *)self;
    if (d.cookie == DFI_COOKIE && d.probes >= 0 && d.probes <= most_probes &&
        d.steps >= 1 && d.steps <= 10000 && dfi_positive(d.step))
        return d;
    d.cookie = 0;
    dfi_fail_tensor(ctx, DF_ERR_ARGUMENT,
                    "%s: %d probes, %d steps of %g: want a descriptor of "
                    "df_objective_defaults, probes 0 to %d, steps 1 to 10000, step above "
                    "0", who, d.probes, d.steps, d.step, most_probes);
    return d;
}

DF_API df_tensor *df_objective_implicit(void *self, const df_run *run,
                                        const df_batch *batch) {
    (void)self;
    return dfi_implicit(run, batch, 0);
}

DF_API df_tensor *df_objective_sliced(void *self, const df_run *run,
                                      const df_batch *batch) {
    df_objective_desc d = dfi_objective(run->ctx, "df_objective_sliced", self, INT_MAX);
    return d.cookie ? dfi_implicit(run, batch, d.probes > 0 ? d.probes : 1) : NULL;
}

static int dfi_energy_answer(void *self, df_ctx *ctx, const df_query *q, df_real *out) {
    const df_net *net = (const df_net *)self;
    df_model m = df_net_model(net);
    size_t dim = (size_t)net->dim;
    df_query own = *q;
    if (net->card.prediction != DF_SCORE || net->outputs != net->shape[0] ||
        (q->ask != DF_ASK_PREDICT && q->ask != DF_ASK_LOG_DENSITY))
        return dfi_fail(ctx, DF_ERR_UNSUPPORTED,
                        "df_energy_model: answers PREDICT and LOG_DENSITY, of a net with "
                        "a channel for each of x, whose card says score, not %s",
                        df_prediction_name(net->card.prediction));
    df_scope mark = dfi_scratch_mark(ctx);
    df_real *f = (df_real *)dfi_scratch(ctx, dfi_mul((size_t)q->n, dim * sizeof *f));
    own.ask = DF_ASK_PREDICT;
    int result = f != NULL ? dfi_net_answer(self, ctx, &own, f) : (int)DF_ERR_MEMORY;
    own.ask = DF_ASK_VJP;
    own.v = f;
    if (result == DF_OK && q->ask == DF_ASK_PREDICT)
        result = dfi_net_answer(self, ctx, &own, out);
    for (int r = 0; result == DF_OK && r < q->n; r++) {
        const df_real *row = f + (size_t)r * dim;
        df_point at = {q->t[r], q->alpha[r], q->sigma[r], 0};
        double in = dfi_model_scale(&m, &at);
        for (size_t i = 0; q->ask == DF_ASK_PREDICT && i < dim; i++)
            out[(size_t)r * dim + i] *= (df_real)-in;
        if (q->ask == DF_ASK_LOG_DENSITY)
            out[r] = (df_real)(-.5 * ctx->k->dot(dim, row, row));
    }
    dfi_scratch_release(ctx, mark);
    return result;
}

DF_API df_model df_energy_model(const df_net *net) {
    df_model m = df_net_model(net);
    if (net == NULL) return m;
    m.predict = dfi_energy_answer;
    m.answers = DF_ASK_PREDICT | DF_ASK_LOG_DENSITY;
    return m;
}

/* v^T (target + grad E) for each direction, by a tangent of the net. */
DF_API df_tensor *df_objective_energy(void *self, const df_run *run,
                                      const df_batch *batch) {
    df_ctx *ctx = run->ctx;
    df_model m = df_net_model(run->net);
    df_tensor *in = dfi_column(ctx, batch->x), *sum = NULL;
    int probes = dfi_objective(ctx, "df_objective_energy", self, INT_MAX).probes;
    if (dfi_stuck(ctx) != DF_OK || !dfi_run_square(run, "df_objective_energy"))
        return NULL;
    if (m.prediction != DF_SCORE)
        return dfi_fail_tensor(ctx, DF_ERR_UNSUPPORTED,
                               "df_objective_energy: the card says %s, want score",
                               df_prediction_name(m.prediction));
    for (int r = 0; r < batch->x->shape[0]; r++) {
        df_point at = dfi_batch_point(&m, batch, r);
        in->data[r] = (df_real)dfi_model_scale(&m, &at);
    }
    for (int k = 0; k < (probes > 0 ? probes : m.dim); k++) {
        df_tensor *v = dfi_batch_probe(run, batch, probes, k);
        if (v == NULL || df_set_tangent(ctx, batch->x, v) != DF_OK) return NULL;
        df_tensor *f = df_run_net(run, batch->x, batch->t, batch->labels);
        df_tensor *along = f != NULL ? f->tangent : NULL; /* f may be x, or without it */
        batch->x->tangent = NULL;
        if (f == NULL) return NULL;
        df_tensor *slope = df_mul(ctx, v, batch->target);
        if (along != NULL)
            slope = df_add(ctx, df_mul(ctx, in, df_mul(ctx, f, along)), slope);
        df_tensor *one = df_square(ctx, dfi_row_sums(ctx, m.dim, slope));
        sum = k > 0 ? df_add(ctx, sum, one) : one;
    }
    double per = 1.0 / ((double)m.dim * (probes > 0 ? probes : 1));
    return df_scale(ctx, df_mean(ctx, df_mul(ctx, batch->weight, sum)), per);
}

/* x_neg as the net is given it. The chain asks a model of the run's weights, while the
   tape waits; its noise is the item's own. */
static df_tensor *dfi_negatives(const df_objective_desc *d, const df_run *run,
                                const df_batch *b) {
    df_ctx *ctx = run->ctx;
    df_net now = *run->net;
    now.average = NULL;
    now.weights = (df_real *)(uintptr_t)run->weights; /* only read */
    df_model m = df_energy_model(&now);
    size_t n = (size_t)b->x->shape[0], dim = (size_t)m.dim;
    df_tensor *x = df_tensor_copy(ctx, b->x->ndim, b->x->shape, b->x->data);
    double *t = (double *)dfi_scratch(ctx, dfi_mul(n, sizeof *t));
    df_real *score = dfi_reals(ctx, dfi_mul(n + 1, dim)), *z;
    df_query q;
    memset(&q, 0, sizeof q);
    if (x == NULL || t == NULL || score == NULL) return dfi_stick(ctx);
    z = score + n * dim;
    q.ask = DF_ASK_PREDICT, q.n = (int)n, q.x = x->data, q.t = t, q.labels = b->labels;
    q.condition = run->condition != NULL ? run->condition->data : NULL;
    q.condition_stride = (size_t)now.condition;
    for (int k = 0; k <= d->steps; k++) {
        df_query own = q; /* the answer leaves its own pointers there */
        if (k > 0 && dfi_ask_checked(ctx, &m, &own, score) != DF_OK)
            return dfi_fail_tensor(ctx, ctx->code, "df_objective_contrastive: %s",
                                   ctx->message);
        for (size_t r = 0; r < n; r++) {
            df_point at = dfi_batch_point(&m, b, (int)r);
            double in = dfi_model_scale(&m, &at), c[3] = {1, d->step, sqrt(2 * d->step)};
            df_real *row = x->data + r * dim;
            const df_real *const terms[3] = {row, score + r * dim, z};
            df_random_normal(run->seed, b->first + r * b->stride, b->draw + (uint32_t)k,
                             dim, z);
            t[r] = at.t;
            if (k == 0) { /* the start, which has no score yet */
                c[0] = d->from_noise ? 0 : 1 / in;
                c[1] = 0, c[2] = d->from_noise ? hypot(at.alpha, at.sigma) : 0;
                memset(score + r * dim, 0, dim * sizeof *score);
            }
            for (int j = 0; k == d->steps && j < 3; j++) c[j] *= in;
            ctx->k->combine(dim, 3, c, terms, row);
        }
    }
    return x;
}

DF_API df_tensor *df_objective_contrastive(void *self, const df_run *run,
                                           const df_batch *batch) {
    df_ctx *ctx = run->ctx;
    df_objective_desc d = dfi_objective(ctx, "df_objective_contrastive", self, 0);
    if (dfi_blocked(ctx, "df_objective_contrastive", batch->x, batch->x)) return NULL;
    df_tensor *low = df_run_net(run, batch->x, batch->t, batch->labels);
    df_tensor *high = dfi_negatives(&d, run, batch);
    high = df_run_net(run, high, batch->t, batch->labels);
    df_tensor *gap = df_sub(ctx, df_square(ctx, low), df_square(ctx, high));
    return df_scale(ctx, df_mean(ctx, gap), .5 * run->net->dim);
}

/* Rows that dfi_batch_fill made, as tensors; then their loss. */
static df_tensor *dfi_batch_loss(df_trainer *tr, df_run run, int count, int64_t first,
                                 uint32_t draw) {
    df_ctx *ctx = tr->ctx;
    int ndim = tr->net->ndim + 1, shape[4], c[2];
    df_batch b;
    memset(&b, 0, sizeof b);
    shape[0] = c[0] = count;
    for (int i = 1; i < ndim; i++) shape[i] = tr->net->shape[i - 1];
    c[1] = tr->net->condition;
    b.x = df_tensor_borrow(ctx, ndim, shape, tr->x, NULL);
    b.t = df_tensor_borrow(ctx, 1, shape, tr->t, NULL);
    b.target = df_tensor_borrow(ctx, ndim, shape, tr->target, NULL);
    b.weight = df_tensor_borrow(ctx, 1, shape, tr->w, NULL);
    b.labels = tr->labels != NULL ? tr->row_labels : NULL;
    b.first = (uint64_t)first;
    b.stride = (uint64_t)(draw == DFI_DRAW_HELD ? 1 : tr->desc.parts);
    b.draw = draw + DFI_DRAW_OWN;
    if (tr->desc.condition != NULL)
        run.condition = df_tensor_borrow(ctx, 2, c, tr->condition, NULL);
    if (tr->desc.objective == NULL) return dfi_denoising_loss(tr, &run, &b);
    b.x0 = df_tensor_borrow(ctx, ndim, shape, tr->x0, NULL);
    run.seed = tr->desc.seed;
    df_result before = ctx->code;
    ctx->code = DF_OK;
    df_tensor *loss = tr->desc.objective(tr->desc.objective_self, &run, &b);
    if (dfi_stuck(ctx) == DF_OK && loss == NULL && ctx->code != DF_OK)
        return dfi_stick(ctx); /* what it asked failed, a model say */
    if (ctx->code == DF_OK) ctx->code = before;
    if (loss != NULL && loss->size == 1) return loss;
    if (dfi_stuck(ctx) != DF_OK) return NULL;
    return dfi_fail_tensor(ctx, DF_ERR_SHAPE,
                           "df_trainer: the objective made %.0f numbers, not one loss",
                           loss != NULL ? (double)loss->size : 0.0);
}

/* ---- one step ---------------------------------------------------------------------- */

/* Linear rise over `warmup` steps, then half a cosine down to final_rate (Loshchilov &
   Hutter 2017). */
static double dfi_train_rate(const df_train_desc *d, int64_t step) {
    if (step < d->warmup) return d->learning_rate * (double)(step + 1) / (double)d->warmup;
    double span = (double)(d->steps - d->warmup);
    double u = span > 0 ? (double)(step - d->warmup) / span : 1;
    return d->learning_rate *
           (d->final_rate + (1 - d->final_rate) * 0.5 * (1 + cos(DFI_PI * u)));
}

/* Why a step failed: a weight that is no number, or else the size of the steps. */
static df_result dfi_train_blown(df_trainer *tr, double loss, double norm) {
    size_t element = 0;
    int bad = dfi_net_nonfinite(tr->ctx, tr->net, tr->net->weights, &element);
    if (bad >= 0)
        return dfi_fail(tr->ctx, DF_ERR_NONFINITE,
                        "df_trainer_run: step %.0f: element %.0f of '%s' is not finite",
                        (double)tr->step + 1, (double)element, tr->net->param[bad].name);
    return dfi_fail(tr->ctx, DF_ERR_NONFINITE,
                    "df_trainer_run: step %.0f: loss %g, gradient norm %g: weights left "
                    "as before the step; try a lower learning_rate (%g), a longer warmup "
                    "(%.0f) or a smaller clip (%g)",
                    (double)tr->step + 1, loss, norm, tr->desc.learning_rate,
                    (double)tr->desc.warmup, tr->desc.clip);
}

/* A trainer's tensors need the tape for themselves and start unstuck, so that a failure is
   their own: afterwards it is reported, and no longer sticks. Step memory for a whole
   graph is asked for in one piece: blocks that double as they grow would take more. */
static df_result dfi_train_ready(df_trainer *tr, const char *function) {
    df_ctx *ctx = tr->ctx;
    if (ctx->recording)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "%s: end the recording first", function);
    if (dfi_stuck(ctx) != DF_OK) return ctx->code;
    df_scope mark = dfi_scratch_mark(ctx);
    int fits = dfi_scratch(ctx, tr->graph) != NULL;
    dfi_scratch_release(ctx, mark);
    return fits ? (df_result)DF_OK : ctx->code;
}
static df_result dfi_train_unstick(df_ctx *ctx) {
    df_result result = dfi_stuck(ctx);
    ctx->stuck = DF_OK;
    return result;
}

/* Rows at .. at+count-1 of this step's batch: their share of its mean loss is added to
   *loss, of its gradient to tr->grads. The graph is left in step memory. */
static df_result dfi_train_part(df_trainer *tr, int at, int count, double *loss) {
    df_ctx *ctx = tr->ctx;
    int64_t first = (tr->step * tr->desc.batch + at) * tr->desc.parts + tr->desc.part;
    df_run run = df_run_defaults(ctx, tr->net);
    run.weights = tr->net->weights;
    run.grads = tr->grads;
    run.training = 1;
    run.seed = tr->desc.seed;
    run.draw = (uint64_t)first;
    df_result result = dfi_batch_fill(tr, first, DFI_DRAW_TRAIN, count);
    if (result != DF_OK) return result;
    df_record_begin(ctx);
    df_tensor *mean = dfi_batch_loss(tr, run, count, first, DFI_DRAW_TRAIN);
    df_tensor *share = df_scale(ctx, mean, (double)count / tr->desc.batch);
    result = df_backward(ctx, share);
    if (share != NULL) *loss += (double)share->data[0];
    df_record_end(ctx);
    return dfi_train_unstick(ctx) != DF_OK ? ctx->code : result;
}

/* Loss and gradient of a batch. Cancelling is noticed between its parts. */
static df_result dfi_train_gradient(df_trainer *tr, double *loss) {
    df_ctx *ctx = tr->ctx;
    int batch = tr->desc.batch, rows = tr->desc.rows;
    memset(tr->grads, 0, tr->net->size * sizeof(df_real));
    for (int at = 0; at < batch; at += rows) {
        if (dfi_cancelled(ctx))
            return dfi_fail(ctx, DF_CANCELLED,
                            "df_trainer_run: cancelled after step %.0f of %.0f",
                            (double)tr->step, (double)tr->desc.steps);
        df_scope mark = dfi_scratch_mark(ctx);
        df_result result = dfi_train_part(tr, at, batch - at < rows ? batch - at : rows,
                                          loss);
        dfi_scratch_release(ctx, mark);
        if (result != DF_OK) return result;
    }
    return DF_OK;
}

/* What a callback said. One of the library's own codes has a sentence, which says more. */
static df_result dfi_train_answer(df_trainer *tr, const char *name, int answer) {
    if (answer == 0 || (answer < 0 && answer == tr->ctx->code)) return answer;
    return dfi_fail(tr->ctx, answer, "df_trainer_run: %s returned %d after step %.0f",
                    name, answer, (double)tr->step);
}

static df_result dfi_train_step(df_trainer *tr) {
    const df_train_desc *d = &tr->desc;
    df_net *net = tr->net;
    double loss = 0, norm = 0;
    df_result result = dfi_train_gradient(tr, &loss);
    if (result == DF_OK && d->on_gradients != NULL)
        result = dfi_train_answer(tr, "on_gradients",
                                  d->on_gradients(d->user, net, tr->grads, net->size));
    if (result != DF_OK) return result;
    double factor = df_clip_factor(tr->ctx, net->size, tr->grads, d->clip, &norm);
    /* the square of a gradient must fit a df_real, or AdamW's v is infinite for ever */
    double most = sizeof(df_real) == sizeof(float) ? 1e18 : 1e150;
    if (dfi_nonfinite(loss) || dfi_nonfinite(norm) || norm > most)
        return dfi_train_blown(tr, loss, norm);
    df_adamw adamw;
    adamw.learning_rate = tr->rate = dfi_train_rate(d, tr->step);
    adamw.beta1 = d->beta1;
    adamw.beta2 = d->beta2;
    adamw.eps = d->adam_eps;
    adamw.weight_decay = d->weight_decay;
    double decay = d->ema_warmup ? df_ema_warmup(d->ema, tr->step) : d->ema;
    for (size_t at = 0, n; (n = df_net_span(net, &at)) > 0; at += n) {
        df_adamw_step(tr->ctx, &adamw, tr->step + 1, n, net->weights + at, tr->m + at,
                      tr->v + at, tr->grads + at, factor);
        if (net->average != NULL)
            df_ema_step(tr->ctx, n, net->average + at, net->weights + at, decay);
    }
    tr->norm = norm;
    tr->loss_sum += loss;
    tr->loss_count++;
    tr->step++;
    return DF_OK;
}

/* ---- making a trainer -------------------------------------------------------------- */

DF_API df_train_desc df_train_defaults(void) {
    df_train_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.card = df_card_defaults();
    d.snr_gamma = 5;
    d.p2_gamma = 1;
    d.sigmoid_bias = 2;
    d.density_std = 1;
    d.t_min = -1;
    d.t_max = 1;
    d.scaling = DF_SCALING_GLOBAL;
    d.batch = 256;
    d.steps = 5000;
    d.learning_rate = 2e-3;
    d.warmup = 100;
    d.final_rate = 0.01;
    d.beta1 = 0.9;
    d.beta2 = 0.999;
    d.adam_eps = 1e-8;
    d.weight_decay = 0.01;
    d.clip = 1;
    d.ema = 0.999;
    d.ema_warmup = 1;
    d.parts = 1;
    d.validation = 0.05;
    d.validate_every = 500;
    d.report = 50;
    return d;
}

/* Every number of the descriptor that has a range, with the range. */
static df_result dfi_train_ranges(df_ctx *ctx, const df_train_desc *d) {
    const struct { const char *name; double value, least, most; } range[] = {
        {"batch", (double)d->batch, 1, 1 << 20}, {"warmup", (double)d->warmup, 0, 1e12},
        {"rows", (double)d->rows, 0, 1 << 20}, {"parts", (double)d->parts, 1, 1 << 16},
        {"part", (double)d->part, 0, (double)d->parts - 1}, {"flip", d->flip, 0, 1},
        {"steps times batch times parts",
         (double)d->steps * (double)d->batch * (double)d->parts, 1, 4e18},
        {"beta1", d->beta1, 0, 0.999999}, {"t_min", d->t_min, -1e300, 1},
        {"adam_eps", d->adam_eps, 1e-30, 1}, {"beta2", d->beta2, 0, 0.99999999},
        {"ema", d->ema, 0, 0.9999999},
        {"validation", d->validation, 0, 0.99}, {"report", (double)d->report, 1, 1e12},
        {"label_dropout", d->label_dropout, 0, 1}, {"snr_gamma", d->snr_gamma, 1e-6, 1e6},
        {"weighting", (double)d->weighting, 0, DF_WEIGHT_SIGMOID},
        {"density", (double)d->density, 0, DF_DENSITY_LAMBDA}, {"clip", d->clip, 0, 1e30},
        {"p2_gamma", d->p2_gamma, 0, 10}, {"vlb", d->vlb, 0, 1e6},
        {"sigmoid_bias", d->sigmoid_bias, -50, 50},
        {"density_mean", d->density_mean, -50, 50}, {"steps", (double)d->steps, 1, 1e12},
        {"scaling", (double)d->scaling, 0, DF_SCALING_EACH},
        {"learning_rate", d->learning_rate, 0, 1e10}, {"final_rate", d->final_rate, 0, 1},
        {"weight_decay", d->weight_decay, 0, 1e6}, {"density_std", d->density_std, 0, 50},
        {"learning_rate times weight_decay", d->learning_rate * d->weight_decay, 0, 1},
        {"validate_every", (double)d->validate_every, 0, 1e12}, {"t_max", d->t_max, 0, 1},
    };
    for (size_t i = 0; i < sizeof range / sizeof *range; i++)
        if (dfi_nonfinite(range[i].value) || range[i].value < range[i].least ||
            range[i].value > range[i].most)
            return dfi_fail(ctx, DF_ERR_ARGUMENT,
                            "df_trainer_create: %s is %g, want %g to %g", range[i].name,
                            range[i].value, range[i].least, range[i].most);
    return DF_OK;
}

static df_result dfi_train_check_data(df_ctx *ctx, const df_net *net, const df_real *data,
                                      int n, const int *labels, const df_train_desc *d) {
    static const char who[] = "df_trainer_create";
    size_t rows = (size_t)n, K = (size_t)net->condition;
    int bad = dfi_net_bad_label(net, n, labels);
    if (bad < n)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "%s: label %d of data row %d: net '%s' has %d classes", who,
                        labels[bad], bad, net->kind, net->classes);
    if (net->vocab > 0)
        return dfi_fail(ctx, DF_ERR_UNSUPPORTED,
                        "%s: net '%s' takes tokens, which have no noise: train it by "
                        "df_run_tokens and df_cross_entropy", who, net->kind);
    if ((d->condition != NULL && K == 0) || (d->flip > 0 && net->ndim != 3))
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "%s: a condition is for nets that take one (df_net_condition), "
                        "flip for samples of 3 axes; net '%s' takes %d numbers, its "
                        "samples have %d",
                        who, net->kind, net->condition, net->ndim);
    if (net->outputs != net->shape[0] * (d->card.learned ? 2 : 1))
        return dfi_fail(ctx, DF_ERR_UNSUPPORTED,
                        "%s: net '%s' makes %d channels of %d: it must make as many, or, "
                        "where card.learned says what the others are, twice as many",
                        who, net->kind, net->outputs, net->shape[0]);
    df_result result = dfi_rows_finite(ctx, who, "data", rows, (size_t)net->dim, data);
    if (result != DF_OK) return result;
    return dfi_rows_finite(ctx, who, "condition", rows, K, d->condition);
}

/* Mean and deviation of column c (of all columns if size is 1), in double, two passes. A
   constant column keeps its scale. */
static void dfi_train_moments(const df_trainer *tr, int size, int c, double *mean,
                              double *scale) {
    size_t dim = (size_t)tr->dim, step = size == 1 ? 1 : dim;
    size_t total = (size_t)tr->n * dim, count = total / step;
    double sum = 0, square = 0;
    for (size_t i = (size_t)c; i < total; i += step) sum += (double)tr->data[i];
    *mean = sum / (double)count;
    for (size_t i = (size_t)c; i < total; i += step) {
        double e = (double)tr->data[i] - *mean;
        square += e * e;
    }
    *scale = sqrt(square / (double)count);
    if (*scale <= 1e-12 * fabs(*mean) || *scale == 0) *scale = 1;
}

static df_result dfi_train_scaling(df_trainer *tr) {
    df_ctx *ctx = tr->ctx;
    int size = tr->desc.scaling == DF_SCALING_NONE ? 0 : 1;
    if (tr->desc.scaling == DF_SCALING_EACH) size = tr->dim;
    df_scope mark = dfi_scratch_mark(ctx);
    double *both = (double *)dfi_scratch(ctx, dfi_mul(2 * (size_t)size + 1, sizeof *both));
    df_result result = DF_ERR_MEMORY;
    if (both != NULL) {
        for (int c = 0; c < size; c++)
            dfi_train_moments(tr, size, c, &both[c], &both[size + c]);
        result = df_net_set_scaling(ctx, tr->net, size, both, both + size);
    }
    dfi_scratch_release(ctx, mark);
    return result;
}

/* What weighting, density and variance need of each other. */
static df_result dfi_train_fits(df_ctx *ctx, const df_train_desc *d) {
    const df_process *p = &d->card.process;
    df_point end = df_process_at(p, 1);
    double cx, cp;
    int table = p->kind == DF_PROCESS_TABLE, index = d->density == DF_DENSITY_INDEX;
    if (index && !table)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_trainer_create: density INDEX is for tables, this is %s",
                        df_process_name(p));
    if (d->weighting >= DF_WEIGHT_LIKELIHOOD && d->density != DF_DENSITY_UNIFORM &&
        d->density != DF_DENSITY_LAMBDA)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_trainer_create: weightings LIKELIHOOD and SIGMOID are an "
                        "integral over t: they divide by its density, so want UNIFORM or "
                        "LAMBDA: INDEX has none, the normal ones pile up at the ends");
    if (!(d->vlb > 0)) return DF_OK;
    if (!table || !index || p->table_size < 2 || d->card.learned < DF_LEARNED_LOG_VARIANCE)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_trainer_create: vlb %g is for a table of two entries or more, "
                        "density INDEX and card.learned LOG_VARIANCE or RANGE", d->vlb);
    return df_plane_map(ctx, p, d->card.prediction, DF_X0, &end, &cx, &cp);
}

/* Where times are drawn from. t_min < 0 means 0 if all is finite there (velocity of flow),
   else the process's own end. Both ends are tried, so that a run cannot fail at its
   4,000th step. */
static df_result dfi_train_interval(df_trainer *tr) {
    df_ctx *ctx = tr->ctx;
    df_train_desc *d = &tr->desc;
    df_model model = df_net_model(tr->net);
    dfi_train_point p;
    model.process = d->card.process;
    model.input_sigma_data = d->card.input_sigma_data;
    df_result result = dfi_train_fits(ctx, d);
    if (result != DF_OK) return result;
    if (d->density == DF_DENSITY_INDEX) {
        d->t_min = 1.0 / model.process.table_size;
        d->t_max = 1;
    } else if (d->t_min < 0) {             /* a table's networks know no time below 1/T */
        int fine = model.process.kind != DF_PROCESS_TABLE &&
                   dfi_train_at(NULL, tr, &model, 0, &p) == DF_OK;
        d->t_min = fine ? 0 : df_process_t_min(&model.process);
    }
    if (d->t_min >= d->t_max && d->density != DF_DENSITY_INDEX)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "df_trainer_create: t_min %g is not below t_max %g", d->t_min,
                        d->t_max);
    tr->lambda[0] = df_process_at(&model.process, d->t_min).lambda;
    tr->lambda[1] = df_process_at(&model.process, d->t_max).lambda;
    for (int i = 0; i < 2; i++)
        if (dfi_train_at(ctx, tr, &model, i == 0 ? d->t_min : d->t_max, &p) != DF_OK)
            return dfi_fail(
                ctx, DF_ERR_SINGULAR,
                "df_trainer_create: %s = %g is out of reach for %s of process %s: %.300s",
                i == 0 ? "t_min" : "t_max", i == 0 ? d->t_min : d->t_max,
                df_prediction_name(d->card.prediction), df_process_name(&model.process),
                ctx->message);
    return DF_OK;
}

/* Two allocations, of numbers and of indices, cut into the arrays; the last ones go. */
static df_result dfi_train_arrays(df_trainer *tr) {
    size_t size = tr->net->size, rows = (size_t)tr->desc.rows, n = (size_t)tr->n;
    size_t values = dfi_mul(rows, (size_t)tr->dim);
    size_t others = dfi_mul(rows, 2 + (size_t)tr->net->condition);
    size_t arrays = tr->desc.objective != NULL ? 3 : 2;
    size_t reals = dfi_plus(dfi_mul(size, 3), dfi_plus(dfi_mul(values, arrays), others));
    dfi_delete(tr->ctx, tr->m, tr->reals_size);
    dfi_delete(tr->ctx, tr->order, tr->ints_size);
    tr->reals_size = dfi_mul(reals, sizeof(df_real));
    tr->ints_size = dfi_mul(dfi_mul(dfi_plus(n, rows), 2), sizeof(int));
    tr->m = (df_real *)dfi_new(tr->ctx, tr->reals_size);
    tr->order = (int *)dfi_new(tr->ctx, tr->ints_size);
    if (tr->m == NULL || tr->order == NULL) return DF_ERR_MEMORY;
    tr->v = tr->m + size;
    tr->grads = tr->v + size;
    tr->x = tr->grads + size;
    tr->target = tr->x + values;
    tr->t = tr->target + values;
    tr->w = tr->t + rows;
    tr->condition = tr->w + rows;
    tr->x0 = arrays > 2 ? tr->condition + rows * (size_t)tr->net->condition : NULL;
    tr->walk = tr->order + n;
    tr->rows = tr->walk + n;
    tr->row_labels = tr->rows + rows;
    tr->epoch = -1;
    for (int i = 0; i < tr->n; i++) tr->order[i] = i;
    dfi_shuffle(tr->desc.seed, 0, tr->n, tr->order);
    return DF_OK;
}

/* Bytes of step memory that the graph of `count` rows takes with its gradients, by making
   it once, in a context of its own. They depend on shapes alone. */
static df_result dfi_train_measure(df_trainer *tr, int count, size_t *bytes) {
    df_ctx *ctx = tr->ctx;
    df_ctx_desc d = df_ctx_defaults();
    double loss = 0;
    d.alloc = ctx->alloc;
    d.threads = 1;
    df_ctx *own = df_ctx_create(&d);
    if (own == NULL) return dfi_fail(ctx, DF_ERR_MEMORY, "no memory for a context");
    own->k = ctx->k;
    tr->ctx = own;
    df_result result = dfi_train_part(tr, 0, count, &loss);
    tr->ctx = ctx;
    if (result != DF_OK) dfi_fail(ctx, result, "%s", own->message);
    *bytes = 0;
    for (const dfi_block *b = own->first; b != NULL; b = b->next) {
        *bytes += b->used;
        if (b == own->block) break;
    }
    df_ctx_free(own);
    return result;
}

/* How many rows at once, and step memory for them: what one row takes, what one more does,
   and what operations hold while they run: columns of an image or scores of attention,
   panels of matrices (1 MiB of float a worker). */
static df_result dfi_train_rows(df_trainer *tr) {
    int batch = tr->desc.batch, rows = tr->desc.rows < batch ? tr->desc.rows : batch;
    size_t one = 0, two = 0, most = 1;
    tr->desc.rows = batch < 2 ? 1 : 2;
    df_result result = dfi_train_arrays(tr);
    if (result == DF_OK) result = dfi_train_measure(tr, 1, &one);
    if (result == DF_OK) result = dfi_train_measure(tr, tr->desc.rows, &two);
    if (result != DF_OK) return result;
    size_t more = two > one ? two - one : 1;
    if (one < DFI_TRAIN_BYTES) most += (DFI_TRAIN_BYTES - one) / more;
    if (rows == 0) {
        int parts = most < (size_t)batch ? (batch - 1) / (int)most + 1 : 1;
        rows = (batch - 1) / parts + 1;
    }
    tr->desc.rows = rows;
    size_t graph = dfi_plus(one, dfi_mul(more, (size_t)rows - 1));
    size_t passing = DFI_COLUMNS + ((size_t)tr->ctx->threads << 18);
    passing *= sizeof(df_real);
    tr->graph = dfi_plus(dfi_plus(graph, graph / 8), graph < passing ? graph : passing);
    return dfi_train_arrays(tr);
}

/* The average starts as the weights; without one a net must not keep an old one, which
   df_net_model would prefer. */
static df_result dfi_train_average(df_trainer *tr) {
    df_net *net = tr->net;
    size_t bytes = net->size * sizeof(df_real);
    if (!(tr->desc.ema > 0)) return DF_OK;
    net->average = (df_real *)dfi_net_copy(tr->ctx, net, net->weights, bytes);
    return net->average != NULL ? (df_result)DF_OK : (df_result)DF_ERR_MEMORY;
}

/* What a trainer writes into its net: card, scaling and average, freed. */
static void dfi_train_strip(df_net *net) {
    size_t bytes = net->size * sizeof(df_real);
    dfi_delete_by(&net->alloc, net->average, bytes);
    dfi_delete_by(&net->alloc, net->log_abar,
                  (size_t)net->card.process.table_size * sizeof(double));
    dfi_delete_by(&net->alloc, net->scaling,
                  2 * (size_t)net->scaling_size * sizeof(double));
}
/* ... of `from` instead. */
static void dfi_train_dress(df_net *net, const df_net *from) {
    net->average = from->average;
    net->card = from->card;
    net->log_abar = from->log_abar;
    net->scaling = from->scaling;
    net->scaling_size = from->scaling_size;
}

static df_result dfi_train_write(df_trainer *tr);
/* The rest of creation; on failure the caller frees, and the net is as it was. */
static df_result dfi_train_setup(df_trainer *tr) {
    df_net old = *tr->net, bare = old;
    df_result result = dfi_train_interval(tr);
    if (result != DF_OK) return result;
    tr->held = (int)(tr->desc.validation * tr->n);
    tr->kept = tr->n - tr->held;
    tr->validation = -1;
    bare.average = NULL, bare.log_abar = bare.scaling = NULL;
    bare.scaling_size = bare.card.process.table_size = 0;
    dfi_train_dress(tr->net, &bare);
    result = dfi_train_write(tr);
    dfi_train_strip(result == DF_OK ? &old : tr->net);
    if (result != DF_OK) dfi_train_dress(tr->net, &old);
    return result;
}
static df_result dfi_train_write(df_trainer *tr) {
    df_result result = df_net_set_card(tr->ctx, tr->net, &tr->desc.card);
    if (result == DF_OK) tr->desc.card = tr->net->card; /* the net's own copy of a table */
    if (result == DF_OK) result = dfi_train_scaling(tr);
    if (result == DF_OK) result = dfi_train_rows(tr);
    if (result == DF_OK) result = dfi_train_average(tr);
    if (result == DF_OK) tr->net->sealed = 1;
    return result;
}

DF_API df_trainer *df_trainer_create(df_ctx *ctx, df_net *net, const df_real *data, int n,
                                     const int *labels, const df_train_desc *desc) {
    df_train_desc d = df_train_defaults();
    if (ctx == NULL || dfi_net_missing(ctx, net, "df_trainer_create")) return NULL;
    if (desc != NULL) d = *desc;
    if (d.cookie != DFI_COOKIE || data == NULL || n < 1 || df_net_trained(net) == 0) {
        dfi_fail(ctx, DF_ERR_ARGUMENT,
                 "df_trainer_create: wants a descriptor that df_train_defaults made, a "
                 "net with parameters to train and at least one row of data (here %d)",
                 n);
        return NULL;
    }
    if (dfi_train_ranges(ctx, &d) || dfi_card_check(ctx, &d.card) ||
        dfi_train_check_data(ctx, net, data, n, labels, &d))
        return NULL;
    df_trainer *tr = (df_trainer *)dfi_new(ctx, sizeof *tr);
    if (tr == NULL) return NULL;
    tr->ctx = ctx;
    tr->net = net;
    tr->desc = d;
    tr->data = data;
    tr->labels = labels;
    tr->n = n;
    tr->dim = net->dim;
    if (dfi_train_setup(tr) != DF_OK) {
        df_trainer_free(tr);
        return NULL;
    }
    return tr;
}

DF_API void df_trainer_free(df_trainer *tr) {
    if (tr == NULL) return;
    dfi_delete(tr->ctx, tr->m, tr->reals_size);
    dfi_delete(tr->ctx, tr->order, tr->ints_size);
    dfi_delete(tr->ctx, tr, sizeof *tr);
}

/* ---- the run ----------------------------------------------------------------------- */

/* Seconds since some moment, by the best clock that the compiler's dialect shows. */
static double dfi_train_clock(void) {
#if defined(TIME_UTC)
    struct timespec now;
    if (timespec_get(&now, TIME_UTC) != TIME_UTC) return 0;
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
#else
    return (double)time(NULL);
#endif
}

/* Held-out rows by the same density and weighting, with draws of their own that are the
   same every time; the average, if any. In parts, so memory is bounded. */
DF_API df_result df_trainer_validate(df_trainer *tr, double *loss) {
    if (tr == NULL || loss == NULL) return DF_ERR_ARGUMENT;
    df_ctx *ctx = tr->ctx;
    double sum = 0;
    if (tr->held == 0)
        return dfi_fail(ctx, DF_ERR_UNSUPPORTED,
                        "df_trainer_validate: no row is held out: validation %g of %d",
                        tr->desc.validation, tr->n);
    if (dfi_train_ready(tr, "df_trainer_validate") != DF_OK) return ctx->code;
    for (int at = 0; at < tr->held; at += tr->desc.rows) {
        int count = tr->held - at < tr->desc.rows ? tr->held - at : tr->desc.rows;
        df_result result = dfi_batch_fill(tr, at, DFI_DRAW_HELD, count);
        if (result != DF_OK) return result;
        df_run run = df_run_defaults(ctx, tr->net);
        df_scope mark = dfi_scratch_mark(ctx);
        df_tensor *graph = dfi_batch_loss(tr, run, count, at, DFI_DRAW_HELD);
        if (graph != NULL) sum += (double)graph->data[0] * count;
        dfi_scratch_release(ctx, mark);
        if (dfi_train_unstick(ctx) != DF_OK) return ctx->code;
    }
    *loss = sum / tr->held;
    if (dfi_nonfinite(*loss))
        return dfi_fail(ctx, DF_ERR_NONFINITE,
                        "df_trainer_validate: the held-out loss is %s after step %.0f",
                        dfi_nonfinite_name(*loss), (double)tr->step);
    return DF_OK;
}

DF_API df_result df_trainer_info(const df_trainer *tr, df_train_info *info) {
    if (tr == NULL || info == NULL) return DF_ERR_ARGUMENT;
    double done = (double)(tr->step - tr->started_at);
    double elapsed = done > 0 ? dfi_train_clock() - tr->started : 0;
    info->step = tr->step;
    info->steps = tr->desc.steps;
    info->loss = tr->loss_count > 0 ? tr->loss_sum / (double)tr->loss_count : tr->loss;
    info->validation = tr->validation;
    info->gradient_norm = tr->norm;
    info->learning_rate = tr->rate;
    info->memory = sizeof *tr + tr->reals_size + tr->ints_size + tr->graph;
    info->memory += tr->net->capacity * sizeof(df_real);
    if (tr->net->average != NULL) info->memory += tr->net->size * sizeof(df_real);
    info->seconds_left =
        elapsed > 0 ? elapsed * (double)(info->steps - info->step) / done : -1;
    info->rows_per_second = elapsed > 0 ? done * tr->desc.batch / elapsed : 0;
    return DF_OK;
}

/* What happens between steps: validation, report. The counters are reset before the
   callback, so that a trainer saved inside it resumes exactly. */
static df_result dfi_train_between(df_trainer *tr) {
    const df_train_desc *d = &tr->desc;
    int last = tr->step == d->steps;
    if (tr->held > 0 && d->validate_every > 0 &&
        (last || tr->step % d->validate_every == 0)) {
        df_result result = df_trainer_validate(tr, &tr->validation);
        if (result != DF_OK) return result;
    }
    if (!last && tr->step % d->report != 0) return DF_OK;
    df_train_info info;
    df_trainer_info(tr, &info);
    tr->loss = info.loss;
    tr->loss_sum = 0;
    tr->loss_count = 0;
    return dfi_train_answer(tr, "on_step",
                            d->on_step != NULL ? d->on_step(d->user, &info) : 0);
}

DF_API df_result df_trainer_run(df_trainer *tr, int64_t steps) {
    if (tr == NULL) return DF_ERR_ARGUMENT;
    int64_t left = tr->desc.steps - tr->step;
    int64_t end = tr->step + (steps <= 0 || steps > left ? left : steps);
    tr->started = dfi_train_clock();
    tr->started_at = tr->step;
    while (tr->step < end) {
        df_result result = dfi_train_ready(tr, "df_trainer_run"); /* also after on_step */
        if (result == DF_OK) result = dfi_train_step(tr);
        if (result == DF_OK) result = dfi_train_between(tr);
        if (result != DF_OK) return result;
    }
    return DF_OK;
}

/* ---- saving and resuming ----------------------------------------------------------- */

/* FNV-1a over the bytes of data, labels and condition: enough to notice another array. */
static uint64_t dfi_fnv(uint64_t hash, const void *data, size_t size) {
    const unsigned char *bytes = (const unsigned char *)data;
    for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

static uint64_t dfi_train_digest(const df_trainer *tr) {
    uint64_t hash = dfi_fnv(0xcbf29ce484222325u, tr->data,
                            (size_t)tr->n * (size_t)tr->dim * sizeof(df_real));
    if (tr->labels != NULL) hash = dfi_fnv(hash, tr->labels, (size_t)tr->n * sizeof(int));
    if (tr->desc.condition != NULL)
        hash = dfi_fnv(hash, tr->desc.condition,
                       (size_t)tr->n * (size_t)tr->net->condition * sizeof(df_real));
    return hash;
}

/* Everything that the course of training depends on besides net and card, readable. */
static void dfi_train_texts(const df_trainer *tr, dfi_texts *s) {
    const df_train_desc *d = &tr->desc;
    dfi_text_add(s, "train.data", "%s %d x %d %016llx", DF_REAL_NAME, tr->n, tr->dim,
                 (unsigned long long)dfi_train_digest(tr));
    dfi_text_add(
        s, "train.settings",
        "batch %d rows %d parts %d steps %.0f learning_rate %.17g warmup %.0f final_rate "
        "%.17g betas %.17g %.17g eps %.17g weight_decay %.17g clip %.17g ema %.17g %d "
        "seed %llu frozen %.0f",
        d->batch, d->rows, d->parts, (double)d->steps, d->learning_rate,
        (double)d->warmup, d->final_rate, d->beta1, d->beta2, d->adam_eps, d->weight_decay,
        d->clip, d->ema, d->ema_warmup, (unsigned long long)d->seed,
        (double)(tr->net->size - df_net_trained(tr->net)));
    dfi_text_add(s, "train.loss",
                 "weighting %d %.17g density %d %.17g %.17g t %.17g %.17g scaling %d "
                 "validation %.17g %.0f label_dropout %.17g flip %.17g objective %d "
                 "p2 %.17g sigmoid %.17g vlb %.17g",
                 (int)d->weighting, d->snr_gamma, (int)d->density, d->density_mean,
                 d->density_std, d->t_min, d->t_max, (int)d->scaling, d->validation,
                 (double)d->validate_every, d->label_dropout, d->flip,
                 d->objective != NULL, d->p2_gamma, d->sigmoid_bias, d->vlb);
}

DF_API df_result df_trainer_save(df_trainer *tr, df_sink sink) {
    if (tr == NULL) return DF_ERR_ARGUMENT;
    df_ctx *ctx = tr->ctx;
    df_save_tensor moments[2];
    df_result result = dfi_net_finite(ctx, tr->net, "df_trainer_save");
    int size = (int)tr->net->size;
    if (result != DF_OK) return result;
    dfi_save_add(&moments[0], "adam.m", 1, &size, tr->m, 0);
    dfi_save_add(&moments[1], "adam.v", 1, &size, tr->v, 0);
    df_scope mark = dfi_scratch_mark(ctx);
    dfi_texts *s = dfi_texts_new(ctx);
    result = DF_ERR_MEMORY;
    if (s != NULL) {
        dfi_train_texts(tr, s);
        dfi_text_add(s, "train.state", "%.0f %.17g %.0f %.17g %.17g %.17g %.17g",
                     (double)tr->step, tr->loss_sum, (double)tr->loss_count, tr->loss,
                     tr->validation, tr->norm, tr->rate);
        result = dfi_net_write(ctx, tr->net, sink, s, moments, 2);
    }
    dfi_scratch_release(ctx, mark);
    return result;
}

/* The strings that this trainer would write must be those of the file. */
static df_result dfi_train_same(const dfi_net_file *f, const df_trainer *tr) {
    dfi_texts *s = dfi_texts_new(f->ctx);
    if (s == NULL) return DF_ERR_MEMORY;
    dfi_train_texts(tr, s);
    dfi_net_texts(tr->net, s);
    for (int i = 0; i < s->count; i++) {
        const char *theirs = dfi_net_text(f, s->item[i].key), *mine = s->item[i].value;
        if (theirs == NULL) return f->ctx->code;
        if (strcmp(theirs, mine) != 0)
            return dfi_fail(f->ctx, DF_ERR_FORMAT,
                            "%s: %.64s: '%s' differs, so this run would not go on as that "
                            "one: the file has '%.180s', the trainer '%.180s'",
                            f->function, f->name, s->item[i].key, theirs, mine);
    }
    return DF_OK;
}

static df_result dfi_train_read(const dfi_net_file *f, df_trainer *tr) {
    double state[7];
    df_result result = dfi_train_same(f, tr);
    if (result != DF_OK) return result;
    if (dfi_net_numbers(f, "train.state", 7, 7, state) < 0) return f->ctx->code;
    if (state[0] < 0 || state[0] > (double)tr->desc.steps || state[0] != floor(state[0]) ||
        state[2] < 0 || state[2] > state[0] || state[2] != floor(state[2]))
        return dfi_net_bad(f, "train.state", "among the metadata has a step out of range");
    df_net *loaded = dfi_net_read(f, tr->net);
    if (loaded == NULL) return f->ctx->code;
    /* the strings agree; so must the arrays that follow from data and descriptor */
    const df_net *net = tr->net;
    size_t table = (size_t)net->card.process.table_size * sizeof(double);
    size_t scaling = 2 * (size_t)net->scaling_size * sizeof(double);
    if (loaded->card.process.table_size != net->card.process.table_size ||
        loaded->scaling_size != net->scaling_size ||
        (table > 0 && memcmp(loaded->log_abar, net->log_abar, table) != 0) ||
        (scaling > 0 && memcmp(loaded->scaling, net->scaling, scaling) != 0))
        result = dfi_net_bad(f, "data.mean", "or a table is not the trainer's");
    int size = (int)tr->net->size;
    df_real *moments =
        (df_real *)dfi_scratch(f->ctx, dfi_mul(2 * (size_t)size, sizeof(df_real)));
    if (moments == NULL) result = DF_ERR_MEMORY;
    for (int i = 0; result == DF_OK && i < 2; i++)
        result = df_safetensors_read(f->ctx, f->file, i ? "adam.v" : "adam.m", 1, &size,
                                     moments + (size_t)i * (size_t)size);
    for (int i = 0; result == DF_OK && i < size; i++)
        if (moments[size + i] < 0)
            result = dfi_net_bad(f, "adam.v", "holds a negative square");
    if (result != DF_OK) {
        df_net_free(loaded);
        return result;
    }
    memcpy(tr->m, moments, 2 * (size_t)size * sizeof(df_real)); /* v stands behind m */
    dfi_net_take(tr->net, loaded);
    tr->desc.card = tr->net->card;
    tr->step = (int64_t)state[0];
    tr->loss_sum = state[1];
    tr->loss_count = (int64_t)state[2];
    tr->loss = state[3];
    tr->validation = state[4];
    tr->norm = state[5];
    tr->rate = state[6];
    return DF_OK;
}

DF_API df_result df_trainer_load(df_trainer *tr, df_source source) {
    if (tr == NULL) return DF_ERR_ARGUMENT;
    df_ctx *ctx = tr->ctx;
    dfi_net_file f = dfi_net_open(ctx, "df_trainer_load", source);
    if (f.file == NULL) return ctx->code;
    df_scope mark = dfi_scratch_mark(ctx);
    df_result result = dfi_train_read(&f, tr);
    dfi_scratch_release(ctx, mark);
    df_safetensors_close(f.file);
    return result;
}

/* =====================================================================================
   // >>relatives: autoencoders and flows, what diffusion is compared with

   Three other ways to a density. A variational autoencoder learns both directions, an
   encoder q(z|x) and a decoder p(x|z), by a bound (Kingma & Welling 2014):

       log p(x) >= E_q [log p(x|z)] - KL(q(z|x) || p(z)),

   which is short of log p(x) by KL(q(z|x) || p(z|x)): as far as the encoder misses the
   decoder's posterior. Diffusion is the hierarchy of T such levels whose encoder is not
   learned: noise is added, so that each posterior p(z_{i-1}|z_i) tends to a Gaussian as T
   grows, which is what a decoder can say. A VAE is diffusion with T = 1.

   A normalising flow is invertible by its make, so that the change of variables

       log p(x) = log N(f(x); 0, 1) + log |det df/dx|

   is exact and can be trained on: the price is paid in the architecture. A neural ODE pays
   in time: any net, but each step of training solves the ODE. Flow matching trains the
   same model without solving it (`>>training`).
   ===================================================================================== */

/* Draws of sampling; those of training come from df_batch_normal. */
#define DFI_DRAW_RELATIVE 0x93000000u

enum { DFI_RELATIVE_WIDTH, DFI_RELATIVE_DEPTH, DFI_RELATIVE_LAYERS, DFI_VAE_LATENT };

/* depth times SiLU(W h + b), then W h + b; its parameters are "name.i.k". */
static df_tensor *dfi_perceptron(dfi_pass *w, const char *name, int i, df_tensor *h,
                                 int in, int out, df_init last) {
    int width = w->net->config[DFI_RELATIVE_WIDTH];
    int depth = w->net->config[DFI_RELATIVE_DEPTH];
    for (int k = 0; k < depth; k++) {
        dfi_pass_into(w, name, i, k);
        h = dfi_pass_linear(w, "", h, k > 0 ? width : in, width, DF_INIT_FAN_IN);
        h = df_silu(w->ctx, h);
    }
    dfi_pass_into(w, name, i, depth);
    h = dfi_pass_linear(w, "", h, depth > 0 ? width : in, out, last);
    dfi_pass_into(w, "", 0, 0);
    return h;
}
/* Perceptrons stand one after the other: the pass goes to number j. */
static void dfi_perceptron_seek(dfi_pass *w, int j) {
    w->at = j * 2 * (w->net->config[DFI_RELATIVE_DEPTH] + 1);
}

/* log N(x; mean, e^lv) of each row, [B]; NULL: mean 0, variance 1. */
static df_tensor *dfi_normal_log(df_ctx *ctx, df_tensor *x, df_tensor *mean,
                                 df_tensor *lv) {
    if (dfi_stuck(ctx) != DF_OK || x == NULL) return NULL;
    df_tensor *e = df_square(ctx, mean != NULL ? df_sub(ctx, x, mean) : x);
    if (lv != NULL)
        e = df_add(ctx, df_mul(ctx, e, df_exp(ctx, df_scale(ctx, lv, -1))), lv);
    return df_affine(ctx, df_sum_axis(ctx, e, 1, 0), -0.5,
                     -0.5 * log(2 * DFI_PI) * x->shape[1]);
}
/* mean + e^(lv/2) noise */
static df_tensor *dfi_normal_draw(df_ctx *ctx, df_tensor *mean, df_tensor *lv,
                                  df_tensor *noise) {
    df_tensor *deviation = df_exp(ctx, df_scale(ctx, lv, 0.5));
    return df_add(ctx, mean, df_mul(ctx, deviation, noise));
}
static df_tensor *dfi_mean_loss(df_ctx *ctx, df_tensor *log_density) {
    return df_scale(ctx, df_mean(ctx, log_density), -1);
}

/* Is it a run of such a net, about rows of so many numbers? Else the tensors stick. */
static int dfi_relative_ok(const df_run *run, const char *who, const char *kind,
                           const df_tensor *x, int width) {
    if (dfi_blocked(run->ctx, who, x, x)) return 0;
    if (strcmp(run->net->kind, kind) == 0 && x->ndim == 2 && x->shape[1] == width)
        return 1;
    dfi_fail_tensor(run->ctx, DF_ERR_SHAPE,
                    "%s: wants a net of kind '%s' and [B, %d]; net '%s', %d axes, %d", who,
                    kind, width, run->net->kind, x->ndim, x->shape[1]);
    return 0;
}

/* What samples are drawn from: N(0, 1) [rows, width] of one draw. */
typedef struct dfi_relative {
    uint64_t seed, first;
    int rows;
} dfi_relative;
typedef df_tensor *(*dfi_relative_draw)(const df_run *run, const dfi_relative *s);
static df_tensor *dfi_relative_normal(df_ctx *ctx, const dfi_relative *s, int draw,
                                      int width) {
    return dfi_normal_rows(ctx, s->seed, s->first, 1, DFI_DRAW_RELATIVE + (uint32_t)draw,
                           s->rows, width);
}

/* Samples by `draw`, in parts of net->rows, with the data's scaling undone. */
static df_result dfi_relative_sample(df_ctx *ctx, const df_net *net, const char *who,
                                     const char *kind, dfi_relative s, int n,
                                     df_real *out, dfi_relative_draw draw) {
    df_result result = dfi_net_missing(ctx, net, who);
    if (ctx == NULL || result != DF_OK) return DF_ERR_ARGUMENT;
    if (dfi_stuck(ctx) != DF_OK) return ctx->code;
    if (strcmp(net->kind, kind) != 0 || n < 1 || out == NULL)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "%s: n = %d, out %s, net '%s': wants one of kind '%s'", who, n,
                        out != NULL ? "given" : "NULL", net->kind, kind);
    df_run run = df_run_defaults(ctx, net);
    df_model scaled = df_net_model(net);
    for (int at = 0; at < n && result == DF_OK; at += net->rows) {
        df_real *to = out + (size_t)at * (size_t)net->dim;
        df_scope mark = dfi_scratch_mark(ctx);
        s.rows = n - at < net->rows ? n - at : net->rows;
        df_tensor *x = draw(&run, &s);
        s.first += (uint64_t)s.rows;
        if (x != NULL) memcpy(to, x->data, x->size * sizeof *to);
        if (x != NULL) dfi_rescale(&scaled, x->size, to, 1);
        result = dfi_stuck(ctx);
        ctx->stuck = DF_OK; /* it stuck here: not the user's tensors */
        dfi_scratch_release(ctx, mark);
    }
    if (result != DF_OK) return result;
    return dfi_rows_finite(ctx, who, "sample", (size_t)n, (size_t)net->dim, out);
}

/* What both kinds check: a sample of one axis, numbers in their range. */
static df_result dfi_relative_check(df_ctx *ctx, df_net *net, int least, int most,
                                    const char *number) {
    const int *c = net->config;
    if (net->ndim != 1 || net->dim < least || net->dim > 1 << 20 || net->classes != 0 ||
        net->condition != 0 || c[0] < 1 || c[0] > 1 << 16 || c[1] < 0 || c[1] > 64 ||
        c[2] < 1 || c[2] > most || dfi_nonfinite(net->number[0]) ||
        net->number[0] < 0 || net->number[0] > 1e6)
        return dfi_fail(ctx, DF_ERR_ARGUMENT,
                        "%s: dim %d, width %d, depth %d, levels or layers %d, %s %g: want "
                        "dim in [%d, 2^20], width in [1, 65536], depth in [0, 64], levels "
                        "or layers in [1, %d], the last in [0, 1e6]; no classes, no "
                        "condition",
                        net->kind, net->dim, c[0], c[1], c[2], number, net->number[0],
                        least, most);
    net->rows = dfi_net_rows(2 * fmax(net->dim, c[0]));
    return DF_OK;
}

/* ---- autoencoders ------------------------------------------------------------------ */

/* Perceptron j: up from x to z_L, j = 0 .. L-1 is q(z_i|z_{i-1}), i = j + 1; then down,
   j = L .. 2L-1 is p(z_{i-1}|z_i), i = 2L - j. Mean and log variance. */
static df_tensor *dfi_vae_map(dfi_pass *w, int j, df_tensor *h, df_tensor **lv) {
    const int *latent = w->net->config + DFI_VAE_LATENT;
    int levels = w->net->config[DFI_RELATIVE_LAYERS], up = j < levels;
    int i = up ? j + 1 : 2 * levels - j, last = j == 2 * levels - 1;
    int above = latent[i - 1], below = i > 1 ? latent[i - 2] : w->net->dim;
    int in = up ? below : above, out = up ? above : below;
    double fixed = w->net->number[0];
    dfi_perceptron_seek(w, j);
    h = dfi_perceptron(w, up ? "enc.%d.%d" : "dec.%d.%d", i, h, in, last ? out : 2 * out,
                       DF_INIT_FAN_IN);
    *lv = NULL;
    if (!last) {
        *lv = df_slice(w->ctx, h, 1, out, out);
        return df_slice(w->ctx, h, 1, 0, out);
    }
    int row = fixed > 0 ? 0 : dfi_pass_layer(w, "dec.log_variance", 1, 0, DFI_PASS_ROW,
                                             DF_INIT_ONE);
    if (!(fixed > 0)) dfi_pass_scale(w, row, -2);
    if (h == NULL) return NULL;
    *lv = fixed > 0 ? df_tensor_number(w->ctx, 2 * log(fixed)) : df_run_param(w->run, row);
    *lv = df_broadcast(w->ctx, *lv, 2, h->shape);
    return h;
}
static df_tensor *dfi_vae_walk(dfi_pass *w, df_tensor *x, df_tensor *t,
                               const int *labels) {
    df_tensor *lv;
    (void)t, (void)labels;
    for (int j = 0; j < 2 * w->net->config[DFI_RELATIVE_LAYERS]; j++)
        x = dfi_vae_map(w, j, x, &lv);
    return x;
}
static df_result dfi_vae_configure(df_ctx *ctx, df_net *net) {
    df_result result = dfi_relative_check(ctx, net, 1, DF_VAE_LEVELS, "deviation");
    for (int i = 0; result == DF_OK && i < net->config[DFI_RELATIVE_LAYERS]; i++)
        if (net->config[DFI_VAE_LATENT + i] < 1 ||
            net->config[DFI_VAE_LATENT + i] > 1 << 20)
            result = dfi_fail(ctx, DF_ERR_ARGUMENT,
                              "vae: latent[%d] is %d, want 1 to 2^20", i,
                              net->config[DFI_VAE_LATENT + i]);
    return result;
}

DF_API df_vae_desc df_vae_defaults(void) {
    df_vae_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.dim = 2, d.width = 128, d.depth = 2, d.levels = 1;
    for (int i = 0; i < DF_VAE_LEVELS; i++) d.latent[i] = 2;
    return d;
}

DF_API int df_vae_latents(const df_net *net) {
    int sum = 0;
    if (strcmp(net->kind, "vae") != 0) return 0;
    for (int i = 0; i < net->config[DFI_RELATIVE_LAYERS]; i++)
        sum += net->config[DFI_VAE_LATENT + i];
    return sum;
}

/* Up or down at a level, as the public functions ask for it. */
static df_tensor *dfi_vae_ask(const df_run *run, const char *who, int up, int level,
                              df_tensor *h, df_tensor **lv) {
    const int *latent = run->net->config + DFI_VAE_LATENT;
    int levels = run->net->config[DFI_RELATIVE_LAYERS];
    df_tensor *own;
    dfi_pass w = dfi_pass_run(run);
    if (lv != NULL) *lv = NULL;
    if (df_vae_latents(run->net) > 0 && (level < 1 || level > levels))
        return dfi_fail_tensor(run->ctx, DF_ERR_ARGUMENT, "%s: level %d, want 1 to %d",
                               who, level, levels);
    int i = df_vae_latents(run->net) > 0 ? level - up : 0;
    if (!dfi_relative_ok(run, who, "vae", h, i > 0 ? latent[i - 1] : run->net->dim))
        return NULL;
    return dfi_vae_map(&w, up ? level - 1 : 2 * levels - level, h, lv != NULL ? lv : &own);
}
DF_API df_tensor *df_vae_encode(const df_run *run, int level, df_tensor *below,
                                df_tensor **log_variance) {
    return dfi_vae_ask(run, "df_vae_encode", 1, level, below, log_variance);
}
DF_API df_tensor *df_vae_decode(const df_run *run, int level, df_tensor *above,
                                df_tensor **log_variance) {
    return dfi_vae_ask(run, "df_vae_decode", 0, level, above, log_variance);
}

/* Level by level up; each z_i, once drawn, is asked how well p(z_{i-1}|z_i) knows what is
   below. The entropy of q is sum (lv + 1 + log 2 pi)/2, the top's KL to N(0, 1) is
   sum (mean^2 + e^lv - lv - 1)/2. */
DF_API df_tensor *df_vae_elbo(const df_run *run, df_tensor *x, df_tensor *noise,
                              df_tensor **parts) {
    df_ctx *ctx = run->ctx;
    const int *latent = run->net->config + DFI_VAE_LATENT, column[2] = {-1, 1};
    int levels = run->net->config[DFI_RELATIVE_LAYERS], drawn = df_vae_latents(run->net);
    df_tensor *all = NULL, *under = x, *cost = NULL, *elbo = NULL, *lv, *plv;
    dfi_pass w = dfi_pass_run(run);
    if (parts != NULL) *parts = NULL;
    if (!dfi_relative_ok(run, "df_vae_elbo", "vae", x, run->net->dim) ||
        !dfi_relative_ok(run, "df_vae_elbo", "vae", noise, drawn))
        return NULL;
    for (int i = 1, at = 0; i <= levels; at += latent[i++ - 1]) {
        int m = latent[i - 1];
        df_tensor *mean = dfi_vae_map(&w, i - 1, under, &lv);
        df_tensor *z = dfi_normal_draw(ctx, mean, lv, df_slice(ctx, noise, 1, at, m));
        df_tensor *guess = dfi_vae_map(&w, 2 * levels - i, z, &plv);
        df_tensor *known = dfi_normal_log(ctx, under, guess, plv);
        df_tensor *part = i == 1 ? known : df_sub(ctx, cost, known);
        elbo = i == 1 ? known : df_sub(ctx, elbo, part);
        part = df_reshape(ctx, part, 2, column);
        all = all == NULL ? part : df_concat(ctx, all, part, 1);
        cost = df_scale(ctx, lv, -1);
        if (i == levels)
            cost = df_add(ctx, df_add(ctx, cost, df_exp(ctx, lv)), df_square(ctx, mean));
        cost = df_affine(ctx, df_sum_axis(ctx, cost, 1, 0), 0.5,
                         -0.5 * m * (i == levels ? 1 : 1 + log(2 * DFI_PI)));
        under = z;
    }
    if (parts != NULL) *parts = df_concat(ctx, all, df_reshape(ctx, cost, 2, column), 1);
    return df_sub(ctx, elbo, cost);
}
DF_API df_tensor *df_objective_elbo(void *self, const df_run *run, const df_batch *batch) {
    int latents = df_vae_latents(run->net);
    df_tensor *noise = df_batch_normal(run, batch, 0, latents > 0 ? latents : 1);
    (void)self;
    return dfi_mean_loss(run->ctx, df_vae_elbo(run, batch->x0, noise, NULL));
}

static df_tensor *dfi_vae_draw(const df_run *run, const dfi_relative *s) {
    int levels = run->net->config[DFI_RELATIVE_LAYERS];
    int top = run->net->config[DFI_VAE_LATENT + levels - 1];
    dfi_pass w = dfi_pass_run(run);
    df_tensor *lv, *mean, *z = dfi_relative_normal(run->ctx, s, levels, top);
    for (int i = levels; i >= 1; i--) {
        if ((mean = dfi_vae_map(&w, 2 * levels - i, z, &lv)) == NULL) return NULL;
        z = dfi_relative_normal(run->ctx, s, i - 1, mean->shape[1]);
        z = dfi_normal_draw(run->ctx, mean, lv, z);
    }
    return z;
}
DF_API df_result df_vae_sample(df_ctx *ctx, const df_net *net, uint64_t seed,
                               uint64_t first, int n, df_real *out) {
    dfi_relative s = {seed, first, 0};
    return dfi_relative_sample(ctx, net, "df_vae_sample", "vae", s, n, out, dfi_vae_draw);
}

/* ---- coupling flows ---------------------------------------------------------------- */

/* Layer l: of even ones the second half moves, of odd ones the first. log_det (or NULL) is
   added to, NULL inside it is 0. */
static df_tensor *dfi_coupling_layer(dfi_pass *w, int l, df_tensor *x, int inverse,
                                     df_tensor **log_det) {
    df_ctx *c = w->ctx;
    int dim = w->net->dim, half = dim / 2, odd = l % 2;
    int kept = odd ? dim - half : half, moved = dim - kept;
    df_tensor *a = df_slice(c, x, 1, odd ? half : 0, kept);
    df_tensor *b = df_slice(c, x, 1, odd ? 0 : half, moved);
    dfi_perceptron_seek(w, l);
    df_tensor *h = dfi_perceptron(w, "layer.%d.%d", l, a, kept, 2 * moved, DF_INIT_ZERO);
    df_tensor *s = df_tanh(c, df_slice(c, h, 1, 0, moved));
    df_tensor *t = df_slice(c, h, 1, moved, moved);
    s = df_scale(c, s, w->net->number[0]);
    b = inverse ? df_mul(c, df_sub(c, b, t), df_exp(c, df_scale(c, s, -1)))
                : df_add(c, df_mul(c, b, df_exp(c, s)), t);
    if (log_det != NULL) {
        df_tensor *sum = df_sum_axis(c, s, 1, 0);
        *log_det = *log_det != NULL ? df_add(c, *log_det, sum) : sum;
    }
    return odd ? df_concat(c, b, a, 1) : df_concat(c, a, b, 1);
}
static df_tensor *dfi_coupling_through(dfi_pass *w, df_tensor *x, df_tensor **log_det) {
    for (int l = 0; l < w->net->config[DFI_RELATIVE_LAYERS]; l++)
        x = dfi_coupling_layer(w, l, x, 0, log_det);
    return x;
}
static df_tensor *dfi_coupling_walk(dfi_pass *w, df_tensor *x, df_tensor *t,
                                    const int *labels) {
    (void)t, (void)labels;
    return dfi_coupling_through(w, x, NULL);
}
static df_result dfi_coupling_configure(df_ctx *ctx, df_net *net) {
    return dfi_relative_check(ctx, net, 2, 1024, "scale");
}

DF_API df_coupling_desc df_coupling_defaults(void) {
    df_coupling_desc d;
    memset(&d, 0, sizeof d);
    d.cookie = DFI_COOKIE;
    d.dim = 2, d.width = 128, d.depth = 2, d.layers = 8, d.scale = 2;
    return d;
}

DF_API df_tensor *df_coupling_log_density(const df_run *run, df_tensor *x) {
    df_tensor *log_det = NULL;
    dfi_pass w = dfi_pass_run(run);
    if (!dfi_relative_ok(run, "df_coupling_log_density", "coupling", x, run->net->dim))
        return NULL;
    df_tensor *z = dfi_coupling_through(&w, x, &log_det);
    return df_add(run->ctx, dfi_normal_log(run->ctx, z, NULL, NULL), log_det);
}
DF_API df_tensor *df_coupling_inverse(const df_run *run, df_tensor *z) {
    dfi_pass w = dfi_pass_run(run);
    if (!dfi_relative_ok(run, "df_coupling_inverse", "coupling", z, run->net->dim))
        return NULL;
    df_scope scope = df_scope_begin(run->ctx); /* ended after each layer */
    for (int l = run->net->config[DFI_RELATIVE_LAYERS] - 1; l >= 0; l--)
        z = df_scope_end(run->ctx, scope, dfi_coupling_layer(&w, l, z, 1, NULL));
    return z;
}
DF_API df_tensor *df_objective_flow_likelihood(void *self, const df_run *run,
                                               const df_batch *batch) {
    (void)self;
    return dfi_mean_loss(run->ctx, df_coupling_log_density(run, batch->x0));
}

static df_tensor *dfi_coupling_draw(const df_run *run, const dfi_relative *s) {
    return df_coupling_inverse(run, dfi_relative_normal(run->ctx, s, 0, run->net->dim));
}
DF_API df_result df_coupling_sample(df_ctx *ctx, const df_net *net, uint64_t seed,
                                    uint64_t first, int n, df_real *out) {
    dfi_relative s = {seed, first, 0};
    return dfi_relative_sample(ctx, net, "df_coupling_sample", "coupling", s, n, out,
                               dfi_coupling_draw);
}

/* ---- the neural ODE ---------------------------------------------------------------- */

/* d/dt of (x, integral of div v): s [B, dim + 1]. */
typedef struct dfi_node {
    const df_run *run;
    const int *labels;
    df_tensor *probe;
} dfi_node;
static df_tensor *dfi_node_rate(const dfi_node *f, df_tensor *s, double t) {
    df_ctx *ctx = f->run->ctx;
    const df_net *net = f->run->net;
    const df_process *p = &net->card.process;
    int shape[4] = {-1, 0, 0, 0}, flat[2] = {-1, net->dim}, column[2] = {-1, 1};
    df_point at = df_process_at(p, t);
    double native, clock, rate;
    df_tensor *v = NULL;
    if (dfi_stuck(ctx) != DF_OK || s == NULL) return NULL;
    if (df_time_at(ctx, p, &net->card.time, &at, &native, NULL) != DF_OK ||
        df_time_at(ctx, p, &net->card.clock, &at, &clock, &rate) != DF_OK)
        return dfi_stick(ctx);
    for (int i = 0; i < net->ndim; i++) shape[i + 1] = net->shape[i];
    df_tensor *x = df_reshape(ctx, df_slice(ctx, s, 1, 0, net->dim), net->ndim + 1, shape);
    df_tensor *time = df_tensor_fill(ctx, 1, s->shape, native);
    df_tensor *div = df_run_divergence(f->run, x, time, f->labels, f->probe, &v);
    v = df_concat(ctx, df_reshape(ctx, v, 2, flat), df_reshape(ctx, div, 2, column), 1);
    return df_scale(ctx, v, rate);
}
/* s + h k */
static df_tensor *dfi_node_move(df_ctx *ctx, df_tensor *s, double h, df_tensor *k) {
    return df_add(ctx, s, df_scale(ctx, k, h));
}
static df_tensor *dfi_node_step(const dfi_node *f, df_tensor *s, double t, double h) {
    df_ctx *ctx = f->run->ctx;
    df_tensor *k1 = dfi_node_rate(f, s, t);
    df_tensor *k2 = dfi_node_rate(f, dfi_node_move(ctx, s, h / 2, k1), t + h / 2);
    df_tensor *k3 = dfi_node_rate(f, dfi_node_move(ctx, s, h / 2, k2), t + h / 2);
    df_tensor *k4 = dfi_node_rate(f, dfi_node_move(ctx, s, h, k3), t + h);
    df_tensor *inner = df_add(ctx, k2, k3), *outer = df_add(ctx, k1, k4);
    return dfi_node_move(ctx, s, h / 6, dfi_node_move(ctx, outer, 2, inner));
}

DF_API df_tensor *df_node_log_density(const df_run *run, int steps, df_tensor *x,
                                      const int *labels, df_tensor *probe) {
    df_ctx *ctx = run->ctx;
    const df_net *net = run->net;
    int shape[2] = {0, 1}, flat[2] = {-1, net->dim};
    dfi_node f = {run, labels, probe};
    if (dfi_blocked(ctx, "df_node_log_density", x, x)) return NULL;
    if (steps < 1 || steps > 10000)
        return dfi_fail_tensor(ctx, DF_ERR_ARGUMENT,
                               "df_node_log_density: steps = %d, want 1 to 10000", steps);
    if (net->card.process.kind != DF_PROCESS_FLOW || net->card.prediction != DF_VELOCITY ||
        net->outputs != net->shape[0] || net->vocab > 0 ||
        net->card.input_sigma_data > 0 || x->size % (size_t)net->dim != 0)
        return dfi_fail_tensor(ctx, DF_ERR_UNSUPPORTED,
                               "df_node_log_density: x has %.0f elements, net '%s' "
                               "predicts %s of process %s: wants velocity of flow, no "
                               "input_sigma_data, no variance, samples of %d",
                               (double)x->size, net->kind,
                               df_prediction_name(net->card.prediction),
                               df_process_name(&net->card.process), net->dim);
    shape[0] = (int)(x->size / (size_t)net->dim);
    df_scope scope = df_scope_begin(ctx); /* ended after each step: only s stays */
    df_tensor *s = df_concat(ctx, df_reshape(ctx, x, 2, flat),
                             df_tensor_new(ctx, 2, shape), 1);
    for (int i = 0; i < steps && s != NULL; i++)
        s = df_scope_end(ctx, scope, dfi_node_step(&f, s, (double)i / steps, 1.0 / steps));
    x = dfi_normal_log(ctx, df_slice(ctx, s, 1, 0, net->dim), NULL, NULL);
    return df_add(ctx, x, df_sum_axis(ctx, df_slice(ctx, s, 1, net->dim, 1), 1, 0));
}
DF_API df_tensor *df_objective_node(void *self, const df_run *run, const df_batch *batch) {
    df_objective_desc d = dfi_objective(run->ctx, "df_objective_node", self, 1);
    df_tensor *probe = NULL, *x = batch->x0;
    if (d.probes > 0 && x != NULL) {
        probe = df_batch_normal(run, batch, 0, run->net->dim);
        if (probe != NULL) dfi_signs(probe->size, probe->data);
        probe = df_reshape(run->ctx, probe, x->ndim, x->shape);
    }
    return dfi_mean_loss(run->ctx,
                         df_node_log_density(run, d.steps, x, batch->labels, probe));
}

/* ---- making them ------------------------------------------------------------------- */

DF_API df_net *df_vae_create(df_ctx *ctx, const df_vae_desc *desc) {
    const df_vae_desc d = desc != NULL ? *desc : df_vae_defaults();
    dfi_net_plan plan = {"vae", d.cookie, d.seed, 1, {d.dim}, &d.width,
                         (3 + DF_VAE_LEVELS) * sizeof(int), &d.deviation, sizeof(double),
                         0, 0, NULL, DFI_NAMES_OWN};
    return dfi_net_new(ctx, &plan);
}
DF_API df_net *df_coupling_create(df_ctx *ctx, const df_coupling_desc *desc) {
    const df_coupling_desc d = desc != NULL ? *desc : df_coupling_defaults();
    dfi_net_plan plan = {"coupling", d.cookie, d.seed, 1, {d.dim}, &d.width,
                         3 * sizeof(int), &d.scale, sizeof(double), 0, 0, NULL,
                         DFI_NAMES_OWN};
    return dfi_net_new(ctx, &plan);
}

/* -------------------------------------------------------------------------------------
   // >>files: where bytes come from and go to, JSON, safetensors

   Weights travel in safetensors files (github.com/huggingface/safetensors): a 64-bit
   little-endian length n, n bytes of JSON, then the numbers, row-major and little-endian:

       {"__metadata__": {"key": "text"},
        "w": {"dtype": "F32", "shape": [8, 3, 3, 3], "data_offsets": [0, 864]}, ...}

   Offsets count from the end of the JSON. There is nothing to execute in such a file, but
   everything to doubt: each size, offset, type and name is checked before it is used.
   Numbers are put together from bytes, so neither the host's byte order nor the alignment
   of the data matters. A file is written beside its destination, flushed and renamed:
   whoever looks there, at any moment, after any crash, finds the old file or the new one.
   ------------------------------------------------------------------------------------- */
#include <errno.h>
#if defined(__unix__) || defined(__APPLE__)
#define DFI_POSIX 1
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

/* What messages begin with, and what bad content counts as: DF_ERR_FORMAT if it was read,
   DF_ERR_ARGUMENT if the caller wants it written. */
typedef struct dfi_where {
    df_ctx *ctx;
    const char *who, *file;    /* the public function; the source or sink */
    df_result fault;
} dfi_where;

/* "df_safetensors_open: f: tensor "a.b": ..."; tensor may be NULL; code 0: at->fault. */
DFI_PRINTF(4, 5)
static df_result dfi_error(const dfi_where *at, int code, const char *tensor,
                           const char *format, ...) {
    char text[DFI_MESSAGE];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return dfi_fail(at->ctx, code ? (df_result)code : at->fault, tensor ? "%s: %.200s: "
                    "tensor \"%.120s\": %s" : "%s: %.200s: %s%s", at->who, at->file,
                    tensor ? tensor : "", text);
}

/* ---- sources and sinks ---- */

DF_API df_source df_source_path(const char *path) {
    df_source s = {path, NULL, 0, NULL, NULL, NULL};
    return s;
}
DF_API df_source df_source_memory(const void *memory, size_t size) {
    df_source s = {NULL, memory, size, NULL, NULL, NULL};
    return s;
}
DF_API df_source df_source_hooks(size_t (*read)(void *user, void *buffer, size_t size),
                                 void *user) {
    df_source s = {NULL, NULL, 0, read, user, NULL};
    return s;
}
DF_API df_sink df_sink_path(const char *path) {
    df_sink s = {path, NULL, NULL, NULL};
    return s;
}
DF_API df_sink df_sink_buffer(df_buffer *buffer) {
    df_sink s = {NULL, buffer, NULL, NULL};
    return s;
}
DF_API df_sink df_sink_hooks(int (*write)(void *user, const void *data, size_t size),
                             void *user) {
    df_sink s = {NULL, NULL, write, user};
    return s;
}

static const char *dfi_source_name(const df_source *source) {
    return source->name != NULL ? source->name : source->path != NULL ? source->path
         : source->memory != NULL ? "(memory)" : "(hook)";
}
DF_API void df_buffer_free(df_ctx *ctx, df_buffer *buffer) {
    if (buffer == NULL) return;
    dfi_delete(ctx, buffer->data, buffer->capacity);
    buffer->data = NULL;
    buffer->size = buffer->capacity = 0;
}

/* Room for `more` bytes. Doubling, all copies together cost less than twice the last. */
static df_result dfi_buffer_reserve(df_ctx *ctx, df_buffer *b, size_t more) {
    size_t need = dfi_plus(b->size, more), capacity = b->capacity > 0 ? b->capacity : need;
    unsigned char *data;
    if (need <= b->capacity) return DF_OK;
    while (capacity < need) capacity = dfi_mul(capacity, 2);     /* ends at SIZE_MAX */
    data = (unsigned char *)dfi_new(ctx, capacity);
    if (data == NULL) return DF_ERR_MEMORY;
    if (b->size > 0) memcpy(data, b->data, b->size);
    dfi_delete(ctx, b->data, b->capacity);
    b->data = data;
    b->capacity = capacity;
    return DF_OK;
}
static df_result dfi_buffer_add(df_ctx *ctx, df_buffer *b, const void *data, size_t size) {
    if (dfi_buffer_reserve(ctx, b, size) != DF_OK) return DF_ERR_MEMORY;
    if (size > 0) memcpy(b->data + b->size, data, size);
    b->size += size;
    return DF_OK;
}

/* Reads until the hook gives no more. */
static df_result dfi_read_all(const dfi_where *at, df_source hook, size_t most,
                              df_buffer *out) {
    while (dfi_buffer_reserve(at->ctx, out, 1) == DF_OK) {
        size_t room = out->capacity - out->size;
        size_t got = hook.read(hook.user, out->data + out->size, room);
        if (got == 0) return DF_OK;
        if (got > most || out->size > most - got)
            return dfi_error(at, 0, NULL, "more than %.0f bytes", (double)most);
        if (got > room)
            return dfi_error(at, DF_ERR_ARGUMENT, NULL, "%zu bytes for %zu", got, room);
        out->size += got;
    }
    return DF_ERR_MEMORY;
}

#ifdef DIFFUSION_NO_STDIO
#define dfi_file_load(at, path, most, out)                                               \
    dfi_error(at, DF_ERR_UNSUPPORTED, NULL, "no stdio")
#define dfi_file_save(at, path, b) dfi_error(at, DF_ERR_UNSUPPORTED, NULL, "no stdio")
#else
static df_result dfi_file_fail(const dfi_where *at, const char *what) {
    return dfi_error(at, DF_ERR_IO, NULL, "cannot %s: %s", what, strerror(errno));
}
static size_t dfi_file_read(void *user, void *buffer, size_t size) {
    return fread(buffer, 1, size, (FILE *)user);
}

/* The size is a first guess (a pipe has none); with one byte more, the end is seen. */
static df_result dfi_file_load(const dfi_where *at, const char *path, size_t most,
                               df_buffer *out) {
    FILE *file = fopen(path, "rb");
    df_source hook = df_source_hooks(dfi_file_read, file);
    if (file == NULL) return dfi_file_fail(at, "open");
    long size = fseek(file, 0, SEEK_END) == 0 ? ftell(file) : 0;
    rewind(file);
    if (size < 0 || size == LONG_MAX || (size_t)size > most) size = 0;
    df_result result = dfi_buffer_reserve(at->ctx, out, (size_t)size + 1);
    if (result == DF_OK) result = dfi_read_all(at, hook, most, out);
    if (result == DF_OK && ferror(file)) result = dfi_file_fail(at, "read");
    fclose(file);
    return result;
}

/* Writes "path.k.tmp", k the first number that is free ("x": exclusively, C11 7.21.5.3),
   because another thread, or a process that died here, may hold other k; then renames it,
   which is atomic for everyone who looks, but may reach the disk before the data does:
   hence fsync. A device or a folder is refused, for it would be replaced. ISO C knows none
   of this, and its rename need not replace: there a kill in between leaves the ".tmp". */
static df_result dfi_file_save(const dfi_where *at, const char *path, const df_buffer *b) {
#ifdef DFI_POSIX
    struct stat old;
    int known = stat(path, &old) == 0, fd;
    if (known && !S_ISREG(old.st_mode))
        return dfi_error(at, DF_ERR_IO, NULL, "is not a regular file");
#endif
    size_t size = strlen(path) + 16;
    char *temp = (char *)dfi_new(at->ctx, size);
    FILE *file = NULL;
    int ok = 0;
    if (temp == NULL) return DF_ERR_MEMORY;
    for (int k = 0; k < 1000 && file == NULL && (k == 0 || errno == EEXIST); k++) {
        snprintf(temp, size, "%s.%d.tmp", path, k);
        file = fopen(temp, "wbx");
    }
    if (file != NULL) {
        ok = fwrite(b->data, 1, b->size, file) == b->size;
        ok = fclose(file) == 0 && ok;    /* here network file systems report a full disk */
#ifdef DFI_POSIX
        fd = open(temp, O_RDONLY);
        ok = ok && fd >= 0 && fsync(fd) == 0;
        if (fd >= 0) close(fd);
        if (known) (void)chmod(temp, old.st_mode & 0777);
#else
        if (ok) remove(path);
#endif
        ok = ok && rename(temp, path) == 0;
    }
    if (!ok) dfi_file_fail(at, "write");
    if (!ok && file != NULL) remove(temp);
    dfi_delete(at->ctx, temp, size);
    return ok ? DF_OK : DF_ERR_IO;
}
#endif

/* All bytes of a source, at most so many. The caller frees `out`, on failure too. */
static df_result dfi_source_load(const dfi_where *at, df_source s, size_t most,
                                 df_buffer *out) {
    if (s.path != NULL) return dfi_file_load(at, s.path, most, out);
    if (s.memory != NULL && s.size > most)
        return dfi_error(at, 0, NULL, "more than %.0f bytes", (double)most);
    if (s.memory != NULL) return dfi_buffer_add(at->ctx, out, s.memory, s.size);
    if (s.read != NULL) return dfi_read_all(at, s, most, out);
    return dfi_error(at, DF_ERR_ARGUMENT, NULL, "no path, no memory, no read hook");
}

/* Files are made whole in memory: what can fail has failed before a sink is touched. */
static df_result dfi_sink_save(const dfi_where *at, df_sink sink, const df_buffer *b) {
    if (sink.path != NULL) return dfi_file_save(at, sink.path, b);
    if (sink.buffer != NULL) return dfi_buffer_add(at->ctx, sink.buffer, b->data, b->size);
    if (sink.write == NULL)
        return dfi_error(at, DF_ERR_ARGUMENT, NULL, "no path, no buffer, no write hook");
    int code = sink.write(sink.user, b->data, b->size);
    return code == 0 ? DF_OK : dfi_error(at, code, NULL, "the write hook gave %d", code);
}

/* ---- JSON (RFC 8259) ---- */

/* A cursor walks over the text once, and whoever reads says what must come next: no tree,
   so no memory, and no depth of calls, that a hostile text could make large. Failures
   stick: then all loops over the items of a container end. Strings are decoded in place,
   for they never get longer, and live as long as the text. */
typedef struct dfi_parser {
    const dfi_where *where;
    const char *tensor;        /* for messages: what is being read, or NULL */
    char *begin, *at, *end;
    df_result result;
} dfi_parser;

static char *dfi_json_fail(dfi_parser *p, const char *what) {
    if (p->result == DF_OK)
        p->result = dfi_error(p->where, 0, p->tensor, "JSON, byte %d: %s",
                              (int)(p->at - p->begin), what);
    return NULL;
}

/* Passes over blanks; then over the byte `wanted`, if it is there (' ' never is). */
static int dfi_json_take(dfi_parser *p, char wanted) {
    while (p->at < p->end && memchr(" \n\r\t", *p->at, 4) != NULL) p->at++;
    if (p->at == p->end || *p->at != wanted) return 0;
    p->at++;
    return 1;
}

/* Moves to the next value, the n-th, of "[]" or "{}": 1, or 0 at the end or on failure. */
static int dfi_json_item(dfi_parser *p, const char *brackets, int *n) {
    int first = *n == 0, found = dfi_json_take(p, first ? brackets[0] : ',');
    if (p->result != DF_OK || (found == first && dfi_json_take(p, brackets[1]))) return 0;
    if (!found) dfi_json_fail(p, first ? "'[' or '{' is wanted" : "',' or bracket wanted");
    *n += found;
    return found;
}

/* Four hexadecimal digits behind "\\u", or -1. */
static long dfi_json_hex(dfi_parser *p) {
    static const char digits[] = "0123456789abcdef0123456789ABCDEF";
    long code = p->end - p->at < 6 || p->at[0] != '\\' || p->at[1] != 'u' ? -1 : 0;
    for (int i = 2; i < 6 && code >= 0; i++) {
        const void *found = memchr(digits, p->at[i], 32);
        code = found ? code * 16 + (long)((const char *)found - digits) % 16 : -1;
    }
    p->at += code >= 0 ? 6 : 0;
    return code;
}

/* The escape that begins here, as UTF-8, where the first byte tells how many more there
   are, of six bits each; returns where the next byte goes. Codes above ffff come in pairs:
   10000 + (high - d800) 400 + low - dc00. \u0000 would end a C string: refused. */
static char *dfi_json_escape(dfi_parser *p, char *out) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    static const long lead[4] = {0, 0xc0, 0xe0, 0xf0};
    const void *found = p->end - p->at > 1 ? memchr(from, p->at[1], 8) : NULL;
    long code = found != NULL ? to[(const char *)found - from] : dfi_json_hex(p);
    if (found != NULL) p->at += 2;
    if (code >> 10 == 0x36) {
        long low = dfi_json_hex(p) - 0xdc00;
        code = low >= 0 && low < 0x400 ? 0x10000 + (code - 0xd800) * 0x400 + low : -1;
    }
    if (code <= 0 || code >> 11 == 0x1b) return dfi_json_fail(p, "bad escape");
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *out++ = (char)(lead[more] | code >> 6 * more);
    while (more-- > 0) *out++ = (char)(0x80 | (code >> 6 * more & 0x3f));
    return out;
}

static const char *dfi_json_string(dfi_parser *p) {
    char *text, *out;
    if (!dfi_json_take(p, '"')) return dfi_json_fail(p, "a string is missing");
    for (text = out = p->at; p->at < p->end && *p->at != '"';) {
        if ((unsigned char)*p->at < 32) return dfi_json_fail(p, "control character");
        if (*p->at != '\\') *out++ = *p->at++;
        else if ((out = dfi_json_escape(p, out)) == NULL) return NULL;
    }
    if (p->at == p->end) return dfi_json_fail(p, "ends inside a string");
    p->at++;
    *out = 0;                               /* at the closing quote or before it */
    return text;
}

/* The next key of an object, its value coming next; NULL at the end or on failure. */
static const char *dfi_json_key(dfi_parser *p, int *n) {
    const char *key = dfi_json_item(p, "{}", n) ? dfi_json_string(p) : NULL;
    if (key != NULL && !dfi_json_take(p, ':')) return dfi_json_fail(p, "':' is missing");
    return key;
}

/* Behind what looks like a number at `s`, or NULL. */
static const char *dfi_json_number_end(const char *s, const char *end) {
    const char *first = s;
    while (s < end && memchr("+-.0123456789eE", *s, 15) != NULL) s++;
    return s > first ? s : NULL;
}

/* Correctly rounded by strtod, which reads the decimal point of the host's locale: we ask
   snprintf what that looks like and put it in. `size` < 64. Infinite if no number. */
static double dfi_decimal(const char *text, size_t size) {
    char probe[16], copy[64] = "", *point;
    snprintf(probe, sizeof probe, "%.1f", 0.5);                  /* "0.5", "0,5", ... */
    memcpy(copy, text, size);
    if ((point = strchr(copy, '.')) != NULL) *point = probe[1];
    double x = strtod(copy, &point);
    return *point == 0 ? x : HUGE_VAL;
}

/* At most `most` whole numbers, exactly (a double rounds offsets above 2^53); how many. */
static int dfi_json_wholes(dfi_parser *p, int most, uint64_t *out) {
    int n = 0;
    while (dfi_json_item(p, "[]", &n)) {
        int blanks = dfi_json_take(p, ' ');
        const char *end = blanks ? NULL : dfi_json_number_end(p->at, p->end);
        uint64_t x = 0;
        for (; end != NULL && p->at < end; p->at++) {
            unsigned digit = (unsigned)(unsigned char)*p->at - '0';  /* "-.e": above 9 */
            if (digit > 9 || x > (UINT64_MAX - digit) / 10) end = NULL;
            x = x * 10 + digit;
        }
        if (end == NULL || n > most) dfi_json_fail(p, "not whole numbers up to 2^64-1");
        else out[n - 1] = x;
    }
    return n;
}

/* ---- safetensors ---- */

/* Every type of the format: bits, and how many of them are an exponent. The first ones are
   df_dtype's; of the others, which no type of C can hold, we know the size alone. */
static const struct { const char *name; int bits, exponent; } dfi_dtypes[] = {
    {"F32", 32, 8}, {"F64", 64, 11}, {"F16", 16, 5}, {"BF16", 16, 8}, {"I64", 64, 0},
    {"I32", 32, 0}, {"U8", 8, 0}, {"BOOL", 8, 0}, {"I8", 8, 0}, {"I16", 16, 0},
    {"U16", 16, 0}, {"U32", 32, 0}, {"U64", 64, 0}, {"C64", 64, 0}, {"F4", 4, 0},
    {"F6_E2M3", 6, 0}, {"F6_E3M2", 6, 0}, {"F8_E4M3", 8, 0}, {"F8_E5M2", 8, 0},
    {"F8_E8M0", 8, 0}, {NULL, 0, 0}
};

typedef struct dfi_entry {
    df_file_tensor tensor;
    uint64_t at[2];            /* data_offsets */
} dfi_entry;
struct df_safetensors {
    dfi_where at;
    char *name;
    df_buffer bytes;           /* the whole file; all names lie in its header */
    size_t data_at, data_size;
    df_buffer entries, texts;  /* of dfi_entry and df_save_text, sorted by name */
};

/* Orders records that begin with a pointer to their name. */
static int dfi_by_name(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}
static int dfi_by_place(const void *a, const void *b) {
    const dfi_entry *x = (const dfi_entry *)a, *y = (const dfi_entry *)b;
    const int i = x->at[0] == y->at[0];
    return x->at[i] < y->at[i] ? -1 : x->at[i] > y->at[i];
}

/* Sorted, a name stands beside its double. */
static df_result dfi_names(const dfi_where *at, const df_buffer *list, size_t size) {
    if (list->size > 0) dfi_sort(list->data, list->size / size, size, dfi_by_name);
    for (size_t i = size; i < list->size; i += size)
        if (dfi_by_name(list->data + i - size, list->data + i) == 0)
            return dfi_error(at, 0, NULL, "the key \"%.120s\" stands twice",
                             *(const char *const *)(const void *)(list->data + i));
    return DF_OK;
}
static const void *dfi_find(const df_buffer *list, size_t size, const char *name) {
    if (list->size == 0) return NULL;
    return bsearch(&name, list->data, list->size / size, size, dfi_by_name);
}

/* What is wrong with an entry, or NULL. An element has 64 bits at most. */
static const char *dfi_entry_check(dfi_entry *e, const char *dtype, size_t data_size) {
    df_file_tensor *t = &e->tensor;
    uint64_t count = 1;
    int row = 0;
    while (dfi_dtypes[row].name != NULL && strcmp(dfi_dtypes[row].name, dtype) != 0) row++;
    if (dfi_dtypes[row].name == NULL) return "unknown dtype";
    t->dtype = row < DF_DTYPE_COUNT ? (df_dtype)row : DF_DTYPE_COUNT;
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] != 0 && count > SIZE_MAX / 64 / t->shape[i])
            return "the product of the shape overflows";
        count *= t->shape[i];
    }
    t->count = (size_t)count;
    count *= (uint64_t)dfi_dtypes[row].bits;
    if (e->at[0] > e->at[1] || e->at[1] > data_size)
        return "data_offsets do not lie in order within the data";
    return count % 8 == 0 && e->at[1] - e->at[0] == count / 8 ? NULL
         : "data_offsets do not span what dtype and shape take";
}

/* One tensor's object. */
static void dfi_entry_read(df_safetensors *f, dfi_parser *p, const char *name) {
    const char *key, *dtype = NULL, *wrong = "dtype, shape or data_offsets is missing";
    int n = 0, offsets = -1;
    dfi_entry e;
    memset(&e, 0, sizeof e);
    e.tensor.name = p->tensor = name;
    e.tensor.ndim = -1;
    while ((key = dfi_json_key(p, &n)) != NULL) {
        if (strcmp(key, "dtype") == 0 && dtype == NULL) dtype = dfi_json_string(p);
        else if (strcmp(key, "shape") == 0 && e.tensor.ndim < 0)
            e.tensor.ndim = dfi_json_wholes(p, 8, e.tensor.shape);
        else if (strcmp(key, "data_offsets") == 0 && offsets < 0)
            offsets = dfi_json_wholes(p, 2, e.at);
        else dfi_json_fail(p, "a key is unknown or stands twice");
    }
    p->tensor = NULL;
    if (p->result != DF_OK) return;
    if (dtype != NULL && e.tensor.ndim >= 0 && offsets == 2)
        wrong = dfi_entry_check(&e, dtype, f->data_size);
    if (wrong == NULL) e.tensor.bytes = f->bytes.data + f->data_at + e.at[0];
    p->result = wrong == NULL ? dfi_buffer_add(f->at.ctx, &f->entries, &e, sizeof e)
              : dfi_error(&f->at, 0, name, "%s (%.20s at [%.0f,%.0f] of %zu bytes)", wrong,
                          dtype ? dtype : "", (double)e.at[0], (double)e.at[1],
                          f->data_size);
}

/* __metadata__: an object of strings. */
static void dfi_texts_read(df_safetensors *f, dfi_parser *p) {
    df_save_text text;
    int n = 0;
    while ((text.key = dfi_json_key(p, &n)) != NULL) {
        text.value = dfi_json_string(p);
        if (p->result == DF_OK)
            p->result = dfi_buffer_add(f->at.ctx, &f->texts, &text, sizeof text);
    }
}

/* The tensors must cover the data without overlap and without a hole, as the reference
   reader demands: a file that hides something in between is not what it seems. */
static df_result dfi_safetensors_cover(const df_safetensors *f) {
    dfi_entry *e = (dfi_entry *)(void *)f->entries.data;
    size_t n = f->entries.size / sizeof *e, end = 0, i;
    if (n > 0) dfi_sort(e, n, sizeof *e, dfi_by_place);
    for (i = 0; i < n && e[i].at[0] == end; i++) end = (size_t)e[i].at[1];
    if (i == n && end == f->data_size) return DF_OK;
    return dfi_error(&f->at, 0, i < n ? e[i].tensor.name : NULL,
                     "a hole or an overlap at byte %zu of %zu", end, f->data_size);
}

static uint64_t dfi_load(const unsigned char *p, int bytes) {
    uint64_t bits = 0;
    for (int i = bytes - 1; i >= 0; i--) bits = bits << 8 | p[i];
    return bits;
}

/* Everything that is not a tensor's content; the header becomes strings. */
static df_result dfi_safetensors_parse(df_safetensors *f) {
    const size_t size = f->bytes.size;
    const uint64_t length = size > 8 ? dfi_load(f->bytes.data, 8) : 0;
    const char *key;
    int n = 0, texts = 0;
    if (length == 0 || length > size - 8 || length > 100000000 || f->bytes.data[8] != '{')
        return dfi_error(&f->at, 0, NULL, "is no safetensors file: a header of %.0f bytes "
                         "that begins with '{' in %zu?", (double)length, size);
    f->data_at = 8 + (size_t)length;
    f->data_size = size - f->data_at;
    char *text = (char *)f->bytes.data + 8;
    dfi_parser p = {&f->at, NULL, text, text, text + length, DF_OK};
    while ((key = dfi_json_key(&p, &n)) != NULL) {
        if (strcmp(key, "__metadata__") != 0) dfi_entry_read(f, &p, key);
        else if (texts++ == 0) dfi_texts_read(f, &p);
        else dfi_json_fail(&p, "the key \"__metadata__\" stands twice");
    }
    dfi_json_take(&p, ' ');
    if (p.at < p.end) dfi_json_fail(&p, "something follows the end");
    if (p.result == DF_OK) p.result = dfi_safetensors_cover(f);
    if (p.result == DF_OK) p.result = dfi_names(&f->at, &f->entries, sizeof(dfi_entry));
    if (p.result == DF_OK) p.result = dfi_names(&f->at, &f->texts, sizeof(df_save_text));
    return p.result;
}

DF_API void df_safetensors_close(df_safetensors *file) {
    if (file == NULL) return;
    if (file->name != NULL) dfi_delete(file->at.ctx, file->name, strlen(file->name) + 1);
    df_buffer_free(file->at.ctx, &file->bytes);
    df_buffer_free(file->at.ctx, &file->entries);
    df_buffer_free(file->at.ctx, &file->texts);
    dfi_delete(file->at.ctx, file, sizeof *file);
}
DF_API df_safetensors *df_safetensors_open(df_ctx *ctx, df_source source) {
    dfi_where at = {ctx, "df_safetensors_open", dfi_source_name(&source), DF_ERR_FORMAT};
    df_safetensors *f = ctx != NULL ? (df_safetensors *)dfi_new(ctx, sizeof *f) : NULL;
    if (f == NULL) return NULL;
    f->at = at;
    f->at.file = f->name = dfi_strdup(ctx, at.file);
    if (f->name != NULL && dfi_source_load(&f->at, source, SIZE_MAX, &f->bytes) == DF_OK
        && dfi_safetensors_parse(f) == DF_OK)
        return f;
    df_safetensors_close(f);
    return NULL;
}

DF_API int df_safetensors_count(const df_safetensors *file) {
    return (int)(file->entries.size / sizeof(dfi_entry));
}
DF_API const df_file_tensor *df_safetensors_at(const df_safetensors *file, int index) {
    const dfi_entry *e = (const dfi_entry *)(const void *)file->entries.data;
    return index >= 0 && index < df_safetensors_count(file) ? &e[index].tensor : NULL;
}
DF_API const df_file_tensor *df_safetensors_find(const df_safetensors *file,
                                                 const char *name) {
    return (const df_file_tensor *)dfi_find(&file->entries, sizeof(dfi_entry), name);
}
DF_API const char *df_safetensors_metadata(const df_safetensors *file, const char *key) {
    const void *text = dfi_find(&file->texts, sizeof(df_save_text), key);
    return text != NULL ? ((const df_save_text *)text)->value : NULL;
}

/* An IEEE 754 number with `ebits` bits of exponent e and `fbits` of fraction f, as double:
   (1 + f 2^-fbits) 2^(e-bias), or f 2^(1-bias-fbits) at e = 0; the greatest e means
   infinity or NaN. By bits alone: under -Ofast processors take small floats for 0. */
static double dfi_widen(uint64_t bits, int ebits, int fbits) {
    const uint64_t top = ((uint64_t)1 << ebits) - 1, bias = top >> 1;
    const uint64_t e = bits >> fbits & top, f = bits & (((uint64_t)1 << fbits) - 1);
    uint64_t word = (e == top ? 2047 : e + 1023 - bias) << 52 | f << (52 - fbits);
    double x;
    memcpy(&x, &word, sizeof x);
    if (e == 0) x = ldexp((double)f, 1 - (int)bias - fbits);
    return bits >> (ebits + fbits) != 0 ? -x : x;
}

/* Element i of a tensor; integers are two's complement. */
static double dfi_element(const df_file_tensor *t, size_t i) {
    const int bits = dfi_dtypes[t->dtype].bits, ebits = dfi_dtypes[t->dtype].exponent;
    uint64_t word = dfi_load(t->bytes + i * (size_t)(bits / 8), bits / 8);
    int64_t integer;
    if (ebits > 0) return dfi_widen(word, ebits, bits - 1 - ebits);
    if (bits > 8 && word >> (bits - 1) != 0) word |= UINT64_MAX << (bits - 1);
    memcpy(&integer, &word, sizeof integer);
    return (double)integer;
}

/* 1 if x, stored as float (or as double), is infinite or NaN. */
static int dfi_overflows(double x, int as_float) {
    return dfi_nonfinite(x) || (as_float && fabs(x) > (double)FLT_MAX);
}

DF_API df_result df_safetensors_read(df_ctx *ctx, const df_safetensors *file,
                                     const char *name, int ndim, const int *shape,
                                     df_real *out) {
    const df_file_tensor *t = df_safetensors_find(file, name);
    dfi_where at = {ctx, "df_safetensors_read", file->name, DF_ERR_FORMAT};
    if (t == NULL) return dfi_error(&at, 0, name, "is missing");
    if (ndim != t->ndim) return dfi_error(&at, 0, name, "%d axes, not %d", t->ndim, ndim);
    for (int i = 0; i < ndim; i++)
        if (shape[i] < 0 || t->shape[i] != (uint64_t)shape[i])
            return dfi_error(&at, 0, name, "shape[%d] is %llu, wanted is %d", i,
                             (unsigned long long)t->shape[i], shape[i]);
    if (t->dtype == DF_DTYPE_COUNT) return dfi_error(&at, 0, name, "unreadable dtype");
    for (size_t i = 0; i < t->count; i++) {
        double x = dfi_element(t, i);
        if (dfi_overflows(x, sizeof(df_real) == sizeof(float)))
            return dfi_error(&at, DF_ERR_NONFINITE, name, "element %zu of %zu is not a "
                             "finite " DF_REAL_NAME, i, t->count);
        out[i] = (df_real)x;
    }
    return DF_OK;
}

static size_t dfi_save_count(const df_save_tensor *t) {
    size_t count = 1;
    for (int i = 0; i < t->ndim; i++) count = dfi_mul(count, (size_t)t->shape[i]);
    return count;
}
static size_t dfi_save_bytes(const df_save_tensor *t) {
    return dfi_mul(dfi_save_count(t), t->dtype == DF_DTYPE_F64 ? 8 : 4);
}

/* What is wrong with an argument that the finished header would not show, or NULL. */
static const char *dfi_save_check(const df_save_tensor *t) {
    if (t->name == NULL) return "no name";
    if (t->dtype != DF_DTYPE_F32 && t->dtype != DF_DTYPE_F64) return "dtype: not F32, F64";
    if (t->ndim < 0 || t->ndim > DF_AXES) return "ndim is not 0 to 5";
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] < 0) return "a negative number in its shape";
    if (dfi_save_bytes(t) == SIZE_MAX) return "the product of its shape overflows";
    return t->data == NULL && dfi_save_count(t) > 0 ? "data is NULL" : NULL;
}

/* At the end of a buffer, into room that was made before. */
DFI_PRINTF(2, 3)
static void dfi_put(df_buffer *b, const char *format, ...) {
    va_list args;
    va_start(args, format);
    b->size += (size_t)vsnprintf((char *)b->data + b->size, b->capacity - b->size,
                                 format, args);
    va_end(args);
}

/* RFC 8259, section 7: quote, backslash and the controls below 32 must be escaped. */
static void dfi_put_string(df_buffer *b, const char *text) {
    dfi_put(b, "\"");
    for (; *text != 0; text++) {
        unsigned c = (unsigned char)*text;
        dfi_put(b, c < 32 ? "\\u%04x" : c == '"' || c == '\\' ? "\\%c" : "%c", c);
    }
    dfi_put(b, "\"");
}
static void dfi_put_number(df_buffer *b, uint64_t bits, int bytes) {
    for (; bytes > 0; bytes--, bits >>= 8) b->data[b->size++] = (unsigned char)bits;
}

/* The length and the JSON, with blanks behind it that align the data to 8 bytes. */
static void dfi_put_header(df_buffer *b, const df_save_tensor *t, int count,
                           const df_save_text *metadata, int metadata_count) {
    unsigned long long at = 0;
    b->size = 8;
    dfi_put(b, metadata_count > 0 ? "{\"__metadata__\":{" : "{");
    for (int i = 0; i < metadata_count; i++) {
        dfi_put_string(b, metadata[i].key);
        dfi_put(b, ":");
        dfi_put_string(b, metadata[i].value);
        dfi_put(b, i + 1 < metadata_count ? "," : count > 0 ? "}," : "}");
    }
    for (int i = 0; i < count; i++, t++) {
        unsigned long long bytes = dfi_save_bytes(t);
        dfi_put_string(b, t->name);
        dfi_put(b, ":{\"dtype\":\"%s\",\"shape\":[", dfi_dtypes[t->dtype].name);
        for (int j = 0; j < t->ndim; j++) dfi_put(b, j > 0 ? ",%d" : "%d", t->shape[j]);
        dfi_put(b, "],\"data_offsets\":[%llu,%llu]}%s", at, at + bytes,
                i + 1 < count ? "," : "");
        at += bytes;
    }
    dfi_put(b, "}%*s", 7 - (int)(b->size % 8), "");
    at = b->size - 8;
    for (int i = 0; i < 8; i++) b->data[i] = (unsigned char)(at >> 8 * i & 255);
}

/* NaN and infinity are refused: nothing is written that could not be read again. */
static df_result dfi_put_data(const dfi_where *at, df_buffer *b, const df_save_tensor *t) {
    const int as_float = t->dtype == DF_DTYPE_F32;
    const size_t count = dfi_save_count(t);
    for (size_t i = 0; i < count; i++) {
        double x = t->data_is_double ? ((const double *)t->data)[i]
                                     : (double)((const df_real *)t->data)[i];
        uint32_t word;
        uint64_t bits;
        if (dfi_overflows(x, as_float))
            return dfi_error(at, DF_ERR_NONFINITE, t->name, "element %zu of %zu is not a "
                             "finite %s", i, count, as_float ? "float" : "double");
        float narrow = (float)x;
        memcpy(&word, &narrow, sizeof word);
        memcpy(&bits, &x, sizeof bits);
        dfi_put_number(b, as_float ? word : bits, as_float ? 4 : 8);
    }
    return DF_OK;
}

/* The whole file is made in memory; its header is first parsed as one that was read, which
   finds what is wrong with names and spoils it, so it is then made again. */
DF_API df_result df_safetensors_write(df_ctx *ctx, df_sink sink,
                                      const df_save_tensor *tensors, int count,
                                      const df_save_text *metadata, int metadata_count) {
    dfi_where at = {ctx, "df_safetensors_write", sink.path, DF_ERR_ARGUMENT};
    df_buffer image = {NULL, 0, 0};
    df_safetensors f;
    size_t room = 64, data = 0;
    if (sink.path == NULL) at.file = sink.buffer != NULL ? "(buffer)" : "(hook)";
    if (ctx == NULL || count < 0 || metadata_count < 0 || (count > 0 && !tensors)
        || (metadata_count > 0 && !metadata))
        return dfi_error(&at, 0, NULL, "%d tensors, %d texts?", count, metadata_count);
    for (int i = 0; i < count; i++) {
        const char *name = tensors[i].name, *wrong = dfi_save_check(&tensors[i]);
        if (wrong != NULL) return dfi_error(&at, 0, name ? name : "?", "%s", wrong);
        data = dfi_plus(data, dfi_save_bytes(&tensors[i]));
        room = dfi_plus(room, dfi_plus(256, dfi_mul(6, strlen(name))));
    }
    for (int i = 0; i < metadata_count; i++) {
        const char *key = metadata[i].key, *value = metadata[i].value;
        if (!key || !value) return dfi_error(&at, 0, NULL, "metadata %d is NULL", i);
        room = dfi_plus(room, dfi_mul(6, dfi_plus(8, strlen(key) + strlen(value))));
    }
    df_result result = dfi_buffer_reserve(ctx, &image, dfi_plus(room, data));
    for (int pass = 0; pass < 2 && result == DF_OK; pass++) {
        memset(&f, 0, sizeof f);
        f.at = at;
        dfi_put_header(&image, tensors, count, metadata, metadata_count);
        f.bytes = image;
        f.bytes.size += data;
        if (pass == 0) result = dfi_safetensors_parse(&f);
        df_buffer_free(ctx, &f.entries);
        df_buffer_free(ctx, &f.texts);
    }
    for (int i = 0; i < count && result == DF_OK; i++)
        result = dfi_put_data(&at, &image, &tensors[i]);
    if (result == DF_OK) result = dfi_sink_save(&at, sink, &image);
    df_buffer_free(ctx, &image);
    return result;
}

/* ---- configurations of others: JSON of scalars and lists ---- */

/* Beside its weights, what a network is stands as one JSON object: diffusers' UNet2DModel,
   DiTTransformer2DModel and schedulers of betas, or the arguments of facebookresearch/DiT.
   A table for each says which key is which field; what is not said is the peer's default.
   A network half understood would answer, and wrongly: so a key or a value that is not
   known is refused by name, unless it says nothing ('_...', null, false). Of a scheduler
   only what says how the weights were trained is read. The same tables write. */

/* The word next, as null, true, false. */
static int dfi_json_word(dfi_parser *p, const char *word) {
    size_t length = strlen(word);
    (void)dfi_json_take(p, ' ');
    if ((size_t)(p->end - p->at) < length || memcmp(p->at, word, length) != 0) return 0;
    p->at += length;
    return 1;
}
/* A number; 0, without an error, if there is none. */
static int dfi_json_real(dfi_parser *p, double *x) {
    (void)dfi_json_take(p, ' ');
    const char *end = dfi_json_number_end(p->at, p->end);
    if (end == NULL || end - p->at > 60) return 0;
    *x = dfi_decimal(p->at, (size_t)(end - p->at));
    if (dfi_nonfinite(*x)) return 0;
    p->at += end - p->at;
    return 1;
}
/* Passes over any value, which stays as it is: nothing is decoded. Depth is counted, not
   walked by calls. */
static void dfi_json_skip(dfi_parser *p) {
    char open[32];
    int depth = 0;
    do {
        (void)dfi_json_take(p, ' ');
        char c = p->at < p->end ? *p->at : 0;
        double x;
        if (depth > 0 && c == open[depth - 1]) depth--, p->at++;
        else if (depth > 0 && (c == ',' || (c == ':' && open[depth - 1] == '}'))) p->at++;
        else if ((c == '{' || c == '[') && depth < 32)
            open[depth++] = c == '{' ? '}' : ']', p->at++;
        else if (c == '"') {
            for (p->at++; p->at < p->end && *p->at != '"'; p->at++)
                if (*p->at == '\\' && p->at + 1 < p->end) p->at++;
            if (p->at == p->end) (void)dfi_json_fail(p, "ends inside a string");
            else p->at++;
        } else if (c == '{' || c == '[') (void)dfi_json_fail(p, "nested too deep");
        else if (!dfi_json_word(p, "null") && !dfi_json_word(p, "true") &&
                 !dfi_json_word(p, "false") && !dfi_json_real(p, &x))
            (void)dfi_json_fail(p, "a value is missing");
    } while (depth > 0 && p->result == DF_OK);
}

/* One key of a configuration and the field of a descriptor that it means. */
typedef enum dfi_key_kind {
    DFI_KEY_WHOLE,    /* int */
    DFI_KEY_OR_NULL,  /* int, null for 0 */
    DFI_KEY_FLAG,     /* int of true, false */
    DFI_KEY_REAL,     /* double */
    DFI_KEY_CHOICE,   /* int: which of the names; "" stands for null */
    DFI_KEY_FIXED,    /* no field: the JSON of the one value that we know */
    DFI_KEY_SIZE,     /* two ints: null (0), one number or [height, width] */
    DFI_KEY_WHOLES,   /* int for each level */
    DFI_KEY_CHOICES,  /* the same of names */
    DFI_KEY_REALS     /* dfi_real_list: null or any number of them */
} dfi_key_kind;
typedef struct dfi_real_list {
    double *at; /* step memory; NULL: null */
    int count;
} dfi_real_list;
typedef struct dfi_config_key {
    const char *name;
    dfi_key_kind kind;
    size_t at;
    const char *names[6];
} dfi_config_key;

#define DFI_KEY(type, name, kind, field) {name, kind, offsetof(type, field), {NULL}}
static const dfi_config_key dfi_unet_keys[] = {
    {"act_fn", DFI_KEY_FIXED, 0, {"\"silu\""}},
    DFI_KEY(df_unet_desc, "add_attention", DFI_KEY_FLAG, mid_attention),
    DFI_KEY(df_unet_desc, "attention_head_dim", DFI_KEY_OR_NULL, head_dim),
    DFI_KEY(df_unet_desc, "attn_norm_num_groups", DFI_KEY_OR_NULL, attn_groups),
    DFI_KEY(df_unet_desc, "block_out_channels", DFI_KEY_WHOLES, channels),
    DFI_KEY(df_unet_desc, "center_input_sample", DFI_KEY_FLAG, center_input),
    {"class_embed_type", DFI_KEY_CHOICE, offsetof(df_unet_desc, class_kind),
     {"", "timestep", "identity"}},
    {"down_block_types", DFI_KEY_CHOICES, offsetof(df_unet_desc, down),
     {"DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"}},
    DFI_KEY(df_unet_desc, "downsample_padding", DFI_KEY_WHOLE, downsample_padding),
    {"downsample_type", DFI_KEY_CHOICE, offsetof(df_unet_desc, downsample_resnet),
     {"conv", "resnet"}},
    DFI_KEY(df_unet_desc, "dropout", DFI_KEY_REAL, dropout),
    DFI_KEY(df_unet_desc, "flip_sin_to_cos", DFI_KEY_FLAG, flip_sin_to_cos),
    DFI_KEY(df_unet_desc, "freq_shift", DFI_KEY_WHOLE, freq_shift),
    DFI_KEY(df_unet_desc, "in_channels", DFI_KEY_WHOLE, in_channels),
    DFI_KEY(df_unet_desc, "layers_per_block", DFI_KEY_WHOLE, layers),
    DFI_KEY(df_unet_desc, "mid_block_scale_factor", DFI_KEY_REAL, mid_scale),
    {"mid_block_type", DFI_KEY_FIXED, 0, {"\"UNetMidBlock2D\""}},
    DFI_KEY(df_unet_desc, "norm_eps", DFI_KEY_REAL, eps),
    DFI_KEY(df_unet_desc, "norm_num_groups", DFI_KEY_WHOLE, groups),
    DFI_KEY(df_unet_desc, "num_class_embeds", DFI_KEY_OR_NULL, classes),
    DFI_KEY(df_unet_desc, "num_train_timesteps", DFI_KEY_OR_NULL, time_rows),
    DFI_KEY(df_unet_desc, "out_channels", DFI_KEY_WHOLE, out_channels),
    {"resnet_time_scale_shift", DFI_KEY_CHOICE, offsetof(df_unet_desc, scale_shift),
     {"default", "scale_shift"}},
    DFI_KEY(df_unet_desc, "sample_size", DFI_KEY_SIZE, height),
    DFI_KEY(df_unet_desc, "time_embedding_dim", DFI_KEY_OR_NULL, time_dim),
    {"time_embedding_type", DFI_KEY_CHOICE, offsetof(df_unet_desc, time),
     {"positional", "fourier", "learned"}},
    {"up_block_types", DFI_KEY_CHOICES, offsetof(df_unet_desc, up),
     {"UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"}},
    {"upsample_type", DFI_KEY_CHOICE, offsetof(df_unet_desc, upsample_resnet),
     {"conv", "resnet"}},
    {NULL, DFI_KEY_FIXED, 0, {NULL}}
};

/* DiT's arguments, and DiTTransformer2DModel's: what either file says. */
typedef struct dfi_dit_config {
    df_dit_desc d;
    double mlp_ratio, class_dropout;
    int head_dim, out_channels;
} dfi_dit_config;
static const dfi_config_key dfi_dit_keys[] = {
    DFI_KEY(dfi_dit_config, "input_size", DFI_KEY_WHOLE, d.size),
    DFI_KEY(dfi_dit_config, "patch_size", DFI_KEY_WHOLE, d.patch),
    DFI_KEY(dfi_dit_config, "in_channels", DFI_KEY_WHOLE, d.in_channels),
    DFI_KEY(dfi_dit_config, "hidden_size", DFI_KEY_WHOLE, d.width),
    DFI_KEY(dfi_dit_config, "depth", DFI_KEY_WHOLE, d.depth),
    DFI_KEY(dfi_dit_config, "num_heads", DFI_KEY_WHOLE, d.heads),
    DFI_KEY(dfi_dit_config, "mlp_ratio", DFI_KEY_REAL, mlp_ratio),
    DFI_KEY(dfi_dit_config, "class_dropout_prob", DFI_KEY_REAL, class_dropout),
    DFI_KEY(dfi_dit_config, "num_classes", DFI_KEY_WHOLE, d.classes),
    DFI_KEY(dfi_dit_config, "learn_sigma", DFI_KEY_FLAG, d.learn_sigma),
    {NULL, DFI_KEY_FIXED, 0, {NULL}}
};
static const dfi_config_key dfi_dit_peer_keys[] = {
    {"activation_fn", DFI_KEY_FIXED, 0, {"\"gelu-approximate\""}},
    {"attention_bias", DFI_KEY_FIXED, 0, {"true"}},
    DFI_KEY(dfi_dit_config, "attention_head_dim", DFI_KEY_WHOLE, head_dim),
    {"dropout", DFI_KEY_FIXED, 0, {"0.0"}},
    DFI_KEY(dfi_dit_config, "in_channels", DFI_KEY_WHOLE, d.in_channels),
    {"norm_elementwise_affine", DFI_KEY_FIXED, 0, {"false"}},
    {"norm_eps", DFI_KEY_FIXED, 0, {"1e-05"}},
    {"norm_num_groups", DFI_KEY_FIXED, 0, {"32"}}, /* of no layer here */
    {"norm_type", DFI_KEY_FIXED, 0, {"\"ada_norm_zero\""}},
    DFI_KEY(dfi_dit_config, "num_attention_heads", DFI_KEY_WHOLE, d.heads),
    DFI_KEY(dfi_dit_config, "num_embeds_ada_norm", DFI_KEY_WHOLE, d.classes),
    DFI_KEY(dfi_dit_config, "num_layers", DFI_KEY_WHOLE, d.depth),
    DFI_KEY(dfi_dit_config, "out_channels", DFI_KEY_OR_NULL, out_channels),
    DFI_KEY(dfi_dit_config, "patch_size", DFI_KEY_WHOLE, d.patch),
    DFI_KEY(dfi_dit_config, "sample_size", DFI_KEY_WHOLE, d.size),
    {"upcast_attention", DFI_KEY_FIXED, 0, {"false"}},
    {NULL, DFI_KEY_FIXED, 0, {NULL}}
};

/* Of a scheduler only what says how the weights were trained. */
typedef struct dfi_scheduler_config {
    double beta_start, beta_end;
    int steps, schedule, prediction, variance, zero_snr;
    dfi_real_list betas;
} dfi_scheduler_config;
static const dfi_config_key dfi_scheduler_keys[] = {
    DFI_KEY(dfi_scheduler_config, "beta_end", DFI_KEY_REAL, beta_end),
    {"beta_schedule", DFI_KEY_CHOICE, offsetof(dfi_scheduler_config, schedule),
     {"linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"}},
    DFI_KEY(dfi_scheduler_config, "beta_start", DFI_KEY_REAL, beta_start),
    DFI_KEY(dfi_scheduler_config, "num_train_timesteps", DFI_KEY_WHOLE, steps),
    {"prediction_type", DFI_KEY_CHOICE, offsetof(dfi_scheduler_config, prediction),
     {"sample", "epsilon", "v_prediction"}},
    DFI_KEY(dfi_scheduler_config, "rescale_betas_zero_snr", DFI_KEY_FLAG, zero_snr),
    DFI_KEY(dfi_scheduler_config, "trained_betas", DFI_KEY_REALS, betas),
    {"variance_type", DFI_KEY_CHOICE, offsetof(dfi_scheduler_config, variance),
     {"fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned",
      "learned_range"}},
    {NULL, DFI_KEY_FIXED, 0, {NULL}}
};

/* Which of the key's names comes next; -1 if none. */
static int dfi_config_choice(dfi_parser *p, const dfi_config_key *k) {
    if (dfi_json_word(p, "null")) return k->names[0] && k->names[0][0] == 0 ? 0 : -1;
    const char *text = p->at < p->end && *p->at == '"' ? dfi_json_string(p) : NULL;
    for (int i = 0; text != NULL && i < 6 && k->names[i] != NULL; i++)
        if (strcmp(text, k->names[i]) == 0 && text[0] != 0) return i;
    return -1;
}
static int dfi_config_whole(dfi_parser *p, int *out) {
    double x;
    if (!dfi_json_real(p, &x) || x != floor(x) || fabs(x) > 1 << 30) return 0;
    *out = (int)x;
    return 1;
}
/* A list with an entry for each level, at most DF_UNET_LEVELS; its length, or 0. */
static int dfi_config_list(dfi_parser *p, const dfi_config_key *k, int *out) {
    int n = 0;
    while (dfi_json_item(p, "[]", &n)) {
        int i = n - 1;
        if (n > DF_UNET_LEVELS) return 0;
        if (k->kind == DFI_KEY_CHOICES && (out[i] = dfi_config_choice(p, k)) < 0) return 0;
        if (k->kind == DFI_KEY_WHOLES && !dfi_config_whole(p, &out[i])) return 0;
    }
    return n;
}
/* Numbers up to `end`, among which there are fewer commas. */
static int dfi_config_reals(dfi_parser *p, const char *end, dfi_real_list *out) {
    size_t room = 1;
    int n = 0;
    for (const char *c = p->at; c < end; c++) room += *c == ',';
    if (dfi_json_word(p, "null")) return 1;
    out->at = (double *)dfi_scratch(p->where->ctx, room * sizeof(double));
    if (out->at == NULL) p->result = DF_ERR_MEMORY;
    while (dfi_json_item(p, "[]", &n))
        if (!dfi_json_real(p, &out->at[n - 1])) return 0;
    out->count = n;
    return n > 0;
}
/* The value of a key, which ends at `end`, into its field; 0 if it is none that we know.
   *length: how long its list for the levels is. */
static int dfi_config_value(dfi_parser *p, const dfi_config_key *k, const char *end,
                            char *field, int *length) {
    int *out = (int *)(void *)field, n = 0;
    const size_t begin = (size_t)(p->at - p->begin);
    double x;
    switch (k->kind) {
    case DFI_KEY_OR_NULL:
        *out = 0;
        return dfi_json_word(p, "null") || dfi_config_whole(p, out);
    case DFI_KEY_WHOLE: return dfi_config_whole(p, out);
    case DFI_KEY_FLAG:
        *out = dfi_json_word(p, "true");
        return *out || dfi_json_word(p, "false");
    case DFI_KEY_REAL: return dfi_json_real(p, (double *)(void *)field);
    case DFI_KEY_CHOICE: return (*out = dfi_config_choice(p, k)) >= 0;
    case DFI_KEY_FIXED:
        if (dfi_json_word(p, k->names[0]) && p->at == end) return 1;
        p->at = p->begin + begin; /* 1e-5 is 1e-05 */
        return dfi_json_real(p, &x) && fabs(x - dfi_decimal(k->names[0],
                                                            strlen(k->names[0]))) <= 0;
    case DFI_KEY_SIZE:
        out[0] = out[1] = 0;
        if (dfi_json_word(p, "null")) return 1;
        if (dfi_config_whole(p, out)) return out[1] = out[0], 1;
        while (p->result == DF_OK && dfi_json_item(p, "[]", &n))
            if (n > 2 || !dfi_config_whole(p, &out[n - 1])) return 0;
        return n == 2;
    case DFI_KEY_REALS: return dfi_config_reals(p, end, (dfi_real_list *)(void *)field);
    default: return (*length = dfi_config_list(p, k, out)) > 0;
    }
}

static int dfi_config_find(const dfi_config_key *keys, const char *key) {
    int i = 0;
    while (keys[i].name != NULL && strcmp(keys[i].name, key) != 0) i++;
    return i;
}

/* A whole configuration into a descriptor that holds the defaults. Keys of others are
   refused, unless they begin with '_', say null or false, or `strict` is 0. *levels: how
   long the lists are; 0 if there are none. The text is decoded in place. */
static df_result dfi_config_read(const dfi_where *where, df_buffer *text,
                                 const dfi_config_key *keys, int strict, void *desc,
                                 int *levels) {
    char *begin = (char *)text->data;
    dfi_parser p = {where, NULL, begin, begin, begin + text->size, DF_OK};
    uint64_t seen = 0;
    const char *key;
    int n = 0;
    *levels = 0;
    while ((key = dfi_json_key(&p, &n)) != NULL) {
        int i = dfi_config_find(keys, key), length = 0, known = keys[i].name != NULL;
        (void)dfi_json_take(&p, ' ');
        char *value = p.at, raw[81];
        dfi_json_skip(&p);
        const char *end = p.at;
        int shown = (int)(end - value < 80 ? end - value : 80);
        snprintf(raw, sizeof raw, "%.*s", shown, value);
        if (p.result != DF_OK) break;
        if (!known && (key[0] == '_' || !strict || strcmp(raw, "null") == 0 ||
                       strcmp(raw, "false") == 0))
            continue;
        p.at = value;
        known = known && dfi_config_value(&p, &keys[i], end, (char *)desc + keys[i].at,
                                          &length) && p.at == end;
        if (!known && p.result == DF_OK)
            return dfi_error(where, 0, NULL, "the key \"%.80s\" is %s, which is not "
                             "supported", key, raw);
        if (p.result != DF_OK) break;
        if (seen >> i & 1)
            return dfi_error(where, 0, NULL, "the key \"%s\" stands twice", keys[i].name);
        seen |= (uint64_t)1 << i;
        if (length > 0 && *levels > 0 && length != *levels)
            return dfi_error(where, 0, NULL, "the key \"%s\" lists %d levels, another %d",
                             keys[i].name, length, *levels);
        if (length > 0) *levels = length;
    }
    (void)dfi_json_take(&p, ' ');
    if (p.at < p.end) dfi_json_fail(&p, "something follows the end");
    return p.result;
}

/* The text under `wanted`, or "" if the object has no such key; into out [size]. The text
   of the file stays as it is. */
static df_result dfi_config_text(const dfi_where *where, const df_buffer *text,
                                 const char *wanted, size_t size, char *out) {
    df_buffer copy = {NULL, 0, 0};
    const char *key;
    int n = 0;
    out[0] = 0;
    if (dfi_buffer_add(where->ctx, &copy, text->data, text->size)) return DF_ERR_MEMORY;
    char *begin = (char *)copy.data;
    dfi_parser p = {where, NULL, begin, begin, begin + copy.size, DF_OK};
    while ((key = dfi_json_key(&p, &n)) != NULL) {
        (void)dfi_json_take(&p, ' ');
        if (strcmp(key, wanted) != 0 || p.at == p.end || *p.at != '"') dfi_json_skip(&p);
        else if ((key = dfi_json_string(&p)) != NULL) snprintf(out, size, "%s", key);
    }
    df_buffer_free(where->ctx, &copy);
    return p.result;
}

/* ---- ... written, as json.dumps(indent=2, sort_keys=True) does ---- */

/* The fewest digits that give back the same number. */
static void dfi_put_real(df_buffer *b, double x) {
    char text[40];
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, x);
        for (char *c = text; *c != 0; c++) *c = *c == ',' ? '.' : *c;
        if (fabs(dfi_decimal(text, strlen(text)) - x) <= 0) break;
    }
    dfi_put(b, "%s%s", text, strpbrk(text, ".e") ? "" : ".0");
}
static void dfi_put_choice(df_buffer *b, const dfi_config_key *k, int i) {
    dfi_put(b, k->names[i][0] ? "\"%s\"" : "null", k->names[i]);
}
static void dfi_put_key(df_buffer *b, const dfi_config_key *k, const char *field,
                        int levels) {
    const int *in = (const int *)(const void *)field;
    dfi_put(b, ",\n  \"%s\": ", k->name);
    if (k->kind == DFI_KEY_OR_NULL && *in == 0) dfi_put(b, "null");
    else if (k->kind == DFI_KEY_WHOLE || k->kind == DFI_KEY_OR_NULL) dfi_put(b, "%d", *in);
    else if (k->kind == DFI_KEY_FLAG) dfi_put(b, *in ? "true" : "false");
    else if (k->kind == DFI_KEY_REAL)
        dfi_put_real(b, *(const double *)(const void *)field);
    else if (k->kind == DFI_KEY_CHOICE) dfi_put_choice(b, k, *in);
    else if (k->kind == DFI_KEY_FIXED) dfi_put(b, "%s", k->names[0]);
    else if (k->kind == DFI_KEY_SIZE && in[0] == in[1]) dfi_put(b, "%d", in[0]);
    else {
        int count = k->kind == DFI_KEY_SIZE ? 2 : levels;
        for (int i = 0; i < count; i++) {
            dfi_put(b, i ? ",\n    " : "[\n    ");
            if (k->kind == DFI_KEY_CHOICES) dfi_put_choice(b, k, in[i]);
            else dfi_put(b, "%d", in[i]);
        }
        dfi_put(b, "\n  ]");
    }
}
/* `name`: of the peer's class, or NULL. Room for the longest configuration is reserved. */
static df_result dfi_config_write(df_ctx *ctx, const char *name,
                                  const dfi_config_key *keys, const void *desc, int levels,
                                  df_buffer *out) {
    if (dfi_buffer_reserve(ctx, out, 1 << 14) != DF_OK) return DF_ERR_MEMORY;
    dfi_put(out, "{");
    if (name != NULL) /* the version whose format this is */
        dfi_put(out, ",\n  \"_class_name\": \"%s\",\n  \"_diffusers_version\": "
                "\"0.40.0.dev0\"", name);
    for (int i = 0; keys[i].name != NULL; i++)
        dfi_put_key(out, &keys[i], (const char *)desc + keys[i].at, levels);
    memmove(out->data + 1, out->data + 2, --out->size - 1); /* the first comma */
    dfi_put(out, "\n}\n");
    return DF_OK;
}

/* ---- ... and the nets they describe ---- */

/* A value out of range is a caller's mistake in a descriptor, a fault of a file here. */
static df_result dfi_config_checked(const dfi_where *at, df_result result) {
    return result != DF_ERR_ARGUMENT
               ? result : dfi_error(at, DF_ERR_FORMAT, NULL, "%.240s", at->ctx->message);
}
/* The plan that a configuration is; what a key leaves out is the peer's default. */
static df_result dfi_config_unet(const dfi_where *at, df_buffer *text, df_unet_desc *d,
                                 dfi_net_plan *plan) {
    int levels;
    *d = df_unet_defaults();
    df_result result = dfi_config_read(at, text, dfi_unet_keys, 1, d, &levels);
    if (levels > 0) d->levels = levels;
    *plan = dfi_unet_plan(d);
    return result != DF_OK ? result : dfi_config_checked(at, dfi_unet_check(at->ctx, d));
}
static df_result dfi_config_dit(const dfi_where *at, df_buffer *text, int peer,
                                dfi_dit_config *c, dfi_net_plan *plan) {
    int levels;
    df_dit_desc *d = &c->d;
    memset(c, 0, sizeof *c);
    *d = df_dit_defaults();
    c->mlp_ratio = 4, c->class_dropout = .1, c->head_dim = 72;
    df_result result =
        dfi_config_read(at, text, peer ? dfi_dit_peer_keys : dfi_dit_keys, 1, c, &levels);
    if (result != DF_OK) return result;
    if (peer) {
        if (c->out_channels == 0) c->out_channels = d->in_channels;
        if (!dfi_net_range(at->ctx, "attention_head_dim", c->head_dim, 1, 1 << 14) ||
            !dfi_net_range(at->ctx, "num_attention_heads", d->heads, 1, 1 << 14))
            return dfi_config_checked(at, DF_ERR_ARGUMENT);
        if (c->out_channels != d->in_channels && c->out_channels != 2 * d->in_channels)
            return dfi_error(at, 0, NULL, "the key \"out_channels\" is %d, neither %d nor "
                             "twice that", c->out_channels, d->in_channels);
        d->learn_sigma = c->out_channels != d->in_channels;
        d->width = d->heads * c->head_dim;
        d->diffusers = 1;
    } else {
        if (!(c->mlp_ratio > 0 && c->mlp_ratio < 64))
            return dfi_error(at, 0, NULL, "the key \"mlp_ratio\" is %g", c->mlp_ratio);
        d->null_class = c->class_dropout > 0;
        if (d->width > 0 && d->width < 1 << 20)
            d->mlp_width = (int)(d->width * c->mlp_ratio + 1e-6); /* ratios are rounded */
    }
    *plan = dfi_dit_plan(d);
    if (peer) plan->naming = DFI_NAMES_DIFFUSERS;
    return dfi_config_checked(at, dfi_dit_check(at->ctx, d));
}

/* The names that a net's parameters have in a file, sorted; step memory. */
typedef struct dfi_key_list {
    const char **name;
    size_t count;
} dfi_key_list;
static df_result dfi_net_keys(df_ctx *ctx, const df_net *net, dfi_key_list *out) {
    enum { KEY = DFI_NET_NAME + 64 };
    size_t most = 3 * (size_t)net->count;
    char *keys = (char *)dfi_scratch(ctx, dfi_mul(most, KEY));
    out->name = (const char **)dfi_scratch(ctx, dfi_mul(most, sizeof *out->name));
    out->count = 0;
    if (keys == NULL || out->name == NULL) return DF_ERR_MEMORY;
    for (int i = 0; i < net->count; i++)
        for (int part = 0, parts = 1; part < parts; part++) {
            char *key = keys + out->count * KEY;
            parts = dfi_net_key(net->naming, net->param[i].name, part, key);
            if (parts > 0) out->name[out->count++] = key;
        }
    dfi_sort(out->name, out->count, sizeof *out->name, dfi_by_name);
    return DF_OK;
}
static int dfi_has_key(const dfi_key_list *keys, const char *name) {
    return bsearch(&name, keys->name, keys->count, sizeof name, dfi_by_name) != NULL;
}

/* Block 0's name of what Transformer2DModel repeats in each block, into first; 0 if the
   name is none of those of blocks 1 to depth - 1. */
static int dfi_repeated(const char *name, int depth, char first[DFI_NET_NAME + 64]) {
    char again[DFI_NET_NAME + 64];
    int block = 0, length = 0;
    if (sscanf(name, "transformer_blocks.%9d.norm1.emb.%n", &block, &length) < 1 ||
        length == 0 || block < 1 || block >= depth || strlen(name) >= DFI_NET_NAME)
        return 0;
    snprintf(again, sizeof again, "transformer_blocks.%d.norm1.emb.%s", block,
             name + length);
    snprintf(first, DFI_NET_NAME + 64, "transformer_blocks.0.norm1.emb.%s", name + length);
    return strcmp(again, name) == 0;
}

/* Every tensor of the file must be a part of the net. Transformer2DModel has the embedding
   of time and class in each block; we hold one, so they must be equal. */
static df_result dfi_net_leftover(const dfi_net_file *f, const df_net *net,
                                  const dfi_key_list *keys, const df_file_tensor *t) {
    char first[DFI_NET_NAME + 64];
    const df_file_tensor *same = NULL;
    if (dfi_has_key(keys, t->name)) return DF_OK;
    if (net->naming == DFI_NAMES_DIFFUSERS &&
        dfi_repeated(t->name, dfi_dit_of(net).depth, first) && dfi_has_key(keys, first))
        same = df_safetensors_find(f->file, first);
    if (same == NULL)
        return dfi_fail(f->ctx, DF_ERR_FORMAT, "%s: %.160s: tensor '%.160s' is no part of "
                        "the network that its configuration says", f->function, f->name,
                        t->name);
    if (same->dtype == t->dtype && t->dtype != DF_DTYPE_COUNT && same->count == t->count &&
        memcmp(same->bytes, t->bytes,
               t->count * (size_t)dfi_dtypes[t->dtype].bits / 8) == 0)
        return DF_OK;
    return dfi_fail(f->ctx, DF_ERR_UNSUPPORTED, "%s: %.160s: '%.160s' differs from block "
                    "0's: blocks with embeddings of their own are not supported",
                    f->function, f->name, t->name);
}

/* The card of networks of denoising diffusion: a table of betas, t = 0 .. T - 1. */
static df_result dfi_card_of(df_ctx *ctx, const dfi_scheduler_config *c, df_net *net) {
    static const df_prediction predictions[3] = {DF_X0, DF_EPS, DF_V};
    static const df_betas_kind kinds[4] = {DF_BETAS_LINEAR, DF_BETAS_SCALED_LINEAR,
                                           DF_BETAS_COSINE, DF_BETAS_SIGMOID};
    df_card card = df_card_defaults();
    df_scope mark = dfi_scratch_mark(ctx);
    double *betas = NULL, total = 0;
    df_result result = DF_ERR_ARGUMENT;
    int T = c->betas.at != NULL ? c->betas.count : c->steps;
    if (dfi_net_range(ctx, "num_train_timesteps", T, 1, 1 << 20)) {
        betas = (double *)dfi_scratch(ctx, 2 * (size_t)T * sizeof *betas);
        result = betas == NULL ? (df_result)DF_ERR_MEMORY
                 : c->betas.at != NULL
                     ? (df_result)DF_OK
                     : df_betas(ctx, kinds[c->schedule], c->beta_start, c->beta_end, T,
                                betas);
    }
    for (int i = 0; result == DF_OK && c->betas.at != NULL && i < T; i++) {
        betas[i] = c->betas.at[i];
        if (!(betas[i] >= 0 && betas[i] <= 1))
            result = dfi_fail(ctx, DF_ERR_ARGUMENT, "trained_betas: number %d is %g, "
                              "wanted 0 to 1", i, betas[i]);
    }
    if (result == DF_OK && c->zero_snr) result = df_betas_zero_snr(ctx, T, betas);
    for (int i = 0; result == DF_OK && i < T; i++)
        betas[T + i] = total += betas[i] < 1 ? log1p(-betas[i]) : -dfi_infinity(1);
    card.process.kind = DF_PROCESS_TABLE;
    card.process.table_size = T;
    card.process.log_abar = betas ? betas + T : NULL;
    card.prediction = predictions[c->prediction];
    card.time = df_time_index(T);
    card.learned = net->card.learned;
    if (c->variance > 3 && net->outputs == 2 * net->shape[0])
        card.learned = c->variance == 4 ? DF_LEARNED_VARIANCE : DF_LEARNED_RANGE;
    if (result == DF_OK) result = df_net_set_card(ctx, net, &card);
    dfi_scratch_release(ctx, mark);
    return result;
}

/* A text from a source, whole. */
static df_result dfi_config_load(dfi_where *at, df_source source, df_buffer *text) {
    at->file = dfi_source_name(&source);
    df_result result = dfi_source_load(at, source, 1 << 20, text);
    if (result == DF_OK && text->size == 0)
        result = dfi_error(at, 0, NULL, "a configuration of 0 bytes");
    return result;
}

/* diffusers' schedulers that go by betas, with what they say where the file does not; ""
   if it does not name one. The last row that fits counts. */
static int dfi_scheduler_known(const char *name, dfi_scheduler_config *c) {
    static const struct {
        const char *first;
        double start, end;
        int schedule;
    } rows[] = {{"DDPM", .0001, .02, 0}, {"DDIM", .0001, .02, 0},
                {"PNDM", .0001, .02, 0}, {"DPMSolver", .0001, .02, 0},
                {"Euler", .0001, .02, 0}, {"LMS", .0001, .02, 0},
                {"DEIS", .0001, .02, 0}, {"UniPC", .0001, .02, 0},
                {"SASolver", .0001, .02, 0}, {"KDPM2", .00085, .012, 0},
                {"Heun", .00085, .012, 0}, {"DPMSolverSDE", .00085, .012, 0},
                {"LCM", .00085, .012, 1}, {"TCD", .00085, .012, 1}};
    int known = name[0] == 0;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (strncmp(name, rows[i].first, strlen(rows[i].first)) == 0) {
            known = 1;
            c->beta_start = rows[i].start, c->beta_end = rows[i].end;
            c->schedule = rows[i].schedule;
        }
    return known;
}
static df_result dfi_scheduler_load(df_ctx *ctx, const df_source *source, df_net *net) {
    dfi_where at = {ctx, "df_net_load_config", "", DF_ERR_FORMAT};
    dfi_scheduler_config c = {.0001, .02, 1000, 0, 1, 0, 0, {NULL, 0}};
    char name[64];
    df_buffer text = {NULL, 0, 0};
    int levels;
    df_result result = DF_OK;
    df_scope mark = dfi_scratch_mark(ctx);
    if (source != NULL) result = dfi_config_load(&at, *source, &text);
    if (source != NULL && result == DF_OK)
        result = dfi_config_text(&at, &text, "_class_name", sizeof name, name);
    if (source != NULL && result == DF_OK && !dfi_scheduler_known(name, &c))
        result = dfi_error(&at, 0, NULL, "the key \"_class_name\" is \"%s\": only "
                           "schedulers of a table of betas are known (DDPM, DDIM, DPM, "
                           "Euler, ...)", name);
    if (source != NULL && result == DF_OK)
        result = dfi_config_read(&at, &text, dfi_scheduler_keys, 0, &c, &levels);
    df_buffer_free(ctx, &text);
    if (result == DF_OK) result = dfi_card_of(ctx, &c, net);
    if (result == DF_ERR_ARGUMENT)
        result = dfi_error(&at, DF_ERR_FORMAT, NULL, "%.240s", ctx->message);
    dfi_scratch_release(ctx, mark);
    return result;
}

/* What only we can say of weights stands as strings beside them: the data's scaling, and a
   card that is no table of betas. Other cards are the scheduler's. */
static df_result dfi_net_words(const dfi_net_file *f, const df_source *scheduler,
                               df_net *net) {
    double both[2];
    if (df_safetensors_metadata(f->file, "data.scaling") != NULL &&
        (dfi_net_numbers(f, "data.scaling", 2, 2, both) < 0 ||
         df_net_set_scaling(f->ctx, net, 1, &both[0], &both[1]) != DF_OK))
        return f->ctx->code;
    return df_safetensors_metadata(f->file, "process") != NULL
               ? dfi_net_read_card(f, net)
               : dfi_scheduler_load(f->ctx, scheduler, net);
}

/* Builds the net of a plan from its weights. Ours say whether the last class of a UNet's
   table means "none"; the configuration of others cannot. */
static df_net *dfi_net_load_plan(df_ctx *ctx, dfi_net_plan *plan, df_unet_desc *unet,
                                 df_source weights, const df_source *scheduler) {
    dfi_net_file f = dfi_net_open(ctx, "df_net_load_config", weights);
    df_net *net = NULL;
    int bad = 0;
    if (f.file == NULL) return NULL;
    for (int i = 0; i < df_safetensors_count(f.file); i++)
        if (strstr(df_safetensors_at(f.file, i)->name, ".query.weight"))
            plan->naming = DFI_NAMES_OLD;
    if (unet->classes > 1 && df_safetensors_metadata(f.file, "null_class"))
        unet->classes--, unet->null_class = 1;
    plan->from = f.file;
    net = dfi_net_new(ctx, plan);
    df_scope mark = dfi_scratch_mark(ctx);
    dfi_key_list keys;
    bad = net != NULL && dfi_net_keys(ctx, net, &keys) != DF_OK;
    for (int i = 0; net != NULL && !bad && i < df_safetensors_count(f.file); i++)
        bad = dfi_net_leftover(&f, net, &keys, df_safetensors_at(f.file, i)) != DF_OK;
    bad = bad || (net != NULL && dfi_net_words(&f, scheduler, net) != DF_OK);
    dfi_scratch_release(ctx, mark);
    if (net == NULL && ctx->code == DF_ERR_ARGUMENT)
        dfi_fail(ctx, DF_ERR_FORMAT, "%s: %.200s: %.240s", f.function, f.name,
                 ctx->message);
    df_safetensors_close(f.file);
    if (bad) df_net_free(net);
    return bad ? NULL : net;
}

DF_API df_net *df_net_load_config(df_ctx *ctx, df_source config, df_source weights,
                                  const df_source *scheduler) {
    dfi_where at = {ctx, "df_net_load_config", "", DF_ERR_FORMAT};
    df_buffer text = {NULL, 0, 0};
    char name[64];
    df_unet_desc unet = df_unet_defaults();
    dfi_dit_config dit;
    dfi_net_plan plan = dfi_unet_plan(&unet);
    if (ctx == NULL) return NULL;
    df_result result = dfi_config_load(&at, config, &text);
    if (result == DF_OK)
        result = dfi_config_text(&at, &text, "_class_name", sizeof name, name);
    if (result == DF_OK && strcmp(name, "UNet2DModel") == 0)
        result = dfi_config_unet(&at, &text, &unet, &plan);
    else if (result == DF_OK && (name[0] == 0 || strstr(name, "Transformer2DModel")))
        result = dfi_config_dit(&at, &text, name[0] != 0, &dit, &plan);
    else if (result == DF_OK)
        result = dfi_error(&at, 0, NULL, "the key \"_class_name\" is \"%s\": UNet2DModel, "
                           "DiTTransformer2DModel or DiT's arguments are known", name);
    df_buffer_free(ctx, &text);
    if (result != DF_OK) return NULL;
    return dfi_net_load_plan(ctx, &plan, &unet, weights, scheduler);
}

/* ---- folders ---- */

/* folder/name in step memory. */
static char *dfi_path_in(df_ctx *ctx, const char *folder, const char *name) {
    size_t size = dfi_plus(strlen(folder), strlen(name) + 2);
    char *path = (char *)dfi_scratch(ctx, size);
    if (path != NULL) snprintf(path, size, "%s/%s", folder, name);
    return path;
}
/* The first of the names, ended by NULL, that can be opened; else the first. */
static char *dfi_path_of(df_ctx *ctx, const char *folder, const char *const *names,
                         int *found) {
    char *first = dfi_path_in(ctx, folder, names[0]);
    *found = 0;
#ifndef DIFFUSION_NO_STDIO
    for (int i = 0; first != NULL && names[i] != NULL; i++) {
        char *path = dfi_path_in(ctx, folder, names[i]);
        errno = 0;
        FILE *file = path != NULL ? fopen(path, "rb") : NULL;
        if (file != NULL) fclose(file);
        *found = file != NULL || (errno != ENOENT && errno != ENOTDIR);
        if (*found) return path; /* what is there and cannot be read is said later */
    }
#endif
    return first;
}

static const char *const dfi_folder_config[] = {"config.json", NULL};
static const char *const dfi_folder_weights[] = {"diffusion_pytorch_model.safetensors",
                                                 "model.safetensors", NULL};
static const char *const dfi_folder_scheduler[] = {
    "scheduler_config.json", "../scheduler/scheduler_config.json", NULL};

DF_API df_net *df_net_load_folder(df_ctx *ctx, const char *folder) {
    df_net *net = NULL;
    int found;
    if (ctx == NULL) return NULL;
    if (folder == NULL || folder[0] == 0) {
        dfi_fail(ctx, DF_ERR_ARGUMENT, "df_net_load_folder: the folder is NULL or \"\"");
        return NULL;
    }
    df_scope mark = dfi_scratch_mark(ctx);
    char *config = dfi_path_of(ctx, folder, dfi_folder_config, &found);
    char *weights = dfi_path_of(ctx, folder, dfi_folder_weights, &found);
    char *scheduler = dfi_path_of(ctx, folder, dfi_folder_scheduler, &found);
    if (config != NULL && weights != NULL && scheduler != NULL) {
        df_source third = df_source_path(scheduler);
        net = df_net_load_config(ctx, df_source_path(config), df_source_path(weights),
                                 found ? &third : NULL);
    }
    dfi_scratch_release(ctx, mark);
    return net;
}

/* The configuration of a net as its own library writes it. */
static df_result dfi_net_config(df_ctx *ctx, const df_net *net, df_buffer *out) {
    if (strcmp(net->kind, "unet") == 0) {
        df_unet_desc d = dfi_unet_of(net);
        d.classes += d.null_class;
        return dfi_config_write(ctx, "UNet2DModel", dfi_unet_keys, &d, d.levels, out);
    }
    dfi_dit_config c;
    memset(&c, 0, sizeof c);
    df_dit_desc *d = &c.d;
    *d = dfi_dit_of(net);
    c.class_dropout = d->null_class ? .1 : 0;
    c.mlp_ratio = d->mlp_width > 0 ? (double)d->mlp_width / d->width : 4;
    c.head_dim = d->width / d->heads;
    c.out_channels = net->outputs;
    return dfi_config_write(ctx, d->diffusers ? "DiTTransformer2DModel" : NULL,
                            d->diffusers ? dfi_dit_peer_keys : dfi_dit_keys, &c, 0, out);
}

/* The weights under construction as a file: the average if there is one. */
typedef struct dfi_export {
    df_save_tensor *list;
    char (*keys)[DFI_NET_NAME + 64];
    int count;
} dfi_export;
static char *dfi_export_add(dfi_export *e, const df_param *p, int parts,
                            const df_real *data) {
    int shape[DF_AXES];
    memcpy(shape, p->shape, sizeof shape);
    shape[0] /= parts;
    dfi_save_add(&e->list[e->count], e->keys[e->count], p->ndim, shape, data, 0);
    e->list[e->count].dtype = DF_DTYPE_F32;
    return e->keys[e->count++];
}
/* One parameter, each part under the peer's name; what Transformer2DModel repeats in each
   block, for each of `blocks`. */
static void dfi_export_param(dfi_export *e, const df_net *net, const df_param *p,
                             dfi_naming naming, int blocks) {
    static const char first[] = "transformer_blocks.0.norm1.emb.";
    const df_real *w = net->average != NULL ? net->average : net->weights;
    for (int part = 0, parts = 1; part < parts; part++) {
        parts = dfi_net_key(naming, p->name, part, e->keys[e->count]);
        if (parts == 0) return;
        const df_real *data = w + p->offset + p->size / (size_t)parts * (size_t)part;
        const char *key = dfi_export_add(e, p, parts, data);
        for (int i = 1; i < blocks && strncmp(key, first, sizeof first - 1) == 0; i++) {
            snprintf(e->keys[e->count], sizeof e->keys[0],
                     "transformer_blocks.%d.norm1.emb.%.150s", i, key + sizeof first - 1);
            dfi_export_add(e, p, 1, data);
        }
    }
}
static df_result dfi_net_export(df_ctx *ctx, const df_net *net, dfi_naming naming,
                                df_sink sink) {
    int unet = strcmp(net->kind, "unet") == 0, blocks = unet ? 0 : dfi_dit_of(net).depth;
    size_t room = 3 * (size_t)net->count + 5 * (size_t)blocks;
    dfi_texts *s = dfi_texts_new(ctx);
    dfi_export e;
    e.count = 0;
    e.list = (df_save_tensor *)dfi_scratch(ctx, dfi_mul(room, sizeof *e.list));
    e.keys = (char(*)[DFI_NET_NAME + 64])dfi_scratch(ctx, dfi_mul(room, sizeof *e.keys));
    if (s == NULL || e.list == NULL || e.keys == NULL) return DF_ERR_MEMORY;
    if (net->card.process.kind == DF_PROCESS_TABLE) dfi_text_add(s, "format", "%s", "pt");
    else dfi_net_texts(net, s); /* no scheduler says what we do */
    s->item[0].value = "pt";
    if (unet && net->null_class) dfi_text_add(s, "null_class", "%s", "1");
    if (net->scaling_size == 1)
        dfi_text_add(s, "data.scaling", "%.17g %.17g", net->scaling[0], net->scaling[1]);
    for (int i = 0; i < net->count; i++)
        dfi_export_param(&e, net, &net->param[i], naming, blocks);
    return df_safetensors_write(ctx, sink, e.list, e.count, s->item, s->count);
}

/* A scheduler's configuration with the table's own betas. */
static df_result dfi_scheduler_config_write(df_ctx *ctx, const df_net *net,
                                            df_buffer *out) {
    const df_card *card = &net->card;
    const char *name = card->prediction == DF_EPS ? "epsilon"
                     : card->prediction == DF_X0  ? "sample"
                     : card->prediction == DF_V   ? "v_prediction" : NULL;
    int T = card->process.table_size;
    double before = 0;
    if (card->process.kind != DF_PROCESS_TABLE || name == NULL) return DF_OK;
    if (dfi_buffer_reserve(ctx, out, dfi_plus(1024, dfi_mul(40, (size_t)T))))
        return DF_ERR_MEMORY;
    dfi_put(out, "{\n  \"_class_name\": \"DDPMScheduler\",\n"
            "  \"num_train_timesteps\": %d,\n  \"prediction_type\": \"%s\",\n"
            "  \"variance_type\": \"%s\",\n"
            "  \"clip_sample\": false,\n  \"trained_betas\": [", T, name,
            card->learned == DF_LEARNED_RANGE      ? "learned_range"
            : card->learned == DF_LEARNED_VARIANCE ? "learned" : "fixed_small");
    for (int i = 0; i < T; i++) {
        double now = net->log_abar[i];
        dfi_put(out, i ? ",\n    " : "\n    ");
        dfi_put_real(out, dfi_nonfinite(now) ? 1 : -expm1(now - before));
        before = now;
    }
    dfi_put(out, "\n  ]\n}\n");
    return DF_OK;
}

/* One text file of a folder; nothing if there is no text. */
static df_result dfi_folder_put(df_ctx *ctx, const char *folder, const char *name,
                                const df_buffer *text) {
    char *path = dfi_path_in(ctx, folder, name);
    dfi_where at = {ctx, "df_net_save_folder", path, DF_ERR_IO};
    if (path == NULL) return DF_ERR_MEMORY;
#ifndef DIFFUSION_NO_STDIO
    if (text->size == 0) (void)remove(path);
#endif
    if (text->size == 0) return DF_OK;
    return dfi_sink_save(&at, df_sink_path(path), text);
}

static int dfi_same_time(const df_time *a, const df_time *b) {
    return a->kind == b->kind && dfi_same_numbers(&a->a, &b->a, 1) &&
           dfi_same_numbers(&a->b, &b->b, 1);
}
/* What a folder could not give back is refused, not lost. */
static df_result dfi_net_folder_fits(df_ctx *ctx, const df_net *net) {
    const df_card *c = &net->card;
    df_time index = df_time_index(c->process.table_size), own = df_time_own();
    const char *wrong = NULL;
    if (strcmp(net->kind, "dit") == 0) {
        df_dit_desc d = dfi_dit_of(net);
        if (d.diffusers && d.mlp_width != 0 && d.mlp_width != 4 * d.width)
            wrong = "mlp_width is 4 width in DiTTransformer2DModel";
        if (d.diffusers && !d.null_class)
            wrong = "DiTTransformer2DModel always has a null_class";
    }
    if (net->scaling_size > 1) wrong = "data scaled in each dimension by itself";
    if (c->process.kind == DF_PROCESS_TABLE &&
        ((c->prediction != DF_EPS && c->prediction != DF_X0 && c->prediction != DF_V) ||
         !dfi_same_time(&c->time, &index) || !dfi_same_time(&c->clock, &own) ||
         c->input_sigma_data > 0 ||
         c->learned == DF_LEARNED_LOG_VARIANCE))
        wrong = "a card that no scheduler has: of a table they know eps, x_0 and v at "
                "indices";
    if (wrong == NULL) return DF_OK;
    return dfi_fail(ctx, DF_ERR_UNSUPPORTED, "df_net_save_folder: net '%s': %s: use "
                    "df_net_save", net->kind, wrong);
}

DF_API df_result df_net_save_folder(df_ctx *ctx, const df_net *net, const char *folder) {
    df_buffer config = {NULL, 0, 0}, scheduler = {NULL, 0, 0};
    if (ctx == NULL) return DF_ERR_ARGUMENT;
    df_result result = dfi_net_missing(ctx, net, "df_net_save_folder");
    if (result == DF_OK && (folder == NULL || folder[0] == 0))
        result = dfi_fail(ctx, DF_ERR_ARGUMENT,
                          "df_net_save_folder: the folder is NULL or \"\"");
    if (result == DF_OK && (net->row == NULL || (strcmp(net->kind, "unet") != 0 &&
                                                 strcmp(net->kind, "dit") != 0)))
        result = dfi_fail(ctx, DF_ERR_UNSUPPORTED, "df_net_save_folder: net '%s' has no "
                          "form of others: use df_net_save", net->kind);
    if (result == DF_OK) result = dfi_net_folder_fits(ctx, net);
    if (result == DF_OK) result = dfi_net_finite(ctx, net, "df_net_save_folder");
    if (result != DF_OK) return result;
#if defined(DFI_POSIX) && !defined(DIFFUSION_NO_STDIO)
    (void)mkdir(folder, 0777); /* it may be there */
#endif
    df_scope mark = dfi_scratch_mark(ctx);
    int peer = strcmp(net->kind, "dit") == 0 && dfi_dit_of(net).diffusers;
    int own = strcmp(net->kind, "dit") == 0 && !peer;
    char *path = dfi_path_in(ctx, folder, dfi_folder_weights[own]);
    if (path == NULL) result = DF_ERR_MEMORY;
    if (result == DF_OK) result = dfi_net_config(ctx, net, &config);
    if (result == DF_OK) result = dfi_scheduler_config_write(ctx, net, &scheduler);
    if (result == DF_OK) result = dfi_folder_put(ctx, folder, "config.json", &config);
    if (result == DF_OK)
        result = dfi_folder_put(ctx, folder, "scheduler_config.json", &scheduler);
    if (result == DF_OK)
        result = dfi_net_export(ctx, net, peer ? DFI_NAMES_DIFFUSERS : DFI_NAMES_OWN,
                                df_sink_path(path));
    dfi_scratch_release(ctx, mark);
    df_buffer_free(ctx, &config);
    df_buffer_free(ctx, &scheduler);
    return result;
}

/* =====================================================================================
   // >>closed forms: Gaussian mixtures at every t, distances between samples

   A mixture is data whose diffusion is known exactly, in any dimension. Let x_0 come from
   sum_k w_k N(mu_k, S_k). Then x = alpha x_0 + sigma eps has the density
       p_t = sum_k w_k N(M_k, C_k),   M_k = alpha mu_k,   C_k = alpha^2 S_k + sigma^2 I,
   and with r_k(x) the probability that x came from component k, u_k = C_k^-1 (x - M_k),
       grad log p_t = -sum_k r_k u_k,   E[x_0|x] = sum_k r_k (mu_k + alpha S_k u_k)
   (Bishop 2006, eqs. 2.113-2.117). With S_k = Q L Q^T every answer is sum_k r_k y_k,
       y_k = a mu_k + Q diag((a alpha L + b)/(alpha^2 L + sigma^2)) Q^T (x - M_k):
   a = 1, b = 0 gives E[x_0|x]; a = 0, b = -1 the score; a prediction A x_0 + B eps has
   a = A, b = B sigma. Neither alpha nor sigma divides: both ends are ordinary points.
   ===================================================================================== */
enum { DFI_DRAW_COMPONENT = 0x4105ed00, DFI_DRAW_WITHIN, DFI_DRAW_DIRECTION };
struct df_mixture {
    df_ctx *ctx;                       /* whose memory this is */
    size_t size, K, dim;               /* size: of the allocation, arrays included */
    double *log_weight, *mean;         /* [K], [K, dim] */
    double *value, *axis, *spare;      /* L [K, dim], Q^T [K, dim, dim], [dim, dim] */
};

/* Checks and stores component k. What rounding leaves of a zero eigenvalue must be zero,
   or a singular covariance would pass for one with an inverse. */
static df_result dfi_mixture_take(df_ctx *ctx, df_mixture *m, size_t k, double weight,
                                  const double *mean, const double *S) {
    static const char said[] = "df_mixture_create: component %d: %s %.6g";
    size_t d = m->dim, i;
    double *a = m->spare, sum = weight, norm = 0.0, skew = 0.0, noise = 0.0;
    for (i = 0; i < d; i++) sum += m->mean[k * d + i] = mean[i];
    for (i = 0; i < d * d; i++) {
        a[i] = 0.5 * S[i] + 0.5 * S[i % d * d + i / d];
        norm += fabs(S[i]);
        skew += fabs(S[i] - a[i]);
    }
    if (dfi_nonfinite(sum + norm))
        return dfi_fail(ctx, DF_ERR_NONFINITE, said, (int)k, "sum of numbers", sum + norm);
    if (weight <= 0.0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, said, (int)k, "weight not above 0:", weight);
    if (skew > 1e-12 * norm)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, said, (int)k, "S not symmetric, by", skew);
    if (dfi_jacobi(d, 1e-20 * norm, a, m->axis + k * d * d))
        noise = 8.0 * DBL_EPSILON * norm;
    for (i = 0; i < d; i++) {
        double l = a[i * d + i];
        if (l < -1e-12 * norm)
            return dfi_fail(ctx, DF_ERR_ARGUMENT, said, (int)k, "S has eigenvalue", l);
        m->value[k * d + i] = l > noise ? l : 0.0;
    }
    return DF_OK;
}

DF_API df_mixture *df_mixture_create(df_ctx *ctx, int K, int dim, const double *weights,
                                     const double *means, const double *covariances) {
    size_t n = (size_t)K, d = (size_t)dim, dd = dfi_mul(d, d), size, k;
    double sum = 0.0, *w;
    df_mixture *m;
    if (!ctx || K < 1 || dim < 1 || !weights || !means || !covariances) {
        dfi_fail(ctx, DF_ERR_ARGUMENT, "df_mixture_create: K = %d and dim = %d must be "
                 "at least 1, no array NULL", K, dim);
        return NULL;
    }
    size = dfi_plus(dfi_mul(n, 1 + 2 * d), dfi_mul(n + 1, dd));
    size = dfi_plus(sizeof *m, dfi_mul(size, sizeof(double)));
    m = (df_mixture *)dfi_new(ctx, size);
    if (m == NULL) return NULL;
    w = (double *)(void *)(m + 1);
    df_mixture made = { ctx, size, n, d, w, w + n, w + n + n * d, w + n + 2 * n * d,
                        w + n + 2 * n * d + n * dd };
    *m = made;
    for (k = 0; k < n; k++) {
        sum += weights[k] / K;                 /* the mean: no sum to overflow */
        if (dfi_mixture_take(ctx, m, k, weights[k], means + k * d, covariances + k * dd)) {
            df_mixture_free(m);
            return NULL;
        }
    }
    for (k = 0; k < n; k++) w[k] = log(weights[k]) - log(sum) - log(K);
    return m;
}
DF_API void df_mixture_free(df_mixture *mixture) {
    if (mixture != NULL) dfi_delete(mixture->ctx, mixture, mixture->size);
}
DF_API df_mixture *df_mixture_ring(df_ctx *ctx, int K, double radius, double deviation) {
    df_scope mark = dfi_scratch_mark(ctx);
    size_t n = K > 0 ? (size_t)K : 0;
    double *w = (double *)dfi_scratch(ctx, dfi_mul(n, 7 * sizeof(double)));
    df_mixture *m = NULL;
    for (size_t k = 0; k < n && w != NULL; k++) {
        double angle = 2.0 * DFI_PI * (double)k / K, *mean = w + n + 2 * k;
        double S[4] = { deviation * deviation, 0.0, 0.0, deviation * deviation };
        w[k] = 1.0;
        mean[0] = radius * cos(angle);
        mean[1] = radius * sin(angle);
        memcpy(w + 3 * n + 4 * k, S, sizeof S);
    }
    if (w != NULL) m = df_mixture_create(ctx, K, 2, w, w + n, w + 3 * n);
    dfi_scratch_release(ctx, mark);
    return m;
}

/* ---- questions to a mixture ---- */
typedef struct dfi_mixture_job {
    const df_mixture *m;
    const df_point *at;
    double a, b;                       /* of the answer, see above */
    int ask, n;                        /* DF_ASK_..., or 0: draw samples */
    const df_real *x, *v;              /* [n, dim]; v for Jacobians, else NULL */
    df_real *out, *covariance;         /* [n, dim], [n, dim, dim] or NULL */
    uint64_t seed, first;              /* of samples */
} dfi_mixture_job;
static double dfi_mixture_variance(const dfi_mixture_job *job, size_t e) {
    double alpha = job->at->alpha, sigma = job->at->sigma;
    return alpha * alpha * job->m->value[e] + sigma * sigma;
}

/* Of component k at x: log w_k N(x; M_k, C_k), returned; y = y_k; for Jacobians g =
   (dy_k/dx) v and uv = u_k . v, all [dim] but uv. s [3, dim] is scratch. */
static double dfi_mixture_component(const dfi_mixture_job *job, size_t k,
        const df_real *x, const df_real *v, double *y, double *g, double *uv, double *s) {
    size_t d = job->m->dim, i;
    const double *mean = job->m->mean + k * d, *axis = job->m->axis + k * d * d;
    double alpha = job->at->alpha, log_p = job->m->log_weight[k], *z = s + d, *t = z + d;
    for (i = 0; i < d; i++) s[i] = (double)x[i] - alpha * mean[i];
    dfi_turn(d, axis, 1, s, z);
    for (i = 0; i < d; i++) s[i] = (double)v[i];
    dfi_turn(d, axis, 1, s, t);
    for (i = 0, *uv = 0.0; i < d; i++) {
        double c = dfi_mixture_variance(job, k * d + i);
        double gain = (job->a * alpha * job->m->value[k * d + i] + job->b) / c;
        log_p -= 0.5 * (log(2.0 * DFI_PI * c) + z[i] * z[i] / c);
        *uv += z[i] * t[i] / c;
        z[i] *= gain;
        t[i] *= gain;
    }
    dfi_turn(d, axis, 0, z, y);
    dfi_turn(d, axis, 0, t, g);
    for (i = 0; i < d; i++) y[i] += job->a * mean[i];
    return log_p;
}

/* Cov[x_0|x]: sigma^2 S_k C_k^-1 within the components, and the spread of their means. */
static void dfi_mixture_covariance(const dfi_mixture_job *job, const double *r,
                                   const double *y, const double *mean, df_real *out) {
    size_t d = job->m->dim;
    double s2 = job->at->sigma * job->at->sigma;
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < d; j++) {
            double sum = 0.0;
            for (size_t e = 0; e < job->m->K * d; e++) {
                const double *q = job->m->axis + e * d, *yk = y + e / d * d;
                double c = job->m->value[e] * s2 / dfi_mixture_variance(job, e);
                double spread = e % d == 0 ? (yk[i] - mean[i]) * (yk[j] - mean[j]) : 0.0;
                sum += r[e / d] * (c * q[i] * q[j] + spread);
            }
            out[i * d + j] = (df_real)sum;
        }
}

/* Sample `row`: M_k + Q sqrt(alpha^2 L + sigma^2) z, the same k and z at every point. */
static double dfi_mixture_draw(const void *arg, size_t row, double *z) {
    const dfi_mixture_job *job = (const dfi_mixture_job *)arg;
    const df_mixture *m = job->m;
    size_t d = m->dim, i, k = 0;
    double u, *y = z + d;
    df_real *x = job->out + row * d;
    df_random_uniform(job->seed, job->first + row, DFI_DRAW_COMPONENT, 1, &u);
    df_random_normal(job->seed, job->first + row, DFI_DRAW_WITHIN, d, x);
    while (k + 1 < m->K && (u -= exp(m->log_weight[k])) >= 0.0) k++;
    for (i = 0; i < d; i++)
        z[i] = sqrt(dfi_mixture_variance(job, k * d + i)) * (double)x[i];
    dfi_turn(d, m->axis + k * d * d, 0, z, y);
    for (i = 0; i < d; i++)
        x[i] = (df_real)(y[i] + job->at->alpha * m->mean[k * d + i]);
    return 0.0;
}

/* One question. With d log r_k/dx = mean of u - u_k the Jacobian is
       (dy/dx) v = sum_k r_k ((dy_k/dx) v - (u_k . v) (y_k - y)),
   symmetric: alpha S_k u_k = (x - M_k - sigma^2 u_k)/alpha, so y_k is affine in u_k. */
static double dfi_mixture_row(const void *arg, size_t row, double *r) {
    const dfi_mixture_job *job = (const dfi_mixture_job *)arg;
    size_t K = job->m->K, d = job->m->dim, i, k;
    double *uv = r + K, *y = uv + K, *g = y + K * d, *mean = g + K * d, *s = mean + d;
    double top = -DBL_MAX, sum = 0.0;
    const df_real *x = job->x + row * d, *v = job->v != NULL ? job->v + row * d : x;
    for (k = 0; k < K; k++)
        r[k] = dfi_mixture_component(job, k, x, v, y + k * d, g + k * d, uv + k, s);
    for (k = 0; k < K; k++) top = fmax(top, r[k]);
    /* far out every density underflows, their ratios do not */
    for (k = 0; k < K; k++) sum += exp(r[k] - top);
    for (k = 0; k < K; k++) r[k] = exp(r[k] - top) / sum;
    for (i = 0; i < d && job->ask != DF_ASK_LOG_DENSITY; i++) {
        double jv = mean[i] = 0.0;
        for (k = 0; k < K; k++) mean[i] += r[k] * y[k * d + i];
        for (k = 0; k < K; k++)
            jv += r[k] * (g[k * d + i] - uv[k] * (y[k * d + i] - mean[i]));
        job->out[row * d + i] = (df_real)(job->v != NULL ? jv : mean[i]);
    }
    if (job->covariance != NULL)
        dfi_mixture_covariance(job, r, y, mean, job->covariance + row * d * d);
    if (job->ask == DF_ASK_LOG_DENSITY && job->out != NULL)
        job->out[row] = (df_real)(top + log(sum));
    return top + log(sum);
}

/* Checks and does a job; log_p [n] takes the densities, if not NULL. */
static df_result dfi_mixture_run(df_ctx *ctx, const char *who, const dfi_mixture_job *job,
                                 double *log_p) {
    const df_mixture *m = job->m;
    int draw = job->ask == 0;
    dfi_rows rows = { draw ? dfi_mixture_draw : dfi_mixture_row, job, (size_t)job->n, 0, 0,
                      log_p, NULL };
    double sum;
    if (!ctx || !m || !job->at || job->n < 0 || dfi_nonfinite(job->at->alpha)
        || dfi_nonfinite(job->at->sigma) || job->at->sigma < 0.0
        || (job->n > 0 && ((job->x == NULL && !draw) || (job->out == NULL && !log_p))))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "%s: n = %d or sigma < 0, or a NULL", who,
                        job->n);
    for (size_t e = 0; e < m->K * m->dim && !draw; e++)
        if (dfi_mixture_variance(job, e) < DBL_MIN)
            return dfi_fail(ctx, DF_ERR_SINGULAR, "%s: at sigma = %g the covariance of "
                            "component %d is singular: ask at a larger sigma", who,
                            job->at->sigma, (int)(e / m->dim));
    rows.room = 2 * (m->K + 2) * (m->dim + 1);
    if (dfi_rows_finite(ctx, who, "x", rows.n, m->dim, job->x)) return ctx->code;
    return dfi_rows_run(ctx, who, rows, &sum);
}

DF_API df_result df_mixture_log_density(df_ctx *ctx, const df_mixture *m,
        const df_point *at, int n, const df_real *x, double *out) {
    dfi_mixture_job job = { m, at, 0, 0, DF_ASK_LOG_DENSITY, n, x, 0, 0, 0, 0, 0 };
    return dfi_mixture_run(ctx, "df_mixture_log_density", &job, out);
}
DF_API df_result df_mixture_score(df_ctx *ctx, const df_mixture *m, const df_point *at,
                                  int n, const df_real *x, df_real *out) {
    dfi_mixture_job job = { m, at, 0, -1, DF_ASK_PREDICT, n, x, NULL, out, NULL, 0, 0 };
    return dfi_mixture_run(ctx, "df_mixture_score", &job, NULL);
}
DF_API df_result df_mixture_posterior(df_ctx *ctx, const df_mixture *m,
        const df_point *at, int n, const df_real *x, df_real *mean, df_real *cov) {
    dfi_mixture_job job = { m, at, 1, 0, DF_ASK_PREDICT, n, x, NULL, mean, cov, 0, 0 };
    return dfi_mixture_run(ctx, "df_mixture_posterior", &job, NULL);
}
DF_API df_result df_mixture_sample(df_ctx *ctx, const df_mixture *m, const df_point *at,
                                   uint64_t seed, uint64_t first, int n, df_real *x) {
    dfi_mixture_job job = { m, at, 0, 0, 0, n, NULL, NULL, x, NULL, seed, first };
    return dfi_mixture_run(ctx, "df_mixture_sample", &job, NULL);
}

/* Rows at one time are one question, else each is its own. The score needs no row of the
   plane: it is finite even at sigma = 0, where its row -1/sigma is not. */
static int dfi_mixture_predict(void *self, df_ctx *ctx, const df_query *q, df_real *out) {
    const df_mixture_view *view = (const df_mixture_view *)self;
    int density = q->ask == DF_ASK_LOG_DENSITY, n = q->same_time ? q->n : 1;
    int jacobian = q->ask == DF_ASK_JVP || q->ask == DF_ASK_VJP;
    size_t dim = (size_t)q->dim;
    if (view->mixture == NULL || dim != view->mixture->dim || (jacobian && q->v == NULL))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_mixture_model: x [%d,%d] must have the "
                        "mixture's dim, a Jacobian needs v", q->n, q->dim);
    for (int i = 0; i < q->n; i += n) {
        df_point at = df_process_at(&view->process, q->t[i]);
        size_t skip = (size_t)i * dim;
        double row[2] = { 0.0, -1.0 };
        at.alpha = q->alpha[i];
        at.sigma = q->sigma[i];
        if (view->prediction != DF_SCORE && !density) {
            if (df_plane_row(ctx, &view->process, view->prediction, &at, row))
                return ctx->code;
            row[1] *= at.sigma;
        }
        dfi_mixture_job job = { view->mixture, &at, row[0], row[1], (int)q->ask, n,
                                q->x + skip, jacobian ? q->v + skip : NULL,
                                out + (density ? (size_t)i : skip), NULL, 0, 0 };
        if (dfi_mixture_run(ctx, "df_mixture_model", &job, NULL)) return ctx->code;
    }
    return DF_OK;
}
DF_API df_model df_mixture_model(df_mixture_view *view) {
    df_model model = df_model_defaults();
    if (view == NULL || view->mixture == NULL) return model;           /* cannot predict */
    model.predict = dfi_mixture_predict;
    model.self = view;
    model.dim = (int)view->mixture->dim;
    model.answers = DF_ASK_PREDICT | DF_ASK_JVP | DF_ASK_VJP | DF_ASK_LOG_DENSITY;
    model.process = view->process;
    model.prediction = view->prediction;
    return model;
}

/* ---- distances between samples ---- */
typedef struct dfi_samples {
    const dfi_kernels *k;
    const df_real *a, *b;              /* [na, dim], [nb, dim] */
    size_t na, nb, dim;
    uint64_t seed;                     /* of directions */
    double scale;                      /* f = exp(-scale d^2), or 0: the distance d */
} dfi_samples;

/* A negative count, made a size_t, is huge. */
static df_result dfi_samples_check(df_ctx *ctx, const char *who, const dfi_samples *s,
                                   size_t least, const double *out) {
    if (s->na - least > INT_MAX || s->nb - least > INT_MAX || s->dim - 1 > INT_MAX || !ctx
        || s->a == NULL || s->b == NULL || out == NULL)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "%s: na = %d and nb = %d below %d, dim = %d "
                        "below 1, or a NULL", who, (int)s->na, (int)s->nb, (int)least,
                        (int)s->dim);
    if (dfi_rows_finite(ctx, who, "a", s->na, s->dim, s->a)) return ctx->code;
    return dfi_rows_finite(ctx, who, "b", s->nb, s->dim, s->b);
}


/* Squared W_2 along direction p, int (F_a^-1 - F_b^-1)^2 du (Bonneel et al. 2015).
   The quantile functions are stairs of steps 1/na, 1/nb, walked in units of 1/(na nb). */
static double dfi_sliced_row(const void *arg, size_t p, double *a) {
    const dfi_samples *s = (const dfi_samples *)arg;
    size_t na = s->na, nb = s->nb, dim = s->dim, i, j;
    double *b = a + na, *spare = b + nb, sum = 0.0;
    df_real *theta = (df_real *)(void *)(spare + na + nb);
    uint64_t at = 0;
    df_random_normal(s->seed, p, DFI_DRAW_DIRECTION, dim, theta);
    for (i = 0; i < na; i++) a[i] = s->k->dot(dim, s->a + i * dim, theta);
    for (j = 0; j < nb; j++) b[j] = s->k->dot(dim, s->b + j * dim, theta);
    dfi_merge_sort(na, a, spare);
    dfi_merge_sort(nb, b, spare);
    for (i = j = 0; i < na && j < nb;) {
        uint64_t to_a = (uint64_t)(i + 1) * nb, to_b = (uint64_t)(j + 1) * na;
        uint64_t to = to_a < to_b ? to_a : to_b;
        sum += (double)(to - at) * (a[i] - b[j]) * (a[i] - b[j]);
        at = to;
        i += to_a == to;
        j += to_b == to;
    }
    return sum / ((double)na * (double)nb) / s->k->dot(dim, theta, theta);
}
DF_API df_result df_sliced_wasserstein(df_ctx *ctx, const df_real *a, int na,
        const df_real *b, int nb, int dim, int projections, uint64_t seed, double *out) {
    static const char who[] = "df_sliced_wasserstein";
    dfi_samples s = { ctx ? ctx->k : 0, a, b, (size_t)na, (size_t)nb, (size_t)dim, seed,
                      0.0 };
    dfi_rows rows = { dfi_sliced_row, &s, (size_t)projections,
                      2 * (s.na + s.nb) + s.dim, 0, NULL, NULL };
    double sum = 0.0;
    if (projections < 1)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "%s: %d projections", who, projections);
    if (dfi_samples_check(ctx, who, &s, 1, out) || dfi_rows_run(ctx, who, rows, &sum))
        return df_ctx_error(ctx);
    *out = sqrt(sum / projections);
    return DF_OK;
}

/* Sum over j of f(|a_i - b_j|); nb = 0 says that b is a: then each pair once, j < i. */
static double dfi_pair_row(const void *arg, size_t i, double *memory) {
    const dfi_samples *s = (const dfi_samples *)arg;
    double sum = 0.0;
    (void)memory;
    for (size_t j = 0; j < (s->nb > 0 ? s->nb : i); j++) {
        double square = 0.0;
        for (size_t l = 0; l < s->dim; l++) {
            double gap = (double)s->a[i * s->dim + l] - (double)s->b[j * s->dim + l];
            square += gap * gap;
        }
        sum += s->scale > 0.0 ? exp(-s->scale * square) : sqrt(square);
    }
    return sum;
}

/* sign (2 E f(a,b) - E f(a,a') - E f(b,b')). Unbiased, so it may come out below 0. */
static df_result dfi_pair_distance(df_ctx *ctx, const char *who, dfi_samples s,
                                   double sign, double *out) {
    df_result result = dfi_samples_check(ctx, who, &s, 2, out);
    double na = (double)s.na, nb = (double)s.nb, sum[3];
    dfi_samples pairs[3] = { s, s, s };        /* a with b, a with a, b with b */
    pairs[1].b = s.a;
    pairs[2].a = s.b;
    pairs[2].na = s.nb;
    pairs[1].nb = pairs[2].nb = 0;
    for (int i = 0; i < 3 && result == DF_OK; i++) {
        dfi_rows rows = { dfi_pair_row, &pairs[i], pairs[i].na, 0, 0, NULL, NULL };
        result = dfi_rows_run(ctx, who, rows, &sum[i]);
    }
    if (result != DF_OK) return result;
    *out = sign * 2.0 * (sum[0] / (na * nb) - sum[1] / (na * (na - 1.0))
                         - sum[2] / (nb * (nb - 1.0)));
    return DF_OK;
}
/* f = |a - b| (Szekely & Rizzo 2013). */
DF_API df_result df_energy_distance(df_ctx *ctx, const df_real *a, int na,
                                    const df_real *b, int nb, int dim, double *out) {
    dfi_samples s = { ctx ? ctx->k : 0, a, b, (size_t)na, (size_t)nb, (size_t)dim, 0, 0 };
    return dfi_pair_distance(ctx, "df_energy_distance", s, 1.0, out);
}
/* Gretton et al. 2012, f = exp(-|a - b|^2/(2 bandwidth^2)). */
DF_API df_result df_mmd(df_ctx *ctx, const df_real *a, int na, const df_real *b, int nb,
                        int dim, double bandwidth, double *out) {
    dfi_samples s = { ctx ? ctx->k : 0, a, b, (size_t)na, (size_t)nb, (size_t)dim, 0,
                      0.5 / (bandwidth * bandwidth) };
    if (!(bandwidth > 0.0) || dfi_nonfinite(s.scale) || s.scale < DBL_MIN)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_mmd: wrong bandwidth %g", bandwidth);
    return dfi_pair_distance(ctx, "df_mmd", s, -1.0, out);
}

/* Total variation over a histogram: outliers count in the outer cells. */
static void dfi_histogram(const dfi_samples *s, const df_real *x, size_t n, double lo,
                          double hi, size_t bins, double *cells) {
    double width = (hi - lo) / (double)bins, most = (double)bins - 1;
    for (size_t i = 0; i < n; i++) {
        size_t cell = 0;
        for (size_t j = 0; j < s->dim; j++) {
            double at = floor(((double)x[i * s->dim + j] - lo) / width);
            cell = cell * bins + (size_t)fmin(fmax(at, 0), most);
        }
        cells[cell] += 1.0 / (double)n;
    }
}
DF_API df_result df_total_variation(df_ctx *ctx, const df_real *a, int na,
        const df_real *b, int nb, int dim, double lo, double hi, int bins, double *out) {
    static const char who[] = "df_total_variation";
    dfi_samples s = { ctx ? ctx->k : 0, a, b, (size_t)na, (size_t)nb, (size_t)dim, 0, 0 };
    df_scope mark;
    size_t side = (size_t)bins, count = dim == 2 ? dfi_mul(side, side) : side;
    double *cells;
    if (dim > 2 || bins < 1 || dfi_nonfinite(lo) || dfi_nonfinite(hi - lo) || hi <= lo)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "%s: dim = %d, lo = %g, hi = %g, bins = %d; "
                        "want dim 1 or 2, lo < hi, bins >= 1", who, dim, lo, hi, bins);
    if (dfi_samples_check(ctx, who, &s, 1, out)) return ctx ? ctx->code : DF_ERR_ARGUMENT;
    mark = dfi_scratch_mark(ctx);
    cells = (double *)dfi_scratch(ctx, dfi_mul(count, 2 * sizeof *cells));
    if (cells == NULL) return DF_ERR_MEMORY;
    memset(cells, 0, 2 * count * sizeof *cells);
    dfi_histogram(&s, a, s.na, lo, hi, side, cells);
    dfi_histogram(&s, b, s.nb, lo, hi, side, cells + count);
    *out = 0;
    for (size_t i = 0; i < count; i++) *out += fabs(cells[i] - cells[count + i]) / 2;
    dfi_scratch_release(ctx, mark);
    return DF_OK;
}

/* =====================================================================================
   // >>laboratory: models that are wrong by a known amount

   How wrong may a score be? Langevin dynamics and diffusion answer differently (Cao, Chen,
   Sridharan & Wu 2026). Let a score be s^ = s + b, with |b| small in L^p(p), which is what
   training makes it. Langevin dynamics at one t walks a single landscape, and b may be
   large where p is almost nothing: a well there, s^ = -pull (x - c), holds for a time
   e^(c dim) whatever begins inside; so may a well of radius .12 sqrt dim about each
   training point, where every chain begins that starts from data it was trained on. A
   reverse SDE has a landscape for each t, and an error that is small over every p_t costs,
   by Girsanov's theorem, if both begin in p_T (else KL(p_T || q_T) more), at most
       KL(p_0 || q_0) <= KL(paths) = w/2 int g^2 E_(p_t) |b_t|^2 dt,
   w = ((1 + eta^2)/2)^2/eta^2, which is 1 for eta = 1, the least (Song et al. 2021b,
   theorem 1; Chen et al. 2023): drifts differ by (1 + eta^2)/2 g^2 b, noise is eta g.

   The flaw is in the score, the model's answer in any prediction. Both are affine in one
   another, s = cx x + cp answer, so the answer is off by b/cp.
   ===================================================================================== */
enum { DFI_DRAW_FLAW = 0x4f1a0000, DFI_DRAW_PATH };

typedef struct dfi_flaw_job {
    const df_flaw *flaw;
    const df_query *q;
    size_t dim, width, first;          /* numbers in a row of x, of the answer; a row */
    double scale, cx, cp, factor;      /* of x; s = cx x + cp answer; of b */
    df_real *out;
} dfi_flaw_job;

/* b [dim] at x, where the score is s. Distances are left as soon as they exceed the least:
   in high dimension after a few terms. */
static void dfi_flaw_wells(const df_flaw *f, size_t dim, const double *x, const double *s,
                           double *b) {
    const df_real *nearest = f->points;
    double least = f->outer * f->outer, hold;
    for (size_t k = 0; k < (f->points ? (size_t)f->count : 1); k++) {
        const df_real *c = f->points ? f->points + k * dim : NULL;
        double square = 0;
        for (size_t i = 0; i < dim && square < least; i++)
            square += (c ? x[i] - (double)c[i] : x[i]) * (c ? x[i] - (double)c[i] : x[i]);
        if (square < least) nearest = c;
        least = fmin(least, square);
    }
    hold = fmin((f->outer - sqrt(least)) / (f->outer - f->inner), 1);
    for (size_t i = 0; i < dim; i++) {
        double c = nearest ? (double)nearest[i] : 0;
        b[i] = hold > 0 ? hold * (-f->pull * (x[i] - c) - s[i]) : 0;
    }
}

/* b = size u/|u|. */
static void dfi_flaw_shift(const df_flaw *f, size_t dim, uint64_t sample, df_real *u,
                           double *b) {
    double square = 0;
    if (f->kind == DF_FLAW_ISOTROPIC)
        df_random_normal(f->seed, sample, DFI_DRAW_FLAW, dim, u);
    for (size_t i = 0; i < dim; i++) {
        b[i] = f->kind == DF_FLAW_ISOTROPIC ? (double)u[i]
             : f->direction ? (double)f->direction[i] : 1;
        square += b[i] * b[i];
    }
    for (size_t i = 0; i < dim; i++) b[i] *= f->size / sqrt(square);
}

static double dfi_flaw_row(const void *arg, size_t row, double *x) {
    const dfi_flaw_job *job = (const dfi_flaw_job *)arg;
    size_t dim = job->dim, at = job->first + row;
    double *s = x + dim, *b = s + dim, sum = 0;
    df_real *out = job->out + at * job->width;
    for (size_t i = 0; i < dim; i++) {
        x[i] = (double)job->q->x[at * dim + i] / job->scale;
        s[i] = job->cx * x[i] + job->cp * (double)out[i];
    }
    if (job->flaw->kind == DF_FLAW_WELLS) dfi_flaw_wells(job->flaw, dim, x, s, b);
    else dfi_flaw_shift(job->flaw, dim, job->q->first_sample +
                        at % (size_t)job->q->samples, (df_real *)(void *)s, b);
    for (size_t i = 0; i < dim; i++) {
        out[i] = (df_real)((double)out[i] + job->factor * b[i]);
        sum += fabs((double)out[i]);
    }
    return sum;
}

static df_result dfi_flaw_check(df_ctx *ctx, const df_flaw *f, int dim) {
    const df_model *m = f->model;
    double length = 1;
    if (f->cookie != DFI_COOKIE || !m || m->cookie != DFI_COOKIE || !m->predict ||
        (unsigned)f->kind >= (unsigned)DF_FLAW_COUNT || (f->points && f->count < 1))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_flaw: kind %d, count %d: want a "
                        "df_flaw, one point or more, a model that has predict: begin with "
                        "df_flaw_defaults", (int)f->kind, f->count);
    if (m->dim != dim || m->learned != f->learned)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_flaw: the model has dim %d, learned %d, "
                        "but df_flaw_model was given %d, %d: call it again", m->dim,
                        (int)m->learned, dim, (int)f->learned);
    for (int i = 0; f->direction && i < m->dim; i++)
        length = (i ? length : 0) + fabs((double)f->direction[i]);
    if (dfi_nonfinite(f->pull) || f->pull < 0 || dfi_nonfinite(f->outer - f->inner) ||
        f->inner < 0 || f->inner >= f->outer || dfi_nonfinite(f->size) ||
        !dfi_positive(length) || dfi_nonfinite(f->limit) || f->limit < 0)
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_flaw: pull %g, inner %g, outer %g, size "
                        "%g, |direction| %g, limit %g: want pull and limit >= 0, 0 <= "
                        "inner < outer, a direction but 0", f->pull, f->inner, f->outer,
                        f->size, length, f->limit);
    return DF_OK;
}

/* The rows from job->first on, all at one time. */
static df_result dfi_flaw_rows(df_ctx *ctx, dfi_flaw_job *job, int rows) {
    const df_model *m = job->flaw->model;
    df_point at = df_process_at(&m->process, job->q->t[job->first]);
    dfi_rows run = { dfi_flaw_row, job, (size_t)rows, 3 * job->dim, 0, NULL, NULL };
    double sum, norm = 0;
    df_result r;
    at.alpha = job->q->alpha[job->first];
    at.sigma = job->q->sigma[job->first];
    r = dfi_model_map(ctx, m, DF_SCORE, &at, &job->cx, &job->cp);
    if (r == DF_OK && !(fabs(job->cp) > 0))
        r = dfi_fail(ctx, DF_ERR_SINGULAR, "df_flaw: at alpha = %g no %s makes another "
                     "score: start below t = %g (t_max), or predict eps", at.alpha,
                     df_prediction_name(m->prediction), at.t);
    if (r == DF_OK && job->flaw->norm)
        r = job->flaw->norm(job->flaw->user, ctx, &at, &norm);
    if (r == DF_OK && dfi_nonfinite(norm))
        r = dfi_fail(ctx, DF_ERR_NONFINITE, "df_flaw: norm says %s at t = %g",
                     dfi_nonfinite_name(norm), at.t);
    if (r != DF_OK) return r;
    job->factor = norm > job->flaw->limit ? job->flaw->limit / norm : 1;
    job->factor /= job->cp;
    job->scale = dfi_model_scale(m, &at);
    return dfi_rows_run(ctx, "df_flaw", run, &sum);
}

static int dfi_flaw_predict(void *self, df_ctx *ctx, const df_query *q, df_real *out) {
    const df_flaw *f = (const df_flaw *)self;
    df_result r = dfi_flaw_check(ctx, f, q->dim);
    dfi_flaw_job job = { f, q, (size_t)q->dim, 0, 0, 1, 0, 1, 1, out };
    if (r == DF_OK) r = dfi_ask(ctx, f->model, q, out);
    if (r == DF_OK) job.width = dfi_answer_width(f->model, q->ask);
    for (int row = 0, rows; r == DF_OK && row < q->n; row += rows) {
        rows = dfi_same_times(q->t, row, q->n);
        job.first = (size_t)row;
        r = dfi_flaw_rows(ctx, &job, rows);
    }
    return r;
}

DF_API df_flaw df_flaw_defaults(void) {
    df_flaw f;
    memset(&f, 0, sizeof f);
    f.cookie = DFI_COOKIE;
    f.pull = 2;
    f.inner = 4;
    f.outer = 5;
    return f;
}

DF_API df_model df_flaw_model(df_flaw *flaw) {
    int made = flaw && flaw->cookie == DFI_COOKIE && flaw->model;
    df_model m = made ? *flaw->model : df_model_defaults();
    if (flaw == NULL) return m;        /* of dim 0: refused, with a sentence, where used */
    flaw->learned = m.learned;
    m.predict = dfi_flaw_predict;
    m.self = flaw;
    m.answers = DF_ASK_PREDICT;
    m.max_batch = 0;                   /* the model's own limit is kept when it is asked */
    return m;
}

/* ---- how wrong ---- */

/* |a - b|^2 of each row at x [n, dim], into gap [n], of scores (to SCORE) or of eps. */
static df_result dfi_score_gap(df_ctx *ctx, const df_model *const m[2],
                               const df_sample_desc *d, df_prediction to,
                               const df_point *at, int n, const df_real *x, double *gap) {
    df_scope mark = dfi_scratch_mark(ctx);
    size_t dim = (size_t)m[0]->dim, size = dfi_mul((size_t)n, dim);
    df_real *s = (df_real *)dfi_scratch(ctx, dfi_mul(size, 2 * sizeof *s));
    df_point other = df_process_at(&m[1]->process, at->t);
    df_result r = s ? DF_OK : DF_ERR_MEMORY;
    if (r == DF_OK && (fabs(other.alpha - at->alpha) > 1e-9 * (at->alpha + at->sigma) ||
                       fabs(other.sigma - at->sigma) > 1e-9 * (at->alpha + at->sigma)))
        r = dfi_fail(ctx, DF_ERR_ARGUMENT, "df_score_error, df_path_kl: alpha and sigma "
                     "at t = %g are %g, %g of one model, %g, %g of the other", at->t,
                     at->alpha, at->sigma, other.alpha, other.sigma);
    for (size_t k = 0; r == DF_OK && k < 2; k++)
        r = dfi_ask_as(ctx, m[k], dfi_query_of(d, n, x), to, at, 0, NULL, s + k * size);
    for (size_t i = 0; r == DF_OK && i < size; i++) {
        double e = (double)s[i] - (double)s[size + i];
        gap[i / dim] = e * e + (i % dim ? gap[i / dim] : 0);
    }
    dfi_scratch_release(ctx, mark);
    return r;
}

/* Models that can be compared, or a sentence. */
static df_result dfi_lab_check(df_ctx *ctx, const char *who, const df_model *const m[2],
                               const df_sample_desc *d, const df_real *x, int n,
                               const double *out) {
    df_result r = dfi_measure_check(ctx, who, m[0], d, n);
    if (r == DF_OK) r = dfi_measure_check(ctx, who, m[1], d, n);
    if (r != DF_OK || (m[0]->dim == m[1]->dim && x && out)) return r;
    return dfi_fail(ctx, DF_ERR_ARGUMENT, "%s: models of dim %d and %d; want one, and "
                    "x and out not NULL", who, m[0]->dim, m[1]->dim);
}

DF_API df_result df_score_error(df_ctx *ctx, const df_model *truth, const df_model *model,
                                const df_sample_desc *desc, double t, const df_real *x,
                                int n, double p, double *out) {
    const df_model *const m[2] = { truth, model };
    df_sample_desc d = desc ? *desc : df_sample_defaults();
    df_result r = dfi_lab_check(ctx, "df_score_error", m, &d, x, n, out);
    df_scope mark;
    df_point at;
    double *gap, sum = 0, most = 0;
    if (r != DF_OK) return r;
    if (!dfi_positive(p) || dfi_nonfinite(t))
        return dfi_fail(ctx, DF_ERR_ARGUMENT, "df_score_error: p = %g at t = %g, want p > "
                        "0", p, t);
    mark = dfi_scratch_mark(ctx);
    gap = (double *)dfi_scratch(ctx, dfi_mul((size_t)n, sizeof *gap));
    at = df_process_at(&truth->process, t);
    r = gap ? dfi_score_gap(ctx, m, &d, DF_SCORE, &at, n, x, gap) : DF_ERR_MEMORY;
    for (int i = 0; r == DF_OK && i < n; i++) most = fmax(most, gap[i]);
    for (int i = 0; r == DF_OK && most > 0 && i < n; i++) sum += pow(gap[i] / most, p / 2);
    if (r == DF_OK) *out = sqrt(most) * pow(sum / n, 1 / p);    /* no power overflows */
    dfi_scratch_release(ctx, mark);
    return r;
}

DF_API df_result df_path_kl(df_ctx *ctx, const df_model *truth, const df_model *model,
                            const df_sample_desc *desc, const df_real *x, int n,
                            double *out) {
    const df_model *const m[2] = { truth, model };
    df_sample_desc d = desc ? *desc : df_sample_defaults();
    df_result r;
    int count;
    double eta = d.eta >= 0 ? d.eta : 1, *gap, sum = 0;
    df_scope mark;
    df_point *grid = NULL;
    df_real *y;
    if (desc == NULL) d.end = DF_END_T_MIN;
    r = dfi_lab_check(ctx, "df_path_kl", m, &d, x, n, out);
    if (r != DF_OK) return r;
    mark = dfi_scratch_mark(ctx);
    y = (df_real *)dfi_scratch(ctx, dfi_mul(dfi_mul((size_t)n, (size_t)truth->dim),
                                            2 * sizeof *y));
    gap = (double *)dfi_scratch(ctx, dfi_mul((size_t)n, sizeof *gap));
    if (y && gap) grid = dfi_grid_plain(ctx, truth, &d, &count);
    if (grid == NULL) r = ctx->code;
    if (r == DF_OK && (!dfi_positive(eta) || dfi_nonfinite(grid[0].lambda) ||
                       dfi_nonfinite(grid[count - 1].lambda)))
        r = dfi_fail(ctx, DF_ERR_ARGUMENT, "df_path_kl: eta = %g, lambda %g to %g: want "
                     "eta > 0, end DF_END_T_MIN, and alpha > 0 at t_max", eta,
                     grid[0].lambda, grid[count - 1].lambda);
    for (int k = 0; r == DF_OK && k + 1 < count; k++) {
        double half = (grid[k + 1].lambda - grid[k].lambda) / 2, h = 2 * fabs(half);
        df_point at = df_process_at_lambda(&truth->process, grid[k].lambda + half);
        dfi_noise_to(ctx, truth, &d, &at, DFI_DRAW_PATH + (uint32_t)k, n, x, y);
        r = dfi_score_gap(ctx, m, &d, DF_EPS, &at, n, y, gap);
        for (int i = 0; r == DF_OK && i < n; i++) sum += h * gap[i] / n;
    }
    if (r == DF_OK) *out = pow((1 + eta * eta) / 2 / eta, 2) * sum;
    dfi_scratch_release(ctx, mark);
    return r;
}

/* =====================================================================================
   // >>kernels: the engine room

   Nearly all the time of a network is spent in one formula, C = A B, and most of the rest
   in formulas applied to each element of an array. This chapter holds both, in two forms.
   First the plain form: loops that say what each kernel computes. They are the definition,
   the fallback for any compiler and machine, and the whole of the double build. Then the
   tuned form (`>>pass`, at the end of the file), written once in the vector extensions of
   GCC and Clang and compiled for several instruction sets; a context picks its table of
   kernels at run time, so that a plain `cc -O2` gets all the speed the machine has.

   Two promises shape the code. An element's result does not depend on where the element
   stands or what stands beside it, and a sum over K does not depend on M, N, the batch or
   the number of threads. So a sample is the same, to the last bit, however the work is
   cut.
   ===================================================================================== */

#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#pragma GCC pop_options
#endif

/* ---- plain kernels: the definitions ------------------------------------------------- */

/* -Ofast compiles a loop's tail to other instructions than its body, so that an element's
   last bit would depend on its place, and lets sums be reordered. Not in this chapter. */
#ifdef __FAST_MATH__
#ifdef __clang__
#pragma float_control(precise, on, push)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("no-fast-math", "no-tree-vectorize")
#define DFI_PLAIN_OPTIONS
#endif
#endif

#define DFI_PLAIN_BINARY(name, op)                                                        \
    static void dfi_##name##_plain(size_t n, const df_real *a, size_t sa,                 \
                                   const df_real *b, size_t sb, df_real *y) {             \
        for (size_t i = 0; i < n; i++) y[i] = a[i * sa] op b[i * sb];                     \
    }
DFI_PLAIN_BINARY(add, +)
DFI_PLAIN_BINARY(sub, -)
DFI_PLAIN_BINARY(mul, *)
DFI_PLAIN_BINARY(div, /)

/* sigma(t) = 1/(1 + e^-t), never forming e^|t|: that would overflow. For the same reason
   log(1 + e^t) is written with e^-|t|. */
static double dfi_plain_logistic(double t) {
    double e = exp(-fabs(t));
    return (t < 0 ? e : 1) / (1 + e);
}
static double dfi_plain_log1pexp(double t) {
    return (t > 0 ? t : 0) + log1p(exp(-fabs(t)));
}

/* GELU by tanh (Hendrycks and Gimpel 2016): t/2 (1 + tanh u) = t sigma(2u),
   u = sqrt(2/pi) (t + 0.044715 t^3). */
#define DFI_GELU_SCALE 0.79788456080286535588
#define DFI_GELU_CUBIC 0.044715
static double dfi_plain_gelu_argument(double t) {
    return 2 * DFI_GELU_SCALE * (t + DFI_GELU_CUBIC * t * t * t);
}
static double dfi_plain_gelu_slope(double t) {
    double c = t > 40 ? 40 : t < -40 ? -40 : t; /* beyond, the slope is 0 or 1 exactly */
    double u2 = dfi_plain_gelu_argument(c);
    double s = dfi_plain_logistic(u2), rest = dfi_plain_logistic(-u2);
    return s + c * s * rest * 2 * DFI_GELU_SCALE * (1 + 3 * DFI_GELU_CUBIC * c * c);
}

/* y = f(t), and its slope, in double; r is the y that the forward pass found */
#define DFI_PLAIN_UNARY(name, f, slope)                                                  \
    static void dfi_##name##_plain(size_t n, const df_real *x, df_real *y) {             \
        for (size_t i = 0; i < n; i++) {                                                 \
            double t = (double)x[i];                                                     \
            y[i] = (df_real)(f);                                                         \
        }                                                                                \
    }                                                                                    \
    static void dfi_##name##_back_plain(size_t n, const df_real *x, const df_real *y,    \
                                        const df_real *dy, df_real *dx) {                \
        for (size_t i = 0; i < n; i++) {                                                 \
            double t = (double)x[i], r = (double)y[i];                                   \
            dx[i] += (df_real)(slope) * dy[i];                                           \
            (void)t, (void)r;                                                            \
        }                                                                                \
    }
DFI_PLAIN_UNARY(exp, exp(t), r)
DFI_PLAIN_UNARY(log, log(t), 1 / t)
DFI_PLAIN_UNARY(sqrt, sqrt(t), 0.5 / r)
DFI_PLAIN_UNARY(sin, sin(t), cos(t))
DFI_PLAIN_UNARY(cos, cos(t), -sin(t))
DFI_PLAIN_UNARY(tanh, tanh(t), 4 * dfi_plain_logistic(2 * t) * dfi_plain_logistic(-2 * t))
DFI_PLAIN_UNARY(sigmoid, dfi_plain_logistic(t),
                dfi_plain_logistic(t) * dfi_plain_logistic(-t))
DFI_PLAIN_UNARY(silu, t * dfi_plain_logistic(t),
                dfi_plain_logistic(t) * (1 + t * dfi_plain_logistic(-t)))
DFI_PLAIN_UNARY(gelu_tanh, t * dfi_plain_logistic(dfi_plain_gelu_argument(t)),
                dfi_plain_gelu_slope(t))
DFI_PLAIN_UNARY(gelu_erf, t * 0.5 * erfc(-t * sqrt(0.5)),
                0.5 * erfc(-t * sqrt(0.5)) + t * exp(-0.5 * t * t) / sqrt(2 * DFI_PI))
DFI_PLAIN_UNARY(erf, erf(t), 2 / sqrt(DFI_PI) * exp(-t * t))
DFI_PLAIN_UNARY(relu, t > 0 ? t : 0, t > 0 ? 1 : 0)
DFI_PLAIN_UNARY(step, t > 0 ? 1 : 0, 0)
DFI_PLAIN_UNARY(softplus, dfi_plain_log1pexp(t), dfi_plain_logistic(t))

static void dfi_affine_plain(size_t n, df_real a, const df_real *x, df_real b,
                             df_real *y) {
    for (size_t i = 0; i < n; i++) y[i] = a * x[i] + b;
}
static void dfi_axpy_plain(size_t n, df_real a, const df_real *x, df_real *y) {
    for (size_t i = 0; i < n; i++) y[i] += a * x[i];
}
static void dfi_muladd_plain(size_t n, const df_real *a, size_t sa, const df_real *b,
                             size_t sb, df_real *y) {
    for (size_t i = 0; i < n; i++) y[i] += a[i * sa] * b[i * sb];
}
static void dfi_combine_plain(size_t n, int count, const double *c,
                              const df_real *const *x, df_real *y) {
    for (size_t i = 0; i < n; i++) {
        double s = 0;
        for (int j = 0; j < count; j++) s += c[j] * (double)x[j][i];
        y[i] = (df_real)s;
    }
}

/* Reductions sum in double: a million terms then cost no digits of the float result. */
static double dfi_sum_plain(size_t n, const df_real *x) {
    double s = 0;
    for (size_t i = 0; i < n; i++) s += (double)x[i];
    return s;
}
static double dfi_dot_plain(size_t n, const df_real *a, const df_real *b) {
    double s = 0;
    for (size_t i = 0; i < n; i++) s += (double)a[i] * (double)b[i];
    return s;
}
/* The largest element; of no elements, the identity of max. */
static df_real dfi_max_plain(size_t n, const df_real *x) {
    df_real m = n > 0 ? x[0] : -(df_real)HUGE_VAL;
    for (size_t i = 1; i < n; i++) m = x[i] > m ? x[i] : m;
    return m;
}
static void dfi_colsum_plain(size_t rows, size_t cols, size_t stride, const df_real *x,
                             df_real *y) {
    for (size_t j = 0; j < cols; j++) {
        double s = 0;
        for (size_t i = 0; i < rows; i++) s += (double)x[i * stride + j];
        y[j] += (df_real)s;
    }
}
/* Two passes: E[x^2] - E[x]^2 would lose all digits where the mean is large. */
static void dfi_moments_plain(size_t n, const df_real *x, double *mean, double *variance) {
    double m = n > 0 ? dfi_sum_plain(n, x) / (double)n : 0, s = 0;
    for (size_t i = 0; i < n; i++) s += ((double)x[i] - m) * ((double)x[i] - m);
    *mean = m;
    *variance = n > 0 ? s / (double)n : 0;
}
/* IEEE 754: NaN and Inf are the numbers whose exponent bits are all ones. Looked at as
   integers, because -Ofast lets the compiler believe that isfinite(x) is always true. */
static int dfi_plain_is_nonfinite(df_real x) {
#ifdef DIFFUSION_DOUBLE
    const uint64_t exponent = (uint64_t)0x7ff << 52;
    uint64_t bits;
#else
    const uint32_t exponent = (uint32_t)0xff << 23;
    uint32_t bits;
#endif
    memcpy(&bits, &x, sizeof bits);
    return (bits & exponent) == exponent;
}
static size_t dfi_nonfinite_plain(size_t n, const df_real *x) {
    size_t i = 0;
    while (i < n && !dfi_plain_is_nonfinite(x[i])) i++;
    return i;
}
static int dfi_convert_plain(size_t n, int count, const double *c,
                             const df_real *const *x, df_real *y) {
    int finite = dfi_nonfinite_plain(n, x[0]) == n;
    dfi_combine_plain(n, count, c, x, y);
    return finite;
}

/* Subtracting the maximum changes nothing in exact arithmetic and keeps exp in range. */
static void dfi_softmax_plain(size_t n, const df_real *x, df_real *y) {
    double m = (double)dfi_max_plain(n, x), s = 0;
    for (size_t i = 0; i < n; i++) s += exp((double)x[i] - m);
    for (size_t i = 0; i < n; i++) y[i] = (df_real)(exp((double)x[i] - m) / s);
}
static void dfi_softmax_back_plain(size_t n, const df_real *y, const df_real *dy,
                                   df_real *dx) {
    df_real s = (df_real)dfi_dot_plain(n, y, dy);
    for (size_t i = 0; i < n; i++) dx[i] += y[i] * (dy[i] - s);
}
static void dfi_log_softmax_plain(size_t n, const df_real *x, df_real *y) {
    double m = (double)dfi_max_plain(n, x), s = 0;
    for (size_t i = 0; i < n; i++) s += exp((double)x[i] - m);
    s = log(s);
    for (size_t i = 0; i < n; i++) y[i] = (df_real)((double)x[i] - m - s);
}
static void dfi_log_softmax_back_plain(size_t n, const df_real *y, const df_real *dy,
                                       df_real *dx) {
    df_real s = (df_real)dfi_sum_plain(n, dy);
    for (size_t i = 0; i < n; i++) dx[i] += dy[i] - (df_real)exp((double)y[i]) * s;
}

/* AdamW (Loshchilov and Hutter 2019). c1 = 1 - b1^t, c2 = 1 - b2^t. */
static void dfi_adamw_plain(size_t n, df_real *w, df_real *m, df_real *v, const df_real *g,
                            double scale, double lr, double b1, double b2, double eps,
                            double wd, double c1, double c2) {
    df_real r1 = (df_real)(1 - b1), r2 = (df_real)(1 - b2), keep = (df_real)(1 - lr * wd);
    df_real step = (df_real)(lr / c1), root = (df_real)(1 / sqrt(c2)), s = (df_real)scale;
    for (size_t i = 0; i < n; i++) {
        df_real d = s * g[i];
        m[i] += r1 * (d - m[i]);
        v[i] += r2 * (d * d - v[i]);
        w[i] = keep * w[i]
               - step * m[i] / ((df_real)sqrt((double)v[i]) * root + (df_real)eps);
    }
}
static void dfi_ema_plain(size_t n, df_real *average, const df_real *w, double decay) {
    df_real rest = (df_real)(1 - decay);
    for (size_t i = 0; i < n; i++) average[i] += rest * (w[i] - average[i]);
}

/* ---- the matrix product -------------------------------------------------------------

   C = A B with A [M,K] and B [K,N] takes M N K multiplications on M K + K N numbers: each
   number is used hundreds of times. A processor multiplies some 30 times faster than it
   reads memory, so all depends on using a number often while it is near. Four levels
   (Goto and van de Geijn 2008; Van Zee and van de Geijn 2015):

     registers   a tile of C, e.g. 12 rows of 32 columns, stays in registers while the sum
                 over k runs: each step reads 12 + 32 numbers and makes 384 products
     L1 cache    a panel of B, KC rows of one tile's width, is met by every panel of A
     L2 cache    a block of A, MC rows by KC
     memory      read in strips of KC by NC

             NC                       K                          N
          <------>             <-- KC -->                  <-tile->
          +------+------      +----------+---- ^          +-------+
       KC |  B   |         MC |  A block |     |        MC|   C   |
          +------+------      +----------+---- M          +-------+

   A and B are packed first: copied into panels in the order in which the tile reads them,
   step k after step k, zeros where the matrix ends. It costs one read for hundreds of
   uses, makes every access of the inner loop contiguous, frees it of cache lines that
   collide (rows 4096 bytes apart all fall into one set of the L1 cache), and makes
   transposed operands a matter of packing alone.

   Each element of C is the sum over k in rising order, in pieces of KC which depends on K
   alone: the promise above. Tiles at the edges are the same code with fewer rows. */

typedef struct dfi_micro {
    size_t rows, cols;         /* of the largest tile */
    size_t row_step, col_step; /* an edge tile's panel is a multiple of these wide */
    /* panel[k * width + i] = x(i, k) for i < count, 0 for count <= i < width.
       across = 0: x(i, k) = x[k * ld + i];  across = 1: x(i, k) = x[i * ld + k] */
    void (*pack)(size_t width, size_t count, size_t k, const df_real *x, size_t ld,
                 int across, df_real *panel);
    /* c[i * rs + j * cs] (+)= sum over k of a(k, i) b(k, j), i < m, j < n */
    void (*tile)(size_t k, const df_real *a, const df_real *b, size_t m, size_t n,
                 int accumulate, df_real *c, size_t rs, size_t cs);
} dfi_micro;

#define DFI_KC 256             /* a panel of B, 32 columns wide: 32 KB of the L1 cache */
#define DFI_MC 480             /* a block of A: 480 KB of the L2 cache */
#define DFI_NC 192             /* a strip of B: 192 KB of it; both are whole tiles wide */

static void dfi_pack_plain(size_t width, size_t count, size_t k, const df_real *x,
                           size_t ld, int across, df_real *panel) {
    size_t si = across ? ld : 1, sk = across ? 1 : ld;
    for (size_t j = 0; j < k; j++)
        for (size_t i = 0; i < width; i++)
            panel[j * width + i] = i < count ? x[i * si + j * sk] : 0;
}
static void dfi_tile_plain(size_t k, const df_real *a, const df_real *b, size_t m,
                           size_t n, int accumulate, df_real *c, size_t rs, size_t cs) {
    df_real s[4][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}, {0, 0, 0, 0}, {0, 0, 0, 0}};
    for (size_t p = 0; p < k; p++, a += 4, b += 4)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) s[i][j] += a[i] * b[j];
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) {
            df_real *at = c + i * rs + j * cs;
            *at = accumulate ? *at + s[i][j] : s[i][j];
        }
}
static const dfi_micro dfi_micro_plain = {4, 4, 4, 4, dfi_pack_plain, dfi_tile_plain};

/* t = T d, the transforms of dfi_wino_conv, below, along one axis. */
#define DFI_WINO_LINE(kind, t, d)                                                         \
    (kind == DFI_WINO_IN ? (t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1],   \
                            t[3] = d[1] - d[3], (void)0) :                                \
     kind == DFI_WINO_OUT ? (t[0] = d[0] + d[1] + d[2], t[1] = d[1] - d[2] - d[3],        \
                             (void)0) :                                                   \
     (t[0] = d[0], t[1] = d[0] + d[1], t[2] = d[0] - d[1], t[3] = -d[1], (void)0))
static void dfi_winograd_plain(int kind, size_t n, const df_real *x, const size_t s[4],
                               df_real *y, size_t step) {
    const size_t in = kind == DFI_WINO_BACK ? 2 : 4, out = kind == DFI_WINO_OUT ? 2 : 4;
    for (size_t i = 0; i < n; i++) {
        df_real t[4][4], u[4], d[4];
        for (size_t b = 0; b < in; b++) {
            for (size_t a = 0; a < in; a++)
                d[a] = x[a % 2 * s[0] + a / 2 * s[1] + b % 2 * s[2] + b / 2 * s[3] + i];
            DFI_WINO_LINE(kind, t[b], d);
        }
        for (size_t a = 0; a < out; a++) {
            for (size_t b = 0; b < in; b++) d[b] = t[b][a];
            DFI_WINO_LINE(kind, u, d);
            for (size_t b = 0; b < out; b++) y[(a * out + b) * step + i] = u[b];
        }
    }
}
static void dfi_split_plain(size_t n, const df_real *x, df_real *even, df_real *odd) {
    for (size_t i = 0; i < n; i++) even[i] = x[2 * i], odd[i] = x[2 * i + 1];
}
static void dfi_merge_plain(size_t n, const df_real *even, const df_real *odd,
                            df_real *y) {
    for (size_t i = 0; i < n; i++) y[2 * i] += even[i], y[2 * i + 1] += odd[i];
}

#ifdef DFI_PLAIN_OPTIONS
#pragma GCC pop_options
#elif defined(__clang__) && defined(__FAST_MATH__)
#pragma float_control(pop)
#endif

/* What the workers of one dfi_gemm_batch share. Each product is cut into gm x gn
   rectangles of C; the rectangles of all products are dealt to the workers in equal runs.
   Workers never wait for each other: each packs what its rectangle needs, though a
   neighbour packs some of the same. That costs 1/M + 1/N of the work, less than a barrier
   for each block. */
typedef struct dfi_gemm_job {
    const dfi_micro *micro;
    int ta, tb, accumulate, workers;
    size_t batch, M, N, K, lda, sa, ldb, sb, rs, cs, sc;
    const df_real *A, *B;
    df_real *C;
    size_t gm, gn;             /* rectangles of each product */
    size_t mc, nc, kc;         /* block sizes */
    df_real *panels;           /* packing memory, (mc + nc) kc for each worker */
} dfi_gemm_job;

static size_t dfi_round_up(size_t x, size_t step) { return (x + step - 1) / step * step; }
static size_t dfi_smaller(size_t a, size_t b) { return a < b ? a : b; }

/* Packs rows [from, to) of op(A), or columns of op(B), k in [k0, k0 + kc), panel
   by panel. */
static void dfi_gemm_pack(const dfi_micro *micro, size_t width, size_t step, size_t from,
                          size_t to, size_t k0, size_t kc, const df_real *x, size_t ld,
                          int across, df_real *panel) {
    for (size_t i = from; i < to; i += width) {
        size_t count = dfi_smaller(width, to - i), padded = dfi_round_up(count, step);
        const df_real *at = across ? x + i * ld + k0 : x + k0 * ld + i;
        micro->pack(padded, count, kc, at, ld, across, panel);
        panel += padded * kc;
    }
}
/* One rectangle of C: rows [m0, m1), columns [n0, n1). */
static void dfi_gemm_rectangle(const dfi_gemm_job *g, const df_real *A, const df_real *B,
                               df_real *C, size_t m0, size_t m1, size_t n0, size_t n1,
                               df_real *panels) {
    const dfi_micro *u = g->micro;
    df_real *a = panels, *b = panels + g->mc * g->kc;
    for (size_t i0 = m0; i0 < m1; i0 += g->mc)
        for (size_t k0 = 0; k0 < g->K; k0 += g->kc) {
            size_t i1 = dfi_smaller(i0 + g->mc, m1), k = dfi_smaller(g->kc, g->K - k0);
            dfi_gemm_pack(u, u->rows, u->row_step, i0, i1, k0, k, A, g->lda, !g->ta, a);
            for (size_t j0 = n0; j0 < n1; j0 += g->nc) {
                size_t j1 = dfi_smaller(j0 + g->nc, n1);
                dfi_gemm_pack(u, u->cols, u->col_step, j0, j1, k0, k, B, g->ldb, g->tb, b);
                for (size_t j = j0; j < j1; j += u->cols)
                    for (size_t i = i0; i < i1; i += u->rows)
                        u->tile(k, a + (i - i0) * k, b + (j - j0) * k,
                                dfi_smaller(u->rows, i1 - i), dfi_smaller(u->cols, j1 - j),
                                g->accumulate || k0 > 0, C + i * g->rs + j * g->cs, g->rs,
                                g->cs);
            }
        }
}
/* Where part `index` of `parts` begins, in whole tiles. */
static size_t dfi_gemm_cut(size_t size, size_t tile, size_t index, size_t parts) {
    size_t tiles = (size + tile - 1) / tile;
    return dfi_smaller(tiles * index / parts * tile, size);
}
static void dfi_gemm_worker(void *arg, int index) {
    const dfi_gemm_job *g = (const dfi_gemm_job *)arg;
    size_t each = g->gm * g->gn, total = g->batch * each, w = (size_t)index;
    df_real *panels = g->panels + w * (g->mc + g->nc) * g->kc;
    size_t end = total * (w + 1) / (size_t)g->workers;
    for (size_t p = total * w / (size_t)g->workers; p < end; p++) {
        size_t item = p / each, im = p % each / g->gn, in = p % g->gn;
        dfi_gemm_rectangle(g, g->A + item * g->sa, g->B + item * g->sb,
                           g->C + item * g->sc,
                           dfi_gemm_cut(g->M, g->micro->rows, im, g->gm),
                           dfi_gemm_cut(g->M, g->micro->rows, im + 1, g->gm),
                           dfi_gemm_cut(g->N, g->micro->cols, in, g->gn),
                           dfi_gemm_cut(g->N, g->micro->cols, in + 1, g->gn), panels);
    }
}

/* Cuts each product into `parts` rectangles, gm by gn, such that the largest costs least:
   its area, and its edges for packing, which takes as long as about 10 products a
   number. */
static void dfi_gemm_grid(dfi_gemm_job *g, size_t parts) {
    double best = -1;
    for (size_t gm = 1; gm <= parts; gm++) {
        if (parts % gm != 0) continue;
        size_t gn = parts / gm, r = g->micro->rows, c = g->micro->cols;
        double rows = (double)((((g->M + r - 1) / r + gm - 1) / gm) * r);
        double cols = (double)((((g->N + c - 1) / c + gn - 1) / gn) * c);
        double cost = rows * cols + 10 * (rows + cols);
        if (best < 0 || cost < best) { best = cost; g->gm = gm; g->gn = gn; }
    }
}

static df_result dfi_gemm_batch(df_ctx *ctx, int ta, int tb, size_t batch, size_t M,
                                size_t N, size_t K, const df_real *A, size_t lda,
                                size_t sa, const df_real *B, size_t ldb, size_t sb,
                                int accumulate, df_real *C, size_t ldc, size_t sc) {
    dfi_gemm_job g;
    if (batch == 0 || M == 0 || N == 0) return DF_OK;
    if (K == 0) {
        for (size_t i = 0; i < (accumulate ? 0 : batch * M); i++)
            memset(C + i / M * sc + i % M * ldc, 0, N * sizeof(df_real));
        return DF_OK;
    }
    g.micro = ctx->k->micro;
    g.batch = batch; g.K = K; g.accumulate = accumulate; g.C = C; g.sc = sc;
    if (N < g.micro->col_step && N < M) {
        /* Few columns would leave lanes idle. C^T = B^T A^T takes the same products, and
           they commute, to the bit. */
        g.M = N; g.A = B; g.lda = ldb; g.sa = sb; g.ta = !tb;
        g.N = M; g.B = A; g.ldb = lda; g.sb = sa; g.tb = !ta;
        g.rs = 1; g.cs = ldc;
    } else {
        g.M = M; g.A = A; g.lda = lda; g.sa = sa; g.ta = ta;
        g.N = N; g.B = B; g.ldb = ldb; g.sb = sb; g.tb = tb;
        g.rs = ldc; g.cs = 1;
    }

    /* Waking the workers takes about a microsecond: not for less than some 20 of work. */
    double enough = (double)batch * (double)M * (double)N * (double)K / 5e5 + 1;
    g.workers = enough < ctx->threads ? (int)enough : ctx->threads;
    size_t workers = (size_t)g.workers;
    dfi_gemm_grid(&g, batch % workers == 0 || batch >= 8 * workers ? 1 : workers);

    size_t blocks = (K + DFI_KC - 1) / DFI_KC; /* of even size, a function of K alone */
    g.kc = dfi_round_up((K + blocks - 1) / blocks, 16);
    g.mc = dfi_smaller(DFI_MC, dfi_round_up(g.M, g.micro->rows));
    g.nc = dfi_smaller(DFI_NC, dfi_round_up(g.N, g.micro->cols));
    df_scope mark = dfi_scratch_mark(ctx);
    g.panels =
        (df_real *)dfi_scratch(ctx, workers * (g.mc + g.nc) * g.kc * sizeof(df_real));
    if (!g.panels) return DF_ERR_MEMORY;
    dfi_parallel(ctx, g.workers, dfi_gemm_worker, &g);
    dfi_scratch_release(ctx, mark);
    return DF_OK;
}
static df_result dfi_gemm(df_ctx *ctx, int ta, int tb, size_t M, size_t N, size_t K,
                          const df_real *A, size_t lda, const df_real *B, size_t ldb,
                          int accumulate, df_real *C, size_t ldc) {
    return dfi_gemm_batch(ctx, ta, tb, 1, M, N, K, A, lda, 0, B, ldb, 0, accumulate, C,
                          ldc, 0);
}

/* ---- 3x3 convolutions by fewer products ----------------------------------------------

   Two neighbouring outputs of a filter g of three, y_0 = d_0 g_0 + d_1 g_1 + d_2 g_2 and
   y_1 = d_1 g_0 + d_2 g_1 + d_3 g_2, are six products, or four (Winograd 1980):

     m_0 = (d_0 - d_2) g_0            m_1 = (d_1 + d_2) (g_0 + g_1 + g_2)/2
     m_3 = (d_1 - d_3) g_2            m_2 = (d_2 - d_1) (g_0 - g_1 + g_2)/2
     y_0 = m_0 + m_1 + m_2            y_1 = m_1 - m_2 - m_3

   In short y = A^T (G g . B^T d), and along both axes of an image (Lavin & Gray 2016)
   Y = A^T [(G g G^T) . (B^T d B)] A: 2 x 2 outputs by 16 products instead of 36. Summed
   over channels these are 16 matrix products, U_k [O, C] V_k [C, tiles]. All maps are
   linear, so that gradients come by transposes: the filter's is
     dU_k = dM_k V_k^T with dM = A dY A^T,  dg = G^T dU G,
   and the image's is the convolution of dY with the filter turned about and transposed.

   An image is taken apart into its 4 phases, pixels of even and odd row and column (of the
   image with its border of zeros, on the way in): then the d of neighbouring tiles lie
   side by side. Rows of tiles have one place more than tiles, for the phases' last column;
   what is computed there is never used. */

enum { DFI_WINO_PLANE = 1024, DFI_WINO_SIZE = 1 << 19 };   /* elements: phases, V or M */

typedef struct dfi_wino {
    const dfi_kernels *k;
    dfi_image s;
    size_t pitch, tiles;               /* places in a row of tiles, rows of an image */
    size_t samples, rows;              /* a part: so many images, or rows of one ... */
    size_t b, row, n_samples, n_rows;  /* the current one ... */
    size_t run, places;                /* ... has so many places a sample, and in all */
    int kind;
    size_t channels;                   /* of the image that is read or written, */
    df_real *image, *v;                /* and its 16 arrays [channels, places] */
    df_real *u, *v1, *v2;
} dfi_wino;

/* Below, transforms would cost more than they save. */
static int dfi_wino_fits(const dfi_image *s) {
    return s->C >= 16 && s->O >= 16 && s->H > 1 && s->W > 1 && s->W < DFI_WINO_PLANE / 2;
}
/* (G x G) [16, 9], the filter turned about or not. */
static void dfi_wino_filter(int turned, df_real g[16 * 9]) {
    static const double G[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
    for (int i = 0; i < 16 * 9; i++) {
        int k = i / 9, j = turned ? 8 - i % 9 : i % 9;
        g[i] = (df_real)(G[k / 4][j / 3] * G[k % 4][j % 3]);
    }
}
/* Parts hold as much as stays in the cache, one about as much as the other. */
static df_result dfi_wino_begin(df_ctx *ctx, dfi_wino *g, const dfi_image *s) {
    size_t most = s->C > s->O ? s->C : s->O, parts, n;
    memset(g, 0, sizeof *g);
    g->k = ctx->k, g->s = *s;
    g->pitch = (s->W + 1) / 2 + 1, g->tiles = (s->H + 1) / 2;
    n = DFI_WINO_SIZE / dfi_mul(16 * most, g->pitch);
    n = n < 1 ? 1 : dfi_smaller(n, g->tiles);
    parts = (g->tiles + n - 1) / n;
    g->rows = (g->tiles + parts - 1) / parts;
    n = parts > 1 ? 1 : DFI_WINO_SIZE / (16 * most * g->pitch * g->tiles);
    parts = n < 1 ? s->B : (s->B + n - 1) / n;
    g->samples = (s->B + parts - 1) / parts;
    n = dfi_mul(16 * most, g->samples * g->rows * g->pitch);
    g->u = (df_real *)dfi_scratch(ctx, dfi_mul(16 * s->C * s->O, sizeof(df_real)));
    g->v1 = (df_real *)dfi_scratch(ctx, dfi_mul(n, sizeof(df_real)));
    g->v2 = (df_real *)dfi_scratch(ctx, dfi_mul(n, sizeof(df_real)));
    return g->u && g->v1 && g->v2 ? DF_OK : DF_ERR_MEMORY;
}
static int dfi_wino_next(dfi_wino *g) {
    g->row += g->n_rows;
    if (g->row == g->tiles) g->row = 0;
    if (g->row == 0) g->b += g->n_samples;
    if (g->b == g->s.B) return 0;
    g->n_samples = dfi_smaller(g->s.B - g->b, g->samples);
    g->n_rows = dfi_smaller(g->tiles - g->row, g->rows);
    g->run = g->n_rows * g->pitch;
    g->places = g->n_samples * g->run;
    return 1;
}
/* Rows of tiles [row, row + n) of one channel into phases, or added from them. The border
   shifts pixels by one. */
static void dfi_wino_phases(const dfi_wino *g, df_real *x, size_t row, size_t n,
                            df_real *phase) {
    size_t H = g->s.H, W = g->s.W, p = g->pitch, border = g->kind == DFI_WINO_IN;
    for (size_t i = 0; i < 2 * (n + border); i++) {
        size_t y = 2 * row + i - border;       /* above the image: wraps, so is > H */
        df_real *first = phase + i % 2 * 2 * DFI_WINO_PLANE + i / 2 * p;
        df_real *even = first + border * DFI_WINO_PLANE;
        df_real *odd = first + (border ? 1 : DFI_WINO_PLANE);
        df_real *at = x + y * W;
        if (g->kind == DFI_WINO_OUT) {
            if (y >= H) continue;
            g->k->merge(W / 2, even, odd, at);
            if (W % 2) at[W - 1] += even[W / 2];
            continue;
        }
        memset(first, 0, p * sizeof *x);
        memset(first + DFI_WINO_PLANE, 0, p * sizeof *x);
        if (y >= H) continue;
        g->k->split(W / 2, at, even, odd);
        if (W % 2) even[W / 2] = at[W - 1];
    }
}
/* Channels and samples [from, to): between an image and its 16 arrays. */
static void dfi_wino_piece(void *arg, size_t from, size_t to) {
    const dfi_wino *g = (const dfi_wino *)arg;
    df_real phase[4 * DFI_WINO_PLANE];
    size_t most = DFI_WINO_PLANE / g->pitch - 2, step = g->channels * g->places, n;
    const size_t arrays[4] = {4 * step, 8 * step, step, 2 * step};
    const size_t phases[4] = {2 * DFI_WINO_PLANE, g->pitch, DFI_WINO_PLANE, 1};
    for (size_t i = from; i < to; i++) {
        size_t b = g->b + i % g->n_samples, c = i / g->n_samples;
        df_real *x = g->image + (b * g->channels + c) * g->s.H * g->s.W;
        for (size_t r = 0; r < g->n_rows; r += n) {
            df_real *v = g->v + i * g->run + r * g->pitch;
            n = dfi_smaller(most, g->n_rows - r);
            if (g->kind == DFI_WINO_OUT)
                g->k->winograd(g->kind, n * g->pitch, v, arrays, phase, DFI_WINO_PLANE);
            dfi_wino_phases(g, x, g->row + r, n, phase);
            if (g->kind == DFI_WINO_OUT) continue;
            for (size_t k = 0; k < 4; k++)     /* the last place looks one further */
                phase[k * DFI_WINO_PLANE + (n + 1) * g->pitch] = 0;
            g->k->winograd(g->kind, n * g->pitch, phase, phases, v, step);
        }
    }
}
static void dfi_wino_run(df_ctx *ctx, dfi_wino *g, int kind, size_t channels,
                         const df_real *image, df_real *v) {
    g->kind = kind, g->channels = channels, g->v = v;
    g->image = (df_real *)(uintptr_t)image;    /* written only OUT */
    dfi_split(ctx, channels * g->n_samples, 16 * g->run, dfi_wino_piece, g);
}

static df_result dfi_wino_conv(df_ctx *ctx, const dfi_image *s, int back,
                               const df_real *x, const df_real *w, df_real *y) {
    size_t in = back ? s->O : s->C, out = back ? s->C : s->O, size = s->C * s->O;
    df_scope mark = dfi_scratch_mark(ctx);
    df_real filter[16 * 9];
    dfi_wino g;
    df_result result = dfi_wino_begin(ctx, &g, s);
    dfi_wino_filter(back, filter);
    if (result == DF_OK)
        result = dfi_gemm(ctx, 0, 1, 16, size, 9, filter, 9, w, 9, 0, g.u, size);
    while (result == DF_OK && dfi_wino_next(&g)) {
        dfi_wino_run(ctx, &g, DFI_WINO_IN, in, x, g.v1);
        result = dfi_gemm_batch(ctx, back, 0, 16, out, g.places, in, g.u, s->C, size, g.v1,
                                g.places, in * g.places, 0, g.v2, g.places,
                                out * g.places);
        if (result == DF_OK) dfi_wino_run(ctx, &g, DFI_WINO_OUT, out, y, g.v2);
    }
    dfi_scratch_release(ctx, mark);
    return result;
}
static df_result dfi_wino_weights(df_ctx *ctx, const dfi_image *s, const df_real *x,
                                  const df_real *dy, df_real *dw) {
    size_t size = s->C * s->O;
    df_scope mark = dfi_scratch_mark(ctx);
    df_real filter[16 * 9];
    dfi_wino g;
    df_result result = dfi_wino_begin(ctx, &g, s);
    for (int part = 0; result == DF_OK && dfi_wino_next(&g); part++) {
        dfi_wino_run(ctx, &g, DFI_WINO_IN, s->C, x, g.v1);
        dfi_wino_run(ctx, &g, DFI_WINO_BACK, s->O, dy, g.v2);
        result = dfi_gemm_batch(ctx, 0, 1, 16, s->O, s->C, g.places, g.v2, g.places,
                                s->O * g.places, g.v1, g.places, s->C * g.places, part > 0,
                                g.u, s->C, size);
    }
    dfi_wino_filter(0, filter);
    if (result == DF_OK)
        result = dfi_gemm(ctx, 1, 0, size, 9, 16, g.u, size, filter, 9, 1, dw, 9);
    dfi_scratch_release(ctx, mark);
    return result;
}

/* ---- the tables --------------------------------------------------------------------- */

#define DFI_KERNEL_TABLE(s, isa)                                                         \
    static const dfi_kernels dfi_kernels_##s = {                                         \
        #s, isa,                                                                         \
        {dfi_add_##s, dfi_sub_##s, dfi_mul_##s, dfi_div_##s},                            \
        {dfi_exp_##s, dfi_log_##s, dfi_sqrt_##s, dfi_sin_##s, dfi_cos_##s,               \
         dfi_tanh_##s, dfi_sigmoid_##s, dfi_silu_##s, dfi_gelu_tanh_##s,                 \
         dfi_gelu_erf_##s, dfi_erf_##s, dfi_relu_##s, dfi_step_##s, dfi_softplus_##s},   \
        {dfi_exp_back_##s, dfi_log_back_##s, dfi_sqrt_back_##s, dfi_sin_back_##s,        \
         dfi_cos_back_##s, dfi_tanh_back_##s, dfi_sigmoid_back_##s, dfi_silu_back_##s,   \
         dfi_gelu_tanh_back_##s, dfi_gelu_erf_back_##s, dfi_erf_back_##s,                \
         dfi_relu_back_##s, dfi_step_back_##s, dfi_softplus_back_##s},                   \
        dfi_affine_##s, dfi_axpy_##s, dfi_muladd_##s, dfi_combine_##s,                   \
        dfi_convert_##s, dfi_sum_##s,                                              \
        dfi_dot_##s, dfi_max_##s, dfi_colsum_##s, dfi_moments_##s, dfi_nonfinite_##s,    \
        dfi_softmax_##s, dfi_softmax_back_##s, dfi_log_softmax_##s,                      \
        dfi_log_softmax_back_##s, dfi_winograd_##s, dfi_split_##s, dfi_merge_##s,        \
        dfi_adamw_##s, dfi_ema_##s, &dfi_micro_##s}
DFI_KERNEL_TABLE(plain, DF_ISA_PLAIN);

static void dfi_rotate(double *x, double *y, double c, double s) {
    double old = *x;
    *x = c * old - s * *y;
    *y = s * old + c * *y;
}

/* Cyclic Jacobi (Golub & Van Loan 2013, sec. 8.5): each rotation makes one a_ij zero, and
   the rest off the diagonal shrinks, in the end quadratically. Symmetric a ends with L on
   its diagonal, q with Q^T. Returns 0 where a was diagonal: then L is exact. */
static int dfi_jacobi(size_t n, double tiny, double *a, double *q) {
    int rotated = 0, again = 1;
    for (size_t e = 0; e < n * n; e++) q[e] = e % (n + 1) == 0 ? 1.0 : 0.0;
    for (int sweep = 0; again && sweep < 64; sweep++) {
        again = 0;
        for (size_t e = 0; e < n * n; e++) {
            size_t i = e / n, j = e % n, r;
            if (j <= i || fabs(a[e]) <= tiny) continue;
            /* tangent of the angle: the smaller root of t^2 + 2 theta t - 1 = 0 */
            double theta = (a[j * n + j] - a[i * n + i]) / (2.0 * a[e]);
            double t = (theta < 0.0 ? -1.0 : 1.0) / (fabs(theta) + hypot(theta, 1.0));
            double c = 1.0 / hypot(t, 1.0);
            for (r = 0; r < n; r++) dfi_rotate(a + r * n + i, a + r * n + j, c, t * c);
            for (r = 0; r < n; r++) dfi_rotate(a + i * n + r, a + j * n + r, c, t * c);
            for (r = 0; r < n; r++) dfi_rotate(q + i * n + r, q + j * n + r, c, t * c);
            a[i * n + j] = a[j * n + i] = 0.0;
            again = rotated = 1;
        }
    }
    return rotated;
}

static void dfi_turn(size_t d, const double *axis, int back, const double *x, double *y) {
    memset(y, 0, d * sizeof *y);
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < d; j++)
            y[back ? i : j] += axis[i * d + j] * x[back ? j : i];
}

/* The tuned kernels: the header reads its own last region once for each instruction
   set. */
#if (defined(__GNUC__) || defined(__clang__)) && !defined(DIFFUSION_DOUBLE)              \
    && !defined(DIFFUSION_NO_SIMD) && (defined(__x86_64__) || defined(__aarch64__))
#define DFI_SIMD
#ifndef DIFFUSION_FILE
#define DIFFUSION_FILE "diffusion.h"
#endif
#ifdef __clang__
#define DFI_UNROLL _Pragma("clang loop unroll(full)")
#else
#define DFI_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

#if defined(DFI_SIMD) && defined(__x86_64__)
#define DFI_PASS sse2
#define DFI_PASS_BYTES 16
#define DFI_PASS_QUARTERS(f) f(0)
#define DFI_PASS_ROWS 4
#define DFI_PASS_VECTORS 2
#define DFI_PASS_SQRT "sqrtps {%1, %0|%0, %1}" : "=x"(y) : "x"(x)
#ifndef __clang__
#pragma GCC push_options
#endif
#include DIFFUSION_FILE
#ifndef __clang__
#pragma GCC pop_options
#endif

#define DFI_PASS avx2
#define DFI_PASS_BYTES 32
#define DFI_PASS_QUARTERS(f) f(0), f(4)
#define DFI_PASS_ROWS 4
#define DFI_PASS_VECTORS 3
#define DFI_PASS_SQRT "vsqrtps {%1, %0|%0, %1}" : "=x"(y) : "x"(x)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include DIFFUSION_FILE
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define DFI_PASS avx512
#define DFI_PASS_BYTES 64
#define DFI_PASS_QUARTERS(f) f(0), f(4), f(8), f(12)
#define DFI_PASS_ROWS 12
#define DFI_PASS_VECTORS 2
#define DFI_PASS_SQRT "vsqrtps {%1, %0|%0, %1}" : "=v"(y) : "v"(x)
#ifdef __clang__
#pragma clang attribute push(                                                             \
    __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma"))),                    \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma")
#endif
#include DIFFUSION_FILE
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

DFI_KERNEL_TABLE(sse2, DF_ISA_SSE2);
DFI_KERNEL_TABLE(avx2, DF_ISA_AVX2);
DFI_KERNEL_TABLE(avx512, DF_ISA_AVX512);

#elif defined(DFI_SIMD)
#define DFI_PASS neon
#define DFI_PASS_BYTES 16
#define DFI_PASS_QUARTERS(f) f(0)
#define DFI_PASS_ROWS 12
#define DFI_PASS_VECTORS 2
#define DFI_PASS_SQRT "fsqrt %0.4s, %1.4s" : "=w"(y) : "w"(x)
#ifndef __clang__
#pragma GCC push_options
#endif
#include DIFFUSION_FILE
#ifndef __clang__
#pragma GCC pop_options
#endif
DFI_KERNEL_TABLE(neon, DF_ISA_NEON);
#endif

/* Asks the processor, and through it the operating system, which must save the
   registers. */
static const dfi_kernels *dfi_kernels_select(df_isa max_isa) {
#if defined(DFI_SIMD) && defined(__x86_64__)
    __builtin_cpu_init();
    if (max_isa >= DF_ISA_AVX512 && __builtin_cpu_supports("avx512f")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512bw")) return &dfi_kernels_avx512;
    if (max_isa >= DF_ISA_AVX2 && __builtin_cpu_supports("avx2")
        && __builtin_cpu_supports("fma")) return &dfi_kernels_avx2;
    if (max_isa >= DF_ISA_SSE2) return &dfi_kernels_sse2;
#elif defined(DFI_SIMD)
    if (max_isa >= DF_ISA_NEON) return &dfi_kernels_neon;
#endif
    (void)max_isa;
    return &dfi_kernels_plain;
}

#endif /* DIFFUSION_IMPLEMENTATION */
/* =====================================================================================
   // >>pass: the tuned kernels, compiled once for each instruction set

   This region is read only when the kernels chapter includes the header again, with
     DFI_PASS         the suffix of every name here: sse2, avx2, avx512, neon
     DFI_PASS_BYTES   the width of a vector register
     DFI_PASS_ROWS, DFI_PASS_VECTORS   the largest tile of the matrix product
     DFI_PASS_SQRT    the square root instruction
     DFI_PASS_QUARTERS(f)              f(0), f(4), ... for each 16 bytes of a vector
   and with the compiler switched to that instruction set. Vectors are those of GCC and
   Clang: + - * / act on each lane, == and < give lanes of 0 or -1.

   Every loop reads and writes through get and put, which take the last, incomplete vector
   through a padded copy: the tail runs the same instructions as the rest, and an element
   comes out the same wherever it stands.
   ===================================================================================== */
#ifdef DFI_PASS

/* -Ofast would let the compiler reorder the error-free reductions below into nothing, and
   assume that no Inf ever appears. Fused multiply-adds it shall form, also under
   -std=c99. */
#ifdef __clang__
#ifdef __FAST_MATH__
#pragma float_control(precise, on, push)
#endif
#else
#pragma GCC optimize("no-fast-math", "fp-contract=fast")
#endif

#define DFI_JOIN3(a, b, c) a##b##_##c
#define DFI_JOIN2(a, b, c) DFI_JOIN3(a, b, c)
#define DFI_V(name) DFI_JOIN2(dfi_, name, DFI_PASS)
#define DFI_LANES ((size_t)(DFI_PASS_BYTES / 4))

typedef float DFI_V(v) __attribute__((vector_size(DFI_PASS_BYTES)));      /* a register */
typedef int32_t DFI_V(vi) __attribute__((vector_size(DFI_PASS_BYTES)));
typedef uint32_t DFI_V(vu) __attribute__((vector_size(DFI_PASS_BYTES)));
typedef double DFI_V(vd) __attribute__((vector_size(DFI_PASS_BYTES))); /* half as many */
typedef float DFI_V(mem)
    __attribute__((vector_size(DFI_PASS_BYTES), aligned(4), may_alias));
typedef uint32_t DFI_V(memu)
    __attribute__((vector_size(DFI_PASS_BYTES), aligned(4), may_alias));
typedef float DFI_V(half)
    __attribute__((vector_size(DFI_PASS_BYTES / 2), aligned(4), may_alias));
typedef float DFI_V(quad) __attribute__((vector_size(16), aligned(4), may_alias));

DFI_INLINE DFI_V(v) DFI_V(load)(const float *p) { return *(const DFI_V(mem) *)p; }
DFI_INLINE void DFI_V(store)(float *p, DFI_V(v) x) { *(DFI_V(mem) *)p = x; }
DFI_INLINE DFI_V(v) DFI_V(all)(float x) {
    DFI_V(v) zero = {0};
    return x - zero;
}
/* The end of an array, by way of a vector's worth of memory. Kept out of line: rare. */
static __attribute__((noinline)) const float *DFI_V(edge)(const float *p, size_t left,
                                                          float fill, float *pad,
                                                          size_t size) {
    for (size_t i = 0; i < size; i++) pad[i] = i < left ? p[i] : fill;
    return pad;
}
static __attribute__((noinline)) void DFI_V(put_edge)(float *p, const float *pad,
                                                      size_t left) {
    for (size_t i = 0; i < left; i++) p[i] = pad[i];
}
/* The vector at p, of which `left` elements exist; `fill` stands for the others. */
DFI_INLINE DFI_V(v) DFI_V(get_or)(const float *p, size_t left, float fill) {
    float pad[DFI_LANES];
    return DFI_V(load)(left >= DFI_LANES ? p : DFI_V(edge)(p, left, fill, pad, DFI_LANES));
}
DFI_INLINE DFI_V(v) DFI_V(get)(const float *p, size_t left) {
    return DFI_V(get_or)(p, left, 0);
}
DFI_INLINE void DFI_V(put)(float *p, DFI_V(v) x, size_t left) {
    float pad[DFI_LANES];
    DFI_V(store)(left >= DFI_LANES ? p : pad, x);
    if (left < DFI_LANES) DFI_V(put_edge)(p, pad, left);
}
DFI_INLINE DFI_V(v) DFI_V(select)(DFI_V(vi) mask, DFI_V(v) yes, DFI_V(v) no) {
    return (DFI_V(v))((mask & (DFI_V(vi))yes) | (~mask & (DFI_V(vi))no));
}
DFI_INLINE DFI_V(v) DFI_V(min)(DFI_V(v) a, DFI_V(v) b) {
    return DFI_V(select)((DFI_V(vi))(b < a), b, a);           /* a if it is NaN */
}
DFI_INLINE DFI_V(v) DFI_V(max2)(DFI_V(v) a, DFI_V(v) b) {
    return DFI_V(select)((DFI_V(vi))(b > a), b, a);
}
DFI_INLINE DFI_V(v) DFI_V(abs)(DFI_V(v) x) {
    return (DFI_V(v))((DFI_V(vi))x & 0x7fffffff);
}
DFI_INLINE DFI_V(v) DFI_V(root)(DFI_V(v) x) {
    DFI_V(v) y;
    __asm__(DFI_PASS_SQRT);
    return y;
}

/* ---- elementary functions ----------------------------------------------------------- */

/* 1.5 * 2^23: adding it rounds to an integer, which then stands in the sum's low bits */
#define DFI_ROUNDER 12582912.0f

/* e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln(2)/2. ln 2 is split in two (Cody and Waite
   1980): n times the first part is exact. 2^n is applied in two factors, so that results
   down to the smallest subnormal number and up to the largest come out right. */
DFI_INLINE DFI_V(v) DFI_V(e)(DFI_V(v) x) {
    x = DFI_V(max2)(DFI_V(min)(x, DFI_V(all)(89.0f)), DFI_V(all)(-104.0f)); /* inf and 0 */
    DFI_V(v) t = x * 1.44269504f + DFI_ROUNDER, n = t - DFI_ROUNDER;
    DFI_V(v) r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    DFI_V(v) p = r * 1.9875691500e-4f + 1.3981999507e-3f;     /* Cephes' expf */
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    DFI_V(vi) k = (DFI_V(vi))t - 0x4b400000;                  /* the bits of DFI_ROUNDER */
    DFI_V(vi) first = k >> 1, second = k - first;
    return p * (DFI_V(v))((first + 127) << 23) * (DFI_V(v))((second + 127) << 23);
}

/* log x = e ln 2 + log(1 + f), 1 + f in [sqrt(1/2), sqrt 2); with s = f / (2 + f),
   log(1 + f) = 2 atanh s = f - f^2/2 + s (f^2/2 + R(s^2)) (FreeBSD's logf) */
DFI_INLINE DFI_V(v) DFI_V(ln)(DFI_V(v) x) {
    DFI_V(vi) bits = (DFI_V(vi))x, tiny = (DFI_V(vi))(bits < 0x00800000);
    DFI_V(vi) i = (DFI_V(vi))DFI_V(select)(tiny, x * 33554432.0f, x) - 0x3f3504f3;
    DFI_V(vi) power = (i >> 23) - (tiny & 25);
    DFI_V(v) e = __builtin_convertvector(power, DFI_V(v));
    DFI_V(v) f = (DFI_V(v))((i & 0x7fffff) + 0x3f3504f3) - 1.0f;
    DFI_V(v) s = f / (f + 2.0f), z = s * s, h = 0.5f * f * f;
    DFI_V(v) r = z * (z * (z * (z * 0.24279078841f + 0.28498786688f) + 0.40000972152f)
                      + 0.66666662693f);
    DFI_V(v) y = s * (h + r) + e * 9.0580006145e-6f - h + f + e * 6.9313812256e-1f;
    DFI_V(vi) zero = (DFI_V(vi))((bits & 0x7fffffff) == 0);
    y = DFI_V(select)((DFI_V(vi))(bits >= 0x7f800000), x, y);            /* inf, NaN */
    DFI_V(vi) negative = (DFI_V(vi))(bits < 0), nan = negative & 0x7fc00000;
    y = (DFI_V(v))((DFI_V(vi))y | nan);
    return DFI_V(select)(zero, DFI_V(all)(-(float)HUGE_VAL), y);
}

/* 1/(1 + e^-x) from e^-|x|, which cannot overflow and loses nothing where x << 0 */
DFI_INLINE DFI_V(v) DFI_V(logistic)(DFI_V(v) x) {
    DFI_V(v) e = DFI_V(e)(-DFI_V(abs)(x));
    return DFI_V(select)((DFI_V(vi))(x < 0.0f), e, DFI_V(all)(1.0f)) / (e + 1.0f);
}
/* s(x) s(-x), the slope of the logistic function */
DFI_INLINE DFI_V(v) DFI_V(logistic_slope)(DFI_V(v) x) {
    DFI_V(v) e = DFI_V(e)(-DFI_V(abs)(x));
    return e / ((e + 1.0f) * (e + 1.0f));
}
/* log(1 + e^x) = max(x, 0) + log(1 + u), u = e^-|x|; log(1 + u) = 2 atanh(d / 2) with
   d = u / (1 + u/2) */
DFI_INLINE DFI_V(v) DFI_V(log1pexp)(DFI_V(v) x) {
    DFI_V(v) u = DFI_V(e)(-DFI_V(abs)(x)), d = u / (u * 0.5f + 1.0f), z = 0.25f * d * d;
    DFI_V(v) p = z * 0.1407888918f + 0.1398257887f;      /* minimax on [0, 1/9], 4e-9 */
    p = p * z + 0.2001229762f;
    p = p * z + 0.3333316082f;
    p = p * z + 1.0f;
    return DFI_V(max2)(x, DFI_V(all)(0.0f)) + d * p;
}
/* Near 0 an odd polynomial (Cephes' tanhf), else 1 - 2/(e^2|x| + 1) with the sign of x. */
DFI_INLINE DFI_V(v) DFI_V(hyperbolic)(DFI_V(v) x) {
    DFI_V(v) a = DFI_V(abs)(x), z = x * x;
    DFI_V(v) p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    DFI_V(v) big = 1.0f - 2.0f / (DFI_V(e)(a + a) + 1.0f);
    DFI_V(vi) sign = (DFI_V(vi))x & (-0x7fffffff - 1);
    big = (DFI_V(v))((DFI_V(vi))big | sign);
    return DFI_V(select)((DFI_V(vi))(a < 0.625f), p * z * x + x, big);
}
/* erfc(a) for a >= 0, given e^(-a^2): e^(-a^2) t Q(t), t = 1/(1 + 0.4 a), Q minimax on
   a in [0, 10] with relative error 4e-8. */
DFI_INLINE DFI_V(v) DFI_V(erfc)(DFI_V(v) a, DFI_V(v) gauss) {
    DFI_V(v) t = 1.0f / (a * 0.4f + 1.0f);
    DFI_V(v) p = t * 0.038508509f - 0.1274464349f;
    p = p * t + 0.05845088799f;
    p = p * t + 0.1158586134f;
    p = p * t + 0.06146568687f;
    p = p * t + 0.2007425484f;
    p = p * t + 0.200125255f;
    p = p * t + 0.2266732652f;
    p = p * t + 0.2256217069f;
    return p * t * gauss;
}
/* Phi(x), the normal distribution function, given e^(-x^2/2) */
DFI_INLINE DFI_V(v) DFI_V(normal)(DFI_V(v) x, DFI_V(v) gauss) {
    DFI_V(v) tail = 0.5f * DFI_V(erfc)(DFI_V(abs)(x) * 0.70710678f, gauss);
    return DFI_V(select)((DFI_V(vi))(x < 0.0f), tail, 1.0f - tail);
}
DFI_INLINE DFI_V(v) DFI_V(error)(DFI_V(v) x) {
    DFI_V(v) a = DFI_V(abs)(x), z = x * x;
    DFI_V(v) p = z * 7.875875063e-5f - 8.016864287e-4f;  /* minimax on |x| < 1, 1e-9 */
    p = p * z + 5.189087423e-3f;
    p = p * z - 2.685421201e-2f;
    p = p * z + 0.1128359472f;
    p = p * z - 0.3761262667f;
    p = p * z + 1.128379166f;
    DFI_V(v) big = 1.0f - DFI_V(erfc)(a, DFI_V(e)(-z));
    big = (DFI_V(v))((DFI_V(vi))big | ((DFI_V(vi))x & (-0x7fffffff - 1)));
    return DFI_V(select)((DFI_V(vi))(a < 1.0f), p * x, big);
}
/* d/dx x s(u(x)), u = 2 sqrt(2/pi) (x + 0.044715 x^3). Beyond |x| = 40 it is 0 or 1. */
DFI_INLINE DFI_V(v) DFI_V(gelu_slope)(DFI_V(v) x) {
    const float scale = (float)(2 * DFI_GELU_SCALE), cubic = (float)DFI_GELU_CUBIC;
    DFI_V(v) c = DFI_V(max2)(DFI_V(min)(x, DFI_V(all)(40.0f)), DFI_V(all)(-40.0f));
    DFI_V(v) z = c * c;
    DFI_V(v) u = c * (z * cubic + 1.0f) * scale, e = DFI_V(e)(-DFI_V(abs)(u));
    DFI_V(v) d = 1.0f / (e + 1.0f), one = DFI_V(all)(1.0f);
    DFI_V(v) s = DFI_V(select)((DFI_V(vi))(c < 0.0f), e, one) * d;
    return s + c * (e * d * d) * ((z * (3 * cubic) + 1.0f) * scale);
}
/* sin(x + quarter pi/2): x = j pi/2 + r, |r| <= pi/4, pi/2 split in three; then Cephes'
   polynomials. Good to float accuracy for |x| < 8192. */
DFI_INLINE DFI_V(v) DFI_V(wave)(DFI_V(v) x, int quarter) {
    DFI_V(v) t = x * 0.63661977f + DFI_ROUNDER, j = t - DFI_ROUNDER;
    DFI_V(v) r = x - j * 1.5703125f;
    r = r - j * 4.837512969970703125e-4f;
    r = r - j * 7.549789948768648e-8f;
    DFI_V(v) z = r * r;
    DFI_V(v) s = z * -1.9515295891e-4f + 8.3321608736e-3f;
    s = s * z - 1.6666654611e-1f;
    s = s * z * r + r;
    DFI_V(v) c = z * 2.443315711809948e-5f - 1.388731625493765e-3f;
    c = c * z + 4.166664568298827e-2f;
    c = c * z * z - 0.5f * z + 1.0f;
    DFI_V(vi) k = (DFI_V(vi))t + quarter;
    DFI_V(v) y = DFI_V(select)((DFI_V(vi))((k & 1) != 0), c, s);
    return (DFI_V(v))((DFI_V(vi))y ^ ((k & 2) << 30));
}
/* Larger arguments go to the C library, lane by lane. */
DFI_INLINE DFI_V(v) DFI_V(wave_any)(DFI_V(v) x, int quarter) {
    DFI_V(v) y = DFI_V(wave)(x, quarter);
    DFI_V(vi) large = (DFI_V(vi))(((DFI_V(vi))x & 0x7fffffff) > 0x46000000);
    int any = 0;
    for (size_t i = 0; i < DFI_LANES; i++) any |= large[i];
    if (any) {
        for (size_t i = 0; i < DFI_LANES; i++)
            if (large[i]) y[i] = (float)(quarter ? cos((double)x[i]) : sin((double)x[i]));
    }
    return y;
}

/* ---- element-wise kernels ----------------------------------------------------------- */

/* t: the element, r: its f(t) in the backward pass */
#define DFI_UNARY(name, f, slope)                                                         \
    static void DFI_V(name)(size_t n, const float *x, float *y) {                         \
        for (size_t i = 0; i < n; i += DFI_LANES) {                                       \
            DFI_V(v) t = DFI_V(get)(x + i, n - i);                                        \
            DFI_V(put)(y + i, f, n - i);                                                  \
        }                                                                                 \
    }                                                                                     \
    static void DFI_V(name##_back)(size_t n, const float *x, const float *y,              \
                                   const float *dy, float *dx) {                          \
        for (size_t i = 0; i < n; i += DFI_LANES) {                                       \
            DFI_V(v) t = DFI_V(get)(x + i, n - i), r = DFI_V(get)(y + i, n - i);          \
            DFI_V(v) d = (slope) * DFI_V(get)(dy + i, n - i);                             \
            DFI_V(put)(dx + i, DFI_V(get)(dx + i, n - i) + d, n - i);                     \
            (void)t, (void)r;                                                             \
        }                                                                                 \
    }
DFI_UNARY(exp, DFI_V(e)(t), r)
DFI_UNARY(log, DFI_V(ln)(t), 1.0f / t)
DFI_UNARY(sqrt, DFI_V(root)(t), 0.5f / r)
DFI_UNARY(sin, DFI_V(wave_any)(t, 0), DFI_V(wave_any)(t, 1))
DFI_UNARY(cos, DFI_V(wave_any)(t, 1), -DFI_V(wave_any)(t, 0))
DFI_UNARY(tanh, DFI_V(hyperbolic)(t), 4.0f * DFI_V(logistic_slope)(t + t))
DFI_UNARY(sigmoid, DFI_V(logistic)(t), DFI_V(logistic_slope)(t))
DFI_UNARY(silu, t * DFI_V(logistic)(t),
          DFI_V(logistic)(t) + t * DFI_V(logistic_slope)(t))
DFI_UNARY(gelu_tanh,
          t * DFI_V(logistic)(t * (t * t * (float)DFI_GELU_CUBIC + 1.0f)
                              * (float)(2 * DFI_GELU_SCALE)),
          DFI_V(gelu_slope)(t))
DFI_UNARY(gelu_erf, t * DFI_V(normal)(t, DFI_V(e)(t * t * -0.5f)),
          DFI_V(normal)(t, DFI_V(e)(t * t * -0.5f))
              + t * DFI_V(e)(t * t * -0.5f) * 0.39894228f)
DFI_UNARY(erf, DFI_V(error)(t), DFI_V(e)(-(t * t)) * 1.12837917f)
DFI_UNARY(relu, DFI_V(max2)(t, DFI_V(all)(0.0f)),
          DFI_V(select)((DFI_V(vi))(t > 0.0f), DFI_V(all)(1.0f), DFI_V(all)(0.0f)))
DFI_UNARY(step, DFI_V(select)((DFI_V(vi))(t > 0.0f), DFI_V(all)(1.0f), DFI_V(all)(0.0f)),
          DFI_V(all)(0.0f))
DFI_UNARY(softplus, DFI_V(log1pexp)(t), DFI_V(logistic)(t))
#undef DFI_UNARY

/* Stride 0: one element stands for all. It is spread over a vector of its own, which the
   loop then reads again and again: i * 0 needs no case of its own. */
#define DFI_BINARY(name, head, op)                                                        \
    static void DFI_V(name)(size_t n, const float *a, size_t sa, const float *b,          \
                            size_t sb, float *y) {                                        \
        float wide_a[DFI_LANES], wide_b[DFI_LANES];                                       \
        if (sa == 0 && n > 0) {                                                           \
            DFI_V(store)(wide_a, DFI_V(all)(*a));                                         \
            a = wide_a;                                                                   \
        }                                                                                 \
        if (sb == 0 && n > 0) {                                                           \
            DFI_V(store)(wide_b, DFI_V(all)(*b));                                         \
            b = wide_b;                                                                   \
        }                                                                                 \
        for (size_t i = 0; i < n; i += DFI_LANES) {                                       \
            DFI_V(v) va = DFI_V(get)(a + i * sa, n - i);                                  \
            DFI_V(v) vb = DFI_V(get)(b + i * sb, n - i);                                  \
            DFI_V(put)(y + i, head va op vb, n - i);                                      \
        }                                                                                 \
    }
DFI_BINARY(add, , +)
DFI_BINARY(sub, , -)
DFI_BINARY(mul, , *)
DFI_BINARY(div, , /)
DFI_BINARY(muladd, DFI_V(get)(y + i, n - i) +, *)
#undef DFI_BINARY

static void DFI_V(affine)(size_t n, float a, const float *x, float b, float *y) {
    for (size_t i = 0; i < n; i += DFI_LANES)
        DFI_V(put)(y + i, DFI_V(get)(x + i, n - i) * a + b, n - i);
}
static void DFI_V(axpy)(size_t n, float a, const float *x, float *y) {
    for (size_t i = 0; i < n; i += DFI_LANES)
        DFI_V(put)(y + i, DFI_V(get)(y + i, n - i) + DFI_V(get)(x + i, n - i) * a, n - i);
}
static void DFI_V(adamw)(size_t n, float *w, float *m, float *v, const float *g,
                         double scale, double lr, double b1, double b2, double eps,
                         double wd, double c1, double c2) {
    float r1 = (float)(1 - b1), r2 = (float)(1 - b2), keep = (float)(1 - lr * wd);
    float step = (float)(lr / c1), root = (float)(1 / sqrt(c2)), s = (float)scale;
    for (size_t i = 0; i < n; i += DFI_LANES) {
        size_t left = n - i;
        DFI_V(v) d = DFI_V(get)(g + i, left) * s, mi = DFI_V(get)(m + i, left);
        DFI_V(v) vi = DFI_V(get)(v + i, left);
        mi += (d - mi) * r1;
        vi += (d * d - vi) * r2;
        DFI_V(v) change = mi * step / (DFI_V(root)(vi) * root + (float)eps);
        DFI_V(put)(w + i, DFI_V(get)(w + i, left) * keep - change, left);
        DFI_V(put)(m + i, mi, left);
        DFI_V(put)(v + i, vi, left);
    }
}
static void DFI_V(ema)(size_t n, float *average, const float *w, double decay) {
    float rest = (float)(1 - decay);
    for (size_t i = 0; i < n; i += DFI_LANES) {
        DFI_V(v) a = DFI_V(get)(average + i, n - i);
        DFI_V(put)(average + i, a + (DFI_V(get)(w + i, n - i) - a) * rest, n - i);
    }
}

/* ---- reductions ----------------------------------------------------------------------
   Floats are widened and summed in double, in four vectors whose lanes each take every
   (2 * DFI_LANES)-th element; the order depends on n only. Half a vector of floats makes
   one of doubles. */

#define DFI_GROUP (2 * DFI_LANES)

DFI_INLINE DFI_V(vd) DFI_V(wide)(const float *p, size_t part) {
    return __builtin_convertvector(*(const DFI_V(half) *)(p + part * (DFI_LANES / 2)),
                                   DFI_V(vd));
}
/* p, or a copy of the `left` numbers there followed by zeros */
DFI_INLINE const float *DFI_V(group)(const float *p, size_t left, float *pad) {
    return left >= DFI_GROUP ? p : DFI_V(edge)(p, left, 0, pad, DFI_GROUP);
}
DFI_INLINE double DFI_V(total)(DFI_V(vd) a, DFI_V(vd) b, DFI_V(vd) c, DFI_V(vd) d) {
    DFI_V(vd) s = (a + b) + (c + d);
    double sum = 0;
    for (size_t i = 0; i < DFI_LANES / 2; i++) sum += s[i];
    return sum;
}
static double DFI_V(sum)(size_t n, const float *x) {
    DFI_V(vd) a = {0}, b = {0}, c = {0}, d = {0};
    float pad[DFI_GROUP];
    for (size_t i = 0; i < n; i += DFI_GROUP) {
        const float *p = DFI_V(group)(x + i, n - i, pad);
        a += DFI_V(wide)(p, 0), b += DFI_V(wide)(p, 1);
        c += DFI_V(wide)(p, 2), d += DFI_V(wide)(p, 3);
    }
    return DFI_V(total)(a, b, c, d);
}
static double DFI_V(dot)(size_t n, const float *x, const float *y) {
    DFI_V(vd) a = {0}, b = {0}, c = {0}, d = {0};
    float pad[DFI_GROUP], pad2[DFI_GROUP];
    for (size_t i = 0; i < n; i += DFI_GROUP) {
        const float *p = DFI_V(group)(x + i, n - i, pad);
        const float *q = DFI_V(group)(y + i, n - i, pad2);
        a += DFI_V(wide)(p, 0) * DFI_V(wide)(q, 0);
        b += DFI_V(wide)(p, 1) * DFI_V(wide)(q, 1);
        c += DFI_V(wide)(p, 2) * DFI_V(wide)(q, 2);
        d += DFI_V(wide)(p, 3) * DFI_V(wide)(q, 3);
    }
    return DFI_V(total)(a, b, c, d);
}
static void DFI_V(moments)(size_t n, const float *x, double *mean, double *variance) {
    double m = n > 0 ? DFI_V(sum)(n, x) / (double)n : 0, s = 0;
    DFI_V(vd) a = {0}, b = {0}, c = {0}, d = {0}, e;
    size_t i = 0;
    for (; i + DFI_GROUP <= n; i += DFI_GROUP) {
        e = DFI_V(wide)(x + i, 0) - m, a += e * e;
        e = DFI_V(wide)(x + i, 1) - m, b += e * e;
        e = DFI_V(wide)(x + i, 2) - m, c += e * e;
        e = DFI_V(wide)(x + i, 3) - m, d += e * e;
    }
    for (; i < n; i++) s += ((double)x[i] - m) * ((double)x[i] - m);
    *mean = m;
    *variance = n > 0 ? (DFI_V(total)(a, b, c, d) + s) / (double)n : 0;
}
static float DFI_V(max)(size_t n, const float *x) {
    DFI_V(v) m = DFI_V(all)(n > 0 ? *x : -(float)HUGE_VAL);
    for (size_t i = 0; i < n; i += DFI_LANES)
        m = DFI_V(max2)(m, DFI_V(get_or)(x + i, n - i, *x));
    float most = m[0];
    for (size_t i = 1; i < DFI_LANES; i++) most = m[i] > most ? m[i] : most;
    return most;
}
/* Down the rows, DFI_GROUP columns at a time. */
static void DFI_V(colsum)(size_t rows, size_t cols, size_t stride, const float *x,
                          float *y) {
    float pad[DFI_GROUP];
    double s[DFI_GROUP];
    for (size_t j = 0; j < cols; j += DFI_GROUP) {
        DFI_V(vd) a = {0}, b = {0}, c = {0}, d = {0};
        for (size_t i = 0; i < rows; i++) {
            const float *p = DFI_V(group)(x + i * stride + j, cols - j, pad);
            a += DFI_V(wide)(p, 0), b += DFI_V(wide)(p, 1);
            c += DFI_V(wide)(p, 2), d += DFI_V(wide)(p, 3);
        }
        __builtin_memcpy(s, &a, sizeof a);
        __builtin_memcpy(s + DFI_LANES / 2, &b, sizeof b);
        __builtin_memcpy(s + DFI_LANES, &c, sizeof c);
        __builtin_memcpy(s + 3 * (DFI_LANES / 2), &d, sizeof d);
        for (size_t i = 0; i < DFI_GROUP && j + i < cols; i++) y[j + i] += (float)s[i];
    }
}
/* Exponent bits all ones plus one more of their lowest carry into the sign bit; changes of
   the signs of many vectors are gathered by OR before anything is tested. */
DFI_INLINE DFI_V(vu) DFI_V(wild)(DFI_V(vu) bits) {
    return (bits + 0x00800000u) ^ bits;
}
DFI_INLINE int DFI_V(any_sign)(DFI_V(vu) found) {
    uint32_t any = 0;
    for (size_t j = 0; j < DFI_LANES; j++) any |= found[j];
    return (int)(any >> 31);
}
static size_t DFI_V(nonfinite)(size_t n, const float *x) {
    size_t i = 0, group = 16 * DFI_LANES;
    for (; i + group <= n; i += group) {
        DFI_V(vu) found = {0};
        DFI_UNROLL
        for (size_t j = 0; j < 16; j++)
            found |= DFI_V(wild)(*(const DFI_V(memu) *)(x + i + j * DFI_LANES));
        if (DFI_V(any_sign)(found)) break;
    }
    return i + dfi_nonfinite_plain(n - i, x + i);
}
/* y = sum_j c[j] x[j]. Doubles take four times as long as the memory; they are worth it
   where large terms cancel, as in x_0 from eps near pure noise, which large coefficients
   tell. */
static void DFI_V(combine_wide)(size_t n, int count, const double *c,
                                const float *const *x, float *y) {
    float pad[DFI_GROUP];
    for (size_t i = 0; i < n; i += DFI_GROUP) {
        DFI_V(vd) s[4] = {{0}, {0}, {0}, {0}};
        float *to = n - i < DFI_GROUP ? pad : y + i;
        for (int j = 0; j < count; j++) {
            const float *p = DFI_V(group)(x[j] + i, n - i, pad);
            DFI_UNROLL
            for (size_t part = 0; part < 4; part++) s[part] += DFI_V(wide)(p, part) * c[j];
        }
        DFI_UNROLL
        for (size_t part = 0; part < 4; part++)
            *(DFI_V(half) *)(to + part * (DFI_LANES / 2)) =
                __builtin_convertvector(s[part], DFI_V(half));
        if (to == pad) DFI_V(put_edge)(y + i, pad, n - i);
    }
}
/* A known count keeps pointers and factors in registers. Sums begin at 0, so that whoever
   fuses products and sums has no choice which. */
DFI_INLINE int DFI_V(combine_few)(size_t n, const int count, const int check,
                                  const float *f, const float *const *x, float *y) {
    const float *p[4];
    DFI_V(v) c[4];
    DFI_V(vu) found = {0};
    size_t i = 0;
    DFI_UNROLL
    for (int j = 0; j < count; j++) p[j] = x[j], c[j] = DFI_V(all)(f[j]);
    for (; i + 2 * DFI_LANES <= n; i += 2 * DFI_LANES) {
        DFI_V(v) a = {0}, b = {0};
        if (check) {
            found |= DFI_V(wild)((DFI_V(vu))DFI_V(load)(p[0] + i));
            found |= DFI_V(wild)((DFI_V(vu))DFI_V(load)(p[0] + i + DFI_LANES));
        }
        DFI_UNROLL
        for (int j = 0; j < count; j++) {
            a += DFI_V(load)(p[j] + i) * c[j];
            b += DFI_V(load)(p[j] + i + DFI_LANES) * c[j];
        }
        DFI_V(store)(y + i, a);
        DFI_V(store)(y + i + DFI_LANES, b);
    }
    for (; i < n; i += DFI_LANES) {
        DFI_V(v) s = {0};
        found |= DFI_V(wild)((DFI_V(vu))DFI_V(get)(p[0] + i, n - i));
        for (int j = 0; j < count; j++) s += DFI_V(get)(p[j] + i, n - i) * c[j];
        DFI_V(put)(y + i, s, n - i);
    }
    return !DFI_V(any_sign)(found);
}
static void DFI_V(combine)(size_t n, int count, const double *c, const float *const *x,
                           float *y) {
    float f[4] = {0};
    int large = count > 4;
    for (int j = 0; j < count && !large; j++) {
        large = fabs(c[j]) > (count < 3 ? 16 : 2);
        f[j] = (float)c[j];
    }
    if (large) DFI_V(combine_wide)(n, count, c, x, y);
    else if (count == 1) DFI_V(combine_few)(n, 1, 0, f, x, y);
    else if (count == 2) DFI_V(combine_few)(n, 2, 0, f, x, y);
    else if (count == 3) DFI_V(combine_few)(n, 3, 0, f, x, y);
    else if (count == 4) DFI_V(combine_few)(n, 4, 0, f, x, y);
}
static int DFI_V(convert)(size_t n, int count, const double *c, const float *const *x,
                          float *y) {
    float f[2] = {(float)c[0], count == 1 ? 0 : (float)c[1]};
    return count == 1 ? DFI_V(combine_few)(n, 1, 1, f, x, y)
                      : DFI_V(combine_few)(n, 2, 1, f, x, y);
}

/* ---- softmax ------------------------------------------------------------------------ */

static void DFI_V(softmax)(size_t n, const float *x, float *y) {
    float m = DFI_V(max)(n, x);
    for (size_t i = 0; i < n; i += DFI_LANES)
        DFI_V(put)(y + i, DFI_V(e)(DFI_V(get)(x + i, n - i) - m), n - i);
    DFI_V(affine)(n, (float)(1 / DFI_V(sum)(n, y)), y, 0, y);
}
static void DFI_V(softmax_back)(size_t n, const float *y, const float *dy, float *dx) {
    float s = (float)DFI_V(dot)(n, y, dy);
    for (size_t i = 0; i < n; i += DFI_LANES) {
        DFI_V(v) d = DFI_V(get)(y + i, n - i) * (DFI_V(get)(dy + i, n - i) - s);
        DFI_V(put)(dx + i, DFI_V(get)(dx + i, n - i) + d, n - i);
    }
}
static void DFI_V(log_softmax)(size_t n, const float *x, float *y) {
    float m = DFI_V(max)(n, x), part[256];
    double s = 0;
    for (size_t i = 0; i < n; i += 256) {
        size_t count = n - i < 256 ? n - i : 256;
        DFI_V(affine)(count, 1, x + i, -m, part);
        DFI_V(exp)(count, part, part);
        s += DFI_V(sum)(count, part);
    }
    float shift = (float)log(s);
    for (size_t i = 0; i < n; i += DFI_LANES)
        DFI_V(put)(y + i, DFI_V(get)(x + i, n - i) - m - shift, n - i);
}
static void DFI_V(log_softmax_back)(size_t n, const float *y, const float *dy, float *dx) {
    float s = (float)DFI_V(sum)(n, dy);
    for (size_t i = 0; i < n; i += DFI_LANES) {
        DFI_V(v) d = DFI_V(get)(dy + i, n - i) - DFI_V(e)(DFI_V(get)(y + i, n - i)) * s;
        DFI_V(put)(dx + i, DFI_V(get)(dx + i, n - i) + d, n - i);
    }
}

/* ---- 3x3 convolutions --------------------------------------------------------------- */

/* With the kind known the loops vanish. The last vector begins early rather than ends
   late, where there is a whole one: it computes some places again, which come out the
   same. */
DFI_INLINE void DFI_V(winograd_of)(const int kind, size_t n, const float *x,
                                   const size_t *s, float *y, size_t step) {
    const size_t in = kind == DFI_WINO_BACK ? 2 : 4, out = kind == DFI_WINO_OUT ? 2 : 4;
    for (size_t j = 0; j < n; j += DFI_LANES) {
        size_t i = j + DFI_LANES > n && n >= DFI_LANES ? n - DFI_LANES : j, left = n - i;
        DFI_V(v) t[4][4], u[4], d[4];
        DFI_UNROLL
        for (size_t b = 0; b < in; b++) {
            DFI_UNROLL
            for (size_t a = 0; a < in; a++)
                d[a] = DFI_V(get)(x + a % 2 * s[0] + a / 2 * s[1] + b % 2 * s[2]
                                  + b / 2 * s[3] + i, left);
            DFI_WINO_LINE(kind, t[b], d);
        }
        DFI_UNROLL
        for (size_t a = 0; a < out; a++) {
            DFI_UNROLL
            for (size_t b = 0; b < in; b++) d[b] = t[b][a];
            DFI_WINO_LINE(kind, u, d);
            DFI_UNROLL
            for (size_t b = 0; b < out; b++)
                DFI_V(put)(y + (a * out + b) * step + i, u[b], left);
        }
    }
}
static void DFI_V(winograd)(int kind, size_t n, const float *x, const size_t s[4],
                            float *y, size_t step) {
    if (kind == DFI_WINO_IN) DFI_V(winograd_of)(DFI_WINO_IN, n, x, s, y, step);
    else if (kind == DFI_WINO_OUT) DFI_V(winograd_of)(DFI_WINO_OUT, n, x, s, y, step);
    else DFI_V(winograd_of)(DFI_WINO_BACK, n, x, s, y, step);
}
/* Rows may be short: 4 at a time whatever the width of vectors. */
static void DFI_V(split)(size_t n, const float *x, float *even, float *odd) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        DFI_V(quad) a = *(const DFI_V(quad) *)(x + 2 * i);
        DFI_V(quad) b = *(const DFI_V(quad) *)(x + 2 * i + 4);
        *(DFI_V(quad) *)(even + i) = __builtin_shufflevector(a, b, 0, 2, 4, 6);
        *(DFI_V(quad) *)(odd + i) = __builtin_shufflevector(a, b, 1, 3, 5, 7);
    }
    dfi_split_plain(n - i, x + 2 * i, even + i, odd + i);
}
static void DFI_V(merge)(size_t n, const float *even, const float *odd, float *y) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        DFI_V(quad) a = *(const DFI_V(quad) *)(even + i);
        DFI_V(quad) b = *(const DFI_V(quad) *)(odd + i);
        *(DFI_V(quad) *)(y + 2 * i) += __builtin_shufflevector(a, b, 0, 4, 1, 5);
        *(DFI_V(quad) *)(y + 2 * i + 4) += __builtin_shufflevector(a, b, 2, 6, 3, 7);
    }
    dfi_merge_plain(n - i, even + i, odd + i, y + 2 * i);
}

/* ---- the matrix product: packing and tile ------------------------------------------- */

/* Columns of 4 rows become rows of 4, in registers: a matrix of 4 x 4 in each quarter of
   the vectors takes 8 shuffles however wide they are. Whole cache lines are read. The
   lists give each lane of a result by its place in the two operands. */
#define DFI_WIDE (DFI_PASS_BYTES / 4)
#define DFI_LOW(o) o, o + DFI_WIDE, o + 1, o + DFI_WIDE + 1
#define DFI_HIGH(o) o + 2, o + DFI_WIDE + 2, o + 3, o + DFI_WIDE + 3
#define DFI_FRONT(o) o, o + 1, o + DFI_WIDE, o + DFI_WIDE + 1
#define DFI_BACK(o) o + 2, o + 3, o + DFI_WIDE + 2, o + DFI_WIDE + 3
#define DFI_MIX(a, b, list) __builtin_shufflevector(a, b, DFI_PASS_QUARTERS(list))
#define DFI_PUT_QUAD(o, r, v)                                                             \
    (*(DFI_V(quad) *)(y + (o + r) * width) =                                              \
         __builtin_shufflevector(v, v, o, o + 1, o + 2, o + 3))
#define DFI_PUT_COLUMNS(o)                                                                \
    (DFI_PUT_QUAD(o, 0, c0), DFI_PUT_QUAD(o, 1, c1), DFI_PUT_QUAD(o, 2, c2),              \
     DFI_PUT_QUAD(o, 3, c3))
DFI_INLINE void DFI_V(turn)(const float *x, size_t ld, float *y, size_t width) {
    DFI_V(v) a = DFI_V(load)(x), b = DFI_V(load)(x + ld);
    DFI_V(v) c = DFI_V(load)(x + 2 * ld), d = DFI_V(load)(x + 3 * ld);
    DFI_V(v) ab = DFI_MIX(a, b, DFI_LOW), cd = DFI_MIX(c, d, DFI_LOW);
    DFI_V(v) ab2 = DFI_MIX(a, b, DFI_HIGH), cd2 = DFI_MIX(c, d, DFI_HIGH);
    DFI_V(v) c0 = DFI_MIX(ab, cd, DFI_FRONT), c1 = DFI_MIX(ab, cd, DFI_BACK);
    DFI_V(v) c2 = DFI_MIX(ab2, cd2, DFI_FRONT), c3 = DFI_MIX(ab2, cd2, DFI_BACK);
    (void)(DFI_PASS_QUARTERS(DFI_PUT_COLUMNS));
}
#undef DFI_WIDE
#undef DFI_LOW
#undef DFI_HIGH
#undef DFI_FRONT
#undef DFI_BACK
#undef DFI_MIX
#undef DFI_PUT_QUAD
#undef DFI_PUT_COLUMNS
static void DFI_V(pack)(size_t width, size_t count, size_t k, const float *x, size_t ld,
                        int across, float *panel) {
    size_t i = 0;
    if (!across) {
        for (size_t j = 0; j < k; j++, x += ld, panel += width) {
            for (i = 0; i + DFI_LANES <= count; i += DFI_LANES)
                DFI_V(store)(panel + i, DFI_V(load)(x + i));
            for (; i + 4 <= count; i += 4)
                *(DFI_V(quad) *)(panel + i) = *(const DFI_V(quad) *)(x + i);
            for (; i < width; i++) panel[i] = i < count ? x[i] : 0;
        }
        return;
    }
    for (; i + 4 <= count; i += 4) {
        size_t j = 0;
        for (; j + DFI_LANES <= k; j += DFI_LANES)
            DFI_V(turn)(x + i * ld + j, ld, panel + j * width + i, width);
        for (; j < k; j++)
            for (size_t r = i; r < i + 4; r++) panel[j * width + r] = x[r * ld + j];
    }
    for (size_t j = 0; j < k && i < width; j++)
        for (size_t r = i; r < width; r++)
            panel[j * width + r] = r < count ? x[r * ld + j] : 0;
}

/* A tile of rows x vectors registers of C. Both are constants where this is called, the
   loops over them vanish and s lives in registers. With 32 registers (AVX-512, NEON) 12 x
   2 take 24, with 16 (AVX2) 4 x 3 take 12; the others hold a row of b and one number of a.
   A step must load 12 + 2 (4 + 3) values for its 24 (12) multiply-adds; processors load at
   least as fast as they multiply, so the multipliers never wait. Two multipliers with a
   latency of 4 steps need 8 sums at work: there are enough. */
DFI_INLINE void DFI_V(tile_of)(size_t rows, size_t vectors, size_t k, const float *a,
                               const float *b, size_t m, size_t n, int accumulate,
                               float *c, size_t rs, size_t cs) {
    DFI_V(v) s[DFI_PASS_ROWS][DFI_PASS_VECTORS], row[DFI_PASS_VECTORS];
    float edge[DFI_PASS_ROWS * DFI_PASS_VECTORS * DFI_LANES];
    size_t width = vectors * DFI_LANES;
    DFI_UNROLL
    for (size_t i = 0; i < rows; i++) {
        DFI_UNROLL
        for (size_t j = 0; j < vectors; j++) s[i][j] = DFI_V(all)(0);
        if (i < m) __builtin_prefetch(c + i * rs, 1);
        if (i < m) __builtin_prefetch(c + i * rs + (n - 1) * cs, 1);
    }
    for (size_t p = 0; p < k; p++, a += rows, b += width) {
        DFI_UNROLL
        for (size_t j = 0; j < vectors; j++) row[j] = DFI_V(load)(b + j * DFI_LANES);
        DFI_UNROLL
        for (size_t i = 0; i < rows; i++) {
            DFI_UNROLL
            for (size_t j = 0; j < vectors; j++) s[i][j] += row[j] * a[i];
        }
    }
    int whole = m == rows && n == width && cs == 1, add = whole && accumulate;
    float *to = whole ? c : edge;
    size_t ld = whole ? rs : width;
    DFI_UNROLL
    for (size_t i = 0; i < rows; i++) {
        DFI_UNROLL
        for (size_t j = 0; j < vectors; j++) {
            float *at = to + i * ld + j * DFI_LANES;
            DFI_V(store)(at, add ? DFI_V(load)(at) + s[i][j] : s[i][j]);
        }
    }
    if (!whole)
        for (size_t i = 0; i < m; i++)
            for (size_t j = 0; j < n; j++)
                c[i * rs + j * cs] = accumulate ? c[i * rs + j * cs] + edge[i * width + j]
                                                : edge[i * width + j];
}
/* Fewer rows and columns by smaller tiles: the same sums in the same order. */
static void DFI_V(tile)(size_t k, const float *a, const float *b, size_t m, size_t n,
                        int accumulate, float *c, size_t rs, size_t cs) {
#define DFI_TILE(rows, vectors)                                                           \
    if (m > rows - 4 && n > (vectors - 1) * DFI_LANES) {                                  \
        DFI_V(tile_of)(rows, vectors, k, a, b, m, n, accumulate, c, rs, cs);              \
        return;                                                                           \
    }
#if DFI_PASS_ROWS == 12
    DFI_TILE(12, 2) DFI_TILE(12, 1) DFI_TILE(8, 2) DFI_TILE(8, 1)
    DFI_TILE(4, 2) DFI_TILE(4, 1)
#else
#if DFI_PASS_VECTORS == 3
    DFI_TILE(4, 3)
#endif
    DFI_TILE(4, 2) DFI_TILE(4, 1)
#endif
#undef DFI_TILE
}
static const dfi_micro DFI_V(micro) = {
    DFI_PASS_ROWS, DFI_PASS_VECTORS * DFI_LANES, 4, DFI_LANES, DFI_V(pack), DFI_V(tile)};

#if defined(__clang__) && defined(__FAST_MATH__)
#pragma float_control(pop)
#endif
#undef DFI_JOIN3
#undef DFI_JOIN2
#undef DFI_V
#undef DFI_LANES
#undef DFI_GROUP
#undef DFI_ROUNDER
#undef DFI_PASS
#undef DFI_PASS_BYTES
#undef DFI_PASS_ROWS
#undef DFI_PASS_VECTORS
#undef DFI_PASS_SQRT
#undef DFI_PASS_QUARTERS
#endif /* DFI_PASS */
