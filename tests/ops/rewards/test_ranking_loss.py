import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import ranking_loss, reward_loss
from rlhf_fast.ops.rewards.ranking_loss import VARIANTS, reference
from tests.losses import BACKENDS, DTYPES, KERNELS, assert_keeps_contract, assert_same, compiled, draw, evaluate


def run(rewards, ranks, **options):
    options = options if "group_ids" in options else {"group_size": len(ranks), **options}
    return evaluate(lambda r: ranking_loss(r, torch.as_tensor(ranks), **options), [rewards], 1)


def ragged(answers):
    """Ids of prompts with 1, 2, 3, ... answers, mixed up, and ranks with ties."""
    ids = torch.repeat_interleave(torch.arange(answers), torch.arange(answers) + 1)[:answers]
    order = torch.randperm(answers, generator=torch.Generator().manual_seed(1))
    return ids[order] - 3, (torch.arange(answers) * 7) % 5


LOGS = torch.tensor([math.log(x) for x in (4.0, 3.0, 2.0, 1.0)], dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("variant", "ranks", "probability"),
    [
        # Plackett 1975: 4/10 * 3/6 * 2/3, best first
        ("plackett_luce", [1, 2, 3, 4], 4 / 10 * 3 / 6 * 2 / 3),
        ("breslow", [1, 2, 3, 4], 4 / 10 * 3 / 6 * 2 / 3),
        ("plackett_luce", [4, 3, 2, 1], 1 / 10 * 2 / 9 * 3 / 7),
        # Efron 1977: of the tied 3 and 2, whose mean is taken out for the second: 3 * 2 / (6 * (6 - 5 / 2))
        ("plackett_luce", [1, 2, 2, 3], 4 / 10 * (3 / 6) * (2 / 3.5)),
        # Breslow 1974: 3 * 2 / 6^2
        ("breslow", [1, 2, 2, 3], 4 / 10 * (3 / 6) * (2 / 6)),
        # InstructGPT, 2203.02155 eq. 1: the mean over the pairs of -log(r_w / (r_w + r_l)), here as a product's root
        ("pairwise", [1, 2, 3, 4], (4 / 7 * 4 / 6 * 4 / 5 * 3 / 5 * 3 / 4 * 2 / 3) ** (1 / 6)),
        ("pairwise", [1, 2, 2, 3], (4 / 7 * 4 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** (1 / 5)),
    ],
)
def test_the_loss_is_the_likelihood_of_the_ranking(backend, variant, ranks, probability):
    got = run(LOGS, ranks, variant=variant, backend=backend)
    assert got["loss"].item() == pytest.approx(-math.log(probability), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_is_the_share_of_pairs_in_order(backend):
    # (1, 2), (1, 3) and (2, 3) of ranks 1, 2, 3 with rewards 4, 1, 2; the other prompt is a tie throughout.
    rewards, ranks = torch.tensor([4.0, 1.0, 2.0, 5.0, 5.0, 5.0]), [1, 2, 3, 7, 7, 7]
    got = run(rewards, ranks, group_size=3, backend=backend)
    assert got["accuracy"].item() == pytest.approx(2 / 3 / 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_two_answers_are_bradley_terry(backend, variant):
    chosen, rejected = draw((7,), 2)
    expected = evaluate(lambda c, r: reward_loss(c, r, backend=backend), [chosen, rejected], 2)
    got = run(torch.stack([chosen, rejected], 1).flatten(), [1, 2] * 7, group_size=2, variant=variant, backend=backend)
    torch.testing.assert_close(got["loss"], expected["loss"])
    gradient = torch.stack([expected["gradient 0"], expected["gradient 1"]], 1).flatten()
    torch.testing.assert_close(got["gradient 0"], gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_ranking_told_with_confidence_keeps_its_value_and_gradient(backend, variant):
    got = run(torch.tensor([40.0, 0.0]), [1, 2], variant=variant, backend=backend)
    assert got["loss"].item() == pytest.approx(math.exp(-40), rel=2e-6)
    if backend != "reference":
        assert got["gradient 0"].tolist() == pytest.approx([-math.exp(-40), math.exp(-40)], rel=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_great_rewards_do_not_overflow(backend, variant):
    got = run(torch.tensor([-1e4, 0.0, 1e4]), [1, 2, 3], variant=variant, backend=backend)
    assert got["loss"].item() == pytest.approx(4e4 / 3 if variant == "pairwise" else 3e4)
    assert got["gradient 0"].isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, variant):
    for answers in (1, 17, 70):  # 70: more than one tile in the last prompts
        ids, ranks = ragged(answers)
        if answers == 70:
            ids = ids.clamp(max=2)

        def eager(r, ids=ids, ranks=ranks):
            loss, accuracy = reference(r, ranks, ids, variant=variant)
            return loss / len(ids.unique()), {"accuracy": accuracy.detach() / len(ids.unique())}

        def loss(r, ids=ids, ranks=ranks):
            return ranking_loss(r, ranks, group_ids=ids, variant=variant, backend=backend)

        assert_keeps_contract(loss, eager, draw((answers,), 1, dtype), 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_no_answer_gives_a_connected_zero(backend, variant):
    for groups in ({"group_size": 4}, {"group_ids": torch.empty(0, dtype=torch.int64)}):
        got = run(torch.empty(0), torch.empty(0, dtype=torch.int64), **groups, variant=variant, backend=backend)
        assert [got["loss"].item(), got["accuracy"].item()] == [0.0, 0.0]
        assert got["gradient 0"].shape == (0,)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.sampled_from(sorted(VARIANTS)), st.floats(-50, 50), st.integers(0, 2**16))
def test_a_common_shift_and_the_order_of_the_answers_change_nothing(answers, variant, shift, seed):
    (rewards,), (ids, ranks) = draw((answers,), 1, torch.float64, seed), ragged(answers)
    order = torch.randperm(answers, generator=torch.Generator().manual_seed(seed))
    expected = run(rewards, ranks, group_ids=ids, variant=variant)
    got = run(rewards[order] + shift, ranks[order] * 3 - 8, group_ids=ids[order], variant=variant)
    torch.testing.assert_close(got["loss"], expected["loss"])
    torch.testing.assert_close(got["gradient 0"], expected["gradient 0"][order])
    assert abs(got["gradient 0"].sum().item()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_batch_add_up_with_its_denominator(backend):
    (rewards,), ranks = draw((12,), 1), torch.arange(12) % 4
    whole = run(rewards, ranks, group_size=4, backend=backend)
    parts = [run(rewards[s], ranks[s], group_size=4, denominator=3, backend=backend) for s in (slice(4), slice(4, 12))]
    torch.testing.assert_close(parts[0]["loss"] + parts[1]["loss"], whole["loss"])
    torch.testing.assert_close(torch.cat([p["gradient 0"] for p in parts]), whole["gradient 0"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rewards_give_the_bits_of_contiguous_ones(backend):
    rewards = torch.stack(draw((8,), 2), 1)[:, 0]
    assert_same(run(rewards, list(range(8)), backend=backend), run(rewards.clone(), list(range(8)), backend=backend))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_reference_is_differentiable_twice(variant):
    rewards = draw((6,), 1, torch.float64)[0].requires_grad_()
    ranks, ids = torch.tensor([0, 1, 1, 2, 0, 0]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda r: reference(r, ranks, ids, variant=variant)[0], (rewards,))
    assert torch.autograd.gradgradcheck(lambda r: reference(r, ranks, ids, variant=variant)[0], (rewards,))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_prompts_of_any_number_of_answers_do_not_pull_each_other(variant):
    ids, ranks = ragged(2000)
    rewards = draw((2000,), 1)[0]
    alone = torch.empty(2000)
    for name in ids.unique():
        mine = ids == name
        alone[mine] = run(rewards[mine], ranks[mine], variant=variant, backend="cpu")["gradient 0"] / len(ids.unique())
    found = run(rewards, ranks, group_ids=ids, variant=variant, backend="cpu")["gradient 0"]
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-8)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    rewards, ranks, found = draw((9600,), 1)[0], torch.arange(9600) * 7 % 5, []
    for threads in (1, 3):
        monkeypatch.setattr("rlhf_fast.ops.rewards.ranking_loss.threads", lambda n=threads: n)
        found.append(run(rewards, ranks, group_size=8, backend="cpu"))
    assert_same(*found)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck(backend):
    args = (draw((6,), 1)[0].requires_grad_(), torch.arange(6), None, None, 3, "plackett_luce", None, backend)
    torch.library.opcheck(torch.ops.rlhf_fast.ranking_loss.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiled_graph_is_whole_and_gives_the_same_bits(backend):
    ids, ranks = ragged(9)

    def loss(r):
        return ranking_loss(r, ranks, group_ids=ids, backend=backend)

    assert_same(evaluate(compiled(loss), draw((9,), 1), 1), evaluate(loss, draw((9,), 1), 1))


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (torch.zeros(2, 2), {"group_size": 2}, r"rewards must be \(N,\), got \(2, 2\)"),
        (torch.zeros(3), {"group_size": 2}, r"ranks must be \(N,\) = \(3,\), got \(4,\)"),
        (torch.zeros(4), {}, "exactly one of group_size and group_ids is needed, got group_size=None"),
        (torch.zeros(4), {"group_size": 3}, "group_size must be >= 1 and divide the 4 rewards, got 3"),
        (torch.zeros(4), {"group_ids": torch.zeros(5, dtype=torch.int64)}, r"group_ids must be \(N,\) = \(4,\)"),
        (torch.zeros(4), {"group_size": 2, "variant": "x"}, "variant must be one of plackett_luce, breslow, pairwise"),
    ],
)
def test_bad_input_raises_with_its_values(rewards, options, message):
    with pytest.raises(ValueError, match=message):
        ranking_loss(rewards, torch.arange(4), **options)


def test_ranks_must_be_whole_numbers():
    with pytest.raises(TypeError, match="ranks must be int64, int32"):
        ranking_loss(torch.zeros(4), torch.zeros(4), group_size=2)
