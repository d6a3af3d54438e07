// Draws the noise and interpolates in one pass: x0 is read once, and noise drawn here stays in registers.
#include "../common/philox.h"
#include "cuda_kernels.h"
#include "indexing.h"
#include "launch.h"

namespace spigan::cuda {
namespace {

// The four elements `first` to first + 3, which one thread handles. Only those in [0, numel) exist.
struct Four {
  std::int64_t first;
  bool whole;  // all exist, all arrays are aligned, and mirroring a row keeps the four together
};

// Index in x0 of the `size` neighbouring elements that start at `at`. If `mirrored` is set, they are in reverse order.
__device__ __forceinline__ std::int64_t source_index(const PathInterpolate& a, std::int64_t at, int size,
                                                     bool& mirrored) {
  mirrored = a.flips != nullptr && a.flips[divide(at, a.rows * a.width)] != 0;
  return mirrored ? 2 * divide(at, a.width) * a.width + a.width - size - at : at;
}

template <class X>
__device__ __forceinline__ void unpack_clean(const Packed<X, 4>& packed, float (&clean)[4]) {
  if constexpr (sizeof(X) == 1) {
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      clean[lane] = clean_value(static_cast<std::uint8_t>(packed.word[0] >> (8 * lane)));
    }
  } else {
    unpack_as<X>(packed, clean);
  }
}

template <class X>
__device__ __forceinline__ void load_clean(const PathInterpolate& a, const Four& four, std::int64_t numel,
                                           float (&clean)[4]) {
  const X* x0 = static_cast<const X*>(a.x0);
  bool mirrored;
  if (four.whole) {
    float loaded[4];
    const std::int64_t source = source_index(a, four.first, 4, mirrored);
    unpack_clean<X>(load_words<static_cast<int>(sizeof(X))>(x0 + source), loaded);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) clean[lane] = mirrored ? loaded[3 - lane] : loaded[lane];
  } else {
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      const std::int64_t at = four.first + lane;
      clean[lane] = at >= 0 && at < numel ? clean_value(x0[source_index(a, at, 1, mirrored)]) : 0.0f;
    }
  }
}

__device__ __forceinline__ void load_noise(const PathInterpolate& a, const Four& four, std::int64_t numel,
                                           std::uint64_t block, float (&noise)[4]) {
  if (a.noise == nullptr) {
    const Philox4x32 words = philox_block(a.seed, (a.offset / 4 + block) & kBlockMask);
    box_muller(words.x0, words.x1, noise[0], noise[1]);
    box_muller(words.x2, words.x3, noise[2], noise[3]);
  } else if (four.whole) {
    unpack(load_words<4>(a.noise + four.first), noise);
  } else {
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      const std::int64_t at = four.first + lane;
      noise[lane] = at >= 0 && at < numel ? a.noise[at] : 0.0f;
    }
  }
}

template <class X, class T>
__global__ void __launch_bounds__(kElementwiseThreads)
    path_interpolate_kernel(const __grid_constant__ PathInterpolate a, std::int64_t head, std::int64_t blocks,
                            bool aligned) {
  const std::int64_t numel = a.images * a.rows * a.width;
  for (std::int64_t block = first_item(); block < blocks; block += item_stride()) {
    Four four;
    four.first = 4 * block - head;
    four.whole = aligned && four.first >= 0 && four.first + 4 <= numel;
    float clean[4], noise[4], noisy[4], point[4];
    load_clean<X>(a, four, numel, clean);
    load_noise(a, four, numel, static_cast<std::uint64_t>(block), noise);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) noisy[lane] = noisy_end(clean[lane], noise[lane], a.mean_coef, a.std);
    store_four(static_cast<T*>(a.x_T), four.first, numel, four.whole, noisy);
    T* i = static_cast<T*>(a.i);
    for (int k = 0; k < a.times.count; ++k, i += numel) {
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) {
        point[lane] = path_point(clean[lane], noisy[lane], a.times.t[k], a.times.one_minus_t[k]);
      }
      store_four(i, four.first, numel, four.whole, point);
    }
  }
}

template <class X, class T>
cudaError_t interpolate(const PathInterpolate& a, cudaStream_t stream) {
  const std::int64_t numel = a.images * a.rows * a.width;
  // Groups of four are aligned with the blocks of the noise, and the first block may begin before the first element.
  const std::int64_t head = a.noise == nullptr ? static_cast<std::int64_t>(a.offset % 4) : 0;
  const std::int64_t blocks = (head + numel - 1) / 4 + 1;
  const bool aligned = aligned_in_fours(static_cast<const X*>(a.x0), head) &&
                       aligned_in_fours(static_cast<const T*>(a.x_T), head) &&
                       aligned_in_fours(static_cast<const T*>(a.i), head) &&
                       (a.times.count <= 1 || numel % 4 == 0) &&
                       (a.noise == nullptr || aligned_in_fours(a.noise, head)) &&
                       (a.flips == nullptr || (head == 0 && a.width % 4 == 0));
  return launch_strided(path_interpolate_kernel<X, T>, static_cast<std::uint64_t>(blocks), stream, a, head, blocks,
                        aligned);
}

template <class X>
cudaError_t interpolate_to(const PathInterpolate& a, cudaStream_t stream) {
  switch (a.dtype) {
    case Dtype::kFloat32: return interpolate<X, float>(a, stream);
    case Dtype::kBFloat16: return interpolate<X, bfloat16>(a, stream);
    case Dtype::kFloat16: return interpolate<X, float16>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t path_interpolate(const PathInterpolate& a, cudaStream_t stream) {
  if (a.images == 0 || a.rows == 0 || a.width == 0) return cudaSuccess;
  switch (a.x0_dtype) {
    case Dtype::kUInt8: return interpolate_to<std::uint8_t>(a, stream);
    case Dtype::kFloat32: return interpolate_to<float>(a, stream);
    case Dtype::kBFloat16: return interpolate_to<bfloat16>(a, stream);
    case Dtype::kFloat16: return interpolate_to<float16>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace spigan::cuda
