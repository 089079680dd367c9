#include <torch/csrc/stable/library.h>

#include <cmath>

#include "common/launchers.h"
#include "common/tensors.h"

namespace atop {
namespace {

void check_arguments(const char* function, const Tensor& x, const Tensor& grad, const Tensor& x0, double alpha,
                     double eps) {
  const ScalarType dtype = x.scalar_type();
  ATOP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, function, "x", "a float32 or float64 tensor",
             dtype_text(dtype));
  check_like(function, "grad", grad, "x", x);
  check_like(function, "x0", x0, "x", x);
  ATOP_CHECK(std::isfinite(alpha), function, "alpha", "finite", text(alpha));
  ATOP_CHECK(std::isfinite(eps) && eps >= 0, function, "eps", "finite and >= 0", text(eps));
}

// Whether the bytes between the first and the last element of `a` and `b` meet.
bool may_overlap(const Tensor& a, const Tensor& b) {
  const auto end = [](const Tensor& t) {
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    return static_cast<const char*>(t.const_data_ptr()) + (last + 1) * static_cast<int64_t>(t.element_size());
  };
  return a.const_data_ptr() < end(b) && b.const_data_ptr() < end(a);
}

// All four tensors have one layout without gaps, so that the order of the elements does not matter.
void run(const Tensor& x, const Tensor& grad, const Tensor& x0, const Tensor& out, double alpha, double eps) {
  with_float_type(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_on_device_of(x, "pgd_step_linf", [&](void* stream) {
      return launch_pgd_step_linf(input<T>(x), input<T>(grad), input<T>(x0), output<T>(out), x.numel(), T(alpha),
                                  T(eps), stream);
    });
  });
}

Tensor pgd_step_linf(const Tensor& x, const Tensor& grad, const Tensor& x0, double alpha, double eps) {
  check_arguments("pgd_step_linf", x, grad, x0, alpha, eps);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel()) run(in_layout_of(x, out), in_layout_of(grad, out), in_layout_of(x0, out), out, alpha, eps);
  return out;
}

void pgd_step_linf_(Tensor x, const Tensor& grad, const Tensor& x0, double alpha, double eps) {
  check_arguments("pgd_step_linf_", x, grad, x0, alpha, eps);
  if (x.numel() == 0) return;
  ATOP_CHECK(!may_overlap(x, grad), "pgd_step_linf_", "grad", "a tensor that shares no memory with x", "one that does");
  ATOP_CHECK(!may_overlap(x, x0), "pgd_step_linf_", "x0", "a tensor that shares no memory with x", "one that does");
  if (x.is_contiguous() || is_channels_last(x)) {
    run(x, in_layout_of(grad, x), in_layout_of(x0, x), x, alpha, eps);
  } else {
    torch::stable::copy_(x, pgd_step_linf(x, grad, x0, alpha, eps));
  }
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("pgd_step_linf", TORCH_BOX(&atop::pgd_step_linf));
  m.impl("pgd_step_linf_", TORCH_BOX(&atop::pgd_step_linf_));
}
