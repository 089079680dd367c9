#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace atop {

// The same as in ATen: with fewer elements, a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// The grain size for items of `products` multiply-adds each; a core does about 16 of these per element.
inline int64_t grain_of_products(int64_t products) {
  return std::max<int64_t>(1, 16 * kGrain / std::max<int64_t>(1, products));
}

template <typename Body>
void parallel_for(int64_t n, const Body& body) {
  torch::stable::parallel_for(0, n, kGrain, body);
}

// Calls body(row, first, count) on pieces of rows that cover [0, rows * inner), so that both few long rows and many
// short rows are distributed evenly over the threads.
template <typename Body>
void parallel_for_rows(int64_t rows, int64_t inner, const Body& body) {
  parallel_for(rows * inner, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t row = i / inner, first = i - row * inner, count = std::min(end - i, inner - first);
      body(row, first, count);
      i += count;
    }
  });
}

}  // namespace atop
