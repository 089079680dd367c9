// The loops of csrc/cpu/simd.cpp against the plain formulas, driven by tests/test_math_headers.py, which compiles it
// once for every level that simd.cpp may choose. Prints how many numbers are wrong, for each function.

#include "cpu/simd.cpp"

#include <cmath>
#include <cstdio>
#include <vector>

using namespace atop;

namespace {

bool same(float a, float b) {
  return (a != a && b != b) || math::to_bits(a) == math::to_bits(b);
}

// Offsets in any order; the space up to the next batch belongs to the callee.
int64_t wrong_normals(bool spread) {
  const math::Stream stream(-7, (int64_t(5) << 40) + 3, 11, math::kTagNoise);
  int64_t wrong = 0;
  for (uint32_t first : {0u, 0xFFFFFF80u}) {
    for (int64_t count : {1, 31, 32, 33, 256, 257, 300}) {
      const int64_t padded = (count + simd::kBatch - 1) / simd::kBatch * simd::kBatch;
      std::vector<uint32_t> offsets(static_cast<size_t>(padded), static_cast<uint32_t>(count));
      for (int64_t i = 0; i < count; ++i) offsets[i] = static_cast<uint32_t>(spread ? (i * 7 + 3) % count : i);
      if (spread && count % 7 == 0) continue;
      std::vector<float> out(static_cast<size_t>(4 * (padded + 1)), NAN);
      (spread ? simd::spread_normals : simd::fill_normals)(stream, first, offsets.data(), count, out.data());
      for (int64_t i = 0; i < 4 * count; ++i) {
        const math::Normals expected = math::random_normals(stream, first + static_cast<uint32_t>(i / 4));
        wrong += !same(out[i], expected.n[i % 4]);
      }
    }
  }
  return wrong;
}

constexpr int64_t kMost = 101;

struct Pixels {
  float x[kMost], noise[kMost];
  int32_t owners[kMost];

  Pixels() {
    const float odd[8] = {0.5f, -0.0f, 1.0f, 0.0f, NAN, INFINITY, -INFINITY, 1.5f};
    for (int i = 0; i < kMost; ++i) {
      x[i] = i < 56 ? odd[i % 8] : 0.01f * static_cast<float>(i);
      noise[i] = i < 24 ? 0.0f : static_cast<float>(i % 7 - 3);
      owners[i] = i % 5 == 0 ? 0 : i;
    }
  }
};

bool bit(const uint8_t* bits, int64_t i) {
  return (bits[i / 8] >> (i % 8)) & 1;
}

// Also that bits beyond n are 0, and that without `live` t is the same.
int64_t wrong_corrupt(const Pixels& p, int64_t n) {
  uint8_t kept[kMost / 8 + 1], live[kMost / 8 + 1];
  float t[kMost], alone[kMost];
  memset(live, 0xFF, sizeof(live));
  simd::nonzero_bits(p.owners, kept, n);
  simd::corrupt(p.x, p.noise, 0.1f, kept, t, live, n);
  simd::corrupt(p.x, p.noise, 0.1f, kept, alone, nullptr, n);
  int64_t wrong = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = p.x[i] + p.noise[i] * 0.1f, expected = p.owners[i] ? math::clip_and_scale(v) : 0.0f;
    wrong += bit(kept, i) != (p.owners[i] != 0);
    wrong += !same(t[i], expected) + !same(alone[i], expected);
    wrong += bit(live, i) != (math::inside(v) && p.owners[i] != 0);
  }
  for (int64_t i = n; i % 8; ++i) wrong += bit(live, i) + bit(kept, i);
  return wrong;
}

int64_t wrong_gradients(const Pixels& p, int64_t n) {
  uint8_t live[kMost / 8 + 1];
  float dx[kMost];
  simd::nonzero_bits(p.owners, live, n);
  simd::corrupt_bwd(p.x, live, dx, n);
  int64_t wrong = 0;
  for (int64_t i = 0; i < n; ++i) wrong += !same(dx[i], p.owners[i] ? 2.0f * p.x[i] : 0.0f);
  return wrong;
}

}  // namespace

int main() {
  const Pixels pixels;
  int64_t corrupt = 0, gradients = 0;
  for (int64_t n = 1; n <= kMost; ++n) {
    corrupt += wrong_corrupt(pixels, n);
    gradients += wrong_gradients(pixels, n);
  }
  printf("%lld %lld %lld %lld\n", static_cast<long long>(wrong_normals(false)),
         static_cast<long long>(wrong_normals(true)), static_cast<long long>(corrupt),
         static_cast<long long>(gradients));
}
