#include "cpu/token_logprobs.h"

#include <algorithm>

#include "cpu/simd.h"
#include "math/token_logprobs.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // logits at a time: read once from memory, then from the first-level cache

// Statistics of up to kBlock logits divided by the temperature; `skip` (or -1) is left out.
template <typename T, typename C>
RLHF_INLINE Stats<C> block_stats(const T* logits, int64_t n, int64_t skip, C temperature, bool want_entropy) {
  C z[kBlock];
  if (temperature == 1) {
    for (int64_t i = 0; i < n; ++i) z[i] = load(logits[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) z[i] = load(logits[i]) / temperature;
  }
  if (skip >= 0 && skip < n) z[skip] = -infinity<C>();
  C max = -infinity<C>();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = z[i] > max ? z[i] : max;
  const C shift = max == -infinity<C>() ? C(0) : max;
  C rest = 0, ties = 0, spread = 0;
  if (want_entropy) {
#pragma omp simd reduction(+ : rest, ties, spread)
    for (int64_t i = 0; i < n; ++i) {
      const C d = z[i] - shift, e = exp_neg(d);
      rest += d == 0 ? C(0) : e;
      ties += d == 0 ? C(1) : C(0);
      spread += e == 0 ? C(0) : e * -d;
    }
  } else {
#pragma omp simd reduction(+ : rest, ties)
    for (int64_t i = 0; i < n; ++i) {
      const C d = z[i] - shift, e = exp_neg(d);
      rest += d == 0 ? C(0) : e;
      ties += d == 0 ? C(1) : C(0);
    }
  }
  return {max, rest + (ties - 1), spread};  // of nothing but -inf: no_stats
}

template <typename T, typename C>
RLHF_INLINE void row_gradient(const T* logits, T* gradient, int64_t vocabulary, int64_t target, C temperature, C logprob,
                              C entropy, C max, C logsum, C grad_logprob, C grad_entropy) {
  const C scale = 1 / temperature;
  const C target_logit = load(logits[target]) / temperature;  // read before it may be overwritten
  if (grad_entropy == 0) {
    const C g = -grad_logprob * scale;
#pragma omp simd
    for (int64_t i = 0; i < vocabulary; ++i) {
      const C z = load(logits[i]) / temperature;
      store(gradient[i], g * exp_neg((z - max) - logsum));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < vocabulary; ++i) {
      const C z = load(logits[i]) / temperature;
      const C log_p = (z - max) - logsum, p = exp_neg(log_p);
      const C g = -(grad_logprob + grad_entropy * (log_p + entropy));
      store(gradient[i], p == 0 ? C(0) : scale * g * p);
    }
  }
  const C log_p = (target_logit - max) - logsum, p = exp_neg(log_p);
  const C through_entropy = p == 0 ? C(0) : -grad_entropy * p * (log_p + entropy);
  store(gradient[target], scale * (grad_logprob * -std::expm1(logprob) + through_entropy));
}

template <typename T>
RLHF_INLINE void forward_rows(const TokenLogprobs& op, void* gradient, int64_t begin, int64_t end) {
  using C = typename Compute<T>::type;
  auto* logprobs = static_cast<C*>(op.logprobs);
  auto* entropy = static_cast<C*>(op.entropy);
  auto* row_max = static_cast<C*>(op.row_max);
  auto* row_logsum = static_cast<C*>(op.row_logsum);
  const C temperature = C(op.temperature);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = op.rows.offset(row), target = op.targets[row];
    const T* logits = static_cast<const T*>(op.logits) + offset;
    T* row_out = gradient ? static_cast<T*>(gradient) + offset : nullptr;
    if ((op.mask && !op.mask[row]) || target < 0 || target >= op.vocabulary) {
      logprobs[row] = row_max[row] = row_logsum[row] = 0;
      if (op.want_entropy) entropy[row] = 0;
      if (row_out) std::fill(row_out, row_out + op.vocabulary, T{});
      continue;
    }
    Stats<C> others = no_stats(-infinity<C>());
    for (int64_t start = 0; start < op.vocabulary; start += kBlock) {
      const int64_t n = std::min(kBlock, op.vocabulary - start);
      others = merge(others, block_stats(logits + start, n, target - start, temperature, op.want_entropy));
    }
    const auto result = finish(others, C(load(logits[target]) / temperature), -infinity<C>());
    logprobs[row] = result.logprob;
    row_max[row] = result.max;
    row_logsum[row] = result.logsum;
    if (op.want_entropy) entropy[row] = result.entropy;
    if (row_out)
      row_gradient(logits, row_out, op.vocabulary, target, temperature, result.logprob, result.entropy, result.max,
                   result.logsum, C(1), C(0));
  }
}

template <typename T>
RLHF_INLINE void backward_rows(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy, void* gradient,
                               Rows gradient_rows, int64_t begin, int64_t end) {
  using C = typename Compute<T>::type;
  for (int64_t row = begin; row < end; ++row) {
    const T* logits = static_cast<const T*>(op.logits) + op.rows.offset(row);
    T* out = static_cast<T*>(gradient) + gradient_rows.offset(row);
    const C g_logprob = grad_logprobs ? static_cast<const C*>(grad_logprobs)[row] : C(0);
    const C g_entropy = grad_entropy ? static_cast<const C*>(grad_entropy)[row] : C(0);
    if ((op.mask && !op.mask[row]) || (g_logprob == 0 && g_entropy == 0)) {
      std::fill(out, out + op.vocabulary, T{});
      continue;
    }
    row_gradient(logits, out, op.vocabulary, op.targets[row], C(op.temperature), static_cast<const C*>(op.logprobs)[row],
                 op.entropy ? static_cast<const C*>(op.entropy)[row] : C(0), static_cast<const C*>(op.row_max)[row],
                 static_cast<const C*>(op.row_logsum)[row], g_logprob, g_entropy);
  }
}

#define RLHF_FOR_DTYPE(NAME, T)                                                                               \
  RLHF_CLONES void forward_##NAME(const TokenLogprobs& op, void* gradient, int64_t begin, int64_t end) {      \
    forward_rows<T>(op, gradient, begin, end);                                                                \
  }                                                                                                           \
  RLHF_CLONES void backward_##NAME(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy, \
                                   void* gradient, Rows gradient_rows, int64_t begin, int64_t end) {          \
    backward_rows<T>(op, grad_logprobs, grad_entropy, gradient, gradient_rows, begin, end);                   \
  }
RLHF_FOR_DTYPE(f32, float)
RLHF_FOR_DTYPE(f64, double)
RLHF_FOR_DTYPE(bf16, bf16)
RLHF_FOR_DTYPE(f16, f16)

// In the order of DType.
constexpr decltype(&forward_f32) kForward[] = {forward_f32, forward_f64, forward_bf16, forward_f16};
constexpr decltype(&backward_f32) kBackward[] = {backward_f32, backward_f64, backward_bf16, backward_f16};

}  // namespace

void token_logprobs_forward(const TokenLogprobs& op, void* gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < op.rows.count(); ++row) kForward[int(op.dtype)](op, gradient, row, row + 1);
}

void token_logprobs_backward(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy,
                             void* gradient, Rows gradient_rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < op.rows.count(); ++row)
    kBackward[int(op.dtype)](op, grad_logprobs, grad_entropy, gradient, gradient_rows, row, row + 1);
}

}  // namespace rlhf::cpu
