// The advantage pipeline on the CPU and, where it was compiled, on CUDA.
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "addresses.h"

namespace lacfast {
namespace {

RewardConditions conditions(int num_rewards, const std::vector<int>& on, const std::vector<double>& thresholds) {
  const auto size = static_cast<std::size_t>(num_rewards);
  if (num_rewards < 1 || num_rewards > kMaxRewards || on.size() != size || thresholds.size() != size) {
    throw std::invalid_argument("1 to 16 rewards, and a condition for each");
  }
  RewardConditions result{};
  for (std::size_t m = 0; m < size; ++m) {
    if (on[m] < -1 || on[m] >= num_rewards) throw std::invalid_argument("a condition on a reward that is not there");
    result.on[m] = static_cast<std::int8_t>(on[m]);
    result.threshold[m] = thresholds[m];
  }
  return result;
}

AdvantageSums sums(std::int64_t rows, std::int64_t steps, int num_rewards, int heads, bool rewards_per_step,
                   bool scalarized, int code, double gamma, double gae_lambda, double value_lambda, double target_clip,
                   const std::vector<int>& on, const std::vector<double>& thresholds, Address rewards, Address values,
                   Address reward_mean, Address reward_std, Address weights, Address mask, Address raw,
                   Address targets) {
  return {rows,
          steps,
          num_rewards,
          heads,
          rewards_per_step,
          scalarized,
          dtype(code),
          gamma,
          gae_lambda,
          value_lambda,
          target_clip,
          conditions(num_rewards, on, thresholds),
          pointer<const void>(rewards),
          pointer<const void>(values),
          pointer<const void>(reward_mean),
          pointer<const void>(reward_std),
          pointer<const void>(weights),
          pointer<const std::uint8_t>(mask),
          pointer(raw),
          pointer(targets)};
}

AdvantageApply apply(std::int64_t rows, std::int64_t steps, int heads, bool scalarized, bool normalize_heads, int code,
                     double advantage_clip, Address raw, Address weights, Address mask, Address moments,
                     std::int64_t partials, Address advantages) {
  return {rows,
          steps,
          heads,
          scalarized,
          normalize_heads,
          dtype(code),
          advantage_clip,
          pointer<const void>(raw),
          pointer<const void>(weights),
          pointer<const std::uint8_t>(mask),
          pointer<const double>(moments),
          partials,
          pointer(advantages)};
}

// Defines `name` in Python for run(sums or apply, ...): what both devices take, then what one of them adds.
template <typename Op, typename... Fields, typename... More>
void define(py::module_& module, const char* name, Op (*make)(Fields...), void (*run)(const Op&, More...)) {
  module.def(
      name, [make, run](Fields... fields, More... more) { run(make(fields...), more...); }, ReleaseGil());
}

void sums_on_cpu(const AdvantageSums& op, Address moments) { cpu::advantage_sums(op, pointer<double>(moments)); }
void apply_on_cpu(const AdvantageApply& op) { cpu::advantage_apply(op); }

#if defined(LACFAST_WITH_CUDA)
void sums_on_cuda(const AdvantageSums& op, Address moments, Address stream) {
  cuda::advantage_sums(op, pointer<double>(moments), pointer(stream));
}
void apply_on_cuda(const AdvantageApply& op, Address stream) { cuda::advantage_apply(op, pointer(stream)); }
#endif

}  // namespace

void bind_advantages(py::module_& module) {
  define(module, "advantage_sums", &sums, &sums_on_cpu);
  define(module, "advantage_apply", &apply, &apply_on_cpu);
#if defined(LACFAST_WITH_CUDA)
  module.def("cuda_advantage_partials", &cuda::advantage_partials);
  define(module, "cuda_advantage_sums", &sums, &sums_on_cuda);
  define(module, "cuda_advantage_apply", &apply, &apply_on_cuda);
#endif
}

}  // namespace lacfast
