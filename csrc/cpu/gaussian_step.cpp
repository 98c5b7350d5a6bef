// gaussian_step: from the sums of runs to log-probs.

#include "runs.h"

namespace lacfast::cpu {

void gaussian_step(const GaussianStep& op, int threads) {
  check_steps(op.transition, op.shape.rows);
  const std::int64_t per_row = runs_per_row(op.shape);
  std::vector<double> partial(static_cast<std::size_t>(op.shape.rows * per_row));
  const Kernels& chosen = kernels();
  for_each_run(op.shape, threads,
               [&](Run run, std::size_t index) { partial[index] = chosen.gaussian_step(op, run); });
  const bool wide = op.model_output.dtype == DType::float64;
  for (std::int64_t row = 0; row < op.shape.rows; ++row) {
    const double std = coefficients_of(op.transition, row, wide).std;
    const double log_prob = log_prob_of_row(partial, row, op.shape, std, op.scale);
    if (op.log_prob != nullptr) put(op.log_prob, row, log_prob, wide);
    const std::int64_t in_slab = step_of(op.transition, row) * op.shape.rows + row;
    if (op.slab.log_probs != nullptr) put(op.slab.log_probs, in_slab, log_prob, wide);
  }
}

}  // namespace lacfast::cpu
