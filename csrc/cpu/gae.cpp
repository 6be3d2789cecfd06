#include "cpu/gae.h"

#include <algorithm>
#include <cstring>

#include "cpu/scan.h"
#include "math/gae.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 512;  // steps at a time: the scratch stays in the first-level cache

// Up to kBlock steps of one sequence; values null for none, mask null where every step counts.
template <typename T> struct Steps {
  const T *rewards, *values;
  const uint8_t* mask;
  int64_t n;
};

// s[0 .. n]: what every step hands to the one before it, given what the step after the last one hands to it.
template <typename T, typename C>
RLHF_INLINE void handed(const Steps<T>& x, const Recurrence<C>& recurrence, C carry, C* scale, C* s) {
  if (x.values) {
#pragma omp simd
    for (int64_t t = 0; t < x.n; ++t) s[t] = recurrence.shift(load(x.rewards[t]), load(x.values[t]));
  } else {
#pragma omp simd
    for (int64_t t = 0; t < x.n; ++t) s[t] = recurrence.shift(load(x.rewards[t]), C(0));
  }
  if (!x.mask) return scan_uniform(recurrence.decay, s, x.n, carry);
#pragma omp simd
  for (int64_t t = 0; t < x.n; ++t) {
    s[t] = x.mask[t] ? s[t] : C(0);
    scale[t] = x.mask[t] ? recurrence.decay : C(1);
  }
  scan(scale, s, x.n, carry);
}

// out = what every step gets back, less its value for an advantage.
template <bool less_value, typename T, typename C> RLHF_INLINE void write(const Steps<T>& x, const C* s, C* out) {
#pragma omp simd
  for (int64_t t = 0; t < x.n; ++t) {
    out[t] = load(x.rewards[t]) + s[t + 1];
    if (less_value) out[t] -= load(x.values[t]);
  }
  if (!x.mask) return;
#pragma omp simd
  for (int64_t t = 0; t < x.n; ++t) out[t] = x.mask[t] ? out[t] : C(0);
}

template <typename T> RLHF_INLINE void sequence(const Gae& op, int64_t i) {
  using C = typename Compute<T>::type;
  C scale[kBlock + kWindow], s[kBlock + kWindow];
  const int64_t first = op.sequences.begin(i);
  const T* rewards = static_cast<const T*>(op.rewards) + op.sequences.input(i, op.reward_stride);
  const T* values = op.values ? static_cast<const T*>(op.values) + op.sequences.input(i, op.value_stride) : nullptr;
  const uint8_t* mask = op.sequences.mask ? op.sequences.mask + first : nullptr;
  C* advantages = values ? static_cast<C*>(op.advantages) + first : nullptr;
  C* returns = static_cast<C*>(op.returns) + first;
  const Recurrence<C> recurrence(op.gamma, op.lam_of(i)), of_returns(op.gamma, op.value_lam_of(i));
  C carry = op.sequences.bootstrap ? C(op.gamma) * static_cast<const C*>(op.sequences.bootstrap)[i] : C(0);
  C carry_of_returns = carry;
  for (int64_t end = op.sequences.length(i); end > 0; end -= kBlock) {
    const int64_t begin = std::max<int64_t>(0, end - kBlock), n = end - begin;
    const auto holds = [&](int byte) { return std::memchr(mask + begin, byte, n) != nullptr; };
    if (mask && !holds(1)) {
      std::fill_n(returns + begin, n, C(0));
      if (values) std::fill_n(advantages + begin, n, C(0));
      continue;
    }
    const Steps<T> x{rewards + begin, values ? values + begin : nullptr, mask && holds(0) ? mask + begin : nullptr, n};
    handed(x, recurrence, carry, scale, s);
    carry = s[0];
    if (values) write<true>(x, s, advantages + begin);
    if (op.decoupled) {
      handed(x, of_returns, carry_of_returns, scale, s);
      carry_of_returns = s[0];
    }
    write<false>(x, s, returns + begin);
  }
}

#define RLHF_SEQUENCE(T) RLHF_CLONES void sequence(T, const Gae& op, int64_t i) { sequence<T>(op, i); }
RLHF_FOR_DTYPES(RLHF_SEQUENCE)

}  // namespace

int64_t gae(const Gae& op, int threads) {
  return for_each_sequence(op.sequences, op.dtype, threads, [&](auto type, int64_t i) { sequence(type, op, i); });
}

}  // namespace rlhf::cpu
