#include "cpu/slot_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dispatch.h"
#include "math/elementary.h"

namespace rlhf::cpu {
namespace {

// The query heads of one key head of one row. scores: room for (query heads of it, columns) and one row of values.
template <typename T, typename C> RLHF_INLINE void attend(const SlotAttention& op, int64_t row, int64_t key_head, C* room) {
  const int64_t sharing = op.heads / op.key_heads, first = std::max(op.starts[row], op.columns - op.window);
  const int64_t count = op.columns - first;
  const T* keys = static_cast<const T*>(op.keys) + row * op.key_strides[0] + key_head * op.key_strides[1] +
                  first * op.key_strides[2];
  const T* values = static_cast<const T*>(op.values) + row * op.value_strides[0] + key_head * op.value_strides[1] +
                    first * op.value_strides[2];
  C *scores = room, *sums = room + op.columns;
  for (int64_t head = key_head * sharing; head < (key_head + 1) * sharing; ++head) {
    const T* query = static_cast<const T*>(op.query) + row * op.query_strides[0] + head * op.query_strides[1];
    C max = -infinity<C>();
    for (int64_t t = 0; t < count; ++t) {
      const T* key = keys + t * op.key_strides[2];
      C sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < op.width; ++k) sum += C(load(query[k])) * C(load(key[k]));
      sum *= C(op.scale);
      if (op.softcap > 0) sum = C(op.softcap) * std::tanh(sum / C(op.softcap));
      scores[t] = sum;
      max = std::max(max, sum);
    }
    C total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < count; ++t) {
      scores[t] = exp_neg(scores[t] - max);
      total += scores[t];
    }
    std::fill(sums, sums + op.value_width, C(0));
    for (int64_t t = 0; t < count; ++t) {
      const T* value = values + t * op.value_strides[2];
      const C weight = scores[t];
#pragma omp simd
      for (int64_t k = 0; k < op.value_width; ++k) sums[k] += weight * C(load(value[k]));
    }
    T* out = static_cast<T*>(op.out) + (row * op.heads + head) * op.value_width;
    for (int64_t k = 0; k < op.value_width; ++k) store(out[k], sums[k] / total);
  }
}

#define RLHF_ATTEND(T)                                                                                        \
  RLHF_CLONES void attend_to(T, const SlotAttention& op, int64_t row, int64_t head, Compute<T>::type* room) { \
    attend<T>(op, row, head, room);                                                                           \
  }
RLHF_FOR_DTYPES(RLHF_ATTEND)

template <typename T> void run(const SlotAttention& op, int threads) {
  using C = typename Compute<T>::type;
  const int64_t tasks = op.rows * op.key_heads;
#pragma omp parallel num_threads(threads) if (tasks > 1)
  {
    std::vector<C> room(op.columns + op.value_width);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tasks; ++i) attend_to(T(), op, i / op.key_heads, i % op.key_heads, room.data());
  }
}

}  // namespace

void slot_attention(const SlotAttention& op, int threads) {
  dispatch(op.dtype, [&](auto type) { run<decltype(type)>(op, threads); });
}

}  // namespace rlhf::cpu
