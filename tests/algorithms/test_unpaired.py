"""KTO's family: its formula, its KL term over the whole batch, mismatched answers, and what the data must be."""

import pytest
import torch
from rich.console import Console

from rlhf_fast.algorithms import unpaired
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.data import notes
from rlhf_fast.data.encoding import Example
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.training import supervised
from rlhf_fast.training.answers import mismatched
from rlhf_fast.training.checkpoint import newest_good_checkpoint
from rlhf_fast.training.optim import accumulate
from tests.training.tiny_runs import config_of, folder, gradients, job_of, values_of, write_jsonl


@pytest.fixture(autouse=True)
def _nothing_said():
    notes.forget()


def logprob(job, role, ids, start):
    """(): of `ids` from `start` on, in float64 from the logits that transformers itself gives."""
    with job.backbone.using(role):
        logits = job.backbone.model(input_ids=torch.tensor([ids])).logits[0].double()
    tokens = torch.tensor(ids[start:])
    return logits.log_softmax(-1)[start - 1 : -1].gather(-1, tokens[:, None]).sum()


def log_ratio(job, ids, start):
    reference = "reference" if "reference" in job.backbone.adapters else None
    with torch.no_grad():
        base = logprob(job, reference, ids, start)
    return logprob(job, "policy", ids, start) - base


