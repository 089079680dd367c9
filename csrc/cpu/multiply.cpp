#include "cpu/multiply.h"

#include <cstring>

#include "cpu/levels.h"

namespace atop {

#if ATOP_HAS_CLONES

// 24 sums, 4 weights and a value in 32 registers.
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace v4 {
#define W 16
#define ROWS 6
#define PANELS 4
#define FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#include "cpu/multiply.inc"
#include "cpu/multiply_undef.inc"
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
#include "cpu/multiply.inc"
#include "cpu/multiply_undef.inc"
}  // namespace v3
#pragma GCC pop_options

#endif

// 8 sums, 4 weights and a value in 16 registers.
namespace v1 {
#define W 4
#define ROWS 2
#define PANELS 1
#define FMA(a, b, c) ((a) * (b) + (c))
#include "cpu/multiply.inc"
#include "cpu/multiply_undef.inc"
}  // namespace v1

void multiply(const Product& product, const float* v, const float* u, float* m) {
  ATOP_CALL(multiply(product, v, u, m));
}

ATOP_CLONES void multiply(const Product& product, const double* v, const double* u, double* m) {
  for (int64_t p = 0; p < product.panels; ++p) {
    for (int64_t r = 0; r < product.rows; ++r) {
      double* const to = m + r * product.m_row + p * kPanel;
      double sum[kPanel] = {};
      for (int64_t k = 0; k < product.depth; ++k) {
        const double value = v[r * product.v_row + k * product.v_step];
        for (int64_t o = 0; o < kPanel; ++o) sum[o] += value * u[(p * product.depth + k) * kPanel + o];
      }
      for (int64_t o = 0; o < kPanel; ++o) to[o] = product.add ? to[o] + sum[o] : sum[o];
    }
  }
}

}  // namespace atop
