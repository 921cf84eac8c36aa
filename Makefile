# make demo       compress and decompress a text that ships in the repository
# make test       the tests, without those marked slow
# make test-all   every test
# make lint       ruff, clang-format and mypy; `make hooks` runs them before each commit
# make docs       the API reference, into build/site
# make bench      time the ops against their baselines on this CPU (ARGS="--set quick"; see docs/benchmarks.md)
# make bench-ready  the environment with the baselines installed
# make build      the package and its C++/CUDA libraries, in place
# make venv       the virtual environment alone
# Each makes what it needs first. PYTHON=python3.12 picks the interpreter of a new environment; ARGS=... goes to pytest,
# to the demo or to the benchmark.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
ARGS ?=
# Test processes side by side, a thread each; WORKERS=0 runs the tests in one process.
WORKERS ?= 2
TEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
PINS := requirements/constraints.txt requirements/runtime.txt

CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.inc')

.PHONY: venv build demo test test-all lint hooks docs bench bench-ready clean

venv: $(PY)
build: $(VENV)/.built

demo: $(VENV)/.demo $(VENV)/.built
	$(PY) -m ztok_fast.demo $(ARGS)

test: $(VENV)/.test $(VENV)/.built
	$(TEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.test $(VENV)/.built
	$(TEST) $(ARGS)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy

hooks: $(VENV)/.lint
	$(VENV)/bin/pre-commit install

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --site-dir build/site

bench-ready: $(VENV)/.bench $(VENV)/.built

bench: $(VENV)/.bench $(VENV)/.built
	$(PY) -m bench $(ARGS)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python >= 3.10 is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of requirements: a set is installed again when its pins change.
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.lint $(VENV)/.docs: $(VENV)/.%: requirements/%.txt $(PINS) | $(PY)
	$(PIP) install -r $<
	@touch $@

$(VENV)/.bench: requirements/test.txt

# Built against the torch that is installed, hence after the requirements and without build isolation. Its requirements
# are the pins above (--no-deps): resolving the ranges again could fetch another torch.
$(VENV)/.built: $(SOURCES) $(PINS) | $(if $(filter demo,$(MAKECMDGOALS)),$(VENV)/.demo,$(VENV)/.test)
	$(PIP) install --no-build-isolation --no-deps -e .
	@$(PY) -m ztok_fast.native
	@touch $@

clean:
	rm -rf build $(VENV)/.built ztok_fast/lib ztok_fast/_host*.so
