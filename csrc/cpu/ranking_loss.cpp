#include "cpu/ranking_loss.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <vector>

#include "cpu/simd.h"
#include "math/ranking_losses.h"

namespace rlhf::cpu {
namespace {

template <typename C> struct Answer {
  C reward;
  int64_t rank;
  double gradient;
};
template <typename C> using Answers = std::vector<Answer<C>>;

template <typename C> void pull(Answer<C>& from, Answer<C>& to, C by) {
  from.gradient += by;
  to.gradient -= by;
}

// The loss of answer j, drawn from those that are not ranked better; every other one is pulled by its probability.
template <typename Ties> struct Draw {
  template <typename C> static double loss(Answers<C>& answers, size_t j, C) {
    const Answer<C> drawn = answers[j];
    C greatest = drawn.reward, size = 0, place = 0;
    for (size_t i = 0; i < answers.size(); ++i) {
      if (answers[i].rank < drawn.rank) continue;
      greatest = std::max(greatest, answers[i].reward);
      size += answers[i].rank == drawn.rank;
      place += answers[i].rank == drawn.rank && i < j;
    }
    const C left = Ties::left(place, size);
    const auto term = [&](const Answer<C>& a) {
      return (a.rank > drawn.rank ? C(1) : a.rank == drawn.rank ? left : C(0)) * std::exp(std::min(a.reward - greatest, C(0)));
    };
    C others = 0;
    for (size_t i = 0; i < answers.size(); ++i)
      if (i != j) others += term(answers[i]);
    const C total = term(drawn) + others;
    for (size_t i = 0; i < answers.size(); ++i)
      if (i != j) pull(answers[i], answers[j], term(answers[i]) / total);
    if (drawn.reward == greatest) return std::log1p((left - 1) + others);
    return (greatest - drawn.reward) + std::log(total);
  }
};

struct Pairwise {
  template <typename C> static double loss(Answers<C>& answers, size_t j, C pairs) {
    double sum = 0;
    for (auto& worse : answers) {
      if (worse.rank <= answers[j].rank) continue;
      const C gap = worse.reward - answers[j].reward;
      sum += softplus(gap) / pairs;
      pull(worse, answers[j], sigmoid(gap) / pairs);
    }
    return sum;
  }
};

template <typename Variant, typename T> void group(const RankingLoss& op, int64_t g) {
  using C = typename Compute<T>::type;
  const int64_t begin = op.offsets ? op.offsets[g] : g * op.group_size;
  const int64_t end = op.offsets ? op.offsets[g + 1] : begin + op.group_size;
  const auto position = [&](int64_t i) { return op.order ? op.order[i] : i; };
  Answers<C> answers;
  for (int64_t i = begin; i < end; ++i)
    answers.push_back({C(load(static_cast<const T*>(op.rewards)[position(i)])), op.ranks[position(i)], 0.0});
  C pairs = 0, right = 0;
  for (const auto& a : answers)
    for (const auto& b : answers) {
      pairs += a.rank < b.rank;
      right += a.rank < b.rank && a.reward > b.reward;
    }
  pairs = std::max(pairs, C(1));
  double loss = 0;
  for (size_t j = 0; j < answers.size(); ++j) loss += Variant::loss(answers, j, pairs);
  static_cast<C*>(op.losses)[g] = C(loss);
  static_cast<C*>(op.accuracies)[g] = right / pairs;
  for (int64_t i = begin; i < end; ++i) static_cast<C*>(op.gradient)[position(i)] = C(answers[i - begin].gradient);
}

template <typename Variant> void run(const RankingLoss& op, int threads) {
  // In the order of DType.
  constexpr decltype(&group<Variant, float>) kGroup[] = {group<Variant, float>, group<Variant, double>,
                                                         group<Variant, bf16>, group<Variant, f16>};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < op.groups; ++g) kGroup[int(op.dtype)](op, g);
}

const std::map<std::string, void (*)(const RankingLoss&, int)> kVariants = {
    {"plackett_luce", run<Draw<EfronTies>>}, {"breslow", run<Draw<BreslowTies>>}, {"pairwise", run<Pairwise>}};

}  // namespace

void ranking_loss(const std::string& variant, const RankingLoss& op, int threads) {
  const auto found = kVariants.find(variant);
  if (found == kVariants.end()) throw std::invalid_argument("no native ranking loss " + variant);
  found->second(op, threads);
}

}  // namespace rlhf::cpu
