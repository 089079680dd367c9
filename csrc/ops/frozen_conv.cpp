#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>

#include "common/images.h"

namespace atop {
namespace {

using Sizes = std::array<int64_t, 4>;

// The checks of both directions: the channels of `t` are the second axis of weight, or the first if transposed.
void check_arguments(const char* function, const char* argument, const Tensor& t, const Tensor& weight, int64_t stride,
                     int64_t padding, bool transposed) {
  check_floats(function, argument, t);
  check_floats(function, "weight", weight);
  ATOP_CHECK(weight.dim() == 4, function, "weight", "of shape (O, C, K, L)", shape_text(weight));
  const int64_t channels = weight.size(transposed ? 0 : 1);
  ATOP_CHECK(t.dim() == 4 && t.size(1) == channels, function, argument, text("of shape (B, ", channels, ", H, W)"),
             shape_text(t));
  ATOP_CHECK(stride >= 1, function, "stride", "an integer and >= 1", text(stride));
  ATOP_CHECK(padding >= 0, function, "padding", "an integer and >= 0", text(padding));
}

Tensor checked_prepared(const char* function, const char* argument, const Tensor& prepared, int64_t count) {
  check_floats(function, argument, prepared);
  ATOP_CHECK(prepared.numel() == count, function, argument, text("of ", count, " numbers"), text(prepared.numel()));
  return dense(prepared);
}

int64_t convolved(int64_t size, int64_t weights, int64_t stride, int64_t padding) {
  return (size + 2 * padding - weights) / stride + 1;
}

Tensor frozen_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& prepared,
                   const Tensor&, int64_t stride, int64_t padding, const std::optional<Tensor>& residual, bool relu) {
  constexpr const char* kFunction = "frozen_conv";
  check_arguments(kFunction, "x", x, weight, stride, padding, false);
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  const bool fits = x.size(2) + 2 * padding >= weight.size(2) && x.size(3) + 2 * padding >= weight.size(3);
  ATOP_CHECK(fits, kFunction, "x", "of images as large as the weights", shape_text(x));
  const Sizes sizes{x.size(0), outputs, convolved(x.size(2), weight.size(2), stride, padding),
                    convolved(x.size(3), weight.size(3), stride, padding)};
  if (bias) {
    check_floats(kFunction, "bias", *bias);
    ATOP_CHECK(bias->dim() == 1 && bias->size(0) == outputs, kFunction, "bias", text("of shape (", outputs, ",)"),
               shape_text(*bias));
  }
  if (residual) check_sizes(kFunction, "residual", *residual, sizes);
  Tensor y = empty(sizes, x, true);
  if (y.numel() == 0) return y;
  const bool last = is_channels_last(x);
  const Tensor pixels = last ? x : dense(x), added = residual ? in_layout_of(*residual, y) : x;
  const Tensor shift = bias ? dense(*bias) : x;
  const ConvFusion fusion{nullptr, bias ? input<float>(shift) : nullptr, residual ? input<float>(added) : nullptr,
                          relu};
  const StridedConv size{x.size(0),      channels,       outputs, x.size(2), x.size(3), sizes[2], sizes[3],
                         weight.size(2), weight.size(3), stride,  padding,   false,     last,     true};
  const Tensor ready = checked_prepared(kFunction, "prepared", prepared, frozen_conv_weights(size));
  run_on_device_of(x, kFunction, [&](void* stream) {
    return launch_frozen_conv(input<float>(pixels), input<float>(ready), fusion, size, output<float>(y), stream);
  });
  return y;
}

Tensor frozen_conv_bwd(const Tensor& dy, const Tensor& weight, const Tensor& prepared_t, int64_t height, int64_t width,
                       int64_t stride, int64_t padding, bool channels_last, const std::optional<Tensor>& y) {
  constexpr const char* kFunction = "frozen_conv_bwd";
  check_arguments(kFunction, "dy", dy, weight, stride, padding, true);
  const int64_t channels = weight.size(1);
  const Sizes sizes{dy.size(0), channels, height, width};
  check_sizes(kFunction, "dy", dy,
              {dy.size(0), weight.size(0), convolved(height, weight.size(2), stride, padding),
               convolved(width, weight.size(3), stride, padding)});
  if (y) check_sizes(kFunction, "y", *y, {dy.size(0), dy.size(1), dy.size(2), dy.size(3)});
  Tensor dx = empty(sizes, dy, channels_last);
  if (dx.numel() == 0) return dx;
  const Tensor model = is_channels_last(dy) ? dy : empty(dy.sizes(), dy, true);
  const Tensor pixels = in_layout_of(dy, model), mask = y ? in_layout_of(*y, model) : dy;
  const ConvFusion fusion{y ? input<float>(mask) : nullptr, nullptr, nullptr, false};
  const StridedConv size{dy.size(0),     weight.size(0), channels, dy.size(2), dy.size(3), height, width,
                         weight.size(2), weight.size(3), stride,   padding,    true,       true,   channels_last};
  const Tensor ready = checked_prepared(kFunction, "prepared_t", prepared_t, frozen_conv_weights(size));
  run_on_device_of(dy, kFunction, [&](void* stream) {
    return launch_frozen_conv(input<float>(pixels), input<float>(ready), fusion, size, output<float>(dx), stream);
  });
  return dx;
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("frozen_conv", TORCH_BOX(&atop::frozen_conv));
  m.impl("frozen_conv_bwd", TORCH_BOX(&atop::frozen_conv_bwd));
}
