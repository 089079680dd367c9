#include <vector>

#include "cpu/strips.h"
#include "math/bilinear.h"
#include "math/corrupt.h"
#include "math/normal.h"

namespace atop {
namespace {

// out[i] = masked by the copy ? 0 : t[i]
template <typename C, typename Out>
ATOP_CLONES void mask(const C* t, const int32_t* owners, int32_t copy, Out* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(owners[i] == copy ? C(0) : t[i], &out[i]);
}

template <typename C, typename Out>
ATOP_CLONES void convert(const C* t, Out* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(t[i], &out[i]);
}

template <typename C, typename Out>
ATOP_CLONES void is_owned(const int32_t* owners, int32_t copy, Out* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(owners[i] == copy ? C(1) : C(0), &out[i]);
}

template <typename In, typename C>
ATOP_CLONES void widen(const In* x, int64_t stride, C* __restrict__ out, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = load(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = load(x[i * stride]);
  }
}

template <typename C>
ATOP_CLONES void blend(const C* above, const C* below, C weight, C* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = math::interpolate(above[i], below[i], weight);
}

// float64 is only for gradient checks, so plain loops suffice.
void clip(const double* x, const float* noise, float sigma, const uint8_t* kept, double* t, uint8_t* live, int64_t n) {
  if (live) memset(live, 0, static_cast<size_t>((n + 7) / 8));
  for (int64_t i = 0; i < n; ++i) {
    const double v = x[i] + static_cast<double>(noise[i]) * static_cast<double>(sigma);
    const bool keep = (kept[i / 8] >> (i % 8)) & 1;
    t[i] = keep ? math::clip_and_scale(v) : 0.0;
    if (live) live[i / 8] |= static_cast<uint8_t>((math::inside(v) && keep) << (i % 8));
  }
}

void clip(const float* x, const float* noise, float sigma, const uint8_t* kept, float* t, uint8_t* live, int64_t n) {
  simd::corrupt(x, noise, sigma, kept, t, live, n);
}

// Images in the type of the computation, either unchanged or with all rows already resized.
template <typename In>
struct Source {
  using C = typename Compute<In>::type;
  const In* x;
  const C* resized_rows;  // [batch, channels, x_height, width], or null
  int64_t x_height, x_width;

  // A pointer to the pixels [first, first + n) of a plane, in place or in `buffer`.
  const C* pixels(const Images& im, int64_t sample, int64_t channel, int64_t first, int64_t n, C* buffer) const {
    if (resized_rows) {
      const C* plane = resized_rows + (sample * im.channels + channel) * x_height * im.width;
      for (int64_t i = 0; i < n;) {
        const int64_t row = (first + i) / im.width, column = first + i - row * im.width;
        const int64_t in_row = std::min(im.width - column, n - i);
        const math::BilinearTap<C> tap(row, x_height, im.height);
        blend(plane + tap.first * im.width + column, plane + tap.second * im.width + column, tap.weight, buffer + i,
              in_row);
        i += in_row;
      }
      return buffer;
    }
    const int64_t stride = im.channels_last ? im.channels : 1;
    const In* p = im.channels_last ? x + (sample * im.pixels() + first) * im.channels + channel
                                   : x + (sample * im.channels + channel) * im.pixels() + first;
    if constexpr (std::is_same_v<In, C>) {
      if (stride == 1) return p;
    }
    widen(p, stride, buffer, n);
    return buffer;
  }
};

// All rows of the images, resized to `width` columns.
template <typename In, typename C = typename Compute<In>::type>
void resize_rows(const In* x, const Images& im, int64_t x_height, int64_t x_width, C* out) {
  std::vector<math::BilinearTap<C>> taps;
  for (int64_t i = 0; i < im.width; ++i) taps.emplace_back(i, x_width, im.width);
  const int64_t stride = im.channels_last ? im.channels : 1;
  const int64_t rows = im.batch * im.channels * x_height;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / im.width), [&](int64_t begin, int64_t end) {
    std::vector<C> row(static_cast<size_t>(x_width));
    for (int64_t r = begin; r < end; ++r) {
      const int64_t plane = r / x_height, y = r % x_height, sample = plane / im.channels, c = plane % im.channels;
      const In* p = im.channels_last ? x + (sample * x_height + y) * x_width * im.channels + c : x + r * x_width;
      widen(p, stride, row.data(), x_width);
      for (int64_t i = 0; i < im.width; ++i) {
        out[r * im.width + i] = math::interpolate(row[taps[i].first], row[taps[i].second], taps[i].weight);
      }
    }
  });
}

// The random numbers of a strip, channel by channel, in the order of the pixels.
class Noise {
 public:
  // Blocks masked in the only copy need no random numbers. A group's first pixel decides, provided that no group spans
  // two blocks.
  explicit Noise(const Images& im)
      : pixels_(im.pixels()),
        skips_(im.copies == 1 && im.pixels() % 4 == 0 && im.width % 4 == 0 && im.patch % 4 == 0) {}

