#include "common/macros.h"

#if ATOP_HAS_CLONES
#pragma GCC target("arch=x86-64-v4")
#include <immintrin.h>

#define LEVEL v4
#define BYTES 64
#define VECTORS 3
// gcc would emit a comparison and a blend.
#define ATOP_EITHER(f, a, b)                                                   \
  (sizeof((a)[0]) == 4 ? (decltype((a) + (b)))f##_ps((__m512)(a), (__m512)(b)) \
                       : (decltype((a) + (b)))f##_pd((__m512d)(a), (__m512d)(b)))
#define LARGER(a, b) ATOP_EITHER(_mm512_max, a, b)
#define SMALLER(a, b) ATOP_EITHER(_mm512_min, a, b)
#define FROM_HALF(h) ((Lanes<float>::Vector)_mm512_cvtph_ps((__m256i)(h)))
#define TO_HALF(v) ((Shorts)_mm512_cvtps_ph((__m512)(v), _MM_FROUND_TO_NEAREST_INT))
#include "cpu/gates.inc"
#endif
