#pragma once
// Images in blocks, shared by corrupt and assemble.

#include "common/launchers.h"
#include "index.cuh"
#include "vector.cuh"

namespace atop {

// Pixel indices within a plane have 32 bits.
inline const char* too_large(const Images& images) {
  return images.pixels() > INT32_MAX ? "planes of more than 2147483647 pixels are not supported" : nullptr;
}

// The owners of up to eight consecutive elements, one byte each.
struct Owners {
  uint64_t bytes;

  __device__ __forceinline__ int operator[](int i) const { return int(bytes >> (8 * i) & 0xFF); }
};

// The owners of `count` elements, beginning with element `phase` of `pixel`; a pixel has `repeat` elements. Divisions
// are needed only at the start.
__device__ __forceinline__ Owners find_owners(const uint8_t* owners,  // [batch, blocks]
                                              const Images& images, int64_t sample, uint32_t pixel, uint32_t phase,
                                              uint32_t repeat, int count) {
  const uint32_t width = uint32_t(images.width), height = uint32_t(images.height), patch = uint32_t(images.patch);
  const uint32_t across = width / patch, down = height / patch;
  const uint32_t row = pixel / width, column = pixel - row * width;
  uint32_t block_row = row / patch, block_column = column / patch;
  uint32_t row_in_block = row - block_row * patch, column_in_block = column - block_column * patch;
  const uint8_t* owner = owners + sample * (across * down) + block_row * across + block_column;
  Owners result{*owner};
  uint64_t current = *owner;
  // Not unrolled, because most elements have the same owner as the previous one.
#pragma unroll 1
  for (int i = 1; i < count; ++i) {
    if (++phase == repeat) {
      phase = 0;
      if (++column_in_block == patch) {
        column_in_block = 0;
        ++owner;
        if (++block_column == across) {
          // The next row of pixels lies in the same blocks, or in the blocks below, which follow in memory.
          block_column = 0;
          if (++row_in_block == patch) {
            row_in_block = 0;
          } else {
            owner -= across;
          }
        }
        current = *owner;
      }
    }
    result.bytes |= current << (8 * i);
  }
  return result;
}

}  // namespace atop
