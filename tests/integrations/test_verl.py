"""verl's log-probabilities, losses and penalties on our ops beside verl's own, and the patch and the registration."""

import inspect
import runpy
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from rlhf_fast.integrations import patch, patched, unpatch
from rlhf_fast.integrations import verl as ours
from rlhf_fast.testing.numerics import assert_contract
from tests.integrations import verl_ranks

core = pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl (make peers)")
import verl.utils.experimental.torch_functional as verl_fused  # noqa: E402
import verl.utils.kernel.linear_cross_entropy as verl_kernel  # noqa: E402
import verl.utils.torch_functional as verl_functional  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
LOGPROBS, LOSSES = ours.logprobs, ours.losses


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def ids(*shape, high, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def evaluated(function, leaves, *rest):
    """Every result of function(*leaves, *rest), then the gradients of a weighted sum of the results."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    results = function(*leaves, *rest)
    results = results if isinstance(results, tuple) else (results,)
    trained = [x for x in results if x.requires_grad]
    sum((x.double() * draw(*x.shape, seed=9 + k).double()).sum() for k, x in enumerate(trained)).backward()
    return [x.detach() for x in results] + [x.grad for x in leaves]


def assert_same(mine, theirs, leaves, *rest, theirs_exact=None):
    got, plain = evaluated(mine, leaves, *rest), evaluated(theirs, leaves, *rest)
    exact = evaluated(theirs_exact or theirs, [x.double() for x in leaves], *rest)
    assert len(got) == len(plain)
    for k, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        assert a.dtype == b.dtype, k
        assert_contract(f"output {k}", a, b, c.double())


# --- Log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 41), (7, 41), (1, 1, 1)])
@pytest.mark.parametrize("name", ["logprobs_from_logits", "logprobs_from_logits_v2"])
def test_logprobs_from_logits_are_verls(name, shape, dtype):
    labels = ids(*shape[:-1], high=shape[-1])
    logits = draw(*shape, dtype=dtype, scale=3)
    assert_same(getattr(LOGPROBS, name), getattr(verl_functional, name), [logits], labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["entropy_from_logits", "entropy_from_logits_with_chunking"])
def test_entropies_are_verls(name, dtype):
    theirs = getattr(verl_functional, name)
    # verl's chunks are float32, whatever the logits are.
    assert_same(getattr(LOGPROBS, name), theirs, [draw(13, 41, dtype=dtype, scale=3)],
                theirs_exact=verl_functional.entropy_from_logits)  # fmt: skip


def test_strided_logits_are_read_in_place():
    logits, labels = draw(3, 6, 41), ids(3, 5, high=41)
    assert torch.equal(
        LOGPROBS.logprobs_from_logits(logits[:, :-1], labels),
        LOGPROBS.logprobs_from_logits(logits[:, :-1].contiguous(), labels),
    )


def test_an_ignored_label_has_logprob_and_gradient_zero():
    logits, labels = draw(2, 3, 11).requires_grad_(), ids(2, 3, high=11)
    labels[0, 1] = -100
    logprobs = LOGPROBS.logprobs_from_logits(logits, labels)
    logprobs.sum().backward()
    assert logprobs[0, 1] == 0
    assert logits.grad[0, 1].eq(0).all()
    assert logits.grad[0, 0].ne(0).any()


def test_a_confident_token_keeps_its_logprob_where_verls_is_zero():
    logits = torch.tensor([[20.0, 0.0, -5.0]])
    exact = verl_functional.logprobs_from_logits(logits.double(), torch.tensor([0]))
    assert LOGPROBS.logprobs_from_logits(logits, torch.tensor([0])).item() == pytest.approx(exact.item(), rel=1e-6)


def test_backward_leaves_the_logits_as_they_are_on_the_cpu():
    logits = draw(4, 11).requires_grad_()
    before = logits.detach().clone()
    LOGPROBS.logprobs_from_logits(logits, ids(4, high=11), inplace_backward=True).sum().backward()
    assert torch.equal(logits.detach(), before)


# --- From hidden states -----------------------------------------------------------------------------------------------


def fused_head(hidden, weight, labels, temperature):
    """The definition in the type of its inputs; verl's function is in float32 inside."""
    logits = hidden @ weight.t() / temperature
    return verl_functional.logprobs_from_logits(logits, labels), verl_functional.entropy_from_logits(logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (37,)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_fused_head_is_verls(temperature, shape, dtype):
    hidden, weight = draw(*shape, 16, dtype=dtype), draw(41, 16, dtype=dtype, seed=2)
    labels = ids(*shape, high=41)

    mine, theirs = LOGPROBS.FusedLinearForPPO(chunk_size=8), verl_fused.FusedLinearForPPO(chunk_size=8)
    assert_same(mine, theirs, [hidden, weight], labels, temperature, theirs_exact=fused_head)
    apply, their_apply = LOGPROBS.FusedLinearForPPOFunction.apply, verl_fused.FusedLinearForPPOFunction.apply
    assert_same(
        apply, their_apply, [hidden, weight], labels, temperature, 8, theirs_exact=lambda *x: fused_head(*x[:-1])
    )


def test_the_fused_head_under_autocast_computes_in_the_autocast_type_as_verls():
    hidden, weight, labels = draw(6, 16), draw(41, 16, seed=2), ids(6, high=41)

    def autocast(module):
        def run(*inputs):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return module(*inputs)

        return run

    def exact(hidden, weight, labels):
        return fused_head(hidden.bfloat16().double(), weight.bfloat16().double(), labels, 1.0)

    mine, theirs = autocast(LOGPROBS.FusedLinearForPPO()), autocast(verl_fused.FusedLinearForPPO())
    assert_same(mine, theirs, [hidden, weight], labels, theirs_exact=exact)


def test_the_liger_choice_gives_entropies_in_float32():
    hidden, weight = draw(6, 16, dtype=torch.bfloat16), draw(41, 16, dtype=torch.bfloat16, seed=2)
    module = LOGPROBS.FusedLinearForPPO(impl_backend="liger")
    assert [x.dtype for x in module(hidden, weight, ids(6, high=41))] == [torch.float32] * 2
    with pytest.raises(ValueError, match="impl_backend must be torch or liger, got 'npu'"):
        LOGPROBS.FusedLinearForPPO(impl_backend="npu")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_linear_cross_entropy_is_what_its_definition_says(reduction):
    # verl's own is a kernel for one GPU. Both results are flat, whatever the shape of hidden.
    def definition(hidden, weight, labels, temperature, reduction):
        logprobs, entropy = fused_head(hidden.flatten(0, 1), weight, labels.flatten(), temperature)
        return logprobs if reduction == "none" else getattr(logprobs, reduction)(), entropy

    leaves = [draw(2, 9, 128), draw(41, 128, seed=2, scale=0.1)]
    assert_same(LOGPROBS.linear_cross_entropy, definition, leaves, ids(2, 9, high=41), 1.5, reduction)
    with pytest.raises(ValueError, match="reduction must be one of none, sum, mean, got 'max'"):
        LOGPROBS.linear_cross_entropy(*leaves, ids(2, 9, high=41), reduction="max")


def test_gradients_of_hidden_add_up_over_the_ranks_of_a_sharded_head(tmp_path):
    mp.start_processes(verl_ranks.run, args=(str(tmp_path),), nprocs=verl_ranks.WORLD, start_method="spawn")
    *whole, grad_weight = verl_ranks.evaluated(*verl_ranks.inputs())
    for rank, rows in enumerate(grad_weight.chunk(verl_ranks.WORLD)):
        for mine, exact in zip(torch.load(tmp_path / f"{rank}.pt"), [*whole, rows], strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)


# --- Losses and penalties ---------------------------------------------------------------------------------------------

MASK = (torch.arange(12)[None] < torch.tensor([12, 3, 0, 7])[:, None]).long()
GLOBAL = {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 9, "loss_scale_factor": 11}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, GLOBAL, {"dp_size": 1, "global_batch_size": 5}])
@pytest.mark.parametrize("mode", LOSSES.MODES)
def test_aggregation_is_verls(mode, options, dtype):
    mine, theirs = (lambda x, f=f: f(x, MASK, mode, **options) for f in (LOSSES.agg_loss, core.agg_loss))
    assert_same(mine, theirs, [draw(4, 12, dtype=dtype)])


