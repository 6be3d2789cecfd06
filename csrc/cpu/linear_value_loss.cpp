// Dot products are vectorised by regrouping them, which the compiler must be allowed; NaN and inf still hold.
#pragma GCC optimize("associative-math", "no-signed-zeros")
#include "cpu/linear_value_loss.h"

#include <algorithm>
#include <vector>

#include "cpu/simd.h"
#include "math/losses.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kParts = 32;  // partial sums, however many threads there are: the same inputs give the same bits

struct Sums {
  double loss = 0, clipped = 0, count = 0, coefficients = 0;
};

// The row is widened once, into memory that stays in the first-level cache for its two uses.
template <typename T, typename C> RLHF_INLINE C dot(const T* hidden, const C* weight, int64_t width, C* row) {
  C sum = 0;
  for (int64_t k = 0; k < width; ++k) row[k] = load(hidden[k]);
  for (int64_t k = 0; k < width; ++k) sum += row[k] * weight[k];
  return sum;
}

template <typename C> RLHF_INLINE void add_scaled(C factor, const C* row, int64_t width, C* sums) {
#pragma omp simd
  for (int64_t k = 0; k < width; ++k) sums[k] += factor * row[k];
}

// Rows [begin, end); weight_sums (width,) or null.
template <typename T, typename C>
RLHF_INLINE Sums part(const LinearValueLoss& op, int64_t begin, int64_t end, C* weight_sums) {
  const C p[] = {C(op.clip_eps)}, bias = op.bias ? *static_cast<const C*>(op.bias) : C(0);
  std::vector<C> row(op.width);
  Sums sums;
  for (int64_t i = begin; i < end; ++i) {
    C value = 0;
    Terms<C> terms;
    if (!op.mask || op.mask[i]) {
      const T* hidden = static_cast<const T*>(op.hidden) + i * op.row_stride;
      value = dot(hidden, static_cast<const C*>(op.weight), op.width, row.data()) + bias;
      const C* old_values = static_cast<const C*>(op.old_values);
      const C x[] = {value, static_cast<const C*>(op.returns)[i], old_values ? old_values[i] : C(0)};
      terms = old_values ? ValueClip::at(x, p) : Value::at(x, p);
      sums.count += 1;
      if (weight_sums) add_scaled(terms.coefficients[0], row.data(), op.width, weight_sums);
    }
    static_cast<C*>(op.values)[i] = value;
    static_cast<C*>(op.coefficients)[i] = terms.coefficients[0];
    sums.loss += terms.loss;
    sums.clipped += terms.metrics[0];
    sums.coefficients += terms.coefficients[0];
  }
  return sums;
}

#define RLHF_FOR_DTYPE(T)                                                                                             \
  RLHF_CLONES Sums part_of(T, const LinearValueLoss& op, int64_t begin, int64_t end, Compute<T>::type* weight_sums) { \
    return part<T>(op, begin, end, weight_sums);                                                                      \
  }
RLHF_FOR_DTYPE(float)
RLHF_FOR_DTYPE(double)
RLHF_FOR_DTYPE(bf16)
RLHF_FOR_DTYPE(f16)

template <typename T> void run(const LinearValueLoss& op, int threads) {
  using C = typename Compute<T>::type;
  Sums parts[kParts], total;
  std::vector<C> weight_sums(op.weight_sums ? kParts * op.width : 0);
#pragma omp parallel for num_threads(threads) schedule(static) if (op.rows > kParts)
  for (int64_t i = 0; i < kParts; ++i)
    parts[i] = part_of(T(), op, op.rows * i / kParts, op.rows * (i + 1) / kParts,
                       op.weight_sums ? weight_sums.data() + i * op.width : nullptr);
  for (const Sums& sums : parts) {
    total.loss += sums.loss;
    total.clipped += sums.clipped;
    total.count += sums.count;
    total.coefficients += sums.coefficients;
  }
  double denominator = op.denominator ? double(*static_cast<const C*>(op.denominator)) : total.count;
  if (denominator == 0) denominator = 1;  // nothing counts: every sum is 0
  *static_cast<C*>(op.loss) = C(total.loss / denominator);
  static_cast<C*>(op.means)[0] = C(total.clipped / denominator);
  static_cast<C*>(op.means)[1] = C(denominator);
  if (op.bias_sum) *static_cast<C*>(op.bias_sum) = C(total.coefficients);
  if (!op.weight_sums) return;
  C* out = static_cast<C*>(op.weight_sums);
  std::fill(out, out + op.width, C(0));
  for (int64_t i = 0; i < kParts; ++i) add_scaled(C(1), weight_sums.data() + i * op.width, op.width, out);
}

}  // namespace

void linear_value_loss(const LinearValueLoss& op, int threads) {
  switch (op.dtype) {
    case DType::f32: return run<float>(op, threads);
    case DType::f64: return run<double>(op, threads);
    case DType::bf16: return run<bf16>(op, threads);
    case DType::f16: return run<f16>(op, threads);
  }
}

}  // namespace rlhf::cpu
