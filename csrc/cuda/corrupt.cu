#include "common/launchers.h"
#include "math/bilinear.h"
#include "math/corrupt.h"
#include "math/normal.h"
#include "octets.cuh"

namespace atop {
namespace {

// Packed octets of unchanged or of resized images, and the general case.
enum class Kind { kPlain, kResized, kAny };

// The same arguments as launch_corrupt.
template <typename In, typename Out>
struct Arguments {
  const In* __restrict__ x;
  const uint8_t* __restrict__ owners;
  const float* __restrict__ sigma;
  int64_t sigma_stride;
  Key key;
  Images images;
  int64_t x_height, x_width;
  Out* __restrict__ y;
  uint8_t* __restrict__ live;

  __host__ __device__ bool resized() const { return x_height != images.height || x_width != images.width; }
  // Threads per octet: one per channel and, with y, one more for the ones and the masks.
  __host__ __device__ int64_t channels() const { return images.channels + (y != nullptr); }
};

// The pixels of a resized plane, in sequence.
template <typename In, typename Out>
class Resized {
  using C = typename Compute<In>::type;

 public:
  template <bool Packed>
  __device__ __forceinline__ Resized(const Arguments<In, Out>& a, const Octet<Packed>& at)
      : a_(a), stride_(!Packed && a.images.channels_last ? a.images.channels : 1) {
    const int64_t image = at.sample * a.images.channels, plane = a.x_height * a.x_width;
    x_ = a.x + (!Packed && a.images.channels_last ? image * plane + at.channel : (image + at.channel) * plane);
    row_ = at.pixel / uint32_t(a.images.width);
    column_ = at.pixel - row_ * uint32_t(a.images.width);
    find_lines();
  }

  // First along lines, then across lines.
  __device__ __forceinline__ C next() {
    const math::BilinearTap<C> tap(column_, a_.x_width, a_.images.width);
    const int64_t first = tap.first * stride_, second = tap.second * stride_;
    const C above = math::interpolate<C>(load(above_[first]), load(above_[second]), tap.weight);
    const C below = math::interpolate<C>(load(below_[first]), load(below_[second]), tap.weight);
    const C v = math::interpolate(above, below, weight_);
    if (++column_ == uint32_t(a_.images.width)) {
      column_ = 0;
      ++row_;
      find_lines();
    }
    return v;
  }

 private:
  __device__ __forceinline__ void find_lines() {
    const math::BilinearTap<C> tap(row_, a_.x_height, a_.images.height);
    above_ = x_ + tap.first * a_.x_width * stride_;
    below_ = x_ + tap.second * a_.x_width * stride_;
    weight_ = tap.weight;
  }

  const Arguments<In, Out>& a_;
  const int64_t stride_;
  uint32_t row_, column_;
  const In *x_, *above_, *below_;
  C weight_;  // weight of the line below
};

// The noise of eight elements from `index` on; if Packed, `index` is a multiple of 4.
template <bool Packed>
__device__ __forceinline__ void draw(const math::Stream& stream, int64_t index, float (&noise)[8]) {
  float drawn[12] = {};
  const int lane = Packed ? 0 : math::lane_of(index);
#pragma unroll
  for (int g = 0; g < 3; ++g) {
    if (g == 2 && lane == 0) continue;
    const math::Normals normals = math::random_normals(stream, math::group_of(index) + g);
#pragma unroll
    for (int i = 0; i < 4; ++i) drawn[4 * g + i] = normals.n[i];
  }
  // Shift by 1 and by 2, so that array indices are constants and the array stays in registers.
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
#pragma unroll
    for (int i = 0; i + step < 12; ++i) drawn[i] = lane & step ? drawn[i + step] : drawn[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) noise[i] = drawn[i];
}

// v = x + sigma n.
template <Kind kind, bool Packed, typename In, typename Out, typename C>
__device__ __forceinline__ void noisy(const Arguments<In, Out>& a, const Octet<Packed>& at, C (&v)[8]) {
  if (kind == Kind::kResized || (kind == Kind::kAny && a.resized())) {
    Resized<In, Out> pixels(a, at);
    // A loop with a single interpolation instead of eight copies: v advances by one pixel each time.
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 7; ++j) v[j] = v[j + 1];
      v[7] = i < at.count ? pixels.next() : C(0);
    }
  } else {
    const int64_t stride = a.images.channels_last ? a.images.channels : 1;
    const int64_t first = at.offset(a.images, at.sample, a.images.channels, at.channel);
    const auto octet = load_octet<Packed>(a.x + first, at.count, stride);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = load(octet.v[i]);
  }
  const float sigma = a.sigma[at.sample * a.sigma_stride];
  if (sigma == 0.0f) return;
  float noise[8];
  draw<Packed>(a.key.stream(at.sample, math::kTagNoise), at.channel * a.images.pixels() + at.pixel, noise);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = v[i] + C(sigma) * C(noise[i]);
}

