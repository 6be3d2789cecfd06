// Whitening with statistics in one pass, on the CPU.
#pragma once
#include "native.h"

namespace rlhf::cpu {

struct Whiten {
  const void* x;  // (count), contiguous
  DType dtype;
  int64_t count;
  const uint8_t* mask;  // (count) or null
};

// Fills moments (parts, 3) with count, mean and sum of squared deviations of `parts` equal spans of x, empty ones too.
void whiten_moments(const Whiten& op, double* moments, int64_t parts, int threads);

// out (float, or double where x is double) = (x - mean) / sqrt(variance + eps), plus the mean where it is kept, of all
// that `moments` (parts, 3) describe together; 0 behind the mask.
void whiten(const Whiten& op, const double* moments, int64_t parts, bool shift_mean, double eps, void* out,
            int threads);

}  // namespace rlhf::cpu
