# Two commands are the whole set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STORE ?= datasets/local
JOBS ?= 2

export OMP_NUM_THREADS := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: demo test lint accept bench clean install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/esper pipeline demo --store $(STORE) --workers $(JOBS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

accept: $(STAMP)
	$(BIN)/python -m pytest -m slow -n $(JOBS) tests

bench: $(STAMP)
	for name in step epoch cohort workers datagen observe load store learners larger_than_memory growth_of_cohorts ; do \
		$(BIN)/python -m benchmarks.$$name || exit 1 ; \
	done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
