// One token per row of logits, sampled from the truncated distribution, on the CPU.
#pragma once
#include "math/token_logprobs.h"
#include "native.h"

namespace rlhf::cpu {

struct SampleTokens {
  const void* logits;
  DType dtype;
  int64_t rows, vocabulary, row_stride;
  Transform transform;
  const int64_t* row_ids;  // (rows): what a row's draw depends on, with `seed` and `step`
  const int64_t *seed, *step;
  int64_t top_k;  // vocabulary for none
  double top_p, min_p;
  int64_t* ids;                   // (rows)
  void *logprobs, *full_logprobs;  // (rows) of float, or double where the logits are double
};

void sample_tokens(const SampleTokens& op, int threads);

}  // namespace rlhf::cpu
