// Losses of ranked answers; formulas in rlhf_fast/ops/rewards/ranking_loss.py.
#pragma once
#include <string>

#include "native.h"

namespace rlhf::cpu {

struct RankingLoss {
  const void* rewards;
  DType dtype;
  const int64_t* ranks;
  const int64_t *order, *offsets;  // group g is at order[offsets[g]] and on; or null, and groups are consecutive
  int64_t group_size, groups;
  // Numbers are double for double rewards, else float.
  const void* denominator;           // one number, or null for the groups
  void *loss, *accuracy, *gradient;  // one number each, and (answers,)
};

// Throws std::invalid_argument for an unknown variant.
void ranking_loss(const std::string& variant, const RankingLoss& op, int threads);

}  // namespace rlhf::cpu
