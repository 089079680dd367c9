#include "cpu/winograd.h"

#include <cstring>

#include "cpu/levels.h"
#include "math/winograd.h"

#if ATOP_HAS_CLONES
#include <immintrin.h>

// gcc 12 takes the undefined lanes inside of its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define ATOP_INLINE inline __attribute__((always_inline))

namespace atop::winograd {

#if ATOP_HAS_CLONES

// 24 sums, 4 weights and a value in 32 registers.
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace v4 {
#define W 16
#define ROWS 6
#define PANELS 4
#define FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#include "cpu/winograd.inc"
#include "cpu/winograd_undef.inc"
}  // namespace v4
#pragma GCC pop_options

// 12 sums, 2 weights and a value in 16 registers.
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define W 8
#define ROWS 6
#define PANELS 1
#define FMA(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#include "cpu/winograd.inc"
#include "cpu/winograd_undef.inc"
}  // namespace v3
#pragma GCC pop_options

#endif

// 8 sums, 4 weights and a value in 16 registers.
namespace v1 {
#define W 4
#define ROWS 2
#define PANELS 1
#define FMA(a, b, c) ((a) * (b) + (c))
#include "cpu/winograd.inc"
#include "cpu/winograd_undef.inc"
}  // namespace v1

#if !ATOP_HAS_CLONES

#define ATOP_CALL(...) v1::__VA_ARGS__

#endif

void transform_input(const float* const* pixels, int64_t channels, float* v, int64_t step) {
  ATOP_CALL(transform_input(pixels, channels, v, step));
}

void transform_gradient(const float* const* pixels, int64_t outputs, float* z, int64_t panel, int64_t step) {
  ATOP_CALL(transform_gradient(pixels, outputs, z, panel, step));
}

void multiply(const Product& product, const float* v, const float* u, float* m) {
  ATOP_CALL(multiply(product, v, u, m));
}

void transform_output(const float* m, int64_t step, const float* bias, int64_t outputs, float* const* pixels) {
  ATOP_CALL(transform_output(m, step, bias, outputs, pixels));
}

}  // namespace atop::winograd
