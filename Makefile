# Everything happens in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
OUT ?= runs/demo
PIP := -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
INSTALL := $(BIN)/python $(PIP)

.PHONY: demo test lint format docs bench bench-training clean

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

bench: $(BENCH)/.bench
	$(BENCH)/bin/python benchmarks/run.py $(BENCH_ARGS)

bench-training: $(VENV)/.test
	$(BIN)/python benchmarks/training/run.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(BENCH) site dist runs

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

# The benchmarks have an environment of their own, for what they compare with is installed there.
$(BENCH)/.torch: constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python $(PIP) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(BENCH)/.bench: $(BENCH)/.torch pyproject.toml benchmarks/requirements.txt
	$(BENCH)/bin/python $(PIP) --editable '.[cpu]'
	$(BENCH)/bin/python $(PIP) --no-deps --requirement benchmarks/requirements.txt
	touch $@
