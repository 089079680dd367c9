#include <algorithm>
#include <cmath>
#include <vector>

#include "common/launchers.h"
#include "common/parallel.h"
#include "cpu/scratch.h"

namespace atop {
namespace {

// In the square, each channel is x0 + eps or x0 - eps.
template <typename T>
void paste(const Squares<T>& s, int64_t b) {
  std::copy_n(s.x + b * s.inner(), s.inner(), s.y + b * s.inner());
  for (int64_t c = 0; c < s.channels; ++c) {
    const T shift = s.eps * s.signs[b * s.channels + c];
    for (int64_t i = 0; i < s.height; ++i) {
      if (s.rows[b * s.height + i] == 0) continue;
      const int64_t at = b * s.inner() + c * s.pixels() + i * s.width;
      for (int64_t j = 0; j < s.width; ++j) {
        if (s.columns[b * s.width + j] != 0) s.y[at + j] = std::min(T(1), std::max(T(0), s.x0[at + j] + shift));
      }
    }
  }
}

// The number of lanes of a sum: vectorizable, in an order that does not depend on the machine.
constexpr int64_t kLanes = 16;

template <typename T>
double total(const T* lanes) {
  double sum = 0;
  for (int64_t j = 0; j < kLanes; ++j) sum += static_cast<double>(lanes[j]);
  return sum;
}

// Arrays have length n, zero-padded to a multiple of kLanes. Powers are squares for L2 and absolute values for L1.
template <typename T>
ATOP_CLONES double powers(const T* delta, int64_t n, bool l2) {
  T sums[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += l2 ? delta[i + j] * delta[i + j] : std::abs(delta[i + j]);
  }
  return total(sums);
}

template <typename T>
ATOP_CLONES void subtract(const T* x, const T* x0, int64_t n, T* __restrict__ delta) {
  for (int64_t i = 0; i < n; ++i) delta[i] = x[i] - x0[i];
}

// The sums of powers over the elements where the masks are 1.
template <typename T>
ATOP_CLONES void masked_powers(const T* delta, const T* inside, const T* either, int64_t n, bool l2, double* result) {
  T here[kLanes] = {}, both[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const T power = l2 ? delta[i + j] * delta[i + j] : std::abs(delta[i + j]);
      here[j] += power * inside[i + j];
      both[j] += power * either[i + j];
    }
  }
  result[0] = total(here);
  result[1] = total(both);
}

// delta / divisor + shape * sign inside the square, 0 in the other square; returns the sum of powers inside.
template <typename T>
ATOP_CLONES double add_bump(const T* shape, const T* inside, const T* either, int64_t n, T divisor, T sign, bool l2,
                            T* __restrict__ delta) {
  T sums[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const T made = (delta[i + j] / divisor + shape[i + j] * sign) * inside[i + j];
      sums[j] += l2 ? made * made : std::abs(made);
      delta[i + j] = made + delta[i + j] * (1 - either[i + j]);
    }
  }
  return total(sums);
}

template <typename T>
ATOP_CLONES void scale_inside(const T* inside, int64_t n, T scale, T* __restrict__ delta) {
  for (int64_t i = 0; i < n; ++i) delta[i] *= inside[i] > 0 ? scale : T(1);
}

template <typename T>
ATOP_CLONES void add_scaled(const T* x0, const T* delta, int64_t n, T scale, bool clips, T* __restrict__ y) {
  for (int64_t i = 0; i < n; ++i) {
    const T value = x0[i] + delta[i] * scale;
    const T clipped = value < 0 ? T(0) : value > 1 ? T(1) : value;
    y[i] = clips ? clipped : value;
  }
}

template <typename T>
T root(double v, bool l2) {
  return static_cast<T>(l2 ? std::sqrt(v) : v);
}

