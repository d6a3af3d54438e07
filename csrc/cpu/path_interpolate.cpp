// Draws the noise and interpolates in one pass: x0 is read once, and noise drawn here is never written to memory.
#include "cpu_kernels.h"
#include "normals.h"

namespace spigan::cpu::SPIGAN_ISA {
namespace {

// Loads the clean values of elements [begin, end) and mirrors the rows of flipped images.
template <class X>
void load_clean(const PathInterpolate& a, std::int64_t begin, std::int64_t end, float* clean) {
  const X* x0 = static_cast<const X*>(a.x0);
  if (a.flips == nullptr) {
    for (std::int64_t j = begin; j < end; ++j) clean[j - begin] = clean_value(x0[j]);
    return;
  }
  const std::int64_t image_numel = a.rows * a.width;
  for (std::int64_t j = begin; j < end;) {
    const std::int64_t row_start = j / a.width * a.width;
    const std::int64_t stop = row_start + a.width < end ? row_start + a.width : end;
    if (a.flips[j / image_numel] != 0) {
      const X* last = x0 + 2 * row_start + a.width - 1;  // the mirror image of element j is last[-j]
      for (std::int64_t e = j; e < stop; ++e) clean[e - begin] = clean_value(last[-e]);
    } else {
      for (std::int64_t e = j; e < stop; ++e) clean[e - begin] = clean_value(x0[e]);
    }
    j = stop;
  }
}

template <class X, class T>
void interpolate(const PathInterpolate& a, [[maybe_unused]] int threads) {
  const std::int64_t numel = a.images * a.rows * a.width;
  // Chunks are aligned with the blocks of the noise, and the first block may begin before the first element.
  const std::int64_t head = a.noise == nullptr ? static_cast<std::int64_t>(a.offset % 4) : 0;
  const std::int64_t chunks = (head + numel - 1) / kChunkElements + 1;
  [[maybe_unused]] const int team = team_size(numel, threads);

#pragma omp parallel for schedule(static) num_threads(team)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t start = chunk * kChunkElements - head;  // element of the chunk's first normal, < 0 in the head
    const std::int64_t begin = start < 0 ? 0 : start;
    const std::int64_t count = (start + kChunkElements < numel ? start + kChunkElements : numel) - begin;

    float normals[kChunkElements], clean[kChunkElements], noisy[kChunkElements];
    const float* noise;
    if (a.noise != nullptr) {
      noise = a.noise + begin;
    } else {
      normals_of_chunk(a.seed, a.offset / 4 + static_cast<std::uint64_t>(chunk * kChunkBlocks), normals);
      noise = normals + (begin - start);
    }
    load_clean<X>(a, begin, begin + count, clean);
    T* x_T = static_cast<T*>(a.x_T) + begin;
    for (std::int64_t j = 0; j < count; ++j) {
      noisy[j] = noisy_end(clean[j], noise[j], a.mean_coef, a.std);
      x_T[j] = from_float<T>(noisy[j]);
    }
    for (int k = 0; k < a.times.count; ++k) {
      T* i = static_cast<T*>(a.i) + k * numel + begin;
      const float t = a.times.t[k], one_minus_t = a.times.one_minus_t[k];
      for (std::int64_t j = 0; j < count; ++j) i[j] = from_float<T>(path_point(clean[j], noisy[j], t, one_minus_t));
    }
  }
}

template <class X>
void interpolate_to(const PathInterpolate& a, int threads) {
  switch (a.dtype) {
    case Dtype::kBFloat16: return interpolate<X, bfloat16>(a, threads);
    case Dtype::kFloat16: return interpolate<X, float16>(a, threads);
    default: return interpolate<X, float>(a, threads);
  }
}

}  // namespace

void path_interpolate(const PathInterpolate& a, int threads) {
  if (a.images * a.rows * a.width == 0) return;
  switch (a.x0_dtype) {
    case Dtype::kUInt8: return interpolate_to<std::uint8_t>(a, threads);
    case Dtype::kBFloat16: return interpolate_to<bfloat16>(a, threads);
    case Dtype::kFloat16: return interpolate_to<float16>(a, threads);
    default: return interpolate_to<float>(a, threads);
  }
}

}  // namespace spigan::cpu::SPIGAN_ISA
