"""Models in several GGUF files: read as one, and what is missing or foreign is named."""

import shutil
import struct

import pytest
from checkpoints import assert_equal, load, write_gguf

from models.checkpoint import open_checkpoint
from models.checkpoint.gguf_parts import models_in


@pytest.fixture(scope="module")
def original(tiny_llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("parts")
    write_gguf(directory / "tiny.gguf", tiny_llama, max_tensors=8)
    assert [path.name for path in sorted(directory.iterdir())] == [part(n) for n in (1, 2, 3)]
    return directory


@pytest.fixture
def parts(original, tmp_path):
    """A copy to damage."""
    return shutil.copytree(original, tmp_path / "parts")


def part(number, count=3):
    return f"tiny-{number:05d}-of-{count:05d}.gguf"


def test_parts_are_read_as_one(original, tiny_llama, tmp_path):
    write_gguf(tmp_path / "whole.gguf", tiny_llama)
    whole = open_checkpoint(tmp_path)
    for path in (original, original / part(1)):
        assert open_checkpoint(path).config == whole.config
        assert open_checkpoint(path).path == original / part(1)
        assert_equal(load(path, 2), load(tmp_path))


def test_another_part_than_the_first(original):
    with pytest.raises(ValueError, match=rf"part 2 of 3: give the first, {part(1)}"):
        open_checkpoint(original / part(2))


@pytest.mark.parametrize("number", [2, 3])
def test_a_missing_part_is_named(parts, number):
    (parts / part(number)).unlink()
    with pytest.raises(
        ValueError, match=rf"{part(number)}: no such file: part {number} of {part(1)}"
    ):
        open_checkpoint(parts)


def test_the_first_part_is_missing(parts):
    (parts / part(1)).unlink()
    with pytest.raises(ValueError, match=rf"{part(1)}: no such file"):
        open_checkpoint(parts)


def test_a_part_cut_short_is_named(parts):
    file = parts / part(2)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{part(2)}: cut short"):
        open_checkpoint(parts)


def test_parts_in_the_wrong_order_are_named(parts):
    shutil.copy(parts / part(2), parts / part(3))
    message = rf"{part(3)}: not part 3 of {part(1)}: split\.no must be 2, got 1"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(parts)


def test_a_part_of_another_model_is_named(parts, golden, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", golden / "qwen3", max_tensors=10)
    shutil.copy(tmp_path / part(2), parts / part(2))
    message = rf"{part(2)}: not part 2 of {part(1)}: split\.tensors\.count must be 20, got 24"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(parts)


def test_a_file_without_split_fields_in_place_of_a_part(parts, tiny_llama):
    (parts / part(2)).unlink()
    write_gguf(parts / part(2), tiny_llama)
    with pytest.raises(ValueError, match=rf"{part(2)}: not part 2 .*split\.no must be 1, got None"):
        open_checkpoint(parts)


def test_a_tensor_in_two_parts_is_named(parts, tiny_llama):
    fields = [("split.no", 1), ("split.count", 3), ("split.tensors.count", 20)]
    (parts / part(2)).unlink()
    write_gguf(parts / part(2), tiny_llama, fields=fields)
    with pytest.raises(ValueError, match=rf"{part(2)}: tensor '.*' is also in .*{part(1)}"):
        open_checkpoint(parts)


def test_parts_that_hold_too_few_tensors(parts):
    for file in parts.iterdir():
        key = b"split.tensors.count" + struct.pack("<I", 5)  # an int32
        before, after = file.read_bytes().split(key)
        assert after[0] == 20
        file.write_bytes(before + key + bytes([21]) + after[1:])
    message = rf"{part(1)}: split\.tensors\.count must be 20, as the 3 parts hold, got 21"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(parts)


def test_a_part_whose_name_does_not_say_so(parts):
    (parts / part(1)).rename(parts / "renamed.gguf")
    message = r"renamed\.gguf: has split\.count 3, so its name must end in -00001-of-00003\.gguf"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(parts / "renamed.gguf")


def test_one_file_with_split_fields_is_whole(tmp_path, tiny_llama):
    fields = [("split.no", 0), ("split.count", 1), ("split.tensors.count", 20)]
    write_gguf(tmp_path / "whole.gguf", tiny_llama, fields=fields)
    assert open_checkpoint(tmp_path).path == tmp_path / "whole.gguf"


def test_models_are_told_apart_by_their_names(tmp_path):
    for name in ("a-00002-of-00002.gguf", "a-00001-of-00002.gguf", "b.gguf", "c-1-of-2.gguf"):
        (tmp_path / name).touch()
    names = ["a-00001-of-00002.gguf", "b.gguf", "c-1-of-2.gguf"]
    assert [path.name for path in models_in(tmp_path)] == names
