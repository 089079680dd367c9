#pragma once
// x' = clamp(clamp(x + alpha sign(g), x0 - eps, x0 + eps), 0, 1)                            docs/math.md#pgd_step_linf

#include "math/step.h"

namespace atop::math {

template <typename T>
struct PgdStepLinf {
  static constexpr int kNorms = 0;
  T alpha, eps;

  ATOP_HD explicit PgdStepLinf(const StepNumbers<T>& n) : alpha(n.alpha), eps(n.eps) {}

  ATOP_HD T operator()(const Element<T>& e) const { return project_linf(e.x + alpha * sign(e.g), e.x0, eps); }
};

}  // namespace atop::math
