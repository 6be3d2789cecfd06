// Vectors go to inlined functions alone, so it does not matter how they would be handed over.
#pragma GCC diagnostic ignored "-Wpsabi"
#include "cpu/few_rows.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/dispatch.h"

namespace rlhf::cpu {
namespace {

constexpr int kLanes = 16;              // of a vector; each has a partial sum of a dot product
constexpr int kOuts = 4;                // outputs whose sums stay in registers together, for one row or four
constexpr int64_t kAhead = 2;           // groups of kOuts outputs: how far ahead weights are fetched
constexpr int64_t kParallel = 1 << 15;  // elements of the weight from which a second thread is worth waking

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <typename V> RLHF_INLINE V read(const void* data) {
  V value;
  std::memcpy(&value, data, sizeof(V));
  return value;
}

// Lanes of a (0 to 15) and b (16 to 31).
template <int... LANES> RLHF_INLINE Vector pick(Vector a, Vector b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, LANES...);
#else
  typedef int Mask __attribute__((vector_size(4 * kLanes)));
  return __builtin_shuffle(a, b, Mask{LANES...});
#endif
}

// What a step of a dot product reads of either side, 64 bytes of the weight, and how it adds the products to the lanes.
struct Float {
  using Weight = float;
  using X = float;
  using Loaded = Vector;
  static constexpr int64_t kStep = kLanes;
  static RLHF_INLINE Loaded load(const float* data) { return read<Vector>(data); }
  static RLHF_INLINE void add(Vector& sum, Loaded w, Loaded x) { sum += w * x; }
};

// The two halves of each word, the second one first, as the instruction of Bf16Pairs has it.
struct Bf16 {
  using Weight = bf16;
  using X = bf16;
  struct Loaded { Vector first, second; };
  static constexpr int64_t kStep = 2 * kLanes;
  static RLHF_INLINE Loaded load(const bf16* data) {
    const Words words = read<Words>(data);
    return {Vector(words << 16), Vector(words & 0xffff0000u)};
  }
  static RLHF_INLINE void add(Vector& sum, Loaded w, Loaded x) {
    sum += w.second * x.second;
    sum += w.first * x.first;
  }
};

RLHF_INLINE Vector widened(const bf16* data) {
  return Vector(__builtin_convertvector(read<Halves>(data), Words) << 16);
}
RLHF_INLINE Vector widened(const f16* data) {  // as load() in simd.h
  const Words bits = __builtin_convertvector(read<Halves>(data), Words), body = bits & 0x7fffu;
  const Words normal = (body << 13) + (112u << 23), special = (body << 13) + (224u << 23);
  const Words subnormal = Words(Vector((body << 13) + (113u << 23)) - bits_to_float(113u << 23));
  const Words is_special = Words(body >= 0x7c00u), is_subnormal = Words(body < 0x0400u);
  const Words magnitude = (is_special & special) | (~is_special & normal);
  return Vector((is_subnormal & subnormal) | (~is_subnormal & magnitude) | (bits & 0x8000u) << 16);
}

struct F16 {
  using Weight = f16;
  using X = f16;
  struct Loaded { Vector first, second; };
  static constexpr int64_t kStep = 2 * kLanes;
  static RLHF_INLINE Loaded load(const f16* data) { return {widened(data), widened(data + kLanes)}; }
  static RLHF_INLINE void add(Vector& sum, Loaded w, Loaded x) {
    sum += w.first * x.first;
    sum += w.second * x.second;
  }
};

// An adapter in float32 beside an x of 16 bits.
template <typename T> struct Mixed {
  using Weight = float;
  using X = T;
  using Loaded = Vector;
  static constexpr int64_t kStep = kLanes;
  static RLHF_INLINE Loaded load(const float* data) { return read<Vector>(data); }
  static RLHF_INLINE Loaded load(const T* data) { return widened(data); }
  static RLHF_INLINE void add(Vector& sum, Loaded w, Loaded x) { sum += w * x; }
};

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(RLHF_FAST_NO_CLONES)
#define RLHF_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))

// Both products of a word in one instruction: the bits of Bf16 (tested on 16 million sums), but that it takes numbers
// below 2^-126 for 0, in x, weight and sum.
struct Bf16Pairs : Bf16 {
  using Loaded = Vector;
  static RLHF_INLINE Loaded load(const bf16* data) { return read<Vector>(data); }
  static RLHF_INLINE void add(Vector& sum, Loaded w, Loaded x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  }
};

struct F16Converted : F16 {
  static RLHF_INLINE Vector convert(const f16* data) {
    Vector out;
    asm("vcvtph2ps %1, %0" : "=v"(out) : "v"(read<Halves>(data)));
    return out;
  }
  static RLHF_INLINE Loaded load(const f16* data) { return {convert(data), convert(data + kLanes)}; }
};
#endif

template <int ROWS> using Sums = Vector[ROWS][kOuts];

template <typename S, int ROWS> RLHF_INLINE void step(Sums<ROWS>& sums, const typename S::Weight* const* weight,
                                                      const typename S::X* x, int64_t stride, int64_t k) {
  typename S::Loaded w[kOuts];
#pragma GCC unroll 4
  for (int o = 0; o < kOuts; ++o) w[o] = S::load(weight[o] + k);
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
    const typename S::Loaded row = S::load(x + i * stride + k);
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o) S::add(sums[i][o], w[o], row);
  }
}

