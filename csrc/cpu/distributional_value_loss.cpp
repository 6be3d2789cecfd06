#include "cpu/distributional_value_loss.h"

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/mask.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kParts = 64;  // partial sums, however many threads there are: the same inputs give the same bits

constexpr int32_t kLanes = 16;  // rows are padded to a multiple of this, and no loop has a rest

struct Sums {
  double loss = 0, outside = 0;
};

// erf(x) to about 1 unit in the last place: x + x P(x^2) near 0, 1 - exp(Q(|x|)) from 0.9, exactly +-1 from 3.93.
// Both are minimax polynomials.
RLHF_INLINE float erf_any(float x) {
  const float size = std::fabs(x), a = size > 3.93f ? 3.93f : size, square = a * a;
  float near = -6.0905327122e-4f;
  near = near * square + 5.0120015539e-3f;
  near = near * square - 2.6778940547e-2f;
  near = near * square + 1.1282141944e-1f;
  near = near * square - 3.7612523442e-1f;
  near = near * square + 1.2837915387e-1f;
  float far = -2.0909608869e-5f;
  far = far * a + 4.3230358465e-4f;
  far = far * a - 4.1605296302e-3f;
  far = far * a + 2.5091503294e-2f;
  far = far * a - 1.0823662877e-1f;
  far = far * a - 6.3338663853e-1f;
  far = far * a - 1.1294951628f;
  far = far * a + 1.7055275476e-4f;
  return std::copysign(a < 0.9f ? near * a + a : 1.0f - exp_neg(far), x);
}
RLHF_INLINE double erf_any(double x) { return std::erf(x); }

// target[i] = the probability of bin i, 0 for the padding; a return outside of the bins counts as the nearer end.
template <typename C>
RLHF_INLINE void histogram(const DistributionalValueLoss& op, C value, int32_t padded, C* cumulative, C* target) {
  const C low = C(op.v_min), high = C(op.v_max), width = C((op.v_max - op.v_min) / op.bins);
  const C scale = C(1 / (op.sigma * 1.4142135623730951));
  const C shift = low - (value < low ? low : (value > high ? high : value));
  const int32_t bins = int32_t(op.bins);
  for (int32_t i = 0; i < padded; ++i) cumulative[i] = erf_any((shift + C(i < bins ? i : bins) * width) * scale);
  cumulative[padded] = erf_any((shift + C(bins) * width) * scale);
  const C total = cumulative[bins] - cumulative[0];
  for (int32_t i = 0; i < padded; ++i) {
    const C part = cumulative[i + 1] - cumulative[i];
    target[i] = (part > 0 ? part : C(0)) / total;  // rounding may leave less than nothing
  }
}

// Rows [begin, end); gradients are of loss * denominator times `share`.
template <typename T, typename C>
RLHF_INLINE Sums part(const DistributionalValueLoss& op, int64_t begin, int64_t end, C share) {
  const C width = C((op.v_max - op.v_min) / op.bins);
  const int32_t bins = int32_t(op.bins), padded = (bins + kLanes - 1) / kLanes * kLanes;
  std::vector<C> room(4 * padded + 1);
  C *target = room.data(), *z = target + padded, *q = z + padded, *cumulative = q + padded;
  std::fill(z, z + padded, -infinity<C>());
  Sums sums;
  for (int64_t i = begin; i < end; ++i) {
    C* gradient = static_cast<C*>(op.coefficients) + i * op.bins;
    C& value = static_cast<C*>(op.values)[i];
    if (op.mask && !op.mask[i]) {
      value = 0;
      std::fill(gradient, gradient + bins, C(0));
      continue;
    }
    const T* logits = static_cast<const T*>(op.logits) + i * op.row_stride;
    const C wanted = static_cast<const C*>(op.returns)[i];
    histogram(op, wanted, padded, cumulative, target);
    C greatest = -infinity<C>(), total = 0, cross = 0, mean = 0;
    for (int32_t k = 0; k < bins; ++k) z[k] = load(logits[k]);
#pragma omp simd reduction(max : greatest)
    for (int32_t k = 0; k < padded; ++k) greatest = z[k] > greatest ? z[k] : greatest;
#pragma omp simd reduction(+ : total, mean, cross)
    for (int32_t k = 0; k < padded; ++k) {
      const C below = z[k] - greatest;
      q[k] = exp_neg(below);
      total += q[k];
      mean += q[k] * (C(k) + C(0.5));
      cross += target[k] == 0 ? C(0) : target[k] * below;
    }
    const C weight = share / total;
    for (int32_t k = 0; k < bins; ++k) gradient[k] = q[k] * weight - target[k] * share;
    value = C(op.v_min) + width * (mean / total);
    sums.loss += std::log(total) - cross;
    sums.outside += wanted < C(op.v_min) || wanted > C(op.v_max) ? 1 : 0;
  }
  return sums;
}

#define RLHF_PART(T)                                                                                            \
  RLHF_CLONES Sums part_of(T, const DistributionalValueLoss& op, int64_t begin, int64_t end, Compute<T>::type share) { \
    return part<T>(op, begin, end, share);                                                                           \
  }
RLHF_FOR_DTYPES(RLHF_PART)

template <typename T> void run(const DistributionalValueLoss& op, int threads) {
  using C = typename Compute<T>::type;
  const double denominator = denominator_of<C>(op.denominator, op.mask, op.rows);
  Sums parts[kParts], total;
#pragma omp parallel for num_threads(threads) schedule(static) if (op.rows > kParts)
  for (int64_t i = 0; i < kParts; ++i)
    parts[i] = part_of(T(), op, op.rows * i / kParts, op.rows * (i + 1) / kParts, C(1 / denominator));
  for (const Sums& sums : parts) {
    total.loss += sums.loss;
    total.outside += sums.outside;
  }
  *static_cast<C*>(op.loss) = C(total.loss / denominator);
  *static_cast<C*>(op.outside) = C(total.outside / denominator);
}

}  // namespace

void distributional_value_loss(const DistributionalValueLoss& op, int threads) {
  dispatch(op.dtype, [&](auto type) { run<decltype(type)>(op, threads); });
}

}  // namespace rlhf::cpu
