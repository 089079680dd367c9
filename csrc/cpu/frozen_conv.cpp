#include <algorithm>
#include <cstring>
#include <vector>

#include "common/launchers.h"
#include "common/parallel.h"
#include "cpu/multiply.h"
#include "cpu/scratch.h"

namespace atop {
namespace {

// Along one axis: outputs origin + step * u, u < count, which read inputs first + stride * u + k, k < taps. A
// convolution has all outputs in one phase, its gradient one phase per remainder.
struct Axis {
  int64_t origin, step, count, first, stride, taps;

  int64_t end(int64_t u) const { return taps ? first + stride * u + taps : first; }
};

// The phases of the gradient: with weight k, output i reads input (i + padding - k) / stride if that is an integer.
std::vector<Axis> axes(int64_t weights, int64_t stride, int64_t padding, int64_t outputs, bool transposed) {
  if (!transposed) return {{0, 1, outputs, -padding, stride, weights}};
  std::vector<Axis> phases;
  for (int64_t i = 0; i < stride; ++i) {
    const int64_t least = (i + padding) % stride, taps = least < weights ? (weights - 1 - least) / stride + 1 : 0;
    const int64_t count = i < outputs ? (outputs - i + stride - 1) / stride : 0;
    phases.push_back({i, stride, count, (i + padding) / stride - taps + 1, 1, taps});
  }
  return phases;
}

// All phases as one, whose outputs read the union of their inputs.
Axis together(const std::vector<Axis>& phases) {
  int64_t first = INT64_MAX, end = INT64_MIN;
  for (const Axis& a : phases) {
    if (a.taps == 0) continue;
    first = std::min(first, a.first);
    end = std::max(end, a.first + a.taps);
  }
  return {0, phases[0].step, phases[0].count, first, 1, end - first};
}

int64_t panels_of(int64_t outputs) {
  return (outputs + kPanel - 1) / kPanel;
}

// to = from where `by` is positive, and 0 elsewhere.
ATOP_CLONES void copy_masked(const float* from, const float* by, int64_t n, float* __restrict__ to) {
  for (int64_t i = 0; i < n; ++i) to[i] = by[i] <= 0 ? 0.0f : from[i];
}

// Writes rows of `outputs` sums, which are `pitch` apart, plus bias and residual, after the ReLU if any, to y.
template <bool kResidual, bool kRelu>
ATOP_CLONES void finish(const float* sums, int64_t pitch, const float* bias, const float* residual, int64_t count,
                        int64_t outputs, float* __restrict__ y, int64_t y_step) {
  for (int64_t u = 0; u < count; ++u) {
    for (int64_t o = 0; o < outputs; ++o) {
      float value = sums[u * pitch + o] + bias[o];
      if (kResidual) value += residual[u * y_step + o];
      y[u * y_step + o] = kRelu && value <= 0 ? 0.0f : value;
    }
  }
}

struct FrozenConvolution {
  const float *x, *prepared;
  ConvFusion fusion;
  StridedConv size;
  float* y;
  std::vector<Axis> rows, columns;
  // The sums per position: the outputs or, if these are few, the outputs of all remainders side by side, most of whose
  // weights are not 0.
  int64_t lanes;
  std::vector<float> bias;  // of whole panels

  FrozenConvolution(const float* x, const float* prepared, ConvFusion fusion, StridedConv size, float* y)
      : x(x),
        prepared(prepared),
        fusion(fusion),
        size(size),
        y(y),
        rows(axes(size.weight_rows, size.stride, size.padding, size.y_height, size.transposed)),
        columns(axes(size.weight_columns, size.stride, size.padding, size.y_width, size.transposed)),
        lanes(size.outputs),
        bias(static_cast<size_t>(panels_of(size.outputs) * kPanel)) {
    if (fusion.bias) std::copy_n(fusion.bias, size.outputs, bias.begin());
    const Axis row = together(rows), column = together(columns);
    const int64_t all = size.stride * size.stride * size.outputs;
    const int64_t joint = panels_of(all) * row.taps * column.taps;
    if (size.transposed && joint < panels_of(size.outputs) * size.weight_rows * size.weight_columns) {
      rows = {row};
      columns = {column};
      lanes = all;
    }
  }

