// Generalised advantage estimation over (rows, steps, heads) and its adjoint: 4 tensors of B T M values, read or written
// once. The recursion is sequential in the steps, which for one head lie next to each other in memory: a thread per
// chain would touch 32 cache lines per access. So a warp owns up to 32 chains and moves tiles of kTileSteps steps
// between global memory, along its contiguous direction, and shared memory, where each lane then walks its own chain.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/gae.h"
#include "launch.h"

namespace lacfast::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kTileSteps = 32;
constexpr int kWarpsPerBlock = 2;
// One column of padding: lanes walk a column, tile rows are written along it, and neither collides in a bank.
constexpr int kPitch = kLanes + 1;

// What the kernel and its adjoint need to know of the tensors.
struct Sizes {
  std::int64_t rows, steps, heads;
};

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

__device__ WarpChains chains_of(const Sizes& sizes, std::int64_t warp) {
  const std::int64_t groups = head_groups(sizes.heads);
  WarpChains chains;
  chains.first_row = warp / groups * rows_per_warp(sizes.heads);
  chains.first_head = warp % groups * kLanes;
  const std::int64_t rows_left = sizes.rows - chains.first_row;
  const std::int64_t heads_left = sizes.heads - chains.first_head;
  chains.rows = static_cast<int>(min(static_cast<std::int64_t>(rows_per_warp(sizes.heads)), rows_left));
  chains.heads = static_cast<int>(min(static_cast<std::int64_t>(kLanes), heads_left));
  return chains;
}

// Calls visit(offset in global memory, index in the tile) for this lane's share of steps [begin, begin + count),
// neighbouring lanes at neighbouring addresses.
template <typename Visit>
__device__ __forceinline__ void for_each_in_tile(const Sizes& sizes, const WarpChains& chains, std::int64_t begin, int count,
                                                 int lane, Visit visit) {
  const int per_row = count * chains.heads;
  for (int i = lane; i < chains.rows * per_row; i += kLanes) {
    const int row = i / per_row;
    const int step = i % per_row / chains.heads;
    const int head = i % chains.heads;
    const std::int64_t offset =
        ((chains.first_row + row) * sizes.steps + begin + step) * sizes.heads + chains.first_head + head;
    visit(offset, step * kPitch + row * chains.heads + head);
  }
}

template <typename S, typename A, bool kAdjoint>
__global__ void __launch_bounds__(kLanes* kWarpsPerBlock)
    gae_kernel(Sizes sizes, GaeDecay<A> decay, Tensors<S> tensors, std::int64_t warps) {
  __shared__ A tiles[kWarpsPerBlock][2][kTileSteps * kPitch];
  const int lane = static_cast<int>(threadIdx.x);
  const std::int64_t warp = std::int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.y;
  if (warp >= warps) return;
  A* tile0 = tiles[threadIdx.y][0];
  A* tile1 = tiles[threadIdx.y][1];
  const WarpChains chains = chains_of(sizes, warp);
  GaeState<A> state{};
  GaeAdjoint<A> adjoint{};
  const std::int64_t tile_count = (sizes.steps + kTileSteps - 1) / kTileSteps;
  for (std::int64_t tile = 0; tile < tile_count; ++tile) {
    const std::int64_t begin = (kAdjoint ? tile : tile_count - 1 - tile) * kTileSteps;
    const int count = static_cast<int>(min(static_cast<std::int64_t>(kTileSteps), sizes.steps - begin));
    for_each_in_tile(sizes, chains, begin, count, lane, [&](std::int64_t offset, int at) {
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
    for_each_in_tile(sizes, chains, begin, count, lane, [&](std::int64_t offset, int at) {
      tensors.out0[offset] = static_cast<S>(tile0[at]);
      tensors.out1[offset] = static_cast<S>(tile1[at]);
    });
    __syncwarp();
  }
}

template <typename S, typename A, bool kAdjoint>
void run(const Gae& op, const Tensor& in0, const Tensor& in1, const Tensor& out0, const Tensor& out1, Stream stream) {
  const Sizes sizes{op.rewards.sizes[0], op.rewards.sizes[1], op.rewards.sizes[2]};
  const std::int64_t rows = rows_per_warp(sizes.heads);
  const std::int64_t warps = (sizes.rows + rows - 1) / rows * head_groups(sizes.heads);
  const std::int64_t blocks = (warps + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const GaeDecay<A> decay{static_cast<A>(op.gamma), static_cast<A>(op.gamma * op.gae_lambda),
                          static_cast<A>(op.gamma * op.value_lambda)};
  const Tensors<S> tensors{in0.as<const S>(), in1.as<const S>(), out0.as<S>(), out1.as<S>()};
  launch("gae", gae_kernel<S, A, kAdjoint>, blocks, dim3(kLanes, kWarpsPerBlock), stream, sizes, decay, tensors,
         warps);
}

template <bool kAdjoint>
void dispatch(const Gae& op, const Tensor& in0, const Tensor& in1, const Tensor& out0, const Tensor& out1,
              Stream stream) {
  switch (op.rewards.dtype) {
    case DType::float32:
      return run<float, float, kAdjoint>(op, in0, in1, out0, out1, stream);
    case DType::bfloat16:
      return run<__nv_bfloat16, float, kAdjoint>(op, in0, in1, out0, out1, stream);
    case DType::float16:
      return run<__half, float, kAdjoint>(op, in0, in1, out0, out1, stream);
    case DType::float64:
    case DType::other:
      return run<double, double, kAdjoint>(op, in0, in1, out0, out1, stream);
  }
}

void gae(const Gae& op, const GaeOutputs& outputs, const Stream& stream) {
  dispatch<false>(op, op.rewards, op.values, outputs.advantages, outputs.returns, stream);
}

void gae_backward(const Gae& op, const GaeOutputs&, const GaeOutputs& grads, const Gae& gradients,
                  const Stream& stream) {
  dispatch<true>(op, grads.advantages, grads.returns, gradients.rewards, gradients.values, stream);
}

const Registered<&gae> registered("cuda.gae");
const Registered<&gae_backward> registered_backward("cuda.gae_backward");

}  // namespace
}  // namespace lacfast::cuda
