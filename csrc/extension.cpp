// The Python module spigan._C. Its functions take addresses and sizes, never tensors, so that it builds without torch's
// headers and one build works with every torch version. The caller (spigan/ops) validates arguments, allocates memory
// and keeps it alive.
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/philox.h"
#include "cpu/cpu_kernels.h"
#include "operations.h"
#if defined(SPIGAN_WITH_CUDA)
#include "cuda/cuda_operations.h"
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

// The CPU kernels. Their context is the number of threads.
struct Cpu {
  static constexpr const char* kContext = "threads";
  static constexpr const char* kContextDoc =
      "threads: Maximum number of threads, at least 1; does not affect the result.";

  static int threads(std::int64_t context) {
    expect_between(1, kMaxThreads, "threads", context);
    return static_cast<int>(context);
  }
  static void philox_normal(const PhiloxNormal& args, std::int64_t context) {
    cpu::kernels().philox_normal(args, threads(context));
  }
  static void path_interpolate(const PathInterpolate& args, std::int64_t context) {
    cpu::kernels().path_interpolate(args, threads(context));
  }
  static void fir_bias_act(const FirBiasAct& args, std::int64_t context) {
    if (!cpu::kernels().fir_bias_act(args, threads(context))) throw std::bad_alloc();
  }
  static void bias_act_backward(const BiasActBackward& args, std::int64_t context) {
    if (!cpu::kernels().bias_act_backward(args, threads(context))) throw std::bad_alloc();
  }
  static void rk4_mlp(const Rk4Mlp& args, std::int64_t context) {
    if (!cpu::kernels().rk4_mlp(args, threads(context))) throw std::bad_alloc();
  }
};

// rows: (first, count).
void check_rows(const std::array<std::int64_t, 2>& rows, std::int64_t height, const char* name) {
  const auto [first, count] = rows;
  if (first >= 0 && first <= height && count >= 0 && count <= height - first) return;
  throw std::invalid_argument(std::string("expected (first, count) of ") + name + " within " + std::to_string(height) +
                              " rows, got (" + std::to_string(first) + ", " + std::to_string(count) + ")");
}

void check_tile_rows(const std::array<std::int64_t, 2>& rows, const std::array<std::int64_t, 4>& size) {
  for (const std::int64_t length : size) expect(length >= 0, "every size to be >= 0", length);
  check_rows(rows, size[1] / 2 + size[1] % 2, "tile_rows");
}

