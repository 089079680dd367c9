#pragma once
// The threshold of the projection onto the L1 ball in the image range.                        docs/math.md#project_l1

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/step.h"
#include "math/project_l1.h"

namespace atop {

// The sum of the remaining lengths, and the number of elements that shrink as lambda grows.
struct L1Left {
  double sum, slope;
};

template <typename T>
ATOP_CLONES void measure_l1(const T* x, const T* x0, T* __restrict__ lengths, T* __restrict__ caps, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T y = x[i] - x0[i];
    lengths[i] = math::length(y);
    caps[i] = math::room(y, x0[i]);
  }
}

template <typename T>
ATOP_CLONES L1Left left_at(const T* lengths, const T* caps, T lambda, int64_t n) {
  L1Left all{0, 0};
  for (int64_t first = 0; first < n; first += kRun) {
    const int64_t end = std::min(n, first + kRun), whole = end - (end - first) % kLanes;
    T sums[kLanes] = {}, slopes[kLanes] = {};
    for (int64_t i = first; i < whole; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        const T left = math::shrink(lengths[i + j], caps[i + j], lambda);
        sums[j] += left;
        slopes[j] += (left > T(0) && left < caps[i + j]) ? T(1) : T(0);
      }
    }
    for (int64_t i = whole; i < end; ++i) {
      const T left = math::shrink(lengths[i], caps[i], lambda);
      sums[i - whole] += left;
      slopes[i - whole] += (left > T(0) && left < caps[i]) ? T(1) : T(0);
    }
    for (int j = 0; j < kLanes; ++j) {
      all.sum += static_cast<double>(sums[j]);
      all.slope += static_cast<double>(slopes[j]);
    }
  }
  return all;
}

template <typename T>
ATOP_CLONES void shrink_all(const T* x, const T* x0, T lambda, T* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = math::project_l1(x[i], x0[i], lambda);
}

// The smallest lambda for which at most eps remains. The remainder is a decreasing, piecewise linear function of
// lambda: Newton's step is exact on a piece, and every third step bisects the bracket, which bounds the number of
// steps.
template <typename T>
T l1_threshold(const std::vector<T>& lengths, const std::vector<T>& caps, double eps) {
  const int64_t n = static_cast<int64_t>(lengths.size());
  L1Left left = left_at(lengths.data(), caps.data(), T(0), n);
  if (left.sum <= eps) return T(0);
  // NaN cannot be ordered; it makes the sample NaN.
  if (!(left.sum > eps)) return std::numeric_limits<T>::quiet_NaN();
  constexpr double kClose = 1 - double(std::numeric_limits<T>::epsilon());
  T at = T(0), low = at, high = *std::max_element(lengths.begin(), lengths.end());
  for (int step = 1;; ++step) {
    const T middle = low + (high - low) / 2;
    T next = static_cast<T>(static_cast<double>(at) + (left.sum - eps) / left.slope);
    if (step % 3 == 0 || !(next > low && next < high)) next = middle;
    if (!(next > low && next < high)) return high;
    left = left_at(lengths.data(), caps.data(), next, n);
    at = next;
    (left.sum > eps ? low : high) = next;
    if (left.sum <= eps && left.sum >= eps * kClose) return next;
  }
}

// Buffers for one sample.
template <typename T>
struct L1Buffers {
  std::vector<T> lengths, caps, moved, gradient;

  explicit L1Buffers(int64_t n)
      : lengths(static_cast<size_t>(n)), caps(lengths.size()), moved(lengths.size()), gradient(lengths.size()) {}
};

// The projection of a sample; out may be x.
template <typename T>
void project_sample_l1(const T* x, const T* x0, T eps, L1Buffers<T>& buffers, T* out, int64_t n) {
  measure_l1(x, x0, buffers.lengths.data(), buffers.caps.data(), n);
  shrink_all(x, x0, l1_threshold(buffers.lengths, buffers.caps, eps), out, n);
}

// Calls body(sample, its first element, buffers) for all samples, on all threads.
template <typename T, typename Body>
const char* for_each_sample_l1(const StepArguments<T>& a, const Body& body) {
  torch::stable::parallel_for(0, a.batch, std::max<int64_t>(1, kGrain / (8 * a.inner)),
                              [&](int64_t begin, int64_t end) {
                                L1Buffers<T> buffers(a.inner);
                                for (int64_t sample = begin; sample < end; ++sample)
                                  body(sample, sample * a.inner, buffers);
                              });
  return nullptr;
}

}  // namespace atop
