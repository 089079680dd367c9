#pragma once

#include <cstdint>  // defines __GLIBC__

// A function for CPU and CUDA alike. It must be inlined on the CPU: out of line it would miss the target of its caller.
#if defined(__CUDACC__)
#define ATOP_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define ATOP_HD __forceinline
#else
#define ATOP_HD inline __attribute__((always_inline))
#endif

// One function, compiled for three x86-64 levels; the loader picks one by the machine it runs on. Needs the ifunc of
// glibc, and gcc: clang reads the same attribute but fails to dispatch on "arch=" names. The loader runs what picks one
// before ThreadSanitizer is ready.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_THREAD__)
#define ATOP_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define ATOP_HAS_CLONES 1
#else
#define ATOP_CLONES
#define ATOP_HAS_CLONES 0
#endif
