// Divergence of rows of logits from rows of reference logits, forward and backward, on the CPU.
#pragma once
#include <string>

#include "math/token_logprobs.h"
#include "native.h"

namespace rlhf::cpu {

struct TokenKl {
  const void *logits, *ref_logits;
  DType dtype;  // of both
  Rows rows, ref_rows;
  int64_t vocabulary;
  const uint8_t* mask;  // (rows) or null; rows with 0 are never read
  Transform transform;
  double js_weight;
  // (rows), float, or double where the logits are double: log of the sum of exp(z - max z), given; what a forward
  // pass fills and a backward pass reads
  const void *logsum, *ref_logsum;
  void *kl, *mean;
};

// Both throw std::invalid_argument for an unknown divergence.
void token_kl_forward(const std::string& divergence, const TokenKl& op, int threads);

// gradient = grad_kl * d kl / d logits; it may overwrite the logits or the reference's.
void token_kl_backward(const std::string& divergence, const TokenKl& op, const void* grad_kl, void* gradient,
                       Rows gradient_rows, int threads);

}  // namespace rlhf::cpu
