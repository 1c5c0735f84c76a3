/* Work shared out among threads, each of which has memory of its own and takes one item after another. */
#ifndef REGLA_THREADS_H
#define REGLA_THREADS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "vector.h"

#define ALIGNMENT 64
#define MOST_THREADS 256
#define WORTH_A_THREAD (1 << 19) /* numbers of states that tokens go through: tenths of a millisecond */

typedef void Item(const void *work, char *memory, int64_t item);

typedef struct {
    const void *work;
    Item *run;
    int64_t items, bytes; /* bytes: of memory that a thread needs */
    atomic_llong next;
    atomic_int failed;
} Job;

/* The next buffer of `count` numbers. */
static float *take(char **memory, int64_t count) {
    float *at = (float *)*memory;
    *memory += (count * sizeof(float) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

static void *worker(void *argument) {
    Job *job = argument;
    char *memory;
    if (posix_memalign((void **)&memory, ALIGNMENT, job->bytes)) {
        job->failed = 1;
        return 0;
    }
#if defined(__x86_64__) || defined(__i386__)
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040); /* what is too small to be a normal number is 0: arithmetic on it is 100 times slower */
#endif
    for (int64_t item; (item = job->next++) < job->items;) job->run(job->work, memory, item);
    end_of_streams();
#if defined(__x86_64__) || defined(__i386__)
    _mm_setcsr(mode);
#endif
    free(memory);
    return 0;
}

/* Runs all items, on up to `threads` threads. 0, or 1 where there is no memory for them. */
static int share_out(const void *work, Item *run, int64_t items, int64_t bytes, int64_t threads) {
    Job job = {work, run, items, bytes, 0, 0};
    pthread_t others[MOST_THREADS];
    int64_t count = (threads < items ? threads : items) - 1, started = 0;
    if (count > MOST_THREADS) count = MOST_THREADS;
    while (started < count && !pthread_create(&others[started], 0, worker, &job)) started++;
    worker(&job);
    for (int64_t i = 0; i < started; i++) pthread_join(others[i], 0);
    return job.failed;
}

#endif
