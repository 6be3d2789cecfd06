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
void read_as(const Plane& plane, int64_t columns, int64_t start, int64_t n, C* out) {
  const T* data = static_cast<const T*>(plane.data);
  int64_t row = start / columns, column = start % columns;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = C(load(data[row * plane.row_stride + column * plane.column_stride]));
    if (++column == columns) column = 0, ++row;
  }
}
template <typename C> void read(const Plane& plane, int64_t columns, int64_t start, int64_t n, C* out) {
  switch (plane.dtype) {
    case DType::f32: return read_as<float>(plane, columns, start, n, out);
    case DType::f64: return read_as<double>(plane, columns, start, n, out);
    case DType::bf16: return read_as<bf16>(plane, columns, start, n, out);
    case DType::f16: return read_as<f16>(plane, columns, start, n, out);
  }
}

}  // namespace rlhf::cpu
