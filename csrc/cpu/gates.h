#pragma once
// The gate over contiguous numbers: csrc/cpu/gates.inc, compiled for three x86-64 levels, one of which is selected for
// the machine. All return the same bits.

#include <cstdint>

#include "common/half.h"
#include "math/gated.h"

namespace atop::gates {

// A multiple of the vector length of every machine.
constexpr int64_t kLanes = 48;

// Rows of f and of g, `step` apart, and biases: bias_f[i * bias_step] belongs to number i of each row. Biases must be
// readable up to the next multiple of kLanes; a bias_step of 0 repeats the first.
template <typename T>
struct Inputs {
  using C = typename Compute<T>::type;
  const T *f, *g;
  int64_t rows, width, step;
  const C *bias_f, *bias_g;
  int64_t bias_step;
};

// The rows of y are contiguous.
template <typename T>
void forward(math::Activation a, const Inputs<T>& in, T* y);

// Rows like f and g; those of df and dg are `step` apart. Adds the gradients, before rounding, to the contiguous rows
// sums_f and sums_g, unless these are null.
template <typename T>
void backward(math::Activation a, const T* dy, const Inputs<T>& in, T* df, T* dg, typename Compute<T>::type* sums_f,
              typename Compute<T>::type* sums_g);

}  // namespace atop::gates
