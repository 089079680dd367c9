#pragma once
// z = P(x + alpha sign(g)),  x' = P(x + m (z - x) + (1 - m) (x - x_prev))                  docs/math.md#apgd_step_linf

#include "math/step.h"

namespace atop::math {

template <typename T>
struct ApgdStepLinf {
  static constexpr int kNorms = 0;
  T alpha, eps, momentum;

  ATOP_HD explicit ApgdStepLinf(const StepNumbers<T>& n) : alpha(n.alpha), eps(n.eps), momentum(n.momentum) {}

  ATOP_HD T operator()(const Element<T>& e) const {
    const T z = project_linf(e.x + alpha * sign(e.g), e.x0, eps);
    return project_linf(e.x + momentum * (z - e.x) + (T(1) - momentum) * (e.x - e.x_prev), e.x0, eps);
  }
};

}  // namespace atop::math
