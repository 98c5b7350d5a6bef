// gaussian_step: from the sums of runs to log-probs.

#include "runs.h"

namespace lacfast::cpu {
namespace {

void step_into(const GaussianStep& op, const GaussianStepOutputs& outputs, const Slab& slab,
               const Threads& threads) {
  const Shape shape = shape_of(op.sample);
  check_steps(op.transition, shape.rows);
  std::vector<double> partial(static_cast<std::size_t>(shape.rows * runs_per_row(shape)));
  const Kernels& chosen = kernels();
  for_each_run(shape, threads,
               [&](Run run, std::size_t index) { partial[index] = chosen.gaussian_step(op, run, outputs, slab); });
  const bool wide = op.model_output.dtype == DType::float64;
  for (std::int64_t row = 0; row < shape.rows; ++row) {
    const double std = coefficients_of(op.transition, row, wide).std;
    const double log_prob = log_prob_of_row(partial, row, shape, std, op.scale);
    if (outputs.log_prob.data != nullptr) put(outputs.log_prob.data, row, log_prob, wide);
    const std::int64_t in_slab = step_of(op.transition, row) * shape.rows + row;
    if (slab.log_probs.data != nullptr) put(slab.log_probs.data, in_slab, log_prob, wide);
  }
}

void gaussian_step(const GaussianStep& op, const GaussianStepOutputs& outputs, const Threads& threads) {
  step_into(op, outputs, {}, threads);
}

void gaussian_step_in_place(const GaussianStep& op, const Slab& slab, const Threads& threads) {
  step_into(op, {op.sample, {}, {}}, slab, threads);
}

const Registered<&gaussian_step> registered("cpu.gaussian_step");
const Registered<&gaussian_step_in_place> registered_in_place("cpu.gaussian_step_in_place");

}  // namespace
}  // namespace lacfast::cpu
