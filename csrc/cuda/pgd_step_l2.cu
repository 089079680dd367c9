#include "math/pgd_step_l2.h"

#include "step.cuh"

namespace atop {

int64_t step_parts(int64_t inner) {
  return (inner + kPart - 1) / kPart;
}

template <typename T>
const char* launch_pgd_step_l2(const StepArguments<T>& arguments, void* stream) {
  return launch_step_with_norms<math::PgdStepL2>(arguments, stream);
}

template const char* launch_pgd_step_l2(const StepArguments<float>&, void*);
template const char* launch_pgd_step_l2(const StepArguments<double>&, void*);

}  // namespace atop
