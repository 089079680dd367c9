#include <algorithm>
#include <type_traits>

#include "common/launchers.h"
#include "images.cuh"
#include "index.cuh"
#include "vector.cuh"

namespace atop {
namespace {

// Pixels are only copied, so only their size matters.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// V consecutive elements of a sample, the work of one thread, and their owners.
template <int V>
struct Elements {
  int64_t sample, first, per_sample;
  Owners owner;

  // False if this thread has no elements.
  __device__ bool find(const uint8_t* owners, const Images& images) {
    per_sample = images.channels * images.pixels();
    const Split pack = split(thread_index(), per_sample / V);
    if (pack.quotient >= images.batch) return false;
    sample = pack.quotient;
    first = pack.remainder * V;
    const Split place = split(first, images.channels_last ? images.channels : images.pixels());
    const int64_t pixel = images.channels_last ? place.quotient : place.remainder;
    owner = find_owners(owners, images, sample, uint32_t(pixel), images.channels_last ? uint32_t(place.remainder) : 0,
                        images.channels_last ? uint32_t(images.channels) : 1, V);
    return true;
  }
};

// One load per run of elements with the same owner, so usually a single load.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    launch_assemble_kernel(const T* __restrict__ copies, const uint8_t* __restrict__ owners, Images images,
                           T* __restrict__ y) {
  Elements<V> at;
  if (!at.find(owners, images)) return;
  const T* const first_copy = copies + at.sample * images.copies * at.per_sample + at.first;
  Pack<T, V> result = {};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (at.owner[i] >= images.copies || (i > 0 && at.owner[i] == at.owner[i - 1])) continue;
    const auto pack = load_pack<T, V>(first_copy + at.owner[i] * at.per_sample);
#pragma unroll
    for (int j = i; j < V; ++j) result.v[j] = at.owner[j] == at.owner[i] ? pack.v[j] : result.v[j];
  }
  store_pack(y + thread_index() * V, result);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    launch_assemble_bwd_kernel(const T* __restrict__ dy, const uint8_t* __restrict__ owners, Images images,
                               T* __restrict__ dcopies) {
  Elements<V> at;
  if (!at.find(owners, images)) return;
  const auto pack = load_pack<T, V>(dy + thread_index() * V);
  T* copy = dcopies + at.sample * images.copies * at.per_sample + at.first;
  for (int n = 0; n < images.copies; ++n, copy += at.per_sample) {
    Pack<T, V> result;
#pragma unroll
    for (int i = 0; i < V; ++i) result.v[i] = at.owner[i] == n ? pack.v[i] : T(0);
    store_pack(copy, result);
  }
}

// Whether no pack of V elements crosses the end of a plane or, in channels_last, the end of a sample.
template <int V>
bool in_packs(const Images& images) {
  return (images.channels_last ? images.channels * images.pixels() : images.pixels()) % V == 0;
}

}  // namespace

template <typename T>
const char* launch_assemble(const T* copies, const uint8_t* owners, Images images, T* y, void* stream) {
  if (const char* error = too_large(images)) return error;
  constexpr int V = kWidth<T>;
  const int64_t elements = images.batch * images.channels * images.pixels();
  const auto from = reinterpret_cast<const Bits<T>*>(copies);
  const auto to = reinterpret_cast<Bits<T>*>(y);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (in_packs<V>(images) && aligned16(copies, y)) {
    launch_assemble_kernel<Bits<T>, V>
        <<<blocks_for(elements / V), kThreads, 0, cuda_stream>>>(from, owners, images, to);
  } else {
    launch_assemble_kernel<Bits<T>, 1><<<blocks_for(elements), kThreads, 0, cuda_stream>>>(from, owners, images, to);
  }
  return launch_error();
}

template <typename T>
const char* launch_assemble_bwd(const T* dy, const uint8_t* owners, Images images, T* dcopies, void* stream) {
  if (const char* error = too_large(images)) return error;
  constexpr int V = kWidth<T>;
  const int64_t elements = images.batch * images.channels * images.pixels();
  const auto from = reinterpret_cast<const Bits<T>*>(dy);
  const auto to = reinterpret_cast<Bits<T>*>(dcopies);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (in_packs<V>(images) && aligned16(dy, dcopies)) {
    launch_assemble_bwd_kernel<Bits<T>, V>
        <<<blocks_for(elements / V), kThreads, 0, cuda_stream>>>(from, owners, images, to);
  } else {
    launch_assemble_bwd_kernel<Bits<T>, 1>
        <<<blocks_for(elements), kThreads, 0, cuda_stream>>>(from, owners, images, to);
  }
  return launch_error();
}

#define ATOP_INSTANTIATE(T)                                                          \
  template const char* launch_assemble(const T*, const uint8_t*, Images, T*, void*); \
  template const char* launch_assemble_bwd(const T*, const uint8_t*, Images, T*, void*);
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(double)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)

}  // namespace atop
