"""Kernels are launched by rlhf_fast.kernels.launch alone, which chooses the device and the compiler's options."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from rlhf_fast.kernels import launch

ROOT = Path(__file__).parents[2]
LAUNCHES = ("run", "warmup")  # methods of a kernel that compile or launch it


def direct_launches(source: str) -> list[int]:
    """The lines that call what a subscript gives, as kernel[grid](...) does, or a kernel's own methods."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Subscript) or (isinstance(call.func, ast.Attribute) and call.func.attr in LAUNCHES)
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "kernels" / "src").glob("*.py")), ids=lambda path: path.name)
def test_no_kernel_is_launched_but_by_launch(path):
    assert len(direct_launches(path.read_text())) == (1 if path.name == "launch.py" else 0)


def test_a_direct_launch_is_found():
    assert direct_launches("kernel[(4,)](x)\nkernel.run(x)\nlaunch(kernel, (4,), x)") == [1, 2]


def test_kernels_are_compiled_in_their_package_alone():
    files = [path for folder in ("rlhf_fast", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if "\n@triton.jit" in path.read_text()] == []


@pytest.fixture
def current(monkeypatch):
    """The index of the current device, as torch.accelerator.device_index sets it."""
    seen = {"device": 0}

    @contextmanager
    def device_index(index):
        before, seen["device"] = seen["device"], seen["device"] if index is None else index
        yield
        seen["device"] = before

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    return seen


class Kernel:
    """Stands in for a Triton kernel: says where and with what it was launched."""

    def __init__(self, current, fn=lambda x: None):
        self.current, self.fn, self.launches = current, fn, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.current["device"], grid, arguments, options))


def test_a_kernel_runs_on_the_device_of_its_tensors_and_fuses_multiply_and_add(current, monkeypatch):
    monkeypatch.setattr(launch, "Tensor", (SimpleNamespace, torch.Tensor))
    layout = {"is_neg": lambda: False, "is_contiguous": lambda: True}
    kernel, there = Kernel(current), SimpleNamespace(device=torch.device("cuda", 1), **layout)
    launch.launch(kernel, (4,), None, there, 7, BLOCK=16)
    launch.launch(kernel, (2,), torch.zeros(1), num_warps=8)
    assert kernel.launches[0] == (1, (4,), (None, there, 7), {"enable_fp_fusion": True, "BLOCK": 16})
    assert kernel.launches[1][0] == 0
    assert current["device"] == 0


def test_a_number_reaches_a_kernel_in_float64(current, monkeypatch):
    def narrow(x, clip):
        pass

    def wide(x, clip: tl.float64):
        pass

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launch.launch(Kernel(current, wide), (1,), torch.zeros(1), 0.1)
    with pytest.raises(TypeError, match=r"narrow takes clip as float32: it must be tl\.float64"):
        launch.launch(Kernel(current, narrow), (1,), torch.zeros(1), 0.1)


def test_a_tensor_goes_to_a_kernel_with_its_strides_or_contiguous(current):
    kernel, x = Kernel(current), torch.zeros(4, 6)
    launch.launch(kernel, (1,), x.t(), 6)
    launch.launch(kernel, (1,), x, (x[:, ::2], x), ((6, 2), (6, 1)))
    for lost in (x.t(), x[:, ::2], x[:1].expand(4, 6), torch._neg_view(x)):
        with pytest.raises(ValueError, match="without its strides"):
            launch.launch(kernel, (1,), lost, x, 4)
