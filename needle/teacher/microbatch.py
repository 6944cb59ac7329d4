"""Gathers questions that are asked at the same time into batches, for a model that answers batches in this process.

Nothing waits for a batch to fill: one starts as soon as the worker is free and anything is queued. While it runs the
next questions gather, so batches fill by themselves under load and a lone question is answered at once.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from needle.teacher.base import FatalError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Queued(Generic[Item, Result]):
    item: Item
    answer: "asyncio.Future[Result]"


class MicroBatcher(Generic[Item, Result]):
    """`run` answers a list of items, in order, in one worker thread; a result that is an exception is raised to the one
    who submitted its item, an exception that `run` raises to everyone in the batch.

    `size`: a measure of an item; items of like size are batched, as padding costs. The oldest item is in every batch,
    so that none waits for ever. None: in order of arrival.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result | Exception]],
        *,
        batch_size: int,
        size: Callable[[Item], int] | None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        self._run, self._batch_size, self._size = run, batch_size, size
        self._queue: list[_Queued[Item, Result]] = []
        self._worker: asyncio.Task[None] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="microbatch")
        self._closed = False

    async def submit(self, item: Item) -> Result:
        """The result of one item. Cancelled before its batch starts, the item is never run; later, its result is
        dropped.

        Raises:
            FatalError: closed before the item was run.
        """
        if self._closed:
            raise _closed_error()
        loop = asyncio.get_running_loop()
        queued = _Queued(item, loop.create_future())
        self._queue.append(queued)
        if self._worker is None or self._worker.done():
            # Its first step comes after every submission that is already scheduled, so those share the first batch.
            self._worker = loop.create_task(self._work())
        return await queued.answer

    async def close(self) -> None:
        """Refuses what is queued and what comes; returns when the running batch has ended. May be called again."""
        self._closed = True
        for queued in self._queue:
            if not queued.answer.done():
                queued.answer.set_exception(_closed_error())
        self._queue.clear()
        if self._worker is not None and not self._worker.done():
            await asyncio.wait([self._worker])
        self._executor.shutdown(wait=False)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._take():
            try:
                results = await loop.run_in_executor(self._executor, self._run, [queued.item for queued in batch])
                if len(results) != len(batch):
                    raise RuntimeError(f"{len(batch)} items were run and {len(results)} results came back")
            except Exception as error:
                results = [error] * len(batch)
            except asyncio.CancelledError:  # the event loop ends: nobody is left to be told
                for queued in [*batch, *self._queue]:
                    queued.answer.cancel()
                raise
            for queued, result in zip(batch, results, strict=True):
                if queued.answer.done():
                    continue
                if isinstance(result, Exception):
                    queued.answer.set_exception(result)
                else:
                    queued.answer.set_result(result)

    def _take(self) -> list[_Queued[Item, Result]]:
        """The next batch, removed from the queue: the oldest item and those nearest to it in size."""
        self._queue = [queued for queued in self._queue if not queued.answer.done()]
        order = self._queue
        if self._size is not None and len(order) > self._batch_size:
            size = self._size
            oldest = size(order[0].item)
            order = [order[0], *sorted(order[1:], key=lambda queued: abs(size(queued.item) - oldest))]
        batch = order[: self._batch_size]
        taken = {id(queued) for queued in batch}
        self._queue = [queued for queued in self._queue if id(queued) not in taken]
        return batch


def _closed_error() -> FatalError:
    return FatalError("the teacher was closed before this was asked: open a new connection", every_call=True)
