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

template <typename... Args>
void launch(const char* what, void (*kernel)(Args...), int64_t blocks, int threads, Queue queue, Args... args) {
  if (blocks == 0) return;
  OnDevice guard(what, queue.device);
  void* pointers[] = {&args...};
  check(what, cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(unsigned(threads)),
                               pointers, 0, queue.stream));
}

}  // namespace rlhf::cuda
