// Replaces CUDA's header of the same name when the sources of csrc/cuda are compiled as plain C++, so that tests
// execute the kernels on a CPU. Every CUDA thread is a thread of the operating system, barriers and shuffles really
// wait, and ThreadSanitizer finds races that would also occur on a GPU. The header contains only what the kernels use.
//
// The blocks of a cluster or of a cooperative launch run concurrently; other blocks run one after another. A launch
// returns when the kernel has ended.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// ---- Execution of kernels ----

namespace cuda_on_cpu {

// The device that the kernels see.
struct Device {
  int major = 9;              // major compute capability
  int processors = 4;         // number of multiprocessors
  int threads = 64;           // maximum threads per block
  int shared_bytes = 232448;  // maximum shared memory per block
  int largest_cluster = 16;   // maximum blocks per cluster
  int driver = 13000;         // latest version of CUDA that the driver supports
  bool matrix_only = false;   // whether rk4_mlp plans only with the matrix unit, which small sizes would not use
};
void set_device(const Device& device);
const Device& device();

// These act for the calling CUDA thread.
char* shared_memory();
void syncthreads();
void cluster_arrive();
void cluster_wait();
void* in_cluster(void* own, int rank);  // the address in block `rank` of the cluster that corresponds to `own`
std::uint32_t shuffle(std::uint32_t value, int source_lane);
int lane();
void multiply_tf32(const float (&a)[4], const float (&b)[2], float (&d)[4]);

// Copies happen as late as a GPU may do them: in copies_wait.
void copy_async(void* to, const void* from);
void copies_wait();

void yield();  // call this in a loop that waits for other threads

// Approximate functions of a GPU, as far from the exact value as csrc/cuda/device.h says they may be.
float approximate_log2(float x);
float approximate_sqrt(float x);
void approximate_cos_sin(float x, float& cosine, float& sine);

// Aborts with a message if `p` is not a multiple of `bytes`. A GPU would abort the kernel.
void check_aligned(const void* p, std::size_t bytes);

}  // namespace cuda_on_cpu

// ---- Types and functions of the runtime ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorCooperativeLaunchTooLarge = 720
};
using cudaStream_t = struct CUstream_st*;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrCooperativeLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeNone,
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeCooperative
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
};

cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)());
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value);
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

namespace cuda_on_cpu {
cudaError_t most_clusters(int* count, const void* function, const cudaLaunchConfig_t& config);
cudaError_t launch(const void* function, const cudaLaunchConfig_t& config, const std::function<void()>& body);
}  // namespace cuda_on_cpu

template <class... Params>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*kernel)(Params...), const cudaLaunchConfig_t* config) {
  return cuda_on_cpu::most_clusters(count, reinterpret_cast<const void*>(kernel), *config);
}

template <class... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const std::decay_t<Params>&... args) {
  static_assert((std::is_trivially_copyable_v<std::decay_t<Params>> && ...), "arguments go to a GPU as bytes");
  static_assert((sizeof(std::decay_t<Params>) + ... + 0) <= 4096, "a launch takes 4 KiB of arguments");
  return cuda_on_cpu::launch(reinterpret_cast<const void*>(kernel), *config, [&] { kernel(args...); });
}

// ---- Device functions ----

inline void __syncthreads() { cuda_on_cpu::syncthreads(); }

inline float __shfl_sync(unsigned, float value, int source_lane) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = cuda_on_cpu::shuffle(bits, source_lane & 31);
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  return __shfl_sync(mask, value, cuda_on_cpu::lane() ^ lane_mask);
}
