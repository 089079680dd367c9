#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <utility>

#include "common/images.h"

namespace atop {
namespace {

// Products of sizes with a larger dilation could overflow.
void check_dilation(const char* function, int64_t dilation) {
  ATOP_CHECK(dilation >= 1 && dilation <= 65535, function, "dilation", "an integer and in [1, 65535]", text(dilation));
}

// The tensors of a ConvFusion.
struct Extras {
  std::optional<Tensor> mask, bias, residual;
  bool relu = false;
};

// A view of the weights (outputs, channels, 3, 3); for the gradient in x, transposed and flipped.
struct Weight {
  const char* function;
  const float* first;
  int64_t strides[4], outputs, channels;

  Weight(const char* function, const Tensor& t, bool transposed) : function(function) {
    check_floats(function, "weight", t);
    const bool fits = t.dim() == 4 && t.size(0) > 0 && t.size(1) > 0 && t.size(2) == 3 && t.size(3) == 3;
    ATOP_CHECK(fits, function, "weight", "of shape (O, C, 3, 3), O and C >= 1", shape_text(t));
    first = input<float>(t);
    outputs = t.size(0);
    channels = t.size(1);
    for (int i = 0; i < 4; ++i) strides[i] = t.stride(i);
    if (!transposed) return;
    std::swap(outputs, channels);
    std::swap(strides[0], strides[1]);
    for (int i : {2, 3}) {
      first += 2 * strides[i];
      strides[i] = -strides[i];
    }
  }

  std::array<int64_t, 4> prepared_sizes() const {
    return {36, (outputs + kConvPanel - 1) / kConvPanel, channels, kConvPanel};
  }

  Tensor prepare(const Tensor& like) const {
    Tensor prepared = empty(prepared_sizes(), like, false);
    if (prepared.numel() == 0) return prepared;
    run_on_device_of(like, function, [&](void* stream) {
      return launch_conv3x3_prepare(first, strides, outputs, channels, output<float>(prepared), stream);
    });
    return prepared;
  }

  Tensor checked(const char* argument, const Tensor& prepared) const {
    check_sizes(function, argument, prepared, prepared_sizes());
    return dense(prepared);
  }

  Tensor convolve(const Tensor& x, const Tensor& prepared, const Extras& extras, int64_t dilation) const {
    const bool last = is_channels_last(x);
    const std::array<int64_t, 4> sizes{x.size(0), outputs, x.size(2), x.size(3)};
    // The kernel works in channels_last; other layouts are copied to it and back.
    Tensor y = empty(sizes, x, true);
    if (y.numel() == 0) return last ? y : empty(sizes, x, false);
    const Tensor pixels = last ? x : in_layout_of(x, empty(x.sizes(), x, true));
    const Tensor mask = extras.mask ? in_layout_of(*extras.mask, pixels) : x;
    const Tensor residual = extras.residual ? in_layout_of(*extras.residual, y) : x;
    const Tensor shift = extras.bias ? dense(*extras.bias) : x;
    const ConvFusion fusion{extras.mask ? input<float>(mask) : nullptr, extras.bias ? input<float>(shift) : nullptr,
                            extras.residual ? input<float>(residual) : nullptr, extras.relu};
    const Conv3x3 size{x.size(0), channels, outputs, x.size(2), x.size(3), dilation};
    run_on_device_of(x, function, [&](void* stream) {
      return launch_conv3x3(input<float>(pixels), input<float>(prepared), fusion, size, output<float>(y), stream);
    });
    return last ? y : in_layout_of(y, empty(sizes, x, false));
  }

  void check_images(const char* argument, const Tensor& x, int64_t dilation) const {
    check_floats(function, argument, x);
    const bool fits = x.dim() == 4 && x.size(1) == channels && x.size(2) > 0 && x.size(3) > 0;
    ATOP_CHECK(fits, function, argument, text("of shape (B, ", channels, ", H, W), H and W >= 1"), shape_text(x));
    check_dilation(function, dilation);
  }
};

Tensor conv3x3_prepare(const Tensor& weight, bool transposed) {
  return Weight("conv3x3_prepare", weight, transposed).prepare(weight);
}

Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& prepared, const std::optional<Tensor>&, int64_t dilation,
               const std::optional<Tensor>& residual, bool relu) {
  const Weight weights("conv3x3", weight, false);
  weights.check_images("x", x, dilation);
  if (bias) {
    check_floats("conv3x3", "bias", *bias);
    ATOP_CHECK(bias->dim() == 1 && bias->size(0) == weights.outputs, "conv3x3", "bias",
               text("of shape (", weights.outputs, ",)"), shape_text(*bias));
  }
  if (residual) check_sizes("conv3x3", "residual", *residual, {x.size(0), weights.outputs, x.size(2), x.size(3)});
  const Tensor ready = prepared ? weights.checked("prepared", *prepared) : weights.prepare(weight);
  return weights.convolve(x, ready, {std::nullopt, bias, residual, relu}, dilation);
}

Tensor conv3x3_bwd(const Tensor& dy, const Tensor& weight, const std::optional<Tensor>& prepared, int64_t dilation,
                   const std::optional<Tensor>& y) {
  const Weight weights("conv3x3_bwd", weight, true);
  weights.check_images("dy", dy, dilation);
  if (y) check_sizes("conv3x3_bwd", "y", *y, {dy.size(0), dy.size(1), dy.size(2), dy.size(3)});
  const Tensor ready = prepared ? weights.checked("prepared", *prepared) : weights.prepare(weight);
  return weights.convolve(dy, ready, {y, std::nullopt, std::nullopt, false}, dilation);
}

Tensor conv3x3_bwd_weight(const Tensor& dy, const Tensor& x, int64_t dilation) {
  constexpr const char* kFunction = "conv3x3_bwd_weight";
  check_floats(kFunction, "dy", dy);
  check_floats(kFunction, "x", x);
  ATOP_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, kFunction, "x",
             "of shape (B, C, H, W), C, H and W >= 1", shape_text(x));
  const bool fits =
      dy.dim() == 4 && dy.size(0) == x.size(0) && dy.size(2) == x.size(2) && dy.size(3) == x.size(3) && dy.size(1) > 0;
  ATOP_CHECK(fits, kFunction, "dy", text("of shape (", x.size(0), ", O, ", x.size(2), ", ", x.size(3), "), O >= 1"),
             shape_text(dy));
  check_dilation(kFunction, dilation);
  const std::array<int64_t, 4> sizes{dy.size(1), x.size(1), 3, 3};
  Tensor dw = empty(sizes, x, false);
  if (dw.numel() == 0) return dw;
  if (x.numel() == 0) return torch::stable::zero_(dw);
  const Tensor pixels = in_layout_of(x, empty(x.sizes(), x, true));
  const Tensor gradient = in_layout_of(dy, empty(dy.sizes(), dy, true));
  const Conv3x3 size{x.size(0), x.size(1), dy.size(1), x.size(2), x.size(3), dilation};
  run_on_device_of(x, kFunction, [&](void* stream) {
    return launch_conv3x3_bwd_weight(input<float>(gradient), input<float>(pixels), size, output<float>(dw), stream);
  });
  return dw;
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("conv3x3_prepare", TORCH_BOX(&atop::conv3x3_prepare));
  m.impl("conv3x3", TORCH_BOX(&atop::conv3x3));
  m.impl("conv3x3_bwd", TORCH_BOX(&atop::conv3x3_bwd));
  m.impl("conv3x3_bwd_weight", TORCH_BOX(&atop::conv3x3_bwd_weight));
}
