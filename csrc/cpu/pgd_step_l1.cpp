#include <torch/csrc/stable/library.h>

#include <functional>

#include "common/steps.h"
#include "cpu/project_l1.h"

// The host side is in this file instead of csrc/ops, because the op has no CUDA kernel.
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

template <typename T>
const char* launch_pgd_step_l1(const StepArguments<T>& a, const int64_t* ks, int64_t k_stride, int64_t k) {
  return for_each_sample_l1(a, [&](int64_t sample, int64_t begin, L1Buffers<T>& b) {
    const T *x = a.x + begin, *g = a.grad + begin;
    if (a.draws > 1) {
      sum_draws(g, a.draws, a.draw_stride, b.gradient.data(), a.inner);
      g = b.gradient.data();
    }
    magnitudes(g, b.lengths.data(), a.inner);
    const T least = kth_largest(b.lengths, ks ? ks[sample * k_stride] : k, b.caps);
    const int64_t count = count_chosen(b.lengths.data(), least, a.inner);
    const T alpha = a.alpha[sample] / static_cast<T>(std::max<int64_t>(count, 1));
    move(x, g, b.lengths.data(), least, alpha, b.moved.data(), a.inner);
    project_sample_l1(b.moved.data(), a.x0 + begin, a.eps[sample], b, a.out + begin, a.inner);
  });
}

Tensor pgd_step_l1(const Tensor& x, const Tensor& grad, const Tensor& x0, double alpha, double eps, int64_t k,
                   std::optional<Tensor> alphas, std::optional<Tensor> epsilons, std::optional<Tensor> ks) {
  const char* const function = "pgd_step_l1";
  if (ks) {
    check_per_sample(function, "k", *ks, ScalarType::Long, samples_of(x));
    check_on_device_of(function, "k", *ks, "x", x);
  } else {
    ATOP_CHECK(k >= 1, function, "k", "an integer and >= 1", text(k));
  }
  const auto launch = [&](const auto& arguments, void*) {
    return launch_pgd_step_l1(arguments, ks ? input<int64_t>(*ks) : nullptr, ks ? per_sample_stride(*ks) : 0, k);
  };
  return step(function, {x, grad, x0, x}, pgd_numbers(alpha, eps, alphas, epsilons), 1, launch);
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, CPU, m) {
  m.impl("pgd_step_l1", TORCH_BOX(&atop::pgd_step_l1));
}
