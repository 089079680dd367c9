#include "cpu/gates.h"

#include "cpu/levels.h"

namespace atop::gates {

#define ATOP_DECLARE(level)                                                                                            \
  namespace level {                                                                                                    \
  template <typename T>                                                                                                \
  void forward(math::Activation a, const Inputs<T>& in, T* y);                                                         \
  template <typename T>                                                                                                \
  void backward(math::Activation a, const T* dy, const Inputs<T>& in, T* df, T* dg, typename Compute<T>::type* sums_f, \
                typename Compute<T>::type* sums_g);                                                                    \
  }
ATOP_DECLARE(v1)
ATOP_DECLARE(v3)
ATOP_DECLARE(v4)

template <typename T>
void forward(math::Activation a, const Inputs<T>& in, T* y) {
  ATOP_CALL(forward(a, in, y));
}

template <typename T>
void backward(math::Activation a, const T* dy, const Inputs<T>& in, T* df, T* dg, typename Compute<T>::type* sums_f,
              typename Compute<T>::type* sums_g) {
  ATOP_CALL(backward(a, dy, in, df, dg, sums_f, sums_g));
}

#define ATOP_INSTANTIATE(T)                                                                                \
  template void forward(math::Activation, const Inputs<T>&, T*);                                           \
  template void backward(math::Activation, const T*, const Inputs<T>&, T*, T*, typename Compute<T>::type*, \
                         typename Compute<T>::type*);
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(double)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)

}  // namespace atop::gates
