#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "common/parallel.h"
#include "common/tensors.h"

// The host side stands here, and not in csrc/ops, as the ops have no CUDA kernels.
namespace atop {
namespace {

Tensor dense(const Tensor& t) {
  return torch::stable::contiguous(t);
}

void check_images(const char* function, const Tensor& x, const Tensor& x0) {
  ATOP_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, function, "x",
             "a float32 or float64 tensor", dtype_text(x.scalar_type()));
  ATOP_CHECK(x.dim() == 4, function, "x", "of shape (B, C, H, W)", shape_text(x));
  bool fits = x0.dim() == 4 && x0.scalar_type() == x.scalar_type();
  for (int64_t i = 0; fits && i < 4; ++i) fits = x0.size(i) == x.size(i);
  ATOP_CHECK(fits, function, "x0", "of dtype and shape of x", shape_text(x0));
}

// So many numbers of the dtype for each sample.
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

template <typename T>
struct Bumps : Squares<T> {
  using Squares<T>::x, Squares<T>::x0, Squares<T>::channels, Squares<T>::pixels, Squares<T>::inner, Squares<T>::eps;
  const T *other_rows, *other_columns, *bumps;
  const int64_t *top, *left, *bump;
  int64_t side;
  bool l2;

  T power(T v) const { return l2 ? v * v : std::abs(v); }
  T root(T v) const { return l2 ? std::sqrt(v) : v; }

  // For every pixel of sample b: the bump in the square, whether it is there (2), and whether in another square (1).
  void places(int64_t b, T* shape, uint8_t* place) const {
    for (int64_t i = 0; i < this->height; ++i) {
      const int64_t row = std::clamp<int64_t>(i - top[b], 0, side - 1);
      for (int64_t j = 0; j < this->width; ++j) {
        const int64_t column = std::clamp<int64_t>(j - left[b], 0, side - 1), p = i * this->width + j;
        const bool inside = this->rows[b * this->height + i] != 0 && this->columns[b * this->width + j] != 0;
        const bool other = other_rows[b * this->height + i] != 0 && other_columns[b * this->width + j] != 0;
        place[p] = static_cast<uint8_t>(2 * inside + other);
        shape[p] = bumps[(bump[b] * side + row) * side + column];
      }
    }
  }

  // delta of one channel; `spare` is what the budget leaves it.
  void move(const T* shape, const uint8_t* place, T sign, T spare, T* delta) const {
    double here = 0, budget = spare, size = 0;
    for (int64_t p = 0; p < pixels(); ++p) {
      const T value = power(delta[p]);
      here += place[p] >= 2 ? value : T(0);
      budget += place[p] ? value : T(0);
    }
    const T divisor = root(static_cast<T>(here)) + T(1e-12);
    for (int64_t p = 0; p < pixels(); ++p) {
      const T made = delta[p] / divisor + shape[p] * sign;
      delta[p] = place[p] >= 2 ? made : place[p] ? T(0) : delta[p];
      size += place[p] >= 2 ? power(made) : T(0);
    }
    // The original's L1 gives every channel the whole; the projection takes back what is too much.
    const T left_over = static_cast<T>(l2 ? std::sqrt(budget) : budget * static_cast<double>(channels));
    const T scale = left_over / (root(static_cast<T>(size)) + T(1e-12));
    for (int64_t p = 0; p < pixels(); ++p) delta[p] *= place[p] >= 2 ? scale : T(1);
  }

  void run(int64_t b, T* delta, T* shape, uint8_t* place) const {
    places(b, shape, place);
    double total = 0, norm = 0;
    for (int64_t i = 0; i < inner(); ++i) {
      delta[i] = x[b * inner() + i] - x0[b * inner() + i];
      total += power(delta[i]);
    }
    const T spare = std::max(T(0), (l2 ? eps * eps : eps) - static_cast<T>(total)) / static_cast<T>(channels);
    for (int64_t c = 0; c < channels; ++c) {
      move(shape, place, this->signs[b * channels + c], spare, delta + c * pixels());
    }
    for (int64_t i = 0; l2 && i < inner(); ++i) norm += delta[i] * delta[i];
    const T scale = l2 ? eps / (static_cast<T>(std::sqrt(norm)) + T(1e-12)) : T(1);
    for (int64_t i = 0; i < inner(); ++i) {
      const T value = x0[b * inner() + i] + delta[i] * scale;
      this->y[b * inner() + i] = l2 ? std::min(T(1), std::max(T(0), value)) : value;
    }
  }
};

// The two ops' common arguments, kept dense; body(images) runs for the dtype.
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
      std::vector<T> delta(static_cast<size_t>(images.inner())), shape(static_cast<size_t>(images.pixels()));
      std::vector<uint8_t> place(static_cast<size_t>(images.pixels()));
      for (int64_t b = begin; b < end; ++b) images.run(b, delta.data(), shape.data(), place.data());
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
