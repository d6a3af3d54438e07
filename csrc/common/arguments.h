// What the kernels take, on the CPU and on a GPU alike. All arrays are contiguous; sizes may be 0 where they say >= 0.
#pragma once

#include "activations.h"
#include "dtypes.h"
#include "limits.h"
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

// What ends a layer, pixel by pixel: out = next_factor clamp(gain act(factor v + strength noise + bias)) + add. Images are
// channels-last. "wide" is float, or double where dtype is kFloat64.
struct LayerEnd {
  void* out;    // [images, height, width, channels] of dtype; null where only rgb is wanted
  Dtype dtype;  // any but kUInt8
  std::int64_t images, height, width, channels;  // >= 0
  const void* factor;          // wide [images, channels]; null: 1
  const void* noise;           // wide; pixel p of image n: noise[n noise_stride + p]; null: drawn if there is a seed
  std::int64_t noise_stride;   // height * width, or 0: the same for every image
  const std::int64_t* seed;    // one, the bits of a uint64: pixel p of image n is element n height width + p of its stream
  const void* strength;        // wide, one: factor of the noise; null: 1
  const void* bias;            // wide; channel c of image n: bias[n bias_stride + c]; null: 0
  std::int64_t bias_stride;    // channels or 0
  double slope, gain, clamp;   // slope of the negative side; infinity does not clamp
  const void* next_factor;     // wide [images, channels]; null: 1
  const void* add;             // like out; null: 0
  // rgb[n, p, r] = sum over c of rgb_weight[n, r, c] times what stands before next_factor, from unrounded values.
  float* rgb;               // [images, height, width, rgb_channels]; null: not wanted. Not for kFloat64
  const float* rgb_weight;  // [images, rgb_channels, channels]
  std::int64_t rgb_channels;  // 1 to kMaxRgbChannels
};

// spigan.ops.fir_bias_act: the end of a layer after resampling, v = fir_gain FIR(x).
struct FirBiasAct {
  LayerEnd end;
  const void* x;  // [images, x_height, x_width, channels] of dtype; may be end.out where there is no filter
  std::int64_t x_height, x_width;
  // [taps, taps], in device memory on a GPU; null: v = x. Zeros are inserted after each pixel (up - 1 of them), `pad` zeros
  // precede the first row and column (negative crops), and pixel (r, c) of v is the sum over j, i of filter[j, i] times
  // pixel (r down + j, c down + i); flip: of filter[taps - 1 - j, taps - 1 - i]. What lies outside of x is 0.
  const float* filter;
  std::int64_t taps, up, down, pad;  // taps 1 to kMaxTaps; up and down 1 or 2
  bool flip;
  double fir_gain;
};

// Derivatives of LayerEnd of v = x with respect to x, factor, bias and noise, where next_factor and add are null:
// u = grad times the derivative of clamp(gain act()), which `out` tells.
struct BiasActBackward {
  void* grad_x;    // [images, pixels, channels] of dtype, factor u; null: not wanted; may be grad
  void* sum_u;     // wide [images, parts, channels], sums of u over the pixels of a part; null: not wanted
  void* sum_ux;    // the same of u x
  void* sum_c;     // wide [images, pixels], sums of u over channels; null: not wanted
  Dtype dtype;     // any but kUInt8
  const void* grad;    // [images, pixels, channels] of dtype
  const void* out;     // like grad; null: the derivative is gain everywhere
  const void* x;       // like grad; may be null where sum_ux is
  const void* factor;  // wide [images, channels]; null: 1
  double slope, gain, clamp;  // gain > 0
  std::int64_t images, pixels, channels;  // >= 0
  std::int64_t parts;  // >= 1: part k has pixels from k ceil(pixels / parts) on
};

}  // namespace spigan
