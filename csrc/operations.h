// Python bindings of the operations, shared by all backends.
//
// The functions take addresses and sizes, never tensors. They reject sizes and indices that would make a kernel read or
// write out of bounds. spigan/ops has already checked the types, shapes and devices of the tensors.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/arguments.h"

namespace spigan {

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <class Given>
void expect(bool condition, const char* expected, Given given) {
  if (!condition) throw std::invalid_argument(std::string("expected ") + expected + ", got " + std::to_string(given));
}

inline void expect_between(std::int64_t first, std::int64_t last, const char* name, std::int64_t given) {
  if (given >= first && given <= last) return;
  throw std::invalid_argument(std::string("expected ") + name + " from " + std::to_string(first) + " to " +
                              std::to_string(last) + ", got " + std::to_string(given));
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Dtype dtype_of(int number, bool float64, bool uint8) {
  const bool known = number >= 0 && number < static_cast<int>(std::size(kDtypeNames));
  const Dtype dtype = static_cast<Dtype>(number);
  expect(known && (float64 || dtype != Dtype::kFloat64) && (uint8 || dtype != Dtype::kUInt8),
         "an index in DTYPES of a dtype that this function supports", number);
  return dtype;
}

inline LayerEnd layer_end(std::uintptr_t out, int dtype, const std::array<std::int64_t, 4>& size, std::uintptr_t factor,
                          std::uintptr_t noise, std::int64_t noise_stride, std::uintptr_t seed,
                          std::uintptr_t strength, std::uintptr_t bias, std::int64_t bias_stride, double slope,
                          double gain, double clamp, std::uintptr_t next_factor, std::uintptr_t add,
                          std::uintptr_t rgb, std::uintptr_t rgb_weight, std::int64_t rgb_channels) {
  for (const std::int64_t length : size) expect(length >= 0, "every size to be >= 0", length);
  const auto [images, height, width, channels] = size;
  expect(noise_stride == 0 || noise_stride == height * width, "noise_stride to be 0 or height * width", noise_stride);
  expect(bias_stride == 0 || bias_stride == channels, "bias_stride to be 0 or channels", bias_stride);
  expect(clamp > 0.0, "clamp > 0", clamp);
  if (rgb != 0) {
    expect_between(1, kMaxRgbChannels, "rgb_channels", rgb_channels);
    require(rgb_weight != 0, "rgb needs rgb_weight");
    require(dtype != static_cast<int>(Dtype::kFloat64), "rgb is not available for float64");
  }
  return {pointer<void>(out), dtype_of(dtype, true, false), images, height, width, channels,
          pointer<const void>(factor), pointer<const void>(noise), noise_stride, pointer<const std::int64_t>(seed),
          pointer<const void>(strength), pointer<const void>(bias), bias_stride, slope, gain, clamp,
          pointer<const void>(next_factor), pointer<const void>(add), pointer<float>(rgb),
          pointer<const float>(rgb_weight), rgb_channels};
}

template <std::size_t N>
pybind11::tuple tuple_of(const char* const (&names)[N]) {
  pybind11::tuple result(N);
  for (std::size_t i = 0; i < N; ++i) result[i] = pybind11::str(names[i]);
  return result;
}

// Adds one function per operation to `m`. A Backend has a static function (arguments, context) for each operation,
// which runs without the GIL. `kContext` and `kContextDoc` are the name and the description of the context in Python.
template <class Backend>
void bind_operations(pybind11::module_& m) {
  namespace py = pybind11;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  const auto context = py::arg(Backend::kContext);
  const auto doc = [](const char* text) { return std::string(text) + Backend::kContextDoc; };

  m.attr("DTYPES") = tuple_of(kDtypeNames);
  m.attr("ACTIVATIONS") = tuple_of(kActivationNames);

  m.def(
      "philox_normal",
      [](std::uintptr_t out, int dtype, std::uintptr_t seeds, std::int64_t rows, std::int64_t row_numel,
         std::uint64_t offset, std::int64_t place) {
        expect(rows >= 0, "rows >= 0", rows);
        expect(row_numel >= 0, "row_numel >= 0", row_numel);
        Backend::philox_normal({pointer<void>(out), dtype_of(dtype, true, false), pointer<const std::int64_t>(seeds),
                                rows, row_numel, offset},
                               place);
      },
      py::arg("out"), py::arg("dtype"), py::arg("seeds"), py::arg("rows"), py::arg("row_numel"), py::arg("offset"),
      context, Unlocked(),
      doc(R"(Write standard normal numbers: out[i, j] is number (offset + j) mod 2^64 of the stream of seeds[i].

Args:
    out: Address of [rows, row_numel] of dtype, contiguous; overwritten.
    dtype: Index in DTYPES; not uint8.
    seeds: Address of int64 [rows], read as unsigned.
    rows: Number of streams; may be 0.
    row_numel: How many numbers to draw from each stream; may be 0.
    offset: Index of the first number in each stream, in [0, 2^64).
    )")
          .c_str());

  m.def(
      "path_interpolate",
      [](std::uintptr_t x_T, std::uintptr_t i, int dtype, std::uintptr_t x0, int x0_dtype, std::uintptr_t noise,
         std::uintptr_t flips, std::int64_t images, std::int64_t rows, std::int64_t width,
         const std::vector<double>& times, float mean_coef, float std, std::uint64_t seed, std::uint64_t offset,
         std::int64_t place) {
        expect(images >= 0, "images >= 0", images);
        expect(rows >= 0, "rows >= 0", rows);
        expect(width >= 0, "width >= 0", width);
        expect_between(1, kMaxPathTimes, "len(times)", static_cast<std::int64_t>(times.size()));
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

All arrays are contiguous.

Args:
    x_T: Address of [images, rows, width] of dtype; overwritten.
    i: Address of [len(times), images, rows, width] of dtype; overwritten.
    dtype: Index in DTYPES of the results' dtype: float32, bfloat16 or float16.
    x0: Address of [images, rows, width] of x0_dtype, where rows = channels * height.
    x0_dtype: Index in DTYPES; not float64.
    noise: Address of float32 [images, rows, width]. 0 draws the noise.
    flips: Address of uint8 [images]; an image with a nonzero flip is mirrored first. 0 mirrors no image.
    images, rows, width: Sizes; may be 0.
    times: Between 1 and MAX_PATH_TIMES values of t.
    mean_coef, std: a(1) and s(1).
    seed: Selects the stream that noise is drawn from, in [0, 2^64).
    offset: Index of the first element's noise in the stream, in [0, 2^64).
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
        expect(x_size[0] >= 0, "x_size >= 0", x_size[0]);
        expect(x_size[1] >= 0, "x_size >= 0", x_size[1]);
        if (filter == 0) {
          require(x_size[0] == end.height && x_size[1] == end.width, "without a filter x must have the result's size");
        } else {
          expect_between(1, kMaxTaps, "taps", taps);
          expect_between(1, 2, "up", up);
          expect_between(1, 2, "down", down);
          require(x != out, "a filter cannot work in place: out must not be x");
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

Images are channels-last and contiguous. "wide" means float32, or float64 if dtype is float64. Pass 0 as the address of
an optional array to leave out its part of the formula.

Args:
    out: Address of [images, height, width, channels] of dtype; overwritten. 0 computes only rgb.
    dtype: Index in DTYPES; not uint8.
    size: (images, height, width, channels) of out; each may be 0.
    x: Address of [images, *x_size, channels] of dtype. Without a filter it may equal out.
    x_size: (height, width) of x.
    filter: Address of float32 [taps, taps], or 0.
    fir: (taps, up, down, pad), as in FirBiasAct of csrc/common/arguments.h; taps is at most MAX_TAPS.
    flip: Convolve with the filter instead of correlating.
    fir_gain: Factor of the filter.
    factor: Address of wide [images, channels], or 0.
    noise: Address of wide [height, width] for each image, or 0.
    noise_stride: Number of elements from one image's noise to the next: height * width, or 0 if they share it.
    seed: Address of one int64, or 0. Without noise, pixel p of image n gets element n height width + p of its stream.
    strength: Address of one wide factor of the noise, or 0.
    bias: Address of wide [channels] for each image, or 0.
    bias_stride: Number of elements from one image's bias to the next: channels, or 0 if they share it.
    slope: act(v) is v for v >= 0 and slope v for v < 0.
    gain: Factor of the activation.
    clamp: Limit of the result's magnitude, > 0; inf for none.
    next_factor: Address of wide [images, channels], or 0.
    add: Address of [images, height, width, channels] of dtype, or 0.
    rgb: Address of float32 [images, height, width, rgb_channels], or 0; overwritten. It receives the sums over channels
        of rgb_weight times the clamped activation. Not available for float64.
    rgb_weight: Address of float32 [images, rgb_channels, channels].
    rgb_channels: Between 1 and MAX_RGB_CHANNELS.
    )")
          .c_str());

  m.def(
      "bias_act_backward",
      [](std::uintptr_t grad_x, std::uintptr_t sum_u, std::uintptr_t sum_ux, std::uintptr_t sum_c, int dtype,
         std::uintptr_t grad, std::uintptr_t out, std::uintptr_t x, std::uintptr_t factor, double slope, double gain,
         double clamp, const std::array<std::int64_t, 3>& size, std::int64_t parts, std::int64_t place) {
        for (const std::int64_t length : size) expect(length >= 0, "every size to be >= 0", length);
        expect(parts >= 1, "parts >= 1", parts);
        expect(gain > 0.0, "gain > 0", gain);
        require(sum_ux == 0 || x != 0, "sum_ux needs x");
        Backend::bias_act_backward({pointer<void>(grad_x), pointer<void>(sum_u), pointer<void>(sum_ux),
                                    pointer<void>(sum_c), dtype_of(dtype, true, false), pointer<const void>(grad),
                                    pointer<const void>(out), pointer<const void>(x), pointer<const void>(factor),
                                    slope, gain, clamp, size[0], size[1], size[2], parts},
                                   place);
      },
      py::arg("grad_x"), py::arg("sum_u"), py::arg("sum_ux"), py::arg("sum_c"), py::arg("dtype"), py::arg("grad"),
      py::arg("out"), py::arg("x"), py::arg("factor"), py::arg("slope"), py::arg("gain"), py::arg("clamp"),
      py::arg("size"), py::arg("parts"), context, Unlocked(),
      doc(R"(Write derivatives of fir_bias_act without filter, next_factor, add and rgb.

They all follow from u = grad times the derivative of clamp(gain act()), which is computed from the result `out`. Pass 0
as the address of a result to skip it.

Args:
    grad_x: Address of [images, pixels, channels] of dtype for factor u; overwritten. It may equal grad.
    sum_u: Address of wide [images, parts, channels] for the sums of u over the pixels of each part; overwritten.
    sum_ux: Address of the same for the sums of u x; overwritten. Needs x.
    sum_c: Address of wide [images, pixels] for the sums of u over channels; overwritten.
    dtype: Index in DTYPES; not uint8. "wide" means float32, or float64 if dtype is float64.
    grad: Address of [images, pixels, channels] of dtype.
    out: Address of the result, like grad. If 0, the derivative is gain everywhere.
    x: Address of x, like grad, or 0.
    factor: Address of wide [images, channels]. If 0, factor is 1.
    slope, gain, clamp: As in fir_bias_act; gain > 0.
    size: (images, pixels, channels); each may be 0.
    parts: Number of parts of an image, at least 1; part k starts at pixel k ceil(pixels / parts).
    )")
          .c_str());

  m.def(
      "rk4_mlp",
      [](std::uintptr_t out, int dtype, std::uintptr_t h0, std::uintptr_t weight, std::uintptr_t bias,
         std::uintptr_t time_weight, std::int64_t batch, std::int64_t dim, std::int64_t layers,
         const std::vector<std::tuple<double, double, std::int64_t>>& steps, bool every_step, int activation,
         std::int64_t place, std::uintptr_t workspace) {
        expect(batch >= 0, "batch >= 0", batch);
        expect(dim >= 0, "dim >= 0", dim);
        expect(layers >= 1, "layers >= 1", layers);
        expect(activation >= 0 && activation < static_cast<int>(std::size(kActivationNames)),
               "an index in ACTIVATIONS", activation);
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

All arrays are contiguous and of dtype.

Args:
    out: Address of [len(intervals), batch, dim], or of [total steps, batch, dim] with every_step; overwritten.
    dtype: Index in DTYPES; not uint8.
    h0: Address of [batch, dim].
    weight: Address of [layers, dim (out), dim (in)].
    bias, time_weight: Addresses of [layers, dim].
    batch, dim, layers: Sizes; batch and dim may be 0.
    intervals: For each requested time (start, step length, number of steps) of the interval that ends there.
    every_step: Write the state after every step, not only after every interval.
    activation: Index in ACTIVATIONS.
    workspace: Address of rk4_mlp_workspace_bytes() bytes on a GPU. Not used on a CPU.
    )")
          .c_str());
}

}  // namespace spigan
