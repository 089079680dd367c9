#include "cpu/project_l1.h"

#include <torch/csrc/stable/library.h>

#include "common/steps.h"

// The host side is in this file instead of csrc/ops, because the op has no CUDA kernel.
namespace atop {
namespace {

template <typename T>
const char* launch_project_l1(const StepArguments<T>& a) {
  return for_each_sample_l1(a, [&](int64_t sample, int64_t begin, L1Buffers<T>& buffers) {
    project_sample_l1(a.x + begin, a.x0 + begin, a.eps[sample], buffers, a.out + begin, a.inner);
  });
}

Tensor project_l1(const Tensor& x, const Tensor& x0, double eps, std::optional<Tensor> epsilons) {
  const auto launch = [](const auto& arguments, void*) { return launch_project_l1(arguments); };
  return step("project_l1", {x, x, x0, x}, pgd_numbers(0, eps, std::nullopt, epsilons), 1, launch);
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, CPU, m) {
  m.impl("project_l1", TORCH_BOX(&atop::project_l1));
}
