// What every native kernel shares: element types, strided row addressing, the parallel loop.
// No torch headers: kernels know raw addresses, sizes and strides (in elements).
#pragma once
#include <cstdint>

#include "math/host_device.h"

namespace rlhf {

// Codes of the element types, the same numbers as in rlhf_fast/backends.py.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Rows of a (outer, inner, V) tensor whose last dimension is contiguous.
struct Rows {
  int64_t outer, inner;                // number of rows = outer * inner
  int64_t outer_stride, inner_stride;  // in elements
  RLHF_HD int64_t count() const { return outer * inner; }
  RLHF_HD int64_t offset(int64_t row) const { return (row / inner) * outer_stride + (row % inner) * inner_stride; }
};

}  // namespace rlhf
