// draw.h: pictures for the examples. Include it after diffusion.h.
//
//     draw_canvas c;
//     if (draw_open(&c, 900, 460) != 0) return 1;
//     double range[4] = {-3, 3, -3, 3};                        // x from, to; y from, to
//     draw_panel p = draw_frame(&c, 10, 10, 430, 440, "data", range, 5);
//     draw_scatter(&p, points, n, 2, 2.0, draw_palette(0), 0.6);
//     draw_save(&c, "points.png");                             // says what it wrote
//     draw_close(&c);
//
// Coordinates are pixels from the upper left corner, fractions welcome; colours 0xRRGGBB;
// alpha 0 (invisible) to 1. Inside a panel coordinates are the data's, y upwards, and what
// lies outside is cut off. Every shape is first drawn as coverage (how much of each pixel
// it covers), then inked once: edges are smooth, and a translucent line does not darken
// where it crosses itself. PNG files are written by stb_image_write.h; without it
// (-DDRAW_NO_STB) everything runs and draw_save says that there is no picture.
#ifndef DRAW_H
#define DRAW_H
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "progress.h"
#if PROGRESS_POSIX
#include <sys/stat.h>
#endif

#if !defined(DRAW_NO_STB) && defined(__has_include)
#if !__has_include("stb_image_write.h")
#define DRAW_NO_STB
#endif
#endif
#ifndef DRAW_NO_STB
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC
#include "stb_image_write.h"
#endif

#ifdef DIFFUSION_H
typedef df_real draw_real;
#else
typedef float draw_real;
#endif

enum {
    DRAW_PAPER = 0xFFFFFF, DRAW_INK = 0x1F2933, DRAW_TEXT = 0x616E7C, DRAW_AXIS = 0xBCC4CE,
    DRAW_GRID = 0xEDF0F4
};

// ---- canvas ---------------------------------------------------------------------------

typedef struct draw_canvas {
    int width, height;
    float *rgb;              // [height, width, 3] in [0, 1]
    float *cover;            // [height, width] coverage of the shape being drawn, else 0
    int x0, y0, x1, y1;      // shapes are cut off outside this rectangle
    int ink[4];              // the rectangle that the current shape has touched
    double text;             // height of a capital letter
} draw_canvas;

static inline double draw_clamp(double x, double lo, double hi) {
    return x < lo ? lo : x > hi ? hi : x;
}
static inline float draw_channel(unsigned colour, int k) {
    return (float)((colour >> (16 - 8 * k)) & 255) / 255.0f;
}
static inline void draw_clip(draw_canvas *c, double x0, double y0, double x1, double y1) {
    c->x0 = (int)draw_clamp(floor(x0 + 0.5), 0, c->width);
    c->y0 = (int)draw_clamp(floor(y0 + 0.5), 0, c->height);
    c->x1 = (int)draw_clamp(floor(x1 + 0.5), 0, c->width);
    c->y1 = (int)draw_clamp(floor(y1 + 0.5), 0, c->height);
}
static inline void draw_unclip(draw_canvas *c) { draw_clip(c, 0, 0, c->width, c->height); }
static inline void draw_no_ink(draw_canvas *c) {
    c->ink[0] = c->width, c->ink[1] = c->height;
    c->ink[2] = c->ink[3] = 0;
}

static inline void draw_clear(draw_canvas *c, unsigned colour) {
    for (size_t i = 0; i < (size_t)c->width * (size_t)c->height * 3; i++)
        c->rgb[i] = draw_channel(colour, (int)(i % 3));
}
static inline void draw_close(draw_canvas *c) {
    free(c->rgb), free(c->cover);
    c->rgb = c->cover = NULL;
}

// A white canvas. 0, or -1 and a sentence on stderr if there is no memory for it.
static inline int draw_open(draw_canvas *c, int width, int height) {
    memset(c, 0, sizeof *c);
    if (width < 1 || height < 1 || width > 30000 || height > 30000) {
        fprintf(stderr, "draw_open: %d x %d pixels; 1 to 30000 each way\n", width, height);
        return -1;
    }
    c->width = width, c->height = height, c->text = 9;
    c->rgb = (float *)malloc((size_t)width * (size_t)height * 3 * sizeof(float));
    c->cover = (float *)calloc((size_t)width * (size_t)height, sizeof(float));
    if (c->rgb == NULL || c->cover == NULL) {
        fprintf(stderr, "draw_open: no memory for %d x %d pixels\n", width, height);
        draw_close(c);
        return -1;
    }
    draw_unclip(c), draw_no_ink(c), draw_clear(c, DRAW_PAPER);
    return 0;
}

