#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/launchers.h"
#include "cpu/multiply.h"
#include "cpu/places.h"
#include "cpu/scratch.h"
#include "math/exp.h"

namespace atop {
namespace {

constexpr double kScale = 10, kMinNorm = 1e-4;
// The number of rows that are multiplied together, and the number of lanes of a sum.
constexpr int64_t kBlock = 8 * kRows, kLanes = 16;

template <typename T>
ATOP_CLONES void scale_by(const T* by, T* __restrict__ row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] *= by[i];
}

// a = valid softmax(z valid) over whole lanes; z is -infinity beyond the positions.
template <typename T>
ATOP_CLONES void weigh(const T* valid, T* __restrict__ z, int64_t n) {
  T lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      z[i + l] = z[i + l] * valid[i + l] * T(kScale);
      lanes[l] = z[i + l] > lanes[l] ? z[i + l] : lanes[l];
    }
  }
  const T greatest = *std::max_element(lanes, lanes + kLanes);
  T total[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      z[i + l] = math::Exp<T>(z[i + l] - greatest).exp();
      total[l] += z[i + l];
    }
  }
  for (int64_t l = 1; l < kLanes; ++l) total[0] += total[l];
  const T inverse = 1 / total[0];
  for (int64_t i = 0; i < n; ++i) z[i] = z[i] * inverse * valid[i];
}

// dz = a (da - <a, da>), in place of da.
template <typename T>
ATOP_CLONES void weigh_bwd(const T* a, T* __restrict__ da, int64_t n) {
  T total[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) total[l] += a[i + l] * da[i + l];
  }
  for (int64_t l = 1; l < kLanes; ++l) total[0] += total[l];
  for (int64_t i = 0; i < n; ++i) da[i] = T(kScale) * a[i] * (da[i] - total[0]);
}

template <typename T>
ATOP_CLONES void add_products(const T* a, const T* b, T* __restrict__ sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += a[i] * b[i];
}

// The pixels of one parity, and the moves between positions whose patches share a pixel: patch i covers pixels 2 i - 1
// to 2 i + 2, so that pixel 2 i belongs to patches i and i - 1, and pixel 2 i + 1 to i and i + 1.
struct Parity {
  int64_t row, column;

  Move down() const { return {Line::kColumn, 2 * row - 1}; }
  Move right() const { return {Line::kRow, 2 * column - 1}; }
};

constexpr Parity kParities[4] = {{0, 0}, {0, 1}, {1, 0}, {1, 1}};

using List = std::vector<int64_t>;

// The attention of one sample; T is the type of the computation.
template <typename T>
struct Sample {
  Places places;
  int64_t channels, count, width, pitch, depth;
  const bool* is_valid;
  Scratch<T> memory, valid, norms, rows, other_rows, panels;
  List all;

  Sample(Attention size, int64_t matrices)
      : places{size.rows, size.columns},
        channels(size.channels),
        count(places.count()),
        width(padded(places)),
        // One cache line of padding, so that a column of the matrix does not map to a single cache set.
        pitch(width + 16),
        depth(round_up(channels, kPanel)),
        is_valid(nullptr),
        memory(matrices * count * pitch),
        valid(width),
        norms(width),
        rows(count * depth),
        other_rows(count * depth),
        panels(width * depth) {
    for (int64_t place = 0; place < count; ++place) all.push_back(place);
  }

  Pairs<T> matrix(int64_t i) const { return {memory.get() + i * count * pitch, pitch}; }

  void use(const bool* flags) {
    is_valid = flags;
    // Beyond the positions the scores are -infinity, and -infinity times 0 would be NaN.
    for (int64_t i = 0; i < width; ++i) valid.get()[i] = i >= count || flags[i] ? T(1) : T(0);
  }

  // The positions whose pixel of this parity contributes to the patch of a valid position.
  List shared(Parity parity) const {
    List list;
    for (int64_t place = 0; place < count; ++place) {
      const int64_t right = places.moved(parity.right(), place), down = places.moved(parity.down(), place);
      const int64_t both = right < 0 ? -1 : places.moved(parity.down(), right);
      bool any = is_valid[place];
      for (int64_t at : {right, down, both}) any = any || (at >= 0 && is_valid[at]);
      if (any) list.push_back(place);
    }
    return list;
  }

