#include "cpu/losses.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "math/preference_losses.h"
#include "math/unpaired_preference_losses.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kBlock = 256;
constexpr int kParts = 64;  // partial sums, however many threads there are: the same inputs give the same bits

struct Sums {
  double loss = 0, metrics[4] = {}, count = 0;
};

// Elements [begin, end). No clones per instruction set: the time is in exp and log1p.
template <typename F, typename C> Sums part(const Loss& op, int64_t begin, int64_t end) {
  C inputs[F::inputs][kBlock];
  C parameters[kParameters] = {};
  std::copy(op.parameters.begin(), op.parameters.end(), parameters);
  Sums sums;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t n = std::min(kBlock, end - start);
    for (int k = 0; k < F::inputs; ++k) read(op.inputs[k], op.columns, start, n, inputs[k]);
    for (int64_t i = 0; i < n; ++i) {
      Terms<C> terms;
      if (!op.mask || op.mask[start + i]) {
        C x[F::inputs];
        for (int k = 0; k < F::inputs; ++k) x[k] = inputs[k][i];
        terms = F::at(x, parameters);
        sums.count += 1;
      }
      for (int k = 0; k < F::coefficients; ++k)
        static_cast<C*>(op.coefficients[k])[start + i] = terms.coefficients[k];
      sums.loss += terms.loss;
      for (int m = 0; m < 4; ++m) sums.metrics[m] += terms.metrics[m];
    }
  }
  return sums;
}

template <typename F, typename C> void run(const Loss& op, int threads) {
  const int64_t n = op.rows * op.columns;
  Sums parts[kParts], total;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 4 * kBlock)
  for (int p = 0; p < kParts; ++p) parts[p] = part<F, C>(op, n * p / kParts, n * (p + 1) / kParts);
  for (const Sums& sums : parts) {
    total.loss += sums.loss;
    total.count += sums.count;
    for (int m = 0; m < 4; ++m) total.metrics[m] += sums.metrics[m];
  }
  double denominator = op.denominator ? double(*static_cast<const C*>(op.denominator)) : total.count;
  if (denominator == 0) denominator = 1;  // nothing counts: every sum is 0
  *static_cast<C*>(op.loss) = C(total.loss / denominator);
  C* means = static_cast<C*>(op.means);
  for (int m = 0; m < 4; ++m) means[m] = C(total.metrics[m] / denominator);
  means[4] = C(denominator);
}

template <typename F> void run_any(const Loss& op, int threads) {
  if (op.inputs.size() < size_t(F::inputs) || op.coefficients.size() < size_t(F::coefficients) ||
      op.parameters.size() > kParameters)
    throw std::invalid_argument("wrong number of inputs, outputs or parameters");
  op.is_double ? run<F, double>(op, threads) : run<F, float>(op, threads);
}

const std::map<std::string, void (*)(const Loss&, int)> kVariants = {
    {"value", run_any<Value>},
    {"value_clip", run_any<ValueClip>},
    {"step_bce", run_any<StepBce>},
    {"step_mse", run_any<StepMse>},
    {"kto", run_any<Unpaired<KtoLoss>>},
    {"bco", run_any<Unpaired<BcoLoss>>},
    {"sigmoid", run_any<Pair<SigmoidLoss>>},
    {"robust", run_any<Pair<RobustLoss>>},
    {"hinge", run_any<Pair<HingeLoss>>},
    {"ipo", run_any<Pair<IpoLoss>>},
    {"exo_pair", run_any<Pair<ExoPairLoss>>},
    {"nca_pair", run_any<Pair<NcaPairLoss>>},
    {"bco_pair", run_any<Pair<BcoPairLoss>>},
    {"sppo_hard", run_any<Pair<SppoHardLoss>>},
    {"aot", run_any<Pair<AotLoss>>},
    {"apo_zero", run_any<Pair<ApoZeroLoss>>},
    {"apo_down", run_any<Pair<ApoDownLoss>>},
    {"discopop", run_any<Pair<DiscopopLoss>>},
    {"sft", run_any<Pair<SftLoss>>},
    {"cpo", run_any<Pair<CpoLoss>>},
    {"orpo", run_any<Pair<OrpoLoss>>},
    {"hpo", run_any<Pair<HpoLoss>>},
    {"bradley_terry", run_any<Pair<BradleyTerryLoss>>},
};

}  // namespace

void masked_loss(const std::string& variant, const Loss& op, int threads) {
  const auto found = kVariants.find(variant);
  if (found == kVariants.end()) throw std::invalid_argument("no native loss variant " + variant);
  found->second(op, threads);
}

}  // namespace rlhf::cpu
