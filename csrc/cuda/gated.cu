#include "math/gated.h"

#include "common/launchers.h"
#include "index.cuh"
#include "vector.cuh"

namespace atop {
namespace {

// The number of outputs in a part, which has separate sums: fixed, so that results do not depend on the device, and
// small, so that a small batch occupies all multiprocessors.
constexpr int64_t kPart = 4096;
// Minimum blocks per multiprocessor: with this bound, ptxas does not spill registers to fit one more block.
constexpr int kBlocks = 3;

// h as rows of [lines of f | lines of g], for images in NCHW; in channels_last, each pixel is treated as an image of
// one line. Without bias, an image in NCHW is also a single line with all channels.
struct Lines {
  int64_t count, length;  // number in all images; outputs per line
  int64_t per_image, channels;
  bool channels_last;

  Lines(const Gates& size, bool has_bias) : channels(size.channels), channels_last(size.channels_last) {
    per_image = has_bias && !channels_last ? channels : 1;
    count = channels_last ? size.batch * size.pixels : size.batch * per_image;
    length = channels_last ? channels : channels * size.pixels / per_image;
  }

  __device__ __forceinline__ int64_t gap() const { return per_image * length; }
};

// For outputs from `y` on: the offset of f, and the index of the first bias.
struct Place {
  int64_t f, bias;

  __device__ __forceinline__ Place(const Lines& lines, int64_t line, int64_t first) {
    const Split image = split(line, lines.per_image);
    f = (image.quotient * 2 * lines.per_image + image.remainder) * lines.length + first;
    bias = lines.channels_last ? first : image.remainder;
  }
};

// The biases of V values of f or of g: one of each channel in channels_last, otherwise the same one.
template <typename C, int V>
struct Biases {
  C v[V];

  __device__ __forceinline__ Biases(const C* bias, bool channels_last) {
    constexpr int W = V < kWidth<C> ? V : kWidth<C>;
    if (bias && channels_last) {
#pragma unroll
      for (int i = 0; i < V; i += W) {
        const auto some = load_pack<C, W>(bias + i);
#pragma unroll
        for (int j = 0; j < W; ++j) v[i + j] = some.v[j];
      }
    } else {
      const C same = bias ? *bias : C(0);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = same;
    }
  }
};

// V pairs of f and g with their biases.
template <typename T, int V>
struct Pairs {
  using C = typename Compute<T>::type;
  Pack<T, V> f, g;
  Biases<C, V> bias_f, bias_g;

  __device__ __forceinline__ Pairs(const T* h, const C* bias, const Lines& lines, const Place& at)
      : f(load_pack<T, V>(h + at.f)),
        g(load_pack<T, V>(h + at.f + lines.gap())),
        bias_f(bias ? bias + at.bias : nullptr, lines.channels_last),
        bias_g(bias ? bias + lines.channels + at.bias : nullptr, lines.channels_last) {}

  __device__ __forceinline__ C f_of(int i) const { return load(f.v[i]) + bias_f.v[i]; }
  __device__ __forceinline__ C g_of(int i) const { return load(g.v[i]) + bias_g.v[i]; }
};

// V divides the length of lines, so that no pack crosses the end of a line.
template <template <typename> class A, typename T, int V>
__global__ void __launch_bounds__(kThreads)
    launch_gated_kernel(const T* __restrict__ h, const typename Compute<T>::type* __restrict__ bias, T* __restrict__ y,
                        Lines lines) {
  const int64_t pack = thread_index(), packs = lines.length / V;
  if (pack >= lines.count * packs) return;
  const Split at = split(pack, packs);
  const Pairs<T, V> pairs(h, bias, lines, Place(lines, at.quotient, at.remainder * V));
  Pack<T, V> result;
#pragma unroll
  for (int i = 0; i < V; ++i) store(math::gated<A>(pairs.f_of(i), pairs.g_of(i)), &result.v[i]);
  store_pack(y + pack * V, result);
}

// Computes the gradients of V outputs from `y` on, stores them and passes them to `take`.
template <template <typename> class A, typename T, int V, typename Take>
__device__ __forceinline__ void differentiate(const T* dy, const T* h, const typename Compute<T>::type* bias, T* dh,
                                              const Lines& lines, int64_t y, const Place& at, const Take& take) {
  const auto pack = load_pack<T, V>(dy + y);
  const Pairs<T, V> pairs(h, bias, lines, at);
  Pack<T, V> df, dg;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const auto gradients = math::gated_bwd<A>(load(pack.v[i]), pairs.f_of(i), pairs.g_of(i));
    store(gradients.df, &df.v[i]);
    store(gradients.dg, &dg.v[i]);
    take(i, gradients.df, gradients.dg);
  }
  store_pack(dh + at.f, df);
  store_pack(dh + at.f + lines.gap(), dg);
}

template <template <typename> class A, typename T, int V>
__global__ void __launch_bounds__(kThreads)
    launch_gated_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ h,
                            const typename Compute<T>::type* __restrict__ bias, T* __restrict__ dh, Lines lines) {
  const int64_t pack = thread_index(), packs = lines.length / V;
  if (pack >= lines.count * packs) return;
  const Split at = split(pack, packs);
  const auto nothing = [](int, auto, auto) {};
  differentiate<A, T, V>(dy, h, bias, dh, lines, pack * V, Place(lines, at.quotient, at.remainder * V), nothing);
}

