// One functor per policy loss: loss and derivative of a token; formulas in rlhf_fast/ops/policy/policy_loss.py.
// A new one is a function in rlhf_fast/ops/policy/objective.py, a functor here with its line in the table of
// cpu/policy_loss.cpp, and its twin in kernels/src/policy_losses.py.
#pragma once
#include "math/scalar.h"

namespace rlhf {

// The numbers of an objective, by the names of Numbers in rlhf_fast/ops/policy/policy_loss.py.
#define RLHF_POLICY_NUMBERS(X)                                                                       \
  X(clip_eps_low) X(clip_eps_high) X(ratio_low) X(ratio_high) X(dual_clip) X(max_divergence)         \
  X(kl_cov_coef) X(sapo_temperature_pos) X(sapo_temperature_neg) X(vespo_k_pos) X(vespo_lambda_pos)  \
  X(vespo_k_neg) X(vespo_lambda_neg) X(dro_beta) X(kl_coef) X(entropy_coef) X(correction_low)        \
  X(correction_high) X(off_policy_max_kl)

template <typename T> struct Numbers {
#define RLHF_FIELD(NAME) T NAME;
  RLHF_POLICY_NUMBERS(RLHF_FIELD)
#undef RLHF_FIELD
  template <typename U> Numbers<U> in() const {
#define RLHF_CONVERTED(NAME) U(NAME),
    return {RLHF_POLICY_NUMBERS(RLHF_CONVERTED)};
#undef RLHF_CONVERTED
  }
};

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

template <typename T> RLHF_HD T bounded_exp(T log_ratio) {
  return std::exp(bounded(log_ratio, T(-20), T(20)));
}

// `slope` of what depends on the ratio, which is constant where the log-ratio is outside +-20.
template <typename T> RLHF_HD T unless_saturated(T log_ratio, T slope) {
  return std::fabs(log_ratio) > 20 ? T(0) : slope;
}

// A bound is there by the sign of the advantage: from below and dual_clip where it is negative, from above where it is
// positive.
template <typename T> RLHF_HD Outcome<T> clipped_surrogate(T ratio, T advantage, const Numbers<T>& p) {
  const T lower = advantage < 0 ? p.ratio_low : T(0), positive_upper = advantage > 0 ? p.ratio_high : infinity<T>();
  const T upper = advantage < 0 ? p.dual_clip : positive_upper;
  const T loss = -bounded(ratio, lower, upper) * advantage, slope = ratio < lower ? T(0) : loss;
  return {loss, ratio > upper ? T(0) : slope, ratio < lower ? T(1) : T(0), ratio > upper ? T(1) : T(0)};
}

// What is averaged over a sequence.
struct LogRatio {
  template <typename T> static RLHF_HD T at(T log_ratio, T, const Numbers<T>&) { return log_ratio; }
};
struct BoundedLogRatio {
  template <typename T> static RLHF_HD T at(T log_ratio, T advantage, const Numbers<T>& p) {
    return bounded(log_ratio, advantage < 0 ? -p.clip_eps_low : -infinity<T>(),
                   advantage > 0 ? p.clip_eps_high : infinity<T>());
  }
};

// What a loss has unless it says otherwise: tokens of their own.
struct TokenLoss {
  using Statistic = LogRatio;
  static constexpr bool of_sequence = false;  // its slope is that of the sequence's loss by a mean over its tokens
  static constexpr bool folds_correction = false;  // into the sum of the log-ratios, in place of a weight
  template <typename T> static RLHF_HD Shared<T> shared(T, T, T, const Numbers<T>&) { return {}; }
};

struct PpoClip : TokenLoss {
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const Numbers<T>& p, E) {
    Outcome<T> out = clipped_surrogate(t.ratio, t.advantage, p);
    out.slope = unless_saturated(t.log_ratio, out.slope);
    return out;
  }
};

struct ClipCov : TokenLoss {
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>& s, const Numbers<T>& p, E exp) {
    const Outcome<T> out = PpoClip::at(t, s, p, exp);
    return {t.selected > 0 ? T(0) : out.loss, t.selected > 0 ? T(0) : out.slope, t.selected > 0 ? T(0) : out.low,
            t.selected > 0 ? T(1) : out.high};
  }
};

struct KlCov : TokenLoss {
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const Numbers<T>& p, E) {
    const T weight = t.selected > 0 ? p.kl_cov_coef : T(0);
    const T rises = t.log_ratio > 0 ? T(1) : T(0), sign = t.log_ratio < 0 ? T(-1) : rises;
    const T surrogate = t.ratio * t.advantage;
    return {product(weight, std::fabs(t.log_ratio)) - surrogate, weight * sign - unless_saturated(t.log_ratio, surrogate),
            T(0), t.selected > 0 ? T(1) : T(0)};
  }
};

struct PolicyGradient : TokenLoss {
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const Numbers<T>&, E) {
    return {product(-t.advantage, t.logprob), -t.advantage, T(0), T(0)};
  }
};

struct Cispo : TokenLoss {
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const Numbers<T>& p, E) {
    const T slope = -bounded(t.ratio, p.ratio_low, p.ratio_high) * t.advantage;
    return {product(slope, t.logprob), slope, t.ratio < p.ratio_low ? T(1) : T(0),
            t.ratio > p.ratio_high ? T(1) : T(0)};
  }
};

