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
    double squared_distance = 0.0;
    for (std::int64_t i = row * per_row; i < (row + 1) * per_row; ++i)
      squared_distance += partial[static_cast<std::size_t>(i)];
    const double std = coefficients_of(op.transition, row, wide).std;
    const auto elements = static_cast<double>(op.shape.elements);
    put(op.log_prob, row, log_prob_from_sum(squared_distance, std, elements, op.scale), wide);
  }
}

}  // namespace lacfast::cpu
