"""What the rows without a critic do beside their losses: numbers of each recipe, dynamic sampling, masks, steps."""

import dataclasses
import math

import pytest
import torch

from rlhf_fast.algorithms import ALGORITHMS, grpo
from rlhf_fast.algorithms.launch import single_stage
from rlhf_fast.errors import UserError
from rlhf_fast.ops.advantages.token_advantages import optimal_token_baseline, process_advantages
from rlhf_fast.training import on_policy
from rlhf_fast.training.experience import StepRewards, collect, penalties, prompts_of_step
from rlhf_fast.training.optim import accumulate
from rlhf_fast.training.resampling import joined, judged_alike
from tests.training.test_experience import trained
from tests.training.tiny_runs import config_of, folder, job_of, values_of

EVEN = f"{folder()}/reward.py:even"


def experience_of(job, config, step=0, **options):
    torch.manual_seed(5)
    return collect(job, config, prompts_of_step(job, config, step), **options)


def compared(changes, rewards=None):
    """(advantages, experience, its mask and KL in fp64) of one rollout of two groups of two."""
    config = config_of("grpo", **changes)
    job = job_of(config)
    experience = experience_of(job, config)
    if rewards is not None:
        experience = dataclasses.replace(experience, rewards=torch.tensor(rewards))
    return (
        grpo.advantages_of(job, config, experience),
        experience,
        experience.batch.mask.double(),
        experience.kl.double(),
    )


def later(x):
    """Sums over this and the later tokens."""
    return x.flip(1).cumsum(1).flip(1)


def whitened(x, mask):
    counted = x[mask.bool()]
    return (x - counted.mean()) / (counted.var() + 1e-8).sqrt() * mask


