// Scalar functions without cancellation or overflow, for the host and the device.
#pragma once
#include <cmath>
#include <limits>

#include "math/elementary.h"

namespace rlhf {

template <typename T> constexpr T infinity() { return std::numeric_limits<T>::infinity(); }

// Value and slope of a function of one number.
template <typename T> struct Sloped {
  T value, slope;
};

// x within [low, high]; NaN stays NaN. Choices are made one after the other, not one within the other: each is then one
// blend of the vectoriser.
template <typename T> RLHF_HD T bounded(T x, T low, T high) {
  const T raised = x < low ? low : x;
  return raised > high ? high : raised;
}

// weight * x, where a weight of 0 takes x out: 0 times infinity is 0.
template <typename T> RLHF_HD T product(T weight, T x) { return weight == 0 ? T(0) : weight * x; }

// log(1 + exp(x))
template <typename T> RLHF_HD T softplus(T x) { return (x > 0 ? x : T(0)) + log1p_any(exp_neg(-std::fabs(x))); }

// 1 / (1 + exp(-x))
template <typename T> RLHF_HD T sigmoid(T x) {
  const T e = exp_neg(-std::fabs(x));
  return (x < 0 ? e : T(1)) / (1 + e);
}

}  // namespace rlhf
