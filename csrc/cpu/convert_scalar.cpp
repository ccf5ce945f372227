#include "convert_rows.h"

namespace sgld {

const Converts converts_scalar = convert_table<ScalarVec>;

}  // namespace sgld
