#pragma once
// The product of matrices: csrc/cpu/multiply.inc, compiled for three x86-64 levels and once in plain C++, and chosen by
// the machine it runs on. An element is computed in the same order of operations whatever its row, vector or register;
// levels with and without a fused multiply-add round differently.

#include "common/launchers.h"

namespace atop {

constexpr int64_t kPanel = kConvPanel;
// What the registers of the highest level take at once.
constexpr int64_t kPanels = 4, kRows = 6;

// m[r][o] = sum_k v[r][k] u[o / kPanel][k][o % kPanel], in the order of k.
void multiply(const float* v,  // [rows, v_step]
              int64_t v_step,
              const float* u,  // [panels, depth, kPanel]
              float* m,        // [rows, m_step], m_step >= panels * kPanel
              int64_t m_step, int64_t rows, int64_t depth, int64_t panels);

// The same in plain C++, for checks of what is computed in float.
void multiply(const double* v, int64_t v_step, const double* u, double* m, int64_t m_step, int64_t rows, int64_t depth,
              int64_t panels);

}  // namespace atop
