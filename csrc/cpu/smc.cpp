// Particles on the CPU: some thousand numbers per group, so plain loops.
#include "../common/smc.h"

#include "../ops.h"
#include "runs.h"

namespace lacfast::cpu {
namespace {

// log w of one group in float64, and the largest of them; -inf where nothing has a weight.
struct Group {
  std::vector<double> log_weights;
  double maximum;
};

void read_group(const Particles& op, std::int64_t index, Group& group) {
  const bool wide = op.dtype == DType::float64;
  group.log_weights.resize(static_cast<std::size_t>(op.particles));
  group.maximum = -HUGE_VAL;
  for (std::int64_t i = 0; i < op.particles; ++i) {
    const double log_weight = scalar_at(op.log_weights, index * op.particles + i, wide);
    group.log_weights[static_cast<std::size_t>(i)] = log_weight;
    group.maximum = larger_weight(group.maximum, log_weight);
  }
}

}  // namespace

void effective_sample_size(const Particles& op, void* sizes) {
  Group group;
  for (std::int64_t index = 0; index < op.groups; ++index) {
    read_group(op, index, group);
    double sum = 0.0;
    double squares = 0.0;
    if (group.maximum > -HUGE_VAL) {
      for (const double log_weight : group.log_weights) {
        const double weight = exp(below_maximum(log_weight, group.maximum));
        sum += weight;
        squares += weight * weight;
      }
    }
    put(sizes, index, squares > 0.0 ? sum * sum / squares : 0.0, op.dtype == DType::float64);
  }
}

void systematic_resample(const Particles& op, const Resampling& resampling) {
  Group group;
  std::vector<std::int64_t> cumulative(static_cast<std::size_t>(op.particles));
  for (std::int64_t index = 0; index < op.groups; ++index) {
    read_group(op, index, group);
    std::int64_t total = 0;
    for (std::size_t i = 0; i < cumulative.size(); ++i) {
      // Without any weight all are equal, and equal weights keep every particle.
      const bool has_weight = group.maximum > -HUGE_VAL;
      total += integer_weight(has_weight ? below_maximum(group.log_weights[i], group.maximum) : 0.0);
      cumulative[i] = total;
    }
    const std::int64_t uniform =
        resampling_uniform(*resampling.seed, resampling.steps[index], resampling.group_ids[index]);
    std::int64_t ancestor = 0;
    for (std::int64_t i = 0; i < op.particles; ++i) {
      const std::int64_t position = resampling_position(i, uniform, total, op.particles);
      // Positions ascend, so the search goes on where it was.
      while (cumulative[static_cast<std::size_t>(ancestor)] <= position) ++ancestor;
      resampling.ancestors[index * op.particles + i] = ancestor;
    }
  }
}

}  // namespace lacfast::cpu
