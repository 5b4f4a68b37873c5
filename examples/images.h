// images.h: images from files: IDX (MNIST's format), plain or piped, with labels; a folder of
// PNG and JPEG pictures through stb_image.h; raw floats; and sheets of images. Include it
// after data.h and draw.h.
//
//     data_set d;
//     int shape[3] = { 3, 64, 64 };                    // channels 1 or 3, height, width
//     if (images_read(&d, "photos", "", shape, 0) != 0) return 1;
//
// Values go to [-1, 1]. Files are not trusted: a reader either fills a data_set or prints one
// sentence with the file's name on stderr and returns -1.
#ifndef IMAGES_H
#define IMAGES_H
#include <limits.h>

#if !defined(DRAW_NO_STB) && defined(__has_include)
#if __has_include("stb_image.h")
#define IMAGES_STB 1
#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_NO_GIF
#define STBI_NO_STDIO
// 2.27 declares the one and defines the other, which compilers warn of.
#define stbi_set_unpremultiply_on_load_thread stbi__unpremultiply_on_load_thread
#define STBI_MAX_DIMENSIONS 8192
#include "stb_image.h"
#endif
#endif
#ifndef IMAGES_STB
#define IMAGES_STB 0
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <dirent.h>
#define IMAGES_FOLDERS 1
#else
#define IMAGES_FOLDERS 0
#endif

