#pragma once
// Matrix product: csrc/cpu/multiply.inc, compiled for three x86-64 levels and once in plain C++; one is selected for
// the machine. The order of operations for an element is the same for any row, vector and register; levels with and
// without a fused multiply-add round differently.

#include "common/launchers.h"

namespace atop {

constexpr int64_t kPanel = kConvPanel;
// The numbers of panels and rows whose sums fit into the registers of the highest level.
constexpr int64_t kPanels = 4, kRows = 6;

struct Product {
  int64_t rows, depth, panels;
  int64_t v_row, v_step;  // from row to row of v, and along its depth
  int64_t m_row;
  bool add;  // accumulate into m
  // The depth may consist of several pieces, v_piece apart.
  int64_t pieces = 1, v_piece = 0;
  // Whether only the first half of the last panel is computed; the other half in m is not written.
  bool half = false;
};

// Whether half of the last panel suffices for this number of outputs.
constexpr bool half_panel(int64_t outputs) {
  return (outputs + kPanel - 1) % kPanel < kPanel / 2;
}

// m[r][o] = sum_k v[r * v_row + k * v_step] u[o / kPanel][k][o % kPanel], in the order of k, piece by piece.
void multiply(const Product& product, const float* v,
              const float* u,  // [panels, pieces, depth, kPanel]
              float* m);       // [rows, m_row], where panels * kPanel are written

// The same in plain C++ with a single piece, also for double, to check the computation in float.
void multiply(const Product& product, const double* v, const double* u, double* m);

}  // namespace atop
