// Python module spigan._C. Functions take addresses and sizes, never tensors: no torch header is needed to build and
// one build serves every torch version. The caller (spigan/ops) validates, allocates and keeps the memory alive.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings.h"
#include "common/philox.h"
#include "cpu/kernels.h"
#if defined(SPIGAN_WITH_CUDA)
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using namespace spigan;

using Words4 = std::tuple<std::uint32_t, std::uint32_t, std::uint32_t, std::uint32_t>;
using Words2 = std::tuple<std::uint32_t, std::uint32_t>;

Words4 philox_words(const Words4& counter, const Words2& key) {
  const auto [c0, c1, c2, c3] = counter;
  const auto [k0, k1] = key;
  const spigan::Philox4x32 words = spigan::philox4x32_10({c0, c1, c2, c3}, {k0, k1});
  return {words.x0, words.x1, words.x2, words.x3};
}

// The kernels on the CPU; the last argument of each is the number of threads.
struct Cpu {
  static constexpr const char* kContext = "threads";
  static constexpr const char* kContextDoc = "most threads to use, at least 1; changes no bit of the result.";

  static int threads(std::int64_t context) {
    require(context >= 1 && context <= 1 << 20, "threads >= 1", context);
    return static_cast<int>(context);
  }
  static void philox_normal(const PhiloxNormal& args, std::int64_t context) {
    cpu::kernels().philox_normal(args, threads(context));
  }
  static void path_interpolate(const PathInterpolate& args, std::int64_t context) {
    cpu::kernels().path_interpolate(args, threads(context));
  }
  static void rk4_mlp(const Rk4Mlp& args, std::int64_t context) {
    if (!cpu::kernels().rk4_mlp(args, threads(context))) throw std::bad_alloc();
  }
};

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
  py::list isas;
  for (const char* const* name = cpu::available_isas(); *name != nullptr; ++name) isas.append(*name);
  info["cpu_isas"] = isas;
  info["cpu_isa"] = cpu::kernels().isa;
  info["build_type"] = SPIGAN_BUILD_TYPE;
  return info;
}

}  // namespace

// mod_gil_not_used: no function touches shared state, so free-threaded Python need not bring the GIL back.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "C++ kernels of spigan. Private: the public functions, which check their arguments, are in spigan.ops.";

  m.def("philox4x32_10", &philox_words, py::arg("counter"), py::arg("key"),
        R"(Ten rounds of Philox4x32 on one block.

Args:
    counter: four 32-bit words.
    key: two 32-bit words.

Returns:
    Four 32-bit words.)");

  bind_operations<Cpu>(m);
#if defined(SPIGAN_WITH_CUDA)
  py::module_ cuda = m.def_submodule("cuda", "The same operations on a GPU: device addresses, and a stream.");
  bind_cuda(cuda);
#endif

  m.def(
      "select_cpu_isa",
      [](const py::object& name) {
        if (!cpu::select_isa(name.is_none() ? nullptr : py::cast<std::string>(name).c_str())) {
          throw std::invalid_argument("select_cpu_isa: " + py::cast<std::string>(py::str(name)) +
                                      " is not one of build_info()['cpu_isas']");
        }
      },
      py::arg("name"),
      R"(Run the CPU kernels on another instruction set than the best one, for tests.

Args:
    name: one of build_info()["cpu_isas"], or None for the best one.

Raises:
    ValueError: this CPU or this build does not have it.)");

  m.def("build_info", &build_info,
        R"(How this extension was built.

Returns:
    Dictionary of compiler and compiler_version (str), cxx_standard (int, the value of __cplusplus), openmp (bool),
    openmp_version (int, the date YYYYMM of the OpenMP specification, or None), cuda (bool), cuda_version (str or
    None), cuda_architectures (list of str in CMake's notation), cpu_isas (list of str: instruction sets built that
    this CPU has, best first), cpu_isa (str: the one in use) and build_type (str).)");
}
