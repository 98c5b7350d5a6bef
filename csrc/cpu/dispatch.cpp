// Picks the kernels of this processor's instruction set, and hands on the ops that need no more than that.

#include <stdexcept>
#include <string>

#include "runs.h"

namespace lacfast::cpu {
namespace {

struct Level {
  const Kernels* kernels;
  const char* name;
};

Level detect() {
#if defined(LACFAST_X86)
  __builtin_cpu_init();
  // The features of x86-64-v3 that the compiler may use.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
      __builtin_cpu_supports("movbe")) {
    return {&v3::kernels, "x86-64-v3"};
  }
  return {&v2::kernels, "x86-64-v2"};
#else
  return {&base::kernels, "portable"};
#endif
}

const Level& level() {
  static const Level chosen = detect();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *level().kernels; }

const char* instruction_set() { return level().name; }

void check_steps(const Transition& transition, std::int64_t rows) {
  for (std::int64_t row = 0; row < (transition.is_shared ? 1 : rows); ++row) {
    const std::int64_t step = transition.steps[row];
    if (step < 0 || step >= transition.table_steps) {
      throw std::invalid_argument("steps[" + std::to_string(row) + "] = " + std::to_string(step) +
                                  " is outside the coefficients' " + std::to_string(transition.table_steps) +
                                  " rows; use 0 to " + std::to_string(transition.table_steps - 1));
    }
  }
}

void normal_noise(Shape shape, const std::int64_t* steps, const std::int64_t* seed, const std::int64_t* sample_ids,
                  float* out, int threads) {
  const Kernels& chosen = kernels();
  for_each_run(shape, threads,
               [&](Run run, std::size_t) { chosen.normal_noise(shape, run, steps, seed, sample_ids, out); });
}

void gae(const Gae& op, const void* rewards, const void* values, void* advantages, void* returns) {
  kernels().gae(op, rewards, values, advantages, returns);
}

void gae_backward(const Gae& op, const void* grad_advantages, const void* grad_returns, void* grad_rewards,
                  void* grad_values) {
  kernels().gae_backward(op, grad_advantages, grad_returns, grad_rewards, grad_values);
}

}  // namespace lacfast::cpu
