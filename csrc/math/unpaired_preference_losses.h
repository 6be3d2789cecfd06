// One functor per loss of one answer that is desirable or not. Formulas: rlhf_fast/ops/preference/unpaired_preference_loss.py.
#pragma once
#include "math/losses.h"

namespace rlhf {

// u: by how much the reward lies on the right side of the shift.
struct KtoLoss {
  template <typename T> static RLHF_HD T value(T u) { return sigmoid(-u); }
  template <typename T> static RLHF_HD T slope(T u) { return -sigmoid(u) * sigmoid(-u); }
};
struct BcoLoss {
  template <typename T> static RLHF_HD T value(T u) { return softplus(-u); }
  template <typename T> static RLHF_HD T slope(T u) { return -sigmoid(-u); }
};

// x: logprob, ref_logprob, 1 for desirable or 0, weight, shift; p: beta, desirable_weight, undesirable_weight, scale of the
// shift. Metrics: whether desirable, reward where it is, whether undesirable, reward where it is; at last the mean rewards
// of both classes, 0 of none, and their difference.
template <typename Variant> struct Unpaired {
  static constexpr int inputs = 5, coefficients = 1;
  template <typename T> static RLHF_HD Terms<T> at(const T* x, const T* p) {
    const bool desirable = x[2] > 0;
    const T reward = p[0] * (x[0] - x[1]), sign = desirable ? T(1) : T(-1);
    const T weight = x[3] * (desirable ? p[1] : p[2]), u = sign * (reward - p[3] * x[4]);
    return {product(weight, Variant::value(u)), {product(weight, sign * p[0] * Variant::slope(u))},
            {desirable ? T(1) : T(0), desirable ? reward : T(0), desirable ? T(0) : T(1), desirable ? T(0) : reward}};
  }
  static void finish(double* metrics) {
    const double good = metrics[0] == 0 ? 0 : metrics[1] / metrics[0], bad = metrics[2] == 0 ? 0 : metrics[3] / metrics[2];
    metrics[0] = good, metrics[1] = bad, metrics[2] = good - bad;
  }
};

}  // namespace rlhf
