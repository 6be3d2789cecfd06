#include "cpu/policy_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kl_estimate.h"
#include "cpu/mask.h"
#include "math/kl_estimate.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 512;
template <typename C> constexpr DType kDType = sizeof(C) == 8 ? DType::f64 : DType::f32;
constexpr int kParts = 64;  // partial sums, however many threads there are: the same inputs give the same bits

enum class Level { token, sequence, geometric };  // of what the correction is made

const std::map<std::string, Level> kLevels = {
    {"token", Level::token}, {"sequence", Level::sequence}, {"geometric", Level::geometric}};
const std::map<std::string, bool> kModes = {{"truncate", false}, {"mask", true}};

// A call, and what follows from it.
struct Call : PolicyLoss {
  double tokens;  // the denominator
  KlVariant kl;
  Level level;
  bool reject;            // weights outside the bounds become 0 instead of the bound
  bool folds_correction;  // the correction is in the sum of the log-ratios instead of a weight
};

enum Metric { kLow, kHigh, kApproxKl, kRatio, kKl, kEntropy, kCorrection, kOutside, kSamplerKl, kDropped, kSums };

struct Sums {
  double loss = 0, of[kSums] = {};
  double highest = -std::numeric_limits<double>::infinity(), lowest = std::numeric_limits<double>::infinity();
};

// A sequence, or the whole batch where the loss does not ask for sequences.
template <typename C> struct Sequence {
  Shared<C> shared{};
  C weight = 0;      // of the sequence in the loss over its length, for losses of a sequence
  C correction = 1;  // weight of every token, for corrections of a sequence
  bool far = false;  // from the sampler: negative advantages are dropped
};

// A block: consecutive tokens of one sequence, 0 where a token does not count. A part of the batch uses one such struct
// for all of its blocks, so that what they have in common is written once: see `plain` and `uncorrected`.
template <typename C> struct Tokens {
  const C *logprobs, *old_logprobs, *advantages;  // the input itself where it can be read as it is
  C copies[3][kBlock], optional[kBlock];          // where not
  C log_ratio[kBlock], ratio[kBlock];             // ratio = exp(log_ratio), the latter within +-20
  C weights[kBlock];                              // in the loss
  C correction[kBlock];                           // weight of the policy term
  C counts[kBlock];                               // 1 or 0
  int32_t flags[kBlock];                          // as wide as C, for the vectoriser
  bool all;                                       // whether every token counts
  int bits;                                       // of any flag
  int64_t plain = 0;        // the first so many flags and counts are 1, their weights 1 / tokens
  int64_t uncorrected = 0;  // the first so many corrections are 1
};

template <typename C>
RLHF_INLINE const C* read_counted(const Call& op, const Plane& plane, const Tokens<C>& t, int64_t start,
                                  int64_t n, C* copy) {
  const int64_t column = start % op.columns;
  if (t.all && plane.dtype == kDType<C> && plane.column_stride == 1 && column + n <= op.columns)
    return static_cast<const C*>(plane.data) + start / op.columns * plane.row_stride + column;
  read(plane, op.columns, start, n, copy);
  if (t.all) return copy;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) copy[i] = t.flags[i] ? copy[i] : C(0);
  return copy;
}

