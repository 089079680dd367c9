#pragma once
// The loss of one sample and its gradient in the logits z, for the label y                 docs/math.md#attack_loss
//
//   ce      log sum_j exp(z_j) - z_y
//   margin  z_o - z_y                                     o the largest logit except y's, or the target
//   dlr     (z_o - z_y) / (z_1st - low + 1e-12)           low = z_3rd, or (z_3rd + z_4th) / 2 with a target
//   pm      log (1 + P) / (1 - P),  P = p_o - p_y         p the softmax of z
//   pm-label  log (1 - p_y) / p_y,   pm-other  log p_o / (1 - p_o)

#include <cmath>
#include <cstdint>

#include "math/log1p.h"

namespace atop::math {

constexpr int kCrossEntropy = 0, kMargin = 1, kDlr = 2, kPm = 3, kPmLabel = 4, kPmOther = 5;

ATOP_HD bool is_class(int64_t label, int64_t classes) {
  return label >= 0 && label < classes;
}

template <typename T>
ATOP_HD bool is_finite(T v) {
  return v - v == T(0);
}

// With e_j = exp(z_j - max z) and `others` the sum of all e except the label's: no overflow and no cancellation.
template <typename T>
ATOP_HD T cross_entropy(T greatest, T z_y, T e_y, T others) {
  return (greatest - z_y) + log1p_of(others + (e_y - T(1)));
}

// dz_j = scale e_j for j other than y, and dz_y = -scale others.
template <typename T>
ATOP_HD T cross_entropy_scale(T e_y, T others) {
  return T(1) / (others + e_y);
}

// The N largest logits of a sample in descending order, ties by class.
template <typename T, int N>
struct Greatest {
  T value[N];
  int32_t index[N];

  ATOP_HD Greatest() {
    for (int i = 0; i < N; ++i) {
      value[i] = -static_cast<T>(INFINITY);
      index[i] = INT32_MAX;
    }
  }

  ATOP_HD void insert(T v, int32_t j) {
    for (int i = 0; i < N; ++i) {
      const bool before = v > value[i] || (v == value[i] && j < index[i]);
      const T other_value = value[i];
      const int32_t other_index = index[i];
      value[i] = before ? v : other_value;
      index[i] = before ? j : other_index;
      v = before ? other_value : v;
      j = before ? other_index : j;
    }
  }
};

// margin with N = 2; dlr with N = 3, or 4 with a target. The gradient is the sum of the moves if the loss is finite.
template <typename T, int N>
struct Ranked {
  static constexpr int kMoves = N == 2 ? 2 : N + 1;
  T loss;
  T move[kMoves];
  int32_t index[kMoves];

  // A negative `target` means the largest other logit.
  ATOP_HD Ranked(const Greatest<T, N>& top, int32_t y, T z_y, int32_t target, T z_target) {
    const bool first = top.index[0] == y;
    const T z_other = first ? top.value[1] : top.value[0];
    const int32_t other = first ? top.index[1] : top.index[0];
    index[0] = y;
    index[1] = target < 0 ? other : target;
    loss = (target < 0 ? z_other : z_target) - z_y;
    T slope = T(1);
    if constexpr (N > 2) {
      const T low = N == 3 ? top.value[2] : (top.value[2] + top.value[N - 1]) * T(0.5);
      slope = T(1) / ((top.value[0] - low) + T(1e-12));
      loss = loss * slope;
      const T spread = loss * slope;
      index[2] = top.index[0];
      move[2] = -spread;
      for (int i = 3; i < kMoves; ++i) {
        index[i] = top.index[i - 1];
        move[i] = spread / T(kMoves - 3);
      }
    }
    move[0] = -slope;
    move[1] = slope;
  }
};

// The largest logit except those of y and `other`, among the three largest.
template <typename T>
ATOP_HD T third_of(const Greatest<T, 3>& top, int32_t y, int32_t other) {
  T third = -static_cast<T>(INFINITY);
  for (int i = 2; i >= 0; --i) third = top.index[i] == y || top.index[i] == other ? third : top.value[i];
  return third;
}

// pm and its parts are log A - log B, with e_j = exp(z_j) and the sum R of all e_j except those of y and o:
//
//   pm        A = 2 e_o + R     B = 2 e_y + R
//   pm-label  A = e_o + R       B = e_y
//   pm-other  A = e_o           B = e_y + R
//
// A, B and R have separate scales, so that none overflows, or underflows next to another. If A / B is above kNear, its
// logarithm is computed from their difference.
constexpr double kNear = 0x1p-20;

template <typename T>
struct Odds {
  bool in_a, in_b;  // whether A and B contain R
  T weight, z_y, z_o, top_a, top_b;
  T unit;                           // R is the sum of exp(z_j - unit)
  T loss, at_y, at_other, at_rest;  // at_rest is multiplied by exp(z_j - unit)

  ATOP_HD Odds(int kind, T label, T other, T third, bool is_same)
      : in_a(kind != kPmOther), in_b(kind != kPmLabel), weight(kind == kPm ? T(2) : T(1)), z_o(other) {
    // If the target is the label, count it only once.
    z_y = is_same && kind == kPmOther ? -static_cast<T>(INFINITY) : label;
    top_a = in_a && third > z_o ? third : z_o;
    top_b = in_b && third > z_y ? third : z_y;
    const T smaller = top_a < top_b ? top_a : top_b;
    unit = in_a && in_b ? smaller : (in_a ? top_a : top_b);
  }

  ATOP_HD void finish(T rest) {
    const T one = T(1), unit_a = in_a ? Exp<T>(unit - top_a).exp() : T(0),
            unit_b = in_b ? Exp<T>(unit - top_b).exp() : T(0);
    const T e_o = in_a ? Exp<T>(z_o - top_a).exp() : one, e_y = in_b ? Exp<T>(z_y - top_b).exp() : one;
    const T a = weight * e_o + rest * unit_a, b = weight * e_y + rest * unit_b;
    const T log_a = log1p_of((weight * e_o - one) + rest * unit_a),
            log_b = log1p_of((weight * e_y - one) + rest * unit_b);
    loss = (top_a - top_b) + (log_a - log_b);
    at_other = weight * e_o / a;
    at_y = -(weight * e_y / b);
    // A and B may be nearly equal: compute their difference as A - B = 2 (e_o - e_y).
    const bool is_above = z_y > z_o;
    const T gap = -Exp<T>(is_above ? z_o - z_y : z_y - z_o).expm1();
    const T difference = weight * gap * (is_above ? unit_a * e_y : unit_b * e_o), slope = difference / (a * b);
    if (unit_a > T(kNear) && unit_b > T(kNear)) {
      const T growth = log1p_of(difference / ((is_above ? a : b) * (unit_a * unit_b)));
      loss = is_above ? -growth : growth;
    }
    at_rest = in_a && in_b ? (is_above ? slope : -slope) : (in_a ? unit_a / a : -(unit_b / b));
  }
};

}  // namespace atop::math
