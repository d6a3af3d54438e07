// Arithmetic of spigan.ops.path_interpolate (section 3.1 and eq. 7 of the paper), for one element.
#pragma once

#include "dtypes.h"
#include "limits.h"

namespace spigan {

// t_k and 1 - t_k, each rounded once from float64 to float32.
struct PathTimes {
  int count;
  float t[kMaxPathTimes], one_minus_t[kMaxPathTimes];
};

}  // namespace spigan

SPIGAN_COMMON_BEGIN

// Pixel of the clean image in [-1, 1]. A uint8 v becomes v / 127.5 - 1 = (2 v - 255) / 255, whose numerator is exact.
SPIGAN_HD float clean_value(std::uint8_t v) {
  return static_cast<float>(2 * static_cast<int>(v) - 255) * (1.0f / 255.0f);
}

template <class T>
SPIGAN_HD float clean_value(T x) {
  return to_float(x);
}

// x_T = a(1) x_0 + s(1) e.
SPIGAN_HD float noisy_end(float clean, float noise, float mean_coef, float std) {
  return multiply_add(mean_coef, clean, std * noise);
}

// i(t) = t x_0 + (1 - t) x_T. At t = 1 this is exactly x_0.
SPIGAN_HD float path_point(float clean, float x_T, float t, float one_minus_t) {
  return multiply_add(t, clean, one_minus_t * x_T);
}

SPIGAN_COMMON_END