// False where no token counts, then nothing is read: much of a ragged batch is padding.
template <typename C> RLHF_INLINE bool read_tokens(const Call& op, int64_t start, int64_t n, Tokens<C>& t) {
  t.all = true, t.bits = 1;
  if (op.flags) {
    const uint8_t* flags = op.flags + start;
    uint8_t any = 0, zero = 0;
#pragma omp simd reduction(| : any, zero)
    for (int64_t i = 0; i < n; ++i) any |= flags[i], zero |= flags[i] == 0;
    if (any == 0) return false;
    t.all = zero == 0, t.bits = op.numbers.marks_tokens ? any : 1;
  }
  const bool plain = t.all && t.bits == 1 && !op.weights.data;
  if (!plain || t.plain < n) {
    const C weight = 1 / C(op.tokens);
    const int bits = op.numbers.marks_tokens ? 7 : 0;
    for (int64_t i = 0; i < n; ++i) t.flags[i] = op.flags ? op.flags[start + i] : 1;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      t.counts[i] = t.flags[i] ? C(1) : C(0);
      t.weights[i] = t.flags[i] ? weight : C(0);
      t.flags[i] = (t.flags[i] & bits) | (t.flags[i] ? 1 : 0);
    }
    t.plain = plain ? n : 0;
  }
  if (op.weights.data) {
    const C* weights = read_counted(op, op.weights, t, start, n, t.weights);
    if (weights != t.weights) std::copy(weights, weights + n, t.weights);
  }
  t.logprobs = read_counted(op, op.logprobs, t, start, n, t.copies[0]);
  t.old_logprobs = read_counted(op, op.old_logprobs, t, start, n, t.copies[1]);
  t.advantages = read_counted(op, op.advantages, t, start, n, t.copies[2]);
  return true;
}

// The weight that a ratio to the sampler gives.
template <typename C> struct Bounds {
  C low, high;
  bool reject;
  explicit Bounds(const Call& op)
      : low(C(op.numbers.correction_low)), high(C(op.numbers.correction_high)), reject(op.reject) {}
  RLHF_INLINE bool outside(C ratio) const { return (ratio < low) | (ratio > high); }
  RLHF_INLINE C weight(C ratio) const { return reject & outside(ratio) ? C(0) : bounded(ratio, low, high); }
  C log_weight(C ratio) const { return std::log(std::max(weight(ratio), std::exp(C(-20)))); }
};

// The ratio of every token, and its statistics.
template <typename C> RLHF_INLINE void find_ratios(int64_t n, Tokens<C>& t, Sums& sums) {
  const C floor = exp_any(C(-20)), ceiling = exp_any(C(20));
  const C *logprobs = t.logprobs, *old_logprobs = t.old_logprobs;
  C approx_kl = 0, total = 0, highest = -infinity<C>(), lowest = infinity<C>();
#pragma omp simd reduction(+ : approx_kl, total) reduction(max : highest) reduction(min : lowest)
  for (int64_t i = 0; i < n; ++i) {
    const C log_ratio = logprobs[i] - old_logprobs[i];
    const ExpParts<C> e = exp_parts(log_ratio);
    const C ratio = bounded(e.exp, floor, ceiling);
    t.log_ratio[i] = log_ratio, t.ratio[i] = ratio;
    approx_kl += e.minus_1_minus;  // 0 where it does not count
    const C above = t.counts[i] * ratio, below = t.flags[i] ? ratio : infinity<C>();  // a ratio is > 0
    total += above;
    highest = above > highest ? above : highest;
    lowest = below < lowest ? below : lowest;
  }
  sums.of[kApproxKl] += approx_kl, sums.of[kRatio] += total;
  sums.highest = std::max(sums.highest, double(highest)), sums.lowest = std::min(sums.lowest, double(lowest));
}

// The correction of every token, and its statistics.
template <typename C>
RLHF_INLINE void correct(const Call& op, int64_t start, int64_t n, const Sequence<C>& sequence, Tokens<C>& t,
                         Sums& sums) {
  const C *sampler = read_counted(op, op.sampler_logprobs, t, start, n, t.optional), *old_logprobs = t.old_logprobs;
  t.uncorrected = 0;
  const Bounds<C> bounds(op);
  const bool of_token = op.level == Level::token;
  const C of_sequence = sequence.correction;
  C applied = 0, outside = 0, kl = 0;
#pragma omp simd reduction(+ : applied, outside, kl)
  for (int64_t i = 0; i < n; ++i) {
    const C apart = old_logprobs[i] - sampler[i];
    const C ratio = of_token ? exp_any(bounded(apart, C(-20), C(20))) : of_sequence;
    t.correction[i] = bounds.weight(ratio);
    applied += t.counts[i] * t.correction[i];
    outside += bounds.outside(ratio) ? t.counts[i] : C(0);
    kl += exp_parts(apart).minus_1_minus;  // 0 where it does not count
  }
  sums.of[kCorrection] += applied, sums.of[kOutside] += outside, sums.of[kSamplerKl] += kl;
  if (op.folds_correction) std::fill(t.correction, t.correction + n, C(1)), t.uncorrected = n;
}

