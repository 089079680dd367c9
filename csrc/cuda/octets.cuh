#pragma once
// Eight pixels of a plane: the work of one thread of corrupt, and the pixels of one byte of `live`.

#include "common/launchers.h"
#include "images.cuh"
#include "index.cuh"
#include "vector.cuh"

namespace atop {

// In NCHW, octets are Packed if all are whole and aligned; otherwise their pixels are moved one by one. Adjacent
// threads have adjacent octets or, in channels_last, adjacent channels.
template <bool Packed>
struct Octet {
  bool exists;  // whether this thread has an octet
  int64_t sample, channel;
  int64_t number;  // index in the plane
  uint32_t pixel;  // the first one
  int count;       // fewer than 8 at the end of the plane
  Owners owner;

  // The octet of this thread, for images of `channels` planes.
  __device__ __forceinline__ Octet(const uint8_t* owners, const Images& images, int64_t channels) {
    const int64_t packed = images.packed();
    const bool last = !Packed && images.channels_last;
    const Split inner = split(thread_index(), last ? channels : packed);
    const Split outer = split(inner.quotient, last ? packed : channels);
    sample = outer.quotient;
    channel = last ? inner.remainder : outer.remainder;
    number = last ? outer.remainder : inner.remainder;
    pixel = uint32_t(number) * 8;
    count = Packed ? 8 : int(min(int64_t(8), images.pixels() - pixel));
    exists = sample < images.batch;
    owner = exists ? find_owners(owners, images, sample, pixel, 0, 1, count) : Owners{0};
  }

  // The offset of its first pixel in plane `plane` of image `image`, for images of `planes` planes.
  __device__ __forceinline__ int64_t offset(const Images& images, int64_t image, int64_t planes, int64_t plane) const {
    if (!Packed && images.channels_last) return (image * images.pixels() + pixel) * planes + plane;
    return (image * planes + plane) * images.pixels() + pixel;
  }
};

// The number of pixels per access.
template <typename T>
constexpr int kPart = kWidth<T> < 8 ? kWidth<T> : 8;

template <bool Packed, typename T>
__device__ __forceinline__ Pack<T, 8> load_octet(const T* p, int count, int64_t stride) {
  Pack<T, 8> octet = {};
  if constexpr (Packed) {
#pragma unroll
    for (int i = 0; i < 8; i += kPart<T>) {
      const auto part = load_pack<T, kPart<T>>(p + i);
#pragma unroll
      for (int j = 0; j < kPart<T>; ++j) octet.v[i + j] = part.v[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i, p += stride) {
      if (i < count) octet.v[i] = *p;
    }
  }
  return octet;
}

template <bool Packed, typename T>
__device__ __forceinline__ void store_octet(T* p, int count, int64_t stride, const Pack<T, 8>& octet) {
  if constexpr (Packed) {
#pragma unroll
    for (int i = 0; i < 8; i += kPart<T>) {
      Pack<T, kPart<T>> part;
#pragma unroll
      for (int j = 0; j < kPart<T>; ++j) part.v[j] = octet.v[i + j];
      store_pack(p + i, part);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i, p += stride) {
      if (i < count) *p = octet.v[i];
    }
  }
}

// Whether octets may be packed; `pointers` point to pixels.
template <typename... Pointers>
bool packable(const Images& images, Pointers... pointers) {
  return !images.channels_last && images.pixels() % 8 == 0 && aligned16(pointers...);
}

}  // namespace atop
