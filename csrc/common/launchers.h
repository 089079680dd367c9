#pragma once
// What csrc/ops (host side) calls. csrc/cpu defines these functions for the CPU library and csrc/cuda for the CUDA
// library, with the same signatures: each library links one of them. Sizes are positive. `stream` is a cudaStream_t,
// and null on the CPU. They return null, or what went wrong.

#include <cstdint>

#include "common/half.h"

namespace atop {

template <typename T>
const char* launch_pgd_step_linf(const T* x,     // [n]
                                 const T* grad,  // [n]
                                 const T* x0,    // [n]
                                 T* out,         // [n], may be x
                                 int64_t n, T alpha, T eps, void* stream);

// A row is the block in which all f stand before all g: an image in NCHW, a pixel in channels_last.
template <typename T>
const char* launch_gated_elu(const T* h,  // [rows, 2, inner]
                             T* y,        // [rows, inner]
                             int64_t rows, int64_t inner, void* stream);

template <typename T>
const char* launch_gated_elu_bwd(const T* dy,  // [rows, inner]
                                 const T* h,   // [rows, 2, inner]
                                 T* dh,        // [rows, 2, inner]
                                 int64_t rows, int64_t inner, void* stream);

}  // namespace atop
