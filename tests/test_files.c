// test_files.c: sources and sinks, safetensors round trips, peers' files, hostile files,
// writing that is interrupted, memory that runs out.
#include "diffusion.h"
#include "test.h"
#include <errno.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if defined(__unix__) || defined(__APPLE__)
enum { POSIX = 1 };
#else
enum { POSIX = 0 };                     // the library then uses <stdio.h> alone
#endif

// ---- helpers --------------------------------------------------------------------------

// An allocator that counts, gives out exact sizes (so that the sanitizers see a byte too
// far), and says no to call number `fail` (from 1; 0: never).
typedef struct { long calls, fail, live; size_t bytes; } heap;

static void *heap_alloc(void *user, size_t size, size_t align) {
    heap *h = (heap *)user;
    void *p;
    h->calls++;
    if (h->calls == h->fail || size > (size_t)1 << 33) return NULL;
    if (posix_memalign(&p, align < sizeof(void *) ? sizeof(void *) : align, size))
        return NULL;
    memset(p, 0xa5, size);
    h->live++;
    h->bytes += size;
    return p;
}

static void heap_free(void *user, void *ptr, size_t size, size_t align) {
    heap *h = (heap *)user;
    (void)align;
    h->live--;
    h->bytes -= size;
    free(ptr);
}

static heap memory_;

static df_ctx *new_ctx(void) {
    df_ctx_desc d = df_ctx_defaults();
    memset(&memory_, 0, sizeof memory_);
    d.threads = 1;
    d.alloc.alloc = heap_alloc;
    d.alloc.free = heap_free;
    d.alloc.user = &memory_;
    return df_ctx_create(&d);
}

// Frees the context and checks that every byte came back.
static void end_ctx(df_ctx *ctx) {
    df_ctx_free(ctx);
    check(memory_.live == 0 && memory_.bytes == 0, "%ld blocks, %zu bytes leaked",
          memory_.live, memory_.bytes);
}

// A file from header text and `size` zero bytes of data; `length` < 0: the header's own.
typedef struct { unsigned char *data; size_t size; } blob;

static blob make_blob(const char *header, long long length, size_t size) {
    blob b;
    size_t n = strlen(header);
    unsigned long long announced = length < 0 ? n : (unsigned long long)length;
    b.size = 8 + n + size;
    b.data = (unsigned char *)calloc(1, b.size);
    for (int i = 0; i < 8; i++) b.data[i] = (unsigned char)(announced >> 8 * i & 255);
    memcpy(b.data + 8, header, n);
    return b;
}

static df_safetensors *open_blob(df_ctx *ctx, blob b) {
    return df_safetensors_open(ctx, df_source_memory(b.data, b.size));
}

// The header is refused with `code`, and the message holds `words`.
static void refused(df_ctx *ctx, const char *header, long long length, size_t size,
                    const char *words) {
    blob b = make_blob(header, length, size);
    df_safetensors *f = open_blob(ctx, b);
    check(f == NULL, "accepted: %.200s", header);
    if (f == NULL) {
        check(df_ctx_error(ctx) == DF_ERR_FORMAT, "%.200s: %s", header,
              df_ctx_message(ctx));
        check(strstr(df_ctx_message(ctx), words) != NULL, "%.200s: \"%s\" lacks \"%s\"",
              header, df_ctx_message(ctx), words);
    }
    df_safetensors_close(f);
    free(b.data);
}

static void accepted(df_ctx *ctx, const char *header, size_t size) {
    blob b = make_blob(header, -1, size);
    df_safetensors *f = open_blob(ctx, b);
    check(f != NULL, "refused: %.200s: %s", header, df_ctx_message(ctx));
    df_safetensors_close(f);
    free(b.data);
}

// A path in the test's own folder; good until eight more were asked for.
static char folder_[200];
static const char *in_folder(const char *name) {
    static char path[8][300];
    static int next;
    char *p = path[next++ % 8];
    snprintf(p, sizeof path[0], "%s/%s", folder_, name);
    return p;
}
static int files_in_folder(void) {
    char command[300];
    int n = -1;
    FILE *p;
    snprintf(command, sizeof command, "ls -A '%s' | wc -l", folder_);
    p = popen(command, "r");
    if (p) { if (fscanf(p, "%d", &n) != 1) n = -1; pclose(p); }
    return n;
}

// Reads every tensor of a file whose axes fit; returns how many failed with another code
// than the three that content may cause.
static int read_all(df_ctx *ctx, const df_safetensors *f) {
    int odd = 0;
    for (int i = 0; i < df_safetensors_count(f); i++) {
        const df_file_tensor *t = df_safetensors_at(f, i);
        int shape[8], fits = t->count <= 1000000;
        df_real *out;
        df_result r;
        odd += df_safetensors_find(f, t->name) != t;
        for (int j = 0; j < t->ndim; j++) {
            fits &= t->shape[j] <= 1000000000u;
            shape[j] = (int)t->shape[j];
        }
        if (!fits) continue;
        out = (df_real *)malloc((t->count + 1) * sizeof *out);
        r = df_safetensors_read(ctx, f, t->name, t->ndim, shape, out);
        odd += r != DF_OK && r != DF_ERR_NONFINITE &&
               !(r == DF_ERR_FORMAT && t->dtype == DF_DTYPE_COUNT);
        free(out);
    }
    return odd;
}

// ---- round trips ----------------------------------------------------------------------

static df_real weights_[24];
static double doubles_[3] = {0.1, -1e300, 4.9406564584124654e-324};
static const df_save_text texts_[3] = {
    {"plain", "text"},
    {"a \"key\"\n", "\\ \x01\t{}[],: \xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80"},
    {"empty", ""}};

static int fill_tensors(df_save_tensor t[6]) {
    static const char *names[6] = {"z.last", "m\"id\\dle\n", "\xc3\xbcmlaut",
                                   "scalar", "none",         "a"};
    static const int ndims[6] = {2, 5, 1, 0, 2, 1};
    static const int shapes[6][5] = {{4, 6}, {2, 1, 3, 2, 2}, {3}, {0}, {7, 0}, {24}};
    for (int i = 0; i < 24; i++) weights_[i] = (df_real)(0.1 * i - 1);
    for (int i = 0; i < 6; i++) {
        memset(&t[i], 0, sizeof t[i]);
        t[i].name = names[i];
        t[i].dtype = i == 1 || i == 2 ? DF_DTYPE_F64 : DF_DTYPE_F32;
        t[i].ndim = ndims[i];
        memcpy(t[i].shape, shapes[i], sizeof shapes[i]);
        t[i].data = i == 2   ? (const void *)doubles_
                    : i == 4 ? NULL
                             : (const void *)weights_;
        t[i].data_is_double = i == 2;
    }
    return 6;
}

