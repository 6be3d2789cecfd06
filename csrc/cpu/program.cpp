#include "cpu/program.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/dispatch.h"
#include "math/elementary.h"

namespace rlhf::cpu {
namespace {

constexpr int kSpins = 1 << 12;  // looks at what another thread does, before the processor is given away

// Threads meet some two hundred times a step, too often to sleep in between.
class Meeting {
 public:
  explicit Meeting(int threads) : threads_(threads) {}
  void wait() {
    if (threads_ == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins >= kSpins) std::this_thread::yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

struct Part {
  int thread, threads;
  int64_t begin(int64_t count) const { return count * thread / threads; }
  int64_t end(int64_t count) const { return count * (thread + 1) / threads; }
};

template <typename T> RLHF_INLINE float rounded(float x) {
  T out;
  store(out, x);
  return load(out);
}

template <typename T> RLHF_INLINE void normalise(const Norm& op, int64_t row) {
  constexpr int kLanes = 16;
  T* x = static_cast<T*>(op.x) + row * op.x_stride;
  T* out = static_cast<T*>(op.out) + row * op.out_stride;
  const T* weight = static_cast<const T*>(op.weight);
  if (op.added) {
    const T* added = static_cast<const T*>(op.added) + row * op.width;
#pragma omp simd
    for (int64_t i = 0; i < op.width; ++i) store(x[i], load(x[i]) + load(added[i]));
  }
  float sums[kLanes] = {}, sum = 0;
  int64_t k = 0;
  for (; k + kLanes <= op.width; k += kLanes)
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) sums[i] += load(x[k + i]) * load(x[k + i]);
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  for (; k < op.width; ++k) sum += load(x[k]) * load(x[k]);
  const float scale = 1.0f / std::sqrt(sum / float(op.width) + float(op.eps)), offset = float(op.offset);
  if (op.rounds) {
#pragma omp simd
    for (int64_t i = 0; i < op.width; ++i)
      store(out[i], rounded<T>(load(x[i]) * scale) * (offset + load(weight[i])));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < op.width; ++i) store(out[i], load(x[i]) * scale * (offset + load(weight[i])));
  }
}

// x cos + (-second half, first half) sin, each product rounded as PyTorch rounds it.
template <typename T> RLHF_INLINE void rotate(T* x, const T* cos, const T* sin, int64_t rotated_count) {
  const int64_t half = rotated_count / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = load(x[i]), second = load(x[half + i]);
    store(x[i], rounded<T>(first * load(cos[i])) - rounded<T>(second * load(sin[i])));
    store(x[half + i], rounded<T>(second * load(cos[half + i])) + rounded<T>(first * load(sin[half + i])));
  }
}

// The heads of the queries that read one head of the keys, of one row.
template <typename T> RLHF_INLINE void place(const Attend& op, const Step& step, int64_t row, int64_t key_head) {
  const SlotAttention& to = op.op;
  const T* cos = static_cast<const T*>(step.cos) + row * op.rotated;
  const T* sin = static_cast<const T*>(step.sin) + row * op.rotated;
  const int64_t sharing = to.heads / to.key_heads;
  T* query = static_cast<T*>(op.query) + row * op.row_strides[0] + key_head * sharing * to.width;
  for (int64_t head = 0; head < sharing; ++head) rotate(query + head * to.width, cos, sin, op.rotated);
  T* key = static_cast<T*>(op.key) + row * op.row_strides[1] + key_head * to.width;
  rotate(key, cos, sin, op.rotated);
  const T* value = static_cast<const T*>(op.value) + row * op.row_strides[2] + key_head * to.value_width;
  const auto slot = [&](const void* data, const int64_t* strides) {
    return static_cast<T*>(const_cast<void*>(data)) + row * strides[0] + key_head * strides[1] + step.column * strides[2];
  };
  std::copy_n(key, to.width, slot(to.keys, to.key_strides));
  std::copy_n(value, to.value_width, slot(to.values, to.value_strides));
}

RLHF_INLINE float activated(float x, bool gelu) {
  if (!gelu) return x / (1.0f + exp_any(-x));
  return 0.5f * x * (1.0f + tanh_fast(0.7978845608f * (x + 0.044715f * x * x * x)));
}

template <typename T> RLHF_INLINE void gate(const Gate& op, int64_t row, int64_t first, int64_t stop) {
  T* to = static_cast<T*>(op.gate) + row * op.width;
  const T* up = static_cast<const T*>(op.up) + row * op.width;
  if (op.gelu) {
#pragma omp simd
    for (int64_t i = first; i < stop; ++i) store(to[i], rounded<T>(activated(load(to[i]), true)) * load(up[i]));
  } else {
#pragma omp simd
    for (int64_t i = first; i < stop; ++i) store(to[i], rounded<T>(activated(load(to[i]), false)) * load(up[i]));
  }
}

#define RLHF_STEP(T)                                                                                          \
  RLHF_CLONES void normalise_row(T, const Norm& op, int64_t row) { normalise<T>(op, row); }                   \
  RLHF_CLONES void place_heads(T, const Attend& op, const Step& step, int64_t row, int64_t head) {            \
    place<T>(op, step, row, head);                                                                            \
  }                                                                                                           \
  RLHF_CLONES void gate_row(T, const Gate& op, int64_t row, int64_t first, int64_t stop) {                    \
    gate<T>(op, row, first, stop);                                                                            \
  }
RLHF_STEP(float)
RLHF_STEP(bf16)
RLHF_STEP(f16)

template <typename T> struct Worker {
  const Program& program;
  const Step& step;
  const int64_t* starts;
  Part part;
  std::vector<float> room;

  void operator()(const Product& op) { few_rows_part(op.op, op.at, part.thread, part.threads); }
  void operator()(const Norm& op) {
    for (int64_t row = part.begin(op.rows); row < part.end(op.rows); ++row) normalise_row(T(), op, row);
  }
  void operator()(const Gate& op) {
    const auto [first, stop] = few_rows_outputs(op.width, part.thread, part.threads);
    for (int64_t row = 0; row < op.rows; ++row) gate_row(T(), op, row, first, stop);
  }
  void operator()(const Attend& op) {
    SlotAttention to = op.op;
    to.columns = step.column + 1;
    to.starts = starts;
    if (to.window <= 0) to.window = to.columns;
    room.resize(std::max<size_t>(room.size(), to.columns + to.width));
    const int64_t tasks = to.rows * to.key_heads;
    for (int64_t i = part.begin(tasks); i < part.end(tasks); ++i) {
      place_heads(T(), op, step, i / to.key_heads, i % to.key_heads);
      slot_attention_task(to, i / to.key_heads, i % to.key_heads, room.data());
    }
  }
};

template <typename T> void run_stages(const Program& program, const Step& step, const int64_t* starts, int threads) {
  const auto all = [&](Part part, Meeting& meeting) {
    Worker<T> worker{program, step, starts, part, {}};
    for (const Program::Stage& stage : program.stages) {
      std::visit(worker, stage.what);
      if (stage.waits) meeting.wait();
    }
  };
#if defined(_OPENMP)
  if (threads > 1 && !omp_in_parallel()) {
    int given = threads;  // it may be fewer than were asked for
    Meeting meeting(threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      given = omp_get_num_threads();
      if (given == threads) all({omp_get_thread_num(), threads}, meeting);
    }
    if (given == threads) return;
  }
#endif
  Meeting alone(1);
  all({0, 1}, alone);
}

}  // namespace

void run(const Program& program, const Step& step, int threads) {
  std::vector<int64_t> starts(program.rows);
  for (int64_t row = 0; row < program.rows; ++row) starts[row] = step.column - step.places[row];
  if (program.dtype == DType::f32) run_stages<float>(program, step, starts.data(), threads);
  else if (program.dtype == DType::bf16) run_stages<bf16>(program, step, starts.data(), threads);
  else run_stages<f16>(program, step, starts.data(), threads);
}

}  // namespace rlhf::cpu
