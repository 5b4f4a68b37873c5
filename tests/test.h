// test.h: a small test harness, C99 and C++11. A program in full:
//
//     #include "diffusion.h"
//     #include "test.h"
//     TEST(halves) { expect(1 + 1 == 2); near(0.5 + 0.5, 1.0, 1e-15); }
//     int main(int argc, char **argv) {
//         test_begin(argc, argv);
//         RUN(halves);
//         return test_end();
//     }
//
// Each expect, check, near... counts as one check. Only failures are printed, the first 20
// of a test in full. Arguments are substrings: only tests whose name holds one of them
// run. The last line is "N passed, N failed"; the exit status is non-zero if one failed.
#ifndef DF_TEST_H
#define DF_TEST_H
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEST_SHOWN = 20 };
static struct {
    int argc, runs;
    char **argv;
    const char *name;
    long passed, failed, in_test;
} test_;

#define TEST(name) static void test_##name(void)
#define RUN(name)  test_run(#name, test_##name)

// expect(cond) prints the condition when it fails; check(cond, "sentence %d", ...) that.
#define expect(cond)     test_check(!!(cond), __FILE__, __LINE__, "%s", #cond)
#define check(cond, ...) test_check(!!(cond), __FILE__, __LINE__, __VA_ARGS__)
// |a - b| <= tol * max(1, |b|): absolute below one, relative above; _abs, _rel are plain.
#define near(a, b, tol)     test_near(a, b, tol, 1.0, 1.0, __FILE__, __LINE__, #a)
#define near_abs(a, b, tol) test_near(a, b, tol, 1.0, 0.0, __FILE__, __LINE__, #a)
#define near_rel(a, b, tol) test_near(a, b, tol, 0.0, 1.0, __FILE__, __LINE__, #a)
// A row of numbers, one check: a[i] near b[i] for i < n, with the largest |b| in place of
// |b|. The worst element is reported. a and b are arrays of any real type.
#define near_all(a, b, n, tol) do { double w_ = 0, s_ = 1; long k_ = 0, n_ = (long)(n); \
    for (long i_ = 0; i_ < n_; i_++) { double v_ = fabs((double)(b)[i_]); \
        if (v_ > s_ && v_ < HUGE_VAL) s_ = v_; } \
    for (long i_ = 0; i_ < n_; i_++) { double x_ = (double)(a)[i_], y_ = (double)(b)[i_]; \
        double d_ = x_ == y_ ? 0 : fabs(x_ - y_); \
        if (!(d_ <= w_)) { w_ = d_; k_ = i_; if (d_ != d_) break; } } \
    test_check(w_ <= (tol) * s_, __FILE__, __LINE__, "%s[%ld] = %.17g, want %.17g: off " \
        "by %.3g, scale %.3g, tolerance %.3g", #a, k_, n_ ? (double)(a)[k_] : 0.0, \
        n_ ? (double)(b)[k_] : 0.0, w_, s_, (double)(tol)); } while (0)
// Bit for bit equal, and equal strings.
#define same_bits(a, b, bytes) check(memcmp(a, b, bytes) == 0, "%s and %s differ", #a, #b)
#define same_text(a, b) check(strcmp(a, b) == 0, "%s = \"%s\", want \"%s\"", #a, a, b)

// Sizes: short under sanitizers (macro or variable DF_TEST_SHORT), long in test-long.
static inline int test_short(void) {
#ifdef DF_TEST_SHORT
    return 1;
#else
    return getenv("DF_TEST_SHORT") != NULL;
#endif
}
static inline int test_long(void) {
    return !test_short() && getenv("DF_TEST_LONG") != NULL;
}

#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
static inline int test_check(int ok, const char *file, int line, const char *fmt, ...) {
    if (ok) { test_.passed++; return 1; }
    test_.failed++;
    if (++test_.in_test <= TEST_SHOWN) {
        va_list ap;
        printf("%s:%d: %s: ", file, line, test_.name ? test_.name : "main");
        va_start(ap, fmt);
        vprintf(fmt, ap);
        va_end(ap);
        printf("\n");
    }
    return 0;
}

static inline int test_near(double a, double b, double tol, double abs_part,
                            double rel_part, const char *file, int line,
                            const char *what) {
    double bound = tol * fmax(abs_part, rel_part * fabs(b));
    return test_check(a == b || fabs(a - b) <= bound, file, line,
                      "%s = %.17g, want %.17g: off by %.3g, allowed %.3g",
                      what, a, b, fabs(a - b), bound);
}

static inline void test_run(const char *name, void (*body)(void)) {
    int wanted = test_.argc < 2;
    for (int i = 1; i < test_.argc; i++) wanted |= strstr(name, test_.argv[i]) != NULL;
    if (!wanted) return;
    test_.runs++;
    test_.name = name;
    test_.in_test = 0;
    body();
    if (test_.in_test > TEST_SHOWN)
        printf("%s: %ld more failures\n", name, test_.in_test - TEST_SHOWN);
    test_.name = NULL;
    fflush(stdout);
}

static inline void test_begin(int argc, char **argv) {
    test_.argc = argc;
    test_.argv = argv;
}

static inline int test_end(void) {
    if (test_.runs == 0 && test_.argc < 2) check(0, "no tests");
    printf("%ld passed, %ld failed\n", test_.passed, test_.failed);
    return test_.failed != 0;
}
#endif
