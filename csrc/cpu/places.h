#pragma once
// Matrices whose rows and columns are the positions of a grid, and sums along their diagonals: over pairs of positions
// that are shifted together.                                                       docs/math.md#contextual_attention

#include <algorithm>

#include "common/macros.h"
#include "common/parallel.h"

namespace atop {

// The next position: within a row or a column of the grid, after whose end there is none; or in row-major or
// column-major order, where one line follows the other.
enum class Line { kRow, kColumn, kOrderOfRows, kOrderOfColumns };

// A move to the next position, or with -1 to the previous one.
struct Move {
  Line line;
  int64_t step;

  Move back() const { return {line, -step}; }
};

template <typename T>
ATOP_CLONES void add(const T* from, T* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// Adds all but the last column of a grid; the caller shifts one of the pointers by a column.
template <typename T>
ATOP_CLONES void add_columns(const T* from, T* __restrict__ to, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns - 1; ++j) to[i * columns + j] += from[i * columns + j];
  }
}

struct Places {
  int64_t rows, columns;

  int64_t count() const { return rows * columns; }

  // The position to which `place` moves, or -1 if it leaves the grid.
  int64_t moved(Move move, int64_t place) const {
    const int64_t i = place / columns + move.step, j = place % columns + move.step;
    const bool has_row = i >= 0 && i < rows, has_column = j >= 0 && j < columns;
    switch (move.line) {
      case Line::kRow:
        return has_column ? place + move.step : -1;
      case Line::kColumn:
        return has_row ? place + move.step * columns : -1;
      case Line::kOrderOfRows:
        return place + move.step < count() ? place + move.step : -1;
      case Line::kOrderOfColumns:
        break;
    }
    if (has_row) return place + move.step * columns;
    return !has_column ? -1 : move.step > 0 ? j : (rows - 1) * columns + j;
  }

  // to[place] += from[moved(place)] for all positions.
  template <typename T>
  void add_moved(Move move, const T* from, T* to) const {
    const bool forward = move.step > 0;
    if (move.line == Line::kRow) return add_columns(from + forward, to + !forward, rows, columns);
    const int64_t step = move.line == Line::kOrderOfRows ? 1 : columns, last = count() - columns;
    add(from + forward * step, to + !forward * step, count() - step);
    if (move.line != Line::kOrderOfColumns) return;
    // The end of one column is followed by the beginning of the next.
    add(from + (forward ? 1 : last), to + (forward ? last : 1), columns - 1);
  }
};

// A matrix of positions by positions. Its rows are padded, because sums may read beyond their end.
template <typename T>
struct Pairs {
  T* first;
  int64_t pitch;

  T* row(int64_t place) const { return first + place * pitch; }
};

// The number of elements of a row that are computed, in whole vectors.
inline int64_t padded(const Places& places) {
  return (places.count() + 15) / 16 * 16;
}

// Calls body(begin, end) on ranges of the `rows` of a matrix of the given width.
template <typename Body>
void over_rows(int64_t rows, int64_t width, const Body& body) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), body);
}

// Adds the elements at the moved pairs to row `place`.
template <typename T>
void add_moved_row(const Places& places, Pairs<T> from, Move move, int64_t place, T* to) {
  const int64_t at = places.moved(move, place);
  if (at >= 0) places.add_moved(move, from.row(at), to);
}

// to = the sum over the pairs, the next pairs and the previous pairs; calls then(place, row) after each row.
template <typename T, typename Then>
void sum_diagonals(const Places& places, Line line, Pairs<T> from, Pairs<T> to, const Then& then) {
  over_rows(places.count(), padded(places), [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      T* const row = to.row(place);
      std::copy_n(from.row(place), padded(places), row);
      for (int64_t step : {-1, 1}) add_moved_row(places, from, {line, step}, place, row);
      then(place, row);
    }
  });
}

template <typename T>
void sum_diagonals(const Places& places, Line line, Pairs<T> from, Pairs<T> to) {
  sum_diagonals(places, line, from, to, [](int64_t, T*) {});
}

// Row `place` of the sum over the pairs and the pairs moved by one of the moves or by both.
template <typename T>
void sum_of_four(const Places& places, Pairs<T> from, Move down, Move right, int64_t place, T* sum, T* scratch) {
  std::copy_n(from.row(place), padded(places), sum);
  add_moved_row(places, from, right, place, sum);
  const int64_t below = places.moved(down, place);
  if (below < 0) return;
  std::copy_n(from.row(below), padded(places), scratch);
  add_moved_row(places, from, right, below, scratch);
  places.add_moved(down, scratch, sum);
}

// to[l][p] = from[p][l] + other[l][p], or only the first if `other` is null.
template <typename T>
void transpose(const Places& places, Pairs<T> from, const Pairs<T>* other, Pairs<T> to) {
  constexpr int64_t kTile = 16;
  const int64_t count = places.count();
  over_rows((count + kTile - 1) / kTile, kTile * padded(places), [&](int64_t begin, int64_t end) {
    for (int64_t l0 = begin * kTile; l0 < std::min(count, end * kTile); l0 += kTile) {
      for (int64_t p0 = 0; p0 < count; p0 += kTile) {
        for (int64_t l = l0; l < std::min(count, l0 + kTile); ++l) {
          for (int64_t p = p0; p < std::min(count, p0 + kTile); ++p) {
            to.row(l)[p] = from.row(p)[l] + (other ? other->row(l)[p] : T(0));
          }
        }
      }
    }
  });
}

}  // namespace atop
