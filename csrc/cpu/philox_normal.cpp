// Draws standard normals with the counter-based generator of csrc/common/philox.h.
#include "cpu_kernels.h"
#include "normals.h"

namespace spigan::cpu::SPIGAN_ISA {
namespace {

template <class T>
inline T convert(float x) {
  return from_float<T>(x);
}

template <>
inline double convert<double>(float x) {
  return x;
}

template <class T>
void draw(const PhiloxNormal& a, [[maybe_unused]] int threads) {
  const std::int64_t head = static_cast<std::int64_t>(a.offset % 4);  // lanes of the first block before the row
  const std::int64_t row_chunks = (head + a.row_numel - 1) / kChunkElements + 1;
  const std::int64_t chunks = a.rows * row_chunks;
  [[maybe_unused]] const int team = team_size(a.rows * a.row_numel, threads);

#pragma omp parallel for schedule(static) num_threads(team)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t row = chunk / row_chunks, index = chunk % row_chunks;
    const std::int64_t start = index * kChunkElements - head;  // column of the chunk's first normal, < 0 in the head
    const std::int64_t begin = start < 0 ? 0 : start;
    const std::int64_t end = start + kChunkElements < a.row_numel ? start + kChunkElements : a.row_numel;

    float normals[kChunkElements];
    normals_of_chunk(static_cast<std::uint64_t>(a.seeds[row]),
                     a.offset / 4 + static_cast<std::uint64_t>(index * kChunkBlocks), normals);
    T* out = static_cast<T*>(a.out) + row * a.row_numel;
    for (std::int64_t j = begin; j < end; ++j) out[j] = convert<T>(normals[j - start]);
  }
}

}  // namespace

void philox_normal(const PhiloxNormal& a, int threads) {
  if (a.rows == 0 || a.row_numel == 0) return;
  switch (a.dtype) {
    case Dtype::kFloat64: return draw<double>(a, threads);
    case Dtype::kBFloat16: return draw<bfloat16>(a, threads);
    case Dtype::kFloat16: return draw<float16>(a, threads);
    default: return draw<float>(a, threads);
  }
}

}  // namespace spigan::cpu::SPIGAN_ISA