static void check_round_trip(df_ctx *ctx, const df_safetensors *f) {
    df_save_tensor t[6];
    int n = fill_tensors(t);
    expect(df_safetensors_count(f) == n);
    for (int i = 0; i < n; i++) {
        const df_file_tensor *got = df_safetensors_find(f, t[i].name);
        df_real out[24];
        if (!check(got != NULL, "\"%s\" is missing", t[i].name)) continue;
        expect(got->dtype == t[i].dtype && got->ndim == t[i].ndim);
        for (int j = 0; j < t[i].ndim; j++)
            expect(got->shape[j] == (uint64_t)t[i].shape[j]);
        if (i == 2) {                       // doubles as they are, whatever df_real is
            double d[3];
            memcpy(d, got->bytes, sizeof d);
            same_bits(d, doubles_, sizeof d);
        } else {
            check(df_safetensors_read(ctx, f, t[i].name, t[i].ndim, t[i].shape, out) ==
                      DF_OK,
                  "%s", df_ctx_message(ctx));
            for (size_t k = 0; k < got->count; k++) {
                df_real want =
                    t[i].dtype == DF_DTYPE_F32 ? (df_real)(float)weights_[k] : weights_[k];
                check(out[k] == want, "%s[%zu] = %.17g", t[i].name, k, (double)out[k]);
            }
        }
    }
    for (int i = 0; i < 3; i++) {
        const char *text = df_safetensors_metadata(f, texts_[i].key);
        if (check(text != NULL, "no \"%s\"", texts_[i].key))
            same_text(text, texts_[i].value);
    }
    expect(df_safetensors_metadata(f, "absent") == NULL);
    expect(df_safetensors_find(f, "absent") == NULL);
    expect(df_safetensors_at(f, -1) == NULL && df_safetensors_at(f, n) == NULL);
}

// Hooks that hand out or take a few bytes at a time.
typedef struct { unsigned char *data; size_t size, at, most; int code; } stream;
static size_t stream_read(void *user, void *buffer, size_t size) {
    stream *s = (stream *)user;
    size_t n = s->size - s->at;
    if (n > size) n = size;
    if (n > s->most) n = s->most;
    memcpy(buffer, s->data + s->at, n);
    s->at += n;
    return n;
}
static int stream_write(void *user, const void *data, size_t size) {
    stream *s = (stream *)user;
    if (s->code != 0 && s->at + size > s->most) return s->code;
    s->data = (unsigned char *)realloc(s->data, s->at + size);
    memcpy(s->data + s->at, data, size);
    s->at += size;
    return 0;
}
static size_t lying_read(void *user, void *buffer, size_t size) {
    (void)user; (void)buffer;
    return size + 1;
}

TEST(round_trips) {
    df_ctx *ctx = new_ctx();
    df_save_tensor t[6];
    df_buffer buffer = {NULL, 0, 0};
    stream s = {NULL, 0, 0, 0, 0};
    df_safetensors *f;
    int n = fill_tensors(t);
    const char *path = in_folder("round trip.safetensors");
    uint64_t header = 0;
    expect(df_safetensors_write(ctx, df_sink_path(path), t, n, texts_, 3) == DF_OK);
    expect(df_safetensors_write(ctx, df_sink_buffer(&buffer), t, n, texts_, 3) == DF_OK);
    expect(df_safetensors_write(ctx, df_sink_hooks(stream_write, &s), t, n, texts_, 3) ==
           DF_OK);
    expect(buffer.size == s.at && memcmp(buffer.data, s.data, s.at) == 0);
    // names in the given order, data aligned to 8 bytes, no byte behind the last tensor
    for (int i = 7; i >= 0; i--) header = header << 8 | buffer.data[i];
    expect(header % 8 == 0 &&
           buffer.size == 8 + header + 24 * 4 + 24 * 8 + 3 * 8 + 4 + 24 * 4);
    {
        char *text = (char *)calloc(1, (size_t)header + 1);
        memcpy(text, buffer.data + 8, (size_t)header);
        expect(strncmp(text, "{\"__metadata__\":{\"plain\":\"text\"", 31) == 0);
        expect(strstr(text, "z.last") < strstr(text, "scalar"));
        expect(strstr(text, "scalar") < strstr(text, "\"a\":"));
        expect(strstr(text,
                      "\"m\\\"id\\\\dle\\u000a\":{\"dtype\":\"F64\",\"shape\":[2,1,3,2,2],"
                      "\"data_offsets\":[96,288]}") != NULL);
        free(text);
    }
    f = df_safetensors_open(ctx, df_source_path(path));
    if (check(f != NULL, "%s", df_ctx_message(ctx))) check_round_trip(ctx, f);
    df_safetensors_close(f);
    f = df_safetensors_open(ctx, df_source_memory(buffer.data, buffer.size));
    memset(buffer.data, 0, buffer.size);    // memory is borrowed for the call only
    if (check(f != NULL, "%s", df_ctx_message(ctx))) check_round_trip(ctx, f);
    df_safetensors_close(f);
    for (size_t most = 1; most < 100000; most *= 7) {
        s.size = s.at;
        s.at = 0;
        s.most = most;
        f = df_safetensors_open(ctx, df_source_hooks(stream_read, &s));
        if (check(f != NULL, "%s", df_ctx_message(ctx))) check_round_trip(ctx, f);
        df_safetensors_close(f);
    }
    free(s.data);
    df_buffer_free(ctx, &buffer);
    df_buffer_free(ctx, &buffer);
    expect(buffer.data == NULL && buffer.size == 0);
    remove(path);
    end_ctx(ctx);
}

// Larger than what is read at once, so that a growing buffer takes part.
TEST(large) {
    enum { N = 50000 };
    df_ctx *ctx = new_ctx();
    df_real *w = (df_real *)malloc(N * sizeof *w), *out = (df_real *)malloc(N * sizeof *w);
    df_save_tensor t = {"w", DF_DTYPE_F64, 1, {N}, NULL, 0};
    df_buffer buffer = {NULL, 0, 0};
    const char *path = in_folder("large");
    df_safetensors *f;
    int shape = N;
    for (int i = 0; i < N; i++) w[i] = (df_real)sin(i);
    t.data = w;
    expect(df_safetensors_write(ctx, df_sink_path(path), &t, 1, NULL, 0) == DF_OK);
    expect(df_safetensors_write(ctx, df_sink_buffer(&buffer), &t, 1, NULL, 0) == DF_OK);
    for (int i = 0; i < 2; i++) {
        f = df_safetensors_open(ctx, i ? df_source_path(path)
                                       : df_source_memory(buffer.data, buffer.size));
        if (!check(f != NULL, "%s", df_ctx_message(ctx))) continue;
        memset(out, 0, N * sizeof *out);
        expect(df_safetensors_read(ctx, f, "w", 1, &shape, out) == DF_OK);
        same_bits(w, out, N * sizeof *out);
        expect(df_safetensors_metadata(f, "any") == NULL);
        df_safetensors_close(f);
    }
    df_buffer_free(ctx, &buffer);
    remove(path);
    free(w);
    free(out);
    end_ctx(ctx);
}

// Thirty thousand names in a bad order: opening must not take quadratic time.
TEST(many_tensors) {
    enum { N = 30000 };
    df_ctx *ctx = new_ctx();
    df_save_tensor *t = (df_save_tensor *)calloc(N, sizeof *t);
    char (*names)[16] = (char (*)[16])calloc(N, 16);
    df_buffer buffer = {NULL, 0, 0};
    df_safetensors *f;
    clock_t start = clock();
    float one[1] = {1};
    double wide = 1;
    for (int i = 0; i < N; i++) {
        snprintf(names[i], 16, "%d", N - i);
        t[i].name = names[i];
        t[i].data = sizeof(df_real) == 4 ? (void *)one : (void *)&wide;
    }
    expect(df_safetensors_write(ctx, df_sink_buffer(&buffer), t, N, NULL, 0) == DF_OK);
    f = df_safetensors_open(ctx, df_source_memory(buffer.data, buffer.size));
    if (check(f != NULL, "%s", df_ctx_message(ctx))) {
        int missing = 0;
        expect(df_safetensors_count(f) == N);
        for (int i = 0; i < N; i++) missing += df_safetensors_find(f, names[i]) == NULL;
        expect(missing == 0);
    }
    // Anything quadratic would take minutes; sanitizers alone take ten times as long.
    check((double)(clock() - start) / CLOCKS_PER_SEC < (test_short() ? 60 : 5), "took %.1f s",
          (double)(clock() - start) / CLOCKS_PER_SEC);
    df_safetensors_close(f);
    df_buffer_free(ctx, &buffer);
    free(t);
    free(names);
    end_ctx(ctx);
}

