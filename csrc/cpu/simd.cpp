#include "cpu/simd.h"

#include <cstring>

#include "cpu/levels.h"
#include "math/corrupt.h"
#include "math/normal.h"

#if ATOP_HAS_CLONES

namespace atop::simd {

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace v4 {
#define W 16
#define MUL_EVEN(a, b) ((vq)_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))
#define SQRT(v) ((vf)_mm512_sqrt_ps((__m512)(v)))
#define INTERLEAVE_LOW(a, b) ((vf)_mm512_unpacklo_ps((__m512)(a), (__m512)(b)))
#define INTERLEAVE_HIGH(a, b) ((vf)_mm512_unpackhi_ps((__m512)(a), (__m512)(b)))
#define LARGER(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define SMALLER(a, b) ((vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define INSIDE(v)                                                  \
  uint32_t(_mm512_cmp_ps_mask((__m512)(v), __m512{}, _CMP_GE_OQ) & \
           _mm512_cmp_ps_mask((__m512)(v), (__m512)(vf{} + 1.0f), _CMP_LE_OQ))
#define NONZERO(v) uint32_t(_mm512_test_epi32_mask((__m512i)(v), (__m512i)(v)))
#define KEEP(bits, v) ((vf)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)(v)))
#include "cpu/simd.inc"
#include "cpu/simd_undef.inc"
}  // namespace v4
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define W 8
#define MUL_EVEN(a, b) ((vq)_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#define SQRT(v) ((vf)_mm256_sqrt_ps((__m256)(v)))
#define INTERLEAVE_LOW(a, b) ((vf)_mm256_unpacklo_ps((__m256)(a), (__m256)(b)))
#define INTERLEAVE_HIGH(a, b) ((vf)_mm256_unpackhi_ps((__m256)(a), (__m256)(b)))
#define LARGER(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define SMALLER(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define INSIDE(v) uint32_t(_mm256_movemask_ps((__m256)(((v) >= 0.0f) & ((v) <= 1.0f))))
#define NONZERO(v) uint32_t(_mm256_movemask_ps((__m256)((v) != 0)))
#define KEEP(bits, v) ((vf)((vi)(v) & chosen(bits)))
#include "cpu/simd.inc"
#include "cpu/simd_undef.inc"
}  // namespace v3
#pragma GCC pop_options

namespace v1 {
#define W 4
#define MUL_EVEN(a, b) ((vq)_mm_mul_epu32((__m128i)(a), (__m128i)(b)))
#define SQRT(v) ((vf)_mm_sqrt_ps((__m128)(v)))
#define INTERLEAVE_LOW(a, b) ((vf)_mm_unpacklo_ps((__m128)(a), (__m128)(b)))
#define INTERLEAVE_HIGH(a, b) ((vf)_mm_unpackhi_ps((__m128)(a), (__m128)(b)))
#define LARGER(a, b) ((vf)_mm_max_ps((__m128)(a), (__m128)(b)))
#define SMALLER(a, b) ((vf)_mm_min_ps((__m128)(a), (__m128)(b)))
#define INSIDE(v) uint32_t(_mm_movemask_ps((__m128)(((v) >= 0.0f) & ((v) <= 1.0f))))
#define NONZERO(v) uint32_t(_mm_movemask_ps((__m128)((v) != 0)))
#define KEEP(bits, v) ((vf)((vi)(v) & chosen(bits)))
#include "cpu/simd.inc"
#include "cpu/simd_undef.inc"
}  // namespace v1

}  // namespace atop::simd
#endif

namespace atop::simd {
namespace {

// The remainder of a plane that does not fill a vector, and everything on machines without these levels.
void corrupt_rest(const float* x, const float* noise, float sigma, const uint8_t* kept, float* t, uint8_t* live,
                  int64_t begin, int64_t n) {
  for (int64_t i = begin; i < n; ++i) {
    const float v = x[i] + noise[i] * sigma;
    const bool keep = (kept[i / 8] >> (i % 8)) & 1;
    t[i] = keep ? math::clip_and_scale(v) : 0.0f;
    if (!live) continue;
    if (i % 8 == 0) live[i / 8] = 0;
    live[i / 8] |= static_cast<uint8_t>((math::inside(v) && keep) << (i % 8));
  }
}

#if !ATOP_HAS_CLONES

namespace v1 {

void fill_normals(const math::Stream& stream, uint32_t first_group, const uint32_t* offsets, int64_t count,
                  float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const math::Normals numbers = math::random_normals(stream, first_group + offsets[i]);
    memcpy(out + 4 * i, numbers.n, sizeof(numbers.n));
  }
}

void spread_normals(const math::Stream& stream, uint32_t first_group, const uint32_t* offsets, int64_t count,
                    float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const math::Normals numbers = math::random_normals(stream, first_group + offsets[i]);
    memcpy(out + 4 * offsets[i], numbers.n, sizeof(numbers.n));
  }
}

int64_t corrupt(const float*, const float*, float, const uint8_t*, float*, uint8_t*, int64_t) {
  return 0;
}

int64_t corrupt_bwd(const float*, const uint8_t*, float*, int64_t) {
  return 0;
}

int64_t nonzero_bits(const int32_t*, uint8_t*, int64_t) {
  return 0;
}

}  // namespace v1

#endif

}  // namespace

void fill_normals(const math::Stream& stream, uint32_t first_group, const uint32_t* offsets, int64_t count,
                  float* out) {
  ATOP_CALL(fill_normals(stream, first_group, offsets, count, out));
}

void spread_normals(const math::Stream& stream, uint32_t first_group, const uint32_t* offsets, int64_t count,
                    float* out) {
  ATOP_CALL(spread_normals(stream, first_group, offsets, count, out));
}

void corrupt(const float* x, const float* noise, float sigma, const uint8_t* kept, float* t, uint8_t* live, int64_t n) {
  const int64_t done = ATOP_CALL(corrupt(x, noise, sigma, kept, t, live, n));
  corrupt_rest(x, noise, sigma, kept, t, live, done, n);
}

void corrupt_bwd(const float* dy, const uint8_t* live, float* dx, int64_t n) {
  for (int64_t i = ATOP_CALL(corrupt_bwd(dy, live, dx, n)); i < n; ++i) {
    dx[i] = (live[i / 8] >> (i % 8)) & 1 ? 2.0f * dy[i] : 0.0f;
  }
}

void nonzero_bits(const int32_t* v, uint8_t* bits, int64_t n) {
  for (int64_t i = ATOP_CALL(nonzero_bits(v, bits, n)); i < n; ++i) {
    if (i % 8 == 0) bits[i / 8] = 0;
    bits[i / 8] |= static_cast<uint8_t>((v[i] != 0) << (i % 8));
  }
}

}  // namespace atop::simd
