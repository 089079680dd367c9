#pragma once
// Bilinear interpolation along one axis, align_corners = False                             docs/math.md#resample
//
//   pixel i of `wanted` lies at max(0, (i + 1/2) given / wanted - 1/2), computed in integers to avoid rounding

#include "common/macros.h"

namespace atop::math {

template <typename T>
struct BilinearTap {
  int64_t first, second;
  T weight;  // weight of the second

  ATOP_HD BilinearTap(int64_t i, int64_t given, int64_t wanted) {
    const int64_t raw = (2 * i + 1) * given - wanted, position = raw < 0 ? 0 : raw;
    first = position / (2 * wanted);
    second = first + 1 < given ? first + 1 : given - 1;
    weight = static_cast<T>(position - first * 2 * wanted) / static_cast<T>(2 * wanted);
  }
};

template <typename T>
ATOP_HD T interpolate(T a, T b, T weight) {
  return a * (T(1) - weight) + b * weight;
}

}  // namespace atop::math
