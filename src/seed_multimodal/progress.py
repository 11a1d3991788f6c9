"""Progress display (tqdm's bar on a terminal, periodic lines in a log); silencing of other
libraries."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from seed_multimodal.entry import log_line

# Held while models are loaded and libraries are imported on first use: transformers and diffusers
# import their modules lazily, which fails in several threads. A process forks between two loads.
LOADING = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=LOADING.acquire, after_in_parent=LOADING.release, after_in_child=LOADING.release
    )


class _Output(threading.local):
    """Of each thread."""

    quiet = False


_output = _Output()
_LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed}<{remaining}, {rate_fmt}{postfix}"


class Progress(tqdm):
    """A bar of tqdm; without a terminal, lines in a log.

    start: initial progress.
    every: seconds between two lines.
    log: receives the lines; None: no output.
    """

    def __init__(
        self,
        name: str,
        total: float | None,
        unit: str = "step",
        *,
        start: float = 0,
        every: float = 30.0,
        log: Callable[[str], None] | None = log_line,
    ) -> None:
        on_terminal = log in (log_line, print) and sys.stderr.isatty()
        self.log = None if on_terminal else log
        # As a bar, shown after half a second.
        file = None
        delay = 0.5
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


@functools.cache
def import_library(name: str) -> Any:
    """A module of another library, imported on first use; see `LOADING`."""
    with LOADING:
        return importlib.import_module(name)


@contextlib.contextmanager
def quiet_loading(*libraries: str) -> Iterator[None]:
    """Context that holds `LOADING`, in which `libraries` (transformers, diffusers) show no progress
    bars of this thread and log nothing of it."""
    with LOADING:
        for library in libraries:
            _quieten(library)
        before = _output.quiet
        _output.quiet = True
        try:
            yield
        finally:
            _output.quiet = before


@functools.cache
def _quieten(library: str) -> None:
    """From now on a library's output passes unless it is of a quiet thread."""
    library_logging = import_library(f"{library}.utils.logging")
    for handler in logging.getLogger(library).handlers:
        handler.addFilter(lambda record: not _output.quiet)
    if library == "transformers":
        library_logging.set_tqdm_hook(
            lambda bar, arguments, options: bar(*arguments, **{"disable": _output.quiet, **options})
        )


def quiet_libraries(debug: bool = False) -> None:
    """Disable progress bars of libraries and log only their errors, unless `debug`."""
    if debug:
        return
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(diffusers|transformers)\..*"
    )
    # Of libraries that are imported later, if at all.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for library in ("transformers", "diffusers"):
        os.environ[f"{library.upper()}_VERBOSITY"] = "error"
        if library_logging := sys.modules.get(f"{library}.utils.logging"):
            library_logging.disable_progress_bar()
            library_logging.set_verbosity_error()
    for library in ("DeepSpeed", "accelerate"):
        logging.getLogger(library).setLevel(logging.ERROR)
