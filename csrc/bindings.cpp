// Python module spigan._C. Functions take addresses and sizes, never tensors: no torch header is needed to build and
// one build serves every torch version. The caller (spigan/ops) validates, allocates and keeps the memory alive.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/philox.h"
#include "cpu/philox_normal.h"

namespace py = pybind11;

namespace {

using Words4 = std::tuple<std::uint32_t, std::uint32_t, std::uint32_t, std::uint32_t>;
using Words2 = std::tuple<std::uint32_t, std::uint32_t>;

Words4 philox4x32_10(const Words4& counter, const Words2& key) {
  const auto [c0, c1, c2, c3] = counter;
  const auto [k0, k1] = key;
  const spigan::Philox4x32 words = spigan::philox4x32_10({c0, c1, c2, c3}, {k0, k1});
  return {words.x0, words.x1, words.x2, words.x3};
}

void philox_normal(std::uintptr_t out_ptr, std::uintptr_t seeds_ptr, std::int64_t rows, std::int64_t row_numel,
                   std::uint64_t offset, int threads) {
  if (rows < 0 || row_numel < 0 || threads < 1) {
    throw std::invalid_argument("philox_normal needs rows >= 0, row_numel >= 0 and threads >= 1, got rows=" +
                                std::to_string(rows) + ", row_numel=" + std::to_string(row_numel) +
                                ", threads=" + std::to_string(threads));
  }
  spigan::cpu::philox_normal(reinterpret_cast<float*>(out_ptr), reinterpret_cast<const std::int64_t*>(seeds_ptr), rows,
                             row_numel, offset, threads);
}

// "80-real,90" -> ["80-real", "90"]; CMake joins its list with commas, which need no quoting on a command line.
py::list split(const std::string& text) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.append(part);
  return parts;
}

py::dict build_info() {
  const std::string cuda_version = SPIGAN_CUDA_VERSION;  // empty: built without CUDA
  py::dict info;
  info["compiler"] = SPIGAN_COMPILER;
  info["compiler_version"] = SPIGAN_COMPILER_VERSION;
  info["cxx_standard"] = static_cast<std::int64_t>(__cplusplus);
#ifdef _OPENMP
  info["openmp"] = true;
  info["openmp_version"] = _OPENMP;
#else
  info["openmp"] = false;
  info["openmp_version"] = py::none();
#endif
  info["cuda"] = !cuda_version.empty();
  info["cuda_version"] = cuda_version.empty() ? py::object(py::none()) : py::object(py::str(cuda_version));
  info["cuda_architectures"] = split(SPIGAN_CUDA_ARCHITECTURES);
  info["build_type"] = SPIGAN_BUILD_TYPE;
  return info;
}

}  // namespace

// mod_gil_not_used: no function touches shared state, so free-threaded Python need not bring the GIL back.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "C++ kernels of spigan. Private: the public functions, which check their arguments, are in spigan.ops.";

  m.def("philox4x32_10", &philox4x32_10, py::arg("counter"), py::arg("key"),
        R"(Ten rounds of Philox4x32 on one block.

Args:
    counter: four 32-bit words.
    key: two 32-bit words.

Returns:
    Four 32-bit words.)");

  m.def("philox_normal", &philox_normal, py::arg("out_ptr"), py::arg("seeds_ptr"), py::arg("rows"),
        py::arg("row_numel"), py::arg("offset"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        R"(Write out[i, j] = standard normal number `offset + j` (mod 2^64) of the stream of seeds[i].

The result does not depend on `threads`. The GIL is released.

Args:
    out_ptr: address of float32 [rows, row_numel], contiguous; overwritten.
    seeds_ptr: address of int64 [rows], read as unsigned.
    rows: number of streams; may be 0.
    row_numel: numbers to draw from each stream; may be 0.
    offset: index of the first number in each stream, in [0, 2^64).
    threads: most threads to use, at least 1.

Raises:
    ValueError: a negative size, or threads below 1.)");

  m.def("build_info", &build_info,
        R"(How this extension was built.

Returns:
    Dictionary of compiler and compiler_version (str), cxx_standard (int, the value of __cplusplus), openmp (bool),
    openmp_version (int, the date YYYYMM of the OpenMP specification, or None), cuda (bool), cuda_version (str or
    None), cuda_architectures (list of str in CMake's notation) and build_type (str).)");
}
