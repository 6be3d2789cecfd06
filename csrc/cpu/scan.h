// The affine recurrence s[t] = scale[t] * s[t + 1] + shift[t], from the last step to the first, on vectors of steps.
//
// Step by step it would wait for one multiplication and addition after the other. Instead every step's map is composed
// with that of the step 1, then 2, then 4 later, in arrays that stay in the first-level cache; then s[t] follows from
// s[t + kWindow], for kWindow steps at once.
#pragma once
#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/gae.h"

namespace rlhf::cpu {

// one(T(), i) for every sequence i, T the type of their elements. Returns as misfit does.
template <typename F> int64_t for_each_sequence(const Sequences& sequences, DType dtype, int threads, F one) {
  const int64_t at = misfit(sequences);
  if (at >= 0) return at;
  dispatch(dtype, [&](auto type) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < sequences.count; ++i) one(type, i);
  });
  return -1;
}

constexpr int64_t kWindow = 8;  // 2^3: three doublings

// s[n] = carry, and what follows it is never seen.
template <typename C> RLHF_INLINE void end_with(C* s, int64_t n, C carry) {
  std::fill(s + n, s + n + kWindow, C(0));
  s[n] = carry;
}

// Ascending: what stands ahead is still that of the previous doubling.
template <int64_t reach, typename C> RLHF_INLINE void double_reach(C* scale, C* s, int64_t n) {
  for (int64_t t = 0; t < n; ++t) {
    s[t] = scale[t] * s[t + reach] + s[t];
    scale[t] = scale[t] * scale[t + reach];
  }
}

// s[0 .. n], given the shifts in s[0 .. n) and s[n] = carry; `scale` is used up. Both have room for n + kWindow.
template <typename C> RLHF_INLINE void scan(C* scale, C* s, int64_t n, C carry) {
  end_with(s, n, carry);
  std::fill(scale + n, scale + n + kWindow, C(0));
  double_reach<1>(scale, s, n);
  double_reach<2>(scale, s, n);
  double_reach<4>(scale, s, n);
  int64_t t = n;
  for (; t >= kWindow; t -= kWindow)
#pragma omp simd
    for (int64_t i = t - kWindow; i < t; ++i) s[i] = scale[i] * s[i + kWindow] + s[i];
  while (--t >= 0) s[t] = scale[t] * s[t + kWindow] + s[t];
}

template <int64_t reach, typename C> RLHF_INLINE void double_reach(C scale, C* s, int64_t n) {
  for (int64_t t = 0; t < n; ++t) s[t] = scale * s[t + reach] + s[t];
}

// The same where every step has the same scale: the same values for half of the work.
template <typename C> RLHF_INLINE void scan_uniform(C scale, C* s, int64_t n, C carry) {
  end_with(s, n, carry);
  const C scale2 = scale * scale, scale4 = scale2 * scale2, scale8 = scale4 * scale4;
  double_reach<1>(scale, s, n);
  double_reach<2>(scale2, s, n);
  double_reach<4>(scale4, s, n);
  C window[kWindow];  // in a register: what stands in memory would be waited for
  std::copy_n(s + n, kWindow, window);
  int64_t t = n;
  for (; t >= kWindow; t -= kWindow)
#pragma omp simd
    for (int64_t i = 0; i < kWindow; ++i) s[t - kWindow + i] = window[i] = scale8 * window[i] + s[t - kWindow + i];
  while (--t >= 0) s[t] = scale8 * s[t + kWindow] + s[t];
}

}  // namespace rlhf::cpu
