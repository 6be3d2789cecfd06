// C entry point for ctypes, over the kernel of csrc/cuda/gae.cu on the host.
#include "../../csrc/cuda/gae.cu"

using namespace rlhf;

extern "C" void gae(void* rewards, void* values, int dtype, const int64_t* sizes, uint8_t* mask, int64_t* cu_seqlens,
                    void* bootstrap, double gamma, double lam, void* advantages, void* returns) {
  cuda::gae({rewards, values, DType(dtype), sizes[0], sizes[1], sizes[2], sizes[3], mask, cu_seqlens, bootstrap, gamma,
             lam, advantages, returns},
            0, 0);
}
