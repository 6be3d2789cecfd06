#include "cpu/gae.h"

#include <algorithm>

#include "cpu/simd.h"
#include "math/gae.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // steps at a time: the scratch stays in the first-level cache
constexpr int64_t kWindow = 8;    // steps that one pass of the final recurrence handles at once

// Makes the map of every step the composition of its own with that of the step `reach` later. Ascending: what stands
// ahead is still that of the previous doubling.
template <int64_t reach, typename C> RLHF_INLINE void double_reach(C* scale, C* s, int64_t n) {
  for (int64_t t = 0; t < n; ++t) {
    s[t] = scale[t] * s[t + reach] + s[t];
    scale[t] = scale[t] * scale[t + reach];
  }
}

// s[0 .. n] for n steps, given s[n] = carry. `scale` and s[0 .. n) hold the steps' own maps on entry; both have room
// for n + kWindow elements. After the doublings a map spans kWindow steps, and s[t] follows from s[t + kWindow].
template <typename C> RLHF_INLINE void scan(C* scale, C* s, int64_t n, C carry) {
  std::fill(scale + n, scale + n + kWindow, C(0));  // step n gives the carry whatever follows it
  std::fill(s + n, s + n + kWindow, C(0));
  s[n] = carry;
  double_reach<1>(scale, s, n);
  double_reach<2>(scale, s, n);
  double_reach<4>(scale, s, n);
  int64_t t = n;
  for (; t >= kWindow; t -= kWindow)
#pragma omp simd
    for (int64_t i = t - kWindow; i < t; ++i) s[i] = scale[i] * s[i + kWindow] + s[i];
  while (--t >= 0) s[t] = scale[t] * s[t + kWindow] + s[t];
}

// One sequence of `length` steps, from its end in blocks.
template <typename T, typename C>
RLHF_INLINE void sequence(const T* rewards, const T* values, const uint8_t* mask, int64_t length, C carry,
                          Recurrence<C> recurrence, C* advantages, C* returns) {
  C scale[kBlock + kWindow], s[kBlock + kWindow];
  for (int64_t end = length; end > 0; end -= kBlock) {
    const int64_t begin = std::max<int64_t>(0, end - kBlock), n = end - begin;
    const T *r = rewards + begin, *v = values ? values + begin : nullptr;
    const uint8_t* m = mask ? mask + begin : nullptr;
    C* out = returns + begin;
    if (v) {
#pragma omp simd
      for (int64_t t = 0; t < n; ++t) s[t] = recurrence.shift(load(r[t]), load(v[t]));
    } else {
#pragma omp simd
      for (int64_t t = 0; t < n; ++t) s[t] = recurrence.shift(load(r[t]), C(0));
    }
    std::fill(scale, scale + n, recurrence.decay);
    if (m) {
#pragma omp simd
      for (int64_t t = 0; t < n; ++t) {
        s[t] = m[t] ? s[t] : C(0);
        scale[t] = m[t] ? scale[t] : C(1);
      }
    }
    scan(scale, s, n, carry);
    carry = s[0];
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) out[t] = load(r[t]) + s[t + 1];
    if (v) {
#pragma omp simd
      for (int64_t t = 0; t < n; ++t) advantages[begin + t] = out[t] - load(v[t]);
    }
    if (m) {
#pragma omp simd
      for (int64_t t = 0; t < n; ++t) out[t] = m[t] ? out[t] : C(0);
      if (v) {
#pragma omp simd
        for (int64_t t = 0; t < n; ++t) advantages[begin + t] = m[t] ? advantages[begin + t] : C(0);
      }
    }
  }
}

template <typename T> RLHF_INLINE void sequences(const Gae& op, int64_t first, int64_t last) {
  using C = typename Compute<T>::type;
  const Recurrence<C> recurrence(op.gamma, op.values ? op.lam : 1.0);
  for (int64_t i = first; i < last; ++i) {
    const int64_t* cu = op.cu_seqlens;
    const int64_t length = cu ? cu[i + 1] - cu[i] : op.time, out = cu ? cu[i] : i * op.time;
    const C carry = op.bootstrap ? C(op.gamma) * static_cast<const C*>(op.bootstrap)[i] : C(0);
    sequence(static_cast<const T*>(op.rewards) + (cu ? cu[i] : i * op.reward_stride),
             op.values ? static_cast<const T*>(op.values) + (cu ? cu[i] : i * op.value_stride) : nullptr,
             op.mask ? op.mask + out : nullptr, length, carry, recurrence,
             op.values ? static_cast<C*>(op.advantages) + out : nullptr, static_cast<C*>(op.returns) + out);
  }
}

#define RLHF_FOR_DTYPE(NAME, T) \
  RLHF_CLONES void sequences_##NAME(const Gae& op, int64_t first, int64_t last) { sequences<T>(op, first, last); }
RLHF_FOR_DTYPE(f32, float)
RLHF_FOR_DTYPE(f64, double)
RLHF_FOR_DTYPE(bf16, bf16)
RLHF_FOR_DTYPE(f16, f16)

// In the order of DType.
constexpr decltype(&sequences_f32) kSequences[] = {sequences_f32, sequences_f64, sequences_bf16, sequences_f16};

}  // namespace

int64_t gae(const Gae& op, int threads) {
  for (int64_t i = 0; op.cu_seqlens && i <= op.sequences; ++i) {
    const int64_t low = i == 0 ? 0 : op.cu_seqlens[i - 1], high = i == 0 ? 0 : op.time;
    if (op.cu_seqlens[i] < low || op.cu_seqlens[i] > high) return i;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < op.sequences; ++i) kSequences[int(op.dtype)](op, i, i + 1);
  return -1;
}

}  // namespace rlhf::cpu
