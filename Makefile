# Targets a newcomer needs first, then those of CONTRIBUTING.md. PYTHON chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

.PHONY: demo test short slow lint types wheel newest oldest tested-set figures docs
demo: .venv/installed
	.venv/bin/awares-bench demo

# One process a core, each with one thread: the models of the tests are too small for more. A file's tests share a process and its fixtures.
# Bytecode is kept, whatever the environment says: every process would compile the tests for itself.
TESTS = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1
SPREAD = -n auto --dist loadfile --no-loadscope-reorder

test: .venv/installed
	$(TESTS) .venv/bin/python -m pytest $(SPREAD)

short: .venv/installed
	$(TESTS) .venv/bin/python -m pytest $(SPREAD) $(SHORT)

slow: .venv/installed
	$(TESTS) .venv/bin/python -m pytest -m slow

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-cache

# mypy on the package as it is installed: only there do the folders of the checkout lie where their imports say.
types: .venv/installed
	rm -rf build .types
	.venv/bin/pip install --quiet --no-deps --target .types .
	cd .types && ../.venv/bin/python -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p awares_bench

# What a stranger gets: a wheel that holds what git tracks, installed elsewhere, and its demo outside of the checkout.
wheel: .venv/installed
	.venv/bin/python -m pytest -m slow tests/test_house.py
	rm -rf build dist .venv-wheel
	.venv/bin/python -m build --wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install --quiet -c constraints.txt dist/*.whl
	cd $$(mktemp -d) && $(CURDIR)/.venv-wheel/bin/awares-bench demo --limit 1

# What breaks when a library moves: a file of each kind, about two minutes.
SHORT = $(addprefix tests/,evaluation/test_fresh.py evaluation/test_doctor.py inference/test_vlm.py inference/test_engine.py \
    inference/test_grammar.py bench/test_bench.py baselines/test_pruners.py training/test_rollout.py methods/test_crops.py)

# The newest releases that the bounds of pyproject.toml allow, without the tested set.
newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade -e ".[dev]"
	.venv-newest/bin/awares-bench doctor
	$(TESTS) .venv-newest/bin/python -m pytest $(SPREAD) $(SHORT)

# The lower bounds of pyproject.toml: uv finds them, pip installs them.
oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet "uv>=0.5" setuptools wheel
	.venv-oldest/bin/uv pip compile --quiet --resolution lowest-direct --extra dev pyproject.toml --output-file .venv-oldest/lowest.txt
	.venv-oldest/bin/pip install --quiet -c .venv-oldest/lowest.txt -e ".[dev]"
	.venv-oldest/bin/awares-bench doctor
	$(TESTS) .venv-oldest/bin/python -m pytest $(SPREAD) $(SHORT)

# One file for every supported Python. PyTorch and what comes with it follow the bounds: which build fits depends on the machine.
UV ?= uv
tested-set:
	echo "mpmath<1.4  # sympy's releases want it; with a later one uv takes a pre-release of sympy" > held.tmp
	$(UV) pip compile --quiet --universal --upgrade --prerelease if-necessary --python-version 3.10 --no-python-downloads --extra dev \
	    --no-header --no-annotate -c held.tmp pyproject.toml --output-file constraints.tmp
	(echo "# The tested set: make tested-set"; grep -vE '^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+)==' constraints.tmp) > constraints.txt
	rm held.tmp constraints.tmp

figures: .venv/installed
	.venv/bin/awares-bench report reports/published/nano/records --out reports/published/nano/figures --formats png --no-times --logs $(patsubst %,training/nano/logs/%.jsonl,tower base where joint read fetch sft grpo visionthink_sft visionthink_grpo cropvlm_sft cropvlm_grpo)
	[ ! -d reports/published/gpu ] || .venv/bin/awares-bench report reports/published/gpu/records --out reports/published/gpu/figures --formats png

# The parts that the code decides are written into docs/, then the site into site/. A warning, such as a dead link, is an error.
docs: .venv/installed
	.venv/bin/pip install --quiet -e ".[docs]"
	.venv/bin/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
