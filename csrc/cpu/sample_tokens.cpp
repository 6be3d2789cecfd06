#include "cpu/sample_tokens.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/dispatch.h"
#include "math/elementary.h"
#include "math/philox.h"

namespace rlhf::cpu {
namespace {

template <typename C> using Key = std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>;

// Unsigned integers in the order of the floats that they stand for.
template <typename C> RLHF_INLINE Key<C> key_of(C x) {
  using K = Key<C>;
  constexpr K sign = K(1) << (sizeof(K) * 8 - 1);
  K bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits & sign ? ~bits : bits | sign;
}

// The greatest key at which `enough` still holds; it holds at 0 and, once it does not, nowhere above.
template <typename K, typename F> RLHF_INLINE K greatest(const F& enough) {
  K found = 0;
  for (int bit = int(sizeof(K)) * 8 - 1; bit >= 0; --bit) {
    const K candidate = found | K(1) << bit;
    if (enough(candidate)) found = candidate;
  }
  return found;
}

// Sum of the weights at keys from `pivot` on.
template <typename C> RLHF_INLINE double mass_from(const Key<C>* keys, const C* weights, int64_t n, Key<C> pivot) {
  double mass = 0;
#pragma omp simd reduction(+ : mass)
  for (int64_t i = 0; i < n; ++i) mass += keys[i] >= pivot ? double(weights[i]) : 0.0;
  return mass;
}

template <typename C> RLHF_INLINE int64_t count_from(const Key<C>* keys, int64_t n, Key<C> pivot) {
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= pivot;
  return count;
}

template <typename T> RLHF_INLINE void sample_row(const SampleTokens& op, int64_t row) {
  using C = typename Compute<T>::type;
  const int64_t n = op.vocabulary;
  const T* logits = static_cast<const T*>(op.logits) + row * op.row_stride;
  const RowTransform<C> transform(op.transform, row);
  std::vector<C> z(n), weights(n);  // z less its maximum
  std::vector<Key<C>> keys(n);
  C max = -infinity<C>();
  bool nan = false;
  for (int64_t i = 0; i < n; ++i) {
    z[i] = transform.capped(load(logits[i]));
    nan |= z[i] != z[i];
    max = z[i] > max ? z[i] : max;
  }
  if (nan || std::fabs(max) == infinity<C>()) {
    op.ids[row] = 0;
    static_cast<C*>(op.logprobs)[row] = static_cast<C*>(op.full_logprobs)[row] = std::numeric_limits<C>::quiet_NaN();
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    // The factor of a tiny temperature takes differences alone to infinity. + 0: one key for both zeros.
    z[i] = product(z[i] - max, transform.factor) + C(0);
    weights[i] = exp_neg(z[i]);
    keys[i] = key_of(z[i]);
  }
  const double full = mass_from<C>(keys.data(), weights.data(), n, 0);
  Key<C> threshold = 0;
  double kept = full;
  const auto keep_from = [&](Key<C> pivot) {
    threshold = std::max(threshold, pivot);
    kept = mass_from<C>(keys.data(), weights.data(), n, threshold);
  };
  if (op.top_k < n) {
    keep_from(greatest<Key<C>>([&](Key<C> pivot) { return count_from<C>(keys.data(), n, pivot) >= op.top_k; }));
  }
  if (op.top_p < 1) {
    const Key<C> lowest = threshold;
    keep_from(greatest<Key<C>>([&](Key<C> pivot) {
      return mass_from<C>(keys.data(), weights.data(), n, std::max(pivot, lowest)) >= op.top_p * kept;
    }));
  }
  if (op.min_p > 0) keep_from(key_of(C(std::log(op.min_p)) + C(0)));

  // Inverse of the cumulative distribution in the order of the ids, at one uniform of 53 bits.
  const uint64_t id = uint64_t(op.row_ids[row]), step = uint64_t(*op.step);
  const Philox random =
      philox(uint64_t(*op.seed), uint32_t(id), uint32_t(id >> 32), uint32_t(step), uint32_t(step >> 32));
  const double uniform = ((random.words[0] >> 5) * 67108864.0 + (random.words[1] >> 6)) / 9007199254740992.0;
  double cumulative = 0;
  int64_t chosen = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (keys[i] < threshold || weights[i] == 0) continue;
    chosen = i;
    cumulative += weights[i];
    if (cumulative > uniform * kept) break;
  }
  op.ids[row] = chosen;
  const double below = z[chosen];
  static_cast<C*>(op.logprobs)[row] = C(below - std::log1p(kept - 1));
  static_cast<C*>(op.full_logprobs)[row] = C(below - std::log1p(full - 1));
}

#define RLHF_SAMPLE(T) RLHF_CLONES void sample(T, const SampleTokens& op, int64_t row) { sample_row<T>(op, row); }
RLHF_FOR_DTYPES(RLHF_SAMPLE)

}  // namespace

void sample_tokens(const SampleTokens& op, int threads) {
  dispatch(op.dtype, [&](auto type) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t row = 0; row < op.rows; ++row) sample(type, op, row);
  });
}

}  // namespace rlhf::cpu
