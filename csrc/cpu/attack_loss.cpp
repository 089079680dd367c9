#include "math/attack_loss.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/launchers.h"
#include "common/parallel.h"

namespace atop {
namespace {

// The number of lanes of a loop: fixed, so that there are no remainder loops and sums have a fixed order.
constexpr int64_t kLanes = 16;

// Whether torch.argmax of the logits is y: NaN counts as the largest value, and the first of a tie wins.
template <typename T>
ATOP_HD bool is_argmax(const T* z, int64_t classes, int64_t y) {
  int beaten = 0;
  const auto z_y = load(z[y]);
  if (z_y != z_y) {
    for (int64_t j = 0; j < y; ++j) beaten |= load(z[j]) != load(z[j]);
  } else {
    for (int64_t j = 0; j < y; ++j) beaten |= !(load(z[j]) < z_y);
    for (int64_t j = y + 1; j < classes; ++j) beaten |= !(load(z[j]) <= z_y);
  }
  return !beaten;
}

template <typename T>
ATOP_HD bool has_nan(const T* z, int64_t classes) {
  for (int64_t j = 0; j < classes; ++j) {
    if (load(z[j]) != load(z[j])) return true;
  }
  return false;
}

template <typename T, typename C>
ATOP_HD void widen(const T* x, C* __restrict__ out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = load(x[j]);
}

template <typename C>
ATOP_HD void fill(C* out, int64_t n, C value) {
  for (int64_t j = 0; j < n; ++j) out[j] = value;
}

template <typename C>
ATOP_HD void copy(const C* from, C* to) {
  for (int64_t l = 0; l < kLanes; ++l) to[l] = from[l];
}

template <typename C>
ATOP_HD C sum(C* lanes) {
  for (int64_t half = kLanes / 2; half; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// Floats are ordered like their bits, flipped if negative; the compiler vectorizes maxima of integers.
ATOP_HD int32_t ordered(int32_t bits) {
  return bits ^ ((bits >> 31) & INT32_MAX);
}

ATOP_HD int64_t ordered(int64_t bits) {
  return bits ^ ((bits >> 63) & INT64_MAX);
}

template <typename C>
using Order = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;

// The largest logit, where NaN counts as the largest value.
template <typename T, typename C = typename Compute<T>::type>
ATOP_HD C greatest_of(const T* z, int64_t n) {
  using I = Order<C>;
  I lanes[kLanes];
  fill(lanes, kLanes, std::numeric_limits<I>::min());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      lanes[l] = std::max(lanes[l], ordered(static_cast<I>(math::to_bits(C(load(z[i + l]))))));
    }
  }
  for (; i < n; ++i) lanes[0] = std::max(lanes[0], ordered(static_cast<I>(math::to_bits(C(load(z[i]))))));
  for (int64_t l = 1; l < kLanes; ++l) lanes[0] = std::max(lanes[0], lanes[l]);
  return math::from_bits<C>(static_cast<math::Bits<C>>(ordered(lanes[0])));
}

// e = exp(z - greatest) over whole lanes, accumulated into `total`.
template <typename T, typename C>
ATOP_HD void exponentials(const T* __restrict__ z, int64_t n, C greatest, C* __restrict__ e, C* __restrict__ total) {
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const C v = math::Exp<C>(load(z[i + l]) - greatest).exp();
      e[i + l] = v;
      total[l] += v;
    }
  }
}

// Pointers to the first row of a part of the batch.
template <typename T>
struct Rows {
  using C = typename Compute<T>::type;
  const T* logits;
  const int64_t* labels;
  const int64_t* targets;
  C* losses;
  C* gradient;
  bool* correct;
  int64_t count, classes;

  ATOP_HD void mark_broken(int64_t row) const {
    losses[row] = NAN;
    fill(gradient + row * classes, classes, C(NAN));
    correct[row] = false;
  }
};

