#pragma once
// Philox4x32-10 (Salmon et al., SC 2011), keyed by samples                                 docs/math.md#philox
//
//   key      = seed, 64 bits
//   counter  = (group of 4 elements, low 32 bits of the sample id, draw, tag << 16 | next 16 bits of the sample id)

#include "common/macros.h"

namespace atop::math {

// The purpose of a number, as in atop_fast/randomness.py.
constexpr uint32_t kTagNoise = 1, kTagMask = 2;

// Four words of output, or the counter.
struct Words {
  uint32_t w[4];
};

// The state that is constant within one sample.
struct Stream {
  uint32_t key[2];
  uint32_t id, draw, tag_and_id;

  ATOP_HD Stream(int64_t seed, int64_t sample_id, int64_t draw_number, uint32_t tag)
      : key{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)},
        id(static_cast<uint32_t>(sample_id)),
        draw(static_cast<uint32_t>(draw_number)),
        tag_and_id((tag << 16) | (static_cast<uint32_t>(static_cast<uint64_t>(sample_id) >> 32) & 0xFFFFu)) {}
};

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;

ATOP_HD Words philox4x32(Words c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c.w[0]) * kMultiplier0, p1 = uint64_t(c.w[2]) * kMultiplier1;
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.w[1] ^ key0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.w[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += kKeyStep0;
    key1 += kKeyStep1;
  }
  return c;
}

// The words of the elements 4 * group .. 4 * group + 3.
ATOP_HD Words random_words(const Stream& s, uint32_t group) {
  return philox4x32({{group, s.id, s.draw, s.tag_and_id}}, s.key[0], s.key[1]);
}

// The word of element `index` of a sample; a sample may have 2^34 elements.
ATOP_HD uint32_t group_of(int64_t index) {
  return static_cast<uint32_t>(index >> 2);
}
ATOP_HD int lane_of(int64_t index) {
  return static_cast<int>(index & 3);
}

}  // namespace atop::math
