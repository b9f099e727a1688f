# Two targets a newcomer needs. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -e ".[dev]"
	touch $@

.PHONY: demo test
demo: .venv/installed
	.venv/bin/awares-bench demo

test: .venv/installed
	.venv/bin/python -m pytest
