// Computes dot products of several rows of two matrices at a time, in the widest registers of the instruction set.
//
// Traits<W> for a weight type W (float, double, bfloat16):
//   Input             element type of the vectors that the weights are multiplied by
//   Value             type of the sums
//   kStep             number of elements per call of `accumulate`
//   kTile             number of accumulators that `reduce` sums at once; they must fit in the registers
//   Accumulator       partial sums
#pragma once

#include "cpu_kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace spigan::cpu::SPIGAN_ISA {

template <class W>
struct Traits;

#if defined(__AVX512F__)

struct Avx512Sums {
  using Value = float;
  using Accumulator = __m512;
  static constexpr int kTile = 16;

  static Accumulator zero() { return _mm512_setzero_ps(); }

  // out[i] = sum of the lanes of a[i]. Each level adds the halves of two registers into one.
  static void reduce(const Accumulator (&a)[kTile], float* out) {
    Accumulator b[8], c[4];
    for (int g = 0; g < 4; ++g) {  // group g: accumulators g, 4 + g, 8 + g, 12 + g, one per 128-bit lane
      for (int half = 0; half < 2; ++half) {
        const __m512 x = a[g + 8 * half], y = a[g + 8 * half + 4];
        b[2 * g + half] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xEE));
      }
      c[g] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * g], b[2 * g + 1], 0x88),
                           _mm512_shuffle_f32x4(b[2 * g], b[2 * g + 1], 0xDD));
    }
    const auto pairs = [](__m512 x, __m512 y) {
      return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xDD));
    };
    _mm512_storeu_ps(out, pairs(pairs(c[0], c[1]), pairs(c[2], c[3])));
  }
};

template <>
struct Traits<float> : Avx512Sums {
  using Input = float;
  static constexpr int kStep = 16;
  static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  static Accumulator accumulate(__m512 w, __m512 x, Accumulator sum) { return _mm512_fmadd_ps(w, x, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Traits<bfloat16> : Avx512Sums {
  using Input = bfloat16;
  static constexpr int kStep = 32;
  static __m512bh load(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Accumulator accumulate(__m512bh w, __m512bh x, Accumulator sum) { return _mm512_dpbf16_ps(sum, w, x); }
};
#endif

#elif defined(__AVX2__)

template <>
struct Traits<float> {
  using Input = float;
  using Value = float;
  using Accumulator = __m256;
  static constexpr int kStep = 8, kTile = 8;

  static Accumulator zero() { return _mm256_setzero_ps(); }
  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  static Accumulator accumulate(__m256 w, __m256 x, Accumulator sum) { return _mm256_fmadd_ps(w, x, sum); }

  static void reduce(const Accumulator (&a)[kTile], float* out) {
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    _mm256_storeu_ps(out,
                     _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
  }
};

#endif

// For types and instruction sets without intrinsics above: an array of lanes, which the compiler may vectorise.
template <class W>
struct Traits {
  using Input = W;
  using Value = W;
  static constexpr int kStep = 4, kTile = 4;
  struct Accumulator {
    W lane[kStep];
  };

  static Accumulator zero() { return {}; }
  static Accumulator load(const W* p) { return {{p[0], p[1], p[2], p[3]}}; }

  static Accumulator accumulate(const Accumulator& w, const Accumulator& x, Accumulator sum) {
    for (int i = 0; i < kStep; ++i) sum.lane[i] = multiply_add(w.lane[i], x.lane[i], sum.lane[i]);
    return sum;
  }

  static void reduce(const Accumulator (&a)[kTile], W* out) {
    for (int t = 0; t < kTile; ++t) out[t] = (a[t].lane[0] + a[t].lane[1]) + (a[t].lane[2] + a[t].lane[3]);
  }
};

// y[r, o] = sum_k x[r, k] weight[o, k] for the first `Rows` rows r and the first kTile / Rows outputs o.
template <class W, int Rows>
inline void dot_tile(const typename Traits<W>::Input* x, const W* weight, std::int64_t dim,
                     typename Traits<W>::Value* y) {
  using S = Traits<W>;
  constexpr int kOutputs = S::kTile / Rows;
  typename S::Accumulator sums[S::kTile];
  for (int i = 0; i < S::kTile; ++i) sums[i] = S::zero();
  for (std::int64_t k = 0; k < dim; k += S::kStep) {
    decltype(S::load(x)) b_x[Rows];
    for (int r = 0; r < Rows; ++r) b_x[r] = S::load(x + r * dim + k);
    for (int o = 0; o < kOutputs; ++o) {
      const auto b_w = S::load(weight + o * dim + k);
      for (int r = 0; r < Rows; ++r) sums[r * kOutputs + o] = S::accumulate(b_w, b_x[r], sums[r * kOutputs + o]);
    }
  }
  typename S::Value totals[S::kTile];
  S::reduce(sums, totals);
  for (int r = 0; r < Rows; ++r) {
    for (int o = 0; o < kOutputs; ++o) y[r * dim + o] = totals[r * kOutputs + o];
  }
}

// y[r, o] = sum_k x[r, k] weight[o, k] for rows [0, rows) and outputs [begin, end). The order of summation depends only
// on dim, so the result of a row depends only on that row.
//
//   x       [rows, dim] Input      y  [rows, dim] Value
//   weight  [dim, dim]; dim, begin and end are multiples of 32
template <class W>
void multiply(const typename Traits<W>::Input* x, const W* weight, std::int64_t rows, std::int64_t dim,
              std::int64_t begin, std::int64_t end, typename Traits<W>::Value* y) {
  constexpr int kTile = Traits<W>::kTile;
  const std::int64_t quads = rows / 4 * 4;
  for (std::int64_t o = begin; o < end; o += kTile / 4) {
    for (std::int64_t r = 0; r < quads; r += 4) {
      dot_tile<W, 4>(x + r * dim, weight + o * dim, dim, y + r * dim + o);
    }
  }
  std::int64_t r = quads;
  if (r + 2 <= rows) {
    for (std::int64_t o = begin; o < end; o += kTile / 2) {
      dot_tile<W, 2>(x + r * dim, weight + o * dim, dim, y + r * dim + o);
    }
    r += 2;
  }
  if (r < rows) {
    for (std::int64_t o = begin; o < end; o += kTile) {
      dot_tile<W, 1>(x + r * dim, weight + o * dim, dim, y + r * dim + o);
    }
  }
}

}  // namespace spigan::cpu::SPIGAN_ISA
