// Selects the instruction set that the kernels run on. The CPU is queried once.
#include <cstring>

#include "cpu_kernels.h"

namespace spigan::cpu {

namespace portable {
extern const Kernels table;
}
#if defined(SPIGAN_X86)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512bf16 {
extern const Kernels table;
}
#endif

namespace {

struct Available {
  const Kernels* tables[4];
  const char* names[5] = {};
  int count = 0;

  void add(const Kernels& table) {
    tables[count] = &table;
    names[count++] = table.isa;
  }

  Available() {
#if defined(SPIGAN_X86)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) add(avx512bf16::table);
    if (avx512) add(avx512::table);
    if (fma) add(avx2::table);
#endif
    add(portable::table);
  }
};

const Available& available() {
  static const Available instance;
  return instance;
}

const Kernels* selected = nullptr;

}  // namespace

const Kernels& kernels() { return selected != nullptr ? *selected : *available().tables[0]; }

const char* const* available_isas() { return available().names; }

bool select_isa(const char* name) {
  selected = nullptr;
  if (name == nullptr) return true;
  for (int i = 0; i < available().count; ++i) {
    if (std::strcmp(available().names[i], name) == 0) selected = available().tables[i];
  }
  return selected != nullptr;
}

}  // namespace spigan::cpu
