#pragma once
// sum over i of min(cap_i, max(|y_i| - lambda, 0)) <= eps                                    docs/math.md#project_l1

#include "math/step.h"

namespace atop::math {

// Distances are clamped to this; larger ones make no difference.
template <typename T>
constexpr T kFar = T(1e30);

// |y|
template <typename T>
ATOP_HD T length(T y) {
  return clamp(y < T(0) ? -y : y, T(0), kFar<T>);
}

// The distance from x0 in the direction of y at which an element leaves the image range.
template <typename T>
ATOP_HD T room(T y, T x0) {
  const T cap = y > T(0) ? T(1) - x0 : x0;
  return cap > T(0) ? cap : T(0);
}

// |y| reduced by `lambda`, and at least 0. NaN passes.
template <typename T>
ATOP_HD T shrink(T length_of_y, T cap, T lambda) {
  const T left = length_of_y - lambda;
  const T positive = left < T(0) ? T(0) : left;
  return positive > cap ? cap : positive;
}

// x if nothing is subtracted, so that points inside the set do not change; NaN if lambda is NaN.
template <typename T>
ATOP_HD T project_l1(T x, T x0, T lambda) {
  const T y = x - x0, kept = shrink(length(y), room(y, x0), lambda);
  return clamp(kept < length(y) ? (y < T(0) ? x0 - kept : x0 + kept) : x + T(0) * kept, T(0), T(1));
}

}  // namespace atop::math