// Takes dropped tokens out of the policy term.
template <typename C>
RLHF_INLINE void drop(int64_t n, const Sequence<C>& sequence, Tokens<C>& t, Sums& sums) {
  const C far = sequence.far ? C(1) : C(0), *advantages = t.advantages;
  t.uncorrected = 0;
  C dropped = 0;
#pragma omp simd reduction(+ : dropped)
  for (int64_t i = 0; i < n; ++i) {
    const bool out = ((t.flags[i] & 2) != 0) | (far * advantages[i] < 0);
    dropped += out ? C(1) : C(0);
    t.correction[i] = out ? C(0) : t.correction[i];
  }
  sums.of[kDropped] += dropped;
}

// Apart from its loop: an object whose address is taken within a simd loop stops the vectoriser.
template <typename F, typename C>
RLHF_INLINE Outcome<C> outcome(const Tokens<C>& t, C logprob, C old_logprob, C advantage, int64_t i,
                               const Shared<C>& shared, const Numbers<C>& p) {
  const Token<C> token{logprob, old_logprob, advantage, t.log_ratio[i], t.ratio[i], t.flags[i] & 4 ? C(1) : C(0)};
  return F::at(token, shared, p, [](C x) { return exp_any(x); });
}

template <typename F, typename C>
RLHF_INLINE void policy_term(const Call& op, int64_t n, const Sequence<C>& sequence, const Tokens<C>& t,
                             C* __restrict coefficient, Sums& sums) {
  const Numbers<C> p = op.numbers.in<C>();
  const Shared<C> shared = sequence.shared;
  const C sequence_weight = sequence.weight;
  const C *logprobs = t.logprobs, *old_logprobs = t.old_logprobs, *advantages = t.advantages;
  C loss = 0, low = 0, high = 0;
#pragma omp simd reduction(+ : loss, low, high)
  for (int64_t i = 0; i < n; ++i) {
    const Outcome<C> out = outcome<F>(t, logprobs[i], old_logprobs[i], advantages[i], i, shared, p);
    const C weight = t.weights[i] * t.correction[i];
    loss += product(weight, out.loss);
    coefficient[i] = product(F::of_sequence ? t.counts[i] * sequence_weight : weight, out.slope);
    low += t.counts[i] * out.low;
    high += t.counts[i] * out.high;
  }
  sums.loss += loss, sums.of[kLow] += low, sums.of[kHigh] += high;
}

// The KL to the reference by the estimator E, into the loss and the coefficients.
template <typename E, typename C>
RLHF_INLINE void reference_term(const Call& op, int64_t start, int64_t n, Tokens<C>& t, C* coefficient, Sums& sums) {
  constexpr bool is_k3 = std::is_same_v<E, K3>;
  const C *ref_logprobs = read_counted(op, op.ref_logprobs, t, start, n, t.optional), *logprobs = t.logprobs;
  const C kl_coef = C(op.numbers.kl_coef);
  const bool unbiased = op.numbers.kl_unbiased;
  C loss = 0, kl = 0;
#pragma omp simd reduction(+ : loss, kl)
  for (int64_t i = 0; i < n; ++i) {
    const C apart = ref_logprobs[i] - logprobs[i], within = bounded(apart, C(-20), C(20));
    const C x = is_k3 | unbiased ? within : apart;
    const Sloped<C> estimate = E::at(x);
    const C k3_slope = x == apart ? estimate.value + x : C(0);  // cheaper than the functor's: x is bounded
    const C slope = is_k3 ? k3_slope : estimate.slope;
    const C value = unbiased ? t.ratio[i] * estimate.value : estimate.value;
    kl += value;
    loss += t.weights[i] * value;
    coefficient[i] -= product(kl_coef * t.weights[i], unbiased ? t.ratio[i] * x : slope);
  }
  sums.of[kKl] += kl;
  if (op.numbers.kl_coef > 0) sums.loss += op.numbers.kl_coef * loss;
}

