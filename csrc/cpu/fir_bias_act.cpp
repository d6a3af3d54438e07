// FIR resampling and the end of a layer in one pass, and the derivative of the end of a layer. Images are
// channels-last, so that loops over channels vectorise.
#include "layer_end.h"

namespace spigan::cpu::SPIGAN_ISA {
namespace {

constexpr int kMaxTaps = 8;

// The filter as it is correlated, with its gain. If it is an outer product, also the two vectors.
template <class W>
struct Filter {
  W whole[kMaxTaps][kMaxTaps], column[kMaxTaps], row[kMaxTaps];
  bool separable;

  explicit Filter(const FirBiasAct& a) {
    const int taps = static_cast<int>(a.taps), last = taps - 1;
    const auto tap = [&](int j, int i) {
      return static_cast<double>(a.flip ? a.filter[(last - j) * taps + last - i] : a.filter[j * taps + i]);
    };
    int pivot_j = 0, pivot_i = 0;
    double largest = 0.0;
    for (int j = 0; j < taps; ++j) {
      for (int i = 0; i < taps; ++i) {
        const double value = tap(j, i), magnitude = value < 0.0 ? -value : value;
        whole[j][i] = static_cast<W>(value * a.fir_gain);
        if (magnitude > largest) {
          largest = magnitude;
          pivot_j = j;
          pivot_i = i;
        }
      }
    }
    // Test for rank 1, with a tolerance for an outer product that was rounded to float32. float64 results tolerate no
    // error. Products of two taps are exact in double.
    const double pivot = tap(pivot_j, pivot_i), tolerance = sizeof(W) == sizeof(double) ? 0.0 : 5e-7 * pivot * pivot;
    separable = largest > 0.0;
    for (int j = 0; j < taps; ++j) {
      for (int i = 0; i < taps; ++i) {
        const double minor = tap(j, i) * pivot - tap(j, pivot_i) * tap(pivot_j, i);
        separable = separable && minor <= tolerance && -minor <= tolerance;  // false for NaN
      }
    }
    for (int j = 0; j < taps; ++j) {
      column[j] = static_cast<W>(tap(j, pivot_i) * a.fir_gain);
      row[j] = static_cast<W>(tap(pivot_j, j) / pivot);
    }
  }
};

// The rows (or columns) of x that contribute to one row (or column) of the result, and their taps.
struct Terms {
  std::int64_t index[kMaxTaps];
  int tap[kMaxTaps];
  int count = 0;

