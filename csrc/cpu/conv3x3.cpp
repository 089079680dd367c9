#include <algorithm>
#include <vector>

#include "common/launchers.h"
#include "common/parallel.h"
#include "cpu/multiply.h"
#include "cpu/tiles.h"
#include "cpu/winograd.h"
#include "math/winograd.h"

namespace atop {
namespace {

using namespace winograd;

// The number of tiles that go through the three steps together: more tiles read the weights less often, fewer tiles
// stay in the cache. All threads get the same number of groups. Results do not depend on the grouping.
int64_t tiles_together(int64_t tiles) {
  constexpr int64_t kMost = 6 * kRows;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t groups = round_up((tiles + kMost - 1) / kMost, threads);
  return std::min(kMost, round_up((tiles + groups - 1) / groups, kRows));
}

struct Convolution {
  const float *x, *prepared;
  ConvFusion fusion;
  int64_t channels, outputs;
  float* y;
  Tiles tiles;
  // Zeros, read in place of pixels outside the image.
  std::vector<float> zeros;

  void run(int64_t first, int64_t count, float* v, int64_t v_step, float* m, int64_t m_step) const {
    const int64_t width = round_up(channels, kPanel), panels = (outputs + kPanel - 1) / kPanel;
    for (int64_t t = 0; t < count; ++t) {
      const float *pixels[kPoints], *masks[kPoints];
      tiles.find<6>(first + t, x, channels, zeros.data(), pixels);
      if (fusion.mask) tiles.find<6>(first + t, fusion.mask, channels, zeros.data(), masks);
      transform_input(pixels, fusion.mask ? masks : nullptr, channels, v + t * width, v_step);
    }
    for (int64_t panel = 0; panel < panels; panel += kPanels) {
      const int64_t n = std::min(kPanels, panels - panel), o = panel * kPanel;
      const bool half = panel + n == panels && half_panel(outputs);
      const Product product{count, channels, n, width, 1, n * kPanel, false, 1, 0, half};
      for (int64_t k = 0; k < kPoints; ++k) {
        multiply(product, v + k * v_step, prepared + (k * panels + panel) * channels * kPanel, m + k * m_step);
      }
      for (int64_t t = 0; t < count; ++t) {
        float* pixels[16];
        const float* residuals[16];
        tiles.find<4, float>(first + t, y + o, outputs, nullptr, pixels);
        if (fusion.residual) tiles.find<4, const float>(first + t, fusion.residual + o, outputs, nullptr, residuals);
        const Epilogue epilogue{fusion.bias ? fusion.bias + o : nullptr, fusion.residual ? residuals : nullptr,
                                fusion.relu};
        transform_output(m + t * n * kPanel, m_step, epilogue, std::min(n * kPanel, outputs - o), pixels);
      }
    }
  }
};

// Writes G g G' for the weights g[3 i + j] of kPanel outputs to u[6 i + j], which are `step` apart.
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

const char* launch_conv3x3(const float* x, const float* prepared, ConvFusion fusion, Conv3x3 size, float* y, void*) {
  const Convolution convolution{x,
                                prepared,
                                fusion,
                                size.channels,
                                size.outputs,
                                y,
                                Tiles(size),
                                std::vector<float>(static_cast<size_t>(size.channels))};
  const int64_t tiles = convolution.tiles.count(), together = tiles_together(tiles);
  // One cache line of padding between the matrices of the points, so that they do not map to the same cache set.
  const int64_t v_step = together * round_up(size.channels, kPanel) + kPanel;
  const int64_t m_step = together * kPanels * kPanel + kPanel;
  const int64_t grain = grain_of_products(kPoints * together * size.channels * size.outputs);
  torch::stable::parallel_for(0, (tiles + together - 1) / together, grain, [&](int64_t begin, int64_t end) {
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
