// Runs CUDA kernels on threads of the operating system (see include/cuda_runtime.h).
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_cpu {
namespace {

constexpr int kWarp = 32;

// Like std::barrier, but a waiting thread yields first, because there are many more threads than processors.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  unsigned arrive() {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
    }
    return phase;
  }

  void wait(unsigned phase) const {
    for (int turn = 0; turn < 64; ++turn) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      std::this_thread::yield();
    }
    phase_.wait(phase, std::memory_order_acquire);
  }

  void arrive_and_wait() { wait(arrive()); }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

struct Warp {
  explicit Warp(int lanes) : barrier(lanes) {}
  Barrier barrier;
  // Used alternately, so that a shuffle or product needs only one barrier.
  std::uint32_t values[2][kWarp] = {};
  float operands[2][kWarp][6] = {};
};

// Exactly as many bytes as the launch requests. They are initialised to NaN in every type, so that reading an element
// before it is written shows in the results.
struct SharedMemory {
  static constexpr std::align_val_t kAlign{128};
  char* data;
  explicit SharedMemory(std::size_t bytes) : data(static_cast<char*>(::operator new(bytes, kAlign))) {
    std::memset(data, 0xFF, bytes);
  }
  ~SharedMemory() { ::operator delete(data, kAlign); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
};

struct Block;

struct Cluster {
  explicit Cluster(int threads) : barrier(threads) {}
  Barrier barrier;
  std::vector<Block*> blocks;
};

struct Block {
  Block(unsigned index_, int threads, std::size_t shared_bytes, Cluster* cluster_)
      : index(index_), shared(shared_bytes), barrier(threads), cluster(cluster_) {
    for (int first = 0; first < threads; first += kWarp) {
      warps.emplace_back(threads - first < kWarp ? threads - first : kWarp);
    }
    cluster->blocks.push_back(this);
  }
  unsigned index;
  SharedMemory shared;
  Barrier barrier;
  std::deque<Warp> warps;
  Cluster* cluster;
};

struct Thread {
  Block* block = nullptr;
  unsigned shuffles = 0, products = 0, cluster_phase = 0;
  std::vector<std::pair<void*, const void*>> copies;
};

thread_local Thread self;

Device current_device;
int device_number = 0;  // changes with every set_device, because the kernels cache the limits of a device

struct Attributes {
  int shared_bytes = 48 << 10;
  bool large_cluster = false;
};
std::map<const void*, Attributes> attributes_of;

struct Shape {
  int cluster = 1;
  bool cooperative = false;
};

Shape shape_of(const cudaLaunchConfig_t& config) {
  Shape shape;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      shape.cluster = static_cast<int>(attribute.val.clusterDim.x);
    }
    if (attribute.id == cudaLaunchAttributeCooperative) shape.cooperative = attribute.val.cooperative != 0;
  }
  return shape;
}

cudaError_t check(const void* function, const cudaLaunchConfig_t& config) {
  const Shape shape = shape_of(config);
  const Attributes& attributes = attributes_of[function];
  const unsigned blocks = config.gridDim.x, threads = config.blockDim.x;
  if (blocks == 0 || threads == 0 || threads > static_cast<unsigned>(current_device.threads)) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > static_cast<std::size_t>(attributes.shared_bytes)) return cudaErrorInvalidValue;
  if (shape.cluster > (current_device.major < 9 ? 1 : current_device.largest_cluster) ||
      (shape.cluster > 8 && !attributes.large_cluster) || blocks % static_cast<unsigned>(shape.cluster) != 0) {
    return cudaErrorInvalidConfiguration;
  }
  // The kernels assume that a multiprocessor runs one block.
  if (shape.cooperative && blocks > static_cast<unsigned>(current_device.processors)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

void run_thread(Block* block, int thread, const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  self.block = block;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  blockIdx = {block->index, 0, 0};
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  body();
}

}  // namespace

void set_device(const Device& device) {
  current_device = device;
  ++device_number;
}

const Device& device() { return current_device; }

char* shared_memory() { return self.block->shared.data; }

void syncthreads() { self.block->barrier.arrive_and_wait(); }

void cluster_arrive() { self.cluster_phase = self.block->cluster->barrier.arrive(); }

void cluster_wait() { self.block->cluster->barrier.wait(self.cluster_phase); }

void* in_cluster(void* own, int rank) {
  const std::ptrdiff_t offset = static_cast<char*>(own) - self.block->shared.data;
  return self.block->cluster->blocks[static_cast<std::size_t>(rank)]->shared.data + offset;
}

int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

