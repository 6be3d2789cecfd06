// Row statistics of a selective log-softmax that keep confident tokens exact; see rlhf_fast/ops/token_logprobs.py.
#pragma once
#include <cmath>

#include "native.h"

namespace rlhf {

// A set of logits z: its maximum m, rest = sum of exp(z - m) over all but one maximal element, and
// spread = sum of exp(z - m) (m - z). `rest` without the leading 1 is what keeps log1p exact when one logit leads.
// No logits at all: max = -inf, rest = -1, spread = 0, so that 1 + rest is always the sum of exp(z - m).
template <typename T> struct Stats {
  T max, rest, spread;
};

template <typename T> RLHF_HD Stats<T> no_stats(T minus_inf) { return {minus_inf, T(-1), T(0)}; }

template <typename T> RLHF_HD Stats<T> merge(Stats<T> a, Stats<T> b) {
  if (b.max > a.max) {
    const Stats<T> c = a;
    a = b;
    b = c;
  }
  const T shift = a.max == b.max ? T(0) : a.max - b.max;  // -inf meets -inf where both are empty
  const T scale = std::exp(-shift);
  if (!(scale == 0)) {  // keeps the shift of an empty set out of 0 * inf, and lets NaN through
    a.spread += scale * (b.spread + shift * (1 + b.rest));
    a.rest += scale * (1 + b.rest);
  }
  return a;
}

template <typename T> struct RowResult {
  T logprob, entropy, max, logsum;  // log-sum-exp of the row = max + logsum
};

// `others` are all logits of the row but the target's.
template <typename T> RLHF_HD RowResult<T> finish(Stats<T> others, T target, T minus_inf) {
  RowResult<T> out;
  if (others.max == minus_inf && others.rest == -1) {  // nothing but the target
    out.logprob = target - target;                    // 0, NaN where the target is not finite
    out.entropy = 0;
    out.max = target;
    out.logsum = 0;
    return out;
  }
  const T margin = (others.max - target) + std::log1p(others.rest);  // lse of the others - target
  out.logprob = -((margin > 0 ? margin : 0) + std::log1p(std::exp(-std::fabs(margin))));
  if (target == minus_inf) {
    out.logprob = minus_inf;
  } else {
    others = merge(others, Stats<T>{target, 0, 0});
  }
  out.max = others.max;
  out.logsum = std::log1p(others.rest);
  out.entropy = out.logsum + others.spread / (1 + others.rest);
  return out;
}

}  // namespace rlhf
