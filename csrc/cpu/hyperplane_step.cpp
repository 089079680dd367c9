#include <algorithm>
#include <cmath>
#include <limits>

#include "common/launchers.h"
#include "common/parallel.h"
#include "cpu/scratch.h"

namespace atop {
namespace {

// The number of lanes of a sum: vectorizable, in an order that does not depend on the machine.
constexpr int64_t kLanes = 16;

// sum_i weight_i min(l, cap_i), and its slope to the right of l; n is a multiple of kLanes.
template <typename T>
ATOP_CLONES void evaluate(const T* weight, const T* cap, int64_t n, T l, double* result) {
  double values[kLanes] = {}, slopes[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const T c = cap[i + j], w = weight[i + j];
      values[j] += static_cast<double>(w * (c < l ? c : l));
      slopes[j] += static_cast<double>(c > l ? w : T(0));
    }
  }
  result[0] = result[1] = 0;
  for (int64_t j = 0; j < kLanes; ++j) {
    result[0] += values[j];
    result[1] += slopes[j];
  }
}

// The l at which that sum is `total`, by Newton's method: the function is concave, so the iteration approaches the
// solution from below and never overshoots. The largest cap if `total` is out of reach.
template <typename T>
T level(const T* weight, const T* cap, int64_t n, double total) {
  T l = 0;
  for (;;) {
    double result[2];
    evaluate(weight, cap, n, l, result);
    if (result[1] <= 0) return result[0] < total ? std::numeric_limits<T>::max() : l;
    const T next = static_cast<T>(l + (total - result[0]) / result[1]);
    if (!(next > l)) return l;
    l = next;
  }
}

// The weights and the caps of the elements of a row.
template <typename T>
ATOP_CLONES void weigh(const T* x, const T* w, int64_t n, T scale, bool falls, bool l2, T* __restrict__ weight,
                       T* __restrict__ cap) {
  for (int64_t i = 0; i < n; ++i) {
    const bool up = (w[i] > 0) != falls;
    const T size = std::abs(w[i]) / scale, room = w[i] == 0 ? T(0) : up ? 1 - x[i] : x[i];
    // Elements that contribute nothing would have huge caps.
    const bool counts = size >= T(1e-8);
    weight[i] = !l2 ? size : counts ? size * size : T(0);
    cap[i] = !l2 ? room : counts ? room / size : T(0);
  }
}

template <typename T>
ATOP_CLONES void walk(const T* x, const T* w, int64_t n, T scale, bool falls, bool l2, T l, T* __restrict__ step) {
  for (int64_t i = 0; i < n; ++i) {
    const bool up = (w[i] > 0) != falls;
    const T size = std::abs(w[i]) / scale, room = w[i] == 0 ? T(0) : up ? 1 - x[i] : x[i];
    const T far = !l2 ? l : size >= T(1e-8) ? l * size : T(0);
    const T length = far < room ? far : room;
    step[i] = w[i] == 0 ? T(0) : up ? length : -length;
  }
}

template <typename T>
void step_row(const T* x, const T* w, T change, bool l2, int64_t n, T* weight, T* cap, T* step) {
  T scale = std::numeric_limits<T>::min();
  for (int64_t i = 0; i < n; ++i) scale = std::max(scale, std::abs(w[i]));
  weigh(x, w, n, scale, change < 0, l2, weight, cap);
  const T l = level(weight, cap, round_up(n, kLanes), static_cast<double>(std::abs(change) / scale));
  walk(x, w, n, scale, change < 0, l2, l, step);
}

}  // namespace

template <typename T>
const char* launch_hyperplane_step(const T* x, const T* w, const T* change, bool l2, int64_t batch, int64_t n, T* steps,
                                   void*) {
  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, kGrain / n / 8), [&](int64_t begin, int64_t end) {
    const int64_t whole = round_up(n, kLanes);
    const Scratch<T> weight(whole), cap(whole);
    std::fill_n(weight.get(), whole, T(0));
    std::fill_n(cap.get(), whole, T(0));
    for (int64_t i = begin; i < end; ++i) {
      step_row(x + i * n, w + i * n, change[i], l2, n, weight.get(), cap.get(), steps + i * n);
    }
  });
  return nullptr;
}

template const char* launch_hyperplane_step(const float*, const float*, const float*, bool, int64_t, int64_t, float*,
                                            void*);
template const char* launch_hyperplane_step(const double*, const double*, const double*, bool, int64_t, int64_t,
                                            double*, void*);

}  // namespace atop
