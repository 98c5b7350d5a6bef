// PPO's surrogate for one (sample, step), its gradient, and the bound that stops it: the clip (Schulman et al., arXiv
// 1707.06347, equation 7), the dual clip (arXiv 1912.09729) and the KL mask (Flow-DPPO, arXiv 2606.11025).
#pragma once

#include <math.h>

#include "../ops.h"
#include "inline.h"

namespace lacfast {

struct SurrogateGain {
  double gain;
  double grad_log_ratio;  // d gain / d log_ratio
  double side;            // +1 where a bound holds the ratio from above, -1 from below, else 0
};

// Every comparison is false for NaN, so a NaN ratio reaches the last line and stays NaN.
LACFAST_INLINE SurrogateGain surrogate_gain(double log_ratio, double kl_old, double advantage, const Bounds& bounds) {
  const double excess = expm1(log_ratio);
  const bool is_masked = bounds.kl_threshold < HUGE_VAL && kl_old >= bounds.kl_threshold;
  if (is_masked && log_ratio * advantage > 0.0) return {0.0, 0.0, log_ratio > 0.0 ? 1.0 : -1.0};
  if (advantage > 0.0 && excess > bounds.clip_high) return {(1.0 + bounds.clip_high) * advantage, 0.0, 1.0};
  if (advantage < 0.0 && excess < -bounds.clip_low) return {(1.0 - bounds.clip_low) * advantage, 0.0, -1.0};
  if (advantage < 0.0 && excess > bounds.dual_clip - 1.0) return {bounds.dual_clip * advantage, 0.0, 1.0};
  const double gain = advantage + excess * advantage;
  return {gain, gain, 0.0};
}

}  // namespace lacfast
