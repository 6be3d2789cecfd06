#include "cpu/token_logprobs.h"

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // logits at a time: read once from memory, then from the first-level cache

template <typename C> C* part(void* of, int64_t at) { return of ? static_cast<C*>(of) + at : nullptr; }
template <typename C> const C* part(const void* of, int64_t at) { return of ? static_cast<const C*>(of) + at : nullptr; }

// Sums over a block with e = 2^t, t = (s - shift) * factor2: of e, e t and e^2 (kMore), and the maximal s. Where the
// maximum is above the shift the sums are void.
template <typename C> struct BlockSums {
  C max, sum, spread, squares;
};

template <bool kMore, typename X, typename C>
RLHF_INLINE BlockSums<C> block_sums(const X* s, int64_t n, C shift, C factor2) {
  C max = -infinity<C>(), sum = 0, spread = 0, squares = 0;
#pragma omp simd reduction(max : max) reduction(+ : sum, spread, squares)
  for (int64_t i = 0; i < n; ++i) {
    const C x = load(s[i]), t = (x - shift) * factor2, e = exp2_neg(t);
    max = x > max ? x : max;
    sum += e;
    if (kMore) {
      spread += e * (t > C(-127) ? t : C(-127));
      squares += e * e;
    }
  }
  return {max, sum, spread, squares};
}

// s = capped(x), and d s / d x where `slope` is given; returns the maximal x.
template <bool kSlope, typename T, typename C>
RLHF_INLINE C cap_block(const T* x, int64_t n, const RowTransform<C>& row, C* s, C* slope) {
  const C inner = row.scale / row.cap;
  C max = -infinity<C>();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) {
    const C u = load(x[i]), t = tanh_fast(u * inner);
    max = u > max ? u : max;
    s[i] = row.cap * t;
    if (kSlope) slope[i] = row.scale * tanh_slope_fast(u * inner);
  }
  return max;
}

// `stats` with a block of logits x, s = capped(x), added. Only a block with a new maximum is gone through twice.
template <bool kMore, typename T, typename X, typename C>
RLHF_INLINE Stats<C> add_block(Stats<C> stats, const T* x, const X* s, int64_t n, const RowTransform<C>& row,
                               const C* capped_max) {
  const C factor2 = C(row.factor * kLog2E);
  const C shift = stats.max == -infinity<C>() ? C(0) : row.capped(stats.max);
  const auto block = block_sums<kMore>(s, n, shift, factor2);
  const C max = capped_max ? *capped_max : block.max;
  if (!(max > stats.max)) {
    stats.rest += block.sum;
    stats.spread -= C(kLn2) * block.spread;
    stats.squares += block.squares;
    return stats;
  }
  C others[kBlock];
  for (int64_t i = 0; i < n; ++i) others[i] = load(s[i]);
  int64_t top = 0;
  while (C(load(x[top])) != max) ++top;
  const C leader = others[top];
  others[top] = -infinity<C>();
  const auto rest = block_sums<kMore>(others, n, leader, factor2);
  return merge(stats, Stats<C>{max, rest.sum, -C(kLn2) * rest.spread, rest.squares}, row);
}

template <bool kMore, typename T, typename C>
RLHF_INLINE Stats<C> row_stats(const T* logits, int64_t vocabulary, const RowTransform<C>& row) {
  Stats<C> stats = no_stats<C>();
  C s[kBlock];
  for (int64_t start = 0; start < vocabulary; start += kBlock) {
    const T* x = logits + start;
    const int64_t n = std::min(kBlock, vocabulary - start);
    if (row.cap > 0) {
      const C max = cap_block<false>(x, n, row, s, s);
      stats = add_block<kMore>(stats, x, s, n, row, &max);
    } else if constexpr (sizeof(T) < sizeof(C)) {  // widened apart: mixed widths cost a quarter more
      for (int64_t i = 0; i < n; ++i) s[i] = load(x[i]);
      stats = add_block<kMore>(stats, x, s, n, row, static_cast<const C*>(nullptr));
    } else {
      stats = add_block<kMore>(stats, x, x, n, row, static_cast<const C*>(nullptr));
    }
  }
  return stats;
}

// out = d L / d s of a block of s = capped(x), as if none of it were a target; `out` may be `s`.
template <typename X, typename Y, typename C>
RLHF_INLINE void block_gradient(const X* s, Y* out, int64_t n, C factor, const RowGradient<C>& of) {
  const C shift = of.max / factor, factor2 = C(factor * kLog2E), logsum2 = C(of.logsum * kLog2E);
  if (of.g_entropy == 0) {
    const C g = factor * (of.g_lse - of.g_sum);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(out[i], g * exp2_neg((load(s[i]) - shift) * factor2 - logsum2));
    return;
  }
  const C constant = -factor * (of.g_sum - of.g_lse + of.g_entropy * of.entropy), linear = -factor * of.g_entropy * C(kLn2);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const C t = (load(s[i]) - shift) * factor2 - logsum2, p = exp2_neg(t);
    store(out[i], p * (constant + linear * (t > C(-127) ? t : C(-127))));
  }
}

