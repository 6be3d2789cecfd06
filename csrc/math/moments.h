// Count, mean and sum of squared deviations of a set of numbers, combined without cancellation
// (Chan, Golub & LeVeque 1983, eq. 2.1).
#pragma once
#include "math/host_device.h"

namespace rlhf {

template <typename T> struct Moments {
  T count, mean, m2;
  // Unbiased; 0 for fewer than two numbers.
  RLHF_HD T variance() const { return count > 1 ? m2 / (count - 1) : T(0); }
};

template <typename T> RLHF_HD Moments<T> merge(Moments<T> a, Moments<T> b) {
  const T count = a.count + b.count;
  if (count == 0) return a;
  const T delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

}  // namespace rlhf
