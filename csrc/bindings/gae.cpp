// gae on the CPU and, where it was compiled, on CUDA.
#include "addresses.h"

namespace lacfast {
namespace {

Gae gae(std::int64_t rows, std::int64_t steps, std::int64_t heads, int code, double gamma, double gae_lambda,
        double value_lambda) {
  return {rows, steps, heads, dtype(code), gamma, gae_lambda, value_lambda};
}

void gae_forward(std::int64_t rows, std::int64_t steps, std::int64_t heads, int code, double gamma, double gae_lambda,
                 double value_lambda, Address rewards, Address values, Address advantages, Address returns) {
  cpu::gae(gae(rows, steps, heads, code, gamma, gae_lambda, value_lambda), pointer<const void>(rewards),
           pointer<const void>(values), pointer(advantages), pointer(returns));
}

void gae_backward(std::int64_t rows, std::int64_t steps, std::int64_t heads, int code, double gamma, double gae_lambda,
                  double value_lambda, Address grad_advantages, Address grad_returns, Address grad_rewards,
                  Address grad_values) {
  cpu::gae_backward(gae(rows, steps, heads, code, gamma, gae_lambda, value_lambda),
                    pointer<const void>(grad_advantages), pointer<const void>(grad_returns), pointer(grad_rewards),
                    pointer(grad_values));
}

#if defined(LACFAST_WITH_CUDA)
void cuda_gae_forward(std::int64_t rows, std::int64_t steps, std::int64_t heads, int code, double gamma,
                      double gae_lambda, double value_lambda, Address rewards, Address values, Address advantages,
                      Address returns, Address stream) {
  cuda::gae(gae(rows, steps, heads, code, gamma, gae_lambda, value_lambda), pointer<const void>(rewards),
            pointer<const void>(values), pointer(advantages), pointer(returns), pointer(stream));
}

void cuda_gae_backward(std::int64_t rows, std::int64_t steps, std::int64_t heads, int code, double gamma,
                       double gae_lambda, double value_lambda, Address grad_advantages, Address grad_returns,
                       Address grad_rewards, Address grad_values, Address stream) {
  cuda::gae_backward(gae(rows, steps, heads, code, gamma, gae_lambda, value_lambda),
                     pointer<const void>(grad_advantages), pointer<const void>(grad_returns), pointer(grad_rewards),
                     pointer(grad_values), pointer(stream));
}
#endif

}  // namespace

void bind_gae(py::module_& module) {
  module.def("gae", &gae_forward, ReleaseGil());
  module.def("gae_backward", &gae_backward, ReleaseGil());
#if defined(LACFAST_WITH_CUDA)
  module.def("cuda_gae", &cuda_gae_forward, ReleaseGil());
  module.def("cuda_gae_backward", &cuda_gae_backward, ReleaseGil());
#endif
}

}  // namespace lacfast
