#include "cpu/kl_estimate.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "math/kl_estimate.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 1024;

// No clones per instruction set: the time is in expm1.
template <typename F, typename C> void block(const KlEstimate& op, int64_t start, int64_t n) {
  C logprobs[kBlock], ref_logprobs[kBlock];
  read(op.logprobs, op.columns, start, n, logprobs);
  read(op.ref_logprobs, op.columns, start, n, ref_logprobs);
  C* value = static_cast<C*>(op.value) + start;
  C* derivative = static_cast<C*>(op.derivative) + start;
  for (int64_t i = 0; i < n; ++i) {
    const Estimate<C> estimate = F::at(ref_logprobs[i] - logprobs[i]);
    value[i] = estimate.value;
    derivative[i] = -estimate.derivative;
  }
}

template <typename F> void run(const KlEstimate& op, int threads) {
  const int64_t n = op.rows * op.columns;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > kBlock)
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = std::min(kBlock, n - start);
    op.is_double ? block<F, double>(op, start, count) : block<F, float>(op, start, count);
  }
}

const std::map<std::string, void (*)(const KlEstimate&, int)> kEstimators = {
    {"k1", run<K1>}, {"k2", run<K2>}, {"k3", run<K3>}};

}  // namespace

void kl_estimate(const std::string& estimator, const KlEstimate& op, int threads) {
  const auto found = kEstimators.find(estimator);
  if (found == kEstimators.end()) throw std::invalid_argument("no native estimator " + estimator);
  found->second(op, threads);
}

}  // namespace rlhf::cpu
