"""Program entry points: error messages and exit codes (tracebacks only with `--debug`), and common
flags."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import multiprocessing
import os
import platform
import signal
import sys
import threading
import traceback
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace, _ActionsContainer
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from types import FrameType
from typing import Any, NoReturn, TextIO

from seed_multimodal.disk import disk_is_full
from seed_multimodal.errors import (
    ConfigError,
    SeedError,
    SeedWarning,
    first_line,
    install_hint,
    package_of,
)

_plain_format = warnings.formatwarning
AUTO = "auto: on CUDA float16 for images, bfloat16 for the language model; float32 elsewhere"
MAX_RUNNING = 16  # sequences at once: rows of the KV cache
# Exit codes; the last one is that of a shell's Ctrl-C.
DONE = 0
SOME_FAILED = 1
COMMAND_FAILED = 2
INTERRUPTED = 130
# Loaded here, since a child must not load a library between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def log_line(text: str) -> None:
    """Write a line to stderr in one call, so that lines of several processes do not mix."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def rank_and_world_size() -> tuple[int, int]:
    """torchrun's RANK and WORLD_SIZE; default 0 of 1. Raises ConfigError: there is no such process,
    which would work alone, or on nobody's share."""
    world_size = os.environ.get("WORLD_SIZE") or "1"
    rank = os.environ.get("RANK") or ("0" if world_size == "1" else "not set")
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise ConfigError(
            f"RANK is {rank} and WORLD_SIZE {world_size}: set both, RANK from 0 to WORLD_SIZE - 1, "
            "or neither."
        )
    return int(rank), int(world_size)


def node_count() -> int:
    """Machines of a torchrun, by LOCAL_WORLD_SIZE; 1 if they run different numbers of processes."""
    _, world_size = rank_and_world_size()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
    return world_size // local_size if world_size % local_size == 0 else 1


def run_guarded(program: str, debug: bool, work: Callable[[], int]) -> int:
    """Run `work` and return its exit code; user-facing errors are logged (`COMMAND_FAILED`) unless
    `debug`. One of several processes names its rank and host."""
    # Of a caller that has closed a standard stream (`>&-`): what is written there is dropped.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r+")
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    try:
        rank, world_size = rank_and_world_size()
    except ConfigError as error:
        log_line(f"{program}: {error}")
        return COMMAND_FAILED
    if world_size > 1:
        program += f" (rank {rank} on {platform.node()})"

    def format_warning(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> str:
        if issubclass(category, SeedWarning):
            return f"{program}: warning: {message}\n"
        return _plain_format(message, category, *args, **kwargs)

    warnings.formatwarning = format_warning
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper):
        # Lines appear at once, also in files and pipes; letters that the locale lacks, and names
        # that are not UTF-8, are escaped.
        stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        code = work()
        stdout.flush()
        return code
    except KeyboardInterrupt:
        log_line(f"{program}: interrupted.")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has ended (`seed … | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        return DONE
    except Exception as error:
        sentence = str(error) if isinstance(error, SeedError) else _machine_error_sentence(error)
        if debug or not sentence:
            raise
        log_line(f"{program}: {sentence}")
        return COMMAND_FAILED
    finally:
        sys.stdout = stdout


def claim_stdout() -> TextIO:
    """Standard output for a result itself; what the program prints from now on goes to stderr."""
    stdout = sys.stdout
    sys.stdout = sys.stderr
    return stdout


def _machine_error_sentence(error: Exception) -> str:
    """Message for a missing package of an extra, a full disk or out of memory; "" for other
    errors."""
    if isinstance(error, ModuleNotFoundError):
        module = error.name or ""
        hint = install_hint(module)
        if hint:
            return f"the package {package_of(module)} is not installed, which this needs: {hint}."
    if str(error).startswith("DataLoader worker"):  # raised by torch's signal handler, anywhere
        return f"{first_line(error)}, often because memory ran out; resume with fewer workers."
    if disk_is_full(error):
        file = getattr(error, "filename", None) or "a file"
        return f"{file} cannot be written: the disk or quota is full."
    from seed_multimodal.device import is_out_of_memory  # loads torch

    if is_out_of_memory(error):
        return (
            f"memory does not suffice ({first_line(error)}). Less is needed with --offload, "
            "--quantization, smaller batches or smaller images, where the program has them, or "
            "with --device cpu."
        )
    return ""


def run_and_exit(work: Callable[[], int]) -> NoReturn:
    """End the program with the exit code of `work`."""
    code: object = 1
    try:
        code = work()
    except SystemExit as stopped:
        code = stopped.code
    except Exception:  # noqa: BLE001 (a bug; torchrun must see this process end)
        traceback.print_exc()
    if os.environ.get("WORLD_SIZE", "") in ("", "1"):  # also where the two are refused
        sys.exit(code)  # type: ignore[arg-type]
    # One of several processes ends without Python's tear-down, which after a run over gloo may
    # abort in C++ (torch 2.13), so that torchrun would report a failure.
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def end_with_parent() -> None:
    """Initializer of a process pool: each process ends as soon as its parent is dead, by SIGKILL
    too."""

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(SOME_FAILED)

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def kill_with_parent() -> None:
    """In a child process: Linux kills it when its parent ends, by SIGKILL too."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


@contextlib.contextmanager
def ended_by_sigterm(on_signal: Callable[[], None] | None = None) -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does: by KeyboardInterrupt, after `on_signal`.
    Only in the main thread."""

    def end(signum: int, frame: FrameType | None) -> None:
        if on_signal is not None:
            on_signal()
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(signum) == signal.SIG_IGN:  # such as under nohup
                    continue
                previous = signal.signal(signum, end)
                stack.callback(signal.signal, signum, previous)
        yield


def add_debug(parser: ArgumentParser) -> None:
    """`--debug`, which every program has."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_device(parser: _ActionsContainer, dtype: str | None = "auto", meaning: str = AUTO) -> None:
    """`--device`, and `--dtype` as of `add_dtype`."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    add_dtype(parser, dtype, meaning)


def add_dtype(parser: _ActionsContainer, dtype: str | None = "auto", meaning: str = AUTO) -> None:
    """`--dtype` with its default; `meaning` explains the default in the help."""
    parser.add_argument(
        "--dtype", default=dtype, help=f"auto, float32, bfloat16 or float16 (default: {meaning})"
    )


def bounded_int(minimum: int) -> Callable[[str], int]:
    """A flag's type: integers from `minimum` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise ArgumentTypeError(f"must be a whole number, {minimum} or more, not {text!r}")
        return int(text)

    return parse


def run_program(
    parser: ArgumentParser,
    work: Callable[[Namespace], int],
    argv: Sequence[str] | None = None,
    name: str | None = None,
) -> int:
    """Read the flags (and `--debug`), run `work` on them and return its exit code, see
    `run_guarded`."""
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_guarded(name or parser.prog, args.debug, lambda: work(args))
