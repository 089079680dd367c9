#include <torch/csrc/stable/library.h>

#include "common/launchers.h"
#include "common/tensors.h"

namespace atop {
namespace {

Tensor hyperplane_step(const Tensor& x, const Tensor& w, const Tensor& change, bool l2) {
  constexpr const char* kFunction = "hyperplane_step";
  ATOP_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, kFunction, "x",
             "a float32 or float64 tensor", dtype_text(x.scalar_type()));
  ATOP_CHECK(x.dim() == 2, kFunction, "x", "of shape (B, n)", shape_text(x));
  const int64_t batch = x.size(0), n = x.size(1);
  ATOP_CHECK(w.dim() == 2 && w.size(0) == batch && w.size(1) == n && w.scalar_type() == x.scalar_type(), kFunction, "w",
             text("of dtype and shape of x, (", batch, ", ", n, ")"), shape_text(w));
  ATOP_CHECK(change.dim() == 1 && change.size(0) == batch && change.scalar_type() == x.scalar_type(), kFunction,
             "change", text("of dtype of x and shape (", batch, ",)"), shape_text(change));
  const Tensor points = torch::stable::contiguous(x), normals = torch::stable::contiguous(w),
               changes = torch::stable::contiguous(change);
  const int64_t sizes[2] = {batch, n};
  Tensor steps = empty_contiguous({sizes, 2}, x.scalar_type(), x);
  if (steps.numel() == 0) return steps;
  with_float_type(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_on_device_of(x, kFunction, [&](void* stream) {
      return launch_hyperplane_step(input<T>(points), input<T>(normals), input<T>(changes), l2, batch, n,
                                    output<T>(steps), stream);
    });
  });
  return steps;
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("hyperplane_step", TORCH_BOX(&atop::hyperplane_step));
}
