// Marks inline maths that both the host and the CUDA compiler use.
#pragma once

// Always inlined on the host: a call within a loop stops the vectoriser.
#define RLHF_INLINE inline __attribute__((always_inline))
#if defined(__CUDACC__)
#define RLHF_HD __host__ __device__ inline
#else
#define RLHF_HD RLHF_INLINE
#endif