static inline void draw_pixel(draw_canvas *c, int x, int y, unsigned colour, double a) {
    if (x < c->x0 || x >= c->x1 || y < c->y0 || y >= c->y1) return;
    float *p = c->rgb + ((size_t)y * (size_t)c->width + (size_t)x) * 3;
    for (int k = 0; k < 3; k++) p[k] += (draw_channel(colour, k) - p[k]) * (float)a;
}

// ---- shapes ---------------------------------------------------------------------------

// Adds a stroke with round ends to the current shape. A pixel is covered as far as its
// centre lies inside the edge: r + 1/2 - distance, in [0, 1]; thin strokes are fainter.
static inline void draw_stroke(draw_canvas *c, double x0, double y0, double x1, double y1,
                               double r) {
    if (!(fabs(x0) < 1e6 && fabs(y0) < 1e6 && fabs(x1) < 1e6 && fabs(y1) < 1e6)) return;
    double dx = x1 - x0, dy = y1 - y0, length2 = dx * dx + dy * dy, faint = fmin(1, 2 * r);
    int left = (int)draw_clamp(fmin(x0, x1) - r - 1, c->x0, c->x1);
    int right = (int)draw_clamp(fmax(x0, x1) + r + 2, c->x0, c->x1);
    int top = (int)draw_clamp(fmin(y0, y1) - r - 1, c->y0, c->y1);
    int bottom = (int)draw_clamp(fmax(y0, y1) + r + 2, c->y0, c->y1);
    for (int y = top; y < bottom; y++) {
        for (int x = left; x < right; x++) {
            double px = x + 0.5 - x0, py = y + 0.5 - y0;
            double u = length2 > 0 ? (px * dx + py * dy) / length2 : 0;
            u = draw_clamp(u, 0, 1);
            double ex = px - u * dx, ey = py - u * dy;
            double inside = r + 0.5 - sqrt(ex * ex + ey * ey);
            float *cover = c->cover + (size_t)y * (size_t)c->width + (size_t)x;
            if (inside > 0) *cover = fmaxf(*cover, (float)(fmin(1, inside) * faint));
        }
    }
    if (left < c->ink[0]) c->ink[0] = left;
    if (top < c->ink[1]) c->ink[1] = top;
    if (right > c->ink[2]) c->ink[2] = right;
    if (bottom > c->ink[3]) c->ink[3] = bottom;
}

// Ends the current shape: inks it and forgets it.
static inline void draw_ink(draw_canvas *c, unsigned colour, double alpha) {
    for (int y = c->ink[1]; y < c->ink[3]; y++) {
        for (int x = c->ink[0]; x < c->ink[2]; x++) {
            float *cover = c->cover + (size_t)y * (size_t)c->width + (size_t)x;
            if (*cover > 0) draw_pixel(c, x, y, colour, alpha * (double)*cover);
            *cover = 0;
        }
    }
    draw_no_ink(c);
}

static inline void draw_disc(draw_canvas *c, double x, double y, double r, unsigned colour,
                             double alpha) {
    draw_stroke(c, x, y, x, y, r), draw_ink(c, colour, alpha);
}
static inline void draw_line(draw_canvas *c, double x0, double y0, double x1, double y1,
                             double width, unsigned colour, double alpha) {
    draw_stroke(c, x0, y0, x1, y1, width / 2), draw_ink(c, colour, alpha);
}
static inline void draw_rect(draw_canvas *c, double x, double y, double w, double h,
                             unsigned colour, double alpha) {
    for (int j = (int)floor(y + 0.5); j < (int)floor(y + h + 0.5); j++)
        for (int i = (int)floor(x + 0.5); i < (int)floor(x + w + 0.5); i++)
            draw_pixel(c, i, j, colour, alpha);
}
// A frame one pixel wide just outside the rectangle.
static inline void draw_box(draw_canvas *c, double x, double y, double w, double h,
                            unsigned colour) {
    for (int far_side = 0; far_side < 2; far_side++) {
        draw_rect(c, x - 1, far_side ? y + h : y - 1, w + 2, 1, colour, 1);
        draw_rect(c, far_side ? x + w : x - 1, y, 1, h, colour, 1);
    }
}