def test_reinforce_pp_whitens_rewards_to_go_less_the_kl_to_come_over_the_tokens():
    found, e, mask, kl = compared({"advantage": "reinforce_pp", "kl_coef": 0.3, "num_generations": 1})
    expected = whitened((e.rewards.double()[:, None] - 0.3 * later(kl * mask)) * mask, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (found[:, :-1] != found[:, 1:])[e.batch.mask[:, 1:].bool()].any(), "the KL to come differs by token"


def test_reinforce_baseline_whitens_the_distance_to_the_group_over_the_tokens():
    found, _, mask, kl = compared({"advantage": "reinforce_baseline", "kl_coef": 0.3}, [1.0, 4.0, -2.0, 0.0])
    distance = torch.tensor([-1.5, 1.5, -1.0, 1.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        found.double(), whitened((distance - 0.3 * later(kl * mask)) * mask, mask), rtol=1e-4, atol=1e-5
    )


def test_remax_takes_off_the_greedy_reward_and_the_kl_to_come():
    config = config_of("grpo", advantage="remax", kl_coef=0.3)
    job = job_of(config)
    e = experience_of(job, config)
    # So cold a sample is the greedy answer; both rows of a prompt have the same one.
    greedy = collect(job, config.model_copy(update={"temperature": 1e-4}), e.rollout.prompts).rewards.double()
    assert torch.equal(greedy[0::2], greedy[1::2])
    mask = e.batch.mask.double()
    expected = ((e.rewards.double() - greedy)[:, None] - 0.3 * later(e.kl.double() * mask)) * mask
    torch.testing.assert_close(grpo.advantages_of(job, config, e).double(), expected, rtol=1e-4, atol=1e-5)


def test_gpg_makes_up_for_groups_of_equal_rewards():
    config = config_of("grpo", advantage="dr_grpo", correct_equal_groups=True)
    job = job_of(config)
    e = experience_of(job, config)
    e = dataclasses.replace(
        e, rewards=torch.tensor([1.0, 4.0, 2.0, 2.0]), parts={config.reward: torch.tensor([1.0, 4.0, 2.0, 2.0])}
    )
    assert grpo.advantages_of(job, config, e).tolist() == [-3.0, 3.0, 0.0, 0.0]  # B / (B - M) = 4 / 2


def test_gdpo_is_trl_s_formula_and_weighs_rewards_by_name(tmp_path):
    (tmp_path / "second.py").write_text("def short(completions):\n    return [-float(len(c)) for c in completions]\n")
    rewards = [f"{folder()}/reward.py:score", f"{tmp_path}/second.py:short"]
    config = config_of(
        "grpo", advantage="gdpo", reward=rewards, reward_weights=[1.0, 3.0], num_generations=4, batch_size=8
    )
    job = job_of(config)
    e = experience_of(job, config)
    first, second = torch.randn(2, 8, dtype=torch.float64)
    # Parts come in the order of the sources, an adapter last: names decide, not places.
    e = dataclasses.replace(e, parts={rewards[1]: second.float(), rewards[0]: first.float()})

    def normed(x):
        groups = x.view(2, 4)
        return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)

    total = 1.0 * normed(first) + 3.0 * normed(second)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(grpo.advantages_of(job, config, e).double(), expected, rtol=1e-3, atol=1e-4)


def test_the_optimal_token_baseline_weighs_returns_by_the_energy_so_far():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    targets = torch.randint(5, (3, 4))
    p = logits.softmax(-1)
    logprobs = p.log().gather(-1, targets[..., None]).squeeze(-1)
    # Of one group, with completions of 4, 2 and 3 tokens behind a prompt of none.
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    returns = torch.tensor([[2.0], [-1.0], [0.5]], dtype=torch.float64).expand(3, 4)
    found = optimal_token_baseline(returns, logprobs, p.square().sum(-1), mask=mask, group_size=3)
    # The energy is the squared norm of d logprob / d logits, by autograd.
    energies = torch.zeros(3, 4, dtype=torch.float64)
    for i in range(3):
        for t in range(4):
            z = logits[i, t].clone().requires_grad_()
            (g,) = torch.autograd.grad(z.log_softmax(0)[targets[i, t]], z)
            energies[i, t] = g.square().sum()
    for t in range(4):
        alive = [i for i in range(3) if mask[i, t]]
        weights = {i: float(energies[i, : t + 1].sum()) for i in alive}
        baseline = (
            sum(weights[i] * float(returns[i, t]) for i in alive) / sum(weights.values()) if len(alive) > 1 else 0
        )
        for i in range(3):
            assert float(found[i, t]) == pytest.approx((float(returns[i, t]) - baseline) if i in alive else 0, abs=1e-7)


def test_the_optimal_token_baseline_of_a_run_reads_the_policy_s_squared_probabilities():
    config = config_of("grpo", advantage="optimal_token_baseline", temperature=0.7, num_minibatches=1)
    job = job_of(config)
    e = experience_of(job, config, score_policy=config.scores_policy, collisions=config.needs_collisions)
    hidden = job.backbone.hidden(e.batch.input_ids, e.batch.attention_mask, ["policy"])["policy"]
    p = ((hidden @ job.backbone.lm_head_weight.T) / 0.7).double().softmax(-1)
    expected = torch.nn.functional.pad(p.square().sum(-1)[:, :-1], (1, 0)) * e.batch.mask
    torch.testing.assert_close(e.scores.collisions.double(), expected, rtol=1e-4, atol=1e-6)
    assert grpo.advantages_of(job, config, e).shape == e.batch.mask.shape


STEPS = torch.tensor([[0, 1.0, 0, 3.0], [0, 0.5, -1.0, 0]], dtype=torch.float64)
ENDS = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]])  # a step may be paid 0


