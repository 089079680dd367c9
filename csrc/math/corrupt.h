#pragma once
// t = 2 clip(v, 0, 1) - 1 for the noisy image v = x + sigma n; the gradient passes where v is not clipped
//                                                                                          docs/math.md#corrupt

#include "common/half.h"

namespace atop::math {

template <typename T>
ATOP_HD T clip_and_scale(T v) {
  // NaN passes, as in torch.clamp.
  v = v < T(0) ? T(0) : v;
  v = v > T(1) ? T(1) : v;
  return v * T(2) - T(1);
}

template <typename T>
ATOP_HD bool inside(T v) {
  return v >= T(0) && v <= T(1);
}

}  // namespace atop::math

namespace atop {

// Maps pixels in 0..255 to [0, 1].
ATOP_HD float load(uint8_t v) {
  return static_cast<float>(v) / 255.0f;
}

}  // namespace atop
