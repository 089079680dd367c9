// The formulas of csrc/math without torch, driven by tests/test_math_headers.py: a line of numbers in, a line out.
// Floats are printed as their bits.

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "common/launchers.h"
#include "math/bilinear.h"
#include "math/normal.h"

using namespace atop;

namespace {

// The worst of all words: the smallest and largest -2 log, and the largest errors of cosine and sine.
struct Worst {
  float low = 1e9f, high = -1e9f, size = 0.0f, norm = 0.0f;
};

constexpr int64_t kBlock = 4096;

ATOP_CLONES void logarithms(uint32_t first, float* __restrict__ out) {
  for (int64_t i = 0; i < kBlock; ++i) out[i] = math::minus_2_log((first + static_cast<uint32_t>(i)) << 1);
}

ATOP_CLONES void angles(uint32_t first, float* __restrict__ size, float* __restrict__ norm) {
  for (int64_t i = 0; i < kBlock; ++i) {
    float c, s;
    math::cos_sin(first + static_cast<uint32_t>(i), c, s);
    const float larger = std::fabs(c) > std::fabs(s) ? std::fabs(c) : std::fabs(s);
    size[i] = larger;
    norm[i] = std::fabs(c * c + s * s - 1.0f);
  }
}

ATOP_CLONES void extremes(const float* v, float* low, float* high) {
  float a[16], b[16];
  for (int j = 0; j < 16; ++j) a[j] = b[j] = v[j];
  bool nan = false;
  for (int64_t i = 0; i < kBlock; i += 16) {
    for (int j = 0; j < 16; ++j) {
      a[j] = v[i + j] < a[j] ? v[i + j] : a[j];
      b[j] = v[i + j] > b[j] ? v[i + j] : b[j];
      nan |= v[i + j] != v[i + j];
    }
  }
  for (int j = 0; j < 16; ++j) {
    *low = a[j] < *low ? a[j] : *low;
    *high = b[j] > *high ? b[j] : *high;
  }
  if (nan) *high = std::numeric_limits<float>::infinity();
}

// All words: those that differ in their lowest bit have one logarithm, and those that differ in their two highest bits
// have the same sine and cosine, but for their order and signs.
Worst sweep() {
  Worst worst;
  float unused = 0.0f;
  std::vector<float> a(kBlock), b(kBlock);
  for (int64_t first = 0; first < int64_t(1) << 31; first += kBlock) {
    logarithms(static_cast<uint32_t>(first), a.data());
    extremes(a.data(), &worst.low, &worst.high);
  }
  for (int64_t first = 0; first < int64_t(1) << 30; first += kBlock) {
    angles(static_cast<uint32_t>(first), a.data(), b.data());
    extremes(a.data(), &unused, &worst.size);
    extremes(b.data(), &unused, &worst.norm);
  }
  return worst;
}

void run(std::istringstream& in, const std::string& what) {
  if (what == "philox") {
    uint32_t v[6];
    for (uint32_t& word : v) in >> word;
    const math::Words words = math::philox4x32({{v[0], v[1], v[2], v[3]}}, v[4], v[5]);
    for (uint32_t word : words.w) printf("%" PRIu32 " ", word);
  } else if (what == "normal") {
    int64_t seed, id, draw, tag, index;
    in >> seed >> id >> draw >> tag >> index;
    const math::Stream stream(seed, id, draw, static_cast<uint32_t>(tag));
    const float number = math::random_normals(stream, math::group_of(index)).n[math::lane_of(index)];
    printf("%" PRIu32 " %d %" PRIu32, math::group_of(index), math::lane_of(index), math::to_bits(number));
  } else if (what == "word") {
    uint32_t word;
    float c, s;
    in >> word;
    math::cos_sin(word, c, s);
    const float radius = math::square_root(math::minus_2_log(word));
    printf("%" PRIu32 " %" PRIu32 " %" PRIu32, math::to_bits(radius), math::to_bits(c), math::to_bits(s));
  } else if (what == "tap") {
    int64_t i, given, wanted;
    in >> i >> given >> wanted;
    const math::BilinearTap<float> narrow(i, given, wanted);
    const math::BilinearTap<double> wide(i, given, wanted);
    printf("%" PRId64 " %" PRId64 " %" PRIu32 " %" PRIu64, wide.first, wide.second, math::to_bits(narrow.weight),
           math::to_bits(wide.weight));
  } else if (what == "images") {
    int64_t height, width, patch;
    in >> height >> width >> patch;
    const Images images{2, 3, height, width, patch, 1, false};
    printf("%" PRId64 " %" PRId64 " %" PRId64, images.pixels(), images.blocks(), images.packed());
  } else if (what == "key") {
    const int64_t seed = -3, ids[] = {1, 2, (int64_t(7) << 32) + 5}, draws[] = {4};
    const math::Stream stream = Key{&seed, ids, 2, draws, 0}.stream(1, 9);
    printf("%" PRIu32 " %" PRIu32 " %" PRIu32 " %" PRIu32 " %" PRIu32, stream.key[0], stream.key[1], stream.id,
           stream.draw, stream.tag_and_id);
  } else if (what == "sweep") {
    const Worst worst = sweep();
    printf("%.9g %.9g %.9g %.9g", worst.low, worst.high, worst.size, worst.norm);
  }
  printf("\n");
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream in(line);
    std::string what;
    in >> what;
    run(in, what);
  }
}
