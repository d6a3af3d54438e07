// Limits of the kernels, which spigan._C exports so that spigan/ops can check arguments against them.
#pragma once

#include <cstdint>

namespace spigan {

constexpr int kMaxPathTimes = 8;  // times of one path_interpolate call

constexpr std::int64_t kMaxTaps = 8;           // taps of a FIR filter in each direction
constexpr std::int64_t kMaxRgbChannels = 4;    // channels of a ToRGB layer fused into the layer before it
constexpr std::int64_t kMaxProductTerms = 64;  // kernel size * filter taps of finish_products (CPU)

// rk4_mlp on a GPU; the CPU kernel takes any sizes.
constexpr std::int64_t kMaxRk4Dim = 1024, kRk4DimMultiple = 16;
constexpr std::int64_t kMaxRk4Layers = 8;
constexpr std::int64_t kMaxRk4Intervals = 64;

}  // namespace spigan
