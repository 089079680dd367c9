#pragma once
// The x86-64 level of this machine, among the three of ATOP_CLONES, for loops that are compiled once for each in the
// namespaces v1, v3 and v4, as that attribute cannot choose between intrinsics. Without the attribute there is v1
// alone.

#include "common/macros.h"

#define ATOP_INLINE inline __attribute__((always_inline))

#if ATOP_HAS_CLONES

#include <immintrin.h>

// gcc 12 takes the undefined lanes inside of its own intrinsics for a mistake.
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
