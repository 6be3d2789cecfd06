#include "cpu/group_advantages.h"

#include "cpu/dispatch.h"
#include "math/group_advantages.h"

namespace rlhf::cpu {
namespace {

// In the order of GroupAdvantages::divisor.
template <typename C>
constexpr C (*kDivisors[])(const Moments<C>&, C) = {unit_divisor<C>, grpo_divisor<C>, rloo_divisor<C>,
                                                    pass_at_k_divisor<C>};

template <typename T> void group(const GroupAdvantages& op, int64_t g) {
  using C = typename Compute<T>::type;
  const int64_t begin = op.offsets ? op.offsets[g] : g * op.group_size;
  const int64_t end = op.offsets ? op.offsets[g + 1] : begin + op.group_size;
  if (begin == end) return;
  const auto position = [&](int64_t i) { return op.order ? op.order[i] : i; };
  const auto reward = [&](int64_t i) { return C(load(static_cast<const T*>(op.rewards)[position(i)])); };
  const auto weight = [&](int64_t i) { return op.weights ? static_cast<const C*>(op.weights)[position(i)] : C(1); };
  // Distances from the group's first reward: those of equal rewards are exactly 0, and so is their mean.
  const C first = reward(begin);
  C sum = 0, weights = 0, m2 = 0;
  for (int64_t i = begin; i < end; ++i) {
    sum += weight(i) * (reward(i) - first);
    weights += weight(i);
  }
  const C mean = sum / (weights == 0 ? C(1) : weights);
  for (int64_t i = begin; i < end; ++i) {
    const C distance = (reward(i) - first) - mean;
    m2 += distance * distance;
  }
  C divisor = kDivisors<C>[op.divisor](Moments<C>{C(end - begin), first + mean, m2}, C(op.parameter));
  if (divisor == 0) divisor = 1;  // without eps, a group of equal rewards
  for (int64_t i = begin; i < end; ++i)
    static_cast<C*>(op.advantages)[position(i)] = ((reward(i) - first) - mean) / divisor;
}

}  // namespace

void group_advantages(const GroupAdvantages& op, int threads) {
  dispatch(op.dtype, [&](auto type) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t g = 0; g < op.groups; ++g) group<decltype(type)>(op, g);
  });
}

}  // namespace rlhf::cpu
