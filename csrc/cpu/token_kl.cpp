#include "cpu/token_kl.h"

#include <algorithm>
#include <cstring>

#include "cpu/dispatch.h"
#include "math/token_kl.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 1024;

// What depends on the type T of the elements, so that a divergence is compiled once for all types that compute in C.
// x points to the first of a tensor; the others to an element of a block.
template <typename C> struct Elements {
  int64_t size;  // of one, in bytes
  void (*read)(const void* x, int64_t start, int64_t n, bool capped, C inner, C* s);  // s = x, or tanh(inner * x)
  void (*times_slope)(const void* x, int64_t start, int64_t n, C inner, C* values);   // values *= d tanh(y) / d y
  void (*write)(void* x, int64_t start, int64_t n, const C* values);
};

#define RLHF_ELEMENTS(T)                                                                                               \
  RLHF_CLONES void read_##T(const void* x, int64_t start, int64_t n, bool capped, Compute<T>::type inner,              \
                            Compute<T>::type* s) {                                                                     \
    const T* from = static_cast<const T*>(x) + start;                                                                  \
    if (capped) {                                                                                                      \
      for (int64_t i = 0; i < n; ++i) s[i] = tanh_fast(Compute<T>::type(load(from[i])) * inner);                       \
    } else {                                                                                                           \
      for (int64_t i = 0; i < n; ++i) s[i] = load(from[i]);                                                            \
    }                                                                                                                  \
  }                                                                                                                    \
  RLHF_CLONES void times_slope_##T(const void* x, int64_t start, int64_t n, Compute<T>::type inner,                    \
                                   Compute<T>::type* values) {                                                         \
    const T* from = static_cast<const T*>(x) + start;                                                                  \
    for (int64_t i = 0; i < n; ++i) values[i] *= tanh_slope_fast(Compute<T>::type(load(from[i])) * inner);             \
  }                                                                                                                    \
  RLHF_CLONES void write_##T(void* x, int64_t start, int64_t n, const Compute<T>::type* values) {                      \
    T* out = static_cast<T*>(x) + start;                                                                               \
    for (int64_t i = 0; i < n; ++i) store(out[i], values[i]);                                                          \
  }                                                                                                                    \
  constexpr Elements<Compute<T>::type> k_##T{sizeof(T), read_##T, times_slope_##T, write_##T};
RLHF_FOR_DTYPES(RLHF_ELEMENTS)

template <typename C> const Elements<C>& elements(DType dtype);
template <> const Elements<double>& elements(DType) { return k_double; }
template <> const Elements<float>& elements(DType dtype) {
  return dtype == DType::bf16 ? k_bf16 : dtype == DType::f16 ? k_f16 : k_float;
}

// One row of logits, read in blocks of log softmax(z): z = factor * s with s = x, or tanh(inner * x) under a softcap.
// The maximum is taken off s, so that the top's log-probability is exactly -logsum.
template <typename C> struct Row {
  const Elements<C>& type;
  const void* logits;
  int64_t offset, vocabulary;
  bool capped;
  C inner, factor, logsum, max;
  int64_t top;  // where s is maximal

  RLHF_INLINE Row(const Elements<C>& type, const void* logits, int64_t offset, int64_t vocabulary, const Transform& t,
                  int64_t row, const void* logsums)
      : type(type), logits(logits), offset(offset), vocabulary(vocabulary), capped(t.softcap > 0),
        logsum(static_cast<const C*>(logsums)[row]), max(-infinity<C>()), top(0) {
    const RowTransform<C> transform(t, row);
    inner = transform.scale / transform.cap;
    factor = capped ? transform.factor * transform.cap : transform.factor;
    C s[kBlock];
    for (int64_t start = 0; start < vocabulary; start += kBlock) {
      const int64_t n = read(start, s);
      C block_max = -infinity<C>();
#pragma omp simd reduction(max : block_max)
      for (int64_t i = 0; i < n; ++i) block_max = s[i] > block_max ? s[i] : block_max;
      if (!(block_max > max)) continue;
      max = block_max;
      top = start + (std::find(s, s + n, max) - s);
    }
  }

  RLHF_INLINE int64_t read(int64_t start, C* s) const {
    const int64_t n = std::min(kBlock, vocabulary - start);
    type.read(logits, offset + start, n, capped, inner, s);
    return n;
  }

  RLHF_INLINE int64_t read_log_p(int64_t start, C* log_p) const {
    const int64_t n = read(start, log_p);
    for (int64_t i = 0; i < n; ++i) log_p[i] = (log_p[i] - max) * factor - logsum;
    return n;
  }

  // values *= scale * d z / d x at n elements from `start`.
  RLHF_INLINE void times_slope(int64_t start, int64_t n, C scale, C* values) const {
    const C slope = scale * factor * (capped ? inner : C(1));
    for (int64_t i = 0; i < n; ++i) values[i] *= slope;
    if (capped) type.times_slope(logits, offset + start, n, inner, values);
  }
};

