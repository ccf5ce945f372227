#include "memory_bound_table.h"

namespace sgld {

const MemoryBoundRows memory_bound_scalar = memory_bound_table<ScalarVec>;

}  // namespace sgld
