// The CPU kernels: what they take, and the choice of the instruction set they run on.
//
// Every source of this folder but dispatch.cpp is compiled once for each instruction set (CMakeLists.txt) with SPIGAN_ISA
// set to its name, which is also a namespace. Such a source uses no inline function of the C++ library: the linker would
// keep one of the copies for all, and an AVX-512 one may not run elsewhere.
#pragma once

#include "../common/arguments.h"

namespace spigan::cpu {

// The end of a layer with up = 2, from the products of its stride-2 transposed convolution: v = FIR(transposed conv).
struct ProductsEnd {
  LayerEnd end;    // any dtype but kFloat64
  const void* y;   // [images, y_rows, y_width, kernel, kernel, channels] of dtype: rows from y_first_row on of y_height
  std::int64_t y_height, y_width, y_first_row, y_rows, kernel;
  std::int64_t taps, pad;  // of the filter; taps * kernel <= kMaxProductTerms
  // [taps] as correlated: row r is the sum of filter_y[j] times row r + j - pad of the transposed convolution.
  const float *filter_y, *filter_x;
  std::int64_t first_row, row_count;  // rows to write; y has all that they need
};

// Tile number (ty, tx) of Winograd's F(2x2, 3x3) covers rows 2 ty, 2 ty + 1 and columns 2 tx, 2 tx + 1 of an image; a
// window has the rows of tiles from first_tile_row on, of every image. tiles = images tile_rows ceil(width / 2).

// The 16 products' left factors, of x style with zero padding 1.
struct WinogradInput {
  float* out;          // [16, tiles, channels]
  const float* x;      // [images, height, width, channels]
  const float* style;  // [images, channels], or null: 1
  std::int64_t images, height, width, channels;
  std::int64_t first_tile_row, tile_rows;
};

// The end of a layer from the 16 products.
struct WinogradEnd {
  LayerEnd end;               // kFloat32
  const float* products[16];  // [tiles, channels] each
  std::int64_t first_tile_row, tile_rows;
};

// The 16 products' right factors, of a convolution's weights.
struct WinogradWeight {
  float* out;           // [16, out_channels, in_channels]
  const float* weight;  // [out_channels, in_channels, 3, 3]
  std::int64_t out_channels, in_channels;
};

// `threads`: most threads to use, at least 1. It changes no bit of a result.
struct Kernels {
  const char* isa;
  void (*philox_normal)(const PhiloxNormal&, int threads);
  void (*path_interpolate)(const PathInterpolate&, int threads);
  bool (*rk4_mlp)(const Rk4Mlp&, int threads);  // false: no memory
  bool (*fir_bias_act)(const FirBiasAct&, int threads);               // false: no memory
  bool (*bias_act_backward)(const BiasActBackward&, int threads);     // false: no memory
  bool (*finish_products)(const ProductsEnd&, int threads);           // false: no memory
  void (*winograd_input)(const WinogradInput&, int threads);
  void (*winograd_weight)(const WinogradWeight&, int threads);
  bool (*winograd_output)(const WinogradEnd&, int threads);  // false: no memory
};

#if defined(SPIGAN_ISA)
namespace SPIGAN_ISA {
void philox_normal(const PhiloxNormal& args, int threads);
void path_interpolate(const PathInterpolate& args, int threads);
bool rk4_mlp(const Rk4Mlp& args, int threads);
bool fir_bias_act(const FirBiasAct& args, int threads);
bool bias_act_backward(const BiasActBackward& args, int threads);
bool finish_products(const ProductsEnd& args, int threads);
void winograd_input(const WinogradInput& args, int threads);
void winograd_weight(const WinogradWeight& args, int threads);
bool winograd_output(const WinogradEnd& args, int threads);
}  // namespace SPIGAN_ISA
#endif

// Kernels for the best instruction set of this CPU, or for the one that select_isa named.
const Kernels& kernels();

// Null-terminated names of the instruction sets that were built and that this CPU has, best first.
const char* const* available_isas();

// Use `name` of available_isas(), or the best one for null; false if there is no such one. For tests, not thread-safe.
bool select_isa(const char* name);

}  // namespace spigan::cpu
