// Draws the noise and interpolates in one pass: x0 is read once, and noise drawn here stays in registers. A thread
// handles four neighbouring elements, one Philox block, at a time.
#include "cuda_kernels.h"
#include "indexing.h"
#include "launch.h"
#include "box_muller.h"

namespace spigan::cuda {
namespace {

struct Plan {
  Groups groups;
  PhiloxKeys keys;
  // Of the first whole group.
  std::uint64_t first_block;
  const void* x0;
  const float* noise;
  void *x_T, *i;
  // Whole groups of a row, and rows of an image, if images are mirrored.
  std::uint32_t row_groups;
  Divisor by_row_groups, by_rows;
};

// ---- Whole groups ----

template <class X>
__device__ __forceinline__ void load_clean(const X* x0, float (&clean)[4]) {
  const Packed<X, 4> packed = load_words<static_cast<int>(sizeof(X))>(x0);
  if constexpr (sizeof(X) == 1) {
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      clean[lane] = clean_value(static_cast<std::uint8_t>(packed.word[0] >> (8 * lane)));
    }
  } else {
    unpack_as<X>(packed, clean);
  }
}

// Number of the group of x0 that holds the elements of `group`. If `mirrored` is set, they are in reverse order.
__device__ __forceinline__ std::uint32_t source_group(const PathInterpolate& a, const Plan& p, std::uint32_t group,
                                                      bool& mirrored) {
  mirrored = false;
  if (a.flips == nullptr) return group;
  const std::uint32_t row = p.by_row_groups.quotient(group);
  mirrored = a.flips[p.by_rows.quotient(row)] != 0;
  return mirrored ? (2 * row + 1) * p.row_groups - 1 - group : group;
}

template <class X, class T>
__device__ __forceinline__ void interpolate_whole(const PathInterpolate& a, const Plan& p, std::int64_t numel,
                                                  std::uint32_t group) {
  float loaded[4], clean[4], noise[4], noisy[4], point[4];
  bool mirrored;
  const std::uint32_t source = source_group(a, p, group, mirrored);
  load_clean(static_cast<const X*>(p.x0) + std::int64_t{4} * source, loaded);
  const std::int64_t at = std::int64_t{4} * group;
  if (a.noise == nullptr) {
    draw_block(p.keys, (p.first_block + group) & kBlockMask, noise);
  } else {
    unpack(load_words<4>(p.noise + at), noise);
  }
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    clean[lane] = mirrored ? loaded[3 - lane] : loaded[lane];
    noisy[lane] = noisy_end(clean[lane], noise[lane], a.mean_coef, a.std);
  }
  store_global(static_cast<T*>(p.x_T) + at, pack_as<T>(noisy));
  T* i = static_cast<T*>(p.i) + at;
#pragma unroll 1
  for (int k = 0; k < a.times.count; ++k, i += numel) {
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      point[lane] = path_point(clean[lane], noisy[lane], a.times.t[k], a.times.one_minus_t[k]);
    }
    store_global(i, pack_as<T>(point));
  }
}

// ---- Other groups: unaligned, or only partly within the array ----

// Index in x0 of element `at`.
__device__ __forceinline__ std::int64_t source_index(const PathInterpolate& a, std::int64_t at) {
  const bool mirrored = a.flips != nullptr && a.flips[divide(at, a.rows * a.width)] != 0;
  return mirrored ? 2 * divide(at, a.width) * a.width + a.width - 1 - at : at;
}

template <class X, class T>
__device__ __forceinline__ void interpolate_some(const PathInterpolate& a, const Plan& p, std::int64_t numel,
                                                 std::int64_t group) {
  const X* x0 = static_cast<const X*>(a.x0);
  const std::int64_t first = 4 * group - p.groups.head;
  float clean[4] = {}, noise[4] = {}, noisy[4], point[4];
  if (a.noise == nullptr) {
    draw_block(p.keys, (a.offset / 4 + static_cast<std::uint64_t>(group)) & kBlockMask, noise);
  }
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    const std::int64_t at = first + lane;
    if (at >= 0 && at < numel) {
      clean[lane] = clean_value(x0[source_index(a, at)]);
      if (a.noise != nullptr) noise[lane] = a.noise[at];
    }
    noisy[lane] = noisy_end(clean[lane], noise[lane], a.mean_coef, a.std);
  }
  store_some(static_cast<T*>(a.x_T), first, numel, noisy);
  T* i = static_cast<T*>(a.i);
#pragma unroll 1
  for (int k = 0; k < a.times.count; ++k, i += numel) {
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      point[lane] = path_point(clean[lane], noisy[lane], a.times.t[k], a.times.one_minus_t[k]);
    }
    store_some(i, first, numel, point);
  }
}

template <class X, class T>
__global__ void __launch_bounds__(kElementwiseThreads)
    path_interpolate_kernel(const __grid_constant__ PathInterpolate a, const __grid_constant__ Plan p) {
  const std::int64_t numel = a.images * a.rows * a.width;
  const std::uint32_t wholes = static_cast<std::uint32_t>(p.groups.wholes);
  for (std::uint32_t item = first_item_32(); item < wholes; item += item_stride_32()) {
    interpolate_whole<X, T>(a, p, numel, item);
  }
  for (std::int64_t item = first_item(); item < p.groups.others(); item += item_stride()) {
    interpolate_some<X, T>(a, p, numel, p.groups.other(item));
  }
}

// ---- Launching ----

template <class X, class T>
cudaError_t interpolate(const PathInterpolate& a, cudaStream_t stream) {
  const std::int64_t numel = a.images * a.rows * a.width;
  const std::int64_t head = a.noise == nullptr ? static_cast<std::int64_t>(a.offset % 4) : 0;
  const bool aligned = aligned_in_fours(static_cast<const X*>(a.x0), head) &&
                       aligned_in_fours(static_cast<const T*>(a.x_T), head) &&
                       aligned_in_fours(static_cast<const T*>(a.i), head) &&
                       (a.times.count <= 1 || numel % 4 == 0) &&
                       (a.noise == nullptr || aligned_in_fours(a.noise, head)) &&
                       (a.flips == nullptr || (head == 0 && a.width % 4 == 0));
  Plan p = {};
  p.groups = Groups::of(numel, head, aligned, kMostWholes);
  p.keys = keys_of(a.seed);
  p.first_block = a.offset / 4 + static_cast<std::uint64_t>(p.groups.first);
  if (p.groups.wholes > 0) {
    const std::int64_t first = 4 * p.groups.first - head;
    p.x0 = static_cast<const X*>(a.x0) + first;
    p.noise = a.noise == nullptr ? nullptr : a.noise + first;
    p.x_T = static_cast<T*>(a.x_T) + first;
    p.i = static_cast<T*>(a.i) + first;
    p.row_groups = static_cast<std::uint32_t>(a.width / 4);
    p.by_row_groups = Divisor::of(a.flips == nullptr ? 1 : a.width / 4);
    p.by_rows = Divisor::of(a.flips == nullptr ? 1 : a.rows);
  }
  const std::int64_t work = std::max(p.groups.wholes, p.groups.others());
  return launch_strided(path_interpolate_kernel<X, T>, static_cast<std::uint64_t>(work), stream, a, p);
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
