#include "cuda/token_logprobs.h"

#include "cuda/token_logprobs_row.h"

// Forward takes one block per row and reads every logit once (twice where it writes the gradient as well and no cluster
// can). Backward takes one block per chunk of a row and reads and writes every element once; as in a copy, blocks that
// run together work on neighbouring memory.
namespace rlhf::cuda {
namespace {

// The statistics of a row, in every thread.
template <int kMore, typename T>
__device__ Stats<compute_t<T>> stats_of(const T* logits, int64_t size, const Slices& slices,
                                        const RowTransform<compute_t<T>>& row) {
  using C = compute_t<T>;
  __shared__ Sums<C> of_warp[kMaxSlices * kWarps], of_slice[kMaxSlices];
  Ahead<T> source(logits, size, slices, dynamic_shared<Words>());
  for (int slice = 0; slice < slices.count; ++slice) {
    const int64_t first = slices.begin(slice, size);
    Sums<C> own = no_sums<C>();
    add_logits<kMore>(own, logits + first, slices.begin(slice + 1, size) - first, row, source);
    own = reduce_warp(own);
    if (threadIdx.x % 32 == 0) of_warp[slice * kWarps + threadIdx.x / 32] = own;
  }
  __syncthreads();
  if (int(threadIdx.x) < slices.count) of_slice[threadIdx.x] = merged(of_warp + threadIdx.x * kWarps, kWarps, row);
  __syncthreads();
  return merged(of_slice, slices.count, row).stats();
}

template <typename T, int kMore, bool kCap>
__global__ void __launch_bounds__(kThreads, kBlocks<T> - kCap) forward_kernel(TokenLogprobs op, T* gradient, Slices slices) {
  using C = compute_t<T>;
  const int64_t row = blockIdx.x, offset = op.rows.offset(row), size = op.vocabulary;
  if (op.mask && !op.mask[row]) {
    write_masked<kMore, C>(op, row);
    if (gradient) write_zeros(gradient + offset, size);
    return;
  }
  const T* logits = static_cast<const T*>(op.logits) + offset;
  RowTransform<C> transform(op.transform, row);
  if (!kCap) transform.cap = 0;  // known when compiling
  const Stats<C> all = stats_of<kMore>(logits, size, slices, transform);
  const RowResult<C> result = finish(all, transform);
  write_logprobs(op, row, logits, 0, size, all, transform);
  write_result<kMore>(op, row, result);
  if (!gradient) return;
  __syncthreads();  // every thread has read its targets' logits and written their log-probabilities
  write_gradient<false>(logits, gradient + offset, 0, size, transform, gradient_of_sum(op, row, result));
}

// What a block each of the backward pass differentiates of a row.
template <typename T> RLHF_HD Slices chunks_of(int64_t vocabulary) {
  constexpr int64_t size = kBatch * Pack16<T>::size;
  return {int((vocabulary + size - 1) / size), size};
}

template <typename T, bool kEntropy, bool kCap>
__global__ void __launch_bounds__(kThreads, sizeof(compute_t<T>) == 4 ? 4 : 2)
    backward_kernel(TokenLogprobs op, const compute_t<T>* grad_logprobs, const compute_t<T>* grad_entropy,
                    const compute_t<T>* grad_lse, T* gradient, Rows gradient_rows) {
  using C = compute_t<T>;
  const Slices chunks = chunks_of<T>(op.vocabulary);
  const int64_t row = blockIdx.x / chunks.count, first = chunks.size * (blockIdx.x % chunks.count);
  const int64_t size = chunks.begin(int(blockIdx.x % chunks.count) + 1, op.vocabulary) - first;
  const int64_t count = grad_logprobs ? op.targets_per_row : 0, at = row * op.targets_per_row;
  const T* logits = static_cast<const T*>(op.logits) + op.rows.offset(row) + first;
  T* out = gradient + gradient_rows.offset(row) + first;
  const C g_entropy = kEntropy ? grad_entropy[row] : C(0), g_lse = grad_lse ? grad_lse[row] : C(0);
  RowGradient<C> of{op.targets + at, count, static_cast<const C*>(op.logprobs) + at,
                    grad_logprobs ? grad_logprobs + at : nullptr, static_cast<const C*>(op.row_max)[row],
                    static_cast<const C*>(op.row_logsum)[row],
                    kEntropy ? static_cast<const C*>(op.entropy)[row] : C(0), g_entropy, g_lse, C(0)};
  bool silent = g_entropy == 0 && g_lse == 0;
  for (int64_t k = 0; k < count; ++k) {
    of.g_sum += of.g(k);
    silent = silent && of.g(k) == 0;
  }
  if (silent || (op.mask && !op.mask[row])) {
    write_zeros(out, size);
    return;
  }
  RowTransform<C> transform(op.transform, row);
  if (!kCap) transform.cap = 0;  // known when compiling
  write_gradient<kEntropy>(logits, out, first, size, transform, of);
}

template <typename T> void forward(const TokenLogprobs& op, void* gradient, const Slices& slices, Queue queue) {
  using Kernel = decltype(&forward_kernel<T, 0, false>);
  constexpr Kernel kernels[][2] = {{forward_kernel<T, 0, false>, forward_kernel<T, 0, true>},
                                   {forward_kernel<T, kSpread, false>, forward_kernel<T, kSpread, true>},
                                   {forward_kernel<T, kSquares, false>, forward_kernel<T, kSquares, true>}};
  launch("token_logprobs", kernels[more_of(op)][op.transform.softcap > 0], op.rows.count(), kThreads, Ahead<T>::kBytes,
         queue, op, static_cast<T*>(gradient), slices);
}

template <typename T>
void backward(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy, const void* grad_lse,
              void* gradient, Rows gradient_rows, Queue queue) {
  using C = compute_t<T>;
  const bool cap = op.transform.softcap > 0;
  const auto kernel = grad_entropy ? (cap ? backward_kernel<T, true, true> : backward_kernel<T, true, false>)
                                   : (cap ? backward_kernel<T, false, true> : backward_kernel<T, false, false>);
  launch("token_logprobs", kernel, op.rows.count() * chunks_of<T>(op.vocabulary).count, kThreads, 0, queue, op,
         static_cast<const C*>(grad_logprobs), static_cast<const C*>(grad_entropy), static_cast<const C*>(grad_lse),
         static_cast<T*>(gradient), gradient_rows);
}

// In the order of DType.
constexpr decltype(&forward<float>) kForward[] = {forward<float>, forward<double>, forward<__nv_bfloat16>,
                                                  forward<__half>};
constexpr decltype(&backward<float>) kBackward[] = {backward<float>, backward<double>, backward<__nv_bfloat16>,
                                                    backward<__half>};

}  // namespace

void token_logprobs_forward(const TokenLogprobs& op, void* gradient, int device, uintptr_t stream) {
  const Queue queue{device, reinterpret_cast<cudaStream_t>(stream)};
  if (gradient && token_logprobs_in_clusters(op, gradient, queue)) return;
  kForward[int(op.dtype)](op, gradient, slices_of(op), queue);
}

void token_logprobs_backward(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy,
                             const void* grad_lse, void* gradient, Rows gradient_rows, int device, uintptr_t stream) {
  kBackward[int(op.dtype)](op, grad_logprobs, grad_entropy, grad_lse, gradient, gradient_rows,
                           {device, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace rlhf::cuda
