// The CPU kernels, the arguments that only they have, and the selection of an instruction set.
//
// CMakeLists.txt compiles every source in this folder except dispatch.cpp once per instruction set. SPIGAN_ISA is the
// name of the instruction set and of its namespace. These sources must not use inline functions of the C++ library: the
// linker would keep one copy for all of them, and if it kept the AVX-512 copy, other CPUs could not run it.
#pragma once

#include "../common/arguments.h"

namespace spigan::cpu {

// Ends a layer with up = 2, given the products of its stride-2 transposed convolution: v = FIR(transposed convolution).
struct ProductsEnd {
  LayerEnd end;    // not kFloat64
  const void* y;   // [images, y_rows, y_width, kernel, kernel, channels] of dtype, from row y_first_row of y_height
  std::int64_t y_height, y_width, y_first_row, y_rows, kernel;
  std::int64_t taps, pad;  // of the filter; taps * kernel <= kMaxProductTerms
  // [taps], as correlated: row r of v is the sum of filter_y[j] times row r + j - pad of the transposed convolution.
  const float *filter_y, *filter_x;
  std::int64_t first_row, row_count;  // the rows to write; y must hold all input rows that they need
};

// Tile (ty, tx) of Winograd's F(2x2, 3x3) covers rows 2 ty and 2 ty + 1 and columns 2 tx and 2 tx + 1 of an image. A
// call processes `tile_rows` rows of tiles of every image, starting at first_tile_row: tiles = images tile_rows
// ceil(width / 2).

// Computes the left factors of the 16 products from x style, with zero padding 1.
struct WinogradInput {
  float* out;          // [16, tiles, channels]
  const float* x;      // [images, height, width, channels]
  const float* style;  // [images, channels], or null: 1
  std::int64_t images, height, width, channels;
  std::int64_t first_tile_row, tile_rows;
};

// Ends a layer, given the 16 products.
struct WinogradEnd {
  LayerEnd end;               // kFloat32
  const float* products[16];  // [tiles, channels] each
  std::int64_t first_tile_row, tile_rows;
};

// Computes the right factors of the 16 products from the weights of a convolution.
struct WinogradWeight {
  float* out;           // [16, out_channels, in_channels]
  const float* weight;  // [out_channels, in_channels, 3, 3]
  std::int64_t out_channels, in_channels;
};

// `threads` is the maximum number of threads, at least 1. It does not affect the result. A kernel that returns bool
// returns false if it runs out of memory.
struct Kernels {
  const char* isa;
  void (*philox_normal)(const PhiloxNormal&, int threads);
  void (*path_interpolate)(const PathInterpolate&, int threads);
  bool (*rk4_mlp)(const Rk4Mlp&, int threads);
  bool (*fir_bias_act)(const FirBiasAct&, int threads);
  bool (*bias_act_backward)(const BiasActBackward&, int threads);
  bool (*finish_products)(const ProductsEnd&, int threads);
  void (*winograd_input)(const WinogradInput&, int threads);
  void (*winograd_weight)(const WinogradWeight&, int threads);
  bool (*winograd_output)(const WinogradEnd&, int threads);
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

// Returns the kernels for the best instruction set of this CPU, or for the one given to select_isa.
const Kernels& kernels();

// Returns the names of the compiled instruction sets that this CPU supports, best first. Null-terminated.
const char* const* available_isas();

// Selects one of available_isas(), or the best one for null. Returns false for an unknown name. For tests; not
// thread-safe.
bool select_isa(const char* name);

}  // namespace spigan::cpu
