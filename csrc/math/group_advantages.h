// What a reward's distance from its group's mean is divided by, one function per kind; see
// rlhf_fast/ops/group_advantages.py.
#pragma once
#include <cmath>

#include "math/moments.h"

namespace rlhf {

template <typename T> RLHF_HD T grpo_divisor(const Moments<T>& group, T eps) { return std::sqrt(group.variance()) + eps; }
template <typename T> RLHF_HD T dr_grpo_divisor(const Moments<T>&, T) { return T(1); }
template <typename T> RLHF_HD T rloo_divisor(const Moments<T>& group, T) {
  return (group.count > 1 ? group.count - 1 : T(1)) / group.count;
}

}  // namespace rlhf
