#include "cpu/mask.h"

#include <algorithm>

#include "cpu/simd.h"

namespace rlhf::cpu {

// In runs whose count fits a byte.
RLHF_CLONES int64_t counted(const uint8_t* mask, int64_t n) {
  constexpr int64_t kLanes = 64, kRun = 255 * kLanes;
  int64_t count = 0;
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t stop = std::min(start + kRun, n);
    uint8_t lanes[kLanes] = {};
    int64_t i = start;
    for (; i + kLanes <= stop; i += kLanes)
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += mask[i + k] != 0;
    for (; i < stop; ++i) count += mask[i] != 0;
    for (const uint8_t lane : lanes) count += lane;
  }
  return count;
}

}  // namespace rlhf::cpu
