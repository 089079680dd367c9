#include "math/pgd_step_l2.h"

#include "cpu/step.h"

namespace atop {

// A thread computes the norms of a whole sample.
int64_t step_parts(int64_t) {
  return 1;
}

template <typename T>
const char* launch_pgd_step_l2(const StepArguments<T>& arguments, void*) {
  return launch_step<math::PgdStepL2>(arguments);
}

template const char* launch_pgd_step_l2(const StepArguments<float>&, void*);
template const char* launch_pgd_step_l2(const StepArguments<double>&, void*);

}  // namespace atop
