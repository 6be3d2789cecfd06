// Masks: one byte per element, not 0 where it counts.
#pragma once
#include <cstdint>

namespace rlhf::cpu {

// How many of n bytes are not 0.
int64_t counted(const uint8_t* mask, int64_t n);

// What a loss of n elements divides by: the number given, or where that is null the count of the mask (null: n). Where it
// is 0, so is every sum, and it becomes 1.
template <typename C> double denominator_of(const void* given, const uint8_t* mask, int64_t n) {
  const double denominator = given ? double(*static_cast<const C*>(given)) : double(mask ? counted(mask, n) : n);
  return denominator == 0 ? 1 : denominator;
}

}  // namespace rlhf::cpu
