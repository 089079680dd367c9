#pragma once
// The 16-bit storage types, without torch headers. `load` widens to the type in which the formulas compute, `store`
// rounds to nearest even. On the CPU, both are integer arithmetic that the compiler vectorizes on every target.

#include <cstdint>

#include "common/macros.h"
#include "math/bits.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace atop {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

ATOP_HD float load(float v) {
  return v;
}
ATOP_HD double load(double v) {
  return v;
}
ATOP_HD float load(BFloat16 v) {
  return math::from_bits<float>(uint32_t(v.bits) << 16);
}

ATOP_HD float load(Half v) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(v.bits));
#else
  const uint32_t w = uint32_t(v.bits) << 16;
  const uint32_t sign = w & 0x80000000u;
  const uint32_t magnitude = w + w;
  // Move exponent and mantissa into place, then correct the exponent bias by a product; preserves infinity and NaN.
  const float normal = math::from_bits<float>((magnitude >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = math::from_bits<float>((magnitude >> 17) | (126u << 23)) - 0.5f;
  return math::from_bits<float>(sign | math::to_bits(magnitude < (1u << 27) ? subnormal : normal));
#endif
}

ATOP_HD void store(float v, float* p) {
  *p = v;
}
ATOP_HD void store(double v, double* p) {
  *p = v;
}

ATOP_HD void store(float v, BFloat16* p) {
  const uint32_t u = math::to_bits(v);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(v != v ? 0x7FC0u : rounded);
}

ATOP_HD void store(float v, Half* p) {
#if defined(__CUDA_ARCH__)
  p->bits = __half_as_ushort(__float2half_rn(v));
#else
  const uint32_t w = math::to_bits(v);
  const uint32_t sign = w & 0x80000000u;
  const uint32_t shifted = w + w;
  // Overflow to infinity first, then round by a float addition at the last bit of half's mantissa.
  const float base = (math::from_bits<float>(w & 0x7FFFFFFFu) * 0x1.0p+112f) * 0x1.0p-110f;
  const uint32_t exponent = shifted & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t bits = math::to_bits(math::from_bits<float>((bias >> 1) + 0x07800000u) + base);
  const uint32_t finite = ((bits >> 13) & 0x00007C00u) + (bits & 0x00000FFFu);
  p->bits = static_cast<uint16_t>((sign >> 16) | (shifted > 0xFF000000u ? 0x7E00u : finite));
#endif
}

// The type in which computations with a storage type are done.
template <typename T>
struct Compute {
  using type = float;
};

template <>
struct Compute<double> {
  using type = double;
};

}  // namespace atop
