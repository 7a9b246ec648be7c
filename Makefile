# `make demo` and `make test` work in a fresh clone: they create .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt

.PHONY: demo test test-slow bench lint types docs wheel clean

demo: $(VENV)/examples
	$(BIN)/python examples/paired_mnist.py demo --out out/demo

test: $(VENV)/test
	$(BIN)/python -m pytest

test-slow: $(VENV)/test
	$(BIN)/python -m pytest -m slow --no-header

bench: $(VENV)/test
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only -o python_files='bench_*.py'

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy

docs: $(VENV)/dev
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

# The wheel, built and imported in an empty environment without any extra.
wheel: $(VENV)/dev
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --wheel --outdir dist > /dev/null
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-cpu.txt torch numpy
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-cpu.txt dist/*.whl
	cd dist && ../.venv-wheel/bin/python -W error -c "import factordisc; print(factordisc.__version__)"

# One stamp per extra: an installation is made once, and again when its requirements change.
# torch comes first and alone: pinned, before any other package can ask for another build.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch

$(VENV)/examples $(VENV)/test $(VENV)/dev: $(VENV)/%: pyproject.toml constraints-cpu.txt | $(BIN)/python
	$(PIP) -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .venv-wheel dist out docs/_build
