// Copies of 16 bytes from global to shared memory that a thread starts and waits for by itself (sm_80 and later).
#pragma once
#include <cstdint>

namespace rlhf::cuda {

__device__ inline void start_copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}

// Makes a group of the copies that this thread has started since the last one.
__device__ inline void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the `kLater` youngest groups of this thread.
template <int kLater> __device__ inline void wait_copy_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

}  // namespace rlhf::cuda
