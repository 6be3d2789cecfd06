// Masked means of elementwise losses, with gradients and metrics, in one pass over the inputs.
#pragma once
#include <string>
#include <vector>

#include "cpu/plane.h"

namespace rlhf::cpu {

constexpr size_t kParameters = 5;  // at most; those that are not given are 0
constexpr int kInputs = 9;         // at most, and those of a pair

struct Loss {
  std::vector<Plane> inputs;  // (rows, columns) each, in the order of the functor (math/losses.h)
  const uint8_t* mask;        // (rows, columns) or null; inputs with 0 do not count
  const void* denominator;    // one number, or null for the count of the mask
  std::vector<double> parameters;
  int64_t rows, columns;
  bool is_double;  // whether everything below (and `denominator`) is double or float
  void *loss, *metrics;  // one number; the first metric_count of the variant's
  int metric_count;
  std::vector<void*> coefficients;  // (rows, columns) each: d loss / d input k; or none at all
};

// Throws std::invalid_argument for an unknown variant.
void masked_loss(const std::string& variant, const Loss& op, int threads);

}  // namespace rlhf::cpu
