// log_ratio and ppo_loss: from the sums of runs to ratios, KLs and losses.

#include "../common/ppo.h"
#include "runs.h"

namespace lacfast::cpu {
namespace {

// finish(row, terms) for every row of log_ratio.
template <typename Finish>
void ratio_rows(const LogRatio& op, int threads, const Finish& finish) {
  check_steps(op.transition, op.shape.rows);
  const std::int64_t per_row = runs_per_row(op.shape);
  std::vector<RatioSums> partial(static_cast<std::size_t>(op.shape.rows * per_row));
  const Kernels& chosen = kernels();
  for_each_run(op.shape, threads, [&](Run run, std::size_t index) { partial[index] = chosen.log_ratio(op, run); });
  const bool wide = op.model_output.dtype == DType::float64;
  for (std::int64_t row = 0; row < op.shape.rows; ++row) {
    RatioSums sums{0.0, 0.0, 0.0};
    for (std::int64_t i = row * per_row; i < (row + 1) * per_row; ++i) {
      const RatioSums& part = partial[static_cast<std::size_t>(i)];
      sums.noise_dot += part.noise_dot;
      sums.old_squared += part.old_squared;
      sums.reference_squared += part.reference_squared;
    }
    finish(row, ratio_terms(sums, coefficients_of(op.transition, row, wide).gain, op.scale));
  }
}

}  // namespace

void log_ratio_forward(const LogRatio& op, void* terms, int threads) {
  const bool wide = op.model_output.dtype == DType::float64;
  ratio_rows(op, threads, [&](std::int64_t row, const RatioTerms& term) {
    put(terms, 3 * row + 0, term.log_ratio, wide);
    put(terms, 3 * row + 1, term.kl_old, wide);
    put(terms, 3 * row + 2, term.kl_ref, wide);
  });
}

void ppo_loss_forward(const LogRatio& op, const Surrogate& surrogate, void* table, int threads) {
  const bool wide = op.model_output.dtype == DType::float64;
  ratio_rows(op, threads, [&](std::int64_t row, const RatioTerms& term) {
    const double advantage = scalar_at(surrogate.advantages, row, wide);
    const double weight = surrogate.weights == nullptr ? 1.0 : scalar_at(surrogate.weights, row, wide);
    const ClippedSurrogate clipped = clipped_surrogate(term.log_ratio, advantage, surrogate.clip_range);
    put(table, 6 * row + 0, term.log_ratio, wide);
    put(table, 6 * row + 1, term.kl_old, wide);
    put(table, 6 * row + 2, term.kl_ref, wide);
    put(table, 6 * row + 3, weight * (clipped.loss + surrogate.kl_weight * term.kl_ref), wide);
    put(table, 6 * row + 4, weight * clipped.grad_log_ratio, wide);
    put(table, 6 * row + 5, clipped.clipped, wide);
  });
}

void log_ratio_backward(const LogRatio& op, const void* grad_terms, Result grad_model_output, int threads) {
  check_steps(op.transition, op.shape.rows);
  const Kernels& chosen = kernels();
  const bool wide = op.model_output.dtype == DType::float64;
  for_each_run(op.shape, threads, [&](Run run, std::size_t) {
    const double gain = coefficients_of(op.transition, run.row, wide).gain;
    const std::int64_t at = 3 * run.row;
    const RatioGradient gradient =
        ratio_gradient(scalar_at(grad_terms, at, wide), scalar_at(grad_terms, at + 1, wide),
                       scalar_at(grad_terms, at + 2, wide), gain, op.scale);
    chosen.log_ratio_backward(op, run, gradient, grad_model_output);
  });
}

}  // namespace lacfast::cpu