// ---- colours --------------------------------------------------------------------------

static inline unsigned draw_mix(unsigned a, unsigned b, double u) {
    unsigned out = 0;
    for (int k = 0; k < 3; k++) {
        double v = (1 - u) * (double)draw_channel(a, k) + u * (double)draw_channel(b, k);
        out = out << 8 | (unsigned)(v * 255 + 0.5);
    }
    return out;
}
// Categories, and a map from [0, 1] that is even to the eye (viridis at ninths).
static inline unsigned draw_palette(int i) {
    static const unsigned colours[8] = {0x3B6FB6, 0xE07B39, 0x4C9F70, 0xC8504B,
                                        0x8665A9, 0x2A9DA5, 0xC9A227, 0x7A8691};
    return colours[(unsigned)i % 8];
}
static inline unsigned draw_map(double u) {
    static const unsigned knots[10] = {0x440154, 0x482878, 0x3E4989, 0x31688E, 0x26828E,
                                       0x1F9E89, 0x35B779, 0x6DCD59, 0xB4DE2C, 0xFDE725};
    if (!(u >= 0)) u = 0;
    double at = fmin(u, 1) * 9;
    int i = (int)fmin(at, 8);
    return draw_mix(knots[i], knots[i + 1], at - i);
}

// ---- text -----------------------------------------------------------------------------

// The letters ' ' to '~' as pen strokes: pairs of digits x, y; a blank lifts the pen.
// Capitals stand between y = 0 and 6, small letters between 2 and 6, tails reach 8.
static inline const char *draw_glyph(int letter) {
    static const char *const glyphs[95] = {
        "", "2024 26", "1012 3032", "1016 3036 0242 0444",
        "413010010213334445361605 2026", "0020220200 6006 4464664644",
        "460201102031320405162644", "2022", "302112142536", "102132342516",
        "2125 0244 4204", "2125 0343", "2617", "0343", "26", "4006", "103041453616050110",
        "112026 1636", "01103041420646", "004022324345361605", "36300444",
        "400002324345361605", "30200205163645443303", "004016",
        "13020110304142331304051636454433", "16264441301001021343", "22 25", "22 2516",
        "410345", "0242 0444", "014305", "01103041422324 26",
        "3222132434 32344441301001051646", "062046 1434", "00063645443303 0030414233",
        "4130100105163645", "00062644422000", "40000646 0333", "400006 0333",
        "41301001051636454323", "0006 4046 0343", "1030 2026 1636", "4045361605",
        "0006 400346", "000646", "0600244046", "06004640", "103041453616050110",
        "06003041423303", "103041453616050110 2446", "06003041423303 2346",
        "413010010213334445361605", "0040 2026", "000516364540", "002640", "0016325660",
        "0046 4006", "002340 2326", "00400646", "30101636", "0046", "10303616", "022042",
        "0747", "1021", "4246 4332120305163645", "0006 0312324345361605",
        "4332120305163645", "4046 4332120305163645", "044443321203051636",
        "40302126 1242", "4332120305163645 4247381807", "0006 0312324346", "20 2226",
        "20 22271808", "0006 320436", "2026", "0206 0312223336 3342526366",
        "0206 0312324346", "123243453616050312", "0208 0312324345361605",
        "4248 4332120305163645", "0206 031232", "4212031434453606", "10152636 0232",
        "0205163645 4246", "022642", "0216335662", "0246 4206", "0226 421808", "02420646",
        "30212213242536", "2027", "10212233242516", "04133443"};
    return letter > ' ' && letter <= '~' ? glyphs[letter - ' '] : "";
}

