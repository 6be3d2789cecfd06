"""flash-attn's cross_entropy_loss under our own: its formula in float64, its module where it is absent and where it is.

flash-attn needs a GPU to be built, so parity is with the formula that its source states, not with the package.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import rlhf_fast.integrations as integrations
from rlhf_fast.integrations import flash_attn
from rlhf_fast.integrations.flash_attn import MODULE, cross_entropy_loss
from rlhf_fast.testing.numerics import assert_contract

absent = pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")

N, V = 7, 40
OPTIONS = {
    "as verl and OpenRLHF call it": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"lse_square_scale": 1e-2},
    "all": {"label_smoothing": 0.2, "lse_square_scale": 1e-3, "logit_scale": 0.7, "ignore_index": 3},
}


def formula(logits, labels, label_smoothing=0.0, lse_square_scale=0.0, logit_scale=1.0, ignore_index=-100):
    z = logit_scale * logits
    lse = torch.logsumexp(z, 1)
    target = z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    counts = labels != ignore_index
    z_losses = torch.where(counts, lse_square_scale * lse**2, 0)
    losses = lse - (1 - label_smoothing) * target - label_smoothing * z.mean(1)
    return torch.where(counts, losses, 0) + z_losses, z_losses


def data(dtype=torch.float64, ignored=-100):
    torch.manual_seed(0)
    logits = (2 * torch.randn(N, V)).to(dtype)
    labels = torch.randint(4, V, (N,))
    labels[2] = ignored
    return logits, labels


def outcome(function, logits, labels, **options):
    leaf = logits.clone().requires_grad_()
    losses, z_losses = function(leaf, labels, **options)
    (losses * torch.linspace(0.5, 1.5, N)).sum().backward()
    return {"losses": losses.detach(), "z_losses": z_losses.detach(), "d logits": leaf.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_and_gradient_are_the_formula_s(options, dtype):
    logits, labels = data(dtype, options.get("ignore_index", -100))
    ours = outcome(cross_entropy_loss, logits, labels, **options)
    eager = outcome(formula, logits, labels, **options)
    oracle = outcome(formula, logits.double(), labels, **options)
    assert ours["losses"].dtype == ours["z_losses"].dtype == torch.float32
    for name, found in ours.items():
        assert_contract(name, found, eager[name], oracle[name])


@pytest.mark.parametrize("options", [{}, {"lse_square_scale": 1e-2, "logit_scale": 0.7}], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_with_label_smoothing_is_one_sum_that_is_rounded_once(dtype, options):
    logits, labels = data(dtype)
    found = outcome(cross_entropy_loss, logits, labels, label_smoothing=0.9, **options)["d logits"]
    exact = outcome(formula, logits.double(), labels, label_smoothing=0.9, **options)["d logits"]
    rounding = exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
    assert ((found.double() - exact).abs() <= 1.01 * rounding).all()


def class_weights(dtype=torch.float32):
    return (0.2 + torch.rand(V, generator=torch.Generator().manual_seed(4))).to(dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_class_weights_are_those_of_torchs_cross_entropy(dtype, smoothing):
    logits, labels = data(dtype)
    weight = class_weights()

    def torchs(logits, labels):
        weights = weight.to(logits.dtype)
        losses = torch.nn.functional.cross_entropy(logits, labels, weights, reduction="none", label_smoothing=smoothing)
        return losses, torch.zeros_like(losses)

    ours = outcome(cross_entropy_loss, logits, labels, weight=weight, label_smoothing=smoothing)
    eager, oracle = outcome(torchs, logits, labels), outcome(torchs, logits.double(), labels)
    for name, found in ours.items():
        assert_contract(name, found, eager[name], oracle[name])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighed", [True, False], ids=["class weights", "plain"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_module_is_torchs_with_a_z_loss(reduction, weighed, smoothing):
    logits, labels = data(ignored=3)
    weight = class_weights(torch.float64) if weighed else None
    module = flash_attn.CrossEntropyLoss(3, reduction, smoothing, 0.7, 1e-2, return_z_loss=True, weight=weight)
    loss, z_loss = module(logits, labels)
    plain = torch.nn.CrossEntropyLoss(weight, ignore_index=3, reduction=reduction, label_smoothing=smoothing)
    z_losses = 1e-2 * torch.logsumexp(0.7 * logits, 1) ** 2 * (labels != 3)
    expected = {"none": z_losses, "sum": z_losses.sum(), "mean": z_losses.sum() / (labels != 3).sum()}[reduction]
    torch.testing.assert_close(z_loss, expected)
    torch.testing.assert_close(loss, plain(0.7 * logits, labels) + expected)


def test_the_module_refuses_what_is_no_reduction_and_class_weights_that_do_not_fit():
    with pytest.raises(NotImplementedError, match="reduction must be mean, none or sum, got 'median'"):
        flash_attn.CrossEntropyLoss(reduction="median")
    logits, labels = data()
    with pytest.raises(ValueError, match=rf"weight must be \({V},\) of a floating type, got \(3,\)"):
        flash_attn.CrossEntropyLoss(weight=torch.ones(3))(logits, labels)


def test_a_given_lse_changes_nothing():
    logits, labels = data(torch.float32)
    given = outcome(cross_entropy_loss, logits, labels, precomputed_lse=torch.logsumexp(logits, 1))
    expected = outcome(cross_entropy_loss, logits, labels)
    for name, found in given.items():
        assert torch.equal(found, expected[name]), name


def test_the_result_is_a_tuple_whose_second_part_has_no_gradient():
    logits, labels = data(torch.float32)
    found = cross_entropy_loss(logits.requires_grad_(), labels, lse_square_scale=0.1)
    assert type(found) is tuple
    assert found[0].requires_grad
    assert not found[1].requires_grad


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "lse_square_scale": 0.1}], ids=["plain", "all"])
def test_an_ignored_row_is_not_looked_at(options):
    logits, labels = data(torch.float32)
    logits[2] = torch.nan
    found = outcome(cross_entropy_loss, logits, labels, **options)
    assert found["losses"][2] == 0
    assert (found["d logits"][2] == 0).all()
    assert all(x.isfinite().all() for x in found.values())


def test_a_confident_token_keeps_its_loss_and_its_gradient():
    logits = torch.zeros(1, 2, requires_grad=True)
    with torch.no_grad():
        logits[0, 0] = 20.0
    losses, _ = cross_entropy_loss(logits, torch.tensor([0]))
    losses.sum().backward()
    expected = torch.tensor(2.0611536e-9)  # log1p(exp(-20))
    torch.testing.assert_close(losses[0].detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad[0], torch.stack([-expected, expected]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "lse_square_scale": 0.1}], ids=["plain", "all"])
def test_inplace_backward_gives_the_same_gradient(options):
    logits, labels = data(torch.float32)
    inplace = outcome(cross_entropy_loss, logits, labels, inplace_backward=True, **options)
    expected = outcome(cross_entropy_loss, logits, labels, **options)
    for name, found in inplace.items():
        assert torch.equal(found, expected[name]), name


def test_inplace_backward_writes_over_the_logits():
    logits, labels = data(torch.float32)
    leaf = logits.requires_grad_()
    losses, _ = cross_entropy_loss(leaf, labels, inplace_backward=True)
    losses.sum().backward()
    assert leaf.grad.data_ptr() == leaf.data_ptr()


def test_strided_logits_give_what_their_copy_gives():
    logits, labels = data(torch.float32)
    wide = torch.cat([logits, torch.full((N, 3), torch.nan)], 1)[:, :V]
    assert torch.equal(cross_entropy_loss(wide, labels)[0], cross_entropy_loss(logits, labels)[0])


@pytest.mark.parametrize("shapes", [((2, 3, 5), (2, 3)), ((3, 5), (2,))], ids=str)
def test_shapes_that_do_not_fit_are_named(shapes):
    logits, labels = torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=torch.int64)
    with pytest.raises(ValueError, match="logits must be"):
        cross_entropy_loss(logits, labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_label_outside_the_vocabulary_raises(smoothing):
    with pytest.raises(IndexError, match="outside"):
        cross_entropy_loss(torch.zeros(1, 5), torch.tensor([5]), label_smoothing=smoothing)


# --- Vocabulary parallel ----------------------------------------------------------------------------------------------

SHARDED = {"plain": {}, "all": {"label_smoothing": 0.1, "lse_square_scale": 1e-2, "logit_scale": 0.8}}


def columns(x, rank):
    return x[:, rank * V // 2 : (rank + 1) * V // 2].contiguous()


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    logits, labels = data()
    found = {
        name: outcome(cross_entropy_loss, columns(logits, rank), labels, process_group=dist.group.WORLD, **options)
        for name, options in SHARDED.items()
    }
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", SHARDED)
def test_shards_of_the_vocabulary_give_the_whole_s_losses_and_their_columns_of_the_gradient(shards, case, rank):
    expected = outcome(formula, *data(), **SHARDED[case])
    expected["d logits"] = columns(expected["d logits"], rank)
    for name, found in shards[rank][case].items():
        torch.testing.assert_close(found, expected[name], rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


# --- Where flash-attn is absent, and where it is installed ------------------------------------------------------------


@pytest.fixture
def installed():
    flash_attn.install()
    yield
    flash_attn.uninstall()


@absent
def test_install_offers_the_name_that_trainers_import(installed):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss as imported

    assert imported is cross_entropy_loss


@absent
def test_after_install_flash_attn_itself_is_still_absent(installed):
    assert find_spec("flash_attn") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn")


@absent
def test_after_install_transformers_finds_no_flash_attn(installed, monkeypatch):
    utils = pytest.importorskip("transformers.utils.import_utils", reason="needs transformers")
    monkeypatch.setattr(utils, "is_torch_cuda_available", lambda: True)  # it looks no further without a GPU
    utils.is_flash_attn_2_available.cache_clear()
    assert not utils.is_flash_attn_2_available()


@absent
def test_uninstall_takes_the_name_away_again(installed):
    flash_attn.uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(MODULE)


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A package of flash-attn's name and version with the one module; returns its function."""
    folder = tmp_path / "flash_attn" / "ops" / "triton"
    folder.mkdir(parents=True)
    for package in (folder, *folder.parents[:2]):
        (package / "__init__.py").write_text("")
    (folder / "cross_entropy.py").write_text("def cross_entropy_loss(logits, labels):\n    return 'theirs'\n")
    losses = tmp_path / "flash_attn" / "losses"
    losses.mkdir()
    (losses / "__init__.py").write_text("")
    (losses / "cross_entropy.py").write_text(f"from {MODULE} import cross_entropy_loss\nclass CrossEntropyLoss: pass\n")
    (tmp_path / "flash_attn" / "user.py").write_text(f"from {MODULE} import cross_entropy_loss as loss\n")
    information = tmp_path / "flash_attn-2.8.3.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module(MODULE).cross_entropy_loss
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


@absent
def test_patch_replaces_an_installed_flash_attn_s_and_unpatch_restores_it(made_up):
    user = importlib.import_module("flash_attn.user")
    with integrations.patched("flash_attn") as names:
        module = "flash_attn.losses.cross_entropy"
        expected = [f"{module}.CrossEntropyLoss", f"{module}.cross_entropy_loss", f"{MODULE}.cross_entropy_loss"]
        assert names == [*expected, "flash_attn.user.loss"]
        assert sys.modules[module].CrossEntropyLoss is flash_attn.CrossEntropyLoss
        assert sys.modules[MODULE].cross_entropy_loss is user.loss is cross_entropy_loss
    assert sys.modules[MODULE].cross_entropy_loss is user.loss is made_up


@absent
def test_install_raises_where_flash_attn_is_installed(made_up):
    with pytest.raises(RuntimeError, match="flash-attn is installed"):
        flash_attn.install()


def test_the_example_runs(capsys):
    runpy.run_path(
        str(Path(__file__).parents[2] / "examples" / "dropin" / "flash_attn_cross_entropy.py"), run_name="__main__"
    )
    assert "float64" in capsys.readouterr().out
