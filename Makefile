# make demo            the main job on real input: evaluate, mine, fine-tune, merge (under 10 minutes on two cores)
# make demo MODEL=...  the same with another encoder: a folder or a name on the hub
# make test            every test but the long proofs; make test-slow runs those, SLOW="slow and not exhaustive" the most telling
# make demo-compare    three seeds, beside in-batch negatives alone and on a second, general task (much longer)
# make test-versions  the fast tests with the lowest and the highest versions that requirements.txt allows (long)
# make lint            ruff and mypy
# make peers           other tools in an environment of their own (.venv-peers)
# make same-bits OLD=COMMIT  whether training, mining, merging and measuring give the same bits as at a commit
# make bench           beside other tools, which get an environment of their own; BENCH="--only train" a part (an hour and a half in all)
# make bench-check     which ratio of the last `make bench` is more than 15 % below docs/benchmarks.json

PYTHON ?= python3
BIN := .venv/bin

.PHONY: bench bench-check demo demo-compare test test-slow test-versions same-bits lint install peers

install: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -r requirements-dev.txt -e .
	touch $@

demo: install
	$(BIN)/python scripts/demo.py $(if $(MODEL),--model_name_or_path "$(MODEL)")

demo-compare: install
	$(BIN)/python scripts/demo.py --compare --seeds 1 2 3 --output_dir outputs/demo-compare $(if $(MODEL),--model_name_or_path "$(MODEL)")

test: install
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist worksteal

SLOW ?= slow

test-slow: install
	$(BIN)/python -m pytest -m "$(SLOW)" -n auto --maxprocesses 4 --dist loadgroup

# PyPI's torch is a CUDA build of gigabytes; TORCH=torch==2.13.0 takes another version into both environments, where that
# is at hand as a CPU build. Its lower end, 2.11, is the default only for the lowest.
TESTS ?= -m "not slow" -n auto --maxprocesses 4 --dist worksteal

test-versions: .venv-lowest/installed .venv-highest/installed
	.venv-lowest/bin/python -m pytest $(TESTS)
	.venv-highest/bin/python -m pytest $(TESTS)

.venv-lowest/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-lowest
	sed -n 's/^\([A-Za-z0-9._-]*\)>=\([0-9.]*\).*/\1==\2/p' requirements.txt $(if $(TORCH),| sed 's/^torch==.*/$(TORCH)/') > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --disable-pip-version-check --quiet -c .venv-lowest/constraints.txt -r requirements-dev.txt -e .
	touch $@

.venv-highest/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-highest
	.venv-highest/bin/python -m pip install --disable-pip-version-check --quiet $(TORCH) -r requirements-dev.txt -e .
	touch $@

same-bits: install
	$(BIN)/python tests/same_bits.py $(or $(OLD),$(error name the commit to compare with: make same-bits OLD=COMMIT)) $(NEW)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

peers: .venv-peers/installed

.venv-peers/installed: scripts/benchmarks/requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -r $<
	touch $@

bench: install .venv-peers/installed
	$(BIN)/python scripts/benchmarks/bench.py $(BENCH)

bench-check: install
	$(BIN)/python scripts/benchmarks/bench.py --check docs/benchmarks.json
