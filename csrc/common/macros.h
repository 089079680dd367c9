#pragma once

#include <cstdint>  // defines __GLIBC__

// A function for both CPU and CUDA. On the CPU it must be inlined: out of line it would lack its caller's target ISA.
#if defined(__CUDACC__)
#define ATOP_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define ATOP_HD __forceinline
#else
#define ATOP_HD inline __attribute__((always_inline))
#endif

// One function, compiled for three x86-64 levels; the loader selects one for the machine. Requires glibc's ifunc and
// gcc: clang accepts the attribute but fails to dispatch on "arch=" names. Not with ThreadSanitizer, because the loader
// runs the resolver before it is ready.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_THREAD__)
#define ATOP_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define ATOP_HAS_CLONES 1
#else
#define ATOP_CLONES
#define ATOP_HAS_CLONES 0
#endif
