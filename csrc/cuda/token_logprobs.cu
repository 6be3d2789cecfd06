#include "cuda/token_logprobs.h"

#include "cuda/element.h"
#include "cuda/launch.h"
#include "math/token_logprobs.h"

// One block per row. Forward reads every logit once (twice where it writes the gradient as well), backward reads and
// writes every element once. Threads and warps are combined in a fixed order: the same inputs give the same bits.
namespace rlhf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;  // 16-byte loads that a thread issues before it uses the first

__device__ void store(float& out, float x) { out = x; }
__device__ void store(double& out, double x) { out = x; }
__device__ void store(__nv_bfloat16& out, float x) { out = __float2bfloat16(x); }
__device__ void store(__half& out, float x) { out = __float2half(x); }

template <typename T> using compute_t = typename Compute<T>::type;

template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
  static constexpr int size = N;
  T x[N];
};
template <typename T> using Pack16 = Pack<T, 16 / sizeof(T)>;

template <typename T> __device__ compute_t<T> minus_infinity() { return -compute_t<T>(INFINITY); }

// Calls visit(pack, index of its first element) for all of a row: whole 16-byte packs from element `head` on, and
// packs of one element at both edges.
template <typename T, typename Visit>
__device__ void for_each_pack(const T* row, int64_t size, int64_t head, Visit visit) {
  using Wide = Pack16<T>;
  const int64_t packs = (size - head) / Wide::size;
  const auto* body = reinterpret_cast<const Wide*>(row + head);
  for (int64_t first = threadIdx.x; first < packs; first += kInFlight * kThreads) {
    Wide loaded[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (first + i * kThreads < packs) loaded[i] = body[first + i * kThreads];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (first + i * kThreads < packs) visit(loaded[i], head + (first + i * kThreads) * Wide::size);
  }
  const int64_t edges = size - packs * Wide::size;
  for (int64_t edge = threadIdx.x; edge < edges; edge += kThreads) {
    const int64_t i = edge < head ? edge : edge + packs * Wide::size;
    visit(Pack<T, 1>{{row[i]}}, i);
  }
}

// Elements before the first 16-byte boundary; all of them where `row` and `other` never share one.
template <typename T> __device__ int64_t head_of(const T* row, const T* other, int64_t size) {
  const auto address = reinterpret_cast<uintptr_t>(row);
  if ((address - reinterpret_cast<uintptr_t>(other)) % 16 != 0) return size;
  const int64_t head = int64_t((16 - address % 16) % 16 / sizeof(T));
  return head < size ? head : size;
}

// Statistics of a pack of logits divided by the temperature; element `skip` is left out where it is in the pack.
template <bool kEntropy, typename T, int N>
__device__ Stats<compute_t<T>> pack_stats(const Pack<T, N>& pack, int64_t skip, compute_t<T> temperature) {
  using C = compute_t<T>;
  C z[N];
  C max = minus_infinity<T>();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    z[i] = temperature == 1 ? load(pack.x[i]) : load(pack.x[i]) / temperature;
    if (i == skip) z[i] = minus_infinity<T>();
    max = z[i] > max ? z[i] : max;
  }
  const C shift = max == minus_infinity<T>() ? C(0) : max;
  C rest = 0, ties = 0, spread = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const C d = z[i] - shift, e = std::exp(d);
    rest += d == 0 ? C(0) : e;
    ties += d == 0 ? C(1) : C(0);
    if (kEntropy) spread += e == 0 ? C(0) : e * -d;
  }
  return {max, rest + (ties - 1), spread};  // of nothing but -inf: no_stats
}

template <typename C> __device__ Stats<C> reduce_warp(Stats<C> stats) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    stats = merge(stats, Stats<C>{__shfl_down_sync(~0u, stats.max, step), __shfl_down_sync(~0u, stats.rest, step),
                                  __shfl_down_sync(~0u, stats.spread, step)});
  return stats;
}

// The statistics of all threads, in every thread.
template <typename C> __device__ Stats<C> reduce_block(Stats<C> stats) {
  __shared__ Stats<C> of_warp[kWarps];
  const int warp = threadIdx.x / 32;
  stats = reduce_warp(stats);
  if (threadIdx.x % 32 == 0) of_warp[warp] = stats;
  __syncthreads();
  stats = of_warp[0];
  for (int i = 1; i < kWarps; ++i) stats = merge(stats, of_warp[i]);
  return stats;
}

template <typename T> __device__ void write_zeros(T* out, int64_t size) {
  for (int64_t i = threadIdx.x; i < size; i += kThreads) store(out[i], compute_t<T>(0));
}

