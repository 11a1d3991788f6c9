"""The line in front of a model: order, weights, and those who leave it."""

from __future__ import annotations

import threading
import time

import pytest

from seed_multimodal.serving.gate import Gate, Vanished


def test_first_come_first_served_and_never_more_than_fits() -> None:
    gate, order, inside, most = Gate(10), [], [0], [0]

    def work(number: int, weight: int) -> None:
        with gate.hold(weight):
            order.append(number)
            inside[0] += weight
            most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            inside[0] -= weight

    threads = []
    with gate.hold(10):
        for number, weight in enumerate((8, 8, 1, 99, 2, 2)):
            threads.append(threading.Thread(target=work, args=(number, weight)))
            threads[-1].start()
            while len(gate._line) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order[:4] == [0, 1, 2, 3] and most[0] <= 10 + 89 and gate.inside == 0  # 99 counts as 10


def test_who_leaves_is_dropped_and_keeps_nobody_waiting() -> None:
    gate, left = Gate(1), threading.Event()
    came: list[str] = []

    def leave() -> None:
        with pytest.raises(Vanished), gate.hold(gone=left.is_set):
            came.append("the one who left")

    def stay() -> None:
        with gate.hold():
            came.append("next")

    with gate.hold():
        first = threading.Thread(target=leave)
        first.start()
        while not gate._line:
            time.sleep(0.001)
        second = threading.Thread(target=stay)
        second.start()
        left.set()
        first.join(5)
        assert not first.is_alive()
    second.join(5)
    assert came == ["next"] and gate.inside == 0
