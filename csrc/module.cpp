// Everything except tensor ops: information on this build, and the SIMD level of the CPU kernels.

#include <pybind11/pybind11.h>

#include "common/macros.h"

namespace {

namespace py = pybind11;

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  using namespace py::literals;
  return py::dict("compiler"_a = compiler(), "torch"_a = ATOP_TORCH, "flags"_a = ATOP_FLAGS,
                  "debug"_a = bool(ATOP_DEBUG), "cuda"_a = ATOP_CUDA, "arch_list"_a = ATOP_ARCHS, "note"_a = ATOP_NOTE);
}

py::dict cpu_features() {
  py::dict features;
  const char* level = "baseline";
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  features["avx2"] = bool(__builtin_cpu_supports("avx2"));
  features["fma"] = bool(__builtin_cpu_supports("fma"));
  features["avx512f"] = bool(__builtin_cpu_supports("avx512f"));
  features["avx512bw"] = bool(__builtin_cpu_supports("avx512bw"));
#if ATOP_HAS_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) {
    level = "x86-64-v4";
  } else if (__builtin_cpu_supports("x86-64-v3")) {
    level = "x86-64-v3";
  }
#endif
#endif
  features["level"] = level;
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU features of atop_fast.";
  m.def("build_info", &build_info, "How this build was made: compiler, torch, flags, CUDA version, architectures.");
  m.def("cpu_features", &cpu_features, "Instruction sets of this CPU, and the level whose kernels run.");
}
