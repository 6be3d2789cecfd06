// One functor per loss of a chosen and a rejected answer. Formulas: rlhf_fast/ops/{preference_loss,reward_loss}.py.
#pragma once
#include "math/losses.h"

namespace rlhf {

// The loss of a pair and its derivatives in the two rewards.
template <typename T> struct PairLoss {
  T loss, chosen, rejected;
};

// What a loss of pairs sees.
template <typename T> struct Rewards {
  T chosen, rejected;                   // implicit rewards
  T chosen_logprob, rejected_logprob;   // of the policy, averaged where the variant is
  T chosen_shift, rejected_shift;       // whatever else the variant needs for each half of the pair
  T beta, label_smoothing, parameter;
  RLHF_HD T gap() const { return chosen - rejected; }
};

// Beyond exp(20) the exponential goes on along its tangent: value exp(x) - 1.
template <typename T> RLHF_HD Sloped<T> tamed_expm1(T x) {
  const T bounded = x > T(20) ? T(20) : x;  // NaN stays NaN
  const T e = exp_any(bounded);
  return {expm1_any(bounded) + (x > T(20) ? e * (x - T(20)) : T(0)), e};
}

// Score of a log-ratio under a divergence.
struct ReverseKlScore {
  template <typename T> static RLHF_HD Sloped<T> at(T log_ratio, T) { return {log_ratio, T(1)}; }
};
struct AlphaScore {
  template <typename T> static RLHF_HD Sloped<T> at(T log_ratio, T alpha) {
    const Sloped<T> e = tamed_expm1(-alpha * log_ratio);
    return {-e.value / alpha, e.slope};
  }
};
struct JensenShannonScore {
  template <typename T> static RLHF_HD Sloped<T> at(T log_ratio, T) {
    return {T(0.6931471805599453) - softplus(-log_ratio), sigmoid(-log_ratio)};
  }
};

template <typename T> RLHF_HD Sloped<T> logistic(T gap, T label_smoothing) {
  return {(1 - label_smoothing) * softplus(-gap) + product(label_smoothing, softplus(gap)),
          label_smoothing * sigmoid(gap) - (1 - label_smoothing) * sigmoid(-gap)};
}

// A loss of the gap alone.
template <typename T> RLHF_HD PairLoss<T> of_gap(Sloped<T> loss) { return {loss.value, loss.slope, -loss.slope}; }

struct SigmoidLoss {  // parameter: the target margin
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    return of_gap(logistic(r.gap() - r.parameter, r.label_smoothing));
  }
};

struct RobustLoss {
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const T h = r.gap(), s = r.label_smoothing, scale = 1 / (1 - 2 * s);
    return of_gap(Sloped<T>{scale * ((1 - s) * softplus(-h) - product(s, softplus(h))),
                           -scale * ((1 - s) * sigmoid(-h) + s * sigmoid(h))});
  }
};

struct HingeLoss {
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const T short_of = 1 - r.gap();
    return of_gap(short_of <= 0 ? Sloped<T>{0, 0} : Sloped<T>{short_of, -1});
  }
};

struct IpoLoss {
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const T error = r.gap() / r.beta - T(0.5) / r.beta;
    return of_gap(Sloped<T>{error * error, 2 * error / r.beta});
  }
};

struct ExoPairLoss {
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const T h = r.gap(), p = sigmoid(h), q = sigmoid(-h);
    const T log_chosen = std::log1p(-r.label_smoothing), log_rejected = std::log(r.label_smoothing);
    return of_gap(Sloped<T>{-product(p, softplus(-h) + log_chosen) - product(q, softplus(h) + log_rejected),
                           product(p * q, h - (log_chosen - log_rejected))});
  }
};

struct NcaPairLoss {
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const T a = r.chosen, b = r.rejected;
    return {softplus(-a) + T(0.5) * softplus(a) + T(0.5) * softplus(b), T(0.5) * sigmoid(a) - sigmoid(-a),
            T(0.5) * sigmoid(b)};
  }
};

// An infinite reward, which makes the mean of the batch infinite, is still further away than that.
template <typename T> RLHF_HD T shifted(T reward, T shift) {
  return std::fabs(reward) == infinity<T>() ? reward : reward - shift;
}

struct BcoPairLoss {  // both shifts: delta
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const T a = shifted(r.chosen, r.chosen_shift), b = shifted(r.rejected, r.rejected_shift);
    return {softplus(-a) + softplus(b), -sigmoid(-a), sigmoid(b)};
  }
};

struct SppoHardLoss {
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const T chosen = (r.chosen - T(0.5)) / r.beta, rejected = (r.rejected + T(0.5)) / r.beta;
    return {chosen * chosen + rejected * rejected, 2 * chosen / r.beta, 2 * rejected / r.beta};
  }
};

struct AotLoss {  // shifts: the reference's gap of the pair's rank
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    return of_gap(logistic(r.beta * (r.chosen_logprob - r.rejected_logprob) - r.chosen_shift, r.label_smoothing));
  }
};