// ---- peers' files: counts and sums computed with Python's json, struct and math.fsum --

typedef struct {
    const char *path;
    int tensors;
    long elements;
    double sum, squares, weighted; // weighted: sum of x (i mod 7 + 1) within a tensor
    const char *name;              // of the tensor in the middle, and its first element
    df_dtype dtype;
    double first;
} golden;

TEST(golden_files) {
    static const golden files[2] = {
        {"tests/golden/nets/unet/unusual_header/diffusion_pytorch_model.safetensors", 112, 17609,
         180.87540421493895, 603.4698248846933, 630.9959185288694,
         "mid_block.resnets.1.time_emb_proj.bias", DF_DTYPE_F32, -0.1523362696170807},
        {"tests/golden/nets/dit/dit_bf16/model.safetensors", 42, 20008, 135.98883536458015,
         1153.9220399654935, 522.927770793438, "blocks.2.adaLN_modulation.1.weight",
         DF_DTYPE_BF16, -0.23828125}};
    df_ctx *ctx = new_ctx();
    for (int k = 0; k < 2; k++) {
        const golden *g = &files[k];
        df_safetensors *f = df_safetensors_open(ctx, df_source_path(g->path));
        double sum = 0, squares = 0, weighted = 0;
        long elements = 0;
        const df_file_tensor *t;
        if (!check(f != NULL, "%s", df_ctx_message(ctx))) continue;
        expect(df_safetensors_count(f) == g->tensors);
        for (int i = 0; i < df_safetensors_count(f); i++) {
            int shape[8];
            df_real *out;
            t = df_safetensors_at(f, i);
            out = (df_real *)malloc((t->count + 1) * sizeof *out);
            for (int j = 0; j < t->ndim; j++) shape[j] = (int)t->shape[j];
            expect(df_safetensors_read(ctx, f, t->name, t->ndim, shape, out) == DF_OK);
            for (size_t j = 0; j < t->count; j++) {
                double x = (double)out[j];
                sum += x;
                squares += x * x;
                weighted += x * (double)(j % 7 + 1);
            }
            if (strcmp(t->name, g->name) == 0) expect((double)out[0] == g->first);
            elements += (long)t->count;
            free(out);
        }
        t = df_safetensors_find(f, g->name);
        expect(t != NULL && t->dtype == g->dtype);
        expect(elements == g->elements);
        near(sum, g->sum, 1e-12);
        near(squares, g->squares, 1e-12);
        near(weighted, g->weighted, 1e-12);
        same_text(df_safetensors_metadata(f, "format"), "pt");
        if (k == 0) same_text(df_safetensors_metadata(f, "note"),
                              "quote \" backslash \\ brace } in a string");
        df_safetensors_close(f);
    }
    end_ctx(ctx);
}

// Under -Ofast the processor may take the smallest floats for 0.
static int flushes_to_zero(void) {
    volatile float tiny = 1e-40f, one = 1;
    return tiny * one == 0;
}

// ---- types ----------------------------------------------------------------------------

// The positive half-precision numbers in rising order, each one unit of the last place
// above the one before: 2^-24 up to exponent 1, 2^(e-25) at exponent e.
TEST(half_precision) {
    df_ctx *ctx = new_ctx();
    blob b = make_blob(
        "{\"h\":{\"dtype\":\"F16\",\"shape\":[31744],\"data_offsets\":[0,63488]},"
        "\"n\":{\"dtype\":\"F16\",\"shape\":[31744],\"data_offsets\":[63488,126976]}}",
        -1, 126976);
    df_real *out = (df_real *)malloc(31744 * sizeof *out);
    unsigned char *data = b.data + b.size - 126976;
    df_safetensors *f;
    int shape = 31744, wrong = 0;
    double x = 0;
    for (int i = 0; i < 31744; i++) {
        data[2 * i] = data[63488 + 2 * i] = (unsigned char)(i & 255);
        data[2 * i + 1] = (unsigned char)(i >> 8);
        data[63488 + 2 * i + 1] = (unsigned char)(i >> 8 | 128);
    }
    f = open_blob(ctx, b);
    if (check(f != NULL, "%s", df_ctx_message(ctx))) {
        expect(df_safetensors_read(ctx, f, "h", 1, &shape, out) == DF_OK);
        for (int i = 0; i < 31744; i++) {
            wrong += (double)out[i] != x;
            x += ldexp(1.0, i < 1024 ? -24 : i / 1024 - 25);
        }
        expect(wrong == 0 && x == 65536.0);
        expect(df_safetensors_read(ctx, f, "n", 1, &shape, out) == DF_OK);
        expect((double)out[1] == -ldexp(1.0, -24) && (double)out[31743] == -65504.0);
    }
    df_safetensors_close(f);
    free(b.data);
    free(out);
    end_ctx(ctx);
}

TEST(other_types) {
    df_ctx *ctx = new_ctx();
    blob b = make_blob("{\"i\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[0,16]},"
                       "\"j\":{\"dtype\":\"I32\",\"shape\":[2],\"data_offsets\":[16,24]},"
                       "\"u\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[24,26]},"
                       "\"b\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[26,30]},"
                       "\"f\":{\"dtype\":\"F4\",\"shape\":[2],\"data_offsets\":[30,31]},"
                       "\"q\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[31,35]}}",
                       -1, 35);
    static const unsigned char bytes[35] = {
        0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0,    0,   0,
        1,    0,    0,    0,    0xff, 0xff, 0xff, 0xff, 0, 0,    0,   0x40,
        7,    255,  0x80, 0x3f, 0x01, 0x80, 0,    0,    0, 0x80, 0xbf};
    df_safetensors *f;
    df_real out[2];
    int two = 2, one = 1, three = 3, wrong[2] = {1, 2};
    memcpy(b.data + b.size - 35, bytes, 35);
    f = open_blob(ctx, b);
    if (check(f != NULL, "%s", df_ctx_message(ctx))) {
        expect(df_safetensors_read(ctx, f, "i", 1, &two, out) == DF_OK);
        expect((double)out[0] == -2 && (double)out[1] == 4294967296.0);
        expect(df_safetensors_read(ctx, f, "j", 1, &two, out) == DF_OK);
        expect((double)out[0] == -1 && (double)out[1] == 1073741824.0);
        expect(df_safetensors_read(ctx, f, "u", 1, &two, out) == DF_OK);
        expect((double)out[0] == 7 && (double)out[1] == 255);
        expect(df_safetensors_read(ctx, f, "b", 1, &two, out) == DF_OK);
        expect((double)out[0] == 1);
        expect((double)out[1] == -ldexp(1.0, -133) || (out[1] == 0 && flushes_to_zero()));
        expect(df_safetensors_read(ctx, f, "q", 1, &one, out) == DF_OK &&
               (double)out[0] == -1);
        expect(df_safetensors_read(ctx, f, "f", 1, &two, out) == DF_ERR_FORMAT);
        expect(strstr(df_ctx_message(ctx), "\"f\": unreadable dtype") != NULL);
        expect(df_safetensors_read(ctx, f, "q", 1, &three, out) == DF_ERR_FORMAT);
        expect(strstr(df_ctx_message(ctx),
                      "(memory): tensor \"q\": shape[0] is 1, wanted is 3") != NULL);
        expect(df_safetensors_read(ctx, f, "i", 2, wrong, out) == DF_ERR_FORMAT);
        expect(strstr(df_ctx_message(ctx), "\"i\": 1 axes, not 2") != NULL);
        expect(df_safetensors_read(ctx, f, "i", 9, wrong, out) == DF_ERR_FORMAT);
        expect(df_safetensors_read(ctx, f, "nope", 1, &two, out) == DF_ERR_FORMAT);
        expect(strstr(df_ctx_message(ctx), "tensor \"nope\": is missing") != NULL);
    }
    df_safetensors_close(f);
    free(b.data);
    end_ctx(ctx);
}

