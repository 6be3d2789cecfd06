// One step of the backward recurrences behind returns and advantages; formulas in rlhf_fast/ops/advantages/gae.py and vtrace.py.
#pragma once
#include "math/host_device.h"

namespace rlhf {

// x -> scale * x + shift
template <typename T> struct Affine {
  T scale, shift;
};

template <typename T> RLHF_HD Affine<T> identity() { return {T(1), T(0)}; }

// The map that applies `inner` first.
template <typename T> RLHF_HD Affine<T> compose(Affine<T> outer, Affine<T> inner) {
  return {outer.scale * inner.scale, outer.scale * inner.shift + outer.shift};
}

// s_t = gamma ((1 - lam) value_t + lam (reward_t + s_{t+1})): what a step hands to the one before it.
template <typename T> struct Recurrence {
  T decay, blend;  // gamma lam, gamma (1 - lam)
  RLHF_HD Recurrence(double gamma, double lam) : decay(T(gamma * lam)), blend(T(gamma * (1 - lam))) {}
  RLHF_HD T shift(T reward, T value) const { return decay * reward + blend * value; }
  // A step behind the mask hands on what it got.
  RLHF_HD Affine<T> step(bool counts, T reward, T value) const {
    return counts ? Affine<T>{decay, shift(reward, value)} : identity<T>();
  }
};

}  // namespace rlhf
