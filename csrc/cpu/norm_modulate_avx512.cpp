#include "norm_modulate_rows.h"

namespace sgld {

void norm_modulate_rows_avx512(const NormModulate& p, int64_t begin, int64_t end, float* scratch) {
  NormModulateKernel<Avx512<false>>::run(p, begin, end, scratch);
}

}  // namespace sgld
