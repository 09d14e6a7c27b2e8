"""Progress where there is no terminal: lines, and one every ten seconds for what takes longer."""

import pytest

from kairos_jax.process import progress
from kairos_jax.process.progress import Lines, bars, waiting


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_is_told_as_it_begins_goes_on_and_ends():
    said, clock = [], Clock()
    lines = Lines(said.append, clock)
    lines.update("load", 0, 3)
    lines.update("load", 1, 3)
    clock.now = 10.0
    lines.tick()
    lines.begin("wait")
    clock.now = 20.0
    lines.tick()
    lines.update("load", 3, 3)
    lines.tick()
    assert said == [
        "load: 3 to do",
        "load: 1 of 3, 10 s",
        "load: 1 of 3, 20 s",
        "wait: 10 s",
        "load: done",
        "wait: 10 s",
    ]


def test_what_is_over_at_once_is_told_once():
    said = []
    Lines(said.append).update("cells", 2, 2)
    assert said == ["cells: done"]


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(progress, "PERIOD_S", 0.01)


def test_lines_come_by_themselves(soon, capsys):
    said = []

    def say(line: str) -> None:
        said.append(line)

    with bars(say) as update:
        update("load", 0, 2)
        while len(said) < 3:  # the test's own time limit ends it
            pass
    assert said[1].startswith("load: 0 of 2, ")
    assert capsys.readouterr().err == ""


def test_what_is_soon_over_says_nothing(capsys):
    with waiting("simulate"):
        pass
    assert capsys.readouterr().err == ""
