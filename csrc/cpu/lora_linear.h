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

// narrow[rows] = wide[rows] @ matrix^T for every span; columns past the adapter's rank are left alone.
void lora_shrink(const LoraLinear& op, int threads);

// wide[rows] += scale * narrow[rows] @ matrix for every span.
void lora_expand(const LoraLinear& op, int threads);

}  // namespace rlhf::cpu
