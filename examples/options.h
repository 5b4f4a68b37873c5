// options.h: the command line that the examples share. Unknown words, missing values and
// numbers out of range are refused with one sentence and the usage.
#ifndef OPTIONS_H
#define OPTIONS_H
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    const char *data, *method, *load, *save, *picture, *csv;
    int steps, sample_steps, n, threads, help;
    uint64_t seed;
    char default_save[512], default_picture[512];
} options;

// Files go beside the program, whose path is argv0, unless the user says where.
static inline options options_defaults(const char *argv0, const char *stem, const char *data,
                                       int steps, int sample_steps, int n) {
    const char *slash = strrchr(argv0, '/');
    int folder = slash != NULL && slash - argv0 < 400 ? (int)(slash - argv0) + 1 : 0;
    options o;
    memset(&o, 0, sizeof o);
    o.data = data, o.method = "ddim", o.steps = steps, o.sample_steps = sample_steps, o.n = n;
    snprintf(o.default_save, sizeof o.default_save, "%.*s%.80s.safetensors", folder, argv0,
             stem);
    snprintf(o.default_picture, sizeof o.default_picture, "%.*s%.80s.png", folder, argv0, stem);
    return o;
}

static inline int options_usage(const options *o, FILE *to) {
    fprintf(to,
            "  --data NAME      what to learn from [%s]\n"
            "  --steps N        training steps [%d]\n"
            "  --method NAME    sampler: ddim, ddpm, heun, euler_t, ... [%s]\n"
            "  --sample-steps N steps of the sampler [%d]\n"
            "  --n N            samples to draw [%d]\n"
            "  --seed N         of the data, the weights and the noise [0]\n"
            "  --threads N      workers; 0: one per processor [0]\n"
            "  --load FILE      a checkpoint to sample from, instead of training\n"
            "  --save FILE      where the checkpoint goes [%s]\n"
            "  --picture FILE   where the picture goes [%s]\n"
            "  --csv FILE       also write the samples as CSV\n",
            o->data, o->steps, o->method, o->sample_steps, o->n, o->default_save,
            o->default_picture);
    return -1;
}

static inline int options_number(const char *name, const char *text, long low, long high,
                                 long *out) {
    char *end;
    errno = 0;
    *out = strtol(text, &end, 10);
    if (end != text && *end == 0 && errno == 0 && *out >= low && *out <= high) return 0;
    fprintf(stderr, "%s %s: a whole number from %ld to %ld is needed\n", name, text, low, high);
    return -1;
}

// Can this file be written? Asked before the work that would be lost, not after it.
static inline int options_writable(const char *path) {
    FILE *there = fopen(path, "rb"), *f;
    if (there != NULL) fclose(there);
    f = fopen(path, "ab");
    if (f == NULL) {
        fprintf(stderr, "%s: cannot be written: %s\n", path, strerror(errno));
        return -1;
    }
    fclose(f);
    if (there == NULL) remove(path);
    return 0;
}

// 0, or -1 after a sentence (or, with help set, after the usage).
static inline int options_read(options *o, int argc, char **argv) {
    static const char *const words[] = { "--data", "--method", "--load", "--save", "--picture",
                                         "--csv" };
    static const char *const numbers[] = { "--steps", "--sample-steps", "--n", "--threads",
                                           "--seed" };
    static const long low[] = { 1, 1, 2, 0, 0 };
    static const long high[] = { 100000000, 100000, 10000000, 256, LONG_MAX };
    const char **text[6];
    int *count[4];
    text[0] = &o->data, text[1] = &o->method, text[2] = &o->load, text[3] = &o->save;
    text[4] = &o->picture, text[5] = &o->csv;
    count[0] = &o->steps, count[1] = &o->sample_steps, count[2] = &o->n, count[3] = &o->threads;
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i];
        int known = 0;
        if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
            o->help = 1;
            printf("%s [options] [DATA]\n", argv[0]);
            return options_usage(o, stdout);
        }
        if (word[0] != '-' || word[1] == 0) {        // a bare word is the data; "-" a pipe
            o->data = word;
            continue;
        }
        for (int k = 0; k < 11; k++) {
            const char *name = k < 6 ? words[k] : numbers[k - 6];
            long value;
            if (strcmp(word, name) != 0) continue;
            known = 1;
            if (i + 1 == argc) break;
            if (k < 6) {
                *text[k] = argv[++i];
            } else {
                if (options_number(name, argv[++i], low[k - 6], high[k - 6], &value)) return -1;
                if (k < 10) *count[k - 6] = (int)value;
                else o->seed = (uint64_t)value;
            }
            known = 2;
            break;
        }
        if (known == 2) continue;
        fprintf(stderr, known ? "%s: a value is missing\n" : "%s: unknown option\n", word);
        return options_usage(o, stderr);
    }
    if (o->save == NULL) o->save = o->default_save;
    if (o->picture == NULL) o->picture = o->default_picture;
    if (options_writable(o->picture) != 0 || (o->csv && options_writable(o->csv) != 0)) return -1;
    return o->load ? 0 : options_writable(o->save);
}

// Samples [n, dim] as CSV. 0, or 1 and a sentence; no partial file is left.
static inline int options_csv(const char *path, const df_real *x, int n, int dim) {
    FILE *f = fopen(path, "w");
    int bad = f == NULL;
    for (int i = 0; !bad && i < n; i++)
        for (int k = 0; k < dim; k++)
            bad |= fprintf(f, "%.7g%c", (double)x[(size_t)i * (size_t)dim + (size_t)k],
                           k + 1 < dim ? ',' : '\n') < 0;
    if (f != NULL && fclose(f) != 0) bad = 1;
    if (!bad) {
        printf("wrote %s\n", path);
        return 0;
    }
    fprintf(stderr, "%s: cannot be written: %s\n", path, strerror(errno));
    if (f != NULL) remove(path);
    return 1;
}
#endif