// NaN and infinity of every type, in the second of three elements.
TEST(nonfinite_weights) {
    static const struct {
        const char *dtype;
        int bytes;
        unsigned long long bits;
    } cases[] = {{"F32", 4, 0x7f800000},
                 {"F32", 4, 0xff800000},
                 {"F32", 4, 0x7fc00000},
                 {"F32", 4, 0x7f800001},
                 {"F64", 8, 0x7ff0000000000000},
                 {"F64", 8, 0xfff8000000000000},
                 {"F64", 8, 0x7ff0000000000001},
                 {"F16", 2, 0x7c00},
                 {"F16", 2, 0xfe00},
                 {"F16", 2, 0x7c01},
                 {"BF16", 2, 0x7f80},
                 {"BF16", 2, 0xffc0}};
    df_ctx *ctx = new_ctx();
    int three = 3;
    df_real out[3];
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        char header[200];
        int n = cases[k].bytes;
        blob b;
        df_safetensors *f;
        snprintf(header, sizeof header,
                 "{\"w\":{\"dtype\":\"%s\",\"shape\":[3],\"data_offsets\":[0,%d]}}",
                 cases[k].dtype, 3 * n);
        b = make_blob(header, -1, (size_t)(3 * n));
        for (int i = 0; i < n; i++)
            b.data[b.size - (size_t)(2 * n) + (size_t)i] =
                (unsigned char)(cases[k].bits >> 8 * i & 255);
        f = open_blob(ctx, b);
        expect(f != NULL);
        check(f && df_safetensors_read(ctx, f, "w", 1, &three, out) == DF_ERR_NONFINITE &&
                  strstr(df_ctx_message(ctx), "tensor \"w\": element 1 of 3"),
              "%s %llx: %s", cases[k].dtype, cases[k].bits, df_ctx_message(ctx));
        df_safetensors_close(f);
        free(b.data);
    }
    // a double that a float cannot hold
    {
        double big[2] = {1, 1e39};
        df_save_tensor t = {"w", DF_DTYPE_F64, 1, {2}, NULL, 1};
        df_buffer buffer = {NULL, 0, 0};
        df_safetensors *f;
        int two = 2;
        t.data = big;
        expect(df_safetensors_write(ctx, df_sink_buffer(&buffer), &t, 1, NULL, 0) ==
               DF_OK);
        f = df_safetensors_open(ctx, df_source_memory(buffer.data, buffer.size));
        expect(df_safetensors_read(ctx, f, "w", 1, &two, out)
               == (sizeof(df_real) == 4 ? DF_ERR_NONFINITE : DF_OK));
        df_safetensors_close(f);
        df_buffer_free(ctx, &buffer);
    }
    end_ctx(ctx);
}

// ---- hostile files --------------------------------------------------------------------

#define ENTRY(name, shape, from, to)                                                      \
    "\"" name "\":{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":[" from "," to  \
    "]}"

