#pragma once
// Loops for which auto-vectorization is not enough: csrc/cpu/simd.inc, compiled for three x86-64 levels and once in
// plain C++; one is selected for the machine. All return the same bits.

#include <cstdint>

#include "math/philox.h"

namespace atop::simd {

// The two functions for random numbers process groups in batches of this size: they read offsets and write numbers up
// to its next multiple.
constexpr int64_t kBatch = 32;

// out[4 i .. 4 i + 3] = the normal numbers of group first_group + offsets[i].
void fill_normals(const math::Stream& stream, uint32_t first_group, const uint32_t* offsets, int64_t count, float* out);

// Writes the same numbers to out[4 offsets[i] ...].
void spread_normals(const math::Stream& stream, uint32_t first_group, const uint32_t* offsets, int64_t count,
                    float* out);

// t = 2 clip(x + sigma noise, 0, 1) - 1 where the bit of `kept` is set, 0 elsewhere. Bit i of `live`, which may be
// null, is set where the gradient passes; bits beyond n in the last byte are 0.
void corrupt(const float* x, const float* noise, float sigma, const uint8_t* kept, float* t, uint8_t* live, int64_t n);

// dx = 2 dy where the bit is set, 0 elsewhere.
void corrupt_bwd(const float* dy, const uint8_t* live, float* dx, int64_t n);

// Bit i: v[i] is not 0. Bits beyond n in the last byte are 0.
void nonzero_bits(const int32_t* v, uint8_t* bits, int64_t n);

}  // namespace atop::simd
