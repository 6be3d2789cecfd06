// Group-relative advantages on the CPU.
#pragma once
#include "native.h"

namespace rlhf::cpu {

struct GroupAdvantages {
  const void* rewards;  // (count), contiguous
  DType dtype;
  int64_t groups;
  int64_t group_size;      // of every group, where offsets is null
  const int64_t* order;    // group g is rewards[order[offsets[g]]] ... rewards[order[offsets[g + 1] - 1]];
  const int64_t* offsets;  // (groups + 1). Both null: groups are consecutive
  int kind;                // 0 grpo, 1 dr_grpo, 2 rloo
  double eps;
  void* advantages;  // (count), float, or double where the rewards are double
};

void group_advantages(const GroupAdvantages& op, int threads);

}  // namespace rlhf::cpu
