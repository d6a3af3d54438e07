// Python bindings of the CUDA kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace spigan {

void bind_cuda(pybind11::module_& m);

}  // namespace spigan
