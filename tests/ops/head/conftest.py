"""PyTorch's products with a float32 result, which the CPU has not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.ops.head import _products


def refused(message):
    raise RuntimeError(message)


@pytest.fixture
def pytorch(monkeypatch):
    """pytorch(version): the mm and addmm with an output type of that version, with what it refuses, on the CPU."""

    def of(version):
        def mm(a, b, dtype, *, out):
            if "rocm" in version:
                refused("gemm input type at::BFloat16 and output type float is not supported for ROCm")
            return out.copy_(a.to(dtype) @ b.to(dtype))

        def addmm(total, a, b, dtype, *, beta, alpha, out):
            if "rocm" in version:
                refused("gemm input type at::BFloat16 and output type float is not supported for ROCm")
            if version.startswith("2.9") and total.dtype != b.dtype:
                refused(f"self and mat2 must have the same dtype, but got {total.dtype} and {b.dtype}")
            return out.copy_(torch.addmm(total, a.to(dtype), b.to(dtype), beta=beta, alpha=alpha))

        aten = SimpleNamespace(mm=SimpleNamespace(dtype_out=mm), addmm=SimpleNamespace(dtype_out=addmm))
        hip = SimpleNamespace(hip="7.0" if "rocm" in version else None)
        its = {"__version__": version, "version": hip, "ops": SimpleNamespace(aten=aten)}
        its |= {"mul": torch.mul, "float32": torch.float32}
        monkeypatch.setattr(_products, "torch", SimpleNamespace(**its))
        monkeypatch.setattr(_products, "takes", lambda x: x.element_size() < 4)  # as on a GPU
        _products.capability.cache_clear()

    yield of
    monkeypatch.undo()
    _products.capability.cache_clear()
