#include "cuda/gae.h"

#include "cuda/element.h"
#include "cuda/launch.h"
#include "math/gae.h"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kItems = 4;  // one block scans kThreads * kItems steps at a time

// The composition of the maps of every later thread (itself left out); `total` becomes that of all threads.
template <typename C> __device__ Affine<C> scan_later(Affine<C> own, Affine<C>* shared, Affine<C>* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Affine<C> inclusive = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const Affine<C> later = {__shfl_down_sync(0xffffffffu, inclusive.scale, distance),
                             __shfl_down_sync(0xffffffffu, inclusive.shift, distance)};
    if (lane + distance < 32) inclusive = compose(inclusive, later);
  }
  Affine<C> exclusive = {__shfl_down_sync(0xffffffffu, inclusive.scale, 1),
                         __shfl_down_sync(0xffffffffu, inclusive.shift, 1)};
  if (lane == 31) exclusive = identity<C>();
  if (lane == 0) shared[warp] = inclusive;
  __syncthreads();
  Affine<C> later_warps = identity<C>(), all = identity<C>();
  for (int w = kWarps - 1; w >= 0; --w) {
    if (w == warp) later_warps = all;
    all = compose(shared[w], all);
  }
  __syncthreads();  // `shared` may be written again
  *total = all;
  return compose(exclusive, later_warps);
}

// s[k]: what step k of this thread gets from the one after it; returns what the block's first step hands on.
template <typename C>
__device__ C handed(const Recurrence<C>& recurrence, const bool (&counts)[kItems], const C (&r)[kItems],
                    const C (&v)[kItems], C carry, Affine<C>* shared, C (&s)[kItems]) {
  Affine<C> own = identity<C>(), total;
#pragma unroll
  for (int k = kItems - 1; k >= 0; --k) own = compose(recurrence.step(counts[k], r[k], v[k]), own);
  const Affine<C> later = scan_later(own, shared, &total);
  C next = later.scale * carry + later.shift;
#pragma unroll
  for (int k = kItems - 1; k >= 0; --k) {
    s[k] = next;
    const Affine<C> map = recurrence.step(counts[k], r[k], v[k]);
    next = map.scale * next + map.shift;
  }
  return total.scale * carry + total.shift;
}

// One thread block per sequence, from its end in chunks of kThreads * kItems steps.
template <typename T> __global__ void __launch_bounds__(kThreads) gae_kernel(cpu::Gae op) {
  using C = typename Compute<T>::type;
  __shared__ Affine<C> shared[kWarps];
  const int64_t i = blockIdx.x, out = op.sequences.begin(i);
  const T* rewards = static_cast<const T*>(op.rewards) + op.sequences.input(i, op.reward_stride);
  const T* values = op.values ? static_cast<const T*>(op.values) + op.sequences.input(i, op.value_stride) : nullptr;
  const Recurrence<C> recurrence(op.gamma, op.lam_of(i)), of_returns(op.gamma, op.value_lam_of(i));
  C carry = op.sequences.bootstrap ? C(op.gamma) * static_cast<const C*>(op.sequences.bootstrap)[i] : C(0);
  C carry_of_returns = carry;

  for (int64_t end = op.sequences.length(i); end > 0; end -= kThreads * kItems) {
    const int64_t first = end - kThreads * kItems + int64_t(threadIdx.x) * kItems;
    C r[kItems], v[kItems], s[kItems];
    bool counts[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t t = first + k;
      counts[k] = t >= 0 && (!op.sequences.mask || op.sequences.mask[out + t]);
      r[k] = counts[k] ? load(rewards[t]) : C(0);
      v[k] = counts[k] && values ? load(values[t]) : C(0);
    }
    carry = handed(recurrence, counts, r, v, carry, shared, s);
#pragma unroll
    for (int k = 0; k < kItems; ++k)
      if (values && first + k >= 0)
        static_cast<C*>(op.advantages)[out + first + k] = counts[k] ? (r[k] + s[k]) - v[k] : C(0);
    if (op.decoupled) carry_of_returns = handed(of_returns, counts, r, v, carry_of_returns, shared, s);
#pragma unroll
    for (int k = 0; k < kItems; ++k)
      if (first + k >= 0) static_cast<C*>(op.returns)[out + first + k] = counts[k] ? r[k] + s[k] : C(0);
  }
}

template <typename T> void launch_gae(const cpu::Gae& op, Queue queue) {
  launch("gae", gae_kernel<T>, op.sequences.count, kThreads, 0, queue, op);
}

// In the order of DType.
constexpr decltype(&launch_gae<float>) kLaunch[] = {launch_gae<float>, launch_gae<double>, launch_gae<__nv_bfloat16>,
                                                    launch_gae<__half>};

}  // namespace

void gae(const cpu::Gae& op, int device, uintptr_t stream) {
  kLaunch[int(op.dtype)](op, {device, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace rlhf::cuda
