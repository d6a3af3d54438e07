// Python functions of the operations, the same for every place that kernels run on.
//
// They take addresses and sizes, never tensors, and check what could make a kernel read or write out of bounds; types,
// shapes and devices of tensors were checked by spigan/ops.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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
