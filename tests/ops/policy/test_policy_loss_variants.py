"""Every policy loss by hand, from the equation of its paper."""

import math
from math import exp, log

import pytest
import torch

from rlhf_fast import PolicyObjective, policy_loss
from rlhf_fast.ops.policy.policy_loss import VARIANTS
from tests.losses import EVERYWHERE, evaluate

# variant -> [(ratios, old probabilities, advantages, options, loss, d loss / d logprob)], one sequence per row
S = 1 / (1 + exp(-1.05))  # sigmoid of SAPO's tau (r - 1) at r = 2
COV = [exp(-1), exp(-2), exp(-3), exp(-2)]  # log-probabilities -1, -2, -3, -2: mean -2
CASES = {
    # PPO 1707.06347 eq. 7: min(r A, clip(r) A)
    "ppo_clip": [([[1.1, 1.5]], 0.25, [[1, 1]], {}, -(1.1 + 1.2) / 2, [[-0.55, 0]]),
                 ([[0.5, 0.9]], 0.25, [[-1, -1]], {}, (0.8 + 0.9) / 2, [[0, 0.45]]),
                 # 1912.09729 eq. 5: max(min(r A, clip(r) A), c A) for A < 0
                 ([[5.0]], 0.1, [[-2]], {"dual_clip": 3.0}, 6.0, [[0]]),
                 # INTELLECT-2 2505.07291: min(min(r, delta) A, clip(r) A), delta = 4
                 ([[5.0, 3.0]], 0.1, [[-1, -1]], {"dual_clip": 4.0}, (4 + 3) / 2, [[0, 1.5]])],
    # DeepSeekMath 2402.03300 eq. 3: the mean over sequences of the mean over their tokens
    "grpo": [([[1.1, 0.9], [1.5, 0]], 0.25, [[1, 1], [-1, 0]], {}, (-1.0 + 1.5) / 2, [[-0.275, -0.225], [0.75, 0]])],
    # Dr. GRPO 2503.20783: sums over tokens by a fixed length
    "dr_grpo": [([[1.1, 0.9], [1.5, 0]], 0.25, [[1, 1], [-1, 0]], {"fixed_length": 4}, -0.5 / 8,
                 [[-1.1 / 8, -0.9 / 8], [1.5 / 8, 0]])],
    # DAPO 2503.14476 eq. 8: upper bound 1.28, all tokens alike
    "dapo": [([[1.25, 1.35]], 0.25, [[1, 1]], {}, -(1.25 + 1.28) / 2, [[-0.625, 0]])],
    # GSPO 2507.18071 eq. 5 and 7: s = (1.21 * 1)^(1/2), d s / d logprob = s / 2
    "gspo": [([[1.21, 1.0]], 0.25, [[2, 2]], {"clip_eps_high": 0.2}, -2.2, [[-1.1, -1.1]]),
             ([[1.21, 1.0]], 0.25, [[2, 2]], {"clip_eps_high": 0.05}, -2.1, [[0, 0]])],
    # GSPO eq. 13 and 14: s_t = sg(s) pi / sg(pi), advantages of their own
    "gspo_token": [([[1.21, 1.0]], 0.25, [[1, 3]], {"clip_eps_high": 0.2}, -(1.1 + 3.3) / 2, [[-0.55, -1.65]])],
    # LUSPO 2602.05261: GSPO times the length
    "luspo": [([[1.21, 1.0]], 0.25, [[2, 2]], {"clip_eps_high": 0.2}, -4.4, [[-2.2, -2.2]])],
    # GMPO 2507.20673 eq. 4: log-ratios 0.6 and -0.2 held within +-0.4, their mean 0.1
    "gmpo": [([[exp(0.6), exp(-0.2)]], 0.25, [[1, 1]], {}, -exp(0.1), [[0, -exp(0.1) / 2]]),
             ([[exp(0.6), exp(-0.2)]], 0.25, [[-1, -1]], {}, exp(0.2), [[exp(0.2) / 2, exp(0.2) / 2]])],
    # CISPO 2506.13585 eq. 4 and 5: sg(min(r, 5)) A log pi
    "cispo": [([[2.0, 8.0]], 0.1, [[1, 1]], {}, -(2 * log(0.2) + 5 * log(0.8)) / 2, [[-1, -2.5]])],
    # SAPO 2511.20347: 4 / tau sigmoid(tau (r - 1)), tau 1 and 1.05
    "sapo": [([[1.0, 2.0]], 0.25, [[1, -1]], {}, (-2 + 4 / 1.05 * S) / 2, [[-0.5, 4 * S * (1 - S)]])],
    # VESPO 2602.10693: w^k exp(lambda (1 - w)), k, lambda = 2, 3 and 3, 2, w = 2 * 1
    "vespo": [([[2.0, 1.0]], 0.25, [[1, 1]], {}, -4 * exp(-3) * (log(0.5) + log(0.25)) / 2, [[-2 * exp(-3)] * 2]),
              ([[2.0, 1.0]], 0.25, [[-1, -1]], {}, 8 * exp(-2) * (log(0.5) + log(0.25)) / 2, [[4 * exp(-2)] * 2])],
    # DPPO 2602.04879: |0.375 - 0.25| <= 0.15 < |0.45 - 0.25|, and the ratio may come back
    "dppo_tv": [([[1.5, 1.8]], 0.25, [[1, 1]], {}, -0.75, [[-0.75, 0]]),
                ([[1.8, 0.2]], 0.25, [[-1, -1]], {}, 0.9, [[0.9, 0]])],
    # KL of (0.5, 0.5) from (0.6, 0.4): 0.0204; from (0.8, 0.2): 0.2231
    "dppo_kl": [([[1.2, 1.6]], 0.5, [[1, 1]], {}, -0.6, [[-0.6, 0]]),
                ([[1.2, 1.6]], 0.5, [[1, 1]], {"max_divergence": 0.0205}, -0.6, [[-0.6, 0]]),
                ([[1.2, 1.6]], 0.5, [[1, 1]], {"max_divergence": 0.0203}, 0, [[0, 0]]),
                ([[1.2, 1.6]], 0.5, [[1, 1]], {"max_divergence": 0.224}, -1.4, [[-0.6, -0.8]])],
    # Clip-Cov 2505.22617: covariances 3, 0, 1, 0; a quarter of the tokens is one
    "clip_cov": [([[1.0] * 4], COV, [[3, 0, -1, -2]], {"cov_fraction": 0.25}, 3 / 4, [[0, 0, 0.25, 0.5]]),
                 ([[1.0] * 4], COV, [[3, 0, -1, -2]], {"cov_fraction": 0.25, "cov_low": 0.5, "cov_high": 2.0}, -1 / 4,
                  [[-0.75, 0, 0, 0.5]])],
    # KL-Cov 2505.22617: -r A + coef |log r| for the first
    "kl_cov": [([[exp(0.1), 1, 1, 1]], [exp(-1.1), *COV[1:]], [[3, 0, -1, -2]],
                {"cov_fraction": 0.25, "kl_cov_coef": 2.0}, (-3 * exp(0.1) + 0.2 + 3) / 4,
                [[(2 - 3 * exp(0.1)) / 4, 0, 0.25, 0.5]])],
    # DRO 2405.19107: (A - beta X)^2 / (2 beta) - A^2 / (2 beta), X = 0.6
    "dro": [([[exp(0.2), exp(0.4)]], 0.25, [[1, 1]], {"dro_beta": 0.5}, -0.6 + 0.25 * 0.36, [[-0.7, -0.7]])],
    # GPG 2504.02546, A2C 1602.01783: -A log pi by tokens; REINFORCE: summed over the sequence
    "gpg": [([[2.0, 1.0]], 0.25, [[1, -3]], {}, -(log(0.5) - 3 * log(0.25)) / 2, [[-0.5, 1.5]])],
    "a2c": [([[2.0, 1.0]], 0.25, [[1, -3]], {}, -(log(0.5) - 3 * log(0.25)) / 2, [[-0.5, 1.5]])],
    "reinforce": [([[2.0, 1.0]], 0.25, [[1, -3]], {}, -(log(0.5) - 3 * log(0.25)), [[-1, 3]])],
}  # fmt: skip


