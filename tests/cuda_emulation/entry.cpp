// The CUDA ops under C names, with the arguments of csrc/bindings in their order.
#include "../../csrc/ops.h"

using lacfast::DType;
using Int = std::int64_t;

namespace {

lacfast::Gae gae_of(Int rows, Int steps, Int heads, Int dtype, double gamma, double gae_lambda, double value_lambda) {
  return {rows, steps, heads, static_cast<DType>(dtype), gamma, gae_lambda, value_lambda};
}

}  // namespace

extern "C" {

void cuda_gae(Int rows, Int steps, Int heads, Int dtype, double gamma, double gae_lambda, double value_lambda,
              void* rewards, void* values, void* advantages, void* returns, void* stream) {
  lacfast::cuda::gae(gae_of(rows, steps, heads, dtype, gamma, gae_lambda, value_lambda), rewards, values, advantages,
                     returns, stream);
}

void cuda_gae_backward(Int rows, Int steps, Int heads, Int dtype, double gamma, double gae_lambda, double value_lambda,
                       void* grad_advantages, void* grad_returns, void* grad_rewards, void* grad_values,
                       void* stream) {
  lacfast::cuda::gae_backward(gae_of(rows, steps, heads, dtype, gamma, gae_lambda, value_lambda), grad_advantages,
                              grad_returns, grad_rewards, grad_values, stream);
}

Int cuda_advantage_partials(Int rows, Int heads) {
  return lacfast::cuda::advantage_partials(rows, static_cast<int>(heads));
}

void cuda_advantage_sums(Int rows, Int steps, Int num_rewards, Int heads, Int rewards_per_step, Int scalarized,
                         Int dtype, double gamma, double gae_lambda, double value_lambda, double target_clip,
                         const Int* on, const double* thresholds, void* rewards, void* values, void* reward_mean,
                         void* reward_std, void* weights, std::uint8_t* mask, void* raw, void* targets,
                         double* moments, void* stream) {
  lacfast::AdvantageSums op{rows,
                            steps,
                            static_cast<int>(num_rewards),
                            static_cast<int>(heads),
                            rewards_per_step != 0,
                            scalarized != 0,
                            static_cast<DType>(dtype),
                            gamma,
                            gae_lambda,
                            value_lambda,
                            target_clip,
                            {},
                            rewards,
                            values,
                            reward_mean,
                            reward_std,
                            weights,
                            mask,
                            raw,
                            targets};
  for (Int m = 0; m < num_rewards; ++m) {
    op.conditions.on[m] = static_cast<std::int8_t>(on[m]);
    op.conditions.threshold[m] = thresholds[m];
  }
  lacfast::cuda::advantage_sums(op, moments, stream);
}

void cuda_advantage_apply(Int rows, Int steps, Int heads, Int scalarized, Int normalize_heads, Int dtype,
                          double advantage_clip, void* raw, void* weights, std::uint8_t* mask, double* moments,
                          Int partials, void* advantages, void* stream) {
  lacfast::cuda::advantage_apply({rows, steps, static_cast<int>(heads), scalarized != 0, normalize_heads != 0,
                                  static_cast<DType>(dtype), advantage_clip, raw, weights, mask, moments, partials,
                                  advantages},
                                 stream);
}

void cuda_effective_sample_size(Int groups, Int particles, Int dtype, void* log_weights, void* sizes, void* stream) {
  lacfast::cuda::effective_sample_size({groups, particles, static_cast<DType>(dtype), log_weights}, sizes, stream);
}

void cuda_systematic_resample(Int groups, Int particles, Int dtype, void* log_weights, Int* steps, Int* seed,
                              Int* group_ids, Int* ancestors, void* stream) {
  lacfast::cuda::systematic_resample({groups, particles, static_cast<DType>(dtype), log_weights},
                                     {steps, seed, group_ids, ancestors}, stream);
}

}  // extern "C"
