# The only set-up a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint slow clean

# The CPU build of torch is small; set TORCH=torch for a GPU build.
TORCH ?= torch==2.13.0

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: .venv/installed
	$(BIN)/python -m pyro_anneal --output demo.png

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2

slow: .venv/installed
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu"

clean:
	rm -rf .venv build dist *.egg-info
