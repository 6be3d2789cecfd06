#include "cpu/whiten.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/dispatch.h"
#include "math/moments.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // numbers at a time: read once from memory, then from the cache

// The sum of (x - first) - mean over what counts, or of its square.
template <bool square, typename T, typename C>
RLHF_INLINE C sum_of(const T* x, const uint8_t* mask, int64_t n, C first, C mean) {
  C sum = 0;
  if (!mask) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const C distance = (load(x[i]) - first) - mean;
      sum += square ? distance * distance : distance;
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const C distance = (load(x[i]) - first) - mean;
      sum += mask[i] ? (square ? distance * distance : distance) : C(0);
    }
  }
  return sum;
}

// Of up to kBlock numbers, mask null where all count. Distances from the first one that counts, so that equal numbers
// have exactly that mean and no deviation.
template <typename T> RLHF_INLINE Moments<double> block_moments(const T* x, const uint8_t* mask, int64_t n) {
  using C = typename Compute<T>::type;
  int64_t start = 0;
  int32_t count = int32_t(n);
  if (mask && !std::memchr(mask, 0, n)) mask = nullptr;
  if (mask) {
    const void* found = std::memchr(mask, 1, n);
    if (!found) return {0, 0, 0};
    start = static_cast<const uint8_t*>(found) - mask;
    count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; ++i) count += mask[i];
  }
  const C first = load(x[start]);
  const C mean = sum_of<false>(x, mask, n, first, C(0)) / C(count);
  const C m2 = sum_of<true>(x, mask, n, first, mean);
  return {double(count), double(first) + double(mean), double(m2)};
}

template <typename T> RLHF_INLINE void span_moments(const Whiten& op, int64_t begin, int64_t end, double* out) {
  Moments<double> all{0, 0, 0};
  for (int64_t i = begin; i < end; i += kBlock)
    all = merge(all, block_moments(static_cast<const T*>(op.x) + i, op.mask ? op.mask + i : nullptr,
                                   std::min(kBlock, end - i)));
  out[0] = all.count;
  out[1] = all.mean;
  out[2] = all.m2;
}

template <typename T>
RLHF_INLINE void span_whiten(const Whiten& op, int64_t begin, int64_t end, double mean, double scale, double shift,
                             void* out) {
  using C = typename Compute<T>::type;
  const T* x = static_cast<const T*>(op.x);
  C* y = static_cast<C*>(out);
  // The mean in two parts: one of 1e6 is rounded by more than a small deviation.
  const C m = C(mean), rest = C(mean - double(m)), a = C(scale), b = C(shift);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) y[i] = ((load(x[i]) - m) - rest) * a + b;
  if (!op.mask) return;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) y[i] = op.mask[i] ? y[i] : C(0);
}

#define RLHF_SPANS(T)                                                                                           \
  RLHF_CLONES void moments(T, const Whiten& op, int64_t begin, int64_t end, double* out) {                      \
    span_moments<T>(op, begin, end, out);                                                                       \
  }                                                                                                             \
  RLHF_CLONES void whitened(T, const Whiten& op, int64_t begin, int64_t end, double mean, double scale,         \
                            double shift, void* out) {                                                          \
    span_whiten<T>(op, begin, end, mean, scale, shift, out);                                                    \
  }
RLHF_FOR_DTYPES(RLHF_SPANS)

}  // namespace

void whiten_moments(const Whiten& op, double* out, int64_t parts, int threads) {
  const int64_t span = (op.count + parts - 1) / parts;
  dispatch(op.dtype, [&](auto type) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < parts; ++p)
      moments(type, op, std::min(p * span, op.count), std::min((p + 1) * span, op.count), out + 3 * p);
  });
}

void whiten(const Whiten& op, const double* moments, int64_t parts, bool shift_mean, double eps, void* out,
            int threads) {
  Moments<double> all{0, 0, 0};
  for (int64_t p = 0; p < parts; ++p)
    all = merge(all, Moments<double>{moments[3 * p], moments[3 * p + 1], moments[3 * p + 2]});
  const double scale = 1 / std::sqrt(all.variance() + eps), shift = shift_mean ? 0 : all.mean;
  dispatch(op.dtype, [&](auto type) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < op.count; i += kBlock)
      whitened(type, op, i, std::min(i + kBlock, op.count), all.mean, scale, shift, out);
  });
}

}  // namespace rlhf::cpu
