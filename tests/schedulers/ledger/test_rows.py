"""The columns of sequences against a plain dict."""

import math
import random

import numpy as np
import pytest

from schedulers.ledger.request import Request, Seq, Slo
from schedulers.ledger.rows import Column, Rows


def seq(serial, num_prompt=3, tpot=0.5):
    return Seq(Request(f"r{serial}", 0.0, range(num_prompt), 9, Slo(1.0, tpot), serial=serial))


def held(rows):
    """What a reader sees, by id: the sequence, and its number in the columns."""
    seqs = dict(zip(rows, rows.values(), strict=True))
    assert list(rows.serial) == [seqs[id].request.serial for id in rows]
    return seqs


@pytest.mark.parametrize("seed", range(10))
def test_random_changes_against_a_dict(seed):
    """With more sequences than the array has room for at first, so that it grows and all move."""
    rng, models, places = random.Random(seed), ({}, {}), (Rows(), Rows())
    removed = [0, 0]
    for serial in range(800):
        which = rng.randrange(2)
        model, rows = models[which], places[which]
        verb = rng.choice(["add", "add", "add", "remove", "move", "write"])
        if verb == "add":
            new = seq(serial, rng.randint(1, 9), rng.choice([0.1, 0.5, 2.0]))
            rows.add(new.request.id, new)
            model[new.request.id] = new
        elif model:
            id = rng.choice(sorted(model))
            if verb == "remove":
                assert rows.remove(id) is model.pop(id)
                removed[which] += 1
            elif verb == "move":
                assert rows.move(id, places[1 - which]) is model[id]
                models[1 - which][id] = model.pop(id)
                removed[which] += 1
            else:
                rows[id].cells[Column.COMPUTED] += serial
        for rows, model in zip(places, models, strict=True):
            rows.check()
            assert held(rows) == model
            assert rows.ids == rows.ones.keys() == model.keys()
            tpots = [seq.request.slo.tpot for seq in model.values()]
            assert rows.least_tpot == min(tpots, default=math.inf)
    assert [rows.num_removed for rows in places] == removed
    assert max(map(len, places)) > 64, "the array has not grown"


def test_a_sequence_and_its_column_are_one():
    rows = Rows()
    first, second = seq(1, num_prompt=5), seq(2, tpot=0.25)
    rows.add("a", first)
    rows.add("b", second)
    rows.length[rows.where({"b": 1})] = 7
    assert second.length == 7
    assert (first.length, first.remaining, first.num_tokens) == (5, 5, 0)
    assert (first.first_token_at, first.ready) == (None, True)
    assert rows.tpot.tolist() == [0.5, 0.25]
    assert rows.cells.shape == (Column.NUM, 2)
    assert rows.at(1) is rows.get("b") is second
    assert (rows.id_at(1), rows.ids_at(np.array([1, 0]))) == ("b", ["b", "a"])


def test_what_was_handed_out_stays_as_it_was():
    """A decision is kept by whoever records it."""
    rows = Rows()
    rows.add("a", seq(1))
    before = rows.ones
    rows.add("b", seq(2))
    assert before == {"a": 1}
    assert rows.ones == {"a": 1, "b": 1}
    assert rows.ones is rows.ones


def test_numbers_stay_with_one_that_has_left():
    """And are not those of whoever takes its place."""
    rows, gone, last = Rows(), seq(1, num_prompt=5), seq(2, num_prompt=7)
    rows.add("gone", gone)
    rows.add("last", last)
    rows.remove("gone")
    assert (gone.length, last.length) == (5, 7)
    last.cells[Column.LENGTH] = 8
    assert (gone.length, rows.length.tolist()) == (5, [8])


def test_where_keeps_the_order_asked_for_and_passes_over_the_unknown():
    rows = Rows()
    for serial in range(3):
        rows.add(f"r{serial}", seq(serial))
    assert rows.where({"r2": 1, "x": 1, "r0": 1}).tolist() == [2, 0]
    assert rows.where({}).dtype == np.intp
    assert rows.get("x") is None
    assert "x" not in rows
    with pytest.raises(KeyError):
        rows.remove("x")


def test_check_notices_numbers_that_are_not_those_of_the_row():
    rows, lost = Rows(), seq(1)
    rows.add("lost", lost)
    lost.cells = lost.cells.copy()
    with pytest.raises(AssertionError, match="cells of 'lost'"):
        rows.check()
