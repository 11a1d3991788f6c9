"""Progress display (tqdm's bar on a terminal, periodic lines in a log); silencing of other libraries."""

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


class Progress(tqdm):
    """tqdm that without a terminal passes a line to `log` `every` so many seconds; `start`: initial progress. Silent if
    `log` is None."""

    def __init__(
        self,
        name: str,
        total: float | None,
        unit: str = "step",
        *,
        start: float = 0,
        every: float = 30.0,
        delay: float = 0.5,
        log: Callable[[str], None] | None = log_line,
    ) -> None:
        self.log = None if log in (log_line, print) and sys.stderr.isatty() else log
        # if lines are logged, tqdm writes nothing (it would end with a carriage return)
        super().__init__(
            desc=name,
            file=io.StringIO() if self.log else None,
            total=total,
            unit=unit,
            initial=start,
            disable=log is None,
            leave=False,
            delay=0 if self.log else delay,
            mininterval=every if self.log else 0.1,
            miniters=1,
            bar_format="{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed}<{remaining}, {rate_fmt}{postfix}"
            if self.log
            else None,
            dynamic_ncols=self.log is None,
        )

    def update(self, amount: float | None = 1, **numbers: object) -> bool | None:
        """Advance; `numbers` are shown at the end of the bar or line."""
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

    def write_line(self, text: str) -> None:
        """Print a line above the bar."""
        if self.log is not None:
            self.log(text)
        elif not self.disable:
            tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def quiet_loading(*libraries: str) -> Iterator[None]:
    """Context in which `libraries` (transformers, diffusers) show no progress bars and log nothing."""
    with contextlib.ExitStack() as before:
        for library in libraries:
            own = importlib.import_module(f"{library}.utils.logging")
            before.callback(own.set_verbosity, own.get_verbosity())
            if own.is_progress_bar_enabled():
                before.callback(own.enable_progress_bar)
            own.disable_progress_bar()
            own.set_verbosity(logging.CRITICAL)
        yield


def quiet_libraries(debug: bool = False) -> None:
    """Disable progress bars of libraries and log only their errors, unless `debug`."""
    if debug:
        return
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(diffusers|transformers)\..*"
    )
    for library in ("transformers", "diffusers"):
        own = importlib.import_module(f"{library}.utils.logging")
        own.disable_progress_bar()
        own.set_verbosity_error()
    for library in ("DeepSpeed", "accelerate"):
        logging.getLogger(library).setLevel(logging.ERROR)
