// Schema and registration of the reader of weights, nothing else.
#include <torch/csrc/stable/library.h>

#include "weights_ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(sgld, m) {
  m.def(
      "read_weights(Tensor(a!)[] targets, int[] buffered, int[] direct, int[] files, int[] begins, "
      "int[] numbers, int threads) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(sgld, CPU, m) {
  m.impl("read_weights", TORCH_BOX(&sgld::read_weights_cpu));
}
