// options.h: the command line that the examples share. Unknown words, missing values and
// numbers out of range are refused with one sentence and the usage.
#ifndef OPTIONS_H
#define OPTIONS_H
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// An option of one program's own. One of flag, text, number, real says where its value goes;
// what stands there before is its default.
typedef struct option_own {
    const char *word, *value, *what;
    int *flag;               // takes no value: sets 1
    const char **text;
    int *number;
    double *real;
    double low, high;        // of number and real
} option_own;
#define OPTION_FLAG(word, what, to) { word, NULL, what, to, NULL, NULL, NULL, 0, 0 }
#define OPTION_TEXT(word, value, what, to) { word, value, what, NULL, to, NULL, NULL, 0, 0 }
#define OPTION_WHOLE(word, value, what, to, low, high) \
    { word, value, what, NULL, NULL, to, NULL, low, high }
#define OPTION_REAL(word, value, what, to, low, high) \
    { word, value, what, NULL, NULL, NULL, to, low, high }

typedef struct options {
    const char *data, *method, *load, *save, *picture, *csv;
    int steps, sample_steps, n, threads, help;
    uint64_t seed;
    const char *without;     // the words among those below that this program does not know
    const char *counts;      // what --sample-steps counts
    const char *learns;      // what --data is
    const option_own *own;   // [owns]
    int owns;
    char default_save[512], default_picture[512];
} options;

// A file's name beside another's: "build/images.safetensors", ".csv" -> "build/images.csv".
static inline void options_beside(const char *path, const char *ending, char *out, size_t size) {
    const char *dot = strrchr(path, '.'), *slash = strrchr(path, '/');
    int stem = dot != NULL && (slash == NULL || dot > slash) ? (int)(dot - path)
                                                              : (int)strlen(path);
    snprintf(out, size, "%.*s%s", stem < 400 ? stem : 400, path, ending);
}

// Files go beside the program, whose path is argv0, unless the user says where.
static inline options options_defaults(const char *argv0, const char *stem, const char *data,
                                       int steps, int sample_steps, int n) {
    const char *slash = strrchr(argv0, '/');
    int folder = slash != NULL && slash - argv0 < 400 ? (int)(slash - argv0) + 1 : 0;
    options o;
    memset(&o, 0, sizeof o);
    o.without = "", o.counts = "steps of the sampler", o.learns = "what to learn from";
    o.data = data, o.method = "ddim", o.steps = steps, o.sample_steps = sample_steps, o.n = n;
    snprintf(o.default_save, sizeof o.default_save, "%.*s%.80s.safetensors", folder, argv0,
             stem);
    snprintf(o.default_picture, sizeof o.default_picture, "%.*s%.80s.png", folder, argv0, stem);
    return o;
}

static inline int options_has(const options *o, const char *word) {
    return strstr(o->without, word) == NULL;
}

// One line of the usage, if the program has the word; its default in brackets.
static inline void options_line(const options *o, FILE *to, const char *word,
                                const char *value, const char *what, const char *text,
                                int number) {
    if (!options_has(o, word)) return;
    fprintf(to, "  %s %-*s %s", word, 15 - (int)strlen(word), value, what);
    if (text) fprintf(to, " [%s]", text);
    else if (number >= 0) fprintf(to, " [%d]", number);
    fputc('\n', to);
}

static inline int options_usage(const options *o, FILE *to) {
    options_line(o, to, "--data", "NAME", o->learns, o->data, 0);
    options_line(o, to, "--steps", "N", "training steps", NULL, o->steps);
    options_line(o, to, "--method", "NAME", "sampler: ddim, ddpm, heun, euler_t, ...",
                 o->method, 0);
    options_line(o, to, "--sample-steps", "N", o->counts, NULL, o->sample_steps);
    options_line(o, to, "--n", "N", "samples to draw", NULL, o->n);
    options_line(o, to, "--seed", "N", "of the data, the weights and the noise", NULL, 0);
    options_line(o, to, "--threads", "N", "workers; 0: one per processor", NULL, 0);
    options_line(o, to, "--load", "FILE", "a checkpoint to sample from", NULL, -1);
    options_line(o, to, "--save", "FILE", "where the checkpoint goes", o->default_save, 0);
    options_line(o, to, "--picture", "FILE", "where the picture goes", o->default_picture,
                 0);
    options_line(o, to, "--csv", "FILE", "also write the samples as CSV", NULL, -1);
    options_line(o, to, "--list", "", "print all samplers, and nothing else", NULL, -1);
    for (int i = 0; i < o->owns; i++) {
        const option_own *w = &o->own[i];
        char text[32];
        if (w->real) snprintf(text, sizeof text, "%g", *w->real);
        options_line(o, to, w->word, w->value ? w->value : "", w->what,
                     w->real ? text : w->text ? *w->text : NULL,
                     w->number ? *w->number : -1);
    }
    return -1;
}

