#pragma once
// exp and expm1 of x <= 0 without libm, so that loops over them vectorize.                  docs/math.md#exp
//
//   x = n ln2 + r,  |r| <= ln2 / 2,  n integer
//   p = expm1(r), a polynomial;  scale = 2^n
//   exp(x) = scale + scale p;  expm1(x) = scale p + (scale - 1)
//
// T is float or double, or a vector class with the same operators and functions, such as that of csrc/cpu/gates.inc.

#include <type_traits>

#include "math/bits.h"

namespace atop::math {

// The type of a single number: T itself, or the element type that the class T names.
template <typename T, typename = void>
struct NumberOf {
  using type = T;
};

template <typename T>
struct NumberOf<T, std::void_t<typename T::Number>> {
  using type = typename T::Number;
};

template <typename T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float log2e = 0x1.715476p0f;
  static constexpr float ln2_hi = 0x1.63p-1f;  // 9 bits, so that n * ln2_hi is exact
  static constexpr float ln2_lo = -0x1.bd0106p-13f;
  static constexpr float round = 0x1.8p23f;  // adding it rounds to an integer, stored in the low bits
  static constexpr float lowest = -88.0f;    // here n = -127, and scale is 0
  static constexpr int bias = 127, mantissa = 23;
};

template <>
struct ExpConstants<double> {
  static constexpr double log2e = 0x1.71547652b82fep0;
  static constexpr double ln2_hi = 0x1.62e42feep-1;
  static constexpr double ln2_lo = 0x1.a39ef35793c76p-33;
  static constexpr double round = 0x1.8p52;
  static constexpr double lowest = -709.0;  // n = -1023
  static constexpr int bias = 1023, mantissa = 52;
};

template <typename T, typename N>
ATOP_HD N horner(T, N c) {
  return c;
}

template <typename T, typename N, typename... Rest>
ATOP_HD T horner(T r, N c, Rest... rest) {
  return c + r * horner(r, rest...);
}

// (expm1(r) - r) / r^2 by interpolation at Chebyshev nodes; relative error of expm1 2.5e-8 and 4.1e-17.
template <typename T>
ATOP_HD T expm1_tail(T r, float) {
  return horner(r, 0x1p-1f, 0x1.5554dcp-3f, 0x1.55551ap-5f, 0x1.120ba2p-7f, 0x1.6d113cp-10f);
}

template <typename T>
ATOP_HD T expm1_tail(T r, double) {
  return horner(r, 0x1.0000000000001p-1, 0x1.5555555555556p-3, 0x1.5555555553d4fp-5, 0x1.11111111109adp-7,
                0x1.6c16c17893833p-10, 0x1.a01a01a7c8d47p-13, 0x1.a019b8ef67c6cp-16, 0x1.71de0d9c145d0p-19,
                0x1.2891a8c1d838dp-22, 0x1.af38d53857513p-26);
}

// x >= low ? x : low, and NaN for NaN.
template <typename T>
ATOP_HD T at_least(T x, T low) {
  return x < low ? low : x;
}

// 2^n for shifted = n + round.
template <typename T>
ATOP_HD T power_of_2(T shifted) {
  using C = ExpConstants<T>;
  return from_bits<T>((to_bits(shifted) + C::bias) << C::mantissa);
}

// exp and expm1 of x <= 0; NaN gives NaN.
template <typename T>
struct Exp {
  T scale, scaled_p;

  ATOP_HD explicit Exp(T x) {
    using N = typename NumberOf<T>::type;
    using C = ExpConstants<N>;
    const T clamped = at_least(x, C::lowest);
    const T shifted = clamped * C::log2e + C::round;
    const T n = shifted - C::round;
    const T r = (clamped - n * C::ln2_hi) - n * C::ln2_lo;
    scale = power_of_2(shifted);
    scaled_p = scale * (r + (r * r) * expm1_tail(r, N()));
  }

  ATOP_HD T exp() const { return scale + scaled_p; }
  ATOP_HD T expm1() const { return scaled_p + (scale - typename NumberOf<T>::type(1)); }
};

}  // namespace atop::math
