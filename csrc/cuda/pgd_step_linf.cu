#include "common/launchers.h"
#include "math/pgd_step_linf.h"
#include "vector.cuh"

namespace atop {
namespace {

// One pack of V elements a thread; the last thread may have a shorter one.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) launch_pgd_step_linf_kernel(const T* x,                  // [n]
                                                                        const T* __restrict__ grad,  // [n]
                                                                        const T* __restrict__ x0,    // [n]
                                                                        T* out,                      // [n], may be x
                                                                        int64_t n, math::PgdStepLinf<T> formula) {
  const int64_t first = thread_index() * V;
  if (first + V <= n) {
    const auto px = load_pack<T, V>(x + first), pg = load_pack<T, V>(grad + first), p0 = load_pack<T, V>(x0 + first);
    Pack<T, V> result;
#pragma unroll
    for (int i = 0; i < V; ++i) result.v[i] = formula(px.v[i], pg.v[i], p0.v[i]);
    store_pack(out + first, result);
  } else {
    for (int64_t i = first; i < n; ++i) out[i] = formula(x[i], grad[i], x0[i]);
  }
}

template <typename T, int V>
void launch(const T* x, const T* grad, const T* x0, T* out, int64_t n, T alpha, T eps, cudaStream_t stream) {
  launch_pgd_step_linf_kernel<T, V>
      <<<blocks_for((n + V - 1) / V), kThreads, 0, stream>>>(x, grad, x0, out, n, math::PgdStepLinf<T>{alpha, eps});
}

}  // namespace

template <typename T>
const char* launch_pgd_step_linf(const T* x, const T* grad, const T* x0, T* out, int64_t n, T alpha, T eps,
                                 void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (aligned16(x, grad, x0, out)) {
    launch<T, kWidth<T>>(x, grad, x0, out, n, alpha, eps, cuda_stream);
  } else {
    launch<T, 1>(x, grad, x0, out, n, alpha, eps, cuda_stream);
  }
  return launch_error();
}

template const char* launch_pgd_step_linf(const float*, const float*, const float*, float*, int64_t, float, float,
                                          void*);
template const char* launch_pgd_step_linf(const double*, const double*, const double*, double*, int64_t, double, double,
                                          void*);

}  // namespace atop
