// Per-token KL estimators of x = ref_logprob - logprob: value and derivative; see rlhf_fast/ops/kl_estimate.py.
#pragma once
#include "math/scalar.h"

namespace rlhf {

template <typename T> struct Estimate {
  T value, derivative;  // d value / d x
};

struct K1 {
  template <typename T> static RLHF_HD Estimate<T> at(T x) { return {-x, T(-1)}; }
};
struct K2 {
  template <typename T> static RLHF_HD Estimate<T> at(T x) { return {T(0.5) * x * x, x}; }
};
struct K3 {
  template <typename T> static RLHF_HD Estimate<T> at(T x) { return {exp_minus_1_minus(x), std::expm1(x)}; }
};

}  // namespace rlhf
