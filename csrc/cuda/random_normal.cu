#include <algorithm>

#include "common/launchers.h"
#include "index.cuh"
#include "math/normal.h"
#include "vector.cuh"

namespace atop {
namespace {

constexpr uint32_t kTile = 4096;  // words in shared memory, 16 KB

// One group of four numbers per thread; if not Aligned, the last group of a sample may be shorter.
template <bool Aligned>
__global__ void __launch_bounds__(kThreads) launch_random_normal_kernel(Key key,
                                                                        float* __restrict__ y,  // [batch, count]
                                                                        int64_t batch, int64_t count, uint32_t tag) {
  const int64_t group = thread_index();
  const Split at = split(group, (count + 3) / 4);
  if (at.quotient >= batch) return;
  const math::Normals normals = math::random_normals(key.stream(at.quotient, tag), uint32_t(at.remainder));
  if (Aligned) {
    store_pack(y + group * 4, Pack<float, 4>{{normals.n[0], normals.n[1], normals.n[2], normals.n[3]}});
  } else {
    const int64_t first = at.remainder * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < count) y[at.quotient * count + first + i] = normals.n[i];
    }
  }
}

// A thread ranks one word among all words of its sample, which are staged through shared memory in tiles.
__global__ void __launch_bounds__(kThreads)
    launch_mask_blocks_kernel(Key key, const int64_t* __restrict__ masked, int64_t masked_stride,
                              uint8_t* __restrict__ owners,  // [batch, blocks]
                              int64_t blocks, int64_t parts, int copies) {
  __shared__ Pack<uint32_t, 4> tile[kTile / 4];
  const Split part = split(blockIdx.x, parts);
  const int64_t sample = part.quotient, mine = part.remainder * blockDim.x + threadIdx.x;
  const math::Stream stream = key.stream(sample, math::kTagMask);
  const math::Words words = math::random_words(stream, math::group_of(mine));
  const int lane = math::lane_of(mine);
  const uint32_t word = lane < 2 ? (lane ? words.w[1] : words.w[0]) : (lane == 2 ? words.w[2] : words.w[3]);
  uint32_t rank = 0;
  for (int64_t first = 0; first < blocks; first += kTile) {
    const int groups = int((min(blocks - first, int64_t(kTile)) + 3) / 4);
    for (int g = threadIdx.x; g < groups; g += blockDim.x) {
      const math::Words drawn = math::random_words(stream, math::group_of(first) + g);
      // Pad beyond the last block with the largest word, which never counts as smaller.
      for (int i = 0; i < 4; ++i) tile[g].v[i] = first + g * 4 + i < blocks ? drawn.w[i] : UINT32_MAX;
    }
    __syncthreads();
    // Words before this one win ties.
    const int before = int(max(int64_t(0), min(mine - first, int64_t(kTile))));
    for (int g = 0; g < groups; ++g) {
      const Pack<uint32_t, 4> others = tile[g];
#pragma unroll
      for (int i = 0; i < 4; ++i) rank += others.v[i] < word || (others.v[i] == word && g * 4 + i < before);
    }
    __syncthreads();
  }
  if (mine >= blocks) return;
  const bool chosen = int64_t(rank) < masked[sample * masked_stride];
  owners[sample * blocks + mine] = uint8_t(chosen ? rank % copies : copies);
}

}  // namespace

const char* launch_random_normal(Key key, float* y, int64_t batch, int64_t count, uint32_t tag, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const unsigned blocks = blocks_for(batch * ((count + 3) / 4));
  if (count % 4 == 0 && aligned16(y)) {
    launch_random_normal_kernel<true><<<blocks, kThreads, 0, cuda_stream>>>(key, y, batch, count, tag);
  } else {
    launch_random_normal_kernel<false><<<blocks, kThreads, 0, cuda_stream>>>(key, y, batch, count, tag);
  }
  return launch_error();
}

const char* launch_mask_blocks(Key key, const int64_t* masked, int64_t masked_stride, uint8_t* owners, int64_t batch,
                               int64_t blocks, int copies, void* stream) {
  // Whole warps, and no more than needed for the words.
  const int threads = int(std::min<int64_t>(kThreads, (blocks + 31) / 32 * 32));
  const int64_t parts = (blocks + threads - 1) / threads;
  launch_mask_blocks_kernel<<<unsigned(batch * parts), threads, 0, static_cast<cudaStream_t>(stream)>>>(
      key, masked, masked_stride, owners, blocks, parts, copies);
  return launch_error();
}

}  // namespace atop
