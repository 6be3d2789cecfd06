// Cross-entropy of a value distribution with a Gaussian histogram; see rlhf_fast/ops/values/distributional_value_loss.py.
#pragma once
#include "native.h"

namespace rlhf::cpu {

// What is called "number" is double where `dtype` is double, else float.
struct DistributionalValueLoss {
  const void* logits;  // (rows, bins), columns contiguous
  DType dtype;
  int64_t rows, bins, row_stride;
  const void* returns;         // (rows,) numbers
  const uint8_t* mask;         // (rows,) or null
  const void* denominator;     // one number, or null for the count of the mask
  double v_min, v_max, sigma;  // ends of the first and the last bin; standard deviation of the Gaussian
  void *loss, *outside;        // one number each; the share of returns outside of the bins
  void* values;                // (rows,) numbers: expected values
  void* coefficients;          // (rows, bins) numbers: d loss / d logits
};

void distributional_value_loss(const DistributionalValueLoss& op, int threads);

}  // namespace rlhf::cpu
