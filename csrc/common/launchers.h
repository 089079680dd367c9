#pragma once
// The functions that csrc/ops (host side) calls. csrc/cpu defines them for the CPU library and csrc/cuda for the CUDA
// library, with the same signatures: each library links one of them. Sizes are positive. `stream` is a cudaStream_t, or
// null on the CPU. They return null or an error message.

#include <cstdint>

#include "common/half.h"
#include "math/philox.h"
#include "math/step.h"

namespace atop {

// One number for all samples, or one per sample in device memory, so that a captured graph can replay with new values.
template <typename T>
struct PerSample {
  const T* values;  // [batch], or [1] with stride 0, or null
  int64_t stride;
  T number;

  ATOP_HD T operator[](int64_t sample) const { return values ? values[sample * stride] : number; }
};

// Inputs and outputs of the projected steps of attacks. Without per-sample numbers and norms, all samples may be
// treated as one.
template <typename T>
struct StepArguments {
  const T* x;       // [batch, inner]
  const T* grad;    // [draws, batch, inner], with dense samples
  const T* x0;      // [batch, inner]
  const T* x_prev;  // [batch, inner]; x if the op has none
  T* out;           // [batch, inner], may be x
  T* partials;      // [norms + 1, batch, step_parts(inner)], or null if step_parts is 1
  T* total;         // [batch, inner] if there are partials and draws > 1, or null
  int64_t draws, draw_stride, batch, inner;
  PerSample<T> alpha, eps, momentum;

  ATOP_HD math::StepNumbers<T> numbers(int64_t sample) const { return {alpha[sample], eps[sample], momentum[sample]}; }
};

// The number of parts into which a sample is divided to compute its norms.
int64_t step_parts(int64_t inner);

template <typename T>
const char* launch_pgd_step_linf(const StepArguments<T>& arguments, void* stream);
template <typename T>
const char* launch_pgd_step_l2(const StepArguments<T>& arguments, void* stream);
template <typename T>
const char* launch_apgd_step_linf(const StepArguments<T>& arguments, void* stream);
template <typename T>
const char* launch_apgd_step_l2(const StepArguments<T>& arguments, void* stream);

// On the CPU only.                                                                         docs/math.md#project_l1
template <typename T>
const char* launch_project_l1(const StepArguments<T>& arguments, void* stream);

// On the CPU only; `k` is the number of entries that move.
template <typename T>
const char* launch_pgd_step_l1(const StepArguments<T>& arguments, PerSample<int64_t> k, void* stream);

// The smallest steps from points to hyperplanes, on the CPU only.
template <typename T>
const char* launch_hyperplane_step(const T* x,       // [batch, n]
                                   const T* w,       // [batch, n]
                                   const T* change,  // [batch]
                                   bool l2, int64_t batch, int64_t n,
                                   T* steps,  // [batch, n]
                                   void* stream);

// Arguments common to the ops of Square: images, and a square for each of them.
template <typename T>
struct Squares {
  const T *x, *x0;   // [batch, channels, height, width]
  const T* signs;    // [batch, channels]
  const T* rows;     // [batch, height]
  const T* columns;  // [batch, width]
  int64_t batch, channels, height, width;
  T eps;
  T* y;  // like x

