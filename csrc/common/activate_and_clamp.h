// The activation at the end of a layer (LayerEnd, BiasActBackward) and its derivative, for one value.
#pragma once

#include "dtypes.h"

SPIGAN_COMMON_BEGIN

// clamp(gain act(v)), where act is the leaky ReLU with negative slope `slope`. T is float or double. NaN stays NaN.
template <class T>
SPIGAN_HD T activate_and_clamp(T v, T slope, T gain, T clamp) {
  v *= v < T(0) ? slope * gain : gain;
  v = v > clamp ? clamp : v;
  return v < -clamp ? -clamp : v;
}

// Derivative of activate_and_clamp, computed from its result. This requires gain > 0, so that the result has v's sign.
template <class T>
SPIGAN_HD T derivative_of_result(T out, T slope, T gain, T clamp) {
  const T magnitude = out < T(0) ? -out : out;
  return magnitude >= clamp ? T(0) : out > T(0) ? gain : slope * gain;
}

SPIGAN_COMMON_END
