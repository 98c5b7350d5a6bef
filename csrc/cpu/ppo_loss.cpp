// log_ratio and ppo_loss: from the sums of runs to ratios, KLs and losses.

#include <memory>
#include <stdexcept>

#include "../common/ppo.h"
#include "runs.h"

namespace lacfast::cpu {
namespace {

bool is_wide(const LogRatio& op) { return op.model_output.dtype == DType::float64; }

// The sums of a row's runs, added in their order.
RatioSums sums_of_row(const std::vector<RatioSums>& partial, std::int64_t row, std::int64_t per_row) {
  RatioSums sums{0.0, 0.0, 0.0};
  for (std::int64_t i = row * per_row; i < (row + 1) * per_row; ++i) {
    const RatioSums& part = partial[static_cast<std::size_t>(i)];
    sums.noise_dot += part.noise_dot;
    sums.old_squared += part.old_squared;
    sums.anchor_squared += part.anchor_squared;
  }
  return sums;
}

// finish(row, sums) for every row, in order. Rows that a mask leaves out are not read; their sums are 0.
template <typename Finish>
void for_each_row(const LogRatio& op, const bool* mask, Threads threads, const Finish& finish) {
  const Shape shape = shape_of(op.model_output);
  check_steps(op.transition, shape.rows);
  const std::int64_t per_row = runs_per_row(shape);
  std::vector<RatioSums> partial(static_cast<std::size_t>(shape.rows * per_row), RatioSums{0.0, 0.0, 0.0});
  const Kernels& chosen = kernels();
  for_each_run(shape, threads, [&](Run run, std::size_t index) {
    if (mask == nullptr || mask[run.row]) partial[index] = chosen.log_ratio(op, run, {0.0, 0.0}, nullptr);
  });
  for (std::int64_t row = 0; row < shape.rows; ++row) finish(row, sums_of_row(partial, row, per_row));
}

// gradient(row) of every row's terms, applied to its latent.
template <typename Gradient>
void write_gradient(const LogRatio& op, Result grad_model_output, Threads threads, const Gradient& gradient) {
  const Shape shape = shape_of(op.model_output);
  check_steps(op.transition, shape.rows);
  const Kernels& chosen = kernels();
  for_each_run(shape, threads, [&](Run run, std::size_t) {
    chosen.log_ratio_backward(op, run, gradient(run.row), nullptr, grad_model_output);
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

// What a row adds to the loss and to the statistics. `counts`: not masked.
struct RowLoss {
  bool counts;
  RatioTerms terms;
  double side, share;
};

// Of a row's sums: the row's entries of `outputs`, and what remains to be added over the rows.
RowLoss put_row(const PPOLoss& op, std::int64_t row, const RatioSums& sums, double count,
                const PPOLossOutputs& outputs) {
  const bool wide = is_wide(op.ratio);
  const bool* mask = op.mask.as<const bool>();
  const RowCoefficients coefficients = coefficients_of(op.ratio.transition, row, wide);
  RowLoss loss{mask == nullptr || mask[row], {0.0, 0.0, 0.0}, 0.0, 0.0};
  double grad_log_ratio = 0.0, grad_kl_ref = 0.0;
  if (loss.counts && coefficients.std > 0.0) {
    loss.terms = terms_of(op, row, sums, coefficients);
    const SurrogateGain gain = surrogate_gain(loss.terms.log_ratio, loss.terms.kl_old,
                                              scalar_at(op.advantages.data, row, wide), op.bounds);
    const double weight = row_weight(op, row, step_of(op.ratio.transition, row), wide) / count;
    loss.side = gain.side;
    loss.share = weight * (op.kl_weight * loss.terms.kl_ref - gain.gain);
    grad_log_ratio = -weight * gain.grad_log_ratio;
    grad_kl_ref = weight * op.kl_weight;
  }
  const double numbers[4] = {loss.terms.log_ratio, loss.terms.kl_old, loss.terms.kl_ref, loss.side};
  for (int i = 0; i < 4; ++i) put(outputs.rows.data, 4 * row + i, numbers[i], wide);
  const double shares[3] = {loss.share, grad_log_ratio, grad_kl_ref};
  for (int i = 0; i < 3; ++i) put(outputs.shares.data, 3 * row + i, shares[i], wide);
  return loss;
}

// The rows in their order.
void put_sums(const PPOLoss& op, const std::vector<RowLoss>& rows, const PPOLossOutputs& outputs) {
  const bool wide = is_wide(op.ratio);
  const Transition& transition = op.ratio.transition;
  std::vector<double> step_sums(static_cast<std::size_t>(6 * transition.coefficients.sizes[0]), 0.0);
  double loss = 0.0;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const RowLoss& own = rows[row];
    loss += own.share;
    if (!own.counts) continue;
    const double summed[6] = {1.0,          own.terms.log_ratio,      own.terms.kl_old,
                              own.terms.kl_ref, own.side > 0 ? 1.0 : 0.0, own.side < 0 ? 1.0 : 0.0};
    const std::int64_t step = step_of(transition, static_cast<std::int64_t>(row));
    for (int i = 0; i < 6; ++i) step_sums[static_cast<std::size_t>(6 * step + i)] += summed[i];
  }
  put(outputs.loss.data, 0, loss, wide);
  for (std::size_t i = 0; i < step_sums.size(); ++i)
    put(outputs.step_sums.data, static_cast<std::int64_t>(i), step_sums[i], wide);
}

void ppo_loss(const PPOLoss& op, const PPOLossOutputs& outputs, const Threads& threads) {
  const std::int64_t num_rows = op.ratio.model_output.sizes[0];
  const bool* mask = op.mask.as<const bool>();
  const double count = rows_that_count(mask, num_rows);
  std::vector<RowLoss> rows(static_cast<std::size_t>(num_rows));
  for_each_row(op.ratio, mask, threads, [&](std::int64_t row, const RatioSums& sums) {
    rows[static_cast<std::size_t>(row)] = put_row(op, row, sums, count, outputs);
  });
  put_sums(op, rows, outputs);
}

// Of a row's log-ratio, in whatever way it is defined.
RatioDirection row_direction(const PPOLoss& op, std::int64_t row) {
  const RowCoefficients coefficients = coefficients_of(op.ratio.transition, row, is_wide(op.ratio));
  const RatioDirection direction = ratio_direction(1.0, 0.0, coefficients.gain, op.ratio.scale);
  return op.is_normalized == 0 ? direction : RatioDirection{direction.noise * coefficients.std, 0.0};
}

// Of a row whose shares are known, where the loss has the gradient `outer`.
RatioGradient row_gradient(const PPOLoss& op, std::int64_t row, const PPOLossOutputs& outputs, double outer) {
  const bool wide = is_wide(op.ratio);
  const double grad_log_ratio = outer * scalar_at(outputs.shares.data, 3 * row + 1, wide);
  const double grad_kl_ref = outer * scalar_at(outputs.shares.data, 3 * row + 2, wide);
  const double gain = coefficients_of(op.ratio.transition, row, wide).gain;
  return {row_direction(op, row), grad_log_ratio, op.ratio.scale * 2.0 * grad_kl_ref * kl_gain(op, row, gain)};
}

void ppo_loss_backward(const PPOLoss& op, const PPOLossOutputs& outputs, const PPOLossOutputs& grads,
                       const PPOLoss& gradients, const Threads& threads) {
  const double outer = scalar_at(grads.loss.data, 0, is_wide(op.ratio));
  write_gradient(op.ratio, gradients.ratio.model_output, threads,
                 [&](std::int64_t row) { return row_gradient(op, row, outputs, outer); });
}

// Loss and gradient in one, the bits of both as above. Up to a number for each row the gradient is known before its sums, so
// it is written beside them, and scaled while it is in the cache: the last run is there more likely than the first.
void ppo_loss_and_gradient(const PPOLoss& op, const PPOLossOutputs& outputs, const Ahead& ahead, const Threads& threads) {
  const LogRatio& ratio = op.ratio;
  const Shape shape = shape_of(ratio.model_output);
  check_steps(ratio.transition, shape.rows);
  const std::int64_t per_row = runs_per_row(shape), helpers = worthwhile_threads(shape, threads);
  const bool* mask = op.mask.as<const bool>();
  const double count = rows_that_count(mask, shape.rows);
  const Kernels& chosen = kernels();
  std::vector<RowLoss> rows(static_cast<std::size_t>(shape.rows));
  std::vector<RatioSums> partial(static_cast<std::size_t>(shape.rows * per_row), RatioSums{0.0, 0.0, 0.0});
  // Where a row's gradient is kept: in its tensor if that has the arithmetic type, else in `room`.
  const Result grad = ahead.gradient;
  const bool is_narrow = grad.dtype != DType::float32 && grad.dtype != DType::float64;
  const auto room_for = [&](std::int64_t num_rows) {
    return std::unique_ptr<float[]>(is_narrow ? new float[static_cast<std::size_t>(num_rows * shape.elements)] : nullptr);
  };
  const auto place_of = [&](std::int64_t row, float* room, std::int64_t row_of_room) -> void* {
    if (is_narrow) return room + row_of_room * shape.elements;
    if (grad.dtype == DType::float32) return static_cast<float*>(grad.data) + row * shape.elements;
    return static_cast<double*>(grad.data) + row * shape.elements;
  };
  const auto add = [&](Run run, std::int64_t index, void* place) {
    if (mask != nullptr && !mask[run.row]) return;
    partial[static_cast<std::size_t>(index)] = chosen.log_ratio(ratio, run, row_direction(op, run.row), place);
  };
  const auto finish = [&](std::int64_t row) {
    rows[static_cast<std::size_t>(row)] = put_row(op, row, sums_of_row(partial, row, per_row), count, outputs);
  };
  const auto scale = [&](Run run, const void* place) {
    chosen.log_ratio_backward(ratio, run, row_gradient(op, run.row, outputs, ahead.outer), place, grad);
  };
  if (shape.rows % helpers == 0 || shape.rows >= 4 * helpers) {
    share_tasks(shape.rows, helpers, [&](const auto& next_task) {
      const std::unique_ptr<float[]> room = room_for(1);
      for (std::int64_t row; next_task(row);) {
        void* place = place_of(row, room.get(), 0);
        for (std::int64_t i = 0; i < per_row; ++i) add(run_of(shape, row, i), row * per_row + i, place);
        finish(row);
        for (std::int64_t i = per_row - 1; i >= 0; --i) scale(run_of(shape, row, i), place);
      }
    });
  } else {
    // Too few rows for every thread to have as many as the others: threads share the runs of all.
    const std::unique_ptr<float[]> room = room_for(shape.rows);
    const auto row_place = [&](std::int64_t row) { return place_of(row, room.get(), row); };
    for_each_run(shape, threads,
                 [&](Run run, std::size_t index) { add(run, static_cast<std::int64_t>(index), row_place(run.row)); });
    for (std::int64_t row = 0; row < shape.rows; ++row) finish(row);
    for_each_run(shape, threads, [&](Run run, std::size_t) { scale(run, row_place(run.row)); });
  }
  put_sums(op, rows, outputs);
}

const Registered<&log_ratio> registered_ratio("cpu.log_ratio");
const Registered<&log_ratio_backward> registered_ratio_backward("cpu.log_ratio_backward");
const Registered<&ppo_loss> registered_loss("cpu.ppo_loss");
const Registered<&ppo_loss_backward> registered_loss_backward("cpu.ppo_loss_backward");
const Registered<&ppo_loss_and_gradient> registered_loss_and_gradient("cpu.ppo_loss_and_gradient");

}  // namespace
}  // namespace lacfast::cpu
