// The CPU kernels: what they take, and the choice of the instruction set they run on.
//
// Every source of this folder but dispatch.cpp is compiled once for each instruction set (CMakeLists.txt) with SPIGAN_ISA
// set to its name, which is also a namespace. Such a source uses no inline function of the C++ library: the linker would
// keep one of the copies for all, and an AVX-512 one may not run elsewhere.
#pragma once

#include "../common/arguments.h"

namespace spigan::cpu {

// out = x style, channel by channel.
struct ScaleChannels {
  void* out;           // [images, pixels, channels] of dtype
  Dtype dtype;         // kFloat32 or kBFloat16
  const void* x;       // like out
  const float* style;  // [images, channels]
  std::int64_t images, pixels, channels;  // >= 0
};

// What follows the convolution of a layer: out = clamp(gain act(FIR(y) demodulation + noise + bias)) next_style.
struct LayerEnd {
  void* out;                   // [images, height, width, channels] of dtype
  Dtype dtype;                 // kFloat32 or kBFloat16
  // Without a filter [images, height, width, channels]; with one the products of a transposed convolution of stride 2,
  // [images, y_height, y_width, kernel, kernel, channels]; for winograd_output [16, tiles, channels].
  const void* y;
  const float* demodulation;   // [images, channels]
  const float* noise;          // pixel p of image n: noise[n noise_stride + p]; or null
  std::int64_t noise_stride;   // height * width, or 0: the same for every image
  const float* bias;           // [channels]
  const float* next_style;     // [images, channels], or null: 1
  float slope, gain, clamp;    // slope of the negative side; infinity does not clamp
  std::int64_t images, height, width, channels;
  std::int64_t y_height, y_width, kernel;
  std::int64_t taps, pad;  // of the filter; taps 0: none
  // [taps] as correlated: row r is the sum of filter_y[j] times row r + j - pad of the transposed convolution.
  const float *filter_y, *filter_x;
};

// The 16 products' left factors of Winograd's F(2x2, 3x3) with zero padding 1, of x style.
struct WinogradInput {
  float* out;          // [16, tiles, channels], tiles = images ceil(height / 2) ceil(width / 2)
  const float* x;      // [images, height, width, channels]
  const float* style;  // [images, channels]
  std::int64_t images, height, width, channels;
};

// The 16 products' right factors, of a convolution's weights.
struct WinogradWeight {
  float* out;           // [16, in_channels, out_channels]
  const float* weight;  // [out_channels, in_channels, 3, 3]
  std::int64_t out_channels, in_channels;
};

// `threads`: most threads to use, at least 1. It changes no bit of a result.
struct Kernels {
  const char* isa;
  void (*philox_normal)(const PhiloxNormal&, int threads);
  void (*path_interpolate)(const PathInterpolate&, int threads);
  bool (*rk4_mlp)(const Rk4Mlp&, int threads);  // false: no memory
  void (*scale_channels)(const ScaleChannels&, int threads);
  bool (*finish_layer)(const LayerEnd&, int threads);  // false: no memory
  void (*winograd_input)(const WinogradInput&, int threads);
  void (*winograd_weight)(const WinogradWeight&, int threads);
  bool (*winograd_output)(const LayerEnd&, int threads);  // false: no memory
};

#if defined(SPIGAN_ISA)
namespace SPIGAN_ISA {
void philox_normal(const PhiloxNormal& args, int threads);
void path_interpolate(const PathInterpolate& args, int threads);
bool rk4_mlp(const Rk4Mlp& args, int threads);
void scale_channels(const ScaleChannels& args, int threads);
bool finish_layer(const LayerEnd& args, int threads);
void winograd_input(const WinogradInput& args, int threads);
void winograd_weight(const WinogradWeight& args, int threads);
bool winograd_output(const LayerEnd& args, int threads);
}  // namespace SPIGAN_ISA
#endif

// Kernels for the best instruction set of this CPU, or for the one that select_isa named.
const Kernels& kernels();

// Null-terminated names of the instruction sets that were built and that this CPU has, best first.
const char* const* available_isas();

// Use `name` of available_isas(), or the best one for null; false if there is no such one. For tests, not thread-safe.
bool select_isa(const char* name);

}  // namespace spigan::cpu
