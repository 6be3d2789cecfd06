"""patch, unpatch and patched on a made-up peer: which names are replaced, and what is said where that fails."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from importlib import import_module

import pytest
from typer.testing import CliRunner

import rlhf_fast
from rlhf_fast import integrations
from rlhf_fast.cli import app
from rlhf_fast.integrations import _patch

PEER = {
    "fakepeer/__init__.py": "",
    "fakepeer/utils.py": """
        def loss(x):
            return ("theirs", x)

        class Estimator:
            @staticmethod
            def value(x):
                return ("theirs", x)
        """,
    "fakepeer/registry.py": """
        from fakepeer.utils import loss
        LOSSES = {"plain": loss, "other": abs}
        SIZE = None
        """,
    "fakepeer/trainer.py": "from fakepeer.utils import loss as _loss\n",
    "fakepeer/late.py": "from fakepeer.utils import loss as late_loss\n",
    "fakepeer-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: fakepeer\nVersion: 1.0\n",
}
OTHER = {
    "otherpeer/__init__.py": "",
    "otherpeer/user.py": "from fakepeer.utils import loss\n",
    "ours/otherpeer.py": "PEER = 'otherpeer'\nTESTED = '1.0'\n",
}
INTEGRATION = """
    PEER = "fakepeer"
    TESTED = "1.0"

    def loss(x):
        return ("ours", x)

    def value(x):
        return ("ours", x)

    def replacements():
        return {
            "fakepeer.utils.loss": loss,
            "fakepeer.utils.Estimator.value": staticmethod(value),
            "fakepeer.registry.LOSSES.fast": value,
        }
    """
REPLACED = [
    "fakepeer.registry.LOSSES.fast",
    "fakepeer.registry.LOSSES.plain",
    "fakepeer.registry.loss",
    "fakepeer.trainer._loss",
    "fakepeer.utils.Estimator.value",
    "fakepeer.utils.loss",
]


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """Installs the made-up peer and our integration of it; returns a function that changes the integration's text."""

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(textwrap.dedent(text))

    for path, text in PEER.items():
        write(path, text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(integrations, "__path__", [*integrations.__path__, str(tmp_path / "ours")])
    monkeypatch.setattr(_patch, "_active", {})
    monkeypatch.setattr(_patch, "_replaced", {})

    def change(old: str = "", new: str = "") -> None:
        forget()
        assert old in INTEGRATION
        write("ours/fakepeer.py", INTEGRATION.replace(old, new) if old else INTEGRATION)

    for path, text in OTHER.items():
        write(path, text)
    change()
    yield change
    forget()


def forget() -> None:
    for peer in ("fakepeer", "otherpeer"):
        for name in list(sys.modules):
            if name.split(".")[0] == peer or name == f"rlhf_fast.integrations.{peer}":
                del sys.modules[name]
        vars(integrations).pop(peer, None)


def state() -> dict[str, object]:
    utils, registry, trainer = (import_module(f"fakepeer.{name}") for name in ("utils", "registry", "trainer"))
    return {
        "loss": utils.loss,
        "value": vars(utils.Estimator)["value"],
        "registry": dict(registry.LOSSES),
        "copy": registry.loss,
        "alias": trainer._loss,
    }


def test_patch_replaces_an_object_under_every_name_and_tells_them(peer):
    before = state()
    assert rlhf_fast.patch("fakepeer") == REPLACED
    after = state()
    assert after["loss"](1) == ("ours", 1)
    assert after["loss"] is after["copy"] is after["alias"] is after["registry"]["plain"]
    assert import_module("fakepeer.utils").Estimator().value(2) == ("ours", 2)
    assert after["registry"]["fast"](3) == ("ours", 3)
    assert after["registry"]["other"] is abs
    assert before["loss"](1) == ("theirs", 1)


def test_unpatch_restores_every_name_by_identity(peer):
    before = state()
    rlhf_fast.patch("fakepeer")
    assert rlhf_fast.unpatch("fakepeer") == REPLACED
    assert state() == before
    assert rlhf_fast.unpatch("fakepeer") == []


def test_a_module_imported_after_the_patch_gets_ours_and_then_theirs(peer):
    before = state()
    rlhf_fast.patch("fakepeer")
    late = import_module("fakepeer.late")
    assert late.late_loss(1) == ("ours", 1)
    rlhf_fast.unpatch("fakepeer")
    assert late.late_loss is before["loss"]


def test_a_module_of_another_peer_that_imported_the_object_gets_ours_and_then_theirs(peer):
    user = import_module("otherpeer.user")
    theirs = user.loss
    assert "otherpeer.user.loss" in rlhf_fast.patch("fakepeer")
    assert user.loss(1) == ("ours", 1)
    rlhf_fast.unpatch("fakepeer")
    assert user.loss is theirs


def test_a_package_that_the_peer_imports_and_does_not_find_is_one_line_that_names_it(peer, tmp_path):
    (tmp_path / "fakepeer" / "utils.py").write_text("import package_of_nobody.kernels\n")
    with pytest.raises(ModuleNotFoundError) as raised:
        rlhf_fast.patch("fakepeer")
    expected = "fakepeer imports package_of_nobody, which is not installed: pip install package-of-nobody"
    assert str(raised.value) == expected
    assert rlhf_fast.unpatch("fakepeer") == []


def test_a_second_patch_changes_nothing(peer):
    before = state()
    first = rlhf_fast.patch("fakepeer")
    ours = state()
    assert rlhf_fast.patch("fakepeer") == first
    assert state() == ours
    rlhf_fast.unpatch("fakepeer")
    assert state() == before


def test_patched_ends_with_its_block_also_after_an_error(peer):
    before = state()

    def fail() -> None:
        with rlhf_fast.patched("fakepeer") as names:
            assert names == REPLACED
            assert state() != before
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert state() == before


def test_patched_leaves_a_peer_patched_that_was_so_before(peer):
    rlhf_fast.patch("fakepeer")
    ours = state()
    with rlhf_fast.patched("fakepeer"):
        pass
    assert state() == ours


def test_an_unknown_peer_is_one_line_that_names_the_known_ones(peer):
    with pytest.raises(ValueError, match=r"^no integration for 'nonsense'; there is one for .*fakepeer.*$"):
        rlhf_fast.patch("nonsense")


def test_a_peer_that_is_not_installed_is_one_line(peer):
    peer('PEER = "fakepeer"', 'PEER = "fakepeer-of-nobody"')
    with pytest.raises(ModuleNotFoundError, match=r"fakepeer-of-nobody is not installed: pip install .*==1\.0"):
        rlhf_fast.patch("fakepeer")


def test_another_version_warns_and_names_both(peer):
    peer('TESTED = "1.0"', 'TESTED = "0.9"')
    with pytest.warns(UserWarning, match=r"fakepeer 1\.0 is installed; .* fakepeer 0\.9"):
        rlhf_fast.patch("fakepeer")


def test_the_tested_version_does_not_warn(peer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rlhf_fast.patch("fakepeer")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fakepeer.utils.lost", AttributeError, "fakepeer.utils has no 'lost'"),
        ("fakepeer.lost.loss", ModuleNotFoundError, "fakepeer.lost"),
        ("fakepeer.registry.SIZE", TypeError, "fakepeer.registry.SIZE must be a function or a class"),
        ("fakepeer.utils.Estimator", ValueError, "one object replaces two"),
    ],
)
def test_what_cannot_be_replaced_raises_before_anything_is(peer, name, error, message):
    peer('"fakepeer.registry.LOSSES.fast": value', f'"{name}": loss')
    before = state()
    with pytest.raises(error, match=message):
        rlhf_fast.patch("fakepeer")
    assert state() == before
    assert rlhf_fast.unpatch("fakepeer") == []


def test_the_integrations_import_without_their_peers():
    code = """
import sys
from rlhf_fast.integrations import peers
found = peers()
packages = {name.split(".")[0] for name in sys.modules}
print(len(found), *({"triton", "transformers", *(p.distribution.replace("-", "_") for p in found)} & packages))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(len(integrations.peers()))]


def test_doctor_tells_what_could_be_patched_and_what_is(peer):
    state()
    assert "fakepeer" in CliRunner().invoke(app, ["doctor"]).stdout
    rlhf_fast.patch("fakepeer")
    shown = CliRunner().invoke(app, ["doctor"]).stdout
    assert [name for name in REPLACED if name not in shown] == []
