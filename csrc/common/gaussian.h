// Scalar maths of the Gaussian transition  x' = a x + b v + std eps : log-prob and ratio from their sums.
#pragma once

#include <math.h>

#include "inline.h"

namespace lacfast {

// A transition's densities from sums over the N elements of one latent. `scale` is 1/N for a mean, 1 for a sum.

// log N(x'; mu, std^2 I) from sum (x' - mu)^2; a deterministic step has none and counts 0.
LACFAST_INLINE double log_prob_from_sum(double squared_distance, double std, double elements, double scale) {
  constexpr double half_log_two_pi = 0.91893853320467274178;
  if (std == 0.0) return 0.0;
  return -scale * (squared_distance / (2.0 * std * std) + elements * (log(std) + half_log_two_pi));
}

struct RatioSums {
  double noise_dot;        // sum eps (v - v_old)
  double old_squared;      // sum (v - v_old)^2
  double anchor_squared;  // sum (v - v_ref)^2
};

struct RatioTerms {
  double log_ratio, kl_old, kl_ref;
};

// Gain r = b / std, 0 for a deterministic step.
LACFAST_INLINE double innovation_gain(double b, double std) { return std == 0.0 ? 0.0 : b / std; }

// log_ratio = sum (eps r dv - (r dv)^2 / 2),  kl_old = sum (r dv)^2 / 2,  kl_ref = sum (r (v - v_ref))^2 / 2
LACFAST_INLINE RatioTerms ratio_terms(const RatioSums& sums, double gain, double scale) {
  const double kl_old = 0.5 * scale * gain * gain * sums.old_squared;
  return {scale * gain * sums.noise_dot - kl_old, kl_old, 0.5 * scale * gain * gain * sums.anchor_squared};
}

struct RatioDirection {
  double noise, old_difference;
};

// d (g0 log_ratio + g1 kl_old) / dv = noise eps + old_difference dv
LACFAST_INLINE RatioDirection ratio_direction(double g0, double g1, double gain, double scale) {
  return {scale * g0 * gain, scale * (g1 - g0) * gain * gain};
}

// along (noise eps + old_difference dv) + anchor_difference (v - v_ref)
struct RatioGradient {
  RatioDirection direction;
  double along, anchor_difference;
};

// d (g0 log_ratio + g1 kl_old + g2 kl_ref) / dv
LACFAST_INLINE RatioGradient ratio_gradient(double g0, double g1, double g2, double gain, double scale) {
  return {ratio_direction(g0, g1, gain, scale), 1.0, scale * g2 * gain * gain};
}

}  // namespace lacfast