// The outputs that a block sums. In channels_last: several lines at a time, with one thread per pack of a line, as far
// as there are threads. In NCHW: a part of one line, all of whose outputs have the same bias.
struct Parts {
  int64_t lines, columns;  // in a part: lines, or packs of its line; adjacent packs
  int64_t count, groups;   // parts in all lines, or in one line; adjacent blocks, or lines

  Parts(const Lines& all, int64_t V) {
    const int64_t packs = all.length / V;
    columns = all.channels_last ? (packs < kThreads ? packs : kThreads) : 1;
    lines = kPart / (all.channels_last ? all.length : V);
    lines = lines < 1 ? 1 : lines;
    count = ((all.channels_last ? all.count : packs) + lines - 1) / lines;
    groups = all.channels_last ? (packs + columns - 1) / columns : all.count;
  }
};

template <template <typename> class A, typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    launch_gated_sums_kernel(const T* __restrict__ dy, const T* __restrict__ h,
                             const typename Compute<T>::type* __restrict__ bias, T* __restrict__ dh,
                             typename Compute<T>::type* __restrict__ partials, Lines lines, Parts parts) {
  using C = typename Compute<T>::type;
  __shared__ C sums[2 * V][kThreads];
  const int columns = int(parts.columns), column = threadIdx.x % columns, row = threadIdx.x / columns;
  const int rows = kThreads / columns;
  const Split block = split(blockIdx.x, parts.count);
  const int64_t begin = block.remainder * parts.lines;
  const int64_t all = lines.channels_last ? lines.count : lines.length / V;
  const int64_t end = min(all, begin + parts.lines);
  // In channels_last, the beginning of the thread's pack.
  const int64_t first = (block.quotient * columns + column) * V;
  const bool works = row < rows && (!lines.channels_last || first < lines.length);
  C sum_f[V] = {}, sum_g[V] = {};
  // Unrolled, the loop would take twice the registers.
#pragma unroll 1
  for (int64_t i = works ? begin + row : end; i < end; i += rows) {
    const int64_t line = lines.channels_last ? i : block.quotient, at = lines.channels_last ? first : i * V;
    differentiate<A, T, V>(dy, h, bias, dh, lines, line * lines.length + at, Place(lines, line, at),
                           [&](int j, C df, C dg) {
                             sum_f[j] += df;
                             sum_g[j] += dg;
                           });
  }
  if (!lines.channels_last) {
#pragma unroll
    for (int j = 1; j < V; ++j) {
      sum_f[0] += sum_f[j];
      sum_g[0] += sum_g[j];
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    sums[j][threadIdx.x] = sum_f[j];
    sums[V + j][threadIdx.x] = sum_g[j];
  }
  __syncthreads();
  for (int n = rows; n > 1;) {
    const int kept = (n + 1) / 2;
    if (row < n - kept) {
#pragma unroll
      for (int j = 0; j < 2 * V; ++j) sums[j][threadIdx.x] += sums[j][threadIdx.x + kept * columns];
    }
    __syncthreads();
    n = kept;
  }
  if (!works || row > 0) return;
  const Split image = split(block.quotient, lines.per_image);
  const int64_t part = lines.channels_last ? block.remainder : image.quotient * parts.count + block.remainder;
  C* const to = partials + part * 2 * lines.channels + (lines.channels_last ? first : image.remainder);
  for (int j = 0; j < (lines.channels_last ? V : 1); ++j) {
    to[j] = sums[j][threadIdx.x];
    to[lines.channels + j] = sums[V + j][threadIdx.x];
  }
}

// One block per bias.
template <typename C>
__global__ void __launch_bounds__(kThreads) launch_gated_db_kernel(const C* __restrict__ partials,  // [parts, biases]
                                                                   C* __restrict__ db,              // [biases]
                                                                   int64_t parts, int64_t biases) {
  __shared__ C sums[kThreads];
  C sum = 0;
  for (int64_t i = threadIdx.x; i < parts; i += kThreads) sum += partials[i * biases + blockIdx.x];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int n = kThreads / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) sums[threadIdx.x] += sums[threadIdx.x + n];
    __syncthreads();
  }
  if (threadIdx.x == 0) db[blockIdx.x] = sums[0];
}

