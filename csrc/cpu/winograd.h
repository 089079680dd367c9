#pragma once
// The inner loops of the convolution: csrc/cpu/winograd.inc, compiled for three x86-64 levels and once in plain C++,
// and chosen by the machine it runs on. An element is computed in the same order of operations whatever its tile,
// vector or register; levels with and without a fused multiply-add round differently.

#include "common/launchers.h"

namespace atop::winograd {

constexpr int kPoints = 36;  // products of a tile and a pair of channels
constexpr int64_t kPanel = kConvPanel;
constexpr int64_t kPanels = 4;  // panels of a call at most
constexpr int64_t kRows = 6;    // tiles that the registers of the highest level take at once

// v[point * step + c] = B' d B of the pixels d[i][j] = pixels[6 i + j][c], c < channels. Writes up to the next multiple
// of kPanel.
void transform_input(const float* const* pixels, int64_t channels, float* v, int64_t step);

// z[(o / kPanel) * panel + point * step + o % kPanel] = A dY A' of the pixels dy[i][j] = pixels[4 i + j][o],
// o < outputs. Writes up to the next multiple of kPanel, where it is 0.
void transform_gradient(const float* const* pixels, int64_t outputs, float* z, int64_t panel, int64_t step);

// One product of matrices, for one point: rows are tiles and the depth channels, or in the gradient of the weights the
// other way round.
struct Product {
  int64_t rows, depth, panels;
  int64_t v_row, v_step;  // from row to row of v, and along its depth
  int64_t m_row;
  bool add;  // to what m holds
};

// m[r][o] = sum_k v[r * v_row + k * v_step] u[o / kPanel][k][o % kPanel], in the order of k.
void multiply(const Product& product, const float* v,
              const float* u,  // [panels, depth, kPanel]
              float* m);       // [rows, m_row], of which panels * kPanel are written

// pixels[4 i + j][o] = (A' m A)[i][j] + bias[o] with m from m[point * step + o], o < outputs. Pixels that are null are
// left out, and so is a bias that is null.
void transform_output(const float* m, int64_t step, const float* bias, int64_t outputs, float* const* pixels);

}  // namespace atop::winograd
