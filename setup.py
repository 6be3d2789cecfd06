"""Builds rlhf_fast._native with CMake and ninja; all metadata is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def has_cxx_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++"))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if not has_cxx_compiler():
            sys.exit(
                "rlhf_fast: no C++ compiler found: install g++ or clang++ (Debian/Ubuntu: apt-get install g++), "
                "or set CXX to one."
            )
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        architectures = os.environ.get("RLHF_FAST_CUDA_ARCHITECTURES")
        configure = [
            "cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRLHF_FAST_OUTPUT_DIR={target.parent}",
            *([f"-DRLHF_FAST_CUDA_ARCHITECTURES={architectures}"] if architectures else []),
            *os.environ.get("RLHF_FAST_CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("rlhf_fast._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
