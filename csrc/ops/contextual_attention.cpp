#include <torch/csrc/stable/library.h>

#include "common/images.h"

namespace atop {
namespace {

Attention checked(const char* function, const Tensor& features, const Tensor& valid) {
  ATOP_CHECK(is_float(features.scalar_type()), function, "features", "a float32, float64, bfloat16 or float16 tensor",
             dtype_text(features.scalar_type()));
  const bool fits = features.dim() == 4 && features.size(2) > 0 && features.size(2) % 2 == 0 && features.size(3) > 0 &&
                    features.size(3) % 2 == 0;
  ATOP_CHECK(fits, function, "features", "of shape (B, C, h, w), h and w even", shape_text(features));
  const Attention size{features.size(0), features.size(1), features.size(2) / 2, features.size(3) / 2};
  ATOP_CHECK(valid.scalar_type() == ScalarType::Bool, function, "valid", "a bool tensor",
             dtype_text(valid.scalar_type()));
  ATOP_CHECK(
      valid.dim() == 3 && valid.size(0) == size.batch && valid.size(1) == size.rows && valid.size(2) == size.columns,
      function, "valid", text("of shape (", size.batch, ", ", size.rows, ", ", size.columns, ")"), shape_text(valid));
  ATOP_CHECK(valid.is_cpu() == features.is_cpu() && valid.get_device_index() == features.get_device_index(), function,
             "valid", text("on the device of features ", device_text(features)), device_text(valid));
  return size;
}

template <typename T>
Strided<T> strided(T* first, const Tensor& t) {
  return {first, {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

Tensor contextual_attention(const Tensor& features, const Tensor& valid) {
  const Attention size = checked("contextual_attention", features, valid);
  Tensor y = empty(features.sizes(), features, is_channels_last(features));
  if (y.numel() == 0) return y;
  const Tensor usable = dense(valid);
  with_float_or_half_type(features.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_on_device_of(features, "contextual_attention", [&](void* stream) {
      return launch_contextual_attention<T>(strided(input<T>(features), features), input<bool>(usable), size,
                                            strided(output<T>(y), y), stream);
    });
  });
  return y;
}

Tensor contextual_attention_bwd(const Tensor& dy, const Tensor& features, const Tensor& valid) {
  const Attention size = checked("contextual_attention_bwd", features, valid);
  Tensor dfeatures = empty(features.sizes(), features, is_channels_last(features));
  check_like("contextual_attention_bwd", "dy", dy, "y", dfeatures);
  if (dfeatures.numel() == 0) return dfeatures;
  const Tensor usable = dense(valid);
  with_float_or_half_type(features.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_on_device_of(features, "contextual_attention_bwd", [&](void* stream) {
      return launch_contextual_attention_bwd<T>(strided(input<T>(dy), dy), strided(input<T>(features), features),
                                                input<bool>(usable), size, strided(output<T>(dfeatures), dfeatures),
                                                stream);
    });
  });
  return dfeatures;
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("contextual_attention", TORCH_BOX(&atop::contextual_attention));
  m.impl("contextual_attention_bwd", TORCH_BOX(&atop::contextual_attention_bwd));
}
