// The CUDA kernels. All pointers of the arguments are device memory of the current device. A call only enqueues work on
// `stream` and can be captured in a CUDA graph: it allocates nothing, waits for nothing, and what it needs from the
// host goes into the launch by value.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "../common/arguments.h"

namespace spigan::cuda {

// Each returns what the launch returned.
cudaError_t philox_normal(const PhiloxNormal& args, cudaStream_t stream);
cudaError_t path_interpolate(const PathInterpolate& args, cudaStream_t stream);

// cudaErrorInvalidValue for float64.
cudaError_t fir_bias_act(const FirBiasAct& args, cudaStream_t stream);
cudaError_t bias_act_backward(const BiasActBackward& args, cudaStream_t stream);

// cudaErrorInvalidValue for float64, for sizes beyond the limits of common/limits.h, and without the workspace
// that the plan asks for.
cudaError_t rk4_mlp(const Rk4Mlp& args, cudaStream_t stream);

// How rk4_mlp divides the work. A group of `members` thread blocks integrates `rows` rows of the batch at a time, each
// block the same dim / members columns throughout.
struct Rk4Plan {
  bool cluster;            // a group is a thread-block cluster; else its blocks meet in the workspace
  bool weights_in_shared;  // a block holds the weights of its columns on chip; else it reads them for every tile
  int members, groups, rows, threads;
  std::size_t shared_bytes, workspace_bytes;
};

// The plan for the current device; cudaErrorInvalidConfiguration where there is none.
cudaError_t plan_rk4_mlp(Dtype dtype, std::int64_t batch, std::int64_t dim, std::int64_t layers, Rk4Plan* plan);

}  // namespace spigan::cuda
