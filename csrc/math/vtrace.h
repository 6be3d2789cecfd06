// One step of V-trace; formula in rlhf_fast/ops/advantages/vtrace.py.
#pragma once
#include <cmath>

#include "math/gae.h"

namespace rlhf {

template <typename T> struct Vtrace {
  T gamma, lam, rho_clip, c_clip;
  // Truncated importance weight of the TD error, and the scale of what follows; NaN stays NaN.
  RLHF_HD T rho(T ratio) const { return ratio > rho_clip ? rho_clip : ratio; }
  RLHF_HD T scale(T ratio) const { return gamma * lam * (ratio > c_clip ? c_clip : ratio); }
  // delta: what the target of a step is above its value, before what follows.
  RLHF_HD T shift(T rho, T reward, T value, T next_value) const { return rho * (reward + gamma * next_value - value); }
  // next_excess: what the next step's target is above its value.
  RLHF_HD T advantage(T rho, T reward, T value, T next_value, T next_excess) const {
    return rho * (reward + gamma * (next_value + lam * next_excess) - value);
  }
};

}  // namespace rlhf