template <typename D, typename C> RLHF_INLINE void forward_row(const TokenKl& op, int64_t row) {
  double kl = 0, total_mean = 0;
  if (!op.mask || op.mask[row]) {
    const Elements<C>& type = elements<C>(op.dtype);
    const Row<C> policy(type, op.logits, op.rows.offset(row), op.vocabulary, op.transform, row, op.logsum);
    const Row<C> ref(type, op.ref_logits, op.ref_rows.offset(row), op.vocabulary, op.transform, row, op.ref_logsum);
    const C js_weight = C(op.js_weight);
    C log_p[kBlock], log_q[kBlock];
    for (int64_t start = 0; start < op.vocabulary; start += kBlock) {
      const int64_t n = policy.read_log_p(start, log_p);
      ref.read_log_p(start, log_q);
      C value = 0, mean = 0;
#pragma omp simd reduction(+ : value, mean)
      for (int64_t i = 0; i < n; ++i) {
        const auto terms = D::at(exp_neg(log_p[i]), exp_neg(log_q[i]), log_q[i] - log_p[i], js_weight);
        value += terms.value;
        mean += terms.mean;
      }
      kl += value;
      total_mean += mean;
    }
  }
  static_cast<C*>(op.kl)[row] = C(kl);
  static_cast<C*>(op.mean)[row] = C(total_mean);
}

template <typename D, typename C>
RLHF_INLINE void backward_row(const TokenKl& op, const void* grad_kl, void* gradient, const Rows& gradient_rows,
                              int64_t row) {
  const Elements<C>& type = elements<C>(op.dtype);
  const int64_t out = gradient_rows.offset(row);
  const C grad = static_cast<const C*>(grad_kl)[row];
  if ((op.mask && !op.mask[row]) || grad == 0) {
    std::memset(static_cast<char*>(gradient) + out * type.size, 0, op.vocabulary * type.size);
    return;
  }
  const Row<C> policy(type, op.logits, op.rows.offset(row), op.vocabulary, op.transform, row, op.logsum);
  const Row<C> ref(type, op.ref_logits, op.ref_rows.offset(row), op.vocabulary, op.transform, row, op.ref_logsum);
  const C js_weight = C(op.js_weight), mean = static_cast<const C*>(op.mean)[row];
  // A row's gradient sums to 0. Where one token holds more than half of p, its own element is taken from that: computed
  // directly it would cancel.
  const int64_t leader = policy.logsum < C(0.69) ? policy.top : -1;
  C top_slope = 1, others = 0;
  if (leader >= 0) policy.times_slope(leader, 1, grad, &top_slope);
  C log_p[kBlock], log_q[kBlock];
  for (int64_t start = 0; start < op.vocabulary; start += kBlock) {
    const int64_t n = policy.read_log_p(start, log_p);
    ref.read_log_p(start, log_q);
    for (int64_t i = 0; i < n; ++i) {
      const C p = exp_neg(log_p[i]);
      const C slope = D::at(p, exp_neg(log_q[i]), log_q[i] - log_p[i], js_weight).slope;
      log_p[i] = p == 0 ? slope : slope - p * mean;
    }
    if (leader >= start && leader < start + n) log_p[leader - start] = 0;
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += log_p[i];
    others += sum;
    policy.times_slope(start, n, grad, log_p);
    type.write(gradient, out + start, n, log_p);
  }
  if (leader < 0) return;
  const C of_leader = -others * top_slope;
  type.write(gradient, out + leader, 1, &of_leader);
}

struct Functions {
  void (*forward)(const TokenKl&, int64_t);
  void (*backward)(const TokenKl&, const void*, void*, const Rows&, int64_t);
};

#define RLHF_FOR_COMPUTE(D, C)                                                                                         \
  RLHF_CLONES void forward_##D##_##C(const TokenKl& op, int64_t row) { forward_row<D, C>(op, row); }                   \
  RLHF_CLONES void backward_##D##_##C(const TokenKl& op, const void* grad_kl, void* gradient,                          \
                                      const Rows& gradient_rows, int64_t row) {                                        \
    backward_row<D, C>(op, grad_kl, gradient, gradient_rows, row);                                                     \
  }
#define RLHF_FOR_DIVERGENCE(D)                                                                                         \
  RLHF_FOR_COMPUTE(D, float)                                                                                           \
  RLHF_FOR_COMPUTE(D, double)                                                                                          \
  constexpr Functions k##D[] = {{forward_##D##_float, backward_##D##_float},                                           \
                                {forward_##D##_double, backward_##D##_double}};
RLHF_FOR_DIVERGENCE(ReverseKl)
RLHF_FOR_DIVERGENCE(ForwardKl)
RLHF_FOR_DIVERGENCE(JensenShannon)

const Functions& functions(const std::string& divergence, DType dtype) {
  static const std::map<std::string, const Functions*> table = {
      {"reverse", kReverseKl}, {"forward", kForwardKl}, {"js", kJensenShannon}};
  return named(table, "divergence", divergence)[dtype == DType::f64];
}

}  // namespace

void token_kl_forward(const std::string& divergence, const TokenKl& op, int threads) {
  const auto forward = functions(divergence, op.dtype).forward;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < op.rows.count(); ++row) forward(op, row);
}

void token_kl_backward(const std::string& divergence, const TokenKl& op, const void* grad_kl, void* gradient,
                       Rows gradient_rows, int threads) {
  const auto backward = functions(divergence, op.dtype).backward;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < op.rows.count(); ++row) backward(op, grad_kl, gradient, gradient_rows, row);
}

}  // namespace rlhf::cpu