// Draws one letter, upper left corner at (x, y), unit u, pen radius r; gives its advance
// in units. c = NULL measures only.
static inline double draw_letter(draw_canvas *c, int letter, double x, double y, double u,
                                 double r) {
    const char *g = draw_glyph(letter);
    int left = 9, right = 0;
    for (const char *s = g; *s; s += *s == ' ' ? 1 : 2) {
        if (*s == ' ') continue;
        left = *s - '0' < left ? *s - '0' : left;
        right = *s - '0' > right ? *s - '0' : right;
    }
    if (*g == 0) return 3;
    for (const char *s = g, *from = NULL; c != NULL && *s; s += *s == ' ' ? 1 : 2) {
        if (*s == ' ') { from = NULL; continue; }
        if (from == NULL) from = s;
        draw_stroke(c, x + (from[0] - '0' - left) * u, y + (from[1] - '0') * u,
                    x + (s[0] - '0' - left) * u, y + (s[1] - '0') * u, r);
        from = s;
    }
    return right - left + 2;
}

static inline double draw_text_width(const char *text, double size) {
    double units = *text ? -2 : 0;
    for (; *text; text++) units += draw_letter(NULL, (unsigned char)*text, 0, 0, 0, 0);
    return units * size / 6;
}

// Text whose capitals are `size` high and centred on y. align: 0 begins at x, .5 centred
// on it, 1 ends there. weight: 1 normal, 1.5 bold.
static inline void draw_text(draw_canvas *c, double x, double y, const char *text,
                             double size, double align, double weight, unsigned colour) {
    double u = size / 6;
    x -= align * draw_text_width(text, size);
    for (; *text; text++)
        x += u * draw_letter(c, (unsigned char)*text, x, y - size / 2, u,
                             weight * (0.18 + 0.05 * size));
    draw_ink(c, colour, 1);
}

// ---- panels ---------------------------------------------------------------------------

typedef struct draw_panel {
    draw_canvas *c;
    double x, y, w, h;       // the field inside the frame, in pixels
    double range[4];         // what it shows: x from, to; y from, to
    int log[2];              // 1: the axis is logarithmic
} draw_panel;

// Where v stands between the ends of an axis: 0 .. 1.
static inline double draw_place(const draw_panel *p, int axis, double v) {
    double lo = p->range[2 * axis], hi = p->range[2 * axis + 1];
    if (!p->log[axis]) return (v - lo) / (hi - lo);
    return v > 0 ? log(v / lo) / log(hi / lo) : -1e9;
}
static inline double draw_px(const draw_panel *p, double x) {
    return p->x + p->w * draw_place(p, 0, x);
}
static inline double draw_py(const draw_panel *p, double y) {
    return p->y + p->h * (1 - draw_place(p, 1, y));
}

// 1, 2 or 5 times a power of ten: about `count` of these steps make the length.
static inline double draw_tick_step(double length, int count) {
    double raw = length / count, ten = pow(10, floor(log10(raw))), m = raw / ten;
    return ten * (m < 1.5 ? 1 : m < 3.5 ? 2 : m < 7.5 ? 5 : 10);
}

// Does a logarithmic axis show powers of ten alone? Else 1, 2, 5 times them.
static inline int draw_decades(const draw_panel *p, int axis) {
    return p->log[axis] && p->range[2 * axis + 1] > 300 * p->range[2 * axis];
}

// Where an axis has its ticks: out [100], about `count` of them (1 2 5: as many as there
// are). Returns their number.
static inline int draw_ticks(const draw_panel *p, int axis, int count, double *out) {
    double lo = p->range[2 * axis], hi = p->range[2 * axis + 1], step = 1, first;
    int n = 0;
    if (!p->log[axis]) {
        step = draw_tick_step(hi - lo, count);
        first = ceil(lo / step - 1e-9);
        for (; (first + n) * step <= hi + 1e-9 * step && n < 100; n++)
            out[n] = fabs(first + n) < 0.5 ? 0.0 : (first + n) * step;
        return n;
    }
    if (draw_decades(p, axis)) step = fmax(1, draw_tick_step(log10(hi / lo), count));
    for (double e = floor(log10(lo) / step) * step; n < 98; e += step)
        for (int k = 0; k < 3; k++) {
            double v = pow(10, e) * (k == 0 ? 1 : k == 1 ? 2 : 5);
            if (v > hi * (1 + 1e-9)) return n;
            if (v >= lo * (1 - 1e-9) && (k == 0 || !draw_decades(p, axis))) out[n++] = v;
        }
    return n;
}

