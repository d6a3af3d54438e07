// What the kernels take, on the CPU and on a GPU alike. All arrays are contiguous; sizes may be 0 where they say >= 0.
#pragma once

#include "activations.h"
#include "dtypes.h"
#include "path.h"
#include "rk4.h"

namespace spigan {

// out[i, j] = element offset + j (mod 2^64) of the stream of seeds[i].
struct PhiloxNormal {
  void* out;                  // [rows, row_numel] of dtype
  Dtype dtype;                // any but kUInt8
  const std::int64_t* seeds;  // [rows], the bits of a uint64
  std::int64_t rows, row_numel;  // >= 0
  std::uint64_t offset;
};

// x_T and i of spigan.ops.path_interpolate.
struct PathInterpolate {
  void* x_T;                  // [images, rows, width] of dtype
  void* i;                    // [times.count, images, rows, width] of dtype
  Dtype dtype;                // kFloat32, kBFloat16, kFloat16
  const void* x0;             // [images, rows, width] of x0_dtype; rows = channels * height
  Dtype x0_dtype;             // any but kFloat64
  const float* noise;         // [images, rows, width], or null: drawn from (seed, offset + element index)
  const std::uint8_t* flips;  // [images], not 0: mirror the image's rows first; or null
  std::int64_t images, rows, width;  // >= 0
  PathTimes times;
  float mean_coef, std;
  std::uint64_t seed, offset;
};

// Classical Runge-Kutta integration of dh/dt = r(h, t), spigan.ops.rk4_mlp.
struct Rk4Mlp {
  void* out;                // [intervals or all steps, batch, dim] of dtype
  Dtype dtype;              // of every tensor; any but kUInt8
  const void* h0;           // [batch, dim]
  const void* weight;       // [layers, dim, dim] (out, in)
  const void* bias;         // [layers, dim]
  const void* time_weight;  // [layers, dim]
  std::int64_t batch, dim, layers;  // >= 0, >= 0, >= 1
  const Interval* intervals;
  std::int64_t interval_count;
  bool every_step;  // write the state after every step instead of after every interval
  Activation activation;
  void* workspace;  // memory that the kernel asked for (CUDA only); or null
};

}  // namespace spigan