  // Starts another strip, with these owners.
  void start(const int32_t* owners, int64_t n) {
    if (!skips_) return;
    used_ = 0;
    for (int64_t i = 0; i < n / 4; ++i) {
      groups_.offsets[used_] = static_cast<uint32_t>(i);
      used_ += owners[4 * i] != 0;
    }
    // The padding of the last batch writes beyond the strip.
    std::fill_n(groups_.offsets + used_, simd::kBatch, static_cast<uint32_t>(kStrip / 4));
  }

  // The numbers of the elements [channel * pixels + first, ... + n).
  const float* fill(const math::Stream& stream, int64_t channel, int64_t first, int64_t n) {
    const int64_t element = channel * pixels_ + first, lane = math::lane_of(element);
    if (skips_) {
      simd::spread_normals(stream, math::group_of(element), groups_.offsets, used_, numbers_);
    } else {
      simd::fill_normals(stream, math::group_of(element), groups_.offsets, (lane + n + 3) / 4, numbers_);
    }
    return numbers_ + lane;
  }

 private:
  int64_t pixels_, used_ = 0;
  bool skips_;
  simd::Groups groups_;
  alignas(64) float numbers_[4 * simd::Groups::kMost] = {};
};

// The buffers of a thread for one strip, about 30 KB.
template <typename C, typename Out>
struct Buffers {
  alignas(64) int32_t owners[kStrip];
  alignas(64) uint8_t kept[kStrip / 8];  // bits: not masked in the only copy
  alignas(64) C x[kStrip];
  alignas(64) C t[kStrip];
  alignas(64) Out out[kStrip];
  alignas(64) Out ones[kStrip];
  Noise noise;
  float silence[kStrip] = {};

  explicit Buffers(const Images& im) : noise(im) {
    memset(kept, 0xFF, sizeof(kept));
    for (Out& one : ones) store(C(1), &one);
  }

  void start(const uint8_t* blocks, const Images& im, int64_t first, int64_t n) {
    expand_owners(blocks, im, first, n, owners);
    noise.start(owners, n);
    if (im.copies == 1) simd::nonzero_bits(owners, kept, n);
  }
};

// One channel of one strip of one image of a result.
template <typename Out>
struct Place {
  Out* p;
  int64_t stride;  // between pixels
  bool around_cache;

  Place(Out* y, const Images& im, int64_t channels, int64_t image, int64_t channel, int64_t first, bool stream)
      : p(im.channels_last ? y + (image * im.pixels() + first) * channels + channel
                           : y + (image * channels + channel) * im.pixels() + first),
        stride(im.channels_last ? channels : 1),
        around_cache(stream) {}

  // Whether a loop may write its results here directly.
  bool direct() const { return stride == 1 && !around_cache; }

  void write(const Out* values, int64_t n) const {
    if (values == p) return;
    if (stride == 1) return copy_out(p, values, n * int64_t(sizeof(Out)), around_cache);
    for (int64_t i = 0; i < n; ++i) p[i * stride] = values[i];
  }
};

// One call of the op: the state shared by all strips.
template <typename In, typename Out>
struct Call {
  using C = typename Compute<Out>::type;
  Source<In> source;
  Images im;
  Out* y;
  uint8_t* live;
  bool around_cache;

  Place<Out> place(int64_t sample, int64_t copy, int64_t channel, int64_t first) const {
    return {y, im, im.channels + 2, sample * im.copies + copy, channel, first, around_cache};
  }

  void strip(const math::Stream& stream, float sigma, Buffers<C, Out>& b, int64_t sample, int64_t first,
             int64_t n) const {
    for (int64_t c = 0; c < im.channels; ++c) channel(stream, sigma, b, sample, c, first, n);
    for (int32_t copy = 0; y && copy < im.copies; ++copy) {
      place(sample, copy, im.channels, first).write(b.ones, n);
      const Place<Out> to = place(sample, copy, im.channels + 1, first);
      Out* const mask = to.direct() ? to.p : b.out;
      is_owned<C>(b.owners, copy, mask, n);
      to.write(mask, n);
    }
  }

  void channel(const math::Stream& stream, float sigma, Buffers<C, Out>& b, int64_t sample, int64_t c, int64_t first,
               int64_t n) const {
    const C* x = source.pixels(im, sample, c, first, n, b.x);
    // Prefetch the images while the noise is generated.
    for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(C))) __builtin_prefetch(x + i);
    const float* noise = sigma == 0.0f ? b.silence : b.noise.fill(stream, c, first, n);
    uint8_t* bits = live ? live + (sample * im.channels + c) * im.packed() + first / 8 : nullptr;
    if constexpr (std::is_same_v<C, Out>) {
      if (im.copies == 1 && y) {
        const Place<Out> to = place(sample, 0, c, first);
        C* const t = to.direct() ? to.p : b.t;
        clip(x, noise, sigma, b.kept, t, bits, n);
        return to.write(t, n);
      }
    }
    clip(x, noise, sigma, b.kept, b.t, bits, n);
    for (int32_t copy = 0; y && copy < im.copies; ++copy) {
      mask(b.t, b.owners, copy, b.out, n);
      place(sample, copy, c, first).write(b.out, n);
    }
  }
};

