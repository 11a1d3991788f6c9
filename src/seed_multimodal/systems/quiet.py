"""Loading without other libraries' progress bars: a system that loads in two seconds prints one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet_loading(*libraries: str) -> Iterator[None]:
    """Progress bars of `transformers` and/or `diffusers` off inside, as they were after."""
    import importlib

    loud: list[Any] = []
    for library in libraries:
        logging = importlib.import_module(f"{library}.utils.logging")
        if logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            loud.append(logging)
    try:
        yield
    finally:
        for logging in loud:
            logging.enable_progress_bar()
