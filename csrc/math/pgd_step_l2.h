#pragma once
// v = x + alpha g / |g|,  d = v - x0,  x' = clamp(x0 + d min(1, eps / |d|), 0, 1)             docs/math.md#pgd_step_l2

#include "math/step.h"

namespace atop::math {

// A step with norms over the sample: for R = 0, 1, ... in turn, term<R> is the vector whose norm take<R> receives. The
// last term is the distance d from x0 that project() shortens. The gradient is finite and scaled by `unit`.
template <typename T>
struct PgdStepL2 {
  static constexpr int kNorms = 2;
  T alpha, eps, unit, step, scale;

  ATOP_HD explicit PgdStepL2(const StepNumbers<T>& n) : alpha(n.alpha), eps(n.eps), unit(1), step(0), scale(0) {}

  template <int R>
  ATOP_HD T term(const Element<T>& e) const {
    if constexpr (R == 0) return e.g;
    return (e.x + step * e.g) - e.x0;
  }

  template <int R>
  ATOP_HD void take(T norm) {
    if constexpr (R == 0) {
      const T least = least_divisor(unit);
      step = alpha / (norm < least ? least : norm);
    }
    if constexpr (R == 1) {
      const T ratio = eps / (norm < kTiny<T> ? kTiny<T> : norm);
      scale = ratio > T(1) ? T(1) : ratio;
    }
  }

  ATOP_HD T project(T d, T x0) const { return clamp(x0 + d * scale, T(0), T(1)); }
};

}  // namespace atop::math
