// rk4_mlp on a GPU: plans how the blocks divide the work, then launches a kernel of rk4_mlp_kernel.h or
// rk4_mlp_matrix.h.
#include <algorithm>
#include <map>
#include <mutex>

#include "rk4_mlp_matrix.h"

namespace spigan::cuda {
namespace {

// ---- Plan ----

struct Limits {
  int processors = 0, threads = 0, shared = 0;
  bool cooperative = false;
  int clusters[kMaxCluster + 1] = {};  // for each size, how many clusters can run at the same time
};

using Kernel = void (*)(Arguments);

template <class T, template <class> class ExchangeOf>
Kernel kernel_of(int rows, bool weights_in_shared) {
  if (!weights_in_shared) return rk4_mlp_kernel<T, ExchangeOf, kTileRows, false>;
  return rows == 1 ? rk4_mlp_kernel<T, ExchangeOf, 1, true> : rk4_mlp_kernel<T, ExchangeOf, kTileRows, true>;
}

template <class T>
Kernel kernel_of(const Rk4Plan& plan) {
  return plan.cluster ? kernel_of<T, ClusterExchange>(plan.rows, plan.weights_in_shared)
                      : kernel_of<T, WorkspaceExchange>(plan.rows, plan.weights_in_shared);
}

Kernel kernel_of(Dtype dtype, const Rk4Plan& plan) {
  if (plan.matrix) {
    return plan.cluster ? rk4_mlp_matrix_kernel<SingleBufferExchange> : rk4_mlp_matrix_kernel<GlobalExchange>;
  }
  switch (dtype) {
    case Dtype::kBFloat16: return kernel_of<bfloat16>(plan);
    case Dtype::kFloat16: return kernel_of<float16>(plan);
    default: return kernel_of<float>(plan);
  }
}

// Allows the kernel `shared` bytes of shared memory and, if `cluster`, clusters of more than the portable 8 blocks.
cudaError_t allow(Kernel kernel, int shared, bool cluster) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess && cluster) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error;
}

Limits query_limits() {
  Limits limits;
  limits.processors = device_attribute(cudaDevAttrMultiProcessorCount);
  limits.threads = std::min(kThreads, device_attribute(cudaDevAttrMaxThreadsPerBlock));
  limits.shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.cooperative = device_attribute(cudaDevAttrCooperativeLaunch) != 0;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return limits;
  // A block that uses all shared memory has a multiprocessor to itself, so any kernel gives the same answer.
  const Kernel kernel = rk4_mlp_kernel<float, ClusterExchange, kTileRows, true>;
  for (int size = 1; size <= kMaxCluster && allow(kernel, limits.shared, true) == cudaSuccess; size *= 2) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(size);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(size));
    config.blockDim = dim3(static_cast<unsigned>(limits.threads));
    config.dynamicSmemBytes = static_cast<std::size_t>(limits.shared);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int count = 0;
    if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess) limits.clusters[size] = count;
  }
  cudaGetLastError();  // clear the error of a size that this device does not support
  return limits;
}

// Queried once per device.
Limits limits_of_device() {
  static std::mutex mutex;
  static std::map<int, Limits> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return {};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, query_limits()).first->second;
}

std::int64_t divide_up(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }

// Estimates the clocks per layer as docs/kernels.md does. Only the ranking of plans matters.
double layer_clocks(const Rk4Plan& plan, int dim, int size) {
  const int tiles = dim / plan.members / kOutputs * static_cast<int>(divide_up(plan.rows, kTileRows));
  const int rows = plan.rows == 1 ? 1 : kTileRows;
  const double shared = dim * (kOutputs + rows) * size / 128.0;                       // 128 bytes per clock
  const double products = dim * (kOutputs * rows) / 128.0 * (size == 2 ? 1.5 : 1.0);  // and conversion of half types
  const double l2 = plan.weights_in_shared ? 0.0 : dim * kOutputs * size / 16.0;      // if all blocks read at once
  const double exchange = plan.cluster ? 1400.0 : 2500.0 + plan.rows * dim * size / 32.0;
  if (plan.matrix) {
    const int outputs = dim / plan.members;
    const double loads = dim * (outputs + kMatrixRows * (outputs / kMatrixOutputs)) * size / 128.0;
    const double terms = 3.0 * kMatrixRows * outputs * dim / 660.0;  // multiply-adds per clock of mma.sync
    const double issue = outputs / kMatrixOutputs * (dim / 16.0) * 70.0 / 4.0;  // instructions for 16 terms, mostly splits
    return std::max({loads, terms, issue}) + 450.0 + exchange + (plan.cluster ? 400.0 : 0.0);  // the second barrier
  }
  return tiles * std::max({shared, products, l2}) + 300.0 + exchange;
}

// Sets what follows from the rows of a group.
void finish(const Limits& limits, std::int64_t batch, int dim, int size, int most, Rk4Plan* plan) {
  plan->groups = static_cast<int>(std::min<std::int64_t>(most, divide_up(batch, plan->rows)));
  plan->threads = limits.threads;
  plan->workspace_bytes =
      plan->cluster ? 0
                    : static_cast<std::size_t>(plan->groups) *
                          (kCounterStride * sizeof(std::uint32_t) +
                           2 * static_cast<std::size_t>(plan->rows) * static_cast<std::size_t>(dim * size));
}

