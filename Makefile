# Every target works on a bare machine with Python 3.11+ and a C++20 compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH ?= 2.13.0
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
PYTHON_SOURCES := sgl_diffusion kernels tests benchmarks examples setup.py
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
ARGS ?=

.PHONY: setup serve test faults soak test-slow test-isa check format bench bench-kernels bench-lora \
	bench-denoise bench-serving gpu-check clean
.DEFAULT_GOAL := setup

setup: $(READY)  ## virtual environment, torch, the build

# A torch that the machine already has is used; else the one that fits: CUDA where there is an
# NVIDIA driver, CPU elsewhere (a local wheel if pip knows one, then PyTorch's CPU index).
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one: make PYTHON=python3.12"; exit 3; }
	@if $(PYTHON) -c 'import torch; v = tuple(map(int, torch.__version__.split(".")[:2])); \
		raise SystemExit(v < (2, 11))' 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
		if command -v nvidia-smi >/dev/null; then $(BIN)/pip install -q torch==$(TORCH); \
		else $(BIN)/pip install -q torch==$(TORCH)+cpu 2>/dev/null || \
			$(BIN)/pip install -q --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH) || \
			$(BIN)/pip install -q torch==$(TORCH); fi; }
	@touch $@

$(READY): $(VENV)/.torch $(BUILD_INPUTS)
	@$(BIN)/python -m pip install -q 'setuptools>=77' wheel cmake ninja numpy
	@echo "installing, and building the native library: some minutes (more where nvcc is found)"
	@$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev,triton]'
	@touch $@

serve: $(READY)  ## run the server; options: make serve ARGS="--port 30010"
	@exec $(BIN)/sglang serve $(ARGS)

# Threads that sleep where they wait: the suite starts servers and workers side by side. Much of it
# is waiting for them, so two files are run at a time.
test: export OMP_WAIT_POLICY = PASSIVE
test: $(READY)  ## the whole default suite
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

faults: $(READY)  ## every fault, fifty random kills
	$(BIN)/python -m pytest tests/faults -m "slow or not slow" $(ARGS)

soak: $(READY)  ## a long mixed load; options: make soak ARGS="--engine --minutes 30"
	$(BIN)/python -m tests.faults.soak $(ARGS)

test-slow: $(READY)  ## what the default suite leaves out
	$(BIN)/python -m pytest -m slow $(ARGS)

# The CPU kernels of smaller machines: what depends on them, with no better level than these.
test-isa: export OMP_WAIT_POLICY = PASSIVE
test-isa: $(READY)  ## ops, attention and model parity with the kernels of older CPUs
	for level in avx2 scalar; do SGLD_CPU_ISA=$$level $(BIN)/python -m pytest tests/ops \
		tests/attention tests/models tests/recipes/test_wan.py tests/engine/test_denoise.py \
		--timeout 600 $(ARGS) || exit 1; done

check: $(READY)  ## lint, format, types, guard tests
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/guards -m "not slow"

format: $(READY)
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(READY)  ## every benchmark, with its peer, on an idle machine
	for bench in benchmarks/bench_*.py; do $(BIN)/python $$bench $(ARGS) || exit 1; done

# Kernels beside their peers; ARGS=--save keeps the results, the table and the picture in docs/.
bench-kernels: $(READY)  ## the CPU kernels' table with every bar
	$(BIN)/python benchmarks/bench_kernels.py $(ARGS)

bench-lora: $(READY)  ## adapters beside PEFT, in under six minutes; ARGS=--save keeps the table
	$(BIN)/python benchmarks/bench_lora.py $(ARGS)

# On a machine that others use: ARGS="--busy". ARGS=--save keeps the results.
bench-denoise: $(READY)  ## one denoise step beside diffusers, eager and compiled
	$(BIN)/python benchmarks/bench_denoise.py $(ARGS)

bench-serving: $(READY)  ## many clients at a time beside a plain diffusers server
	$(BIN)/python benchmarks/bench_serving.py $(ARGS)

# On a machine with a GPU: make gpu-check PART=build|correct|norms|attention|lora|denoise|e2e
PART ?= correct
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(PART) --save $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info sgl_diffusion/_lib
