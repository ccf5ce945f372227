#include "memory_bound_table.h"

namespace sgld {

const MemoryBoundRows memory_bound_avx512_bf16 = memory_bound_table<Avx512<true>>;

}  // namespace sgld
