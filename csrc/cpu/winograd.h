#pragma once
// The inner loops of the convolution: csrc/cpu/winograd.inc, compiled for three x86-64 levels and once in plain C++;
// one is selected for the machine. The order of operations for an element is the same for any tile, vector and
// register; levels with and without a fused multiply-add round differently.

#include "cpu/multiply.h"

namespace atop::winograd {

constexpr int kPoints = 36;  // products per tile and pair of channels

// v[point * step + c] = B' d B for the pixels d[i][j] = pixels[6 i + j][c], c < channels. Writes up to the next
// multiple of kPanel. Unless `masks` is null, pixels count as 0 where the corresponding pixels of masks are not
// positive.
void transform_input(const float* const* pixels, const float* const* masks, int64_t channels, float* v, int64_t step);

// z[(o / kPanel) * panel + point * step + o % kPanel] = A dY A' for the pixels dy[i][j] = pixels[4 i + j][o],
// o < outputs, zero-padded to the next multiple of kPanel.
void transform_gradient(const float* const* pixels, int64_t outputs, float* z, int64_t panel, int64_t step);

// Terms to add to the outputs, unless null, and whether a ReLU follows.
struct Epilogue {
  const float* bias;              // [outputs]
  const float* const* residuals;  // like pixels
  bool relu;
};

// pixels[4 i + j][o] = (A' m A)[i][j] with m from m[point * step + o], o < outputs, followed by the epilogue. Null
// pixels are skipped.
void transform_output(const float* m, int64_t step, const Epilogue& epilogue, int64_t outputs, float* const* pixels);

}  // namespace atop::winograd
