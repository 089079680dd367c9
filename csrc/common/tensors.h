#pragma once
// Torch utilities for the host side of all ops, within the stable ABI.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "common/checks.h"
#include "common/half.h"

// The dispatch key of this library.
#if defined(ATOP_WITH_CUDA)
#define ATOP_KEY CUDA
#else
#define ATOP_KEY CPU
#endif

namespace atop {

using torch::headeronly::MemoryFormat;

inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

// `t`, or a copy of it with the strides of `model`, a dense tensor of the same shape.
inline Tensor in_layout_of(const Tensor& t, const Tensor& model) {
  if (t.numel() == 0 || same_layout(t, model)) return t;
  Tensor copy = torch::stable::empty_like(model);
  torch::stable::copy_(copy, t);
  return copy;
}

inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t i : {1, 3, 2, 0}) {
    if (t.size(i) == 1) continue;
    if (t.stride(i) != expected) return false;
    expected *= t.size(i);
  }
  return true;
}

inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, const Tensor& like, bool channels_last) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A contiguous tensor on the device of `like`. torch::stable::empty would look up aten::empty by name, which takes
// longer than a small op.
inline Tensor empty_contiguous(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& like) {
  int64_t strides[4], step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(1, sizes[i])) strides[i] = step;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device, like.get_device_index(), &made));
  return Tensor(made);
}

// Runs launch(stream) on the device of `t` and raises if it reports an error.
template <typename Launch>
void run_on_device_of([[maybe_unused]] const Tensor& t, const char* function, const Launch& launch) {
#if defined(ATOP_WITH_CUDA)
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
#else
  void* const stream = nullptr;
#endif
  if (const char* error = launch(stream)) throw std::runtime_error(text(function, ": ", error));
}

// Calls body with a null pointer to the storage type of `dtype`.
template <typename Body>
void with_float_type(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::Float) return body(static_cast<float*>(nullptr));
  if (dtype == ScalarType::Double) return body(static_cast<double*>(nullptr));
  throw std::runtime_error("unreachable: the dtype was checked");
}

template <typename Body>
void with_float_or_half_type(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::BFloat16) return body(static_cast<BFloat16*>(nullptr));
  if (dtype == ScalarType::Half) return body(static_cast<Half*>(nullptr));
  with_float_type(dtype, body);
}

// The same for the types whose computations use float32.
template <typename Body>
void with_output_type(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::Float) return body(static_cast<float*>(nullptr));
  if (dtype == ScalarType::BFloat16) return body(static_cast<BFloat16*>(nullptr));
  if (dtype == ScalarType::Half) return body(static_cast<Half*>(nullptr));
  throw std::runtime_error("unreachable: the dtype was checked");
}

template <typename T>
const T* input(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace atop
