#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace atop {

struct Split {
  int64_t quotient, remainder;
};

// Division of numbers >= 0; 32-bit division is several times faster than 64-bit division.
__device__ __forceinline__ Split split(int64_t i, int64_t n) {
  const int64_t quotient = (i | n) <= UINT32_MAX ? uint32_t(i) / uint32_t(n) : i / n;
  return {quotient, i - quotient * n};
}

}  // namespace atop