// Families of samplers, by what the registry says of them.
enum { FAMILY_ADAPTIVE = 4, FAMILY_NOISY, FAMILY_LANGEVIN = 7, FAMILY_MAPS, FAMILIES };
static const char *const family_names[FAMILIES] = {
    "order 1", "order 2, two questions a step", "order 2, one question, eps",
    "order 2, one question, x_0", "order 3, 4, adaptive", "with noise, order 1",
    "with noise, others", "Langevin dynamics", "maps"
};
static inline int family_of(const df_sampler_row *r) {
    if (r->asks == DF_ASK_MAP) return FAMILY_MAPS;
    if (!r->to_sigma0) return FAMILY_LANGEVIN;
    if (r->stochastic) return FAMILY_NOISY + (r->evaluations > 1 || r->start_order != 1);
    if (r->start_order > 2 || r->order == 0) return FAMILY_ADAPTIVE;
    return r->start_order < 2 ? 0 : r->evaluations == 2 ? 1 : r->wants == DF_EPS ? 2 : 3;
}
// Does it choose its steps itself, by a tolerance?
static inline int is_adaptive(const df_sampler_row *r) {
    return r->whole && r->order != 1;
}

// The registry as a table.
static inline int options_samplers(void) {
    static const char *const clocks[3] = { "rho", "t", "stopped" };
    int count;
    const df_sampler_row *row = df_sampler_rows(&count), *r;
    printf("%-22s%-8s %5s %5s %4s %-5s %-4s %s\n", "", "clock", "order", "start",
           "asks", "noise", "ends", "source; other names");
    for (int i = 0, shown = -1; i < count * FAMILIES; i++) {
        r = &row[i % count];
        if (family_of(r) != i / count) continue;
        if (shown != i / count) printf("%s\n", family_names[shown = i / count]);
        printf("  %-20s%-8s %5d %5d %4d %-5s %c %c  %s%s%s\n", r->name, clocks[r->clock],
               r->order, r->start_order, r->evaluations, r->stochastic ? "yes" : "-",
               r->from_alpha0 ? 'a' : '-', r->to_sigma0 ? 's' : '-', r->source,
               r->aliases[0] ? "; " : "", r->aliases);
    }
    printf("order: of the error in the steps; start: with its own first steps; asks: "
           "questions to the\nmodel a step, 0 where it chooses its steps itself; ends it "
           "may touch: a the noise, alpha = 0,\ns the data, sigma = 0\n");
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

// A number with a fraction, from low to high.
static inline int options_real(const char *name, const char *text, double low, double high,
                               double *out) {
    char *end;
    *out = strtod(text, &end);
    if (end != text && *end == 0 && *out >= low && *out <= high) return 0;
    fprintf(stderr, "%s %s: a number from %g to %g is needed\n", name, text, low, high);
    return -1;
}

// One of the program's own words, at argv[*i]: 1 if it was, 0 unknown, 2 its value is
// missing, -1 after a sentence.
static inline int options_own(options *o, int argc, char **argv, int *i) {
    for (int k = 0; k < o->owns; k++) {
        const option_own *w = &o->own[k];
        long whole;
        if (strcmp(argv[*i], w->word) != 0) continue;
        if (w->flag) return *w->flag = 1;
        if (*i + 1 == argc) return 2;
        const char *value = argv[++*i];
        if (w->text) return *w->text = value, 1;
        if (w->real) return options_real(w->word, value, w->low, w->high, w->real) ? -1 : 1;
        if (options_number(w->word, value, (long)w->low, (long)w->high, &whole)) return -1;
        return *w->number = (int)whole, 1;
    }
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
            printf("%s [options]%s\n", argv[0], options_has(o, "--data") ? " [DATA]" : "");
            return options_usage(o, stdout);
        }
        if ((word[0] != '-' || word[1] == 0) && options_has(o, "--data")) {
            o->data = word;                          // a bare word is the data; "-" a pipe
            continue;
        }
        if (strcmp(word, "--list") == 0) {
            o->help = 1;
            return options_samplers();
        }
        for (int k = 0; k < 11; k++) {
            const char *name = k < 6 ? words[k] : numbers[k - 6];
            long value;
            if (strcmp(word, name) != 0 || !options_has(o, name)) continue;
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
        if (known == 0) {
            int own = options_own(o, argc, argv, &i);
            if (own < 0) return -1;
            known = own == 2 ? 1 : own == 1 ? 2 : 0;
        }
        if (known == 2) continue;
        fprintf(stderr, known ? "%s: a value is missing\n" : "%s: unknown option\n", word);
        return options_usage(o, stderr);
    }
    if (o->save == NULL) o->save = o->default_save;
    if (o->picture == NULL) o->picture = o->default_picture;
    if (options_has(o, "--picture") && options_writable(o->picture) != 0) return -1;
    if (o->csv && options_writable(o->csv) != 0) return -1;
    return o->load || !options_has(o, "--save") ? 0 : options_writable(o->save);
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