static inline uint32_t images_be32(const unsigned char *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

// ---- IDX --------------------------------------------------------------------------------

// Grey images: 00 00 08 03, count, height, width (big-endian), then bytes. At most `most` of
// them (0: all).
static inline int images_idx(data_set *d, const char *path, const unsigned char *bytes,
                             size_t size, int most) {
    uint32_t n = 0, h = 0, w = 0;
    char why[160];
    if (size >= 16) {
        n = images_be32(bytes + 4), h = images_be32(bytes + 8), w = images_be32(bytes + 12);
    }
    size_t want = (size_t)h * w;
    if (size < 16 || images_be32(bytes) != 0x803)
        return data_fail(path, "is not an IDX file of images (it does not begin with "
                         "00 00 08 03); raw floats need --shape C,H,W");
    if (n < 20 || n > 10000000 || h < 2 || w < 2 || h > 512 || w > 512) {
        snprintf(why, sizeof why, "has %u images of %u x %u: 20 to 10000000 images of 2 x 2 to "
                 "512 x 512 can be used", (unsigned)n, (unsigned)h, (unsigned)w);
        return data_fail(path, why);
    }
    if ((size - 16) / want < n) {
        snprintf(why, sizeof why, "is truncated: its header promises %u images of %u x %u, "
                 "there are %u", (unsigned)n, (unsigned)h, (unsigned)w,
                 (unsigned)((size - 16) / want));
        return data_fail(path, why);
    }
    if (most > 0 && (uint32_t)most < n) n = (uint32_t)most;
    if (data_alloc(d, (int)n, (int)want, 0) != 0) return -1;
    d->c = 1, d->h = (int)h, d->w = (int)w;
    for (size_t i = 0; i < n * want; i++) d->x[i] = (df_real)(bytes[16 + i] / 127.5 - 1);
    return 0;
}

// Labels for them: 00 00 08 01, count, bytes.
static inline int images_labels(data_set *d, const char *path) {
    size_t size;
    char why[120];
    unsigned char *bytes = (unsigned char *)data_slurp(path, (size_t)1 << 28, &size);
    int bad = -1;
    if (bytes == NULL) return -1;
    free(d->labels);
    d->labels = (int *)malloc((size_t)d->n * sizeof *d->labels);
    d->classes = 0;
    if (d->labels == NULL) {
        data_fail(path, "no memory");
    } else if (size >= 2 && bytes[0] == 0x1f && bytes[1] == 0x8b) {
        data_fail(path, "is gzip: unpack it first, zcat FILE.gz >FILE");
    } else if (size < 8 || images_be32(bytes) != 0x801) {
        data_fail(path, "is not an IDX file of labels (it does not begin with 00 00 08 01)");
    } else if (images_be32(bytes + 4) < (uint32_t)d->n || size - 8 < (size_t)d->n) {
        snprintf(why, sizeof why, "has %lu labels, there are %d images",
                 (unsigned long)(size - 8 < images_be32(bytes + 4) ? size - 8
                                                                   : images_be32(bytes + 4)),
                 d->n);
        data_fail(path, why);
    } else {
        bad = 0;
        for (int i = 0; i < d->n; i++) {
            d->labels[i] = bytes[8 + i];
            if (d->labels[i] >= d->classes) d->classes = d->labels[i] + 1;
        }
    }
    free(bytes);
    return bad;
}

// ---- raw floats ---------------------------------------------------------------------------

// Images [n, c, h, w] of float32 in this machine's byte order, without a header. The least of
// all values goes to -1, the greatest to 1.
static inline int images_floats(data_set *d, const char *path, const unsigned char *bytes,
                                size_t size, const int shape[3], int most) {
    size_t dim = (size_t)shape[0] * (size_t)shape[1] * (size_t)shape[2];
    size_t n = size / (4 * dim);
    float low = INFINITY, high = -INFINITY, v;
    char why[160];
    if (size % (4 * dim) != 0 || n < 20 || n > 10000000) {
        snprintf(why, sizeof why, "holds %lu bytes: 20 to 10000000 images of %d x %d x %d "
                 "floats, %lu bytes each, are needed", (unsigned long)size, shape[0], shape[1],
                 shape[2], (unsigned long)(4 * dim));
        return data_fail(path, why);
    }
    if (most > 0 && (size_t)most < n) n = (size_t)most;
    for (size_t i = 0; i < n * dim; i++) {
        memcpy(&v, bytes + 4 * i, 4);
        if (!(fabs((double)v) <= 1e30)) {
            snprintf(why, sizeof why, "number %lu is not finite, or beyond 1e30",
                     (unsigned long)i);
            return data_fail(path, why);
        }
        low = v < low ? v : low, high = v > high ? v : high;
    }
    if (data_alloc(d, (int)n, (int)dim, 0) != 0) return -1;
    d->c = shape[0], d->h = shape[1], d->w = shape[2];
    double scale = high > low ? 2 / ((double)high - (double)low) : 0;
    for (size_t i = 0; i < n * dim; i++) {
        memcpy(&v, bytes + 4 * i, 4);
        d->x[i] = (df_real)(((double)v - (double)low) * scale - 1);
    }
    return 0;
}

// ---- pictures ------------------------------------------------------------------------------

#if IMAGES_STB
// How much of [i, i + 1) lies in [a, b).
static inline double images_overlap(int i, double a, double b) {
    double from = a > i ? a : i, to = b < i + 1 ? b : i + 1;
    return to > from ? to - from : 0;
}

// The middle of a picture rgba [height, width, 4] as an image `shape`: cut to its proportions,
// each pixel the mean of what it covers; what is transparent lies on white.
static inline void images_fit(const unsigned char *rgba, int width, int height,
                              const int shape[3], df_real *out) {
    static const double grey[3] = { 0.299, 0.587, 0.114 };
    int h = shape[1], w = shape[2], plane = h * w;
    double side = fmin((double)width / w, (double)height / h);
    double left = (width - side * w) / 2, top = (height - side * h) / 2;
    for (int p = 0; p < plane; p++) {
        double x0 = left + p % w * side, x1 = x0 + side, sum[3] = { 0, 0, 0 }, all = 0;
        double y0 = top + p / w * side, y1 = y0 + side;
        for (int y = (int)fmax(y0, 0); y < height && y < y1; y++)
            for (int x = (int)fmax(x0, 0); x < width && x < x1; x++) {
                const unsigned char *q = rgba + ((size_t)y * (size_t)width + (size_t)x) * 4;
                double part = images_overlap(x, x0, x1) * images_overlap(y, y0, y1);
                double a = q[3] / 255.0;
                for (int k = 0; k < 3; k++) sum[k] += part * (a * q[k] + (1 - a) * 255);
                all += part;
            }
        for (int k = 0; k < 3; k++) sum[k] = all > 0 ? sum[k] / all / 127.5 - 1 : 0;
        if (shape[0] == 3)
            for (int k = 0; k < 3; k++) out[k * plane + p] = (df_real)sum[k];
        else
            out[p] = (df_real)(grey[0] * sum[0] + grey[1] * sum[1] + grey[2] * sum[2]);
    }
}
#endif

// One PNG or JPEG file into out [shape]. 0, or -1 and a sentence.
static inline int images_picture(const char *path, const int shape[3], df_real *out) {
#if IMAGES_STB
    size_t size;
    int w = 0, h = 0, channels, bad = -1;
    unsigned char *bytes = (unsigned char *)data_slurp(path, (size_t)1 << 28, &size), *rgba;
    if (bytes == NULL) return -1;
    rgba = size > INT_MAX ? NULL
                          : stbi_load_from_memory(bytes, (int)size, &w, &h, &channels, 4);
    if (rgba == NULL) {
        char why[120];
        const char *reason = stbi_failure_reason();
        snprintf(why, sizeof why, "is not a PNG or JPEG picture that can be read (%.60s)",
                 reason ? reason : "?");
        data_fail(path, why);
    } else {
        images_fit(rgba, w, h, shape, out);
        bad = 0;
    }
    stbi_image_free(rgba);
    free(bytes);
    return bad;
#else
    (void)shape, (void)out;
    return data_fail(path, "pictures are read by stb_image.h, without which this was built");
#endif
}

static inline int images_is_folder(const char *path) {
#if IMAGES_FOLDERS
    DIR *dir = opendir(path);
    if (dir != NULL) closedir(dir);
    return dir != NULL;
#else
    (void)path;
    return 0;
#endif
}

#if IMAGES_FOLDERS
typedef struct images_list {
    char (*name)[256];
    int count, room;
} images_list;

static inline int images_by_name(const void *a, const void *b) {
    return strcmp((const char *)a, (const char *)b);
}
static inline int images_is_picture(const char *name) {
    static const char *const ends[6] = { ".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG" };
    size_t n = strlen(name);
    for (int i = 0; i < 6; i++)
        if (n > strlen(ends[i]) && strcmp(name + n - strlen(ends[i]), ends[i]) == 0) return 1;
    return 0;
}

// The names in a folder, sorted: pictures, or all that do not begin with a dot. -1: no folder
// (silently), no memory (with a sentence).
static inline int images_names(const char *folder, int pictures, images_list *list) {
    DIR *dir = opendir(folder);
    struct dirent *entry;
    int bad = 0;
    list->name = NULL, list->count = list->room = 0;
    if (dir == NULL) return -1;
    while (!bad && (entry = readdir(dir)) != NULL) {
        if (entry->d_name[0] == '.' || strlen(entry->d_name) > 255 ||
            (pictures && !images_is_picture(entry->d_name)))
            continue;
        if (list->count == list->room) {
            int room = list->room ? 2 * list->room : 64;
            void *more = room <= 1 << 22 ? realloc(list->name, (size_t)room * 256) : NULL;
            if (more == NULL) {
                bad = data_fail(folder, "holds more names than there is memory for");
                break;
            }
            list->name = (char(*)[256])more, list->room = room;
        }
        strcpy(list->name[list->count++], entry->d_name);
    }
    closedir(dir);
    if (list->count > 0) qsort(list->name, (size_t)list->count, 256, images_by_name);
    return bad;
}

// Adds a folder's pictures, labelled `label`. room: what d->x and d->labels have place for.
static inline int images_add(data_set *d, int *room, const char *folder, int label,
                             const int shape[3], int most) {
    images_list list;
    char path[1024];
    int bad = images_names(folder, 1, &list);
    for (int i = 0; bad == 0 && i < list.count && (most == 0 || d->n < most); i++) {
        if (d->n == *room) {
            int more = *room ? 2 * *room : 256;
            size_t bytes = (size_t)more * (size_t)d->dim * sizeof *d->x;
            void *x = more <= 10000000 ? realloc(d->x, bytes) : NULL;
            if (x != NULL) d->x = (df_real *)x;
            void *labels = x ? realloc(d->labels, (size_t)more * sizeof *d->labels) : NULL;
            if (labels != NULL) d->labels = (int *)labels, *room = more;
            if (labels == NULL) bad = data_fail(folder, "no memory for its pictures");
        }
        if (bad == 0 && snprintf(path, sizeof path, "%s/%s", folder, list.name[i]) >= 1024)
            bad = data_fail(folder, "has too long a path");
        if (bad == 0)
            bad = images_picture(path, shape, d->x + (size_t)d->n * (size_t)d->dim);
        if (bad == 0) d->labels[d->n++] = label;
    }
    free(list.name);
    return bad;
}

// A folder of pictures; or of folders of pictures, which then are the classes, in the order of
// their names.
static inline int images_folder(data_set *d, const char *folder, const int shape[3], int most) {
    images_list list;
    char path[1024];
    int room = 0, bad;
    d->c = shape[0], d->h = shape[1], d->w = shape[2];
    d->dim = shape[0] * shape[1] * shape[2];
    bad = images_add(d, &room, folder, 0, shape, most);
    if (bad == 0 && d->n == 0) {
        bad = images_names(folder, 0, &list);
        for (int i = 0; bad == 0 && i < list.count; i++) {
            int before = d->n;
            if (snprintf(path, sizeof path, "%s/%s", folder, list.name[i]) >= 1024) continue;
            if (!images_is_folder(path)) continue;
            bad = images_add(d, &room, path, d->classes, shape, most);
            if (d->n > before) d->classes++;
        }
        free(list.name);
    }
    if (bad == 0 && d->n < 20) {
        char why[120];
        snprintf(why, sizeof why, "holds %d pictures (.png, .jpg): at least 20 are needed",
                 d->n);
        bad = data_fail(folder, why);
    }
    return bad;
}
#endif

// ---- all of them ----------------------------------------------------------------------------

// "C,H,W" into shape. 0, or -1 and a sentence.
static inline int images_shape(const char *text, int shape[3]) {
    char rest;
    if (sscanf(text, "%d,%d,%d%c", &shape[0], &shape[1], &shape[2], &rest) == 3 &&
        (shape[0] == 1 || shape[0] == 3) && shape[1] >= 2 && shape[1] <= 512 && shape[2] >= 2 &&
        shape[2] <= 512) return 0;
    fprintf(stderr, "--shape %s: C,H,W is needed, channels 1 or 3, sizes from 2 to 512\n", text);
    return -1;
}

// From a folder, an IDX file, or raw floats, whatever `path` is ("-": standard input); labels:
// an IDX file of labels, or NULL. shape: of raw floats, and what a folder's pictures are cut
// and shrunk to; NULL: 3,32,32, and no raw floats. At most `most` images (0: all).
static inline int images_read(data_set *d, const char *path, const char *labels,
                              const int *shape, int most) {
    static const int usual[3] = { 3, 32, 32 };
    int bad = -1;
    memset(d, 0, sizeof *d);
#if IMAGES_FOLDERS
    if (images_is_folder(path)) bad = images_folder(d, path, shape ? shape : usual, most);
    else
#endif
    {
        size_t size;
        unsigned char *bytes = (unsigned char *)data_slurp(path, (size_t)1 << 31, &size);
        if (bytes == NULL) return -1;
        if (size == 0)
            data_fail(path, "is empty");
        else if (size >= 2 && bytes[0] == 0x1f && bytes[1] == 0x8b)
            data_fail(path, "is gzip: unpack it on the way, zcat FILE.gz | build/02_images -");
        else if (shape != NULL && (size < 4 || images_be32(bytes) != 0x803))
            bad = images_floats(d, path, bytes, size, shape, most);
        else
            bad = images_idx(d, path, bytes, size, most);
        free(bytes);
    }
    if (bad == 0 && labels != NULL) bad = images_labels(d, labels);
    if (d->classes < 2) {                            // one class is none
        free(d->labels);
        d->labels = NULL, d->classes = 0;
    }
    if (bad != 0) data_free(d);
    (void)usual;
    return bad;
}

// ---- sheets of images --------------------------------------------------------------------

// [C, H, W] of a net's images, `given` or guessed: the channels of its first convolution, else
// grey; square. 0, or -1 and a sentence.
static inline int images_shape_of(const df_net *net, const char *given, int shape[3]) {
    int dim = df_net_dim(net), first = 0;
    if (given != NULL && images_shape(given, shape) != 0) return -1;
    if (given == NULL) {
        while (first < df_net_count(net) && df_net_param(net, first)->ndim != 4) first++;
        shape[0] = first < df_net_count(net) ? df_net_param(net, first)->shape[1] : 1;
        shape[1] = shape[2] = (int)(sqrt((double)dim / shape[0]) + 0.5);
    }
    if (shape[0] * shape[1] * shape[2] == dim) return 0;
    fprintf(stderr, "%d x %d x %d is not the shape of the net's images of %d numbers: give it "
            "by --shape C,H,W\n", shape[0], shape[1], shape[2], dim);
    return -1;
}

// Sheets of images below each other, each with its title, at most n[k] images x[k] and `rows`
// rows; small images are shown larger, up to `side` wide. 0, or -1 and a sentence.
static inline int images_sheets(const char *path, const int shape[3], int side, int columns,
                                int rows, int sheets, const char *const *titles,
                                const df_real *const *x, const int *n) {
    draw_canvas c;
    int h = shape[1], w = shape[2], scale = w < side ? side / w : 1, top = 0, bad;
    int high = 0, wide = columns * (w * scale + 3) + 33, down = h * scale + 3, shown[8];
    for (int k = 0; k < sheets && k < 8; k++) {
        shown[k] = n[k] < columns * rows ? n[k] : columns * rows;
        high += ((shown[k] - 1) / columns + 1) * down + 50;
    }
    if (draw_open(&c, wide > 160 ? wide : 160, high - 4) != 0) return -1;
    for (int k = 0; k < sheets && k < 8; k++) {
        draw_text(&c, 18, top + 20, titles[k], 1.15 * c.text, 0, 1.4, DRAW_INK);
        draw_images(&c, 18, top + 38, x[k], shown[k], shape[0], h, w, columns, scale, 3, -1, 1);
        top += ((shown[k] - 1) / columns + 1) * down + 50;
    }
    bad = draw_save(&c, path);
    draw_close(&c);
    return bad;
}
#endif
