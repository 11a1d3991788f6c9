"""Switch off other libraries' progress bars and warnings, inside a block or for the rest of a program."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator

MODEL_LIBRARIES = ("transformers", "diffusers")  # these have a logging module of their own, with progress bars


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
