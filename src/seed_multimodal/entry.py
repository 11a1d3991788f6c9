"""How a program ends: a refusal is one sentence and an exit code, never a traceback unless `--debug` asks for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from seed_multimodal.errors import SeedError

DONE, SOME_FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def say(text: str) -> None:
    """A line for the person at the terminal (stderr)."""
    sys.stderr.write(text + "\n")  # one write, so that the sentences of several processes do not mix
    sys.stderr.flush()


def guarded(program: str, debug: bool, work: Callable[[], int]) -> int:
    """Run `work` and return its exit code; a `SeedError` becomes its sentence and `REFUSED` unless `debug`."""
    try:
        return work()
    except SeedError as error:
        if debug:
            raise
        say(f"{program}: {error}")
        return REFUSED
    except KeyboardInterrupt:
        say(f"{program}: interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`seed … | head`); what Python still flushes at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
