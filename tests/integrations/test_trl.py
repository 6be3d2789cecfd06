"""TRL's functions and ours on the same inputs: values, gradients, types and edges; patch and unpatch."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.testing.numerics import assert_contract

pytest.importorskip("trl", reason="needs trl (make peers)")

from trl.kernels import chunked_divergence, chunked_logprob, logprob_entropy
from trl.trainer import utils

from rlhf_fast.integrations import _trl_heads
from rlhf_fast.integrations import trl as ours
from tests.integrations.trl_runs import RUNS, curves

THEIRS = {
    "selective_log_softmax": utils.selective_log_softmax,
    "entropy_from_logits": utils.entropy_from_logits,
    "selective_log_softmax_and_entropy": utils.selective_log_softmax_and_entropy,
    "fused_logprob_entropy": logprob_entropy.selective_log_softmax_and_entropy,
    "ChunkedLogProbFunction": chunked_logprob.ChunkedLogProbFunction,
    "ChunkedDivergenceFunction": chunked_divergence.ChunkedDivergenceFunction,
}
DTYPES = [torch.float32, torch.bfloat16]
V, D, N = 37, 16, 11


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def upstream(results: list[Tensor]) -> Tensor:
    """A loss that weighs every element of the results that have a gradient differently."""
    terms = [(random(*x.shape, seed=7 + i).to(x.dtype) * x).sum() for i, x in enumerate(results) if x.requires_grad]
    return torch.stack([t.double() for t in terms]).sum()


def results_and_gradients(function, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    found = function(*inputs)
    results = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    needed = [x for x in inputs if x.requires_grad]
    return results, list(torch.autograd.grad(upstream(results), needed)) if needed else []


def assert_parity(mine, theirs, exact, inputs: list[Tensor]) -> None:
    """Types and shapes are the peer's; values and gradients keep the contract beside it. `exact` is run in float64."""
    found, gradients = results_and_gradients(mine, inputs)
    expected, their_gradients = results_and_gradients(theirs, inputs)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    oracle, exact_gradients = results_and_gradients(exact, wide)
    assert [(x.dtype, x.shape, x.requires_grad) for x in found] == [
        (x.dtype, x.shape, x.requires_grad) for x in expected
    ]
    assert [(g.dtype, g.shape) for g in gradients] == [(g.dtype, g.shape) for g in their_gradients]
    triples = zip(found + gradients, expected + their_gradients, oracle + exact_gradients, strict=True)
    for i, (a, b, c) in enumerate(triples):
        if a.dtype == torch.bool:
            assert torch.equal(a, c), f"result {i}"
        else:
            assert_contract(f"result {i}", a, b, c)


# --- From logits -----------------------------------------------------------------------------------------------------

LOGITS_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "mask": {"row_mask": torch.arange(10).view(2, 5) % 3 > 0},
    "integer mask": {"row_mask": torch.arange(10).view(2, 5) % 3, "temperature": 1.3},
    "nothing counts": {"row_mask": torch.zeros(2, 5)},
}
LOGITS_FUNCTIONS = ("selective_log_softmax", "selective_log_softmax_and_entropy", "fused_logprob_entropy")


def logits_of(dtype: torch.dtype, layout: str = "dense") -> Tensor:
    """(2, 5, V), laid out as asked for."""
    logits = random(2, 6, V, scale=3.0).to(dtype)
    if layout == "transposed":
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    return logits[:, :-1].contiguous().requires_grad_() if layout == "dense" else logits[:, :-1].requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LOGITS_CASES)
@pytest.mark.parametrize("name", LOGITS_FUNCTIONS)
def test_logprobs_and_entropy_are_theirs(name, case, dtype):
    options = LOGITS_CASES[case]
    if name == "fused_logprob_entropy" and "row_mask" in options:
        options = {**options, "row_mask": options["row_mask"].long()}
    index = ids(2, 5)
    exact = utils.selective_log_softmax_and_entropy if name == "fused_logprob_entropy" else THEIRS[name]
    assert_parity(
        lambda x: getattr(ours, name)(x, index, **options),
        lambda x: THEIRS[name](x, index, **options),
        lambda x: exact(x, index, **options),
        [logits_of(dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["shifted", "transposed"])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["one id", "three ids"])
def test_strided_logits_and_several_ids_per_row_are_theirs(shape, layout, dtype):
    logits = logits_of(dtype, layout)
    index = ids(*logits.shape[:-1], *shape)
    calls = [lambda x, f=f: f.selective_log_softmax(x, index) for f in (ours, utils, utils)]
    assert_parity(*calls, [logits])


def test_a_mask_of_several_ids_per_row_hides_single_ids():
    logits, index = logits_of(torch.float32), ids(2, 5, 3)
    mask = torch.arange(30).view(2, 5, 3) % 4 > 0
    calls = [lambda x, f=f: f.selective_log_softmax(x, index, row_mask=mask) for f in (ours, utils, utils)]
    assert_parity(*calls, [logits])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(V,), (1, V), (3, V), (2, 3, 4, V)])
