// How every CUDA kernel is launched: on the tensor's device, on PyTorch's stream, with errors raised at once.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace rlhf::cuda {

struct Queue {
  int device;
  cudaStream_t stream;
};

inline void check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a failed launch stays in the runtime until it is read
  const bool absent = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver;
  throw std::runtime_error(std::string(what) + ": " + (absent ? "no CUDA device or driver here: " : "CUDA error: ") +
                           cudaGetErrorString(error));
}

// The calling thread's current device, put back at the end of the scope.
class OnDevice {
 public:
  OnDevice(const char* what, int device) : device_(device) {
    check(what, cudaGetDevice(&before_));
    if (before_ != device_) check(what, cudaSetDevice(device_));
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int device_, before_ = -1;
};

// shared_bytes: of dynamic shared memory per block, the same in every call.
template <typename... Args>
void launch(const char* what, void (*kernel)(Args...), int64_t blocks, int threads, int64_t shared_bytes, Queue queue,
            Args... args) {
  if (blocks == 0) return;
  OnDevice guard(what, queue.device);
  const auto* code = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 0) {
    const auto set = [&](cudaFuncAttribute name, int value) { check(what, cudaFuncSetAttribute(code, name, value)); };
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  void* pointers[] = {&args...};
  check(what, cudaLaunchKernel(code, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers, size_t(shared_bytes),
                               queue.stream));
}

// The block's dynamic shared memory, aligned for 16-byte copies.
template <typename T> __device__ T* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
}

// The most shared memory that a block of this device can have.
inline int most_shared_bytes(const char* what, int device) {
  int bytes = 0;
  check(what, cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Whether this device runs code of `kernel` that was compiled for clusters, with so much shared memory per block.
template <typename... Args>
bool runs_in_clusters(const char* what, void (*kernel)(Args...), int64_t shared_bytes, Queue queue) {
  OnDevice guard(what, queue.device);
  cudaFuncAttributes code;
  check(what, cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(kernel)));
  return code.ptxVersion >= 90 && shared_bytes <= most_shared_bytes(what, queue.device);
}

// For kernels without static shared memory.
template <typename... Args>
void launch_clusters(const char* what, void (*kernel)(Args...), int64_t clusters, int blocks, int threads,
                     int64_t shared_bytes, Queue queue, Args... args) {
  if (clusters == 0) return;
  OnDevice guard(what, queue.device);
  const auto* code = reinterpret_cast<const void*>(kernel);
  // The limit is the kernel's and not the launch's: always the same, or calls of other threads could lower it.
  const auto set = [&](cudaFuncAttribute name, int value) { check(what, cudaFuncSetAttribute(code, name, value)); };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes(what, queue.device));
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(clusters * blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = queue.stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* pointers[] = {&args...};
  check(what, cudaLaunchKernelExC(&config, code, pointers));
}

}  // namespace rlhf::cuda