TEST(malformed_headers) {
    df_ctx *ctx = new_ctx();
    accepted(ctx, "{}", 0);
    accepted(ctx, "{}   ", 0);
    accepted(ctx, "{ \"__metadata__\" : { } }", 0);
    accepted(ctx, "{" ENTRY("a", "[]", "0", "4") "}", 4);
    accepted(ctx, "{" ENTRY("a", "[0,18446744073709551615]", "0", "0") "}", 0);
    accepted(ctx, "{" ENTRY("", "[1]", "0", "4") "}", 4);
    accepted(ctx, "{" ENTRY("z", "[0]", "4", "4") "," ENTRY("b", "[0]", "0", "0") ","
             ENTRY("a", "[1]", "4", "8") "," ENTRY("c", "[1]", "0", "4") "}", 8);
    accepted(ctx,
             "{" ENTRY("\\u00e9\\ud83d\\ude00\\/\\b\\f\\n\\r\\t", "[1]", "0", "4") "}", 4);
    // the length in front
    refused(ctx, "", 0, 0, "is no safetensors file");
    refused(ctx, "{}", 3, 0, "a header of 3 bytes that begins with '{' in 10");
    refused(ctx, "{}", 0x7fffffffffffffff, 0, "is no safetensors file");
    refused(ctx, "{}", 1, 1, "JSON, byte 1");
    refused(ctx, " {}", -1, 0, "is no safetensors file");
    refused(ctx, "[]", -1, 0, "is no safetensors file");
    // places
    refused(ctx, "{" ENTRY("a", "[1]", "0", "5") "}", -1, 5,
            "tensor \"a\": data_offsets do not span what dtype and shape take (F32 at [0,5]");
    refused(ctx, "{" ENTRY("a", "[1]", "0", "4") "}", -1, 3, "within the data (F32 at [0,4] of 3 bytes)");
    refused(ctx, "{" ENTRY("a", "[1]", "4", "0") "}", -1, 4, "do not lie in order");
    refused(ctx, "{" ENTRY("a", "[1]", "18446744073709551612", "18446744073709551615") "}",
            -1, 4, "do not lie");
    refused(ctx, "{" ENTRY("a", "[1]", "0", "18446744073709551616") "}", -1, 4,
            "not whole numbers");
    refused(ctx, "{" ENTRY("a", "[1]", "-4", "0") "}", -1, 4,
            "not whole numbers");
    refused(ctx, "{" ENTRY("a", "[1]", "0", "4.0") "}", -1, 4,
            "not whole numbers");
    refused(ctx, "{" ENTRY("a", "[1]", "0", "4e0") "}", -1, 4,
            "not whole numbers");
    refused(ctx, "{" ENTRY("a", "[1]", "0", "4,8") "}", -1, 4,
            "not whole numbers");
    refused(ctx, "{" ENTRY("a", "[1]", "0", "4") "}", -1, 8,
            "a hole or an overlap at byte 4 of 8");
    refused(ctx, "{" ENTRY("a", "[1]", "0", "4") "," ENTRY("b", "[1]", "2", "6") "}", -1,
            6, "a hole or an overlap at byte 4");
    refused(ctx, "{" ENTRY("a", "[1]", "0", "4") "," ENTRY("b", "[1]", "0", "4") "}", -1,
            4, "a hole or an overlap at byte 4");
    refused(ctx, "{" ENTRY("a", "[1]", "0", "4") "," ENTRY("b", "[1]", "8", "12") "}", -1,
            12, "\"b\": a hole or an overlap at byte 4 of 12");
    refused(ctx, "{" ENTRY("a", "[1]", "4", "8") "}", -1, 8, "\"a\": a hole or an overlap at byte 0 of 8");
    refused(ctx, "{}", -1, 1, "a hole or an overlap at byte 0 of 1");
    // shapes
    refused(ctx, "{" ENTRY("a", "[9223372036854775808,4]", "0", "0") "}", -1, 0,
            "product of the shape overflows");
    refused(ctx, "{" ENTRY("a", "[4294967296,4294967296]", "0", "0") "}", -1, 0,
            "product of the shape overflows");
    refused(ctx, "{" ENTRY("a", "[4611686018427387904]", "0", "0") "}", -1, 0,
            "product of the shape overflows");
    refused(ctx, "{" ENTRY("a", "[-1]", "0", "4") "}", -1, 4,
            "not whole numbers");
    refused(ctx, "{" ENTRY("a", "[1,1.5]", "0", "4") "}", -1, 4,
            "not whole numbers");
    refused(ctx, "{" ENTRY("a", "[1,1e2]", "0", "4") "}", -1, 4,
            "not whole numbers");
    refused(ctx, "{" ENTRY("a", "[\"1\"]", "0", "4") "}", -1, 4,
            "not whole numbers");
    refused(ctx, "{" ENTRY("a", "1", "0", "4") "}", -1, 4, "'[' or '{' is wanted");
    refused(ctx, "{" ENTRY("a", "[1,1,1,1,1,1,1,1,1]", "0", "4") "}", -1, 4, "not whole numbers");
    refused(ctx, "{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]}}", -1, 1,
            "do not span");
    // types and keys
    refused(ctx, "{\"a\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]}}", -1, 4,
            "tensor \"a\": unknown dtype (F33");
    refused(ctx, "{\"a\":{\"dtype\":32,\"shape\":[1],\"data_offsets\":[0,4]}}", -1, 4,
            "tensor \"a\": JSON, byte 14: a string is missing");
    refused(ctx, "{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", -1, 4,
            "tensor \"a\": dtype, shape or data_offsets is missing");
    refused(ctx, "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", -1, 4,
            "data_offsets is missing");
    refused(ctx, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", -1, 4,
            "data_offsets is missing");
    refused(ctx, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4]}}", -1, 4,
            "data_offsets is missing");
    refused(ctx, "{\"a\":{}}", -1, 0, "data_offsets is missing");
    refused(ctx,
            "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":1}}", -1,
            4, "byte 57: a key is unknown or stands twice");
    refused(ctx,
            "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":["
            "0,4]}}", -1, 4, "stands twice");
    refused(ctx,
            "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"shape\":[1],\"data_offsets\":[0,4]}}",
            -1, 4, "stands twice");
    refused(ctx,
            "{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"shape\":[],\"data_offsets\":[0,4]}}",
            -1, 4, "stands twice");
    refused(ctx,
            "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[],\"data_offsets\":"
            "[0,4]}}", -1, 4, "stands twice");
    refused(ctx, "{" ENTRY("a", "[0]", "0", "0") "," ENTRY("a", "[0]", "0", "0") "}", -1,
            0, "the key \"a\" stands twice");
    refused(ctx, "{" ENTRY("a", "[0]", "0", "0") "," ENTRY("b", "[0]", "0", "0") ","
            ENTRY("\\u0061", "[0]", "0", "0") "}", -1, 0, "the key \"a\" stands twice");
    refused(ctx, "{\"__metadata__\":{\"k\":\"v\",\"j\":\"v\",\"k\":\"w\"}}", -1, 0,
            "the key \"k\" stands twice");
    refused(ctx, "{\"__metadata__\":{},\"__metadata__\":{}}", -1, 0, "stands twice");
    refused(ctx, "{\"a\":[]}", -1, 0, "tensor \"a\": JSON, byte 5: '[' or '{' is wanted");
    refused(ctx, "{\"__metadata__\":[]}", -1, 0, "byte 16: '[' or '{' is wanted");
    refused(ctx, "{\"__metadata__\":{\"k\":1}}", -1, 0, "byte 21: a string is missing");
    refused(ctx, "{\"__metadata__\":{\"k\":null}}", -1, 0, "a string is missing");
    end_ctx(ctx);
}

TEST(malformed_json) {
    static const struct { const char *text, *words;
    } cases[] = {
        {"{", "a string is missing"},
        {"{\"", "ends inside a string"},
        {"{\"a", "ends inside a string"},
        {"{\"a\"", "':' is missing"},
        {"{\"a\":", "'[' or '{' is wanted"},
        {"{\"a\":1", "'[' or '{' is wanted"},
        {"{\"a\":}", "'[' or '{' is wanted"},
        {"{\"a\":null}", "'[' or '{' is wanted"},
        {"{\"a\":{", "a string is missing"},
        {"{\"a\":{\"dtype\":\"F32\"", "',' or bracket"},
        {"{\"a\":{\"dtype\":\"F32\",", "a string is missing"},
        {"{\"a\":{\"dtype\":\"F32\",}", "a string is missing"},
        {"{\"a\":{\"dtype\":\"F32\" \"shape\":[]}", "',' or bracket"},
        {"{,}", "a string is missing"},
        {"{a:{}}", "a string is missing"},
        {"{'a':{}}", "a string is missing"},
        {"{\"a\" {}}", "':' is missing"},
        {"{\"__metadata__\":{} \"b\":2}", "',' or bracket"},
        {"{\"__metadata__\":{}", "',' or bracket"},
        {"{\"__metadata__\":{]}", "a string is missing"},
        {"{\"__metadata__\":{},", "a string is missing"},
        {"{\"__metadata__\":{},}", "a string is missing"},
        {"{\"__metadata__\":{\"a\":\"b\"]", "',' or bracket"},
        {"{}{}", "follows the end"},
        {"{} x", "follows the end"},
        {"{\"a\":{\"shape\":[1 2]}}", "',' or bracket"},
        {"{\"a\":{\"shape\":[1,]}}", "not whole numbers"},
        {"{\"a\":{\"shape\":[,1]}}", "not whole numbers"},
        {"{\"a\":{\"shape\":[1}}", "',' or bracket"},
        {"{\"a\":{\"shape\":[1", "',' or bracket"},
        {"{\"a\":{\"shape\":[", "not whole numbers"},
        {"{\"a\":{\"shape\":[true]}}", "not whole numbers"},
        {"{\"a\":{\"shape\":[NaN]}}", "not whole numbers"},
        {"{\"a\":{\"shape\":[+1]}}", "not whole numbers"},
        {"{\"a\":{\"shape\":[.5]}}", "not whole numbers"},
        {"{\"a\":{\"shape\":[5.]}}", "not whole numbers"},
        {"{\"a\":{\"shape\":[-]}}", "not whole numbers"},
        {"{\"a\":{\"shape\":[1e0]}}", "not whole numbers"},
        {"{\"a\":{\"shape\":[0x10]}}", "',' or bracket"},
        {"{\"a\":{\"shape\":[[1]]}}", "not whole numbers"},
        {"{\"a\":{\"shape\":[\"1\"]}}", "not whole numbers"},
        {"{\"a\\x\":1}", "bad escape"},
        {"{\"a\\", "bad escape"},
        {"{\"\\u12\":1}", "bad escape"},
        {"{\"\\u", "bad escape"},
        {"{\"\\u12g4\":1}", "bad escape"},
        {"{\"\\u0000\":1}", "bad escape"},
        {"{\"\\ud800\":1}", "bad escape"},
        {"{\"\\ud800\\u0041\":1}", "bad escape"},
        {"{\"\\udc00\":1}", "bad escape"},
        {"{\"\\ud800\\ud800\":1}", "bad escape"},
        {"{\"\\ud83d\\ude0", "bad escape"},
        {"{\"a\nb\":1}", "control character"},
        {"{\"\x01\":1}", "control character"}};
    df_ctx *ctx = new_ctx();
    size_t deep = 100000;
    char *text = (char *)malloc(2 * deep + 20);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        refused(ctx, cases[i].text, -1, 0, cases[i].words);
    // no depth of brackets becomes a depth of calls
    memcpy(text, "{\"a\":{\"shape\":", 14);
    memset(text + 14, '[', deep);
    memset(text + 14 + deep, ']', deep);
    memcpy(text + 14 + 2 * deep, "}}", 3);
    refused(ctx, text, -1, 0, "not whole numbers");
    text[14 + deep] = 0;
    refused(ctx, text, -1, 0, "not whole numbers");
    for (size_t i = 0; i < deep / 5; i++) memcpy(text + 5 * i, "{\"a\":", 6);
    refused(ctx, text, -1, 0, "a key is unknown");
    {   // a raw 0 byte in the header
        blob b = make_blob("{\"a_b\":1}", -1, 0);
        b.data[8 + 3] = 0;
        expect(open_blob(ctx, b) == NULL &&
               strstr(df_ctx_message(ctx), "control character"));
        b.data[8 + 3] = '_';
        b.data[8 + 1] = 0;
        expect(open_blob(ctx, b) == NULL &&
               strstr(df_ctx_message(ctx), "a string is missing"));
        free(b.data);
        b = make_blob("{}_", -1, 0);
        b.data[8 + 2] = 0;
        expect(open_blob(ctx, b) == NULL && strstr(df_ctx_message(ctx), "follows the end"));
        free(b.data);
    }
    free(text);
    end_ctx(ctx);
}

