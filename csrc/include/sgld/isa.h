// Which CPU kernels run: the best level the machine has, capped by the user.
#pragma once

#include <string>

namespace sgld {

// amx_bf16 adds the tile unit to avx512_bf16: few kernels have code for it.
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4 };

// The vectors that the machine and this build have: at most avx512_bf16.
Isa machine_isa();
// What the kernels use now: vectors, and whether the tile unit.
Isa active_isa();
bool active_amx();
// Use at most this level from now on.
// Whether matrices should be multiplied by dot products of bf16 pairs. Intel's run at half the rate of fp32 multiply-adds
// (docs/measured.md), so there only the cap at exactly this level asks for them.
bool active_pairs();

void cap_isa(Isa level);

const char* isa_name(Isa isa);
// Throws std::invalid_argument for a name that is none.
Isa isa_from_name(const std::string& name);

}  // namespace sgld
