#include <torch/csrc/stable/library.h>

#include "common/images.h"

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

// The arguments common to both ops, as dense tensors.
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
  Squares<T> squares(const Tensor& y) const {
    return {input<T>(x), input<T>(x0), input<T>(signs), input<T>(rows),      input<T>(columns), x.size(0),
            x.size(1),   x.size(2),    x.size(3),       static_cast<T>(eps), output<T>(y)};
  }
};

Tensor square_linf(const Tensor& x, const Tensor& x0, const Tensor& signs, const Tensor& rows, const Tensor& columns,
                   double eps) {
  const Arguments arguments("square_linf", x, x0, signs, rows, columns, eps);
  const Tensor y = torch::stable::empty_like(arguments.x);
  with_float_type(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_on_device_of(x, "square_linf",
                     [&](void* stream) { return launch_square_linf(arguments.squares<T>(y), stream); });
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
    const Bumps<T> all{arguments.squares<T>(y), input<T>(down),    input<T>(across),
                       input<T>(table),         input<int64_t>(i), input<int64_t>(j),
                       input<int64_t>(which),   bumps.size(1),     l2};
    run_on_device_of(x, kFunction, [&](void* stream) { return launch_square_bump(all, stream); });
  });
  return y;
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("square_linf", TORCH_BOX(&atop::square_linf));
  m.impl("square_bump", TORCH_BOX(&atop::square_bump));
}
