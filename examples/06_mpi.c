// 06_mpi: one training run on several machines.
//
//   You learn    that machines need to agree on nothing but gradients: each takes its share of
//                every batch (part, parts), a hook averages the gradients (on_gradients), and
//                all take the same step. An order of summation is all that changes.
//   It takes     a few seconds.
//   Out comes    how far the weights are from those of one process that took the whole batch,
//                and from process to process. Exits 1 if that is more than rounding.
//
//   mpirun -n 2 build/06_mpi [--steps N] [--batch N] [--n POINTS] [--seed N] [--threads N]
//   Built where mpicc is found: Debian's libopenmpi-dev and openmpi-bin. On several machines
//   mpirun --host a,b; as root, and on fewer cores than processes:
//   mpirun --allow-run-as-root --oversubscribe -n 2 build/06_mpi
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
#include <mpi.h>
#include "data.h"
#include "options.h"
#include "progress.h"

#ifdef DIFFUSION_DOUBLE
#define MPI_REAL_TYPE MPI_DOUBLE
#else
#define MPI_REAL_TYPE MPI_FLOAT
#endif

static progress_bar bar;

// The mean of all processes' gradients: each batch's loss is a mean over its rows, so the mean
// over equal shares is that of the joint batch.
static int average(void *user, df_net *net, df_real *grads, size_t size) {
    const int *processes = (const int *)user;
    (void)net;
    for (size_t at = 0; at < size; at += 1 << 24) {      // MPI counts by int
        int count = (int)(size - at < 1 << 24 ? size - at : 1 << 24);
        if (MPI_Allreduce(MPI_IN_PLACE, grads + at, count, MPI_REAL_TYPE, MPI_SUM,
                          MPI_COMM_WORLD) != MPI_SUCCESS) return 1;
    }
    for (size_t i = 0; i < size; i++) grads[i] /= (df_real)*processes;
    return 0;
}

static int on_train(void *user, const df_train_info *info) {
    if (user) progress(&bar, (long)info->step, (long)info->steps, "loss", info->loss);
    return 0;
}

// Process number `part` of `parts`; of one, the whole batch.
static df_net *train(df_ctx *ctx, const options *o, const data_set *d, int batch, int part,
                     int *parts) {
    df_mlp_desc m = df_mlp_defaults();
    df_train_desc t = df_train_defaults();
    m.dim = d->dim, m.width = 128, m.depth = 3, m.seed = o->seed;
    t.steps = o->steps, t.batch = batch, t.seed = o->seed, t.part = part, t.parts = *parts;
    t.on_step = on_train, t.user = parts;
    if (*parts > 1) t.on_gradients = average;
    if (part > 0) t.on_step = NULL;
    df_net *net = df_mlp_create(ctx, &m);
    df_trainer *trainer = net ? df_trainer_create(ctx, net, d->x, d->n, NULL, &t) : NULL;
    bar = progress_begin(*parts > 1 ? "together" : "alone");
    int ok = trainer != NULL && df_trainer_run(trainer, 0) == DF_OK;
    df_trainer_free(trainer);
    if (ok) return net;
    df_net_free(net);
    return NULL;
}

// The largest difference between two arrays, as part of the largest number in the first.
static double apart(const df_real *a, const df_real *b, size_t n) {
    double most = 0, largest = 1e-300;
    for (size_t i = 0; i < n; i++) {
        most = fmax(most, fabs((double)a[i] - (double)b[i]));
        largest = fmax(largest, fabs((double)a[i]));
    }
    return most / largest;
}

// Trains with the others, then (process 0) alone on the joint batch, and compares. 0, or 1.
static int compare(df_ctx *ctx, const options *o, const data_set *d, int batch, int rank,
                   int processes) {
    const double limit = 1e-4;
    int one = 1, failed = 1;
    double here = 0, worst = 0, alone = 0;
    df_net *net = train(ctx, o, d, batch, rank, &processes), *joint = NULL;
    if (net == NULL) {
        fprintf(stderr, "process %d: %s\n", rank, df_ctx_message(ctx));
        MPI_Abort(MPI_COMM_WORLD, 1);            // the others wait for its gradients
    }
    size_t size = df_net_size(net);
    df_real *first = (df_real *)malloc(size * sizeof *first);
    if (first == NULL) MPI_Abort(MPI_COMM_WORLD, 1);
    memcpy(first, df_net_weights(net), size * sizeof *first);
    MPI_Bcast(first, (int)size, MPI_REAL_TYPE, 0, MPI_COMM_WORLD);
    here = apart(first, df_net_weights(net), size);
    MPI_Reduce(&here, &worst, 1, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    if (rank == 0) {
        joint = train(ctx, o, d, batch * processes, 0, &one);
        if (joint == NULL) fprintf(stderr, "%s\n", df_ctx_message(ctx));
        else alone = apart(df_net_weights(joint), first, size);
        failed = joint == NULL || !(alone < limit) || !(worst < limit);
        printf("%d processes of %d rows, %d steps, %lu weights: they differ from each other by "
               "%.1e,\nfrom those of one process of %d rows by %.1e of the largest (limit "
               "%.0e)\n", processes, batch, o->steps, (unsigned long)size, worst,
               batch * processes, alone, limit);
    }
    MPI_Bcast(&failed, 1, MPI_INT, 0, MPI_COMM_WORLD);
    free(first);
    df_net_free(net);
    df_net_free(joint);
    return failed;
}

int main(int argc, char **argv) {
    int rank, processes, batch = 64, result = 2;
    const option_own own[] = {
        OPTION_WHOLE("--batch", "N", "rows of one process", &batch, 1, 65536)
    };
    options o = options_defaults(argv[0], "mpi", "moons", 200, 0, 10000);
    df_ctx_desc c = df_ctx_defaults();
    data_set d;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &processes);
    o.without = "--data --method --sample-steps --load --save --picture --csv --list";
    o.threads = 1, o.own = own, o.owns = 1;
    if (options_read(&o, argc, argv) != 0) {
        result = o.help ? 0 : 2;
    } else if (data_points(&d, "moons", o.n, o.seed) == 0) {
        c.threads = o.threads;
        df_ctx *ctx = df_ctx_create(&c);
        result = ctx ? compare(ctx, &o, &d, batch, rank, processes) : 1;
        df_ctx_free(ctx);
        data_free(&d);
    }
    MPI_Finalize();
    return result;
}
