#pragma once
// The loops of the projected steps over a formula of csrc/math.

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/launchers.h"
#include "common/parallel.h"

namespace atop {

// Sums of squares have this many lanes for any vector length of the machine, and cover this many elements: the same
// bits on all machines, and rounding errors that do not grow with the image.
constexpr int kLanes = 32;
constexpr int64_t kRun = 4096;
// A piece of the sum of draws stays in the L1 cache while it accumulates.
constexpr int64_t kPiece = 1024;

template <typename T>
struct Rows {
  const T *x, *g, *x0, *x_prev;

  ATOP_HD math::Element<T> operator[](int64_t i) const { return {x[i], g[i], x0[i], x_prev[i]}; }
};

template <typename Step, typename T>
ATOP_CLONES void apply_step(Rows<T> rows, T* out, int64_t n, Step step) {
  // out may be x: every element is read before it is written, so the loop needs no overlap check.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = step(rows[i]);
}

// Writes term<R>(i) to d[i] unless R is 0, and returns the sum of the squares. d may be x.
template <int R, typename Step, typename T>
ATOP_CLONES double sum_of_squares(Rows<T> rows, T* d, int64_t n, Step step) {
  double sum = 0;
  for (int64_t first = 0; first < n; first += kRun) {
    const int64_t end = std::min(n, first + kRun), whole = end - (end - first) % kLanes;
    T lanes[kLanes] = {};
    for (int64_t i = first; i < whole; i += kLanes) {
#pragma GCC ivdep
      for (int j = 0; j < kLanes; ++j) {
        const T t = step.template term<R>(rows[i + j]);
        if constexpr (R > 0) d[i + j] = t;
        lanes[j] += t * t;
      }
    }
    for (int64_t i = whole; i < end; ++i) {
      const T t = step.template term<R>(rows[i]);
      if constexpr (R > 0) d[i] = t;
      lanes[i - whole] += t * t;
    }
    for (int j = 0; j < kLanes; ++j) sum += static_cast<double>(lanes[j]);
  }
  return sum;
}

template <typename Step, typename T>
ATOP_CLONES void project(const T* x0, T* out, int64_t n, Step step) {
  for (int64_t i = 0; i < n; ++i) out[i] = step.project(out[i], x0[i]);
}

template <typename T>
ATOP_CLONES void make_finite(const T* g, T* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = math::finite(g[i]);
}

template <typename T>
ATOP_CLONES void multiply(const T* g, T unit, T* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = g[i] * unit;
}

// total[i] = ((grad[0, i] + grad[1, i]) + grad[2, i]) ...
template <typename T>
ATOP_CLONES void sum_draws(const T* grad, int64_t draws, int64_t stride, T* __restrict__ total, int64_t n) {
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t end = std::min(n, first + kPiece);
    for (int64_t i = first; i < end; ++i) total[i] = grad[i] + grad[stride + i];
    for (int64_t d = 2; d < draws; ++d) {
      for (int64_t i = first; i < end; ++i) total[i] += grad[d * stride + i];
    }
  }
}

// A whole sample, with norms; `buffer` holds its gradient if that must be computed.
template <typename Step, typename T>
void step_with_norms(const StepArguments<T>& a, int64_t sample, std::vector<T>& buffer) {
  const int64_t begin = sample * a.inner, n = a.inner;
  Rows<T> rows{a.x + begin, a.grad + begin, a.x0 + begin, a.x_prev + begin};
  T* const out = a.out + begin;
  Step step(a.numbers(sample));
  if (a.draws > 1) {
    buffer.resize(static_cast<size_t>(n));
    sum_draws(rows.g, a.draws, a.draw_stride, buffer.data(), n);
    rows.g = buffer.data();
  }
  double squares = sum_of_squares<0>(rows, out, n, step);
  // A finite sum proves that every element is finite, which saves a separate pass.
  if (!std::isfinite(static_cast<T>(squares))) {
    buffer.resize(static_cast<size_t>(n));
    make_finite(rows.g, buffer.data(), n);
    rows.g = buffer.data();
    squares = sum_of_squares<0>(rows, out, n, step);
  }
  if (squares < double(math::kSmall<T>) * double(math::kSmall<T>)) {
    step.unit = math::kMagnified<T>;
    buffer.resize(static_cast<size_t>(n));
    multiply(rows.g, step.unit, buffer.data(), n);
    rows.g = buffer.data();
    squares = sum_of_squares<0>(rows, out, n, step);
  }
  step.template take<0>(static_cast<T>(std::sqrt(squares)));
  step.template take<1>(static_cast<T>(std::sqrt(sum_of_squares<1>(rows, out, n, step))));
  if constexpr (Step::kNorms == 3) {
    step.template take<2>(static_cast<T>(std::sqrt(sum_of_squares<2>(rows, out, n, step))));
  }
  project(rows.x0, out, n, step);
}

// A piece of a sample, without norms.
template <typename Step, typename T>
void step_elements(const StepArguments<T>& a, int64_t begin, int64_t n, const Step& step) {
  Rows<T> rows{a.x + begin, a.grad + begin, a.x0 + begin, a.x_prev + begin};
  if (a.draws == 1) return apply_step(rows, a.out + begin, n, step);
  T total[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t count = std::min(kPiece, n - i);
    sum_draws(rows.g + i, a.draws, a.draw_stride, total, count);
    apply_step(Rows<T>{rows.x + i, total, rows.x0 + i, rows.x_prev + i}, a.out + begin + i, count, step);
  }
}

template <template <typename> class Step, typename T>
const char* launch_step(const StepArguments<T>& a) {
  if constexpr (Step<T>::kNorms == 0) {
    parallel_for_rows(a.batch, a.inner, [&](int64_t sample, int64_t first, int64_t count) {
      step_elements(a, sample * a.inner + first, count, Step<T>(a.numbers(sample)));
    });
  } else {
    torch::stable::parallel_for(0, a.batch, std::max<int64_t>(1, kGrain / a.inner), [&](int64_t begin, int64_t end) {
      std::vector<T> buffer;
      for (int64_t sample = begin; sample < end; ++sample) step_with_norms<Step<T>>(a, sample, buffer);
    });
  }
  return nullptr;
}

}  // namespace atop