// Adds the gradient of a copy, where it was not masked, to the total of the previous copies.
template <typename Dy, typename C>
ATOP_CLONES void add_unmasked(const Dy* dy, int64_t stride, const int32_t* owners, int32_t copy, C* __restrict__ total,
                              int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const C g = owners[i] == copy ? C(0) : C(load(dy[i]));
      total[i] = copy == 0 ? g : total[i] + g;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const C g = owners[i] == copy ? C(0) : C(load(dy[i * stride]));
      total[i] = copy == 0 ? g : total[i] + g;
    }
  }
}

void clip_bwd(const double* dy, const uint8_t* live, double* dx, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dx[i] = (live[i / 8] >> (i % 8)) & 1 ? 2.0 * dy[i] : 0.0;
}

void clip_bwd(const float* dy, const uint8_t* live, float* dx, int64_t n) {
  simd::corrupt_bwd(dy, live, dx, n);
}

template <typename C, typename Dx>
struct BwdBuffers {
  alignas(64) int32_t owners[kStrip];
  alignas(64) C total[kStrip];
  alignas(64) C dx[kStrip];
  alignas(64) Dx out[kStrip];

  explicit BwdBuffers(const Images&) {}
};

}  // namespace

template <typename In, typename Out>
const char* launch_corrupt(const In* x, const uint8_t* owners, const float* sigma, int64_t sigma_stride, Key key,
                           Images im, int64_t x_height, int64_t x_width, Out* y, uint8_t* live, void*) {
  using C = typename Compute<Out>::type;
  std::unique_ptr<C[]> resized;
  if (x_height != im.height || x_width != im.width) {
    resized.reset(new C[static_cast<size_t>(im.batch * im.channels * x_height * im.width)]);
    resize_rows(x, im, x_height, x_width, resized.get());
  }
  const int64_t bytes = im.batch * im.copies * (im.channels + 2) * im.pixels() * int64_t(sizeof(Out));
  const Call<In, Out> call{{x, resized.get(), x_height, x_width}, im, y, live, bytes > kStreamBytes};
  for_each_strip<Buffers<C, Out>>(im, [&](Buffers<C, Out>& b, int64_t sample, int64_t first, int64_t n) {
    b.start(owners + sample * im.blocks(), im, first, n);
    call.strip(key.stream(sample, math::kTagNoise), sigma[sample * sigma_stride], b, sample, first, n);
  });
  return nullptr;
}

template <typename Dy, typename Dx>
const char* launch_corrupt_bwd(const Dy* dy, const uint8_t* live, const uint8_t* owners, Images im, Dx* dx, void*) {
  using C = typename Compute<Dx>::type;
  using Local = BwdBuffers<C, Dx>;
  const bool around_cache = im.batch * im.channels * im.pixels() * int64_t(sizeof(Dx)) > kStreamBytes;
  for_each_strip<Local>(im, [&](Local& b, int64_t sample, int64_t first, int64_t n) {
    if (im.copies > 1) expand_owners(owners + sample * im.blocks(), im, first, n, b.owners);
    for (int64_t c = 0; c < im.channels; ++c) {
      const uint8_t* bits = live + (sample * im.channels + c) * im.packed() + first / 8;
      const C* total = b.total;
      for (int32_t copy = 0; copy < im.copies; ++copy) {
        const Place<const Dy> from(dy, im, im.channels + 2, sample * im.copies + copy, c, first, false);
        if (im.copies > 1) {
          add_unmasked(from.p, from.stride, b.owners, copy, b.total, n);
        } else if constexpr (std::is_same_v<Dy, C>) {
          if (from.stride == 1) {
            total = from.p;
          } else {
            widen(from.p, from.stride, b.total, n);
          }
        } else {
          widen(from.p, from.stride, b.total, n);
        }
      }
      const Place<Dx> to(dx, im, im.channels, sample, c, first, around_cache);
      if constexpr (std::is_same_v<Dx, C>) {
        C* result = to.direct() ? to.p : b.dx;
        clip_bwd(total, bits, result, n);
        to.write(result, n);
      } else {
        clip_bwd(total, bits, b.dx, n);
        convert(b.dx, b.out, n);
        to.write(b.out, n);
      }
    }
  });
  return nullptr;
}

#define ATOP_FORWARD(In, Out)                                                                                          \
  template const char* launch_corrupt(const In*, const uint8_t*, const float*, int64_t, Key, Images, int64_t, int64_t, \
                                      Out*, uint8_t*, void*);
#define ATOP_BACKWARD(Dy, Dx) \
  template const char* launch_corrupt_bwd(const Dy*, const uint8_t*, const uint8_t*, Images, Dx*, void*);
#define ATOP_INSTANTIATE(T)  \
  ATOP_FORWARD(uint8_t, T)   \
  ATOP_FORWARD(float, T)     \
  ATOP_FORWARD(BFloat16, T)  \
  ATOP_FORWARD(Half, T)      \
  ATOP_BACKWARD(float, T)    \
  ATOP_BACKWARD(BFloat16, T) \
  ATOP_BACKWARD(Half, T)
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)
ATOP_FORWARD(double, double)
ATOP_BACKWARD(double, double)

}  // namespace atop
