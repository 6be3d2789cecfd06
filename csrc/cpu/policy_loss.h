// Policy losses: loss, metrics and gradient coefficients in one pass; rlhf_fast/ops/policy/policy_loss.py.
#pragma once
#include <string>

#include "cpu/plane.h"
#include "math/policy_losses.h"

namespace rlhf::cpu {

// Of an objective, by the names of Numbers in rlhf_fast/ops/policy/policy_loss.py.
struct PolicyNumbers : Numbers<double> {
  std::string function, kl_variant, correction_level, correction_mode;
  bool needs_sequences;  // the loss is made from sums over sequences
  bool marks_tokens;     // the flags have bits: 2 dropped, 4 selected
  bool kl_unbiased;      // the gradient of the estimate is that of the KL itself
};

struct PolicyLoss {
  // (rows, columns); data is null for the optional ones that are not there
  Plane logprobs, old_logprobs, advantages, ref_logprobs, sampler_logprobs, entropy, weights;
  const uint8_t* flags;       // (rows, columns), 0 where a token does not count; null: every token counts
  const int64_t* cu_seqlens;  // (sequences + 1,) of one row; null: the rows are the sequences
  const void* denominator;    // one number, or null for the tokens that count (at least 1)
  int64_t rows, columns, sequences;
  PolicyNumbers numbers;
  bool is_double;                           // whether `denominator` and everything below is double or float
  void *loss, *metrics;                     // one number; 13, in the order of METRICS
  void *coefficient, *entropy_coefficient;  // (rows, columns): d loss / d logprob; d loss / d entropy, or null
};

// Throws std::invalid_argument for an unknown loss function or choice.
void policy_loss(const PolicyLoss& op, int threads);

}  // namespace rlhf::cpu
