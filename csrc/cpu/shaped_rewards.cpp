#include "cpu/shaped_rewards.h"

#include "cpu/simd.h"

namespace rlhf::cpu {
namespace {

template <typename T> RLHF_INLINE void rows(const ShapedRewards& op, int64_t first, int64_t last) {
  using C = typename Compute<T>::type;
  const C clip = C(op.clip), coef = C(op.kl_coef);
  for (int64_t row = first; row < last; ++row) {
    const T* kl = static_cast<const T*>(op.kl) + row * op.kl_stride;
    const uint8_t* mask = op.mask + row * op.time;
    C* rewards = static_cast<C*>(op.rewards) + row * op.time;
#pragma omp simd
    for (int64_t t = 0; t < op.time; ++t) rewards[t] = mask[t] ? product(-coef, load(kl[t])) : C(0);
    int64_t end = op.time - 1;
    while (end >= 0 && !mask[end]) --end;
    if (end < 0) continue;
    const C score = static_cast<const C*>(op.scores)[row];
    rewards[end] += score > clip ? clip : (score < -clip ? -clip : score);  // NaN stays NaN
  }
}

#define RLHF_FOR_DTYPE(NAME, T) \
  RLHF_CLONES void rows_##NAME(const ShapedRewards& op, int64_t first, int64_t last) { rows<T>(op, first, last); }
RLHF_FOR_DTYPE(f32, float)
RLHF_FOR_DTYPE(f64, double)
RLHF_FOR_DTYPE(bf16, bf16)
RLHF_FOR_DTYPE(f16, f16)

// In the order of DType.
constexpr decltype(&rows_f32) kRows[] = {rows_f32, rows_f64, rows_bf16, rows_f16};

}  // namespace

void shaped_rewards(const ShapedRewards& op, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < op.batch; ++row) kRows[int(op.dtype)](op, row, row + 1);
}

}  // namespace rlhf::cpu
