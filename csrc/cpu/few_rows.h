// A linear layer with its low-rank terms for few rows, on the CPU: every byte of the weight is read once.
#pragma once
#include <vector>

#include "cpu/lora_linear.h"
#include "native.h"

namespace rlhf::cpu {

// y = x weight^T + bias + scale (x A^T) B^T, the last term for the rows of spans with an adapter. All of a layer that
// stays from call to call.
struct FewRows {
  static constexpr int64_t kRows = 64, kRank = 64;  // at most

  struct Adapter {
    Plane down, up;  // A (rank, width), its columns contiguous, float32 or the type of x; B (outer, rank)
    int64_t rank;
    double scale;
  };

  DType dtype;  // of x, weight, bias and y; not f64
  int64_t width, outer, weight_stride;
  std::vector<Adapter> bank;
  std::vector<Span> spans;  // in the order of the rows, all of which they cover; adapter -1 is none
};

// The tensors of one call: x (rows, width), weight (outer, width), bias (outer,) or null, y (rows, outer).
struct FewRowsTensors {
  const void *x, *weight, *bias;
  void* y;
};

// Whether this machine has the vector registers that few_rows is written for; it runs without them, slowly.
bool few_rows_is_fast();

// A sum's order depends on width, rank and types alone: a row has the same bits whatever other rows there are.
void few_rows(const FewRows& op, const FewRowsTensors& at, int threads);

// What one of so many threads makes of it, and which outputs these are: [first, stop).
struct OutputRange {
  int64_t first, stop;
};
OutputRange few_rows_outputs(int64_t outer, int thread, int threads);
void few_rows_part(const FewRows& op, const FewRowsTensors& at, int thread, int threads);

}  // namespace rlhf::cpu
