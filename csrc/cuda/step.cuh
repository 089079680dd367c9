#pragma once
// The kernels of the projected steps over a formula of csrc/math.

#include <cmath>

#include "common/launchers.h"
#include "index.cuh"
#include "vector.cuh"

namespace atop {

// The number of elements of a sample that one block handles. A sample of one part takes one launch; others take one
// launch per norm and one more.
constexpr int64_t kPart = 8192;
// Minimum blocks per multiprocessor, with and without norms: with this bound, ptxas does not spill registers to fit one
// more block.
template <typename T>
constexpr int kBlocks = sizeof(T) == 4 ? 3 : 2;
constexpr int kElementBlocks = 4;

// V elements from index i in all samples on; the draws are added in order.
template <int V, typename T>
struct Elements {
  Pack<T, V> x, g, x0, x_prev;

  __device__ Elements(const StepArguments<T>& a, int64_t i)
      : x(load_pack<T, V>(a.x + i)),
        g(load_pack<T, V>(a.grad + i)),
        x0(load_pack<T, V>(a.x0 + i)),
        x_prev(load_pack<T, V>(a.x_prev + i)) {
    for (int64_t d = 1; d < a.draws; ++d) {
      const Pack<T, V> more = load_pack<T, V>(a.grad + d * a.draw_stride + i);
#pragma unroll
      for (int j = 0; j < V; ++j) g.v[j] += more.v[j];
    }
  }

  __device__ math::Element<T> operator[](int j) const { return {x.v[j], g.v[j], x0.v[j], x_prev.v[j]}; }
};

// One pack of V elements per thread. V divides a sample, unless all samples are treated as one: then the last pack may
// be shorter.
template <typename Step, int V, typename T>
__global__ void __launch_bounds__(kThreads, kElementBlocks) step_elements_kernel(StepArguments<T> a) {
  const int64_t first = thread_index() * V, end = a.batch * a.inner;
  if (first >= end) return;
  const Step step(a.numbers(a.batch == 1 ? 0 : split(first, a.inner).quotient));
  if (first + V <= end) {
    const Elements<V, T> elements(a, first);
    Pack<T, V> result;
#pragma unroll
    for (int j = 0; j < V; ++j) result.v[j] = step(elements[j]);
    store_pack(a.out + first, result);
  } else {
    for (int64_t i = first; i < end; ++i) a.out[i] = step(Elements<1, T>(a, i)[0]);
  }
}

template <typename T>
bool can_load_packs(const StepArguments<T>& a) {
  return aligned16(a.x, a.grad, a.x0, a.x_prev, a.out) && a.draw_stride % kWidth<T> == 0 &&
         (a.batch == 1 || a.inner % kWidth<T> == 0);
}

template <template <typename> class Step, typename T>
const char* launch_step_elements(const StepArguments<T>& a, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t n = a.batch * a.inner;
  constexpr int V = kWidth<T>;
  if (can_load_packs(a)) {
    step_elements_kernel<Step<T>, V, T><<<blocks_for((n + V - 1) / V), kThreads, 0, cuda_stream>>>(a);
  } else {
    step_elements_kernel<Step<T>, 1, T><<<blocks_for(n), kThreads, 0, cuda_stream>>>(a);
  }
  return launch_error();
}

// The sum of the values of all threads of the block, returned to each of them.
template <typename T>
__device__ T block_sum(T value) {
  __shared__ T sums[kThreads];
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int n = kThreads / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) sums[threadIdx.x] += sums[threadIdx.x + n];
    __syncthreads();
  }
  const T sum = sums[0];
  __syncthreads();
  return sum;
}

// The part of a sample that a block handles.
struct Part {
  int64_t sample, index, count;  // part `index` of `count`
  int64_t first, end;            // elements, counted over all samples
};

// Makes the gradient finite and scales it by `unit`.
template <int V, typename T, typename Body>
__device__ void for_each_pack(const StepArguments<T>& a, const Part& part, T unit, const Body& body) {
  // Unrolled, the loop would take twice the registers.
#pragma unroll 1
  for (int64_t i = part.first + threadIdx.x * V; i < part.end; i += kThreads * V) {
    Elements<V, T> elements(a, i);
#pragma unroll
    for (int j = 0; j < V; ++j) elements.g.v[j] = math::finite(elements.g.v[j]) * unit;
    body(i, elements);
  }
}

