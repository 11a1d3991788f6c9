"""Progress display (tqdm's bar on a terminal, periodic lines in a log); silencing of other
libraries."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator

from tqdm import tqdm

from seed_multimodal.entry import log_line

_LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed}<{remaining}, {rate_fmt}{postfix}"


class Progress(tqdm):
    """A bar of tqdm; without a terminal, lines in a log.

    start: initial progress.
    every: seconds between two lines.
    delay: seconds before the bar is shown.
    log: receives the lines; None: no output.
    unit_scale: thousands as k, M, G.
    """

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
        unit_scale: bool = False,
    ) -> None:
        on_terminal = log in (log_line, print) and sys.stderr.isatty()
        self.log = None if on_terminal else log
        # As a bar, shown after `delay` seconds.
        file = None
        interval = 0.1
        line_format = None
        if self.log is not None:
            # As lines: tqdm itself writes nothing (it would end with a carriage return).
            file = io.StringIO()
            delay = 0
            interval = every
            line_format = _LINE_FORMAT
        super().__init__(
            desc=name,
            file=file,
            total=total,
            unit=unit,
            unit_scale=unit_scale,
            initial=start,
            disable=log is None,
            leave=False,
            delay=delay,
            mininterval=interval,
            miniters=1,
            bar_format=line_format,
            dynamic_ncols=self.log is None,
        )

    def update(self, amount: float | None = 1, **metrics: object) -> bool | None:
        """Advance; `metrics` are shown at the end of the bar or line."""
        if metrics:
            self.set_postfix(metrics, refresh=False)
        return super().update(amount)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
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
    """Context in which `libraries` (transformers, diffusers) show no progress bars and log
    nothing."""
    with contextlib.ExitStack() as restore:
        for library in libraries:
            library_logging = importlib.import_module(f"{library}.utils.logging")
            # At the end both are as they were.
            restore.callback(library_logging.set_verbosity, library_logging.get_verbosity())
            if library_logging.is_progress_bar_enabled():
                restore.callback(library_logging.enable_progress_bar)
            library_logging.disable_progress_bar()
            library_logging.set_verbosity(logging.CRITICAL)
        yield


def quiet_libraries(debug: bool = False) -> None:
    """Disable progress bars of libraries and log only their errors, unless `debug`."""
    if debug:
        return
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(diffusers|transformers)\..*"
    )
    for library in ("transformers", "diffusers"):
        library_logging = importlib.import_module(f"{library}.utils.logging")
        library_logging.disable_progress_bar()
        library_logging.set_verbosity_error()
    for library in ("DeepSpeed", "accelerate"):
        logging.getLogger(library).setLevel(logging.ERROR)
