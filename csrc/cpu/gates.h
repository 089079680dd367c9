#pragma once
// The gate over numbers that lie side by side: csrc/cpu/gates.inc, compiled for three x86-64 levels and chosen by the
// machine it runs on. All return the same bits.

#include <cstdint>

#include "common/half.h"
#include "math/gated.h"

namespace atop::gates {

// A multiple of the numbers that vectors take at once on every machine.
constexpr int64_t kLanes = 48;

// Rows of f, and of g, `step` apart, and the biases bias_f[i * bias_step] of number i of each row. The biases can be
// read up to the next multiple of kLanes, of which a bias_step of 0 repeats the first.
template <typename T>
struct Inputs {
  using C = typename Compute<T>::type;
  const T *f, *g;
  int64_t rows, width, step;
  const C *bias_f, *bias_g;
  int64_t bias_step;
};

// The rows of y leave no gaps.
template <typename T>
void forward(math::Activation a, const Inputs<T>& in, T* y);

// Rows as of f and g, for df and dg `step` apart. Adds the gradients, before they are rounded, to sums_f and sums_g, of
// rows without gaps, unless they are null.
template <typename T>
void backward(math::Activation a, const T* dy, const Inputs<T>& in, T* df, T* dg, typename Compute<T>::type* sums_f,
              typename Compute<T>::type* sums_g);

}  // namespace atop::gates
