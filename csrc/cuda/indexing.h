// Indexing for the elementwise kernels, whose threads draw one Philox block of four neighbouring elements at a time.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "device.h"

namespace spigan::cuda {

constexpr int kElementwiseThreads = 256;

// Block numbers are 62 bits wide, because element indices wrap at 2^64.
constexpr std::uint64_t kBlockMask = ~std::uint64_t{0} >> 2;

// n / d. Dividing 32-bit numbers takes a fifth of the instructions.
__device__ __forceinline__ std::int64_t divide(std::int64_t n, std::int64_t d) {
  if (((n | d) >> 32) == 0) return static_cast<std::uint32_t>(n) / static_cast<std::uint32_t>(d);
  return n / d;
}

__device__ __forceinline__ std::int64_t first_item() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ std::int64_t item_stride() { return static_cast<std::int64_t>(gridDim.x) * blockDim.x; }

// Whether four elements can be loaded or stored at once at element -head of the array, and so at every fourth after it.
template <class T>
bool aligned_in_fours(const T* array, std::int64_t head) {
  const auto address = reinterpret_cast<std::uintptr_t>(array) - static_cast<std::uintptr_t>(head) * sizeof(T);
  return address % (4 * sizeof(T)) == 0;
}

// Stores elements `first` to first + 3 of `to`. If `whole`, all four exist and are aligned. If not, only those in
// [0, count) exist.
template <class T>
__device__ __forceinline__ void store_four(T* to, std::int64_t first, std::int64_t count, bool whole,
                                           const float (&values)[4]) {
  if (whole) {
    store_words(to + first, pack_as<T>(values));
  } else {
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      const std::int64_t at = first + lane;
      if (at >= 0 && at < count) to[at] = from_float<T>(values[lane]);
    }
  }
}

// ---- Channels-last images: a few neighbouring lanes handle neighbouring channels of the same pixels ----

// Elements in 16 bytes, the most that a thread loads or stores at once.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// The smallest power of two >= n, but at most `most`, which is a power of two itself.
inline int power_of_two_from(std::int64_t n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

inline std::int64_t divide_up(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }

inline bool aligned_to_16(std::initializer_list<const void*> addresses) {
  return std::all_of(addresses.begin(), addresses.end(),
                     [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; });
}

// Loads elements `first` to first + N - 1 of an array, or fills `to` with `otherwise` if the array is null.
template <int N>
__device__ __forceinline__ void load_or(const void* array, std::int64_t first, float otherwise, float (&to)[N]) {
  if (array != nullptr) {
    load_elements(static_cast<const float*>(array) + first, to);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = otherwise;
  }
}

}  // namespace spigan::cuda
