#include "cpu/vtrace.h"

#include <algorithm>
#include <cmath>

#include "cpu/scan.h"
#include "math/vtrace.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 512;  // steps at a time: the scratch stays in the first-level cache

template <typename T> RLHF_INLINE void sequence(const VtraceCall& op, int64_t i) {
  using C = typename Compute<T>::type;
  C ratio[kBlock], next_value[kBlock], scale[kBlock + kWindow], excess[kBlock + kWindow];
  const T* inputs[4];
  for (int k = 0; k < 4; ++k)
    inputs[k] = static_cast<const T*>(op.inputs[k]) + op.sequences.input(i, op.strides[k]);
  const int64_t first = op.sequences.begin(i);
  const Vtrace<C> step{C(op.gamma), C(op.lam), C(op.rho_clip), C(op.c_clip)};
  C value = op.sequences.bootstrap ? static_cast<const C*>(op.sequences.bootstrap)[i] : C(0), carry = 0;
  for (int64_t end = op.sequences.length(i); end > 0; end -= kBlock) {
    const int64_t begin = std::max<int64_t>(0, end - kBlock), n = end - begin;
    const T *r = inputs[0] + begin, *v = inputs[1] + begin, *p = inputs[2] + begin, *q = inputs[3] + begin;
    const uint8_t* mask = op.sequences.mask ? op.sequences.mask + first + begin : nullptr;
    for (int64_t t = n - 1; t >= 0; --t) {
      next_value[t] = value;
      value = !mask || mask[t] ? load(v[t]) : value;
    }
    for (int64_t t = 0; t < n; ++t) ratio[t] = std::exp(load(p[t]) - load(q[t]));
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) {
      const bool counts = !mask || mask[t];
      const C own = step.shift(step.rho(ratio[t]), load(r[t]), load(v[t]), next_value[t]);
      excess[t] = counts ? own : C(0);
      scale[t] = counts ? step.scale(ratio[t]) : C(1);
    }
    scan(scale, excess, n, carry);
    carry = excess[0];
    C* advantages = static_cast<C*>(op.advantages) + first + begin;
    C* targets = static_cast<C*>(op.targets) + first + begin;
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) {
      const bool counts = !mask || mask[t];
      const C advantage =
          step.advantage(step.rho(ratio[t]), load(r[t]), load(v[t]), next_value[t], excess[t + 1]);
      advantages[t] = counts ? advantage : C(0);
      targets[t] = counts ? load(v[t]) + excess[t] : C(0);
    }
  }
}

#define RLHF_SEQUENCE(T) RLHF_CLONES void sequence(T, const VtraceCall& op, int64_t i) { sequence<T>(op, i); }
RLHF_FOR_DTYPES(RLHF_SEQUENCE)

}  // namespace

int64_t vtrace(const VtraceCall& op, int threads) {
  return for_each_sequence(op.sequences, op.dtype, threads, [&](auto type, int64_t i) { sequence(type, op, i); });
}

}  // namespace rlhf::cpu
