#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "common/images.h"
#include "common/parallel.h"
#include "cpu/scratch.h"

// The host side is in this file instead of csrc/ops, because the ops have no CUDA kernels.
namespace atop {
namespace {

void check_images(const char* function, const Tensor& x, const Tensor& x0) {
  ATOP_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, function, "x",
             "a float32 or float64 tensor", dtype_text(x.scalar_type()));
  ATOP_CHECK(x.dim() == 4, function, "x", "of shape (B, C, H, W)", shape_text(x));
  bool fits = x0.dim() == 4 && x0.scalar_type() == x.scalar_type();
  for (int64_t i = 0; fits && i < 4; ++i) fits = x0.size(i) == x.size(i);
  ATOP_CHECK(fits, function, "x0", "of dtype and shape of x", shape_text(x0));
}

// Checks for this many numbers of the dtype per sample.
Tensor checked(const char* function, const char* argument, const Tensor& t, ScalarType dtype, int64_t batch,
               int64_t each) {
  ATOP_CHECK(t.scalar_type() == dtype, function, argument, text("of dtype ", dtype_text(dtype)),
             dtype_text(t.scalar_type()));
  ATOP_CHECK(t.numel() == batch * each && t.dim() > 0 && t.size(0) == batch, function, argument,
             text("of ", each, " numbers for each of ", batch, " samples"), shape_text(t));
  return dense(t);
}

template <typename T>
struct Squares {
  const T *x, *x0, *signs, *rows, *columns;
  int64_t channels, height, width;
  T eps;
  T* y;

  int64_t pixels() const { return height * width; }
  int64_t inner() const { return channels * pixels(); }

  // In the square, each channel is x0 + eps or x0 - eps.
  void paste(int64_t b) const {
    std::copy_n(x + b * inner(), inner(), y + b * inner());
    for (int64_t c = 0; c < channels; ++c) {
      const T shift = eps * signs[b * channels + c];
      for (int64_t i = 0; i < height; ++i) {
        if (rows[b * height + i] == 0) continue;
        const int64_t at = b * inner() + c * pixels() + i * width;
        for (int64_t j = 0; j < width; ++j) {
          if (columns[b * width + j] != 0) y[at + j] = std::min(T(1), std::max(T(0), x0[at + j] + shift));
        }
      }
    }
  }
};

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
struct Bumps : Squares<T> {
  using Squares<T>::x, Squares<T>::x0, Squares<T>::rows, Squares<T>::columns, Squares<T>::channels;
  using Squares<T>::height, Squares<T>::width, Squares<T>::eps, Squares<T>::pixels, Squares<T>::inner;
  const T *other_rows, *other_columns, *bumps;
  const int64_t *top, *left, *bump;
  int64_t side;
  bool l2;

  T root(double v) const { return static_cast<T>(l2 ? std::sqrt(v) : v); }

  // For every pixel of sample b: the bump, whether it is in the first square, and whether it is in either square.
  void places(int64_t b, T* shape, T* inside, T* either) const {
    for (int64_t i = 0; i < height; ++i) {
      const int64_t row = std::clamp<int64_t>(i - top[b], 0, side - 1);
      const T *const here = columns + b * width, *const there = other_columns + b * width;
      const T has_row = rows[b * height + i], has_other = other_rows[b * height + i];
      for (int64_t j = 0; j < width; ++j) {
        const T first = has_row * here[j], second = has_other * there[j];
        inside[i * width + j] = first;
        either[i * width + j] = std::max(first, second);
        if (first == 0) continue;
        const int64_t column = std::clamp<int64_t>(j - left[b], 0, side - 1);
        shape[i * width + j] = bumps[(bump[b] * side + row) * side + column];
      }
    }
  }

  // `buffers` holds 4 padded planes of zeros and one padded image.
  void run(int64_t b, T* buffers, int64_t whole) const {
    T *const shape = buffers, *const inside = shape + whole, *const either = inside + whole;
    T *const plane = either + whole, *const delta = plane + whole;
    places(b, shape, inside, either);
    subtract(x + b * inner(), x0 + b * inner(), inner(), delta);
    const double radius = static_cast<double>(l2 ? eps * eps : eps);
    const double spare = std::max(0.0, radius - powers(delta, inner(), l2)) / static_cast<double>(channels);
    for (int64_t c = 0; c < channels; ++c) {
      std::copy_n(delta + c * pixels(), pixels(), plane);
      double masked[2];
      masked_powers(plane, inside, either, whole, l2, masked);
      const T sign = this->signs[b * channels + c], divisor = root(masked[0]) + T(1e-12);
      const double size = add_bump(shape, inside, either, whole, divisor, sign, l2, plane), budget = spare + masked[1];
      // For L1, the original gives every channel the whole budget; the projection removes the excess.
      const T left_over = static_cast<T>(l2 ? std::sqrt(budget) : budget * static_cast<double>(channels));
      scale_inside(inside, pixels(), left_over / (root(size) + T(1e-12)), plane);
      std::copy_n(plane, pixels(), delta + c * pixels());
    }
    const T scale = l2 ? eps / (root(powers(delta, inner(), true)) + T(1e-12)) : T(1);
    add_scaled(x0 + b * inner(), delta, inner(), scale, l2, this->y + b * inner());
  }
};

// The arguments common to both ops, as dense tensors; calls body(images) for the dtype.
struct Arguments {
  Tensor x, x0, signs, rows, columns;
  double eps;