// A tick's number at (x, y), aligned as draw_text does; powers of ten with a raised
// exponent. Returns its width, and with draw = 0 does only that.
static inline double draw_number(draw_canvas *c, double x, double y, double v, int power,
                                 double align, int draw) {
    char text[32], raised[16] = "";
    int e = power ? (int)floor(log10(v) + 0.5) : 0;
    double size = c->text, wide, all;
    if (e != 0) snprintf(raised, sizeof raised, "%d", e);
    snprintf(text, sizeof text, "%.6g", e != 0 ? 10.0 : v);
    wide = draw_text_width(text, size);
    all = wide + (e != 0 ? 2 + draw_text_width(raised, 0.75 * size) : 0);
    if (!draw) return all;
    draw_text(c, x - align * all, y, text, size, 0, 1, DRAW_TEXT);
    draw_text(c, x - align * all + wide + 2, y - 0.5 * size, raised, 0.75 * size, 0, 1,
              DRAW_TEXT);
    return all;
}

// Grid lines, ticks and labels of one axis: 0 is x, 1 is y. Gives the widest label's
// width, and with draw = 0 does only that.
static inline double draw_axis(const draw_panel *p, int axis, int ticks, int draw) {
    double tick[100], widest = 0, size = p->c->text;
    int count = draw_ticks(p, axis, ticks, tick), power = draw_decades(p, axis);
    for (int i = 0; i < count; i++) {
        widest = fmax(widest, draw_number(p->c, 0, 0, tick[i], power, 0, 0));
        if (!draw) continue;
        if (axis == 0) {
            double x = floor(draw_px(p, tick[i])), below = p->y + p->h + 8 + size / 2;
            int inner = x > p->x && x < p->x + p->w;
            draw_rect(p->c, x, p->y, 1, p->h * inner, DRAW_GRID, 1);
            draw_rect(p->c, x, p->y + p->h + 1, 1, 4, DRAW_AXIS, 1);
            draw_number(p->c, x + 0.5, below, tick[i], power, 0.5, 1);
        } else {
            double y = floor(draw_py(p, tick[i]));
            int inner = y > p->y && y < p->y + p->h;
            draw_rect(p->c, p->x, y, p->w * inner, 1, DRAW_GRID, 1);
            draw_rect(p->c, p->x - 5, y, 4, 1, DRAW_AXIS, 1);
            draw_number(p->c, p->x - 9, y + 0.5, tick[i], power, 1, 1);
        }
    }
    return widest;
}

// A panel in the rectangle (x, y, w, h): title above (or NULL), frame, about `ticks` ticks
// on each axis (0: none) with grid lines. log_x, log_y: 1 for a logarithmic axis, whose
// range is above 0.
static inline draw_panel draw_frame_log(draw_canvas *c, double x, double y, double w,
                                        double h, const char *title,
                                        const double range[4], int ticks, int log_x,
                                        int log_y) {
    draw_panel p = {c, 0, 0, 0, 0, {range[0], range[1], range[2], range[3]},
                    {log_x, log_y}};
    for (int i = 0; i < 4; i += 2)  // an empty range, or no number, becomes one wide
        if (p.log[i / 2] && !(p.range[i] > 0 && p.range[i + 1] > p.range[i]))
            p.range[i] = 1, p.range[i + 1] = 10;
        else if (!(p.range[i + 1] > p.range[i] && p.range[i + 1] - p.range[i] < 1e300)) {
            p.range[i] = fabs(p.range[i]) < 1e9 ? p.range[i] - 0.5 : -0.5;
            p.range[i + 1] = p.range[i] + 1;
        }
    double left = ticks ? draw_axis(&p, 1, ticks, 0) + 12 : 1;
    double below = ticks ? c->text + 14 : 1, right = ticks ? 1.5 * c->text : 1;
    double above = title ? 3 * c->text : ticks ? c->text / 2 + 1 : 1;
    p.x = floor(x + left), p.w = floor(fmax(w - left - right, 8));
    p.y = floor(y + above), p.h = floor(fmax(h - above - below, 8));
    for (int axis = 0; axis < 2 && ticks > 0; axis++) draw_axis(&p, axis, ticks, 1);
    draw_box(c, p.x, p.y, p.w, p.h, DRAW_AXIS);
    if (title)
        draw_text(c, p.x, p.y - 1.5 * c->text, title, 1.15 * c->text, 0, 1.4, DRAW_INK);
    return p;
}
static inline draw_panel draw_frame(draw_canvas *c, double x, double y, double w, double h,
                                    const char *title, const double range[4], int ticks) {
    return draw_frame_log(c, x, y, w, h, title, range, ticks, 0, 0);
}

