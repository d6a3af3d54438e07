// Launches kernels with a one-dimensional grid.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace spigan::cuda {

struct LaunchShape {
  unsigned blocks, threads;
  std::size_t shared_bytes = 0;
  unsigned cluster = 0;      // blocks per thread-block cluster; 0: no clusters
  bool cooperative = false;  // whether all blocks must run at the same time
};

template <class... Params>
cudaError_t launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream,
                   const std::decay_t<Params>&... args) {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  if (shape.cluster != 0) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.numAttrs = 1;
  } else if (shape.cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  const cudaError_t last = cudaGetLastError();  // this also clears it, so that the next call does not report it again
  return error != cudaSuccess ? error : last;
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

// Threads per block of an elementwise kernel; 0 if there is no device.
inline unsigned elementwise_threads() {
  return static_cast<unsigned>(std::min(256, device_attribute(cudaDevAttrMaxThreadsPerBlock)));
}

// Launches a kernel whose blocks stride over `tiles` > 0 pieces of work. A new block starts whenever one ends, which
// balances the load of the multiprocessors. With 64 blocks for each of them, the tail at the end is negligible.
template <class... Params>
cudaError_t launch_tiles(void (*kernel)(Params...), std::uint64_t tiles, unsigned threads, std::size_t shared_bytes,
                         cudaStream_t stream, const std::decay_t<Params>&... args) {
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  if (threads == 0 || processors <= 0) {
    const cudaError_t error = cudaGetLastError();
    return error != cudaSuccess ? error : cudaErrorNoDevice;
  }
  const std::uint64_t most = std::uint64_t{64} * static_cast<std::uint64_t>(processors);
  return launch(kernel, {static_cast<unsigned>(std::min(tiles, most)), threads, shared_bytes}, stream, args...);
}

// The same for `work` > 0 items, one per thread.
template <class... Params>
cudaError_t launch_strided(void (*kernel)(Params...), std::uint64_t work, cudaStream_t stream,
                           const std::decay_t<Params>&... args) {
  const unsigned threads = elementwise_threads();
  const std::uint64_t tiles = threads == 0 ? 0 : (work - 1) / threads + 1;
  return launch_tiles(kernel, tiles, threads, 0, stream, args...);
}

}  // namespace spigan::cuda