// The passes before and after the matrix products of a modulated convolution. Images are channels-last.
void bind_layers(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def(
      "finish_products",
      [](std::uintptr_t y, const std::array<std::int64_t, 3>& y_size, const std::array<std::int64_t, 2>& y_rows,
         std::int64_t pad, const std::vector<float>& filter_y, const std::vector<float>& filter_x,
         const std::array<std::int64_t, 2>& rows, std::uintptr_t out, int dtype,
         const std::array<std::int64_t, 4>& size, std::uintptr_t factor, std::uintptr_t noise,
         std::int64_t noise_stride, std::uintptr_t strength, std::uintptr_t bias, double slope, double gain,
         double clamp, std::uintptr_t next_factor, std::uintptr_t rgb, std::uintptr_t rgb_weight,
         std::int64_t rgb_channels, std::int64_t threads) {
        const auto [y_height, y_width, kernel] = y_size;
        expect(y_height >= 0 && y_width >= 0, "y_size >= 0", y_height < 0 ? y_height : y_width);
        expect_between(1, kMaxProductTerms, "kernel", kernel);
        const std::int64_t taps = static_cast<std::int64_t>(filter_y.size());
        require(filter_x.size() == filter_y.size(), "filter_y and filter_x must have the same length");
        expect_between(1, kMaxProductTerms / kernel, "len(filter_y)", taps);
        expect(pad > -(std::int64_t{1} << 40) && pad < std::int64_t{1} << 40, "|pad| < 2^40", pad);
        check_rows(y_rows, y_height, "y_rows");
        check_rows(rows, size[1], "rows");
        if (rows[1] > 0) {  // row r needs input row i if 2 i + u = r + t - pad for 0 <= u < kernel and 0 <= t < taps
          const std::int64_t first = (rows[0] - pad - kernel + 2) >> 1, end = y_rows[0] + y_rows[1];
          const std::int64_t last = (rows[0] + rows[1] - 1 + taps - 1 - pad) >> 1;
          expect(first >= y_rows[0] || y_rows[0] == 0, "y_rows to begin before the first input row that rows need",
                 y_rows[0]);
          expect(last < end || end == y_height, "y_rows to end after the last input row that rows need", end);
        }
        dtype_of(dtype, false, false);
        const LayerEnd end = layer_end(out, dtype, size, factor, noise, noise_stride, 0, strength, bias, 0, slope, gain,
                                       clamp, next_factor, 0, rgb, rgb_weight, rgb_channels);
        const cpu::ProductsEnd args = {end, pointer<const void>(y), y_height, y_width, y_rows[0], y_rows[1], kernel,
                                       taps, pad, filter_y.data(), filter_x.data(), rows[0], rows[1]};
        if (!cpu::kernels().finish_products(args, Cpu::threads(threads))) throw std::bad_alloc();
      },
      py::arg("y"), py::arg("y_size"), py::arg("y_rows"), py::arg("pad"), py::arg("filter_y"), py::arg("filter_x"),
      py::arg("rows"), py::arg("out"), py::arg("dtype"), py::arg("size"), py::arg("factor"), py::arg("noise"),
      py::arg("noise_stride"), py::arg("strength"), py::arg("bias"), py::arg("slope"), py::arg("gain"),
      py::arg("clamp"), py::arg("next_factor"), py::arg("rgb"), py::arg("rgb_weight"), py::arg("rgb_channels"),
      py::arg("threads"), Unlocked(),
      R"(End a layer with up = 2: sum the products of its stride-2 transposed convolution and filter the result.

Args:
    y: Address of [images, y_rows[1], y_width, kernel, kernel, channels] of dtype: the products of every kernel tap with
        every pixel.
    y_size: (y_height, y_width, kernel) of the convolution's whole input.
    y_rows: (first, count) of the input rows in y, which must include every row that the rows to write need.
    pad: Number of zeros before the first row and column of the transposed convolution's result; a negative pad crops.
    filter_y, filter_x: The separable filter, as it is correlated and with its gain. Both have the same length, between
        1 and MAX_PRODUCT_TERMS / kernel.
    rows: (first, count) of the rows to write.

The other arguments are those of fir_bias_act. float64 is not supported.)");

  m.def(
      "winograd_input",
      [](std::uintptr_t out, std::uintptr_t x, std::uintptr_t style, const std::array<std::int64_t, 4>& size,
         const std::array<std::int64_t, 2>& tile_rows, std::int64_t threads) {
        check_tile_rows(tile_rows, size);
        cpu::kernels().winograd_input({pointer<float>(out), pointer<const float>(x), pointer<const float>(style),
                                       size[0], size[1], size[2], size[3], tile_rows[0], tile_rows[1]},
                                      Cpu::threads(threads));
      },
      py::arg("out"), py::arg("x"), py::arg("style"), py::arg("size"), py::arg("tile_rows"), py::arg("threads"),
      Unlocked(),
      R"(Write the left factors of the 16 matrix products of Winograd's F(2x2, 3x3), zero padding 1.

Args:
    out: Address of float32 [16, images * tile_rows[1] * ceil(width / 2), channels]; overwritten.
    x: Address of float32 [images, height, width, channels].
    style: Address of float32 [images, channels], which scales x. 0 does not scale.
    size: (images, height, width, channels).
    tile_rows: (first, count) of the rows of 2x2 tiles to transform in every image.
    threads: Maximum number of threads, at least 1.)");

  m.def(
      "winograd_output",
      [](const std::array<std::uintptr_t, 16>& products, const std::array<std::int64_t, 2>& tile_rows,
         std::uintptr_t out, int dtype,
         const std::array<std::int64_t, 4>& size, std::uintptr_t factor, std::uintptr_t noise,
         std::int64_t noise_stride, std::uintptr_t strength, std::uintptr_t bias, double slope, double gain,
         double clamp, std::uintptr_t next_factor, std::uintptr_t rgb, std::uintptr_t rgb_weight,
         std::int64_t rgb_channels, std::int64_t threads) {
        expect(dtype == static_cast<int>(Dtype::kFloat32), "the index of float32 in DTYPES", dtype);
        const LayerEnd end = layer_end(out, dtype, size, factor, noise, noise_stride, 0, strength, bias, 0, slope, gain,
                                       clamp, next_factor, 0, rgb, rgb_weight, rgb_channels);
        check_tile_rows(tile_rows, size);
        cpu::WinogradEnd args = {end, {}, tile_rows[0], tile_rows[1]};
        for (std::size_t k = 0; k < products.size(); ++k) args.products[k] = pointer<const float>(products[k]);
        if (!cpu::kernels().winograd_output(args, Cpu::threads(threads))) throw std::bad_alloc();
      },
      py::arg("products"), py::arg("tile_rows"), py::arg("out"), py::arg("dtype"), py::arg("size"), py::arg("factor"),
      py::arg("noise"), py::arg("noise_stride"), py::arg("strength"), py::arg("bias"), py::arg("slope"),
      py::arg("gain"), py::arg("clamp"), py::arg("next_factor"), py::arg("rgb"), py::arg("rgb_weight"),
      py::arg("rgb_channels"), py::arg("threads"), Unlocked(),
      R"(End a layer: transform back the 16 products of Winograd's F(2x2, 3x3).

Args:
    products: 16 addresses of float32 [images * tile_rows[1] * ceil(width / 2), channels].
    tile_rows: (first, count) of the rows of 2x2 tiles in the products, for every image; only their pixels are written.

The other arguments are those of fir_bias_act. dtype must be float32.)");

  m.def(
      "winograd_weight",
      [](std::uintptr_t out, std::uintptr_t weight, std::int64_t out_channels, std::int64_t in_channels,
         std::int64_t threads) {
        expect(out_channels >= 0, "out_channels >= 0", out_channels);
        expect(in_channels >= 0, "in_channels >= 0", in_channels);
        cpu::kernels().winograd_weight({pointer<float>(out), pointer<const float>(weight), out_channels, in_channels},
                                       Cpu::threads(threads));
      },
      py::arg("out"), py::arg("weight"), py::arg("out_channels"), py::arg("in_channels"), py::arg("threads"),
      Unlocked(),
      R"(Write the right factors of the 16 matrix products of Winograd's F(2x2, 3x3).

Args:
    out: Address of float32 [16, out_channels, in_channels]; overwritten.
    weight: Address of float32 [out_channels, in_channels, 3, 3].
    out_channels, in_channels: Sizes; may be 0.
    threads: Maximum number of threads, at least 1.)");
}