// For every pixel of sample b: the bump, whether it is in the first square, and whether it is in either square.
template <typename T>
void find_places(const Bumps<T>& s, int64_t b, T* shape, T* inside, T* either) {
  for (int64_t i = 0; i < s.height; ++i) {
    const int64_t row = std::clamp<int64_t>(i - s.top[b], 0, s.side - 1);
    const T *const here = s.columns + b * s.width, *const there = s.other_columns + b * s.width;
    const T has_row = s.rows[b * s.height + i], has_other = s.other_rows[b * s.height + i];
    for (int64_t j = 0; j < s.width; ++j) {
      const T first = has_row * here[j], second = has_other * there[j];
      inside[i * s.width + j] = first;
      either[i * s.width + j] = std::max(first, second);
      if (first == 0) continue;
      const int64_t column = std::clamp<int64_t>(j - s.left[b], 0, s.side - 1);
      shape[i * s.width + j] = s.bumps[(s.bump[b] * s.side + row) * s.side + column];
    }
  }
}

// `buffers` holds 4 planes of zeros, each padded to `whole` pixels, and one padded image.
template <typename T>
void add_bumps(const Bumps<T>& s, int64_t b, T* buffers, int64_t whole) {
  T *const shape = buffers, *const inside = shape + whole, *const either = inside + whole;
  T *const plane = either + whole, *const delta = plane + whole;
  const T* const x0 = s.x0 + b * s.inner();
  find_places(s, b, shape, inside, either);
  subtract(s.x + b * s.inner(), x0, s.inner(), delta);
  const double radius = static_cast<double>(s.l2 ? s.eps * s.eps : s.eps);
  const double spare = std::max(0.0, radius - powers(delta, s.inner(), s.l2)) / static_cast<double>(s.channels);
  for (int64_t c = 0; c < s.channels; ++c) {
    std::copy_n(delta + c * s.pixels(), s.pixels(), plane);
    double masked[2];
    masked_powers(plane, inside, either, whole, s.l2, masked);
    const T sign = s.signs[b * s.channels + c], divisor = root<T>(masked[0], s.l2) + T(1e-12);
    const double size = add_bump(shape, inside, either, whole, divisor, sign, s.l2, plane), budget = spare + masked[1];
    // For L1, the original gives every channel the whole budget; the projection removes the excess.
    const T left_over = static_cast<T>(s.l2 ? std::sqrt(budget) : budget * static_cast<double>(s.channels));
    scale_inside(inside, s.pixels(), left_over / (root<T>(size, s.l2) + T(1e-12)), plane);
    std::copy_n(plane, s.pixels(), delta + c * s.pixels());
  }
  const T scale = s.l2 ? s.eps / (root<T>(powers(delta, s.inner(), true), true) + T(1e-12)) : T(1);
  add_scaled(x0, delta, s.inner(), scale, s.l2, s.y + b * s.inner());
}

// Calls body(begin, end) on the samples.
template <typename T, typename Body>
void over_samples(const Squares<T>& s, const Body& body) {
  torch::stable::parallel_for(0, s.batch, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, s.inner())), body);
}

}  // namespace

template <typename T>
const char* launch_square_linf(const Squares<T>& squares, void*) {
  over_samples(squares, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) paste(squares, b);
  });
  return nullptr;
}

template <typename T>
const char* launch_square_bump(const Bumps<T>& bumps, void*) {
  over_samples(bumps, [&](int64_t begin, int64_t end) {
    const int64_t plane = round_up(bumps.pixels(), kLanes);
    std::vector<T> buffers(static_cast<size_t>(4 * plane + round_up(bumps.inner(), kLanes)));
    for (int64_t b = begin; b < end; ++b) add_bumps(bumps, b, buffers.data(), plane);
  });
  return nullptr;
}

template const char* launch_square_linf(const Squares<float>&, void*);
template const char* launch_square_linf(const Squares<double>&, void*);
template const char* launch_square_bump(const Bumps<float>&, void*);
template const char* launch_square_bump(const Bumps<double>&, void*);

}  // namespace atop
