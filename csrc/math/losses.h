// One functor per loss variant: value and derivative of one element. Formulas: rlhf_fast/ops/<op>.py.
// A new variant is one functor here, one line in the table of cpu/losses.cpp and its twin in kernels/src/losses.py.
#pragma once
#include "math/scalar.h"

namespace rlhf {

// What an element contributes: its loss, d loss / d input k for the first inputs, and its metrics, which are
// averaged.
template <typename T> struct Terms {
  T loss = 0;
  T coefficients[2] = {};
  T metrics[4] = {};
};

struct Value {  // x: value, return
  static constexpr int inputs = 2, coefficients = 1;
  template <typename T> static RLHF_HD Terms<T> at(const T* x, const T*) {
    const T error = x[0] - x[1];
    return {T(0.5) * error * error, {error}};
  }
};

struct ValueClip {  // x: value, return, old_value; p: clip_eps
  static constexpr int inputs = 3, coefficients = 1;
  template <typename T> static RLHF_HD Terms<T> at(const T* x, const T* p) {
    const T low = x[2] - p[0], high = x[2] + p[0];
    const T inside = x[0] > high ? high : x[0], bounded = !(x[0] >= low) ? low : inside;  // NaN bounds give NaN
    const T error = x[0] - x[1], bounded_error = bounded - x[1];
    const bool clipped = bounded_error * bounded_error > error * error;
    const T active = clipped | (bounded_error != bounded_error) ? bounded_error : error;
    return {T(0.5) * active * active, {clipped ? T(0) : active}, {clipped ? T(1) : T(0)}};
  }
};

// A reward model's step scores against labels in [0, 1].
struct StepBce {  // x: score (a logit), label
  static constexpr int inputs = 2, coefficients = 1;
  template <typename T> static RLHF_HD Terms<T> at(const T* x, const T*) {
    return {product(x[1], softplus(-x[0])) + product(1 - x[1], softplus(x[0])),
            {(1 - x[1]) * sigmoid(x[0]) - x[1] * sigmoid(-x[0])},
            {(x[0] > 0) == (x[1] > T(0.5)) ? T(1) : T(0)}};
  }
};

struct StepMse {  // x: score, label
  static constexpr int inputs = 2, coefficients = 1;
  template <typename T> static RLHF_HD Terms<T> at(const T* x, const T*) {
    const T error = x[0] - x[1];
    return {error * error, {2 * error}, {(x[0] > T(0.5)) == (x[1] > T(0.5)) ? T(1) : T(0)}};
  }
};

}  // namespace rlhf
