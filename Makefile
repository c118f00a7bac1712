# demo and test are the two commands; each does all of its own set-up on a bare Debian, as root.
VENV := $(shell contrib/venv-dir)
BIN := $(VENV)/bin
PY := $(BIN)/python
SOURCES := $(shell find tdxd -name '*.py' -o -name '*.proto')
export PYTHONDONTWRITEBYTECODE =
PARALLEL = --numprocesses=auto --dist=loadscope
GUESTS = --numprocesses=2 --dist=loadscope

.PHONY: demo demo-guest check test test-guest bench lint fuzz deb guest guest-image setup clean

demo: $(VENV)/.installed
	$(PY) contrib/demo/demo.py

# The same story in a booted guest, driven from outside.
demo-guest: deb
	$(PY) -m contrib.demo.demo_guest

# Everything: static checks, tests on all processors, attacks, then the booted guest. TensorFlow's tests
# run in processes of their own, since tests without it load its message files through an empty package
# object. Coverage is of the tests' processes: programs that they start, and the guest, are not followed.
COVERED = --cov=tdxd --cov-report=
test: lint deb
	rm -f .coverage .coverage.*
	$(PY) -m pytest $(PARALLEL) $(COVERED) -m "not tensorflow and not guest"
	$(PY) -m pytest $(PARALLEL) $(COVERED) --cov-append -m "tensorflow and not guest"
	$(PY) -m coverage report --skip-covered --fail-under=82
	$(PY) -m pytest $(GUESTS) -m guest tests/guest

# What needs a real kernel and systemd: boots virtual machines, emulated in software. Each of two
# processes has one at a time.
test-guest: deb
	$(PY) -m pytest $(GUESTS) -m guest tests/guest

# The fast subset, for the inner loop.
check: lint
	$(PY) -m pytest -q $(PARALLEL) -m "not tensorflow and not slow and not guest"

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(PY) -m tests.bench

# A longer look at every parser than `make test` takes: property tests, then FUZZ_S seconds of fuzzing
# each. What is found stays in .cache/fuzz.
FUZZ_S ?= 300
FUZZED = $(shell $(PY) -c 'from tests.fuzz.targets import TARGETS; print(*TARGETS)')
fuzz: $(VENV)/.installed
	TDXD_FUZZ=1 $(PY) -m pytest -q tests/core
	for name in $(FUZZED); do \
	    $(PY) -m tests.fuzz $$name .cache/fuzz/$$name -max_total_time=$(FUZZ_S) -timeout=20 \
	        -artifact_prefix=.cache/fuzz/$$name- || exit 1; \
	done

# The Debian packages, in build/deb. VERSION=X gives them another version.
deb: $(VENV)/.installed
	PYTHON=$(PY) contrib/deb/build $(if $(VERSION),--version $(VERSION))

# What the guest tests boot, below .cache/guest.
guest: deb
	$(PY) -m contrib.guest.build_image

# The measured image that a cloud boots, in build/guest-image. CONFIG=DIRECTORY becomes its /etc/tdxd;
# PACKAGE=FILE is installed, too: build/deb/tdxd-model-server_*.deb, or TensorFlow Serving's.
guest-image: deb
	$(PY) -m contrib.guest.image.build $(if $(CONFIG),--config $(CONFIG)) $(PACKAGE:%=--package %)

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt contrib/setup $(SOURCES)
	contrib/setup $(VENV)

clean:
	rm -rf $(VENV) build .cache .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