def test_steps_of_a_group_are_normalised_together_and_those_to_come_add_up():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    found = process_advantages(STEPS, ENDS, mask=mask, group_size=2)
    r = torch.tensor([1.0, 3.0, 0.0, 0.5, -1.0], dtype=torch.float64)
    a, b, c, d, e = ((r - r.mean()) / (r.std() + 1e-4)).tolist()
    expected = [[a + b, a + b, b, b], [c + d + e, d + e, e, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    equal = torch.full((2, 4), 0.1) * ENDS
    assert not process_advantages(equal, ENDS, mask=mask, group_size=2).any()


def test_the_min_form_leaves_about_the_smallest_step_of_each_completion():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    found = process_advantages(STEPS, ENDS, mask=mask, group_size=2, min_temperature=0.1)

    def weighed(rewards):
        powers = [math.exp(-r / 0.1) for r in rewards]
        return [r * power / sum(powers) for r, power in zip(rewards, powers, strict=True)]

    first, second = weighed([1.0, 3.0]), weighed([0.0, 0.5, -1.0])
    assert sum(first) == pytest.approx(1.0, abs=1e-3)
    assert sum(second) == pytest.approx(-1.0, abs=1e-3)
    r = torch.tensor([*first, *second], dtype=torch.float64)
    a, b, c, d, e = ((r - r.mean()) / (r.std() + 1e-4)).tolist()
    expected = [[a + b, a + b, b, b], [c + d + e, d + e, e, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_process_compares_steps_and_what_is_paid_at_the_end_each_by_itself():
    config = config_of("grpo", advantage="process")
    job = job_of(config)
    e = experience_of(job, config)
    with pytest.raises(UserError, match="advantage process compares steps, and no reward pays any"):
        grpo.advantages_of(job, config, e)
    ends = torch.zeros_like(e.batch.mask).scatter(1, e.batch.mask.argmax(1, keepdim=True), 1).bool()
    steps = StepRewards(ends * torch.tensor([[1.0], [2.0], [5.0], [5.0]]), ends)
    e = dataclasses.replace(e, steps=steps, rewards=torch.tensor([1.0, 2.0, 6.0, 8.0]))
    found = grpo.advantages_of(job, config, e).double()
    half = 0.5**0.5 / (1 + 1e-4 * 2**0.5)  # of two that are 1 apart: a distance of 1/2, a deviation of sqrt(1/2)
    outcome = 1.0 / (2**0.5 + 1e-4)  # of 1 and 3
    expected = torch.tensor([-half, half, -outcome, outcome], dtype=torch.float64)
    torch.testing.assert_close(found[ends], expected, rtol=1e-4, atol=1e-5)
    behind = e.batch.mask.bool() & ~ends  # of whose steps none is left
    expected = [outcome if row > 1 else 0.0 for row in behind.nonzero()[:, 0].tolist()]
    assert found[behind].abs().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("buffer", "expected"), [(4, [0.0, 0.0, 0.25, 1.0]), (0.5, [0.0, 0.0, 0.25, 1.0]), (2, [0.0, 0.0, 0.0, 1.0])]
)
def test_the_soft_overlong_punishment_grows_over_the_buffer(buffer, expected):
    config = config_of("grpo", overlong_buffer=buffer, max_new_tokens=8, overlong_penalty=1.0)
    job = job_of(config)
    e = experience_of(job, config)
    counts = torch.tensor([1, 4, 5, 8])
    rollout = dataclasses.replace(e.rollout, batch=dataclasses.replace(e.batch, counts=counts))
    assert penalties(config, rollout).tolist() == expected
    half = config.model_copy(update={"overlong_penalty": 0.5, "missing_eos_penalty": 2.0})
    finished = torch.tensor([True, True, True, False])
    found = penalties(half, dataclasses.replace(rollout, finished=finished)).tolist()
    assert found == [0.5 * expected[0], 0.5 * expected[1], 0.5 * expected[2], 0.5 * expected[3] + 2.0]


def test_truncated_completions_are_compared_with_and_not_learnt_from():
    config = config_of("grpo", mask_truncated_completions=True, num_minibatches=1, micro_batch_size=2)
    job = job_of(config)
    e = experience_of(job, config)
    finished = torch.tensor([True, False, True, True])
    e = dataclasses.replace(e, rollout=dataclasses.replace(e.rollout, finished=finished))
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0])
    rows = list(on_policy.micro_batches(job, config, e, torch.arange(4).split(2)))
    counted = e.batch.mask[finished]
    assert all(int(r.tokens) == int(counted.sum()) and int(r.sequences) == 3 for r in rows)
    loss = grpo.loss_of(config.model_copy(update={"objective": "ppo_clip"}), advantages)
    total = accumulate(loss, on_policy.micro_batches(job, config, e, torch.arange(4).split(2)))["loss"]
    # On policy the ratio is 1: minus the advantages' mean over the counted tokens.
    weights = e.batch.mask.sum(1) * finished
    assert float(total) == pytest.approx(-float((weights * advantages).sum() / weights.sum()), rel=1e-5)


def test_a_rollout_without_a_finished_completion_moves_nothing_and_says_so(capsys):
    _, (metrics,) = trained("grpo", 1, mask_truncated_completions=True, max_new_tokens=1, seed=4)
    assert metrics["finished"] == 0
    assert metrics["grad_norm_policy"] == 0
    assert "no completion of a step was finished" in capsys.readouterr().out


def test_joined_rows_are_the_rows_padded_to_one_length():
    config = config_of("grpo")
    job = job_of(config)
    first, second = (experience_of(job, config, step) for step in (0, 2))
    rows = [torch.tensor([2, 3]), torch.tensor([0, 1])]
    both = joined([first, second], rows)
    assert both.rollout.completions == first.rollout.completions[2:] + second.rollout.completions[:2]
    assert both.rewards.tolist() == [*first.rewards[2:].tolist(), *second.rewards[:2].tolist()]
    assert torch.equal(both.batch.counts, torch.cat([first.batch.counts[2:], second.batch.counts[:2]]))
    for whole, part, place in ((first, both, 0), (second, both, 2)):
        start = 2 if whole is first else 0
        for name in ("logprobs", "ref_logprobs"):
            ours, theirs = getattr(part.scores, name)[place], getattr(whole.scores, name)[start]
            length = min(len(ours), len(theirs))
            assert torch.equal(ours[:length], theirs[:length])
            assert not ours[length:].any()


def test_groups_that_are_judged_alike_are_sampled_again_until_the_batch_is_full():
    # Even lengths are right: of two completions of a byte or more, about half the groups say nothing.
    config = config_of("grpo", reward=EVEN, max_resamples=20, batch_size=8, steps=3)
    job = job_of(config)
    plain = job_of(config)
    log = []
    run = type("R", (), {"start": 0, "steps": lambda self: range(3)})()
    for step, e in on_policy.experiences(job, config, run):
        groups = e.parts[EVEN].view(-1, 2)
        assert (groups[:, 0] != groups[:, 1]).all(), f"step {step}"
        texts = [prompt.text for prompt in e.rollout.prompts]
        assert texts[0::2] == texts[1::2], "groups stay together"
        log.append(e.metrics)
    assert sum(m["dropped_groups"] for m in log) == job.counters["extra_prompts"] > 0
    assert sum(m["resamples"] for m in log) > 0
    assert [p.text for p in prompts_of_step(plain, config, 0)] == [
        p.text for p in prompts_of_step(job_of(config), config, 0)
    ]


def test_resampling_ends_at_its_bound_and_fills_the_batch_with_what_says_nothing(tmp_path):
    (tmp_path / "same.py").write_text("def same(completions):\n    return [1.0 for _ in completions]\n")
    _, (metrics,) = trained("grpo", 1, reward=f"{tmp_path}/same.py:same", max_resamples=2)
    assert (metrics["resamples"], metrics["dropped_groups"], metrics["equal_groups"]) == (2, 4, 1)


def test_a_source_without_a_weight_tells_nothing_apart(tmp_path):
    (tmp_path / "two.py").write_text(
        "def same(completions):\n    return [1.0 for _ in completions]\n\n\n"
        "def apart(completions):\n    return [float(i) for i, _ in enumerate(completions)]\n"
    )
    rewards = [f"{tmp_path}/two.py:same", f"{tmp_path}/two.py:apart"]
    for weights, alike in (([1.0, 0.0], True), ([1.0, 0.5], False), ([0.0, 0.0], False)):
        config = config_of("grpo", reward=rewards, reward_weights=weights, overlong_buffer=0.9)
        job = job_of(config)
        assert judged_alike(job, config, experience_of(job, config)).tolist() == [alike] * 2


NUMBERS = {
    "grpo": ("grpo", "seq_mean_token_mean", 0.2, 0.2, 0.04, "grpo"),
    "dr_grpo": ("dr_grpo", "seq_mean_token_sum_norm", 0.2, 0.2, 0, "dr_grpo"),
    "dapo": ("dapo", "token_mean", 0.2, 0.28, 0, "grpo"),
    "gspo": ("gspo", "seq_mean_token_mean", 3e-4, 4e-4, 0, "grpo"),
    "luspo": ("luspo", "seq_mean_token_sum", 2e-3, 2.5e-3, 0, "grpo"),
    "gmpo": ("gmpo", "seq_mean_token_mean", 0.4, 0.4, 0, "grpo"),
    "cispo": ("cispo", "token_mean", 1.0, 4.0, 0, "grpo"),
    "sapo": ("sapo", "seq_mean_token_mean", 0.2, 0.2, 0, "grpo"),
    "vespo": ("vespo", "token_mean", 0.2, 0.2, 0, "grpo"),
    "gpg": ("gpg", "token_mean", 0.2, 0.2, 0, "dr_grpo"),
    "rloo": ("reinforce", "seq_mean_token_sum", 0.2, 0.2, 0, "rloo"),
    "opo": ("reinforce", "seq_mean_token_sum", 0.2, 0.2, 0, "opo"),
    "remax": ("reinforce", "seq_mean_token_sum", 0.2, 0.2, 0, "remax"),
    "reinforce_pp": ("ppo_clip", "token_mean", 0.2, 0.2, 0, "reinforce_pp"),
    "reinforce_baseline": ("ppo_clip", "token_mean", 0.2, 0.2, 1e-5, "reinforce_baseline"),
}


@pytest.mark.parametrize("row", NUMBERS)
def test_the_numbers_of_a_row_are_those_of_its_paper(row):
    values = {**values_of("grpo", batch_size=8), "algorithm": row}
    del values["objective"], values["num_minibatches"]
    if "num_generations" in ALGORITHMS[row].defaults:
        del values["num_generations"]
    config = single_stage(values).config
    o = config.objective
    found = (o.variant, o.aggregation, o.clip_eps_low, o.clip_eps_high, o.kl_coef, config.advantage)
    assert found == NUMBERS[row]
    assert config.kl_coef == {"rloo": 0.05, "remax": 0.05, "reinforce_pp": 0.01}.get(row, 0)
    stale = ("dapo", "gspo", "luspo", "gmpo", "cispo", "sapo", "vespo")
    assert config.num_minibatches == (4 if row in stale else 1)
    if row == "dapo":
        assert (config.max_resamples, config.overlong_buffer, config.mask_truncated_completions) == (9, 0.2, True)


def test_a_kl_coef_of_grpo_is_told_to_be_in_the_reward(capsys):
    for row, changes, said in (("grpo", {"kl_coef": 0.04}, True), ("grpo", {}, False), ("rloo", {}, False)):
        values = {**values_of("grpo", **changes), "algorithm": row}
        grpo.prepare(grpo.AlgorithmConfig.model_validate(values))
        line = "grpo: kl_coef 0.04 is a penalty in the reward; the KL in the loss is objective.kl_coef"
        assert (line in capsys.readouterr().out) == said


@pytest.mark.parametrize(("changes", "message"), [
    ({"max_resamples": 2, "num_generations": 1, "advantage": "remax"}, "max_resamples 2 is of num_generations from 2"),
    ({"overlong_buffer": 7}, "overlong_buffer 7.0 is longer than max_new_tokens 6"),
    ({"advantage": "gdpo", "overlong_buffer": 0.5}, "there is no sum for overlong_buffer, got 0.5"),
    ({"min_temperature": 0.1}, "min_temperature 0.1 is of advantage process, got grpo"),
    ({"advantage": "process", "num_generations": 1}, "advantage process compares the completions of a prompt"),
], ids=str)  # fmt: skip
def test_keys_that_do_not_fit_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        single_stage(values_of("grpo", **changes))
