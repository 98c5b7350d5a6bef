// The advantage pipeline over (rows, steps, heads) in two launches without atomics: the first walks the chains, writes
// their raw advantages and targets, and leaves one row of moments per block; the second adds those rows in a fixed
// order, combines the heads and normalises. It reads values and rewards once and raw advantages twice, 4 B T M numbers
// in all, where eager code makes a dozen passes and T launches. The number of blocks, and with it the order of every
// sum, depends on the shape alone.
//
// As in gae.cu a warp owns whole batch rows with all their heads, 32 chains at most, moves tiles of kTileSteps steps
// through shared memory along their contiguous direction, and each lane walks its own chain.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/advantages.h"
#include "launch.h"

namespace lacfast::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kTileSteps = 32;
constexpr int kWarpsPerBlock = 2;
// One column of padding: lanes walk a column, tile rows are written along it, and neither collides in a bank.
constexpr int kPitch = kLanes + 1;
constexpr int kMaxMoments = 1 + kMaxRewards + kMaxRewards * kMaxRewards;
constexpr int kApplyThreads = 256;
constexpr std::int64_t kMaxApplyBlocks = 2048;

__host__ __device__ inline std::int64_t row_groups(std::int64_t rows, int heads) {
  const int rows_per_warp = kLanes / heads;
  return (rows + rows_per_warp - 1) / rows_per_warp;
}

// The sum over the lanes of a warp, in every lane, always in the same order.
__device__ __forceinline__ double warp_sum(double value) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

