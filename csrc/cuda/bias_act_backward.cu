// Computes the derivatives of the end of a layer in one pass: it reads grad, out and x once and also accumulates the
// sums that the derivatives of bias, factor and noise need.
//
// A thread handles as many neighbouring channels as fit in 16 bytes. It strides over the pixels of a part and keeps its
// sums in registers. `lanes` threads share a pixel, and a block handles `units` pixels at a time. The sums of the units
// are then added in shared memory, always in the same order. If sums over channels are wanted, a block covers all
// channels.
#include "../common/activate_and_clamp.h"
#include "cuda_kernels.h"
#include "indexing.h"
#include "launch.h"

namespace spigan::cuda {
namespace {

// How blocks divide the work. In the number of a tile, channels vary fastest, then parts, then images.
struct Tiling {
  int lanes, units;  // threads per pixel, and pixels that a block handles at a time
  std::int64_t parts, part_pixels;
  // Channels are divided among tiles or, for sums over channels, looped over by a block: one of these is 1.
  std::int64_t channel_tiles, channel_loops;
  std::int64_t tiles;
};

template <class T, int V>
struct Sums {
  float u[V] = {}, ux[V] = {};

  // Adds one pixel. Returns the sum of u over the thread's channels.
  __device__ __forceinline__ float add(const BiasActBackward& a, const float (&factor)[V], std::int64_t at) {
    const float slope = static_cast<float>(a.slope), gain = static_cast<float>(a.gain);
    const float clamp = static_cast<float>(a.clamp);
    float grad[V], out[V] = {}, x[V] = {}, total = 0.0f;
    load_elements(static_cast<const T*>(a.grad) + at, grad);
    if (a.out != nullptr) load_elements(static_cast<const T*>(a.out) + at, out);
    if (a.sum_ux != nullptr) load_elements(static_cast<const T*>(a.x) + at, x);
#pragma unroll
    for (int c = 0; c < V; ++c) {
      grad[c] *= a.out != nullptr ? derivative_of_result(out[c], slope, gain, clamp) : gain;
      u[c] += grad[c];
      ux[c] = multiply_add(grad[c], x[c], ux[c]);
      total += grad[c];
      grad[c] *= factor[c];
    }
    if (a.grad_x != nullptr) store_elements(static_cast<T*>(a.grad_x) + at, grad);
    return total;
  }
};

// Adds up the units of a block and writes the sums of at most `count` channels.
template <int V>
__device__ __forceinline__ void store_sums(const Tiling& t, const float* of_units, float* sums, std::int64_t count) {
  const int width = t.lanes * V;
  for (int c = static_cast<int>(threadIdx.x); c < width && c < count; c += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int unit = 0; unit < t.units; ++unit) sum += of_units[unit * width + c];
    sums[c] = sum;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kElementwiseThreads, 3)
    bias_act_backward_kernel(const __grid_constant__ BiasActBackward a, const __grid_constant__ Tiling t) {
  float* const shared_u = reinterpret_cast<float*>(shared_memory());  // [units, lanes * V]
  float* const shared_ux = shared_u + blockDim.x * V;                 // likewise
  const int lane = static_cast<int>(threadIdx.x) % t.lanes, unit = static_cast<int>(threadIdx.x) / t.lanes;
  for (std::int64_t tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
    const std::int64_t image_part = divide(tile, t.channel_tiles), image = divide(image_part, t.parts);
    const std::int64_t begin = (image_part - image * t.parts) * t.part_pixels;
    const std::int64_t end = begin + t.part_pixels < a.pixels ? begin + t.part_pixels : a.pixels;
    for (std::int64_t loop = 0; loop < t.channel_loops; ++loop) {
      const std::int64_t first = (tile - image_part * t.channel_tiles + loop) * t.lanes * V;  // first channel
      const std::int64_t channel = first + lane * V;
      const bool exists = channel < a.channels;
      float factor[V] = {};
      if (exists) load_or(a.factor, image * a.channels + channel, 1.0f, factor);
      Sums<T, V> sums;
      const std::int64_t last = image * a.pixels + end;
#pragma unroll 1
      for (std::int64_t pixel = image * a.pixels + begin + unit; pixel - unit < last;  // all lanes iterate together
           pixel += t.units) {
        float total = 0.0f;
        if (exists && pixel < last) total = sums.add(a, factor, pixel * a.channels + channel);
        if (a.sum_c == nullptr) continue;
        total = sum_of_lanes(total, t.lanes);
        float* const sum_c = static_cast<float*>(a.sum_c) + pixel;
        if (lane == 0 && pixel < last) *sum_c = loop == 0 ? total : *sum_c + total;  // the same thread in every loop
      }
      if (a.sum_u == nullptr && a.sum_ux == nullptr) continue;
      __syncthreads();  // wait until the previous sums have been read
#pragma unroll
      for (int c = 0; c < V; ++c) {
        shared_u[threadIdx.x * V + c] = sums.u[c];
        shared_ux[threadIdx.x * V + c] = sums.ux[c];
      }
      __syncthreads();
      const std::int64_t at = image_part * a.channels + first;
      if (a.sum_u != nullptr) store_sums<V>(t, shared_u, static_cast<float*>(a.sum_u) + at, a.channels - first);
      if (a.sum_ux != nullptr) store_sums<V>(t, shared_ux, static_cast<float*>(a.sum_ux) + at, a.channels - first);
    }
  }
}

template <class T, int V>
cudaError_t launch_as(const BiasActBackward& a, cudaStream_t stream) {
  const unsigned threads = elementwise_threads();
  const std::int64_t groups = divide_up(a.channels, V), kPixelsOfThread = 16;
  Tiling t = {};
  t.lanes = power_of_two_from(groups, kWarp);
  t.units = static_cast<int>(threads) / t.lanes;
  if (t.units == 0) return cudaErrorNoDevice;
  const bool sums = a.sum_u != nullptr || a.sum_ux != nullptr;
  t.parts = sums ? a.parts : std::max<std::int64_t>(1, divide_up(a.pixels, t.units * kPixelsOfThread));
  t.part_pixels = divide_up(a.pixels, t.parts);
  t.channel_tiles = t.channel_loops = 1;
  (a.sum_c != nullptr ? t.channel_loops : t.channel_tiles) = std::max<std::int64_t>(1, divide_up(groups, t.lanes));
  t.tiles = a.images * t.parts * t.channel_tiles;
  return launch_tiles(bias_act_backward_kernel<T, V>, static_cast<std::uint64_t>(t.tiles), threads,
                      sums ? 2 * threads * V * sizeof(float) : 0, stream, a, t);
}

template <class T>
cudaError_t launch_of(const BiasActBackward& a, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  if (a.channels % V == 0 && aligned_to_16({a.grad_x, a.grad, a.out, a.x, a.factor})) return launch_as<T, V>(a, stream);
  return launch_as<T, 1>(a, stream);
}

}  // namespace

cudaError_t bias_act_backward(const BiasActBackward& a, cudaStream_t stream) {
  if (a.images == 0) return cudaSuccess;
  switch (a.dtype) {
    case Dtype::kFloat32: return launch_of<float>(a, stream);
    case Dtype::kBFloat16: return launch_of<bfloat16>(a, stream);
    case Dtype::kFloat16: return launch_of<float16>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace spigan::cuda
