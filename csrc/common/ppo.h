// Clipped surrogate of PPO (Schulman et al., arXiv 1707.06347, equation 7) for one (sample, step), with its gradient.
#pragma once

#include <math.h>

#include "inline.h"

namespace lacfast {

struct ClippedSurrogate {
  double loss;              // -min(rho A, clip(rho, 1 - c, 1 + c) A)
  double grad_log_ratio;    // d loss / d log_ratio
  double clipped;           // +1 or -1 where the upper or lower clip is active, else 0
};

LACFAST_INLINE ClippedSurrogate clipped_surrogate(double log_ratio, double advantage, double clip_range) {
  const double ratio = exp(log_ratio);
  const double low = 1.0 - clip_range;
  const double high = 1.0 + clip_range;
  // Written so that a NaN ratio stays NaN.
  const double bounded = ratio < low ? low : (ratio > high ? high : ratio);
  const double unclipped_gain = ratio * advantage;
  const double clipped_gain = bounded * advantage;
  if (clipped_gain < unclipped_gain) return {-clipped_gain, 0.0, ratio > high ? 1.0 : -1.0};
  return {-unclipped_gain, -unclipped_gain, 0.0};
}

}  // namespace lacfast
