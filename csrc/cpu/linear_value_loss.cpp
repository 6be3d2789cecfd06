// Dot products are vectorised by regrouping them, which the compiler must be allowed; NaN and inf still hold.
#pragma GCC optimize("associative-math", "no-signed-zeros")
#include "cpu/linear_value_loss.h"

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/mask.h"
#include "math/losses.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kParts = 32;  // partial sums, however many threads there are: the same inputs give the same bits

constexpr int64_t kAlone = 1 << 19;  // elements that one thread reads while another one wakes up
constexpr int kRows = 4;  // taken together: independent sums for the processor, one read of the weight and its sums

struct Sums {
  double loss = 0, clipped = 0, coefficients = 0;
};

template <typename T, typename C>
RLHF_INLINE void dots(const T* const* rows, const C* weight, int64_t width, C* out) {
  const T *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  C with_a = 0, with_b = 0, with_c = 0, with_d = 0;
  for (int64_t k = 0; k < width; ++k) {
    with_a += load(a[k]) * weight[k];
    with_b += load(b[k]) * weight[k];
    with_c += load(c[k]) * weight[k];
    with_d += load(d[k]) * weight[k];
  }
  out[0] = with_a, out[1] = with_b, out[2] = with_c, out[3] = with_d;
}

template <typename T, typename C>
RLHF_INLINE void add_scaled(const C* factors, const T* const* rows, int64_t width, C* sums) {
  const T *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
#pragma omp simd
  for (int64_t k = 0; k < width; ++k)
    sums[k] += factors[0] * load(a[k]) + factors[1] * load(b[k]) + (factors[2] * load(c[k]) + factors[3] * load(d[k]));
}

// Rows [begin, end) of a call that divides by 1 / share; weight_sums (width,) or null.
template <typename T, typename C>
RLHF_INLINE Sums part(const LinearValueLoss& op, int64_t begin, int64_t end, C share, C* weight_sums) {
  const C p[] = {C(op.clip_eps)}, bias = op.bias ? *static_cast<const C*>(op.bias) : C(0);
  const C *weight = static_cast<const C*>(op.weight), *returns = static_cast<const C*>(op.returns);
  const C* old_values = static_cast<const C*>(op.old_values);
  C *values = static_cast<C*>(op.values), *coefficients = static_cast<C*>(op.coefficients);
  Sums sums;
  for (int64_t next = begin; next < end;) {
    int64_t places[kRows];
    const T* rows[kRows];
    int count = 0;
    for (; next < end && count < kRows; ++next) {
      if (!op.mask || op.mask[next]) places[count++] = next;
      else values[next] = coefficients[next] = 0;
    }
    if (count == 0) break;
    for (int r = 0; r < kRows; ++r)
      rows[r] = static_cast<const T*>(op.hidden) + places[std::min(r, count - 1)] * op.row_stride;
    C found[kRows], factors[kRows] = {};
    dots(rows, weight, op.width, found);
    for (int r = 0; r < count; ++r) {
      const int64_t i = places[r];
      const C x[] = {found[r] + bias, returns[i], old_values ? old_values[i] : C(0)};
      const Terms<C> terms = old_values ? ValueClip::at(x, p) : Value::at(x, p);
      values[i] = x[0];
      coefficients[i] = factors[r] = terms.coefficients[0] * share;
      sums.loss += terms.loss;
      sums.clipped += terms.metrics[0];
      sums.coefficients += factors[r];
    }
    if (weight_sums) add_scaled(factors, rows, op.width, weight_sums);
  }
  return sums;
}

#define RLHF_PART(T)                                                                                 \
  RLHF_CLONES Sums part_of(T, const LinearValueLoss& op, int64_t begin, int64_t end, Compute<T>::type share, \
                           Compute<T>::type* weight_sums) {                                               \
    return part<T>(op, begin, end, share, weight_sums);                                                   \
  }
RLHF_FOR_DTYPES(RLHF_PART)

template <typename T> void run(const LinearValueLoss& op, int threads) {
  using C = typename Compute<T>::type;
  const double denominator = denominator_of<C>(op.denominator, op.mask, op.rows);
  Sums parts[kParts], total;
  std::vector<C> weight_sums(op.weight_sums ? kParts * op.width : 0);
#pragma omp parallel for num_threads(threads) schedule(static) if (op.rows * op.width > kAlone)
  for (int64_t i = 0; i < kParts; ++i)
    parts[i] = part_of(T(), op, op.rows * i / kParts, op.rows * (i + 1) / kParts, C(1 / denominator),
                       op.weight_sums ? weight_sums.data() + i * op.width : nullptr);
  for (const Sums& sums : parts) {
    total.loss += sums.loss;
    total.clipped += sums.clipped;
    total.coefficients += sums.coefficients;
  }
  *static_cast<C*>(op.loss) = C(total.loss / denominator);
  *static_cast<C*>(op.clip_fraction) = C(total.clipped / denominator);
  if (op.bias_sum) *static_cast<C*>(op.bias_sum) = C(total.coefficients);
  if (!op.weight_sums) return;
  C* out = static_cast<C*>(op.weight_sums);
  std::copy(weight_sums.data(), weight_sums.data() + op.width, out);
  for (int64_t i = 1; i < kParts; ++i)
    for (int64_t k = 0; k < op.width; ++k) out[k] += weight_sums[i * op.width + k];
}

}  // namespace

void linear_value_loss(const LinearValueLoss& op, int threads) {
  dispatch(op.dtype, [&](auto type) { run<decltype(type)>(op, threads); });
}

}  // namespace rlhf::cpu