def test_every_variant_with_a_kernel_has_its_constants():
    assert {name for name in VARIANTS if PolicyObjective(name, fixed_length=1).kernels} - CASES.keys() == set()


@pytest.mark.parametrize(("variant", "backend"), [(name, backend) for name, backend in EVERYWHERE if name in CASES])
def test_a_variant_is_the_equation_of_its_paper(variant, backend):
    for ratios, old, advantages, options, loss, gradient in CASES[variant]:
        ratios = torch.tensor(ratios, dtype=torch.float64)
        mask = ratios > 0  # a ratio of 0 stands for padding
        old = torch.as_tensor(old, dtype=torch.float64).log().expand_as(ratios)
        logprobs = torch.where(mask, ratios.log() + old, math.nan)
        inputs = [logprobs, old, torch.tensor(advantages, dtype=torch.float64)]
        objective = PolicyObjective(variant, **options)
        got = evaluate(lambda *x: policy_loss(*x, objective=objective, mask=mask, backend=backend), inputs, 1)  # noqa: B023
        assert got["loss"].item() == pytest.approx(loss, rel=1e-12, abs=1e-15)
        expected = torch.tensor(gradient, dtype=torch.float64)
        torch.testing.assert_close(got["gradient 0"], expected, rtol=1e-12, atol=1e-15)