  // Calls body(element of a row for position and channel, element of the tensor), along adjacent elements in memory.
  template <typename Rows, typename Pixel, typename Body>
  void over_pixels(Parity parity, Rows* to, Pixel* first, const int64_t* strides, const Body& body) const {
    const int64_t of_c = strides[1], of_i = strides[2], of_j = strides[3];
    over_rows(places.rows, places.columns * channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Rows* const row = to + i * places.columns * depth;
        Pixel* const line = first + (2 * i + parity.row) * of_i + parity.column * of_j;
        if (of_c == 1) {
          for (int64_t j = 0; j < places.columns; ++j) {
            for (int64_t c = 0; c < channels; ++c) body(row[j * depth + c], line[c + 2 * j * of_j]);
          }
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            for (int64_t j = 0; j < places.columns; ++j) body(row[j * depth + c], line[c * of_c + 2 * j * of_j]);
          }
        }
      }
    });
  }

  // rows[place][channel] = scale * pixel
  template <typename S>
  void get(Strided<const S> from, int64_t sample, Parity parity, T scale, T* to) const {
    over_pixels(parity, to, from.first + sample * from.strides[0], from.strides,
                [=](T& element, const S& pixel) { element = scale * load(pixel); });
    for (int64_t place = 0; place < count; ++place) {
      std::fill(to + place * depth + channels, to + (place + 1) * depth, T(0));
    }
  }

  template <typename S>
  void put(const T* from, Strided<S> to, int64_t sample, Parity parity) const {
    over_pixels(parity, from, to.first + sample * to.strides[0], to.strides,
                [](const T& element, S& pixel) { store(element, &pixel); });
  }

  // Panels of channels of the listed positions, as factors for weights.
  void pack_values(const T* from, const List& list) const {
    const int64_t n = static_cast<int64_t>(list.size());
    for (int64_t panel = 0; panel < depth / kPanel; ++panel) {
      for (int64_t k = 0; k < n; ++k) {
        std::copy_n(from + list[k] * depth + panel * kPanel, kPanel, panels.get() + (panel * n + k) * kPanel);
      }
    }
  }

  // Panels of the listed positions, for products of their channels.
  void pack_keys(const T* from, const List& list) const {
    const int64_t n = static_cast<int64_t>(list.size());
    for (int64_t first = 0; first < n; first += kPanel) {
      T* const to = panels.get() + first * channels;
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        const T* const key = first + lane < n ? from + list[first + lane] * depth : nullptr;
        for (int64_t c = 0; c < channels; ++c) to[c * kPanel + lane] = key ? key[c] : T(0);
      }
    }
  }

  // to[p][l] = <rows[p], keys[l]>, and 0 for positions that are not listed.
  void compare(const T* queries, const List& list, Pairs<T> to) const {
    const int64_t n = static_cast<int64_t>(list.size()), packed = (n + kPanel - 1) / kPanel;
    over_rows(count, width, [&](int64_t begin, int64_t end) {
      const Scratch<T> some(n < count ? kBlock * width : 0);
      for (int64_t p = begin; p < end; p += kBlock) {
        const int64_t block = std::min(kBlock, end - p);
        T* const m = n < count ? some.get() : to.row(p);
        const int64_t m_step = n < count ? width : pitch;
        multiply({block, channels, packed, depth, 1, m_step, false}, queries + p * depth, panels.get(), m);
        for (int64_t r = 0; n < count && r < block; ++r) {
          T* const row = to.row(p + r);
          std::fill_n(row, width, T(0));
          for (int64_t k = 0; k < n; ++k) row[list[k]] = m[r * m_step + k];
        }
      }
    });
  }

  // total[p] += sum over the `from` positions l of the weights shared by (p, l) times the packed values, for listed p.
  void paste(Pairs<T> weights, Parity parity, const List& to, const List& from, T* total) const {
    const int64_t n = static_cast<int64_t>(from.size());
    over_rows(static_cast<int64_t>(to.size()), width, [&](int64_t begin, int64_t end) {
      const Scratch<T> v(kBlock * pitch), m(kBlock * depth), row(width), scratch(width);
      for (int64_t first = begin; first < end; first += kBlock) {
        const int64_t block = std::min(kBlock, end - first);
        for (int64_t r = 0; r < block; ++r) {
          T* const packed = v.get() + r * pitch;
          T* const sum = n < count ? row.get() : packed;
          sum_of_four(places, weights, parity.down(), parity.right(), to[first + r], sum, scratch.get());
          for (int64_t k = 0; n < count && k < n; ++k) packed[k] = sum[from[k]];
        }
        multiply({block, n, depth / kPanel, pitch, 1, depth, false}, v.get(), panels.get(), m.get());
        for (int64_t r = 0; r < block; ++r) add(m.get() + r * depth, total + to[first + r] * depth, depth);
      }
    });
  }

  // The scores, and the weights with which patches are pasted; x holds rows of the features at the positions.
  void attend(const T* x, Pairs<T> scores, Pairs<T> scratch, Pairs<T> weights) const {
    pack_keys(x, all);
    compare(x, all, scores);
    sum_diagonals(places, Line::kRow, scores, scratch);
    std::vector<T> inverse(static_cast<size_t>(width));
    for (int64_t place = 0; place < count; ++place) {
      T square = scratch.row(place)[place];
      for (int64_t step : {-1, 1}) {
        const int64_t at = places.moved({Line::kColumn, step}, place);
        if (at >= 0) square += scratch.row(at)[at];
      }
      norms.get()[place] = std::max(std::sqrt(square), T(kMinNorm));
      inverse[place] = 1 / norms.get()[place];
    }
    sum_diagonals(places, Line::kColumn, scratch, scores,
                  [&](int64_t, T* row) { scale_by(inverse.data(), row, width); });
    sum_diagonals(places, Line::kOrderOfRows, scores, scratch);
    sum_diagonals(places, Line::kOrderOfColumns, scratch, weights, [&](int64_t, T* row) {
      std::fill(row + count, row + width, -std::numeric_limits<T>::infinity());
      weigh(valid.get(), row, width);
    });
  }

  // From the gradient in the output to the gradient in the weights, and then in the scores before fusing; it is 0 where
  // the weights are 0.
  template <typename S>
  void unpaste(Strided<const S> dy, Strided<const S> features, int64_t sample, Pairs<T> products, Pairs<T> to) const {
    over_rows(count, width, [&](int64_t begin, int64_t end) { std::fill(to.row(begin), to.row(end), T(0)); });
    for (Parity parity : kParities) {
      const List list = shared(parity);
      get(features, sample, parity, T(1), rows.get());
      get(dy, sample, parity, T(0.25), other_rows.get());
      pack_keys(rows.get(), list);
      compare(other_rows.get(), list, products);
      over_rows(count, width, [&](int64_t begin, int64_t end) {
        const Scratch<T> sum(width), scratch(width);
        for (int64_t p = begin; p < end; ++p) {
          sum_of_four(places, products, parity.down().back(), parity.right().back(), p, sum.get(), scratch.get());
          add(sum.get(), to.row(p), width);
        }
      });
    }
  }

  // From the gradient in the scores, which is overwritten, to the gradient in the products of pixels plus its
  // transpose.
  void compare_bwd(Pairs<T> scores, Pairs<T> dscores, Pairs<T> dproducts) const {
    std::vector<T> diagonal(static_cast<size_t>(width)), inverse(static_cast<size_t>(width));
    over_rows(width / kLanes, kLanes * count, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kLanes, n = (end - begin) * kLanes;
      for (int64_t p = 0; p < count; ++p) {
        add_products(scores.row(p) + first, dscores.row(p) + first, diagonal.data() + first, n);
      }
    });
    for (int64_t place = 0; place < count; ++place) {
      const T norm = norms.get()[place];
      inverse[place] = 1 / norm;
      // Scores are divided by the norm of their key, whose square is on the diagonal of the products.
      diagonal[place] = norm > T(kMinNorm) ? -diagonal[place] / (2 * norm * norm) : T(0);
    }
    over_rows(count, width, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        scale_by(inverse.data(), dscores.row(p), width);
        dscores.row(p)[p] += diagonal[p];
      }
    });
    transpose(places, dscores, &dscores, dproducts);
    sum_diagonals(places, Line::kRow, dproducts, dscores);
    sum_diagonals(places, Line::kColumn, dscores, dproducts);
  }

  template <typename S>
  void forward(Strided<const S> features, int64_t sample, Strided<S> y) const {
    const Pairs<T> weights = matrix(0);
    get(features, sample, kParities[0], T(1), rows.get());
    attend(rows.get(), weights, matrix(1), weights);
    for (Parity parity : kParities) {
      const List list = shared(parity);
      get(features, sample, parity, T(0.25), rows.get());
      pack_values(rows.get(), list);
      std::fill_n(other_rows.get(), count * depth, T(0));
      paste(weights, parity, all, list, other_rows.get());
      put(other_rows.get(), y, sample, parity);
    }
  }

  template <typename S>
  void backward(Strided<const S> dy, Strided<const S> features, int64_t sample, Strided<S> dfeatures) const {
    const Pairs<T> scores = matrix(0), weights = matrix(1), scratch = matrix(2), d = matrix(3);
    get(features, sample, kParities[0], T(1), rows.get());
    attend(rows.get(), scores, scratch, weights);
    unpaste(dy, features, sample, scratch, d);
    over_rows(count, width, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) weigh_bwd(weights.row(p), d.row(p), width);
    });
    sum_diagonals(places, Line::kOrderOfColumns, d, scratch);
    sum_diagonals(places, Line::kOrderOfRows, scratch, d);
    compare_bwd(scores, d, scratch);
    const Pairs<T> dproducts = scratch, transposed = d;
    // As values: pasting is linear in them, and its transpose is pasting with the transposed weights.
    transpose<T>(places, weights, nullptr, transposed);
    for (Parity parity : kParities) {
      std::fill_n(other_rows.get(), count * depth, T(0));
      if (!parity.row && !parity.column) {
        get(features, sample, parity, T(1), rows.get());
        pack_values(rows.get(), all);
        over_rows(count, width, [&](int64_t begin, int64_t end) {
          for (int64_t p = begin; p < end; p += kBlock) {
            multiply({std::min(kBlock, end - p), count, depth / kPanel, pitch, 1, depth, false}, dproducts.row(p),
                     panels.get(), other_rows.get() + p * depth);
          }
        });
      }
      get(dy, sample, parity, T(0.25), rows.get());
      pack_values(rows.get(), all);
      paste(transposed, parity, shared(parity), all, other_rows.get());
      put(other_rows.get(), dfeatures, sample, parity);
    }
  }
};

