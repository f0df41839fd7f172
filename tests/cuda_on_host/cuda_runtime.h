// Executes csrc/ on the CPU for the tests: the part of the CUDA runtime that the sources use, and no more.
// Blocks run one after the other; a block's threads take turns at barriers and warp collectives. The order of
// both can be set (host_cuda_order), and shared memory starts as garbage, which shows most missing barriers.
#pragma once

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
// Nothing else in the module is thread_local, so that its thread-local storage is its shared memory.
#define __shared__ static thread_local

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
extern "C" {  // for tests/host_cuda.py
inline __attribute__((used, visibility("default"))) int host_cuda_launches = 0;
// Blocks and threads in order (0), backwards (1), or shuffled with this number as the seed; -1: none runs.
inline __attribute__((used, visibility("default"))) int host_cuda_order = 0;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace host_cuda {

constexpr unsigned WARP = 32;
constexpr unsigned WHOLE_BLOCK = 0;        // a mask no warp collective can have
constexpr size_t STACK = size_t{1} << 17;  // room for a sanitizer's report

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t start;
  jmp_buf at;
  bool started = false;
};

struct Thread {
  enum { RUNNABLE, WAITING, DONE } state = RUNNABLE;
  Fiber* fiber = nullptr;
  const char* file;  // where it waits
  int line;
  unsigned mask;  // for which lanes
  uint64_t value;
};

// What runs now. A thread gets a fiber when it starts and gives it back when it ends: a kernel that never
// waits runs all its threads on one.
struct Block {
  void (*body)(const void*);
  const void* argument;
  std::vector<Thread> threads;
  std::vector<uint64_t> exchanged;  // what each lane brought to its warp's last collective
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  unsigned current;
  jmp_buf scheduler;
};
inline Block block;

// setjmp rather than swapcontext, which makes two system calls each time.
inline void to_scheduler(Fiber* fiber) {
  if (!_setjmp(fiber->at)) _longjmp(block.scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    Thread& thread = block.threads[block.current];
    Fiber* fiber = thread.fiber;
    block.body(block.argument);
    block.threads[block.current].state = Thread::DONE;
    block.idle.push_back(fiber);
    to_scheduler(fiber);
  }
}

inline __attribute__((noinline)) void resume(unsigned index) {
  Thread& thread = block.threads[index];
  if (!thread.fiber) {
    if (block.idle.empty()) block.idle.push_back(block.fibers.emplace_back(new Fiber).get());
    thread.fiber = block.idle.back();
    block.idle.pop_back();
  }
  block.current = index;
  threadIdx = dim3(index % blockDim.x, index / blockDim.x % blockDim.y, index / (blockDim.x * blockDim.y));
  if (_setjmp(block.scheduler)) return;
  if (block.threads[index].fiber->started) _longjmp(block.threads[index].fiber->at, 1);
  Fiber* fiber = block.threads[index].fiber;
  fiber->started = true;
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->stack.get();
  fiber->start.uc_stack.ss_size = STACK;
  makecontext(&fiber->start, fiber_main, 0);
  setcontext(&fiber->start);
}

// Waits for the lanes of `mask`, or the whole block, at this line; -> what the lanes brought.
inline __attribute__((noinline)) const uint64_t* wait(const char* file, int line, unsigned mask,
                                                      uint64_t value) {
  const unsigned index = block.current;
  Thread& thread = block.threads[index];
  thread.state = Thread::WAITING;
  thread.file = file;
  thread.line = line;
  thread.mask = mask;
  thread.value = value;
  to_scheduler(thread.fiber);
  return &block.exchanged[index / WARP * WARP];
}

// Lets go everyone whose partners have all arrived; -> whether there was anyone.
inline bool release() {
  auto& threads = block.threads;
  bool any = false;
  for (size_t i = 0; i < threads.size(); ++i) {
    if (threads[i].state != Thread::WAITING) continue;
    const bool whole = threads[i].mask == WHOLE_BLOCK;
    const size_t begin = whole ? 0 : i / WARP * WARP, end = whole ? threads.size() : begin + WARP;
    std::vector<size_t> partners;
    bool all = true;
    for (size_t j = begin; j < end; ++j) {
      if (!whole && !(threads[i].mask >> (j - begin) & 1)) continue;
      all = all && j < threads.size() && threads[j].state == Thread::WAITING &&
            threads[j].line == threads[i].line && threads[j].mask == threads[i].mask;
      partners.push_back(j);
    }
    if (!all || std::find(partners.begin(), partners.end(), i) == partners.end()) continue;
    for (size_t j : partners) {
      threads[j].state = Thread::RUNNABLE;
      block.exchanged[j] = threads[j].value;
    }
    any = true;
  }
  return any;
}

[[noreturn]] inline void stuck() {
  size_t waiting = 0;
  const Thread* first = nullptr;
  for (const Thread& thread : block.threads) {
    if (thread.state != Thread::WAITING) continue;
    if (!first) first = &thread;
    waiting += thread.line == first->line && thread.mask == first->mask;
  }
  const std::string where = std::string(first->file) + ":" + std::to_string(first->line);
  const std::string whom = first->mask == WHOLE_BLOCK ? "barrier" : "warp collective";
  block.fibers.clear();
  block.idle.clear();
  throw std::logic_error(where + ": a " + whom + " waits for ever: " + std::to_string(waiting) + " of " +
                         std::to_string(block.threads.size()) + " threads are there");
}

inline void reorder(std::vector<unsigned>& order, uint64_t& seed) {
  if (host_cuda_order == 1) std::reverse(order.begin(), order.end());
  if (host_cuda_order < 2) return;
  for (size_t i = order.size(); i > 1; --i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i - 1], order[(seed >> 33) % i]);
  }
}

