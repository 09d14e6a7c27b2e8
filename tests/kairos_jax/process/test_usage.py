"""The parts of --help."""

import importlib

from kairos_jax.process.usage import HEADINGS, examples

DOCUMENT = """What it is.

  kairos serve --config=x \\
    --port=1
  kairos serve tests/model

More words, of `kairos serve`.

kairos serve --third
"""


def test_examples_are_the_first_commands_of_the_docstring():
    assert examples(DOCUMENT) == [
        "  kairos serve --config=x \\\n      --port=1",
        "  kairos serve tests/model",
    ]
    assert examples("What it is.") == []


def test_every_module_with_a_heading_defines_flags():
    for name in HEADINGS:
        module = importlib.import_module(name)
        assert any("define" in each for each in vars(module)), name
