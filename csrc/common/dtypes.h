// Element types of tensors. Half types are only loaded and stored: their arithmetic is in float32.
#pragma once

#include "host_device.h"

namespace spigan {

// Python passes a dtype as its index in spigan._C.DTYPES, which holds these names.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kUInt8 = 4 };
inline constexpr const char* kDtypeNames[] = {"float32", "bfloat16", "float16", "float64", "uint8"};

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

}  // namespace spigan

SPIGAN_COMMON_BEGIN

SPIGAN_HD float to_float(float x) { return x; }

SPIGAN_HD float to_float(bfloat16 x) { return float_of_bits(static_cast<std::uint32_t>(x.bits) << 16); }

SPIGAN_HD float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#elif defined(__FLT16_MAX__)
  _Float16 h;
  std::memcpy(&h, &x, sizeof(h));
  return static_cast<float>(h);
#else
  // Move exponent and mantissa to where a float has them. The product then corrects the exponent's bias exactly, for
  // subnormal numbers too. Infinities and NaN have all exponent bits set in both formats.
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7FFFu) << 13;
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const float scaled = float_of_bits(magnitude) * 5.192296858534828e33f;  // 2^112
  const std::uint32_t bits = magnitude >= (0x7C00u << 13) ? (magnitude | 0x7F800000u) : float_bits(scaled);
  return float_of_bits(bits | sign);
#endif
}

// Rounds to the nearest value of the type, ties to even.
template <class T>
SPIGAN_HD T from_float(float x);

template <>
SPIGAN_HD float from_float<float>(float x) {
  return x;
}

template <>
SPIGAN_HD bfloat16 from_float<bfloat16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const std::uint32_t bits = float_bits(x);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  // Rounding could carry a NaN's payload into the sign, so every NaN becomes the quiet one.
  return {static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
#endif
}

template <>
SPIGAN_HD float16 from_float<float16>(float x) {
#if defined(__CUDA_ARCH__)
  float16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
  return h;
#elif defined(__FLT16_MAX__)
  const _Float16 value = static_cast<_Float16>(x);
  float16 h;
  std::memcpy(&h, &value, sizeof(h));
  return h;
#else
  const std::uint32_t bits = float_bits(x), magnitude = bits & 0x7FFFFFFFu;
  std::uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;  // NaN
  } else if (magnitude >= 0x477FF000u) {
    half = 0x7C00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 1/2 leaves the result's bits, rounded by the hardware, in the low bits of the mantissa.
    half = float_bits(float_of_bits(magnitude) + 0.5f) - float_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000u))};
#endif
}

SPIGAN_COMMON_END
