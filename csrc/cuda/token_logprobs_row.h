// What the row and the cluster kernel of token_logprobs share: how a row is divided, visited, summed, differentiated.
// Slices, threads and warps are combined in a fixed order, the same in both: the same inputs give the same bits. So that
// the compiler chooses no rounding, which it could do differently in each, it may not contract a product and a sum
// (-fmad=false, in CMakeLists.txt); where one rounding is wanted, std::fma says so.
#pragma once
#include <cstring>

#include "cuda/async_copy.h"
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

// kMore: 0 for `ties` and `rest` alone, kSpread with `spread`, for the entropy, kSquares with `squares` as well.
constexpr int kSpread = 1, kSquares = 2;

inline int more_of(const TokenLogprobs& op) { return op.sum_p_squared ? kSquares : op.entropy ? kSpread : 0; }

// The elements of a pack as they are computed with.
template <typename T, int N> __device__ void widen(const Pack<T, N>& pack, compute_t<T> (&x)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = load(pack.x[k]);
}

// A bfloat16 is the upper half of a float: one instruction for each of the two in a word, where converting takes two.
__device__ inline void widen(const Pack16<__nv_bfloat16>& pack, float (&x)[8]) {
  Words words;
  std::memcpy(&words, &pack, sizeof(words));
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t low = words.x[k] << 16, high = words.x[k] & 0xffff0000u;
    std::memcpy(&x[2 * k], &low, 4);
    std::memcpy(&x[2 * k + 1], &high, 4);
  }
}

// The greatest of a pack, which is NaN only where all are.
template <typename T, int N> __device__ compute_t<T> top_of(const Pack<T, N>& pack) {
  compute_t<T> x[N];
  widen(pack, x);
  compute_t<T> top = x[0];
#pragma unroll
  for (int k = 1; k < N; ++k) top = std::fmax(top, x[k]);
  return top;
}

#if defined(__CUDA_ARCH__)
__device__ inline float top_of(const Pack16<__nv_bfloat16>& pack) {  // two at a time
  Words words;
  std::memcpy(&words, &pack, sizeof(words));
  uint32_t top = words.x[0];
#pragma unroll
  for (int k = 1; k < 4; ++k) asm("max.bf16x2 %0, %0, %1;" : "+r"(top) : "r"(words.x[k]));
  return std::fmax(__uint_as_float(top << 16), __uint_as_float(top & 0xffff0000u));
}
#endif

// Adds the first `count` of a thread's packs, behind which all is -inf. All lanes of a warp call it together and have
// one maximum, so that it rises seldom, and a new or equal maximum is a branch that few packs take.
template <int kMore, typename T, int N, int M>
__device__ void add_packs(Sums<compute_t<T>>& sums, const Pack<T, N> (&packs)[M], int count,
                          const RowTransform<compute_t<T>>& row) {
  using C = compute_t<T>;
  C tops[M], top = -C(INFINITY);
#pragma unroll
  for (int i = 0; i < M; ++i) {
    tops[i] = top_of(packs[i]);
    top = std::fmax(top, tops[i]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = std::fmax(top, __shfl_xor_sync(~0u, top, step));
  sums = raised(sums, top, row);
  const bool empty = sums.max == -C(INFINITY);
  const C shift = empty ? C(0) : row.capped(sums.max), factor2 = row.factor * C(kLog2E);
#pragma unroll
  for (int i = 0; i < M; ++i) {
    if (row.cap > 0 && i >= count) break;  // without a softcap the others add nothing
    C x[N], s[N];
    widen(packs[i], x);
#pragma unroll
    for (int k = 0; k < N; ++k) s[k] = row.capped(x[k]);
    if (tops[i] == sums.max && !empty) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const bool tie = x[k] == sums.max;
        sums.ties += tie ? C(1) : C(0);
        s[k] = tie ? -C(INFINITY) : s[k];
      }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const C t = (s[k] - shift) * factor2, e = exp2_flushed(t);
      sums.rest += e;
      if (kMore >= kSpread) sums.spread = std::fma(-e, std::fmax(t, C(kNoPower)), sums.spread);
      if (kMore >= kSquares) sums.squares = std::fma(e, e, sums.squares);
    }
  }
}

// The whole 16-byte packs of a part of a row, from element `head` on.
template <typename T> struct Packs {
  int64_t head, count;
  const Words* begin;
  __device__ Packs(const T* part, int64_t size)
      : head(head_of(part, part, size)), count((size - head) / Pack16<T>::size),
        begin(reinterpret_cast<const Words*>(part + head)) {}
};

// A pack of -inf, behind the end of a row.
template <typename T> __device__ Words nothing() {
  Pack16<T> pack;
#pragma unroll
  for (T& x : pack.x) store(x, -compute_t<T>(INFINITY));
  Words words;
  std::memcpy(&words, &pack, sizeof(words));
  return words;
}