  Terms(const FirBiasAct& a, std::int64_t out, std::int64_t size) {
    for (int j = 0; j < a.taps; ++j) {
      const std::int64_t at = out * a.down + j - a.pad, i = at >> (a.up - 1);
      if (at < 0 || i >= size || (at & (a.up - 1)) != 0) continue;  // outside x, or an inserted zero
      index[count] = i;
      tap[count++] = j;
    }
  }
};

template <class T>
bool filtered(const FirBiasAct& a, [[maybe_unused]] int threads) {
  using W = Wide<T>;
  const LayerEnd& size = a.end;
  const std::int64_t channels = size.channels, height = size.height, rows = size.images * height;
  const Filter<W> filter(a);
  // The columns of x that the result needs: [begin, end).
  std::int64_t begin = -a.pad >> (a.up - 1), end = (((size.width - 1) * a.down + a.taps - 1 - a.pad) >> (a.up - 1)) + 1;
  begin = begin < 0 ? 0 : begin;
  end = end < a.x_width ? end : a.x_width;
  const std::int64_t needed = filter.separable && begin < end ? end - begin : 0;
  bool enough_memory = true;
#pragma omp parallel num_threads(team_of(rows, rows * size.width * channels, threads)) reduction(&& : enough_memory)
  {
    End<T> finish(a.end);
    const Buffer<W> buffer((needed + 1) * channels);
    enough_memory = finish.enough_memory() && buffer.data != nullptr;
    W* const sum = buffer.data;
    W* const line = sum + channels;  // columns [begin, end) of x, filtered vertically
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row) {
      if (!enough_memory) continue;
      const std::int64_t image = row / height;
      const T* const x = static_cast<const T*>(a.x) + image * a.x_height * a.x_width * channels;
      const Terms lines(a, row % height, a.x_height);
      const T* from[kMaxTaps * kMaxTaps];
      W factor[kMaxTaps * kMaxTaps];
      if (filter.separable) {
        for (int j = 0; j < lines.count; ++j) {
          from[j] = x + (lines.index[j] * a.x_width + begin) * channels;
          factor[j] = filter.column[lines.tap[j]];
        }
        weighted_sum(from, factor, lines.count, needed * channels, line);
      }
      for (std::int64_t column = 0; column < size.width; ++column) {
        const Terms columns(a, column, a.x_width);
        if (filter.separable) {
          const W* pixels[kMaxTaps];
          for (int i = 0; i < columns.count; ++i) {
            pixels[i] = line + (columns.index[i] - begin) * channels;
            factor[i] = filter.row[columns.tap[i]];
          }
          weighted_sum(pixels, factor, columns.count, channels, sum);
        } else {
          int count = 0;
          for (int j = 0; j < lines.count; ++j) {
            for (int i = 0; i < columns.count; ++i) {
              from[count] = x + (lines.index[j] * a.x_width + columns.index[i]) * channels;
              factor[count++] = filter.whole[lines.tap[j]][columns.tap[i]];
            }
          }
          weighted_sum(from, factor, count, channels, sum);
        }
        finish(sum, image, row % height * size.width + column);
      }
    }
  }
  return enough_memory;
}

template <class T>
bool unfiltered(const FirBiasAct& a, [[maybe_unused]] int threads) {
  const LayerEnd& size = a.end;
  const std::int64_t rows = size.images * size.height, row_numel = size.width * size.channels;
  bool enough_memory = true;
#pragma omp parallel num_threads(team_of(rows, rows * row_numel, threads)) reduction(&& : enough_memory)
  {
    End<T> finish(a.end);
    enough_memory = finish.enough_memory();
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row) {
      if (!enough_memory) continue;
      const T* const x = static_cast<const T*>(a.x) + row * row_numel;
      const std::int64_t image = row / size.height, pixel = row % size.height * size.width;
      for (std::int64_t column = 0; column < size.width; ++column) {
        finish(x + column * size.channels, image, pixel + column);
      }
    }
  }
  return enough_memory;
}

template <class T>
bool forward(const FirBiasAct& a, int threads) {
  return a.filter == nullptr ? unfiltered<T>(a, threads) : filtered<T>(a, threads);
}

// ---- Derivative ----

// Accurate sum of many vectors: adds 64 vectors, then 64 of those sums, and so on. Memory: [3 levels, channels].
template <class W>
struct LongSum {
  static constexpr int kLevels = 3;
  static constexpr std::int64_t kTerms = 64;
  W* levels;
  std::int64_t channels, terms = 0;

  LongSum(W* memory, std::int64_t channels_) : levels(memory), channels(channels_) {
    for (std::int64_t e = 0; e < kLevels * channels; ++e) levels[e] = W(0);
  }

  // Call this after adding a vector to levels[0] to levels[channels - 1].
  void added() {
    ++terms;
    if (terms % kTerms == 0) carry(0);
    if (terms % (kTerms * kTerms) == 0) carry(1);
  }

  void finish(W* out) {
    carry(0);
    carry(1);
    for (std::int64_t c = 0; c < channels; ++c) out[c] = levels[2 * channels + c];
  }

 private:
  void carry(int level) {
    W* const from = levels + level * channels;
    W* const to = from + channels;
#pragma omp simd
    for (std::int64_t c = 0; c < channels; ++c) {
      to[c] += from[c];
      from[c] = W(0);
    }
  }
};

constexpr std::int64_t kChannelBlock = 64;  // so that a block of u stays in the L1 cache