template <template <typename> class A, int V, typename T>
void forward(const T* h, const typename Compute<T>::type* bias, T* y, const Lines& lines, cudaStream_t stream) {
  launch_gated_kernel<A, T, V><<<blocks_for(lines.count * lines.length / V), kThreads, 0, stream>>>(h, bias, y, lines);
}

template <template <typename> class A, int V, typename T, typename C>
void backward(const T* dy, const T* h, const C* bias, T* dh, C* partials, C* db, const Lines& lines,
              cudaStream_t stream) {
  if (!db) {
    const unsigned blocks = blocks_for(lines.count * lines.length / V);
    launch_gated_bwd_kernel<A, T, V><<<blocks, kThreads, 0, stream>>>(dy, h, bias, dh, lines);
    return;
  }
  const Parts parts(lines, V);
  const unsigned blocks = unsigned(parts.count * parts.groups);
  launch_gated_sums_kernel<A, T, V><<<blocks, kThreads, 0, stream>>>(dy, h, bias, dh, partials, lines, parts);
  const int64_t sums = lines.channels_last ? parts.count : parts.count * (lines.count / lines.per_image);
  const int64_t biases = 2 * lines.channels;
  launch_gated_db_kernel<C><<<unsigned(biases), kThreads, 0, stream>>>(partials, db, sums, biases);
}

}  // namespace

int64_t gated_parts(const Gates& size) {
  const Lines lines(size, true);
  const int64_t count = Parts(lines, 1).count;
  return lines.channels_last ? count : count * size.batch;
}

template <typename T>
const char* launch_gated(const T* h, const typename Compute<T>::type* bias, T* y, Gates size, void* stream) {
  constexpr int V = kWidth<T>;
  const Lines lines(size, bias != nullptr);
  const bool packs = lines.length % V == 0 && aligned16(h, y, bias);
  const auto launch = size.activation == math::kElu ? (packs ? forward<math::Elu, V, T> : forward<math::Elu, 1, T>)
                                                    : (packs ? forward<math::Relu, V, T> : forward<math::Relu, 1, T>);
  launch(h, bias, y, lines, static_cast<cudaStream_t>(stream));
  return launch_error();
}

template <typename T>
const char* launch_gated_bwd(const T* dy, const T* h, const typename Compute<T>::type* bias, T* dh,
                             typename Compute<T>::type* partials, typename Compute<T>::type* db, Gates size,
                             void* stream) {
  using C = typename Compute<T>::type;
  constexpr int V = kWidth<T>;
  const Lines lines(size, bias != nullptr);
  const bool packs = lines.length % V == 0 && aligned16(dy, h, dh, bias);
  const auto launch = size.activation == math::kElu
                          ? (packs ? backward<math::Elu, V, T, C> : backward<math::Elu, 1, T, C>)
                          : (packs ? backward<math::Relu, V, T, C> : backward<math::Relu, 1, T, C>);
  launch(dy, h, bias, dh, partials, db, lines, static_cast<cudaStream_t>(stream));
  return launch_error();
}

#define ATOP_INSTANTIATE(T)                                                                        \
  template const char* launch_gated(const T*, const typename Compute<T>::type*, T*, Gates, void*); \
  template const char* launch_gated_bwd(const T*, const T*, const typename Compute<T>::type*, T*,  \
                                        typename Compute<T>::type*, typename Compute<T>::type*, Gates, void*);
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(double)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)

}  // namespace atop
