#pragma once
// The product of matrices: csrc/cpu/multiply.inc, compiled for three x86-64 levels and once in plain C++, and chosen by
// the machine it runs on. An element is computed in the same order of operations whatever its row, vector or register;
// levels with and without a fused multiply-add round differently.

#include "common/launchers.h"

namespace atop {

constexpr int64_t kPanel = kConvPanel;
// What the registers of the highest level take at once.
constexpr int64_t kPanels = 4, kRows = 6;

struct Product {
  int64_t rows, depth, panels;
  int64_t v_row, v_step;  // from row to row of v, and along its depth
  int64_t m_row;
  bool add;  // to what m holds
  // The depth may consist of pieces, of which the next begins v_piece behind the last.
  int64_t pieces = 1, v_piece = 0;
  // Whether only the first half of the last panel is wanted; m's other half is left as it is.
  bool half = false;
};

// Whether that suffices for so many outputs.
constexpr bool half_panel(int64_t outputs) {
  return (outputs + kPanel - 1) % kPanel < kPanel / 2;
}

// m[r][o] = sum_k v[r * v_row + k * v_step] u[o / kPanel][k][o % kPanel], in the order of k, piece by piece.
void multiply(const Product& product, const float* v,
              const float* u,  // [panels, pieces, depth, kPanel]
              float* m);       // [rows, m_row], of which panels * kPanel are written

// The same in plain C++ and one piece, for checks of what is computed in float.
void multiply(const Product& product, const double* v, const double* u, double* m);

}  // namespace atop
