#include "philox_normal.h"

#include <algorithm>
#include <cstring>

#include "../common/philox.h"

namespace spigan::cpu {
namespace {

// 64 blocks: the words and normals of a chunk (2 KiB) stay in the L1 cache.
constexpr std::int64_t kChunkBlocks = 64;
constexpr std::int64_t kChunkElements = 4 * kChunkBlocks;

// 4096 normals take about 40 us; a thread with less to do than that costs more to start and to wait for than it saves.
constexpr std::int64_t kThreadElements = 4096;

// Block numbers are 62 bits wide, because element indices wrap at 2^64.
constexpr std::uint64_t kBlockMask = ~std::uint64_t{0} >> 2;

// All four lanes of `blocks` <= kChunkBlocks consecutive blocks. Words first and floats second: the integer loop
// vectorises, which a libm call inside it would prevent.
void normals_of_blocks(std::uint64_t seed, std::uint64_t first_block, std::int64_t blocks, float* normals) {
  std::uint32_t x0[kChunkBlocks], x1[kChunkBlocks], x2[kChunkBlocks], x3[kChunkBlocks];
  for (std::int64_t j = 0; j < blocks; ++j) {
    const Philox4x32 words = philox_block(seed, (first_block + static_cast<std::uint64_t>(j)) & kBlockMask);
    x0[j] = words.x0;
    x1[j] = words.x1;
    x2[j] = words.x2;
    x3[j] = words.x3;
  }
  for (std::int64_t j = 0; j < blocks; ++j) {
    box_muller(x0[j], x1[j], normals[4 * j], normals[4 * j + 1]);
    box_muller(x2[j], x3[j], normals[4 * j + 2], normals[4 * j + 3]);
  }
}

}  // namespace

void philox_normal(float* out, const std::int64_t* seeds, std::int64_t rows, std::int64_t row_numel,
                   std::uint64_t offset, [[maybe_unused]] int threads) {
  if (rows == 0 || row_numel == 0) return;
  const std::int64_t head = static_cast<std::int64_t>(offset % 4);  // lanes of the first block that precede the row
  const std::int64_t row_chunks = (head + row_numel - 1) / kChunkElements + 1;
  const std::int64_t chunks = rows * row_chunks;
  [[maybe_unused]] const int team =
      static_cast<int>(std::clamp<std::int64_t>(rows * row_numel / kThreadElements, 1, threads));

#pragma omp parallel for schedule(static) num_threads(team)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t row = chunk / row_chunks;
    const std::int64_t chunk_start = chunk % row_chunks * kChunkElements - head;  // column; < 0 in the head
    const std::int64_t begin = std::max<std::int64_t>(chunk_start, 0);
    const std::int64_t end = std::min(chunk_start + kChunkElements, row_numel);
    const std::int64_t blocks = (end - chunk_start + 3) / 4;
    const std::uint64_t first_block = offset / 4 + static_cast<std::uint64_t>(chunk % row_chunks * kChunkBlocks);

    float normals[kChunkElements];
    normals_of_blocks(static_cast<std::uint64_t>(seeds[row]), first_block, blocks, normals);
    std::memcpy(out + row * row_numel + begin, normals + (begin - chunk_start),
                static_cast<std::size_t>(end - begin) * sizeof(float));
  }
}

}  // namespace spigan::cpu
