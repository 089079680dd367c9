#pragma once
// The loss of one sample and its gradient in the logits z, for the label y                 docs/math.md#attack_loss
//
//   ce      log sum_j exp(z_j) - z_y
//   margin  z_o - z_y                                     o the greatest logit but y's, or the target
//   dlr     (z_o - z_y) / (z_1st - low + 1e-12)           low = z_3rd, or (z_3rd + z_4th) / 2 with a target

#include <cmath>
#include <cstdint>

#include "math/log1p.h"

namespace atop::math {

constexpr int kCrossEntropy = 0, kMargin = 1, kDlr = 2;

ATOP_HD bool is_class(int64_t label, int64_t classes) {
  return label >= 0 && label < classes;
}

template <typename T>
ATOP_HD bool is_finite(T v) {
  return v - v == T(0);
}

// With e_j = exp(z_j - max z), and `others` the sum of all e but the label's: nothing overflows and nothing cancels.
template <typename T>
ATOP_HD T cross_entropy(T greatest, T z_y, T e_y, T others) {
  return (greatest - z_y) + log1p_of(others + (e_y - T(1)));
}

// dz_j = scale e_j for j other than y, and dz_y = -scale others.
template <typename T>
ATOP_HD T cross_entropy_scale(T e_y, T others) {
  return T(1) / (others + e_y);
}

// The N greatest logits of a sample in descending order, equal ones by their class.
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

// margin with N = 2, dlr with N = 3 and, with a target, 4. The gradient is the sum of the moves, provided that the loss
// is finite.
template <typename T, int N>
struct Ranked {
  static constexpr int kMoves = N == 2 ? 2 : N + 1;
  T loss;
  T move[kMoves];
  int32_t index[kMoves];

  // `target` is below 0 for the greatest other.
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

}  // namespace atop::math