def batch_loss(job, config, indices):
    references = unpaired.reference_logprobs(job, config, job.train)
    loss = unpaired.loss_of(job, config, job.train, references, indices)
    return accumulate(loss, supervised.micro_batches(job, job.train, indices, config.micro_batch_size))


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_kto_is_its_formula_with_the_kl_of_the_whole_batch(micro_batch_size):
    """z is taken from the batch's own prompts and answers, whatever its micro-batches, and has no gradient."""
    numbers = {"beta": 0.5, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    config = config_of("kto", objective=numbers, micro_batch_size=micro_batch_size)
    job = job_of(config)
    job.backbone.add_adapter("reference", copy_of="policy", trainable=False)
    with torch.no_grad():  # a policy under which the mismatched answers are likelier than under the reference
        for parameter in job.backbone.parameters_of("policy"):
            parameter.mul_(0.8)
    indices = [5, 0, 3, 2]
    batch = [job.train[i] for i in indices]
    ratios = torch.stack([log_ratio(job, a.ids, a.start) for a in batch])
    # Shifted by one, the third prompt would meet the answer to its like, the second; by two, none does.
    others = [(p.ids[: p.start], a.ids[a.start :]) for p, a in zip(batch, batch[-2:] + batch[:-2], strict=True)]
    with torch.no_grad():
        z = torch.stack([log_ratio(job, p + a, len(p)) for p, a in others]).mean().clamp(min=0)
    assert z > 0.01, "the clamp must not hide the mean"
    good = torch.tensor([a.desirable for a in batch])
    assert 0 < good.sum() < 4
    u = 0.5 * torch.where(good, ratios - z, z - ratios)
    expected = (torch.where(good, 1.2, 0.7) * (1 - torch.sigmoid(u))).mean()
    expected.backward()
    gradient = gradients(job)
    found = batch_loss(job, config, indices)
    assert float(found["loss"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(found["kl"]) == pytest.approx(float(z), rel=1e-3)
    rewards = 0.5 * ratios.detach()
    assert float(found["desirable_reward"]) == pytest.approx(float(rewards[good].mean()), rel=1e-3, abs=1e-4)
    assert float(found["undesirable_reward"]) == pytest.approx(float(rewards[~good].mean()), rel=1e-3, abs=1e-4)
    for name, value in gradients(job).items():
        torch.testing.assert_close(value, gradient[name], rtol=1e-3, atol=1e-4 * float(gradient[name].abs().max()))


def test_a_negative_mean_of_the_mismatched_answers_is_no_kl():
    config = config_of("kto")
    job = job_of(config)
    job.backbone.add_adapter("reference", copy_of="policy", trainable=False)
    for pair in job.backbone.adapters["policy"].values():  # the policy is the base model, the reference is not
        pair.parameters["lora_B.weight"].data.zero_()
    batch = job.train[:4]
    with torch.no_grad():
        mean = float(torch.stack([log_ratio(job, other.ids, other.start) for other in mismatched(batch)]).mean())
    assert float(unpaired.batch_kl(job, config, batch)) == pytest.approx(max(0.0, mean), rel=1e-3, abs=1e-9)
    assert mean != 0
    job.backbone.swap_adapters("policy", "reference")
    other_way = float(unpaired.batch_kl(job, config, batch))
    assert other_way == pytest.approx(max(0.0, -mean), rel=1e-3, abs=1e-9)
    assert min(other_way, float(max(0.0, mean))) == 0.0, "one of both is clamped"


def answer(prompt, completion):
    return Example([*prompt, *completion], len(prompt))


def test_a_mismatched_answer_is_one_of_the_batch_to_another_prompt():
    batch = [answer([1], [7]), answer([1], [8, 8]), answer([2, 3], [9]), answer([4], [6])]
    found = mismatched(batch)
    # A shift by one would give the first prompt's second answer to that prompt again; by two, none meets its own.
    assert [(e.ids, e.start, e.learnt) for e in found] == [
        ([1, 9], 1, [0, 1]), ([1, 6], 1, [0, 1]), ([2, 3, 7], 2, [0, 0, 1]), ([4, 8, 8], 1, [0, 1, 1])
    ]  # fmt: skip
    assert mismatched(batch[:1]) == []


@pytest.mark.parametrize("variant", ["bco", "apo_zero_unpaired"])
def test_bco_and_apo_are_their_formulas(variant):
    config = config_of("kto", objective={"variant": variant, "beta": 0.5})
    job = job_of(config)
    job.counters["reward_shift"] = 0.3
    batch = job.train[:4]
    with torch.no_grad():
        rewards = 0.5 * torch.stack([log_ratio(job, a.ids, a.start) for a in batch])
    sign = torch.tensor([1.0 if a.desirable else -1.0 for a in batch])
    if variant == "bco":
        expected = -torch.nn.functional.logsigmoid(sign * (rewards - 0.3)).mean()
    else:
        expected = (1 - torch.sigmoid(sign * rewards)).mean()
    assert float(batch_loss(job, config, range(4))["loss"]) == pytest.approx(float(expected), rel=1e-4)


def run(values, **changes):
    run_stage(Console(quiet=True), single_stage({**values, **changes}), resume=None, overwrite=False)


def test_bcos_shift_follows_the_rewards_of_both_classes(tmp_path):
    # With this seed every batch has both.
    folder = str(tmp_path / "run")
    values = values_of("kto", objective="bco", reward_shift_decay=0.5, output_dir=folder, steps=3, data_seed=1)
    run(values, save_every=3)
    shift = 0.0
    for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        shift = 0.5 * shift + 0.25 * (row["desirable_reward"] + row["undesirable_reward"])
    _, state = newest_good_checkpoint(tmp_path / "run" / "checkpoints")
    assert state["counters"]["reward_shift"] == pytest.approx(shift, rel=1e-6)
    assert shift != 0


def test_pairs_are_taken_apart():
    job = job_of(config_of("kto", data=str(folder() / "pairs.jsonl")))
    decoded = [(job.encoder.tokenizer.decode(a.ids[a.start :], skip_special_tokens=True), a.desirable)
               for a in job.train]  # fmt: skip
    assert {text: good for text, good in decoded if text}.items() >= {
        ("good", True),
        ("goodgood", True),
        ("bbb", False),
    }
    assert [good for _, good in decoded] == [True, False] * (len(decoded) // 2)


def test_what_is_liked_becomes_likelier_and_the_other_less(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "yes" if i % 2 else "no", "label": i % 2 == 1} for i in range(24)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    values = values_of("kto", data=str(tmp_path / "data.jsonl"), steps=10, batch_size=8, eval_size=6,
                       learning_rate=0.01, output_dir=str(tmp_path / "run"))  # fmt: skip
    run(values)
    before, after = (row["metrics"] for row in read_jsonl(tmp_path / "run" / "eval.jsonl"))
    assert before["margin"] == pytest.approx(0.0, abs=1e-5)
    assert after["margin"] > 0.1
    assert after["loss"] < before["loss"]


def test_classes_out_of_balance_are_told_with_the_weight_that_balances_them(capsys):
    job_of(config_of("kto"))
    said = capsys.readouterr().out
    assert (
        "warning: 5 answers are desirable, 2 are not; objective.desirable_weight is 1, balanced it is from 0.4 to 0.533"
        in said
    )
    job_of(config_of("kto", objective={"desirable_weight": 0.5}))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("label", "message"), [
    ("yes", "label must be true or false, got str 'yes'"), (None, "label must be true or false"),
    (True, "all 3 answers have the label True: kto needs both"),
])  # fmt: skip
def test_labels_that_teach_nothing_are_refused(label, message, tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "a", "label": label} for i in range(4)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(UserError, match=message):
        job_of(config_of("kto", data=str(tmp_path / "data.jsonl"), eval_size=1))


def test_a_batch_of_one_has_no_other_answers():
    with pytest.raises(UserError, match=r"batch_size must be at least 2 for kto, .*, got 1"):
        single_stage(values_of("kto", batch_size=1))
    assert single_stage(values_of("kto", batch_size=1, objective="apo_zero_unpaired")).config.batch_size == 1
