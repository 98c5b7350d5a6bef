// Particles on the CPU: some thousand numbers per group, so plain loops.
#include "../common/smc.h"

#include "runs.h"

namespace lacfast::cpu {
namespace {

// log w of one group in float64, and the largest of them; -inf where nothing has a weight.
struct Group {
  std::vector<double> log_weights;
  double maximum;
};

void read_group(const SizedTensor& log_weights, std::int64_t index, Group& group) {
  const bool wide = log_weights.dtype == DType::float64;
  const std::int64_t particles = log_weights.sizes[1];
  group.log_weights.resize(static_cast<std::size_t>(particles));
  group.maximum = -HUGE_VAL;
  for (std::int64_t i = 0; i < particles; ++i) {
    const double log_weight = scalar_at(log_weights.data, index * particles + i, wide);
    group.log_weights[static_cast<std::size_t>(i)] = log_weight;
    group.maximum = larger_weight(group.maximum, log_weight);
  }
}

void effective_sample_size(const EffectiveSampleSize& op, const EffectiveSampleSizeOutputs& outputs, const Threads&) {
  Group group;
  for (std::int64_t index = 0; index < op.log_weights.sizes[0]; ++index) {
    read_group(op.log_weights, index, group);
    double sum = 0.0;
    double squares = 0.0;
    if (group.maximum > -HUGE_VAL) {
      for (const double log_weight : group.log_weights) {
        const double weight = exp(below_maximum(log_weight, group.maximum));
        sum += weight;
        squares += weight * weight;
      }
    }
    put(outputs.sizes.data, index, squares > 0.0 ? sum * sum / squares : 0.0, op.log_weights.dtype == DType::float64);
  }
}

void systematic_resample(const SystematicResample& op, const SystematicResampleOutputs& outputs, const Threads&) {
  Group group;
  const std::int64_t particles = op.log_weights.sizes[1];
  std::vector<std::int64_t> cumulative(static_cast<std::size_t>(particles));
  for (std::int64_t index = 0; index < op.log_weights.sizes[0]; ++index) {
    read_group(op.log_weights, index, group);
    std::int64_t total = 0;
    for (std::size_t i = 0; i < cumulative.size(); ++i) {
      // Without any weight all are equal, and equal weights keep every particle.
      const bool has_weight = group.maximum > -HUGE_VAL;
      total += integer_weight(has_weight ? below_maximum(group.log_weights[i], group.maximum) : 0.0);
      cumulative[i] = total;
    }
    const std::int64_t uniform =
        resampling_uniform(*op.seed.as<const std::int64_t>(), op.steps.as<const std::int64_t>()[index],
                           op.group_ids.as<const std::int64_t>()[index]);
    std::int64_t ancestor = 0;
    for (std::int64_t i = 0; i < particles; ++i) {
      const std::int64_t position = resampling_position(i, uniform, total, particles);
      // Positions ascend, so the search goes on where it was.
      while (cumulative[static_cast<std::size_t>(ancestor)] <= position) ++ancestor;
      outputs.ancestors.as<std::int64_t>()[index * particles + i] = ancestor;
    }
  }
}

const Registered<&effective_sample_size> registered_size("cpu.effective_sample_size");
const Registered<&systematic_resample> registered_resample("cpu.systematic_resample");

}  // namespace
}  // namespace lacfast::cpu
