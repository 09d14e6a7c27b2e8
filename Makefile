# make demo: see it work. make test: check it. make help: everything.

# The first that runs: a pyenv shim of a version that is not active is there, and does not.
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13; do \
  $$each -c "" 2>/dev/null && { echo $$each; break; }; done)
CONFIG ?= configs/smollm2_135m_cpu.py
PORT ?= 50051
# Of `make paper`: an Azure LLM CSV or a Mooncake JSONL; a measured profile, if it is to look at one.
TRACE ?= ../shared/data/AzureLLMInferenceTrace_conv.csv
PROFILE ?=
# Of `make sweep`: any flags of kairos_jax.sweep.
SWEEP ?= --simulated --profile=llama3_8b_h100_roofline --trace=synthetic --ttft=1 --tpot=0.025 \
  --rates=10,20,25,30,35,40 --layouts=2:1,2:1fluid,3xcolocated
# Of `make bench-accelerator`: config, sizes of the random weights, any other flags of the benchmark.
BENCH ?= --config=llama3_8b:gpu1
# Of `make fuzz`: how many requests, and the seed that makes them.
FUZZ ?= 100000
SEED ?= 0

# Empty if PYTHON does not run.
VERSION := $(if $(strip $(PYTHON)),$(shell \
  $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null))
ifeq ($(strip $(PYTHON)),)
  PROBLEM := no python3.11, python3.12 or python3.13 runs here, or PYTHON= is empty
else ifeq ($(VERSION),)
  PROBLEM := PYTHON=$(PYTHON) is not there, or is a pyenv shim whose version is not active
else ifeq ($(filter 3.11 3.12 3.13,$(VERSION)),)
  PROBLEM := PYTHON=$(PYTHON) is Python $(VERSION), and 3.11 to 3.13 are supported
endif
# The first Python that is used gets .venv, another one .venv-X.Y: an environment that may be in use
# is not made anew for another Python.
OTHERS := $(and $(wildcard .venv),$(if $(wildcard .venv/bin/python$(VERSION)),,yes))
VENV := .venv$(if $(OTHERS),-$(VERSION))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(VERSION)

.PHONY: help setup model demo agreement bench-accelerator serve cluster sweep paper test slow fuzz \
  clients aot lint lock proto clean

help:
	@echo "make demo   serve one workload under three schedulers; report in out/demo/report.html"
	@echo "make serve  a server that stays up, on port $(PORT)"
	@echo "make cluster  the same as processes of their own: 1 router, 2 prefill, 2 decode"
	@echo "make sweep  simulated: layouts, loads and policies; report in out/sweep/report.html"
	@echo "make paper  the paper's four claims on a trace (TRACE=FILE); tables in out/paper"
	@echo "make agreement  the simulator against the live engine, at five loads: six minutes"
	@echo "make bench-accelerator  correctness and speed on the GPU or TPU here: out/accelerator.json"
	@echo "make test   lint and the whole default test suite"
	@echo "make slow   the tests of several processes, which take minutes"
	@echo "make fuzz   $(FUZZ) malformed and hostile requests to a server, of SEED=$(SEED)"
	@echo "make clients  programs of others against the server: openai, vllm bench, lm-eval, ..."
	@echo "make aot    compile the configs' programs for TPU and GPU, without either; out/aot"
	@echo "make setup  the environment alone, in $(VENV)"
	@echo "make lint   ruff, pyright, import-linter"
	@echo "make model  fetch the default model into the user's cache"
	@echo "make lock   resolve the dependencies anew; make proto: regenerate the gRPC code"
	@echo "With PYTHON=python3.12 (or 3.13) all of these run on the newest JAX, in .venv-3.12."

setup: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	$(if $(PROBLEM),$(error $(PROBLEM): name another, make PYTHON=/path/to/python3.12))
	@# One of this Python is brought up to date in place: programs that run from it go on.
	$(BIN)/python$(VERSION) -c "" 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@# Compiled now: where PYTHONDONTWRITEBYTECODE is set, each process else compiles JAX anew, for 3 s.
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

model: setup
	@$(BIN)/python -c 'from kairos_jax.process import hub; print(hub.resolve_model(hub.DEFAULT_MODEL))'

demo: setup
	@$(BIN)/python -m kairos_jax.demo --config=$(CONFIG) --output=out/demo

agreement: setup
	@$(BIN)/python -m kairos_jax.agreement --config=configs/smollm2_135m_cpu_colocated.py \
	  --output=out/agreement

bench-accelerator: setup
	$(BIN)/python benchmarks/accelerator.py $(BENCH)

serve: setup
	@$(BIN)/python -m kairos_jax.serve --config=$(CONFIG) --port=$(PORT)

cluster: setup
	@$(BIN)/python -m kairos_jax.cluster --config=$(CONFIG) --port=$(PORT)

sweep: setup
	@$(BIN)/python -m kairos_jax.sweep $(SWEEP) --output=out/sweep

paper: setup
	@$(BIN)/python -m kairos_jax.paper --trace=$(TRACE) $(if $(PROFILE),--profile=$(PROFILE)) \
	  --output=out/paper

test: lint model
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal

slow: setup
	$(BIN)/python -m pytest -m slow --ignore=tests/clients

fuzz: setup
	KAIROS_FUZZ_REQUESTS=$(FUZZ) KAIROS_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -m slow \
	  --capture=no tests/kairos_jax/api/test_fuzz.py

# Each program is installed once, in out/clients, from PyPI.
clients: setup model
	$(BIN)/python -m pytest -m slow tests/clients

# The compilers of TPUs and GPUs are installed once, in out/aot, from PyPI: 400 MB.
aot: setup
	$(BIN)/python benchmarks/aot.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# Not by way of setup, which would first install what the old lock says.
lock:
	@test -x $(BIN)/uv || $(MAKE) setup
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --quiet --output-file requirements.lock

proto: setup
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. \
	  --grpc_python_out=. $(wildcard kairos_jax/rpc/*.proto)

clean:
	rm -rf .venv .venv-3.* out
