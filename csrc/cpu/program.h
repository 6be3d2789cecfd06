// One new token of each row through the layers of a decoder, on the CPU: stages that are listed once and run at every step
// in one parallel region.
#pragma once
#include <variant>
#include <vector>

#include "cpu/few_rows.h"
#include "cpu/slot_attention.h"

namespace rlhf::cpu {

// A linear layer.
struct Product {
  FewRows op;
  FewRowsTensors at;
};

// x += added, where that is given; out = x / sqrt(mean(x^2) + eps) * (offset + weight) of each row (RMSNorm). The quotient
// is rounded to the type of x before it is weighted where rounds is set.
struct Norm {
  void* x;  // (rows, width), a row every x_stride elements
  const void *added, *weight;  // (rows, width) contiguous; (width,)
  void* out;                   // (rows, width), a row every out_stride elements
  int64_t rows, width, x_stride, out_stride;
  double eps, offset;
  bool rounds;
};

// Rotates queries and keys by their positions, writes keys and values into the column of the cache, and attends.
struct Attend {
  void *query, *key, *value;  // (rows, heads, D), (rows, key heads, D), the same with another D; contiguous but for rows
  int64_t row_strides[3];
  SlotAttention op;           // its query is the one above; columns and starts are of the step
  int64_t rotated;            // of D, in two halves
};

// gate = act(gate) * up, (rows, width) contiguous, within the outputs of a thread's products.
struct Gate {
  void* gate;
  const void* up;
  int64_t rows, width;
  bool gelu;  // in its tanh form; else silu
};

struct Program {
  struct Stage {
    std::variant<Product, Norm, Attend, Gate> what;
    bool waits;  // whether the next stage needs what other threads make in this one
  };
  DType dtype;  // of everything but adapters; not f64
  int64_t rows;
  std::vector<Stage> stages;
};

// What differs from step to step. cos, sin: (rows, rotated). places: (rows), the tokens that a row has before this one.
struct Step {
  const void *cos, *sin;
  const int64_t* places;
  int64_t column;
};

void run(const Program& program, const Step& step, int threads);

}  // namespace rlhf::cpu
