// One functor per policy loss: loss and derivative of a token; formulas in rlhf_fast/ops/policy/policy_loss.py.
// A new one is a function in rlhf_fast/ops/policy/objective.py, a functor here with its line in the table of cpu/policy_loss.cpp,
// and its twin in kernels/src/policy_loss.py.
#pragma once
#include "math/scalar.h"

namespace rlhf {

template <typename T> struct Token {
  T logprob, old_logprob, advantage, log_ratio, ratio;  // ratio = exp(log_ratio), the latter within +-20
  T selected;                                           // 1 where clip_cov, kl_cov chose it, else 0
};

template <typename T> struct Outcome {
  T loss, slope;  // slope = d loss / d logprob
  T low, high;    // 1 where the lower, the upper bound holds the token
};

// What the tokens of a sequence have in common.
template <typename T> struct Shared {
  T loss, slope, low, high;  // slope = d loss / d mean, for losses of the sequence
  T positive, negative;      // weight of its tokens, by the sign of the advantage
};

// Choices are made one after the other, not one within the other: each is then one blend of the vectoriser.
template <typename T> RLHF_HD T bounded(T x, T low, T high) {
  const T raised = x < low ? low : x;  // NaN stays NaN
  return raised > high ? high : raised;
}

template <typename T> RLHF_HD T bounded_exp(T log_ratio) {
  return std::exp(bounded(log_ratio, T(-20), T(20)));
}

// `slope` of what depends on the ratio, which is constant where the log-ratio is outside +-20.
template <typename T> RLHF_HD T unless_saturated(T log_ratio, T slope) {
  return std::fabs(log_ratio) > 20 ? T(0) : slope;
}

// p: lowest ratio, highest ratio, dual clip. A bound is there by the sign of the advantage: from below and the dual clip
// where it is negative, from above where it is positive.
template <typename T> RLHF_HD Outcome<T> clipped_surrogate(T ratio, T advantage, const T* p) {
  const T lower = advantage < 0 ? p[0] : T(0), positive_upper = advantage > 0 ? p[1] : infinity<T>();
  const T upper = advantage < 0 ? p[2] : positive_upper;
  const T loss = -bounded(ratio, lower, upper) * advantage, slope = ratio < lower ? T(0) : loss;
  return {loss, ratio > upper ? T(0) : slope, ratio < lower ? T(1) : T(0), ratio > upper ? T(1) : T(0)};
}

// What is averaged over a sequence.
struct LogRatio {
  template <typename T> static RLHF_HD T at(T log_ratio, T, const T*) { return log_ratio; }
};
struct BoundedLogRatio {  // p: lowest log-ratio, highest log-ratio
  template <typename T> static RLHF_HD T at(T log_ratio, T advantage, const T* p) {
    return bounded(log_ratio, advantage < 0 ? p[0] : -infinity<T>(), advantage > 0 ? p[1] : infinity<T>());
  }
};

// What a loss has unless it says otherwise: tokens of their own.
struct TokenLoss {
  using Statistic = LogRatio;
  static constexpr bool of_sequence = false;  // its slope is that of the sequence's loss by a mean over its tokens
  static constexpr bool folds_correction = false;  // into the sum of the log-ratios, in place of a weight
  template <typename T> static RLHF_HD Shared<T> shared(T, T, T, const T*) { return {}; }
};

struct PpoClip : TokenLoss {
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const T* p, E) {
    Outcome<T> out = clipped_surrogate(t.ratio, t.advantage, p);
    out.slope = unless_saturated(t.log_ratio, out.slope);
    return out;
  }
};

struct ClipCov : TokenLoss {
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>& s, const T* p, E exp) {
    const Outcome<T> out = PpoClip::at(t, s, p, exp);
    return {t.selected > 0 ? T(0) : out.loss, t.selected > 0 ? T(0) : out.slope, t.selected > 0 ? T(0) : out.low,
            t.selected > 0 ? T(1) : out.high};
  }
};

struct KlCov : TokenLoss {  // p: kl_cov_coef
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const T* p, E) {
    const T weight = t.selected > 0 ? p[0] : T(0);
    const T rises = t.log_ratio > 0 ? T(1) : T(0), sign = t.log_ratio < 0 ? T(-1) : rises;
    const T surrogate = t.ratio * t.advantage;
    return {product(weight, std::fabs(t.log_ratio)) - surrogate, weight * sign - unless_saturated(t.log_ratio, surrogate), T(0),
            t.selected > 0 ? T(1) : T(0)};
  }
};

struct PolicyGradient : TokenLoss {
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const T*, E) {
    return {product(-t.advantage, t.logprob), -t.advantage, T(0), T(0)};
  }
};

struct Cispo : TokenLoss {  // p: lowest ratio, highest ratio
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const T* p, E) {
    const T slope = -bounded(t.ratio, p[0], p[1]) * t.advantage;
    return {product(slope, t.logprob), slope, t.ratio < p[0] ? T(1) : T(0), t.ratio > p[1] ? T(1) : T(0)};
  }
};

