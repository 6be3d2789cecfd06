#include "cpu/kl_estimate.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "math/kl_estimate.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 1024;

// No clones per instruction set: the time is in expm1.
template <typename E, typename G, typename C> void block(const KlEstimate& op, int64_t start, int64_t n) {
  C logprobs[kBlock], ref_logprobs[kBlock], old_logprobs[kBlock];
  read(op.logprobs, op.columns, start, n, logprobs);
  read(op.ref_logprobs, op.columns, start, n, ref_logprobs);
  const bool weighted = op.old_logprobs.data;
  if (weighted) read(op.old_logprobs, op.columns, start, n, old_logprobs);
  const KlClips<C> clips{C(op.log_ratio_clip), C(op.value_clip), C(op.weight_clip)};
  for (int64_t i = 0; i < n; ++i) {
    const C log_weight = weighted ? logprobs[i] - old_logprobs[i] : C(0);
    const auto result = estimate<E, G>(ref_logprobs[i] - logprobs[i], weighted, log_weight, clips);
    static_cast<C*>(op.value)[start + i] = result.value;
    static_cast<C*>(op.by_logprob)[start + i] = result.by_logprob;
    if (op.by_ref) static_cast<C*>(op.by_ref)[start + i] = result.by_ref;
  }
}

template <typename E, typename G> void run(const KlEstimate& op, int threads) {
  const int64_t n = op.rows * op.columns;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > kBlock)
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = std::min(kBlock, n - start);
    op.is_double ? block<E, G, double>(op, start, count) : block<E, G, float>(op, start, count);
  }
}

using Run = void (*)(const KlEstimate&, int);
template <typename E> std::map<std::string, Run> gradients() {
  return {{"own", run<E, Own>}, {"k1", run<E, K1>}, {"k2", run<E, K2>}, {"k3", run<E, K3>}};
}
const std::map<std::string, std::map<std::string, Run>> kEstimators = {
    {"k1", gradients<K1>()}, {"k2", gradients<K2>()}, {"k3", gradients<K3>()}};

}  // namespace

void kl_estimate(const std::string& estimator, const std::string& gradient, const KlEstimate& op, int threads) {
  const auto found = kEstimators.find(estimator);
  if (found == kEstimators.end() || !found->second.count(gradient))
    throw std::invalid_argument("no native estimator " + estimator + " with the gradient " + gradient);
  found->second.at(gradient)(op, threads);
}

}  // namespace rlhf::cpu
