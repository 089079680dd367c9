#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/images.h"
#include "math/gated.h"

namespace atop {
namespace {

void check_arguments(const char* function, const Tensor& h, const std::optional<Tensor>& bias, int64_t activation) {
  const ScalarType dtype = h.scalar_type();
  ATOP_CHECK(is_float(dtype), function, "h", "a float32, float64, bfloat16 or float16 tensor", dtype_text(dtype));
  ATOP_CHECK(h.dim() == 4 && h.size(1) % 2 == 0, function, "h", "of shape (B, 2C, H, W)", shape_text(h));
  ATOP_CHECK(activation == math::kElu || activation == math::kRelu, function, "activation", "0 or 1", text(activation));
  if (!bias) return;
  ATOP_CHECK(bias->scalar_type() == dtype || bias->scalar_type() == ScalarType::Float, function, "bias",
             text("of the dtype of h ", dtype_text(dtype), " or float32"), dtype_text(bias->scalar_type()));
  ATOP_CHECK(bias->dim() == 1 && bias->size(0) == h.size(1), function, "bias", text("of shape (", h.size(1), ",)"),
             shape_text(*bias));
  ATOP_CHECK(bias->is_cpu() == h.is_cpu() && bias->get_device_index() == h.get_device_index(), function, "bias",
             text("on the device of h ", device_text(h)), device_text(*bias));
}

std::array<int64_t, 4> output_sizes(const Tensor& h) {
  return {h.size(0), h.size(1) / 2, h.size(2), h.size(3)};
}

Gates gates_of(const Tensor& h, int64_t activation) {
  return {h.size(0), h.size(1) / 2, h.size(2) * h.size(3), is_channels_last(h), static_cast<int>(activation)};
}

ScalarType compute_type(const Tensor& h) {
  return h.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The one-dimensional `t`, dense and in `dtype`.
Tensor as_type(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return dense(t);
  const int64_t size[1] = {t.size(0)};
  Tensor copy = empty_contiguous({size, 1}, dtype, t);
  torch::stable::copy_(copy, t);
  return copy;
}

Tensor gated(const Tensor& h, std::optional<Tensor> bias, int64_t activation) {
  check_arguments("gated", h, bias, activation);
  const Gates size = gates_of(h, activation);
  Tensor y = empty(output_sizes(h), h, size.channels_last);
  if (y.numel() == 0) return y;
  const Tensor given = size.channels_last ? h : in_layout_of(h, empty(h.sizes(), h, false));
  const Tensor shift = bias ? as_type(*bias, compute_type(h)) : h;
  with_float_or_half_type(h.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = typename Compute<T>::type;
    run_on_device_of(h, "gated", [&](void* stream) {
      return launch_gated(input<T>(given), bias ? input<C>(shift) : nullptr, output<T>(y), size, stream);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> gated_bwd(const Tensor& dy, const Tensor& h, std::optional<Tensor> bias, int64_t activation,
                                     bool with_db) {
  check_arguments("gated_bwd", h, bias, activation);
  ATOP_CHECK(bias || !with_db, "gated_bwd", "with_db", "False without a bias", "True");
  const Gates size = gates_of(h, activation);
  // A model of the layout that dy must have; it is cheap, because its memory is never touched.
  const Tensor y = empty(output_sizes(h), h, size.channels_last);
  check_like("gated_bwd", "dy", dy, "y", y);
  Tensor dh = empty(h.sizes(), h, size.channels_last);
  const int64_t none[1] = {0}, channels[1] = {h.size(1)};
  Tensor db =
      with_db ? empty_contiguous({channels, 1}, compute_type(h), h) : empty_contiguous({none, 1}, h.scalar_type(), h);
  if (dh.numel() == 0) {
    torch::stable::zero_(db);
    return {dh, with_db ? as_type(db, bias->scalar_type()) : db};
  }
  const int64_t parts[1] = {with_db ? gated_parts(size) * h.size(1) : 0};
  const Tensor partials = with_db ? empty_contiguous({parts, 1}, compute_type(h), h) : db;
  const Tensor given_dy = in_layout_of(dy, y), given_h = in_layout_of(h, dh);
  const Tensor shift = bias ? as_type(*bias, compute_type(h)) : h;
  with_float_or_half_type(h.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = typename Compute<T>::type;
    run_on_device_of(h, "gated_bwd", [&](void* stream) {
      return launch_gated_bwd(input<T>(given_dy), input<T>(given_h), bias ? input<C>(shift) : nullptr, output<T>(dh),
                              with_db ? output<C>(partials) : nullptr, with_db ? output<C>(db) : nullptr, size, stream);
    });
  });
  return {dh, with_db ? as_type(db, bias->scalar_type()) : db};
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("gated", TORCH_BOX(&atop::gated));
  m.impl("gated_bwd", TORCH_BOX(&atop::gated_bwd));
}
