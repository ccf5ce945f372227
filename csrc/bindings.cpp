// Schemas and registrations, nothing else.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(sgld, m) {
  m.def("cpu_isa() -> str");
  m.def("cap_cpu_isa(str level) -> ()");
  m.def("has_cuda() -> bool");
  m.def(
      "norm_modulate(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, "
      "float eps, bool rms, ScalarType out_dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sgld, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&sgld::cpu_isa));
  m.impl("cap_cpu_isa", TORCH_BOX(&sgld::cap_cpu_isa));
  m.impl("has_cuda", TORCH_BOX(&sgld::has_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(sgld, CPU, m) {
  m.impl("norm_modulate", TORCH_BOX(&sgld::norm_modulate_cpu));
}

#if defined(SGLD_CUDA)
STABLE_TORCH_LIBRARY_IMPL(sgld, CUDA, m) {
  m.impl("norm_modulate", TORCH_BOX(&sgld::norm_modulate_cuda));
}
#endif
