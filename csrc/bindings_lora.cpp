// Schemas and registrations of the LoRA ops, nothing else. Adapters are listed matrix after matrix; `counts` says how
// many each matrix has.
#include <torch/csrc/stable/library.h>

#include "lora.h"

STABLE_TORCH_LIBRARY_FRAGMENT(sgld, m) {
  m.def("lora_cpu_units() -> str");
  m.def(
      "lora_merge_(Tensor(a!)[] weights, Tensor[] downs, Tensor[] ups, float[] scales, "
      "int[] starts, int[] counts) -> (Tensor[], Tensor[], Tensor[], int[])");
  m.def(
      "lora_unmerge_(Tensor(a!)[] weights, Tensor[] downs, Tensor[] ups, float[] scales, "
      "int[] starts, int[] counts, Tensor[] codes, Tensor[] escapes, Tensor[] ends) -> int[]");
  m.def(
      "lora_apply_(Tensor x, Tensor(a!) y, Tensor? index, Tensor[] downs, Tensor[] ups, "
      "float[] scales, int[] starts, int[] counts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgld, CompositeExplicitAutograd, m) {
  m.impl("lora_cpu_units", TORCH_BOX(&sgld::lora_cpu_units));
}

STABLE_TORCH_LIBRARY_IMPL(sgld, CPU, m) {
  m.impl("lora_merge_", TORCH_BOX(&sgld::lora_merge_cpu));
  m.impl("lora_unmerge_", TORCH_BOX(&sgld::lora_unmerge_cpu));
  m.impl("lora_apply_", TORCH_BOX(&sgld::lora_apply_cpu));
}