// Names of the axes, inside the frame: y's below its upper end, x's above its right end.
static inline void draw_axes(const draw_panel *p, const char *x, const char *y) {
    double size = p->c->text;
    for (int axis = 0; axis < 2; axis++) {
        const char *name = axis ? y : x;
        double wide = draw_text_width(name, size);
        double left = axis ? p->x + size : p->x + p->w - wide - size;
        double middle = axis ? p->y + 1.5 * size : p->y + p->h - 1.5 * size;
        draw_rect(p->c, left - 3, middle - size, wide + 6, 2 * size, DRAW_PAPER, 0.8);
        draw_text(p->c, left, middle, name, size, 0, 1, DRAW_TEXT);
    }
}

static inline void draw_inside(const draw_panel *p) {
    draw_clip(p->c, p->x, p->y, p->x + p->w, p->y + p->h);
}

// Points [n, stride]: columns 0 and 1 are x and y.
static inline void draw_scatter(const draw_panel *p, const draw_real *xy, int n,
                                int stride, double r, unsigned colour, double alpha) {
    draw_inside(p);
    for (; n-- > 0; xy += stride) {
        double x = draw_px(p, (double)xy[0]), y = draw_py(p, (double)xy[1]);
        draw_disc(p->c, x, y, r, colour, alpha);
    }
    draw_unclip(p->c);
}

// One line through n points [n, stride], a trajectory or a curve.
static inline void draw_polyline(const draw_panel *p, const draw_real *xy, int n,
                                 int stride, double width, unsigned colour, double alpha) {
    draw_inside(p);
    for (const draw_real *to = xy + stride; n-- > 1; xy = to, to += stride)
        draw_stroke(p->c, draw_px(p, (double)xy[0]), draw_py(p, (double)xy[1]),
                    draw_px(p, (double)to[0]), draw_py(p, (double)to[1]), width / 2);
    draw_ink(p->c, colour, alpha);
    draw_unclip(p->c);
}

// Values [ny, nx] over the whole panel, row 0 at the bottom, lo to hi through the colour
// map; between the middles of cells they are interpolated.
static inline void draw_heat(const draw_panel *p, const draw_real *v, int nx, int ny,
                             double lo, double hi) {
    double scale = hi > lo ? 1 / (hi - lo) : 0;
    for (int j = 0; j < (int)p->h; j++) {
        for (int i = 0; i < (int)p->w; i++) {
            double u = draw_clamp((i + 0.5) / p->w * nx - 0.5, 0, nx - 1);
            double w = draw_clamp((p->h - j - 0.5) / p->h * ny - 0.5, 0, ny - 1);
            int a = (int)u, b = (int)w, a1 = a + (a + 1 < nx), b1 = b + (b + 1 < ny);
            double v00 = (double)v[b * nx + a], v10 = (double)v[b * nx + a1];
            double v01 = (double)v[b1 * nx + a], v11 = (double)v[b1 * nx + a1];
            double low = v00 + (u - a) * (v10 - v00), up = v01 + (u - a) * (v11 - v01);
            unsigned colour = draw_map((low + (w - b) * (up - low) - lo) * scale);
            draw_pixel(p->c, (int)p->x + i, (int)p->y + j, colour, 1);
        }
    }
}

