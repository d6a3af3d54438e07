// The end of a layer (LayerEnd in csrc/common/arguments.h) on the CPU, and helpers that the kernels using it share.
#pragma once

#include <cstdlib>

#include "../common/activate_and_clamp.h"
#include "cpu_kernels.h"
#include "normals.h"

namespace spigan::cpu::SPIGAN_ISA {

template <class T>
struct WideOf {
  using type = float;
};

template <>
struct WideOf<double> {
  using type = double;
};

// The type in which arithmetic on elements of type T is done.
template <class T>
using Wide = typename WideOf<T>::type;

template <class T>
inline Wide<T> to_wide(T x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return x;
  } else {
    return to_float(x);
  }
}

template <class T>
inline T from_wide(Wide<T> x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

template <class W>
struct Buffer {
  W* data;  // null if out of memory
  explicit Buffer(std::int64_t count)
      : data(static_cast<W*>(std::aligned_alloc(64, (static_cast<std::size_t>(count) * sizeof(W) / 64 + 1) * 64))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// Number of threads for `tasks` tasks that have `numel` elements in total.
inline int team_of(std::int64_t tasks, std::int64_t numel, int threads) {
  const int team = team_size(numel, threads);
  return tasks < 1 ? 1 : tasks < team ? static_cast<int>(tasks) : team;
}

constexpr int kTermGroup = 4;

template <int Count, class S, class W>
inline W sum_of_terms(const S* const (&from)[kTermGroup], const W (&factor)[kTermGroup], std::int64_t e, W sum) {
  if constexpr (Count == 0) {
    return sum;
  } else {
    return multiply_add(factor[Count - 1], to_wide(from[Count - 1][e]),
                        sum_of_terms<Count - 1>(from, factor, e, sum));
  }
}

template <int Count, class S, class W>
void add_terms(const S* const* from, const W* factor, std::int64_t numel, bool first, W* to) {
  const S* b_from[kTermGroup] = {};
  W b_factor[kTermGroup] = {};
  for (int k = 0; k < Count; ++k) {
    b_from[k] = from[k];
    b_factor[k] = factor[k];
  }
  if (first) {
#pragma omp simd
    for (std::int64_t e = 0; e < numel; ++e) to[e] = sum_of_terms<Count>(b_from, b_factor, e, W(0));
  } else {
#pragma omp simd
    for (std::int64_t e = 0; e < numel; ++e) to[e] = sum_of_terms<Count>(b_from, b_factor, e, to[e]);
  }
}

// to[e] = sum of factor[k] from[k][e] over k < count.
template <class S, class W>
void weighted_sum(const S* const* from, const W* factor, int count, std::int64_t numel, W* to) {
  int k = 0;
  do {
    const bool first = k == 0;
    switch (count - k) {
      case 0: add_terms<0>(from + k, factor + k, numel, first, to); break;
      case 1: add_terms<1>(from + k, factor + k, numel, first, to); break;
      case 2: add_terms<2>(from + k, factor + k, numel, first, to); break;
      case 3: add_terms<3>(from + k, factor + k, numel, first, to); break;
      default: add_terms<kTermGroup>(from + k, factor + k, numel, first, to);
    }
    k += kTermGroup;
  } while (k < count);
}

// Ends the pixels of a layer. Each thread has its own End. `T` is the element type of the result.
template <class T>
class End {
 public:
  using W = Wide<T>;

  explicit End(const LayerEnd& args)
      : a_(args),
        vectors_(3 * args.channels),
        strength_(args.strength == nullptr ? W(1) : *static_cast<const W*>(args.strength)),
        seed_(args.seed == nullptr ? 0 : static_cast<std::uint64_t>(*args.seed)) {
    if (!enough_memory()) return;
    for (std::int64_t c = 0; c < a_.channels; ++c) {
      vectors_.data[c] = W(0);
      vectors_.data[a_.channels + c] = W(1);
    }
  }

  bool enough_memory() const { return vectors_.data != nullptr; }

  // Ends pixel number `pixel` of an image, given v[c], the layer's value for channel c, of type W or T. `v` may be the
  // address where the result is written.
  template <class V>
  void operator()(const V* v, std::int64_t image, std::int64_t pixel) {
    const std::int64_t channels = a_.channels, place = image * a_.height * a_.width + pixel;
    const W* const zeros = vectors_.data;
    const W* const ones = zeros + channels;
    const W* const factor = a_.factor == nullptr ? ones : wide(a_.factor) + image * channels;
    const W* const bias = a_.bias == nullptr ? zeros : wide(a_.bias) + image * a_.bias_stride;
    const W shift = noise(image, pixel);
    const W slope = static_cast<W>(a_.slope), gain = static_cast<W>(a_.gain), clamp = static_cast<W>(a_.clamp);
    const auto value = [=](std::int64_t c) {
      return activate_and_clamp(multiply_add(to_wide(v[c]), factor[c], shift + bias[c]), slope, gain, clamp);
    };
    if (a_.rgb == nullptr) return write(value, image, place);

    W* const values = vectors_.data + 2 * channels;
#pragma omp simd
    for (std::int64_t c = 0; c < channels; ++c) values[c] = value(c);
    for (std::int64_t r = 0; r < a_.rgb_channels; ++r) {
      const float* weight = a_.rgb_weight + (image * a_.rgb_channels + r) * channels;
      W sum = W(0);
#pragma omp simd reduction(+ : sum)
      for (std::int64_t c = 0; c < channels; ++c) sum += weight[c] * values[c];
      a_.rgb[place * a_.rgb_channels + r] = static_cast<float>(sum);
    }
    write([=](std::int64_t c) { return values[c]; }, image, place);
  }

 private:
  static const W* wide(const void* address) { return static_cast<const W*>(address); }

  W noise(std::int64_t image, std::int64_t pixel) {
    if (a_.noise != nullptr) return strength_ * wide(a_.noise)[image * a_.noise_stride + pixel];
    if (a_.seed == nullptr) return W(0);
    const std::int64_t element = image * a_.height * a_.width + pixel, chunk = element / kChunkElements;
    if (chunk != drawn_chunk_) {
      normals_of_chunk(seed_, static_cast<std::uint64_t>(chunk * kChunkBlocks), normals_);
      drawn_chunk_ = chunk;
    }
    return strength_ * static_cast<W>(normals_[element % kChunkElements]);
  }

  template <class Value>
  void write(Value value, std::int64_t image, std::int64_t place) const {
    if (a_.out == nullptr) return;
    const std::int64_t channels = a_.channels;
    const W* const next = a_.next_factor == nullptr ? nullptr : wide(a_.next_factor) + image * channels;
    const T* const add = a_.add == nullptr ? nullptr : static_cast<const T*>(a_.add) + place * channels;
    if (next == nullptr && add == nullptr) {
      write_each(value, place);
    } else if (add == nullptr) {
      write_each([=](std::int64_t c) { return value(c) * next[c]; }, place);
    } else if (next == nullptr) {
      write_each([=](std::int64_t c) { return value(c) + to_wide(add[c]); }, place);
    } else {
      write_each([=](std::int64_t c) { return multiply_add(value(c), next[c], to_wide(add[c])); }, place);
    }
  }

  template <class Value>
  void write_each(Value value, std::int64_t place) const {
    const std::int64_t channels = a_.channels;
    T* const out = static_cast<T*>(a_.out) + place * channels;
    // simd is valid even if `value` reads from `out`: it then reads only the element that is about to be written.
#pragma omp simd
    for (std::int64_t c = 0; c < channels; ++c) out[c] = from_wide<T>(value(c));
  }

  const LayerEnd& a_;
  const Buffer<W> vectors_;  // zeros, ones, and the values of a pixel
  const W strength_;
  const std::uint64_t seed_;
  std::int64_t drawn_chunk_ = -1;  // the chunk of the noise stream that is in normals_
  float normals_[kChunkElements];
};

}  // namespace spigan::cpu::SPIGAN_ISA
