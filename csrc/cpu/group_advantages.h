// Group-relative advantages on the CPU.
#pragma once
#include "native.h"

namespace rlhf::cpu {

struct GroupAdvantages {
  const void* rewards;  // (count), contiguous
  DType dtype;
  const void* weights;  // (count) in the type of the advantages: the mean is weighted by them; null for 1
  int64_t groups;
  int64_t group_size;      // of every group, where offsets is null
  const int64_t* order;    // group g is rewards[order[offsets[g]]] ... rewards[order[offsets[g + 1] - 1]];
  const int64_t* offsets;  // (groups + 1). Both null: groups are consecutive
  int divisor;             // 0 unit, 1 grpo, 2 rloo, 3 pass_at_k
  double parameter;        // of the divisor
  void* advantages;        // (count), float, or double where the rewards are double
};

void group_advantages(const GroupAdvantages& op, int threads);

}  // namespace rlhf::cpu
