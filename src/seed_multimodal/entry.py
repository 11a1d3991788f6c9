"""How programs end: a refusal is one sentence and an exit code; a traceback only with `--debug`."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from multiprocessing import connection

from seed_multimodal.errors import SeedError

DONE, SOME_FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def log_line(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(text + "\n")  # one write, so that the sentences of several processes do not mix
    sys.stderr.flush()


def guarded(program: str, debug: bool, work: Callable[[], int]) -> int:
    """Run `work` and return its exit code; a `SeedError` becomes its sentence and `REFUSED` unless `debug`."""
    try:
        return work()
    except SeedError as error:
        if debug:
            raise
        log_line(f"{program}: {error}")
        return REFUSED
    except KeyboardInterrupt:
        log_line(f"{program}: interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has ended (`seed … | head`); the rest of the output is discarded.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def end_with_parent() -> None:
    """End this process as soon as the one that started it is dead, by SIGKILL too: it must not write beside the next
    run. For processes of `multiprocessing`; others are left alone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(SOME_FAILED)

    threading.Thread(target=watch, daemon=True).start()


def add_debug(parser: ArgumentParser) -> None:
    """`--debug`, which every program has."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run_program(parser: ArgumentParser, work: Callable[[Namespace], int], argv: Sequence[str] | None = None,
                name: str | None = None) -> int:
    """Read the flags (and `--debug`), run `work` on them and return its exit code, see `guarded`.

    Args:
        name: of the program in its refusals (default: the parser's).
    """
    add_debug(parser)
    args = parser.parse_args(argv)
    return guarded(name or parser.prog, args.debug, lambda: work(args))
