"""The suite is only worth something if it notices faults: twelve of them, put into every loss they can be put into."""

import dataclasses

from needle.loss.conformance import check
from needle.loss.mutations import MUTATIONS, as_text, survey
from needle.loss.trials import Subject


def test_every_mutation_of_every_loss_is_caught(subjects: list[Subject]):
    rows = survey(subjects)
    print("\n" + as_text(rows))
    assert len(rows) == len(MUTATIONS) == 12
    for row in rows:
        assert row.missed == [], row
        assert row.caught.total() >= 1, row
        assert row.caught.total() + len(row.not_applicable) == len(subjects)
    assert as_text(rows).endswith("12/12 mutations caught")


def test_a_fault_that_is_none_is_missed(subjects: list[Subject]):
    """The survey can say no: a mutation that changes nothing is caught by nothing."""
    nothing = dataclasses.replace(MUTATIONS[0], name="nothing", mutate=lambda subject: subject)
    (row,) = survey(subjects[:2], [nothing])
    assert row.missed == [subject.name for subject in subjects[:2]]
    assert "MISSED" in as_text([row])
    assert as_text([row]).endswith("0/1 mutations caught")


def test_a_loss_that_fails_anyway_proves_nothing(subjects: list[Subject]):
    """A fault counts as seen only by a property that holds without it."""
    mutation = next(m for m in MUTATIONS if m.name == "mean over padding")
    broken = mutation.mutate(subjects[0])
    failing = {result.name for result in check(broken) if result.passed is False}
    assert failing
    (row,) = survey([broken], [mutation])
    assert not set(row.caught) & failing
