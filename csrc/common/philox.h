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

// The block function. For each 64-bit key it is a bijection of the 128-bit counter.
SPIGAN_HD Philox4x32 philox4x32_10(Philox4x32 counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53} * counter.x0;
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * counter.x2;
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter.x1 ^ key.k0,
               static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter.x3 ^ key.k1,
               static_cast<std::uint32_t>(product0)};
    key = {key.k0 + 0x9E3779B9u, key.k1 + 0xBB67AE85u};  // Weyl sequence: golden ratio and sqrt(3) - 1
  }
  return counter;
}

// The words of elements 4 * block to 4 * block + 3 of the stream of `seed`; block < 2^62.
SPIGAN_HD Philox4x32 philox_block(std::uint64_t seed, std::uint64_t block) {
  return philox4x32_10({static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), 0, 0},
                       {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
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
