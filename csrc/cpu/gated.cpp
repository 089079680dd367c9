#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "common/launchers.h"
#include "common/parallel.h"
#include "cpu/gates.h"

namespace atop {
namespace {

using gates::kLanes;

// The number of outputs in a run, whose copies, biases and sums fit into the L1 cache.
constexpr int64_t kRun = 512;
// The number of outputs in a part, which has separate sums: fixed, so that results do not depend on the number of
// threads.
constexpr int64_t kPart = 8192;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// h as lines of rows of [f | g]. In channels_last there is one line, and each pixel is a row; in NCHW, a line is a
// channel of an image (without bias, all its channels), and each number is a row. A run consists of rows, a part of
// runs.
struct Lines {
  bool channels_last;
  int64_t count, rows, width;          // a row is f of `width` outputs and g of as many
  int64_t row_step, gap;               // from f to the next; from f to g
  int64_t channels;                    // lines of an image
  int64_t run_rows, part_rows, parts;  // parts of a line

  Lines(const Gates& size, bool has_bias) : channels_last(size.channels_last) {
    if (channels_last) {
      count = channels = 1;
      rows = size.batch * size.pixels;
      width = gap = size.channels;
      row_step = 2 * width;
    } else {
      channels = has_bias ? size.channels : 1;
      count = size.batch * channels;
      rows = size.channels * size.pixels / channels;
      width = row_step = 1;
      gap = size.channels * size.pixels;
    }
    // Prefer whole vectors.
    const int64_t even = kLanes / std::gcd(kLanes, width), most = std::max<int64_t>(1, kRun / width);
    run_rows = most >= even ? most / even * even : most;
    part_rows = run_rows * std::max<int64_t>(1, kPart / (run_rows * width));
    parts = divide_up(rows, part_rows);
  }

  // The offsets of f in h and of the outputs in y.
  int64_t f(int64_t line, int64_t row) const {
    const int64_t image = line / channels, channel = line - image * channels;
    return image * 2 * gap + channel * rows + row * row_step;
  }
  int64_t y(int64_t line, int64_t row) const { return (line * rows + row) * width; }
};

// Copies `rows` rows of `width` numbers, `from_step` and `to_step` apart, each in pieces of kBytes that may overlap.
template <int kBytes, typename T>
ATOP_CLONES void move_rows(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows, int64_t width) {
  const int64_t last = width - kBytes / int64_t(sizeof(T));
  for (int64_t r = 0; r < rows; ++r, from += from_step, to += to_step) {
    for (int64_t i = 0; i < last; i += kBytes / int64_t(sizeof(T))) memcpy(to + i, from + i, kBytes);
    memcpy(to + last, from + last, kBytes);
  }
}

template <typename T>
void copy_rows(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows, int64_t width) {
  const int64_t bytes = width * int64_t(sizeof(T));
  if (bytes >= 32) return move_rows<32>(from, from_step, to, to_step, rows, width);
  if (bytes >= 16) return move_rows<16>(from, from_step, to, to_step, rows, width);
  if (bytes >= 8) return move_rows<8>(from, from_step, to, to_step, rows, width);
  move_rows<sizeof(T)>(from, from_step, to, to_step, rows, width);
}

// The buffers of a thread for its runs.
template <typename T>
class Worker {
 public:
  using C = typename Compute<T>::type;

  Worker(const Lines& lines, const C* bias, bool with_sums)
      : lines_(lines),
        bias_(bias),
        size_(divide_up(lines.run_rows * lines.width, kLanes) * kLanes),
        direct_(lines.row_step == lines.width || lines.run_rows == 1 || lines.width % kLanes == 0),
        biases_(2 * size_t(size_)),
        sums_(with_sums ? 2 * size_t(size_) : 0) {
    if (!direct_) copies_.resize(4 * size_t(size_));
    if (!bias || !lines.channels_last) return;
    for (int64_t i = 0; i < lines.run_rows * lines.width; ++i) {
      biases_[i] = bias[i % lines.width];
      biases_[size_ + i] = bias[lines.width + i % lines.width];
    }
  }

  void start_line(int64_t line) {
    if (!bias_ || lines_.channels_last) return;
    const int64_t channel = line % lines_.channels;
    std::fill_n(biases_.begin(), kLanes, bias_[channel]);
    std::fill_n(biases_.begin() + size_, kLanes, bias_[lines_.channels + channel]);
  }

  void forward(math::Activation a, const T* h, T* y, int64_t rows) { gates::forward(a, inputs(h, rows), y); }

  // Adds the gradients to the two halves of the sums, if sums are wanted.
  void backward(math::Activation a, const T* dy, const T* h, T* dh, int64_t rows) {
    T *const df = direct_ ? dh : buffer(2), *const dg = direct_ ? dh + lines_.gap : buffer(3);
    C* const sums_f = sums_.data();
    gates::backward(a, dy, inputs(h, rows), df, dg, sums_f, sums_f ? sums_f + size_ : nullptr);
    if (direct_) return;
    copy_rows(df, lines_.width, dh, lines_.row_step, rows, lines_.width);
    copy_rows(dg, lines_.width, dh + lines_.gap, lines_.row_step, rows, lines_.width);
  }

