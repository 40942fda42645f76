// One pool of threads, torch's: compiled with OpenMP but linked without it, so that the runtime
// which torch has loaded serves. Small calls, and calls in a forked child, run serially.
#pragma once
#include <pthread.h>
#include <stdlib.h>
#if defined(__linux__)
#include <dirent.h>
#include <sys/mman.h>
#endif

#include <atomic>

#include "plan.h"

namespace foveate {

struct ThreadArena : Arena {
  ~ThreadArena() { free(data); }
};

// The calling thread's scratch, of at least so many bytes; null when memory ran out.
inline Arena* thread_arena(int64_t bytes) {
  static thread_local ThreadArena arena;
  return reserve(&arena, bytes) ? &arena : nullptr;
}

// Likewise for fp32 sums, which live beside the scratch; large ones are not kept.
inline Arena* thread_sums(int64_t bytes) {
  static thread_local ThreadArena arena;
  if (arena.size > (64 << 20) && bytes <= (64 << 20)) {
    free(arena.data);
    arena.data = nullptr;
    arena.size = 0;
  }
  return reserve(&arena, bytes) ? &arena : nullptr;
}

// OpenMP's threads don't survive a fork: a child that inherits a started pool, whoever started it,
// would wait forever.
inline bool& pool_lost() {
  static bool lost = false;
  return lost;
}
inline bool& alone() {
  static bool value = false;
  return value;
}
// Before a fork: a process of one thread has started no pool.
inline void before_fork() {
  alone() = false;
#if defined(__linux__)
  if (DIR* tasks = opendir("/proc/self/task")) {
    int entries = 0;  // . and .. among them
    while (readdir(tasks)) ++entries;
    closedir(tasks);
    alone() = entries == 3;
  }
#endif
}
inline void after_fork() { pool_lost() = pool_lost() || !alone(); }

// Threads for a call of so many multiply-adds: one for each 2 million, about 20 microseconds.
inline int64_t threads_for(int64_t threads, double multiplications) {
  if (pool_lost() || threads < 2) return 1;
  double most = multiplications / 2e6;
  return most < threads ? (most < 2 ? 1 : (int64_t)most) : threads;
}

// run(i, following) for every i < n, taken in order from one counter; false if any run was.
// `following` is what the thread will run next, or -1; it is known only where there is plenty.
template <class F> bool for_each(int64_t n, int64_t threads, F run) {
  if (threads > n) threads = n;
#if defined(_OPENMP)
  if (threads > 1) {
    std::atomic<int64_t> counter{0};
    std::atomic<bool> ok{true};
    bool plenty = n >= 16 * threads;
#pragma omp parallel num_threads((int)threads)
    {
      int64_t i = counter.fetch_add(1, std::memory_order_relaxed);
      while (i < n) {
        int64_t after = plenty ? counter.fetch_add(1, std::memory_order_relaxed) : -1;
        if (!run(i, after < n ? after : -1)) ok = false;
        i = plenty ? after : counter.fetch_add(1, std::memory_order_relaxed);
      }
    }
    return ok;
  }
#endif
  bool ok = true;
  for (int64_t i = 0; i < n; ++i) ok &= run(i, i + 1 < n ? i + 1 : -1);
  return ok;
}

// Let large buffers come in large pages: a small page costs a fault for each 4 KiB of output.
inline void large_pages(const void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t huge = 2 << 20;
  if (bytes < 2 * huge) return;
  uintptr_t from = ((uintptr_t)data + huge - 1) / huge * huge, to = ((uintptr_t)data + bytes) / huge * huge;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace foveate
