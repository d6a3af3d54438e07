// Limits of the kernels. spigan._C exports them, and spigan/ops checks arguments against them.
#pragma once

#include <cstdint>

namespace spigan {

constexpr int kMaxPathTimes = 8;  // times per call of path_interpolate

constexpr std::int64_t kMaxTaps = 8;           // taps of a FIR filter along each axis
constexpr std::int64_t kMaxRgbChannels = 4;    // channels of a ToRGB layer that is fused into the layer before it
constexpr std::int64_t kMaxProductTerms = 64;  // kernel size * filter taps of finish_products (CPU)

constexpr std::int64_t kMaxThreads = 1 << 20;  // CPU threads per call

// rk4_mlp on a GPU. The CPU kernel takes any size.
constexpr std::int64_t kMaxRk4Dim = 1024, kRk4DimMultiple = 16;
constexpr std::int64_t kMaxRk4Layers = 8;
constexpr std::int64_t kMaxRk4Intervals = 64;

}  // namespace spigan
