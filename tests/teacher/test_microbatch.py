"""Concurrent questions share batches; each gets its own answer or error, and closing or cancelling loses no one."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from needle.teacher.base import FatalError
from needle.teacher.microbatch import MicroBatcher


class Runner:
    """Doubles numbers and remembers every batch; while `gate` is down, a batch is held in the worker."""

    def __init__(self, *, gated: bool = False):
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.gate, self.started = threading.Event(), threading.Event()
        if not gated:
            self.gate.set()

    def __call__(self, items: list[int]) -> Sequence[int | Exception]:
        self.batches.append(items)
        self.threads.add(threading.get_ident())
        self.started.set()
        assert self.gate.wait(30)
        return [ValueError(f"{item} is odd") if item % 2 else 2 * item for item in items]


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(coroutine, 60)

    return asyncio.run(limited())


async def held(runner: Runner, batcher: MicroBatcher[int, int], first: int) -> "asyncio.Task[int]":
    """A task whose batch is in the worker."""
    task = asyncio.create_task(batcher.submit(first))
    await asyncio.to_thread(runner.started.wait, 30)
    return task


async def queued(batcher: MicroBatcher[int, int], *items: int) -> list["asyncio.Task[int]"]:
    tasks = [asyncio.create_task(batcher.submit(item)) for item in items]
    await asyncio.sleep(0)
    return tasks


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    items=st.lists(st.integers(0, 50), max_size=30),
    batch_size=st.integers(1, 8),
    size=st.sampled_from([None, int]),
)
def test_everyone_gets_the_answer_of_their_own_item(
    items: list[int], batch_size: int, size: Callable[[int], int] | None
):
    runner = Runner()

    async def scenario() -> list[Any]:
        batcher = MicroBatcher(runner, batch_size=batch_size, size=size)
        results = await asyncio.gather(*map(batcher.submit, items), return_exceptions=True)
        await batcher.close()
        return results

    results = run(scenario())
    for item, result in zip(items, results, strict=True):
        if item % 2:
            assert isinstance(result, ValueError)
            assert str(result) == f"{item} is odd"
        else:
            assert result == 2 * item
    assert sorted(item for batch in runner.batches for item in batch) == sorted(items)
    assert all(1 <= len(batch) <= batch_size for batch in runner.batches)
    assert len(runner.batches) == -(-len(items) // batch_size)  # no batch is smaller than it need be
    assert len(runner.threads) <= 1


def test_a_lone_item_starts_at_once_and_the_next_gather_while_it_runs():
    runner = Runner(gated=True)

    async def scenario() -> None:
        batcher = MicroBatcher(runner, batch_size=4, size=None)
        first = await held(runner, batcher, 2)
        rest = await queued(batcher, 4, 6, 8, 10, 12)
        assert runner.batches == [[2]]
        runner.gate.set()
        assert await asyncio.gather(first, *rest) == [4, 8, 12, 16, 20, 24]
        await batcher.close()

    run(scenario())
    assert runner.batches == [[2], [4, 6, 8, 10], [12]]


def test_items_of_like_size_share_a_batch_and_the_oldest_is_never_passed_over():
    runner = Runner(gated=True)

    async def scenario() -> None:
        batcher = MicroBatcher(runner, batch_size=3, size=int)
        tasks = [await held(runner, batcher, 0), *await queued(batcher, 100, 2, 4, 90, 6, 104)]
        runner.gate.set()
        await asyncio.gather(*tasks)
        await batcher.close()

    run(scenario())
    assert runner.batches == [[0], [100, 104, 90], [2, 4, 6]]


def test_an_error_of_the_whole_batch_reaches_everyone_in_it_and_the_next_batch_runs():
    fails = iter([True, False])

    def runner(items: list[int]) -> list[int]:
        if next(fails):
            raise OSError("the device is gone")
        return items

    async def scenario() -> None:
        batcher = MicroBatcher(runner, batch_size=2, size=None)
        results = await asyncio.gather(*map(batcher.submit, range(4)), return_exceptions=True)
        assert [str(result) for result in results[:2]] == ["the device is gone"] * 2
        assert results[2:] == [2, 3]
        await batcher.close()

    run(scenario())


def test_a_wrong_number_of_results_is_an_error_and_never_shifts_answers():
    async def scenario() -> None:
        batcher = MicroBatcher(lambda items: items[1:], batch_size=3, size=None)
        results = await asyncio.gather(*map(batcher.submit, range(3)), return_exceptions=True)
        assert [str(result) for result in results] == ["3 items were run and 2 results came back"] * 3
        await batcher.close()

    run(scenario())


def test_an_item_cancelled_in_the_queue_is_never_run_and_one_cancelled_later_harms_no_one():
    runner = Runner(gated=True)

    async def scenario() -> None:
        batcher = MicroBatcher(runner, batch_size=2, size=None)
        running = await held(runner, batcher, 2)
        waiting = await queued(batcher, 4, 6, 8)
        running.cancel()
        waiting[0].cancel()
        await asyncio.sleep(0)
        runner.gate.set()
        results = await asyncio.gather(running, *waiting, return_exceptions=True)
        assert [type(result) for result in results[:2]] == [asyncio.CancelledError] * 2
        assert results[2:] == [12, 16]
        await batcher.close()

    run(scenario())
    assert runner.batches == [[2], [6, 8]]


def test_a_timeout_of_one_leaves_the_batcher_usable():
    runner = Runner(gated=True)

    async def scenario() -> None:
        batcher = MicroBatcher(runner, batch_size=2, size=None)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(batcher.submit(2), 0.01)
        runner.gate.set()
        assert await batcher.submit(4) == 8
        await batcher.close()

    run(scenario())


def test_closing_finishes_the_running_batch_and_refuses_the_rest():
    runner = Runner(gated=True)

    async def scenario() -> None:
        batcher = MicroBatcher(runner, batch_size=1, size=None)
        running = await held(runner, batcher, 2)
        (waiting,) = await queued(batcher, 4)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        assert not closing.done()
        runner.gate.set()
        await closing
        assert await running == 4
        with pytest.raises(FatalError, match="closed before"):
            await waiting
        with pytest.raises(FatalError, match="closed before"):
            await batcher.submit(6)
        await batcher.close()

    run(scenario())
    assert runner.batches == [[2]]


def test_one_batcher_serves_one_event_loop_after_another():
    batcher = MicroBatcher(Runner(), batch_size=2, size=None)
    assert run(batcher.submit(2)) == 4
    assert run(batcher.submit(6)) == 12
    run(batcher.close())


def test_an_event_loop_that_ends_does_not_hang_on_a_running_batch():
    """As on Ctrl-C: asyncio.run cancels every task, the batcher's own included."""
    runner = Runner(gated=True)

    async def scenario() -> "asyncio.Task[int]":
        return await held(runner, MicroBatcher(runner, batch_size=1, size=None), 2)

    try:
        assert run(scenario()).cancelled()
    finally:
        runner.gate.set()


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch_size=0: must be at least 1"):
        MicroBatcher(Runner(), batch_size=0, size=None)