struct Sapo : TokenLoss {  // p: temperature of positive, of negative advantages
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const T* p, E exp) {
    const T tau = t.advantage > 0 ? p[0] : p[1];
    const T z = tau * (t.ratio - 1), e = exp(-std::fabs(z));
    const T gate = (z < 0 ? e : T(1)) / (1 + e), slope = e / ((1 + e) * (1 + e));  // sigmoid(z), its derivative
    return {-4 / tau * gate * t.advantage, unless_saturated(t.log_ratio, -4 * slope * t.ratio * t.advantage), T(0), T(0)};
  }
};

// p: max_divergence, the cap of the ratio, beyond which the slope is that of the cap times the log-ratio.
template <typename T> RLHF_HD Outcome<T> within(T divergence, const Token<T>& t, const T* p) {
  const bool far = divergence > p[0];
  const bool low = far & (t.advantage < 0) & (t.log_ratio < 0), high = far & (t.advantage > 0) & (t.log_ratio > 0);
  const T ratio = t.ratio > p[1] ? p[1] : t.ratio, loss = low | high ? T(0) : -ratio * t.advantage;
  return {loss, t.log_ratio < -20 ? T(0) : loss, low ? T(1) : T(0), high ? T(1) : T(0)};
}

struct DppoTv : TokenLoss {  // p: see within
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const T* p, E exp) {
    return within(std::fabs(exp(t.logprob) - exp(t.old_logprob)), t, p);
  }
};

struct DppoKl : TokenLoss {  // p: see within
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const T* p, E exp) {
    const T old_rest = -std::expm1(t.old_logprob), rest = -std::expm1(t.logprob);
    const T others = old_rest > 0 ? old_rest * (std::log(old_rest) - std::log(rest)) : T(0);
    return within(product(exp(t.old_logprob), t.old_logprob - t.logprob) + others, t, p);
  }
};

// The losses below are made from a mean over the sequence: Statistic -> mean -> shared -> at.

struct Gspo : TokenLoss {
  static constexpr bool of_sequence = true;
  template <typename T> static RLHF_HD Shared<T> shared(T mean, T, T advantage, const T* p) {
    const Outcome<T> out = clipped_surrogate(bounded_exp(mean), advantage, p);
    return {out.loss, unless_saturated(mean, out.slope), out.low, out.high, T(0), T(0)};
  }
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>&, const Shared<T>& s, const T*, E) {
    return {s.loss, s.slope, s.low, s.high};
  }
};

struct GspoToken : TokenLoss {
  template <typename T> static RLHF_HD Shared<T> shared(T mean, T, T, const T*) {
    const T ratio = bounded_exp(mean);
    return {T(0), T(0), T(0), T(0), ratio, ratio};
  }
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>& s, const T* p, E) {
    return clipped_surrogate(s.positive, t.advantage, p);
  }
};

struct Gmpo : TokenLoss {  // p: lowest log-ratio, highest log-ratio
  using Statistic = BoundedLogRatio;
  static constexpr bool of_sequence = true;
  template <typename T> static RLHF_HD Shared<T> shared(T mean, T, T advantage, const T*) {
    const T loss = -bounded_exp(mean) * advantage;
    return {loss, unless_saturated(mean, loss), T(0), T(0), T(0), T(0)};
  }
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>& s, const T* p, E) {
    const T lower = t.advantage < 0 ? p[0] : -infinity<T>(), upper = t.advantage > 0 ? p[1] : infinity<T>();
    const T slope = t.log_ratio < lower ? T(0) : s.slope;
    return {s.loss, t.log_ratio > upper ? T(0) : slope, t.log_ratio < lower ? T(1) : T(0),
            t.log_ratio > upper ? T(1) : T(0)};
  }
};

struct Vespo : TokenLoss {  // p: k and lambda of positive, of negative advantages
  static constexpr bool folds_correction = true;
  template <typename T> static RLHF_HD Shared<T> shared(T mean, T length, T, const T* p) {
    const T sum = mean * length, log_weight = bounded(sum, T(-20), T(20));
    const T above = std::expm1(log_weight);
    return {T(0), T(0), T(0), T(0), std::exp(p[0] * log_weight - p[1] * above),
            std::exp(p[2] * log_weight - p[3] * above)};
  }
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>& s, const T*, E) {
    const T slope = -(t.advantage >= 0 ? s.positive : s.negative) * t.advantage;
    return {product(slope, t.logprob), slope, T(0), T(0)};
  }
};

struct Dro : TokenLoss {  // p: dro_beta
  static constexpr bool of_sequence = true;
  template <typename T> static RLHF_HD Shared<T> shared(T mean, T length, T advantage, const T* p) {
    const T sum = mean * length;
    return {(T(0.5) * p[0] * sum - advantage) * sum, length * (p[0] * sum - advantage), T(0), T(0), T(0), T(0)};
  }
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>&, const Shared<T>& s, const T*, E) {
    return {s.loss, s.slope, T(0), T(0)};
  }
};

}  // namespace rlhf
