#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/strips.h"
#include "math/normal.h"

namespace atop {

const char* launch_random_normal(Key key, float* y, int64_t batch, int64_t count, uint32_t tag, void*) {
  const int64_t pieces = (count + kStrip - 1) / kStrip;
  const bool stream = batch * count * int64_t(sizeof(float)) > kStreamBytes;
  torch::stable::parallel_for(0, batch * pieces, kGrain / kStrip, [&](int64_t begin, int64_t end) {
    const simd::Groups all;
    alignas(64) float numbers[kStrip];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / pieces, first = task % pieces * kStrip, n = std::min(kStrip, count - first);
      float* const to = y + sample * count + first;
      // Whole strips may be written directly; the last batch of the last strip would write beyond the end.
      float* const made = n == kStrip && !stream ? to : numbers;
      simd::fill_normals(key.stream(sample, tag), math::group_of(first), all.offsets, (n + 3) / 4, made);
      if (made != to) copy_out(to, made, n * int64_t(sizeof(float)), stream);
    }
    finish_streams();
  });
  return nullptr;
}

const char* launch_mask_blocks(Key key, const int64_t* masked, int64_t masked_stride, uint8_t* owners, int64_t batch,
                               int64_t blocks, int copies, void*) {
  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, kGrain / (16 * blocks)), [&](int64_t begin, int64_t end) {
    // The word in the high bits and the position in the low bits, so that ties are broken by position.
    std::vector<uint64_t> order(static_cast<size_t>((blocks + 3) / 4 * 4));
    for (int64_t sample = begin; sample < end; ++sample) {
      const math::Stream stream = key.stream(sample, math::kTagMask);
      for (int64_t i = 0; i < blocks; i += 4) {
        const math::Words words = math::random_words(stream, math::group_of(i));
        for (int j = 0; j < 4; ++j) order[i + j] = uint64_t(words.w[j]) << 32 | uint64_t(i + j);
      }
      const int64_t count = std::clamp<int64_t>(masked[sample * masked_stride], 0, blocks);
      uint8_t* row = owners + sample * blocks;
      std::fill(row, row + blocks, static_cast<uint8_t>(copies));
      const auto first = order.begin(), last = first + count, stop = first + blocks;
      if (count < blocks) std::nth_element(first, last, stop);
      if (copies > 1) std::sort(first, last);
      for (int64_t rank = 0; rank < count; ++rank) {
        row[static_cast<uint32_t>(order[rank])] = static_cast<uint8_t>(rank % copies);
      }
    }
  });
  return nullptr;
}

}  // namespace atop
