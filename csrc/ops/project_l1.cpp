#include <torch/csrc/stable/library.h>

#include "common/steps.h"

namespace atop {
namespace {

Tensor project_l1(const Tensor& x, const Tensor& x0, double eps, std::optional<Tensor> epsilons) {
  const auto launch = [](const auto& arguments, void* stream) { return launch_project_l1(arguments, stream); };
  return step("project_l1", {x, x, x0, x}, pgd_numbers(0, eps, std::nullopt, epsilons), 1, launch);
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("project_l1", TORCH_BOX(&atop::project_l1));
}
