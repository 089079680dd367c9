#include "math/gated_elu.h"

#include "common/launchers.h"
#include "common/parallel.h"

namespace atop {
namespace {

template <typename T>
ATOP_CLONES void forward(const T* f, const T* g, T* __restrict__ y, int64_t n) {
  using C = typename Compute<T>::type;
  for (int64_t i = 0; i < n; ++i) store(math::GatedElu<C>()(load(f[i]), load(g[i])), &y[i]);
}

template <typename T>
ATOP_CLONES void backward(const T* dy, const T* f, const T* g, T* __restrict__ df, T* __restrict__ dg, int64_t n) {
  using C = typename Compute<T>::type;
  for (int64_t i = 0; i < n; ++i) {
    C vf, vg;
    math::GatedEluBwd<C>()(load(dy[i]), load(f[i]), load(g[i]), vf, vg);
    store(vf, &df[i]);
    store(vg, &dg[i]);
  }
}

}  // namespace

template <typename T>
const char* launch_gated_elu(const T* h, T* y, int64_t rows, int64_t inner, void*) {
  parallel_for_rows(rows, inner, [=](int64_t row, int64_t first, int64_t count) {
    const T* f = h + row * 2 * inner + first;
    forward(f, f + inner, y + row * inner + first, count);
  });
  return nullptr;
}

template <typename T>
const char* launch_gated_elu_bwd(const T* dy, const T* h, T* dh, int64_t rows, int64_t inner, void*) {
  parallel_for_rows(rows, inner, [=](int64_t row, int64_t first, int64_t count) {
    const int64_t offset = row * 2 * inner + first;
    const T* f = h + offset;
    T* df = dh + offset;
    backward(dy + row * inner + first, f, f + inner, df, df + inner, count);
  });
  return nullptr;
}

#define ATOP_INSTANTIATE(T)                                                     \
  template const char* launch_gated_elu(const T*, T*, int64_t, int64_t, void*); \
  template const char* launch_gated_elu_bwd(const T*, const T*, T*, int64_t, int64_t, void*);
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(double)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)

}  // namespace atop
