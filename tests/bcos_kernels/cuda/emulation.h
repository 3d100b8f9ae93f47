// What the kernels of csrc/cuda use of CUDA, on a CPU: threads of a block are fibers that run one after the other up to
// the next barrier or shuffle, in either order, and blocks one after the other. Indices, sums and their order are those of a
// GPU; speed is not. A barrier or shuffle that some threads never reach ends the program with a message.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

enum class Waits { no, block, warp };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 index;
  Waits waits;
  bool done;
};

struct Machine {
  dim3 thread, block, blocks, threads;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  unsigned running = 0;
  std::vector<uint64_t> exchange;
  const std::function<void()>* kernel = nullptr;
  uint64_t bytes_read = 0, bytes_written = 0;  // of activations and weights, by packs
  bool backwards = false;                      // threads in the other order: what needs a barrier that is not there shows
};
inline Machine& machine() {
  static Machine m;
  return m;
}

// An access to memory, which a GPU refuses where it is not aligned to its width.
inline void count(uint64_t* total, const void* p, uint64_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    std::fprintf(stderr, "emulation: %llu bytes at an address that is no multiple of them\n", (unsigned long long)bytes);
    std::abort();
  }
  *total += bytes;
}

inline void wait(Waits what) {
  Machine& m = machine();
  Fiber& me = m.fibers[m.running];
  me.waits = what;
  swapcontext(&me.context, &m.scheduler);
  m.thread = me.index;
}

inline void entry() {
  Machine& m = machine();
  (*m.kernel)();
  m.fibers[m.running].done = true;
}

// Releases fibers [first, last) if all that are left wait for the same thing.
inline bool release(unsigned first, unsigned last, Waits what) {
  Machine& m = machine();
  unsigned waiting = 0, left = 0;
  for (unsigned i = first; i < last; i++) {
    left += !m.fibers[i].done;
    waiting += !m.fibers[i].done && m.fibers[i].waits == what;
  }
  if (waiting == 0 || waiting != left) return false;
  // a thread that has returned never reaches a barrier: a GPU may hang there
  if (left != last - first) {
    std::fprintf(stderr, "emulation: %u of %u threads wait, the others have returned\n", left, last - first);
    std::abort();
  }
  for (unsigned i = first; i < last; i++) m.fibers[i].waits = Waits::no;
  return true;
}

inline void run_block() {
  Machine& m = machine();
  const unsigned count = m.threads.x * m.threads.y * m.threads.z;
  for (unsigned i = 0; i < count; i++) {
    Fiber& f = m.fibers[i];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &m.scheduler;
    f.index = dim3(i % m.threads.x, i / m.threads.x % m.threads.y, i / m.threads.x / m.threads.y);
    f.waits = Waits::no;
    f.done = false;
    makecontext(&f.context, entry, 0);
  }
  for (;;) {
    bool ran = false, all_done = true;
    for (unsigned turn = 0; turn < count; turn++) {
      const unsigned i = m.backwards ? count - 1 - turn : turn;
      Fiber& f = m.fibers[i];
      if (f.done || f.waits != Waits::no) continue;
      ran = true;
      m.running = i;
      m.thread = f.index;
      swapcontext(&m.scheduler, &f.context);
    }
    for (unsigned i = 0; i < count; i++) all_done = all_done && m.fibers[i].done;
    if (all_done) return;
    bool released = false;
    for (unsigned w = 0; w < count; w += 32) released |= release(w, w + 32 < count ? w + 32 : count, Waits::warp);
    released |= release(0, count, Waits::block);
    if (!ran && !released) {
      std::fprintf(stderr, "emulation: threads of a block wait for different things\n");
      std::abort();
    }
  }
}

template <class F>
void launch(dim3 blocks, dim3 threads, const F& kernel) {
  Machine& m = machine();
  m.blocks = blocks;
  m.threads = threads;
  const unsigned count = threads.x * threads.y * threads.z;
  if (count % 32 != 0 || count > 1024) {
    std::fprintf(stderr, "emulation: expected whole warps, 1024 threads at most, got %u threads\n", count);
    std::abort();
  }
  m.exchange.resize(count);
  m.fibers.resize(count);
  for (Fiber& f : m.fibers) f.stack.resize(64 << 10);
  const std::function<void()> function = kernel;
  m.kernel = &function;
  for (unsigned z = 0; z < blocks.z; z++) {
    for (unsigned y = 0; y < blocks.y; y++) {
      for (unsigned x = 0; x < blocks.x; x++) {
        m.block = dim3(x, y, z);
        run_block();
      }
    }
  }
}

}  // namespace emulation

#define threadIdx (emulation::machine().thread)
#define blockIdx (emulation::machine().block)
#define blockDim (emulation::machine().threads)
#define gridDim (emulation::machine().blocks)

inline void __syncthreads() { emulation::wait(emulation::Waits::block); }

template <class T>
T __shfl_xor_sync(unsigned, T v, int lane_mask) {
  emulation::Machine& m = emulation::machine();
  const unsigned me = m.running;
  std::memcpy(&m.exchange[me], &v, sizeof(T));
  emulation::wait(emulation::Waits::warp);
  T result;
  std::memcpy(&result, &m.exchange[(me & ~31u) | ((me ^ static_cast<unsigned>(lane_mask)) & 31u)], sizeof(T));
  emulation::wait(emulation::Waits::warp);
  return result;
}

#define BCOS_LAUNCH(kernel, grid, block, stream, ...)                            \
  do {                                                                           \
    (void)(stream);                                                              \
    emulation::launch(dim3(grid), dim3(block), [&] { kernel(__VA_ARGS__); });    \
  } while (false)
