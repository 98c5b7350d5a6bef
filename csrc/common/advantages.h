// From rewards and values to normalised advantages, number by number: rewards of a chain, the recursion, moments, and
// the affine map that the moments give.
#pragma once

#include <math.h>
#include <cstdint>

#include "../ops.h"
#include "inline.h"

namespace lacfast {

// ---- Sizes

LACFAST_INLINE std::int64_t rows_of(const AdvantageSums& op) { return op.values.sizes[0]; }
LACFAST_INLINE std::int64_t steps_of(const AdvantageSums& op) { return op.values.sizes[1]; }
LACFAST_INLINE int heads_of(const AdvantageSums& op) { return static_cast<int>(op.values.sizes[2]); }
LACFAST_INLINE int rewards_of(const AdvantageSums& op) { return static_cast<int>(op.weights.numel); }
// Whether there is a reward after every step. Of a single step either way has the same numbers.
LACFAST_INLINE bool rewards_per_step(const AdvantageSums& op) { return op.rewards.numel > rows_of(op) * rewards_of(op); }

// ---- Rewards

// Reward m of one trajectory; its mean, which counts nothing, where the reward that it depends on has not passed.
template <typename A>
LACFAST_INLINE A conditioned_reward(const AdvantageSums& op, const A* row, int reward) {
  const std::int64_t on = op.conditions_on.at[reward];
  if (on >= 0 && !(static_cast<double>(row[on]) >= op.thresholds.at[reward])) return op.reward_mean.as<const A>()[reward];
  return row[reward];
}

// The standardised reward of a head after step `step` of trajectory `row`. The running mean is that of a trajectory's
// sum, so it is taken off once, at the last step. A scalarized head earns the weighted sum of all rewards.
template <typename A>
LACFAST_INLINE A standardized_reward(const AdvantageSums& op, std::int64_t row, std::int64_t step, int head) {
  const A* mean = op.reward_mean.as<const A>();
  const A* std = op.reward_std.as<const A>();
  const A* weights = op.weights.as<const A>();
  const bool is_last = step == steps_of(op) - 1;
  if (!rewards_per_step(op) && !is_last) return A{0};
  const std::int64_t at = rewards_per_step(op) ? row * steps_of(op) + step : row;
  const A* given = op.rewards.as<const A>() + at * rewards_of(op);
  const int first = op.scalarized != 0 ? 0 : head;
  const int last = op.scalarized != 0 ? rewards_of(op) - 1 : head;
  A total = 0;
  for (int reward = first; reward <= last; ++reward) {
    const A raw = conditioned_reward(op, given, reward);
    const A standardized = (is_last ? raw - mean[reward] : raw) / std[reward];
    total += op.scalarized != 0 ? weights[reward] * standardized : standardized;
  }
  return total;
}

// ---- The recursion of gae.h written for lambda-returns G, with A_k = G_k - V_k:
//   G_k = r_k + gamma (1 - lambda) V_{k+1} + gamma lambda G_{k+1},   G_T = V_T = 0
// With lambda = gamma = 1 the return of every step is the reward itself, not the reward up to rounding.

template <typename A>
struct ReturnDecay {
  A policy_value, policy_return, target_value, target_return;
};

template <typename A>
LACFAST_INLINE ReturnDecay<A> return_decay(const AdvantageSums& op) {
  return {static_cast<A>(op.gamma * (1.0 - op.gae_lambda)), static_cast<A>(op.gamma * op.gae_lambda),
          static_cast<A>(op.gamma * (1.0 - op.value_lambda)), static_cast<A>(op.gamma * op.value_lambda)};
}

// Runs backwards over the steps of one chain; starts as zeros after the last step.
template <typename A>
struct ReturnState {
  A next_value, policy_return, target_return;
};

template <typename A>
LACFAST_INLINE void return_step(ReturnState<A>& state, A reward, A value, const ReturnDecay<A>& decay) {
  state.policy_return = reward + decay.policy_value * state.next_value + decay.policy_return * state.policy_return;
  state.target_return = reward + decay.target_value * state.next_value + decay.target_return * state.target_return;
  state.next_value = value;
}

// Within [-bound, bound]; NaN stays NaN.
template <typename A>
LACFAST_INLINE A bounded(A value, A bound) {
  return value < -bound ? -bound : (value > bound ? bound : value);
}

// ---- Moments of M heads as one row of numbers: n, sum A_m, sum A_i A_j.

LACFAST_INLINE int moment_count(int heads) { return 1 + heads + heads * heads; }

// The heads (i, j) whose product is number `index` >= 1 of the row; j = -1 for a sum of A_i alone.
struct MomentHeads {
  int i, j;
};

LACFAST_INLINE MomentHeads moment_heads(int index, int heads) {
  if (index <= heads) return {index - 1, -1};
  return {(index - 1 - heads) / heads, (index - 1 - heads) % heads};
}

// ---- advantages = sum_m scale_m (A_m - center_m), of mean 0 and deviation 1

struct Combination {
  double center[kMaxRewards], scale[kMaxRewards];
};

// 1 / sqrt(variance); 0 where the variance is rounding of the mean square, for then nothing varies. NaN stays NaN.
LACFAST_INLINE double inverse_std(double variance, double mean_square) {
  constexpr double rounding = 1e-12;
  return variance <= rounding * mean_square ? 0.0 : 1.0 / sqrt(variance);
}

// weight(m): w_m of a head. Divides every head by its own deviation first where `normalize_heads`.
template <typename Weight>
LACFAST_INLINE void combination_from_moments(const double* moments, int heads, bool normalize_heads, Weight weight,
                                             Combination& result) {
  const double count = moments[0] > 1.0 ? moments[0] : 1.0;
  const double degrees = moments[0] > 2.0 ? moments[0] - 1.0 : 1.0;
  const double* first = moments + 1;
  const double* second = moments + 1 + heads;
  for (int m = 0; m < heads; ++m) {
    const double mean = first[m] / count;
    const double square = second[m * heads + m];
    result.center[m] = mean;
    result.scale[m] = weight(m);
    if (normalize_heads) result.scale[m] *= inverse_std((square - moments[0] * mean * mean) / degrees, square / count);
  }
  double variance = 0.0;
  double mean_square = 0.0;
  for (int i = 0; i < heads; ++i) {
    for (int j = 0; j < heads; ++j) {
      const double gain = result.scale[i] * result.scale[j];
      const double product = second[i * heads + j];
      variance += gain * (product - moments[0] * result.center[i] * result.center[j]) / degrees;
      mean_square += fabs(gain * product) / count;
    }
  }
  const double inverse = inverse_std(variance, mean_square);
  for (int m = 0; m < heads; ++m) result.scale[m] *= inverse;
}

}  // namespace lacfast
