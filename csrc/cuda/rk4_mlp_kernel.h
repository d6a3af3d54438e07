// Runs the whole Runge-Kutta integration of the mapping MLP in one launch.
//
// Groups of C thread blocks divide the batch, and each group integrates several rows at a time. A block owns D / C
// output columns of every layer. It loads their weights into shared memory once and keeps them there, together with h
// and the Runge-Kutta sums of its columns in float32. After each layer the blocks of a group exchange their columns of
// the activations:
//   - On sm_90 and later, a group is a thread-block cluster whose blocks write to each other's shared memory.
//   - On older GPUs, and if a cluster is too small to hold the weights, the launch is cooperative. Blocks write to a
//     workspace in global memory and synchronise through an atomic counter.
// If the weights fit in shared memory neither way, they are read from global memory (the L2 cache) for every tile of
// rows.
//
// Layers are computed as dot products with the lanes of a warp along the summed dimension, so that lanes load 16 bytes
// each from neighbouring addresses, without bank conflicts or padding. A warp computes 4 outputs x 8 rows at a time in
// 32 sums (4 x 1 if there are at least as many groups as rows). A transposing butterfly of 31 shuffles reduces them to
// one total per lane. The order of summation depends only on D and the type, so the result of a row depends only on
// that row.
#pragma once

#include "cuda_kernels.h"
#include "device.h"
#include "launch.h"

namespace spigan::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kOutputs = 4;         // columns of a warp's tile
constexpr int kTileRows = 8;        // rows of a warp's tile
constexpr int kMaxRows = 64;        // rows that a group integrates at a time
constexpr int kMaxMembers = 128;    // blocks of a group that uses the workspace
constexpr int kMaxCluster = 16;     // blocks of a group that is a cluster
constexpr int kCounterStride = 32;  // 128 bytes, so that each group's counter has its own cache line

struct Arguments {
  void* out;
  const void *h0, *weight, *bias, *time_weight;
  void* workspace;
  std::int64_t batch;
  int dim, layers, members, groups, rows;
  bool every_step, aligned;  // aligned: weights can be loaded 16 bytes at a time
  Activation activation;
  int interval_count;
  Interval intervals[kMaxRk4Intervals];
};

// ---- Exchange of activations within a group ----
//
// `x` is the input of the next layer, [rows, dim] of T in shared memory. write() stores four columns of a row. All
// `replicas` lanes that hold the same values call it, each with its number `replica`. After finish() every block sees
// everything that was written.

// Activation buffers in shared memory. A block of a cluster may write the next activations while another still reads
// the current ones, so it needs two. Without a cluster those two buffers are in the workspace.
SPIGAN_HD constexpr int buffers_of(bool cluster) { return cluster ? 2 : 1; }

template <class T>
struct ClusterExchange {
  static constexpr bool kCluster = true;
  T *x, *next;
  int members;

  __device__ ClusterExchange(const Arguments& a, T* buffers)
      : x(buffers), next(buffers + a.rows * a.dim), members(a.members) {
    cluster_arrive();
  }

  // A block must not write to the shared memory of another before that has started.
  __device__ void wait_for_start() { cluster_wait(); }

  __device__ void write(int offset, const Packed<T, 4>& values, int replica, int replicas) {
    for (int rank = replica; rank < members; rank += replicas) store_in_cluster(next + offset, rank, values);
  }

  __device__ void finish(int) {
    cluster_arrive();
    cluster_wait();
    T* const swap = x;
    x = next;
    next = swap;
  }
};

template <class T>
struct WorkspaceExchange {
  static constexpr bool kCluster = false;
  T *x, *next, *other;
  std::uint32_t *counter, target;
  int dim, members;

  __device__ WorkspaceExchange(const Arguments& a, T* buffers) : x(buffers), target(0), dim(a.dim), members(a.members) {
    const int group = static_cast<int>(blockIdx.x) / a.members;
    counter = static_cast<std::uint32_t*>(a.workspace) + group * kCounterStride;
    T* const activations = reinterpret_cast<T*>(static_cast<std::uint32_t*>(a.workspace) + a.groups * kCounterStride);
    next = activations + static_cast<std::int64_t>(group) * 2 * a.rows * a.dim;
    other = next + a.rows * a.dim;
  }

  __device__ void wait_for_start() {}

  __device__ void write(int offset, const Packed<T, 4>& values, int replica, int) {
    if (replica == 0) store_global(next + offset, values);
  }

