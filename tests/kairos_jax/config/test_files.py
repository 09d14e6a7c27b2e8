"""Config files: found, read, refused with the line that is wrong, written and read back."""

import dataclasses
import math

import fakes
import pytest

from kairos_jax.config import ConfigError, ServerConfig
from kairos_jax.config.files import as_text, packaged, read_file


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(text)
        return str(path)

    return write


def test_packaged_ones_are_found_by_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "smollm2_135m_cpu" in packaged()
    for name in packaged():
        ServerConfig.from_dict(read_file(name))
    split, whole = read_file("llama3_8b:gpu4"), read_file("llama3_8b")
    assert (split["colocated"], whole["colocated"]) == (False, True)


def test_what_was_written_reads_back_as_it_was(file):
    config = dataclasses.replace(fakes.CONFIG, model='a "quoted" \\ päth')
    assert config.prefill.pack == math.inf
    path = file(as_text(config, "A title."))
    assert ServerConfig.from_dict(read_file(path)) == config


def test_a_dict_will_do(file):
    path = file("def get_config(what='x'):\n    return {'model': what, 'slo': {'ttft': 1.0}}\n")
    assert read_file(path) == {"model": "x", "slo": {"ttft": 1.0}}
    assert read_file(f"{path}:y")["model"] == "y"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = (\n", ":1: SyntaxError: '(' was never closed"),
        ("\nimport nosuch\n", ":2: ModuleNotFoundError: No module named 'nosuch'"),
        ("def get_config():\n    return 1 / 0\n", ":2: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)\n", ":1: SystemExit: 3"),
        ("\n\ndef get_config():\n    pass\n", ":3: get_config must return a ConfigDict or a dict"),
        ("get_config = 3\n", "mine.py has no function get_config"),
        ("", "mine.py has no function get_config"),
        ("\0", "mine.py: "),
    ],
)
def test_a_bad_file_is_refused_with_its_line(file, text, words):
    path = file(text)
    with pytest.raises(ConfigError) as error:
        read_file(path)
    assert str(error.value).startswith(f"--config: {path}")
    assert words in str(error.value)


def test_a_variant_that_is_not_there_is_refused(file):
    with pytest.raises(ConfigError, match=r"llama3_8b has no variant 'gpu3'; known: gpu1, gpu4"):
        read_file("llama3_8b:gpu3")
    path = file("def get_config():\n    return {}\n")
    with pytest.raises(ConfigError, match=r"mine\.py: TypeError: get_config\(\) takes 0"):
        read_file(f"{path}:x")


@pytest.mark.parametrize("name", ["nosuch", "nosuch.py", "no\0such", ""])
def test_an_unknown_name_lists_what_there_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="packaged are llama3_8b, smollm2_135m_cpu, smollm2"):
        read_file(name)
