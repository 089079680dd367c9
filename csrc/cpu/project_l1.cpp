#include "cpu/project_l1.h"

namespace atop {

template <typename T>
const char* launch_project_l1(const StepArguments<T>& a, void*) {
  return for_each_sample_l1(a, [&](int64_t sample, int64_t begin, L1Buffers<T>& buffers) {
    project_sample_l1(a.x + begin, a.x0 + begin, a.eps[sample], buffers, a.out + begin, a.inner);
  });
}

template const char* launch_project_l1(const StepArguments<float>&, void*);
template const char* launch_project_l1(const StepArguments<double>&, void*);

}  // namespace atop
