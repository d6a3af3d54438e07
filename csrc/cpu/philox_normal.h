// Standard normals from the counter-based generator of csrc/common/philox.h, on the CPU.
#pragma once

#include <cstdint>

namespace spigan::cpu {

// out[i, j] = element offset + j (mod 2^64) of the stream of seeds[i].
//
//   out        [rows, row_numel], contiguous, overwritten
//   seeds      [rows], the bits of a uint64
//   rows, row_numel >= 0; threads >= 1: most threads to use (1 when built without OpenMP)
//
// The result does not depend on `threads`.
void philox_normal(float* out, const std::int64_t* seeds, std::int64_t rows, std::int64_t row_numel,
                   std::uint64_t offset, int threads);

}  // namespace spigan::cpu
