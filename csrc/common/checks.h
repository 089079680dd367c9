#pragma once
// Those checks of atop_fast/_core/checks.py on which memory safety depends, with the same messages.

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace atop {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Raises `function: argument must be expected, got given`, which Python sees as a RuntimeError.
[[noreturn]] inline void fail(const char* function, const char* argument, const std::string& expected,
                              const std::string& given) {
  throw std::runtime_error(text(function, ": ", argument, " must be ", expected, ", got ", given));
}

// A macro, so that the texts are built only on failure: building them takes longer than a small op.
#define ATOP_CHECK(met, function, argument, expected, given)               \
  do {                                                                     \
    if (!(met)) ::atop::fail((function), (argument), (expected), (given)); \
  } while (false)

inline std::string shape_text(const Tensor& t) {
  std::ostringstream out;
  out << '(';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << (t.dim() == 1 ? ",)" : ")");
  return out.str();
}

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    default:
      return text("torch.", torch::headeronly::toString(dtype));
  }
}

inline std::string device_text(const Tensor& t) {
  return t.is_cpu() ? "cpu" : text(t.is_cuda() ? "cuda:" : "device ", t.get_device_index());
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

// `t` must match `model` in shape, dtype and device.
inline void check_like(const char* function, const char* argument, const Tensor& t, const char* model_name,
                       const Tensor& model) {
  ATOP_CHECK(same_shape(t, model), function, argument, text("of the shape of ", model_name, " ", shape_text(model)),
             shape_text(t));
  const ScalarType dtype = model.scalar_type();
  ATOP_CHECK(t.scalar_type() == dtype, function, argument, text("of the dtype of ", model_name, " ", dtype_text(dtype)),
             dtype_text(t.scalar_type()));
  ATOP_CHECK(t.is_cpu() == model.is_cpu() && t.is_cuda() == model.is_cuda() &&
                 t.get_device_index() == model.get_device_index(),
             function, argument, text("on the device of ", model_name, " ", device_text(model)), device_text(t));
}

}  // namespace atop
