// Elements of every type on the device: how one is read, and the type in which it is computed.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace rlhf::cuda {

__device__ inline float load(float x) { return x; }
__device__ inline double load(double x) { return x; }
__device__ inline float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float load(__half x) { return __half2float(x); }

template <typename T> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };

}  // namespace rlhf::cuda
