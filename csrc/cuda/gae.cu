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

// One thread block per sequence, from its end in chunks of kThreads * kItems steps.
template <typename T> __global__ void __launch_bounds__(kThreads) gae_kernel(cpu::Gae op) {
  using C = typename Compute<T>::type;
  __shared__ Affine<C> shared[kWarps];
  const int64_t i = blockIdx.x, out = op.cu_seqlens ? op.cu_seqlens[i] : i * op.time;
  const int64_t length = op.cu_seqlens ? op.cu_seqlens[i + 1] - out : op.time;
  const T* rewards = static_cast<const T*>(op.rewards) + (op.cu_seqlens ? out : i * op.reward_stride);
  const T* values = static_cast<const T*>(op.values);
  if (values) values += op.cu_seqlens ? out : i * op.value_stride;
  const Recurrence<C> recurrence(op.gamma, values ? op.lam : 1.0);
  C carry = op.bootstrap ? C(op.gamma) * static_cast<const C*>(op.bootstrap)[i] : C(0);

  for (int64_t end = length; end > 0; end -= kThreads * kItems) {
    const int64_t first = end - kThreads * kItems + int64_t(threadIdx.x) * kItems;
    C r[kItems], v[kItems];
    bool counts[kItems];
    Affine<C> own = identity<C>();
#pragma unroll
    for (int k = kItems - 1; k >= 0; --k) {
      const int64_t t = first + k;
      counts[k] = t >= 0 && (!op.mask || op.mask[out + t]);
      r[k] = counts[k] ? load(rewards[t]) : C(0);
      v[k] = counts[k] && values ? load(values[t]) : C(0);
      own = compose(recurrence.step(counts[k], r[k], v[k]), own);
    }
    Affine<C> total;
    const Affine<C> later = scan_later(own, shared, &total);
    C s = later.scale * carry + later.shift;
#pragma unroll
    for (int k = kItems - 1; k >= 0; --k) {
      const int64_t t = first + k;
      const C result = counts[k] ? r[k] + s : C(0);
      if (t >= 0) {
        static_cast<C*>(op.returns)[out + t] = result;
        if (values) static_cast<C*>(op.advantages)[out + t] = result - v[k];
      }
      const Affine<C> map = recurrence.step(counts[k], r[k], v[k]);
      s = map.scale * s + map.shift;
    }
    carry = total.scale * carry + total.shift;
  }
}

template <typename T> void launch_gae(const cpu::Gae& op, Queue queue) {
  launch("gae", gae_kernel<T>, op.sequences, kThreads, queue, op);
}

// In the order of DType.
constexpr decltype(&launch_gae<float>) kLaunch[] = {launch_gae<float>, launch_gae<double>, launch_gae<__nv_bfloat16>,
                                                    launch_gae<__half>};

}  // namespace

void gae(const cpu::Gae& op, int device, uintptr_t stream) {
  kLaunch[int(op.dtype)](op, {device, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace rlhf::cuda
