#include "cpu/kl_estimate.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "math/kl_estimate.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 1024;

struct Call : KlEstimate {
  KlVariant variant, gradient;  // of the value, of the derivative
  bool own;                     // the derivative is that of the value, clips and weight included
};

template <typename E, typename C> RLHF_INLINE void each(const C* x, int64_t n, C* values, C* slopes) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Sloped<C> estimate = E::at(x[i]);
    values[i] = estimate.value, slopes[i] = estimate.slope;
  }
}
template <typename C> RLHF_INLINE void estimates(KlVariant variant, const C* x, int64_t n, C* values, C* slopes) {
  if (variant == KlVariant::k1) each<K1>(x, n, values, slopes);
  else if (variant == KlVariant::k2) each<K2>(x, n, values, slopes);
  else each<K3>(x, n, values, slopes);
}

template <typename C> RLHF_INLINE void block(const Call& op, int64_t start, int64_t n) {
  C logprobs[kBlock], log_ratios[kBlock], x[kBlock], weights[kBlock], values[kBlock], slopes[kBlock], unwanted[kBlock];
  const C log_ratio_clip = C(op.log_ratio_clip), value_clip = C(op.value_clip), weight_clip = C(op.weight_clip);
  const bool weighted = op.old_logprobs.data, through_weight = weighted & op.own;
  read(op.logprobs, op.columns, start, n, logprobs);
  read(op.ref_logprobs, op.columns, start, n, log_ratios);
  if (weighted) read(op.old_logprobs, op.columns, start, n, weights);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    weights[i] = weighted ? exp_any(logprobs[i] - weights[i]) : C(1);
    log_ratios[i] -= logprobs[i];
    x[i] = bounded(log_ratios[i], -log_ratio_clip, log_ratio_clip);
  }
  estimates(op.variant, x, n, values, slopes);
  if (op.own) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const bool inside = (x[i] == log_ratios[i]) & (values[i] == bounded(values[i], -value_clip, value_clip));
      slopes[i] = inside ? slopes[i] : C(0);
    }
  } else {
    estimates(op.gradient, log_ratios, n, unwanted, slopes);
  }
  C* out = static_cast<C*>(op.value) + start;
  C* by_logprob = op.by_logprob ? static_cast<C*>(op.by_logprob) + start : unwanted;
  C* by_ref = op.by_ref ? static_cast<C*>(op.by_ref) + start : unwanted;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const C value = bounded(values[i], -value_clip, value_clip);
    const bool capped = weighted & (weights[i] > weight_clip);
    const C weight = capped ? weight_clip : weights[i];
    out[i] = product(weight, value);
    by_logprob[i] = product(weight, (through_weight & !capped ? value : C(0)) - slopes[i]);
    by_ref[i] = product(weight, slopes[i]);
  }
}

// Cloned per instruction set for float; double spends its time in the library's exp.
RLHF_CLONES void block_f32(const Call& op, int64_t start, int64_t n) { block<float>(op, start, n); }
void block_f64(const Call& op, int64_t start, int64_t n) { block<double>(op, start, n); }

}  // namespace

void kl_estimate(const std::string& variant, const std::string& gradient, const KlEstimate& given, int threads) {
  const bool own = gradient == "own";
  const Call op{given, named(kKlVariants, "KL estimate", variant),
                named(kKlVariants, "KL estimate", own ? variant : gradient), own};
  const int64_t n = op.rows * op.columns;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > kBlock)
  for (int64_t start = 0; start < n; start += kBlock)
    (op.is_double ? block_f64 : block_f32)(op, start, std::min(kBlock, n - start));
}

}  // namespace rlhf::cpu
