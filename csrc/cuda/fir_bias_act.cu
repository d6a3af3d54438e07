// The end of a layer in one pass: FIR resampling, demodulation, noise, bias, activation, the next layer's style, ToRGB.
//
// A thread computes a strip of four neighbouring pixels in a row, for as many neighbouring channels as fit in 16 bytes.
// So it loads each factor once for four pixels, draws the noise of a strip as one Philox block, and shares what it
// reads of x among the four pixels. `lanes` threads handle neighbouring channels of the same strip. With a filter, a
// block covers a patch of several rows (8 x 16 pixels x 8 lanes), so that its part of x stays in the L1 cache. Without
// a filter, rows do not matter, and an image is treated as one row. With rgb, the lanes of a strip loop over all of its
// channels and add their sums at the end.
#include "../common/activate_and_clamp.h"
#include "cuda_kernels.h"
#include "indexing.h"
#include "launch.h"
#include "box_muller.h"

namespace spigan::cuda {
namespace {

constexpr int kStrip = 4;    // pixels
constexpr int kMaxRgb = static_cast<int>(kMaxRgbChannels);
constexpr int kFirLanes = 8, kFirRows = 8;  // of a block's patch

// How blocks divide the work. In the number of a tile, channels vary fastest, then columns, rows and images.
struct Tiling {
  int lanes, columns, rows;  // threads per strip, and strips per row and rows of a block
  int shift;                 // strip s begins at column kStrip s - shift
  std::int64_t channel_tiles, column_tiles, row_tiles, tiles;
};

// ---- The pixels of a thread ----

// The integers i in [0, most) for which position + i is in [0, size).
struct Range {
  int begin, end;
  __device__ __forceinline__ Range(std::int64_t position, std::int64_t size, int most)
      : begin(static_cast<int>(position < -most ? most : position < 0 ? -position : 0)),
        end(static_cast<int>(size - position > most ? most : size > position ? size - position : 0)) {}
  __device__ __forceinline__ bool has(int i) const { return i >= begin && i < end; }
};

struct Strip {
  std::int64_t image, row, column, channel_tile;
  Range pixels;

  static __device__ __forceinline__ Strip of_tile(std::int64_t tile, const Tiling& t, const LayerEnd& e) {
    const std::int64_t columns = divide(tile, t.channel_tiles), rows = divide(columns, t.column_tiles);
    const std::int64_t image = divide(rows, t.row_tiles);
    const int unit = static_cast<int>(threadIdx.x) / t.lanes;
    const std::int64_t row = (rows - image * t.row_tiles) * t.rows + unit / t.columns;
    const std::int64_t strip = (columns - rows * t.column_tiles) * t.columns + unit % t.columns;
    const std::int64_t column = strip * kStrip - t.shift;
    return {image, row, column, tile - columns * t.channel_tiles,
            Range(column, row < e.height ? e.width : 0, kStrip)};
  }
};

// ---- Noise ----

// Draws the normals `first` to first + 3 of a stream.
__device__ __forceinline__ void draw_four(std::uint64_t seed, std::uint64_t first, float (&normals)[kStrip]) {
  float drawn[2 * kStrip] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == 1 && first % 4 == 0) break;  // one block has all four, always so if the row length is a multiple of 4
    float block[4];
    draw_block(seed, first / 4 + static_cast<std::uint64_t>(half), block);
#pragma unroll
    for (int i = 0; i < 4; ++i) drawn[4 * half + i] = block[i];
  }
#pragma unroll
  for (int i = 0; i < 6; ++i) drawn[i] = first % 2 != 0 ? drawn[i + 1] : drawn[i];
#pragma unroll
  for (int i = 0; i < kStrip; ++i) normals[i] = first % 4 >= 2 ? drawn[i + 2] : drawn[i];
}

