// Scalar maths of the Gaussian transition  x' = a x + b v + std eps : normals, log-prob and ratio from their sums.
#pragma once

#include <math.h>
#include <cstdint>
#include <cstring>

#include "inline.h"

namespace lacfast {

// ---- Box-Muller in float32, written without branches so that loops over it vectorise.

// 24 random bits to (0, 1]: never 0, so the logarithm below is finite.
LACFAST_INLINE float uniform_from_bits(std::uint32_t bits) {
  return static_cast<float>(static_cast<std::int32_t>(bits >> 8)) * 0x1p-24f + 0x1p-25f;
}

// Natural logarithm of a normal positive number; polynomial of Cephes' logf, within 2 ulp.
LACFAST_INLINE float log_positive(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // x = m 2^e with m in [sqrt(1/2), sqrt(2))
  const std::int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const std::int32_t mantissa_bits = bits - exponent * (1 << 23);
  float mantissa;
  std::memcpy(&mantissa, &mantissa_bits, sizeof mantissa);
  const float e = static_cast<float>(exponent);
  const float r = mantissa - 1.0f;
  const float z = r * r;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  return r + (p * r * z - 2.12194440e-4f * e - 0.5f * z) + 0.693359375f * e;
}

struct NormalPair {
  float first, second;
};

// sqrt(-2 ln u) (cos 2 pi w, sin 2 pi w); the angle is reduced exactly, in turns.
LACFAST_INLINE NormalPair box_muller(float u, float w) {
  const float radius = sqrtf(-2.0f * log_positive(u));
  const auto quadrant = static_cast<std::int32_t>(w * 4.0f + 0.5f);
  const float angle = (w - static_cast<float>(quadrant) * 0.25f) * 6.28318530717958648f;
  const float z = angle * angle;
  const float sine =
      angle + angle * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - 1.9515295891e-4f * z));
  const float cosine =
      1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + 2.443315711809948e-5f * z));
  const bool swap = (quadrant & 1) != 0;
  const float abs_cos = swap ? sine : cosine;
  const float abs_sin = swap ? cosine : sine;
  const float turned_cos = ((quadrant + 1) & 2) != 0 ? -abs_cos : abs_cos;
  const float turned_sin = (quadrant & 2) != 0 ? -abs_sin : abs_sin;
  return {radius * turned_cos, radius * turned_sin};
}

// ---- A transition's densities from sums over the N elements of one latent. `scale` is 1/N for a mean, 1 for a sum.

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

struct RatioGradient {
  double noise, old_difference, anchor_difference;
};

// d (g0 log_ratio + g1 kl_old + g2 kl_ref) / dv = noise eps + old_difference dv + anchor_difference (v - v_ref)
LACFAST_INLINE RatioGradient ratio_gradient(double g0, double g1, double g2, double gain, double scale) {
  return {scale * g0 * gain, scale * (g1 - g0) * gain * gain, scale * g2 * gain * gain};
}

}  // namespace lacfast
