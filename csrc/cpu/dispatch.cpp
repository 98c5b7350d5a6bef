// Picks the kernels of an instruction set: the newest that this processor has, or the one that was asked for.

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../build.h"
#include "runs.h"

namespace lacfast::cpu {
namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
  bool is_usable;
};

// From the oldest to the newest.
const std::vector<Level>& levels() {
#if defined(LACFAST_X86)
  static const std::vector<Level> all = [] {
    __builtin_cpu_init();
    // The features of each level that the compiler may use.
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("movbe");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    const bool v4_bf16 = v4 && __builtin_cpu_supports("avx512bf16");
    return std::vector<Level>{{"x86-64-v2", &v2::kernels, true},
                              {"x86-64-v3", &v3::kernels, v3},
                              {"x86-64-v4", &v4::kernels, v4},
                              {"x86-64-v4+bf16", &v4bf16::kernels, v4_bf16}};
  }();
#else
  static const std::vector<Level> all{{"portable", &base::kernels, true}};
#endif
  return all;
}

const Level& level_named(const std::string& name) {
  std::string usable;
  for (const Level& level : levels()) {
    if (level.is_usable && name == level.name) return level;
    if (level.is_usable) usable += (usable.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not one that this processor and build have; use one of " +
                              usable + " in LACFAST_INSTRUCTION_SET, or leave it unset for the newest");
}

const Level& preferred_level() {
  const char* wanted = std::getenv("LACFAST_INSTRUCTION_SET");
  if (wanted != nullptr && *wanted != '\0') return level_named(wanted);
  const Level* newest = nullptr;
  for (const Level& level : levels())
    if (level.is_usable) newest = &level;
  return *newest;
}

std::atomic<const Level*>& chosen_level() {
  static std::atomic<const Level*> chosen{&preferred_level()};
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *chosen_level().load(std::memory_order_relaxed)->kernels; }

std::string instruction_set() { return chosen_level().load(std::memory_order_relaxed)->name; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.is_usable) names.push_back(level.name);
  return names;
}

void use_instruction_set(const std::string& name) { chosen_level().store(&level_named(name), std::memory_order_relaxed); }

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
