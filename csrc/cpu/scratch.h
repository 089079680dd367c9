#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace atop {

constexpr int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// Uninitialized memory, aligned to cache lines.
template <typename T>
struct Scratch {
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(T* p) const { ::operator delete[](p, kLine); }
  };
  std::unique_ptr<T[], Delete> memory;

  explicit Scratch(int64_t count)
      : memory(static_cast<T*>(::operator new[](static_cast<size_t>(count) * sizeof(T), kLine))) {}
  T* get() const { return memory.get(); }
};

}  // namespace atop
