// The records that the kernels take. A kernel reads its op's inputs and fills its outputs; one of a backward pass gets
// the inputs and outputs as far as they were kept, the outputs' gradients, and the inputs' gradients to fill.
//
// These are the NamedTuples of lacfast/ops, field by field: csrc/registry.h copies them in as words, and a test compares
// the names. Tensors are contiguous. A tensor of shape (B, ...) is `rows` latents of `elements` values each and carries
// its own storage type; the maths is float32, or float64 where the latents are float64, and so are coefficients,
// advantages and outputs that are not latents ("arithmetic type" below). Nothing here knows of torch.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace lacfast {

enum class DType : std::int64_t { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3, other = 4 };

struct Operand {
  const void* data;  // null: not given
  DType dtype;
};

struct Result {
  void* data;  // null: not wanted
  DType dtype;
};

struct Tensor {
  void* data;  // null: not given, or not wanted
  DType dtype;

  LACFAST_INLINE_MEMBER operator Operand() const { return {data, dtype}; }
  LACFAST_INLINE_MEMBER operator Result() const { return {data, dtype}; }
  template <typename T>
  LACFAST_INLINE_MEMBER T* as() const {
    return static_cast<T*>(data);
  }
};

struct SizedTensor : Tensor {
  std::int64_t numel;
  std::int64_t sizes[3];  // of the first dimensions; 1 beyond the last
};

using Flag = std::int64_t;

constexpr int kMaxListed = 16;

template <typename T>
struct List {
  std::int64_t count;
  T at[kMaxListed];
};

// How many threads may work on a CPU kernel, and where a CUDA kernel is put: the last record of each.
struct Threads {
  std::int64_t count;
};

struct Stream {
  void* handle;
};

struct Shape {
  std::int64_t rows, elements;
};

LACFAST_INLINE Shape shape_of(const SizedTensor& latents) { return {latents.sizes[0], latents.numel / latents.sizes[0]}; }

// Noise given as a tensor, or drawn from Philox when that is null.
struct Noise {
  Tensor noise, seed, sample_ids;  // (rows, ...), int64 (1,), int64 (rows,)
};

struct NormalNoise {
  Tensor steps, seed, sample_ids;  // int64 (rows,), (1,), (rows,)
  List<std::int64_t> shape;
};

struct NormalNoiseOutputs {
  SizedTensor noise;  // float32
};

// Rows of the table (a, b, std) in the arithmetic type, and the row that each sample uses.
struct Transition {
  SizedTensor coefficients;  // (table steps, 3)
  SizedTensor steps;         // int64 (rows,), or (1,) when all samples share their step
};

LACFAST_INLINE std::int64_t step_of(const Transition& transition, std::int64_t row) {
  return transition.steps.as<const std::int64_t>()[transition.steps.numel == 1 ? 0 : row];
}

struct GaussianStep {
  SizedTensor sample;
  Tensor model_output, uncond_output;
  Tensor guidance_scale;  // float32 (1,), with uncond_output
  Transition transition;
  Noise noise;
  double scale;
};

struct GaussianStepOutputs {
  Tensor prev_sample;    // may be the sample
  Tensor log_prob;       // (rows,) arithmetic type, or null
  Tensor guided_output;  // null without guidance, or where the slab has it
};

// Where the results of all steps lie; step k of the table fills slice k, and of the latents slice k + 1.
struct Slab {
  Tensor latents;        // (table steps + 1, rows, elements)
  Tensor model_outputs;  // (table steps, rows, elements)
  Tensor log_probs;      // (table steps, rows) arithmetic type
};

struct StepLogProb {
  SizedTensor sample;
  Tensor model_output, prev_sample;
  Transition transition;
  double scale;
};

struct StepLogProbOutputs {
  Tensor log_prob;  // (rows,)
};

struct LogRatio {
  SizedTensor model_output;
  Tensor old_model_output, anchor_output;
  Transition transition;
  Noise noise;
  double scale;
};

struct LogRatioOutputs {
  Tensor terms;  // (rows, 3): log_ratio, kl_old, kl_ref
};

struct Bounds {
  double clip_low, clip_high;  // of the ratio, around 1; infinity: off
  double dual_clip;            // gain >= dual_clip A where A < 0; infinity: off
  double kl_threshold;         // of the KL mask; infinity: off
};

