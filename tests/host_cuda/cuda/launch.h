// CUDA kernels on the host, for tests on machines without a GPU: one thread per CUDA thread, one block after another.
// Stands in for csrc/cuda/launch.h, cuda_bf16.h and cuda_fp16.h, with what the kernels use of them and no more.
#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/simd.h"

#define __device__
#define __global__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)

struct Index { unsigned x; };
using cudaStream_t = void*;
struct __nv_bfloat16 { rlhf::bf16 value; };
struct __half { rlhf::f16 value; };

inline thread_local Index threadIdx, blockIdx;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline double lanes[1024];

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

template <typename T> T __shfl_down_sync(unsigned, T value, int distance) {
  auto& warp = *warp_barriers[threadIdx.x / 32];
  std::memcpy(&lanes[threadIdx.x], &value, sizeof(T));
  warp.arrive_and_wait();
  T result = value;
  if (int(threadIdx.x % 32) + distance < 32) std::memcpy(&result, &lanes[threadIdx.x + distance], sizeof(T));
  warp.arrive_and_wait();
  return result;
}

inline float __bfloat162float(__nv_bfloat16 x) { return rlhf::load(x.value); }
inline float __half2float(__half x) { return rlhf::load(x.value); }
inline __nv_bfloat16 __float2bfloat16(float x) { __nv_bfloat16 out; rlhf::store(out.value, x); return out; }
inline __half __float2half(float x) { __half out; rlhf::store(out.value, x); return out; }

namespace rlhf::cuda {

struct Queue {
  int device;
  cudaStream_t stream;
};

template <typename... Args>
void launch(const char*, void (*kernel)(Args...), int64_t blocks, int threads, Queue, Args... args) {
  for (int64_t block = 0; block < blocks; ++block) {
    block_barrier = std::make_unique<std::barrier<>>(threads);
    warp_barriers.clear();
    for (int warp = 0; warp < threads / 32; ++warp) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::jthread> running;
    for (int thread = 0; thread < threads; ++thread)
      running.emplace_back([=] {
        threadIdx = {unsigned(thread)};
        blockIdx = {unsigned(block)};
        kernel(args...);
      });
  }
}

}  // namespace rlhf::cuda
