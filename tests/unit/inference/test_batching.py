"""Rows of several threads in one batch: equal to each thread's own, whatever fails or leaves."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from seed_multimodal.inference.batching import DynamicBatcher
from seed_multimodal.inference.prompt import Stopped


class GatedWork:
    """`key · row` for each row; a first call waits until all other calls are queued.

    A row None raises `error`.
    """

    def __init__(self, error: Exception | None = None):
        self.error = error
        self.batches: list[list] = []
        self.started = threading.Event()
        self.gate = threading.Event()

    def __call__(self, key, rows: Sequence) -> list:
        if not self.started.is_set():
            self.started.set()
            self.gate.wait(10)
            return list(rows)
        self.batches.append([*rows])
        if self.error is not None and None in rows:
            raise self.error
        return [key / row for row in rows]

    def results(self, batcher: DynamicBatcher, calls: Sequence[tuple[int, Sequence]]) -> list:
        """Results or errors of calls which wait behind a first one, in the order of `calls`."""
        with ThreadPoolExecutor(len(calls) + 1) as pool:
            pool.submit(batcher, 0, [1])
            self.started.wait(10)
            futures = []
            for index, call in enumerate(calls, start=1):
                futures.append(pool.submit(batcher, *call))
                while batcher._inbox.qsize() < index:
                    pass
            self.gate.set()
            return [future.exception() or future.result() for future in futures]


def test_batcher_joins_rows_of_one_key_in_their_order():
    # Each thread gets the results of its own rows, also of more than fit a batch.
    work = GatedWork()
    calls = [(2, [1, 2]), (3, [1]), (2, [4]), (2, [5, 8]), (2, range(1, 10)), (3, [2])]
    results = work.results(DynamicBatcher(work, max_rows=4), calls)
    assert results == [[key / row for row in rows] for key, rows in calls]
    assert work.batches == [[1, 2, 4], [1, 2], [5, 8], [*range(1, 10)]]


@pytest.mark.parametrize(
    "error, max_rows", [(ValueError("broken"), 8), (MemoryError("too much"), 4)]
)
def test_batcher_retries_rows_of_a_failed_batch_one_by_one(error, max_rows):
    work = GatedWork(error)
    batcher = DynamicBatcher(work)
    results = work.results(batcher, [(1, [1]), (1, [None]), (1, [2, 4]), (1, [0])])
    assert results[:3] == [[1.0], error, [0.5, 0.25]]
    assert isinstance(results[3], ZeroDivisionError)
    assert work.batches == [[1, None, 2, 4, 0], [1], [None], [2, 4], [0]]
    # On out-of-memory the batch is halved for the rest of the run.
    assert batcher.max_rows == max_rows
    assert batcher(1, [2]) == [0.5]


def test_batcher_drops_queued_rows_of_a_stopped_thread():
    work = GatedWork()
    batcher = DynamicBatcher(work)
    left = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batcher, 1, [1], left.is_set)
        work.started.wait(10)
        left.set()  # what has begun is finished
        queued = pool.submit(batcher, 1, [2], left.is_set)
        assert isinstance(queued.exception(10), Stopped) and not first.done()
        work.gate.set()
        assert first.result(10) == [1]
    assert batcher(1, [4]) == [0.25] and work.batches == [[4]]
