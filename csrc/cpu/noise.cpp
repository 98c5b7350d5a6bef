// normal_noise: runs of the latents that are drawn.

#include "runs.h"

namespace lacfast::cpu {
namespace {

void normal_noise(const NormalNoise& op, const NormalNoiseOutputs& outputs, const Threads& threads) {
  const Kernels& chosen = kernels();
  for_each_run(shape_of(outputs.noise), threads,
               [&](Run run, std::size_t) { chosen.normal_noise(op, run, outputs.noise); });
}

const Registered<&normal_noise> registered("cpu.normal_noise");

}  // namespace
}  // namespace lacfast::cpu
