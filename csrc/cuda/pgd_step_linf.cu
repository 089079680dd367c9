#include "math/pgd_step_linf.h"

#include "step.cuh"

namespace atop {

template <typename T>
const char* launch_pgd_step_linf(const StepArguments<T>& arguments, void* stream) {
  return launch_step_elements<math::PgdStepLinf>(arguments, stream);
}

template const char* launch_pgd_step_linf(const StepArguments<float>&, void*);
template const char* launch_pgd_step_linf(const StepArguments<double>&, void*);

}  // namespace atop
