// Per-token KL estimators of x = ref_logprob - logprob, and the estimate made of them; see rlhf_fast/ops/tokens/kl_estimate.py.
#pragma once
#include <type_traits>

#include "math/scalar.h"

namespace rlhf {

template <typename T> struct Slope {
  T value, derivative;  // by x
};

struct K1 {
  template <typename T> static RLHF_HD Slope<T> at(T x) { return {-x, T(-1)}; }
};
struct K2 {
  template <typename T> static RLHF_HD Slope<T> at(T x) { return {T(0.5) * x * x, x}; }
};
struct Own {};  // in place of a second estimator: the gradient is that of the value

template <typename T> struct KlClips {
  T log_ratio, value, weight;  // infinite where nothing is clipped
};

template <typename T> struct Estimate {
  T value, by_logprob, by_ref;
};

template <typename T> RLHF_HD T clipped(T x, T bound) { return x > bound ? bound : (x < -bound ? -bound : x); }

// weight = exp(logprob - old_logprob) where the estimate is weighted, else 1. E makes the value, G (or Own) the gradient.
template <typename E, typename G, typename T>
RLHF_HD Estimate<T> estimate(T log_ratio, bool weighted, T weight, const KlClips<T>& clips) {
  const T x = clipped(log_ratio, clips.log_ratio);
  const Slope<T> own = E::at(x);
  const T value = clipped(own.value, clips.value);
  const bool capped = weighted & (weight > clips.weight);
  const T through_weight = !weighted | capped ? T(0) : value;
  weight = capped ? clips.weight : weight;
  if constexpr (std::is_same_v<G, Own>) {
    const T slope = (x == log_ratio) & (value == own.value) ? own.derivative : T(0);
    return {product(weight, value), product(weight, through_weight - slope), product(weight, slope)};
  } else {
    const T slope = product(weight, G::at(log_ratio).derivative);
    return {product(weight, value), -slope, slope};
  }
}

}  // namespace rlhf
