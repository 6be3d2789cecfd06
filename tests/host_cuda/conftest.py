import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """compiled(name): the CUDA kernels of `name`.cpp, compiled for the host with one thread per CUDA thread."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ (std::barrier, std::jthread)")

    @functools.cache
    def library(name):
        path = tmp_path_factory.mktemp("host_cuda") / f"{name}.so"
        include = [f"-I{HERE}", f"-I{HERE.parents[1] / 'csrc'}"]
        flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-DRLHF_FAST_NO_CLONES"]
        subprocess.run([compiler, *flags, *include, str(HERE / f"{name}.cpp"), "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))

    return library
