// The critic's loss straight from hidden states; see rlhf_fast/ops/values/linear_value_loss.py.
#pragma once
#include "native.h"

namespace rlhf::cpu {

// What is called "number" is double where `dtype` is double, else float.
struct LinearValueLoss {
  const void* hidden;  // (rows, width), columns contiguous
  DType dtype;
  int64_t rows, width, row_stride;
  const void *weight, *bias;          // numbers: (width,), and one or null
  const void *old_values, *returns;   // numbers: (rows,); old_values are null without clipping
  const uint8_t* mask;                // (rows,) or null
  const void* denominator;            // one number, or null for the count of the mask
  double clip_eps;
  void *loss, *clip_fraction;         // one number each
  void* values;                       // (rows,) numbers
  void* coefficients;                 // (rows,) numbers: d loss / d value
  void *weight_sums, *bias_sum;       // (width,) and one number: sums of coefficient * hidden and of them, or null
};

void linear_value_loss(const LinearValueLoss& op, int threads);

}  // namespace rlhf::cpu
