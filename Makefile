PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup lock proto

setup: $(VENV)/.installed

# Rebuilt when the lock changes or another PYTHON is asked for.
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --quiet --output-file requirements.lock

# The paths inside the generated imports follow from running this at the root.
proto: setup
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. \
	  --grpc_python_out=. kairos_jax/rpc/kairos.proto