__device__ __forceinline__ void noise_of(const LayerEnd& e, const Strip& s, float (&noise)[kStrip]) {
  const std::int64_t pixel = s.row * e.width + s.column;
  if (e.noise == nullptr && e.seed == nullptr) {
#pragma unroll
    for (int q = 0; q < kStrip; ++q) noise[q] = 0.0f;
    return;
  }
  if (e.noise != nullptr) {
    const float* given = static_cast<const float*>(e.noise) + s.image * e.noise_stride + pixel;
#pragma unroll
    for (int q = 0; q < kStrip; ++q) noise[q] = s.pixels.has(q) ? given[q] : 0.0f;
  } else {
    draw_four(static_cast<std::uint64_t>(*e.seed),
              static_cast<std::uint64_t>(s.image * e.height * e.width + pixel), noise);
  }
  const float strength = e.strength != nullptr ? *static_cast<const float*>(e.strength) : 1.0f;
#pragma unroll
  for (int q = 0; q < kStrip; ++q) noise[q] *= strength;
}

// ---- Filters ----

struct NoFilter {
  __device__ explicit NoFilter(const FirBiasAct&) {}
};

struct AnyFilter {
  static constexpr int kUnroll = 1;
  int taps, up, down;
  __device__ explicit AnyFilter(const FirBiasAct& a)
      : taps(static_cast<int>(a.taps)), up(static_cast<int>(a.up)), down(static_cast<int>(a.down)) {}
};

// For Up = 2, strips must begin at a pixel of x, not at an inserted zero.
template <int Taps, int Up, int Down>
struct Filter {
  static constexpr int taps = Taps, up = Up, down = Down;
  static constexpr int kUnroll = Taps + (kStrip - 1) * Down;
  __device__ explicit Filter(const FirBiasAct&) {}
};

// Loads fir_gain times the filter, as it is correlated, into shared memory.
__device__ __forceinline__ const float* load_filter(const FirBiasAct& a) {
  float* weights = reinterpret_cast<float*>(shared_memory());
  const int count = static_cast<int>(a.taps * a.taps);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    weights[i] = static_cast<float>(a.fir_gain) * a.filter[a.flip ? count - 1 - i : i];
  }
  __syncthreads();
  return weights;
}

// v += FIR(x) for a strip.
template <class T, int V, class F>
__device__ __forceinline__ void add_filtered(const FirBiasAct& a, const F& f, const float* weights, const Strip& s,
                                             std::int64_t channel, float (&v)[kStrip][V]) {
  constexpr bool kAny = std::is_same_v<F, AnyFilter>;
  constexpr int kMost = 16;  // an upper bound on the columns of x that a strip reads
  const std::int64_t top = s.row * f.down - a.pad, left = s.column * f.down - a.pad;
  const int first_j = f.up == 2 ? static_cast<int>(top & 1) : 0;  // the first tap that falls on a pixel of x
  const int first_i = kAny && f.up == 2 ? static_cast<int>(left & 1) : 0;
  const std::int64_t x_column = (left + first_i) >> (f.up - 1);
  const Range columns(x_column, a.x_width, kMost);
#pragma unroll 1
  for (int j = first_j; j < f.taps; j += f.up) {
    const std::int64_t x_row = (top + j) >> (f.up - 1);
    if (x_row < 0 || x_row >= a.x_height) continue;
    const T* x = static_cast<const T*>(a.x) +
                 ((s.image * a.x_height + x_row) * a.x_width + x_column) * a.end.channels + channel;
#pragma unroll F::kUnroll
    for (int i = first_i; i < f.taps + (kStrip - 1) * f.down; i += f.up) {
      const int k = i >> (f.up - 1);
      float b_x[V] = {};
      if (columns.has(k)) load_elements(x + k * a.end.channels, b_x);
#pragma unroll
      for (int q = 0; q < kStrip; ++q) {
        const int tap = i - q * f.down;
        if (tap < 0 || tap >= f.taps) continue;
        const float weight = weights[j * f.taps + tap];
#pragma unroll
        for (int c = 0; c < V; ++c) v[q][c] = multiply_add(weight, b_x[c], v[q][c]);
      }
    }
  }
}

// ---- The end of the layer ----