// Channel `channel` of all copies: `octet`, or `masked` where a copy masks.
template <bool Packed, typename In, typename Out>
__device__ __forceinline__ void write(const Arguments<In, Out>& a, const Octet<Packed>& at, int64_t channel,
                                      const Pack<Out, 8>& octet, Out masked) {
  const int64_t channels = a.images.channels + 2, stride = a.images.channels_last ? channels : 1;
  Out* y = a.y + at.offset(a.images, at.sample * a.images.copies, channels, channel);
  for (int n = 0; n < a.images.copies; ++n, y += channels * a.images.pixels()) {
    Pack<Out, 8> copy;
#pragma unroll
    for (int i = 0; i < 8; ++i) copy.v[i] = at.owner[i] == n ? masked : octet.v[i];
    store_octet<Packed>(y, at.count, stride, copy);
  }
}

template <bool Packed, typename In, typename Out>
__device__ __forceinline__ void write_ones_and_masks(const Arguments<In, Out>& a, const Octet<Packed>& at) {
  Out one;
  store(typename Compute<Out>::type(1), &one);
  Pack<Out, 8> octet = {};
  write(a, at, a.images.channels + 1, octet, one);
#pragma unroll
  for (int i = 0; i < 8; ++i) octet.v[i] = one;
  write(a, at, a.images.channels, octet, one);
}

template <typename In, typename Out, Kind kind>
__global__ void __launch_bounds__(kThreads) launch_corrupt_kernel(Arguments<In, Out> a) {
  using C = typename Compute<In>::type;
  const Octet<kind != Kind::kAny> at(a.owners, a.images, a.channels());
  if (!at.exists) return;
  if (at.channel == a.images.channels) return write_ones_and_masks(a, at);

  // With a single copy, masked pixels do not matter.
  bool hidden[8], all_hidden = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    hidden[i] = a.images.copies == 1 && at.owner[i] == 0;
    all_hidden = all_hidden && hidden[i];
  }
  C v[8] = {};
  if (!all_hidden) noisy<kind>(a, at, v);
  if (a.y != nullptr) {
    Pack<Out, 8> octet;
#pragma unroll
    for (int i = 0; i < 8; ++i) store(math::clip_and_scale(v[i]), &octet.v[i]);
    write(a, at, at.channel, octet, Out{});
  }
  if (a.live != nullptr) {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) bits |= unsigned(i < at.count && !hidden[i] && math::inside(v[i])) << i;
    a.live[(at.sample * a.images.channels + at.channel) * a.images.packed() + at.number] = uint8_t(bits);
  }
}

