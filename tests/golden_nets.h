// golden_nets.h: reads the recorded layers and networks, text files of "case ... end" with
// key-value lines and arrays "array NAME ndim d0 d1 ..." followed by their numbers.
//
//     nets_case c;
//     FILE *f = nets_open("layers/layers.txt");
//     while (nets_read(f, &c)) { const nets_array *x = nets_find(&c, "x"); ... nets_free(&c); }
#ifndef DF_TEST_GOLDEN_NETS_H
#define DF_TEST_GOLDEN_NETS_H
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NETS_KEYS = 512, NETS_ARRAYS = 512, NETS_LINE = 1024 };

typedef struct nets_array {
    char name[128];
    int ndim, shape[5];
    long size;
    double *v;
} nets_array;
typedef struct nets_case {
    char name[128];
    int keys, arrays;
    char key[NETS_KEYS][128], value[NETS_KEYS][256];
    nets_array array[NETS_ARRAYS];
} nets_case;

// The folder: $GOLDEN/nets, else tests/golden/nets beside the working directory.
static inline FILE *nets_open(const char *file) {
    const char *dirs[4] = {getenv("GOLDEN"), "tests/golden", "golden", "../tests/golden"};
    for (int i = 0; i < 4; i++) {
        char path[NETS_LINE];
        FILE *f;
        if (dirs[i] == NULL || dirs[i][0] == 0) continue;
        snprintf(path, sizeof path, "%s/nets/%s", dirs[i], file);
        f = fopen(path, "r");
        if (f != NULL || i == 0) return f;
    }
    return NULL;
}
static inline void nets_free(nets_case *c) {
    for (int i = 0; i < c->arrays; i++) free(c->array[i].v);
    c->arrays = 0;
}
// One array, its head line in `line`; 0 if the file is cut short.
static inline int nets_numbers(FILE *f, const char *line, nets_array *a) {
    int at = 0;
    if (sscanf(line, "array %127s %d%n", a->name, &a->ndim, &at) != 2) return 0;
    if (a->ndim < 0 || a->ndim > 5) return 0;
    a->size = 1;
    for (int i = 0, n; i < a->ndim; i++, at += n) {
        if (sscanf(line + at, " %d%n", &a->shape[i], &n) != 1) return 0;
        a->size *= a->shape[i];
    }
    a->v = (double *)malloc((size_t)(a->size + 1) * sizeof(double));
    for (long i = 0; i < a->size; i++)
        if (fscanf(f, "%lf", &a->v[i]) != 1) return 0;
    return 1;
}
// The next case; 0 at the end of the file.
static inline int nets_read(FILE *f, nets_case *c) {
    char line[NETS_LINE];
    memset(c, 0, sizeof *c);
    while (fgets(line, sizeof line, f)) {
        char *blank;
        line[strcspn(line, "\r\n")] = 0;
        blank = strchr(line, ' ');
        if (strncmp(line, "case ", 5) == 0) snprintf(c->name, sizeof c->name, "%.120s", line + 5);
        else if (strcmp(line, "end") == 0) return 1;
        else if (strncmp(line, "array ", 6) == 0 && c->arrays < NETS_ARRAYS) {
            if (!nets_numbers(f, line, &c->array[c->arrays++])) break;
        } else if (blank && c->keys < NETS_KEYS) {
            *blank = 0;
            snprintf(c->key[c->keys], sizeof c->key[0], "%.120s", line);
            snprintf(c->value[c->keys++], sizeof c->value[0], "%.250s", blank + 1);
        }
    }
    nets_free(c);
    return 0;
}
static inline const nets_array *nets_find(const nets_case *c, const char *name) {
    for (int i = 0; i < c->arrays; i++)
        if (strcmp(c->array[i].name, name) == 0) return &c->array[i];
    return NULL;
}
static inline const char *nets_text(const nets_case *c, const char *key) {
    for (int i = 0; i < c->keys; i++)
        if (strcmp(c->key[i], key) == 0) return c->value[i];
    return "";
}
static inline double nets_number(const nets_case *c, const char *key, double missing) {
    const char *text = nets_text(c, key);
    return *text ? atof(text) : missing;
}
#endif
