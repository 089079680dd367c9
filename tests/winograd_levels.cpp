// The loops of csrc/cpu/winograd.cpp and multiply.cpp against a convolution in float64, driven by
// tests/test_math_headers.py, which compiles it once for every level that they may choose. Prints the largest error for
// some sizes.

#include "cpu/multiply.cpp"
#include "cpu/winograd.cpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <vector>

using namespace atop;

namespace {

// Numbers in [-1, 1) that repeat late.
float number(int64_t i) {
  return static_cast<float>((i * 7919 + i * i % 613) % 2000) / 1000.0f - 1.0f;
}

// One call of each step for `tiles` tiles: the pixels of tile t, channel c and place k are number(...).
double largest_error(int64_t tiles, int64_t channels, int64_t outputs) {
  using namespace winograd;
  const int64_t panels = (outputs + kPanel - 1) / kPanel, width = (channels + kPanel - 1) / kPanel * kPanel;
  std::vector<float> x(tiles * 36 * channels), g(outputs * channels * 9), bias(outputs), y(tiles * 16 * outputs);
  std::vector<float> u(36 * panels * channels * kPanel), v(36 * tiles * width), m(36 * tiles * panels * kPanel);
  for (size_t i = 0; i < x.size(); ++i) x[i] = number(i);
  for (size_t i = 0; i < g.size(); ++i) g[i] = number(i + 12345);
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = number(i + 54321);
  for (int64_t i = 0; i < outputs * channels; ++i) {
    const int64_t o = i / channels, c = i % channels;
    float rows[18], points[36];
    for (int64_t j = 0; j < 3; ++j) math::weights_at_points(&g[9 * i + j], 3, rows + 6 * j);
    for (int64_t k = 0; k < 6; ++k) math::weights_at_points(rows + k, 6, points + 6 * k);
    for (int64_t k = 0; k < 36; ++k) {
      u[((k * panels + o / kPanel) * channels + c) * kPanel + o % kPanel] = points[k];
    }
  }
  for (int64_t t = 0; t < tiles; ++t) {
    const float* pixels[36];
    for (int64_t k = 0; k < 36; ++k) pixels[k] = &x[(t * 36 + k) * channels];
    transform_input(pixels, nullptr, channels, &v[t * width], tiles * width);
  }
  for (int64_t k = 0; k < 36; ++k) {
    multiply({tiles, channels, panels, width, 1, panels * kPanel, false}, &v[k * tiles * width],
             &u[k * panels * channels * kPanel], &m[k * tiles * panels * kPanel]);
  }
  for (int64_t t = 0; t < tiles; ++t) {
    float* pixels[16];
    for (int64_t k = 0; k < 16; ++k) pixels[k] = &y[(t * 16 + k) * outputs];
    transform_output(&m[t * panels * kPanel], tiles * panels * kPanel, {bias.data(), nullptr, false}, outputs, pixels);
  }
  double error = 0, largest = 0;
  for (int64_t i = 0; i < tiles * 16 * outputs; ++i) {
    const int64_t t = i / outputs / 16, row = i / outputs % 16 / 4, column = i / outputs % 4, o = i % outputs;
    double expected = bias[o];
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t k = 0; k < 9; ++k) {
        const int64_t place = (row + k / 3) * 6 + column + k % 3;
        expected += double(x[(t * 36 + place) * channels + c]) * g[(o * channels + c) * 9 + k];
      }
    }
    error = std::max(error, std::abs(y[i] - expected));
    largest = std::max(largest, std::abs(expected));
  }
  return error / largest;
}

// The same for the gradient of the weights, twice, the second time added to the first.
double largest_weight_error(int64_t tiles, int64_t channels, int64_t outputs) {
  using namespace winograd;
  const int64_t panels = (outputs + kPanel - 1) / kPanel, width = (channels + kPanel - 1) / kPanel * kPanel;
  std::vector<float> x(tiles * 36 * channels), dy(tiles * 16 * outputs);
  std::vector<float> v(36 * tiles * width), z(36 * tiles * panels * kPanel), m(36 * channels * panels * kPanel);
  for (size_t i = 0; i < x.size(); ++i) x[i] = number(i);
  for (size_t i = 0; i < dy.size(); ++i) dy[i] = number(i + 12345);
  for (int64_t t = 0; t < tiles; ++t) {
    const float* pixels[36];
    for (int64_t k = 0; k < 36; ++k) pixels[k] = &x[(t * 36 + k) * channels];
    transform_input(pixels, nullptr, channels, &v[t * width], tiles * width);
    for (int64_t k = 0; k < 16; ++k) pixels[k] = &dy[(t * 16 + k) * outputs];
    transform_gradient(pixels, outputs, &z[t * kPanel], tiles * kPanel, tiles * panels * kPanel);
  }
  for (const bool add : {false, true}) {
    for (int64_t k = 0; k < 36; ++k) {
      multiply({channels, tiles, panels, 1, width, panels * kPanel, add}, &v[k * tiles * width],
               &z[k * tiles * panels * kPanel], &m[k * channels * panels * kPanel]);
    }
  }
  double error = 0, largest = 0;
  for (int64_t i = 0; i < outputs * channels; ++i) {
    const int64_t o = i / channels, c = i % channels;
    double points[36], rows[18], g[9];
    for (int64_t k = 0; k < 36; ++k) points[k] = m[(k * channels + c) * panels * kPanel + o];
    for (int64_t k = 0; k < 6; ++k) math::weights_from_points(points + 6 * k, 1, rows + 3 * k);
    for (int64_t k = 0; k < 3; ++k) math::weights_from_points(rows + k, 3, g + 3 * k);
    for (int64_t k = 0; k < 9; ++k) {
      double expected = 0;
      for (int64_t j = 0; j < 16 * tiles; ++j) {
        const int64_t t = j / 16, place = (j % 16 / 4 + k / 3) * 6 + j % 4 + k % 3;
        expected += 2 * double(dy[j * outputs + o]) * x[(t * 36 + place) * channels + c];
      }
      error = std::max(error, std::abs(g[k % 3 * 3 + k / 3] - expected));
      largest = std::max(largest, std::abs(expected));
    }
  }
  return error / largest;
}

}  // namespace

int main() {
  for (const auto& [tiles, channels, outputs] :
       {std::array<int64_t, 3>{1, 1, 1}, {7, 16, 64}, {13, 37, 49}, {2, 5, 20}}) {
    printf("%.3e\n%.3e\n", largest_error(tiles, channels, outputs), largest_weight_error(tiles, channels, outputs));
  }
}