  void clear_sums() { sums_.assign(sums_.size(), C(0)); }

  // The sums of each column of f, or of g if `half` is 1, by pairwise summation over the rows.
  const C* folded_sums(int half) {
    C* const sums = sums_.data() + half * size_;
    for (int64_t rows = lines_.run_rows; rows > 1;) {
      const int64_t kept = (rows + 1) / 2, count = (rows - kept) * lines_.width;
      for (int64_t i = 0; i < count; ++i) sums[i] += sums[kept * lines_.width + i];
      rows = kept;
    }
    return sums;
  }

 private:
  gates::Inputs<T> inputs(const T* f, int64_t rows) {
    const C *const bias_f = biases_.data(), *const bias_g = bias_f + size_;
    const T* const g = f + lines_.gap;
    // In NCHW, the rows form one long row.
    if (!lines_.channels_last) return {f, g, 1, rows, 0, bias_f, bias_g, 0};
    if (direct_) return {f, g, rows, lines_.width, lines_.row_step, bias_f, bias_g, 1};
    copy_rows(f, lines_.row_step, buffer(0), lines_.width, rows, lines_.width);
    copy_rows(g, lines_.row_step, buffer(1), lines_.width, rows, lines_.width);
    return {buffer(0), buffer(1), 1, rows * lines_.width, 0, bias_f, bias_g, 1};
  }

  T* buffer(int64_t i) { return copies_.data() + i * size_; }

  const Lines& lines_;
  const C* bias_;
  int64_t size_;  // of a buffer of a run
  bool direct_;   // the numbers of a run are contiguous in h
  std::vector<C> biases_, sums_;
  std::vector<T> copies_;
};

// Calls body(worker, line, part, first row, last row) for all parts of all lines.
template <typename T, typename Body>
void for_each_part(const Lines& lines, const typename Compute<T>::type* bias, bool with_sums, const Body& body) {
  const int64_t outputs = divide_up(lines.rows, lines.parts) * lines.width;
  const int64_t grain = std::max<int64_t>(1, kGrain / outputs);
  torch::stable::parallel_for(0, lines.count * lines.parts, grain, [&](int64_t begin, int64_t end) {
    Worker<T> worker(lines, bias, with_sums);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t line = i / lines.parts, part = i - line * lines.parts;
      worker.start_line(line);
      body(worker, line, part, part * lines.part_rows, std::min(lines.rows, (part + 1) * lines.part_rows));
    }
  });
}

}  // namespace

int64_t gated_parts(const Gates& size) {
  const Lines lines(size, true);
  return lines.count / lines.channels * lines.parts;
}

template <typename T>
const char* launch_gated(const T* h, const typename Compute<T>::type* bias, T* y, Gates size, void*) {
  const Lines lines(size, bias != nullptr);
  const auto a = math::Activation(size.activation);
  for_each_part<T>(lines, bias, false, [&](Worker<T>& worker, int64_t line, int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += lines.run_rows) {
      const int64_t rows = std::min(lines.run_rows, last - row);
      worker.forward(a, h + lines.f(line, row), y + lines.y(line, row), rows);
    }
  });
  return nullptr;
}

template <typename T>
const char* launch_gated_bwd(const T* dy, const T* h, const typename Compute<T>::type* bias, T* dh,
                             typename Compute<T>::type* partials, typename Compute<T>::type* db, Gates size, void*) {
  const Lines lines(size, bias != nullptr);
  const auto a = math::Activation(size.activation);
  for_each_part<T>(lines, bias, db != nullptr,
                   [&](Worker<T>& worker, int64_t line, int64_t part, int64_t first, int64_t last) {
                     worker.clear_sums();
                     for (int64_t row = first; row < last; row += lines.run_rows) {
                       const int64_t f = lines.f(line, row), rows = std::min(lines.run_rows, last - row);
                       worker.backward(a, dy + lines.y(line, row), h + f, dh + f, rows);
                     }
                     if (!db) return;
                     const int64_t image = line / lines.channels, channel = line - image * lines.channels;
                     for (int half : {0, 1}) {
                       std::copy_n(worker.folded_sums(half), lines.width,
                                   partials + ((image * lines.parts + part) * 2 + half) * size.channels + channel);
                     }
                   });
  if (!db) return nullptr;
  std::vector<double> total(static_cast<size_t>(2 * size.channels));
  for (int64_t i = 0, parts = gated_parts(size); i < parts; ++i) {
    for (size_t c = 0; c < total.size(); ++c) total[c] += partials[i * 2 * size.channels + c];
  }
  std::copy(total.begin(), total.end(), db);
  return nullptr;
}

#define ATOP_INSTANTIATE(T)                                                                        \
  template const char* launch_gated(const T*, const typename Compute<T>::type*, T*, Gates, void*); \
  template const char* launch_gated_bwd(const T*, const T*, const typename Compute<T>::type*, T*,  \
                                        typename Compute<T>::type*, typename Compute<T>::type*, Gates, void*);
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(double)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)

}  // namespace atop
