"""Progress off a terminal: a line every tenth, the last one always."""

import pytest

from needle.progress import Progress


def lines(capsys: pytest.CaptureFixture, steps: list[int], total: int) -> list[str]:
    with Progress("scores") as progress:
        for done in steps:
            progress.update(done, total, f"step {done}")
    return capsys.readouterr().err.splitlines()


def test_a_line_every_tenth(capsys: pytest.CaptureFixture):
    written = lines(capsys, list(range(1, 101)), 100)
    assert [line.split(",")[0] for line in written] == [f"scores: {n}/100" for n in range(10, 101, 10)]
    assert written[0].endswith("left step 10")


@pytest.mark.parametrize(("steps", "total"), [([1, 2, 3], 3), ([1], 1), ([40, 80, 85], 85)])
def test_the_end_is_always_written_once(capsys: pytest.CaptureFixture, steps: list[int], total: int):
    written = lines(capsys, steps, total)
    assert written[-1].startswith(f"scores: {total}/{total}, 0 s left")
    assert sum(f"{total}/{total}" in line for line in written) == 1


def test_a_resumed_run_begins_without_an_estimate(capsys: pytest.CaptureFixture):
    assert lines(capsys, [40], 85) == ["scores: 40/85 step 40"]


def test_nothing_to_do_writes_nothing(capsys: pytest.CaptureFixture):
    assert lines(capsys, [0], 0) == []
