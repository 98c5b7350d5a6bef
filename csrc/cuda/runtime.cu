// What the driver of this machine says.

#include <cuda_runtime_api.h>

#include "../build.h"

namespace lacfast::cuda {

std::string unusable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  if (error == cudaSuccess) return "no CUDA device";
  // Reset the sticky-free error of this query so that it does not surface in an unrelated launch.
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace lacfast::cuda
