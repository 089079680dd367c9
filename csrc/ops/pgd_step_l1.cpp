#include <torch/csrc/stable/library.h>

#include "common/steps.h"

namespace atop {
namespace {

Tensor pgd_step_l1(const Tensor& x, const Tensor& grad, const Tensor& x0, double alpha, double eps, int64_t k,
                   std::optional<Tensor> alphas, std::optional<Tensor> epsilons, std::optional<Tensor> ks) {
  constexpr const char* kFunction = "pgd_step_l1";
  PerSample<int64_t> number{nullptr, 0, k};
  if (ks) {
    check_per_sample(kFunction, "k", *ks, ScalarType::Long, samples_of(x));
    check_on_device_of(kFunction, "k", *ks, "x", x);
    number = {input<int64_t>(*ks), per_sample_stride(*ks), 0};
  } else {
    ATOP_CHECK(k >= 1, kFunction, "k", "an integer and >= 1", text(k));
  }
  const auto launch = [&](const auto& arguments, void* stream) {
    return launch_pgd_step_l1(arguments, number, stream);
  };
  return step(kFunction, {x, grad, x0, x}, pgd_numbers(alpha, eps, alphas, epsilons), 1, launch);
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("pgd_step_l1", TORCH_BOX(&atop::pgd_step_l1));
}