inline std::vector<unsigned> indices(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  return order;
}

struct Memory {
  char* begin = nullptr;
  size_t size = 0;
};
inline thread_local char allocate_shared_memory;

inline Memory shared_memory() {
  *const_cast<volatile char*>(&allocate_shared_memory) = 0;
  Memory memory;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          char* begin = static_cast<char*>(info->dlpi_tls_data);
          const size_t size = info->dlpi_phdr[i].p_memsz;
          if (info->dlpi_phdr[i].p_type != PT_TLS || !begin) continue;
          if (&allocate_shared_memory < begin || &allocate_shared_memory >= begin + size) continue;
          *static_cast<Memory*>(out) = {begin, size};
          return 1;
        }
        return 0;
      },
      &memory);
  return memory;
}

inline void run_block(void (*body)(const void*), const void* argument, unsigned threads, uint64_t& seed) {
  block.body = body;
  block.argument = argument;
  block.threads.assign(threads, Thread{});
  block.exchanged.assign((threads + WARP - 1) / WARP * WARP, 0);
  std::vector<unsigned> order = indices(threads);
  reorder(order, seed);
  do {
    for (unsigned index : order) {
      if (block.threads[index].state == Thread::RUNNABLE) resume(index);
    }
    if (host_cuda_order > 1) reorder(order, seed);
  } while (release());
  for (const Thread& thread : block.threads) {
    if (thread.state != Thread::DONE) stuck();
  }
}

template <typename T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T shuffle(const char* file, int line, unsigned mask, T value, unsigned from) {
  const uint64_t bits = wait(file, line, mask, bits_of(value))[from];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned ballot(const char* file, int line, unsigned mask, bool vote) {
  const uint64_t* votes = wait(file, line, mask, vote);
  unsigned result = 0;
  for (unsigned lane = 0; lane < WARP; ++lane) result |= (mask >> lane & votes[lane] & 1) << lane;
  return result;
}

inline unsigned lane() { return block.current % WARP; }

}  // namespace host_cuda

#define __syncthreads() host_cuda::wait(__FILE__, __LINE__, host_cuda::WHOLE_BLOCK, 0)
#define __ballot_sync(mask, vote) host_cuda::ballot(__FILE__, __LINE__, mask, vote)
#define __any_sync(mask, vote) (host_cuda::ballot(__FILE__, __LINE__, mask, vote) != 0)
#define __shfl_sync(mask, value, from) host_cuda::shuffle(__FILE__, __LINE__, mask, value, (from) % 32)
#define __shfl_xor_sync(mask, value, flip) \
  host_cuda::shuffle(__FILE__, __LINE__, mask, value, host_cuda::lane() ^ (flip))

inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const auto [gx, gy, gz] = config->gridDim;
  const auto [bx, by, bz] = config->blockDim;
  if (gx * gy * gz == 0 || bx * by * bz == 0 || bx * by * bz > 1024) return cudaErrorInvalidConfiguration;
  ++host_cuda_launches;
  if (host_cuda_order < 0) return cudaSuccess;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  auto body = [&] { kernel(args...); };
  const host_cuda::Memory shared = host_cuda::shared_memory();
  std::vector<unsigned> order = host_cuda::indices(gx * gy * gz);
  uint64_t seed = host_cuda_order;
  host_cuda::reorder(order, seed);
  for (unsigned index : order) {
    blockIdx = dim3(index % gx, index / gx % gy, index / (gx * gy));
    std::memset(shared.begin, 0xFF, shared.size);
    host_cuda::run_block([](const void* p) { (*static_cast<decltype(body)*>(const_cast<void*>(p)))(); },
                         &body, bx * by * bz, seed);
  }
  return cudaSuccess;
}