// sums += weight[o] * x[i], lane by lane. `ahead`: bytes from what is read of the weight to what is fetched.
template <typename S, int ROWS>
RLHF_INLINE void multiply(Sums<ROWS>& sums, const typename S::Weight* const* weight, const typename S::X* x,
                          int64_t stride, int64_t width, int64_t ahead) {
  using W = typename S::Weight;
  using X = typename S::X;
  const W* const w[kOuts] = {weight[0], weight[1], weight[2], weight[3]};
  int64_t k = 0;
  for (; k + S::kStep <= width; k += S::kStep) {
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o)
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(w[o] + k) + ahead), 0, 2);
    step<S, ROWS>(sums, w, x, stride, k);
  }
  if (k == width) return;
  W w_end[kOuts][S::kStep] = {};
  X x_end[ROWS][S::kStep] = {};
  for (int o = 0; o < kOuts; ++o) std::memcpy(w_end[o], w[o] + k, (width - k) * sizeof(W));
  for (int i = 0; i < ROWS; ++i) std::memcpy(x_end[i], x + i * stride + k, (width - k) * sizeof(X));
  const W* const ends[kOuts] = {w_end[0], w_end[1], w_end[2], w_end[3]};
  step<S, ROWS>(sums, ends, x_end[0], S::kStep, 0);
}

// Sums of four vectors over lanes l, l + 4, l + 8 and l + 12, for l = 0 to 3: those of a, then of b, c, d.
RLHF_INLINE Vector quarters(Vector a, Vector b, Vector c, Vector d) {
  const Vector ab = pick<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(a, b) +
                    pick<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(a, b);
  const Vector cd = pick<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(c, d) +
                    pick<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(c, d);
  return pick<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(ab, cd) +
         pick<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(ab, cd);
}

// Of quarters for four outputs the complete sums: four rows, each with its four outputs.
RLHF_INLINE Vector wholes(Vector a, Vector b, Vector c, Vector d) {
  const Vector ab = pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a, b) +
                    pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a, b);
  const Vector cd = pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(c, d) +
                    pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(c, d);
  return pick<0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30>(ab, cd) +
         pick<1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31>(ab, cd);
}

template <int ROWS> RLHF_INLINE Vector total(const Sums<ROWS>& sums) {
  constexpr Vector zero = {};
  Vector rows[kOuts];
#pragma GCC unroll 4
  for (int o = 0; o < kOuts; ++o)
    rows[o] = quarters(sums[0][o], ROWS > 1 ? sums[ROWS > 1 ? 1 : 0][o] : zero,
                       ROWS > 2 ? sums[ROWS > 2 ? 2 : 0][o] : zero, ROWS > 3 ? sums[ROWS > 3 ? 3 : 0][o] : zero);
  return wholes(rows[0], rows[1], rows[2], rows[3]);
}

// The first `outs` of the four outputs of the rows.
template <typename T> RLHF_INLINE void write(T* y, int64_t stride, Vector sums, int rows, int64_t outs) {
  float exact[kLanes];
  T values[kLanes];
  std::memcpy(exact, &sums, sizeof(sums));
  for (int i = 0; i < kLanes; ++i) store(values[i], exact[i]);
  for (int i = 0; i < rows; ++i) {
    if (outs == kOuts) std::memcpy(y + i * stride, values + i * kOuts, kOuts * sizeof(T));
    else std::memcpy(y + i * stride, values + i * kOuts, outs * sizeof(T));
  }
}

// What is added to the sums of a group of outputs: h (rows, stride) with the rows of B, both padded to whole vectors.
struct Delta {
  const float *h, *up;
  int64_t padded;  // 0: nothing
};

