#include <torch/csrc/stable/library.h>

#include "common/images.h"

namespace atop {
namespace {

Tensor assemble(const Tensor& copies, const Tensor& blocks, int64_t patch) {
  const char* const function = "assemble";
  check_float_images(function, "copies", copies);
  ATOP_CHECK(blocks.dim() == 2, function, "blocks", "of shape (B, blocks)", shape_text(blocks));
  const int64_t batch = blocks.size(0), channels = copies.size(1);
  const int64_t number = batch ? copies.size(0) / batch : 1;
  ATOP_CHECK(number >= 1 && copies.size(0) == batch * number, function, "copies",
             text("of shape (B * N, C, H, W) for B = ", batch), shape_text(copies));
  const bool last = is_channels_last(copies);
  Tensor y = empty_images(copies, batch, channels, copies.size(2), copies.size(3), copies.scalar_type(), last);
  const Images images = checked_images(function, "copies", copies, blocks, batch, channels, copies.size(2),
                                       copies.size(3), patch, number, last);
  if (y.numel() == 0) return y;
  const Tensor dense_copies = dense_images(copies, last), owners = dense(blocks);
  with_float_or_half_type(copies.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_on_device_of(copies, function, [&](void* stream) {
      return launch_assemble(input<T>(dense_copies), input<uint8_t>(owners), images, output<T>(y), stream);
    });
  });
  return y;
}

Tensor assemble_bwd(const Tensor& dy, const Tensor& blocks, int64_t patch, int64_t copies) {
  const char* const function = "assemble_bwd";
  check_float_images(function, "dy", dy);
  const bool last = is_channels_last(dy);
  const int64_t batch = dy.size(0), channels = dy.size(1);
  const Images images =
      checked_images(function, "dy", dy, blocks, batch, channels, dy.size(2), dy.size(3), patch, copies, last);
  Tensor dcopies = empty_images(dy, batch * copies, channels, dy.size(2), dy.size(3), dy.scalar_type(), last);
  if (dcopies.numel() == 0) return dcopies;
  const Tensor dense_dy = dense_images(dy, last), owners = dense(blocks);
  with_float_or_half_type(dy.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_on_device_of(dy, function, [&](void* stream) {
      return launch_assemble_bwd(input<T>(dense_dy), input<uint8_t>(owners), images, output<T>(dcopies), stream);
    });
  });
  return dcopies;
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("assemble", TORCH_BOX(&atop::assemble));
  m.impl("assemble_bwd", TORCH_BOX(&atop::assemble_bwd));
}
