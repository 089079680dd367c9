#include "math/apgd_step_linf.h"

#include "cpu/step.h"

namespace atop {

template <typename T>
const char* launch_apgd_step_linf(const StepArguments<T>& arguments, void*) {
  return launch_step<math::ApgdStepLinf>(arguments);
}

template const char* launch_apgd_step_linf(const StepArguments<float>&, void*);
template const char* launch_apgd_step_linf(const StepArguments<double>&, void*);

}  // namespace atop