@pytest.mark.parametrize("mode", [m for m in LOSSES.MODES if m != "seq-mean-token-mean"])
def test_aggregation_of_float64_is_exact(mode):
    # verl's are with a mask of float64, but for a 1e-8 added to the length of a sequence.
    mine, theirs = (lambda x, f=f: f(x, MASK.double(), mode, 2, 37, 9) for f in (LOSSES.agg_loss, core.agg_loss))
    assert_same(mine, theirs, [draw(4, 12, dtype=torch.float64)])


@pytest.mark.parametrize("mask", [MASK.bool(), MASK.float(), 0.5 * MASK])
@pytest.mark.parametrize("mode", LOSSES.MODES)
def test_aggregation_takes_masks_of_any_type_as_verls(mode, mask):
    torch.testing.assert_close(LOSSES.agg_loss(draw(4, 12), mask, mode), core.agg_loss(draw(4, 12), mask, mode))


def test_aggregation_refuses_what_verls_refuses():
    for options, message in (
        ({"loss_agg_mode": "seq-sum"}, "loss_agg_mode must be one of token-mean.*got 'seq-sum'"),
        ({"loss_agg_mode": "token-mean", "dp_size": 2}, "batch_num_tokens of the whole batch must be given"),
        ({"loss_agg_mode": "seq-mean-token-sum", "dp_size": 2}, "global_batch_size of the whole batch must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            LOSSES.agg_loss(draw(4, 12), MASK, **options)
        with pytest.raises(ValueError):  # noqa: PT011
            core.agg_loss(draw(4, 12), MASK, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", LOSSES.MODES)
@pytest.mark.parametrize("options", [{}, GLOBAL])
def test_the_value_loss_is_verls(options, mode, dtype):
    returns, values = draw(4, 12, dtype=dtype, seed=3), draw(4, 12, dtype=dtype, seed=4)

    def run(function):
        return lambda x: function(x, returns.to(x.dtype), values.to(x.dtype), MASK, 0.4, mode, **options)

    assert_same(run(LOSSES.compute_value_loss), run(core.compute_value_loss), [draw(4, 12, dtype=dtype)])


def test_the_value_loss_needs_the_batchs_count_where_ranks_are_averaged():
    x = draw(4, 12)
    with pytest.raises(ValueError, match="batch_num_tokens of the whole batch must be given for dp_size 2"):
        LOSSES.compute_value_loss(x, x, x, MASK, 0.2, dp_size=2)


@pytest.mark.parametrize("mode", LOSSES.MODES)
def test_the_entropy_loss_is_verls(mode):
    mine, theirs = (lambda x, f=f: f(x, MASK, mode) for f in (LOSSES.compute_entropy_loss, core.compute_entropy_loss))
    assert_same(mine, theirs, [draw(4, 12, 19, scale=2)])


PENALTIES = ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*PENALTIES, *(f"{name}+" for name in PENALTIES)])
def test_penalties_and_their_gradients_are_verls(name, dtype):
    leaves = [-draw(4, 12, dtype=dtype).abs(), -draw(4, 12, dtype=dtype, seed=2).abs()]
    leaves[0][0, :3] = torch.tensor([-3.0, -30.0, -0.1]).to(dtype)  # inside, and beyond either clamp
    leaves[1][0, :3] = torch.tensor([-0.2, -0.1, -30.0]).to(dtype)
    assert_same(LOSSES.kl_penalty, core.kl_penalty, leaves, name)
    if not name.endswith("+"):
        assert_same(LOSSES.kl_penalty_forward, core.kl_penalty_forward, leaves, name)


@pytest.mark.parametrize("name", ["full", "full+"])
def test_the_full_penalty_is_the_kl_over_the_vocabulary(name):
    reference = draw(2, 3, 17, seed=2)

    def definition(logits, name):
        ours, theirs = logits.log_softmax(-1), reference.to(logits.dtype).log_softmax(-1)
        return (ours.exp() * (ours - theirs)).sum(-1)

    assert_same(lambda x, name: LOSSES.kl_penalty(x, reference, name), definition, [draw(2, 3, 17)], name)
    with pytest.raises(NotImplementedError):
        core.kl_penalty(reference, reference, name)


def test_an_unknown_penalty_is_not_implemented_as_in_verl():
    x = draw(2, 3)
    with pytest.raises(NotImplementedError, match=r"kl_penalty must be one of kl, k1.* got 'k4'"):
        LOSSES.kl_penalty(x, x, "k4+")


# --- The patch --------------------------------------------------------------------------------------------------------

HOMES = {
    "verl.trainer.ppo.core_algos": core,
    "verl.utils.torch_functional": verl_functional,
    "verl.utils.experimental.torch_functional": verl_fused,
    "verl.utils.kernel.linear_cross_entropy": verl_kernel,
}
ENTRIES = {*ours.POLICY_LOSSES, *ours.ADVANTAGE_ESTIMATORS}


def standing(dotted):
    """What verl has at a dotted name of `replacements()`."""
    for home, module in HOMES.items():
        if dotted.startswith(f"{home}.") and dotted.count(".") == home.count(".") + 1:
            return vars(module)[dotted.rpartition(".")[2]]
    registry, name = dotted.split(".")[-2:]
    return getattr(core, registry).get(name)


def test_patch_puts_ours_everywhere_and_unpatch_gives_everything_back():
    replacements = ours.replacements()
    before = {name: standing(name) for name in replacements}
    registries = dict(core.POLICY_LOSS_REGISTRY), dict(core.ADV_ESTIMATOR_REGISTRY)
    replaced = patch("verl")
    try:
        assert patch("verl") == replaced
        assert set(replacements) <= set(replaced)
        assert all(standing(name) is replacement for name, replacement in replacements.items())
        assert core.get_policy_loss_fn("vanilla") is ours.policy.compute_policy_loss_vanilla
        assert core.get_adv_estimator_fn("gae") is ours.advantages.compute_gae_advantage_return
        assert core.verl_F.masked_whiten is ours.advantages.masked_whiten
        assert "rlhf_fast_gspo" in core.POLICY_LOSS_REGISTRY
    finally:
        assert unpatch("verl") == replaced
    assert all(standing(name) is original for name, original in before.items())
    assert registries == (core.POLICY_LOSS_REGISTRY, core.ADV_ESTIMATOR_REGISTRY)


@pytest.fixture
def registries_as_before():
    registries = core.POLICY_LOSS_REGISTRY, core.ADV_ESTIMATOR_REGISTRY
    before = [dict(registry) for registry in registries]
    yield
    for registry, original in zip(registries, before, strict=True):
        registry.clear()
        registry.update(original)


def test_ours_are_registered_without_a_patch_and_outlive_one(registries_as_before):
    vanilla = core.get_policy_loss_fn("vanilla")
    assert set(ours.register()) == ENTRIES
    assert set(ours.register()) == ENTRIES
    assert core.get_policy_loss_fn("vanilla") is vanilla
    with patched("verl"):
        pass
    for name, entry in ours.POLICY_LOSSES.items():
        assert core.get_policy_loss_fn(name) is entry
        assert entry.func is ours.policy.LOSSES[name.removeprefix("rlhf_fast_")]
    for name, entry in ours.ADVANTAGE_ESTIMATORS.items():
        assert core.get_adv_estimator_fn(name) is entry


def test_every_loss_and_estimator_of_verl_has_ours_but_those_that_call_others():
    assert set(core.POLICY_LOSS_REGISTRY) - set(ours.policy.LOSSES) == {"bypass_mode"}
    assert set(core.ADV_ESTIMATOR_REGISTRY) - set(ours.advantages.ESTIMATORS) == {"gdpo"}


def parameters(function):
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("dotted", [n for n, f in ours.replacements().items() if inspect.isfunction(f)])
def test_every_function_has_verls_parameters(dotted):
    mine, theirs = ours.replacements()[dotted], standing(dotted)
    if dotted.endswith("linear_cross_entropy"):  # the apply of an autograd function, which shows none
        theirs = partial(verl_kernel.LinearCrossEntropy.forward, None)
    assert parameters(mine) == parameters(theirs)


def test_the_tested_version_is_the_one_installed():
    assert metadata.version(ours.PEER) == ours.TESTED


def test_the_example_prints_the_same_numbers_twice(capsys, registries_as_before):
    root = Path(__file__).parents[2]
    runpy.run_path(str(root / "examples/dropin/verl_losses.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    compared = {row[0]: [float(x) for x in row[1:]] for row in rows if row[0].startswith(("loss", "gradient", "actor"))}
    assert len(compared) == 5
    for name, (theirs, mine) in compared.items():
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_of_squared_probabilities_and_its_gradient_are_verls(dtype):
    logits = 3 * torch.randn(4, 5, 31, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = {}
    for key, function, values in (
        ("ours", ours.logprobs.calculate_sum_pi_squared_from_logits, logits),
        ("verl's", verl_functional.calculate_sum_pi_squared_from_logits, logits),
        ("exact", verl_functional.calculate_sum_pi_squared_from_logits, logits.double()),
    ):
        leaf = values.clone().requires_grad_()
        with torch.no_grad():
            plain = function(leaf)
        result = function(leaf)
        result.square().sum().backward()
        found[key] = plain, result.detach(), leaf.grad
        assert plain.dtype == values.dtype
    for what, mine, theirs, exact in zip(("value", "with gradient", "gradient"), *found.values(), strict=True):
        assert_contract(what, mine, theirs, exact)


def test_the_log_probabilities_of_flash_attns_name_are_float32_and_0_for_an_ignored_label():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(2)).bfloat16()
    labels = torch.tensor([3, 0, -100, 10, 7])
    found = ours.logprobs.logprobs_from_logits_flash_attn(logits, labels)
    expected = logits.double().log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.where(labels == -100, 0.0, expected), rtol=1e-6, atol=1e-6)


def test_linear_cross_entropy_is_the_apply_of_verls_class():
    assert ours.logprobs.LinearCrossEntropy.apply is ours.logprobs.linear_cross_entropy
