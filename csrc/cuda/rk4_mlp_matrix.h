// rk4_mlp in float32 with the matrix unit, for many rows. A group integrates 16 rows at a time, in half as many passes as
// with the tiles of 8 rows of rk4_mlp_kernel.h, and reads each weight once for all of them.
//
// Every float32 factor is split into two TF32 numbers, x = hi + lo, and a product is hi hi' + hi lo' + lo hi'. hi is
// rounded and lo cut off, so what is left out is at most 2^-21 of the product, and 2^-23 on average. (Three products of
// bfloat16 would leave out 2^-16.) A NaN is in lo.
//
// A warp computes 16 outputs x 16 rows for a part of the summed dimension. The parts are added in shared memory, in a
// fixed order. There is only one buffer of activations, because weights and two of them would not fit: a group
// waits once until all blocks have read the activations and once until all have written the next ones.
#pragma once

#include "rk4_mlp_kernel.h"

namespace spigan::cuda {
namespace {

constexpr int kMatrixRows = 16, kMatrixOutputs = 16;

// Groups of four neighbouring elements of odd rows change places with those four groups further on. So the lanes of
// multiply_tf32, which load from two neighbouring rows at a time, use all banks of shared memory.
struct Swizzled {
  // row: of a matrix [rows, dim]; dim is a multiple of 32.
  static __device__ __forceinline__ int column(int row, int column) { return column ^ (row & 1) << 4; }
  static __device__ __forceinline__ int index(int element, int dim) {
    const int row = element / dim;
    return row * dim + column(row, element - row * dim);
  }
};

// A cluster that shares one buffer.
struct SingleBufferExchange {
  static constexpr bool kCluster = true;
  float* x;
  int members;

  __device__ SingleBufferExchange(const Arguments& a, float* buffer) : x(buffer), members(a.members) {
    cluster_arrive();
  }
  __device__ void wait_for_start() { cluster_wait(); }
  __device__ void wait_for_readers() {
    cluster_arrive();
    cluster_wait();
  }
  __device__ void write_all(int offset, const Words<4>& values, int first_rank) {
    for (int i = 0; i < members; ++i) store_in_cluster(x + offset, (first_rank + i) % members, values);
  }
  __device__ void finish(int) {
    cluster_arrive();
    cluster_wait();
  }
};

// Blocks that exchange through the workspace, whose two buffers already keep readers and writers apart.
struct GlobalExchange : WorkspaceExchange<float> {
  using WorkspaceExchange<float>::WorkspaceExchange;
  __device__ void wait_for_readers() {}
  __device__ void write_all(int offset, const Words<4>& values, int) { write(offset, values, 0, 1); }
};

template <class Exchange>
struct MatrixIntegrator {
  const Arguments& a;
  const float *weight, *bias, *time_weight;  // in shared memory: [layers, columns, dim] Swizzled, [layers, columns]
  Exchange exchange;
  int lane, warp, warps, columns, first_column;
  // This thread's four neighbouring columns (counted from the block's first) of one row, if it has any.
  int row, column;
  float h[4], sum[4];

  __device__ __forceinline__ bool owns(int rows) const { return row < rows; }

  __device__ __forceinline__ void begin(std::int64_t first, int rows) {
    const float* h0 = static_cast<const float*>(a.h0) + first * a.dim;
    for (int e = static_cast<int>(threadIdx.x); e < rows * a.dim; e += static_cast<int>(blockDim.x)) {
      exchange.x[Swizzled::index(e, a.dim)] = h0[e];
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      h[q] = owns(rows) ? h0[row * a.dim + first_column + column + q] : 0.0f;
      sum[q] = 0.0f;
    }
    __syncthreads();
  }

  // Adds this warp's part of [16 outputs, 16 rows] to d [tile of 8 rows].
  __device__ __forceinline__ void multiply(const float* w, int begin, int end, float (&d)[2][4]) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 2
    for (int step = begin; step < end; ++step) {
      const int at = Swizzled::column(g, 16 * step + 4 * t);
      float b_w[2][4], b_x[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unpack(load_words<4>(w + (g + 8 * half) * a.dim + at), b_w[half]);
        unpack(load_words<4>(exchange.x + (g + 8 * half) * a.dim + at), b_x[half]);
      }
      // Which of the 16 terms a lane holds does not matter, as long as both factors agree.
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const float whole[4] = {b_w[0][k], b_w[1][k], b_w[0][k + 1], b_w[1][k + 1]};
        float hi[4], lo[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          hi[i] = round_to_tf32(whole[i]);
          lo[i] = whole[i] - hi[i];
        }
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const float x_hi[2] = {round_to_tf32(b_x[tile][k]), round_to_tf32(b_x[tile][k + 1])};
          const float x_lo[2] = {b_x[tile][k] - x_hi[0], b_x[tile][k + 1] - x_hi[1]};
          multiply_tf32(lo, x_hi, d[tile]);
          multiply_tf32(hi, x_lo, d[tile]);
          multiply_tf32(hi, x_hi, d[tile]);
        }
      }
    }
  }

  // As Integrator::advance, for four columns.
  __device__ __forceinline__ void advance(const Stage& stage, std::int64_t first, float (&k)[4]) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float total = multiply_add(stage.weight, k[q], stage.first ? 0.0f : sum[q]);
      sum[q] = total;
      if (stage.last) h[q] += total;
      k[q] = stage.last ? h[q] : multiply_add(stage.node, k[q], h[q]);
    }
    if (!stage.last || stage.slot < 0) return;
    float* out = static_cast<float*>(a.out) + (stage.slot * a.batch + first + row) * a.dim + first_column + column;
