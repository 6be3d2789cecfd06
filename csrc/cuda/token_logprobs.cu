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
constexpr int kBlocks = 2;  // at least so many per multiprocessor; with no bound ptxas aims at more of them and spills
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

// `stats` with a pack of logits added. A logit above the maximum comes in first, as a set of its own.
template <bool kMore, typename T, int N>
__device__ void add_pack(Stats<compute_t<T>>& stats, const Pack<T, N>& pack, const RowTransform<compute_t<T>>& row) {
  using C = compute_t<T>;
  C x[N], top = load(pack.x[0]);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = load(pack.x[i]);
    top = x[i] > top ? x[i] : top;
  }
  bool leads = top > stats.max;
  if (leads) stats = merge(Stats<C>{top, 0, 0, 0}, stats, row);
  const C shift = stats.max == -C(INFINITY) ? C(0) : row.capped(stats.max);
  const C factor2 = row.factor * C(kLog2E);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const C t = (row.capped(x[i]) - shift) * factor2;
    const bool is_leader = leads && x[i] == top;
    const C e = is_leader ? C(0) : std::exp2(t);
    leads = leads && !is_leader;
    stats.rest += e;
    if (kMore) {
      stats.spread -= e == 0 ? C(0) : C(kLn2) * e * t;
      stats.squares += e * e;
    }
  }
}

template <typename C> __device__ Stats<C> reduce_warp(Stats<C> stats, const RowTransform<C>& row) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    stats = merge(stats,
                  Stats<C>{__shfl_down_sync(~0u, stats.max, step), __shfl_down_sync(~0u, stats.rest, step),
                           __shfl_down_sync(~0u, stats.spread, step), __shfl_down_sync(~0u, stats.squares, step)},
                  row);
  return stats;
}

// The statistics of all threads, in every thread.
template <typename C> __device__ Stats<C> reduce_block(Stats<C> stats, const RowTransform<C>& row) {
  __shared__ Stats<C> of_warp[kWarps];
  const int warp = threadIdx.x / 32;
  stats = reduce_warp(stats, row);
  if (threadIdx.x % 32 == 0) of_warp[warp] = stats;
  __syncthreads();
  stats = of_warp[0];
  for (int i = 1; i < kWarps; ++i) stats = merge(stats, of_warp[i], row);
  return stats;
}

template <typename T> __device__ void write_zeros(T* out, int64_t size) {
  for (int64_t i = threadIdx.x; i < size; i += kThreads) store(out[i], compute_t<T>(0));
}

// out = d L / d logits, see RowGradient; out may be the logits.
template <bool kEntropy, typename T>
__device__ void write_gradient(const T* logits, T* out, int64_t size, const RowTransform<compute_t<T>>& row,
                               const RowGradient<compute_t<T>>& of) {
  using C = compute_t<T>;
  const C shift = of.max / row.factor, factor2 = row.factor * C(kLog2E), logsum2 = of.logsum * C(kLog2E);
  const C constant = -row.factor * (of.g_sum + of.g_entropy * of.entropy);
  const C linear = -row.factor * of.g_entropy * C(kLn2);
  for_each_pack(logits, size, head_of(logits, out, size), [&](auto pack, int64_t start) {
#pragma unroll
    for (int i = 0; i < pack.size; ++i) {
      const C s = row.capped(load(pack.x[i])), t = (s - shift) * factor2 - logsum2, p = std::exp2(t);
      store(pack.x[i], p == 0 ? C(0) : p * (kEntropy ? constant + linear * t : constant) * row.slope(s));
    }
    *reinterpret_cast<decltype(pack)*>(out + start) = pack;
  });
  __syncthreads();
  for (int64_t k = threadIdx.x; k < of.count; k += kThreads)
    if (of.targets[k] >= 0 && of.targets[k] < size) store(out[of.targets[k]], of.at_target(k, row));
}

