# Everything runs in a virtual environment that is created in this folder once.
#
#   make bench    run the main benchmark, which compares the methods with their peers on real text
#   make test     build, then run all tests (Triton kernels in the interpreter, PEFT tests with its own transformers)
#   make matrix   run the model tests on the oldest, pinned and newest libraries (an hour and 15 GB, not part of CI)
#   make lint     run ruff, clang-format, mypy and codespell
#   make docs     build the documentation site in site/
#   make sanitize run the tests of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer (minutes)
#
# Options, as make variables:
#   PYTHON=python3.12        the interpreter that creates the environment
#   TORCH=torch==2.11.0      another PyTorch. A CUDA build installs its own Triton
#   BENCH="--quick"          arguments of `python -m benchmarks`
#   TEST="-k parity"         arguments of pytest
#   MATRIX="--only newest"   arguments of tools/matrix.py

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV ?= .venv
BENCH ?=
TEST ?=
MATRIX ?=

BIN := $(VENV)/bin
# Modules are compiled when they are imported, because compiling all modules of PyTorch takes half a minute.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# Stamp files only require pip, and allow any TORCH, unlike a lock file. Other versions are in constraints.txt.
# The name of a stamp contains TORCH, so that only a different TORCH triggers a new installation.
INSTALLED := $(VENV)/.installed-$(subst /,-,$(TORCH))
BUILT := $(VENV)/.built-$(subst /,-,$(TORCH))
DOCUMENTED := $(VENV)/.documented
SOURCES = $(shell find csrc tools benchmarks -name '*.h' -o -name '*.cpp')
# Pytest exits with 5 if TEST selects no test in one of the runs.
OR_NONE := $(if $(TEST),|| test $$? -eq 5)
# A folder that comes before the environment's packages on the import path of the PEFT tests.
OVERLAY := $(VENV)/peft-overlay
OVERLAID := $(OVERLAY)/.installed

.PHONY: bench test matrix lint docs sanitize format install clean

bench: $(BUILT) $(OVERLAID)
	PYTHONPATH="$$(realpath $(OVERLAY))" $(BIN)/python -m benchmarks $(BENCH)

test: $(BUILT) $(OVERLAID)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not peft" $(TEST) $(OR_NONE)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal tests/ops/triton $(TEST) $(OR_NONE)
	OMP_NUM_THREADS=1 PYTHONPATH="$$(realpath $(OVERLAY))" REQUIRE_PEFT=1 \
		$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m peft $(TEST) $(OR_NONE)

matrix:
	$(PYTHON) tools/matrix.py $(MATRIX)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/mypy
	$(BIN)/codespell benchmarks csrc docs examples fastprefix tests tools *.* Makefile

docs: $(DOCUMENTED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

sanitize: $(INSTALLED)
	PYTHON="$$(realpath $(BIN))/python" tools/sanitize.sh -q $(TEST)

format: $(BUILT)
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)
	$(BIN)/ruff check --fix .

install: $(BUILT)

$(INSTALLED): constraints.txt pyproject.toml
	@echo "installing PyTorch, transformers and the packages for tests and benchmarks in $(VENV) (a few minutes, once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --constraint constraints.txt setuptools ninja $(TORCH)
	$(BIN)/python -c "import triton" 2>/dev/null || $(INSTALL) $(TRITON)
	FASTPREFIX_BUILD_EXT=0 $(INSTALL) --constraint constraints.txt --no-build-isolation --editable '.[test,lint]'
	rm -f $(VENV)/.installed-* $(VENV)/.built-* && touch $@

# Build isolation is off, because it would install a second PyTorch for the build.
$(BUILT): $(INSTALLED) setup.py fastprefix/_version.py $(shell find csrc -type f)
	@echo "building the C++ kernels (a few minutes on two cores)"
	FASTPREFIX_BUILD_EXT=1 $(INSTALL) --no-build-isolation --no-deps --editable .
	rm -f $(VENV)/.built-* && touch $@

$(OVERLAID): constraints-peft.txt $(INSTALLED)
	@echo "installing the transformers version that PEFT supports in $(OVERLAY)"
	rm -rf $(OVERLAY)
	$(INSTALL) --no-deps --target $(OVERLAY) --requirement constraints-peft.txt
	touch $@

$(DOCUMENTED): $(INSTALLED)
	@echo "installing the packages for the documentation (a minute)"
	FASTPREFIX_BUILD_EXT=0 $(INSTALL) --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis benchmarks/out
	find . -name __pycache__ -prune -exec rm -rf {} + -o -name '*.so' -path './fastprefix/*' -exec rm -f {} +
