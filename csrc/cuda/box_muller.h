// Draws the four normals of a Philox block with the instructions that a GPU has for logarithm, root, sine and cosine.
//
// The numbers are those of box_muller in common/philox.h up to rounding. Against the same formula in float64, the error
// is at most 1.1e-6 max(r, 1.1) for a pair of radius r <= 6.77, and so at most 7.4e-6. Of it, relative to r,
//   4.2e-7  are from sine and cosine
//   2.1e-7  from the angle, which is rounded near pi
//   1.2e-7  from the logarithm for u1 < 1/2: half of its relative error. For larger u1 its error is an absolute one,
//           which changes r <= 1.18 by at most 1.65e-7 / r, and the series begins at r = 0.18.
//   3.0e-7  from the root (1.2e-7) and the rounding of products
#pragma once

#include "../common/philox.h"
#include "device.h"

namespace spigan::cuda {

// Block numbers are 62 bits wide, because element indices wrap at 2^64.
constexpr std::uint64_t kBlockMask = ~std::uint64_t{0} >> 2;

__device__ __forceinline__ void approximate_box_muller(std::uint32_t word0, std::uint32_t word1, float& n0,
                                                       float& n1) {
  const float u1 = multiply_add(static_cast<float>(word0), 2.3283064365386963e-10f, 1.1641532182693481e-10f);
  // r^2 = -2 ln u1. Near u1 = 1, where the absolute error of the logarithm would be large beside r, it is the series
  // of -2 ln(1 - w) up to w^4; w is exact there.
  const float w = 1.0f - u1;
  float series = multiply_add(w, 0.5f, 0.6666667f);
  series = multiply_add(series, w, 1.0f);
  series = multiply_add(series, w, 2.0f) * w;
  const float square = w < 0.015625f ? series : approximate_log2(u1) * -1.3862944f;
  const float radius = approximate_sqrt(square);
  // In [-pi, pi], where sine and cosine are accurate: cos(2 pi u2) = -cos(2 pi u2 - pi), and the same for the sine.
  const float angle = multiply_add(static_cast<float>(word1), 1.4629181e-9f, -3.1415927f);
  float cosine, sine;
  approximate_cos_sin(angle, cosine, sine);
  n0 = -radius * cosine;
  n1 = -radius * sine;
}

__device__ __forceinline__ void normals_of(const Philox4x32& words, float (&normals)[4]) {
  approximate_box_muller(words.x0, words.x1, normals[0], normals[1]);
  approximate_box_muller(words.x2, words.x3, normals[2], normals[3]);
}

// Draws elements 4 * block to 4 * block + 3 of the stream of `seed`.
__device__ __forceinline__ void draw_block(std::uint64_t seed, std::uint64_t block, float (&normals)[4]) {
  normals_of(philox_block(seed, block & kBlockMask), normals);
}

// The keys of all rounds. As an argument of a kernel they are operands of its instructions, which saves computing them.
struct PhiloxKeys {
  PhiloxKey of_round[10];
};

inline PhiloxKeys keys_of(std::uint64_t seed) {
  PhiloxKeys keys;
  PhiloxKey key = key_of(seed);
  for (PhiloxKey& of_round : keys.of_round) {
    of_round = key;
    key = next_key(key);
  }
  return keys;
}

__device__ __forceinline__ void draw_block(const PhiloxKeys& keys, std::uint64_t block, float (&normals)[4]) {
  Philox4x32 counter = counter_of(block);
#pragma unroll
  for (int round = 0; round < 10; ++round) counter = philox_round(counter, keys.of_round[round]);
  normals_of(counter, normals);
}

}  // namespace spigan::cuda
