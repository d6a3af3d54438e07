// The activation functions of spigan.ops.rk4_mlp.
#pragma once

#include "math.h"

namespace spigan {

// Python passes an activation as its index in spigan._C.ACTIVATIONS, which holds these names.
enum class Activation : int { kSilu = 0, kLrelu = 1, kTanh = 2, kSoftplus = 3 };
inline constexpr const char* kActivationNames[] = {"silu", "lrelu", "tanh", "softplus"};

}  // namespace spigan

SPIGAN_COMMON_BEGIN

// T is float or double. NaN gives NaN.
template <Activation A, class T>
SPIGAN_HD T activate(T x) {
  if constexpr (A == Activation::kSilu) {
    return x / (T(1) + exp_(-x));
  } else if constexpr (A == Activation::kLrelu) {
    return x > T(0) ? x : T(0.2) * x;
  } else if constexpr (A == Activation::kTanh) {
    return tanh_(x);
  } else {
    const T magnitude = x < T(0) ? -x : x;
    return (x < T(0) ? T(0) : x) + log1p_(exp_(-magnitude));
  }
}

SPIGAN_COMMON_END
