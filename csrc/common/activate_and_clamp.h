// Arithmetic of the end of a layer (LayerEnd, BiasActBackward), one value at a time.
#pragma once

#include "dtypes.h"

SPIGAN_COMMON_BEGIN

// clamp(gain act(v)) with act the leaky ReLU of `slope`; T is float or double. NaN stays NaN.
template <class T>
SPIGAN_HD T activate_and_clamp(T v, T slope, T gain, T clamp) {
  v *= v < T(0) ? slope * gain : gain;
  v = v > clamp ? clamp : v;
  return v < -clamp ? -clamp : v;
}

// Derivative of activate_and_clamp, told from its result: gain > 0, so that the result has the sign of v.
template <class T>
SPIGAN_HD T derivative_of_result(T out, T slope, T gain, T clamp) {
  const T magnitude = out < T(0) ? -out : out;
  return magnitude >= clamp ? T(0) : out > T(0) ? gain : slope * gain;
}

SPIGAN_COMMON_END
