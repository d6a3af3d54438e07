// The Python module _cuda_on_cpu: the functions of spigan._C.cuda, which take addresses of ordinary memory here.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "cuda/cuda_operations.h"
#include "cuda/box_muller.h"
#include "cuda_runtime.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda_on_cpu, m) {
  m.doc() = "The CUDA kernels of spigan, executed on threads of the operating system. For tests.";
  spigan::bind_cuda(m);
  m.def(
      "box_muller",
      [](std::uint32_t word0, std::uint32_t word1) {
        float n0, n1;
        spigan::cuda::approximate_box_muller(word0, word1, n0, n1);
        return std::tuple<float, float>(n0, n1);
      },
      py::arg("word0"), py::arg("word1"), "Return the two normals that the kernels make of two words.");
  m.def(
      "set_device",
      [](int major, int processors, int threads, int shared_bytes, int largest_cluster, int driver, bool matrix_only) {
        cuda_on_cpu::set_device({major, processors, threads, shared_bytes, largest_cluster, driver, matrix_only});
      },
      py::kw_only(), py::arg("major"), py::arg("processors"), py::arg("threads"), py::arg("shared_bytes"),
      py::arg("largest_cluster"), py::arg("driver") = 13000, py::arg("matrix_only") = false,
      "Set the device that the kernels see: major compute capability, number of multiprocessors, maximum threads and "
      "bytes of shared memory per block, maximum blocks per cluster, the latest CUDA that the driver supports, whether "
      "rk4_mlp uses only the matrix unit.");
}
