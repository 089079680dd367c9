#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "cpu/multiply.h"
#include "cpu/tiles.h"
#include "cpu/winograd.h"
#include "math/winograd.h"

namespace atop {
namespace {

using namespace winograd;

// Tiles are summed sequentially in chunks, and the sums of the chunks are added in order. Chunks and groups must not
// depend on the number of threads, because sums are rounded. The sums of one chunk take 36 floats per pair of channels:
// beyond about 32 MB, their memory traffic outweighs the gain from more threads.
int64_t chunk_count(int64_t tiles, int64_t channels, int64_t outputs) {
  constexpr int64_t kBytes = int64_t{32} << 20, kLeast = 64;
  const int64_t sums = kPoints * static_cast<int64_t>(sizeof(float)) * channels * outputs;
  return std::min(std::clamp<int64_t>(kBytes / sums, 4, 32), (tiles + kLeast - 1) / kLeast);
}

// The number of tiles of a chunk that go through both steps together: more tiles read and write the sums less often,
// fewer tiles stay in the cache.
int64_t tiles_together(int64_t channels, int64_t outputs) {
  constexpr int64_t kBytes = int64_t{2} << 20;
  const int64_t tile = kPoints * static_cast<int64_t>(sizeof(float)) * (channels + outputs);
  return std::clamp<int64_t>(kBytes / tile, 64, 256);
}

struct WeightGradient {
  const float *dy, *x;
  int64_t channels, outputs;
  Tiles tiles;
  // Zeros, read in place of pixels outside the image.
  std::vector<float> zeros;

  int64_t width() const { return round_up(channels, kPanel); }
  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }

  // The sums m[point * m_step] of the tiles of a group.
  void run(int64_t first, int64_t count, float* v, int64_t v_step, float* z, int64_t z_step, float* m, int64_t m_step,
           bool add) const {
    for (int64_t t = 0; t < count; ++t) {
      const float* pixels[kPoints];
      tiles.find<6>(first + t, x, channels, zeros.data(), pixels);
      transform_input(pixels, nullptr, channels, v + t * width(), v_step);
      tiles.find<4>(first + t, dy, outputs, zeros.data(), pixels);
      transform_gradient(pixels, outputs, z + t * kPanel, count * kPanel, z_step);
    }
    const Product product{channels, count, panels(), 1, width(), panels() * kPanel, add};
    for (int64_t k = 0; k < kPoints; ++k) multiply(product, v + k * v_step, z + k * z_step, m + k * m_step);
  }
};

// dw[o] = G' u G for kPanel outputs, where u is the sum over chunks of u[chunk * chunk_step + (6 i + j) * step + lane].
ATOP_CLONES void restore_panel(const float* __restrict__ u, int64_t step, int64_t chunks, int64_t chunk_step,
                               int64_t outputs, float* __restrict__ dw, int64_t dw_step) {
  double rows[6 * 3 * kPanel], points[6 * kPanel], g[9][kPanel];
  for (int64_t i = 0; i < 6; ++i) {
    for (int64_t j = 0; j < 6; ++j) {
      double sum[kPanel] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* const from = u + chunk * chunk_step + (6 * i + j) * step;
        for (int64_t lane = 0; lane < kPanel; ++lane) sum[lane] += from[lane];
      }
      for (int64_t lane = 0; lane < kPanel; ++lane) points[j * kPanel + lane] = sum[lane];
    }
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      double row[3];
      math::weights_from_points(points + lane, kPanel, row);
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
  const int64_t channels = size.channels, outputs = size.outputs;
  const WeightGradient gradient{
      dy, x, channels, outputs, Tiles(size), std::vector<float>(static_cast<size_t>(std::max(channels, outputs)))};
  const int64_t tiles = gradient.tiles.count(), panels = gradient.panels();
  const int64_t wanted = chunk_count(tiles, channels, outputs), length = (tiles + wanted - 1) / wanted;
  const int64_t chunks = (tiles + length - 1) / length;
  const int64_t together = std::min(length, tiles_together(channels, outputs));
  // As in the convolution, one cache line of padding between the matrices of the points.
  const int64_t v_step = together * gradient.width() + kPanel, z_step = (together * panels + 1) * kPanel;
  const int64_t m_step = (channels * panels + 1) * kPanel, chunk_step = kPoints * m_step;
  const Scratch<float> m(chunks * chunk_step);
  const int64_t grain_of_chunks = grain_of_products(kPoints * length * channels * outputs);
  torch::stable::parallel_for(0, chunks, grain_of_chunks, [&](int64_t begin, int64_t end) {
    const Scratch<float> v(kPoints * v_step), z(kPoints * z_step);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t start = chunk * length, stop = std::min(tiles, start + length);
      for (int64_t first = start; first < stop; first += together) {
        gradient.run(first, std::min(together, stop - first), v.get(), v_step, z.get(), z_step,
                     m.get() + chunk * chunk_step, m_step, first > start);
      }
    }
  });
  const int64_t grain = std::max<int64_t>(1, kGrain / (chunks * kPoints * kPanel));
  torch::stable::parallel_for(0, panels * channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i / panels, o = i % panels * kPanel;
      restore_panel(m.get() + i * kPanel, m_step, chunks, chunk_step, std::min(kPanel, outputs - o),
                    dw + (o * channels + c) * 9, channels * 9);
    }
  });
  return nullptr;
}

}  // namespace atop
