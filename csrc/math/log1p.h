#pragma once
// log(1 + u) for u >= 0 without libm, with a small relative error also for small u.         docs/math.md#log1p
//
//   w = fl(1 + u) = 2^n (1 + f),  1 + f in [sqrt(1/2), sqrt(2)),  s = f / (2 + f)
//   log1p(u) = n ln2 + 2 atanh(s) + (u - (w - 1)) / w

#include "math/exp.h"

namespace atop::math {

template <typename T>
struct Log1pConstants;

template <>
struct Log1pConstants<float> {
  static constexpr uint32_t sqrt_half_bits = 0x3F3504F3u, mantissa_bits = 0x007FFFFFu;
  static constexpr float ln2 = 0x1.62e430p-1f;
  using Signed = int32_t;
};

template <>
struct Log1pConstants<double> {
  static constexpr uint64_t sqrt_half_bits = 0x3FE6A09E667F3BCDull, mantissa_bits = 0x000FFFFFFFFFFFFFull;
  static constexpr double ln2 = 0x1.62e42fefa39efp-1;
  using Signed = int64_t;
};

// atanh(s) / s - 1 for z = s^2 <= 0.0295, by its series to the precision of the type.
ATOP_HD float atanh_tail(float z) {
  return z * horner(z, 1.0f / 3, 1.0f / 5, 1.0f / 7, 1.0f / 9);
}

ATOP_HD double atanh_tail(double z) {
  return z * horner(z, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21);
}

// NaN gives NaN.
template <typename T>
ATOP_HD T log1p_of(T u) {
  using C = Log1pConstants<T>;
  using S = typename C::Signed;
  const T w = T(1) + u;
  const S bits = static_cast<S>(to_bits(w) - C::sqrt_half_bits);
  const T n = static_cast<T>(bits >> ExpConstants<T>::mantissa);
  const T f = from_bits<T>((static_cast<Bits<T>>(bits) & C::mantissa_bits) + C::sqrt_half_bits) - T(1);
  const T s = f / (T(2) + f);
  // The rounding error of w.
  const T lost = (u - (w - T(1))) / w;
  return n * C::ln2 + ((s + s) * (T(1) + atanh_tail(s * s)) + lost);
}

}  // namespace atop::math
