# make demo: see it work. make test: check it. make help: everything.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13)
CONFIG ?= configs/smollm2_135m_cpu.py
PORT ?= 50051
VENV := .venv
BIN := $(VENV)/bin
# Named by version, so that another PYTHON makes another environment.
INSTALLED = $(VENV)/.installed-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

.PHONY: help setup model demo serve test lint lock proto clean

help:
	@echo "make demo   serve one workload under three schedulers; report in out/demo/report.html"
	@echo "make serve  a server that stays up, on port $(PORT)"
	@echo "make test   lint and the whole default test suite"
	@echo "make setup  the environment alone, in $(VENV)"
	@echo "make lint   ruff, pyright, import-linter"
	@echo "make model  fetch the default model into the user's cache"
	@echo "make lock   resolve the dependencies anew; make proto: regenerate the gRPC code"
	@echo "With PYTHON=python3.12 (or 3.13) all of these run on the newest JAX."

setup: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "no python3.11, 3.12 or 3.13 found: name one, make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); \
	  sys.exit(0 if ok else "Python 3.11 to 3.13 is needed, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

model: setup
	@$(BIN)/python -c 'from kairos_jax import hub; print(hub.resolve_model(hub.DEFAULT_MODEL))'

demo: setup
	@$(BIN)/python -m kairos_jax.demo --config=$(CONFIG) --output=out/demo

serve: setup
	@$(BIN)/python -m kairos_jax.serve --config=$(CONFIG) --port=$(PORT)

test: lint model
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

lock: setup
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --quiet --output-file requirements.lock

proto: setup
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. \
	  --grpc_python_out=. kairos_jax/rpc/kairos.proto

clean:
	rm -rf $(VENV) out