template <typename T, typename C>
RLHF_INLINE void row_gradient(const T* logits, T* out, int64_t vocabulary, const RowTransform<C>& row,
                              const RowGradient<C>& of) {
  C s[kBlock], slope[kBlock];
  std::vector<C> target_slopes(of.count, C(1));  // before `out`, which may be the logits, is written
  const auto inside = [&](int64_t k) { return of.targets[k] >= 0 && of.targets[k] < vocabulary; };
  if (row.cap > 0)
    for (int64_t k = 0; k < of.count; ++k)
      if (inside(k)) target_slopes[k] = row.slope(load(logits[of.targets[k]]));
  for (int64_t start = 0; start < vocabulary; start += kBlock) {
    const int64_t n = std::min(kBlock, vocabulary - start);
    if (row.cap > 0) {
      cap_block<true>(logits + start, n, row, s, slope);
      block_gradient(s, s, n, row.factor, of);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) store(out[start + i], s[i] * slope[i]);
    } else {
      block_gradient(logits + start, out + start, n, row.factor, of);
    }
  }
  for (int64_t k = 0; k < of.count; ++k)
    if (inside(k)) store(out[of.targets[k]], of.at_target(k, target_slopes[k], row));
}

template <typename T> RLHF_INLINE void forward_row(const TokenLogprobs& op, void* gradient, int64_t row) {
  using C = typename Compute<T>::type;
  const int64_t offset = op.rows.offset(row), count = op.targets_per_row, *targets = op.targets + row * count;
  const T* logits = static_cast<const T*>(op.logits) + offset;
  T* out = part<T>(gradient, offset);
  C* logprobs = part<C>(op.logprobs, row * count);
  RowResult<C> result{0, 0, 0, 0};
  if (op.mask && !op.mask[row]) {
    std::fill(logprobs, logprobs + count, C(0));
    if (out) std::fill(out, out + op.vocabulary, T{});
  } else {
    const RowTransform<C> transform(op.transform, row);
    const bool more = op.entropy || op.sum_p_squared;
    const auto all = more ? row_stats<true>(logits, op.vocabulary, transform)
                          : row_stats<false>(logits, op.vocabulary, transform);
    result = finish(all, transform);
    for (int64_t k = 0; k < count; ++k) {
      const bool inside = targets[k] >= 0 && targets[k] < op.vocabulary;
      logprobs[k] = inside ? logprob_of(C(load(logits[targets[k]])), all, transform) : C(NAN);
    }
    const RowGradient<C> up{targets, count, logprobs, nullptr, result.max, result.logsum, C(0), C(0), C(0), C(count)};
    if (out) row_gradient(logits, out, op.vocabulary, transform, up);
  }
  *part<C>(op.row_max, row) = result.max;
  *part<C>(op.row_logsum, row) = result.logsum;
  if (op.entropy) *part<C>(op.entropy, row) = result.entropy;
  if (op.sum_p_squared) *part<C>(op.sum_p_squared, row) = result.sum_p_squared;
}

template <typename T>
RLHF_INLINE void backward_row(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy,
                              const void* grad_lse, void* gradient, const Rows& gradient_rows, int64_t row) {
  using C = typename Compute<T>::type;
  const int64_t count = grad_logprobs ? op.targets_per_row : 0, at = row * op.targets_per_row;
  T* out = part<T>(gradient, gradient_rows.offset(row));
  const C g_entropy = grad_entropy ? *part<C>(grad_entropy, row) : C(0), g_lse = grad_lse ? *part<C>(grad_lse, row) : C(0);
  RowGradient<C> up{op.targets + at, count, part<C>(op.logprobs, at), part<C>(grad_logprobs, at), *part<C>(op.row_max, row),
                 *part<C>(op.row_logsum, row), op.entropy ? *part<C>(op.entropy, row) : C(0), g_entropy, g_lse, C(0)};
  bool silent = g_entropy == 0 && g_lse == 0;
  for (int64_t k = 0; k < count; ++k) {
    up.g_sum += up.g(k);
    silent = silent && up.g(k) == 0;
  }
  if (silent || (op.mask && !op.mask[row])) {
    std::fill(out, out + op.vocabulary, T{});
    return;
  }
  row_gradient(part<T>(op.logits, op.rows.offset(row)), out, op.vocabulary, RowTransform<C>(op.transform, row), up);
}

#define RLHF_ROWS(T)                                                                                              \
  RLHF_CLONES void forward(T, const TokenLogprobs& op, void* gradient, int64_t row) {                             \
    forward_row<T>(op, gradient, row);                                                                            \
  }                                                                                                               \
  RLHF_CLONES void backward(T, const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy,      \
                            const void* grad_lse, void* gradient, const Rows& gradient_rows, int64_t row) {       \
    backward_row<T>(op, grad_logprobs, grad_entropy, grad_lse, gradient, gradient_rows, row);                     \
  }
RLHF_FOR_DTYPES(RLHF_ROWS)

}  // namespace

void token_logprobs_forward(const TokenLogprobs& op, void* gradient, int threads) {
  dispatch(op.dtype, [&](auto type) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < op.rows.count(); ++row) forward(type, op, gradient, row);
  });
}

void token_logprobs_backward(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy,
                             const void* grad_lse, void* gradient, Rows gradient_rows, int threads) {
  dispatch(op.dtype, [&](auto type) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < op.rows.count(); ++row)
      backward(type, op, grad_logprobs, grad_entropy, grad_lse, gradient, gradient_rows, row);
  });
}

}  // namespace rlhf::cpu
