// Whether kernels of this build run on the current device. All of them are compiled for the same architectures, so one
// kernel, which does nothing, stands for all.
#include "cuda_kernels.h"

namespace spigan::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

Probe probe() {
  Probe found = {};
  cudaFuncAttributes attributes;
  found.error = cudaDriverGetVersion(&found.driver);
  if (found.error == cudaSuccess) found.error = cudaRuntimeGetVersion(&found.runtime);
  if (found.error == cudaSuccess) found.error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // clears it, so that the next call does not report it again
  return found;
}

}  // namespace spigan::cuda
