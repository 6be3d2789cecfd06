// The sums of shrink are vectorised by regrouping them, which the compiler must be allowed; NaN and inf still hold.
#pragma GCC optimize("associative-math", "no-signed-zeros")
#include "cpu/lora_linear.h"

#include <algorithm>
#include <type_traits>

#include "cpu/dispatch.h"
#include "math/philox.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kRowTile = 32;            // rows of a parallel task
constexpr int kRows = 4, kRanks = 4;        // of a block: 16 sums, which stay in registers
constexpr int64_t kColumns = 512;           // columns of y that stay in the first-level cache while ranks are added
constexpr int64_t kParallelPack = 1 << 15;  // elements from which packing is worth its own parallel loop

// A matrix of the bank in the type of the sums; its ranks are padded with zeros to whole blocks.
template <typename C> struct Packed {
  std::vector<C> data;  // (padded, width)
  int64_t rank, padded;
  C scale;
};

template <typename T, typename C> void copy_row(const Plane& matrix, int64_t row, int64_t width, C* out) {
  const T* data = static_cast<const T*>(matrix.data) + row * matrix.row_stride;
  for (int64_t k = 0; k < width; ++k) out[k] = C(load(data[k * matrix.column_stride]));
}

template <typename C> Packed<C> pack(const LowRank& adapter, int64_t width, int threads) {
  const int64_t padded = (adapter.rank + kRanks - 1) / kRanks * kRanks;
  Packed<C> packed{std::vector<C>(padded * width), adapter.rank, padded, C(adapter.scale)};
  dispatch(adapter.matrix.dtype, [&](auto type) {
#pragma omp parallel for num_threads(threads) schedule(static) if (adapter.rank * width >= kParallelPack)
    for (int64_t r = 0; r < adapter.rank; ++r)
      copy_row<decltype(type)>(adapter.matrix, r, width, packed.data.data() + r * width);
  });
  return packed;
}

// (rows, columns) of a wide tensor in the type of the sums: itself where it has that type, else a copy in `room`.
template <typename T, typename C> struct Block {
  static constexpr bool copied = !std::is_same<T, C>::value;
  T* wide;
  int64_t wide_stride;
  C* room;  // (rows, columns)
  int64_t columns;

  RLHF_INLINE C* data() const {
    if constexpr (copied) return room;
    else return wide;
  }
  RLHF_INLINE int64_t stride() const { return copied ? columns : wide_stride; }
  RLHF_INLINE void read(int rows) const {
    if constexpr (copied)
      for (int i = 0; i < rows; ++i)
        for (int64_t k = 0; k < columns; ++k) room[i * columns + k] = load(wide[i * wide_stride + k]);
  }
  RLHF_INLINE void write(int rows) const {
    if constexpr (copied)
      for (int i = 0; i < rows; ++i)
        for (int64_t k = 0; k < columns; ++k) store(wide[i * wide_stride + k], room[i * columns + k]);
  }
};

// sums = x @ matrix^T for ROWS rows of x and kRanks of the matrix, both `width` long.
template <int ROWS, typename C>
RLHF_INLINE void dot_products(const C* x, int64_t stride, const C* matrix, int64_t width, C (&sums)[ROWS][kRanks]) {
  C s[ROWS][kRanks] = {};
  for (int64_t k = 0; k < width; ++k)
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < kRanks; ++r) s[i][r] += x[i * stride + k] * matrix[r * width + k];
  std::memcpy(sums, s, sizeof(s));
}

// y += h @ matrix for ROWS rows of y, `columns` long, and RANKS of the matrix.
template <int ROWS, int RANKS, typename C>
RLHF_INLINE void add_products(const C* h, int64_t h_stride, const C* matrix, int64_t width, int64_t columns, C* y,
                              int64_t stride) {
  C factors[ROWS][RANKS];
  for (int i = 0; i < ROWS; ++i) std::memcpy(factors[i], h + i * h_stride, sizeof(factors[i]));
#pragma omp simd
  for (int64_t k = 0; k < columns; ++k)
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      C sum = y[i * stride + k];
#pragma GCC unroll 8
      for (int r = 0; r < RANKS; ++r) sum += factors[i][r] * matrix[r * width + k];
      y[i * stride + k] = sum;
    }
}

template <int ROWS, typename T, typename C>
RLHF_INLINE void shrink_block(const LoraLinear& op, const Packed<C>& down, int64_t row, C* room) {
  const Block<T, C> x{static_cast<T*>(op.wide) + row * op.wide_stride, op.wide_stride, room, op.width};
  x.read(ROWS);
  for (int64_t first = 0; first < down.rank; first += kRanks) {
    C sums[ROWS][kRanks];
    dot_products<ROWS>(x.data(), x.stride(), down.data.data() + first * op.width, op.width, sums);
    for (int i = 0; i < ROWS; ++i) {
      T* h = static_cast<T*>(op.narrow) + (row + i) * op.narrow_stride;
      for (int64_t r = first; r < std::min(first + kRanks, down.rank); ++r) store(h[r], sums[i][r - first]);
    }
  }
}