  int64_t panels() const { return panels_of(lanes); }

  // The inputs that outputs u in [begin, end) read, along an axis.
  static int64_t low(const std::vector<Axis>& axis, int64_t begin) {
    int64_t least = INT64_MAX;
    for (const Axis& a : axis) {
      if (begin < a.count) least = std::min(least, a.first + a.stride * begin);
    }
    return least;
  }
  static int64_t high(const std::vector<Axis>& axis, int64_t end) {
    int64_t most = INT64_MIN;
    for (const Axis& a : axis) {
      if (a.count) most = std::max(most, a.end(std::min(end, a.count) - 1));
    }
    return most;
  }

  int64_t left() const { return low(columns, 0); }
  int64_t pitch() const { return (high(columns, columns[0].count) - left()) * size.channels; }

  // Row i of an image with zero padding.
  void pad(int64_t image, int64_t i, float* to) const {
    const int64_t channels = size.channels, from = std::max<int64_t>(0, left());
    const int64_t count = std::max<int64_t>(0, std::min(size.width, left() + pitch() / channels) - from);
    std::fill_n(to, pitch(), 0.0f);
    if (i < 0 || i >= size.height) return;
    to += (from - left()) * channels;
    if (!size.channels_last) {
      for (int64_t c = 0; c < channels; ++c) {
        const float* const plane = x + ((image * channels + c) * size.height + i) * size.width + from;
        for (int64_t j = 0; j < count; ++j) to[j * channels + c] = plane[j];
      }
      return;
    }
    const int64_t at = ((image * size.height + i) * size.width + from) * channels;
    if (fusion.mask) {
      copy_masked(x + at, fusion.mask + at, count * channels, to);
    } else {
      std::copy_n(x + at, count * channels, to);
    }
  }

  // Writes row i of the outputs of a phase, for `outputs` channels from o on, from their sums.
  void store(int64_t image, int64_t i, const Axis& axis, int64_t o, int64_t outputs, int64_t pitch,
             const float* sums) const {
    if (!size.y_channels_last) {
      for (int64_t c = 0; c < outputs; ++c) {
        float* const to = y + ((image * size.outputs + o + c) * size.y_height + i) * size.y_width + axis.origin;
        for (int64_t u = 0; u < axis.count; ++u) to[axis.step * u] = sums[u * pitch + c];
      }
      return;
    }
    const int64_t at = ((image * size.y_height + i) * size.y_width + axis.origin) * size.outputs + o;
    const int64_t y_step = axis.step * size.outputs;
    const float *const shift = bias.data() + o, *const residual = fusion.residual + (fusion.residual ? at : 0);
    if (fusion.residual) {
      (fusion.relu ? finish<true, true> : finish<true, false>)(sums, pitch, shift, residual, axis.count, outputs,
                                                               y + at, y_step);
    } else {
      (fusion.relu ? finish<false, true> : finish<false, false>)(sums, pitch, shift, nullptr, axis.count, outputs,
                                                                 y + at, y_step);
    }
  }

  // The same for sums of all remainders, lanes [o, o + count).
  void store_all(int64_t image, int64_t u, const Axis& axis, int64_t o, int64_t count, int64_t pitch,
                 const float* sums) const {
    const int64_t plane = size.y_channels_last ? 1 : size.y_height * size.y_width;
    const int64_t pixel = size.y_channels_last ? size.outputs : 1;
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t c = (o + lane) % size.outputs, phase = (o + lane) / size.outputs;
      const int64_t i = u * size.stride + phase / size.stride, first = phase % size.stride;
      if (i >= size.y_height) continue;
      float* const to = y + image * size.y_height * size.y_width * size.outputs + c * plane + i * size.y_width * pixel;
      for (int64_t j = first, v = 0; j < size.y_width; j += size.stride, ++v) to[j * pixel] = sums[v * pitch + lane];
    }
  }

