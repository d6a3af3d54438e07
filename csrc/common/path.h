// Arithmetic of spigan.ops.path_interpolate (the paper's section 3.1 and eq. 7), one element at a time.
#pragma once

#include "dtypes.h"
#include "limits.h"

namespace spigan {

// t_k and 1 - t_k, each rounded once from float64.
struct PathTimes {
  int count;
  float t[kMaxPathTimes], one_minus_t[kMaxPathTimes];
};

}  // namespace spigan

SPIGAN_COMMON_BEGIN

// Clean image in [-1, 1]. uint8 v is v / 127.5 - 1; the numerator of (2 v - 255) / 255 is exact.
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

// i(t) = t x_0 + (1 - t) x_T. At t = 1 it is x_0 exactly.
SPIGAN_HD float path_point(float clean, float x_T, float t, float one_minus_t) {
  return multiply_add(t, clean, one_minus_t * x_T);
}

SPIGAN_COMMON_END
