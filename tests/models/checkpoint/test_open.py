"""What `open_checkpoint` makes of a path: nothing there, a FIFO, a socket, an unreadable file."""

import os
import shutil
import socket
from pathlib import Path

import pytest
from checkpoints import load, write_gguf

from models.checkpoint import files, open_checkpoint


@pytest.fixture
def directory(copy):
    return copy[0]


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected .*safetensors, one model in .*gguf or an Or"):
        open_checkpoint(tmp_path)


def test_two_models_in_a_directory(tmp_path, tiny_llama):
    write_gguf(tmp_path / "a.gguf", tiny_llama)
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(ValueError, match=r"one model in .*found \['a.gguf', 'b.gguf'\]"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.gguf", "model", "model.safetensors"])
def test_a_fifo_is_named_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: must be a regular file, but is a FIFO"):
        open_checkpoint(tmp_path / name)


def test_a_device_and_a_socket_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="/dev/zero: must be a regular file, but is a device"):
        open_checkpoint("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the address of a socket has a short limit
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("here")
        with pytest.raises(ValueError, match="here: must be a regular file, but is a socket"):
            open_checkpoint("here")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_fifo_in_a_directory_is_named(directory, name):
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(ValueError, match=f"{name}: must be a regular file, but is a FIFO"):
        open_checkpoint(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_fifo_among_the_weights_is_named(directory, name):
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(ValueError, match=f"{name}: must be a regular file, but is a FIFO"):
        load(directory)


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors.index.json"])
def test_a_link_to_nothing_is_named(directory, name):
    (directory / name).symlink_to(directory / "gone")
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        load(directory)


def test_a_directory_in_place_of_a_file_is_named(directory):
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json: must be a regular file, but is a dir"):
        open_checkpoint(directory)


@pytest.mark.parametrize("denied", ["config.json", "model.safetensors", "tiny.gguf"])
def test_a_file_that_may_not_be_read_is_named(directory, tiny_llama, monkeypatch, denied):
    """As root one may read all files: here the system's refusal is made up."""
    stat = Path.stat

    def refuse(path, **options):
        if path.name == denied and options.get("follow_symlinks", True):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    if denied == "tiny.gguf":
        write_gguf(directory / "tiny.gguf", tiny_llama)
    path = directory / denied if denied == "tiny.gguf" else directory
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(ValueError, match=f"{denied}: cannot be read: Permission denied"):
        load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, b"\xff\xfe", "9" * 5000])
def test_json_that_cannot_be_parsed(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"config\.json: not JSON: "):
        files.read_json(path)
