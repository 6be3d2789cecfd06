// Per-token KL estimates with their derivatives; see rlhf_fast/ops/tokens/kl_estimate.py.
#pragma once
#include <string>

#include "cpu/plane.h"

namespace rlhf::cpu {

struct KlEstimate {
  Plane logprobs, ref_logprobs, old_logprobs;  // the last one without data: every weight is 1
  int64_t rows, columns;
  double log_ratio_clip, value_clip, weight_clip;
  bool is_double;                    // whether the results are double or float
  void *value, *by_logprob, *by_ref;  // (rows, columns): the estimates and their derivatives, which may be null
};

// `gradient` names the estimator whose derivative is taken, "own" that of the value.
// Throws std::invalid_argument for an unknown estimator.
void kl_estimate(const std::string& estimator, const std::string& gradient, const KlEstimate& op, int threads);

}  // namespace rlhf::cpu
