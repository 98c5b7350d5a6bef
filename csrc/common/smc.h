// Particles of sequential Monte Carlo. Every processor must choose the same ancestors, so a particle's weight becomes an
// integer by operations that all round alike, and what follows is exact integer arithmetic in any order.
#pragma once

#include <math.h>
#include <cstdint>

#include "inline.h"
#include "philox.h"

namespace lacfast {

constexpr int kMaxParticles = 4096;

// Never contracted to a fused multiply-add, which rounds once where these round twice.
LACFAST_INLINE double multiply(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

LACFAST_INLINE double add(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(x, y);
#else
  return x + y;
#endif
}

// log w - max, 0 at the maximum even where that is infinite, -inf for NaN.
LACFAST_INLINE double below_maximum(double log_weight, double maximum) {
  if (log_weight == maximum) return 0.0;
  const double below = log_weight - maximum;
  return below <= 0.0 ? below : -HUGE_VAL;
}

// The larger of two, taking NaN for -inf.
LACFAST_INLINE double larger_weight(double maximum, double log_weight) {
  return log_weight > maximum ? log_weight : maximum;
}

// floor(2^36 exp(x)) for x <= 0.
LACFAST_INLINE std::int64_t integer_weight(double x) {
  constexpr double log2_e = 1.4426950408889634;
  // ln 2 to 32 bits, so that a small multiple is exact; the rest follows.
  constexpr double ln_2_high = 6.93147180369123816490e-01;
  constexpr double ln_2_low = 1.90821492927058770002e-10;
  // exp(-40) 2^36 < 1
  if (!(x > -40.0)) return 0;
  const double exponent = rint(multiply(x, log2_e));
  const double r = add(add(x, -multiply(exponent, ln_2_high)), -multiply(exponent, ln_2_low));
  double p = 1.0 / 479001600.0;
  p = add(multiply(p, r), 1.0 / 39916800.0);
  p = add(multiply(p, r), 1.0 / 3628800.0);
  p = add(multiply(p, r), 1.0 / 362880.0);
  p = add(multiply(p, r), 1.0 / 40320.0);
  p = add(multiply(p, r), 1.0 / 5040.0);
  p = add(multiply(p, r), 1.0 / 720.0);
  p = add(multiply(p, r), 1.0 / 120.0);
  p = add(multiply(p, r), 1.0 / 24.0);
  p = add(multiply(p, r), 1.0 / 6.0);
  p = add(multiply(p, r), 0.5);
  p = add(multiply(p, r), 1.0);
  p = add(multiply(p, r), 1.0);
  return static_cast<std::int64_t>(multiply(p, 0x1p36)) >> static_cast<int>(-exponent);
}

// (2 (word >> 8) + 1) / 2^25 in (0, 1), as its numerator. The counter's first word is one that no latent's noise has.
LACFAST_INLINE std::int64_t resampling_uniform(std::int64_t seed, std::int64_t step, std::int64_t group_id) {
  const PhiloxWords words = philox4x32_10(noise_counter(0xFFFFFFFFu, step, group_id), noise_key(seed));
  return 2 * std::int64_t{words.w0 >> 8} + 1;
}

// floor((i + u) total / N), u = uniform / 2^25, by quotient and remainder: with weights below 2^37 and N up to 4096 no
// product needs more than 62 bits.
LACFAST_INLINE std::int64_t resampling_position(std::int64_t index, std::int64_t uniform, std::int64_t total,
                                                std::int64_t particles) {
  const std::int64_t quotient = total / particles;
  const std::int64_t remainder = total % particles;
  const std::int64_t share = uniform * quotient;
  const std::int64_t rest = (share & 0x1FFFFFF) * particles + (index * 0x2000000 + uniform) * remainder;
  return index * quotient + (share >> 25) + rest / (particles * 0x2000000);
}

// First j with cumulative[j] > position.
LACFAST_INLINE std::int64_t first_above(const std::int64_t* cumulative, std::int64_t particles, std::int64_t position) {
  std::int64_t low = 0;
  std::int64_t high = particles - 1;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (cumulative[middle] > position) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace lacfast
