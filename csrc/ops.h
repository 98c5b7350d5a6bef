// What the kernels take: raw pointers to contiguous tensors, read as records. Nothing here knows of torch.
//
// A tensor of shape (B, ...) is `rows` latents of `elements` values each. Every operand carries its own storage type;
// the maths is float32, or float64 where the model output is float64, and so are coefficients, advantages and outputs
// that are not latents ("arithmetic type" below).
#pragma once

#include <cstdint>
#include <string>

namespace lacfast {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

struct Operand {
  const void* data;  // null: not given
  DType dtype;
};

struct Result {
  void* data;  // null: not wanted
  DType dtype;
};

// Noise given as a tensor, or drawn from Philox when `given.data` is null.
struct Noise {
  Operand given;
  const std::int64_t* seed;        // (1,)
  const std::int64_t* sample_ids;  // (rows,)
};

// Rows of the table (a, b, std) in the arithmetic type, and the row that each sample uses.
struct Transition {
  const void* coefficients;   // (table_steps, 3)
  std::int64_t table_steps;
  const std::int64_t* steps;  // (rows,), or (1,) when all samples share their step
  bool is_shared = false;
};

struct Shape {
  std::int64_t rows, elements;
};

// Where the results of all steps lie; step k of the table fills slice k, and of the latents slice k + 1.
struct TrajectorySlab {
  Result latents;        // (table_steps + 1, rows, elements)
  Result model_outputs;  // (table_steps, rows, elements)
  void* log_probs;       // (table_steps, rows) arithmetic type
};

// sample and prev_sample may be the same tensor, and so may guided_output and one that it is made from.
struct GaussianStep {
  Shape shape;
  Operand sample, model_output, uncond_output;
  const float* guidance_scale;  // (1,), with uncond_output
  Transition transition;
  Noise noise;
  double scale;
  Result prev_sample;
  void* log_prob;  // (rows,) arithmetic type, or null
  Result guided_output;
  TrajectorySlab slab;  // all null: none
};

struct StepLogProb {
  Shape shape;
  Operand sample, model_output, prev_sample;
  Transition transition;
  double scale;
};

// Null where nobody asks for the gradient.
struct StepLogProbGradients {
  Result sample, model_output, prev_sample;
};

struct LogRatio {
  Shape shape;
  Operand model_output, old_model_output, reference_output;
  Transition transition;
  Noise noise;
  double scale;
};

struct Bounds {
  double clip_low, clip_high;  // of the ratio, around 1; infinity: off
  double dual_clip;            // gain >= dual_clip A where A < 0; infinity: off
  double kl_threshold;         // of the KL mask; infinity: off
};

struct PPOLoss {
  LogRatio transition_ratio;
  const void* kl_gains;  // (table_steps,) arithmetic type, or null for b^2 / (2 std^2)
  bool is_normalized;    // log_ratio = reduce( eps b dv ), GRPO-Guard's RatioNorm
};

struct Surrogate {
  const void* advantages;    // (rows,) arithmetic type
  const void* weights;       // (rows,) arithmetic type, or null for ones
  const void* step_weights;  // (table_steps,) arithmetic type, or null for ones
  const bool* mask;          // (rows,), or null for all
  Bounds bounds;
  double kl_weight;
};

// Of the arithmetic type.
struct PPOResults {
  void* loss;       // ()
  void* rows;       // (rows, 4): log_ratio, kl_old, kl_ref, side of the active bound
  void* step_sums;  // (table_steps, 6): count, log_ratio, kl_old, kl_ref, clipped from above, from below
  void* shares;     // (rows, 3): share of the loss, its derivatives by log_ratio and by kl_ref
};

struct Gae {
  std::int64_t rows, steps, heads;
  DType dtype;
  double gamma, gae_lambda, value_lambda;
};

constexpr int kMaxRewards = 16;

// Reward m counts only where reward on[m] of the trajectory reaches threshold[m]; on[m] = -1: always.
struct RewardConditions {
  std::int8_t on[kMaxRewards];
  double threshold[kMaxRewards];
};

// GAE of standardised rewards. Everything but `values` is in the arithmetic type.
struct AdvantageSums {
  std::int64_t rows, steps;
  int num_rewards, heads;  // equal, or one head of the weighted rewards when scalarized
  bool rewards_per_step, scalarized;
  DType dtype;  // of the values
  double gamma, gae_lambda, value_lambda, target_clip;
  RewardConditions conditions;
  const void* rewards;  // (rows, num_rewards), or (rows, steps, num_rewards) per step
  const void* values;   // (rows, steps, heads)
  const void *reward_mean, *reward_std, *weights;  // (num_rewards,)
  const std::uint8_t* mask;                        // (rows,), or null: all count
  void *raw, *targets;                             // (rows, steps, heads)
};

// Combination and normalisation, from the moments that `partials` rows of numbers add up to.
struct AdvantageApply {
  std::int64_t rows, steps;
  int heads;
  bool scalarized, normalize_heads;
  DType dtype;  // arithmetic type
  double advantage_clip;
  const void *raw, *weights;
  const std::uint8_t* mask;
  const double* moments;  // (partials, 1 + heads + heads^2)
  std::int64_t partials;
  void* advantages;  // (rows, steps)
};

// Groups of particles; log_weights float32 or float64.
struct Particles {
  std::int64_t groups, particles;
  DType dtype;
  const void* log_weights;  // (groups, particles)
};

struct Resampling {
  const std::int64_t* steps;      // (groups,)
  const std::int64_t* seed;       // (1,)
  const std::int64_t* group_ids;  // (groups,)
  std::int64_t* ancestors;        // (groups, particles)
};

// Attention of `heads` queries per sample over `tokens` tokens of `dim` features. Arithmetic type: float64 where the
// features are float64, else float32.
struct ValuePool {
  std::int64_t rows, tokens, heads, dim;
  Operand features, query, norm_weight;  // (rows, tokens, dim), (rows, heads, dim), (dim,) or null for ones
  double eps;
};

// What its forward leaves for its backward, in the arithmetic type; all null when nothing is to be kept.
struct PoolSaved {
  void* pooled;       // (rows, heads, dim) sum of p r x, the output before the norm's weight
  void* log_sum_exp;  // (rows, heads) of the scores
  void* token_stats;  // (rows, heads + 1, tokens): every head's scores, then 1 / rms
};

namespace cpu {

void normal_noise(Shape shape, const std::int64_t* steps, const std::int64_t* seed, const std::int64_t* sample_ids,
                  float* out, int threads);
void gaussian_step(const GaussianStep& op, int threads);
// log_prob, grad_log_prob (rows,) arithmetic type
void step_log_prob(const StepLogProb& op, void* log_prob, int threads);
void step_log_prob_backward(const StepLogProb& op, const void* grad_log_prob, const StepLogProbGradients& gradients,
                            int threads);
// terms (rows, 3): log_ratio, kl_old, kl_ref
void log_ratio_forward(const LogRatio& op, void* terms, int threads);
void ppo_loss_forward(const PPOLoss& op, const Surrogate& surrogate, const PPOResults& results, int threads);
// shares (rows, 3) of the forward, grad_loss ()
void ppo_loss_backward(const PPOLoss& op, const void* shares, const void* grad_loss, Result grad_model_output,
                       int threads);
void log_ratio_backward(const LogRatio& op, const void* grad_terms, Result grad_model_output, int threads);
void gae(const Gae& op, const void* rewards, const void* values, void* advantages, void* returns);
void gae_backward(const Gae& op, const void* grad_advantages, const void* grad_returns, void* grad_rewards,
                  void* grad_values);
// moments (1 + heads + heads^2,)
void advantage_sums(const AdvantageSums& op, double* moments);
void advantage_apply(const AdvantageApply& op);
// sizes (groups,) arithmetic type
void effective_sample_size(const Particles& op, void* sizes);
void systematic_resample(const Particles& op, const Resampling& resampling);
void value_pool(const ValuePool& op, Result out, const PoolSaved& saved, int threads);
// A null result is not computed; without grad_features nothing of the features' size is written.
void value_pool_backward(const ValuePool& op, const PoolSaved& saved, Operand grad, Result grad_features,
                         Result grad_query, Result grad_norm_weight, int threads);
// The instruction set in use: "x86-64-v2", "x86-64-v3" or "portable".
const char* instruction_set();

}  // namespace cpu

namespace cuda {

// Empty when a kernel of ours can run on the current machine, else the reason why not.
std::string unusable_reason();
void gae(const Gae& op, const void* rewards, const void* values, void* advantages, void* returns, void* stream);
void gae_backward(const Gae& op, const void* grad_advantages, const void* grad_returns, void* grad_rewards,
                  void* grad_values, void* stream);
// How many rows of moments advantage_sums writes; a function of the shape alone, so that sums have one order.
std::int64_t advantage_partials(std::int64_t rows, int heads);
// moments (partials, 1 + heads + heads^2)
void advantage_sums(const AdvantageSums& op, double* moments, void* stream);
void advantage_apply(const AdvantageApply& op, void* stream);
void effective_sample_size(const Particles& op, void* sizes, void* stream);
void systematic_resample(const Particles& op, const Resampling& resampling, void* stream);

}  // namespace cuda

}  // namespace lacfast
