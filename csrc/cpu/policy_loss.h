// Policy losses: loss, metrics and gradient coefficients in one pass; rlhf_fast/ops/policy/policy_loss.py.
#pragma once
#include <array>
#include <string>

#include "cpu/plane.h"

namespace rlhf::cpu {

struct PolicyLoss {
  // (rows, columns); data is null for the optional ones that are not there
  Plane logprobs, old_logprobs, advantages, ref_logprobs, sampler_logprobs, entropy, weights;
  const uint8_t* flags;       // (rows, columns), 0 where a token does not count; null: every token counts
  bool marks;                 // whether the flags have bits: 2 dropped, 4 selected
  const int64_t* cu_seqlens;  // (sequences + 1,) of one row; null: the rows are the sequences
  const void* denominator;    // one number, or null for the tokens that count (at least 1)
  int64_t rows, columns, sequences;
  std::array<double, 5> parameters;  // of the loss, see math/policy_losses.h
  int estimator;                     // of the KL: 1, 2, 3
  bool unbiased;                     // its gradient is that of the KL itself
  int level;                         // of the correction: 0 token, 1 sequence, 2 geometric
  bool reject;                       // weights outside the bounds become 0 instead of the bound
  bool needs_sequences;              // the loss is made from sums over sequences
  bool folds_correction;             // the correction is in the sum of the log-ratios instead of a weight
  double kl_coef, entropy_coef, correction_low, correction_high, off_policy_max_kl;
  bool is_double;                    // whether `denominator` and everything below is double or float
  void *loss, *metrics;              // one number; 13, in the order of METRICS
  void *coefficient, *entropy_coefficient;  // (rows, columns): d loss / d logprob; d loss / d entropy, or null
  double tokens = 1;                        // the denominator, set by policy_loss itself
};

// Throws std::invalid_argument for an unknown loss function.
void policy_loss(const std::string& function, const PolicyLoss& op, int threads);

}  // namespace rlhf::cpu
