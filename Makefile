# Each target works alone from a fresh clone: it makes .venv, installs torch and this package, then runs.
TORCH  ?= torch==2.13.0
PYTHON ?= .venv/bin/python
OUT    ?= out

.PHONY: train test check lint types test-run smollm2 bench gpu native clean

VENV := .venv/.installed

$(VENV): pyproject.toml setup.py csrc/CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=23.2"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(VENV)

train: $(VENV)
	.venv/bin/rlhf_fast train examples/tiny_rlhf.yaml --overwrite

test: $(VENV)
	.venv/bin/python -m pytest

lint: $(VENV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: $(VENV)
	.venv/bin/mypy

check: lint types test

# Rebuild the native module in place after editing csrc/.
native:
	$(PYTHON) setup.py build_ext --inplace

clean:
	rm -rf build .venv rlhf_fast/_native*.so *.egg-info
