"""Failures of the machine during training (memory, a dead process, a disk), each reported as one sentence."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from seed_multimodal.errors import SeedError, first_line

STOPPED = 143  # SIGTERM: the step was finished and saved
STUCK = 75  # another process did not answer in time

_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",
               "timed out", "NCCL", "remote process", "no response from")
_SMALLER = "data.rows and data.length, or data.batch_size and sizes of pictures"


class TrainingError(SeedError):
    """A run that cannot continue: a loss that is not finite, no memory, a process that died, a disk that is full."""


@contextmanager
def translate_errors(where: str, saved: str) -> Iterator[None]:
    """Translate the failures of a step into sentences.

    Args:
        where: what was being done (`"step 12"`).
        saved: what is on the disk; the end of the sentence.

    Raises:
        TrainingError: out of memory, another process is gone, or fp16 gradients that overflow at DeepSpeed's smallest
            loss scale. Other errors pass unchanged.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"Out of GPU memory at {where} ({first_line(error)}): use smaller batches ({_SMALLER}), "
            f"gradient_checkpointing, a ZeRO stage or an offload configuration; {saved}.") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            raise TrainingError(f"Out of memory at {where}: use smaller batches ({_SMALLER}); {saved}.") from error
        if not _is_peer_failure(error):
            raise
        raise TrainingError(f"Another process died or did not answer at {where} ({first_line(error)}); {saved}; the "
                            "same command resumes from there.") from error
    except Exception as error:  # DeepSpeed raises no subclass
        if "loss scale already at minimum" not in str(error):
            raise
        raise TrainingError(f"The fp16 gradients overflow at any loss scale at {where} (use bf16 or fp32); {saved}."
                            ) from error


def _is_peer_failure(error: RuntimeError) -> bool:
    distributed = getattr(torch.distributed, "DistBackendError", ())
    text = str(error)
    return isinstance(error, distributed) or any(word in text for word in _PEER_WORDS)


class Watchdog:
    """Ends this process with a sentence when a step takes longer than `seconds`: some other process hangs.

    A collective that waits for a dead process does not return to Python, so a thread has to do it. A context manager;
    `beat` restarts the clock; before the first one (models load, kernels compile) nothing is watched.
    """

    def __init__(self, seconds: float, program: str, saved: str = "nothing was saved yet") -> None:
        self.seconds, self.program, self.saved = seconds, program, saved
        self.what = ""
        self._last: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._ended.set()

    def beat(self, what: str, saved: str) -> None:
        """Restart the clock: the run begins `what`, with `saved` on the disk."""
        self.what, self.saved, self._last = what, saved, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, self.seconds / 4)):
            if self._last is not None and time.monotonic() - self._last > self.seconds:
                sys.stderr.write(f"{self.program}: {self.what} has taken more than {self.seconds / 60:g} minutes, so "
                                 f"another process is dead or stuck; {self.saved}; the same command resumes from "
                                 f"there.\n")
                sys.stderr.flush()
                os._exit(STUCK)
