// step_log_prob: from the sums of runs to log-probs, and from their gradients to those of the latents.

#include "runs.h"

namespace lacfast::cpu {
namespace {

void step_log_prob(const StepLogProb& op, const StepLogProbOutputs& outputs, const Threads& threads) {
  const Shape shape = shape_of(op.sample);
  check_steps(op.transition, shape.rows);
  std::vector<double> partial(static_cast<std::size_t>(shape.rows * runs_per_row(shape)));
  const Kernels& chosen = kernels();
  for_each_run(shape, threads, [&](Run run, std::size_t index) { partial[index] = chosen.step_log_prob(op, run); });
  const bool wide = op.model_output.dtype == DType::float64;
  for (std::int64_t row = 0; row < shape.rows; ++row) {
    const double std = coefficients_of(op.transition, row, wide).std;
    put(outputs.log_prob.data, row, log_prob_of_row(partial, row, shape, std, op.scale), wide);
  }
}

void step_log_prob_backward(const StepLogProb& op, const StepLogProbOutputs&, const StepLogProbOutputs& grads,
                            const StepLogProb& gradients, const Threads& threads) {
  const Shape shape = shape_of(op.sample);
  check_steps(op.transition, shape.rows);
  const Kernels& chosen = kernels();
  const bool wide = op.model_output.dtype == DType::float64;
  for_each_run(shape, threads, [&](Run run, std::size_t) {
    const double std = coefficients_of(op.transition, run.row, wide).std;
    const double weight = std == 0.0 ? 0.0 : op.scale * scalar_at(grads.log_prob.data, run.row, wide) / (std * std);
    chosen.step_log_prob_backward(op, run, weight, gradients);
  });
}

const Registered<&step_log_prob> registered("cpu.step_log_prob");
const Registered<&step_log_prob_backward> registered_backward("cpu.step_log_prob_backward");

}  // namespace
}  // namespace lacfast::cpu