template <typename C>
RLHF_INLINE void entropy_term(const Call& op, int64_t start, int64_t n, Tokens<C>& t, Sums& sums) {
  const C* entropies = read_counted(op, op.entropy, t, start, n, t.optional);
  C loss = 0, entropy = 0;
#pragma omp simd reduction(+ : loss, entropy)
  for (int64_t i = 0; i < n; ++i) {
    entropy += entropies[i];
    loss += t.weights[i] * entropies[i];
  }
  sums.of[kEntropy] += entropy;
  if (!op.entropy_coefficient) return;
  sums.loss -= op.numbers.entropy_coef * loss;
  C* coefficient = static_cast<C*>(op.entropy_coefficient) + start;
  for (int64_t i = 0; i < n; ++i) coefficient[i] = -C(op.numbers.entropy_coef) * t.weights[i];
}

// What comes before the policy term, whichever it is; false where no token counts. Then what comes after it.
template <typename C>
RLHF_INLINE bool before(const Call& op, int64_t start, int64_t n, const Sequence<C>& sequence, Tokens<C>& t,
                        Sums& sums) {
  if (!read_tokens(op, start, n, t)) return false;
  find_ratios(n, t, sums);
  if (t.uncorrected < n) std::fill(t.correction, t.correction + n, C(1)), t.uncorrected = n;
  if (op.sampler_logprobs.data) correct(op, start, n, sequence, t, sums);
  if (t.bits & 2 || sequence.far) drop(n, sequence, t, sums);
  return true;
}
template <typename C>
RLHF_INLINE void after(const Call& op, int64_t start, int64_t n, Tokens<C>& t, C* coefficient, Sums& sums) {
  if (op.ref_logprobs.data) {
    if (op.kl == KlVariant::k1) reference_term<K1>(op, start, n, t, coefficient, sums);
    else if (op.kl == KlVariant::k2) reference_term<K2>(op, start, n, t, coefficient, sums);
    else reference_term<K3>(op, start, n, t, coefficient, sums);
  }
  if (op.entropy.data) entropy_term(op, start, n, t, sums);
}
// Cloned per instruction set for float; double spends its time in the library's exp.
RLHF_CLONES bool begin(const Call& op, int64_t start, int64_t n, const Sequence<float>& s, Tokens<float>& t,
                       Sums& sums) {
  return before(op, start, n, s, t, sums);
}
bool begin(const Call& op, int64_t start, int64_t n, const Sequence<double>& s, Tokens<double>& t, Sums& sums) {
  return before(op, start, n, s, t, sums);
}
RLHF_CLONES void end(const Call& op, int64_t start, int64_t n, Tokens<float>& t, float* coefficient, Sums& sums) {
  after(op, start, n, t, coefficient, sums);
}
void end(const Call& op, int64_t start, int64_t n, Tokens<double>& t, double* coefficient, Sums& sums) {
  after(op, start, n, t, coefficient, sums);
}

