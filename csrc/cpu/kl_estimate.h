// Per-token KL estimates with their derivatives; see rlhf_fast/ops/kl_estimate.py.
#pragma once
#include <string>

#include "cpu/plane.h"

namespace rlhf::cpu {

struct KlEstimate {
  Plane logprobs, ref_logprobs;
  int64_t rows, columns;
  bool is_double;            // whether the results are double or float
  void *value, *derivative;  // (rows, columns); the derivative is by logprobs
};

// Throws std::invalid_argument for an unknown estimator.
void kl_estimate(const std::string& estimator, const KlEstimate& op, int threads);

}  // namespace rlhf::cpu