// Adds the moments of `pairs` (trajectory, step) pairs of a tile; at(pair) is where its first head lies, or -1.
template <typename A, typename At>
__device__ __forceinline__ void add_moments(const A* tile, int pairs, int heads, int lane, double* moments, At at) {
  for (int index = 0; index < moment_count(heads); ++index) {
    const MomentHeads of = moment_heads(index, heads);
    double sum = 0.0;
    for (int pair = lane; pair < pairs; pair += kLanes) {
      const int first = at(pair);
      if (first < 0) continue;
      if (index == 0) {
        sum += 1.0;
      } else {
        const double value = static_cast<double>(tile[first + of.i]);
        sum += of.j < 0 ? value : value * static_cast<double>(tile[first + of.j]);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) moments[index] += sum;
  }
}

template <typename S, typename A>
__global__ void __launch_bounds__(kLanes* kWarpsPerBlock)
    advantage_sums_kernel(AdvantageSums op, AdvantageSumsOutputs outputs, ReturnDecay<A> decay) {
  __shared__ A values[kWarpsPerBlock][kTileSteps * kPitch];
  __shared__ A rewards[kWarpsPerBlock][kTileSteps * kPitch];
  __shared__ double moments[kWarpsPerBlock][kMaxMoments];
  const int lane = static_cast<int>(threadIdx.x);
  const int warp = static_cast<int>(threadIdx.y);
  const int heads = heads_of(op);
  const std::int64_t steps = steps_of(op);
  const S* in = op.values.as<const S>();
  const auto* mask = op.mask.as<const std::uint8_t>();
  A* raw = outputs.raw.as<A>();
  A* targets = outputs.targets.as<A>();
  A* value_tile = values[warp];
  A* reward_tile = rewards[warp];
  const A bound = static_cast<A>(op.target_clip);
  for (int index = lane; index < moment_count(heads); index += kLanes) moments[warp][index] = 0.0;
  __syncwarp();

  const int rows_per_warp = kLanes / heads;
  const std::int64_t groups = row_groups(rows_of(op), heads);
  const std::int64_t tiles = (steps + kTileSteps - 1) / kTileSteps;
  const std::int64_t first_group = std::int64_t{blockIdx.x} * kWarpsPerBlock + warp;
  for (std::int64_t group = first_group; group < groups; group += std::int64_t{gridDim.x} * kWarpsPerBlock) {
    const std::int64_t first_row = group * rows_per_warp;
    const int rows = static_cast<int>(min(static_cast<std::int64_t>(rows_per_warp), rows_of(op) - first_row));
    const int chains = rows * heads;
    ReturnState<A> state{};
    for (std::int64_t tile = tiles - 1; tile >= 0; --tile) {
      const std::int64_t begin = tile * kTileSteps;
      const int count = static_cast<int>(min(static_cast<std::int64_t>(kTileSteps), steps - begin));
      const int per_row = count * heads;
      for (int i = lane; i < rows * per_row; i += kLanes) {
        const int row = i / per_row;
        const int step = i % per_row / heads;
        const int head = i % heads;
        const int at = step * kPitch + row * heads + head;
        value_tile[at] = static_cast<A>(in[((first_row + row) * steps + begin + step) * heads + head]);
        reward_tile[at] = standardized_reward<A>(op, first_row + row, begin + step, head);
      }
      __syncwarp();
      if (lane < chains) {
        for (int step = count - 1; step >= 0; --step) {
          const int at = step * kPitch + lane;
          const A value = value_tile[at];
          return_step(state, reward_tile[at], value, decay);
          value_tile[at] = state.policy_return - value;
          reward_tile[at] = bounded(state.target_return, bound);
        }
      }
      __syncwarp();
      for (int i = lane; i < rows * per_row; i += kLanes) {
        const int row = i / per_row;
        const int step = i % per_row / heads;
        const int head = i % heads;
        const int at = step * kPitch + row * heads + head;
        const std::int64_t offset = ((first_row + row) * steps + begin + step) * heads + head;
        raw[offset] = value_tile[at];
        targets[offset] = reward_tile[at];
      }
      add_moments(value_tile, rows * count, heads, lane, moments[warp], [&](int pair) {
        const int row = pair / count;
        if (mask != nullptr && mask[first_row + row] == 0) return -1;
        return pair % count * kPitch + row * heads;
      });
      __syncwarp();
    }
  }
  __syncthreads();
  double* own = outputs.sums.as<double>() + std::int64_t{blockIdx.x} * moment_count(heads);
  for (int index = warp * kLanes + lane; index < moment_count(heads); index += kLanes * kWarpsPerBlock) {
    double sum = 0.0;
    for (int other = 0; other < kWarpsPerBlock; ++other) sum += moments[other][index];
    own[index] = sum;
  }
}

template <typename A>
__global__ void __launch_bounds__(kApplyThreads)
    advantage_apply_kernel(AdvantageApply op, A* advantages) {
  __shared__ double moments[kMaxMoments];
  __shared__ Combination combination;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes;
  const int heads = static_cast<int>(op.raw.sizes[2]);
  const std::int64_t steps = op.raw.sizes[1];
  const auto* mask = op.mask.as<const std::uint8_t>();
  const auto* parts = op.sums.as<const double>();
  for (int index = thread / kLanes; index < moment_count(heads); index += kApplyThreads / kLanes) {
    double sum = 0.0;
    for (std::int64_t part = lane; part < op.sums.sizes[0]; part += kLanes)
      sum += parts[part * moment_count(heads) + index];
    sum = warp_sum(sum);
    if (lane == 0) moments[index] = sum;
  }
  __syncthreads();
  if (thread == 0) {
    const A* weights = op.weights.as<const A>();
    const bool scalarized = op.scalarized != 0;
    combination_from_moments(
        moments, heads, op.normalize_heads != 0,
        [&](int m) { return scalarized ? 1.0 : static_cast<double>(weights[m]); }, combination);
  }
  __syncthreads();
  const A* raw = op.raw.as<const A>();
  const A bound = static_cast<A>(op.advantage_clip);
  const std::int64_t pairs = op.raw.sizes[0] * steps;
  for (std::int64_t pair = std::int64_t{blockIdx.x} * kApplyThreads + thread; pair < pairs;
       pair += std::int64_t{gridDim.x} * kApplyThreads) {
    A sum = 0;
    for (int m = 0; m < heads; ++m) {
      const A centred = raw[pair * heads + m] - static_cast<A>(combination.center[m]);
      sum += static_cast<A>(combination.scale[m]) * centred;
    }
    const bool is_masked = mask != nullptr && mask[pair / steps] == 0;
    advantages[pair] = is_masked ? A{0} : bounded(sum, bound);
  }
}

// A row of moments per block, so that there are as many blocks as `sums` has rows.
template <typename S, typename A>
void run_sums(const AdvantageSums& op, const AdvantageSumsOutputs& outputs, Stream stream) {
  launch("advantage_sums", advantage_sums_kernel<S, A>, outputs.sums.sizes[0], dim3(kLanes, kWarpsPerBlock), stream, op,
         outputs, return_decay<A>(op));
}

void advantage_sums(const AdvantageSums& op, const AdvantageSumsOutputs& outputs, const Stream& stream) {
  switch (op.values.dtype) {
    case DType::float32:
      return run_sums<float, float>(op, outputs, stream);
    case DType::bfloat16:
      return run_sums<__nv_bfloat16, float>(op, outputs, stream);
    case DType::float16:
      return run_sums<__half, float>(op, outputs, stream);
    case DType::float64:
    case DType::other:
      return run_sums<double, double>(op, outputs, stream);
  }
}

template <typename A>
void run_apply(const AdvantageApply& op, const AdvantageApplyOutputs& outputs, Stream stream) {
  const std::int64_t needed = (op.raw.sizes[0] * op.raw.sizes[1] + kApplyThreads - 1) / kApplyThreads;
  const std::int64_t blocks = needed < kMaxApplyBlocks ? needed : kMaxApplyBlocks;
  launch("advantage_apply", advantage_apply_kernel<A>, blocks, dim3(kApplyThreads), stream, op,
         outputs.advantages.as<A>());
}

void advantage_apply(const AdvantageApply& op, const AdvantageApplyOutputs& outputs, const Stream& stream) {
  const auto run = op.raw.dtype == DType::float64 ? run_apply<double> : run_apply<float>;
  run(op, outputs, stream);
}

const Registered<&advantage_sums> registered_sums("cuda.advantage_sums");
const Registered<&advantage_apply> registered_apply("cuda.advantage_apply");

}  // namespace
}  // namespace lacfast::cuda
