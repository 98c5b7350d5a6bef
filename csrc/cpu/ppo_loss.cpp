// log_ratio and ppo_loss: from the sums of runs to ratios, KLs and losses.

#include "../common/ppo.h"
#include "runs.h"

namespace lacfast::cpu {
namespace {

bool is_wide(const LogRatio& op) { return op.model_output.dtype == DType::float64; }

// finish(row, sums) for every row, in order. Rows that a mask leaves out are not read; their sums are 0.
template <typename Finish>
void for_each_row(const LogRatio& op, const bool* mask, Threads threads, const Finish& finish) {
  const Shape shape = shape_of(op.model_output);
  check_steps(op.transition, shape.rows);
  const std::int64_t per_row = runs_per_row(shape);
  std::vector<RatioSums> partial(static_cast<std::size_t>(shape.rows * per_row), RatioSums{0.0, 0.0, 0.0});
  const Kernels& chosen = kernels();
  for_each_run(shape, threads, [&](Run run, std::size_t index) {
    if (mask == nullptr || mask[run.row]) partial[index] = chosen.log_ratio(op, run);
  });
  for (std::int64_t row = 0; row < shape.rows; ++row) {
    RatioSums sums{0.0, 0.0, 0.0};
    for (std::int64_t i = row * per_row; i < (row + 1) * per_row; ++i) {
      const RatioSums& part = partial[static_cast<std::size_t>(i)];
      sums.noise_dot += part.noise_dot;
      sums.old_squared += part.old_squared;
      sums.anchor_squared += part.anchor_squared;
    }
    finish(row, sums);
  }
}

// gradient(row) of every row's terms, applied to its latent.
template <typename Gradient>
void write_gradient(const LogRatio& op, Result grad_model_output, Threads threads, const Gradient& gradient) {
  const Shape shape = shape_of(op.model_output);
  check_steps(op.transition, shape.rows);
  const Kernels& chosen = kernels();
  for_each_run(shape, threads, [&](Run run, std::size_t) {
    chosen.log_ratio_backward(op, run, gradient(run.row), grad_model_output);
  });
}

// g of kl_ref = reduce( g (v - v_ref)^2 )
double kl_gain(const PPOLoss& op, std::int64_t row, double gain) {
  const Transition& transition = op.ratio.transition;
  return op.kl_gains.data == nullptr ? 0.5 * gain * gain
                                     : scalar_at(op.kl_gains.data, step_of(transition, row), is_wide(op.ratio));
}

RatioTerms terms_of(const PPOLoss& op, std::int64_t row, const RatioSums& sums, const RowCoefficients& coefficients) {
  const double scale = op.ratio.scale;
  RatioTerms terms = ratio_terms(sums, coefficients.gain, scale);
  if (op.is_normalized != 0) terms.log_ratio = scale * coefficients.gain * coefficients.std * sums.noise_dot;
  terms.kl_ref = scale * kl_gain(op, row, coefficients.gain) * sums.anchor_squared;
  return terms;
}

double rows_that_count(const bool* mask, std::int64_t rows) {
  if (mask == nullptr) return static_cast<double>(rows);
  std::int64_t count = 0;
  for (std::int64_t row = 0; row < rows; ++row) count += mask[row] ? 1 : 0;
  return static_cast<double>(count);
}

double row_weight(const PPOLoss& op, std::int64_t row, std::int64_t step, bool wide) {
  const double weight = op.weights.data == nullptr ? 1.0 : scalar_at(op.weights.data, row, wide);
  return op.step_weights.data == nullptr ? weight : weight * scalar_at(op.step_weights.data, step, wide);
}

void log_ratio(const PPOLoss& op, const LogRatioOutputs& outputs, const Threads& threads) {
  const LogRatio& ratio = op.ratio;
  const bool wide = is_wide(ratio);
  for_each_row(ratio, nullptr, threads, [&](std::int64_t row, const RatioSums& sums) {
    const RatioTerms term = ratio_terms(sums, coefficients_of(ratio.transition, row, wide).gain, ratio.scale);
    void* terms = outputs.terms.data;
    put(terms, 3 * row + 0, term.log_ratio, wide);
    put(terms, 3 * row + 1, term.kl_old, wide);
    put(terms, 3 * row + 2, term.kl_ref, wide);
  });
}

void log_ratio_backward(const PPOLoss& op, const LogRatioOutputs&, const LogRatioOutputs& grads,
                        const PPOLoss& gradients, const Threads& threads) {
  const LogRatio& ratio = op.ratio;
  const bool wide = is_wide(ratio);
  const void* terms = grads.terms.data;
  write_gradient(ratio, gradients.ratio.model_output, threads, [&](std::int64_t row) {
    return ratio_gradient(scalar_at(terms, 3 * row, wide), scalar_at(terms, 3 * row + 1, wide),
                          scalar_at(terms, 3 * row + 2, wide), coefficients_of(ratio.transition, row, wide).gain,
                          ratio.scale);
  });
}

void ppo_loss(const PPOLoss& op, const PPOLossOutputs& outputs, const Threads& threads) {
  const LogRatio& ratio = op.ratio;
  const bool wide = is_wide(ratio);
  const bool* mask = op.mask.as<const bool>();
  const double count = rows_that_count(mask, ratio.model_output.sizes[0]);
  std::vector<double> step_sums(static_cast<std::size_t>(6 * ratio.transition.coefficients.sizes[0]), 0.0);
  double loss = 0.0;
  for_each_row(ratio, mask, threads, [&](std::int64_t row, const RatioSums& sums) {
    const std::int64_t step = step_of(ratio.transition, row);
    const RowCoefficients coefficients = coefficients_of(ratio.transition, row, wide);
    const bool counts = mask == nullptr || mask[row];
    RatioTerms terms{0.0, 0.0, 0.0};
    SurrogateGain gain{0.0, 0.0, 0.0};
    double share = 0.0, grad_log_ratio = 0.0, grad_kl_ref = 0.0;
    if (counts && coefficients.std > 0.0) {
      terms = terms_of(op, row, sums, coefficients);
      gain = surrogate_gain(terms.log_ratio, terms.kl_old, scalar_at(op.advantages.data, row, wide), op.bounds);
      const double weight = row_weight(op, row, step, wide) / count;
      share = weight * (op.kl_weight * terms.kl_ref - gain.gain);
      grad_log_ratio = -weight * gain.grad_log_ratio;
      grad_kl_ref = weight * op.kl_weight;
    }
    loss += share;
    const double numbers[4] = {terms.log_ratio, terms.kl_old, terms.kl_ref, gain.side};
    for (int i = 0; i < 4; ++i) put(outputs.rows.data, 4 * row + i, numbers[i], wide);
    const double shares[3] = {share, grad_log_ratio, grad_kl_ref};
    for (int i = 0; i < 3; ++i) put(outputs.shares.data, 3 * row + i, shares[i], wide);
    if (!counts) return;
    const double summed[6] = {1.0,          terms.log_ratio,           terms.kl_old,
                              terms.kl_ref, gain.side > 0 ? 1.0 : 0.0, gain.side < 0 ? 1.0 : 0.0};
    for (int i = 0; i < 6; ++i) step_sums[static_cast<std::size_t>(6 * step + i)] += summed[i];
  });
  put(outputs.loss.data, 0, loss, wide);
  for (std::size_t i = 0; i < step_sums.size(); ++i)
    put(outputs.step_sums.data, static_cast<std::int64_t>(i), step_sums[i], wide);
}

void ppo_loss_backward(const PPOLoss& op, const PPOLossOutputs& outputs, const PPOLossOutputs& grads,
                       const PPOLoss& gradients, const Threads& threads) {
  const LogRatio& ratio = op.ratio;
  const bool wide = is_wide(ratio);
  const void* shares = outputs.shares.data;
  const double outer = scalar_at(grads.loss.data, 0, wide);
  write_gradient(ratio, gradients.ratio.model_output, threads, [&](std::int64_t row) {
    const double grad_log_ratio = outer * scalar_at(shares, 3 * row + 1, wide);
    const double grad_kl_ref = outer * scalar_at(shares, 3 * row + 2, wide);
    const RowCoefficients coefficients = coefficients_of(ratio.transition, row, wide);
    RatioGradient gradient = ratio_gradient(grad_log_ratio, 0.0, 0.0, coefficients.gain, ratio.scale);
    if (op.is_normalized != 0) gradient = {gradient.noise * coefficients.std, 0.0, 0.0};
    gradient.anchor_difference =
        ratio.scale * 2.0 * grad_kl_ref * kl_gain(op, row, coefficients.gain);
    return gradient;
  });
}

const Registered<&log_ratio> registered_ratio("cpu.log_ratio");
const Registered<&log_ratio_backward> registered_ratio_backward("cpu.log_ratio_backward");
const Registered<&ppo_loss> registered_loss("cpu.ppo_loss");
const Registered<&ppo_loss_backward> registered_loss_backward("cpu.ppo_loss_backward");

}  // namespace
}  // namespace lacfast::cpu
