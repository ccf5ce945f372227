#include "norm_modulate_rows.h"

namespace sgld {

void norm_modulate_rows_avx512_bf16(const NormModulate& p, int64_t begin, int64_t end,
                                    float* scratch) {
  NormModulateKernel<Avx512<true>>::run(p, begin, end, scratch);
}

}  // namespace sgld
