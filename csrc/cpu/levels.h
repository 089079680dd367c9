#pragma once
// The x86-64 level of this machine, one of the three of ATOP_CLONES, for loops with intrinsics, between which that
// attribute cannot choose: they are compiled in the namespaces v1, v3 and v4. Without the attribute, only v1 exists.

#include "common/macros.h"

#define ATOP_INLINE inline __attribute__((always_inline))

#if ATOP_HAS_CLONES

#include <immintrin.h>

// gcc 12 warns about undefined lanes inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace atop {

inline int level() {
  static const int found = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
  return found;
}

}  // namespace atop

#define ATOP_CALL(...) (level() == 4 ? v4::__VA_ARGS__ : level() == 3 ? v3::__VA_ARGS__ : v1::__VA_ARGS__)

#else

#define ATOP_CALL(...) v1::__VA_ARGS__

#endif
