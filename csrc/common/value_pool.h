// Scalar maths of the attention pooling that reads a value function out of features.
#pragma once

#include <math.h>
#include <cstdint>
#include <cstring>

#include "../ops.h"
#include "inline.h"

namespace lacfast {

LACFAST_INLINE std::int64_t tokens_of(const ValuePool& op) { return op.features.sizes[1]; }
LACFAST_INLINE std::int64_t dim_of(const ValuePool& op) { return op.features.sizes[2]; }
LACFAST_INLINE std::int64_t heads_of(const ValuePool& op) { return op.query.sizes[1]; }

// e^x for x <= 88, without branches so that loops over it vectorise; 1e-38 and not 0 far below. Polynomial of Cephes'
// expf, within 2 ulp. NaN stays NaN.
LACFAST_INLINE float exp_of(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  // Adding 1.5 2^23 leaves the nearest integer in the low bits.
  const float shifted = bounded * 1.44269504088896341f + 12582912.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const float n = shifted - 12582912.0f;
  const float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const std::uint32_t power_bits = (bits - 0x4b400000u + 127u) << 23;
  float power;
  std::memcpy(&power, &power_bits, sizeof power);
  return (p * r * r + r + 1.0f) * power;
}
LACFAST_INLINE double exp_of(double x) { return exp(x); }

LACFAST_INLINE float log_of(float x) { return logf(x); }
LACFAST_INLINE double log_of(double x) { return log(x); }

LACFAST_INLINE float reciprocal_root(float x) { return 1.0f / sqrtf(x); }
LACFAST_INLINE double reciprocal_root(double x) { return 1.0 / sqrt(x); }

}  // namespace lacfast
