// Draws the normals of consecutive Philox blocks.
#pragma once

#include "../common/philox.h"

namespace spigan::cpu::SPIGAN_ISA {

// With 64 blocks, the words and normals of a chunk (2 KiB) stay in the L1 cache.
constexpr std::int64_t kChunkBlocks = 64;
constexpr std::int64_t kChunkElements = 4 * kChunkBlocks;

// Block numbers are 62 bits wide, because element indices wrap at 2^64.
constexpr std::uint64_t kBlockMask = ~std::uint64_t{0} >> 2;

// A thread with fewer normals than this to draw costs more to start and join than it saves.
constexpr std::int64_t kThreadElements = 16384;

// Writes the four normals of each of the kChunkBlocks blocks that start at `first_block`. Two loops over the whole
// chunk, one for the integer words and one for the floats, so that both vectorise.
inline void normals_of_chunk(std::uint64_t seed, std::uint64_t first_block, float* normals) {
  std::uint32_t x0[kChunkBlocks], x1[kChunkBlocks], x2[kChunkBlocks], x3[kChunkBlocks];
  for (std::int64_t j = 0; j < kChunkBlocks; ++j) {
    const Philox4x32 words = philox_block(seed, (first_block + static_cast<std::uint64_t>(j)) & kBlockMask);
    x0[j] = words.x0;
    x1[j] = words.x1;
    x2[j] = words.x2;
    x3[j] = words.x3;
  }
  for (std::int64_t j = 0; j < kChunkBlocks; ++j) {
    box_muller(x0[j], x1[j], normals[4 * j], normals[4 * j + 1]);
    box_muller(x2[j], x3[j], normals[4 * j + 2], normals[4 * j + 3]);
  }
}

// Number of threads to use for drawing `elements` normals.
inline int team_size(std::int64_t elements, int threads) {
  const std::int64_t worth = elements / kThreadElements;
  return worth < 1 ? 1 : worth < threads ? static_cast<int>(worth) : threads;
}

}  // namespace spigan::cpu::SPIGAN_ISA
