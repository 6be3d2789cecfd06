// The low-rank half of a linear layer whose row segments use different adapters, on the CPU.
#pragma once
#include <vector>

#include "cpu/plane.h"
#include "native.h"

namespace rlhf::cpu {

struct LowRank {
  Plane matrix;  // (rank, width): A, or B^T; any strides
  int64_t rank;
  double scale;
};

struct Span {
  int64_t adapter, start, stop;  // rows [start, stop)
};

struct LoraLinear {
  void* wide;    // (N, width): what shrink reads, what expand adds to; columns contiguous
  void* narrow;  // (N, widest rank): h
  DType dtype;   // of both
  int64_t width, wide_stride, narrow_stride;
  std::vector<LowRank> bank;
  std::vector<Span> spans;
};

struct Dropout {
  const void* x;  // (rows, width), columns contiguous
  void* out;      // the same shape, may be x
  DType dtype;    // of both
  int64_t rows, width, x_stride, out_stride;
  uint64_t seed;
  uint32_t threshold;  // an element stays where the upper 24 bits of its word reach it
};

// out = x where it stays, else 0. The words of columns 4 c to 4 c + 3 of row r are those of the counter (c, r).
void lora_dropout(const Dropout& op, int threads);

// narrow[rows] = wide[rows] @ matrix^T for every span; columns past the adapter's rank are left alone.
void lora_shrink(const LoraLinear& op, int threads);

// wide[rows] += scale * narrow[rows] @ matrix for every span.
void lora_expand(const LoraLinear& op, int threads);

}  // namespace rlhf::cpu
