// Row statistics of a selective log-softmax that keep confident tokens exact; see rlhf_fast/ops/tokens/token_logprobs.py.
#pragma once
#include <cmath>

#include "native.h"

namespace rlhf {

// z = softcap(logit_scale x) / temperature of every row, softcap(u) = cap tanh(u / cap), 0 for none.
struct Transform {
  double temperature;
  const float* temperatures;  // (rows), in place of `temperature`, or null
  double logit_scale, softcap;
};

// The transform of one row: z = factor * capped(x), with capped(x) = x where there is no softcap.
template <typename T> struct RowTransform {
  T factor, cap, scale;
  RLHF_HD RowTransform(const Transform& t, int64_t row)
      : factor(T((t.softcap > 0 ? 1 : t.logit_scale) / (t.temperatures ? double(t.temperatures[row]) : t.temperature))),
        cap(T(t.softcap)),
        scale(T(t.logit_scale)) {}
  RLHF_HD T capped(T x) const { return cap > 0 ? cap * std::tanh(x * (scale / cap)) : x; }
  // d capped / d x, from x: 1 - tanh^2 of a saturated logit cancels.
  RLHF_HD T slope(T x) const {
    if (!(cap > 0)) return T(1);
    const T e = std::exp(T(-2) * std::fabs(x * (scale / cap)));
    return scale * (4 * e / ((1 + e) * (1 + e)));
  }
};

// A set of logits: its maximum (as given, before the transform), and with e = exp(z - max z) the sums over all but
// one maximal element of e (`rest`), e (max z - z) (`spread`) and e^2 (`squares`). `rest` without the leading 1 is
// what keeps log1p exact when one logit leads. Nothing but -inf: rest = squares = -1, so that 1 + rest is always the
// sum of e.
template <typename T> struct Stats {
  T max, rest, spread, squares;
};

template <typename T> RLHF_HD Stats<T> no_stats() { return {-T(INFINITY), T(-1), T(0), T(-1)}; }

template <typename T> RLHF_HD Stats<T> merge(Stats<T> a, Stats<T> b, const RowTransform<T>& row) {
  if (b.max > a.max) {
    const Stats<T> c = a;
    a = b;
    b = c;
  }
  // -inf meets -inf where both are empty
  const T shift = a.max == b.max ? T(0) : row.factor * (row.capped(a.max) - row.capped(b.max));
  const T e = std::exp(-shift);
  if (!(e == 0 && b.rest == b.rest)) {  // keeps the shift of an empty set out of 0 * inf, and lets NaN through
    a.spread += e * (b.spread + shift * (1 + b.rest));
    a.rest += e * (1 + b.rest);
    a.squares += e * e * (1 + b.squares);
  }
  return a;
}

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// all.rest, NaN where the maximum is infinite after the softcap: inf - inf.
template <typename T> RLHF_HD T finite_rest(const Stats<T>& all, const RowTransform<T>& row) {
  return row.capped(all.max) == T(INFINITY) ? T(NAN) : all.rest;
}

// What is kept of a row: lse = max + logsum with max the largest z, entropy, and sum_j p_j^2.
template <typename T> struct RowResult {
  T max, logsum, entropy, sum_p_squared;
};

template <typename T> RLHF_HD RowResult<T> finish(const Stats<T>& all, const RowTransform<T>& row) {
  const T rest = finite_rest(all, row), sum = 1 + rest, logsum = std::log1p(rest);
  return {row.factor * row.capped(all.max), logsum, logsum + all.spread / sum, (1 + all.squares) / (sum * sum)};
}

// The log-probability of a token with the logit `target`; exact where that is the maximum.
template <typename T> RLHF_HD T logprob_of(T target, const Stats<T>& all, const RowTransform<T>& row) {
  // s - s: 0, NaN where the maximum is infinite
  const T s = row.capped(target), below = target == all.max ? s - s : row.factor * (s - row.capped(all.max));
  return below - std::log1p(finite_rest(all, row));
}

// What the gradient of a row is made of: L = sum_k g_k logprob_k + g_entropy entropy + g_lse lse.
template <typename T> struct RowGradient {
  const int64_t* targets;
  int64_t count;
  const T *logprobs, *g_logprobs;  // (count); g_logprobs null for 1 each
  T max, logsum, entropy, g_entropy, g_lse, g_sum;
  RLHF_HD T g(int64_t k) const { return g_logprobs ? g_logprobs[k] : T(1); }
  // d L / d logit of target k, with 1 - p from expm1, which keeps a confident token's gradient.
  // slope: d capped / d logit there.
  RLHF_HD T at_target(int64_t k, T slope, const RowTransform<T>& row) const {
    const T log_p = logprobs[k], p = std::exp(log_p);
    T elsewhere = 0;
    for (int64_t i = 0; i < count; ++i) elsewhere += targets[i] == targets[k] ? T(0) : g(i);
    const T through_entropy = p == 0 ? T(0) : g_entropy * p * (log_p + entropy);
    return row.factor * slope * (g_sum * -std::expm1(log_p) - elsewhere + g_lse * p - through_entropy);
  }
};

}  // namespace rlhf
