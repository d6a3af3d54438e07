// Device functions beyond plain C++: wide loads and stores, and instructions that need intrinsics or PTX. Without a CUDA compiler
// they call the stand-ins in csrc/testing, so that tests can execute the kernels on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/dtypes.h"

namespace spigan::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xFFFFFFFFu;

// Thread-block clusters exist on sm_90 and later.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// ---- Wide memory accesses ----

// 4 N bytes that one instruction loads or stores. Their address must be a multiple of 4 N.
template <int N>
struct alignas(4 * N) Words {
  std::uint32_t word[N];
};

template <int N>
__device__ __forceinline__ Words<N> load_words(const void* p) {
#if !defined(__CUDACC__)
  cuda_on_cpu::check_aligned(p, 4 * N);
#endif
  return *static_cast<const Words<N>*>(p);
}

// Stores to shared memory.
template <int N>
__device__ __forceinline__ void store_shared(void* p, const Words<N>& words) {
#if !defined(__CUDACC__)
  cuda_on_cpu::check_aligned(p, 4 * N);
#endif
  *static_cast<Words<N>*>(p) = words;
}

// Stores to global memory. From a plain assignment of Words nvcc makes stores of one word each, which write every sector
// of 32 bytes in parts.
template <int N>
__device__ __forceinline__ void store_global(void* p, const Words<N>& words) {
  static_assert(N == 2 || N == 4);
#if defined(__CUDA_ARCH__)
  const std::size_t to = __cvta_generic_to_global(p);
  if constexpr (N == 2) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words.word[0]), "r"(words.word[1]) : "memory");
  } else {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.word[0]), "r"(words.word[1]),
                 "r"(words.word[2]), "r"(words.word[3])
                 : "memory");
  }
#elif !defined(__CUDACC__)
  cuda_on_cpu::check_aligned(p, 4 * N);
  *static_cast<Words<N>*>(p) = words;
#endif
}

// The words that hold N elements of T.
template <class T, int N>
using Packed = Words<N * static_cast<int>(sizeof(T)) / 4>;

template <int N>
__device__ __forceinline__ void unpack(const Words<N>& from, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = float_of_bits(from.word[i]);
}

// T is bfloat16 or float16.
template <class T, int N>
__device__ __forceinline__ void unpack_halves(const Words<N>& from, float (&to)[2 * N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[2 * i] = to_float(T{static_cast<std::uint16_t>(from.word[i])});
    to[2 * i + 1] = to_float(T{static_cast<std::uint16_t>(from.word[i] >> 16)});
  }
}

template <class T, int N>
__device__ __forceinline__ void unpack_as(const Packed<T, N>& from, float (&to)[N]) {
  if constexpr (sizeof(T) == 4) {
    unpack(from, to);
  } else {
    unpack_halves<T>(from, to);
  }
}

template <class T, int N>
__device__ __forceinline__ Packed<T, N> pack_as(const float (&from)[N]) {
  Packed<T, N> to;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) to.word[i] = float_bits(from[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const std::uint32_t low = from_float<T>(from[2 * i]).bits, high = from_float<T>(from[2 * i + 1]).bits;
      to.word[i] = low | high << 16;
    }
  }
  return to;
}

// Loads N neighbouring elements. For N > 1 the address must be a multiple of 16 and N fill a multiple of 16 bytes.
template <class T, int N>
__device__ __forceinline__ void load_elements(const T* p, float (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = to_float(*p);
  } else {
    constexpr int kStep = 16 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < N; i += kStep) {
      float part[kStep];
      unpack_as<T>(load_words<4>(p + i), part);
#pragma unroll
      for (int k = 0; k < kStep; ++k) to[i + k] = part[k];
    }
  }
}

// Stores N neighbouring elements to global memory, 1 or as many as 16 bytes hold.
template <class T, int N>
__device__ __forceinline__ void store_elements(T* p, const float (&from)[N]) {
  if constexpr (N == 1) {
    *p = from_float<T>(from[0]);
  } else {
    static_assert(N * sizeof(T) == 16);
    store_global(p, pack_as<T>(from));
  }
}

// ---- Approximate functions: one instruction each, with the error that NVIDIA states ----

// Absolute error 2^-22 for x in [1/2, 2], relative error 2^-22 elsewhere. x is a positive normal number.
__device__ __forceinline__ float approximate_log2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#elif !defined(__CUDACC__)
  return cuda_on_cpu::approximate_log2(x);
#else
  return x;
#endif
}

// Relative error 2^-23.
__device__ __forceinline__ float approximate_sqrt(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#elif !defined(__CUDACC__)
  return cuda_on_cpu::approximate_sqrt(x);
#else
  return x;
#endif
}

