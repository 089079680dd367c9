#pragma once
// y = elu(f) sigmoid(g)                                                                     docs/math.md#gated_elu
// df = dy sigmoid(g) elu'(f),  elu'(f) = 1 for f > 0, else exp(f)
// dg = dy elu(f) sigmoid(g) (1 - sigmoid(g))

#include "math/exp.h"

namespace atop::math {

template <typename T>
struct Elu {
  T value, slope;

  ATOP_HD explicit Elu(T f) {
    const Exp<T> e(f > T(0) ? T(0) : f);
    value = f > T(0) ? f : e.expm1();
    slope = e.exp();
  }
};

// With e = exp(-|g|) nothing overflows and nothing cancels: s = 1/(1+e) or e/(1+e), s(1-s) = e/(1+e)^2.
template <typename T>
struct Sigmoid {
  T value, slope;

  ATOP_HD explicit Sigmoid(T g) {
    const T e = Exp<T>(g > T(0) ? -g : g).exp();
    const T inverse = T(1) / (T(1) + e);
    const T small = e * inverse;
    value = g > T(0) ? inverse : small;
    slope = small * inverse;
  }
};

template <typename T>
struct GatedElu {
  ATOP_HD T operator()(T f, T g) const { return Elu<T>(f).value * Sigmoid<T>(g).value; }
};

template <typename T>
struct GatedEluBwd {
  ATOP_HD void operator()(T dy, T f, T g, T& df, T& dg) const {
    const Elu<T> elu(f);
    const Sigmoid<T> gate(g);
    df = dy * gate.value * elu.slope;
    dg = dy * elu.value * gate.slope;
  }
};

}  // namespace atop::math
