// inpaint.h: the hook of df_sample_desc.edit that keeps a part of a picture. Include it after
// images.h.
#ifndef INPAINT_H
#define INPAINT_H

// A picture whose known part is kept, and how much of each pixel may change.
typedef struct inpainting {
    const df_model *model;
    df_real *known, *free_part, *noise;              // [dim] data's units; 0 .. 1; room
    uint64_t seed;
    progress_bar bar;
} inpainting;

// After each step the known pixels are put back, noised as far as the samples are: at the
// data, sigma = 0, they are the picture's own.
static inline int inpaint_edit(void *user, const df_step_info *info, df_real *x) {
    const inpainting *p = (const inpainting *)user;
    const df_model *m = p->model;
    for (int i = 0; i < info->n; i++, x += info->dim) {
        df_random_normal(p->seed, (uint64_t)i, (uint32_t)info->step, (size_t)info->dim,
                         p->noise);
        for (int k = 0; k < info->dim; k++) {
            int s = m->scaling_size == 1 ? 0 : k;
            double known = (double)p->known[k], part = (double)p->free_part[k];
            if (m->scaling_size > 0) known = (known - m->mean[s]) / m->scale[s];
            known = info->at.alpha * known + info->at.sigma * (double)p->noise[k];
            x[k] = (df_real)(part * (double)x[k] + (1 - part) * known);
        }
    }
    return 0;
}

// The known picture and the mask, from files; NULL: there is none. 0, or -1 and a sentence.
static inline int inpaint_read(inpainting *p, const char *file, const char *mask,
                               const int shape[3]) {
    int dim = shape[0] * shape[1] * shape[2];
    if (file == NULL) return 0;
    p->known = (df_real *)malloc(3 * (size_t)dim * sizeof *p->known);
    if (p->known == NULL) return data_fail(file, "no memory for it");
    p->free_part = p->known + dim, p->noise = p->free_part + dim;
    if (images_picture(file, shape, p->known) != 0) return -1;
    if (mask && images_picture(mask, shape, p->free_part) != 0) return -1;
    for (int k = 0; mask && k < dim; k++)         // -1 black: kept; 1 white: made anew
        p->free_part[k] = (p->free_part[k] + 1) / 2;
    return 0;
}
#endif