#pragma unroll
    for (int q = 0; q < 4; ++q) out[q] = h[q];
  }

  __device__ __forceinline__ void layer(const Stage& stage, int number, std::int64_t first, int rows) {
    const int tiles = columns / kMatrixOutputs, steps = a.dim / 16;
    const int splits = warps / tiles < a.members ? warps / tiles : a.members;  // more parts would not fit in the buffer
    const int tile = warp % tiles, split = warp / tiles;
    float d[2][4] = {};
    if (split < splits) {
      multiply(weight + (number * columns + tile * kMatrixOutputs) * a.dim, steps * split / splits,
               steps * (split + 1) / splits, d);
    }
    __syncthreads();  // this block has read its activations, so their buffer holds the parts of the sums from here on
    float* const parts = exchange.x;  // [splits, 16 rows, columns]
    if (split < splits) {
      float* part = parts + split * kMatrixRows * columns + tile * kMatrixOutputs + lane / 4;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        part[(i / 4 * 8 + 2 * (lane % 4) + i % 2) * columns + i / 2 % 2 * 8] = d[i / 4][i % 4];
      }
    }
    __syncthreads();
    float value[4] = {};
    if (owns(rows)) {
      for (int s = 0; s < splits; ++s) {
        float part[4];
        unpack(load_words<4>(parts + (s * kMatrixRows + row) * columns + column), part);
#pragma unroll
        for (int q = 0; q < 4; ++q) value[q] += part[q];
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int parameter = number * columns + column + q;
        value[q] += multiply_add(stage.time, time_weight[parameter], bias[parameter]);
      }
      if (number + 1 < a.layers) {
#pragma unroll
        for (int q = 0; q < 4; ++q) value[q] = activate_as(a.activation, value[q]);
      } else {
        advance(stage, first, value);
      }
    }
    exchange.wait_for_readers();
    if (owns(rows)) {
      const int at = row * a.dim + Swizzled::column(row, first_column + column);
      exchange.write_all(at, pack_as<float>(value), lane);
    }
    exchange.finish(rows);
  }
};

std::size_t matrix_shared_bytes(int dim, int columns, int layers) {
  return weight_bytes(dim, columns, layers, 4) + static_cast<std::size_t>(kMatrixRows * dim) * sizeof(float) +
         vector_bytes(columns, layers);
}

// Whether the sizes suit MatrixIntegrator: every warp computes at most one tile, and every thread owns at most four sums.
bool suits_matrix(int dim, int columns, int threads) {
  return dim % 32 == 0 && columns % kMatrixOutputs == 0 && columns / kMatrixOutputs <= threads / kWarp &&
         kMatrixRows * columns / 4 <= threads;
}

template <class Exchange>
__global__ void __launch_bounds__(kThreads, 1) rk4_mlp_matrix_kernel(const __grid_constant__ Arguments a) {
  if constexpr (kHasClusters || !Exchange::kCluster) {
    const int columns = a.dim / a.members, first_column = static_cast<int>(blockIdx.x) % a.members * columns;
    const int thread = static_cast<int>(threadIdx.x), quads = columns / 4;
    float* const weight = reinterpret_cast<float*>(shared_memory());
    float* const x = weight + a.layers * columns * a.dim;
    float* const bias = x + kMatrixRows * a.dim;
    float* const time_weight = bias + a.layers * columns;
    MatrixIntegrator<Exchange> integrator = {
        a,       weight,       bias,           time_weight,          Exchange(a, x), thread % kWarp, thread / kWarp,
        static_cast<int>(blockDim.x) / kWarp, columns, first_column, thread / quads, thread % quads * 4, {}, {}};
    load_parameters<float, true, Swizzled>(a, weight, bias, time_weight, columns, first_column);
    copies_wait();
    integrator.exchange.wait_for_start();
    integrate_all(integrator, a);
  }
}

}  // namespace
}  // namespace spigan::cuda
