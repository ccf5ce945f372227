#include "norm_modulate_rows.h"

namespace sgld {

void norm_modulate_rows_scalar(const NormModulate& p, int64_t begin, int64_t end, float* scratch) {
  NormModulateKernel<ScalarVec>::run(p, begin, end, scratch);
}

}  // namespace sgld
