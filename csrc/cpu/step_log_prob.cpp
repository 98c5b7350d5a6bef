// step_log_prob: from the sums of runs to log-probs, and from their gradients to those of the latents.

#include "runs.h"

namespace lacfast::cpu {

void step_log_prob(const StepLogProb& op, void* log_prob, int threads) {
  check_steps(op.transition, op.shape.rows);
  const std::int64_t per_row = runs_per_row(op.shape);
  std::vector<double> partial(static_cast<std::size_t>(op.shape.rows * per_row));
  const Kernels& chosen = kernels();
  for_each_run(op.shape, threads,
               [&](Run run, std::size_t index) { partial[index] = chosen.step_log_prob(op, run); });
  const bool wide = op.model_output.dtype == DType::float64;
  for (std::int64_t row = 0; row < op.shape.rows; ++row) {
    const double std = coefficients_of(op.transition, row, wide).std;
    put(log_prob, row, log_prob_of_row(partial, row, op.shape, std, op.scale), wide);
  }
}

void step_log_prob_backward(const StepLogProb& op, const void* grad_log_prob, const StepLogProbGradients& gradients,
                            int threads) {
  check_steps(op.transition, op.shape.rows);
  const Kernels& chosen = kernels();
  const bool wide = op.model_output.dtype == DType::float64;
  for_each_run(op.shape, threads, [&](Run run, std::size_t) {
    const double std = coefficients_of(op.transition, run.row, wide).std;
    const double weight = std == 0.0 ? 0.0 : op.scale * scalar_at(grad_log_prob, run.row, wide) / (std * std);
    chosen.step_log_prob_backward(op, run, weight, gradients);
  });
}

}  // namespace lacfast::cpu
