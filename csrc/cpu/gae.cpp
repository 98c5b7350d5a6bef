// gae: hands on to the kernels of this processor.
#include "runs.h"

namespace lacfast::cpu {
namespace {

void gae(const Gae& op, const GaeOutputs& outputs, const Threads&) { kernels().gae(op, outputs); }

void gae_backward(const Gae& op, const GaeOutputs&, const GaeOutputs& grads, const Gae& gradients, const Threads&) {
  kernels().gae_backward(op, grads, gradients);
}

const Registered<&gae> registered("cpu.gae");
const Registered<&gae_backward> registered_backward("cpu.gae_backward");

}  // namespace
}  // namespace lacfast::cpu
