// What this library was built with and which CPU kernels it runs, as seen from Python.
#include "ops.h"
#include "sgld/isa.h"

namespace sgld {

std::string cpu_isa() { return isa_name(active_amx() ? Isa::amx_bf16 : active_isa()); }

void cap_cpu_isa(std::string level) { cap_isa(isa_from_name(level)); }

bool has_cuda() {
#if defined(SGLD_CUDA)
  return true;
#else
  return false;
#endif
}

}  // namespace sgld
