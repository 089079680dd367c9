#pragma once
// The inner loops of the convolution: csrc/cpu/winograd.inc, compiled for three x86-64 levels and once in plain C++,
// and chosen by the machine it runs on. An element is computed in the same order of operations whatever its tile,
// vector or register; levels with and without a fused multiply-add round differently.

#include "cpu/multiply.h"

namespace atop::winograd {

constexpr int kPoints = 36;  // products of a tile and a pair of channels

// v[point * step + c] = B' d B of the pixels d[i][j] = pixels[6 i + j][c], c < channels. Writes up to the next multiple
// of kPanel. Unless `masks` is null, pixels count as 0 where those in the same place of masks are not positive.
void transform_input(const float* const* pixels, const float* const* masks, int64_t channels, float* v, int64_t step);

// z[(o / kPanel) * panel + point * step + o % kPanel] = A dY A' of the pixels dy[i][j] = pixels[4 i + j][o],
// o < outputs. Writes up to the next multiple of kPanel, where it is 0.
void transform_gradient(const float* const* pixels, int64_t outputs, float* z, int64_t panel, int64_t step);

// What is added to outputs, unless it is null, and whether they are clamped to 0 then.
struct Epilogue {
  const float* bias;              // [outputs]
  const float* const* residuals;  // as pixels
  bool relu;
};

// pixels[4 i + j][o] = (A' m A)[i][j] with m from m[point * step + o], o < outputs, and what `epilogue` says. Pixels
// that are null are left out.
void transform_output(const float* m, int64_t step, const Epilogue& epilogue, int64_t outputs, float* const* pixels);

}  // namespace atop::winograd
