// Marks inline maths that both the host and the CUDA compiler use.
#pragma once

#if defined(__CUDACC__)
#define RLHF_HD __host__ __device__ inline
#else
#define RLHF_HD inline
#endif