// Handles pixels [begin, end) of one image.
template <class T, class W>
void backward_part(const BiasActBackward& a, std::int64_t image, std::int64_t begin, std::int64_t end,
                   LongSum<W>& sum_u, LongSum<W>& sum_ux) {
  const W slope = static_cast<W>(a.slope), gain = static_cast<W>(a.gain);
  // Rounded to T, as the clamped values in `out` are.
  const W clamp = to_wide(from_wide<T>(static_cast<W>(a.clamp)));
  const W* const factor = a.factor == nullptr ? nullptr : static_cast<const W*>(a.factor) + image * a.channels;
  for (std::int64_t pixel = begin; pixel < end; ++pixel) {
    const std::int64_t at = (image * a.pixels + pixel) * a.channels;
    W pixel_sum = W(0);
    for (std::int64_t from = 0; from < a.channels; from += kChannelBlock) {
      const std::int64_t count = a.channels - from < kChannelBlock ? a.channels - from : kChannelBlock;
      const T* const grad = static_cast<const T*>(a.grad) + at + from;
      W u[kChannelBlock];
      if (a.out == nullptr) {
        for (std::int64_t c = 0; c < count; ++c) u[c] = to_wide(grad[c]) * gain;
      } else {
        const T* const out = static_cast<const T*>(a.out) + at + from;
        for (std::int64_t c = 0; c < count; ++c) {
          u[c] = to_wide(grad[c]) * derivative_of_result(to_wide(out[c]), slope, gain, clamp);
        }
      }
      if (a.sum_c != nullptr) {
        W block_sum = W(0);
#pragma omp simd reduction(+ : block_sum)
        for (std::int64_t c = 0; c < count; ++c) block_sum += u[c];
        pixel_sum += block_sum;
      }
      if (a.sum_u != nullptr) {
        W* const to = sum_u.levels + from;
        for (std::int64_t c = 0; c < count; ++c) to[c] += u[c];
      }
      if (a.sum_ux != nullptr) {
        const T* const x = static_cast<const T*>(a.x) + at + from;
        W* const to = sum_ux.levels + from;
        for (std::int64_t c = 0; c < count; ++c) to[c] = multiply_add(u[c], to_wide(x[c]), to[c]);
      }
      if (a.grad_x != nullptr) {
        T* const to = static_cast<T*>(a.grad_x) + at + from;
        if (factor == nullptr) {
          for (std::int64_t c = 0; c < count; ++c) to[c] = from_wide<T>(u[c]);
        } else {
          for (std::int64_t c = 0; c < count; ++c) to[c] = from_wide<T>(u[c] * factor[from + c]);
        }
      }
    }
    if (a.sum_c != nullptr) static_cast<W*>(a.sum_c)[image * a.pixels + pixel] = pixel_sum;
    if (a.sum_u != nullptr) sum_u.added();
    if (a.sum_ux != nullptr) sum_ux.added();
  }
}

template <class T>
bool backward(const BiasActBackward& a, [[maybe_unused]] int threads) {
  using W = Wide<T>;
  const std::int64_t tasks = a.images * a.parts, length = (a.pixels + a.parts - 1) / a.parts;
  const std::int64_t numel = LongSum<W>::kLevels * a.channels;
  bool enough_memory = true;
#pragma omp parallel num_threads(team_of(tasks, a.images * a.pixels * a.channels, threads)) \
    reduction(&& : enough_memory)
  {
    const Buffer<W> buffer(2 * numel);
    enough_memory = buffer.data != nullptr;
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < tasks; ++task) {
      if (!enough_memory) continue;
      LongSum<W> sum_u(buffer.data, a.channels), sum_ux(buffer.data + numel, a.channels);
      const std::int64_t first = task % a.parts * length, begin = first < a.pixels ? first : a.pixels;
      const std::int64_t end = begin + length < a.pixels ? begin + length : a.pixels;
      backward_part<T>(a, task / a.parts, begin, end, sum_u, sum_ux);
      if (a.sum_u != nullptr) sum_u.finish(static_cast<W*>(a.sum_u) + task * a.channels);
      if (a.sum_ux != nullptr) sum_ux.finish(static_cast<W*>(a.sum_ux) + task * a.channels);
    }
  }
  return enough_memory;
}

}  // namespace

bool fir_bias_act(const FirBiasAct& a, int threads) {
  switch (a.end.dtype) {
    case Dtype::kFloat64: return forward<double>(a, threads);
    case Dtype::kBFloat16: return forward<bfloat16>(a, threads);
    case Dtype::kFloat16: return forward<float16>(a, threads);
    default: return forward<float>(a, threads);
  }
}

bool bias_act_backward(const BiasActBackward& a, int threads) {
  switch (a.dtype) {
    case Dtype::kFloat64: return backward<double>(a, threads);
    case Dtype::kBFloat16: return backward<bfloat16>(a, threads);
    case Dtype::kFloat16: return backward<float16>(a, threads);
    default: return backward<float>(a, threads);
  }
}

}  // namespace spigan::cpu::SPIGAN_ISA