// out = grad_logprob * d logprob / d logits + grad_entropy * d entropy / d logits; out may be the logits.
template <bool kEntropy, typename T>
__device__ void write_gradient(const T* logits, T* out, int64_t size, int64_t target, compute_t<T> temperature,
                               const RowResult<compute_t<T>>& row, compute_t<T> grad_logprob,
                               compute_t<T> grad_entropy) {
  using C = compute_t<T>;
  const C scale = 1 / temperature, at_target = -std::expm1(row.logprob);
  for_each_pack(logits, size, head_of(logits, out, size), [&](auto pack, int64_t start) {
#pragma unroll
    for (int i = 0; i < pack.size; ++i) {
      const C z = temperature == 1 ? load(pack.x[i]) : load(pack.x[i]) / temperature;
      const C log_p = (z - row.max) - row.logsum, p = std::exp(log_p);
      C g = grad_logprob * (start + i == target ? at_target : -p);
      if (kEntropy) g -= p == 0 ? C(0) : grad_entropy * p * (log_p + row.entropy);
      store(pack.x[i], scale * g);
    }
    *reinterpret_cast<decltype(pack)*>(out + start) = pack;
  });
}

template <typename T, bool kEntropy>
__global__ void __launch_bounds__(kThreads) forward_kernel(TokenLogprobs op, T* gradient) {
  using C = compute_t<T>;
  const int64_t row = blockIdx.x, offset = op.rows.offset(row), size = op.vocabulary;
  const T* logits = static_cast<const T*>(op.logits) + offset;
  RowResult<C> result{0, 0, 0, 0};
  const bool counts = !op.mask || op.mask[row];
  const int64_t target = op.targets[row];
  const C temperature = C(op.temperature);
  if (counts) {
    const bool valid = target >= 0 && target < size;
    const C target_logit = valid ? load(logits[target]) / temperature : C(NAN);
    Stats<C> others = no_stats(minus_infinity<T>());
    for_each_pack(logits, size, head_of(logits, logits, size), [&](const auto& pack, int64_t start) {
      others = merge(others, pack_stats<kEntropy>(pack, target - start, temperature));
    });
    result = finish(reduce_block(others), target_logit, minus_infinity<T>());
  }
  if (threadIdx.x == 0) {
    static_cast<C*>(op.logprobs)[row] = result.logprob;
    static_cast<C*>(op.row_max)[row] = result.max;
    static_cast<C*>(op.row_logsum)[row] = result.logsum;
    if (kEntropy) static_cast<C*>(op.entropy)[row] = result.entropy;
  }
  if (!gradient) return;
  if (counts)
    write_gradient<false>(logits, gradient + offset, size, target, temperature, result, C(1), C(0));
  else
    write_zeros(gradient + offset, size);
}

template <typename T, bool kEntropy>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(TokenLogprobs op, const compute_t<T>* grad_logprobs, const compute_t<T>* grad_entropy, T* gradient,
                    Rows gradient_rows) {
  using C = compute_t<T>;
  const int64_t row = blockIdx.x;
  T* out = gradient + gradient_rows.offset(row);
  const C g_logprob = grad_logprobs ? grad_logprobs[row] : C(0);
  const C g_entropy = kEntropy ? grad_entropy[row] : C(0);
  if ((op.mask && !op.mask[row]) || (g_logprob == 0 && g_entropy == 0)) {
    write_zeros(out, op.vocabulary);
    return;
  }
  const RowResult<C> result{static_cast<const C*>(op.logprobs)[row],
                            kEntropy ? static_cast<const C*>(op.entropy)[row] : C(0),
                            static_cast<const C*>(op.row_max)[row], static_cast<const C*>(op.row_logsum)[row]};
  write_gradient<kEntropy>(static_cast<const T*>(op.logits) + op.rows.offset(row), out, op.vocabulary, op.targets[row],
                           C(op.temperature), result, g_logprob, g_entropy);
}

template <typename T> void forward(const TokenLogprobs& op, void* gradient, Queue queue) {
  launch("token_logprobs", op.want_entropy ? forward_kernel<T, true> : forward_kernel<T, false>, op.rows.count(),
         kThreads, queue, op, static_cast<T*>(gradient));
}

template <typename T>
void backward(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy, void* gradient,
              Rows gradient_rows, Queue queue) {
  using C = compute_t<T>;
  launch("token_logprobs", grad_entropy ? backward_kernel<T, true> : backward_kernel<T, false>, op.rows.count(),
         kThreads, queue, op, static_cast<const C*>(grad_logprobs), static_cast<const C*>(grad_entropy),
         static_cast<T*>(gradient), gradient_rows);
}

// In the order of DType.
constexpr decltype(&forward<float>) kForward[] = {forward<float>, forward<double>, forward<__nv_bfloat16>,
                                                  forward<__half>};
constexpr decltype(&backward<float>) kBackward[] = {backward<float>, backward<double>, backward<__nv_bfloat16>,
                                                    backward<__half>};

}  // namespace

void token_logprobs_forward(const TokenLogprobs& op, void* gradient, int device, uintptr_t stream) {
  kForward[int(op.dtype)](op, gradient, {device, reinterpret_cast<cudaStream_t>(stream)});
}

void token_logprobs_backward(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy,
                             void* gradient, Rows gradient_rows, int device, uintptr_t stream) {
  kBackward[int(op.dtype)](op, grad_logprobs, grad_entropy, gradient, gradient_rows,
                           {device, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace rlhf::cuda