// One sample at a time, with classes in the lanes.
template <typename T, typename C>
ATOP_CLONES void cross_entropy_by_class(Rows<T> rows) {
  const int64_t whole = rows.classes / kLanes * kLanes, rest = rows.classes - whole;
  for (int64_t row = 0; row < rows.count; ++row) {
    const T* z = rows.logits + row * rows.classes;
    C* const g = rows.gradient + row * rows.classes;
    const int64_t y = rows.labels[row], mine = std::min(y / kLanes * kLanes, whole);
    if (!math::is_class(y, rows.classes)) {
      rows.mark_broken(row);
      continue;
    }
    const C greatest = greatest_of(z, rows.classes), z_y = load(z[y]);
    C total[kLanes], tail[kLanes], own[kLanes];
    fill(total, kLanes, C(0));
    // The lane of the label and the lanes beyond the last class count as 0.
    fill(tail, kLanes, C(-INFINITY));
    widen(z + whole, tail, rest);
    widen(mine < whole ? z + mine : z, own, kLanes);
    (mine < whole ? own : tail)[y - mine] = -INFINITY;
    exponentials(z, mine, greatest, g, total);
    if (mine < whole) {
      exponentials(own, kLanes, greatest, g + mine, total);
      exponentials(z + mine + kLanes, whole - mine - kLanes, greatest, g + mine + kLanes, total);
    }
    C e[kLanes];
    exponentials(tail, kLanes, greatest, e, total);
    for (int64_t j = 0; j < rest; ++j) g[whole + j] = e[j];
    const C e_y = math::Exp<C>(z_y - greatest).exp(), others = sum(total);
    const C scale = math::cross_entropy_scale(e_y, others);
    for (int64_t j = 0; j < rows.classes; ++j) g[j] *= scale;
    g[y] = -others * scale;
    rows.losses[row] = math::cross_entropy(greatest, z_y, e_y, others);
    rows.correct[row] = !(z_y < greatest) && is_argmax(z, rows.classes, y);
  }
}

// Samples in the lanes, with classes in pieces.
template <typename T, typename C>
struct Tile {
  static constexpr int64_t kPiece = 64;
  alignas(64) C z[kPiece][kLanes] = {};

  // The logits of classes [first, first + n).
  ATOP_HD void read(const T* logits, int64_t samples, int64_t classes, int64_t first, int64_t n) {
    for (int64_t l = 0; l < samples; ++l) {
      for (int64_t k = 0; k < n; ++k) z[k][l] = load(logits[l * classes + first + k]);
    }
  }
};

// Labels or targets of a tile, with 0 for a class that does not exist.
struct Classes {
  int32_t index[kLanes];
  bool broken[kLanes];

  ATOP_HD Classes(const int64_t* given, int64_t samples, int64_t classes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t c = given && l < samples ? given[l] : 0;
      broken[l] = !math::is_class(c, classes);
      index[l] = broken[l] ? 0 : static_cast<int32_t>(c);
    }
  }
};

template <typename T, typename C>
ATOP_CLONES void cross_entropy_by_sample(Rows<T> rows) {
  Tile<T, C> tile;
  for (int64_t first = 0; first < rows.count; first += kLanes) {
    const int64_t samples = std::min(kLanes, rows.count - first), classes = rows.classes;
    const T* logits = rows.logits + first * classes;
    tile.read(logits, samples, classes, 0, classes);
    const Classes y(rows.labels + first, samples, classes);
    C greatest[kLanes], z_y[kLanes], others[kLanes], scale[kLanes], loss[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) z_y[l] = tile.z[y.index[l]][l];
    copy(tile.z[0], greatest);
    for (int64_t k = 1; k < classes; ++k) {
      for (int64_t l = 0; l < kLanes; ++l) greatest[l] = tile.z[k][l] > greatest[l] ? tile.z[k][l] : greatest[l];
    }
    fill(others, kLanes, C(0));
    for (int64_t k = 0; k < classes; ++k) {
      for (int64_t l = 0; l < kLanes; ++l) {
        const C e = math::Exp<C>(tile.z[k][l] - greatest[l]).exp();
        tile.z[k][l] = e;
        others[l] += y.index[l] == static_cast<int32_t>(k) ? C(0) : e;
      }
    }
    for (int64_t l = 0; l < kLanes; ++l) {
      const C e_y = math::Exp<C>(z_y[l] - greatest[l]).exp();
      scale[l] = math::cross_entropy_scale(e_y, others[l]);
      loss[l] = math::cross_entropy(greatest[l], z_y[l], e_y, others[l]);
    }
    for (int64_t l = 0; l < samples; ++l) {
      C* const g = rows.gradient + (first + l) * classes;
      for (int64_t k = 0; k < classes; ++k) g[k] = tile.z[k][l] * scale[l];
      g[y.index[l]] = -others[l] * scale[l];
      rows.losses[first + l] = loss[l];
      rows.correct[first + l] = !(z_y[l] < greatest[l]) && is_argmax(logits + l * classes, classes, y.index[l]);
      if (y.broken[l]) rows.mark_broken(first + l);
    }
  }
}

// The largest logits of the samples in the lanes.
template <typename C, int N>
struct Lanes {
  C value[N][kLanes];
  int32_t index[N][kLanes];
  C odd[kLanes];  // NaN if a logit is NaN or infinite, else 0

  // Slots that are never filled, for example if all other logits are -inf, still need a valid class.
  ATOP_HD Lanes() {
    for (int i = 0; i < N; ++i) {
      for (int64_t l = 0; l < kLanes; ++l) value[i][l] = -INFINITY, index[i][l] = i;
    }
    fill(odd, kLanes, C(0));
  }

