// What the row and the cluster kernel of token_logprobs share: how a row is divided, visited, summed, differentiated.
// Slices, threads and warps are combined in a fixed order, the same in both: the same inputs give the same bits. So that
// the compiler chooses no rounding, which it could do differently in each, it may not contract a product and a sum
// (-fmad=false, in CMakeLists.txt); where one rounding is wanted, std::fma says so.
#pragma once
#include <cstring>

#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/token_logprobs.h"
#include "math/token_logprobs.h"

namespace rlhf::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;  // 16-byte loads that a thread issues before it uses the first
constexpr int kBatch = kInFlight * kThreads;
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

// Packs are loaded as words: a load under a condition of narrow elements would move each of them once more.
using Words = Pack<uint32_t, 4>;
template <typename T> __device__ Pack16<T> elements(const Words& words) {
  Pack16<T> pack;
  std::memcpy(&pack, &words, sizeof(pack));
  return pack;
}

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
  constexpr int kSize = Pack16<T>::size;
  const int thread = int(threadIdx.x);
  const int64_t packs = (size - head) / kSize;
  const auto* body = reinterpret_cast<const Words*>(row + head);
  for (int64_t base = 0; base < packs; base += kBatch) {
    const int inside = packs - base < kBatch ? int(packs - base) : kBatch;
    Words loaded[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (thread + i * kThreads < inside) loaded[i] = body[base + thread + i * kThreads];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (thread + i * kThreads < inside)
        visit(elements<T>(loaded[i]), head + (base + thread + i * kThreads) * kSize);
  }
  const int64_t edges = size - packs * kSize;
  for (int64_t edge = thread; edge < edges; edge += kThreads) {
    const int64_t i = edge < head ? edge : edge + packs * kSize;
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

// 2^x to 2 units in the last place; one instruction in float, which gives 0 below 2^-126.
__device__ inline float exp2_flushed(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
__device__ inline double exp2_flushed(double x) { return std::exp2(x); }

// Where 2^x is 0 in every type: what stands in for x = -inf in a product with it.
constexpr double kNoPower = -4096;

// Stats in the making. No element is above `max`, but the greatest may be in another set: `ties` counts the elements
// equal to it, the sums are over the others, with e = exp(z - max z): e, e (max z - z) / ln 2, e^2.
template <typename C> struct Sums {
  C max, ties, rest, spread, squares;
  __device__ Stats<C> stats() const { return {max, ties - 1 + rest, C(kLn2) * spread, ties - 1 + squares}; }
};

template <typename C> __device__ Sums<C> no_sums() { return {-C(INFINITY), 0, 0, 0, 0}; }

// The same set relative to a maximum that may be greater.
template <typename C> __device__ Sums<C> raised(const Sums<C>& sums, C max, const RowTransform<C>& row) {
  if (!(max > sums.max)) return sums;
  const bool empty = sums.max == -C(INFINITY);
  const C t = empty ? C(0) : row.factor * C(kLog2E) * (row.capped(max) - row.capped(sums.max));
  const C e = std::exp2(-t), mass = sums.ties + sums.rest;
  return {max, 0, e * mass, e * (sums.spread + t * mass), e * e * (sums.ties + sums.squares)};
}

template <typename C> __device__ Sums<C> merged(const Sums<C>* parts, int count, const RowTransform<C>& row) {
  Sums<C> all = parts[0];
  for (int i = 1; i < count; ++i) {
    const C max = std::fmax(all.max, parts[i].max);
    const Sums<C> a = raised(all, max, row), b = raised(parts[i], max, row);
    all = {max, a.ties + b.ties, a.rest + b.rest, a.spread + b.spread, a.squares + b.squares};
  }
  return all;
}

// Adds the first `count` of a thread's packs, behind which all is -inf. All lanes of a warp call it together and have
// one maximum, so that it rises seldom, and a new or equal maximum is a branch that few packs take.
template <bool kMore, typename T, int N, int M>
__device__ void add_packs(Sums<compute_t<T>>& sums, const Pack<T, N> (&packs)[M], int count,
                          const RowTransform<compute_t<T>>& row) {
  using C = compute_t<T>;
  C tops[M], top = -C(INFINITY);
#pragma unroll
  for (int i = 0; i < M; ++i) {
    tops[i] = load(packs[i].x[0]);
#pragma unroll
    for (int k = 1; k < N; ++k) tops[i] = std::fmax(tops[i], load(packs[i].x[k]));
    top = std::fmax(top, tops[i]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = std::fmax(top, __shfl_xor_sync(~0u, top, step));
  sums = raised(sums, top, row);
  const bool empty = sums.max == -C(INFINITY);
  const C shift = empty ? C(0) : row.capped(sums.max), factor2 = row.factor * C(kLog2E);
#pragma unroll
  for (int i = 0; i < M; ++i) {
    if (i >= count) break;
    C s[N];
#pragma unroll
    for (int k = 0; k < N; ++k) s[k] = row.capped(load(packs[i].x[k]));
    if (tops[i] == sums.max && !empty) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const bool tie = C(load(packs[i].x[k])) == sums.max;
        sums.ties += tie ? C(1) : C(0);
        s[k] = tie ? -C(INFINITY) : s[k];
      }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const C t = (s[k] - shift) * factor2, e = exp2_flushed(t);
      sums.rest += e;
      if (kMore) {
        sums.spread = std::fma(-e, std::fmax(t, C(kNoPower)), sums.spread);
        sums.squares = std::fma(e, e, sums.squares);
      }
    }
  }
}

// Adds logits that all threads of the block visit together.
template <bool kMore, typename T>
__device__ void add_logits(Sums<compute_t<T>>& sums, const T* logits, int64_t size,
                           const RowTransform<compute_t<T>>& row) {
  using C = compute_t<T>;
  constexpr int kSize = Pack16<T>::size;
  const int64_t head = head_of(logits, logits, size), packs = (size - head) / kSize, edges = size - packs * kSize;
  const int thread = int(threadIdx.x);
  Pack16<T> nothing;
#pragma unroll
  for (int k = 0; k < kSize; ++k) store(nothing.x[k], -C(INFINITY));
  Words no_words;
  std::memcpy(&no_words, &nothing, sizeof(no_words));
  const auto* next = reinterpret_cast<const Words*>(logits + head) + thread;
  for (int64_t left = packs; left > 0; left -= kBatch, next += kBatch) {
    const int inside = left < kBatch ? int(left) : kBatch;
    Pack16<T> loaded[kInFlight];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const bool is_inside = thread + i * kThreads < inside;
      Words words = no_words;
      if (is_inside) words = next[i * kThreads];
      count += is_inside;
      loaded[i] = elements<T>(words);
    }
    add_packs<kMore>(sums, loaded, count, row);
  }
  for (int64_t base = 0; base < edges; base += kThreads) {
    const int64_t edge = base + thread;
    Pack<T, 1> one[1] = {{nothing.x[0]}};
    if (edge < edges) one[0].x[0] = logits[edge < head ? edge : edge + packs * kSize];
    add_packs<kMore>(sums, one, edge < edges, row);
  }
}

// The sums of a warp, whose lanes have one maximum, in its first lane.
template <typename C> __device__ Sums<C> reduce_warp(Sums<C> sums) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    sums.ties += __shfl_down_sync(~0u, sums.ties, step);
    sums.rest += __shfl_down_sync(~0u, sums.rest, step);
    sums.spread += __shfl_down_sync(~0u, sums.spread, step);
    sums.squares += __shfl_down_sync(~0u, sums.squares, step);
  }
  return sums;
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
          C(0), C(0), C(0), C(count)};
}

