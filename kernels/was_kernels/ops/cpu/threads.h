// Threads of the OpenMP runtime that torch has loaded, called by the functions that GCC's code for OpenMP calls.
//
// Runtimes of other compilers have these functions too, so that it matters neither which compiler this is compiled by nor
// whether it brings a runtime and headers of its own.

#pragma once

#include <stdint.h>

extern "C" {
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
void GOMP_barrier(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

// Calls ``body(thread, used)`` in each of ``used`` threads, of which there are ``threads`` or fewer.
template <class Body> static void in_threads(int64_t threads, const Body &body) {
    GOMP_parallel([](void *data) { (*(const Body *)data)(omp_get_thread_num(), omp_get_num_threads()); }, (void *)&body,
                  (unsigned)threads, 0);
}

// Waits until all threads are here.
static inline void wait_for_all() { GOMP_barrier(); }