def test_entropies_are_theirs_for_any_leading_dimensions(shape, dtype):
    logits = random(*shape, scale=2.0).to(dtype).requires_grad_()
    calls = [lambda x, f=f: f.entropy_from_logits(x, chunk_size=2) for f in (ours, utils, utils)]
    assert_parity(*calls, [logits])


def test_an_entropy_without_gradient_has_none():
    _, entropy = ours.selective_log_softmax_and_entropy(
        logits_of(torch.float32), ids(2, 5), entropy_requires_grad=False
    )
    assert not entropy.requires_grad


@pytest.mark.parametrize("name", LOGITS_FUNCTIONS)
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_raises(name, temperature):
    with pytest.raises(ValueError, match="temperature must be"):
        getattr(ours, name)(logits_of(torch.float32), ids(2, 5), temperature=temperature)


def test_a_confident_token_keeps_its_logprob_where_theirs_rounds_to_0():
    logits = torch.zeros(1, V)
    logits[0, 3] = 25.0
    index = torch.tensor([3])
    exact = utils.selective_log_softmax(logits.double(), index)
    assert utils.selective_log_softmax(logits, index).item() == 0.0
    torch.testing.assert_close(ours.selective_log_softmax(logits, index).double(), exact, rtol=1e-6, atol=0)


# --- The LM head -----------------------------------------------------------------------------------------------------

HEAD_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": 0.3},
    "negative scale": {"logit_scale": -0.7},
    "scale 0": {"logit_scale": 0.0},
    "all": {"temperature": 1.4, "softcap": 3.0, "logit_scale": 1.7},
}


def head_inputs(dtype: torch.dtype, *, bias: bool = True, trained: bool = True, rows: int = N) -> list[Tensor]:
    inputs = [random(rows, D), random(V, D, seed=3, scale=0.5), *([random(V, seed=4, scale=0.5)] if bias else [])]
    inputs = [x.to(dtype) for x in inputs]
    return [inputs[0].requires_grad_(), *(x.requires_grad_(trained) for x in inputs[1:])]


def chunked_logprobs(function, targets, *, temperature=1.0, softcap=None, logit_scale=1.0, **options):
    outputs = options.get("outputs", chunked_logprob.OPTIONAL_OUTPUTS)

    def call(hidden, weight, bias=None):
        return function.apply(hidden, weight, bias, targets, temperature, 8, softcap, logit_scale, outputs)

    return call


def exact_logprobs(targets, *, temperature=1.0, softcap=None, logit_scale=1.0):
    def call(hidden, weight, bias=None):
        z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        logprobs, entropy = utils.selective_log_softmax_and_entropy(z, targets)
        squares = z.detach().log_softmax(-1).mul(2).logsumexp(-1)
        return logprobs, entropy, squares, z.detach().mean(-1), z.argmax(-1) == targets

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", HEAD_CASES)
def test_every_output_of_the_head_is_theirs(case, trained, dtype):
    options, inputs = HEAD_CASES[case], head_inputs(dtype, trained=trained)
    z = torch.nn.functional.linear(*(x.detach().double() for x in inputs)) * options.get("logit_scale", 1.0)
    targets = torch.where(torch.arange(N) % 2 == 0, z.argmax(-1), ids(N))
    assert_parity(
        chunked_logprobs(ours.ChunkedLogProbFunction, targets, **options),
        chunked_logprobs(THEIRS["ChunkedLogProbFunction"], targets, **options),
        exact_logprobs(targets, **options),
        inputs,
    )


