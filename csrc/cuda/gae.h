// Returns and advantages by a block-wide affine scan over time, on a CUDA device.
#pragma once
#include "cpu/gae.h"

namespace rlhf::cuda {

// As cpu::gae, asynchronously; cu_seqlens is not checked.
void gae(const cpu::Gae& op, int device, uintptr_t stream);

}  // namespace rlhf::cuda
