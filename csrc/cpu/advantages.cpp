// The advantage pipeline: hands on to the kernels of this processor.
#include "../common/advantages.h"

#include "runs.h"

namespace lacfast::cpu {
namespace {

void advantage_sums(const AdvantageSums& op, const AdvantageSumsOutputs& outputs, const Threads&) {
  kernels().advantage_sums(op, outputs);
}

void advantage_apply(const AdvantageApply& op, const AdvantageApplyOutputs& outputs, const Threads&) {
  kernels().advantage_apply(op, outputs);
}

void normalized_advantages(const AdvantageSums& op, const Normalization& settings, const NormalizationOutputs& outputs,
                           const Threads&) {
  double moments[1 + kMaxRewards + kMaxRewards * kMaxRewards];
  const SizedTensor sums{{moments, DType::float64}, 1 + heads_of(op) + heads_of(op) * heads_of(op), {1, 1, 1}};
  kernels().advantage_sums(op, {outputs.raw, outputs.targets, sums});
  kernels().advantage_apply({outputs.raw, op.weights, op.mask, sums, op.scalarized, settings.normalize_heads,
                             settings.advantage_clip},
                            {outputs.advantages});
}

const Registered<&advantage_sums> registered_sums("cpu.advantage_sums");
const Registered<&advantage_apply> registered_apply("cpu.advantage_apply");
const Registered<&normalized_advantages> registered_both("cpu.normalized_advantages");

}  // namespace
}  // namespace lacfast::cpu
