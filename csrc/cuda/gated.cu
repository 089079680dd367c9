#include "common/launchers.h"
#include "math/gated_elu.h"
#include "vector.cuh"

namespace atop {
namespace {

struct Place {
  int64_t row, first;
};

// Where pack number `pack` lies, for rows of `packs` packs. Division of 32 bits is several times faster than of 64.
__device__ __forceinline__ Place place(int64_t pack, int64_t packs) {
  const int64_t row = (pack | packs) <= UINT32_MAX ? uint32_t(pack) / uint32_t(packs) : pack / packs;
  return {row, pack - row * packs};
}

// V divides inner, so that no pack crosses the end of a row.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) launch_gated_elu_kernel(const T* __restrict__ h,  // [rows, 2, inner]
                                                                    T* __restrict__ y,        // [rows, inner]
                                                                    int64_t rows, int64_t inner) {
  using C = typename Compute<T>::type;
  const int64_t pack = thread_index(), packs = inner / V;
  if (pack >= rows * packs) return;
  const Place at = place(pack, packs);
  const T* f = h + at.row * 2 * inner + at.first * V;
  const auto pf = load_pack<T, V>(f), pg = load_pack<T, V>(f + inner);
  Pack<T, V> result;
#pragma unroll
  for (int i = 0; i < V; ++i) store(math::GatedElu<C>()(load(pf.v[i]), load(pg.v[i])), &result.v[i]);
  store_pack(y + pack * V, result);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) launch_gated_elu_bwd_kernel(const T* __restrict__ dy,  // [rows, inner]
                                                                        const T* __restrict__ h,   // [rows, 2, inner]
                                                                        T* __restrict__ dh,        // [rows, 2, inner]
                                                                        int64_t rows, int64_t inner) {
  using C = typename Compute<T>::type;
  const int64_t pack = thread_index(), packs = inner / V;
  if (pack >= rows * packs) return;
  const Place at = place(pack, packs);
  // Written as a multiple of V, which nvcc needs to see for stores of 16 bytes.
  const int64_t offset = (at.row * 2 * packs + at.first) * V;
  const auto pdy = load_pack<T, V>(dy + pack * V), pf = load_pack<T, V>(h + offset),
             pg = load_pack<T, V>(h + offset + inner);
  Pack<T, V> df, dg;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    C vf, vg;
    math::GatedEluBwd<C>()(load(pdy.v[i]), load(pf.v[i]), load(pg.v[i]), vf, vg);
    store(vf, &df.v[i]);
    store(vg, &dg.v[i]);
  }
  store_pack(dh + offset, df);
  store_pack(dh + offset + inner, dg);
}

}  // namespace

template <typename T>
const char* launch_gated_elu(const T* h, T* y, int64_t rows, int64_t inner, void* stream) {
  constexpr int V = kWidth<T>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (inner % V == 0 && aligned16(h, y)) {
    launch_gated_elu_kernel<T, V><<<blocks_for(rows * inner / V), kThreads, 0, cuda_stream>>>(h, y, rows, inner);
  } else {
    launch_gated_elu_kernel<T, 1><<<blocks_for(rows * inner), kThreads, 0, cuda_stream>>>(h, y, rows, inner);
  }
  return launch_error();
}

template <typename T>
const char* launch_gated_elu_bwd(const T* dy, const T* h, T* dh, int64_t rows, int64_t inner, void* stream) {
  constexpr int V = kWidth<T>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (inner % V == 0 && aligned16(dy, h, dh)) {
    launch_gated_elu_bwd_kernel<T, V>
        <<<blocks_for(rows * inner / V), kThreads, 0, cuda_stream>>>(dy, h, dh, rows, inner);
  } else {
    launch_gated_elu_bwd_kernel<T, 1><<<blocks_for(rows * inner), kThreads, 0, cuda_stream>>>(dy, h, dh, rows, inner);
  }
  return launch_error();
}

#define ATOP_INSTANTIATE(T)                                                     \
  template const char* launch_gated_elu(const T*, T*, int64_t, int64_t, void*); \
  template const char* launch_gated_elu_bwd(const T*, const T*, T*, int64_t, int64_t, void*);
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(double)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)

}  // namespace atop
