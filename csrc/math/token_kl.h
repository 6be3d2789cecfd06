// Divergences of two distributions, one element at a time; formulas in rlhf_fast/ops/tokens/token_kl.py.
// A new divergence is one functor here, one line in the table of cpu/token_kl.cpp and its twin in
// kernels/src/token_kl.py.
#pragma once
#include <cmath>

#include "math/elementary.h"

namespace rlhf {

// exp(x) - 1 - x for |x| < 1/2: a Taylor series whose first term left out is below the type's rounding.
template <typename T> RLHF_HD T exp_minus_1_minus_near(T x) {
  constexpr int terms = sizeof(T) == 8 ? 15 : 9;
  T series = 1;
  for (int k = terms; k > 2; --k) series = 1 + series * x * (T(1) / k);
  return T(0.5) * x * x * series;
}

// x log(x / y) - x + y >= 0, given log(y / x): the term of a KL that does not cancel where x is near y.
template <typename T> RLHF_HD T kl_term(T x, T y, T log_ratio) {
  const bool near = std::fabs(log_ratio) < T(0.5);
  const T term = near ? x * exp_minus_1_minus_near(near ? log_ratio : T(0)) : (y - x) - x * log_ratio;
  return x == 0 ? y : term;
}

// What element j adds to the divergence D and to `mean` = sum_k p_k s_k, and slope = p_j s_j, with s_j = d D / d p_j up
// to a constant: d D / d z_j = slope - p_j mean.
template <typename T> struct DivergenceTerms {
  T value, mean, slope;
};

// p: the policy's probability, q: the reference's, log_ratio = log(q / p); js_weight is only the last one's.
struct ReverseKl {
  template <typename T> static RLHF_HD DivergenceTerms<T> at(T p, T q, T log_ratio, T) {
    const T value = kl_term(p, q, log_ratio);
    return {value, value, p == 0 ? T(0) : -p * log_ratio};
  }
};

struct ForwardKl {
  template <typename T> static RLHF_HD DivergenceTerms<T> at(T p, T q, T log_ratio, T) {
    const bool near = std::fabs(log_ratio) < T(0.5);
    const T x = near ? log_ratio : T(0);
    return {kl_term(q, p, -log_ratio), T(0), near ? -p * (exp_minus_1_minus_near(x) + x) : p - q};
  }
};

struct JensenShannon {
  template <typename T> static RLHF_HD DivergenceTerms<T> at(T p, T q, T log_ratio, T js_weight) {
    const bool policy_leads = log_ratio <= 0;
    const T distance = std::fabs(log_ratio), policy_weight = 1 - js_weight;
    const bool near = distance < T(0.5);
    const T x = near ? -distance : T(0), far = policy_leads ? q / p : p / q;  // far = exp(-distance)
    const T expm1 = near ? exp_minus_1_minus_near(x) + x : far - 1;
    const T shrunk = log1p_any((policy_leads ? js_weight : policy_weight) * expm1);
    const T mixture = js_weight * q + policy_weight * p;
    const T over_p = policy_leads ? shrunk : shrunk + log_ratio;  // log(mixture / p)
    const T over_q = policy_leads ? shrunk - log_ratio : shrunk;  // log(mixture / q)
    const T mean = policy_weight * kl_term(p, mixture, over_p);
    return {js_weight * kl_term(q, mixture, over_q) + mean, mean, p == 0 ? T(0) : -policy_weight * p * over_p};
  }
};

}  // namespace rlhf
