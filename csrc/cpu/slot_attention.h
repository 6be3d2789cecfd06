// Attention of one new token of each row to what the row has in a cache of slots, on the CPU.
#pragma once
#include "native.h"

namespace rlhf::cpu {

struct SlotAttention {
  const void *query, *keys, *values;  // (rows, heads, D), (rows, key heads, columns, D), the same with another D
  void* out;                          // (rows, heads, D of the values), contiguous
  DType dtype;
  int64_t rows, heads, key_heads, columns, width, value_width;
  int64_t query_strides[2], key_strides[3], value_strides[3];  // row, head (, column)
  const int64_t* starts;  // (rows): the first column that a row reads, up to the last
  int64_t window;         // it reads so many columns at most
  double scale, softcap;  // softcap 0: none
};

// out = softmax(softcap(scale * query keys^T)) values, sums in float (double for double). A row's bits depend on that
// row alone.
void slot_attention(const SlotAttention& op, int threads);

// The query heads that read one key head, of one row. room: for columns + width numbers of the type of sums.
void slot_attention_task(const SlotAttention& op, int64_t row, int64_t key_head, void* room);

}  // namespace rlhf::cpu
