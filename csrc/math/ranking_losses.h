// How much an answer tied with the one drawn still counts; formulas in rlhf_fast/ops/rewards/ranking_loss.py.
#pragma once
#include "math/scalar.h"

namespace rlhf {

// place: of the answer drawn within its tie of `size`, from 0.
struct EfronTies {
  template <typename T> static RLHF_HD T left(T place, T size) { return 1 - place / size; }
};
struct BreslowTies {
  template <typename T> static RLHF_HD T left(T, T) { return 1; }
};

}  // namespace rlhf
