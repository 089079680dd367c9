#include <torch/csrc/stable/library.h>

#include <array>

#include "common/launchers.h"
#include "common/tensors.h"

namespace atop {
namespace {

void check_h(const char* function, const Tensor& h) {
  const ScalarType dtype = h.scalar_type();
  ATOP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                 dtype == ScalarType::Half,
             function, "h", "a float32, float64, bfloat16 or float16 tensor", dtype_text(dtype));
  ATOP_CHECK(h.dim() == 4 && h.size(1) % 2 == 0, function, "h", "of shape (B, 2C, H, W)", shape_text(h));
}

// h as rows of [f | g]: images in NCHW, pixels in channels_last.
struct Rows {
  bool channels_last;
  int64_t count, inner;

  explicit Rows(const Tensor& h) : channels_last(is_channels_last(h)) {
    const int64_t channels = h.size(1) / 2, pixels = h.size(2) * h.size(3);
    count = channels_last ? h.size(0) * pixels : h.size(0);
    inner = channels_last ? channels : channels * pixels;
  }
};

Tensor gated_elu(const Tensor& h) {
  check_h("gated_elu", h);
  const Rows rows(h);
  const std::array<int64_t, 4> sizes{h.size(0), h.size(1) / 2, h.size(2), h.size(3)};
  Tensor y = empty(sizes, h, rows.channels_last);
  if (y.numel() == 0) return y;
  const Tensor dense = rows.channels_last ? h : in_layout_of(h, empty(h.sizes(), h, false));
  with_float_or_half_type(h.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_on_device_of(h, "gated_elu", [&](void* stream) {
      return launch_gated_elu(input<T>(dense), output<T>(y), rows.count, rows.inner, stream);
    });
  });
  return y;
}

Tensor gated_elu_bwd(const Tensor& dy, const Tensor& h) {
  check_h("gated_elu_bwd", h);
  const Rows rows(h);
  const std::array<int64_t, 4> sizes{h.size(0), h.size(1) / 2, h.size(2), h.size(3)};
  // The model of the layout that dy must have; it is cheap, as nothing touches its memory.
  const Tensor y = empty(sizes, h, rows.channels_last);
  check_like("gated_elu_bwd", "dy", dy, "y", y);
  Tensor dh = empty(h.sizes(), h, rows.channels_last);
  if (dh.numel() == 0) return dh;
  const Tensor dense_dy = in_layout_of(dy, y), dense_h = in_layout_of(h, dh);
  with_float_or_half_type(h.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_on_device_of(h, "gated_elu_bwd", [&](void* stream) {
      return launch_gated_elu_bwd(input<T>(dense_dy), input<T>(dense_h), output<T>(dh), rows.count, rows.inner, stream);
    });
  });
  return dh;
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("gated_elu", TORCH_BOX(&atop::gated_elu));
  m.impl("gated_elu_bwd", TORCH_BOX(&atop::gated_elu_bwd));
}
