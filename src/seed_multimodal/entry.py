"""How programs end: a refusal is one sentence and an exit code; a traceback only with `--debug`. And the flags for
device and precision, which are the same in all of them."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace, _ActionsContainer
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, NoReturn

from seed_multimodal.disk import disk_is_full
from seed_multimodal.errors import SeedError, SeedWarning, first_line, how_to_install, package_of

_PLAIN = warnings.formatwarning
AUTO = "auto: on CUDA float16 for pictures, bfloat16 for the language model; float32 elsewhere"
DONE, SOME_FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def log_line(text: str) -> None:
    """A line on stderr; lost where that is a file on a full disk, since results are worth more."""
    try:
        sys.stderr.write(text + "\n")  # one write, so that the sentences of several processes do not mix
        sys.stderr.flush()
    except OSError as error:
        if not disk_is_full(error):
            raise


def guarded(program: str, debug: bool, work: Callable[[], int]) -> int:
    """Run `work` and return its exit code; a `SeedError`, or a full disk, becomes its sentence and `REFUSED` unless
    `debug`."""
    warnings.formatwarning = functools.partial(_warning_line, program)
    _prepare_streams()
    try:
        code = work()
        sys.stdout.flush()  # what could not be written is told, not left to Python's end
        return code
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
        _discard_output()
        return DONE
    except Exception as error:
        if debug or not (sentence := _machine_sentence(error)):
            raise
        log_line(f"{program}: {sentence}")
        return REFUSED


def _machine_sentence(error: Exception) -> str:
    """What the machine has too little of, or a package of an extra that is not installed; "" for other errors."""
    if isinstance(error, ModuleNotFoundError) and (hint := how_to_install(error.name or "")):
        return f"the package {package_of(error.name or '')} is not installed, which this needs: {hint}."
    if disk_is_full(error):
        place = getattr(error, "filename", None) or ("a file" if _output_arrived() else "the output")
        return f"{place} cannot be written: the disk or quota is full."
    from seed_multimodal.device import is_out_of_memory  # not before: it loads torch

    if is_out_of_memory(error):
        return (f"memory does not suffice ({first_line(error).rstrip('.')}). Less is needed with --offload, "
                f"--quantization, smaller batches or smaller pictures, where the program has them, or with "
                f"--device cpu.")
    return ""


def _output_arrived() -> bool:
    """Whether all that was printed is written; if not, it is discarded."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
        return False
    return True


def _discard_output() -> None:
    """What could not be written so far, and the rest: Python would fail for it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_and_exit(work: Callable[[], int]) -> NoReturn:
    """End the program with the exit code of `work`. One of several processes leaves at once.

    After a run over gloo, more than one run in four was aborted by C++ while a process tore itself down (torch 2.13,
    "terminate called without an active exception"): torchrun then reports a failure although all was done and saved,
    and other nodes wait. Logs, checkpoints and data workers are closed by then, so nothing is left to tear down.
    """
    code: object = 1
    try:
        code = work()
    except SystemExit as stopped:
        code = stopped.code
    finally:
        if os.environ.get("WORLD_SIZE") not in (None, "", "0", "1"):
            if sys.exc_info()[0] is not None:  # a bug: Python would show it after this
                traceback.print_exc()
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)  # type: ignore[arg-type]


def _warning_line(program: str, message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """How a program shows warnings: a `SeedWarning` is its sentence, without the line of code it comes from."""
    if issubclass(category, SeedWarning):
        return f"{program}: warning: {message}\n"
    return _PLAIN(message, category, *place, **more)


def _prepare_streams() -> None:
    """Lines and file names that are no UTF-8 neither end the program nor get lost: read as Python reads file names, and
    written as escapes (which JSON reads back). A line is written when it is whole, into files and pipes, too. A stream
    that was closed is empty, or takes everything."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us: the next file opened must not take its number
            setattr(sys, name, open(os.devnull, mode))
    for stream, options in ((sys.stdin, {"errors": "surrogateescape"}),
                            (sys.stdout, {"errors": "backslashreplace", "line_buffering": True}),
                            (sys.stderr, {"errors": "backslashreplace"})):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # closed, or half read by another process
                stream.reconfigure(**options)  # type: ignore[arg-type]


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


@contextlib.contextmanager
def ended_by_sigterm(first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Make SIGTERM, and the end of the terminal, end the block as Ctrl-C does: by KeyboardInterrupt, after `first`.

    In another thread than the main one, which gets no signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        first()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for name in ("SIGTERM", "SIGINT", "SIGHUP")
              if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def add_debug(parser: ArgumentParser) -> None:
    """`--debug`, which every program has."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_device(parser: _ActionsContainer, dtype: str | None = "auto", meaning: str = AUTO) -> None:
    """`--device`, and `--dtype` as of `add_dtype`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add_dtype(parser, dtype, meaning)


def add_dtype(parser: _ActionsContainer, dtype: str | None = "auto", meaning: str = AUTO) -> None:
    """`--dtype`, its default, and what that means in words."""
    parser.add_argument("--dtype", default=dtype, help=f"auto, float32, bfloat16 or float16 (default: {meaning})")


def add_quantization(parser: _ActionsContainer) -> None:
    """`--quantization`, for programs that load a language model."""
    parser.add_argument("--quantization", choices=("8bit", "4bit"), help="load the language model in 8 or 4 bit")


def add_offload(parser: _ActionsContainer) -> None:
    """`--offload`, for programs with several models on one device."""
    parser.add_argument("--offload", action="store_true",
                        help="keep models on the device only while they work: less memory, slower")


def whole_number(least: int) -> Callable[[str], int]:
    """A flag's type: whole numbers from `least` on."""
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"must be a whole number, {least} or more, not {text!r}")
        return int(text)

    return number


def some_text(text: str) -> str:
    """A flag's type: a text that says something; an empty one is not taken for a flag that is not there."""
    if not text.strip():
        raise ArgumentTypeError("the text is empty")
    return text


def run_program(parser: ArgumentParser, work: Callable[[Namespace], int], argv: Sequence[str] | None = None,
                name: str | None = None) -> int:
    """Read the flags (and `--debug`), run `work` on them and return its exit code, see `guarded`.

    Args:
        name: of the program in its refusals (default: the parser's).
    """
    add_debug(parser)
    args = parser.parse_args(argv)
    return guarded(name or parser.prog, args.debug, lambda: work(args))
