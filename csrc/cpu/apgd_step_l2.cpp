#include "math/apgd_step_l2.h"

#include "cpu/step.h"

namespace atop {

template <typename T>
const char* launch_apgd_step_l2(const StepArguments<T>& arguments, void*) {
  return launch_step<math::ApgdStepL2>(arguments);
}

template const char* launch_apgd_step_l2(const StepArguments<float>&, void*);
template const char* launch_apgd_step_l2(const StepArguments<double>&, void*);

}  // namespace atop
