#pragma once
// z = P(x + alpha g / |g|),  x' = P(x + m (z - x) + (1 - m) (x - x_prev))                    docs/math.md#apgd_step_l2

#include "math/step.h"

namespace atop::math {

// Like PgdStepL2, with three norms: of g, and of the distances from x0 that the two projections shorten.
template <typename T>
struct ApgdStepL2 {
  static constexpr int kNorms = 3;
  T alpha, eps, momentum, unit, step, scale_z, scale;

  ATOP_HD explicit ApgdStepL2(const StepNumbers<T>& n)
      : alpha(n.alpha), eps(n.eps), momentum(n.momentum), unit(1), step(0), scale_z(0), scale(0) {}

  template <int R>
  ATOP_HD T term(const Element<T>& e) const {
    if constexpr (R == 0) return e.g;
    const T d = (e.x + step * e.g) - e.x0;
    if constexpr (R == 1) return d;
    const T z = clamp(e.x0 + d * scale_z, T(0), T(1));
    return (e.x + momentum * (z - e.x) + (T(1) - momentum) * (e.x - e.x_prev)) - e.x0;
  }

  template <int R>
  ATOP_HD void take(T norm) {
    if constexpr (R == 0) {
      step = alpha / (norm + least_divisor(unit));
    } else {
      const T shorter = (eps < norm ? eps : norm) / (norm + kTiny<T>);
      if constexpr (R == 1) scale_z = shorter;
      if constexpr (R == 2) scale = shorter;
    }
  }

  ATOP_HD T project(T d, T x0) const { return clamp(x0 + d * scale, T(0), T(1)); }
};

}  // namespace atop::math