// "80-real,90" -> ["80-real", "90"]. CMakeLists.txt joins the list with commas, which need no quoting on a command
// line.
py::list split(const std::string& text) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.append(part);
  return parts;
}

py::dict build_info() {
  const std::string cuda_version = SPIGAN_CUDA_VERSION;  // empty in a build without CUDA
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

// mod_gil_not_used: free-threaded Python need not enable the GIL, because only select_cpu_isa, which is for tests,
// touches shared state.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "C++ kernels of spigan. Private: use the functions of spigan.ops, which check their arguments.";

  m.attr("MAX_TAPS") = kMaxTaps;
  m.attr("MAX_RGB_CHANNELS") = kMaxRgbChannels;
  m.attr("MAX_PRODUCT_TERMS") = kMaxProductTerms;
  m.attr("MAX_PATH_TIMES") = kMaxPathTimes;
  m.attr("RK4_MLP_MAX_DIM") = kMaxRk4Dim;  // this and the next three apply to the CUDA and Triton kernels
  m.attr("RK4_MLP_DIM_MULTIPLE") = kRk4DimMultiple;
  m.attr("RK4_MLP_MAX_LAYERS") = kMaxRk4Layers;
  m.attr("RK4_MLP_MAX_INTERVALS") = kMaxRk4Intervals;

  m.def("philox4x32_10", &philox_words, py::arg("counter"), py::arg("key"),
        R"(Apply ten rounds of Philox4x32 to one block.

Args:
    counter: Four 32-bit words.
    key: Two 32-bit words.

Returns:
    Four 32-bit words.)");

  bind_operations<Cpu>(m);
#if defined(SPIGAN_WITH_CUDA)
  py::module_ cuda = m.def_submodule("cuda", "The operations on a GPU. They take device addresses and a stream.");
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
      R"(Select the instruction set of the CPU kernels, for tests.

Args:
    name: One of build_info()["cpu_isas"], or None for the best one.

Raises:
    ValueError: If this CPU or this build does not support the instruction set.)");

  m.def("build_info", &build_info,
        R"(Return how this extension was built.

Returns:
    Dictionary of compiler and compiler_version (str), cxx_standard (int, the value of __cplusplus), openmp (bool),
    openmp_version (int, the date YYYYMM of the OpenMP specification, or None), cuda (bool), cuda_version (str or
    None), cuda_architectures (list of str in CMake's notation), cpu_isas (list of str: the compiled instruction sets
    that this CPU supports, best first), cpu_isa (str: the one in use) and build_type (str).)");
}
