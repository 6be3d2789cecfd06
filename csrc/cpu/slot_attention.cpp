#include "cpu/slot_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dispatch.h"
#include "math/elementary.h"

namespace rlhf::cpu {
namespace {

constexpr int kLanes = 16;    // partial sums of a dot product, side by side
constexpr int kColumns = 4;   // dot products at a time, so that sums do not wait for each other
constexpr int64_t kWide = 64; // sums of values that stay in registers over all columns

// out[j] = query . keys[j] for COLUMNS columns.
template <int COLUMNS, typename T, typename C>
RLHF_INLINE void dot_products(const C* query, const T* keys, int64_t stride, int64_t width, C* out) {
  C sums[COLUMNS][kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes)
    for (int j = 0; j < COLUMNS; ++j)
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) sums[j][i] += query[k + i] * C(load(keys[j * stride + k + i]));
  for (int j = 0; j < COLUMNS; ++j) {
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < kLanes; ++i) sum += sums[j][i];
    for (int64_t rest = k; rest < width; ++rest) sum += query[rest] * C(load(keys[j * stride + rest]));
    out[j] = sum;
  }
}

// out[i] = sum over t of weights[t] values[t][i] / total, for WIDTH values.
template <int64_t WIDTH, typename T, typename C>
RLHF_INLINE void weigh(const C* weights, const T* values, int64_t stride, int64_t count, C total, T* out) {
  C sums[WIDTH] = {};
  for (int64_t t = 0; t < count; ++t) {
    const C weight = weights[t];
#pragma omp simd
    for (int64_t i = 0; i < WIDTH; ++i) sums[i] += weight * C(load(values[t * stride + i]));
  }
  for (int64_t i = 0; i < WIDTH; ++i) store(out[i], sums[i] / total);
}

// The query heads of one key head of one row. room: for the scores of the columns, then for a query.
template <typename T, typename C> RLHF_INLINE void attend(const SlotAttention& op, int64_t row, int64_t key_head, C* room) {
  const int64_t sharing = op.heads / op.key_heads, first = std::max(op.starts[row], op.columns - op.window);
  const int64_t count = op.columns - first, key_stride = op.key_strides[2], value_stride = op.value_strides[2];
  const T* keys = static_cast<const T*>(op.keys) + row * op.key_strides[0] + key_head * op.key_strides[1] +
                  first * key_stride;
  const T* values = static_cast<const T*>(op.values) + row * op.value_strides[0] + key_head * op.value_strides[1] +
                    first * value_stride;
  C *scores = room, *query = room + op.columns;
  for (int64_t head = key_head * sharing; head < (key_head + 1) * sharing; ++head) {
    const T* given = static_cast<const T*>(op.query) + row * op.query_strides[0] + head * op.query_strides[1];
    for (int64_t k = 0; k < op.width; ++k) query[k] = C(op.scale) * C(load(given[k]));
    int64_t t = 0;
    for (; t + kColumns <= count; t += kColumns)
      dot_products<kColumns>(query, keys + t * key_stride, key_stride, op.width, scores + t);
    for (; t < count; ++t) dot_products<1>(query, keys + t * key_stride, key_stride, op.width, scores + t);
    if (op.softcap > 0)
      for (t = 0; t < count; ++t) scores[t] = C(op.softcap) * std::tanh(scores[t] / C(op.softcap));
    C max = -infinity<C>(), total = 0;
    for (t = 0; t < count; ++t) max = std::max(max, scores[t]);
#pragma omp simd reduction(+ : total)
    for (t = 0; t < count; ++t) total += scores[t] = exp_neg(scores[t] - max);
    T* out = static_cast<T*>(op.out) + (row * op.heads + head) * op.value_width;
    int64_t k = 0;
    for (; k + kWide <= op.value_width; k += kWide)
      weigh<kWide>(scores, values + k, value_stride, count, total, out + k);
    for (; k + kLanes <= op.value_width; k += kLanes)
      weigh<kLanes>(scores, values + k, value_stride, count, total, out + k);
    for (; k < op.value_width; ++k) weigh<1>(scores, values + k, value_stride, count, total, out + k);
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
    std::vector<C> room(op.columns + op.width);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tasks; ++i) attend_to(T(), op, i / op.key_heads, i % op.key_heads, room.data());
  }
}

}  // namespace

void slot_attention_task(const SlotAttention& op, int64_t row, int64_t key_head, void* room) {
  dispatch(op.dtype, [&](auto type) {
    using T = decltype(type);
    attend_to(T(), op, row, key_head, static_cast<typename Compute<T>::type*>(room));
  });
}

void slot_attention(const SlotAttention& op, int threads) {
  dispatch(op.dtype, [&](auto type) { run<decltype(type)>(op, threads); });
}

}  // namespace rlhf::cpu
