"""What DPO's loss makes of its data's columns and of its weights, against the papers' formulas in float64."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlhf_fast.algorithms import preference
from rlhf_fast.algorithms.launch import single_stage
from rlhf_fast.data.encoding import Example
from rlhf_fast.errors import UserError
from rlhf_fast.ops.preference.preference_loss import PreferenceObjective
from rlhf_fast.training import supervised
from rlhf_fast.training.pair_loss import check_labels, pair_loss
from rlhf_fast.training.pairs import Pair, load_pair_rows
from tests.training.tiny_runs import config_of, job_of, values_of, write_jsonl

EXAMPLE = Example([1, 2], 1)
BETA = 0.3


def of_pairs(count, seed=0, **labels):
    """(logprobs, ref_logprobs, lengths) of `count` pairs in float64, and the pairs with their labels."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, refs = (-8 * torch.rand(2 * count, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(1, 9, (2 * count,), generator=generator)
    pairs = [Pair(EXAMPLE, EXAMPLE, **{name: column[i] for name, column in labels.items()}) for i in range(count)]
    return logprobs.requires_grad_(), refs, lengths, pairs


def gradient(loss, logprobs):
    return torch.autograd.grad(loss, logprobs)[0]


def check_against(expected, objective, logprobs, refs, lengths, pairs, **given):
    loss, metrics = pair_loss(objective, logprobs, refs, pairs=pairs, lengths=lengths, denominator=len(pairs), **given)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logprobs), gradient(expected, logprobs))
    return metrics


def test_dpo_with_soft_labels_is_the_cross_entropy_with_them():
    p = [0.9, 0.5, 0.2, 1.0]
    logprobs, refs, lengths, pairs = of_pairs(4, preference=p)
    h = BETA * ((logprobs[:4] - refs[:4]) - (logprobs[4:] - refs[4:]))
    p = torch.tensor(p, dtype=torch.float32).double()
    expected = -(p * logsigmoid(h) + (1 - p) * logsigmoid(-h)).mean()
    check_against(expected, PreferenceObjective("sigmoid", beta=BETA), logprobs, refs, lengths, pairs)


def test_ipo_with_soft_labels_is_the_mean_over_bernoulli_labels():
    p = [0.9, 0.5, 0.25]
    logprobs, refs, lengths, pairs = of_pairs(3, preference=p)
    ratio = (logprobs - refs) / lengths
    h, p = ratio[:3] - ratio[3:], torch.tensor(p, dtype=torch.float32).double()
    tau = BETA
    expected = (p * (h - 1 / (2 * tau)) ** 2 + (1 - p) * (-h - 1 / (2 * tau)) ** 2).mean()
    check_against(expected, PreferenceObjective("ipo", beta=tau), logprobs, refs, lengths, pairs)


@pytest.mark.parametrize("variant", ["sigmoid", "sigmoid_norm"])
def test_a_margin_is_what_the_gap_has_to_beat_and_no_metric_knows_it(variant):
    m = [0.5, 0.0, 2.0]
    logprobs, refs, lengths, pairs = of_pairs(3, margin=m)
    reward = BETA * (logprobs - refs) / (lengths if variant == "sigmoid_norm" else 1)
    expected = -logsigmoid(reward[:3] - reward[3:] - torch.tensor(m).double()).mean()
    metrics = check_against(
        expected, PreferenceObjective(variant, beta=BETA), logprobs, refs, lengths, pairs
    )  # fmt: skip
    torch.testing.assert_close(metrics["chosen_reward"], reward[:3].mean().detach())
    torch.testing.assert_close(metrics["margin"], (reward[:3] - reward[3:]).mean().detach())
    torch.testing.assert_close(metrics["accuracy"], (reward[:3] > reward[3:]).double().mean())


def test_mpo_is_the_weighted_sum_of_its_three_losses():
    objective = single_stage({**values_of("dpo"), "algorithm": "mpo"}).config.objective
    logprobs, refs, lengths, pairs = of_pairs(4)
    reward = objective.beta * (logprobs - refs)
    chosen, rejected = reward.chunk(2)
    delta = reward.mean().detach()
    quality = -logsigmoid(chosen - delta) - logsigmoid(-(rejected - delta))
    generation = -logprobs[:4] / lengths[:4]
    expected = (-0.8 * logsigmoid(chosen - rejected) + 0.2 * quality + generation).mean()
    check_against(expected, objective, logprobs, refs, lengths, pairs)