// v -> clamp(gain act(factor v + noise + bias)).
template <int V>
__device__ __forceinline__ void activate(const LayerEnd& e, const Strip& s, std::int64_t channel,
                                         const float (&noise)[kStrip], float (&v)[kStrip][V]) {
  float factor[V], bias[V];
  load_or(e.factor, s.image * e.channels + channel, 1.0f, factor);
  load_or(e.bias, s.image * e.bias_stride + channel, 0.0f, bias);
  const float slope = static_cast<float>(e.slope), gain = static_cast<float>(e.gain);
  const float clamp = static_cast<float>(e.clamp);
#pragma unroll
  for (int q = 0; q < kStrip; ++q) {
#pragma unroll
    for (int c = 0; c < V; ++c) {
      v[q][c] = activate_and_clamp(multiply_add(v[q][c], factor[c], noise[q] + bias[c]), slope, gain, clamp);
    }
  }
}

template <int V>
__device__ __forceinline__ void add_rgb(const LayerEnd& e, const Strip& s, std::int64_t channel,
                                        const float (&v)[kStrip][V], float (&rgb)[kStrip][kMaxRgb]) {
#pragma unroll
  for (int r = 0; r < kMaxRgb; ++r) {
    if (r >= e.rgb_channels) break;
    float weight[V];
    load_elements(e.rgb_weight + (s.image * e.rgb_channels + r) * e.channels + channel, weight);
#pragma unroll
    for (int q = 0; q < kStrip; ++q) {
#pragma unroll
      for (int c = 0; c < V; ++c) rgb[q][r] = multiply_add(weight[c], v[q][c], rgb[q][r]);
    }
  }
}

template <class T, int V>
__device__ __forceinline__ void store(const LayerEnd& e, const Strip& s, std::int64_t pixel, std::int64_t channel,
                                      float (&v)[kStrip][V]) {
  float next_factor[V];
  load_or(e.next_factor, s.image * e.channels + channel, 1.0f, next_factor);
#pragma unroll
  for (int q = 0; q < kStrip; ++q) {
    if (!s.pixels.has(q)) continue;
    const std::int64_t at = (pixel + q) * e.channels + channel;
    float add[V] = {};
    if (e.add != nullptr) load_elements(static_cast<const T*>(e.add) + at, add);
#pragma unroll
    for (int c = 0; c < V; ++c) v[q][c] = multiply_add(v[q][c], next_factor[c], add[c]);
    store_elements(static_cast<T*>(e.out) + at, v[q]);
  }
}

// Blocks per multiprocessor, which leaves 80 or 128 registers per thread.
template <class F, bool Rgb>
constexpr int kBlocks = std::is_same_v<F, NoFilter> && !Rgb ? 3 : 2;

template <class T, int V, class F, bool Rgb>
__global__ void __launch_bounds__(kElementwiseThreads, kBlocks<F, Rgb>)
    fir_bias_act_kernel(const __grid_constant__ FirBiasAct a, const __grid_constant__ Tiling t) {
  const LayerEnd& e = a.end;
  const F filter(a);
  [[maybe_unused]] const float* weights = nullptr;
  if constexpr (!std::is_same_v<F, NoFilter>) weights = load_filter(a);
  const int lane = static_cast<int>(threadIdx.x) % t.lanes;
  for (std::int64_t tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
    const Strip s = Strip::of_tile(tile, t, e);
    const std::int64_t pixel = (s.image * e.height + s.row) * e.width + s.column;
    float noise[kStrip], rgb[kStrip][kMaxRgb] = {};
    noise_of(e, s, noise);
    for (std::int64_t group = s.channel_tile * t.lanes + lane; group * V < e.channels; group += t.lanes) {
      const std::int64_t channel = group * V;
      float v[kStrip][V] = {};
      if constexpr (std::is_same_v<F, NoFilter>) {
        const T* x = static_cast<const T*>(a.x) + pixel * e.channels + channel;
#pragma unroll
        for (int q = 0; q < kStrip; ++q) {
          if (s.pixels.has(q)) load_elements(x + q * e.channels, v[q]);
        }
      } else {
        add_filtered<T>(a, filter, weights, s, channel, v);
      }
      activate(e, s, channel, noise, v);
      if constexpr (Rgb) {
        if (e.rgb != nullptr) add_rgb(e, s, channel, v, rgb);
      }
      if (e.out != nullptr) store<T>(e, s, pixel, channel, v);
      if (!Rgb || e.rgb == nullptr) break;  // other blocks handle the other channels
    }
    if constexpr (Rgb) {
      if (e.rgb == nullptr) continue;
#pragma unroll
      for (int q = 0; q < kStrip; ++q) {
#pragma unroll
        for (int r = 0; r < kMaxRgb; ++r) {
          if (r >= e.rgb_channels) break;
          const float sum = sum_of_lanes(rgb[q][r], t.lanes);
          if (lane == 0 && s.pixels.has(q)) e.rgb[(pixel + q) * e.rgb_channels + r] = sum;
        }
      }
    }
  }
}

