#pragma once
// The parts of torch that csrc/cpu needs, on separate threads, so that ThreadSanitizer sees all of them: the driver
// chooses the number and sizes of the chunks, regardless of the grain size.

#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline int threads = 1;

inline int64_t get_num_threads() {
  return threads;
}

template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t, const Body& body) {
  if (begin >= end) return;
  std::vector<std::thread> started;
  int64_t first = begin;
  for (int i = 0; i < threads; ++i) {
    const int64_t last = i + 1 == threads ? end : first + (end - first) / (threads - i + i % 2);
    if (last > first) started.emplace_back([&body, first, last] { body(first, last); });
    first = last;
  }
  for (std::thread& thread : started) thread.join();
}

}  // namespace torch::stable
