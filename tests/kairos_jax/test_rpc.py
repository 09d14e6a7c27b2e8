import subprocess
import sys
from pathlib import Path

import pytest

import kairos_jax.rpc

RPC = Path(kairos_jax.rpc.__file__).parent


def test_generated_code_is_that_of_the_proto(tmp_path):
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=.", *outputs]
    subprocess.run([*command, "kairos_jax/rpc/kairos.proto"], cwd=RPC.parent.parent, check=True)
    made = sorted((tmp_path / "kairos_jax" / "rpc").iterdir())
    assert len(made) == 3
    for file in made:
        assert file.read_text() == (RPC / file.name).read_text(), "run `make proto`"
