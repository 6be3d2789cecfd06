// Masks: one byte per element, not 0 where it counts.
#pragma once
#include <cstdint>

namespace rlhf::cpu {

// How many of n bytes are not 0.
int64_t counted(const uint8_t* mask, int64_t n);

}  // namespace rlhf::cpu
