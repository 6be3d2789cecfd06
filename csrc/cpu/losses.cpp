#include "cpu/losses.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/mask.h"
#include "math/preference_losses.h"
#include "math/unpaired_preference_losses.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 256;
constexpr int64_t kParts = 64;  // partial sums at most, however many threads there are: the same inputs, the same bits

struct Sums {
  double loss = 0, metrics[4] = {};
};

// Some elements in a row; an input is 0 where it does not count.
template <typename C> struct Elements {
  C x[kInputs][kBlock], counts[kBlock];
};

template <typename C> RLHF_INLINE void read_all(const Loss& op, int inputs, int64_t start, int64_t n, Elements<C>& e) {
  for (int64_t i = 0; i < n; ++i) e.counts[i] = !op.mask || op.mask[start + i] ? C(1) : C(0);
  for (int k = 0; k < inputs; ++k) {
    read(op.inputs[k], op.columns, start, n, e.x[k]);
    if (!op.mask) continue;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) e.x[k][i] = e.counts[i] != 0 ? e.x[k][i] : C(0);
  }
}

// In place: logprob, ref_logprob and length of one half of each pair to logprob, reward and slope.
template <typename Score, typename C>
RLHF_INLINE void half_of_pairs(int64_t n, C beta, C alpha, C* __restrict x, C* __restrict y, C* __restrict z) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Half<C> h = half<Score>(x[i], y[i], z[i], beta, alpha);
    x[i] = h.logprob, y[i] = h.reward, z[i] = h.slope;
  }
}
template <typename Score, typename C> RLHF_INLINE void pairs(int64_t n, const C* p, Elements<C>& e) {
  half_of_pairs<Score>(n, p[0], p[4], e.x[0], e.x[2], e.x[4]);
  half_of_pairs<Score>(n, p[0], p[4], e.x[1], e.x[3], e.x[5]);
}
// p[3] is the divergence: 0 reverse KL, 1 alpha, 2 Jensen-Shannon.
template <typename C> RLHF_INLINE void prepare(int64_t n, const C* p, Elements<C>& e) {
  if (p[3] == 0) pairs<ReverseKlScore>(n, p, e);
  else if (p[3] == 1) pairs<AlphaScore>(n, p, e);
  else pairs<JensenShannonScore>(n, p, e);
}

// Reading is the same for all variants: cloned per instruction set once, not in each.
RLHF_CLONES void fill(const Loss& op, int inputs, const float* p, int64_t start, int64_t n, Elements<float>& e) {
  read_all(op, inputs, start, n, e);
  if (inputs == kInputs) prepare(n, p, e);
}
void fill(const Loss& op, int inputs, const double* p, int64_t start, int64_t n, Elements<double>& e) {
  read_all(op, inputs, start, n, e);
  if (inputs == kInputs) prepare(n, p, e);
}

// Apart from its loop: an object whose address is taken within a simd loop stops the vectoriser.
template <typename F, typename C> RLHF_INLINE Terms<C> terms_of(const Elements<C>& e, int64_t i, const C* p) {
  C x[F::inputs];
  for (int k = 0; k < F::inputs; ++k) x[k] = e.x[k][i];
  return F::at(x, p);
}

template <typename F, typename C>
RLHF_INLINE void add(const Elements<C>& e, int64_t n, const C* p, C scale, C* first, C* second, Sums& sums) {
  C loss = 0, m0 = 0, m1 = 0, m2 = 0, m3 = 0;
#pragma omp simd reduction(+ : loss, m0, m1, m2, m3)
  for (int64_t i = 0; i < n; ++i) {
    const Terms<C> terms = terms_of<F>(e, i, p);
    const bool counts = e.counts[i] != 0;
    loss += counts ? terms.loss : C(0);
    m0 += counts ? terms.metrics[0] : C(0);
    m1 += counts ? terms.metrics[1] : C(0);
    m2 += counts ? terms.metrics[2] : C(0);
    m3 += counts ? terms.metrics[3] : C(0);
    first[i] = counts ? scale * terms.coefficients[0] : C(0);
    if constexpr (F::coefficients == 2) second[i] = counts ? scale * terms.coefficients[1] : C(0);
  }
  sums.loss += loss;
  sums.metrics[0] += m0, sums.metrics[1] += m1, sums.metrics[2] += m2, sums.metrics[3] += m3;
}

template <typename C> using Add = void (*)(const Elements<C>&, int64_t, const C*, C, C*, C*, Sums&);