// Asks memory for what the next block reads, `start` its first token, while this one is computed: a block is too short
// for the processor to see where it leads. One input at a time: there are few misses that a core can wait for at once.
inline void prefetch(const Call& op, const Plane& plane, int64_t start) {
  const int64_t row = start / op.columns, column = start % op.columns;
  if (row == op.rows || plane.column_stride != 1 || (op.flags && op.flags[start] == 0)) return;
  const int64_t n = std::min(kBlock, op.columns - column);
  const int64_t size = plane.dtype == DType::f64 ? 8 : plane.dtype == DType::f32 ? 4 : 2;
  const char* at = static_cast<const char*>(plane.data) + (row * plane.row_stride + column) * size;
  for (int64_t byte = 0; byte < n * size; byte += 64) __builtin_prefetch(at + byte);
}

// Tokens [start, start + n) of one sequence, n <= kBlock.
template <typename F, typename C>
RLHF_INLINE void tokens(const Call& op, int64_t start, int64_t n, const Sequence<C>& sequence, Tokens<C>& t,
                        Sums& sums) {
  C* coefficient = static_cast<C*>(op.coefficient) + start;
  prefetch(op, op.logprobs, start + n);
  if (!begin(op, start, n, sequence, t, sums)) {
    std::fill(coefficient, coefficient + n, C(0));
    if (op.entropy_coefficient) std::fill_n(static_cast<C*>(op.entropy_coefficient) + start, n, C(0));
    return;
  }
  prefetch(op, op.old_logprobs, start + n);
  policy_term<F>(op, n, sequence, t, coefficient, sums);
  prefetch(op, op.advantages, start + n);
  end(op, start, n, t, coefficient, sums);
}

// The sums over tokens [start, start + n) behind Sequence.
struct SequenceSums {
  double count = 0, statistic = 0, advantage = 0, correction = 0, kl = 0;
  double weight = 0, weight_negative = 0;  // of all tokens that are kept, of those with a negative advantage
};

template <typename Statistic, typename C>
RLHF_INLINE void add(const Call& op, int64_t start, int64_t n, SequenceSums& sums) {
  Tokens<C> t;
  if (!read_tokens(op, start, n, t)) return;
  const bool has_sampler = op.sampler_logprobs.data, of_token = has_sampler && op.level == Level::token;
  const C *logprobs = t.logprobs, *old_logprobs = t.old_logprobs, *advantages = t.advantages, *sampler = old_logprobs;
  if (has_sampler) sampler = read_counted(op, op.sampler_logprobs, t, start, n, t.optional);
  const Bounds<C> bounds(op);
  if (of_token && op.folds_correction) {
    for (int64_t i = 0; i < n; ++i)
      if (t.flags[i])
        sums.statistic += bounds.log_weight(exp_any(bounded(old_logprobs[i] - sampler[i], C(-20), C(20))));
  } else if (of_token) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      t.weights[i] *= bounds.weight(exp_any(bounded(old_logprobs[i] - sampler[i], C(-20), C(20))));
  }
  const Numbers<C> p = op.numbers.in<C>();
  C count = 0, statistic = 0, advantage_sum = 0, correction = 0, kl = 0, weights = 0, weights_negative = 0;
#pragma omp simd reduction(+ : count, statistic, advantage_sum, correction, kl, weights, weights_negative)
  for (int64_t i = 0; i < n; ++i) {
    const C advantage = advantages[i], weight = t.flags[i] & 2 ? C(0) : t.weights[i];
    count += t.counts[i];
    statistic += Statistic::at(logprobs[i] - old_logprobs[i], advantage, p);
    advantage_sum += advantage;
    correction += old_logprobs[i] - sampler[i];
    kl += sampler[i] - logprobs[i];
    weights += weight;
    weights_negative += advantage < 0 ? weight : C(0);
  }
  sums.count += count, sums.statistic += statistic, sums.advantage += advantage_sum, sums.correction += correction;
  sums.kl += kl, sums.weight += weights, sums.weight_negative += weights_negative;
}

