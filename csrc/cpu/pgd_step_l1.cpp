#include <functional>

#include "cpu/project_l1.h"

namespace atop {
namespace {

// |g|, finite
template <typename T>
ATOP_CLONES void magnitudes(const T* g, T* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T value = math::finite(g[i]);
    out[i] = value < T(0) ? -value : value;
  }
}

template <typename T>
ATOP_CLONES int64_t count_chosen(const T* magnitude, T least, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += magnitude[i] >= least && magnitude[i] > T(0);
  return count;
}

template <typename T>
ATOP_CLONES void move(const T* x, const T* g, const T* magnitude, T least, T alpha, T* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] + alpha * (magnitude[i] >= least ? math::sign(g[i]) : T(0));
}

// The k-th largest of `values`, using the buffer `room`.
template <typename T>
T kth_largest(const std::vector<T>& values, int64_t k, std::vector<T>& room) {
  if (k >= static_cast<int64_t>(values.size())) return T(0);
  room = values;
  const auto kth = room.begin() + (std::max<int64_t>(k, 1) - 1);
  std::nth_element(room.begin(), kth, room.end(), std::greater<T>());
  return *kth;
}

}  // namespace

template <typename T>
const char* launch_pgd_step_l1(const StepArguments<T>& a, PerSample<int64_t> k, void*) {
  return for_each_sample_l1(a, [&](int64_t sample, int64_t begin, L1Buffers<T>& b) {
    const T *x = a.x + begin, *g = a.grad + begin;
    if (a.draws > 1) {
      sum_draws(g, a.draws, a.draw_stride, b.gradient.data(), a.inner);
      g = b.gradient.data();
    }
    magnitudes(g, b.lengths.data(), a.inner);
    const T least = kth_largest(b.lengths, k[sample], b.caps);
    const int64_t count = count_chosen(b.lengths.data(), least, a.inner);
    const T alpha = a.alpha[sample] / static_cast<T>(std::max<int64_t>(count, 1));
    move(x, g, b.lengths.data(), least, alpha, b.moved.data(), a.inner);
    project_sample_l1(b.moved.data(), a.x0 + begin, a.eps[sample], b, a.out + begin, a.inner);
  });
}

template const char* launch_pgd_step_l1(const StepArguments<float>&, PerSample<int64_t>, void*);
template const char* launch_pgd_step_l1(const StepArguments<double>&, PerSample<int64_t>, void*);

}  // namespace atop