template <typename S, int ROWS, typename Y>
RLHF_INLINE void block(const typename S::Weight* const* weight, const typename S::X* x, int64_t width, int64_t ahead,
                       const Delta& delta, const Vector& bias, Y* y, int64_t y_stride, int64_t outs) {
  Sums<ROWS> sums = {};
  multiply<S, ROWS>(sums, weight, x, width, width, ahead);
  const float* const up[kOuts] = {delta.up, delta.up + FewRows::kRank, delta.up + 2 * FewRows::kRank,
                                  delta.up + 3 * FewRows::kRank};
  for (int64_t r = 0; r < delta.padded; r += kLanes) step<Float, ROWS>(sums, up, delta.h, FewRows::kRank, r);
  write(y, y_stride, total<ROWS>(sums) + bias, ROWS, outs);
}

template <int N> using Count = std::integral_constant<int, N>;

// A group of outputs for `rows` rows; only their first block fetches ahead.
template <typename S, int BLOCK, typename Y>
RLHF_INLINE void group(const typename S::Weight* const* weight, const typename S::X* x, int64_t rows, int64_t width,
                       int64_t ahead, Delta delta, const Vector& bias, Y* y, int64_t y_stride, int64_t outs) {
  for (int64_t row = 0; row < rows; row += BLOCK, ahead = 0) {
    const auto of_rows = [&](auto count) __attribute__((always_inline)) {
      block<S, count.value>(weight, x + row * width, width, ahead, {delta.h + row * FewRows::kRank, delta.up, delta.padded},
                            bias, y + row * y_stride, y_stride, outs);
    };
    if (const int64_t left = rows - row; left >= BLOCK) of_rows(Count<BLOCK>());
    else if (BLOCK > 3 && left == 3) of_rows(Count<std::min(BLOCK, 3)>());
    else if (BLOCK > 2 && left == 2) of_rows(Count<std::min(BLOCK, 2)>());
    else of_rows(Count<1>());
  }
}

// Four rows of a matrix from `first` on; past the end its last one again.
template <typename T> RLHF_INLINE void rows_from(const void* data, int64_t stride, int64_t first, int64_t end,
                                                 const T* (&rows)[kOuts]) {
  for (int o = 0; o < kOuts; ++o) rows[o] = static_cast<const T*>(data) + std::min(first + o, end - 1) * stride;
}

int64_t padded(int64_t rank) { return (rank + kLanes - 1) / kLanes * kLanes; }

// h = x A^T of the rows of a span, (rows, kRank).
template <typename S, int BLOCK>
RLHF_INLINE void shrink(const FewRows& op, const FewRows::Adapter& adapter, const void* x, const Span& span, float* h) {
  const Delta none{h, h, 0};
  const int64_t rows = span.stop - span.start;
  for (int64_t r = 0; r < adapter.rank; r += kOuts) {
    const typename S::Weight* down[kOuts];
    rows_from(adapter.down.data, adapter.down.row_stride, r, adapter.rank, down);
    group<S, BLOCK>(down, static_cast<const typename S::X*>(x) + span.start * op.width, rows, op.width, 0, none, Vector{},
             h + span.start * FewRows::kRank + r, FewRows::kRank, std::min<int64_t>(kOuts, adapter.rank - r));
  }
}

// h is scaled, and 0 behind the adapter's rank.
RLHF_INLINE void finish(const FewRows::Adapter& adapter, const Span& span, float* h) {
  for (int64_t i = span.start; i < span.stop; ++i)
    for (int64_t r = 0; r < padded(adapter.rank); ++r) {
      float& value = h[i * FewRows::kRank + r];
      value = r < adapter.rank ? value * float(adapter.scale) : 0.0f;
    }
}

template <typename T>
RLHF_INLINE void copy_up(const FewRows::Adapter& adapter, int64_t first, int64_t outs, float* up) {
  const T* data = static_cast<const T*>(adapter.up.data) + first * adapter.up.row_stride;
  for (int64_t o = 0; o < outs; ++o)
    for (int64_t r = 0; r < adapter.rank; ++r)
      up[o * FewRows::kRank + r] = float(load(data[o * adapter.up.row_stride + r * adapter.up.column_stride]));
}

