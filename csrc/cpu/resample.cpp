#include <algorithm>
#include <memory>
#include <vector>

#include "common/launchers.h"
#include "common/parallel.h"

namespace atop {
namespace {

// The first column of row i, clamped so that invalid taps stay inside the image.
template <typename C>
int64_t first_of(const Taps<C>& taps, int64_t group, int64_t i, int64_t pixels) {
  return std::clamp<int64_t>(taps.start[group + i], 0, pixels - taps.count);
}

template <typename T, typename C>
ATOP_CLONES void add_scaled(const T* row, C weight, C* __restrict__ sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] = sum[i] + weight * C(load(row[i]));
}

template <typename C, typename T>
ATOP_CLONES void narrow(const C* sum, T* __restrict__ y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(sum[i], &y[i]);
}

// The same for two taps and one channel, without branches. Not cloned for higher levels: gathers are slower than loads.
template <typename T, typename C>
void resample_row_2(const T* x, const Taps<C>& taps, int64_t group, int64_t width, C* out) {
  const C* weight = taps.weight + group * 2;
  for (int64_t i = 0; i < taps.rows; ++i) {
    const T* p = x + first_of(taps, group, i, width);
    const C a = weight[2 * i] * C(load(p[0])), b = weight[2 * i + 1] * C(load(p[1]));
    const C sum = C(0) + (weight[2 * i] != C(0) ? a : C(0));
    out[i] = sum + (weight[2 * i + 1] != C(0) ? b : C(0));
  }
}

// Applies the column matrix to one row of an image. In channels_last, every tap covers all channels of a pixel.
template <typename T, typename C>
void resample_row(const T* x, const Taps<C>& taps, int64_t group, int64_t width, int64_t channels, C* out) {
  if (taps.count == 2 && channels == 1) return resample_row_2(x, taps, group, width, out);
  for (int64_t i = 0; i < taps.rows; ++i) {
    const C* weight = taps.weight + (group + i) * taps.count;
    const T* p = x + first_of(taps, group, i, width) * channels;
    for (int64_t c = 0; c < channels; ++c) {
      C sum = 0;
      for (int64_t k = 0; k < taps.count; ++k) {
        if (weight[k] != C(0)) sum = sum + weight[k] * C(load(p[k * channels + c]));
      }
      out[i * channels + c] = sum;
    }
  }
}

// One axis after the other for an image or a plane of it, with `inner` values per pixel.
template <typename T>
struct Plane {
  using C = typename Compute<T>::type;
  const T* x;
  Taps<C> rows, columns;
  int64_t row_group, column_group, height, width, inner;

  // If the number of rows shrinks, apply the row matrix first.
  void rows_first(T* y, std::vector<C>& sum, std::vector<C>& line) const {
    for (int64_t i = 0; i < rows.rows; ++i) {
      const C* weight = rows.weight + (row_group + i) * rows.count;
      const T* p = x + first_of(rows, row_group, i, height) * width * inner;
      std::fill(sum.begin(), sum.end(), C(0));
      for (int64_t k = 0; k < rows.count; ++k, p += width * inner) {
        if (weight[k] != C(0)) add_scaled(p, weight[k], sum.data(), width * inner);
      }
      resample_row(sum.data(), columns, column_group, width, inner, line.data());
      narrow(line.data(), y + i * columns.rows * inner, columns.rows * inner);
    }
  }

  // Rows that several outputs need are computed once: `ring` holds as many rows as an output has taps.
  void columns_first(T* y, std::vector<C>& sum, std::vector<C>& ring, std::vector<int64_t>& held) const {
    const int64_t n = columns.rows * inner;
    std::fill(held.begin(), held.end(), -1);
    for (int64_t i = 0; i < rows.rows; ++i) {
      const C* weight = rows.weight + (row_group + i) * rows.count;
      const int64_t first = first_of(rows, row_group, i, height);
      std::fill(sum.begin(), sum.begin() + n, C(0));
      for (int64_t k = 0; k < rows.count; ++k) {
        if (weight[k] == C(0)) continue;
        const int64_t row = first + k, slot = row % rows.count;
        C* const made = ring.data() + slot * n;
        if (held[slot] != row) resample_row(x + row * width * inner, columns, column_group, width, inner, made);
        held[slot] = row;
        add_scaled(made, weight[k], sum.data(), n);
      }
      narrow(sum.data(), y + i * n, n);
    }
  }
};

}  // namespace

template <typename T>
const char* launch_resample(const T* x, Taps<typename Compute<T>::type> rows, Taps<typename Compute<T>::type> columns,
                            T* y, int64_t batch, int64_t channels, int64_t height, int64_t width, bool channels_last,
                            void*) {
  using C = typename Compute<T>::type;
  const int64_t planes = channels_last ? batch : batch * channels, inner = channels_last ? channels : 1;
  const bool rows_first = rows.rows < height;
  const int64_t line = columns.rows * inner, work = std::max(height * width, rows.rows * columns.rows) * inner;
  torch::stable::parallel_for(0, planes, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    std::vector<C> ring(static_cast<size_t>((rows_first ? 1 : rows.count) * line));
    std::vector<C> sum(static_cast<size_t>(rows_first ? width * inner : line));
    std::vector<int64_t> held(static_cast<size_t>(rows.count));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = channels_last ? i : i / channels;
      const Plane<T> plane{x + i * height * width * inner, rows,   columns, sample * rows.group_stride,
                           sample * columns.group_stride,  height, width,   inner};
      T* const to = y + i * rows.rows * line;
      if (rows_first) {
        plane.rows_first(to, sum, ring);
      } else {
        plane.columns_first(to, sum, ring, held);
      }
    }
  });
  return nullptr;
}

#define ATOP_INSTANTIATE(T)                                                                                            \
  template const char* launch_resample(const T*, Taps<Compute<T>::type>, Taps<Compute<T>::type>, T*, int64_t, int64_t, \
                                       int64_t, int64_t, bool, void*);
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(double)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)

}  // namespace atop
