#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/parallel.h"
#include "common/tensors.h"
#include "cpu/scratch.h"

// The host side is in this file instead of csrc/ops, because the op has no CUDA kernel.
namespace atop {
namespace {

// The number of lanes of a sum: vectorizable, in an order that does not depend on the machine.
constexpr int64_t kLanes = 16;

// sum_i weight_i min(l, cap_i), and its slope to the right of l; n is a multiple of kLanes.
template <typename T>
ATOP_CLONES void evaluate(const T* weight, const T* cap, int64_t n, T l, double* result) {
  double values[kLanes] = {}, slopes[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const T c = cap[i + j], w = weight[i + j];
      values[j] += static_cast<double>(w * (c < l ? c : l));
      slopes[j] += static_cast<double>(c > l ? w : T(0));
    }
  }
  result[0] = result[1] = 0;
  for (int64_t j = 0; j < kLanes; ++j) {
    result[0] += values[j];
    result[1] += slopes[j];
  }
}

// The l at which that sum is `total`, by Newton's method: the function is concave, so the iteration approaches the
// solution from below and never overshoots. The largest cap if `total` is out of reach.
template <typename T>
T level(const T* weight, const T* cap, int64_t n, double total) {
  T l = 0;
  for (;;) {
    double result[2];
    evaluate(weight, cap, n, l, result);
    if (result[1] <= 0) return result[0] < total ? std::numeric_limits<T>::max() : l;
    const T next = static_cast<T>(l + (total - result[0]) / result[1]);
    if (!(next > l)) return l;
    l = next;
  }
}

// The weights and the caps of the elements of a row.
template <typename T>
ATOP_CLONES void weigh(const T* x, const T* w, int64_t n, T scale, bool falls, bool l2, T* __restrict__ weight,
                       T* __restrict__ cap) {
  for (int64_t i = 0; i < n; ++i) {
    const bool up = (w[i] > 0) != falls;
    const T size = std::abs(w[i]) / scale, room = w[i] == 0 ? T(0) : up ? 1 - x[i] : x[i];
    // Elements that contribute nothing would have huge caps.
    const bool counts = size >= T(1e-8);
    weight[i] = !l2 ? size : counts ? size * size : T(0);
    cap[i] = !l2 ? room : counts ? room / size : T(0);
  }
}

template <typename T>
ATOP_CLONES void walk(const T* x, const T* w, int64_t n, T scale, bool falls, bool l2, T l, T* __restrict__ step) {
  for (int64_t i = 0; i < n; ++i) {
    const bool up = (w[i] > 0) != falls;
    const T size = std::abs(w[i]) / scale, room = w[i] == 0 ? T(0) : up ? 1 - x[i] : x[i];
    const T far = !l2 ? l : size >= T(1e-8) ? l * size : T(0);
    const T length = far < room ? far : room;
    step[i] = w[i] == 0 ? T(0) : up ? length : -length;
  }
}

template <typename T>
void step_row(const T* x, const T* w, T change, bool l2, int64_t n, T* weight, T* cap, T* step) {
  T scale = std::numeric_limits<T>::min();
  for (int64_t i = 0; i < n; ++i) scale = std::max(scale, std::abs(w[i]));
  weigh(x, w, n, scale, change < 0, l2, weight, cap);
  const T l = level(weight, cap, round_up(n, kLanes), static_cast<double>(std::abs(change) / scale));
  walk(x, w, n, scale, change < 0, l2, l, step);
}

Tensor hyperplane_step(const Tensor& x, const Tensor& w, const Tensor& change, bool l2) {
  constexpr const char* kFunction = "hyperplane_step";
  ATOP_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, kFunction, "x",
             "a float32 or float64 tensor", dtype_text(x.scalar_type()));
  ATOP_CHECK(x.dim() == 2, kFunction, "x", "of shape (B, n)", shape_text(x));
  const int64_t batch = x.size(0), n = x.size(1);
  ATOP_CHECK(w.dim() == 2 && w.size(0) == batch && w.size(1) == n && w.scalar_type() == x.scalar_type(), kFunction, "w",
             text("of dtype and shape of x, (", batch, ", ", n, ")"), shape_text(w));
  ATOP_CHECK(change.dim() == 1 && change.size(0) == batch && change.scalar_type() == x.scalar_type(), kFunction,
             "change", text("of dtype of x and shape (", batch, ",)"), shape_text(change));
  const Tensor points = torch::stable::contiguous(x), normals = torch::stable::contiguous(w),
               changes = torch::stable::contiguous(change);
  const int64_t sizes[2] = {batch, n};
  Tensor steps = empty_contiguous({sizes, 2}, x.scalar_type(), x);
  if (steps.numel() == 0) return steps;
  with_float_type(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    torch::stable::parallel_for(0, batch, std::max<int64_t>(1, kGrain / n / 8), [&](int64_t begin, int64_t end) {
      const int64_t whole = round_up(n, kLanes);
      const Scratch<T> weight(whole), cap(whole);
      std::fill_n(weight.get(), whole, T(0));
      std::fill_n(cap.get(), whole, T(0));
      for (int64_t i = begin; i < end; ++i) {
        step_row(input<T>(points) + i * n, input<T>(normals) + i * n, input<T>(changes)[i], l2, n, weight.get(),
                 cap.get(), output<T>(steps) + i * n);
      }
    });
  });
  return steps;
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, CPU, m) {
  m.impl("hyperplane_step", TORCH_BOX(&atop::hyperplane_step));
}
