#include <algorithm>
#include <vector>

#include "common/launchers.h"
#include "common/parallel.h"
#include "cpu/scratch.h"
#include "cpu/winograd.h"
#include "math/winograd.h"

namespace atop {
namespace {

using namespace winograd;

// The first outputs of all tiles along an axis. A tile has 4 outputs `dilation` apart, from 6 pixels `dilation` apart:
// pixels with the same remainder are an image of their own.
std::vector<int64_t> tile_starts(int64_t size, int64_t dilation) {
  std::vector<int64_t> starts;
  for (int64_t first = 0; first < std::min(dilation, size); ++first) {
    for (int64_t i = first; i < size; i += 4 * dilation) starts.push_back(i);
  }
  return starts;
}

// How many tiles go through the three steps together: the more, the less often weights are read; the fewer, the more
// of their values stay in the cache. Every thread gets as many groups. Results do not depend on any of it.
int64_t tiles_together(int64_t tiles) {
  constexpr int64_t kMost = 6 * kRows;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t groups = round_up((tiles + kMost - 1) / kMost, threads);
  return std::min(kMost, round_up((tiles + groups - 1) / groups, kRows));
}

struct Convolution {
  const float *x, *prepared, *bias;
  Conv3x3 size;
  float* y;
  std::vector<int64_t> rows, columns;
  // Where pixels outside of the image are read.
  std::vector<float> zeros;

  int64_t tiles() const { return size.batch * static_cast<int64_t>(rows.size() * columns.size()); }

  struct Place {
    int64_t first_pixel, row, column;
  };

  Place place(int64_t tile) const {
    const int64_t across = static_cast<int64_t>(columns.size()), down = static_cast<int64_t>(rows.size());
    return {tile / across / down * size.height * size.width, rows[tile / across % down], columns[tile % across]};
  }

  void input(int64_t tile, float* v, int64_t step) const {
    const Place at = place(tile);
    const float* pixels[kPoints];
    for (int64_t k = 0; k < kPoints; ++k) {
      const int64_t i = at.row + (k / 6 - 1) * size.dilation, j = at.column + (k % 6 - 1) * size.dilation;
      const bool inside = i >= 0 && i < size.height && j >= 0 && j < size.width;
      pixels[k] = inside ? x + (at.first_pixel + i * size.width + j) * size.channels : zeros.data();
    }
    transform_input(pixels, size.channels, v, step);
  }

  void output(int64_t tile, int64_t first_output, int64_t outputs, const float* m, int64_t step) const {
    const Place at = place(tile);
    float* pixels[16];
    for (int64_t k = 0; k < 16; ++k) {
      const int64_t i = at.row + k / 4 * size.dilation, j = at.column + k % 4 * size.dilation;
      const bool inside = i < size.height && j < size.width;
      pixels[k] = inside ? y + (at.first_pixel + i * size.width + j) * size.outputs + first_output : nullptr;
    }
    transform_output(m, step, bias ? bias + first_output : nullptr, outputs, pixels);
  }

  void run(int64_t first, int64_t count, float* v, int64_t v_step, float* m, int64_t m_step) const {
    const int64_t width = round_up(size.channels, kPanel), panels = (size.outputs + kPanel - 1) / kPanel;
    for (int64_t t = 0; t < count; ++t) input(first + t, v + t * width, v_step);
    for (int64_t panel = 0; panel < panels; panel += kPanels) {
      const int64_t n = std::min(kPanels, panels - panel), o = panel * kPanel;
      for (int64_t k = 0; k < kPoints; ++k) {
        const float* const u = prepared + (k * panels + panel) * size.channels * kPanel;
        multiply(v + k * v_step, width, u, m + k * m_step, n * kPanel, count, size.channels, n);
      }
      for (int64_t t = 0; t < count; ++t) {
        output(first + t, o, std::min(n * kPanel, size.outputs - o), m + t * n * kPanel, m_step);
      }
    }
  }
};

// G g G' of the weights g[3 i + j] of kPanel outputs, to u[6 i + j] at `step` from one another.
ATOP_CLONES void prepare_panel(const double* g, float* __restrict__ u, int64_t step) {
  double columns[6 * 3 * kPanel], points[6];
  for (int64_t j = 0; j < 3; ++j) {
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      math::weights_at_points(g + j * kPanel + lane, 3 * kPanel, points);
      for (int64_t i = 0; i < 6; ++i) columns[(3 * i + j) * kPanel + lane] = points[i];
    }
  }
  for (int64_t i = 0; i < 6; ++i) {
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      math::weights_at_points(columns + 3 * i * kPanel + lane, kPanel, points);
      for (int64_t j = 0; j < 6; ++j) u[(6 * i + j) * step + lane] = static_cast<float>(points[j]);
    }
  }
}

}  // namespace

const char* launch_conv3x3(const float* x, const float* prepared, const float* bias, Conv3x3 size, float* y, void*) {
  // From there on all neighbours lie outside, and larger numbers could overflow.
  size.dilation = std::min(size.dilation, std::max(size.height, size.width));
  const Convolution convolution{x,
                                prepared,
                                bias,
                                size,
                                y,
                                tile_starts(size.height, size.dilation),
                                tile_starts(size.width, size.dilation),
                                std::vector<float>(static_cast<size_t>(size.channels))};
  const int64_t tiles = convolution.tiles(), together = tiles_together(tiles);
  // The matrices of the points a cache line further apart than they are large: not all in one set of the cache.
  const int64_t v_step = together * round_up(size.channels, kPanel) + kPanel;
  const int64_t m_step = together * kPanels * kPanel + kPanel;
  torch::stable::parallel_for(0, (tiles + together - 1) / together, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> v(kPoints * v_step), m(kPoints * m_step);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * together;
      convolution.run(first, std::min(together, tiles - first), v.get(), v_step, m.get(), m_step);
    }
  });
  return nullptr;
}

const char* launch_conv3x3_prepare(const float* weight, const int64_t* strides, int64_t outputs, int64_t channels,
                                   float* prepared, void*) {
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  const auto body = [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / channels, c = i % channels, first = panel * kPanel;
      double g[9][kPanel] = {};
      for (int64_t lane = 0; lane < std::min(kPanel, outputs - first); ++lane) {
        const float* const from = weight + (first + lane) * strides[0] + c * strides[1];
        for (int64_t k = 0; k < 9; ++k) g[k][lane] = from[k / 3 * strides[2] + k % 3 * strides[3]];
      }
      prepare_panel(g[0], prepared + i * kPanel, panels * channels * kPanel);
    }
  };
  torch::stable::parallel_for(0, panels * channels, std::max<int64_t>(1, kGrain / (kPoints * kPanel)), body);
  return nullptr;
}

}  // namespace atop
