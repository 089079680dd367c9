#include "math/pgd_step_linf.h"

#include <torch/csrc/stable/library.h>

#include "common/steps.h"

namespace atop {
namespace {

using OptionalTensor = std::optional<Tensor>;
constexpr int kNorms = math::PgdStepLinf<float>::kNorms;
const auto kLaunch = [](const auto& arguments, void* stream) { return launch_pgd_step_linf(arguments, stream); };

Tensor pgd_step_linf(const Tensor& x, const Tensor& grad, const Tensor& x0, double alpha, double eps,
                     OptionalTensor alphas, OptionalTensor epsilons) {
  return step("pgd_step_linf", {x, grad, x0, x}, pgd_numbers(alpha, eps, alphas, epsilons), kNorms, kLaunch);
}

void pgd_step_linf_(const Tensor& x, const Tensor& grad, const Tensor& x0, double alpha, double eps,
                    OptionalTensor alphas, OptionalTensor epsilons) {
  step_in_place("pgd_step_linf_", {x, grad, x0, x}, pgd_numbers(alpha, eps, alphas, epsilons), kNorms, kLaunch);
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("pgd_step_linf", TORCH_BOX(&atop::pgd_step_linf));
  m.impl("pgd_step_linf_", TORCH_BOX(&atop::pgd_step_linf_));
}
