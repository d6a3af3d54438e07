// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and Box-Muller.
//
// Element e of a seed's stream is always lane e % 4 of block e / 4, no matter who draws it. spigan/ops/philox_normal.py
// defines the same stream in PyTorch. The two agree to within 1e-5, the rounding of log, sqrt, cos and sin.
#pragma once

#include "math.h"

SPIGAN_COMMON_BEGIN

struct Philox4x32 {
  std::uint32_t x0, x1, x2, x3;
};

struct PhiloxKey {
  std::uint32_t k0, k1;
};

SPIGAN_HD std::uint64_t wide_product(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
  std::uint64_t product;  // one instruction; for a product of 64-bit factors nvcc also adds their upper words
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return std::uint64_t{a} * b;
#endif
}

SPIGAN_HD Philox4x32 philox_round(Philox4x32 counter, PhiloxKey key) {
  const std::uint64_t product0 = wide_product(0xD2511F53u, counter.x0);
  const std::uint64_t product1 = wide_product(0xCD9E8D57u, counter.x2);
  return {static_cast<std::uint32_t>(product1 >> 32) ^ counter.x1 ^ key.k0,
          static_cast<std::uint32_t>(product1),
          static_cast<std::uint32_t>(product0 >> 32) ^ counter.x3 ^ key.k1,
          static_cast<std::uint32_t>(product0)};
}

// Weyl sequence: golden ratio and sqrt(3) - 1.
SPIGAN_HD PhiloxKey next_key(PhiloxKey key) { return {key.k0 + 0x9E3779B9u, key.k1 + 0xBB67AE85u}; }

// The block function. For each 64-bit key it is a bijection of the 128-bit counter.
SPIGAN_HD Philox4x32 philox4x32_10(Philox4x32 counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    counter = philox_round(counter, key);
    key = next_key(key);
  }
  return counter;
}

SPIGAN_HD Philox4x32 counter_of(std::uint64_t block) {
  return {static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), 0, 0};
}

SPIGAN_HD PhiloxKey key_of(std::uint64_t seed) {
  return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
}

// The words of elements 4 * block to 4 * block + 3 of the stream of `seed`; block < 2^62.
SPIGAN_HD Philox4x32 philox_block(std::uint64_t seed, std::uint64_t block) {
  return philox4x32_10(counter_of(block), key_of(seed));
}

// Two independent standard normals from two words; |n| <= sqrt(66 ln 2) = 6.77.
SPIGAN_HD void box_muller(std::uint32_t word0, std::uint32_t word1, float& n0, float& n1) {
  constexpr float kTwoPowMinus32 = 2.3283064365386963e-10f;
  constexpr float kTwoPowMinus33 = 1.1641532182693481e-10f;
  // 2^-33 keeps the argument of the logarithm above 0. Multiplying by a power of two is exact, so only the sum rounds,
  // and a compiler that fuses the two into one multiply-add gets the same bits.
  const float u1 = static_cast<float>(word0) * kTwoPowMinus32 + kTwoPowMinus33;
  const float u2 = static_cast<float>(word1) * kTwoPowMinus32;
  const float radius = sqrtf(-2.0f * log_(u1));
  float cosine, sine;
  cos_sin_of_turn(u2, cosine, sine);
  n0 = radius * cosine;
  n1 = radius * sine;
}

SPIGAN_COMMON_END
