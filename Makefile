# make venv: set up .venv · make demo: watch it decode · make test: run the tests (ARGS="-k name" picks some)
VENV := .venv
# The first Python that vLLM supports; name another with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo $$p && break; done)
STAMP := $(VENV)/.setup-done

.PHONY: help venv demo test lint clean

help:
	@head -n 1 Makefile | cut -c 3-

venv: $(STAMP)
	@echo "$(VENV) is ready"

$(STAMP): pyproject.toml tools/setup_venv.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 is needed and was not found; name one with PYTHON=..."; exit 1; }
	@$(PYTHON) tools/setup_venv.py $(VENV)
	@touch $@

demo: $(STAMP)
	@$(VENV)/bin/vllm-quantspec demo $(ARGS)

test: $(STAMP)
	@$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP)
	@$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) build dist *.egg-info