template <typename T, bool kMore, bool kCap>
__global__ void __launch_bounds__(kThreads, kBlocks) forward_kernel(TokenLogprobs op, T* gradient) {
  using C = compute_t<T>;
  const int64_t row = blockIdx.x, offset = op.rows.offset(row), size = op.vocabulary, count = op.targets_per_row;
  const T* logits = static_cast<const T*>(op.logits) + offset;
  const int64_t* targets = op.targets + row * count;
  C* logprobs = static_cast<C*>(op.logprobs) + row * count;
  RowTransform<C> transform(op.transform, row);
  if (!kCap) transform.cap = 0;  // known when compiling
  const bool counts = !op.mask || op.mask[row];
  RowResult<C> result{0, 0, 0, 0};
  Stats<C> all = no_stats<C>();
  if (counts) {
    for_each_pack(logits, size, head_of(logits, logits, size),
                  [&](const auto& pack, int64_t) { add_pack<kMore>(all, pack, transform); });
    all = reduce_block(all, transform);
    result = finish(all, transform);
  }
  for (int64_t k = threadIdx.x; k < count; k += kThreads) {
    const bool inside = targets[k] >= 0 && targets[k] < size;
    logprobs[k] = !counts ? C(0) : inside ? logprob_of(C(load(logits[targets[k]])), all, transform) : C(NAN);
  }
  if (threadIdx.x == 0) {
    static_cast<C*>(op.row_max)[row] = result.max;
    static_cast<C*>(op.row_logsum)[row] = result.logsum;
    if (kMore && op.entropy) static_cast<C*>(op.entropy)[row] = result.entropy;
    if (kMore && op.sum_p_squared) static_cast<C*>(op.sum_p_squared)[row] = result.sum_p_squared;
  }
  if (!gradient) return;
  if (!counts) {
    write_zeros(gradient + offset, size);
    return;
  }
  __syncthreads();  // every thread has read its targets' logits and written their log-probabilities
  const RowGradient<C> of{targets, count, logprobs, nullptr, result.max, result.logsum, C(0), C(0), C(count)};
  write_gradient<false>(logits, gradient + offset, size, transform, of);
}

template <typename T, bool kEntropy, bool kCap>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(TokenLogprobs op, const compute_t<T>* grad_logprobs, const compute_t<T>* grad_entropy, T* gradient,
                    Rows gradient_rows) {
  using C = compute_t<T>;
  const int64_t row = blockIdx.x, count = grad_logprobs ? op.targets_per_row : 0, at = row * op.targets_per_row;
  const T* logits = static_cast<const T*>(op.logits) + op.rows.offset(row);
  T* out = gradient + gradient_rows.offset(row);
  const C g_entropy = kEntropy ? grad_entropy[row] : C(0);
  RowGradient<C> of{op.targets + at, count, static_cast<const C*>(op.logprobs) + at,
                    grad_logprobs ? grad_logprobs + at : nullptr, static_cast<const C*>(op.row_max)[row],
                    static_cast<const C*>(op.row_logsum)[row],
                    kEntropy ? static_cast<const C*>(op.entropy)[row] : C(0), g_entropy, C(0)};
  bool silent = g_entropy == 0;
  for (int64_t k = 0; k < count; ++k) {
    of.g_sum += of.g(k);
    silent = silent && of.g(k) == 0;
  }
  if (silent || (op.mask && !op.mask[row])) {
    write_zeros(out, op.vocabulary);
    return;
  }
  RowTransform<C> transform(op.transform, row);
  if (!kCap) transform.cap = 0;  // known when compiling
  write_gradient<kEntropy>(logits, out, op.vocabulary, transform, of);
}

template <typename T> void forward(const TokenLogprobs& op, void* gradient, Queue queue) {
  const bool more = op.entropy || op.sum_p_squared, cap = op.transform.softcap > 0;
  const auto kernel = more ? (cap ? forward_kernel<T, true, true> : forward_kernel<T, true, false>)
                           : (cap ? forward_kernel<T, false, true> : forward_kernel<T, false, false>);
  launch("token_logprobs", kernel, op.rows.count(), kThreads, queue, op, static_cast<T*>(gradient));
}

template <typename T>
void backward(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy, void* gradient,
              Rows gradient_rows, Queue queue) {
  using C = compute_t<T>;
  const bool cap = op.transform.softcap > 0;
  const auto kernel = grad_entropy ? (cap ? backward_kernel<T, true, true> : backward_kernel<T, true, false>)
                                   : (cap ? backward_kernel<T, false, true> : backward_kernel<T, false, false>);
  launch("token_logprobs", kernel, op.rows.count(), kThreads, queue, op, static_cast<const C*>(grad_logprobs),
         static_cast<const C*>(grad_entropy), static_cast<T*>(gradient), gradient_rows);
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
