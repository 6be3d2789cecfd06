// A (rows, columns) tensor of any float type and any strides (0 = broadcast), read in runs of elements.
#pragma once
#include "cpu/simd.h"
#include "native.h"

namespace rlhf::cpu {

struct Plane {
  const void* data;
  DType dtype;
  int64_t row_stride, column_stride;  // in elements
};

// Elements [start, start + n) in row-major order, converted to C.
template <typename T, typename C>
RLHF_INLINE void read_as(const Plane& plane, int64_t columns, int64_t start, int64_t n, C* out) {
  for (int64_t run; n > 0; start += run, out += run, n -= run) {
    const int64_t row = start / columns, column = start % columns, stride = plane.column_stride;
    run = n < columns - column ? n : columns - column;
    const T* x = static_cast<const T*>(plane.data) + row * plane.row_stride + column * stride;
    if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < run; ++i) out[i] = C(load(x[i]));
    } else if (stride == 0) {
      const C value = C(load(*x));
      for (int64_t i = 0; i < run; ++i) out[i] = value;
    } else {
      for (int64_t i = 0; i < run; ++i) out[i] = C(load(x[i * stride]));
    }
  }
}
template <typename C>
RLHF_INLINE void read(const Plane& plane, int64_t columns, int64_t start, int64_t n, C* out) {
  switch (plane.dtype) {
    case DType::f32: return read_as<float>(plane, columns, start, n, out);
    case DType::f64: return read_as<double>(plane, columns, start, n, out);
    case DType::bf16: return read_as<bf16>(plane, columns, start, n, out);
    case DType::f16: return read_as<f16>(plane, columns, start, n, out);
  }
}

}  // namespace rlhf::cpu
