// Elementary functions in float32 without branches, tables or calls, so that a compiler can vectorise loops over them
// for any instruction set and a GPU computes the same values. Results are within 2 ulp of the exact value unless noted.
// The polynomials come from the Cephes library (Moshier, "Methods and Programs for Mathematical Functions", 1989).
#pragma once

#include "host_device.h"

SPIGAN_COMMON_BEGIN

// Nearest integer for |x| < 2^22, ties to even: floats near 1.5 2^23 are 1 apart, so the addition rounds.
SPIGAN_HD float round_to_integer(float x) { return (x + 12582912.0f) - 12582912.0f; }

// e^x. x is clamped to the range where the result is a normal number, so e^-inf gives 1.6e-38 and e^inf gives 1.7e38.
SPIGAN_HD float exp_(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float n = round_to_integer(x * 1.44269504f);
  float r = multiply_add(n, -0.693359375f, x);  // ln 2 in two parts; the product with the first part is exact
  r = multiply_add(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  p = multiply_add(p, r * r, r) + 1.0f;
  // Build 2^n from its exponent bits. For NaN, n is arbitrary, but then p is NaN.
  const std::uint32_t exponent = float_bits(n + 12582912.0f) << 23;
  return p * float_of_bits(exponent + 0x3F800000u);
}

// ln x for positive, normal x.
SPIGAN_HD float log_(float x) {
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)): shift the boundary of the mantissa to sqrt(1/2), then read the exponent.
  const std::uint32_t shifted = float_bits(x) - 0x3F3504F3u;
  const float n = static_cast<float>(static_cast<std::int32_t>(shifted) >> 23);
  const float m = float_of_bits((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = multiply_add(p, m, -1.1514610310e-1f);
  p = multiply_add(p, m, 1.1676998740e-1f);
  p = multiply_add(p, m, -1.2420140846e-1f);
  p = multiply_add(p, m, 1.4249322787e-1f);
  p = multiply_add(p, m, -1.6668057665e-1f);
  p = multiply_add(p, m, 2.0000714765e-1f);
  p = multiply_add(p, m, -2.4999993993e-1f);
  p = multiply_add(p, m, 3.3333331174e-1f);
  float y = p * m * z;
  y = multiply_add(n, -2.12194440e-4f, y);
  y = multiply_add(z, -0.5f, y);
  return multiply_add(n, 0.693359375f, m + y);
}

// ln(1 + x) for x in [0, 1].
SPIGAN_HD float log1p_(float x) {
  const float u = 1.0f + x;
  return log_(u) + (x - (u - 1.0f)) / u;  // the second term restores what rounding 1 + x lost
}

// cos(2 pi u) and sin(2 pi u) for u in [0, 1]. The reduction to an eighth of a turn is exact.
SPIGAN_HD void cos_sin_of_turn(float u, float& cosine, float& sine) {
  const float quarters = round_to_integer(4.0f * u);
  const float x = multiply_add(quarters, -0.25f, u) * 6.2831853f;
  const float z = x * x;
  float s = -1.9515295891e-4f;
  s = multiply_add(s, z, 8.3321608736e-3f);
  s = multiply_add(s, z, -1.6666654611e-1f);
  s = multiply_add(s * z, x, x);
  float c = 2.443315711809948e-5f;
  c = multiply_add(c, z, -1.388731625493765e-3f);
  c = multiply_add(c, z, 4.166664568298827e-2f);
  c = multiply_add(c * z, z, multiply_add(z, -0.5f, 1.0f));
  const std::uint32_t q = float_bits(quarters + 12582912.0f);  // the low bits hold the integer
  const bool odd = (q & 1u) != 0;
  const float first = odd ? s : c, second = odd ? c : s;
  cosine = float_of_bits(float_bits(first) ^ (((q + 1u) & 2u) << 30));
  sine = float_of_bits(float_bits(second) ^ ((q & 2u) << 30));
}

SPIGAN_HD float tanh_(float x) {
  const float a = x < 0.0f ? -x : x;
  const float large = 1.0f - 2.0f / (exp_(2.0f * a) + 1.0f);
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = multiply_add(p, z, 2.06390887954e-2f);
  p = multiply_add(p, z, -5.37397155531e-2f);
  p = multiply_add(p, z, 1.33314422036e-1f);
  p = multiply_add(p, z, -3.33332819422e-1f);
  const float small = multiply_add(p * z, x, x);
  return a < 0.625f ? small : (x < 0.0f ? -large : large);
}

// float64 is for gradient checks, where speed does not matter, so it uses the standard library.
SPIGAN_HD double exp_(double x) { return exp(x); }
SPIGAN_HD double log1p_(double x) { return log1p(x); }
SPIGAN_HD double tanh_(double x) { return tanh(x); }

SPIGAN_COMMON_END