// Names with a dot of their colour, in the panel's upper right corner.
static inline void draw_legend(const draw_panel *p, int count, const char *const *names,
                               const unsigned *colours) {
    double size = p->c->text, line = 2 * size, wide = 0;
    for (int i = 0; i < count; i++) wide = fmax(wide, draw_text_width(names[i], size));
    double w = wide + 4 * size, h = count * line + size;
    double x = p->x + p->w - w - 8, y = p->y + 8;
    draw_rect(p->c, x, y, w, h, DRAW_PAPER, 0.88);
    draw_box(p->c, x + 1, y + 1, w - 2, h - 2, DRAW_GRID);
    for (int i = 0; i < count; i++) {
        double middle = y + size / 2 + (i + 0.5) * line;
        draw_disc(p->c, x + 1.5 * size, middle, 0.45 * size, colours[i], 1);
        draw_text(p->c, x + 3 * size, middle, names[i], size, 0, 1, DRAW_TEXT);
    }
}

// Names right of the panel, each led to by a thin line from its curve's end (x, y), spread
// so that none covers another. At most 64.
static inline void draw_labels(const draw_panel *p, int count, const char *const *names,
                               const double *x, const double *y, const unsigned *colours) {
    int order[64];
    double at[64], size = p->c->text, line = 1.75 * size, edge = p->x + p->w;
    count = count < 64 ? count : 64;
    for (int i = 0, j; i < count; i++) {        // from the top down
        for (j = i; j > 0 && y[order[j - 1]] < y[i]; j--) order[j] = order[j - 1];
        order[j] = i;
    }
    for (int i = 0; i < count; i++) {
        at[i] = draw_clamp(draw_py(p, y[order[i]]), p->y, p->y + p->h);
        if (i > 0) at[i] = fmax(at[i], at[i - 1] + line);
    }
    for (int i = count - 1; i >= 0; i--)        // the last ones back into the panel
        at[i] = fmin(at[i], i + 1 < count ? at[i + 1] - line : p->y + p->h);
    for (int i = 0; i < count; i++) {
        int k = order[i];
        double from = draw_clamp(draw_py(p, y[k]), p->y, p->y + p->h);
        draw_line(p->c, fmin(draw_px(p, x[k]), edge), from, edge + 4, from, 1, colours[k],
                  0.35);
        draw_line(p->c, edge + 4, from, edge + 16, at[i], 1, colours[k], 0.8);
        draw_text(p->c, edge + 20, at[i], names[k], size, 0, 1.25, colours[k]);
    }
}

// A colour of its own for each of 24 curves: the palette, then darker, then lighter.
static inline unsigned draw_curve_colour(int i) {
    int turn = i / 8 % 3;
    return draw_mix(draw_palette(i), turn == 1 ? DRAW_INK : DRAW_PAPER, turn ? 0.5 : 0);
}

// A panel of named curves, each [points, 2], with dots at their points; the names stand
// right of it, `room` wide. Both axes logarithmic, `range` as they show. Below the curves
// lines that fall as x^-1 .. x^-guides, from the upper left corner on.
static inline draw_panel draw_curves(draw_canvas *c, double x, double y, double w,
                                     double h, double room, const char *title,
                                     const double range[4], int guides, int count,
                                     int points, const char *const *names,
                                     const draw_real *const *curves) {
    double end_x[24], end_y[24];
    unsigned colours[24];
    draw_panel p = draw_frame_log(c, x, y, w - room, h, title, range, 6, 1, 1);
    for (int k = 1; k <= guides; k++) {
        draw_real line[4];
        line[0] = (draw_real)range[0], line[1] = (draw_real)range[3];
        line[2] = (draw_real)range[1];
        line[3] = (draw_real)(range[3] * pow(range[0] / range[1], k));
        draw_polyline(&p, line, 2, 2, 1, DRAW_AXIS, 0.7);
    }
    count = count < 24 ? count : 24;
    for (int i = 0; i < count; i++) {
        const draw_real *end = curves[i] + 2 * (points - 1);
        colours[i] = draw_curve_colour(i);
        end_x[i] = (double)end[0], end_y[i] = (double)end[1];
        draw_polyline(&p, curves[i], points, 2, 1.6, colours[i], 0.9);
        draw_scatter(&p, curves[i], points, 2, 2.2, colours[i], 1);
    }
    draw_labels(&p, count, names, end_x, end_y, colours);
    return p;
}

