// Particles of sequential Monte Carlo, one block per group: a group's weights are read once and live in shared memory.
// Weights are integers, so the parallel cumulative sum is the sequential one, and the ancestors are those of the CPU.

#include <cuda_runtime.h>

#include "../common/smc.h"
#include "launch.h"

namespace lacfast::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;

// combine(...) of one value per thread, in every thread, always in the same order.
template <typename T, typename Combine>
__device__ __forceinline__ T over_block(T value, T* shared, Combine combine) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
  if (thread % kLanes == 0) shared[thread / kLanes] = value;
  __syncthreads();
  T result = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) result = combine(result, shared[warp]);
  // Nobody writes the next values before everybody has read these.
  __syncthreads();
  return result;
}

template <typename S>
__device__ __forceinline__ double group_maximum(const S* log_weights, std::int64_t particles, double* shared) {
  double maximum = -HUGE_VAL;
  for (std::int64_t i = threadIdx.x; i < particles; i += kThreads)
    maximum = larger_weight(maximum, static_cast<double>(log_weights[i]));
  return over_block(maximum, shared, [](double x, double y) { return larger_weight(x, y); });
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    effective_sample_size_kernel(const S* all_log_weights, std::int64_t particles, S* sizes) {
  __shared__ double shared[kWarps];
  const std::int64_t group = blockIdx.x;
  const S* log_weights = all_log_weights + group * particles;
  const double maximum = group_maximum(log_weights, particles, shared);
  double sum = 0.0;
  double squares = 0.0;
  if (maximum > -HUGE_VAL) {
    for (std::int64_t i = threadIdx.x; i < particles; i += kThreads) {
      const double weight = exp(below_maximum(static_cast<double>(log_weights[i]), maximum));
      sum += weight;
      squares += weight * weight;
    }
  }
  const auto plus = [](double x, double y) { return x + y; };
  sum = over_block(sum, shared, plus);
  squares = over_block(squares, shared, plus);
  if (threadIdx.x == 0) sizes[group] = static_cast<S>(squares > 0.0 ? sum * sum / squares : 0.0);
}

template <typename S>
__global__ void __launch_bounds__(kThreads) systematic_resample_kernel(SystematicResample op, std::int64_t* ancestors) {
  __shared__ std::int64_t cumulative[kMaxParticles];
  __shared__ std::int64_t totals[kThreads];
  __shared__ double shared[kWarps];
  const std::int64_t group = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int particles = static_cast<int>(op.log_weights.sizes[1]);
  const S* log_weights = op.log_weights.as<const S>() + group * particles;
  const double maximum = group_maximum(log_weights, particles, shared);
  // Without any weight all are equal, and equal weights keep every particle.
  const bool has_weight = maximum > -HUGE_VAL;
  for (int i = thread; i < particles; i += kThreads)
    cumulative[i] = integer_weight(has_weight ? below_maximum(static_cast<double>(log_weights[i]), maximum) : 0.0);
  __syncthreads();

  // Each thread adds up its own stretch, then what lies before it.
  const int stretch = (particles + kThreads - 1) / kThreads;
  const int begin = min(thread * stretch, particles);
  const int end = min(begin + stretch, particles);
  std::int64_t sum = 0;
  for (int i = begin; i < end; ++i) {
    sum += cumulative[i];
    cumulative[i] = sum;
  }
  totals[thread] = sum;
  __syncthreads();
  for (int distance = 1; distance < kThreads; distance *= 2) {
    const std::int64_t earlier = thread >= distance ? totals[thread - distance] : 0;
    __syncthreads();
    totals[thread] += earlier;
    __syncthreads();
  }
  const std::int64_t before = totals[thread] - sum;
  for (int i = begin; i < end; ++i) cumulative[i] += before;
  __syncthreads();

  const std::int64_t uniform =
      resampling_uniform(*op.seed.as<const std::int64_t>(), op.steps.as<const std::int64_t>()[group],
                         op.group_ids.as<const std::int64_t>()[group]);
  const std::int64_t total = totals[kThreads - 1];
  for (int i = thread; i < particles; i += kThreads) {
    const std::int64_t position = resampling_position(i, uniform, total, particles);
    ancestors[group * particles + i] = first_above(cumulative, particles, position);
  }
}

template <typename S>
void run_size(const EffectiveSampleSize& op, const EffectiveSampleSizeOutputs& outputs, const Stream& stream) {
  launch("effective_sample_size", effective_sample_size_kernel<S>, op.log_weights.sizes[0], dim3(kThreads), stream,
         op.log_weights.as<const S>(), op.log_weights.sizes[1], outputs.sizes.as<S>());
}

void effective_sample_size(const EffectiveSampleSize& op, const EffectiveSampleSizeOutputs& outputs,
                           const Stream& stream) {
  const auto run = op.log_weights.dtype == DType::float64 ? run_size<double> : run_size<float>;
  run(op, outputs, stream);
}

void systematic_resample(const SystematicResample& op, const SystematicResampleOutputs& outputs, const Stream& stream) {
  const auto kernel = op.log_weights.dtype == DType::float64 ? systematic_resample_kernel<double>
                                                             : systematic_resample_kernel<float>;
  launch("systematic_resample", kernel, op.log_weights.sizes[0], dim3(kThreads), stream, op,
         outputs.ancestors.as<std::int64_t>());
}

const Registered<&effective_sample_size> registered_size("cuda.effective_sample_size");
const Registered<&systematic_resample> registered_resample("cuda.systematic_resample");

}  // namespace
}  // namespace lacfast::cuda
