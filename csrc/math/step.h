#pragma once
// Shared by the projected steps of attacks.                                                         docs/math.md#steps

#include "common/macros.h"

namespace atop::math {

// One element of a step's inputs; g is the sum of the draws' gradients, made finite if its norm is taken.
template <typename T>
struct Element {
  T x, g, x0, x_prev;
};

// The numbers of one sample.
template <typename T>
struct StepNumbers {
  T alpha, eps, momentum;
};

// NaN in v passes, as in torch.clamp.
template <typename T>
ATOP_HD T clamp(T v, T low, T high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

template <typename T>
ATOP_HD T sign(T g) {
  return g > T(0) ? T(1) : g < T(0) ? T(-1) : T(0);
}

template <typename T>
constexpr T kLargest = sizeof(T) == 4 ? T(3.4028234663852886e38) : T(1.7976931348623157e308);

// Like torch.nan_to_num: NaN becomes 0 and infinity the largest number.
template <typename T>
ATOP_HD T finite(T g) {
  return g != g ? T(0) : clamp(g, -kLargest<T>, kLargest<T>);
}

// The nearest point of the L-infinity ball, in the image range. NaN in a bound passes, as in torch.clamp.
template <typename T>
ATOP_HD T project_linf(T v, T x0, T eps) {
  const T low = x0 - eps;
  const T projected = clamp(v, low, x0 + eps);
  return clamp(low != low ? low : projected, T(0), T(1));
}

// Lower bound of norms, to avoid division by 0.
template <typename T>
constexpr T kTiny = T(1e-12);

// A gradient with a norm below kSmall is scaled by the power of two kMagnified, because its squares could underflow;
// the squares after scaling neither underflow nor overflow.
template <typename T>
constexpr T kSmall = T(0x1p-40);
template <typename T>
constexpr T kMagnified = sizeof(T) == 4 ? T(0x1p96) : T(0x1p550);

// The lower bound of the divisor of a gradient scaled by `unit`, which is kMagnified or 1.
template <typename T>
ATOP_HD T least_divisor(T unit) {
  return unit == T(1) ? kTiny<T> : T(1) / unit;
}

}  // namespace atop::math