// The range of points [n, stride] with a margin of 6 %; equal: both axes of one length.
static inline void draw_range(const draw_real *xy, int n, int stride, int equal,
                              double range[4]) {
    for (int axis = 0; axis < 2; axis++) {
        double lo = INFINITY, hi = -INFINITY;
        for (int i = 0; i < n; i++) {
            double v = (double)xy[(size_t)i * (size_t)stride + (size_t)axis];
            lo = v < lo ? v : lo, hi = v > hi ? v : hi;
        }
        double margin = hi > lo ? 0.06 * (hi - lo) : 0.5;
        range[2 * axis] = lo - margin;
        range[2 * axis + 1] = hi + margin;
    }
    double wide = fmax(range[1] - range[0], range[3] - range[2]);
    for (int i = 0; i < 4 && equal; i += 2) {
        double add = (wide - range[i + 1] + range[i]) / 2;
        range[i] -= add, range[i + 1] += add;
    }
}

// ---- images ---------------------------------------------------------------------------

// A sheet of images [count, channels, h, w], lo black and hi white, 1 channel (grey) or 3
// (RGB), `columns` to a row, each pixel a square of `scale` pixels, on a grey mat that
// shows in the gaps and around them. (x, y): upper left corner of the first image.
static inline void draw_images(draw_canvas *c, double x, double y, const draw_real *pixels,
                               int count, int channels, int h, int w, int columns,
                               int scale, int gap, double lo, double hi) {
    size_t plane = (size_t)h * (size_t)w;
    int across = w * scale + gap, down = h * scale + gap, rows = (count - 1) / columns + 1;
    draw_rect(c, x - gap, y - gap, fmin(count, columns) * across + gap, rows * down + gap,
              DRAW_AXIS, 1);
    for (int k = 0; k < count; k++) {
        const draw_real *image = pixels + (size_t)k * (size_t)channels * plane;
        double x0 = x + k % columns * across, y0 = y + k / columns * down;
        for (int i = 0; i < h * w; i++) {
            unsigned colour = 0;
            for (int rgb = 0; rgb < 3; rgb++) {
                size_t skip = channels == 3 ? (size_t)rgb * plane : 0;
                double v = ((double)image[skip + (size_t)i] - lo) / (hi - lo);
                colour = colour << 8 | (unsigned)((v > 0 ? fmin(v, 1) : 0) * 255 + 0.5);
            }
            draw_rect(c, x0 + i % w * scale, y0 + i / w * scale, scale, scale, colour, 1);
        }
    }
}

// ---- PNG ------------------------------------------------------------------------------

#ifndef DRAW_NO_STB
static inline void draw_write(void *file, void *data, int size) {
    fwrite(data, 1, (size_t)size, (FILE *)file);  // errors show in ferror
}
static inline int draw_png(const draw_canvas *c, FILE *f) {
    size_t n = (size_t)c->width * (size_t)c->height * 3;
    unsigned char *bytes = (unsigned char *)malloc(n);
    for (size_t i = 0; bytes != NULL && i < n; i++)
        bytes[i] = (unsigned char)(draw_clamp((double)c->rgb[i], 0, 1) * 255 + 0.5);
    int w = c->width, h = c->height;
    int ok = bytes && stbi_write_png_to_func(draw_write, f, w, h, 3, bytes, 0);
    free(bytes);
    return ok ? 0 : -1;
}
#endif

// Writes the picture and says so on stdout. 0, or -1 and a sentence on stderr; without stb
// it says that there is no picture and returns 0. A failure leaves no partial file.
static inline int draw_save(const draw_canvas *c, const char *path) {
#ifdef DRAW_NO_STB
    (void)c;
    printf("no picture %s: built without stb_image_write.h\n", path);
    return 0;
#else
    FILE *f = fopen(path, "wb");
    if (f == NULL) {
        fprintf(stderr, "%s: cannot be written: %s\n", path, strerror(errno));
        return -1;
    }
    int bad = draw_png(c, f) != 0 || ferror(f) != 0;
    bad |= fclose(f) != 0;
    if (bad) {
        fprintf(stderr, "%s: writing failed: %s\n", path, strerror(errno));
#ifdef S_ISREG
        struct stat s;
        if (stat(path, &s) == 0 && S_ISREG(s.st_mode)) remove(path);  // a device stays
#endif
        return -1;
    }
    printf("wrote %s\n", path);
    return 0;
#endif
}
#endif
