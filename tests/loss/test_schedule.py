"""Schedules by hand: where they begin, end, and how they get there."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from needle.loss import Mixing, Schedule

fractions = st.floats(0, 1)
RISING = {"start": 0.2, "end": 1.0, "begin_frac": 0.25, "end_frac": 0.75}


@pytest.mark.parametrize(
    ("shape", "halfway"),
    [("linear", 0.2 + 0.8 * 0.25), ("cosine", 0.2 + 0.8 * (1 - math.cos(math.pi / 4)) / 2)],
)
def test_level_before_and_after_and_its_own_way_between(shape: str, halfway: float):
    schedule = Schedule(shape=shape, **RISING)
    assert [schedule.at(x) for x in (0.0, 0.25)] == [0.2, 0.2]
    assert schedule.at(0.375) == pytest.approx(halfway)
    assert schedule.at(0.5) == pytest.approx(0.6)
    assert [schedule.at(x) for x in (0.75, 1.0)] == [1.0, 1.0]


@given(
    shape=st.sampled_from(["linear", "cosine"]), ends=st.tuples(fractions, fractions), xs=st.tuples(*[fractions] * 4)
)
def test_the_value_moves_one_way_and_stays_between_its_ends(shape: str, ends: tuple, xs: tuple):
    begin, end = sorted(xs[:2])
    schedule = Mixing(shape=shape, start=ends[0], end=ends[1], begin_frac=begin, end_frac=end)
    earlier, later = (schedule.at(x) for x in sorted(xs[2:]))
    assert min(ends) - 1e-12 <= earlier <= max(ends) + 1e-12
    assert (later - earlier) * (ends[1] - ends[0]) >= -1e-12


def test_a_way_of_no_length_is_a_step():
    schedule = Schedule(shape="linear", start=0.0, end=3.0, begin_frac=0.5, end_frac=0.5)
    assert [schedule.at(x) for x in (0.0, 0.49, 0.5, 1.0)] == [0.0, 0.0, 3.0, 3.0]


def test_always_means_throughout():
    flat = Mixing(shape="constant", start=1.0, end=1.0, begin_frac=0.0, end_frac=1.0)
    assert flat.is_always(1.0)
    assert not flat.is_always(0.5)
    assert not Mixing(shape="linear", start=0.0, end=1.0, begin_frac=0.0, end_frac=1.0).is_always(1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"begin_frac": 0.8}, "begin_frac=0.8 lies behind end_frac=0.75"), ({"shape": "constant"}, "set both alike")],
)
def test_what_cannot_be_meant_is_refused(changes: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Schedule(**{"shape": "linear", **RISING, **changes})