// add for float by its statistic, cloned as `begin` is.
RLHF_CLONES void add_log_ratio(const Call& op, int64_t start, int64_t n, SequenceSums& sums) {
  add<LogRatio, float>(op, start, n, sums);
}
RLHF_CLONES void add_bounded_log_ratio(const Call& op, int64_t start, int64_t n, SequenceSums& sums) {
  add<BoundedLogRatio, float>(op, start, n, sums);
}
auto adder(LogRatio) { return add_log_ratio; }
auto adder(BoundedLogRatio) { return add_bounded_log_ratio; }

template <typename F, typename C> Sequence<C> finish(const Call& op, const SequenceSums& sums) {
  const Numbers<C> p = op.numbers.in<C>();
  const double length = std::max(sums.count, 1.0);
  double statistic = sums.statistic;
  Sequence<C> out;
  if (op.level != Level::token && op.sampler_logprobs.data) {
    out.correction = bounded_exp(C(op.level == Level::sequence ? sums.correction : sums.correction / length));
    if (op.folds_correction)
      statistic += (op.level == Level::sequence ? 1 : length) * Bounds<C>(op).log_weight(out.correction);
  }
  out.shared = F::shared(C(statistic / length), C(length), C(sums.advantage / length), p);
  out.far = sums.kl / length > op.numbers.off_policy_max_kl;
  double weight = sums.weight - (out.far ? sums.weight_negative : 0);
  if (op.level != Level::token && op.sampler_logprobs.data) weight *= Bounds<C>(op).weight(out.correction);
  out.weight = C(weight / length);
  return out;
}

struct Span {
  int64_t begin, end;
};
Span sequence_span(const Call& op, int64_t sequence) {
  if (op.cu_seqlens) return {op.cu_seqlens[sequence], op.cu_seqlens[sequence + 1]};
  return {sequence * op.columns, (sequence + 1) * op.columns};
}

template <typename C> struct Kernels {
  void (*tokens)(const Call&, int64_t start, int64_t n, const Sequence<C>&, Tokens<C>&, Sums&);
  void (*add)(const Call&, int64_t start, int64_t n, SequenceSums&);
  Sequence<C> (*finish)(const Call&, const SequenceSums&);
};

template <typename C>
std::vector<Sequence<C>> all_sequences(const Call& op, const Kernels<C>& kernels, int threads) {
  const int64_t count = op.cu_seqlens ? op.sequences : op.rows;
  std::vector<Sequence<C>> sequences(count);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (op.rows * op.columns > 4 * kBlock)
  for (int64_t s = 0; s < count; ++s) {
    SequenceSums sums;
    const auto [begin, end] = sequence_span(op, s);
    for (int64_t start = begin; start < end; start += kBlock)
      kernels.add(op, start, std::min(kBlock, end - start), sums);
    sequences[s] = kernels.finish(op, sums);
  }
  return sequences;
}

// Tokens [begin, end), in runs of at most kBlock that stay within a sequence.
template <typename C>
Sums part(const Call& op, const Kernels<C>& kernels, const std::vector<Sequence<C>>& sequences, int64_t begin,
          int64_t end) {
  Sums sums;
  Tokens<C> t;
  for (int64_t start = begin, stop; start < end; start = stop) {
    stop = std::min(end, start + kBlock);
    const Sequence<C>* sequence = &sequences[0];
    if (op.numbers.needs_sequences) {
      const int64_t count = int64_t(sequences.size()), *ends = op.cu_seqlens;
      const int64_t s = ends ? std::upper_bound(ends, ends + count + 1, start) - ends - 1 : start / op.columns;
      if (s < count) stop = std::min(stop, sequence_span(op, s).end);
      sequence += std::min(s, count - 1);  // tokens after the last sequence do not count
    }
    kernels.tokens(op, start, stop - start, *sequence, t, sums);
  }
  return sums;
}