@pytest.mark.parametrize("outputs", [(), ("entropy",), ("log_sum_sq_probs",), ("mean_logits",), ("is_top1",)])
def test_only_the_outputs_asked_for_are_made(outputs):
    inputs, targets = head_inputs(torch.float32, bias=False), ids(N)
    made = [
        chunked_logprobs(f, targets, outputs=outputs, softcap=1.5)(*inputs)
        for f in (ours.ChunkedLogProbFunction, THEIRS["ChunkedLogProbFunction"])
    ]
    assert [x is None for x in made[0]] == [x is None for x in made[1]]
    for a, b in zip(*made, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_head_for_no_rows_is_connected():
    inputs = head_inputs(torch.float32, rows=0)
    results, gradients = results_and_gradients(chunked_logprobs(ours.ChunkedLogProbFunction, ids(0)), inputs)
    assert [x.shape for x in results] == [(0,)] * 5
    assert all(not g.any() for g in gradients)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_under_autocast_the_head_takes_the_type_of_autocast(trained):
    inputs, targets = head_inputs(torch.float32, trained=trained), ids(N)
    rounded = [x.detach().bfloat16().float().requires_grad_(x.requires_grad) for x in inputs]

    def autocast(function):
        def call(*tensors):
            with torch.autocast("cpu", torch.bfloat16):
                return chunked_logprobs(function, targets, outputs=("entropy",))(*tensors)

        return call

    def exact(*tensors):
        return exact_logprobs(targets)(*tensors)[:2]

    assert_parity(autocast(ours.ChunkedLogProbFunction), autocast(THEIRS["ChunkedLogProbFunction"]), exact, rounded)


@pytest.mark.parametrize("rows", [1, 5])
def test_strided_hidden_states_and_a_transposed_head_are_theirs(rows):
    hidden = random(rows, 2 * D)[:, ::2].half().requires_grad_()
    weight = random(D, V, scale=0.5).half().t().requires_grad_()
    targets = ids(2 * rows)[::2]
    both = (ours.ChunkedLogProbFunction, THEIRS["ChunkedLogProbFunction"])
    calls = [chunked_logprobs(f, targets, outputs=("entropy",)) for f in both]
    assert_parity(*calls, lambda *x: exact_logprobs(targets)(*x)[:2], [hidden, weight])


def test_a_head_of_another_type_than_the_hidden_states_is_cast():
    hidden, weight, bias = head_inputs(torch.bfloat16)
    wide = hidden.detach().float().requires_grad_()
    targets = ids(N)
    calls = [
        chunked_logprobs(f, targets, outputs=())
        for f in (ours.ChunkedLogProbFunction, THEIRS["ChunkedLogProbFunction"])
    ]
    assert_parity(*calls, lambda *x: exact_logprobs(targets)(*x)[0], [wide, weight, bias])


def test_the_first_of_equal_logits_is_the_top_one():
    hidden = random(4, D)
    weight = torch.zeros(V, D)
    weight[5] = weight[9] = hidden.sum(0) * 10
    hidden[1] = -hidden[1]
    targets = torch.tensor([5, 0, 9, 5])
    found = chunked_logprobs(ours.ChunkedLogProbFunction, targets, outputs=("is_top1",))(hidden, weight)[-1]
    expected = chunked_logprobs(THEIRS["ChunkedLogProbFunction"], targets, outputs=("is_top1",))(hidden, weight)[-1]
    assert torch.equal(found, expected)
    assert found.any()
    assert not found.all()
    for target, is_first in ((0, True), (1, False)):
        flat = chunked_logprobs(ours.ChunkedLogProbFunction, torch.full((4,), target), outputs=("is_top1",))
        assert (flat(hidden, torch.zeros(V, D))[-1] == is_first).all()


# --- Distillation ----------------------------------------------------------------------------------------------------

DIVERGENCE_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.8},
    "same transform": {"student": (0.5, 3.0), "teacher": (0.5, 3.0), "temperature": 1.2},
    "other softcap": {"student": (1.0, None), "teacher": (1.0, 2.0), "temperature": 0.9},
    "other scale": {"student": (0.7, 4.0), "teacher": (1.3, 2.0)},
    "scale 0": {"student": (0.0, None), "teacher": (0.0, None)},
}


