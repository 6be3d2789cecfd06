"""What a person installs: package list, sdist, and the wheel made from it, in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = ("csrc", "kernels", "rlhf_fast", "tests", "benchmarks", "examples", "docs")
TOP = ("pyproject.toml", "setup.py", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")


def clean(paths) -> set[str]:
    dirty = ("__pycache__", ".egg-info", ".so", ".pyc", ".pyd")
    return {p for p in paths if not any(p.endswith(d) or f"{d}/" in p for d in dirty)}


def files(folder: Path) -> set[str]:
    return clean(str(p.relative_to(ROOT)) for p in folder.rglob("*") if p.is_file())


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "tree"
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    return folder / run(sys.executable, "-c", code, cwd=copy).stdout.split()[-1]


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, without CUDA, clones and optimisation to save time, and without OpenMP to show that it is
    not needed."""
    folder = tmp_path_factory.mktemp("wheel")
    arguments = "-DRLHF_FAST_CUDA=OFF -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON -DCMAKE_CXX_FLAGS=-DRLHF_FAST_NO_CLONES"
    arguments += " -DCMAKE_CXX_FLAGS_RELEASE=-O0"
    run(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, sdist,
        env={**os.environ, "RLHF_FAST_CMAKE_ARGS": arguments},
    )  # fmt: skip
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that has this wheel, and torch from ours."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    # A plain line in a .pth file adds the folder, but not the editable install that our own .pth files make there.
    Path(site, "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    return python


def test_the_package_list_equals_the_tree():
    found = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for p in (ROOT / "rlhf_fast").rglob("*.py")
        if "__pycache__" not in p.parts
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"rlhf_fast.kernels"}


def test_every_package_has_an_init():
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        folder = ROOT / mapped.get(package, package.replace(".", "/"))
        assert (folder / "__init__.py").is_file(), f"{package}: no __init__.py in {folder.relative_to(ROOT)}"


def test_the_version_stands_once():
    import rlhf_fast

    assert PROJECT["project"]["version"] == rlhf_fast.__version__


def test_the_sdist_holds_the_whole_tree(sdist):
    with tarfile.open(sdist) as archive:
        names = clean(m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile())
    expected = {f for name in SOURCES for f in files(ROOT / name)} | {f for f in TOP if (ROOT / f).is_file()}
    assert expected - names == set()


def test_the_wheel_holds_our_packages_and_one_native_module_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    native = {n for n in names if n.startswith("rlhf_fast/_native.")}
    kernels = {f.replace("kernels/src", "rlhf_fast/kernels") for f in files(ROOT / "kernels" / "src")}
    assert len(native) == 1
    assert names - native == files(ROOT / "rlhf_fast") | kernels


def test_the_installed_wheel_runs_an_op_without_openmp(installed, tmp_path):
    code = (
        "import torch, rlhf_fast, rlhf_fast._native as native, rlhf_fast.kernels as kernels;"
        "x = rlhf_fast.token_logprobs(torch.zeros(3, 4), torch.arange(3), backend='cpu');"
        "print(rlhf_fast.__file__, kernels.__file__, native.with_cuda, x.exp().tolist())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = run(installed, "-c", code, cwd=tmp_path, env=environment).stdout.split(maxsplit=3)
    assert all(Path(place).is_relative_to(installed.parents[1]) for place in out[:2])
    assert out[2:] == ["False", "[0.25, 0.25, 0.25]\n"]


def test_without_a_compiler_the_install_fails_with_one_sentence(sdist, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(sdist)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert output.count("rlhf_fast: no C++ compiler found: install g++ or clang++") == 1
    assert "[1 lines of output]" in output
    assert "Traceback" not in output
