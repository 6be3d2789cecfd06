// Per-token rewards out of sequence scores and KL estimates, on the CPU.
#pragma once
#include "native.h"

namespace rlhf::cpu {

struct ShapedRewards {
  const void* scores;  // (batch), float, or double where kl is double
  const void* kl;      // (batch, time), rows `kl_stride` elements apart
  DType dtype;         // of kl
  int64_t batch, time, kl_stride;
  const uint8_t* mask;  // (batch, time)
  double kl_coef, clip;  // clip: infinity for none
  void* rewards;         // (batch, time), float, or double where kl is double
};

void shaped_rewards(const ShapedRewards& op, int threads);

}  // namespace rlhf::cpu
