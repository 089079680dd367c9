#include <algorithm>

#include "common/launchers.h"
#include "index.cuh"
#include "vector.cuh"

namespace atop {
namespace {

constexpr int kChannels = 4;  // channels of a pixel per thread in NCHW

// Planes in NCHW or channels_last.
struct Layout {
  int64_t channels, height, width, pixel_stride, plane_stride;

  Layout(int64_t c, int64_t h, int64_t w, bool channels_last)
      : channels(c),
        height(h),
        width(w),
        pixel_stride(channels_last ? c : 1),
        plane_stride(channels_last ? 1 : h * w) {}
};

// One row of the matrix; taps are clamped to `pixels` for any value of `start`.
template <typename C>
struct Row {
  int64_t start;
  const C* weight;

  __device__ Row(const Taps<C>& taps, int64_t sample, int64_t i, int64_t pixels) {
    const int64_t row = sample * taps.group_stride + i;
    start = max(int64_t(0), min(taps.start[row], pixels - taps.count));
    weight = taps.weight + row * taps.count;
  }
};

// One pixel in up to `step` channels per thread; in channels_last, `step` is 1 and adjacent threads have adjacent
// channels.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    launch_resample_kernel(const T* __restrict__ x, Taps<typename Compute<T>::type> rows,
                           Taps<typename Compute<T>::type> columns, T* __restrict__ y, Layout from, Layout to,
                           int64_t batch, int64_t step) {
  using C = typename Compute<T>::type;
  const int64_t parts = (to.channels + step - 1) / step;
  const bool last = to.pixel_stride != 1;
  Split at = split(thread_index(), last ? parts : to.width);
  const int64_t inner = at.remainder;
  at = split(at.quotient, last ? to.width : to.height);
  const int64_t middle = at.remainder;
  at = split(at.quotient, last ? to.height : parts);
  if (at.quotient >= batch) return;
  const int64_t sample = at.quotient, part = last ? inner : at.remainder;
  const int64_t i = last ? at.remainder : middle, j = last ? middle : inner;

  const Row<C> row(rows, sample, i, from.height), column(columns, sample, j, from.width);
  const int64_t line = from.width * from.pixel_stride;
  x += sample * from.channels * from.height * from.width + row.start * line + column.start * from.pixel_stride;
  y += sample * to.channels * to.height * to.width + (i * to.width + j) * to.pixel_stride;
  // The inner axis is summed first: the row axis if the number of rows shrinks.
  const bool rows_first = to.height < from.height;
  const C *outer = rows_first ? column.weight : row.weight, *inner_weight = rows_first ? row.weight : column.weight;
  const int64_t outer_stride = rows_first ? from.pixel_stride : line,
                inner_stride = rows_first ? line : from.pixel_stride;
  const int outer_count = int(rows_first ? columns.count : rows.count);
  const int inner_count = int(rows_first ? rows.count : columns.count);
  const int64_t end = min(to.channels, (part + 1) * step);
  for (int64_t c = part * step; c < end; ++c) {
    const T* pixels = x + c * from.plane_stride;
    C sum = 0;
#pragma unroll 1
    for (int k = 0; k < outer_count; ++k, pixels += outer_stride) {
      const C weight = outer[k];
      if (weight == C(0)) continue;
      const T* pixel = pixels;
      C part_sum = 0;
#pragma unroll 2
      for (int l = 0; l < inner_count; ++l, pixel += inner_stride) {
        if (inner_weight[l] != C(0)) part_sum += inner_weight[l] * load(*pixel);
      }
      sum += weight * part_sum;
    }
    store(sum, y + c * to.plane_stride);
  }
}

}  // namespace

template <typename T>
const char* launch_resample(const T* x, Taps<typename Compute<T>::type> row_taps,
                            Taps<typename Compute<T>::type> column_taps, T* y, int64_t batch, int64_t channels,
                            int64_t height, int64_t width, bool channels_last, void* stream) {
  if (std::max({height, width, row_taps.rows, column_taps.rows}) > INT32_MAX) {
    return "axes of more than 2147483647 pixels are not supported";
  }
  const Layout from(channels, height, width, channels_last),
      to(channels, row_taps.rows, column_taps.rows, channels_last);
  const int64_t step = channels_last ? 1 : std::min<int64_t>(kChannels, channels);
  const int64_t threads = batch * ((channels + step - 1) / step) * to.height * to.width;
  launch_resample_kernel<T><<<blocks_for(threads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      x, row_taps, column_taps, y, from, to, batch, step);
  return launch_error();
}

#define ATOP_INSTANTIATE(T)                                                                                            \
  template const char* launch_resample(const T*, Taps<typename Compute<T>::type>, Taps<typename Compute<T>::type>, T*, \
                                       int64_t, int64_t, int64_t, int64_t, bool, void*);
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(double)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)

}  // namespace atop