// ---- Launching ----

template <class T, int V, class F, bool Rgb>
cudaError_t launch_as(const FirBiasAct& a, cudaStream_t stream) {
  constexpr bool kFiltered = !std::is_same_v<F, NoFilter>;
  const LayerEnd& e = a.end;
  const unsigned threads = elementwise_threads();
  const std::int64_t groups = divide_up(e.channels, V);
  Tiling t = {};
  t.lanes = power_of_two_from(groups, kFiltered && e.rgb == nullptr ? kFirLanes : kWarp);
  const int units = static_cast<int>(threads) / t.lanes;
  t.rows = kFiltered ? std::min(units, power_of_two_from(e.height, kFirRows)) : 1;
  t.columns = t.rows == 0 ? 0 : units / t.rows;
  if (t.columns == 0) return cudaErrorNoDevice;
  t.shift = kFiltered && a.up == 2 && a.down == 1 ? static_cast<int>(a.pad & 1) : 0;
  t.channel_tiles = e.rgb == nullptr ? divide_up(groups, t.lanes) : 1;
  t.column_tiles = divide_up(divide_up(e.width + t.shift, kStrip), t.columns);
  t.row_tiles = divide_up(e.height, t.rows);
  t.tiles = e.images * t.row_tiles * t.column_tiles * t.channel_tiles;
  const std::size_t shared_bytes = kFiltered ? static_cast<std::size_t>(a.taps * a.taps) * sizeof(float) : 0;
  return launch_tiles(fir_bias_act_kernel<T, V, F, Rgb>, static_cast<std::uint64_t>(t.tiles), threads, shared_bytes,
                      stream, a, t);
}

template <class T>
cudaError_t launch_of(FirBiasAct a, cudaStream_t stream) {
  LayerEnd& e = a.end;
  constexpr int V = kVector<T>;
  const bool vectors = e.channels % V == 0 && aligned_to_16({a.x, e.out, e.add, e.factor, e.bias, e.next_factor,
                                                             e.rgb_weight});
  if (a.filter == nullptr) {
    e.width *= e.height;
    e.height = 1;
    if (!vectors) return launch_as<T, 1, NoFilter, true>(a, stream);
    if (e.rgb != nullptr) return launch_as<T, V, NoFilter, true>(a, stream);
    return launch_as<T, V, NoFilter, false>(a, stream);
  }
  if (!vectors) return launch_as<T, 1, AnyFilter, true>(a, stream);
  if (e.rgb == nullptr && a.taps == 4) {
    if (a.up == 1 && a.down == 1) return launch_as<T, V, Filter<4, 1, 1>, false>(a, stream);
    if (a.up == 2 && a.down == 1) return launch_as<T, V, Filter<4, 2, 1>, false>(a, stream);
    if (a.up == 1 && a.down == 2) return launch_as<T, V, Filter<4, 1, 2>, false>(a, stream);
  }
  return launch_as<T, V, AnyFilter, true>(a, stream);
}

}  // namespace

cudaError_t fir_bias_act(const FirBiasAct& a, cudaStream_t stream) {
  const LayerEnd& e = a.end;
  if (e.images == 0 || e.height == 0 || e.width == 0) return cudaSuccess;
  if (e.rgb == nullptr && (e.out == nullptr || e.channels == 0)) return cudaSuccess;
  switch (e.dtype) {
    case Dtype::kFloat32: return launch_of<float>(a, stream);
    case Dtype::kBFloat16: return launch_of<bfloat16>(a, stream);
    case Dtype::kFloat16: return launch_of<float16>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace spigan::cuda
