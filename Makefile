# Everything happens in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test lint format docs bench clean

demo: $(VENV)/.demo
	$(BIN)/oodcore demo --out $(OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py --check
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.test
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/metrics.py

clean:
	rm -rf $(VENV) site dist runs

# torch first and by itself, so that nothing else pulls in another build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[cpu,train]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) --editable '.[cpu,text,train,tune,test]'
	touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(INSTALL) --editable '.[cpu,train,docs]'
	touch $@