template <typename C> void run(const PolicyLoss& given, bool folds_correction, const Kernels<C>& kernels, int threads) {
  const int64_t n = given.rows * given.columns;
  const double denominator = denominator_of<C>(given.denominator, given.flags, n);
  const PolicyNumbers& numbers = given.numbers;
  const Call op{given, denominator, named(kKlVariants, "KL estimate", numbers.kl_variant),
                named(kLevels, "correction level", numbers.correction_level),
                named(kModes, "correction mode", numbers.correction_mode), folds_correction};
  std::vector<Sequence<C>> sequences(1);
  if (op.numbers.needs_sequences && n > 0) sequences = all_sequences(op, kernels, threads);
  Sums parts[kParts], total;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (n > 4 * kBlock)
  for (int p = 0; p < kParts; ++p) parts[p] = part(op, kernels, sequences, n * p / kParts, n * (p + 1) / kParts);
  for (const Sums& sums : parts) {
    total.loss += sums.loss;
    for (int m = 0; m < kSums; ++m) total.of[m] += sums.of[m];
    total.highest = std::max(total.highest, sums.highest);
    total.lowest = std::min(total.lowest, sums.lowest);
  }
  if (!op.sampler_logprobs.data) total.of[kCorrection] = 0;
  if (total.highest < total.lowest) total.highest = total.lowest = 0;  // nothing counts
  if (std::isnan(total.of[kRatio])) total.highest = total.lowest = total.of[kRatio];
  const double* of = total.of;
  const double metrics[] = {(of[kLow] + of[kHigh]) / denominator, of[kLow] / denominator, of[kHigh] / denominator,
                            of[kApproxKl] / denominator, of[kRatio] / denominator, total.highest, total.lowest,
                            of[kKl] / denominator, of[kEntropy] / denominator, of[kCorrection] / denominator,
                            of[kOutside] / denominator, of[kSamplerKl] / denominator, of[kDropped] / denominator};
  *static_cast<C*>(op.loss) = C(total.loss);
  for (int m = 0; m < 13; ++m) static_cast<C*>(op.metrics)[m] = C(metrics[m]);
}

// Name and functor of every loss.
#define RLHF_POLICY_LOSSES(X) \
  X(ppo_clip, PpoClip) \
  X(clip_cov, ClipCov) \
  X(kl_cov, KlCov) \
  X(policy_gradient, PolicyGradient) \
  X(cispo, Cispo) \
  X(sapo, Sapo) \
  X(dppo_tv, DppoTv) \
  X(dppo_kl, DppoKl) \
  X(gspo, Gspo) \
  X(gspo_token, GspoToken) \
  X(gmpo, Gmpo) \
  X(vespo, Vespo) \
  X(dro, Dro)

#define RLHF_POLICY_LOSS(NAME, F)                                                                                     \
  RLHF_CLONES void tokens_##NAME(const Call& op, int64_t start, int64_t n, const Sequence<float>& s,                  \
                                 Tokens<float>& t, Sums& sums) {                                                      \
    tokens<F, float>(op, start, n, s, t, sums);                                                                       \
  }                                                                                                                   \
  void run_##NAME(const PolicyLoss& op, int threads) {                                                                \
    const Kernels<float> in_float{tokens_##NAME, adder(F::Statistic()), finish<F, float>};                            \
    const Kernels<double> in_double{tokens<F, double>, add<F::Statistic, double>, finish<F, double>};                 \
    if (op.is_double) run(op, F::folds_correction, in_double, threads);                                               \
    else run(op, F::folds_correction, in_float, threads);                                                             \
  }
RLHF_POLICY_LOSSES(RLHF_POLICY_LOSS)

#define RLHF_ENTRY(NAME, F) {#NAME, run_##NAME},
const std::map<std::string, void (*)(const PolicyLoss&, int)> kFunctions = {RLHF_POLICY_LOSSES(RLHF_ENTRY)};

}  // namespace

void policy_loss(const PolicyLoss& op, int threads) {
  named(kFunctions, "policy loss", op.numbers.function)(op, threads);
}

}  // namespace rlhf::cpu