// The outputs of a thread. Each thread makes h for itself: cheaper than to wait for the others.
template <typename S, int BLOCK> RLHF_INLINE void outputs(const FewRows& op, const FewRowsTensors& at, OutputRange range) {
  using W = typename S::Weight;
  const int64_t group_bytes = kOuts * op.weight_stride * int64_t(sizeof(W));
  const char* first = static_cast<const char*>(at.weight) + range.first * op.weight_stride * int64_t(sizeof(W));
  const int64_t begin = std::min(kAhead * group_bytes, (range.stop - range.first) * group_bytes / kOuts);
  for (int64_t byte = 0; byte < begin; byte += 64) __builtin_prefetch(first + byte, 0, 2);

  alignas(64) float h[FewRows::kRows * FewRows::kRank], up[kOuts * FewRows::kRank] = {};
  for (const Span& span : op.spans) {
    if (span.adapter < 0) continue;
    const FewRows::Adapter& adapter = op.bank[span.adapter];
    if (adapter.down.dtype == op.dtype) shrink<S, BLOCK>(op, adapter, at.x, span, h);
    else if constexpr (!std::is_same<S, Float>::value) shrink<Mixed<W>, BLOCK>(op, adapter, at.x, span, h);
    finish(adapter, span, h);
  }
  int64_t packed = -1;  // the adapter whose rows of B are in `up`
  for (int64_t o = range.first; o < range.stop; o += kOuts) {
    const int64_t outs = std::min<int64_t>(kOuts, range.stop - o);
    const W* weight[kOuts];
    rows_from(at.weight, op.weight_stride, o, op.outer, weight);
    float bias[kLanes] = {};
    for (int i = 0; at.bias && i < kLanes; ++i)
      bias[i] = load(static_cast<const W*>(at.bias)[std::min<int64_t>(o + i % kOuts, op.outer - 1)]);
    int64_t ahead = o + (kAhead + 1) * kOuts <= range.stop ? kAhead * group_bytes : 0;
    packed = -1;
    for (const Span& span : op.spans) {
      Delta delta{h + span.start * FewRows::kRank, up, 0};
      if (span.adapter >= 0) {
        const FewRows::Adapter& adapter = op.bank[span.adapter];
        delta.padded = padded(adapter.rank);
        if (packed != span.adapter) {
          std::memset(up, 0, sizeof(up));
          dispatch(adapter.up.dtype, [&](auto type) { copy_up<decltype(type)>(adapter, o, outs, up); });
          packed = span.adapter;
        }
      }
      group<S, BLOCK>(weight, static_cast<const W*>(at.x) + span.start * op.width, span.stop - span.start, op.width, ahead,
               delta, read<Vector>(bias), static_cast<W*>(at.y) + span.start * op.outer + o, op.outer, outs);
      ahead = 0;
    }
  }
}

using Run = void (*)(const FewRows&, const FewRowsTensors&, OutputRange);

template <typename S> void run(const FewRows& op, const FewRowsTensors& at, OutputRange range) {
  outputs<S, 1>(op, at, range);
}

#if defined(RLHF_AVX512)
// No clones: what is faster than PyTorch needs 32 registers. The plain code is for a machine without, and for tests.
#define RLHF_RUN(NAME, S) \
  RLHF_AVX512 void NAME(const FewRows& op, const FewRowsTensors& at, OutputRange range) { outputs<S, 4>(op, at, range); }
RLHF_RUN(run_float, Float)
RLHF_RUN(run_bf16, Bf16)
RLHF_RUN(run_pairs, Bf16Pairs)
RLHF_RUN(run_f16, F16Converted)

Run fast(DType dtype) {
  static const bool pairs = __builtin_cpu_supports("avx512bf16");
  return dtype == DType::f32 ? run_float : dtype == DType::f16 ? run_f16 : pairs ? run_pairs : run_bf16;
}
#endif

Run chosen(DType dtype) {
#if defined(RLHF_AVX512)
  if (few_rows_is_fast()) return fast(dtype);
#endif
  return dtype == DType::f32 ? run<Float> : dtype == DType::f16 ? run<F16> : run<Bf16>;
}

}  // namespace

bool few_rows_is_fast() {
#if defined(RLHF_AVX512)
  static const bool fast = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return fast;
#else
  return false;
#endif
}

OutputRange few_rows_outputs(int64_t outer, int thread, int threads) {
  const int64_t groups = (outer + kOuts - 1) / kOuts;
  return {groups * thread / threads * kOuts, std::min(groups * (thread + 1) / threads * kOuts, outer)};
}

void few_rows_part(const FewRows& op, const FewRowsTensors& at, int thread, int threads) {
  const OutputRange range = few_rows_outputs(op.outer, thread, threads);
  if (range.first < range.stop) chosen(op.dtype)(op, at, range);
}

void few_rows(const FewRows& op, const FewRowsTensors& at, int threads) {
  if (op.outer * op.width < kParallel) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int t = 0; t < threads; ++t) few_rows_part(op, at, t, threads);
}

}  // namespace rlhf::cpu
