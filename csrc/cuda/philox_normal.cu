// Draws standard normals with the counter-based generator of csrc/common/philox.h. A thread draws one block of four
// numbers at a time and, if memory is aligned, stores it with one instruction.
#include "cuda_kernels.h"
#include "indexing.h"
#include "launch.h"
#include "box_muller.h"

namespace spigan::cuda {
namespace {

struct Rows {
  Groups groups;               // of each row
  std::uint32_t wholes;        // in all rows
  Divisor wholes_of_row;
  std::uint64_t first_block;   // of the first whole group
  void* first;                 // its address in the first row
};

template <class T>
__global__ void __launch_bounds__(kElementwiseThreads)
    philox_normal_kernel(const __grid_constant__ PhiloxNormal a, const __grid_constant__ Rows r) {
  float normals[4];
  if constexpr (sizeof(T) != 8) {
    const std::uint32_t wholes_of_row = static_cast<std::uint32_t>(r.groups.wholes);
    const std::uint32_t row_fours = static_cast<std::uint32_t>(a.row_numel / 4);
    for (std::uint32_t item = first_item_32(); item < r.wholes; item += item_stride_32()) {
      const std::uint32_t row = r.wholes_of_row.quotient(item), group = item - row * wholes_of_row;
      draw_block(static_cast<std::uint64_t>(a.seeds[row]), r.first_block + group, normals);
      store_global(static_cast<T*>(r.first) + std::int64_t{4} * (row * row_fours + group), pack_as<T>(normals));
    }
  }
  const std::int64_t others = r.groups.others();
  for (std::int64_t item = first_item(); item < a.rows * others; item += item_stride()) {
    const std::int64_t row = divide(item, others), group = r.groups.other(item - row * others);
    draw_block(static_cast<std::uint64_t>(a.seeds[row]), a.offset / 4 + static_cast<std::uint64_t>(group), normals);
    store_some(static_cast<T*>(a.out) + row * a.row_numel, 4 * group - r.groups.head, a.row_numel, normals);
  }
}

template <class T>
cudaError_t draw(const PhiloxNormal& a, cudaStream_t stream) {
  const std::int64_t head = static_cast<std::int64_t>(a.offset % 4);
  const bool aligned = sizeof(T) != 8 && aligned_in_fours(static_cast<const T*>(a.out), head) &&
                       (a.rows == 1 || a.row_numel % 4 == 0);
  Rows r = {};
  // The bound on each row keeps 32-bit numbers large enough for the groups of all rows.
  r.groups = Groups::of(a.row_numel, head, aligned, kMostWholes / a.rows - 1);
  r.wholes = static_cast<std::uint32_t>(a.rows * r.groups.wholes);
  r.wholes_of_row = Divisor::of(std::max<std::int64_t>(1, r.groups.wholes));
  r.first_block = a.offset / 4 + static_cast<std::uint64_t>(r.groups.first);
  r.first = static_cast<T*>(a.out) + (4 * r.groups.first - head);
  const std::int64_t work = std::max<std::int64_t>(r.wholes, a.rows * r.groups.others());
  return launch_strided(philox_normal_kernel<T>, static_cast<std::uint64_t>(work), stream, a, r);
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
