#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/images.h"
#include "common/keys.h"
#include "math/attack_loss.h"

namespace atop {
namespace {

constexpr const char* kFunction = "attack_loss";

void check_classes_of(const char* argument, const Tensor& t, const Tensor& logits) {
  ATOP_CHECK(t.scalar_type() == ScalarType::Long, kFunction, argument, "an int64 tensor", dtype_text(t.scalar_type()));
  ATOP_CHECK(t.dim() == 1 && t.size(0) == logits.size(0), kFunction, argument, text("of shape (", logits.size(0), ",)"),
             shape_text(t));
  check_on_device_of(kFunction, argument, t, "logits", logits);
}

void check_arguments(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& targets, int64_t kind) {
  ATOP_CHECK(is_float(logits.scalar_type()), kFunction, "logits", "a float32, float64, bfloat16 or float16 tensor",
             dtype_text(logits.scalar_type()));
  ATOP_CHECK(kind >= math::kCrossEntropy && kind <= math::kPmOther, kFunction, "kind", "in [0, 6)", text(kind));
  const bool has_other = kind != math::kCrossEntropy && kind != math::kPmLabel;
  ATOP_CHECK(!(targets && !has_other), kFunction, "targets", "None for a loss of the label alone", "a tensor");
  const int64_t least = kind == math::kDlr ? (targets ? 4 : 3) : (kind == math::kCrossEntropy ? 1 : 2);
  ATOP_CHECK(logits.dim() == 2 && logits.size(1) >= least && logits.size(1) <= INT32_MAX, kFunction, "logits",
             text("of shape (B, K) with ", least, " <= K < 2**31"), shape_text(logits));
  check_classes_of("labels", labels, logits);
  if (targets) check_classes_of("targets", *targets, logits);
}

std::tuple<Tensor, Tensor, Tensor> attack_loss(const Tensor& logits, const Tensor& labels,
                                               std::optional<Tensor> targets, int64_t kind) {
  check_arguments(logits, labels, targets, kind);
  const int64_t batch = logits.size(0), classes = logits.size(1), shape[2] = {batch, classes};
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  const ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  const Tensor losses = empty_contiguous({shape, 1}, wide, logits),
               gradient = empty_contiguous({shape, 2}, wide, logits),
               correct = empty_contiguous({shape, 1}, ScalarType::Bool, logits);
  if (batch == 0) return {losses, gradient, correct};
  const Tensor z = dense(logits), y = dense(labels), t = targets ? dense(*targets) : y;
  with_float_or_half_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = typename Compute<T>::type;
    run_on_device_of(logits, kFunction, [&](void* stream) {
      return launch_attack_loss(input<T>(z), input<int64_t>(y), targets ? input<int64_t>(t) : nullptr,
                                static_cast<int>(kind), output<C>(losses), output<C>(gradient), output<bool>(correct),
                                batch, classes, stream);
    });
  });
  return {losses, gradient, correct};
}

}  // namespace
}  // namespace atop

STABLE_TORCH_LIBRARY_IMPL(atop_fast, ATOP_KEY, m) {
  m.impl("attack_loss", TORCH_BOX(&atop::attack_loss));
}
