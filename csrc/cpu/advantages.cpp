// The advantage pipeline: hands on to the kernels of this processor.
#include "runs.h"

namespace lacfast::cpu {

void advantage_sums(const AdvantageSums& op, double* moments) { kernels().advantage_sums(op, moments); }

void advantage_apply(const AdvantageApply& op) { kernels().advantage_apply(op); }

}  // namespace lacfast::cpu
