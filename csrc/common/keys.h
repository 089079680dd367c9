#pragma once
// The key of sample-keyed randomness, as received by ops.

#include "common/launchers.h"
#include "common/tensors.h"

namespace atop {

inline void check_on_device_of(const char* function, const char* argument, const Tensor& t, const char* model_name,
                               const Tensor& model) {
  ATOP_CHECK(t.is_cpu() == model.is_cpu() && t.get_device_index() == model.get_device_index(), function, argument,
             text("on the device of ", model_name, " ", device_text(model)), device_text(t));
}

// `t` must be `dtype` of shape () or (batch,).
inline void check_per_sample(const char* function, const char* argument, const Tensor& t, ScalarType dtype,
                             int64_t batch) {
  ATOP_CHECK(t.scalar_type() == dtype, function, argument,
             dtype == ScalarType::Long ? "an int64 tensor" : "a float32 tensor", dtype_text(t.scalar_type()));
  ATOP_CHECK(t.dim() == 0 || (t.dim() == 1 && t.size(0) == batch), function, argument,
             text("of shape () or (", batch, ",)"), shape_text(t));
}

inline int64_t per_sample_stride(const Tensor& t) {
  return t.dim() == 0 ? 0 : t.stride(0);
}

// Checks the key and returns pointers to it.
inline Key checked_key(const char* function, const Tensor& seed, const Tensor& sample_ids, const Tensor& draws) {
  ATOP_CHECK(sample_ids.scalar_type() == ScalarType::Long, function, "sample_ids", "an int64 tensor",
             dtype_text(sample_ids.scalar_type()));
  ATOP_CHECK(sample_ids.dim() == 1, function, "sample_ids", "of shape (B,)", shape_text(sample_ids));
  ATOP_CHECK(seed.scalar_type() == ScalarType::Long, function, "seed", "an int64 tensor",
             dtype_text(seed.scalar_type()));
  ATOP_CHECK(seed.dim() == 0, function, "seed", "of shape ()", shape_text(seed));
  check_per_sample(function, "draw", draws, ScalarType::Long, sample_ids.size(0));
  check_on_device_of(function, "seed", seed, "sample_ids", sample_ids);
  check_on_device_of(function, "draw", draws, "sample_ids", sample_ids);
  return {input<int64_t>(seed), input<int64_t>(sample_ids), sample_ids.size(0) ? sample_ids.stride(0) : 0,
          input<int64_t>(draws), per_sample_stride(draws)};
}

}  // namespace atop
