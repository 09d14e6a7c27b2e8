"""The journal's file."""

from pathlib import Path

import pytest

from kairos_jax.observe.recording import recording
from kairos_jax.process.command import UsageError
from schedulers.ledger.instance import Instance, Limits, Role
from schedulers.ledger.journal import Journal

LIMITS = Limits(max_batch=4, max_chunk=64, max_context=64, page_size=16, num_pages=16)


def note_one(journal: Journal) -> None:
    instance = Instance("a", Role.DECODE, LIMITS)
    instance.journal = journal.recorder(instance)
    instance.cancel("nobody")


def test_all_that_was_noted_is_in_the_file_at_the_end(tmp_path):
    with recording(tmp_path / "journal.jsonl") as journal:
        note_one(journal)
    assert '"cancel"' in (tmp_path / "journal.jsonl").read_text()


def test_who_watches_is_told_it_too(tmp_path):
    told = []
    with recording(tmp_path / "journal.jsonl", told.extend) as journal:
        note_one(journal)
    assert [verb for _, verb, *_ in told] == ["instance", "cancel"]
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_cuts_the_record_off_and_disturbs_nothing_else(caplog):
    with recording(Path("/dev/full")) as journal:
        note_one(journal)
    assert "the journal /dev/full is cut off" in caplog.text
    assert "No space left" in caplog.text


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with (
        pytest.raises(UsageError, match=r"--journal: .*no/journal"),
        recording(tmp_path / "no" / "journal.jsonl"),
    ):
        pass
