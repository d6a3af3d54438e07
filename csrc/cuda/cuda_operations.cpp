// Python bindings of the CUDA kernels: the functions of csrc/operations.h, which take device addresses and a stream
// here.
#include "cuda_operations.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../operations.h"
#include "cuda_kernels.h"

namespace spigan {
namespace {

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(describe(error));
}

struct Cuda {
  static constexpr const char* kContext = "stream";
  static constexpr const char* kContextDoc =
      "stream: cudaStream_t of the current device as an integer. All arrays must be on that device. The call only "
      "enqueues work and raises RuntimeError if that fails.";

  static cudaStream_t stream(std::int64_t context) { return reinterpret_cast<cudaStream_t>(context); }
  static void philox_normal(const PhiloxNormal& args, std::int64_t context) {
    check(cuda::philox_normal(args, stream(context)));
  }
  static void path_interpolate(const PathInterpolate& args, std::int64_t context) {
    check(cuda::path_interpolate(args, stream(context)));
  }
  static void fir_bias_act(const FirBiasAct& args, std::int64_t context) {
    check(cuda::fir_bias_act(args, stream(context)));
  }
  static void bias_act_backward(const BiasActBackward& args, std::int64_t context) {
    check(cuda::bias_act_backward(args, stream(context)));
  }
  static void rk4_mlp(const Rk4Mlp& args, std::int64_t context) { check(cuda::rk4_mlp(args, stream(context))); }
};

cuda::Rk4Plan plan_of(int dtype, std::int64_t batch, std::int64_t dim, std::int64_t layers) {
  cuda::Rk4Plan plan;
  check(cuda::plan_rk4_mlp(dtype_of(dtype, false, false), batch, dim, layers, &plan));
  return plan;
}

}  // namespace

void bind_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  bind_operations<Cuda>(m);

  m.def(
      "probe",
      [] {
        const cuda::Probe found = cuda::probe();
        py::dict result;
        const bool runs = found.error == cudaSuccess;
        result["error"] = runs ? py::object(py::none()) : py::object(py::str(describe(found.error)));
        result["driver"] = found.driver;
        result["runtime"] = found.runtime;
        return result;
      },
      R"(Load a kernel on the current device, without launching it.

Returns:
    Dictionary of error (str: why kernels cannot run, or None), driver (int: the latest version of CUDA that the driver
    supports, for example 12040 for 12.4; 0 without a driver) and runtime (int: the version of this build).)");

  m.def(
      "rk4_mlp_workspace_bytes",
      [](int dtype, std::int64_t batch, std::int64_t dim, std::int64_t layers) {
        return plan_of(dtype, batch, dim, layers).workspace_bytes;
      },
      py::arg("dtype"), py::arg("batch"), py::arg("dim"), py::arg("layers"),
      R"(Return how many bytes of workspace rk4_mlp needs on the current device; often 0.

The workspace need not be initialised. Its address must be a multiple of 16, and no other call may use it at the same
time.)");

  m.def(
      "rk4_mlp_plan",
      [](int dtype, std::int64_t batch, std::int64_t dim, std::int64_t layers) {
        const cuda::Rk4Plan plan = plan_of(dtype, batch, dim, layers);
        py::dict result;
        result["exchange"] = plan.cluster ? "cluster" : "workspace";
        result["weights"] = plan.weights_in_shared ? "shared" : "global";
        result["matrix"] = plan.matrix;
        result["members"] = plan.members;
        result["groups"] = plan.groups;
        result["rows"] = plan.rows;
        result["threads"] = plan.threads;
        result["shared_bytes"] = plan.shared_bytes;
        result["workspace_bytes"] = plan.workspace_bytes;
        return result;
      },
      py::arg("dtype"), py::arg("batch"), py::arg("dim"), py::arg("layers"),
      R"(Return how rk4_mlp divides its work on the current device, for tests and benchmarks.

Returns:
    Dictionary of exchange ("cluster" or "workspace"), weights ("shared" or "global"), matrix
    (bool: products on the matrix unit), members (blocks per group),
    groups, rows (of the batch that a group integrates at a time), threads (per block), shared_bytes (per block) and
    workspace_bytes.)");
}

}  // namespace spigan
