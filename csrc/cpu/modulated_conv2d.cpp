// What surrounds the convolution of a StyleGAN2 layer, one pass each; the convolution itself, or the matrix products of
// Winograd's, are the library's. All images are channels-last, so that loops over channels vectorise.
#include <cstdlib>

#include "kernels.h"

namespace spigan::cpu::SPIGAN_ISA {
namespace {

struct Buffer {
  float* data;
  explicit Buffer(std::int64_t floats)
      : data(static_cast<float*>(std::aligned_alloc(64, static_cast<std::size_t>((floats * 4 + 63) / 64 * 64)))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

inline int team_of(std::int64_t tasks, int threads) {
  return tasks < 1 ? 1 : tasks < threads ? static_cast<int>(tasks) : threads;
}

// The end of a layer for one pixel: out = clamp(gain act(sum d + noise + bias)) next_style.
template <class T>
struct Finish {
  const LayerEnd& a;
  std::int64_t image;

  void operator()(const float* sum, std::int64_t pixel, T* out) const {
    const std::int64_t channels = a.channels;
    const float noise = a.noise == nullptr ? 0.0f : a.noise[image * a.noise_stride + pixel];
    const float* d = a.demodulation + image * channels;
    const float* bias = a.bias;
    const float gain = a.gain, slope = a.slope * a.gain, bound = a.clamp;
    if (a.next_style == nullptr) {
      for (std::int64_t c = 0; c < channels; ++c) {
        float v = multiply_add(sum[c], d[c], noise + bias[c]);
        v *= v < 0.0f ? slope : gain;
        v = v > bound ? bound : v;
        out[c] = from_float<T>(v < -bound ? -bound : v);
      }
    } else {
      const float* style = a.next_style + image * channels;
      for (std::int64_t c = 0; c < channels; ++c) {
        float v = multiply_add(sum[c], d[c], noise + bias[c]);
        v *= v < 0.0f ? slope : gain;
        v = v > bound ? bound : v;
        out[c] = from_float<T>((v < -bound ? -bound : v) * style[c]);
      }
    }
  }
};

template <class T>
inline void widen(const T* from, std::int64_t count, float* to) {
  for (std::int64_t c = 0; c < count; ++c) to[c] = to_float(from[c]);
}

template <class T>
void scale(const ScaleChannels& a, [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(static) num_threads(team_of(a.images * a.pixels / 64, threads))
  for (std::int64_t p = 0; p < a.images * a.pixels; ++p) {
    const float* style = a.style + p / a.pixels * a.channels;
    const T* x = static_cast<const T*>(a.x) + p * a.channels;
    T* out = static_cast<T*>(a.out) + p * a.channels;
    for (std::int64_t c = 0; c < a.channels; ++c) out[c] = from_float<T>(to_float(x[c]) * style[c]);
  }
}

template <class T>
bool finish(const LayerEnd& a, [[maybe_unused]] int threads) {
  bool enough_memory = true;
#pragma omp parallel num_threads(team_of(a.images * a.height, threads)) reduction(&& : enough_memory)
  {
    const Buffer sum(a.channels);
    enough_memory = sum.data != nullptr;
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < a.images * a.height; ++row) {
      if (!enough_memory) continue;
      const Finish<T> end = {a, row / a.height};
      for (std::int64_t x = 0; x < a.width; ++x) {
        const std::int64_t pixel = row % a.height * a.width + x, at = (row * a.width + x) * a.channels;
        widen(static_cast<const T*>(a.y) + at, a.channels, sum.data);
        end(sum.data, pixel, static_cast<T*>(a.out) + at);
      }
    }
  }
  return enough_memory;
}

// Terms of one output row or column of FIR(transposed convolution) along one axis: input index, tap of the convolution's
// kernel, and factor.
struct Term {
  std::int64_t index, tap;
  float factor;
};

constexpr int kMaxTerms = 64;

// The transposed convolution of stride 2 has what input i contributes through tap u at 2 i + u.
inline int terms_of(std::int64_t out, const LayerEnd& a, std::int64_t size, const float* filter, Term (&terms)[kMaxTerms]) {
  int count = 0;
  for (std::int64_t j = 0; j < a.taps; ++j) {
    const std::int64_t at = out + j - a.pad;
    for (std::int64_t u = at & 1; u < a.kernel; u += 2) {
      const std::int64_t index = (at - u) / 2;
      if (at >= u && index < size && count < kMaxTerms) terms[count++] = {index, u, filter[j]};
    }
  }
  return count;
}

// Sums the products of a stride-2 transposed convolution where they belong and filters them, before the end: rows first,
// into a buffer of one filtered row, columns second.
template <class T>
bool filter_and_finish(const LayerEnd& a, [[maybe_unused]] int threads) {
  bool enough_memory = true;
  const std::int64_t channels = a.channels, tap_numel = a.kernel * channels;  // one row of taps
  const std::int64_t row_numel = a.y_width * tap_numel, pixel_numel = a.kernel * tap_numel;
#pragma omp parallel num_threads(team_of(a.images * a.height, threads)) reduction(&& : enough_memory)
  {
    const Buffer buffer(row_numel + channels);
    enough_memory = buffer.data != nullptr;
    float* const filtered = buffer.data;  // [y_width, kernel, channels]
    float* const sum = buffer.data + row_numel;
    Term terms[kMaxTerms];
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < a.images * a.height; ++row) {
      if (!enough_memory) continue;
      const std::int64_t image = row / a.height;
      const Finish<T> end = {a, image};
      const T* y = static_cast<const T*>(a.y) + image * a.y_height * a.y_width * pixel_numel;
      const int rows = terms_of(row % a.height, a, a.y_height, a.filter_y, terms);
      for (std::int64_t x = 0; x < a.y_width; ++x) {
        float* const to = filtered + x * tap_numel;
        for (std::int64_t e = 0; e < tap_numel; ++e) to[e] = 0.0f;
        for (int term = 0; term < rows; ++term) {
          const T* from = y + (terms[term].index * a.y_width + x) * pixel_numel + terms[term].tap * tap_numel;
          const float factor = terms[term].factor;
          for (std::int64_t e = 0; e < tap_numel; ++e) to[e] = multiply_add(factor, to_float(from[e]), to[e]);
        }
      }
      for (std::int64_t x = 0; x < a.width; ++x) {
        const int columns = terms_of(x, a, a.y_width, a.filter_x, terms);
        for (std::int64_t c = 0; c < channels; ++c) sum[c] = 0.0f;
        for (int term = 0; term < columns; ++term) {
          const float* from = filtered + (terms[term].index * a.kernel + terms[term].tap) * channels;
          const float factor = terms[term].factor;
          for (std::int64_t c = 0; c < channels; ++c) sum[c] = multiply_add(factor, from[c], sum[c]);
        }
        end(sum, row % a.height * a.width + x, static_cast<T*>(a.out) + (row * a.width + x) * channels);
      }
    }
  }
  return enough_memory;
}

// ---- Winograd's convolution F(2x2, 3x3) (Lavin and Gray 2016, "Fast algorithms for convolutional neural networks") ----

// Tile number `tile` covers outputs (2 ty, 2 tx) .. (2 ty + 1, 2 tx + 1) of an image and the 4x4 inputs around them.
struct TileGrid {
  std::int64_t rows, columns;
  std::int64_t count() const { return rows * columns; }
};

inline TileGrid tiles_of(std::int64_t height, std::int64_t width) { return {(height + 1) / 2, (width + 1) / 2}; }

constexpr std::int64_t kChannelBlock = 64;  // 16 input vectors of a block, and their transform, stay in the L1 cache

}  // namespace

void winograd_input(const WinogradInput& a, [[maybe_unused]] int threads) {
  const TileGrid grid = tiles_of(a.height, a.width);
  const std::int64_t tiles = a.images * grid.count(), channels = a.channels;
#pragma omp parallel for schedule(static) num_threads(team_of(tiles / 4, threads))
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t image = tile / grid.count();
    const std::int64_t top = tile % grid.count() / grid.columns * 2 - 1, left = tile % grid.columns * 2 - 1;
    const float* x = a.x + image * a.height * a.width * channels;
    const float* style = a.style + image * channels;
    for (std::int64_t from = 0; from < channels; from += kChannelBlock) {
      const std::int64_t count = channels - from < kChannelBlock ? channels - from : kChannelBlock;
      float d[16][kChannelBlock], r[16][kChannelBlock];
      for (int k = 0; k < 16; ++k) {
        const std::int64_t row = top + k / 4, column = left + k % 4;
        if (row < 0 || row >= a.height || column < 0 || column >= a.width) {
          for (std::int64_t c = 0; c < count; ++c) d[k][c] = 0.0f;
        } else {
          const float* pixel = x + (row * a.width + column) * channels + from;
          for (std::int64_t c = 0; c < count; ++c) d[k][c] = pixel[c] * style[from + c];
        }
      }
      // B^T d B with rows of B^T (1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1).
      for (int j = 0; j < 4; ++j) {
        for (std::int64_t c = 0; c < count; ++c) {
          const float d0 = d[j][c], d1 = d[4 + j][c], d2 = d[8 + j][c], d3 = d[12 + j][c];
          r[j][c] = d0 - d2;
          r[4 + j][c] = d1 + d2;
          r[8 + j][c] = d2 - d1;
          r[12 + j][c] = d1 - d3;
        }
      }
      for (int i = 0; i < 4; ++i) {
        float* out = a.out + ((4 * i) * tiles + tile) * channels + from;
        const std::int64_t next = tiles * channels;
        for (std::int64_t c = 0; c < count; ++c) {
          const float d0 = r[4 * i][c], d1 = r[4 * i + 1][c], d2 = r[4 * i + 2][c], d3 = r[4 * i + 3][c];
          out[c] = d0 - d2;
          out[next + c] = d1 + d2;
          out[2 * next + c] = d2 - d1;
          out[3 * next + c] = d1 - d3;
        }
      }
    }
  }
}

void winograd_weight(const WinogradWeight& a, [[maybe_unused]] int threads) {
  // Blocks of 16 x 16 channels are transposed in the L1 cache: memory is read and written in whole cache lines.
  constexpr std::int64_t kBlock = 16;
  const std::int64_t in = a.in_channels, out = a.out_channels;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (std::int64_t first_i = 0; first_i < in; first_i += kBlock) {
    const std::int64_t end_i = first_i + kBlock < in ? first_i + kBlock : in;
    for (std::int64_t first_o = 0; first_o < out; first_o += kBlock) {
      const std::int64_t end_o = first_o + kBlock < out ? first_o + kBlock : out;
      float block[16][kBlock][kBlock];  // [product][in][out]
      for (std::int64_t o = first_o; o < end_o; ++o) {
        for (std::int64_t i = first_i; i < end_i; ++i) {
          const float* g = a.weight + (o * in + i) * 9;
          float r[12];  // G g, then G g G^T; rows of G: (1, 0, 0), (1, 1, 1) / 2, (1, -1, 1) / 2, (0, 0, 1)
          for (int c = 0; c < 3; ++c) {
            const float outer = g[c] + g[6 + c];
            r[c] = g[c];
            r[3 + c] = 0.5f * (outer + g[3 + c]);
            r[6 + c] = 0.5f * (outer - g[3 + c]);
            r[9 + c] = g[6 + c];
          }
          for (int row = 0; row < 4; ++row) {
            const float outer = r[3 * row] + r[3 * row + 2];
            block[4 * row][i - first_i][o - first_o] = r[3 * row];
            block[4 * row + 1][i - first_i][o - first_o] = 0.5f * (outer + r[3 * row + 1]);
            block[4 * row + 2][i - first_i][o - first_o] = 0.5f * (outer - r[3 * row + 1]);
            block[4 * row + 3][i - first_i][o - first_o] = r[3 * row + 2];
          }
        }
      }
      for (std::int64_t k = 0; k < 16; ++k) {
        for (std::int64_t i = first_i; i < end_i; ++i) {
          float* to = a.out + (k * in + i) * out;
          for (std::int64_t o = first_o; o < end_o; ++o) to[o] = block[k][i - first_i][o - first_o];
        }
      }
    }
  }
}

bool winograd_output(const LayerEnd& a, [[maybe_unused]] int threads) {
  const TileGrid grid = tiles_of(a.height, a.width);
  const std::int64_t tiles = a.images * grid.count(), channels = a.channels;
  const float* products = static_cast<const float*>(a.y);
  bool enough_memory = true;
#pragma omp parallel num_threads(team_of(tiles / 4, threads)) reduction(&& : enough_memory)
  {
    const Buffer buffer(4 * channels);
    enough_memory = buffer.data != nullptr;
#pragma omp for schedule(static)
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      if (!enough_memory) continue;
      float* sums = buffer.data;
      for (std::int64_t from = 0; from < channels; from += kChannelBlock) {
        const std::int64_t count = channels - from < kChannelBlock ? channels - from : kChannelBlock;
        float r[8][kChannelBlock];
        // A^T m A with rows of A^T (1, 1, 1, 0), (0, 1, -1, -1).
        for (int j = 0; j < 4; ++j) {
          const std::int64_t next = 4 * tiles * channels;
          const float* m = products + (j * tiles + tile) * channels + from;
          for (std::int64_t c = 0; c < count; ++c) {
            const float m0 = m[c], m1 = m[next + c], m2 = m[2 * next + c], m3 = m[3 * next + c];
            r[j][c] = m0 + m1 + m2;
            r[4 + j][c] = m1 - m2 - m3;
          }
        }
        for (int i = 0; i < 2; ++i) {
          float* out = sums + 2 * i * channels + from;
          for (std::int64_t c = 0; c < count; ++c) {
            const float m0 = r[4 * i][c], m1 = r[4 * i + 1][c], m2 = r[4 * i + 2][c], m3 = r[4 * i + 3][c];
            out[c] = m0 + m1 + m2;
            out[channels + c] = m1 - m2 - m3;
          }
        }
      }
      const std::int64_t image = tile / grid.count();
      const std::int64_t top = tile % grid.count() / grid.columns * 2, left = tile % grid.columns * 2;
      const Finish<float> end = {a, image};
      for (int k = 0; k < 4; ++k) {
        const std::int64_t row = top + k / 2, column = left + k % 2;
        if (row >= a.height || column >= a.width) continue;
        const std::int64_t pixel = row * a.width + column;
        end(sums + k * channels, pixel, static_cast<float*>(a.out) + (image * a.height * a.width + pixel) * channels);
      }
    }
  }
  return enough_memory;
}

void scale_channels(const ScaleChannels& a, int threads) {
  if (a.dtype == Dtype::kBFloat16) return scale<bfloat16>(a, threads);
  scale<float>(a, threads);
}

bool finish_layer(const LayerEnd& a, int threads) {
  if (a.dtype == Dtype::kBFloat16) {
    return a.taps == 0 ? finish<bfloat16>(a, threads) : filter_and_finish<bfloat16>(a, threads);
  }
  return a.taps == 0 ? finish<float>(a, threads) : filter_and_finish<float>(a, threads);
}

}  // namespace spigan::cpu::SPIGAN_ISA