def token_predictions(job, role, batch):
    """(B, T): log p of each token that counts, and the log of the sum of squared probabilities there, from the logits
    that transformers itself gives."""
    with job.backbone.using(role):
        logits = job.backbone.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logp = logits.double().log_softmax(-1)[:, :-1]
    tokens = logp.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return tokens, logp.mul(2).logsumexp(-1), batch.mask[:, 1:].double()


def first_rows(job, config):
    (rows,) = supervised.micro_batches(job, job.train, range(4), None)
    return rows


def test_wpo_weighs_each_pair_by_its_alignment_with_the_sampler():
    config = config_of("dpo", wpo=True)
    job = job_of(config)
    rows = first_rows(job, config)
    logprobs, weights = preference.answer_logprobs(job, config, "policy", rows.batch)
    tokens, collisions, mask = token_predictions(job, "policy", rows.batch)
    aligned = ((tokens - collisions) * mask).sum(1) / mask.sum(1)
    expected = (aligned[:4] + aligned[4:]).exp().clamp(max=1)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-6)
    assert not weights.requires_grad
    assert weights.std() > 0.01, "the pairs must differ for this to say anything"
    references = preference.references_of(job, config, job.train)
    loss, _ = preference.loss_of(job, config, job.train, references)(rows)
    reward = 0.1 * (logprobs - references[:4].T.flatten()).double()
    plain = -(expected * logsigmoid(reward[:4] - reward[4:])).mean()
    torch.testing.assert_close(loss.double(), plain, rtol=1e-4, atol=1e-6)


def test_length_desensitising_weighs_the_tokens_that_only_the_longer_answer_has():
    config = config_of("dpo", ld_alpha=0.4)
    job = job_of(config)
    rows = first_rows(job, config)
    for role in ("policy", "reference"):
        tokens, _, mask = token_predictions(job, role if role == "policy" else None, rows.batch)
        lengths = mask.sum(1)
        shared = torch.minimum(lengths, lengths.roll(4))
        weights = mask * torch.where(mask.cumsum(1) <= shared[:, None], 1.0, 0.4)
        found, _ = preference.answer_logprobs(job, config, role, rows.batch)
        torch.testing.assert_close(found.double(), (tokens * weights).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("objective", "labels", "message"), [
    ("sigmoid", {"margin": 1.0, "preference": 0.5}, "both a margin and a preference"),
    ("apo_zero", {"margin": 1.0}, "objective apo_zero cannot take"),
    ("simpo", {"margin": 1.0}, "objective simpo cannot take"),
    ({"divergence_variant": "js"}, {"margin": 1.0}, "is of divergence_variant reverse_kl, not js"),
    ({"variant": {"sigmoid": 1, "sft": 1}}, {"margin": 1.0}, r"objective sigmoid \+ sft cannot take"),
    ("aot", {"preference": 0.5}, "objective aot cannot take"),
])  # fmt: skip
def test_a_label_that_the_loss_cannot_take_is_refused(objective, labels, message):
    with pytest.raises(UserError, match=message):
        check_labels([Pair(EXAMPLE, EXAMPLE, **labels)], PreferenceObjective.of(objective))


@pytest.mark.parametrize(("column", "value", "message"), [
    ("preference", 1.5, r"preference must be in \[0, 1\], got 1.5"),
    ("preference", "high", "preference must be a finite number, got str 'high'"),
    ("margin", None, "margin must be a finite number, got None"),
    ("margin", True, "margin must be a finite number, got bool True"),
])  # fmt: skip
def test_a_label_that_is_no_number_is_named_with_its_row(column, value, message, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", column: value} for i in range(4)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(UserError, match=f"data.jsonl:[0-9]+: {message}"):
        job_of(config_of("dpo", data=str(tmp_path / "data.jsonl"), eval_size=1))


def test_labels_that_only_some_rows_have_are_refused(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", **({"margin": 1.0} if i else {})} for i in range(4)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(UserError, match=r"data.jsonl:2 has the column 'margin', which .*data.jsonl:1 lacks"):
        load_pair_rows(config_of("dpo", data=str(tmp_path / "data.jsonl"), eval_size=1))


def test_wpo_and_a_loss_that_takes_pairs_apart_exclude_each_other():
    with pytest.raises(UserError, match="wpo weighs pairs, but objective aot takes them apart"):
        single_stage(values_of("dpo", objective="aot", wpo=True))
