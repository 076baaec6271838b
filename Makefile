# The demo, the tests and the checks, each on a fresh machine with Python 3.10 or newer.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
export TOKENIZERS_PARALLELISM = false

.PHONY: install demo test test-fast check docs format clean

install: $(VENV)/.installed

# torch first and pinned, so that no other package pulls in another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs,plots,test]"
	touch $@

demo: install
	$(BIN)/hf-adafisher compare demo --output_dir out/demo --verbose

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests

# Under two minutes on two cores; what it leaves out is in tests/README.md.
test-fast: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow and not distributed and not subprocess and not browser" tests

check: install docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf out/dist
	$(BIN)/python -m build --no-isolation --outdir out/dist
	$(BIN)/python -m twine check --strict out/dist/*

# Warnings are errors: mkdocs.yml.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out
