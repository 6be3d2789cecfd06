#include "cpu/ranking_loss.h"

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/mask.h"
#include "math/ranking_losses.h"

namespace rlhf::cpu {
namespace {

constexpr int64_t kParts = 64;  // partial sums, however many threads there are: the same inputs give the same bits
constexpr int kLanes = 8;       // groups taken together, one in each lane of the vectors

struct Sums {
  double loss = 0, accuracy = 0;
};

// The answers of kLanes groups, answer i of lane l at i * kLanes + l. `better` counts the answers of smaller rank, so
// that ties have the same number; behind the end of a group it is -1 and the reward -inf, which adds 0 everywhere.
template <typename C> struct Batch {
  int size = 0;  // of the largest group
  std::vector<int64_t> ranks;
  std::vector<int32_t> better;
  std::vector<C> rewards, terms;
  std::vector<double> gradient;

  void resize(int answers) {
    size = answers;
    const size_t places = size_t(answers) * kLanes;
    ranks.resize(places), terms.resize(places);
    better.assign(places, -1), rewards.assign(places, -infinity<C>()), gradient.assign(places, 0.0);
  }
};

#define RLHF_LANES _Pragma("omp simd") for (int l = 0; l < kLanes; ++l)

// losses[l] = the loss of answer j, drawn from those that are not ranked better; every other one is pulled by its
// probability.
template <typename Ties> struct Draw {
  template <typename C> static RLHF_INLINE void loss(Batch<C>& batch, int j, const C*, C* losses) {
    const int32_t* drawn = batch.better.data() + j * kLanes;
    const C* reward = batch.rewards.data() + j * kLanes;
    C greatest[kLanes], left[kLanes], others[kLanes] = {}, total[kLanes];
    int32_t size[kLanes] = {}, place[kLanes] = {};
    RLHF_LANES greatest[l] = reward[l];
    for (int i = 0; i < batch.size; ++i) {
      const int32_t* better = batch.better.data() + i * kLanes;
      const C* other = batch.rewards.data() + i * kLanes;
      RLHF_LANES {
        greatest[l] = (better[l] >= drawn[l]) & (other[l] > greatest[l]) ? other[l] : greatest[l];
        size[l] += better[l] == drawn[l];
        place[l] += (better[l] == drawn[l]) & (i < j);
      }
    }
    RLHF_LANES left[l] = Ties::left(C(place[l]), C(size[l]));
    for (int i = 0; i < batch.size; ++i) {
      const int32_t* better = batch.better.data() + i * kLanes;
      const C* other = batch.rewards.data() + i * kLanes;
      C* terms = batch.terms.data() + i * kLanes;
      RLHF_LANES {
        const C below = other[l] == greatest[l] ? C(0) : other[l] - greatest[l];
        const C tied = better[l] == drawn[l] ? left[l] : C(0);
        const C weight = better[l] > drawn[l] ? C(1) : tied;
        terms[l] = product(weight, exp_neg(below > 0 ? C(0) : below));
        others[l] += i == j ? C(0) : terms[l];
      }
    }
    const C* own = batch.terms.data() + j * kLanes;
    RLHF_LANES total[l] = drawn[l] < 0 ? infinity<C>() : own[l] + others[l];  // no answer j pulls nobody
    for (int i = 0; i < batch.size; ++i) {
      double* gradient = batch.gradient.data() + i * kLanes;
      const C* terms = batch.terms.data() + i * kLanes;
      RLHF_LANES gradient[l] += (i == j ? -others[l] : terms[l]) / total[l];
    }
    for (int l = 0; l < kLanes; ++l)
      losses[l] = reward[l] == greatest[l] ? std::log1p((left[l] - 1) + others[l])
                                           : (greatest[l] - reward[l]) + std::log(total[l]);
  }
};

struct Pairwise {
  template <typename C> static RLHF_INLINE void loss(Batch<C>& batch, int j, const C* pairs, C* losses) {
    const int32_t* drawn = batch.better.data() + j * kLanes;
    const C* reward = batch.rewards.data() + j * kLanes;
    double* own = batch.gradient.data() + j * kLanes;
    RLHF_LANES losses[l] = 0;
    for (int i = 0; i < batch.size; ++i) {
      const int32_t* better = batch.better.data() + i * kLanes;
      const C* other = batch.rewards.data() + i * kLanes;
      double* gradient = batch.gradient.data() + i * kLanes;
      RLHF_LANES {
        const C gap = other[l] == reward[l] ? C(0) : other[l] - reward[l];
        const bool worse = (better[l] > drawn[l]) & (drawn[l] >= 0);
        const C pull = worse ? sigmoid(gap) / pairs[l] : C(0);
        losses[l] += worse ? softplus(gap) / pairs[l] : C(0);
        gradient[l] += pull;
        own[l] -= pull;
      }
    }
  }
};

// The number of answers of smaller rank in their group, for the answers that are there.
template <typename C> RLHF_INLINE void count_better(Batch<C>& batch, const int* sizes) {
  for (int j = 0; j < batch.size; ++j) {
    int32_t smaller[kLanes] = {};
    const int64_t* rank = batch.ranks.data() + j * kLanes;
    for (int i = 0; i < batch.size; ++i) {
      const int64_t* other = batch.ranks.data() + i * kLanes;
      RLHF_LANES smaller[l] += (other[l] < rank[l]) & (i < sizes[l]);
    }
    RLHF_LANES batch.better[j * kLanes + l] = j < sizes[l] ? smaller[l] : -1;
  }
}

template <typename Variant, typename C> RLHF_INLINE Sums of_batch(Batch<C>& batch, const int* sizes) {
  count_better(batch, sizes);
  C pairs[kLanes] = {}, right[kLanes] = {}, losses[kLanes];
  for (int j = 0; j < batch.size; ++j) {
    const int32_t* drawn = batch.better.data() + j * kLanes;
    const C* reward = batch.rewards.data() + j * kLanes;
    for (int i = 0; i < batch.size; ++i) {
      const int32_t* better = batch.better.data() + i * kLanes;
      const C* other = batch.rewards.data() + i * kLanes;
      RLHF_LANES {
        const bool worse = (better[l] > drawn[l]) & (drawn[l] >= 0);
        pairs[l] += worse ? C(1) : C(0);
        right[l] += worse & (other[l] < reward[l]) ? C(1) : C(0);
      }
    }
  }
  RLHF_LANES pairs[l] = pairs[l] > 0 ? pairs[l] : C(1);
  Sums sums;
  for (int j = 0; j < batch.size; ++j) {
    Variant::loss(batch, j, pairs, losses);
    for (int l = 0; l < kLanes; ++l) sums.loss += j < sizes[l] ? losses[l] : C(0);
  }
  for (int l = 0; l < kLanes; ++l) sums.accuracy += right[l] / pairs[l];
  return sums;
}

#define RLHF_FOR_VARIANT(NAME, VARIANT)                                                                              \
  RLHF_CLONES Sums NAME(Batch<float>& batch, const int* sizes) { return of_batch<VARIANT>(batch, sizes); }            \
  Sums NAME(Batch<double>& batch, const int* sizes) { return of_batch<VARIANT>(batch, sizes); }                       \
  struct NAME##_ {                                                                                                   \
    template <typename C> static Sums of(Batch<C>& batch, const int* sizes) { return NAME(batch, sizes); }            \
  };
RLHF_FOR_VARIANT(plackett_luce, Draw<EfronTies>)
RLHF_FOR_VARIANT(breslow, Draw<BreslowTies>)
RLHF_FOR_VARIANT(pairwise, Pairwise)

// Groups [begin, end) of a call that divides by `denominator`.
template <typename Variant, typename T>
Sums part(const RankingLoss& op, int64_t begin, int64_t end, double denominator) {
  using C = typename Compute<T>::type;
  const auto start = [&](int64_t g) { return op.offsets ? op.offsets[g] : g * op.group_size; };
  const auto position = [&](int64_t i) { return op.order ? op.order[i] : i; };
  const T* rewards = static_cast<const T*>(op.rewards);
  C* gradient = static_cast<C*>(op.gradient);
  Batch<C> batch;
  Sums total;
  for (int64_t g = begin; g < end; g += kLanes) {
    int64_t first[kLanes] = {};
    int sizes[kLanes] = {};
    for (int l = 0; l < kLanes && g + l < end; ++l)
      first[l] = start(g + l), sizes[l] = int(start(g + l + 1) - first[l]);
    batch.resize(*std::max_element(sizes, sizes + kLanes));
    for (int l = 0; l < kLanes; ++l)
      for (int i = 0; i < sizes[l]; ++i) {
        batch.rewards[i * kLanes + l] = load(rewards[position(first[l] + i)]);
        batch.ranks[i * kLanes + l] = op.ranks[position(first[l] + i)];
      }
    const Sums sums = Variant::of(batch, sizes);
    total.loss += sums.loss, total.accuracy += sums.accuracy;
    for (int l = 0; l < kLanes; ++l)
      for (int i = 0; i < sizes[l]; ++i)
        gradient[position(first[l] + i)] = C(batch.gradient[i * kLanes + l] / denominator);
  }
  return total;
}

template <typename Variant, typename T> void run(const RankingLoss& op, int threads) {
  using C = typename Compute<T>::type;
  const double denominator = denominator_of<C>(op.denominator, nullptr, op.groups);
  const int64_t batches = (op.groups + kLanes - 1) / kLanes;
  const auto bound = [&](int64_t i) { return std::min(batches * i / kParts * kLanes, op.groups); };
  Sums parts[kParts], total;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (batches > kParts)  // empty groups are last
  for (int64_t i = 0; i < kParts; ++i)
    parts[i] = part<Variant, T>(op, bound(i), bound(i + 1), denominator);
  for (const Sums& sums : parts) total.loss += sums.loss, total.accuracy += sums.accuracy;
  *static_cast<C*>(op.loss) = C(total.loss / denominator);
  *static_cast<C*>(op.accuracy) = C(total.accuracy / denominator);
}

template <typename Variant> void run_any(const RankingLoss& op, int threads) {
  dispatch(op.dtype, [&](auto type) { run<Variant, decltype(type)>(op, threads); });
}

const std::map<std::string, void (*)(const RankingLoss&, int)> kVariants = {
    {"plackett_luce", run_any<plackett_luce_>}, {"breslow", run_any<breslow_>}, {"pairwise", run_any<pairwise_>}};

}  // namespace

void ranking_loss(const std::string& variant, const RankingLoss& op, int threads) {
  named(kVariants, "ranking loss", variant)(op, threads);
}

}  // namespace rlhf::cpu