// Absolute error 2^-21.19 (cosine) and 2^-21.41 (sine) for x in [-pi, pi].
__device__ __forceinline__ void approximate_cos_sin(float x, float& cosine, float& sine) {
#if defined(__CUDA_ARCH__)
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(cosine) : "f"(x));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(sine) : "f"(x));
#elif !defined(__CUDACC__)
  cuda_on_cpu::approximate_cos_sin(x, cosine, sine);
#endif
}

// ---- Memory of a block ----

// The block's dynamic shared memory.
__device__ __forceinline__ char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) char memory[];
  return memory;
#else
  return cuda_on_cpu::shared_memory();
#endif
}

// Starts copying 16 aligned bytes from global to shared memory. copies_wait() waits for all copies of this thread.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if defined(__CUDA_ARCH__)
  const std::uint32_t to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  const std::size_t from = __cvta_generic_to_global(global);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#elif !defined(__CUDACC__)
  cuda_on_cpu::copy_async(shared, global);
#endif
}

__device__ __forceinline__ void copies_wait() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#elif !defined(__CUDACC__)
  cuda_on_cpu::copies_wait();
#endif
}

// ---- Within a warp ----

// Returns the sum over this lane's group of `lanes` neighbouring lanes (a power of two). The whole warp must call it.
__device__ __forceinline__ float sum_of_lanes(float value, int lanes) {
  for (int mask = lanes / 2; mask >= 1; mask /= 2) value += __shfl_xor_sync(kFullMask, value, mask);
  return value;
}

// x rounded to TF32, whose significand has 11 bits. The NaN of a GPU, whose bits are all set, becomes -0.
__device__ __forceinline__ float round_to_tf32(float x) { return float_of_bits((float_bits(x) + 0x1000u) & 0xFFFFE000u); }

// d += a b for a [16, 8], b [8, 8] and d [16, 8] of a warp; of a and b it reads only the bits of TF32. With g = lane / 4 and
// t = lane % 4, a lane holds a[g][t], a[g + 8][t], a[g][t + 4], a[g + 8][t + 4], further b[t][g], b[t + 4][g], and
// d[g][2 t], d[g][2 t + 1], d[g + 8][2 t], d[g + 8][2 t + 1]. The whole warp must call it.
__device__ __forceinline__ void multiply_tf32(const float (&a)[4], const float (&b)[2], float (&d)[4]) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(float_bits(a[0])), "r"(float_bits(a[1])), "r"(float_bits(a[2])), "r"(float_bits(a[3])),
        "r"(float_bits(b[0])), "r"(float_bits(b[1])));
#elif !defined(__CUDACC__)
  cuda_on_cpu::multiply_tf32(a, b, d);
#endif
}

// ---- Thread-block clusters ----

// A barrier for all threads of a cluster. What a thread wrote to shared memory before it arrived is visible to all
// after they have waited. These are not the "aligned" forms, which a warp with diverged lanes must not execute.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#elif !defined(__CUDACC__)
  cuda_on_cpu::cluster_arrive();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#elif !defined(__CUDACC__)
  cuda_on_cpu::cluster_wait();
#endif
}

// Stores to the shared memory of block `rank` of the cluster, at the address that corresponds to `own` in this block.
template <int N>
__device__ __forceinline__ void store_in_cluster(void* own, int rank, const Words<N>& words) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static_assert(N == 2 || N == 4);
  const std::uint32_t here = static_cast<std::uint32_t>(__cvta_generic_to_shared(own));
  std::uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  if constexpr (N == 2) {
    asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(there), "r"(words.word[0]), "r"(words.word[1])
                 : "memory");
  } else {
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(words.word[0]),
                 "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3])
                 : "memory");
  }
#elif !defined(__CUDACC__)
  store_shared<N>(cuda_on_cpu::in_cluster(own, rank), words);
#endif
}

// ---- Between blocks, through global memory ----

// Adds 1. A thread that reads the sum with load_acquire sees everything that this thread wrote or saw before.
__device__ __forceinline__ void add_release(std::uint32_t* counter) {
#if defined(__CUDA_ARCH__)
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
#elif !defined(__CUDACC__)
  __atomic_fetch_add(counter, 1u, __ATOMIC_RELEASE);
#endif
}

__device__ __forceinline__ std::uint32_t load_acquire(const std::uint32_t* counter) {
#if defined(__CUDA_ARCH__)
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return value;
#elif !defined(__CUDACC__)
  cuda_on_cpu::yield();
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
#else
  return 0;
#endif
}

// Loads 16 bytes from the L2 cache, which all blocks share. The L1 cache may hold stale values.
__device__ __forceinline__ Words<4> load_from_l2(const void* p) {
#if defined(__CUDA_ARCH__)
  Words<4> w;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return w;
#else
  return load_words<4>(p);
#endif
}

}  // namespace spigan::cuda
