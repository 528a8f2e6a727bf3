# Each target sets itself up: tools/environment.py makes .venv on a bare Python 3.11 or newer, once.
#
#   make lab TORCH=cpu                  torch without CUDA: a tenth of the download on Linux
#   make lab LAB_ARGS=--no-browser      further arguments for JupyterLab
#   make test PYTEST_ARGS="-k merged"   further arguments for pytest
#   make compare COMPARE_ARGS=--dry-run further arguments for lowrank-compare
#   make lab PYTHON=python3.12          another Python to make .venv with

ifeq ($(OS),Windows_NT)
PYTHON ?= py
else
PYTHON ?= python3
endif

SETUP = $(PYTHON) tools/environment.py $(if $(TORCH),"--torch=$(TORCH)")

.PHONY: help lab test quick check figures notebooks compare site slides sheets bench matrix coverage mutants lock audit clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "On Linux, make lab TORCH=cpu downloads a tenth: torch without CUDA, which is all that the series needs."

lab: ## Open JupyterLab at notebook 01, on this machine only.
	@$(SETUP) lab $(LAB_ARGS)

test: ## Run all tests; the notebooks are run and compared with their stored outputs.
	@$(SETUP) test $(PYTEST_ARGS)

quick: ## Check style and types, and run the fast unit tests, within a minute.
	@$(SETUP) test --numprocesses=logical --maxprocesses=4 --dist=loadfile -m "not slow" tests/project/test_style.py tests/unit

check: ## Say whether this machine is set up, and what to mend.
	@$(SETUP) check

figures: ## Draw the figures.
	@$(SETUP) run figures/draw_all.py

notebooks: ## Run the notebooks and store their outputs.
	@$(SETUP) run tools/execute_notebooks.py

compare: ## Run the default comparison, and refresh its results; it goes on where it was stopped.
	@$(SETUP) run -m lowrank_utils.comparison notebooks/comparison.yaml --publish notebooks/results $(COMPARE_ARGS)

site: ## Build the site from the stored notebooks, into build/site.
	@$(SETUP) run tools/build_site.py

slides: ## Build the talk, and a handout from each stored notebook, into build/slides.
	@$(SETUP) run tools/build_slides.py

sheets: ## Make an exercise sheet from each notebook, without solutions, into build/sheets.
	@$(SETUP) run tools/sheets.py

matrix: ## Run the notebooks in many settings (processors, versions, places), and write down what came out.
	@$(SETUP) run tools/matrix.py $(MATRIX_ARGS)

coverage: ## Measure which lines and branches of the package its unit tests reach.
	@$(SETUP) run -m coverage run -m pytest tests/unit tests/setup/test_setup_check.py
	@$(SETUP) run -m coverage combine --quiet
	@$(SETUP) run -m coverage report

mutants: ## Change the package in small ways: does a unit test fail each time? Needs mutmut.
	@$(SETUP) run tools/mutants.py $(MUTANTS_ARGS)

bench: ## Measure speed and memory.
	@$(SETUP) run benchmarks/run.py

lock: ## Renew requirements.lock, constraints.txt and docs/licences.md from pyproject.toml.
	@$(SETUP) run tools/lock.py $(LOCK_ARGS)

audit: ## Ask for known vulnerabilities of what constraints.txt pins; needs pip-audit and a network.
	@$(PYTHON) -m pip_audit --requirement constraints.txt --no-deps --disable-pip

clean: ## Remove the environment and what tools left behind.
	@$(SETUP) clean
