# make install | train | test | lint | bench | bench-cpu | clean.   Needs Python >= 3.10 and make; everything else goes into .venv.
PYTHON ?= python3
PRESET ?= digits-uvit
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# GPU machines are bare and offline: these targets run from the repository's root under PYTHON as it is.
GPU_TESTS := tests/ops tests/kernels tests/models tests/scaling tests/diffusion tests/benchmarks/test_benchmarks_ops.py

.PHONY: help install train test lint format bench clean
.PHONY: gpu-test gpu-pytest gpu-sanitize gpu-bench gpu-bench-ops gpu-bench-unet-ops gpu-bench-uvit-s2 gpu-bench-uvit-m4 gpu-bench-uvit-l4
.PHONY: gpu-bench-unet gpu-bench-unet-cifar10 gpu-bench-step gpu-bench-curves gpu-bench-attention gpu-bench-inference
.PHONY: gpu-bench-convergence bench-cpu
.DEFAULT_GOAL := help

help:
	@echo "make install   create .venv and install scalelong_fast with everything it needs"
	@echo "make train     train a preset into runs/PRESET (PRESET=digits-unet ARGS=\"--model.scaling cs\")"
	@echo "make test      run the tests (ARGS=\"-k scaling\")"
	@echo "make lint      check style"
	@echo "make format    mend style"
	@echo "make bench     time a training step against the authors' recipe"
	@echo "make bench-cpu measure all that a CPU can, in ten minutes, and put it on one page"
	@echo "make gpu-test  on a GPU machine, nothing installed: GPU tests, then compute-sanitizer"
	@echo "make gpu-bench on a GPU machine, nothing installed: the benchmarks; parts of it, each"
	@echo "               under ten minutes: gpu-bench-ops, gpu-bench-unet-ops, gpu-bench-uvit-s2, -m4, -l4,"
	@echo "               gpu-bench-unet, gpu-bench-unet-cifar10, gpu-bench-step, gpu-bench-attention,"
	@echo "               gpu-bench-curves; besides, with diffusers: gpu-bench-inference, gpu-bench-convergence"
	@echo "make clean     remove .venv and caches; runs/ stays"

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python >= 3.10 is needed, {sys.executable} is {v[0]}.{v[1]}. Give another one: make install PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Could not create $(VENV): install Python's venv module (Debian: apt install python3-venv)."; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

train: $(STAMP)
	$(BIN)/scalelong-fast train $(PRESET) --out runs/$(PRESET) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks step $(ARGS)

bench-cpu: $(STAMP)
	$(BIN)/python -m benchmarks cpu $(ARGS)

gpu-test: gpu-pytest gpu-sanitize

gpu-pytest:
	$(PYTHON) -m pytest -m gpu $(GPU_TESTS) $(ARGS)

gpu-sanitize:
	$(PYTHON) -m benchmarks sanitize

gpu-bench: gpu-bench-ops gpu-bench-unet-ops gpu-bench-uvit-s2 gpu-bench-uvit-m4 gpu-bench-uvit-l4
gpu-bench: gpu-bench-unet gpu-bench-unet-cifar10 gpu-bench-step gpu-bench-attention gpu-bench-curves

# Called again, it measures what the first call had no time for.
gpu-bench-ops:
	$(PYTHON) -m benchmarks ops --device cuda --missing --seconds 480 $(ARGS)

gpu-bench-unet-ops:
	$(PYTHON) -m benchmarks ops --device cuda --missing --seconds 480 --op scale_concat_group_norm \
		--op scale_concat_conv1x1 --op group_norm_gap --op channel_stats $(ARGS)

gpu-bench-uvit-s2:
	$(PYTHON) -m benchmarks uvit --device cuda --model U-ViT-S/2 --seconds 440 $(ARGS)

gpu-bench-uvit-m4:
	$(PYTHON) -m benchmarks uvit --device cuda --model U-ViT-M/4 --seconds 440 $(ARGS)

gpu-bench-uvit-l4:
	$(PYTHON) -m benchmarks uvit --device cuda --model U-ViT-L/4 --seconds 440 $(ARGS)

# What compiling leaves no time for is not measured; --recipe asks for some alone.
gpu-bench-unet:
	$(PYTHON) -m benchmarks unet --device cuda --model unet_imagenet64 --seconds 440 $(ARGS)

gpu-bench-unet-cifar10:
	$(PYTHON) -m benchmarks unet --device cuda --model unet_cifar10 --seconds 440 $(ARGS)

gpu-bench-step:
	$(PYTHON) -m benchmarks step --device cuda --rounds 8 --steps 20 --seconds 440 $(ARGS)

gpu-bench-curves:
	$(PYTHON) -m benchmarks curves --device cuda --seconds 440 $(ARGS)

gpu-bench-attention:
	$(PYTHON) -m benchmarks attention --device cuda --seconds 440 $(ARGS)

# These two need diffusers besides.
gpu-bench-inference:
	$(PYTHON) -m benchmarks inference --device cuda --seconds 440 $(ARGS)

gpu-bench-convergence:
	$(PYTHON) -m benchmarks convergence --device cuda --seconds 440 $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
