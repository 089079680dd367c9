#include <torch/csrc/stable/library.h>

#include "common/images.h"

namespace atop {
namespace {

// One axis of the map; `start` and `weight` are dense.
struct Axis {
  const char *start_name, *weight_name;
  Tensor start, weight;

  void check(const Tensor& x, int64_t pixels) const {
    const char* const function = "resample";
    const ScalarType wanted = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    ATOP_CHECK(start.scalar_type() == ScalarType::Long, function, start_name, "an int64 tensor",
               dtype_text(start.scalar_type()));
    ATOP_CHECK(weight.scalar_type() == wanted, function, weight_name, text("a ", dtype_text(wanted), " tensor"),
               dtype_text(weight.scalar_type()));
    ATOP_CHECK(start.dim() == 2 && (start.size(0) == 1 || start.size(0) == x.size(0)), function, start_name,
               text("of shape (1 or ", x.size(0), ", n)"), shape_text(start));
    ATOP_CHECK(weight.dim() == 3 && weight.size(0) == start.size(0) && weight.size(1) == start.size(1) &&
                   weight.size(2) >= 1 && weight.size(2) <= pixels,
               function, weight_name, text("of shape ", shape_text(start), " and 1 to ", pixels, " taps"),
               shape_text(weight));
    for (const Tensor* t : {&start, &weight}) {
      ATOP_CHECK(t->is_cpu() == x.is_cpu() && t->get_device_index() == x.get_device_index(), function,
                 t == &start ? start_name : weight_name, text("on the device of x ", device_text(x)), device_text(*t));
    }
  }

  template <typename C>
  Taps<C> taps() const {
    return {input<int64_t>(start), input<C>(weight), start.size(0) == 1 ? 0 : start.size(1), start.size(1),
            weight.size(2)};
  }
};

Tensor resample(const Tensor& x, const Tensor& row_start, const Tensor& row_weight, const Tensor& column_start,
                const Tensor& column_weight, const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  check_float_images("resample", "x", x);
  const Axis rows{"row_start", "row_weight", dense(row_start), dense(row_weight)};
  const Axis columns{"column_start", "column_weight", dense(column_start), dense(column_weight)};
  rows.check(x, x.size(2));
  columns.check(x, x.size(3));
  const bool last = is_channels_last(x);
  Tensor y = empty_images(x, x.size(0), x.size(1), rows.start.size(1), columns.start.size(1), x.scalar_type(), last);
  if (y.numel() == 0) return y;
  const Tensor dense_x = dense_images(x, last);
  with_float_or_half_type(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = typename Compute<T>::type;
    run_on_device_of(x, "resample", [&](void* stream) {
      return launch_resample(input<T>(dense_x), rows.taps<C>(), columns.taps<C>(), output<T>(y), x.size(0), x.size(1),
                             x.size(2), x.size(3), last, stream);
    });
  });
  return y;
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("resample", TORCH_BOX(&atop::resample));
}