  int64_t pixels() const { return height * width; }
  int64_t inner() const { return channels * pixels(); }
};

// A second square, and the bump of each first square.
template <typename T>
struct Bumps : Squares<T> {
  const T* other_rows;               // [batch, height]
  const T* other_columns;            // [batch, width]
  const T* bumps;                    // [any, side, side]
  const int64_t *top, *left, *bump;  // [batch]
  int64_t side;
  bool l2;
};

// On the CPU only.
template <typename T>
const char* launch_square_linf(const Squares<T>& squares, void* stream);
template <typename T>
const char* launch_square_bump(const Bumps<T>& bumps, void* stream);

// The outputs of gated convolutions; h has twice as many channels.
struct Gates {
  int64_t batch, channels, pixels;  // of an image
  bool channels_last;
  int activation;  // of math/gated.h
};

// The number of partial sums of the gradient for each of the 2 * channels biases; depends only on the sizes.
int64_t gated_parts(const Gates& size);

// y = a(f) sigmoid(g), f and g the halves of h plus the bias.                             docs/math.md#gated
template <typename T>
const char* launch_gated(const T* h,                             // [batch, 2 * channels, pixels]
                         const typename Compute<T>::type* bias,  // [2 * channels] or null
                         T* y,                                   // [batch, channels, pixels]
                         Gates size, void* stream);

template <typename T>
const char* launch_gated_bwd(const T* dy,                            // [batch, channels, pixels]
                             const T* h,                             // [batch, 2 * channels, pixels]
                             const typename Compute<T>::type* bias,  // [2 * channels] or null
                             T* dh,                                  // [batch, 2 * channels, pixels]
                             typename Compute<T>::type* partials,    // [gated_parts(size), 2 * channels] or null
                             typename Compute<T>::type* db,          // [2 * channels] or null
                             Gates size, void* stream);

// Pointers to the key of the randomness, in device memory, so that a captured graph can replay with another key.
struct Key {
  const int64_t* seed;        // [1]
  const int64_t* sample_ids;  // [batch]
  int64_t id_stride;
  const int64_t* draws;  // [batch], or [1] with stride 0
  int64_t draw_stride;

  ATOP_HD math::Stream stream(int64_t sample, uint32_t tag) const {
    return {*seed, sample_ids[sample * id_stride], draws[sample * draw_stride], tag};
  }
};

// Standard normal numbers.                                                                docs/math.md#random_normal
const char* launch_random_normal(Key key, float* y,  // [batch, count]
                                 int64_t batch, int64_t count, uint32_t tag, void* stream);

// The copy that masks each block, or `copies` for none: masks the first `masked` blocks in the order of random words.
const char* launch_mask_blocks(Key key,
                               const int64_t* masked,  // [batch], or [1] with stride 0
                               int64_t masked_stride,
                               uint8_t* owners,  // [batch, blocks]
                               int64_t batch, int64_t blocks, int copies, void* stream);

// Images, their copies and their blocks. The layout is [channels, height, width], or [height, width, channels] if
// channels_last; elements are numbered in the first order in either case.
struct Images {
  int64_t batch, channels, height, width;  // after resizing
  int64_t patch;
  int copies;
  bool channels_last;

