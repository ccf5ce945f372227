#include "norm_modulate_rows.h"

namespace sgld {

void norm_modulate_rows_avx2(const NormModulate& p, int64_t begin, int64_t end, float* scratch) {
  NormModulateKernel<Avx2Vec>::run(p, begin, end, scratch);
}

}  // namespace sgld