// Of the arithmetic type, but for the mask. log_ratio reads the first record only.
struct PPOLoss {
  LogRatio ratio;
  Tensor advantages;    // (rows,)
  Tensor weights;       // (rows,), or null for ones
  Tensor step_weights;  // (table steps,), or null for ones
  Tensor mask;          // bool (rows,), or null for all
  Tensor kl_gains;      // (table steps,), or null for b^2 / (2 std^2)
  Flag is_normalized;   // log_ratio = reduce( eps b dv ), GRPO-Guard's RatioNorm
  Bounds bounds;
  double kl_weight;
};

struct PPOLossOutputs {
  Tensor loss;       // ()
  Tensor rows;       // (rows, 4): log_ratio, kl_old, kl_ref, side of the active bound
  Tensor step_sums;  // (table steps, 6): count, log_ratio, kl_old, kl_ref, clipped from above, from below
  Tensor shares;     // (rows, 3): share of the loss, its derivatives by log_ratio and by kl_ref
};

// A gradient that is made together with the loss, where the loss's own is `outer`.
struct Ahead {
  Tensor gradient;
  double outer;
};

struct Gae {
  SizedTensor rewards;  // (rows, steps, heads)
  Tensor values;
  double gamma, gae_lambda, value_lambda;
};

struct GaeOutputs {
  Tensor advantages, returns;
};

constexpr int kMaxRewards = 16;

// GAE of standardised rewards. Everything but `values` is in the arithmetic type. Reward m is its mean where
// reward conditions_on[m] of the trajectory is below thresholds[m]; -1: never.
struct AdvantageSums {
  SizedTensor rewards;             // (rows, rewards), or (rows, steps, rewards) per step
  SizedTensor values;              // (rows, steps, heads); as many heads as rewards, or one when scalarized
  Tensor reward_mean, reward_std;  // (rewards,)
  SizedTensor weights;             // (rewards,)
  Tensor mask;                     // bool (rows,), or null: all count
  Flag scalarized;
  List<std::int64_t> conditions_on;
  List<double> thresholds;
  double gamma, gae_lambda, value_lambda, target_clip;
};

struct AdvantageSumsOutputs {
  Tensor raw, targets;  // (rows, steps, heads)
  SizedTensor sums;     // float64 (parts, 1 + heads + heads^2)
};

// Combination and normalisation, from the moments that the parts add up to.
struct AdvantageApply {
  SizedTensor raw;
  Tensor weights, mask;
  SizedTensor sums;
  Flag scalarized, normalize_heads;
  double advantage_clip;
};

struct AdvantageApplyOutputs {
  Tensor advantages;  // (rows, steps)
};

// Of both passes in one, where no other rank adds its moments.
struct Normalization {
  Flag normalize_heads;
  double advantage_clip;
};

struct NormalizationOutputs {
  Tensor advantages;  // (rows, steps)
  SizedTensor raw;    // (rows, steps, heads)
  Tensor targets;
};

// Groups of particles, float32 or float64.
struct EffectiveSampleSize {
  SizedTensor log_weights;  // (groups, particles)
};

struct EffectiveSampleSizeOutputs {
  Tensor sizes;  // (groups,)
};

struct SystematicResample {
  SizedTensor log_weights;
  Tensor steps, seed, group_ids;  // int64 (groups,), (1,), (groups,)
};

struct SystematicResampleOutputs {
  Tensor ancestors;  // int64 (groups, particles)
};

// Attention of `heads` queries per sample over `tokens` tokens of `dim` features. Arithmetic type: float64 where the
// features are float64, else float32.
struct ValuePool {
  SizedTensor features, query;  // (rows, tokens, dim), (rows, heads, dim)
  Tensor norm_weight;           // (dim,), or null for ones
  double eps;
  Flag is_trained;
};

// All but `pooled` are for the backward pass, in the arithmetic type, and null where there will be none.
struct ValuePoolOutputs {
  Tensor pooled;       // like the query
  Tensor tokens;       // (rows, heads, dim) sum of p r x: `pooled` before the norm's weight
  Tensor log_sum_exp;  // (rows, heads) of the scores
  Tensor token_stats;  // (rows, heads + 1, tokens): every head's scores, then 1 / rms
};

}  // namespace lacfast