// Completes a plan in which cluster, weights_in_shared, matrix and members are set. Returns false if it does not fit the
// device.
bool complete(const Limits& limits, std::int64_t batch, int dim, int layers, int size, Rk4Plan* plan) {
  if (dim / kOutputs % plan->members != 0) return false;
  const int columns = dim / plan->members;
  if (plan->matrix && !(plan->weights_in_shared && size == 4 && suits_matrix(dim, columns, limits.threads))) return false;
  const int most = plan->cluster ? limits.clusters[plan->members]
                                 : (limits.cooperative ? limits.processors / plan->members : 0);
  const std::size_t fixed =
      vector_bytes(columns, layers) + (plan->weights_in_shared ? weight_bytes(dim, columns, layers, size) : 0);
  const std::size_t row = row_bytes(dim, columns, buffers_of(plan->cluster), size);
  const std::size_t shared = static_cast<std::size_t>(limits.shared);
  if (most < 1) return false;
  if (plan->matrix) {
    plan->rows = kMatrixRows;
    plan->shared_bytes = matrix_shared_bytes(dim, columns, layers);
    if (plan->shared_bytes > shared) return false;
    finish(limits, batch, dim, size, most, plan);
    return true;
  }
  if (fixed + row > shared) return false;

  const std::int64_t fit = static_cast<std::int64_t>((shared - fixed) / row), share = divide_up(batch, most);
  if (plan->weights_in_shared && (share == 1 || fit < kTileRows)) {
    plan->rows = 1;
  } else {
    const std::int64_t limit = std::min<std::int64_t>(fit, kMaxRows) / kTileRows * kTileRows;
    if (limit == 0) return false;
    const std::int64_t passes = divide_up(share, limit);
    plan->rows = static_cast<int>(divide_up(divide_up(share, passes), kTileRows) * kTileRows);
  }
  plan->shared_bytes = fixed + row * static_cast<std::size_t>(plan->rows);
  finish(limits, batch, dim, size, most, plan);
  return true;
}

}  // namespace

cudaError_t plan_rk4_mlp(Dtype dtype, std::int64_t batch, std::int64_t dim, std::int64_t layers, Rk4Plan* plan) {
  *plan = {};
  const bool known = dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16;
  if (!known || batch < 0 || dim < kRk4DimMultiple || dim > kMaxRk4Dim || dim % kRk4DimMultiple != 0 || layers < 1 ||
      layers > kMaxRk4Layers) {
    return cudaErrorInvalidValue;
  }
  if (batch == 0) return cudaSuccess;
  const int size = dtype == Dtype::kFloat32 ? 4 : 2;
  const Limits limits = limits_of_device();
  if (limits.threads < kWarp) {
    const cudaError_t error = cudaGetLastError();
    return error != cudaSuccess ? error : cudaErrorNoDevice;
  }
  double best = 0.0;
  for (const bool cluster : {true, false}) {
    for (int members = 1; members <= (cluster ? kMaxCluster : kMaxMembers); members *= 2) {
      for (const int kind : {0, 1, 2}) {
        Rk4Plan candidate = {};
        candidate.cluster = cluster;
        candidate.members = members;
        candidate.weights_in_shared = kind != 1;
        candidate.matrix = kind == 2;
#if !defined(__CUDACC__)
        if (cuda_on_cpu::device().matrix_only && !candidate.matrix) continue;
#endif
        if (!complete(limits, batch, static_cast<int>(dim), static_cast<int>(layers), size, &candidate)) continue;
        const std::int64_t passes = divide_up(divide_up(batch, candidate.rows), candidate.groups);
        const double clocks = static_cast<double>(passes) * layer_clocks(candidate, static_cast<int>(dim), size);
        if (plan->members == 0 || clocks < best) {
          best = clocks;
          *plan = candidate;
        }
      }
    }
  }
  return plan->members == 0 ? cudaErrorInvalidConfiguration : cudaSuccess;
}

cudaError_t rk4_mlp(const Rk4Mlp& a, cudaStream_t stream) {
  Rk4Plan plan;
  cudaError_t error = plan_rk4_mlp(a.dtype, a.batch, a.dim, a.layers, &plan);
  if (error != cudaSuccess) return error;
  if (a.interval_count < 0 || a.interval_count > kMaxRk4Intervals) return cudaErrorInvalidValue;
  if (a.batch == 0 || a.interval_count == 0) return cudaSuccess;

  Arguments args = {};
  args.out = a.out;
  args.h0 = a.h0;
  args.weight = a.weight;
  args.bias = a.bias;
  args.time_weight = a.time_weight;
  args.workspace = a.workspace;
  args.batch = a.batch;
  args.dim = static_cast<int>(a.dim);
  args.layers = static_cast<int>(a.layers);
  args.members = plan.members;
  args.groups = plan.groups;
  args.rows = plan.rows;
  args.every_step = a.every_step;
  args.aligned = reinterpret_cast<std::uintptr_t>(a.weight) % 16 == 0;
  args.activation = a.activation;
  args.interval_count = static_cast<int>(a.interval_count);
  std::copy(a.intervals, a.intervals + a.interval_count, args.intervals);

  if (plan.workspace_bytes != 0) {
    if (a.workspace == nullptr || reinterpret_cast<std::uintptr_t>(a.workspace) % 16 != 0) return cudaErrorInvalidValue;
    const std::size_t counters = static_cast<std::size_t>(plan.groups) * kCounterStride * sizeof(std::uint32_t);
    error = cudaMemsetAsync(a.workspace, 0, counters, stream);
    if (error != cudaSuccess) return error;
  }
  const Kernel kernel = kernel_of(a.dtype, plan);
  error = allow(kernel, limits_of_device().shared, plan.cluster);  // the same for all concurrent callers
  if (error != cudaSuccess) return error;
  LaunchShape shape = {static_cast<unsigned>(plan.groups * plan.members), static_cast<unsigned>(plan.threads)};
  shape.shared_bytes = plan.shared_bytes;
  shape.cluster = plan.cluster ? static_cast<unsigned>(plan.members) : 0;
  shape.cooperative = !plan.cluster;
  return launch(kernel, shape, stream, args);
}

}  // namespace spigan::cuda
