#pragma once
// y = a(f) sigmoid(g),  a one of the activations below                                        docs/math.md#gated
// df = dy sigmoid(g) a'(f)
// dg = dy a(f) sigmoid(g) (1 - sigmoid(g))

#include "math/exp.h"

namespace atop::math {

// The activations, numbered as in atop_fast/ops/gated.py.
enum Activation : int { kElu, kRelu };

// x > 0 ? a : b
template <typename T>
ATOP_HD T if_positive(T x, T a, T b) {
  return x > T(0) ? a : b;
}

// v, or 0 where x <= 0
template <typename T>
ATOP_HD T zero_if_negative(T x, T v) {
  return x <= T(0) ? T(0) : v;
}

// min(x, 0), and NaN for NaN
template <typename T>
ATOP_HD T negative_part(T x) {
  return x > T(0) ? T(0) : x;
}

template <typename T>
ATOP_HD T minus_abs(T x) {
  return x > T(0) ? -x : x;
}

// a'(f) = 1 for f > 0, else exp(f)
template <typename T>
struct Elu {
  T value, slope;

  ATOP_HD explicit Elu(T f) {
    const Exp<T> e(negative_part(f));
    value = if_positive(f, f, e.expm1());
    slope = e.exp();
  }

  ATOP_HD T times_slope(T v) const { return v * slope; }
};

// a'(f) = 0 for f <= 0; as in torch, 1 for NaN
template <typename T>
struct Relu {
  T value;

  ATOP_HD explicit Relu(T f) : value(zero_if_negative(f, f)) {}

  ATOP_HD T times_slope(T v) const { return zero_if_negative(value, v); }
};

// With e = exp(-|g|) there is no overflow and no cancellation: s = 1/(1+e) or e/(1+e), s(1-s) = e/(1+e)^2.
template <typename T>
struct Sigmoid {
  T value, slope;

  ATOP_HD explicit Sigmoid(T g) {
    const typename NumberOf<T>::type one = 1;
    const T e = Exp<T>(minus_abs(g)).exp();
    const T inverse = one / (one + e);
    const T small = e * inverse;
    value = if_positive(g, inverse, small);
    slope = small * inverse;
  }
};

template <template <typename> class A, typename T>
ATOP_HD T gated(T f, T g) {
  return A<T>(f).value * Sigmoid<T>(g).value;
}

template <typename T>
struct GatedGradients {
  T df, dg;
};

template <template <typename> class A, typename T>
ATOP_HD GatedGradients<T> gated_bwd(T dy, T f, T g) {
  const A<T> a(f);
  const Sigmoid<T> gate(g);
  return {a.times_slope(dy * gate.value), dy * a.value * gate.slope};
}

}  // namespace atop::math
