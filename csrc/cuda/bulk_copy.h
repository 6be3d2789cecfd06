// Copies from global to shared memory by the copy engine (sm_90 and later), beside the threads' own work.
#pragma once
#include <cstdint>

namespace rlhf::cuda {

// One copy, an object in shared memory that is used once: an mbarrier which completes when all bytes are there.
class BulkCopy {
 public:
  // By the thread that starts them; the others may wait after the next __syncthreads.
  __device__ static void init(BulkCopy* copies, int count) {
    for (int i = 0; i < count; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(copies[i].address()) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copy engine must see them as well
  }

  // `bytes` and both addresses are multiples of 16; 0 bytes are there at once.
  __device__ void start(void* shared, const void* global, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
    if (bytes == 0) return;
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     address(shared)),
                 "l"(global), "r"(bytes), "r"(address())
                 : "memory");
  }

  __device__ void wait() {
    for (uint32_t done = 0; !done;)
      asm volatile(
          "{.reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], 0; selp.u32 %0, 1, 0, done;}"
          : "=r"(done)
          : "r"(address())
          : "memory");
  }

 private:
  __device__ static uint32_t address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }
  __device__ uint32_t address() const { return address(&barrier_); }

  uint64_t barrier_;
};

}  // namespace rlhf::cuda
