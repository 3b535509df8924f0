# Each target sets up what it needs, in a virtual environment of its own.
PYTHON ?= python3
VENV   := .venv
OLDEST := .venv-oldest
WORKS  := .venv-works-with
DIFFS  := .venv-differences
# Two processes; one that has nothing left to do takes tests from the other.
PYTEST := -m pytest -n 2 --dist worksteal

.PHONY: lenet gpu quick test test-all quick-oldest test-oldest works-with differences kills lint notebooks docs clean

# Train LeNet on Fashion-MNIST; options: make lenet ARGS="--seed 1 --epochs 20"
lenet: $(VENV)/ready
	$(VENV)/bin/python -m train lenet $(ARGS)

# Measure the GPU of this machine in eight minutes; without one: make gpu ARGS=--rehearse. Nothing is
# installed; the interpreter is that of .venv if it is ready, else python3, or the one you name.
gpu:
	$(or $(filter-out python3,$(PYTHON)),$(and $(wildcard $(VENV)/ready),$(VENV)/bin/python),python3) \
	    -m train.bench.gpu $(ARGS)

# The tests that start no process, compile nothing and take less than a second each.
quick: $(VENV)/ready
	$(VENV)/bin/python $(PYTEST) --quick

# What must hold: lint, types, tests. Of the tests that take long an eighth, others whenever the library changes.
test: lint
	$(VENV)/bin/python $(PYTEST) --in-turn

# All tests, and what is repeated is repeated many times: before a release.
test-all: lint
	FDL_SOAK=1 $(VENV)/bin/python $(PYTEST)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Processes killed at random: 200 writers, 20 runs, 25 times one of two that train together.
kills: $(VENV)/ready
	FDL_SOAK=1 $(VENV)/bin/python -m pytest tests/checkpointing/test_crash.py tests/train/test_launch.py -k killed

# A third of make quick, others whenever the library changes, and make test, on the oldest supported releases.
quick-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python $(PYTEST) --quick --in-turn

test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python $(PYTEST) --in-turn

# The recipes of docs/works-with.md, with the libraries that they are for.
works-with: $(WORKS)/ready
	$(WORKS)/bin/python $(PYTEST) tests/works_with/recipes.py tests/works_with/limits.py

# Measure the tables of docs/differences/ again and show what has changed; WRITE=1 puts it into the pages.
differences: $(DIFFS)/ready
	OLDEST_PYTHON="$(wildcard $(OLDEST)/bin/python)" \
	    $(DIFFS)/bin/python -m tests.differences $(if $(WRITE),--write) $(ARGS)

# Remake notebooks/*.ipynb from the texts beside them; one: make notebooks ARGS=06_mlp
notebooks: $(VENV)/ready
	$(VENV)/bin/python notebooks/execute.py $(ARGS)

# The documentation site, in site/; ARGS=serve shows it at http://127.0.0.1:8000
docs: $(VENV)/ready
	$(VENV)/bin/python -m mkdocs $(or $(ARGS),build)

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(OLDEST)/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet -c constraints-oldest.txt -e '.[test]'
	touch $@

$(WORKS)/ready: pyproject.toml constraints.txt constraints-works-with.txt
	$(PYTHON) -m venv $(WORKS)
	$(WORKS)/bin/pip install --quiet -c constraints.txt -c constraints-works-with.txt \
	    -e '.[test,jax,onnx,works-with]'
	touch $@

$(DIFFS)/ready: pyproject.toml constraints.txt constraints-works-with.txt constraints-differences.txt
	$(PYTHON) -m venv $(DIFFS)
	$(DIFFS)/bin/pip install --quiet -c constraints.txt -c constraints-works-with.txt \
	    -c constraints-differences.txt -e '.[test,jax,onnx,differences]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(WORKS) $(DIFFS) .pytest_cache .mypy_cache .ruff_cache .hypothesis site