template <int ROWS, typename T, typename C>
RLHF_INLINE void expand_block(const LoraLinear& op, const Packed<C>& up, int64_t row, C* room, C* h) {
  for (int i = 0; i < ROWS; ++i) {
    const T* unscaled = static_cast<const T*>(op.narrow) + (row + i) * op.narrow_stride;
    for (int64_t r = 0; r < up.rank; ++r) h[i * up.padded + r] = up.scale * load(unscaled[r]);
  }
  for (int64_t k = 0; k < op.width; k += kColumns) {
    const Block<T, C> y{static_cast<T*>(op.wide) + row * op.wide_stride + k, op.wide_stride, room,
                        std::min(kColumns, op.width - k)};
    y.read(ROWS);
    const C* matrix = up.data.data() + k;
    int64_t first = 0;
    for (; first + 2 * kRanks <= up.padded; first += 2 * kRanks)
      add_products<ROWS, 2 * kRanks>(h + first, up.padded, matrix + first * op.width, op.width, y.columns, y.data(),
                                     y.stride());
    if (first < up.padded)
      add_products<ROWS, kRanks>(h + first, up.padded, matrix + first * op.width, op.width, y.columns, y.data(),
                                 y.stride());
    y.write(ROWS);
  }
}

template <typename T, typename C>
RLHF_INLINE void shrink_rows(const LoraLinear& op, const Packed<C>& down, int64_t row, int64_t stop) {
  std::vector<C> room(Block<T, C>::copied ? kRows * op.width : 0);
  for (; row + kRows <= stop; row += kRows) shrink_block<kRows, T>(op, down, row, room.data());
  for (; row < stop; ++row) shrink_block<1, T>(op, down, row, room.data());
}

template <typename T, typename C>
RLHF_INLINE void expand_rows(const LoraLinear& op, const Packed<C>& up, int64_t row, int64_t stop) {
  std::vector<C> room(Block<T, C>::copied ? kRows * kColumns : 0), h(kRows * up.padded);
  for (; row + kRows <= stop; row += kRows) expand_block<kRows, T>(op, up, row, room.data(), h.data());
  for (; row < stop; ++row) expand_block<1, T>(op, up, row, room.data(), h.data());
}

// Bits are copied as they are, so an element's type is only its size. Counters of kGroups are made side by side, in
// vector registers.
template <typename Bits> RLHF_INLINE void drop_row(const Dropout& op, int64_t row) {
  constexpr int64_t kGroups = 32;
  const Bits* x = static_cast<const Bits*>(op.x) + row * op.x_stride;
  Bits* out = static_cast<Bits*>(op.out) + row * op.out_stride;
  for (int64_t start = 0; start < op.width; start += 4 * kGroups) {
    uint32_t words[4 * kGroups];
#pragma omp simd
    for (int64_t i = 0; i < kGroups; ++i) {
      const Philox made = philox(op.seed, uint32_t(start / 4 + i), uint32_t(row), 0, 0);
      for (int k = 0; k < 4; ++k) words[4 * i + k] = made.words[k];
    }
    const int64_t n = std::min(4 * kGroups, op.width - start);
    for (int64_t i = 0; i < n; ++i) out[start + i] = (words[i] >> 8) >= op.threshold ? x[start + i] : Bits(0);
  }
}

RLHF_CLONES void drop(uint16_t, const Dropout& op, int64_t row) { drop_row<uint16_t>(op, row); }
RLHF_CLONES void drop(uint32_t, const Dropout& op, int64_t row) { drop_row<uint32_t>(op, row); }
RLHF_CLONES void drop(uint64_t, const Dropout& op, int64_t row) { drop_row<uint64_t>(op, row); }

#define RLHF_ROWS(T)                                                                                    \
  RLHF_CLONES void shrink(T, const LoraLinear& op, const Packed<Compute<T>::type>& matrix, Span rows) { \
    shrink_rows<T>(op, matrix, rows.start, rows.stop);                                                  \
  }                                                                                                     \
  RLHF_CLONES void expand(T, const LoraLinear& op, const Packed<Compute<T>::type>& matrix, Span rows) { \
    expand_rows<T>(op, matrix, rows.start, rows.stop);                                                  \
  }
RLHF_FOR_DTYPES(RLHF_ROWS)

template <typename T> void run(const LoraLinear& op, bool shrinks, int threads) {
  using C = typename Compute<T>::type;
  std::vector<Packed<C>> bank(op.bank.size());
  std::vector<Span> tiles;
  for (const Span& span : op.spans) {
    if (bank[span.adapter].data.empty()) bank[span.adapter] = pack<C>(op.bank[span.adapter], op.width, threads);
    for (int64_t row = span.start; row < span.stop; row += kRowTile)
      tiles.push_back({span.adapter, row, std::min(row + kRowTile, span.stop)});
  }
#pragma omp parallel for num_threads(threads) schedule(static) if (tiles.size() > 1)
  for (size_t i = 0; i < tiles.size(); ++i)
    shrinks ? shrink(T(), op, bank[tiles[i].adapter], tiles[i]) : expand(T(), op, bank[tiles[i].adapter], tiles[i]);
}

void run(const LoraLinear& op, bool shrinks, int threads) {
  dispatch(op.dtype, [&](auto type) { run<decltype(type)>(op, shrinks, threads); });
}

template <typename Bits> void run(const Dropout& op, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (op.rows * op.width >= kParallelPack)
  for (int64_t row = 0; row < op.rows; ++row) drop(Bits(), op, row);
}

}  // namespace

void lora_dropout(const Dropout& op, int threads) {
  if (op.dtype == DType::f64) return run<uint64_t>(op, threads);
  op.dtype == DType::f32 ? run<uint32_t>(op, threads) : run<uint16_t>(op, threads);
}
void lora_shrink(const LoraLinear& op, int threads) { run(op, true, threads); }
void lora_expand(const LoraLinear& op, int threads) { run(op, false, threads); }

}  // namespace rlhf::cpu