  __device__ void finish(int rows) {
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(counter);
      target += static_cast<std::uint32_t>(members);
      while (static_cast<std::int32_t>(load_acquire(counter) - target) < 0) {  // correct even if the count wraps
      }
    }
    __syncthreads();
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    const int stride = static_cast<int>(blockDim.x) * kVector;
    for (int at = static_cast<int>(threadIdx.x) * kVector; at < rows * dim; at += stride) {
      store_shared(x + at, load_from_l2(next + at));
    }
    __syncthreads();
    // Writing to `other` is safe from here on: every block had finished reading it before it reached this barrier.
    T* const swap = next;
    next = other;
    other = swap;
  }
};

// ---- Dot products ----

template <class T>
__device__ __forceinline__ Packed<T, 16 / sizeof(T)> load_weights(const T* p, bool aligned) {
  if (aligned) return load_words<4>(p);
  Words<4> words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words.word[i] = float_bits(p[i]);
    } else {
      words.word[i] = p[2 * i].bits | static_cast<std::uint32_t>(p[2 * i + 1].bits) << 16;
    }
  }
  return words;
}

// sums[r * kOutputs + o] = this lane's part of y[r, o] = sum_k x[r, k] w[o, k]; x [Rows, dim], w [kOutputs, dim].
template <class T, int Rows>
__device__ __forceinline__ void dot_tile(const T* x, const T* w, int dim, int lane, bool aligned,
                                         float (&sums)[Rows * kOutputs]) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < Rows * kOutputs; ++i) sums[i] = 0.0f;
#pragma unroll 2  // loads of the second iteration hide the latency of the first
  for (int k = lane * kVector; k < dim; k += kWarp * kVector) {
    float b_w[kOutputs][kVector];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) unpack_as<T>(load_weights(w + o * dim + k, aligned), b_w[o]);
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      float b_x[kVector];
      unpack_as<T>(load_words<4>(x + r * dim + k), b_x);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          sums[r * kOutputs + o] = multiply_add(b_w[o][v], b_x[v], sums[r * kOutputs + o]);
        }
      }
    }
  }
}

// Sums N values over the warp: lane l gets the total of value l / (32 / N). Halves of the lanes exchange halves of the
// values until each lane has one value left, then lanes with the same value add theirs.
template <int N>
__device__ __forceinline__ float reduce(float (&values)[N], int lane) {
#pragma unroll
  for (int step = 1; step < 6; ++step) {
    const int half = N >> step, mask = kWarp >> step;
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if (i < half) {  // known at compile time once both loops are unrolled
        const float kept = upper ? values[i + half] : values[i];
        const float sent = upper ? values[i] : values[i + half];
        values[i] = kept + __shfl_xor_sync(kFullMask, sent, mask);
      }
    }
  }
#pragma unroll
  for (int mask = kWarp / N / 2; mask >= 1; mask /= 2) values[0] += __shfl_xor_sync(kFullMask, values[0], mask);
  return values[0];
}

__device__ __forceinline__ float activate_as(Activation activation, float x) {
  switch (activation) {
    case Activation::kLrelu: return activate<Activation::kLrelu>(x);
    case Activation::kTanh: return activate<Activation::kTanh>(x);
    case Activation::kSoftplus: return activate<Activation::kSoftplus>(x);
    default: return activate<Activation::kSilu>(x);
  }
}

// ---- The kernel ----

// One evaluation of the field in the Runge-Kutta method, and how its result k is used.
struct Stage {
  float time, weight, node;  // weight: of k in the sum; node: the field is evaluated next at h + node k
  bool first, last;
  std::int64_t slot;  // index in the output to write after the last stage; < 0: write nothing
};

// A block's arrays in shared memory, except the activations. Columns are counted from the block's first column.
template <class T>
struct BlockState {
  const T* weight;            // [layers, columns, dim], if WeightsInShared
  float *h, *sum;             // [tile of rows x columns, element]
  float *bias, *time_weight;  // [layers, columns]
};

template <class T, class Exchange, int Rows, bool WeightsInShared>
struct Integrator {
  static constexpr int kReplicas = kWarp / (Rows * kOutputs);  // number of lanes that get the same total
  const Arguments& a;
  BlockState<T> s;
  Exchange exchange;
  int lane, warp, warps, columns, first_column;

  // The row and column of a lane, and its index in h and sum, which no other warp uses.
  struct Place {
    int row, column, state;
  };

  __device__ __forceinline__ int tiles(int rows) const { return (rows + Rows - 1) / Rows * (columns / kOutputs); }

