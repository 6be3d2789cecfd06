#include "cpu/shaped_rewards.h"

#include "cpu/dispatch.h"

namespace rlhf::cpu {
namespace {

template <typename T> RLHF_INLINE void rewards_of(const ShapedRewards& op, int64_t row) {
  using C = typename Compute<T>::type;
  const C clip = C(op.clip), coef = C(op.kl_coef);
  const T* kl = static_cast<const T*>(op.kl) + row * op.kl_stride;
  const uint8_t* mask = op.mask + row * op.time;
  C* rewards = static_cast<C*>(op.rewards) + row * op.time;
#pragma omp simd
  for (int64_t t = 0; t < op.time; ++t) rewards[t] = mask[t] ? product(-coef, load(kl[t])) : C(0);
  int64_t end = op.time - 1;
  while (end >= 0 && !mask[end]) --end;
  if (end >= 0) rewards[end] += bounded(static_cast<const C*>(op.scores)[row], -clip, clip);
}

#define RLHF_ROW(T) RLHF_CLONES void row(T, const ShapedRewards& op, int64_t row) { rewards_of<T>(op, row); }
RLHF_FOR_DTYPES(RLHF_ROW)

}  // namespace

void shaped_rewards(const ShapedRewards& op, int threads) {
  dispatch(op.dtype, [&](auto type) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < op.batch; ++i) row(type, op, i);
  });
}

}  // namespace rlhf::cpu