// A small file of several types, with metadata.
static blob small_file(void) {
    blob b = make_blob(
        "{\"__metadata__\":{\"k\":\"v\\n\"},\"a.b\":{\"dtype\":\"F32\",\"shape\":[2,2],"
        "\"data_offsets\":[8,24]},\"c\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":"
        "[24,26]},\"d\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]}}  ",
        -1, 26);
    return b;
}

TEST(truncation_everywhere) {
    df_ctx *ctx = new_ctx();
    blob b = small_file();
    df_safetensors *f = open_blob(ctx, b);
    check(f != NULL, "%s", df_ctx_message(ctx));
    df_safetensors_close(f);
    for (size_t n = 0; n < b.size; n++) {
        unsigned char *exact = (unsigned char *)malloc(n + (n == 0));
        memcpy(exact, b.data, n);
        f = df_safetensors_open(ctx, df_source_memory(exact, n));
        check(f == NULL && df_ctx_error(ctx) == DF_ERR_FORMAT
              && strncmp(df_ctx_message(ctx), "df_safetensors_open: (memory)", 29) == 0,
              "%zu of %zu bytes: %s", n, b.size, df_ctx_message(ctx));
        df_safetensors_close(f);
        free(exact);
    }
    free(b.data);
    end_ctx(ctx);
}

// Every byte of length and header, every value: never a crash, never another code than
// FORMAT; what is accepted can be read.
TEST(mutation_everywhere) {
    df_ctx *ctx = new_ctx();
    blob b = small_file();
    long odd = 0, opened = 0, tried = 0;
    int step = test_short() ? 5 : 1;
    for (size_t i = 0; i < b.size - 26; i++) {
        unsigned char old = b.data[i];
        for (int v = 0; v < 256; v += step) {
            df_safetensors *f;
            b.data[i] = (unsigned char)v;
            f = open_blob(ctx, b);
            tried++;
            if (f != NULL) {
                opened++;
                odd += read_all(ctx, f);
            } else {
                odd += df_ctx_error(ctx) != DF_ERR_FORMAT;
            }
            df_safetensors_close(f);
        }
        b.data[i] = old;
    }
    check(odd == 0, "%ld odd outcomes", odd);
    check(opened > 0 && opened < tried / 2, "%ld of %ld accepted", opened, tried);
    free(b.data);
    end_ctx(ctx);
}

// A few bytes changed, removed or doubled at random places, a few thousand times.
TEST(random_mutation) {
    df_ctx *ctx = new_ctx();
    blob b = small_file();
    unsigned char *copy = (unsigned char *)malloc(4 * b.size);
    uint64_t state = 12345;
    long odd = 0;
    for (int trial = 0; trial < (test_short() ? 2000 : 20000); trial++) {
        size_t size = b.size;
        df_safetensors *f;
        memcpy(copy, b.data, size);
        for (int k = 0; k < 1 + trial % 4; k++) {
            size_t at, to;
            state = state * 6364136223846793005u + 1442695040888963407u;
            at = (size_t)(state >> 33) % size;
            to = (size_t)(state >> 13) % size;
            if (state >> 62 == 0) copy[at] = copy[to];
            else if (state >> 62 == 1)
                copy[at] = (unsigned char)"0123456789[]{},:\"\\ eu"[to % 21];
            else if (state >> 62 == 2 && size > 20)
                memmove(copy + at, copy + at + 1, --size - at);
            else if (size < 3 * b.size) {
                memmove(copy + at + 1, copy + at, size - at);
                size++;
            }
        }
        for (int i = 0; i < 8 && trial % 2; i++) // every other time the length is right
            copy[i] = (unsigned char)((size > 34 ? size - 34 : 0) >> 8 * i & 255);
        f = df_safetensors_open(ctx, df_source_memory(copy, size));
        odd += f != NULL ? read_all(ctx, f) : df_ctx_error(ctx) != DF_ERR_FORMAT;
        df_safetensors_close(f);
    }
    check(odd == 0, "%ld odd outcomes", odd);
    free(copy);
    free(b.data);
    end_ctx(ctx);
}

TEST(bad_sources) {
    df_ctx *ctx = new_ctx();
    df_source none = df_source_path(NULL);
    df_source named = df_source_memory("xx", 2);
    const char *path = in_folder("empty");
    FILE *file = fopen(path, "wb");
    fclose(file);
    named.name = "weights in flash";
    expect(df_safetensors_open(ctx, none) == NULL && df_ctx_error(ctx) == DF_ERR_ARGUMENT);
    expect(df_safetensors_open(ctx, df_source_path("/nonexistent/w")) == NULL);
    expect(df_ctx_error(ctx) == DF_ERR_IO &&
           strstr(df_ctx_message(ctx), "/nonexistent/w: cannot open: "));
    expect(strstr(df_ctx_message(ctx), strerror(ENOENT)) != NULL);
    expect(df_safetensors_open(ctx, df_source_path(folder_)) == NULL);
    expect(df_ctx_error(ctx) == DF_ERR_IO &&
           strstr(df_ctx_message(ctx), strerror(EISDIR)));
    expect(df_safetensors_open(ctx, df_source_path(path)) == NULL);
    expect(df_ctx_error(ctx) == DF_ERR_FORMAT &&
           strstr(df_ctx_message(ctx), "begins with '{' in 0?"));
    expect(df_safetensors_open(ctx, named) == NULL);
    expect(strstr(df_ctx_message(ctx), "weights in flash: is no safetensors file") != NULL);
    expect(df_safetensors_open(ctx, df_source_hooks(lying_read, NULL)) == NULL);
    expect(df_ctx_error(ctx) == DF_ERR_ARGUMENT);
    expect(df_safetensors_open(NULL, named) == NULL);
    df_safetensors_close(NULL);
    remove(path);
    end_ctx(ctx);
}