// The sum of squares of term<R> over the sample, from the parts' sums in row `row` of the partials; in phase R, the sum
// over this part, to be stored there. A negative phase means that the sample is a single part.
template <int R, int V, typename Step, typename T>
__device__ T sum_of_squares(const StepArguments<T>& a, const Part& part, int phase, int row, const Step& step) {
  T* const partials = a.partials + (row * a.batch + part.sample) * part.count;
  T sum = T(0);
  if (phase < 0 || phase == R) {
    for_each_pack<V>(a, part, step.unit, [&](int64_t i, const Elements<V, T>& elements) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const T t = step.template term<R>(elements[j]);
        sum += t * t;
      }
      if (R == 0 && a.total && row == 0) store_pack(a.total + i, elements.g);
    });
  } else {
    for (int64_t i = threadIdx.x; i < part.count; i += kThreads) sum += partials[i];
  }
  sum = block_sum(sum);
  if (phase == R && threadIdx.x == 0) partials[part.index] = sum;
  return sum;
}

// Passes the norms from R on to the formula: earlier norms than that of `phase` from the parts' sums; for `phase`,
// stores the sum of this part. False if the block is done.
template <int R, int V, typename Step, typename T>
__device__ bool take_norms(const StepArguments<T>& a, const Part& part, int phase, Step& step) {
  if constexpr (R == Step::kNorms) {
    return true;
  } else {
    T sum = sum_of_squares<R, V>(a, part, phase, R, step);
    // All parts of a small sum are small, so every value read from the last row has been stored.
    if (R == 0 && sum < math::kSmall<T> * math::kSmall<T>) {
      step.unit = math::kMagnified<T>;
      sum = sum_of_squares<R, V>(a, part, phase, Step::kNorms, step);
    }
    if (phase == R) return false;
    step.template take<R>(std::sqrt(sum));
    return take_norms<R + 1, V>(a, part, phase, step);
  }
}

template <typename Step, int V, typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    step_with_norms_kernel(StepArguments<T> a, unsigned parts, int phase) {
  const unsigned sample = blockIdx.x / parts, index = blockIdx.x % parts;
  const int64_t first = index * kPart, begin = sample * a.inner;
  const Part part{sample, index, parts, begin + first, begin + min(a.inner, first + kPart)};
  Step step(a.numbers(sample));
  if (!take_norms<0, V>(a, part, phase, step)) return;
  for_each_pack<V>(a, part, step.unit, [&](int64_t i, const Elements<V, T>& elements) {
    Pack<T, V> result;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      result.v[j] = step.project(step.template term<Step::kNorms - 1>(elements[j]), elements.x0.v[j]);
    }
    store_pack(a.out + i, result);
  });
}

template <typename Step, int V, typename T>
void launch_phase(const StepArguments<T>& a, int64_t parts, int phase, void* stream) {
  step_with_norms_kernel<Step, V, T>
      <<<unsigned(a.batch * parts), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, unsigned(parts), phase);
}

template <typename Step, int V, typename T>
const char* launch_phases(StepArguments<T> a, void* stream) {
  const int64_t parts = step_parts(a.inner);
  if (parts == 1) {
    launch_phase<Step, V, T>(a, parts, -1, stream);
    return launch_error();
  }
  for (int phase = 0; phase <= Step::kNorms; ++phase) {
    launch_phase<Step, V, T>(a, parts, phase, stream);
    if (const char* error = launch_error()) return error;
    if (a.total) {
      // In later phases, the sum of the draws replaces the gradient.
      a.grad = a.total;
      a.total = nullptr;
      a.draws = 1;
    }
  }
  return nullptr;
}

template <template <typename> class Step, typename T>
const char* launch_step_with_norms(const StepArguments<T>& a, void* stream) {
  if (can_load_packs(a) && a.inner % kWidth<T> == 0) return launch_phases<Step<T>, kWidth<T>, T>(a, stream);
  return launch_phases<Step<T>, 1, T>(a, stream);
}

}  // namespace atop
