#pragma once
// Images in blocks, as received by corrupt and assemble.

#include <array>

#include "common/launchers.h"
#include "common/tensors.h"

namespace atop {

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

inline void check_float_images(const char* function, const char* argument, const Tensor& t) {
  ATOP_CHECK(is_float(t.scalar_type()), function, argument, "a float32, float64, bfloat16 or float16 tensor",
             dtype_text(t.scalar_type()));
  ATOP_CHECK(t.dim() == 4, function, argument, "images of shape (B, C, H, W)", shape_text(t));
}

// The check for ops that only have float32 kernels for CPUs.
inline void check_floats(const char* function, const char* argument, const Tensor& t) {
  ATOP_CHECK(t.scalar_type() == ScalarType::Float, function, argument, "a float32 tensor", dtype_text(t.scalar_type()));
  ATOP_CHECK(t.is_cpu(), function, argument, "on the CPU", device_text(t));
}

inline void check_sizes(const char* function, const char* argument, const Tensor& t,
                        const std::array<int64_t, 4>& sizes) {
  check_floats(function, argument, t);
  bool fits = t.dim() == 4;
  for (int i = 0; fits && i < 4; ++i) fits = t.size(i) == sizes[i];
  ATOP_CHECK(fits, function, argument,
             text("of shape (", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3], ")"), shape_text(t));
}

// `owners` must be the blocks of `batch` images of height x width, on the device of `model`.
inline Images checked_images(const char* function, const char* argument, const Tensor& model, const Tensor& owners,
                             int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t patch,
                             int64_t copies, bool channels_last) {
  ATOP_CHECK(owners.scalar_type() == ScalarType::Byte, function, "blocks", "a uint8 tensor",
             dtype_text(owners.scalar_type()));
  ATOP_CHECK(patch >= 1 && height % patch == 0 && width % patch == 0, function, argument,
             text("of a height and width divisible by patch=", patch), text(height, " x ", width));
  const int64_t count = (height / patch) * (width / patch);
  ATOP_CHECK(owners.dim() == 2 && owners.size(1) == count, function, "blocks", text("of shape (B, ", count, ")"),
             shape_text(owners));
  ATOP_CHECK(owners.size(0) == batch, function, "blocks", text("of ", batch, " samples"), text(owners.size(0)));
  ATOP_CHECK(owners.is_cpu() == model.is_cpu() && owners.get_device_index() == model.get_device_index(), function,
             "blocks", text("on the device of ", argument, " ", device_text(model)), device_text(owners));
  ATOP_CHECK(copies >= 1 && copies <= 255, function, "copies", "an integer and in [1, 255]", text(copies));
  return {batch, channels, height, width, patch, static_cast<int>(copies), channels_last};
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor empty_images(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width,
                           ScalarType dtype, bool channels_last) {
  const int64_t sizes[4] = {batch, channels, height, width};
  return torch::stable::empty({sizes, 4}, dtype, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// `t` as a dense tensor, channels_last or contiguous; torch makes the copy if one is needed.
inline Tensor dense_images(const Tensor& t, bool channels_last) {
  if (channels_last || t.is_contiguous()) return t;
  return in_layout_of(t, empty(t.sizes(), t, false));
}

}  // namespace atop
