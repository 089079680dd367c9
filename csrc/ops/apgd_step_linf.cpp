#include "math/apgd_step_linf.h"

#include <torch/csrc/stable/library.h>

#include "common/steps.h"

namespace atop {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor apgd_step_linf(const Tensor& x, const Tensor& x_prev, const Tensor& grad, const Tensor& x0, double alpha,
                      double eps, double momentum, OptionalTensor alphas, OptionalTensor epsilons,
                      OptionalTensor momenta) {
  const StepNumbers numbers{
      {"alpha", alpha, alphas, -INFINITY}, {"eps", eps, epsilons, 0}, {"momentum", momentum, momenta, -INFINITY}};
  const auto launch = [](const auto& arguments, void* stream) { return launch_apgd_step_linf(arguments, stream); };
  return step("apgd_step_linf", {x, grad, x0, x_prev}, numbers, math::ApgdStepLinf<float>::kNorms, launch);
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("apgd_step_linf", TORCH_BOX(&atop::apgd_step_linf));
}