  __device__ __forceinline__ Place place(int tile) const {
    const int quads = columns / kOutputs, index = lane / kReplicas;
    return {tile / quads * Rows + index / kOutputs, tile % quads * kOutputs + index % kOutputs,
            tile * Rows * kOutputs + index};
  }

  // Passes four neighbouring columns of each row to the exchange. Only the first of each kReplicas lanes needs `value`.
  __device__ __forceinline__ void publish(const Place& at, float value, bool valid) {
    constexpr int kRowLanes = kWarp / Rows;
    const int replica = lane % kRowLanes;
    float values[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) values[q] = __shfl_sync(kFullMask, value, lane - replica + q * kReplicas);
    if (valid) {
      exchange.write(at.row * a.dim + first_column + at.column / kOutputs * kOutputs, pack_as<T>(values), replica,
                     kRowLanes);
    }
  }

  // Loads h0 of rows [first, first + rows) as the first activations and the state. A tile's rows beyond the last are
  // never initialised, because results computed from them are discarded.
  __device__ __forceinline__ void begin(std::int64_t first, int rows) {
    const T* h0 = static_cast<const T*>(a.h0) + first * a.dim;
    for (int e = static_cast<int>(threadIdx.x); e < rows * a.dim; e += static_cast<int>(blockDim.x)) {
      exchange.x[e] = h0[e];
    }
    for (int tile = warp; tile < tiles(rows); tile += warps) {
      const Place at = place(tile);
      if (lane % kReplicas == 0 && at.row < rows) {
        s.h[at.state] = to_float(h0[static_cast<std::int64_t>(at.row) * a.dim + first_column + at.column]);
      }
    }
    __syncthreads();
  }

  // Given k from the last layer of the field, returns the next point to evaluate at or, in the last stage, the new
  // state.
  __device__ __forceinline__ float advance(const Stage& stage, const Place& at, std::int64_t first, float k) {
    const float sum = multiply_add(stage.weight, k, stage.first ? 0.0f : s.sum[at.state]);
    if (!stage.last) {
      s.sum[at.state] = sum;
      return multiply_add(stage.node, k, s.h[at.state]);
    }
    const float h = s.h[at.state] + sum;
    s.h[at.state] = h;
    if (stage.slot >= 0) {
      T* out = static_cast<T*>(a.out) + (stage.slot * a.batch + first + at.row) * a.dim;
      out[first_column + at.column] = from_float<T>(h);
    }
    return h;
  }

  __device__ __forceinline__ void layer(const Stage& stage, int number, std::int64_t first, int rows) {
    const T* weight;
    if constexpr (WeightsInShared) {
      weight = s.weight + number * columns * a.dim;
    } else {
      weight = static_cast<const T*>(a.weight) + (static_cast<std::int64_t>(number) * a.dim + first_column) * a.dim;
    }
    const bool aligned = WeightsInShared || a.aligned;
    for (int tile = warp; tile < tiles(rows); tile += warps) {
      const int quads = columns / kOutputs;
      float sums[Rows * kOutputs];
      dot_tile<T, Rows>(exchange.x + tile / quads * Rows * a.dim, weight + tile % quads * kOutputs * a.dim, a.dim, lane,
                        aligned, sums);
      float value = reduce(sums, lane);
      const Place at = place(tile);
      const bool valid = at.row < rows;
      if (valid && lane % kReplicas == 0) {
        const int parameter = number * columns + at.column;
        value += multiply_add(stage.time, s.time_weight[parameter], s.bias[parameter]);
        value = number + 1 < a.layers ? activate_as(a.activation, value) : advance(stage, at, first, value);
      }
      publish(at, value, valid);
    }
    exchange.finish(rows);
  }
};

// Integrates rows [first, first + rows) from the first to the last time.
template <class I>
__device__ __forceinline__ void integrate(I& integrator, const Arguments& a, std::int64_t first, int rows) {
  integrator.begin(first, rows);
  std::int64_t slot = 0;
  for (int interval = 0; interval < a.interval_count; ++interval) {
    const double start = a.intervals[interval].start, length = a.intervals[interval].length;
    const std::int64_t count = a.intervals[interval].count;
    for (std::int64_t i = 0; i < count; ++i) {
      const bool wanted = a.every_step || i + 1 == count;
      for (int number = 0; number < kRk4Stages; ++number) {
        Stage stage;
        stage.first = number == 0;
        stage.last = number + 1 == kRk4Stages;
        stage.time = static_cast<float>(start + static_cast<double>(i) * length + rk4_node(number) * length);
        stage.weight = static_cast<float>(rk4_weight(number) * length);
        stage.node = stage.last ? 0.0f : static_cast<float>(rk4_node(number + 1) * length);
        stage.slot = wanted ? slot : -1;
        for (int l = 0; l < a.layers; ++l) integrator.layer(stage, l, first, rows);
      }
      slot += wanted ? 1 : 0;
    }
  }
}

