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

void check_rows(const std::array<std::int64_t, 2>& rows, std::int64_t height, const char* expected) {
  require(rows[0] >= 0 && rows[0] <= height, expected, rows[0]);
  require(rows[1] >= 0 && rows[1] <= height - rows[0], expected, rows[1]);
}

void check_tile_rows(const std::array<std::int64_t, 2>& rows, const std::array<std::int64_t, 4>& size) {
  for (const std::int64_t length : size) require(length >= 0, "sizes >= 0", length);
  check_rows(rows, size[1] / 2 + size[1] % 2, "tile_rows of the image");
}

// The passes around the matrix products that are a modulated convolution; float32 vectors, channels-last images.
void bind_layers(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def(
      "finish_products",
      [](std::uintptr_t y, const std::array<std::int64_t, 3>& y_size, const std::array<std::int64_t, 2>& y_rows,
         std::int64_t pad, const std::vector<float>& filter_y, const std::vector<float>& filter_x,
         const std::array<std::int64_t, 2>& rows, std::uintptr_t out, int dtype, const std::array<std::int64_t, 4>& size,
         std::uintptr_t factor, std::uintptr_t noise, std::int64_t noise_stride, std::uintptr_t strength,
         std::uintptr_t bias, double slope, double gain, double clamp, std::uintptr_t next_factor, std::uintptr_t rgb,
         std::uintptr_t rgb_weight, std::int64_t rgb_channels, std::int64_t threads) {
        const auto [y_height, y_width, kernel] = y_size;
        require(y_height >= 0 && y_width >= 0, "y_size >= 0", y_height < 0 ? y_height : y_width);
        require(kernel >= 1, "a kernel >= 1", kernel);
        const std::int64_t taps = static_cast<std::int64_t>(filter_y.size());
        require(filter_x.size() == filter_y.size(), "filters of one length", filter_x.size());
        require(taps >= 1 && taps <= kMaxProductTerms / kernel, "1 to 64 / kernel taps", taps);
        require(pad > -(std::int64_t{1} << 40) && pad < std::int64_t{1} << 40, "|pad| < 2^40", pad);
        check_rows(y_rows, y_height, "y_rows of the input");
        check_rows(rows, size[1], "rows of out");
        if (rows[1] > 0) {  // row r needs input rows i with 2 i + u = r + t - pad, 0 <= u < kernel and 0 <= t < taps
          const std::int64_t first = (rows[0] - pad - kernel + 2) >> 1, end = y_rows[0] + y_rows[1];
          const std::int64_t last = (rows[0] + rows[1] - 1 + taps - 1 - pad) >> 1;
          require(first >= y_rows[0] || y_rows[0] == 0, "y_rows with all that the rows need", y_rows[0]);
          require(last < end || end == y_height, "y_rows with all that the rows need", end);
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
      R"(End a layer with up = 2: sum and filter the products of its stride-2 transposed convolution.

Args:
    y: address of [images, y_rows[1], y_width, kernel, kernel, channels] of dtype: every tap's product with every pixel.
    y_size: (y_height, y_width, kernel) of the convolution's whole input.
    y_rows: (first, count) of the input's rows that y has: at least all that the rows to write need.
    pad: zeros before the first row and column of the transposed convolution's result; negative crops.
    filter_y, filter_x: the separable filter as it is correlated, with its gain; 1 to 64 / kernel taps.
    rows: (first, count) of the rows to write.
    (the others: as of fir_bias_act, without float64).
    )");

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
    out: address of float32 [16, images * tile_rows[1] * ceil(width / 2), channels]; overwritten.
    x: address of float32 [images, height, width, channels].
    style: address of float32 [images, channels], which scales x; 0: nothing does.
    size: (images, height, width, channels).
    tile_rows: (first, count) of the rows of 2x2 tiles to transform, in every image.
    threads: most threads to use, at least 1.
    )");

  m.def(
      "winograd_output",
      [](const std::array<std::uintptr_t, 16>& products, const std::array<std::int64_t, 2>& tile_rows,
         std::uintptr_t out, int dtype,
         const std::array<std::int64_t, 4>& size, std::uintptr_t factor, std::uintptr_t noise,
         std::int64_t noise_stride, std::uintptr_t strength, std::uintptr_t bias, double slope, double gain,
         double clamp, std::uintptr_t next_factor, std::uintptr_t rgb, std::uintptr_t rgb_weight,
         std::int64_t rgb_channels, std::int64_t threads) {
        require(dtype == static_cast<int>(Dtype::kFloat32), "float32", dtype);
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
      R"(End a layer: transform the 16 products of Winograd's F(2x2, 3x3) back.

Args:
    products: 16 addresses of float32 [images * tile_rows[1] * ceil(width / 2), channels].
    tile_rows: (first, count) of the rows of 2x2 tiles that they belong to, in every image; no others are written.
    (the others: as of fir_bias_act, float32 alone).
    )");

  m.def(
      "winograd_weight",
      [](std::uintptr_t out, std::uintptr_t weight, std::int64_t out_channels, std::int64_t in_channels,
         std::int64_t threads) {
        require(out_channels >= 0 && in_channels >= 0, "channels >= 0", out_channels < 0 ? out_channels : in_channels);
        cpu::kernels().winograd_weight({pointer<float>(out), pointer<const float>(weight), out_channels, in_channels},
                                       Cpu::threads(threads));
      },
      py::arg("out"), py::arg("weight"), py::arg("out_channels"), py::arg("in_channels"), py::arg("threads"),
      Unlocked(),
      R"(Write the right factors of the 16 matrix products of Winograd's F(2x2, 3x3).

Args:
    out: address of float32 [16, out_channels, in_channels]; overwritten.
    weight: address of float32 [out_channels, in_channels, 3, 3].
    out_channels, in_channels: sizes; may be 0.
    threads: most threads to use, at least 1.
    )");
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

  m.attr("MAX_TAPS") = kMaxTaps;
  m.attr("MAX_RGB_CHANNELS") = kMaxRgbChannels;
  m.attr("MAX_PRODUCT_TERMS") = kMaxProductTerms;
  m.attr("MAX_PATH_TIMES") = kMaxPathTimes;
  m.attr("RK4_MLP_MAX_DIM") = kMaxRk4Dim;  // of the CUDA and Triton kernels, like the three below
  m.attr("RK4_MLP_DIM_MULTIPLE") = kRk4DimMultiple;
  m.attr("RK4_MLP_MAX_LAYERS") = kMaxRk4Layers;
  m.attr("RK4_MLP_MAX_INTERVALS") = kMaxRk4Intervals;

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
