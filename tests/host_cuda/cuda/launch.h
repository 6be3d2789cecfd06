// CUDA kernels on the host, for tests on machines without a GPU: one thread per CUDA thread, the blocks of a cluster at
// once and one cluster after another. Stands in for csrc/cuda/launch.h, cuda_bf16.h, cuda_fp16.h and
// cooperative_groups.h, with what the kernels use of them and no more.
#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#include "cpu/simd.h"

#define __device__
#define __global__
#define __shared__ static  // only in kernels without clusters: their blocks run one after another
#define __launch_bounds__(...)

struct Index { unsigned x; };
using cudaStream_t = void*;
struct __nv_bfloat16 { rlhf::bf16 value; };
struct __half { rlhf::f16 value; };

struct Block {
  Block(int threads, int64_t shared_bytes) : barrier(threads), lanes(threads), shared(shared_bytes / 16 + 1) {
    for (int warp = 0; warp < threads / 32; ++warp) warps.emplace_back(32);
  }
  struct alignas(16) Bytes16 { unsigned char bytes[16]; };
  std::barrier<> barrier;
  std::deque<std::barrier<>> warps;
  std::vector<double> lanes;
  std::vector<Bytes16> shared;  // the dynamic shared memory
};

struct Cluster {
  Cluster(int count, int threads, int64_t shared_bytes) : barrier(int64_t(count) * threads) {
    for (int i = 0; i < count; ++i) blocks.emplace_back(threads, shared_bytes);
  }
  std::barrier<> barrier;
  std::deque<Block> blocks;
};

inline thread_local Index threadIdx, blockIdx;
inline thread_local Block* this_block;
inline thread_local Cluster* this_cluster;

inline void __syncthreads() { this_block->barrier.arrive_and_wait(); }

// The value of lane `from` of the warp, of this lane where there is none.
template <typename T> T shuffled(T value, int from) {
  auto& warp = this_block->warps[threadIdx.x / 32];
  auto* lanes = &this_block->lanes[threadIdx.x / 32 * 32];
  std::memcpy(&lanes[threadIdx.x % 32], &value, sizeof(T));
  warp.arrive_and_wait();
  T result = value;
  if (from < 32) std::memcpy(&result, &lanes[from], sizeof(T));
  warp.arrive_and_wait();
  return result;
}
template <typename T> T __shfl_down_sync(unsigned, T value, int by) { return shuffled(value, threadIdx.x % 32 + by); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int by) { return shuffled(value, threadIdx.x % 32 ^ by); }

inline float __bfloat162float(__nv_bfloat16 x) { return rlhf::load(x.value); }
inline float __half2float(__half x) { return rlhf::load(x.value); }
inline __nv_bfloat16 __float2bfloat16(float x) { __nv_bfloat16 out; rlhf::store(out.value, x); return out; }
inline __half __float2half(float x) { __half out; rlhf::store(out.value, x); return out; }

namespace cooperative_groups {

struct cluster_group {
  Cluster& cluster;
  unsigned block_rank() const { return blockIdx.x % unsigned(cluster.blocks.size()); }
  auto barrier_arrive() const { return cluster.barrier.arrive(); }
  void barrier_wait(std::barrier<>::arrival_token&& token) const { cluster.barrier.wait(std::move(token)); }
  void sync() const { cluster.barrier.arrive_and_wait(); }
  template <typename T> T* map_shared_rank(T* own, int rank) const {
    const auto* start = reinterpret_cast<const char*>(this_block->shared.data());
    auto* other = reinterpret_cast<char*>(cluster.blocks[rank].shared.data());
    return reinterpret_cast<T*>(other + (reinterpret_cast<const char*>(own) - start));
  }
};

inline cluster_group this_cluster() { return {*::this_cluster}; }

}  // namespace cooperative_groups

namespace rlhf::cuda {

struct Queue {
  int device;
  cudaStream_t stream;
};

template <typename T> T* dynamic_shared() { return reinterpret_cast<T*>(this_block->shared.data()); }

template <typename... Args> bool runs_in_clusters(const char*, void (*)(Args...), int64_t, Queue) { return true; }

// Shared memory starts as NaN, whatever the type of the element.
template <typename... Args>
void launch_clusters(const char*, void (*kernel)(Args...), int64_t clusters, int blocks, int threads,
                     int64_t shared_bytes, Queue, Args... args) {
  for (int64_t i = 0; i < clusters; ++i) {
    Cluster cluster(blocks, threads, shared_bytes);
    std::vector<std::jthread> running;
    for (int rank = 0; rank < blocks; ++rank) {
      Block& block = cluster.blocks[rank];
      std::memset(block.shared.data(), 0xff, block.shared.size() * 16);
      for (int thread = 0; thread < threads; ++thread)
        running.emplace_back([&, thread, rank] {
          this_cluster = &cluster;
          this_block = &block;
          threadIdx = {unsigned(thread)};
          blockIdx = {unsigned(i * blocks + rank)};
          kernel(args...);
        });
    }
  }
}

template <typename... Args>
void launch(const char* what, void (*kernel)(Args...), int64_t blocks, int threads, int64_t shared_bytes, Queue queue,
            Args... args) {
  launch_clusters(what, kernel, blocks, 1, threads, shared_bytes, queue, args...);
}

}  // namespace rlhf::cuda
