// Selective log-softmax over rows of logits, forward and backward, on the CPU.
#pragma once
#include "math/token_logprobs.h"
#include "native.h"

namespace rlhf::cpu {

struct TokenLogprobs {
  const void* logits;
  DType dtype;
  Rows rows;
  int64_t vocabulary;
  const int64_t* targets;  // (rows, targets_per_row)
  int64_t targets_per_row;
  const uint8_t* mask;  // (rows) or null; rows with 0 are never read
  Transform transform;
  // Of float, or double where the logits are double; (rows, targets_per_row), then (rows) each.
  void *logprobs, *entropy, *row_max, *row_logsum, *sum_p_squared;  // entropy and sum_p_squared may be null
};

// Fills the statistics. Where `gradient` is not null it also writes d (sum of a row's logprobs) / d logits there (same
// type and strides as the logits, which it may overwrite). A target outside [0, vocabulary) is never read: its logprob
// is NaN, the other statistics are complete, and the gradient is that of the log-sum-exp alone.
void token_logprobs_forward(const TokenLogprobs& op, void* gradient, int threads);

// gradient = grad_logprobs * d logprob / d logits + grad_entropy * d entropy / d logits + grad_lse * d lse / d logits;
// each upstream may be null.
void token_logprobs_backward(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy,
                             const void* grad_lse, void* gradient, Rows gradient_rows, int threads);

}  // namespace rlhf::cpu
