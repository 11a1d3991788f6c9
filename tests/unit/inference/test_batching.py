"""Rows of several threads in one batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from seed_multimodal.inference.batching import DynamicBatcher
from seed_multimodal.inference.prompt import Stopped


def together(
    collector: DynamicBatcher, calls: Sequence[tuple[Any, Sequence[Any]]]
) -> tuple[list[Any], list[Any]]:
    """Results (or errors) of calls made while a first call runs, and the batches of their rows."""
    batches = list[Any]()
    started = threading.Event()
    finish = threading.Event()
    plain = collector.work

    def work(key: Any, rows: Sequence[Any]) -> Sequence[Any]:
        if key == "first":
            started.set()
            finish.wait(10)
            return rows
        batches.append([*rows])
        return plain(key, rows)

    collector.work = work
    with ThreadPoolExecutor(len(calls) + 1) as pool:
        pool.submit(collector, "first", [0])
        started.wait(10)
        threads = []
        for variant, call in enumerate(calls, start=1):
            threads.append(pool.submit(collector, *call))
            while len(collector._waiting) < variant:
                pass
        finish.set()
        return [thread.exception() or thread.result() for thread in threads], batches


def test_collector_joins_rows_of_one_key_in_their_order():
    results, batches = together(
        DynamicBatcher(lambda key, rows: [key * row for row in rows], max_rows=4),
        [(2, [1, 2]), (3, [1]), (2, [3]), (2, [4, 5]), (2, range(9)), (3, [2])],
    )
    assert results == [[2, 4], [3], [6], [8, 10], [2 * row for row in range(9)], [6]]
    assert batches == [[1, 2, 3], [1, 2], [4, 5], [*range(9)]]


@pytest.mark.parametrize(
    ("error", "max_rows"), [(ValueError("broken"), 8), (MemoryError("too much"), 4)]
)
def test_collector_retries_rows_of_a_failed_batch_one_by_one(error, max_rows):
    def work(key: Any, rows: Sequence[Any]) -> list[float]:
        if None in rows:
            raise error
        return [1 / row for row in rows]

    collector = DynamicBatcher(work)
    results, batches = together(collector, [(1, [1]), (1, [None]), (1, [2, 4]), (1, [0])])
    assert results[:3] == [[1.0], error, [0.5, 0.25]] and isinstance(results[3], ZeroDivisionError)
    assert (
        batches == [[1, None, 2, 4, 0], [1], [None], [2, 4], [0]] and collector.max_rows == max_rows
    )
    assert collector(1, [2]) == [0.5]


def test_collector_drops_queued_rows_of_a_stopped_thread():
    started = threading.Event()
    left = threading.Event()
    finish = threading.Event()
    batches = list[Any]()

    def work(key: Any, rows: Sequence[Any]) -> Sequence[Any]:
        batches.append([*rows])
        started.set()
        finish.wait(10)
        return rows

    collector = DynamicBatcher(work)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(collector, 1, [1], left.is_set)
        started.wait(10)
        left.set()  # what has begun is finished
        queued = pool.submit(collector, 1, [2], left.is_set)
        assert isinstance(queued.exception(10), Stopped) and not first.done()
        finish.set()
        assert first.result(10) == [1] and collector(1, [3]) == [3] and batches == [[1], [3]]


def test_collector_computes_the_rows_of_all_threads_in_one():
    """Matrix libraries keep buffers for each thread that has computed."""
    together_in = threading.Barrier(4)
    collector = DynamicBatcher(lambda key, rows: [threading.get_ident() for _ in rows], wait=0)

    def call(key: int) -> list[int]:
        together_in.wait(10)  # so that four threads call
        return collector(key, [0])

    with ThreadPoolExecutor(4) as pool:
        threads = {ident for result in pool.map(call, range(4)) for ident in result}
    assert len(threads) == 1 and collector(0, [0]) == [threading.get_ident()]
