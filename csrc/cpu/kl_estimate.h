// Per-token KL estimates with their derivatives; see rlhf_fast/ops/tokens/kl_estimate.py.
#pragma once
#include <map>
#include <string>

#include "cpu/plane.h"

namespace rlhf::cpu {

enum class KlVariant { k1, k2, k3 };
inline const std::map<std::string, KlVariant> kKlVariants = {
    {"k1", KlVariant::k1}, {"k2", KlVariant::k2}, {"k3", KlVariant::k3}};

struct KlEstimate {
  Plane logprobs, ref_logprobs, old_logprobs;  // the last one without data: every weight is 1
  int64_t rows, columns;
  double log_ratio_clip, value_clip, weight_clip;  // infinite where nothing is clipped
  bool is_double;                                  // whether the results are double or float
  void *value, *by_logprob, *by_ref;  // (rows, columns): the estimates and their derivatives, which may be null
};

// `gradient` names the estimator whose derivative is taken, "own" that of the value.
// Throws std::invalid_argument for an unknown estimator.
void kl_estimate(const std::string& variant, const std::string& gradient, const KlEstimate& op, int threads);

}  // namespace rlhf::cpu
