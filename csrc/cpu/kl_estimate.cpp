#include "cpu/kl_estimate.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "math/kl_estimate.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 1024;

struct K3 {  // here, not with the others: with the exp that the vectoriser takes
  template <typename T> static RLHF_INLINE Slope<T> at(T x) {
    const ExpParts<T> e = exp_parts(x);
    const T near = e.minus_1_minus + x, far = e.exp - 1;
    return {e.minus_1_minus, (x < T(0.5)) & (x > T(-0.5)) ? near : far};
  }
};

// What is read of elements [start, start + n), once for all estimators.
template <typename C> struct Inputs {
  C logprobs[kBlock], ref_logprobs[kBlock], weights[kBlock];
};

template <typename E, typename G, typename C>
RLHF_INLINE void estimates(const KlEstimate& op, int64_t start, int64_t n, const Inputs<C>& in) {
  C unwanted[kBlock], by_ref[kBlock];
  const bool weighted = op.old_logprobs.data;
  const KlClips<C> clips{C(op.log_ratio_clip), C(op.value_clip), C(op.weight_clip)};
  C* value = static_cast<C*>(op.value) + start;
  C* by_logprob = op.by_logprob ? static_cast<C*>(op.by_logprob) + start : unwanted;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto result = estimate<E, G>(in.ref_logprobs[i] - in.logprobs[i], weighted, in.weights[i], clips);
    value[i] = result.value, by_logprob[i] = result.by_logprob, by_ref[i] = result.by_ref;
  }
  if (op.by_ref) std::copy(by_ref, by_ref + n, static_cast<C*>(op.by_ref) + start);
}

const std::map<std::string, int> kEstimators = {{"k1", 0}, {"k2", 1}, {"k3", 2}};
const std::map<std::string, int> kGradients = {{"own", 0}, {"k1", 1}, {"k2", 2}, {"k3", 3}};

template <typename E, typename C>
RLHF_INLINE void estimates_of(const KlEstimate& op, int gradient, int64_t start, int64_t n, const Inputs<C>& in) {
  if (gradient == 0) estimates<E, Own>(op, start, n, in);
  else if (gradient == 1) estimates<E, K1>(op, start, n, in);
  else if (gradient == 2) estimates<E, K2>(op, start, n, in);
  else estimates<E, K3>(op, start, n, in);
}

template <typename C>
RLHF_INLINE void block(const KlEstimate& op, int estimator, int gradient, int64_t start, int64_t n) {
  Inputs<C> in;
  read(op.logprobs, op.columns, start, n, in.logprobs);
  read(op.ref_logprobs, op.columns, start, n, in.ref_logprobs);
  const bool weighted = op.old_logprobs.data;
  if (weighted) read(op.old_logprobs, op.columns, start, n, in.weights);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) in.weights[i] = weighted ? exp_any(in.logprobs[i] - in.weights[i]) : C(1);
  if (estimator == 0) estimates_of<K1>(op, gradient, start, n, in);
  else if (estimator == 1) estimates_of<K2>(op, gradient, start, n, in);
  else estimates_of<K3>(op, gradient, start, n, in);
}

RLHF_CLONES void block_f32(const KlEstimate& op, int estimator, int gradient, int64_t start, int64_t n) {
  block<float>(op, estimator, gradient, start, n);
}
void block_f64(const KlEstimate& op, int estimator, int gradient, int64_t start, int64_t n) {
  block<double>(op, estimator, gradient, start, n);
}

}  // namespace

void kl_estimate(const std::string& estimator, const std::string& gradient, const KlEstimate& op, int threads) {
  const auto e = kEstimators.find(estimator);
  const auto g = kGradients.find(gradient);
  if (e == kEstimators.end() || g == kGradients.end())
    throw std::invalid_argument("no native estimator " + estimator + " with the gradient " + gradient);
  const int of_value = e->second, of_gradient = g->second;
  const int64_t n = op.rows * op.columns;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > kBlock)
  for (int64_t start = 0; start < n; start += kBlock)
    (op.is_double ? block_f64 : block_f32)(op, of_value, of_gradient, start, std::min(kBlock, n - start));
}

}  // namespace rlhf::cpu
