#include "common/launchers.h"
#include "math/attack_loss.h"
#include "vector.cuh"

namespace atop {
namespace {

constexpr int kWarp = 32;

template <typename V>
__device__ __forceinline__ V from_lane(V v, int distance) {
  return __shfl_xor_sync(0xFFFFFFFFu, v, distance);
}

// One sample per warp: its largest logit without NaN, and its first NaN; all lanes hold the same values.
template <typename T, int N>
struct Row {
  using C = typename Compute<T>::type;
  const T* z;  // [classes]
  int lane, classes;
  math::Greatest<C, N> top;
  int32_t first_nan = INT32_MAX;

  __device__ Row(const T* row, int classes) : z(row), lane(threadIdx.x % kWarp), classes(classes) {
    for (int j = lane; j < classes; j += kWarp) {
      const C v = load(z[j]);
      if (v != v) {
        first_nan = min(first_nan, j);
      } else {
        top.insert(v, j);
      }
    }
    for (int distance = kWarp / 2; distance; distance /= 2) {
      first_nan = min(first_nan, from_lane(first_nan, distance));
      math::Greatest<C, N> other;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        other.value[i] = from_lane(top.value[i], distance);
        other.index[i] = from_lane(top.index[i], distance);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) top.insert(other.value[i], other.index[i]);
    }
  }

  __device__ bool has_nan() const { return first_nan < classes; }
  // Like torch.argmax, for which NaN is the largest value.
  __device__ int32_t argmax() const { return has_nan() ? first_nan : top.index[0]; }
};

// One warp per sample.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    launch_cross_entropy_kernel(const T* __restrict__ logits,        // [batch, classes]
                                const int64_t* __restrict__ labels,  // [batch]
                                typename Compute<T>::type* __restrict__ losses,
                                typename Compute<T>::type* __restrict__ gradient, bool* __restrict__ correct,
                                int64_t batch, int classes) {
  using C = typename Compute<T>::type;
  const int64_t sample = thread_index() / kWarp;
  if (sample >= batch) return;
  const Row<T, 1> row(logits + sample * classes, classes);
  const int64_t y = labels[sample];
  const bool broken = !math::is_class(y, classes);
  const C z_y = broken ? C(NAN) : load(row.z[y]), greatest = row.has_nan() ? C(NAN) : row.top.value[0];
  C others = 0;
  for (int j = row.lane; j < classes; j += kWarp) {
    if (j != y) others += math::Exp<C>(load(row.z[j]) - greatest).exp();
  }
  for (int distance = kWarp / 2; distance; distance /= 2) others += from_lane(others, distance);
  const C e_y = math::Exp<C>(z_y - greatest).exp(), scale = math::cross_entropy_scale(e_y, others);
  for (int j = row.lane; j < classes; j += kWarp) {
    const C e = math::Exp<C>(load(row.z[j]) - greatest).exp();
    gradient[sample * classes + j] = scale * (j == y ? -others : e);
  }
  if (row.lane) return;
  losses[sample] = math::cross_entropy(greatest, z_y, e_y, others);
  correct[sample] = row.argmax() == y;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    launch_ranked_kernel(const T* __restrict__ logits,         // [batch, classes]
                         const int64_t* __restrict__ labels,   // [batch]
                         const int64_t* __restrict__ targets,  // [batch] or null
                         typename Compute<T>::type* __restrict__ losses,
                         typename Compute<T>::type* __restrict__ gradient, bool* __restrict__ correct, int64_t batch,
                         int classes) {
  using C = typename Compute<T>::type;
  const int64_t sample = thread_index() / kWarp;
  if (sample >= batch) return;
  const Row<T, N> row(logits + sample * classes, classes);
  const int64_t y = labels[sample], target = targets ? targets[sample] : -1;
  const bool broken = !math::is_class(y, classes) || (targets && !math::is_class(target, classes));
  const C nan = NAN, z_y = broken || row.has_nan() ? nan : load(row.z[y]);
  const C z_target = broken || target < 0 ? nan : load(row.z[target]);
  const math::Ranked<C, N> loss(row.top, int32_t(y), z_y, int32_t(target), z_target);
  const C start = math::is_finite(loss.loss) ? C(0) : nan;
  for (int j = row.lane; j < classes; j += kWarp) {
    C g = start;
#pragma unroll
    for (int i = 0; i < loss.kMoves; ++i) g += loss.index[i] == j ? loss.move[i] : C(0);
    gradient[sample * classes + j] = g;
  }
  if (row.lane) return;
  losses[sample] = loss.loss;
  correct[sample] = !broken && row.argmax() == y;
}

// Three blocks per multiprocessor: without the hint, ptxas spills around the calls to division.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    launch_odds_kernel(const T* __restrict__ logits,         // [batch, classes]
                       const int64_t* __restrict__ labels,   // [batch]
                       const int64_t* __restrict__ targets,  // [batch] or null
                       typename Compute<T>::type* __restrict__ losses, typename Compute<T>::type* __restrict__ gradient,
                       bool* __restrict__ correct, int64_t batch, int classes, int kind) {
  using C = typename Compute<T>::type;
  const int64_t sample = thread_index() / kWarp;
  if (sample >= batch) return;
  const Row<T, 3> row(logits + sample * classes, classes);
  const int64_t y = labels[sample];
  int64_t other = row.top.index[0] == y ? row.top.index[1] : row.top.index[0];
  if (targets) other = targets[sample];
  const bool broken = !math::is_class(y, classes) || (targets && !math::is_class(other, classes));
  const bool usable = !broken && !row.has_nan() && math::is_class(other, classes);
  const C z_y = usable ? load(row.z[y]) : C(NAN), z_other = usable ? load(row.z[other]) : C(NAN);
  math::Odds<C> odds(kind, z_y, z_other, math::third_of(row.top, int32_t(y), int32_t(other)), y == other);
  C rest = 0;
  for (int j = row.lane; j < classes; j += kWarp) {
    if (j != y && j != other) rest += math::Exp<C>(load(row.z[j]) - odds.unit).exp();
  }
  for (int distance = kWarp / 2; distance; distance /= 2) rest += from_lane(rest, distance);
  odds.finish(rest);
  const bool lost = !math::is_finite(odds.loss);
  for (int j = row.lane; j < classes; j += kWarp) {
    const C e = j == y || j == other ? C(0) : math::Exp<C>(load(row.z[j]) - odds.unit).exp();
    const C g = (e * odds.at_rest + (j == y ? odds.at_y : C(0))) + (j == other ? odds.at_other : C(0));
    gradient[sample * classes + j] = lost ? C(NAN) : g;
  }
  if (row.lane) return;
  losses[sample] = odds.loss;
  correct[sample] = !broken && row.argmax() == y;
}

}  // namespace

