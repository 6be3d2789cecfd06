// Selective log-softmax over rows of logits, forward and backward, on the CPU.
#pragma once
#include "native.h"

namespace rlhf::cpu {

struct TokenLogprobs {
  const void* logits;
  DType dtype;
  Rows rows;
  int64_t vocabulary;
  const int64_t* targets;  // (rows)
  const uint8_t* mask;     // (rows) or null; rows with 0 are never read
  double temperature;
  bool want_entropy;
  // (rows), float, or double where the logits are double
  void *logprobs, *entropy, *row_max, *row_logsum;
};

// Fills logprobs, entropy, row_max, row_logsum. Where `gradient` is not null it also writes d logprob / d logits
// of every row there (same type and strides as the logits, which it may overwrite).
// A row whose target is outside [0, vocabulary) is treated as masked: nothing out of bounds is read.
void token_logprobs_forward(const TokenLogprobs& op, void* gradient, int threads);

// gradient = grad_logprobs * d logprob / d logits + grad_entropy * d entropy / d logits; each upstream may be null.
void token_logprobs_backward(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy,
                             void* gradient, Rows gradient_rows, int threads);

}  // namespace rlhf::cpu
