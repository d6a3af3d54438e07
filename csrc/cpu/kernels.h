// The CPU kernels: what they take, and the choice of the instruction set they run on.
//
// Every source of this folder but dispatch.cpp is compiled once for each instruction set (CMakeLists.txt) with SPIGAN_ISA
// set to its name, which is also a namespace. Such a source uses no inline function of the C++ library: the linker would
// keep one of the copies for all, and an AVX-512 one may not run elsewhere.
#pragma once

#include "../common/arguments.h"

namespace spigan::cpu {

// `threads`: most threads to use, at least 1. It changes no bit of a result.
struct Kernels {
  const char* isa;
  void (*philox_normal)(const PhiloxNormal&, int threads);
  void (*path_interpolate)(const PathInterpolate&, int threads);
  bool (*rk4_mlp)(const Rk4Mlp&, int threads);  // false: no memory
};

#if defined(SPIGAN_ISA)
namespace SPIGAN_ISA {
void philox_normal(const PhiloxNormal& args, int threads);
void path_interpolate(const PathInterpolate& args, int threads);
bool rk4_mlp(const Rk4Mlp& args, int threads);
}  // namespace SPIGAN_ISA
#endif

// Kernels for the best instruction set of this CPU, or for the one that select_isa named.
const Kernels& kernels();

// Null-terminated names of the instruction sets that were built and that this CPU has, best first.
const char* const* available_isas();

// Use `name` of available_isas(), or the best one for null; false if there is no such one. For tests, not thread-safe.
bool select_isa(const char* name);

}  // namespace spigan::cpu