  Arguments(const char* function, const Tensor& x, const Tensor& x0, const Tensor& signs, const Tensor& rows,
            const Tensor& columns, double eps)
      : eps(eps) {
    check_images(function, x, x0);
    const ScalarType dtype = x.scalar_type();
    this->x = dense(x);
    this->x0 = dense(x0);
    this->signs = checked(function, "signs", signs, dtype, x.size(0), x.size(1));
    this->rows = checked(function, "rows", rows, dtype, x.size(0), x.size(2));
    this->columns = checked(function, "columns", columns, dtype, x.size(0), x.size(3));
  }

  template <typename T>
  Squares<T> images(const Tensor& y) const {
    return {input<T>(x), input<T>(x0), input<T>(signs), input<T>(rows),      input<T>(columns),
            x.size(1),   x.size(2),    x.size(3),       static_cast<T>(eps), output<T>(y)};
  }

  // Calls body(begin, end) on the samples.
  template <typename Body>
  void over_samples(const Body& body) const {
    const int64_t inner = std::max<int64_t>(1, x.numel() / std::max<int64_t>(1, x.size(0)));
    torch::stable::parallel_for(0, x.size(0), std::max<int64_t>(1, kGrain / inner), body);
  }
};

Tensor square_linf(const Tensor& x, const Tensor& x0, const Tensor& signs, const Tensor& rows, const Tensor& columns,
                   double eps) {
  const Arguments arguments("square_linf", x, x0, signs, rows, columns, eps);
  const Tensor y = torch::stable::empty_like(arguments.x);
  with_float_type(x.scalar_type(), [&](auto* type) {
    const auto images = arguments.images<std::remove_pointer_t<decltype(type)>>(y);
    arguments.over_samples([&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) images.paste(b);
    });
  });
  return y;
}

Tensor square_bump(const Tensor& x, const Tensor& x0, const Tensor& signs, const Tensor& rows, const Tensor& columns,
                   const Tensor& other_rows, const Tensor& other_columns, const Tensor& top, const Tensor& left,
                   const Tensor& bump, const Tensor& bumps, double eps, bool l2) {
  constexpr const char* kFunction = "square_bump";
  const Arguments arguments(kFunction, x, x0, signs, rows, columns, eps);
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
  const ScalarType dtype = x.scalar_type();
  const Tensor down = checked(kFunction, "other_rows", other_rows, dtype, batch, height);
  const Tensor across = checked(kFunction, "other_columns", other_columns, dtype, batch, width);
  const Tensor i = checked(kFunction, "top", top, ScalarType::Long, batch, 1);
  const Tensor j = checked(kFunction, "left", left, ScalarType::Long, batch, 1);
  const Tensor which = checked(kFunction, "bump", bump, ScalarType::Long, batch, 1);
  ATOP_CHECK(bumps.dim() == 3 && bumps.size(1) == bumps.size(2) && bumps.scalar_type() == dtype, kFunction, "bumps",
             "of the dtype of x and shape (N, S, S)", shape_text(bumps));
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = input<int64_t>(which)[b];
    ATOP_CHECK(n >= 0 && n < bumps.size(0), kFunction, "bump", text("in [0, ", bumps.size(0), ")"), text(n));
  }
  const Tensor table = dense(bumps), y = torch::stable::empty_like(arguments.x);
  with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Bumps<T> images{arguments.images<T>(y), input<T>(down),    input<T>(across),
                          input<T>(table),        input<int64_t>(i), input<int64_t>(j),
                          input<int64_t>(which),  bumps.size(1),     l2};
    arguments.over_samples([&](int64_t begin, int64_t end) {
      const int64_t plane = round_up(images.pixels(), kLanes);
      std::vector<T> buffers(static_cast<size_t>(4 * plane + round_up(images.inner(), kLanes)));
      for (int64_t b = begin; b < end; ++b) images.run(b, buffers.data(), plane);
    });
  });
  return y;
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, CPU, m) {
  m.impl("square_linf", TORCH_BOX(&atop::square_linf));
  m.impl("square_bump", TORCH_BOX(&atop::square_bump));
}
