// Returns and advantages by a backward scan over time, on the CPU.
#pragma once
#include "native.h"

namespace rlhf::cpu {

// Token sequences, padded or packed.
struct Sequences {
  int64_t count, time;        // time: steps of a padded sequence, or of the packed whole
  const uint8_t* mask;        // (count, time) or (time), or null
  const int64_t* cu_seqlens;  // (count + 1), or null for padded
  const void* bootstrap;      // (count) in the type of the outputs, or null
  RLHF_HD int64_t begin(int64_t i) const { return cu_seqlens ? cu_seqlens[i] : i * time; }
  RLHF_HD int64_t length(int64_t i) const { return cu_seqlens ? cu_seqlens[i + 1] - cu_seqlens[i] : time; }
  // Where an input's steps of sequence i begin, with rows `stride` elements apart where padded.
  RLHF_HD int64_t input(int64_t i, int64_t stride) const { return cu_seqlens ? cu_seqlens[i] : i * stride; }
};

// Returns the first index at which cu_seqlens is not non-decreasing from 0 up to at most `time`, or -1.
inline int64_t misfit(const Sequences& sequences) {
  for (int64_t i = 0; sequences.cu_seqlens && i <= sequences.count; ++i) {
    const int64_t low = i == 0 ? 0 : sequences.cu_seqlens[i - 1], high = i == 0 ? 0 : sequences.time;
    if (sequences.cu_seqlens[i] < low || sequences.cu_seqlens[i] > high) return i;
  }
  return -1;
}

struct Gae {
  const void* rewards;
  const void* values;  // null: discounted returns, as if every value were 0 and lam 1
  DType dtype;
  int64_t reward_stride, value_stride;
  Sequences sequences;
  double gamma, lam, value_lam;
  const double* lams;  // null, or (2, count): lam and value_lam of every sequence
  bool decoupled;      // the returns have a lambda of their own, value_lam
  // (count, time) or (time): float, or double where the rewards are double; advantages null without values
  void *advantages, *returns;
  RLHF_HD double lam_of(int64_t i) const { return !values ? 1 : lams ? lams[i] : lam; }
  RLHF_HD double value_lam_of(int64_t i) const { return lams ? lams[sequences.count + i] : value_lam; }
};

int64_t gae(const Gae& op, int threads);

}  // namespace rlhf::cpu
