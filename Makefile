# The only set-up a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint slow notebooks tutorials docs clean

# The CPU build of torch is small; set TORCH=torch for a GPU build.
TORCH ?= torch==2.13.0

.venv/installed: pyproject.toml constraints.txt
	@echo "Installing into .venv: some minutes, without a word, if torch has to be downloaded."
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
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n 2

slow: .venv/installed
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu"

# The notebooks from their text, formatted: after every edit of tutorials/*.md. Outputs of unchanged code stay.
notebooks: .venv/installed
	$(BIN)/python tutorials/build.py

.venv/installed-docs: .venv/installed
	@echo "Installing what the documentation needs into .venv: a minute."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

# All tutorials in full, outputs kept in the notebooks: after every edit of their code. Ten minutes and more of one processor.
tutorials: .venv/installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python tutorials/build.py --execute

# Pages show the notebooks as they are: nothing is executed, and no network is needed once things are installed.
docs: .venv/installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

clean:
	rm -rf .venv build dist *.egg-info docs/_build docs/tutorials
