// The CUDA kernels. All pointers in the arguments are to memory of the current device, except Rk4Mlp::intervals. A call
// only enqueues work on `stream`, so it can be captured in a CUDA graph: it allocates nothing, waits for nothing, and
// passes host data by value.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "../common/arguments.h"

namespace spigan::cuda {

// Loads a kernel of this build on the current device, without launching it. The error says why no kernel can run, such
// as cudaErrorInsufficientDriver or cudaErrorNoKernelImageForDevice. The versions are in CUDA's notation, for example
// 12040 for 12.4: the latest CUDA that the driver supports, and the one of this build.
struct Probe {
  cudaError_t error;
  int driver, runtime;
};
Probe probe();

// Each function returns the error of its launch.
cudaError_t philox_normal(const PhiloxNormal& args, cudaStream_t stream);
cudaError_t path_interpolate(const PathInterpolate& args, cudaStream_t stream);

// These two return cudaErrorInvalidValue for float64.
cudaError_t fir_bias_act(const FirBiasAct& args, cudaStream_t stream);
cudaError_t bias_act_backward(const BiasActBackward& args, cudaStream_t stream);

// Returns cudaErrorInvalidValue for float64, for sizes outside the limits of common/limits.h, and if the workspace that
// the plan needs is missing.
cudaError_t rk4_mlp(const Rk4Mlp& args, cudaStream_t stream);

// How rk4_mlp divides the work. A group of `members` thread blocks integrates `rows` rows of the batch at a time. Each
// of its blocks computes dim / members columns, the same in every layer.
struct Rk4Plan {
  bool cluster;            // whether a group is a thread-block cluster; if not, its blocks use the workspace
  bool weights_in_shared;  // whether a block keeps its weights in shared memory; if not, it reads them for every tile
  bool matrix;             // whether the matrix unit multiplies (float32 as three products of TF32)
  int members, groups, rows, threads;
  std::size_t shared_bytes, workspace_bytes;
};

// Computes the plan for the current device. Returns cudaErrorInvalidConfiguration if no plan fits.
cudaError_t plan_rk4_mlp(Dtype dtype, std::int64_t batch, std::int64_t dim, std::int64_t layers, Rk4Plan* plan);

}  // namespace spigan::cuda
