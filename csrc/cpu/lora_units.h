#pragma once

#include "sgld/lora.h"

namespace sgld {

struct LoraUnits {
  const char* name;
  LoraKernels kernels;
};

// What merges under the ISA that is active now.
LoraUnits lora_units();

}  // namespace sgld
