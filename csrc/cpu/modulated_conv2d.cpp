// The passes around the matrix products that compute a StyleGAN2 layer's convolution. The products themselves are
// PyTorch's: either Winograd's or, in upsampling layers, the products of all taps with all pixels. Images are
// channels-last, so that loops over channels vectorise.
#include "layer_end.h"

namespace spigan::cpu::SPIGAN_ISA {
namespace {

// The products of the transposed convolution that contribute to one row (or column) of the result: input row (or
// column), tap of the convolution's kernel, and factor of the filter.
struct Terms {
  std::int64_t index[kMaxProductTerms], tap[kMaxProductTerms];
  float factor[kMaxProductTerms];
  int count = 0;

  // Only inputs [begin, end) exist.
  Terms(const ProductsEnd& a, std::int64_t out, std::int64_t begin, std::int64_t end, const float* filter) {
    for (std::int64_t t = 0; t < a.taps; ++t) {
      const std::int64_t at = out + t - a.pad;
      for (std::int64_t u = at & 1; u < a.kernel; u += 2) {
        const std::int64_t i = (at - u) / 2;
        if (at < u || i < begin || i >= end || count == kMaxProductTerms) continue;
        index[count] = i;
        tap[count] = u;
        factor[count++] = filter[t];
      }
    }
  }
};

// Sums and filters the products: vertically into a buffer of one row, then horizontally.
template <class T>
bool filter_and_finish(const ProductsEnd& a, [[maybe_unused]] int threads) {
  const LayerEnd& size = a.end;
  const std::int64_t channels = size.channels, tap_numel = a.kernel * channels;  // one row of kernel taps
  const std::int64_t line_numel = a.y_width * tap_numel, pixel_numel = a.kernel * tap_numel;
  const std::int64_t rows = size.images * a.row_count;
  bool enough_memory = true;
#pragma omp parallel num_threads(team_of(rows, rows * size.width * channels, threads)) reduction(&& : enough_memory)
  {
    End<T> finish(a.end);
    const Buffer<float> buffer(line_numel + channels);
    enough_memory = finish.enough_memory() && buffer.data != nullptr;
    float* const line = buffer.data;  // [y_width, kernel, channels]
    float* const sum = line + line_numel;
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < rows; ++task) {
      if (!enough_memory) continue;
      const std::int64_t image = task / a.row_count, row = a.first_row + task % a.row_count;
      const T* const y = static_cast<const T*>(a.y) + image * a.y_rows * a.y_width * pixel_numel;
      const Terms lines(a, row, a.y_first_row, a.y_first_row + a.y_rows, a.filter_y);
      for (std::int64_t column = 0; column < a.y_width; ++column) {
        const T* from[kMaxProductTerms];
        for (int k = 0; k < lines.count; ++k) {
          const std::int64_t pixel = (lines.index[k] - a.y_first_row) * a.y_width + column;
          from[k] = y + pixel * pixel_numel + lines.tap[k] * tap_numel;
        }
        weighted_sum(from, lines.factor, lines.count, tap_numel, line + column * tap_numel);
      }
      for (std::int64_t column = 0; column < size.width; ++column) {
        const Terms columns(a, column, 0, a.y_width, a.filter_x);
        const float* from[kMaxProductTerms];
        for (int k = 0; k < columns.count; ++k) {
          from[k] = line + columns.index[k] * tap_numel + columns.tap[k] * channels;
        }
        weighted_sum(from, columns.factor, columns.count, channels, sum);
        finish(sum, image, row * size.width + column);
      }
    }
  }
  return enough_memory;
}

// ---- Winograd's F(2x2, 3x3) (Lavin and Gray 2016, "Fast algorithms for convolutional neural networks") ----

constexpr std::int64_t kChannelBlock = 64;  // so that 16 input blocks and their transform stay in the L1 cache

}  // namespace