// Elements [begin, end).
template <typename C> Sums part(const Loss& op, int inputs, Add<C> add, C scale, int64_t begin, int64_t end) {
  C p[kParameters] = {};
  std::copy(op.parameters.begin(), op.parameters.end(), p);
  C unwanted[kBlock];
  const auto coefficient = [&](size_t k, int64_t start) {
    return k < op.coefficients.size() ? static_cast<C*>(op.coefficients[k]) + start : unwanted;
  };
  Elements<C> e;
  Sums sums;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t n = std::min(kBlock, end - start);
    fill(op, inputs, p, start, n, e);
    add(e, n, p, scale, coefficient(0, start), coefficient(1, start), sums);
  }
  return sums;
}

template <typename F, typename C> void run(const Loss& op, Add<C> add, int threads) {
  constexpr int inputs = F::inputs;
  const int64_t n = op.rows * op.columns;
  const double denominator = denominator_of<C>(op.denominator, op.mask, n);
  const C scale = C(1 / denominator);
  const int64_t count = std::min(kParts, (n + kBlock - 1) / kBlock);
  Sums parts[kParts], total;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 16 * kBlock)
  for (int64_t p = 0; p < count; ++p) parts[p] = part(op, inputs, add, scale, n * p / count, n * (p + 1) / count);
  for (int64_t p = 0; p < count; ++p) {
    total.loss += parts[p].loss;
    for (int m = 0; m < 4; ++m) total.metrics[m] += parts[p].metrics[m];
  }
  *static_cast<C*>(op.loss) = C(total.loss / denominator);
  for (double& metric : total.metrics) metric /= denominator;
  if constexpr (requires { F::finish(total.metrics); }) F::finish(total.metrics);
  std::copy_n(total.metrics, op.metric_count, static_cast<C*>(op.metrics));
}

// Name and functor of every variant.
#define RLHF_LOSSES(X) \
  X(value, Value) \
  X(value_clip, ValueClip) \
  X(step_bce, StepBce) \
  X(step_mse, StepMse) \
  X(kto, Unpaired<KtoLoss>) \
  X(bco, Unpaired<BcoLoss>) \
  X(sigmoid, Pair<SigmoidLoss>) \
  X(robust, Pair<RobustLoss>) \
  X(hinge, Pair<HingeLoss>) \
  X(ipo, Pair<IpoLoss>) \
  X(exo_pair, Pair<ExoPairLoss>) \
  X(nca_pair, Pair<NcaPairLoss>) \
  X(bco_pair, Pair<BcoPairLoss>) \
  X(sppo_hard, Pair<SppoHardLoss>) \
  X(aot, Pair<AotLoss>) \
  X(aot_unpaired, Pair<AotUnpairedLoss>) \
  X(apo_zero, Pair<ApoZeroLoss>) \
  X(apo_down, Pair<ApoDownLoss>) \
  X(discopop, Pair<DiscopopLoss>) \
  X(sft, Pair<SftLoss>) \
  X(cpo, Pair<CpoLoss>) \
  X(orpo, Pair<OrpoLoss>) \
  X(hpo, Pair<HpoLoss>) \
  X(bradley_terry, Pair<BradleyTerryLoss>)

#define RLHF_LOSS(NAME, F)                                                                                           \
  RLHF_CLONES void add_##NAME(const Elements<float>& e, int64_t n, const float* p, float scale, float* first,        \
                              float* second, Sums& sums) {                                                           \
    add<F>(e, n, p, scale, first, second, sums);                                                                     \
  }                                                                                                                  \
  void run_##NAME(const Loss& op, int threads) {                                                                     \
    const bool wanted = op.coefficients.size() > 0;                                                                  \
    if (op.inputs.size() != size_t(F::inputs) || (wanted && op.coefficients.size() != size_t(F::coefficients)) ||    \
        op.parameters.size() > kParameters || op.metric_count > 4)                                                                          \
      throw std::invalid_argument("wrong number of inputs, outputs or parameters");                                  \
    if (op.is_double) run<F, double>(op, add<F, double>, threads);                                           \
    else run<F, float>(op, add_##NAME, threads);                                                                     \
  }
RLHF_LOSSES(RLHF_LOSS)

#define RLHF_ENTRY(NAME, F) {#NAME, run_##NAME},
const std::map<std::string, void (*)(const Loss&, int)> kVariants = {RLHF_LOSSES(RLHF_ENTRY)};

}  // namespace

void masked_loss(const std::string& variant, const Loss& op, int threads) {
  named(kVariants, "loss variant", variant)(op, threads);
}

}  // namespace rlhf::cpu
