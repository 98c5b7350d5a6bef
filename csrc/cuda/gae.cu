// Generalised advantage estimation over (rows, steps, heads) and its adjoint: 4 tensors of B T M values, read or written
// once. The recursion is sequential in the steps, which for one head lie next to each other in memory: a thread per
// chain would touch 32 cache lines per access. So a warp owns up to 32 chains and moves tiles of kTileSteps steps
// between global memory, along its contiguous direction, and shared memory, where each lane then walks its own chain.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/gae.h"
#include "../ops.h"
#include "launch.h"

namespace lacfast::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kTileSteps = 32;
constexpr int kWarpsPerBlock = 2;
// One column of padding: lanes walk a column, tile rows are written along it, and neither collides in a bank.
constexpr int kPitch = kLanes + 1;

// The chains of one warp: `rows` whole batch rows with all their heads, or 32 heads at most of a single row.
struct WarpChains {
  std::int64_t first_row;
  std::int64_t first_head;
  int rows, heads;
};

template <typename S>
struct Tensors {
  const S* in0;
  const S* in1;
  S* out0;
  S* out1;
};

__host__ __device__ inline int rows_per_warp(std::int64_t heads) {
  return heads >= kLanes ? 1 : kLanes / static_cast<int>(heads);
}

__host__ __device__ inline std::int64_t head_groups(std::int64_t heads) { return (heads + kLanes - 1) / kLanes; }

__device__ WarpChains chains_of(const Gae& op, std::int64_t warp) {
  const std::int64_t groups = head_groups(op.heads);
  WarpChains chains;
  chains.first_row = warp / groups * rows_per_warp(op.heads);
  chains.first_head = warp % groups * kLanes;
  const std::int64_t rows_left = op.rows - chains.first_row;
  const std::int64_t heads_left = op.heads - chains.first_head;
  chains.rows = static_cast<int>(min(static_cast<std::int64_t>(rows_per_warp(op.heads)), rows_left));
  chains.heads = static_cast<int>(min(static_cast<std::int64_t>(kLanes), heads_left));
  return chains;
}

// Calls visit(offset in global memory, index in the tile) for this lane's share of steps [begin, begin + count),
// neighbouring lanes at neighbouring addresses.
template <typename Visit>
__device__ __forceinline__ void for_each_in_tile(const Gae& op, const WarpChains& chains, std::int64_t begin, int count,
                                                 int lane, Visit visit) {
  const int per_row = count * chains.heads;
  for (int i = lane; i < chains.rows * per_row; i += kLanes) {
    const int row = i / per_row;
    const int step = i % per_row / chains.heads;
    const int head = i % chains.heads;
    const std::int64_t offset =
        ((chains.first_row + row) * op.steps + begin + step) * op.heads + chains.first_head + head;
    visit(offset, step * kPitch + row * chains.heads + head);
  }
}

template <typename S, typename A, bool kAdjoint>
__global__ void __launch_bounds__(kLanes* kWarpsPerBlock)
    gae_kernel(Gae op, GaeDecay<A> decay, Tensors<S> tensors, std::int64_t warps) {
  __shared__ A tiles[kWarpsPerBlock][2][kTileSteps * kPitch];
  const int lane = static_cast<int>(threadIdx.x);
  const std::int64_t warp = std::int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.y;
  if (warp >= warps) return;
  A* tile0 = tiles[threadIdx.y][0];
  A* tile1 = tiles[threadIdx.y][1];
  const WarpChains chains = chains_of(op, warp);
  GaeState<A> state{};
  GaeAdjoint<A> adjoint{};
  const std::int64_t tile_count = (op.steps + kTileSteps - 1) / kTileSteps;
  for (std::int64_t tile = 0; tile < tile_count; ++tile) {
    const std::int64_t begin = (kAdjoint ? tile : tile_count - 1 - tile) * kTileSteps;
    const int count = static_cast<int>(min(static_cast<std::int64_t>(kTileSteps), op.steps - begin));
    for_each_in_tile(op, chains, begin, count, lane, [&](std::int64_t offset, int at) {
      tile0[at] = static_cast<A>(tensors.in0[offset]);
      tile1[at] = static_cast<A>(tensors.in1[offset]);
    });
    __syncwarp();
    if (lane < chains.rows * chains.heads) {
      for (int i = 0; i < count; ++i) {
        const int at = (kAdjoint ? i : count - 1 - i) * kPitch + lane;
        if constexpr (kAdjoint) {
          const GaeGradient<A> gradient = gae_adjoint_step(adjoint, tile0[at], tile1[at], decay);
          tile0[at] = gradient.reward;
          tile1[at] = gradient.value;
        } else {
          const A value = tile1[at];
          gae_step(state, tile0[at], value, decay);
          tile0[at] = state.advantage;
          tile1[at] = state.value_advantage + value;
        }
      }
    }
    __syncwarp();
    for_each_in_tile(op, chains, begin, count, lane, [&](std::int64_t offset, int at) {
      tensors.out0[offset] = static_cast<S>(tile0[at]);
      tensors.out1[offset] = static_cast<S>(tile1[at]);
    });
    __syncwarp();
  }
}

template <typename S, typename A, bool kAdjoint>
void run(const Gae& op, const void* in0, const void* in1, void* out0, void* out1, void* stream) {
  const std::int64_t rows = rows_per_warp(op.heads);
  const std::int64_t warps = (op.rows + rows - 1) / rows * head_groups(op.heads);
  const std::int64_t blocks = (warps + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const GaeDecay<A> decay{static_cast<A>(op.gamma), static_cast<A>(op.gamma * op.gae_lambda),
                          static_cast<A>(op.gamma * op.value_lambda)};
  const Tensors<S> tensors{static_cast<const S*>(in0), static_cast<const S*>(in1), static_cast<S*>(out0),
                           static_cast<S*>(out1)};
  launch("gae", gae_kernel<S, A, kAdjoint>, blocks, dim3(kLanes, kWarpsPerBlock), stream, op, decay, tensors, warps);
}

template <bool kAdjoint>
void dispatch(const Gae& op, const void* in0, const void* in1, void* out0, void* out1, void* stream) {
  switch (op.dtype) {
    case DType::float32:
      return run<float, float, kAdjoint>(op, in0, in1, out0, out1, stream);
    case DType::bfloat16:
      return run<__nv_bfloat16, float, kAdjoint>(op, in0, in1, out0, out1, stream);
    case DType::float16:
      return run<__half, float, kAdjoint>(op, in0, in1, out0, out1, stream);
    case DType::float64:
      return run<double, double, kAdjoint>(op, in0, in1, out0, out1, stream);
  }
}

}  // namespace

void gae(const Gae& op, const void* rewards, const void* values, void* advantages, void* returns, void* stream) {
  dispatch<false>(op, rewards, values, advantages, returns, stream);
}

void gae_backward(const Gae& op, const void* grad_advantages, const void* grad_returns, void* grad_rewards,
                  void* grad_values, void* stream) {
  dispatch<true>(op, grad_advantages, grad_returns, grad_rewards, grad_values, stream);
}

}  // namespace lacfast::cuda
