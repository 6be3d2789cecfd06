// C entry point for ctypes, over the kernel of csrc/cuda/gae.cu on the host.
#include "../../csrc/cuda/gae.cu"

using namespace rlhf;

// sizes = sequences, time, reward_stride, value_stride; rates = gamma, lam, value_lam
extern "C" void gae(void* rewards, void* values, int dtype, const int64_t* sizes, uint8_t* mask, int64_t* cu_seqlens,
                    void* bootstrap, const double* rates, double* lams, bool decoupled, void* advantages,
                    void* returns) {
  cuda::gae({rewards, values, DType(dtype), sizes[2], sizes[3], {sizes[0], sizes[1], mask, cu_seqlens, bootstrap},
             rates[0], rates[1], rates[2], lams, decoupled, advantages, returns},
            0, 0);
}
