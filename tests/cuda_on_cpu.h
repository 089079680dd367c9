#pragma once
// Enough of CUDA to run the kernels of csrc/cuda on the CPU, one thread after the other; test_cuda_on_cpu.py compiles
// it instead of <cuda_runtime.h>. Every thread is a coroutine, which yields at __syncthreads() and twice in a
// shuffle: the participating lanes of a warp stay in step. In a kernel that has both, all warps must shuffle equally
// often between two barriers.

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };

namespace on_cpu {

inline cudaError_t error = cudaSuccess;

struct Index {
  unsigned x;
};

struct Thread {
  std::vector<char> stack = std::vector<char>(1 << 18);
  ucontext_t context;
  bool done;
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline Index block_index, block_size, thread_index;

inline void run_thread() {
  body();
  threads[thread_index.x].done = true;
}

inline void run_block() {
  if (threads.size() < block_size.x) threads.resize(block_size.x);
  for (unsigned i = 0; i < block_size.x; ++i) {
    Thread& t = threads[i];
    t.done = false;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = &scheduler;
    makecontext(&t.context, run_thread, 0);
  }
  for (bool some = true; some;) {
    some = false;
    for (unsigned i = 0; i < block_size.x; ++i) {
      if (threads[i].done) continue;
      thread_index.x = i;
      swapcontext(&scheduler, &threads[i].context);
      some = some || !threads[i].done;
    }
  }
}

// kernel<<<grid, block, memory, stream>>>(arguments) is rewritten as Launch(grid, block, memory, stream)(kernel,
// arguments).
struct Launch {
  Launch(unsigned grid, unsigned block, int, cudaStream_t) : grid(grid) { block_size.x = block; }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), Arguments... arguments) const {
    const bool fits = grid >= 1 && grid <= INT32_MAX && block_size.x >= 1 && block_size.x <= 1024;
    error = fits ? cudaSuccess : cudaErrorInvalidConfiguration;
    body = [=] { kernel(arguments...); };
    for (block_index.x = 0; fits && block_index.x < grid; ++block_index.x) run_block();
  }

  unsigned grid;
};

}  // namespace on_cpu

#define blockIdx on_cpu::block_index
#define blockDim on_cpu::block_size
#define threadIdx on_cpu::thread_index

inline void __syncthreads() {
  swapcontext(&on_cpu::threads[threadIdx.x].context, &on_cpu::scheduler);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  static T given[1024];
  given[threadIdx.x] = value;
  __syncthreads();
  const T taken = given[threadIdx.x ^ lane_mask];
  __syncthreads();
  return taken;
}

inline cudaError_t cudaGetLastError() {
  return on_cpu::error;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "invalid configuration argument";
}
