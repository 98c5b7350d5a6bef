// Picks the kernels of this processor's instruction set.

#include <stdexcept>
#include <string>

#include "../build.h"
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
  const std::int64_t table_steps = transition.coefficients.sizes[0];
  for (std::int64_t row = 0; row < (transition.steps.numel == 1 ? 1 : rows); ++row) {
    const std::int64_t step = step_of(transition, row);
    if (step < 0 || step >= table_steps) {
      throw std::invalid_argument("steps[" + std::to_string(row) + "] = " + std::to_string(step) +
                                  " is outside the coefficients' " + std::to_string(table_steps) +
                                  " rows; use 0 to " + std::to_string(table_steps - 1));
    }
  }
}

}  // namespace lacfast::cpu
