#pragma once
// Winograd's F(4x4, 3x3) with the interpolation points 0, +-a, +-b and infinity:               docs/math.md#conv3x3
//   y = A' [(G g G') * (B' d B)] A
// where d is 6x6 pixels, g the 3x3 weights of a channel, * the product of elements, and y 4x4 outputs.

#include "common/macros.h"

namespace atop::math {

// These points have half the error of 1 and 2, and their powers have few bits, so that only sums are rounded.
constexpr double kNear = 0.75, kFar = 1.5;
constexpr double kNear2 = kNear * kNear, kFar2 = kFar * kFar;

// The rows of G applied to g[0], g[1], g[2], which are `step` apart: the values at the six points.
template <typename T>
ATOP_HD void weights_at_points(const T* g, int64_t step, T* u) {
  const T g0 = g[0], g1 = g[step], g2 = g[2 * step];
  const T near = T(1 / (2 * kNear2 * (kNear2 - kFar2))), far = T(1 / (2 * kFar2 * (kFar2 - kNear2)));
  const T even_near = g0 + T(kNear2) * g2, odd_near = T(kNear) * g1;
  const T even_far = g0 + T(kFar2) * g2, odd_far = T(kFar) * g1;
  u[0] = g0 * T(1 / (kNear2 * kFar2));
  u[1] = (even_near + odd_near) * near;
  u[2] = (even_near - odd_near) * near;
  u[3] = (even_far + odd_far) * far;
  u[4] = (even_far - odd_far) * far;
  u[5] = g2;
}

// The transpose G' applied to the values at six points: g[0], g[1], g[2].
template <typename T>
ATOP_HD void weights_from_points(const T* u, int64_t step, T* g) {
  const T even_near = (u[step] + u[2 * step]) * T(1 / (2 * kNear2 * (kNear2 - kFar2)));
  const T odd_near = (u[step] - u[2 * step]) * T(1 / (2 * kNear2 * (kNear2 - kFar2)));
  const T even_far = (u[3 * step] + u[4 * step]) * T(1 / (2 * kFar2 * (kFar2 - kNear2)));
  const T odd_far = (u[3 * step] - u[4 * step]) * T(1 / (2 * kFar2 * (kFar2 - kNear2)));
  g[0] = u[0] * T(1 / (kNear2 * kFar2)) + even_near + even_far;
  g[1] = T(kNear) * odd_near + T(kFar) * odd_far;
  g[2] = T(kNear2) * even_near + T(kFar2) * even_far + u[5 * step];
}

}  // namespace atop::math
