// What the driver and the GPU of this machine say.

#include <cuda_runtime.h>

#include <string>

#include "../build.h"

namespace lacfast::cuda {

namespace {

// Compiled for the architectures of all kernels; whether it can be loaded says it of them.
__global__ void probe() {}

}  // namespace

std::string unusable_reason() {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count == 0) return "no CUDA device";
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaSuccess) return "";
  // Reset the sticky-free error of this query so that it does not surface in an unrelated launch.
  cudaGetLastError();
  std::string reason = cudaGetErrorString(error);
  if (count > 0) reason += "; this build is for the compute capabilities " LACFAST_ARCHITECTURES;
  return reason;
}

}  // namespace lacfast::cuda
