// One way to launch a kernel: the grid checked, the stream given, the error named.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../registry.h"

namespace lacfast::cuda {

// Blocks of a one-dimensional grid; CUDA's own limit, beyond which a launch fails.
inline unsigned grid_size(std::int64_t blocks) {
  if (blocks < 1 || blocks > 0x7FFFFFFF) throw std::invalid_argument("a grid of " + std::to_string(blocks) + " blocks");
  return static_cast<unsigned>(blocks);
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), std::int64_t blocks, dim3 threads, Stream stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid_size(blocks));
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + " on CUDA: " + cudaGetErrorString(error));
}

}  // namespace lacfast::cuda
