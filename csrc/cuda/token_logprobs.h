// Selective log-softmax over rows of logits, forward and backward, on a CUDA device.
#pragma once
#include "cpu/token_logprobs.h"

namespace rlhf::cuda {

using cpu::TokenLogprobs;

// As rlhf::cpu::token_logprobs_forward, asynchronously.
void token_logprobs_forward(const TokenLogprobs& op, void* gradient, int device, uintptr_t stream);

void token_logprobs_backward(const TokenLogprobs& op, const void* grad_logprobs, const void* grad_entropy,
                             const void* grad_lse, void* gradient, Rows gradient_rows, int device, uintptr_t stream);

}  // namespace rlhf::cuda