  ATOP_HD int64_t pixels() const { return height * width; }
  ATOP_HD int64_t blocks() const { return (height / patch) * (width / patch); }
  // The number of bytes for one bit per pixel of a plane.
  ATOP_HD int64_t packed() const { return (pixels() + 7) / 8; }
};

// The noisy, masked purifier input and the bit mask of the gradient; either may be null.       docs/math.md#corrupt
template <typename In, typename Out>
const char* launch_corrupt(const In* x,            // [batch, channels, x_height, x_width]
                           const uint8_t* owners,  // [batch, blocks]
                           const float* sigma,     // [batch], or [1] with stride 0
                           int64_t sigma_stride, Key key, Images images, int64_t x_height, int64_t x_width,
                           Out* y,         // [batch, copies, channels + 2, height, width] or null
                           uint8_t* live,  // [batch, channels, packed] or null
                           void* stream);

template <typename Dy, typename Dx>
const char* launch_corrupt_bwd(const Dy* dy,           // [batch, copies, channels + 2, height, width]
                               const uint8_t* live,    // [batch, channels, packed]
                               const uint8_t* owners,  // [batch, blocks]
                               Images images,
                               Dx* dx,  // [batch, channels, height, width]
                               void* stream);

// Every block from the copy that masked it, 0 if none did.                                docs/math.md#assemble
template <typename T>
const char* launch_assemble(const T* copies,        // [batch, copies, channels, height, width]
                            const uint8_t* owners,  // [batch, blocks]
                            Images images,
                            T* y,  // [batch, channels, height, width]
                            void* stream);

template <typename T>
const char* launch_assemble_bwd(const T* dy,            // [batch, channels, height, width]
                                const uint8_t* owners,  // [batch, blocks]
                                Images images,
                                T* dcopies,  // [batch, copies, channels, height, width]
                                void* stream);

// The loss of an attack and its gradient; NaN for a label or target outside the classes.   docs/math.md#attack_loss
template <typename T>
const char* launch_attack_loss(const T* logits,         // [batch, classes], fewer than 2**31 classes
                               const int64_t* labels,   // [batch]
                               const int64_t* targets,  // [batch] or null
                               int kind,                // see math/attack_loss.h, which gives the minimum of classes
                               typename Compute<T>::type* losses,    // [batch]
                               typename Compute<T>::type* gradient,  // [batch, classes]
                               bool* correct,                        // [batch]
                               int64_t batch, int64_t classes, void* stream);

// The rows of a sparse matrix along one axis: row i of a group is weight[i, k] at columns start[i] + k.
template <typename C>
struct Taps {
  const int64_t* start;  // [groups, rows]
  const C* weight;       // [groups, rows, count]
  int64_t group_stride;  // rows between the matrices of two samples: `rows`, or 0 for a shared matrix
  int64_t rows, count;
};

// y = row matrix * x * transposed column matrix, for every plane.                         docs/math.md#resample
template <typename T>
const char* launch_resample(const T* x,  // [batch, channels, height, width]
                            Taps<typename Compute<T>::type> row_taps, Taps<typename Compute<T>::type> column_taps,
                            T* y,  // [batch, channels, row_taps.rows, column_taps.rows]
                            int64_t batch, int64_t channels, int64_t height, int64_t width, bool channels_last,
                            void* stream);

// The number of outputs whose prepared weights are adjacent in memory.
constexpr int64_t kConvPanel = 16;

struct Conv3x3 {
  int64_t batch, channels, outputs, height, width;
  int64_t dilation;  // also the padding
};

// Optional inputs that are fused into a convolution; null if absent.
struct ConvFusion {
  const float* mask;      // like x; where it is not positive, x counts as 0
  const float* bias;      // [outputs]
  const float* residual;  // like y, added to y
  bool relu;              // applied to the sum
};

// The convolution with 3x3 weights, on the CPU only.                                      docs/math.md#conv3x3
const char* launch_conv3x3(const float* x,         // [batch, height, width, channels]
                           const float* prepared,  // [36, panels, channels, kConvPanel]
                           ConvFusion fusion, Conv3x3 size,
                           float* y,  // [batch, height, width, outputs]
                           void* stream);

const char* launch_conv3x3_prepare(const float* weight,     // [outputs, channels, 3, 3] in strides
                                   const int64_t* strides,  // [4], on the host
                                   int64_t outputs, int64_t channels,
                                   float* prepared,  // [36, panels, channels, kConvPanel], 0 beyond the outputs
                                   void* stream);

// The gradient of the convolution in its weights, on the CPU only.
const char* launch_conv3x3_bwd_weight(const float* dy,  // [batch, height, width, outputs]
                                      const float* x,   // [batch, height, width, channels]
                                      Conv3x3 size,
                                      float* dw,  // [outputs, channels, 3, 3]
                                      void* stream);

// A convolution with equal strides and paddings on both axes; or, if transposed, its gradient: x is then the gradient
// in the outputs, and y the gradient in the images.
struct StridedConv {
  int64_t batch, channels, outputs;
  int64_t height, width, y_height, y_width;
  int64_t weight_rows, weight_columns, stride, padding;
  bool transposed, channels_last, y_channels_last;
};

// The number of elements of its prepared weights.
int64_t frozen_conv_weights(const StridedConv& size);

// On the CPU only.                                                                        docs/math.md#frozen_conv
const char* launch_frozen_conv(const float* x,
                               const float* prepared,  // see atop_fast/ops/frozen_conv.py
                               ConvFusion fusion, StridedConv size, float* y, void* stream);

// The features of contextual_attention, (batch, channels, 2 rows, 2 columns), with one position per 2x2 pixels.
struct Attention {
  int64_t batch, channels, rows, columns;
};

// A pointer to features with their strides, in the order batch, channel, row, column.
template <typename T>
struct Strided {
  T* first;
  int64_t strides[4];
};

// On the CPU only.                                                                docs/math.md#contextual_attention
template <typename T>
const char* launch_contextual_attention(Strided<const T> features,
                                        const bool* valid,  // [batch, rows, columns]
                                        Attention size, Strided<T> y, void* stream);

template <typename T>
const char* launch_contextual_attention_bwd(Strided<const T> dy, Strided<const T> features,
                                            const bool* valid,  // [batch, rows, columns]
                                            Attention size, Strided<T> dfeatures, void* stream);

}  // namespace atop
