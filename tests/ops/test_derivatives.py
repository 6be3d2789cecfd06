"""Derivatives of every kind, of every op: what a kernel has none for says in one line what to do instead, on every way
into the op; results may be written in place, inputs that were changed since are no silent error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import rlhf_fast
from tests.op_inputs import CASES, each

TRAINED = {case.op: case for case in reversed(CASES) if case.grads}
DETACHED = {case.op: case for case in reversed(CASES) if case.op not in TRAINED and case.op != "sample_tokens"}
KERNELS = [pytest.param(case, "cpu", id=op) for op, case in TRAINED.items()] + [
    pytest.param(TRAINED[op], "triton", id=f"{op}-triton") for op in ("token_logprobs", "value_loss", "lora_linear")
]


def _function(case, backend: str):
    """(x -> the first result, x) for the first argument that may have a gradient, or the first float."""
    inputs = {name: x.detach() for name, x in case.inputs("cpu", torch.float64).items()}
    name = case.grads[0] if case.grads else next(name for name, x in inputs.items() if x.is_floating_point())
    return lambda x: case.call({**inputs, name: x}, backend)[0], inputs[name]


@pytest.mark.parametrize(("case", "backend"), KERNELS)
@pytest.mark.parametrize("leaf", [False, True], ids=["a constant", "a leaf"])
def test_forward_mode_through_a_kernel_raises(case, backend, leaf):
    run, x = _function(case, backend)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(leaf), torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=r"^rlhf_fast::\w+ has no forward-mode derivative; backend='ref"):
            run(dual)


@pytest.mark.parametrize(("case", "backend"), KERNELS)
@pytest.mark.parametrize(
    ("transformed", "says"),
    [
        (lambda run, x: torch.func.jvp(run, (x,), (x,)), "has no forward-mode derivative"),
        (lambda run, x: torch.func.grad(lambda x: run(x).sum())(x), "cannot be differentiated by torch.func"),
        (lambda run, x: torch.vmap(run)(torch.stack([x, x])), "has no rule for torch.vmap"),
    ],
    ids=["jvp", "grad", "vmap"],
)
def test_a_transform_of_a_kernel_raises(case, backend, transformed, says):
    run, x = _function(case, backend)
    with pytest.raises(NotImplementedError, match=rf"^rlhf_fast::\w+ {says}; backend='reference' can do that$"):
        transformed(run, x)


@pytest.mark.parametrize(("case", "backend"), KERNELS)
def test_a_second_derivative_of_a_kernel_raises(case, backend):
    run, x = _function(case, backend)
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"^rlhf_fast::\w+ has no second derivative; backend='reference' can do that$"
    ):
        torch.autograd.grad(first.sum(), x)


def test_forward_mode_through_a_compiled_kernel_raises():
    run, x = _function(TRAINED["value_loss"], "cpu")
    compiled = torch.compile(lambda x: torch.func.jvp(run, (x,), (x,)), backend="aot_eager")
    with pytest.raises(Exception, match="has no forward-mode derivative"):  # dynamo wraps it in an error of its own
        compiled(x)


@pytest.mark.parametrize("case", TRAINED.values(), ids=TRAINED)
def test_the_reference_has_forward_mode_vmap_and_a_second_derivative(case):
    run, x = _function(case, "reference")
    tangent = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)
    y, forward = torch.func.jvp(run, (x,), (tangent,))
    leaf = x.clone().requires_grad_()
    (backward,) = torch.autograd.grad(run(leaf).sum(), leaf, create_graph=True)
    torch.testing.assert_close((backward * tangent).sum(), forward.sum())
    torch.testing.assert_close(torch.vmap(run)(torch.stack([x, x])), torch.stack([y, y]))
    if backward.requires_grad:  # not of what is linear
        assert torch.autograd.grad(backward.square().sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("case", DETACHED.values(), ids=DETACHED)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_a_constant_of_the_loss_has_no_derivative_of_any_kind(case, backend):
    run, x = _function(case, backend)
    assert not run(x.clone().requires_grad_()).requires_grad
    assert not torch.func.jvp(run, (x,), (x,))[1].any()


@pytest.mark.parametrize("case", DETACHED.values(), ids=DETACHED)
def test_vmap_over_a_kernel_of_constants_raises(case):
    run, x = _function(case, "cpu")
    with pytest.raises(NotImplementedError, match=r"has no rule for torch.vmap; backend=.reference."):
        torch.vmap(run)(torch.stack([x, x]))


def test_ids_that_are_mapped_over_are_not_looked_at():
    logits, ids = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    run = lambda x, y: rlhf_fast.token_logprobs(x, y, backend="reference")  # noqa: E731
    assert torch.equal(torch.vmap(run)(logits, ids), run(logits, ids))


# --- In place ---------------------------------------------------------------------------------------------------------


def _gradients(case, backend: str, write) -> list[Tensor]:
    inputs = case.inputs("cpu", torch.float64)
    results = case.call(inputs, backend)
    written = [write(x) if x.is_floating_point() else x for x in results]
    total = sum(x.sum() for x in written if x.requires_grad)
    return list(torch.autograd.grad(total, [inputs[name] for name in case.grads], allow_unused=True))


def _halve_and_forget_the_first(x: Tensor) -> Tensor:
    kept = torch.ones_like(x)
    kept.view(-1)[:1] = 0 if x.numel() > 1 else 1
    return x * 0.5 * kept


def _halve_and_forget_the_first_in_place(x: Tensor) -> Tensor:
    x.mul_(0.5)
    if x.numel() > 1:
        x.view(-1)[0] = 0.0
    return x


@pytest.mark.parametrize(("case", "backend"), each("reference", "cpu", of=lambda case: bool(case.grads)))
def test_results_may_be_written_in_place_before_the_backward_pass(case, backend):
    expected = _gradients(case, backend, _halve_and_forget_the_first)
    found = _gradients(case, backend, _halve_and_forget_the_first_in_place)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("case", "backend"), each("cpu", of=lambda case: bool(case.grads)))
def test_a_kernel_s_inputs_that_were_changed_since_are_no_silent_error(case, backend):
    clean = case.run(case.inputs("cpu", torch.float64), backend)
    for name in case.tensors():
        inputs = case.inputs("cpu", torch.float64)
        results = case.call(inputs, backend)
        through = [x for x in results if x.requires_grad]
        upstream = [torch.linspace(0.5, 1.5, x.numel()).to(x.dtype).view(x.shape) for x in through]
        with torch.no_grad():
            inputs[name].zero_()
        try:
            found = torch.autograd.grad(through, [inputs[n] for n in case.grads], upstream)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017 (either is right)
        else:
            for n, gradient in zip(case.grads, found, strict=True):
                torch.testing.assert_close(gradient, clean[f"gradient of {n}"])


OVERLAPPING = {
    "expanded rows": lambda x: x[:1].expand(3, 7),
    "expanded columns": lambda x: x[:, :1].expand(3, 7),
    "rows that share memory": lambda x: x.as_strided((3, 7), (2, 1)),
}


@pytest.mark.parametrize("layout", OVERLAPPING.values(), ids=OVERLAPPING)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_gradient_in_the_place_of_overlapping_logits_raises(layout, backend):
    logits = layout(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"^logits of inplace_backward must not share memory .* got \(3, 7\) with"):
        rlhf_fast.token_logprobs(logits, torch.zeros(3, dtype=torch.int64), inplace_backward=True, backend=backend)


@pytest.mark.parametrize("layout", [lambda x: x[::2], lambda x: x[1:], lambda x: x.t().contiguous().t()])
def test_a_gradient_in_the_place_of_strided_logits_is_taken(layout):
    logits = layout(torch.randn(4, 7))
    leaf = logits.clone().requires_grad_()
    ids = torch.zeros(logits.shape[0], dtype=torch.int64)
    rlhf_fast.token_logprobs(leaf, ids).sum().backward()
    logits = logits.detach().requires_grad_()
    rlhf_fast.token_logprobs(logits, ids, inplace_backward=True).sum().backward()
    assert torch.equal(logits.grad, leaf.grad)
