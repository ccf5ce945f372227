#include "convert_rows.h"

namespace sgld {

const Converts converts_avx512 = convert_table<Avx512<false>>;

}  // namespace sgld