// dx = 2 * the sum of dy over the copies, in order, where the gradient passes.
template <typename Dy, typename Dx, bool Packed>
__global__ void __launch_bounds__(kThreads)
    launch_corrupt_bwd_kernel(const Dy* __restrict__ dy, const uint8_t* __restrict__ live,
                              const uint8_t* __restrict__ owners, Images images, Dx* __restrict__ dx) {
  using C = typename Compute<Dy>::type;
  const Octet<Packed> at(owners, images, images.channels);
  if (!at.exists) return;
  const unsigned bits = live[(at.sample * images.channels + at.channel) * images.packed() + at.number];
  const int64_t channels = images.channels + 2;
  const Dy* copy = dy + at.offset(images, at.sample * images.copies, channels, at.channel);
  Pack<Dx, 8> result = {};
  // Skip the reads where no gradient passes.
  if (bits != 0) {
    // -0 + t equals t for every t, even for -0.
    C total[8] = {-C(0), -C(0), -C(0), -C(0), -C(0), -C(0), -C(0), -C(0)};
#pragma unroll 1
    for (int n = 0; n < images.copies; ++n, copy += channels * images.pixels()) {
      const auto octet = load_octet<Packed>(copy, at.count, images.channels_last ? channels : 1);
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i] = total[i] + (at.owner[i] == n ? C(0) : C(load(octet.v[i])));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) store(bits >> i & 1 ? total[i] * C(2) : C(0), &result.v[i]);
  }
  Dx* const first = dx + at.offset(images, at.sample, images.channels, at.channel);
  store_octet<Packed>(first, at.count, images.channels_last ? images.channels : 1, result);
}

}  // namespace

template <typename In, typename Out>
const char* launch_corrupt(const In* x, const uint8_t* owners, const float* sigma, int64_t sigma_stride, Key key,
                           Images images, int64_t x_height, int64_t x_width, Out* y, uint8_t* live, void* stream) {
  if (const char* error = too_large(images)) return error;
  const Arguments<In, Out> a{x, owners, sigma, sigma_stride, key, images, x_height, x_width, y, live};
  const int64_t threads = images.batch * a.channels() * images.packed();
  if (threads == 0) return nullptr;
  const unsigned blocks = blocks_for(threads);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (a.resized() && packable(images, y)) {
    launch_corrupt_kernel<In, Out, Kind::kResized><<<blocks, kThreads, 0, cuda_stream>>>(a);
  } else if (!a.resized() && packable(images, x, y)) {
    launch_corrupt_kernel<In, Out, Kind::kPlain><<<blocks, kThreads, 0, cuda_stream>>>(a);
  } else {
    launch_corrupt_kernel<In, Out, Kind::kAny><<<blocks, kThreads, 0, cuda_stream>>>(a);
  }
  return launch_error();
}

template <typename Dy, typename Dx>
const char* launch_corrupt_bwd(const Dy* dy, const uint8_t* live, const uint8_t* owners, Images images, Dx* dx,
                               void* stream) {
  if (const char* error = too_large(images)) return error;
  const unsigned blocks = blocks_for(images.batch * images.channels * images.packed());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (packable(images, dy, dx)) {
    launch_corrupt_bwd_kernel<Dy, Dx, true><<<blocks, kThreads, 0, cuda_stream>>>(dy, live, owners, images, dx);
  } else {
    launch_corrupt_bwd_kernel<Dy, Dx, false><<<blocks, kThreads, 0, cuda_stream>>>(dy, live, owners, images, dx);
  }
  return launch_error();
}

#define ATOP_INSTANTIATE(In, Out)                                                                                      \
  template const char* launch_corrupt(const In*, const uint8_t*, const float*, int64_t, Key, Images, int64_t, int64_t, \
                                      Out*, uint8_t*, void*);
#define ATOP_INSTANTIATE_BWD(Dy, Dx) \
  template const char* launch_corrupt_bwd(const Dy*, const uint8_t*, const uint8_t*, Images, Dx*, void*);
#define ATOP_FOR_OUTPUTS(MACRO, In) MACRO(In, float) MACRO(In, BFloat16) MACRO(In, Half)
ATOP_FOR_OUTPUTS(ATOP_INSTANTIATE, uint8_t)
ATOP_FOR_OUTPUTS(ATOP_INSTANTIATE, float)
ATOP_FOR_OUTPUTS(ATOP_INSTANTIATE, BFloat16)
ATOP_FOR_OUTPUTS(ATOP_INSTANTIATE, Half)
ATOP_INSTANTIATE(double, double)
ATOP_FOR_OUTPUTS(ATOP_INSTANTIATE_BWD, float)
ATOP_FOR_OUTPUTS(ATOP_INSTANTIATE_BWD, BFloat16)
ATOP_FOR_OUTPUTS(ATOP_INSTANTIATE_BWD, Half)
ATOP_INSTANTIATE_BWD(double, double)

}  // namespace atop
