#include "cpu/winograd.h"

#include <cstring>

#include "cpu/levels.h"
#include "math/winograd.h"

namespace atop::winograd {

#if ATOP_HAS_CLONES

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace v4 {
#define W 16
#define FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#include "cpu/winograd.inc"
#include "cpu/winograd_undef.inc"
}  // namespace v4
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define W 8
#define FMA(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#include "cpu/winograd.inc"
#include "cpu/winograd_undef.inc"
}  // namespace v3
#pragma GCC pop_options

#endif

namespace v1 {
#define W 4
#define FMA(a, b, c) ((a) * (b) + (c))
#include "cpu/winograd.inc"
#include "cpu/winograd_undef.inc"
}  // namespace v1

void transform_input(const float* const* pixels, const float* const* masks, int64_t channels, float* v, int64_t step) {
  ATOP_CALL(transform_input(pixels, masks, channels, v, step));
}

void transform_gradient(const float* const* pixels, int64_t outputs, float* z, int64_t panel, int64_t step) {
  ATOP_CALL(transform_gradient(pixels, outputs, z, panel, step));
}

void transform_output(const float* m, int64_t step, const Epilogue& epilogue, int64_t outputs, float* const* pixels) {
  ATOP_CALL(transform_output(m, step, epilogue, outputs, pixels));
}

}  // namespace atop::winograd
