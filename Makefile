# Each target sets up what it needs, in a virtual environment of its own.
PYTHON ?= python3
VENV   := .venv
OLDEST := .venv-oldest

.PHONY: lenet test test-oldest kills lint notebooks docs clean

# Train LeNet on Fashion-MNIST; options: make lenet ARGS="--seed 1 --epochs 20"
lenet: $(VENV)/ready
	$(VENV)/bin/python -m train lenet $(ARGS)

# Everything that must hold: lint, types, tests.
test: lint
	$(VENV)/bin/python -m pytest -n 2

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# 25 times SIGKILL to one of two processes that train together.
kills: $(VENV)/ready
	FDL_KILLS=25 $(VENV)/bin/python -m pytest tests/train/test_launch.py -k killed

# The same tests on the oldest supported releases.
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -n 2

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

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis site
