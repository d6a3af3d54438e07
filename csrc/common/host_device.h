// Macros and basics for functions that CPU code and CUDA kernels share, so that both execute the same arithmetic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SPIGAN_HD __host__ __device__ __forceinline__
#else
#define SPIGAN_HD inline
#endif

// CPU sources are compiled once per instruction set (csrc/cpu/cpu_kernels.h). Each of those objects needs its own copy
// of the functions below: the linker keeps only one of several inline functions with the same name, and if it kept the
// AVX-512 version, other CPUs could not run it. The inline namespace gives the copies different names.
#if defined(SPIGAN_ISA)
#define SPIGAN_COMMON_BEGIN \
  namespace spigan {        \
  inline namespace SPIGAN_ISA {
#define SPIGAN_COMMON_END \
  }                       \
  }
#else
#define SPIGAN_COMMON_BEGIN namespace spigan {
#define SPIGAN_COMMON_END }
#endif

SPIGAN_COMMON_BEGIN

// a b + c, rounded once if the hardware has fused multiply-add and twice otherwise (a correct fma in software takes 50
// times as long). Call it wherever a product is added: the compiler is not allowed to fuse, so that results do not
// depend on its choices.
SPIGAN_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

SPIGAN_HD double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

SPIGAN_HD std::uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

SPIGAN_HD float float_of_bits(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

SPIGAN_COMMON_END
