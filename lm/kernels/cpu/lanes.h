// Vectors in GCC's and Clang's extensions, one AVX-512 or AVX2 register, or two of NEON: of vectors
// that are larger than registers GCC makes loads and stores. And loops over XLA's own threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

template <class T>
static inline T load(const void* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

// Calls f(0) .. f(count - 1) on the threads of the pool and on this one. A pool's tasks may not wait
// for others, which may never start: so whoever runs takes the next number, and this thread all of
// them if nobody else comes.
template <class F>
static void parallel(ffi::ThreadPool& pool, int64_t count, F f) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, count, f] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < count; progress->done.fetch_add(1)) f(i);
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule(std::function<void()>(work));
  work();
  while (progress->done.load() < count) std::this_thread::yield();
}
