#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/images.h"
#include "common/keys.h"

namespace atop {
namespace {

// Calls body with null pointers to the storage types of the images and of the output.
template <typename Body>
void with_image_types(ScalarType in, ScalarType out, const Body& body) {
  if (in == ScalarType::Double) return body(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
  with_output_type(out, [&](auto* o) {
    if (in == ScalarType::Byte) return body(static_cast<uint8_t*>(nullptr), o);
    with_output_type(in, [&](auto* i) { body(i, o); });
  });
}

struct Outputs {
  Tensor y, live;
};

Outputs run(const char* function, const Tensor& x, const Tensor& blocks, const Tensor& sigma, const Tensor& seed,
            const Tensor& sample_ids, const Tensor& draws, int64_t patch, int64_t copies,
            const std::vector<int64_t>& size, ScalarType dtype, bool with_y, bool with_live) {
  const ScalarType given = x.scalar_type();
  ATOP_CHECK(is_float(given) || given == ScalarType::Byte, function, "x",
             "a uint8, float32, float64, bfloat16 or float16 tensor", dtype_text(given));
  ATOP_CHECK(x.dim() == 4, function, "x", "images of shape (B, C, H, W)", shape_text(x));
  const Key key = checked_key(function, seed, sample_ids, draws);
  const int64_t batch = x.size(0), channels = x.size(1);
  ATOP_CHECK(sample_ids.size(0) == batch, function, "sample_ids", text("of shape (", batch, ",)"),
             shape_text(sample_ids));
  check_per_sample(function, "sigma", sigma, ScalarType::Float, batch);
  check_on_device_of(function, "sigma", sigma, "x", x);
  check_on_device_of(function, "sample_ids", sample_ids, "x", x);
  ATOP_CHECK(size.size() == 2 && size[0] >= 1 && size[1] >= 1, function, "size", "two integers >= 1",
             size.size() == 2 ? text("(", size[0], ", ", size[1], ")") : text(size.size(), " integers"));
  ATOP_CHECK(x.size(2) >= 1 && x.size(3) >= 1, function, "x", "images of at least one pixel", shape_text(x));
  const bool last = is_channels_last(x);
  const Images images =
      checked_images(function, "x", x, blocks, batch, channels, size[0], size[1], patch, copies, last);
  ATOP_CHECK(is_float(dtype) && (dtype == ScalarType::Double) == (given == ScalarType::Double), function, "dtype",
             text("a floating-point type that goes with ", dtype_text(given), " images"), dtype_text(dtype));
  const int64_t sizes[3] = {batch, channels, with_live ? images.packed() : 0};
  Tensor live = torch::stable::empty({sizes, 3}, ScalarType::Byte, std::nullopt, x.device());
  Tensor y = with_y ? empty_images(x, batch * copies, channels + 2, size[0], size[1], dtype, last) : live;
  if (batch == 0) return {y, live};
  const Tensor dense_x = dense_images(x, last), owners = dense(blocks);
  with_image_types(given, dtype, [&](auto* in, auto* out) {
    using In = std::remove_pointer_t<decltype(in)>;
    using Out = std::remove_pointer_t<decltype(out)>;
    run_on_device_of(x, function, [&](void* stream) {
      return launch_corrupt(input<In>(dense_x), input<uint8_t>(owners), input<float>(sigma), per_sample_stride(sigma),
                            key, images, x.size(2), x.size(3), with_y ? output<Out>(y) : static_cast<Out*>(nullptr),
                            with_live ? output<uint8_t>(live) : nullptr, stream);
    });
  });
  return {y, live};
}

std::tuple<Tensor, Tensor> corrupt(const Tensor& x, const Tensor& blocks, const Tensor& sigma, const Tensor& seed,
                                   const Tensor& sample_ids, const Tensor& draws, int64_t patch, int64_t copies,
                                   std::vector<int64_t> size, ScalarType dtype, bool save) {
  const Outputs outputs =
      run("corrupt", x, blocks, sigma, seed, sample_ids, draws, patch, copies, size, dtype, true, save);
  return {outputs.y, outputs.live};
}

Tensor corrupt_live(const Tensor& x, const Tensor& blocks, const Tensor& sigma, const Tensor& seed,
                    const Tensor& sample_ids, const Tensor& draws, int64_t patch, int64_t copies,
                    std::vector<int64_t> size) {
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return run("corrupt_live", x, blocks, sigma, seed, sample_ids, draws, patch, copies, size, dtype, false, true).live;
}

Tensor corrupt_bwd(const Tensor& dy, const Tensor& live, const Tensor& blocks, int64_t patch, int64_t copies,
                   ScalarType dtype) {
  const char* const function = "corrupt_bwd";
  check_float_images(function, "dy", dy);
  ATOP_CHECK(is_float(dtype) && (dtype == ScalarType::Double) == (dy.scalar_type() == ScalarType::Double), function,
             "dtype", text("a floating-point type that goes with ", dtype_text(dy.scalar_type())), dtype_text(dtype));
  ATOP_CHECK(dy.size(1) >= 2, function, "dy", "of shape (B * copies, C + 2, H, W)", shape_text(dy));
  ATOP_CHECK(blocks.dim() == 2, function, "blocks", "of shape (B, blocks)", shape_text(blocks));
  const bool last = is_channels_last(dy);
  const int64_t batch = blocks.size(0), channels = dy.size(1) - 2;
  const Images images =
      checked_images(function, "dy", dy, blocks, batch, channels, dy.size(2), dy.size(3), patch, copies, last);
  ATOP_CHECK(dy.size(0) == batch * copies, function, "dy", text(batch * copies, " images"), text(dy.size(0)));
  ATOP_CHECK(live.scalar_type() == ScalarType::Byte, function, "live", "a uint8 tensor",
             dtype_text(live.scalar_type()));
  ATOP_CHECK(live.dim() == 3 && live.size(0) == batch && live.size(1) == channels && live.size(2) == images.packed(),
             function, "live", text("of shape (", batch, ", ", channels, ", ", images.packed(), ")"), shape_text(live));
  check_on_device_of(function, "live", live, "dy", dy);
  Tensor dx = empty_images(dy, batch, channels, dy.size(2), dy.size(3), dtype, last);
  if (dx.numel() == 0) return dx;
  const Tensor dense_dy = dense_images(dy, last), dense_live = dense(live), owners = dense(blocks);
  with_image_types(dy.scalar_type(), dtype, [&](auto* in, auto* out) {
    using Dy = std::remove_pointer_t<decltype(in)>;
    using Dx = std::remove_pointer_t<decltype(out)>;
    if constexpr (!std::is_same_v<Dy, uint8_t>) {
      run_on_device_of(dy, function, [&](void* stream) {
        return launch_corrupt_bwd(input<Dy>(dense_dy), input<uint8_t>(dense_live), input<uint8_t>(owners), images,
                                  output<Dx>(dx), stream);
      });
    }
  });
  return dx;
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("corrupt", TORCH_BOX(&atop::corrupt));
  m.impl("corrupt_live", TORCH_BOX(&atop::corrupt_live));
  m.impl("corrupt_bwd", TORCH_BOX(&atop::corrupt_bwd));
}