  // Insert class k of all samples; all lower classes have been inserted, and smaller logits move down.
  ATOP_HD void insert(const C* z, int32_t k) {
    for (int64_t l = 0; l < kLanes; ++l) odd[l] += z[l] - z[l];
#pragma GCC unroll 4
    for (int i = N - 1; i >= 0; --i) {
      for (int64_t l = 0; l < kLanes; ++l) {
        const bool here = z[l] > value[i][l], above = i > 0 && z[l] > value[std::max(0, i - 1)][l];
        const C moved = above ? value[std::max(0, i - 1)][l] : z[l];
        const int32_t moved_index = above ? index[std::max(0, i - 1)][l] : k;
        value[i][l] = here ? moved : value[i][l];
        index[i][l] = here ? moved_index : index[i][l];
      }
    }
  }
};

// The N largest logits of each sample of a tile, which afterwards holds the last piece of the classes.
template <typename T, typename C, int N>
ATOP_HD void rank(Tile<T, C>& tile, Lanes<C, N>& top, const T* logits, int64_t samples, int64_t classes) {
  for (int64_t k = 0; k < classes; k += tile.kPiece) {
    const int64_t n = std::min(tile.kPiece, classes - k);
    tile.read(logits, samples, classes, k, n);
    for (int64_t i = 0; i < n; ++i) top.insert(tile.z[i], static_cast<int32_t>(k + i));
  }
}

template <typename C, int N>
ATOP_HD math::Greatest<C, N> greatest_of_lane(const Lanes<C, N>& top, int64_t l) {
  math::Greatest<C, N> greatest;
  for (int i = 0; i < N; ++i) greatest.value[i] = top.value[i][l], greatest.index[i] = top.index[i][l];
  return greatest;
}

// The outputs for the loss of sample l, except for the effect of NaN among its logits.
template <typename T, typename C, int N>
ATOP_HD void judge(const Rows<T>& rows, const Lanes<C, N>& top, int64_t row, int64_t l, int64_t y, C loss) {
  const T* z = rows.logits + row * rows.classes;
  rows.losses[row] = loss;
  rows.correct[row] = top.index[0][l] == y;
  if (top.odd[l] != C(0) && has_nan(z, rows.classes)) {
    rows.losses[row] = NAN;
    rows.correct[row] = is_argmax(z, rows.classes, y);
  }
}

template <typename T, typename C, int N>
ATOP_CLONES void ranked(Rows<T> rows) {
  using Loss = math::Ranked<C, N>;
  constexpr int kMoves = Loss::kMoves;
  Tile<T, C> tile;
  const int64_t classes = rows.classes;
  for (int64_t first = 0; first < rows.count; first += kLanes) {
    const int64_t samples = std::min(kLanes, rows.count - first);
    const T* logits = rows.logits + first * classes;
    Lanes<C, N> top;
    rank(tile, top, logits, samples, classes);
    const Classes y(rows.labels + first, samples, classes);
    const Classes target(rows.targets ? rows.targets + first : nullptr, samples, classes);
    C z_y[kLanes] = {}, z_target[kLanes] = {}, loss[kLanes], move[kMoves][kLanes];
    int32_t index[kMoves][kLanes];
    for (int64_t l = 0; l < samples; ++l) z_y[l] = load(logits[l * classes + y.index[l]]);
    for (int64_t l = 0; l < samples; ++l) z_target[l] = load(logits[l * classes + target.index[l]]);
    const int32_t none = rows.targets ? 0 : -1;
    for (int64_t l = 0; l < kLanes; ++l) {
      const Loss result(greatest_of_lane(top, l), y.index[l], z_y[l], target.index[l] | none, z_target[l]);
      loss[l] = result.loss;
      for (int i = 0; i < kMoves; ++i) move[i][l] = result.move[i], index[i][l] = result.index[i];
    }
    C* const gradient = rows.gradient + first * classes;
    fill(gradient, samples * classes, C(0));
    for (int64_t l = 0; l < samples; ++l) {
      C* const g = gradient + l * classes;
      judge(rows, top, first + l, l, y.index[l], loss[l]);
      if (math::is_finite(rows.losses[first + l])) {
        for (int i = 0; i < kMoves; ++i) g[index[i][l]] += move[i][l];
      } else {
        fill(g, classes, C(NAN));
      }
      if (y.broken[l] || target.broken[l]) rows.mark_broken(first + l);
    }
  }
}