struct Sapo : TokenLoss {
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const Numbers<T>& p, E exp) {
    const T tau = t.advantage > 0 ? p.sapo_temperature_pos : p.sapo_temperature_neg;
    const T z = tau * (t.ratio - 1), e = exp(-std::fabs(z));
    const T gate = (z < 0 ? e : T(1)) / (1 + e), slope = e / ((1 + e) * (1 + e));  // sigmoid(z), its derivative
    return {-4 / tau * gate * t.advantage, unless_saturated(t.log_ratio, -4 * slope * t.ratio * t.advantage), T(0),
            T(0)};
  }
};

// The slope beyond dual_clip, which caps the ratio, is that of the cap times the log-ratio.
template <typename T> RLHF_HD Outcome<T> within(T divergence, const Token<T>& t, const Numbers<T>& p) {
  const bool far = divergence > p.max_divergence;
  const bool low = far & (t.advantage < 0) & (t.log_ratio < 0), high = far & (t.advantage > 0) & (t.log_ratio > 0);
  const T ratio = t.ratio > p.dual_clip ? p.dual_clip : t.ratio, loss = low | high ? T(0) : -ratio * t.advantage;
  return {loss, t.log_ratio < -20 ? T(0) : loss, low ? T(1) : T(0), high ? T(1) : T(0)};
}

struct DppoTv : TokenLoss {
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const Numbers<T>& p, E exp) {
    return within(std::fabs(exp(t.logprob) - exp(t.old_logprob)), t, p);
  }
};

struct DppoKl : TokenLoss {
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>&, const Numbers<T>& p, E exp) {
    const T old_rest = -std::expm1(t.old_logprob), rest = -std::expm1(t.logprob);
    const T others = old_rest > 0 ? old_rest * (std::log(old_rest) - std::log(rest)) : T(0);
    return within(product(exp(t.old_logprob), t.old_logprob - t.logprob) + others, t, p);
  }
};

// The losses below are made from a mean over the sequence: Statistic -> mean -> shared -> at.

struct Gspo : TokenLoss {
  static constexpr bool of_sequence = true;
  template <typename T> static RLHF_HD Shared<T> shared(T mean, T, T advantage, const Numbers<T>& p) {
    const Outcome<T> out = clipped_surrogate(bounded_exp(mean), advantage, p);
    return {out.loss, unless_saturated(mean, out.slope), out.low, out.high, T(0), T(0)};
  }
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>&, const Shared<T>& s, const Numbers<T>&, E) {
    return {s.loss, s.slope, s.low, s.high};
  }
};

struct GspoToken : TokenLoss {
  template <typename T> static RLHF_HD Shared<T> shared(T mean, T, T, const Numbers<T>&) {
    const T ratio = bounded_exp(mean);
    return {T(0), T(0), T(0), T(0), ratio, ratio};
  }
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>& s, const Numbers<T>& p, E) {
    return clipped_surrogate(s.positive, t.advantage, p);
  }
};

struct Gmpo : TokenLoss {
  using Statistic = BoundedLogRatio;
  static constexpr bool of_sequence = true;
  template <typename T> static RLHF_HD Shared<T> shared(T mean, T, T advantage, const Numbers<T>&) {
    const T loss = -bounded_exp(mean) * advantage;
    return {loss, unless_saturated(mean, loss), T(0), T(0), T(0), T(0)};
  }
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>& s, const Numbers<T>& p, E) {
    const T lower = t.advantage < 0 ? -p.clip_eps_low : -infinity<T>();
    const T upper = t.advantage > 0 ? p.clip_eps_high : infinity<T>();
    const T slope = t.log_ratio < lower ? T(0) : s.slope;
    return {s.loss, t.log_ratio > upper ? T(0) : slope, t.log_ratio < lower ? T(1) : T(0),
            t.log_ratio > upper ? T(1) : T(0)};
  }
};

struct Vespo : TokenLoss {
  static constexpr bool folds_correction = true;
  template <typename T> static RLHF_HD Shared<T> shared(T mean, T length, T, const Numbers<T>& p) {
    const T sum = mean * length, log_weight = bounded(sum, T(-20), T(20));
    const T above = std::expm1(log_weight);
    return {T(0), T(0), T(0), T(0), std::exp(p.vespo_k_pos * log_weight - p.vespo_lambda_pos * above),
            std::exp(p.vespo_k_neg * log_weight - p.vespo_lambda_neg * above)};
  }
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>& t, const Shared<T>& s, const Numbers<T>&, E) {
    const T slope = -(t.advantage >= 0 ? s.positive : s.negative) * t.advantage;
    return {product(slope, t.logprob), slope, T(0), T(0)};
  }
};

struct Dro : TokenLoss {
  static constexpr bool of_sequence = true;
  template <typename T> static RLHF_HD Shared<T> shared(T mean, T length, T advantage, const Numbers<T>& p) {
    const T sum = mean * length;
    const T loss = (T(0.5) * p.dro_beta * sum - advantage) * sum;
    return {loss, length * (p.dro_beta * sum - advantage), T(0), T(0), T(0), T(0)};
  }
  template <typename T, typename E>
  static RLHF_HD Outcome<T> at(const Token<T>&, const Shared<T>& s, const Numbers<T>&, E) {
    return {s.loss, s.slope, T(0), T(0)};
  }
};

}  // namespace rlhf
