// Arguments of the kernels, the same on the CPU and on a GPU. All arrays are contiguous. A size marked >= 0 may be 0.
#pragma once

#include "activations.h"
#include "dtypes.h"
#include "limits.h"
#include "path.h"
#include "rk4.h"

namespace spigan {

// out[i, j] = element (offset + j) mod 2^64 of the stream of seeds[i].
struct PhiloxNormal {
  void* out;                  // [rows, row_numel] of dtype
  Dtype dtype;                // not kUInt8
  const std::int64_t* seeds;  // [rows], each the bits of a uint64
  std::int64_t rows, row_numel;  // >= 0
  std::uint64_t offset;
};

// Computes x_T and i of spigan.ops.path_interpolate.
struct PathInterpolate {
  void* x_T;                  // [images, rows, width] of dtype
  void* i;                    // [times.count, images, rows, width] of dtype
  Dtype dtype;                // kFloat32, kBFloat16, kFloat16
  const void* x0;             // [images, rows, width] of x0_dtype; rows = channels * height
  Dtype x0_dtype;             // not kFloat64
  const float* noise;         // [images, rows, width]; null: element e is drawn at offset + e of the stream of seed
  const std::uint8_t* flips;  // [images], nonzero to mirror the rows of an image first; null: mirror none
  std::int64_t images, rows, width;  // >= 0
  PathTimes times;
  float mean_coef, std;
  std::uint64_t seed, offset;
};

// spigan.ops.rk4_mlp: integrates dh/dt = r(h, t) by the classical Runge-Kutta method.
struct Rk4Mlp {
  void* out;                // [intervals, batch, dim], or [total steps, batch, dim] with every_step
  Dtype dtype;              // of every tensor; not kUInt8
  const void* h0;           // [batch, dim]
  const void* weight;       // [layers, dim (out), dim (in)]
  const void* bias;         // [layers, dim]
  const void* time_weight;  // [layers, dim]
  std::int64_t batch, dim, layers;  // >= 0, >= 0, >= 1
  const Interval* intervals;
  std::int64_t interval_count;
  bool every_step;  // write the state after every step, not only after every interval
  Activation activation;
  void* workspace;  // CUDA only: Rk4Plan::workspace_bytes bytes; null if that is 0
};

// The end of a layer, for every pixel: out = next_factor clamp(gain act(factor v + strength noise + bias)) + add.
// Images are channels-last. "wide" means float, or double if dtype is kFloat64.
struct LayerEnd {
  void* out;    // [images, height, width, channels] of dtype; null: compute rgb only
  Dtype dtype;  // not kUInt8
  std::int64_t images, height, width, channels;  // >= 0
  const void* factor;          // wide [images, channels]; null: 1
  const void* noise;           // wide; pixel p of image n reads noise[n noise_stride + p]; null: use the seed, if any
  std::int64_t noise_stride;   // height * width; 0: the same noise for every image
  const std::int64_t* seed;    // one value, the bits of a uint64: the noise is element n height width + p of its stream
  const void* strength;        // wide, one value: factor of the noise; null: 1
  const void* bias;            // wide; channel c of image n reads bias[n bias_stride + c]; null: 0
  std::int64_t bias_stride;    // channels; 0: the same bias for every image
  double slope, gain, clamp;   // slope: of the activation for negative values; clamp: infinity for none
  const void* next_factor;     // wide [images, channels]; null: 1
  const void* add;             // like out; null: 0
  // rgb[n, p, r] = sum over c of rgb_weight[n, r, c] clamp(...), before next_factor and before rounding to dtype.
  float* rgb;               // [images, height, width, rgb_channels]; null: skip. Not for kFloat64
  const float* rgb_weight;  // [images, rgb_channels, channels]
  std::int64_t rgb_channels;  // 1 to kMaxRgbChannels
};

// spigan.ops.fir_bias_act: resamples, then ends the layer with v = fir_gain FIR(x).
struct FirBiasAct {
  LayerEnd end;
  const void* x;  // [images, x_height, x_width, channels] of dtype; without a filter it may equal end.out
  std::int64_t x_height, x_width;
  // [taps, taps], in device memory on a GPU; null: v = x. FIR(x) inserts up - 1 zeros after each pixel, puts `pad`
  // zeros before the first row and column (a negative pad crops), and correlates: pixel (r, c) is the sum over j and i
  // of filter[j, i] times pixel (r down + j, c down + i). With flip it uses filter[taps - 1 - j, taps - 1 - i]. Pixels
  // outside x are 0.
  const float* filter;
  std::int64_t taps, up, down, pad;  // taps 1 to kMaxTaps; up and down 1 or 2
  bool flip;
  double fir_gain;
};

// Derivatives of a LayerEnd with v = x, without next_factor and add, with respect to x, factor, bias and noise. They
// all follow from u = grad times the derivative of clamp(gain act()), which is computed from `out`.
struct BiasActBackward {
  // Results; null: skip.
  void* grad_x;    // factor u: [images, pixels, channels] of dtype; may equal grad
  void* sum_u;     // sums of u over the pixels of each part: wide [images, parts, channels]
  void* sum_ux;    // sums of u x, like sum_u
  void* sum_c;     // sums of u over channels: wide [images, pixels]
  Dtype dtype;     // not kUInt8
  const void* grad;    // [images, pixels, channels] of dtype
  const void* out;     // like grad; null: the derivative is gain everywhere
  const void* x;       // like grad; only needed for sum_ux
  const void* factor;  // wide [images, channels]; null: 1
  double slope, gain, clamp;  // gain > 0
  std::int64_t images, pixels, channels;  // >= 0
  std::int64_t parts;  // >= 1; part k starts at pixel k ceil(pixels / parts)
};

}  // namespace spigan
