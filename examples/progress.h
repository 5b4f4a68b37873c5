// progress.h: a bar on stderr: part done, a figure (the loss), time left. On a terminal
// it is redrawn in place; elsewhere each tenth writes a line. draw.h includes it.
//
//     progress_bar bar = progress_begin("training");
//     for (long i = 1; i <= steps; i++) { ...; progress(&bar, i, steps, "loss", loss); }
#ifndef PROGRESS_H
#define PROGRESS_H
#include <math.h>
#include <stdio.h>
#include <time.h>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/time.h>
#include <unistd.h>
#define PROGRESS_POSIX 1
#else
#define PROGRESS_POSIX 0
#endif

typedef struct progress_bar {
    const char *what;
    double start, shown;     // seconds
    int tenth;               // the last tenth that was written
    long from;               // what was done before the start: a run taken up again
    double per_step;         // > 0: how many `unit`s a step is: their rate is shown
    const char *unit;
} progress_bar;

static inline double progress_seconds(void) {
#if PROGRESS_POSIX
    struct timeval now;
    gettimeofday(&now, NULL);
    return (double)now.tv_sec + 1e-6 * (double)now.tv_usec;
#else
    return (double)time(NULL);
#endif
}

static inline progress_bar progress_begin(const char *what) {
    progress_bar p;
    p.what = what;
    p.start = progress_seconds();
    p.shown = 0;
    p.tenth = 0;
    p.from = 0;
    p.per_step = 0;
    p.unit = "";
    return p;
}

// Units (images) a second since the start.
static inline double progress_rate(const progress_bar *p, long done) {
    double spent = progress_seconds() - p->start;
    return spent > 0 ? (double)(done - p->from) * p->per_step / spent : 0;
}

// done of total; figure, named `name`, may be NAN: then it is left out.
static inline void progress(progress_bar *p, long done, long total, const char *name,
                            double figure) {
    const int width = 30;
    double part = total > 0 ? fmax(0, fmin(1, (double)done / (double)total)) : 1;
    double now = progress_seconds(), spent = now - p->start;
    double left = done > p->from ? spent / (double)(done - p->from) * (double)(total - done)
                                 : 0;
    int terminal = 0, last = done >= total;
#if PROGRESS_POSIX
    terminal = isatty(2);
#endif
    char bar[32], text[64] = "", rate[48] = "", when[48];
    if (terminal ? !last && now - p->shown < 0.1 : (int)(10 * part) <= p->tenth) return;
    p->shown = now;
    p->tenth = (int)(10 * part);
    for (int i = 0; i < width; i++) bar[i] = i < (int)(part * width) ? '=' : ' ';
    if (!last && (int)(part * width) < width) bar[(int)(part * width)] = '>';
    bar[width] = 0;
    if (figure == figure) snprintf(text, sizeof text, "  %.20s %.4g", name, figure);
    if (p->per_step > 0)
        snprintf(rate, sizeof rate, "  %.3g %.20s/s", progress_rate(p, done), p->unit);
    snprintf(when, sizeof when, last ? "%.1f s" : "%.0f s left", last ? spent : left);
    fprintf(stderr, "%s  %-12s [%s] %3d %%%s%s  %s%s", terminal ? "\r" : "", p->what, bar,
            (int)(100 * part), text, rate, when, terminal ? "\033[K" : "\n");
    if (terminal && last) fprintf(stderr, "\n");
    fflush(stderr);
}

#ifdef DIFFUSION_H
// A trainer's on_step, whose user is a bar.
static inline int progress_on_step(void *bar, const df_train_info *info) {
    progress((progress_bar *)bar, (long)info->step, (long)info->steps, "loss", info->loss);
    return 0;
}
#endif
#endif
