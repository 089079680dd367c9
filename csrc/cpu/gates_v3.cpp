#include "common/macros.h"

#if ATOP_HAS_CLONES
#pragma GCC target("arch=x86-64-v3")
#include <immintrin.h>

#define LEVEL v3
#define BYTES 32
#define VECTORS 2
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))
#define FROM_HALF(h) ((Lanes<float>::Vector)_mm256_cvtph_ps((__m128i)(h)))
#define TO_HALF(v) ((Shorts)_mm256_cvtps_ph((__m256)(v), _MM_FROUND_TO_NEAREST_INT))
#include "cpu/gates.inc"
#endif
