// C entry points for ctypes, over the kernels of csrc/cuda/token_logprobs*.cu on the host.
#include "../../csrc/cuda/token_logprobs.cu"
#include "../../csrc/cuda/token_logprobs_cluster.cu"

using namespace rlhf;

namespace {

// transform: temperature, logit_scale, softcap; stats: logprobs, entropy, row_max, row_logsum, sum_p_squared
cuda::TokenLogprobs op(void* logits, int dtype, const int64_t* rows, int64_t vocabulary, int64_t* targets,
                       int64_t targets_per_row, uint8_t* mask, const double* transform, void** stats) {
  return {logits, DType(dtype), {rows[0], rows[1], rows[2], rows[3]}, vocabulary, targets, targets_per_row, mask,
          {transform[0], nullptr, transform[1], transform[2]}, stats[0], stats[1], stats[2], stats[3], stats[4]};
}

}  // namespace

extern "C" void forward(void* logits, int dtype, const int64_t* rows, int64_t vocabulary, int64_t* targets,
                        int64_t targets_per_row, uint8_t* mask, const double* transform, void** stats,
                        void* gradient) {
  cuda::token_logprobs_forward(
      op(logits, dtype, rows, vocabulary, targets, targets_per_row, mask, transform, stats), gradient, 0, 0);
}

// By one block per row, or by a cluster of `slices` blocks; false where a cluster cannot.
extern "C" bool forward_in_slices(void* logits, int dtype, const int64_t* rows, int64_t vocabulary, int64_t* targets,
                                  int64_t targets_per_row, uint8_t* mask, const double* transform, void** stats,
                                  void* gradient, int slices, int64_t slice_size, bool in_cluster) {
  const auto call = op(logits, dtype, rows, vocabulary, targets, targets_per_row, mask, transform, stats);
  if (in_cluster) return cuda::kForwardInClusters[dtype](call, gradient, {slices, slice_size}, {});
  cuda::kForward[dtype](call, gradient, {slices, slice_size}, {});
  return true;
}

extern "C" int slices(int dtype, int64_t vocabulary, int64_t* slice_size) {
  cuda::TokenLogprobs call = {};
  call.dtype = DType(dtype);
  call.vocabulary = vocabulary;
  const cuda::Slices found = cuda::slices_of(call);
  *slice_size = found.size;
  return found.count;
}

extern "C" void backward(void* logits, int dtype, const int64_t* rows, int64_t vocabulary, int64_t* targets,
                         int64_t targets_per_row, uint8_t* mask, const double* transform, void** stats,
                         void* grad_logprobs, void* grad_entropy, void* grad_lse, void* gradient,
                         const int64_t* gradient_rows) {
  cuda::token_logprobs_backward(
      op(logits, dtype, rows, vocabulary, targets, targets_per_row, mask, transform, stats), grad_logprobs,
      grad_entropy, grad_lse, gradient, {gradient_rows[0], gradient_rows[1], gradient_rows[2], gradient_rows[3]}, 0, 0);
}
