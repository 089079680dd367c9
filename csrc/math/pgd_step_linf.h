#pragma once
// x' = clamp(clamp(x + alpha sign(g), x0 - eps, x0 + eps), 0, 1)                            docs/math.md#pgd_step_linf

#include "common/macros.h"

namespace atop::math {

// NaN in v passes, as in torch.clamp.
template <typename T>
ATOP_HD T clamp(T v, T low, T high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

template <typename T>
struct PgdStepLinf {
  T alpha, eps;

  ATOP_HD T operator()(T x, T g, T x0) const {
    const T sign = g > T(0) ? T(1) : g < T(0) ? T(-1) : T(0);
    const T projected = clamp(x + alpha * sign, x0 - eps, x0 + eps);
    return clamp(x0 != x0 ? x0 : projected, T(0), T(1));
  }
};

}  // namespace atop::math