// ---- writing --------------------------------------------------------------------------

TEST(bad_arguments) {
    df_ctx *ctx = new_ctx();
    df_save_tensor good, t[2];
    df_save_text text[2] = {{"k", "v"}, {"k", "w"}}, null_text = {NULL, "v"};
    df_buffer buffer = {NULL, 0, 0};
    df_sink sink = df_sink_buffer(&buffer), none = df_sink_path(NULL);
    memset(&good, 0, sizeof good);
    good.name = "a";
    good.ndim = 1;
    good.shape[0] = 2;
    good.data = weights_;
#define WRONG(change, words)                                                              \
    do {                                                                                  \
        t[0] = t[1] = good;                                                               \
        t[1].name = "b";                                                                  \
        change;                                                                           \
        check(df_safetensors_write(ctx, sink, t, 2, NULL, 0) == DF_ERR_ARGUMENT &&        \
                  strstr(df_ctx_message(ctx), words),                                     \
              "%s: %s", #change, df_ctx_message(ctx));                                    \
    } while (0)
    WRONG(t[1].name = "a", "the key \"a\" stands twice");
    WRONG(t[1].name = NULL, "no name");
    WRONG(t[1].name = "__metadata__", "a string is missing");
    WRONG(t[1].data = NULL, "\"b\": data is NULL");
    WRONG(t[1].dtype = DF_DTYPE_F16, "\"b\": dtype");
    WRONG(t[1].ndim = 6, "\"b\": ndim");
    WRONG(t[1].ndim = -1, "\"b\": ndim");
    WRONG(t[1].shape[0] = -2, "\"b\": a negative number");
    WRONG((t[1].ndim = 5, t[1].shape[0] = t[1].shape[1] = t[1].shape[2] = t[1].shape[3] =
           t[1].shape[4] = 2147483647), "\"b\": the product of its shape overflows");
    expect(df_safetensors_write(ctx, sink, &good, 1, text, 2) == DF_ERR_ARGUMENT);
    expect(strstr(df_ctx_message(ctx), "the key \"k\" stands twice") != NULL);
    expect(df_safetensors_write(ctx, sink, &good, 1, &null_text, 1) == DF_ERR_ARGUMENT);
    expect(df_safetensors_write(ctx, sink, &good, -1, NULL, 0) == DF_ERR_ARGUMENT);
    expect(df_safetensors_write(ctx, sink, NULL, 1, NULL, 0) == DF_ERR_ARGUMENT);
    expect(df_safetensors_write(ctx, none, &good, 1, NULL, 0) == DF_ERR_ARGUMENT);
    expect(buffer.size == 0);
    expect(df_safetensors_write(ctx, sink, NULL, 0, NULL, 0) == DF_OK &&
           buffer.size == 16);
    text[1].key = "other";                  // equal values are fine
    text[1].value = "v";
    expect(df_safetensors_write(ctx, sink, NULL, 0, text, 2) == DF_OK);   // appended
    expect(buffer.size > 32);
    df_buffer_free(ctx, &buffer);
    end_ctx(ctx);
}

// What fails leaves the old file, an untouched buffer and nothing beside.
TEST(failures_leave_the_old) {
    enum { N = 20000 };
    df_ctx *ctx = new_ctx();
    df_real *w = (df_real *)calloc(N, sizeof *w);
    df_save_tensor t = {"w", DF_DTYPE_F32, 1, {4}, NULL, 0};
    df_buffer buffer = {NULL, 0, 0};
    stream s = {NULL, 0, 0, 20000, 77};
    const char *path = in_folder("kept");
    struct rlimit limit, old;
    struct stat st;
    df_safetensors *f;
    size_t size;
    mode_t mask = umask(022);
    t.data = w;
    expect(df_safetensors_write(ctx, df_sink_path(path), &t, 1, NULL, 0) == DF_OK);
    expect(stat(path, &st) == 0 && (st.st_mode & 0777) == 0644);
    expect(chmod(path, 0600) == 0);
    expect(df_safetensors_write(ctx, df_sink_path(path), &t, 1, NULL, 0) == DF_OK);
    expect(stat(path, &st) == 0 && ((st.st_mode & 0777) == 0600 || !POSIX));   // kept
    umask(mask);
    expect(df_safetensors_write(ctx, df_sink_buffer(&buffer), &t, 1, NULL, 0) == DF_OK);
    size = buffer.size;
    // a NaN far behind the first chunk
    t.shape[0] = N;
    {
        double nan = strtod("nan", NULL);
        w[N - 1] = (df_real)nan;
    }
    expect(df_safetensors_write(ctx, df_sink_path(path), &t, 1, NULL, 0) ==
           DF_ERR_NONFINITE);
    expect(strstr(df_ctx_message(ctx), "element 19999 of 20000") != NULL);
    expect(df_safetensors_write(ctx, df_sink_buffer(&buffer), &t, 1, NULL, 0) ==
           DF_ERR_NONFINITE);
    expect(buffer.size == size);
    w[N - 1] = 0;
    // the disk is full: at once, and in the middle
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    for (int k = 0; k < 3; k++) {
        limit = old;
        limit.rlim_cur = k == 0 ? 0 : k == 1 ? 100 : 40000;
        setrlimit(RLIMIT_FSIZE, &limit);
        expect(df_safetensors_write(ctx, df_sink_path(path), &t, 1, NULL, 0) == DF_ERR_IO);
        setrlimit(RLIMIT_FSIZE, &old);
        check(strstr(df_ctx_message(ctx), strerror(EFBIG)) != NULL, "%s",
              df_ctx_message(ctx));
    }
    // a device is refused, not replaced; through a link, so that a mistake costs only
    // that
    if (POSIX && access("/dev/full", W_OK) == 0 &&
        symlink("/dev/full", in_folder("full")) == 0) {
        const char *full = in_folder("full");
        expect(df_safetensors_write(ctx, df_sink_path(full), &t, 1, NULL, 0) == DF_ERR_IO);
        check(strstr(df_ctx_message(ctx), "full: is not a regular file") != NULL, "%s",
              df_ctx_message(ctx));
        expect(stat(full, &st) == 0 && S_ISCHR(st.st_mode));
        remove(full);
    }
    // hooks: their own code comes back
    expect(df_safetensors_write(ctx, df_sink_hooks(stream_write, &s), &t, 1, NULL, 0) ==
           77);
    expect(df_ctx_error(ctx) == 77);
    // no such folder, a file in the place of a folder, a folder in the place of the file
    expect(df_safetensors_write(ctx, df_sink_path(in_folder("no/w")), &t, 1, NULL, 0) ==
           DF_ERR_IO);
    expect(df_safetensors_write(ctx, df_sink_path(in_folder("kept/w")), &t, 1, NULL, 0) ==
           DF_ERR_IO);
    expect(df_safetensors_write(ctx, df_sink_path(folder_), &t, 1, NULL, 0) == DF_ERR_IO);
    expect(files_in_folder() == 1);
    f = df_safetensors_open(ctx, df_source_path(path));
    if (check(f != NULL, "%s", df_ctx_message(ctx)))
        expect(df_safetensors_at(f, 0)->count == 4);
    df_safetensors_close(f);
    df_buffer_free(ctx, &buffer);
    free(s.data);
    free(w);
    remove(path);
    end_ctx(ctx);
}

// A child replaces the file again and again, by turns with one content and another; it is
// killed at random moments. Whoever looks finds one of the two, whole.
TEST(killed_while_writing) {
    enum { N = 40000 };
    const char *path = in_folder("killed");
    int kills = test_short() ? 20 : 60, bad = 0, seen[2] = {0, 0};
    char command[400];
    for (int k = 0; k < kills; k++) {
        pid_t child = fork();
        if (child == 0) {
            df_ctx *ctx = new_ctx();
            df_real *w = (df_real *)malloc(N * sizeof *w);
            df_save_tensor t = {"w", DF_DTYPE_F32, 1, {N}, NULL, 0};
            t.data = w;
            for (int round = k;; round++) {
                for (int i = 0; i < N; i++) w[i] = (df_real)(round % 2);
                t.shape[0] = round % 2 ? N : N / 2;
                if (df_safetensors_write(ctx, df_sink_path(path), &t, 1, NULL, 0) != DF_OK)
                    _exit(1);
            }
        }
        {
            struct timespec nap = {0, 1000000};
            df_ctx *ctx = new_ctx();
            df_safetensors *f;
            int status;
            for (int ms = 0; ms < 5000 && access(path, F_OK) != 0; ms++)
                nanosleep(&nap, NULL);                           // the first file
            nap.tv_nsec = 3000000 + (k * 7919 % 997) * 9000;    // 3 to 12 ms
            nanosleep(&nap, NULL);
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
            bad += !WIFSIGNALED(status);
            if (access(path, F_OK) == 0) {
                f = df_safetensors_open(ctx, df_source_path(path));
                bad += f == NULL;
                if (f != NULL) {
                    const df_file_tensor *t = df_safetensors_at(f, 0);
                    df_real *out = (df_real *)malloc(N * sizeof *out);
                    int shape = (int)t->count, which = t->count == N;
                    bad += df_safetensors_read(ctx, f, "w", 1, &shape, out) != DF_OK;
                    for (int i = 0; i < shape; i++) bad += out[i] != (df_real)which;
                    seen[which]++;
                    free(out);
                }
                df_safetensors_close(f);
            }
            end_ctx(ctx);
        }
    }
    check(bad == 0, "%d bad outcomes", bad);
    // Which of the two a kill leaves is chance; on a slow machine most kills come before the
    // first file.
    check(seen[0] + seen[1] > 0, "no child had written a file when it was killed");
    snprintf(command, sizeof command, "rm -f '%s'*", path);     // the killed leave a .tmp
    expect(system(command) == 0);
}

// What another thread, or a process that died, has written beside is not touched.
TEST(leftovers) {
    df_ctx *ctx = new_ctx();
    df_save_tensor t = {"w", DF_DTYPE_F32, 0, {0}, NULL, 0};
    const char *path = in_folder("x");
    char left[400], text[8] = "";
    FILE *file;
    t.data = weights_;
    snprintf(left, sizeof left, "%s.0.tmp", path);
    file = fopen(left, "w");
    fputs("mine", file);
    fclose(file);
    expect(df_safetensors_write(ctx, df_sink_path(path), &t, 1, NULL, 0) == DF_OK);
    file = fopen(left, "r");
    expect(file != NULL && fgets(text, sizeof text, file) != NULL);
    if (file) fclose(file);
    same_text(text, "mine");
    remove(left);
    remove(path);
    expect(files_in_folder() == 0);
    end_ctx(ctx);
}

// A path without a folder, in the current one.
TEST(bare_name) {
    df_ctx *ctx = new_ctx();
    df_save_tensor t = {"w", DF_DTYPE_F32, 0, {0}, NULL, 0};
    char home[1000];
    df_safetensors *f;
    t.data = weights_;
    expect(getcwd(home, sizeof home) != NULL && chdir(folder_) == 0);
    expect(df_safetensors_write(ctx, df_sink_path("bare"), &t, 1, NULL, 0) == DF_OK);
    f = df_safetensors_open(ctx, df_source_path("bare"));
    expect(f != NULL);
    df_safetensors_close(f);
    expect(remove("bare") == 0 && chdir(home) == 0 && files_in_folder() == 0);
    end_ctx(ctx);
}

// ---- memory that runs out -------------------------------------------------------------

TEST(every_allocation_fails) {
    df_ctx *ctx = new_ctx();
    df_save_tensor t[6];
    df_buffer buffer = {NULL, 0, 0}, other = {NULL, 0, 0};
    int n = fill_tensors(t);
    const char *path = in_folder("memory");
    expect(df_safetensors_write(ctx, df_sink_buffer(&buffer), t, n, texts_, 3) == DF_OK);
    expect(df_safetensors_write(ctx, df_sink_path(path), t, n, texts_, 3) == DF_OK);
    for (int what = 0; what < 5; what++) {
        stream s = {NULL, 0, 0, 100, 0};
        int k, done = 0;
        s.data = buffer.data;
        s.size = buffer.size;
        for (k = 1; k < 100 && !done; k++) {
            long live = memory_.live;
            size_t bytes = memory_.bytes;
            df_safetensors *f = NULL;
            df_result r = DF_OK;
            s.at = 0;
            memory_.calls = 0;
            memory_.fail = k;
            if (what == 0)
                f = df_safetensors_open(ctx, df_source_memory(buffer.data, buffer.size));
            if (what == 1) f = df_safetensors_open(ctx, df_source_path(path));
            if (what == 2) f = df_safetensors_open(ctx, df_source_hooks(stream_read, &s));
            if (what == 3)
                r = df_safetensors_write(ctx, df_sink_path(path), t, n, texts_, 3);
            if (what == 4)
                r = df_safetensors_write(ctx, df_sink_buffer(&other), t, n, texts_, 3);
            done = memory_.calls < k;       // the failing call was not reached
            memory_.fail = 0;
            check((what < 3 ? f != NULL : r == DF_OK) == done, "call %d of case %d", k,
                  what);
            if (!done)
                check(df_ctx_error(ctx) == DF_ERR_MEMORY, "%s", df_ctx_message(ctx));
            df_safetensors_close(f);
            df_buffer_free(ctx, &other);
            check(memory_.live == live && memory_.bytes == bytes, "case %d, call %d leaks",
                  what, k);
        }
        check(done && k > 2, "case %d: %d calls", what, k);
    }
    expect(files_in_folder() == 1);
    df_buffer_free(ctx, &buffer);
    remove(path);
    end_ctx(ctx);
}

int main(int argc, char **argv) {
    const char *tmp = getenv("TMPDIR");
    test_begin(argc, argv);
    snprintf(folder_, sizeof folder_, "%s/df_files_XXXXXX", tmp && *tmp ? tmp : "/tmp");
    if (!mkdtemp(folder_)) { perror(folder_); return 1; }
    RUN(round_trips);
    RUN(large);
    RUN(many_tensors);
    RUN(golden_files);
    RUN(half_precision);
    RUN(other_types);
    RUN(nonfinite_weights);
    RUN(malformed_headers);
    RUN(malformed_json);
    RUN(truncation_everywhere);
    RUN(mutation_everywhere);
    RUN(random_mutation);
    RUN(bad_sources);
    RUN(bad_arguments);
    RUN(failures_leave_the_old);
    RUN(killed_while_writing);
    RUN(leftovers);
    RUN(bare_name);
    RUN(every_allocation_fails);
    rmdir(folder_);
    return test_end();
}
