// Python module spigan._C. Functions take addresses and sizes, never tensors: no torch header is needed to build and
// one build serves every torch version. The caller (spigan/ops) validates, allocates and keeps the memory alive.
#include <pybind11/pybind11.h>

#include <array>
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

// The passes around a modulated convolution; float32 vectors, channels-last images.
void bind_layers(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def(
      "scale_channels",
      [](std::uintptr_t out, int dtype, std::uintptr_t x, std::uintptr_t style, std::int64_t images, std::int64_t pixels,
         std::int64_t channels, std::int64_t threads) {
        cpu::kernels().scale_channels({pointer<void>(out), dtype_of(dtype, false, false), pointer<const void>(x),
                                       pointer<const float>(style), images, pixels, channels},
                                      Cpu::threads(threads));
      },
      py::arg("out"), py::arg("dtype"), py::arg("x"), py::arg("style"), py::arg("images"), py::arg("pixels"),
      py::arg("channels"), py::arg("threads"), Unlocked());

  m.def(
      "finish_layer",
      [](std::uintptr_t out, int dtype, std::uintptr_t y, std::uintptr_t demodulation, std::uintptr_t noise,
         std::int64_t noise_stride, std::uintptr_t bias, std::uintptr_t next_style, float slope, float gain, float clamp,
         const std::array<std::int64_t, 4>& size, const std::array<std::int64_t, 3>& y_size, std::int64_t pad,
         const std::vector<float>& filter_y, const std::vector<float>& filter_x, bool winograd, std::int64_t threads) {
        require(filter_x.size() == filter_y.size(), "filters of one length", filter_x.size());
        require(filter_x.size() * static_cast<std::size_t>(y_size[2]) <= 64, "taps times kernel <= 64", filter_x.size());
        const cpu::LayerEnd args = {pointer<void>(out), dtype_of(dtype, false, false), pointer<const void>(y),
                               pointer<const float>(demodulation), pointer<const float>(noise), noise_stride,
                               pointer<const float>(bias), pointer<const float>(next_style), slope, gain, clamp,
                               size[0], size[1], size[2], size[3], y_size[0], y_size[1], y_size[2],
                               static_cast<std::int64_t>(filter_y.size()), pad, filter_y.data(), filter_x.data()};
        const auto run = winograd ? cpu::kernels().winograd_output : cpu::kernels().finish_layer;
        if (!run(args, Cpu::threads(threads))) throw std::bad_alloc();
      },
      py::arg("out"), py::arg("dtype"), py::arg("y"), py::arg("demodulation"), py::arg("noise"),
      py::arg("noise_stride"), py::arg("bias"), py::arg("next_style"), py::arg("slope"), py::arg("gain"),
      py::arg("clamp"), py::arg("size"), py::arg("y_size"), py::arg("pad"), py::arg("filter_y"), py::arg("filter_x"),
      py::arg("winograd"), py::arg("threads"), Unlocked());

  m.def(
      "winograd_input",
      [](std::uintptr_t out, std::uintptr_t x, std::uintptr_t style, const std::array<std::int64_t, 4>& size,
         std::int64_t threads) {
        cpu::kernels().winograd_input({pointer<float>(out), pointer<const float>(x), pointer<const float>(style),
                                       size[0], size[1], size[2], size[3]},
                                      Cpu::threads(threads));
      },
      py::arg("out"), py::arg("x"), py::arg("style"), py::arg("size"), py::arg("threads"), Unlocked());

  m.def(
      "winograd_weight",
      [](std::uintptr_t out, std::uintptr_t weight, std::int64_t out_channels, std::int64_t in_channels,
         std::int64_t threads) {
        cpu::kernels().winograd_weight({pointer<float>(out), pointer<const float>(weight), out_channels, in_channels},
                                       Cpu::threads(threads));
      },
      py::arg("out"), py::arg("weight"), py::arg("out_channels"), py::arg("in_channels"), py::arg("threads"),
      Unlocked());
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
  py::list isas;
  for (const char* const* name = cpu::available_isas(); *name != nullptr; ++name) isas.append(*name);
  info["cpu_isas"] = isas;
  info["cpu_isa"] = cpu::kernels().isa;
  info["build_type"] = SPIGAN_BUILD_TYPE;
  return info;
}

}  // namespace

// mod_gil_not_used: no function but select_cpu_isa, which is for tests, touches shared state, so
// free-threaded Python need not bring the GIL back.
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

  bind_layers(m);

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
