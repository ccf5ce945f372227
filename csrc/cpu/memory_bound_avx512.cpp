#include "memory_bound_table.h"

namespace sgld {

const MemoryBoundRows memory_bound_avx512 = memory_bound_table<Avx512<false>>;

}  // namespace sgld
