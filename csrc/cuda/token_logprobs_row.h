// What the row and the cluster kernel of token_logprobs share: how a row is divided, visited, summed and differentiated.
// Slices, threads and warps are combined in a fixed order, the same in both: the same inputs give the same bits.
#pragma once
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/token_logprobs.h"
#include "math/token_logprobs.h"

namespace rlhf::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;  // 16-byte loads that a thread issues before it uses the first
constexpr int kMaxSlices = 8;  // blocks of the largest cluster that every device with clusters takes

__device__ inline void store(float& out, float x) { out = x; }
__device__ inline void store(double& out, double x) { out = x; }
__device__ inline void store(__nv_bfloat16& out, float x) { out = __float2bfloat16(x); }
__device__ inline void store(__half& out, float x) { out = __float2half(x); }

template <typename T> using compute_t = typename Compute<T>::type;

// At least so many blocks per multiprocessor; with no bound ptxas aims at more of them and spills.
template <typename T> constexpr int kBlocks = sizeof(compute_t<T>) == 4 ? 3 : 2;

template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
  static constexpr int size = N;
  T x[N];
};
template <typename T> using Pack16 = Pack<T, 16 / sizeof(T)>;

// A row in `count` slices of `size` elements; what comes last is shorter or empty. Every slice is summed on its own,
// whether one block visits them all or a cluster one each, so that a pass without gradients has the bits of one with.
struct Slices {
  int count;
  int64_t size;
  __device__ int64_t begin(int slice, int64_t vocabulary) const {
    return slice * size < vocabulary ? slice * size : vocabulary;
  }
};

// Enough blocks for slices of which a multiprocessor of 228 KB holds three, 1 KB of each being the driver's. A row that
// even the largest cluster cannot hold is one slice.
constexpr int64_t kSliceBytes = 228 * 1024 / 3 - 1024 - 512, kMaxSliceBytes = 200 * 1024;

inline Slices slices_of(const TokenLogprobs& op) {
  constexpr int64_t kElementBytes[] = {4, 8, 2, 2};  // in the order of DType
  const int64_t bytes = op.vocabulary * kElementBytes[int(op.dtype)];
  const auto packs = [&](int count) { return (bytes + 16 * count - 1) / (16 * count); };
  int count = 1;
  while (count < kMaxSlices && packs(count) * 16 > kSliceBytes) count *= 2;
  if (packs(count) * 16 > kMaxSliceBytes) return {1, op.vocabulary};
  return {count, packs(count) * 16 / kElementBytes[int(op.dtype)]};
}

// As token_logprobs_forward with a gradient. False, and nothing done, where the device has no clusters, a slice does
// not fit its shared memory, or a row does not start at a multiple of 16 bytes.
bool token_logprobs_in_clusters(const TokenLogprobs& op, void* gradient, Queue queue);

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

// The statistics of a warp, in its first lane.
template <typename C> __device__ Stats<C> reduce_warp(Stats<C> stats, const RowTransform<C>& row) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    stats = merge(stats,
                  Stats<C>{__shfl_down_sync(~0u, stats.max, step), __shfl_down_sync(~0u, stats.rest, step),
                           __shfl_down_sync(~0u, stats.spread, step), __shfl_down_sync(~0u, stats.squares, step)},
                  row);
  return stats;
}

template <typename C> __device__ Stats<C> merged(const Stats<C>* parts, int count, const RowTransform<C>& row) {
  Stats<C> all = parts[0];
  for (int i = 1; i < count; ++i) all = merge(all, parts[i], row);
  return all;
}

// The log-probabilities of a row's targets in [first, first + size), whose logits are `slice`. The first slice also
// answers for targets outside the vocabulary.
template <typename T>
__device__ void write_logprobs(const TokenLogprobs& op, int64_t row, const T* slice, int64_t first, int64_t size,
                               const Stats<compute_t<T>>& all, const RowTransform<compute_t<T>>& transform) {
  using C = compute_t<T>;
  const int64_t at = row * op.targets_per_row;
  C* logprobs = static_cast<C*>(op.logprobs) + at;
  for (int64_t k = threadIdx.x; k < op.targets_per_row; k += kThreads) {
    const int64_t target = op.targets[at + k];
    if (target >= first && target < first + size)
      logprobs[k] = logprob_of(C(load(slice[target - first])), all, transform);
    else if (first == 0 && (target < 0 || target >= op.vocabulary))
      logprobs[k] = C(NAN);
  }
}

template <bool kMore, typename C>
__device__ void write_result(const TokenLogprobs& op, int64_t row, const RowResult<C>& result) {
  if (threadIdx.x != 0) return;
  static_cast<C*>(op.row_max)[row] = result.max;
  static_cast<C*>(op.row_logsum)[row] = result.logsum;
  if (kMore && op.entropy) static_cast<C*>(op.entropy)[row] = result.entropy;
  if (kMore && op.sum_p_squared) static_cast<C*>(op.sum_p_squared)[row] = result.sum_p_squared;
}

// The results of a row that does not count.
template <bool kMore, typename C> __device__ void write_masked(const TokenLogprobs& op, int64_t row) {
  C* logprobs = static_cast<C*>(op.logprobs) + row * op.targets_per_row;
  for (int64_t k = threadIdx.x; k < op.targets_per_row; k += kThreads) logprobs[k] = 0;
  write_result<kMore>(op, row, RowResult<C>{0, 0, 0, 0});
}

template <typename T> __device__ void write_zeros(T* out, int64_t size) {
  for (int64_t i = threadIdx.x; i < size; i += kThreads) store(out[i], compute_t<T>(0));
}

// The gradient of the sum of a row's log-probabilities, which this block has written.
template <typename C>
__device__ RowGradient<C> gradient_of_sum(const TokenLogprobs& op, int64_t row, const RowResult<C>& result) {
  const int64_t count = op.targets_per_row, at = row * count;
  return {op.targets + at, count, static_cast<const C*>(op.logprobs) + at, nullptr, result.max, result.logsum,
          C(0), C(0), C(count)};
}

// out = d L / d logits, see RowGradient, for the logits [first, first + size) of a row; out may be the logits.
template <bool kEntropy, typename T>
__device__ void write_gradient(const T* logits, T* out, int64_t first, int64_t size,
                               const RowTransform<compute_t<T>>& row, const RowGradient<compute_t<T>>& of) {
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
  for (int64_t k = threadIdx.x; k < of.count; k += kThreads) {
    const int64_t target = of.targets[k];
    if (target >= first && target < first + size) store(out[target - first], of.at_target(k, row));
  }
}

}  // namespace rlhf::cuda
