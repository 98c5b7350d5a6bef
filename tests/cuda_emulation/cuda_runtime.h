// Enough of CUDA to run kernels of one-dimensional grids on the CPU: the threads of a block are fibers that switch at
// barriers and shuffles, blocks run one after another. Shared memory is static: a block finds there what an earlier one
// left, as on a GPU. A missing barrier shows, since the fibers run from the last to the first and as far as they can.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)

using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr std::size_t kStack = 64 * 1024;
constexpr int kLanes = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  bool done = false;
  // Barriers passed so far: everybody of a group must have come as far before one goes on.
  std::int64_t block_barriers = 0, warp_barriers = 0;
  double exchanged[2];
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::size_t current;
inline const std::function<void()>* body;

inline void yield() {
  const std::size_t self = current;
  swapcontext(&fibers[self].context, &scheduler);
}

// Waits until fibers [first, last) that still run have passed as many barriers as this one.
inline void wait(std::int64_t Fiber::* passed, std::size_t first, std::size_t last) {
  const std::size_t self = current;
  const std::int64_t mine = ++(fibers[self].*passed);
  for (;;) {
    bool everybody = true;
    for (std::size_t i = first; i < last; ++i) everybody = everybody && (fibers[i].done || fibers[i].*passed >= mine);
    if (everybody) return;
    yield();
  }
}

inline void enter() {
  (*body)();
  fibers[current].done = true;
}

inline void run_block(const std::function<void()>& kernel) {
  body = &kernel;
  // The stacks of an earlier block serve again.
  fibers.resize(blockDim.x * blockDim.y);
  for (std::size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.block_barriers = fiber.warp_barriers = 0;
    const auto number = static_cast<unsigned>(i);
    fiber.index = dim3(number % blockDim.x, number / blockDim.x, 0);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  std::size_t left = fibers.size();
  while (left > 0) {
    left = 0;
    for (std::size_t i = fibers.size(); i-- > 0;) {
      if (fibers[i].done) continue;
      current = i;
      threadIdx = fibers[i].index;
      swapcontext(&scheduler, &fibers[i].context);
      if (!fibers[i].done) ++left;
    }
  }
}

inline std::size_t warp_begin() { return current / kLanes * kLanes; }

}  // namespace emulation

inline void __syncthreads() {
  emulation::wait(&emulation::Fiber::block_barriers, 0, emulation::fibers.size());
}

inline void __syncwarp() {
  const std::size_t first = emulation::warp_begin();
  emulation::wait(&emulation::Fiber::warp_barriers, first, first + emulation::kLanes);
}

inline double __shfl_xor_sync(unsigned, double value, int distance) {
  using namespace emulation;
  Fiber& own = fibers[current];
  const std::size_t self = current;
  // Two places in turn: a fast lane may be at the next exchange when a slow one reads this.
  const std::size_t place = static_cast<std::size_t>(own.warp_barriers % 2);
  own.exchanged[place] = value;
  __syncwarp();
  return fibers[self ^ static_cast<std::size_t>(distance)].exchanged[place];
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx = dim3(block, 0, 0);
    emulation::run_block(body);
  }
  return cudaSuccess;
}
