#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace atop::math {

template <typename T>
struct BitsOf;

template <>
struct BitsOf<float> {
  using type = uint32_t;
};

template <>
struct BitsOf<double> {
  using type = uint64_t;
};

template <typename T>
using Bits = typename BitsOf<T>::type;

template <typename T>
ATOP_HD Bits<T> to_bits(T v) {
  Bits<T> bits;
  memcpy(&bits, &v, sizeof(T));
  return bits;
}

template <typename T>
ATOP_HD T from_bits(Bits<T> bits) {
  T v;
  memcpy(&v, &bits, sizeof(T));
  return v;
}

}  // namespace atop::math
