// step_log_prob and its gradients.
#include "addresses.h"

namespace lacfast {
namespace {

StepLogProb step_log_prob_of(std::int64_t rows, std::int64_t elements, Address sample, int sample_dtype,
                             Address model_output, int output_dtype, Address prev_sample, int prev_dtype,
                             Address coefficients, std::int64_t table_steps, Address steps, bool is_shared,
                             double scale) {
  return {{rows, elements},
          operand(sample, sample_dtype),
          operand(model_output, output_dtype),
          operand(prev_sample, prev_dtype),
          transition(coefficients, table_steps, steps, is_shared),
          scale};
}

void step_log_prob(std::int64_t rows, std::int64_t elements, Address sample, int sample_dtype, Address model_output,
                   int output_dtype, Address prev_sample, int prev_dtype, Address coefficients,
                   std::int64_t table_steps, Address steps, bool is_shared, double scale, Address log_prob,
                   int threads) {
  const StepLogProb op = step_log_prob_of(rows, elements, sample, sample_dtype, model_output, output_dtype, prev_sample,
                                          prev_dtype, coefficients, table_steps, steps, is_shared, scale);
  cpu::step_log_prob(op, pointer(log_prob), threads);
}

void step_log_prob_backward(std::int64_t rows, std::int64_t elements, Address sample, int sample_dtype,
                            Address model_output, int output_dtype, Address prev_sample, int prev_dtype,
                            Address coefficients, std::int64_t table_steps, Address steps, bool is_shared,
                            double scale, Address grad_log_prob, Address grad_sample, Address grad_model_output,
                            Address grad_prev_sample, int threads) {
  const StepLogProb op = step_log_prob_of(rows, elements, sample, sample_dtype, model_output, output_dtype, prev_sample,
                                          prev_dtype, coefficients, table_steps, steps, is_shared, scale);
  const StepLogProbGradients gradients{result(grad_sample, sample_dtype), result(grad_model_output, output_dtype),
                                       result(grad_prev_sample, prev_dtype)};
  cpu::step_log_prob_backward(op, pointer<const void>(grad_log_prob), gradients, threads);
}

}  // namespace

void bind_step_log_prob(py::module_& module) {
  module.def("step_log_prob", &step_log_prob, ReleaseGil());
  module.def("step_log_prob_backward", &step_log_prob_backward, ReleaseGil());
}

}  // namespace lacfast
