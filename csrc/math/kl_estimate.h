// Per-token KL estimates of x = ref_logprob - logprob and their slopes by x; rlhf_fast/ops/tokens/kl_estimate.py.
#pragma once
#include "math/scalar.h"

namespace rlhf {

struct K1 {
  template <typename T> static RLHF_HD Sloped<T> at(T x) { return {-x, T(-1)}; }
};
struct K2 {
  template <typename T> static RLHF_HD Sloped<T> at(T x) { return {T(0.5) * x * x, x}; }
};
struct K3 {
  template <typename T> static RLHF_HD Sloped<T> at(T x) {
    const ExpParts<T> e = exp_parts(x);
    const T near = e.minus_1_minus + x, far = e.exp - 1;
    return {e.minus_1_minus, (x < T(0.5)) & (x > T(-0.5)) ? near : far};
  }
};

}  // namespace rlhf