// Integrates all rows of a block's group.
template <class I>
__device__ __forceinline__ void integrate_all(I& integrator, const Arguments& a) {
  const int group = static_cast<int>(blockIdx.x) / a.members;
  const std::int64_t stride = static_cast<std::int64_t>(a.groups) * a.rows;
  for (std::int64_t first = static_cast<std::int64_t>(group) * a.rows; first < a.batch; first += stride) {
    const std::int64_t left = a.batch - first;
    integrate(integrator, a, first, left < a.rows ? static_cast<int>(left) : a.rows);
  }
}

// Index within the parameters of a block, as they are in global memory.
struct Linear {
  static __device__ __forceinline__ int index(int element, int) { return element; }
};

// Starts loading a block's biases and, if InShared, its weights. Layout gives the place of each weight.
template <class T, bool InShared, class Layout>
__device__ __forceinline__ void load_parameters(const Arguments& a, T* weight, float* bias, float* time_weight,
                                                int columns, int first_column) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int layer = 0; layer < a.layers; ++layer) {
    const std::int64_t from = static_cast<std::int64_t>(layer) * a.dim + first_column;
    for (int c = thread; c < columns; c += threads) {
      bias[layer * columns + c] = to_float(static_cast<const T*>(a.bias)[from + c]);
      time_weight[layer * columns + c] = to_float(static_cast<const T*>(a.time_weight)[from + c]);
    }
    if constexpr (InShared) {
      const T* const source = static_cast<const T*>(a.weight) + from * a.dim;
      T* const target = weight + layer * columns * a.dim;
      if (a.aligned) {
        constexpr int kVector = 16 / static_cast<int>(sizeof(T));
        for (int e = thread * kVector; e < columns * a.dim; e += threads * kVector) {
          copy_async(target + Layout::index(e, a.dim), source + e);
        }
      } else {
        for (int e = thread; e < columns * a.dim; e += threads) target[Layout::index(e, a.dim)] = source[e];
      }
    }
  }
}

// Sizes in shared memory, which holds in this order: weights, activations, h, sum, bias, time_weight.
std::size_t weight_bytes(int dim, int columns, int layers, int size) {
  return static_cast<std::size_t>(layers) * static_cast<std::size_t>(columns) * static_cast<std::size_t>(dim * size);
}
std::size_t row_bytes(int dim, int columns, int buffers, int size) {
  return static_cast<std::size_t>(buffers * dim * size + 2 * columns * static_cast<int>(sizeof(float)));
}
std::size_t vector_bytes(int columns, int layers) {
  return static_cast<std::size_t>(2 * layers * columns) * sizeof(float);
}

template <class T, template <class> class ExchangeOf, int Rows, bool WeightsInShared>
__global__ void __launch_bounds__(kThreads, 1) rk4_mlp_kernel(const __grid_constant__ Arguments a) {
  using Exchange = ExchangeOf<T>;
  if constexpr (kHasClusters || !Exchange::kCluster) {
    const int columns = a.dim / a.members, first_column = static_cast<int>(blockIdx.x) % a.members * columns;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);

    T* const weight = reinterpret_cast<T*>(shared_memory());
    T* const buffers = weight + (WeightsInShared ? a.layers * columns * a.dim : 0);
    float* const h = reinterpret_cast<float*>(buffers + buffers_of(Exchange::kCluster) * a.rows * a.dim);
    float* const sum = h + a.rows * columns;
    float* const bias = sum + a.rows * columns;
    float* const time_weight = bias + a.layers * columns;
    Integrator<T, Exchange, Rows, WeightsInShared> integrator = {
        a,          {weight, h, sum, bias, time_weight}, Exchange(a, buffers), thread % kWarp, thread / kWarp,
        threads / kWarp, columns,                             first_column};
    load_parameters<T, WeightsInShared, Linear>(a, weight, bias, time_weight, columns, first_column);
    copies_wait();
    integrator.exchange.wait_for_start();
    integrate_all(integrator, a);  // the barrier at the end of the first begin() also makes the weights visible
  }
}

}  // namespace
}  // namespace spigan::cuda
