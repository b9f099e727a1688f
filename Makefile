# Two targets a newcomer needs, and one that draws the README's figures again, without a model. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -e ".[dev]"
	touch $@

.PHONY: demo test figures
demo: .venv/installed
	.venv/bin/awares-bench demo

test: .venv/installed
	.venv/bin/python -m pytest

figures: .venv/installed
	.venv/bin/awares-bench report reports/records/nano --out reports/figures/nano --formats png --no-times --logs $(patsubst %,training/logs/%.jsonl,tower base where joint read fetch sft grpo visionthink_sft visionthink_grpo cropvlm_sft cropvlm_grpo)
