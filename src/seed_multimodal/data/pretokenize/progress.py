"""A line every few seconds: how far, how fast, how long one waited for the decode workers, how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable

from seed_multimodal.data.pretokenize.units import Unit
from seed_multimodal.errors import counted


class Progress:
    """Counts one process's work.

    Args:
        name: in front of each line.
        total, units: weight and number of its units.
        every: seconds between lines.
    """

    def __init__(self, name: str, total: float, units: int, every: float, log: Callable[[str], None]) -> None:
        self.name, self.total, self.units, self.every, self.log = name, total, units, every, log
        self.pictures, self.done, self.units_done = 0, 0.0, 0
        self.wait = 0.0
        self._start = self._last = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """For pictures to be decoded."""
        self.wait += seconds

    def encoded(self, pictures: int, unit: Unit, read: int) -> None:
        """So many more pictures; `read` samples of the unit have been taken."""
        self.pictures += pictures
        now = time.perf_counter()
        if now - self._last >= self.every:
            self._last = now
            within = min(read, unit.stop - unit.start) if unit.stop is not None else 0.0
            self.log(self._line(self.done + within))

    def unit_done(self, weight: float) -> None:
        """One unit more."""
        self.done += weight
        self.units_done += 1

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start

    def last_line(self) -> str:
        """The whole, when all is done."""
        return (f"{self.name}{counted(self.units_done, 'unit')}, {counted(self.pictures, 'picture')} in "
                f"{self.seconds:.1f} s "
                f"({self.pictures / max(self.seconds, 1e-9):,.0f}/s, waited for data "
                f"{100 * self.wait / max(self.seconds, 1e-9):.0f} % of the time).")

    def _line(self, done: float) -> str:
        share = done / self.total if self.total else 0.0
        left = _clock(self.seconds * (1 - share) / share) if share > 0 else "?"
        return (f"{self.name}{100 * share:.1f} % ({self.units_done:,} of {self.units:,} units), {self.pictures:,} "
                f"pictures, {self.pictures / self.seconds:,.0f}/s, data wait {100 * self.wait / self.seconds:.0f} %, "
                f"ETA {left}")


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
