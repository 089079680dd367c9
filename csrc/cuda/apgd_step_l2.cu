#include "math/apgd_step_l2.h"

#include "step.cuh"

namespace atop {

template <typename T>
const char* launch_apgd_step_l2(const StepArguments<T>& arguments, void* stream) {
  return launch_step_with_norms<math::ApgdStepL2>(arguments, stream);
}

template const char* launch_apgd_step_l2(const StepArguments<float>&, void*);
template const char* launch_apgd_step_l2(const StepArguments<double>&, void*);

}  // namespace atop
