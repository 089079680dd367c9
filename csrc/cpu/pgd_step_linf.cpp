#include "math/pgd_step_linf.h"

#include "common/launchers.h"
#include "common/parallel.h"

namespace atop {
namespace {

template <typename T>
ATOP_CLONES void step(const T* x, const T* grad, const T* x0, T* out, int64_t n, math::PgdStepLinf<T> formula) {
  // out may be x: each element is read before it is written, so the loop needs no overlap test.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = formula(x[i], grad[i], x0[i]);
}

}  // namespace

template <typename T>
const char* launch_pgd_step_linf(const T* x, const T* grad, const T* x0, T* out, int64_t n, T alpha, T eps, void*) {
  parallel_for(n, [=](int64_t begin, int64_t end) {
    step(x + begin, grad + begin, x0 + begin, out + begin, end - begin, math::PgdStepLinf<T>{alpha, eps});
  });
  return nullptr;
}

template const char* launch_pgd_step_linf(const float*, const float*, const float*, float*, int64_t, float, float,
                                          void*);
template const char* launch_pgd_step_linf(const double*, const double*, const double*, double*, int64_t, double, double,
                                          void*);

}  // namespace atop
