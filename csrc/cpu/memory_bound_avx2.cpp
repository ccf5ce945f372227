#include "memory_bound_table.h"

namespace sgld {

const MemoryBoundRows memory_bound_avx2 = memory_bound_table<Avx2Vec>;

}  // namespace sgld
