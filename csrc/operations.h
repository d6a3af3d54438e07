// Python functions of the operations, the same for every place that kernels run on.
//
// They take addresses and sizes, never tensors, and check what could make a kernel read or write out of bounds; types,
// shapes and devices of tensors were checked by spigan/ops.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/arguments.h"

namespace spigan {

template <class Given>
void require(bool condition, const char* expected, Given given) {
  if (!condition) throw std::invalid_argument(std::string("expected ") + expected + ", got " + std::to_string(given));
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Dtype dtype_of(int number, bool float64, bool uint8) {
  const bool known = number >= 0 && number <= static_cast<int>(Dtype::kUInt8);
  const Dtype dtype = static_cast<Dtype>(number);
  require(known && (float64 || dtype != Dtype::kFloat64) && (uint8 || dtype != Dtype::kUInt8),
          "a dtype of DTYPES that this operation takes", number);
  return dtype;
}

inline LayerEnd layer_end(std::uintptr_t out, int dtype, const std::array<std::int64_t, 4>& size, std::uintptr_t factor,
                          std::uintptr_t noise, std::int64_t noise_stride, std::uintptr_t seed,
                          std::uintptr_t strength, std::uintptr_t bias, std::int64_t bias_stride, double slope,
                          double gain, double clamp, std::uintptr_t next_factor, std::uintptr_t add,
                          std::uintptr_t rgb, std::uintptr_t rgb_weight, std::int64_t rgb_channels) {
  for (const std::int64_t length : size) require(length >= 0, "sizes >= 0", length);
  const auto [images, height, width, channels] = size;
  require(noise_stride == 0 || noise_stride == height * width, "noise_stride 0 or height * width", noise_stride);
  require(bias_stride == 0 || bias_stride == channels, "bias_stride 0 or channels", bias_stride);
  require(clamp > 0.0, "clamp > 0", clamp);
  if (rgb != 0) {
    require(rgb_channels >= 1 && rgb_channels <= kMaxRgbChannels, "1 to 4 rgb_channels", rgb_channels);
    require(rgb_weight != 0, "rgb_weight where rgb is wanted", 0);
    require(dtype != static_cast<int>(Dtype::kFloat64), "another dtype than float64 where rgb is wanted", dtype);
  }
  return {pointer<void>(out), dtype_of(dtype, true, false), images, height, width, channels,
          pointer<const void>(factor), pointer<const void>(noise), noise_stride, pointer<const std::int64_t>(seed),
          pointer<const void>(strength), pointer<const void>(bias), bias_stride, slope, gain, clamp,
          pointer<const void>(next_factor), pointer<const void>(add), pointer<float>(rgb),
          pointer<const float>(rgb_weight), rgb_channels};
}

// Backend: `kContext` and `kContextDoc`, name and description of the last argument, and for each operation a static
// function (arguments, context). They run without the GIL.
template <class Backend>
void bind_operations(pybind11::module_& m) {
  namespace py = pybind11;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  const auto context = py::arg(Backend::kContext);
  const auto doc = [](const char* text) { return std::string(text) + Backend::kContextDoc; };

  m.attr("DTYPES") = py::make_tuple("float32", "bfloat16", "float16", "float64", "uint8");
  m.attr("ACTIVATIONS") = py::make_tuple("silu", "lrelu", "tanh", "softplus");

  m.def(
      "philox_normal",
      [](std::uintptr_t out, int dtype, std::uintptr_t seeds, std::int64_t rows, std::int64_t row_numel,
         std::uint64_t offset, std::int64_t place) {
        require(rows >= 0, "rows >= 0", rows);
        require(row_numel >= 0, "row_numel >= 0", row_numel);
        Backend::philox_normal({pointer<void>(out), dtype_of(dtype, true, false), pointer<const std::int64_t>(seeds),
                                rows, row_numel, offset},
                               place);
      },
      py::arg("out"), py::arg("dtype"), py::arg("seeds"), py::arg("rows"), py::arg("row_numel"), py::arg("offset"),
      context, Unlocked(),
      doc(R"(Write out[i, j] = standard normal number `offset + j` (mod 2^64) of the stream of seeds[i].

Args:
    out: address of [rows, row_numel] of dtype, contiguous; overwritten.
    dtype: index in DTYPES; not uint8.
    seeds: address of int64 [rows], read as unsigned.
    rows: number of streams; may be 0.
    row_numel: numbers to draw from each stream; may be 0.
    offset: index of the first number in each stream, in [0, 2^64).
    )")
          .c_str());

  m.def(
      "path_interpolate",
      [](std::uintptr_t x_T, std::uintptr_t i, int dtype, std::uintptr_t x0, int x0_dtype, std::uintptr_t noise,
         std::uintptr_t flips, std::int64_t images, std::int64_t rows, std::int64_t width,
         const std::vector<double>& times, float mean_coef, float std, std::uint64_t seed, std::uint64_t offset,
         std::int64_t place) {
        require(images >= 0, "images >= 0", images);
        require(rows >= 0, "rows >= 0", rows);
        require(width >= 0, "width >= 0", width);
        require(!times.empty() && times.size() <= kMaxPathTimes, "1 to 8 times", times.size());
        PathTimes path = {static_cast<int>(times.size()), {}, {}};
        for (std::size_t k = 0; k < times.size(); ++k) {
          path.t[k] = static_cast<float>(times[k]);
          path.one_minus_t[k] = static_cast<float>(1.0 - times[k]);
        }
        Backend::path_interpolate(
            {pointer<void>(x_T), pointer<void>(i), dtype_of(dtype, false, false), pointer<const void>(x0),
             dtype_of(x0_dtype, false, true), pointer<const float>(noise), pointer<const std::uint8_t>(flips), images,
             rows, width, path, mean_coef, std, seed, offset},
            place);
      },
      py::arg("x_T"), py::arg("i"), py::arg("dtype"), py::arg("x0"), py::arg("x0_dtype"), py::arg("noise"),
      py::arg("flips"), py::arg("images"), py::arg("rows"), py::arg("width"), py::arg("times"), py::arg("mean_coef"),
      py::arg("std"), py::arg("seed"), py::arg("offset"), context, Unlocked(),
      doc(R"(Write x_T and the points i(t) of the straight path (spigan.ops.path_interpolate).

Args:
    x_T: address of [images, rows, width] of dtype; overwritten. All arrays are contiguous.
    i: address of [len(times), images, rows, width] of dtype; overwritten.
    dtype: index in DTYPES of the results: float32, bfloat16 or float16.
    x0: address of [images, rows, width] of x0_dtype; rows = channels * height.
    x0_dtype: index in DTYPES; not float64.
    noise: address of float32 [images, rows, width]; 0: draw it.
    flips: address of uint8 [images], not 0 where an image is mirrored first; 0: none.
    images, rows, width: sizes; may be 0.
    times: 1 to 8 times.
    mean_coef, std: a(1) and s(1).
    seed, offset: stream and index of the first element's noise, in [0, 2^64).
    )")
          .c_str());

  m.def(
      "fir_bias_act",
      [](std::uintptr_t out, int dtype, const std::array<std::int64_t, 4>& size, std::uintptr_t x,
         const std::array<std::int64_t, 2>& x_size, std::uintptr_t filter, const std::array<std::int64_t, 4>& fir,
         bool flip, double fir_gain, std::uintptr_t factor, std::uintptr_t noise, std::int64_t noise_stride,
         std::uintptr_t seed, std::uintptr_t strength, std::uintptr_t bias, std::int64_t bias_stride, double slope,
         double gain, double clamp, std::uintptr_t next_factor, std::uintptr_t add, std::uintptr_t rgb,
         std::uintptr_t rgb_weight, std::int64_t rgb_channels, std::int64_t place) {
        const LayerEnd end = layer_end(out, dtype, size, factor, noise, noise_stride, seed, strength, bias, bias_stride,
                                       slope, gain, clamp, next_factor, add, rgb, rgb_weight, rgb_channels);
        const auto [taps, up, down, pad] = fir;
        require(x_size[0] >= 0, "x_size >= 0", x_size[0]);
        require(x_size[1] >= 0, "x_size >= 0", x_size[1]);
        if (filter == 0) {
          const char* const same_size = "x of the result's size where no filter is";
          require(x_size[0] == end.height, same_size, x_size[0]);
          require(x_size[1] == end.width, same_size, x_size[1]);
        } else {
          require(taps >= 1 && taps <= kMaxTaps, "1 to 8 taps", taps);
          require(up == 1 || up == 2, "up 1 or 2", up);
          require(down == 1 || down == 2, "down 1 or 2", down);
          require(x != out, "a result beside x where a filter is", taps);
        }
        Backend::fir_bias_act({end, pointer<const void>(x), x_size[0], x_size[1], pointer<const float>(filter), taps,
                               up, down, pad, flip, fir_gain},
                              place);
      },
      py::arg("out"), py::arg("dtype"), py::arg("size"), py::arg("x"), py::arg("x_size"), py::arg("filter"),
      py::arg("fir"), py::arg("flip"), py::arg("fir_gain"), py::arg("factor"), py::arg("noise"),
      py::arg("noise_stride"), py::arg("seed"), py::arg("strength"), py::arg("bias"), py::arg("bias_stride"),
      py::arg("slope"), py::arg("gain"), py::arg("clamp"), py::arg("next_factor"), py::arg("add"), py::arg("rgb"),
      py::arg("rgb_weight"), py::arg("rgb_channels"), context, Unlocked(),
      doc(R"(Write out = next_factor clamp(gain act(factor fir_gain FIR(x) + strength noise + bias)) + add.

Images are channels-last and contiguous. "wide" is float32, or float64 if dtype is.
An address of 0 leaves a part out.

Args:
    out: address of [images, height, width, channels] of dtype; overwritten; 0 where only rgb is wanted.
    dtype: index in DTYPES; not uint8.
    size: (images, height, width, channels) of out; may be 0.
    x: address of [images, *x_size, channels] of dtype; without a filter it may be out.
    x_size: (height, width) of x.
    filter: address of float32 [taps, taps].
    fir: (taps, up, down, pad), as of FirBiasAct in csrc/common/arguments.h.
    flip: convolve with the filter instead of correlating.
    fir_gain: factor of the filter.
    factor: address of wide [images, channels].
    noise: address of wide [height, width] for each image.
    noise_stride: elements from one image's noise to the next one's: height * width, or 0.
    seed: address of one int64: the noise is drawn, pixel p of image n from element n height width + p of its stream.
    strength: address of one wide factor of the noise.
    bias: address of wide [channels] for each image.
    bias_stride: elements from one image's bias to the next one's: channels, or 0.
    slope, gain, clamp: of act(v) = v or slope v for v < 0; inf does not clamp.
    next_factor: address of wide [images, channels].
    add: address of [images, height, width, channels] of dtype.
    rgb: address of float32 [images, height, width, rgb_channels]: sums over channels of rgb_weight times what stands
        before next_factor; overwritten. Not for float64.
    rgb_weight: address of float32 [images, rgb_channels, channels].
    rgb_channels: 1 to 4.
    )")
          .c_str());

  m.def(
      "bias_act_backward",
      [](std::uintptr_t grad_x, std::uintptr_t sum_u, std::uintptr_t sum_ux, std::uintptr_t sum_c, int dtype,
         std::uintptr_t grad, std::uintptr_t out, std::uintptr_t x, std::uintptr_t factor, double slope, double gain,
         double clamp, const std::array<std::int64_t, 3>& size, std::int64_t parts, std::int64_t place) {
        for (const std::int64_t length : size) require(length >= 0, "sizes >= 0", length);
        require(parts >= 1, "parts >= 1", parts);
        require(gain > 0.0, "gain > 0", gain);
        require(sum_ux == 0 || x != 0, "x where sum_ux is wanted", 0);
        Backend::bias_act_backward({pointer<void>(grad_x), pointer<void>(sum_u), pointer<void>(sum_ux),
                                    pointer<void>(sum_c), dtype_of(dtype, true, false), pointer<const void>(grad),
                                    pointer<const void>(out), pointer<const void>(x), pointer<const void>(factor),
                                    slope, gain, clamp, size[0], size[1], size[2], parts},
                                   place);
      },
      py::arg("grad_x"), py::arg("sum_u"), py::arg("sum_ux"), py::arg("sum_c"), py::arg("dtype"), py::arg("grad"),
      py::arg("out"), py::arg("x"), py::arg("factor"), py::arg("slope"), py::arg("gain"), py::arg("clamp"),
      py::arg("size"), py::arg("parts"), context, Unlocked(),
      doc(R"(Derivatives of fir_bias_act without filter, next_factor, add and rgb.

u = grad times the derivative of clamp(gain act()), which the result `out` tells. An address of 0 leaves a part out.

Args:
    grad_x: address of [images, pixels, channels] of dtype: factor u; overwritten; may be grad.
    sum_u: address of wide [images, parts, channels]: sums of u over each part's pixels; overwritten.
    sum_ux: the same of u x.
    sum_c: address of wide [images, pixels]: sums of u over channels; overwritten.
    dtype: index in DTYPES; not uint8. "wide" is float32, or float64 where dtype is.
    grad: address of [images, pixels, channels] of dtype.
    out: address of the result, like grad; 0: the derivative is gain everywhere.
    x: address of x, like grad.
    factor: address of wide [images, channels].
    slope, gain, clamp: as of fir_bias_act; gain > 0.
    size: (images, pixels, channels); may be 0.
    parts: part k has the pixels from k ceil(pixels / parts) on.
    )")
          .c_str());

  m.def(
      "rk4_mlp",
      [](std::uintptr_t out, int dtype, std::uintptr_t h0, std::uintptr_t weight, std::uintptr_t bias,
         std::uintptr_t time_weight, std::int64_t batch, std::int64_t dim, std::int64_t layers,
         const std::vector<std::tuple<double, double, std::int64_t>>& steps, bool every_step, int activation,
         std::int64_t place, std::uintptr_t workspace) {
        require(batch >= 0, "batch >= 0", batch);
        require(dim >= 0, "dim >= 0", dim);
        require(layers >= 1, "layers >= 1", layers);
        require(activation >= 0 && activation <= 3, "an activation of ACTIVATIONS", activation);
        std::vector<Interval> intervals;
        for (const auto& [start, length, count] : steps) intervals.push_back({start, length, count});
        Backend::rk4_mlp({pointer<void>(out), dtype_of(dtype, true, false), pointer<const void>(h0),
                          pointer<const void>(weight), pointer<const void>(bias), pointer<const void>(time_weight),
                          batch, dim, layers, intervals.data(), static_cast<std::int64_t>(intervals.size()),
                          every_step, static_cast<Activation>(activation), pointer<void>(workspace)},
                         place);
      },
      py::arg("out"), py::arg("dtype"), py::arg("h0"), py::arg("weight"), py::arg("bias"), py::arg("time_weight"),
      py::arg("batch"), py::arg("dim"), py::arg("layers"), py::arg("intervals"), py::arg("every_step"),
      py::arg("activation"), context, py::arg("workspace") = 0, Unlocked(),
      doc(R"(Write the states of spigan.ops.rk4_mlp.

Args:
    out: address of [len(intervals), batch, dim], or with every_step of [all steps, batch, dim]; overwritten. All arrays
        are contiguous and of dtype.
    dtype: index in DTYPES; not uint8.
    h0: address of [batch, dim].
    weight: address of [layers, dim, dim].
    bias, time_weight: addresses of [layers, dim].
    batch, dim, layers: sizes; batch may be 0.
    intervals: (start, length of a step, number of steps) to each requested time.
    every_step: write the state after every step, not only after every interval.
    activation: index in ACTIVATIONS.
    workspace: address of the memory that a GPU needs (rk4_mlp_workspace_bytes); a CPU needs none.
    )")
          .c_str());
}

}  // namespace spigan