struct AotUnpairedLoss {  // shifts: the rejected reward of the chosen's rank, the chosen reward of the rejected's
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const Sloped<T> chosen = logistic(r.chosen - r.chosen_shift, r.label_smoothing);
    const Sloped<T> rejected = logistic(r.rejected_shift - r.rejected, r.label_smoothing);
    return {T(0.5) * (chosen.value + rejected.value), chosen.slope, -rejected.slope};
  }
};

struct ApoZeroLoss {
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const T p = sigmoid(r.chosen), q = sigmoid(r.rejected);
    return {q - p, -p * sigmoid(-r.chosen), q * sigmoid(-r.rejected)};
  }
};

struct ApoDownLoss {
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const T p = sigmoid(r.chosen), q = sigmoid(r.gap()), slope = q * sigmoid(-r.gap());
    return {p - q, p * sigmoid(-r.chosen) - slope, slope};
  }
};

struct DiscopopLoss {  // parameter: tau
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const T h = r.gap(), tau = r.parameter, exponential = sigmoid(h / tau), logistic = sigmoid(-h / tau);
    // log(exp(-h) sigmoid(h / tau)) on the side where its terms do not cancel
    const T falling = product(1 / tau - 1, h) - softplus(h / tau), rising = -softplus(-h / tau) - h;
    const T exponent = h < 0 ? falling : rising, beyond = exponent > T(20) ? exponent - T(20) : T(0);
    const T weighted = tamed_expm1(exponent).slope;
    return of_gap(Sloped<T>{product(logistic, softplus(-h)) + weighted * (1 + beyond),
                           -logistic * (sigmoid(-h) + product(exponential, softplus(-h)) / tau) +
                               weighted * (logistic / tau - 1)});
  }
};

struct SftLoss {
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    return {-r.chosen_logprob, -1 / r.beta, T(0)};
  }
};

struct CpoLoss {  // parameter: weight of the likelihood
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const Sloped<T> preference = logistic(r.gap(), r.label_smoothing);
    return {preference.value - product(r.parameter, r.chosen_logprob), preference.slope - r.parameter / r.beta,
            -preference.slope};
  }
};

struct OrpoLoss {
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const bool certain = r.chosen_logprob > T(-1e-6), rejected_certain = r.rejected_logprob > T(-1e-6);
    const T chosen = certain ? T(-1e-6) : r.chosen_logprob, rejected = rejected_certain ? T(-1e-6) : r.rejected_logprob;
    const T chosen_rest = expm1_any(chosen), rejected_rest = expm1_any(rejected);  // p - 1
    const T log_odds = (chosen - rejected) - log_normal(chosen_rest / rejected_rest), slope = sigmoid(-log_odds);
    return {r.beta * softplus(-log_odds) - r.chosen_logprob, (certain ? T(0) : slope / chosen_rest) - 1 / r.beta,
            rejected_certain ? T(0) : -slope / rejected_rest};
  }
};

struct HpoLoss {  // shifts: weights of the likelihoods; parameter: weight of both
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const Sloped<T> preference = logistic(r.gap(), r.label_smoothing);
    const T chosen = r.parameter * r.chosen_shift, rejected = r.parameter * r.rejected_shift;
    return {preference.value - product(chosen, r.chosen_logprob) - product(rejected, r.rejected_logprob),
            preference.slope - chosen / r.beta, -preference.slope - rejected / r.beta};
  }
};

struct BradleyTerryLoss {  // chosen_shift: the margin; parameter: weight of the squared sum
  template <typename T> static RLHF_HD PairLoss<T> at(const Rewards<T>& r) {
    const Sloped<T> preference = logistic(r.gap() - r.chosen_shift, r.label_smoothing);
    const T sum = r.chosen + r.rejected, centring = product(r.parameter, sum);
    return {preference.value + product(centring, sum), preference.slope + 2 * centring, 2 * centring - preference.slope};
  }
};

// One half of a pair: its log-probability, averaged, its implicit reward and the derivative of that by the logprob.
template <typename T> struct Half {
  T logprob, reward, slope;
};
template <typename Score, typename T> RLHF_HD Half<T> half(T logprob, T ref_logprob, T length, T beta, T alpha) {
  const T tokens = length < 1 ? T(1) : length;
  const Sloped<T> score = Score::at(logprob - ref_logprob, alpha);
  return {logprob / tokens, beta * (score.value / tokens), beta * score.slope / tokens};
}

// x: logprobs, rewards and slopes of the halves, chosen before rejected, the pair's weight, the shifts of both;
// p: beta, label_smoothing, the variant's own parameter.
template <typename Variant> struct Pair {
  static constexpr int inputs = 9, coefficients = 2;
  template <typename T> static RLHF_HD Terms<T> at(const T* x, const T* p) {
    const Rewards<T> rewards{x[2], x[3], x[0], x[1], x[7], x[8], p[0], p[1], p[2]};
    const PairLoss<T> pair = Variant::at(rewards);
    return {product(x[6], pair.loss), {product(x[6], x[4] * pair.chosen), product(x[6], x[5] * pair.rejected)},
            {x[2] > x[3] ? T(1) : T(0), rewards.gap(), x[2], x[3]}};
  }
};

}  // namespace rlhf
