#include <cooperative_groups.h>

#include <utility>

#include "cuda/bulk_copy.h"
#include "cuda/token_logprobs_row.h"

// The forward pass with its gradient, by a cluster of 1, 2, 4 or 8 blocks per row (sm_90 and later): every block copies
// its slice of the row into shared memory, sums it stage by stage while later stages are under way, exchanges the sums
// with the other blocks, and writes the gradient from shared memory. Every logit is read from memory once and written
// once; the row kernel reads it twice, because the rows in flight are more than the L2 cache holds.
//
// On paper, 8192 x 151936 bfloat16: 2.49 GB in and 2.49 GB out, at the 4.8 TB/s of an H200 1.04 ms, and 1.56 ms with a
// second read. Four blocks per row with a slice of 75,968 bytes each: three blocks per multiprocessor, which then has
// up to 223 KB of loads or stores in flight. The loops of the sm_90a code have 19 instructions per logit, 12.5 for sums
// with the entropy and 6.5 for the gradient: 0.77 ms of issue slots at 1.83 GHz; two exp2 take 0.64 ms of their units.
namespace rlhf::cuda {
namespace {

constexpr int64_t kStageBytes = kBatch * 16;
constexpr int kMaxStages = (kMaxSliceBytes + kStageBytes - 1) / kStageBytes;

template <typename C> struct alignas(16) Shared {
  Sums<C> of_warp[kWarps], of_slice[kMaxSlices];
  BulkCopy stages[kMaxStages];
};

// Starts the copy of `size` logits, one BulkCopy per stage; what is no whole 16 bytes is copied by the threads.
template <typename T> __device__ void start_copies(const T* from, T* to, int64_t size, BulkCopy* stages) {
  constexpr int64_t stage = kStageBytes / sizeof(T);
  const int64_t whole = size - size % Pack16<T>::size;
  if (threadIdx.x == 0) {
    BulkCopy::init(stages, int((size + stage - 1) / stage));
    for (int64_t at = 0; at < size; at += stage)
      stages[at / stage].start(to + at, from + at, unsigned((whole - at < stage ? whole - at : stage) * sizeof(T)));
  }
  for (int64_t i = whole + threadIdx.x; i < size; i += kThreads) to[i] = from[i];
  __syncthreads();
}

// The sums of this block's slice, in every thread.
template <int kMore, typename T>
__device__ Sums<compute_t<T>> sums_of(const T* slice, int64_t size, Shared<compute_t<T>>& shared,
                                      const RowTransform<compute_t<T>>& row) {
  constexpr int64_t stage = kStageBytes / sizeof(T);
  Sums<compute_t<T>> own = no_sums<compute_t<T>>();
  InPlace<T> source;
  for (int64_t at = 0; at < size; at += stage) {
    shared.stages[at / stage].wait();
    add_logits<kMore>(own, slice + at, size - at < stage ? size - at : stage, row, source);
  }
  own = reduce_warp(own);
  if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  return merged(shared.of_warp, kWarps, row);
}

template <typename T, int kMore, bool kCap>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) cluster_kernel(TokenLogprobs op, T* gradient, Slices slices) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using C = compute_t<T>;
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = int(cluster.block_rank());
  const int64_t row = blockIdx.x / slices.count, first = slices.begin(rank, op.vocabulary);
  const int64_t size = slices.begin(rank + 1, op.vocabulary) - first, offset = op.rows.offset(row) + first;
  if (op.mask && !op.mask[row]) {
    if (rank == 0) write_masked<kMore, C>(op, row);
    write_zeros(gradient + offset, size);
    return;
  }
  auto& shared = *dynamic_shared<Shared<C>>();
  T* slice = reinterpret_cast<T*>(&shared + 1);
  start_copies(static_cast<const T*>(op.logits) + offset, slice, size, shared.stages);
  auto started = cluster.barrier_arrive();
  RowTransform<C> transform(op.transform, row);
  if (!kCap) transform.cap = 0;  // known when compiling
  const Sums<C> own = sums_of<kMore>(slice, size, shared, transform);
  cluster.barrier_wait(std::move(started));  // no block's shared memory is there before the block is
  if (int(threadIdx.x) < slices.count) cluster.map_shared_rank(shared.of_slice, threadIdx.x)[rank] = own;
  cluster.sync();
  const Stats<C> all = merged(shared.of_slice, slices.count, transform).stats();
  const RowResult<C> result = finish(all, transform);
  write_logprobs(op, row, slice, first, size, all, transform);
  if (rank == 0) write_result<kMore>(op, row, result);
  write_gradient<false>(slice, gradient + offset, first, size, transform, gradient_of_sum(op, row, result));
#endif
}

template <typename T> auto kernel_of(const TokenLogprobs& op) {
  using Kernel = decltype(&cluster_kernel<T, 0, false>);
  constexpr Kernel kernels[][2] = {{cluster_kernel<T, 0, false>, cluster_kernel<T, 0, true>},
                                   {cluster_kernel<T, kSpread, false>, cluster_kernel<T, kSpread, true>},
                                   {cluster_kernel<T, kSquares, false>, cluster_kernel<T, kSquares, true>}};
  return kernels[more_of(op)][op.transform.softcap > 0];
}

template <typename T>
bool forward_in_clusters(const TokenLogprobs& op, void* gradient, const Slices& slices, Queue queue) {
  const int64_t slice_bytes = slices.size * int64_t(sizeof(T)), bytes = sizeof(Shared<compute_t<T>>) + slice_bytes;
  const Rows& rows = op.rows;
  const int64_t strides = (rows.inner > 1 ? rows.inner_stride : 0) | (rows.outer > 1 ? rows.outer_stride : 0);
  const bool aligned = reinterpret_cast<uintptr_t>(op.logits) % 16 == 0 && strides * int64_t(sizeof(T)) % 16 == 0;
  const auto kernel = kernel_of<T>(op);
  if (!aligned || slice_bytes > kMaxSliceBytes || !runs_in_clusters("token_logprobs", kernel, bytes, queue))
    return false;
  launch_clusters("token_logprobs", kernel, rows.count(), slices.count, kThreads, bytes, queue, op,
                  static_cast<T*>(gradient), slices);
  return true;
}

// In the order of DType.
constexpr decltype(&forward_in_clusters<float>) kForwardInClusters[] = {
    forward_in_clusters<float>, forward_in_clusters<double>, forward_in_clusters<__nv_bfloat16>,
    forward_in_clusters<__half>};

}  // namespace

bool token_logprobs_in_clusters(const TokenLogprobs& op, void* gradient, Queue queue) {
  return kForwardInClusters[int(op.dtype)](op, gradient, slices_of(op), queue);
}

}  // namespace rlhf::cuda
