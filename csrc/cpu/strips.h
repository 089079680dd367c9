#pragma once
// Images in strips of pixels, which fit into the L1 cache together with everything computed from them.

#include <algorithm>
#include <cstring>
#include <memory>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/launchers.h"
#include "common/parallel.h"
#include "cpu/simd.h"

namespace atop {

constexpr int64_t kStrip = 1024;

namespace simd {

// The groups of random numbers that a strip needs, relative to its first; initially all.
struct Groups {
  static constexpr int64_t kMost = kStrip / 4 + kBatch;
  alignas(64) uint32_t offsets[kMost];

  Groups() {
    for (int64_t i = 0; i < kMost; ++i) offsets[i] = static_cast<uint32_t>(i);
  }
};

}  // namespace simd

// Outputs larger than this bypass the cache, in which they would not stay; that avoids reading them first.
constexpr int64_t kStreamBytes = int64_t(16) << 20;

// memcpy, bypassing the cache if `stream`.
inline void copy_out(void* to, const void* from, int64_t bytes, bool stream) {
#if defined(__SSE2__)
  if (stream && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    auto* target = static_cast<__m128i*>(to);
    const auto* source = static_cast<const __m128i*>(from);
    const int64_t whole = bytes / 16;
    for (int64_t i = 0; i < whole; ++i) _mm_stream_si128(target + i, _mm_loadu_si128(source + i));
    memcpy(target + whole, source + whole, static_cast<size_t>(bytes - 16 * whole));
    return;
  }
#endif
  memcpy(to, from, static_cast<size_t>(bytes));
}

// Orders streaming stores before later stores, as seen by other threads.
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Calls body(local, sample, first pixel, pixels) for every strip of every sample, on all threads, each with its own
// Local.
template <typename Local, typename Body>
void for_each_strip(const Images& images, const Body& body) {
  const int64_t strips = (images.pixels() + kStrip - 1) / kStrip;
  const int64_t elements = std::min(images.pixels(), kStrip) * std::max<int64_t>(images.channels, 1);
  const int64_t grain = std::max<int64_t>(1, kGrain / elements);
  torch::stable::parallel_for(0, images.batch * strips, grain, [&](int64_t begin, int64_t end) {
    const auto local = std::make_unique<Local>(images);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / strips, first = task % strips * kStrip;
      body(*local, sample, first, std::min(kStrip, images.pixels() - first));
    }
    finish_streams();
  });
}

// The owner of every pixel of a strip.
inline void expand_owners(const uint8_t* blocks, const Images& images, int64_t first, int64_t n, int32_t* owners) {
  const int64_t width = images.width, patch = images.patch, columns = width / patch;
  int64_t row = first / width, column = first - row * width;
  for (int64_t i = 0; i < n;) {
    const int64_t in_row = std::min(width - column, n - i);
    // Inside a row of blocks, a pixel has the same owner as the pixel above it.
    if (i >= width && row % patch != 0) {
      memcpy(owners + i, owners + i - width, static_cast<size_t>(in_row) * sizeof(int32_t));
    } else {
      const uint8_t* line = blocks + row / patch * columns;
      for (int64_t x = column; x < column + in_row;) {
        const int64_t end = std::min((x / patch + 1) * patch, column + in_row);
        std::fill(owners + i + x - column, owners + i + end - column, static_cast<int32_t>(line[x / patch]));
        x = end;
      }
    }
    i += in_row;
    column = 0;
    ++row;
  }
}

}  // namespace atop
