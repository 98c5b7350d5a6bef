// gae: chains shared among threads.
#include "../common/gae.h"

#include "runs.h"

namespace lacfast::cpu {
namespace {

// body(first, last) for ranges of chains of about a run's elements.
template <typename Body>
void for_each_range(const Gae& op, Threads threads, const Body& body) {
  // Chains that a kernel walks side by side, whatever the instruction set.
  constexpr std::int64_t kTogether = 16;
  const std::int64_t chains = op.rewards.sizes[0] * heads_of(op);
  const std::int64_t range = (kRun / steps_of(op) / kTogether + 1) * kTogether;
  const bool worth_threads = op.rewards.numel >= kElementsWorthThreads;
  share_tasks((chains + range - 1) / range, worth_threads ? threads.count : 1, [&](const auto& next_task) {
    for (std::int64_t index; next_task(index);) {
      const std::int64_t first = index * range;
      body(first, first + range < chains ? first + range : chains);
    }
  });
}

void gae(const Gae& op, const GaeOutputs& outputs, const Threads& threads) {
  const Kernels& chosen = kernels();
  for_each_range(op, threads, [&](std::int64_t first, std::int64_t last) { chosen.gae(op, first, last, outputs); });
}

void gae_backward(const Gae& op, const GaeOutputs&, const GaeOutputs& grads, const Gae& gradients,
                  const Threads& threads) {
  const Kernels& chosen = kernels();
  for_each_range(op, threads, [&](std::int64_t first, std::int64_t last) {
    chosen.gae_backward(op, first, last, grads, gradients);
  });
}

const Registered<&gae> registered("cpu.gae");
const Registered<&gae_backward> registered_backward("cpu.gae_backward");

}  // namespace
}  // namespace lacfast::cpu
