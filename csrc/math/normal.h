#pragma once
// Standard normal numbers by Box-Muller, with correctly rounded operations only            docs/math.md#random_normal
//
//   n0 = R cos(theta),  n1 = R sin(theta),  R^2 = -2 log((a // 2 + 1/2) / 2^31),  theta = 2 pi b / 2^32

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

#include "math/bits.h"
#include "math/philox.h"

namespace atop::math {

// Minimax polynomials; the same in every backend.
constexpr float kLog[6] = {0x1.a213e0p-3f,  -0x1.496cecp-2f, 0x1.5f4c40p-2f,
                           -0x1.97e79ep-2f, 0x1.ffa0cep-2f,  -0x1.55584cp-1f};
constexpr float kMinus2Log2 = -0x1.62e430p+0f;
constexpr float kSin[3] = {-0x1.98da64p-13f, 0x1.1105b4p-7f, -0x1.555540p-3f};
constexpr float kCos[2] = {-0x1.65e408p-10f, 0x1.554a08p-5f};
constexpr float kEighthTurn = 0x1.921fb6p-32f;  // pi / 4 / 2^31
constexpr int32_t kSqrtHalfBits = 0x3F3504F3;

// With m in [sqrt(1/2) - 1, sqrt(2) - 1]: -2 log(2^e (1 + m)) = -2 m + m^2 + m^3 p(m) - 2 log(2) e.
ATOP_HD float minus_2_log(uint32_t word) {
  const float u = static_cast<float>(static_cast<int32_t>(word >> 1)) + 0.5f;
  const int32_t bits = static_cast<int32_t>(to_bits(u)) - kSqrtHalfBits;
  const float exponent = static_cast<float>(bits >> 23) - 31.0f;
  const float m = from_bits<float>(static_cast<uint32_t>((bits & 0x007FFFFF) + kSqrtHalfBits)) - 1.0f;
  // A single expression, because in device code nvcc accepts elements of constexpr arrays only in initializers.
  const float p = ((((m * kLog[0] + kLog[1]) * m + kLog[2]) * m + kLog[3]) * m + kLog[4]) * m + kLog[5];
  const float square = m * m;
  return p * m * square + square + m * -2.0f + exponent * kMinus2Log2;
}

// Polynomials in the angle to the nearest axis, at most an eighth of a turn; two bits of the word select the axis.
ATOP_HD void cos_sin(uint32_t word, float& cosine, float& sine) {
  const float x = static_cast<float>(static_cast<int32_t>(word << 2)) * kEighthTurn;
  const float z = x * x;
  const float s = ((z * kSin[0] + kSin[1]) * z + kSin[2]) * (z * x) + x;
  const float c = (z * kCos[0] + kCos[1]) * (z * z) + (1.0f - z * 0.5f);
  const uint32_t axis = (word + 0x20000000u) >> 30;
  const uint32_t cosine_sign = (axis ^ (axis << 1)) & 2u, sine_sign = axis & 2u;
  cosine = from_bits<float>(to_bits(axis & 1u ? s : c) ^ (cosine_sign << 30));
  sine = from_bits<float>(to_bits(axis & 1u ? c : s) ^ (sine_sign << 30));
}

ATOP_HD float square_root(float v) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(v);
#else
  return std::sqrt(v);
#endif
}

struct Normals {
  float n[4];
};

// The numbers of the elements 4 * group .. 4 * group + 3.
ATOP_HD Normals random_normals(const Stream& s, uint32_t group) {
  const Words words = random_words(s, group);
  Normals result;
  for (int pair = 0; pair < 4; pair += 2) {
    const float radius = square_root(minus_2_log(words.w[pair]));
    float cosine, sine;
    cos_sin(words.w[pair + 1], cosine, sine);
    result.n[pair] = radius * cosine;
    result.n[pair + 1] = radius * sine;
  }
  return result;
}

}  // namespace atop::math
