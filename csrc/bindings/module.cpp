// The Python module: what this build can run, and the kernels of every op.

#include "addresses.h"

namespace lacfast {
namespace {

#if defined(LACFAST_WITH_CUDA)
std::string cuda_unusable_reason() { return cuda::unusable_reason(); }
#else
std::string cuda_unusable_reason() { return "built without CUDA (LACFAST_CUDA=OFF, or no CUDA compiler was found)"; }
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU and CUDA kernels of lacfast; called through lacfast.ops.";
  module.def("instruction_set", &cpu::instruction_set);
  module.def("cuda_unusable_reason", &cuda_unusable_reason);
  bind_noise(module);
  bind_gaussian_step(module);
  bind_step_log_prob(module);
  bind_ppo_loss(module);
  bind_gae(module);
  bind_advantages(module);
  bind_smc(module);
  bind_value_pool(module);
}

}  // namespace lacfast