def divergence_inputs(dtype: torch.dtype, bias: bool = True, rows: int = N) -> list[Tensor]:
    student = head_inputs(dtype, bias=bias, rows=rows)
    teacher = [random(rows, D + 8, seed=5), random(V, D + 8, seed=6, scale=0.5), random(V, seed=8)][: len(student)]
    return [*student, *(x.to(dtype) for x in teacher)]


def divergence(function, beta, *, temperature=1.0, student=(1.0, None), teacher=(1.0, None)):
    def call(*tensors):
        half = len(tensors) // 2
        pairs = [(*x, None)[:3] for x in (tensors[:half], tensors[half:])]
        return function.apply(*pairs[0], *pairs[1], beta, temperature, *student, *teacher)

    return call


def exact_divergence(beta, *, temperature=1.0, student=(1.0, None), teacher=(1.0, None)):
    def call(*tensors):
        half = len(tensors) // 2
        logs = []
        for x, (scale, softcap) in ((tensors[:half], student), (tensors[half:], teacher)):
            z = torch.nn.functional.linear(*x) * scale
            logs.append(((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature).log_softmax(-1))
        log_s, log_t = logs
        share = torch.tensor(beta).double()
        mixture = torch.logaddexp(log_s + (1 - share).log(), log_t + share.log())
        to_mixture = [(log.exp() * (log - mixture)).sum(-1) for log in logs]
        kl = {
            0.0: (log_t.exp() * (log_t - log_s)).sum(-1),
            1.0: (log_s.exp() * (log_s - log_t)).sum(-1),
        }.get(beta, beta * to_mixture[1] + (1 - beta) * to_mixture[0])
        return kl, -(log_s.exp() * log_s).sum(-1).detach()

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", DIVERGENCE_CASES)
def test_the_divergence_is_theirs(case, beta, dtype):
    options = DIVERGENCE_CASES[case]
    assert_parity(
        divergence(ours.ChunkedDivergenceFunction, beta, **options),
        divergence(THEIRS["ChunkedDivergenceFunction"], beta, **options),
        exact_divergence(beta, **options),
        divergence_inputs(dtype, bias=case != "temperature"),
    )


@pytest.mark.parametrize("options", [{}, {"teacher": (1.0, 2.0)}], ids=["one transform", "two transforms"])
def test_a_divergence_of_no_rows_is_connected(options):
    call = divergence(ours.ChunkedDivergenceFunction, 0.5, **options)
    results, gradients = results_and_gradients(call, divergence_inputs(torch.float32, rows=0))
    assert [x.shape for x in results] == [(0,)] * 2
    assert all(not g.any() for g in gradients)


@pytest.mark.parametrize("options", [{}, {"teacher": (1.0, 2.0)}], ids=["one transform", "two transforms"])
def test_a_wide_teacher_is_not_rounded_to_the_student_s_type(options):
    student, teacher = divergence_inputs(torch.bfloat16)[:3], divergence_inputs(torch.float32)[3:]
    calls = [
        divergence(f, 0.5, **options) for f in (ours.ChunkedDivergenceFunction, THEIRS["ChunkedDivergenceFunction"])
    ]
    assert_parity(*calls, exact_divergence(0.5, **options), [*student, *teacher])


def test_tiles_of_a_divergence_add_up(monkeypatch):
    monkeypatch.setattr(_trl_heads, "_TILE_ROWS", 4)
    options = DIVERGENCE_CASES["other scale"]
    calls = [
        divergence(f, 0.5, **options) for f in (ours.ChunkedDivergenceFunction, THEIRS["ChunkedDivergenceFunction"])
    ]
    assert_parity(*calls, exact_divergence(0.5, **options), divergence_inputs(torch.float32))


# --- DeepSpeed ZeRO-3 ------------------------------------------------------------------------------------------------


@contextmanager
def gathered(*parameters):
    """What ZeRO-3 does: a parameter is whole inside, and empty outside."""
    for parameter in parameters:
        parameter.data = parameter.whole
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.data = parameter.whole.new_empty(0)


def partitioned(tensor: Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(tensor.detach().clone())
    parameter.ds_id, parameter.whole = 0, parameter.data
    return parameter


@pytest.mark.parametrize("kind", ["head", "divergence"])
def test_parameters_that_zero3_partitions_are_gathered_again_for_the_backward_pass(kind, monkeypatch):
    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gathered)
    if kind == "head":
        call, inputs = chunked_logprobs(ours.ChunkedLogProbFunction, ids(N)), head_inputs(torch.float32)
    else:
        call, inputs = divergence(ours.ChunkedDivergenceFunction, 0.5), divergence_inputs(torch.float32)
    plain, expected = results_and_gradients(call, inputs)
    heads = [i for i in range(len(inputs)) if i % 3]
    parts = [partitioned(x) if i in heads else x for i, x in enumerate(inputs)]
    with gathered(*(parts[i] for i in heads)):  # the forward of a model
        found = [x for x in call(*parts) if x is not None]
    assert [x.requires_grad for x in found] == [x.requires_grad for x in plain]
    needed = [x for x, given in zip(parts, inputs, strict=True) if given.requires_grad]
    gradients = torch.autograd.grad(upstream(found), needed)
    for a, b in zip([*found, *gradients], [*plain, *expected], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- patch("trl") ----------------------------------------------------------------------------------------------------


def held() -> dict[str, str]:
    """Where the loaded modules of TRL hold one of the objects: dotted name -> which."""
    known = {id(x): name for name, x in THEIRS.items()}
    return {
        f"{name}.{key}": known[id(value)]
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "trl"
        for key, value in list(vars(module).items())
        if id(value) in known
    }


def test_patch_replaces_every_name_in_trl_and_unpatch_restores_it():
    from trl.trainer import distillation_trainer

    before = held()
    assert {"trl.trainer.utils._ChunkedLogProbFunction", "trl.trainer.utils._fused_logprob_entropy"} <= set(before)
    assert rlhf_fast.patch("trl") == sorted(before)
    try:
        assert held() == {}
        assert distillation_trainer.ChunkedDivergenceFunction is ours.ChunkedDivergenceFunction
        assert utils._ChunkedLogProbFunction is ours.ChunkedLogProbFunction
    finally:
        rlhf_fast.unpatch("trl")
    assert held() == before


@pytest.mark.parametrize("name", RUNS)
def test_a_trainer_runs_on_our_ops_and_gives_the_same_curves(name, tmp_path, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return linear_logprobs(*args, **kwargs)

    linear_logprobs = _trl_heads.linear_logprobs
    monkeypatch.setattr(_trl_heads, "linear_logprobs", counted)
    expected = curves(name, tmp_path / "theirs")
    assert not calls
    monkeypatch.setattr(THEIRS["ChunkedLogProbFunction"], "forward", None)  # would raise if anything still called it
    with rlhf_fast.patched("trl"):
        found = curves(name, tmp_path / "ours")
    assert len(calls) >= 20
    assert found.keys() == expected.keys()
    assert len(set(expected["loss"])) > 10
    if name.endswith("bfloat16"):  # TRL rounds its logits, and so has ties that count as misses in the accuracy
        torch.testing.assert_close(torch.tensor(found["loss"]), torch.tensor(expected["loss"]), rtol=1e-2, atol=0)
        return
    for key, curve in expected.items():
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(curve), rtol=5e-5, atol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trl_dpo", "trl_grpo"])
def test_the_example_prints_the_same_losses_side_by_side(name):
    script = Path(__file__).parents[2] / "examples" / "dropin" / f"{name}.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "trl.trainer.utils._ChunkedLogProbFunction" in run.stdout
    rows = re.findall(r"^loss, step \d+ +(\S+) +(\S+)$", run.stdout, re.MULTILINE)
    losses = torch.tensor([[float(value) for value in row] for row in rows])
    assert len(losses) == 10
    assert len(losses.unique()) > 5
    torch.testing.assert_close(losses[:, 1], losses[:, 0], rtol=1e-4, atol=2e-6)
