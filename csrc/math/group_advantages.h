// What a reward's distance from its group's mean is divided by, one function per kind; see
// rlhf_fast/ops/advantages/group_advantages.py.
#pragma once
#include <cmath>
#include <limits>

#include "math/moments.h"

namespace rlhf {

// `parameter` is the kind's own: eps, or k.
template <typename T> RLHF_HD T grpo_divisor(const Moments<T>& group, T eps) { return std::sqrt(group.variance()) + eps; }
template <typename T> RLHF_HD T unit_divisor(const Moments<T>&, T) { return T(1); }
template <typename T> RLHF_HD T rloo_divisor(const Moments<T>& group, T) {
  return (group.count > 1 ? group.count - 1 : T(1)) / group.count;
}

// Rewards 0 and 1. `none` of k drawn answers is right with probability prod_j (wrong - j) / (n - j); `some` is summed
// up beside it, since 1 - none would cancel.
template <typename T> RLHF_HD T pass_at_k_divisor(const Moments<T>& group, T k) {
  const T right = std::round(group.count * group.mean), wrong = group.count - right;
  T none = 1, some = 0;
  for (T j = 0; j < k && none > 0; ++j) {
    some += none * right / (group.count - j);
    none *= (wrong - j) / (group.count - j);
  }
  return none > 0 ? std::sqrt(some / none) * wrong / group.count : std::numeric_limits<T>::infinity();
}

}  // namespace rlhf
