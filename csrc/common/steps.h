#pragma once
// The host side of the projected steps: checks, layouts, and the launch.

#include <cmath>
#include <initializer_list>
#include <optional>

#include "common/keys.h"
#include "common/launchers.h"
#include "common/tensors.h"

namespace atop {

// A number, or a tensor that replaces it.
struct StepNumber {
  const char* name;
  double number;
  const std::optional<Tensor>& values;
  double low;  // lower bound of the number; values of a tensor are not checked
};

struct StepNumbers {
  StepNumber alpha, eps, momentum;
};

struct StepTensors {
  Tensor x, grad, x0, x_prev;  // x_prev is x if the op has none
};

inline int64_t samples_of(const Tensor& x) {
  return x.dim() ? x.size(0) : 1;
}

// `grad` is like x, or has a leading dimension of draws.
inline bool has_draws(const Tensor& x, const Tensor& grad) {
  return grad.dim() == x.dim() + 1;
}

inline void check_step(const char* function, const StepTensors& t, const StepNumbers& numbers, int norms) {
  const ScalarType dtype = t.x.scalar_type();
  ATOP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, function, "x", "a float32 or float64 tensor",
             dtype_text(dtype));
  ATOP_CHECK(!norms || t.x.dim(), function, "x", "of shape (B, ...)", "a scalar");
  if (has_draws(t.x, t.grad)) {
    ATOP_CHECK(t.grad.size(0) > 0, function, "grad", "of at least one draw", "none");
    check_like(function, "grad", torch::stable::select(t.grad, 0, 0), "x", t.x);
  } else {
    check_like(function, "grad", t.grad, "x", t.x);
  }
  check_like(function, "x0", t.x0, "x", t.x);
  check_like(function, "x_prev", t.x_prev, "x", t.x);
  for (const StepNumber& n : {numbers.alpha, numbers.eps, numbers.momentum}) {
    if (n.values) {
      ATOP_CHECK(n.values->scalar_type() == dtype, function, n.name, text("of the dtype of x ", dtype_text(dtype)),
                 dtype_text(n.values->scalar_type()));
      ATOP_CHECK(n.values->dim() == 0 || (n.values->dim() == 1 && t.x.dim() && n.values->size(0) == t.x.size(0)),
                 function, n.name, t.x.dim() ? text("of shape () or (", t.x.size(0), ",)") : "of shape ()",
                 shape_text(*n.values));
      check_on_device_of(function, n.name, *n.values, "x", t.x);
    } else {
      ATOP_CHECK(std::isfinite(n.number) && n.number >= n.low, function, n.name,
                 std::isinf(n.low) ? "finite" : text("finite and >= ", n.low), text(n.number));
    }
  }
}

template <typename T>
PerSample<T> per_sample(const StepNumber& n) {
  if (!n.values) return {nullptr, 0, T(n.number)};
  return {input<T>(*n.values), per_sample_stride(*n.values), T(0)};
}

// All tensors have the layout of `out`, contiguous or channels_last, so that samples are dense.
template <typename Launch>
void launch_dense(const char* function, const StepTensors& t, const StepNumbers& numbers, int norms, const Tensor& out,
                  const Launch& launch) {
  with_float_type(out.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool draws = has_draws(t.x, t.grad);
    StepArguments<T> a{input<T>(t.x), input<T>(t.grad), input<T>(t.x0), input<T>(t.x_prev), output<T>(out)};
    a.draws = draws ? t.grad.size(0) : 1;
    a.draw_stride = draws ? t.grad.stride(0) : 0;
    a.alpha = per_sample<T>(numbers.alpha);
    a.eps = per_sample<T>(numbers.eps);
    a.momentum = per_sample<T>(numbers.momentum);
    const bool apart = norms || a.alpha.stride || a.eps.stride || a.momentum.stride;
    a.batch = apart ? samples_of(out) : 1;
    a.inner = out.numel() / a.batch;
    Tensor partials, total;
    if (const int64_t parts = norms ? step_parts(a.inner) : 1; parts > 1) {
      const int64_t count = (norms + 1) * a.batch * parts;
      partials = torch::stable::empty({&count, 1}, out.scalar_type(), std::nullopt, out.device());
      a.partials = output<T>(partials);
      if (a.draws > 1) {
        total = torch::stable::empty_like(out);
        a.total = output<T>(total);
      }
    }
    run_on_device_of(out, function, [&](void* stream) { return launch(a, stream); });
  });
}

// Whether every draw has the layout of `model`.
inline bool draws_have_layout_of(const Tensor& grad, const Tensor& model) {
  for (int64_t i = 0; i < model.dim(); ++i) {
    if (model.size(i) != 1 && grad.stride(i + 1) != model.stride(i)) return false;
  }
  return true;
}

// Writes the step to `out`, which may be x itself.
template <typename Launch>
void step_into(const char* function, const StepTensors& t, const StepNumbers& numbers, int norms, Tensor out,
               const Launch& launch) {
  if (out.numel() == 0) return;
  const bool draws = has_draws(t.x, t.grad), contiguous = out.is_contiguous();
  const bool draws_fit = draws && draws_have_layout_of(t.grad, out);
  if (contiguous || (is_channels_last(out) && (!draws || draws_fit))) {
    const Tensor grad = !draws ? in_layout_of(t.grad, out) : draws_fit ? t.grad : torch::stable::contiguous(t.grad);
    const StepTensors dense{in_layout_of(t.x, out), grad, in_layout_of(t.x0, out), in_layout_of(t.x_prev, out)};
    return launch_dense(function, dense, numbers, norms, out, launch);
  }
  const auto flat = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
  const Tensor result = empty(out.sizes(), out, false);
  launch_dense(function, {flat(t.x), flat(t.grad), flat(t.x0), flat(t.x_prev)}, numbers, norms, result, launch);
  torch::stable::copy_(out, result);
}

template <typename Launch>
Tensor step(const char* function, const StepTensors& t, const StepNumbers& numbers, int norms, const Launch& launch) {
  check_step(function, t, numbers, norms);
  Tensor out = torch::stable::empty_like(t.x);
  step_into(function, t, numbers, norms, out, launch);
  return out;
}

// Whether the memory ranges of `a` and `b`, from the first to the last element, overlap.
inline bool may_overlap(const Tensor& a, const Tensor& b) {
  const auto end = [](const Tensor& t) {
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    return static_cast<const char*>(t.const_data_ptr()) + (last + 1) * static_cast<int64_t>(t.element_size());
  };
  return a.const_data_ptr() < end(b) && b.const_data_ptr() < end(a);
}

template <typename Launch>
void step_in_place(const char* function, const StepTensors& t, const StepNumbers& numbers, int norms,
                   const Launch& launch) {
  check_step(function, t, numbers, norms);
  if (t.x.numel() == 0) return;
  ATOP_CHECK(!may_overlap(t.x, t.grad), function, "grad", "a tensor that shares no memory with x", "one that does");
  ATOP_CHECK(!may_overlap(t.x, t.x0), function, "x0", "a tensor that shares no memory with x", "one that does");
  step_into(function, t, numbers, norms, t.x, launch);
}

// The numbers of the steps without momentum.
inline StepNumbers pgd_numbers(double alpha, double eps, const std::optional<Tensor>& alphas,
                               const std::optional<Tensor>& epsilons) {
  static const std::optional<Tensor> none;
  return {{"alpha", alpha, alphas, -INFINITY}, {"eps", eps, epsilons, 0}, {"momentum", 0, none, 0}};
}

}  // namespace atop
