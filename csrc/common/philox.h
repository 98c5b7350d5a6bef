// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) and our use of its counter.
//
// key     = (seed low 32, seed high 32)
// counter = (element / 4, step, sample id low 32, sample id high 32)
// One counter gives the four words of elements 4q .. 4q+3, so the noise of an element depends on nothing else:
// not on the batch it is drawn in, the number of devices, or the order of the draws.
#pragma once

#include <cstdint>

#include "inline.h"

namespace lacfast {

struct PhiloxWords {
  std::uint32_t w0, w1, w2, w3;
};

struct PhiloxKey {
  std::uint32_t k0, k1;
};

LACFAST_INLINE PhiloxWords philox4x32_10(PhiloxWords counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter.w0;
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * counter.w2;
    const auto high0 = static_cast<std::uint32_t>(product0 >> 32);
    const auto high1 = static_cast<std::uint32_t>(product1 >> 32);
    counter = {high1 ^ counter.w1 ^ key.k0, static_cast<std::uint32_t>(product1), high0 ^ counter.w3 ^ key.k1,
               static_cast<std::uint32_t>(product0)};
    key.k0 += 0x9E3779B9u;
    key.k1 += 0xBB67AE85u;
  }
  return counter;
}

LACFAST_INLINE PhiloxKey noise_key(std::int64_t seed) {
  const auto bits = static_cast<std::uint64_t>(seed);
  return {static_cast<std::uint32_t>(bits), static_cast<std::uint32_t>(bits >> 32)};
}

LACFAST_INLINE PhiloxWords noise_counter(std::uint32_t quad, std::int64_t step, std::int64_t sample_id) {
  const auto id = static_cast<std::uint64_t>(sample_id);
  return {quad, static_cast<std::uint32_t>(static_cast<std::uint64_t>(step)), static_cast<std::uint32_t>(id),
          static_cast<std::uint32_t>(id >> 32)};
}

}  // namespace lacfast