// Batches that are in fast memory already.
template <typename T> struct InPlace {
  __device__ void next(Words (&words)[kInFlight], const Words* batch, int left) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int pack = int(threadIdx.x) + i * kThreads;
      words[i] = nothing<T>();
      if (pack < left) words[i] = batch[pack];
    }
  }
};

// The batches of a row's slices, one after the other, each on its way to shared memory while those before it are used.
// A thread copies what it reads itself, so that it waits for no other.
template <typename T> class Ahead {
 public:
  static constexpr int kBatches = 3;  // two on their way and one in use
  static constexpr int64_t kBytes = kBatches * kBatch * 16;

  __device__ Ahead(const T* logits, int64_t size, const Slices& slices, Words* shared)
      : logits_(logits), size_(size), slices_(slices), shared_(shared) {
    enter(0);
    for (int i = 0; i < kBatches - 1; ++i) start();
  }

  __device__ void next(Words (&words)[kInFlight], const Words*, int) {
    wait_copy_groups<kBatches - 2>();
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) words[i] = shared_[used_ * kBatch + int(threadIdx.x) + i * kThreads];
    used_ = used_ + 1 == kBatches ? 0 : used_ + 1;
    start();  // over the batch before this one
  }

 private:
  __device__ void enter(int slice) {
    for (left_ = 0; slice < slices_.count && left_ == 0; ++slice) {
      const int64_t first = slices_.begin(slice, size_);
      const Packs<T> packs(logits_ + first, slices_.begin(slice + 1, size_) - first);
      from_ = packs.begin;
      left_ = int(packs.count);
    }
    slice_ = slice;
  }

  __device__ void start() {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int pack = int(threadIdx.x) + i * kThreads;
      Words* to = shared_ + started_ * kBatch + pack;
      if (pack < left_)
        start_copy16(to, from_ + pack);
      else
        *to = nothing<T>();
    }
    end_copy_group();
    started_ = started_ + 1 == kBatches ? 0 : started_ + 1;
    from_ += kBatch;
    left_ -= kBatch;
    if (left_ <= 0) enter(slice_);
  }

  const T* logits_;
  int64_t size_;
  const Slices& slices_;
  Words* shared_;
  const Words* from_ = nullptr;  // what is started next
  int left_ = 0;                 // packs from there to the end of the slice
  int slice_ = 0;                // after that one
  int started_ = 0, used_ = 0;   // places in the ring
};

// Adds logits that all threads of the block visit together.
template <int kMore, typename T, typename Source>
__device__ void add_logits(Sums<compute_t<T>>& sums, const T* logits, int64_t size,
                           const RowTransform<compute_t<T>>& row, Source& source) {
  using C = compute_t<T>;
  constexpr int kSize = Pack16<T>::size;
  const Packs<T> packs(logits, size);
  const int64_t edges = size - packs.count * kSize;
  const int thread = int(threadIdx.x);
  const Words* batch = packs.begin;
  for (int left = int(packs.count); left > 0; left -= kBatch, batch += kBatch) {
    Words words[kInFlight];
    source.next(words, batch, left);
    Pack16<T> loaded[kInFlight];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      count += thread + i * kThreads < left;
      loaded[i] = elements<T>(words[i]);
    }
    add_packs<kMore>(sums, loaded, count, row);
  }
  for (int64_t base = 0; base < edges; base += kThreads) {
    const int64_t edge = base + thread;
    Pack<T, 1> one[1] = {{elements<T>(nothing<T>()).x[0]}};
    if (edge < edges) one[0].x[0] = logits[edge < packs.head ? edge : edge + packs.count * kSize];
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

template <int kMore, typename C>
__device__ void write_result(const TokenLogprobs& op, int64_t row, const RowResult<C>& result) {
  if (threadIdx.x != 0) return;
  static_cast<C*>(op.row_max)[row] = result.max;
  static_cast<C*>(op.row_logsum)[row] = result.logsum;
  if (kMore && op.entropy) static_cast<C*>(op.entropy)[row] = result.entropy;
  if (kMore && op.sum_p_squared) static_cast<C*>(op.sum_p_squared)[row] = result.sum_p_squared;
}

// The results of a row that does not count.
template <int kMore, typename C> __device__ void write_masked(const TokenLogprobs& op, int64_t row) {
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
    C logit[pack.size];
    widen(pack, logit);
#pragma unroll
    for (int i = 0; i < pack.size; ++i) {
      const C x = logit[i], s = row.capped(x), t = std::fma(s - shift, factor2, -logsum2), p = exp2_flushed(t);
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
