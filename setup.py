"""Builds rlhf_fast._native with CMake and ninja; all metadata is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def has_cxx_compiler() -> bool:
    chosen = os.environ.get("CXX")
    return any(shutil.which(name) for name in (shlex.split(chosen)[:1] if chosen else ("c++", "g++", "clang++")))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        architectures = os.environ.get("RLHF_FAST_CUDA_ARCHITECTURES")
        configure = [
            "cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja",
            # Named every time: the folder is kept, and may remember the ones of an isolated build that is gone.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DRLHF_FAST_OUTPUT_DIR={target.parent}",
            *([f"-DRLHF_FAST_CUDA_ARCHITECTURES={architectures}"] if architectures else []),
            *shlex.split(os.environ.get("RLHF_FAST_CMAKE_ARGS", "")),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


# Said before anything else is done, so that it is the one line that pip shows.
if {"bdist_wheel", "editable_wheel", "build", "build_ext", "install"} & set(sys.argv) and not has_cxx_compiler():
    sys.exit(
        "rlhf_fast: no C++ compiler found: install g++ or clang++ (Debian/Ubuntu: apt-get install g++), "
        "or set CXX to one."
    )

# Without it everything but the C++ and CUDA kernels is there at once, and build_ext --inplace adds it later.
wanted = os.environ.get("RLHF_FAST_NATIVE", "1") != "0"
modules = [Extension("rlhf_fast._native", sources=[])] if wanted else []
setup(ext_modules=modules, cmdclass={"build_ext": CMakeBuild})
