// Recorded trajectories of eight libraries, played through our samplers: final points to
// 1e-9 (double), to 2e-5 of the largest |x_final| (float). Reads the folder in the variable
// GOLDEN, or tests/golden, the subset that comes with the project.
#include "golden_diffusers.h"
#include "golden_libraries.h"
#include "golden_checkpoints.h"

// Not matched, case by case or group by group (a prefix): each with its reason. These do not
// count as checks; at most 5 % of all cases may be here.
typedef struct unmatched {
    const char *prefix, *reason;
} unmatched;
static const unmatched golden_unmatched[] = {
    {"guided/bpd_", "a bound on the likelihood, not a sampler"},
    {"guided/loss_", "a training loss, not a sampler"},
    {"kdiff/log_likelihood", "a likelihood, not a sampler"},
    {"score_sde/vp_likelihood", "a likelihood, not a sampler"},
    {"score_sde/ve_likelihood", "a likelihood, not a sampler"},
    {"unipc/data_vary_coeff_o2", "its corrector drops terms from order 2 on"},
    {"unipc/data_vary_coeff_o3", "its corrector drops terms from order 2 on"},
    {"unipc/nois_vary_coeff_o2", "its corrector drops terms from order 2 on"},
    {"unipc/nois_vary_coeff_o3", "its corrector drops terms from order 2 on"},
    {"respace/guided/T300_10-15-20", "49.5 there is 49 by rounding errors, here 50"},
    // With gamma = 0 EDM adds noise of sqrt(sigma_hat^2 - sigma^2) all the same, both computed
    // from t: the root of a rounding error, 1e-7 of x. The other cases happen to round to 0.
    {"edm/abl_vp_vp_vp_euler", "noise made of rounding errors, 1e-7"},
    {"edm/abl_vp_vp_none_euler", "noise made of rounding errors, 2e-8"},
    {"edm/abl_ve_vp_vp_euler", "noise made of rounding errors, 1e-7"},
    {"edm/abl_ve_vp_none_euler", "noise made of rounding errors, 4e-8"},
    {"edm/abl_edm_vp_vp_euler", "noise made of rounding errors, 3e-8"},
    {"edm/abl_edm_vp_none_euler", "noise made of rounding errors, 1e-7"},
    {"edm/abl_vp_churn", "noise made of rounding errors, 1e-7"},
};

static int cases, matched, left_out;

static const char *reason_of(const char *name) {
    for (size_t i = 0; i < sizeof golden_unmatched / sizeof golden_unmatched[0]; i++)
        if (strncmp(name, golden_unmatched[i].prefix, strlen(golden_unmatched[i].prefix)) == 0)
            return golden_unmatched[i].reason;
    return NULL;
}

static void play_file(const char *file) {
    static golden_case c;
    static golden_plan p;
    FILE *f = golden_open(file);
    int verbose = getenv("GOLDEN_VERBOSE") != NULL;
    while (f && golden_read(f, &c)) {
        const char *reason = reason_of(c.name);
        long failed = test_.failed;
        int known = 0;
        cases++;
        if (reason == NULL) {
            golden_plan_init(&p);
            known = golden_diffusers(&c, &p) || golden_libraries(&c, &p);
            check(known, "%s: no mapper knows this case", c.name);
        }
        matched += known && test_.failed == failed;
        left_out += reason != NULL;
        if (verbose)
            printf("%s %s%s%s\n", reason ? "left out" : test_.failed > failed ? "FAILED  " : "matched ",
                   c.name, reason ? ": " : "", reason ? reason : "");
        golden_free(&c);
    }
    if (f) check(feof(f), "%s: case %s and what follows cannot be read", file, c.name);
    if (f) fclose(f);
}

TEST(every_case) {
    static const char *const files[] = {
        "consistency_models.txt",     "diffusers_ddim.txt",          "diffusers_ddpm.txt",
        "diffusers_deis_unipc_sa.txt", "diffusers_dpm_multistep.txt", "diffusers_dpm_singlestep.txt",
        "diffusers_edm_cm.txt",       "diffusers_euler_heun.txt",    "diffusers_flow.txt",
        "diffusers_pndm.txt",         "dpm_solver_official.txt",     "edm.txt",
        "guided_diffusion.txt",       "kdiffusion.txt",              "schedules.txt",
        "score_sde.txt",              "unipc_official.txt"};
    const char *only = getenv("GOLDEN_FILE");
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++)
        if (only == NULL || strstr(files[i], only)) play_file(files[i]);
    printf("golden: %d cases, %d matched, %d left out\n", cases, matched, left_out);
    check(cases > 0, "no recorded cases found");
    check(left_out * 20 <= cases || cases < 100, "%d of %d left out", left_out, cases);
}

// Checkpoints, sampling and training with them, in the folder `nets`.
TEST(every_network) {
    static const char *const unets[] = {
        "cifar_style", "butterflies_style", "attn_levels", "class_cond_gray", "scale_shift",
        "scale_shift_attn_groups", "resample_resnet", "resample_resnet_ignored", "groups8_odd",
        "all_attn_one_level", "fractional_time", "center_midscale", "legacy_attention_names",
        "no_mid_attention", "weights_f16", "weights_bf16", "unusual_header", "fourier_time",
        "learned_time", "class_timestep", "resnet_resample_blocks", "trained_gray"};
    static const char *const dits[] = {"dit_sigma", "dit_nosigma_rgb", "dit_patch4_gray_nonull",
                                       "dit_bf16"};
    static const char *const samples[] = {"ddim_leading_clip", "ddim_eta1_trailing",
                                          "ddim_v_class_noclip", "dit_ddpm_learned_range_cfg",
                                          "dit_ddim10_clip"};
    for (size_t i = 0; i < sizeof unets / sizeof unets[0]; i++) nets_folder("unet", unets[i]);
    for (size_t i = 0; i < sizeof dits / sizeof dits[0]; i++) nets_folder("dit", dits[i]);
    for (size_t i = 0; i < sizeof samples / sizeof samples[0]; i++) nets_sample(samples[i]);
    nets_train("train_unet");
    nets_train("train_dit");
    printf("golden: %d networks, samplings and trainings\n", nets_cases);
    check(nets_cases > 0, "no recorded networks found");
}

TEST(every_generator) {
    static nets_case c;
    FILE *f = nets_open("rng/torch_cpu.txt");
    int count = 0;
    for (; f && nets_read(f, &c); count++) {
        nets_generators(&c);
        nets_free(&c);
    }
    if (f) fclose(f);
    check(count > 0, "no recorded generators found");
}

int main(int argc, char **argv) {
    test_begin(argc, argv);
    ctx = df_ctx_create(NULL);
    RUN(every_case);
    RUN(every_network);
    RUN(every_generator);
    df_ctx_free(ctx);
    return test_end();
}
