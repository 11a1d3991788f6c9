"""The one progress display of long work: a bar on a terminal, whole lines at intervals in a log file.

    with Progress("extract", total=len(units), unit="unit") as bar:
        for unit in units:
            work(unit)
            bar.update(1, pictures="1,024", wait="3 %")
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from seed_multimodal.entry import log_line


class Progress:
    """Counts work and shows progress, speed and remaining time. A context manager.

    On a terminal (stderr) it is a tqdm bar that appears after `delay` seconds. Elsewhere it is a line every `every`
    seconds through `log`.

    Args:
        name: in front.
        total: all work in `unit`s (or None: not known); `start`: what was done before.
        log: takes whole lines; stderr by default. None: nothing is shown.
    """

    def __init__(self, name: str, total: float | None, unit: str = "step", *, start: float = 0, every: float = 30.0,
                 delay: float = 0.5, log: Callable[[str], None] | None = log_line) -> None:
        self.name, self.log, self.every = name, log, every
        terminal = log is log_line and sys.stderr.isatty()
        self._bar: Any = tqdm(total=total, desc=name, unit=unit, initial=start, delay=delay, disable=not terminal,
                              dynamic_ncols=True, leave=False)
        self._start = self._last = time.monotonic()
        self.total, self.done, self._first, self.unit = total, start, start, unit

    def update(self, amount: float = 1, **numbers: object) -> None:
        """Add finished work; `numbers` are shown at the end of the bar or line."""
        self.done += amount
        self._bar.update(amount)
        if numbers:
            self._bar.set_postfix(numbers, refresh=False)
        now = time.monotonic()
        if self._bar.disable and self.log is not None and now - self._last >= self.every:
            self._last = now
            self.log(self.line(**numbers))

    def write(self, text: str) -> None:
        """A whole line, above the bar."""
        if self._bar.disable:
            if self.log is not None:
                self.log(text)
        else:
            self._bar.write(text, file=sys.stderr)

    def line(self, **numbers: object) -> str:
        """Progress in one line."""
        done, rate = self.done - self._first, (self.done - self._first) / max(self.seconds, 1e-9)
        text = f"{self.name}: {self.done:,.10g}"
        if self.total:
            left = duration((self.total - self.done) / rate) if done else "?"
            text += f"/{self.total:,.10g} {self.unit}s ({100 * self.done / self.total:.1f} %), {rate:,.3g}/s, {left}"
            text += " left"
        else:
            text += f" {self.unit}s, {rate:,.3g}/s"
        return ", ".join([text, *(f"{key} {value}" for key, value in numbers.items())])

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Seconds in words of two units at most: `45 s`, `3.2 min`, `5 h 12 min`, `2 d 3 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
