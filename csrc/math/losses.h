// One functor per loss variant: value and derivative of one element. Formulas: rlhf_fast/ops/<op>.py.
// A new variant is one functor here, one line in the table of cpu/losses.cpp and its twin in kernels/src/losses.py.
#pragma once
#include "math/scalar.h"

namespace rlhf {

// What an element contributes: its loss, d loss / d input k for the first inputs, and its metrics, which are
// averaged; the last one is the maximum over the elements instead where the variant says so.
template <typename T> struct Terms {
  T loss = 0;
  T coefficients[2] = {};
  T metrics[4] = {};
};

struct PpoClip {  // x: logprob, old_logprob, advantage; p: clip_min, clip_max, dual_clip
  static constexpr int inputs = 3, coefficients = 1;
  static constexpr bool last_is_max = true;
  template <typename T> static RLHF_HD Terms<T> at(const T* x, const T* p) {
    const T log_ratio = x[0] - x[1], advantage = x[2];
    const bool saturated = std::fabs(log_ratio) > T(20);
    const T ratio = std::exp(saturated ? std::copysign(T(20), log_ratio) : log_ratio);
    const T bounded = ratio < p[0] ? p[0] : (ratio > p[1] ? p[1] : ratio);
    const bool clipped = bounded * advantage < ratio * advantage;
    const bool dual = advantage < 0 && ratio > p[2];
    Terms<T> out;
    out.loss = -(dual ? p[2] : (clipped ? bounded : ratio)) * advantage;
    out.coefficients[0] = clipped || dual || saturated ? T(0) : -ratio * advantage;
    out.metrics[0] = clipped || dual ? T(1) : T(0);
    out.metrics[1] = exp_minus_1_minus(log_ratio);
    out.metrics[2] = out.metrics[3] = ratio;
    return out;
  }
};

struct Value {  // x: value, return
  static constexpr int inputs = 2, coefficients = 1;
  static constexpr bool last_is_max = false;
  template <typename T> static RLHF_HD Terms<T> at(const T* x, const T*) {
    Terms<T> out;
    out.coefficients[0] = x[0] - x[1];
    out.loss = T(0.5) * out.coefficients[0] * out.coefficients[0];
    return out;
  }
};

struct ValueClip {  // x: value, return, old_value; p: clip_eps
  static constexpr int inputs = 3, coefficients = 1;
  static constexpr bool last_is_max = false;
  template <typename T> static RLHF_HD Terms<T> at(const T* x, const T* p) {
    const T low = x[2] - p[0], high = x[2] + p[0];
    const T bounded = x[0] < low ? low : (x[0] > high ? high : x[0]);
    const T error = x[0] - x[1], bounded_error = bounded - x[1];
    const bool clipped = bounded_error * bounded_error > error * error;
    const T active = clipped ? bounded_error : error;
    Terms<T> out;
    out.loss = T(0.5) * active * active;
    out.coefficients[0] = clipped ? T(0) : error;
    out.metrics[0] = clipped ? T(1) : T(0);
    return out;
  }
};

// A reward model's step scores against labels in [0, 1].
struct StepBce {  // x: score (a logit), label
  static constexpr int inputs = 2, coefficients = 1;
  static constexpr bool last_is_max = false;
  template <typename T> static RLHF_HD Terms<T> at(const T* x, const T*) {
    Terms<T> out;
    out.loss = x[1] * softplus(-x[0]) + (1 - x[1]) * softplus(x[0]);
    out.coefficients[0] = (1 - x[1]) * sigmoid(x[0]) - x[1] * sigmoid(-x[0]);
    out.metrics[0] = (x[0] > 0) == (x[1] > T(0.5)) ? T(1) : T(0);
    return out;
  }
};

struct StepMse {  // x: score, label
  static constexpr int inputs = 2, coefficients = 1;
  static constexpr bool last_is_max = false;
  template <typename T> static RLHF_HD Terms<T> at(const T* x, const T*) {
    const T error = x[0] - x[1];
    Terms<T> out;
    out.loss = error * error;
    out.coefficients[0] = 2 * error;
    out.metrics[0] = (x[0] > T(0.5)) == (x[1] > T(0.5)) ? T(1) : T(0);
    return out;
  }
};

}  // namespace rlhf
