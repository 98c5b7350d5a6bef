// Splits an op into runs of one latent, gives them to the kernels of this processor's instruction set, and turns
// their sums into log-probs, ratios and losses.

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../common/ppo.h"
#include "kernels.h"

namespace lacfast::cpu {
namespace {

constexpr std::int64_t kRun = 16 * kBlock;
// Below this a second thread costs more than it saves.
constexpr std::int64_t kElementsWorthThreads = 1'000'000;

struct Level {
  const Kernels* kernels;
  const char* name;
};

Level detect() {
#if defined(LACFAST_X86)
  __builtin_cpu_init();
  // The features of x86-64-v3 that the compiler may use.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
      __builtin_cpu_supports("movbe")) {
    return {&v3::kernels, "x86-64-v3"};
  }
  return {&v2::kernels, "x86-64-v2"};
#else
  return {&base::kernels, "portable"};
#endif
}

const Level& level() {
  static const Level chosen = detect();
  return chosen;
}

std::int64_t runs_per_row(Shape shape) { return (shape.elements + kRun - 1) / kRun; }

// body(run, index) for every run of every row; threads take runs as they come, results are kept by index.
template <typename Body>
void for_each_run(Shape shape, int threads, const Body& body) {
  const std::int64_t per_row = runs_per_row(shape);
  const std::int64_t total = shape.rows * per_row;
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < total;) {
      const std::int64_t begin = index % per_row * kRun;
      const std::int64_t end = begin + kRun < shape.elements ? begin + kRun : shape.elements;
      body(Run{index / per_row, begin, end}, static_cast<std::size_t>(index));
    }
  };
  std::vector<std::thread> helpers;
  if (shape.rows * shape.elements >= kElementsWorthThreads) {
    for (int i = 1; i < threads && i < total; ++i) helpers.emplace_back(work);
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

double scalar_at(const void* data, std::int64_t index, bool wide) {
  return wide ? static_cast<const double*>(data)[index] : static_cast<double>(static_cast<const float*>(data)[index]);
}

void put(void* data, std::int64_t index, double value, bool wide) {
  if (wide) {
    static_cast<double*>(data)[index] = value;
  } else {
    static_cast<float*>(data)[index] = static_cast<float>(value);
  }
}

void check_steps(const Transition& transition, std::int64_t rows) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t step = transition.steps[row];
    if (step < 0 || step >= transition.table_steps) {
      throw std::invalid_argument("steps[" + std::to_string(row) + "] = " + std::to_string(step) +
                                  " is outside the coefficients' " + std::to_string(transition.table_steps) +
                                  " rows; use 0 to " + std::to_string(transition.table_steps - 1));
    }
  }
}

struct RowCoefficients {
  double std, gain;
};

RowCoefficients coefficients_of(const Transition& transition, std::int64_t row, bool wide) {
  const std::int64_t at = 3 * transition.steps[row];
  const double std = scalar_at(transition.coefficients, at + 2, wide);
  return {std, innovation_gain(scalar_at(transition.coefficients, at + 1, wide), std)};
}

// finish(row, terms) for every row of log_ratio.
template <typename Finish>
void ratio_rows(const LogRatio& op, int threads, const Finish& finish) {
  check_steps(op.transition, op.shape.rows);
  const std::int64_t per_row = runs_per_row(op.shape);
  std::vector<RatioSums> partial(static_cast<std::size_t>(op.shape.rows * per_row));
  const Kernels& kernels = *level().kernels;
  for_each_run(op.shape, threads, [&](Run run, std::size_t index) { partial[index] = kernels.log_ratio(op, run); });
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

const char* instruction_set() { return level().name; }

void normal_noise(Shape shape, const std::int64_t* steps, const std::int64_t* seed, const std::int64_t* sample_ids,
                  float* out, int threads) {
  const Kernels& kernels = *level().kernels;
  for_each_run(shape, threads,
               [&](Run run, std::size_t) { kernels.normal_noise(shape, run, steps, seed, sample_ids, out); });
}

void gaussian_step(const GaussianStep& op, int threads) {
  check_steps(op.transition, op.shape.rows);
  const std::int64_t per_row = runs_per_row(op.shape);
  std::vector<double> partial(static_cast<std::size_t>(op.shape.rows * per_row));
  const Kernels& kernels = *level().kernels;
  for_each_run(op.shape, threads,
               [&](Run run, std::size_t index) { partial[index] = kernels.gaussian_step(op, run); });
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
  const Kernels& kernels = *level().kernels;
  const bool wide = op.model_output.dtype == DType::float64;
  for_each_run(op.shape, threads, [&](Run run, std::size_t) {
    const double gain = coefficients_of(op.transition, run.row, wide).gain;
    const std::int64_t at = 3 * run.row;
    const RatioGradient gradient =
        ratio_gradient(scalar_at(grad_terms, at, wide), scalar_at(grad_terms, at + 1, wide),
                       scalar_at(grad_terms, at + 2, wide), gain, op.scale);
    kernels.log_ratio_backward(op, run, gradient, grad_model_output);
  });
}

void gae(const Gae& op, const void* rewards, const void* values, void* advantages, void* returns) {
  level().kernels->gae(op, rewards, values, advantages, returns);
}

void gae_backward(const Gae& op, const void* grad_advantages, const void* grad_returns, void* grad_rewards,
                  void* grad_values) {
  level().kernels->gae_backward(op, grad_advantages, grad_returns, grad_rewards, grad_values);
}

}  // namespace lacfast::cpu
