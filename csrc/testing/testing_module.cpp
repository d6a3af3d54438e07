// Python module _cuda_on_cpu: the functions of spigan._C.cuda on addresses of ordinary memory.
#include <pybind11/pybind11.h>

#include "cuda/cuda_operations.h"
#include "cuda_runtime.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda_on_cpu, m) {
  m.doc() = "The CUDA kernels of spigan, executed by threads of the operating system; for tests.";
  spigan::bind_cuda(m);
  m.def(
      "set_device",
      [](int major, int processors, int threads, int shared_bytes, int largest_cluster) {
        cuda_on_cpu::set_device({major, processors, threads, shared_bytes, largest_cluster});
      },
      py::kw_only(), py::arg("major"), py::arg("processors"), py::arg("threads"), py::arg("shared_bytes"),
      py::arg("largest_cluster"),
      "Say what device the kernels run on: the compute capability's first number, multiprocessors, most threads and "
      "bytes of shared memory of a block, most blocks of a cluster.");
}
