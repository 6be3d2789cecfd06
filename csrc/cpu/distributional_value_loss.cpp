#include "cpu/distributional_value_loss.h"

#include <algorithm>
#include <vector>

#include "cpu/simd.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kParts = 64;  // partial sums, however many threads there are: the same inputs give the same bits

struct Sums {
  double loss = 0, outside = 0, count = 0;
};

// target[i] = the probability of bin i; a return outside of the bins counts as the nearer end.
template <typename C> RLHF_INLINE void histogram(const DistributionalValueLoss& op, C value, C* target) {
  const C low = C(op.v_min), high = C(op.v_max), width = C((op.v_max - op.v_min) / op.bins);
  const C spread = C(op.sigma * 1.4142135623730951);
  const C shift = low - (value < low ? low : (value > high ? high : value));
  const C first = std::erf(shift / spread);
  C below = first;
  for (int64_t i = 0; i < op.bins; ++i) {
    const C above = std::erf((shift + C(i + 1) * width) / spread);
    target[i] = above - below;
    below = above;
  }
  for (int64_t i = 0; i < op.bins; ++i) target[i] /= below - first;
}

// Rows [begin, end).
template <typename T, typename C> RLHF_INLINE Sums part(const DistributionalValueLoss& op, int64_t begin, int64_t end) {
  const C width = C((op.v_max - op.v_min) / op.bins);
  std::vector<C> room(2 * op.bins);
  C *target = room.data(), *z = target + op.bins;
  Sums sums;
  for (int64_t i = begin; i < end; ++i) {
    C* gradient = static_cast<C*>(op.coefficients) + i * op.bins;
    C& value = static_cast<C*>(op.values)[i];
    value = 0;
    std::fill(gradient, gradient + op.bins, C(0));
    if (op.mask && !op.mask[i]) continue;
    const T* logits = static_cast<const T*>(op.logits) + i * op.row_stride;
    const C wanted = static_cast<const C*>(op.returns)[i];
    histogram(op, wanted, target);
    C greatest = -infinity<C>(), total = 0, cross = 0, mean = 0;
    for (int64_t k = 0; k < op.bins; ++k) z[k] = load(logits[k]);
    for (int64_t k = 0; k < op.bins; ++k) greatest = z[k] > greatest ? z[k] : greatest;
    for (int64_t k = 0; k < op.bins; ++k) z[k] -= greatest;
    for (int64_t k = 0; k < op.bins; ++k) gradient[k] = exp_neg(z[k]);
#pragma omp simd reduction(+ : total, mean, cross)
    for (int64_t k = 0; k < op.bins; ++k) {
      total += gradient[k];
      mean += gradient[k] * (C(k) + C(0.5));
      cross += target[k] == 0 ? C(0) : target[k] * z[k];
    }
    for (int64_t k = 0; k < op.bins; ++k) gradient[k] = gradient[k] / total - target[k];
    value = C(op.v_min) + width * (mean / total);
    sums.loss += std::log(total) - cross;
    sums.outside += wanted < C(op.v_min) || wanted > C(op.v_max) ? 1 : 0;
    sums.count += 1;
  }
  return sums;
}

#define RLHF_FOR_DTYPE(T)                                                                                 \
  RLHF_CLONES Sums part_of(T, const DistributionalValueLoss& op, int64_t begin, int64_t end) {            \
    return part<T, Compute<T>::type>(op, begin, end);                                                     \
  }
RLHF_FOR_DTYPE(float)
RLHF_FOR_DTYPE(double)
RLHF_FOR_DTYPE(bf16)
RLHF_FOR_DTYPE(f16)

template <typename T> void run(const DistributionalValueLoss& op, int threads) {
  using C = typename Compute<T>::type;
  Sums parts[kParts], total;
#pragma omp parallel for num_threads(threads) schedule(static) if (op.rows > kParts)
  for (int64_t i = 0; i < kParts; ++i) parts[i] = part_of(T(), op, op.rows * i / kParts, op.rows * (i + 1) / kParts);
  for (const Sums& sums : parts) {
    total.loss += sums.loss;
    total.outside += sums.outside;
    total.count += sums.count;
  }
  double denominator = op.denominator ? double(*static_cast<const C*>(op.denominator)) : total.count;
  if (denominator == 0) denominator = 1;  // nothing counts: every sum is 0
  *static_cast<C*>(op.loss) = C(total.loss / denominator);
  static_cast<C*>(op.means)[0] = C(total.outside / denominator);
  static_cast<C*>(op.means)[1] = C(denominator);
}

}  // namespace

void distributional_value_loss(const DistributionalValueLoss& op, int threads) {
  switch (op.dtype) {
    case DType::f32: return run<float>(op, threads);
    case DType::f64: return run<double>(op, threads);
    case DType::bf16: return run<bf16>(op, threads);
    case DType::f16: return run<f16>(op, threads);
  }
}

}  // namespace rlhf::cpu