// One sample per thread, or all threads on one sample at a time if there are more threads than samples.
template <typename T, typename Body>
void over_samples(const bool* valid, Attention size, int64_t matrices, const Body& body) {
  const int64_t products = size.rows * size.columns * size.rows * size.columns * size.channels;
  const bool enough = size.batch >= torch::stable::get_num_threads();
  const int64_t grain = enough ? grain_of_products(products) : size.batch;
  torch::stable::parallel_for(0, size.batch, grain, [&](int64_t begin, int64_t end) {
    Sample<T> sample(size, matrices);
    for (int64_t i = begin; i < end; ++i) {
      sample.use(valid + i * sample.count);
      body(sample, i);
    }
  });
}

}  // namespace

template <typename T>
const char* launch_contextual_attention(Strided<const T> features, const bool* valid, Attention size, Strided<T> y,
                                        void*) {
  over_samples<typename Compute<T>::type>(
      valid, size, 2, [=](const auto& sample, int64_t i) { sample.template forward<T>(features, i, y); });
  return nullptr;
}

template <typename T>
const char* launch_contextual_attention_bwd(Strided<const T> dy, Strided<const T> features, const bool* valid,
                                            Attention size, Strided<T> dfeatures, void*) {
  over_samples<typename Compute<T>::type>(
      valid, size, 4, [=](const auto& sample, int64_t i) { sample.template backward<T>(dy, features, i, dfeatures); });
  return nullptr;
}

#define ATOP_INSTANTIATE(T)                                                                                        \
  template const char* launch_contextual_attention(Strided<const T>, const bool*, Attention, Strided<T>, void*);   \
  template const char* launch_contextual_attention_bwd(Strided<const T>, Strided<const T>, const bool*, Attention, \
                                                       Strided<T>, void*);
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(double)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)

}  // namespace atop
