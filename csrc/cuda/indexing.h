// Indexing for the elementwise kernels, whose threads draw one Philox block of four neighbouring elements at a time.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "../common/philox.h"
#include "device.h"

namespace spigan::cuda {

constexpr int kElementwiseThreads = 256;

// n / d. Dividing 32-bit numbers takes a fifth of the instructions.
__device__ __forceinline__ std::int64_t divide(std::int64_t n, std::int64_t d) {
  if (((n | d) >> 32) == 0) return static_cast<std::uint32_t>(n) / static_cast<std::uint32_t>(d);
  return n / d;
}

__device__ __forceinline__ std::int64_t first_item() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ std::int64_t item_stride() { return static_cast<std::int64_t>(gridDim.x) * blockDim.x; }

// The same for at most 2^31 items.
__device__ __forceinline__ std::uint32_t first_item_32() { return blockIdx.x * blockDim.x + threadIdx.x; }

__device__ __forceinline__ std::uint32_t item_stride_32() { return gridDim.x * blockDim.x; }

// Divides n < 2^31 by a fixed d in [1, 2^31): a product and a shift. With 2^(s-1) < d <= 2^s, the factor is 2^(31+s) / d
// rounded up, so it exceeds that by e / d with e < d <= 2^s, and the quotient by less than n e / (d 2^(31+s)) < 1 / d.
struct Divisor {
  std::uint32_t factor;
  int shift;

  static Divisor of(std::int64_t d) {
    int s = 0;
    while ((std::int64_t{1} << s) < d) ++s;
    const std::uint64_t dividend = std::uint64_t{1} << (31 + s), by = static_cast<std::uint64_t>(d);
    return {static_cast<std::uint32_t>((dividend + by - 1) / by), 31 + s};
  }

  __device__ __forceinline__ std::uint32_t quotient(std::uint32_t n) const {
    return static_cast<std::uint32_t>(wide_product(n, factor) >> shift);
  }
};

// How groups of four elements, aligned with Philox blocks, cover an array: group g holds elements 4 g - head to
// 4 g - head + 3. Those of [first, first + wholes) can be loaded and stored at once.
struct Groups {
  std::int64_t head, count, first, wholes;

  // `aligned`: whether elements -head, 4 - head, ... of all arrays are aligned. At most `most` groups count as whole.
  static Groups of(std::int64_t numel, std::int64_t head, bool aligned, std::int64_t most) {
    const std::int64_t count = (head + numel - 1) / 4 + 1, first = head == 0 ? 0 : 1;
    const std::int64_t wholes = std::max<std::int64_t>(0, (head + numel) / 4 - first);
    return {head, count, first, aligned && wholes <= most ? wholes : 0};
  }

  SPIGAN_HD std::int64_t others() const { return count - wholes; }

  // Number of the group that is the `item`-th of those that are not whole.
  __device__ __forceinline__ std::int64_t other(std::int64_t item) const {
    return item < first ? item : item + wholes;
  }
};

constexpr std::int64_t kMostWholes = (std::int64_t{1} << 31) - 1;  // so that 32-bit numbers count them

// Whether four elements can be loaded or stored at once at element -head of the array, and so at every fourth after it.
template <class T>
bool aligned_in_fours(const T* array, std::int64_t head) {
  const auto address = reinterpret_cast<std::uintptr_t>(array) - static_cast<std::uintptr_t>(head) * sizeof(T);
  return address % (4 * sizeof(T)) == 0;
}

// Stores elements `first` to first + 3 of `to`, of which those in [0, count) exist.
template <class T>
__device__ __forceinline__ void store_some(T* to, std::int64_t first, std::int64_t count, const float (&values)[4]) {
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    const std::int64_t at = first + lane;
    if (at < 0 || at >= count) continue;
    if constexpr (sizeof(T) == 8) {
      to[at] = static_cast<T>(values[lane]);
    } else {
      to[at] = from_float<T>(values[lane]);
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
