# make train: set up, train LeNet-5 on the embedded digits, say where the picture is.  make lecun1998: LeNet-5 of 1998
# on all 60,000 digits.  make test, make lint: the checks.
# Everything lives in .venv; PYTHON picks the interpreter that creates it.
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
SOURCES := setup.py $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

export PATH := $(BIN):$(PATH)
# Threads that wait for each other sleep: where other processes have the cores, spinning ones are many times slower.
OMP_WAIT_POLICY ?= passive
export OMP_WAIT_POLICY

.PHONY: install train lecun1998 test gpu-bundle lint format clean

install: $(VENV)/.installed

$(VENV)/.requirements: requirements-dev.txt
	@echo "creating $(VENV) with the packages of requirements-dev.txt"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements-dev.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements pyproject.toml $(SOURCES)
	@echo "building the native libraries: about two minutes on two cores"
	@$(BIN)/python -m pip install --verbose --disable-pip-version-check --no-build-isolation --no-deps \
		--config-settings editable_mode=compat -e . > $(VENV)/build.log 2>&1 || (cat $(VENV)/build.log; exit 1)
	@grep -o -m 1 'lenet_fast: .*' $(VENV)/build.log || true
	@touch $@

# What only the tests of interchange need (Flax, Lightning, ONNX): 0.9 GB.
$(VENV)/.interop: $(VENV)/.installed requirements-interop.txt
	@echo "installing requirements-interop.txt for the tests"
	@$(PIP) install -r requirements-interop.txt
	@touch $@

$(VENV)/.cuda: $(VENV)/.installed requirements-cuda.txt
	@echo "installing requirements-cuda.txt (nvcc) for the tests"
	@$(PIP) install -r requirements-cuda.txt
	@touch $@

train: install
	$(BIN)/lenet-fast train

# LeCun's experiment of 1998: twenty passes over the 60,000 digits ($LENET_FAST_DATA, the cache, or downloaded).
lecun1998: install
	$(BIN)/lenet-fast train --model lenet5-1998 --dataset mnist --epochs 20 --batch-size 64 \
		--optimizer adamw --lr 0.005 --weight-decay 0.1 --schedule one-cycle

test: install $(VENV)/.interop $(VENV)/.cuda
	$(BIN)/python -m pytest

# What a machine with a GPU needs, built and checked here: the folder .gpu (scripts/gpu_bundle.py).
gpu-bundle: $(VENV)/.cuda
	@$(BIN)/python scripts/gpu_bundle.py make $(if $(GPU_PYTHON),--python $(GPU_PYTHON))

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/shellcheck .ci/run benchmarks/gpu_run.sh

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist *.egg-info lenet_fast/*.so $(VENV)