std::uint32_t shuffle(std::uint32_t value, int source_lane) {
  Warp& warp = self.block->warps[threadIdx.x / kWarp];
  std::uint32_t* values = warp.values[self.shuffles++ % 2];
  values[lane()] = value;
  warp.barrier.arrive_and_wait();
  return values[source_lane];
}

// Sums in the order of the 8 terms; that of a GPU is not documented.
void multiply_tf32(const float (&a)[4], const float (&b)[2], float (&d)[4]) {
  Warp& warp = self.block->warps[threadIdx.x / kWarp];
  float(&operands)[kWarp][6] = warp.operands[self.products++ % 2];
  const auto read = [](float x) {  // the hardware ignores the lower bits
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    bits &= 0xFFFFE000u;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  };
  for (int i = 0; i < 4; ++i) operands[lane()][i] = read(a[i]);
  for (int i = 0; i < 2; ++i) operands[lane()][4 + i] = read(b[i]);
  warp.barrier.arrive_and_wait();
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int k = 0; k < 8; ++k) {
      const float left = operands[row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)];
      d[i] += left * operands[column * 4 + k % 4][4 + k / 4];
    }
  }
}

void copy_async(void* to, const void* from) {
  check_aligned(to, 16);
  check_aligned(from, 16);
  self.copies.emplace_back(to, from);
}

void copies_wait() {
  for (const auto& [to, from] : self.copies) std::memcpy(to, from, 16);
  self.copies.clear();
}

// `most` above or below the exact value of f(x), depending on the bits of x. So tests meet the largest errors, in all
// combinations.
float off_by(float x, double exact, double most) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<float>((bits * 0x9E3779B9u) >> 31 != 0 ? exact + most : exact - most);
}

float approximate_log2(float x) {
  const double exact = std::log2(static_cast<double>(x));
  return off_by(x, exact, std::ldexp(x >= 0.5f && x <= 2.0f ? 1.0 : std::fabs(exact), -22));
}

float approximate_sqrt(float x) {
  const double exact = std::sqrt(static_cast<double>(x));
  return off_by(x, exact, std::ldexp(exact, -23));
}

void approximate_cos_sin(float x, float& cosine, float& sine) {
  cosine = off_by(x, std::cos(static_cast<double>(x)), std::exp2(-21.19));
  sine = off_by(1.0f - x, std::sin(static_cast<double>(x)), std::exp2(-21.41));
}

void yield() { std::this_thread::yield(); }

void check_aligned(const void* p, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes == 0) return;
  std::fprintf(stderr, "misaligned access to %zu bytes at %p\n", bytes, p);
  std::abort();
}

cudaError_t most_clusters(int* count, const void* function, const cudaLaunchConfig_t& config) {
  const cudaError_t error = check(function, config);
  *count = error == cudaSuccess ? current_device.processors / shape_of(config).cluster : 0;
  return error;
}

cudaError_t launch(const void* function, const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  const cudaError_t error = check(function, config);
  if (error != cudaSuccess) return error;
  const Shape shape = shape_of(config);
  const int blocks = static_cast<int>(config.gridDim.x), threads = static_cast<int>(config.blockDim.x);
  const int together = shape.cooperative ? blocks : shape.cluster;
  for (int first = 0; first < blocks; first += together) {
    std::deque<Cluster> clusters;
    std::deque<Block> running;
    std::vector<std::thread> workers;
    for (int b = first; b < first + together; ++b) {
      if ((b - first) % shape.cluster == 0) clusters.emplace_back(shape.cluster * threads);
      running.emplace_back(static_cast<unsigned>(b), threads, config.dynamicSmemBytes, &clusters.back());
    }
    for (Block& block : running) {
      for (int t = 0; t < threads; ++t) workers.emplace_back([&, t] { run_thread(&block, t, config, body); });
    }
    for (std::thread& worker : workers) worker.join();
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

cudaError_t cudaDriverGetVersion(int* version) {
  *version = cuda_on_cpu::current_device.driver;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

// As with a build for CUDA 13 whose machine code is for 8.0 and later.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)()) {
  *attributes = {};
  const cuda_on_cpu::Device& device = cuda_on_cpu::current_device;
  if (device.driver < 13000) return cudaErrorInsufficientDriver;
  return device.major < 8 ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::device_number;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cuda_on_cpu::Device& device = cuda_on_cpu::current_device;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = device.threads; break;
    case cudaDevAttrMultiProcessorCount: *value = device.processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_bytes; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device.major; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  cuda_on_cpu::Attributes& attributes = cuda_on_cpu::attributes_of[function];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    attributes.large_cluster = value != 0;
  } else {
    if (value > cuda_on_cpu::current_device.shared_bytes) return cudaErrorInvalidValue;
    attributes.shared_bytes = value;
  }
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
  }
  return "unknown";
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
