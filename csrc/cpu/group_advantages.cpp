#include "cpu/group_advantages.h"

#include "cpu/simd.h"
#include "math/group_advantages.h"

namespace rlhf::cpu {
namespace {

// In the order of GroupAdvantages::kind.
template <typename C>
constexpr C (*kDivisors[])(const Moments<C>&, C) = {grpo_divisor<C>, dr_grpo_divisor<C>, rloo_divisor<C>};

template <typename T> void group(const GroupAdvantages& op, int64_t g) {
  using C = typename Compute<T>::type;
  const int64_t begin = op.offsets ? op.offsets[g] : g * op.group_size;
  const int64_t end = op.offsets ? op.offsets[g + 1] : begin + op.group_size;
  if (begin == end) return;
  const auto position = [&](int64_t i) { return op.order ? op.order[i] : i; };
  const auto reward = [&](int64_t i) { return C(load(static_cast<const T*>(op.rewards)[position(i)])); };
  // Distances from the group's first reward: those of equal rewards are exactly 0, and so is their mean.
  const C first = reward(begin), count = C(end - begin);
  C sum = 0, m2 = 0;
  for (int64_t i = begin; i < end; ++i) sum += reward(i) - first;
  const C mean = sum / count;
  for (int64_t i = begin; i < end; ++i) {
    const C distance = (reward(i) - first) - mean;
    m2 += distance * distance;
  }
  C divisor = kDivisors<C>[op.kind](Moments<C>{count, mean, m2}, C(op.eps));
  if (divisor == 0) divisor = 1;  // without eps, a group of equal rewards
  for (int64_t i = begin; i < end; ++i) {
    static_cast<C*>(op.advantages)[position(i)] = ((reward(i) - first) - mean) / divisor;
  }
}

// In the order of DType.
constexpr decltype(&group<float>) kGroup[] = {group<float>, group<double>, group<bf16>, group<f16>};

}  // namespace

void group_advantages(const GroupAdvantages& op, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < op.groups; ++g) kGroup[int(op.dtype)](op, g);
}

}  // namespace rlhf::cpu
