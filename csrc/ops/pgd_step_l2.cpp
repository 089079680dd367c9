#include "math/pgd_step_l2.h"

#include <torch/csrc/stable/library.h>

#include "common/steps.h"

namespace atop {
namespace {

using OptionalTensor = std::optional<Tensor>;
constexpr int kNorms = math::PgdStepL2<float>::kNorms;
const auto kLaunch = [](const auto& arguments, void* stream) { return launch_pgd_step_l2(arguments, stream); };

Tensor pgd_step_l2(const Tensor& x, const Tensor& grad, const Tensor& x0, double alpha, double eps,
                   OptionalTensor alphas, OptionalTensor epsilons) {
  return step("pgd_step_l2", {x, grad, x0, x}, pgd_numbers(alpha, eps, alphas, epsilons), kNorms, kLaunch);
}

void pgd_step_l2_(const Tensor& x, const Tensor& grad, const Tensor& x0, double alpha, double eps,
                  OptionalTensor alphas, OptionalTensor epsilons) {
  step_in_place("pgd_step_l2_", {x, grad, x0, x}, pgd_numbers(alpha, eps, alphas, epsilons), kNorms, kLaunch);
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("pgd_step_l2", TORCH_BOX(&atop::pgd_step_l2));
  m.impl("pgd_step_l2_", TORCH_BOX(&atop::pgd_step_l2_));
}
