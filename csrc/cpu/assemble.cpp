#include "cpu/strips.h"

namespace atop {
namespace {

// Calls body(copy, pixel, pixels) on runs of pixels in a row that belong to one copy, so that they are copied as a
// whole.
template <typename Body>
void for_each_run(const uint8_t* owners, const Images& im, int64_t row, const Body& body) {
  const int64_t columns = im.width / im.patch;
  const uint8_t* line = owners + row / im.patch * columns;
  for (int64_t i = 0; i < columns;) {
    int64_t end = i + 1;
    while (end < columns && line[end] == line[i]) ++end;
    body(line[i], row * im.width + i * im.patch, (end - i) * im.patch);
    i = end;
  }
}

// Calls body(sample, row) for all rows of all samples.
template <typename Body>
void for_each_row(const Images& im, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / (im.width * im.channels));
  torch::stable::parallel_for(0, im.batch * im.height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / im.height, i % im.height);
  });
}

// Calls body(offset, elements) on the pieces of a run of pixels, with the offset within the image: one piece with all
// channels in channels_last, otherwise one per channel.
template <typename Body>
void for_each_piece(const Images& im, int64_t pixel, int64_t pixels, const Body& body) {
  if (im.channels_last) return body(pixel * im.channels, pixels * im.channels);
  for (int64_t c = 0; c < im.channels; ++c) body(c * im.pixels() + pixel, pixels);
}

}  // namespace

template <typename T>
const char* launch_assemble(const T* copies, const uint8_t* owners, Images im, T* y, void*) {
  const int64_t size = im.channels * im.pixels();
  for_each_row(im, [=](int64_t sample, int64_t row) {
    for_each_run(owners + sample * im.blocks(), im, row, [=](int copy, int64_t pixel, int64_t pixels) {
      for_each_piece(im, pixel, pixels, [=](int64_t offset, int64_t n) {
        T* to = y + sample * size + offset;
        if (copy >= im.copies) {
          memset(static_cast<void*>(to), 0, static_cast<size_t>(n) * sizeof(T));
        } else {
          memcpy(to, copies + (sample * im.copies + copy) * size + offset, static_cast<size_t>(n) * sizeof(T));
        }
      });
    });
  });
  return nullptr;
}

template <typename T>
const char* launch_assemble_bwd(const T* dy, const uint8_t* owners, Images im, T* dcopies, void*) {
  const int64_t size = im.channels * im.pixels();
  for_each_row(im, [=](int64_t sample, int64_t row) {
    for_each_run(owners + sample * im.blocks(), im, row, [=](int copy, int64_t pixel, int64_t pixels) {
      for_each_piece(im, pixel, pixels, [=](int64_t offset, int64_t n) {
        const size_t bytes = static_cast<size_t>(n) * sizeof(T);
        for (int other = 0; other < im.copies; ++other) {
          T* to = dcopies + (sample * im.copies + other) * size + offset;
          if (other == copy) {
            memcpy(to, dy + sample * size + offset, bytes);
          } else {
            memset(static_cast<void*>(to), 0, bytes);
          }
        }
      });
    });
  });
  return nullptr;
}

#define ATOP_INSTANTIATE(T)                                                          \
  template const char* launch_assemble(const T*, const uint8_t*, Images, T*, void*); \
  template const char* launch_assemble_bwd(const T*, const uint8_t*, Images, T*, void*);
ATOP_INSTANTIATE(float)
ATOP_INSTANTIATE(double)
ATOP_INSTANTIATE(BFloat16)
ATOP_INSTANTIATE(Half)

}  // namespace atop
