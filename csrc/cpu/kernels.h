// The vectorised kernels that core.inc defines once per instruction set, as a table to pick at run time.
#pragma once

#include "../common/gaussian.h"
#include "../common/value_pool.h"
#include "../ops.h"

namespace lacfast::cpu {

// Elements converted to the arithmetic type at a time; a few such blocks fit the L1 cache. Sums are added block by
// block, so a value depends neither on the batch around it nor on the number of threads.
constexpr std::int64_t kBlock = 1024;

// Tokens of value_pool that are scored and summed before the next are read: a tile and its vectors fit the L2 cache.
constexpr int kTile = 16;
// Numbers to which its vectors are padded with zeros: two of the widest registers, eight of the narrowest.
constexpr std::int64_t kPad = 32;

LACFAST_INLINE std::int64_t padded_dim(const ValuePool& op) { return (dim_of(op) + kPad - 1) / kPad * kPad; }

// Of the arithmetic type, for one run at a time: queries, gradients, two tiles, four numbers per head and token.
LACFAST_INLINE std::int64_t pool_scratch_numbers(const ValuePool& op) {
  return 2 * (heads_of(op) + kTile) * padded_dim(op) + heads_of(op) * (3 * kTile + 2);
}
// What a run of the forward leaves: per head a vector, a maximum and a total, padded for the next run's vectors.
LACFAST_INLINE std::int64_t pool_partial_numbers(const ValuePool& op) {
  return heads_of(op) * padded_dim(op) + (2 * heads_of(op) + kPad - 1) / kPad * kPad;
}

// Elements [begin, end) of one latent, where begin is a multiple of kBlock; or tokens of one sample, of kTile.
struct Run {
  std::int64_t row, begin, end;
};

struct Kernels {
  void (*normal_noise)(const NormalNoise& op, Run run, const SizedTensor& out);
  // Returns sum (x' - mu)^2 of the stored x'. A null slab keeps nothing.
  double (*gaussian_step)(const GaussianStep& op, Run run, const GaussianStepOutputs& outputs,
                          const Slab& slab);
  // Returns sum (x' - mu)^2.
  double (*step_log_prob)(const StepLogProb& op, Run run);
  // `weight` times the gradient of -(x' - mu)^2 / 2; 0 where the step is deterministic.
  void (*step_log_prob_backward)(const StepLogProb& op, Run run, double weight, const StepLogProb& gradients);
  // `kept`, unless null, receives in the arithmetic type what `direction` is at every number of the latent.
  RatioSums (*log_ratio)(const LogRatio& op, Run run, const RatioDirection& direction, void* kept);
  // `kept`, unless null, is that of the gradient's direction; it may be the gradient itself.
  void (*log_ratio_backward)(const LogRatio& op, Run run, const RatioGradient& gradient, const void* kept,
                             Result grad_model_output);
  // Of chains [first, last); chain row * heads + head is one head of one row.
  void (*gae)(const Gae& op, std::int64_t first, std::int64_t last, const GaeOutputs& outputs);
  void (*gae_backward)(const Gae& op, std::int64_t first, std::int64_t last, const GaeOutputs& grads,
                       const Gae& gradients);
  void (*advantage_sums)(const AdvantageSums& op, const AdvantageSumsOutputs& outputs);
  void (*advantage_apply)(const AdvantageApply& op, const AdvantageApplyOutputs& outputs);
  void (*value_pool)(const ValuePool& op, Run run, void* scratch, void* partial, void* token_stats);
  // Adds the partials of a sample's runs, which lie one after the other, in their order.
  void (*value_pool_finish)(const ValuePool& op, std::int64_t row, std::int64_t runs, void* partials,
                            const ValuePoolOutputs& outputs);
  // `partial` (heads, padded dim), or null where only grad_features is wanted.
  void (*value_pool_backward)(const ValuePool& op, Run run, const ValuePoolOutputs& saved, Operand grad, void* scratch,
                              void* partial, Result grad_features);
  void (*value_pool_backward_finish)(const ValuePool& op, std::int64_t row, std::int64_t runs, void* partials,
                                     Result grad_query);
  void (*value_pool_norm_weight)(const ValuePool& op, const ValuePoolOutputs& saved, Operand grad, const void* partials,
                                 std::int64_t row_stride, Result grad_norm_weight);
};

#if defined(LACFAST_X86)
namespace v2 {
extern const Kernels kernels;
}
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}
namespace v4bf16 {
extern const Kernels kernels;
}
#else
namespace base {
extern const Kernels kernels;
}
#endif

}  // namespace lacfast::cpu
