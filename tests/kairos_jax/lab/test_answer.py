"""What a sweep answers first."""

from kairos_jax.lab.answer import answer, rates_held
from kairos_jax.lab.cells import Cell, Layout, Result

SPLIT, BOTH = Layout(2, 1), Layout(colocated=3)
BASE, OURS = ("fcfs", "continuous"), ("kairos", "kairos")


def found(policies, layout, attained, cap=256):
    """Results at 10, 20, ... requests a second with these attainments."""
    return [
        Result(
            Cell(layout, policies, cap, 0.0, 10.0 * at),
            {"e2e_attainment": percent},
            ([], []),
            ([], []),
            {},
        )
        for at, percent in enumerate(attained, 1)
    ]


def test_the_answer_names_policies_layout_and_rate():
    results = [
        *found(BASE, SPLIT, [99, 80, 20]),
        *found(BASE, BOTH, [99, 91, 20]),
        *found(OURS, SPLIT, [99, 95.5, 60]),
        *found(OURS, BOTH, [99, 92, 91.2, 89.9]),
    ]
    assert answer(results) == (
        "kairos + kairos on 3 colocated holds the highest rate: 30 requests/s, at which 91.2 % of "
        "the requests attain both SLOs (90 % are required). The baseline, fcfs + continuous, holds "
        "at most 20 requests/s, on 3 colocated."
    )
    held = {(each.pair, each.layout): each.rank[0] for each in rates_held(results)}
    assert held == {(BASE, SPLIT): 10, (BASE, BOTH): 20, (OURS, SPLIT): 20, (OURS, BOTH): 30}


def test_what_was_not_swept_is_not_claimed():
    text = answer([*found(BASE, SPLIT, [50, 40]), *found(OURS, SPLIT, [99, 98])])
    assert "20 requests/s" in text
    assert "No higher rate was swept, so it may hold more." in text
    assert text.endswith(
        "The baseline, fcfs + continuous, holds no rate that was swept; it is nearest at 10 "
        "requests/s on 2 prefill + 1 decode, with 50.0 %."
    )


def test_those_that_hold_the_same_rate_are_named():
    text = answer([*found(BASE, SPLIT, [95, 60]), *found(OURS, SPLIT, [99, 80])])
    assert text.startswith("kairos + kairos on 2 prefill + 1 decode holds the highest rate: 10 ")
    assert "The same rate is held by fcfs + continuous on 2 prefill + 1 decode (95.0 %)." in text
    assert "The baseline" not in text


def test_the_best_variant_is_named_where_there_are_several():
    text = answer([*found(OURS, SPLIT, [99, 80]), *found(OURS, SPLIT, [99, 93], cap=64)])
    assert "kairos + kairos on 2 prefill + 1 decode (cap 64, not packed) holds" in text


def test_where_no_rate_is_held_the_nearest_is_told():
    text = answer([*found(BASE, SPLIT, [50, 40]), *found(OURS, BOTH, [80, 70])])
    assert text == (
        "No policies hold a rate that was swept: nowhere do 90 % of the requests attain both SLOs. "
        "The nearest: kairos + kairos on 3 colocated at 10 requests/s, with 80.0 %."
    )
