// V-trace targets and advantages by a backward scan over time, on the CPU.
#pragma once
#include "cpu/gae.h"

namespace rlhf::cpu {

struct VtraceCall {
  const void* inputs[4];  // rewards, values, logprobs, sampler_logprobs
  DType dtype;
  int64_t strides[4];  // of their rows where padded
  Sequences sequences;
  double gamma, lam, rho_clip, c_clip;
  void *advantages, *targets;  // (count, time) or (time): float, or double where the inputs are double
};

// Returns the first index at which cu_seqlens does not fit, or -1.
int64_t vtrace(const VtraceCall& op, int threads);

}  // namespace rlhf::cpu
