"""The reference of the config's keys."""

import dataclasses
from pathlib import Path

import fakes

from kairos_jax.config.keys import config_keys, markdown, plain

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "config.md"


def test_the_page_is_up_to_date():
    """kairos config --output=markdown > docs/reference/config.md"""
    assert PAGE.read_text() == markdown()


def names_in(values, path=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from names_in(value, f"{path}{name}.")
        else:
            yield path + name


def test_every_key_is_listed_and_explained():
    keys = config_keys()
    assert [each.name for each in keys] == list(names_in(dataclasses.asdict(fakes.CONFIG)))
    for each in keys:
        assert each.key.meaning.endswith("."), each.name
        assert each.kind in (bool, int, float, str)


def test_defaults_and_ranges_are_said():
    text = plain(80)
    assert "page_size  (int; at least 1; default 64)" in text
    assert "colocated  (bool; default false)" in text
    assert "max_context  (int; 1 to the model's; default chosen)" in text
    assert "slo.ttft  (float; above 0; default chosen)" in text
    assert max(map(len, text.splitlines())) <= 110
