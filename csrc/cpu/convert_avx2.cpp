#include "convert_rows.h"

namespace sgld {

const Converts converts_avx2 = convert_table<Avx2Vec>;

}  // namespace sgld
