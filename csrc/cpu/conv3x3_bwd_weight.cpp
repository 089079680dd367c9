#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "cpu/tiles.h"
#include "cpu/winograd.h"
#include "math/winograd.h"

namespace atop {
namespace {

using namespace winograd;

// How many tiles go through both steps together: the more, the less often the sums are read and written; the fewer, the
// more of the values stay in the cache. It must not depend on the threads, as sums are added once for every group.
int64_t tiles_together(int64_t channels, int64_t outputs) {
  constexpr int64_t kBytes = int64_t{8} << 20;
  const int64_t tile = kPoints * static_cast<int64_t>(sizeof(float)) * (channels + outputs);
  return std::clamp<int64_t>(kBytes / tile, 128, 512);
}

// dw[o] = G' u G of kPanel outputs, with u from u[(6 i + j) * step + lane].
ATOP_CLONES void restore_panel(const float* __restrict__ u, int64_t step, int64_t outputs, float* __restrict__ dw,
                               int64_t dw_step) {
  double rows[6 * 3 * kPanel], points[6], g[9][kPanel];
  for (int64_t i = 0; i < 6; ++i) {
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      for (int64_t j = 0; j < 6; ++j) points[j] = u[(6 * i + j) * step + lane];
      double row[3];
      math::weights_from_points(points, 1, row);
      for (int64_t j = 0; j < 3; ++j) rows[(3 * i + j) * kPanel + lane] = row[j];
    }
  }
  for (int64_t j = 0; j < 3; ++j) {
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      double column[3];
      math::weights_from_points(rows + j * kPanel + lane, 3 * kPanel, column);
      for (int64_t i = 0; i < 3; ++i) g[3 * i + j][lane] = column[i];
    }
  }
  for (int64_t lane = 0; lane < outputs; ++lane) {
    for (int64_t k = 0; k < 9; ++k) dw[lane * dw_step + k] = static_cast<float>(g[k][lane]);
  }
}

}  // namespace

const char* launch_conv3x3_bwd_weight(const float* dy, const float* x, Conv3x3 size, float* dw, void*) {
  // Channels of a product at most: enough of them for many threads.
  constexpr int64_t kChannels = 8 * kRows;
  const int64_t channels = size.channels, outputs = size.outputs;
  const Tiles tiles(size);
  const int64_t width = round_up(channels, kPanel), panels = (outputs + kPanel - 1) / kPanel;
  const int64_t together = std::min(tiles.count(), tiles_together(channels, outputs));
  const int64_t v_step = together * width + kPanel, z_step = together * panels * kPanel + kPanel;
  const int64_t m_step = channels * panels * kPanel + kPanel;
  const Scratch v(kPoints * v_step), z(kPoints * z_step), m(kPoints * m_step);
  const std::vector<float> zeros(static_cast<size_t>(std::max(channels, outputs)));
  const int64_t across = (panels + kPanels - 1) / kPanels, down = (channels + kChannels - 1) / kChannels;
  for (int64_t first = 0; first < tiles.count(); first += together) {
    const int64_t count = std::min(together, tiles.count() - first);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const float* pixels[kPoints];
        tiles.find<6>(first + t, x, channels, zeros.data(), pixels);
        transform_input(pixels, channels, v.get() + t * width, v_step);
        tiles.find<4>(first + t, dy, outputs, zeros.data(), pixels);
        transform_gradient(pixels, outputs, z.get() + t * kPanel, count * kPanel, z_step);
      }
    });
    torch::stable::parallel_for(0, kPoints * across * down, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t point = i / across / down, panel = i / down % across * kPanels, c = i % down * kChannels;
        const Product product{std::min(kChannels, channels - c),
                              count,
                              std::min(kPanels, panels - panel),
                              1,
                              width,
                              panels * kPanel,
                              first > 0};
        multiply(product, v.get() + point * v_step + c, z.get() + point * z_step + panel * count * kPanel,
                 m.get() + point * m_step + (c * panels + panel) * kPanel);
      }
    });
  }
  torch::stable::parallel_for(0, panels * channels, std::max<int64_t>(1, kGrain / (kPoints * kPanel)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const int64_t c = i / panels, o = i % panels * kPanel;
                                  restore_panel(m.get() + i * kPanel, m_step, std::min(kPanel, outputs - o),
                                                dw + (o * channels + c) * 9, channels * 9);
                                }
                              });
  return nullptr;
}

}  // namespace atop
