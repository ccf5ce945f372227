// Which CPU kernels run: the best level the machine has, capped by the user.
#pragma once

#include <string>

namespace sgld {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// What the machine and this build have.
Isa machine_isa();
// What the kernels use now.
Isa active_isa();
// Use at most this level from now on.
void cap_isa(Isa level);

const char* isa_name(Isa isa);
// Throws std::invalid_argument for a name that is none.
Isa isa_from_name(const std::string& name);

}  // namespace sgld
