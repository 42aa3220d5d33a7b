# `make demo` and `make test` are the two commands of the README. Both make .venv once and reuse it.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell command -v $(p)),$(p))))
BIN := .venv/bin
# benchmarks that run on a CPU without arguments; compare.py compares their results
BENCHMARKS := attention cheers_cost decode draw encoded evaluate folding int8 iomm_prefix precision presets serve tokenizer training data

.PHONY: demo test lint bench docs clean

demo: .venv/demo.stamp
	@echo "diptych demo: the shipped model first, then one trained from scratch; the report lands in report.html"
	$(BIN)/diptych demo $(ARGS)

test: .venv/test.stamp
	@echo "lint, types, import rules, tests"
	$(BIN)/ruff check diptych tests scripts benchmarks
	$(BIN)/mypy diptych
	$(BIN)/lint-imports --no-cache
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadscope

bench: .venv/test.stamp
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done

floors:
	$(PYTHON) scripts/test_floors.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/it"; exit 1; }
	@echo "making .venv"
	$(PYTHON) -m venv .venv

.venv/demo.stamp: .venv/bin/python pyproject.toml
	@echo "installing diptych into .venv (about a minute; downloads torch once)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/test.stamp: .venv/bin/python pyproject.toml
	@echo "installing diptych with the test extra into .venv (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@ .venv/demo.stamp

clean:
	rm -rf .venv

docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

.venv/docs.stamp: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@touch $@
