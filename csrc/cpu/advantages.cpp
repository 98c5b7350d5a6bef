// The advantage pipeline: hands on to the kernels of this processor.
#include "runs.h"

namespace lacfast::cpu {
namespace {

void advantage_sums(const AdvantageSums& op, const AdvantageSumsOutputs& outputs, const Threads&) {
  kernels().advantage_sums(op, outputs);
}

void advantage_apply(const AdvantageApply& op, const AdvantageApplyOutputs& outputs, const Threads&) {
  kernels().advantage_apply(op, outputs);
}

const Registered<&advantage_sums> registered_sums("cpu.advantage_sums");
const Registered<&advantage_apply> registered_apply("cpu.advantage_apply");

}  // namespace
}  // namespace lacfast::cpu