// out = d L / d logits, see RowGradient, for the logits [first, first + size) of a row; out may be the logits.
template <bool kEntropy, typename T>
__device__ void write_gradient(const T* logits, T* out, int64_t first, int64_t size,
                               const RowTransform<compute_t<T>>& row, const RowGradient<compute_t<T>>& of) {
  using C = compute_t<T>;
  const C shift = of.max / row.factor, factor2 = row.factor * C(kLog2E), logsum2 = of.logsum * C(kLog2E);
  const C constant = -row.factor * (of.g_sum - of.g_lse + of.g_entropy * of.entropy);
  const C linear = -row.factor * of.g_entropy * C(kLn2);
  // Before `out` is written, which may be the logits where a thread has one target at most.
  C target_slope = 1;
  if (row.cap > 0 && threadIdx.x < of.count) {
    const int64_t target = of.targets[threadIdx.x];
    if (target >= first && target < first + size) target_slope = row.slope(load(logits[target - first]));
  }
  if (row.cap > 0) __syncthreads();
  for_each_pack(logits, size, head_of(logits, out, size), [&](auto pack, int64_t start) {
#pragma unroll
    for (int i = 0; i < pack.size; ++i) {
      const C x = load(pack.x[i]), s = row.capped(x), t = std::fma(s - shift, factor2, -logsum2), p = exp2_flushed(t);
      const C at_one = kEntropy ? std::fma(linear, std::fmax(t, C(kNoPower)), constant) : constant;
      store(pack.x[i], p * at_one * row.slope(x));
    }
    *reinterpret_cast<decltype(pack)*>(out + start) = pack;
  });
  __syncthreads();
  for (int64_t k = threadIdx.x; k < of.count; k += kThreads) {
    const int64_t target = of.targets[k];
    if (target < first || target >= first + size) continue;
    if (k >= kThreads && row.cap > 0) target_slope = row.slope(load(logits[target - first]));
    store(out[target - first], of.at_target(k, target_slope, row));
  }
}

}  // namespace rlhf::cuda
