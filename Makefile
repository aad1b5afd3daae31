# Everything a newcomer or a CI needs, in one place. A target sets up what it uses; `make` alone lists the targets.

VENV := .venv
PYTHON = $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The first interpreter that runs, is new enough and can make an environment. A name in PATH may be a mere stub.
FIND_PYTHON = for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done

.DEFAULT_GOAL := help
.PHONY: help setup demo bench test matrix nightly lint typing docs notebooks clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/\1|\2/' \
		| while IFS='|' read -r name what; do printf '  %-10s %s\n' "$$name" "$$what"; done

setup: $(VENV)/.installed ## Make .venv with everything installed (all the others do this first)

# pip knows --group since 25.1, so the pinned pip comes first.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c '' 2>/dev/null || { rm -rf $(VENV); python=$$($(FIND_PYTHON)); \
		test -n "$$python" || { echo "No Python 3.11 or newer with venv and ensurepip was found; install one." >&2; exit 1; }; \
		$$python -m venv $(VENV); }
	@echo "Installing into $(VENV) (about 2.4 GB; some minutes the first time)"
	@$(PYTHON) -m pip install --quiet --upgrade --constraint constraints.txt pip
	@$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable ".[all]" --group dev
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@$(PYTHON) -m pip install --quiet --constraint constraints.txt --group docs
	@touch $@

demo: setup ## Play a half-year chat through LangChain and LlamaIndex, then ask about it; offline
	@$(VENV)/bin/neuralflow-memory demo

bench: setup ## Measure the memory beside what it replaces, in two minutes; `neuralflow-memory bench --full` measures all
	@$(VENV)/bin/neuralflow-memory bench

test: setup ## Run the tests, the layer rules included, in two processes
	@$(PYTHON) -m pytest --quiet --numprocesses 2 --dist loadfile

matrix: setup ## Use each host's adapters in an environment where only that host is installed
	@for extra in langchain langgraph llama-index; do \
		$(PYTHON) -m venv --clear .matrix/$$extra && \
		.matrix/$$extra/bin/python -m pip install --quiet --constraint constraints.txt ".[$$extra]" && \
		.matrix/$$extra/bin/python tests/host_alone.py $$extra --installed || exit 1; done

nightly: setup ## Run the budget's property test with 10,000 examples, and many processes, tiers and 100,000 messages for long; takes an hour
	@HYPOTHESIS_PROFILE=nightly $(PYTHON) -m pytest --quiet --timeout 0 tests/test_budget_properties.py tests/test_many_processes.py \
		tests/test_state_processes.py tests/test_tiers_stateful.py tests/test_two_years.py

lint: setup ## Check style and format
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

typing: setup ## Check types, strictly
	@$(PYTHON) -m mypy

docs: $(VENV)/.docs ## Build the documentation into site/; a broken link fails
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

notebooks: setup ## Run the notebooks and store their outputs
	@$(PYTHON) tests/test_notebooks.py

clean: ## Remove what was built and cached; .venv stays
	@rm -rf site dist .matrix .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
