"""The progress display of long work: tqdm's bar on a terminal, tqdm's line at intervals in a log file; and other
libraries kept quiet."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from seed_multimodal.entry import log_line

MODEL_LIBRARIES = ("transformers", "diffusers")  # these have a logging module of their own, with progress bars


class Progress(tqdm):
    """Counts work and shows progress, speed and remaining time; as `tqdm`, which it is.

    Args:
        name: in front.
        total: all work in `unit`s (or None: not known); `start`: what was done before.
        every: seconds between two lines, where stderr is no terminal.
        log: takes whole lines; None: nothing is shown.
    """

    def __init__(self, name: str, total: float | None, unit: str = "step", *, start: float = 0, every: float = 30.0,
                 delay: float = 0.5, log: Callable[[str], None] | None = log_line) -> None:
        self.log = None if log in (log_line, print) and sys.stderr.isatty() else log
        # where lines are logged, tqdm itself writes nothing (it would end with a carriage return)
        super().__init__(desc=name, file=io.StringIO() if self.log else None, total=total, unit=unit,
                         initial=start, disable=log is None, leave=False, delay=0 if self.log else delay,
                         mininterval=every if self.log else 0.1, miniters=1,
                         bar_format="{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed}<{remaining}, {rate_fmt}{postfix}"
                         if self.log else None, dynamic_ncols=self.log is None)

    def update(self, amount: float | None = 1, **numbers: object) -> bool | None:
        """Add finished work; `numbers` are shown at the end of the bar or line."""
        if numbers:
            self.set_postfix(numbers, refresh=False)
        return super().update(amount)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """tqdm's output: the bar, or (not at the very start and end) a line."""
        if self.log is None:
            return super().display(msg, pos)
        if msg is None and self.n > self.initial:
            self.log(str(self))
        return True

    def say(self, text: str) -> None:
        """A whole line, above the bar."""
        if self.log is not None:
            self.log(text)
        elif not self.disable:
            tqdm.write(text, file=sys.stderr)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self.format_dict["elapsed"] if not self.disable else 0.0


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


@contextlib.contextmanager
def quiet_loading(*libraries: str) -> Iterator[None]:
    """Inside, `libraries` (of `MODEL_LIBRARIES`) show no progress bars and log nothing: what fails is raised, too."""
    with contextlib.ExitStack() as before:
        for library in libraries:
            own = importlib.import_module(f"{library}.utils.logging")
            before.callback(own.set_verbosity, own.get_verbosity())
            if own.is_progress_bar_enabled():
                before.callback(own.enable_progress_bar)
            own.disable_progress_bar()
            own.set_verbosity(logging.CRITICAL)
        yield


def quiet_libraries(debug: bool = False, libraries: tuple[str, ...] = MODEL_LIBRARIES) -> None:
    """From here on `libraries` show no progress bars and log errors only, unless `debug`."""
    if debug:
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers)\..*")
    for library in libraries:
        if library in MODEL_LIBRARIES:
            own = importlib.import_module(f"{library}.utils.logging")
            own.disable_progress_bar()
            own.set_verbosity_error()
        else:
            logging.getLogger(library).setLevel(logging.ERROR)
