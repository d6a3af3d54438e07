// The kernels of one instruction set.
#include "cpu_kernels.h"

#define SPIGAN_STRING2(x) #x
#define SPIGAN_STRING(x) SPIGAN_STRING2(x)

namespace spigan::cpu::SPIGAN_ISA {

extern const Kernels table;
const Kernels table = {SPIGAN_STRING(SPIGAN_ISA), philox_normal, path_interpolate, rk4_mlp,
                       fir_bias_act, bias_act_backward, finish_products,
                       winograd_input, winograd_weight, winograd_output};

}  // namespace spigan::cpu::SPIGAN_ISA