void winograd_input(const WinogradInput& a, [[maybe_unused]] int threads) {
  const std::int64_t columns = (a.width + 1) / 2, image_tiles = a.tile_rows * columns;
  const std::int64_t tiles = a.images * image_tiles, channels = a.channels;
#pragma omp parallel for schedule(static) num_threads(team_of(tiles, 16 * tiles * channels, threads))
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t image = tile / image_tiles;
    const std::int64_t top = (a.first_tile_row + tile % image_tiles / columns) * 2 - 1, left = tile % columns * 2 - 1;
    const float* x = a.x + image * a.height * a.width * channels;
    const float* style = a.style == nullptr ? nullptr : a.style + image * channels;
    for (std::int64_t from = 0; from < channels; from += kChannelBlock) {
      const std::int64_t count = channels - from < kChannelBlock ? channels - from : kChannelBlock;
      float d[16][kChannelBlock], r[16][kChannelBlock];
      for (int k = 0; k < 16; ++k) {
        const std::int64_t row = top + k / 4, column = left + k % 4;
        const float* pixel = x + (row * a.width + column) * channels + from;
        if (row < 0 || row >= a.height || column < 0 || column >= a.width) {
          for (std::int64_t c = 0; c < count; ++c) d[k][c] = 0.0f;
        } else if (style == nullptr) {
          for (std::int64_t c = 0; c < count; ++c) d[k][c] = pixel[c];
        } else {
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
  const std::int64_t in = a.in_channels, out = a.out_channels;
#pragma omp parallel for schedule(static) num_threads(team_of(out, 16 * in * out, threads))
  for (std::int64_t o = 0; o < out; ++o) {
    for (std::int64_t from = 0; from < in; from += kChannelBlock) {
      const std::int64_t count = in - from < kChannelBlock ? in - from : kChannelBlock;
      float g[9][kChannelBlock], r[12][kChannelBlock];
      for (std::int64_t c = 0; c < count; ++c) {
        for (int k = 0; k < 9; ++k) g[k][c] = a.weight[(o * in + from + c) * 9 + k];
      }
      // G g, then G g G^T; rows of G: (1, 0, 0), (1, 1, 1) / 2, (1, -1, 1) / 2, (0, 0, 1).
      for (int j = 0; j < 3; ++j) {
        for (std::int64_t c = 0; c < count; ++c) {
          const float outer = g[j][c] + g[6 + j][c];
          r[j][c] = g[j][c];
          r[3 + j][c] = 0.5f * (outer + g[3 + j][c]);
          r[6 + j][c] = 0.5f * (outer - g[3 + j][c]);
          r[9 + j][c] = g[6 + j][c];
        }
      }
      for (int row = 0; row < 4; ++row) {
        float* to = a.out + (4 * row * out + o) * in + from;
        const std::int64_t next = out * in;
        for (std::int64_t c = 0; c < count; ++c) {
          const float r0 = r[3 * row][c], r1 = r[3 * row + 1][c], r2 = r[3 * row + 2][c];
          to[c] = r0;
          to[next + c] = 0.5f * (r0 + r2 + r1);
          to[2 * next + c] = 0.5f * (r0 + r2 - r1);
          to[3 * next + c] = r2;
        }
      }
    }
  }
}

bool winograd_output(const WinogradEnd& a, [[maybe_unused]] int threads) {
  const LayerEnd& end = a.end;
  const std::int64_t columns = (end.width + 1) / 2, image_tiles = a.tile_rows * columns;
  const std::int64_t tiles = end.images * image_tiles, channels = end.channels;
  bool enough_memory = true;
#pragma omp parallel num_threads(team_of(tiles, 16 * tiles * channels, threads)) reduction(&& : enough_memory)
  {
    End<float> finish(end);
    const Buffer<float> buffer(4 * channels);
    enough_memory = finish.enough_memory() && buffer.data != nullptr;
#pragma omp for schedule(static)
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      if (!enough_memory) continue;
      float* sums = buffer.data;
      for (std::int64_t from = 0; from < channels; from += kChannelBlock) {
        const std::int64_t count = channels - from < kChannelBlock ? channels - from : kChannelBlock;
        float r[8][kChannelBlock];
        // A^T m A with rows of A^T (1, 1, 1, 0), (0, 1, -1, -1).
        for (int j = 0; j < 4; ++j) {
          const float* m[4];
          for (int i = 0; i < 4; ++i) m[i] = a.products[4 * i + j] + tile * channels + from;
          for (std::int64_t c = 0; c < count; ++c) {
            const float m0 = m[0][c], m1 = m[1][c], m2 = m[2][c], m3 = m[3][c];
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
      const std::int64_t image = tile / image_tiles;
      const std::int64_t top = (a.first_tile_row + tile % image_tiles / columns) * 2, left = tile % columns * 2;
      for (int k = 0; k < 4; ++k) {
        const std::int64_t row = top + k / 2, column = left + k % 2;
        if (row < end.height && column < end.width) finish(sums + k * channels, image, row * end.width + column);
      }
    }
  }
  return enough_memory;
}

bool finish_products(const ProductsEnd& a, int threads) {
  switch (a.end.dtype) {
    case Dtype::kBFloat16: return filter_and_finish<bfloat16>(a, threads);
    case Dtype::kFloat16: return filter_and_finish<float16>(a, threads);
    default: return filter_and_finish<float>(a, threads);
  }
}

}  // namespace spigan::cpu::SPIGAN_ISA