template <typename T>
const char* launch_attack_loss(const T* logits, const int64_t* labels, const int64_t* targets, int kind,
                               typename Compute<T>::type* losses, typename Compute<T>::type* gradient, bool* correct,
                               int64_t batch, int64_t classes, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const unsigned blocks = blocks_for(batch * kWarp);
  const int k = int(classes);
  if (kind == math::kCrossEntropy) {
    launch_cross_entropy_kernel<T>
        <<<blocks, kThreads, 0, cuda_stream>>>(logits, labels, losses, gradient, correct, batch, k);
  } else if (kind == math::kMargin) {
    launch_ranked_kernel<T, 2>
        <<<blocks, kThreads, 0, cuda_stream>>>(logits, labels, targets, losses, gradient, correct, batch, k);
  } else if (kind >= math::kPm) {
    launch_odds_kernel<T>
        <<<blocks, kThreads, 0, cuda_stream>>>(logits, labels, targets, losses, gradient, correct, batch, k, kind);
  } else if (targets) {
    launch_ranked_kernel<T, 4>
        <<<blocks, kThreads, 0, cuda_stream>>>(logits, labels, targets, losses, gradient, correct, batch, k);
  } else {
    launch_ranked_kernel<T, 3>
        <<<blocks, kThreads, 0, cuda_stream>>>(logits, labels, targets, losses, gradient, correct, batch, k);
  }
  return launch_error();
}

#define ATOP_INSTANTIATE(T)                                                                                 \
  template const char* launch_attack_loss(const T*, const int64_t*, const int64_t*, int, Compute<T>::type*, \
                                          Compute<T>::type*, bool*, int64_t, int64_t, void*);
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(double)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)

}  // namespace atop