// pm and its parts: first the ranks, then the exponentials, stored in the gradient until their sum is known.
template <typename T, typename C>
ATOP_CLONES void odds(Rows<T> rows, int kind) {
  Tile<T, C> tile;
  const int64_t classes = rows.classes;
  for (int64_t first = 0; first < rows.count; first += kLanes) {
    const int64_t samples = std::min(kLanes, rows.count - first);
    const T* logits = rows.logits + first * classes;
    Lanes<C, 3> top;
    rank(tile, top, logits, samples, classes);
    const Classes y(rows.labels + first, samples, classes);
    const Classes target(rows.targets ? rows.targets + first : nullptr, samples, classes);
    C z_y[kLanes] = {}, z_other[kLanes] = {}, z_third[kLanes] = {}, unit[kLanes] = {}, rest[kLanes];
    int32_t other[kLanes] = {};
    for (int64_t l = 0; l < samples; ++l) {
      const auto greatest = greatest_of_lane(top, l);
      // If only one logit is above -inf, other slots may name its class again.
      int32_t rival = greatest.index[2];
      for (int i = 1; i >= 0; --i) rival = greatest.index[i] == y.index[l] ? rival : greatest.index[i];
      other[l] = rows.targets ? target.index[l] : rival;
      z_y[l] = load(logits[l * classes + y.index[l]]);
      z_other[l] = load(logits[l * classes + other[l]]);
      z_third[l] = math::third_of(greatest, y.index[l], other[l]);
      unit[l] = math::Odds<C>(kind, z_y[l], z_other[l], z_third[l], y.index[l] == other[l]).unit;
    }
    C* const gradient = rows.gradient + first * classes;
    fill(rest, kLanes, C(0));
    for (int64_t k = 0; k < classes; k += tile.kPiece) {
      const int64_t n = std::min(tile.kPiece, classes - k);
      if (classes > tile.kPiece) tile.read(logits, samples, classes, k, n);
      // Pairwise summation of short sums, because a single long sum would lose digits.
      constexpr int64_t kSums = 8;
      C part[kSums][kLanes] = {};
      for (int64_t i = 0; i < n; ++i) {
        const auto c = static_cast<int32_t>(k + i);
        for (int64_t l = 0; l < kLanes; ++l) {
          const C e = math::Exp<C>(tile.z[i][l] - unit[l]).exp();
          tile.z[i][l] = c == y.index[l] || c == other[l] ? C(0) : e;
          part[i % kSums][l] += tile.z[i][l];
        }
      }
      for (int64_t half = kSums / 2; half; half /= 2) {
        for (int64_t j = 0; j < half; ++j) {
          for (int64_t l = 0; l < kLanes; ++l) part[j][l] += part[j + half][l];
        }
      }
      for (int64_t l = 0; l < kLanes; ++l) rest[l] += part[0][l];
      for (int64_t l = 0; l < samples; ++l) {
        for (int64_t i = 0; i < n; ++i) gradient[l * classes + k + i] = tile.z[i][l];
      }
    }
    for (int64_t l = 0; l < samples; ++l) {
      C* const g = gradient + l * classes;
      math::Odds<C> result(kind, z_y[l], z_other[l], z_third[l], y.index[l] == other[l]);
      result.finish(rest[l]);
      judge(rows, top, first + l, l, y.index[l], result.loss);
      if (math::is_finite(rows.losses[first + l])) {
        for (int64_t k = 0; k < classes; ++k) g[k] *= result.at_rest;
        g[y.index[l]] += result.at_y;
        g[other[l]] += result.at_other;
      } else {
        fill(g, classes, C(NAN));
      }
      if (y.broken[l] || target.broken[l]) rows.mark_broken(first + l);
    }
  }
}

template <typename T>
void run(const Rows<T>& rows, int kind) {
  using C = typename Compute<T>::type;
  if (kind == math::kCrossEntropy) {
    if (rows.classes <= Tile<T, C>::kPiece) {
      cross_entropy_by_sample<T, C>(rows);
    } else {
      cross_entropy_by_class<T, C>(rows);
    }
  } else if (kind == math::kMargin) {
    ranked<T, C, 2>(rows);
  } else if (kind >= math::kPm) {
    odds<T, C>(rows, kind);
  } else if (rows.targets) {
    ranked<T, C, 4>(rows);
  } else {
    ranked<T, C, 3>(rows);
  }
}

}  // namespace

template <typename T>
const char* launch_attack_loss(const T* logits, const int64_t* labels, const int64_t* targets, int kind,
                               typename Compute<T>::type* losses, typename Compute<T>::type* gradient, bool* correct,
                               int64_t batch, int64_t classes, void*) {
  torch::stable::parallel_for(0, batch, std::max<int64_t>(kLanes, kGrain / classes), [=](int64_t begin, int64_t end) {
    run<T>({logits + begin * classes, labels + begin, targets ? targets + begin : nullptr, losses + begin,
            gradient + begin * classes, correct + begin, end - begin, classes},
           kind);
  });
  return nullptr;
}

#define ATOP_INSTANTIATE(T)                                                                                 \
  template const char* launch_attack_loss(const T*, const int64_t*, const int64_t*, int, Compute<T>::type*, \
                                          Compute<T>::type*, bool*, int64_t, int64_t, void*);
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(double)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)

}  // namespace atop
