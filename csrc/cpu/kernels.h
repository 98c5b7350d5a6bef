// The vectorised kernels that core.inc defines once per instruction set, as a table to pick at run time.
#pragma once

#include "../common/gaussian.h"
#include "../ops.h"

namespace lacfast::cpu {

// Elements converted to the arithmetic type at a time; a few such blocks fit the L1 cache. Sums are added block by
// block, so a value depends neither on the batch around it nor on the number of threads.
constexpr std::int64_t kBlock = 1024;

// Elements [begin, end) of one latent; begin is a multiple of kBlock.
struct Run {
  std::int64_t row, begin, end;
};

LACFAST_INLINE std::int64_t step_of(const Transition& transition, std::int64_t row) {
  return transition.steps[transition.is_shared ? 0 : row];
}

struct Kernels {
  void (*normal_noise)(Shape shape, Run run, const std::int64_t* steps, const std::int64_t* seed,
                       const std::int64_t* sample_ids, float* out);
  // Returns sum (x' - mu)^2 of the stored x'.
  double (*gaussian_step)(const GaussianStep& op, Run run);
  // Returns sum (x' - mu)^2.
  double (*step_log_prob)(const StepLogProb& op, Run run);
  // `weight` times the gradient of -(x' - mu)^2 / 2; 0 where the step is deterministic.
  void (*step_log_prob_backward)(const StepLogProb& op, Run run, double weight, const StepLogProbGradients& gradients);
  RatioSums (*log_ratio)(const LogRatio& op, Run run);
  void (*log_ratio_backward)(const LogRatio& op, Run run, const RatioGradient& gradient, Result grad_model_output);
  void (*gae)(const Gae& op, const void* rewards, const void* values, void* advantages, void* returns);
  void (*gae_backward)(const Gae& op, const void* grad_advantages, const void* grad_returns, void* grad_rewards,
                       void* grad_values);
  void (*advantage_sums)(const AdvantageSums& op, double* moments);
  void (*advantage_apply)(const AdvantageApply& op);
};

#if defined(LACFAST_X86)
namespace v2 {
extern const Kernels kernels;
}
namespace v3 {
extern const Kernels kernels;
}
#else
namespace base {
extern const Kernels kernels;
}
#endif

}  // namespace lacfast::cpu
