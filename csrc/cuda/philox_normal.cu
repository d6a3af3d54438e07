// Draws standard normals with the counter-based generator of csrc/common/philox.h. A thread draws one block of four
// numbers at a time and, if memory is aligned, stores it with one instruction.
#include "../common/philox.h"
#include "cuda_kernels.h"
#include "indexing.h"
#include "launch.h"

namespace spigan::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kElementwiseThreads)
    philox_normal_kernel(PhiloxNormal a, std::int64_t row_blocks, bool aligned) {
  const std::int64_t head = static_cast<std::int64_t>(a.offset % 4);  // lanes of the first block before the row
  for (std::int64_t item = first_item(); item < a.rows * row_blocks; item += item_stride()) {
    const std::int64_t row = a.rows == 1 ? 0 : divide(item, row_blocks);
    const std::int64_t block = item - row * row_blocks;
    const Philox4x32 words = philox_block(static_cast<std::uint64_t>(a.seeds[row]),
                                          (a.offset / 4 + static_cast<std::uint64_t>(block)) & kBlockMask);
    float normals[4];
    box_muller(words.x0, words.x1, normals[0], normals[1]);
    box_muller(words.x2, words.x3, normals[2], normals[3]);
    T* out = static_cast<T*>(a.out) + row * a.row_numel;
    const std::int64_t first = 4 * block - head;  // column of lane 0, < 0 within the head
    if constexpr (sizeof(T) == 8) {
      for (int lane = 0; lane < 4; ++lane) {
        if (first + lane >= 0 && first + lane < a.row_numel) out[first + lane] = static_cast<T>(normals[lane]);
      }
    } else {
      store_four(out, first, a.row_numel, aligned && first >= 0 && first + 4 <= a.row_numel, normals);
    }
  }
}

template <class T>
cudaError_t draw(const PhiloxNormal& a, cudaStream_t stream) {
  const std::int64_t head = static_cast<std::int64_t>(a.offset % 4);
  const std::int64_t row_blocks = (head + a.row_numel - 1) / 4 + 1;
  const bool aligned = aligned_in_fours(static_cast<const T*>(a.out), head) && (a.rows == 1 || a.row_numel % 4 == 0);
  return launch_strided(philox_normal_kernel<T>, static_cast<std::uint64_t>(a.rows * row_blocks), stream, a,
                        row_blocks, aligned);
}

}  // namespace

cudaError_t philox_normal(const PhiloxNormal& a, cudaStream_t stream) {
  if (a.rows == 0 || a.row_numel == 0) return cudaSuccess;
  switch (a.dtype) {
    case Dtype::kFloat32: return draw<float>(a, stream);
    case Dtype::kBFloat16: return draw<bfloat16>(a, stream);
    case Dtype::kFloat16: return draw<float16>(a, stream);
    case Dtype::kFloat64: return draw<double>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace spigan::cuda
