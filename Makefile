# make search [ARGS="..."]   set up, then search      make test   set up, then check everything
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard kernels/native/*.cpp kernels/native/*.h)

.PHONY: search test setup lint clean

search: $(VENV)/.ready
	@$(BIN)/python scripts/search.py $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.ready

# A torch that is there and recent enough is kept; else it comes first, alone.
$(VENV)/.ready: pyproject.toml $(NATIVE)
	@$(PYTHON) scripts/set_up.py $(VENV) "$(TORCH)"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
