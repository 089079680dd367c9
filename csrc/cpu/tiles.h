#pragma once
// The tiles of Winograd's convolution, and pointers to their pixels.

#include <algorithm>
#include <vector>

#include "common/launchers.h"
#include "cpu/scratch.h"

namespace atop::winograd {

// The first outputs of all tiles along an axis. A tile has 4 outputs and 6 input pixels, each `dilation` apart: pixels
// with the same remainder form a separate image.
inline std::vector<int64_t> tile_starts(int64_t size, int64_t dilation) {
  std::vector<int64_t> starts;
  for (int64_t first = 0; first < std::min(dilation, size); ++first) {
    for (int64_t i = first; i < size; i += 4 * dilation) starts.push_back(i);
  }
  return starts;
}

struct Tiles {
  int64_t batch, height, width, dilation;
  std::vector<int64_t> rows, columns;

  explicit Tiles(const Conv3x3& size)
      : batch(size.batch),
        height(size.height),
        width(size.width),
        // From this dilation on, all neighbors lie outside the image, and larger numbers could overflow.
        dilation(std::min(size.dilation, std::max(size.height, size.width))),
        rows(tile_starts(height, dilation)),
        columns(tile_starts(width, dilation)) {}

  int64_t count() const { return batch * static_cast<int64_t>(rows.size() * columns.size()); }

  // Pointers to the N x N pixels of a tile: its 4x4 outputs, or the 6x6 pixels on which they depend.
  template <int N, typename T>
  void find(int64_t tile, T* images, int64_t channels, T* outside, T** pixels) const {
    constexpr int64_t kShift = N == 6 ? -1 : 0;
    const int64_t across = static_cast<int64_t>(columns.size()), down = static_cast<int64_t>(rows.size());
    const int64_t row = rows[tile / across % down], column = columns[tile % across];
    T* const image = images + tile / across / down * height * width * channels;
    int64_t offsets[N];
    bool inside[N];
    for (int64_t l = 0; l < N; ++l) {
      const int64_t j = column + (l + kShift) * dilation;
      inside[l] = j >= 0 && j < width;
      offsets[l] = j * channels;
    }
    for (int64_t k = 0; k < N; ++k) {
      const int64_t i = row + (k + kShift) * dilation;
      const bool has_row = i >= 0 && i < height;
      T* const pixel = image + (has_row ? i : 0) * width * channels;
      for (int64_t l = 0; l < N; ++l) pixels[N * k + l] = has_row && inside[l] ? pixel + offsets[l] : outside;
    }
  }
};

}  // namespace atop::winograd
