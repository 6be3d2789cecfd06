// Returns and advantages by a block-wide affine scan over time, on a CUDA device.
#pragma once
#include "cpu/gae.h"

namespace rlhf::cuda {

// As cpu::gae, with addresses on the current device; cu_seqlens is not checked. Enqueued on `stream` (a cudaStream_t).
// Throws std::runtime_error where there is no CUDA device or the launch fails.
void gae(const cpu::Gae& op, void* stream);

}  // namespace rlhf::cuda
