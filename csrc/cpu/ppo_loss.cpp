// log_ratio and ppo_loss: from the sums of runs to ratios, KLs and losses.

#include "../common/ppo.h"
#include "runs.h"

namespace lacfast::cpu {
namespace {

bool is_wide(const LogRatio& op) { return op.model_output.dtype == DType::float64; }

// finish(row, sums) for every row, in order. Rows that a mask leaves out are not read; their sums are 0.
template <typename Finish>
void for_each_row(const LogRatio& op, const bool* mask, int threads, const Finish& finish) {
  check_steps(op.transition, op.shape.rows);
  const std::int64_t per_row = runs_per_row(op.shape);
  std::vector<RatioSums> partial(static_cast<std::size_t>(op.shape.rows * per_row), RatioSums{0.0, 0.0, 0.0});
  const Kernels& chosen = kernels();
  for_each_run(op.shape, threads, [&](Run run, std::size_t index) {
    if (mask == nullptr || mask[run.row]) partial[index] = chosen.log_ratio(op, run);
  });
  for (std::int64_t row = 0; row < op.shape.rows; ++row) {
    RatioSums sums{0.0, 0.0, 0.0};
    for (std::int64_t i = row * per_row; i < (row + 1) * per_row; ++i) {
      const RatioSums& part = partial[static_cast<std::size_t>(i)];
      sums.noise_dot += part.noise_dot;
      sums.old_squared += part.old_squared;
      sums.reference_squared += part.reference_squared;
    }
    finish(row, sums);
  }
}

// gradient(row) of every row's terms, applied to its latent.
template <typename Gradient>
void write_gradient(const LogRatio& op, Result grad_model_output, int threads, const Gradient& gradient) {
  check_steps(op.transition, op.shape.rows);
  const Kernels& chosen = kernels();
  for_each_run(op.shape, threads, [&](Run run, std::size_t) {
    chosen.log_ratio_backward(op, run, gradient(run.row), grad_model_output);
  });
}

// g of kl_ref = reduce( g (v - v_ref)^2 )
double reference_gain(const PPOLoss& op, std::int64_t row, double gain) {
  const LogRatio& ratio = op.transition_ratio;
  return op.kl_gains == nullptr ? 0.5 * gain * gain
                                : scalar_at(op.kl_gains, ratio.transition.steps[row], is_wide(ratio));
}

RatioTerms terms_of(const PPOLoss& op, std::int64_t row, const RatioSums& sums, const RowCoefficients& coefficients) {
  const double scale = op.transition_ratio.scale;
  RatioTerms terms = ratio_terms(sums, coefficients.gain, scale);
  if (op.is_normalized) terms.log_ratio = scale * coefficients.gain * coefficients.std * sums.noise_dot;
  terms.kl_ref = scale * reference_gain(op, row, coefficients.gain) * sums.reference_squared;
  return terms;
}

double rows_that_count(const bool* mask, std::int64_t rows) {
  if (mask == nullptr) return static_cast<double>(rows);
  std::int64_t count = 0;
  for (std::int64_t row = 0; row < rows; ++row) count += mask[row] ? 1 : 0;
  return static_cast<double>(count);
}

double row_weight(const Surrogate& surrogate, std::int64_t row, std::int64_t step, bool wide) {
  const double weight = surrogate.weights == nullptr ? 1.0 : scalar_at(surrogate.weights, row, wide);
  return surrogate.step_weights == nullptr ? weight : weight * scalar_at(surrogate.step_weights, step, wide);
}

}  // namespace

void log_ratio_forward(const LogRatio& op, void* terms, int threads) {
  const bool wide = is_wide(op);
  for_each_row(op, nullptr, threads, [&](std::int64_t row, const RatioSums& sums) {
    const RatioTerms term = ratio_terms(sums, coefficients_of(op.transition, row, wide).gain, op.scale);
    put(terms, 3 * row + 0, term.log_ratio, wide);
    put(terms, 3 * row + 1, term.kl_old, wide);
    put(terms, 3 * row + 2, term.kl_ref, wide);
  });
}

void log_ratio_backward(const LogRatio& op, const void* grad_terms, Result grad_model_output, int threads) {
  const bool wide = is_wide(op);
  write_gradient(op, grad_model_output, threads, [&](std::int64_t row) {
    return ratio_gradient(scalar_at(grad_terms, 3 * row, wide), scalar_at(grad_terms, 3 * row + 1, wide),
                          scalar_at(grad_terms, 3 * row + 2, wide), coefficients_of(op.transition, row, wide).gain,
                          op.scale);
  });
}

void ppo_loss_forward(const PPOLoss& op, const Surrogate& surrogate, const PPOResults& results, int threads) {
  const LogRatio& ratio = op.transition_ratio;
  const bool wide = is_wide(ratio);
  const double count = rows_that_count(surrogate.mask, ratio.shape.rows);
  std::vector<double> step_sums(static_cast<std::size_t>(6 * ratio.transition.table_steps), 0.0);
  double loss = 0.0;
  for_each_row(ratio, surrogate.mask, threads, [&](std::int64_t row, const RatioSums& sums) {
    const std::int64_t step = ratio.transition.steps[row];
    const RowCoefficients coefficients = coefficients_of(ratio.transition, row, wide);
    const bool counts = surrogate.mask == nullptr || surrogate.mask[row];
    RatioTerms terms{0.0, 0.0, 0.0};
    SurrogateGain gain{0.0, 0.0, 0.0};
    double share = 0.0, grad_log_ratio = 0.0, grad_kl_ref = 0.0;
    if (counts && coefficients.std > 0.0) {
      terms = terms_of(op, row, sums, coefficients);
      gain = surrogate_gain(terms.log_ratio, terms.kl_old, scalar_at(surrogate.advantages, row, wide),
                            surrogate.bounds);
      const double weight = row_weight(surrogate, row, step, wide) / count;
      share = weight * (surrogate.kl_weight * terms.kl_ref - gain.gain);
      grad_log_ratio = -weight * gain.grad_log_ratio;
      grad_kl_ref = weight * surrogate.kl_weight;
    }
    loss += share;
    const double numbers[4] = {terms.log_ratio, terms.kl_old, terms.kl_ref, gain.side};
    for (int i = 0; i < 4; ++i) put(results.rows, 4 * row + i, numbers[i], wide);
    const double shares[3] = {share, grad_log_ratio, grad_kl_ref};
    for (int i = 0; i < 3; ++i) put(results.shares, 3 * row + i, shares[i], wide);
    if (!counts) return;
    const double summed[6] = {1.0,          terms.log_ratio,           terms.kl_old,
                              terms.kl_ref, gain.side > 0 ? 1.0 : 0.0, gain.side < 0 ? 1.0 : 0.0};
    for (int i = 0; i < 6; ++i) step_sums[static_cast<std::size_t>(6 * step + i)] += summed[i];
  });
  put(results.loss, 0, loss, wide);
  for (std::size_t i = 0; i < step_sums.size(); ++i)
    put(results.step_sums, static_cast<std::int64_t>(i), step_sums[i], wide);
}

void ppo_loss_backward(const PPOLoss& op, const void* shares, const void* grad_loss, Result grad_model_output,
                       int threads) {
  const LogRatio& ratio = op.transition_ratio;
  const bool wide = is_wide(ratio);
  const double outer = scalar_at(grad_loss, 0, wide);
  write_gradient(ratio, grad_model_output, threads, [&](std::int64_t row) {
    const double grad_log_ratio = outer * scalar_at(shares, 3 * row + 1, wide);
    const double grad_kl_ref = outer * scalar_at(shares, 3 * row + 2, wide);
    const RowCoefficients coefficients = coefficients_of(ratio.transition, row, wide);
    RatioGradient gradient = ratio_gradient(grad_log_ratio, 0.0, 0.0, coefficients.gain, ratio.scale);
    if (op.is_normalized) gradient = {gradient.noise * coefficients.std, 0.0, 0.0};
    gradient.reference_difference =
        ratio.scale * 2.0 * grad_kl_ref * reference_gain(op, row, coefficients.gain);
    return gradient;
  });
}

}  // namespace lacfast::cpu