  // The outputs of one phase in rows u in [begin, end), from padded rows that begin with input row `top`.
  void phase(int64_t image, const Axis& row, const Axis& column, int64_t begin, int64_t end, const float* weights,
             const float* padded, int64_t top, float* sums) const {
    const int64_t depth = column.taps * size.channels;
    for (int64_t panel = 0; panel < panels(); panel += kPanels) {
      const int64_t n = std::min(kPanels, panels() - panel), o = panel * kPanel, pitch_of_sums = n * kPanel;
      const Product product{column.count,
                            depth,
                            n,
                            column.stride * size.channels,
                            1,
                            pitch_of_sums,
                            false,
                            row.taps,
                            pitch(),
                            panel + n == panels() && half_panel(lanes)};
      for (int64_t u = begin; u < std::min(end, row.count); ++u) {
        const float* const v =
            padded + (row.first + row.stride * u - top) * pitch() + (column.first - left()) * size.channels;
        multiply(product, v, weights + panel * row.taps * depth * kPanel, sums);
        const int64_t count = std::min(pitch_of_sums, lanes - o);
        if (lanes == size.outputs) {
          store(image, row.origin + row.step * u, column, o, count, pitch_of_sums, sums);
        } else {
          store_all(image, u, column, o, count, pitch_of_sums, sums);
        }
      }
    }
  }

  void run(int64_t image, int64_t begin, int64_t end, float* padded, float* sums) const {
    const int64_t top = low(rows, begin), bottom = high(rows, end);
    for (int64_t i = top; i < bottom; ++i) pad(image, i, padded + (i - top) * pitch());
    const float* weights = prepared;
    for (const Axis& row : rows) {
      for (const Axis& column : columns) {
        phase(image, row, column, begin, end, weights, padded, top, sums);
        weights += row.taps * column.taps * size.channels * panels() * kPanel;
      }
    }
  }
};

}  // namespace

int64_t frozen_conv_weights(const StridedConv& size) {
  const FrozenConvolution conv(nullptr, nullptr, {}, size, nullptr);
  int64_t taps = 0;
  for (const Axis& row : conv.rows) {
    for (const Axis& column : conv.columns) taps += row.taps * column.taps;
  }
  return taps * size.channels * conv.panels() * kPanel;
}

const char* launch_frozen_conv(const float* x, const float* prepared, ConvFusion fusion, StridedConv size, float* y,
                               void*) {
  const FrozenConvolution conv(x, prepared, fusion, size, y);
  // Process as many rows at a time as fit into the L2 cache.
  constexpr int64_t kFloats = 32768;
  const int64_t count = conv.rows[0].count, most = std::max<int64_t>(1, kFloats / (conv.pitch() * conv.rows[0].stride));
  const int64_t bands = (count + most - 1) / most, band = (count + bands - 1) / bands;
  int64_t most_rows = 0;
  for (int64_t begin = 0; begin < count; begin += band) {
    most_rows = std::max(most_rows,
                         FrozenConvolution::high(conv.rows, begin + band) - FrozenConvolution::low(conv.rows, begin));
  }
  const int64_t all = frozen_conv_weights(size) * count * conv.columns[0].count;
  torch::stable::parallel_for(0, size.batch * bands, grain_of_products(all / bands), [&](int64_t first, int64_t last) {
    const Scratch<float> padded(most_rows * conv.pitch()), sums(conv.columns[0].count * kPanels * kPanel);
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % bands * band;
      conv.run(i / bands, begin, std::min(count, begin + band), padded.get(), sums.get());
    }
  });
  return nullptr;
}

}  // namespace atop
