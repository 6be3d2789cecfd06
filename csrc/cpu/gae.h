// Returns and advantages by a backward scan over time, on the CPU.
#pragma once
#include "native.h"

namespace rlhf::cpu {

struct Gae {
  const void* rewards;  // steps of sequence i: padded from i * reward_stride on, packed from cu_seqlens[i] on
  const void* values;   // null: discounted returns, as if every value were 0 and lam 1
  DType dtype;
  int64_t sequences, time, reward_stride, value_stride;  // time: steps of a padded sequence, or of the packed whole
  const uint8_t* mask;                                   // (sequences, time) or (time), or null
  const int64_t* cu_seqlens;                             // (sequences + 1), or null for padded
  const void* bootstrap;                                 // (sequences) or null
  double gamma, lam;
  // (sequences, time) or (time): float, or double where the rewards are double; advantages null without values
  void *advantages, *returns;
};

// Returns the first index at which cu_seqlens is not non-decreasing from 0 up to at most `time`, or -1.
int64_t gae(const Gae& op, int threads);

}  // namespace rlhf::cpu
